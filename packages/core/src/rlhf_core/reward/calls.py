"""Calling a reward function of the user's: finding it, giving it the arguments it names, reading what it returns.

torch-free, because worker processes import it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_core.errors import OptionError, RlhfError
from rlhf_core.util.event_loop import run
from rlhf_core.util.worker_processes import reason

__all__ = ["Answer", "Columns", "absent_column", "answer_of", "call", "load_function", "read_columns"]

Columns = Mapping[str, list[Any]]
"""Arguments by name, one entry per sample: queries, prompts, completions, labels, meta, and columns of the data."""

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
POSITIONAL = ("queries", "prompts", "labels")
"""Arguments of a function with other parameter names."""


@dataclass
class Answer:
    """Values that a function returned for some samples; None abstains."""

    rewards: list[float | None]
    scores: list[float | None] | None = None
    logs: dict[str, list[float]] = field(default_factory=dict)


def call(path: str | Callable[..., Any], name: str, columns: Columns) -> Answer:
    """The function's answer.

    Raises:
        ValueError: it answers for another number of samples, or in another form.
    """
    raw = _call_here(load_function(path, name), columns)
    return answer_of(raw, len(next(iter(columns.values()))))


def read_columns(function: Callable[..., Any], names: Collection[str]) -> Collection[str]:
    """Return those of `names` that a call of `function` reads, at least one; all where that is not known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is built in, which the call itself reports
        return names
    known = [p.name for p in parameters if p.name in names]
    unclear = (p.kind not in _BY_NAME or (p.name not in names and p.default is p.empty) for p in parameters)
    return names if not known or any(unclear) else known


def absent_column(function: Callable[..., Any], names: Collection[str]) -> str:
    """Return an argument that `function` requires by a name that is not among `names`, next to one that is; empty for none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is built in, which the call itself reports
        return ""
    required = [p.name for p in parameters if p.default is p.empty and p.kind in _BY_NAME]
    absent = [name for name in required if name not in names]
    return absent[0] if absent and len(absent) < len(required) else ""


def _call_here(function: Callable[..., Any], columns: Columns) -> Any:
    """Call the function in this process. A process that it forks ends here; otherwise two processes would continue the run."""
    process = os.getpid()
    try:
        return _call_with_columns(function, columns)
    except TypeError as error:
        if "string indices" in str(error):  # as TRL's functions read chats
            error.args = (
                f"{error}; completions and prompts are strings: use completion instead of completion[0]['content']",
            )
        raise
    finally:
        if os.getpid() != process:
            os._exit(0)


def _call_with_columns(function: Callable[..., Any], columns: Columns) -> Any:
    """Call the function with the arguments that it names."""
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind in _BY_NAME]
    if all(name in columns for name in required) and not any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        raw = function(**{name: value for name, value in columns.items() if everything or name in names})
    else:
        raw = function(*(columns[name] for name in POSITIONAL))
    return run(_await_result(raw)) if inspect.isawaitable(raw) else raw


async def _await_result(result: Any) -> Any:
    return await result


def prepare_worker(path: str, name: str) -> None:
    """In a worker: import the function before the clock of its first call starts."""
    load_function(path, name)


def answer_of(raw: Any, count: int) -> Answer:
    """`raw`, rewards alone or a dict of them, scores and logs, for `count` samples.

    Raises:
        ValueError: it is for another number of samples, or in another form.
    """
    if not isinstance(raw, Mapping):
        return Answer(_numbers(raw, "rewards", count))
    if "rewards" not in raw:
        raise ValueError(f"returned a dict without 'rewards': {', '.join(map(str, list(raw)[:9]))[:200]}")
    scores, logs = raw.get("scores"), raw.get("extra_logs") or {}
    if not isinstance(logs, Mapping):
        raise ValueError(f"returned extra_logs that are not a dict: {reprlib.repr(logs)}")
    rewards = _numbers(raw["rewards"], "rewards", count)
    answer = Answer(rewards, None if scores is None else _numbers(scores, "scores", count))
    for name, values in logs.items():
        numbers = _numbers(values, name, count)
        answer.logs[name] = [
            0.0 if value is None and reward is None else _require_number(value, name)
            for value, reward in zip(numbers, rewards, strict=True)
        ]
    if answer.scores is not None:
        for score, reward in zip(answer.scores, rewards, strict=True):
            if reward is not None:
                _require_number(score, "scores")
    return answer


def _require_number(value: float | None, name: str) -> float:
    if value is None:
        raise ValueError(f"returned None among {name} for a sample that has a reward; only rewards abstain")
    return value


def _numbers(values: Any, name: str, count: int) -> list[float | None]:
    """`values`, a tensor, an array or a list, as `count` floats or Nones."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(plain, (list, tuple)) or len(plain) != count:
        size = f"{len(plain)}" if isinstance(plain, (list, tuple)) else f"{type(values).__name__} instead of"
        raise ValueError(f"returned {size} {name} for {count} samples")
    for value in plain:
        if isinstance(value, (list, tuple, dict)):
            shape = f" of the shape {tuple(values.shape)}" if hasattr(values, "shape") else ""
            raise ValueError(f"returned {name}{shape} with {reprlib.repr(value)} in place of one number per sample")
    try:
        return [None if v is None else float(v.item() if hasattr(v, "item") else v) for v in plain]
    except OverflowError:
        raise ValueError(f"returned {name} with a number that is too large") from None


def load_function(path: str | Callable[..., Any], name: str, field: str = "path") -> Callable[..., Any]:
    """The function `name` of the file `path`, or the one `path` names as `module:name`, or is.

    A file is loaded once per process, and again when it has changed or another one is meant by the same words. `field` is the
    option that names the function, for messages.

    Raises:
        UsageError: there is no such file, module or function, or the file cannot be imported.
    """
    if not isinstance(path, str):
        return path
    file = Path(path)
    stat = file.stat() if file.suffix == ".py" and file.is_file() else None
    return _load(path, name, field, (str(file.resolve()), stat.st_mtime_ns, stat.st_size) if stat is not None else ())


@cache
def _load(path: str, name: str, field: str, _state: tuple[Any, ...]) -> Callable[..., Any]:
    """Load a function; `field` is the option that names it, and `_state` distinguishes files and their contents."""
    if Path(path).suffix == ".py":
        if not Path(path).is_file():
            raise OptionError(field, f"{path}: there is no such file")
        module_name = f"rlhf_reward_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickling inside the file look it up
        try:
            spec.loader.exec_module(module)
        except RlhfError:
            raise
        except (Exception, SystemExit) as error:
            raise OptionError(field, f"{path} cannot be imported: {reason(error)}") from error
    else:
        module_name, _, name = path.partition(":")
        if not name:
            raise OptionError(field, f"{path}: expected a .py file or module:name")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                raise OptionError(field, f"{path}: there is no module {module_name!r}") from None
            raise
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(field, f"{path}: there is no function {name!r} in it")
    return function  # type: ignore[no-any-return]  # getattr gives Any
