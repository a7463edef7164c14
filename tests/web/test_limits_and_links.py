"""What visitors may send: sizes, lengths, numbers, and links, against a local server that plays the video site."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from efficient_asr.data import AudioReport, load_audio
from efficient_asr.utils.errors import UserError
from efficient_asr.web import decoder
from efficient_asr.web.limits import LINK_HOSTS, Busy, Limits, Visitors
from efficient_asr.web.link_process import options_of
from efficient_asr.web.links import check_link, fetch


def tone(path: Path, seconds: float) -> Path:
    soundfile.write(path, 0.1 * np.sin(np.arange(int(16000 * seconds)) / 10), 16000)
    return path


# ------------------------------------------------------------ files


def test_a_recording_is_read_and_its_place_is_not_shown(tmp_path: Path) -> None:
    assert len(Limits().read(tone(tmp_path / "a.wav", 1.0))) == 16000
    (tmp_path / "b.wav").write_text("not audio")
    with pytest.raises(UserError, match="cannot decode the recording") as error:
        Limits().read(tmp_path / "b.wav")
    assert str(tmp_path) not in str(error.value)


def test_too_long_and_too_large_recordings_are_refused(tmp_path: Path) -> None:
    path = tone(tmp_path / "a.wav", 90)
    with pytest.raises(UserError, match=r"talk lasts 1.5 min; the limit is 1 min"):
        Limits(longest_s=60).read(path, "talk")
    with pytest.raises(UserError, match=r"talk has 2.88 MB; the limit is 1 MB"):
        Limits(largest_mb=1).read(path, "talk")


def test_a_header_that_lies_does_not_get_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "inspect_audio", lambda *_, **__: AudioReport(1.0, None))
    path = str(tone(tmp_path / "a.wav", 5))
    with pytest.raises(UserError, match="longer than 2 s"):
        decoder.read(path, 2, samples=True)
    assert len(decoder.read(path, 5, samples=True)[1]) == 80000


def test_the_process_that_decodes_returns_the_same_samples(tmp_path: Path) -> None:
    path = str(tone(tmp_path / "a.wav", 2))
    report, wav = decoder.decode(path, 60, samples=True)
    assert report == decoder.read(path, 60, samples=True)[0] and torch.equal(wav, load_audio(path))
    assert decoder.decode(path, 60, samples=False) == (report, None)
    assert decoder.decode(path, 1, samples=True) == (report, None)


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(*_: object) -> None:
    time.sleep(60)


def eat(sender: Any, *_: object) -> None:
    decoder.limit_process(1.0, 5.0)
    try:
        bytearray(4 << 30)
    except MemoryError:
        sender.send_bytes(json.dumps({"error": "no memory"}).encode())


@pytest.mark.parametrize(
    ("work", "message"), [(crash, r"crashed .*\(-11\)"), (hang, "longer than 2 s to decode"), (eat, "no memory")]
)
def test_a_file_that_ends_the_decoder_ends_nothing_else(
    work: Callable, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tone(tmp_path / "a.wav", 1)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_work", work)
        patch.setattr(decoder, "SAMPLES_S", 2.0 if work is hang else 60.0)
        with pytest.raises(UserError, match=message):
            Limits(longest_s=1).read(path)
    assert len(Limits().read(path)) == 16000
    assert not multiprocessing.active_children()


# ------------------------------------------------------------ numbers


def test_requests_are_limited_by_page_address_and_in_all() -> None:
    visitors = Visitors(Limits(per_user=1, per_address=2, waiting=3))
    with visitors.enter("a", "1"):
        with pytest.raises(Busy, match="you have 1 requests already"), visitors.enter("a", "1"):
            pass
        with visitors.enter("b", "1"):
            with pytest.raises(Busy, match="you have 2 requests already"), visitors.enter("c", "1"):
                pass
            with visitors.enter("c", "2"), pytest.raises(Busy, match="the app is busy"), visitors.enter("d", "3"):
                pass
    assert not visitors.counts
    with visitors.enter("a", "1"):
        pass


def test_a_request_that_fails_is_not_counted_for_ever() -> None:
    visitors = Visitors(Limits(per_user=1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), visitors.enter("a", "1"):
            raise ZeroDivisionError
    assert not visitors.counts


# ------------------------------------------------------------ links


@pytest.mark.parametrize(
    "link",
    [
        "file:///etc/passwd", "ftp://youtube.com/a", "youtube.com/watch?v=1", "https://", "", "http://[", "https://youtube.com:x/",
        "https://user:secret@youtube.com/a", "javascript:alert(1)", "/etc/passwd",
    ],
)  # fmt: skip
def test_only_web_addresses_are_links(link: str) -> None:
    with pytest.raises(UserError, match="not a web address"):
        check_link(link, LINK_HOSTS)


@pytest.mark.parametrize(
    "link",
    [
        "http://127.0.0.1/", "http://localhost:7860/", "http://169.254.169.254/latest/meta-data", "https://youtube.com.evil.org/a",
        "https://evilyoutube.com/a", "https://[::1]/", "http://youtube.com@evil.org/", "http://0/", "https://youtube.com:22/a",
    ],
)  # fmt: skip
def test_other_hosts_are_refused(link: str) -> None:
    with pytest.raises(UserError, match=r"are not allowed here|not a web address"):
        check_link(link, LINK_HOSTS)


@pytest.mark.parametrize(
    "link", ["https://www.youtube.com/watch?v=1", "https://youtu.be/1", " https://archive.org/details/x "]
)
def test_listed_hosts_and_their_subdomains_are_allowed(link: str) -> None:
    check_link(link, LINK_HOSTS)


class Site(http.server.BaseHTTPRequestHandler):
    """A video site with good and hostile pages."""

    audio = b""

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer()

    def answer(self, head: bool = False) -> None:
        name = self.path.split("?")[0]
        self.server.asked.append((self.headers["Host"], name))
        if name == "/elsewhere.wav":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/talk.wav")
            self.end_headers()
            return
        if name in ("/talk.wav", "/../../escape.wav", "/a%2F..%2F..%2Fescape.wav"):
            self.reply(200, "audio/wav", self.audio, head)
        elif name == "/page.html":
            self.reply(200, "text/html", b"<html><body>nothing to hear</body></html>", head)
        elif name == "/secret.m3u8":
            key = f'#EXT-X-KEY:METHOD=AES-128,URI="http://localhost:{self.server.server_port}/key"'
            parts = f"#EXTINF:2,\nhttp://localhost:{self.server.server_port}/part.ts\n#EXT-X-ENDLIST\n"
            body = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n{key}\n{parts}".encode()
            self.reply(200, "application/vnd.apple.mpegurl", body, head)
        elif name in ("/endless.wav", "/slow.wav", "/endless.html", "/slow.html"):
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if name.endswith("html") else "audio/wav")
            self.end_headers()
            while not head:
                try:
                    self.wfile.write(b"<p>" * (1 << 16) if name.startswith("/endless") else bytes(100))
                    time.sleep(0 if name.startswith("/endless") else 0.05)
                except OSError:
                    return
        else:
            self.reply(404, "text/plain", b"no", head)

    def reply(self, status: int, kind: str, body: bytes, head: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the site."""
    out = io.BytesIO()
    soundfile.write(out, 0.1 * np.sin(np.arange(32000) / 10), 16000, format="WAV")
    Site.audio = out.getvalue()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads, server.asked = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Site.server_of_this_test = server
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def limits(site: str, **more: float) -> Limits:
    return Limits(link_hosts=(site,), **more)


