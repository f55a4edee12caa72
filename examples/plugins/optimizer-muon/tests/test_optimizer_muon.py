"""Muon follows its papers, in one process and on ranks, straight and resumed, with and without adapters."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from muon_ranks import take_steps

from rlhf_core import OptimizerProvider, Run, UsageError, make_config, make_optimizer
from rlhf_core.testing import check_light, check_optimizer, run_ranks
from rlhf_optimizer_muon.muon import MuonOptimizer, newton_schulz
from rlhf_optimizer_muon.provider import Muon

GRPO = {"model": "tiny:hidden=16,layers=1", "reward": "length", "batch_size": 2}
SAMPLING = {"n": 2, "max_new_tokens": 6}
MUON = Muon(lr=3e-2)


def rlhf_run(*words: str, ranks: int = 1) -> str:
    """Return the output of `rlhf-run`, in its own process or in several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    plugin = [] if entry_points(group="rlhf", name="muon") else ["-p", "rlhf_optimizer_muon.plugin"]
    return start(*torchrun, "-m", "rlhf_core", *plugin, *words)


def start(*words: str) -> str:
    """Return the output of Python with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(output: Path, steps: int, optim: Muon = MUON, resume: bool = False, rank: int = 0) -> list[float]:
    """Losses and gradient norms of a run of grpo in this process; `rank` of adapters."""
    actor = {"optim": optim, "lora": {"rank": rank}}
    options = {"steps": steps, "output": str(output), "resume": resume, "actor": actor, "sampling": SAMPLING}
    Run(make_config("grpo", **GRPO, **options)).train()
    return curve(output)


def curve(output: Path) -> list[float]:
    """Losses and gradient norms of a run."""
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


def test_rlhf_run_knows_its_name_and_documents_its_options() -> None:
    text = " ".join(rlhf_run("grpo", "--actor.optim.use", "muon", "--help").split())
    assert re.search(r"--actor.optim.use STR optimizer of this role: adamw, [^.]*muon[^.]*, or module:Class", text)
    assert "--actor.optim.momentum FLOAT decay of the momentum (default: 0.95)" in text
    assert "--actor.optim.lr FLOAT peak learning rate (default: 1e-06)" in text, "the algorithm's"


def test_a_resumed_run_of_grpo_equals_a_straight_one(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 4)
    train(tmp_path / "run", 2)
    assert train(tmp_path / "run", 4, resume=True) == straight
    assert train(tmp_path / "other", 4, Muon(lr=3e-2, scale="spectral")) != straight, "options reach the optimizer"
    with pytest.raises(UsageError, match="has another optimizer: "):
        Run(make_config("grpo", **GRPO, steps=5, output=str(tmp_path / "run"), resume=True, sampling=SAMPLING)).train()


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_two_ranks_of_grpo_equal_one(rank: int, tmp_path: Path) -> None:
    one = train(tmp_path / "one", 3, rank=rank)
    words = (
        "grpo --model tiny:hidden=16,layers=1 --reward length --batch-size 2 --sampling.n 2 --sampling.max-new-tokens 6"
    )
    words += (
        f" --actor.optim.use muon --actor.optim.lr 3e-2 --actor.lora.rank {rank} --steps 3 --output {tmp_path / 'two'}"
    )
    rlhf_run(*words.split(), ranks=2)
    assert curve(tmp_path / "two") == pytest.approx(one, rel=2e-3, abs=1e-4)


def test_matrices_that_fsdp2_shards_take_the_same_steps() -> None:
    done = run_ranks(2, take_steps)
    assert not any(rank.code for rank in done), [rank.stderr[-3000:] for rank in done]
