"""The GCG attack: schedules at equal operations, and speed, loss and memory beside nanoGCG 0.3.0.

Schedules: each goal and seed is attacked by plain GCG and by the default schedule until both have used the same floating-point
operations. The table gives means over goals and seeds at parts of the budget, and, as a check of the search's own losses, the
mean of plain `transformers` in float32 on the final tokens. Target: the default's mean at most 0.8 of plain GCG's.

Peer: equal steps, widths, goals, model and precision on both sides, a process a side, CPU time. Candidates per second count
what was scored after the filter. Targets: 1.5 times nanoGCG's candidates per second, a loss no worse, no higher peak memory.
nanoGCG needs an older `transformers`, so it lives in an environment of its own:

    python -m venv nano && nano/bin/pip install torch==2.13.0 "nanogcg==0.3.0" transformers==4.47.1
    python benchmarks/gcg.py --peer-python nano/bin/python

`--quick` does one goal with few candidates. Goals are the package's own harmless ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

SUFFIX = "x x x x x x x x x x"
PARTS = (0.25, 0.5, 1.0)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one goal, one seed, few candidates")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--goals", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flops", type=float, default=1e14, help="floating-point operations of each attack")
    parser.add_argument("--width", type=int, default=512, help="search_width of both schedules")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the search")
    parser.add_argument("--schedules", nargs="+", default=["gcg", "acg"])
    parser.add_argument(
        "--target-words", type=int, default=0, help="cut targets to this many words; 0 keeps them whole"
    )
    parser.add_argument("--peer-python", help="the Python of an environment with nanoGCG (see above)")
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument("--no-schedules", action="store_true", help="measure beside the peer only")
    parser.add_argument("--child", choices=("ours", "nanogcg"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.goals, options.seeds, options.width, options.flops = 1, 1, 16, min(options.flops, 2e11)
    if options.child:
        print(json.dumps(ours(options) if options.child == "ours" else nanogcg(options)))
        return
    if not options.no_schedules:
        compare_schedules(options)
    if options.peer_python:
        compare_peer(options)


def read_goals(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (goal, target) of the package's harmless goals."""
    with (files("rlhf_eval_gcg.goals") / "harmless.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["goal"], row["target"]) for row in csv.DictReader(file)][: options.goals]
    words = options.target_words
    return [(goal, " ".join(target.split()[:words]) if words else target) for goal, target in rows]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return model and tokenizer, on one thread."""
    import torch

    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.loading.load import load_model
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    return load_model(options.model, ModelOptions()), load_tokenizer(options.model, ModelOptions())


# ----------------------------------------------------------------------------------------------------------------------
# schedules at equal operations
# ----------------------------------------------------------------------------------------------------------------------


def compare_schedules(options: argparse.Namespace) -> None:
    """Attack every goal with every seed and schedule; print a line each and the table of means."""
    import copy

    import torch

    from rlhf_eval_gcg.attack import Attack, Goal, attack

    model, tokenizer = load(options)
    searched = copy.deepcopy(model).to(getattr(torch, options.dtype))
    losses: dict[str, list[list[float]]] = {name: [] for name in options.schedules}
    for goal, target in read_goals(options):
        for seed in range(options.seeds):
            for name in options.schedules:
                attacked = Attack(
                    steps=1_000_000, max_flops=options.flops, schedule=name, search_width=options.width, suffix=SUFFIX,
                )  # fmt: skip
                began = time.process_time()
                (result,) = attack(searched, tokenizer, [Goal(goal, target)], attacked, seed=seed)
                reached = [best_until(result, share * options.flops) for share in PARTS]
                exact = loss_of(model, result)
                losses[name].append([*reached, exact])
                print(
                    f"{name:9} {goal[:32]:32} seed {seed}: {result.initial_loss:.3f} to {exact:.3f} (search: "
                    f"{', '.join(f'{each:.3f}' for each in reached)}), {result.steps} steps, {result.candidates} candidates, "
                    f"{time.process_time() - began:.0f} CPU s",
                    flush=True,
                )  # fmt: skip
    print(f"means over {len(losses[options.schedules[0]])} attacks of {options.flops:.1e} operations, {options.dtype}:")
    first = [mean(column) for column in zip(*losses[options.schedules[0]], strict=True)]
    for name, rows in losses.items():
        means = [mean(column) for column in zip(*rows, strict=True)]
        shares = ", ".join(f"{share:.0%} {loss:.3f}" for share, loss in zip(PARTS, means))
        ratio = means[-2] / first[-2]
        print(
            f"{name:9} {shares} ({ratio:.2f} of {options.schedules[0]}'s); with the step beyond it, float32: {means[-1]:.3f}"
        )


def best_until(result: Any, flops: float) -> float:
    """Return the lowest loss within a number of operations; the initial one where the first step took more."""
    found = [loss for loss, spent in zip(result.losses, result.flops, strict=True) if spent <= flops]
    return float(min(found, default=result.initial_loss))


def loss_of(model: Any, result: Any) -> float:
    """Return the mean cross-entropy of the target after the prompt, from plain transformers."""
    import torch

    row = torch.tensor([[*result.prompt_ids, *result.target_ids]])
    labels = row.clone()
    labels[0, : len(result.prompt_ids)] = -100
    with torch.no_grad():
        return float(model(input_ids=row, labels=labels).loss)


# ----------------------------------------------------------------------------------------------------------------------
# beside nanoGCG
# ----------------------------------------------------------------------------------------------------------------------


def compare_peer(options: argparse.Namespace) -> None:
    """Attack the same goals on both sides, a process each; print a line a side and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options)
        found = {}
        for side, python in (("nanogcg", options.peer_python), ("ours", sys.executable)):
            words = [python, __file__, "--child", side, "--folder", folder, "--width", str(options.width)]
            words += ["--peer-steps", str(options.peer_steps), "--seeds", str(options.seeds), "--dtype", options.dtype]
            env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(words, capture_output=True, text=True, env=env)
            if done.returncode:
                raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
            found[side] = side_figures = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{side:8} {side_figures['candidates']} candidates in {side_figures['cpu']:.1f} CPU s, "
                f"{side_figures['candidates'] / side_figures['cpu']:.2f} per second, final loss {side_figures['loss']:.4f}, "
                f"peak {side_figures['peak']:.0f} MiB, {side_figures['beyond']:.0f} beyond the loaded model",
                flush=True,
            )  # fmt: skip
    one, other = found["ours"], found["nanogcg"]
    speed = one["candidates"] / one["cpu"] / (other["candidates"] / other["cpu"])
    print(
        f"ratios: candidates per second {speed:.2f} (target 1.5), loss {one['loss'] / other['loss']:.3f} (target 1), "
        f"peak memory {one['peak'] / other['peak']:.2f}, beyond the model {one['beyond'] / max(other['beyond'], 1):.2f}"
    )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write model, tokenizer and goals so that an older transformers reads them."""
    model, tokenizer = load(options)
    model.save_pretrained(folder / "model")
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))
    tokenizer.backend_tokenizer.save(str(folder / "model" / "tokenizer.json"))
    special = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special.json").write_text(json.dumps({**special, "chat_template": tokenizer.chat_template}))
    (folder / "goals.json").write_text(json.dumps(read_goals(options)))


def read_folder(options: argparse.Namespace) -> tuple[Any, Any, list[tuple[str, str]]]:
    """Return model, tokenizer and goals of a child."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    folder = Path(options.folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval().to(getattr(torch, options.dtype))
    special = json.loads((folder / "special.json").read_text())
    template = special.pop("chat_template")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), **special)
    tokenizer.chat_template = template
    return model, tokenizer, [(goal, target) for goal, target in json.loads((folder / "goals.json").read_text())]


