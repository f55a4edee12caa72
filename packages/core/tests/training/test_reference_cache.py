"""Cached outputs of frozen roles: equal numbers, computed once, and never confused between models or rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.distributed import World
from rlhf_core.contract.options import ModelOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.errors import UsageError
from rlhf_core.testing import tiny_rollouts
from rlhf_core.training.reference_cache import CachedRole

OUTPUTS = frozenset({"logprobs_NT", "scores_N"})


class Frozen:
    """A role whose outputs are sums of tokens; it counts the rows that it is asked about."""

    name = "reference"

    def __init__(self, model: str = "tiny", temperature: float = 1.0) -> None:
        self.spec = RoleSpec("reference", ModelOptions(model=model), OUTPUTS, temperature=temperature)
        self.rows = 0

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, torch.Tensor]:
        self.rows += len(batch)
        first_N1 = batch.prompt_NL[:, :1].float()
        inside = torch.arange(batch.tokens_NT.shape[1]) < batch.lengths_N[:, None]
        logprobs_NT = torch.where(inside, (batch.tokens_NT.float().cumsum(1) + first_N1) / 7, 0.0)
        return {"logprobs_NT": logprobs_NT, "scores_N": logprobs_NT.sum(1)}


def cached(folder: Path, **options: Any) -> tuple[CachedRole, Frozen]:
    role: Any = Frozen(**options)
    return CachedRole(role, str(folder), World()), role


def test_the_same_question_about_another_picture_is_another_row(tmp_path: Path) -> None:
    batch, (role, inner) = tiny_rollouts().rows([0, 0]), cached(tmp_path)
    red, blue = ({"pixel_values": torch.full((1, 3, 2, 2), value)} for value in (0.0, 1.0))
    for images, asked in (([red, red], 2), ([red, blue], 3), ([blue, red], 3)):
        role.infer(replace(batch, images=images), OUTPUTS)
        assert inner.rows == asked


def test_a_row_is_asked_about_once_and_the_numbers_are_the_same_in_any_company(tmp_path: Path) -> None:
    batch, (role, inner) = tiny_rollouts(), cached(tmp_path)
    expected = Frozen().infer(batch, OUTPUTS)
    first = role.infer(batch, OUTPUTS)
    for i in ([0, 1, 2, 3, 4, 5, 6, 7], [6, 2, 3]):
        again = role.infer(batch.rows(i), OUTPUTS)
        for name in OUTPUTS:
            width = again[name].shape[1:] and again[name].shape[1]
            rows = expected[name][i][:, :width] if width else expected[name][i]
            assert torch.equal(again[name], rows)
    assert all(torch.equal(first[name], expected[name]) for name in OUTPUTS)
    assert inner.rows == 8
    other, inner = cached(tmp_path)  # another run
    assert torch.equal(other.infer(batch, OUTPUTS)["scores_N"], expected["scores_N"]) and inner.rows == 0


def test_only_what_is_not_known_is_computed(tmp_path: Path) -> None:
    batch, (role, inner) = tiny_rollouts(), cached(tmp_path)
    role.infer(batch.rows([0, 3]), OUTPUTS)
    role.infer(batch, OUTPUTS)
    assert inner.rows == 2 + 6
    assert role.name == "reference", "everything else is the role's own"


def test_another_model_temperature_prompt_or_token_is_another_row(tmp_path: Path) -> None:
    batch = tiny_rollouts()
    cached(tmp_path)[0].infer(batch, OUTPUTS)
    for options in ({"model": "tiny:layers=1"}, {"temperature": 0.5}):
        role, inner = cached(tmp_path, **options)
        role.infer(batch, OUTPUTS)
        assert inner.rows == 8
    role, inner = cached(tmp_path)
    changed = replace(batch, prompt_NL=batch.prompt_NL + 1)
    assert torch.equal(role.infer(changed, OUTPUTS)["scores_N"], Frozen().infer(changed, OUTPUTS)["scores_N"])
    longer = replace(batch, tokens_NT=batch.tokens_NT + (batch.tokens_NT == batch.tokens_NT[0, 0]))
    role.infer(longer, OUTPUTS)
    assert inner.rows > 8


def test_a_model_that_was_trained_again_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"one")
    batch = tiny_rollouts()
    cached(tmp_path, model=str(folder))[0].infer(batch, OUTPUTS)
    (folder / "model.safetensors").write_bytes(b"other")
    role, inner = cached(tmp_path, model=str(folder))
    role.infer(batch, OUTPUTS)
    assert inner.rows == 8


def test_an_adapter_is_another_model_when_what_it_adapts_is(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"first")
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    batch = tiny_rollouts()
    cached(tmp_path, model=str(adapter))[0].infer(batch, OUTPUTS)
    (base / "model.safetensors").write_bytes(b"trained on")
    role, inner = cached(tmp_path, model=str(adapter))
    role.infer(batch, OUTPUTS)
    assert inner.rows == 8


class Other(World):
    """A rank beside one that misses something."""

    def gather(self, thing: Any) -> list[Any]:
        return [thing, True]


def test_a_rank_that_knows_all_goes_along_with_one_that_does_not(tmp_path: Path) -> None:
    """Weights may be sharded over them: a forward pass is everybody's."""
    batch = tiny_rollouts()
    cached(tmp_path)[0].infer(batch, OUTPUTS)
    inner: Any = Frozen()
    found = CachedRole(inner, str(tmp_path), Other()).infer(batch, OUTPUTS)
    assert inner.rows == 1 and torch.equal(found["scores_N"], Frozen().infer(batch, OUTPUTS)["scores_N"])


def test_a_folder_that_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot store outputs of the role reference in"):
        cached(tmp_path / "file")