def test_audio_behind_a_link_is_fetched(site: str, tmp_path: Path) -> None:
    pytest.importorskip("yt_dlp")
    path = fetch(f"http://{site}/talk.wav", tmp_path, limits(site))
    assert path.parent == tmp_path and len(limits(site).read(path)) == 32000


@pytest.mark.parametrize(
    ("page", "message", "more"),
    [
        ("page.html", "could not be fetched|no audio", {}),
        ("missing.wav", "could not be fetched", {}),
        ("elsewhere.wav", "links to localhost are not allowed", {}),
        ("secret.m3u8", "could not be fetched|no audio", {}),
        ("endless.html", "too large|could not be fetched|longer than", {"link_timeout_s": 15, "largest_mb": 1}),
        ("slow.html", "longer than 1 s|could not be fetched", {"link_timeout_s": 1}),
        ("talk.wav", "larger than|no audio behind", {"largest_mb": 0.01}),
        ("endless.wav", r"larger than 1 MB", {"largest_mb": 1}),
        ("slow.wav", r"takes longer than 1 s", {"link_timeout_s": 1}),
    ],
)
def test_hostile_pages_get_a_message_that_offers_the_upload(
    page: str, message: str, more: dict[str, float], site: str, tmp_path: Path
) -> None:
    pytest.importorskip("yt_dlp")
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        fetch(f"http://{site}/{page}", tmp_path, limits(site, **more))
    assert "upload it" in str(error.value) and time.monotonic() - start < 40
    assert not [
        name for host, name in Site.server_of_this_test.asked if host.startswith("localhost")
    ]  # nobody else is asked


def test_names_from_the_site_do_not_leave_the_folder(site: str, tmp_path: Path) -> None:
    pytest.importorskip("yt_dlp")
    folder = tmp_path / "own"
    folder.mkdir()
    path = fetch(f"http://{site}/a%2F..%2F..%2Fescape.wav", folder, limits(site))
    assert path.parent == folder and [p.name for p in tmp_path.iterdir()] == ["own"]


def test_nothing_is_executed(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yt_dlp")
    (tmp_path / "bin").mkdir()
    for name in ("ffmpeg", "ffprobe", "deno", "node", "aria2c", "curl"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started-{name}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for page in ("secret.m3u8", "talk.wav"):
        folder = tmp_path / page
        folder.mkdir()
        with contextlib.suppress(UserError):
            fetch(f"http://{site}/{page}", folder, limits(site))
    assert not list(tmp_path.glob("started-*"))


def test_no_secrets_are_read_and_no_plugins_loaded() -> None:
    options = options_of({"folder": "/x", "timeout_s": 1, "largest_bytes": 1, "longest_s": 1})
    assert options["usenetrc"] is False and options["cookiefile"] is None and options["external_downloader"] is None
    assert options["postprocessors"] == [] and options["enable_file_urls"] is False and options["js_runtimes"] == {}
    assert options["fixup"] == "never" and not any(
        key in options for key in ("exec_cmd", "cookiesfrombrowser", "netrc_cmd")
    )
