"""Transcript: what a Transcriber returns for one utterance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Transcript:
    """Transcript of one utterance.

    Attributes
    ----------
    text : str
        Text as output by the model, not normalised.
    details : dict
        Decisions of the technique, such as `exit_layer` or `route`; plain values.
    """

    text: str
    details: dict[str, Any] = field(default_factory=dict)
