"""Adapters of a role as vLLM reads them: a folder for each version, in memory where the system has such a place.

The engine has the weights under the adapters, which do not change. It takes an adapter when it first samples with it.
Each version has its own number and name, so that completions in progress go on with theirs, and no cached prompt is shared.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, option

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.roles import Role

__all__ = ["Adapter", "AdapterFolders", "BaseWeights"]

MEMORY = Path("/dev/shm")  # noqa: S108  the folder that is made there has a random name, and is this user's alone

FOLDERS = 8
"""versions that are kept, for completions that wait"""


@dataclass(frozen=True)
class Adapter:
    """The adapter of one version of a role."""

    folder: str
    version: int
    """version of the role"""
    number: int
    """number of the update, which is vLLM's id"""
    size: int
    """bytes of its files"""

    def request(self) -> Any:
        """Return vLLM's request to sample with it."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"update-{self.number}", self.number, self.folder)


class AdapterFolders:
    """The newest adapters of one role."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="rlhf-adapters-", dir=MEMORY if MEMORY.is_dir() else None))
        self._kept: list[Path] = []
        self.newest: Adapter | None = None

    def write(self, role: Role) -> Adapter:
        """Write the role's present adapter.

        Raises:
            OptionError: it has none in this process.
        """
        number = self.newest.number + 1 if self.newest is not None else 1
        folder = self._root / str(number)
        folder.mkdir()
        if not role.save_adapters(str(folder)):
            raise OptionError(
                "lora",
                f"adapter is for roles with LoRA in the engine's process, and {role.name!r} has none here; pass "
                f"{option('lora', 'merged')}",
            )
        self._kept.append(folder)
        while len(self._kept) > FOLDERS:
            shutil.rmtree(self._kept.pop(0))
        size = sum(each.stat().st_size for each in folder.iterdir())
        self.newest = Adapter(str(folder), role.version, number, size)
        return self.newest

    def close(self) -> None:
        """Remove everything; a second call does nothing."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._kept, self.newest = [], None


class BaseWeights:
    """A role as a source of the weights under its adapters.

    Args:
        role: whose.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.name, self.spec, self.version = role.name, role.spec, role.version

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return them by their Hugging Face names."""
        return self.role.base_weights()
