"""One suffix under search: its lanes, its optimizer, and the record of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import DataError, option
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.caching import Beginning
from rlhf_eval_gcg.attack.lane import Answers, Lane
from rlhf_eval_gcg.attack.optimizer import Suffix, SuffixOptimizer, load_optimizer
from rlhf_eval_gcg.attack.result import AttackResult
from rlhf_eval_gcg.attack.victim import Group

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack
    from rlhf_eval_gcg.attack.prompt import AttackPrompt
    from rlhf_eval_gcg.attack.victim import Victim

__all__ = ["Record", "Search", "make_search"]

TRIES = 256
"""Draws of a random first suffix before the given one is taken."""


@dataclass
class Record:
    """Progress of a search, as plain values that can be saved directly."""

    losses: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    spent: float = 0.0
    candidates: int = 0
    initial_loss: float = float("nan")
    matched: bool = False

    @property
    def best(self) -> int:
        """Number of the step with the lowest loss; the last one after an early stop, whose suffix matched."""
        return len(self.losses) - 1 if self.matched else self.losses.index(min(self.losses))


@dataclass
class Search:
    """One suffix under search."""

    goals: tuple[int, ...]
    """numbers of the goals that the suffix is searched for"""
    lanes: list[Lane]
    """prompts on the models under attack"""
    draft_lanes: list[Lane]
    """prompts on the draft model"""
    suffix: Suffix
    optimizer: SuffixOptimizer
    record: Record = field(default_factory=Record)
    opened: bool = False
    """True once the beginnings of its lanes are computed, or counted before a crash"""

    @property
    def max_flops(self) -> float:
        """This search's part of the goal's limit of operations; restarts have equal parts. 0 is no limit."""
        return self.suffix.options.max_flops / self.suffix.options.restarts

    @property
    def is_finished(self) -> bool:
        """True if the search is at its limit of steps or operations, or has matched."""
        options, record = self.suffix.options, self.record
        spent = 0 < self.max_flops <= record.spent and bool(record.losses)
        return record.matched or spent or len(record.losses) >= options.steps

    def refresh_progress(self) -> None:
        """Tell the optimizer how much of the budget is used."""
        options, record = self.suffix.options, self.record
        share = record.spent / self.max_flops if self.max_flops else 0.0
        self.suffix.step = len(record.losses)
        self.suffix.progress = min(1.0, max(share, len(record.losses) / options.steps))

    def result(self, lane: Lane, goal: Any) -> AttackResult:
        """Return the outcome for one of its goals, whose lane is `lane`."""
        record, prompt = self.record, lane.prompt
        texts = prompt.texts(record.ids)
        ids = record.ids[record.best]
        text = texts[record.best]
        found = AttackResult(
            goal=goal, ids=tuple(ids), text=text, message=prompt.message(text), prompt_ids=prompt.prompt_ids(ids),
            loss=record.losses[record.best], initial_loss=record.initial_loss, losses=tuple(record.losses),
            texts=tuple(texts), flops=tuple(record.flops), candidates=record.candidates, matched=False,
            target_ids=prompt.answers[0] if prompt.answers else (),
        )  # fmt: skip
        return replace(found, matched=greedy_match(lane.victim, found))


def greedy_match(victim: Victim, result: AttackResult) -> bool:
    """Return whether greedy decoding after the prompt with the suffix gives the whole target."""
    length = len(result.target_ids)
    if not length:
        return False
    row = torch.tensor([[*result.prompt_ids, *result.target_ids[:-1]]], device=victim.device)
    with torch.no_grad():
        (logits_1TV,), _ = victim.logits([Group(Beginning(), row, length)])
    return bool(logits_1TV[0].argmax(-1).tolist() == list(result.target_ids))


def make_search(
    numbers: Sequence[int],
    prompts: Sequence[AttackPrompt],
    victims: Sequence[Victim],
    draft: Victim | None,
    tokens: tuple[Tensor, Tensor],
    options: Attack,
    seed: int,
    restart: int,
) -> Search:
    """Return the search of one suffix for some goals.

    Args:
        numbers: of the goals.
        prompts: of the goals.
        victims: the models under attack.
        draft: the draft model.
        tokens: those allowed in a suffix (V,), and those of single letters (M,).
        options: of the attack.
        seed: of the search.
        restart: number of the search among those of its goals; the first begins with the given suffix.

    Raises:
        DataError: the suffix becomes other tokens in one prompt than in another.
    """
    first = prompts[0].suffix_ids
    for prompt in prompts:
        if prompt.suffix_ids != first:
            raise DataError(
                f"{prompt.goal.place}: the suffix has other tokens here than for {prompts[0].goal.place}, so it "
                f"cannot be shared by all goals; change {option('suffix')} or {option('separator')}"
            )
    allowed_V, letters_M = tokens
    device = victims[0].device
    suffix = Suffix(
        ids_L=torch.tensor(first, device=device),
        options=options,
        allowed_V=allowed_V.to(device),
        generator=torch.Generator().manual_seed(seed),
        survivors=_filter(prompts, options),
        letters_M=letters_M,
        answer_M=_answer_tokens(prompts, allowed_V, options),
        place=prompts[0].goal.place,
        has_draft=draft is not None,
    )
    if restart:
        _draw_beginning(suffix)
    lanes = [_lane(victim, prompt, options) for prompt in prompts for victim in victims]
    drafts = [_lane(draft, prompt, options) for prompt in prompts] if draft is not None else []
    return Search(tuple(numbers), lanes, drafts, suffix, load_optimizer(options))


def _answer_tokens(prompts: Sequence[AttackPrompt], allowed_V: Tensor, options: Attack) -> Tensor:
    """Return the allowed tokens of all texts that are aimed at (M,), each once, in their order."""
    texts = [answer for prompt in prompts for answer in _aims(prompt, options)]
    ids = dict.fromkeys(token for answer in texts if options.objective != "reward" for token in answer)
    return torch.tensor([token for token in ids if bool(allowed_V[token])], dtype=torch.long)


def _draw_beginning(suffix: Suffix) -> None:
    """Replace the first suffix by a random one of letters and signs that stays what it is in its place."""
    letters, length = suffix.letters_M, len(suffix.ids_L)
    for _ in range(TRIES if len(letters) else 0):
        drawn_L = letters[torch.randint(len(letters), (length,), generator=suffix.generator)]
        if bool(suffix.survivors(drawn_L[None])[0]):
            suffix.ids_L = drawn_L.to(suffix.ids_L.device)
            return


def _filter(prompts: Sequence[AttackPrompt], options: Attack) -> Any:
    """Return the function that finds the candidates that survive."""

    def survivors(ids_CL: Tensor) -> Tensor:
        kept_C = torch.ones(len(ids_CL), dtype=torch.bool)
        if options.filter_ids:
            for prompt in prompts:
                alive = kept_C.nonzero().flatten()
                kept_C[alive] = torch.tensor(prompt.stable(ids_CL[alive].tolist()), dtype=torch.bool)
        return kept_C

    return survivors


def _aims(prompt: AttackPrompt, options: Attack) -> Sequence[Sequence[int]]:
    """Return the tokens of the answers that the suffix must make likely."""
    if options.objective != "bad_set":
        return prompt.answers[:1]
    every = list(dict.fromkeys(prompt.answers))  # an answer that begins with another one is given only together with it
    return [ids for ids in every if not any(ids[: len(other)] == other for other in every if other != ids)]


def _lane(victim: Victim, prompt: AttackPrompt, options: Attack) -> Lane:
    """Return the lane of a prompt on a model."""

    def tensor(ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=victim.device)

    chosen = _aims(prompt, options)
    kind = "likelihood" if options.objective == "bad_set" else options.loss
    weights = None if options.objective == "bad_set" else (1.0,) * len(chosen)
    answers = Answers(tuple(tensor(ids) for ids in chosen), kind, weights)
    lane = Lane(victim, prompt, answers, tensor(prompt.before_ids), tensor(prompt.after_ids))
    extra = options.sample_tokens if options.objective == "reward" else 0
    lane.cached = victim.caches(lane.length + extra)
    return lane
