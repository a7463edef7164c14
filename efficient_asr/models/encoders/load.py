"""Load an encoder from its source."""

from __future__ import annotations

import os
from typing import Any

from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.encoders.base import Encoder
from efficient_asr.models.encoders.ssl import SSLEncoder
from efficient_asr.models.encoders.whisper import WhisperEncoder
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import load_config, refuse_quantised
from efficient_asr.models.sources import read_config
from efficient_asr.utils.errors import UserError

KINDS = {"whisper": WhisperEncoder, "wav2vec2": SSLEncoder, "hubert": SSLEncoder, "wavlm": SSLEncoder}
_ONLY_WHISPER = ("spec_augment_masks", "spec_augment_frames", "spec_augment_bands")


def load_encoder(source: str | os.PathLike[str], layerdrop: float | None = None, **options: Any) -> Encoder:
    """Load an encoder: wav2vec 2.0, HuBERT, WavLM, DistilHuBERT, or the encoder of a Whisper.

    Arguments
    ---------
    source : str
        Hub id, local directory in Hugging Face's layout, `efficient_asr:<asset>`, or a model folder of this project,
        from which only the encoder is loaded.
    layerdrop : float, optional
        Probability of skipping a layer in training; None for the value in the source's configuration.
    **options
        `output_norm`, `freeze`, `freeze_feature_extractor`, `spec_augment`; `features` of an SSL encoder (`cnn` or `fbank`);
        `spec_augment_masks`, `spec_augment_frames` and `spec_augment_bands` of a Whisper encoder (SSL encoders use the masking
        settings of their own configuration).

    Raises
    ------
    UserError
        If the source cannot be found or is not a supported encoder.
    """
    source = model_source(source)
    trained = _trained(source)
    kind = type(trained) if trained is not None else KINDS[_model_type(source)]
    if kind is WhisperEncoder:
        if options.pop("features", "cnn") != "cnn":
            raise UserError(
                f"features: '{source}' is a Whisper, whose encoder always uses filterbanks; set features to cnn"
            )
    else:
        options = {key: value for key, value in options.items() if key not in _ONLY_WHISPER}
    if trained is None:
        encoder = kind.from_source(source, **options)
    else:
        if kind is SSLEncoder:
            if options.get("features", trained.features) not in ("cnn", trained.features):
                raise UserError(f"features: the encoder of {source} was trained with features {trained.features}")
            options |= {"normalise_input": trained.normalise_input, "features": trained.features}
        encoder = kind(trained.model, **options)
    if layerdrop is not None:
        encoder.layerdrop = layerdrop
    return encoder


def _trained(source: str) -> Encoder | None:
    """Return the encoder of a model folder of this project; None for any other source."""
    if os.path.isdir(source) and read_config(source).get("format") == "efficient_asr":
        return CTCModel.load(source).encoder
    return None


def _model_type(source: str) -> str:
    """Return the type of a transformers model, one of `KINDS`."""
    if os.path.isdir(source):
        config = read_config(source)
        refuse_quantised(source, config)
        model_type = config.get("model_type")
    else:
        try:
            model_type = load_config(source, what="local directory").model_type
        except UserError as error:
            raise UserError(f"source: {error}") from None
    if model_type not in KINDS:
        raise UserError(f"source: '{source}' is of type '{model_type}'; supported types are {', '.join(KINDS)}")
    return model_type
