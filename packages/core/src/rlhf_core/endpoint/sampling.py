"""Sampling options of a request: those that a turn honors, and those that training does not allow.

The trainer computes log-probabilities of the distribution that `--sampling` describes. A turn that is drawn from another
distribution would give wrong importance ratios, so a request may not choose one. It may cut a turn (`max_tokens`, `stop`) and
vary a draw (`seed`), which leave the distribution of each token alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.endpoint.http import HttpError
from rlhf_core.errors import UsageError, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.options import Sampling

__all__ = ["NEUTRAL", "OWN", "TurnOptions", "check_distribution", "positive", "read_options", "texts"]

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "thinking": ({"type": "disabled"},),
    "thinking_token_budget": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "output_config": ({},),
    "output_format": (),
    "parallel_tool_calls": (True,),
    "tool_choice": (
        "auto",
        "none",
        {"type": "auto"},
        {"type": "auto", "disable_parallel_tool_use": False},
        {"type": "none"},
    ),
}
"""Options that change the distribution, with the values that leave it alone. An absent option and null do, too."""

OWN = ("temperature", "top_p", "top_k", "min_p")
"""Options that the run has, too."""


@dataclass(frozen=True)
class TurnOptions:
    """Options of one turn that a request may choose."""

    max_tokens: int = 0
    """tokens after which the turn is cut; 0 leaves it what is left of the episode"""
    stop: tuple[str, ...] = ()
    """strings that end it"""
    seed: int | None = None
    """number that varies the draw"""


def read_options(body: Mapping[str, Any], *lengths: str, stop: str = "stop") -> TurnOptions:
    """Return the options of a turn that a request chooses.

    Args:
        body: the request.
        lengths: names of the limit of tokens, in order of precedence.
        stop: the name of the stop strings.

    Raises:
        HttpError: a value is wrong, or more than one answer is asked for.
    """
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        raise HttpError(400, "n must be 1, since each request samples one answer")
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise HttpError(400, f"seed must be a whole number, not {seed!r}")
    most = next(filter(None, (positive(body, name) for name in lengths)), 0)
    return TurnOptions(most, texts(body.get(stop), stop), seed)


def check_distribution(body: Mapping[str, Any], sampling: Sampling) -> None:
    """Check that a request asks for the distribution that the policy is trained with.

    Args:
        body: the request, or the part of it that has the sampling options.
        sampling: the run's.

    Raises:
        UsageError: it asks for another one.
    """
    for name, value, own in _differences(body, sampling):
        other = run_option("environment.request_sampling", "ignore")
        if own is None:
            raise UsageError(
                f"the request's {name} is {value!r}, and the policy is trained without it; leave it out, or pass {other}"
            )
        raise UsageError(
            f"the request's {name} is {value!r}, and the policy is trained with {own:g}; leave it out, pass "
            f"{run_option(f'sampling.{name}', value)}, or pass {other}"
        )


def _differences(body: Mapping[str, Any], sampling: Sampling) -> Iterator[tuple[str, Any, float | None]]:
    """Yield the name, the value and the run's value of each option that changes the distribution."""
    own: dict[str, float] = {name: getattr(sampling, name) for name in OWN}
    for name, value in body.items():
        if value is None:
            continue
        if name in own:
            if (0 if name == "top_k" and value == -1 else value) != own[name]:
                yield name, value, own[name]
        elif name in NEUTRAL and value not in NEUTRAL[name]:
            yield name, value, None


def positive(body: Mapping[str, Any], name: str) -> int:
    """Return a whole number of a request; 0 where it is absent."""
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise HttpError(400, f"{name} must be a whole number of at least 1, not {value!r}")
    return value or 0


def texts(given: Any, name: str) -> tuple[str, ...]:
    """Return one text or several; none where it is absent."""
    found = (given,) if isinstance(given, str) else given or ()
    if not isinstance(found, Sequence) or not all(isinstance(each, str) and each for each in found):
        raise HttpError(400, f"{name} must be a string, or a list of strings")
    return tuple(found)
