"""What a Whisper's generation configuration says of its special tokens, and where else that is known."""

from __future__ import annotations

from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from efficient_asr.utils.errors import UserError

NO_TIMESTAMPS, TASKS = "<|notimestamps|>", ("translate", "transcribe")


def generation_file_is_there(generation: Any) -> bool:
    """Whether a generation configuration comes from a file: one made of config.json has no entry of Whisper's own."""
    own = ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id", "alignment_heads")
    return any(hasattr(generation, name) for name in own)


def complete_generation_config(generation: Any, tokenizer: Any, source: str) -> None:
    """Fill in, from the tokenizer, what a generation configuration lacks of special tokens, tasks and languages.

    Folders that were saved by older versions, converted, or fine-tuned without these entries lack them.

    Arguments
    ---------
    generation : transformers.GenerationConfig
        Is changed.
    tokenizer : WhisperTokenizer
        Knows the special tokens by name.
    source : str
        For messages.

    Raises
    ------
    UserError
        Where the tokenizer is none of a Whisper, saying which file lacks what.
    """

    def token(name: str) -> int | None:
        index = tokenizer.convert_tokens_to_ids(name)
        return index if isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == name else None

    if not generation_file_is_there(generation):
        raise UserError(
            f"'{source}' has no generation_config.json of a Whisper, which names special tokens and what must not be predicted; "
            "copy that of the original model"
        )
    if getattr(generation, "no_timestamps_token_id", None) is None:
        generation.no_timestamps_token_id = token(NO_TIMESTAMPS)
        if generation.no_timestamps_token_id is None:
            raise UserError(
                f"'{source}': neither generation_config.json (no_timestamps_token_id) nor its tokenizer files ({NO_TIMESTAMPS}) "
                "name the special tokens of a Whisper; copy these files of the original model"
            )
    if len(tokenizer) < generation.no_timestamps_token_id:
        raise UserError(
            f"'{source}' has no tokenizer of a Whisper: {len(tokenizer)} entries; copy its tokenizer files too"
        )
    tasks = {task: token(f"<|{task}|>") for task in TASKS}
    languages = {f"<|{code}|>": token(f"<|{code}|>") for code in LANGUAGES}
    languages = {name: index for name, index in languages.items() if index is not None}
    if getattr(generation, "is_multilingual", None) is None:
        # English-only models have the names of languages in their tokenizer, but one entry fewer in front of them.
        generation.is_multilingual = bool(languages) and None not in tasks.values() and len(tokenizer) != 51864
    if not generation.is_multilingual:
        return
    if not getattr(generation, "lang_to_id", None):
        if not languages:
            raise UserError(
                f"'{source}': generation_config.json has no lang_to_id, and its tokenizer no tokens of languages such as <|en|>; "
                "copy generation_config.json of the original model"
            )
        generation.lang_to_id = languages
    if not getattr(generation, "task_to_id", None):
        if None in tasks.values():
            raise UserError(
                f"'{source}': generation_config.json has no task_to_id, and its tokenizer no <|transcribe|> and <|translate|>; "
                "copy generation_config.json of the original model"
            )
        generation.task_to_id = tasks
