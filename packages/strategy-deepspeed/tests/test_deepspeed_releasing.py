"""Linear layers of stage 3, against those of torch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from rlhf_strategy_deepspeed.releasing import releasing_weights

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
def test_outputs_and_gradients_are_those_of_torch_in_float64(shape: tuple[int, ...], bias: bool) -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 4, bias=bias, dtype=torch.float64)
        given = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        output = layer(given)
        (output**2).sum().backward()
        found = [output, given.grad, *(each.grad for each in layer.parameters())]
        return [each for each in found if each is not None]

    expected = run()
    with releasing_weights():
        found = run()
    assert len(found) == 3 + bias
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-14)


def test_autograd_keeps_the_parameter_and_no_view_of_it() -> None:
    """A view would hold the gathered weights when the parameter lets go of them."""
    layer, kept = torch.nn.Linear(3, 4), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 5, 3, requires_grad=True))
        assert any(each is not layer.weight and each.data_ptr() == layer.weight.data_ptr() for each in kept)
        kept.clear()
        with releasing_weights():
            layer(torch.randn(2, 5, 3, requires_grad=True))
    shared = [each for each in kept if each.data_ptr() == layer.weight.data_ptr()]
    assert len(shared) == 1 and shared[0].shape == layer.weight.shape


def test_torch_has_its_own_function_again_after_a_pass_even_one_that_fails() -> None:
    plain = torch.nn.functional.linear
    with pytest.raises(ValueError, match="apple"), releasing_weights():
        assert torch.nn.functional.linear is not plain
        raise ValueError("apple")
    assert torch.nn.functional.linear is plain
