"""Engine and trainer agree for architectures that keep their weights in different ways, before and after every change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.kept_sets import replays
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.rollout.kept_sets import with_kept_sets
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

pytestmark = pytest.mark.vllm

GREEDY = Sampling(n=1, max_new_tokens=16, temperature=0.0)
COMMON: dict[str, Any] = {
    "vocab_size": 300,  # no multiple of 64: vLLM pads embedding and head
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
OPT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
    "pad_token_id": 256,
}
GEMMA = {**COMMON, "head_dim": 32, "sliding_window": 128}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**COMMON, "tie_word_embeddings": True}),
    "llama, untied": ("Llama", {**COMMON, "tie_word_embeddings": False}),
    "mistral, untied": ("Mistral", {**COMMON, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {**COMMON, "tie_word_embeddings": True}),
    "qwen2, untied": ("Qwen2", {**COMMON, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {**COMMON, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3", {**COMMON, "tie_word_embeddings": False}),
    "phi3, untied": ("Phi3", {**COMMON, "tie_word_embeddings": False, "pad_token_id": 256}),
    "gemma": ("Gemma", {**COMMON, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**GEMMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {**GPT2, "tie_word_embeddings": True}),
    "opt": ("OPT", {**OPT, "tie_word_embeddings": True}),
    "opt, untied": ("OPT", {**OPT, "tie_word_embeddings": False}),
}
"""Heads of their own and tied ones; biases, normed keys, soft caps, norms around, projections that are fused in the checkpoint
(phi3, gpt2) or only in the engine, transposed weights (gpt2), learned and offset positions (opt)."""

ENDS = [258, *range(1, 256, 6)]
"""End tokens of these models: EOS and further ones, so that random models end now and then."""


def make_role(folder: Path, architecture: str, config: dict[str, Any], tokens: int = 300, **options: Any) -> LocalRole:
    """A role that trains a random model of this architecture, loaded from a folder."""
    import transformers

    from rlhf_core.models.loading.byte_tokenizer import EOS, byte_tokenizer

    made = getattr(transformers, f"{architecture}Config")(**config, bos_token_id=None, eos_token_id=EOS)
    model = getattr(transformers, f"{architecture}{'LMHeadModel' if architecture == 'GPT2' else 'ForCausalLM'}")(made)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    byte_tokenizer(tokens).save_pretrained(folder)
    plan = tiny_run("unused", model=str(folder), sampling=replace(GREEDY, temperature=1.0), **options).plan
    return LocalRole(replace(plan, roles={"actor": replace(plan.roles["actor"], ends=tuple(ENDS))}), "actor")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_reaches_the_engine(
    name: str, tmp_path: Path, make_prompts: Callable[..., Prompts], randomize: Callable[..., None]
) -> None:
    """As loaded, with each tensor changed by itself, and after training."""
    role = make_role(tmp_path, *ARCHITECTURES[name], actor={"attention": "eager"})  # sdpa knows no soft caps
    prompts = make_prompts(role, ["Hello", "What is it?", "1 2 3"])
    randomize(role, seed=0)
    rollout = VLLMEngines(VLLM(kv_cache_gib=0.25, max_num_seqs=8))
    try:
        agree(rollout, role, prompts)
        for k, parameter in enumerate(role.module.parameters()):  # one tensor at a time: none is synced by chance
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
            role.version += 1
            rollout.sync(role)
            agree(rollout, role, prompts)
        train(role, rollout(role, prompts, replace(GREEDY, n=2, temperature=1.0)))
        rollout.sync(role)
        agree(rollout, role, prompts)
    finally:
        rollout.close()


def test_ids_that_the_tokenizer_lacks_are_never_sampled(
    tmp_path: Path, make_prompts: Callable[..., Prompts], randomize: Callable[..., None]
) -> None:
    """A quarter of the head is padding, as likely as the rest. Free sampling draws it; a run's does not, cut or not, and the
    trainer replays the sets without it."""
    role = make_role(tmp_path, "Llama", {**COMMON, "vocab_size": 340, "tie_word_embeddings": False}, tokens=260)
    tokens = max(role.tokenizer.get_vocab().values()) + 1
    assert tokens < 300
    prompts = make_prompts(role, ["Hello", "What is it?"])
    randomize(role, seed=0, std=0.1)
    rollout = VLLMEngines(VLLM(kv_cache_gib=0.25, max_num_seqs=64))
    every = Sampling(n=32, max_new_tokens=4, temperature=1.0)
    try:
        rollout(role, prompts, every)
        free = rollout.engines["actor"].sample(prompts, every, whole_head=True)
        assert int(free.tokens_NT.max()) >= tokens
        for cut in ({}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_p": 0.7, "min_p": 0.3}, {"top_k": 20}):
            sampling = replace(every, **cut)  # type: ignore[arg-type]
            sampled = rollout(role, prompts, sampling)
            assert int(sampled.tokens_NT.max()) < tokens, cut
            if not replays(sampling):
                continue
            replayed = with_kept_sets(sampled, sampling, VLLM(), role.tokenizer)
            found_NT = role.infer(replayed, frozenset({"logprobs_NT"}))["logprobs_NT"]
            torch.testing.assert_close(found_NT, sampled["sampler_logprobs_NT"], rtol=0, atol=1e-4)
    finally:
        rollout.close()


def agree(rollout: VLLMEngines, role: LocalRole, prompts: Prompts, sampling: Sampling = GREEDY) -> None:
    """Greedy tokens and finish reasons are those of transformers, and log-probabilities too, up to float32 in another order."""
    ours, theirs = rollout(role, prompts, sampling), HuggingFaceRollout()(role, prompts, sampling)
    assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
    assert ours.finish == theirs.finish
    torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=3e-4)


def train(role: LocalRole, rollouts: Rollouts) -> None:
    """One optimizer step that makes the first completions less and the last ones more likely."""
    before = {name: tensor.clone() for name, tensor in role.weights()}
    advantages_NT = torch.where(rollouts.mask_NT, torch.linspace(-1, 1, len(rollouts))[:, None], 0.0)
    role.train({role.spec.terms[0][0]: rollouts.with_extras(advantages_NT=advantages_NT)})
    assert any(not torch.equal(tensor, before[name]) for name, tensor in role.weights())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "folder", "adapter"])
def test_new_tokens_are_sampled_from_too_and_adapters_come_with_theirs(
    kind: str, tmp_path: Path, make_prompts: Callable[..., Prompts], randomize: Callable[..., None]
) -> None:
    """Sixty tokens more than the model's own files know of, beside the end tokens that these name."""
    pytest.importorskip("peft")
    file = tmp_path / "tokens.txt"
    file.write_text("".join(f"<new{k}>\n" for k in range(60)))
    name = "tiny"
    if kind != "tiny":
        name = str(tmp_path / "base")
        lora = {"lora": {"rank": 2}} if kind == "adapter" else {}
        base = make_role(Path(name), *ARCHITECTURES["llama"], actor=lora)
        if lora:
            name = str(tmp_path / "adapter")
            randomize(base, seed=1, std=0.1)
            base.export(name)
    run = tiny_run("unused", model=name, add_tokens=str(file), sampling=replace(GREEDY, temperature=1.0))
    role = LocalRole(run.plan, "actor")
    randomize(role, seed=2)
    rollout = VLLMEngines(VLLM(kv_cache_gib=0.25, max_num_seqs=8))
    try:
        prompts = make_prompts(role, ["Hello <new7>", "What is it?", "1 2 3"])
        assert max(prompts.token_ids[0]) > 260, "a new token"
        agree(rollout, role, prompts)
    finally:
        rollout.close()


