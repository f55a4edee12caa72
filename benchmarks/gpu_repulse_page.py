"""The page and the figure of `gpu_repulse.py`: means over seeds with 95 % t-intervals, at shares of the budget of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "interval_at", "page"]

SHARES = (0.12, 0.4, 1.0)
"""Shares of the budget of samples that have a column; of the paper's 250,000 they are 30,000, 100,000 and all."""

TITLES = {
    "reinforce": "REINFORCE",
    "repulse": "RePULSe",
    "base": "`proposal base`",
    "transformed": "REINFORCE, r - e^-r",
    "ppo": "PPO",
}

Record = Mapping[str, Any]


def interval_at(records: Iterable[Record], series: str, samples: float) -> tuple[float, float, int] | None:
    """Return mean, half width and number of the runs that drew `samples`, at their last point until then; None if none did."""
    from rlhf_core.analysis.stats import t_interval

    values = []
    for record in records:
        points = record[series]
        if points and points[-1][0] >= 0.99 * samples:  # steps are whole, so a budget may be missed by one
            values.append([y for x, y in points if x <= 1.01 * samples][-1])
    return (*t_interval(values), len(values)) if values else None


def page(records: Sequence[Record], facts: Mapping[str, Any], drawn: bool) -> str:
    """Return the page as Markdown."""
    budgets = [share * facts["samples"] for share in SHARES]
    methods = list(dict.fromkeys(record["method"] for record in records))
    methods.sort(key=lambda method: [*TITLES, method].index(method))
    lines = [
        f"# RePULSe's toy on {facts['device']}",
        "",
        (
            f"{facts['model']}, outputs of two tokens, {facts['n']} samples per step of each model that is sampled, "
            f"{facts['samples']:,} samples per run. {facts['finished']} of {facts['planned']} runs are finished. "
            f"This lending took {facts['seconds']:.0f} s with up to {facts['jobs']} runs at a time."
        ),
        "",
        (
            "Exact log P(bad) in nats (lower is better) and mean reward of the last step: means over seeds ± half widths of "
            "95 % t-intervals, seeds in brackets. One seed has no interval. Runs that were cut count as far as they came."
        ),
        "",
        "| method | " + " | ".join(f"log P(bad) at {budget:,.0f} samples" for budget in budgets) + " | last reward |",
        "|---|" + "---|" * (len(budgets) + 1),
    ]
    for method in methods:
        own = [record for record in records if record["method"] == method]
        cells = [cell(interval_at(own, "logprob", budget), 1) for budget in budgets]
        lines.append(
            f"| {TITLES.get(method, method)} | {' | '.join(cells)} | {cell(interval_at(own, 'reward', budgets[-1]), 3)} |"
        )
    if drawn:
        lines += [
            "",
            "![log P(bad) in nats and reward against samples, means over seeds with t-intervals](repulse.svg)",
        ]
    lines += ["", "| run | state | samples | seconds | device | last log P(bad) |", "|---|---|---|---|---|---|"]
    for record in records:
        state = "finished" if record["finished"] else "cut" if record["cut"] else "failed"
        last = record["logprob"][-1] if record["logprob"] else ["", ""]
        reached = record["reward"][-1][0] if record["reward"] else 0
        lines.append(
            f"| {record['run']} | {state} | {reached:,.0f} | {record['seconds']:.0f} | {record['device']} | {last[1]} |"
        )
    for record in records:
        if record["error"]:
            lines += ["", f"{record['run']} failed:", "", "```text", record["error"].strip(), "```"]
    return "\n".join(lines) + "\n"


def cell(found: tuple[float, float, int] | None, digits: int) -> str:
    """Return one cell of the table."""
    if found is None:
        return ""
    mean, half, seeds = found
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if seeds > 1 else "") + f" ({seeds})"


def draw(records: Sequence[Record], stem: Path) -> bool:
    """Write the figure beside the page; False where matplotlib or the numbers are missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    from rlhf_core.analysis.figures import figure

    if not any(record["logprob"] for record in records):
        return False
    panels = {"logprob": "exact log P(bad), nats", "reward": "mean reward of a step"}
    with figure(stem, ("svg",), len(panels)) as axes:
        for axis, (series, label) in zip(axes, panels.items(), strict=True):
            for k, method in enumerate(TITLES):
                own = [record for record in records if record["method"] == method and record[series]]
                curve(axis, own, series, f"C{k}", TITLES[method].strip("`"))
            axis.set_xlabel("samples drawn, of all models")
            axis.set_ylabel(label)
        axes[0].legend()
    return True


def curve(axis: Any, records: Sequence[Record], series: str, color: str, label: str) -> None:
    """Draw a method's mean and interval at the points that all its runs have come to; rewards are averaged over 10 steps."""
    if not records:
        return
    width = 10 if series == "reward" else 1
    shortest = min(records, key=lambda record: len(record[series]))[series]
    rows = []
    for i in range(width - 1, len(shortest), width):
        runs = [[y for _, y in record[series][i - width + 1 : i + 1]] for record in records]
        rows.append((shortest[i][0], [sum(values) / width for values in runs]))
    from rlhf_core.analysis.stats import t_interval

    x = [at for at, _ in rows]
    found = [t_interval(values) for _, values in rows]
    axis.plot(x, [mean for mean, _ in found], color=color, label=label)
    low, high = [mean - half for mean, half in found], [mean + half for mean, half in found]
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
