"""Averages, frozen parts and routers of a trained role, against closed forms and transformers' own losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import rows, spec
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import Lora, ModelOptions, RunConfig, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.results import LossTerms, Outputs, Reduction
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.ema import Average
from rlhf_core.models.freezing import matches_pattern, parameter_size
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.byte_tokenizer import TOKENS
from rlhf_core.models.loading.load import load_model
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.strategy.torch import TorchStrategy, TorchTrainable
from rlhf_core.testing.tiny_algorithm import TinyLoss
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.planner import make_plan

LOGPROBS = frozenset({"logprobs_NT"})


class Likelihood(TinyLoss):
    """Minus the log-probability of the tokens."""

    needs = frozenset()

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-outputs["logprobs_NT"], Reduction("token"))


class Once(Algorithm):
    """One term on given completions."""

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "data", Likelihood()),)


def role(strategy: Any = None, micro_tokens: int = 8192, **options: Any) -> LocalRole:
    """An actor in this process."""
    roles = {"actor": TrainedOptions(**{"model": "tiny", "optim": AdamW(lr=1e-2), **options})}
    providers = {"strategy": strategy or TorchStrategy(device="cpu")}
    config = RunConfig(Once(), providers, {}, roles, model="tiny", micro_tokens=micro_tokens)  # type: ignore[arg-type]
    plan = make_plan(config)
    return LocalRole(plan, "actor")


# ----------------------------------------------------------------------------------------------------------------------
# averages
# ----------------------------------------------------------------------------------------------------------------------


def test_the_average_of_weights_that_move_evenly_lags_by_a_closed_form() -> None:
    """With w_t = t, begun at w_0 = 0: a_t = t - decay (1 - decay^t) / (1 - decay)."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average, decay = Average(module, 0.9), 0.9
    average.begin(module)
    for t in range(1, 8):
        with torch.no_grad():
            module.weight += 1
        average.update(module)
        (held,) = average.buffers()
        assert float(held) == pytest.approx(t - decay * (1 - decay**t) / (1 - decay), rel=1e-6)
        assert float(module.weight.detach()) == t


def test_the_average_stays_in_float32_while_the_module_changes_its_dtype() -> None:
    module = nn.Linear(3, 3)
    module.average = Average(module, 0.5)
    module.average.begin(module)
    module.bfloat16()
    assert {buffer.dtype for buffer in module.average.buffers()} == {torch.float32}
    assert module.weight.dtype == torch.bfloat16


class Replaced(TorchTrainable):
    """Puts new objects in the place of the module's parameters, as strategies that shard do."""

    def __init__(self, module: Any, *rest: Any) -> None:
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, fresh)
        module.model.tie_weights()
        super().__init__(module, *rest)


