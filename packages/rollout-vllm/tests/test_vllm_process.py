"""Choice of an engine's GPU and its limits on a shared one, tested without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_core.errors import UsageError
from rlhf_rollout_vllm import in_process, process_state
from rlhf_rollout_vllm.engine import VLLM
from rlhf_rollout_vllm.in_process import InProcess
from rlhf_rollout_vllm.session import Engine


@pytest.mark.parametrize(("ranks", "executor"), [("", None), ("1", None), ("2", "external_launcher")])
def test_ranks_of_a_launcher_have_engines_on_gpus_of_their_own(
    ranks: str, executor: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's other executor puts every engine on the first GPU."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    assert in_process._external_launcher() == executor


def test_the_trainers_gpu_is_the_current_one_again_whatever_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    with pytest.raises(ZeroDivisionError), process_state.preserve_process_state():
        torch.cuda.set_device(0)
        raise ZeroDivisionError
    assert current == [3]


class Sleeper(InProcess):
    """An engine that has vLLM's part written down instead of called."""

    def __init__(self) -> None:
        self.options = VLLM(enable_sleep=True)
        self.has_weights = False
        self._sleeps, self._asleep = True, frozenset()
        self.calls: list[str] = []
        self.llm: Any = _Recorder(self.calls)


class _Recorder:
    """Writes down what is called, with the tags and the level that it is given."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        return lambda *_, level="", tags=(): self.calls.append(" ".join([name, *tags, str(level)]).strip())


def test_an_engine_that_sleeps_wakes_its_weights_to_take_new_ones_and_its_cache_later() -> None:
    engine, host = Engine.__new__(Engine), Sleeper()
    engine.host, engine.adapters, engine.version, engine.updates = host, None, None, 0

    class Role:
        version = 1

        def weights(self) -> Any:
            return iter(())

    engine.update(Role())  # type: ignore[arg-type]
    assert "wake_up" not in host.calls
    host.calls.clear()
    engine.sleep()
    engine.sleep()
    engine.update(Role())  # type: ignore[arg-type]
    assert host.calls[:3] == ["sleep 1", "wake_up weights", "start_weight_update"]
    assert engine.version == 1
    host.calls.clear()
    engine.wake()
    engine.wake()
    assert host.calls == ["wake_up kv_cache"]
    host.calls.clear()
    engine.sleep(2)
    assert engine.version is None, "dropped weights must come again"
    engine.wake()
    assert host.calls == ["sleep 2", "wake_up weights kv_cache"]


@pytest.mark.vllm
def test_a_second_engine_that_would_sleep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM ends in an assertion there."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(in_process._groups, "users", 1)
    with pytest.raises(UsageError, match=r"enable_sleep.* works only in runs that sample one role, .*; leave it out$"):
        Sleeper()._open("unread", "float32", trust_remote_code=False)
