"""evaluate(): the same measurement for every technique.

It sees a Transcriber and a Benchmark and knows nothing else. Words are scored and MACs counted in one pass at batch 1 over
every utterance (`score`), shared between the processes where there are several; runtimes are measured in passes of their
own, on one process, where nothing is counted. Nothing of either grows with the number of utterances but a few numbers each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr import distributed
from efficient_asr.data import Row, Rows, iterate_batches, read_manifest
from efficient_asr.errors import UserError
from efficient_asr.evaluation.macs import count_macs, thop_available
from efficient_asr.evaluation.records import PartFiles, Records
from efficient_asr.evaluation.result import Result, provenance
from efficient_asr.evaluation.runtime import measure_runtime
from efficient_asr.evaluation.transcriber import MANIFEST, Transcriber, move, parameters_count, transcribe_rows
from efficient_asr.evaluation.transcript import Transcript
from efficient_asr.evaluation.wer import Errors, bootstrap_ci95, count_errors, error_rate_percent
from efficient_asr.languages import normalise_or_keep
from efficient_asr.text import get_normaliser, join_signs

# torch's convolutions on a CPU keep compiled code for the last 1024 shapes, which can take a gigabyte. Over more utterances than
# this, each of a length of its own, a shape is gone from there before it comes again, so a smaller store costs no time.
# Only counts where no convolution has run yet in this process.
MANY = 500


@dataclass
class Benchmark:
    """Fixed utterances with normalised references.

    Attributes
    ----------
    corpus, split : str
        Names for the tables.
    rows : Rows
        Utterances, `text` as in the manifest; a list of dicts will do.
    normaliser : str
        Applied to references and hypotheses alike.
    language : str
        Of utterances that do not name theirs.
    task : str
        `transcribe`, or `translate`: references are then the rows' `translation`, in English, and BLEU is computed too.
        Utterances without one are left out.
    """

    corpus: str
    split: str
    rows: Rows
    normaliser: str = "plain"
    language: str = "en"
    task: str = "transcribe"

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Rows):
            self.rows = Rows.of(self.rows)
        if self.task == "translate":
            if importlib.util.find_spec("sacrebleu") is None:
                raise UserError("task: BLEU of translations needs sacrebleu: pip install 'efficient_asr[translation]'")
            known = [i for i, row in enumerate(self.rows) if row.get("translation")]
            if not known:
                raise UserError(
                    f"task: no utterance of {self.corpus}/{self.split} has a `translation` to compare with; the corpus "
                    "fleurs adds them (translations: True)"
                )
            if len(known) < len(self.rows):
                without = len(self.rows) - len(known)
                print(
                    f"{self.corpus}/{self.split}: {without} of {len(self.rows)} utterances have no `translation`, left out"
                )
                self.rows = self.rows.select(known)

    @classmethod
    def from_manifest(
        cls,
        path: Path,
        corpus: str | None = None,
        split: str | None = None,
        normaliser: str = "plain",
        columns: dict[str, Any] | None = None,
        skip_bad: bool = False,
        skipped_file: Path | None = None,
        check_audio: str = "header",
        memo: Path | None = None,
        language: str | None = None,
        task: str = "transcribe",
    ) -> Benchmark:
        """Read a manifest, see `read_manifest`; names default to those of its folder and file."""
        get_normaliser(normaliser)
        path = Path(path)
        rows = read_manifest(path, columns, True, skip_bad, skipped_file, check_audio, memo=memo)
        if len(rows) > MANY:
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        unnamed = "en" if language in (None, MANIFEST) else normalise_or_keep(language)
        return cls(corpus or path.absolute().parent.name, split or path.stem, rows, normaliser, unnamed, task)

    def normalise(self, text: str, row: Row) -> str:
        """Normalise a text in the language of its utterance, or in English where that is what is asked for."""
        language = "en" if self.task == "translate" else row.get("language") or self.language
        return get_normaliser(self.normaliser)(text, language)

    def reference(self, row: Row) -> str:
        """Return what should come out, as it is written."""
        return row["translation"] if self.task == "translate" else row["text"]

    @property
    def references(self) -> list[str]:
        """Normalised references, in order."""
        return [self.normalise(self.reference(row), row) for row in self.rows]

    @property
    def hash(self) -> str:
        """Changes with any utterance, reference or duration, and with the normaliser."""
        content = [
            [row["id"], text, round(row["duration"], 2), *([row["offset"]] if "offset" in row else [])]
            for row, text in zip(self.rows, self.references, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.normaliser, sorted(content)]).encode()).hexdigest()[:16]


def evaluate(
    transcriber: Transcriber,
    benchmark: Benchmark,
    lm_transcriber: Transcriber | None = None,
    batch_size: int = 8,
    measure_macs: bool = True,
    repeats: int = 3,
    experiment: str = "evaluation",
    recipe: str | None = None,
    technique: str = "none",
    variant: str = "",
    hparams: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
    seed: int | None = None,
    lm: dict[str, Any] | None = None,
    time_lm: bool = True,
    records: Records | None = None,
) -> Result:
    """Measure a Transcriber on a Benchmark.

    Arguments
    ---------
    transcriber : Transcriber
        What to measure, without a language model.
    benchmark : Benchmark
        On what.
    lm_transcriber : Transcriber, optional
        The same with a language model; gives `wer_lm_percent` and runtimes of its own.
    batch_size : int
        Runtimes are taken at batch 1 and at this size (with a language model at batch 1).
    measure_macs : bool
        Whether to count MACs.
    repeats : int
        Timed runs over the whole benchmark; 0 leaves runtimes out.
    experiment, recipe, technique, variant, hparams, details, seed, lm
        For the record.
    time_lm : bool
        Whether decoding with the language model is timed too.
    records : Records, optional
        What `score` found, where that was done before.

    Returns
    -------
    Result
        Complete; `save` writes it.
    """
    if not len(benchmark.rows):
        raise UserError(f"{benchmark.corpus}/{benchmark.split} holds no utterance")
    if records is None:
        records = score(transcriber, benchmark, lm_transcriber, measure_macs)
        records.discard_parts()
    errors = _count(records, "hypothesis")
    character_errors = _count(records, "hypothesis", characters=True)
    wer_lm_percent = error_rate_percent(_count(records, "hypothesis_lm")) if lm_transcriber is not None else None
    devices = _devices()
    runtimes = []
    for device in devices if repeats else []:
        for with_lm, candidate in ((False, transcriber), (True, lm_transcriber if time_lm else None)):
            # Beam search takes utterance by utterance, so a batch would tell nothing new of it.
            sizes = {1} if with_lm or not getattr(candidate, "batched", True) else {1, batch_size}
            for size in sorted(sizes) if candidate is not None else []:
                runtimes.append(measure_runtime(candidate, benchmark.rows, device, size, repeats, with_lm))
    audio_s = float(benchmark.rows.durations.sum())
    macs = sum(record["macs_g"] for record in records) if measure_macs else None
    macs_thop = sum(record["macs_thop_g"] for record in records) if measure_macs and thop_available() else None
    notes = {} if thop_available() else {"note": "thop cannot be imported here"}
    summary = getattr(transcriber, "summary", lambda records: {})(records)
    summary |= by_language(benchmark, errors, character_errors) | bleu(benchmark, records)
    return Result(
        experiment=experiment,
        recipe=recipe,
        technique=technique,
        variant=variant,
        corpus=benchmark.corpus,
        split=benchmark.split,
        benchmark_hash=benchmark.hash,
        utterances=len(records),
        audio_s=audio_s,
        reference_words=sum(e.reference_length for e in errors),
        wer_percent=error_rate_percent(errors),
        wer_ci95_percent=bootstrap_ci95(errors),
        cer_percent=error_rate_percent(character_errors),
        substitutions=sum(e.substitutions for e in errors),
        deletions=sum(e.deletions for e in errors),
        insertions=sum(e.insertions for e in errors),
        wer_lm_percent=wer_lm_percent,
        parameters=parameters_count(transcriber),
        macs_g=macs / len(records) if measure_macs else None,
        macs_g_per_audio_s=macs / audio_s if measure_macs else None,
        macs_thop_g=macs_thop / len(records) if macs_thop is not None else None,
        runtimes=runtimes,
        details=(details or {}) | _route_shares(transcriber, records) | summary | notes,
        hparams=hparams or {},
        provenance=provenance(seed),
        synthetic=all(row.get("synthetic", False) for row in benchmark.rows),
        normaliser=benchmark.normaliser,
        lm=lm,
        rows=records,
    )


def _route_shares(transcriber: Transcriber, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return how often each model of a cascade answered; the last is the largest."""
    names = getattr(transcriber, "names", None)
    if not names:
        return {}
    routes = []
    for record in records:  # of long audio every piece has one
        routes += [record["route"]] if "route" in record else [piece["route"] for piece in record.get("segments", ())]
    shares = {name: routes.count(name) / max(1, len(routes)) for name in names}
    return {"route_shares": shares, "large_model_rate": shares[names[-1]]}


