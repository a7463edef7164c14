"""Encoder states of a frozen encoder on disk, in half precision: the encoder runs once per utterance, and not once per epoch.

A file is valid for one place in an audio file, with its size and modification time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from efficient_asr.data import FeatureStore, Row, Rows, absolute_lengths, place_of
from efficient_asr.models.loading import weights_digest
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils import distributed


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
        self.store = FeatureStore(
            folder, {"encoder": weights_digest(model.network.model.encoder)}, "encoder_states_folder"
        )
        self.model, self.rows = model, rows
        self.names = {row["id"]: place_of(row) for row in rows}

    @torch.no_grad()
    def fill(self, device: torch.device | str) -> None:
        """Compute what is missing; with several processes, each one computes its share."""
        share = distributed.share(len(self.rows))  # whatever the others have written by now
        mine = self.store.missing(self.rows.select(share), place_of)
        config = self.model.network.config
        needed = 2 * len(mine) * distributed.world_size() * config.max_source_positions * config.d_model
        self.store.check_room(needed, "use fewer utterances, or leave encoder_states_folder at null")
        if len(mine):
            print(f"{self.store.folder}: encoder states, {needed / 1e9:.1f} GB")
        self.model.to(device).eval()

        def of_row(row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor) -> dict[str, torch.Tensor]:
            wavs = wavs.to(device)
            encoded = self.model.encode(wavs, absolute_lengths(wavs, wav_lens.to(device)))
            return {"states": encoded.states[0].half()}

        self.store.fill(mine, place_of, of_row, "encoding")
        distributed.ddp_barrier()

    def read(self, utterances: list[str]) -> torch.Tensor:
        """Return the states of utterances by their ids, [batch, positions, dim]."""
        return torch.stack([self.store.read(self.names[name])["states"].float() for name in utterances])
