r"""Distillation: a student learns what a larger model thinks of every next token.

With the teacher's distribution :math:`t` and the student's :math:`s` at temperature :math:`T` (both softmax of logits / T),
the loss of a token is the forward Kullback-Leibler divergence (Hinton et al., arXiv 1503.02531) or the Jensen-Shannon
divergence, which "Multilingual DistilWhisper" (arXiv 2311.01070) found better:

.. math::
    KL = T^2 \sum_v t_v \log \frac{t_v}{s_v}, \qquad
    JS = \frac{T^2}{2} \left[ \sum_v t_v \log \frac{t_v}{m_v} + \sum_v s_v \log \frac{s_v}{m_v} \right], \; m = \frac{t + s}{2},

averaged over real tokens. Together with cross-entropy and a gate term,

.. math::
    L = \frac{1}{2} \left[ \frac{CE + gate}{\sigma_1^2} + w \frac{KD}{\sigma_2^2} \right] \; (+ \log \sigma_1 \sigma_2
    \text{ where the } \sigma \text{ are learned, arXiv 1705.07115}),

where :math:`w` may grow from 0 to 1 over the first steps.

The teacher never changes, so its distributions can be computed once and kept (`TeacherCache`): of every token the `k` likeliest
entries, and the rest as one. Divergences over these k + 1 classes are at most those over all, and equal where k is the whole
vocabulary.

Deviations: padding counts nowhere, where the published code averages over it; sums are in float32 whatever the models
compute in; no epsilons are added inside logarithms.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import log_softmax
from tqdm import tqdm

from efficient_asr import distributed
from efficient_asr.data import Row, Rows, absolute_lengths, iterate_batches
from efficient_asr.errors import UserError, check_writable, did_you_mean
from efficient_asr.files import file_state, write_whole
from efficient_asr.models.whisper_asr import Whisper

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kl_divergence(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats over the last dimension, [...]."""
    # xlogy-like: a class that the teacher excludes adds nothing
    terms = teacher_log_probs.exp() * (teacher_log_probs.clamp(min=-1e4) - student_log_probs.clamp(min=-1e4))
    return terms.sum(dim=-1)


