"""Cache of body states where only heads are trained; outputs, gradients and training are those without a cache."""

from __future__ import annotations

import pytest
import torch
from test_packing import rows, spec
from torch import Tensor

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.inputs.features import Features
from rlhf_core.models.module import RoleModule
from rlhf_core.strategy.torch import TorchTrainable

SCORES, VALUES = frozenset({"scores_N"}), frozenset({"values_NT"})


def heads_only(*outputs: str, kept: bool = True, packing: bool = True) -> tuple[RoleModule, list[int]]:
    """A module whose body is frozen, and the tokens that its body read in each pass."""
    module = build_module(spec("tiny", *outputs, packing=packing))
    module.model.base_model.requires_grad_(False)
    if not kept:
        module._features = Features(limit=0)
    read: list[int] = []
    module.model.base_model.layers[0].mlp.register_forward_pre_hook(
        lambda _, given: read.append(given[0].shape[0] * given[0].shape[1])
    )
    return module, read


def train(module: RoleModule, batch: Batch, names: frozenset[str], steps: int = 3) -> list[Tensor]:
    """The outputs of some steps of gradient descent on half of the rows each, and of all rows at the end."""
    trainable = TorchTrainable(module, AdamW(lr=0.1), steps, torch.device("cpu"))
    outputs = []
    for step in range(steps):
        micro = batch.rows(range(step % 2, len(batch), 2))
        (name,) = names
        values = trainable.forward(micro, names)[name]
        trainable.backward((values - 1).square().sum())
        trainable.step()
        outputs.append(values.detach())
    with torch.inference_mode():
        outputs.append(trainable.forward(batch, names)[name])
    return outputs


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("names", [SCORES, VALUES])
def test_training_is_the_same_with_and_without_kept_rows(names: frozenset[str], packing: bool) -> None:
    (kept, read), (fresh, again) = (heads_only(*names, kept=kept, packing=packing) for kept in (True, False))
    batch = rows()
    for found, expected in zip(train(kept, batch, names), train(fresh, batch, names), strict=True):
        torch.testing.assert_close(found, expected)
    assert len(read) == 2, "the two halves of the rows were read once each"
    assert len(again) == 4


def test_only_new_rows_are_read() -> None:
    """Check that the order and the neighbors of a row make no difference."""
    module, read = heads_only("scores_N")
    batch = rows()
    lengths = (batch.prompt_lengths_N + batch.lengths_N).tolist()
    alone = module(arrange_inputs(batch.rows([2, 5])), SCORES)["scores_N"]
    together = module(arrange_inputs(batch.rows([5, 1, 2, 0])), SCORES)["scores_N"]
    assert read == [lengths[2] + lengths[5], lengths[1] + lengths[0]]
    torch.testing.assert_close(together[[2, 0]], alone)


def test_what_inference_kept_can_be_trained_on() -> None:
    module, read = heads_only("values_NT")
    with torch.inference_mode():
        before = module(arrange_inputs(rows()), VALUES)["values_NT"]
    outputs = module(arrange_inputs(rows()), VALUES)["values_NT"]
    outputs.sum().backward()
    assert len(read) == 1
    torch.testing.assert_close(outputs, before)
    assert module.scalar_head("value").weight.grad is not None


def test_rows_are_told_apart_by_where_the_completion_begins() -> None:
    module, read = heads_only("values_NT")
    whole, same = rows([(3, 5)]), rows([(3, 5)])
    ids = torch.cat([whole.prompt_NL, whole.tokens_NT], 1)
    same.prompt_NL, same.tokens_NT = ids[:, :4], ids[:, 4:]
    same.prompt_lengths_N, same.lengths_N = torch.tensor([4]), torch.tensor([4])
    first, second = (module(arrange_inputs(each), VALUES)["values_NT"] for each in (whole, same))
    torch.testing.assert_close(first[:, 1:], second[:, :4])
    assert len(read) == 2


def test_a_changed_body_is_read_again() -> None:
    module, read = heads_only("scores_N")
    first = module(arrange_inputs(rows()), SCORES)["scores_N"]
    module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()}, strict=False)
    with torch.no_grad():
        next(module.model.base_model.parameters()).mul_(2.0)
    second = module(arrange_inputs(rows()), SCORES)["scores_N"]
    assert len(read) == 2
    assert not torch.allclose(first, second)


def test_no_more_is_held_than_the_limit() -> None:
    """Rows that were not used for longest go first; a row that is larger than the limit is not held."""
    module, read = heads_only("scores_N")
    hidden = module.model.config.hidden_size * 4
    module._features = Features(limit=2 * hidden)
    batch = rows()
    for row in (0, 1, 0, 2, 0, 1):
        module(arrange_inputs(batch.rows([row])), SCORES)
        assert module._features.held <= 2 * hidden
    assert len(read) == 4, "0, 1, 2, and 1 again, which made way for 2"


def test_a_body_that_is_trained_is_always_read() -> None:
    module, read = heads_only("scores_N")
    module.model.base_model.norm.weight.requires_grad_(True)
    for _ in range(2):
        module(arrange_inputs(rows()), SCORES)["scores_N"].sum().backward()
    assert len(read) == 2


def test_a_frozen_role_keeps_nothing() -> None:
    """Its rows seldom come back, and no head of it changes: what is wanted again is kept as an output."""
    module, read = heads_only("scores_N")
    module.requires_grad_(False)
    for _ in range(2):
        module(arrange_inputs(rows()), SCORES)
    assert len(read) == 2
