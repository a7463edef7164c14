"""Make a student: a copy of a Whisper with some of its layers (Distil-Whisper, arXiv 2311.00430, step 2).

    python recipes/distil_whisper/make_student.py hparams/distil_whisper.yaml --source openai/whisper-small --data_folder .

train.py does the same by itself; use this to look at a student before it is trained, or to train it with another program. The
folder `<output_folder>/student` is a Whisper as transformers writes it.
"""

import sys

from efficient_asr.models.hub import model_source
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.settings.step import read_step
from efficient_asr.techniques.pruning import prune
from efficient_asr.utils.errors import UserError, exit_code


def main() -> None:
    """Run the command."""
    step = read_step("make_student.py", "distil_whisper")
    if step is None:
        return
    hparams = step.hparams
    if not hparams["source"]:
        raise UserError("source: a student is made of a trained Whisper; give its folder or hub id")
    source = model_source(hparams["source"])
    model = Whisper.from_source(source, with_padding=False)
    before = sum(parameter.numel() for parameter in model.network.parameters())
    model.reset_metadata()
    prune(model, hparams["encoder_layers"], hparams["decoder_layers"])
    folder = step.keep("make_student") / "student"
    model.save(folder, {"recipe": hparams["recipe"], "technique": None, "details": model.history})
    config, after = model.network.config, sum(parameter.numel() for parameter in model.network.parameters())
    print(f"{source}: {before / 1e6:.1f} M parameters; student: {after / 1e6:.1f} M")
    print(f"encoder layers: {config.encoder_layers}, decoder layers: {config.decoder_layers}\nmodel: {folder}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
