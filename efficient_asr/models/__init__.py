"""Models: adapters that show a network's encoder layers, and what is built on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from efficient_asr.errors import UserError
from efficient_asr.models.encoder import Encoder

ASSETS = Path(__file__).parent.parent / "assets"


def resolve_source(source: str | os.PathLike[str]) -> str:
    """Return the path of an asset for `efficient_asr:<name>`; environment variables and `~` are expanded elsewhere.

    Raises
    ------
    UserError
        Where a variable is unset or the package has no such asset.
    """
    source = os.fspath(source)
    if source.startswith("efficient_asr:"):
        path = ASSETS / source.removeprefix("efficient_asr:")
        if not path.exists():
            known = ", ".join(f"efficient_asr:{p.name}" for p in sorted(ASSETS.iterdir()) if p.name != "README.md")
            raise UserError(f"the package has no asset '{source}'; it has {known}")
        return str(path)
    expanded = os.path.expanduser(os.path.expandvars(source))
    if "$" in expanded:
        raise UserError(f"'{source}' names an environment variable that is not set")
    return expanded


def read_config(source: str) -> dict[str, Any]:
    """Return the config.json of a local model directory.

    Raises
    ------
    UserError
        Where there is none, or it is not JSON.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise UserError(
                f"{source} is an adapter of peft, not a whole model; merge it into its base (merge_and_unload) and save that "
                "with save_pretrained"
            )
        raise UserError(f"{source} is not a model directory: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def load_encoder(source: str | os.PathLike[str], **options: Any) -> Encoder:
    """Load an encoder: wav2vec 2.0, HuBERT, WavLM, DistilHuBERT, or Whisper's.

    Arguments
    ---------
    source : str
        Hub id, local directory in Hugging Face's layout, `efficient_asr:<asset>`, or a model folder of this project,
        of which only the encoder is taken.
    **options
        `output_norm`, `freeze`, `freeze_feature_extractor`, `spec_augment`; `features` of an SSL encoder (`cnn` or `fbank`).

    Raises
    ------
    UserError
        Where the source cannot be found or is of another kind.
    """
    from efficient_asr.models.ctc import CTCModel
    from efficient_asr.models.loading import load_config, refuse_quantised
    from efficient_asr.models.ssl import SSLEncoder
    from efficient_asr.models.whisper import WhisperEncoder

    source = resolve_source(source)
    if os.path.isdir(source):
        config = read_config(source)
        if config.get("format") == "efficient_asr":
            trained = CTCModel.load(source).encoder
            kind = type(trained)
            network = trained.model
            if kind is SSLEncoder:
                if options.get("features", trained.features) not in ("cnn", trained.features):
                    raise UserError(f"features: the encoder of {source} was trained with {trained.features}")
                options |= {"normalise_input": trained.normalise_input, "features": trained.features}
            elif kind is WhisperEncoder:
                _refuse_features(source, options)
            return kind(network, **options)
        refuse_quantised(source, config)
        model_type = config.get("model_type")
    else:
        try:
            model_type = load_config(source, what="local directory").model_type
        except UserError as error:
            raise UserError(f"source: {error}") from None
    kinds = {"whisper": WhisperEncoder, "wav2vec2": SSLEncoder, "hubert": SSLEncoder, "wavlm": SSLEncoder}
    if model_type not in kinds:
        raise UserError(f"source: '{source}' is of type '{model_type}'; encoders can be {', '.join(kinds)}")
    if model_type == "whisper":
        _refuse_features(source, options)
    return kinds[model_type].from_source(source, **options)


def _refuse_features(source: str, options: dict[str, Any]) -> None:
    """Whisper's encoder has filterbanks already."""
    if options.pop("features", "cnn") != "cnn":
        raise UserError(
            f"features: '{source}' is a Whisper, whose encoder starts from filterbanks anyway; leave it at cnn"
        )
