"""The length of a run is given in one way: `steps`, or `epochs` of the data. An override of a file replaces both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.errors import OptionError

__all__ = ["check_length", "replace_length", "with_given_length", "without_unused_length"]


def check_length(settings: Mapping[str, Any]) -> None:
    """Check that settings of one origin, by path, have one of the two.

    Raises:
        OptionError: they have both.
    """
    if "steps" in settings and settings.get("epochs"):
        raise OptionError(("/steps", "/epochs"), "both set the length of the run; give only one of them")


def replace_length(settings: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Take the length out of `settings` where `later` gives another one."""
    if {"steps", "epochs"} & later.keys():
        for name in ("steps", "epochs"):
            settings.pop(name, None)


def with_given_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` in which given steps take the place of epochs that are a default."""
    given = "steps" in settings and "epochs" not in settings
    return {**settings, "epochs": 0.0} if given else dict(settings)


def without_unused_length(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options without the length that is not in force: steps follow from epochs where there are any."""
    unused = "steps" if tree["epochs"] else "epochs"
    return {name: value for name, value in tree.items() if name != unused}
