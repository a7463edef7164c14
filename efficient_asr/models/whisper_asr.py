"""Whisper as a recogniser: 30 s windows in, hypotheses out, in two steps that can be taken apart.

`encode` runs the encoder once; everything after it (language detection, greedy or beam search, repeated decoding at higher
temperatures) takes its states, so that nothing is encoded twice. Search itself is transformers' generation with its cache; the
rules around it (suppressed tokens, timestamps, fallback, silence) are those of Whisper (arXiv 2212.04356, section 4.5).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from efficient_asr import distributed
from efficient_asr.data import SAMPLE_RATE
from efficient_asr.errors import UserError, did_you_mean
from efficient_asr.models.adapters import load_adapted
from efficient_asr.models.components import find_class
from efficient_asr.models.decoding import (
    DecodingOptions,
    Encoded,
    Hypothesis,
    Limits,
    LoopStop,
    compression_ratio,
    entropy,
    without_loop,
)
from efficient_asr.models.loading import is_adapter, load_config, load_network
from efficient_asr.models.timestamps import TimestampRules, split_segments
from efficient_asr.models.tokens import complete_generation_config
from efficient_asr.models.whisper import HOP, LogMel


class Whisper(nn.Module):
    """A Whisper with its tokenizer.

    Arguments
    ---------
    network : WhisperForConditionalGeneration
        The network; its generation configuration names the special tokens.
    tokenizer : WhisperTokenizer
        The tokenizer.
    """

    technique, label = "none", "baseline"
    network_class = WhisperForConditionalGeneration
    fixed_cost = True  # greedy decoding of as many tokens costs the same whatever they are

    def __init__(self, network: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.log_mel = LogMel(network.config.num_mel_bins)
        self.history: dict[str, Any] = {}
        about = getattr(network.config, "about", None) or {}  # of a model folder that a recipe left behind
        if about.get("technique"):
            self.technique, self.label = about["technique"], about["variant"]
            self.history = {"trained": about["details"]}
        self.default_language = "en"  # of training rows that do not name theirs
        generation = network.generation_config
        self.start, self.end = network.config.decoder_start_token_id, network.config.eos_token_id
        self.languages: dict[str, int] = {}  # by code
        if getattr(generation, "is_multilingual", False):
            self.languages = {token.strip("<|>"): index for token, index in generation.lang_to_id.items()}
        self.window_samples = network.config.max_source_positions * 2 * HOP
        first = generation.no_timestamps_token_id + 1
        # every 0.02 s of the window and its end; a tokenizer may have words behind them
        count = min(network.config.max_source_positions + 1, network.config.vocab_size - first)
        self.timestamp_tokens = range(first, first + max(0, count))

    @classmethod
    def from_source(cls, source: str) -> Whisper:
        """Load a Hugging Face directory or hub id in float32; of a model folder with a technique in it, the class of that.

        A LoRA that peft saved is merged into the base that it names.

        Raises
        ------
        UserError
            Where it cannot be loaded.
        """
        source = os.fspath(source)
        if is_adapter(source):
            return load_adapted(cls, source)
        config = load_config(source)
        if config.model_type != "whisper":
            raise UserError(f"'{source}' is of type '{config.model_type}', not a Whisper")
        adapter = getattr(config, "adapter", None)
        kind = find_class(adapter, source) if adapter else cls
        if not issubclass(kind, Whisper):
            raise UserError(f"{source}: '{adapter}' is not a Whisper; the model folder is damaged or not to be trusted")
        tokenizer = load_config(source, WhisperTokenizer)
        network = load_network(kind.network_class, source)
        complete_generation_config(network.generation_config, tokenizer, source)
        return kind(network, tokenizer).complete(source).eval()

    def complete(self, source: str) -> Whisper:
        """Load what a technique keeps beside the network in a model folder; returns itself."""
        return self

    @property
    def labels(self) -> Whisper:
        """What turns utterances into tokens."""
        return self

    @property
    def prompt_length(self) -> int:
        """Tokens before the text, without timestamps."""
        return 4 if self.languages else 2

    def encode_row(self, row: dict[str, Any]) -> list[int]:
        """Return the tokens of an utterance for training: prompt, text, end."""
        prompt = self._prompt(row.get("language") or self.default_language, DecodingOptions())
        return [*prompt, *self.tokenizer(row["text"], add_special_tokens=False).input_ids, self.end]

    def forward(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        tokens: torch.Tensor,
        token_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [batch, tokens, vocabulary] for audio [batch, time] with lengths [batch] and tokens [batch, tokens]."""
        encoded = self.encode(wavs, lengths, languages=self.prompt_languages(tokens))
        return self.anchored(self.predict(encoded, tokens, token_lengths))

    def prompt_languages(self, tokens: torch.Tensor) -> list[str | None] | None:
        """Return the language that each row of prompts [batch, tokens] names, for an encoder that asks; None where none does."""

    def anchors(self) -> list[nn.Parameter]:
        """Return parameters that are learned but not part of every forward pass."""
        return [p for p in getattr(self, "distillation", nn.Module()).parameters() if p.requires_grad]

    def anchored(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits that depend, by nothing, on `anchors`: DistributedDataParallel must see each of them in every step."""
        if self.training and distributed.processes() > 1:
            for parameter in self.anchors():
                logits = logits + 0 * parameter.sum()
        return logits

    def forget_origin(self) -> None:
        """Forget what recipe and technique the weights came from, since another begins."""
        self.network.config.about, self.history = None, {}
        for name in ("technique", "label"):
            self.__dict__.pop(name, None)

    def language_of(self, wav: torch.Tensor) -> str | None:
        """Return the language of a recording [time] where a technique must know it beforehand; None where it need not."""

    def predict(
        self, encoded: Encoded, tokens: torch.Tensor, token_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [batch, tokens, vocabulary] behind each of `tokens` [batch, tokens]; lengths for who asks."""
        out = self.network(encoder_outputs=BaseModelOutput(encoded.states), decoder_input_ids=tokens, use_cache=False)
        return out.logits.float()

    def save(self, folder: Path, about: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Write a directory in Hugging Face's layout, whole or not at all; `about` stands in its config.json."""
        partial = Path(folder).with_name(f".{Path(folder).name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.write_network(partial, dtype)
        self.tokenizer.save_pretrained(partial)
        seconds = self.window_samples // SAMPLE_RATE
        WhisperFeatureExtractor(self.network.config.num_mel_bins, chunk_length=seconds).save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8")) | {"about": about or {}}
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    def write_network(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the network's weights and configuration."""
        network = copy.deepcopy(self.network).to(dtype) if dtype != torch.float32 else self.network
        network.save_pretrained(folder)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this network from others, as plain data."""
        return {"network": self.network.config.to_diff_dict()}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    def check_language(self, language: str | None) -> None:
        """Refuse a language that the model does not know.

        Raises
        ------
        UserError
            Naming the closest one.
        """
        if not self.languages and language not in (None, "en"):
            raise UserError(f"language: this Whisper is English only, '{language}' was asked for")
        if self.languages and language is not None and language not in self.languages:
            hint = did_you_mean(language, self.languages)
            raise UserError(f"language: this Whisper does not know '{language}'.{hint}")

    def encode(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Compute log-mel features of whole windows, each utterance normalised by itself, and run the encoder.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, time] at 16 kHz, zero behind each end, at most a window.
        lengths : torch.Tensor
            Real samples, [batch].
        hidden_states : bool
            Whether to keep the states of all layers.
        languages : list of str or None, optional
            Code of each utterance's language, for techniques that ask; a plain Whisper's encoder does not.

        Raises
        ------
        UserError
            Where an utterance is longer than the window.
        """
        out = self.network.model.encoder(self.features(wavs, lengths), output_hidden_states=hidden_states)
        return Encoded(out.last_hidden_state, lengths, out.hidden_states if hidden_states else None)

    def features(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the log-mel features [batch, mels, window frames] of [batch, time] with lengths [batch]; see `encode`."""
        window = self.window_samples
        if int(lengths.max()) > window:
            raise UserError(
                f"{int(lengths.max()) / SAMPLE_RATE:.1f} s of audio in one utterance; this Whisper takes "
                f"{window / SAMPLE_RATE:.0f} s, split it"
            )
        wavs = nn.functional.pad(wavs[:, :window].to(self.device), (0, max(0, window - wavs.shape[1])))
        return self.log_mel(wavs, torch.full((len(wavs),), window, device=self.device)).to(self.network.dtype)

    def first_step(self, encoded: Encoded) -> torch.Tensor:
        """Return the logits [batch, vocabulary] behind the start token: they hold language and silence."""
        tokens = torch.full((len(encoded.states), 1), self.start, device=self.device)
        return self.predict(encoded, tokens)[:, -1]

    def detect_languages(self, logits: torch.Tensor) -> list[str]:
        """Return the likeliest language of each row of `first_step` [batch, vocabulary]."""
        indices = torch.tensor(list(self.languages.values()), device=logits.device)
        return [list(self.languages)[i] for i in logits[:, indices].argmax(1).tolist()]

    def decode(self, encoded: Encoded, languages: list[str | None], options: DecodingOptions) -> list[Hypothesis]:
        """Search the best text of each utterance.

        Arguments
        ---------
        encoded : Encoded
            Of `encode`.
        languages : list of str or None
            Code of each utterance's language; None to detect it.
        options : DecodingOptions
            How.
        """
        languages = encoded.languages or languages
        silence: list[float | None] = [None] * len(languages)
        detect = bool(self.languages) and None in languages
        if detect or options.no_speech_threshold is not None:
            logits = self.first_step(encoded)
            if detect:
                languages = [a or b for a, b in zip(languages, self.detect_languages(logits), strict=True)]
            if options.no_speech_threshold is not None:
                silence = logits.softmax(dim=1)[:, self._no_speech_token()].tolist()
        out = self._search(encoded, languages, options, options.schedule[0])
        for i, (hypothesis, probability) in enumerate(zip(out, silence, strict=True)):
            unsure = hypothesis.avg_logprob < options.logprob_threshold
            silent = probability is not None and probability > options.no_speech_threshold and unsure
            if not silent:
                out[i] = self._fall_back(hypothesis, encoded, i, languages[i], options)
            out[i].no_speech_prob = probability
            if silent:
                out[i].text, out[i].segments = "", []
        return out

    def _fall_back(
        self, hypothesis: Hypothesis, encoded: Encoded, row: int, language: str | None, options: DecodingOptions
    ) -> Hypothesis:
        """Try higher temperatures while a hypothesis fails; alone and from a fixed seed, so that batch mates do not matter."""
        for temperature in options.schedule[1:]:
            repetitive = compression_ratio(hypothesis.text) > options.compression_ratio_threshold
            if not (repetitive or hypothesis.looped) and hypothesis.avg_logprob >= options.logprob_threshold:
                break
            rows = torch.tensor([row], device=encoded.states.device)
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(round(1000 * temperature))
                (hypothesis,) = self._search(encoded.select(rows), [language], options, temperature)
        return hypothesis

    def _no_speech_token(self) -> int:
        return self.network.generation_config.no_timestamps_token_id - 1

    def check_timestamps(self) -> None:
        """Refuse, with a UserError, to predict timestamps with a model that has no tokens for them."""
        if not self.timestamp_tokens:
            raise UserError("timestamps: this Whisper has no tokens for them (sequential long audio needs them too)")

    def _prompt(self, language: str | None, options: DecodingOptions) -> list[int]:
        """Return the tokens that a hypothesis starts with."""
        self.check_language(language)
        if options.timestamps:
            self.check_timestamps()
        generation, prompt = self.network.generation_config, [self.start]
        if self.languages:
            prompt += [self.languages[language], generation.task_to_id[options.task]]
        elif options.task == "translate":
            raise UserError("task: this Whisper is English only and cannot translate")
        return prompt if options.timestamps else [*prompt, generation.no_timestamps_token_id]

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, without timestamps and special ones."""
        tokens = [token for token in tokens if token not in self.timestamp_tokens]
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _search(
        self, encoded: Encoded, languages: list[str | None], options: DecodingOptions, temperature: float
    ) -> list[Hypothesis]:
        """Generate with transformers: beam search or greedily, or sample where there is a temperature."""
        prompt = torch.tensor([self._prompt(language, options) for language in languages], device=self.device)
        size = prompt.shape[1]
        room = self.network.config.max_target_positions - size
        sampling, own = temperature > 0, self.network.generation_config
        beam_count = 1 if sampling else options.num_beams
        limits = torch.full((len(prompt),), min(room, options.max_new_tokens or room))
        if options.max_tokens_per_s is not None:
            seconds = encoded.lengths.cpu() / SAMPLE_RATE
            limits = torch.minimum(limits, 10 + torch.ceil(options.max_tokens_per_s * seconds).long())
        processors = []
        if options.timestamps:
            first_max = getattr(own, "max_initial_timestamp_index", None)
            processors.append(
                TimestampRules(self.timestamp_tokens, self.end, own.no_timestamps_token_id, size, first_max)
            )
        stops = [Limits(size + limits.to(self.device))]
        if options.cut_loops:
            stops.append(LoopStop(size, self.timestamp_tokens))
        out = GenerationMixin.generate(
            self.network,
            encoder_outputs=BaseModelOutput(encoded.states),
            decoder_input_ids=prompt,
            decoder_attention_mask=torch.ones_like(prompt),
            logits_processor=processors,
            max_length=None,
            max_new_tokens=int(limits.max()),
            stopping_criteria=stops,
            num_beams=beam_count,
            length_penalty=options.length_penalty,
            do_sample=sampling,
            temperature=temperature if sampling else 1.0,
            **({"top_k": 0} if sampling else {}),
            suppress_tokens=own.suppress_tokens if options.suppress else [],
            begin_suppress_tokens=own.begin_suppress_tokens if options.suppress else [],
            return_dict_in_generate=True,
            output_scores=True,
        )
        beams, scores = getattr(out, "beam_indices", None), out.scores
        if sampling:  # confidence is that of the model, not of the flattened distributions that were sampled from
            scores = tuple(step * temperature for step in scores)
        chosen = self.network.compute_transition_scores(out.sequences, scores, beams, normalize_logits=True)
        rows = [slice(None)] * len(scores) if beams is None else beams.clamp(min=0).T
        entropies = torch.stack([entropy(step[of]) for step, of in zip(scores, rows, strict=False)], dim=1)
        hypotheses = []
        for i, tokens in enumerate(out.sequences[:, size:].tolist()):
            count = tokens.index(self.end) + 1 if self.end in tokens else len(tokens)
            count = min(count, int(limits[i]))  # what follows is padding
            tokens = [token for token in tokens[:count] if token != self.end]
            whole, segments = tokens, []
            if options.cut_loops:
                tokens = without_loop(tokens, self.timestamp_tokens)
            if options.timestamps:
                segments = [
                    {"start_s": start_s, "end_s": end_s, "text": self.text(part)}
                    for start_s, end_s, part in split_segments(
                        tokens, self.timestamp_tokens, float(encoded.lengths[i]) / SAMPLE_RATE
                    )
                ]
            hypotheses.append(
                Hypothesis(
                    self.text(tokens), tokens,
                    float(chosen[i, :count].double().mean()), float(entropies[i, :count].double().mean()),
                    languages[i], temperature=temperature, looped=len(tokens) < len(whole), segments=segments,
                )
            )  # fmt: skip
        return hypotheses
