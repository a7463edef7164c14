"""evaluate(): the same measurement for every technique.

It only uses a Transcriber and a Benchmark. `score` transcribes every utterance once at batch size 1, scores its words and counts
its MACs; the work is split across processes. Runtimes are measured in separate runs on one process, with MAC counting disabled.
Memory grows by only a few numbers per utterance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import Row, audio_digest, iterate_batches
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.languages import by_language
from efficient_asr.evaluation.macs import count_macs, thop_available
from efficient_asr.evaluation.records import PartFiles, Records
from efficient_asr.evaluation.result import Result, provenance
from efficient_asr.evaluation.runtime import measure_runtime
from efficient_asr.evaluation.translation import bleu
from efficient_asr.evaluation.wer import Errors, bootstrap_ci95, count_errors, error_rate_percent, repeated_ngrams
from efficient_asr.inference.transcriber import Transcriber, transcribe_rows
from efficient_asr.inference.transcript import Transcript
from efficient_asr.text.normalise import join_signs
from efficient_asr.utils import distributed
from efficient_asr.utils.devices import choose_device
from efficient_asr.utils.errors import UserError


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
    devices: Sequence[str] | None = None,
) -> Result:
    """Measure a transcriber on a benchmark.

    Arguments
    ---------
    transcriber : Transcriber
        The transcriber to evaluate, without a language model.
    benchmark : Benchmark
        The utterances to evaluate on.
    lm_transcriber : Transcriber, optional
        The same model with a language model; adds `wer_lm_percent` and separate runtimes.
    batch_size : int
        Runtimes are measured at batch size 1 and at this size (with a language model, only at 1).
    measure_macs : bool
        Whether to count MACs.
    repeats : int
        Number of timed runs over the whole benchmark; 0 skips timing.
    experiment, recipe, technique, variant, hparams, details, seed, lm
        Recorded in the result.
    time_lm : bool
        Whether to also time decoding with the language model.
    records : Records, optional
        Output of `score`, if it has already run.
    devices : list of str, optional
        Devices on which runtimes are measured; the first one is also used for scoring. None for the GPU if there is one,
        otherwise the CPU.

    Returns
    -------
    Result
        The complete result; write it with `save`.
    """
    if not len(benchmark.rows):
        raise UserError(f"{benchmark.corpus}/{benchmark.split} has no utterances")
    devices = devices or [choose_device()]
    measure_macs = measure_macs and transcriber.counts_macs
    if records is None:
        records = score(transcriber, benchmark, lm_transcriber, measure_macs, device=devices[0])
        records.discard_parts()
    errors = _count(records, "hypothesis")
    character_errors = _count(records, "hypothesis", characters=True)
    runtimes = measure_runtimes(
        transcriber, lm_transcriber if time_lm else None, benchmark, batch_size, repeats, devices
    )
    found = transcriber.summary(records) | by_language(benchmark, errors, character_errors) | bleu(benchmark, records)
    found["repeated_5grams"] = sum(repeated_ngrams(record["hypothesis"]) for record in records)
    notes = {} if thop_available() else {"note": "thop cannot be imported here"}
    return Result(
        experiment=experiment,
        recipe=recipe,
        technique=technique,
        variant=variant,
        corpus=benchmark.corpus,
        split=benchmark.split,
        benchmark_hash=benchmark.hash,
        utterances=len(records),
        audio_s=float(benchmark.rows.durations.sum()),
        cer_percent=error_rate_percent(character_errors),
        **_word_errors(errors),
        wer_lm_percent=error_rate_percent(_count(records, "hypothesis_lm")) if lm_transcriber is not None else None,
        parameters=transcriber.parameters_count(),
        **_macs(records, benchmark, measure_macs),
        runtimes=runtimes,
        details=(details or {}) | found | notes,
        hparams=hparams or {},
        provenance=provenance(seed, transcriber.settings),
        synthetic=all(row.get("synthetic", False) for row in benchmark.rows),
        normaliser=benchmark.normaliser,
        lm=lm,
        rows=records,
    )


def _word_errors(errors: list[Errors]) -> dict[str, Any]:
    """Return the fields of a Result that follow from the word errors."""
    return {
        "reference_words": sum(e.reference_length for e in errors),
        "wer_percent": error_rate_percent(errors),
        "wer_ci95_percent": bootstrap_ci95(errors),
        **{name: sum(getattr(e, name) for e in errors) for name in ("substitutions", "deletions", "insertions")},
    }


def _macs(records: Records, benchmark: Benchmark, measured: bool) -> dict[str, float | None]:
    """Return the mean GMACs per utterance by both conventions, and the GMACs per second of audio."""
    macs = sum(record["macs_g"] for record in records) if measured else None
    by_thop = [record["macs_thop_g"] for record in records] if measured else [None]
    macs_thop = None if None in by_thop else sum(by_thop)
    return {
        "macs_g": macs / len(records) if measured else None,
        "macs_g_per_audio_s": macs / float(benchmark.rows.durations.sum()) if measured else None,
        "macs_thop_g": macs_thop / len(records) if macs_thop is not None else None,
    }


def measure_runtimes(
    transcriber: Transcriber,
    lm_transcriber: Transcriber | None,
    benchmark: Benchmark,
    batch_size: int,
    repeats: int,
    devices: Sequence[str],
) -> list[dict[str, Any]]:
    """Time both transcribers on the given devices, at batch size 1 and at `batch_size`."""
    runtimes = []
    for device in devices if repeats else ():
        for with_lm, candidate in ((False, transcriber), (True, lm_transcriber)):
            if candidate is None:
                continue
            # Beam search decodes one utterance at a time, so a larger batch would add no information.
            sizes = {1} if with_lm or not candidate.batched else {1, batch_size}
            for size in sorted(sizes):
                runtimes.append(measure_runtime(candidate, benchmark.rows, device, size, repeats, with_lm))
    return runtimes


def score(
    transcriber: Transcriber,
    benchmark: Benchmark,
    lm_transcriber: Transcriber | None = None,
    measure_macs: bool = True,
    stem: Path | None = None,
    key: str = "",
    device: str | None = None,
) -> Records | None:
    """Transcribe every utterance once at batch size 1, and count errors and MACs; the work is split across processes.

    Arguments
    ---------
    transcriber, lm_transcriber : Transcriber
        The transcriber without and with a language model.
    benchmark : Benchmark
        The utterances to transcribe.
    measure_macs : bool
        Whether to count MACs.
    stem : Path, optional
        Records are kept in `<stem>.part-*` until `Records.discard_parts`, so that an interrupted run can resume.
    key : str
        Identifies the models; records of other models, of another benchmark or of audio that has changed are ignored.
    device : str, optional
        Device to run on; None for the GPU if there is one, otherwise the CPU.

    Returns
    -------
    Records or None
        `id, duration, reference, hypothesis, errors, macs_g, macs_thop_g` and the technique's details, in the order of the
        benchmark, on the main process; None on the others.
    """
    for candidate in (transcriber, lm_transcriber):
        if candidate is not None:
            candidate.to(choose_device(device))
    transcriber.check_rows(benchmark.rows, benchmark.split)
    with_lm, measure_macs = lm_transcriber is not None, measure_macs and transcriber.counts_macs
    about = f"{benchmark.hash} {audio_digest(benchmark.rows)} {with_lm} {measure_macs} {key}"
    parts = PartFiles(stem, hashlib.sha256(about.encode()).hexdigest())
    missing = [i for i, row in enumerate(benchmark.rows) if row["id"] not in parts.places]
    if len(missing) < len(benchmark.rows) and distributed.if_main_process():
        print(f"{benchmark.split}: {len(benchmark.rows) - len(missing)} utterances are already scored")
    mine = benchmark.rows.select(missing[distributed.rank() :: distributed.world_size()])
    progress = tqdm(
        iterate_batches(mine, 1), total=len(mine), desc=f"scoring {benchmark.split}", unit="utt", leave=False, mininterval=1,
        disable=not distributed.if_main_process(),
    )  # fmt: skip
    costs = Costs(transcriber) if measure_macs else None
    with parts.open() as file:
        for (row,), wavs, wav_lens in progress:
            record = score_utterance(transcriber, lm_transcriber, benchmark, row, wavs, wav_lens, costs)
            file.append(record)
    distributed.ddp_barrier()
    if not distributed.if_main_process():
        return None
    return parts.merge(row["id"] for row in benchmark.rows)


class Costs:
    """Counts MACs, once for all utterances of equal `Transcriber.cost_key`, since counting takes longer than transcribing.

    Arguments
    ---------
    transcriber : Transcriber
        The transcriber whose MACs are counted.
    """

    def __init__(self, transcriber: Transcriber) -> None:
        self.transcriber = transcriber
        self._known: dict[tuple, tuple[float, float | None]] = {}
        self._has_keys = False

    def transcribe(
        self, row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor
    ) -> tuple[Transcript, float, float | None]:
        """Return transcript, GMACs, and GMACs by thop (None if thop is not available) of one utterance."""
        if self._has_keys:
            transcript = _transcribe_one(self.transcriber, row, wavs, wav_lens)
            key = self.transcriber.cost_key(transcript)
            if key in self._known:
                return transcript, *self._known[key]
        counted = count_macs(_transcribe_one, self.transcriber, row, wavs, wav_lens)
        has_thop = thop_available() and self.transcriber.thop_counts
        cost = (counted.macs / 1e9, counted.macs_thop / 1e9 if has_thop else None)
        key = self.transcriber.cost_key(counted.output)
        if key is not None:
            self._has_keys, self._known[key] = True, cost
        return counted.output, *cost


def score_utterance(
    transcriber: Transcriber,
    lm_transcriber: Transcriber | None,
    benchmark: Benchmark,
    row: Row,
    wavs: torch.Tensor,
    wav_lens: torch.Tensor,
    costs: Costs | None,
) -> dict[str, Any]:
    """Return the record of one utterance; MACs are counted if `costs` are given."""
    macs_g = macs_thop_g = None
    if costs is not None:
        transcript, macs_g, macs_thop_g = costs.transcribe(row, wavs, wav_lens)
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
    """Transcribe one utterance; errors are raised again with its id."""
    try:
        return transcribe_rows(transcriber, [row], wavs, wav_lens)[0]
    except UserError as error:
        raise UserError(f"utterance '{row['id']}': {error}") from None


def _count(records: Iterable[dict[str, Any]], key: str, characters: bool = False) -> list[Errors]:
    """Count the errors of all records, 1000 at a time."""
    errors, references, hypotheses = [], [], []
    change = join_signs if characters else str
    for record in records:
        references.append(change(record["reference"]))
        hypotheses.append(change(record[key]))
        if len(references) == 1000:
            errors += count_errors(references, hypotheses, characters)
            references, hypotheses = [], []
    return errors + (count_errors(references, hypotheses, characters) if references else [])
