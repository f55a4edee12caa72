"""The states of engines in a checkpoint: each rank's own, one file per engine.

    providers/rank-R/<place>.safetensors

A run with as many ranks gives each rank what it had. With another number of ranks, a state that was the first rank's alone
goes to the first rank, and one that was equal on all ranks goes to all. There is no way to divide states that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from rlhf_core.errors import UsageError
from rlhf_core.util.tensor_tree import read_tree, same_tree, write_tree

__all__ = ["read_states", "write_states"]

FOLDER = "providers"
SUFFIX = ".safetensors"


def write_states(folder: Path, rank: int, states: Mapping[str, Any]) -> None:
    """Write the states of the engines of one rank, by place, into the checkpoint `folder`."""
    for place, state in states.items():
        path = folder / FOLDER / f"rank-{rank}" / f"{quote(place, safe='')}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tree(path, state)


def read_states(folder: Path, saved_ranks: int, rank: int, ranks: int) -> dict[str, Any]:
    """Return the states that the checkpoint `folder` has for one rank, by place.

    Args:
        folder: of the checkpoint.
        saved_ranks: number of ranks that wrote it.
        rank: the rank that reads.
        ranks: number of ranks that read.

    Raises:
        UsageError: the numbers of ranks differ, and a state is another one on each of the old ranks.
    """
    if ranks == saved_ranks:
        return {place: read_tree(path) for place, path in _files(folder, rank).items()}
    files = [_files(folder, each) for each in range(saved_ranks)]
    states: dict[str, Any] = {}
    for place in sorted(set().union(*files)):
        owners = [number for number, each in enumerate(files) if place in each]
        found = [read_tree(files[number][place]) for number in owners]
        if owners == [0] and saved_ranks > 1:
            states |= {place: found[0]} if rank == 0 else {}
        elif len(owners) == saved_ranks and all(same_tree(found[0], each) for each in found[1:]):
            states[place] = found[0]
        else:
            raise UsageError(
                f"{folder} has a separate state of {place} for each of {saved_ranks} ranks, which {ranks} ranks "
                f"cannot share; resume on {saved_ranks} ranks"
            )
    return states


def _files(folder: Path, rank: int) -> dict[str, Path]:
    """The files of one rank by place."""
    paths = sorted((folder / FOLDER / f"rank-{rank}").glob(f"*{SUFFIX}"))
    return {unquote(path.name.removesuffix(SUFFIX)): path for path in paths}
