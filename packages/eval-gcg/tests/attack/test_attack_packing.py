"""Packed rows attend as `sdpa` does with a mask, compute no padding, and copy no beginning for each row."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from lanes import GOAL, lane, neighbors
from tiny_attacks import SIZE, family, plain_loss, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, Qwen3Config

import rlhf_eval_gcg.attack.packing as packing
from rlhf_eval_gcg.attack import Attack, Goal, attack
from rlhf_eval_gcg.attack.gradient import lane_gradient
from rlhf_eval_gcg.attack.packing import PackedGroups
from rlhf_eval_gcg.attack.scoring import Scorer
from rlhf_eval_gcg.attack.victim import Victim

VOCAB = len(family("qwen"))


def architecture(name: str) -> Any:
    torch.manual_seed(0)
    config: Any = {
        "gpt-2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4),
        "qwen-3": lambda: Qwen3Config(vocab_size=VOCAB, head_dim=16, initializer_range=0.4, **SIZE),
        "gemma-3": lambda: Gemma3TextConfig(
            vocab_size=VOCAB, head_dim=8, sliding_window=512, initializer_range=0.4,
            layer_types=["sliding_attention", "full_attention"], **SIZE,
        ),
    }[name]()  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


class Passes:
    """A model that counts the tokens of each pass."""

    def __init__(self, model: Any, most: int = 10**9) -> None:
        self.model, self.most = model, most
        self.tokens: list[int] = []

    def __call__(self, **inputs: Any) -> Any:
        tokens = inputs["input_ids"].numel()
        if tokens > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.tokens.append(tokens)
        return self.model(**inputs)


@pytest.mark.parametrize("cells", [1, 700, 1 << 19])
def test_attention_is_that_of_sdpa_with_a_mask(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SCORE_CELLS", cells)
    draw = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sizes, pasts = [(3, 5), (1, 2), (4, 1), (2, 3)], [7, 0, 9, 4]
    total = sum(rows * new for rows, new in sizes)
    query, key, value = states(1, 6, total, 8), states(1, 2, total, 8), states(1, 2, total, 4)
    beginnings = [
        ((states(1, 2, 3, 8), states(1, 2, 3, 4)), (states(1, 2, P, 8), states(1, 2, P, 4))) if P else None
        for P in pasts
    ]
    packed = PackedGroups(sizes, beginnings)
    packed.note(1, key)
    found, _ = packed.attend(torch.nn.Module(), query, key, value, None, scaling=0.3)
    begin = 0
    for (rows, new), past, beginning in zip(sizes, pasts, beginnings, strict=True):
        for _ in range(rows):
            own = slice(begin, begin + new)
            k, v = key[:, :, own], value[:, :, own]
            if beginning is not None:
                k, v = (torch.cat([old, fresh], 2) for old, fresh in zip(beginning[1], (k, v), strict=True))
            mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, own], k, v, attn_mask=mask, scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(found[:, own], expected.transpose(1, 2), atol=1e-12, rtol=0)
            begin += new
    assert begin == total


@pytest.mark.parametrize("name", ["gpt-2", "qwen-3", "gemma-3"])
def test_losses_of_other_architectures_are_those_of_plain_transformers(name: str) -> None:
    made, options = lane(model=architecture(name), packs=True)
    lane_gradient(made, torch.tensor(made.prompt.suffix_ids), 50, options)
    ids_CL = neighbors(made, 15)
    (losses_C,), _, _ = Scorer(options).losses([(made, ids_CL)])
    expected = [
        plain_loss(made.victim.model, made.prompt.prompt_ids(ids), made.prompt.answers[0]) for ids in ids_CL.tolist()
    ]
    torch.testing.assert_close(losses_C, torch.tensor(expected), atol=2e-5, rtol=0)
    assert made.victim.model.config._attn_implementation == "sdpa"


def test_passes_are_equally_full_and_compute_what_differs_from_the_suffix_alone() -> None:
    goals = [
        GOAL,
        Goal("Write a long poem about the sea, please", "Yes"),
        Goal("Hi", "The capital of France is Paris."),
    ]
    model = tiny(VOCAB)
    made = [lane(goal=goal, model=model, packs=True)[0] for goal in goals]
    for each in made:
        each.victim = made[0].victim
        lane_gradient(each, torch.tensor(each.prompt.suffix_ids), 50, Attack())
    tasks = [(each, neighbors(each, 14, seed=k)) for k, each in enumerate(made)]
    made[0].victim.model = passes = Passes(model)
    losses, _, _ = Scorer(Attack(batch_tokens=150), mixes=True).losses(tasks)
    made[0].victim.model = model
    tails = [
        int((4 - each.starts(ids_CL)).sum()) + 14 * (len(each.after_A) + len(each.answers.ids[0]) - 1)
        for each, ids_CL in tasks
    ]
    assert sum(passes.tokens) == sum(tails) > 300
    assert max(passes.tokens) < 1.3 * min(passes.tokens) and len(passes.tokens) == -(-sum(tails) // 150)
    for (each, ids_CL), losses_C in zip(tasks, losses, strict=True):
        expected = [plain_loss(model, each.prompt.prompt_ids(ids), each.prompt.answers[0]) for ids in ids_CL.tolist()]
        torch.testing.assert_close(losses_C, torch.tensor(expected), atol=2e-5, rtol=0)


def test_losses_of_a_prompt_are_the_same_to_the_bit_beside_others() -> None:
    model = tiny(VOCAB)
    made = [
        lane(goal=goal, model=model, packs=True)[0] for goal in (GOAL, Goal("Hi", "The capital of France is Paris."))
    ]
    for each in made:
        each.victim = made[0].victim
        lane_gradient(each, torch.tensor(each.prompt.suffix_ids), 50, Attack())
    tasks = [(each, neighbors(each, 14, seed=k)) for k, each in enumerate(made)]
    together, _, _ = Scorer(Attack()).losses(tasks)
    for task, losses_C in zip(tasks, together, strict=True):
        (alone_C,), _, _ = Scorer(Attack()).losses([task])
        assert alone_C.tolist() == losses_C.tolist()
    made[0].victim.model = passes = Passes(model)
    Scorer(Attack()).losses(tasks)
    assert len(passes.tokens) == 2


def test_passes_are_halved_when_memory_runs_out_and_losses_stay() -> None:
    made, options = lane(packs=True)
    lane_gradient(made, torch.tensor(made.prompt.suffix_ids), 50, options)
    ids_CL = neighbors(made, 40)
    (expected_C,), _, _ = Scorer(options).losses([(made, ids_CL)])
    made.victim.model = passes = Passes(made.victim.model, most=100)
    (losses_C,), _, _ = Scorer(options).losses([(made, ids_CL)])
    torch.testing.assert_close(losses_C, expected_C, atol=1e-5, rtol=0)
    assert len(passes.tokens) > 3


class Sizes(TorchDispatchMode):
    """Records the largest result of an operation on float numbers."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.is_floating_point()
            and func is not torch.ops.aten.expand.default
        ):
            self.largest = max(self.largest, result.numel())
        return result


