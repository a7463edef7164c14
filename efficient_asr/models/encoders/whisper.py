"""Whisper's encoder with the common encoder interface, run without padding to 30 s.

Whisper was trained on 30 s windows that are mostly padding. Here, the encoder receives only the utterance's own log-mel
frames and the position embeddings for them. A fine-tuned CTC head does not need the padding, and a 3 s utterance costs a
tenth as much. The log-mel is normalised per utterance (SpeechBrain's wrapper takes the maximum over the batch) and equals
Whisper's own on those frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder as WhisperEncoderNetwork

from efficient_asr.data import SAMPLE_RATE, zero_padding
from efficient_asr.models.encoders.base import (
    Encoder,
    EncoderState,
    advance,
    plain_network_config,
)
from efficient_asr.models.loading import load_network
from efficient_asr.models.log_mel import HOP, LogMel, encoder_frames, mask_features
from efficient_asr.utils.errors import UserError


class WhisperEncoder(Encoder):
    """Whisper's encoder.

    Arguments
    ---------
    network : transformers' WhisperEncoder
        The network.
    output_norm : bool
        Whether the output is normalised per utterance, after Whisper's own final layer norm.
    freeze : bool
        Freeze all weights.
    freeze_feature_extractor : bool
        Freeze the two convolutions.
    spec_augment : bool
        Mask time and frequency bands of the log-mel in training.
    spec_augment_masks : int
        Number of masks of each kind.
    spec_augment_frames, spec_augment_bands : int
        Maximum width of a time mask, in frames of 10 ms, and of a frequency mask, in mel bands.
    """

    def __init__(
        self,
        network: nn.Module,
        output_norm: bool = False,
        freeze: bool = False,
        freeze_feature_extractor: bool = True,
        spec_augment: bool = False,
        spec_augment_masks: int = 2,
        spec_augment_frames: int = 40,
        spec_augment_bands: int = 15,
    ) -> None:
        super().__init__()
        self.model = network
        self.output_norm, self.spec_augment = output_norm, spec_augment
        self.masks = (spec_augment_masks, spec_augment_frames, spec_augment_bands)
        self.hidden_size = network.config.d_model
        self.layerdrop = network.config.encoder_layerdrop
        self.log_mel = LogMel(network.config.num_mel_bins)
        if freeze_feature_extractor or freeze:
            network.conv1.requires_grad_(False)
            network.conv2.requires_grad_(False)
        if freeze:
            network.requires_grad_(False)

    @classmethod
    def from_source(cls, source: str, **options: Any) -> WhisperEncoder:
        """Load weights from a hub id or a local directory."""
        return cls(load_network(WhisperModel, source).encoder, **options)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WhisperEncoder:
        """Build the network of `to_config` with random weights."""
        network = WhisperEncoderNetwork(WhisperConfig(**plain_network_config(config["network"], ("whisper",))))
        return cls(network, output_norm=config["output_norm"])

    def to_config(self) -> dict[str, Any]:
        """Return the network's configuration as plain data."""
        network = self.model.config.to_diff_dict() | {"encoder_layers": self.num_layers, "model_type": "whisper"}
        return {"network": network, "output_norm": self.output_norm}

    @property
    def longest_s(self) -> float:
        """Length of Whisper's window in seconds."""
        return self.model.config.max_source_positions * 2 * HOP / SAMPLE_RATE

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        return self.model.layers

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return frames [batch] for samples [batch]."""
        return encoder_frames(lengths)

    def begin(self, wavs: torch.Tensor, lengths: torch.Tensor) -> EncoderState:
        """Compute log-mel features, run the convolutions and add position embeddings."""
        lengths = lengths.to(wavs.device)
        mel_lengths, frame_lengths = lengths // HOP, self.frame_lengths(lengths)
        limit = self.model.config.max_source_positions
        if wavs.shape[1] > limit * 2 * HOP and int(frame_lengths.max()) > limit:
            raise UserError(
                f"an utterance has {int(lengths.max()) / SAMPLE_RATE:.1f} s of audio, but this Whisper encoder has "
                f"positions for {limit * 2 * HOP / SAMPLE_RATE:.0f} s; split the audio"
            )
        mel = self.log_mel(wavs[:, : limit * 2 * HOP], lengths.clamp(max=limit * 2 * HOP))
        if self.training and self.spec_augment:
            mel = mask_features(mel, *self.masks)
        # Each convolution uses neighbouring frames: past the end, these must be zero, as they would be at batch size 1.
        states = nn.functional.gelu(self.model.conv1(mel))
        states = zero_padding(states.transpose(1, 2), mel_lengths).transpose(1, 2)
        states = nn.functional.gelu(self.model.conv2(states)).transpose(1, 2)
        states = states + self.model.embed_positions.weight[: states.shape[1]]
        states = nn.functional.dropout(states, self.model.dropout, self.training)
        return EncoderState(states, frame_lengths, self.mask(states, frame_lengths))

    def run_layer(self, index: int, state: EncoderState) -> EncoderState:
        """Run one transformer layer."""
        return advance(state, self.layers[index](state.states, state.mask))

    def after_layers(self) -> list[nn.Parameter]:
        """Return the parameters of the final layer norm."""
        return list(self.model.layer_norm.parameters())

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the final layer norm."""
        return self.model.layer_norm(states)


def new_whisper_encoder(
    d_model: int, layers: int, heads: int, n_mels: int = 80, dropout: float = 0.1, **options: Any
) -> WhisperEncoder:
    """Build a small encoder with Whisper's architecture and random weights, for training from scratch."""
    config = WhisperConfig(
        d_model=d_model, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * d_model,
        num_mel_bins=n_mels, dropout=dropout, attention_dropout=dropout, decoder_layers=1, vocab_size=8,
        decoder_attention_heads=heads, decoder_ffn_dim=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return WhisperEncoder(WhisperEncoderNetwork(config), **options)
