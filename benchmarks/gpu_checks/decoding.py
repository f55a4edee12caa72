"""Sampling with `--rollout hf`: tokens per second compared with what the memory bandwidth allows, and against transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from gpu_checks.measure import profile, release, timed
from gpu_checks.models import on_device, run_of, shape

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["decoding", "generate"]

SHARE = 0.50
"""Goal: share of the bandwidth bound at batch 256."""

ROLLOUT = {"use": "hf", "wave_tokens": 2**20}
"""The whole batch at a time."""


def decoding(context: Context) -> None:
    """256 completions of 256 tokens after prompts of 128, in bfloat16."""
    context.note(
        "bound of a token: the weights in bfloat16 once, and the keys and values of every live token, at the copy rate "
        "measured above; the time is that of the whole rollout less that of one with one new token, which reads the "
        "prompts, and less that of texts and padding on the host"
    )
    from rlhf_core.rollout.slot_sampler import slot_obstacle

    P, L, T = context.pick((256, 128, 256), (4, 8, 6))
    for size, compiles in (("0.5B", False), ("1.5B", False), ("1.5B", True), ("0.5B", True)):
        with sampling_run(context, size, P, compiles) as run, whole_rows() as host:
            prompts = random_prompts(P, L, run.roles["actor"].causal_lm.config.vocab_size)
            model = run.roles["actor"].causal_lm
            sample_tokens(run, prompts, T)  # warms up, and captures what is captured
            prefill, texts_before = min(host.timed(partial(sample_tokens, run, prompts, 1)) for _ in range(2))
            whole, texts = min(host.timed(partial(sample_tokens, run, prompts, T)) for _ in range(2))
            if obstacle := slot_obstacle(model, torch.bfloat16):
                context.note(f"{size} was sampled without CUDA graphs: {obstacle}")
            step = (whole - texts - prefill + texts_before) / (T - 1)
            bound = sum(token_bytes(model, P * (L + t)) for t in range(1, T)) / (T - 1)
            bound /= context.limits.get("bytes", float("inf"))
            context.row(
                model=size, compiled=compiles, batch=P, prompt=L, new_tokens=T, seconds=whole,
                prefill_seconds=prefill, text_seconds=texts,
                ms_per_token=1e3 * step, bound_ms=1e3 * bound, share=bound / step, tokens_per_second=P * T / whole,
            )  # fmt: skip
            what = f"{size}, batch {P}{', --rollout.compile' if compiles else ''}"
            met = context.goal(f"share of the bandwidth bound, {what}", bound / step, SHARE)
            if not met or context.rehearse:
                short = context.pick(8, 3)
                context.profile(
                    f"a rollout of {short} tokens, {what}", profile(partial(sample_tokens, run, prompts, short))
                )
        release()


def generate(context: Context) -> None:
    """Compare `--rollout hf` with `generate` and `generate_batch` of transformers on the same prompts, on 0.5B in bfloat16."""
    P, L, T = context.pick((64, 128, 128), (4, 8, 6))
    with sampling_run(context, "0.5B", P) as run, whole_rows():
        model = run.roles["actor"].causal_lm
        prompts = random_prompts(P, L, model.config.vocab_size)
        sample_tokens(run, prompts, T)
        took = {"--rollout hf": timed(lambda: sample_tokens(run, prompts, T))}
        context.row(engine="--rollout hf", batch=P, new_tokens=T, tokens_per_second=P * T / took["--rollout hf"])
        model.to(torch.bfloat16)
        ids = torch.tensor(prompts.token_ids, device=context.device)
        settings: dict[str, Any] = {
            "max_new_tokens": T,
            "do_sample": True,
            "top_k": 0,
            "pad_token_id": 0,
            "eos_token_id": None,
        }

        def plain() -> None:
            with torch.inference_mode():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=T, **settings)

        plain()
        took["generate"] = timed(plain)
        context.row(engine="generate", batch=P, new_tokens=T, tokens_per_second=P * T / took["generate"])
        context.note(f"--rollout hf samples {took['generate'] / took['--rollout hf']:.2f} times as fast as generate")
        if context.device == "cuda" and context.left() > 20:
            continuous(context, model, prompts.token_ids, T)


def continuous(context: Context, model: Any, rows: list[list[int]], T: int) -> None:
    """Time transformers' continuous batching, where this version has it and it works."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=T, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    try:
        model.generate_batch(inputs=rows[:4], generation_config=config)
        seconds = timed(lambda: model.generate_batch(inputs=rows, generation_config=config))
    except Exception as error:  # another library's: what it cannot do is not ours to fail for
        context.note(f"transformers' generate_batch does not work here: {type(error).__name__}: {error}"[:300])
        return
    context.row(engine="generate_batch", batch=len(rows), new_tokens=T, tokens_per_second=len(rows) * T / seconds)


def sampling_run(context: Context, size: str, batch: int, compiles: bool = False) -> Any:
    """Open a GRPO run of which only the policy is used; its sampler compiles the model's blocks if it `compiles`."""
    run = run_of(
        context,
        {"use": "grpo", "kl": {"coef": 0.0}},
        shape(context, size),
        reward="length",
        batch_size=batch,
        rollout={**ROLLOUT, "compile": compiles},
    )
    return Placed(context, run)


class Placed:
    """A run whose roles are placed, with weights drawn on the device."""

    def __init__(self, context: Context, run: Any) -> None:
        self.device, self.run = context.device, run

    def __enter__(self) -> Any:
        self.opened = self.run.place()
        with on_device(self.device):
            return self.opened.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)


def sample_tokens(run: Any, prompts: Any, T: int) -> None:
    """Sample one completion of each prompt, of T tokens."""
    from rlhf_core.contract.options import Sampling

    rollouts = run.rollouts("actor", prompts, Sampling(n=1, max_new_tokens=T))
    assert int(rollouts.mask_NT.sum()) == len(prompts) * T, "a row is missing, or has ended early"


class Host:
    """Seconds of what follows on the host when all tokens are drawn."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[[], object]) -> tuple[float, float]:
        """Return the seconds of a call, and those of texts and padding in it."""
        self.seconds = 0.0
        return timed(call), self.seconds


@contextmanager
def whole_rows() -> Iterator[Host]:
    """Let every token of the head be drawn and none end a row; the tokenizer of these models has 259 tokens, EOS among them."""
    from rlhf_core.models.loading import end_tokens, limits
    from rlhf_core.rollout import assemble as file

    host, assemble = Host(), file.assemble

    def measured(*given: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = assemble(*given, **options)
        host.seconds += time.perf_counter() - started
        return result

    with (
        patch.object(end_tokens, "end_ids", lambda *_: ()),
        patch.object(limits, "lacking_ids", lambda *_: ()),
        patch.object(file, "assemble", measured),
    ):
        yield host


def random_prompts(P: int, L: int, vocabulary: int) -> Any:
    """Return prompts of random tokens."""
    from rlhf_core.contract.batch import Example, Prompts

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (P, L), generator=draw).tolist()
    return Prompts([""] * P, rows, [Example("")] * P, list(range(P)))


def token_bytes(model: Any, cached: int) -> float:
    """Return the bytes that must be read to extend every row by a token, in bfloat16, with so many tokens in the cache."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(each.numel() for each in model.parameters())
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()
    return 2.0 * (weights + 2 * cached * config.num_hidden_layers * config.num_key_value_heads * head)
