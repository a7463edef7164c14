#!/usr/bin/env bash
# Language experts on real speech: Whisper tiny, with Whisper small as the teacher, in German, Dutch, Spanish and French. Compares plain
# Whispers, CLSR-FT (also with the paper's gate budget), KL, JS, LoRA, full fine-tuning and low-rank experts in one table, with two seeds
# per trained method. Learning rates come from scripts/tune_experts.sh. Needs EFFICIENT_ASR_DATA and EFFICIENT_ASR_MODELS (tiny, small);
# fetches the Spanish and French prompts with apt-get. Restartable; about two hours on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source recipes/clsr/data.sh
real_experts
RESULTS=${RESULTS:-results/experts/tiny} SEEDS=${SEEDS:-77 78}

plain() { # plain <size>: evaluate a pretrained Whisper
    run "experts_plain_$1" finetune_whisper real/experts_full --student "$1" --experiment "experts_plain_$1" --variant "whisper-$1" --test_only True
}
method() { # method <name> <variant> <recipe> <yaml> [--key value ...]: train and evaluate with the current seed
    local name=$1 variant=$2 recipe=$3 yaml=$4
    shift 4
    [ "$SEED" = "${SEEDS%% *}" ] || set -- "$@" --measure_macs False # the same as for the first seed
    run "experts_${name}_$SEED" "$recipe" "real/$yaml" --experiment "experts_${name}_$SEED" --variant "$variant" --seed "$SEED" \
        --output_folder "output/experts_$name/$SEED" "$@"
}

plain tiny
for SEED in $SEEDS; do
    method ft CLSR-FT clsr experts
    method ft_budget_0.5 "CLSR-FT, budget 0.5" clsr experts --gate_budget 0.5
    method js "CLSR-JS" clsr experts "${TEACHER[@]}" --distillation_loss js
    method kl "CLSR-KL" clsr experts "${TEACHER[@]}" --distillation_loss kl
    method lora LoRA lora experts_lora
    method full "full fine-tuning" finetune_whisper experts_full
    method low_rank "CLSR-JS, rank 16" clsr experts "${TEACHER[@]}" --distillation_loss js --expert_rank 16 --lr 0.0003
done
plain small
report