def bleu(benchmark: Benchmark, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return sacrebleu's BLEU of translations as they are written, and its signature; nothing of transcripts."""
    if benchmark.task != "translate":
        return {}
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    found = metric.corpus_score(
        [record["translation"] for record in records], [[benchmark.reference(row) for row in benchmark.rows]]
    )
    return {"bleu": found.score, "bleu_signature": str(metric.get_signature())}


def by_language(benchmark: Benchmark, errors: list[Errors], character_errors: list[Errors]) -> dict[str, Any]:
    """Return WER and CER of each language, and their means over languages, where the utterances name several."""
    languages = [row.get("language") for row in benchmark.rows]
    if len({*languages}) < 2:
        return {}
    found = {}
    for language in sorted({*languages}, key=str):
        of_it = [i for i, other in enumerate(languages) if other == language]
        found[language or "unnamed"] = {
            "utterances": len(of_it),
            "wer_percent": error_rate_percent([errors[i] for i in of_it]),
            "cer_percent": error_rate_percent([character_errors[i] for i in of_it]),
        }
    means = {
        f"macro_{key}": sum(entry[key] for entry in found.values()) / len(found)
        for key in ("wer_percent", "cer_percent")
        if None not in [entry[key] for entry in found.values()]
    }
    return {"languages": found, **means}


def _devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def score(
    transcriber: Transcriber,
    benchmark: Benchmark,
    lm_transcriber: Transcriber | None = None,
    measure_macs: bool = True,
    stem: Path | None = None,
    key: str = "",
) -> Records | None:
    """Transcribe every utterance once, at batch 1, and count; processes share the work.

    Arguments
    ---------
    transcriber, lm_transcriber : Transcriber
        Without and with a language model.
    benchmark : Benchmark
        On what.
    measure_macs : bool
        Whether to count MACs.
    stem : Path, optional
        Records are kept in `<stem>.part-*` until `Records.discard_parts`, and an interrupted pass goes on from them.
    key : str
        Names the models; records of other models or another benchmark do not count.

    Returns
    -------
    Records or None
        `id, duration, reference, hypothesis, errors, macs_g, macs_thop_g` and what the technique did, in the order of the
        benchmark. On the main process; None on the others.
    """
    for candidate in (transcriber, lm_transcriber):
        if candidate is not None:
            move(candidate, _devices()[-1])
    getattr(transcriber, "check_rows", lambda rows, split: None)(benchmark.rows, benchmark.split)
    with_lm = lm_transcriber is not None
    parts = PartFiles(stem, hashlib.sha256(f"{benchmark.hash} {with_lm} {measure_macs} {key}".encode()).hexdigest())
    missing = [i for i, row in enumerate(benchmark.rows) if row["id"] not in parts.places]
    if len(missing) < len(benchmark.rows) and distributed.if_main_process():
        print(f"{benchmark.split}: {len(benchmark.rows) - len(missing)} utterances are scored already")
    mine = benchmark.rows.select(missing[distributed.rank() :: distributed.processes()])
    progress = tqdm(
        iterate_batches(mine, 1), total=len(mine), desc=f"scoring {benchmark.split}", unit="utt", leave=False, mininterval=1,
        disable=not distributed.if_main_process(),
    )  # fmt: skip
    with parts.open() as file:
        for (row,), wavs, wav_lens in progress:
            record = _score_one(transcriber, lm_transcriber, benchmark, row, wavs, wav_lens, measure_macs)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    distributed.ddp_barrier()
    if not distributed.if_main_process():
        return None
    return parts.merge(row["id"] for row in benchmark.rows)


def _score_one(
    transcriber: Transcriber,
    lm_transcriber: Transcriber | None,
    benchmark: Benchmark,
    row: Row,
    wavs: torch.Tensor,
    wav_lens: torch.Tensor,
    measure_macs: bool,
) -> dict[str, Any]:
    """Return the record of one utterance."""
    macs_g = macs_thop_g = None
    if measure_macs:
        counted = count_macs(_transcribe_one, transcriber, row, wavs, wav_lens)
        transcript, macs_g = counted.output, counted.macs / 1e9
        macs_thop_g = counted.macs_thop / 1e9 if thop_available() else None
    else:
        transcript = _transcribe_one(transcriber, row, wavs, wav_lens)
    reference, hypothesis = (benchmark.normalise(text, row) for text in (benchmark.reference(row), transcript.text))
    record = {
        "id": row["id"], "duration": row["duration"], "reference": reference, "hypothesis": hypothesis,
        "errors": count_errors([reference], [hypothesis])[0].total, "macs_g": macs_g, "macs_thop_g": macs_thop_g,
        **transcript.details,
    }  # fmt: skip
    if benchmark.task == "translate":
        record["translation"] = transcript.text
    if lm_transcriber is not None:
        record["hypothesis_lm"] = benchmark.normalise(_transcribe_one(lm_transcriber, row, wavs, wav_lens).text, row)
    return record


def _transcribe_one(transcriber: Transcriber, row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor) -> Transcript:
    """Transcribe one utterance; what the model refuses is said with its id."""
    try:
        return transcribe_rows(transcriber, [row], wavs, wav_lens)[0]
    except UserError as error:
        raise UserError(f"utterance '{row['id']}': {error}") from None


def _count(records: Iterable[dict[str, Any]], key: str, characters: bool = False) -> list[Errors]:
    """Count the errors of all records, a thousand at a time."""
    errors, references, hypotheses = [], [], []
    change = join_signs if characters else str
    for record in records:
        references.append(change(record["reference"]))
        hypotheses.append(change(record[key]))
        if len(references) == 1000:
            errors += count_errors(references, hypotheses, characters)
            references, hypotheses = [], []
    return errors + (count_errors(references, hypotheses, characters) if references else [])
