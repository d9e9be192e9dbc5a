"""Downloads against a real HTTP server on this machine that misbehaves on request; archives that try to escape."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections import namedtuple

import pytest

from nano4m_cli.data import download as module
from nano4m_cli.data.download import download, extract
from nano4m_cli.errors import FetchError

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(BODY).hexdigest()


class Server:
    """Serves `body`; `script` holds one behaviour per request ("ok" when used up); `seen` the Range headers."""

    def __init__(self):
        self.body, self.script, self.seen, self.etag, self.ranges = BODY, [], [], '"one"', True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, h):
        h.close_connection = True
        self.seen.append(h.headers.get("Range"))
        what = self.script.pop(0) if self.script else "ok"
        if isinstance(what, int):
            h.send_response(what)
            for k, v in {"Content-Length": "0", "Retry-After": "0"}.items():
                h.send_header(k, v)
            h.end_headers()
            return
        if what.startswith("redirect "):
            h.send_response(302)
            h.send_header("Location", what.split()[1])
            h.send_header("Content-Length", "0")
            h.end_headers()
            return
        body, start = self.body, 0
        changed = h.headers.get("If-Range") not in (None, self.etag)
        if self.ranges and h.headers.get("Range") and not changed:
            start = int(h.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                h.send_response(416)
                h.send_header("Content-Range", f"bytes */{len(body)}")
                h.send_header("Content-Length", "0")
                h.end_headers()
                return
            h.send_response(206)
            h.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            h.send_response(200)
        if what not in ("no length", "chunked"):
            h.send_header("Content-Length", str(len(body) - start))
        if what == "chunked":
            h.send_header("Transfer-Encoding", "chunked")
        if self.etag:
            h.send_header("ETag", self.etag)
        h.end_headers()
        sent = body[start : start + 300_000] if what == "break" else body[start:]
        h.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent), sent) if what == "chunked" else sent)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()


def get(server, tmp_path, sha=SHA, **options):
    return download(server.url, tmp_path / "deep" / "file.bin", sha, backoff=0.001, **options)


def assert_clean(path):
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_plain_and_kept(server, tmp_path):
    seen = []
    path = get(server, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert_clean(path)
    assert seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)
    get(server, tmp_path)
    get(server, tmp_path, sha=None)
    assert len(server.seen) == 1  # a whole file is not fetched again
    path.write_bytes(b"other")
    assert_clean(get(server, tmp_path))  # a file with another digest is


def test_broken_connections_resume(server, tmp_path):
    server.script = ["break"] * 3
    assert_clean(get(server, tmp_path, retries=1))  # each failure brought new bytes, so one retry is enough
    assert server.seen == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_resumes_in_a_later_call(server, tmp_path):
    server.script = ["break"]
    with pytest.raises(FetchError, match=r"127\.0\.0\.1.*(1 attempts)") as err:
        get(server, tmp_path, sha=None, retries=0)
    assert "resumes" in err.value.hint
    assert not (tmp_path / "deep/file.bin").exists() and (tmp_path / "deep/file.bin.part").stat().st_size == 300_000
    assert_clean(get(server, tmp_path, sha=None))
    assert server.seen[-1] == "bytes=300000-"


def test_changed_file_is_not_joined(server, tmp_path):
    server.script, server.body = ["break"], BODY[::-1]
    with pytest.raises(FetchError):
        get(server, tmp_path, sha=None, retries=0)
    server.body, server.etag = BODY, '"two"'
    assert_clean(get(server, tmp_path, sha=None))


def test_without_validator_only_a_digest_allows_resuming(server, tmp_path):
    server.etag, server.script = "", ["break"]
    assert_clean(get(server, tmp_path, sha=None))
    assert server.seen == [None, None]
    (tmp_path / "deep/file.bin").unlink()
    server.script, server.body = ["break"], BODY[::-1]
    with pytest.raises(FetchError):
        get(server, tmp_path, retries=0)
    server.body = BODY
    assert_clean(get(server, tmp_path))  # joined parts fail the digest, then it starts over
    assert server.seen[-2:] == ["bytes=300000-", None]


def test_server_without_ranges(server, tmp_path):
    server.ranges, server.script = False, ["break", "break"]
    assert_clean(get(server, tmp_path))


def test_part_that_is_whole_or_too_long(server, tmp_path):
    part = tmp_path / "deep/file.bin.part"
    for size, total in ((len(BODY), None), (len(BODY) + 10, None), (len(BODY), len(BODY))):
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(BODY + b"x" * (size - len(BODY)))
        part.with_name("file.bin.part.json").write_text(
            f'{{"url": "{server.url}", "etag": "\\"one\\"", "total": {total or "null"}}}'
        )
        path = get(server, tmp_path)
        assert_clean(path)
        path.unlink()
    assert server.seen == [f"bytes={len(BODY)}-", f"bytes={len(BODY) + 10}-", None]


def test_wrong_digest(server, tmp_path):
    with pytest.raises(FetchError, match="not the expected file") as err:
        get(server, tmp_path, sha="0" * 64, hint="give mirror=DIR")
    assert SHA in err.value.message and err.value.hint == "give mirror=DIR" and len(server.seen) == 1
    assert not (tmp_path / "deep/file.bin").exists()
    assert (tmp_path / "deep/file.bin.part").stat().st_size == 0


def test_statuses(server, tmp_path):
    server.script = [404]
    with pytest.raises(FetchError, match="HTTP 404 Not Found"):
        get(server, tmp_path)
    assert len(server.seen) == 1  # a refusal is not asked again
    server.script = [503, 429, 500]
    assert_clean(get(server, tmp_path))
    (tmp_path / "deep/file.bin").unlink()
    server.script = [503] * 9
    with pytest.raises(FetchError, match=r"HTTP 503.*\(3 attempts\)"):
        get(server, tmp_path, retries=2)


def test_unreachable(tmp_path, server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(FetchError, match="ConnectError"):
        get(server, tmp_path, retries=1)


def test_stated_length(server, tmp_path):
    server.script = ["no length"]
    with pytest.raises(FetchError, match="how long"):
        get(server, tmp_path, sha=None)
    server.script = ["no length"]
    assert_clean(get(server, tmp_path))  # the digest says that it is whole
    (tmp_path / "deep/file.bin").unlink()
    server.script = ["chunked"]
    assert_clean(get(server, tmp_path, sha=None))


def test_limits(server, tmp_path, monkeypatch):
    for behaviour in ("ok", "chunked"):
        server.script = [behaviour]
        with pytest.raises(FetchError, match="limit of 1,000"):
            get(server, tmp_path, max_bytes=1000)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: usage(1, 1, 10))
        with pytest.raises(FetchError, match="no room") as err:
            get(server, tmp_path)
        assert "free some space" in err.value.hint

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(FetchError, match="disk is full"):
            get(server, tmp_path)
    assert not (tmp_path / "deep/file.bin").exists()
    assert_clean(get(server, tmp_path))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "pipe:cat", "/etc/passwd", "https://", ""])
def test_foreign_addresses(url, tmp_path):
    with pytest.raises(FetchError, match="only http"):
        download(url, tmp_path / "x", None)


def test_redirects(server, tmp_path):
    server.script = ["redirect /other"]
    assert_clean(get(server, tmp_path))
    (tmp_path / "deep/file.bin").unlink()
    server.script = ["redirect file:///etc/passwd"]
    with pytest.raises(FetchError):
        get(server, tmp_path)


def test_two_processes_do_not_mix(server, tmp_path):
    part = tmp_path / "deep/file.bin.part"
    with module._locked(part), pytest.raises(FetchError, match="another process"):
        get(server, tmp_path)


# -- archives ---------------------------------------------------------------------------------------------------------


def tar(path, *members):
    with tarfile.open(path, "w:gz") as box:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if len(data) != 1 or data.isupper():  # a member's type is one digit, contents are not
                info.size = len(data)
                box.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data, "/etc/passwd"
                box.addfile(info)
    return path


def test_extracts_what_is_selected(tmp_path):
    archive = tar(tmp_path / "a.tar.gz", ("top/", tarfile.DIRTYPE), ("top/x/1.wav", b"one"), ("top/y", b"no"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as box:
        box.writestr("top/x/1.wav", b"one")
        box.writestr("top/y", b"no")
    for i, path in enumerate((archive, tmp_path / "a.zip")):
        out = tmp_path / str(i)
        pick = extract(path, out, lambda n: n.removeprefix("top/x/") if n.endswith(".wav") else None)
        assert pick == ["1.wav"] and (out / "1.wav").read_bytes() == b"one" and len(list(out.rglob("*"))) == 1
    assert extract(archive, tmp_path / "all") == ["top/x/1.wav", "top/y"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:evil"])
def test_names_that_leave_the_folder(name, tmp_path):
    archive = tar(tmp_path / "a.tar.gz", (name, b"xx"))
    with pytest.raises(FetchError, match="leads out"):
        extract(archive, tmp_path / "out" / "in")
    assert not list((tmp_path / "out").rglob("*evil*"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as box:
        box.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(FetchError, match="leads out"):
        extract(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(kind, tmp_path):
    archive = tar(tmp_path / "a.tar.gz", ("link", kind), ("link/x", b"A"))
    with pytest.raises(FetchError, match="link or device"):
        extract(archive, tmp_path / "out")
    assert extract(archive, tmp_path / "b", lambda n: n if n == "link/x" else None) == ["link/x"]


def test_zip_link(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as box:
        box.writestr(info, "/etc/passwd")
    with pytest.raises(FetchError, match="link or device"):
        extract(tmp_path / "a.zip", tmp_path / "out")


def test_damaged_and_oversized_archives(tmp_path):
    archive = tar(tmp_path / "a.tar.gz", ("x", bytes(1 << 20)), ("y", b"A"))
    with pytest.raises(FetchError, match="more than 1,000 bytes"):
        extract(archive, tmp_path / "out", max_bytes=1000)
    with pytest.raises(FetchError, match="more than 1 files"):
        extract(archive, tmp_path / "files", max_files=1)
    with pytest.raises(FetchError, match="twice"):
        extract(archive, tmp_path / "same", lambda n: "z")
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:-200])
    (tmp_path / "bad.tar.gz").write_bytes(b"not an archive")
    (tmp_path / "page.tar.gz").write_bytes(gzip.compress(b"<html>" * 200))
    below = tar(tmp_path / "below.tar.gz", ("x", b"A"), ("x/y", b"A"))
    with pytest.raises(FetchError, match="below a file"):
        extract(below, tmp_path / "below")
    for name in ("cut", "bad", "page", "none"):
        with pytest.raises(FetchError, match=f"{name}.tar.gz"):
            extract(tmp_path / f"{name}.tar.gz", tmp_path / name)
