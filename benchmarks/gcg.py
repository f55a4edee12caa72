"""The GCG attack: schedules at equal operations, and speed, loss and memory beside nanoGCG 0.3.0.

Schedules: each goal and seed is attacked by plain GCG and by the default schedule until both have used the same floating-point
operations. The table gives means over goals and seeds at parts of the budget, and, as a check of the search's own losses, the
mean of plain `transformers` in float32 on the final tokens. Target: the default's mean at most 0.8 of plain GCG's.

    python benchmarks/gcg.py                                                           # on one CPU thread: days
    python benchmarks/gcg.py --device cuda --model FOLDER --processes 6 --minutes 4 --output $OUT    # on one GPU
    python benchmarks/gcg.py --quick

Peer: equal steps, widths, goals, model and precision on both sides, a process a side in turns, CPU time. Candidates per second
count what was scored after the filter, with the start of an attack and without. Targets: 1.5 times nanoGCG's candidates per
second, a loss no worse, no higher peak memory. nanoGCG needs an older `transformers`, so it lives in an environment of its own:

    python -m venv nano && nano/bin/pip install torch==2.13.0 "nanogcg==0.3.0" transformers==4.47.1
    python benchmarks/gcg.py --peer-python nano/bin/python --no-schedules --rounds 3

`--quick` does one goal with few candidates. Goals are the package's own harmless ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import source_tree
from gcg_schedules import SUFFIX, compare_schedules, load, read_goals, run_part


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one goal, one seed, few candidates")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--goals", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flops", type=float, default=1e14, help="floating-point operations of each attack")
    parser.add_argument("--width", type=int, default=512, help="search_width of all schedules")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the search")
    parser.add_argument("--schedules", nargs="+", default=["gcg", "acg"])
    parser.add_argument(
        "--target-words", type=int, default=0, help="cut targets to this many words; 0 keeps them whole"
    )
    parser.add_argument("--at-once", type=int, default=0, help="goals attacked together; 0: 1 on a CPU, 5 elsewhere")
    parser.add_argument("--processes", type=int, default=1, help="schedules and seeds at a time")
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="with --processes: everything ends within this time"
    )
    parser.add_argument("--output", type=Path, help="folder of gcg.json and gcg.md, written after each few attacks")
    parser.add_argument("--peer-python", help="the Python of an environment with nanoGCG (see above)")
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=1, help="turns of both sides; the medians of their ratios are printed"
    )
    parser.add_argument("--no-schedules", action="store_true", help="measure beside the peer only")
    parser.add_argument("--child", choices=("ours", "nanogcg", "part"), help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.goals, options.seeds, options.width, options.flops = 1, 1, 16, min(options.flops, 2e11)
    options.at_once = options.at_once or (1 if options.device == "cpu" else 5)
    if options.processes > 1 and not options.output:
        parser.error("--processes needs --output, a folder where they write what they find")
    if options.child != "nanogcg":  # whose environment has an older transformers
        source_tree.activate()
    if options.child == "part":
        name, seed, file = options.part
        append_records(Path(file), run_part(name, int(seed), options))
    elif options.child:
        print(json.dumps(ours(options) if options.child == "ours" else nanogcg(options)))
    else:
        if not options.no_schedules:
            compare_schedules(options)
        if options.peer_python:
            compare_peer(options)


def append_records(file: Path, found: Any) -> None:
    """Write records to a file as they come, a line each."""
    with file.open("a", encoding="utf-8") as lines:
        for records in found:
            for record in records:
                lines.write(json.dumps(record) + "\n")
            lines.flush()


def compare_peer(options: argparse.Namespace) -> None:
    """Attack the same goals on both sides, a process each, in turns; print a line a side and the medians of the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options)
        ratios = [compare_once(folder, options, k) for k in range(options.rounds)]
    names = (
        "candidates per second with the start (target 1.5)",
        "after the start",
        "loss (target 1)",
        "peak memory",
        "memory beyond the model",
    )
    for k, name in enumerate(names):
        values = [row[k] for row in ratios]
        print(f"ratio of {name}: median {median(values):.3f} of {', '.join(f'{value:.3f}' for value in values)}")


