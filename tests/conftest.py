"""Fixtures: tiny random models and synthesised audio; nothing is downloaded and no binary is committed."""

from __future__ import annotations

import json
import os
import urllib.parse
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub client is imported: no test may wait for a network

import numpy as np
import pytest
import soundfile
import torch

import efficient_asr  # noqa: F401  (first: it makes torchaudio importable)
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.text.labels import CharacterLabels

ROOT = Path(__file__).parent.parent
ROOT_TAG = urllib.parse.quote(str(ROOT))  # as a part of a YAML tag, which has no spaces
TEXTS = ["one two", "turn on the light", "nine", "call anna at home"]
TINY_SSL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0, "vocab_size": 8,
}  # fmt: skip


# Files with slow tests, the longest first: with two workers, one that starts last keeps the other waiting (see .ci/run).
LONGEST = (
    "test_app_in_a_browser", "test_resume", "test_distributed", "test_decider_recipe", "test_pseudo_labelling",
    "test_without_extras", "test_tutorial", "test_expert_recipes", "test_estimate", "test_long_audio",
    "test_run", "test_distil_recipe", "test_speed", "test_adding_one", "test_output", "test_shards",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


PLACES = """
corpus: jsonl
data_folder: {corpus}
prepared_folder: {out}/prepared
output_folder: {out}/output
results_folder: {out}/results
"""
TINY = (
    PLACES
    + """
base: !include:{root}/hparams/_base/ctc.yaml
experiment: tiny
recipe: finetune_ctc
encoder: !apply:efficient_asr.models.encoders.whisper.new_whisper_encoder
    d_model: 32
    layers: 1
    heads: 2
    dropout: 0.0
    freeze_feature_extractor: False
head_block: none
lr_encoder: 0.005
lr_head: 0.005
head_optimizer: !name:torch.optim.Adam
    lr: !ref <lr_head>
speeds_percent: [100]
number_of_epochs: 2
batch_size: 2
runtime_repeats: 1
"""
)


def write_tiny_yaml(path: Path, corpus: Path, out: Path) -> Path:
    """Write a YAML file that trains a tiny model on a corpus; everything it leaves goes below `out`."""
    path.write_text(TINY.format(root=ROOT_TAG, corpus=corpus, out=out))
    return path


def multilingual_whisper(seed: int, texts: list[str] | None = None, layers: int = 2, **options):
    """Make a tiny random Whisper of four languages; two of equal texts have the same vocabulary."""
    from efficient_asr.models.whisper.new import build_whisper

    torch.manual_seed(seed)
    wanted = {
        "d_model": 16,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "heads": 2,
        "window_s": 2.0,
        "max_tokens": 24,
    }
    model = build_whisper(texts or TEXTS, languages=["en", "de", "fr", "nl"], **wanted | options)
    for name, parameter in model.network.named_parameters():
        if "layer_norm" not in name and "embed_positions" not in name:
            torch.nn.init.normal_(
                parameter, std=0.2
            )  # random weights as small as transformers' say the same of everything
    model.network.tie_weights()
    return model.eval()


def environment_folder(name: str) -> Path:
    """Return the folder an environment variable names, or skip the test and say why."""
    if not os.environ.get(name):
        pytest.skip(f"{name} is not set")
    return Path(os.environ[name])


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights do not depend on which tests ran before in the same process."""
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    return environment_folder("EFFICIENT_ASR_DATA")


@pytest.fixture
def real_models() -> Path:
    return environment_folder("EFFICIENT_ASR_MODELS")


def chirp(seconds: float, low_hz: float, high_hz: float, rate: int = 16000) -> np.ndarray:
    """A rising tone with a little noise."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (low_hz * t + (high_hz - low_hz) * t**2 / (2 * seconds))
    noise = np.random.default_rng(round(low_hz)).standard_normal(len(t))
    return (0.3 * np.sin(phase) + 0.01 * noise).astype(np.float32)


def make_wavs() -> list[torch.Tensor]:
    """Four waveforms of about one second."""
    lengths = [(1.0, 100, 400), (1.31, 200, 800), (0.7, 300, 1000), (1.137, 150, 3000)]
    return [torch.from_numpy(chirp(*spec)) for spec in lengths]


def make_corpus(folder: Path) -> Path:
    """Write a folder with four utterances and `train.jsonl`, `dev.jsonl`, `test.jsonl`."""
    folder.mkdir()
    rows = []
    for i, (wav, text) in enumerate(zip(make_wavs(), TEXTS, strict=True)):
        soundfile.write(folder / f"u{i}.wav", wav.numpy(), 16000)
        rows.append({"id": f"u{i}", "audio": f"u{i}.wav", "duration": len(wav) / 16000, "text": text})
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def wavs() -> list[torch.Tensor]:
    return make_wavs()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


def make_librispeech(root: Path, splits: dict[str, int]) -> Path:
    """Build a small tree in the official layout out of generated audio."""
    for split, utterances in splits.items():
        for i in range(utterances):
            speaker, chapter = 100 + i % 2, 7 + i % 3
            folder = root / split / str(speaker) / str(chapter)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{speaker}-{chapter}-{i:04d}"
            soundfile.write(folder / f"{name}.flac", chirp(0.5 + 0.1 * i, 100 + i, 900), 16000)
            with open(folder / f"{speaker}-{chapter}.trans.txt", "a") as file:
                file.write(f"{name} SAID NUMBER {'ABCDEFGH'[i]}\n")
    return root


@pytest.fixture
def tiny_yaml(corpus: Path, tmp_path: Path) -> Path:
    return write_tiny_yaml(tmp_path / "tiny.yaml", corpus, tmp_path)


@pytest.fixture(scope="session")
def ssl_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Local directories of tiny random encoders, group-norm ("base") and layer-norm ("large") kinds."""
    from transformers import (
        HubertConfig,
        HubertModel,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
        WavLMConfig,
        WavLMModel,
    )

    base = TINY_SSL | {"feat_extract_norm": "group", "do_stable_layer_norm": False}
    large = TINY_SSL | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    kinds = {
        "wav2vec2-base": (Wav2Vec2Model, Wav2Vec2Config(**base)),
        "wav2vec2-large": (Wav2Vec2Model, Wav2Vec2Config(**large)),
        "hubert-base": (HubertModel, HubertConfig(**base)),
        "distilhubert": (HubertModel, HubertConfig(**(base | {"num_hidden_layers": 2, "feat_proj_layer_norm": False}))),
        "wavlm-base": (WavLMModel, WavLMConfig(**base)),
        "wavlm-large": (WavLMModel, WavLMConfig(**large)),
    }
    folders = {}
    for seed, (name, (model, config)) in enumerate(kinds.items()):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        model(config).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=name.endswith("large")).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def tiny_ctc() -> CTCModel:
    """A CTC model of random weights on a small Whisper-style encoder."""
    torch.manual_seed(0)
    encoder = new_whisper_encoder(d_model=32, layers=2, heads=2)
    labels = CharacterLabels.from_texts(TEXTS)
    return CTCModel(torch.nn.Identity(), encoder, CTCHead(32, len(labels), "none"), labels).eval()


@pytest.fixture(scope="session")
def tiny_whispers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of two Whispers of random weights with a window of 2 s, loud enough to write different things."""
    from efficient_asr.models.whisper.new import build_whisper

    folders = {}
    for seed, (name, width, layers) in enumerate((("small", 16, 1), ("large", 32, 2))):
        torch.manual_seed(seed)
        model = build_whisper(TEXTS, d_model=width, encoder_layers=layers, heads=2, window_s=2.0, max_tokens=16)
        for parameter in model.network.model.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        folders[name] = str(tmp_path_factory.mktemp("whisper") / name)
        model.save(Path(folders[name]))
    return folders


@pytest.fixture(scope="session")
def mini_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Manifests of 90 seconds of synthetic commands, by split."""
    from efficient_asr.corpora import prepare_corpus

    return prepare_corpus("mini", None, tmp_path_factory.mktemp("mini"), {"minutes": 1.5})
