"""Losses of an answer, from the logits of its tokens.

Shapes: R rows, T tokens of the answer, V vocabulary. All are lower the likelier the answer is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["answer_losses", "carlini_wagner", "cross_entropy", "greedy_matches", "mellowmax"]

CACHED_CELLS = 1 << 18
"""Logits that a CPU sums up at a time: 1 MiB in float32, so that no intermediate result leaves its cache."""


def cross_entropy(logits_RTV: Tensor, ids_RT: Tensor) -> Tensor:
    """Return minus the log-probability of each token (R, T), nats, in float32 at least."""
    chosen_RT = _precise(logits_RTV.gather(2, ids_RT[..., None])[..., 0])
    found: Tensor = _log_normalizers(logits_RTV) - chosen_RT
    return found


def mellowmax(values_RT: Tensor, alpha: float) -> Tensor:
    """Return (1/alpha) log mean exp(alpha values) over the last dimension (Asadi & Littman 2017, eq. 4).

    It tends to the maximum for large alpha and to the mean for alpha near 0.
    """
    length = torch.tensor(float(values_RT.shape[-1]), device=values_RT.device)
    found: Tensor = ((alpha * values_RT).logsumexp(-1) - length.log()) / alpha
    return found


def carlini_wagner(logits_RTV: Tensor, ids_RT: Tensor, margin: float) -> Tensor:
    """Return max(runner-up - logit of the token, -margin) for each token (R, T) (Carlini & Wagner 2017, f6)."""
    logits_RTV = _precise(logits_RTV)
    chosen_RT = logits_RTV.gather(2, ids_RT[..., None])[..., 0]
    others_RT = logits_RTV.scatter(2, ids_RT[..., None], -torch.inf).amax(2)
    found: Tensor = (others_RT - chosen_RT).clamp(min=-margin)
    return found


def answer_losses(logits_RTV: Tensor, ids_RT: Tensor, kind: str, alpha: float = 1.0, margin: float = 0.0) -> Tensor:
    """Return the loss of each row (R,), in float32 at least.

    Args:
        logits_RTV: of the positions that predict the answer.
        ids_RT: the answer.
        kind: cross_entropy: mean over tokens; likelihood: minus the answer's log-probability; mellowmax: over minus the logits
            of the tokens, as in nanoGCG; cw: mean over tokens.
        alpha: of mellowmax.
        margin: of cw, in logits.
    """
    if kind == "mellowmax":
        chosen_RT = logits_RTV.gather(2, ids_RT[..., None])[..., 0].float()
        return mellowmax(-chosen_RT, alpha)
    if kind == "cw":
        return carlini_wagner(logits_RTV, ids_RT, margin).mean(1)
    losses_RT = cross_entropy(logits_RTV, ids_RT)
    return losses_RT.sum(1) if kind == "likelihood" else losses_RT.mean(1)


def _log_normalizers(logits_RTV: Tensor) -> Tensor:
    """Return the logarithm of the sum of exponentials over the vocabulary (R, T), in float32 at least."""
    if logits_RTV.device.type != "cpu":
        found: Tensor = _precise(logits_RTV).logsumexp(2)
        return found
    positions = logits_RTV.flatten(0, 1)
    parts = positions.split(max(1, CACHED_CELLS // positions.shape[1]))
    return torch.cat([_precise(part).logsumexp(1) for part in parts]).view(logits_RTV.shape[:2])


def _precise(logits_RTV: Tensor) -> Tensor:
    """Return logits in float32, or float64 as they are."""
    return logits_RTV if logits_RTV.dtype == torch.float64 else logits_RTV.float()


def greedy_matches(logits_RTV: Tensor, ids_RT: Tensor) -> Tensor:
    """Return for each row (R,) whether greedy decoding gives the whole answer."""
    found: Tensor = (logits_RTV.argmax(2) == ids_RT).all(1)
    return found
