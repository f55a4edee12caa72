"""A check of outputs: on a tiny model, alone and in company, with gradient and without, and never the logits of all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.contract.requirements import per_row, per_token, trim
from rlhf_core.lazy import torch
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.tiny import tiny_rollouts

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.outputs import Output

__all__ = ["check_output"]


def check_output(output: Output, name: str) -> Tensor:
    """Check the shape in its name, finite float32 numbers, zero outside completions; and independence of other rows.

    It carries a gradient in training, and no tensor holds the logits of all tokens.

    Args:
        output: the provider.
        name: what it is registered as, such as `quantiles_NTK`.

    Returns:
        the output of `tiny_rollouts()` by a random tiny model.

    Raises:
        AssertionError, ContractError: it is not so.
    """
    check_provider(output)
    who = type(output).__qualname__
    assert per_row(name), f"{name} must end in its shape, such as _N, _NH, _NT or _NTK"
    trainable, batch = _trainable(output, name), tiny_rollouts()
    with _NoFullLogits(trainable.module, int(batch.lengths_N.sum()), who), torch.no_grad():
        values: Tensor = trainable.forward(batch, frozenset({name}))[name]
    assert values.dtype == torch.float32, f"{who}: {name} must be float32, not {values.dtype}"
    assert bool(values.isfinite().all()), f"{who}: {name} must be finite"
    if per_token(name):
        outside_NT = torch.arange(values.shape[1])[None] >= batch.lengths_N[:, None]
        assert not values[outside_NT].any(), f"{who}: {name} must be zero after a completion; use states.per_token"
    rows = list(range(1, len(batch), 2))
    part = batch.rows(rows)
    with torch.no_grad():
        alone = trainable.forward(part, frozenset({name}))[name]
    same = torch.allclose(alone, trim(name, values[rows], part.tokens_NT.shape[1]), atol=1e-4)
    assert same, f"{who}: {name} of a row must not depend on other rows"
    live = trainable.forward(batch, frozenset({name}))[name]
    assert live.requires_grad, f"{who}: {name} must carry a gradient to the states or the head"
    assert torch.allclose(live.detach(), values, atol=1e-5), f"{who}: {name} must be the same with a gradient"
    (live * torch.linspace(-1, 1, live.numel()).view(live.shape)).sum().backward()
    head = trainable.module.heads[name] if name in trainable.module.heads else torch.nn.Module()
    unused = [key for key, each in head.named_parameters() if each.grad is None or not each.grad.any()]
    assert not unused, f"{who}: the head's {unused[0]} gets no gradient from {name}"
    return values


def _trainable(output: Output, name: str) -> Any:
    """A tiny trained role that gives this output, its logits two tokens at a time."""
    from rlhf_core.contract.optimizers import AdamW
    from rlhf_core.contract.options import TrainedOptions
    from rlhf_core.contract.plan import RoleSpec
    from rlhf_core.contract.terms import Term
    from rlhf_core.models.build import build_module
    from rlhf_core.strategy.torch import TorchStrategy
    from rlhf_core.testing.tiny_algorithm import TinyLoss

    spec = RoleSpec(
        "actor",
        TrainedOptions(model="tiny"),
        outputs=frozenset({name}),
        terms=(("data", Term("actor", "data", TinyLoss())),),
        providers={name: output},
    )
    return TorchStrategy(device="cpu")(lambda: build_module(spec, chunk=2), AdamW(), 1)


class _NoFullLogits:
    """Finds tensors as large as the logits of all completion tokens, made while it is open.

    Args:
        module: whose vocabulary.
        tokens: M, completion tokens.
        who: the provider, for the message.
    """

    def __init__(self, module: Any, tokens: int, who: str) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        V = module.model.config.vocab_size
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        class Watch(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found = function(*args, **(kwargs or {}))
                wide = isinstance(found, torch.Tensor) and found.shape[-1:] == (V,) and found.numel() >= tokens * V
                if wide and found.untyped_storage().data_ptr() not in weights:
                    raise AssertionError(
                        f"{who} makes a tensor of shape {tuple(found.shape)}, the logits of all tokens; use states.distribution"
                    )
                return found

        watch: Any = Watch
        self._watch: Any = watch()

    def __enter__(self) -> None:
        self._watch.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._watch.__exit__(*exception)
