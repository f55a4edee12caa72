"""One step of several searches: what their optimizers ask is answered together, in batches over all of them."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.checks import check_move, check_question
from rlhf_eval_gcg.attack.gradient import batch_gradients, lane_gradient
from rlhf_eval_gcg.attack.lane import Lane
from rlhf_eval_gcg.attack.optimizer import Losses, Move, TokenGradient
from rlhf_eval_gcg.attack.reward_objective import Rewards, renew_answers
from rlhf_eval_gcg.attack.scoring import Scorer
from rlhf_eval_gcg.attack.search import Search

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine"]


class Engine:
    """Runs steps of searches.

    Args:
        scorer: computes losses.
        rewards: of answers, for objective `reward`.
        judge_suffix: let `rewards` read the suffix.
    """

    def __init__(self, scorer: Scorer, rewards: Rewards | None = None, judge_suffix: bool = True) -> None:
        self.scorer, self.rewards, self.judge_suffix = scorer, rewards, judge_suffix

    def begin(self, search: Search) -> None:
        """Compute what the search needs before its first step."""
        for lane in (*search.lanes, *search.draft_lanes):
            cost = lane.open()
            search.record.spent += 0.0 if search.opened else cost
            if lane.base_L is not None and not lane.base.layers:  # counted before a crash
                lane_gradient(lane, lane.base_L, 1, search.suffix.options)
        search.opened = True
        if self.rewards is not None and not search.record.losses:
            search.suffix.loss = search.record.initial_loss = self._mean_reward(search)

    def step(self, searches: Sequence[Search]) -> None:
        """Do one step of each search."""
        asked: list[tuple[Search, Generator[Any, Any, Move], Any]] = []
        for search in searches:
            search.refresh_progress()
            steps = search.optimizer.step(search.suffix)
            made: object = steps
            if not isinstance(made, Generator):
                schedule = search.suffix.options.schedule
                raise UsageError(
                    f"schedule {schedule!r}: step() yields no question; write yield TokenGradient or Losses"
                )
            asked += self._resume(search, steps, None)
        while asked:
            answers = self._answer([(search, question) for search, _, question in asked])
            following: list[tuple[Search, Generator[Any, Any, Move], Any]] = []
            for (search, steps, _), answer in zip(asked, answers, strict=True):
                if isinstance(answer, Move):  # a candidate matched
                    steps.close()
                    self._end_step(search, answer)
                    continue
                following += self._resume(search, steps, answer)
            asked = following

    def _resume(
        self, search: Search, steps: Generator[Any, Any, Move], answer: Any
    ) -> list[tuple[Search, Generator[Any, Any, Move], Any]]:
        """Return the search with its next question; nothing if its step has ended instead."""
        try:
            question = steps.send(answer)
        except StopIteration as end:
            self._end_step(search, check_move(search.suffix, end.value))
            return []
        return [(search, steps, check_question(search.suffix, question))]

    def _answer(self, questions: Sequence[tuple[Search, Any]]) -> list[Any]:
        """Return the answer to each question; a `Move` where an early stop ends the step."""
        answers: list[Any] = [None] * len(questions)
        sought, scored = [], []
        for place, (_, question) in enumerate(questions):
            if isinstance(question, TokenGradient):
                sought.append(place)
            else:
                scored.append(place)
        for place, gradient in zip(sought, self._gradients([questions[k] for k in sought]), strict=True):
            answers[place] = gradient
        for place, (losses_C, match) in zip(scored, self._losses([questions[k] for k in scored]), strict=True):
            search, question = questions[place]
            answers[place] = losses_C
            if match is not None:
                search.record.matched = True
                answers[place] = Move(question.ids_CL[match], float(losses_C[match]))
        return answers

    def _gradients(self, asked: Sequence[tuple[Search, TokenGradient]]) -> list[tuple[Tensor, float]]:
        """Return the gradient (L, V) and the loss of each question, means over its search's lanes."""
        tasks = [
            (place, lane, question.choice.to(lane.victim.device))
            for place, (search, question) in enumerate(asked)
            for lane in search.lanes
        ]
        totals: list[Tensor | None] = [None] * len(asked)
        losses: list[list[float]] = [[] for _ in asked]
        waiting = list(self.scorer.gradient_batches(tasks))
        while waiting:
            batch = waiting.pop(0)
            suffix = asked[batch[0][0]][0].suffix
            lanes, choices = [lane for _, lane, _ in batch], [choice for _, _, choice in batch]
            try:
                if len(batch) > 1:
                    found = batch_gradients(lanes, choices, len(suffix.allowed_V), suffix.options)
                else:
                    found = [lane_gradient(lanes[0], choices[0], len(suffix.allowed_V), suffix.options)]
            except (MemoryError, RuntimeError) as error:
                self.scorer.halve(error, "gradient", len(batch) == 1)
                middle = len(batch) // 2
                waiting[:0] = [batch[:middle], batch[middle:]]
                continue
            for (place, _, _), (gradient_LV, loss, flops) in zip(batch, found, strict=True):
                search = asked[place][0]
                gradient_LV = gradient_LV.to(search.suffix.allowed_V.device) / len(search.lanes)
                before = totals[place]
                totals[place] = gradient_LV if before is None else before + gradient_LV
                losses[place].append(loss)
                search.record.spent += flops
        answers = []
        for (search, question), total_LV, own in zip(asked, totals, losses, strict=True):
            assert total_LV is not None
            mean = sum(own) / len(own)
            if not search.record.losses and self.rewards is None and not question.choice.is_floating_point():
                search.record.initial_loss = mean
            answers.append((total_LV, mean))
        return answers

    def _losses(self, asked: Sequence[tuple[Search, Losses]]) -> list[tuple[Tensor, int | None]]:
        """Return the losses of each question's candidates, and the best one that matches under an early stop."""
        tasks: list[tuple[int, Lane, Tensor]] = []
        for place, (search, question) in enumerate(asked):
            lanes = search.draft_lanes if question.by_draft else search.lanes
            tasks += [(place, lane, question.ids_CL.to(lane.victim.device)) for lane in lanes]
        sums: list[Tensor | None] = [None] * len(asked)
        matches: list[Tensor | None] = [None] * len(asked)
        for victim in dict.fromkeys(lane.victim for _, lane, _ in tasks):
            own = [(place, lane, ids) for place, lane, ids in tasks if lane.victim is victim]
            found = self.scorer.losses([(lane, ids) for _, lane, ids in own])
            for (place, _, _), losses_C, matched_C, cost in zip(own, *found, strict=True):
                search = asked[place][0]
                losses_C, matched_C = losses_C.to(search.suffix.ids_L.device), matched_C.to(search.suffix.ids_L.device)
                before, all_before = sums[place], matches[place]
                sums[place] = losses_C if before is None else before + losses_C
                matches[place] = matched_C if all_before is None else all_before & matched_C
                search.record.spent += cost
        results: list[tuple[Tensor, int | None]] = []
        for (search, question), total_C, every_C in zip(asked, sums, matches, strict=True):
            assert total_C is not None and every_C is not None
            mean_C = total_C / len(search.draft_lanes if question.by_draft else search.lanes)
            search.record.candidates += 0 if question.by_draft else len(mean_C)
            match = None
            if search.suffix.options.early_stop and not question.by_draft and bool(every_C.any()):
                match = int(mean_C.masked_fill(~every_C, torch.inf).argmin())
            results.append((mean_C, match))
        return results

    def _end_step(self, search: Search, move: Move) -> None:
        """Move the suffix and write the step into the record."""
        suffix, record = search.suffix, search.record
        if math.isnan(record.initial_loss):  # the optimizer did not ask for it, or the step ended before
            record.initial_loss = self._current_loss(search)
        suffix.ids_L, suffix.loss = move.ids_L.to(suffix.ids_L.device), move.loss
        if self.rewards is not None:
            suffix.loss = self._mean_reward(search)
        record.losses.append(suffix.loss)
        record.ids.append(suffix.ids_L.tolist())
        record.flops.append(record.spent)

    def _current_loss(self, search: Search) -> float:
        """Return the loss of the current suffix, a mean over lanes; a measurement that is no part of the attack's cost."""
        found = [
            self.scorer.losses([(lane, search.suffix.ids_L[None].to(lane.victim.device))])[0][0]
            for lane in search.lanes
        ]
        return sum(float(losses_C[0]) for losses_C in found) / len(found)

    def _mean_reward(self, search: Search) -> float:
        """Sample new answers for every lane; return the mean reward."""
        assert self.rewards is not None
        found = [renew_answers(lane, search.suffix, self.rewards, self.judge_suffix) for lane in search.lanes]
        search.record.spent += sum(flops for _, flops in found)
        return sum(reward for reward, _ in found) / len(found)
