"""A role's adapters come apart from its weights, and the engine samples with both as if they were merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Lora, Sampling, TrainedOptions
from rlhf_core.errors import OptionError, RunStopped, UsageError
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.adapters import FOLDERS, AdapterFolders
from rlhf_rollout_vllm.arguments import lora_arguments
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

GREEDY = Sampling(n=1, max_new_tokens=12, temperature=0.0)
LORA = Lora(rank=4, alpha=8)

FAULTS = ["a doubled scale", "a stale adapter", "a factor of zeros"]

PLACES = ["trainer", pytest.param("own", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def adapted() -> LocalRole:
    """A tiny actor with adapters, whose weights under them are far from flat."""
    pytest.importorskip("peft")
    actor = TrainedOptions(model="tiny", lora=LORA)
    sampling = Sampling(n=2, max_new_tokens=8, temperature=0.7)
    role = LocalRole(tiny_run("unused", sampling=sampling, actor=actor).plan, "actor")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in role.module.named_parameters():
            if "lora_" not in name:
                tensor.copy_(0.25 * torch.randn(tensor.shape, generator=generator) + (tensor.dim() == 1))
    return role


@pytest.fixture(scope="module", params=PLACES)
def apart(request: pytest.FixtureRequest) -> Iterator[VLLMEngines]:
    """The open provider with adapters apart, in this process and in processes of its own."""
    provider = VLLMEngines(VLLM(process=request.param, lora="adapter", kv_cache_gib=0.25, max_num_seqs=64))
    yield provider
    provider.close()


@pytest.fixture
def texts(adapted: LocalRole, make_prompts: Callable[..., Prompts]) -> Prompts:
    return make_prompts(adapted, ["Hello", "What is the colour of the sky?", "1 2 3", "x"])


def _train(role: LocalRole, seed: int) -> None:
    """Other adapters, with an update as large as the weights, and a new version."""
    assert role.module.adapters is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in role.module.adapters.parameters(role.module.model):
            factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    role.version += 1


@pytest.mark.vllm
def test_adapters_sample_what_hf_samples_before_and_after_updates(
    apart: VLLMEngines, adapted: LocalRole, texts: Prompts
) -> None:
    seen = []
    for seed in (1, 2):
        _train(adapted, seed)
        apart.sync(adapted)
        seen.append(apart(adapted, texts, GREEDY))
        _same(seen[-1], HuggingFaceRollout()(adapted, texts, GREEDY))
        assert seen[-1].version == adapted.version
    assert seen[0].tokens_NT.tolist() != seen[1].tokens_NT.tolist()


@pytest.mark.vllm
def test_adapters_apart_give_the_numbers_of_merged_ones(apart: VLLMEngines, adapted: LocalRole, texts: Prompts) -> None:
    merged = VLLMEngines(VLLM(kv_cache_gib=0.25, max_num_seqs=64))
    sampling = Sampling(n=2, max_new_tokens=12, temperature=0.7)
    _train(adapted, 3)
    apart.sync(adapted)
    _same(apart(adapted, texts, sampling), merged(adapted, texts, sampling))
    merged.close()


@pytest.mark.vllm
def test_an_update_brings_the_adapters_alone(apart: VLLMEngines, adapted: LocalRole, texts: Prompts) -> None:
    apart(adapted, texts, GREEDY)
    _train(adapted, 4)
    metrics = apart.sync(adapted)
    assert adapted.module.adapters is not None
    factors = adapted.module.adapters.parameters(adapted.module.model)
    size = sum(4 * factor.numel() for factor in factors)
    assert size <= metrics["sync/bytes"] < size + 16384, "the files have names and a configuration besides"
    assert metrics["sync/calls"] == 0


@pytest.mark.vllm
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_adapter_stops_the_run_at_the_first_update(
    apart: VLLMEngines, adapted: LocalRole, texts: Prompts, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    apart(adapted, texts, GREEDY)
    apart.engines["actor"].updates = 1
    before = apart.engines["actor"].adapters
    assert before is not None
    assert before.newest is not None
    old = load_file(Path(before.newest.folder) / "adapter_model.safetensors")
    right = adapted.save_adapters

    def wrong(folder: str) -> bool:
        right(folder)
        config, tensors = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
        if fault == "a doubled scale":
            found = json.loads(config.read_text())
            config.write_text(json.dumps(found | {"lora_alpha": 2 * found["lora_alpha"]}))
        elif fault == "a stale adapter":
            save_file(old, tensors)
        else:
            found = load_file(tensors)
            save_file(found | {name: 0 * each for name, each in list(found.items())[:1]}, tensors)
        return True

    monkeypatch.setattr(adapted, "save_adapters", wrong)
    _train(adapted, 10 + FAULTS.index(fault))
    with pytest.raises(RunStopped, match="after the first update, log-probabilities of rollout 'vllm' differ"):
        apart.sync(adapted)


def test_folders_of_old_versions_are_removed(adapted: LocalRole) -> None:
    folders = AdapterFolders()
    written = [folders.write(adapted) for _ in range(FOLDERS + 2)]
    assert [Path(each.folder).is_dir() for each in written] == [False] * 2 + [True] * FOLDERS
    assert [each.number for each in written] == list(range(1, FOLDERS + 3)), "vLLM tells adapters apart by these"
    folders.close()
    assert not Path(written[-1].folder).parent.exists()


def test_the_weights_under_the_adapters_do_not_change_with_them(adapted: LocalRole) -> None:
    before = {name: tensor.clone() for name, tensor in adapted.base_weights()}
    _train(adapted, 6)
    after, merged = dict(adapted.base_weights()), dict(adapted.weights())
    assert before.keys() == after.keys() == merged.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert not merged["model.layers.0.mlp.up_proj.weight"].equal(after["model.layers.0.mlp.up_proj.weight"])


def test_a_role_without_adapters_is_a_users_mistake(role: LocalRole) -> None:
    folders = AdapterFolders()
    with pytest.raises(
        OptionError, match=r"adapter is for roles with LoRA .* 'actor' has none here; pass lora = \"merged\""
    ):
        folders.write(role)
    folders.close()


def test_ranks_are_rounded_up_to_those_of_vllm() -> None:
    assert [lora_arguments(rank)["max_lora_rank"] for rank in (1, 4, 8, 9, 512)] == [1, 8, 8, 16, 512]
    assert lora_arguments(0) == {}
    with pytest.raises(OptionError, match="adapter takes ranks up to 512, not 513"):
        lora_arguments(513)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"server": ("http://127.0.0.1:1",)}, "server"),
        ({"process": "own", "transfer": "nccl"}, "transfer"),
        ({"enable_sleep": True}, "enable_sleep"),
        ({"quantization": "fp8_per_tensor"}, "quantization"),
    ],
)
def test_options_that_do_not_go_with_adapters_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=f"lora adapter does not go with {name}; pass lora"):
        VLLM(lora="adapter", **options)


def _same(ours: Rollouts, theirs: Rollouts) -> None:
    assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
    torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-3)
