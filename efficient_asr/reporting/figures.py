"""matplotlib, set up once for files: no window is ever opened."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["pyplot"]
