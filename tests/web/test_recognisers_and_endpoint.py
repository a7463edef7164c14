"""Models of the app, and the endpoint for programs."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from efficient_asr import load_transcriber
from efficient_asr.corpora.mini import Espeak, make_sentence, synthesise
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.models.sources import resolve_source
from efficient_asr.utils.errors import UserError
from efficient_asr.web import recognisers as module
from efficient_asr.web.limits import Limits
from efficient_asr.web.recognisers import Heard, Recogniser
from efficient_asr.web.turns import Turns


@pytest.fixture(scope="module")
def pair() -> list[Recogniser]:
    """The two Whispers for synthetic speech."""
    turns = Turns()
    sources = {name: resolve_source(f"efficient_asr:mini_whisper_{name}") for name in ("small", "large")}
    return [Recogniser(name, load_transcriber(source), turns) for name, source in sources.items()]


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    """Sentences of two or three seconds."""
    espeak = Espeak(seed=1)
    return [synthesise(espeak, make_sentence(random.Random(i)), "en-us", 150, 50) for i in range(3)]


# ------------------------------------------------------------ recognisers


def test_words_appear_while_they_are_decoded(
    pair: list[Recogniser], clips: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHOWN_EVERY_S", 0.0)
    texts = [heard.text for heard in pair[0].stream(clips[0])]
    (expected,) = load_transcriber(resolve_source("efficient_asr:mini_whisper_small")).transcribe(clips[0][None])
    assert texts[-1] == expected.text and len({*texts}) > 3
    words = [text for text in texts if text]
    assert all(words[-1].startswith(text.strip()) for text in words)
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(words))


def test_long_audio_is_heard_piece_by_piece_and_whole(pair: list[Recogniser], clips: list[torch.Tensor]) -> None:
    pause = torch.zeros(16000)
    wav = torch.cat([part for clip in clips * 2 for part in (clip, pause)])
    assert len(wav) > 2 * 16000 * pair[0].transcriber.piece_s
    found = list(pair[0].stream(wav))
    segments = found[-1].segments
    assert len(segments) > 2 and len({len(heard.segments) for heard in found}) > 2
    times = [segment[key] for segment in segments for key in ("start_s", "end_s")]
    assert times == sorted(times) and times[-1] <= len(wav) / 16000
    alone = [pair[0].transcribe(clip).text for clip in clips]
    assert sum(text in found[-1].text for text in alone) >= 2


def test_macs_are_those_of_the_transcriber(pair: list[Recogniser], clips: list[torch.Tensor]) -> None:
    heard = [*pair[0].stream(clips[0], count=True)][-1]
    expected = count_macs(pair[0].transcriber.transcribe, clips[0][None], torch.ones(1)).macs
    assert heard.macs_g == pytest.approx(expected / 1e9) and heard.macs_g > 0
    assert pair[0].transcribe(clips[0]).macs_g is None


def test_what_a_technique_did_is_summarised() -> None:
    segments = [
        {"text": "a", "start_s": 0.0, "end_s": 1.0, "exit_layer": 4, "route": "small", "language": "de"},
        {"text": "b", "start_s": 1.0, "end_s": 2.0, "exit_layer": 5, "route": "small", "language": "de"},
        {"text": "c", "start_s": 2.0, "end_s": 3.0, "exit_layer": 6, "route": "large", "tokens": [1]},
    ]
    heard = Heard(segments=segments)
    assert heard.decisions() == {"exit layer": "5", "route": "small 2×, large 1×"} and heard.languages == ["de"]


def test_a_listener_that_goes_away_ends_the_work(
    pair: list[Recogniser], clips: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHOWN_EVERY_S", 0.0)
    stream = pair[0].stream(torch.cat(clips * 20))
    next(stream)
    stream.close()
    start = time.monotonic()
    assert pair[1].transcribe(clips[0]).text  # the next visitor does not wait for a transcript that nobody reads
    assert time.monotonic() - start < 5


def test_an_unknown_language_and_errors_reach_the_caller(pair: list[Recogniser], clips: list[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="small does not know the language 'sv'"):
        pair[0].transcribe(clips[0], "sv")

    class Broken:
        languages, takes_languages, language, window_s, model = (), False, None, 5.0, None

        def with_times(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Recogniser("broken", Broken(), pair[0].turns).transcribe(clips[0])
    assert pair[0].transcribe(clips[0], "en").text and pair[0].transcriber.language is None


def test_turns_are_taken_in_the_order_of_the_requests() -> None:
    turns, order = Turns(), []

    def work(number: int) -> None:
        with turns.mine():
            order.append(number)
            time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with turns.mine():
        for thread in threads:
            thread.start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with pytest.raises(ZeroDivisionError), turns.mine():
        raise ZeroDivisionError
    with turns.mine():
        pass


def test_a_short_recording_does_not_wait_for_a_long_one(pair: list[Recogniser], clips: list[torch.Tensor]) -> None:
    long = pair[0].stream(torch.cat([part for clip in clips * 10 for part in (clip, torch.zeros(16000))]))
    while not next(long).segments:
        pass
    assert pair[1].transcribe(clips[0]).text
    rest = list(long)
    assert len(rest[-1].segments) > len(rest[0].segments)  # the long one was not done yet


def test_audio_is_decoded_when_its_turn_has_come(pair: list[Recogniser], clips: list[torch.Tensor]) -> None:
    read = threading.Event()

    def recording() -> torch.Tensor:
        read.set()
        return clips[0]

    with pair[0].turns.mine():
        stream = pair[0].stream(recording)
        assert next(stream).text == "" and not read.is_set()  # a sign of life while it waits
    assert list(stream)[-1].text and read.is_set()


# ------------------------------------------------------------ endpoint


@pytest.fixture(scope="module")
def client(pair: list[Recogniser]) -> Iterator[Any]:
    """A client of the endpoint, without the page."""
    pytest.importorskip("fastapi")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from efficient_asr.web.limits import Visitors
    from efficient_asr.web.openai_api import make_router
    from efficient_asr.web.server import LimitBody

    limits = Limits(longest_s=20, largest_mb=1)
    app = FastAPI()
    app.state.visitors = Visitors(limits)
    app.include_router(make_router(pair, limits, app.state.visitors))
    app.add_middleware(LimitBody, largest_bytes=limits.largest_bytes)
    yield TestClient(app)


def post(client: Any, content: bytes, name: str = "a.wav", **form: str) -> Any:
    return client.post("/v1/audio/transcriptions", files={"file": (name, content)}, data={"model": "small", **form})


@pytest.fixture(scope="module")
def upload(clips: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A clip as a file."""
    path = tmp_path_factory.mktemp("upload") / "a.flac"
    soundfile.write(path, clips[0].numpy(), 16000)
    return path.read_bytes()


