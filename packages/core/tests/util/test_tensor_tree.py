"""A tree of tensors and plain values is the same after it was written and read, ties and types included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf_core.util.tensor_tree import Copies, read_tree, write_tree


def a_tree() -> dict[str, Any]:
    tied = torch.randn(3, 4)
    return {
        "head": tied,
        "embedding": tied,
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.randn(3, 4).bfloat16()}, 7: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 7], "name": None, "fused": True}],
        },
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(2, 5).T,
        "never": float("inf"),
    }


def assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_a_tree_is_read_as_it_was_written_and_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    tree = a_tree()
    write_tree(tmp_path / "tree", tree)
    assert_same(read_tree(tmp_path / "tree"), tree)
    stored = load_file(tmp_path / "tree")  # the library's own reader
    assert "head" in stored and "embedding" not in stored
    assert torch.equal(stored["optimizer.state.0.exp_avg"], tree["optimizer"]["state"][0]["exp_avg"])


def test_copies_stay_as_they_were_when_the_originals_change_and_use_their_memory_again(tmp_path: Path) -> None:
    tree, copies = a_tree(), Copies()
    copied = copies.copy(tree)
    write_tree(tmp_path / "before", tree)
    tree["head"].add_(1)
    assert_same(copied, read_tree(tmp_path / "before"))
    assert copied["head"] is copied["embedding"]
    address = copied["head"].data_ptr()
    again = copies.copy(tree)
    assert_same(again, tree)
    assert again["head"].data_ptr() == address
    grown = copies.copy({"head": torch.ones(5)})
    assert_same(grown, {"head": torch.ones(5)})


def test_an_optimiser_and_a_model_with_tied_weights_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def tied() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        module[1].weight = module[0].weight
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def trained(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in module.parameters()]

    module, optimizer = tied()
    trained(module, optimizer, 3)
    write_tree(tmp_path / "tree", {"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    expected = trained(module, optimizer, 2)
    module, optimizer = tied()
    state = read_tree(tmp_path / "tree")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(trained(module, optimizer, 2), expected, strict=True))
