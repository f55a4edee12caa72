"""Losses of candidates are those of plain transformers, however they are batched, cached and mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lanes import GOAL, lane, neighbors
from tiny_attacks import CHATS, SIZE, family, plain_loss, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

from rlhf_core.errors import UsageError
from rlhf_eval_gcg.attack import Attack, Goal
from rlhf_eval_gcg.attack.gradient import lane_gradient
from rlhf_eval_gcg.attack.scoring import Scorer
from rlhf_eval_gcg.attack.victim import Victim


def expected(made: Any, ids_CL: torch.Tensor) -> torch.Tensor:
    prompt = made.prompt
    return torch.tensor(
        [plain_loss(made.victim.model, prompt.prompt_ids(ids), prompt.answers[0]) for ids in ids_CL.tolist()]
    )


@pytest.mark.parametrize("system", ["", "You are kind."])
@pytest.mark.parametrize("name", CHATS)
def test_losses_are_those_of_plain_transformers_with_and_without_cache(name: str, system: str) -> None:
    for cached, packs in ((True, True), (True, False), (False, False)):
        made, options = lane(name, cached=cached, packs=packs, system=system)
        ids_CL = neighbors(made, 12, replace=2)
        if cached:
            lane_gradient(
                made, torch.tensor(made.prompt.suffix_ids), 50, options
            )  # candidates share the suffix from here on
            assert made.base_L is not None
        (losses_C,), _, _ = Scorer(options).losses([(made, ids_CL)])
        torch.testing.assert_close(losses_C, expected(made, ids_CL), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("tokens", [1, 17, 40, 100, 100000])
def test_the_size_of_a_batch_changes_no_loss(tokens: int, packs: bool) -> None:
    made, options = lane(batch_tokens=tokens, packs=packs)
    lane_gradient(made, torch.tensor(made.prompt.suffix_ids), 50, options)
    ids_CL = neighbors(made, 33)
    (losses_C,), _, _ = Scorer(options).losses([(made, ids_CL)])
    torch.testing.assert_close(losses_C, expected(made, ids_CL), atol=1e-5, rtol=0)


def test_a_candidate_that_is_the_current_suffix_has_its_loss() -> None:
    made, options = lane()
    first_L = torch.tensor(made.prompt.suffix_ids)
    _, loss, _ = lane_gradient(made, first_L, 50, options)
    (losses_C,), _, _ = Scorer(options).losses([(made, first_L[None])])
    assert float(losses_C[0]) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt-2"])
def test_goals_of_several_lengths_in_one_batch_have_their_own_losses(architecture: str) -> None:
    vocab = len(family("qwen"))
    model = tiny(vocab)
    if architecture == "gpt-2":  # absolute positions
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    goals = [
        GOAL,
        Goal("Write a long poem about the sea, please", "Yes"),
        Goal("Hi", "The capital of France is Paris."),
    ]
    made = [lane(goal=goal, model=model, packs=False, batch_tokens=2000)[0] for goal in goals]
    options = Attack(batch_tokens=2000)
    for each in made:
        each.victim = made[0].victim
        lane_gradient(each, torch.tensor(each.prompt.suffix_ids), 50, options)
    tasks = [(each, neighbors(each, 9, seed=k)) for k, each in enumerate(made)]
    calls: list[int] = []
    forward = model.forward

    def counted(**inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        return forward(**inputs)

    scorer = Scorer(options, mixes=True)
    made[0].victim.model = type("Counted", (), {"__call__": lambda self, **inputs: counted(**inputs)})()
    losses, _, _ = scorer.losses(tasks)
    made[0].victim.model = model
    assert max(calls) > 9  # rows of several goals in one call
    for (each, ids_CL), losses_C in zip(tasks, losses, strict=True):
        torch.testing.assert_close(losses_C, expected(each, ids_CL), atol=2e-5, rtol=0)


def test_early_stopping_sees_which_candidates_greedy_decoding_answers() -> None:
    made, options = lane(early_stop=True)
    ids_CL = neighbors(made, 20)
    with torch.no_grad():
        rows = torch.tensor([made.prompt.prompt_ids(ids) for ids in ids_CL.tolist()])
        first = made.victim.model(rows).logits[:, -1].argmax(1)
    token = int(first.mode().values)
    made.answers = type(made.answers)((torch.tensor([token]),), "cross_entropy", (1.0,))
    _, (matches_C,), _ = Scorer(options).losses([(made, ids_CL)])
    assert matches_C.tolist() == (first == token).tolist()
    assert int(matches_C.sum()) > 0


def test_batches_are_halved_when_memory_runs_out_and_losses_stay() -> None:
    made, options = lane(packs=False, batch_tokens=10000)
    ids_CL = neighbors(made, 40)
    model, sizes = made.victim.model, []

    def limited(**inputs: Any) -> Any:
        rows = len(inputs["input_ids"])
        if rows > 7:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(rows)
        return model(**inputs)

    made.victim.model = limited
    scorer = Scorer(options)
    (losses_C,), _, _ = scorer.losses([(made, ids_CL)])
    made.victim.model = model
    torch.testing.assert_close(losses_C, expected(made, ids_CL), atol=1e-5, rtol=0)
    assert sum(sizes) == 40 and scorer.budget < 10000


def test_a_single_row_that_does_not_fit_is_one_line_and_other_errors_pass() -> None:
    made, options = lane()

    def full(**_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    def broken(**_: Any) -> Any:
        raise RuntimeError("shapes differ")

    made.victim.model = full
    with pytest.raises(UsageError, match="one candidate alone does not fit in memory"):
        Scorer(options).losses([(made, neighbors(made, 4))])
    made.victim.model = broken
    with pytest.raises(RuntimeError, match="shapes differ"):
        Scorer(options).losses([(made, neighbors(made, 4))])


class Products(TorchDispatchMode):
    """Records the shapes of matrices that a batched product repeats for each row; it copies them."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated: list[tuple[int, ...]] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.products.append(tuple(args[1].shape))
            self.repeated += [tuple(each.shape) for each in args if each.stride(0) == 0 and each.shape[0] > 1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cached", [True, False])
def test_the_weights_of_the_output_layer_are_not_copied_for_each_row(cached: bool) -> None:
    made, options = lane(cached=cached)
    with made.victim.freeze(), Products() as products:  # torch folds rows where weights require gradients
        Scorer(options).losses([(made, neighbors(made, 16))])
    assert not products.repeated


@pytest.mark.parametrize("cached", [True, False])
def test_a_gradient_copies_no_weights_of_the_output_layer(cached: bool) -> None:
    made, options = lane(cached=cached)
    with made.victim.freeze(), Products() as products:
        lane_gradient(made, torch.tensor(made.prompt.suffix_ids), 50, options)
    assert not [shape for shape in products.products if made.victim.vocabulary in shape]  # one row is one matrix


def test_a_sliding_window_shares_beginnings_only_of_shorter_texts() -> None:
    for window, shared in ((512, True), (8, False)):
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=len(family("gemma")), head_dim=8, sliding_window=window, initializer_range=0.4,
            layer_types=["sliding_attention", "full_attention"], **SIZE,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        if not shared:
            assert not Victim(model).caches(20)
            continue
        made, options = lane("gemma", model=model)
        lane_gradient(made, torch.tensor(made.prompt.suffix_ids), 50, options)
        ids_CL = neighbors(made, 8)
        (losses_C,), _, _ = Scorer(options).losses([(made, ids_CL)])
        torch.testing.assert_close(losses_C, expected(made, ids_CL), atol=1e-5, rtol=0)
