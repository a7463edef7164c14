"""Bad input, case by case: what is fed, with which command. `test_bad_inputs.py` runs them and keeps docs/bad_inputs.md true."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from conftest import chirp

TRAIN, EVALUATE, TRANSCRIBE, REPORT = "train.py", "evaluate.py", "transcribe.py", "report.py"


@dataclass
class World:
    """A folder with a corpus of four utterances, the YAML of a tiny training, and a trained model."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def yaml(self) -> Path:
        return self.root / "tiny.yaml"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def audio(self) -> Path:
        return self.corpus / "u0.wav"

    def rows(self, split: str = "train") -> list[dict]:
        return [json.loads(line) for line in (self.corpus / f"{split}.jsonl").read_text().splitlines()]

    def write(self, lines: list, split: str = "train") -> None:
        content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (self.corpus / f"{split}.jsonl").write_bytes(b"".join(line + b"\n" for line in content))


@dataclass
class Case:
    """One bad input.

    Attributes
    ----------
    what : str
        What is fed, in words.
    command : str
        Which command gets it.
    change : callable
        Spoils the world and returns further arguments.
    code : int
        The exit code that is due; 0 where the input is answered without stopping.
    shows : str
        What the message must contain.
    """

    what: str
    command: str
    change: Callable[[World], list[str]]
    shows: str
    code: int = 2


def line(what: str, change: Callable[[dict, World], object], shows: str, *options: str, code: int = 2) -> Case:
    """The second line of the training manifest is replaced."""

    def spoil(world: World) -> list[str]:
        rows = world.rows()
        rows[1] = change(rows[1], world)
        world.write(rows)
        return list(options)

    return Case(what, TRAIN, spoil, shows, code)


def audio(
    what: str, spoil: Callable[[Path], None], shows: str, *options: str, code: int = 2, name: str = "u1.wav"
) -> Case:
    """The audio file of the second training line is replaced."""

    def change(world: World) -> list[str]:
        rows = world.rows()
        path = world.corpus / name
        path.unlink(missing_ok=True)
        spoil(path)
        rows[1] = {"id": "u1", "audio": name, "text": rows[1]["text"]}
        for split in ("train", "dev", "test"):
            world.write([rows[0], *rows[2:]] if split != "train" else rows, split)
        return list(options)

    return Case(what, TRAIN, change, shows, code)


def options(what: str, *arguments: str, shows: str) -> Case:
    """The training gets these options."""
    return Case(what, TRAIN, lambda world: list(arguments), shows)


