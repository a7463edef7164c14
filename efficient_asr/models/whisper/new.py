"""New Whispers of any size, to be trained from scratch: network, tokenizer, and what generation needs to know."""

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
    """Train a byte-level BPE of `size` entries on texts, with Whisper's special tokens (for English) behind it."""
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
    """Make a Whisper with random weights.

    Arguments
    ---------
    texts : list of str
        Training texts: the tokenizer is trained on them.
    d_model, encoder_layers, decoder_layers, heads, n_mels, dropout
        Of the network; feed-forward layers are four times as wide.
    window_s : float
        Seconds of audio that every utterance is padded to. Whisper's own is 30.
    vocabulary : int
        Entries of the tokenizer, without the special ones.
    max_tokens : int
        Positions of the decoder.
    encoder : str, optional
        Model folder of this project whose encoder (of Whisper's architecture) to start from; of more layers, the first ones.
    languages : list of str
        Codes of its languages.
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
