"""Announcements of slow work before the first step, in the order in which it happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.testing import tiny_run


def test_loading_and_the_first_evaluation_are_announced_before_they_begin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_run(tmp_path / "base", model="tiny:hidden=16,layers=1", steps=0).train()
    model = str(tmp_path / "base" / "model")
    caplog.clear()
    tiny_run(tmp_path / "run", model=model, steps=1, evaluator="heldout").train()
    said = [record.getMessage() for record in caplog.records if record.name == "rlhf.progress"]
    beginnings = [f"loading {model} (actor)", "evaluating heldout before step 1", "step 1/1"]
    places = [next((i for i, line in enumerate(said) if line.startswith(each)), -1) for each in beginnings]
    assert -1 not in places and places == sorted(places), said
