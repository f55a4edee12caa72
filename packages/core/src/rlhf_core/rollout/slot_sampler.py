"""Sampling on a GPU: prompts packed, keys and values in slots, and a CUDA graph per decoding step.

It gives what `rollout.sampler` gives, up to the rounding of the dtype, and is taken where it can be (`slot_obstacle`): the
layers keep packed rows apart, torch's flash attention computes them, and a step needs no host. Whether a model's step agrees
with a plain forward pass is tried out on its own device and weights, before the first sampling.

Where top-p, top-k or min-p truncate, the model's step is a graph and the draw is not: its size depends on the numbers.

Shape letters: R rows of the batch, B all rows of a wave, P prompts of a wave, S their tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlhf_core.contract.kept_sets import replays, truncates
from rlhf_core.errors import RunStopped
from rlhf_core.lazy import torch
from rlhf_core.rollout.kept_sets import KeptSetsRecorder
from rlhf_core.rollout.narrow_weights import narrow_weights
from rlhf_core.rollout.sampler import Piece, SampledCompletion, Stops, pick, uniforms
from rlhf_core.rollout.segments import plan_chunks, plan_segments
from rlhf_core.rollout.slots import Slots, slots_attended
from rlhf_core.rollout.step import Board, Next, Stepper, bucket_of, draw_next
from rlhf_core.util.activity import report
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.options import Sampling

__all__ = ["SlotSampler", "slot_obstacle", "try_out"]

CHECK = 8
"""Steps from one look at which rows have ended to the next: what ended meanwhile costs its share of so many steps at most."""

READ = 16384
"""Prompt tokens that go through the model at a time."""

MEMORY = 0.5
"""Share of the GPU's free memory that keys and values may take."""

_found: WeakKeyDictionary[nn.Module, tuple[str, int]] = WeakKeyDictionary()
"""What `_try_out` found, per model."""


def slot_obstacle(model: Any, dtype: torch.dtype) -> str:
    """Return why a model on this device cannot be sampled from slots, as half a sentence; empty if it can. Logged once.

    Args:
        dtype: what the forward pass computes in.
    """
    from rlhf_core.models.inputs.packed_attention import NAME, varlen_obstacle

    text = model.config.get_text_config(decoder=True)
    if model.device.type != "cuda":
        return "it is on no GPU"
    if model in _found:
        return _found[model][0]
    if text._attn_implementation != NAME:
        obstacle, size = f"attention {text._attn_implementation} does not pack its rows", 0
    elif reason := varlen_obstacle(text, model.device, dtype):
        obstacle, size = f"torch's variable-length attention: {reason}", 0
    else:
        obstacle, size = try_out(model, dtype)
    _found[model] = obstacle, size
    if obstacle:
        log.info(f"sampling without CUDA graphs: {obstacle}")
    return obstacle


@torch.inference_mode()
def try_out(model: Any, dtype: torch.dtype, *, flash: bool = True) -> tuple[str, int]:
    """Return why steps in slots do not give what a forward pass gives, empty if they do; and the bytes that a token takes."""
    sampler = SlotSampler(model, dtype, cells=32, flash=flash, graphs=False)
    accepted = inspect.signature(model.forward).parameters
    if lacking := {"position_ids", "logits_to_keep"} - accepted.keys():
        return f"{type(model).__name__} takes no {min(lacking)}", 0
    prompts, more = [[1, 2, 3], [4, 5]], torch.tensor([[6, 7], [8, 9]], device=model.device)
    try:
        with sampler.open_slots():
            board = Board(2, 4, sampler.slots, torch.zeros(0, dtype=torch.long, device=model.device), model.device)
            starts, limits = torch.tensor([0, 5], device=model.device), torch.tensor([4, 4], device=model.device)
            found = [sampler.read(prompts, [0, 5])]
            board.begin(starts, torch.tensor([3, 2], device=model.device), limits, torch.zeros(2, 4).to(model.device))
            stepper = Stepper(board, sampler.forward, None, graphs=False)
            for tokens_R in more:
                board.token_R[:2] = tokens_R
                with _no_host(model.device):
                    logits_RV = stepper(2, 16)
                found.append(logits_RV)
            expected = [
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -3:]
                for row in ([1, 2, 3, 6, 8], [4, 5, 7, 9])
            ]
            size = sampler.slots.bytes_per_cell
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any architecture: whatever it cannot do, it need not
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{type(model).__name__} fails in such a step: {first}", 0
    ours, theirs = torch.stack(found, 1).float(), torch.stack(expected).float()
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    if not float((ours - theirs).norm()) <= tolerance * float(theirs.norm()):
        return f"{type(model).__name__} gives something else in such a step than in a forward pass", 0
    return "", size


