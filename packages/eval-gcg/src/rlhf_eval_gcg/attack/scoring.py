"""The losses of many candidates, in batches of rows.

Rows that share tokens with the current suffix start where they first differ from it. They are sorted by that place and cut
into pieces, so that few tokens are computed twice; pieces of several prompts fill one batch on an accelerator. On a CPU, pieces
are packed without padding where the model can, in passes of equal size. When memory runs out, batches are halved. No cut
changes a loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.util.messages import log
from rlhf_eval_gcg.attack.lane import Lane
from rlhf_eval_gcg.attack.losses import answer_losses, greedy_matches

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack
    from rlhf_eval_gcg.attack.victim import Group, Victim

__all__ = ["Scorer"]

CPU_LOGIT_CELLS, LOGIT_CELLS = 1 << 26, 1 << 28
"""Most logits of a batch, for any vocabulary: 256 MiB in float32 on a CPU, 1 GiB on an accelerator."""
PASS_TOKENS = 1024
"""Most tokens of a packed pass: enough for products at full speed, and few enough for intermediate results in a cache."""
SPARE_ON_CPU, SPARE = 0.05, 0.5
"""Share of a piece's tokens that may be known already: a CPU pays for each, an accelerator more for a further launch."""
CHEAP = 24
"""Known tokens that cost less than one more pass, which reads all weights, even on a CPU."""


@dataclass(frozen=True)
class _Piece:
    """Candidates of a lane that are computed from one start on, for one answer."""

    task: int
    answer: int
    lane: Lane
    rows: Tensor
    start: int

    def cells(self, length: int) -> int:
        """Tokens that are computed, for suffixes of `length` tokens."""
        past = 0 if self.lane.cached else len(self.lane.before_P)
        tail = length - self.start + len(self.lane.after_A) + len(self.lane.answers.ids[self.answer]) - 1
        return len(self.rows) * (past + tail)


