"""Token shards in a bucket (s3, gs) and in a repository of the hub (hf), served on this machine by the real protocols."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import sys
import threading
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hub_server import Hub, use
from test_cli import run
from test_stream import NAMES, here, trained
from workspace_factory import by_hand, copied, one_thread, records, settings, weights  # noqa: F401

from nano4m_cli.data import stream
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shard_cache import RemoteFile, fetch_file
from nano4m_cli.errors import FetchError

TAR = "tokens/rgb/train/shard-000001.tar"


@pytest.fixture
def origin(by_hand, tmp_path):  # noqa: F811
    found = copied(by_hand, tmp_path / "origin").dataset()
    stream.publish(found, NAMES)
    return found


def files_of(dataset):
    return {p.relative_to(dataset.path).as_posix(): p.read_bytes() for p in dataset.path.rglob("*") if p.is_file()}


def local_run(origin, tmp_path):
    """The same run from the same files at a path: what any other address must give."""
    return trained(here(tmp_path, "plain").root, "run", data__url=f"file://{origin.path}")


# -- hf -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(origin, tmp_path, monkeypatch):
    from huggingface_hub import HfFileSystem

    found = Hub({"user/scenes": files_of(origin)})
    use(found, monkeypatch, tmp_path / "hub")
    monkeypatch.setattr("nano4m_cli.data.shard_cache.BACKOFF", 0.01)
    HfFileSystem.clear_instance_cache()
    yield found
    HfFileSystem.clear_instance_cache()
    found.close()


def test_training_from_a_repository_of_the_hub(hub, origin, tmp_path, one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nano4m_cli.data.shard_cache.PIECE", 2000)
    monkeypatch.setattr("nano4m_cli.data.shard_cache.BLOCK", 1000)
    hub.breaks = {TAR: 500}
    root = here(tmp_path).root
    there = trained(root, "run", data__url="hf://datasets/user/scenes", train__workers=1)
    plain = local_run(origin, tmp_path)
    assert weights(there) == weights(plain) and records(there) == records(plain)
    ranges = [r for _, path, r in hub.asked if path.endswith(TAR) and "/cdn/" in path]
    first = [int(r.removeprefix("bytes=").partition("-")[0]) for r in ranges]
    assert first == sorted(first) and len(first) > 4 and first.count(0) == 2, "gone on with after the break, not begun anew"


def test_what_the_hub_refuses_is_told_at_once(hub, tmp_path):
    from huggingface_hub import HfFileSystem

    def said(url):
        HfFileSystem.clear_instance_cache()
        before = len(hub.asked)
        with pytest.raises(FetchError) as caught:
            fetch_file(RemoteFile(url, -1, ""), tmp_path / "out")
        assert len(hub.asked) - before < 12 and url in caught.value.message
        return f"{caught.value.message} | {caught.value.hint}"

    assert "there is no such file" in said("hf://datasets/user/scenes/tokens/none.json")
    assert "there is no such file" in said("hf://datasets/user/other/tokens/manifest.json")
    hub.gated = {"user/scenes"}
    assert "HF_TOKEN" in said("hf://datasets/user/scenes/tokens/manifest.json")


# -- s3 -------------------------------------------------------------------------------------------------------------------


class Wire:
    """Carries bytes to a server and back, and ends one connection after `cut` bytes of an answer that is longer."""

    def __init__(self, port):
        self.port, self.cut, self.asked = port, None, []
        self.door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self.door.accept()
                there = socket.create_connection(("127.0.0.1", self.port))
                threading.Thread(target=self.carry, args=(here, there, False), daemon=True).start()
                threading.Thread(target=self.carry, args=(there, here, True), daemon=True).start()

    def carry(self, a, b, answers):
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                if not answers and data.startswith(b"GET"):
                    self.asked.append(data.decode("latin1"))
                if answers and self.cut is not None and len(data) > self.cut:
                    b.sendall(data[: self.cut])
                    self.cut = None
                    break
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def moto():
    for package in ("s3fs", "moto", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install s3fs 'moto[server]')")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(moto, origin, tmp_path, monkeypatch):
    """s3://lab/scenes on a real S3 server, behind a wire that can break."""
    import boto3
    import s3fs

    wire = Wire(moto)
    known = {"AWS_ENDPOINT_URL": wire.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "HOME": str(tmp_path),
             "NO_PROXY": "127.0.0.1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto}")
    client.create_bucket(Bucket="lab")
    for name, body in files_of(origin).items():
        client.put_object(Bucket="lab", Key=f"scenes/{name}", Body=body, ACL="public-read")
    s3fs.S3FileSystem.clear_instance_cache()
    yield wire
    s3fs.S3FileSystem.clear_instance_cache()
    wire.door.close()


