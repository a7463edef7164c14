"""Encoder states of a frozen encoder on disk, in half precision: the encoder runs once per utterance, and not once per epoch.

A file is valid for one place in an audio file, with its size and modification time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from efficient_asr.data import FeatureStore, Row, Rows, absolute_lengths, iterate_batches
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils import distributed
from efficient_asr.utils.files import file_state


def weights_digest(model: Whisper) -> str:
    """Return a checksum of the encoder's weights."""
    found = hashlib.sha256()
    for name, value in model.network.model.encoder.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class EncoderStates:
    """States of the whole window by utterance.

    Arguments
    ---------
    folder : Path
        Folder of the files; one that belongs to another encoder is refused.
    model : Whisper
        The model.
    rows : Rows
        The utterances.
    """

    def __init__(self, folder: Path, model: Whisper, rows: Rows) -> None:
        self.store = FeatureStore(folder, {"encoder": weights_digest(model)}, "encoder_states_folder")
        self.model, self.rows = model, rows
        self.names = {row["id"]: _name(row) for row in rows}

    @torch.no_grad()
    def fill(self, device: torch.device | str) -> None:
        """Compute what is missing; with several processes, each one computes its share."""
        about = [{"audio": file_state(row["audio"])} for row in self.rows]
        missing = [i for i, row in enumerate(self.rows) if not self.store.holds(_name(row), about[i])]
        mine = missing[distributed.rank() :: distributed.world_size()]
        config = self.model.network.config
        needed = 2 * len(missing) * config.max_source_positions * config.d_model
        self.store.check_room(needed, "use fewer utterances, or leave encoder_states_folder at null")
        if missing:
            print(f"{self.store.folder}: encoder states of {len(missing)} utterances, {needed / 1e9:.1f} GB")
        bar = tqdm(
            zip(mine, iterate_batches(self.rows.select(mine), 1), strict=True), total=len(mine), desc="encoding", unit="utt",
            leave=False, mininterval=1, disable=not mine or not distributed.if_main_process(),
        )  # fmt: skip
        self.model.to(device).eval()
        for i, ((row,), wavs, wav_lens) in bar:
            wavs = wavs.to(device)
            encoded = self.model.encode(wavs, absolute_lengths(wavs, wav_lens.to(device)))
            self.store.write(_name(row), {"states": encoded.states[0].half()}, about[i])
        distributed.ddp_barrier()

    def read(self, utterances: list[str]) -> torch.Tensor:
        """Return the states of utterances by their ids, [batch, positions, dim]."""
        return torch.stack([self.store.read(self.names[name])["states"].float() for name in utterances])


def _name(row: Row) -> str:
    return f"{row['audio']}\0{row.get('offset', 0)}\0{row['duration']}"
