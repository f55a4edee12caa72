"""Memory by role, its peak against a formula, and what a checkpoint costs."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gpu_checks.measure import release, synchronize, timed
from gpu_checks.models import make_role, on_device, random_batch, run_of, shape

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["checkpoint", "offload", "peak_memory"]


def allocated() -> float:
    """Return the GiB that tensors hold on the device; 0 on a CPU."""
    synchronize()
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def offload(context: Context) -> None:
    """Train, offload, reload and train again: GiB on the device, seconds, and the same loss as without."""
    lengths = [context.pick(1024, 16)] * 8
    losses = []
    for away in (False, True):
        empty = allocated()
        role = make_role(context, shape(context, "0.5B"), micro_tokens=context.pick(8192, 64))
        batch = random_batch(lengths, role.causal_lm.config.vocab_size)
        weights = allocated() - empty
        role.train({"data": batch})
        release()
        trained = allocated() - empty
        if away:
            left = timed(role.trainable.offload)
            release()
            remaining = allocated() - empty
            back = timed(role.trainable.reload)
            context.row(
                weights_GiB=weights, after_a_step_GiB=trained, offloaded_GiB=remaining, reloaded_GiB=allocated() - empty,
                offload_seconds=left, reload_seconds=back,
            )  # fmt: skip
            context.expect(
                "offloaded, at most 5 % stays on the device", remaining <= 0.05 * trained, f"{remaining:.3f} GiB"
            )
        losses.append(role.train({"data": batch})["loss/actor"])
        del role, batch
        release()
    close = abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[0])
    context.expect("the loss after reloading is that without", close, f"{losses[0]:.6f}, {losses[1]:.6f}")


def peak_memory(context: Context) -> None:
    """The peak of a training step against `rlhf-run plan`, with and without gradient checkpointing; and what stays after it."""
    context.note(
        "weights, gradients and AdamW take 4, 4 and 8 bytes a parameter; the plan adds activations, which it counts"
    )
    micro = context.pick(8192, 64)
    cases = [("0.5B", S, again) for S in context.pick((2048, 8192), (16, 64)) for again in (True, False)]
    for size, S, recompute in [*cases, ("1.5B", context.pick(8192, 64), True)]:
        empty = allocated()
        options: dict[str, Any] = {"micro_tokens": micro, "batch_size": micro // S}
        options["actor"] = {"gradient_checkpointing": recompute}
        role = make_role(context, shape(context, size), **options)
        numbers = sum(each.numel() for each in role.module.parameters())
        batch = random_batch([S] * (micro // S), role.causal_lm.config.vocab_size)
        role.train({"data": batch})
        release()
        held = allocated() - empty
        role.train({"data": batch})
        peak = torch.cuda.max_memory_allocated() / 2**30 - empty if torch.cuda.is_available() else 0.0
        planned = planned_gib(context, shape(context, size), S, options)
        context.row(
            model=size, row_tokens=S, recomputation=recompute, weights_and_optimizer_GiB=held,
            formula_GiB=12 * numbers / 2**30, peak_GiB=peak, planned_GiB=planned,
            planned_by_peak=planned / peak if peak else 0.0,
        )  # fmt: skip
        if planned and peak:
            what = f"planned peak, distance from the measured one, {size}, rows of {S}{', recomputation' if recompute else ''}"
            context.goal(what, abs(planned / peak - 1), 0.10, at_least=False)
        del role, batch
        release()


def planned_gib(context: Context, model: str, S: int, options: dict[str, Any]) -> float:
    """Return the peak that `rlhf-run plan` says for rows of S tokens; 0 where this version has no planner."""
    if importlib.util.find_spec("rlhf_core.forecast") is None:
        return 0.0
    from rlhf_core.forecast.forecast import forecast
    from rlhf_core.forecast.options import PlanOptions

    config = run_of(context, "sft", model, **options).config
    return float(forecast(config, PlanOptions(gpus=1, prompt_tokens=1, completion_tokens=S - 1)).peak) / 2**30


def checkpoint(context: Context) -> None:
    """The seconds that a save stops the loop, in it and beside it (`--save-async`), against safetensors and fsync alone."""
    import checkpoint as script

    options = argparse.Namespace(rounds=context.pick(2, 1))
    model = context.pick("tiny:layers=8,hidden=1024,heads=8,kv_heads=2,intermediate=4096", "tiny")
    run = run_of(
        context, "grpo", model, reward="length", batch_size=2, steps=1, sampling={"n": 2, "max_new_tokens": 4},
        micro_tokens=256, keep=1,
    )  # fmt: skip
    with on_device(context.device), run.open():
        script.one_step(run)
        tensors = script.plain_tensors(run)
        gigabytes = sum(each.numel() * each.element_size() for each in tensors.values()) / 1e9
        sides: dict[str, Any] = {
            "plain writing": lambda: script.plain(tensors, context.folder / "plain"),
            "in the loop": lambda: script.ours(run, beside=False),
            "beside the training": lambda: script.ours(run, beside=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for k in range(options.rounds + 1):
            for name, side in sides.items():
                took = side()
                run.checkpoints.background.wait()
                if k or context.rehearse:
                    seconds[name].append(took)
    for name, each in seconds.items():
        ratio = median(each) / median(seconds["plain writing"])
        context.row(save=name, gigabytes=gigabytes, loop_stopped_seconds=median(each), ratio=ratio)
    shutil.rmtree(context.folder / "plain", ignore_errors=True)
