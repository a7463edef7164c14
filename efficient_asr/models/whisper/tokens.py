"""Special tokens in Whisper's generation configuration, completed from the tokenizer."""

from __future__ import annotations

from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from efficient_asr.utils.errors import UserError

NO_TIMESTAMPS, TASKS = "<|notimestamps|>", ("translate", "transcribe")


def generation_file_is_there(generation: Any) -> bool:
    """Whether a generation configuration was read from a file; one derived from config.json has no Whisper-specific entries."""
    own = ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id", "alignment_heads")
    return any(hasattr(generation, name) for name in own)


def complete_generation_config(generation: Any, tokenizer: Any, source: str) -> None:
    """Add missing special tokens, tasks and languages to a generation configuration, using the tokenizer.

    These entries are missing from folders that were saved by older versions, converted, or fine-tuned without them.

    Arguments
    ---------
    generation : transformers.GenerationConfig
        Modified in place.
    tokenizer : WhisperTokenizer
        Provides the special tokens by name.
    source : str
        Directory or hub id of the model, for error messages.

    Raises
    ------
    UserError
        If the entries cannot be completed; the message names the file and what it lacks.
    """

    def token(name: str) -> int | None:
        index = tokenizer.convert_tokens_to_ids(name)
        return index if isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == name else None

    if not generation_file_is_there(generation):
        raise UserError(
            f"'{source}' has no Whisper generation_config.json, which defines special and suppressed tokens; "
            "copy it from the original model"
        )
    if getattr(generation, "no_timestamps_token_id", None) is None:
        generation.no_timestamps_token_id = token(NO_TIMESTAMPS)
        if generation.no_timestamps_token_id is None:
            raise UserError(
                f"'{source}': neither generation_config.json (no_timestamps_token_id) nor its tokenizer files ({NO_TIMESTAMPS}) "
                "define Whisper's special tokens; copy these files from the original model"
            )
    if len(tokenizer) < generation.no_timestamps_token_id:
        raise UserError(
            f"'{source}' has no Whisper tokenizer ({len(tokenizer)} entries); copy the original model's tokenizer files too"
        )
    tasks = {task: token(f"<|{task}|>") for task in TASKS}
    languages = {f"<|{code}|>": token(f"<|{code}|>") for code in LANGUAGES}
    languages = {name: index for name, index in languages.items() if index is not None}
    if getattr(generation, "is_multilingual", None) is None:
        # English-only models also have language names in their tokenizer, but one entry fewer before them.
        generation.is_multilingual = bool(languages) and None not in tasks.values() and len(tokenizer) != 51864
    if not generation.is_multilingual:
        return
    if not getattr(generation, "lang_to_id", None):
        if not languages:
            raise UserError(
                f"'{source}': generation_config.json has no lang_to_id, and its tokenizer has no language tokens such as <|en|>; "
                "copy generation_config.json from the original model"
            )
        generation.lang_to_id = languages
    if not getattr(generation, "task_to_id", None):
        if None in tasks.values():
            raise UserError(
                f"'{source}': generation_config.json has no task_to_id, and its tokenizer lacks <|transcribe|> or <|translate|>; "
                "copy generation_config.json from the original model"
            )
        generation.task_to_id = tasks