def compare_once(folder: str, options: argparse.Namespace, turn: int) -> list[float]:
    """Run both sides once and return the ratios of ours to nanoGCG's."""
    found: dict[str, dict[str, float]] = {}
    sides = [("nanogcg", options.peer_python), ("ours", sys.executable)]
    for side, python in sides if turn % 2 == 0 else sides[::-1]:
        words = [python, __file__, "--child", side, "--folder", folder, "--width", str(options.width)]
        words += ["--peer-steps", str(options.peer_steps), "--seeds", str(options.seeds), "--dtype", options.dtype]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
        found[side] = own = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{side:8} {own['candidates']} candidates in {own['cpu']:.1f} CPU s, {own['candidates'] / own['cpu']:.2f} per "
            f"second ({own['rate']:.2f} after the start), final loss {own['loss']:.4f}, peak {own['peak']:.0f} MiB, "
            f"{own['beyond']:.0f} beyond the loaded model",
            flush=True,
        )
    one, other = found["ours"], found["nanogcg"]
    return [
        one["candidates"] / one["cpu"] / (other["candidates"] / other["cpu"]),
        one["rate"] / other["rate"] if other["rate"] else float("nan"),
        one["loss"] / other["loss"],
        one["peak"] / other["peak"],
        one["beyond"] / max(other["beyond"], 1),
    ]


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
    from rlhf_eval_gcg.attack.schedules import gcg

    model, tokenizer, goals = read_folder(options)
    chosen = Attack(schedule="gcg", steps=options.peer_steps, search_width=options.width, suffix=SUFFIX)

    def search(goal: str, target: str, seed: int) -> float:
        (result,) = attack(model, tokenizer, [Goal(goal, target)], chosen, seed=seed)
        return result.loss

    return measure(gcg, "draw_candidates", search, goals, options.seeds)


def nanogcg(options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of nanoGCG."""
    import nanogcg as peer
    from nanogcg import gcg

    model, tokenizer, goals = read_folder(options)

    def search(goal: str, target: str, seed: int) -> float:
        config = peer.GCGConfig(
            num_steps=options.peer_steps,
            search_width=options.width,
            optim_str_init=SUFFIX,
            seed=seed,
            verbosity="ERROR",
        )
        messages = [{"role": "user", "content": goal + " {optim_str}"}]
        return float(peer.run(model, tokenizer, messages, target, config).best_loss)

    return measure(gcg, "filter_ids", search, goals, options.seeds)


def measure(
    module: Any, name: str, search: Callable[[str, str, int], float], goals: Sequence[tuple[str, str]], seeds: int
) -> dict[str, float]:
    """Attack and return what a side reports.

    Args:
        module: where the function `name` lives, which returns the candidates of a step after the filter, once per step. What
            lies between its first and its last call of an attack is the search without its start.
        search: attacks a goal and returns the lowest loss.
    """
    original = getattr(module, name)
    marks: list[tuple[float, int]] = []

    def counted(*args: Any) -> Any:
        kept = original(*args)
        marks.append((time.process_time(), len(kept)))
        return kept

    setattr(module, name, counted)
    before, began = peak(), time.process_time()
    losses, candidates, searched, seconds = [], 0, 0, 0.0
    for goal, target in goals:
        for seed in range(seeds):
            marks.clear()
            losses.append(search(goal, target, seed))
            candidates += sum(count for _, count in marks)
            searched += sum(count for _, count in marks[:-1])
            seconds += marks[-1][0] - marks[0][0]
    return {
        "cpu": time.process_time() - began, "candidates": candidates, "loss": mean(losses),
        "rate": searched / seconds if seconds else 0.0, "peak": peak(), "beyond": peak() - before,
    }  # fmt: skip


def peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
