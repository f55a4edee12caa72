"""Alternates training with attacks on what was trained, and tells learning from memorizing.

    python recipes/gcg/alternate.py --model smollm2-135m --prompts prompts.jsonl --goals goals.csv --seen :6 --heldout 6: \\
        --train "repulse --steps 20 --reward regex --reward.pattern ^Sure --reward.match none" \\
        --attack "--evaluator.steps 50 --evaluator.search-width 64" --rounds 3 --output runs/circle

Each round trains the model of the round before, on the prompts and on every attacked prompt found so far, and attacks the
result. Round 0 is the model as it was. Three numbers are measured in each round:

    seen        seen goals, seen attack seeds; the attacked prompts are trained on in the next round
    seeds       seen goals, held-out attack seeds: does it resist other attacks on what it knows?
    goals       held-out goals, held-out attack seeds: does it resist attacks on what it never met?

If the first falls and the others do not, the model has memorized suffixes. All steps can be killed: the same command continues.
Results are in OUTPUT/report.csv.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_core import UsageError
from rlhf_core.analysis.tables import write_csv
from rlhf_core.util.atomic_files import write_text
from rlhf_eval_gcg.analysis.read import Group, read_evaluations
from rlhf_eval_gcg.analysis.report import flat_row, render_table, report_rows

CELLS = {"seen": ("seen", "seeds"), "seeds": ("seen", "heldout_seeds"), "goals": ("heldout", "heldout_seeds")}
"""What is measured: option of the goals, and option of the attack seeds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rounds and print the report; return the exit code."""
    options = parse(argv)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        check_prompts(Path(options.prompts))
        model = options.model
        for number in range(options.rounds + 1):
            folder = output / f"round-{number}"
            if number:
                model = train(options, number, model, folder, output)
            for cell in CELLS:
                attack(options, model, folder, cell)
            report(options, output, number)
    except UsageError as error:
        print(f"alternate: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"alternate: exit code {error.returncode} of: {shlex.join(error.cmd[1:])}", file=sys.stderr)
        return 1
    except subprocess.TimeoutExpired as error:
        print(f"alternate: more than --hours {options.hours} for: {shlex.join(error.cmd[1:])}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model of round 0")
    parser.add_argument("--prompts", required=True, help="JSONL file of prompts that every round trains on")
    parser.add_argument("--goals", required=True, help="goals, as --evaluator.goals")
    parser.add_argument("--seen", default=":6", help="slice of the goals whose attacked prompts are trained on")
    parser.add_argument("--heldout", default="6:", help="slice of the goals that are only measured")
    parser.add_argument("--seeds", default="0", help="attack seeds of attacks that are trained on, separated by commas")
    parser.add_argument("--heldout-seeds", default="1000", help="attack seeds that are only measured")
    parser.add_argument(
        "--train", required=True, help="algorithm and flags of rlhf-run, without model, data and output"
    )
    parser.add_argument("--attack", default="", help="further flags of rlhf-run eval --evaluator gcg")
    parser.add_argument("--threshold", type=float, default=0.5, help="answers with a lower reward are bad")
    parser.add_argument(
        "--copies", type=int, default=1, help="times that each attacked prompt is put among the prompts"
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds of training and attack")
    parser.add_argument("--output", default="runs/circle", help="folder of everything")
    parser.add_argument("--hours", type=float, default=24.0, help="longest time of one step")
    return parser.parse_args(argv)


def check_prompts(path: Path) -> None:
    """Check that there is a file of prompts with chats or texts under `prompt`.

    Raises:
        UsageError: there is not.
    """
    try:
        first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
    except (OSError, ValueError) as error:
        raise UsageError(f"--prompts {path}: {getattr(error, 'strerror', None) or 'expected JSON lines'}") from None
    if not isinstance(first, dict) or "prompt" not in first:
        raise UsageError(f"--prompts {path}: expected lines with prompt, as --evaluator.export writes them")


def train(options: argparse.Namespace, number: int, model: str, folder: Path, output: Path) -> str:
    """Train the model of the round before, and return the folder of what comes out."""
    made = folder / "train" / "model"
    if not (made / "config.json").exists():
        found = [output / f"round-{k}" / "seen.jsonl" for k in range(number)]
        texts = [Path(options.prompts).read_text(encoding="utf-8").rstrip("\n") + "\n"]
        texts += [path.read_text(encoding="utf-8") * options.copies for path in found]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "prompts.jsonl", "".join(texts))
        run(
            options,
            *shlex.split(options.train), "--model", model, "--data", "json", "--data.path", str(folder / "prompts.jsonl"),
            "--seed", str(number), "--resume", "auto", "--output", str(folder / "train"),
        )  # fmt: skip
    return str(made)


def attack(options: argparse.Namespace, model: str, folder: Path, cell: str) -> None:
    """Attack a model with the goals and attack seeds of a cell."""
    if (folder / cell / "gcg" / "step-0" / "answers.jsonl").exists():
        return
    goals, seeds = (getattr(options, name) for name in CELLS[cell])
    folder.mkdir(parents=True, exist_ok=True)
    export = ["--evaluator.export", str(folder / "seen.jsonl")] if cell == "seen" else []
    run(
        options,
        "eval", model, "--evaluator", "gcg", "--evaluator.goals", options.goals, f"--evaluator.rows={goals}",
        "--evaluator.seeds", *seeds.split(","), *export, *shlex.split(options.attack), "--output", str(folder / cell),
    )  # fmt: skip


def run(options: argparse.Namespace, *words: str) -> None:
    """Run a command of rlhf-run and show it."""
    print(f"$ rlhf-run {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "rlhf_core", *words], check=True, timeout=3600 * options.hours)


def report(options: argparse.Namespace, output: Path, rounds: int) -> None:
    """Print success of every cell in every round so far, and write it."""
    groups = [
        Group(cell, number, tuple(read_evaluations(output / f"round-{number}" / cell)))
        for cell in CELLS
        for number in range(rounds + 1)
    ]
    rows = report_rows(groups, (options.threshold,))
    print(render_table(rows), flush=True)
    write_csv(output / "report.csv", [flat_row(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
