"""Installation of efficient_asr. Each dependency is here for the reason written beside it."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "torch>=2.11,<2.14",  # everything runs on it; an open upper bound would pull untested CUDA builds
    "torchaudio==2.11.0",  # resampling; SpeechBrain imports it
    "speechbrain==1.1.2",  # training loop, data pipeline, augmentation, CTC decoders, downsamplers
    "transformers==5.23.0",  # wav2vec 2.0, HuBERT, WavLM and Whisper networks
    "hyperpyyaml==1.2.3",  # experiments are YAML files
    "jiwer==4.0.0",  # word and character alignment
    "rapidfuzz>=3",  # edit distance of label sequences; jiwer's own engine
    "soundfile>=0.12",  # reads every audio format libsndfile knows
    "av>=14",  # FFmpeg in a wheel: decodes MP3 exactly, and M4A, MP4, WebM, AAC, AMR, which libsndfile does not know
    "babel>=2.14",  # codes, names and number separators of languages (CLDR)
    "safetensors>=0.4",  # weights without pickle
    "numpy>=1.26",
    "scipy>=1.10",  # resampling between rates that share few factors; SpeechBrain brings it anyway
    "tqdm>=4.66",  # progress bars
    "matplotlib>=3.8",  # plots of WER against cost
    "adjustText>=1.3",  # labels of plots that do not overlap
    "pysubs2>=1.7",  # subtitles in SRT and WebVTT
    "espeakng-loader>=0.2.4",  # the synthetic mini corpus needs no download
    "whisper-normalizer==0.1.15",  # the spelling table of Whisper's English normaliser, which transformers lacks
    "num2words>=0.5.13",  # "42" -> "forty two" in training texts of character models
    "thop==0.1.1.post2209072238",  # the papers' MACs counter, for comparison with their tables
]

ONNX = ["onnx>=1.16", "onnx-ir>=0.1", "onnxruntime>=1.22"]  # graphs, their int8 form, and the engine that runs them
EXTRAS = {
    "lm": [
        "kenlm==0.3.0",
        "pygtrie>=2.5",
    ],  # n-gram language models in CTC beam search, and what SpeechBrain needs for it
    "vad": ["silero-vad>=6.2"],  # finds pauses in long audio better than our energy threshold
    "lora": ["peft==0.21.2"],  # LoRA, the baseline of language experts
    "translation": ["sacrebleu>=2.4"],  # BLEU of translations into English
    "asterisk": [],  # what it needs, PyAV, is part of the core now
    "ctranslate2": ["ctranslate2>=4.5", "faster-whisper>=1.1"],  # export to faster-whisper, and running it
    "fast": ["ctranslate2>=4.5", *ONNX],  # the backends ctranslate2 and onnx
    "ray": ["ray[data]>=2.50"],  # pseudo-labelling on several machines
    "chinese": ["opencc>=1.1"],  # traditional and simplified characters count as the same in error rates
    "hub": ["datasets==5.2.0"],  # fetches FLEURS
    "storage": [
        "datasets==5.2.0",
        "s3fs>=2025.3",
    ],  # features in Parquet shards, also on S3 (fsspec brings or names the others)
    "app": [
        "gradio>=5",  # the page, and FastAPI for the endpoint
        "yt-dlp>=2026.2.21",  # audio behind links; older versions have known holes
    ],
    "webtest": [
        "playwright>=1.50",
        "openai>=1.60",
        "moto[server]>=5",
    ],  # tests: a browser, OpenAI's client, an S3 server
    "docs": [
        "sphinx>=8.2; python_version >= '3.11'",
        "myst-parser>=4; python_version >= '3.11'",
        "furo>=2024.8; python_version >= '3.11'",
    ],  # the documentation as a site: pages in Markdown, API from docstrings, a theme that works on phones
    "gpu": ["nvidia-ml-py>=12"],  # the GPU's clock in a result's provenance
    "dev": [
        "peft==0.21.2",
        "sacrebleu>=2.4",
        "pytest>=8",
        "pytest-xdist>=3.6",  # tests on all cores
        "ruff==0.17.5",
        "pre-commit>=4",
        "tensorboard>=2.16",
    ],
}

setup(
    name="efficient_asr",
    version="0.1.0",
    description="Techniques for cheaper speech recognition, with one honest measurement for all",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["efficient_asr", "efficient_asr.*"]),
    package_data={"efficient_asr": ["assets/*", "assets/*/*", "py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["efficient-asr = efficient_asr.commands:main"]},
)
