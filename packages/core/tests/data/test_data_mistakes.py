"""Every kind of mistake in data, and the very line that it is answered with: those of `data_mistakes`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_mistakes import CHAT, MISTAKES

from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.data.hf import HuggingFaceData
from rlhf_core.data.json import Json
from rlhf_core.data.stream import Stream
from rlhf_core.errors import UsageError, options_under, spell_options
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.option_text import OptionNames


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    """A file of rows; strings and bytes are written as they are."""
    path = folder / name
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Any) -> Iterator[None]:
    """Nothing is left in, or taken from, the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    gc.collect()


def answered(folder: Path, rows: list[Any], options: dict[str, Any]) -> str:
    """Return the messages for these rows, read and tokenized with these options."""
    path = written(folder, *rows)
    (folder / "t.jinja").write_text(CHAT)
    options = dict(options)
    words: dict[str, Any] = options.pop("encoding", {})
    if "template_file" in words:
        words = {"template_file": words["template_file"].replace("DIR", str(folder))}
    reader: Any = HuggingFaceData if options.pop("hf", False) else Json
    split = options.pop("split_asked", "train")
    where = options.pop("path", "FILE").replace("FILE", path).replace("DIR", str(folder))
    with pytest.raises(UsageError) as caught, spell_options(OptionNames(language="flags")), options_under("/data"):
        examples = list(reader(where, **options)(split))
        encoder = Encoder(load_tokenizer("tiny", ModelOptions()), encoding=Encoding(**words))
        encoder.batch(*next(Stream(examples, len(examples)))[:2])
    return str(caught.value).replace(path, "FILE").replace(str(folder), "DIR")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("rows", "options", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_with_this_line(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    said = answered(tmp_path, rows, options)
    assert said == message
    assert "\n" not in said


def test_the_table_is_not_short() -> None:
    assert len(MISTAKES) >= 50
