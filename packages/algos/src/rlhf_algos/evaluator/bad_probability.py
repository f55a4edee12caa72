"""The exact probability of an output with a bad token, by enumeration: what sampling cannot see once it is rare.

An output has one or two tokens and is bad if any of them is:

    P(bad) = P(first is bad) + sum over other first tokens a of P(a) P(second is bad | a)

Where the first token ends the output nothing follows, which the released code of RePULSe overlooks; both numbers are given.
The sum runs over first tokens from the likeliest down, and may stop where the rest cannot add more than a stated share.
Longer outputs are left out: the cost is |V| forward passes over one token for two tokens, and |V|^2 for three.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Example
from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError, option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.run_view import RunView

__all__ = ["BadLogprobs", "BadProbability", "enumerate_bad", "log_bad_probability"]


@dataclass(frozen=True)
class BadProbability(Evaluator):
    """Exact log-probability that the policy's answer to one prompt holds a bad token, for one or two tokens.

    Zhao et al. 2025, section 4.2. At temperature 1 and without truncation, whatever the run samples with.
    """

    prompt: str = ""
    """the prompt, put into the data's template as training prompts are; required"""
    words: tuple[str, ...] = ()
    """bad tokens as text, each exactly one token (mind the leading space)"""
    ids: tuple[int, ...] = ()
    """bad tokens as numbers"""
    tokens: int = 2
    """length of the outputs, 1 or 2"""
    batch: int = 512
    """continuations per forward pass; changes memory and speed, not the result"""
    tolerance: float = 0.0
    """share of the result that the omitted, least likely first tokens may add at most; 0 omits none"""
    most: int = 0
    """maximum number of first tokens to enumerate, the likeliest first; 0 enumerates all. `bad/logprob_bound` bounds
    the contribution of the rest"""

    def __post_init__(self) -> None:
        if self.tokens not in (1, 2):
            raise UsageError(f"bad_probability enumerates outputs of 1 or 2 tokens, not {self.tokens}")

    def __call__(self, run: RunView) -> dict[str, float]:
        """`bad/logprob`, `bad/logprob_bound` above it and `bad/logprob_eos_unaware`, natural; and `bad/probability`.

        The bound is that of the rest being bad altogether: the same number where nothing is left out.
        """
        from rlhf_core.models.loading.end_tokens import end_ids

        name = next((source for source in run.plan.sources if source in run.plan.roles), run.plan.trained_roles[0])
        role: Any = run.roles[name]
        bad = self._bad_ids(role.tokenizer)
        prompt = run.encoder.prompts([Example(self.prompt)], [0]).token_ids[0]
        lm, dtype = role.causal_lm, role.module.compute_dtype
        training = lm.training
        with (
            torch.inference_mode(),
            role.gathered(),
            torch.autocast(next(lm.parameters()).device.type, dtype, enabled=dtype != torch.float32),
        ):
            lm.eval()
            first_V, second = _distributions(lm, prompt)
            ends = end_ids(role.spec, role.tokenizer)
            following = second if self.tokens == 2 else None
            found = enumerate_bad(first_V, following, bad, ends, self.batch, self.tolerance, self.most)
            lm.train(training)
        return {
            "bad/logprob": found.logprob,
            "bad/logprob_bound": found.bound,
            "bad/logprob_eos_unaware": found.eos_unaware,
            "bad/probability": math.exp(found.logprob),
        }

    def _bad_ids(self, tokenizer: Any) -> list[int]:
        """The bad tokens' numbers."""
        if not self.prompt or not (self.words or self.ids):
            raise UsageError(
                f"evaluator bad_probability needs {option('prompt')}, and {option('words')} or {option('ids')}"
            )
        found = list(self.ids)
        for word in self.words:
            pieces = tokenizer.encode(word, add_special_tokens=False)
            if len(pieces) != 1:
                raise UsageError(
                    f"bad_probability: {word!r} is {len(pieces)} tokens; give words of one token each, or "
                    f"{option('ids')}"
                )
            found += pieces
        return sorted(set(found))


