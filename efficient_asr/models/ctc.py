"""A CTC recogniser: front end (an optional technique on the waveform), encoder, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.RNN import LSTM
from torch import nn

from efficient_asr.data import SAMPLE_RATE, absolute_lengths, zero_padding
from efficient_asr.models.encoders.base import Continued, Encoder, EncoderState
from efficient_asr.models.parts import Part, build, describe, load_weights, save_folder
from efficient_asr.models.sources import read_config
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

FORMAT = {"format": "efficient_asr", "version": 1, "kind": "ctc"}


@dataclass
class CTCOutput:
    """Output of a head for a batch.

    Attributes
    ----------
    logits : torch.Tensor
        [batch, frames, labels].
    frame_lengths : torch.Tensor
        Number of unpadded frames of each utterance, [batch].
    details : list of dict
        What the technique did, for each utterance; empty if there is nothing to report.
    """

    logits: torch.Tensor
    frame_lengths: torch.Tensor
    details: list[dict[str, Any]] = field(default_factory=list)

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities in float32, [batch, frames, labels]."""
        return self.logits.float().log_softmax(dim=-1)


def samples_of(durations: Sequence[float] | np.ndarray, speed: float = 1.0) -> torch.Tensor:
    """Return the number of samples of audio with these durations in seconds, played at a speed, [utterances]."""
    return torch.from_numpy((np.asarray(durations) * SAMPLE_RATE / speed).astype(np.int64))


