"""The plugin machinery's share of a training step.

After start-up the loop makes plain calls; what is left of the machinery is one observer hook a step. This times that hook
with the built-in observers replaced by 20 that do nothing (the machinery alone, at a generous number of plugins), against
the step of a tiny GRPO run in the same process, which is as short as a step gets. Target: under 0.1 %.

    python benchmarks/hooks.py
"""

from __future__ import annotations

import tempfile
import time
from statistics import median
from types import SimpleNamespace

from rlhf_core import Registry, Run, hookimpl, make_config

CALLS = 20_000


def main() -> None:
    """Print both times and their ratio."""
    registry = Registry()
    with tempfile.TemporaryDirectory() as output:
        config = make_config(
            "grpo", registry, model="tiny", data="prompts", reward="length", steps=12, output=output,
            sampling={"n": 4, "max_new_tokens": 16},
        )  # fmt: skip
        run = Run(config, registry)
        steps: list[float] = []

        class Watch:
            @hookimpl
            def rlhf_step_end(self, run: Run, step: int, metrics: dict[str, float]) -> None:
                steps.append(metrics["time/step"])

        registry.register(Watch(), name="watch")
        run.train()
    step = median(steps[2:])
    empty = Registry(autoload=False, blocked=("console", "files"))
    for k in range(20):
        empty.register(SimpleNamespace(rlhf_step_end=hookimpl(lambda run, step, metrics: None)), name=f"observer{k}")
    started = time.perf_counter()
    for _ in range(CALLS):
        empty.hook.rlhf_step_end(run=None, step=1, metrics={})
    hook = (time.perf_counter() - started) / CALLS
    print(f"step {step * 1e3:.1f} ms, hook with 20 observers {hook * 1e6:.1f} us, share {hook / step:.4%}")


if __name__ == "__main__":
    main()
