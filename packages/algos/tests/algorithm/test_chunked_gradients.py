"""Through the head in chunks, which never holds all logits, every loss has the gradients of the plain path."""

from __future__ import annotations

import pytest
import torch

from rlhf_algos import plugin
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.terms import Term
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.module import RoleModule
from rlhf_core.plugins.registry import default_registry
from rlhf_core.testing import tiny_extras, tiny_rollouts
from rlhf_core.training.reduction import count, weighted_sum

OPTIONS = {"dr_grpo": {"length": 14}}
WITHOUT_LOGPROBS = {"bradley_terry", "prm", "value"}
ELSEWHERE = {"distill"}
"""Two models' distributions, in test_distill."""


def plain_outputs(module: RoleModule, batch: Batch) -> dict[str, torch.Tensor]:
    """Log-probabilities and entropies from a softmax over the model's whole logits."""
    inputs = arrange_inputs(batch)
    logits_SV = module.causal_lm(input_ids=inputs.ids_NS).logits.flatten(0, 1)
    log_softmax_MV = logits_SV[inputs.states_M].log_softmax(-1)
    values = {
        "logprobs_NT": log_softmax_MV.gather(1, inputs.targets_M[:, None]).squeeze(1),
        "entropy_NT": -(log_softmax_MV.exp() * log_softmax_MV).sum(1),
    }
    flat = {name: torch.zeros(batch.tokens_NT.numel()).index_put((inputs.slots_M,), x) for name, x in values.items()}
    return {name: x.view(batch.tokens_NT.shape) for name, x in flat.items()}


@pytest.mark.parametrize("name", sorted(plugin.rlhf_loss().keys() - WITHOUT_LOGPROBS - ELSEWHERE))
def test_chunks_change_no_gradient(name):
    loss = default_registry().resolve("loss", name)(**OPTIONS.get(name, {}))
    batch = tiny_rollouts()
    batch = batch.with_extras(**tiny_extras(loss.needs, batch))
    options = TrainedOptions(model="tiny:hidden=16,layers=1")
    spec = RoleSpec("actor", options, loss.outputs, terms=(("data", Term("actor", "data", loss)),))
    gradients = []
    for chunk in (3, 0):
        module = build_module(spec, chunk=chunk)
        outputs = module(arrange_inputs(batch), loss.outputs) if chunk else plain_outputs(module, batch)
        result = loss(outputs, batch)
        total = weighted_sum(result.values, result.reduction, batch) / count(
            result.reduction, batch, loss.rows_per_unit
        )
        gradients.append(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))
    scale = max(float(gradient.abs().max()) for gradient in gradients[1] if gradient is not None)
    for chunked, plain in zip(*gradients, strict=True):
        if plain is not None:
            torch.testing.assert_close(chunked, plain, atol=1e-5 * scale, rtol=1e-4)
