"""Adapters against plain PEFT and against matrices merged by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import rows, spec
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, MistralConfig

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import Lora, ModelOptions, RunConfig, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.launcher.local import Local
from rlhf_core.models.build import build_module
from rlhf_core.models.export.folder import export
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.byte_tokenizer import EOS, TOKENS, byte_tokenizer
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.optional_imports import quiet_bitsandbytes
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.models.module import RoleModule
from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyLoss
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.planner import make_plan

peft = pytest.importorskip("peft")

LOGPROBS = frozenset({"logprobs_NT"})
SMALL: dict[str, Any] = {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}


def disturbed(module: RoleModule, seed: int = 0) -> RoleModule:
    """With adapters that change something, as after training."""
    draw = torch.Generator().manual_seed(seed)
    assert module.adapters is not None
    with torch.no_grad():
        for parameter in module.adapters.parameters(module.model):
            parameter.normal_(0.0, 0.05, generator=draw)
    return module


def saved(folder: Path, tied: bool = True, gpt2: bool = False, hidden: int = 16) -> str:
    """A language model in a folder, drawn at random."""
    torch.manual_seed(1)
    config: Any = (
        GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        if gpt2
        else MistralConfig(
            **SMALL,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def logprobs(module: RoleModule) -> torch.Tensor:
    with torch.no_grad():
        return module(arrange_inputs(rows()[0]), LOGPROBS)["logprobs_NT"]


def test_new_adapters_change_nothing_and_only_they_are_trained() -> None:
    plain = build_module(spec("logprobs_NT"))
    adapted = build_module(spec("logprobs_NT", lora=Lora(rank=4)))
    assert torch.equal(logprobs(adapted), logprobs(plain))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert adapted.state_dict().keys() == trained, "a checkpoint holds what is trained"


def test_first_adapters_depend_on_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = build_module(spec("logprobs_NT", lora=Lora(rank=4)), seed=3).state_dict()
    torch.manual_seed(2)
    same = build_module(spec("logprobs_NT", lora=Lora(rank=4)), seed=3).state_dict()
    other = build_module(spec("logprobs_NT", lora=Lora(rank=4)), seed=4).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, ("all-linear",)),
        ({"tied": False}, ("all-linear", "lm_head")),
        ({"tied": False}, ("lm_head",)),
        ({"gpt2": True}, ("all-linear",)),
        ({}, ("q_proj", "v_proj")),
    ],
)
def test_an_adapter_folder_is_plain_peft(tmp_path: Path, options: dict[str, bool], targets: tuple[str, ...]) -> None:
    """PEFT loads it, gives the same logits, and merges it into the weights that rollout engines were given."""
    base = saved(tmp_path / "base", **options)
    module = disturbed(build_module(spec("logprobs_NT", model=base, lora=Lora(4, alpha=6, targets=targets)), chunk=3))
    export(module, load_tokenizer(base, ModelOptions()), tmp_path / "adapter", base=base, algorithm="sft")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(module.causal_lm(ids).logits, expected, rtol=0, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert (expected - plain(ids).logits).abs().max() > 1e-3, "the adapter does something"
    merged = dict(theirs.merge_and_unload().named_parameters())
    weights = dict(module.hf_weights())
    assert weights.keys() == merged.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, merged[name].detach(), rtol=0, atol=1e-6)
    again = load_model(str(tmp_path / "adapter"), ModelOptions())
    for name, tensor in again.named_parameters():
        torch.testing.assert_close(tensor.detach(), weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_gradient_of_an_adapter_on_the_head_is_that_of_peft(tmp_path: Path, chunk: int) -> None:
    base = saved(tmp_path, tied=False)
    module = disturbed(build_module(spec("logprobs_NT", model=base, lora=Lora(4, targets=("lm_head",))), chunk=chunk))
    batch, single = rows()
    module(arrange_inputs(batch), LOGPROBS)["logprobs_NT"].sum().backward()
    theirs = AutoModelForCausalLM.from_pretrained(base)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["lm_head"]), theirs)
    head, own = theirs.lm_head, module.causal_lm.lm_head
    with torch.no_grad():
        head.lora_A["default"].weight.copy_(own.lora_A)
        head.lora_B["default"].weight.copy_(own.lora_B)
    total = torch.zeros(())
    for prompt, completion in single:
        if len(completion):
            logits = theirs(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            total = total + logits.log_softmax(-1).gather(1, completion[:, None]).sum()
    total.backward()
    torch.testing.assert_close(own.lora_A.grad, head.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.lora_B.grad, head.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)
    assert own.weight.grad is None


def test_dropout_acts_in_training_passes_only() -> None:
    module = disturbed(build_module(spec("logprobs_NT", lora=Lora(rank=4, dropout=0.5))))
    inputs = arrange_inputs(rows()[0])
    assert torch.equal(logprobs(module), logprobs(module))
    first, second = (module(inputs, LOGPROBS)["logprobs_NT"].detach() for _ in range(2))
    assert not torch.allclose(first, second)
    without = disturbed(build_module(spec("logprobs_NT", lora=Lora(rank=4))))
    assert torch.equal(logprobs(module), logprobs(without))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_activations_changes_no_gradient(dropout: float) -> None:
    gradients = []
    for checkpointed in (False, True):
        options = {"lora": Lora(rank=4, dropout=dropout), "gradient_checkpointing": checkpointed}
        module = disturbed(build_module(spec("logprobs_NT", **options)))
        torch.manual_seed(0)  # what dropout draws
        module(arrange_inputs(rows()[0]), LOGPROBS)["logprobs_NT"].sum().backward()
        gradients.append([p.grad for p in module.adapters.parameters(module.model)])  # type: ignore[union-attr]
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(*gradients, strict=True))


def test_a_frozen_base_is_held_in_what_it_computes_in_and_adapters_in_float32() -> None:
    module = build_module(spec("logprobs_NT", dtype="bfloat16", lora=Lora(rank=4)))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in module.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------------
# classifiers
# ----------------------------------------------------------------------------------------------------------------------


def test_an_adapted_reward_model_is_plain_peft_with_its_head(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    module = disturbed(build_module(spec("scores_N", name="reward", model=base, lora=Lora(rank=4))))
    assert module.model.score.weight.requires_grad, "the head is new and must be learnt"
    export(module, load_tokenizer(base, ModelOptions()), tmp_path / "adapter", base=base, algorithm="reward")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    batch, single = rows()
    with torch.no_grad():
        scores_N = module(arrange_inputs(batch), frozenset({"scores_N"}))["scores_N"]
        for n, row in enumerate(single):
            expected = theirs(torch.cat(row)[None]).logits[0, 0]
            torch.testing.assert_close(scores_N[n], expected, rtol=0, atol=1e-5)
    again = build_module(spec("scores_N", name="reward", model=str(tmp_path / "adapter"), trained=False))
    with torch.no_grad():
        found_N = again(arrange_inputs(batch), frozenset({"scores_N"}))["scores_N"]
    torch.testing.assert_close(found_N, scores_N, rtol=0, atol=1e-5)


def test_a_reward_model_can_start_from_an_adapted_policy(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    policy = disturbed(build_module(spec("logprobs_NT", model=base, lora=Lora(rank=4))))
    export(policy, load_tokenizer(base, ModelOptions()), tmp_path / "adapter", base=base, algorithm="sft")
    scorer, found = load_scorer(str(tmp_path / "adapter"), ModelOptions())
    assert not found, "its head is new"
    weights = dict(policy.hf_weights())
    for name, tensor in scorer.base_model.named_parameters():
        torch.testing.assert_close(tensor.detach(), weights[f"model.{name}"], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# roles
# ----------------------------------------------------------------------------------------------------------------------


class Anchored(Algorithm):
    """A policy gradient that reads a reference."""

    def __init__(self, needs: frozenset[str] = frozenset({"ref_logprobs_NT"})) -> None:
        self.loss = type("Loss", (TinyLoss,), {"needs": needs | TinyLoss.needs})()

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "data", self.loss, TinyAdvantage()),)


def placed(reference: ModelOptions | None = None, **options: Any) -> tuple[LocalRole, LocalRole]:
    """An adapted actor and its reference, as the launcher of one process places them."""
    chosen = {"lora": Lora(rank=4), "optim": AdamW(lr=1e-2), **options}
    roles = {"actor": TrainedOptions(**chosen), "reference": reference or ModelOptions()}
    config = RunConfig(Anchored(), {"strategy": TorchStrategy(device="cpu")}, {}, roles, model="tiny")  # type: ignore[arg-type]
    local: Any = Local()(make_plan(config)).roles
    disturbed(local["actor"].module)
    return local["actor"], local["reference"]


def test_the_reference_is_the_actor_without_adapters_and_costs_no_memory() -> None:
    actor, reference = placed()
    assert reference.module is actor.module
    batch = rows()[0]
    copy = LocalRole(reference.plan, "reference")
    assert copy.module is not actor.module
    before = actor.infer(batch, LOGPROBS)["logprobs_NT"]
    assert torch.equal(reference.infer(batch, LOGPROBS)["logprobs_NT"], copy.infer(batch, LOGPROBS)["logprobs_NT"])
    assert torch.equal(actor.infer(batch, LOGPROBS)["logprobs_NT"], before), "and the adapters are on again"
    assert not torch.allclose(before, copy.infer(batch, LOGPROBS)["logprobs_NT"])
    lent, own = dict(reference.weights()), dict(copy.weights())
    assert all(torch.equal(lent[name], own[name]) for name in own)


@pytest.mark.parametrize(
    "reference",
    [ModelOptions(model="tiny:seed=1"), ModelOptions(dtype="bfloat16"), ModelOptions(attention="eager")],
)
def test_another_model_is_a_model_of_its_own(reference: ModelOptions, capsys: pytest.CaptureFixture[str]) -> None:
    actor, other = placed(reference)
    assert other.module is not actor.module
    said = capsys.readouterr().err
    if reference.model:
        assert "cannot share its base" not in said, "it is meant to be another model"
    else:
        reason = "dtype is bfloat16, not float32" if reference.dtype == "bfloat16" else "attention is eager, not sdpa"
        assert f"the reference is loaded in addition to the actor and cannot share its base: {reason}" in said


def test_a_dtype_of_the_run_is_that_of_all_roles_and_the_base_stays_shared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    roles = {"actor": TrainedOptions(lora=Lora(rank=4)), "reference": ModelOptions()}
    config = RunConfig(Anchored(), {"strategy": TorchStrategy(device="cpu")}, {}, roles, model="tiny", dtype="bfloat16")  # type: ignore[arg-type]
    actor, reference = Local()(make_plan(config)).roles.values()
    assert reference.module is actor.module  # type: ignore[attr-defined]
    assert actor.module.compute_dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert "is loaded in addition" not in capsys.readouterr().err
    own = replace(config, roles={**roles, "reference": ModelOptions(dtype="float32")})
    assert make_plan(own).roles["reference"].options.dtype == "float32", "a role's own dtype is kept"
    assert make_plan(own).roles["actor"].options.dtype == "bfloat16"


def test_without_adapters_nothing_is_shared() -> None:
    roles = {"actor": TrainedOptions(), "reference": ModelOptions()}
    plan = make_plan(RunConfig(Anchored(), {"strategy": TorchStrategy(device="cpu")}, {}, roles, model="tiny"))  # type: ignore[arg-type]
    assert plan.base_owner("reference") == ""


def test_a_step_leaves_the_base_as_it_was_and_a_checkpoint_is_small(tmp_path: Path) -> None:
    actor, _ = placed()
    base = {name: p.clone() for name, p in actor.module.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in actor.module.named_parameters() if p.requires_grad}
    batch = rows()[0]
    actor.trainable.backward(actor.trainable.forward(batch, LOGPROBS)["logprobs_NT"].sum())
    actor.trainable.step()
    now = dict(actor.module.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert all(not torch.equal(now[name], value) for name, value in before.items())
    actor.save(str(tmp_path))
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    adapters = sum(p.numel() * 4 for p in before.values())
    assert held < 3 * adapters + 40_000, "adapters and AdamW's two moments, and names"
    trained = {name: now[name].clone() for name in before}
    fresh, _ = placed()
    fresh.load(str(tmp_path))
    found = dict(fresh.module.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in trained.items())


def test_a_copy_that_takes_merged_weights_has_no_adapters() -> None:
    """Check the copy of a remote role in a rollout engine's process."""
    actor, _ = placed()
    mirror = LocalRole(actor.plan, "actor", frozen=True)
    assert mirror.module.adapters is None
    mirror.load_weights(actor.weights())
    batch = rows()[0]
    ours, theirs = (role.infer(batch, LOGPROBS)["logprobs_NT"] for role in (actor, mirror))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            Lora(4, targets=("q_prj",)),
            "actor.lora.targets q_prj: no linear layer of the model has this name; choose among",
        ),
        (Lora(4, targets=("lm_head",)), "the head of this model is tied to its embedding"),
        (Lora(4, targets=("embed_tokens",)), "no linear layer"),
    ],
)
def test_targets_that_cannot_be_adapted_are_told_in_one_line(lora: Lora, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_module(spec("logprobs_NT", lora=lora))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_weights_need_adapters() -> None:
    with pytest.raises(UsageError, match="add adapters"):
        TrainedOptions(quantize="nf4")
    with pytest.raises(UsageError, match="cannot be quantized"):
        build_module(spec("logprobs_NT", lora=Lora(rank=4), quantize="nf4"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_core.models.loading import optional_imports as extras

    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"rlhf-core\[lora\]"):
        build_module(spec("logprobs_NT", lora=Lora(rank=4)))


def test_of_bitsandbytes_one_message_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    quiet_bitsandbytes()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    assert not caplog.messages
    logger.warning("no library of 4 bits was found")
    assert caplog.messages == ["no library of 4 bits was found"]


def test_weights_in_four_bits_are_whole_when_others_read_them(tmp_path: Path) -> None:
    """On the CPU, where bitsandbytes is installed."""
    functional = pytest.importorskip("bitsandbytes.functional")
    base = saved(tmp_path / "base", hidden=64)
    options = {"model": base, "lora": Lora(rank=4), "quantize": "nf4"}
    module = disturbed(build_module(spec("logprobs_NT", **options)))
    layer = module.causal_lm.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = dict(module.hf_weights())
    assert merged.keys() == dict(plain.named_parameters()).keys()
    whole = functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    expected = whole + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(merged["model.layers.0.self_attn.q_proj.weight"], expected, rtol=0, atol=1e-6)
    plain.load_state_dict(merged, strict=False)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, module.causal_lm(ids).logits, rtol=0, atol=1e-3)
    module(arrange_inputs(rows()[0]), LOGPROBS)["logprobs_NT"].sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    frozen = build_module(replace(spec("logprobs_NT", trained=False, model=base, quantize="nf4")))
    with module.without_adapters():
        assert torch.allclose(logprobs(module), logprobs(frozen), atol=1e-5)
