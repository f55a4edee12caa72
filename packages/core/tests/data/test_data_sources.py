"""Rewards are split by `datasource`, over all ranks, and rows that do not say count nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, make_config
from rlhf_core.contract.distributed import World
from rlhf_core.data.sources import means_by_source
from rlhf_core.training.reduction import Means

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
    metrics = Run(config).train().metrics
    whole = (metrics["reward/mean/a"] + 3 * metrics["reward/mean/b"]) / 4
    assert metrics["reward/mean"] == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"micro_tokens": 100}, {"minibatches": 2}])
@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo"])
def test_what_is_learnt_from_data_is_split_too(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Each part is what a run on that source's rows alone says, and parts and rows of no source make up the whole."""
    pytest.importorskip("rlhf_algos", reason="the run is of an algorithm of rlhf-algos")

    def metrics(name: str, sources: str) -> dict[str, float]:
        rows = [{"prompt": f"{i}?", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(4)]
        rows = [row | ({} if at == "-" else {"datasource": at}) for row, at in zip(rows, "abb-", strict=True)]
        for row in rows:
            row |= {"response": row.pop("chosen")} if algorithm == "sft" else {}
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row, at in zip(rows, "abb-", strict=True) if at in sources))
        config = make_config(
            algorithm,
            model="tiny:hidden=16,layers=1",
            output=str(tmp_path / name),
            steps=1,
            batch_size=sum(at in sources for at in "abb-"),
            data={"use": "json", "path": str(path)},
            **(options if sources == "abb-" else {}),
        )
        return Run(config).train().metrics

    whole = metrics("whole", "abb-")
    learnt = {name for name in whole if name.startswith(("actor/", "reward/", "loss/")) and name.count("/") == 1}
    assert len(learnt) > 1
    assert {name for name in whole if name.endswith(("/a", "/b"))} == {f"{n}/{at}" for n in learnt for at in "ab"}
    if "minibatches" in options:
        return  # weights change between the two
    for source in "ab":
        alone = metrics(source, source)
        for name in learnt:
            assert whole[f"{name}/{source}"] == pytest.approx(alone[name], abs=1e-5), name
    rest = metrics("rest", "-")
    if algorithm != "sft":  # means over pairs
        for name in learnt:
            parts = [whole[f"{name}/a"], 2 * whole[f"{name}/b"], rest[name]]
            assert whole[name] == pytest.approx(sum(parts) / 4, abs=1e-5), name


def test_parts_of_a_loss_are_added_and_ranks_may_know_different_names() -> None:
    """Two terms on the same rows, of 2 tokens and of 1 row; another rank has rows of `mail` alone."""

    class Other(World):
        size = 2

        def gather(self, thing: Any) -> list[Any]:
            return [thing, {("loss/mail", "0")}]

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            """The first pair says that there are new names; then come the agreed ones."""
            theirs = [[1.0, 0.0], [6.0, 3.0], [0.0, 0.0], [0.0, 0.0]][: len(tensor)]
            return tensor + torch.tensor(theirs, dtype=tensor.dtype)

    means = Means()
    means.add("loss/web", 3.0, 2.0, part="0")
    means.add("loss/web", 0.25, 1.0, part="1")
    assert means.reduce(Other()) == {"loss/mail": 2.0, "loss/web": 1.75}
