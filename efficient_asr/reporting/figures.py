"""matplotlib with a file backend: no window is opened."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["pyplot"]
