"""`--rollout hf`: completions from the trained model itself, in its process.

No copy of the weights and nothing to synchronize: what samples is what is trained. The sampler is `rollout.slot_sampler` on a
GPU where it can be, and `rollout.sampler` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import exp
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.kept_sets import truncates
from rlhf_core.contract.options import INTERNAL
from rlhf_core.contract.providers import Rollout
from rlhf_core.contract.ranges import at_least, at_most
from rlhf_core.errors import OptionError, UsageError, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.rollout.narrow_weights import computing_in
from rlhf_core.util.device_memory import allocated_bytes
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.memory import ModelSize, SamplingLoad
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.roles import Role

__all__ = ["HuggingFaceRollout"]

WAVE_TOKENS = 32768
"""Tokens in the key-value cache at a time, where nothing else is asked for and no graphs are used."""


@dataclass(frozen=True)
class HuggingFaceRollout(Rollout):
    """Batched sampling from the role's own weights, in process.

    Log-probabilities are those of the distribution that was sampled from, after temperature and truncation; with
    temperature 0 they are the untruncated ones at temperature 1. Where top-p, top-k or min-p truncate, the log of the
    probability they kept is returned as `sampler_log_mass_NT`, its mean share as the scalar `kept_mass`, and with
    `--sampling.replay` the kept tokens themselves as `kept_sets`.
    """

    wave_tokens: int = 0
    """maximum number of tokens in the key-value cache, including prompts, completions and padding; more are sampled in
    waves. 0 takes 32,768, and with graphs half of the GPU's free memory. Changes memory and speed, never results"""
    compact: float = 0.25
    """share of the batch that must have ended before its rows are removed, 0 to 1; a removal costs one copy of the
    cache, with graphs none"""
    graphs: Literal["auto", "off"] = "auto"
    """decode with one CUDA graph per step on a GPU in half precision, if the model allows it (`auto`), or launch every
    operation (`off`)"""
    compile: bool = False
    """compile the model's blocks for decoding with graphs (torch.compile): fewer and larger kernels, different rounding
    of log-probabilities, and half a minute once; needs a C compiler"""
    samplers: dict[tuple[str, int], Any] | None = field(default=None, compare=False, repr=False, metadata=INTERNAL)
    """while the engine is open, what it keeps of each role that it samples: buffers and graphs"""

    exact: ClassVar[bool] = True
    """the log-probabilities are those of the trained weights themselves, up to the rounding of a narrow dtype"""
    takes_weights_midway: ClassVar[bool] = True
    """an engine apart from its trainer asks for new weights before each forward pass"""

    def __post_init__(self) -> None:
        at_least(0, self, "wave_tokens", "compact")
        at_most(1, self, "compact")
        if self.compile and self.graphs == "off":
            raise OptionError("compile", f"is for decoding with graphs; leave out {option('graphs', 'off')}")

    def open(self, context: OpenContext) -> Rollout:
        """Return an engine that keeps small buffers, and the graphs over them, from one call to the next."""
        if self.compile and not torch.cuda.is_available():
            log.info("compile of rollout 'hf' changes nothing: it is for CUDA graphs, and there is no GPU")
        return replace(self, samplers={})

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Free what is kept; the weights are the role's."""
        before = allocated_bytes()
        for each in (self.samplers or {}).values():
            each.release()
        return 0 if before is None else before - (allocated_bytes() or 0)

    def close(self) -> None:
        """Free what is kept, and forget the models."""
        self.sleep()
        (self.samplers or {}).clear()

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Return `sampling.n` completions of each prompt."""
        with self.session(role) as sample:
            return sample(prompts, sampling)

    @contextmanager
    def session(self, role: Role) -> Iterator[Callable[[Prompts, Sampling], Rollouts]]:
        """Hold sharded weights whole while it is open: ranks stop at different lengths, and after different turns."""
        local: Any = role  # only roles of this process have a model
        with local.gathered():
            yield partial(self._sample, local)

    def _sample(self, role: Any, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Sample from whole weights."""
        from rlhf_core.models.loading.end_tokens import end_ids
        from rlhf_core.models.loading.limits import lacking_ids
        from rlhf_core.rollout.assemble import assemble, decode, pad_id
        from rlhf_core.rollout.sampler import sample
        from rlhf_core.rollout.slot_sampler import SlotSampler, slot_obstacle

        model, tokenizer, dtype = role.causal_lm, role.tokenizer, role.module.compute_dtype
        _check_window(model.config, prompts, sampling)
        seeds = [[sampling.seed_for(uid, k) for k in range(sampling.n)] for uid in prompts.uids]
        rest: dict[str, Any] = {
            "eos_ids": end_ids(role.spec, tokenizer),
            "decode": partial(decode, tokenizer),
            "limits": prompts.limits,
            "lacking": lacking_ids(tokenizer, model.get_output_embeddings().weight.shape[0]),
        }
        if self.graphs == "auto" and role.module.vision is None and not slot_obstacle(model, dtype):
            samplers = {} if self.samplers is None else self.samplers
            key = role.name, id(model)  # roles that share a model, with adapters and without, share no graph
            if key not in samplers:
                samplers[key] = SlotSampler(model, dtype, cells=self.wave_tokens, compile_steps=self.compile)
            completions = samplers[key](prompts.token_ids, sampling, seeds, refresh=role.refresh, **rest)
        else:
            with computing_in(model, dtype) as change:
                completions = sample(
                    model,
                    prompts.token_ids,
                    sampling,
                    seeds,
                    pad_id=pad_id(tokenizer),
                    wave_tokens=self.wave_tokens or WAVE_TOKENS,
                    compact=self.compact,
                    vision=role.module.vision,
                    images=prompts.images,
                    refresh=partial(role.refresh, change),
                    **rest,
                )
        tokens, logprobs, log_mass, finish, kept_sets, versions = zip(*completions, strict=True)
        per_token = {"sampler_logprobs_NT": logprobs}
        scalars = {}
        if truncates(sampling):
            per_token["sampler_log_mass_NT"] = log_mass
            kept = sum(exp(value) for row in log_mass for value in row.tolist())
            scalars["kept_mass"] = kept / max(1, sum(map(len, log_mass)))
        return assemble(
            prompts,
            tokens,
            finish,
            tokenizer,
            versions=versions,
            per_token=per_token,
            scalars=scalars,
            kept_sets=[each for each in kept_sets if each is not None],
        )

    def memory(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return the bytes of a wave: prompts are read first, then keys, values and logits of all its rows are held.

        A decoding step repeats one layer's keys and values for the heads that share them, or copies them to drop rows; with
        graphs it does neither. Logits of a token are held four times: as they are, scaled, as log-probabilities, and as their
        cumulative sum. Sharded weights are gathered, and wider ones copied in the dtype of the pass, for the whole of it.
        """
        length = load.prompt_tokens + load.new_tokens
        by_graphs, rows = self._uses_graphs(size, load), self._rows(size, load)
        cache = rows * length * size.cache_bytes
        layer = 0 if by_graphs else 2 * cache // max(1, size.layers)
        prompts = -(-rows // load.completions)
        prefill = prompts * (load.prefill // max(1, load.prompts) + load.prompt_tokens * size.cache_bytes)
        return load.gathered + load.narrowed + max(prefill, cache + layer + rows * size.vocabulary * 16)

    def kept_memory(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return the bytes of keys, values and copies of weights, if graphs are used and the device can spare them."""
        from rlhf_core.rollout.slot_sampler import KEEP

        held = self._rows(size, load) * (load.prompt_tokens + load.new_tokens) * size.cache_bytes + load.narrowed
        return held if self._uses_graphs(size, load) and held <= KEEP * load.device_bytes else 0

    def _uses_graphs(self, size: ModelSize, load: SamplingLoad) -> bool:
        """Return True if a forecast is about a GPU that decodes by graphs."""
        return self.graphs == "auto" and load.free_bytes > 0 and size.compute_bytes < 4

    def _rows(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return the rows of a wave."""
        free = load.free_bytes // 2 // max(1, size.cache_bytes) if self._uses_graphs(size, load) else WAVE_TOKENS
        most = max(1, (self.wave_tokens or free) // (load.prompt_tokens + load.new_tokens))
        return min(load.prompts * load.completions, most)

    def sync(self, role: Role) -> Mapping[str, float]:
        """Nothing to do: the weights are the role's own."""
        return {}


def _check_window(config: Any, prompts: Prompts, sampling: Sampling) -> None:
    """Check that the longest prompt and its completions have positions in the model."""
    from rlhf_core.models.loading.limits import window_of

    window = window_of(config)
    limits = prompts.limits or [sampling.max_new_tokens] * len(prompts)
    longest, room = max(zip(map(len, prompts.token_ids), limits, strict=True), key=sum)
    if window is not None and longest + room > window:
        raise UsageError(
            f"a prompt of {longest} tokens and {room} new ones exceed the {window} positions of the "
            f"model; lower {run_option('max_prompt_tokens')} or {run_option('sampling.max_new_tokens')}"
        )
