"""Roles whose weights do not arrive as they were sent, or never change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from rlhf_core.training.local_role import LocalRole


class ChangedRole:
    """A role whose `weights()` are `change`d on their way."""

    def __init__(self, role: LocalRole, change: Any) -> None:
        self.role = role
        self.change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.role, name)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.role.weights():
            yield from self.change(name, tensor)


class FrozenRole:
    """A role that no term trains."""

    def __init__(self, role: LocalRole) -> None:
        self.role = role
        self.spec = replace(role.spec, terms=())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.role, name)
