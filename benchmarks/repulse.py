"""One RePULSe update against the bare forwards and backwards it needs, on the same samples.

An update is everything after sampling: needs, credit, both optimizer steps. It needs three forward and backward passes: the
policy on its own and on the proposal's samples, the proposal on its samples. That on the proposal's samples gives the
importance weights too, and the proposal's own log-probabilities come with the samples. The bare side does those with
`transformers`, full logits, clipping and AdamW. Both take turns; target on the 135M model: a ratio of at most 1.1.

    python benchmarks/repulse.py --model tiny
    python benchmarks/repulse.py --model smollm2-135m --rounds 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import torch

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch
from rlhf_core.loop import collect, credit, update

PROMPTS, SAMPLES, TOKENS = 4, 4, 20


def main() -> None:
    """Sample once, then time both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        sampling = {"n": SAMPLES, "max_new_tokens": TOKENS}
        config = make_config("repulse", model=options.model, output=folder, batch_size=PROMPTS, sampling=sampling)
        with Run(config).open() as run:
            compare(run, options)


def compare(run: Run, options: argparse.Namespace) -> None:
    """Print the medians and their ratio."""
    iteration = next(run.iterations(collect))
    batches = iteration.batches
    for role in run.roles.values():
        role.module.eval()  # type: ignore[attr-defined]
    models: dict[str, Any] = {name: role.causal_lm for name, role in run.roles.items()}  # type: ignore[attr-defined]
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=0.0) for name, model in models.items()}

    def ours() -> None:
        update(run, iteration, credit(run, iteration))

    def bare() -> None:
        for name, sources in {"actor": ("actor", "proposal"), "proposal": ("proposal",)}.items():
            for source in sources:
                logprobs(models[name], batches[source]).mean().backward()
            torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()

    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for k in range(options.rounds + 1):
        for side in (ours, bare) if k % 2 else (bare, ours):
            started = time.perf_counter()
            side()
            if k:  # the first round warms up
                times[side.__name__].append(time.perf_counter() - started)
    ratio = median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
    print(
        f"repulse {options.model}: update {median(times['ours']):.3f} s, bare parts {median(times['bare']):.3f} s, "
        f"ratio {ratio:.3f} (median of {options.rounds} pairs)"
    )


def logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the sampled tokens, from full logits on padded rows."""
    pairs = zip(batch.prompt_NL, batch.prompt_lengths_N, batch.tokens_NT, batch.lengths_N, strict=True)
    rows = [torch.cat([prompt[:a], tokens[:b]]) for prompt, a, tokens, b in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    columns = torch.arange(ids.shape[1] - 1)
    first_N1 = batch.prompt_lengths_N[:, None] - 1
    sampled = (columns >= first_N1) & (columns < first_N1 + batch.lengths_N[:, None])
    log_softmax = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    found: torch.Tensor = log_softmax.gather(2, ids[:, 1:, None])[..., 0][sampled]
    return found


if __name__ == "__main__":
    main()
