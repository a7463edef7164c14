"""Fetch the audio behind a link: a process of its own, which imports nothing of this package and is killed after a while.

    python -I link_process.py < settings.json

Settings are `url`, `folder`, `hosts` (the allowed ones), `largest_bytes`, `longest_s` and `timeout_s`. Prints `{"error": ...}`,
or `{}` if there is a file in the folder. Nothing is executed: no external downloader, no ffmpeg, no JavaScript, no
post-processing, no plugins, no configuration files; no cookies and no netrc are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any
from urllib.parse import urlsplit

MEMORY_BYTES = 2 << 30


class Stopped(Exception):
    """A limit was reached, or a host is not allowed."""


def check_host(url: str, hosts: list[str] | tuple[str, ...]) -> None:
    """Raise `Stopped` unless a URL is a web address whose host is one of `hosts` or their subdomains."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        raise Stopped("this is not a web address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise Stopped("this is not a web address: it has to begin with https:// or http://")
    host = f"{parts.hostname}:{port}" if port else parts.hostname
    if not any(host == allowed or host.endswith(f".{allowed}") for allowed in hosts):
        raise Stopped(f"links to {parts.hostname} are not allowed here")


def limit_process(largest_bytes: int, timeout_s: float) -> None:
    """Limit memory, size of files, and time of this process, as far as the system can."""
    if hasattr(signal, "alarm"):
        signal.alarm(int(timeout_s) + 15)  # also if nobody waits for it any more
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_FSIZE: 2 * largest_bytes}
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = MEMORY_BYTES
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of yt-dlp."""
    end = time.monotonic() + settings["timeout_s"]
    largest, longest_s = settings["largest_bytes"], settings["longest_s"]

    def progress(status: dict[str, Any]) -> None:
        if status.get("downloaded_bytes", 0) > largest:
            raise Stopped(f"it is larger than {largest / 1e6:g} MB")
        if time.monotonic() > end:
            raise Stopped(f"it takes longer than {settings['timeout_s']:g} s")

    def suitable(info: dict[str, Any], incomplete: bool = False) -> str | None:
        if info.get("is_live"):
            raise Stopped("it is a live stream, which does not end")
        if (info.get("duration") or 0) > longest_s:
            raise Stopped(f"it lasts {info['duration'] / 60:.0f} min; the limit is {longest_s / 60:g} min")
        if (info.get("filesize") or info.get("filesize_approx") or 0) > largest:
            raise Stopped(f"it is larger than {largest / 1e6:g} MB")
        return None

    return {
        "paths": {"home": settings["folder"], "temp": settings["folder"]}, "outtmpl": {"default": "recording.%(ext)s"},
        "format": "bestaudio[protocol=https]/bestaudio[protocol=http]/best[protocol=https]/best[protocol=http]",
        "noplaylist": True, "playlist_items": "1", "quiet": True, "no_warnings": True, "noprogress": True, "cachedir": False,
        "usenetrc": False, "cookiefile": None, "external_downloader": None, "ffmpeg_location": "/nonexistent", "js_runtimes": {},
        "fixup": "never", "postprocessors": [], "enable_file_urls": False, "socket_timeout": 15, "retries": 1,
        "fragment_retries": 1, "extractor_retries": 1, "max_filesize": largest, "progress_hooks": [progress],
        "match_filter": suitable, "restrictfilenames": True, "overwrites": True, "logger": _Silent(),
    }  # fmt: skip


class _Silent:
    """A logger that says nothing; errors are raised."""

    def debug(self, message: str) -> None:
        """Ignore a message."""

    info = warning = error = debug


def fetch(settings: dict[str, Any]) -> None:
    """Download; raises `Stopped`, or anything that yt-dlp and its extractors raise."""
    os.environ["YTDLP_NO_PLUGINS"] = "1"
    import yt_dlp
    from yt_dlp.networking import _urllib

    class RedirectHandler(_urllib.RedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            """Check where an answer redirects to before it is asked."""
            check_host(newurl, settings["hosts"])
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    class Downloader(yt_dlp.YoutubeDL):
        def urlopen(self, req: Any) -> Any:
            """Ask allowed hosts only."""
            check_host(req if isinstance(req, str) else req.url, settings["hosts"])
            return super().urlopen(req)

    _urllib.RedirectHandler = RedirectHandler
    with Downloader(options_of(settings)) as downloader:
        handlers = downloader._request_director.handlers  # the others follow redirects themselves
        for name in [name for name in handlers if name != "Urllib"]:
            del handlers[name]
        downloader.download([settings["url"].strip()])


def cause(error: BaseException) -> Stopped | None:
    """Return the `Stopped` that an exception of yt-dlp came from, if any."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None or isinstance(seen, Stopped):
            return seen
        info, hidden = getattr(seen, "exc_info", None), getattr(seen, "unexpected_errors", None)
        seen = (
            (info[1] if info and info[1] is not seen else None)
            or (hidden or [None])[0]
            or seen.__cause__
            or seen.__context__
        )
    return None


def main() -> None:
    """Read settings from standard input, fetch, and print the outcome."""
    settings = json.load(sys.stdin)
    limit_process(settings["largest_bytes"], settings["timeout_s"])
    try:
        fetch(settings)
        outcome = {}
    except ImportError:
        outcome = {"error": "links need the package yt-dlp: pip install 'efficient_asr[app]'"}
    except MemoryError:
        outcome = {"error": "the page behind this link is too large"}
    except Exception as error:
        stopped = cause(error)
        lines = str(error).removeprefix("ERROR: ").splitlines() or [type(error).__name__]
        outcome = {"error": str(stopped) if stopped else f"the link could not be fetched ({lines[0][:200]})"}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
