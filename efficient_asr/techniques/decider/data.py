"""Data for training and evaluating deciders: their inputs (encoder states, transcripts or audio) and both models' errors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from efficient_asr.data import SAMPLE_RATE, FeatureStore, Row, Rows, load_row
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.transcriber import MANIFEST, Transcriber
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import load_config
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.sources import fingerprint, read_config
from efficient_asr.techniques.decider.analysis import (
    CALIBRATIONS,
    HOW,
    Costs,
    Pair,
    area_under_roc,
    oracle_curve,
    random_wer_percent,
    threshold_for,
)
from efficient_asr.techniques.decider.cascade import CascadeTranscriber, check_window
from efficient_asr.techniques.decider.network import (
    TARGETS,
    Decider,
    LogMelDecider,
    SmallModelDecider,
    TranscriptDecider,
)
from efficient_asr.techniques.decider.router import (
    AFTER_SMALL,
    ENCODER_FIRST,
    ROUTER_INPUTS,
    STATES_OF,
    Router,
    RouterInput,
)
from efficient_asr.utils.errors import UserError

# Options of label.py that do not change the text of an utterance shorter than a window, or that are checked on their own.
SAME_TEXT = ("language", "long_audio", "long_audio_batch", "overlap_s", "assistant", "backend", "max_tokens_per_s")


def new_router(hparams: dict[str, Any]) -> Router:
    """Build the decider of a YAML file, sized for the encoder states that it will receive."""
    router_input, shape = hparams["router_input"], {"channels": hparams["channels"], "strides": hparams["strides"]}
    if router_input == "audio":
        return LogMelDecider(**shape)
    if router_input == "transcript":
        return TranscriptDecider(hparams["transcript_width"])
    if router_input not in ROUTER_INPUTS:
        raise UserError(f"router_input: '{router_input}' is not one of {', '.join(ROUTER_INPUTS)}")
    source = model_source(hparams[STATES_OF[router_input]])
    try:
        config = load_config(source)
    except UserError as error:
        raise UserError(f"small, large: {error}") from None
    if config.model_type != "whisper":
        raise UserError(
            f"small, large: a decider on encoder states needs a Whisper, but '{source}' is of type '{config.model_type}'"
        )
    states = config.encoder_layers + 1
    if router_input == "small_model":
        return SmallModelDecider(states, config.d_model, hparams["state_width"], hparams["transcript_width"])
    return Decider(states, config.d_model, router_input=router_input, frames=hparams["frames"], **shape)


def check_settings(hparams: dict[str, Any]) -> None:
    """Check that settings and models are consistent before training starts.

    Raises
    ------
    UserError
        Naming the key, or the records that were made with another model.
    """
    if sum(hparams[key] is not None for key in CALIBRATIONS) > 1:
        raise UserError(f"give one of {', '.join(CALIBRATIONS)}, not several")
    easy_to_hard_ratio(hparams, hparams["train_split"])
    if hparams["target"] not in TARGETS:
        raise UserError(f"target: '{hparams['target']}' is not {' or '.join(TARGETS)}")
    if hparams["language"] == MANIFEST:
        raise UserError("language: 'manifest' is not supported by cascades; use one language, or null to detect it")
    for side in ("small", "large"):
        source = model_source(hparams[side])
        model = fingerprint(source) if os.path.isdir(source) else None  # a hub id may have been labelled from a folder
        for split in (hparams["train_split"], hparams["valid_split"]):
            labels = Path(hparams["labels_folder"]) / f"{hparams[f'{side}_name']}-{split}.jsonl"
            about = about_labels(labels)
            if model is not None and about.get("model", model) != model:
                raise UserError(f"{side}: {labels} was written with another model than {source}")
            others = [f"--{name} {value}" for name, value in about.get("decoding", {}).items() if name not in SAME_TEXT]
            if others:
                print(f"{labels} was written with {' '.join(others)}: run the cascade with the same options")
            limit = about.get("decoding", {}).get("max_tokens_per_s")
            if "decoding" in about and limit != hparams["max_tokens_per_s"]:
                raise UserError(
                    f"max_tokens_per_s: it is {hparams['max_tokens_per_s']}, but {labels} was written with {limit}; the decider "
                    "would learn errors that the cascade does not make"
                )


def about_labels(labels: Path) -> dict[str, Any]:
    """Return what the records of a model depend on (`.meta.json` beside the file); an empty dict for those of former versions."""
    meta = labels.with_suffix(".meta.json")
    return json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}


def labels_of_training(hparams: dict[str, Any], rows: dict[str, Rows]) -> dict[str, str]:
    """Return a checksum of what a training uses of both models' records (`made_of`)."""
    digest = hashlib.sha256()
    unused = {"time_s", "macs_g", "hypothesis", "reference"}
    for split in (hparams["train_split"], hparams["valid_split"]):
        pair = read_pair(hparams, split)
        for side, records in (("small", pair.small), ("large", pair.large)):
            heard = side == "small" and hparams["router_input"] in AFTER_SMALL
            for record in records:
                used = {key: record[key] for key in ({*record} - unused if heard else ("id", "errors"))}
                digest.update(json.dumps(used, sort_keys=True).encode())
    return {"labels": digest.hexdigest()[:16]}


