"""`--rollout hf` on long outputs: a decoding step against the time to read weights, keys and values once in the same run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.contract.options import Sampling
from rlhf_core.rollout import sampler
from rlhf_core.rollout.attention import shared_heads
from scaling_curves.curve import Measured, Ratio, Series, cpu_seconds, curve

ROWS = 4


def build(shape: tuple[int, int, int, int, int, int]) -> Any:
    """Return a random Llama: (layers, hidden, heads, key-value heads, intermediate, vocabulary)."""
    torch.manual_seed(0)
    layers, hidden, heads, kv_heads, intermediate, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def step_and_bound(model: Any, length: int, repeat: int) -> tuple[float, float, float]:
    """Return CPU seconds of a decoding step after `length` tokens, of its bare products, and of reading its bytes.

    The bare products are a matrix product with each weight for `ROWS` rows, and a read of all keys and values.
    """
    state = sampler._prefill(model, [[1, 2, 3, 4]] * ROWS, 0, length + 2 * repeat)
    for layer in state.cache.layers:
        shape = (ROWS, model.config.num_key_value_heads, length - 4, model.config.head_dim)
        layer.update(torch.randn(shape), torch.randn(shape))
    state.width = length
    weights = [each for each in model.parameters() if each.dim() == 2]
    held = [each for layer in state.cache.layers for each in (layer.keys, layer.values)]
    row = torch.randn(ROWS, max(each.shape[1] for each in weights))
    one = torch.ones(ROWS, 1, dtype=torch.long)

    def step() -> None:
        sampler._forward(model, state, one, torch.full((ROWS, 1), state.width))

    def read(tensors: list[torch.Tensor]) -> None:
        for each in tensors:
            each.sum()

    def multiply() -> None:
        for each in weights:
            torch.nn.functional.linear(row[:, : each.shape[1]], each)

    found = []
    for call in (step, lambda: read(held), multiply, lambda: read(weights)):
        call()
        taken = []
        for _ in range(repeat):
            began = time.process_time()
            call()
            taken.append(time.process_time() - began)
        found.append(min(taken))
    stepped, cache, products, bytes_read = found
    return stepped, products + cache, bytes_read + cache


def ours(model: Any, tokens: int) -> None:
    """Sample with core."""
    seeds = [[row] for row in range(ROWS)]
    sampler.sample(model, [[1, 2, 3, 4]] * ROWS, Sampling(n=1, max_new_tokens=tokens), seeds, eos_ids=(), pad_id=0)


def theirs(model: Any, tokens: int) -> None:
    """Sample with transformers."""
    ids = torch.tensor([[1, 2, 3, 4]] * ROWS)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            pad_token_id=0,
        )


def side_by_side(model: Any, tokens: int, turns: int) -> tuple[float, float]:
    """Return the median CPU seconds of core and of transformers; they take turns, so that other work meets both."""
    taken = [[cpu_seconds(lambda f=f: f(model, tokens), 1) for f in (ours, theirs)] for _ in range(turns)]
    mine, other = zip(*taken, strict=True)
    return statistics.median(mine), statistics.median(other)


@curve("decoding", f"a decoding step of --rollout hf, {ROWS} rows, 135M parameters, and whole outputs of a small model")
def decoding(quick: bool) -> Measured:
    """CPU seconds on one thread."""
    torch.set_num_threads(1)
    small = build((4, 256, 4, 2, 768, 512))
    model = small if quick else build((30, 576, 9, 3, 1536, 49152))
    with torch.inference_mode(), shared_heads(model):
        lengths = (32, 64) if quick else (32, 512, 4096)
        found = {length: step_and_bound(model, length, 2 if quick else 6) for length in lengths}
    titles = ("a step", "its bare products and a read of keys and values", "reading weights, keys and values")
    series = [
        Series(title, "tokens", "ms", [(length, 1000 * each[k]) for length, each in found.items()])
        for k, title in enumerate(titles)
    ]
    ratios = [Ratio(f"step / bare products at {length}", each[0] / each[1], 1.5) for length, each in found.items()]
    for tokens, turns in ((8, 1),) if quick else ((32, 15), (512, 3), (4096, 1)):
        mine, other = side_by_side(small, tokens, turns)
        ratios.append(Ratio(f"{tokens} tokens of the small model / transformers.generate", mine / other, 1.0))
    return Measured(series, ratios)
