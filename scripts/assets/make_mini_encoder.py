"""Convert a trained CTC model to an asset in half precision, by default that of hparams/mini/pretrain.yaml to mini_encoder.

python scripts/assets/make_mini_encoder.py [MODEL_FOLDER [ASSET]]
"""

from __future__ import annotations

import sys
from pathlib import Path

from efficient_asr.models.parts import load_weights, save_folder
from efficient_asr.models.sources import ASSETS, read_config
from efficient_asr.utils.errors import exit_code
from efficient_asr.utils.files import atomic_write


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "output/mini_pretrain/1986/model")
    name = sys.argv[2] if len(sys.argv) > 2 else "mini_encoder"
    config = read_config(str(folder))
    state = {key: value.half() for key, value in load_weights(folder).items()}
    with atomic_write(ASSETS / name) as partial:
        save_folder(partial, config, state)
    size = (ASSETS / name / "model.safetensors").stat().st_size
    print(f"{ASSETS / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))
