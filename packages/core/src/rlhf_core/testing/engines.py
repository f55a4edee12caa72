"""Checks of the kinds that hold models or processes: rollout, launcher, evaluator, observer.

Each runs the real thing on the model `tiny` (a Llama of a few thousand random weights) and compares it with core's own,
which are plain enough to be the reference: the same tokens for the same seed, the same gradient whole or in pieces, the
same numbers wherever a role runs. An engine that cannot load `tiny` is tested with its author's own means.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core import loop
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.hooks import OBSERVERS
from rlhf_core.contract.options import Sampling
from rlhf_core.lazy import torch
from rlhf_core.testing.opening import check_opening
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.strategies import COMPARED, assert_close, with_advantages
from rlhf_core.testing.tiny import tiny_rollouts, tiny_run

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.providers import Evaluator, Launcher, Rollout
    from rlhf_core.contract.roles import Role
    from rlhf_core.run.run import Run

__all__ = [
    "check_evaluator",
    "check_launcher",
    "check_observer",
    "check_rollout",
]

SAMPLING = Sampling(n=3, max_new_tokens=6, seed=7)


# ----------------------------------------------------------------------------------------------------------------------
# rollout
# ----------------------------------------------------------------------------------------------------------------------


def check_rollout(
    rollout: Rollout, role: Role | None = None, prompts: Prompts | None = None, atol: float = 1e-3
) -> Rollouts:
    """n adjacent completions per prompt, the same for the same seed whatever else is in the batch, with
    log-probabilities that the role itself computes too.

    Args:
        rollout: the provider; its engine is opened, and closed at the end.
        role: who is sampled; a tiny actor if absent.
        prompts: what is answered; three short ones if absent.
        atol: how far the engine's log-probabilities may be from the role's. 1e-3 is float32 in another order.

    Raises:
        AssertionError: it is not so.
    """
    check_provider(rollout)
    check_opening(rollout)
    name = type(rollout).__qualname__
    role = _tiny_role() if role is None else role
    prompts = _tiny_prompts(role) if prompts is None else prompts
    with open_provider(rollout, "rollout") as engine:
        engine.sync(role)
        first: Rollouts = engine(role, prompts, SAMPLING)
        _check_rollouts(name, first, prompts, SAMPLING)
        versions = set(first["versions_NT"][first.mask_NT].tolist())
        assert versions == {role.version}, f"{name}: versions_NT must be {role.version}, the role's, not {versions}"
        again = engine(role, prompts, SAMPLING)
        assert torch.equal(first.tokens_NT, again.tokens_NT), f"{name} must sample the same tokens for the same seed"
        other = engine(role, prompts, replace(SAMPLING, seed=8))
        assert other.tokens_NT.tolist() != first.tokens_NT.tolist(), f"{name} must sample other tokens for another seed"
        alone = engine(role, prompts.rows([1]), SAMPLING)
        same = [_ids(alone, i) == _ids(first, SAMPLING.n + i) for i in range(SAMPLING.n)]
        assert all(same), (
            f"{name} must sample the same for a prompt whatever else is in the batch: use sampling.seed_for"
        )
        logprobs_NT = role.infer(first, COMPARED)["logprobs_NT"]
        difference = (first["sampler_logprobs_NT"] - logprobs_NT)[first.mask_NT].abs().max()
        assert difference <= atol, (
            f"{name}: sampler_logprobs_NT differ from the role's by {difference:.2g}, above {atol:g}"
        )
        engine.sleep()
        engine.wake()
        woken = engine(role, prompts, SAMPLING)
        assert torch.equal(first.tokens_NT, woken.tokens_NT), f"{name} must sample the same after sleep and wake"
        engine.sleep(2)
        engine.wake("weights")
        engine.sync(role)
        engine.wake("cache")
        woken = engine(role, prompts, SAMPLING)
        assert torch.equal(first.tokens_NT, woken.tokens_NT), (
            f"{name} must sample the same after its weights were dropped"
        )
    return first


def _check_rollouts(name: str, rollouts: Rollouts, prompts: Prompts, sampling: Sampling) -> None:
    """Shapes, types and the things that follow from each other."""
    assert isinstance(rollouts, Rollouts), f"{name} must return Rollouts, not {type(rollouts).__name__}"
    N, T = len(prompts) * sampling.n, rollouts.tokens_NT.shape[1]
    lengths_N = rollouts.lengths_N
    assert len(rollouts) == N, f"{name} gave {len(rollouts)} completions for {len(prompts)} prompts and n={sampling.n}"
    for field in ("tokens_NT", "mask_NT"):
        assert getattr(rollouts, field).shape == (N, T), f"{name}: {field} must have the shape {(N, T)}"
    assert rollouts.tokens_NT.dtype == torch.int64, f"{name}: tokens_NT must be int64"
    assert rollouts.mask_NT.dtype == torch.bool, f"{name}: mask_NT must be bool"
    assert max(sampling.max_new_tokens, T) == sampling.max_new_tokens, f"{name} gave more than max_new_tokens"
    assert int(lengths_N.min()) >= 1, (
        f"{name}: a completion must have at least one token, at least the one that ends it"
    )
    asked = [ids for ids in prompts.token_ids for _ in range(sampling.n)]
    got = [row[:n].tolist() for row, n in zip(rollouts.prompt_NL, rollouts.prompt_lengths_N.tolist(), strict=True)]
    assert got == asked, f"{name}: prompt_NL must hold the prompts' token ids, those of one prompt adjacent"
    group_N = torch.arange(len(prompts)).repeat_interleave(sampling.n)
    groups_match = torch.equal(rollouts.group_N - rollouts.group_N[0], group_N)
    assert groups_match, f"{name}: group_N must number the prompts, completions of one prompt adjacent"
    inside_NT = torch.arange(T)[None] < lengths_N[:, None]
    assert not (rollouts.mask_NT & ~inside_NT).any(), f"{name}: mask_NT must be false after the end of a completion"
    logprobs_NT = rollouts["sampler_logprobs_NT"]
    assert logprobs_NT.dtype == torch.float32, f"{name}: sampler_logprobs_NT must be float32"
    assert not logprobs_NT[~inside_NT].any(), f"{name}: sampler_logprobs_NT must be zero after the end of a completion"
    assert bool((logprobs_NT <= 0).all()), (
        f"{name}: sampler_logprobs_NT must be at most 0, since they are log-probabilities"
    )
    assert "versions_NT" in rollouts, f"{name}: versions_NT must give the policy version that sampled each token"
    assert rollouts["versions_NT"].dtype == torch.int64, f"{name}: versions_NT must be int64"
    assert set(rollouts.finish) <= {"stop", "length"}, f"{name}: finish must be 'stop' or 'length'"
    cut = [n for n, finish in zip(lengths_N.tolist(), rollouts.finish, strict=True) if finish == "length"]
    assert set(cut) <= {sampling.max_new_tokens}, f"{name}: a completion that was cut has max_new_tokens tokens"


def _ids(rollouts: Rollouts, i: int) -> list[int]:
    return rollouts.tokens_NT[i, : int(rollouts.lengths_N[i])].tolist()


def _tiny_role() -> Any:
    from rlhf_core.training.local_role import LocalRole

    role = LocalRole(tiny_run("unused").plan, "actor")
    role.version = 3  # as after some updates: an engine that counts for itself shows
    return role


def _tiny_prompts(role: Any) -> Prompts:
    from rlhf_core.contract.batch import Example, Prompts

    texts = ["Hello", "What is the colour of the sky?", "1 2 3"]
    token_ids = [role.tokenizer(text)["input_ids"] for text in texts]
    return Prompts(texts, token_ids, [Example(text) for text in texts], uids=[11, 12, 13])


# ----------------------------------------------------------------------------------------------------------------------
# launcher
# ----------------------------------------------------------------------------------------------------------------------


def check_launcher(launcher: Launcher, plan: Plan | None = None, atol: float = 1e-4) -> None:
    """Every role of the plan is placed, and computes and learns what it would in this process.

    Args:
        launcher: the provider.
        plan: what is placed; that of a tiny run if absent.
        atol: how far log-probabilities may be from those of core's launcher `local`.

    Raises:
        AssertionError: it is not so.
    """
    from rlhf_core.training.local_role import LocalRole

    check_provider(launcher)
    name = type(launcher).__qualname__
    plan = tiny_run("unused", launcher=launcher).plan if plan is None else plan
    batch = tiny_rollouts()
    placed = launcher(plan)
    try:
        assert set(placed.roles) == set(plan.roles), f"{name} must place exactly the roles {sorted(plan.roles)}"
        for role_name, role in placed.roles.items():
            here = LocalRole(plan, role_name)
            assert role.name == role_name, f"{name}: the role {role_name!r} is called {role.name!r}"
            names = here.spec.outputs & COMPARED
            for output, values in role.infer(batch, names).items():
                assert_close(name, f"placing {role_name}", values, here.infer(batch, names)[output], atol)
            if not here.spec.trained or not names:
                continue
            work = {key: with_advantages(batch) for key, _ in here.spec.terms}
            there_metrics, here_metrics = role.train(work), here.train(work)
            assert there_metrics.keys() >= {f"loss/{role_name}"}, f"{name}: train() must return loss/{role_name}"
            off = abs(there_metrics[f"loss/{role_name}"] - here_metrics[f"loss/{role_name}"])
            assert off <= atol, f"{name}: loss/{role_name} is {off:.2g} off that of the launcher local"
            found, expected = (each.infer(batch, COMPARED)["logprobs_NT"] for each in (role, here))
            assert_close(name, f"training {role_name}", found, expected, atol)
            assert role.version == here.version, f"{name}: {role_name}.version must count its optimizer steps"
    finally:
        placed.close()


# ----------------------------------------------------------------------------------------------------------------------
# evaluator, observer
# ----------------------------------------------------------------------------------------------------------------------


def check_evaluator(evaluator: Evaluator, run: Run | None = None) -> Mapping[str, float]:
    """Finite numbers by name, the same when asked twice, and a policy that is left as it was.

    Args:
        evaluator: the provider.
        run: an open run (`with run.open(): …`); a tiny one in a temporary folder if absent.

    Raises:
        AssertionError: it is not so.
    """
    check_provider(evaluator)
    check_opening(evaluator)
    if run is None:
        with tempfile.TemporaryDirectory() as folder, tiny_run(folder, evaluator=evaluator).open() as opened:
            return check_evaluator(evaluator, opened)
    name = type(evaluator).__qualname__
    before = {key: value.clone() for key, value in _policy(run).weights()}
    metrics = evaluator(run)
    for key, value in metrics.items():
        assert isinstance(key, str), f"{name}: metric names are strings, not {key!r}"
        assert isinstance(value, (int, float)), f"{name}: metric {key!r} must be a float, not {type(value).__name__}"
        assert math.isfinite(value), f"{name}: metric {key!r} is {value}"
    assert dict(evaluator(run)) == dict(metrics), f"{name} must measure the same when asked twice at one step"
    same = all(torch.equal(value, before[key]) for key, value in _policy(run).weights())
    assert same, f"{name} must leave the policy as it is"
    return metrics


def _policy(run: Run) -> Role:
    """The first role that is sampled or trained."""
    return run.roles[run.plan.terms[0].role]


def check_observer(observer: Any) -> Run:
    """Check that the result has observer hooks, and works in a run that succeeds and in one that fails.

    Returns:
        the run that ended well; its folder is gone, what the observer keeps elsewhere can be looked at.

    Raises:
        AssertionError: it is not so.
    """
    check_provider(observer)
    for fails in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            run = tiny_run(folder, observer=observer)
            try:
                with run.open():
                    watching = [name for each in run.observers.objects for name in OBSERVERS if hasattr(each, name)]
                    assert watching, f"{type(observer).__qualname__} must return an object with a hook of {OBSERVERS}"
                    if fails:
                        raise _Failure
                    loop.train(run)
            except _Failure:
                continue
    return run


class _Failure(Exception):
    """Exception that ends a run early on purpose."""
