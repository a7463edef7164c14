#!/usr/bin/env bash
# The real-speech table of recipes/downsampling: Whisper tiny's encoder with CTC on 127 minutes of English, then downsampled. Needs
# EFFICIENT_ASR_DATA (arctic_en, librispeech_unlabelled, ljspeech, librispeech_test_other, lm) and EFFICIENT_ASR_MODELS
# (whisper-tiny). About 70 minutes on 2 CPU cores. Restartable.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-tiny}"
source scripts/setup.sh
source recipes/finetune_ctc/lm.sh

run real_finetune_ctc finetune_ctc real/finetune_ctc
for pair in "signal 2" "average 2" "convolutional 2" "convolutional 3"; do
    read -r technique factor <<<"$pair"
    # At factor 3, some fast speakers have more characters than frames, so the head emits two frames per state.
    run "real_downsampling_${technique}_x${factor}" downsampling real/downsampling --downsampling_technique "$technique" \
        --downsampling_factor "$factor" --frames_per_state $((factor > 2 ? 2 : 1))
done
report
