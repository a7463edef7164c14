"""The page of the web app: microphone, upload or link; several models side by side; what each did and cost."""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr
import soundfile
import torch
from gradio.utils import get_upload_folder, is_in_or_equal

from efficient_asr.corpora.mini import Espeak, make_sentence, synthesise
from efficient_asr.data import SAMPLE_RATE
from efficient_asr.inference.formats import format_record, format_records, rounded
from efficient_asr.reporting.tables import markdown_table, show
from efficient_asr.text.languages import language_name
from efficient_asr.utils.errors import UserError
from efficient_asr.web.decoder import decode
from efficient_asr.web.limits import Limits, Visitors
from efficient_asr.web.links import fetch
from efficient_asr.web.recognisers import Heard, Recogniser

DETECT = "detect"
DOWNLOADS = ("srt", "vtt", "csv", "json", "txt")
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important;}
.transcript textarea {font-size: 1.1rem; line-height: 1.5;}
#summary {overflow-x: auto;}
#summary table {width: 100%; font-variant-numeric: tabular-nums; border: 0 !important;}
#summary th, #summary td {border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;}
#summary th, #summary td {padding: 4px 8px; white-space: nowrap;}
#summary th {word-break: keep-all;}
@media (max-width: 640px) {.gradio-container {padding: 8px !important;} h1 {font-size: 1.4rem !important;}}
"""


class Page:
    """The page.

    Arguments
    ---------
    recognisers : list of Recogniser
        The models; costs are shown beside those of the first one.
    limits : Limits
        What visitors may ask for.
    visitors : Visitors
        Counts their requests.
    """

    def __init__(self, recognisers: list[Recogniser], limits: Limits, visitors: Visitors) -> None:
        self.recognisers, self.limits, self.visitors = recognisers, limits, visitors
        self.example = example_clip()

    def warm_up(self) -> None:
        """Transcribe the example with every model, so that the first visitor does not wait for what is done once."""
        _, wav = decode(self.example, 60.0, samples=True)  # whatever the limits
        for recogniser in self.recognisers:
            recogniser.transcribe(wav)

    def blocks(self) -> gr.Blocks:
        """Build the page."""
        names = [recogniser.name for recogniser in self.recognisers]
        with gr.Blocks(title="efficient_asr", analytics_enabled=False) as blocks:
            gr.Markdown(
                "# efficient_asr\nSpeech to text with models that were made cheaper, and what that costs and saves."
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    audio = gr.Audio(
                        self.example,
                        sources=["upload", "microphone"],
                        type="filepath",
                        label="Recording",
                        elem_id="audio",
                    )
                    refuse_urls(audio)
                    with gr.Row():
                        link = gr.Textbox(
                            label="or a link", placeholder=f"https:// {', '.join(self.limits.link_hosts[:3])} …", max_lines=1,
                            scale=4, elem_id="link", min_width=180,
                        )  # fmt: skip
                        get = gr.Button("Fetch", scale=1, min_width=80, elem_id="fetch")
                    language = gr.Dropdown(self._languages(), value=DETECT, label="Language", elem_id="language")
                    chosen = gr.CheckboxGroup(
                        names, value=names, label="Models", visible=len(names) > 1, elem_id="models"
                    )
                    count = gr.Checkbox(
                        False, label="Count MACs", info="transcribes up to a minute a second time", elem_id="count"
                    )
                    with gr.Row():
                        start = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
                        stop = gr.Button("Stop", elem_id="stop")
                with gr.Column(scale=3, min_width=300):
                    outputs: list[Any] = []
                    for number, recogniser in enumerate(self.recognisers):
                        label = recogniser.name + (
                            "" if recogniser.technique == "baseline" else f" ({recogniser.technique})"
                        )
                        outputs.append(
                            gr.Textbox(
                                label=label, lines=3, max_lines=12, interactive=False, elem_classes="transcript",
                                elem_id=f"transcript-{number}", buttons=["copy"],
                            )
                        )  # fmt: skip
                    summary = gr.Markdown(elem_id="summary")
                    files = gr.File(
                        label="Downloads", file_count="multiple", interactive=False, visible=False, elem_id="files"
                    )
            outputs += [summary, files]
            running = start.click(
                self.transcribe, [audio, language, chosen, count], outputs, concurrency_id="models", show_progress="minimal",
                api_visibility="private",
            )  # fmt: skip
            fetching = get.click(
                self.fetch, [link], [audio], concurrency_limit=2, show_progress="minimal", api_visibility="private"
            )
            stop.click(None, cancels=[running, fetching])
        return blocks.queue(max_size=self.limits.waiting, default_concurrency_limit=self.limits.waiting, api_open=False)

    def _languages(self) -> list[tuple[str, str]]:
        codes = sorted(
            {code for recogniser in self.recognisers for code in recogniser.transcriber.languages}, key=language_name
        )
        return [("detect, or what the model knows", DETECT), *((language_name(code), code) for code in codes)]

    def fetch(self, link: str, request: gr.Request) -> str:
        """Return the file of a link, in the app's folder."""
        folder = Path(tempfile.mkdtemp(prefix="efficient_asr_link_"))
        try:
            with self.visitors.enter(request.session_hash, _address(request)):
                if not link.strip():
                    raise UserError("paste a link first")
                found = fetch(link, folder, self.limits)
                wav = self.limits.read(found, "what is behind the link")
                return str(write_clip(wav))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def transcribe(
        self, path: str | None, language: str, chosen: list[str], count: bool, request: gr.Request
    ) -> Iterator[dict[Any, Any] | list[Any]]:
        """Yield the contents of the transcripts, the summary and the downloads, again and again while models decode."""
        recognisers = [each for each in self.recognisers if each.name in chosen or len(self.recognisers) == 1]
        code = None if language == DETECT else language
        heard: dict[str, Heard] = {}
        with ExitStack() as stack:
            try:
                stack.enter_context(self.visitors.enter(request.session_hash, _address(request)))
                if path is None:
                    raise UserError("record something, upload a file, or fetch a link first")
                if not recognisers:
                    raise UserError("choose a model")
                if not is_in_or_equal(path, get_upload_folder()):
                    raise UserError("upload the file with this page")
                self.limits.check(path)
                recording = functools.cache(functools.partial(self.limits.read, path))
                yield self._contents(heard, "*waiting for the models*")
                for recogniser in recognisers:
                    for update in recogniser.stream(recording, code, count):
                        heard[recogniser.name] = update
                        yield self._contents(heard, None)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None
            yield self._contents(heard, None, write_downloads(Path(path).stem, heard))

    def _contents(self, heard: dict[str, Heard], note: str | None, files: list[str] | None = None) -> list[Any]:
        texts = [heard[each.name].text if each.name in heard else "" for each in self.recognisers]
        return [*texts, note or summary_table(self.recognisers, heard), gr.File(files, visible=bool(files))]


