#!/usr/bin/env bash
# The whole project in miniature: fine-tune a small encoder with CTC on the synthetic mini corpus, run it on downsampled
# input in three ways, take a layer out in two ways, let easy utterances leave early; then choose between a
# small and a large Whisper for each utterance; teach the small one with experts and LoRA; measure everything alike, print the
# table, draw the plot. Under fifteen minutes on 2 CPU cores after the installation. Restartable: what is done is not done again. RESULTS=folder writes the results elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source recipes/decider/label.sh
RESULTS=${RESULTS:-output/quickstart/runs}

run mini_finetune_ctc finetune_ctc mini/finetune_ctc
for technique in signal average convolutional; do
    run "mini_downsampling_${technique}_x2" downsampling mini/downsampling \
        --downsampling_technique "$technique" --downsampling_factor 2
done
for layers in first_3 least_redundant_3; do
    run "mini_layer_removal_$layers" layer_removal mini/layer_removal --kept_layers "$layers"
done
run mini_early_exit early_exit mini/early_exit
# Two tiny Whispers, each alone and then chosen between for every utterance by a decider.
for size in small large; do
    run "mini_whisper_alone_$size" finetune_whisper mini/whisper --whisper "$size" --test_only True
    label "$size" "efficient_asr:mini_whisper_$size" plain data/mini unpadded output/mini_routing train dev
done
run mini_decider decider mini/decider
# The smaller one again, with an expert that the larger one teaches, and with LoRA.
run mini_clsr_js clsr mini/clsr_js
if "$PYTHON" -c 'import peft' 2>/dev/null; then
    run mini_lora lora mini/lora
else
    echo "== mini_lora is left out: it needs peft (pip install -e '.[lora]')"
fi
"$PYTHON" scripts/report.py --runs "$RESULTS"
echo "results: $RESULTS; a model to try: $PYTHON scripts/transcribe.py output/mini_finetune_ctc/1986/model data/mini/audio/test-00000.flac"
