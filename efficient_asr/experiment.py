"""run(): from a command line and a YAML file to a trained model and its Result.

The same for every recipe: read the YAML, prepare and check all data, fit, save the model folder, evaluate it on every test
split. A recipe only says which Brain.

    python recipes/<exp>/train.py hparams/<exp>.yaml [--key value ...]
    torchrun --nproc_per_node=2 recipes/<exp>/train.py hparams/<exp>.yaml
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any, TypeVar

import ruamel.yaml
import speechbrain as sb
import torch
from speechbrain.utils.run_opts import RunOptions
from torch.distributed.elastic.multiprocessing.errors import record

from efficient_asr import distributed
from efficient_asr.brains import RecipeBrain
from efficient_asr.checkpoints import Checkpointer
from efficient_asr.command_line import parse_command_line
from efficient_asr.data import BatchOrder
from efficient_asr.errors import UserError, check_writable, exit_code
from efficient_asr.evaluation.evaluator import Benchmark, evaluate, score
from efficient_asr.evaluation.language_model import WHY_NOT, kenlm_is_here
from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.transcriber import MANIFEST, CTCTranscriber, fingerprint
from efficient_asr.experiment_data import (
    digest_of,
    language_groups,
    prepare_splits,
    read_benchmarks,
    read_language_model,
    read_training_rows,
)
from efficient_asr.languages import normalise_or_keep
from efficient_asr.locks import FolderLock
from efficient_asr.loop import Loop
from efficient_asr.models import resolve_source
from efficient_asr.seeding import seed_everything  # noqa: F401  YAML files name it here
from efficient_asr.settings import load_hparams, training_settings

Anything = TypeVar("Anything")


def run(brain_class: type[RecipeBrain], argv: list[str] | None = None) -> int:
    """Run one experiment; returns the exit code (0 done, 2 a user's mistake, 130 interrupted)."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # schedulers stop a job with SIGTERM
        signal.signal(signal.SIGTERM, interrupt)

    def work() -> int:
        try:
            return exit_code(lambda: _run(brain_class, sys.argv[1:] if argv is None else argv))
        except RuntimeError as error:
            if distributed.processes() == 1 or "by peer" not in str(error):
                raise
            who = f"[process {distributed.rank()}]"
            print(f"{who} ends because another process ended; see what that one says", file=sys.stderr)
            return 1

    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return work()
    code = record(work)()  # record(): torchrun can show what fault of ours ended this process
    if code:  # leave at once: taking down a process group that has lost a member aborts with a trace of its own
        sys.stderr.flush()
        os._exit(code)
    torch.distributed.destroy_process_group()
    return code


def _run(brain_class: type[RecipeBrain], argv: list[str]) -> None:
    path, run_opts, overrides = parse_command_line(argv)
    try:
        sb.utils.distributed.ddp_init_group(run_opts)
    except ValueError as error:
        raise UserError(f"torchrun: {' '.join(str(error).split())}") from None
    if not distributed.if_main_process():
        sys.stdout = open(os.devnull, "w")
    hparams, plain = load_hparams(path, overrides, run_opts)
    check_recipe(path, hparams["recipe"])
    normalise_languages(hparams)
    if run_opts.debug:
        folder = f"{hparams['output_folder']}-debug"
        hparams |= {"output_folder": folder, "results_folder": f"{folder}/results"}
        print(
            f"--debug: {run_opts.debug_batches} batches an epoch, on which no number says anything; all goes to {folder}"
        )
    output_folder = Path(hparams["output_folder"])
    model_folder = output_folder / "model"
    test_only = run_opts.test_only or hparams["test_only"]
    model = str(model_folder)
    if test_only and not (model_folder / "config.json").is_file():
        untrained = brain_class.untrained(hparams)
        if not untrained:
            raise UserError(
                f"test_only: there is no trained model at {model_folder}; run the same command without it first"
            )
        model = resolve_source(untrained)
        print(f"nothing was trained at {model_folder}: measuring {model} as it is")
    if hparams["lm_path"] and not brain_class.takes_language_model:
        raise UserError("lm_path: language models go with CTC models; leave it at null")
    if hparams["lm_path"] and not kenlm_is_here():
        if "lm_path" in overrides:
            raise UserError(WHY_NOT)
        hparams["lm_path"], hparams["lm_note"] = None, "kenlm is not installed: not decoded with a language model"
        print(f"{WHY_NOT}; going on without it, its columns stay empty")
    check_writable(Path(hparams["results_folder"]), "results_folder")
    check_writable(output_folder if test_only else output_folder / "save", "output_folder")
    lock = FolderLock(output_folder) if distributed.if_main_process() else None  # held to the end of this function
    save_environment(output_folder, path, plain)
    splits = prepare_splits(hparams)
    benchmarks = read_benchmarks(hparams, splits, output_folder)
    if run_opts.debug:
        for benchmark in benchmarks:
            benchmark.rows = benchmark.rows[: run_opts.debug_batches * hparams["test_batch_size"]]
    if not test_only:
        settings = training_settings(path, overrides, run_opts)
        train_and_save(brain_class, hparams, run_opts, splits, benchmarks, output_folder, settings)
    train_only = hparams["train_only"] and not test_only
    results = [] if train_only else measure(hparams, plain, benchmarks, model, output_folder, brain_class)
    print(f"model: {model}")
    if distributed.if_main_process() and not test_only and not run_opts.debug:
        tell_of_checkpoints(output_folder / "save", hparams.get("keep_checkpoints", True))
    for result in results:
        print(f"{result.summary()}\nresult: {result.path}")
    if lock is not None:
        lock.release()


def normalise_languages(hparams: dict[str, Any]) -> None:
    """Turn the languages that a YAML file names into codes."""
    if hparams.get("language") != MANIFEST:
        hparams |= {"language": normalise_or_keep(hparams["language"])} if "language" in hparams else {}
    names = hparams.get("languages")
    if isinstance(names, (list, str)) and names:
        names = [names] if isinstance(names, str) else names
        hparams["languages"] = [normalise_or_keep(name) if isinstance(name, str) else name for name in names]


def tell_of_checkpoints(folder: Path, keep: bool) -> None:
    """Say what the checkpoints of a finished training are good for and how large they are, or remove them."""
    if not folder.is_dir():
        return
    size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if keep:
        print(
            f"checkpoints: {folder} ({size_mb:.0f} MB), from which the same command goes on with a larger --number_of_epochs; "
            "--keep_checkpoints False removes them"
        )
    else:
        shutil.rmtree(folder)
        print(f"checkpoints removed: {size_mb:.0f} MB in {folder}")


def check_recipe(path: Path, recipe: str) -> None:
    """Refuse a YAML file of another recipe: it would train something else than it says.

    Raises
    ------
    UserError
        Naming the recipe that the file belongs to.
    """
    script = Path(sys.argv[0]).resolve()
    if script.name == "train.py" and script.parent.parent.name == "recipes" and script.parent.name != recipe:
        raise UserError(
            f"{path} belongs to recipes/{recipe}/train.py, not to recipes/{script.parent.name}; for a recipe of your own say "
            f"--recipe {script.parent.name}"
        )


def save_environment(output_folder: Path, path: Path, plain: dict[str, Any]) -> None:
    """Write the resolved settings beside the output, and send the log to a file."""
    if not distributed.if_main_process():
        return
    with open(output_folder / "hparams.yaml", "w", encoding="utf-8") as file:
        file.write(f"# the resolved settings of {path}\n")
        ruamel.yaml.YAML(typ="safe").dump({key: _plain(value) for key, value in plain.items()}, file)
    handler = logging.FileHandler(output_folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logging.getLogger("speechbrain").addHandler(handler)


def _plain(value: Any) -> Any:
    """Turn ruamel's lists and mappings into Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def train_and_save(
    brain_class: type[RecipeBrain],
    hparams: dict[str, Any],
    run_opts: RunOptions,
    splits: dict[str, Path],
    benchmarks: list[Benchmark],
    output_folder: Path,
    settings: dict[str, str],
) -> None:
    """Build the model, train it, and save the best checkpoint as a model folder.

    A training that was started goes on from its last checkpoint.
    """
    rows = {
        key: read_training_rows(hparams, splits[hparams[key]], hparams[key], output_folder)
        for key in ("train_split", "valid_split")
    }
    model = brain_class.build(hparams, rows["train_split"])
    if hparams["lm_path"]:
        read_language_model(hparams, model.labels.vocabulary)
    for benchmark in benchmarks:
        brain_class.check_benchmark(model, benchmark, hparams)
    rows["train_split"] = brain_class.check_rows(
        model, rows["train_split"], hparams, output_folder / "skipped_training.jsonl"
    )
    rows["valid_split"] = brain_class.check_valid_rows(
        model, rows["valid_split"], hparams, output_folder / "skipped_validation.jsonl"
    )
    language = getattr(model, "default_language", None)
    settings |= {
        "processes": str(distributed.processes()),
        "training utterances": digest_of(rows["train_split"], language),
        "validation utterances": digest_of(rows["valid_split"], language),
    } | {f"{key} of the validation": str(hparams[key]) for key in brain_class.validates_by}
    checkpointer = Checkpointer(output_folder / "save", model, settings)
    brain = make_brain(brain_class, hparams, run_opts, model, checkpointer)
    shares = {"rank": distributed.rank(), "processes": distributed.processes()}
    orders = {
        "train_split": BatchOrder(
            rows["train_split"].durations, hparams["sorting"], hparams["batch_size"], hparams["max_batch_length_s"],
            hparams["seed"], **shares, groups=language_groups(rows["train_split"]) if hparams["monolingual_batches"] else None,
        ),
        "valid_split": BatchOrder(
            rows["valid_split"].durations, "ascending", hparams["test_batch_size"], repeat=False, **shares
        ),
    }  # fmt: skip
    brain.train(*(brain_class.loader(model, rows[key], hparams, orders[key], key) for key in orders))
    best = checkpointer.best()
    if distributed.if_main_process():
        checkpointer.load_model(best)
        brain_class.finish(model, hparams, rows["valid_split"])
        about = {
            "recipe": hparams["recipe"],
            "technique": model.technique,
            "variant": str(hparams["variant"] or model.label),
            "details": brain_class.details_of(model),
        }
        brain_class.save(model, hparams, output_folder / "model", about)
    distributed.ddp_barrier()


def make_brain(
    brain_class: type[RecipeBrain],
    hparams: dict[str, Any],
    run_opts: RunOptions,
    model: torch.nn.Module,
    checkpointer: Checkpointer,
) -> Loop:
    """Put the training loop together: checkpoints, loggers, run options."""
    output_folder = Path(hparams["output_folder"])
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
            checkpointer=checkpointer,
        )
    except ValueError as error:  # run options that do not go together, such as fp16 on a CPU
        raise UserError(str(error)) from None


def measure(
    hparams: dict[str, Any],
    plain: dict[str, Any],
    benchmarks: list[Benchmark],
    model: str,
    output_folder: Path,
    brain_class: type[RecipeBrain],
) -> list[Result]:
    """Measure the saved model on every test split: WER, MACs, and runtime on each device without and with a LM.

    All processes score their share of the utterances; then the main one, alone on a quiet machine, takes the times.
    """
    if hparams["threads"]:
        torch.set_num_threads(hparams["threads"])
    transcriber = brain_class.load(model, hparams)
    brain_class.configure(transcriber.model, hparams)
    lm = read_language_model(hparams, transcriber.model.labels.vocabulary) if hparams["lm_path"] else None
    lm_transcriber = CTCTranscriber(transcriber.model, lm) if lm else None
    decoding = [getattr(transcriber, name, None) for name in ("language", "takes_languages", "options", "method")]
    key = f"{fingerprint(model)} {decoding} {transcriber.model.settings} {lm.config if lm else None}"
    scored = [
        score(
            transcriber, benchmark, lm_transcriber, hparams["measure_macs"],
            output_folder / "scores" / benchmark.split, key,
        )
        for benchmark in benchmarks
    ]  # fmt: skip
    results = []
    for benchmark, records in zip(benchmarks, scored, strict=True) if distributed.if_main_process() else ():
        several = len(benchmarks) > 1
        result = evaluate(
            transcriber,
            benchmark,
            lm_transcriber=lm_transcriber,
            batch_size=hparams["test_batch_size"],
            measure_macs=hparams["measure_macs"],
            repeats=hparams["runtime_repeats"] if hparams["measure_runtime"] else 0,
            experiment=f"{hparams['experiment']}-{benchmark.split}" if several else hparams["experiment"],
            recipe=hparams["recipe"],
            technique=transcriber.model.technique,
            variant=str(hparams["variant"] or transcriber.model.label),
            hparams=plain,
            details=brain_class.details_of(transcriber.model, benchmark, records)
            | ({"lm_note": hparams["lm_note"]} if "lm_note" in hparams else {}),
            seed=hparams["seed"],
            lm=lm.config if lm else None,
            time_lm=hparams["time_lm"],
            records=records,
        )
        result.save(Path(hparams["results_folder"]))
        results.append(result)
        records.discard_parts()
    return results
