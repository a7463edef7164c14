#!/usr/bin/env bash
# Tune scripts/reproduce_experts.sh: three learning rates per kind of method, and the paper's gate budget; seed 77. They are compared on
# the validation split, which is not in its table. Same requirements as that script; restartable; about an hour on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source recipes/clsr/data.sh
real_experts
RESULTS=${RESULTS:-results/experts/tuning}

trial() { # trial <name> <variant> <recipe> <yaml> <lr> [--key value ...]
    local name=$1 variant=$2 recipe=$3 yaml=$4 lr=$5
    shift 5
    run "${name}_$lr" "$recipe" "real/$yaml" --experiment "${name}_$lr" --variant "$variant, lr $lr" --lr "$lr" \
        --output_folder "output/experts_tuning/${name}_$lr" --test_splits '[whole_dev]' --measure_macs False "$@"
}

run plain finetune_whisper real/experts_full --experiment plain --variant whisper-tiny --test_only True --test_splits '[whole_dev]' \
    --measure_macs False
for lr in 0.00005 0.0002 0.0008; do trial lora LoRA lora experts_lora "$lr"; done
for lr in 0.000003 0.00001 0.00003; do trial full "full fine-tuning" finetune_whisper experts_full "$lr"; done
for lr in 0.0001 0.0003 0.001; do trial low_rank "CLSR-JS, rank 16" clsr experts "$lr" "${TEACHER[@]}" --distillation_loss js --expert_rank 16; done
for lr in 0.00001 0.00003 0.0001; do trial ft CLSR-FT clsr experts "$lr"; done
trial ft_budget_0.5 "CLSR-FT, budget 0.5" clsr experts 0.00003 --gate_budget 0.5
# The paper's values of the three settings that hparams/real/experts.yaml has otherwise, each alone and together.
trial ft_dropout_0.3 "CLSR-FT, dropout 0.3" clsr experts 0.00003 --expert_dropout 0.3
trial ft_lr_gates_0.0001 "CLSR-FT, gates' lr 0.0001" clsr experts 0.00003 --lr_gates 0.0001
trial ft_paper_gates "CLSR-FT, the paper's gates" clsr experts 0.00003 --gate_budget 0.5 --expert_dropout 0.3 --lr_gates 0.0001
"$PYTHON" scripts/report.py
