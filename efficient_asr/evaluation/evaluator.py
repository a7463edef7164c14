"""evaluate(): the same measurement for every technique.

It sees a Transcriber and a Benchmark and knows nothing else. Words are scored and MACs counted in one pass at batch 1 over
every utterance; runtimes are measured in passes of their own, where nothing is counted.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr.data import Row, iterate_batches, read_manifest
from efficient_asr.errors import UserError
from efficient_asr.evaluation.macs import count_macs, thop_available
from efficient_asr.evaluation.result import Result, provenance
from efficient_asr.evaluation.runtime import measure_runtime
from efficient_asr.evaluation.transcriber import Transcriber, move, parameters_count
from efficient_asr.evaluation.transcript import Transcript
from efficient_asr.evaluation.wer import bootstrap_ci95, count_errors, error_rate_percent
from efficient_asr.text import get_normaliser


@dataclass
class Benchmark:
    """Fixed utterances with normalised references.

    Attributes
    ----------
    corpus, split : str
        Names for the tables.
    rows : list of dict
        Utterances, `text` as in the manifest.
    normaliser : str
        Applied to references and hypotheses alike.
    """

    corpus: str
    split: str
    rows: list[Row]
    normaliser: str = "plain"

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
    ) -> Benchmark:
        """Read a manifest; names default to those of its folder and file."""
        get_normaliser(normaliser)
        path = Path(path)
        rows = read_manifest(path, columns, True, skip_bad, skipped_file)
        return cls(corpus or path.absolute().parent.name, split or path.stem, rows, normaliser)

    def normalise(self, text: str, row: Row) -> str:
        """Normalise a text in the language of its utterance."""
        return get_normaliser(self.normaliser)(text, row.get("language", "en"))

    @property
    def references(self) -> list[str]:
        """Normalised references, in order."""
        return [self.normalise(row["text"], row) for row in self.rows]

    @property
    def hash(self) -> str:
        """Changes with any utterance, reference or duration, and with the normaliser."""
        content = [
            [row["id"], text, round(row["duration"], 2)] for row, text in zip(self.rows, self.references, strict=True)
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

    Returns
    -------
    Result
        Complete; `save` writes it.
    """
    if not benchmark.rows:
        raise UserError(f"{benchmark.corpus}/{benchmark.split} holds no utterance")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    move(transcriber, devices[-1])
    references = benchmark.references
    rows, macs_thop = _score(transcriber, benchmark, references, measure_macs)
    errors = count_errors(references, [row["hypothesis"] for row in rows])
    character_errors = count_errors(references, [row["hypothesis"] for row in rows], characters=True)
    for row, error in zip(rows, errors, strict=True):
        row["errors"] = error.total
    wer_lm_percent = None
    if lm_transcriber is not None:
        move(lm_transcriber, devices[-1])
        heard = _transcribe(lm_transcriber, benchmark)
        wer_lm_percent = error_rate_percent(count_errors(references, heard))
        for row, text in zip(rows, heard, strict=True):
            row["hypothesis_lm"] = text
    runtimes = []
    for device in devices if repeats else []:
        for with_lm, candidate in ((False, transcriber), (True, lm_transcriber if time_lm else None)):
            # Beam search takes utterance by utterance, so a batch would tell nothing new of it.
            sizes = {1} if with_lm or not getattr(candidate, "batched", True) else {1, batch_size}
            for size in sorted(sizes) if candidate is not None else []:
                runtimes.append(measure_runtime(candidate, benchmark.rows, device, size, repeats, with_lm))
    audio_s = sum(row["duration"] for row in benchmark.rows)
    macs = sum(row["macs_g"] for row in rows) if measure_macs else None
    return Result(
        experiment=experiment,
        recipe=recipe,
        technique=technique,
        variant=variant,
        corpus=benchmark.corpus,
        split=benchmark.split,
        benchmark_hash=benchmark.hash,
        utterances=len(rows),
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
        macs_g=macs / len(rows) if measure_macs else None,
        macs_g_per_audio_s=macs / audio_s if measure_macs else None,
        macs_thop_g=macs_thop / len(rows) if macs_thop is not None else None,
        runtimes=runtimes,
        details=(details or {}) | ({} if thop_available() else {"note": "thop cannot be imported here"}),
        hparams=hparams or {},
        provenance=provenance(seed),
        synthetic=all(row.get("synthetic", False) for row in benchmark.rows),
        normaliser=benchmark.normaliser,
        lm=lm,
        rows=rows,
    )


def _score(
    transcriber: Transcriber, benchmark: Benchmark, references: list[str], measure_macs: bool
) -> tuple[list[dict[str, Any]], float | None]:
    """Transcribe at batch 1, counting; returns a record for each utterance and the GMACs in thop's convention, summed."""
    records, macs_thop = [], 0.0 if measure_macs and thop_available() else None
    batches = iterate_batches(benchmark.rows, 1)
    for (chunk, wavs, wav_lens), reference in zip(
        tqdm(
            batches,
            total=len(benchmark.rows),
            desc=f"scoring {benchmark.split}",
            unit="utt",
            leave=False,
            mininterval=1,
        ),
        references,
        strict=True,
    ):
        row, macs_g = chunk[0], None
        if measure_macs:
            counted = count_macs(_transcribe_one, transcriber, row, wavs, wav_lens)
            transcript, macs_g = counted.output, counted.macs / 1e9
            macs_thop = None if macs_thop is None else macs_thop + counted.macs_thop / 1e9
        else:
            transcript = _transcribe_one(transcriber, row, wavs, wav_lens)
        records.append(
            {"id": row["id"], "duration": row["duration"], "reference": reference,
             "hypothesis": benchmark.normalise(transcript.text, row), "errors": 0, "macs_g": macs_g, **transcript.details}
        )  # fmt: skip
    return records, macs_thop


def _transcribe_one(transcriber: Transcriber, row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor) -> Transcript:
    """Transcribe one utterance; what the model refuses is said with its id."""
    try:
        return transcriber.transcribe(wavs, wav_lens)[0]
    except UserError as error:
        raise UserError(f"utterance '{row['id']}': {error}") from None


def _transcribe(transcriber: Transcriber, benchmark: Benchmark) -> list[str]:
    """Transcribe at batch 1; returns normalised texts."""
    texts = []
    batches = iterate_batches(benchmark.rows, 1)
    for chunk, wavs, wav_lens in tqdm(
        batches, total=len(benchmark.rows), desc="scoring with LM", unit="utt", leave=False
    ):
        texts.append(benchmark.normalise(_transcribe_one(transcriber, chunk[0], wavs, wav_lens).text, chunk[0]))
    return texts
