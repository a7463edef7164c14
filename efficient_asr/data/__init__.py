"""Manifests, audio, datasets and batches: the only entry point for data."""

from efficient_asr.data.audio import (
    SAMPLE_RATE,
    AudioReport,
    from_samples,
    inspect_audio,
    load_audio,
    load_channels,
    load_row,
    silence,
)
from efficient_asr.data.batches import iterate_batches, make_loader, normalise_texts
from efficient_asr.data.feature_store import FeatureStore, audio_digest, place_of
from efficient_asr.data.manifest import (
    BROKEN,
    FIELDS,
    ORIGIN,
    Row,
    Rows,
    check_columns,
    parse_line,
    read_manifest,
    report_skipped,
    write_manifest,
)
from efficient_asr.data.padding import absolute_lengths, check_wavs, frame_mask, pad_wavs, zero_padding
from efficient_asr.data.parallel import Loader, in_parallel
from efficient_asr.data.sampler import BatchOrder
from efficient_asr.data.tables import TABLES, lines_of, table_rows

__all__ = [
    "BROKEN",
    "FIELDS",
    "ORIGIN",
    "SAMPLE_RATE",
    "TABLES",
    "AudioReport",
    "BatchOrder",
    "FeatureStore",
    "Loader",
    "Row",
    "Rows",
    "absolute_lengths",
    "audio_digest",
    "check_columns",
    "check_wavs",
    "frame_mask",
    "from_samples",
    "in_parallel",
    "inspect_audio",
    "iterate_batches",
    "lines_of",
    "load_audio",
    "load_channels",
    "load_row",
    "make_loader",
    "normalise_texts",
    "pad_wavs",
    "parse_line",
    "place_of",
    "read_manifest",
    "report_skipped",
    "silence",
    "table_rows",
    "write_manifest",
    "zero_padding",
]