@dataclass(frozen=True)
class BadLogprobs:
    """Natural logarithms of probabilities."""

    logprob: float
    """log-probability of a bad output"""
    eos_unaware: float
    """log-probability of a bad output if outputs continued after an end token"""
    bound: float
    """upper bound of `logprob`, given the outputs that were not enumerated"""


def log_bad_probability(
    first_V: Tensor,
    second: Callable[[Tensor], Tensor] | None,
    bad: Sequence[int],
    ends: Iterable[int] = (),
    batch: int = 512,
) -> float:
    """log P(an output holds a token of `bad`), float64; -inf if there is no such output. Arguments of `enumerate_bad`."""
    return enumerate_bad(first_V, second, bad, ends, batch).logprob


def enumerate_bad(
    first_V: Tensor,
    second: Callable[[Tensor], Tensor] | None,
    bad: Sequence[int],
    ends: Iterable[int] = (),
    batch: int = 512,
    tolerance: float = 0.0,
    most: int = 0,
) -> BadLogprobs:
    """The probability that an output holds a token of `bad`, float64.

    Args:
        first_V: log-probabilities of the first token.
        second: log-probabilities (B, V) of the token after each of B first tokens; None for outputs of one token.
        bad: the bad tokens.
        ends: first tokens after which nothing follows.
        batch: how many first tokens are asked about at a time.
        tolerance: stop once the remaining first tokens have at most this share of the probability found.
        most: stop after this many first tokens; 0 for no limit.
    """
    first_V = first_V.double()
    bad_V = torch.zeros(len(first_V), dtype=torch.bool, device=first_V.device)
    bad_V[list(bad)] = True
    found = ended = rest = -math.inf
    if bool(bad_V.any()):
        found = float(first_V[bad_V].logsumexp(0))
        if second is not None:
            others = (~bad_V).nonzero().flatten()
            others = others[first_V[others].argsort(descending=True, stable=True)]
            ends_V = torch.zeros_like(bad_V)
            ends_V[list(ends)] = True
            done = 0
            while done < len(others):
                rest = float(first_V[others[done:]].logsumexp(0))
                if rest <= found + math.log(tolerance or 1e-300) or (most and done >= most):
                    break
                tokens_B = others[done : min(done + batch, most or len(others))]
                part_B = first_V[tokens_B] + second(tokens_B).double()[:, bad_V].logsumexp(1)
                over_B = ends_V[tokens_B]
                found = _log_add(found, part_B[~over_B])
                ended = _log_add(ended, part_B[over_B])
                done, rest = done + len(tokens_B), -math.inf
    return BadLogprobs(found, _log_add(found, ended), _log_add(found, rest))


def _log_add(log: float, more: Tensor | float) -> float:
    """log of exp(log) + the sum of exp(more)."""
    several = torch.as_tensor(more, dtype=torch.float64).flatten()
    return float(torch.cat([torch.tensor([log], dtype=torch.float64), several.cpu()]).logsumexp(0))


def _distributions(lm: Any, prompt: list[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Log-probabilities of the first token after `prompt`, and a function that gives those of the second.

    The prompt is computed once; its cached keys and values serve every continuation.
    """
    device = next(lm.parameters()).device
    out = lm(input_ids=torch.tensor([prompt], device=device), use_cache=True)

    def second(tokens_B: Tensor) -> Tensor:
        cache = copy.deepcopy(out.past_key_values)
        cache.batch_repeat_interleave(len(tokens_B))
        logits = lm(input_ids=tokens_B[:, None], past_key_values=cache, use_cache=True).logits
        log_softmax: Tensor = logits[:, -1].float().log_softmax(-1)
        return log_softmax

    return out.logits[0, -1].float().log_softmax(-1), second
