"""Model cards: README.md of a model folder in the form of the Hugging Face hub, with measured results (`model-index`).

A card says only what is known: from the folder's config.json, and from Results. Recipes write one into every model folder; a
README.md that somebody else wrote is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from efficient_asr.evaluation.result import Result
from efficient_asr.models.backends import own_folder
from efficient_asr.models.hub import CARD_MARK
from efficient_asr.models.sources import read_config
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write_text


def write_card(folder: Path, results: Sequence[Result], overwrite: bool = False) -> Path | None:
    """Write `README.md` into a model folder; return its path, or None if there is one of another author.

    Arguments
    ---------
    folder : Path
        Model folder.
    results : list of Result
        What was measured of the model.
    overwrite : bool
        Whether to replace a README.md of another author.

    Raises
    ------
    UserError
        If the folder is no model folder.
    """
    path = Path(folder) / "README.md"
    text = card_text(Path(folder), results)
    if not overwrite and path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8"):
        return None
    atomic_write_text(path, text)
    return path


def card_text(folder: Path, results: Sequence[Result]) -> str:
    """Return the text of a card."""
    config = read_config(own_folder(str(folder)))
    about = config.get("about") or {}
    about = about if isinstance(about, dict) else {}
    name = _name(folder, results)
    is_whisper = config.get("model_type") == "whisper"
    languages = sorted({language for result in results for language in _languages(result)})
    data = ModelCardData(
        language=languages or None,
        library_name="transformers" if is_whisper else "efficient_asr",
        pipeline_tag="automatic-speech-recognition",
        tags=["automatic-speech-recognition", "efficient_asr", *_techniques(about)],
        base_model=_base(results) if is_whisper else None,  # the encoder of a CTC model may be any object of the YAML
        model_name=name,
        eval_results=[entry for result in results for entry in _eval_results(result, _variant_of(result, results))]
        or None,
    )
    parts = ["---", data.to_yaml(), "---", CARD_MARK, "", f"# {name}", "", _description(config, about)]
    parts += ["", "## Results", "", _table(results)] if results else ["", "Nothing was measured."]
    parts += ["", "## Use", "", *_use(folder, is_whisper and not config.get("adapter"))]
    return "\n".join(parts) + "\n"


def _name(folder: Path, results: Sequence[Result]) -> str:
    """Return the name of the experiment, or of the folder: not `model` or a seed."""
    if results:
        first = results[0]
        return first.experiment.removesuffix(f"-{first.split}")
    parts = [part for part in folder.absolute().parts if part != "model" and not part.isdigit()]
    return parts[-1] if parts else "model"


def _techniques(about: dict[str, Any]) -> list[str]:
    technique = about.get("technique")
    return [] if technique in (None, "none") else str(technique).split(" + ")


def _base(results: Sequence[Result]) -> str | None:
    """Return the hub id that the model was trained from; None for a local directory, which means nothing to others."""
    source = results[0].hparams.get("source") if results else None
    known = isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~", "$"))
    return source if known and not Path(source).exists() else None


def _languages(result: Result) -> list[str]:
    """Return the codes of a result's languages, as far as they are recorded."""
    languages = result.details.get("languages")
    if isinstance(languages, dict):
        return [code for code in languages if code != "unnamed"]
    language = result.hparams.get("language")
    return [language] if isinstance(language, str) and language not in ("manifest", "None") else []


def _variant_of(result: Result, results: Sequence[Result]) -> str:
    """Return `, <variant>` if the results are of several forms of the model, such as int8 or other decoding options."""
    return f", {result.variant}" if len({each.variant for each in results}) > 1 else ""


def _eval_results(result: Result, variant: str) -> list[EvalResult]:
    """Return the entries of the `model-index`: WER and CER of a benchmark."""
    kind = "synthetic speech" if result.synthetic else "real speech"
    common = {
        "task_type": "automatic-speech-recognition", "dataset_type": result.corpus, "dataset_split": result.split,
        "dataset_name": f"{result.corpus}/{result.split} ({kind}, {result.utterances} utterances)",
    }  # fmt: skip
    values = {"wer": result.wer_percent, "cer": result.cer_percent}
    return [
        EvalResult(
            metric_type=name,
            metric_name=f"{name.upper()}, %, {result.normaliser}{variant}",
            metric_value=round(value, 3),
            **common,
        )
        for name, value in values.items()
        if value is not None
    ]


def _description(config: dict[str, Any], about: dict[str, Any]) -> str:
    technique, variant = about.get("technique"), about.get("variant")
    made = f"the recipe `{about['recipe']}` of efficient_asr" if about.get("recipe") else "efficient_asr"
    what = f"Technique: {technique}; variant: {variant}." if _techniques(about) else "No technique: a baseline."
    kind = config.get("model_type") or config.get("kind")
    return f"A speech recogniser of the kind `{kind}`, made by {made}. {what}"


def _table(results: Sequence[Result]) -> str:
    """Return a Markdown table; a dash where nothing was measured."""
    lines = [
        "| benchmark | speech | utterances | WER % [95 %] | GMACs per utterance | seconds of audio per second, batch 1 |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for result in results:
        wer = "–" if result.wer_percent is None else f"{result.wer_percent:.2f}"
        if result.wer_ci95_percent:
            wer += " [{:.1f}, {:.1f}]".format(*result.wer_ci95_percent)
        macs = "–" if result.macs_g is None else f"{result.macs_g:.3f}"
        timed = result.runtime("cuda") or result.runtime("cpu")
        speed = (
            "–" if timed is None else f"{timed['rtfx']:.1f} ({timed['device_name']}, {timed['threads']} CPU threads)"
        )
        kind = "synthetic" if result.synthetic else "real"
        benchmark = f"{result.corpus}/{result.split}{_variant_of(result, results)}"
        lines.append(f"| {benchmark} | {kind} | {result.utterances} | {wer} | {macs} | {speed} |")
    found = results[0].provenance
    lines += [
        "",
        f"Normaliser `{results[0].normaliser}`; measured {str(found.get('date'))[:10]} at commit {found.get('commit')}.",
    ]
    return "\n".join(lines)


def _use(folder: Path, is_plain_whisper: bool) -> list[str]:
    lines = ["```python", "import efficient_asr", "", f'transcriber = efficient_asr.load_transcriber("{folder.name}")']
    lines += ['print(transcriber.transcribe_files(["a.wav"])[0].text)', "```"]
    if is_plain_whisper:
        lines += ["", "It is a Whisper as transformers writes it, and other programs open it too."]
    return lines


def results_beside(folder: Path) -> list[Path]:
    """Return the results of the recipe's run that made a model folder."""
    return sorted((Path(folder).absolute().parent / "results").glob("*.json"))


def check_results(folder: Path, paths: Sequence[Path]) -> list[Result]:
    """Read results.

    Raises
    ------
    UserError
        If there is no model in the folder, or a file is no result.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    return [Result.load(path) for path in paths]
