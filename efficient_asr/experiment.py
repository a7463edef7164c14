"""run(): from a command line and a YAML file to a trained model and its Result.

The same for every recipe: read the YAML, prepare the corpus, fit, save the model folder, evaluate it on every test
split. A recipe only says which Brain.

    python recipes/<exp>/train.py hparams/<exp>.yaml [--key value ...]
    torchrun --nproc_per_node=2 recipes/<exp>/train.py hparams/<exp>.yaml

YAML files are HyperPyYAML and can execute code: run only those you trust. `base: !include:other.yaml` (or a list of
them) at the top takes over all keys of another file; the file's own keys win, and every key can be overridden on the
command line.
"""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.corpora import prepare_corpus
from efficient_asr.data import loader_options, make_dataset, normalise_texts, read_manifest
from efficient_asr.errors import UserError, did_you_mean, exit_code
from efficient_asr.evaluation.evaluator import Benchmark, evaluate
from efficient_asr.evaluation.result import Result
from efficient_asr.evaluation.transcriber import load_transcriber
from efficient_asr.models import resolve_source
from efficient_asr.text import get_normaliser

_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool}


# ---------------------------------------------------------------- YAML and command line


def merge_includes(path: Path) -> CommentedMap:
    """Read a YAML file without constructing anything, with the keys of its `base` files merged in.

    Raises
    ------
    UserError
        Where a file is missing or is not YAML.
    """
    yaml = ruamel.yaml.YAML()
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no YAML file at {path}") from None
    except (ruamel.yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path} holds no keys")
    bases = tree.pop("base", [])
    merged = CommentedMap()
    for base in bases if isinstance(bases, list) else [bases]:
        tag = base.tag.value if isinstance(base, TaggedScalar) else str(getattr(base, "tag", ""))
        if not tag or not tag.startswith("!include:"):
            raise UserError(f"{path}: base must be !include:<file> or a list of these")
        merged.update(merge_includes(Path(path).parent / tag.removeprefix("!include:")))
    merged.update(tree)
    return merged


def parse_command_line(argv: list[str]) -> tuple[Path, RunOptions, dict[str, Any]]:
    """Return the YAML file, SpeechBrain's run options, and overrides of YAML keys.

    Raises
    ------
    UserError
        Where there is no YAML file or an override is malformed.
    """
    if not argv or argv[0].startswith("-"):
        raise UserError("name a YAML file first: python recipes/<exp>/train.py hparams/<exp>.yaml [--key value ...]")
    argv = _split_test_only(argv)
    try:
        path, run_opts, overrides = RunOptions.from_command_line_args(argv)
    except (ValueError, IndexError) as error:
        raise UserError(f"command line: {error}") from None
    values = ruamel.yaml.YAML().load(overrides or "") or {}
    return Path(path), run_opts, dict(values)


def _split_test_only(argv: list[str]) -> list[str]:
    """Let `--test_only True` mean what SpeechBrain's bare `--test_only` means."""
    out, skip = [], False
    for i, arg in enumerate(argv):
        if skip:
            skip = False
            continue
        name, _, value = arg.partition("=")
        if name == "--test_only":
            following = argv[i + 1].lower() if i + 1 < len(argv) else ""
            skip = not value and following in ("true", "false")
            if (value.lower() or (following if skip else "true")) == "true":
                out.append(name)
        else:
            out.append(arg)
    return out


