"""Keys and values of a YAML file and of the command line as they stand there: nothing is constructed or expanded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from .config import ConfigError
from .text import nearest, short, unicode_text

TAG = "tag:yaml.org,2002:"
SCALARS = {TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")}
Given = dict[str, tuple[str, yaml.Node]]
"""By dotted key: where it is given ("file:line" or "command line"), and its value."""


def read_keys(path: Path, overrides: Iterable[str], known: Mapping[str, Any], problems: list[str]) -> Given:
    """What a file gives, and then overrides "key=value".

    Args:
        known: by key, the type of its value.
        problems: gets what is wrong, a line each.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    given: Given = {}
    try:
        root = compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([not_yaml(str(path), error)]) from None
    collect(root, str(path), {key.rpartition(".")[0] for key in known if "." in key}, given, problems)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"command line: {short(override)!r} is not key=value")
            continue
        try:
            is_text = known.get(key) is str or get_origin(known.get(key)) is Literal
            given[key] = "command line", yaml.ScalarNode(TAG + "str", text) if is_text else compose(text)
        except yaml.YAMLError as error:
            problems.append(not_yaml(f"command line: {short(key)}", error))
    return given


def compose(text: str) -> yaml.Node:
    """YAML as nodes: nothing is constructed, an alias is not expanded. Nothing at all is null."""
    try:
        return yaml.compose(text, yaml.SafeLoader) or yaml.ScalarNode(TAG + "null", "")
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def not_yaml(where: str, error: Exception) -> str:
    """Why a file could not be read, by file and line."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, OSError):
        return f"{where}: {error.strerror}"
    place = f"{where}:{mark.line + 1}" if mark and where != "command line" else where
    return f"{place}: not valid YAML: {short(getattr(error, 'problem', None) or str(error).splitlines()[0])}"


def collect(node: yaml.Node, file: str, groups: Set[str], given: Given, problems: list[str], prefix: str = "") -> None:
    """Adds the keys below a node to `given`, or what is wrong with them to `problems`; `groups` are keys of keys."""
    if node.tag == TAG + "null":  # all its lines are commented out
        return
    where = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{where}: {prefix.rstrip('.') or 'the file'}: expected keys and values")
        return
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where}: a key must be a word, not {shown(key_node)}")
            continue
        key = prefix + key_node.value
        if key in seen or key in given:
            problems.append(f"{where}: {short(key)}: given twice, first at {seen.get(key) or given[key][0]}")
        seen[key] = where
        if key in groups:
            collect(value_node, file, groups, given, problems, f"{key}.")
        else:
            given[key] = (where, value_node)


def read_value(node: yaml.Node, kind: Any) -> Any:
    """A node as text, a number, a truth value, one of a Literal's choices, or a list of such.

    Raises:
        ValueError: it is none; the message says what is expected.
    """
    if node.tag not in SCALARS | {TAG + "seq", TAG + "map"}:
        raise ValueError(f"could not determine a constructor for the tag {short(node.tag)!r}: plain values only")
    if get_origin(kind) is list:
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError(f"{shown(node)} is not a list; write [a, b]")
        return [read_value(item, get_args(kind)[0]) for item in node.value]
    text = node.value if isinstance(node, yaml.ScalarNode) and node.tag != TAG + "null" else None
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            hint = f"; did you mean {near}?" if (near := nearest(text or "", get_args(kind))) else ""
            raise ValueError(f"{shown(node)} is none of {', '.join(get_args(kind))}{hint}")
    elif kind is str:
        if text is None:
            raise ValueError(f"{shown(node)} is not a text")
        if "\0" in text or text != unicode_text(text):
            raise ValueError(f"{shown(node)} has a character that is no Unicode text")
    elif kind is bool:
        if text is None or text.lower() not in yaml.SafeLoader.bool_values:
            raise ValueError(f"{shown(node)} is neither true nor false")
        return yaml.SafeLoader.bool_values[text.lower()]
    elif kind is int:
        if text is None or not re.fullmatch(r"[-+]?[0-9][0-9_]{0,17}", text):
            raise ValueError(f"{shown(node)} is not a whole number of at most 18 digits")
        return int(text)
    else:
        try:
            number = float(text or "nothing")
        except ValueError:
            raise ValueError(f"{shown(node)} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{shown(node)} is not a finite number")
        return number
    return text


def shown(node: yaml.Node) -> str:
    """A value as a message shows it."""
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if node.tag == TAG + "null" else repr(short(node.value))
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of keys"
