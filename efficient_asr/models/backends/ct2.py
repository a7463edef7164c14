"""CTranslate2Whisper: a Whisper whose decoder runs in CTranslate2, and its encoder there or in torch.

CTranslate2's `generate` takes encoder output made elsewhere. So the encoder is CTranslate2's own for models that need nothing in
the place of the silence, on the whole window or on the audio's own length, and torch's for those that do.

The folder is one that faster-whisper opens as well; this package's files are in its subfolder `efficient_asr`.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch

from efficient_asr.models.backends import OWN_FOLDER, need
from efficient_asr.models.backends.base import ConvertedWhisper, write_own_files
from efficient_asr.models.loading import quiet_transformers
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded
from efficient_asr.models.whisper.greedy import FORBIDDEN, Found
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

FILES = ["tokenizer.json", "preprocessor_config.json"]  # that faster-whisper reads


class CTranslate2Whisper(ConvertedWhisper):
    """A Whisper in CTranslate2, on the CPU. It gives no entropies, and one confidence for all tokens of a hypothesis."""

    backend, samples = "ctranslate2", False  # its seed is read once in a process, so sampling could not be repeated
    token_scores = False

    def load_engine(self) -> CTranslate2Whisper:
        """Load the model.

        Raises
        ------
        UserError
            If a file is missing or damaged.
        """
        kind = "int8" if self.quantised else "float32"
        try:
            self.engine = ctranslate2.models.Whisper(
                str(self.folder), compute_type=kind, intra_threads=torch.get_num_threads(), inter_threads=1
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder}: {str(error).splitlines()[0]}; convert the model again") from None
        return self

    def encode(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Run the encoder, for whole windows on the batch together; see `ConvertedWhisper.encode`."""
        if self.encoder_padding is None and not (self.torch_encoder or hidden_states):
            return Encoded(self._encode(self.features(wavs, lengths)), lengths)
        return super().encode(wavs, lengths, hidden_states, languages)

    def positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return numbers of positions [batch] that differ from that of mel bands: CTranslate2 takes such states for features."""
        own = super().positions(lengths)
        return own + (own == self.network.config.num_mel_bins).long()

    def encode_one(self, wavs: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
        """Return states [count, dim]."""
        return self._encode(self.features(wavs, lengths, count * 2))[0]

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return states [batch, frames / 2, dim] of features [batch, mels, frames]."""
        storage = ctranslate2.StorageView.from_array(np.ascontiguousarray(features.numpy()))
        return torch.from_numpy(np.array(self.engine.encode(storage)))

    def generate(
        self, encoded: Encoded, prompt: torch.Tensor, limits: torch.Tensor, options: DecodingOptions, temperature: float
    ) -> Found:
        """Return what CTranslate2 finds; see `Whisper.generate`."""
        if encoded.is_ragged or len({*limits.tolist()}) > 1:  # CTranslate2 has one limit for the whole batch
            rows = [torch.tensor([row]) for row in range(len(prompt))]
            found = [self.generate(encoded.select(row), prompt[row], limits[row], options, temperature) for row in rows]
            return _join(found, self.labels.end)
        own, size, limit = self.network.generation_config, prompt.shape[1], int(limits[0])
        beams, penalty = options.num_beams, options.length_penalty if options.num_beams > 1 else 0.0
        first_max = getattr(own, "max_initial_timestamp_index", None)
        results = self.engine.generate(
            self._states(encoded),
            prompt.tolist(),
            beam_size=beams,
            length_penalty=penalty,
            max_length=max(2 * limit, limit + size - 1),  # CTranslate2 stops at half of it, or at it without the prompt
            return_scores=True,
            suppress_blank=options.suppress,
            suppress_tokens=list(own.suppress_tokens or []) if options.suppress else [],
            max_initial_timestamp_index=self.window_samples if first_max is None else first_max,
        )
        found = []
        for row, result in zip(prompt, results, strict=True):
            tokens = result.sequences_ids[0]
            # the score is the sum of the log-probabilities, divided by the number of tokens to the power of the penalty
            total = result.scores[0] * max(1, len(tokens)) ** penalty
            tokens = tokens if len(tokens) >= limit else [*tokens, self.labels.end]
            mean = max(total / len(tokens), FORBIDDEN)  # an empty text has a score of minus infinity with beams
            log_probs = torch.full((1, len(tokens)), mean)
            found.append(Found(torch.cat([row, torch.tensor(tokens)])[None], log_probs, log_probs * math.nan))
        return _join(found, self.labels.end)

    @staticmethod
    def _states(encoded: Encoded) -> Any:
        return ctranslate2.StorageView.from_array(np.ascontiguousarray(encoded.states.numpy()))

    def predict(
        self, encoded: Encoded, tokens: torch.Tensor, token_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Refuse: CTranslate2 gives no scores of single steps.

        Raises
        ------
        UserError
            Always.
        """
        raise UserError(f"{self.folder}: the backend ctranslate2 does not give the scores of single tokens")

    def first_step(self, encoded: Encoded) -> torch.Tensor:
        """Return logits [batch, vocabulary] after the start token that hold languages and silence, and nothing else."""
        logits = torch.full((len(encoded.states), self.network.config.vocab_size), -torch.inf)
        for row in range(len(logits)):
            states = self._states(encoded.select(torch.tensor([row])))
            start = [[self.labels.start]]
            silence = self.engine.generate(states, start, max_length=2, return_no_speech_prob=True)[0].no_speech_prob
            logits[row, self.labels.no_speech] = math.log(max(silence, 1e-10))
            speech = max(1 - silence, 1e-10)
            if self.engine.is_multilingual:
                for token, probability in self.engine.detect_language(states)[0]:
                    logits[row, self.labels.languages[token.strip("<|>")]] = math.log(max(probability, 1e-10) * speech)
            else:
                logits[row, self.labels.start] = math.log(speech)
        return logits

    def detect_languages(self, logits: torch.Tensor) -> list[str]:
        """Return the most likely language of each row of `first_step` [batch, vocabulary].

        Raises
        ------
        UserError
            If CTranslate2 cannot detect the languages of this model: its vocabulary is not that of a published Whisper.
        """
        if not self.engine.is_multilingual:
            raise UserError(f"{self.folder}: CTranslate2 cannot detect this model's languages; give the language")
        return super().detect_languages(logits)


def _join(found: list[Found], end: int) -> Found:
    """Return hypotheses, each with one row, as one batch, padded with the end token."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Found(
        pad([each.tokens[0] for each in found], batch_first=True, padding_value=end),
        pad([each.log_probs[0] for each in found], batch_first=True),
        pad([each.entropies[0] for each in found], batch_first=True),
    )


def convert(whisper: Whisper, folder: Path, quantise: str | None = None) -> None:
    """Write a folder for the backend `ctranslate2`, which faster-whisper opens too.

    Arguments
    ---------
    whisper : Whisper
        The model, in float32; see `Whisper.plain`.
    folder : Path
        The folder; written atomically.
    quantise : str, optional
        `decoder-int8`, `encoder-int8` or `int8`. Whatever CTranslate2 runs is int8 with any of them; an encoder that torch runs
        is int8 with the last two.

    Raises
    ------
    UserError
        If a package is missing, or the model has layers that a plain Whisper does not have.
    """
    need("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    whisper = whisper.plain()
    padding = whisper.encoder_padding
    torch_encoder = padding is not None and padding.tail(whisper) is not None
    with tempfile.TemporaryDirectory() as plain, atomic_write(Path(folder)) as partial:
        source = Path(plain) / "model"
        with whisper.whole_window(), quiet_transformers():
            whisper.save(source)
            TransformersConverter(str(source), copy_files=FILES).convert(
                str(partial), quantization="int8" if quantise else None
            )
        write_own_files(whisper, partial / OWN_FOLDER, "ctranslate2", quantise, torch_encoder)
