"""Filter pseudo-labels, and pack short utterances into long segments (Distil-Whisper, arXiv 2311.00430, step 1b).

    python recipes/pseudo_labelling/filter.py hparams/pseudo_labelling.yaml --manifest calls.jsonl --max_error_percent 20

Run it after label.py, with the same YAML file and output folder. It reads `labels.jsonl` there and writes `filtered.jsonl`,
`left_out.jsonl` with the reasons, and a report with a figure; with `pack_s`, also `packed.jsonl` and its audio. Run it again with
other thresholds: without packing it takes seconds.
"""

import json
import sys
from pathlib import Path

from ruamel.yaml import YAML

from efficient_asr.settings.step import Step, read_step
from efficient_asr.techniques.pseudo_labelling.filtering import Rules, read_labels, write_filtered
from efficient_asr.techniques.pseudo_labelling.packing import write_packed
from efficient_asr.utils.errors import UserError, exit_code


def check_same_manifest(step: Step, folder: Path) -> None:
    """Reject settings that name another manifest than the labels were made of.

    Raises
    ------
    UserError
        Naming both.
    """
    path, former = folder / "label.json", folder / "label.yaml"
    asked = step.plain["manifest"]
    labelled = asked
    if path.is_file():
        labelled = json.loads(path.read_text(encoding="utf-8"))["manifest"]
    elif former.is_file():  # of a former version; files among the data are not executed
        named = YAML().load(former.read_text(encoding="utf-8")).get("manifest")
        labelled = named if isinstance(named, str) and "<" not in named and "$" not in named else asked
    if labelled != asked:
        raise UserError(f"manifest: it is {asked}, but the labels in {folder} are of {labelled}; set output_folder")


def main() -> None:
    """Run the command."""
    step = read_step("filter.py", "pseudo_labelling")
    if step is None:
        return
    hparams = step.hparams
    names = ("max_error_percent", "min_avg_logprob", "max_no_speech_prob", "max_repetition", "max_duration_s")
    rules = Rules(hparams["filter_metric"], **{name: hparams[name] for name in names})
    folder = Path(hparams["output_folder"])
    check_same_manifest(step, folder)
    folder = step.keep("filter")
    report = write_filtered(read_labels(folder / "labels.jsonl"), rules, folder)
    kept, left = (f"{report['utterances'][name]} ({report['hours'][name]:g} h)" for name in ("kept", "left_out"))
    print(f"kept {kept}, left out {left}")
    for reason, count in report["reasons"].items():
        print(f"  {reason}: {count}")
    if report["without_text_and_confidence"]:
        print(
            f"{report['without_text_and_confidence']} have neither a text nor a confidence of the teacher to judge them by"
        )
    if not report["utterances"]["kept"]:
        raise UserError("nothing is kept; loosen the rules that are counted above")
    out = folder / "filtered.jsonl"
    (folder / "packed.jsonl").unlink(missing_ok=True)  # of other thresholds
    if hparams["pack_s"] is not None:
        out = write_packed(read_labels(out), folder, hparams["pack_s"])
    print(f"report: {folder / 'filter_report.json'}, figure: {folder / 'filter_report.png'}\nlabels: {out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
