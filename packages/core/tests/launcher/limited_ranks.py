"""A function that ranks run: processes that pytest did not start can import this module, and no test module."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_core.contract.distributed import data_world
from rlhf_core.launcher.local import join_world


def write_limits(folder: Path) -> None:
    """Leave the seconds that ranks of each group wait for each other."""
    join_world(45.0)
    world = data_world(2)
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in (world.group, world.neighbors)]
    (folder / str(torch.distributed.get_rank())).write_text(" ".join(str(limit.seconds) for limit in limits))
