"""Exports a file at a time: the files of transformers, bit for bit, with one file of tensors in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rlhf_core.errors import UsageError
from rlhf_core.models.export.shards import parse_bytes, write_weights

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHARD = 20_000
"""Bytes of a file: a few tensors of a layer; the embedding fits."""


def llama() -> Any:
    """A Llama with tied embeddings."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def mixtral() -> Any:
    """A mixture of experts, whose experts are one parameter in memory and one tensor each in files."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each parameter once, as a copy that is somebody else's."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().clone()


def contents(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of each weight file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("shard", ["5GB", str(SHARD)])
def test_files_are_those_of_transformers(shard: str, tmp_path: Path) -> None:
    model = llama()
    write_weights(model, tmp_path / "ours", weights(model), torch.float32, shard)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=parse_bytes(shard))
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert {name: list(inside) for name, inside in ours.items()} == {name: list(each) for name, each in theirs.items()}
    assert all(torch.equal(ours[file][name], theirs[file][name]) for file in ours for name in ours[file])
    index = "model.safetensors.index.json"
    assert (len(ours) > 3) == (shard != "5GB") == (tmp_path / "ours" / index).exists()
    if shard != "5GB":
        found, expected = (json.loads((tmp_path / place / index).read_text()) for place in ("ours", "theirs"))
        assert found == expected
    others = [sorted(path.name for path in (tmp_path / place).iterdir()) for place in ("ours", "theirs")]
    assert others[0] == others[1]


@pytest.mark.parametrize("make", [llama, mixtral])
def test_plain_transformers_loads_what_was_written_bit_for_bit(make: Any, tmp_path: Path) -> None:
    model = make()
    write_weights(model, tmp_path, weights(model), torch.float32, str(SHARD))
    assert len(contents(tmp_path)) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = dict(model.named_parameters())
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    model = mixtral()
    write_weights(model, tmp_path / "ours", weights(model), torch.float32, "5GB")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert {name for inside in ours.values() for name in inside} == {name for each in theirs.values() for name in each}


def test_no_more_than_a_file_is_in_memory_at_once(tmp_path: Path) -> None:
    """Bytes of tensors that were given and are still alive, each time that another is asked for."""
    model = llama()
    alive: dict[int, int] = {}
    most, largest = 0, max(4 * each.numel() for each in model.parameters())

    def watched() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number, (name, tensor) in enumerate(weights(model)):
            alive[number] = 4 * tensor.numel()
            weakref.finalize(tensor, alive.pop, number)
            most = max(most, sum(alive.values()))
            yield name, tensor
            del tensor

    write_weights(model, tmp_path, watched(), torch.float32, str(SHARD))
    whole = sum(4 * each.numel() for each in model.parameters())
    assert most <= SHARD + 2 * largest < whole / 2


@pytest.mark.parametrize("size", ["", "5 bananas", "0GB", "-1GB"])
def test_a_size_that_is_none_is_one_line(size: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size; write 5GB or 500MB$"):
        parse_bytes(size)


def test_sizes_are_decimal() -> None:
    assert [parse_bytes(size) for size in ("5GB", "1.5 MB", "10kb", "7")] == [5 * 10**9, 1_500_000, 10_000, 7]