def load_evaluated(source: str, hparams: dict[str, Any]) -> Transcriber:
    """Load a cascade for evaluation.

    Raises
    ------
    UserError
        If one of `calibrate_*` is not what the model folder was calibrated for; only training sets thresholds.
    """
    wished = {key: hparams[key] for key in CALIBRATIONS if hparams[key] is not None}
    history = read_config(source).get("history") if (Path(source) / "config.json").is_file() else None
    about = history.get("decider") if isinstance(history, dict) else None
    done = about.get("calibration", wished) if isinstance(about, dict) else wished
    if wished and done != wished:
        raise UserError(
            f"{next(iter(wished))}: the threshold of {source} was set for {done or 'no target'}; run the command without "
            "test_only, which sets it anew (from the checkpoints, if they were kept)"
        )
    return load_transcriber(source, language=hparams["language"])


def easy_to_hard_ratio(hparams: dict[str, Any], split: str) -> float:
    """Return the number of easy utterances per hard one; on a hard utterance the small model makes more errors than the large.

    Raises
    ------
    UserError
        If all utterances are easy or all are hard, so that there is nothing to learn.
    """
    gains = read_pair(hparams, split).gains
    hard = int((gains > 0).sum())
    if hard in (0, len(gains)):
        raise UserError(
            f"{hard} of {len(gains)} training utterances are hard for the small model, so there is nothing to learn"
        )
    return (len(gains) - hard) / hard


def read_pair(hparams: dict[str, Any], split: str) -> Pair:
    """Read the records of both models on a split."""
    folder = Path(hparams["labels_folder"])
    return Pair.read(*(folder / f"{hparams[name]}-{split}.jsonl" for name in ("small_name", "large_name")))


