"""Sampling on a GPU: prompts packed, keys and values in slots, and a CUDA graph per decoding step.

It gives what `rollout.sampler` gives, up to the rounding of the dtype, and is taken where it can be (`slot_obstacle`): the
layers keep packed rows apart, torch's flash attention computes them, and a step needs no host. Whether a model's step agrees
with a plain forward pass is tried out on its own device and weights, before the first sampling.

Where top-p, top-k or min-p truncate, the model's step is a graph and the draw is not: its size depends on the numbers.

Shape letters: R rows of the batch, B all rows of a wave, P prompts of a wave, S their tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlhf_core.contract.kept_sets import truncates
from rlhf_core.contract.options import Sampling
from rlhf_core.lazy import torch
from rlhf_core.rollout.compiled_blocks import compile_blocks
from rlhf_core.rollout.fused_norms import find_norms, fuse_norms
from rlhf_core.rollout.narrow_weights import Held, narrow_weights, wide_weights
from rlhf_core.rollout.sampler import Piece, SampledCompletion, Stops, uniforms
from rlhf_core.rollout.segments import plan_chunks, plan_segments
from rlhf_core.rollout.slots import Slots, slots_attended
from rlhf_core.rollout.step import Board, Stepper, draw_next
from rlhf_core.rollout.wave import Wave
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SlotSampler", "slot_obstacle", "try_out"]

READ = 16384
"""Prompt tokens that go through the model at a time."""

MEMORY = 0.5
"""Share of the GPU's free memory that keys and values may take."""

KEEP = 0.1
"""Share of the GPU's memory that buffers, narrow weights and so graphs may keep from one call to the next."""

_found: WeakKeyDictionary[nn.Module, tuple[str, int]] = WeakKeyDictionary()
"""Results of `_try_out`, per model."""


def slot_obstacle(model: Any, dtype: torch.dtype) -> str:
    """Return why a model on this device cannot be sampled from slots, as half a sentence; empty if it can. Logged once.

    Args:
        dtype: what the forward pass computes in.
    """
    from rlhf_core.models.inputs.packed_attention import NAME, varlen_obstacle

    text = model.config.get_text_config(decoder=True)
    if model.device.type != "cuda":
        return "it is not on a GPU"
    if model in _found:
        return _found[model][0]
    if text._attn_implementation != NAME:
        obstacle, size = f"attention {text._attn_implementation} does not pack rows", 0
    elif reason := varlen_obstacle(text, model.device, dtype):
        obstacle, size = f"torch's variable-length attention: {reason}", 0
    else:
        obstacle, size = try_out(model, dtype, graphs=True)
    _found[model] = obstacle, size
    if obstacle:
        log.info(f"sampling without CUDA graphs: {obstacle}")
    return obstacle


@torch.inference_mode()
def try_out(model: Any, dtype: torch.dtype, *, flash: bool = True, graphs: bool = False) -> tuple[str, int]:
    """Return why steps in slots do not give what a forward pass gives, empty if they do; and the bytes that a token takes.

    Args:
        graphs: record and replay a graph as well.
    """
    sampler = SlotSampler(model, dtype, cells=32, flash=flash, graphs=False)
    accepted = inspect.signature(model.forward).parameters
    if lacking := {"position_ids", "logits_to_keep"} - accepted.keys():
        return f"{type(model).__name__} does not accept {min(lacking)}", 0
    try:
        with sampler.open_slots():
            found = [_follow(sampler, graphs=each) for each in ((False, True) if graphs else (False,))]
            expected = [
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -3:]
                for row in ([1, 2, 3, 6, 8], [4, 5, 7, 9])
            ]
            size = sampler.slots.bytes_per_cell
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any architecture: whatever it cannot do, it need not
        cause = error.__context__ or error  # a recording that fails raises again at its end
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        return f"{type(model).__name__} fails in such a step: {first}", 0
    theirs = torch.stack(expected).float()
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    if not all(float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) for ours in found):
        return f"{type(model).__name__} gives a different result in such a step than in a forward pass", 0
    return "", size


