"""run(): from a command line and a YAML file to a trained model and its Result.

The same for every recipe: read the YAML, prepare and check all data, fit, save the model folder, evaluate it on every test
split. A recipe only says which Brain.

    python recipes/<exp>/train.py hparams/<exp>.yaml [--key value ...]
    torchrun --nproc_per_node=2 recipes/<exp>/train.py hparams/<exp>.yaml
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.corpora import prepare_corpus
from efficient_asr.data import Row, loader_options, make_dataset, normalise_texts, read_manifest
from efficient_asr.errors import UserError, check_writable, exit_code, listing
from efficient_asr.evaluation.evaluator import Benchmark, evaluate
from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.transcriber import CTCTranscriber, LanguageModel, load_transcriber
from efficient_asr.models import resolve_source
from efficient_asr.settings import load_hparams, parse_command_line
from efficient_asr.text import get_normaliser


def run(brain_class: type[sb.Brain], argv: list[str] | None = None) -> int:
    """Run one experiment; returns the exit code (0 done, 2 a user's mistake, 130 interrupted)."""
    return exit_code(lambda: _run(brain_class, sys.argv[1:] if argv is None else argv))


def _run(brain_class: type[sb.Brain], argv: list[str]) -> None:
    path, run_opts, overrides = parse_command_line(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams, plain = load_hparams(path, overrides, run_opts)
    output_folder = Path(hparams["output_folder"])
    model_folder = output_folder / "model"
    test_only = run_opts.test_only or hparams["test_only"]
    if test_only and not (model_folder / "config.json").is_file():
        raise UserError(
            f"test_only: there is no trained model at {model_folder}; run the same command without it first"
        )
    check_writable(Path(hparams["results_folder"]), "results_folder")
    save_environment(output_folder, path, plain)
    splits = prepare_splits(hparams)
    benchmarks = read_benchmarks(hparams, splits, output_folder)
    if not test_only:
        train_and_save(brain_class, hparams, run_opts, splits, output_folder)
    if sb.utils.distributed.if_main_process():
        results = measure(hparams, plain, benchmarks, model_folder, brain_class)
        print(f"model: {model_folder}")
        for result in results:
            print(f"{result.summary()}\nresult: {result.path}")


def save_environment(output_folder: Path, path: Path, plain: dict[str, Any]) -> None:
    """Write the resolved settings beside the output, and send the log to a file."""
    if not sb.utils.distributed.if_main_process():
        return
    check_writable(output_folder, "output_folder")
    with open(output_folder / "hparams.yaml", "w", encoding="utf-8") as file:
        file.write(f"# the resolved settings of {path}\n")
        ruamel.yaml.YAML(typ="safe").dump({key: _plain(value) for key, value in plain.items()}, file)
    handler = logging.FileHandler(output_folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logging.getLogger("speechbrain").addHandler(handler)


def _plain(value: Any) -> Any:
    """Turn ruamel's lists and mappings into Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def prepare_splits(hparams: dict[str, Any]) -> dict[str, Path]:
    """Prepare the corpus on the main process; returns the manifest of every split."""
    data_folder = hparams["data_folder"]
    arguments = (
        hparams["corpus"],
        resolve_source(data_folder) if data_folder else None,
        Path(hparams["prepared_folder"]),
        hparams["corpus_options"] or {},
    )
    splits = prepare_corpus(*arguments) if sb.utils.distributed.if_main_process() else None
    splits = sb.utils.distributed.ddp_broadcast(splits)
    for key in ("train_split", "valid_split", "test_splits"):
        for name in [hparams[key]] if isinstance(hparams[key], str) else hparams[key] or []:
            if name not in splits:
                raise UserError(f"{key}: the corpus has no split '{name}'; it has {', '.join(splits)}")
    return splits


def read_benchmarks(hparams: dict[str, Any], splits: dict[str, Path], output_folder: Path) -> list[Benchmark]:
    """Read and check the test data, and see that the language model can be read, before hours of training."""
    names = hparams["test_splits"]
    if not names:
        raise UserError("test_splits: name at least one split to measure on")
    if hparams["lm_path"]:
        read_language_model(hparams, ["", " ", "a"])
    return [
        Benchmark.from_manifest(
            splits[name],
            corpus=hparams["corpus_name"] or hparams["corpus"],
            split=name,
            normaliser=hparams["test_normaliser"],
            skip_bad=hparams["skip_bad"],
            skipped_file=output_folder / f"skipped_{name}.jsonl",
        )
        for name in ([names] if isinstance(names, str) else names)
    ]


def read_language_model(hparams: dict[str, Any], vocabulary: list[str]) -> LanguageModel:
    """Load the language model that the YAML names."""
    return LanguageModel(
        resolve_source(hparams["lm_path"]),
        vocabulary,
        alpha=hparams["lm_alpha"],
        beta=hparams["lm_beta"],
        beam_size=hparams["lm_beam_size"],
        case=hparams["lm_case"],
    )


def read_training_rows(hparams: dict[str, Any], manifest: Path, split: str, output_folder: Path) -> list[Row]:
    """Read and check training or validation data; too long utterances are left out and counted."""
    skip_bad, limit = hparams["skip_bad"], hparams["max_duration_s"] or float("inf")
    rows = read_manifest(manifest, None, True, skip_bad, output_folder / f"skipped_{split}.jsonl")
    normaliser = get_normaliser(hparams["train_normaliser"])
    rows = normalise_texts(rows, normaliser, skip_bad, output_folder / f"skipped_{split}_empty.jsonl")
    short = [row for row in rows if row["duration"] <= limit]
    if not short:
        raise UserError(f"max_duration_s: no utterance of '{split}' is as short as {limit} s")
    if len(short) < len(rows):
        names = listing([row["id"] for row in rows if row["duration"] > limit], most=5)
        print(
            f"{len(rows) - len(short)} utterances of '{split}' are longer than max_duration_s = {limit} and left out:\n{names}"
        )
    return short


def train_and_save(
    brain_class: type[sb.Brain],
    hparams: dict[str, Any],
    run_opts: RunOptions,
    splits: dict[str, Path],
    output_folder: Path,
) -> None:
    """Build the model, train it, and save the best checkpoint as a model folder.

    A training that was started goes on from its last checkpoint.
    """
    rows = {
        key: read_training_rows(hparams, splits[hparams[key]], hparams[key], output_folder)
        for key in ("train_split", "valid_split")
    }
    model = brain_class.build(hparams, [row["text"] for row in rows["train_split"]])
    train_rows = brain_class.check_lengths(
        model,
        rows["train_split"],
        hparams["augment"].fastest,
        hparams["skip_bad"],
        output_folder / "skipped_too_short.jsonl",
    )
    brain = make_brain(brain_class, hparams, run_opts, model, output_folder)
    train_set = make_dataset(train_rows, model.labels, hparams["sorting"])
    valid_set = make_dataset(rows["valid_split"], model.labels, "ascending")
    sorting, workers = hparams["sorting"], hparams["num_workers"]
    options = loader_options(
        train_set, sorting, hparams["batch_size"], hparams["max_batch_length_s"], workers, hparams["seed"]
    )
    brain.train_sampler = options.get("batch_sampler")  # told the epoch, it draws other batches each time
    brain.fit(
        hparams["epoch_counter"],
        train_set,
        valid_set,
        train_loader_kwargs=options,
        valid_loader_kwargs=loader_options(valid_set, "ascending", hparams["test_batch_size"], None, workers, 0),
    )
    brain.checkpointer.recover_if_possible(min_key="WER")
    if sb.utils.distributed.if_main_process():
        about = {
            "recipe": hparams["recipe"],
            "technique": brain_class.technique_of(model, hparams["technique"]),
            "variant": str(hparams["variant"]),
            "details": brain_class.details_of(model),
        }
        brain.model.save(output_folder / "model", about)


def make_brain(
    brain_class: type[sb.Brain],
    hparams: dict[str, Any],
    run_opts: RunOptions,
    model: torch.nn.Module,
    output_folder: Path,
) -> sb.Brain:
    """Put the training loop together: checkpoints, loggers, run options."""
    recoverables = {
        "model": model,
        "counter": hparams["epoch_counter"],
        "encoder_scheduler": hparams["encoder_scheduler"],
        "head_scheduler": hparams["head_scheduler"],
    }
    loggers = [sb.utils.train_logger.FileTrainLogger(output_folder / "train_log.txt")]
    if hparams["tensorboard"]:
        try:
            loggers.append(sb.utils.train_logger.TensorboardLogger(output_folder / "tensorboard"))
        except ImportError:
            raise UserError("tensorboard: it is not installed; pip install 'efficient_asr[dev]'") from None
    try:
        return brain_class(
            {"model": model},
            hparams=hparams | {"train_loggers": loggers},
            run_opts=run_opts,
            checkpointer=Checkpointer(output_folder / "save", recoverables=recoverables),
        )
    except ValueError as error:  # run options that do not go together, such as fp16 on a CPU
        raise UserError(str(error)) from None


def measure(
    hparams: dict[str, Any],
    plain: dict[str, Any],
    benchmarks: list[Benchmark],
    model_folder: Path,
    brain_class: type[sb.Brain],
) -> list[Result]:
    """Measure the saved model on every test split: WER, MACs, and runtime on each device without and with a LM."""
    if hparams["threads"]:
        torch.set_num_threads(hparams["threads"])
    transcriber = load_transcriber(str(model_folder))
    lm = read_language_model(hparams, transcriber.model.labels.vocabulary) if hparams["lm_path"] else None
    results = []
    for benchmark in benchmarks:
        several = len(benchmarks) > 1
        result = evaluate(
            transcriber,
            benchmark,
            lm_transcriber=CTCTranscriber(transcriber.model, lm) if lm else None,
            batch_size=hparams["test_batch_size"],
            measure_macs=hparams["measure_macs"],
            repeats=hparams["runtime_repeats"] if hparams["measure_runtime"] else 0,
            experiment=f"{hparams['experiment']}-{benchmark.split}" if several else hparams["experiment"],
            recipe=hparams["recipe"],
            technique=brain_class.technique_of(transcriber.model, hparams["technique"]),
            variant=str(hparams["variant"]),
            hparams=plain,
            details=brain_class.details_of(transcriber.model),
            seed=hparams["seed"],
            lm=lm.config if lm else None,
            time_lm=hparams["time_lm"],
        )
        result.save(Path(hparams["results_folder"]))
        results.append(result)
    return results


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    sb.utils.seed.seed_everything(seed)
