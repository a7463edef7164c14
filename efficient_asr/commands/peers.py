"""Other programs that run Whisper, behind one function each, for the side-by-side benchmark.

Each entry of `SYSTEMS` loads a model and returns a function from recordings (list of [time] at 16 kHz, in memory) to texts. The
same weights, a Hugging Face folder, are converted where a program needs it. All decode greedily, in a given language, without
timestamps and without fallback. Missing packages raise ImportError.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efficient_asr.data import SAMPLE_RATE, pad_wavs
from efficient_asr.inference.load import load_transcriber
from efficient_asr.models.backends import convert
from efficient_asr.models.sources import fingerprint
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.model import Whisper

Recognise = Callable[[list[torch.Tensor]], list[str]]
# openai-whisper's names of weights, from transformers'
_OPENAI_NAMES = (
    (r"^model\.", ""), (r"\.layers\.", ".blocks."), (r"self_attn_layer_norm", "attn_ln"), (r"self_attn", "attn"),
    (r"encoder_attn_layer_norm", "cross_attn_ln"), (r"encoder_attn", "cross_attn"), (r"q_proj", "query"), (r"k_proj", "key"),
    (r"v_proj", "value"), (r"out_proj", "out"), (r"fc1", "mlp.0"), (r"fc2", "mlp.2"), (r"final_layer_norm", "mlp_ln"),
    (r"embed_tokens", "token_embedding"), (r"encoder\.embed_positions\.weight", "encoder.positional_embedding"),
    (r"decoder\.embed_positions\.weight", "decoder.positional_embedding"), (r"encoder\.layer_norm", "encoder.ln_post"),
    (r"decoder\.layer_norm", "decoder.ln"),
)  # fmt: skip


def ours(source: str, language: str, batch_size: int, work: Path, **options: Any) -> Recognise:
    """This project, with options of `load_transcriber`."""
    transcriber = load_transcriber(source, language=language, long_audio=None, **options)

    def recognise(wavs: list[torch.Tensor]) -> list[str]:
        texts = []
        for i in range(0, len(wavs), batch_size):
            texts += [found.text for found in transcriber.transcribe(*pad_wavs(wavs[i : i + batch_size]))]
        return texts

    return recognise


def transformers_pipeline(source: str, language: str, batch_size: int, work: Path) -> Recognise:
    """The automatic-speech-recognition pipeline of transformers."""
    from transformers import pipeline

    recogniser = pipeline("automatic-speech-recognition", model=source, device="cpu", dtype=torch.float32)

    def recognise(wavs: list[torch.Tensor]) -> list[str]:
        inputs = [{"raw": wav.numpy(), "sampling_rate": SAMPLE_RATE} for wav in wavs]
        options: dict[str, Any] = {"num_beams": 1}
        if getattr(recogniser.model.generation_config, "is_multilingual", True):
            options |= {"language": language, "task": "transcribe"}
        return [out["text"] for out in recogniser(inputs, batch_size=batch_size, generate_kwargs=options)]

    return recognise


def openai_whisper(source: str, language: str, batch_size: int, work: Path) -> Recognise:
    """The package openai-whisper."""
    from whisper import DecodingOptions as Options
    from whisper import log_mel_spectrogram, pad_or_trim
    from whisper.model import ModelDimensions
    from whisper.model import Whisper as Network

    network = Whisper.from_source(source).network
    config, state = network.config, {}
    for name, value in network.model.state_dict().items():
        for pattern, new in _OPENAI_NAMES:
            name = re.sub(pattern, new, name)
        state[name] = value
    model = Network(
        ModelDimensions(
            config.num_mel_bins, config.max_source_positions, config.d_model, config.encoder_attention_heads,
            config.encoder_layers, config.vocab_size, config.max_target_positions, config.d_model,
            config.decoder_attention_heads, config.decoder_layers,
        )
    )  # fmt: skip
    model.load_state_dict(state)
    options = Options(language=language, without_timestamps=True, fp16=False)

    def recognise(wavs: list[torch.Tensor]) -> list[str]:
        texts = []
        for i in range(0, len(wavs), batch_size):
            mels = [log_mel_spectrogram(pad_or_trim(wav), config.num_mel_bins) for wav in wavs[i : i + batch_size]]
            texts += [found.text for found in model.eval().decode(torch.stack(mels), options)]
        return texts

    return recognise


def _converted(source: str, work: Path, precision: str) -> str:
    """Return a CTranslate2 folder of a model, converted once."""
    digest = hashlib.sha256(fingerprint(source).encode()).hexdigest()[:12]  # folders of recipes have the same name
    folder = work / f"{Path(source).name}-{digest}-ctranslate2-{precision}"
    if not folder.exists():
        convert(Whisper.from_source(source), folder, "ctranslate2", "int8" if precision == "int8" else None)
    return str(folder)


def faster_whisper(source: str, language: str, batch_size: int, work: Path, precision: str = "int8") -> Recognise:
    """faster-whisper; for batches, its batched pipeline on the joined recordings, cut at their boundaries."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(
        _converted(source, work, precision), cpu_threads=torch.get_num_threads(), compute_type=precision
    )
    common = {"language": language, "beam_size": 1, "temperature": 0.0, "without_timestamps": True}

    def one_by_one(wavs: list[torch.Tensor]) -> list[str]:
        texts = []
        for wav in wavs:
            more = {"condition_on_previous_text": False, "no_speech_threshold": None, "log_prob_threshold": None}
            segments, _ = model.transcribe(wav.numpy(), compression_ratio_threshold=None, **more, **common)
            texts.append(" ".join(segment.text for segment in segments))
        return texts

    def batched(wavs: list[torch.Tensor]) -> list[str]:
        ends = np.cumsum([len(wav) for wav in wavs]) / SAMPLE_RATE
        clips = [{"start": float(a), "end": float(b)} for a, b in zip([0.0, *ends[:-1]], ends, strict=True)]
        joined = torch.cat(wavs).numpy()
        pipeline = BatchedInferencePipeline(model)
        segments, _ = pipeline.transcribe(
            joined, batch_size=batch_size, clip_timestamps=clips, vad_filter=False, **common
        )
        texts = [""] * len(wavs)
        for segment in segments:
            row = int(np.searchsorted(ends, (segment.start + segment.end) / 2))
            texts[min(row, len(wavs) - 1)] += segment.text
        return texts

    return one_by_one if batch_size == 1 else batched