def _follow(sampler: SlotSampler, *, graphs: bool) -> Tensor:
    """Return the logits after two prompts and after each of two steps, (2, 3, V); steps without graphs may not wait."""
    device = sampler.model.device
    none_L = torch.zeros(0, dtype=torch.long, device=device)
    board = Board(2, 4, sampler.slots, none_L, device)
    found = [sampler.read([[1, 2, 3], [4, 5]], [0, 5])]
    starts, positions, limits = torch.tensor([[0, 5], [3, 2], [4, 4]], device=device)
    board.begin(starts, positions, limits, torch.full((2, 4), 0.5, dtype=torch.float64, device=device))
    draw = partial(draw_next, sampling=Sampling(temperature=0.9), lacking_L=starts[:1])
    stepper = Stepper(board, sampler.step, draw, graphs=graphs)
    for tokens_R in torch.tensor([[6, 7], [8, 9]], device=device):
        board.token_R[:2] = tokens_R
        with nullcontext() if graphs else _no_host(device):
            logits_RV = stepper(2, 16)
        found.append(logits_RV.clone())  # a replay writes where the last one did
    return torch.stack(found, 1).float()


class SlotSampler:
    """Samples completions of a model on its device.

    Args:
        model: a causal language model of transformers.
        dtype: what it computes in, and keeps keys and values in.
        cells: tokens of keys and values; 0 takes what a call needs, and at most half of the free memory.
        flash, graphs: use the GPU's kernel and graphs; without both the same code runs on the CPU.
        compile_steps: compile the model's blocks for steps.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        *,
        cells: int = 0,
        flash: bool = True,
        graphs: bool = True,
        compile_steps: bool = False,
    ) -> None:
        self.compile_steps = compile_steps
        self.model, self.dtype, self.cells, self.flash, self.graphs = model, dtype, cells, flash, graphs
        self.slots = Slots(cells, dtype, flash)
        self._norms = [] if compile_steps else find_norms(model)  # a compiler fuses them with what is around them
        self.board: Board | None = None
        self._steppers: dict[tuple[Any, ...], Stepper] = {}
        self._copies: dict[tuple[nn.Module, str], Tensor] = {}
        self._widest = 0
        """most tokens of a row since graphs were recorded, rounded up: a graph is for so many"""
        self._places: list[int] = []
        """addresses of the weights when graphs were recorded"""
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
        refresh: Callable[..., int] = lambda _: 0,
    ) -> list[SampledCompletion]:
        """Return `sampling.n` completions of each prompt. The arguments are those of `rollout.sampler.sample`.

        `refresh` changes weights inside of the context that it is given (`Role.refresh`).

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
        with self.open_slots(max(map(sum, sizes)) + 1) as change:
            renew = partial(refresh, change)
            board = self._seats(max(map(len, sizes)), sampling.max_new_tokens, sorted(eos_ids))
            lacking_L = torch.tensor(lacking, dtype=torch.long, device=self.model.device)
            stepper = self._stepper(board, sampling, lacking_L)
            self._widest = max(self._widest, 1 << max(max(row) for row in sizes).bit_length())
            for wave, segments in zip(waves, sizes, strict=True):
                rows = [(piece.prompt, k) for piece in wave for k in range(piece.first, piece.stop)]
                version = renew()
                logits_RV = self._begin(board, wave, rows, segments, prompt_ids, most, sampling, seeds)
                stops = Stops(eos_ids, sampling.stop, decode)
                count = len(found), len(prompt_ids) * sampling.n
                wave_of = Wave(board, stepper, sampling, stops, lacking_L, self._widest, count, renew)
                found.update(zip(rows, wave_of.decode(logits_RV, version, len(rows)), strict=True))
        return [found[prompt, k] for prompt in range(len(prompt_ids)) for k in range(sampling.n)]

    @contextmanager
    def open_slots(self, cells: int = 0) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Let the model attend in buffers of `cells` tokens and compute from narrow weights.

        It yields what to change the model's weights inside of. At the end both are freed, and graphs with them, unless they are
        small: `KEEP`.
        """
        model, training = self.model, self.model.training
        places = self._addresses()
        if places != self._places or self.slots.cells < cells:
            self.release()
            self.slots, self._places = Slots(cells or self.cells, self.dtype, self.flash), places
        self.slots.attach()
        model.eval()
        wide = any(each.dtype != self.dtype for each in model.parameters() if each.is_floating_point())
        # a cache of casts would keep tensors of a graph's memory
        cast = torch.autocast(model.device.type, self.dtype, cache_enabled=False) if wide else nullcontext()
        narrow = wide and self.dtype in (torch.bfloat16, torch.float16)
        narrowed = narrow_weights(model, self.dtype, self._copies) if narrow else nullcontext(list[Any]())
        try:
            with cast, slots_attended(model), narrowed as held:
                yield partial(self._changing, held)
        finally:
            model.train(training)
            self.slots.detach()
            if not self.graphs or self.held_bytes > KEEP * torch.cuda.mem_get_info(model.device)[1]:
                self.release()

    @contextmanager
    def _changing(self, held: Held) -> Iterator[None]:
        """Inside, the model's weights may change; graphs that read them elsewhere, as sharded ones may be, are dropped."""
        with wide_weights(held, self._copies):
            yield
            places = self._addresses()
        if places != self._places:
            self._places = places
            for stepper in self._steppers.values():
                stepper.forget()

    def _addresses(self) -> list[int]:
        """Return the addresses of the weights, which graphs read."""
        return [each.data_ptr() for each in (*self.model.parameters(), *self.model.buffers())]

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values and of narrow weights."""
        return self.slots.bytes_per_cell * self.slots.cells + sum(each.nbytes for each in self._copies.values())

    def release(self) -> None:
        """Free buffers, graphs and narrow weights."""
        self._steppers.clear()
        self._copies.clear()
        self.board, self._places, self._widest, self.slots = None, [], 0, Slots(0, self.dtype, self.flash)

    def _seats(self, rows: int, tokens: int, ends: list[int]) -> Board:
        """Return a board for so many rows and new tokens: the one that there is, if it is large enough."""
        board = self.board
        if board is None or board.rows < rows or board.tokens < tokens or board.ends.tolist() != ends:
            self._steppers.clear()
            device = self.model.device
            board = Board(rows, tokens, self.slots, torch.tensor(ends, dtype=torch.long, device=device), device)
            self.board = board
        return board

    def _stepper(self, board: Board, sampling: Sampling, lacking_L: Tensor) -> Stepper:
        """Return what runs steps that draw in this way: the one that there is, with its graphs."""
        free = not truncates(sampling)
        key = (free, sampling.temperature, *lacking_L.tolist()) if free else (free,)
        if key not in self._steppers:
            draw = partial(draw_next, sampling=sampling, lacking_L=lacking_L) if free else None
            self._steppers[key] = Stepper(board, self.step, draw, graphs=self.graphs)
        return self._steppers[key]

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

    def step(self, ids_R1: Tensor, position_R1: Tensor) -> Tensor:
        """Read a token of each row into the slots; return the logits of what comes after it (R, V)."""
        with compile_blocks(self.model, self.slots.layers) if self.compile_steps else fuse_norms(self._norms):
            return self.forward(ids_R1, position_R1)

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
        size = _found[self.model][1] if self.model in _found else try_out(self.model, self.dtype, graphs=True)[1]
        device, kept = self.model.device, self.slots.bytes_per_cell * self.slots.cells
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused + kept
        return min(needed, int(MEMORY * free) // max(1, size))


@contextmanager
def _no_host(device: torch.device) -> Iterator[None]:
    """Inside, an operation that waits for the device raises: it could not be part of a graph."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode is a prototype, torch warns
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
