r"""A silence cache of every recording's own: what could be gained at most if cached silence followed level and noise.

`cache.py` keeps one silence for all recordings. But Whisper's features depend on the recording: they are clamped 8 (in
:math:`\log_{10}` of power) below its loudest value :math:`m`, so digital silence has the value :math:`(m - 4) / 4`, which is
higher for loud recordings. And where a recording has noise, its padding, which has none, is a step that the model sees.

.. math:: c^l_t = \mathrm{mean}_b\; h^{l,b}_t

Here the mean is over bursts of noise :math:`b` of the recording's length whose features are shifted so that their silence has
the recording's value; with `noise`, the features behind them are those of the recording's quietest tenth of frames instead.
Then the recording is encoded as with any silence cache.

Whisper: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv 2212.04356).

Deviation from a technique: this encodes two whole windows more for every recording. It is not offered to users; it answers for
recipes/silence_cache whether something cheaper with the same aim would be worth making.
"""

from __future__ import annotations

from typing import Any

import torch

from efficient_asr.models.log_mel import HOP
from efficient_asr.models.whisper.decoding import Encoded
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.techniques.silence_cache.cache import SilenceCache, noise_bursts
from efficient_asr.utils.errors import UserError

QUIET_SHARE = 0.1  # of the frames, whose mean is the noise of a recording


class FollowingCache(OwnLength):
    """Encode one recording on its own length, with silence that was made for it.

    Arguments
    ---------
    padding_s, group
        See `SilenceCache`.
    noise : bool
        Whether the silence is the recording's noise, instead of digital silence.
    """

    technique = "silence_cache"

    def __init__(self, padding_s: float = 0.2, group: int = 4, noise: bool = False) -> None:
        super().__init__(padding_s)
        self.group, self.noise = group, noise

    @property
    def label(self) -> str:
        """Variant, for the tables."""
        return f"silence cache following the {'noise' if self.noise else 'level'}, {self.padding_s:g} s"

    def encode(self, whisper: Any, wavs: torch.Tensor, lengths: torch.Tensor, hidden_states: bool = False) -> Encoded:
        """Encode [1, time] at 16 kHz with `lengths` [1] in samples; see `Whisper.encode`.

        Raises
        ------
        UserError
            If there are several recordings.
        """
        if len(wavs) != 1:
            raise UserError("a cache that follows the recording needs batches of one")
        cache = self.make(whisper, whisper.features(wavs, lengths)[0], int(lengths[0]))
        return cache.encode(whisper, wavs, lengths, hidden_states)

    def make(self, whisper: Any, mel: torch.Tensor, samples: int) -> SilenceCache:
        """Return the cache for the features [mels, frames] of a whole window whose first `samples` are the recording."""
        config = whisper.network.config
        cache = SilenceCache(
            self.padding_s, self.group, config.encoder_layers, config.max_source_positions, config.d_model
        ).to(mel.device)
        frames = min(-(-samples // HOP) + 2, mel.shape[1])  # two more contain the recording's end
        quietest = mel[:, :frames].mean(dim=0).argsort()[: max(1, round(QUIET_SHARE * frames))]
        total = torch.zeros_like(cache.states)
        bursts = noise_bursts()
        for burst in bursts:
            wav = burst.repeat(samples // len(burst) + 1)[None, :samples].to(mel.device)
            own = whisper.features(wav, torch.tensor([samples]))[0]
            own = own + (mel[0, -1] - own[0, -1])
            if self.noise:
                own[:, frames:] = mel[:, quietest].mean(dim=1, keepdim=True)
            with torch.no_grad(), whisper.whole_window():
                encoded = whisper.encode(own[None], torch.tensor([samples]), True)
            total += torch.stack([states[0] for states in encoded.hidden_states])
        cache.states.copy_(total / len(bursts))
        return cache
