"""The teacher's texts and states on disk, one file per utterance; an interrupted run continues where it stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE, FeatureStore, Row, Rows, absolute_lengths, place_of
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.greedy import Decoder
from efficient_asr.models.whisper.labels import WhisperLabels
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.search import decode


class Targets:
    """What a Whisper hears in whole windows: its greedy text, and the states of encoder and decoder for that text.

    A file is valid for one place in an audio file, with its size and modification time, and one language.

    Arguments
    ---------
    folder : Path
        Folder of the files.
    meta : dict
        What they depend on; a folder with other metadata is refused. None to read only.
    """

    def __init__(self, folder: Path, meta: dict[str, Any] | None) -> None:
        self.store = FeatureStore(folder, meta, "targets_folder")

    def fill(self, teacher: Whisper, rows: Rows, options: DecodingOptions, device: str) -> int:
        """Compute what is missing, utterance by utterance; return how much that was.

        Arguments
        ---------
        teacher : Whisper
            The model; it encodes the whole window.
        rows : Rows
            The utterances; those without a language are in the teacher's default language.
        options : DecodingOptions
            For the greedy text.
        device : str
            Device to run the teacher on.
        """
        language = teacher.labels.default_language
        name = partial(file_name, default_language=language)
        wanted = self.store.missing(rows, name)
        seconds = max(0.0, float(wanted.durations.sum()))
        config = teacher.network.config
        needed = 2 * config.d_model * seconds * (50 + 5 * (config.decoder_layers + 1))  # about 5 tokens per second
        self.store.check_room(round(needed), "use fewer utterances, or another targets_folder")
        teacher = teacher.to(device).eval()

        def of_row(row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor) -> dict[str, torch.Tensor]:
            return compute(teacher, row, wavs.to(device), wav_lens, options)

        self.store.fill(wanted, name, of_row, "running teacher")
        return len(wanted)

    def with_text(self, rows: Rows, teacher: Whisper) -> Rows:
        """Return utterances with the teacher's text in the place of their own."""
        return rows.map(partial(_with_text, self.store, teacher.labels, teacher.labels.default_language))

    def read(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states by `file_name`, padded with zeros.

        These are of the encoder, [batch, positions, dim], and of the decoder, [batch, tokens, layers + 1, dim].
        """
        parts = [self.store.read(name) for name in names]
        pad = torch.nn.utils.rnn.pad_sequence
        return tuple(pad([part[key].float() for part in parts], batch_first=True) for key in ("encoder", "decoder"))


@torch.no_grad()
def compute(
    teacher: Whisper, row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor, options: DecodingOptions
) -> dict[str, torch.Tensor]:
    """Return tokens [tokens] with prompt and end, and states of encoder and decoder, for one utterance [1, time].

    Their shapes are [positions, dim] and [tokens - 1, layers + 1, dim]. The tokens are those of the text as training encodes it,
    without the space in front that Whisper writes.
    """
    lengths, language = absolute_lengths(wavs, wav_lens.to(wavs.device)), row.get("language")
    encoded = teacher.encode(wavs, lengths)
    (found,) = decode(teacher, encoded, [language or teacher.labels.default_language], options)
    tokens = teacher.labels.encode_row(row | {"text": found.text})[: teacher.network.config.max_target_positions]
    states: list[torch.Tensor] = []
    Decoder(teacher.network, encoded, len(tokens)).step(torch.tensor([tokens[:-1]], device=wavs.device), states)
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "encoder": encoded.states[0, : audio_positions(teacher, lengths)[0]].half(),
        "decoder": torch.stack(states, dim=2)[0].half(),
    }


def audio_positions(whisper: Whisper, lengths: torch.Tensor) -> torch.Tensor:
    """Return the number of encoder positions that audio of `lengths` samples [batch] fills, without silence, [batch]."""
    return encoder_frames(lengths.cpu()).clamp(min=1, max=whisper.window_samples * 50 // SAMPLE_RATE).long()


def file_name(row: Row, default_language: str) -> str:
    """Return the name under which the targets of an utterance are stored."""
    language = row.get("language") or default_language
    return f"{place_of(row)}\0{language}"


def _with_text(store: FeatureStore, labels: WhisperLabels, default_language: str, row: Row) -> Row:
    return {**row, "text": labels.text(store.read(file_name(row, default_language), "tokens")["tokens"].tolist())}
