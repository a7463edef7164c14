"""Export a CTC model for SpeechBrain's `EncoderASR`, and take over a CTC checkpoint that SpeechBrain has trained.

A checkpoint of SpeechBrain's wav2vec 2.0 CTC recipes consists of the encoder (`wav2vec2.ckpt`), a `ModuleList` of a `VanillaNN`
and a linear layer (`model.ckpt`, `asr.ckpt`), and the labels (`label_encoder.txt`, `tokenizer.ckpt`). Only weights and labels are
read; its YAML file is not executed.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from torch import nn

from efficient_asr.data import SAMPLE_RATE, frame_mask
from efficient_asr.models.ctc import CTCModel
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

BLANK = "<blank>"
ENCODER_FILES = ("wav2vec2.ckpt", "hubert.ckpt", "wavlm.ckpt", "ssl_model.ckpt", "weighted_ssl_model.ckpt")
HEAD_FILES = ("model.ckpt", "asr.ckpt")
LABEL_FILES = ("label_encoder.txt", "tokenizer.ckpt", "tokenizer.txt")

HYPERPARAMS = """\
# Exported by `efficient-asr export`; needs the package efficient_asr. To use it:
#     from speechbrain.inference.ASR import EncoderASR
#     asr = EncoderASR.from_hparams(source="path/of/this/folder")
#     asr.transcribe_file("audio.wav")
sample_rate: {sample_rate}
network: !new:efficient_asr.models.interchange.speechbrain.EncoderForSpeechBrain
    config: !ref <config>
config: {config}
modules:
    encoder: !ref <network>
tokenizer: !new:speechbrain.dataio.encoder.CTCTextEncoder
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        network: !ref <network>
        tokenizer: !ref <tokenizer>
"""


class EncoderForSpeechBrain(nn.Module):
    """A CTC model as the `encoder` of SpeechBrain's `EncoderASR`.

    Arguments
    ---------
    config : dict
        Content of the model folder's config.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = CTCModel.from_config(config, "the exported model").eval()

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [batch, frames, labels] for `wavs` [batch, time] with relative lengths [batch].

        Frames past the end of an utterance are blank, whatever length the decoder assumes.
        """
        log_probs, frame_lengths = self.model(wavs, wav_lens)
        inside = frame_mask(frame_lengths, log_probs.shape[1])[:, :, None]
        blank = torch.full_like(log_probs, float("-inf"))
        blank[:, :, CharacterLabels.blank_index] = 0.0
        return torch.where(inside, log_probs, blank)


def export_to_speechbrain(model: CTCModel, folder: Path) -> None:
    """Write a folder that `EncoderASR.from_hparams` opens: any CTC model of this project, with greedy decoding."""
    encoder = CTCTextEncoder()
    encoder.insert_blank(BLANK, CharacterLabels.blank_index)
    encoder.update_from_iterable(model.labels.characters, sequence_input=False)
    # JSON is YAML; HyperPyYAML would read a string that begins with "!" as an object, but none does.
    config = json.dumps(model.to_config())
    with atomic_write(Path(folder)) as partial:
        partial.mkdir()
        torch.save({f"model.{key}": value for key, value in model.state_dict().items()}, partial / "network.ckpt")
        encoder.save(partial / "tokenizer.ckpt")
        text = HYPERPARAMS.format(sample_rate=SAMPLE_RATE, config=config)
        (partial / "hyperparams.yaml").write_text(text, encoding="utf-8")


# ------------------------------------------------------------ checkpoints trained by SpeechBrain


def is_speechbrain_checkpoint(folder: Path | str) -> bool:
    """Whether a folder contains the encoder of a CTC model that SpeechBrain has trained."""
    return Path(folder).is_dir() and any((Path(folder) / name).is_file() for name in ENCODER_FILES)


def read_labels(folder: Path | str) -> tuple[CharacterLabels, list[int]]:
    """Read the labels of a SpeechBrain checkpoint.

    Returns
    -------
    labels : CharacterLabels
        The characters; in lower case if all of them are upper case, as in this project's transcripts.
    rows : list of int
        Output of the checkpoint's linear layer for the blank and each character.

    Raises
    ------
    UserError
        If there is no file with labels, or no blank among them.
    """
    path = _find(folder, LABEL_FILES, "labels")
    encoder = CTCTextEncoder()
    try:
        encoder.load(path)
    except (UnicodeDecodeError, ValueError, SyntaxError, IndexError) as error:
        raise UserError(
            f"pretrained_model: {path} does not contain characters as labels; models with subword units cannot be taken over"
        ) from error
    labels = {label: index for label, index in encoder.lab2ind.items() if len(label) == 1}
    blank = encoder.lab2ind.get(getattr(encoder, "blank_label", BLANK))
    if blank is None or not labels:
        raise UserError(f"pretrained_model: {path} has no blank or no characters among its labels")
    lower = {label.lower(): index for label, index in labels.items()}
    if not any(label.islower() for label in labels) and len(lower) == len(labels):
        labels = lower
    labels = {" ": labels.pop(" "), **dict(sorted(labels.items()))} if " " in labels else dict(sorted(labels.items()))
    return CharacterLabels(list(labels)), [blank, *labels.values()]


def start_from_speechbrain(model: CTCModel, folder: Path | str) -> list[str]:
    """Load the weights of a SpeechBrain checkpoint into a model whose labels are those of `read_labels`.

    Returns
    -------
    list of str
        Names of the parameters that were not loaded.

    Raises
    ------
    UserError
        If the encoder does not match, naming a parameter.
    """
    _, rows = read_labels(folder)
    encoder = {
        re.sub(r"^(module\.|model\.|wav2vec2\.|hubert\.|wavlm\.)+", "", key): value
        for key, value in _read(_find(folder, ENCODER_FILES, "encoder")).items()
    }
    state = {f"encoder.model.{key}": value for key, value in encoder.items()}
    state |= _head_state(_read(_find(folder, HEAD_FILES, "head")), rows)
    fitting, left = model.match(state)
    wrong = [key for key in left if key.startswith("encoder.") and not key.endswith("masked_spec_embed")]
    if wrong:
        raise UserError(
            f"pretrained_model: the encoder in {folder} does not match `source` (for example, {wrong[0]}); use the source "
            "that it was trained from"
        )
    return model.load_matched(fitting)


def _head_state(state: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    """Return the head's weights: block `0` and linear layer `1` of a ModuleList, with the rows of our labels."""
    found = {f"head.block.{key[2:]}": value for key, value in state.items() if key.startswith("0.")}
    for name in ("weight", "bias"):
        value = state.get(f"1.w.{name}")
        if value is not None and max(rows) < len(value):
            found[f"head.linear.{name}"] = value[rows]
    return found


def _find(folder: Path | str, names: tuple[str, ...], what: str) -> Path:
    """Return a file of a checkpoint; labels are also looked for in the folders above (`save/CKPT+.../`)."""
    folder = Path(folder)
    for place in (folder, folder.parent, folder.parent.parent):
        for name in names:
            if (place / name).is_file():
                return place / name
        if what != "labels":
            break
    raise UserError(f"pretrained_model: the SpeechBrain checkpoint {folder} has no {what} ({', '.join(names)})")


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"pretrained_model: {path} is not a checkpoint of weights ({str(error).splitlines()[0]})"
        ) from None
