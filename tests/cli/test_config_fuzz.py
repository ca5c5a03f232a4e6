"""Whatever is written into a configuration: a valid one comes back, or every mistake by its place, and nothing else."""

import math
import re
from dataclasses import asdict
from typing import Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from uae_fast.config import PRESETS, Config, ConfigError, leaves, load_config, save_config
from uae_fast.config_checks import invariants

KEYS = leaves()
TINY = (PRESETS / "tiny.yaml").read_text()
ODD = ["${seed}", "${oc.env:HOME}", "???", "null", "~", "yes", "1e-5", ".nan", "1:30", "2024-01-01", "0x10", "["]
ODD += ["\0", "\ud800", "\x85\u2028", '"\\ud800"', "inf", "-.inf", "9" * 5000, "-1", "0", "1e400"]
ODD += ["!!binary aGk=", "&a [*a]"]
TEXT = st.text(max_size=12) | st.sampled_from(ODD)
SCALAR = TEXT | st.integers() | st.floats() | st.booleans() | st.none() | st.dates() | st.binary(max_size=3)
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALAR, inner, max_size=3))
FUZZ = settings(derandomize=True, max_examples=100, deadline=None, database=None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


def read(file, content, *overrides):
    """The configuration, or its mistakes; whatever else `load_config` raised would fail the test."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        places = rf"({re.escape(str(file))}(:\d+)?|command line|default): "
        for problem in error.problems:
            assert re.match(places, problem) and problem.isprintable() and len(problem) < 1000, problem
        return error.problems
    assert invariants(config) == []
    for key, kind in KEYS.items():
        assert fits(value_of(config, key), kind), key
    save_config(config, file)
    assert load_config(file) == config
    return config


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def fits(value, kind):
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is str and (value != value.encode("utf-8", "ignore").decode() or "\0" in value):
        return False
    return type(value) is kind and (kind is not float or math.isfinite(value))


def put(tree, key, value):
    group, _, leaf = key.rpartition(".")
    (tree[group] if group else tree)[leaf] = value


@FUZZ
@given(key=st.sampled_from(list(KEYS)), value=VALUE)
def test_any_value_under_any_key(file, key, value):
    tree = asdict(Config())
    put(tree, key, value)
    found = read(file, yaml.dump(tree))
    if isinstance(found, list):
        assert all(key in problem for problem in found), "a mistake elsewhere"


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_every_odd_value_under_every_key(file, text):
    for key in KEYS:
        group, _, leaf = key.rpartition(".")
        read(file, "", f"{key}={text}")
        read(file, f"{group}: {{{leaf}: {text}}}\n" if group else f"{leaf}: {text}\n")


@FUZZ
@given(data=st.data())
def test_mutated_trees(file, data):
    tree = asdict(Config())
    for _ in range(data.draw(st.integers(1, 4))):
        holder = data.draw(st.sampled_from([tree, *(v for v in tree.values() if isinstance(v, dict))]))
        if data.draw(st.booleans()) and holder:
            holder[data.draw(st.sampled_from(list(holder)))] = data.draw(VALUE)
        else:
            holder[data.draw(SCALAR)] = data.draw(VALUE)
    read(file, yaml.dump(tree))


@FUZZ
@given(data=st.data())
def test_mutated_text(file, data):
    text = TINY
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 5))
        text = text[:start] + data.draw(TEXT | st.sampled_from("\n\t:-[]{}&*!|>'\"%@`#,?<")) + text[end:]
    read(file, text)


@FUZZ
@given(content=st.binary(max_size=40) | st.text(max_size=40))
def test_files_of_anything(file, content):
    read(file, content)


@FUZZ
@given(overrides=st.lists(st.builds("{}={}".format, st.sampled_from(list(KEYS)) | TEXT, TEXT) | TEXT, max_size=4))
def test_any_words_on_the_command_line(file, overrides):
    read(file, "", *overrides)


@FUZZ
@given(key=st.sampled_from(list(KEYS)), lines=st.integers(0, 5), word=st.text("abcxyz_", min_size=1, max_size=8))
def test_a_wrong_key_is_named_by_its_line_with_what_there_is(file, key, lines, word):
    group, _, leaf = key.rpartition(".")
    wrong = f"{group}.{word}" if group else word
    assume(wrong not in KEYS and wrong not in asdict(Config()))
    head = "# \n" * lines + (f"{group}:\n  " if group else "")
    (problem,) = read(file, f"{head}{word}: 1\n")
    assert problem.startswith(f"{file}:{lines + 1 + bool(group)}: {wrong}: unknown key")
    near = re.search(r"did you mean (\S+)\?", problem)
    assert near[1] in KEYS if near else leaf in problem or (group == "" and "stage2" in problem)


@pytest.mark.parametrize("key, kind", KEYS.items(), ids=list(KEYS))
def test_a_wrong_type_is_named_by_its_line_with_what_is_expected(file, key, kind):
    group, _, leaf = key.rpartition(".")
    head, indent = (f"{group}:\n", "  ") if group else ("", "")
    expected = {str: "not a text", int: "not a whole number", float: "not a number", bool: "neither true nor false"}
    words = "not a list" if get_origin(kind) is list else expected.get(kind) or ", ".join(get_args(kind))
    for wrong in ("{a: 1}", ""):
        (problem,) = read(file, f"\n{head}{indent}{leaf}: {wrong}\n")
        assert problem.startswith(f"{file}:{2 + bool(group)}: {key}: ") and words in problem
    (problem,) = read(file, "", f"{key}={{a: 1}}") if kind is not str else ["command line: " + key + ": " + words]
    assert problem.startswith(f"command line: {key}: ") and (words in problem or get_origin(kind) is Literal)
