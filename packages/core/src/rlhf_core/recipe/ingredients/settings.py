"""Settings of ingredients: tables as in a configuration file of `rlhf-run`, and the flags that mean the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["check_flags", "flags", "merge", "names_provider"]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, table by table; a name in place of a table is its `use`."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            old = result.get(key, {})
            result[key] = merge(old if isinstance(old, Mapping) else {"use": old}, value)
        else:
            result[key] = value
    return result


def names_provider(settings: Mapping[str, Any], kind: str) -> bool:
    """Return True if the settings choose the provider of a kind: by a name in place of its table, or by `use`."""
    chosen = settings.get(kind, {})
    return isinstance(chosen, str) or "use" in chosen


def flags(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the words of a command line for settings: `{"reward": {"use": "length", "target": 8}}` is
    `--reward length --reward.target 8`."""
    for key, value in settings.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            yield from flags(value, name)
            continue
        yield "--" + (above if key == "use" and above else name).replace("_", "-")
        yield from (str(each) for each in (value if isinstance(value, list) else [value]))


def check_flags(command: str, settings: Mapping[str, Any], *words: str) -> None:
    """Check that a command has the options of `settings`.

    Args:
        command: its name.
        settings: the options.
        words: positional words of the command.

    Raises:
        UsageError: an option is unknown, or a value does not fit.
    """
    from rlhf_core.plugins.registry import default_registry
    from rlhf_core.run.command import read_command

    read_command([command, *words, *flags(settings)], default_registry())
