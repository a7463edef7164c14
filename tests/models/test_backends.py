"""Whispers in ONNX Runtime and CTranslate2: same transcripts as in torch, alone and in a batch; folders, options, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import multilingual_whisper
from safetensors.torch import load_file, save_file

from efficient_asr import load_transcriber
from efficient_asr.commands import export, run_command
from efficient_asr.data import Rows, load_row, pad_wavs, read_manifest
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.backends import CACHE, convert
from efficient_asr.models.ctc import CTCHead, CTCModel, greedy_texts
from efficient_asr.models.encoders.load import load_encoder
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.models.interchange.onnx import export_to_onnx, largest_difference
from efficient_asr.models.sources import resolve_source
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.audio_context.context import AudioContext
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.techniques.silence_cache.cache import SilenceCache
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError

pytest.importorskip("onnxruntime")
pytest.importorskip("ctranslate2")
MINI = "efficient_asr:mini_whisper_small"
ENGINES = ("onnx", "ctranslate2")


@pytest.fixture(scope="module")
def speech(mini_corpus: dict[str, Path]) -> Rows:
    """A few synthetic commands."""
    return read_manifest(mini_corpus["test"])[:12]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(cache))


def transcribe(transcriber: Transcriber, rows: Rows, size: int = 1) -> list[Transcript]:
    wavs = [load_row(row) for row in rows]
    return [one for i in range(0, len(wavs), size) for one in transcriber.transcribe(*pad_wavs(wavs[i : i + size]))]


def load(**options: object) -> Transcriber:
    return load_transcriber(MINI, language="en", long_audio=None, **options)


@pytest.mark.parametrize("padding", [None, 0.4, "silence_cache"])
@pytest.mark.parametrize("engine", ENGINES)
def test_float32_gives_the_transcripts_of_torch(engine: str, padding: object, speech: Rows) -> None:
    torch_found = transcribe(load(encoder_padding=padding), speech)
    found = transcribe(load(encoder_padding=padding, backend=engine), speech)
    assert [a.text for a in found] == [b.text for b in torch_found]
    # CTranslate2's convolutions see zeros past the last position, ours the features of silence there
    apart = 1e-2 if (engine, padding) == ("ctranslate2", 0.4) else 2e-3
    for a, b in zip(found, torch_found, strict=True):
        assert a.details["avg_logprob"] == pytest.approx(b.details["avg_logprob"], abs=apart)
        assert a.details["tokens"] == b.details["tokens"] and a.details.get("encoder_s") == b.details.get("encoder_s")
    if engine == "onnx":
        assert all(
            a.details["entropy"] == pytest.approx(b.details["entropy"], abs=1e-3)
            for a, b in zip(found, torch_found, strict=True)
        )
    else:
        assert not any("entropy" in a.details for a in found)  # not known, and not made up


@pytest.mark.parametrize("quantise", [None, "decoder-int8", "int8"])
def test_onnx_does_not_depend_on_the_batch(quantise: str | None, speech: Rows) -> None:
    transcriber = load(encoder_padding="silence_cache", backend="onnx", quantise=quantise)
    alone, together = transcribe(transcriber, speech), transcribe(transcriber, speech, size=5)
    assert [(a.text, a.details) for a in alone] == [(b.text, b.details) for b in together]


@pytest.mark.parametrize("engine", ENGINES)
def test_int8_keeps_most_transcripts_and_is_smaller(engine: str, speech: Rows, cache: Path) -> None:
    plain, small = (load(backend=engine, quantise=mode) for mode in (None, "decoder-int8"))
    same = [a.text == b.text for a, b in zip(transcribe(plain, speech), transcribe(small, speech), strict=True)]
    assert sum(same) >= len(speech) - 1
    sizes = [sum(p.stat().st_size for p in t.model.folder.rglob("*") if p.is_file()) for t in (plain, small)]
    assert sizes[1] < 0.85 * sizes[0] and plain.model.folder.parent == cache / "backends"
    assert small.label == f"decoder-int8 + {engine}" and small.parameters_count() == plain.parameters_count() > 1e6


@pytest.mark.parametrize("engine", ENGINES)
def test_options_of_decoding_work(engine: str, speech: Rows) -> None:
    more = {"no_speech_threshold": 0.6}
    ours, theirs = (transcribe(load(backend=name, **more), speech[:4]) for name in ("torch", engine))
    assert [a.text for a in ours] == [b.text for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.details["no_speech_prob"] == pytest.approx(b.details["no_speech_prob"], abs=1e-3)
    for limit in ({"max_new_tokens": 3}, {"max_new_tokens": 8}, {"max_tokens_per_s": 2.0}):
        ours, theirs = (transcribe(load(backend=name, **limit), speech, size=3) for name in ("torch", engine))
        assert [a.text for a in ours] == [b.text for b in theirs]
        assert [a.details["tokens"] for a in ours] == [b.details["tokens"] for b in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.details["avg_logprob"] == pytest.approx(b.details["avg_logprob"], abs=2e-3)
    if engine == "onnx":
        with pytest.raises(UserError, match="num_beams: the backend onnx decodes greedily"):
            transcribe(load(backend="onnx", num_beams=3), speech[:1])
    else:
        assert transcribe(load(backend=engine, num_beams=3), speech[:2])[0].text


def test_languages_are_detected(tmp_path: Path, wavs: list[torch.Tensor]) -> None:
    """A random multilingual Whisper."""
    source, batch = tmp_path / "multilingual", pad_wavs([wav[:16000] for wav in wavs[:2]])
    multilingual_whisper(0).save(source)
    ours, theirs = (
        load_transcriber(source, long_audio=None, backend=name, max_new_tokens=6).transcribe(*batch)
        for name in ("torch", "onnx")
    )
    assert [a.details["language"] for a in ours] == [b.details["language"] for b in theirs]
    assert [a.text for a in ours] == [b.text for b in theirs]
    with pytest.raises(UserError, match="cannot detect this model's languages; give the language"):
        load_transcriber(source, long_audio=None, backend="ctranslate2").transcribe(*batch)
    assert load_transcriber(source, language="de", long_audio=None, backend="ctranslate2").transcribe(*batch)


def test_fallback_is_repeatable_or_refused(speech: Rows) -> None:
    """Every hypothesis fails, so all temperatures are tried; the order of the utterances does not matter."""
    transcriber = load(backend="onnx", temperatures=[0.0, 0.6], logprob_threshold=0.0)
    found = transcribe(transcriber, speech[:4])
    assert {one.details["temperature"] for one in found} == {0.6}
    again = transcribe(transcriber, speech.select([3, 2, 1, 0]), size=2)
    assert [a.text for a in found] == [b.text for b in reversed(again)]
    with pytest.raises(UserError, match="temperatures: the backend ctranslate2 cannot sample"):
        load(backend="ctranslate2", temperatures=[0.0, 0.6])
    long = load_transcriber(MINI, language="en", backend="ctranslate2")  # long audio has no fallback there
    wav = torch.cat([load_row(row) for row in speech[:4]])
    assert len(long.transcribe(wav[None])[0].text.split()) > 8


def test_every_length_is_encoded_once(speech: Rows) -> None:
    """CTranslate2 takes states for features if there are as many positions as mel bands."""
    transcriber = load(backend="ctranslate2", encoder_padding=0.2)
    window = transcriber.model.network.config.max_source_positions
    wav = torch.cat([load_row(row) for row in speech[:2]])
    for positions in (79, 80, 81):
        samples = (positions - 10) * 320
        (found,) = transcriber.transcribe(wav[None, :samples])
        (expected,) = load(encoder_padding=0.2).transcribe(wav[None, :samples])
        assert found.text == expected.text and positions < window


@pytest.mark.parametrize("engine", ENGINES)
def test_the_end_of_the_window_is_no_silence(engine: str, speech: Rows) -> None:
    """The window of 250 positions is not a multiple of the groups of 16."""
    wav = torch.cat([load_row(row) for row in speech])[None, : 5 * 16000 - 100]
    found, expected = (
        load(encoder_padding="silence_cache", backend=name).transcribe(wav)[0] for name in (engine, "torch")
    )
    assert found.text == expected.text and found.details["encoder_s"] == expected.details["encoder_s"] == 5.0
    assert found.details["avg_logprob"] == pytest.approx(expected.details["avg_logprob"], abs=2e-3)


def test_a_folder_of_before_groups_could_differ_in_size_opens(tmp_path: Path, speech: Rows) -> None:
    whisper = Whisper.from_source(resolve_source(MINI))
    whisper.encoder_padding = SilenceCache.calibrate(whisper, group=4, sinks=0)
    convert(whisper, tmp_path / "own", "onnx", None)
    expected = transcribe(load_transcriber(tmp_path / "own", language="en", long_audio=None), speech[:3])
    path = next((tmp_path / "own").rglob("tail.safetensors"))
    tensors = load_file(path)
    del tensors["starts"]
    save_file(tensors | {"size": torch.tensor(4)}, path)
    found = transcribe(load_transcriber(tmp_path / "own", language="en", long_audio=None), speech[:3])
    assert [(t.text, t.details) for t in found] == [(t.text, t.details) for t in expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_guard_encodes_the_whole_window(engine: str, speech: Rows) -> None:
    transcriber = load(
        encoder_padding="silence_cache", backend=engine, retry_logprob=0.0
    )  # every hypothesis is less likely
    found, plain = transcribe(transcriber, speech[:3]), transcribe(load(), speech[:3])
    assert all(one.details["encoded_again"] and one.details["encoder_s"] > 5.0 for one in found)  # both times
    assert [a.text for a in found] == [b.text for b in plain]


def test_a_folder_needs_no_option_and_refuses_others(
    tmp_path: Path, speech: Rows, capsys: pytest.CaptureFixture
) -> None:
    for engine in ENGINES:
        folder = tmp_path / engine
        whisper = Whisper.from_source(resolve_source(MINI))
        whisper.encoder_padding = SilenceCache.calibrate(whisper)
        convert(whisper, folder, engine, "int8")
        opened = load_transcriber(folder, language="en", long_audio=None)
        assert opened.label == f"silence cache, 0.2 s, groups of 16 but for 64 + int8 + {engine}"
        assert opened.technique == "silence_cache" and transcribe(opened, speech[:2])[0].text
        whole = load_transcriber(folder, language="en", long_audio=None, encoder_padding=30)
        assert "encoder_s" not in transcribe(whole, speech[:1])[0].details
        for options, message in (
            ({"backend": "torch"}, "is a model for the backend"),
            ({"quantise": "decoder-int8"}, "was converted with int8"),
            ({"encoder_padding": 0.5}, "fixed when the model was converted"),
            ({"padding_s": 1.0}, "fixed when the model was converted"),
        ):
            with pytest.raises(UserError, match=message):
                load_transcriber(folder, language="en", **options)
        with pytest.raises(UserError, match="run on the CPU here"):
            opened.to("cuda")
        with pytest.raises(UserError, match="no sequential decoding"):
            load_transcriber(folder, language="en", long_audio="sequential")
        with pytest.raises(UserError, match="copy the folder instead"):
            opened.model.save(tmp_path / "copy")
        with pytest.raises(UserError, match="convert the original"):
            convert(opened.model, tmp_path / "again", engine)


@pytest.mark.parametrize("damaged", ["decoder.onnx", "model.bin", "config.json"])
def test_damaged_folders_are_named(damaged: str, tmp_path: Path) -> None:
    engine = "ctranslate2" if damaged == "model.bin" else "onnx"
    convert(Whisper.from_source(resolve_source(MINI)), tmp_path / "model", engine)
    path = tmp_path / "model" / damaged
    if damaged == "config.json":
        config = json.loads(path.read_text())
        del config["backend"]["parameters"]
        path.write_text(json.dumps(config))
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model: .*convert (it|the model) again"):
        load_transcriber(tmp_path / "model", language="en")
    for entry in ({"name": "tensorrt"}, "tensorrt") if damaged == "config.json" else ():
        path.write_text(json.dumps(config | {"backend": entry}))
        with pytest.raises(UserError, match="'tensorrt' is not a backend; use torch, onnx or ctranslate2"):
            load_transcriber(tmp_path / "model", language="en")


def test_macs_of_another_engine_are_not_made_up(mini_corpus: dict[str, Path]) -> None:
    benchmark = Benchmark.from_manifest(mini_corpus["test"], normaliser="plain")
    benchmark.rows = benchmark.rows[:3]
    evaluate(load(backend="ctranslate2", encoder_padding=0.3), benchmark, repeats=0)
    result = evaluate(load(backend="onnx", encoder_padding="silence_cache"), benchmark, repeats=1, batch_size=2)
    assert result.details["encoder_s"] < 5
    assert result.macs_g is None and result.macs_g_per_audio_s is None and result.macs_thop_g is None
    assert (
        result.wer_percent is not None
        and result.runtimes[0]["rtfx"] > 0
        and "nan" not in json.dumps(result.rows[0]).lower()
    )


def test_own_length_and_merged_lora_go_along(tmp_path: Path, speech: Rows) -> None:
    whisper = LoraWhisper.adapt(Whisper.from_source(resolve_source(MINI)), rank=2)
    with torch.no_grad():
        for name, parameter in whisper.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.002, generator=torch.Generator().manual_seed(len(name)))
    whisper.merge = False
    whisper.save(tmp_path / "lora")
    assert load_transcriber(tmp_path / "lora", language="en").technique == "lora"
    expected = transcribe(load_transcriber(tmp_path / "lora", language="en", long_audio=None), speech)
    found = transcribe(load_transcriber(tmp_path / "lora", language="en", long_audio=None, backend="onnx"), speech)
    assert [a.text for a in found] == [b.text for b in expected]
    cached = LoraWhisper.from_source(str(tmp_path / "lora"))
    cached.encoder_padding = SilenceCache.calibrate(cached)
    expected = transcribe(WhisperTranscriber(cached, "en"), speech)
    for engine in ENGINES:
        convert(cached, tmp_path / f"cached-{engine}", engine, None)
        opened = load_transcriber(tmp_path / f"cached-{engine}", language="en", long_audio=None)
        assert [a.text for a in transcribe(opened, speech)] == [b.text for b in expected]
    own = Whisper.from_source(resolve_source(MINI))
    own.encoder_padding = AudioContext(0.3)
    own.save(tmp_path / "own")
    transcriber = load_transcriber(tmp_path / "own", language="en", long_audio=None, backend="ctranslate2")
    assert transcriber.technique == "audio_context" and not transcriber.model.torch_encoder
    wavs, lengths = torch.randn(1, 16000) * 0.1, torch.tensor([16000])
    found = transcriber.model.encode(wavs, lengths)
    encoder, count = own.network.model.encoder, int(found.own)
    with torch.no_grad():
        x = torch.nn.functional.gelu(encoder.conv1(own.features(wavs, lengths, 2 * count)))
        x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2) + encoder.embed_positions.weight[:count]
        for layer in encoder.layers:
            x = layer(x, None)
        expected = encoder.layer_norm(x)
    assert count == 65 and torch.allclose(found.states, expected, atol=1e-4)


def test_export_compares_and_says_so(
    mini_corpus: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--manifest", str(mini_corpus["test"]), "--utterances", "4"]
    assert run_command("export", [MINI, "--to", "onnx", "--out", str(tmp_path / "onnx"), *common]) == 0
    assert "4 of 4 transcripts are the same" in capsys.readouterr().out
    more = ["--to", "faster-whisper", "--out", str(tmp_path / "ct2")]
    assert run_command("export", [MINI, *more, *common]) == 0
    assert "4 of 4 transcripts are the same" in capsys.readouterr().out and (tmp_path / "ct2" / "model.bin").is_file()
    for arguments, message in (
        (["--to", "transformers", "--quantise", "int8"], "--quantise requires --to onnx or ctranslate2"),
        (["--to", "onnx"], "exists; choose another folder"),
    ):
        with pytest.raises(UserError, match=message):
            export.main([MINI, *arguments, "--out", str(tmp_path / ("onnx" if "exists" in message else "new"))])


@pytest.mark.parametrize("name", ["wav2vec2-base", "wavlm-base", "whisper"])
@pytest.mark.parametrize("output_norm", [True, False])
def test_ctc_models_of_all_encoders_become_graphs(
    name: str, output_norm: bool, ssl_sources: dict[str, str], tmp_path: Path
) -> None:
    labels = CharacterLabels.from_texts(["abc"])
    if name == "whisper":
        encoder = new_whisper_encoder(32, 1, 2, output_norm=output_norm)
    else:
        encoder = load_encoder(ssl_sources[name], output_norm=output_norm)
    model = CTCModel(torch.nn.Identity(), encoder, CTCHead(32, len(labels), "feedforward", neurons=16), labels)
    export_to_onnx(model, tmp_path / "graph")
    assert largest_difference(model, tmp_path / "graph") < 1e-3


def test_ctc_models_become_a_graph_or_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, mini_corpus: dict[str, Path]
) -> None:
    import onnxruntime

    folder = tmp_path / "ctc"
    assert run_command("export", ["efficient_asr:mini_encoder", "--to", "onnx", "--out", str(folder)]) == 0
    model = CTCModel.load(resolve_source("efficient_asr:mini_encoder"))
    about = json.loads((folder / "labels.json").read_text())
    assert about == {"labels": model.labels.characters, "features": "log_mel", "normalise": False}
    session, row = onnxruntime.InferenceSession(str(folder / "model.onnx")), read_manifest(mini_corpus["test"])[0]
    wav = load_row(row)[None]
    features = model.encoder.log_mel(wav, torch.tensor([wav.shape[1]]))
    log_probs = torch.from_numpy(session.run(None, {"features": features.numpy()})[0])
    expected, lengths = model.eval()(wav, torch.ones(1))
    assert torch.allclose(log_probs, expected, atol=1e-3)
    assert greedy_texts(log_probs, lengths, model.labels) == greedy_texts(expected, lengths, model.labels)
    rows = read_manifest(mini_corpus["test"])[:5]
    wavs = pad_wavs([load_row(row) for row in rows])
    opened, torchs = load_transcriber(folder), load_transcriber("efficient_asr:mini_encoder")
    texts = [found.text for found in opened.transcribe(*wavs)]
    assert texts == [found.text for found in torchs.transcribe(*wavs)] and any(texts)
    assert texts == [opened.transcribe(load_row(row))[0].text for row in rows]  # alone
    assert opened.transcribe(torch.zeros(1, 50))[0].text == torchs.transcribe(torch.zeros(1, 50))[0].text
    result = evaluate(opened, Benchmark.from_manifest(mini_corpus["test"]), repeats=0)
    assert result.macs_g is None and result.parameters is None and result.wer_percent is not None
    with pytest.raises(UserError, match="runs on the CPU"):
        opened.to("cuda")
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="is damaged"):
        load_transcriber(folder)
    assert run_command("export", ["efficient_asr:mini_downsampled", "--to", "onnx", "--out", str(tmp_path / "x")]) == 2
    assert "it has a front end (downsampling)" in capsys.readouterr().err and not (tmp_path / "x").exists()
