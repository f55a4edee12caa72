"""Heads that map hidden states to outputs: a chunked language-model head, and scalar heads for values and scores.

Both take the place of a linear layer inside the Hugging Face model and share its parameters, so that names, tied weights,
saving and `generate` stay as they are, and their weights are read inside a module's own forward pass, where sharding
strategies gather them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.errors import UsageError
from rlhf_core.models.heads.logprobs import Head, token_logprobs
from rlhf_core.models.loading.deferral import compute_deferred, read_whole

__all__ = ["HEADS_FILE", "SCALAR", "ChunkedHead", "ScalarHead", "check_logits", "generator_for", "head_options"]

SCALAR = {"scores_N": "score", "values_NT": "value"}
"""Outputs of scalar heads, and the heads' names."""

HEADS_FILE = "heads.safetensors"
"""Scalar heads that are no part of the Hugging Face model, saved next to its weights."""


class _SharedLinear(nn.Linear):
    """A linear layer with another's parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # not Linear's: it would draw new weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias


class ChunkedHead(_SharedLinear):
    """A language-model head that gives the log-probabilities of given tokens, or logits where none are given.

    Args:
        linear: the model's own head.
        chunk, temperature, scale, softcap: see `token_logprobs`. Logits are the model's raw ones: it scales them itself.

    `most_logits` is the argument `most` of `token_logprobs`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        chunk: int = 1024,
        temperature: float = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(linear)
        self.chunk, self.temperature, self.scale, self.softcap = chunk, temperature, scale, softcap
        self.most_logits = 0
        self._disable_adapters = False  # as PEFT's layers call it

    # the sub-class asks for more than a linear layer does, and gives more
    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets_M: Tensor | None = None, entropy: bool = False, scaled: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits of `hidden`; with targets, log-probabilities and entropies of (M, H) states, each (M,).

        `scaled` logits are those that a softmax takes: float32, after scale, soft cap and temperature; with targets, theirs
        alone (M,), for which nothing else of the vocabulary is read.
        """
        if scaled:
            head = Head(self.temperature, self.scale, self.softcap)
            if targets_M is not None:
                wide = torch.promote_types(hidden.dtype, torch.float32)
                logits_M = (hidden.to(wide) * self._acting_weight().index_select(0, targets_M).to(wide)).sum(1)
                return head.to_logits(logits_M if self.bias is None else logits_M + self.bias[targets_M])
            return head.to_logits(nn.functional.linear(hidden.to(self.weight.dtype), self._acting_weight(), self.bias))
        if targets_M is None:
            return nn.functional.linear(hidden, self._acting_weight(), self.bias)
        return token_logprobs(
            hidden,
            self._acting_weight(),
            targets_M,
            bias_V=self.bias,
            temperature=self.temperature,
            scale=self.scale,
            softcap=self.softcap,
            chunk=self.chunk,
            most=self.most_logits,
            entropy=entropy,
        )

    def adapt(self, rank: int, alpha: int) -> None:
        """Put an adapter on the head; nothing changes until its `lora_B` does."""
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.update_scale = alpha / rank

    @property
    def is_adapted(self) -> bool:
        """Return True if the head has an adapter."""
        return "lora_A" in self._parameters

    def _acting_weight(self) -> Tensor:
        """The matrix (V, H) that acts: with an adapter, a second one of this size for as long as it is used."""
        if not self.is_adapted or self._disable_adapters:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight + (self.update_scale * (self.lora_B @ self.lora_A)).to(self.weight.dtype)


class ScalarHead(_SharedLinear):
    """A linear layer to one number, computed in float32 whatever the model computes in."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)

    @classmethod
    def new(cls, hidden: int, dtype: torch.dtype) -> ScalarHead:
        """A head that belongs to no model yet; call `reset` on it or load it."""
        return cls(nn.utils.skip_init(nn.Linear, hidden, 1, bias=False, dtype=dtype))

    @torch.no_grad()
    def reset(self, seed: str) -> None:
        """Draw the weight from N(0, s^2) with s = 1 / (hidden + 1), so that first values and scores are near zero.

        The numbers depend on `seed` alone, not on the global random state.
        """
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator_for(seed)) / (self.in_features + 1))
        if self.bias is not None:
            self.bias.zero_()


def head_options(config: Any) -> dict[str, Any]:
    """Return how the model scales its logits: Gemma's soft cap, Cohere's and Falcon-H1's factor, Granite's divisor."""
    text = config.get_text_config()
    scale = 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(text, name, None)
        scale *= factor if isinstance(factor, float | int) and factor else 1.0
    return {"scale": scale, "softcap": getattr(text, "final_logit_softcapping", None)}


@torch.no_grad()
def check_logits(name: str, model: Any) -> None:
    """Check that the model is causal and its chunked head gives what it gives itself: small passes, no list of architectures.

    Raises:
        UsageError: it is not, it does not, or a pass fails.
    """
    with compute_deferred(model) as deferred:
        try:
            return _check_logits(name, model)
        except UsageError:
            if not deferred:
                raise
    read_whole(model, f"{name} uses weights of a module outside of it")
    return _check_logits(name, model)


def _check_logits(name: str, model: Any) -> None:
    """Check the logits of a model that computes."""
    ids_NS = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)  # rows of one beginning
    head, tolerance = model.get_output_embeddings(), 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        states_NSH = model.base_model(input_ids=ids_NS, use_cache=False)[0][:, :-1]
        ours, _ = head(states_NSH[0], ids_NS[0, 1:])
        logits = model(input_ids=ids_NS[:1], use_cache=False).logits[0, :-1].float() / head.temperature
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any architecture, and configurations that contradict themselves
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{name!r} ({type(model).__name__}) fails in a forward pass of 4 tokens: {first}") from error
    if not torch.allclose(states_NSH[0], states_NSH[1], rtol=tolerance, atol=tolerance / 10):
        raise UsageError(
            f"{name!r} ({type(model).__name__}) is not a causal language model: its output for a token depends on "
            "later tokens"
        )
    theirs = logits.log_softmax(-1).gather(1, ids_NS[0, 1:, None]).squeeze(1)
    # logits of about 20 are rounded to 0.06 in bfloat16
    if not torch.allclose(ours, theirs, rtol=0.0, atol=tolerance):
        raise UsageError(
            f"{name!r} ({type(model).__name__}) computes its logits in an unsupported way: the log-probability of a "
            f"test token is {theirs[0]:.4f}, but rlhf-core computes {ours[0]:.4f}"
        )


def generator_for(text: str) -> torch.Generator:
    """A generator whose numbers depend on `text` alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