def load_hparams(path: Path, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Construct the objects of a YAML file.

    Returns
    -------
    hparams : dict
        Every key with its value or object.
    plain : dict
        The keys with plain values, for the record.

    Raises
    ------
    UserError
        For an unknown key (naming the closest), a value of another type, and what the classes themselves refuse.
    """
    tree = merge_includes(path)
    for key, value in overrides.items():
        if key not in tree:
            raise UserError(f"--{key}: {path} has no such key.{did_you_mean(key, tree)}")
        _check_type(key, tree[key], value)
        tree[key] = value
    for key, value in tree.items():
        if isinstance(value, TaggedScalar) and value.tag.value == "!PLACEHOLDER":
            raise UserError(f"{path}: '{key}' must be given, for example --{key} VALUE")
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(tree, stream)
    try:
        hparams = load_hyperpyyaml(stream.getvalue())
    except ruamel.yaml.YAMLError as error:
        raise UserError(f"{path}: {error}") from None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{path}: {cause}") from error
    plain = {k: v for k, v in hparams.items() if isinstance(v, (str, int, float, bool, list, dict, type(None)))}
    return hparams, {k: v for k, v in plain.items() if not (isinstance(v, list) and v and hasattr(v[0], "__dict__"))}


def _check_type(key: str, default: Any, value: Any) -> None:
    """Refuse a number where a word stood, and the like; tagged values and null accept anything."""
    for kind in (bool, (int, float), str):
        if isinstance(default, kind) and not isinstance(default, TaggedScalar):
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not fits and value is not None and not hasattr(value, "tag"):
                raise UserError(f"--{key}: {value!r} does not fit; its value is {default!r} now")
            return


# ---------------------------------------------------------------- run


def run(brain_class: type[sb.Brain], argv: list[str] | None = None) -> int:
    """Run one experiment; returns the exit code (0 done, 2 a user's mistake, 130 interrupted)."""
    return exit_code(lambda: _run(brain_class, sys.argv[1:] if argv is None else argv))


def _run(brain_class: type[sb.Brain], argv: list[str]) -> None:
    path, run_opts, overrides = parse_command_line(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams, plain = load_hparams(path, overrides)
    output_folder = Path(hparams["output_folder"])
    model_folder = output_folder / "model"
    test_only = run_opts.test_only or hparams["test_only"]
    if test_only and not (model_folder / "config.json").is_file():
        raise UserError(
            f"test_only: there is no trained model at {model_folder}; run the same command without it first"
        )
    save_environment(output_folder, path, plain)
    splits = prepare_splits(hparams)
    if not test_only:
        brain = fit(brain_class, hparams, run_opts, splits, output_folder)
        brain.checkpointer.recover_if_possible(min_key="WER")
        if sb.utils.distributed.if_main_process():
            brain.model.save(model_folder)
    if sb.utils.distributed.if_main_process():
        results = evaluate_splits(hparams, plain, splits, model_folder, brain_class)
        print_summary(results, model_folder)


def prepare_splits(hparams: dict[str, Any]) -> dict[str, Path]:
    """Prepare the corpus on the main process; returns the manifest of every split that the YAML names."""
    data_folder = hparams["data_folder"]
    arguments = (
        hparams["corpus"],
        resolve_source(data_folder) if data_folder else None,
        Path(hparams["prepared_folder"]),
        hparams["corpus_options"] or {},
    )
    sb.utils.distributed.run_on_main(prepare_corpus, arguments)
    splits = prepare_corpus(*arguments)  # by now it only says where the manifests are
    for key in ("train_split", "valid_split", "test_splits"):
        for name in [hparams[key]] if isinstance(hparams[key], str) else hparams[key]:
            if name not in splits:
                raise UserError(f"{key}: the corpus has no split '{name}'; it has {', '.join(splits)}")
    return splits


def save_environment(output_folder: Path, path: Path, plain: dict[str, Any]) -> None:
    """Write the resolved settings beside the output, and send the log to a file."""
    if not sb.utils.distributed.if_main_process():
        return
    try:
        output_folder.mkdir(parents=True, exist_ok=True)
        with open(output_folder / "hparams.yaml", "w", encoding="utf-8") as file:
            file.write(f"# the resolved settings of {path}\n")
            ruamel.yaml.YAML(typ="safe").dump(plain, file)
    except OSError as error:
        raise UserError(f"output_folder: cannot write to {output_folder} ({error.strerror})") from None
    handler = logging.FileHandler(output_folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logging.getLogger("speechbrain").addHandler(handler)


def fit(
    brain_class: type[sb.Brain],
    hparams: dict[str, Any],
    run_opts: RunOptions,
    splits: dict[str, Path],
    output_folder: Path,
) -> sb.Brain:
    """Read the data, build the model, train it; a started training goes on from its last checkpoint."""
    normaliser = get_normaliser(hparams["train_normaliser"])
    skip_bad = hparams["skip_bad"]
    rows = {}
    for key in ("train_split", "valid_split"):
        manifest = splits[hparams[key]]
        skipped = output_folder / f"skipped_{hparams[key]}.jsonl"
        rows[key] = normalise_texts(read_manifest(manifest, None, True, skip_bad, skipped), normaliser)
    train_rows = [r for r in rows["train_split"] if r["duration"] <= hparams["max_duration_s"]]
    if len(train_rows) < len(rows["train_split"]):
        left_out = len(rows["train_split"]) - len(train_rows)
        print(
            f"{left_out} training utterances are longer than max_duration_s = {hparams['max_duration_s']} and left out"
        )
    if not train_rows:
        raise UserError(f"max_duration_s: no training utterance is as short as {hparams['max_duration_s']} s")
    model = brain_class.build(hparams, [row["text"] for row in train_rows])
    train_rows = brain_class.check_lengths(
        model, train_rows, hparams["augment"].fastest, skip_bad, output_folder / "skipped_too_short.jsonl"
    )
    checkpointer = Checkpointer(
        output_folder / "save",
        recoverables={
            "model": model,
            "counter": hparams["epoch_counter"],
            "encoder_scheduler": hparams["encoder_scheduler"],
            "head_scheduler": hparams["head_scheduler"],
        },
    )
    loggers = [sb.utils.train_logger.FileTrainLogger(output_folder / "train_log.txt")]
    if hparams["tensorboard"]:
        loggers.append(sb.utils.train_logger.TensorboardLogger(output_folder / "tensorboard"))
    hparams = hparams | {"train_loggers": loggers}
    try:
        brain = brain_class({"model": model}, hparams=hparams, run_opts=run_opts, checkpointer=checkpointer)
    except ValueError as error:  # run options that do not go together, such as fp16 on a CPU
        raise UserError(str(error)) from None
    train_set = make_dataset(train_rows, model.labels, hparams["sorting"])
    valid_set = make_dataset(rows["valid_split"], model.labels, "ascending")
    workers = hparams["num_workers"]
    brain.fit(
        hparams["epoch_counter"],
        train_set,
        valid_set,
        train_loader_kwargs=loader_options(
            train_set,
            hparams["sorting"],
            hparams["batch_size"],
            hparams["max_batch_length_s"],
            workers,
            hparams["seed"],
        ),
        valid_loader_kwargs=loader_options(valid_set, "ascending", hparams["test_batch_size"], None, workers, 0),
    )
    return brain


def evaluate_splits(
    hparams: dict[str, Any],
    plain: dict[str, Any],
    splits: dict[str, Path],
    model_folder: Path,
    brain_class: type[sb.Brain],
) -> list[Result]:
    """Measure the saved model on every test split: WER, MACs, and runtime on each device without and with a LM."""
    transcriber = load_transcriber(str(model_folder))
    lm_transcriber = None
    if hparams["lm_path"]:
        lm = {key.removeprefix("lm_"): hparams[key] for key in ("lm_alpha", "lm_beta", "lm_beam_size", "lm_case")}
        lm_transcriber = load_transcriber(str(model_folder), lm_path=resolve_source(hparams["lm_path"]), **lm)
    results = []
    names = hparams["test_splits"]
    for split in [names] if isinstance(names, str) else names:
        several = not isinstance(names, str) and len(names) > 1
        experiment = f"{hparams['experiment']}-{split}" if several else hparams["experiment"]
        benchmark = Benchmark.from_manifest(
            splits[split],
            corpus=hparams["corpus_name"] or hparams["corpus"],
            split=split,
            normaliser=hparams["test_normaliser"],
            skip_bad=hparams["skip_bad"],
        )
        result = evaluate(
            transcriber,
            benchmark,
            lm_transcriber=lm_transcriber,
            batch_size=hparams["test_batch_size"],
            measure_macs=hparams["measure_macs"],
            repeats=hparams["runtime_repeats"] if hparams["measure_runtime"] else 0,
            experiment=experiment,
            recipe=hparams["recipe"],
            technique=brain_class.technique_of(transcriber.model, hparams["technique"]),
            variant=str(hparams["variant"]),
            hparams=plain,
            details=brain_class.details_of(transcriber.model),
            seed=hparams["seed"],
        )
        result.save(Path(hparams["results_folder"]))
        results.append(result)
    return results


def print_summary(results: list[Result], model_folder: Path) -> None:
    """Say what was measured and where everything is."""
    print(f"model: {model_folder}")
    for result in results:
        print(result.summary())
        print(f"result: {result.path}")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    sb.utils.seed.seed_everything(seed)
    torch.manual_seed(seed)