class RouterInputs:
    """Provides a router's inputs: encoder states (stored or computed on the fly), the small model's records, or the audio.

    Arguments
    ---------
    store : FeatureStore or None
        Stored encoder states.
    records : dict or None
        Records of the small model, by id.
    whisper : WhisperTranscriber or None
        Computes encoder states on the fly if there is no store.
    needs_audio : bool
        Whether the router, or the Whisper that computes states for it, needs the audio.
    """

    def __init__(
        self,
        store: FeatureStore | None,
        records: dict[str, dict[str, Any]] | None = None,
        whisper: WhisperTranscriber | None = None,
        needs_audio: bool = False,
    ) -> None:
        self.store, self.records, self.whisper, self.needs_audio = store, records, whisper, needs_audio

    @classmethod
    def of(
        cls, router: Router, hparams: dict[str, Any], split: str, whisper: WhisperTranscriber | None = None
    ) -> RouterInputs:
        """Open the inputs given in the YAML file; `whisper` (see `whisper_for`) computes the states if there is no store.

        Raises
        ------
        UserError
            If there are no states, they belong to another model, or they cover fewer frames than the decider needs.
        """
        records = None
        if router.router_input in AFTER_SMALL:
            pair = read_pair(hparams, split)
            records = dict(zip(pair.ids, pair.small, strict=True))
        side = STATES_OF.get(router.router_input)
        if side is None:
            return cls(None, records, needs_audio=router.router_input == "audio")
        if not hparams["states_folder"]:
            return cls(None, records, whisper, needs_audio=True)
        store = open_states(Path(hparams["states_folder"]) / f"{hparams[f'{side}_name']}-{split}")
        source = model_source(hparams[side])
        if os.path.isdir(source) and store.meta.get("model", fingerprint(source)) != fingerprint(source):
            raise UserError(f"{store.folder} contains states of another model than {source}; delete it, or label again")
        shape = (store.meta["states"], store.meta["dim"])
        if shape != (router.config["states"], router.config["input_size"]):
            raise UserError(
                f"{store.folder} contains {shape[0]} states of dimension {shape[1]}, not those of {hparams[side]}"
            )
        if store.meta["frames"] == "unpadded" and getattr(router, "frames", "unpadded") == "padded":
            raise UserError(
                f"frames: {store.folder} contains only the unpadded frames; pass --frames unpadded, or run "
                "recipes/decider/label.py with --frames padded"
            )
        return cls(store, records)

    def load(self, row: Row) -> dict[str, torch.Tensor]:
        """Return the small model's `record`, and `states` [frames, states, dim] or `wav` [time], as far as they are needed."""
        found = {} if self.records is None else {"record": self.records[row["id"]]}
        if self.store is None:
            return found | ({"wav": load_row(row)} if self.needs_audio else {})
        if row["id"] not in self.store:
            raise UserError(f"{self.store.folder} contains no states of utterance '{row['id']}'; {HOW}")
        return found | self.store.read(row["id"])

    def complete(self, inputs: RouterInput, device: torch.device | str) -> RouterInput:
        """Compute the encoder states of a batch if they did not come from a store."""
        if self.whisper is not None and inputs.hidden_states is None:
            wav_lens = inputs.lengths / inputs.wavs.shape[1]
            encoded = self.whisper.to(str(device)).encode(inputs.wavs, wav_lens, hidden_states=True)
            inputs.hidden_states = encoded.hidden_states
        return inputs


def whisper_for(router: Router, hparams: dict[str, Any]) -> WhisperTranscriber | None:
    """Load the Whisper that computes encoder states on the fly; None if the states are stored or the router needs none."""
    side = STATES_OF.get(router.router_input)
    if side is None or hparams["states_folder"]:
        return None
    whisper = WhisperTranscriber.from_source(model_source(hparams[side]))
    check_window(router, whisper, side)
    return whisper


def open_states(folder: Path, meta: dict[str, Any] | None = None) -> FeatureStore:
    """Open a store of encoder states, [frames, states, dim] per utterance; pass `meta` to open it for writing.

    Raises
    ------
    UserError
        If there is no store, or it belongs to another model.
    """
    try:
        return FeatureStore(folder, meta, "encoder states", added=("audio", "segments"))
    except UserError as error:
        hint = "" if meta is not None else f"; run recipes/decider/label.py with --states {folder} to write them"
        raise UserError(f"{error}{hint}") from None


