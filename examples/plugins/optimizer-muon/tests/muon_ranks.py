"""The steps of each of two gloo ranks: Muon on matrices that FSDP2 shards, compared with whole ones."""

from __future__ import annotations

import copy

import torch
from torch.distributed.fsdp import fully_shard

from rlhf_core import load_optimizer, make_optimizer
from rlhf_optimizer_muon.provider import Muon


def take_steps() -> None:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    sharded = copy.deepcopy(whole)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    optim = Muon(lr=0.1, weight_decay=0.01)
    optimizers = [make_optimizer(each, optim, 3) for each in (whole, sharded)]
    inputs = torch.randn(8, 5)
    for step in range(3):
        for model, optimizer in zip((whole, sharded), optimizers, strict=True):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:  # a resumed optimizer goes the same way
            optimizers[1] = make_optimizer(sharded, optim, 3)
            fresh, state = optimizers[1], optimizer.state_dict()
            load_optimizer(fresh, state)
    for (name, expected), found in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        off = float((found.full_tensor() - expected).detach().abs().max())  # type: ignore[attr-defined]
        assert off < 1e-5, f"{name} is {off:.2g} off"
    momentum = optimizers[1].state[sharded[0].weight]["momentum"]
    assert momentum.to_local().shape[0] == 6, "momentum stays sharded"
    torch.distributed.destroy_process_group()
