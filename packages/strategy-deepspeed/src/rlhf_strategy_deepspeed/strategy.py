"""The strategy `deepspeed`: trains a role with DeepSpeed: ZeRO 0 to 3, offload, sequence and tensor parallelism.

Only the name is here yet, so that `rlhf-run plugins` lists it; choosing it says what is missing. The capability comes
with a later version.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

from rlhf_core.errors import MissingPackage, UsageError

__all__ = ["DeepSpeed"]


@dataclass(frozen=True)
class DeepSpeed:
    """Trains a role with DeepSpeed ZeRO."""

    def __call__(self, *args: Any) -> NoReturn:
        """Say what is missing.

        Raises:
            UsageError: always; the message says what to do.
        """
        if find_spec("deepspeed") is None:
            raise MissingPackage(
                "strategy 'deepspeed' needs deepspeed: python3 -m pip install 'rlhf-strategy-deepspeed[deepspeed]'"
            )
        raise UsageError("strategy 'deepspeed' is announced but not part of version 0.1.0; leave --strategy out")
