"""One decoding step on the device alone: read a token of each row, draw the next one, note it. No host takes part.

All that a step reads and writes is in tensors of fixed place, so that a CUDA graph recorded once is every step: replaying it
costs one launch where a step has a thousand. Graphs are recorded per number of rows (`BUCKETS`); a batch takes the next larger
one, its idle rows writing to a cell and a column that is not read. The host looks every few steps which rows have ended.

Shape letters: R rows of the batch, B all rows of a wave, T new tokens, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_core.lazy import torch
from rlhf_core.models.heads.warp import draw_from

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling
    from rlhf_core.rollout.slots import Slots

__all__ = ["BUCKETS", "Board", "Stepper", "bucket_of", "draw_next"]

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that graphs are recorded for: a batch is at most half as large again as its rows."""


def bucket_of(rows: int) -> int:
    """Return the smallest bucket for `rows` rows."""
    return BUCKETS[bisect_left(BUCKETS, rows)]


class Next(NamedTuple):
    """Tokens drawn for each row."""

    tokens_R: Tensor
    logprobs_R: Tensor
    log_mass_R: Tensor | None = None


class Board:
    """The rows of the batch and what they have drawn, in tensors that keep their places.

    Args:
        rows: B, of a wave at most.
        tokens: T, new ones per row at most.
        slots: the buffers of keys and values; the last cell is for idle rows.
        ends: ids of the tokens that end a row.
        device: where everything is.
    """

    def __init__(self, rows: int, tokens: int, slots: Slots, ends: Tensor, device: torch.device) -> None:
        self.rows, self.tokens, self.slots, self.ends, self.device = rows, tokens, slots, ends, device
        many, spare = bucket_of(rows), slots.cells - 1

        def make(shape: int, fill: int | bool, dtype: torch.dtype) -> Tensor:
            return torch.full((shape,), fill, dtype=dtype, device=device)

        # per row of the batch
        self.token_R, self.position_R = make(many, 0, torch.int64), make(many, 0, torch.int64)
        self.start_R = make(many + 1, spare, torch.int32)
        self.row_R, self.live_R = make(many, rows, torch.int64), make(many, False, torch.bool)
        self.limit_R, self.queries_R = (
            make(many, 0, torch.int64),
            torch.arange(many + 1, dtype=torch.int32, device=device),
        )
        # per row of the wave, and one that takes what idle rows write
        self.uniforms_BT = torch.zeros(rows + 1, tokens, dtype=torch.float64, device=device)
        self.tokens_C = make((rows + 1) * tokens, 0, torch.int64)
        self.logprobs_C, self.log_mass_C = torch.zeros(2, (rows + 1) * tokens, device=device)
        self.ends_B, self.stopped_B = make(rows + 1, 0, torch.int64), make(rows + 1, False, torch.bool)
        self.at = make(1, 0, torch.int64)
        """tokens drawn so far"""

    def begin(self, starts: Tensor, positions: Tensor, limits: Tensor, uniforms_BT: Tensor) -> None:
        """Begin a wave: rows with ascending first cells, positions of their first new tokens, and how many each may draw."""
        count = len(starts)
        self._idle(0)
        self.row_R[:count] = torch.arange(count, device=starts.device)
        self.live_R[:count] = True
        self.start_R[:count], self.position_R[:count], self.limit_R[:count] = starts.int(), positions, limits
        self.uniforms_BT[:count, : uniforms_BT.shape[1]] = uniforms_BT
        for each in (self.tokens_C, self.logprobs_C, self.log_mass_C, self.ends_B, self.stopped_B, self.at):
            each.zero_()

    def _idle(self, first: int) -> None:
        """Let the rows from `first` on stand for none."""
        self.live_R[first:], self.row_R[first:], self.limit_R[first:] = False, self.rows, 0
        self.token_R[first:], self.position_R[first:] = 0, 0
        self.start_R[first:] = self.slots.cells - 1

    def select(self, kept: Tensor) -> None:
        """Keep the rows `kept` of the batch, ascending."""
        count = len(kept)
        for each in (self.token_R, self.position_R, self.start_R, self.row_R, self.live_R, self.limit_R):
            each[:count] = each[kept]
        self._idle(count)

    def note(self, drawn: Next) -> None:
        """Write down what the first rows have drawn, and which of them have ended with it."""
        many = len(drawn.tokens_R)
        live_R, row_R = self.live_R[:many], self.row_R[:many]
        place_R = torch.where(live_R, row_R, self.rows)
        cell_R = place_R * self.tokens + self.at
        self.tokens_C.index_copy_(0, cell_R, drawn.tokens_R)
        self.logprobs_C.index_copy_(0, cell_R, drawn.logprobs_R.float())
        if drawn.log_mass_R is not None:
            self.log_mass_C.index_copy_(0, cell_R, drawn.log_mass_R.float())
        self.at += 1
        hit_R = (drawn.tokens_R[:, None] == self.ends).any(1)
        over_R = hit_R | (self.limit_R[:many] <= self.at)
        ended_R = torch.where(live_R & over_R, row_R, self.rows)
        self.ends_B.index_copy_(0, ended_R, self.at.expand(many))
        self.stopped_B.index_copy_(0, ended_R, hit_R)
        live_R &= ~over_R
        self.token_R[:many] = drawn.tokens_R

    def aim(self, many: int, widest: int) -> None:
        """Let attention add a token to each of the first `many` rows."""
        slots = self.slots
        slots.cells_S, slots.widest = None, widest
        slots.starts_R, slots.row_R = self.start_R[: many + 1], self.queries_R[: many + 1]
        slots.lengths_R = (self.position_R[:many] + 1).int()
        slots.cells_R = self.start_R[:many] + self.position_R[:many]

    def state(self) -> list[Tensor]:
        """Return what a step changes, keys and values aside: those are written again."""
        return [
            *(self.token_R, self.position_R, self.live_R, self.at, self.ends_B, self.stopped_B),
            *(self.tokens_C, self.logprobs_C, self.log_mass_C),
        ]


