"""WhisperBrain: fine-tunes a Whisper model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch import nn
from torch.utils.data import DataLoader

from efficient_asr.data import SAMPLE_RATE, BatchOrder, Rows, absolute_lengths, make_loader
from efficient_asr.data.shards import Place, Shards, StoredUtterances
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.inference.load import load_transcriber, whisper_keys
from efficient_asr.inference.long_audio import LongAudio
from efficient_asr.inference.transcriber import MANIFEST, Transcriber
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.new import build_whisper
from efficient_asr.models.whisper.search import decode
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.text.normalise import get_normaliser
from efficient_asr.training.brain import RecipeBrain, leave_out
from efficient_asr.training.data import without_long
from efficient_asr.utils.errors import UserError


class WhisperBrain(RecipeBrain):
    """Fine-tunes a Whisper model with cross-entropy over the tokens after the prompt.

    The checkpoint with the lowest greedy validation WER is kept.
    """

    starts_from: tuple[type[Whisper], ...] = (Whisper,)  # exact model types that training may start from
    validates_by = ("test_normaliser", "max_new_tokens")
    checkpoints_activations = True

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load `source`, or build a new Whisper of `architecture` with a tokenizer trained on the training texts."""
        _check_languages(hparams["language"], rows)
        if hparams["source"]:
            model = Whisper.from_source(model_source(hparams["source"]), with_padding=False)
            if type(model) not in cls.starts_from:
                raise UserError(
                    f"source: '{hparams['source']}' is a Whisper model with {model.technique}, which this recipe cannot train"
                )
            model.reset_metadata()
        else:
            try:
                model = build_whisper([row["text"] for row in rows], **hparams["architecture"] or {})
            except (TypeError, ValueError, RuntimeError, KeyError) as error:
                raise UserError(
                    f"architecture: {dict(hparams['architecture'] or {})} cannot be built ({error})"
                ) from None
        model.labels.default_language = hparams["language"] if hparams["language"] not in (None, MANIFEST) else "en"
        model.labels.check_language(model.labels.default_language)
        model.network.requires_grad_(True)
        model.network.model.encoder.embed_positions.requires_grad_(False)
        if hparams["freeze_encoder"]:
            model.network.model.encoder.requires_grad_(False)
        if hparams["activation_checkpointing"]:
            if not cls.checkpoints_activations:
                raise UserError(
                    "activation_checkpointing: the layers of this technique do not support it; leave it at False"
                )
            model.network.gradient_checkpointing_enable({"use_reentrant": False})
        if hparams["spec_augment"]:
            model.spec_augment = tuple(hparams[f"spec_augment_{key}"] for key in ("masks", "frames", "bands"))
        adapted = cls.adapt(model, hparams, rows)
        adapted.labels.default_language, adapted.spec_augment = model.labels.default_language, model.spec_augment
        trained = sum(parameter.numel() for parameter in adapted.network.parameters() if parameter.requires_grad)
        adapted.history = {"training": {"trained_parameters": trained} | cls.training_details(adapted)}
        return adapted

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Add a technique to the model."""
        return model

    @staticmethod
    def training_details(model: Any) -> dict[str, Any]:
        """Return technique-specific details to record."""
        return {}

    @staticmethod
    def default_language(model: Whisper) -> str | None:
        """Return the language of training utterances that do not specify one."""
        return model.labels.default_language

    @classmethod
    def read_rows(cls, hparams: dict[str, Any], manifest: Path, split: str, output_folder: Path) -> Rows:
        """Read the utterances of a split: from stored features if there is `features_url`, or from the manifest."""
        if not hparams.get("features_url"):
            return super().read_rows(hparams, manifest, split, output_folder)
        augment = hparams["augment"]
        if augment.speed is not None or len(augment.rirs) or len(augment.noises):
            raise UserError(
                "features_url: the audio was heard already; set speeds_percent to [100], and no noise_manifest or rir_manifest"
            )
        if hparams["train_normaliser"] != "none":
            raise UserError("features_url: the texts were turned into labels already; set train_normaliser to none")
        return without_long(_shards(hparams, split).rows, split, hparams["max_duration_s"])

    @staticmethod
    def loader(model: Whisper, rows: Rows, hparams: dict[str, Any], order: BatchOrder, key: str) -> DataLoader:
        """Return the loader of `train_split` or `valid_split`."""
        if not hparams.get("features_url"):
            return RecipeBrain.loader(model, rows, hparams, order, key)
        shards = _shards(hparams, hparams[key])
        for name, value in features_meta(model).items():
            if shards.meta.get(name) != value:
                raise UserError(
                    f"features_url: the features of '{hparams[key]}' are for {name} {shards.meta.get(name)}, and this model "
                    f"needs {value}; prepare them with this model"
                )
        return make_loader(StoredUtterances(rows, shards), model.labels, order, hparams["num_workers"])

    @staticmethod
    def check_rows(model: Whisper, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Skip or reject utterances longer than the window or with more tokens than the decoder has positions."""
        return fitting_rows(model, rows, hparams["augment"].slowest, hparams["skip_bad"], skipped_file)

    @staticmethod
    def check_valid_rows(model: Whisper, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Like `check_rows`, at the original speed."""
        _check_languages(hparams["language"], rows, "validation")
        return fitting_rows(model, rows, 1.0, hparams["skip_bad"], skipped_file)

    @staticmethod
    def check_benchmark(model: Whisper, benchmark: Benchmark, hparams: dict[str, Any]) -> None:
        """Reject, before training, utterances and settings that the evaluation would reject."""
        transcriber = WhisperTranscriber(model, hparams["language"], decoding_options(hparams))
        transcriber.check_rows(benchmark.rows, benchmark.split)
        if hparams.get("long_audio") is not None:
            LongAudio(transcriber, hparams["long_audio"])
        if hparams.get("long_audio") == "sequential":
            padding = hparams["encoder_padding"]
            whole = model.encoder_padding is None if padding is None else not isinstance(padding, str) and padding >= 30
            if not whole:
                raise UserError(
                    "long_audio: sequential decoding encodes whole windows; set encoder_padding to 30, or use pauses"
                )
            if hparams["assistant"]:
                raise UserError(
                    "long_audio: sequential decoding has no assistant; set assistant to null, or use pauses"
                )

    @staticmethod
    def baseline_source(hparams: dict[str, Any]) -> str | None:
        """Return `source`: a Whisper model can be evaluated without training."""
        return hparams["source"]

    @staticmethod
    def load(source: str, hparams: dict[str, Any]) -> Transcriber:
        """Load a model folder with the decoding options of the YAML file."""
        options = {key: value for key, value in hparams.items() if key in DECODING}
        return load_transcriber(source, language=hparams["language"], **whisper_keys(hparams), **options)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return next-token logits [batch, tokens - 1, vocabulary]."""
        batch = batch.to(self.device)
        wavs, lengths = self.audio_of(batch, stage)
        if stage == sb.Stage.TRAIN:
            self.heard = wavs, lengths
            return self.modules["model"](wavs, lengths, batch.tokens[0][:, :-1], self.token_lengths(batch) - 1)
        # kept, because decoding in compute_objectives reuses it
        self.encoded = self.model.encode(wavs, lengths, languages=self.languages(batch))
        return self.model.predict(self.encoded, batch.tokens[0][:, :-1], self.token_lengths(batch) - 1)

    def audio_of(self, batch: Any, stage: sb.Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Return audio [batch, time], in training augmented, or stored features [batch, mels, frames]; and samples [batch]."""
        if hasattr(batch, "features"):
            return batch.features.data, (batch.duration.double() * SAMPLE_RATE).round().long()
        wavs, wav_lens = self.hparams.augment(*batch.wav) if stage == sb.Stage.TRAIN else batch.wav
        return wavs, absolute_lengths(wavs, wav_lens)

    @staticmethod
    def token_lengths(batch: Any) -> torch.Tensor:
        """Return the number of unpadded tokens, including prompt and end token, [batch]."""
        tokens, token_lens = batch.tokens
        return (token_lens * tokens.shape[1]).round().long()

    def languages(self, batch: Any) -> list[str]:
        """Return the language code of each utterance, [batch]."""
        return [language or self.model.labels.default_language for language in batch.language]

    def predicted(self, batch: Any) -> torch.Tensor:
        """Return the mask of logits that belong to unpadded tokens after the prompt, [batch, tokens - 1]."""
        place = torch.arange(batch.tokens[0].shape[1], device=batch.tokens[0].device)
        start = self.model.labels.text_start(batch.tokens[0])
        return ((place < self.token_lengths(batch)[:, None]) & (place >= start[:, None]))[:, 1:]

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the mean cross-entropy of the tokens after the prompt; outside training, also count word errors."""
        targets = batch.tokens[0][:, 1:].masked_fill(~self.predicted(batch), -100)
        if stage != sb.Stage.TRAIN:
            languages = self.languages(batch)
            options = DecodingOptions(
                max_tokens_per_s=self.hparams.max_tokens_per_s, max_new_tokens=self.hparams.max_new_tokens
            )
            found = decode(self.model, self.encoded, languages, options)
            normalise = get_normaliser(self.hparams.test_normaliser)
            pairs = [(a, b.text, language) for a, b, language in zip(batch.text, found, languages, strict=True)]
            self.count(*([normalise(pair[side], pair[2]) or " " for pair in pairs] for side in (0, 1)))
        smoothing = self.hparams.label_smoothing if stage == sb.Stage.TRAIN else 0.0
        return nn.functional.cross_entropy(predictions.transpose(1, 2), targets, label_smoothing=smoothing)


DECODING = frozenset(field.name for field in dataclasses.fields(DecodingOptions))


def decoding_options(hparams: dict[str, Any]) -> DecodingOptions:
    """Return the decoding options of a YAML file."""
    return DecodingOptions.of({key: value for key, value in hparams.items() if key in DECODING})


def _check_languages(language: str | None, rows: Rows, what: str = "training") -> None:
    """Reject a language other than those of the utterances: they would be trained in theirs, and tested in this one.

    Raises
    ------
    UserError
        Naming both.
    """
    if language in (None, MANIFEST):
        return
    found = Counter(normalise_or_keep(row["language"]) for row in rows if row.get("language"))
    others = ", ".join(f"{name} ({count} utterances)" for name, count in found.most_common() if name != language)
    if others:
        raise UserError(
            f"language: it is {language}, but the {what} manifest says {others}; set it to manifest, for that of each line"
        )


def _shards(hparams: dict[str, Any], split: str) -> Shards:
    """Open the stored features of a split."""
    cache = Path(hparams["features_cache"])
    return Shards(Place(hparams["features_url"]), split, cache, hparams["features_cache_gb"])


def features_meta(model: Whisper) -> dict[str, Any]:
    """Return what stored features and labels of a model depend on."""
    vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items()))
    return {
        "mels": model.network.config.num_mel_bins, "window_samples": model.window_samples,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
    }  # fmt: skip


def fitting_rows(model: Whisper, rows: Rows, slowest: float, skip_bad: bool, skipped_file: Path) -> Rows:
    """Skip or reject utterances longer than the window, with too many tokens for the decoder, or in an unknown language."""
    bad, fits, window_s = {}, model.network.config.max_target_positions, model.window_samples / SAMPLE_RATE
    for i, row in enumerate(rows):
        try:
            if row["duration"] / slowest > window_s:
                bad[i] = f"{row['duration'] / slowest:.1f} s (at the slowest speed) exceed the window of {window_s:g} s"
            elif len(model.labels.encode_row(row)) > fits:
                bad[i] = f"its text has more than {fits} tokens, the maximum of this Whisper model"
        except UserError as error:
            bad[i] = str(error)
    return leave_out(rows, bad, skip_bad, skipped_file, "Pass --skip_bad True to leave them out.")
