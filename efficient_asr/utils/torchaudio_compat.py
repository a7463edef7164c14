"""Make `import torchaudio` work with a CPU-only torch.

torchaudio 2.11 is published only as a build linked against CUDA. With a CPU-only torch, its compiled extension fails
to load (`OSError: libc10_cuda.so`) and importing SpeechBrain fails too. The extension contains only `forced_align` and
`rnnt_loss`, which this project does not use. In this case only, an empty stub for `torchaudio._extension` is registered;
resampling, filterbanks and augmentation are pure torch and work as usual.
"""

from __future__ import annotations

import sys
import types


def ensure_importable() -> None:
    """Import torchaudio, with a stub for its extension if the compiled one cannot be loaded."""
    try:
        import torchaudio
    except OSError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stand_in = types.ModuleType("torchaudio._extension")
        stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stand_in._IS_RIR_AVAILABLE = False
        stand_in._IS_ALIGN_AVAILABLE = False
        stand_in.fail_if_no_align = lambda function: function
        stand_in._check_cuda_version = lambda: None
        stand_in._load_lib = lambda name: False
        stand_in._init_dll_path = lambda: None
        sys.modules["torchaudio._extension"] = stand_in
        import torchaudio  # noqa: F401
