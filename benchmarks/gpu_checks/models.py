"""Random models of known shapes, made on the device, in roles of ordinary runs; and random rows for them.

They are `--model tiny:…` with the sizes of Qwen2.5 (without the biases of its projections), so that everything around the
weights is the product's own: loading, heads, the strategy, the training step, the rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpu_checks.check import Context
    from rlhf_core.contract.batch import Batch

__all__ = ["SMALL", "make_role", "model_flops", "on_device", "random_batch", "run_of", "shape"]

SHAPES = {
    "0.5B": "layers=24,hidden=896,heads=14,kv_heads=2,intermediate=4864",
    "1.5B": "layers=28,hidden=1536,heads=12,kv_heads=2,intermediate=8960",
}
SMALL = "tiny:layers=2,hidden=64,heads=2,kv_heads=1,intermediate=128"
"""What a rehearsal takes in their place."""


def shape(context: Context, size: str, vocabulary: int = 151936) -> str:
    """Return the name of the model of this size: `0.5B` or `1.5B`."""
    return SMALL if context.rehearse else f"tiny:{SHAPES[size]},vocab={vocabulary},context=32768"


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Let weights of random models be drawn on a device; 1.5B of them take the CPU a minute."""
    from rlhf_core.models.loading.tiny import Tiny

    original = Tiny.model

    def model(self: Tiny, *args: Any, **kwargs: Any) -> Any:
        with torch.device(device):
            return original(self, *args, **kwargs)

    Tiny.model = model  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tiny.model = original  # type: ignore[method-assign]


def run_of(context: Context, algorithm: Any, model: str, **options: Any) -> Any:
    """Return a run on the device, in bfloat16 unless the options say something else; it is not open."""
    from rlhf_core import Run, make_config

    given: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "data": "prompts",
        "steps": 100,
        "strategy": {"use": "torch", "device": context.device},
        "output": str(context.folder / "run"),
    }
    return Run(make_config(algorithm, **(given | options)))


def make_role(context: Context, model: str, **options: Any) -> Any:
    """Return the actor of a supervised run, trained with AdamW from float32 weights."""
    from rlhf_core.training.local_role import LocalRole

    with on_device(context.device):
        return LocalRole(run_of(context, "sft", model, **options).plan, "actor")


def random_batch(lengths: Sequence[int], vocabulary: int, prompt: int = 1) -> Batch:
    """Return rows of random tokens; `prompt` of each row are its prompt, and the loss is on the others."""
    from rlhf_core.contract.batch import Batch

    N, T = len(lengths), max(lengths) - prompt
    draw = torch.Generator().manual_seed(0)
    lengths_N = torch.tensor(lengths) - prompt
    prompt_NL, tokens_NT = (torch.randint(3, vocabulary, (N, width), generator=draw) for width in (prompt, T))
    mask_NT = torch.arange(T) < lengths_N[:, None]
    return Batch(
        [""] * N, [""] * N, prompt_NL, torch.full((N,), prompt), tokens_NT.masked_fill(~mask_NT, 0), lengths_N, mask_NT,
        torch.arange(N), [None] * N, [{}] * N,
    )  # fmt: skip


def model_flops(model: Any, lengths: Sequence[int], recompute: bool = False) -> float:
    """Return the floating-point operations of a forward and backward pass over rows of these lengths.

    6 a parameter and token, and for causal attention 6 * layers * heads * head size * (S + 1) a token of a row of S: two
    matrix products of 2 operations a number, over (S + 1) / 2 positions on average, three times for forward and backward.
    The embedding is a look-up and is not counted; a tied one is counted once, as the head.

    Args:
        model: a causal language model of transformers.
        lengths: tokens of each row.
        recompute: count the layers' second forward pass, of gradient checkpointing, too.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    layers = sum(each.numel() for each in model.base_model.parameters()) - embedding
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * size
    forward = sum(2 * layers * S + attention * S * (S + 1) for S in lengths)
    return float((4 if recompute else 3) * forward + 6 * head * sum(lengths))
