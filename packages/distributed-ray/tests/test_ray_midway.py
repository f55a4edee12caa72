"""Weights that reach engines under Ray in the middle of a call (`--partial.midway`), planted at the fourth token of each.

A trainer that waited for the end of a call would wait forever here: the call ends only when the weights have come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core import Registry, Run, hookimpl  # noqa: E402  after the checks above
from rlhf_core.config.builder import parse  # noqa: E402
from rlhf_core.training.local_role import LocalRole  # noqa: E402

AT = 3  # as in `ray_planted`
STEPS, SECONDS = 4, 120.0
SAMPLED = (
    f"grpo --data prompts --reward length --batch-size 4 --steps {STEPS} --sampling.n 2 --sampling.max-new-tokens 10"
)
JOB = f"{SAMPLED} --ahead 1 --partial.midway True --launcher ray --launcher.cpus 0.1 --launcher.engines 2"
TRAINED = " --model tiny --actor.optim.lr 3e-2 --algorithm.kl.coef 0"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find `ray_planted` in the folder in which the run is started."""
    monkeypatch.chdir(Path(__file__).parent)


class Watch:
    """Holds the update of a step until the engines are in the middle of the next step's call; keeps weights and batches."""

    def __init__(self, folder: Path, engines: int) -> None:
        self.folder, self.engines = folder, engines
        self.weights: list[list[tuple[str, Any]]] = []
        self.batches: list[Any] = []

    @hookimpl
    def rlhf_run_start(self, run: Run) -> None:
        self.weights.append(list(run.roles["actor"].weights()))

    @hookimpl
    def rlhf_before_update(self, run: Run) -> None:
        step = run.step + 1
        if run.config.ahead and step < STEPS:  # the next call begins with the weights of the step before this one
            ends = time.monotonic() + SECONDS
            while len(list(self.folder.glob(f"inside-{step - 1}-*"))) < self.engines:
                assert time.monotonic() < ends, "no call began"
                time.sleep(0.005)

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        self.weights.append(list(run.roles["actor"].weights()))
        self.batches += run.samples.values()


