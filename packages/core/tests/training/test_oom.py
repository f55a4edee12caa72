"""Out of memory: `--on-oom halve` repeats the work with fewer tokens at a time, with the same result.

The memory that runs out is planted: a pass over more cells than a limit raises what CUDA raises. A run whose budget was the
smaller one from the beginning is the truth: the same weights, bit for bit, if no gradient counts twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import RunConfig
from rlhf_core.errors import RunStopped, UsageError
from rlhf_core.strategy.torch import TorchTrainable
from rlhf_core.testing import tiny_run

OPTIONS: dict[str, Any] = {"model": "tiny:hidden=16,layers=1", "steps": 2, "batch_size": 4, "micro_tokens": 1000}


def cells(batch: Batch) -> int:
    return len(batch) * int((batch.prompt_lengths_N + batch.lengths_N).max())


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No pass over more than 150 cells, in the forward or only in the backward; what failed."""
    failed: list[str] = []
    forward, backward = TorchTrainable.forward, TorchTrainable.backward
    sizes: list[int] = []

    def small_forward(self: TorchTrainable, batch: Batch, names: frozenset[str]) -> dict[str, torch.Tensor]:
        outputs = forward(self, batch, names)
        sizes.append(cells(batch))
        return outputs

    def small_backward(self: TorchTrainable, loss: torch.Tensor) -> None:
        backward(self, loss)  # as where memory runs out half way: some gradients are there already
        if sizes[-1] > 150:
            failed.append(f"backward {sizes[-1]}")
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of …"
            )

    monkeypatch.setattr(TorchTrainable, "forward", small_forward)
    monkeypatch.setattr(TorchTrainable, "backward", small_backward)
    return failed


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what the machine decides."""
    return {name: value for name, value in row.items() if name.partition("/")[0] not in ("time", "speed", "memory")}


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def test_a_step_is_done_again_from_clean_gradients_with_half_the_tokens(
    limited: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(tmp_path / "halved", on_oom="halve", **OPTIONS).train()
    rows = [json.loads(line) for line in (tmp_path / "halved" / "metrics.jsonl").read_text().splitlines()]
    budget = int(rows[-1]["micro_tokens/actor"])
    failures = len(limited)
    assert failures and budget == int(limited[-1].split()[1]) // 2
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(said) == failures
    assert said[-1].endswith(f"continues with {budget} (micro_tokens={budget} would start there)")
    tiny_run(tmp_path / "small", **{**OPTIONS, "micro_tokens": budget}).train()
    assert len(limited) == failures, "half was small enough"
    assert weights(tmp_path / "halved") == weights(tmp_path / "small")
    small = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(rows, small, strict=True):
        assert one.pop("micro_tokens/actor") == budget
        assert comparable(one) == comparable(other), "what was measured before memory ran out does not count either"


def test_memory_that_runs_out_after_some_micro_batches_takes_their_gradients_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = TorchTrainable.backward, list[int]()

    def second_fails(self: TorchTrainable, loss: torch.Tensor) -> None:
        backward(self, loss)
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainable, "backward", second_fails)
        tiny_run(tmp_path / "halved", on_oom="halve", **{**OPTIONS, "micro_tokens": 200, "steps": 1}).train()
    (row,) = [json.loads(line) for line in (tmp_path / "halved" / "metrics.jsonl").read_text().splitlines()]
    assert len(calls) > 4
    budget = int(row["micro_tokens/actor"])
    tiny_run(tmp_path / "small", **{**OPTIONS, "micro_tokens": budget, "steps": 1}).train()
    assert weights(tmp_path / "halved") == weights(tmp_path / "small")


def test_inference_is_done_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_core.testing import tiny_rollouts
    from rlhf_core.training.local_role import LocalRole

    batch, names = tiny_rollouts(), frozenset({"logprobs_NT"})
    role = LocalRole(tiny_run(tmp_path, on_oom="halve", **OPTIONS).plan, "actor")
    expected = role.infer(batch, names)["logprobs_NT"]
    forward = TorchTrainable.forward

    def small(self: TorchTrainable, micro: Batch, names: frozenset[str]) -> dict[str, torch.Tensor]:
        if len(micro) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, micro, names)

    monkeypatch.setattr(TorchTrainable, "forward", small)
    assert torch.allclose(role.infer(batch, names)["logprobs_NT"], expected, atol=1e-5)
    assert role.budget.tokens < 1000


def test_what_cannot_be_cut_any_further_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(TorchTrainable, "backward", never)
    with pytest.raises(RunStopped, match=r"out of memory in phase 'train' of step 1 \(it asked for 2.50 GiB more\)"):
        tiny_run(tmp_path, on_oom="halve", **OPTIONS).train()


def test_another_error_is_no_reason_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(TorchTrainable, "backward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tiny_run(tmp_path, on_oom="halve", **OPTIONS).train()
    assert len(calls) == 1


def test_several_ranks_and_strategies_that_cannot_take_a_step_back_say_so(tmp_path: Path) -> None:
    from rlhf_core.contract.distributed import World
    from rlhf_core.training.token_budget import TokenBudget

    class Two(World):
        size = 2

    config: RunConfig = tiny_run(tmp_path, on_oom="halve", **OPTIONS).config
    with pytest.raises(
        UsageError, match='on_oom = "halve" works only in one process, not 2; lower micro_tokens instead'
    ):
        TokenBudget(config, "actor", Two())
    for option, value in (("on_oom", "halve"), ("on_nonfinite", "skip")):
        run = tiny_run(tmp_path, strategy="fake", rollout="fake", **{**OPTIONS, option: value})
        with pytest.raises(UsageError, match=f"strategy 'fake' cannot undo a step; leave out {option}"):
            run.train()
