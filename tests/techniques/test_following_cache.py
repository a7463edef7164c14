"""A silence cache of the recording's own: what it is made of, and its refusal of batches."""

from __future__ import annotations

import pytest
import torch

from efficient_asr import load_transcriber
from efficient_asr.techniques.silence_cache.cache import SilenceCache, noise_bursts
from efficient_asr.techniques.silence_cache.following import FollowingCache
from efficient_asr.utils.errors import UserError

MINI = "efficient_asr:mini_whisper_small"


def test_the_level_is_the_recordings(wavs: list[torch.Tensor]) -> None:
    """For a recording that is a burst itself, no feature is shifted: the cache is the mean over both bursts of that length."""
    whisper = load_transcriber(MINI).model
    wav = noise_bursts()[0][:12_000]
    features = whisper.features(wav[None], torch.tensor([len(wav)]))[0]
    made = FollowingCache().make(whisper, features, len(wav))
    states = []
    for burst in noise_bursts():
        own = whisper.features(burst[None, : len(wav)], torch.tensor([len(wav)]))
        own = own + (features[0, -1] - own[0, 0, -1])
        states.append(torch.stack(whisper.encode(own, torch.tensor([len(wav)]), True).hidden_states)[:, 0])
    torch.testing.assert_close(made.states, sum(states) / 2, atol=1e-5, rtol=1e-5)
    louder = FollowingCache().make(whisper, features + 0.5, len(wav))
    assert (louder.states[0] - made.states[0]).abs().mean() > 1e-3  # silence of a loud recording has larger features
    noisy = FollowingCache(noise=True).make(whisper, features, len(wav))
    assert not torch.equal(noisy.states, made.states)


def test_it_is_a_silence_cache_otherwise(wavs: list[torch.Tensor]) -> None:
    transcriber = load_transcriber(MINI, language="en")
    plain = transcriber.transcribe(wavs[0][None])[0].text
    whisper = transcriber.model
    whisper.encoder_padding = FollowingCache(padding_s=30.0)
    assert transcriber.transcribe(wavs[0][None])[0].text == plain  # nothing is cached then
    whisper.encoder_padding = FollowingCache()
    own = whisper.encode(wavs[0][None], torch.tensor([len(wavs[0])]))
    whisper.encoder_padding = SilenceCache.calibrate(whisper, group=4)
    fixed = whisper.encode(wavs[0][None], torch.tensor([len(wavs[0])]))
    assert own.states.shape == fixed.states.shape and torch.equal(own.own, fixed.own)
    assert not torch.equal(own.states, fixed.states)
    with pytest.raises(UserError, match="batches of one"):
        FollowingCache().encode(whisper, torch.zeros(2, 16000), torch.tensor([16000, 16000]))
