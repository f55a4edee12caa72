"""Engines: what providers open, and a run uses in their place, remembers in its checkpoints and closes at its end.

A provider is a frozen dataclass and holds nothing. One that needs a model, a process, a file or a memory opens an engine,
which is called as the provider would be:

    @dataclass(frozen=True)
    class Novelty(Reward):
        bonus: float = 1.0
        def open(self, context): return NoveltyEngine(self.bonus)

    class NoveltyEngine:
        def __init__(self, bonus): self.bonus, self.seen = bonus, {}
        def __call__(self, rollouts): ...
        def close(self): ...
        def state_dict(self): return {"seen": self.seen}
        def load_state_dict(self, state): self.seen = dict(state["seen"])

An engine with `state_dict` and `load_state_dict` (`Stateful`) is part of every checkpoint, rank by rank. A state is made of
dictionaries, lists, tuples, numbers, texts, None and tensors. It is read between two steps, and given back to a new engine
before observers are called and before the first row is drawn. An empty state is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rlhf_core.contract.distributed import World
from rlhf_core.errors import ContractError
from rlhf_core.util.messages import log
from rlhf_core.util.tensor_tree import plain_tree

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.roles import Placement, Role

__all__ = ["Closeable", "Engines", "OpenContext", "Opens", "Stateful", "call_once", "open_provider"]


@runtime_checkable
class Closeable(Protocol):
    """Whatever is closed."""

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...


class Opens(Protocol):
    """A provider, as far as opening it is concerned."""

    def open(self, context: OpenContext) -> Closeable:
        """Return an engine."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """An engine that is part of every checkpoint. Each rank has its own state."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return everything that the engine remembers: dictionaries, lists, tuples, numbers, texts, None and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the engine is new, and tensors are on the CPU."""
        ...


@runtime_checkable
class _Saves(Protocol):
    def state_dict(self) -> Mapping[str, Any]: ...


