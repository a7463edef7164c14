"""Fetch the audio behind a link with yt-dlp, for people whom we do not know.

Only hosts of a list are asked, redirects included; what is fetched is one audio stream into a folder of the request. All of it
happens in a process of its own (`link_process.py`) with limits of memory, file size and time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from efficient_asr.utils.errors import UserError
from efficient_asr.web import link_process
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


def check_link(url: str, hosts: tuple[str, ...]) -> None:
    """Reject what is not a web address, or whose host is not one of `hosts` or their subdomains.

    Raises
    ------
    UserError
        Naming the allowed hosts.
    """
    try:
        link_process.check_host(url, hosts)
    except link_process.Stopped as error:
        only = f", only to {', '.join(hosts)}" if hosts and "allowed" in str(error) else ""
        raise UserError(f"{error}{only}; {INSTEAD}") from None


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
    hosts = [*limits.link_hosts, *(host for each in limits.link_hosts for host in _MEDIA_HOSTS.get(each, ()))]
    settings = {
        "url": url, "folder": str(folder), "hosts": hosts, "largest_bytes": limits.largest_bytes,
        "longest_s": limits.longest_s, "timeout_s": limits.link_timeout_s,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-I", link_process.__file__], input=json.dumps(settings), capture_output=True, text=True,
            timeout=limits.link_timeout_s + 10,
        )  # fmt: skip
        outcome = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise UserError(f"it takes longer than {limits.link_timeout_s:g} s; {INSTEAD}") from None
    except ValueError:  # the process was killed
        raise UserError(f"the link could not be fetched; {INSTEAD}") from None
    if "error" in outcome:
        raise UserError(f"{outcome['error']}; {INSTEAD}")
    files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size]
    if len(files) != 1:
        raise UserError(f"there is no audio behind this link; {INSTEAD}")
    return files[0]
