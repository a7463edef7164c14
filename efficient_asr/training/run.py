"""run(): from a command line and a YAML file to a trained model and its Result.

The procedure is the same for every recipe: read the YAML file, prepare and check all data, fit, save the model folder, and
evaluate it on every test split. A recipe only chooses the Brain.

    python recipes/<exp>/train.py hparams/<exp>.yaml [--key value ...]
    torchrun --nproc_per_node=2 recipes/<exp>/train.py hparams/<exp>.yaml
    python recipes/<exp>/train.py hparams/<exp>.yaml --estimate        # hours and memory
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.run_opts import RunOptions
from torch.distributed.elastic.multiprocessing.errors import record

from efficient_asr.data import BatchOrder, Rows
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.model_card import write_card
from efficient_asr.evaluation.runtime import limit_convolution_cache
from efficient_asr.inference.language_model import WHY_NOT, kenlm_is_here
from efficient_asr.inference.transcriber import MANIFEST
from efficient_asr.models.hub import CARD_MARK, model_source
from efficient_asr.settings.command_line import Overrides, parse_command_line
from efficient_asr.settings.help import recipe_help
from efficient_asr.settings.yaml import complete_yaml, load_hparams, overridden, training_settings
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.training import estimate
from efficient_asr.training.brain import RecipeBrain
from efficient_asr.training.checkpoints import Checkpointer, changed_settings, check_settings
from efficient_asr.training.data import (
    digest_of,
    language_groups,
    prepare_splits,
    read_benchmarks,
    read_language_model,
)
from efficient_asr.training.loop import Loop
from efficient_asr.training.measure import measure
from efficient_asr.utils import distributed
from efficient_asr.utils.devices import choose_device, clock, devices_to_time
from efficient_asr.utils.errors import UserError, check_writable, exit_code, listing
from efficient_asr.utils.files import atomic_write_text, folder_bytes
from efficient_asr.utils.locks import FolderLock
from efficient_asr.utils.technique import techniques

SETTINGS_FILE = "hyperparams.yaml"
# Settings of trainings that choose or decode the test sets, too, and those without effect there.
USED_IN_TESTS = (
    "corpus corpus_options folder_language ids_file max_tokens_per_s precision find_unused_parameters labels_folder "
    "number_of_epochs states_folder small_name large_name"
).split()


@dataclass
class Run:
    """The settings of one command.

    Attributes
    ----------
    path : Path
        The YAML file.
    overrides : Overrides
        Values of YAML keys given on the command line.
    run_opts : RunOptions
        SpeechBrain's options.
    hparams : dict
        All keys with their values or objects.
    plain : dict
        All keys with plain values, to be stored in the Result.
    """

    path: Path
    overrides: Overrides
    run_opts: RunOptions
    hparams: dict[str, Any]
    plain: dict[str, Any]

    @property
    def output_folder(self) -> Path:
        """Folder for all output."""
        return Path(self.hparams["output_folder"])

    @property
    def test_only(self) -> bool:
        """Whether to evaluate without training."""
        given = "test_only" in self.run_opts.overridden_args
        return bool(self.run_opts.test_only if given else self.hparams["test_only"])


def run(brain_class: type[RecipeBrain], argv: list[str] | None = None, recipe: str | None = None) -> int:
    """Run one experiment.

    Arguments
    ---------
    brain_class : type
        Brain that defines the model and its training.
    argv : list of str, optional
        Command-line arguments without the script name; by default those of the process.
    recipe : str, optional
        Name of the recipe; YAML files of other recipes are rejected. None accepts any.

    Returns
    -------
    int
        Exit code: 0 done, 2 user error, 130 interrupted.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # schedulers stop a job with SIGTERM
        signal.signal(signal.SIGTERM, interrupt)
    arguments = sys.argv[1:] if argv is None else argv

    def work() -> int:
        try:
            return exit_code(lambda: _run(brain_class, arguments, recipe))
        except RuntimeError as error:
            if distributed.world_size() == 1 or "by peer" not in str(error):
                raise
            who = f"[process {distributed.rank()}]"
            print(f"{who} exits because another process exited; see its message", file=sys.stderr)
            return 1

    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return work()
    code = record(work)()  # record(): lets torchrun show the exception that ended this process
    if code:  # exit immediately: destroying a process group that has lost a member aborts with its own traceback
        sys.stderr.flush()
        os._exit(code)
    torch.distributed.destroy_process_group()
    return code


