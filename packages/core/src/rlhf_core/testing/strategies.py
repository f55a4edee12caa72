"""The check of strategies: what a role is, learns, gives and leaves behind, compared with core's own strategy `torch`.

Everything runs on the model `tiny`, in this process or on several ranks of CPUs, through the role that a run would use: all
weights or adapters, a moving average, an export, a checkpoint, and a model that is used as a sampler uses it.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import Lora, TrainedOptions
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.ranks import run_ranks
from rlhf_core.testing.tiny import tiny_rollouts, tiny_run

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.providers import Strategy
    from rlhf_core.contract.roles import Trainable
    from rlhf_core.training.local_role import LocalRole

__all__ = ["COMPARED", "assert_close", "check_strategy", "with_advantages"]

COMPARED = frozenset({"logprobs_NT"})
OPTIM = AdamW(lr=1e-2)
SMOOTH = AdamW(lr=1e-2, eps=1e-2)
"""With a large epsilon AdamW does not turn the rounding of a small gradient into a large step."""
DEADLINE_SECONDS = 120
"""Limit of one collective call: ranks that wait for each other fail instead of hanging."""
FAILURE = "this check failed:"
"""Comes before the message of a rank whose check failed; the others' fail because of it."""


def check_strategy(strategy: Strategy, atol: float = 1e-4, ranks: int = 1) -> None:
    """Check a strategy against core's `torch`: it computes, learns, saves, exports and averages the same.

    The checks cover forward passes, one step whole or in two halves, save and load, offload and reload, `weights()`,
    `gathered`, LoRA adapters (where PEFT is installed) and a moving average. A strategy may refuse an average with a
    `UsageError` before training.

    Args:
        strategy: the provider.
        atol: largest distance of log-probabilities and weights from those of `torch`; 1e-4 is float32 in another order.
        ranks: number of processes that share the batch, on CPUs with gloo. The strategy's class must be importable there.

    Raises:
        AssertionError: a check failed; the message names it.
    """
    check_provider(strategy)
    if ranks == 1:
        _check(strategy, atol)
        return
    done = run_ranks(ranks, _check_rank, strategy, atol)
    failures = [rank.stderr for rank in done if rank.code]
    told = [text.rpartition(FAILURE)[2].strip() for text in failures if FAILURE in text]
    assert not failures, f"on {ranks} ranks: {(told or failures)[0]}"


