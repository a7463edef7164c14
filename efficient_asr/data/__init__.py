"""Manifests, audio, datasets and batches: the only place where data comes in."""

from efficient_asr.data.audio import SAMPLE_RATE, inspect_audio, load_audio
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
    lines_of,
    parse_line,
    read_manifest,
    report_skipped,
    write_manifest,
)
from efficient_asr.data.parallel import in_parallel
from efficient_asr.data.states import StateStore

__all__ = [
    "BROKEN",
    "FIELDS",
    "ORIGIN",
    "SAMPLE_RATE",
    "BatchOrder",
    "Row",
    "Rows",
    "StateStore",
    "absolute_lengths",
    "check_columns",
    "in_parallel",
    "inspect_audio",
    "iterate_batches",
    "lines_of",
    "load_audio",
    "make_loader",
    "normalise_texts",
    "pad_wavs",
    "parse_line",
    "read_manifest",
    "report_skipped",
    "write_manifest",
    "zero_padding",
]
