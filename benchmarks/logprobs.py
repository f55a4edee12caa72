"""Chunked against plain log-probabilities in a whole forward and backward pass of a 135M-parameter Llama.

The model has the shape of SmolLM2-135M (30 layers, 576 hidden, tied embeddings) with random weights and a vocabulary of
49k or 150k. Three passes are compared, each in processes of its own: the body alone, with the plain head (`chunk=0`), and
with the chunked head. What a head needs in memory is the peak of its pass beyond that of the body's, so weights, their
gradients and the body's activations are not counted. Times are the least of some rounds, which alternate between the two;
CPU seconds are shown beside them for machines that have other work.

    python benchmarks/logprobs.py [--tokens 2048] [--rounds 3] [--vocabularies 49152 151936]

Targets: at least 4 times less memory, at most 1.1 times the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

LENGTH = 512
"""Tokens of a row."""


def measure(path: str, vocabulary: int, tokens: int) -> dict[str, float]:
    """Peak memory and time of one pass in this process, after a shorter one that warms up."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_core.models.heads.modules import ChunkedHead
    from rlhf_core.models.module import RoleModule

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.set_output_embeddings(ChunkedHead(model.lm_head, chunk=0 if path == "plain" else 1024))
    module = RoleModule(model, {})
    for N in (1, tokens // LENGTH):
        model.zero_grad()
        inputs = random_rows(N, vocabulary)
        advantages_NT = torch.randn(N, LENGTH - 1)
        wall, cpu = time.perf_counter(), time.process_time()
        if path == "body":
            loss = module._read(inputs)[0].square().mean()
        else:
            logprobs_NT = module(inputs, frozenset({"logprobs_NT"}))["logprobs_NT"]
            loss = -(advantages_NT * logprobs_NT).mean()
        loss.backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"peak": peak, "wall": wall, "cpu": cpu, "loss": float(loss.detach())}


def random_rows(N: int, vocabulary: int) -> Any:
    """Token ids (N, S) as a model reads them; all tokens but a row's first are predicted."""
    import torch

    from rlhf_core.models.inputs.arrange import Inputs

    ids_NS = torch.randint(vocabulary, (N, LENGTH))
    states_M = torch.arange(N * LENGTH).view(N, LENGTH)[:, :-1].flatten()
    return Inputs(
        ids_NS=ids_NS,
        states_M=states_M,
        slots_M=torch.arange(len(states_M)),
        targets_M=ids_NS[:, 1:].flatten(),
        last_N=torch.arange(N) * LENGTH + LENGTH - 1,
        tokens_NT=ids_NS[:, 1:],
    )


def in_its_own_process(path: str, vocabulary: int, tokens: int) -> dict[str, float]:
    """`measure`, where nothing else was allocated before."""
    command = [sys.executable, __file__, "--measure", path, "--vocabularies", str(vocabulary), "--tokens", str(tokens)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def compare(vocabulary: int, tokens: int, rounds: int) -> None:
    """Print the comparison for one vocabulary."""
    best: dict[str, dict[str, float]] = {}
    body = in_its_own_process("body", vocabulary, tokens)
    for _ in range(rounds):
        for path in ("plain", "chunked"):
            found = in_its_own_process(path, vocabulary, tokens)
            best[path] = {key: min(value, best.get(path, found)[key]) for key, value in found.items()}
    plain, chunked = best["plain"], best["chunked"]
    print(f"vocabulary {vocabulary}, {tokens} tokens; the body alone: {body['peak']:.0f} MiB, {body['wall']:.1f} s")
    print(f"  {'':10}{'head MiB':>10}{'seconds':>10}{'CPU s':>8}{'loss':>14}")
    for path, found in best.items():
        beyond = found["peak"] - body["peak"]
        print(f"  {path:10}{beyond:10.0f}{found['wall']:10.2f}{found['cpu']:8.2f}{found['loss']:14.8f}")
    less = (plain["peak"] - body["peak"]) / max(chunked["peak"] - body["peak"], 1.0)
    print(
        f"  {less:.1f} times less memory (at least 4), {chunked['wall'] / plain['wall']:.2f} of the time (at most 1.1), "
        f"{chunked['cpu'] / plain['cpu']:.2f} of the CPU time\n",
        flush=True,
    )


def main(arguments: Any = None) -> None:
    """Compare all vocabularies, or measure one path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help=f"tokens of the batch, a multiple of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=3, help="processes per path")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--measure", choices=["body", "plain", "chunked"], help="measure this path here; prints JSON")
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure, options.vocabularies[0], options.tokens)))
        return
    for vocabulary in options.vocabularies:
        compare(vocabulary, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