def js_divergence(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence in nats over the last dimension, [...]; symmetric, at most log 2."""
    mean = torch.logaddexp(teacher_log_probs, student_log_probs) - math.log(2)
    return (kl_divergence(teacher_log_probs, mean) + kl_divergence(student_log_probs, mean)) / 2


DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}


@dataclass
class TeacherDistribution:
    """What a teacher thinks of each next token.

    Attributes
    ----------
    log_probs : torch.Tensor
        [batch, tokens, classes], at the temperature of the loss.
    indices : torch.Tensor or None
        Vocabulary entries of all classes but the last, which is the rest, [batch, tokens, classes - 1]; None where the classes
        are the vocabulary.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor | None = None

    def student(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the log-probabilities of the same classes from a student's logits [batch, tokens, vocabulary]."""
        log_probs = log_softmax(logits.float() / temperature, dim=-1)
        return log_probs if self.indices is None else with_rest(log_probs, self.indices)


def with_rest(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [..., k + 1] of some entries [..., k] and, last, of all others together."""
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, indices), rest.clamp(min=-1e4)], dim=-1)


class DistillationLoss(nn.Module):
    """The loss, with what it weighs.

    Arguments
    ---------
    kind : str
        `kl` or `js`.
    temperature : float
        Of both distributions.
    sigma : list of float
        Of cross-entropy and distillation.
    learn_sigma : bool
        Whether the sigmas are learned; their logarithms are then parameters.
    warm_up : float
        Share of the training over which the distillation's weight grows from 0 to 1.

    Raises
    ------
    UserError
        For a value that makes no sense.
    """

    def __init__(
        self,
        kind: str = "js",
        temperature: float = 1.0,
        sigma: tuple[float, float] | list[float] = (1.0, 1.0),
        learn_sigma: bool = False,
        warm_up: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in DIVERGENCES:
            raise UserError(f"distillation: '{kind}' is not kl or js.{did_you_mean(kind, DIVERGENCES)}")
        if not temperature > 0 or len(sigma) != 2 or not min(sigma) > 0 or not 0 <= warm_up <= 1:
            raise UserError(
                f"distillation: temperature {temperature} and two sigma {list(sigma)} must be above 0, "
                f"kd_warm_up {warm_up} from 0 to 1"
            )
        self.kind, self.temperature, self.warm_up = kind, temperature, warm_up
        self.log_sigma = nn.Parameter(torch.tensor(sigma, dtype=torch.float32).log(), requires_grad=learn_sigma)

    def divergence(self, teacher: TeacherDistribution, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence of the student's logits [batch, tokens, vocabulary] over real tokens [batch, tokens]."""
        per_token = DIVERGENCES[self.kind](teacher.log_probs.float(), teacher.student(logits, self.temperature))
        return self.temperature**2 * per_token[real].mean()

    def forward(self, supervised: torch.Tensor, divergence: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
        """Weigh cross-entropy (with gate term) and divergence, where `progress` of the training is done."""
        weight = min(1.0, progress / self.warm_up) if self.warm_up else 1.0
        first, second = (-2 * self.log_sigma).exp()
        loss = 0.5 * (first * supervised + weight * second * divergence)
        return loss + self.log_sigma.sum() if self.log_sigma.requires_grad else loss


class Teacher:
    """A Whisper that is asked, and learns nothing.

    Arguments
    ---------
    source : str
        Directory or hub id.
    student : Whisper
        Who is taught: both must have the same vocabulary.
    dtype : str
        What the teacher computes in: `float32`, or `bfloat16` and `float16` on GPUs.

    Raises
    ------
    UserError
        Where it cannot be loaded, or speaks another vocabulary.
    """

    def __init__(self, source: str, student: Whisper, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise UserError(f"teacher_dtype: '{dtype}' is not {', '.join(DTYPES)}")
        self.model = Whisper.from_source(source).requires_grad_(False).eval()
        sizes = [len(model.tokenizer) for model in (self.model, student)]
        if self.model.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise UserError(
                f"teacher: '{source}' has another vocabulary than the student ({sizes[0]} and {sizes[1]} entries); "
                "token by token they cannot be compared (large-v3 goes with students of its own vocabulary only)"
            )
        if self.model.window_samples != student.window_samples:
            raise UserError(f"teacher: '{source}' has a window of another length than the student")
        self.model.network.to(DTYPES[dtype])

    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor, temperature: float
    ) -> TeacherDistribution:
        """Return what follows each of `tokens` [batch, tokens], given [batch, time] with lengths [batch]."""
        logits = self.model.to(wavs.device)(wavs, lengths, tokens)
        return TeacherDistribution(log_softmax(logits.float() / temperature, dim=-1))


class TeacherCache:
    """A teacher's distributions on the disk, one file an utterance; an interrupted pass goes on where it was.

    A file belongs to id, tokens, and size and time of the audio file: of audio that was exchanged the teacher is asked again.

    Arguments
    ---------
    folder : Path
        Where.
    about : dict
        What they depend on: teacher, temperature, entries a token.

    Raises
    ------
    UserError
        Where the folder holds those of other settings.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = Path(folder), about
        path = self.folder / "about.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if found is not None and found != about:
            keys = [key for key in {**found, **about} if found.get(key) != about.get(key)]
            raise UserError(
                f"teacher_cache: {folder} differs in {', '.join(keys)}; name another folder or delete this one"
            )
        if found is None:
            check_writable(self.folder, "teacher_cache")
            write_whole(path, json.dumps(about, indent=1) + "\n")

    def path(self, name: str, tokens: list[int]) -> Path:
        """Return the file of an utterance with these tokens."""
        digest = hashlib.sha256(f"{name}\0{tokens}".encode()).hexdigest()[:24]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def fill(self, teacher: Teacher, student: Whisper, rows: Rows, device: str = "cpu") -> int:
        """Compute what is missing, utterance by utterance; returns how many were."""
        wanted = self.missing(student, rows)
        for (row,), wavs, wav_lens in tqdm(
            iterate_batches(wanted, 1), total=len(wanted), desc="asking the teacher", unit="utt", leave=False, mininterval=1,
            disable=not len(wanted) or not distributed.if_main_process(),
        ):  # fmt: skip
            self._keep(teacher, student, row, wavs.to(device), absolute_lengths(wavs, wav_lens).to(device))
        return len(wanted)

    def missing(self, student: Whisper, rows: Rows) -> Rows:
        """Return the utterances that the teacher has not been asked about."""
        return rows.select([i for i, row in enumerate(rows) if not self._holds(row, student.encode_row(row))])

    def _holds(self, row: Row, tokens: list[int]) -> bool:
        """Whether there is a file of this text and this audio; one that is damaged is not."""
        path = self.path(row["id"], tokens)
        try:
            with safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("audio") == file_state(row["audio"])
        except (SafetensorError, OSError):
            return False

    def _keep(self, teacher: Teacher, student: Whisper, row: Row, wavs: torch.Tensor, lengths: torch.Tensor) -> None:
        tokens = student.encode_row(row)
        asked = torch.tensor([tokens[:-1]], device=wavs.device)
        log_probs = teacher(wavs, lengths, asked, self.about["temperature"]).log_probs[0]
        indices = log_probs.topk(min(self.about["entries"], log_probs.shape[-1]), dim=-1).indices
        kept = {"log_probs": with_rest(log_probs, indices).half().cpu(), "indices": indices.int().cpu()}
        path = self.path(row["id"], tokens)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file(kept, partial, {"audio": file_state(row["audio"])})
        partial.replace(path)

    def read(self, names: list[str], tokens: torch.Tensor, lengths: torch.Tensor) -> TeacherDistribution:
        """Return the distributions of a batch: ids [batch], tokens with their end [batch, tokens] and lengths [batch].

        Raises
        ------
        UserError
            Where one is missing or damaged.
        """
        parts: list[dict[str, torch.Tensor]] = []
        for name, row, length in zip(names, tokens.tolist(), lengths.tolist(), strict=True):
            path = self.path(name, row[:length])
            try:
                parts.append(load_file(path))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"teacher_cache: {path} of utterance '{name}' cannot be read ({error}); delete it and start again"
                ) from None
        pad = nn.utils.rnn.pad_sequence
        log_probs = pad([part["log_probs"].float() for part in parts], batch_first=True)
        indices = pad([part["indices"].long() for part in parts], batch_first=True)
        return TeacherDistribution(log_probs.to(tokens.device), indices.to(tokens.device))
