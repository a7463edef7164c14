"""Fine-tune an encoder with some layers removed, to reduce its cost (arXiv 2303.06740).

    python recipes/layer_removal/train.py hparams/mini/layer_removal.yaml --kept_layers first_3
    python recipes/layer_removal/train.py hparams/layer_removal.yaml --data_folder /corpora/LibriSpeech --kept_layers last_12
    python recipes/layer_removal/train.py hparams/layer_removal.yaml ... --kept_layers all --test_only True --test_layerdrop 0.3

`kept_layers` is a number (the first N layers), last_N, every_K, least_redundant_N, a list of 1-based layers, or all, which is
identical to the recipe `finetune_ctc`; see `efficient_asr/techniques/layer_removal.py`. `test_layerdrop` skips layers at random
while the trained model is evaluated; see `efficient_asr/techniques/layer_drop.py`.
"""

import sys
from typing import Any

import numpy as np

from efficient_asr.data import Rows, iterate_batches
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.models.ctc import CTCModel
from efficient_asr.techniques.layer_drop import LayerDrop
from efficient_asr.techniques.layer_removal import choose_layers, keep_layers
from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run


class LayerRemovalBrain(CTCBrain):
    """Removes layers before training, or skips layers at random during evaluation."""

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> CTCModel:
        """Build the model, choose the layers to keep, and remove the others."""
        model = super().build(hparams, rows)
        count = min(len(rows), hparams["calibration_utterances"])
        some = rows.select(np.linspace(0, len(rows) - 1, count).astype(int))
        batches = (model.apply_frontend(wavs, wav_lens) for _, wavs, wav_lens in iterate_batches(some, 1))
        kept = choose_layers(model.encoder, hparams["kept_layers"], batches)
        if len(kept) < model.encoder.num_layers:
            before = model.history.get("layer_removal", {})
            numbers = before.get("kept_layers", range(1, model.encoder.num_layers + 1))  # in the original network
            total = before.get("of_layers", model.encoder.num_layers)
            keep_layers(model.encoder, kept)
            names = [numbers[i - 1] for i in kept]
            label = ",".join(map(str, kept)) if isinstance(hparams["kept_layers"], list) else hparams["kept_layers"]
            model.history["layer_removal"] = {"label": str(label), "kept_layers": names, "of_layers": total}
            print(f"kept layers, of {total}: {', '.join(map(str, names))}")
        return model

    @staticmethod
    def apply_eval_settings(transcriber: Transcriber, hparams: dict[str, Any]) -> None:
        """Enable random layer drop if `test_layerdrop` is set."""
        model = transcriber.model
        if hparams["test_layerdrop"]:
            model.encoder = LayerDrop(model.encoder, hparams["test_layerdrop"], hparams["test_layerdrop_seed"])

    @staticmethod
    def result_details(
        model: CTCModel, hparams: dict[str, Any], benchmark: Benchmark | None = None, records: Any = None
    ) -> dict[str, Any]:
        """Return the number of remaining layers and the layer drop settings."""
        details = {"layers": model.encoder.num_layers}
        if isinstance(model.encoder, LayerDrop):
            details |= {"test_layerdrop": model.encoder.probability, "test_layerdrop_seed": model.encoder.seed}
        return CTCBrain.result_details(model, hparams) | details


if __name__ == "__main__":
    sys.exit(run(LayerRemovalBrain, recipe="layer_removal"))
