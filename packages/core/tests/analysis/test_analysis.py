"""Statistics against closed forms and brute force; curves and frontiers of a sweep whose runs were written by hand."""

from __future__ import annotations

import csv
import json
import math
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from rlhf_core.analysis.stats import bootstrap_interval, cvar, pareto, share_below, t_interval, t_quantile
from rlhf_core.analysis.tables import read_columns, write_parquet
from rlhf_core.cli.app import main
from rlhf_core.errors import DataError, UsageError

TEN = (5, -3, 2, -7, 0.5, -1, 4, -6.5, 1, 3)


@pytest.mark.parametrize(("share", "expected"), [(0.1, -7), (0.25, -6.75), (0.001, -7), (1.0, -0.2)])
def test_cvar_is_the_mean_of_the_worst(share, expected):
    assert cvar(TEN, share) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "share", "worst"), [(50_000, 1e-4, 5), (10_000, 3e-3, 30), (10, 0.3, 3)])
def test_cvar_counts_as_many_as_the_share_says(n, share, worst):
    assert cvar(np.arange(n), share) == pytest.approx((worst - 1) / 2)


def test_cvar_of_many_normal_rewards_is_the_closed_form():
    """E[r | r < quantile] = -density(quantile) / share, for 2e5 samples within five standard errors."""
    share, normal = 0.05, NormalDist()
    drawn = np.random.default_rng(0).standard_normal(200_000)
    assert cvar(drawn, share) == pytest.approx(-normal.pdf(normal.inv_cdf(share)) / share, abs=0.02)


def test_a_reward_at_the_threshold_is_not_bad():
    assert share_below([-5.0, -5.0001, 3.0, -6.0], -5.0) == 0.5


def test_students_interval_has_the_published_width():
    mean, half = t_interval([1, 2, 3, 4, 5])
    assert (mean, half) == (3.0, pytest.approx(1.9632431615, abs=1e-9))
    assert t_interval([2.5]) == (2.5, 0.0)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062047364), (2, 4.3026527297), (9, 2.2621571628), (30, 2.0422724563)]
)
def test_students_quantile_is_that_of_the_tables(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-8)


def test_bootstrap_intervals_are_reproducible_inside_the_data_and_empty_for_constants():
    values = [3.0, 1.0, 4.1, 1.7, 5.0]
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([7.0]) == (7.0, 7.0)
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert 1.0 <= low < sum(values) / 5 < high <= 5.0


