"""Whether the hub answers, asked once and briefly: its library would try for half a minute before it says that nobody does."""

from __future__ import annotations

import os
from functools import cache

__all__ = ["offline_if_unreachable"]

SECONDS = 3.0
"""for one try, of two"""


@cache
def offline_if_unreachable() -> None:
    """Ask the hub for its first page; if nobody answers, be offline from here on: only what is cached is found then."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented there, not listed

    if constants.is_offline_mode():
        return
    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            return
        except Exception:  # noqa: S112  # of whatever HTTP library the hub's uses; any answer at all is no exception
            continue
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later, and for workers