@runtime_checkable
class _Loads(Protocol):
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class OpenContext:
    """Everything that a provider may use when it opens its engine. The engine may keep it."""

    place: str
    """the provider's place among all of the run: `reward`, `evaluator.heldout`, `reward.length` in a sum of rewards"""
    engines: Engines = field(repr=False)
    """all engines that are open together"""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.engines.seed

    @property
    def output(self) -> Path | None:
        """The folder of the run; None where a provider is used without a run, such as by `rlhf-run score`."""
        return self.engines.output

    @property
    def plan(self) -> Plan | None:
        """The plan of the run; None without a run."""
        return self.engines.plan

    @property
    def world(self) -> World:
        """The ranks that run the loop. Engines are opened before ranks have met: read it in a call, not in `open`."""
        return self.engines.world

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles by name, empty without a run. Engines are opened before roles are placed: read it in a call."""
        return self.engines.roles

    def open(self, provider: Opens, name: str) -> Any:
        """Open a provider inside this one, called `name`: its state is stored, and it is closed, with the others."""
        return self.engines.open(provider, f"{self.place}.{name}")


class Engines:
    """The engines of a run by place: opened while the context is entered, closed in reverse order whatever happens.

    Args:
        seed: of the run.
        output: folder of the run, if there is one.
        plan: of the run, if there is one.
    """

    def __init__(self, seed: int = 0, output: Path | None = None, plan: Plan | None = None) -> None:
        self.seed, self.output, self.plan = seed, output, plan
        self._placed: Placement | None = None
        self._engines: dict[str, Any] = {}
        self._waiting: dict[str, Mapping[str, Any]] = {}
        """restored states whose engines are not open yet"""
        self._stack = ExitStack()

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            self._engines.clear()
            self._waiting.clear()
            self._placed = None

    def close(self) -> None:
        """Close all engines, as the end of the context does."""
        self.__exit__(None, None, None)

    def __getitem__(self, place: str) -> Any:
        """Return the engine at `place`."""
        return self._engines[place]

    def get(self, place: str) -> Any:
        """Return the engine at `place`; None if there is none."""
        return self._engines.get(place)

    def __contains__(self, place: str) -> bool:
        return place in self._engines

    @property
    def world(self) -> World:
        """The ranks of the placed run; this process alone without one."""
        if self._placed is not None:
            return self._placed.world
        if self.plan is not None:
            raise ContractError("the ranks are not known while providers are opened; read `context.world` in a call")
        return World()

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles; none without a run."""
        if self._placed is None and self.plan is not None:
            raise ContractError("no role is placed while providers are opened; read `context.roles` in a call")
        return self._placed.roles if self._placed is not None else {}

    def bind(self, placed: Placement) -> None:
        """Let contexts show the roles and ranks of `placed`."""
        self._placed = placed

    def open(self, provider: Opens, place: str) -> Any:
        """Open `provider`, to be closed at the end, and return its engine, with its restored state if there is one.

        Raises:
            ContractError: what it opened cannot be closed, or keeps its state in the frozen provider.
        """
        engine: Any = provider.open(OpenContext(place, self))
        frozen = engine is provider and is_dataclass(provider)
        name = _describe(provider, place)
        if not isinstance(engine, Closeable):
            raise ContractError(f"{name}: open() returned {type(engine).__qualname__}, which has no close()")
        self._stack.push(_Closing(engine, name))
        if frozen and isinstance(engine, (_Saves, _Loads)):
            raise ContractError(f"{name} is frozen and has a state; let open() return an object with `state_dict`")
        self.add(engine, place, name)
        return engine

    def add(self, engine: object, place: str, name: str) -> None:
        """Store the state of `engine`, called `name` in messages, with that of the others; its owner closes it.

        Raises:
            ContractError: it has only one of `state_dict` and `load_state_dict`.
        """
        if isinstance(engine, _Saves) != isinstance(engine, _Loads):
            raise ContractError(
                f"{name}: {type(engine).__qualname__} has one of state_dict and load_state_dict; it needs both"
            )
        assert place not in self._engines, f"two engines are at {place}"
        self._engines[place] = engine
        if place in self._waiting and isinstance(engine, Stateful):
            engine.load_state_dict(self._waiting.pop(place))

    def stateful(self, root: str) -> bool:
        """Return True if the engine at `root`, or one inside it, has a state."""
        return any(isinstance(engine, Stateful) for _, engine in self._below(root))

    def state_dict(self, root: str = "", clone: bool = False) -> dict[str, Any]:
        """Return the states that are not empty by place: of all engines, or of the one at `root` and those inside it.

        Args:
            root: a place.
            clone: copy tensors, so that a state stays as it is while its engine works on.

        Raises:
            ContractError: a state holds what no checkpoint can.
        """
        states = {place: state for place, state in self._waiting.items() if _is_below(place, root)}
        for place, engine in self._below(root):
            if isinstance(engine, Stateful):
                try:
                    state = plain_tree(engine.state_dict(), clone)
                except TypeError as error:
                    raise ContractError(f"the state of {place} ({type(engine).__qualname__}): {error}") from None
                if state:
                    states[place] = state
        return states

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give each engine its state; one that is opened later gets it then."""
        for place, state in states.items():
            engine = self._engines.get(place)
            if isinstance(engine, Stateful):
                engine.load_state_dict(state)
            else:
                self._waiting[place] = state

    @property
    def waiting(self) -> list[str]:
        """Places of restored states that no engine has taken."""
        return sorted(self._waiting)

    def _below(self, root: str) -> Iterator[tuple[str, Any]]:
        return ((place, engine) for place, engine in list(self._engines.items()) if _is_below(place, root))


@dataclass(frozen=True)
class _Closing:
    """Closes an engine at the end of a stack; an error there never hides the one that ended the run."""

    engine: Closeable
    name: str

    def __call__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.engine.close()
        except Exception as failed:
            if error is None:
                failed.add_note(f"{self.name} was being closed")
                raise
            log.error(f"{self.name} could not be closed: {type(failed).__name__}: {failed}")


@contextmanager
def open_provider(provider: Opens, place: str = "provider", seed: int = 0) -> Iterator[Any]:
    """Open a provider without a run, yield its engine, and close it at the end."""
    with Engines(seed) as engines:
        yield engines.open(provider, place)


def call_once(provider: Opens, *arguments: Any) -> Any:
    """Open `provider`, call the object that `open` returns, and close it.

    This is the `__call__` of base classes whose providers may define `open` instead of `__call__`.

    Raises:
        NotImplementedError: the provider defines neither `__call__` nor `open`.
    """
    with open_provider(provider) as engine:
        if engine is provider:
            raise NotImplementedError(f"{type(provider).__qualname__} has neither __call__ nor open")
        return engine(*arguments)


def _is_below(place: str, root: str) -> bool:
    return not root or place == root or place.startswith(f"{root}.")


def _describe(provider: object, place: str) -> str:
    """The place and the class of a provider, for messages."""
    return f"{place} ({type(provider).__module__}.{type(provider).__qualname__})"
