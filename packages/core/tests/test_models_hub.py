"""A hub that does not answer is asked twice, briefly, and then not again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from rlhf_core.models.hub import offline_if_unreachable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """An online process; the timeouts with which the hub was asked. Nobody answers but to a question of 0 seconds."""
    seconds: list[float] = []

    def head(url: str, timeout: float) -> Any:
        seconds.append(timeout)
        if seconds[0] != 0.0:
            raise OSError("no route to host")
        return SimpleNamespace(status_code=503)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    offline_if_unreachable.cache_clear()
    yield seconds
    offline_if_unreachable.cache_clear()


def test_a_hub_that_does_not_answer_is_given_up_after_one_retry(asked: list[float]) -> None:
    for _ in range(3):
        offline_if_unreachable()
    assert asked == [3.0, 3.0]
    assert constants.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_any_answer_at_all_means_that_it_is_there(asked: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.models.hub.SECONDS", 0.0)
    offline_if_unreachable()
    assert len(asked) == 1
    assert not constants.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