@dataclass(frozen=True)
class Replacing(TorchStrategy):
    """A strategy that keeps none of the parameters it is given."""

    def __call__(self, build: Any, optim: Any, total_steps: int) -> TorchTrainable:
        return Replaced(build(), optim, total_steps, torch.device("cpu"))


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=4)])
def test_parameters_are_found_by_name_when_a_strategy_replaces_them(lora: Lora, tmp_path: Path) -> None:
    """Adapters, merged weights and averages of a module whose parameters are other objects equal those of `torch`."""
    if lora.rank:
        pytest.importorskip("peft")
    found, expected = role(Replacing(), ema=0.5, lora=lora), role(ema=0.5, lora=lora)
    before = {name: tensor.clone() for name, tensor in expected.weights()}
    for actor, name in ((found, "found"), (expected, "expected")):
        actor.train({"data": rows()[0]})
        actor.export(str(tmp_path / name))
    weights, wanted = dict(found.weights()), dict(expected.weights())
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(wanted[name], before[name]) for name in wanted), "training changed what is compared"
    for folder in ("", "-ema"):
        (file,) = (tmp_path / f"expected{folder}").glob("*model.safetensors")
        ours, theirs = load_file(tmp_path / f"found{folder}" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_average_is_refused_before_training_where_weights_are_held_nowhere() -> None:
    class Freed(TorchTrainable):
        """Frees weights between steps, and holds no share of them."""

        sharded = True

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            for parameter in self.module.parameters():
                parameter.data = parameter.data.new_empty(0)

    with pytest.raises(
        UsageError,
        match=r"actor.ema 0.9: the moving average needs weights between steps, which strategy .* does not keep",
    ):
        role(lambda build, optim, steps: Freed(build(), optim, steps, torch.device("cpu")), ema=0.9)


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=4)])
def test_an_average_follows_training_and_is_in_the_checkpoint(lora: Lora, tmp_path: Path) -> None:
    if lora.rank:
        pytest.importorskip("peft")
    actor = role(ema=0.5, lora=lora)
    name, first = next((n, p.detach().clone()) for n, p in actor.module.named_parameters() if p.requires_grad)
    seen = first
    for _ in range(3):
        actor.train({"data": rows()[0]})
        now = dict(actor.module.named_parameters())[name].detach().clone()
        seen = 0.5 * seen + 0.5 * now
    held = getattr(actor.average, name.replace(".", "/"))
    torch.testing.assert_close(held, seen, rtol=1e-6, atol=1e-7)
    actor.save(str(tmp_path))
    fresh = role(ema=0.5, lora=lora)
    fresh.load(str(tmp_path))
    for (_, ours), (_, theirs) in zip(actor.average.named_buffers(), fresh.average.named_buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("export", ["beside", "model"])
def test_the_average_is_exported_beside_the_model_or_in_its_place(export: str, tmp_path: Path) -> None:
    actor = role(ema=0.9, ema_export=export)
    actor.train({"data": rows()[0]})
    live = {name: tensor.clone() for name, tensor in actor.weights()}
    actor.export(str(tmp_path / "model"))
    assert all(torch.equal(tensor, live[name]) for name, tensor in actor.weights()), "the role goes on as it was"
    place = tmp_path / ("model" if export == "model" else "model-ema")
    averaged = AutoModelForCausalLM.from_pretrained(place)
    assert averaged.lm_head.weight is averaged.model.embed_tokens.weight, "tied weights stay tied"
    held = {name: getattr(actor.average, f"model/{name.replace('.', '/')}") for name in live}
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter.detach(), held[name])
        assert not torch.equal(parameter.detach(), live[name])
    assert (tmp_path / "model-ema").exists() == (export == "beside")
    if export == "beside":
        found = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(found[name], live[name]) for name in found)


# ----------------------------------------------------------------------------------------------------------------------
# frozen parts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.0", "model.layers.0.mlp.up_proj.weight", True),
        ("layers.0", "model.layers.10.mlp.up_proj.weight", False),
        ("layers.0-3", "model.layers.3.mlp.up_proj.weight", True),
        ("layers.0-3", "model.layers.4.mlp.up_proj.weight", False),
        ("layers.*.mlp", "model.layers.4.mlp.up_proj.weight", True),
        ("layers.mlp", "model.layers.4.mlp.up_proj.weight", False),
        ("*_proj", "model.layers.4.mlp.up_proj.weight", True),
        ("norm", "model.layers.4.input_layernorm.weight", False),
        ("norm", "model.norm.weight", True),
    ],
)
def test_the_parts_of_a_pattern_stand_in_a_row_in_the_name(pattern: str, name: str, expected: bool) -> None:
    assert matches_pattern(pattern, name) == expected


def trained(*patterns: str, outputs: str = "logprobs_NT", **options: Any) -> set[str]:
    module = build_module(spec(outputs, freeze=patterns, **options))
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_frozen_parts_do_not_move_and_are_in_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    actor = role(freeze=("embed,layers.0",))
    every, layer = (sum(p.numel() for p in m.parameters()) for m in (actor.module, actor.module.model.model.layers[0]))
    left, embed = every - TOKENS * 64 - layer, TOKENS * 64
    expected = f"the actor trains {left:,} of {every:,} parameters (frozen: embed {embed:,}, layers.0 {layer:,})"
    assert expected in capsys.readouterr().err
    before = {name: parameter.detach().clone() for name, parameter in actor.module.named_parameters()}
    actor.train({"data": rows()[0]})
    moved = {name for name, p in actor.module.named_parameters() if not torch.equal(p.detach(), before[name])}
    frozen = {name for name in before if "layers.0." in name or "embed_tokens" in name}
    assert moved == before.keys() - frozen
    assert actor.module.state_dict().keys() == moved
    actor.save(str(tmp_path))
    fresh = role(freeze=("embed,layers.0",))
    fresh.load(str(tmp_path))
    ours, theirs = dict(actor.weights()), dict(fresh.weights())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_head_alone_can_be_trained() -> None:
    assert trained("body", outputs="scores_N", name="reward") == {"model.score.weight"}


