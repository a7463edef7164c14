"""What keeps a GPU busy: lengths rounded up, workers that stay, masks without loops over rows, one check of the gradients."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from efficient_asr.data import BatchOrder, absolute_lengths, make_loader, read_manifest
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.whisper import new_whisper_encoder
from efficient_asr.models.log_mel import mask_features
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.seeding import gradients_finite

LABELS = CharacterLabels("abcdefghijklmnopqrstuvwxyz '")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run scripts/gpu_check.sh on one")


def loader(corpus: Path, workers: int = 0, **options: float) -> torch.utils.data.DataLoader:
    rows = read_manifest(corpus / "train.jsonl")
    return make_loader(rows, LABELS, BatchOrder(rows.durations, "random", 2, None, 3), workers, **options)


def test_rounded_lengths_change_no_output(corpus: Path) -> None:
    model = CTCModel(
        torch.nn.Identity(), new_whisper_encoder(32, 2, 2), CTCHead(32, len(LABELS), "none"), LABELS
    ).eval()
    plain, rounded = (list(loader(corpus, **options)) for options in ({}, {"round_lengths_s": 0.5}))
    assert (
        {batch.wav.data.shape[1] % 8000 for batch in rounded}
        == {0}
        != {batch.wav.data.shape[1] % 8000 for batch in plain}
    )
    for a, b in zip(plain, rounded, strict=True):
        assert a.id == b.id and torch.equal(absolute_lengths(*a.wav), absolute_lengths(*b.wav))
        with torch.no_grad():
            (before, lengths), (after, same) = (model(*batch.wav) for batch in (a, b))
        assert (
            after.shape[1] == b.wav.data.shape[1] // 320
        )  # the encoder computes the rounded shape, not the longest one
        assert torch.equal(lengths, same)
        for row, count in enumerate(lengths.tolist()):
            torch.testing.assert_close(after[row, :count], before[row, :count], rtol=1e-4, atol=1e-4)


def test_workers_stay_and_epochs_differ_as_without_them(corpus: Path) -> None:
    found = []
    for workers in (0, 1):
        batches, processes = loader(corpus, workers), set()
        epochs = []
        for epoch in (1, 2, 3):
            batches.batch_sampler.set_epoch(epoch)
            epochs.append([batch.id for batch in batches])
            if workers:
                processes |= {worker.pid for worker in batches._iterator._workers}
        assert len(processes) == workers
        found.append(epochs)
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_masks_are_spans_within_their_limits() -> None:
    torch.manual_seed(0)
    mel = torch.ones(400, 80, 200)
    out = mask_features(mel, 2, 40, 15)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    times, bands = out[:, :, :].amax(dim=1) == 0, out.amax(dim=2) == 0  # wholly masked frames and bands
    assert int(times.sum(dim=1).max()) <= 80 and int(bands.sum(dim=1).max()) <= 30
    assert torch.equal(out == 0, times[:, None] | bands[:, :, None])
    starts = (times.int().diff(dim=1) == 1).sum(dim=1) + times[:, 0].int()
    assert int(starts.max()) <= 2
    # the mean width of a span is half of the widest; two of them overlap seldom
    np.testing.assert_allclose(float(times.sum(dim=1).float().mean()), 2 * 20 * (1 - 0.05), rtol=0.08)
    assert torch.equal(mask_features(mel, 0, 40, 15), mel)


def test_gradients_are_checked_as_a_whole() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    assert gradients_finite(parameters)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones(3)
    assert gradients_finite(parameters)
    for bad in (torch.nan, torch.inf, -torch.inf):
        parameters[1].grad = torch.tensor([1.0, bad, 1.0])
        assert not gradients_finite(parameters)


@NEEDS_GPU
def test_masks_need_no_synchronisation() -> None:
    mel = torch.ones(8, 80, 200, device="cuda")
    torch.manual_seed(0)
    expected = mask_features(mel.cpu(), 2, 40, 15)
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mask_features(mel, 2, 40, 15)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)


@NEEDS_GPU
def test_gradients_take_one_synchronisation() -> None:
    parameters = [torch.nn.Parameter(torch.ones(64, 64, device="cuda")) for _ in range(50)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert gradients_finite(parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1
