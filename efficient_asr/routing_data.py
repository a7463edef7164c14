"""What deciders are trained and judged on: the encoder states, or audio, that they look at, and the errors of two models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from efficient_asr.data import SAMPLE_RATE, Row, Rows, StateStore, load_row
from efficient_asr.errors import UserError
from efficient_asr.evaluation.cascade import CascadeTranscriber
from efficient_asr.evaluation.evaluator import Benchmark
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.evaluation.transcriber import fingerprint, load_transcriber
from efficient_asr.evaluation.whisper_decoding import WhisperTranscriber
from efficient_asr.models import resolve_source
from efficient_asr.models.loading import load_config
from efficient_asr.models.routing import Evidence, Router
from efficient_asr.routing import CALIBRATIONS, HOW, Costs, Pair, oracle_curve, random_wer_percent
from efficient_asr.techniques.decider import TARGETS, Decider, LogMelDecider, TranscriptDecider


def new_router(hparams: dict[str, Any]) -> Decider:
    """Make the decider of a YAML file, in the shape of the states that it will see.

    Its `states_from` is the Whisper that computes these on the fly, where no store has them.
    """
    looks_at, shape = hparams["looks_at"], {"channels": hparams["channels"], "strides": hparams["strides"]}
    if looks_at == "audio":
        return LogMelDecider(**shape)
    if looks_at == "transcript":
        return TranscriptDecider()
    if looks_at not in ("encoder", "large_encoder"):
        raise UserError(f"looks_at: '{looks_at}' is not audio, encoder, transcript or large_encoder")
    source = resolve_source(hparams["small" if looks_at == "encoder" else "large"])
    try:
        config = load_config(source)
    except UserError as error:
        raise UserError(f"small, large: {error}") from None
    if config.model_type != "whisper":
        raise UserError(
            f"small, large: a decider on encoder states needs a Whisper, '{source}' is of type '{config.model_type}'"
        )
    router = Decider(config.encoder_layers + 1, config.d_model, looks_at=looks_at, frames=hparams["frames"], **shape)
    if not hparams["states_folder"]:
        router.states_from = WhisperTranscriber.from_source(source)
    return router


def complete(router: Decider, evidence: Evidence) -> Evidence:
    """Compute the encoder states that a decider looks at, where no store had them."""
    if getattr(router, "states_from", None) is not None and evidence.hidden_states is None:
        transcriber = router.states_from.to(str(next(router.parameters()).device))
        wav_lens = evidence.lengths / evidence.wavs.shape[1]
        evidence.hidden_states = transcriber.encode(evidence.wavs, wav_lens, hidden_states=True).hidden_states
    return evidence


def check_settings(hparams: dict[str, Any]) -> None:
    """See that settings and models fit before anything is trained.

    Raises
    ------
    UserError
        Naming the key, or the records of another model.
    """
    if sum(hparams[key] is not None for key in CALIBRATIONS) > 1:
        raise UserError(f"give one of {', '.join(CALIBRATIONS)}, not several")
    if hparams["target"] not in TARGETS:
        raise UserError(f"target: '{hparams['target']}' is not {' or '.join(TARGETS)}")
    for side in ("small", "large"):
        source = resolve_source(hparams[side])
        if not os.path.isdir(source):
            continue  # a hub id
        model = fingerprint(source)
        for split in (hparams["train_split"], hparams["valid_split"]):
            meta = Path(hparams["labels_folder"]) / f"{hparams[f'{side}_name']}-{split}.meta.json"
            if meta.is_file() and json.loads(meta.read_text(encoding="utf-8")).get("model") != model:
                raise UserError(
                    f"{side}: {meta.with_suffix('').with_suffix('.jsonl')} holds what another model than {source} did"
                )


def read_pair(hparams: dict[str, Any], split: str) -> Pair:
    """Read the records of both models on a split."""
    folder = Path(hparams["labels_folder"])
    return Pair.read(*(folder / f"{hparams[name]}-{split}.jsonl" for name in ("small_name", "large_name")))


class Looker:
    """Gives a router what it looks at: encoder states from a store, the small model's records, or the audio.

    Arguments
    ---------
    store : StateStore or None
        States that were kept; without them there is the audio, from which `complete` computes them on the fly.
    records : dict or None
        What the small model wrote, by id.
    """

    def __init__(self, store: StateStore | None, records: dict[str, dict[str, Any]] | None = None) -> None:
        self.store, self.records = store, records

    @classmethod
    def of(cls, router: Router, hparams: dict[str, Any], split: str) -> Looker:
        """Open what the YAML names.

        Raises
        ------
        UserError
            Where there are no states, or only of fewer frames than the decider wants.
        """
        if router.looks_at == "transcript":
            pair = read_pair(hparams, split)
            return cls(None, dict(zip(pair.ids, pair.small, strict=True)))
        if router.looks_at == "audio" or not hparams["states_folder"]:
            return cls(None)
        side = "small" if router.looks_at == "encoder" else "large"
        store = StateStore(Path(hparams["states_folder"]) / f"{hparams[f'{side}_name']}-{split}")
        if store.shape != (router.config["states"], router.config["input_size"]):
            raise UserError(
                f"{store.folder} holds {store.shape[0]} states of {store.shape[1]}, not those of {hparams[side]}"
            )
        if store.meta["frames"] == "own" and router.frames == "window":
            raise UserError(
                f"frames: {store.folder} keeps the frames of the audio only; write --frames own, or run "
                "scripts/label_routing.py with --frames window"
            )
        return cls(store)

    def look(self, row: Row) -> dict[str, torch.Tensor]:
        """Return `wav` [time], `states` [frames, states, dim], or the small model's `record`."""
        if self.records is not None:
            return {"record": self.records[row["id"]]}
        if self.store is None:
            return {"wav": load_row(row)}
        if row["id"] not in self.store:
            raise UserError(f"{self.store.folder} has no states of utterance '{row['id']}'; {HOW}")
        return {"states": self.store.read(row["id"])}


