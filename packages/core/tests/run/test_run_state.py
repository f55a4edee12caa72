"""Round trip of `RunState` through JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.contract.options import KL
from rlhf_core.run.state import RunState
from rlhf_core.testing import tiny_run
from rlhf_core.training.kl import KLController
from rlhf_core.training.running_moments import Moments


def test_a_state_comes_back_from_json_as_it_was() -> None:
    state = RunState(KLController(KL(coef=0.1, target=0.5)))
    assert state.kl is not None
    state.kl.update(2.0, 100)  # the error is cut at 0.2: 0.1 * (1 + 0.2 * 100 / horizon)
    assert state.kl_coef == 0.1 * (1 + 0.2 * 100 / state.kl.kl.horizon)
    state.step, state.stream = 3, {"epoch": 1, "row": 5}
    state.moments = {"actor": Moments(4.0, 0.1, 0.3)}
    state.versions = {"actor": 6}
    state.evaluations = [(0, {"eval/x": 0.25}), (2, {"eval/x": 1 / 3})]
    state.last_metrics = {"step": 3, "reward/mean": 0.7}
    again = RunState(KLController(KL(coef=0.1, target=0.5)))
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.kl is not None and again.kl.coef == state.kl.coef
    assert again.moments["actor"].state() == (4.0, 0.1, 0.3)
    for name in ("step", "stream", "versions", "evaluations", "last_metrics"):
        assert getattr(again, name) == getattr(state, name), name


def test_a_checkpoint_holds_the_state_after_its_step(tmp_path: Path) -> None:
    """Two steps of two rows each have read four rows; the actor has taken two optimizer steps."""
    run = tiny_run(tmp_path, model="tiny:hidden=16,layers=1")
    run.train()
    saved = json.loads((tmp_path / "checkpoints" / "step-2" / "state.json").read_text())
    assert saved == json.loads(json.dumps(run.state.state_dict())) | {"strategy": "torch", "by_parameter": True}
    assert (saved["step"], saved["stream"]["row"], saved["versions"]) == (2, 4, {"actor": 2})
