"""Whatever stands in a file, the readers answer with rows or a configuration, or with one line that names the place.

FUZZ_EXAMPLES is how many files each test makes up (100 where it is not set). What a long run found is kept as `@example`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_core.config.builder import parse, to_toml
from rlhf_core.contract.options import RunConfig
from rlhf_core.data.json import Json
from rlhf_core.errors import DataError, UsageError
from rlhf_core.plugins.registry import Registry
from rlhf_core.testing.tiny_algorithm import TinyAlgorithm

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
REGISTRY = Registry(autoload=False)
ALGORITHM = f"{TinyAlgorithm.__module__}:{TinyAlgorithm.__name__}"


def refused(error: UsageError, place: str = "") -> None:
    """Return True if the line has a location and a message."""
    assert str(error).strip() and place in str(error)


# ----------------------------------------------------------------------------------------------------------------------
# configuration
# ----------------------------------------------------------------------------------------------------------------------

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8) | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    "steps seed model output sampling actor reference critic optim lr betas reward data loss advantage rollout launcher "
    "strategy evaluator observer algorithm use n top_p stop keep batch_size providers names roles micro_tokens".split()
)
TREES = st.recursive(
    VALUES, lambda inner: st.dictionaries(KEYS | st.text(max_size=5), inner, min_size=1, max_size=5), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


def read(folder: Path, content: bytes) -> RunConfig | None:
    """The configuration in a file, or None where it was refused in one line."""
    path = folder / "run.toml"
    path.write_bytes(content)
    try:
        return parse(["--config", str(path)], REGISTRY)
    except UsageError as error:
        refused(error)
        return None


@FUZZ
@given(tree=TREES, known=st.booleans())
def test_any_toml_is_a_configuration_or_one_line(tree: dict[str, Any], known: bool, tmp_path: Path) -> None:
    if known:
        tree = {"algorithm": ALGORITHM, "data": "prompts", "reward": "length", "rollout": "hf", **tree}
    try:
        content = tomli_w.dumps(tree).encode()
    except (UnicodeEncodeError, ValueError):
        return
    config = read(tmp_path, content)
    if config is not None:
        assert read(tmp_path, to_toml(config).encode()) == config, "what is written down reads as the same"


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"\xff\xfe")
@example(content=b"[" * 2000 + b"]" * 2000)
@example(content=b"a = " + b"[" * 5000)
@example(content=b"seed = 1" + b"0" * 5000)
def test_any_bytes_are_a_configuration_or_one_line(content: bytes, tmp_path: Path) -> None:
    read(tmp_path, content)


@FUZZ
@given(words=st.lists(st.text(max_size=12) | KEYS.map("--{}".format) | KEYS, max_size=6))
def test_any_words_are_a_run_or_one_line(words: list[str]) -> None:
    try:
        parse([ALGORITHM, *words], REGISTRY)
    except UsageError as error:
        refused(error)


# ----------------------------------------------------------------------------------------------------------------------
# rows
# ----------------------------------------------------------------------------------------------------------------------

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls"]),
        st.sampled_from(["user", "assistant", "system", "human", "gpt", ""]) | JSON,
        max_size=3,
    ),
    max_size=4,
)
COLUMNS = st.sampled_from(
    "prompt completion chosen rejected label messages conversations instruction input text question images tools".split()
)
ROWS = st.lists(st.dictionaries(COLUMNS, MESSAGES | JSON, max_size=4) | JSON, min_size=1, max_size=4)


def rows_of(folder: Path, content: bytes, made: Callable[[str], Json]) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    try:
        rows = list(made(str(path))("train"))
    except UsageError as error:
        refused(error, str(path))
        return
    for row in rows:
        assert isinstance(row.prompt, (str, tuple))
        json.dumps([row.prompt, row.completions], ensure_ascii=False).encode()  # text that a tokenizer can read


@FUZZ
@given(rows=ROWS)
@example(rows=[{"prompt": "\ud800"}])
@example(rows=[{"messages": []}])
@example(rows=[{"prompt": [{"from": [], "value": "user"}]}])
@example(rows=[{"prompt": [{"role": "assistant", "content": []}]}])
def test_any_rows_are_read_or_the_first_bad_one_is_named(rows: list[Any], tmp_path: Path) -> None:
    rows_of(tmp_path, "\n".join(map(json.dumps, rows)).encode(), Json)


@FUZZ
@given(content=st.binary(max_size=100) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b'{"prompt": ' + b"1" * 5000 + b"}")
@example(content=b"[" * 100_000)
@example(content=b'{"prompt": ' + b"[" * 100_000)
@example(content=b"\xef\xbb\xbf[]")
@example(content=b"\x00")
def test_any_bytes_are_rows_or_one_line(content: bytes, tmp_path: Path) -> None:
    rows_of(tmp_path, content, Json)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Json(str(tmp_path / "missing"))("train")