def _run(brain_class: type[RecipeBrain], argv: list[str], recipe: str | None) -> None:
    if {"--help", "-h"} & {*argv}:
        path = Path(argv[0]) if argv[0].endswith((".yaml", ".yml")) else None
        print(recipe_help(path, recipe, brain_class.__doc__ or ""))
        return
    printing = "--print_yaml" in argv
    argv, estimating, estimate_file = _take_estimate([argument for argument in argv if argument != "--print_yaml"])
    path, run_opts, overrides = parse_command_line(argv)
    if printing:
        print(complete_yaml(path, overrides, run_opts), end="")
        return
    try:
        sb.utils.distributed.ddp_init_group(run_opts)
    except ValueError as error:
        raise UserError(f"torchrun: {' '.join(str(error).split())}") from None
    only_main_prints = (
        contextlib.nullcontext() if distributed.if_main_process() else contextlib.redirect_stdout(io.StringIO())
    )
    with only_main_prints:
        this = Run(path, overrides, run_opts, *load_hparams(path, overrides, run_opts))
        _check_recipe(this, recipe, brain_class)
        _normalise_languages(this.hparams)
        if estimating:
            _estimate(this, brain_class, estimate_file)
            return
        if run_opts.debug:
            _redirect_debug(this)
        _execute(this, brain_class)


def _take_estimate(argv: list[str]) -> tuple[list[str], bool, Path | None]:
    """Remove `--estimate [FILE.json]` from a command line; return the rest, whether it was there, and the file.

    Raises
    ------
    UserError
        If it has another value.
    """
    place = next((i for i, word in enumerate(argv) if word.partition("=")[0] == "--estimate"), None)
    if place is None:
        return argv, False, None
    _, given, value = argv[place].partition("=")
    rest = argv[place + 1 :]
    if not given and rest and not rest[0].startswith("--"):
        value = rest.pop(0)
    if value and not value.endswith(".json"):
        raise UserError(f"--estimate: '{value}' does not end in .json; give the file to write, or no value")
    return argv[:place] + rest, True, Path(value) if value else None


def _estimate(this: Run, brain_class: type[RecipeBrain], file: Path | None) -> None:
    """Time a few batches of training, validation and testing; see `efficient_asr.training.estimate`.

    Prepared manifests stay, as they serve the run itself; everything else that is written, except `file`, is removed.

    Raises
    ------
    UserError
        If there is no training to estimate, if there are several processes, or if the longest batch does not fit.
    """
    if this.test_only or this.run_opts.debug:
        raise UserError("--estimate: leave out --test_only and --debug; trainings are estimated")
    if distributed.world_size() > 1:
        raise UserError("--estimate: run it in one process; several processes share the batches")
    if file is not None:
        check_writable(file.absolute().parent, "--estimate")
    _check_language_model(this, brain_class)
    with estimate.Place(this.output_folder) as folder:
        try:
            found = _sample_of_a_run(this, brain_class, folder)
        except torch.OutOfMemoryError:
            raise UserError(
                "--estimate: the longest batch does not fit into the memory of the GPU; reduce batch_size or max_batch_length_s, "
                "raise grad_accumulation_factor, or pass --precision bf16"
            ) from None
    estimate.report(found, file)


