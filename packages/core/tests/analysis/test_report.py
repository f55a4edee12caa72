"""A report is one page that shows a run as it was, needs no network, and cannot be misused by what models wrote."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.analysis.chart import Line, chart, round_ticks, tick_labels
from rlhf_core.analysis.style import smooth
from rlhf_core.cli import main

ATTACK = "</p><script>alert(1)</script><img src=x onerror=alert(1)>"


def write_run(folder: Path, steps: int = 12, **more: float) -> Path:
    """Write the files of a run with a reward of step / 10."""
    folder.mkdir(parents=True)
    rows = [
        {
            "step": n,
            "reward/mean": n / 10,
            "kl/mean": 0.01 * n,
            "loss/actor": -0.1,
            "time/step": 2.0,
            "time/rollout": 1.5,
            **more,
        }
        for n in range(1, steps + 1)
    ]
    measured = [
        {"step": 0, "eval/heldout/reward": 0.25, "eval/heldout/reward_se": 0.125},
        {"step": steps, "eval/heldout/reward": 0.75, "eval/heldout/reward_se": 0.0625},
    ]
    answers = [
        {"step": step, "prompt": "p", "question": "Why?", "completion": f"answer {step} {ATTACK}", "reward": step / 10}
        for step in (0, steps)
    ]
    for name, lines in (("metrics", rows), ("evaluation-metrics", measured), ("evaluations", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(f'steps = {steps}\nnote = "<b>"\n')
    return folder


class Reader(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[Reader, str]:
    """Write the report and read it."""
    assert main(["report", str(folder), *flags]) == 0
    path = Path(capsys.readouterr().out.strip())
    reader, text = Reader(), path.read_text()
    reader.feed(text)
    return reader, text


def test_a_report_shows_the_run_in_words_and_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, _ = report(write_run(tmp_path / "run"), capsys)
    for words in ("Reward", "nats per token", "Why?", "answer 0", "answer 12", "reward +1.20", 'note = "<b>"'):
        assert words in reader.text, words
    assert "0.250 ± 0.125" in reader.text and "0.750 ± 0.062" in reader.text and "+0.500" in reader.text
    assert "sampling18.0 s75%" in reader.text and "other6.0 s25%" in reader.text


def test_what_a_model_wrote_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, text = report(write_run(tmp_path / "run"), capsys)
    assert ATTACK in reader.text and ATTACK not in text
    assert [tag for tag, _ in reader.tags].count("script") == 1 and not [tag for tag, _ in reader.tags if tag == "img"]


def test_a_report_asks_nothing_of_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, text = report(write_run(tmp_path / "run"), capsys)
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace(ATTACK, ""))
    assert not [1 for _, attributes in reader.tags if {"src", "href", "srcset"} & set(attributes)]


def test_curves_hold_the_numbers_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, _ = report(write_run(tmp_path / "run"), capsys)
    points = [dict(attributes)["data-points"] or "" for tag, attributes in reader.tags if tag == "g"]
    rewards = [point.split(",")[2:] for point in points[0].split(";")]
    assert rewards == [[f"{n}", f"{n / 10:.4g}"] for n in range(1, 13)]


def test_the_page_of_a_long_run_is_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {f"{name}/actor": 1.0 for name in ("grad_norm", "lr", "loss")}
    _, text = report(write_run(tmp_path / "run", 500, **more), capsys)
    assert len(text.encode()) < 500 * 1024


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl"])
def test_a_report_replaces_reports_only(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("mine")
    assert main(["report", str(folder), "--output", str(folder / name)]) == 2
    assert f"{name} exists and is not a report" in capsys.readouterr().err
    assert (folder / "report.html").read_text() == "mine"
    report(folder, capsys, "--output", str(tmp_path / "mine.html"))
    report(folder, capsys, "--output", str(tmp_path / "mine.html"))


@pytest.mark.parametrize("content", ["", "{", '{"step": "one"}\n', "[1]\n"])
def test_a_folder_without_a_run_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "has nothing to report yet" in capsys.readouterr().err


def test_a_sweep_is_reported_by_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rewards of two seeds, 0.2 apart: Student's interval of two values is 12.7 standard errors of 0.1."""
    file = tmp_path / "study.toml"
    file.write_text(f'output = "{tmp_path / "out"}"\nseeds = [0, 1]\n[variants.one]\n[variants.two]\n')
    for method, base in (("one", 1.0), ("two", 2.0)):
        for seed in (0, 1):
            folder = write_run(tmp_path / "out" / f"{method}-seed{seed}")
            rows = [{"step": n, "reward/mean": base + 0.2 * seed} for n in (1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader, _ = report(file, capsys)
    assert "1.100 ± 1.271" in reader.text and "2.100 ± 1.271" in reader.text
    assert [str(a["data-label"]) for tag, a in reader.tags if tag == "g"][:2] == ["one", "two"]


def test_a_recipe_is_reported_by_iteration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for t in range(11):
        folder = tmp_path / "steps" / f"t{t}-score"
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps({"reward": t / 2, "reward_se": 0.1}))
        outputs = {"scores": {"kind": "metrics", "path": "scores.json", "xxh3": "0"}}
        (folder / "step.json").write_text(json.dumps({"made_of": {}, "outputs": outputs, "seconds": 3.0}))
    reader, _ = report(tmp_path, capsys)
    (points,) = [str(attributes["data-points"]) for tag, attributes in reader.tags if tag == "g"]
    assert [point.split(",")[2:] for point in points.split(";")] == [[f"{t}", f"{t / 2:.4g}"] for t in range(11)]
    assert reader.text.index("t2-score") < reader.text.index("t10-score")


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.booleans())
def test_ticks_are_round_and_cover_the_values(low: float, span: float, whole: bool) -> None:
    ticks = round_ticks(low, low + span, whole)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 9 and all(b - a == pytest.approx(step) for a, b in pairwise(ticks))
    room = 2e-4 * step + 1e-9 * abs(low) + 1e-30
    assert ticks[0] <= low + room and low + span <= ticks[-1] + room
    if span > 1e-6 * max(1e-20, abs(low)):
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert any(mantissa == pytest.approx(each) for each in (1, 2, 2.5, 5))
    if whole and span > 1:
        assert all(tick == pytest.approx(round(tick)) for tick in ticks)


