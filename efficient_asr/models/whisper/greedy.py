"""Greedy decoding and sampling with Whisper, with a cache that is allocated once.

The result is that of transformers' `generate` with one beam, and so is the number of multiply-accumulates. What differs is the
overhead of a step: keys and values are written into a preallocated cache, suppressed tokens are one additive mask, and confidence
and entropy are computed while the scores are at hand instead of keeping the scores of all steps. The loop calls the modules of
the network's layers, so it runs networks whose modules were replaced (adapters, experts, int8).

If the encoder states end with representatives of silence (`Tail`), cross-attention sees each representative with the weight of
the positions that it stands for: for a representative of n positions, log n is added to its attention score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from efficient_asr.models.whisper.decoding import Encoded, Tail

FORBIDDEN = -1e4  # added to the scores of suppressed tokens; finite, so that 0 * FORBIDDEN is 0
_LISTENER: ContextVar[Callable[[torch.Tensor], None] | None] = ContextVar("listener", default=None)
_Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values, [batch, heads, positions, head dim]


@dataclass
class Found:
    """Tokens found by a search, with the model's confidence.

    Attributes
    ----------
    tokens : torch.Tensor
        Prompt and tokens, [batch, prompt + steps]; what follows a hypothesis' end is undefined.
    log_probs, entropies : torch.Tensor
        Log-probability of each token after the prompt, and entropy of the distribution it was chosen from, [batch, steps].
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor


