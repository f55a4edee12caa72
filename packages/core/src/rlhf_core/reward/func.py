"""`--reward func`: a function of the user's.

    def reward_func(queries, prompts, labels):
        return torch.tensor([...])          # or a list; or {"rewards": …, "scores": …, "extra_logs": {name: …}}

is OpenRLHF's signature: `queries` are prompt and completion as one text, and each argument is a list of N. A function
that names other arguments gets those, of `queries`, `prompts`, `completions`, `labels` and `meta`; `**kwargs` gets the
rest. It may be `async`. It is called once with the whole batch.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.reward.output import excerpt
from rlhf_core.types import RewardOutput

if TYPE_CHECKING:
    from rlhf_core.types import Rollouts

__all__ = ["Func", "load_function"]

POSITIONAL = ("queries", "prompts", "labels")
"""What a function with parameters of other names is called with."""


@dataclass(frozen=True)
class Func:
    """A Python function: of a file, reward_func(queries, prompts, labels), or module:name."""

    path: str
    """a .py file, or module:name"""
    name: str = "reward_func"
    """the function's name in the file"""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        function = load_function(self.path, self.name)
        try:
            raw = _call(function, rollouts, range(len(rollouts)))
        except Exception as error:
            raise UsageError(f"{self.path}: {_where(error)}, on {_culprit(function, rollouts)}") from error
        if not isinstance(raw, Mapping):
            return RewardOutput(rewards_N=raw)
        if "rewards" not in raw:
            raise UsageError(f"{self.path}: {function.__name__} returned a dict without 'rewards': {sorted(raw)}")
        return RewardOutput(rewards_N=raw["rewards"], scores_N=raw.get("scores"), metrics=raw.get("extra_logs") or {})


def _call(function: Callable[..., Any], rollouts: Rollouts, rows: range) -> Any:
    """What the function says about `rows`."""
    known: dict[str, list[Any]] = {
        "queries": [rollouts.prompts[i] + rollouts.texts[i] for i in rows],
        "prompts": [rollouts.prompts[i] for i in rows],
        "completions": [rollouts.texts[i] for i in rows],
        "labels": [rollouts.labels[i] for i in rows],
        "meta": [rollouts.meta[i] for i in rows],
    }
    parameters = inspect.signature(function).parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if all(name in known for name in required) and not any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        result = function(**{name: value for name, value in known.items() if everything or name in names})
    else:
        result = function(*(known[name] for name in POSITIONAL))
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _culprit(function: Callable[..., Any], rollouts: Rollouts) -> str:
    """The first sample that the function fails on by itself."""
    for row in range(len(rollouts)):
        try:
            _call(function, rollouts, range(row, row + 1))
        except Exception:
            return excerpt(rollouts, row)
    return f"a batch of {len(rollouts)} samples, though on none of them alone"


def _where(error: Exception) -> str:
    """`line 3: ZeroDivisionError: division by zero`."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"line {frames[-1].lineno}: {type(error).__name__}: {error}"


@cache
def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of the file `path`, or the one `path` names as `module:name`. Loaded once per process.

    Raises:
        UsageError: there is no such file, module or function.
    """
    if Path(path).suffix == ".py":
        if not Path(path).is_file():
            raise UsageError(f"--reward.path {path}: there is no such file")
        module_name = f"rlhf_reward_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickling inside the file look it up
        spec.loader.exec_module(module)
    else:
        module_name, _, name = path.partition(":")
        if not name:
            raise UsageError(f"--reward.path {path}: expected a .py file or module:name")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                raise UsageError(f"--reward.path {path}: there is no module {module_name!r}") from None
            raise
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--reward.path {path}: there is no function {name!r} in it")
    return function  # type: ignore[no-any-return]  # getattr gives Any
