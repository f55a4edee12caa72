"""The auxiliary loss of mixtures of experts, which keeps their routers from sending every token to the same few.

    L = E * sum_e f_e P_e        (Fedus et al. 2022, equations 4 to 6; over all layers together, as transformers has it)

with f_e the share of tokens that expert e gets and P_e the mean probability that the router gives it. Padding does not count.
The model's own function computes it. It is no sum over tokens: the loss of a batch that is cut into micro-batches is the mean
of theirs by tokens, as everywhere.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.models.inputs.arrange import Inputs

__all__ = ["balance_loss", "check_router"]


def balance_loss(model: Any, logits: tuple[Tensor, ...], padded: Inputs | None) -> Tensor:
    """The loss of one forward pass, a scalar. `padded`: what was read, if there is padding in it."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    mask_NS = None
    if padded is not None:
        N, S = padded.ids_NS.shape
        last_N1 = (padded.row_ends - torch.arange(N, device=padded.ids_NS.device) * S)[:, None]
        mask_NS = torch.arange(S, device=last_N1.device)[None] <= last_N1
    loss: Tensor = _function(model)(logits, experts, config.num_experts_per_tok, mask_NS)
    return loss


def check_router(model: Any, role: str) -> None:
    """Check that the model has such a loss.

    Raises:
        UsageError: it is no mixture of experts, or one that transformers knows no such loss of.
    """
    records = getattr(model.base_model, "_can_record_outputs", None) or {}
    if _function(model) is None or "router_logits" not in records:
        raise OptionError(
            f"/{role}.router_aux_coef", f"{type(model).__name__} has no auxiliary router loss; leave it out"
        )


def _function(model: Any) -> Any:
    """`load_balancing_loss_func` of the model's own module."""
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