def ours(options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of this package's plain GCG."""
    from rlhf_eval_gcg.attack import Attack, Goal, attack

    model, tokenizer, goals = read_folder(options)
    before, began = peak(), time.process_time()
    chosen = Attack(schedule="gcg", steps=options.peer_steps, search_width=options.width, suffix=SUFFIX)
    results = [
        attack(model, tokenizer, [Goal(goal, target)], chosen, seed=seed)[0]
        for goal, target in goals
        for seed in range(options.seeds)
    ]
    cpu = time.process_time() - began
    return figures(results, cpu, sum(result.candidates for result in results), before)


def nanogcg(options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of nanoGCG; what it scores is counted where it filters."""
    import nanogcg as peer
    from nanogcg import gcg

    model, tokenizer, goals = read_folder(options)
    counts: list[int] = []
    original = gcg.filter_ids

    def counted(*args: Any) -> Any:
        kept = original(*args)
        counts.append(len(kept))
        return kept

    gcg.filter_ids = counted
    before, began = peak(), time.process_time()
    results = []
    for goal, target in goals:
        for seed in range(options.seeds):
            config = peer.GCGConfig(
                num_steps=options.peer_steps,
                search_width=options.width,
                optim_str_init=SUFFIX,
                seed=seed,
                verbosity="ERROR",
            )
            results.append(
                peer.run(model, tokenizer, [{"role": "user", "content": goal + " {optim_str}"}], target, config)
            )
    cpu = time.process_time() - began
    for result in results:
        result.loss = result.best_loss
    return figures(results, cpu, sum(counts), before)


def figures(results: list[Any], cpu: float, candidates: int, before: float) -> dict[str, float]:
    """Return what a side reports."""
    return {
        "cpu": cpu, "candidates": candidates, "loss": mean(float(result.loss) for result in results),
        "peak": peak(), "beyond": peak() - before,
    }  # fmt: skip


def peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
