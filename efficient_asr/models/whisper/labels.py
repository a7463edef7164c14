"""Conversion between utterances and Whisper's tokens: prompt, languages, timestamps, text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, WhisperTokenizer

from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.text.normalise import spaced
from efficient_asr.utils.errors import UserError, did_you_mean

PREVIOUS = "<|startofprev|>"  # stands before the text that precedes an utterance


class WhisperLabels:
    """The tokens of a Whisper model.

    Arguments
    ---------
    tokenizer : WhisperTokenizer
        The tokenizer.
    config : PretrainedConfig
        Configuration of the network.
    generation_config : GenerationConfig
        Defines the special tokens.

    Attributes
    ----------
    start, end : int
        First and last token of every transcript.
    languages : dict of str to int
        Code -> token; empty for an English-only Whisper.
    timestamp_tokens : range
        One for every 0.02 s of the window and one for its end; a tokenizer may have words after them.
    default_language : str
        Language of training utterances that do not specify one.
    positions : int
        Longest sequence of tokens that the decoder takes.
    """

    def __init__(
        self, tokenizer: WhisperTokenizer, config: PretrainedConfig, generation_config: GenerationConfig
    ) -> None:
        self.tokenizer, self.generation = tokenizer, generation_config
        self.positions = config.max_target_positions
        self.default_language = "en"
        self.start, self.end = config.decoder_start_token_id, config.eos_token_id
        self.languages: dict[str, int] = {}
        if getattr(generation_config, "is_multilingual", False):
            self.languages = {token.strip("<|>"): index for token, index in generation_config.lang_to_id.items()}
        first = generation_config.no_timestamps_token_id + 1
        count = min(config.max_source_positions + 1, config.vocab_size - first)
        self.timestamp_tokens = range(first, first + max(0, count))

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the text, without timestamps."""
        return 4 if self.languages else 2

    @property
    def no_speech(self) -> int:
        """The token for silence."""
        return self.generation.no_timestamps_token_id - 1

    def encode_row(self, row: dict[str, Any]) -> list[int]:
        """Return the tokens of an utterance for training: prompt, text, end.

        With `timed`, the text is that of its `segments`, with timestamps. A `previous_text` stands in front of the prompt, cut at
        its beginning if there is no room for all of it.
        """
        timed = bool(row.get("timed"))
        prompt = self.prompt(row.get("language") or self.default_language, DecodingOptions(timestamps=timed))
        text = self._timed_tokens(row["segments"]) if timed else self._tokens(row["text"])
        tokens = [*prompt, *text, self.end]
        previous = self._tokens(row["previous_text"]) if row.get("previous_text") else []
        room = min(self.positions // 2, self.positions - len(tokens)) - 1
        if previous and room > 0:
            tokens = [self.tokenizer.convert_tokens_to_ids(PREVIOUS), *previous[-room:], *tokens]
        return tokens

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _timed_tokens(self, segments: list[dict[str, Any]]) -> list[int]:
        tokens = []
        for segment in segments:
            start, end = (
                self.timestamp_tokens[min(round(50 * segment[key]), len(self.timestamp_tokens) - 1)]
                for key in ("start_s", "end_s")
            )
            tokens += [start, *self._tokens(spaced(segment["text"])), end]
        return tokens

    def text_start(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the place of the first token after the prompt, for rows of `encode_row` [batch, tokens], [batch]."""
        start = (tokens == self.start).int().argmax(dim=1)
        last = (start + self.prompt_length - 1).clamp(max=tokens.shape[1] - 1)
        timed = tokens.gather(1, last[:, None])[:, 0] != self.generation.no_timestamps_token_id
        return start + self.prompt_length - timed.long()

    def prompt(self, language: str | None, options: DecodingOptions) -> list[int]:
        """Return the tokens that a hypothesis starts with.

        Raises
        ------
        UserError
            If the model does not know the language, cannot translate, or has no timestamps.
        """
        self.check_language(language)
        if options.timestamps:
            self.check_timestamps()
        prompt = [self.start]
        if self.languages:
            prompt += [self.languages[language], self.generation.task_to_id[options.task]]
        elif options.task == "translate":
            raise UserError("task: this Whisper is English-only and cannot translate")
        return prompt if options.timestamps else [*prompt, self.generation.no_timestamps_token_id]

    def text(self, tokens: list[int]) -> str:
        """Return the text of the tokens, without timestamps and special tokens."""
        tokens = [token for token in tokens if token not in self.timestamp_tokens]
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def check_language(self, language: str | None) -> None:
        """Reject a language that the model does not know.

        Raises
        ------
        UserError
            Naming the closest known language.
        """
        if not self.languages and language not in (None, "en"):
            raise UserError(f"language: this Whisper is English-only; got '{language}'")
        if self.languages and language is not None and language not in self.languages:
            hint = did_you_mean(language, self.languages)
            raise UserError(f"language: this Whisper does not know '{language}'.{hint}")

    def check_timestamps(self) -> None:
        """Raise a UserError if the model has no timestamp tokens."""
        if not self.timestamp_tokens:
            raise UserError(
                "timestamps: this Whisper has no timestamp tokens (sequential decoding of long audio needs them too)"
            )
