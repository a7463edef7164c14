"""Silence cache: Whisper on the audio's own length, without training (Whisper: arXiv 2212.04356).

The derivation and the cache are in `cache.py`, tables and figures in `report.py`.
"""

from efficient_asr.utils.technique import Column, Technique

TECHNIQUE = Technique(
    name="silence_cache",
    parts={"silence_cache": "cache:SilenceCache"},
    encoder_paddings={"silence_cache": "cache:SilenceCache"},
    columns=(Column("encoded s", "encoder_s", digits=1), Column("encoded again %", "encoded_again_percent", digits=1)),
    page_markers={
        "silence_cache": "report:comparison_table",
        "peers": "report:peers_table",
        "distances": "report:distances_table",
        "lengths": "report:lengths_table",
    },
    pictures="report:draw_all",
)
