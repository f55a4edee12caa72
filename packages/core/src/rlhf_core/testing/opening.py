"""The check of providers that open something: it can be closed and opened again, and continues from its state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.contract.engines import Stateful, open_provider
from rlhf_core.contract.providers import Provider
from rlhf_core.util.tensor_tree import plain_tree, read_tree, same_tree, write_tree

__all__ = ["check_opening", "check_state"]

Answer = TypeVar("Answer")


def check_opening(provider: Provider) -> None:
    """Engines close twice, close after a failure, and can be opened again; a new one loads the state of another.

    Nothing is checked of a provider that is its own engine.

    Raises:
        AssertionError: it is not so.
    """
    if type(provider).open is Provider.open:
        return
    name = type(provider).__qualname__
    with _blame(f"{name} must open and close"), open_provider(provider) as engine:
        pass
    with _blame(f"{name}: a second close() must do nothing"):
        engine.close()
    with (
        _blame(f"{name} must open and close again after a failure"),
        suppress(_PlannedFailure),
        open_provider(provider),
    ):
        raise _PlannedFailure
    with open_provider(provider) as engine, open_provider(provider) as other:
        assert engine is not other, f"{name} must open a separate engine for each run"
        if isinstance(engine, Stateful) and (state := _state_from_file(engine)):  # an empty one is never loaded
            with _blame(f"{name}: load_state_dict() must take what state_dict() returned"):
                other.load_state_dict(state)
            assert same_tree(_state_from_file(other), state), f"{name}: a state that was loaded must be returned again"


def check_state(provider: Provider, call: Callable[[Any], Answer], same: Callable[[Answer, Answer], bool]) -> None:
    """A new engine with the state of another one answers as the other one does; for engines with a state only.

    Args:
        provider: what opens the engines.
        call: calls an engine and returns its answer.
        same: compares two answers.

    Raises:
        AssertionError: it is not so.
    """
    with open_provider(provider) as engine, open_provider(provider) as other:
        if isinstance(engine, Stateful):
            call(engine)
            state = _state_from_file(engine)
            expected = call(engine)
            if state:
                other.load_state_dict(state)
            assert same(call(other), expected), (
                f"{type(provider).__qualname__}: a new engine with the state of another must answer as that one does; let "
                "state_dict() return everything that changes from call to call"
            )


class _PlannedFailure(Exception):
    """Ends a use of an engine."""


@contextmanager
def _blame(text: str) -> Iterator[None]:
    """Turn an error inside into one of the kit that begins with `text`."""
    try:
        yield
    except (AssertionError, _PlannedFailure):
        raise
    except Exception as error:
        raise AssertionError(f"{text}: {type(error).__name__}: {error}") from error


def _state_from_file(engine: Stateful) -> Mapping[str, Any]:
    """Return the state of an engine as a checkpoint would give it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        write_tree(path, plain_tree(engine.state_dict()))
        state: Mapping[str, Any] = read_tree(path)
    return state
