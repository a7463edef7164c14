"""An endpoint for programs that speak OpenAI's protocol: POST /v1/audio/transcriptions, GET /v1/models."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from efficient_asr.inference.formats import format_record, rounded
from efficient_asr.text.languages import language_name, normalise_language
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.web.limits import Busy, Limits, Visitors
from efficient_asr.web.recognisers import Heard, Recogniser

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


def error_response(message: str, status: int, parameter: str | None = None) -> JSONResponse:
    """Return an error in the form that OpenAI's clients expect."""
    kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": parameter, "code": None}}
    return JSONResponse(content, status, {"Retry-After": "2"} if status == 429 else None)


def make_router(recognisers: list[Recogniser], limits: Limits, visitors: Visitors) -> APIRouter:
    """Return the routes.

    Arguments
    ---------
    recognisers : list of Recogniser
        The models. Requests for `whisper-1`, the name that programs send by default, get the first one.
    limits : Limits
        What visitors may ask for.
    visitors : Visitors
        Counts their requests.
    """
    router, by_name = APIRouter(prefix="/v1"), {each.name: each for each in recognisers}

    @router.get("/models")
    def models() -> dict[str, Any]:
        """List the models."""
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "efficient_asr"} for name in by_name]
        return {"object": "list", "data": entries}

    threads = anyio.CapacityLimiter(limits.waiting)  # waiting requests must not take the threads of the page

    async def hear(request: Request, recogniser: Recogniser, path: str, name: str, code: str | None) -> Heard | None:
        """Return what was heard; None if the client went away, whose recording is then dropped."""
        stream, last = recogniser.stream(functools.partial(limits.read, path, name), code), Heard()
        while True:
            heard = await anyio.to_thread.run_sync(next, stream, None, limiter=threads)
            if heard is None:
                return last
            last = heard
            if await request.is_disconnected():
                await anyio.to_thread.run_sync(stream.close, limiter=threads)
                return None

    @router.post("/audio/transcriptions")
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form()],
        language: Annotated[str | None, Form()] = None,
        response_format: Annotated[str, Form()] = "json",
        stream: Annotated[bool, Form()] = False,
    ) -> Response:
        """Transcribe an uploaded file. Prompts and temperatures are ignored: decoding is that of the model as it was loaded."""
        recogniser = recognisers[0] if model == "whisper-1" else by_name.get(model)
        if recogniser is None:
            known = f"there is no model '{model}', only {', '.join(by_name)}.{did_you_mean(model, by_name)}"
            return error_response(known, 404, "model")
        if response_format not in FORMATS:
            return error_response(f"response_format: choose from {', '.join(FORMATS)}", 400, "response_format")
        if stream:
            return error_response("stream: transcripts are not streamed here; leave it out", 400, "stream")
        name = Path(file.filename or "recording").name[:100]
        try:
            with visitors.enter(None, request.client.host if request.client else None):
                code = normalise_language(language) if language else None
                recogniser.check_language(code)
                with _on_disk(file) as path:
                    await anyio.to_thread.run_sync(limits.check, path, name, limiter=threads)
                    heard = await hear(request, recogniser, path, name, code)
                return Response(status_code=499) if heard is None else _response(heard, response_format)
        except Busy as error:
            return error_response(str(error), 429)
        except (UserError, ValueError) as error:
            return error_response(str(error), 400)

    return router


@contextlib.contextmanager
def _on_disk(file: UploadFile) -> Iterator[str]:
    """Yield the path of a copy of an upload."""
    with tempfile.NamedTemporaryFile(prefix="efficient_asr_upload_") as copy:
        shutil.copyfileobj(file.file, copy)
        copy.flush()
        yield copy.name


def _response(heard: Heard, kind: str) -> Response:
    if kind == "text":
        return PlainTextResponse(heard.text + "\n")
    record = rounded({"audio": "", "text": heard.text, "segments": heard.segments})
    if kind in ("srt", "vtt"):
        return PlainTextResponse(format_record(record, kind))
    if kind == "json":
        return JSONResponse({"text": heard.text})
    segments = [
        {"id": i, "start": each["start_s"], "end": each["end_s"], "text": each["text"]}
        for i, each in enumerate(record["segments"])
    ]
    language = language_name(heard.languages[0]).lower() if heard.languages else ""
    return JSONResponse(
        {
            "task": "transcribe",
            "language": language,
            "duration": heard.duration_s,
            "text": heard.text,
            "segments": segments,
        }
    )
