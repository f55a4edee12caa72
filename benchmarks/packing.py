"""Padding of a log-normal length mix: rows as they come, rows of like length together, and rows end to end.

One batch of demonstrations is cut into micro-batches of the same token budget in four ways: as rows come; rows of like length
in as few micro-batches as fit (what an accelerator gets without flash attention); in more of them, so that padding stays low
(what a CPU gets where an architecture cannot be packed, or with `--actor.packing False`); end to end (elsewhere). For each
the share of cells that are padding is printed, and what a forward and backward pass over the whole batch costs in CPU time;
loss and gradients must be those of rows as they come. Targets of the last two: at most 5 % padding, differences at most 1e-5
(of the largest gradient).

    python benchmarks/packing.py --model tiny:layers=4,hidden=256
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.training.microbatch import bearable_padding, micro_rows, padding_share

WANTS = frozenset({"logprobs_NT"})


def main() -> None:
    """Measure the ways in turn; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:layers=4,hidden=256")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = mixed(options.rows)
    like, as_come = micro_rows(batch, options.micro_tokens), as_they_come(batch, options.micro_tokens)
    padded, packed = (module_of(options.model, packing) for packing in (False, True))
    low = micro_rows(batch, options.micro_tokens, padding=bearable_padding(padded))
    ways: dict[str, tuple[Any, list[Tensor]]] = {
        "as they come": (padded, as_come),
        "like lengths": (padded, like),
        "little padding": (padded, low),
        "end to end": (packed, like),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for k in range(options.rounds + 1):
        for name, (module, cuts) in ways.items():
            started = time.process_time()
            found[name] = loss_and_gradients(module, batch, cuts)
            if k:  # the first round warms up
                seconds[name].append(time.process_time() - started)
    tokens = int((batch.prompt_lengths_N + batch.lengths_N).sum())
    print(f"{len(batch)} rows, {tokens} tokens, longest {widest(batch)}; load {os.getloadavg()[0]:.1f}")
    reference, expected = found["as they come"]
    for name, (module, cuts) in ways.items():
        share = 0.0 if module.packs else padding_share(batch, cuts)
        loss, gradients = found[name]
        largest = max(float(each.abs().max()) for each in expected)
        off = max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True)) / largest
        ratio = median(a / b for a, b in zip(seconds[name], seconds["as they come"], strict=True))
        print(
            f"{name:14} {len(cuts):3} micro-batches, padding {share:6.2%}, {median(seconds[name]):.2f} s of CPU (ratio "
            f"{ratio:.2f}); loss differs by {abs(loss - reference):.1e}, gradients by {off:.1e}"
        )


def mixed(rows: int) -> Batch:
    """Random tokens; prompts and completions of log-normal lengths, medians 32 and 96, cut at 1,024."""
    draw = torch.Generator().manual_seed(0)
    lengths = [
        (torch.randn(rows, generator=draw) * spread).exp().mul(middle).round().clamp(4, 1024).long()
        for middle, spread in ((32, 0.5), (96, 0.8))
    ]
    prompt_NL, tokens_NT = (torch.randint(5, 250, (rows, int(each.max())), generator=draw) for each in lengths)
    mask_NT = torch.arange(tokens_NT.shape[1]) < lengths[1][:, None]
    return Batch(
        [""] * rows, [""] * rows, prompt_NL, lengths[0], tokens_NT, lengths[1], mask_NT, torch.arange(rows),
        [None] * rows, [{}] * rows,
    )  # fmt: skip


def widest(batch: Batch) -> int:
    """Tokens of the longest row."""
    return int((batch.prompt_lengths_N + batch.lengths_N).max())


def as_they_come(batch: Batch, tokens: int) -> list[Tensor]:
    """Micro-batches of equally many rows in the order of the batch, as many as fit if one is the longest."""
    return list(torch.arange(len(batch)).split(max(1, tokens // widest(batch))))


def module_of(model: str, packing: bool) -> Any:
    """A trained actor."""
    options = TrainedOptions(model=model, packing=packing)
    return build_module(RoleSpec("actor", options, WANTS, terms=(("data", None),)))  # type: ignore[arg-type]


def loss_and_gradients(module: Any, batch: Batch, cuts: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Mean negative log-likelihood of the completion tokens, and its gradients."""
    module.zero_grad()
    total, count = 0.0, float(batch.mask_NT.sum())
    for rows in cuts:
        loss = -module(arrange_inputs(batch.rows(rows)), WANTS)["logprobs_NT"].sum() / count
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in module.parameters()]


if __name__ == "__main__":
    main()