@pytest.mark.slow
def test_an_architecture_that_vllm_borrows_from_transformers_is_refused(
    tmp_path: Path, make_prompts: Callable[..., Prompts]
) -> None:
    role = make_role(tmp_path, "GPTNeoX", {key: value for key, value in COMMON.items() if "key_value" not in key})
    rollout = VLLMEngines(VLLM(kv_cache_gib=0.25, max_num_seqs=8))
    with pytest.raises(UsageError, match="vLLM does not implement GPTNeoXForCausalLM, .* use rollout"):
        rollout(role, make_prompts(role, ["Hello"]), GREEDY)
    rollout.close()


@pytest.mark.slow
def test_sixteen_bits_agree_within_their_bound(tmp_path: Path, make_prompts: Callable[..., Prompts]) -> None:
    role = LocalRole(tiny_run("unused").plan, "actor")
    rollout = VLLMEngines(VLLM(dtype="bfloat16", kv_cache_gib=0.25, max_num_seqs=8))
    try:
        rollouts = rollout(role, make_prompts(role, ["Hello", "x"]), replace(GREEDY, temperature=1.0, n=8))
        apart = rollouts["sampler_logprobs_NT"] - role.infer(rollouts, frozenset({"logprobs_NT"}))["logprobs_NT"]
        assert 1e-6 < float(apart[rollouts.mask_NT].abs().max()) < 0.05
        role.version += 1
        assert rollout.sync(role)["sync/logprob_diff_max"] < 0.05
    finally:
        rollout.close()


@pytest.mark.engines
@pytest.mark.parametrize("process", ["trainer", pytest.param("own", marks=pytest.mark.slow)])
def test_a_real_model_says_the_same_in_both_engines_before_and_after_training(
    process: Any, make_prompts: Callable[..., Prompts]
) -> None:
    """SmolLM2-135M in float32: 64 prompts, greedy, then other weights, then weights that were trained."""
    from rlhf_core.models.loading.names import find

    try:
        find("smollm2-135m")
    except MissingPackage as error:
        pytest.skip(str(error))
    role = LocalRole(tiny_run("unused", model="smollm2-135m").plan, "actor")
    prompts = make_prompts(role, [f"Question {i}: what is {i} times {i + 3}, and why?" for i in range(64)])
    sampling = replace(GREEDY, max_new_tokens=12)
    rollout = VLLMEngines(VLLM(process=process, kv_cache_gib=1, max_num_seqs=64))
    try:
        agree(rollout, role, prompts, sampling)
        with torch.no_grad():
            for k, parameter in enumerate(role.module.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
                parameter.add_(0.02 * parameter.std() * noise if parameter.dim() > 1 else 0.02 * noise)
        role.version += 1
        assert rollout.sync(role)["sync/logprob_diff_max"] < 1e-3
        agree(rollout, role, prompts, sampling)
        train(role, rollout(role, prompts.rows(range(8)), replace(sampling, temperature=1.0)))
        assert rollout.sync(role)["sync/bytes"] == sum(4 * tensor.numel() for _, tensor in role.weights())
        agree(rollout, role, prompts, sampling)
    finally:
        rollout.close()
