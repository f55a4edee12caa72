"""Running an agent: a function of the user's, in a thread or as a coroutine, or a command."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

from rlhf_core.contract.batch import Example
from rlhf_core.contract.driving import Outcome
from rlhf_core.endpoint.server import Address
from rlhf_core.errors import UsageError

__all__ = ["call_function", "outcome_of", "run_command"]

ARGUMENTS = ("base_url", "api_key", "example", "prompt", "label", "meta", "seed")
"""Arguments that a function may name."""
FIELDS = {"reward", "turn_rewards", "token_rewards", "score", "metrics"}
"""Keys that an agent may return in a mapping."""
TAIL = 2000
"""Characters of a failed command's errors that are shown."""


async def call_function(function: Callable[..., Any], address: Address, example: Example, seed: int) -> Any:
    """Return what the user's function returns. A function that is not a coroutine runs in a separate thread.

    A thread cannot be ended: one that outlives its time is left alone, and its URL answers no more.
    """
    known = {
        "base_url": address.base_url,
        "api_key": address.api_key,
        "example": example,
        "prompt": example.prompt,
        "label": example.label,
        "meta": example.meta,
        "seed": seed,
    }
    names = _parameters(function)
    arguments = {name: known[name] for name in names}
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            value, error = context.run(function, **arguments), None
        except BaseException as raised:
            value, error = None, raised
        loop.call_soon_threadsafe(_settle, done, value, error)

    threading.Thread(target=work, name="rlhf-agent", daemon=True).start()
    return await done


def _settle(done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(value)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        done.set_exception(error)
    else:
        done.set_exception(RuntimeError(f"the agent raised {type(error).__name__}: {error}"))


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Return the arguments that the function is given: those that it names, all of them for `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return list(ARGUMENTS)
    unknown = [p.name for p in parameters if p.default is p.empty and p.name not in ARGUMENTS]
    if unknown:
        raise UsageError(f"the agent's argument {unknown[0]!r} is unknown; arguments are {', '.join(ARGUMENTS)}")
    return [p.name for p in parameters if p.name in ARGUMENTS]


async def run_command(command: str, address: Address, example: Example, seed: int) -> Any:
    """Run a command and return the JSON of the last line that it prints.

    It gets the row of data as JSON on its standard input, and the addresses in OPENAI_BASE_URL, OPENAI_API_KEY,
    ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY. It is killed with everything that it started if it is cancelled.
    """
    row = {"prompt": example.prompt, "label": example.label, "meta": dict(example.meta), "seed": seed}
    proxies = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    environment = os.environ | {
        "OPENAI_BASE_URL": address.base_url,
        "OPENAI_API_KEY": address.api_key,
        "ANTHROPIC_BASE_URL": address.root_url,
        "ANTHROPIC_API_KEY": address.api_key,
        "NO_PROXY": proxies,
        "no_proxy": proxies,
    }
    process = await asyncio.create_subprocess_exec(
        *shlex.split(command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        printed, errors = await process.communicate(json.dumps(row, default=str).encode())
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode:
        tail = errors.decode(errors="replace")[-TAIL:].strip() or "it wrote nothing to its standard error"
        raise UsageError(f"the agent's command ended with code {process.returncode}: {tail}")
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        raise UsageError(f"the last line that the agent's command printed is not JSON: {lines[-1][:200]!r}") from None


def outcome_of(raw: Any, names: Sequence[str]) -> Outcome:
    """Return what an agent returned as an outcome: a number, a mapping of `FIELDS`, an `Outcome`, or nothing.

    Args:
        raw: what it returned.
        names: of metrics that it may return.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(raw, Outcome):
        return raw
    if raw is None:
        return Outcome()
    if isinstance(raw, Mapping):
        if unknown := sorted(set(raw) - FIELDS):
            raise UsageError(
                f"the agent returned the unknown field {unknown[0]!r}; fields are {', '.join(sorted(FIELDS))}"
            )
        metrics = {name: _number(value, name) for name, value in (raw.get("metrics") or {}).items()}
        if unknown := sorted(set(metrics) - set(names)):
            raise UsageError(
                f"the agent returned a metric {unknown[0]!r} that is not declared; add it to the metrics of the "
                "environment"
            )
        score = raw.get("score")
        return Outcome(
            _number(raw.get("reward", 0.0), "reward"),
            _numbers(raw, "turn_rewards"),
            None if score is None else _number(score, "score"),
            metrics,
            [_numbers({"token_rewards": each}, "token_rewards") for each in _list(raw, "token_rewards")],
        )
    return Outcome(_number(raw, "reward"))


def _numbers(raw: Mapping[str, Any], name: str) -> list[float]:
    """Return finite numbers; none where they are absent."""
    return [_number(each, name) for each in _list(raw, name)]


def _list(raw: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return a list; an empty one where it is absent."""
    value = raw.get(name)
    if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise UsageError(f"the agent returned {value!r} as {name}, which is not a list")
    return value or ()


def _number(value: Any, name: str) -> float:
    """Return a finite number."""
    if not isinstance(value, Real) or not float("-inf") < float(value) < float("inf"):
        raise UsageError(f"the agent returned {value!r} as {name}, which is not a finite number")
    return float(value)
