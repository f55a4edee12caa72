"""Ranks of the tests of building a sharded model: main memory at its peak, and the weights that all shares together are."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
    tokens = str(Path(saved).parent / "tokens.txt")
    found |= {"grown": trained(saved, add_tokens=tokens), "grown tiny": trained("tiny", add_tokens=tokens)}
    if not adapted:
        return found
    adapter = str(Path(saved).parent / "adapter")
    found |= {"lora": trained(saved, lora=Lora(rank=4)), "adapter": trained(adapter, add_tokens=tokens)}
    return {**found, "lora on adapter": trained(adapter, lora=Lora(rank=4))}


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
    Path(folder, f"{world.rank}.json").write_text(json.dumps(measure(Path(folder), adapted)))


def measure(folder: Path, adapted: bool) -> dict[str, int]:
    """Build frozen roles under stage 3; return peaks of this rank, deferred and not, and bytes that were whole at once."""
    from rlhf_core.models.loading import deferral
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    def role(build: Callable[[], Any] = lambda: module()) -> object:
        return DeepSpeed(stage=3)(build, None, 1)

    def module(**options: Any) -> Any:
        spec = RoleSpec("reference", ModelOptions(**{"model": LARGE, **options}), frozenset({"logprobs_NT"}))
        return build_module(spec)

    found = {"deferred": peak(role), "grown": most_whole(role, partial(module, add_tokens=str(folder / "tokens.txt")))}
    if adapted:
        found["adapter"] = most_whole(role, partial(module, model=str(folder / "large")))
    with patch.object(deferral, "defer_weights", nullcontext):
        return {**found, "at once": peak(role), "whole": most_whole(role, module)}


def most_whole(role: Callable[[Callable[[], Any]], object], build: Callable[[], Any]) -> int:
    """Return the most bytes of parameters that are neither deferred nor cut while a role's parameters are read in turn."""
    from rlhf_strategy_deepspeed import engine

    built: list[Any] = []
    seen = []

    def module() -> Any:
        built.append(build())
        return built[0]

    def counted(parameter: torch.Tensor) -> None:
        read(parameter)
        seen.append(sum({each.data_ptr(): each.untyped_storage().nbytes() for each in built[0].parameters()}.values()))

    read = engine.read_weight
    with patch.object(engine, "read_weight", counted):
        role(module)
    return max(seen)
