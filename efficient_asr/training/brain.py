"""RecipeBrain: the hooks called by `run`, with defaults."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from efficient_asr.data import BatchOrder, Rows, make_loader, report_skipped
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.training.data import read_training_rows
from efficient_asr.training.loop import Loop
from efficient_asr.utils.errors import UserError, listing


class RecipeBrain(Loop):
    """Hooks called by `efficient_asr.training.run`, with defaults."""

    takes_language_model = False
    needs_text = True  # of training and validation utterances; otherwise `check_rows` gives them a text
    filled_before_training: tuple[str, ...] = ()  # YAML keys of folders for the results of a pass over all utterances
    validates_by: tuple[str, ...] = ()  # evaluation keys that affect the choice of the best checkpoint

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> nn.Module:
        """Build the model described by a YAML file; `rows` are the training utterances."""
        raise NotImplementedError

    @classmethod
    def read_rows(cls, hparams: dict[str, Any], manifest: Path, split: str, output_folder: Path) -> Rows:
        """Read and check the utterances of `train_split` or `valid_split`."""
        return read_training_rows(hparams, manifest, split, output_folder, cls.needs_text)

    @staticmethod
    def check_rows(model: nn.Module, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Return the training utterances that the model can be trained on; skipped ones are listed in a file."""
        return rows

    @staticmethod
    def check_valid_rows(model: nn.Module, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Return the validation utterances that the model can be validated on."""
        return rows

    @staticmethod
    def loader(model: nn.Module, rows: Rows, hparams: dict[str, Any], order: BatchOrder, key: str) -> DataLoader:
        """Return the loader of `train_split` or `valid_split`."""
        return make_loader(rows, model.labels, order, hparams["num_workers"], hparams["round_lengths_s"])

    @staticmethod
    def calibrate(model: nn.Module, hparams: dict[str, Any], rows: Rows) -> None:
        """Choose thresholds of the trained model on the validation utterances, before the model is saved."""

    @staticmethod
    def save(model: nn.Module, hparams: dict[str, Any], folder: Path, about: dict[str, Any]) -> None:
        """Write the model folder."""
        model.save(folder, about)

    @classmethod
    def made_of(cls, hparams: dict[str, Any], rows: dict[str, Rows]) -> dict[str, str]:
        """Return what a training depends on besides YAML keys and manifests, such as a digest of labels, by name.

        Checkpoints with other values are rejected.
        """
        return {}

    @staticmethod
    def check_benchmark(model: Any, benchmark: Benchmark, hparams: dict[str, Any]) -> None:
        """Reject, before training, a benchmark on which the trained model cannot be evaluated."""

    @staticmethod
    def baseline_source(hparams: dict[str, Any]) -> str | None:
        """Return the model that `test_only` evaluates if no model was trained, or None if there is no such model."""
        return None

    @staticmethod
    def load(source: str, hparams: dict[str, Any]) -> Transcriber:
        """Load a model folder for evaluation."""
        return load_transcriber(source)

    @staticmethod
    def apply_eval_settings(transcriber: Transcriber, hparams: dict[str, Any]) -> None:
        """Apply evaluation-only settings to the model loaded from its folder."""

    @staticmethod
    def default_language(model: nn.Module) -> str | None:
        """Return the language of training utterances that do not specify one; None if the language is not used."""
        return None

    @staticmethod
    def result_details(
        model: Any,
        hparams: dict[str, Any],
        benchmark: Benchmark | None = None,
        records: Iterable[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return the technique-specific entries of the Result.

        Arguments
        ---------
        model : Any
            The trained or loaded model; for a transcriber without a model, the transcriber itself.
        hparams : dict
            Values of the YAML file.
        benchmark, records : optional
            If given, the entries specific to this benchmark are included, from the records or by measuring.
        """
        return {key: value for entries in model.history.values() for key, value in entries.items() if key != "label"}

    def init_optimizers(self) -> None:
        """Create one optimiser per group of `parameter_groups`, using `<group>_optimizer` of the YAML file."""
        self.optimizers_dict, self.schedulers = {}, {}
        for name, parameters in self.parameter_groups().items():
            if parameters:
                self.optimizers_dict[name] = getattr(self.hparams, f"{name}_optimizer")(parameters)
                self.schedulers[name] = getattr(self.hparams, f"{name}_scheduler")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by group."""
        return {"model": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}


def leave_out(rows: Rows, bad: dict[int, str], skip_bad: bool, skipped_file: Path, advice: str) -> Rows:
    """Return the training utterances without the bad ones; `bad` maps an index to the problem.

    Raises
    ------
    UserError
        Naming the bad utterances, unless `skip_bad` is set; or if no utterance is left.
    """
    problems = [{"id": rows[i]["id"], "problem": problem} for i, problem in bad.items()]
    if bad and not skip_bad:
        shown = listing([f"{b['id']}: {b['problem']}" for b in problems])
        raise UserError(f"{len(bad)} of {len(rows)} training utterances cannot be used:\n{shown}\n{advice}")
    if bad:
        report_skipped("training utterances", problems, skipped_file)
    if len(bad) == len(rows):
        raise UserError("no usable training utterance is left")
    return rows.select([i for i in range(len(rows)) if i not in bad])