def test_a_parameter_whose_numbers_other_ranks_hold_is_counted_whole() -> None:
    """DeepSpeed's stage 3 leaves an empty tensor and says how many numbers it stands for."""
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_numel = 12
    assert parameter_size(parameter) == 12 and parameter_size(nn.Parameter(torch.empty(2, 3))) == 6


def test_adapters_of_frozen_layers_are_frozen_too() -> None:
    pytest.importorskip("peft")
    left = trained("layers.0", lora=Lora(rank=4))
    assert left
    assert all("layers.1." in name and "lora" in name for name in left)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer.0", "actor.freeze layer.0 matches no parameter of the model"),
        ("embed_token", "did you mean 'embed_tokens'?"),
        ("*", "leaves nothing to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_mistakes(pattern: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        trained(pattern)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# mixtures of experts
# ----------------------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, head_dim=8),
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_router_loss_has_the_gradient_of_transformers_own(name: str, packing: bool, tmp_path: Path) -> None:
    """Theirs is a padded batch with its mask, `output_router_logits=True` and nothing else in the loss."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    module = build_module(spec("logprobs_NT", model=str(tmp_path), router_aux_coef=0.5, packing=packing))
    batch, single = rows()
    ours = module(arrange_inputs(batch), LOGPROBS | {"router_loss"})["router_loss"]
    ours.backward()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = [torch.cat(row) for row in single]
    longest = max(map(len, whole))
    ids_NS = torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in whole])
    mask_NS = torch.stack([(torch.arange(longest) < len(row)).long() for row in whole])
    expected = theirs(input_ids=ids_NS, attention_mask=mask_NS, output_router_logits=True).aux_loss
    expected.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    named, moved = dict(module.model.named_parameters()), 0
    for key, parameter in theirs.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            torch.testing.assert_close(named[key].grad, parameter.grad, rtol=1e-4, atol=1e-7)
            moved += 1
    assert moved


def test_a_role_adds_the_router_loss_to_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM(CONFIGS["mixtral"]).save_pretrained(tmp_path)
    load_tokenizer("tiny", ModelOptions()).save_pretrained(tmp_path)
    plain = role(model=str(tmp_path)).train({"data": rows()[0]})
    balanced = role(model=str(tmp_path), router_aux_coef=0.5).train({"data": rows()[0]})
    aux = balanced["actor/router_loss"]
    assert aux > 0.5
    assert balanced["loss/actor"] == pytest.approx(plain["loss/actor"] + 0.5 * aux, rel=1e-5)
    cut = role(model=str(tmp_path), router_aux_coef=0.5, micro_tokens=16).train({"data": rows()[0]})
    assert cut["actor/router_loss"] == pytest.approx(aux, rel=0.5), "the mean of the micro-batches'"


def test_a_model_without_experts_has_no_router_loss() -> None:
    with pytest.raises(UsageError, match="has no auxiliary router loss; leave it out"):
        build_module(spec("logprobs_NT", router_aux_coef=0.1))


# ----------------------------------------------------------------------------------------------------------------------
# attention
# ----------------------------------------------------------------------------------------------------------------------


def test_capped_attention_is_not_left_to_sdpa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' sdpa ignores the cap; with a small one the numbers differ."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_experts_per_tok"}
    config = Gemma2Config(**sizes, head_dim=8, attn_logit_softcapping=0.05, query_pre_attn_scalar=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    found = load_model(str(tmp_path), ModelOptions())
    assert "caps attention logits, which sdpa does not support, so it uses eager attention" in capsys.readouterr().err
    ids = torch.randint(5, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=each) for each in ("eager", "sdpa")
    )
    with torch.no_grad():
        assert torch.equal(found(ids).logits, eager(ids).logits)
        assert not torch.allclose(eager(ids).logits, sdpa(ids).logits, atol=1e-3)
