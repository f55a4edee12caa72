"""Tokens a second of `--rollout hf` and of transformers' `generate`, in one process, on the same model and prompts.

    python benchmarks/sampling.py [--threads 2] [--repeat 3] [--tiny] [--only long]

The model is a random Llama of SmolLM2-135M's shape (`--tiny`: two small layers, where overhead is all there is). Both
engines draw from the full distribution at temperature 1 and take turns; the median counts. `generate` gets the same prompts
padded on the left; it returns no log-probabilities, ours does. Exits with 1 where ours is slower.

What is compared: the loop alone (n = 1), reading a prompt once for its completions (n = 4), long prompts (attention and
cache), and completions that end early and leave the batch (every token in 32 ends one).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.contract.options import Sampling
from rlhf_core.rollout.sampler import sample

CASES = [  # title, prompts, completions of each, shortest and longest prompt, new tokens, whether completions end early
    ("32 prompts", 32, 1, 20, 40, 32, False),
    ("16 prompts", 16, 1, 20, 40, 32, False),
    ("8 prompts x 4", 8, 4, 20, 40, 32, False),
    ("8 long prompts x 4", 8, 4, 150, 250, 32, False),
    ("8 prompts x 4, ending early", 8, 4, 20, 40, 64, True),
]


def build(tiny: bool) -> Any:
    """A random Llama; the seed fixes its weights."""
    torch.manual_seed(0)
    shape = (2, 64, 4, 2, 192) if tiny else (30, 576, 9, 3, 1536)
    layers, hidden, heads, kv_heads, intermediate = shape
    config = LlamaConfig(
        vocab_size=512 if tiny else 49152,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def generate(model: Any, prompts: list[list[int]], n: int, new: int, ends: list[int]) -> int:
    """Sample with transformers; how many tokens the completions have."""
    L = max(map(len, prompts))
    ids = torch.tensor([[0] * (L - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (L - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    with torch.inference_mode():
        rows = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=n,
            max_new_tokens=new,
            pad_token_id=0,
            **options,
        )
    is_end = torch.isin(rows[:, L:], torch.tensor(ends, dtype=torch.long))
    first_end = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, rows.shape[1] - L)
    return int(first_end.sum())


def ours(model: Any, prompts: list[list[int]], n: int, new: int, ends: list[int]) -> int:
    """Sample with core; how many tokens the completions have."""
    sampling = Sampling(n=n, max_new_tokens=new)
    seeds = [[sampling.seed_for(uid, k) for k in range(n)] for uid in range(len(prompts))]
    completions = sample(model, prompts, sampling, seeds, eos_ids=ends, pad_id=0)
    return sum(len(completion.tokens) for completion in completions)


def main() -> int:
    """Print the table; 1 if ours is slower somewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="cases whose title contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args.tiny)
    print(f"{args.threads} threads, tokens per second, median of {args.repeat} (least to most)")
    print(f"{'':30} {'generate':>22} {'--rollout hf':>22} {'faster by':>10}")
    slower = False
    for title, P, n, shortest, longest, new, early in CASES:
        if args.only not in title:
            continue
        draw = random.Random(0)
        vocab = model.config.vocab_size
        prompts = [[draw.randrange(vocab) for _ in range(draw.randint(shortest, longest))] for _ in range(P)]
        ends = list(range(0, vocab, 32)) if early else []
        engines: dict[str, Callable[..., int]] = {"generate": generate, "ours": ours}
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in range(args.repeat + 1):
            for name, engine in engines.items():
                began = time.perf_counter()
                tokens = engine(model, prompts, n, new, ends)
                if repeat:  # the first of each warms up
                    rates[name].append(tokens / (time.perf_counter() - began))
        shown = [f"{statistics.median(r):8.0f} ({min(r):.0f} to {max(r):.0f})" for r in rates.values()]
        ratio = statistics.median(rates["ours"]) / statistics.median(rates["generate"])
        print(f"{title:30} {shown[0]:>22} {shown[1]:>22} {ratio:9.2f}x", flush=True)
        slower |= ratio < 1
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
