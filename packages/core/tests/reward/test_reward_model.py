"""A reward model scores what plain transformers scores, whatever template the policy has; parts of a sum add up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import open_provider
from rlhf_core.data.encoder import Encoding
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.reward.model import RewardModel
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.sum import Sum

SPECIAL = ["<pad>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer() -> Any:
    """One token per byte, and a template that no policy here has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a random reward model and of a language model, both saved by plain transformers."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=1,  # type: ignore[call-arg]  # of every configuration, says transformers
    )
    paths = []
    for kind in (LlamaForSequenceClassification, LlamaForCausalLM):
        paths.append(str(folder / kind.__name__))
        kind(config).save_pretrained(paths[-1])
        tokenizer().save_pretrained(paths[-1])
    return paths[0], paths[1]


def rollouts(texts: list[str], prompts: list[Any]) -> Rollouts:
    """Completions whose rendered prompts are nothing a reward model should read."""
    N = len(texts)
    ones = torch.ones(N, 1, dtype=torch.long)
    return Rollouts(
        prompts=["<|im_start|>rendered for the policy"] * N,
        texts=texts,
        prompt_NL=ones,
        prompt_lengths_N=ones[:, 0],
        tokens_NT=ones,
        lengths_N=ones[:, 0],
        mask_NT=ones.bool(),
        group_N=torch.arange(N),
        labels=[None] * N,
        meta=[{} if prompt is None else {"prompt": prompt} for prompt in prompts],
        finish=["stop"] * N,
    )


CHAT = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"})
BATCH = rollouts(["Fine, thanks.", "No", "A somewhat longer answer"], ["How are you?", CHAT, "Tell me."])
RENDERED = [
    "[user] How are you?<end>[assistant] Fine, thanks.<end>",
    "[user] a<end>[assistant] b<end>[user] c?<end>[assistant] No<end>",
    "[user] Tell me.<end>[assistant] A somewhat longer answer<end>",
]


def plain(folder: str) -> list[float]:
    """The scores by transformers alone, one row at a time."""
    model = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**tokenizer()(text, return_tensors="pt")).logits[0, 0]) for text in RENDERED]


@pytest.mark.parametrize("micro_tokens", [1, 16384])
def test_scores_are_those_of_plain_transformers_with_the_reward_models_own_template(
    saved: tuple[str, str], micro_tokens: int
) -> None:
    reward = RewardModel(saved[0], micro_tokens=micro_tokens)
    output = to_reward_output(reward(BATCH), BATCH, reward)
    assert output.rewards_N.tolist() == pytest.approx(plain(saved[0]), abs=1e-5)


def test_scores_are_normalized_and_raw_ones_logged(saved: tuple[str, str]) -> None:
    output = RewardModel(saved[0], mean=0.5, std=2.0)(BATCH)
    raw = torch.tensor(plain(saved[0]))
    torch.testing.assert_close(output.rewards_N, (raw - 0.5) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.metrics["score"], raw, atol=1e-5, rtol=0)


def test_long_rows_are_cut_and_counted_never_dropped(saved: tuple[str, str]) -> None:
    output = RewardModel(saved[0], encoding=Encoding(max_tokens=50, too_long="truncate"))(BATCH)
    assert output.rewards_N.shape == (3,)
    lengths = [len(tokenizer()(text)["input_ids"]) for text in RENDERED]
    assert float(output.metrics["cut"][0]) == pytest.approx(sum(length > 50 for length in lengths) / 3)


def test_a_model_without_score_head_is_an_error_and_never_noise(saved: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="has no trained score head"):
        RewardModel(saved[1])(BATCH)


@pytest.mark.parametrize("names", [("v_head.summary.weight", "v_head.summary.bias"), ("value_head.weight",)])
def test_a_value_head_of_another_library_scores_with_its_own_weights(
    saved: tuple[str, str], names: tuple[str, ...], tmp_path: Path
) -> None:
    """TRL's and OpenRLHF's names, the head beside a language model; the scores are its hidden states times the head."""
    model = LlamaForCausalLM.from_pretrained(saved[1])
    head = {name: torch.randn(1, 32) if name.endswith("weight") else torch.randn(1) for name in names}
    shutil.copytree(saved[1], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
    expected = []
    with torch.no_grad():
        for text in RENDERED:
            last = model.model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0, -1]
            expected.append(float(sum((last @ v[0] if v.dim() == 2 else v[0]) for v in head.values())))
    with open_provider(RewardModel(str(tmp_path / "model"), offload=True)) as reward:
        for _ in range(2):  # offloaded in between
            assert reward(BATCH).rewards_N.tolist() == pytest.approx(expected, abs=1e-5)


def test_two_models_are_weighted_and_each_is_logged(saved: tuple[str, str]) -> None:
    reward = Sum((f"model model={saved[0]}", f"model model={saved[0]} mean=1 std=2"), (1.0, -0.5))
    reward.check()
    raw = torch.tensor(plain(saved[0]))
    output = reward(BATCH)
    torch.testing.assert_close(output.rewards_N, raw - 0.5 * (raw - 1) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.metrics["model.1"], raw, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.metrics["model.2"], (raw - 1) / 2, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="has no trained score head"), open_provider(Sum((f"model model={saved[1]}",))):
        pass  # before anything is sampled


def test_rollouts_without_the_unrendered_prompt_are_refused(saved: tuple[str, str]) -> None:
    with pytest.raises(ContractError, match=r"needs meta\['prompt'\]"):
        RewardModel(saved[0])(rollouts(["x"], [None]))


def test_a_sum_is_the_weighted_sum_and_logs_its_parts() -> None:
    reward = Sum(("length target=10 unit=characters", "regex 'pattern=N.*'"), (2.0, -1.0))
    output = to_reward_output(reward(BATCH), BATCH, reward)
    lengths = [-0.3, -0.8, -1.4]  # 13, 2 and 24 characters, for 10
    torch.testing.assert_close(output.metrics["length"], torch.tensor(lengths))
    assert output.metrics["regex"].tolist() == [0, 1, 0]
    torch.testing.assert_close(output.rewards_N, 2 * torch.tensor(lengths) - torch.tensor([0.0, 1.0, 0.0]))
    assert Sum(("length",))(BATCH).rewards_N.tolist() == pytest.approx([-31 / 32] * 3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Sum(("lenght",)), "no reward is called 'lenght' .*did you mean 'length'"),
        (Sum(("length targt=3",)), "length has no option 'targt' .*did you mean 'target'"),
        (Sum(("length target=many",)), "'many' is not a valid value for target"),
        (Sum(("regex",)), "missing 1 required positional argument: 'pattern'"),
        (Sum(("length",), (1.0, 2.0)), "weights has 2 numbers, but there are 1 parts"),
    ],
)
def test_parts_that_cannot_be_made_are_named(reward: Sum, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reward(BATCH)
