"""Fine-tune an encoder on downsampled input (arXiv 2303.06740), so that it computes fewer frames.

    python recipes/downsampling/train.py hparams/mini/downsampling.yaml --downsampling_technique average
    python recipes/downsampling/train.py hparams/downsampling.yaml --data_folder /corpora/LibriSpeech \
        --downsampling_factor 3 --downsampling_technique convolutional

The technique is explained in `efficient_asr/techniques/downsampling.py`. The downsampler runs before the encoder and is trained
with the head; at factor 1, this recipe is identical to `finetune_ctc`.
"""

import sys
from typing import Any

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.models.ctc import CTCModel
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run


class DownsamplingBrain(CTCBrain):
    """Adds the downsampling settings to the Result."""

    @staticmethod
    def result_details(
        model: CTCModel, hparams: dict[str, Any], benchmark: Benchmark | None = None, records: Any = None
    ) -> dict[str, Any]:
        """Return technique, factor and the effective sample rate at the encoder."""
        downsampler = model.frontend
        return CTCBrain.result_details(model, hparams, benchmark, records) | {
            "downsampling_technique": downsampler.method,
            "downsampling_factor": float(downsampler.ratio),
            "effective_sample_rate_hz": SAMPLE_RATE / float(downsampler.ratio),
            "frames_per_state": model.head.frames_per_state,
        }


if __name__ == "__main__":
    sys.exit(run(DownsamplingBrain, recipe="downsampling"))
