"""Tokens per second of the rollout engines: `vllm` through the project, bare `LLM.generate` of the very same engine, and `hf`.

    python3 benchmarks/rollout.py --model smollm2-135m --prompts 16 --n 4 --tokens 64

The same prompts in one process, in turn, so that a machine's moods hit all alike; medians of the repeats are printed, and
tokens per CPU second beside them for machines that have other work, those of vLLM's own processes (`vllm, own`) included. Bare
vLLM is asked as its documentation does it: one request per prompt with `n` completions, no seeds; log-probabilities of the
sampled tokens are asked for in both, since training needs them. The target is at least 0.95 of bare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_core.contract.batch import Example, Prompts
from rlhf_core.contract.options import Sampling
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

TEXT = "Explain in a few sentences why the number {} is interesting, and what it has to do with the colour of the sky."


def main() -> None:
    args = arguments()
    sampling = Sampling(n=args.n, max_new_tokens=args.tokens, temperature=1.0)
    actor = {"dtype": args.dtype}
    role = LocalRole(tiny_run("unused", model=args.model, sampling=sampling, actor=actor).plan, "actor")
    texts = [TEXT.format(i) for i in range(args.prompts)]
    prompts = Prompts(
        texts, [role.tokenizer(t)["input_ids"] for t in texts], [Example(t) for t in texts], [*range(args.prompts)]
    )
    rollout = VLLMEngines(VLLM(kv_cache_gib=args.kv_cache_gib))
    apart = VLLMEngines(VLLM(kv_cache_gib=args.kv_cache_gib, process="own"))
    engines: dict[str, Callable[[int], int]] = {
        "vllm, bare": lambda seed: bare(rollout.engines["actor"], prompts, sampling),
        "vllm": lambda seed: int(rollout(role, prompts, replace(sampling, seed=seed)).lengths_N.sum()),
    }
    if args.own:
        engines["vllm, own"] = lambda seed: int(apart(role, prompts, replace(sampling, seed=seed)).lengths_N.sum())
        apart(role, prompts, sampling)
    if args.hf:
        engines["hf"] = lambda seed: int(
            HuggingFaceRollout()(role, prompts, replace(sampling, seed=seed)).lengths_N.sum()
        )
    rollout(role, prompts, sampling)  # opens and warms up
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for repeat in range(args.repeats):
        for name, engine in engines.items():
            wall, cpu = time.perf_counter(), cpu_seconds(apart)
            tokens = engine(repeat)
            rates[name].append((tokens / (time.perf_counter() - wall), tokens / (cpu_seconds(apart) - cpu)))
    rollout.close()
    apart.close()
    print(f"{args.model}, {args.dtype}, {args.prompts} prompts x {args.n} completions x {args.tokens} tokens")
    print("             tokens/s  of bare   tokens/CPU s  of bare")
    base_wall, base_cpu = medians(rates["vllm, bare"])
    for name, found in rates.items():
        wall, cpu = medians(found)
        print(f"{name:12} {wall:8.0f} {wall / base_wall:8.2f} {cpu:14.0f} {cpu / base_cpu:8.2f}")


def cpu_seconds(apart: VLLMEngines) -> float:
    """Return the CPU seconds of this process and of the engine processes in `apart`."""
    seconds = time.process_time()
    for engine in apart.engines.values():
        for process in engine.host.processes:  # type: ignore[attr-defined]  # they have processes of their own
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time
    return seconds


def medians(rates: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians of both columns."""
    wall, cpu = zip(*rates, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def bare(engine: Any, prompts: Prompts, sampling: Sampling) -> int:
    """Measure the same prompts without the project; return the number of tokens too."""
    params = engine.host.vllm.SamplingParams(
        n=sampling.n, temperature=1.0, max_tokens=sampling.max_new_tokens, logprobs=0
    )
    answers = engine.host.llm.generate([{"prompt_token_ids": ids} for ids in prompts.token_ids], params, use_tqdm=False)
    return sum(len(completion.token_ids) for answer in answers for completion in answer.outputs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--no-own", dest="own", action="store_false", help="leave out vLLM in processes of its own")
    parser.add_argument("--no-hf", dest="hf", action="store_false", help="leave hf out; it takes long for large models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