def test_bootstrap_intervals_cover_the_mean_about_as_often_as_they_say():
    """40 values of a normal, 400 times: the percentile interval is a little narrow, and 5 standard errors are 0.06."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.standard_normal(40), seed=k, draws=1000) for k in range(400)]
    covered = sum(low < 0 < high for low, high in intervals) / 400
    assert 0.87 < covered < 0.99


def test_the_pareto_set_is_what_brute_force_says():
    points = [(float(a), float(b)) for a, b in np.random.default_rng(1).integers(0, 6, size=(40, 2))]
    for point, kept in zip(points, pareto(points), strict=True):
        rivals = [q for q in points if q[0] >= point[0] and q[1] >= point[1]]
        assert kept == all(q == point for q in rivals)
    assert pareto([(1, 1), (1, 1), (0, 2), (1, 0)]) == [True, True, True, False]


# ----------------------------------------------------------------------------------------------------------------------
# commands
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two methods with three finished seeds each: b has higher returns, and more bad outputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(
        "output = 'out'\nseeds = [0, 1, 2]\n[variants.a]\n[variants.b]\n[variants.c]\nskip = true\n"
    )
    for (m, method), seed in product(enumerate("ab"), range(3)):
        folder = tmp_path / "out" / f"{method}-seed{seed}"
        folder.mkdir(parents=True)
        rows = [
            {"step": step, "samples": 10 * (m + 1), "reward/mean": step + seed, "kl/coef": 0.5, "kl/completion": 2.0}
            for step in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluations = [{"step": step, "eval/bad/logprob": -step - m - seed} for step in (0, 2)]
        (folder / "evaluation-metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
        rewards = [-6.0] * (1 + 2 * m + seed) + [float(m)] * (99 - 2 * m - seed)
        attacks = [i < 10 * (m + 1) for i in range(100)]
        write_parquet(
            folder / "heldout.parquet", {"reward": rewards, "return": [m + 1.0] * 100, "attack_success": attacks}
        )
        (folder / "sweep-status.json").write_text('{"exit": 0, "seconds": 1.0}')
    return tmp_path / "s.toml"


def table(path: str) -> list[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_curves_are_means_over_seeds_against_samples_with_students_band(sweep):
    assert main(["curves", str(sweep), "--metrics", "eval/bad/logprob", "return", "--formats", "svg", "png"]) == 0
    rows = table("curves.csv")
    assert [(row["metric"], row["method"], float(row["samples"])) for row in rows][:4] == [
        ("eval/bad/logprob", "a", 0.0), ("eval/bad/logprob", "a", 20.0), ("eval/bad/logprob", "b", 0.0),
        ("eval/bad/logprob", "b", 40.0),
    ]  # fmt: skip
    assert [float(row["mean"]) for row in rows] == [-1.0, -3.0, -2.0, -4.0, 1.0, 2.0, 1.0, 2.0]
    assert float(rows[0]["high"]) == pytest.approx(-1 + 4.3026527297 / math.sqrt(3), abs=1e-8)
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    first = Path("curves.svg").read_bytes()
    assert main(["curves", str(sweep), "--metrics", "eval/bad/logprob", "return"]) == 0
    assert Path("curves.svg").read_bytes() == first, "the same numbers give the same file"


def test_the_frontier_is_read_from_tables_with_thresholds_applied_now(sweep):
    assert main(["frontier", str(sweep), "--threshold", "-5", "--formats", "pdf"]) == 0
    a, b = table("frontier.csv")
    assert (a["method"], a["seeds"], float(a["return"]), float(a["bad"])) == ("a", "3", 1.0, pytest.approx(0.02))
    assert float(b["bad"]) == pytest.approx(0.04)
    assert (a["pareto"], b["pareto"]) == ("True", "True")
    assert float(a["bad_low"]) == pytest.approx(0.01)
    assert Path("frontier.pdf").read_bytes().startswith(b"%PDF")
    assert main(["frontier", str(sweep), "--y", "cvar", "--share", "0.02", "--x", "reward", "--formats"]) == 0
    a, b = table("frontier.csv")
    assert float(a["cvar"]) == pytest.approx((-3 - 6 - 6) / 3)
    assert main(["frontier", str(sweep), "--y", "attack"]) == 0
    a, b = table("frontier.csv")
    assert [float(row["attack"]) for row in (a, b)] == [pytest.approx(0.1), pytest.approx(0.2)]


def test_the_frontier_of_attacks_counts_those_with_one_bad_answer(sweep, capsys):
    """Two goals and two attack seeds: one attack of method a has an answer below the threshold, three of method b have."""
    assert main(["frontier", str(sweep), "--gcg", "--formats"]) == 2
    assert "write them with --evaluator gcg" in capsys.readouterr().err
    for method, count in (("a", 1), ("b", 3)):
        for seed, step in product(range(3), (5, 10)):
            folder = sweep.parent / "out" / f"{method}-seed{seed}" / "gcg" / f"step-{step}"
            folder.mkdir(parents=True)
            bad = [(0, 0), (0, 1), (1, 1)][:count] if step == 10 else []
            rows = [
                {
                    "goal": goal,
                    "seed": number,
                    "attacked": True,
                    "reward": -6.0 if (goal, number) in bad and k == 1 else -5.0,
                }
                for goal, number, k in product(range(2), range(2), range(3))
            ]
            rows += [{"goal": 0, "seed": None, "attacked": False, "reward": -9.0}]
            rows += [{"goal": 1, "seed": 0, "attacked": True, "reward": None}]
            (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["frontier", str(sweep), "--gcg", "--threshold", "-5", "--formats", "svg"]) == 0
    a, b = table("frontier.csv")
    assert [float(row["attack"]) for row in (a, b)] == [0.25, 0.75]
    assert [float(row["return"]) for row in (a, b)] == [1.0, 2.0]
    assert "attacks with a reward" in Path("frontier.svg").read_text()
    assert main(["frontier", str(sweep), "--gcg", "--threshold", "-7", "--formats"]) == 0
    assert [float(row["attack"]) for row in table("frontier.csv")] == [0.0, 0.0]


def test_the_frontier_of_attacks_takes_the_threshold_that_the_evaluations_have(sweep, capsys):
    for folder in sweep.parent.glob("out/*"):
        (folder / "gcg/step-3").mkdir(parents=True)
        rows = [{"goal": 0, "seed": k, "attacked": True, "reward": float(k)} for k in range(4)]
        (folder / "gcg/step-3/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["frontier", str(sweep), "--gcg", "--formats"]) == 2
    assert "thresholds none; pass --threshold" in capsys.readouterr().err
    for path in sweep.parent.glob("out/*/gcg/step-3"):
        (path / "settings.json").write_text('{"threshold": 2.5}')
    assert main(["frontier", str(sweep), "--gcg", "--formats"]) == 0
    assert [(row["attack"], row["threshold"]) for row in table("frontier.csv")] == [("0.75", "2.5"), ("0.75", "2.5")]
    (sweep.parent / "out/a-seed0/gcg/step-3/settings.json").write_text('{"threshold": 0.5}')
    assert main(["frontier", str(sweep), "--gcg", "--formats"]) == 2
    assert "thresholds 0.5, 2.5; pass --threshold" in capsys.readouterr().err


def test_what_is_missing_is_said_in_one_line(sweep, capsys):
    assert main(["curves", str(sweep), "--metrics", "nothing"]) == 2
    assert "no run of" in capsys.readouterr().err
    assert main(["frontier", str(sweep), "--table", "other.parquet"]) == 2
    assert "heldout_table" in capsys.readouterr().err
    with pytest.raises(DataError, match="no column 'cost'"):
        read_columns(sweep.parent / "out" / "a-seed0" / "heldout.parquet", ["cost"])
    (sweep.parent / "lines.jsonl").write_text('{"reward": 1.5}\n{"reward": -2}\n')
    assert read_columns(sweep.parent / "lines.jsonl", ["reward"]) == {"reward": [1.5, -2]}
    with pytest.raises(UsageError):
        read_columns(sweep.parent / "none.parquet", ["reward"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"reward": 1}\n\n{"reward": 2', "lines.jsonl:3: expected one JSON object; remove the damaged line"),
        (b'{"reward": 1}\n[1]\n', "lines.jsonl:2: expected one JSON object"),
        (b'{"reward": 1}\n\xff\n', "lines.jsonl:2: expected one JSON object"),
        (b"[" * 100_000, "lines.jsonl:1: expected one JSON object"),
        (b'{"reward": 1}\n{"cost": 1}\n', "lines.jsonl:2 has no column 'reward'"),
        (b"\n", "lines.jsonl has no rows"),
    ],
)
def test_a_damaged_table_of_json_lines_is_one_line_that_names_its_place(content, message, tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_columns(tmp_path / "lines.jsonl", ["reward"])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=r"table.parquet cannot be read: ") as raised:
        read_columns(tmp_path / "table.parquet", ["reward"])
    assert "\n" not in str(raised.value)
