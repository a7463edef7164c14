"""Find the layers whose int8 quantisation changes what a Whisper writes (after ZeroQ, arXiv 2001.00281).

The derivation is in `search.py`, tables are in `report.py`; `scripts/search_int8.py` is the command.
"""

from efficient_asr.utils.technique import Technique

TECHNIQUE = Technique(
    name="int8_search",
    page_markers={"int8_selection": "report:selection_table", "int8_kernels": "report:kernels_table"},
)
