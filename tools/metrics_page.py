"""Writes docs/metrics.md: every metric that the packages of this repository document, by package.

python tools/metrics_page.py          writes the page
python tools/metrics_page.py --check  fails if it is not current (a test runs this)
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs/metrics.md"

HEAD = """# Metrics

This page has every number that a run logs, in `metrics.jsonl` and in trackers, under its one name. `tools/metrics_page.py`
writes it from the documentation of the packages: do not edit. A test runs tiny jobs of every algorithm and fails on a name
that is not here.

`<role>` is a trained role (`actor`, `critic`, …), and `<source>` a role that is sampled in addition to the first one
(`proposal`). In a name such as `[<source>/]completion/length`, the part in `[]` is left out for the first sampled role.
`<datasource>` is the origin of a row of data, taken from the row's column `datasource`. With this column, some metrics are also
logged for each origin. For samples and evaluations, these are the rewards. For rows that are trained on directly, these are the
loss and all metrics of the loss (`actor/nll/gsm8k`, or `reward/accuracy/web` of the trained role `reward`).

Means are over all ranks, tokens and completions of the step. Metrics that begin with `time/`, `speed/` or `memory/` are
measured by the first process and differ between two runs. On a CPU all other numbers are the same for the same
configuration and seed; [reliability.md](reliability.md) has the conditions and exceptions.

**A plugin's own metrics.** A loss returns `Metric`s (logged as `<role>/<name>`), and an advantage plain numbers (under its
own names). A reward returns numbers per completion (`reward/<name>`), and an evaluator numbers (`eval/<name>`). The plugin
documents them through one hook as `UNIT: MEANING`. `rlhf-run plugins --kind metric` lists them with all others:

```python
from collections.abc import Mapping

from rlhf_core import hookimpl


@hookimpl
def rlhf_metrics() -> Mapping[str, str]:
    return {"reward/exclamations": "marks: exclamation marks of a completion, mean"}
```
"""


def documented() -> Iterator[tuple[str, Mapping[str, str]]]:
    """(distribution, its metrics) of every package that has some, core first."""
    files = sorted(ROOT.glob("packages/*/pyproject.toml"), key=lambda file: (file.parent.name != "core", file))
    for file in files:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        sys.path.insert(0, str(file.parent / "src"))
        package = project["name"].replace("-", "_")
        hook = getattr(import_module(f"{package}.plugin"), "rlhf_metrics", None)
        if hook is not None:
            yield project["name"], hook()


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for distribution, metrics in documented():
        parts += [f"\n## {distribution}\n\n| name | unit | meaning |\n|---|---|---|\n"]
        for name, said in metrics.items():
            unit, _, meaning = said.partition(": ")
            parts += [f"| `{name}` | {unit} | {meaning} |\n".replace("||", r"\|\|")]
    return "".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv and text() != TARGET.read_text(encoding="utf-8"):
        sys.exit("docs/metrics.md is not current: run python tools/metrics_page.py")
    if "--check" not in sys.argv:
        TARGET.write_text(text(), encoding="utf-8")
