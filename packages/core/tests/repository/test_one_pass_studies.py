"""`benchmarks/one_pass_rm.py` and the studies on real features run at tiny sizes, and their numbers are what they say."""

from __future__ import annotations

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rlhf_algos")

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"


@pytest.fixture(scope="module")
def synthetic() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "one_pass_rm.py"))


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "one_pass_hh.py"))


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Features of 80 pairs of which one direction is preferred."""
    from safetensors.torch import save_file

    noise = torch.Generator().manual_seed(0)
    features_RH = torch.randn(160, 4, generator=noise)
    features_RH[0::2, 0] += 2.0
    path = tmp_path / "features.safetensors"
    save_file({"features_RH": features_RH, "index_NK": torch.arange(160).reshape(80, 2)}, path)
    return path


def test_one_pass_is_near_the_refit_and_its_state_stays_as_it_is(synthetic: dict[str, Any]) -> None:
    curves = synthetic["run_stream"](4, 800, 0)
    omd, mle = curves["omd"], curves["mle"]
    assert omd.pairs == mle.pairs == [50, 100, 200, 400, 600, 800]
    assert omd.errors[-1] / mle.errors[-1] == pytest.approx(1, abs=0.15)
    assert omd.errors[-1] < 0.6 * omd.errors[0]
    assert len(set(omd.state_bytes)) == 1
    assert mle.state_bytes[-1] > 15 * mle.state_bytes[0]
    assert all(seconds > 0 for curve in curves.values() for seconds in curve.seconds)
    assert synthetic["table_row"](4, "omd", curves).split()[:3] == ["4", "800", "omd"]


def test_regret_is_printed_for_every_selector(synthetic: dict[str, Any], capsys: Any) -> None:
    synthetic["print_regrets"](16, seeds=2)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["regret", *synthetic["SELECTORS"]]
    history = synthetic["regrets"]("random_pair", 40, 0)
    assert len(history) == 40
    assert history == sorted(history)


def test_every_split_of_the_pairs_is_another_one_and_accuracy_is_counted(study: dict[str, Any], features: Path) -> None:
    one, other = (study["split"](features, seed, 20) for seed in (0, 1))
    assert [len(part) for part in one] == [60, 20]
    assert not torch.equal(one[0], other[0])
    assert float(torch.cat(one).square().sum(1).mean()) == pytest.approx(1.0)
    theta_D = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    accuracy, loss = study["measure"](theta_D, torch.cat(one))
    assert accuracy == pytest.approx(float((torch.cat(one)[:, 0] > 0).double().mean()))
    assert 0 < loss < 0.7
    assert study["measure"](0 * theta_D, one[1])[0] == 0.5
    assert study["interval"]([1.0, 2.0, 3.0, 4.0, 5.0], 2) == "3.00 ± 1.96"  # 2.776 * 1.5811 / sqrt(5)


@pytest.mark.parametrize("name", ["passive", "active", "deploy"])
def test_each_study_prints_its_table(name: str, study: dict[str, Any], features: Path, capsys: Any) -> None:
    options = Namespace(features=features, user=features, seeds=3, heldout=16, rounds=20)
    study[name](options)
    printed = capsys.readouterr().out
    rows = {"passive": study["makers"](4, 1, 1.0), "active": study["SCORES"], "deploy": study["SELECTORS"]}[name]
    assert all(f"| `{row}` | " in printed for row in rows)
    assert "nan" not in printed


def test_features_are_those_of_the_model_and_each_text_is_read_once(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from safetensors.torch import load_file

    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"chosen": f"\n\nHuman: hi\n\nAssistant: {a}", "rejected": "\n\nHuman: hi\n\nAssistant: no"}) + "\n"
                for a in ("yes", "a much longer answer"))
    )  # fmt: skip
    script = str(BENCHMARKS / "one_pass_features.py")
    for budget in ("1", "2048"):
        words = [
            script,
            str(tmp_path / "pairs.jsonl"),
            str(tmp_path / f"{budget}.st"),
            "--model",
            "tiny",
            "--budget",
            budget,
        ]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(script, run_name="__main__")
    assert "3 texts" in capsys.readouterr().out
    single, batched = (load_file(tmp_path / f"{budget}.st") for budget in ("1", "2048"))
    assert single["index_NK"].tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(single["features_RH"], batched["features_RH"], atol=1e-4, rtol=1e-4)
    assert len(single["features_RH"]) == 3