@pytest.mark.parametrize(("low", "high", "ticks"), [(1, 12, [0, 5, 10, 15]), (0, 0, [0, 1]), (3, 3, [1, 2, 3, 4, 5])])
def test_ticks_of_steps_are_whole(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high, whole=True) == ticks


def test_a_rounding_error_below_zero_needs_no_tick() -> None:
    assert round_ticks(-1e-9, 0.4)[0] == 0


def test_no_two_ticks_of_an_axis_read_alike() -> None:
    assert tick_labels([1.8e-7, 1.825e-7, 1.85e-7]) == ["1.8e-7", "1.82e-7", "1.85e-7"]
    assert tick_labels([12345.1, 12345.2]) == ["12345.1", "12345.2"]
    assert tick_labels([0.0, 5.0, 10.0]) == ["0", "5", "10"]


def test_smoothing_keeps_a_constant_and_follows_a_change() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])  # (0.5 · 0 + 1 · 1) / 1.5


@pytest.mark.parametrize("points", [1, 3, 40])
def test_a_chart_is_valid_and_stays_in_its_frame(points: int) -> None:
    x = [float(n) for n in range(points)]
    y = [math.sin(n) for n in range(points)]
    line: Any = Line("a & b", x, y, [v - 1 for v in y], [v + 1 for v in y])
    root = ElementTree.fromstring(chart("<title>", "step", "nats", [line, Line("two", x, y, color=1)]))
    places = [float(v) for each in root.iter() for v in re.split(r"[ ,]", each.get("points", "")) if v]
    assert places and all(0 <= value <= 420 for value in places)
    assert root.get("aria-label") == "<title>"
