"""torch, imported at first use.

Providers are imported to show their options, in `--help` and in every error about a flag, and that must answer in under a
second; importing torch takes two to three. A provider file therefore writes `from rlhf_core.lazy import torch` and uses
it inside functions as usual. Do not use it at module level (base classes, decorators): that would import torch after all.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]


class _LazyModule(ModuleType):
    """A module that is imported when one of its attributes is first read."""

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)  # the next read does not come here
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _LazyModule("torch")
