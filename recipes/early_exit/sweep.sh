# Sourced after scripts/setup.sh.

# sweep <experiment> <model folder> <manifest> <rule> <threshold> [...] [--key value ...]: evaluate exit thresholds, unless this was done
# with the same options.
sweep() {
    local experiment=$1 model=$2 manifest=$3 rule=$4 results=${RESULTS:-results/runs} split
    shift 4
    if [ -n "${ESTIMATE:-}" ] || ! wanted "$experiment"; then return 0; fi
    split=$(basename "$manifest" .jsonl)
    if finished "$results" "${experiment}_${rule}_$1-$split" "$*"; then return; fi
    echo "== $experiment, $rule on $split"
    "$PYTHON" recipes/early_exit/sweep.py "$model" --manifest "$manifest" --rule "$rule" --out "$results" --experiment "$experiment" \
        --runtime_devices all --thresholds "$@"
    finish "$results" "${experiment}_${rule}_$1-$split" "$*"
}

# exits <name> <experiment> <options of set_rule.py>: a copy of an early-exit model with another rule, added to the array `systems`.
exits() {
    local model=output/$2/1986/model out=output/$2/$1
    if [ ! "$out.rule" -nt "$model/config.json" ] || [ "$(cat "$out.rule")" != "${*:3}" ]; then
        rm -rf "$out"
        "$PYTHON" recipes/early_exit/set_rule.py "$model" "${@:3}" --out "$out"
        echo "${*:3}" >"$out.rule"
    fi
    systems+=("$1=$out")
}
