"""Limits on the age of tokens for iterations sampled ahead (`--ahead`), and policies for older tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import OptionError, option, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig

__all__ = [
    "PartialRollouts",
    "Staleness",
    "check_staleness",
    "largest_age",
    "updates_per_iteration",
    "usable_ahead",
]


@dataclass(frozen=True)
class Staleness:
    """Policy for tokens sampled by older weights."""

    most: int = 0
    """maximum number of optimizer updates between the weights that sampled a token and those that start to train on it;
    0 allows the number that --ahead causes, --ahead * updates per step, and with --partial.tokens those of one more step"""
    policy: Literal["wait", "drop", "mask"] = "wait"
    """enforcement of the bound: `wait` delays sampling and wastes nothing; `drop` discards completions that are too old
    and samples their prompts again; `mask` masks tokens that are too old"""
    correct: Literal["on", "off"] = "on"
    """weigh tokens by truncated importance weights if the loss has the option --loss.correction and it is off;
    ratios then refer to the weights that start to train (Fu et al. 2025), not to those that sampled"""

    def __post_init__(self) -> None:
        at_least(0, self, "most")


@dataclass(frozen=True)
class PartialRollouts:
    """Options for completions that continue under new weights."""

    tokens: int = 0
    """number of tokens in a slice, between which new weights may arrive; 0 samples completions whole"""
    surplus: int = 0
    """prompts in progress beyond --batch-size: a step trains on the first --batch-size that complete, and the others
    continue"""
    seconds: float = 0.0
    """seconds after which a step trains on the complete prompts, if there are any; results then depend on the machine.
    0 waits for --batch-size"""
    midway: bool = False
    """let new weights arrive in the middle of a call of the engine: its completions continue under them with their
    key-value cache, and training does not wait for the end of the call; for engines that can"""

    def __post_init__(self) -> None:
        at_least(0, self, "tokens", "surplus", "seconds")


def updates_per_iteration(config: RunConfig) -> int:
    """Return the optimizer updates that a role takes on one batch."""
    return config.update_epochs * config.minibatches


def usable_ahead(config: RunConfig) -> int:
    """Return how many iterations are sampled ahead: under the policy `wait` as many as the bound allows."""
    waits = config.stale.policy == "wait" and config.stale.most
    return min(config.ahead, config.stale.most // updates_per_iteration(config)) if waits else config.ahead


def largest_age(config: RunConfig) -> int:
    """Return the bound on the age of a token that is trained on, in optimizer updates.

    Without an explicit bound, completions that continue may be older than others, by the updates of one iteration.
    """
    steps = config.ahead + (1 if config.partial.tokens else 0)
    return config.stale.most or steps * updates_per_iteration(config)


def check_staleness(config: RunConfig) -> None:
    """Check that the options about old tokens fit each other.

    Raises:
        OptionError: one of them has no effect, or lets nothing be sampled ahead.
    """
    stale, updates = config.stale, updates_per_iteration(config)
    for name, chosen in (
        ("stale.most", stale.most),
        ("stale.policy", stale.policy != "wait"),
        ("replay", config.replay),
    ):
        if chosen and not config.ahead:
            raise OptionError(
                f"/{name}", f"applies only to sampling ahead; pass {run_option('ahead', 1)} too, or leave it out"
            )
    if stale.most and stale.policy == "wait" and stale.most < updates:
        raise OptionError(
            "/stale.most",
            f"{stale.most} is less than the {updates} optimizer updates of a step, so nothing can be sampled ahead; "
            f"pass at least {updates}",
        )
    _check_partial(config)
    if stale.policy != "wait" and not 0 < stale.most < config.ahead * updates:
        raise OptionError(
            "/stale.policy",
            f"{stale.policy} has no effect: tokens are at most {config.ahead * updates} updates old; lower "
            f"{option('/stale.most')}, or leave it out",
        )


def _check_partial(config: RunConfig) -> None:
    """Check that completions can continue under new weights, if they have to."""
    partial, updates = config.partial, updates_per_iteration(config)
    if partial.midway and not config.ahead:
        raise OptionError("/partial.midway", f"needs sampling ahead; pass {run_option('ahead', 1)} too")
    if partial.midway and config.replay:
        raise OptionError(
            "/partial.midway",
            f"lets weights arrive at any token, which no replay repeats; leave out {run_option('replay')}",
        )
    if not partial.tokens:
        for name in ("surplus", "seconds"):
            if getattr(partial, name):
                raise OptionError(f"/partial.{name}", f"needs slices; pass {run_option('partial.tokens', 256)} too")
        return
    reasons = {
        f"needs sampling ahead; pass {run_option('ahead', 1)} too": not config.ahead,
        f"makes sampling wait; leave out {run_option('stale.policy')}": config.stale.policy != "wait",
        f"cannot detect stop strings across slices; leave out {run_option('sampling.stop')}": bool(
            config.sampling.stop
        ),
        f"does not support environments; leave out {run_option('environment')}": config.providers.get("environment")
        is not None,
        f"needs a bound of at least {(config.ahead + 1) * updates} updates to make progress; raise "
        f"{run_option('stale.most')}": bool(config.stale.most) and config.stale.most < (config.ahead + 1) * updates,
    }
    for reason, holds in reasons.items():
        if holds:
            raise OptionError("/partial.tokens", reason)
    if partial.surplus > config.batch_size:
        raise OptionError(
            "/partial.surplus", f"{partial.surplus} is more than the {config.batch_size} prompts of a step"
        )
