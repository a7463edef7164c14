"""Manifests, audio, datasets and batches: the only place where data comes in."""

from efficient_asr.data.audio import SAMPLE_RATE, load_audio
from efficient_asr.data.batches import (
    BatchOrder,
    absolute_lengths,
    iterate_batches,
    make_loader,
    normalise_texts,
    pad_wavs,
    zero_padding,
)
from efficient_asr.data.manifest import (
    BROKEN,
    FIELDS,
    ORIGIN,
    Row,
    Rows,
    check_columns,
    read_manifest,
    report_skipped,
    write_manifest,
)

__all__ = [
    "BROKEN",
    "FIELDS",
    "ORIGIN",
    "SAMPLE_RATE",
    "BatchOrder",
    "Row",
    "Rows",
    "absolute_lengths",
    "check_columns",
    "iterate_batches",
    "load_audio",
    "make_loader",
    "normalise_texts",
    "pad_wavs",
    "read_manifest",
    "report_skipped",
    "write_manifest",
    "zero_padding",
]
