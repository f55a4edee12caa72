"""An option whose type no flag can give is not shown as a flag; help and errors name the places that can give it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from rlhf_core.cli import main
from rlhf_core.config.value_types import from_plain, from_words, given_by


class Colour(Enum):
    red = 1


@dataclass(frozen=True)
class Part:
    weight: float = 1.0


GIVEN = {
    "flag": [
        *(
            str,
            int,
            float,
            bool,
            Path,
            Any,
            Colour,
            Literal["a", 2],
            int | None,
            str | float,
            tuple[int, ...],
            list[Path],
        ),
        *(tuple[int, str], set[str], dict[str, float], Mapping[str, int] | None, Sequence[Colour], tuple, dict),
    ],
    "file": [tuple[tuple[int, ...], ...], list[dict[str, int]], dict[str, list[str]], list[tuple[int, int]] | None],
    "python": [bytes, complex, Callable[[str], float], tuple[Part, ...], dict[str, Part], list[bytes] | None],
}


@pytest.mark.parametrize(("place", "annotation"), [(place, each) for place, types in GIVEN.items() for each in types])
def test_the_place_that_can_give_an_option_follows_from_its_type(place: str, annotation: Any) -> None:
    assert given_by(annotation) == place


@pytest.mark.parametrize("annotation", GIVEN["python"])
def test_no_word_gives_what_only_python_gives(annotation: Any) -> None:
    """The reader itself is the independent judge: it refuses every word but `none`, and every value of a file."""
    for words in (["1"], ["a=1"], ["len"], ["(1, 2)"], ["b'x'"]):
        with pytest.raises(ValueError):  # the reader's refusal has no text
            from_words(annotation, words)
    for value in ("len", [1], [[1]], {"a": 1}, {"a": {"weight": 2}}, [{"weight": 2}]):
        with pytest.raises(ValueError):
            from_plain(annotation, value)


def test_a_file_gives_what_is_from_a_file() -> None:
    assert from_plain(tuple[tuple[int, ...], ...], [[1, 2], [3]]) == ((1, 2), (3,))
    assert from_plain(dict[str, list[str]], {"a": ["b"]}) == {"a": ["b"]}


PLUGIN = '''
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_core import Command, CommandContext, hookimpl


@dataclass(frozen=True)
class Shape(Command):
    """Shape something."""

    how: Callable[[str], int] = len
    """what is called"""
    grid: tuple[tuple[int, ...], ...] = ((1, 2), (3,))
    """rows of numbers"""
    size: int = 2
    """how large"""

    def __call__(self, context: CommandContext) -> int:
        return self.how("four") + self.size


@hookimpl
def rlhf_command():
    return {"shape": Shape}
'''


def test_help_and_errors_name_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shape_fakes.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    call = ["-p", "shape_fakes", "shape"]
    assert main([*call, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "how what is called (from Python only; default: len)" in text
    assert "grid rows of numbers (from a file or Python only; default: 1 2 3)" in text
    assert "--size INT how large (default: 2)" in text and "--how" not in text
    assert main([*call, "--how", "len"]) == 2
    assert capsys.readouterr().err == "rlhf-run: --how is not a flag: set how from Python only\n"
    assert main([*call, "--grid", "1"]) == 2
    assert capsys.readouterr().err == "rlhf-run: --grid is not a flag: set grid from a file or Python only\n"
    assert main([*call, "--size", "3"]) == 7
