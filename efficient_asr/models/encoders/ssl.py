"""Self-supervised encoders: wav2vec 2.0, HuBERT, WavLM, DistilHuBERT, run layer by layer.

The networks are those of transformers. This adapter runs their submodules in transformers' own order, and a test compares
it with transformers' `forward`. We do not use SpeechBrain's wrapper because its batched inference can lose the padding mask
(speechbrain issues 2986 and 1582). Three operations depend on padding in the original code but not here: the normalisation
of the waveform, the group norm of the first convolution (base models), and the normalisation of the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from efficient_asr.data import SAMPLE_RATE, frame_mask, zero_padding
from efficient_asr.models.encoders.base import (
    Encoder,
    EncoderState,
    advance,
    plain_network_config,
)
from efficient_asr.models.encoders.fbank import FilterbankExtractor
from efficient_asr.models.loading import hub_options, load_network
from efficient_asr.utils.errors import UserError

MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")


class MaskedGroupNorm(nn.Module):
    """Group norm with one group per channel whose statistics exclude padding.

    Arguments
    ---------
    norm : torch.nn.GroupNorm
        The original module; its computation is unchanged if nothing is padded.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.num_groups = norm.eps, norm.num_groups
        self.frame_lengths: torch.Tensor | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise [batch, channels, frames]."""
        frames = states.shape[2]
        if self.frame_lengths is None or bool((self.frame_lengths >= frames).all()):
            return nn.functional.group_norm(states, self.num_groups, self.weight, self.bias, self.eps)
        mask = frame_mask(self.frame_lengths, frames)[:, None]
        count = mask.sum(dim=2, keepdim=True)
        mean = (states * mask).sum(dim=2, keepdim=True) / count
        variance = ((states - mean) * mask).pow(2).sum(dim=2, keepdim=True) / count
        return (states - mean) / torch.sqrt(variance + self.eps) * self.weight[:, None] + self.bias[:, None]


class SSLEncoder(Encoder):
    """A self-supervised encoder from transformers.

    Arguments
    ---------
    model : transformers.PreTrainedModel
        Wav2Vec2Model, HubertModel or WavLMModel.
    normalise_input : bool
        Whether waveforms are first normalised to zero mean and unit variance, as in the model's pretraining.
    output_norm : bool
        Whether the output is normalised per utterance.
    freeze : bool
        Freeze all weights.
    freeze_feature_extractor : bool
        Freeze the convolutional front end.
    spec_augment : bool
        Mask features in training, with the settings of the model's own configuration.
    features : str
        `cnn` for the model's own convolutions on the waveform, or `fbank` for filterbanks with a projection to be trained.

    Raises
    ------
    UserError
        If the network or the value of `features` is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        normalise_input: bool,
        output_norm: bool = True,
        freeze: bool = False,
        freeze_feature_extractor: bool = True,
        spec_augment: bool = False,
        features: str = "cnn",
    ) -> None:
        super().__init__()
        if features not in ("cnn", "fbank"):
            raise UserError(f"features: '{features}' is invalid; use cnn or fbank")
        if getattr(model, "adapter", None) is not None or getattr(model.config, "conv_pos_batch_norm", False):
            raise UserError(
                "this encoder has an adapter or batch norm in its positional convolution, which is not supported"
            )
        model.config.apply_spec_augment = spec_augment
        self.model = model
        self.normalise_input, self.output_norm = normalise_input, output_norm
        self.hidden_size = model.config.hidden_size
        self.layerdrop = model.config.layerdrop
        self.first_droppable_layer = 1 if model.config.model_type == "wavlm" else 0
        self.features, self.group_norm = features, None
        if features == "fbank":
            if not isinstance(model.feature_extractor, FilterbankExtractor):
                model.feature_extractor = FilterbankExtractor(model.config.conv_dim[-1])
        else:
            first = model.feature_extractor.conv_layers[0]
            norm = getattr(first, "layer_norm", None)
            if isinstance(norm, (nn.GroupNorm, MaskedGroupNorm)):
                first.layer_norm = norm if isinstance(norm, MaskedGroupNorm) else MaskedGroupNorm(norm)
                self.group_norm = [first.layer_norm]  # in a list because the model registers it already
            if freeze_feature_extractor:
                model.feature_extractor._freeze_parameters()
        if freeze:
            model.requires_grad_(False)

    @classmethod
    def from_source(cls, source: str, **options: Any) -> SSLEncoder:
        """Load weights from a hub id or a local directory."""
        model = load_network(AutoModel, source)
        return cls(model, normalise_input=_reads_normalised(source, model.config), **options)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SSLEncoder:
        """Build the network of `to_config` with random weights."""
        network = plain_network_config(config["network"], MODEL_TYPES)
        model = AutoModel.from_config(AutoConfig.for_model(**network))
        options = {key: config[key] for key in ("normalise_input", "output_norm", "features") if key in config}
        return cls(model, **options)

    def to_config(self) -> dict[str, Any]:
        """Return the network's configuration as plain data."""
        network = self.model.config.to_diff_dict() | {"model_type": self.model.config.model_type}
        network["num_hidden_layers"] = self.num_layers
        rest = {"normalise_input": self.normalise_input, "output_norm": self.output_norm, "features": self.features}
        return {"network": network, **rest}

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        return self.model.encoder.layers

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return frames [batch] for samples [batch]."""
        if self.features == "fbank":
            return self.model.feature_extractor.frame_lengths(lengths)
        for conv in self.model.feature_extractor.conv_layers:
            lengths = _conv_length(lengths, conv.conv)
        return lengths

    def begin(self, wavs: torch.Tensor, lengths: torch.Tensor) -> EncoderState:
        """Normalise, run the convolutions, the projection and the positional convolution."""
        model, encoder = self.model, self.model.encoder
        lengths = lengths.to(wavs.device)
        states = model.feature_projection(self._extract(wavs, lengths))
        states = states[0] if isinstance(states, tuple) else states
        frame_lengths = self.frame_lengths(lengths)
        padding_mask = frame_mask(frame_lengths, states.shape[1])
        if states.shape[1] >= model.config.mask_time_length:  # transformers refuses to mask shorter batches
            states = model._mask_hidden_states(states, attention_mask=padding_mask)
        states = zero_padding(states, frame_lengths.clamp(min=1))
        states = states + encoder.pos_conv_embed(states)
        if not model.config.do_stable_layer_norm:
            states = encoder.layer_norm(states)
        states = encoder.dropout(states)
        return EncoderState(states, frame_lengths, self.mask(states, frame_lengths))

    def mask(self, states: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor | None:
        """Return the attention mask of the layers; WavLM's is the plain mask [batch, frames]."""
        if self.model.config.model_type != "wavlm":
            return super().mask(states, frame_lengths)
        mask = frame_mask(frame_lengths, states.shape[1])
        return None if bool(mask.all()) else mask

    def _extract(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return features [batch, frames, dim] of `wavs` [batch, time] with `lengths` [batch]."""
        extractor = self.model.feature_extractor
        if self.normalise_input:
            wavs = _normalise_wavs(wavs, lengths)
        if self.features == "fbank":
            return extractor(wavs, lengths)
        shortest = _receptive_field(extractor.conv_layers)
        if wavs.shape[1] < shortest:
            wavs = nn.functional.pad(wavs, (0, shortest - wavs.shape[1]))
        if self.group_norm is not None:
            self.group_norm[0].frame_lengths = _conv_length(lengths, extractor.conv_layers[0].conv)
        return extractor(wavs).transpose(1, 2)

    def run_layer(self, index: int, state: EncoderState) -> EncoderState:
        """Run one transformer layer."""
        layer = self.layers[index]
        if self.model.config.model_type == "wavlm":
            states, bias = layer(state.states, attention_mask=state.mask, position_bias=state.position_bias)
            return advance(state, states, position_bias=bias)
        return advance(state, layer(state.states, attention_mask=state.mask))

    def after_layers(self) -> list[nn.Parameter]:
        """Return the parameters of the final layer norm of pre-norm ("stable") models."""
        return list(self.model.encoder.layer_norm.parameters()) if self.model.config.do_stable_layer_norm else []

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the final layer norm of pre-norm ("stable") models."""
        return self.model.encoder.layer_norm(states) if self.model.config.do_stable_layer_norm else states


def _reads_normalised(source: str, config: Any) -> bool:
    """Whether the model's feature extractor normalises waveforms; without one, assume that only large models do."""
    from transformers import Wav2Vec2FeatureExtractor

    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        return config.feat_extract_norm == "layer"
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(source, **hub_options(source))
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UserError(f"{source} expects audio at {extractor.sampling_rate} Hz; only {SAMPLE_RATE} Hz is supported")
    return extractor.do_normalize


def _normalise_wavs(wavs: torch.Tensor, lengths: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Normalise each utterance's unpadded samples to zero mean and unit variance; [batch, time], padding becomes zero."""
    mask = torch.arange(wavs.shape[1], device=wavs.device) < lengths[:, None]
    count = lengths.clamp(min=1)[:, None]
    mean = (wavs * mask).sum(dim=1, keepdim=True) / count
    centred = (wavs - mean) * mask
    return centred / torch.sqrt(centred.pow(2).sum(dim=1, keepdim=True) / count + eps)


def _conv_length(lengths: torch.Tensor, conv: nn.Conv1d) -> torch.Tensor:
    """Output length of an unpadded convolution, zero if the input is too short."""
    out = torch.div(lengths - conv.kernel_size[0], conv.stride[0], rounding_mode="floor") + 1
    return out.clamp(min=0)


def _receptive_field(conv_layers: nn.ModuleList) -> int:
    """Number of samples needed for one output frame."""
    samples = 1
    for layer in reversed(conv_layers):
        samples = (samples - 1) * layer.conv.stride[0] + layer.conv.kernel_size[0]
    return samples