def refuse_urls(audio: gr.Audio) -> None:
    """Let a component take files that were uploaded, but no URLs, which gradio would fetch from anywhere."""
    move = audio.async_move_resource_to_block_cache

    async def move_files(path: str | Path | None) -> str | None:
        if path is not None and "://" in str(path):
            raise gr.Error("paste links into the field for links", print_exception=False)
        return await move(path)

    audio.async_move_resource_to_block_cache = move_files


def _address(request: gr.Request) -> str | None:
    return request.client.host if request.client else None


def summary_table(recognisers: list[Recogniser], heard: dict[str, Heard]) -> str:
    """Return a table of costs, relative to the first model that was run, and below it what each technique did."""
    run = [each for each in recognisers if each.name in heard]
    if not run:
        return ""
    first = heard[run[0].name]
    rows, notes = [], []
    counted = any(each.macs_g is not None for each in heard.values())
    for each in run:
        own = heard[each.name]
        cells = [each.name, f"{1000 * own.seconds:.0f}", show(own.duration_s / own.seconds if own.seconds else None, 1)]
        cells += [f"{own.seconds / first.seconds:.2f}" if first.seconds else "–"] if len(run) > 1 else []
        if counted:
            cells += [show(own.macs_g, 2)]
            cells += [show(own.macs_g / first.macs_g if own.macs_g and first.macs_g else None)] if len(run) > 1 else []
        rows.append(cells)
        facts = [f"{key} {value}" for key, value in own.decisions().items()]
        spoken = [f"language {', '.join(language_name(code) for code in own.languages)}"] if own.languages else []
        notes.append(f"- **{each.name}**: {'; '.join([*spoken, *facts]) or 'nothing to report'}")
    several = len(run) > 1
    head = ["model", "ms", "times real time", *(["× time"] if several else [])]
    head += ["GMACs", *(["× GMACs"] if several else [])] if counted else []
    length = f"{first.duration_s:.1f} s of audio" + (f"; × is relative to {run[0].name}" if several else "")
    return "\n".join([length, "", markdown_table(head, rows), "", *notes])


def new_file(name: str) -> Path:
    """Return the path of a new file in the folder that the app serves, where the app deletes it after an hour."""
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder / name


def write_clip(wav: torch.Tensor) -> Path:
    """Write audio [time] to a new file."""
    path = new_file("recording.wav")
    soundfile.write(path, wav.numpy(), SAMPLE_RATE)
    return path


def write_downloads(name: str, heard: dict[str, Heard]) -> list[str]:
    """Write each transcript in all formats; return the files."""
    files = []
    for model, own in heard.items():
        record = rounded({"audio": name, "text": own.text, "duration_s": own.duration_s, "segments": own.segments})
        stem = name if len(heard) == 1 else "".join(c if c.isalnum() or c in "-." else "_" for c in model)
        for kind in DOWNLOADS:
            path = new_file(f"{stem}.{kind}")
            collected = kind in ("csv", "json")
            content = format_records([record], kind, by_segment=True) if collected else format_record(record, kind)
            path.write_text(content, encoding="utf-8")
            files.append(str(path))
    return files


def example_clip() -> str:
    """Return a file with a synthetic sentence, so that there is something to transcribe at once."""
    wav = synthesise(Espeak(seed=7), make_sentence(random.Random(5)), "en-us", 150, 50)
    path = write_clip(wav).with_name("example (synthetic).wav")
    path.with_name("recording.wav").rename(path)
    return str(path)
