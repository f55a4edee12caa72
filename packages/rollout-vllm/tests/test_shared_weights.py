"""Shared memory holds exactly the tensors that were written, for another process too, and nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import pytest
import torch

from rlhf_rollout_vllm.shared_weights import SharedWeights, read_sheet


def _model(seed: int, scale: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (700, 9), (1,), (0, 4), (40, 40), (2, 3, 4)]
    found = {f"t{i}": torch.randn(*(scale * n for n in shape), generator=generator) for i, shape in enumerate(shapes)}
    return found | {"count": torch.arange(7)}


def _read(store: SharedWeights) -> dict[str, torch.Tensor]:
    """Read as another process would."""
    file = os.open(store.path, os.O_RDWR)
    buckets = {offset: mmap(file, size, offset=offset) for offset, size in store.buckets}
    os.close(file)
    return {name: tensor.clone() for name, tensor in (read_sheet(buckets, sheet) for sheet in store.sheets)}


@pytest.mark.parametrize("bucket_bytes", [4096, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_whatever_the_buckets(bucket_bytes: int, dtype: torch.dtype) -> None:
    store = SharedWeights(dtype, bucket_bytes)
    for scale, seed in ((1, 0), (1, 1), (2, 2), (1, 3)):
        model = _model(seed, scale)
        store.write(iter(model.items()))
        found = _read(store)
        assert list(found) == list(model)
        for name, tensor in model.items():
            expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(found[name], expected), name
        assert store.bytes == sum(found[name].numel() * found[name].element_size() for name in model)
    store.close()
    store.close()


def test_memory_does_not_grow_with_updates() -> None:
    store = SharedWeights(torch.float32, 4096)
    store.write(_model(0).items())
    before = store.buckets
    for seed in range(5):
        store.write(_model(seed).items())
    assert store.buckets == before
    store.close()


def test_nothing_is_left_when_its_process_is_killed() -> None:
    script = (
        "import os, torch; from rlhf_rollout_vllm.shared_weights import SharedWeights\n"
        "store = SharedWeights(torch.float32); store.write([('x', torch.ones(9))]); os.kill(os.getpid(), 9)\n"
    )
    before = set(Path("/dev/shm").iterdir())
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if "rlhf" in path.name]
