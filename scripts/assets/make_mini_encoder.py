"""Convert the model trained by hparams/mini/pretrain.yaml to the asset efficient_asr:mini_encoder (half precision).

python scripts/assets/make_mini_encoder.py [MODEL_FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from efficient_asr.models.parts import load_weights, save_folder
from efficient_asr.models.sources import ASSETS, read_config
from efficient_asr.utils.errors import exit_code


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "output/mini_pretrain/1986/model")
    config = read_config(str(folder))
    state = {key: value.half() for key, value in load_weights(folder).items()}
    save_folder(ASSETS / "mini_encoder", config, state)
    size = (ASSETS / "mini_encoder" / "model.safetensors").stat().st_size
    print(f"{ASSETS / 'mini_encoder'}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))