def _sample_of_a_run(this: Run, brain_class: type[RecipeBrain], folder: Path) -> dict[str, Any]:
    """Train, validate and test on a few batches in a temporary folder; return the estimate."""
    device = choose_device(this.run_opts.device)
    hparams = this.hparams
    hparams |= {"output_folder": str(folder), "run_device": device}
    hparams |= {key: str(folder / key) for key in brain_class.filled_before_training if hparams.get(key)}
    splits = prepare_splits(hparams)
    benchmarks = read_benchmarks(hparams, splits, folder)
    rows, model = _rows_and_model(hparams, brain_class, splits, benchmarks, folder)
    orders = _batch_orders(hparams, rows)
    few, names = {}, {}
    for key, order in orders.items():
        few[key], names[key] = estimate.sampled(rows[key], order)
    share = float(few["train_split"].durations.sum() / rows["train_split"].durations.sum())
    started = clock()
    few["train_split"] = brain_class.check_rows(model, few["train_split"], hparams, folder / "skipped.jsonl")
    checks_s = clock() - started
    few["valid_split"] = brain_class.check_valid_rows(model, few["valid_split"], hparams, folder / "skipped.jsonl")
    checkpointer = Checkpointer(folder / "save", model, {})
    once = estimate.for_one_epoch(hparams, folder)
    brain = make_brain(estimate.clocked(brain_class), once, this.run_opts, model, checkpointer)
    alone = hparams | {"num_workers": 0}  # the time to load a batch is seen only without workers
    brain.train(*(brain_class.loader(model, few[k], alone, estimate.order_of(few[k], names[k]), k) for k in orders))
    found = estimate.scaled(brain, hparams, {key: len(orders[key]) for key in orders}, checks_s, share)
    found |= estimate.memory_gb(device) | {"checkpoint_gb": estimate.checkpoint_gb(folder / "save"), "testing_h": 0.0}
    if not hparams["train_only"]:
        brain_class.save(model, hparams, folder / "model", _about(model, hparams, brain_class))
        found["testing_h"] = estimate.testing_h(brain_class, hparams, folder / "model", benchmarks, device)
    hours = sum(value for key, value in found.items() if key.endswith("_h"))
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    about = {"experiment": hparams["experiment"], "device": name, "precision": this.plain["precision"]}
    return about | found | {"total_h": hours}


def _execute(this: Run, brain_class: type[RecipeBrain]) -> None:
    """Prepare, train, and evaluate."""
    hparams, output_folder = this.hparams, this.output_folder
    devices_to_time(hparams["runtime_devices"], "cpu")  # an unavailable device is reported before the training
    model = _model_to_measure(this, brain_class)
    if this.test_only:
        _check_test_only(this)
    _check_language_model(this, brain_class)
    check_writable(Path(hparams["results_folder"]), "results_folder")
    check_writable(output_folder if this.test_only else output_folder / "save", "output_folder")
    lock = FolderLock(output_folder) if distributed.if_main_process() else contextlib.nullcontext()
    with lock, _log_file(output_folder):
        if this.test_only and not (output_folder / SETTINGS_FILE).is_file():
            _write_settings(this)
        splits = prepare_splits(hparams)
        benchmarks = read_benchmarks(hparams, splits, output_folder)
        limit_convolution_cache(max(len(benchmark.rows) for benchmark in benchmarks))
        if this.run_opts.debug:
            for benchmark in benchmarks:
                benchmark.rows = benchmark.rows[: this.run_opts.debug_batches * hparams["test_batch_size"]]
        if not this.test_only:
            _train_and_save(this, brain_class, splits, benchmarks)
        train_only = hparams["train_only"] and not this.test_only
        results, as_saved = [], not (Path(model) / "README.md").is_file()  # nothing measured: only if there is no card
        if not train_only:
            device = this.run_opts.device
            results, as_saved = measure(hparams, this.plain, benchmarks, model, output_folder, brain_class, device)
    own = Path(model) == output_folder / "model"
    if distributed.if_main_process() and own and not this.run_opts.debug:
        if as_saved or not (Path(model) / "README.md").is_file():
            write_card(Path(model), results if as_saved else [])
    print(f"model: {model}")
    if distributed.if_main_process() and not this.test_only and not this.run_opts.debug:
        _report_checkpoints(output_folder / "save", hparams.get("keep_checkpoints", True))
    for result in results:
        print(f"{result.summary()}\nresult: {result.path}")


