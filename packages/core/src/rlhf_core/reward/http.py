"""Requests to servers over HTTP, with replicas, retries, and a token.

Replicas are asked in turn. One that does not answer is left alone for a while and its question goes to the next, so that
a dead replica costs one failed connection and no reward. `rlhf_core.util.http` bounds an answer by time and by size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from rlhf_core.errors import OptionError
from rlhf_core.util.http import FAILURES, Refusal, ask_server, is_address

__all__ = ["Replicas"]

LEAVE_ALONE = 30.0
"""Seconds before a replica that failed is asked again, while others answer."""
LONGEST_WAIT = 30.0
"""Seconds between two tries at most."""


class Replicas:
    """Servers that answer the same questions; safe to ask from several threads.

    Args:
        urls: full addresses.
        token: sent as a bearer token, if any.
        timeout: seconds for one answer, from the connection to its last byte.
        tries: how often all of them may fail one question.
        backoff: seconds before the second try, doubled for each further one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str = "",
        timeout: float = 180,
        tries: int = 5,
        backoff: float = 1,
    ) -> None:
        for url in urls:
            if not is_address(url):
                raise OptionError("url", f"{url}: expected an address such as http://127.0.0.1:5000/get_reward")
        if not urls:
            raise OptionError("url", "needs at least one address")
        self._urls, self._token = list(urls), token
        self._timeout, self._tries, self._backoff = timeout, tries, backoff
        self._lock = threading.Lock()
        self._next = 0
        self._failed_at = dict.fromkeys(self._urls, -LEAVE_ALONE)

    def ask(self, question: Any) -> Any:
        """The JSON answer of one of them.

        Raises:
            UsageError: a server refused the question, or none answered.
        """
        reasons: dict[str, str] = {}
        for attempt in range(self._tries):
            if attempt:
                time.sleep(min(self._backoff * 2 ** (attempt - 1), LONGEST_WAIT))
            for url in self._in_turn():
                try:
                    return ask_server(url, question, self._token, self._timeout)
                except FAILURES as error:
                    if isinstance(error, Refusal) and error.is_final:
                        raise OptionError("url", f": {url} refused: {error}") from None
                    reasons[url] = f"{error}"
                    with self._lock:
                        self._failed_at[url] = time.monotonic()
        told = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        raise OptionError("url", f": no server answered in {self._tries} tries: {told}")

    def _in_turn(self) -> list[str]:
        """All of them, beginning with the next; those that failed lately come last."""
        with self._lock:
            start, self._next = self._next, (self._next + 1) % len(self._urls)
            turned = self._urls[start:] + self._urls[:start]
            lately = time.monotonic() - LEAVE_ALONE
            return sorted(turned, key=lambda url: self._failed_at[url] > lately)
