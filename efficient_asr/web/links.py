"""Fetch the audio behind a link with yt-dlp, for people whom we do not know.

Only hosts of a list are asked, redirects included; what is fetched is one audio stream into a folder of the request. Nothing is
executed: no external downloader, no post-processing, no cookies, no netrc, no plugins, no configuration files.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from efficient_asr.utils.errors import UserError
from efficient_asr.web.limits import Limits

# Where the listed sites keep their media.
_MEDIA_HOSTS = {
    "youtube.com": ("googlevideo.com", "ytimg.com", "youtube-nocookie.com"),
    "youtu.be": ("youtube.com", "googlevideo.com", "ytimg.com", "youtube-nocookie.com"),
    "vimeo.com": ("vimeocdn.com", "akamaized.net"),
    "soundcloud.com": ("sndcdn.com",),
    "ted.com": ("tedcdn.com", "akamaihd.net"),
    "commons.wikimedia.org": ("upload.wikimedia.org",),
}
INSTEAD = "download the file yourself and upload it"


class _Stopped(Exception):
    """A limit was reached during a download."""


def check_link(url: str, hosts: tuple[str, ...]) -> str:
    """Return the host of a link.

    Raises
    ------
    UserError
        If it is not a web address, or its host is not one of `hosts` or their subdomains.
    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        raise UserError("this is not a web address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise UserError("this is not a web address: it has to begin with https:// or http://")
    host = f"{parts.hostname}:{port}" if port else parts.hostname
    if not _within(host, hosts):
        raise UserError(f"links to {parts.hostname} are not allowed here, only to {', '.join(hosts)}; {INSTEAD}")
    return host


def _within(host: str, hosts: tuple[str, ...]) -> bool:
    return any(host == allowed or host.endswith(f".{allowed}") for allowed in hosts)


def fetch(url: str, folder: Path, limits: Limits) -> Path:
    """Download the audio behind a link into a folder; return the file.

    Arguments
    ---------
    url : str
        The link.
    folder : Path
        An empty folder; the caller removes it.
    limits : Limits
        Hosts, size, length and time.

    Raises
    ------
    UserError
        If the link is not allowed, leads to something too long or too large, or cannot be fetched; the message says so and
        advises to upload the file.
    """
    check_link(url, limits.link_hosts)
    os.environ["YTDLP_NO_PLUGINS"] = "1"
    try:
        import yt_dlp
    except ImportError:
        raise UserError(f"links need the package yt-dlp: pip install 'efficient_asr[app]'; or {INSTEAD}") from None
    end = time.monotonic() + limits.link_timeout_s
    try:
        with _downloader(yt_dlp, folder, limits, end) as downloader:
            downloader.download([url.strip()])
    except _Stopped as error:
        raise UserError(f"{error}; {INSTEAD}") from None
    except Exception as error:  # yt-dlp and its extractors raise anything
        stopped = _cause(error)
        reason = str(stopped) if stopped else f"the link could not be fetched ({_short(error)})"
        raise UserError(f"{reason}; {INSTEAD}") from None
    files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size]
    if len(files) != 1:
        raise UserError(f"there is no audio behind this link; {INSTEAD}")
    return files[0]


def _downloader(yt_dlp: Any, folder: Path, limits: Limits, end: float) -> Any:
    """Return a downloader that asks allowed hosts only and stops at the limits."""
    allowed = (*limits.link_hosts, *(host for each in limits.link_hosts for host in _MEDIA_HOSTS.get(each, ())))

    def progress(status: dict[str, Any]) -> None:
        if status.get("downloaded_bytes", 0) > limits.largest_bytes:
            raise _Stopped(f"it is larger than {limits.largest_mb:g} MB")
        if time.monotonic() > end:
            raise _Stopped(f"it takes longer than {limits.link_timeout_s:g} s")

    def suitable(info: dict[str, Any], incomplete: bool = False) -> str | None:
        if info.get("is_live"):
            raise _Stopped("it is a live stream, which does not end")
        if (info.get("duration") or 0) > limits.longest_s:
            raise _Stopped(f"it lasts {info['duration'] / 60:.0f} min; the limit is {limits.longest_s / 60:g} min")
        if (info.get("filesize") or info.get("filesize_approx") or 0) > limits.largest_bytes:
            raise _Stopped(f"it is larger than {limits.largest_mb:g} MB")
        return None

    class Downloader(yt_dlp.YoutubeDL):
        def urlopen(self, req: Any) -> Any:
            """Ask allowed hosts only, and none that an answer redirects to."""
            if time.monotonic() > end:
                raise _Stopped(f"it takes longer than {limits.link_timeout_s:g} s")
            check_link(req if isinstance(req, str) else req.url, allowed)
            answer = super().urlopen(req)
            check_link(answer.url, allowed)
            return answer

    options = {
        "paths": {"home": str(folder), "temp": str(folder)}, "outtmpl": {"default": "recording.%(ext)s"},
        "format": "bestaudio[protocol^=http]/best[protocol^=http]/bestaudio[protocol=m3u8_native]/best[protocol=m3u8_native]",
        "noplaylist": True, "playlist_items": "1", "quiet": True, "no_warnings": True, "noprogress": True, "cachedir": False,
        "usenetrc": False, "cookiefile": None, "external_downloader": None, "hls_prefer_native": True, "fixup": "never",
        "postprocessors": [], "enable_file_urls": False, "socket_timeout": 15, "retries": 1, "fragment_retries": 1,
        "extractor_retries": 1, "max_filesize": limits.largest_bytes, "progress_hooks": [progress], "match_filter": suitable,
        "restrictfilenames": True, "overwrites": True, "check_formats": None, "logger": _Silent(),
    }  # fmt: skip
    return Downloader(options)


def _cause(error: BaseException) -> _Stopped | UserError | None:
    """Return the limit that an exception of yt-dlp came from, if any."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None or isinstance(seen, (_Stopped, UserError)):
            return seen
        info = getattr(seen, "exc_info", None)
        seen = (info[1] if info and info[1] is not seen else None) or seen.__cause__ or seen.__context__
    return None


def _short(error: BaseException) -> str:
    message = str(error).removeprefix("ERROR: ").splitlines()
    return (message[0] if message else type(error).__name__)[:200]


class _Silent:
    """A logger for yt-dlp that says nothing; errors are raised."""

    def debug(self, message: str) -> None:
        """Ignore a message."""

    info = warning = error = debug
