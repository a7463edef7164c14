"""Build a Whisper of any size for training from scratch: network, tokenizer and generation configuration."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

from efficient_asr.models.whisper.model import Whisper

END, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
SPECIAL = (
    END,
    START,
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    NO_TIMESTAMPS,
)


def new_tokenizer(texts: list[str], size: int, special: tuple[str, ...] = SPECIAL) -> WhisperTokenizer:
    """Train a byte-level BPE of `size` entries on texts, followed by Whisper's special tokens (for English)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    bpe.train_from_iterator(texts, trainer)

    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def build_whisper(
    texts: list[str],
    d_model: int = 64,
    encoder_layers: int = 2,
    decoder_layers: int = 1,
    heads: int = 2,
    n_mels: int = 80,
    window_s: float = 30.0,
    vocabulary: int = 400,
    max_tokens: int = 64,
    dropout: float = 0.0,
    encoder: str | None = None,
    languages: tuple[str, ...] | list[str] = ("en",),
) -> Whisper:
    """Build a Whisper with random weights.

    Arguments
    ---------
    texts : list of str
        Training texts, on which the tokenizer is trained.
    d_model, encoder_layers, decoder_layers, heads, n_mels, dropout
        Hyperparameters of the network; feed-forward layers are four times as wide as `d_model`.
    window_s : float
        Length in seconds that every utterance is padded to; 30 for the original Whisper.
    vocabulary : int
        Number of tokenizer entries, without special tokens.
    max_tokens : int
        Number of positions in the decoder.
    encoder : str, optional
        Model folder of this project whose encoder (with Whisper's architecture) to start from; if it has more
        layers, the first ones are used.
    languages : list of str
        Language codes that the model supports.
    """
    names = tuple(f"<|{language}|>" for language in languages)
    place = SPECIAL.index("<|en|>")
    all_special = (*SPECIAL[:place], *names, *SPECIAL[place + 1 :])
    tokenizer = new_tokenizer(texts, vocabulary, all_special)
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in all_special}
    end = special[END]
    config = WhisperConfig(
        d_model=d_model, encoder_layers=encoder_layers, decoder_layers=decoder_layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * d_model, decoder_ffn_dim=4 * d_model, num_mel_bins=n_mels,
        vocab_size=len(tokenizer), max_source_positions=round(50 * window_s), max_target_positions=max_tokens,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=special[START], dropout=dropout,
        attention_dropout=dropout, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    network = WhisperForConditionalGeneration(config)
    network.generation_config = GenerationConfig(
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=special[START], is_multilingual=True,
        lang_to_id={name: special[name] for name in names}, no_timestamps_token_id=special[NO_TIMESTAMPS], max_length=max_tokens,
        task_to_id={task: special[f"<|{task}|>"] for task in ("translate", "transcribe")},
    )  # fmt: skip
    if encoder:
        from efficient_asr.models.encoders.load import load_encoder

        weights = load_encoder(encoder).model.state_dict()
        positions = weights["embed_positions.weight"]
        weights["embed_positions.weight"] = positions[: config.max_source_positions]
        own = network.model.encoder.state_dict()
        network.model.encoder.load_state_dict({key: weights[key] for key in own})
    return Whisper(network, tokenizer)
