"""Whole runs: bit for bit the same twice, the same after a cut and `--resume`, and what is said when memory runs out."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from gpu_checks.measure import release
from gpu_checks.models import run_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpu_checks.check import Context

__all__ = ["deterministic", "out_of_memory"]

MODEL = "tiny:layers=4,hidden=256,heads=4,kv_heads=2,intermediate=512"


class Cut(Exception):
    """Exception that ends a run in its middle."""


def deterministic(context: Context) -> None:
    """GRPO of 4 steps, twice; and once more, cut in its third step and resumed from the checkpoint of the second."""
    model = context.pick(MODEL, "tiny")
    options: dict[str, Any] = {
        "reward": "length", "batch_size": 4, "sampling": {"n": 4, "max_new_tokens": context.pick(32, 6)}, "steps": 4,
        "save_every": 2, "deterministic": True, "actor": {"gradient_checkpointing": True},
    }  # fmt: skip
    found = {}
    for name in ("first", "second"):
        run_of(context, "grpo", model, **options, output=str(context.folder / name)).train()
        found[name] = left_by(context.folder / name)
    for what in found["first"]:
        context.expect(f"two runs: the same {what}", found["first"][what] == found["second"][what])

    def cut(step: int) -> None:
        if step == 3:
            raise Cut

    output = str(context.folder / "cut")
    try:
        run_of(context, "grpo", model, **options, output=output, callbacks=cut).train()
        context.expect("the third run is cut", False)
    except Cut:
        run_of(context, "grpo", model, **options, output=output, resume=True).train()
    for what, value in left_by(context.folder / "cut").items():
        context.expect(f"cut and resumed: the same {what}", found["first"][what] == value)
    torch.use_deterministic_algorithms(False)


def left_by(output: Path) -> dict[str, Any]:
    """Return what a run leaves, apart from what tells the time."""
    from rlhf_core.plugins.metric_catalogue import MEASURED

    rows = {row["step"]: row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())}
    metrics = {
        k: {name: value for name, value in row.items() if not name.startswith(MEASURED)} for k, row in rows.items()
    }
    return {"metrics": metrics, "weights": (output / "model" / "model.safetensors").read_bytes()}


def out_of_memory(context: Context) -> None:
    """A run that does not fit stops with the phase in one line; with `--on-oom halve` it comes to its end."""
    from rlhf_core.errors import RunStopped

    data = context.folder / "rows.jsonl"
    rows, letters = context.pick((32, 2000), (8, 40))
    data.write_text(
        "".join(json.dumps({"prompt": "Say it.", "completion": "so " * (letters // 3)}) + "\n" for _ in range(rows))
    )
    options: dict[str, Any] = {
        "data": {"use": "json", "path": str(data)}, "batch_size": rows, "steps": 2, "micro_tokens": 10**7,
    }  # fmt: skip
    model = context.pick("tiny:layers=8,hidden=1024,heads=8,kv_heads=2,intermediate=4096", "tiny")
    with scarce(context, rows * letters // 3):
        try:
            run_of(context, "sft", model, **options, output=str(context.folder / "stop")).train()
            context.expect("a run that does not fit stops", False)
        except RunStopped as stopped:
            said = str(stopped)
            context.expect(
                "it stops with one line that names the phase",
                "in phase 'train'" in said and "\n" not in said,
                said[:400],
            )
        release()
        result = run_of(context, "sft", model, **options, on_oom="halve", output=str(context.folder / "halve")).train()
        tokens = result.metrics.get("micro_tokens/actor", 0.0)
        context.expect(
            "with on_oom halve it ends, with fewer tokens at a time", 0 < tokens < 10**7, f"{tokens:.0f} tokens"
        )


@contextmanager
def scarce(context: Context, cells: int) -> Iterator[None]:
    """Leave this process 4 GiB of the device. In a rehearsal every pass over more than `cells` runs out of memory."""
    if context.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(4 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        yield
        return
    from rlhf_core.models.module import RoleModule

    original = RoleModule.forward

    def forward(self: Any, inputs: Any, names: Any) -> Any:
        if inputs.ids_NS.numel() > cells:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, inputs, names)

    with mock.patch.object(RoleModule, "forward", forward):
        yield
