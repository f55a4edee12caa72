"""Runs whose roles and engine take turns on a device give the numbers of runs whose roles all stay there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Run, loop, make_config
from rlhf_core.contract.memory import RoleMemory
from rlhf_core.contract.options import Lora, Sampling, TrainedOptions
from rlhf_core.data.json import Json
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.launcher import sharing
from rlhf_core.launcher.local import Local
from rlhf_core.launcher.residents import GIB, Residents
from rlhf_core.rollout.fake import FakeEngine, FakeRollout
from rlhf_core.strategy.fake import FakeStrategy
from rlhf_core.strategy.torch import TorchTrainable
from rlhf_core.training.local_role import LocalRole

WORK = 2**20
"""bytes that each call is said to take, so that no model is traced for a forecast here"""


def config(folder: Path, algorithm: str = "sft", **changes: Any) -> Any:
    """A run of two small steps."""
    given: dict[str, Any] = {
        "model": "tiny",
        "batch_size": 2,
        "steps": 2,
        "seed": 3,
        "minibatches": 1,
        "output": str(folder),
        "report": False,
    }
    if algorithm == "sft":
        rows = folder.parent / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{n}", "completion": f"{n + 1}"}) + "\n" for n in range(4)))
        given["data"] = Json(str(rows))
    else:
        given |= {"reward": "length", "sampling": Sampling(n=2, max_new_tokens=3)}
    return make_config(algorithm, **given | changes)


def numbers(run: Run) -> list[dict[str, float]]:
    """The metrics of each step that are computed, not measured."""
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    measured = ("time/", "speed/", "memory/", "sleep/")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stated forecast: 1 MiB of work, and what a role of `tiny` holds after its first step."""

    def expected(plan: Any, budget: int, ranks: int) -> dict[str, RoleMemory]:
        held = {name: 1_400_000 if spec.trained else 470_000 for name, spec in plan.roles.items()}
        owned = {name: 0 if plan.base_owner(name) else size for name, size in held.items()}
        return {name: RoleMemory(weights=size, inference=WORK, activations=WORK) for name, size in owned.items()}

    monkeypatch.setattr(sharing, "expected_memory", expected)


