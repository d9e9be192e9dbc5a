"""A Hugging Face hub on this machine: data set repositories in the API's own format, that misbehaves on request."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Serves `repos`: {id: {file: bytes}} at one commit, files above `lfs_from` bytes by a redirect, as large ones are.

    Attributes:
        asked: (method, path, Range header) of each request.
        breaks: {file: bytes after which the connection ends}, once each. refused: {file: status}.
        gated: ids whose files are refused. changed: {file: bytes served instead of what is listed}.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], lfs_from: int = 2000):
        self.repos, self.lfs_from, self.commit = repos, lfs_from, "c0ffee" + "0" * 34
        self.asked, self.breaks, self.refused, self.gated, self.changed = [], {}, {}, set(), {}
        self.token = None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.asked.append((self.command, self.path, self.headers.get("Range")))
                hub.token = self.headers.get("Authorization")
                self.close_connection = True
                hub.answer(self, unquote(urlsplit(self.path).path).strip("/").split("/"))

            do_HEAD = do_POST = do_GET

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def downloads(self) -> list[tuple[str, str | None]]:
        """Return (name, Range) of the files asked for."""
        return [(p.rsplit("/", 1)[-1], r) for m, p, r in self.asked if m == "GET" and "/resolve/" in p]

    def answer(self, h, parts: list[str]) -> None:
        if parts[:2] == ["api", "datasets"]:
            repo, kind, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            if repo not in self.repos:
                return self.send(h, 401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            if revision not in ("main", self.commit):
                return self.send(h, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if kind == "revision":
                doc = {"id": repo, "sha": self.commit, "private": False, "tags": ["license:mit", "size:n<1K"],
                       "siblings": [{"rfilename": n} for n in self.repos[repo]]}
            elif kind == "paths-info":
                asked = parse_qs(h.rfile.read(int(h.headers["Content-Length"])).decode())["paths"]
                doc = [self.entry((n, self.repos[repo][n])) for n in asked if n in self.repos[repo]]
            else:
                folder = {"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}
                doc = [folder, *map(self.entry, self.repos[repo].items())]
            return self.send(h, 200, json.dumps(doc).encode(), {"Content-Type": "application/json"})
        if parts[0] == "cdn":
            name = "/".join(parts[3:])
            return self.file(h, name, self.repos["/".join(parts[1:3])][name], f'"{parts[1]}"')
        repo, name = "/".join(parts[1:3]), "/".join(parts[5:])
        if repo in self.gated:
            return self.send(h, 403, b"", {"X-Error-Code": "GatedRepo"})
        body = self.repos.get(repo, {}).get(name)
        if body is None or parts[4] not in ("main", self.commit):
            return self.send(h, 404, b"", {"X-Error-Code": "EntryNotFound"})
        told = {"X-Repo-Commit": self.commit}
        if len(body) >= self.lfs_from:
            linked = {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
            return self.send(h, 302, b"", told | linked | {"Location": f"{self.url}/cdn/{repo}/{name}"})
        return self.file(h, name, body, f'"{git(body)}"', told)

    def entry(self, item: tuple[str, bytes]) -> dict:
        name, body = item
        lfs = {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}}
        return {"type": "file", "path": name, "size": len(body), "oid": git(body)} | (lfs if len(body) >= self.lfs_from else {})

    def file(self, h, name: str, body: bytes, etag: str, told: dict | None = None) -> None:
        if name in self.refused:
            return self.send(h, self.refused[name], b"", {})
        body = self.changed.get(name, body)
        start, end, status, ranged = 0, len(body), 200, {}
        if (asked := h.headers.get("Range")) and h.headers.get("If-Range") in (None, etag):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(body)), len(body) - 1)
            status, ranged = 206, {"Content-Range": f"bytes {start}-{end}/{len(body)}"}
        cut = self.breaks.pop(name, None)
        rest = body[start : end + 1]
        return self.send(h, status, rest, {"ETag": etag, **ranged, **(told or {})}, rest if cut is None else rest[:cut])

    def send(self, h, status: int, body: bytes, told: dict, sent: bytes | None = None) -> None:
        h.send_response(status)
        for k, v in {"Content-Length": str(len(body)), "Connection": "close", **told}.items():
            h.send_header(k, v)
        h.end_headers()
        if h.command == "GET":
            h.wfile.write(body if sent is None else sent)


def git(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def use(hub: Hub | str, monkeypatch, cache) -> None:
    """Point the hub's client of this process to a hub (or address), with a cache of its own."""
    url = hub if isinstance(hub, str) else hub.url
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