def wave(path: Path, samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16") -> None:
    soundfile.write(path, samples, rate, subtype)


def truncated(path: Path) -> None:
    wave(path, chirp(1.31, 200, 800))
    path.write_bytes(path.read_bytes()[:9000])


def not_finite(path: Path) -> None:
    samples = chirp(1.31, 200, 800)
    samples[5000] = np.nan
    wave(path, samples, subtype="FLOAT")


def odd_rate(path: Path, rate: int) -> None:
    wave(path, chirp(1.31, 200, 800))
    data = bytearray(path.read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(data)


def link_out(path: Path) -> None:
    outside = path.parent.parent / "outside.wav"
    wave(outside, chirp(1.31, 200, 800))
    path.symlink_to(outside)


def speechbrain_checkpoint(world: World) -> list[str]:
    folder = world.root / "output" / "save" / "CKPT+x"
    folder.mkdir(parents=True)
    (folder / "CKPT.yaml").write_text("x: 1")
    return []


def antiphase(path: Path) -> None:
    samples = chirp(1.31, 200, 800)
    wave(path, np.stack([samples, -samples], axis=1))


def concatenated(path: Path) -> None:
    wave(path, chirp(1.31, 200, 800))
    path.write_bytes(path.read_bytes() * 2)


def as_csv(world: World) -> list[str]:
    rows = world.rows()
    for split in ("train", "dev", "test"):
        cells = "".join(f"{r['id']},{r['audio']},{r['text']}\n" for r in rows)
        extra = "u9,u1.wav,nine,and more\n" if split == "train" else ""
        (world.corpus / f"{split}.csv").write_text(f"id,audio,text\n{cells}{extra}")
        (world.corpus / f"{split}.jsonl").unlink()
    return []


def quantised(world: World) -> None:
    config = {"model_type": "whisper", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (world.model / "config.json").write_text(json.dumps(config))


def adapter(world: World) -> None:
    (world.model / "config.json").unlink()
    (world.model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')


def upper_case_language_model(world: World) -> None:
    grams = "-1\t<unk>\t0\n-1\t<s>\t0\n-1\t</s>\t0\n-1\tONE\t0\n-1\tTWO\t0\n"
    (world.root / "lm.arpa").write_text(
        f"\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n{grams}\n\\2-grams:\n-1\t<s> ONE\n\n\\end\\\n"
    )


def byte_order_mark(world: World) -> list[str]:
    path = world.corpus / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return []


def no_result(world: World) -> list[str]:
    (world.root / "runs").mkdir()
    (world.root / "runs" / "x.json").write_text("{}")
    return ["--runs", str(world.root / "runs")]


MANIFEST = [
    line("a line that is not JSON", lambda row, w: b"{broken", "train.jsonl:2: not JSON"),
    line("a line that is a list", lambda row, w: b"[1, 2]", "not a JSON object"),
    line("a line in Latin-1", lambda row, w: json.dumps(row).encode().replace(b"turn", b"t\xfcrn"), "not UTF-8"),
    line("a line of 2 MB", lambda row, w: {**row, "note": "x" * 2_000_000}, "longer than 1048576 bytes"),
    line("100,000 brackets", lambda row, w: b"[" * 100_000, "invalid JSON (RecursionError)"),
    line("half a surrogate pair in the text", lambda row, w: {**row, "text": "\ud800"}, "half of a surrogate pair"),
    line("no audio", lambda row, w: {"id": "u1", "text": "one"}, "no audio: there is no column 'audio'"),
    line("audio that is a number", lambda row, w: {**row, "audio": 3}, "audio 3 is not a path"),
    line("no text", lambda row, w: {**row, "text": None}, "no text: there is no column 'text'"),
    line("a text that is a number", lambda row, w: {**row, "text": 12}, "text 12 is not a string"),
    line("an empty text", lambda row, w: {**row, "text": "  "}, "empty text"),
    line("a text of punctuation", lambda row, w: {**row, "text": "?!"}, "text '?!' is empty after normalisation"),
    line("an id twice", lambda row, w: {**row, "id": "u0"}, "id 'u0' was already used in …/corpus/train.jsonl:1"),
    line("an id that is a list", lambda row, w: {**row, "id": [1]}, "invalid id [1]; use a non-empty string"),
    line("an empty id", lambda row, w: {**row, "id": ""}, "invalid id ''; use a non-empty string"),
    line("a negative duration", lambda row, w: {**row, "duration": -1}, "duration -1 is not a positive number"),
    line("a duration in words", lambda row, w: {**row, "duration": "long"}, "duration 'long' is not a positive number"),
    line("duration NaN", lambda row, w: {**row, "duration": float("nan")}, "duration nan is not a positive number"),
    line("a duration in milliseconds", lambda row, w: {**row, "duration": 1310}, "duration 1310.0 s, but"),
    line("a language that is a number", lambda row, w: {**row, "language": 3}, "language 3 is not a string"),
    line("bad lines and --skip_bad", lambda row, w: b"{broken", "1 bad utterance left out; listed in", "--skip_bad", "True", code=0),
    Case("a byte order mark", TRAIN, byte_order_mark, "result: ", code=0),
    Case("a CSV whose last line has a cell too many", TRAIN, as_csv, "4 cells instead of 3"),
    line("a language that is none", lambda row, w: row | {"language": "egnlish"}, "Did you mean 'english'"),
    line("a segment that begins behind the end of its file", lambda row, w: row | {"offset": 7.0, "duration": 1.0}, "ends at 1.31 s"),
    line("an offset in words", lambda row, w: row | {"start": "noon"}, "rename the column"),
    line("a segment whose end and duration differ", lambda row, w: row | {"start": 0.1, "end": 0.5}, "lasts 0.400 s"),
    line("a text too long for its audio", lambda row, w: {**row, "text": "far too many words " * 9}, "u1: 1.31 s yield 66 frames, but its 170 characters need 179"),
    line("characters unknown to the pretrained model", lambda row, w: {**row, "text": "zéro"}, "characters that the model does not know: z é", "--pretrained_model", "{model}"),
    line("an utterance over max_duration_s", lambda row, w: row, "1 utterances in 'train' are longer than max_duration_s=1.2 and were left out", "--max_duration_s", "1.2", code=0),
    Case("an empty manifest", TRAIN, lambda w: w.write([]) or [], "train.jsonl has no rows"),
    Case("a manifest of bad lines only", TRAIN, lambda w: w.write([b"x", b"y"]) or ["--skip_bad", "True"], "holds no usable utterance"),
]  # fmt: skip

AUDIO = [
    audio("a file that is not there", lambda p: None, "no such file"),
    audio("a link to nowhere", lambda p: p.symlink_to("/nowhere/x.wav"), "(a link to /nowhere/x.wav)"),
    audio("a link out of the folder: followed", link_out, "result: ", code=0),
    audio("a folder in place of a file", lambda p: p.mkdir(), "not a file"),
    audio("a named pipe", lambda p: os.mkfifo(p), "not a file"),
    audio("a text file", lambda p: p.write_text("no audio"), "cannot decode"),
    audio("an empty file", lambda p: p.write_bytes(b""), "cannot decode"),
    audio("no samples", lambda p: wave(p, np.zeros(0)), "no samples in"),
    audio("a truncated FLAC", truncated, "u1.flac is", name="u1.flac"),
    audio("a sample that is NaN", not_finite, "has samples that are not finite"),
    audio("silence with a text", lambda p: wave(p, np.zeros(20000)), "is silent"),
    audio("channels that cancel each other out, with a text", antiphase, "its channels cancel each other out"),
    audio("two WAV files, one behind the other", concatenated, "several concatenated recordings"),
    audio("clipped speech: used", lambda p: wave(p, np.clip(20 * chirp(1.31, 200, 800), -1, 1)), "1 of 4 utterances are clipped (such as u1)", code=0),
    audio("a header that claims 12 Hz", lambda p: odd_rate(p, 12), "claims a sample rate of 12 Hz"),
    audio("a rate of 44,099 Hz: resampled", lambda p: wave(p, chirp(1.31, 200, 800, 44099), 44099), "result: ", code=0),
    audio("six channels at 48 kHz: mixed and resampled", lambda p: wave(p, np.stack([chirp(1.31, 200, 800, 48000)] * 6, 1), 48000), "result: ", code=0),
    audio("headerless .raw", lambda p: p.write_bytes(b"\0" * 9999), "cannot decode", name="u1.raw"),
]  # fmt: skip

SETTINGS = [
    Case("no YAML file", TRAIN, lambda w: w.yaml.unlink() or [], "no YAML file at"),
    Case("a YAML with a bracket left open", TRAIN, lambda w: w.yaml.write_text("a: [1\n") and [], "is not valid YAML"),
    Case("a YAML without keys", TRAIN, lambda w: w.yaml.write_text("# nothing\n") and [], "contains no keys"),
    Case("a base that is not there", TRAIN, lambda w: w.yaml.write_text("base: !include:none.yaml\n") and [], "no YAML file at"),
    Case("a class that does not exist", TRAIN, lambda w: w.yaml.write_text(w.yaml.read_text() + "frontend: !new:torch.nn.Nothing {}\n") and [], "Nothing"),
    Case("a value that must be given", TRAIN, lambda w: w.yaml.write_text(w.yaml.read_text().replace("corpus: jsonl\n", "")) and [], "'corpus' must be given"),
    options("a mistyped key", "--number_of_epoch", "2", shows="Did you mean 'number_of_epochs'"),
    options("an abbreviated option", "--prec", "bf16", shows="Did you mean 'precision'"),
    options("what other programs call it", "--epochs", "3", shows="Did you mean 'number_of_epochs'"),
    options("a key inside another", "--head_optimizer.lr", "0.1", shows="use --lr_head"),
    options("words where a number belongs", "--number_of_epochs", "many", shows="expected int for number_of_epochs, got 'many'"),
    options("null where a number belongs", "--max_duration_s", "null", shows="for max_duration_s, got null"),
    options("null where a list belongs", "--test_splits", "null", shows="expected a list for test_splits, got null"),
    options("a bracket left open", "--test_splits", "[test", shows="cannot parse '--test_splits [test'; check for an unclosed bracket"),
    options("a word in place of an object", "--encoder", "foo", shows="the value is an object (!apply:"),
    options("a batch of none", "--batch_size", "0", shows="batch_size: expected an integer >= 1, got 0"),
    options("half an utterance a batch", "--batch_size", "1.5", shows="batch_size: expected an integer >= 1, got 1.5"),
    options("half a frame", "--frames_per_state", "1.5", shows="frames_per_state: expected an integer >= 1, got 1.5"),
    options("less than no workers", "--num_workers", "-1", shows="num_workers: expected an integer >= 0, got -1"),
    options("less than no patience", "--nonfinite_patience", "-1", shows="nonfinite_patience: expected an integer >= 0, got -1"),
    options("batches of 0 s", "--max_batch_length_s", "0", shows="max_batch_length_s: expected a number >= 0.001, got 0"),
    options("a device that is none", "--device", "gpu", shows="invalid device 'gpu'"),
    options("fp16 on a CPU", "--precision", "fp16", shows="not yet supported on CPU"),
    options("an unknown corpus", "--corpus", "libri", shows="unknown corpus 'libri'"),
    options("a module that is no corpus", "--corpus", "os.path", shows="has no function prepare()"),
    options("a data folder that is not there", "--data_folder", "/nowhere", shows="'/nowhere' is not a folder"),
    options("a data folder in a variable that is not set", "--data_folder", "$NO_SUCH_VARIABLE/x", shows="environment variable that is not set"),
    options("LibriSpeech without a split", "--corpus", "librispeech", shows="contains none of train-clean-100"),
    options("mini without minutes", "--corpus", "mini", "--corpus_options", "{minutes: 0}", shows="minutes must be greater than 0, got 0"),
    options("a mistyped option of the corpus", "--corpus_options", "{colums: {}}", shows="Did you mean 'columns'"),
    options("a column for a field that is none", "--corpus_options", "{columns: {txt: x}}", shows="'txt' is not a manifest field"),
    options("a column that is a number", "--corpus_options", "{columns: {text: 3}}", shows="must be a column name"),
    options("a column that no line has", "--corpus_options", "{columns: {text: sentence}}", shows="there is no column 'sentence'"),
    options("a split without a file", "--corpus_options", "{manifests: {train: null}}", shows="'train' must be a file or a list of files, not None"),
    options("manifests that are no mapping", "--corpus_options", "{manifests: foo}", shows="expected a mapping"),
    options("a manifest that is not there", "--corpus_options", "{manifests: {train: none.jsonl}}", shows="no manifest at"),
    options("corpus options that are a list", "--corpus_options", "[1]", shows="expected a map for corpus_options, got [1]"),
    options("a training split that is not there", "--train_split", "training", shows="has no split 'training'; it has"),
    options("a test split that is not there", "--test_splits", "[test, tset]", shows="has no split 'tset'"),
    options("an unknown order", "--sorting", "upwards", shows="use ascending, descending or random"),
    options("an unknown normaliser of training texts", "--train_normaliser", "plane", shows="Did you mean 'plain'"),
    options("an unknown normaliser of test texts", "--test_normaliser", "plane", shows="Did you mean 'plain'"),
    options("an unknown way to check audio", "--check_audio", "no", shows="check_audio: 'no' is not one of header, samples"),
    options("an unknown head", "--head_block", "lstm", shows="use feedforward, bilstm or none"),
    options("nothing short enough to train on", "--max_duration_s", "0.1", shows="every utterance in 'train' is longer than max_duration_s=0.1"),
    options("a language model that is not there", "--lm_path", "/no/lm.arpa", shows="no file at /no/lm.arpa"),
    options("a pretrained model that is not there", "--pretrained_model", "/nowhere", shows="has no config.json"),
    options("noises that are not there", "--noise_manifest", "/no/noise.jsonl", shows="no manifest at /no/noise.jsonl"),
    options("an output folder that cannot be written", "--output_folder", "/proc/nothing", shows="cannot write to /proc/nothing"),
    options("a results folder that cannot be written", "--results_folder", "/proc/nothing", shows="cannot write to /proc/nothing"),
    options("--test_only before any training", "--test_only", "True", shows="there is no trained model at"),
    Case("a checkpoint in SpeechBrain's format", TRAIN, speechbrain_checkpoint, "which can execute code when it is read"),
]  # fmt: skip


def evaluate(what: str, change: Callable[[World], object], shows: str, *arguments: str, code: int = 2) -> Case:
    """evaluate.py gets these options."""
    return Case(what, EVALUATE, lambda world: [change(world), *arguments][1:], shows, code)


def pickled(world: World) -> None:
    (world.model / "model.safetensors").unlink()
    (world.model / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def other_labels(world: World) -> None:
    config = json.loads((world.model / "config.json").read_text())
    (world.model / "config.json").write_text(json.dumps(config | {"labels": ["a"]}))


def foreign_part(world: World) -> None:
    config = json.loads((world.model / "config.json").read_text())
    (world.model / "config.json").write_text(json.dumps(config | {"head": {"type": "os.system", "config": {}}}))


MEASURING = [
    evaluate("a model folder without config.json", lambda w: (w.model / "config.json").unlink(), "it has no config.json"),
    evaluate("a config.json that is not JSON", lambda w: (w.model / "config.json").write_text("{"), "config.json is not JSON"),
    evaluate("a config.json of something else", lambda w: (w.model / "config.json").write_text('{"model_type": "bert"}'), "neither a model folder"),
    evaluate("a config.json that names foreign code", foreign_part, "damaged or cannot be trusted"),
    evaluate("an alphabet that does not fit", other_labels, "the alphabet does not match the head"),
    evaluate("weights that are missing", lambda w: (w.model / "model.safetensors").unlink(), "has no model.safetensors"),
    evaluate("weights as a pickle", pickled, "in a format that can execute code when it is read"),
    evaluate("weights that are damaged", lambda w: (w.model / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    evaluate("an output that is no .json", lambda w: None, "must end in .json", "--out", "result.txt"),
    evaluate("columns that cannot be read", lambda w: None, "cannot parse '{audio'; use", "--columns", "{audio"),
    evaluate("columns that are a word", lambda w: None, "columns must map manifest fields", "--columns", "audio"),
    evaluate("a language model that is none", lambda w: (w.root / "lm.arpa").write_text("hello"), "is not a language model that kenlm can read", "--lm", "{root}/lm.arpa"),
    evaluate("a language model in capitals", upper_case_language_model, "--lm_case upper", "--lm", "{root}/lm.arpa"),
    evaluate("a model that was saved quantised", quantised, "was saved quantised, by bitsandbytes (8 bits)"),
    evaluate("int8 weights for a CTC model", lambda w: None, "'quantise' is not an option of CTC models", "--quantise", "decoder-int8"),
    evaluate("a backend for a CTC model", lambda w: None, "'backend' is not an option of CTC models", "--backend", "onnx"),
    evaluate("a model for a backend that does not exist", lambda w: (w.model / "config.json").write_text('{"model_type": "whisper", "backend": {"name": "tensorrt"}}'), "is not a"),
    evaluate("the silence cache for a CTC model", lambda w: None, "'encoder_padding' is not an option", "--encoder_padding", "silence_cache"),
    evaluate("an adapter whose base is not there", adapter, "is an adapter for '/nowhere', which cannot be loaded"),
    evaluate("a pipe in place of a manifest", lambda w: ((w.corpus / "test.jsonl").unlink(), os.mkfifo(w.corpus / "test.jsonl")), "is a pipe or a device"),
    evaluate("a Parquet file in place of a manifest", lambda w: (w.corpus / "test.jsonl").write_bytes(b"PAR1\0"), "is a Parquet file; save it as JSON lines"),
    evaluate("a spreadsheet in place of a manifest", lambda w: (w.corpus / "test.jsonl").write_bytes(b"PK\3\4"), "is a spreadsheet or a zip archive"),
    evaluate("a test manifest that is not there", lambda w: (w.corpus / "test.jsonl").unlink(), "no manifest at"),
    evaluate("a test manifest with a bad line and --skip_bad", lambda w: w.write([*w.rows("test"), b"x"], "test"), "1 bad utterance left out", "--skip_bad", code=0),
    Case("a file that is not there, among others", TRANSCRIBE, lambda w: [str(w.audio), "none.wav"], "1 of 2 files could not be transcribed"),
    Case("a file that is no audio", TRANSCRIBE, lambda w: [str(w.yaml)], "cannot decode"),
    Case("a folder without results", REPORT, lambda w: ["--runs", str(w.corpus)], "no results in"),
    Case("a result that is none", REPORT, no_result, "is not a result: experiment"),
]  # fmt: skip

APP, PREPARE, PUBLISH = "app.py", "prepare_features.py", "publish.py"


def store(what: str, out: str, shows: str, *arguments: str) -> Case:
    """prepare_features.py is to write the corpus to `out`."""
    return Case(
        what,
        PREPARE,
        lambda w: ["{model}", "--manifest", str(w.corpus / "train.jsonl"), "--out", out, *arguments],
        shows,
    )


STORAGE_AND_WEB = [
    store("credentials in a URL", "s3://key:secret@bucket/x", "leave the credentials out of the URL"),
    store("a file system that does not exist", "floppy://a/x", "this file system cannot be used"),
    store("features of a CTC model", "{root}/store", "it is not a Whisper"),
    Case("a manifest and a corpus at once", PREPARE, lambda w: ["x", "--manifest", "a", "--corpus", "b", "--out", "c"], "give either --manifest or --corpus"),
    Case("an app without models", APP, lambda w: [], "give one or more models"),
    Case("an app with models and results", APP, lambda w: ["{model}", "--results", "{root}"], "give one or more models, or a folder"),
    Case("two models under one name", APP, lambda w: ["a={model}", "a={model}"], "give every model a name of its own"),
    Case("a limit of nothing", APP, lambda w: ["{model}", "--longest_s", "0"], "must be numbers above 0"),
    Case("a limit without a bound", APP, lambda w: ["{model}", "--largest_mb", "inf"], "must be numbers above 0"),
    Case("results to explore that are not there", APP, lambda w: ["--results", str(w.corpus)], "contains no results"),
    Case("a folder without a model to publish", PUBLISH, lambda w: [str(w.corpus), "{root}/published"], "has no config.json"),
    Case("a URL to publish to", PUBLISH, lambda w: ["{model}", "https://huggingface.co/team/fast"], "not a URL"),
    Case("a folder of something else to publish to", PUBLISH, lambda w: ["{model}", str(w.corpus)], "is not replaced"),
    Case("a hub that cannot be reached", PUBLISH, lambda w: ["{model}", "team/fast"], "cannot be reached"),
    Case("a page of no results", REPORT, lambda w: ["--runs", str(w.corpus), "--html", "{root}/a.html"], "contains no results"),
]  # fmt: skip

SECTIONS = {
    "Manifests": MANIFEST, "Audio": AUDIO, "Settings": SETTINGS, "Measuring": MEASURING, "Storage and web": STORAGE_AND_WEB,
}  # fmt: skip
CASES = [case for cases in SECTIONS.values() for case in cases]
