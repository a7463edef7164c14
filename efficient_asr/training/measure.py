"""Measure a trained model on every test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.evaluator import evaluate, score
from efficient_asr.evaluation.result import Result
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.models.sources import fingerprint
from efficient_asr.training.brain import RecipeBrain
from efficient_asr.training.data import read_language_model
from efficient_asr.utils import distributed
from efficient_asr.utils.devices import choose_device, devices_to_time
from efficient_asr.utils.seeding import seed_everything  # noqa: F401  YAML files refer to it here
from efficient_asr.utils.technique import merged


def _computes_otherwise(transcriber: Transcriber, model: str, hparams: dict[str, Any]) -> bool:
    """Whether settings of the evaluation let a Whisper compute otherwise than its folder says."""
    keys = ("encoder_padding", "padding_s", "quantise", "backend", *merged("load_options"))
    if all(hparams.get(key) is None for key in keys):
        return False
    return hparams.get("backend") is not None or load_transcriber(model).label != transcriber.label


def measure(
    hparams: dict[str, Any],
    plain: dict[str, Any],
    benchmarks: list[Benchmark],
    model: str,
    output_folder: Path,
    brain_class: type[RecipeBrain],
    device: str | None = None,
) -> tuple[list[Result], bool]:
    """Measure the saved model on every test split: WER, MACs, and runtimes, with and without a language model.

    Also returns whether the model was measured as it was saved: some settings of an evaluation change the loaded model.

    It runs on `device` (None: the GPU if there is one), and is timed on `runtime_devices`.

    Each process scores its share of the utterances. The main process then measures the runtime while the others are idle.
    """
    if hparams["threads"]:
        torch.set_num_threads(hparams["threads"])
    device = choose_device(device)
    devices = devices_to_time(hparams["runtime_devices"], device)
    transcriber = brain_class.load(model, hparams)
    saved = transcriber.label
    brain_class.apply_eval_settings(transcriber, hparams)
    as_saved = transcriber.label == saved and not _computes_otherwise(transcriber, model, hparams)
    network = transcriber if transcriber.model is None else transcriber.model
    lm = read_language_model(hparams, network.labels.vocabulary) if hparams["lm_path"] else None
    lm_transcriber = CTCTranscriber(network, lm) if lm else None
    key = f"{fingerprint(model)} {transcriber.settings} {lm.identity if lm else None}"
    scored = [
        score(
            transcriber, benchmark, lm_transcriber, hparams["measure_macs"],
            output_folder / "scores" / benchmark.split, key, device,
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
            technique=transcriber.technique,
            variant=str(hparams["variant"] or transcriber.label),
            hparams=plain,
            details=brain_class.result_details(network, hparams, benchmark, records)
            | ({"lm_note": hparams["lm_note"]} if "lm_note" in hparams else {}),
            seed=hparams["seed"],
            lm=lm.config if lm else None,
            time_lm=hparams["time_lm"],
            records=records,
            devices=devices,
        )
        result.save(Path(hparams["results_folder"]))
        results.append(result)
        records.discard_parts()
    return results, as_saved
