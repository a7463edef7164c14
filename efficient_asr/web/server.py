"""The process of the web app: page and endpoint on one port, bound to loopback unless told otherwise."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import folder_bytes
from efficient_asr.web import decoder
from efficient_asr.web.limits import Limits, Visitors
from efficient_asr.web.openai_api import error_response, make_router
from efficient_asr.web.recognisers import Recogniser

FOLDER = "efficient_asr_app_"  # begins the names of temporary folders, with the number of the process
_ELSEWHERE = re.compile(r"(file=|proxy=|stream/)/*[a-z]+:", re.IGNORECASE)
# routes of gradio that write bodies from anybody to the disk, and run FFmpeg on them; the page does not use them
_CLOSED = re.compile(r"/(process_recording|component_server)\b")
KEPT = 20  # all files of visitors together may be so many times the largest upload
KEPT_S, SWEPT_EVERY_S = 3600.0, 300.0  # how long files of visitors are kept, and how often old ones are looked for
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LimitBody:
    """Middleware that refuses request bodies above a size, whether or not they state it, and URLs in place of files.

    Arguments
    ---------
    app : callable
        The ASGI application.
    largest_bytes : int
        The limit.
    folder : Path, optional
        Folder of all files of visitors. Bodies are refused if they could make it larger than `KEPT` times the limit.
    """

    def __init__(self, app: Any, largest_bytes: int, folder: Path | None = None) -> None:
        self.app, self.largest_bytes, self.folder = app, largest_bytes, folder
        self.expected = 0  # bytes of the bodies that are being received

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer with status 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _ELSEWHERE.search(scope["path"]):  # gradio would fetch these for anybody
            await error_response("only files of this app can be fetched", 403)(scope, receive, send)
            return
        if _CLOSED.search(scope["path"]):
            await error_response("this app does not have this route", 404)(scope, receive, send)
            return
        refused = error_response(f"the limit is {self.largest_bytes / 1e6:g} MB", 413)
        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self.largest_bytes:
            await refused(scope, receive, send)
            return
        size = self.largest_bytes if b"transfer-encoding" in headers else int(stated)
        self.expected += size
        try:
            if size and self.folder is not None:
                kept = await anyio.to_thread.run_sync(folder_bytes, self.folder)
                if kept + self.expected > KEPT * self.largest_bytes:
                    await error_response("there are too many recordings here; try again later", 429)(
                        scope, receive, send
                    )
                    return
            await self._pass_on(scope, receive, send, refused)
        finally:
            self.expected -= size

    async def _pass_on(self, scope: Any, receive: Any, send: Any, refused: Any) -> None:
        """Pass a request on, and end it when its body gets too large."""
        seen, begun = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.largest_bytes:
                raise _TooLarge
            return message

        async def answer(message: Any) -> None:
            nonlocal begun
            if seen <= self.largest_bytes or begun:  # otherwise it is what the application makes of _TooLarge
                begun = True
                await send(message)

        with contextlib.suppress(_TooLarge):
            await self.app(scope, counted, answer)
        if seen > self.largest_bytes and not begun:
            await refused(scope, receive, send)


class _TooLarge(Exception):
    """The body of a request exceeds the limit."""


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """Within the context, files of visitors are kept in a new folder, which is then removed; so are those of processes that died.

    gradio serves what is in one part of it; uploads to the endpoint and downloads of links are in the other.
    """
    decoder.start()  # before the temporary folder is another one: its socket lies there
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        process = left.name.removeprefix(FOLDER).partition("_")[0]
        if process == str(os.getpid()) or (process.isdigit() and not _is_running(int(process))):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}_"))
    for name in ("served", "private"):
        (folder / name).mkdir()
    before, temporary = os.environ.get("GRADIO_TEMP_DIR"), tempfile.tempdir
    os.environ["GRADIO_TEMP_DIR"], tempfile.tempdir = str(folder / "served"), str(folder / "private")
    try:
        yield str(folder)
    finally:
        tempfile.tempdir = temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("GRADIO_TEMP_DIR", None)
        os.environ |= {"GRADIO_TEMP_DIR": before} if before else {}


def sweep(folder: Path, keep: frozenset[Path]) -> None:
    """Delete files that are older than `KEPT_S`, whoever left them there, and folders that are empty."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > KEPT_S and path not in keep:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def _sweep_from_time_to_time(folder: Path) -> None:
    """Start to `sweep` a folder, except for the files that it has now."""
    keep = frozenset(folder.rglob("*"))

    def work() -> None:
        while folder.is_dir():
            time.sleep(SWEPT_EVERY_S)
            sweep(folder, keep)

    threading.Thread(target=work, name="sweep", daemon=True).start()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def make_app(recognisers: list[Recogniser], limits: Limits, hosts: list[str] | None = None) -> FastAPI:
    """Return the application: the endpoint under /v1, the page under /.

    Arguments
    ---------
    recognisers : list of Recogniser
        The models.
    limits : Limits
        What visitors may ask for.
    hosts : list of str, optional
        Names under which the app answers; by default those of loopback, so that other pages cannot reach it through a name of
        theirs.
    """
    import gradio as gr
    from gradio.utils import get_upload_folder

    from efficient_asr.web.page import CSS, Page

    app, visitors = FastAPI(title="efficient_asr", docs_url=None, redoc_url=None, openapi_url=None), Visitors(limits)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts or [*LOOPBACK, "[::1]"])
    served = Path(get_upload_folder())
    app.add_middleware(LimitBody, largest_bytes=limits.largest_bytes, folder=served.parent)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = str(first["loc"][-1])
        return error_response(f"{field}: {first['msg']}", 400, field)

    app.include_router(make_router(recognisers, limits, visitors))
    page = Page(recognisers, limits, visitors)
    page.warm_up()
    blocks = page.blocks()
    blocks.has_launched = True  # gradio checks paths of inputs only then
    mounted = gr.mount_gradio_app(
        app, blocks, path="/", css=CSS, show_error=False, max_file_size=limits.largest_bytes, allowed_paths=[], footer_links=[],
        ssr_mode=False, enable_monitoring=False, run_history=False,
    )  # fmt: skip
    _sweep_from_time_to_time(served.parent)
    return mounted


def make_explorer(html: str, hosts: list[str] | None = None) -> FastAPI:
    """Return an application that serves one page."""
    app = FastAPI(title="efficient_asr results", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts or [*LOOPBACK, "[::1]"])

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return html

    return app


def serve(app: FastAPI, host: str, port: int, behind_proxy: bool = False) -> None:
    """Serve until interrupted.

    Arguments
    ---------
    app : FastAPI
        The application.
    host, port : str, int
        Address to bind; port 0 for any that is free.
    behind_proxy : bool
        Believe a web server on this machine which address a request comes from (`X-Forwarded-For`).

    Raises
    ------
    UserError
        If the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(f"--port: {host}:{port} cannot be used ({error.strerror}); choose another one") from None
        port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, proxy_headers=behind_proxy)
        _Server(config, f"serving on http://{shown}:{port} (Ctrl-C ends it)").run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that says where it is once it answers; signals are its own from then on."""

    def __init__(self, config: uvicorn.Config, message: str) -> None:
        super().__init__(config)
        self.message = message

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """Start, and print the message."""
        await super().startup(*args, **kwargs)
        if not self.should_exit:
            print(self.message, flush=True)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the process as Ctrl-C does, from now on; uvicorn ends, then raises the signal again."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
