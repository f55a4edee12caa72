"""Optimizers that read features or curvature are refused in one line, at every stage, before a model is built."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_core import Run, UsageError, make_config

pytest.importorskip("rlhf_algos", reason="runs estimators of rlhf-algos")
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("use", "freeze", "name"),
    [("omd", ["body"], "OMD"), ("mle", ["body"], "MLE"), ("omd_memoryless", [], "OMDMemoryless")],
)
def test_one_pass_estimators_are_refused_at_every_stage(
    use: str, freeze: list[str], name: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.training.local_role._build", lambda *_, **__: pytest.fail("a model was built"))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n" for _ in range(16)))
    config = make_config(
        "reward",
        model="tiny",
        data={"use": "json", "path": str(pairs)},
        reward={"freeze": freeze, "optim": {"use": use}},
        strategy={"use": "deepspeed", "stage": stage},
        output=str(tmp_path / "run"),
    )
    expected = rf"optimizer {name} needs more than the gradient .* strategy deepspeed does not provide; use strategy"
    with pytest.raises(UsageError, match=expected) as error:
        Run(config).train()
    assert "\n" not in str(error.value)