class SlotSampler:
    """Samples completions of a model on its device.

    Args:
        model: a causal language model of transformers.
        dtype: what it computes in, and keeps keys and values in.
        cells: tokens of keys and values; 0 takes what a call needs, and at most half of the free memory.
        flash, graphs: use the GPU's kernel and graphs; without both the same code runs on the CPU.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, *, cells: int = 0, flash: bool = True, graphs: bool = True
    ) -> None:
        self.model, self.dtype, self.cells, self.flash, self.graphs = model, dtype, cells, flash, graphs
        self.slots = Slots(cells, dtype, flash)
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    @torch.inference_mode()
    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        *,
        eos_ids: Collection[int],
        decode: Callable[[list[list[int]]], list[str]] | None = None,
        limits: Sequence[int] = (),
        lacking: Sequence[int] = (),
    ) -> list[SampledCompletion]:
        """Return `sampling.n` completions of each prompt. The arguments are those of `rollout.sampler.sample`.

        Raises:
            RunStopped: the model's output is not finite.
        """
        most = list(limits) or [sampling.max_new_tokens] * len(prompt_ids)
        lengths = [len(ids) for ids in prompt_ids]
        waves = plan_segments(lengths, most, sampling.n, self._room(lengths, most, sampling.n))
        sizes = [[lengths[p.prompt] + most[p.prompt] for p in wave for _ in range(p.first, p.stop)] for wave in waves]
        found: dict[tuple[int, int], SampledCompletion] = {}
        if not waves:
            return []
        with self.open_slots(max(map(sum, sizes)) + 1):
            ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.model.device)
            board = Board(max(map(len, sizes)), sampling.max_new_tokens, self.slots, ends, self.model.device)
            lacking_L = torch.tensor(lacking, dtype=torch.long, device=self.model.device)
            draw = None if truncates(sampling) else partial(draw_next, sampling=sampling, lacking_L=lacking_L)
            stepper = Stepper(board, self.forward, draw, graphs=self.graphs)
            widest = 1 << max(max(row) for row in sizes).bit_length()
            for wave, segments in zip(waves, sizes, strict=True):
                rows = [(piece.prompt, k) for piece in wave for k in range(piece.first, piece.stop)]
                logits_RV = self._begin(board, wave, rows, segments, prompt_ids, most, sampling, seeds)
                stops = Stops(eos_ids, sampling.stop, decode)
                count = len(found), len(prompt_ids) * sampling.n
                wave_of = _Wave(board, stepper, sampling, stops, lacking_L, widest, count)
                found.update(zip(rows, wave_of.decode(logits_RV, len(rows)), strict=True))
        return [found[prompt, k] for prompt in range(len(prompt_ids)) for k in range(sampling.n)]

    @contextmanager
    def open_slots(self, cells: int = 0) -> Iterator[None]:
        """Let the model attend in new buffers and compute from narrow weights; free both at the end."""
        self.slots = Slots(cells or self.cells, self.dtype, self.flash)
        model, training = self.model, self.model.training
        model.eval()
        wide = any(each.dtype != self.dtype for each in model.parameters() if each.is_floating_point())
        # a cache of casts would keep tensors of a graph's memory
        cast = torch.autocast(model.device.type, self.dtype, cache_enabled=False) if wide else nullcontext()
        narrow = wide and self.dtype in (torch.bfloat16, torch.float16)
        try:
            with cast, slots_attended(model), narrow_weights(model, self.dtype) if narrow else nullcontext():
                yield
        finally:
            self.slots.layers.clear()
            model.train(training)

    def forward(self, ids_RQ: Tensor, position_RQ: Tensor, last: Tensor | int = 1, **bounds: Any) -> Tensor:
        """Read tokens into the slots; return the logits of what comes after each row (R, V)."""
        logits: Tensor = self.model(
            input_ids=ids_RQ,
            position_ids=position_RQ,
            attention_mask=self._mask,  # of four dimensions: it is passed on, and no mask is made
            use_cache=False,
            logits_to_keep=last,
            slots=self.slots,
            **bounds,
        ).logits
        return logits[:, -1] if isinstance(last, int) else logits[0]

    def read(self, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Read prompts end to end into the cells from `starts` on; return the logits of their next tokens (P, V)."""
        device, lengths = self.model.device, [len(ids) for ids in prompts]
        at = torch.cat([torch.arange(length) for length in lengths])
        self.slots.cells_S = (at + torch.tensor(starts).repeat_interleave(torch.tensor(lengths))).to(device)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        logits_PV = self.forward(
            torch.tensor([[token for ids in prompts for token in ids]], device=device),
            at[None].to(device),
            (bounds[1:] - 1).long(),
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        )
        self.slots.cells_S = None
        return logits_PV

    def _begin(
        self,
        board: Board,
        wave: Sequence[Piece],
        rows: Sequence[tuple[int, int]],
        segments: Sequence[int],
        prompt_ids: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
    ) -> Tensor:
        """Read each prompt of a wave once, copy it to its completions, and seat them; return the first logits (B, V)."""
        device, starts = self.model.device, [0, *accumulate(segments)][:-1]
        counts = [piece.stop - piece.first for piece in wave]
        firsts = [0, *accumulate(counts)][:-1]
        chunks = plan_chunks([len(prompt_ids[piece.prompt]) for piece in wave], READ)
        logits = [
            self.read([prompt_ids[wave[i].prompt] for i in chunk], [starts[firsts[i]] for i in chunk])
            for chunk in chunks
        ]
        source, target = [], []
        for i, piece in enumerate(wave):
            at = torch.arange(len(prompt_ids[piece.prompt]))
            for row in range(firsts[i] + 1, firsts[i] + counts[i]):
                source.append(at + starts[firsts[i]])
                target.append(at + starts[row])
        if source:
            self.slots.copy(torch.cat(source).to(device), torch.cat(target).to(device))
        board.begin(
            torch.tensor(starts, device=device),
            torch.tensor([len(prompt_ids[prompt]) for prompt, _ in rows], device=device),
            torch.tensor([limits[prompt] for prompt, _ in rows], device=device),
            uniforms([seeds[prompt][k] for prompt, k in rows], sampling.max_new_tokens).to(device),
        )
        return torch.cat(logits).repeat_interleave(torch.tensor(counts, device=device), 0)

    def _room(self, lengths: Sequence[int], limits: Sequence[int], n: int) -> int:
        """Return how many cells completions may take: as many as are needed, and fit into the share of free memory."""
        needed = n * sum(map(sum, zip(lengths, limits, strict=True)))
        if self.cells or not self.graphs:
            return self.cells or needed
        size = _found[self.model][1] if self.model in _found else try_out(self.model, self.dtype)[1]
        free = torch.cuda.mem_get_info(self.model.device)[0]
        unused = torch.cuda.memory_reserved(self.model.device) - torch.cuda.memory_allocated(self.model.device)
        return min(needed, int(MEMORY * (free + unused)) // max(1, size))


class _Wave:
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
    ) -> None:
        self.board, self.stepper, self.sampling, self.stops = board, stepper, sampling, stops
        self.lacking_L, self.widest, self.count = lacking_L, widest, count
        self.recorder: KeptSetsRecorder | None = None

    def decode(self, logits_BV: Tensor, rows: int) -> list[SampledCompletion]:
        """Draw from the first logits, then step by step; return all rows' completions."""
        board = self.board
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
                logits_RV = self.stepper(many, self.widest)
                if self.stepper.draw is None:
                    self._draw(logits_RV, t)
            self._stop_strings(drawn, until)
            drawn = until
        return self._completions(rows)

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

    def _completions(self, rows: int) -> list[SampledCompletion]:
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
                "the policy's log-probabilities are no longer finite; lower its learning rate or raise the KL"
            )
        kept_sets = self.recorder.completions(ends) if self.recorder is not None else [None] * rows
        columns = zip(tokens_BT, logprobs_BT, log_mass_BT, ends, stopped, kept_sets, strict=True)
        return [
            SampledCompletion(tokens_T[:end], logprobs_T[:end], mass_T[:end], "stop" if stop else "length", kept)
            for tokens_T, logprobs_T, mass_T, end, stop, kept in columns
        ]


@contextmanager
def _no_host(device: torch.device) -> Iterator[None]:
    """Inside, an operation that waits for the device raises: it could not be part of a graph."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
