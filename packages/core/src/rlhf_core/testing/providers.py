"""Checks for providers of every kind: a frozen dataclass whose fields are documented options."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

from rlhf_core.config.docstrings import docs_of
from rlhf_core.config.option_fields import annotation_of, option_fields
from rlhf_core.config.value_types import from_plain, to_plain

__all__ = ["check_light", "check_provider"]


def check_provider(provider: Any) -> None:
    """A provider is a frozen dataclass, documents itself and its options, travels to workers, and can be written down.

    Raises:
        AssertionError: a check fails; the message states what the contract requires.
    """
    cls = type(provider)
    who = f"{cls.__module__}.{cls.__qualname__}"
    assert dataclasses.is_dataclass(provider), f"{who} must be a dataclass: its fields are its options"
    assert cls.__dataclass_params__.frozen, f"{who} must be frozen: @dataclass(frozen=True)"
    assert docs_of(cls).doc, f"{who} needs a docstring; `rlhf-run plugins` shows its first line"
    assert callable(provider), f"{who} must define __call__: calling a provider does its work"
    _check_options(provider, who)
    try:
        copy = pickle.loads(pickle.dumps(provider))  # noqa: S301  # what was just written
    except Exception as error:
        raise AssertionError(f"{who} must pickle, since it travels to workers: {error}") from error
    assert copy == provider, f"{who} must equal its pickled copy; keep state out of the fields that are compared"


def _check_options(provider: Any, who: str) -> None:
    """Every option is documented and survives being written to config.toml and read again."""
    cls = type(provider)
    documented = docs_of(cls).fields
    for field in option_fields(cls):
        option, value = f"{who}.{field.name}", getattr(provider, field.name)
        assert documented.get(field.name), f"{option} needs a docstring line right under it; it becomes --help"
        if dataclasses.is_dataclass(value):
            _check_options(value, option)
            continue
        try:
            again = from_plain(annotation_of(cls, field.name), to_plain(value))
        except ValueError:
            raise AssertionError(
                f"{option} = {value!r} cannot be written to config.toml and read as {field.type}; "
                f"options are numbers, strings, paths, literals, and tuples or mappings of them"
            ) from None
        assert again == value, f"{option} = {value!r} reads as {again!r} from config.toml"


def check_light(*modules: str) -> None:
    """Importing these modules does not import torch, transformers, or anything that needs a device.

    Plugins are imported by every `rlhf-run --help`, which answers in under a second: import heavy libraries inside the
    method that needs them, or `from rlhf_core.lazy import torch`.

    Raises:
        AssertionError: one of them was imported.
    """
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "transformers", "vllm", "ray", "deepspeed"}.intersection(imported)
    assert not heavy, f"importing {', '.join(modules)} imports {', '.join(sorted(heavy))}; import it inside the method"
