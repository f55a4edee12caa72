"""A run whose weights arrive in the middle of completions (`--partial.midway`), against transformers with the same cache."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from background_sampling import wait_until
from version_spans import span_logprobs

from rlhf_core import Registry, Run, hookimpl
from rlhf_core.testing import tiny_run
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines
from rlhf_rollout_vllm.own_process import OwnProcess

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STEPS, SECONDS, TEMPERATURE = 3, 300.0, 0.7
ROWS = 8


class Plan:
    """Makes the weights of each step but the last arrive in the middle of the next step's call."""

    def __init__(self) -> None:
        self.inside = [threading.Event() for _ in range(STEPS)]
        self.go = [threading.Event() for _ in range(STEPS)]
        self.go[0].set()
        self.calls = 0
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.batches: list[Any] = []
        self.paused: list[float] = []

    def generate(self, host: OwnProcess, prompts: Any, *rest: Any) -> list[Any]:
        """Sample a step's completions once its weights are due; other requests compare weights."""
        if len(prompts) == ROWS:
            step, self.calls = self.calls, self.calls + 1
            self.inside[step].set()
            assert self.go[step].wait(SECONDS)
        return self.sample(host, prompts, *rest)

    def sync(self, engines: VLLMEngines, role: Any) -> Any:
        """Bring weights while the next step's call samples."""
        step = len(self.paused) + 1
        if step < STEPS:
            self.go[step].set()
            host: Any = engines.engines[role.name].host
            wait_until(lambda: host._waiting > 0)
            time.sleep(0.1)
        metrics = self.bring(engines, role)
        self.paused.append(metrics["sync/calls"])
        return metrics

    @hookimpl
    def rlhf_before_update(self, run: Run) -> None:
        self.keep(run)
        if run.step + 1 < STEPS:
            assert self.inside[run.step + 1].wait(SECONDS)

    @hookimpl
    def rlhf_step_end(self, run: Run) -> None:
        self.keep(run)
        self.batches += run.samples.values()
        if run.step == STEPS:
            run.roles["actor"].export(str(run.output / "exported"))

    def keep(self, run: Run) -> None:
        role = run.roles["actor"]
        if role.version not in self.weights:
            self.weights[role.version] = {name: tensor.detach().clone() for name, tensor in role.weights()}


def test_tokens_after_an_update_in_a_call_are_those_of_the_new_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    plan, registry = Plan(), Registry()
    registry.register(plan, name="plan")
    plan.sample, plan.bring = OwnProcess.generate, VLLMEngines.sync  # type: ignore[attr-defined]
    monkeypatch.setattr(OwnProcess, "generate", lambda *each: plan.generate(*each))
    monkeypatch.setattr(VLLMEngines, "sync", lambda *each: plan.sync(*each))
    tiny_run(
        tmp_path / "run",
        registry=registry,
        rollout=VLLM(process="own", kv_cache_gib=0.25, max_num_seqs=16),
        sampling={"n": 4, "max_new_tokens": 200, "temperature": TEMPERATURE},
        actor={"optim": {"lr": 0.02}},
        ahead=1,
        partial={"midway": True},
        steps=STEPS,
        batch_size=2,
    ).train()
    assert plan.calls == STEPS
    assert "log-probabilities of the rollout engine differ" not in caplog.text, (
        "nothing is compared over an older cache"
    )
    assert plan.paused == [5, 5, 3], "two updates paused a call, and the last one came when nothing was sampled"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "exported", dtype=torch.float32).eval()
    mixed, moved = 0, 0.0
    for step, batch in enumerate(plan.batches):
        for i, length in enumerate(batch.lengths_N.tolist()):
            prompt = batch.prompt_NL[i, : int(batch.prompt_lengths_N[i])].tolist()
            tokens, versions = (each[i, :length].tolist() for each in (batch.tokens_NT, batch["versions_NT"]))
            assert versions == sorted(versions)
            assert set(versions) <= {max(0, step - 1), step}
            found_T = batch["sampler_logprobs_NT"][i, :length]
            expected_T = span_logprobs(model, plan.weights, prompt, tokens, versions, TEMPERATURE)
            torch.testing.assert_close(found_T, expected_T, rtol=0, atol=1e-3)
            if len(set(versions)) > 1:
                mixed += 1
                stale_T = span_logprobs(model, plan.weights, prompt, tokens, [versions[0]] * length, TEMPERATURE)
                moved = max(moved, float((stale_T - found_T).abs().max()))
    assert mixed >= 4
    assert moved > 0.1, "the weights before the update would have given other log-probabilities"