def test_training_from_a_bucket(bucket, origin, tmp_path, one_thread):  # noqa: F811
    plain, root = local_run(origin, tmp_path), here(tmp_path).root
    for workers in (0, 1):
        there = trained(root, f"run{workers}", data__url="s3://lab/scenes", data__dataset=f"d{workers}", train__workers=workers,
                        data__cache=root / f"cache{workers}")
        assert weights(there) == weights(plain) and records(there) == records(plain)


def test_a_break_is_gone_on_with(bucket, origin, tmp_path, monkeypatch):
    monkeypatch.setattr("nano4m_cli.data.shard_cache.PIECE", 4000)
    monkeypatch.setattr("nano4m_cli.data.shard_cache.BLOCK", 2000)
    body = (origin.path / TAR).read_bytes()
    assert len(body) > 16_000
    bucket.cut = 3000
    dest = fetch_file(RemoteFile(f"s3://lab/scenes/{TAR}", len(body), ""), tmp_path / "out")
    assert dest.read_bytes() == body and bucket.cut is None
    ranges = [line.split("=")[1] for head in bucket.asked for line in head.splitlines() if line.lower().startswith("range:")]
    first = [int(r.partition("-")[0]) for r in ranges]
    assert first == sorted(first) and len(first) > 3 and first.count(0) <= 2


def test_what_a_bucket_refuses_is_told_at_once(bucket, tmp_path, monkeypatch):
    import s3fs

    (tmp_path / "tiny.yaml").write_text("{}")
    base = ["train", tmp_path / "tiny.yaml", *settings(name="x"), "--root", here(tmp_path).root, "--dry-run"]
    for url, said in (("s3://lab/none", "s3://lab/none/tokens/manifest.json: there is no such file"),
                      ("s3://other/scenes", "s3://other/scenes/tokens/manifest.json: there is no such file")):
        result = run(*base, f"data.url={url}")
        assert result.exit_code == 1 and said in result.stderr and "is the address right?" in result.stderr
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    result = run(*base, "data.url=s3://lab/scenes")
    assert result.exit_code == 1 and "NoCredentialsError: Unable to locate credentials" in result.stderr
    assert "hint: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    import fsspec.config

    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"anon": True}})  # what FSSPEC_S3_ANON=true makes of a new process
    s3fs.S3FileSystem.clear_instance_cache()
    result = run(*base, "data.url=s3://lab/scenes", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["train_samples"] == 48, result.stderr


# -- gs -------------------------------------------------------------------------------------------------------------------


class Store(http.server.BaseHTTPRequestHandler):
    """Google's JSON API, as far as objects are read by it."""

    files: dict[str, bytes] = {}

    def log_message(self, *args):
        pass

    def do_GET(self):
        name = unquote(urlsplit(self.path).path.partition("/b/lab/o/")[2]).removeprefix("scenes/")
        body = self.files.get(name, b"")
        if not name:
            return self.send(200, b'{"kind": "storage#objects", "items": []}')
        if name not in self.files:
            return self.send(404, b'{"error": {"code": 404, "message": "No such object"}}')
        if not self.path.startswith("/download"):
            about = {"kind": "storage#object", "bucket": "lab", "name": f"scenes/{name}", "size": str(len(body)), "generation": "1"}
            return self.send(200, json.dumps(about).encode())
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return self.send(206, body[int(first) : int(last) + 1])

    def send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_reading_from_google_s_store(origin, tmp_path, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    monkeypatch.setattr(Store, "files", files_of(origin))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    gcsfs.GCSFileSystem.clear_instance_cache()
    far = TokenData(stream.open_remote("gs://lab/scenes", here(tmp_path)), "train", NAMES)
    assert np.array_equal(far.read(np.arange(48))[0], TokenData(origin, "train", NAMES).read(np.arange(48))[0])
    with pytest.raises(FetchError, match="gs://lab/none/tokens/manifest.json: there is no such file"):
        stream.open_remote("gs://lab/none", here(tmp_path))
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


# -- without the packages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url, package", [("s3://a/b", "nano4m[s3]"), ("gs://a/b", "gcsfs"), ("az://a/b", "adlfs")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, url, package):
    import fsspec  # noqa: F401

    for module in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, module, None)
    sys.modules["fsspec.registry"]._registry.pop(urlsplit(url).scheme, None)
    with pytest.raises(FetchError, match=f"cannot read {urlsplit(url).scheme}:// addresses here") as caught:
        fetch_file(RemoteFile(url, -1, ""), tmp_path / "out")
    assert f"pip install {package}" in caught.value.hint.replace("'", "")


def test_all_schemes_read_the_same(origin, hub, tmp_path):
    far = TokenData(stream.open_remote("hf://datasets/user/scenes", here(tmp_path)), "train", NAMES)
    assert np.array_equal(far.read(np.arange(48))[0], TokenData(origin, "train", NAMES).read(np.arange(48))[0])
