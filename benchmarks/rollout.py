"""Tokens per second of the rollout engines: `vllm` through the project, bare `LLM.generate` of the very same engine, and `hf`.

    python3 benchmarks/rollout.py --model smollm2-135m --prompts 16 --n 4 --tokens 64

The same prompts in one process, in turn, so that a machine's moods hit all alike; medians of the repeats are printed, and
tokens per CPU second beside them for machines that have other work, those of vLLM's own processes (`vllm, own`) included. Bare
vLLM is asked as its documentation does it: one request per prompt with `n` completions, no seeds; log-probabilities of the
sampled tokens are asked for in both, since training needs them. The target is at least 0.95 of bare.

`vllm, endpoint` is the same engine behind the endpoint of `--environment harness`: an agent asks for each completion over
HTTP, in a session of its own. The target is at least 0.95 of `vllm`, at 64 sessions. Conversations of eight turns follow.
The prompt tokens that the engine computes in them are at most 1.1 of those that are new: prompts, and feedback between
turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_core.contract.batch import Example, Prompts
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.endpoint.harness import Harness, HarnessEngine
from rlhf_core.rollout.driving import drive
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

TEXT = "Explain in a few sentences why the number {} is interesting, and what it has to do with the colour of the sky."
TURNS = 8


def main() -> None:
    args = arguments()
    sampling = Sampling(n=args.n, max_new_tokens=args.tokens, temperature=1.0)
    actor = {"dtype": args.dtype}
    run = tiny_run("unused", model=args.model, sampling=sampling, actor=actor)
    role = LocalRole(run.plan, "actor")
    texts = [TEXT.format(i) for i in range(args.prompts)]
    prompts = Prompts(
        texts, [role.tokenizer(t)["input_ids"] for t in texts], [Example(t) for t in texts], [*range(args.prompts)]
    )
    rollout = VLLMEngines(VLLM(kv_cache_gib=args.kv_cache_gib, block_size=args.block_size))
    apart = VLLMEngines(VLLM(kv_cache_gib=args.kv_cache_gib, process="own"))
    engines: dict[str, Callable[[int], int]] = {
        "vllm, bare": lambda seed: bare(rollout.engines["actor"], prompts, sampling),
        "vllm": lambda seed: int(rollout(role, prompts, replace(sampling, seed=seed)).lengths_N.sum()),
        "vllm, endpoint": lambda seed: served(
            rollout, role, run.encoder, prompts, replace(sampling, seed=seed), Agent()
        ),
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
    conversation = Agent(turns=TURNS, tokens=args.turn_tokens, feedback=[*range(1, args.feedback + 1)])
    computed = CountedPrompts(rollout.engines["actor"])
    longer = replace(sampling, n=1, max_new_tokens=TURNS * (args.turn_tokens + args.feedback), seed=1)
    served(rollout, role, run.encoder, prompts, longer, conversation)
    rollout.close()
    apart.close()
    print(f"{args.model}, {args.dtype}, {args.prompts} prompts x {args.n} completions x {args.tokens} tokens")
    print("               tokens/s  of bare   tokens/CPU s  of bare")
    base_wall, base_cpu = medians(rates["vllm, bare"])
    for name, found in rates.items():
        wall, cpu = medians(found)
        print(f"{name:14} {wall:8.0f} {wall / base_wall:8.2f} {cpu:14.0f} {cpu / base_cpu:8.2f}")
    pairs = zip(rates["vllm, endpoint"], rates["vllm"], strict=True)
    wall, cpu = medians([(one / other, cpu_one / cpu_other) for (one, cpu_one), (other, cpu_other) in pairs])
    print(f"endpoint, {args.prompts * args.n} sessions: {wall:.2f} of vllm's tokens/s, {cpu:.2f} of its tokens/CPU s")
    print(
        f"conversation of {TURNS} turns, {args.prompts} sessions, blocks of {args.block_size}: {computed.tokens} prompt tokens "
        f"computed, {conversation.new} new: {computed.tokens / conversation.new:.2f}"
    )


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


@dataclass
class Agent:
    """An agent that asks for turns over HTTP with token ids, and adds feedback between them."""

    turns: int = 1
    tokens: int = 0
    """tokens of a turn at most; 0 is what is left of the episode"""
    feedback: list[int] = field(default_factory=list)
    new: int = 0
    """tokens that it added to contexts: prompts and feedback"""

    async def __call__(self, base_url: str, api_key: str, example: Example) -> float:
        url = urlsplit(base_url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        ids = list(example.meta["ids"])
        self.new += len(ids)
        for turn in range(self.turns):
            if turn:
                ids += self.feedback
                self.new += len(self.feedback)
            question: dict[str, Any] = {"prompt": ids, "return_token_ids": True}
            body = json.dumps(question | ({"max_tokens": self.tokens} if self.tokens else {})).encode()
            head = f"POST {url.path}/completions HTTP/1.1\r\nAuthorization: Bearer {api_key}\r\n"
            writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            ids += json.loads(await reader.readexactly(length))["choices"][0]["token_ids"]
        writer.close()
        return 0.0


def served(
    rollout: VLLMEngines, role: LocalRole, encoder: Any, prompts: Prompts, sampling: Sampling, agent: Agent
) -> int:
    """Sample through the endpoint, with a session for each completion; return the number of tokens."""
    examples = [
        Example(each.prompt, meta={"ids": ids}) for each, ids in zip(prompts.examples, prompts.token_ids, strict=True)
    ]
    environment, limits = HarnessEngine(Harness(agent=agent.__call__)), EpisodeLimits(turns=TURNS)
    with rollout.session(role) as sample:
        rollouts = drive(sample, environment, replace(prompts, examples=examples), sampling, limits, encoder)
    return int(rollouts.mask_NT.sum())


class CountedPrompts:
    """Counts the prompt tokens that an engine computes from now on: those that its cache does not have.

    Args:
        engine: one in this process.
    """

    def __init__(self, engine: Any) -> None:
        self.tokens, generate = 0, engine.host.llm.generate

        def counted(*arguments: Any, **options: Any) -> Any:
            answers = generate(*arguments, **options)
            self.tokens += sum(len(each.prompt_token_ids) - (each.num_cached_tokens or 0) for each in answers)
            return answers

        engine.host.llm.generate = counted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turn-tokens", type=int, default=16, help="tokens of a turn of the conversation")
    parser.add_argument("--feedback", type=int, default=128, help="tokens between two turns of the conversation")
    parser.add_argument(
        "--block-size", type=int, default=32, help="tokens of a block of the cache; 0 is vLLM's own number"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--no-own", dest="own", action="store_false", help="leave out vLLM in processes of its own")
    parser.add_argument("--no-hf", dest="hf", action="store_false", help="leave hf out; it takes long for large models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
