"""The authors' checks of commands and ingredients accept what keeps the contract, and refuse what breaks it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from rlhf_core import (
    Artifact,
    ArtifactKind,
    Command,
    CommandContext,
    Ingredient,
    IngredientContext,
    UsageError,
    hookimpl,
)
from rlhf_core.plugins.registry import Registry
from rlhf_core.testing import check_command, check_ingredient


@dataclass(frozen=True)
class Touch(Command):
    """Write a file into the working folder."""

    code: int = 0
    """exit code"""

    def __call__(self, context: CommandContext) -> int:
        assert context.registry.resolve("reward", "length")
        Path("touched").write_text("here")
        return self.code


def test_a_command_is_called_once_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [check_command(Touch()), check_command(Touch(code=3))] == [0, 3]
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Forgetful(Command):
    """Returns nothing."""

    def __call__(self, context: CommandContext) -> int:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class Stray:
    """Inherits nothing."""

    def __call__(self, context: CommandContext) -> int:
        return 0


@dataclass(frozen=True)
class Undocumented(Command):
    """Has an option without a word about it."""

    times: int = 1

    def __call__(self, context: CommandContext) -> int:
        return 0


@pytest.mark.parametrize(
    ("command", "clause"),
    [
        (Forgetful(), "must return an exit code, not None"),
        (Touch(code=300), "from 0 to 255, not 300"),
        (Stray(), "must inherit rlhf_core.Command"),
        (Undocumented(), "times needs a docstring line"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_command_that_breaks_a_rule_is_told_which(command: Any, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_command(command)


@dataclass(frozen=True)
class Choosy(Touch):
    """Needs a reward."""

    defaults: ClassVar[Mapping[str, str | None]] = {"reward": ""}


def test_a_command_that_needs_a_choice_needs_a_context() -> None:
    with pytest.raises(UsageError, match="needs a reward; pass a context"):
        check_command(Choosy())


# ----------------------------------------------------------------------------------------------------------------------
# ingredients
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountWords(Ingredient):
    """Count the words of the prompts of a data set."""

    lower: bool = True
    """count `The` and `the` as one word"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"counts": "metrics"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        rows = [json.loads(line) for line in context.inputs["rows"].path.read_text().splitlines()]
        words = [word.lower() if self.lower else word for row in rows for word in row["prompt"].split()]
        path = context.folder / "counts.json"
        path.write_text(json.dumps({"words": len(words), "distinct": len(set(words))}))
        MADE.append(json.loads(path.read_text()))
        return {"counts": Artifact("metrics", path)}


MADE: list[dict[str, int]] = []


@pytest.fixture
def rows(tmp_path: Path) -> Mapping[str, Artifact]:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "The cat saw the cat"}\n{"prompt": "Dogs"}\n')
    return {"rows": Artifact("dataset", path)}


def test_rlhf_ingredient_is_found_by_name_and_turns_artifacts_into_artifacts(rows: Mapping[str, Artifact]) -> None:
    registry = Registry(autoload=False)
    registry.register(
        SimpleNamespace(rlhf_ingredient=hookimpl(lambda: {"count": CountWords})), "mine", "rlhf-mine", "1.0"
    )
    MADE.clear()
    check_ingredient(registry.resolve("ingredient", "count")(), rows)
    assert MADE == [{"words": 6, "distinct": 4}] * 2, "the cat saw dogs"
    check_ingredient(CountWords(lower=False), rows)
    assert MADE[-1] == {"words": 6, "distinct": 5}


def broken(work: Callable[[IngredientContext], Mapping[str, Artifact]], **declared: Any) -> Any:
    """A data class whose only fault is what `work` does."""

    def call(self: object, context: IngredientContext) -> Mapping[str, Artifact]:
        return work(context)

    body = {"__doc__": CountWords.__doc__, "__call__": call, "__module__": __name__, "__qualname__": "CountWords"}
    cls = dataclass(frozen=True)(type("CountWords", (CountWords,), {**body, **declared}))
    return cls()


def written(
    context: IngredientContext, text: str, kind: Any = "metrics", folder: Path | None = None
) -> dict[str, Artifact]:
    path = (folder or context.folder) / "counts.json"
    path.write_text(text)
    return {"counts": Artifact(kind, path)}


@pytest.mark.parametrize(
    ("work", "clause"),
    [
        (lambda context: {}, r"must make \{'counts': 'metrics'\}, not \{\}"),
        (lambda context: written(context, "{}", "table"), r"not \{'counts': 'table'\}"),
        (lambda context: written(context, '{"a": "b"}'), "must contain one JSON object of numbers"),
        (lambda context: written(context, f'{{"a": {random.random()}}}'), "must make the same artifacts from the same"),
        (lambda context: {"counts": Artifact("metrics", context.folder / "none")}, "'counts' is not there"),
        (
            lambda context: written(context, "{}", folder=context.inputs["rows"].path.parent),
            "must be in context.folder",
        ),
    ],
)
def test_an_ingredient_that_breaks_a_rule_is_told_which(
    work: Callable[[IngredientContext], Mapping[str, Artifact]], clause: str, rows: Mapping[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "rlhf_core.testing.commands.check_provider", lambda provider: None
    )  # a made class has no source
    with pytest.raises(AssertionError, match=clause):
        check_ingredient(broken(work), rows)


def test_artifacts_that_are_declared_wrongly_are_refused(
    rows: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.testing.commands.check_provider", lambda provider: None)
    with pytest.raises(
        AssertionError, match="outputs has unknown kinds .*'counts': 'number'.*; kinds are model, dataset"
    ):
        check_ingredient(broken(lambda context: {}, outputs={"counts": "number"}), rows)
    with pytest.raises(AssertionError, match=r"reads \{'rows': 'dataset'\}, but the check was given \{\}"):
        check_ingredient(CountWords())
