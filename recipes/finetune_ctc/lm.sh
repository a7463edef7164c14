# Sourced after scripts/setup.sh: unpacks the general English 2-gram of EFFICIENT_ASR_DATA and sets LM to it.
LM=output/lm/en-us-2gram.arpa
if [ ! -f "$LM" ]; then
    mkdir -p "$(dirname "$LM")"
    gunzip -c "$EFFICIENT_ASR_DATA/lm/cmusphinx-en-us-2gram.arpa.gz" >"$LM.partial"
    mv "$LM.partial" "$LM"
fi
