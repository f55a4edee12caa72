"""Plain functions of a Python user as observer hooks: `make_config(…, callbacks=[log_step])`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import hookimpl

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import RewardOutput
    from rlhf_core.contract.run_view import RunView

__all__ = ["Callbacks"]


class Callbacks:
    """Calls functions at observer hooks, each with those of the hook's arguments that it names.

    Args:
        functions: the functions of each hook, in the order of their calls.
    """

    def __init__(self, functions: Mapping[str, tuple[Callable[..., Any], ...]]) -> None:
        self.functions = functions

    @hookimpl
    def rlhf_run_start(self, run: RunView) -> None:
        self._call("rlhf_run_start", run=run)

    @hookimpl
    def rlhf_rollouts_ready(self, run: RunView, source: str, rollouts: Batch, rewards: RewardOutput) -> None:
        self._call("rlhf_rollouts_ready", run=run, source=source, rollouts=rollouts, rewards=rewards)

    @hookimpl
    def rlhf_before_update(self, run: RunView, role: str) -> None:
        self._call("rlhf_before_update", run=run, role=role)

    @hookimpl
    def rlhf_evaluated(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        self._call("rlhf_evaluated", run=run, step=step, metrics=metrics)

    @hookimpl
    def rlhf_step_end(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> bool | str | None:
        answers = self._call("rlhf_step_end", run=run, step=step, metrics=metrics)
        reasons = [each for each in answers if isinstance(each, str)]
        return reasons[0] if reasons else True in [each for each in answers if isinstance(each, bool)]

    @hookimpl
    def rlhf_run_end(self, run: RunView, error: BaseException | None) -> None:
        self._call("rlhf_run_end", run=run, error=error)

    def _call(self, hook: str, **arguments: Any) -> list[Any]:
        """Return what the functions of a hook answer."""
        return [_call_named(function, arguments) for function in self.functions.get(hook, ())]


def _call_named(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with the arguments that it names; `**kwargs` gets the rest."""
    parameters = inspect.signature(function).parameters
    everything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return function(**{name: value for name, value in arguments.items() if everything or name in parameters})
