"""Downloads from a server on the loopback device that breaks off, refuses and lies."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import vertebra
from vertebra import download
from vertebra.download import DownloadError, cache_folder, fetch

BODY = bytes(range(256)) * 64
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server:
    """Answers as the test's `plan` says; `seen` lists the Range header (None without one) of every request."""

    def __init__(self):
        self.body, self.plan, self.seen, self.ranges = BODY, [], [], True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                wanted = self.headers.get("Range")
                outer.seen.append(wanted)
                step = outer.plan.pop(0) if outer.plan else "whole"
                if isinstance(step, int):
                    self.send_response(step)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                if start and start >= len(outer.body):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                rest = outer.body[start:]
                self.send_response(206 if start else 200)
                if step == "chunks":
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    self.wfile.write(b"1000\r\n" + rest[:4096] + b"\r\n1000\r\n" + rest[4096:5000])
                    self.close_connection = True
                    return
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                if step == "half":
                    self.wfile.write(rest[: len(rest) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(rest)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def url(self, name="weights.bin"):
        return f"http://127.0.0.1:{self.http.server_port}/{name}"


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()
    made.thread.join()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_plain_download_and_cache(server, tmp_path):
    path = fetch(server.url("a%20b.bin?x=1"), DIGEST, tmp_path / "deep" / "cache")
    assert path.read_bytes() == BODY
    assert names(path.parent) == [path.name]
    assert fetch(server.url("a%20b.bin?x=1"), DIGEST, tmp_path / "deep" / "cache") == path
    assert server.seen == [None]
    assert fetch(server.url("a%20b.bin?x=2"), "", tmp_path / "deep" / "cache") != path
    assert len(server.seen) == 2


@pytest.mark.parametrize("sha256", (DIGEST, DIGEST[:8], DIGEST[:8].upper()))
def test_digest_or_its_first_digits(server, tmp_path, sha256):
    assert fetch(server.url(), sha256, tmp_path).read_bytes() == BODY


def test_another_digest_leaves_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match=f"sha256 is {DIGEST[:16]}.*expected 0123.*removed"):
        fetch(server.url(), "0123", tmp_path)
    assert names(tmp_path) == []
    assert len(server.seen) == 1


def test_a_broken_answer_is_continued(server, tmp_path):
    server.plan = ["half", "half"]
    path = fetch(server.url(), DIGEST, tmp_path)
    assert path.read_bytes() == BODY
    assert server.seen == [None, "bytes=8192-", "bytes=12288-"]
    assert names(tmp_path) == [path.name]


def test_a_server_that_cannot_resume_starts_over(server, tmp_path):
    server.plan, server.ranges = ["half"], False
    assert fetch(server.url(), DIGEST, tmp_path).read_bytes() == BODY
    assert server.seen == [None, "bytes=8192-"]


def test_a_chunked_answer_that_breaks_off_is_retried(server, tmp_path):
    server.plan = ["chunks"]
    path = fetch(server.url(), DIGEST, tmp_path)
    assert path.read_bytes() == BODY
    assert len(server.seen) == 2


def test_a_chunked_answer_that_always_breaks_off(server, tmp_path):
    server.plan, server.ranges = ["chunks"] * 3, False
    with pytest.raises(DownloadError, match="not fetched after 3 attempts"):
        fetch(server.url(), DIGEST, tmp_path)
    assert len(server.seen) == 3


def test_interruption_leaves_only_the_part_and_the_next_run_goes_on(server, tmp_path):
    server.plan = ["half", "half", "half"]
    with pytest.raises(
        DownloadError, match=r"not fetched after 3 attempts .*2048 of 4096 bytes.*run again to continue"
    ):
        fetch(server.url(), DIGEST, tmp_path)
    (part,) = names(tmp_path)
    assert part.endswith(".part")
    assert (tmp_path / part).stat().st_size == len(BODY) * 7 // 8
    path = fetch(server.url(), DIGEST, tmp_path)
    assert path.read_bytes() == BODY
    assert server.seen[-1] == f"bytes={len(BODY) * 7 // 8}-"
    assert names(tmp_path) == [path.name]


def test_a_keyboard_interrupt_leaves_no_target(server, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url(), DIGEST, tmp_path)
    (part,) = names(tmp_path)
    assert part.endswith(".part")


def test_a_part_that_is_whole_already(server, tmp_path):
    """Killed between the last byte and the renaming: the server answers 416."""
    path = fetch(server.url(), DIGEST, tmp_path)
    path.rename(path.with_name(path.name + ".part"))
    assert fetch(server.url(), DIGEST, tmp_path).read_bytes() == BODY
    assert names(tmp_path) == [path.name]


def test_not_found_is_final(server, tmp_path):
    server.plan = [404]
    with pytest.raises(DownloadError, match="the server answered 404"):
        fetch(server.url(), folder=tmp_path)
    assert len(server.seen) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", (500, 503, 429))
def test_a_server_in_trouble_is_asked_again(server, tmp_path, code):
    server.plan = [code, code]
    assert fetch(server.url(), DIGEST, tmp_path).read_bytes() == BODY
    assert len(server.seen) == 3
    server.plan = [code] * 3
    with pytest.raises(DownloadError, match=f"after 3 attempts .*{code}"):
        fetch(server.url("other"), DIGEST, tmp_path)


def test_nobody_listens(server, tmp_path):
    url = server.url()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DownloadError, match="not fetched after 2 attempts"):
        fetch(url, folder=tmp_path, retries=2)


@pytest.mark.parametrize("url", ("file:///etc/hostname", "ftp://127.0.0.1/a", "/a/path", "data:,a"))
def test_other_schemes_are_refused(url, tmp_path):
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(url, folder=tmp_path)
    assert names(tmp_path) == []


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VERTEBRA_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("VERTEBRA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "vertebra"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / ".cache" / "vertebra"


@pytest.mark.parametrize("name", ("w.safetensors", "w.pth", "download?id=7"))
def test_a_model_from_an_address(server, tmp_path, monkeypatch, name):
    monkeypatch.setenv("VERTEBRA_CACHE", str(tmp_path / "cache"))
    tiny = dict(depths=(1, 1, 1, 1), dim=32)
    torch.manual_seed(0)
    source = vertebra.create_model("crossformer_tiny", num_classes=3, **tiny)
    file = tmp_path / "file"
    if name.endswith(".pth"):
        torch.save({"model": vertebra.to_official(source)}, file)
    else:
        vertebra.save_checkpoint(source, file)
    server.body = file.read_bytes()
    model = vertebra.create_model("crossformer_tiny", num_classes=3, checkpoint=server.url(name), **tiny)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    vertebra.load_checkpoint(model, server.url(name))
    assert server.seen == [None]
    with pytest.raises(DownloadError, match="sha256"):
        vertebra.load_checkpoint(model, server.url(name + "2"), sha256="00")
