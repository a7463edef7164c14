"""Convert the models of hparams/mini/whisper_{small,large}.yaml to the assets mini_whisper_{small,large} (half precision).

python scripts/assets/make_mini_whispers.py [FOLDER_OF_BOTH_OUTPUTS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from efficient_asr.models.sources import ASSETS
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import exit_code


def main() -> None:
    outputs = Path(sys.argv[1] if len(sys.argv) > 1 else "output")
    for name in ("mini_whisper_small", "mini_whisper_large"):
        Whisper.from_source(str(outputs / name / "1986" / "model")).save(ASSETS / name, dtype=torch.float16)
        size = sum(path.stat().st_size for path in (ASSETS / name).iterdir())
        print(f"{ASSETS / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))
