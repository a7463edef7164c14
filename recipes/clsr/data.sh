# Sourced after scripts/setup.sh.

# real_experts: prepare the data for hparams/real/experts*.yaml and set TEACHER; fetches the Spanish and French prompts with apt-get.
real_experts() {
    : "${EFFICIENT_ASR_DATA:?set it to the folder of real speech}" "${EFFICIENT_ASR_MODELS:?set it to the folder of the Whisper models}"
    TEACHER=(--teacher '$EFFICIENT_ASR_MODELS/whisper-small' --teacher_cache output/experts_teacher)
    asterisk_prompts es fr
}

# asterisk_prompts <language> ...: prepare Asterisk's prompts of these languages and set ASTERISK_PROMPTS to the folder of the manifests.
asterisk_prompts() {
    export ASTERISK_PROMPTS=${ASTERISK_PROMPTS:-$PWD/data/asterisk}
    "$PYTHON" -c 'import sys; from pathlib import Path; from efficient_asr.corpora import prepare_corpus
prepare_corpus("asterisk", "data/asterisk_packages", Path(sys.argv[1]), {"languages": sys.argv[2:], "min_words": 3, "download": True})' \
        "$ASTERISK_PROMPTS" "$@"
}
