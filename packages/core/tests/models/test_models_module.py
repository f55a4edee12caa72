"""A role's outputs against the Hugging Face model's own forward pass, row by row, without padding or batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import rows, spec
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MistralConfig,
    PreTrainedModel,
)

from rlhf_core.errors import UsageError
from rlhf_core.models import build
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, TOKENS, byte_tokenizer
from rlhf_core.models.module import RoleModule

ALL = frozenset({"logprobs_NT", "entropy_NT", "values_NT", "scores_N"})


def by_hand(model: Any, single: list[tuple[Tensor, Tensor]], T: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N, T), a loop over rows and tokens on the model's own logits."""
    logprobs_NT, entropy_NT = torch.zeros(len(single), T).double(), torch.zeros(len(single), T).double()
    for n, (prompt, completion) in enumerate(single):
        logits = model(torch.cat([prompt, completion])[None]).logits[0].double() / temperature
        for t, token in enumerate(completion.tolist()):
            everything = logits[len(prompt) + t - 1].log_softmax(-1)
            logprobs_NT[n, t] = everything[token]
            entropy_NT[n, t] = -(everything.exp() * everything).sum()
    return logprobs_NT, entropy_NT


def double(module: RoleModule) -> RoleModule:
    """The module in float64, where only a mistake can differ."""
    return module.double()


@pytest.mark.parametrize("chunk", [0, 3, 1024])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probabilities_are_those_of_the_plain_model(chunk: int, attention: str) -> None:
    module = double(build_module(spec("logprobs_NT", attention=attention), chunk=chunk, temperature=0.7))
    batch, single = rows()
    outputs = module(arrange_inputs(batch), frozenset({"logprobs_NT", "entropy_NT"}))
    logprobs_NT, entropy_NT = by_hand(module.causal_lm, single, 9, temperature=0.7)
    torch.testing.assert_close(outputs["logprobs_NT"], logprobs_NT, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs["entropy_NT"], entropy_NT, rtol=0, atol=1e-6)
    assert outputs["logprobs_NT"][~batch.mask_NT].abs().max() == 0


