"""Brains: what the training loop (`loop.py`) does not know about our models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from torch import nn
from torch.utils.data import DataLoader

from efficient_asr.data import SAMPLE_RATE, BatchOrder, Rows, absolute_lengths, make_loader, report_skipped
from efficient_asr.errors import UserError, listing
from efficient_asr.evaluation.evaluator import Benchmark
from efficient_asr.evaluation.transcriber import MANIFEST, Transcriber, load_transcriber
from efficient_asr.evaluation.whisper_decoding import WhisperTranscriber
from efficient_asr.loop import Loop
from efficient_asr.models import resolve_source
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.models.decoding import DecodingOptions
from efficient_asr.models.encoder import Encoder
from efficient_asr.models.new_whisper import new_whisper
from efficient_asr.models.whisper_asr import Whisper
from efficient_asr.text import CharacterLabels, get_normaliser


class RecipeBrain(Loop):
    """What `experiment.run` asks of a Brain, with answers that fit most."""

    takes_language_model = False
    validates_by: tuple[str, ...] = ()  # keys of the evaluation that the choice of the best checkpoint depends on

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> nn.Module:
        """Put the model of a YAML file together, with the training utterances."""
        raise NotImplementedError

    @staticmethod
    def check_rows(model: nn.Module, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Return the training utterances that the model can learn from; those left out go to a file."""
        return rows

    @staticmethod
    def check_valid_rows(model: nn.Module, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Return the validation utterances that the model can be validated on."""
        return rows

    @staticmethod
    def loader(model: nn.Module, rows: Rows, hparams: dict[str, Any], order: BatchOrder, key: str) -> DataLoader:
        """Return the loader of `train_split` or `valid_split`."""
        return make_loader(rows, model.labels, order, hparams["num_workers"])

    @staticmethod
    def finish(model: nn.Module, hparams: dict[str, Any], rows: Rows) -> None:
        """Do what is left to do to the trained model before it is saved, with the validation utterances."""

    @staticmethod
    def save(model: nn.Module, hparams: dict[str, Any], folder: Path, about: dict[str, Any]) -> None:
        """Write the model folder."""
        model.save(folder, about)

    @staticmethod
    def check_benchmark(model: Any, benchmark: Benchmark, hparams: dict[str, Any]) -> None:
        """Refuse, before the training, what the trained model could not be measured on."""

    @staticmethod
    def untrained(hparams: dict[str, Any]) -> str | None:
        """Return the model that `test_only` measures where nothing was trained; None where there is none."""
        return None

    @staticmethod
    def load(source: str, hparams: dict[str, Any]) -> Transcriber:
        """Load a model folder to measure it."""
        return load_transcriber(source)

    @staticmethod
    def configure(model: Any, hparams: dict[str, Any]) -> None:
        """Apply the settings that belong to measuring rather than to training, to the model as it was saved."""

    @staticmethod
    def details_of(
        model: Any, benchmark: Benchmark | None = None, records: Iterable[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Technique-specific entries of the Result; with a benchmark, what was found on it besides, or is to be measured."""
        return {key: value for entries in model.history.values() for key, value in entries.items() if key != "label"}

    def init_optimizers(self) -> None:
        """One optimiser for each group of `parameter_groups`, made by `<group>_optimizer` of the YAML file."""
        self.optimizers_dict, self.schedulers = {}, {}
        for name, parameters in self.parameter_groups().items():
            if parameters:
                self.optimizers_dict[name] = getattr(self.hparams, f"{name}_optimizer")(parameters)
                self.schedulers[name] = getattr(self.hparams, f"{name}_scheduler")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what is trained, by group."""
        return {"model": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}


class CTCBrain(RecipeBrain):
    """Fine-tunes an encoder with a CTC head.

    The encoder and the rest (head, front end) have an optimiser each, annealed by NewBob on the validation loss; the
    checkpoint with the lowest greedy validation WER is kept.
    """

    takes_language_model = True

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> CTCModel:
        """Put the model of a YAML file together; its alphabet comes from the training texts.

        Where `pretrained_model` names a model folder, alphabet and weights come from there.
        """
        folder = hparams["pretrained_model"]
        labels = (
            CTCModel.load(resolve_source(folder)).labels
            if folder
            else CharacterLabels.from_texts(row["text"] for row in rows)
        )
        encoder = hparams["encoder"]
        model = CTCModel(hparams["frontend"], encoder, cls.make_head(hparams, encoder, len(labels)), labels)
        if folder:
            new = model.start_from(resolve_source(folder))
            print(f"started from {folder}" + (f"; new: {', '.join(new)}" if new else ""))
        return model

    @staticmethod
    def make_head(hparams: dict[str, Any], encoder: Encoder, n_labels: int) -> nn.Module:
        """Make the head that the YAML describes."""
        return hparams["head"](encoder.hidden_size, n_labels)

    @staticmethod
    def check_rows(model: CTCModel, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Find the utterances that this model cannot learn from.

        Their text has characters outside the alphabet, or their audio gives fewer CTC frames than their text needs: one for
        each character and one more between equal neighbours.

        Arguments
        ---------
        model : CTCModel
            Knows its alphabet and how many frames come out.
        rows : Rows
            Training utterances.
        hparams : dict
            Whether such utterances may be left out (`skip_bad`), and the highest speed that augmentation may apply.
        skipped_file : Path
            Where those left out are listed.

        Raises
        ------
        UserError
            Naming the utterances.
        """
        skip_bad, fastest = hparams["skip_bad"], hparams["augment"].fastest
        frames = model.frame_lengths(torch.from_numpy((rows.durations * 16000 / fastest).astype(np.int64))).tolist()
        bad = {}
        for i, (row, available) in enumerate(zip(rows, frames, strict=True)):
            unknown = model.labels.unknown(row["text"])
            tokens = model.labels.encode(row["text"])
            needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
            if unknown:
                bad[i] = f"its text has characters that the model does not know: {' '.join(sorted(unknown))}"
            elif available < needed:
                bad[i] = f"{row['duration']:.2f} s give {available} frames, its {len(tokens)} characters need {needed}"
        advice = (
            "Leave them out with --skip_bad True. Where frames are too few, a smaller downsampling_factor helps, or a "
            "head that emits more (--frames_per_state 2); where characters are unknown, another train_normaliser."
        )
        return leave_out(rows, bad, skip_bad, skipped_file, advice)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The encoder (if anything in it is trained), and everything else."""
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "head": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["encoder" if name.startswith("encoder.") else "head"].append(parameter)
        return groups

    def compute_forward(self, batch: Any, stage: sb.Stage, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities [batch, frames, labels] and frame lengths [batch]; options are the model's."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.wav
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.augment(wavs, wav_lens)
        # Validation goes round DistributedDataParallel, whose processes would wait for each other at every batch.
        return (self.modules["model"] if stage == sb.Stage.TRAIN else self.model)(wavs, wav_lens, **options)

    def compute_objectives(self, predictions: tuple, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the CTC loss, and count errors outside training."""
        log_probs, frame_lengths = predictions
        if stage != sb.Stage.TRAIN:
            self.count(batch.text, greedy_texts(log_probs, frame_lengths, self.model.labels))
        return ctc_loss(log_probs, frame_lengths, batch)


class WhisperBrain(RecipeBrain):
    """Fine-tunes a Whisper with cross-entropy over the tokens behind the prompt.

    The checkpoint with the lowest greedy validation WER is kept.
    """

    sources = ("Whisper",)  # classes that a training may start from
    distils = False  # whether a teacher is asked
    validates_by = ("test_normaliser",)

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load `source`, or make a new Whisper of `architecture`, whose tokenizer comes from the training texts."""
        if hparams.get("teacher") and not cls.distils:
            raise UserError(
                "teacher: this recipe learns from transcripts alone; recipes/clsr_distillation and lora take one"
            )
        if hparams["source"]:
            model = Whisper.from_source(resolve_source(hparams["source"]))
            if type(model).__name__ not in cls.sources:
                raise UserError(
                    f"source: '{hparams['source']}' is a Whisper with {model.technique} in it, which this recipe cannot train"
                )
            model.forget_origin()
        else:
            try:
                model = new_whisper([row["text"] for row in rows], **hparams["architecture"] or {})
            except (TypeError, ValueError, RuntimeError, KeyError) as error:
                raise UserError(
                    f"architecture: {dict(hparams['architecture'] or {})} cannot be built ({error})"
                ) from None
        model.default_language = hparams["language"] if hparams["language"] not in (None, MANIFEST) else "en"
        model.check_language(model.default_language)
        model.network.requires_grad_(True)
        model.network.model.encoder.embed_positions.requires_grad_(False)
        if hparams["freeze_encoder"]:
            model.network.model.encoder.requires_grad_(False)
        adapted = cls.adapt(model, hparams, rows)
        adapted.default_language = model.default_language
        trained = sum(parameter.numel() for parameter in adapted.network.parameters() if parameter.requires_grad)
        adapted.history = {"training": {"trained_parameters": trained} | cls.about(adapted)}
        return adapted

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Put a technique into the model."""
        return model

    @staticmethod
    def about(model: Any) -> dict[str, Any]:
        """Return what is worth noting of the technique."""
        return {}

    @staticmethod
    def check_rows(model: Whisper, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Leave out, or refuse, what does not fit into the window or has more tokens than the decoder has positions."""
        return _fitting_rows(model, rows, hparams["augment"].slowest, hparams["skip_bad"], skipped_file)

    @staticmethod
    def check_valid_rows(model: Whisper, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """The same, at the speed they have."""
        return _fitting_rows(model, rows, 1.0, hparams["skip_bad"], skipped_file)

    @staticmethod
    def check_benchmark(model: Whisper, benchmark: Benchmark, hparams: dict[str, Any]) -> None:
        """Refuse utterances in a language that the model does not know."""
        WhisperTranscriber(model, hparams["language"]).check_rows(benchmark.rows, benchmark.split)

    @staticmethod
    def untrained(hparams: dict[str, Any]) -> str | None:
        """A Whisper can be measured as it is."""
        return hparams["source"]

    @staticmethod
    def load(source: str, hparams: dict[str, Any]) -> Transcriber:
        """Load it with the decoding options of the YAML file."""
        options = {f.name: hparams[f.name] for f in dataclasses.fields(DecodingOptions) if f.name in hparams}
        return load_transcriber(source, language=hparams["language"], long_audio=hparams["long_audio"], **options)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return logits [batch, tokens - 1, vocabulary] of the tokens that follow each one."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.wav
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.augment(wavs, wav_lens)
            lengths = absolute_lengths(wavs, wav_lens)
            self.heard = wavs, lengths
            return self.modules["model"](wavs, lengths, batch.tokens[0][:, :-1], self.token_lengths(batch) - 1)
        # noted, because the texts are searched from it, too
        self.encoded = self.model.encode(wavs, absolute_lengths(wavs, wav_lens), languages=self.languages(batch))
        return self.model.predict(self.encoded, batch.tokens[0][:, :-1], self.token_lengths(batch) - 1)

    @staticmethod
    def token_lengths(batch: Any) -> torch.Tensor:
        """Return how many tokens are real, with prompt and end, [batch]."""
        tokens, token_lens = batch.tokens
        return (token_lens * tokens.shape[1]).round().long()

    def languages(self, batch: Any) -> list[str]:
        """Return the code of each utterance's language, [batch]."""
        return [language or self.model.default_language for language in batch.language]

    def predicted(self, batch: Any) -> torch.Tensor:
        """Return which of the logits belong to real tokens behind the prompt, [batch, tokens - 1]."""
        place = torch.arange(batch.tokens[0].shape[1], device=batch.tokens[0].device)
        return ((place < self.token_lengths(batch)[:, None]) & (place >= self.model.prompt_length))[:, 1:]

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the mean cross-entropy of the tokens behind the prompt, and count errors outside training."""
        targets = batch.tokens[0][:, 1:].masked_fill(~self.predicted(batch), -100)
        if stage != sb.Stage.TRAIN:
            languages = self.languages(batch)
            options = DecodingOptions(max_tokens_per_s=self.hparams.max_tokens_per_s)
            found = self.model.decode(self.encoded, languages, options)
            normalise = get_normaliser(self.hparams.test_normaliser)
            pairs = [(a, b.text, language) for a, b, language in zip(batch.text, found, languages, strict=True)]
            self.count(*([normalise(pair[side], pair[2]) or " " for pair in pairs] for side in (0, 1)))
        smoothing = self.hparams.label_smoothing if stage == sb.Stage.TRAIN else 0.0
        return nn.functional.cross_entropy(predictions.transpose(1, 2), targets, label_smoothing=smoothing)


def _fitting_rows(model: Whisper, rows: Rows, slowest: float, skip_bad: bool, skipped_file: Path) -> Rows:
    """Leave out, or refuse, what does not fit into the window, has too many tokens for the decoder, or an unknown language."""
    bad, fits, window_s = {}, model.network.config.max_target_positions, model.window_samples / SAMPLE_RATE
    for i, row in enumerate(rows):
        try:
            if row["duration"] / slowest > window_s:
                bad[i] = (
                    f"{row['duration'] / slowest:.1f} s (at the slowest speed) are longer than the window of {window_s:g} s"
                )
            elif len(model.encode_row(row)) > fits:
                bad[i] = f"its text has more than the {fits} tokens that this Whisper can write"
        except UserError as error:
            bad[i] = str(error)
    return leave_out(rows, bad, skip_bad, skipped_file, "Leave them out with --skip_bad True.")


def leave_out(rows: Rows, bad: dict[int, str], skip_bad: bool, skipped_file: Path, advice: str) -> Rows:
    """Return the training utterances without the bad ones (index: what is wrong with it).

    Raises
    ------
    UserError
        Naming them, unless `skip_bad` leaves them out; or where nothing is left.
    """
    problems = [{"id": rows[i]["id"], "problem": problem} for i, problem in bad.items()]
    if bad and not skip_bad:
        shown = listing([f"{b['id']}: {b['problem']}" for b in problems])
        raise UserError(f"{len(bad)} of {len(rows)} training utterances cannot be learned from:\n{shown}\n{advice}")
    if bad:
        report_skipped("training utterances", problems, skipped_file)
    if len(bad) == len(rows):
        raise UserError("no training utterance is left that the model can learn from")
    return rows.select([i for i in range(len(rows)) if i not in bad])


def ctc_loss(log_probs: torch.Tensor, frame_lengths: torch.Tensor, batch: Any) -> torch.Tensor:
    """Mean CTC loss of [batch, frames, labels] with lengths [batch] for the batch's `tokens`."""
    tokens, token_lens = batch.tokens
    targets = (token_lens * tokens.shape[1]).round().long()
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), tokens, frame_lengths, targets, CharacterLabels.blank_index, zero_infinity=True
    )
