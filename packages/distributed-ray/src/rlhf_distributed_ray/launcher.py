"""The launcher `ray`: places roles and rollout engines on a Ray cluster.

Only the name is here yet, so that `rlhf-run plugins` lists it; choosing it says what is missing. The capability comes
with a later version.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

from rlhf_core.errors import MissingPackage, UsageError

__all__ = ["RayLauncher"]


@dataclass(frozen=True)
class RayLauncher:
    """Places roles on a Ray cluster."""

    def __call__(self, *args: Any) -> NoReturn:
        """Say what is missing.

        Raises:
            UsageError: always; the message says what to do.
        """
        if find_spec("ray") is None:
            raise MissingPackage("launcher 'ray' needs ray: python3 -m pip install 'rlhf-distributed-ray[ray]'")
        raise UsageError("launcher 'ray' is announced but not part of version 0.1.0; leave --launcher out")
