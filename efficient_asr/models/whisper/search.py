"""Decode Whisper's encoder states to text: beam search or greedy decoding, fallback, silence.

Beam search is transformers' generation; greedy decoding and sampling have their own loop (`greedy.py`). The rules around them
(suppressed tokens, timestamps, fallback, silence) are those of Whisper (arXiv 2212.04356, section 4.5).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.models.loading import quiet_transformers
from efficient_asr.models.whisper.decoding import (
    DecodingOptions,
    Encoded,
    Hypothesis,
    LengthLimits,
    LoopStop,
    compression_ratio,
    entropy,
    without_loop,
)
from efficient_asr.models.whisper.greedy import Found, generate
from efficient_asr.models.whisper.labels import WhisperLabels
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.own_length import POSITIONS_PER_S
from efficient_asr.models.whisper.timestamps import TimestampRules, split_segments


def decode(model: Whisper, encoded: Encoded, languages: list[str | None], options: DecodingOptions) -> list[Hypothesis]:
    """Find the best text for each utterance.

    Arguments
    ---------
    model : Whisper
        The model.
    encoded : Encoded
        Output of `Whisper.encode`.
    languages : list of str or None
        Code of each utterance's language; None to detect it.
    options : DecodingOptions
        Options for decoding.
    """
    labels = model.labels
    languages = encoded.languages or languages
    silence: list[float | None] = [None] * len(languages)
    detect = bool(labels.languages) and None in languages
    if detect or options.no_speech_threshold is not None:
        logits = model.first_step(encoded)
        if detect:
            languages = [a or b for a, b in zip(languages, model.detect_languages(logits), strict=True)]
        if options.no_speech_threshold is not None:
            silence = logits.softmax(dim=1)[:, labels.no_speech].tolist()
    out = _first_try(model, encoded, languages, options)
    again: dict[int, Encoded] = {}  # whole windows, by row
    first_s: dict[int, float] = {}  # what was encoded before
    for i in range(len(out)):
        shortened = encoded.own is not None and int(encoded.own[i]) < model.network.config.max_source_positions
        if shortened and encoded.whole is not None and _needs_whole(out[i], options):
            again[i], first_s[i] = encoded.whole(i), out[i].encoder_s
            out[i] = _first_try(model, again[i], languages[i : i + 1], options)[0]
    for i, (hypothesis, probability) in enumerate(zip(out, silence, strict=True)):
        unsure = hypothesis.avg_logprob < options.logprob_threshold
        silent = probability is not None and probability > options.no_speech_threshold and unsure
        if not silent:
            states, row = (again[i], 0) if i in again else (encoded, i)
            out[i] = _fall_back(model, hypothesis, states, row, languages[i], options)
        out[i].no_speech_prob, out[i].encoded_again = probability, i in again
        out[i].encoder_s += first_s.get(i, 0.0)
        if silent:
            out[i].text, out[i].segments = "", []
    return out


def _needs_whole(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    """Whether a hypothesis from encoder states of the audio's own length looks wrong; see `DecodingOptions.retry_logprob`."""
    if options.retry_logprob in (None, -math.inf):
        return False
    repetitive = compression_ratio(hypothesis.text) > options.compression_ratio_threshold
    return repetitive or hypothesis.looped or hypothesis.cut_off or hypothesis.avg_logprob < options.retry_logprob


def _fall_back(
    model: Whisper, hypothesis: Hypothesis, encoded: Encoded, row: int, language: str | None, options: DecodingOptions
) -> Hypothesis:
    """Try higher temperatures while a hypothesis fails."""
    for temperature in options.schedule[1:]:
        repetitive = compression_ratio(hypothesis.text) > options.compression_ratio_threshold
        if not (repetitive or hypothesis.looped) and hypothesis.avg_logprob >= options.logprob_threshold:
            break
        hypothesis = _sample(model, encoded, row, language, options, temperature)
    return hypothesis


def _first_try(
    model: Whisper, encoded: Encoded, languages: list[str | None], options: DecodingOptions
) -> list[Hypothesis]:
    """Search at the first temperature."""
    temperature = options.schedule[0]
    if not temperature:
        return search(model, encoded, languages, options, temperature)
    return [_sample(model, encoded, row, language, options, temperature) for row, language in enumerate(languages)]