class Scorer:
    """Computes losses in batches that fit into memory.

    Args:
        options: of the attack: the token budget and the loss.
        mixes: fill a batch with rows of several prompts; None does so on accelerators.
    """

    def __init__(self, options: Attack, mixes: bool | None = None) -> None:
        self.options, self.mixes = options, mixes
        self.budget = options.batch_tokens
        self.halvings = 0

    def losses(self, tasks: Sequence[tuple[Lane, Tensor]]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Return losses (C,), greedy matches (C,) of the first answer, and operations of each task.

        Args:
            tasks: a lane, and candidates (C, L) for it. Lanes of one call belong to one model.
        """
        losses = [torch.zeros(len(lane.answers.ids), len(ids), device=ids.device) for lane, ids in tasks]
        matches = [torch.zeros(len(ids), dtype=torch.bool, device=ids.device) for _, ids in tasks]
        costs = [0.0 for _ in tasks]
        waiting = [piece for task, (lane, ids) in enumerate(tasks) for piece in self._pieces(task, lane, ids)]
        while waiting:
            batch = self._take(waiting, tasks)
            groups = [p.lane.group(tasks[p.task][1][p.rows], p.start, p.lane.answers.ids[p.answer]) for p in batch]
            try:
                self._compute(batch, groups, losses, matches)
            except (MemoryError, RuntimeError) as error:
                waiting[:0] = self._smaller(batch, error)
                continue
            for piece, group in zip(batch, groups, strict=True):
                past, (rows, new) = len(group.beginning), group.rows.shape
                costs[piece.task] += piece.lane.victim.costs.forward(rows, new, past, group.keep)
        combined = [lane.answers.combine(each) for (lane, _), each in zip(tasks, losses, strict=True)]
        return combined, matches, costs

    def logit_cells(self, victim: Victim) -> int:
        """Return how many logits a batch may have, at least one."""
        return max(1, (CPU_LOGIT_CELLS if victim.on_cpu else LOGIT_CELLS) >> self.halvings)

    def gradient_batches(self, tasks: Sequence[tuple[int, Lane, Tensor]]) -> Iterator[list[tuple[int, Lane, Tensor]]]:
        """Cut (place, lane, choice) into batches of one pass each; several lanes in one only on an accelerator.

        Lanes of several answers and those that share no beginning are separate, and no lane comes twice in a batch.
        """
        batch: list[tuple[int, Lane, Tensor]] = []
        for task in tasks:
            more = [*batch, task]
            lanes = [lane for _, lane, _ in more]
            joint = all(self._joins(lane) and lane.victim is lanes[0].victim for lane in lanes)
            rows = [lane.length - len(lane.before_P) for lane in lanes]
            keep = max(len(ids) for lane in lanes for ids in lane.answers.ids[:1])
            small = len(rows) * max(rows) <= self.budget and len(rows) * keep * lanes[
                0
            ].victim.vocabulary <= self.logit_cells(lanes[0].victim)
            if batch and not (joint and small and len(set(map(id, lanes))) == len(lanes)):
                yield batch
                more = [task]
            batch = more
        if batch:
            yield batch

    def _joins(self, lane: Lane) -> bool:
        """Return True if rows of a lane may be in a batch with those of other lanes."""
        mixes = not lane.victim.on_cpu if self.mixes is None else self.mixes
        return mixes and lane.victim.takes_positions and lane.cached and len(lane.answers.ids) == 1

    def _compute(
        self, batch: Sequence[_Piece], groups: Sequence[Group], losses: list[Tensor], matches: list[Tensor]
    ) -> None:
        """Write the losses and matches of a batch into their places."""
        options = self.options
        with torch.no_grad():
            logits, _ = batch[0].lane.victim.logits(groups)
            for piece, logits_RTV in zip(batch, logits, strict=True):
                answers = piece.lane.answers
                ids_RT = answers.ids[piece.answer].expand(len(piece.rows), -1)
                rows = piece.rows.to(logits_RTV.device)
                losses[piece.task][piece.answer, rows] = answer_losses(
                    logits_RTV, ids_RT, answers.kind, options.mellowmax_alpha, options.cw_margin
                )
                if options.early_stop and piece.answer == 0:
                    matches[piece.task][rows] = greedy_matches(logits_RTV, ids_RT)

    def _pieces(self, task: int, lane: Lane, ids_CL: Tensor) -> Iterator[_Piece]:
        """Cut the candidates of a task into pieces of like starts, each small enough for a batch; of equal ones if packed."""
        starts_C = lane.starts(ids_CL)
        if lane.cached and lane.victim.packs:
            for answer, start in itertools.product(range(len(lane.answers.ids)), starts_C.unique().tolist()):
                yield _Piece(task, answer, lane, (starts_C == start).nonzero()[:, 0], start)
            return
        order_C = starts_C.argsort(stable=True)
        spare = SPARE_ON_CPU if lane.victim.on_cpu else SPARE
        for answer, answer_T in enumerate(lane.answers.ids):
            tail = ids_CL.shape[1] + len(lane.after_A) + len(answer_T) - 1
            past = 0 if lane.cached else len(lane.before_P)
            most = self.logit_cells(lane.victim) // (len(answer_T) * lane.victim.vocabulary)
            rows: list[int] = []
            first = known = 0
            for row, start in zip(order_C.tolist(), starts_C[order_C].tolist(), strict=True):
                cells = (len(rows) + 1) * (past + tail - first)
                over = cells > self.budget or len(rows) >= most or known + start - first > max(CHEAP, spare * cells)
                if rows and over:
                    yield _Piece(task, answer, lane, torch.tensor(rows), first)
                    rows, known = [], 0
                if not rows:
                    first = start
                rows.append(row)
                known += start - first
            if rows:
                yield _Piece(task, answer, lane, torch.tensor(rows), first)

    def _take(self, waiting: list[_Piece], tasks: Sequence[tuple[Lane, Tensor]]) -> list[_Piece]:
        """Take the next batch from what waits: one piece, or as many as fit."""
        if waiting[0].lane.cached and waiting[0].lane.victim.packs:
            return self._take_packed(waiting, tasks)
        batch = [waiting.pop(0)]
        victim = batch[0].lane.victim
        mixes = not victim.on_cpu if self.mixes is None else self.mixes
        if not mixes or not victim.takes_positions or not batch[0].lane.cached:
            return batch

        def cells(pieces: Sequence[_Piece]) -> int:
            each = [piece.cells(tasks[piece.task][1].shape[1]) // len(piece.rows) for piece in pieces]
            return sum(len(piece.rows) for piece in pieces) * max(each)

        def logits(pieces: Sequence[_Piece]) -> int:
            keep = max(len(piece.lane.answers.ids[piece.answer]) for piece in pieces)
            return sum(len(piece.rows) for piece in pieces) * keep * victim.vocabulary

        while waiting and waiting[0].lane.cached:
            more = [*batch, waiting[0]]
            if cells(more) > self.budget or logits(more) > self.logit_cells(victim):
                break
            batch.append(waiting.pop(0))
        return batch

    def _take_packed(self, waiting: list[_Piece], tasks: Sequence[tuple[Lane, Tensor]]) -> list[_Piece]:
        """Take an equal share of the pieces that can be packed, at most a full pass; the last piece may be cut."""
        victim = waiting[0].lane.victim
        tokens = max(1, min(self.budget, PASS_TOKENS >> self.halvings))

        def load(piece: _Piece) -> float:
            """Share of a full pass that a row of the piece is."""
            keep = len(piece.lane.answers.ids[piece.answer])
            new = piece.cells(tasks[piece.task][1].shape[1]) / len(piece.rows)
            return max(new / tokens, keep * victim.vocabulary / self.logit_cells(victim))

        task = waiting[0].task  # passes of a prompt are the same with and without others, and so is their rounding
        packed = list(
            itertools.takewhile(lambda piece: piece.lane.cached and (self.mixes or piece.task == task), waiting)
        )
        total = sum(load(piece) * len(piece.rows) for piece in packed)
        left = total / math.ceil(total)
        batch: list[_Piece] = []
        for piece in packed:
            fit = max(round(left / load(piece)), 0 if batch else 1)
            if fit < len(piece.rows):
                if fit:
                    batch.append(replace(piece, rows=piece.rows[:fit]))
                waiting[0] = replace(piece, rows=piece.rows[fit:])
                break
            batch.append(waiting.pop(0))
            left -= load(piece) * len(piece.rows)
        return batch

    def halve(self, error: Exception, row: str, alone: bool) -> None:
        """Halve the budget after memory ran out.

        Args:
            error: raised by a pass.
            row: name of what the pass computes.
            alone: the pass has one row.

        Raises:
            UsageError: one row does not fit.
            Exception: the error, if it is another one.
        """
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise error
        if alone:
            raise UsageError(
                f"one {row} alone does not fit in memory; use a smaller model, or set {option('prefix_cache', 'True')}"
            ) from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.budget, self.halvings = max(1, self.budget // 2), self.halvings + 1
        log.warning("out of memory; the attack continues with batches of %d tokens", self.budget)

    def _smaller(self, batch: Sequence[_Piece], error: Exception) -> list[_Piece]:
        """Halve the budget after memory ran out; return the batch in smaller pieces.

        Raises:
            UsageError: one row does not fit.
        """
        self.halve(error, "candidate", len(batch) == 1 and len(batch[0].rows) == 1)
        if len(batch) > 1:
            return list(batch)
        (piece,) = batch
        half = (len(piece.rows) + 1) // 2
        return [_Piece(piece.task, piece.answer, piece.lane, rows, piece.start) for rows in piece.rows.split(half)]
