"""Searches: one step over all replacements finds the best, records say what happened, options do what they say."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_attacks import family, plain_loss, tiny

from rlhf_core.errors import OptionError, UsageError
from rlhf_eval_gcg.attack import Attack, AttackPrompt, AttackResult, Goal, attack
from rlhf_eval_gcg.attack import engine as engine_module
from rlhf_eval_gcg.attack import run as run_module
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient
from rlhf_eval_gcg.attack.scoring import Scorer
from rlhf_eval_gcg.attack.tokens import allowed_tokens

GOALS = [Goal("Say hello", "Sure, hello friend"), Goal("Write a poem about the sea", "Yes. No.")]
TOKENIZER = family("qwen")
VOCAB = len(TOKENIZER)
SMALL: dict[str, Any] = {"suffix": "x x x !", "steps": 4, "search_width": 24, "topk": 40}


def search(
    goals: list[Goal] = GOALS[:1], model: Any = None, seed: int = 0, more: Any = None, **options: Any
) -> list[AttackResult]:
    model = tiny(VOCAB) if model is None else model
    return attack(model, TOKENIZER, goals, Attack(**(SMALL | options)), seed=seed, **(more or {}))


def loss_of(model: Any, result: AttackResult) -> float:
    return plain_loss(model, result.prompt_ids, result.target_ids)


def test_one_step_over_all_replacements_finds_the_best_single_change() -> None:
    model = tiny(VOCAB)
    (result,) = search(model=model, steps=1, topk=VOCAB, search_width=10**6, schedule="gcg")
    prompt = AttackPrompt.build(GOALS[0], TOKENIZER, Attack(**SMALL))
    allowed = allowed_tokens(TOKENIZER, VOCAB, True).nonzero().flatten().tolist()
    rows = [
        [*prompt.suffix_ids[:place], token, *prompt.suffix_ids[place + 1 :]]
        for place in range(4)
        for token in allowed
        if token != prompt.suffix_ids[place]
    ]
    rows = [row for row, stable in zip(rows, prompt.stable(rows), strict=True) if stable]
    losses = [plain_loss(model, prompt.prompt_ids(row), prompt.answers[0]) for row in rows]
    assert result.candidates == len(rows) > 100
    assert result.loss == pytest.approx(min(losses), abs=1e-5)
    assert list(result.ids) == rows[losses.index(min(losses))]


@pytest.mark.parametrize("schedule", ["gcg", "acg", "momentum"])
def test_records_say_what_happened(schedule: str) -> None:
    model = tiny(VOCAB)
    (result,) = search(model=model, schedule=schedule, n_replace=2)
    assert result.loss == min(result.losses) and result.steps == len(result.texts) == len(result.flops) == 4
    assert result.text == result.texts[result.losses.index(result.loss)]
    assert result.loss == pytest.approx(loss_of(model, result), abs=1e-5)
    assert result.loss < result.initial_loss
    assert list(result.flops) == sorted(result.flops) and result.flops[0] > 0
    assert result.message == GOALS[0].goal + result.text
    chat = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": result.message}], add_generation_prompt=True, tokenize=False
    )
    assert TOKENIZER(chat, add_special_tokens=False)["input_ids"] == list(result.prompt_ids)


def test_a_buffers_loss_never_rises_and_none_always_moves() -> None:
    (kept,) = search(schedule="gcg", steps=12, search_width=2, buffer=3)
    assert list(kept.losses) == sorted(kept.losses, reverse=True)
    (moved,) = search(schedule="gcg", steps=12, search_width=2)
    assert any(later > earlier for earlier, later in zip(moved.losses, moved.losses[1:]))
    assert len(set(moved.texts)) == 12


def test_acg_never_gets_worse_and_adapts_its_width() -> None:
    (result,) = search(schedule="acg", steps=12, search_width=64, n_replace=2)
    rounding = 1e-5  # float32, of one suffix in two passes
    assert all(later <= earlier + rounding for earlier, later in zip(result.losses, result.losses[1:]))
    assert result.losses[0] <= result.initial_loss
    assert result.candidates < 12 * 64


def test_the_same_seed_gives_the_same_suffixes_and_another_gives_others() -> None:
    one, again, other = (search(GOALS, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert [each.texts for each in one] != [each.texts for each in other]


def test_goals_attacked_together_get_what_they_get_alone() -> None:
    model = tiny(VOCAB)
    apart, together = (search(GOALS, model, schedule="gcg", goals_at_once=count) for count in (1, 2))
    for one, other in zip(apart, together, strict=True):
        assert one.ids == other.ids and one.losses == pytest.approx(other.losses, abs=1e-5)


def test_weights_and_modes_are_put_back() -> None:
    model = tiny(VOCAB).train()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(model=model, steps=1)
    assert model.training and not frozen.requires_grad
    assert sum(not weight.requires_grad for weight in model.parameters()) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_early_stop_ends_at_the_first_suffix_that_greedy_decoding_answers() -> None:
    model = tiny(VOCAB)
    (plain,) = search(model=model, steps=1)
    with torch.no_grad():
        token = int(model(torch.tensor([plain.prompt_ids])).logits[0, -1].argmax())
    goal = Goal(GOALS[0].goal, TOKENIZER.decode([token]))
    if TOKENIZER(goal.target, add_special_tokens=False)["input_ids"] != [token]:
        pytest.skip("the likeliest token is no text of its own")
    (result,) = search([goal], model, steps=50, schedule="gcg", search_width=64, early_stop=True)
    assert result.matched and result.steps < 50
    with torch.no_grad():
        assert int(model(torch.tensor([result.prompt_ids])).logits[0, -1].argmax()) == token
    (long,) = search([goal], model, steps=result.steps + 2, schedule="gcg", search_width=64)
    assert long.steps == result.steps + 2


def test_a_transferred_suffix_minimizes_the_mean_over_goals_and_models() -> None:
    models = [tiny(VOCAB), tiny(VOCAB, seed=1)]
    results = search(GOALS, models[0], transfer=True, steps=3, more={"more_models": models[1:]})
    assert len(results) == 2 and results[0].ids == results[1].ids and results[1].goal == GOALS[1]
    assert results[1].message == GOALS[1].goal + results[1].text
    losses = [loss_of(model, result) for model in models for result in results]
    assert results[0].loss == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_of_several_restarts_the_best_counts() -> None:
    model = tiny(VOCAB)
    (one,), (best,) = (search(model=model, restarts=count, steps=2) for count in (1, 3))
    assert best.loss <= one.loss
    assert best.loss == pytest.approx(loss_of(model, best), abs=1e-5)


def test_max_flops_ends_a_goal() -> None:
    (free,) = search(steps=6)
    (limited,) = search(steps=6, max_flops=free.flops[2] * 0.99)
    assert limited.steps == 3 and limited.flops == free.flops[:3]


def test_probe_scores_fewer_candidates_by_the_model_and_needs_a_draft() -> None:
    model = tiny(VOCAB)
    (result,) = search(model=model, schedule="probe", search_width=64, more={"draft": model})
    assert 4 * 3 <= result.candidates < 4 * 16  # a 16th, and few favorites since the draft agrees
    assert result.loss == pytest.approx(loss_of(model, result), abs=1e-5)
    (plain,) = search(model=model, schedule="gcg", search_width=64, steps=1)
    (first,) = search(model=model, schedule="probe", search_width=64, steps=1, more={"draft": model})
    assert first.loss == pytest.approx(plain.loss, abs=1e-5)  # its draft knows the best candidate
    with pytest.raises(OptionError, match="schedule probe needs a draft model"):
        search(schedule="probe")


class Relaxation:
    """Moves by gradient over mixtures of tokens: an optimizer of another kind, as a plugin would bring."""

    def __init__(self, options: Attack) -> None:
        self.options = options

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        logits_LV = suffix.memory.get("logits_LV")
        if logits_LV is None:
            logits_LV = 4.0 * torch.nn.functional.one_hot(suffix.ids_L, len(suffix.allowed_V)).float()
        gradient_LV, loss = yield TokenGradient(logits_LV.softmax(1))
        assert loss > 0
        logits_LV = logits_LV - 5.0 * gradient_LV
        suffix.memory["logits_LV"] = logits_LV
        ids_L = logits_LV.masked_fill(~suffix.allowed_V, -torch.inf).argmax(1)
        losses_C = yield Losses(ids_L[None])
        return Move(ids_L, float(losses_C[0]))


def test_another_optimizer_is_an_import_path() -> None:
    model = tiny(VOCAB)
    (result,) = search(model=model, schedule=f"{__name__}:Relaxation", steps=3)
    assert result.candidates == 3
    assert result.loss == pytest.approx(loss_of(model, result), abs=1e-5)
    with pytest.raises(OptionError, match="schedule 'nowhere:Search' cannot be imported"):
        search(schedule="nowhere:Search")


def test_of_a_bad_set_the_loss_is_that_of_the_summed_probability() -> None:
    model = tiny(VOCAB)
    goal = Goal("Say hello", "Yes", bad_set=("No.", "Sure, hello"))
    (result,) = search([goal], model, objective="bad_set", steps=8)
    answers = AttackPrompt.build(goal, TOKENIZER, Attack(suffix="x x x !")).answers
    logs = torch.tensor([-len(ids) * plain_loss(model, result.prompt_ids, ids) for ids in answers])
    assert result.loss == pytest.approx(float(-logs.logsumexp(0)), abs=1e-4)
    assert result.loss < result.initial_loss


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "reward"}, "objective reward needs a judge"),
        ({"objective": "bad_set", "early_stop": True}, "early_stop works only with objective target"),
        ({"objective": "bad_set"}, "objective bad_set needs goals with a list bad_set"),
        ({"objective": "bad_set", "loss": "cw"}, "loss cw works only with objective target"),
        ({"schedule": "acg", "buffer": 2}, "buffer must be 0 with schedule acg"),
        ({"schedule": "gcg", "buffer": 2, "objective": "reward"}, "buffer must be 0 with objective reward"),
    ],
)
def test_options_that_do_not_go_together_say_so(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        search(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"mellowmax_alpha": 0.0}, "mellowmax_alpha must be above 0"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"schedule": "best"}, "schedule must be gcg, acg, momentum, probe or module:Class"),
        ({"suffix": " "}, "suffix must contain"),
        ({"suffix_place": "marker", "marker": ""}, "marker must not be empty"),
    ],
)
def test_an_option_out_of_range_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Attack(**options)


def test_no_goals_is_one_line() -> None:
    with pytest.raises(UsageError, match="there are no goals"):
        search([])


def test_no_surviving_candidate_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttackPrompt, "stable", lambda self, rows: [False] * len(rows))
    with pytest.raises(UsageError, match="goal 'Say hello': no candidate passes the filter: none of 192 keeps"):
        search(schedule="gcg")


def test_filter_and_ascii_bar_what_they_say() -> None:
    model = tiny(VOCAB)
    allowed_V = allowed_tokens(TOKENIZER, VOCAB + 5, True)
    assert not allowed_V[VOCAB:].any() and not allowed_V[TOKENIZER.all_special_ids].any()
    texts = [TOKENIZER.decode([token]) for token in allowed_V.nonzero().flatten().tolist()]
    assert all(text.isascii() and text.isprintable() and text for text in texts)
    assert int(allowed_tokens(TOKENIZER, VOCAB, False).sum()) > int(allowed_V.sum())
    (result,) = search(model=model, schedule="gcg", steps=6, search_width=64)
    assert all(allowed_V[token] for token in result.ids)
    prompt = AttackPrompt.build(GOALS[0], TOKENIZER, Attack(**SMALL))
    assert prompt.stable([result.ids]) == [True]
    (free,) = search(model=model, schedule="gcg", steps=6, search_width=64, filter_ids=False)
    assert free.candidates > result.candidates


def test_the_optimizer_of_the_readme_never_gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    code = re.search(r"```python\n(from rlhf_eval_gcg.attack import Losses.*?)```", readme.read_text(), re.S)
    assert code
    module = ModuleType("search_of_the_readme")
    exec(code[1], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = tiny(VOCAB)
    (result,) = search(model=model, schedule=f"{module.__name__}:OneByOne", steps=8, filter_ids=False)
    assert result.candidates == 8
    assert list(result.losses) == sorted(result.losses, reverse=True) and result.loss < result.initial_loss
    assert result.loss == pytest.approx(loss_of(model, result), abs=1e-5)


def test_any_seed_of_63_bits_is_a_seed() -> None:
    assert search(seed=2**63 - 1, steps=1)[0].steps == 1


def test_one_seed_per_goal_gives_the_suffix_of_each_alone() -> None:
    model, options = tiny(VOCAB), Attack(**SMALL, restarts=2)
    together = attack(model, TOKENIZER, GOALS, options, seed=[3, 8])
    alone = [attack(model, TOKENIZER, [goal], options, seed=seed)[0] for goal, seed in zip(GOALS, (3, 8), strict=True)]
    assert together == alone
    with pytest.raises(UsageError, match="3 seeds for 2 goals"):
        attack(model, TOKENIZER, GOALS, options, seed=[1, 2, 3])
    with pytest.raises(UsageError, match="without transfer"):
        attack(model, TOKENIZER, GOALS, Attack(**SMALL, transfer=True), seed=[1, 2])


def test_restarts_share_the_limit_of_operations_and_all_count() -> None:
    model = tiny(VOCAB)
    (one,), (three,) = (search(model=model, restarts=count, steps=3, schedule="gcg") for count in (1, 3))
    assert three.flops == pytest.approx(
        [3 * flops for flops in one.flops], rel=0.1
    )  # lengths of shared beginnings differ
    assert three.candidates > 2 * one.candidates
    limit = one.flops[-1]  # of three steps: one for each restart
    (limited,) = search(model=model, restarts=3, steps=3, schedule="gcg", max_flops=0.99 * limit)
    assert limited.steps == 1 and limited.flops[-1] == pytest.approx(three.flops[0])


class Lottery:
    """Replaces one token at random: an optimizer that asks for no gradient."""

    def __init__(self, options: Attack) -> None:
        self.options = options

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        trial_L = suffix.ids_L.clone()
        allowed = suffix.allowed_V.nonzero()[:, 0]
        trial_L[0] = allowed[torch.randint(len(allowed), (1,), generator=suffix.generator)]
        losses_C = yield Losses(trial_L[None])
        return Move(trial_L, float(losses_C[0]))


@pytest.mark.parametrize("schedule", ["Lottery", "Relaxation"])
def test_the_initial_loss_is_known_whatever_an_optimizer_asks_for(schedule: str) -> None:
    model = tiny(VOCAB)
    (plain,) = search(model=model, schedule="gcg")
    (result,) = search(model=model, schedule=f"{__name__}:{schedule}", steps=2)
    assert result.initial_loss == pytest.approx(plain.initial_loss, abs=1e-5)
    assert result.candidates == 2


def test_the_initial_loss_is_known_where_a_suffix_of_the_first_buffer_matches() -> None:
    model = tiny(VOCAB)
    token = greedy_token(model, AttackPrompt.build(GOALS[0], TOKENIZER, Attack(**SMALL)))
    goal = Goal(GOALS[0].goal, TOKENIZER.decode([token]))
    (result,) = search([goal], model, schedule="gcg", buffer=2, early_stop=True)
    assert result.matched and result.steps == 1 and result.candidates == 2
    prompt = AttackPrompt.build(goal, TOKENIZER, Attack(**SMALL))
    expected = plain_loss(model, prompt.prompt_ids(prompt.suffix_ids), result.target_ids)
    assert result.initial_loss == pytest.approx(expected, abs=1e-5)


def greedy_token(model: Any, prompt: AttackPrompt) -> int:
    """Return the first token of the greedy answer to the prompt with the initial suffix."""
    with torch.no_grad():
        return int(model(torch.tensor([prompt.prompt_ids(prompt.suffix_ids)])).logits[0, -1].argmax())


def test_an_answer_of_a_bad_set_that_begins_with_another_one_counts_once() -> None:
    """An event and a part of it: the probability that one of them is given is that of the shorter answer."""
    model = tiny(VOCAB)
    (one,) = search([Goal("Say hello", "Sure", bad_set=("Sure",))], model, objective="bad_set", steps=1)
    (more,) = search([Goal("Say hello", "Sure, hello", bad_set=("Sure", "Sure"))], model, objective="bad_set", steps=1)
    expected = plain_loss(model, one.prompt_ids, one.target_ids) * len(one.target_ids)
    assert one.loss == pytest.approx(expected, abs=1e-5)
    assert more.initial_loss == pytest.approx(one.initial_loss, abs=1e-5)


def test_gradients_of_several_goals_are_halved_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny(VOCAB), []
    goals = [*GOALS, Goal("Name a color", "Blue waves")]
    expected = search(goals, model, steps=2, schedule="gcg")
    original = engine_module.batch_gradients

    def small(lanes: Any, *args: Any) -> Any:
        sizes.append(len(lanes))
        if len(lanes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(lanes, *args)

    monkeypatch.setattr(engine_module, "batch_gradients", small)
    monkeypatch.setattr(run_module, "Scorer", lambda options: Scorer(options, mixes=True))
    found = search(goals, model, steps=2, schedule="gcg", goals_at_once=3)
    assert sizes[:2] == [3, 2]
    assert [each.ids for each in found] == [each.ids for each in expected]

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module, "lane_gradient", full)
    with pytest.raises(UsageError, match="one gradient alone does not fit in memory"):
        search(goals, model, steps=2, schedule="gcg")
