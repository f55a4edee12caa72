"""The evaluator `gcg`: attacks a policy with GCG and counts how often it succeeds.

Only the name is here yet, so that `rlhf-run plugins` lists it; choosing it says what is missing. The capability comes
with a later version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError

__all__ = ["GCG"]


@dataclass(frozen=True)
class GCG(Evaluator):
    """Attacks the policy with GCG suffixes (Zou et al. 2023, arXiv:2307.15043, algorithm 1)."""

    def __call__(self, *args: Any) -> NoReturn:
        """Say what is missing.

        Raises:
            UsageError: always; the message says what to do.
        """
        raise UsageError("evaluator 'gcg' is announced but not part of version 0.1.0; remove the evaluator")
