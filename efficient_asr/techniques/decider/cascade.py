"""A cascade: several recognisers from small to large, with a router between neighbours that keeps easy utterances with the
smaller model.

At every step, the router scores the remaining utterances. The router's input determines what has to be computed first:

- `audio`: nothing; afterwards the smaller model runs, or the cascade moves to the next model.
- `encoder`: the smaller model's encoder, whose states the smaller decoder reuses (small encoder -> decider -> small decoder
  or next model).
- `transcript` and `small_model`: the whole smaller model (small model -> confidence -> larger model).
- `large_encoder`: the next model's encoder, as in arXiv 2309.12712; afterwards easy utterances run the whole smaller model,
  hard ones only the larger decoder.

A batch is split by route and reassembled, and encoder states are never computed twice.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from efficient_asr.data import absolute_lengths, check_wavs, zero_padding
from efficient_asr.inference.transcriber import MANIFEST, Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.parts import build, describe, load_weights, save_folder
from efficient_asr.models.sources import read_config
from efficient_asr.techniques.decider.router import AFTER_SMALL, STATES_OF, Router, RouterInput
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

_MODEL = re.compile(r"model-\d+|[A-Za-z0-9][\w.-]*/[\w][\w.-]*")  # a directory in the folder, or a hub id
FORMAT = {"format": "efficient_asr", "version": 1, "kind": "cascade"}


class CascadeTranscriber(Transcriber):
    """Recognisers from small to large with routers between them.

    Arguments
    ---------
    transcribers : list of Transcriber
        From small to large; a model whose encoder states a router uses must have `encode` and `decode`.
    routers : list of Router
        One fewer than transcribers.
    thresholds : list of float
        One per router: utterances with a higher score move to the next model. Infinity keeps all, minus infinity none.
    names : list of str, optional
        Names of the models in `route`.

    Raises
    ------
    UserError
        If the numbers of models, routers and thresholds do not match, or a router needs an encoder that is not a Whisper's.
    """

    technique = "decider"

    def __init__(
        self,
        transcribers: list[Any],
        routers: list[Router],
        thresholds: list[float],
        names: list[str] | None = None,
    ) -> None:
        if len(transcribers) < 2 or len(routers) != len(transcribers) - 1 or len(thresholds) != len(routers):
            raise UserError(
                f"a cascade of {len(transcribers)} models needs one router and one threshold between neighbouring models, "
                f"but has {len(routers)} routers and {len(thresholds)} thresholds"
            )
        self.transcribers, self.routers, self.thresholds = list(transcribers), list(routers), list(thresholds)
        self.names = names or (
            ["small", "large"] if len(transcribers) == 2 else [f"model_{i}" for i in range(len(transcribers))]
        )
        for i, router in enumerate(self.routers):
            router.eval()
            needed = {"small": i, "large": i + 1}.get(STATES_OF.get(router.router_input))
            if needed is not None and not self.transcribers[needed].shows_encoder:
                raise UserError(
                    f"the router '{router.label}' needs the encoder states of a Whisper, "
                    f"but '{self.names[needed]}' is not a Whisper"
                )
            if needed is not None:
                check_window(router, self.transcribers[needed], self.names[needed])
        self.batched = all(t.batched for t in self.transcribers)
        self.counts_macs = all(t.counts_macs for t in self.transcribers)
        self.thop_counts = all(t.thop_counts for t in self.transcribers)
        normalisers = {t.normaliser for t in self.transcribers}
        self.normaliser = None if None in normalisers else normalisers.pop()
        windows = [t.window_s for t in self.transcribers if t.window_s is not None]
        self.window_s = min(windows) if windows else None
        self.history: dict[str, Any] = {}

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that all models know which have a choice."""
        known = [t.languages for t in self.transcribers if t.languages]
        return tuple(code for code in known[0] if all(code in each for each in known)) if known else ()

    @property
    def language(self) -> str | None:
        """Language of the audio; None if it is detected."""
        return next((t.language for t in self.transcribers if t.languages), None)

    @language.setter
    def language(self, language: str | None) -> None:
        for transcriber in self.transcribers:
            if transcriber.languages:
                transcriber.language = language

    @property
    def changes(self) -> list[str]:
        """What the models compute differently from the stored ones."""
        return list(dict.fromkeys(change for transcriber in self.transcribers for change in transcriber.changes))

    @property
    def label(self) -> str:
        """Label of routers and thresholds."""
        return ", ".join(f"{r.label} > {t:.3g}" for r, t in zip(self.routers, self.thresholds, strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """Routers, thresholds and the settings of the models, as plain data."""
        models = [transcriber.settings for transcriber in self.transcribers]
        return {"routers": [describe(r) for r in self.routers], "thresholds": self.thresholds, "models": models}

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch]."""
        wavs, wav_lens = check_wavs(wavs, wav_lens)
        out: list[Transcript | None] = [None] * len(wavs)
        left = list(range(len(wavs)))
        lengths = absolute_lengths(wavs, wav_lens)
        wavs = zero_padding(wavs, lengths)
        scores: list[list[float]] = [[] for _ in left]
        encoded = None  # encoder output of the next model for the remaining utterances
        for i, transcriber in enumerate(self.transcribers):
            batch = _Batch(wavs[left], lengths[left], transcriber, encoded)
            if i == len(self.routers):
                keep, encoded = list(range(len(left))), None
            else:
                ahead = _Batch(wavs[left], lengths[left], self.transcribers[i + 1])
                values = self._score(self.routers[i], batch, ahead)
                for row, value in zip(left, values.tolist(), strict=True):
                    scores[row].append(value)
                keep = [j for j, value in enumerate(values.tolist()) if not value > self.thresholds[i]]
                sent_on = [j for j in range(len(left)) if j not in set(keep)]
                encoded = ahead.encoded.select(torch.tensor(sent_on)) if ahead.encoded is not None and sent_on else None
            for j, transcript in zip(keep, batch.transcripts(keep), strict=True):
                row = left[j]
                details = {"route": self.names[i], "router_scores": scores[row]}
                out[row] = Transcript(transcript.text, details | transcript.details)
            if i == len(self.routers) or not sent_on:
                break
            left = [left[j] for j in sent_on]
        return out

    def for_long_audio(self) -> CascadeTranscriber:
        """Return the same cascade, set up for segments of long audio."""
        pieces = copy.copy(self)
        pieces.transcribers = [t.for_long_audio() for t in self.transcribers]
        return pieces

    @staticmethod
    def _score(router: Router, batch: _Batch, ahead: _Batch) -> torch.Tensor:
        """Compute the router's inputs and return its scores [batch]."""
        inputs = RouterInput(batch.wavs, batch.lengths)
        if router.router_input in STATES_OF:
            side = {"small": batch, "large": ahead}[STATES_OF[router.router_input]]
            inputs.hidden_states = side.encode().hidden_states
        if router.router_input in AFTER_SMALL:
            seen = batch.transcripts(list(range(len(batch.wavs))))
            inputs.texts, inputs.details = [t.text for t in seen], [t.details for t in seen]
        device = next((p.device for p in router.parameters()), torch.device("cpu"))
        inputs.wavs, inputs.lengths = inputs.wavs.to(device), inputs.lengths.to(device)
        with torch.no_grad():
            return router(inputs).float().cpu()

    def to(self, device: str) -> CascadeTranscriber:
        """Move all models and routers to a device and return self."""
        for part in (*self.transcribers, *self.routers):
            part.to(device)
        return self

    def parameters_count(self) -> int:
        """Number of weights of all models and routers."""
        routers = sum(p.numel() for router in self.routers for p in router.parameters())
        return routers + sum(t.parameters_count() for t in self.transcribers)

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return the share of utterances handled by each model; the last model is the largest."""
        routes = []
        for record in records:  # in long audio every segment has a route
            routes += (
                [record["route"]] if "route" in record else [piece["route"] for piece in record.get("segments", ())]
            )
        shares = {name: routes.count(name) / max(1, len(routes)) for name in self.names}
        return {"route_shares": shares, "large_model_rate": shares[self.names[-1]]}

    def save(
        self,
        folder: Path,
        sources: list[str],
        about: dict[str, Any] | None = None,
        decoding: dict[str, Any] | None = None,
    ) -> None:
        """Write a self-contained model folder: routers, thresholds, decoding options, and copies of the models of `sources`.

        A source that is not a local directory (a hub id) is referenced instead of copied.
        """
        state = {
            f"{i}.{key}": value for i, router in enumerate(self.routers) for key, value in router.state_dict().items()
        }
        state = state or {"none": torch.zeros(1)}
        thresholds = [str(t) if math.isinf(t) else t for t in self.thresholds]  # JSON has no infinity
        rest = {
            "thresholds": thresholds,
            "names": self.names,
            "history": self.history,
            "about": about or {},
            "decoding": decoding or {},
        }
        rest |= {"routers": [describe(router) for router in self.routers]}
        with atomic_write(Path(folder)) as partial:
            models = [save_cascade_model(partial, i, source) for i, source in enumerate(sources)]
            save_folder(partial, FORMAT | rest | {"models": models}, state)

    @classmethod
    def load(cls, folder: Path | str, load_model: Any) -> CascadeTranscriber:
        """Load a model folder; `load_model(path)` loads each model in it. No code from the folder is executed.

        Raises
        ------
        UserError
            If the folder is damaged or not a cascade.
        """
        folder = Path(folder)
        routers, thresholds, names = load_routers(folder)
        config = read_config(str(folder))
        try:
            models = list(map(str, config["models"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder}/config.json is damaged ({error!r})") from None
        odd = [name for name in models if not _MODEL.fullmatch(name)]
        if odd:
            raise UserError(
                f"{folder}/config.json: '{odd[0]}' is neither a model in this folder nor a hub id; do not trust it"
            )
        if len(names) != len(models):
            raise UserError(f"{folder}/config.json is damaged ({len(models)} models, but {len(names)} names)")
        inside = [str(folder / name) if name.startswith("model-") else name for name in models]
        cascade = cls([load_model(path) for path in inside], routers, thresholds, names)
        history = config.get("history")
        cascade.history = history if isinstance(history, dict) else {}
        return cascade


def load_cascade(
    folder: str, load_model: Callable[..., Transcriber], language: str | None, options: dict[str, Any]
) -> CascadeTranscriber:
    """Load a cascade's folder for `load_transcriber`, with the decoding options stored in it.

    Raises
    ------
    UserError
        If `language` is 'manifest', or the folder is damaged.
    """
    if language == MANIFEST:
        raise UserError("language: 'manifest' is not supported by cascades; use one language, or null to detect it")
    stored = read_config(folder).get("decoding") or {}
    if not isinstance(stored, dict):
        raise UserError(f"{folder}/config.json is damaged (decoding: {stored!r})")
    decoding = stored | options
    return CascadeTranscriber.load(folder, lambda path: load_model(path, **decoding))


def load_routers(folder: Path) -> tuple[list[Router], list[float], list[str]]:
    """Load the routers of a cascade's folder, their thresholds and the names of the models, but not the models.

    Raises
    ------
    UserError
        If the folder is damaged or not a cascade.
    """
    config = read_config(str(folder))
    if {key: config.get(key) for key in FORMAT} != FORMAT:
        raise UserError(f"{folder}/config.json does not describe a cascade of efficient_asr (version 1)")
    try:
        routers = [build(entry, f"{folder}/config.json, routers") for entry in config["routers"]]
        thresholds, names = [float(threshold) for threshold in config["thresholds"]], list(map(str, config["names"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json is damaged ({error!r})") from None
    if not all(isinstance(router, Router) for router in routers):
        raise UserError(
            f"{folder}/config.json: an entry of 'routers' is not a router; the folder is damaged or cannot be trusted"
        )
    weights = load_weights(folder)
    for i, router in enumerate(routers):
        own = {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(f"{i}.")}
        try:
            router.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{folder}: the weights do not match config.json ({reason})") from None
    return routers, thresholds, names


def check_window(router: Router, transcriber: Any, name: str) -> None:
    """Reject a router that averages over the whole window, for a Whisper whose states end with the longest utterance of a batch.

    Raises
    ------
    UserError
        Naming the Whisper.
    """
    padding = transcriber.model.encoder_padding
    if getattr(router, "frames", "unpadded") == "padded" and padding is not None and not padding.fills_window:
        raise UserError(
            f"frames: the router '{router.label}' needs the states of the whole window, but '{name}' encodes only "
            f"{padding.label}; use encoder_padding 30 or silence_cache, or a decider trained with --frames unpadded"
        )


class _Batch:
    """Some utterances with the encoder states and transcripts that one model has computed for them so far."""

    def __init__(self, wavs: torch.Tensor, lengths: torch.Tensor, transcriber: Any, encoded: Any = None) -> None:
        longest = max(1, int(lengths.max()))
        self.wavs, self.lengths, self.transcriber = wavs[:, :longest], lengths, transcriber
        self.encoded, self._transcripts = encoded, None

    def encode(self) -> Any:
        """Return the encoder states, computed once."""
        if self.encoded is None or self.encoded.hidden_states is None:
            self.encoded = self.transcriber.encode(self.wavs, self.lengths / self.wavs.shape[1], hidden_states=True)
        return self.encoded

    def transcripts(self, rows: list[int]) -> list[Transcript]:
        """Return the transcripts of some rows, reusing encoder states if there are any."""
        if not rows:
            return []
        if self._transcripts is not None:
            return [self._transcripts[row] for row in rows]
        if self.encoded is not None:
            found = self.transcriber.decode(self.encoded.select(torch.tensor(rows)))
        else:
            longest = max(1, int(self.lengths[rows].max()))
            found = self.transcriber.transcribe(self.wavs[rows, :longest], self.lengths[rows] / longest)
        if len(rows) == len(self.wavs):
            self._transcripts = found
        return found


def save_cascade_model(folder: Path, number: int, source: str) -> str:
    """Copy a model directory into a cascade's folder as `model-<number>`; return its name, or the hub id."""
    if not os.path.isdir(source):
        return source
    target = folder / f"model-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target)
    return target.name
