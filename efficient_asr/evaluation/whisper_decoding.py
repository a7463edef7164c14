"""Plain Whisper as a Transcriber: greedy decoding on 30 s windows.

Features are computed utterance by utterance with Whisper's own feature extractor, and each utterance is decoded on its own,
so that a transcript cannot depend on its batch mates.
"""

from __future__ import annotations

import pickle

import torch
from safetensors import SafetensorError
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from efficient_asr.data import SAMPLE_RATE, absolute_lengths
from efficient_asr.errors import UserError, did_you_mean
from efficient_asr.evaluation.transcript import Transcript

WINDOW_S = 30.0


class WhisperTranscriber:
    """A Whisper with its own processor.

    Arguments
    ---------
    model : WhisperForConditionalGeneration
        The model, put into evaluation mode.
    processor : WhisperProcessor
        Feature extractor and tokenizer.
    language : str, optional
        Language of the audio as an ISO 639-1 code; None lets Whisper detect it.

    Raises
    ------
    UserError
        Where the model does not know the language.
    """

    batched = False

    def __init__(
        self, model: WhisperForConditionalGeneration, processor: WhisperProcessor, language: str | None = None
    ) -> None:
        self.model, self.processor, self.device = model.eval(), processor, "cpu"
        self.options = {}
        if getattr(model.generation_config, "is_multilingual", False):
            self.options = {"task": "transcribe"}
            known = [token.strip("<|>") for token in model.generation_config.lang_to_id]
            if language is not None and language not in known:
                raise UserError(f"language: this Whisper does not know '{language}'.{did_you_mean(language, known)}")
            if language is not None:
                self.options["language"] = language
        elif language not in (None, "en"):
            raise UserError(f"language: this Whisper is English only, '{language}' was asked for")

    @classmethod
    def from_source(cls, source: str, language: str | None = None) -> WhisperTranscriber:
        """Load a Hugging Face directory or hub id in float32.

        Raises
        ------
        UserError
            Where it cannot be loaded.
        """
        try:
            model = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
            return cls(model, WhisperProcessor.from_pretrained(source), language)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"'{source}' is neither a model directory nor a hub id that can be reached ({reason})"
            ) from None
        except pickle.UnpicklingError:
            raise UserError(
                f"'{source}' cannot be loaded: its weights are a pickle with more in it than tensors, which could execute code "
                "and was not read; take a model with model.safetensors"
            ) from None

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch], at most 30 s each."""
        transcripts = []
        for wav, length in zip(wavs.cpu(), absolute_lengths(wavs.cpu(), wav_lens.cpu()).tolist(), strict=True):
            if length > WINDOW_S * SAMPLE_RATE:
                raise UserError(
                    f"{length / SAMPLE_RATE:.1f} s of audio in one utterance; Whisper takes {WINDOW_S:.0f} s, split it"
                )
            features = self.processor(
                wav[:length].numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"
            ).input_features
            tokens = self.model.generate(features.to(self.device), do_sample=False, num_beams=1, **self.options)
            text = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
            transcripts.append(Transcript(text.strip()))
        return transcripts

    def to(self, device: str) -> WhisperTranscriber:
        """Move to a device and return itself."""
        self.model.to(device)
        self.device = device
        return self

    def parameters_count(self) -> int:
        """Number of weights; those of the tied output layer once."""
        return sum(parameter.numel() for parameter in self.model.parameters())
