"""Export a CTC model to ONNX: one graph, from features of one utterance to log-probabilities [1, frames, labels].

Features are log-mel [1, mels, frames] for a Whisper's encoder (`efficient_asr.models.log_mel.LogMel`), and samples [1, time] at
16 kHz for wav2vec 2.0, HuBERT and WavLM. `labels.json` says which, has the alphabet, and whether samples are normalised to zero
mean and unit variance. An utterance is alone in its graph and has no padding, so the graph has no masks. Models that decide
while they run which layers to run, and those with a front end, are refused. `load_transcriber` opens the folder as `OnnxCTC`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficient_asr.data import SAMPLE_RATE, absolute_lengths
from efficient_asr.models.backends import need
from efficient_asr.models.ctc import CTCHead, CTCModel, CTCOutput
from efficient_asr.models.encoders.ssl import SSLEncoder
from efficient_asr.models.encoders.whisper import WhisperEncoder
from efficient_asr.models.log_mel import LogMel
from efficient_asr.models.sources import read_config
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

MODEL, LABELS = "model.onnx", "labels.json"
KIND = "ctc_onnx"  # in the folder's config.json
SHORTEST = 400  # samples: below that, the convolutions of wav2vec 2.0 have nothing to give


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
    return _normalised(wavs) if model.encoder.normalise_input else wavs


def _normalised(wavs: torch.Tensor) -> torch.Tensor:
    """Return samples [1, time] with zero mean and unit variance."""
    return (wavs - wavs.mean()) / (wavs.var(correction=0) + 1e-7).sqrt()


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
        config = {
            "format": "efficient_asr",
            "version": 1,
            "kind": KIND,
            "technique": model.technique,
            "variant": model.label,
        }
        config["mels"] = encoder.log_mel.filters.shape[0] if whisper else None
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (partial / LABELS).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")


class OnnxCTC(nn.Module):
    """An exported CTC model in ONNX Runtime, one utterance after the other, on the CPU.

    Arguments
    ---------
    folder : Path
        Output of `export_to_onnx`.

    Raises
    ------
    UserError
        If ONNX Runtime is missing or the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        need("onnxruntime")
        from efficient_asr.models.backends.onnx import open_session

        config = read_config(str(folder))
        try:
            about = json.loads((Path(folder) / LABELS).read_text(encoding="utf-8"))
            self.labels, self.normalise = CharacterLabels(about["labels"]), bool(about["normalise"])
            self.session = open_session(Path(folder) / MODEL)
        except Exception as error:  # onnxruntime has a class of its own for each kind of failure
            raise UserError(f"{folder} is damaged ({str(error).splitlines()[0]}); export the model again") from None
        self.log_mel = LogMel(config["mels"]) if config.get("mels") else None
        self.technique, self.label = str(config.get("technique", "none")), str(config.get("variant", "baseline"))
        self.settings = {key: config.get(key) for key in ("kind", "technique", "variant", "mels")} | about

    def recognise(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> CTCOutput:
        """Recognise a batch: `wavs` [batch, time] at 16 kHz, relative `wav_lens` [batch]."""
        found = []
        for wav, length in zip(wavs, absolute_lengths(wavs, wav_lens).tolist(), strict=True):
            own = wav[None, :length]
            own = nn.functional.pad(own, (0, max(0, SHORTEST - own.shape[1])))
            if self.log_mel is not None:
                own = self.log_mel(own, torch.tensor([own.shape[1]]))
            elif self.normalise:
                own = _normalised(own)
            try:
                found.append(torch.from_numpy(self.session.run(None, {"features": own.numpy()})[0][0]))
            except Exception as error:  # see above; a Whisper encoder has positions for its window only
                raise UserError(
                    f"ONNX Runtime cannot transcribe {length / SAMPLE_RATE:.1f} s of audio: {str(error).splitlines()[0]}"
                ) from None
        lengths = torch.tensor([len(each) for each in found])
        return CTCOutput(nn.utils.rnn.pad_sequence(found, batch_first=True), lengths)

    def summary(self, records: Any) -> dict[str, Any]:
        """Return nothing: the graph does the same for every utterance."""
        return {}


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
