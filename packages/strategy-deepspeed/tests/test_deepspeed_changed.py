"""Models with new tokens, adapters and four bits: under stage 3 they train as under torch. Only the last are loaded whole."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.models.loading.byte_tokenizer import TOKENS, byte_tokenizer
from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import changed_ranks as ranks
from test_deepspeed_building import ADAPTED, save_adapter

pytestmark = [pytest.mark.engines, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]

APART = ("time/", "speed/", "memory/", "padding")
"""Metrics that may differ: seconds and bytes, and rows that share a micro-batch."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, under torch and on two ranks."""
    folder = tmp_path_factory.mktemp("changed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=TOKENS + 2, **sizes, bos_token_id=None, pad_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        LlamaForCausalLM(config).save_pretrained(folder / "untied")
    byte_tokenizer(TOKENS).save_pretrained(folder / "untied")
    (folder / "tokens.txt").write_text("<think>\n</think>\n<tool>\n")
    if ADAPTED:
        save_adapter(str(folder / "untied"), folder / "adapter")
    done = run_ranks(2, ranks.shard, str(folder), ADAPTED)
    assert [rank.code for rank in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    whole = [line for rank in done for line in rank.stderr.splitlines() if "whole weights" in line]
    assert all("quantize" in line for line in whole), whole
    ranks.train(folder, ADAPTED, "torch", TorchStrategy("cpu"))
    return folder


@pytest.mark.parametrize("case", ranks.cases(Path(), ADAPTED))
def test_metrics_and_exported_weights_are_those_of_torch(case: str, trained: Path) -> None:
    ours, theirs = (torch.load(trained / name / case / "metrics.pt") for name in ("sharded", "torch"))
    assert "loss" in " ".join(theirs)
    for name in (name for name in theirs if not name.startswith(APART)):
        assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=1e-4), name
    for file in ("model.safetensors", "adapter_model.safetensors"):
        if (trained / "torch" / case / "model" / file).exists():
            found, expected = (load_file(trained / name / case / "model" / file) for name in ("sharded", "torch"))
            break
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-4)
    if "tokens" in case or case == "both":
        assert max(len(tensor) for tensor in expected.values()) == TOKENS + 3
