"""Label audio with a teacher: its transcripts become training texts (Distil-Whisper, arXiv 2311.00430, step 1).

    python recipes/pseudo_labelling/label.py hparams/pseudo_labelling.yaml --manifest calls.jsonl --language de
    python recipes/pseudo_labelling/label.py hparams/mini/pseudo_labelling.yaml
    python recipes/pseudo_labelling/filter.py hparams/mini/pseudo_labelling.yaml      # step 1b, with the same settings

The manifest may have texts or not; `calls.jsonl#train` takes the rows of one split. `<output_folder>/labels.jsonl` has its rows
with the teacher's `text`, `avg_logprob`, `compression_ratio` and `no_speech_prob`, and, where there was a text, `origin_text`,
`wer_percent` and `cer_percent`. Rerun an interrupted command to continue: no utterance is labelled twice, and the file is that of
an uninterrupted run.
"""

import sys
from pathlib import Path

from efficient_asr.corpora import jsonl
from efficient_asr.data import read_manifest
from efficient_asr.models.sources import resolve_source
from efficient_asr.settings.step import read_step
from efficient_asr.techniques.pseudo_labelling.labelling import write_labels
from efficient_asr.text.normalise import get_normaliser
from efficient_asr.utils.errors import UserError, check_writable, exit_code


def main() -> None:
    """Run the command."""
    step = read_step("label.py", "pseudo_labelling")
    if step is None:
        return
    hparams = step.hparams
    device = step.asked if hparams["ray_address"] else step.device  # the GPUs of a cluster need not be here
    if hparams["normaliser"] is not None:
        get_normaliser(hparams["normaliser"])
    folder = Path(hparams["output_folder"])
    check_writable(folder, "output_folder")
    named = hparams["manifest"] if isinstance(hparams["manifest"], list) else [str(hparams["manifest"])]
    sources = [resolve_source(str(name)) for name in named]
    prepared = jsonl.prepare(".", folder / "input", {"manifest": sources}, hparams["columns"])["manifest"]
    rows = read_manifest(
        prepared, need_text=False, skip_bad=hparams["skip_bad"], skipped_file=folder / "skipped.jsonl",
        check_audio=hparams["check_audio"], cache=folder / "checked.json",
    )  # fmt: skip
    with_text = sum(bool(row.get("text")) for row in rows)
    print(f"{len(rows)} utterances, {rows.durations.sum() / 3600:.2f} hours; {with_text} have a text to compare with")
    if not with_text and "text" in (hparams["columns"] or {}):
        raise UserError(
            f"columns: no utterance has a column {hparams['columns']['text']!r}; leave it out if there are no texts"
        )
    out = write_labels(rows, hparams, folder, device, on_start=lambda: step.keep("label"))
    print(f"labels: {out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
