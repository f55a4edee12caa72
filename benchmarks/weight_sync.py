"""Time of a weight sync into vLLM against one plain copy of the same bytes, and the engine calls it takes.

    python3 benchmarks/weight_sync.py --models tiny tiny:layers=8 smollm2-135m

The calls must not grow with the number of tensors. On the CPU vLLM loads each layer into a fresh one, packs it for its matrix
products and copies the result to where the model reads it: about three copies and a reordering. With `--process own` one more
copy goes before, into the memory that both processes share.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rlhf_core.contract.batch import Example, Prompts
from rlhf_core.contract.options import Sampling
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny:layers=8", "smollm2-135m"])
    parser.add_argument("--dtype", default="float32", help="of the engine")
    parser.add_argument("--process", default="trainer", choices=["trainer", "own"], help="where the engine runs")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("model            tensors      MiB   calls   sync s   copy s   ratio")
    for model in args.models:
        measure(model, args.dtype, args.repeats, args.process)


def measure(model: str, dtype: str, repeats: int, process: str) -> None:
    """One line of the table: medians over repeats, sync and copy in turn."""
    role = LocalRole(tiny_run("unused", model=model).plan, "actor")
    ids = role.tokenizer("Hello")["input_ids"]
    rollout = VLLMEngines(VLLM(dtype=dtype, process=process, kv_cache_gib=0.5, max_num_seqs=8))  # type: ignore[arg-type]
    rollout(role, Prompts(["Hello"], [ids], [Example("Hello")], [0]), Sampling(n=1, max_new_tokens=2))
    role.version += 1
    rollout.sync(role)  # compares with the trainer, once
    sources = [tensor for _, tensor in role.weights()]
    targets = [torch.empty_like(tensor) for tensor in sources]
    syncs, copies, metrics = [], [], {}
    for _ in range(repeats):
        role.version += 1
        metrics = dict(rollout.sync(role))
        syncs.append(metrics["sync/seconds"])
        started = time.perf_counter()
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        copies.append(time.perf_counter() - started)
    rollout.close()
    sync, copy = statistics.median(syncs), statistics.median(copies)
    size = metrics["sync/bytes"] / 2**20
    print(
        f"{model:16} {len(sources):7} {size:8.1f} {metrics['sync/calls']:7.0f} {sync:8.4f} {copy:8.4f} {sync / copy:7.1f}"
    )


if __name__ == "__main__":
    main()