def _check_rank(strategy: Strategy, atol: float) -> None:
    """Run the checks as one rank of a gloo group."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_SECONDS))
    try:
        _check(strategy, atol)
    except AssertionError as error:
        print(FAILURE, error, file=sys.stderr, flush=True)
        os._exit(1)  # at once: the other ranks may wait for this one
    torch.distributed.destroy_process_group()


def _check(strategy: Strategy, atol: float) -> None:
    name = type(strategy).__qualname__
    _check_steps(name, strategy, atol)
    for lora in (Lora(), Lora(rank=2)) if find_spec("peft") else (Lora(),):
        _check_role(name, strategy, lora, atol)


# ----------------------------------------------------------------------------------------------------------------------
# a trainable alone
# ----------------------------------------------------------------------------------------------------------------------


def _check_steps(name: str, strategy: Strategy, atol: float) -> None:
    """Forward and backward passes, steps, checkpoints and sleep."""
    from rlhf_core.strategy.torch import TorchStrategy
    from rlhf_core.training.local_role import LocalRole

    batch = tiny_rollouts()
    module = LocalRole(tiny_run("unused", strategy=TorchStrategy("cpu")).plan, "actor").module

    def fresh(which: Strategy) -> Trainable:
        return which(lambda: copy.deepcopy(module), OPTIM, 10)

    reference, whole, halves = fresh(TorchStrategy("cpu")), fresh(strategy), fresh(strategy)
    start = _logprobs(whole, batch)
    assert_close(name, "a forward pass", start, _logprobs(reference, batch), atol)
    norms = []
    for trainable, parts in ((reference, 1), (whole, 1), (halves, 2)):
        metrics = _train(trainable, batch, parts)
        assert {"grad_norm", "lr"} <= set(metrics), f"{name}: step() must return grad_norm and lr"
        norms.append(metrics["grad_norm"])
    trained = _logprobs(whole, batch)
    assert (trained - start).abs().max() > atol, f"{name}: step() must change the weights"
    assert abs(norms[1] - norms[0]) <= 1e-3 * norms[0], (
        f"{name}: grad_norm is {norms[1]:.6g}, and {norms[0]:.6g} under torch: gradients are summed, never averaged, over "
        "micro-batches and ranks, and their norm is that of all ranks together"
    )
    assert_close(name, "one step", trained, _logprobs(reference, batch), atol)
    assert_close(name, "one step from two backward passes", _logprobs(halves, batch), trained, atol)
    with _shared_folder(whole.world) as folder:
        whole.save(folder)
        whole.world.barrier()
        _train(whole, batch, 1)
        moved = _logprobs(whole, batch)
        whole.load(folder)
        assert_close(name, "load after save", _logprobs(whole, batch), trained, 0.0)
        _train(whole, batch, 1)
        assert_close(name, "a step after load", _logprobs(whole, batch), moved, atol)
    awake = _logprobs(whole, batch)
    whole.offload()
    whole.reload()
    assert_close(name, "reload after offload", _logprobs(whole, batch), awake, 0.0)


def _train(trainable: Trainable, batch: Rollouts, parts: int) -> Mapping[str, float]:
    """Take one optimizer step on the mean log-probability, from `parts` backward passes over this rank's rows."""
    own, tokens = _rows_of(trainable.world, batch), int(batch.mask_NT.sum())
    for i in range(parts):
        part = own.rows(list(range(i * len(own) // parts, (i + 1) * len(own) // parts)))
        logprobs_NT = trainable.forward(part, COMPARED)["logprobs_NT"]
        trainable.backward(-(logprobs_NT * part.mask_NT.to(logprobs_NT.device)).sum() / tokens)
    return trainable.step()


def _logprobs(trainable: Trainable, batch: Rollouts) -> Tensor:
    """Log-probabilities of all rows (N, T), from every rank's own rows."""
    own = _rows_of(trainable.world, batch)
    with torch.no_grad():
        mine_nT = trainable.forward(own, COMPARED)["logprobs_NT"].float().cpu() * own.mask_NT
    logprobs_NT = torch.zeros(batch.mask_NT.shape)
    for rank, theirs_nT in enumerate(trainable.world.gather(mine_nT)):
        logprobs_NT[rank :: trainable.world.size, : theirs_nT.shape[1]] = theirs_nT
    return logprobs_NT


def _rows_of(world: World, batch: Rollouts) -> Rollouts:
    """Return every `size`-th row, from this rank's number on."""
    rows = batch.rows(list(range(world.rank, len(batch), world.size)))
    return replace(rows, world=world)


# ----------------------------------------------------------------------------------------------------------------------
# a role, as a run has it
# ----------------------------------------------------------------------------------------------------------------------


def _check_role(name: str, strategy: Strategy, lora: Lora, atol: float) -> None:
    """Two steps of a role with adapters or without, and everything it gives afterwards, compared with those of `torch`."""
    from rlhf_core.strategy.torch import TorchStrategy

    what = f"{name}, with LoRA" if lora.rank else name
    averaged = True
    try:
        role = _role(strategy, lora, ema=0.5)
    except UsageError:  # refused with a one-line error before training
        averaged, role = False, _role(strategy, lora, ema=0.0)
    reference = _role(TorchStrategy("cpu"), lora, ema=0.5 * averaged)
    batch = tiny_rollouts()
    start, first = _logprobs(role.trainable, batch), _weights(role)
    for each in (role, reference, role, reference):
        each.train({key: with_advantages(_rows_of(each.world, batch)) for key, _ in each.spec.terms})
    expected = _logprobs(reference.trainable, batch)
    assert_close(what, "two steps of a role", _logprobs(role.trainable, batch), expected, atol)
    _compare_tensors(f"{what}: weights() after training", _weights(role), _weights(reference), atol)
    _check_export(what, role, reference, atol, averaged)
    _check_gathered(what, role.trainable, reference.trainable, batch, atol)
    if lora.rank:
        base = role.trainable.shared_base()
        if base is not None:
            assert_close(
                what, "shared_base(), which is the model before training,", _logprobs(base, batch), start, atol
            )
    trained, averages = _logprobs(role.trainable, batch), _averages(role)
    with _shared_folder(role.world) as folder:
        role.save(folder)
        role.world.barrier()
        role.train({key: with_advantages(_rows_of(role.world, batch)) for key, _ in role.spec.terms})
        role.load(folder)
    assert_close(what, "load after save", _logprobs(role.trainable, batch), trained, 0.0)
    if not lora.rank:
        role.load_weights(first.items())
        again = _logprobs(role.trainable, batch)
        assert_close(what, "load_weights(), which gives every parameter to assign(),", again, start, atol)
    _compare_tensors(f"{what}: the moving average after load", _averages(role), averages, 0.0)


def _role(strategy: Strategy, lora: Lora, ema: float) -> LocalRole:
    from rlhf_core.training.local_role import LocalRole

    options = TrainedOptions(model="tiny", optim=SMOOTH, lora=lora, ema=ema)
    return LocalRole(tiny_run("unused", strategy=strategy, actor=options).plan, "actor")


def with_advantages(batch: Rollouts) -> Rollouts:
    """Return the batch with an advantage, different for every row, and the log-probabilities it was sampled with."""
    share_N = batch.tokens_NT.double().mean(1) / 128  # follows the row, on whatever rank it is
    advantages_NT = torch.where(batch.mask_NT, (share_N - share_N.new_tensor(0.2)).float()[:, None], 0.0)
    return batch.with_extras(advantages_NT=advantages_NT, old_logprobs_NT=batch["sampler_logprobs_NT"])


def _weights(role: LocalRole) -> dict[str, Tensor]:
    return {key: tensor.detach().float().cpu().clone() for key, tensor in role.weights()}


def _averages(role: LocalRole) -> dict[str, Tensor]:
    """Return the whole moving averages, by the names of their parameters."""
    named = role.average.by_name() if role.average is not None else {}
    joined, module = role.trainable.join_shares, role.module
    return {key: joined(module.get_parameter(key), tensor).cpu().clone() for key, tensor in named.items()}


def _check_export(what: str, role: LocalRole, reference: LocalRole, atol: float, averaged: bool) -> None:
    """Compare the folders that both roles write, and those of their averages."""
    from safetensors.torch import load_file

    with _shared_folder(role.world) as folder:
        files: dict[str, dict[str, Tensor]] = {}
        for each, label in ((role, "found"), (reference, "expected")):
            each.export(f"{folder}/{label}")
            for suffix in ("", "-ema") if averaged else ("",):
                (path,) = Path(f"{folder}/{label}{suffix}").glob("*model.safetensors")
                files[label + suffix] = load_file(path)
        role.world.barrier()
    changed = [tensor for key, tensor in files["found"].items() if key.endswith("lora_B.weight")]
    assert not changed or any(bool(tensor.any()) for tensor in changed), (
        f"{what}: the exported adapter is untrained, all of lora_B is zero: look parameters up by name when they are read, "
        "since the objects that the module was built with may have been replaced"
    )
    _compare_tensors(f"{what}: the exported model", files["found"], files["expected"], atol)
    if averaged:
        same = all(torch.equal(tensor, files["found"][key]) for key, tensor in files["found-ema"].items())
        assert not same, f"{what}: the exported moving average equals the weights; it must follow them (models.ema)"
        _compare_tensors(f"{what}: the exported moving average", files["found-ema"], files["expected-ema"], atol)


def _check_gathered(what: str, found: Trainable, expected: Trainable, batch: Rollouts, atol: float) -> None:
    """Use the inner model as a sampler does: each rank independently, and not equally often."""
    ids_NS = batch.prompt_NL[:2, : int(batch.prompt_lengths_N[:2].min())]
    logits = []
    for trainable in (found, expected):
        model: Any = trainable.module
        with torch.inference_mode(), trainable.gathered(), trainable.gathered():
            for _ in range(1 + trainable.world.rank):
                given = model.causal_lm(input_ids=ids_NS.to(model.causal_lm.device), use_cache=False).logits
        logits.append(given.float().cpu())
    off = float((logits[0] - logits[1]).abs().max())
    assert off <= 10 * atol, f"{what}: logits of the inner model inside gathered() are {off:.2g} off those of torch"
    after, before = _logprobs(found, batch), _logprobs(expected, batch)
    assert_close(what, "gathered() was left", after, before, atol)


@contextmanager
def _shared_folder(world: World) -> Iterator[str]:
    """Give all ranks one temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield world.gather(folder)[0]
        world.barrier()


def _compare_tensors(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not missing and not unknown, (
        f"{what}: names must be those of Hugging Face, adapters merged into their matrices; "
        f"missing: {', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}"
    )
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, (
            f"{what}: {key} has the shape {tuple(found[key].shape)}, not {tuple(tensor.shape)}: give whole tensors"
        )
        off = float((found[key].float() - tensor.float()).abs().max()) if tensor.numel() else 0.0
        assert off <= atol, f"{what}: {key} is {off:.2g} off that of torch, above {atol:g}"


def assert_close(name: str, what: str, found: Tensor, expected: Tensor, atol: float) -> None:
    """Raise an AssertionError if log-probabilities are further apart than `atol`."""
    difference = float((found - expected).abs().max())
    assert difference <= atol, f"{name}: log-probabilities after {what} are {difference:.2g} off, above {atol:g}"