def test_a_long_beginning_is_not_copied_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SCORE_CELLS", 1 << 14)
    made, options = lane(goal=Goal("Say hello " * 60, "Yes"), packs=True)
    ids_CL = neighbors(made, 40)
    P = len(made.before_P)
    copies = 40 * 2 * 8 * P  # rows, key-value heads, numbers of a head
    largest = {}
    for packs in (True, False):
        made.victim.packs = packs
        with torch.no_grad(), Sizes() as sizes:
            Scorer(options).losses([(made, ids_CL)])
        largest[packs] = sizes.largest
    assert largest[False] >= copies > 2 * largest[True]


def test_the_meter_counts_the_products_of_packed_passes_exactly() -> None:
    made, options = lane(packs=True)
    lane_gradient(made, torch.tensor(made.prompt.suffix_ids), 50, options)
    ids_CL = neighbors(made, 20)
    with FlopCounterMode(display=False) as counter:
        _, _, (cost,) = Scorer(options).losses([(made, ids_CL)])
    rotary = 0.01  # the angles of positions are products too
    assert cost == pytest.approx(counter.get_total_flops(), rel=rotary)


def test_other_attention_stays_as_it_is() -> None:
    eager = tiny(VOCAB)
    eager.set_attn_implementation("eager")
    assert not Victim(eager).packs and Victim(tiny(VOCAB)).packs and not Victim(tiny(VOCAB), prefix_cache=False).packs


def test_a_model_whose_attention_is_its_own_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Attack(suffix="x x x !", steps=2, search_width=16, schedule="gcg")
    (expected,) = attack(tiny(VOCAB), family("qwen"), [GOAL], options, seed=0)
    tried: list[bool] = []

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(True)
        return torch.zeros(1, self.sizes[0][0] * self.sizes[0][1], 4, 8), None  # wrong, and no error

    monkeypatch.setattr(PackedGroups, "attend", refuse)
    (found,) = attack(tiny(VOCAB), family("qwen"), [GOAL], options, seed=0)
    assert len(tried) == 2 and found.ids == expected.ids  # one pass over both layers, at the start
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)


def test_keys_that_change_after_the_cache_are_refused() -> None:
    packed = PackedGroups([(1, 2)], [None])
    states = torch.zeros(1, 2, 2, 4)
    packed.note(0, states)
    with pytest.raises(NotImplementedError, match="attention of Linear cannot share beginnings"):
        packed.attend(torch.nn.Linear(1, 1), states, states * 1, states, None)


def test_a_pass_is_not_kept_after_it() -> None:
    config, states = tiny(VOCAB).config, torch.zeros(1, 2, 2, 4)
    packed = PackedGroups([(1, 2)], [((states, states),)])
    alive = weakref.ref(packed)
    with packed.install(config):
        assert AttentionInterface()[packing.NAME] == packed.attend
    del packed
    gc.collect()
    assert alive() is None
    with pytest.raises(NotImplementedError, match="Linear attends to packed rows outside"):
        AttentionInterface()[packing.NAME](torch.nn.Linear(1, 1), states, states, states, None)
