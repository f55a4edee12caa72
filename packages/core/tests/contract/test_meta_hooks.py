"""The contract is documented and tested, hook by hook."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from rlhf_core import testing
from rlhf_core.contract import hooks as hookspecs
from rlhf_core.contract.hooks import KINDS, METRICS, OBSERVERS

ROOT = Path(__file__).resolve().parents[4]
HOOKS = [*(f"rlhf_{kind}" for kind in KINDS), METRICS, *OBSERVERS]


def test_every_specification_is_listed_and_every_listed_one_is_specified() -> None:
    """Provider hooks are made of KINDS and observers stand in OBSERVERS: nothing else may be a hook."""
    specified = [name for name, thing in vars(hookspecs).items() if hasattr(thing, "rlhf_spec")]
    assert sorted(specified) == sorted(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_docs_show_the_exact_signature(hook: str) -> None:
    signature = str(inspect.signature(getattr(hookspecs, hook))).replace("'", "")
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"{hook}{signature}" in headings


def test_docs_show_no_hook_that_does_not_exist() -> None:
    headings = re.findall(r"^### `(\w+)\(", (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_what_it_is_for(hook: str) -> None:
    assert inspect.getdoc(getattr(hookspecs, hook))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook: str) -> None:
    """A test of core is named after it: `def test_rlhf_reward_…` or `def test_hook_rlhf_reward…`."""
    tests = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert re.search(rf"^def test_(hook_)?{hook}(_|\()", tests, re.MULTILINE), (
        f"no test of {hook} in packages/core/tests"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_kit_has_a_check_of_every_kind(kind: str) -> None:
    assert f"check_{kind}" in testing.__all__
    assert inspect.getdoc(getattr(testing, f"check_{kind}"))
