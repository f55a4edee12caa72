"""States of a role, written in one cut and read in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.errors import UsageError
from rlhf_core.strategy.parameter_states import Piece, open_states, parameter_names, write_pieces
from rlhf_core.strategy.torch import TorchStrategy, TorchTrainable
from rlhf_core.testing.tiny import tiny_rollouts

NAMES = frozenset({"logprobs_NT"})


@given(
    size=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    start=st.integers(0, 39),
    count=st.integers(1, 40),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stretch_is_read_from_any_cut(
    size: int, cuts: list[int], start: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    weight, moment = torch.randn(size), torch.randn(size, dtype=torch.float64)
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    ranks = len(bounds) - 1
    for rank in range(ranks):
        begin, end = bounds[rank : rank + 2]
        held = {"weight": weight[begin:end], "exp_avg": moment[begin:end]}
        pieces = [Piece("w", begin, held, {"step": torch.tensor(3.0), "t": 4})] if begin < end else []
        write_pieces(folder, rank, ranks, 7, pieces)
    states = open_states(folder, ["w"])
    start, count = min(start, size - 1), min(count, size - min(start, size - 1))
    assert torch.equal(states.read("w", "weight", start, count), weight[start : start + count])
    assert torch.equal(states.read("w", "exp_avg", start, count), moment[start : start + count])
    assert (states.steps_done, states.kinds("w")) == (7, ["exp_avg"])
    assert states.values["w"] == {"step": torch.tensor(3.0), "t": 4}


def test_numbers_that_are_read_are_nobody_elses(tmp_path: Path) -> None:
    """Two parameters that shared a step when they were saved, as those of a flat shard do, count apart."""
    step = torch.tensor(1.0)
    write_pieces(tmp_path, 0, 1, 1, [Piece(name, 0, {"weight": torch.ones(2)}, {"step": step}) for name in ("a", "b")])
    states = open_states(tmp_path, ["a", "b"])
    states.values["a"]["step"].add_(1)
    states.read("a", "weight", 0, 2).add_(1)
    assert states.values["b"]["step"] == 1
    assert states.read("a", "weight", 0, 2).tolist() == [1, 1]


@pytest.mark.parametrize("lost", ["rank", "stretch"])
def test_what_is_missing_is_one_line(lost: str, tmp_path: Path) -> None:
    write_pieces(tmp_path, 0, 2, 1, [Piece("w", 0, {"weight": torch.ones(2)})])
    if lost == "stretch":
        write_pieces(tmp_path, 1, 2, 1, [Piece("w", 3, {"weight": torch.ones(2)})])
    with pytest.raises(UsageError, match="lacks pieces-00001" if lost == "rank" else "lacks the elements 2 to 5"):
        open_states(tmp_path, ["w"]).read("w", "weight", 0, 5)


def test_a_folder_of_an_earlier_version_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text("{}")
    with pytest.raises(UsageError, match="has no states by parameter"):
        open_states(tmp_path, ["w"])
    with pytest.raises(UsageError, match="has no states by parameter"):
        trained(0).load(str(tmp_path))


def trained(steps: int, dtype: str = "float32") -> Any:
    """A tiny role after so many steps."""
    from rlhf_core.contract.options import TrainedOptions
    from rlhf_core.contract.plan import RoleSpec
    from rlhf_core.models.build import build_module

    spec = RoleSpec("actor", TrainedOptions(model="tiny", dtype=dtype), NAMES, terms=(("data", None),))  # type: ignore[arg-type]
    role = TorchStrategy("cpu")(lambda: build_module(spec), AdamW(lr=1e-2, weight_decay=0.1), 10)
    for _ in range(steps):
        update(role)
    return role


def update(role: TorchTrainable) -> None:
    """One step of the role."""
    role.backward(role.forward(tiny_rollouts(), NAMES)["logprobs_NT"].sum())
    role.step()


def test_torch_goes_on_from_pieces_as_from_its_own_files(tmp_path: Path) -> None:
    """Three updates, saved both ways and cut into two ranks; the fourth is the same to the bit."""
    role = trained(3)
    own, pieces = tmp_path / "own", tmp_path / "pieces"
    own.mkdir(), pieces.mkdir()
    role.save(str(own))
    states = open_states(own, parameter_names(role.module, role.optimizer))
    rows: list[list[Piece]] = [[], []]
    for name, tensor in role.module.state_dict().items():
        size = tensor.numel()
        for rank, (start, count) in enumerate([(0, size // 2), (size // 2, size - size // 2)]):
            kinds = ["weight", *states.kinds(name)]
            held = {kind: states.read(name, kind, start, count) for kind in kinds}
            rows[rank].append(Piece(name, start, held, states.values.get(name, {})))
    for rank in range(2):
        write_pieces(pieces, rank, 2, states.steps_done, rows[rank])
    found = []
    for folder in (own, pieces):
        again = trained(0)
        again.load(str(folder))
        update(again)
        found.append((again.steps_done, dict(again.module.named_parameters())))
    assert found[0][0] == found[1][0] == 4
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_the_loss_scale_of_float16_and_its_age_go_along(tmp_path: Path) -> None:
    """A resumed run that began again at 65536 would skip the steps that found a lower scale."""
    own, pieces = tmp_path / "own", tmp_path / "pieces"
    own.mkdir(), pieces.mkdir()
    role = trained(0, "float16")
    rows = [Piece(name, 0, {"weight": tensor.flatten()}) for name, tensor in role.module.state_dict().items()]
    write_pieces(pieces, 0, 1, 5, rows, scale=(1024.0, 3))
    role.load(str(pieces))
    assert role.scaler.get_scale() == 1024.0
    role.save(str(own))
    assert open_states(own, parameter_names(role.module, role.optimizer)).scale == (1024.0, 3)
    trained(0).load(str(pieces))  # float32 needs none
