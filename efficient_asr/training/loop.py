"""Loop: SpeechBrain's training loop with exact resumption. Base class of all Brains in this project.

- Training resumes from the last checkpoint, even in the middle of an epoch. On a CPU the final weights are bit-identical to
  those of an uninterrupted run: the batches of an epoch depend only on seed and epoch (`data.BatchOrder`), and the random numbers
  of a step only on seed, epoch, step and process, so there is no random state to restore (`position.py`).
- If a loss or gradient is not finite, the step is skipped and the utterances are reported; the run stops when patience is
  exhausted (`bad_batches.py`).
- On Ctrl-C, or SIGTERM from a scheduler, a checkpoint is saved before the run stops (`interrupts.py`).
- With several processes, all of them take these decisions together, and validation counts every utterance once (`validation.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import update_learning_rate
from torch import nn
from torch.utils.data import DataLoader

from efficient_asr.training.bad_batches import BadBatches
from efficient_asr.training.checkpoints import WORKER_DIED, StateAdapter, worker_died
from efficient_asr.training.interrupts import StopRequest
from efficient_asr.training.logs import Logs, Throughput
from efficient_asr.training.position import Position
from efficient_asr.training.validation import ValidationCounts
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.seeding import gradients_finite, seed_step


class Loop(sb.Brain):
    """A Brain whose subclasses define the loss.

    A subclass implements `compute_forward`, `compute_objectives` (which calls `count` outside training), and `init_optimizers`,
    which fills `optimizers_dict` and `schedulers` with the same names.

    Required YAML keys: epoch_counter, seed, skip_bad, nonfinite_patience, allow_changed_settings, train_loggers, output_folder.
    """

    outputs: tuple[str, ...] = ("",)  # model outputs counted separately in validation: suffixes of names in the log
    schedulers: dict[str, Any]
    train_loss = 0.0
    train_losses = (0.0,)  # running mean of each process

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Train to the end, resuming from the last checkpoint of an earlier run if there is one."""
        folder, hparams = Path(self.hparams.output_folder), self.hparams
        self.train_sampler = train_loader.batch_sampler  # SpeechBrain sets its epoch
        self.position = Position(self, hparams.epoch_counter, self.train_sampler, len(train_loader))
        self.logs, self.stop_request = Logs(folder), StopRequest()
        self.bad_batches = BadBatches(folder, self.logs, hparams.skip_bad, self.nonfinite_patience)
        self.valid_utterances = len(valid_loader.dataset)
        with self.stop_request.listening(), _without_cudnn_attention():
            try:
                self.fit(hparams.epoch_counter, train_loader, valid_loader)
            except RuntimeError as error:
                if not self.stop_request.requested:
                    raise (UserError(worker_died(error)) if WORKER_DIED in str(error) else error) from None
                # another process has already stopped on the same signal, so waiting for it fails
        if self.stop_request.requested:
            raise KeyboardInterrupt("stopped; rerun the command to resume from the last checkpoint")

    @property
    def model(self) -> nn.Module:
        """The model, unwrapped from DistributedDataParallel."""
        return getattr(self.modules["model"], "module", self.modules["model"])

    @property
    def progress(self) -> float:
        """Completed fraction of the training, in steps."""
        return self.position.progress

    def on_fit_start(self) -> None:
        """Wrap the model, create the optimisers, and resume from the last checkpoint, whose settings `run` has compared."""
        self._compile()
        self._wrap_distributed()
        self.init_optimizers()
        for name, optimizer in self.optimizers_dict.items():
            self.checkpointer.add_recoverable(f"{name}_optimizer", optimizer)
            self.checkpointer.add_recoverable(f"{name}_scheduler", _recoverable(self.schedulers[name], optimizer))
        newest = self.checkpointer.newest()
        if newest is not None:
            self.checkpointer.recover(newest)
            print(f"resuming from {newest.path}: {self.position.epoch} epochs and {self.step} batches are done")
        else:
            self.logs.cut_to({})  # of a run that was killed before its first checkpoint
        for name, scheduler in self.schedulers.items():
            if hasattr(scheduler, "start"):  # its learning rates depend on the total number of steps
                scheduler.start(self.optimizers_dict[name], self.position.total_steps)
        if self._optimizer_step_limit_exceeded and not self.step:  # SpeechBrain looks at the limit only after an epoch
            self.hparams.epoch_counter.limit = self.position.epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training and the sizes of the logs."""
        epochs, step = self.position.done
        return {
            "epochs_done": epochs,
            "step": step,
            "train_losses": self.train_losses,
            "optimizer_step": self.optimizer_step,
            "steps": [self.steps_tried, self.steps_taken],
            "nonfinite": self.bad_batches.nonfinite,
            "logs": self.logs.sizes(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position and truncate the logs to their sizes at that point."""
        self.position.restore(state["epochs_done"], state["step"])
        self.bad_batches.nonfinite, self.optimizer_step = state["nonfinite"], state["optimizer_step"]
        self.steps_tried, self.steps_taken = state.get("steps", [0, 0])  # of the current epoch
        losses = state["train_losses"]
        self.avg_train_loss = losses[min(distributed.rank(), len(losses) - 1)]
        self.logs.cut_to(state["logs"])

    # ------------------------------------------------------------ a step

    def fit_batch(self, batch: Any) -> torch.Tensor:
        """Process one batch; step the optimisers every `grad_accumulation_factor` batches and at the end of the epoch.

        The loss of each batch is divided by the number of batches in the step. If one batch is unusable, the whole step is
        skipped in all processes. Returns the loss, NaN for an unusable batch.
        """
        self.throughput.batch_came()
        should_step = self.position.between_steps
        seed_step(self.hparams.seed, self.position.epoch, self.step, distributed.rank())
        self.bad_batches.handle_unreadable(batch)
        self.group_ids += batch.id
        loss = self._backward(batch, should_step)
        if should_step:
            self._take_step()
        self.throughput.ready()
        return loss.detach().cpu()

    def _backward(self, batch: Any, should_step: bool) -> torch.Tensor:
        """Compute the loss and gradients of a batch; an unusable batch invalidates the step."""
        # Checked before the forward pass: under DistributedDataParallel either all processes run the model or none does.
        (unread,) = distributed.any_rank(not batch.id)
        loss = torch.tensor(torch.nan)
        with self.no_sync(not should_step):
            outputs = None
            if not (unread or self.spoiled):
                self.on_fit_batch_start(batch, should_step)
                with self.training_ctx:
                    outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                    loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
                self.throughput.audio_s += float(batch.duration.sum())
            finite = bool(torch.isfinite(loss))
            (bad,) = distributed.any_rank(not finite)
            if not bad:
                self.scaler.scale(loss / self.position.group_size).backward()
                self.on_fit_batch_end(batch, outputs, loss, should_step)
            elif not self.spoiled:
                self.spoiled = True
                if not unread:
                    ids = [] if finite else list(batch.id)
                    self.bad_batches.report_nonfinite("loss", ids, self.position.epoch, self.step)
        return loss

    def _take_step(self) -> None:
        """Step the optimisers, unless the step is invalid."""
        if not self.spoiled and not (self.scaler.is_enabled() or gradients_finite(self.model.parameters())):
            self.bad_batches.report_nonfinite("gradient", self.group_ids, self.position.epoch, self.step)
            self.spoiled = True
        self.steps_tried += 1
        if self.spoiled:
            self.zero_grad(set_to_none=True)
        else:
            scale = self.scaler.get_scale()
            self.optimizers_step()
            if self.scaler.get_scale() >= scale:  # fp16: a step whose gradients overflow is skipped and reduces it
                self.steps_taken += 1
                for name, optimizer in self.optimizers_dict.items():
                    if hasattr(self.schedulers[name], "on_batch_end"):  # changes the learning rate at every step
                        self.schedulers[name].on_batch_end(optimizer)
        self.spoiled, self.group_ids = False, []

    def freeze_optimizers(self, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers that have gradients: a gradient scaler rejects the others."""
        return {
            name: optimizer
            for name, optimizer in optimizers.items()
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        }

    def optimizers_step(self) -> None:
        """Step the optimisers. A step without any gradients is only counted, since a gradient scaler would reject it."""
        if self.freeze_optimizers(self.optimizers_dict):
            super().optimizers_step()
        else:
            self.optimizer_step += 1

    def evaluate_batch(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Validate one batch."""
        if self.stop_request.requested:
            self._stop()
        self.bad_batches.handle_unreadable(batch)
        if not batch.id:
            return torch.tensor(torch.nan)
        loss = super().evaluate_batch(batch, stage)
        self.valid_counts.add_loss(float(loss), len(batch.id))
        return loss

    def count(self, references: list[str], hypotheses: list[str], output: str = "") -> None:
        """Count the word errors of a validation batch for one of the model's `outputs`."""
        self.valid_counts.add_texts(references, hypotheses, output)

    # ------------------------------------------------------------ an epoch

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Reset the counters."""
        if stage == sb.Stage.TRAIN:
            self.position.phase, self.spoiled, self.group_ids = "training", False, []
            self.bad_batches.nonfinite = self.bad_batches.nonfinite if self.step else 0
            if not self.step:
                self.steps_tried = self.steps_taken = 0
            self.throughput = Throughput()
        self.valid_counts = ValidationCounts(self.outputs)

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Log; after validation, also anneal the learning rates and save."""
        if stage == sb.Stage.TRAIN:
            self._end_of_training(stage_loss, epoch)
        else:
            self._end_of_validation(epoch)

    def _end_of_training(self, stage_loss: float, epoch: int) -> None:
        """Log the throughput. Save if there are several processes, since they cannot save together during validation."""
        self.train_loss = distributed.all_reduce([float(stage_loss)])[0] / distributed.world_size()
        self.position.phase, self.train_losses = "validation", [self.train_loss]
        entry = self.throughput.entry(epoch, self.position.sampler.padding_percent())
        if entry is not None:
            self.logs.append("throughput.jsonl", entry)
        if self.steps_tried and not self.steps_taken:
            raise UserError(f"no optimiser step was taken in epoch {epoch}: every batch was skipped, see above")
        if distributed.world_size() > 1:
            self._save({"epoch": epoch})

    def _end_of_validation(self, epoch: int) -> None:
        """Log, update the learning rates, and save."""
        totals = self.valid_counts.all_processes()
        if totals["utterances"] < self.valid_utterances and not self.debug:
            raise UserError(
                f"only {totals['utterances']:.0f} of {self.valid_utterances} validation utterances can still be read; a WER over "
                "fewer utterances is not comparable with other epochs. Fix the files named above, then rerun to resume from "
                "the last checkpoint."
            )
        stats = {"loss": totals["loss"] / max(1.0, totals["utterances"])} | self.validation_stats(totals)
        learning_rates = {}
        for name, optimizer in self.optimizers_dict.items():
            learning_rates[f"lr_{name}"], new = self.schedulers[name](stats["loss"])
            update_learning_rate(optimizer, new)
        for logger in self.hparams.train_loggers:  # on every process: SpeechBrain's loggers let only one of them write
            logger.log_stats(
                {"epoch": epoch, **learning_rates}, train_stats={"loss": self.train_loss}, valid_stats=stats
            )
        self.position.phase, self.train_losses = "done", [0.0]
        self._save({"epoch": epoch, self.checkpointer.min_key: self.checkpoint_metric(stats)})

    def validation_stats(self, totals: dict[str, float]) -> dict[str, float]:
        """Return the validation statistics to log besides the loss, from the counts of all processes."""
        return self.valid_counts.error_rates(totals)

    def checkpoint_metric(self, stats: dict[str, float]) -> float:
        """Return the metric used to choose the best checkpoint; lower is better."""
        return stats["wer_percent"]

    # ------------------------------------------------------------ saving and stopping

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        """Return whether an intra-epoch checkpoint is due; only true between optimiser steps."""
        minutes, steps = self.ckpt_interval_minutes, self.ckpt_interval_steps
        due = 0 < minutes <= (time.time() - last_ckpt_time) / 60 or 0 < steps <= steps_since_ckpt
        due, stop = distributed.any_rank(due and distributed.if_main_process(), self.stop_request.requested)
        if stop and self.position.between_steps:
            self._stop()
        return due and self.position.between_steps

    def _save_intra_epoch_ckpt(self) -> None:
        self.train_losses = distributed.all_gather(self.avg_train_loss)
        self._save({"epoch": self.position.epoch})

    def _save(self, meta: dict[str, Any]) -> None:
        epochs, step = self.position.done
        name = f"epoch-{epochs:04d}" + (f"-batch-{step:07d}" if step else "")
        self.checkpointer.save(name, {"position": [epochs, step], **meta})

    def _stop(self) -> None:
        """Save a checkpoint and stop."""
        epoch = self.position.epoch
        if self.position.phase == "training":
            self._save_intra_epoch_ckpt()
            done = f"after {self.step} of {self.position.epoch_batches} batches"
        else:
            if distributed.world_size() == 1:
                self._save({"epoch": epoch})
            done = "in validation"
        raise KeyboardInterrupt(
            f"stopped in epoch {epoch} {done}; saved in {self.checkpointer.checkpoints_dir}. Rerun the command to resume."
        )


@contextlib.contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Use other kernels: cuDNN's attention makes a new plan for every shape, 7 ms each, and batches of speech have many."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _recoverable(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Return the scheduler, or a `StateAdapter` if it has no `state_dict` of its own."""
    if hasattr(scheduler, "clr_iterations"):  # SpeechBrain's cyclic scheduler sets it only at the first step
        scheduler.current_lr = optimizer.param_groups[0]["lr"]
    if hasattr(scheduler, "state_dict"):
        return scheduler
    # attributes of SpeechBrain's NewBob and cyclic schedulers
    names = ("hyperparam_value", "metric_values", "current_patient", "clr_iterations", "current_lr")
    return StateAdapter(scheduler, *(name for name in names if hasattr(scheduler, name)))
