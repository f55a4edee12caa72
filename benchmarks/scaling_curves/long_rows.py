"""One long row of SFT: the memory that its activations take, by part of the model, against a formula."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from rlhf_core.contract.batch import Batch
from rlhf_core.testing import tiny_run
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.local_role import LocalRole
from scaling_curves.curve import Measured, Ratio, Series, cost_of, curve, in_process

LAYERS, HIDDEN = 2, 64


def role_of(checkpointing: bool, tokens: int) -> Any:
    """Return a small Llama under SFT."""
    actor = {"gradient_checkpointing": checkpointing}
    model = f"tiny:hidden={HIDDEN},layers={LAYERS}"
    return LocalRole(
        tiny_run("unused", "sft", model=model, data="prompts", actor=actor, micro_tokens=tokens).plan, "actor"
    )


def row_of(tokens: int) -> Batch:
    """Return one row of so many tokens, all but one of them trained on."""
    batch = make_batch([tokens - 1], prompt_lengths=[1])
    batch.tokens_NT = batch.tokens_NT % 250
    return batch


def saved_bytes(tokens: int) -> dict[str, float]:
    """Return the bytes that autograd keeps of one forward pass, by the part of the model that keeps them first."""
    role = role_of(False, tokens)
    kept: Counter[str] = Counter()
    seen: set[int] = {each.untyped_storage().data_ptr() for each in role.module.parameters()}
    alive: list[torch.Tensor] = []  # so that no address is used twice
    within = ["head and loss"]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[within[-1]] += storage.nbytes()
            alive.append(tensor)
        return tensor

    for name, module in role.module.named_modules():
        part = next((p for p in ("self_attn", "mlp", "norm", "embed", "rotary") if p in name.rpartition(".")[2]), None)
        if part is not None:
            module.register_forward_pre_hook(lambda *_, part=part: within.append(part))
            module.register_forward_hook(lambda *_: within.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = role.trainable.forward(row_of(tokens), frozenset({"logprobs_NT"}))
        outputs["logprobs_NT"].sum()
    return dict(kept)


def train(role: Any, batch: Batch) -> None:
    """Take one optimizer step."""
    role.train({"data": batch})


def step_cost(tokens: int, checkpointing: bool) -> tuple[float, float]:
    """Return CPU seconds and peak bytes of a step on one row, the optimizer's state of an earlier step included."""
    torch.set_num_threads(1)
    role = role_of(checkpointing, tokens)
    train(role, row_of(64))
    began = time.process_time()
    cost = cost_of(train, role, row_of(tokens))
    return time.process_time() - began, cost.memory


@curve(
    "long_rows", f"memory of one row of SFT, {LAYERS} layers of width {HIDDEN}, with gradient checkpointing and without"
)
def long_rows(quick: bool) -> Measured:
    """The formula is the line through the parts at the two smallest sizes; it is judged at the largest."""
    sizes = (256, 512) if quick else (2048, 8192, 32768)
    parts = {tokens: saved_bytes(tokens) for tokens in sizes[:2]}
    series = [
        Series(f"kept by {part}", "tokens", "B", [(tokens, parts[tokens].get(part, 0.0)) for tokens in parts])
        for part in sorted(parts[sizes[0]])
    ]
    rate = (sum(parts[sizes[1]].values()) - sum(parts[sizes[0]].values())) / (sizes[1] - sizes[0])
    costs = {on: [(tokens, (step_cost if quick else _alone)(tokens, on)) for tokens in sizes] for on in (False, True)}
    for on, found in costs.items():
        title = "checkpointing" if on else "plain"
        series.append(Series(f"{title}, peak memory", "tokens", "B", [(tokens, each[1]) for tokens, each in found]))
        series.append(Series(f"{title}, CPU", "tokens", "s", [(tokens, each[0]) for tokens, each in found]))
    largest, plain = costs[False][-1][0], costs[False][-1][1][1]
    ratios = [
        Ratio(f"peak at {largest} tokens / {rate:.0f} B per token that autograd keeps", plain / (rate * largest), 2.0),
        Ratio("memory with checkpointing / without, at the largest", costs[True][-1][1][1] / max(plain, 1.0), 0.8),
    ]
    return Measured(series, ratios)


def _alone(tokens: int, checkpointing: bool) -> tuple[float, float]:
    return in_process(step_cost, tokens, checkpointing)
