"""Batched sampling from a Hugging Face causal language model with a key-value cache.

Each prompt is read once, its cache is expanded to its completions, and one forward pass per step extends every completion by
a token; only the last position goes through the language-model head. Completions that have ended leave the batch. Every
completion draws from its own random stream, so that its tokens depend on its prompt and its seed, not on what else is
in the batch (up to the rounding of the logits).

Left out on purpose: beams, repetition penalties and other processors that would make the sampled distribution differ from
the one that is trained; speculative decoding; refilling the batch from a queue (a server's business: see vLLM).

Shape letters: R live rows of the batch, B all rows of a wave, L prompt width, T new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from rlhf_core.contract.kept_sets import KeptSets, replays, truncates
from rlhf_core.errors import RunStopped, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.models.heads.warp import WarpedDistribution, draw, warp
from rlhf_core.models.inputs.images import Images, stack_images
from rlhf_core.models.inputs.vision import Vision
from rlhf_core.rollout.attention import shared_heads
from rlhf_core.rollout.kept_sets import KeptSetsRecorder
from rlhf_core.util.activity import report

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["Piece", "SampledCompletion", "Stops", "pick", "plan_waves", "sample", "uniforms"]


class SampledCompletion(NamedTuple):
    """Completion sampled for one prompt."""

    tokens: Tensor
    """int64, at least one; the EOS that ended it included"""
    logprobs: Tensor
    """float32: of each token, under the distribution it was drawn from"""
    log_mass: Tensor
    """float32: log of the probability that truncation kept at each token; zeros where nothing is truncated"""
    finish: Literal["stop", "length"]
    kept_sets: KeptSets | None
    """tokens that truncation kept at each position, if `Sampling.replay` asks for them"""
    versions: Tensor
    """int64: version of the weights that computed the distribution of each token"""


class Piece(NamedTuple):
    """Some of a prompt's completions, sampled together."""

    prompt: int
    first: int
    stop: int
    """completions `first` up to but not including `stop`"""


def sample(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    *,
    eos_ids: Collection[int],
    pad_id: int,
    decode: Callable[[list[list[int]]], list[str]] | None = None,
    wave_tokens: int = 32768,
    compact: float = 0.25,
    vision: Vision | None = None,
    images: Sequence[Images] = (),
    limits: Sequence[int] = (),
    lacking: Sequence[int] = (),
    refresh: Callable[[], int] = lambda: 0,
) -> list[SampledCompletion]:
    """`sampling.n` completions of each prompt, those of a prompt adjacent, in the order of the prompts.

    Temperature 0 takes the most likely token and reports its log-probability at temperature 1, untruncated. A stop string
    ends a completion with the token that completes it; it is looked for in the decoded completion.

    Args:
        model: a causal language model of transformers.
        prompt_ids: P prompts of at least one token.
        sampling: how to draw. Its `seed` is not used.
        seeds: P times n numbers; each starts the stream of one completion.
        eos_ids: tokens that end a completion.
        pad_id: any token; fills the left of short prompts.
        decode: token sequences to texts; needed for stop strings.
        wave_tokens: prompts and completions, padding included, that are in the cache at a time.
        compact: ended completions are dropped from the batch once they are this share of it.
        vision: how the model takes images, if it does.
        images: what it reads for those of each prompt; none where it reads text alone.
        limits: tokens after which the completions of each prompt are cut; none where `sampling.max_new_tokens` holds for all.
        lacking: ids that are never drawn, since the tokenizer has no token for them. Log-probabilities are over all ids.
        refresh: called before each forward pass, returns the version of the weights, which it may change (`Role.refresh`).

    Raises:
        RunStopped: the model's output is not finite.
        UsageError: the model is purely recurrent (Mamba), with another kind of cache.
    """
    found, was_training = dict[tuple[int, int], SampledCompletion](), model.training
    model.eval()
    try:
        with torch.inference_mode(), shared_heads(model):
            for wave in plan_waves([len(ids) for ids in prompt_ids], sampling, wave_tokens):
                stops, count = Stops(eos_ids, sampling.stop, decode), (len(found), len(prompt_ids) * sampling.n)
                rows = [(piece.prompt, k) for piece in wave for k in range(piece.first, piece.stop)]
                draws = uniforms([seeds[prompt][k] for prompt, k in rows], sampling.max_new_tokens)
                asked = [prompt_ids[piece.prompt] for piece in wave]
                seen = [images[piece.prompt] for piece in wave] if images else []
                state = _prefill(model, asked, pad_id, sampling.max_new_tokens, vision, seen, refresh)
                state.select([i for i, piece in enumerate(wave) for _ in range(piece.first, piece.stop)])
                most = [limits[prompt] if limits else sampling.max_new_tokens for prompt, _ in rows]
                decoded = _decode(model, state, draws, most, sampling, stops, compact, count, lacking)
                found.update(zip(rows, decoded, strict=True))
    finally:
        model.train(was_training)
    return [found[prompt, k] for prompt in range(len(prompt_ids)) for k in range(sampling.n)]


