"""Writes docs/coming-from.md: how commands and options of OpenRLHF, TRL, verl and RLHFlow are translated.

python tools/coming_from.py          writes the page, and the table of docs/flags.md
python tools/coming_from.py --check  fails if one of them is not current (a test runs this)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_core.config.foreign_flags import table
from rlhf_core.translation import openrlhf, programs, repulse, rlhflow, rules, trl, verl
from rlhf_core.translation.draft import Dialect

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs/coming-from.md"
FLAGS = ROOT / "docs/flags.md"

HEAD = """# Coming from OpenRLHF, TRL, verl or RLHFlow

Written by `tools/coming_from.py` from the tables of the translator: do not edit.

`rlhf-run translate` prints the command that takes the place of an old one:

```console
$ rlhf-run translate 'trl dpo --model_name_or_path tiny --dataset_name pairs.jsonl --beta 0.2 --logging_steps 1'
rlhf-run dpo …
    --model tiny …
    --loss.beta 0.2 …
# --logging_steps: every step is logged
```

- Quote the old command as one word, or name a file with it. Line ends after a backslash, comments and variables that the lines
  set are understood, as are `ray job submit`, `deepspeed`, `accelerate launch`, `torchrun` and `python -m`. Nothing is run.
- `trl dpo --config FILE` reads the YAML file.
- Options that the old program has by default and ours does not are written out, so that numbers stay what they were.
- A flag without a place in the new command is named below it, with the reason. None is dropped.
- Words in capital letters, such as `MODEL`, stand for what the old command does not say.
- `--write FILE` writes a configuration for `rlhf-run --config FILE` in place of the flags.
- Add `--dry-run` to the new command: it checks options, providers and files, and starts nothing.

"""


def lines() -> Iterator[str]:
    """Yield the parts of the page."""
    yield HEAD
    yield "## Programs\n\n| program | here |\n|---|---|\n"
    for name, program in programs.PROGRAMS.items():
        here = "`cat`, one file after the other" if program.command == "cat" else f"`rlhf-run {program.command}`"
        yield f"| `{name}` | {here} |\n"
    yield "\nTRL's scripts, such as `trl/scripts/dpo.py`, are read as its commands.\n\n"
    yield "## Algorithms and losses\n\n| OpenRLHF's and verl's estimator | algorithm |\n|---|---|\n"
    yield from _rows(rules.ESTIMATORS)
    yield "\n| `loss_type` of TRL's DPO | `--loss` |\n|---|---|\n"
    yield from _rows(rules.PREFERENCES)
    yield "\n| schedule of transformers | `--ROLE.optim.schedule` |\n|---|---|\n"
    yield from _rows(rules.SCHEDULES)
    yield from _sections()


def _rows(names: Mapping[str, str]) -> Iterator[str]:
    """Yield rows of a table of names."""
    return (f"| `{theirs}` | `{ours}` |\n" for theirs, ours in names.items())


def _sections() -> Iterator[str]:
    """Yield what each project's options become."""
    yield "\n## OpenRLHF\n\n"
    yield from _dialect(openrlhf.ONLINE)
    yield "\n0.11 writes options in groups. Of those that are not in this table, the group is left out.\n\n"
    yield "| grouped | flat |\n|---|---|\n"
    yield from _rows({new: old for new, old in openrlhf.NAMES.items() if new != old})
    yield "\n## RePULSe\n\n"
    yield from _dialect(repulse.TRAINING, repulse.ABSENT)
    yield "\nIts attack evaluation, `evaluate_gcg_sz`:\n\n"
    yield from _dialect(repulse.ATTACK, {})
    yield "\n## RLHFlow\n\n"
    for dialect in (rlhflow.GENERATION, rlhflow.ANNOTATION, rlhflow.MERGING, rlhflow.DPO, rlhflow.PIPELINE):
        yield f"{dialect.title}:\n\n"
        yield from _dialect(dialect)
        yield "\n"
    yield "## TRL\n\n"
    yield from _dialect(trl.GRPO)
    yield "\nFrom data:\n\n"
    yield from _dialect(trl.PAIRS, {})
    yield "\n## verl\n\nA reason holds for every option with that ending.\n\n"
    yield from _dialect(verl.ONLINE)
    yield "\n## Flags that all of them share\n\n"
    yield "[flags.md](flags.md) has the table. `rlhf-run` answers whoever types one of these flags with it.\n"


def _dialect(dialect: Dialect, absent: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield what a dialect's options become: by rules, by answers, and not at all."""
    rows = []
    for rule in dialect.rules:
        text = " ".join((rule.__doc__ or "").partition("\n\n")[0].split()).rstrip(".")
        rows.append(f"- {text[0].upper()}{text[1:]}.\n")
    yield from ("Options that decide together:\n\n", *rows, "\n") if rows else ()
    if dialect.answers:
        yield "| theirs | ours |\n|---|---|\n"
        yield from (
            f"| `{theirs}` | `{ours.replace('{role}', 'ROLE')}` |\n" for theirs, ours in dialect.answers.items()
        )
        yield "\n"
    reasons = dialect.absent if absent is None else absent
    if reasons:
        yield "| without a place here | why |\n|---|---|\n"
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(f"`{name}`")
        yield from (f"| {', '.join(names)} | {reason} |\n" for reason, names in by_reason.items())


def main() -> int:
    """Write the pages, or compare them."""
    page = re.sub(r"\n{3,}", "\n\n", "".join(lines()))
    flags = FLAGS.read_text(encoding="utf-8")
    before, mark, _ = flags.partition("| theirs | ours |\n|---|---|\n")
    pages = {TARGET: page, FLAGS: before + mark + table()}
    if "--check" in sys.argv[1:]:
        stale = [
            str(path.relative_to(ROOT))
            for path, text in pages.items()
            if not path.exists() or path.read_text("utf-8") != text
        ]
        if stale:
            print(f"{', '.join(stale)}: not current; run python tools/coming_from.py")
        return int(bool(stale))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
