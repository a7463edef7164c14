"""Frozen lower layers of an encoder with CTC: their states are computed without gradients, or read from the disk.

Most of the cost of an epoch is in layers that hardly change once the encoder has been fine-tuned. With `freeze_layers: n`, the
lowest n layers, and everything before them, keep their weights. With `layer_states_folder`, the states that they return are
stored in half precision, one file for each utterance and each speed of `speeds_percent`: an epoch then runs only the layers
above, though the audio is still read. A file is valid for one place in an audio file, with its size and modification time.

With `spec_augment`, spans of time are masked in these states and not in the input, which is the same for all epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficient_asr.data import SAMPLE_RATE, FeatureStore, Row, Rows, place_of
from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.encoders.base import EncoderState
from efficient_asr.models.loading import weights_digest
from efficient_asr.models.log_mel import mask_features
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError

MEL_FRAMES_PER_STATE = 2  # `spec_augment_frames` counts frames of 10 ms, and a state stands for 20 ms


def check_frozen_layers(model: CTCModel, hparams: dict[str, Any]) -> None:
    """Reject settings of frozen layers that make no sense with this model.

    Raises
    ------
    UserError
        Naming the keys.
    """
    count, folder, augment = hparams["freeze_layers"], hparams["layer_states_folder"], hparams["augment"]
    if not count:
        if folder:
            raise UserError("layer_states_folder: states of frozen layers; set freeze_layers to how many are frozen")
        return
    total = model.encoder.num_layers
    if count > total:
        raise UserError(f"freeze_layers: {count} layers cannot be frozen, the encoder has {total}")
    if hparams["features"] == "fbank" and not hparams["pretrained_model"]:
        raise UserError(
            "freeze_layers: the filterbanks' projection below the layers has to be trained first; set it to 0"
        )
    if not (isinstance(model.frontend, nn.Identity) or getattr(model.frontend, "is_identity", False)):
        raise UserError("freeze_layers: the front end changes the input of all layers; set it to 0")
    lowest = getattr(model.head, "layers", [total])[0]
    if lowest < count:
        raise UserError(f"freeze_layers: the head on layer {lowest} needs the states below layer {count}; freeze fewer")
    if hparams["train_layerdrop"] and folder:
        raise UserError("train_layerdrop: states on the disk are those of all frozen layers; set it to 0")
    if folder and (len(augment.noises) or len(augment.rirs)):
        raise UserError(
            "layer_states_folder: states of the audio without noise; set no noise_manifest and rir_manifest"
        )


def freeze_layers(model: CTCModel, count: int) -> None:
    """Freeze the lowest `count` layers of the encoder, and all its weights before them; 0 freezes nothing."""
    if not count:
        return
    trained = {id(p) for layer in model.encoder.layers[count:] for p in layer.parameters()}
    trained |= {id(p) for p in model.encoder.after_layers()}
    for parameter in model.encoder.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


class FrozenLayers:
    """Freezes the lowest layers of a model and returns their states.

    Arguments
    ---------
    model : CTCModel
        The model.
    hparams : dict
        Provides `freeze_layers`, `layer_states_folder`, `augment` and the keys of `spec_augment`.
    rows : Rows
        The training utterances.
    """

    def __init__(self, model: CTCModel, hparams: dict[str, Any], rows: Rows) -> None:
        check_frozen_layers(model, hparams)
        self.model, self.count, self.rows = model, hparams["freeze_layers"], rows
        freeze_layers(model, self.count)
        self.augment = hparams["augment"]
        self.speeds = self.augment.speeds_percent
        self.masks, widest = hparams["spec_augment_masks"], hparams["spec_augment_frames"]
        self.masked_frames = widest // MEL_FRAMES_PER_STATE if hparams["spec_augment"] else 0
        self.store, self.rows_by_id = None, {row["id"]: row for row in rows}
        if hparams["layer_states_folder"]:
            folder = Path(hparams["layer_states_folder"])
            trained = {name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad}
            meta = {"weights": weights_digest(model.encoder, without=trained), "layers": self.count}
            self.store = FeatureStore(folder, meta, "layer_states_folder")

    @torch.no_grad()
    def compute(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> EncoderState:
        """Return the state after the frozen layers for `wavs` [batch, time] with relative `wav_lens` [batch]."""
        encoder, training = self.model.encoder, self.model.encoder.training
        encoder.eval()
        try:
            state = encoder.begin(*self.model.apply_frontend(wavs, wav_lens))
            for index in range(self.count):
                state = encoder.run_layer(index, state)
        finally:
            encoder.train(training)
        return state

    def fill(self, device: torch.device | str) -> None:
        """Compute the states that are missing; with several processes, each one computes its share."""
        if self.store is None:
            return
        self.model.to(device)
        share = self.rows.select(distributed.share(len(self.rows)))
        for speed in self.speeds:
            missing = self.store.missing(share, lambda row, speed=speed: name_of(row, speed))
            samples = torch.from_numpy(missing.durations * SAMPLE_RATE * 100 / speed).long()
            frames = int(self.model.encoder.frame_lengths(samples).sum()) if len(missing) else 0
            needed = 2 * frames * self.model.encoder.hidden_size * distributed.world_size()
            self.store.check_room(needed, "use fewer speeds_percent, or leave layer_states_folder at null")
            if frames:
                print(f"{self.store.folder}: states of layer {self.count} at {speed} % speed, {needed / 1e9:.1f} GB")

            def of_row(
                row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor, speed: int = speed
            ) -> dict[str, torch.Tensor]:
                wavs = self.augment.at_speed(wavs.to(device), speed)
                state = self.compute(wavs, wav_lens.to(device))
                if state.position_bias is not None:
                    raise UserError("layer_states_folder: WavLM's layers share more than states; leave it at null")
                return {"states": state.states[0, : int(state.frame_lengths[0])].half()}

            self.store.fill(missing, lambda row, speed=speed: name_of(row, speed), of_row, "encoding")
        distributed.ddp_barrier()

    def of_batch(self, batch: Any) -> EncoderState:
        """Return the state after the frozen layers for a training batch, at a random speed, with masked spans of time."""
        if self.store is None:
            state = self.compute(*self.augment(*batch.wav))
        else:
            speed = self.speeds[int(torch.randint(len(self.speeds), ()))]
            states = [self.store.read(name_of(self.rows_by_id[name], speed))["states"].float() for name in batch.id]
            lengths = torch.tensor([len(each) for each in states])
            padded = nn.utils.rnn.pad_sequence(states, batch_first=True).to(batch.wav.data.device)
            lengths = lengths.to(padded.device)
            state = EncoderState(padded, lengths, self.model.encoder.mask(padded, lengths))
        if self.masked_frames:
            masked = mask_features(state.states.transpose(1, 2), self.masks, self.masked_frames, 0, state.frame_lengths)
            state.states = masked.transpose(1, 2)
        return state


def name_of(row: Row, speed_percent: int) -> str:
    """Return the name of an utterance's states at a speed."""
    return place_of(row) if speed_percent == 100 else f"{place_of(row)}\0{speed_percent}"
