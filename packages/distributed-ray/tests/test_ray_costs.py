"""The formulas of docs/scaling.md for many GPUs, against what is really put for as many workers; no cluster is needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf_core.testing.tiny import tiny_rollouts
from rlhf_distributed_ray.transport import Shipper, split_groups

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "cluster_costs.py"


@pytest.fixture(scope="module")
def formulas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_costs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_costs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_bytes_of_batches_do_not_depend_on_the_number_of_workers(workers: int, formulas: ModuleType) -> None:
    rollouts = tiny_rollouts(prompts=64, completions=1)
    N, T = rollouts.tokens_NT.shape
    extras = {name: torch.zeros(N, T) for name in ("advantages_NT", "old_logprobs_NT", "sampler_logprobs_NT")}
    extras |= {"versions_NT": torch.zeros(N, T, dtype=torch.long), "uids_N": torch.arange(N)}
    batch = rollouts.with_extras(**extras)
    shipper = Shipper(put=lambda packed: packed)
    for rows in split_groups(batch, workers):
        shipper.columns(batch, rows)
        shipper.extras(batch, list(extras), rows)
    expected = formulas.sample_bytes(batch.prompt_NL.shape[1], T) + formulas.extra_bytes(T, 3)
    assert shipper.bytes == N * expected


def test_a_thousand_workers_share_groups_as_a_search_for_the_least_load_would(formulas: ModuleType) -> None:
    """The independent source looks at every worker for every group."""
    batch = tiny_rollouts(prompts=2048, completions=1)
    loads, expected = [0] * 1024, [[] for _ in range(1024)]  # type: tuple[list[int], list[list[int]]]
    tokens = (batch.prompt_lengths_N + batch.lengths_N).tolist()
    for row in sorted(range(2048), key=lambda row: -tokens[row]):
        k = loads.index(min(loads))
        loads[k] += tokens[row]
        expected[k].append(row)
    assert split_groups(batch, 1024) == [sorted(rows) for rows in expected]
    assert formulas.calls(1024, 1024, 4, 2) == 9216


def test_a_sync_over_nodes_is_between_a_tree_and_a_star(formulas: ModuleType) -> None:
    """14 GB: 2.33 s from a GPU, 2.8 s into the store, 2.33 s to a GPU, and 1.12 s for each pass through a network."""
    assert formulas.sync_seconds(14e9, 1) == pytest.approx((7.4667, 7.4667), abs=1e-3)
    assert formulas.sync_seconds(14e9, 8) == pytest.approx((7.4667 + 3 * 1.12, 7.4667 + 7 * 1.12), abs=1e-3)
