"""Loop: SpeechBrain's training loop, made to lose nothing. Every Brain of this project inherits it.

- It goes on from the last checkpoint, in the middle of an epoch too, and on a CPU ends bit for bit where an uninterrupted run
  ends: the batches of an epoch follow from seed and epoch (`data.BatchOrder`), and the random numbers of a step from seed, epoch,
  step and process, so that there is no random state to restore.
- A loss or gradient that is not finite skips the step, names the utterances, and stops the run after some patience.
- Ctrl-C, or SIGTERM from a scheduler, ends it after a checkpoint.
- With several processes all of them take these decisions together, and validation counts every utterance once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jiwer
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import update_learning_rate
from torch import nn
from torch.utils.data import DataLoader

from efficient_asr import distributed
from efficient_asr.checkpoints import WORKER_DIED, Attributes, check_settings, worker_died
from efficient_asr.errors import UserError, listing
from efficient_asr.seeding import gradients_finite, seed_step


class Loop(sb.Brain):
    """A Brain whose subclasses say how to compute a loss.

    A subclass has `compute_forward`, `compute_objectives` (which calls `count` outside training), and `init_optimizers`, which
    fills `optimizers_dict` and `schedulers` with the same names.

    Expects in the YAML: epoch_counter, seed, skip_bad, nonfinite_patience, go_on, train_loggers, output_folder.
    """

    stop_requested = False
    phase = "training"  # then "validation", then "done"
    nonfinite, train_loss = 0, 0.0
    train_losses = (0.0,)  # running mean of every process
    schedulers: dict[str, Any]
    outputs: tuple[str, ...] = ("",)  # what validation counts separately: suffixes of names in the log

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Train to the end, from wherever an earlier run came to."""
        self.train_sampler, self.train_batches = train_loader.batch_sampler, len(train_loader)
        self.valid_utterances = len(valid_loader.dataset)
        with self._stoppable():
            try:
                self.fit(self.hparams.epoch_counter, train_loader, valid_loader)
            except RuntimeError as error:
                if not self.stop_requested:
                    raise (UserError(worker_died(error)) if WORKER_DIED in str(error) else error) from None
                # another process has answered the same signal already, and cannot be waited for any more
        if self.stop_requested:
            raise KeyboardInterrupt("stopped; the same command goes on from the last checkpoint")

    @property
    def model(self) -> nn.Module:
        """The model itself, also under DistributedDataParallel."""
        return getattr(self.modules["model"], "module", self.modules["model"])

    # ------------------------------------------------------------ where it stands

    def on_fit_start(self) -> None:
        """Wrap, make the optimisers, and go on from the last checkpoint."""
        self._compile()
        self._wrap_distributed()
        self.init_optimizers()
        for name, optimizer in self.optimizers_dict.items():
            self.checkpointer.add_recoverable(f"{name}_optimizer", optimizer)
            scheduler = self.schedulers[name]
            if hasattr(scheduler, "clr_iterations"):  # SpeechBrain's sets it at the first step only
                scheduler.current_lr = optimizer.param_groups[0]["lr"]
            if not hasattr(scheduler, "state_dict"):  # SpeechBrain's NewBob and cyclic one
                names = ("hyperparam_value", "metric_values", "current_patient", "clr_iterations", "current_lr")
                scheduler = Attributes(scheduler, *(name for name in names if hasattr(scheduler, name)))
            self.checkpointer.add_recoverable(f"{name}_scheduler", scheduler)
        newest = self.checkpointer.newest()
        if newest is not None:
            check_settings(newest, self.checkpointer.settings, self.hparams.go_on)
            self.checkpointer.recover(newest)
            print(
                f"going on from {newest.path}: {self.hparams.epoch_counter.current} epochs and {self.step} batches are done"
            )
        for name, scheduler in self.schedulers.items():
            if hasattr(scheduler, "start"):  # its rates depend on how many steps there will be
                scheduler.start(self.optimizers_dict[name], self.total_steps)

    @property
    def total_steps(self) -> int:
        """Steps of the optimisers in the whole training."""
        return max(1, self.hparams.epoch_counter.limit * math.ceil(self.train_batches / self.grad_accumulation_factor))

    @property
    def epoch_batches(self) -> int:
        """Batches of the current epoch, which may differ from epoch to epoch where they are formed by length."""
        batches = len(self.train_sampler)
        return min(batches, self.debug_batches) if self.debug else batches

    @property
    def group_size(self) -> int:
        """Batches of the current step: the last ones of an epoch may be fewer than `grad_accumulation_factor`."""
        rest = self.epoch_batches % self.grad_accumulation_factor
        return rest if self.step > self.epoch_batches - rest else self.grad_accumulation_factor

    @property
    def between_steps(self) -> bool:
        """Whether no batch waits for others of its step."""
        return self.step % self.grad_accumulation_factor == 0 or self.step == self.epoch_batches

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps."""
        return self.optimizer_step / self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training, and how long the logs were."""
        epoch, step = self._position()
        return {
            "epochs_done": epoch,
            "step": step,
            "train_losses": self.train_losses,
            "optimizer_step": self.optimizer_step,
            "nonfinite": self.nonfinite,
            "logs": {name: path.stat().st_size for name, path in self._logs().items() if path.is_file()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the position over, and cut from the logs what was written after it."""
        self.hparams.epoch_counter.current = state["epochs_done"]
        self.step = self.train_sampler.skip = state["step"]
        self.nonfinite, self.optimizer_step = state["nonfinite"], state["optimizer_step"]
        losses = state["train_losses"]
        self.avg_train_loss = losses[min(distributed.rank(), len(losses) - 1)]
        for name, path in self._logs().items() if distributed.if_main_process() else ():
            size = state["logs"].get(name, 0)
            if path.is_file() and path.stat().st_size > size:
                os.truncate(path, size)

    def _logs(self) -> dict[str, Path]:
        folder = Path(self.hparams.output_folder)
        return {name: folder / name for name in ("train_log.txt", "nonfinite.jsonl", "throughput.jsonl")}

    def _position(self) -> tuple[int, int]:
        """Return the epochs that are done, and the batches of the one that is not."""
        epoch = self.hparams.epoch_counter.current
        if self.phase == "done":
            return epoch, 0
        return epoch - 1, self.step if self.phase == "training" else self.epoch_batches

    # ------------------------------------------------------------ a step

    def fit_batch(self, batch: Any) -> torch.Tensor:
        """Take one batch, and a step of the optimisers at every `grad_accumulation_factor`-th and at the last one of the epoch.

        The loss of each is divided by how many batches the step has.

        Whatever makes one batch unusable spoils the whole step, in all processes. Returns the loss, NaN for a spoiled one.
        """
        started = time.perf_counter()
        self.waiting_s += started - self._ready_at
        should_step = self.between_steps
        seed_step(self.hparams.seed, self.hparams.epoch_counter.current, self.step, distributed.rank())
        self._answer_problems(batch)
        self.group_ids += batch.id
        # Asked before the model runs: under DistributedDataParallel all processes run it, or none.
        (unread,) = distributed.any_process(not batch.id)
        loss = torch.tensor(torch.nan)
        with self.no_sync(not should_step):
            outputs = None
            if not (unread or self.spoiled):
                self.on_fit_batch_start(batch, should_step)
                with self.training_ctx:
                    outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                    loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
                self.audio_s += float(batch.duration.sum())
            finite = bool(torch.isfinite(loss))
            (bad,) = distributed.any_process(not finite)
            if not bad:
                self.scaler.scale(loss / self.group_size).backward()
                self.on_fit_batch_end(batch, outputs, loss, should_step)
            elif not self.spoiled:
                self.spoiled = True
                if not unread:
                    self._report("loss", [] if finite else list(batch.id))
        if should_step:
            if not self.spoiled and not (self.scaler.is_enabled() or gradients_finite(self.model.parameters())):
                self._report("gradient", self.group_ids)
                self.spoiled = True
            self.steps_tried += 1
            if self.spoiled:
                self.zero_grad(set_to_none=True)
            else:
                self.optimizers_step()
                self.steps_taken += 1
                for name, optimizer in self.optimizers_dict.items():
                    if hasattr(self.schedulers[name], "on_batch_end"):  # changes the learning rate with every step
                        self.schedulers[name].on_batch_end(optimizer)
            self.spoiled, self.group_ids = False, []
        self._ready_at = time.perf_counter()
        return loss.detach().cpu()

    def freeze_optimizers(self, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
        """Return those optimisers that have something to do: a gradient scaler refuses the others."""
        return {
            name: optimizer
            for name, optimizer in optimizers.items()
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        }

    def optimizers_step(self) -> None:
        """Take a step; one in which nothing learns counts, too, but a gradient scaler would refuse it."""
        if self.freeze_optimizers(self.optimizers_dict):
            super().optimizers_step()
        else:
            self.optimizer_step += 1

    def _answer_problems(self, batch: Any) -> None:
        """Stop at utterances that could not be read, or note them where they may be left out."""
        for problem in batch.problems:
            if not self.hparams.skip_bad:
                raise UserError(
                    f"utterance '{problem['id']}': {problem['problem']}\nMend it and start the same command again to go on, "
                    "or leave such utterances out with --skip_bad True."
                )
            print(f"left out: utterance '{problem['id']}': {problem['problem']}", file=sys.stderr)
            with open(Path(self.hparams.output_folder) / "skipped_unreadable.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(problem, ensure_ascii=False) + "\n")

    def _report(self, what: str, ids: list[str]) -> None:
        """Name the utterances of a step that was skipped; stop where patience is exhausted."""
        self.nonfinite += 1
        ids = list(itertools.chain.from_iterable(distributed.gather(ids)))
        epoch, patience = self.hparams.epoch_counter.current, self.nonfinite_patience
        names = listing([", ".join(ids[i : i + 8]) for i in range(0, len(ids), 8)])
        message = f"the {what} is not finite in epoch {epoch}, batch {self.step}, with these utterances:\n{names}"
        if distributed.if_main_process():
            with open(self._logs()["nonfinite.jsonl"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"epoch": epoch, "batch": self.step, "what": what, "ids": ids}) + "\n")
            print(f"step skipped: {message}", file=sys.stderr)
        if self.nonfinite > patience:
            raise UserError(
                f"{message}\nThat is the {self.nonfinite}. time (nonfinite_patience is {patience}). Listen to the utterances in "
                f"{self._logs()['nonfinite.jsonl']}, or lower the learning rates."
            )

    def evaluate_batch(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Validate one batch."""
        if self.stop_requested:
            self._stop()
        self._answer_problems(batch)
        if not batch.id:
            return torch.tensor(torch.nan)
        loss = super().evaluate_batch(batch, stage)
        self.valid_totals["loss"] += float(loss) * len(batch.id)
        self.valid_totals["utterances"] += len(batch.id)
        return loss

    def count(self, references: list[str], hypotheses: list[str], output: str = "") -> None:
        """Count the word errors of a validation batch, of one of the model's `outputs`."""
        words = jiwer.process_words(references, hypotheses)
        self.valid_totals["errors" + output] += words.substitutions + words.deletions + words.insertions
        self.valid_totals["words" + output] += words.hits + words.substitutions + words.deletions

    # ------------------------------------------------------------ an epoch

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start counting."""
        if stage == sb.Stage.TRAIN:
            self.phase, self.spoiled, self.group_ids = "training", False, []
            self.nonfinite = self.nonfinite if self.step else 0
            self.audio_s = self.waiting_s = 0.0
            self.steps_tried = self.steps_taken = 0
            self._ready_at = self._epoch_started = time.perf_counter()
        counted = [name + output for output in self.outputs for name in ("errors", "words")]
        self.valid_totals = dict.fromkeys(("loss", "utterances", *counted), 0.0)

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Log; after validation anneal and save."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = distributed.sums([float(stage_loss)])[0] / distributed.processes()
            self.phase, self.train_losses = "validation", [self.train_loss]
            self._log_throughput(epoch)
            if self.steps_tried and not self.steps_taken:
                raise UserError(f"not one step could be taken in epoch {epoch}: every batch was skipped, as said above")
            if distributed.processes() > 1:  # which then validate at their own pace, and could not save together
                self._save({"epoch": epoch})
            return
        totals = dict(zip(self.valid_totals, distributed.sums(list(self.valid_totals.values())), strict=True))
        if totals["utterances"] < self.valid_utterances and not self.debug:
            raise UserError(
                f"only {totals['utterances']:.0f} of {self.valid_utterances} validation utterances can be read any more, and a "
                "WER over fewer would not compare with that of other epochs. Mend those named above, then start the same "
                "command again: it goes on from the last checkpoint."
            )
        stats = {"loss": totals["loss"] / max(1.0, totals["utterances"])} | self.validation_stats(totals)
        learning_rates = {}
        for name, optimizer in self.optimizers_dict.items():
            learning_rates[f"lr_{name}"], new = self.schedulers[name](stats["loss"])
            update_learning_rate(optimizer, new)
        for logger in self.hparams.train_loggers:  # on every process: SpeechBrain's loggers see to it that one writes
            logger.log_stats(
                {"epoch": epoch, **learning_rates}, train_stats={"loss": self.train_loss}, valid_stats=stats
            )
        self.phase, self.train_losses = "done", [0.0]
        self._save({"epoch": epoch, self.checkpointer.min_key: self.to_minimise(stats)})

    def validation_stats(self, totals: dict[str, float]) -> dict[str, float]:
        """Return what the log says of a validation besides the loss, from what was counted in all processes."""
        rates = {o: 100 * totals["errors" + o] / max(1.0, totals["words" + o]) for o in self.outputs}
        stats = {"wer_percent": sum(rates.values()) / len(rates)}  # of several outputs the mean
        return stats | {f"wer_percent{output}": rate for output, rate in rates.items() if output}

    def to_minimise(self, stats: dict[str, float]) -> float:
        """Return the number by which the best checkpoint is chosen."""
        return stats["wer_percent"]

    def _log_throughput(self, epoch: int) -> None:
        """Note how much audio a second was trained on, how long the loop waited for data, and what padding cost."""
        wall_s = time.perf_counter() - self._epoch_started
        audio_s, waiting_s = distributed.sums([self.audio_s, self.waiting_s])
        if wall_s <= 0 or not audio_s or not distributed.if_main_process():
            return
        entry = {
            "epoch": epoch,
            "processes": distributed.processes(),
            "audio_s": round(audio_s, 1),
            "wall_s": round(wall_s, 3),
            "audio_s_per_s": round(audio_s / wall_s, 1),
            "waiting_percent": round(100 * waiting_s / distributed.processes() / wall_s, 1),
            "padding_percent": round(self.train_sampler.padding_percent(), 1),
        }
        with open(self._logs()["throughput.jsonl"], "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    # ------------------------------------------------------------ stopping and saving

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the training after the current step; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: Any) -> None:
            # torchrun passes a Ctrl-C on to processes that had it already: several are one there.
            if self.stop_requested and distributed.processes() == 1:
                raise KeyboardInterrupt("stopped at once; the same command goes on from the last checkpoint")
            self.stop_requested = True

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        """Whether it is time for a checkpoint within the epoch: only between steps of the optimisers."""
        minutes, steps = self.ckpt_interval_minutes, self.ckpt_interval_steps
        due = 0 < minutes <= (time.time() - last_ckpt_time) / 60 or 0 < steps <= steps_since_ckpt
        due, stop = distributed.any_process(due and distributed.if_main_process(), self.stop_requested)
        if stop and self.between_steps:
            self._stop()
        return due and self.between_steps

    def _save_intra_epoch_ckpt(self) -> None:
        self.train_losses = distributed.gather(self.avg_train_loss)
        self._save({"epoch": self.hparams.epoch_counter.current})

    def _save(self, meta: dict[str, Any]) -> None:
        epochs, step = self._position()
        name = f"epoch-{epochs:04d}" + (f"-batch-{step:07d}" if step else "")
        self.checkpointer.save(name, {"position": [epochs, step], **meta})

    def _stop(self) -> None:
        """Save and end."""
        epoch = self.hparams.epoch_counter.current
        if self.phase == "training":
            self._save_intra_epoch_ckpt()
            done = f"after {self.step} of {self.epoch_batches} batches"
        else:
            if distributed.processes() == 1:
                self._save({"epoch": epoch})
            done = "in validation"
        raise KeyboardInterrupt(
            f"stopped in epoch {epoch} {done}; saved in {self.checkpointer.checkpoints_dir}. The same command goes on from there."
        )
