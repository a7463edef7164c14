"""Export a CTC model to ONNX: one graph, from features of one utterance to log-probabilities [1, frames, labels].

Features are log-mel [1, mels, frames] for a Whisper's encoder (`efficient_asr.models.log_mel.LogMel`), and samples [1, time] at
16 kHz for wav2vec 2.0, HuBERT and WavLM. `labels.json` says which, has the alphabet, and whether samples are normalised to zero
mean and unit variance. An utterance is alone in its graph and has no padding, so the graph has no masks. Models that decide
while they run which layers to run, and those with a front end, are refused.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.models.backends import need
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.ssl import SSLEncoder
from efficient_asr.models.encoders.whisper import WhisperEncoder
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

MODEL, LABELS = "model.onnx", "labels.json"


class _Graph(nn.Module):
    """Features of one utterance to log-probabilities."""

    def __init__(self, model: CTCModel) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [1, frames, labels]."""
        encoder = self.encoder
        if isinstance(encoder, WhisperEncoder):
            x = nn.functional.gelu(encoder.model.conv1(features))
            x = nn.functional.gelu(encoder.model.conv2(x)).transpose(1, 2)
            x = x + encoder.model.embed_positions.weight[: x.shape[1]]
            for layer in encoder.layers:
                x = layer(x, None)
            x = encoder.finish(x)
        else:
            x = encoder.model(features).last_hidden_state
        if encoder.output_norm:
            x = x - x.mean(dim=(1, 2), keepdim=True)  # a layer norm over time cannot be exported
            x = x / (x.pow(2).mean(dim=(1, 2), keepdim=True) + 1e-5).sqrt()
        frames = self.head.linear(self.head.block(x))
        return frames.view(1, x.shape[1] * self.head.frames_per_state, -1).log_softmax(dim=-1)


def _features(model: CTCModel, wavs: torch.Tensor) -> torch.Tensor:
    """Return the input of the graph for samples [1, time]."""
    if isinstance(model.encoder, WhisperEncoder):
        return model.encoder.log_mel(wavs, torch.tensor([wavs.shape[1]]))
    if model.encoder.normalise_input:
        return (wavs - wavs.mean()) / (wavs.var(correction=0) + 1e-7).sqrt()
    return wavs


def export_to_onnx(model: CTCModel, folder: Path) -> None:
    """Write `model.onnx` and `labels.json`.

    Arguments
    ---------
    model : CTCModel
        A model of any encoder, with one linear layer or feed-forward layers as its head.
    folder : Path
        The folder; written atomically.

    Raises
    ------
    UserError
        If a package is missing, or the model cannot be a fixed graph; the message names what is in the way.
    """
    need("onnx", "onnxruntime")
    encoder, head = model.encoder, model.head
    whisper = isinstance(encoder, WhisperEncoder)
    problems = []
    if not isinstance(model.frontend, nn.Identity) and not getattr(model.frontend, "is_identity", False):
        problems.append(f"a front end ({model.technique})")
    if not whisper and not (isinstance(encoder, SSLEncoder) and encoder.features == "cnn"):
        problems.append("an encoder with filterbanks")
    if type(head) is not CTCHead or head.config["block"] == "bilstm":
        problems.append("a head that is recurrent or decides at run time")
    if problems:
        raise UserError(
            f"this model cannot be exported to onnx here: it has {' and '.join(problems)}; run it with torch"
        )
    features = _features(model, torch.randn(1, SAMPLE_RATE))
    with atomic_write(Path(folder)) as partial, torch.no_grad(), warnings.catch_warnings():
        partial.mkdir()
        warnings.simplefilter("ignore")  # of the tracing exporter, which is deprecated
        try:
            torch.onnx.export(
                _Graph(model).eval(), (features,), partial / MODEL, input_names=["features"], output_names=["log_probs"],
                dynamic_axes={"features": {features.dim() - 1: "time"}}, opset_version=18, dynamo=False,
            )  # fmt: skip
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"this model cannot be expressed in ONNX ({reason}); run it with torch") from None
        about: dict[str, Any] = {"labels": model.labels.characters, "features": "log_mel" if whisper else "samples"}
        about["normalise"] = not whisper and encoder.normalise_input
        (partial / LABELS).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")


def largest_difference(model: CTCModel, folder: Path) -> float:
    """Return the largest difference between the log-probabilities of a model and of its graph, on noise of two lengths."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(folder) / MODEL), providers=["CPUExecutionProvider"])
    found = 0.0
    for seconds in (1.0, 2.37):
        wavs = torch.randn(1, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)) * 0.1
        with torch.no_grad():
            expected = model.eval()(wavs, torch.ones(1))[0]
            features = _features(model, wavs)
        try:
            log_probs = torch.from_numpy(session.run(None, {"features": features.numpy()})[0])
        except Exception:  # onnxruntime has a class of its own for each kind of failure
            return float("inf")
        same = log_probs.shape == expected.shape
        found = max(found, float((log_probs - expected).abs().max()) if same else float("inf"))
    return found