def _check_recipe(this: Run, recipe: str | None, brain_class: type[RecipeBrain]) -> None:
    """Reject a YAML file of another recipe, and keys of techniques that this Brain does not use.

    Raises
    ------
    UserError
        Naming the recipe that the file belongs to, or the key.
    """
    named = this.hparams["recipe"]
    if recipe is not None and named != recipe:
        raise UserError(
            f"{this.path} belongs to recipes/{named}/train.py, not to recipes/{recipe}; to use it with your own recipe, pass "
            f"--recipe {recipe}"
        )
    for technique in techniques():
        for key in technique.keys:
            unused = key.brain and this.hparams.get(key.name) is not None
            if unused and not issubclass(brain_class, technique.load(key.brain)):
                raise UserError(f"{key.name}: not used by the recipe {named}; leave it at null")


def _normalise_languages(hparams: dict[str, Any]) -> None:
    """Convert the language names in the YAML file to codes."""
    if hparams.get("language") != MANIFEST:
        hparams |= {"language": normalise_or_keep(hparams["language"])} if "language" in hparams else {}
    names = hparams.get("languages")
    if isinstance(names, (list, str)) and names:
        names = [names] if isinstance(names, str) else names
        hparams["languages"] = [normalise_or_keep(name) if isinstance(name, str) else name for name in names]


def _redirect_debug(this: Run) -> None:
    """Redirect all output of a --debug run to a separate folder."""
    folder = f"{this.hparams['output_folder']}-debug"
    this.hparams |= {"output_folder": folder, "results_folder": f"{folder}/results"}
    batches = this.run_opts.debug_batches
    print(f"--debug: {batches} batches per epoch; the results are meaningless. All output goes to {folder}")


def _model_to_measure(this: Run, brain_class: type[RecipeBrain]) -> str:
    """Return the model folder of the run, or the baseline for `test_only` if no model was trained.

    Raises
    ------
    UserError
        If neither exists.
    """
    folder = this.output_folder / "model"
    if not this.test_only or (folder / "config.json").is_file():
        return str(folder)
    source = brain_class.baseline_source(this.hparams)
    if not source:
        raise UserError(f"test_only: there is no trained model at {folder}; run the command without it first")
    source = model_source(source)
    print(f"no trained model at {folder}: measuring {source} unchanged")
    return source


def _check_language_model(this: Run, brain_class: type[RecipeBrain]) -> None:
    """Reject a language model that the recipe cannot use; if kenlm is missing, continue without one unless it was requested.

    Raises
    ------
    UserError
        If the recipe cannot use it, or if kenlm is missing and `lm_path` was given on the command line.
    """
    hparams = this.hparams
    if hparams["lm_path"] and not brain_class.takes_language_model:
        raise UserError("lm_path: language models require a CTC model; leave it at null")
    if hparams["lm_path"] and not kenlm_is_here():
        if "lm_path" in this.overrides:
            raise UserError(WHY_NOT)
        hparams["lm_path"], hparams["lm_note"] = None, "kenlm is not installed: not decoded with a language model"
        print(f"{WHY_NOT}; continuing without a language model, its columns stay empty")


def _report_checkpoints(folder: Path, keep: bool) -> None:
    """Report the use and the size of the checkpoints of a finished training, or remove them."""
    if not folder.is_dir():
        return
    size_mb = folder_bytes(folder) / 1e6
    if keep:
        print(
            f"checkpoints: {folder} ({size_mb:.0f} MB); rerun with a larger --number_of_epochs to continue from them; "
            "--keep_checkpoints False removes them"
        )
    else:
        shutil.rmtree(folder)
        print(f"checkpoints removed: {size_mb:.0f} MB in {folder}")


