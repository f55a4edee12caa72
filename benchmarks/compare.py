"""PPO, GRPO, RLOO and REINFORCE++ on the same prompts, samples and reward: a table and a plot of how the reward rises.

Every run is an ordinary one with the preset's own defaults; what they share is the model, the reward, the number of samples,
the actor's learning rate and the seed. A run that was stopped is continued, and one that is finished is left alone, so
each may be made when there is time for it. Held-out rewards are of the finished models, by `rlhf-run eval`.

    python benchmarks/compare.py ppo        # one run; grpo, rloo, reinforce_pp alike
    python benchmarks/compare.py measure    # held-out reward and KL of what has been trained, and of the start
    python benchmarks/compare.py report     # the table; --plot docs/comparison.svg draws the curves (needs matplotlib)
    python benchmarks/compare.py report --steps 6   # as it was after six steps, where some runs have no more yet
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUNS = ("ppo", "grpo", "rloo", "reinforce_pp")
SHARED = (
    "--reward sentiment --batch-size 8 --sampling.n 4 --sampling.max-new-tokens 32 --actor.optim.lr 2e-5 --seed 0 "
    "--save-every 2 --keep 1 --evaluator none"
).split()
MEASURED = (
    "--evaluator heldout,policy_stats --evaluator.heldout.n 4 --evaluator.policy_stats.n 2 --reward sentiment "
    "--sampling.max-new-tokens 32"
).split()


def main() -> None:
    """One run, the measurements, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RUNS, "measure", "report"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("comparison"), help="where runs and measurements are")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "measure":
        for name in ("start", *RUNS):
            measure(name, options.folder, options.model)
    elif options.what == "report":
        print(table(options.folder, options.steps))
        if options.plot:
            plot(options.folder, options.plot)
    else:
        train(options.what, options.folder, options.model, options.steps)


def train(name: str, folder: Path, model: str, steps: int) -> None:
    """Run or continue one algorithm; nothing if it is finished."""
    output = folder / name
    if (output / "model").exists():
        return
    words = [name, "--model", model, "--steps", str(steps), "--output", str(output), *SHARED]
    command([*words, "--resume"] if (output / "metrics.jsonl").exists() else words)


def measure(name: str, folder: Path, model: str) -> None:
    """Held-out reward and KL to the start, in FOLDER/NAME.json."""
    trained, result = folder / name / "model", folder / f"{name}.json"
    if result.exists() or not (name == "start" or trained.exists()):
        return
    subject = model if name == "start" else str(trained)
    words = ["eval", subject, "--reference.model", model, "--output", str(folder / f"{name}-evaluation"), *MEASURED]
    result.write_text(command(words).splitlines()[-1] + "\n")


def command(words: list[str]) -> str:
    """What `rlhf-run` prints; its messages go where ours go."""
    return subprocess.run(
        [sys.executable, "-m", "rlhf_core", *words], check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    """The metrics of every step."""
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(folder: Path, most: int) -> str:
    """One row an algorithm: training reward at both ends of its first `most` steps, nats a completion from the start, seconds a
    step; held-out reward, KL and length of a model that has no more steps than those."""
    lines = [
        "| | steps | reward, first 3 steps | last 3 steps | their KL | held out | its KL | tokens | seconds a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("start", *RUNS):
        whole, result = curve(folder, name), folder / f"{name}.json"
        steps = whole[:most]
        rewards = [step["reward/mean"] for step in steps]
        measured = json.loads(result.read_text()) if result.exists() and len(whole) == len(steps) else {}
        cells = [
            f"`{name}`" if steps else name,
            str(len(steps)) if steps else "",
            f"{mean(rewards[:3]):.3f}" if steps else "",
            f"{mean(rewards[-3:]):.3f}" if steps else "",
            f"{mean([step['kl/completion'] for step in steps[-3:]]):.1f}" if steps else "",
            f"{measured['eval/heldout/reward']:.3f} ± {measured['eval/heldout/reward_se']:.3f}" if measured else "",
            f"{measured['eval/policy/kl']:.2f} ± {measured['eval/policy/kl_se']:.2f}" if measured else "",
            f"{measured['eval/policy/length']:.1f}" if measured else "",
            f"{mean([step['time/step'] for step in steps]):.1f}" if steps else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(folder: Path, path: Path) -> None:
    """Training reward by samples seen, each point the mean of three steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "rlhf", "svg.fonttype": "none"}  # the same curves, the same small file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for name in RUNS:
        rewards = [step["reward/mean"] for step in curve(folder, name)]
        smooth = [mean(rewards[max(0, i - 2) : i + 1]) for i in range(len(rewards))]
        axes.plot([32 * (i + 1) for i in range(len(smooth))], smooth, label=name, linewidth=1.5)
    axes.set_xlabel("completions sampled")
    axes.set_ylabel("reward, mean of 3 steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
