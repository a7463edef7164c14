# Sourced after scripts/setup.sh.

# sweep <experiment> <model folder> <manifest> <rule> <threshold> [...] [--key value ...]: evaluate exit thresholds, unless the Result of
# the first one exists.
sweep() {
    local experiment=$1 model=$2 manifest=$3 rule=$4 results=${RESULTS:-results/runs} split
    shift 4
    if [ -n "${ESTIMATE:-}" ] || ! wanted "$experiment"; then return 0; fi
    split=$(basename "$manifest" .jsonl)
    if [ -f "$results/${experiment}_${rule}_$1-$split.json" ]; then
        echo "== $experiment, $rule on $split is already done: $results/${experiment}_${rule}_*-$split.json"
        return
    fi
    echo "== $experiment, $rule on $split"
    "$PYTHON" recipes/early_exit/sweep.py "$model" --manifest "$manifest" --rule "$rule" --out "$results" --experiment "$experiment" \
        --runtime_devices all --thresholds "$@"
}

# exits <name> <experiment> <options of set_rule.py>: a copy of an early-exit model with another rule, added to the array `systems`.
exits() {
    [ -d "output/$2/$1" ] ||
        "$PYTHON" recipes/early_exit/set_rule.py "output/$2/1986/model" "${@:3}" --out "output/$2/$1"
    systems+=("$1=output/$2/$1")
}
