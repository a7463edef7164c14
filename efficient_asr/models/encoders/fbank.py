"""Filterbanks in place of an SSL encoder's convolutions: "MelWavLM" of arXiv 2303.06740.

80 log-mel bands with first- and second-order deltas (window 30 ms, hop 20 ms, 480-point FFT), normalised per utterance, and one
feed-forward block that projects them to the encoder's width. The paper's model class was not released; this follows its settings.
"""

from __future__ import annotations

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.VanillaNN import VanillaNN
from torch import nn

from efficient_asr.data import SAMPLE_RATE, frame_mask

HOP, MELS = 320, 80
CONTEXT_FRAMES = 8  # exceeds the look-ahead of second-order deltas


class FilterbankExtractor(nn.Module):
    """Filterbank features and a projection, one frame every 20 ms.

    Arguments
    ---------
    size : int
        Width of the output.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fbank = Fbank(
            deltas=True,
            sample_rate=SAMPLE_RATE,
            n_fft=480,
            n_mels=MELS,
            win_length=30,
            hop_length=20,
            f_max=SAMPLE_RATE // 2,
        )
        self.projection = VanillaNN([None, None, 3 * MELS], nn.LeakyReLU, 1, size)

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return frames [batch] for samples [batch]."""
        return torch.div(lengths, HOP, rounding_mode="floor")

    def forward(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return [batch, frames, size] for `wavs` [batch, time], zero past their `lengths` [batch]."""
        frames = self.frame_lengths(lengths)
        # Zeros follow every utterance, even the longest, so that the deltas do not depend on the rest of the batch.
        with torch.autocast(wavs.device.type, enabled=False):
            features = self.fbank(nn.functional.pad(wavs.float(), (0, CONTEXT_FRAMES * HOP)))
        features = features[:, : max(1, int(frames.max()))]
        mask = frame_mask(frames, features.shape[1])[:, :, None]
        count = mask.sum(dim=1, keepdim=True)
        centred = (features - (features * mask).sum(dim=1, keepdim=True) / count) * mask
        deviation = torch.sqrt(centred.pow(2).sum(dim=1, keepdim=True) / count)
        return self.projection(centred / (deviation + 1e-5))
