"""Names on the hub: models, adapters and heads are read from its cache, as offline machines have it."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from rlhf_core.cli.merge_lora import MergeLora
from rlhf_core.contract.options import Lora, ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.export.folder import export
from rlhf_core.models.heads.modules import HEADS_FILE
from rlhf_core.models.loading import hub
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.optional_imports import uses_peft
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.plugins.registry import Registry

peft = pytest.importorskip("peft")

OPTIONS = ModelOptions()
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of this test, and nobody to ask for more."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    hub._download.cache_clear()
    return folder


def cached(cache: Path, name: str, folder: Path) -> None:
    """Put `folder` into the cache as the repository `name`, laid out as huggingface_hub does."""
    revision, place = "0" * 40, cache / f"models--{name.replace('/', '--')}"
    copytree(folder, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)


def trained(base: str, folder: Path, output: str) -> torch.nn.Module:
    """A model whose adapters changed, saved."""
    options = TrainedOptions(model=base, lora=Lora(rank=4))
    role = RoleSpec("actor", options, frozenset({output}), terms=(("data", None),))  # type: ignore[arg-type]
    module = build_module(role)
    for parameter in module.adapters.parameters(module.model):  # type: ignore[union-attr]
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10
    export(module, load_tokenizer(base, OPTIONS), folder, base=base, algorithm="sft")
    model: torch.nn.Module = module.model
    return model


@pytest.fixture
def base(cache: Path, tmp_path: Path) -> str:
    """A language model on the hub."""
    load_model("tiny", OPTIONS).save_pretrained(tmp_path / "base")
    load_tokenizer("tiny", OPTIONS).save_pretrained(tmp_path / "base")
    cached(cache, "org/base", tmp_path / "base")
    return "org/base"


def test_an_adapter_on_the_hub_is_its_base_there_with_the_adapter_merged(
    base: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = trained(base, tmp_path / "adapter", "logprobs_NT")
    cached(cache, "org/adapter", tmp_path / "adapter")
    with torch.no_grad():
        expected = ours(IDS).logits
        torch.testing.assert_close(load_model("org/adapter", OPTIONS)(IDS).logits, expected, rtol=0, atol=1e-5)
        assert (load_model(base, OPTIONS)(IDS).logits - expected).abs().max() > 1e-3, "the adapter does something"
    assert [uses_peft(ModelOptions(model=name)) for name in ("org/adapter", base, "tiny")] == [True, False, False]
    assert load_tokenizer("org/adapter", OPTIONS).get_vocab() == load_tokenizer(base, OPTIONS).get_vocab()
    assert MergeLora("org/adapter", output=str(tmp_path / "merged"))(Registry()) == 0
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(str(tmp_path / "merged"), OPTIONS)(IDS).logits, expected, rtol=0, atol=1e-5
        )
    with pytest.raises(UsageError, match="this is a full model, not an adapter"):
        MergeLora(base, output=str(tmp_path / "again"))(Registry())


def test_a_reward_models_adapter_on_the_hub_brings_its_head(base: str, cache: Path, tmp_path: Path) -> None:
    ours = trained(base, tmp_path / "adapter", "scores_N")
    cached(cache, "org/judge", tmp_path / "adapter")
    model, found = load_scorer("org/judge", OPTIONS)
    assert found
    assert torch.equal(model.score.weight, ours.score.weight)  # type: ignore[union-attr]
    for name, parameter in model.model.named_parameters():
        if name.endswith("q_proj.weight"):
            assert not torch.equal(parameter, load_model(base, OPTIONS).model.get_parameter(name))


def test_a_value_head_on_the_hub_is_found(cache: Path, tmp_path: Path) -> None:
    model = load_model("tiny", OPTIONS)
    head_1H = torch.randn(1, model.config.hidden_size)
    model.save_pretrained(tmp_path / "trl", state_dict={**model.state_dict(), "v_head.summary.weight": head_1H})
    load_tokenizer("tiny", OPTIONS).save_pretrained(tmp_path / "trl")
    cached(cache, "org/trl", tmp_path / "trl")
    scorer, found = load_scorer("org/trl", OPTIONS)
    assert found
    assert torch.equal(scorer.score.weight, head_1H)


def test_a_head_of_its_own_file_is_found_on_the_hub(base: str, cache: Path, tmp_path: Path) -> None:
    head_1H = torch.randn(1, 64)
    file = next(cache.glob("models--org--base/snapshots/*")) / HEADS_FILE
    save_file({"value.weight": head_1H}, file)
    hub._download.cache_clear()
    both = frozenset({"logprobs_NT", "values_NT"})
    module = build_module(RoleSpec("critic", ModelOptions(model=base), both, terms=()))
    assert torch.equal(module.heads["value"].weight, head_1H)


def test_a_base_whose_configuration_lies_beside_its_adapter_is_not_taken_for_the_model(
    base: str, tmp_path: Path
) -> None:
    ours = trained(base, tmp_path / "adapter", "logprobs_NT")
    load_model(base, OPTIONS).config.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        again = load_model(str(tmp_path / "adapter"), OPTIONS)(IDS).logits
        torch.testing.assert_close(again, ours(IDS).logits, rtol=0, atol=1e-5)


def test_a_name_that_is_nowhere_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"cannot load 'org/nowhere': there is no such folder .*cannot be reached"):
        load_model("org/nowhere", OPTIONS)
