"""The rollout `vllm`: samples with vLLM: in process, in a process of its own, or in Ray.

Only the name is here yet, so that `rlhf-run plugins` lists it; choosing it says what is missing. The capability comes
with a later version.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

from rlhf_core.errors import MissingPackage, UsageError

__all__ = ["VLLM"]


@dataclass(frozen=True)
class VLLM:
    """Samples with vLLM."""

    def __call__(self, *args: Any) -> NoReturn:
        """Say what is missing.

        Raises:
            UsageError: always; the message says what to do.
        """
        if find_spec("vllm") is None:
            raise MissingPackage(
                "rollout 'vllm' needs vllm: python3 -m pip install 'rlhf-rollout-vllm[cuda]' (or '[cpu]')"
            )
        raise UsageError("rollout 'vllm' is announced but not part of version 0.1.0; leave --rollout out")
