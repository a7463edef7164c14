"""Figures that can go into a paper: a file backend, colours that colour-blind readers can tell apart, PNG with SVG and PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe, Ito: "Color Universal Design" (2008), without its yellow, which is too light for lines on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8C564B", "#5F6B6D")
MARKERS = "osD^vPXp<>"
# Text stays text in SVG and PDF; no dates or random ids, so that the same results give the same files.
pyplot.rcParams.update({"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "efficient_asr", "figure.dpi": 110})

__all__ = ["COLOURS", "MARKERS", "pyplot", "save_figure"]


def save_figure(figure: Any, path: Path, dpi: int = 120) -> Path:
    """Write a figure to `path` (PNG), and beside it as SVG and PDF; return `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    pyplot.close(figure)
    return path
