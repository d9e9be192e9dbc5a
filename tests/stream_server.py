"""A web server of published token shards on this machine, which misbehaves on request."""

from __future__ import annotations

import http.server
import threading
import time


class Server:
    """Serves a folder at its root, and again below any other name ("/RUN/tokens/..."), so that the log tells who asked.

    Attributes:
        asked: names asked for, with the run. fails: {name: status, once each}. cuts: {name: bytes after which it ends, once each}.
        stalls: names that are never answered. instead: {name: bytes served in its place}. gone: names that are not there.
        heals: the run whose first request makes an end of stalls.
    """

    def __init__(self, folder):
        self.asked, self.fails, self.cuts, self.stalls, self.instead, self.gone = [], {}, {}, set(), {}, set()
        self.heals = None
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                name = self.path.lstrip("/")
                server.asked.append(name)
                if server.heals is not None and name.startswith(server.heals):
                    server.stalls.clear()
                if name in server.stalls:
                    time.sleep(5)
                    return
                if name in server.fails:
                    return self.send_error(server.fails.pop(name))
                run, _, rest = name.partition("/")
                path = folder / (name if run == "tokens" else rest)
                if name in server.gone or not path.is_file():
                    return self.send_error(404)
                body = server.instead.get(name, path.read_bytes())
                start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") else 0
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("ETag", f'"{len(body)}"')
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start : start + server.cuts.pop(name, len(body))])

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # who asks may leave before the answer
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def tars(self, run=""):
        return [n for n in self.asked if n.endswith(".tar") and n.startswith(run)]

    def close(self):
        self.http.shutdown()
        self.http.server_close()