def _sample(
    model: Whisper, encoded: Encoded, row: int, language: str | None, options: DecodingOptions, temperature: float
) -> Hypothesis:
    """Search for one row at a temperature above 0, alone and with a fixed seed, so that the batch does not matter."""
    rows = torch.tensor([row], device=encoded.states.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(round(1000 * temperature))
        return search(model, encoded.select(rows), [language], options, temperature)[0]


def search(
    model: Whisper, encoded: Encoded, languages: list[str | None], options: DecodingOptions, temperature: float
) -> list[Hypothesis]:
    """Search once: with beams or greedily, or by sampling if the temperature is above 0.

    transformers' beam search has no mask for encoder states; utterances with different numbers of states are searched one by one.
    """
    if encoded.is_ragged and options.num_beams > 1:
        rows = (torch.tensor([row]) for row in range(len(languages)))
        return [search(model, encoded.select(row), [languages[int(row)]], options, temperature)[0] for row in rows]
    labels, device = model.labels, model.device
    prompt = torch.tensor([labels.prompt(language, options) for language in languages], device=device)
    limits = _length_limits(model, encoded, prompt.shape, options)
    with quiet_transformers(), model.search_context(languages, options):
        out = model.generate(encoded, prompt, limits, options, temperature)
        if out is not None:
            pass  # a backend with a search of its own
        elif temperature == 0 and options.num_beams > 1:
            out = _beam_search(model, encoded, prompt, limits, options)
        else:
            out = _greedy(model, encoded, prompt, limits, options, temperature)
        found = _hypotheses(model, encoded, languages, out, prompt.shape[1], limits, options, temperature)
        model.annotate(found, encoded)
    return found


def _length_limits(model: Whisper, encoded: Encoded, shape: torch.Size, options: DecodingOptions) -> torch.Tensor:
    """Return the maximum number of tokens of each hypothesis after prompts of shape (batch, length), [batch]."""
    count, size = shape
    room = model.network.config.max_target_positions - size
    limits = torch.full((count,), min(room, options.max_new_tokens or room))
    if options.max_tokens_per_s is not None:
        seconds = encoded.lengths.cpu() / SAMPLE_RATE
        limits = torch.minimum(limits, 10 + torch.ceil(options.max_tokens_per_s * seconds).long())
    return limits


def _rules(model: Whisper, size: int, options: DecodingOptions) -> tuple[list[Any], list[Any]]:
    """Return the processors of scores and the stopping criteria that follow from the options, for prompts of `size` tokens."""
    labels, own = model.labels, model.network.generation_config
    processors, stops = [], []
    if options.timestamps:
        first_max = getattr(own, "max_initial_timestamp_index", None)
        rules = TimestampRules(labels.timestamp_tokens, labels.end, own.no_timestamps_token_id, size, first_max)
        processors.append(rules)
    if options.cut_loops:
        stops.append(LoopStop(size, labels.timestamp_tokens))
    return processors, stops


def _greedy(
    model: Whisper,
    encoded: Encoded,
    prompt: torch.Tensor,
    limits: torch.Tensor,
    options: DecodingOptions,
    temperature: float,
) -> Found:
    """Decode greedily, or sample if the temperature is above 0."""
    own, size = model.network.generation_config, prompt.shape[1]
    suppress = (own.suppress_tokens or [], own.begin_suppress_tokens or []) if options.suppress else ([], [])
    processors, stops = _rules(model, size, options)
    with torch.inference_mode():
        decoder = model.decoder(encoded, size + int(limits.max()))
    return generate(decoder, prompt, limits, model.labels.end, suppress, processors, stops, temperature)


def _beam_search(
    model: Whisper, encoded: Encoded, prompt: torch.Tensor, limits: torch.Tensor, options: DecodingOptions
) -> Found:
    """Call transformers' generic generation instead of Whisper's own `generate`, which would encode again."""
    own, size = model.network.generation_config, prompt.shape[1]
    processors, stops = _rules(model, size, options)
    out = GenerationMixin.generate(
        model.network,
        encoder_outputs=BaseModelOutput(encoded.states),
        decoder_input_ids=prompt,
        decoder_attention_mask=torch.ones_like(prompt),
        logits_processor=processors,
        max_length=None,
        max_new_tokens=int(limits.max()),
        stopping_criteria=[LengthLimits(size + limits.to(prompt.device)), *stops],
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        do_sample=False,
        suppress_tokens=own.suppress_tokens if options.suppress else [],
        begin_suppress_tokens=own.begin_suppress_tokens if options.suppress else [],
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = out.beam_indices
    chosen = model.network.compute_transition_scores(out.sequences, out.scores, beams, normalize_logits=True)
    rows = beams.clamp(min=0).T
    entropies = torch.stack([entropy(step[of]) for step, of in zip(out.scores, rows, strict=False)], dim=1)
    return Found(out.sequences, chosen, entropies)


def _hypotheses(
    model: Whisper,
    encoded: Encoded,
    languages: list[str | None],
    out: Found,
    size: int,
    limits: torch.Tensor,
    options: DecodingOptions,
    temperature: float,
) -> list[Hypothesis]:
    """Convert the tokens found after prompts of `size` tokens to hypotheses with text, confidence and segments."""
    labels = model.labels
    hypotheses = []
    window = model.network.config.max_source_positions
    for i, row in enumerate(out.tokens[:, size:].tolist()):
        count = row.index(labels.end) + 1 if labels.end in row else len(row)
        count = min(count, int(limits[i]))  # what follows is padding
        tokens = [token for token in row[:count] if token != labels.end]
        whole = len(tokens)
        if options.cut_loops:
            tokens = without_loop(tokens, labels.timestamp_tokens)
        hypotheses.append(
            Hypothesis(
                labels.text(tokens),
                tokens,
                float(out.log_probs[i, :count].double().mean()),
                float(out.entropies[i, :count].double().mean()),
                float(out.log_probs[i, :count].min()) if model.token_scores else math.nan,
                languages[i],
                temperature=temperature,
                looped=len(tokens) < whole,
                cut_off=count == model.network.config.max_target_positions - size and row[count - 1] != labels.end,
                unfinished=count > 0 and row[count - 1] != labels.end,
                encoder_s=(window if encoded.own is None else int(encoded.own[i])) / POSITIONS_PER_S,
                segments=_segments(labels, tokens, float(encoded.lengths[i])) if options.timestamps else [],
            )
        )
    return hypotheses


def _segments(labels: WhisperLabels, tokens: list[int], samples: float) -> list[dict[str, Any]]:
    """Return the segments of a hypothesis for audio of this many samples."""
    parts = split_segments(tokens, labels.timestamp_tokens, samples / SAMPLE_RATE)
    return [{"start_s": start_s, "end_s": end_s, "text": labels.text(part)} for start_s, end_s, part in parts]
