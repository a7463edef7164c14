"""The app as its users meet it: a process of its own, a headless Chromium, OpenAI's client, many users at once.

`SCREENSHOTS=docs/images pytest -m slow tests/web/test_app_in_a_browser.py` writes the pictures of the pages.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import ROOT
from test_limits_and_links import Site, site  # noqa: F401

from efficient_asr import load_transcriber
from efficient_asr.corpora.mini import Espeak, make_sentence, synthesise
from efficient_asr.models.sources import resolve_source

pytestmark = pytest.mark.slow
for package in ("gradio", "fastapi"):
    pytest.importorskip(package)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
MODELS = ("small=efficient_asr:mini_whisper_small", "large=efficient_asr:mini_whisper_large")


class App:
    """A running `efficient-asr app`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "efficient_asr", "app", *arguments, "--port", "0"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
        )
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                break
        else:
            raise RuntimeError("".join(self.lines))
        self.reader = threading.Thread(target=self.lines.extend, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def memory_mb(self) -> float:
        """Resident memory of the process and of those that it started."""
        total, processes = 0.0, [self.process.pid]
        while processes:
            place = Path(f"/proc/{processes.pop()}")
            with contextlib.suppress(OSError):  # it ended
                processes += map(int, " ".join(path.read_text() for path in place.glob("task/*/children")).split())
                found = re.search(r"VmRSS:\s+(\d+)", (place / "status").read_text())
                total += int(found[1]) / 1000 if found else 0
        return total

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it; return the exit code. It may have logged what hostile inputs did, but must end quietly."""
        before = len(self.lines)
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.reader.join(10)
        assert not any("Traceback" in line for line in self.lines[before:]), "".join(self.lines[before:])
        return code


@pytest.fixture(scope="module")
def app(site: str) -> Iterator[App]:  # noqa: F811
    """The app with the two Whispers for synthetic speech, and links to the test's own site."""
    running = App(*MODELS, "--link_hosts", site, "--longest_s", "120")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Recordings with what the small model hears in them."""
    espeak, folder = Espeak(seed=3), tmp_path_factory.mktemp("clips")
    transcriber = load_transcriber(resolve_source("efficient_asr:mini_whisper_small"))
    found = []
    for i in range(10):
        wav = synthesise(espeak, make_sentence(random.Random(50 + i)), "en-us", 150, 50)
        soundfile.write(folder / f"{i}.flac", wav.numpy(), 16000)
        found.append((folder / f"{i}.flac", transcriber.transcribe_files([folder / f"{i}.flac"])[0].text))
    assert len({text for _, text in found}) > 5
    return found


@pytest.fixture(scope="module")
def browser(clips: list[tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium whose microphone plays the first clip."""
    playwright = pytest.importorskip("playwright.sync_api")
    wav = tmp_path_factory.mktemp("microphone") / "clip.wav"
    samples, rate = soundfile.read(clips[0][0])
    soundfile.write(wav, samples, rate, subtype="PCM_16")
    options = [
        "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={wav}",
    ]  # fmt: skip
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


def open_page(browser: Any, url: str, width: int = 1280, height: int = 900) -> Any:
    page = browser.new_page(viewport={"width": width, "height": height})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(url)
    return page


def open_app(browser: Any, url: str, **size: int) -> Any:
    page = open_page(browser, url, **size)
    page.wait_for_selector("#audio button[aria-label='Clear'], #audio [aria-label='Clear']")
    return page


def upload(page: Any, path: Path) -> None:
    page.click("#audio [aria-label='Clear']")
    page.set_input_files("#audio input[type=file]", path)
    page.wait_for_selector("#audio [aria-label='Clear']")


def transcribe(page: Any) -> str:
    # The files of the recording before may disappear for less than one look at the page, so other addresses are awaited.
    page.evaluate("document.querySelectorAll('#files a').forEach(a => a.dataset.before = a.href)")
    page.click("#transcribe")
    page.wait_for_function("[...document.querySelectorAll('#files a')].some(a => a.dataset.before !== a.href)")
    return page.input_value("#transcript-0 textarea")


def picture(page: Any, name: str, whole: bool = True) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.wait_for_timeout(500)
        page.screenshot(path=str(ROOT / folder / f"{name}.png"), full_page=whole)


# ------------------------------------------------------------ the page


@needs_browser
def test_an_example_is_there_at_once_and_two_models_are_compared(browser: Any, app: App) -> None:
    page = open_app(browser, app.url)
    page.check("#count input")
    text = transcribe(page)
    assert len(text.split()) > 2 and page.input_value("#transcript-1 textarea")
    summary = page.inner_text("#summary")
    assert "relative to small" in summary and "GMACs" in summary and "language English" in summary
    cells = [row.inner_text().split("\t") for row in page.query_selector_all("#summary tbody tr")]
    assert [row[0] for row in cells] == ["small", "large"] and float(cells[1][-1]) > 2  # the large one computes more
    names = " ".join(row.inner_text() for row in page.query_selector_all("#files .file-preview tr"))
    assert all(f".{ending}" in names for ending in ("txt", "srt", "vtt", "json", "csv")) and not page.errors, names
    picture(page, "app")
    page.close()


@needs_browser
def test_an_upload_is_read(browser: Any, app: App, clips: list[tuple[Path, str]]) -> None:
    page = open_app(browser, app.url)
    for path, expected in clips[1:3]:
        upload(page, path)
        page.uncheck("#models label:has-text('large') input")
        assert transcribe(page) == expected
        page.check("#models label:has-text('large') input")
    with page.expect_download() as download:
        page.click("#files a >> nth=0")
    assert Path(download.value.path()).read_text().startswith("1\n00:00:00,000 --> ")
    page.close()


@needs_browser
def test_the_microphone_is_heard(browser: Any, app: App, clips: list[tuple[Path, str]]) -> None:
    page = open_app(browser, app.url)
    page.click("#audio [aria-label='Clear']")
    page.click(
        "#audio [aria-label='Record audio'], #audio button[title*='icrophone'], #audio button[aria-label*='icrophone']"
    )
    page.click("#audio .record-button, #audio button.record")
    page.wait_for_timeout(4000)
    with page.expect_response(lambda response: "/upload" in response.url):  # a busy machine is slow to send it
        page.click("#audio .stop-button, #audio button.stop-button")
    page.wait_for_selector("#audio [aria-label='Clear']")
    words = {*transcribe(page).split()}
    expected = {*clips[0][1].split()}
    assert len(words & expected) >= len(expected) / 2, (words, expected)
    page.close()


@needs_browser
def test_a_phone_has_room_for_everything(browser: Any, app: App) -> None:
    page = open_app(browser, app.url, width=390, height=844)
    transcribe(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.query_selector("#transcribe").bounding_box()
    assert box["width"] > 100 and box["height"] >= 36
    picture(page, "app_narrow")
    page.close()


@needs_browser
def test_mistakes_get_a_message_and_the_page_goes_on(
    browser: Any,
    app: App,
    clips: list[tuple[Path, str]],
    tmp_path: Path,
    site: str,  # noqa: F811
) -> None:
    page = open_app(browser, app.url)

    def message(action: Any) -> str:
        action()
        page.wait_for_selector(".toast-body")
        text = page.inner_text(".toast-body")
        page.click(".toast-close")
        page.wait_for_selector(".toast-body", state="detached")
        return text

    (tmp_path / "x.wav").write_text("not audio")
    page.click("#audio [aria-label='Clear']")
    page.set_input_files("#audio input[type=file]", tmp_path / "x.wav")
    page.wait_for_selector("#audio [aria-label='Clear']")
    assert "cannot decode the recording" in message(lambda: page.click("#transcribe"))
    page.fill("#link textarea, #link input", "http://127.0.0.1:1/a")
    assert "not allowed here" in message(lambda: page.click("#fetch"))
    page.fill("#link textarea, #link input", f"http://{site}/page.html")
    assert "upload it" in message(lambda: page.click("#fetch"))
    page.fill("#link textarea, #link input", f"http://{site}/talk.wav")
    page.click("#fetch")
    page.wait_for_timeout(3000)
    transcribe(page)
    assert "2.0 s of audio" in page.inner_text("#summary")
    assert not list(Path(tempfile.gettempdir()).glob(f"efficient_asr_app_{app.process.pid}_*/private/*"))
    upload(page, clips[1][0])
    assert transcribe(page) == clips[1][1]
    page.close()


# ------------------------------------------------------------ programs


def test_openai_client_speaks_to_the_endpoint(app: App, clips: list[tuple[Path, str]]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none")
    path, expected = clips[4]
    with open(path, "rb") as file:
        assert client.audio.transcriptions.create(model="small", file=file).text == expected
    with open(path, "rb") as file:
        found = client.audio.transcriptions.create(model="small", file=file, response_format="srt", language="en")
    assert expected in found and "-->" in found
    with pytest.raises(openai.NotFoundError, match="there is no model 'tiny'"):
        client.audio.transcriptions.create(model="tiny", file=path)
    assert [model.id for model in client.models.list()] == ["small", "large"]


def test_no_other_file_can_be_fetched(app: App) -> None:
    for name in ("/etc/passwd", str(ROOT / "README.md"), "../README.md", "/proc/self/environ", "//etc/passwd"):
        for prefix in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(f"{app.url}/{prefix}{name}", timeout=10)
            assert error.value.code in (400, 403, 404, 405), (prefix, name, error.value.code)
    for route in ("gradio_api/process_recording", "gradio_api/component_server"):  # they would keep any body
        request = urllib.request.Request(f"{app.url}/{route}", b"x" * 1000, {"Content-Type": "multipart/form-data"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=10)
        assert error.value.code == 404, route


def test_paths_and_addresses_are_no_inputs_of_the_page(app: App, clips: list[tuple[Path, str]], site: str) -> None:  # noqa: F811
    """What a program sends to the page's queue instead of a file that was uploaded."""
    before = len(Site.server_of_this_test.asked)
    config = json.load(urllib.request.urlopen(f"{app.url}/config", timeout=10))
    number = next(each["id"] for each in config["dependencies"] if len(each["inputs"]) == 4)
    for path in (str(clips[0][0]), "/etc/passwd", "/dev/zero", f"http://{site}/talk.wav"):
        for extra in ({}, {"is_stream": True}):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}} | extra
            session = f"s{random.random()}"
            body = {"data": [file, "detect", ["small", "large"], False], "fn_index": number, "session_hash": session}
            request = urllib.request.Request(
                f"{app.url}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=10).read()
                stream = urllib.request.urlopen(f"{app.url}/gradio_api/queue/data?session_hash={session}", timeout=20)
                answer = stream.read().decode()
            except urllib.error.HTTPError as error:
                answer = error.read().decode()
            assert clips[0][1] not in answer and '"success":true' not in answer, (path, answer)
    assert len(Site.server_of_this_test.asked) == before
    for prefix in ("gradio_api/file=", "gradio_api/proxy=", "file="):
        with pytest.raises(urllib.error.HTTPError, match=r"40[034]"):
            urllib.request.urlopen(f"{app.url}/{prefix}http://{site}/talk.wav", timeout=10)
    urllib.request.urlopen(app.url, timeout=10).read()  # and the app goes on


def test_uploads_to_the_page_cannot_fill_the_disk(app: App) -> None:
    httpx = pytest.importorskip("httpx")
    (folder,) = Path(tempfile.gettempdir()).glob(f"efficient_asr_app_{app.process.pid}_*")
    other = folder / "served" / "of_others"
    with open(other, "wb") as file:
        file.truncate(20 * 200 * 10**6)  # a sparse file
    address = f"{app.url}/gradio_api/upload"
    refused = httpx.post(address, files={"files": ("a.wav", b"1")})
    spoken = httpx.post(f"{app.url}/v1/audio/transcriptions", files={"file": ("a.wav", b"1")}, data={"model": "small"})
    other.unlink()  # as the app does after an hour
    assert refused.status_code == spoken.status_code == 429 and "too many recordings" in refused.text
    assert httpx.post(address, files={"files": ("a.wav", b"1")}).status_code == 200


def test_a_foreign_name_is_refused(app: App) -> None:
    request = urllib.request.Request(app.url, headers={"Host": "attacker.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=10)


def at_once(use: Callable[[int], None], users: int) -> None:
    """Call `use` with the number of each user, all at the same time."""
    threads = [threading.Thread(target=use, args=(user,)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_twenty_users_at_once_get_their_own_transcripts(app: App, clips: list[tuple[Path, str]]) -> None:
    openai = pytest.importorskip("openai")
    heard: dict[tuple[int, int], str] = {}
    seconds: list[float] = []
    start = threading.Barrier(20)

    def use(user: int) -> None:
        client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)
        start.wait()
        for number in range(3):
            path, _ = clips[(user + number) % len(clips)]
            begun = time.perf_counter()
            heard[user, number] = client.audio.transcriptions.create(model="small", file=path).text
            seconds.append(time.perf_counter() - begun)

    at_once(use, 20)
    assert len(heard) == 60
    assert all(text == clips[(user + number) % len(clips)][1] for (user, number), text in heard.items())
    print(f"latency: median {statistics.median(seconds):.2f} s, 95th percentile {sorted(seconds)[56]:.2f} s")


def test_twenty_users_of_the_page_get_their_own_transcripts(app: App, clips: list[tuple[Path, str]]) -> None:
    """Through the page's own queue, as browsers use it: an upload, a place in the queue, and answers as they come."""
    httpx = pytest.importorskip("httpx")
    config = json.load(urllib.request.urlopen(f"{app.url}/config", timeout=10))
    number = next(each["id"] for each in config["dependencies"] if len(each["inputs"]) == 4)
    heard: dict[tuple[int, int], str] = {}
    seconds: list[float] = []
    start = threading.Barrier(20)

    def use(user: int) -> None:
        client = httpx.Client(base_url=f"{app.url}/gradio_api", timeout=60)
        start.wait()
        for turn in range(2):
            path, _ = clips[(user + turn) % len(clips)]
            begun, session = time.perf_counter(), f"user{user}-{turn}"
            (uploaded,) = client.post("/upload", files={"files": (path.name, path.read_bytes())}).json()
            file = {"path": uploaded, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
            body = {"data": [file, "detect", ["small"], False], "fn_index": number, "session_hash": session}
            client.post("/queue/join", json=body).raise_for_status()
            with client.stream("GET", "/queue/data", params={"session_hash": session}) as answer:
                heard[user, turn] = "".join(answer.iter_text())
            seconds.append(time.perf_counter() - begun)

    at_once(use, 20)
    assert len(heard) == 40
    for (user, turn), answer in heard.items():
        expected = clips[(user + turn) % len(clips)][1]
        others = {text for _, text in clips if text not in expected}
        assert expected in answer and not any(text in answer for text in others), (user, turn, answer)
    print(f"latency: median {statistics.median(seconds):.2f} s, 95th percentile {sorted(seconds)[37]:.2f} s")


def test_memory_does_not_grow(app: App, clips: list[tuple[Path, str]]) -> None:
    """SOAK_MINUTES=30 runs for half an hour."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none")
    end = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "0.3"))
    memory: list[float] = []
    count = 0
    while time.monotonic() < end:
        path, expected = clips[count % len(clips)]
        assert client.audio.transcriptions.create(model="small", file=path).text == expected
        count += 1
        if count % 5 == 0:
            memory.append(app.memory_mb())
    quarter = len(memory) // 4
    early, late = (statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    print(
        f"{count} requests, memory {memory[0]:.0f} MB at first, {early:.0f} in the second quarter, {late:.0f} in the last"
    )
    assert quarter and late < early + 30


def test_kill_and_restart_leaves_nothing_behind(clips: list[tuple[Path, str]]) -> None:
    folders = Path(tempfile.gettempdir())
    killed = App(MODELS[0])
    left = [*folders.glob(f"efficient_asr_app_{killed.process.pid}_*")]
    assert len(left) == 1 and killed.stop(signal.SIGKILL) == -signal.SIGKILL and left[0].exists()
    again = App(MODELS[0])
    assert not left[0].exists()
    assert again.stop(signal.SIGTERM) in (0, 130) and not [*folders.glob(f"efficient_asr_app_{again.process.pid}_*")]


@pytest.mark.parametrize("moment", ["loading", "serving on"])
def test_sigterm_ends_it_at_any_moment(moment: str) -> None:
    command = [sys.executable, "-m", "efficient_asr", "app", MODELS[0], "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if line.startswith(moment):
                process.send_signal(signal.SIGTERM)
                break
        assert process.wait(30) in (0, 130)
    assert not [*Path(tempfile.gettempdir()).glob(f"efficient_asr_app_{process.pid}_*")]


# ------------------------------------------------------------ the explorer


@needs_browser
def test_results_are_filtered_clicked_and_compared(browser: Any, tmp_path: Path) -> None:
    running = App("--results", str(ROOT / "results" / "runs"))
    page = open_page(browser, running.url)
    page.select_option("#corpus", label="arctic-dev/arctic_en (plain)")
    before = page.locator("#table tbody tr").count()
    page.uncheck("#techniques label:has-text('layer_removal') >> nth=-1 >> input")
    after = page.locator("#table tbody tr").count()
    assert 0 < after < before and page.locator("#plot circle").count() == after
    page.click("#plot circle[data-name='base_finetune_ctc-arctic_en'], #plot circle[data-name='base_finetune_ctc']")
    assert "experiment: base_finetune_ctc" in page.inner_text("pre.yaml")
    page.click("#table tr:has-text('early_exit entropy 0.25')")
    verdict = page.inner_text("#verdict")
    assert re.match(r"\d+ of 83 transcripts differ: B has fewer errors in \d+, more in \d+", verdict)
    first = page.locator(".utterance").first
    assert "errors" in first.inner_text() and first.locator(".wrong, .missing").count() > 0
    options = page.locator("#cost option").all_inner_texts()
    assert "seconds, CPU, batch 1" in options
    page.select_option("#cost", label="seconds, CPU, batch 1")
    assert page.locator("#plot circle").count() > 0 and not page.errors
    picture(page, "explorer", whole=False)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    assert running.stop() in (0, 130)


def test_the_page_of_results_is_one_file_that_cannot_be_broken_by_names(tmp_path: Path) -> None:
    from efficient_asr.reporting.explorer import explorer_html

    runs = tmp_path / "runs"
    runs.mkdir()
    source = ROOT / "results" / "runs" / "mini_finetune_ctc.json"
    result = json.loads(source.read_text()) | {"variant": "</script><script>alert(1)</script>\u2028"}
    (runs / "a.json").write_text(json.dumps(result))
    html = explorer_html(runs)
    assert "alert(1)" in html and html.count("</script>") == 1 and "\u2028" not in html
    assert not re.search(r"(src|href)=[\"']?http", html)
    data = json.loads(re.search(r"const DATA = (.*);\n", html)[1])
    assert data["results"][0]["wer"] == result["wer_percent"]
    assert torch.isfinite(torch.tensor(data["results"][0]["macs"]))
