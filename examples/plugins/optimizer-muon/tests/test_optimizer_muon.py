"""Muon follows its papers, in one process and on ranks, straight and resumed, with and without adapters."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_core import OptimizerProvider, UsageError, make_optimizer
from rlhf_core.testing import check_light, check_optimizer
from rlhf_optimizer_muon.muon import MuonOptimizer, newton_schulz
from rlhf_optimizer_muon.provider import Muon

HERE = Path(__file__).parent
GRPO = "grpo --model tiny:hidden=16,layers=1 --reward length --batch-size 2 --sampling.n 2 --sampling.max-new-tokens 6"


def start(*words: str, ranks: int = 1) -> None:
    """Run a module in a process of its own, or in several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *torchrun, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def train(output: Path, steps: int, *flags: str, ranks: int = 1) -> list[float]:
    """Losses of a run with Muon."""
    words = ["-m", "rlhf_core", "-p", "rlhf_optimizer_muon.plugin", *GRPO.split()]
    words += [
        "--actor.optim.use",
        "muon",
        "--actor.optim.lr",
        "3e-2",
        "--steps",
        str(steps),
        "--output",
        str(output),
        *flags,
    ]
    start(*words, ranks=ranks)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/actor"] for row in rows] + [row["grad_norm/actor"] for row in rows]


def reference(matrix: torch.Tensor, gradients: list[torch.Tensor], options: Muon) -> torch.Tensor:
    """Muon in float64 by singular values: no matrix product of the iteration is repeated here."""
    W, M = matrix.double(), torch.zeros_like(matrix, dtype=torch.float64)
    for gradient in gradients:
        G = gradient.double()
        M = options.momentum * M + (1 - options.momentum) * G
        update = (1 - options.momentum) * G + options.momentum * M if options.nesterov else M
        U, s, Vt = torch.linalg.svd(update / (update.norm() + 1e-7), full_matrices=False)
        for _ in range(options.iterations):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, columns = W.shape
        size = 0.2 * math.sqrt(max(rows, columns)) if options.scale == "adamw" else math.sqrt(max(1.0, rows / columns))
        W = (1 - options.lr * options.weight_decay) * W - options.lr * size * (U * s) @ Vt
    return W


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7)])
@pytest.mark.parametrize(
    "options", [Muon(lr=0.1, weight_decay=0.3), Muon(lr=0.1, scale="spectral", nesterov=False, iterations=3)]
)
def test_three_steps_of_a_matrix_are_those_of_the_papers(shape: tuple[int, int], options: Muon) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    gradients = [torch.randn(shape) for _ in range(3)]
    expected = reference(parameter.detach(), gradients, options)
    optimizer = options([("layer.weight", parameter)], 3)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(parameter.double(), expected, atol=2e-5)


def test_the_iteration_brings_all_singular_values_near_one() -> None:
    torch.manual_seed(1)
    U, _, Vt = torch.linalg.svd(torch.randn(8, 5), full_matrices=False)
    spread = (U * torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01])) @ Vt
    singular = torch.linalg.svdvals(newton_schulz(spread, 5))
    assert (
        float(singular.min()) > 0.65 and float(singular.max()) < 1.25
    )  # the quintic does not converge, it stays in a band


def test_torchs_own_muon_takes_the_same_steps() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    torch.manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    options = Muon(lr=0.05, weight_decay=0.1)
    pair = (
        options([("layer.weight", ours)], 5),
        muon([theirs], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        gradient = torch.randn(6, 4)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=5e-3)  # torch's iteration runs in bfloat16
    assert (ours - 1).abs().max() > 0.05


def test_the_rest_is_trained_by_adamw_of_torch() -> None:
    torch.manual_seed(3)
    names = ("model.embed_tokens.weight", "model.norm.weight", "heads.value.weight")
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((5, 4), (4,), (1, 4))] for _ in range(2))
    options = Muon(lr=0.1, weight_decay=0.2, adamw_ratio=0.5)
    groups = [{"params": [theirs[0], theirs[2]], "weight_decay": 0.2}, {"params": [theirs[1]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=options.betas, eps=options.eps)
    optimizer = options(zip(names, ours, strict=True), 4)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        adamw.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_matrices_of_the_body_and_adapters_go_to_muon_and_nothing_else() -> None:
    shapes = {
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.layers.0.self_attn.q_proj.lora_A.default.weight": (2, 4),
        "model.layers.0.norm.weight": (4,),
        "lm_head.weight": (9, 4),
        "score.weight": (1, 4),
    }
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    optimizer = Muon()(named, 1)
    chosen = {id(parameter) for group in optimizer.param_groups if "momentum" in group for parameter in group["params"]}
    assert [name for name, parameter in named if id(parameter) in chosen] == [list(shapes)[1], list(shapes)[2]]


def test_it_keeps_the_contract_with_and_without_adapters() -> None:
    check_optimizer(Muon(lr=1e-2, weight_decay=0.1))
    assert isinstance(make_optimizer(torch.nn.Linear(2, 2), Muon(), 1), MuonOptimizer)
    assert not OptimizerProvider.elementwise and not Muon.elementwise, "DeepSpeed may not cut its matrices"


def test_it_does_not_slow_down_help() -> None:
    check_light("rlhf_optimizer_muon.plugin", "rlhf_optimizer_muon.provider")


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(UsageError, match="^momentum must be at least 0 and below 1, not 1.0$"):
        Muon(momentum=1.0)


def test_a_resumed_run_of_grpo_equals_a_straight_one(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 4)
    train(tmp_path / "run", 2)
    assert train(tmp_path / "run", 4, "--resume") == straight
    assert train(tmp_path / "adamw", 4, "--actor.optim.scale", "spectral") != straight, "options reach the optimizer"


def test_two_ranks_of_grpo_equal_one(tmp_path: Path) -> None:
    for flags in ([], ["--actor.lora.rank", "2"]):
        name = "lora" if flags else "full"
        one = train(tmp_path / f"{name}1", 3, *flags)
        two = train(tmp_path / f"{name}2", 3, *flags, ranks=2)
        assert two == pytest.approx(one, rel=2e-3, abs=1e-4)


def test_matrices_that_fsdp2_shards_take_the_same_steps() -> None:
    start(str(HERE / "muon_ranks.py"), ranks=2)