def plan_waves(lengths: Sequence[int], sampling: Sampling, wave_tokens: int) -> list[list[Piece]]:
    """Group completions to sample together: prompts of similar length, longest first, up to `wave_tokens` in the cache.

    A prompt is read once unless its completions alone exceed the budget. One that is so much shorter than the longest of
    the wave that padding it would cost more tokens than its completions have begins a new wave.
    """
    n, T = sampling.n, sampling.max_new_tokens
    waves: list[list[Piece]] = []
    rows = widest = 0
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        most = max(1, wave_tokens // (lengths[prompt] + T))
        for first in range(0, n, most):
            piece = Piece(prompt, first, min(first + most, n))
            rows += piece.stop - piece.first
            if not waves or rows * (widest + T) > wave_tokens or widest - lengths[prompt] > n * T:
                waves.append([])
                rows, widest = piece.stop - piece.first, lengths[prompt]
            waves[-1].append(piece)
    return waves


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(len(seeds), count) float64 strictly between 0 and 1: one counter-based stream (Philox) per seed.

    The 50 high bits of each raw word are used, so that no number rounds to 1, and the same numbers come from every version
    of numpy.
    """
    raw = np.stack([np.random.Philox(key=seed).random_raw(count) for seed in seeds])
    return torch.from_numpy(((raw >> np.uint64(14)) + 0.5) * 2.0**-50)


# ----------------------------------------------------------------------------------------------------------------------
# one wave
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """The rows that are still in the batch."""

    logits_RV: Tensor
    """logits of the next token"""
    cache: Any
    mask_RS: Tensor
    """bool, real tokens; S = L + T, the part to come is already true"""
    lengths_R: Tensor
    """position of each row's first new token: how many its prompt has"""
    accepted: frozenset[str]
    """optional arguments that the model takes"""
    refresh: Callable[[], int]
    """called before each forward pass"""
    vision: Vision | None = None
    """images in the form that the model takes"""
    width: int = 0
    """tokens in the cache, padding included"""
    versions: list[int] = field(default_factory=list)
    """version of the weights in each forward pass, of which pass t computes the distribution of token t"""

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keep `rows` of the batch, in that order; a row can be repeated."""
        index = torch.as_tensor(rows, device=self.logits_RV.device)
        if index.tolist() == list(range(len(self.lengths_R))):
            return
        self.cache.reorder_cache(index)  # the one way to pick rows that every kind of layer has
        self.logits_RV, self.mask_RS = self.logits_RV[index], self.mask_RS[index]
        self.lengths_R = self.lengths_R[index]


def _prefill(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    pad_id: int,
    room: int,
    vision: Vision | None = None,
    images: Sequence[Images] = (),
    refresh: Callable[[], int] = lambda: 0,
) -> _State:
    """Read the prompts, padded on the left, with `room` for that many tokens more."""
    from rlhf_core.rollout.cache import make_cache

    L = max(map(len, prompt_ids))
    ids_RL = torch.tensor([[pad_id] * (L - len(ids)) + list(ids) for ids in prompt_ids], device=model.device)
    lengths_R = torch.tensor([len(ids) for ids in prompt_ids], device=model.device)
    mask_RS = torch.arange(L + room, device=model.device) >= L - lengths_R[:, None]
    position_RL = (mask_RS[:, :L].long().cumsum(-1) - 1).clamp(min=0)
    accepted = _supported_arguments(model.forward, {"position_ids", "logits_to_keep"})
    state = _State(torch.empty(0), make_cache(model.config, L + room), mask_RS, lengths_R, accepted, refresh, vision)
    seen = vision.arguments(stack_images(images, L, left=True), model) if vision is not None else {}
    if vision is not None and (found := vision.positions(model.base_model, ids_RL, mask_RS[:, :L], seen)):
        position_RL, shift_R = found
        state.lengths_R = lengths_R + shift_R
    _forward(model, state, ids_RL, position_RL, seen)
    return state


def _forward(model: Any, state: _State, ids_RQ: Tensor, position_RQ: Tensor, images: Images | None = None) -> None:
    """Read Q more tokens of each row into the cache; leaves the logits of what comes next."""
    state.versions.append(state.refresh())
    state.width += ids_RQ.shape[1]
    optional = {"position_ids": position_RQ, "logits_to_keep": 1}
    logits_RQV = model(
        input_ids=ids_RQ,
        attention_mask=state.mask_RS[:, : state.width],
        past_key_values=state.cache,
        use_cache=True,
        **{name: value for name, value in optional.items() if name in state.accepted},
        **(images or {}),
    ).logits
    state.logits_RV = logits_RQV[:, -1]


def _supported_arguments(forward: Callable[..., Any], optional: Collection[str]) -> frozenset[str]:
    """Return which `optional` arguments a forward pass takes: a few architectures have no positions. Wrappers pass on what
    they do not know."""
    parameters = inspect.signature(forward).parameters
    if "cache_params" in parameters:
        raise UsageError(
            f"{run_option('rollout', 'hf')} cannot fill the state of this purely recurrent model; use another rollout"
        )
    passes_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return frozenset(name for name in optional if passes_on or name in parameters)


def _decode(
    model: Any,
    state: _State,
    uniforms_BT: Tensor,
    limits: Sequence[int],
    sampling: Sampling,
    stops: Stops,
    compact: float,
    count: tuple[int, int],
    lacking: Sequence[int] = (),
) -> list[SampledCompletion]:
    """Extend every row of `state` token by token until it ends or has its limit. `count`: completions before, and in all."""
    B, T = uniforms_BT.shape
    device = state.logits_RV.device
    uniforms_BT = uniforms_BT.to(device)
    tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logprobs_BT, log_mass_BT = torch.zeros(2, B, T, device=device)
    limits_R = torch.tensor(limits, device=device)
    ends_B = torch.zeros(B, dtype=torch.long, device=device)  # length of what has ended, 0 for the rest
    stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
    recorder = KeptSetsRecorder(B, T) if replays(sampling) else None
    lacking_L = torch.tensor(lacking, dtype=torch.long, device=device)
    row_R = torch.arange(B, device=device)  # which row of the wave each row of the batch is
    rows: slice | Tensor = slice(None)  # the same; a slice costs less to read and write than row numbers
    live_R, live = torch.ones(B, dtype=torch.bool, device=device), B
    for t in range(T):
        tokens_R, logprobs_R, warped = pick(state.logits_RV, uniforms_BT[rows, t], sampling, lacking_L)
        tokens_BT[rows, t], logprobs_BT[rows, t], log_mass_BT[rows, t] = tokens_R, logprobs_R, warped.log_mass_N
        if recorder is not None:
            recorder.add(row_R[live_R], t, warped.kept_NV[live_R])
        stopped_R = live_R & stops.hit(tokens_BT, row_R, live_R, t)
        ended_R = live_R & (stopped_R | (limits_R <= t + 1))
        if bool(ended_R.any()):
            stopped_B[row_R[stopped_R]] = True
            ends_B[row_R[ended_R]] = t + 1
            live_R = live_R & ~ended_R
            live = int(live_R.sum())
        report("sampling", count[0] + B - live, count[1])
        if live == 0:
            break
        if live <= (1 - compact) * len(row_R):
            keep = live_R.nonzero()[:, 0]
            state.select(keep)
            row_R, tokens_R, limits_R, live_R = row_R[keep], tokens_R[keep], limits_R[keep], live_R[keep]
            rows = row_R
        read_R = tokens_R if state.vision is None else state.vision.replace_image_tokens(tokens_R)
        _forward(model, state, read_R[:, None], (state.lengths_R + t)[:, None])
    if not bool(logprobs_BT.isfinite().all()):
        raise RunStopped(
            "the policy's log-probabilities are not finite; lower its learning rate, or raise the KL coefficient"
        )
    columns = (tensor.cpu() for tensor in (tokens_BT, logprobs_BT, log_mass_BT))
    ends = ends_B.tolist()
    finishes: list[Literal["stop", "length"]] = ["stop" if each else "length" for each in stopped_B.tolist()]
    kept_sets = recorder.completions(ends) if recorder is not None else [None] * B
    versions_T = torch.tensor(state.versions)
    return [
        SampledCompletion(tokens_T[:end], logprobs_T[:end], mass_T[:end], finish, kept, versions_T[:end])
        for tokens_T, logprobs_T, mass_T, end, finish, kept in zip(*columns, ends, finishes, kept_sets, strict=True)
    ]


def pick(
    logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling, lacking_L: Tensor
) -> tuple[Tensor, Tensor, WarpedDistribution]:
    """The next tokens, their log-probabilities, and the distribution that they were drawn from."""
    if len(lacking_L):
        return _pick_known(logits_RV, uniforms_R, sampling, lacking_L)
    if sampling.temperature == 0:
        warped = warp(logits_RV)
        tokens_R = warped.logprobs_NV.argmax(-1)
    else:
        warped = warp(logits_RV, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        tokens_R = draw(warped.logprobs_NV, uniforms_R)
    return tokens_R, warped.logprobs_NV.gather(1, tokens_R[:, None])[:, 0], warped


def _pick_known(
    logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling, lacking_L: Tensor
) -> tuple[Tensor, Tensor, WarpedDistribution]:
    """Call `pick` on the tokens that the tokenizer has. The trainer counts the probability of the others too."""
    known_RV = logits_RV.index_fill(1, lacking_L, -torch.inf)
    tokens_R, logprobs_R, warped = pick(known_RV, uniforms_R, sampling, lacking_L[:0])
    temperature = sampling.temperature or 1.0
    log_known_R = (known_RV.float() / temperature).logsumexp(1) - (logits_RV.float() / temperature).logsumexp(1)
    if truncates(sampling):
        return tokens_R, logprobs_R, warped._replace(log_mass_N=warped.log_mass_N + log_known_R)
    return tokens_R, logprobs_R + log_known_R, warped


class Stops:
    """Tells whether a completion ends with its newest token: EOS, or a stop string that it completes."""

    SLACK = 8
    """tokens decoded before those that can hold a stop string: special ones among them have no text, and the first ones of
    a cut sequence can decode differently"""

    def __init__(
        self,
        eos_ids: Collection[int],
        strings: Sequence[str],
        decode: Callable[[list[list[int]]], list[str]] | None,
    ) -> None:
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self.strings = strings
        self.decode = decode
        longest = max((len(string.encode()) for string in strings), default=0)
        self.tail = longest + self.SLACK  # a token has at least one byte

    def hit(self, tokens_BT: Tensor, row_R: Tensor, live_R: Tensor, t: int) -> Tensor:
        """(R,) bool. Rows that are not live need no answer."""
        self.eos = self.eos.to(row_R.device)
        hit_R = torch.isin(tokens_BT[row_R, t], self.eos)
        if self.strings:
            assert self.decode is not None, "stop strings need a decoder"
            index = (live_R & ~hit_R).nonzero()[:, 0]
            tails = tokens_BT[row_R[index], max(0, t + 1 - self.tail) : t + 1].tolist()
            texts = self.decode(tails) if tails else []
            found = [any(string in text for string in self.strings) for text in texts]
            hit_R[index] = torch.tensor(found, dtype=torch.bool, device=hit_R.device)
        return hit_R
