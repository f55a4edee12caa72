"""`rlhf-run generate` and `score` that are started again when all is done, at growing numbers of lines."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rlhf_core.cli.generate import Generate
from rlhf_core.cli.resumable import continue_output, whole_lines
from rlhf_core.cli.score import Score
from rlhf_core.reward.length import Length
from scaling_curves.curve import Cost, Measured, Ratio, Series, cost_of, curve, in_process


def line(number: int) -> dict[str, object]:
    """A line as `generate` writes it."""
    prompt = f"question {number:07d} about a thing that nobody knows"
    return {
        "uid": number,
        "k": 0,
        "prompt": prompt,
        "text": prompt,
        "completion": "a" * 60,
        "tokens": 60,
        "finish": "stop",
    }


def cost_of_generate(path: str) -> Cost:
    """The cost of finding which rows are finished."""
    next(whole_lines(Path(path)))
    return cost_of(Generate()._finished_rows, Path(path))


def cost_of_score(folder: str) -> Cost:
    """The cost of finding where to go on, on an output that is whole."""
    score = Score(f"{folder}/lines.jsonl", output=f"{folder}/scored.jsonl")
    return cost_of(score._score, Length(), Length())


@curve("jobs", "generate and score, started again when all is done")
def jobs(quick: bool) -> Measured:
    """Each in a fresh process."""
    points: dict[str, list[tuple[float, float]]] = {}
    for size in (100, 300) if quick else (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder) / "lines.jsonl", Path(folder) / "scored.jsonl"
            continue_output(paths[1], reward=Length(), seed=0)  # the note of a run that is over
            with paths[0].open("w") as lines, paths[1].open("w") as scored:
                for number in range(size):
                    lines.write(json.dumps(line(number)) + "\n")
                    scored.write(json.dumps(line(number) | {"reward": 0.5}) + "\n")
            generate = in_process(cost_of_generate, f"{folder}/lines.jsonl")
            score = in_process(cost_of_score, folder)
        for name, cost in (("generate", generate), ("score", score)):
            points.setdefault(f"{name}, time [s]", []).append((size, cost.cpu))
            points.setdefault(f"{name}, memory [B]", []).append((size, max(cost.memory, 1.0)))
    ratios = (
        []
        if quick
        else [
            Ratio(f"{name}: seconds at 1e7 lines, from 1e6", 10 * points[f"{name}, time [s]"][-1][1], 30)
            for name in ("generate", "score")
        ]
        + [
            Ratio(f"{name}: bytes of memory a line at 1e6 lines", points[f"{name}, memory [B]"][-1][1] / 1e6, 20)
            for name in ("generate", "score")
        ]
    )
    return Measured([Series(name, "lines", name[-2], found) for name, found in points.items()], ratios)
