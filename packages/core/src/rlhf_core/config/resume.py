"""Compare the options of a run with those of its continuation: only options that change no result may differ.

An option declares this itself, by the metadata `FREE` of its field. Where processes run, how they hold models, and what
measures or watches the policy are free as a whole. `steps` is free unless a learning rate follows a schedule over them.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_core.contract.options import RunConfig, TrainedOptions
from rlhf_core.errors import UsageError, run_option
from rlhf_core.option_text import render_options

__all__ = ["changed_options", "check_resume"]

FREE_KINDS = ("launcher", "strategy", "evaluator", "observer")
LENGTH = {"steps", "epochs"}
LISTED = 8
"""Differences named in the message; one algorithm in place of another has dozens."""


def check_resume(config: RunConfig, written: str) -> None:
    """Check that `config` continues the run in `config.output`.

    Args:
        config: of the run that resumes.
        written: config.toml as the run wrote it when it began.

    Raises:
        UsageError: options that change results differ and `--resume-changed` was not given.
    """
    changed = changed_options(tomllib.loads(written), config)
    switched = [each for each in changed if render_options(each).partition(" ")[0].endswith(".use")]
    if switched:
        raise UsageError(
            f"the run in {config.output} has another optimizer: {', '.join(switched)}; a saved optimizer state "
            "works only with the same optimizer, so resume with that one, or start a new run with "
            f"{run_option('model', f'{config.output}/model')}"
        )
    if not changed or config.resume_changed:
        return
    more = f" and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
    raise UsageError(
        f"the run in {config.output} began with other options: {', '.join(changed[:LISTED])}{more}; restore them, "
        f"or add {run_option('resume_changed', True)} to continue with the new ones"
    )


def changed_options(old: Mapping[str, Any], config: RunConfig) -> list[str]:
    """`--seed 0 -> 1` for each option that changes results and differs from `old`, a config.toml.

    Options that one of the two does not know are ignored: a newer version may have more of them.
    """
    from rlhf_core.config.builder import to_toml

    new = tomllib.loads(to_toml(config))
    free = {each.name for each in dataclasses.fields(RunConfig) if each.metadata.get("free")} | set(FREE_KINDS)
    if not any(_follows_steps(options) for options in config.roles.values()):
        free |= LENGTH
    (before, was), (now, value) = (next((n, t[n]) for n in sorted(LENGTH) if n in t) for t in (old, new))
    other = [f"{run_option(before)} {was} -> {run_option(now)} {value}"] if before != now and now not in free else []
    return other + [
        f"{run_option(path)} {_word(before)} -> {_word(now)}"
        for path, before, now in _differences(old, new)
        if path.partition(".")[0] not in free and not _is_free(path, config)
    ]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, before, now) of every value that differs; of tables that use different providers, only that."""
    if old.get("use", new.get("use")) != new.get("use"):
        kind = prefix.removesuffix(".")
        yield (f"{prefix}use" if "." in kind else kind), old.get("use"), new.get("use")
        return
    for name in new:
        if name not in old:
            continue
        before, now = old[name], new[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now and not (before != before and now != now):  # nan is nan here
            yield prefix + name, before, now


def _is_free(path: str, config: RunConfig) -> bool:
    """Return True if the field is marked as changing no result."""
    kind, _, name = path.partition(".")
    holder = config.algorithm if kind == "algorithm" else config.providers.get(kind, config.roles.get(kind))
    fields = dataclasses.fields(holder) if holder is not None else ()
    return any(each.name == name and each.metadata.get("free") for each in fields)


def _follows_steps(options: Any) -> bool:
    """Return True if a role's learning rate depends on the number of steps."""
    if not isinstance(options, TrainedOptions):
        return False
    return options.optim.schedule != "constant" or 0 < options.optim.warmup < 1


def _word(value: Any) -> str:
    return "(a table)" if isinstance(value, Mapping) else str(value)
