"""Rewards are split by `datasource`, over all ranks, and rows that do not say count nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, make_config
from rlhf_core.data.sources import means_by_source
from rlhf_core.world import World

META: list[dict[str, Any]] = [{"datasource": "web"}, {"datasource": "book"}, {}, {"datasource": "web"}]


class Two(World):
    """This rank, and another that has rows of `web` (10 and 20) and `mail` (7)."""

    size = 2

    def __init__(self) -> None:
        self._others = iter([(0, 0), (7, 1), (30, 2)])  # book, mail, web: in the order of their names

    def gather(self, thing: Any) -> list[Any]:
        return [thing, {"web", "mail"}]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor(next(self._others), dtype=tensor.dtype)


def test_each_source_has_the_mean_of_its_rows() -> None:
    values_N = torch.tensor([1.0, 5.0, 100.0, 3.0])
    assert means_by_source("reward", values_N, META, World()) == {"reward/book": 5.0, "reward/web": 2.0}
    assert means_by_source("reward", values_N, [{}] * 4, World()) == {}


def test_ranks_add_up_and_know_of_each_others_sources() -> None:
    means = means_by_source("reward", torch.tensor([1.0, 5.0, 100.0, 3.0]), META, Two())
    assert means == {"reward/book": 5.0, "reward/mail": 7.0, "reward/web": pytest.approx(34 / 4)}


def test_a_run_logs_each_source_and_they_make_up_the_whole(tmp_path: Path) -> None:
    pytest.importorskip("rlhf_algos", reason="the run is of an algorithm of rlhf-algos")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}?", "datasource": "ab"[i > 0]}) for i in range(4)))
    config = make_config(
        "grpo",
        model="tiny",
        output=str(tmp_path / "run"),
        steps=1,
        batch_size=4,
        data={"use": "json", "path": str(path), "heldout_path": str(path)},
        reward={"use": "length", "target": 3},
        evaluator=["heldout"],
        sampling={"n": 2, "max_new_tokens": 8},
    )
    metrics = Run(config).train()
    whole = (metrics["reward/mean/a"] + 3 * metrics["reward/mean/b"]) / 4
    assert metrics["reward/mean"] == pytest.approx(whole, abs=1e-6)