class CTCHead(Part):
    """An optional block and a linear layer to characters.

    Arguments
    ---------
    input_size : int
        Dimension of the encoder's states.
    n_labels : int
        Number of characters plus the blank.
    block : str
        `feedforward` (the papers' VanillaNN with LeakyReLU), `bilstm` (bidirectional), or `none`.
    neurons : int
        Width of the block, per direction.
    layers : int
        Depth of the block.
    dropout : float
        Dropout between the layers of the BiLSTM.
    frames_per_state : int
        The "upsampling" of arXiv 2303.06740: the linear layer emits m frames for every state, so that a downsampled
        encoder still has room for all characters.
    """

    def __init__(
        self,
        input_size: int,
        n_labels: int,
        block: str = "feedforward",
        neurons: int = 1024,
        layers: int = 1,
        dropout: float = 0.2,
        frames_per_state: int = 1,
    ) -> None:
        super().__init__()
        if frames_per_state < 1:
            raise UserError(f"frames_per_state: {frames_per_state} is less than 1")
        self.config = {
            "input_size": input_size, "n_labels": n_labels, "block": block, "neurons": neurons, "layers": layers,
            "dropout": dropout, "frames_per_state": frames_per_state,
        }  # fmt: skip
        self.frames_per_state = frames_per_state
        shape = [None, None, input_size]
        if block == "feedforward":
            self.block, width = VanillaNN(shape, nn.LeakyReLU, layers, neurons), neurons
        elif block == "bilstm":
            self.block = LSTM(neurons, input_shape=shape, num_layers=layers, dropout=dropout, bidirectional=True)
            width = 2 * neurons
        elif block == "none":
            self.block, width = nn.Identity(), input_size
        else:
            raise UserError(f"head_block: '{block}' is invalid; use feedforward, bilstm or none")
        self.linear = nn.Linear(width, n_labels * frames_per_state)

    def forward(self, states: torch.Tensor, frame_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [batch, frames * m, labels] and their lengths [batch] for states [batch, frames, dim]."""
        if isinstance(self.block, LSTM):
            frames = states.shape[1]  # SpeechBrain multiplies by it again, truncates, and returns the longest utterance
            relative = (frame_lengths.clamp(min=1) + 0.5) / frames
            states, _ = self.block(states, lengths=relative.clamp(max=1))
            states = nn.functional.pad(states, (0, 0, 0, frames - states.shape[1]))
        else:
            states = self.block(states)
        logits = self.linear(states)
        m = self.frames_per_state
        return logits.reshape(logits.shape[0], logits.shape[1] * m, -1), frame_lengths * m

    def read(self, encoder: Encoder, wavs: torch.Tensor, lengths: torch.Tensor) -> CTCOutput:
        """Run an encoder on `wavs` [batch, time] with `lengths` [batch], and the head on its output.

        A technique's head may instead run only the layers it needs.
        """
        encoded = encoder(wavs, lengths)
        return CTCOutput(*self(encoded.states, encoded.frame_lengths))

    def init_from(self, trained: nn.Module) -> dict[str, torch.Tensor]:
        """Return initial weights from a trained head (the last one of several), repeated for `frames_per_state`."""
        trained = trained.single_head()
        weights = trained.state_dict()
        if self.frames_per_state > 1 and trained.frames_per_state == 1:
            # All frames of a state start as copies of its single frame. CTC collapses them, so the texts stay the same.
            for key in ("linear.weight", "linear.bias"):
                weights[key] = torch.cat([weights[key]] * self.frames_per_state)
        return weights

    def single_head(self) -> CTCHead:
        """Return the head used to initialise another one: itself, or the last one if a technique has several."""
        return self

    def check(self, encoder: Encoder) -> None:
        """Raise a UserError if the head cannot be used with this encoder."""

    def to_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self.config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CTCHead:
        """Build a head with random weights."""
        return cls(**config)


class CTCModel(nn.Module):
    """CTC model that maps waveforms to character log-probabilities.

    Arguments
    ---------
    frontend : torch.nn.Module
        Maps `(wavs, lengths)` to `(wavs, lengths)`, such as a downsampler; `torch.nn.Identity` for none.
    encoder : Encoder
        The encoder.
    head : CTCHead
        The head.
    labels : CharacterLabels
        The alphabet.

    Attributes
    ----------
    history : dict
        Changes made by techniques when the network was created, by technique, such as the layers kept; plain data.
    """

    def __init__(self, frontend: nn.Module, encoder: Encoder, head: nn.Module, labels: CharacterLabels) -> None:
        super().__init__()
        self.frontend, self.encoder, self.head, self.labels = frontend, encoder, head, labels
        self.history: dict[str, Any] = {}

    def apply_frontend(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's input: samples [batch, time] and lengths [batch]."""
        lengths = absolute_lengths(wavs, wav_lens.to(wavs.device))
        with torch.autocast(wavs.device.type, enabled=False):  # in half precision, samples would have eight bits
            return self.frontend((zero_padding(wavs, lengths), lengths))

    def recognise(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        done: tuple[EncoderState, int] | None = None,
        **options: Any,
    ) -> CTCOutput:
        """Recognise a batch: `wavs` [batch, time] at 16 kHz, relative `wav_lens` [batch]; options are passed to the head.

        With `done`, a state and a number of layers, the encoder continues from the state after its lowest layers.
        """
        encoder = self.encoder if done is None else Continued(self.encoder, *done)
        return self.head.read(encoder, *self.apply_frontend(wavs, wav_lens), **options)

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Recognise a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, time] at 16 kHz.
        wav_lens : torch.Tensor
            Relative lengths, [batch].
        **options
            Passed to the head's `read`.

        Returns
        -------
        log_probs : torch.Tensor
            [batch, frames, labels].
        frame_lengths : torch.Tensor
            Number of unpadded frames of each utterance, [batch].
        """
        output = self.recognise(wavs, wav_lens, **options)
        return output.log_probs, output.frame_lengths

    def encoder_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of samples that reach the encoder for the given numbers of samples; both [batch]."""
        return lengths if isinstance(self.frontend, nn.Identity) else self.frontend.output_lengths(lengths)

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of CTC frames for the given numbers of samples; both [batch]."""
        return self.encoder.frame_lengths(self.encoder_lengths(lengths)) * self.head.frames_per_state

    def too_long(self, durations: Sequence[float] | np.ndarray, speed: float = 1.0) -> list[int]:
        """Return the indices of durations in seconds whose audio, after the front end, is longer than the encoder's window."""
        if not len(durations):
            return []
        encoded_s = self.encoder_lengths(samples_of(durations, speed)) / SAMPLE_RATE
        return (encoded_s > self.encoder.longest_s).nonzero().flatten().tolist()

    @property
    def technique(self) -> str:
        """Names of the techniques in the model; `none` if there are none or all are at their identity setting."""
        used = [*self.history, *(part.technique for part in self._used_parts())]
        return " + ".join(sorted(used)) or "none"

    @property
    def label(self) -> str:
        """Labels of the techniques' settings; `baseline` if there are none."""
        used, history = self._used_parts(), self.history.values()
        front = [part.label for part in used if part is self.frontend]
        rest = [part.label for part in used if part is not self.frontend]
        return (
            " + ".join([*front, *(str(entries["label"]) for entries in history if "label" in entries), *rest])
            or "baseline"
        )

    def _used_parts(self) -> list[nn.Module]:
        """The parts that belong to a technique and are not at their identity setting."""
        parts = (self.frontend, self.encoder, self.head)
        return [part for part in parts if isinstance(part, Part) and part.technique and not part.is_identity]

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the parts did over a whole benchmark, see `Part.summary`."""
        summaries = [part.summary(records) for part in self._used_parts()]
        return {key: value for summary in summaries for key, value in summary.items()}

    @property
    def few_frames_advice(self) -> str:
        """What to change about the parts if there are too few frames for the texts; ends with ` or ` unless empty."""
        advice = (part.few_frames_advice for part in self._used_parts())
        return "".join(f"{each} or " for each in advice if each)

    @property
    def settings(self) -> dict[str, Any]:
        """The parts and their arguments, as plain data."""
        return {name: describe(getattr(self, name)) for name in ("frontend", "encoder", "head")}

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Write a self-contained model folder: `config.json` (with `about`, for the record) and `model.safetensors`.

        An existing folder is replaced as a whole.
        """
        with atomic_write(Path(folder)) as partial:
            save_folder(partial, self.to_config() | {"about": about or {}}, self.state_dict())

    def to_config(self) -> dict[str, Any]:
        """Return everything but the weights, as plain data."""
        return FORMAT | self.settings | {"labels": self.labels.characters, "history": self.history}

    @classmethod
    def load(cls, folder: Path | str) -> CTCModel:
        """Load a model folder; nothing in it is executed.

        Raises
        ------
        UserError
            If the folder is damaged or contains another kind of model.
        """
        model = cls.from_config(read_config(str(folder)), f"{folder}/config.json")
        try:
            missing, unexpected = model.load_state_dict(load_weights(Path(folder)), strict=False)
        except RuntimeError as error:  # shapes
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{folder}: the weights do not match config.json ({reason})") from None
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected][:5])
            raise UserError(
                f"{folder}: the weights do not match config.json ({len(missing)} missing, {len(unexpected)} unexpected: {names})"
            )
        return model.eval()

    @classmethod
    def from_config(cls, config: dict[str, Any], what: str) -> CTCModel:
        """Build the model of `to_config` with random weights; `what` names the configuration in error messages.

        Raises
        ------
        UserError
            If the configuration is damaged or describes another kind of model.
        """
        if {key: config.get(key) for key in FORMAT} != FORMAT:
            raise UserError(f"{what} does not describe a CTC model of efficient_asr (version 1)")
        frontend, encoder, head = (build(config.get(key), f"{what}, {key}") for key in ("frontend", "encoder", "head"))
        characters = config.get("labels")
        if not isinstance(characters, list) or len(characters) + 1 != head.config["n_labels"]:
            raise UserError(f"{what}: the alphabet does not match the head; the folder is damaged")
        head.check(encoder)
        model = cls(frontend, encoder, head, CharacterLabels(characters))
        history = config.get("history")
        if isinstance(history, dict) and all(isinstance(entries, dict) for entries in history.values()):
            model.history = history
        return model

    def start_from(self, folder: Path | str) -> list[str]:
        """Load the weights of a trained model if name and shape match; its head is repeated for `frames_per_state`.

        Returns the names of the parameters that were not loaded.

        Raises
        ------
        UserError
            If the encoder itself does not match, or the alphabet differs.
        """
        trained = CTCModel.load(folder)
        if trained.labels.characters != self.labels.characters:
            raise UserError(
                f"pretrained_model: {folder} has a different alphabet ({''.join(trained.labels.characters)!r})"
            )
        before, now = (getattr(model.frontend, "label", "none") for model in (trained, self))
        if not getattr(trained.frontend, "is_identity", True) and before != now:
            raise UserError(
                f"pretrained_model: the encoder of {folder} was trained behind '{before}', and this one has '{now}'; set the "
                "keys of the front end as they were there"
            )
        other = {key: value for key, value in trained.state_dict().items() if not key.startswith("head.")}
        other |= {f"head.{key}": value for key, value in self.head.init_from(trained.head).items()}
        self.history = trained.history
        fitting, left = self.match(other)
        deeper = next(
            (key for key in other if key.startswith("encoder.") and "masked_spec" not in key and key not in fitting),
            None,
        )
        if deeper is not None:
            left = [deeper, *left]
        if any(key.startswith("encoder.") for key in left):
            raise UserError(f"pretrained_model: the encoder of {folder} does not match (for example, {left[0]})")
        return self.load_matched(fitting)

    def match(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return the weights that fit this model by name and shape, and the names of its weights for which there are none."""
        own = self.state_dict()
        fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
        return fitting, [key for key in own if key not in fitting]

    def load_matched(self, fitting: dict[str, torch.Tensor]) -> list[str]:
        """Load the weights found by `match`; return the names of the parameters that were not loaded."""
        self.load_state_dict(fitting, strict=False)
        return [name for name, _ in self.named_parameters() if name not in fitting]


def greedy_labels(log_probs: torch.Tensor, frame_lengths: torch.Tensor) -> list[list[int]]:
    """Return the best-path labels of [batch, frames, labels] with lengths [batch], without repetitions and blanks."""
    relative = frame_lengths / max(1, log_probs.shape[1])
    return ctc_greedy_decode(log_probs, relative, CharacterLabels.blank_index)


def greedy_texts(log_probs: torch.Tensor, frame_lengths: torch.Tensor, labels: CharacterLabels) -> list[str]:
    """Return the best-path text of each utterance, for [batch, frames, labels] with lengths [batch]."""
    return [labels.decode(path) for path in greedy_labels(log_probs, frame_lengths)]
