"""The exact probability of an output with a bad token, by enumeration: what sampling cannot see once it is rare.

An output has one or two tokens and is bad if any of them is. Where the first token ends the output nothing follows, which
the released code of RePULSe overlooks; both numbers are given. Longer outputs are left out: the cost is |V| forward
passes over one token for two tokens, and |V|^2 for three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.types import Example

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.run import Run

__all__ = ["BadProbability", "log_bad_probability"]


@dataclass(frozen=True)
class BadProbability:
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

    def __post_init__(self) -> None:
        if self.tokens not in (1, 2):
            raise UsageError(f"bad_probability enumerates outputs of 1 or 2 tokens, not {self.tokens}")

    def __call__(self, run: Run) -> dict[str, float]:
        """`bad/logprob` and `bad/logprob_eos_unaware`, natural logarithms, and `bad/probability`."""
        from rlhf_core.rollout.hf import eos_ids

        name = next((source for source in run.plan.sources if source in run.plan.roles), run.plan.trained[0])
        role: Any = run.roles[name]
        bad = self._bad_ids(role.tokenizer)
        prompt = run.encoder.prompts([Example(self.prompt)], [0]).token_ids[0]
        lm = role.causal_lm
        eos, training = eos_ids(lm, role.tokenizer), lm.training
        with torch.inference_mode(), role.gathered():
            lm.eval()
            first_V, second = _distributions(lm, prompt)
            logprob, unaware = (
                log_bad_probability(first_V, second if self.tokens == 2 else None, bad, ends, self.batch)
                for ends in (eos, ())
            )
            lm.train(training)
        return {
            "bad/logprob": logprob,
            "bad/logprob_eos_unaware": unaware,
            "bad/probability": float(torch.tensor(logprob, dtype=torch.float64).exp()),
        }

    def _bad_ids(self, tokenizer: Any) -> list[int]:
        """The bad tokens' numbers."""
        if not self.prompt or not (self.words or self.ids):
            raise UsageError(
                "evaluator bad_probability needs --evaluator.prompt, and --evaluator.words or --evaluator.ids"
            )
        found = list(self.ids)
        for word in self.words:
            pieces = tokenizer.encode(word, add_special_tokens=False)
            if len(pieces) != 1:
                raise UsageError(
                    f"bad_probability: {word!r} is {len(pieces)} tokens; give one token per word, or --evaluator.ids"
                )
            found += pieces
        return sorted(set(found))


def log_bad_probability(
    first_V: Tensor,
    second: Callable[[Tensor], Tensor] | None,
    bad: Sequence[int],
    ends: Iterable[int] = (),
    batch: int = 512,
) -> float:
    """log P(an output holds a token of `bad`), float64; -inf if there is no such output.

    Args:
        first_V: log-probabilities of the first token.
        second: log-probabilities (B, V) of the token after each of B first tokens; None for outputs of one token.
        bad: the bad tokens.
        ends: first tokens after which nothing follows.
        batch: how many first tokens are asked about at a time.
    """
    first_V = first_V.double()
    bad_V = torch.zeros(len(first_V), dtype=torch.bool, device=first_V.device)
    bad_V[list(bad)] = True
    parts = [first_V[bad_V]]
    if second is not None and bool(bad_V.any()):
        continues_V = ~bad_V
        continues_V[list(ends)] = False
        several = continues_V.nonzero().flatten().split(batch)
        parts += [first_V[tokens_B] + second(tokens_B).double()[:, bad_V].logsumexp(1) for tokens_B in several]
    return float(torch.cat(parts).logsumexp(0))


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
