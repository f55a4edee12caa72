"""A model that stage 3 has sharded is exported a file at a time: no host holds the whole of it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.models.export.shards import parse_bytes
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and this file is not one
from export_ranks import BUCKET, SHARD, export

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that two ranks wrote."""
    place = tmp_path_factory.mktemp("export")
    done = run_ranks(2, export, str(place))
    assert [rank.code for rank in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    return place


def test_plain_transformers_loads_it_bit_for_bit(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    files = sorted((folder / "model").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 2 * parse_bytes(SHARD) for file in files)
    assert (folder / "model" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = torch.load(folder / "found.pt", weights_only=False)["expected"]
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_no_rank_holds_more_than_a_file_and_what_is_gathered_at_once(folder: Path) -> None:
    found = torch.load(folder / "found.pt", weights_only=False)
    sizes = [4 * tensor.numel() for tensor in found["expected"].values()]
    bucket = max(4 * BUCKET, max(sizes))
    writer, other = found["most"]
    assert writer <= parse_bytes(SHARD) + bucket + 2 * max(sizes) < sum(sizes) / 2
    assert other <= bucket + 2 * max(sizes)


def test_the_average_is_written_in_files_too(folder: Path) -> None:
    files = sorted((folder / "model-ema").glob("*.safetensors"))
    average = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = torch.load(folder / "found.pt", weights_only=False)["expected"]
    assert len(files) > 3 and average.keys() == expected.keys()
    assert all(torch.equal(average[name], tensor) for name, tensor in expected.items()), "nothing was trained"