class Stepper:
    """Runs steps, by graphs where there are any.

    Args:
        forward: token ids (R, 1) and positions (R, 1) to logits (R, V); attends in slots.
        draw: logits and uniform numbers to what is drawn, without a host; None where the host takes part, and a step ends
            with the logits.
        graphs: record a graph per number of rows and replay it; CUDA only.
    """

    def __init__(
        self,
        board: Board,
        forward: Callable[[Tensor, Tensor], Tensor],
        draw: Callable[[Tensor, Tensor], Next] | None,
        *,
        graphs: bool,
    ) -> None:
        self.board, self.forward, self.draw, self.graphs = board, forward, draw, graphs
        self._recorded: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, many: int, widest: int) -> Tensor:
        """Read the newest token of the first `many` rows, and draw the next unless the host does; return the logits (R, V)."""
        if not self.graphs:
            return self._step(many, widest)
        if (many, widest) not in self._recorded:
            self._recorded[many, widest] = self._record(many, widest)
        graph, logits_RV = self._recorded[many, widest]
        graph.replay()
        return logits_RV

    def forget(self) -> None:
        """Drop all graphs: what they read is elsewhere now."""
        self._recorded.clear()
        self._pool = None

    def _step(self, many: int, widest: int) -> Tensor:
        board = self.board
        board.aim(many, widest)
        logits_RV = self.forward(board.token_R[:many, None], board.position_R[:many, None])
        board.position_R[:many] += board.live_R[:many]
        if self.draw is not None:
            board.note(self.draw(logits_RV, board.uniforms_BT[board.row_R[:many], board.at]))
        return logits_RV

    def _record(self, many: int, widest: int) -> tuple[Any, Tensor]:
        """Record a step; kernels are chosen and loaded by two passes before, of which nothing stays."""
        state, now, side = self.board.state(), torch.cuda.current_stream(), _recording_stream(self.board.device)
        before = [each.clone() for each in state]
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(now)
        with torch.cuda.stream(side):  # left even if `torch.cuda.graph`, which fails to leave its own then, raises
            for _ in range(2):
                self._step(many, widest)
                for each, old in zip(state, before, strict=True):
                    each.copy_(old)
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                logits_RV = self._step(many, widest)
        now.wait_stream(side)
        self._pool = graph.pool()  # graphs run one after another and keep nothing in it but logits, read at once
        return graph, logits_RV


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that all graphs of a device are recorded on: cuBLAS keeps a workspace of 32 MiB for every stream."""
    return torch.cuda.Stream(device)


def draw_next(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling, lacking_L: Tensor) -> Next:
    """Return the next tokens of an untruncated distribution, and their log-probabilities over all ids.

    The tokens are those of `models.heads.warp.draw`, up to the rounding of sums. Of the vocabulary's tensors one is written,
    the float32 probabilities: the others would cost more than the weights of a small model.

    Args:
        lacking_L: ids that are not drawn.
    """
    if sampling.temperature == 0:
        known_RV = logits_RV.index_fill(1, lacking_L, -torch.inf) if len(lacking_L) else logits_RV
        tokens_R = known_RV.argmax(-1)
        logprobs_RV = torch.log_softmax(logits_RV, -1, dtype=torch.float32)
        return Next(tokens_R, logprobs_RV.gather(1, tokens_R[:, None])[:, 0])
    warm_RV = logits_RV
    if sampling.temperature != 1:
        warm_RV = logits_RV / torch.full((1,), sampling.temperature, device=logits_RV.device)  # float32 in one pass
    probs_RV = torch.softmax(warm_RV, -1, dtype=torch.float32)
    if len(lacking_L):
        probs_RV.index_fill_(1, lacking_L, 0)
    tokens_R = draw_from(probs_RV, uniforms_R)
    return Next(tokens_R, probs_RV.gather(1, tokens_R[:, None])[:, 0].log())