def train(words: str, folder: Path, engines: int = 2) -> tuple[Run, Watch, list[dict[str, Any]]]:
    """Run it with marks in `folder`; the run, its weights and batches, and the lines of metrics.jsonl."""
    registry, watch = Registry(), Watch(folder, engines)
    registry.register(watch, name="watch")
    words = f"{words} --rollout.folder {folder} --output {folder / 'run'}"
    run = Run(parse(words.split(), registry), registry)
    run.train()
    return run, watch, [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def planted(step: int, length: int) -> list[int]:
    """Versions of a completion's tokens: the call of step s begins with the weights of step s - 2."""
    return [max(0, step - 2) if t < AT else step - 1 for t in range(length)]


def assert_probabilities(run: Run, watch: Watch, atol: float = 1e-4) -> None:
    """Compare log-probabilities with transformers', token by token, by the weights of its version over one cache."""
    role, moved = LocalRole(run.plan, "actor", frozen=True), 0.0
    for batch in watch.batches:
        for i, length in enumerate(batch.lengths_N.tolist()):
            prompt = batch.prompt_NL[i, : int(batch.prompt_lengths_N[i])].tolist()
            tokens, versions = batch.tokens_NT[i, :length].tolist(), batch["versions_NT"][i, :length].tolist()
            found_T = batch["sampler_logprobs_NT"][i, :length]
            torch.testing.assert_close(found_T, logprobs(role, watch, prompt, tokens, versions), rtol=0, atol=atol)
            if len(set(versions)) > 1:
                stale_T = logprobs(role, watch, prompt, tokens, [versions[0]] * length)
                moved = max(moved, float((stale_T - found_T).abs().max()))
    assert moved > 0.1, "the weights before the update would have given other log-probabilities"


def logprobs(role: LocalRole, watch: Watch, prompt: list[int], tokens: list[int], versions: list[int]) -> torch.Tensor:
    """(T,), of transformers."""
    cache, ids, found, loaded = None, prompt, list[torch.Tensor](), -1
    for token, version in zip(tokens, versions, strict=True):
        if version != loaded:
            role.load_weights(watch.weights[version])
            loaded = version
        with torch.no_grad():
            output = role.causal_lm(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        found.append(output.logits[0, -1].log_softmax(-1)[token])
        cache, ids = output.past_key_values, [token]
    return torch.stack(found)


def uids(watch: Watch) -> list[list[int]]:
    return [batch["uids_N"].tolist() for batch in watch.batches]


SHARDED = pytest.param(
    "--strategy deepspeed --strategy.stage 3",
    marks=[pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed beside ray")],
    id="stage 3",
)


@pytest.mark.parametrize("strategy", [pytest.param("", id="torch"), SHARDED])
def test_every_token_has_the_weights_that_sampled_it(strategy: str, tmp_path: Path) -> None:
    """Two engines, two ranks of the trainer."""
    words = f"{JOB} {TRAINED} --rollout ray_planted:Planted --launcher.workers 2 {strategy}"
    run, watch, rows = train(words, tmp_path)
    for step, batch in enumerate(watch.batches, 1):
        lengths = batch.lengths_N.tolist()
        assert [batch["versions_NT"][i, :length].tolist() for i, length in enumerate(lengths)] == [
            planted(step, length) for length in lengths
        ]
        assert max(lengths) > AT
    assert_probabilities(run, watch)
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1]
    assert {row["sync/controller_calls"] for row in rows} == {2 + 2}
    assert sum(row["recovered/engine"] for row in rows) == 0


def test_an_engine_that_dies_with_weights_that_it_has_not_taken_samples_again_under_them(tmp_path: Path) -> None:
    """One of two engines dies by SIGKILL in the call of step 3, whose update is there and waits for its forward pass."""
    run, watch, rows = train(f"{JOB} {TRAINED} --rollout ray_planted:Planted --rollout.dies-at 1", tmp_path)
    assert (tmp_path / "died").exists()
    assert sum(row["recovered/engine"] for row in rows) == 1
    third = watch.batches[2]
    found = {tuple(third["versions_NT"][i, :length].tolist()) for i, length in enumerate(third.lengths_N.tolist())}
    again = {versions for versions in found if set(versions) == {2}}
    assert again and found - again <= {tuple(planted(3, length)) for length in range(1, 11)}
    assert_probabilities(run, watch)
    assert max(row["rollout/staleness_max"] for row in rows) <= 1
    undisturbed = Watch(tmp_path, engines=2)
    registry = Registry()
    registry.register(undisturbed, name="watch")
    Run(parse(f"{SAMPLED} {TRAINED} --output {tmp_path / 'local'}".split(), registry), registry).train()
    assert uids(watch) == uids(undisturbed), "no prompt is lost, and none is trained on twice"


def test_the_fake_engine_takes_its_number_in_the_middle_of_a_call(tmp_path: Path) -> None:
    words = f"{JOB} --model tiny --strategy fake --actor.optim.lr 0.5 --rollout ray_planted:PlantedFake"
    _, watch, _ = train(f"{words} --rollout.token-seconds 1", tmp_path)
    w = [float(dict(weights)["w"]) for weights in watch.weights]
    assert len(set(w)) == STEPS + 1
    for step, batch in enumerate(watch.batches, 1):
        for i, length in enumerate(batch.lengths_N.tolist()):
            versions = planted(step, length)
            assert batch["versions_NT"][i, :length].tolist() == versions
            letters = batch.tokens_NT[i, :length].tolist()
            expected = [w[version] - 1 - token % 7 for version, token in zip(versions, letters, strict=True)]
            assert batch["sampler_logprobs_NT"][i, :length].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm beside ray")
def test_vllm_in_a_process_of_its_own_takes_weights_in_the_middle_of_a_call(tmp_path: Path) -> None:
    words = f"{JOB} {TRAINED} --sampling.max-new-tokens 200 --launcher.engines 1 --rollout ray_planted_vllm:Planted"
    words += f" --rollout.process own --rollout.kv-cache-gib 0.25 --rollout.max-num-seqs 16 --rollout.last {STEPS}"
    run, watch, rows = train(words, tmp_path, engines=1)
    mixed = 0
    for step, batch in enumerate(watch.batches, 1):
        for i, length in enumerate(batch.lengths_N.tolist()):
            versions = batch["versions_NT"][i, :length].tolist()
            assert versions == sorted(versions)
            assert set(versions) <= {max(0, step - 2), step - 1}
            mixed += len(set(versions)) > 1
    assert mixed >= 8, "weights came in the middle of completions"
    assert max(row["rollout/staleness_max"] for row in rows) == 1
    assert_probabilities(run, watch, atol=1e-3)
