# Sourced after scripts/setup.sh.

# label <name> <model> <normaliser> <manifest folder> <frames> <output folder> <split> ...: run recipes/decider/label.py on each split;
# interrupted runs resume. <frames>: unpadded, padded, or none to save no states. LABEL_OPTIONS: further options.
label() {
    local name=$1 model=$2 normaliser=$3 manifests=$4 frames=$5 output=$6 split states
    shift 6
    for split in "$@"; do
        states=(--states "$output/states/$name-$split" --frames "$frames")
        if [ "$frames" = none ]; then states=(); fi
        "$PYTHON" recipes/decider/label.py "$model" --manifest "$manifests/$split.jsonl" --normaliser "$normaliser" \
            --out "$output/labels/$name-$split.jsonl" ${states[@]+"${states[@]}"} ${LABEL_OPTIONS:-}
    done
}