def test_the_formats_hold_the_same_text(
    client: Any, upload: bytes, pair: list[Recogniser], clips: list[torch.Tensor]
) -> None:
    text = pair[0].transcribe(clips[0]).text
    assert post(client, upload).json() == {"text": text}
    assert post(client, upload, response_format="text").text == text + "\n"
    assert post(client, upload, response_format="srt").text.startswith("1\n00:00:00,000 --> 00:00:0")
    assert post(client, upload, response_format="vtt").text.startswith("WEBVTT\n")
    verbose = post(client, upload, response_format="verbose_json", language="en").json()
    assert verbose["language"] == "english"  # given, not detected
    assert verbose["text"] == text and verbose["duration"] == pytest.approx(len(clips[0]) / 16000)
    assert verbose["segments"][0]["text"] == text and verbose["segments"][0]["end"] > 1
    assert post(client, upload, model="whisper-1").json() == {"text": text}
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["small", "large"]


@pytest.mark.parametrize(
    ("form", "status", "message"),
    [
        ({"model": "smal"}, 404, "there is no model 'smal', only small, large. Did you mean 'small'?"),
        ({"response_format": "docx"}, 400, "response_format: choose from json"),
        ({"language": "klingon-x"}, 400, "klingon"),
        ({"language": "sv"}, 400, "small does not know the language 'sv'"),
        ({"stream": "true"}, 400, "not streamed"),
    ],
)
def test_bad_requests_get_openai_errors(
    client: Any, upload: bytes, form: dict[str, str], status: int, message: str
) -> None:
    answer = post(client, upload, **form)
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_bad_files_get_a_message_and_the_next_user_is_served(client: Any, upload: bytes, tmp_path: Path) -> None:
    bad = post(client, b"not audio", name="../../etc/passwd")
    assert bad.status_code == 400 and "cannot decode passwd" in bad.json()["error"]["message"]
    assert "/tmp" not in bad.text and post(client, b"").status_code == 400
    soundfile.write(tmp_path / "long.flac", torch.zeros(16000 * 30).numpy(), 16000)
    long = post(client, (tmp_path / "long.flac").read_bytes())
    assert long.status_code == 400 and "the limit is 20 s" in long.json()["error"]["message"]
    large = post(client, bytes(2_000_000))
    assert large.status_code == 413 and "the limit is 1 MB" in large.json()["error"]["message"]
    assert post(client, upload).status_code == 200


def test_a_body_without_a_length_is_limited_too(client: Any) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/audio/transcriptions", content=chunks(), headers=headers).status_code == 413


def test_old_files_are_deleted_whoever_left_them(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from efficient_asr.web.server import KEPT_S, sweep

    old, new, kept = (tmp_path / name / "a.wav" for name in ("old", "new", "kept"))
    for path in (old, new, kept):
        path.parent.mkdir()
        path.write_bytes(b"1")
    long_ago = time.time() - KEPT_S - 1
    for path in (old, kept, old.parent, kept.parent):
        os.utime(path, (long_ago, long_ago))
    sweep(tmp_path, frozenset({kept, kept.parent}))
    assert not old.exists() and new.exists() and kept.exists()
    os.utime(old.parent, (long_ago, long_ago))  # deleting the file was a change
    sweep(tmp_path, frozenset({kept, kept.parent}))
    assert not old.parent.exists() and new.parent.exists()


def test_too_many_requests_of_one_address_are_told_to_wait(client: Any, upload: bytes) -> None:
    visitors = client.app.state.visitors
    visitors.counts["address testclient"] = 32
    try:
        answer = post(client, upload)
    finally:
        visitors.counts.clear()
    assert answer.status_code == 429 and answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["type"] == "rate_limit_error"
