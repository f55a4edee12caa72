"""Checksums of weights stay what they are in any layout, and change with any element."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.errors import RunStopped
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm import checksums
from rlhf_rollout_vllm.agreement import compare_weights
from rlhf_rollout_vllm.checksums import OUTSIDE, add_checksums, checksum, describe_groups, layer_number

MASK = (1 << 64) - 1


def _signed(number: int) -> int:
    number &= MASK
    return number - (1 << 64) if number >> 63 else number


def _reference(tensor: torch.Tensor) -> int:
    """Compute the same in integers of Python, element by element."""
    total = 0
    for value in tensor.reshape(-1):
        word = int(value.view(torch.int32 if value.element_size() == 4 else torch.int16))
        word = _signed(word * 0x9E3779B97F4A7C15)
        word = _signed((word ^ (word >> 29)) * 0x94D049BB133111EB)
        total += word ^ (word >> 32)
    return _signed(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_sum_of_hashes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PART", 7)
    tensor = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert checksum(tensor) == _reference(tensor)


def test_layouts_do_not_change_it() -> None:
    q, k = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))
    both = _signed(checksum(q) + checksum(k))
    assert both == checksum(torch.cat([q, k])) == checksum(torch.cat([q, k]).t())
    assert both == checksum(torch.cat([q, k, torch.zeros(3, 6)])) == checksum(torch.cat([k, q, -torch.zeros(3, 6)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_change_of_any_element_changes_it(dtype: torch.dtype) -> None:
    tensor = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = checksum(tensor)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    for i in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1).view(words)[i] ^= 1
        assert checksum(other) != whole
    assert len({whole, checksum(2 * tensor), checksum(-tensor), checksum(tensor + tensor.t())}) == 4


def test_tensors_are_taken_together_by_layer() -> None:
    a, b, c = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    found = add_checksums(
        [("m.layers.3.q", a), ("m.layers.3.mlp.2.k", b), ("m.norm", c), ("m.steps", torch.ones(2, dtype=int))]
    )
    assert found == {3: _signed(checksum(a) + checksum(b)), OUTSIDE: checksum(c)}
    assert add_checksums([("x", a)], torch.bfloat16) == {OUTSIDE: checksum(a.to(torch.bfloat16))}
    assert [layer_number(name) for name in ("h.11.w", "w", "l.0.e.5.w")] == [11, OUTSIDE, 0]


def test_layers_are_described() -> None:
    assert describe_groups({4}) == "layer 4"
    assert describe_groups({7, OUTSIDE, 4}) == "layers 4, 7 and embedding, last norm or head"


def test_layers_that_the_engine_changes_on_loading_are_left_out_and_said(role: LocalRole, caplog: Any) -> None:
    """A model of which vLLM stores other numbers than the checkpoint is no fault."""
    right = add_checksums(role.weights())
    changed = right | {0: right[0] + 1}
    host = SimpleNamespace(checksums=lambda: [changed])
    engine: Any = SimpleNamespace(host=host, dtype="float32", adapters=None, changed_layers=None)
    compare_weights(engine, role, "loading")
    assert engine.changed_layers == {0}
    compare_weights(engine, role, "update 1")
    changed[1] += 1
    with pytest.raises(
        RunStopped, match=r"^after update 2, weights of rollout 'vllm' in layer 1 differ from those of role 'actor'"
    ):
        compare_weights(engine, role, "update 2")
