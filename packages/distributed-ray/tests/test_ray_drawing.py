"""The drawing of a layout: who sits where, and memory that adds up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_distributed_ray.drawing import GIB, WorkerMemory, draw_layout
from rlhf_distributed_ray.placement import lay_out
from rlhf_distributed_ray.places import parse_places

HELD = {
    "actor": WorkerMemory(30 * GIB, 20 * GIB),
    "critic": WorkerMemory(10 * GIB, 25 * GIB),
    "reference": WorkerMemory(5 * GIB, 1 * GIB),
    "engine": WorkerMemory(15 * GIB, 0),
}


def drawn(text: str) -> str:
    return draw_layout(
        lay_out(parse_places(text, ["actor", "critic", "reference"], "actor", "PACK", 1), 0.25, True), HELD
    )


def test_a_drawing_has_ranks_and_the_memory_of_each_bundle() -> None:
    """A bundle holds everyone idle, and what one of them adds at work: 30 + 5 + 15 + 20, and 10 + 25."""
    assert drawn("actor+reference+engine@2, critic@1:SPREAD").splitlines() == [
        "place 1: PACK, 2 bundles of 0.75 CPU, 1 GPU",
        "bundle         0      1  GiB idle  at most",
        "actor          0      1     30.00    50.00",
        "reference      0      1      5.00     6.00",
        "engine         0      1     15.00    15.00",
        "GiB        70.00  70.00",
        "",
        "place 2: SPREAD, 1 bundle of 0.25 CPU, 1 GPU",
        "bundle      0  GiB idle  at most",
        "critic      0     10.00    35.00",
        "GiB     35.00",
    ]


def test_nodes_are_places_of_their_own_and_wide_ones_are_cut() -> None:
    wide = drawn("actor@2x2,critic+reference@20").splitlines()
    assert wide[0] == wide[6].replace("2:", "1:") == "place 1: STRICT_PACK, 2 bundles of 0.5 CPU, 1 GPU"
    assert wide[8].split()[:3] == ["actor", "2", "3"], "ranks of the second node"
    assert wide[12] == "place 3: PACK, 20 bundles of 0.5 CPU, 1 GPU, 16 of them shown"
    assert wide[13].split()[1:17] == list(map(str, range(16)))


def test_the_memory_is_what_plan_says_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The independent source: the forecast of a run whose roles have as many devices."""
    pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
    pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")
    import ray

    from rlhf_core import make_config
    from rlhf_core.cli import main
    from rlhf_core.forecast.forecast import forecast
    from rlhf_core.forecast.options import PlanOptions

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    model = "tiny:hidden=256,layers=4,vocab=16384"
    words = ["ppo", "--model", model, "--reward", "length", "--batch-size", "4", "--launcher", "ray"]
    words += ["--launcher.place", "actor+reference@2,critic@1", "--launcher.show-placement", "True"]
    monkeypatch.setattr(sys, "argv", ["rlhf-run", *words])
    assert main([*words, "--dry-run", "--output", str(tmp_path / "run")]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().err.splitlines() if line.strip()}
    for role, workers in (("actor", 2), ("reference", 2), ("critic", 1)):
        config = make_config("ppo", model=model, reward="length", batch_size=4)
        memory = forecast(config, PlanOptions(gpus=workers)).roles[role].memory
        work = memory.inference if role == "reference" else memory.training
        assert lines[role][-2:] == [f"{memory.resident / GIB:.2f}", f"{(memory.resident + work) / GIB:.2f}"]
    assert float(lines["actor"][-1]) > 0 and not (tmp_path / "run").exists()