BUDGET = (1_400_000 + WORK + 100_000) / GIB
"""room for one role at work, and for no second one"""


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the number of times that models left the device."""
    counted: Counter[str] = Counter()
    offload = TorchTrainable.offload

    def counting(self: TorchTrainable) -> None:
        counted["offload"] += 1
        offload(self)

    monkeypatch.setattr(TorchTrainable, "offload", counting)
    taken = Residents.taken_bytes.fget
    make_room = Residents.make_room

    def checked(self: Residents, *given: Any) -> None:
        make_room(self, *given)
        assert taken is not None
        assert taken(self) + given[0] <= self.budget

    monkeypatch.setattr(Residents, "make_room", checked)
    return counted


@pytest.mark.parametrize("algorithm", ["sft", "ppo", "grpo", "repulse"])
def test_turns_change_no_number(tmp_path: Path, algorithm: str, small: None, moves: Counter[str]) -> None:
    pytest.importorskip("rlhf_algos")
    apart = Run(config(tmp_path / "all", algorithm))
    apart.train()
    assert not moves
    shared = Run(config(tmp_path / "turns", algorithm, launcher=Local(share_memory="on", share_gib=BUDGET)))
    shared.train()
    assert numbers(shared) == numbers(apart)
    assert (moves["offload"] > 2) is (len(shared.plan.roles) > 1)
    files = [run.output / "model" / "model.safetensors" for run in (apart, shared)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_base_an_average_and_a_checkpoint_sleep_and_resume(tmp_path: Path, small: None, moves: Counter[str]) -> None:
    """The reference is the actor's base, so they wake together; a run that stops while others sleep goes on the same."""
    pytest.importorskip("rlhf_algos")
    options = {
        "actor": TrainedOptions(model="tiny", lora=Lora(rank=2), ema=0.9),
        "launcher": Local(share_memory="on", share_gib=BUDGET),
    }
    whole = Run(config(tmp_path / "whole", "ppo", **options | {"launcher": Local()}))
    whole.train()
    Run(config(tmp_path / "parts", "ppo", **options | {"steps": 1})).train()
    resumed = Run(config(tmp_path / "parts", "ppo", **options, resume=True))
    resumed.train()
    assert moves["offload"]
    assert numbers(resumed) == numbers(whole)
    for name in ("model", "model-ema"):
        files = [next((run.output / name).glob("*.safetensors")) for run in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_what_cannot_be_shared_is_refused_in_one_line_before_a_model_is_loaded(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rlhf_algos")
    monkeypatch.setattr("rlhf_core.training.local_role.LocalRole.__init__", None)
    refused = {
        Local(share_memory="on"): (
            OptionError,
            "share_memory.*on: there is no memory limit on CPUs; pass .*share_gib",
        ),
        Local(share_memory="on", share_gib=1e-3): (
            UsageError,
            "the forecast for the actor alone is .* but the limit is 0.001",
        ),
    }
    for launcher, (kind, message) in refused.items():
        run = Run(config(tmp_path / "x", "grpo", launcher=launcher))
        with pytest.raises(kind, match=message), run.open():
            pytest.fail("it was opened")
    with pytest.raises(UsageError, match="share_gib"):
        Local(share_gib=-1.0)


def test_turns_are_taken_by_themselves_only_where_a_gpu_is_too_small(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rlhf_algos")
    plan = Run(config(tmp_path / "x", "ppo")).plan
    names = list(plan.roles)
    for device, expected in ((0, False), (GIB, False), (3_000_000, True)):
        found = sharing.plan_sharing(Local(), plan, device, 1, names, False)
        assert (found is not None) is expected, device
    assert sharing.plan_sharing(Local(share_memory="off"), plan, 3_000_000, 1, names, False) is None


@pytest.mark.parametrize(
    ("engine", "copies", "expected"),
    [
        pytest.param(False, False, {"actor": (30, 7), "critic": (20, 5)}, id="samples in the role's process"),
        pytest.param(
            True, False, {"actor": (30, 5), "critic": (20, 5), "rollout engine": (7, 0)}, id="says all that it holds"
        ),
        pytest.param(
            True, True, {"actor": (30, 5), "critic": (20, 5), "rollout engine": (17, 0)}, id="copies the weights"
        ),
    ],
)
def test_an_engine_in_a_process_of_its_own_is_counted_with_the_weights_it_copies(
    engine: bool, copies: bool, expected: dict[str, tuple[int, int]]
) -> None:
    memory = {
        "actor": RoleMemory(weights=10, optimizer=20, activations=5, inference=2, cache=7),
        "critic": RoleMemory(weights=20, activations=5),
    }
    assert sharing._needs(memory, list(memory), engine, copies) == expected


def test_an_engine_with_its_own_weights_sleeps_while_roles_train_and_wakes_in_two_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan 8.5 GiB with an engine of 4 + 2 and roles of 4 each: a role fits with the weights, but not with the cache too."""
    pytest.importorskip("rlhf_algos")
    sizes = {"weights": 4, "cache": 2}
    held: dict[str, int] = {}
    events: list[str] = []

    def note(kind: str, method: str, names: Callable[[Any, str], list[str]]) -> None:
        owner = {"role": LocalRole, "engine": FakeEngine}[kind]
        real = getattr(owner, method)

        def noted(self: Any, what: Any = "all") -> int:
            for name in names(self, what):
                if method == "sleep":
                    held.pop(name, None)
                else:
                    held[name] = sizes.get(name, 4)
                    assert sum(held.values()) <= 8.5, f"{name} came to {held}"
            events.append(f"{method} {self.name if kind == 'role' else what}")
            freed: int = real(self, *([what] if kind == "engine" else []))
            return freed

        monkeypatch.setattr(owner, method, noted)

    note("role", "sleep", lambda role, _: [role.name])
    note("role", "wake", lambda role, _: [role.name])
    note("engine", "sleep", lambda *_: ["weights", "cache"])
    note("engine", "wake", lambda _, part: [part])
    expected = RoleMemory(weights=4 * GIB, cache=6 * GIB)
    monkeypatch.setattr(sharing, "expected_memory", lambda plan, *_: dict.fromkeys(plan.roles, expected))
    run = Run(
        config(
            tmp_path / "run",
            "grpo",
            strategy=FakeStrategy(gib=4.0),
            rollout=FakeRollout(weights_gib=4.0, cache_gib=2.0),
            launcher=Local(share_memory="on", share_gib=8.5),
            steps=3,
        )
    )
    with run.open():
        loop.train(run)
    assert events.index("wake weights") < events.index("wake cache")
    second = events[events.index("wake cache") + 1 :]
    assert "sleep 2" in second, "its weights come with the update that follows training"
    assert all(row["staleness/actor"] == 0 for row in numbers(run) if "staleness/actor" in row)