def test_outputs_are_float32_and_gradients_reach_every_weight() -> None:
    module = build_module(spec(*ALL))
    outputs = module(arrange_inputs(rows()[0]), ALL)
    assert {value.dtype for value in outputs.values()} == {torch.float32}
    sum(value.sum() for value in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_padding_never_matters() -> None:
    """Neither more columns nor other tokens in them, and rows can come in any order or alone."""
    module = build_module(spec(*ALL))
    batch, _ = rows()
    wider, _ = rows(extra=4)
    whole, padded = module(arrange_inputs(batch), ALL), module(arrange_inputs(wider), ALL)
    for name in ALL:
        same = padded[name][:, :9] if name.endswith("_NT") else padded[name]
        torch.testing.assert_close(same, whole[name])
    for order in ([4, 0, 2], [3], [1]):
        part = batch.rows(order)
        found = module(arrange_inputs(part), ALL)
        for name in ALL:
            expected = whole[name][order]
            torch.testing.assert_close(
                found[name], expected[:, : part.tokens_NT.shape[1]] if "NT" in name else expected
            )


def test_a_value_is_of_the_state_before_its_token_and_a_score_of_the_last_token() -> None:
    """By hand: prompt of p tokens, the value of completion token t is the head on state p + t - 1."""
    module = double(build_module(spec("values_NT", "scores_N", name="critic")))
    batch, single = rows()
    outputs = module(arrange_inputs(batch), frozenset({"values_NT", "scores_N"}))
    value, score = (module.scalar_head(name).weight[0] for name in ("value", "score"))
    for n, (prompt, completion) in enumerate(single):
        states = module.model.base_model(torch.cat([prompt, completion])[None])[0][0]
        for t in range(len(completion)):
            assert outputs["values_NT"][n, t].item() == pytest.approx(
                (states[len(prompt) + t - 1] @ value).item(), abs=1e-6
            )
        assert outputs["scores_N"][n].item() == pytest.approx((states[-1] @ score).item(), abs=1e-6)
    assert outputs["values_NT"][~batch.mask_NT].abs().max() == 0


def test_a_reward_role_is_the_sequence_classifier_of_transformers() -> None:
    """Its own forward pass, padded on the right as its tokenizer would, gives the same scores."""
    module = build_module(spec("scores_N", name="reward"))
    batch, _ = rows()
    inputs = arrange_inputs(batch)
    lengths_N1 = (batch.prompt_lengths_N + batch.lengths_N)[:, None]
    padded_NS = inputs.ids_NS.masked_fill(
        torch.arange(inputs.ids_NS.shape[1]) >= lengths_N1, module.model.config.pad_token_id
    )
    scores_N = module.model(padded_NS).logits.squeeze(1)
    torch.testing.assert_close(module(inputs, frozenset({"scores_N"}))["scores_N"], scores_N)


TOKENS_OF = {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS_OF}

CONFIGS = {
    "mistral": MistralConfig(sliding_window=4, num_key_value_heads=2, **SIZES),
    "gemma2": Gemma2Config(final_logit_softcapping=0.5, sliding_window=4, num_key_value_heads=2, head_dim=8, **SIZES),
    "granite": GraniteConfig(logits_scaling=4.0, num_key_value_heads=2, **SIZES),
    "cohere": CohereConfig(logit_scale=0.25, num_key_value_heads=2, **SIZES),
    "gpt2": GPT2Config(attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5, n_embd=32, n_layer=2, n_head=4, **TOKENS_OF),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of an architecture with a peculiarity."""
    path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[request.param])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sliding_windows_soft_caps_and_logit_scales_are_as_in_the_plain_model(folder: Path) -> None:
    """Without a padding mask, in the attention of each architecture, and in training mode where it has dropout."""
    module = build_module(spec("logprobs_NT", model=str(folder)))
    attention = "eager" if folder.name.startswith("gemma2") else "sdpa"  # which has no cap on attention logits
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention).eval()
    batch, single = rows()
    outputs = double(module).train()(arrange_inputs(batch), frozenset({"logprobs_NT"}))
    torch.testing.assert_close(outputs["logprobs_NT"], by_hand(plain, single, 9)[0], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_architecture_without_a_classifier_gets_a_head_of_its_own(folder: Path) -> None:
    """Cohere and Granite have none in transformers; the others are classifiers."""
    module = build_module(spec("values_NT", name="critic", model=str(folder)))
    own = folder.name.startswith(("cohere", "granite"))
    assert set(module.heads) == ({"value"} if own else set())
    values_NT = module(arrange_inputs(rows()[0]), frozenset({"values_NT"}))["values_NT"]
    assert values_NT.abs().max() > 0


def test_a_model_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that scales its logits in a way unknown here would train on wrong numbers."""
    monkeypatch.setattr(build, "head_options", lambda config: {"scale": 2.0})
    with pytest.raises(UsageError, match="computes its logits in an unsupported way"):
        build_module(spec("logprobs_NT", model="tiny"))


def test_gradient_checkpointing_recomputes_and_changes_no_gradient() -> None:
    """The MLP of a layer runs twice, and sampling with a cache still works in between."""
    gradients, calls = [], []
    for checkpointed in (False, True):
        module = build_module(spec("logprobs_NT", gradient_checkpointing=checkpointed))
        count = [0]
        module.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        module(arrange_inputs(rows()[0]), frozenset({"logprobs_NT"}))["logprobs_NT"].sum().backward()
        gradients.append([p.grad for p in module.parameters()])
        calls.append(count[0])
        with torch.no_grad():
            cached = module.causal_lm(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        assert cached.get_seq_length() == 3
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_new_heads_come_from_the_seed_and_the_role_not_from_the_random_state() -> None:
    def weight(seed: int, name: str = "critic") -> Tensor:
        torch.manual_seed(torch.seed() % 1000)
        return build_module(spec("values_NT", name=name), seed=seed).scalar_head("value").weight.detach()

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    assert not torch.equal(weight(1), weight(1, "reward"))
    assert weight(1).std().item() == pytest.approx(1 / 65, rel=0.3)  # of 64 numbers


def test_trained_roles_are_float32_and_frozen_ones_what_was_asked() -> None:
    trained = build_module(spec("logprobs_NT", dtype="bfloat16"))
    frozen = build_module(spec("logprobs_NT", name="reference", trained=False, dtype="bfloat16"))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert trained.compute_dtype == torch.bfloat16
    assert all(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    batch, single = rows()
    plain = AutoModelForCausalLM.from_config(trained.causal_lm.config)
    plain.load_state_dict(trained.causal_lm.state_dict())
    exact = by_hand(plain, single, 9)[0].float()
    outputs = frozen(arrange_inputs(batch), frozenset({"logprobs_NT"}))["logprobs_NT"]
    torch.testing.assert_close(outputs, exact, rtol=0, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = trained(arrange_inputs(batch), frozenset({"logprobs_NT"}))["logprobs_NT"]
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, exact, rtol=0, atol=0.02)


def test_weights_have_their_hugging_face_names_each_once() -> None:
    """A plain model takes them as they come; tied weights are sent once."""
    module = build_module(spec("logprobs_NT", "values_NT"))
    plain = AutoModelForCausalLM.from_config(module.causal_lm.config)
    weights = dict(module.hf_weights())
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(plain(ids).logits, module.causal_lm(ids).logits)


def test_the_model_inside_still_generates() -> None:
    """Its head was replaced by one that gives logits too."""
    model = build_module(spec("logprobs_NT")).causal_lm
    ids = torch.tensor([[5, 6, 7]])
    sampled = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4, pad_token_id=0
    )
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert sampled.tolist() == expected.tolist()