class Examples(Dataset):
    """Dataset of items with `id`, `duration`, `gain` and the router's input."""

    def __init__(self, rows: Rows, source: RouterInputs, gains: dict[str, float]) -> None:
        missing = next((row["id"] for row in rows if row["id"] not in gains), None)
        if missing is not None:
            raise UserError(f"labels_folder: no record of utterance '{missing}'; {HOW}")
        self.rows, self.source, self.gains = rows, source, gains

    @classmethod
    def of(cls, router: Router, rows: Rows, hparams: dict[str, Any], split: str) -> Examples:
        """Read the records of both models and open the router's inputs."""
        pair = read_pair(hparams, split)
        source = RouterInputs.of(router, hparams, split)
        return cls(rows, source, dict(zip(pair.ids, pair.gains.tolist(), strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        about = {"id": row["id"], "duration": row["duration"]}
        try:
            return about | {"gain": self.gains[row["id"]]} | self.source.load(row)
        except UserError as error:
            return about | {"problem": str(error)}


class ExampleBatch(SimpleNamespace):
    """Batch with `id`, `duration` [batch], `gains` [batch], `inputs` and `problems`."""

    def to(self, device: Any) -> ExampleBatch:
        """Move to a device and return self."""
        inputs = self.inputs
        inputs.wavs, inputs.lengths = inputs.wavs.to(device), inputs.lengths.to(device)
        if inputs.hidden_states is not None:
            inputs.hidden_states = tuple(states.to(device) for states in inputs.hidden_states)
        self.gains = self.gains.to(device)
        return self


def collate_examples(items: list[dict[str, Any]]) -> ExampleBatch:
    """Collate items into a padded batch; states are converted to float32."""
    good = [item for item in items if "problem" not in item]
    batch = ExampleBatch(id=[item["id"] for item in good], problems=[item for item in items if "problem" in item])
    if not good:
        return batch
    batch.duration = torch.tensor([item["duration"] for item in good])
    batch.gains = torch.tensor([item["gain"] for item in good], dtype=torch.float32)
    lengths = (batch.duration.double() * SAMPLE_RATE).round().long()
    if "wav" in good[0]:
        lengths = torch.tensor([len(item["wav"]) for item in good])
    pad = torch.nn.utils.rnn.pad_sequence
    batch.inputs = RouterInput(torch.zeros(len(good), 0), lengths)
    if "wav" in good[0]:
        batch.inputs.wavs = pad([item["wav"] for item in good], batch_first=True)
    if "record" in good[0]:
        batch.inputs.details = [item["record"] for item in good]
        batch.inputs.texts = [item["record"]["text"] for item in good]
    if "states" in good[0]:
        batch.inputs.hidden_states = pad([item["states"] for item in good], batch_first=True).float().unbind(dim=2)
    return batch


def judge(router: Router, rows: Rows, source: RouterInputs) -> tuple[np.ndarray, np.ndarray]:
    """Return a router's scores and their cost in GMACs, each [utterances]; utterances are processed one at a time."""
    router.eval()
    scores, macs_g = [], []
    device = next(router.parameters()).device
    for row in rows:
        batch = collate_examples([{"id": row["id"], "duration": row["duration"], "gain": 0.0} | source.load(row)])
        with torch.no_grad():
            inputs = source.complete(batch.to(device).inputs, device)
            counted = count_macs(router, inputs)
        scores.append(float(counted.output))
        macs_g.append(counted.macs / 1e9)
    return np.array(scores), np.array(macs_g)


def encoder_macs_g(transcriber: WhisperTranscriber, durations: np.ndarray) -> np.ndarray:
    """Return the cost of a Whisper encoder for utterances of these durations in seconds, in GMACs, each [utterances]."""
    costs: dict[int, float] = {}
    own_length = transcriber.model.encoder_padding is not None
    counts = [max(1, encoder_frames(round(d * SAMPLE_RATE))) if own_length else 0 for d in durations]
    for count, duration in zip(counts, durations, strict=True):
        if count not in costs:
            wavs = torch.zeros(1, round(duration * SAMPLE_RATE))
            costs[count] = count_macs(transcriber.encode, wavs, torch.ones(1)).macs / 1e9
    return np.array([costs[count] for count in counts])


def costs_in_macs(router: Router, pair: Pair, router_macs_g: np.ndarray, small: str, large: str) -> Costs:
    """Return the GMACs of each utterance on both routes, including the encoder that the router's input requires."""
    encoders = {}
    if router.router_input in ENCODER_FIRST:
        side = STATES_OF[router.router_input]
        transcriber = WhisperTranscriber.from_source(model_source(small if side == "small" else large))
        encoders = {f"{side}_encoder": encoder_macs_g(transcriber, pair.durations)}
    return Costs.of(router.router_input, *pair.values("macs_g"), router=router_macs_g, **encoders)


def pgr_at(pair: Pair, records: Iterable[dict[str, Any]]) -> float | None:
    """Return the performance gap recovered (PGR) by a cascade at its actual cost, from the records of its evaluation.

    None if the records are incomplete, or if the oracle is no better than choosing at random at that cost.
    """
    found = {record["id"]: record for record in records}
    if set(found) != set(pair.ids) or any(record["macs_g"] is None for record in found.values()):
        return None
    errors = 100 * sum(found[name]["errors"] for name in pair.ids) / max(1.0, pair.words.sum())
    cost = float(np.mean([found[name]["macs_g"] for name in pair.ids]))
    small, large = pair.values("macs_g")
    budget = np.array([max(cost, small.mean())])
    at_random = float(random_wer_percent(pair, small, large, budget)[0])
    best = float(oracle_curve(pair, small, large).at(budget)[0])
    return (at_random - errors) / (at_random - best) if at_random - best > 1e-9 else None


def pgr_details(
    hparams: dict[str, Any], benchmark: Benchmark | None, records: Iterable[dict[str, Any]] | None
) -> dict[str, Any]:
    """Return `oracle_pgr` for a Result; an empty dict if there are no records of both models on the test split."""
    if benchmark is None or records is None:
        return {}
    try:
        closed = pgr_at(read_pair(hparams, benchmark.split), records)
    except UserError:
        return {}
    return {} if closed is None else {"oracle_pgr": closed}


def validate(router: Router, rows: Rows, hparams: dict[str, Any]) -> tuple[Pair, np.ndarray, Costs]:
    """Return both models' records on the validation utterances, the router's scores, and the cost of each route in GMACs.

    The costs are NaN if no target needs them.
    """
    split = hparams["valid_split"]
    scores, macs_g = judge(router, rows, RouterInputs.of(router, hparams, split, whisper_for(router, hparams)))
    pair = read_pair(hparams, split)
    place = {name: i for i, name in enumerate(pair.ids)}
    pair = pair.select(np.array([place[row["id"]] for row in rows]))
    if hparams["calibrate_macs_g"] is None:
        unknown = np.full(len(scores), np.nan)
        return pair, scores, Costs(unknown, unknown)
    return pair, scores, costs_in_macs(router, pair, macs_g, hparams["small"], hparams["large"])


def calibrate_threshold(router: Router, rows: Rows, hparams: dict[str, Any]) -> None:
    """Calibrate the threshold on the validation utterances for the target set in the YAML file; 0 if none is set."""
    pair, scores, costs = validate(router, rows, hparams)
    wished = {key: hparams[key] for key in CALIBRATIONS if hparams[key] is not None}
    router.threshold = threshold_for(pair, scores, costs, *next(iter(wished.items()))) if wished else 0.0
    share, area = (scores > router.threshold).mean(), area_under_roc(scores, pair.gains > 0)
    print(f"threshold {router.threshold:.3f}: {100 * share:.0f} % of the validation utterances go to the large model")
    router.history["decider"] = {"validation_auc": area, "threshold": router.threshold, "calibration": wished}


def save_cascade(router: Router, hparams: dict[str, Any], folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder with a router, its `threshold`, and the two models it chooses between."""
    sources = [model_source(hparams[key]) for key in ("small", "large")]
    names = [hparams["small_name"], hparams["large_name"]]
    cascade = CascadeTranscriber([load_transcriber(source) for source in sources], [router], [router.threshold], names)
    cascade.history = router.history
    limit = hparams["max_tokens_per_s"]
    decoding = {} if limit is None else {"max_tokens_per_s": limit}
    cascade.save(folder, sources, about | {"variant": str(hparams["variant"] or cascade.label)}, decoding)
