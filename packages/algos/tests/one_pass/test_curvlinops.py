"""Hessian products against those of curvlinops, where it is installed."""

from __future__ import annotations

import pytest
import torch
from streams import stream
from torch import nn

from rlhf_algos.one_pass import hessian_product, slopes
from rlhf_core.training.hessian import HessianProduct


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of its solvers
def test_the_head_and_a_network_have_the_hessian_products_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    z, theta = stream(32)
    ones = torch.ones(32, 1, dtype=torch.float64)
    loss = nn.BCEWithLogitsLoss(reduction="mean")
    head = nn.Linear(16, 1, bias=False, dtype=torch.float64)
    head.weight.data.copy_(theta[None])
    v = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = curvlinops.HessianLinearOperator(head, loss, [head.weight], [(z, ones)])
    torch.testing.assert_close(hessian_product(z, slopes(z, theta) / 32, v), operator @ v, rtol=0, atol=1e-12)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    parameters = list(network.parameters())
    vectors = [torch.randn(p.shape, dtype=torch.float64) for p in parameters]
    found = HessianProduct(parameters, vectors)
    for part, target in zip(z.split(8), ones.split(8), strict=True):  # four micro-batches, a quarter of the mean each
        found.add(loss(network(part), target) / 4)
    operator = curvlinops.HessianLinearOperator(network, loss, parameters, [(z, ones)])
    for product, expected in zip(found.total, operator @ vectors, strict=True):
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-12)
