"""A rollout engine with a fault on purpose: one token at a time, by plain forward passes over a copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core import Rollout, Rollouts, assemble, end_ids
from rlhf_core.rollout.assemble import pad_id

if TYPE_CHECKING:
    from rlhf_core import Prompts, Role, Sampling
    from rlhf_core.contract.engines import OpenContext

FIRST_MOVED = 60
"""With the fault `tokenizer`, ids from here on come back one higher."""


@dataclass(frozen=True)
class Planted(Rollout):
    """Samples from a copy of the weights, with a fault."""

    fault: str = ""
    """which one; none where empty"""

    def open(self, context: OpenContext) -> Engine:
        """Return an engine without weights."""
        return Engine(self.fault)


class Engine(Rollout):
    """Holds the copy."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.model: Any = None

    def __call__(self, role: Any, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Sample token by token."""
        if self.model is None:
            self.sync(role)
        ends = end_ids(role.spec, role.tokenizer)
        tokens, reported, finish = [], [], []
        longest = max(map(len, prompts.token_ids))
        for uid, given in zip(prompts.uids, prompts.token_ids, strict=True):
            generator = torch.Generator().manual_seed(sampling.seed_for(uid, 0))
            ids = self._read(list(given), longest, pad_id(role.tokenizer))
            drawn, values = [], []
            while len(drawn) < sampling.max_new_tokens and not (drawn and drawn[-1] in ends):
                logits = self._logits([*ids, *drawn], ends, [*given, *drawn])
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
                drawn.append(token)
                values.append(float(logits.log_softmax(-1)[token]))
            finish.append("stop" if drawn[-1] in ends else "length")
            if self.fault == "shift by one":
                values = [*values[1:], values[-1]]
            if self.fault == "tokenizer":
                drawn = [token + (token >= FIRST_MOVED) for token in drawn]
            tokens.append(torch.tensor(drawn))
            reported.append(torch.tensor(values))
        return assemble(
            prompts, tokens, finish, role.tokenizer, version=role.version, per_token={"sampler_logprobs_NT": reported}
        )

    def _read(self, ids: list[int], longest: int, pad: int) -> list[int]:
        """Return what the engine reads of a prompt."""
        if self.fault == "template":
            return ids[:-3]
        if self.fault == "template, twice":
            return [ids[0], *ids]
        if self.fault == "prompt cut":
            return ids[-16:]
        if self.fault == "padding":
            return [*[pad] * (longest - len(ids)), *ids]
        return ids

    def _logits(self, ids: list[int], ends: tuple[int, ...], seen: list[int]) -> torch.Tensor:
        """Return what the next token is drawn by."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        if self.fault == "temperature":
            return logits / 0.7
        if self.fault == "truncation":
            return logits.masked_fill(logits < logits.topk(20).values[-1], -torch.inf)
        if self.fault == "truncation, top-p":
            ordered, places = logits.softmax(-1).sort(descending=True)
            return logits.index_fill(0, places[ordered.cumsum(0) - ordered >= 0.9], -torch.inf)
        if self.fault == "end token":
            return logits.index_fill(0, torch.tensor(ends), -torch.inf)
        if self.fault == "repetition penalty":
            index = torch.tensor(sorted(set(seen)))
            values = logits[index]
            return logits.index_copy(0, index, torch.where(values > 0, values / 1.1, values * 1.1))
        return logits

    def sync(self, role: Role) -> Mapping[str, float]:
        """Take the weights, as far as the fault lets them arrive."""
        local: Any = role
        fresh = copy.deepcopy(local.causal_lm)
        if self.model is not None and self.fault == "stale weights":
            return {}
        if self.model is not None and self.fault == "stale weights, one layer":
            old = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, parameter in fresh.named_parameters():
                    if "layers.1." in name:
                        parameter.copy_(old[name])
        self.model = fresh.bfloat16() if self.fault == "dtype" else fresh
        return {}

    def close(self) -> None:
        """Forget the weights."""
        self.model = None