@contextlib.contextmanager
def listening(listener: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within the context and thread, call `listener` with the tokens [batch, positions] after every step of greedy decoding.

    An exception that it raises ends the decoding.
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Steps(Protocol):
    """What `generate` needs of a decoder: the scores of the next token, and the size of the vocabulary."""

    vocab_size: int

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [batch, n]; return scores [batch, 1 or n, vocabulary] of which the last are those of the next token."""


class Decoder:
    """The decoder of a Whisper network for one batch of encoder states.

    Arguments
    ---------
    network : WhisperForConditionalGeneration
        The network, in evaluation mode.
    encoded : Encoded
        Output of `Whisper.encode`.
    room : int
        Maximum number of tokens, including the prompt.
    """

    def __init__(self, network: Any, encoded: Encoded, room: int) -> None:
        self.network, self.layers = network, network.model.decoder.layers
        self.used, self.vocab_size = 0, network.config.vocab_size
        shape = (len(encoded.states), network.config.decoder_attention_heads, room, -1)
        empty = encoded.states.new_empty(len(encoded.states), room, network.config.d_model)
        self.own: list[_Cache] = [(empty.clone().view(*shape), empty.clone().view(*shape)) for _ in self.layers]
        # On a CPU, utterances with different numbers of states are attended to one by one: no padding is read, and the
        # order of all sums, and with it every bit, is that of a batch of one.
        apart = encoded.own is not None and len(encoded.states) > 1 and encoded.states.device.type == "cpu"
        parts = [encoded.select(torch.tensor([row])) for row in range(len(encoded.states))] if apart else [encoded]
        self.cross: list[list[_Cache]] = [[] for _ in self.layers]  # by layer and part
        self.biases = []
        for part in parts:
            states, bias, first = part.memory()
            self.biases.append(bias)
            for layer, caches in zip(self.layers, self.cross, strict=True):
                caches.append(_cross(layer.encoder_attn, states, encoded.tail, first))

    def step(self, tokens: torch.Tensor, states: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Append tokens [batch, n] and return the scores of the next one after each, [batch, n, vocabulary].

        The input of every layer and the output of the last, after the final layer norm, are appended to `states` if it is
        given, [batch, n, dim] each.
        """
        decoder, start, count = self.network.model.decoder, self.used, tokens.shape[1]
        end = self.used = start + count
        x = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[start:end]
        causal = None
        if count > 1:
            causal = torch.full((count, end), -torch.inf, dtype=x.dtype, device=x.device).triu(start + 1)
        found = []
        for layer, own, cross in zip(self.layers, self.own, self.cross, strict=True):
            found.append(x)
            queries, *new = _project(layer.self_attn, layer.self_attn_layer_norm(x))
            for cache, values in zip(own, new, strict=True):
                cache[:, :, start:end] = heads(values, layer.self_attn)
            seen = (own[0][:, :, :end], own[1][:, :, :end])
            x = x + _attend(layer.self_attn, queries, [seen], [causal])
            queries = layer.encoder_attn.q_proj(layer.encoder_attn_layer_norm(x))
            x = x + _attend(layer.encoder_attn, queries, cross, self.biases)
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        x = decoder.layer_norm(x)
        if states is not None:
            states += [*found, x]
        return self.network.proj_out(x).float()


def _cross(attention: nn.Module, states: torch.Tensor, tail: Tail | None, first: int) -> _Cache:
    """Return keys and values of encoder states [batch, frames, dim], followed by those of a tail from group `first` on."""
    found = [heads(project(states), attention) for project in (attention.k_proj, attention.v_proj)]
    if tail is not None:
        if attention not in tail.projected:
            ends = (project(tail.states[None]) for project in (attention.k_proj, attention.v_proj))
            tail.projected[attention] = [heads(end, attention) for end in ends]
        ends = [end[:, :, first:].expand(len(states), -1, -1, -1) for end in tail.projected[attention]]
        found = [torch.cat(pair, dim=2) for pair in zip(found, ends, strict=True)]
    keys, values = (each.contiguous() for each in found)
    return keys, values


def heads(values: torch.Tensor, attention: nn.Module) -> torch.Tensor:
    """Return [batch, frames, dim] as [batch, heads, frames, head dim]."""
    return values.view(*values.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)


def _project(attention: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values of [batch, frames, dim], by one product if the module has one for all three."""
    together = getattr(attention, "qkv_proj", None)
    if together is not None:
        return together(x).chunk(3, dim=-1)
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def _attend(
    attention: nn.Module, queries: torch.Tensor, caches: list[_Cache], biases: list[torch.Tensor | None]
) -> torch.Tensor:
    """Return the output of an attention module for queries [batch, frames, dim].

    Keys, values and additive biases of the scores are those of the whole batch, or of each utterance.
    """
    shape = queries.shape
    parts = heads(queries, attention).split(len(queries) // len(caches))
    found = [
        nn.functional.scaled_dot_product_attention(part, *cache, attn_mask=bias, scale=attention.scaling)
        for part, cache, bias in zip(parts, caches, biases, strict=True)
    ]
    joined = found[0] if len(found) == 1 else torch.cat(found)
    return attention.out_proj(joined.transpose(1, 2).reshape(shape))


@torch.inference_mode()  # less overhead than no_grad, in a loop of many small operations
def generate(
    decoder: Steps,
    prompt: torch.Tensor,
    limits: torch.Tensor,
    end: int,
    suppress: tuple[list[int], list[int]] = ((), ()),
    processors: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None,
    stops: list[Callable[[torch.Tensor, Any], torch.Tensor]] | None = None,
    temperature: float = 0.0,
) -> Found:
    """Choose one token after the other: the most likely one, or a sample if the temperature is above 0.

    Arguments
    ---------
    decoder : Steps
        The decoder, for encoder states of the batch; with room for prompt and tokens.
    prompt : torch.Tensor
        Tokens that each hypothesis starts with, [batch, prompt].
    limits : torch.Tensor
        Maximum number of tokens after the prompt, [batch].
    end : int
        The token that ends a hypothesis.
    suppress : tuple of list of int
        Tokens that are never chosen, and those that are not chosen first.
    processors : list of callable, optional
        Called with tokens [batch, positions] and scores [batch, vocabulary]; return changed scores.
    stops : list of callable, optional
        Called with tokens [batch, positions] and None; return which hypotheses end, [batch].
    temperature : float
        Of sampling.
    """
    limits = limits.to(prompt.device)
    masks = _masks(decoder.vocab_size, suppress, prompt.device)
    tokens, new = prompt, prompt
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    log_probs, entropies = [], []
    listener = _LISTENER.get()
    while not bool(done.all()):
        scores = _add(decoder.step(new)[:, -1], next(masks))
        for process in processors or ():
            scores = process(tokens, scores).clamp(min=2 * FORBIDDEN)
        chosen, log_prob, entropy = _choose(scores, temperature)
        chosen = chosen.masked_fill(done, end)
        log_probs.append(log_prob)
        entropies.append(entropy)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        done = done | (chosen == end) | (len(log_probs) >= limits)
        for stop in stops or ():
            done = done | stop(tokens, None)
        new = chosen.masked_fill(done, end)[:, None]  # what has ended computes on, to no effect
        if listener is not None:
            listener(tokens)
    return Found(tokens, torch.stack(log_probs, dim=1), torch.stack(entropies, dim=1))


def _masks(size: int, suppress: tuple[list[int], list[int]], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield what is added to the scores [vocabulary] of the first, second, ... token."""
    always, first = suppress
    mask = torch.zeros(size, device=device)
    mask[[token for token in always if 0 <= token < size]] = FORBIDDEN
    begin = mask.clone()
    begin[[token for token in first if 0 <= token < size]] = FORBIDDEN
    yield begin
    while True:
        yield mask


def _add(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Add a mask [vocabulary] to scores [batch, vocabulary], in place; on the CPU by numpy, see `_choose`."""
    if scores.device.type != "cpu":
        return scores.add_(mask)
    np.add(scores.numpy(), mask.numpy(), out=scores.numpy())
    return scores


def _choose(scores: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token, its log-probability, and the entropy of the distribution, each [batch], from scores [batch, vocabulary].

    On the CPU this is numpy: torch divides the vocabulary among its threads, which then spin and keep those of other engines
    from running.
    """
    if scores.device.type == "cpu" and temperature == 0:
        return tuple(map(torch.from_numpy, _choose_numpy(scores.numpy())))
    highest, chosen = scores.max(dim=1)
    scores = scores - highest[:, None]
    weights = scores.exp()
    total = weights.sum(dim=1)
    entropy = total.log() - (weights * scores).sum(dim=1) / total
    if temperature > 0:
        chosen = torch.multinomial((scores / temperature).softmax(dim=1), 1)[:, 0]
    return chosen, scores.gather(1, chosen[:, None])[:, 0] - total.log(), entropy


def _choose_numpy(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Do the same for the most likely token; row by row, so that the batch does not matter."""
    found = []
    for row in scores:
        token = int(row.argmax())
        row = row - row[token]
        weights = np.exp(row)
        total = weights.sum()
        log_total = np.log(total)
        found.append((token, -log_total, log_total - (weights @ row) / total))
    tokens, log_probs, entropies = zip(*found, strict=True)
    return np.array(tokens), np.array(log_probs, dtype=np.float32), np.array(entropies, dtype=np.float32)
