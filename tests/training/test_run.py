"""From the command line to the Result, as a user would do it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import chirp, environment_folder
from runs import run_script
from safetensors.torch import load_file

from efficient_asr.models.ctc import CTCModel
from efficient_asr.settings.command_line import parse_command_line
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError, exit_code


def test_a_run_leaves_a_model_and_a_result(tiny_yaml: Path, tmp_path: Path) -> None:
    assert run(CTCBrain, [str(tiny_yaml), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert result["utterances"] == 4 and result["technique"] == "none" and result["corpus"] == "jsonl"
    assert result["hparams"]["number_of_epochs"] == 2 and result["provenance"]["seed"] == 1986
    assert {r["batch_size"] for r in result["runtimes"]} == {1, 8}
    model = CTCModel.load(tmp_path / "output" / "model")
    assert "".join(model.labels.characters) == "".join(sorted(set(" one two turn on the light nine call anna at home")))
    assert len((tmp_path / "output" / "train_log.txt").read_text().splitlines()) == 2


def test_it_learns(tiny_yaml: Path, tmp_path: Path) -> None:
    """Four utterances must be learned by heart: this fails where gradients, labels or lengths are wrong."""
    options = [
        "--number_of_epochs", "150", "--batch_size", "4", "--newbob_threshold", "-100", "--measure_macs", "False",
        "--lr_encoder", "0.01", "--lr_head", "0.01",
    ]  # fmt: skip
    assert run(CTCBrain, [str(tiny_yaml), "--device", "cpu", *options]) == 0
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert result["wer_percent"] < 15 and result["macs_g"] is None


def test_gradient_accumulation_equals_a_larger_batch(tiny_yaml: Path, tmp_path: Path) -> None:
    weights = []
    for batch, factor in ((2, 1), (1, 2)):
        folder = tmp_path / f"acc{factor}"
        options = [
            "--batch_size", str(batch), "--grad_accumulation_factor", str(factor), "--number_of_epochs", "1",
            "--sorting", "ascending", "--output_folder", str(folder), "--measure_runtime", "False", "--max_grad_norm", "1000",
        ]  # fmt: skip
        assert run(CTCBrain, [str(tiny_yaml), "--device", "cpu", *options]) == 0
        weights.append(load_file(folder / "model" / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights(tiny_yaml: Path, tmp_path: Path) -> None:
    weights = []
    for folder in ("a", "b"):
        options = [
            "--output_folder",
            str(tmp_path / folder),
            "--measure_runtime",
            "False",
            "--speeds_percent",
            "[95, 100, 105]",
        ]
        assert run(CTCBrain, [str(tiny_yaml), "--device", "cpu", *options]) == 0
        weights.append(load_file(tmp_path / folder / "model" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_bf16_trains_and_fp16_on_a_cpu_is_refused(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tiny_yaml), "--device", "cpu", "--measure_runtime", "False", "--number_of_epochs", "1"]
    assert run(CTCBrain, [*arguments, "--precision", "fp16"]) == 2
    assert "not yet supported on CPU" in capsys.readouterr().err
    assert run(CTCBrain, [*arguments, "--precision", "bf16"]) == 0
    state = load_file(tmp_path / "output" / "model" / "model.safetensors")
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in state.values())


def test_test_only_measures_the_trained_model_again(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tiny_yaml), "--device", "cpu", "--measure_runtime", "False"]
    assert run(CTCBrain, [*arguments, "--test_only", "True"]) == 2
    assert "there is no trained model" in capsys.readouterr().err
    assert run(CTCBrain, [*arguments, "--test_only", "False"]) == 0
    first = json.loads((tmp_path / "results" / "tiny.json").read_text())
    weights = (tmp_path / "output" / "model" / "model.safetensors").read_bytes()
    card = tmp_path / "output" / "model" / "README.md"
    card.write_text("By hand.")
    assert run(CTCBrain, [*arguments, "--test_only", "True", "--number_of_epochs", "9"]) == 0
    again = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert again["wer_percent"] == first["wer_percent"]
    assert again["hparams"]["number_of_epochs"] == first["hparams"]["number_of_epochs"] == 2  # those of the training
    capsys.readouterr()
    changed = ["--test_only", "True", "--lr_head", "0.7"]
    assert run(CTCBrain, [*arguments, *changed]) == 2
    message = capsys.readouterr().err
    assert "was trained with other settings" in message and "0.7 now" in message
    assert run(CTCBrain, [*arguments, *changed, "--allow_changed_settings", "True"]) == 0
    assert run(CTCBrain, arguments) == 0 and card.read_text() == "By hand."  # the folder is written again
    assert (tmp_path / "output" / "model" / "model.safetensors").read_bytes() == weights


def test_starting_from_a_model_keeps_alphabet_and_weights(tiny_yaml: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_yaml), "--device", "cpu", "--measure_runtime", "False"]
    assert run(CTCBrain, arguments) == 0
    first = json.loads((tmp_path / "results" / "tiny.json").read_text())
    more = ["--pretrained_model", str(tmp_path / "output" / "model"), "--output_folder", str(tmp_path / "second")]
    still = ["--number_of_epochs", "1", "--lr_encoder", "0.0", "--lr_head", "0.0"]
    assert run(CTCBrain, [*arguments, *more, *still]) == 0
    assert json.loads((tmp_path / "results" / "tiny.json").read_text())["wer_percent"] == first["wer_percent"]


def test_a_deeper_pretrained_model_is_not_cut_silently(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    deeper = tiny_yaml.with_name("deeper.yaml")
    deeper.write_text(tiny_yaml.read_text().replace("layers: 1", "layers: 2"))
    common = ["--device", "cpu", "--train_only", "True", "--number_of_epochs", "1"]
    assert run(CTCBrain, [str(deeper), *common]) == 0
    more = ["--pretrained_model", str(tmp_path / "output" / "model"), "--output_folder", str(tmp_path / "second")]
    assert run(CTCBrain, [str(tiny_yaml), *common, *more]) == 2
    assert "does not match (for example, encoder.model.layers.1." in capsys.readouterr().err


def test_audio_that_a_slow_speed_makes_too_long_is_named(
    tiny_yaml: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    soundfile.write(corpus / "long.wav", np.tile(chirp(1.0, 100, 400), 29), 16000)
    with open(corpus / "train.jsonl", "a") as file:
        file.write(json.dumps({"id": "long", "audio": "long.wav", "text": "nine"}) + "\n")
    options = ["--device", "cpu", "--train_only", "True", "--number_of_epochs", "1", "--speeds_percent"]
    assert run(CTCBrain, [str(tiny_yaml), *options, "[95, 100]"]) == 2
    assert "long: 29.00 s at 95 % speed are more than the 30 s of this encoder" in capsys.readouterr().err
    assert run(CTCBrain, [str(tiny_yaml), *options, "[100]"]) == 0
    downsampler = "!new:efficient_asr.techniques.downsampling.Downsampler {technique: signal, factor: 2}"
    tiny_yaml.write_text(tiny_yaml.read_text() + f"frontend: {downsampler}\n")
    more = ["--output_folder", str(tmp_path / "halved")]
    assert run(CTCBrain, [str(tiny_yaml), *options, "[95, 100]", *more]) == 0  # the encoder sees half of it
    soundfile.write(corpus / "longer.wav", np.tile(chirp(1.0, 100, 400), 61), 16000)
    for split, message in (
        ("dev", "longer: 61.00 s are more than the 30 s of this encoder"),
        ("test", "test: 'longer' has 61.00 s, more than the 30 s of this encoder"),
    ):  # found before the training
        with open(corpus / f"{split}.jsonl", "a") as file:
            file.write(json.dumps({"id": "longer", "audio": "longer.wav", "text": "nine"}) + "\n")
        where = ["--output_folder", str(tmp_path / split), "--valid_split", "dev" if split == "dev" else "train"]
        assert run(CTCBrain, [str(tiny_yaml), *options, "[100]", *where, "--max_duration_s", "100"]) == 2
        assert message in capsys.readouterr().err and not list((tmp_path / split).glob("save/CKPT*"))


def test_several_test_splits_give_several_results(tiny_yaml: Path, tmp_path: Path) -> None:
    options = ["--test_splits", "[test, dev]", "--measure_runtime", "False", "--number_of_epochs", "1"]
    assert run(CTCBrain, [str(tiny_yaml), "--device", "cpu", *options]) == 0
    names = sorted(p.name for p in (tmp_path / "results").glob("*.json"))
    assert names == ["tiny-dev.json", "tiny-test.json"]
    assert json.loads((tmp_path / "results" / "tiny-dev.json").read_text())["experiment"] == "tiny-dev"


def test_audio_too_short_for_its_text_is_named(tiny_yaml: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    rows[2]["text"] = "a sentence that is far too long for less than a second of audio, as anyone can see"
    (corpus / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    downsampler = "!new:efficient_asr.techniques.downsampling.Downsampler {technique: signal, factor: 2}"
    tiny_yaml.write_text(tiny_yaml.read_text() + f"frontend: {downsampler}\n")
    arguments = [str(tiny_yaml), "--device", "cpu", "--measure_runtime", "False", "--number_of_epochs", "1"]
    assert run(CTCBrain, arguments) == 2
    error = capsys.readouterr().err
    assert (
        "1 of 4 training utterances" in error and "u2: 0.70 s yield 18 frames" in error and "--skip_bad True" in error
    )
    assert run(CTCBrain, [*arguments, "--skip_bad", "True"]) == 0
    skipped = (tmp_path / "output" / "skipped_training.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in skipped] == ["u2"]


def test_command_line() -> None:
    path, run_opts, overrides = parse_command_line(["x.yaml", "--lr_head=0.5", "--test_only=False", "--seed", "3"])
    assert "test_only" in run_opts.overridden_args  # so that a YAML file with True does not count
    assert (str(path), run_opts.test_only, overrides) == ("x.yaml", False, {"lr_head": 0.5, "seed": 3})
    assert parse_command_line(["x.yaml", "--test_only"])[1].test_only
    for argv in ([], ["--seed", "3"]):
        with pytest.raises(UserError, match="the first argument must be a YAML file"):
            parse_command_line(argv)


def test_exit_codes(capsys: pytest.CaptureFixture) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_code(lambda: None) == 0
    assert exit_code(interrupted) == 130
    assert "rerun the command to resume" in capsys.readouterr().err


@pytest.mark.recipe
@pytest.mark.parametrize("kind", ["wav2vec2-base", "wavlm-large", "distilhubert"])
def test_every_kind_of_encoder_trains(kind: str, tiny_yaml: Path, ssl_sources: dict[str, str], tmp_path: Path) -> None:
    text = tiny_yaml.read_text()
    start, end = text.index("encoder: !apply"), text.index("head_block")
    tiny_yaml.write_text(text[:start] + f"source: {ssl_sources[kind]}\n" + text[end:])
    options = ["--head_block", "bilstm", "--head_neurons", "8", "--number_of_epochs", "1", "--measure_runtime", "False"]
    assert run(CTCBrain, [str(tiny_yaml), "--device", "cpu", *options]) == 0
    assert json.loads((tmp_path / "results" / "tiny.json").read_text())["macs_g"] > 0


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("recipe", "options", "name", "technique"),
    [
        ("downsampling", ["--downsampling_technique", "signal"], "downsampling_signal_x2", "downsampling"),
        ("downsampling", ["--downsampling_technique", "average"], "downsampling_average_x2", "downsampling"),
        (
            "downsampling",
            ["--downsampling_technique", "convolutional"],
            "downsampling_convolutional_x2",
            "downsampling",
        ),
        ("downsampling", ["--downsampling_technique", "none"], "downsampling_none_x2", "none"),
        ("layer_removal", ["--kept_layers", "least_redundant_2"], "layer_removal_least_redundant_2", "layer_removal"),
        ("early_exit", [], "early_exit", "early_exit"),
    ],
)
def test_recipes_on_mini(recipe: str, options: list[str], name: str, technique: str, tmp_path: Path) -> None:
    """The recipe as a user calls it, on a small mini corpus, then evaluate.py on what it leaves."""
    command = [
        f"recipes/{recipe}/train.py", f"hparams/mini/{recipe}.yaml", "--device", "cpu", *options,
        "--number_of_epochs", "1", "--corpus_options", "{minutes: 1}",
        "--prepared_folder", str(tmp_path / "data"), "--output_folder", str(tmp_path / "out"),
        "--results_folder", str(tmp_path / "runs"), "--runtime_repeats", "1", "--lm_beam_size", "20",
    ]  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "out" / "model") in done.stdout
    result = json.loads((tmp_path / "runs" / f"mini_{name}.json").read_text())
    assert result["technique"] == technique
    assert result["synthetic"] is True and result["wer_lm_percent"] is not None
    manifest = str(tmp_path / "data" / "test.jsonl")
    command = [
        "scripts/evaluate.py", str(tmp_path / "out" / "model"), "--manifest", manifest, "--repeats", "1",
        "--out", str(tmp_path / "again.json"),
    ]  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["wer_percent"] == result["wer_percent"] and again["benchmark_hash"] == result["benchmark_hash"]
    assert again["macs_g"] == pytest.approx(result["macs_g"])
    assert (tmp_path / "again.utterances.jsonl").is_file()


@pytest.mark.slow
def test_transcribe_prints_a_line_a_file_and_survives_a_bad_one(tmp_path: Path, tiny_ctc: CTCModel) -> None:
    import soundfile

    tiny_ctc.save(tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 100, 500, 44100), 44100)
    (tmp_path / "b.wav").write_text("no audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "c.flac", chirp(0.5, 100, 500), 16000)
    files = [str(tmp_path / name) for name in ("a.wav", "b.wav", "empty.wav", "none.wav", "c.flac")]
    command = ["scripts/transcribe.py", str(tmp_path / "model"), *files]
    done = run_script(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [json.loads(line)["audio"] for line in done.stdout.splitlines()] == [files[0], files[4]]
    assert "b.wav" in done.stderr and "none.wav" in done.stderr and "3 of 5 files" in done.stderr


@pytest.mark.real
@pytest.mark.slow
def test_transcripts_at_batch_1_and_8_are_identical_on_arctic_test(real_data: Path, tmp_path: Path) -> None:
    """With the asset's encoder and an untrained head texts are gibberish, which makes them the more sensitive."""
    from efficient_asr.corpora import jsonl
    from efficient_asr.data import iterate_batches, read_manifest
    from efficient_asr.inference.ctc import CTCTranscriber
    from efficient_asr.models.ctc import CTCHead
    from efficient_asr.models.encoders.load import load_encoder
    from efficient_asr.techniques.downsampling import Downsampler
    from efficient_asr.text.labels import CharacterLabels

    source = str(environment_folder("EFFICIENT_ASR_MODELS") / "whisper-tiny")
    manifests = {"test": "arctic_en/manifest.jsonl#test"}
    rows = read_manifest(jsonl.prepare(str(real_data), tmp_path, manifests)["test"])
    labels = CharacterLabels.from_texts(["abcdefghijklmnopqrstuvwxyz'"])
    for technique in ("none", "signal"):
        torch.manual_seed(1)
        head = CTCHead(384, len(labels), "none")
        torch.nn.init.normal_(head.linear.weight, std=2.0)
        model = CTCModel(Downsampler(technique, 2), load_encoder(source), head, labels)
        transcriber = CTCTranscriber(model)
        heard = {}
        for size in (1, 8):
            for chunk, wavs, lens in iterate_batches(rows, size):
                for row, transcript in zip(chunk, transcriber.transcribe(wavs, lens), strict=True):
                    heard.setdefault(row["id"], set()).add(transcript.text)
        for chunk, wavs, lens in iterate_batches(sorted(rows, key=lambda r: r["id"][::-1]), 8):
            for row, transcript in zip(chunk, transcriber.transcribe(wavs, lens), strict=True):
                heard[row["id"]].add(transcript.text)
        assert all(len(texts) == 1 for texts in heard.values())
        assert len({next(iter(texts)) for texts in heard.values()}) > 60