def ctranslate2(source: str, language: str, batch_size: int, work: Path, precision: str = "int8") -> Recognise:
    """CTranslate2 without faster-whisper, with our log-mel features."""
    import ctranslate2 as ct2

    whisper = Whisper.from_source(source)
    threads = torch.get_num_threads()
    model = ct2.models.Whisper(_converted(source, work, precision), compute_type=precision, intra_threads=threads)
    prompt = whisper.labels.prompt(language, DecodingOptions())
    network, window = whisper.network, whisper.window_samples
    most = network.config.max_target_positions
    del whisper.network

    def recognise(wavs: list[torch.Tensor]) -> list[str]:
        texts = []
        for i in range(0, len(wavs), batch_size):
            padded, _ = pad_wavs(wavs[i : i + batch_size])
            padded = torch.nn.functional.pad(padded, (0, window - padded.shape[1]))
            features = whisper.log_mel(padded, torch.full((len(padded),), window)).numpy()
            encoded = model.encode(ct2.StorageView.from_array(np.ascontiguousarray(features)))
            found = model.generate(encoded, [prompt] * len(padded), beam_size=1, max_length=most)
            texts += [whisper.labels.text(list(one.sequences_ids[0])) for one in found]
        return texts

    return recognise


def whisper_cpp(source: str, language: str, batch_size: int, work: Path) -> Recognise:
    """whisper.cpp, through pywhispercpp; needs `<name of the model>.ggml.bin` in the work folder."""
    from pywhispercpp.model import Model

    path = work / f"{Path(source).name}.ggml.bin"
    if batch_size > 1 or not path.is_file():
        raise ImportError(f"whisper.cpp has no batches, and needs {path}" if batch_size > 1 else f"no {path}")
    model = Model(str(path), n_threads=torch.get_num_threads(), language=language, single_segment=True,
                  no_timestamps=True, print_progress=False, print_realtime=False)  # fmt: skip
    return lambda wavs: [" ".join(part.text for part in model.transcribe(wav.numpy())) for wav in wavs]


CACHED, PADDED = {"encoder_padding": "silence_cache"}, {"encoder_padding": 30.0}  # whatever the model folder says


def _ours(backend: str, precision: str, **options: Any) -> tuple[str, str, str, Callable[..., Recognise]]:
    """Return the entry of this project with a backend and int8 in some of its parts."""
    more = options | {"backend": backend, "quantise": precision}
    return "efficient_asr", backend, precision, functools.partial(ours, **more)


# label -> (system, backend, precision, function)
SYSTEMS: dict[str, tuple[str, str, str, Callable[..., Recognise]]] = {
    "ours": ("efficient_asr", "torch", "float32", functools.partial(ours, **PADDED)),
    "ours, int8 decoder": _ours("torch", "decoder-int8", **PADDED),
    "ours, silence cache": ("efficient_asr", "torch", "float32", functools.partial(ours, **CACHED)),
    "ours, silence cache, int8 decoder": _ours("torch", "decoder-int8", **CACHED),
    "ours, silence cache, int8": _ours("torch", "int8", **CACHED),
    "ours, silence cache, int8 decoder, ONNX": _ours("onnx", "decoder-int8", **CACHED),
    "ours, silence cache, int8, ONNX": _ours("onnx", "int8", **CACHED),
    "ours, silence cache, int8, CTranslate2": _ours("ctranslate2", "int8", **CACHED),
    "transformers pipeline": ("transformers", "torch", "float32", transformers_pipeline),
    "openai-whisper": ("openai-whisper", "torch", "float32", openai_whisper),
    "faster-whisper float32": (
        "faster-whisper", "ctranslate2", "float32", functools.partial(faster_whisper, precision="float32"),
    ),
    "faster-whisper int8": ("faster-whisper", "ctranslate2", "int8", faster_whisper),
    "CTranslate2 int8": ("ctranslate2", "ctranslate2", "int8", ctranslate2),
    "whisper.cpp": ("whisper.cpp", "ggml", "float16", whisper_cpp),
}  # fmt: skip
# forms in which other models of this project are run: end of the label -> entry
OTHER_MODELS = {
    "": ("efficient_asr", "torch", "float32", ours),
    ", int8 decoder": _ours("torch", "decoder-int8"),
    ", int8 decoder, ONNX": _ours("onnx", "decoder-int8"),
    ", int8, CTranslate2": _ours("ctranslate2", "int8"),
}
