#!/usr/bin/env bash
# A first result in about three minutes on 2 CPU cores, after the installation: one model of each kind on the synthetic mini corpus, a
# table and a picture (scripts/quickstart.py).
#
# With --all, everything in miniature, in about twenty minutes more: fine-tune a small encoder with CTC, downsample its input in three
# ways, remove layers in two ways, let easy utterances exit early, route each utterance to a small or a large Whisper, adapt the small
# one with experts and LoRA, distil the large one from its own labels; all with language models and three timed runs. RESULTS=folder
# writes these results to another folder.
#
# Restartable: finished steps are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
case "${1:-}" in
"") exec "$PYTHON" scripts/quickstart.py ;;
--all) ;;
*)
    echo "error: unknown option '$1'; use --all, or none for the first result" >&2
    exit 2
    ;;
esac
source recipes/decider/label.sh
RESULTS=${RESULTS:-output/quickstart_all/runs}

run mini_finetune_ctc finetune_ctc mini/finetune_ctc
for technique in signal average convolutional; do
    run "mini_downsampling_${technique}_x2" downsampling mini/downsampling \
        --downsampling_technique "$technique" --downsampling_factor 2
done
for layers in first_3 least_redundant_3; do
    run "mini_layer_removal_$layers" layer_removal mini/layer_removal --kept_layers "$layers"
done
run mini_early_exit early_exit mini/early_exit
# Two tiny Whispers, first each on its own, then with a decider that routes every utterance to one of them.
for size in small large; do
    run "mini_whisper_alone_$size" finetune_whisper mini/whisper --whisper "$size" --test_only True
    label "$size" "efficient_asr:mini_whisper_$size" plain data/mini unpadded output/mini_routing train dev
done
run mini_decider decider mini/decider
# The smaller one again, with an expert distilled from the larger one, and with LoRA.
run mini_clsr_js clsr mini/clsr_js
if "$PYTHON" -c 'import peft' 2>/dev/null; then
    run mini_lora lora mini/lora
else
    echo "== mini_lora is skipped: it needs peft (pip install -e '.[lora]')"
fi
# The larger one labels audio, and a student with one layer less learns from its labels.
for step in label filter; do
    echo "== pseudo-labels: $step"
    "$PYTHON" "recipes/pseudo_labelling/$step.py" hparams/mini/pseudo_labelling.yaml
done
"$PYTHON" recipes/distil_whisper/make_student.py hparams/mini/distil_whisper.yaml
run mini_distil_whisper distil_whisper mini/distil_whisper
STUDENT=output/mini_distil_whisper/1986
"$PYTHON" scripts/transcribe.py "$STUDENT/model" data/mini/audio/test-0000*.flac --language en --out "$STUDENT/transcripts.csv"
"$PYTHON" scripts/evaluate.py "$STUDENT/model" --manifest data/mini/test.jsonl --language en --normaliser plain --repeats 1 \
    --out "$STUDENT/evaluated.json"
"$PYTHON" scripts/report.py --runs "$RESULTS"
echo "results: $RESULTS; to try a model: $PYTHON scripts/transcribe.py output/mini_finetune_ctc/1986/model data/mini/audio/test-00000.flac"