class Examples(Dataset):
    """Items `id`, `duration`, `gain` and what the router looks at."""

    def __init__(self, rows: Rows, looker: Looker, gains: dict[str, float]) -> None:
        missing = next((row["id"] for row in rows if row["id"] not in gains), None)
        if missing is not None:
            raise UserError(f"labels_folder: there is no record of utterance '{missing}'; {HOW}")
        self.rows, self.looker, self.gains = rows, looker, gains

    @classmethod
    def of(cls, router: Router, rows: Rows, hparams: dict[str, Any], split: str) -> Examples:
        """Read the records of both models, and open what the router looks at."""
        pair = read_pair(hparams, split)
        return cls(rows, Looker.of(router, hparams, split), dict(zip(pair.ids, pair.gains.tolist(), strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        about = {"id": row["id"], "duration": row["duration"]}
        try:
            return about | {"gain": self.gains[row["id"]]} | self.looker.look(row)
        except UserError as error:
            return about | {"problem": str(error)}


class ExampleBatch(SimpleNamespace):
    """`id`, `duration` [batch], `gains` [batch], `evidence`, `problems`."""

    def to(self, device: Any) -> ExampleBatch:
        """Move to a device and return itself."""
        evidence = self.evidence
        evidence.wavs, evidence.lengths = evidence.wavs.to(device), evidence.lengths.to(device)
        if evidence.hidden_states is not None:
            evidence.hidden_states = tuple(states.to(device) for states in evidence.hidden_states)
        self.gains = self.gains.to(device)
        return self


def collate_examples(items: list[dict[str, Any]]) -> ExampleBatch:
    """Make a padded batch; states become float32."""
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
    batch.evidence = Evidence(torch.zeros(len(good), 0), lengths)
    if "wav" in good[0]:
        batch.evidence.wavs = pad([item["wav"] for item in good], batch_first=True)
    elif "record" in good[0]:
        batch.evidence.details = [item["record"] for item in good]
        batch.evidence.texts = [item["record"]["text"] for item in good]
    else:
        batch.evidence.hidden_states = pad([item["states"] for item in good], batch_first=True).float().unbind(dim=2)
    return batch


def judge(router: Router, rows: Rows, looker: Looker) -> tuple[np.ndarray, np.ndarray]:
    """Return a router's scores and what each cost in GMACs, [utterances]; one utterance after the other."""
    router.eval()
    scores, macs_g = [], []
    device = next(router.parameters()).device
    for row in rows:
        batch = collate_examples([{"id": row["id"], "duration": row["duration"], "gain": 0.0} | looker.look(row)])
        with torch.no_grad():
            evidence = complete(router, batch.to(device).evidence)
            counted = count_macs(router, evidence)
        scores.append(float(counted.output))
        macs_g.append(counted.macs / 1e9)
    return np.array(scores), np.array(macs_g)


def encoder_macs_g(transcriber: WhisperTranscriber) -> float:
    """Return what a Whisper's encoder costs for a window, in GMACs."""
    return count_macs(transcriber.encode, torch.zeros(1, SAMPLE_RATE), torch.ones(1)).macs / 1e9


def costs_in_macs(router: Router, pair: Pair, router_macs_g: np.ndarray, small: str, large: str) -> Costs:
    """Return what each utterance costs in GMACs on both routes, with the encoder that the order pays for."""
    side = {"encoder": "small", "large_encoder": "large"}.get(router.looks_at)
    encoders = {}
    if side is not None:
        transcriber = WhisperTranscriber.from_source(resolve_source(small if side == "small" else large))
        encoders = {f"{side}_encoder": encoder_macs_g(transcriber)}
    return Costs.of(router.looks_at, *pair.values("macs_g"), router=router_macs_g, **encoders)


def gain_closed_at(pair: Pair, records: Iterable[dict[str, Any]]) -> float | None:
    """Return the share of the oracle's gain that a cascade closed, at the cost it had: what it really did, against its two
    models.

    None where the oracle gains nothing over choosing at random at that cost.
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


def gain_details(cascade: Any, benchmark: Benchmark | None, records: Iterable[dict[str, Any]] | None) -> dict[str, Any]:
    """Return `oracle_gain_closed` for a Result; nothing where the models have no records of the test split."""
    if benchmark is None or records is None:
        return {}
    try:
        closed = gain_closed_at(read_pair(cascade.hparams, benchmark.split), records)
    except UserError:
        return {}
    return {} if closed is None else {"oracle_gain_closed": closed}


def validate(router: Router, rows: Rows, hparams: dict[str, Any]) -> tuple[Pair, np.ndarray, Costs]:
    """Return both models' records of the validation utterances, the router's scores, and what each route costs in GMACs."""
    split = hparams["valid_split"]
    scores, macs_g = judge(router, rows, Looker.of(router, hparams, split))
    pair = read_pair(hparams, split)
    place = {name: i for i, name in enumerate(pair.ids)}
    pair = pair.select(np.array([place[row["id"]] for row in rows]))
    return pair, scores, costs_in_macs(router, pair, macs_g, hparams["small"], hparams["large"])


def save_cascade(router: Router, hparams: dict[str, Any], folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder that holds a router, with its `threshold`, and the two models between which it chooses."""
    sources = [resolve_source(hparams[key]) for key in ("small", "large")]
    names = [hparams["small_name"], hparams["large_name"]]
    cascade = CascadeTranscriber([load_transcriber(source) for source in sources], [router], [router.threshold], names)
    cascade.history = router.history
    limit = hparams["max_tokens_per_s"]
    decoding = {} if limit is None else {"max_tokens_per_s": limit}
    cascade.save(folder, sources, about | {"variant": str(hparams["variant"] or cascade.label)}, decoding)
