#!/usr/bin/env bash
# Plain Whispers on real speech (tiny, base, small), and long recordings split in three ways (tiny). Needs EFFICIENT_ASR_DATA and
# EFFICIENT_ASR_MODELS. Restartable; about twenty minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
for size in tiny base small; do
    run "whisper_$size" finetune_whisper real/whisper --whisper "$size" --test_only True
done
for method in overlap pauses sequential; do
    run "whisper_tiny_$method" finetune_whisper real/whisper_long --long_audio "$method" --test_only True
done
report
