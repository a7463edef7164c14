"""Augmentation of training waveforms with SpeechBrain's transforms; noise and RIR files come from manifests."""

from __future__ import annotations

from pathlib import Path

import torch
from speechbrain.augment.time_domain import AddNoise, SpeedPerturb
from speechbrain.processing.signal_processing import reverberate

from efficient_asr.data import SAMPLE_RATE, absolute_lengths, load_row, read_manifest, zero_padding
from efficient_asr.utils.errors import UserError


def _is_speed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 50 <= value <= 200


class Augment(torch.nn.Module):
    """Speed perturbation, reverberation and additive noise, in this order, on a batch of training waveforms.

    All random choices use torch's global generator, so a resumed training run repeats them.

    Arguments
    ---------
    speeds_percent : list of int
        One speed is drawn per batch; [100] disables speed perturbation.
    rir_manifest, noise_manifest : str or None
        Manifests of room impulse responses and of noise recordings (no text needed).
    snr_low_db, snr_high_db : float
        Range of the signal-to-noise ratio.
    probability : float
        Probability of adding reverberation to a batch and, independently, of adding noise.
    """

    def __init__(
        self,
        speeds_percent: list[int] | None = None,
        rir_manifest: str | None = None,
        noise_manifest: str | None = None,
        snr_low_db: float = 0.0,
        snr_high_db: float = 20.0,
        probability: float = 0.5,
    ) -> None:
        super().__init__()
        speeds = [100] if speeds_percent is None else speeds_percent
        if not isinstance(speeds, (list, tuple)) or not speeds or not all(map(_is_speed, speeds)):
            raise UserError(f"speeds_percent: expected a list of integers from 50 to 200, got {speeds!r}")
        self.speeds_percent = speeds = list(speeds)
        self.fastest, self.slowest = max(speeds) / 100, min(speeds) / 100
        self.speed = SpeedPerturb(SAMPLE_RATE, speeds) if speeds != [100] else None
        self.probability = probability
        self.rirs = read_manifest(Path(rir_manifest), need_text=False) if rir_manifest else []
        self.noises = read_manifest(Path(noise_manifest), need_text=False) if noise_manifest else []
        self.add_noise = AddNoise(snr_low=snr_low_db, snr_high=snr_high_db, normalize=True, noise_funct=self._noise)

    def at_speed(self, wavs: torch.Tensor, speed_percent: int) -> torch.Tensor:
        """Return `wavs` [batch, time] at one of the speeds."""
        if self.speed is None:
            return wavs
        return self.speed.resamplers[self.speeds_percent.index(speed_percent)](wavs.cpu()).to(wavs.device)

    def _noise(self, wavs: torch.Tensor) -> torch.Tensor:
        """Draw a noise recording per utterance and repeat it to the batch length; returns the shape of `wavs` [batch, time]."""
        out = torch.empty_like(wavs)
        for i in range(len(wavs)):
            noise = load_row(self.noises[int(torch.randint(len(self.noises), ()))]).to(wavs)
            start = int(torch.randint(len(noise), ()))
            repeats = (start + wavs.shape[1]) // len(noise) + 1
            out[i] = noise.repeat(repeats)[start : start + wavs.shape[1]]
        return out

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented `wavs` [batch, time'] and `wav_lens` [batch]; padding stays zero."""
        if self.speed is not None:
            wavs = self.speed(wavs)
        if self.rirs and torch.rand(()) < self.probability:
            rir = load_row(self.rirs[int(torch.randint(len(self.rirs), ()))]).to(wavs)
            wavs = reverberate(wavs, rir.unsqueeze(0), rescale_amp="avg")
        if self.noises and torch.rand(()) < self.probability:
            wavs = self.add_noise(wavs, wav_lens)
        return zero_padding(wavs, absolute_lengths(wavs, wav_lens)), wav_lens


def add_noise(wav: torch.Tensor, noise: torch.Tensor, snr_db: float) -> torch.Tensor:
    """Add `noise` [time] to `wav` [time] at a signal-to-noise ratio of `snr_db` decibels."""
    power, noise_power = wav.double().pow(2).mean(), noise.double().pow(2).mean()
    if not float(noise_power):
        return wav
    return wav + noise * float(torch.sqrt(power / noise_power) * 10 ** (-snr_db / 20))
