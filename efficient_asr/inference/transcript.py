"""Transcript: what a Transcriber returns for one utterance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Transcript:
    """What was heard in one utterance.

    Attributes
    ----------
    text : str
        As the model writes it, not normalised.
    details : dict
        What the technique did, such as `exit_layer` or `route`; plain values.
    """

    text: str
    details: dict[str, Any] = field(default_factory=dict)
