"""Ranks of the tests of building a sharded model: main memory at its peak, and the weights that all shares together are."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import Lora, ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.terms import Term
from rlhf_core.launcher.local import join_world
from rlhf_core.models.build import build_module

LARGE = "tiny:hidden=256,layers=32"
"""A model of 11 million parameters, of which the largest matrix has 66,000."""
OUTPUTS = frozenset({"logprobs_NT", "values_NT"})


def trained(model: str, **options: Any) -> RoleSpec:
    """The spec of a trained role with a value head."""
    terms: Any = (("data", Term("actor", "data", None)),)  # type: ignore[arg-type]  # nothing is computed
    return RoleSpec("actor", TrainedOptions(model=model, **options), OUTPUTS, terms=terms)


def specs(saved: str, adapted: bool) -> dict[str, RoleSpec]:
    """Roles to build, by the name of what is special in each."""
    found = {
        "tiny": trained("tiny"),
        "saved": trained(saved),
        "experts": trained(str(Path(saved).parent / "experts")),
        "narrow": trained(saved, dtype="bfloat16"),
        "frozen": RoleSpec("reference", ModelOptions(model=saved, dtype="bfloat16"), frozenset({"logprobs_NT"})),
        "scorer": RoleSpec("reward", ModelOptions(model="tiny"), frozenset({"scores_N"})),
    }
    return {**found, "lora": trained(saved, lora=Lora(rank=4))} if adapted else found


def peak(action: Callable[[], object]) -> int:
    """Return the most bytes of tensors in main memory at any time of `action`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = action()
    changes = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    del kept
    return max(accumulate(each.nbytes() for each in sorted(changes, key=lambda each: each.start_ns())))


def build(folder: str, saved: str, adapted: bool) -> None:
    """Build each role under stage 3, and keep its whole weights for the test."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    torch.set_num_threads(1)
    world = join_world()
    for name, spec in specs(saved, adapted).items():
        optim = AdamW(lr=1e-3) if spec.terms else None
        role = DeepSpeed(stage=3, persist=8)(lambda spec=spec: build_module(spec), optim, 10)
        whole = {key: role.full(parameter).cpu().clone() for key, parameter in role.module.named_parameters()}
        if world.rank == 0:
            torch.save(whole, Path(folder, f"{name}.pt"))
    Path(folder, f"{world.rank}.json").write_text(json.dumps(measure()))


def measure() -> dict[str, int]:
    """Build a frozen role under stage 3, deferred and not; return the peaks of this rank."""
    from rlhf_core.models.loading import deferral
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    spec = RoleSpec("reference", ModelOptions(model=LARGE), frozenset({"logprobs_NT"}))

    def role() -> object:
        return DeepSpeed(stage=3)(lambda: build_module(spec), None, 1)

    found = {"deferred": peak(role)}
    with patch.object(deferral, "defer_weights", nullcontext):
        return {**found, "at once": peak(role)}
