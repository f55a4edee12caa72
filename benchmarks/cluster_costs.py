"""Costs of an iteration under Ray on 8, 64 and 1,024 GPUs, by formulas; `docs/scaling.md` has the table.

    python3 benchmarks/cluster_costs.py
    python3 benchmarks/cluster_costs.py --parameters 70e9 --prompt 1024 --completion 8192 --samples-per-gpu 8

PPO with four roles and an engine beside each worker: every GPU has a worker of each role. Tests compare the formulas of bytes
and calls with what is sent, `benchmarks/distributed.py` with what is counted in a run. The bandwidths are assumptions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil, log2

GPUS_A_NODE = 8
HOST_COPY = 6e9
"""Bytes per second between a GPU and pageable host memory; an assumption, as all bandwidths here."""
STORE = 5e9
"""Bytes per second into the object store: a copy in memory."""
NETWORK = 12.5e9
"""Bytes per second out of a node: 100 Gbit/s."""
ROLES_READ, ROLES_TRAINED = 4, 2
"""Of PPO: old log-probabilities of the actor, reference, values and scores; actor and critic."""
ZERO_BYTES = 18
"""Bytes per parameter of a trained role in bfloat16 with AdamW, over all ranks of ZeRO stage 3."""


@dataclass(frozen=True)
class Costs:
    """Costs of an iteration."""

    calls: int
    """calls that the controller makes"""
    node_bytes: int
    """bytes of batches that a node is sent"""
    sync_least: float
    """seconds of a sync, if nodes that have a bucket pass it on"""
    sync_most: float
    """seconds of a sync, if rank 0 sends every bucket to every node"""
    rank_bytes: float
    """bytes of the states of actor, critic, reference and reward model on a GPU, and of an engine's weights"""


def calls(workers: int, engines: int, read: int, trained: int) -> int:
    """Calls of an iteration: each role that is read or trained, the engines, and a sync of one role."""
    return (read + trained) * workers + engines + workers + engines


def sample_bytes(prompt: int, completion: int) -> int:
    """Bytes of a sample's columns: tokens in int64, a mask, two lengths and the number of its group."""
    return 8 * prompt + 9 * completion + 24


def extra_bytes(completion: int, floats: int) -> int:
    """Bytes of what a trained role reads of a sample: `floats` numbers and a version per token, and the row's number."""
    return (4 * floats + 8) * completion + 8


def sync_seconds(sent: float, nodes: int) -> tuple[float, float]:
    """Seconds of a sync of that many bytes, least and most: two copies of a GPU, one into the store, and the network."""
    copies = 2 * sent / HOST_COPY + sent / STORE
    return copies + ceil(log2(nodes)) * sent / NETWORK, copies + (nodes - 1) * sent / NETWORK


def costs(gpus: int, parameters: float, prompt: int, completion: int, samples_per_gpu: int) -> Costs:
    """Return the costs of PPO on that many GPUs."""
    nodes = ceil(gpus / GPUS_A_NODE)
    a_node = samples_per_gpu * min(gpus, GPUS_A_NODE)
    # advantages, old log-probabilities and the sampler's for the actor; returns and old values for the critic
    moved = sample_bytes(prompt, completion) + extra_bytes(completion, 3) + extra_bytes(completion, 2)
    least, most = sync_seconds(2 * parameters, nodes)
    held = (2 * ZERO_BYTES + 2 * 2) * parameters / gpus + 2 * parameters
    return Costs(calls(gpus, gpus, ROLES_READ, ROLES_TRAINED), a_node * moved, least, most, held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--parameters", type=float, default=7e9, help="of each of the four models and of an engine")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the longest prompt")
    parser.add_argument("--completion", type=int, default=1024, help="tokens of the longest completion")
    parser.add_argument("--samples-per-gpu", type=int, default=16)
    args = parser.parse_args()
    print("| GPUs | controller calls | MiB of batches to a node | seconds of a sync | GiB per GPU |")
    print("|---|---|---|---|---|")
    for gpus in args.gpus:
        found = costs(gpus, args.parameters, args.prompt, args.completion, args.samples_per_gpu)
        span = f"{found.sync_least:.1f}" + (f" to {found.sync_most:.1f}" if found.sync_most > found.sync_least else "")
        print(
            f"| {gpus:,} | {found.calls:,} | {found.node_bytes / 2**20:.1f} | {span} | {found.rank_bytes / 2**30:.1f} |"
        )


if __name__ == "__main__":
    main()
