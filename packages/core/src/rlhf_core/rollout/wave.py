"""One wave of completions on a board: step by step until all rows have ended, with a look at them every few steps.

Shape letters: R rows of the batch, B all rows of the wave, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlhf_core.contract.kept_sets import replays
from rlhf_core.errors import RunStopped
from rlhf_core.lazy import torch
from rlhf_core.rollout.kept_sets import KeptSetsRecorder
from rlhf_core.rollout.sampler import SampledCompletion, Stops, pick
from rlhf_core.rollout.step import Board, Next, Stepper, bucket_of
from rlhf_core.util.activity import report

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["CHECK", "Wave"]

CHECK = 8
"""Steps from one look at which rows have ended to the next: what ended meanwhile costs its share of so many steps at most."""


class Wave:
    """Decodes the rows of a board until all have ended."""

    def __init__(
        self,
        board: Board,
        stepper: Stepper,
        sampling: Sampling,
        stops: Stops,
        lacking_L: Tensor,
        widest: int,
        count: tuple[int, int],
        refresh: Callable[[], int],
    ) -> None:
        self.board, self.stepper, self.sampling, self.stops = board, stepper, sampling, stops
        self.lacking_L, self.widest, self.count, self.refresh = lacking_L, widest, count, refresh
        self.recorder: KeptSetsRecorder | None = None

    def decode(self, logits_BV: Tensor, version: int, rows: int) -> list[SampledCompletion]:
        """Draw from the first logits, of weights of this version, then step by step; return all rows' completions."""
        board, versions = self.board, [version]
        self.recorder = KeptSetsRecorder(rows, board.tokens) if replays(self.sampling) else None
        self._draw(logits_BV, 0)
        drawn, many = 1, bucket_of(rows)
        self._stop_strings(0, 1)
        while live := int(board.live_R.sum()):
            report("sampling", self.count[0] + rows - live, self.count[1])
            if bucket_of(live) < many:
                many = bucket_of(live)
                board.select(board.live_R.nonzero()[:, 0])
            until = min(drawn + CHECK, board.tokens)
            for t in range(drawn, until):
                versions.append(self.refresh())
                logits_RV = self.stepper(many, self.widest)
                if self.stepper.draw is None:
                    self._draw(logits_RV, t)
            self._stop_strings(drawn, until)
            drawn = until
        return self._completions(rows, versions)

    def _draw(self, logits_RV: Tensor, t: int) -> None:
        """Draw token `t` of the first rows, where the host takes part."""
        board, many = self.board, len(logits_RV)
        uniforms_R = board.uniforms_BT[board.row_R[:many], t]
        if self.stepper.draw is not None:
            board.note(self.stepper.draw(logits_RV, uniforms_R))
            return
        tokens_R, logprobs_R, warped = pick(logits_RV, uniforms_R, self.sampling, self.lacking_L)
        live_R = board.live_R[:many]
        if self.recorder is not None:
            self.recorder.add(board.row_R[:many][live_R], t, warped.kept_NV[live_R])
        board.note(Next(tokens_R, logprobs_R, warped.log_mass_N))

    def _stop_strings(self, first: int, until: int) -> None:
        """End the rows in which one of the tokens `first` up to `until` completes a stop string, with that token."""
        if not self.stops.strings:
            return
        board = self.board
        many = bucket_of(max(1, int((board.row_R < board.rows).sum())))
        row_R, tokens_BT = board.row_R[:many], board.tokens_C.view(-1, board.tokens)
        for t in range(first, until):
            ends_R = board.ends_B[row_R]
            live_R = (row_R < board.rows) & ((ends_R == 0) | (ends_R > t))
            hit_R = live_R & self.stops.hit(tokens_BT, row_R, live_R, t)
            board.ends_B[row_R[hit_R]], board.stopped_B[row_R[hit_R]] = t + 1, True
            board.live_R[:many] &= ~hit_R

    def _completions(self, rows: int, versions: list[int]) -> list[SampledCompletion]:
        """Return what the rows have drawn, on the CPU.

        Raises:
            RunStopped: a log-probability is not finite.
        """
        board = self.board
        ends, stopped = board.ends_B[:rows].tolist(), board.stopped_B[:rows].tolist()
        tokens_BT, logprobs_BT, log_mass_BT = (
            each.view(-1, board.tokens)[:rows].to("cpu", copy=True)
            for each in (board.tokens_C, board.logprobs_C, board.log_mass_C)
        )
        if not bool(logprobs_BT.isfinite().all()):
            raise RunStopped(
                "the policy's log-probabilities are not finite; lower its learning rate, or raise the KL coefficient"
            )
        kept_sets = self.recorder.completions(ends) if self.recorder is not None else [None] * rows
        versions_T = torch.tensor(versions)
        columns = zip(tokens_BT, logprobs_BT, log_mass_BT, ends, stopped, kept_sets, strict=True)
        return [
            SampledCompletion(
                tokens_T[:end], logprobs_T[:end], mass_T[:end], "stop" if stop else "length", kept, versions_T[:end]
            )
            for tokens_T, logprobs_T, mass_T, end, stop, kept in columns
        ]
