"""Former names in YAML files: keys, values and class paths that have been renamed.

They work for one more release, with a warning. Techniques declare their own (`renamed_keys`, `renamed_values`, `moved`).
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.tag import Tag

from efficient_asr.utils.technique import current_value, merged

RENAMED_KEYS = {"go_on": "allow_changed_settings"}
MOVED = {
    "efficient_asr.experiment.seed_everything": "efficient_asr.utils.seeding.seed_everything",
    "efficient_asr.models.load_encoder": "efficient_asr.models.encoders.load.load_encoder",
    "efficient_asr.models.whisper.new_whisper_encoder": "efficient_asr.models.encoders.whisper.new_whisper_encoder",
    "efficient_asr.augmentation.Augment": "efficient_asr.data.augmentation.Augment",
    "efficient_asr.schedules.LinearSchedule": "efficient_asr.training.schedules.LinearSchedule",
}


def renamed_keys() -> dict[str, str]:
    """Return the current names of keys by their former names."""
    return RENAMED_KEYS | merged("renamed_keys")


def current_key(key: str, known: Any, renamed: dict[str, str]) -> str:
    """Return the current name of a key, with a warning for a former name; a key in `known` is returned unchanged."""
    if key in known or key not in renamed:
        return key
    _warn(f"'{key}' is now '{renamed[key]}'")
    return renamed[key]


def with_current_names(tree: CommentedMap, where: str) -> CommentedMap:
    """Replace former names in the tree of a YAML file, in place, and return the tree.

    Arguments
    ---------
    tree : CommentedMap
        The tree of one file, without its bases.
    where : str
        The file, for warnings.
    """
    renamed, moved = renamed_keys(), MOVED | merged("moved")
    for former in [key for key in tree if key in renamed]:
        _warn(f"{where}: '{former}' is now '{renamed[former]}'")
        position = list(tree).index(former)
        comment = tree.ca.items.pop(former, None)
        tree.insert(position, renamed[former], tree.pop(former))
        if comment is not None:
            tree.ca.items[renamed[former]] = comment
    for key, value in tree.items():
        current = current_value(key, value)
        if current is not value:
            _warn(f"{where}: '{key}: {value}' is now '{key}: {current}'")
            tree[key] = current
        _rename_inside(tree[key], renamed, moved, where)
    return tree


def _rename_inside(value: Any, renamed: dict[str, str], moved: dict[str, str], where: str) -> None:
    """Rename references to keys, and class paths in the tags of objects."""
    tag = getattr(getattr(value, "tag", None), "value", None) or ""
    kind, colon, path = tag.partition(":")
    if colon and path in moved:
        _warn(f"{where}: '{path}' is now '{moved[path]}'")
        value.yaml_set_ctag(Tag(suffix=f"{kind}:{moved[path]}"))
    if isinstance(value, TaggedScalar):
        value.value = re.sub(r"<([^<>]*)>", lambda m: f"<{renamed.get(m[1], m[1])}>", str(value.value))
    for item in value.values() if isinstance(value, CommentedMap) else value if isinstance(value, CommentedSeq) else ():
        _rename_inside(item, renamed, moved, where)


@functools.cache
def _warn(message: str) -> None:
    """Print a warning, once per process."""
    print(f"warning: {message}; the former name works for one more release", file=sys.stderr)


def current_settings(settings: dict[str, str]) -> dict[str, str]:
    """Return the training settings stored by an earlier version, with current names."""
    renamed, moved = renamed_keys(), MOVED | merged("moved")
    found = {}
    for key, text in settings.items():
        key = renamed.get(key, key)
        text = re.sub(r"(?<=[!:])[\w.]+(?=\s|$)", lambda m: moved.get(m[0], m[0]), text)
        text = {"": "null", "true": "True", "false": "False"}.get(text, text)
        found[key] = current_value(key, re.sub(r"<([^<>]*)>", lambda m: f"<{renamed.get(m[1], m[1])}>", text))
    return found
