"""Write the data of an example with a Python tool: demonstrations, and exercises with labels.

    python3 examples/agents/programs.py

Half of the rows of `demonstrations.jsonl` answer an exercise with a program, whose output is copied. The others guess a digit.
`exercises.jsonl` has the exercises with their labels.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

EXERCISES = {"2**3": "8", "9%5": "4", "7//3": "2", "2+5": "7"}


def demonstrate(exercise: str, label: str, draw: random.Random) -> str:
    """Return a completion: a program with its output and the answer, or a guess."""
    if draw.random() < 0.5:
        return str(draw.randrange(10))
    return f"```python\nprint({exercise})\n```\nOutput: {label}\n{label}"


def main() -> None:
    """Write both files into the current folder."""
    draw = random.Random(0)
    exercises = [{"prompt": text, "label": label} for text, label in EXERCISES.items()]
    demonstrations = [
        {"prompt": text, "completion": demonstrate(text, label, draw)}
        for _ in range(400)
        for text, label in EXERCISES.items()
    ]
    for name, rows in (("demonstrations", demonstrations), ("exercises", exercises)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