@contextlib.contextmanager
def _log_file(output_folder: Path) -> Iterator[None]:
    """Write SpeechBrain's log to `log.txt` on the main process."""
    if not distributed.if_main_process():
        yield
        return
    handler = logging.FileHandler(output_folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logger = logging.getLogger("speechbrain")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _write_settings(this: Run) -> None:
    """Write the merged YAML, which reproduces the run, beside its output."""
    if distributed.if_main_process():
        atomic_write_text(this.output_folder / SETTINGS_FILE, complete_yaml(this.path, this.overrides, this.run_opts))


def _train_and_save(
    this: Run, brain_class: type[RecipeBrain], splits: dict[str, Path], benchmarks: list[Benchmark]
) -> None:
    """Build the model, train it, and save the best checkpoint as a model folder.

    An interrupted training resumes from its last checkpoint.
    """
    hparams, output_folder = this.hparams, this.output_folder
    hparams["run_device"] = choose_device(this.run_opts.device)
    rows, model = _rows_and_model(hparams, brain_class, splits, benchmarks, output_folder)
    rows["train_split"] = brain_class.check_rows(
        model, rows["train_split"], hparams, output_folder / "skipped_training.jsonl"
    )
    rows["valid_split"] = brain_class.check_valid_rows(
        model, rows["valid_split"], hparams, output_folder / "skipped_validation.jsonl"
    )
    checkpointer = Checkpointer(output_folder / "save", model, _settings_of_training(this, brain_class, model, rows))
    newest = checkpointer.newest()
    if newest is not None:
        check_settings(newest, checkpointer.settings, hparams["allow_changed_settings"])
        done = newest.meta["position"][0]
        if done > hparams["number_of_epochs"]:
            raise UserError(
                f"number_of_epochs: it is {hparams['number_of_epochs']}, but {done} are done in {newest.path}; choose another "
                "--output_folder"
            )
    if newest is None and _is_finished(this):
        return
    _write_settings(this)
    brain = make_brain(brain_class, hparams, this.run_opts, model, checkpointer)
    orders = _batch_orders(hparams, rows)
    brain.train(*(brain_class.loader(model, rows[key], hparams, orders[key], key) for key in orders))
    best = checkpointer.best()
    if distributed.if_main_process():
        checkpointer.load_model(best)
        brain_class.calibrate(model, hparams, rows["valid_split"])
        trained = newest is None or checkpointer.list()[0].path != newest.path
        with _kept_card(output_folder / "model" / "README.md", trained):
            brain_class.save(model, hparams, output_folder / "model", _about(model, hparams, brain_class))
    distributed.ddp_barrier()


@contextlib.contextmanager
def _kept_card(path: Path, trained: bool) -> Iterator[None]:
    """Keep the card of a model folder that is replaced, unless it is ours and the model was trained further."""
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    yield
    if before is not None and not (trained and CARD_MARK in before):
        atomic_write_text(path, before)


def _is_finished(this: Run) -> bool:
    """Return whether a training has ended and its checkpoints were removed, so that only the measuring is left.

    Raises
    ------
    UserError
        If its settings have been changed since.
    """
    model, settings = this.output_folder / "model", this.output_folder / SETTINGS_FILE
    if this.hparams["keep_checkpoints"] or not ((model / "config.json").is_file() and settings.is_file()):
        return False
    changed = _changed_since_training(this)
    if changed:
        names = ", ".join(line.partition(":")[0] for line in changed)
        raise UserError(
            f"{names}: changed since the training in {this.output_folder}, whose checkpoints were removed "
            "(keep_checkpoints: False); choose another --output_folder, or delete this one to train again"
        )
    print(f"the training is finished, and its checkpoints were removed: {model}")
    return True


def _changed_since_training(this: Run) -> list[str]:
    """Return a line for every setting of the training that differs from the YAML file beside the trained model."""
    path = this.output_folder / SETTINGS_FILE
    before = training_settings(path, Overrides(), None)
    now = training_settings(this.path, this.overrides, this.run_opts)
    trees = overridden(path, Overrides()), overridden(this.path, this.overrides)
    targets = [key for key, value in trees[1].items() if key.startswith("calibrate_") and value is not None]
    for key in ("number_of_epochs", *targets):
        before[key], now[key] = (str(tree.get(key)) for tree in trees)
    return changed_settings(before, now)


def _check_test_only(this: Run) -> None:
    """Reject training settings that `test_only` would ignore but record with its result; record the epochs of the training.

    Raises
    ------
    UserError
        Naming every difference from the training, unless `allow_changed_settings` is set.
    """
    folder = this.output_folder
    trained_here = (folder / "model" / "config.json").is_file() and (folder / "train_log.txt").is_file()
    if not trained_here or not (folder / SETTINGS_FILE).is_file() or this.hparams["allow_changed_settings"]:
        return
    changed = [line for line in _changed_since_training(this) if line.partition(":")[0] not in USED_IN_TESTS]
    this.plain["number_of_epochs"] = overridden(folder / SETTINGS_FILE, Overrides())["number_of_epochs"]
    if changed:
        raise UserError(
            f"test_only: the model in {folder} was trained with other settings:\n{listing(changed)}\n"
            "They do not change a trained model: restore them, or pass --allow_changed_settings True. For a model with these "
            "settings, leave out test_only and choose another --output_folder."
        )


def _rows_and_model(
    hparams: dict[str, Any],
    brain_class: type[RecipeBrain],
    splits: dict[str, Path],
    benchmarks: list[Benchmark],
    folder: Path,
) -> tuple[dict[str, Rows], torch.nn.Module]:
    """Read the utterances of training and validation, build the model, and check that it can be evaluated as planned."""
    rows = {
        key: brain_class.read_rows(hparams, splits[hparams[key]], hparams[key], folder)
        for key in ("train_split", "valid_split")
    }
    model = brain_class.build(hparams, rows["train_split"])
    if hparams["lm_path"]:
        read_language_model(hparams, model.labels.vocabulary)
    for benchmark in benchmarks:
        brain_class.check_benchmark(model, benchmark, hparams)
    return rows, model


def _about(model: Any, hparams: dict[str, Any], brain_class: type[RecipeBrain]) -> dict[str, Any]:
    """Return what a model folder says about its training."""
    return {
        "recipe": hparams["recipe"],
        "technique": model.technique,
        "variant": str(hparams["variant"] or model.label),
        "details": brain_class.result_details(model, hparams),
    }


def _settings_of_training(
    this: Run, brain_class: type[RecipeBrain], model: torch.nn.Module, rows: dict[str, Rows]
) -> dict[str, str]:
    """Return all settings that the training depends on, as text by name; checkpoints with other settings are rejected."""
    language = brain_class.default_language(model)
    return training_settings(this.path, this.overrides, this.run_opts) | {
        "processes": str(distributed.world_size()),
        "training utterances": digest_of(rows["train_split"], language),
        "validation utterances": digest_of(rows["valid_split"], language),
        **{f"{key} of the validation": str(this.hparams[key]) for key in brain_class.validates_by},
        **brain_class.made_of(this.hparams, rows),
    }


def _batch_orders(hparams: dict[str, Any], rows: dict[str, Rows]) -> dict[str, BatchOrder]:
    """Return the batch orders of training and validation."""
    shares = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    groups = language_groups(rows["train_split"]) if hparams["monolingual_batches"] else None
    stored = bool(hparams.get("features_url"))
    shards = np.array([row["shard"] for row in rows["train_split"]]) if stored else None
    return {
        "train_split": BatchOrder(
            rows["train_split"].durations,
            hparams["sorting"],
            hparams["batch_size"],
            hparams["max_batch_length_s"],
            hparams["seed"],
            **shares,
            groups=groups,
            length_jitter=hparams["length_jitter"],
            epoch_batches=hparams["epoch_batches"],
            shards=shards,
        ),
        "valid_split": BatchOrder(
            rows["valid_split"].durations, "ascending", hparams["test_batch_size"], repeat=False, **shares
        ),
    }


def make_brain(
    brain_class: type[RecipeBrain],
    hparams: dict[str, Any],
    run_opts: RunOptions,
    model: torch.nn.Module,
    checkpointer: Checkpointer,
) -> Loop:
    """Build the Brain with its checkpointer, loggers and run options."""
    output_folder = Path(hparams["output_folder"])
    loggers = [sb.utils.train_logger.FileTrainLogger(output_folder / "train_log.txt")]
    if hparams["tensorboard"]:
        try:
            loggers.append(sb.utils.train_logger.TensorboardLogger(output_folder / "tensorboard"))
        except ImportError:
            raise UserError("tensorboard: the package is not installed; pip install 'efficient_asr[dev]'") from None
    try:
        return brain_class(
            {"model": model},
            hparams=hparams | {"train_loggers": loggers},
            run_opts=run_opts,
            checkpointer=checkpointer,
        )
    except ValueError as error:  # incompatible run options, such as fp16 on a CPU
        raise UserError(str(error)) from None
