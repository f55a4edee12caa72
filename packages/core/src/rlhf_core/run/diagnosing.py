"""Examines a rollout engine: samples with it, reads the same tokens with the trainer, and changes the weights in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.models.loading.end_tokens import end_ids
from rlhf_core.rollout.assemble import pad_id
from rlhf_core.run.diagnosis import Evidence, Finding, Row, explain
from rlhf_core.training.local_role import LocalRole

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Prompts
    from rlhf_core.contract.options import Sampling
    from rlhf_core.run.run import Run

__all__ = ["Examination"]

NOISE = 0.1
"""Size of the change of weights, as a share of each tensor's own deviation: small, and far above rounding."""

BOUND, NARROW_BOUND = 1e-3, 0.05
"""Mean differences that are rounding, in float32 and in 16 bits."""


class Examination:
    """A comparison of the engine of a run with its role `actor`.

    Args:
        run: open, and not trained.
        prompts: what is answered.
        sampling: how.
        bound: mean difference up to which both agree; 0 is that of the dtype.

    Raises:
        UsageError: the role is not in this process.
    """

    def __init__(self, run: Run, prompts: Prompts, sampling: Sampling, bound: float = 0.0) -> None:
        role = run.roles["actor"]
        if not isinstance(role, LocalRole):
            raise UsageError("this command needs the trainer in its own process; leave out the launcher")
        self.run, self.role, self.prompts, self.sampling = run, role, prompts, sampling
        narrow = role.spec.options.compute_dtype != "float32"
        self.bound = bound or (NARROW_BOUND if narrow else BOUND)

    def compare(self) -> Finding:
        """Return why the engine and the trainer differ with the weights as they are."""
        return explain(self._evidence(self._sample()))

    def compare_after_change(self) -> Finding:
        """Return why they differ after the trainer's weights have changed and were handed over; they are restored at the end.

        Where the engine agrees with the old weights, none arrived. Else each part of the model is given its old weights again
        in turn: the part that then agrees did not arrive.
        """
        with self._change_weights() as old:
            self.run.engines["rollout"].sync(self.role)
            evidence = self._evidence(self._sample())
            finding = explain(evidence)
            if finding.cause:
                finding = self._stale(evidence, finding, old)
        self.role.version += 1
        self.run.engines["rollout"].sync(self.role)
        return finding

    def _stale(self, evidence: Evidence, finding: Finding, old: dict[str, Tensor]) -> Finding:
        """Return the parts of the model whose old weights explain the difference, if any do."""
        candidates = {"all weights": list(old)} | {
            part: [n for n in old if _part(n) == part] for part in map(_part, old)
        }
        best, limit = finding, max(0.5 * self.bound, 0.2 * finding.before)
        for part, names in candidates.items():
            with self._give_back(old, names):
                left = explain(replace(evidence, bound=float("inf"))).before
            if left < 0.9 * best.after and left <= limit:
                best = Finding(
                    "stale weights",
                    f"the engine computes with the old weights of {part}; they did not arrive with the last update",
                    finding.before,
                    left,
                )
        return best

    def _sample(self) -> list[Row]:
        """Return answers of the engine."""
        rollouts = self.run.rollouts("actor", self.prompts, self.sampling)
        rows = []
        for n in range(len(rollouts)):
            L, T = int(rollouts.prompt_lengths_N[n]), int(rollouts.lengths_N[n])
            reported_T = rollouts["sampler_logprobs_NT"][n, :T]
            rows.append(Row(rollouts.prompt_NL[n, :L].tolist(), rollouts.tokens_NT[n, :T].tolist(), reported_T))
        return rows

    def _evidence(self, rows: Sequence[Row]) -> Evidence:
        tokenizer, dtype = self.role.tokenizer, self.role.module.compute_dtype
        others = [each for each in (torch.float32, torch.bfloat16, torch.float16) if each != dtype]
        return Evidence(
            rows=rows,
            forward=self._reader(dtype),
            narrow={str(each).removeprefix("torch."): self._reader(each) for each in others},
            ends=end_ids(self.role.spec, tokenizer),
            pad=pad_id(tokenizer),
            bos=tokenizer.bos_token_id,
            bound=self.bound,
        )

    def _reader(self, dtype: torch.dtype) -> Callable[[Sequence[int], Sequence[int]], Tensor]:
        """Return what computes the logits (T, V) of a completion after a prompt in a dtype."""
        model = self.role.causal_lm

        def forward(prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
            ids = torch.tensor([[*prompt, *completion][:-1]], device=model.device)
            own = next(model.parameters()).dtype
            with (
                torch.no_grad(),
                torch.autocast(model.device.type, dtype, enabled=dtype != own and dtype != torch.float32),
            ):
                logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
            return logits.float().cpu()

        return forward

    @contextmanager
    def _change_weights(self) -> Iterator[dict[str, Tensor]]:
        """Change the weights while it is open; yield the old ones by name."""
        named = dict(self.role.module.named_parameters())
        old = {name: parameter.detach().clone() for name, parameter in named.items()}
        generator = torch.Generator().manual_seed(self.sampling.seed)
        with torch.no_grad():
            for parameter in named.values():
                size = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, generator=generator) * NOISE * (size or 0.1)
                parameter += noise.to(parameter)
        self.role.version += 1
        try:
            yield old
        finally:
            self._write(old)

    @contextmanager
    def _give_back(self, old: dict[str, Tensor], names: Sequence[str]) -> Iterator[None]:
        """Give some parameters their old weights while it is open."""
        named: dict[str, Any] = dict(self.role.module.named_parameters())
        present = {name: named[name].detach().clone() for name in names}
        self._write({name: old[name] for name in names})
        try:
            yield
        finally:
            self._write(present)

    def _write(self, weights: dict[str, Tensor]) -> None:
        """Write weights into the role's parameters."""
        named = dict(self.role.module.named_parameters())
        with torch.no_grad():
            for name, values in weights.items():
                named[name].copy_(values)


def _part(name: str) -> str:
    """Return the part of a model that a parameter belongs to: a layer, or the parameter itself outside of layers."""
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[place - 1 : place + 1])
    return ".".join(words[-2:-1]) or name
