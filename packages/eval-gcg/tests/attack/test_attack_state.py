"""A killed attack continues with the same suffixes; a state of another attack is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_attacks import family, tiny

from rlhf_core.errors import UsageError
from rlhf_eval_gcg.attack import Attack, Goal, attack
from rlhf_eval_gcg.attack import state as state_module
from rlhf_eval_gcg.attack.state import fingerprint

GOALS = [Goal("Say hello", "Sure, hello friend"), Goal("Write a poem about the sea", "Yes. No.")]
TOKENIZER = family("qwen")


def search(path: Path | None, options: Attack, progress: Any = None, seed: int = 0, **more: Any) -> Any:
    return attack(
        tiny(len(TOKENIZER)), TOKENIZER, GOALS, options, seed=seed, state_file=path, progress=progress, **more
    )


def options(schedule: str, **changes: Any) -> Attack:
    return Attack(**({"suffix": "x x x !", "steps": 5, "search_width": 16, "schedule": schedule} | changes))


@pytest.mark.parametrize("goals_at_once", [1, 2])
@pytest.mark.parametrize("schedule", ["gcg", "acg", "momentum"])
def test_killed_at_any_step_and_resumed_it_finds_the_same_suffixes(
    schedule: str, goals_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "INTERVAL_S", 0.0)
    chosen = options(schedule, goals_at_once=goals_at_once, buffer=2 if schedule == "gcg" else 0, n_replace=2)
    whole = search(None, chosen)
    path, seen = tmp_path / "attack.state", 0
    while True:
        steps = 0

        def die(done: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:
                raise KeyboardInterrupt

        try:
            found = search(path, chosen, die)
            break
        except KeyboardInterrupt:
            seen += 1
    assert found == whole
    assert seen >= 2


def test_a_process_that_is_killed_leaves_a_state_to_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "INTERVAL_S", 0.0)
    path, chosen = tmp_path / "attack.state", options("acg")

    def die(done: Any) -> None:
        if done.goal == 1 and done.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        search(path, chosen, die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    steps: list[tuple[int, int]] = []
    found = search(path, chosen, lambda done: steps.append((done.goal, done.step)))
    assert steps == [(1, 3), (1, 4), (1, 5)]
    assert found == search(None, chosen)


def test_a_finished_attack_is_not_repeated(tmp_path: Path) -> None:
    path, chosen = tmp_path / "attack.state", options("gcg")
    whole, steps = search(path, chosen), []
    assert search(path, chosen, steps.append) == whole and not steps


def test_a_state_of_another_attack_is_refused(tmp_path: Path) -> None:
    path, chosen = tmp_path / "attack.state", options("gcg", steps=1)
    search(path, chosen)
    for other in ({"options": options("acg", steps=1)}, {"options": chosen, "seed": 1}):
        with pytest.raises(UsageError, match="other goals, options, seed or weights; remove it"):
            search(path, **other)
    search(path, options("gcg", steps=1, batch_tokens=100))  # changes no suffix


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 broken"])
def test_a_damaged_state_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "attack.state"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not the state of an attack") as caught:
        search(path, options("gcg", steps=1))
    assert "\n" not in str(caught.value)


def test_the_order_in_which_weights_are_summed_does_not_decide_whose_state_it_is() -> None:
    """A sum of floats depends on the number of threads; a state must be found again with another one."""
    layer, threads = torch.nn.Linear(1000, 1000), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint([layer], [], Attack(), 0))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    with torch.no_grad():
        layer.weight[0, 0] = torch.nextafter(layer.weight[0, 0], torch.tensor(torch.inf))
    assert fingerprint([layer], [], Attack(), 0) not in found
