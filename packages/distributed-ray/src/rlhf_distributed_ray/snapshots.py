"""Snapshots of roles in memory, kept where the loss of a process or a node leaves them.

Each rank writes what a checkpoint would hold of it into memory, and the files go into the object store: of the rank's own node,
and of another one where there is any. An actor on each of the two (`Keeper`) holds on to them. The snapshot before stays until
all parts of a new one are held.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_core.errors import WorkerLost
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_distributed_ray.group import RoleGroup

__all__ = ["Files", "Keeper", "Snapshots", "memory_folder", "read_files", "write_files"]

Files = Mapping[str, Any]
"""Contents of files as arrays of bytes, by name."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  a folder in memory, where there is one
COPY_SECONDS = 600.0
"""Seconds that the transfer of a snapshot's parts between nodes may take."""


def memory_folder() -> AbstractContextManager[str]:
    """Return a temporary folder, in memory where the system has one there."""
    return tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)


def read_files(folder: str) -> dict[str, Any]:
    """Return everything in a folder; the store shares arrays without a copy."""
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): np.fromfile(path, np.uint8) for path in paths}


def write_files(folder: str, files: Files) -> None:
    """Write what `read_files` returned."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content.tofile(path)


class Keeper:
    """An actor that holds parts of snapshots: of each rank of each role, by step."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[tuple[str, int], Files]] = {}

    def take(self, step: int, role: str, rank: int, part: Files) -> None:
        """Hold a part; its arrays stay in this node's share of the store, as long as they are held."""
        self._parts.setdefault(step, {})[role, rank] = part

    def settle(self, step: int) -> None:
        """Drop every part of another step."""
        self._parts = {step: self._parts.get(step, {})}

    def has(self, step: int, role: str, rank: int) -> bool:
        """Return True if this part is held."""
        return (role, rank) in self._parts.get(step, {})

    def give(self, step: int, role: str, rank: int) -> Files:
        """Return a part."""
        return self._parts[step][role, rank]


class Snapshots:
    """The snapshots of one run, as its controller sees them.

    Args:
        hire: returns a keeper on the node of that id.
        patience: seconds that a keeper has to answer.
    """

    def __init__(self, hire: Callable[[str], Any], patience: float) -> None:
        self._hire, self._patience = hire, patience
        self._keepers: dict[str, Any] = {}
        """by node"""
        self._sizes: dict[str, int] = {}
        """ranks of each role in the last snapshot"""

    def keep(self, step: int, groups: Mapping[str, RoleGroup], nodes: list[str]) -> bool:
        """Take a snapshot of these roles; True if each part is held on a node at least.

        Args:
            step: the step that has just ended.
            groups: the roles by name.
            nodes: ids of the nodes that are alive.
        """
        taken: dict[tuple[str, int], list[Any]] = {}
        for name, group in groups.items():
            parts: dict[int, Any] = {}

            def call(actor: Any, rank: int, parts: dict[int, Any] = parts) -> Any:
                # two results each: the files stay in the store, only the node comes here
                parts[rank], node = actor.keep_state.options(num_returns=2).remote()
                return node

            with group.awake():
                homes = group.crew.send(call).in_order()
            for rank, home in enumerate(homes):
                targets = [home, *_next_node(home, nodes)]
                taken[name, rank] = [self._keeper(node).take.remote(step, name, rank, parts[rank]) for node in targets]
        held = [any(self._answers(each) for each in asked) for asked in taken.values()]
        if not all(held):
            log.warning(f"the snapshot of step {step} is incomplete; the one before it is kept")
            return False
        for keeper in self._keepers.values():
            keeper.settle.remote(step)
        self._sizes = {name: len(group.crew) for name, group in groups.items()}
        return True

    def give_back(self, step: int, groups: Mapping[str, RoleGroup]) -> None:
        """Let every rank of these roles load what was kept after `step`.

        Raises:
            WorkerLost: a part is on nodes that are lost.
        """
        for name, group in groups.items():
            parts = [self._find(step, name, rank) for rank in range(self._sizes[name])]
            with group.awake():
                group.crew.call("load_state", *parts)

    def _find(self, step: int, role: str, rank: int) -> Any:
        """Return the reference of a part."""
        for keeper in self._keepers.values():
            if self._answers(keeper.has.remote(step, role, rank), True):
                return keeper.give.remote(step, role, rank)
        what = f"the snapshot of step {step} is lost: no remaining node has role {role} rank {rank}"
        raise WorkerLost("snapshot", what)

    def _answers(self, reference: Any, wanted: Any = None) -> bool:
        """Return True if a keeper's answer comes and is `wanted`."""
        import ray

        try:
            return bool(ray.get(reference, timeout=COPY_SECONDS if wanted is None else self._patience) == wanted)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):  # its node is lost
            return False

    def _keeper(self, node: str) -> Any:
        if node not in self._keepers:
            self._keepers[node] = self._hire(node)
        return self._keepers[node]

    def forget(self, nodes: list[str]) -> None:
        """Forget keepers on other nodes than these, which are alive."""
        self._keepers = {node: keeper for node, keeper in self._keepers.items() if node in nodes}


def _next_node(home: str, nodes: list[str]) -> list[str]:
    """Return the node after `home`, of those alive; nothing where there is no other."""
    others = sorted(node for node in nodes if node != home)
    return [next((node for node in others if node > home), others[0])] if others else []
