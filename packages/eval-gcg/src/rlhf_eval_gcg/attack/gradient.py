"""The gradient of a suffix's loss with respect to the one-hot choice of its tokens (Zou et al. 2023, section 3.2).

A suffix's embeddings are one-hot (L, V) times the table (V, H). The backward pass ends at the embeddings; the chain rule to the
one-hot choice is one multiplication by the table. The forward pass leaves the keys and values of the suffix behind, which the
candidates of the step share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.caching import Beginning
from rlhf_eval_gcg.attack.lane import Lane
from rlhf_eval_gcg.attack.losses import answer_losses
from rlhf_eval_gcg.attack.victim import Group

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["batch_gradients", "lane_gradient"]


def lane_gradient(lane: Lane, choice: Tensor, tokens: int, options: Attack) -> tuple[Tensor, float, float]:
    """Return the gradient over all tokens (L, V), float32, the loss, and the operations of both passes.

    Args:
        lane: the prompt; its base becomes this suffix where beginnings are shared.
        choice: token ids (L,), or weights of the tokens (L, V) for a mixture of embeddings.
        tokens: V, the number of tokens that candidates are drawn from.
        options: of the loss.
    """
    victim, mixture = lane.victim, choice.is_floating_point()
    embeds_LH = _embeddings(lane, choice, tokens)
    length, flops = len(choice), 0.0
    gradient_LH = torch.zeros_like(embeds_LH, dtype=torch.float32)
    losses: list[Tensor] = []
    groups = [_rows(lane, embeds_LH, answer_T) for answer_T in lane.answers.ids]
    shares = _shares(lane, groups)
    for k, (answer_T, group, share) in enumerate(zip(lane.answers.ids, groups, shares, strict=True)):
        record = lane.cached and k == 0
        with torch.enable_grad():
            (logits_1TV,), fresh = victim.logits([group], record)
            loss = answer_losses(
                logits_1TV, answer_T[None], lane.answers.kind, options.mellowmax_alpha, options.cw_margin
            )[0]
            (one,) = torch.autograd.grad(loss, embeds_LH)
        gradient_LH += share * one.float()
        losses.append(loss.detach().float())
        past, new = len(group.beginning), group.rows.shape[1]
        flops += victim.costs.forward(1, new, past, group.keep) + victim.costs.backward(1, new, past, group.keep)
        if record and not mixture:
            lane.base = lane.opening.extend([(k[:, :, :length], v[:, :, :length]) for k, v in fresh])
            lane.base_L = choice.clone()
    loss = lane.answers.combine(torch.stack(losses)[:, None])[0]
    flops += victim.costs.over_tokens(length, embeds_LH.shape[1], tokens)
    return victim.over_tokens(gradient_LH, tokens), float(loss), flops


def batch_gradients(
    lanes: Sequence[Lane], choices: Sequence[Tensor], tokens: int, options: Attack
) -> list[tuple[Tensor, float, float]]:
    """Return what `lane_gradient` returns of each lane, from one forward and one backward pass over all of them.

    Args:
        lanes: prompts of one model, each with one answer and shared beginnings; none comes twice.
        choices: of each lane.
        tokens: V, as there.
        options: of the loss.
    """
    victim = lanes[0].victim
    embeds = [_embeddings(lane, choice, tokens) for lane, choice in zip(lanes, choices, strict=True)]
    groups = [_rows(lane, each, lane.answers.ids[0]) for lane, each in zip(lanes, embeds, strict=True)]
    with torch.enable_grad():
        logits, fresh = victim.logits(groups, record=True)
        losses_N = torch.stack(
            [
                answer_losses(
                    each, lane.answers.ids[0][None], lane.answers.kind, options.mellowmax_alpha, options.cw_margin
                )[0]
                for lane, each in zip(lanes, logits, strict=True)
            ]
        )
        grads = torch.autograd.grad(losses_N.sum(), embeds)
    longest = max(group.rows.shape[1] for group in groups)
    found = []
    values = losses_N.detach().float().tolist()
    for row, (lane, choice, group) in enumerate(zip(lanes, choices, groups, strict=True)):
        past, new, share = len(group.beginning), group.rows.shape[1], _shares(lane, [group])[0]
        flops = victim.costs.forward(1, new, past, group.keep) + victim.costs.backward(1, new, past, group.keep)
        flops += victim.costs.over_tokens(len(choice), embeds[row].shape[1], tokens)
        if not choice.is_floating_point():  # rows are padded on the left
            own = slice(longest - new, longest - new + len(choice))
            lane.base = lane.opening.extend([(k[row : row + 1, :, own], v[row : row + 1, :, own]) for k, v in fresh])
            lane.base_L = choice.clone()
        found.append((victim.over_tokens(share * grads[row].float(), tokens), share * values[row], flops))
    return found


def _embeddings(lane: Lane, choice: Tensor, tokens: int) -> Tensor:
    """Return the embeddings (L, H) of a choice, as leaves that get a gradient."""
    victim = lane.victim
    with torch.no_grad():
        every = torch.arange(tokens, device=victim.device)
        mixed = choice.is_floating_point()
        embeds_LH = choice.to(victim.embed(every[:1])) @ victim.embed(every) if mixed else victim.embed(choice)
    return embeds_LH.detach().requires_grad_(True)


def _rows(lane: Lane, embeds_LH: Tensor, answer_T: Tensor) -> Group:
    """Return one row of embeddings: the suffix, what follows it, and the answer without its last token."""
    tail = lane.victim.embed(torch.cat([lane.after_A, answer_T[:-1]])).detach()
    parts = [embeds_LH, tail]
    if not lane.cached:
        parts.insert(0, lane.victim.embed(lane.before_P).detach())
    return Group(lane.opening if lane.cached else Beginning(), torch.cat(parts)[None], len(answer_T))


def _shares(lane: Lane, groups: Sequence[Group]) -> list[float]:
    """Return the derivative of the lane's loss by the loss of each answer."""
    answers = lane.answers
    if answers.weights is not None:
        return list(answers.weights)
    if len(groups) == 1:
        return [1.0]
    with torch.no_grad():
        losses = [
            answer_losses(lane.victim.logits([group])[0][0], ids_T[None], answers.kind)[0]
            for group, ids_T in zip(groups, answers.ids, strict=True)
        ]
    shares: list[float] = (-torch.stack(losses).float()).softmax(0).tolist()
    return shares
