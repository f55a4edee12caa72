"""`--reward model`: a trained reward model, any sequence classifier with one score.

The model has its own tokenizer and chat template: prompt and completion come to it as the data had them and as the policy
wrote them, and are rendered and tokenized anew. The score is that of the last token, the end of turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions, check_attention
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import PRECISION, RewardOutput
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.data.chats import Text

__all__ = ["RewardModel", "RewardModelEngine"]


@dataclass(frozen=True)
class RewardModel(Reward):
    """A trained reward model: hub name or folder of a sequence classifier with one score."""

    model: str
    """hub name or folder, for example the output of rlhf-run reward"""
    mean: float = 0.0
    """value that is subtracted from each score"""
    std: float = 1.0
    """value that each score is divided by, after `mean` is subtracted"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the forward pass"""
    attention: str = "sdpa"
    """attention implementation: sdpa, eager, varlen, flash_attention_2, flash_attention_3, flash_attention_4, or a kernel of
    the hub"""
    trust_remote_code: bool = False
    """run model code that comes with the weights; only for models you trust"""
    micro_tokens: int = 16384
    """token budget of one forward pass, padding included; changes memory and speed, never results"""
    offload: bool = False
    """keep the model in CPU memory between calls"""
    encoding: Encoding = Encoding(too_long="truncate")
    """conversion of prompt and completion to this model's tokens"""

    def __post_init__(self) -> None:
        check_attention(self.attention)

    def open(self, context: OpenContext) -> RewardModelEngine:
        """Load the model: an error in it is raised before anything is sampled.

        Raises:
            UsageError: there is no such model, or it has no score head.
        """
        return RewardModelEngine(self)


class RewardModelEngine:
    """A reward model in memory, with its tokenizer.

    Args:
        reward: its options.
    """

    def __init__(self, reward: RewardModel) -> None:
        from rlhf_core.contract.plan import RoleSpec
        from rlhf_core.models.build import build_module
        from rlhf_core.models.loading.limits import most_positions
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        self.reward = reward
        options = ModelOptions(
            model=reward.model,
            dtype=reward.dtype,
            attention=reward.attention,
            trust_remote_code=reward.trust_remote_code,
        )
        tokenizer = load_tokenizer(reward.model, options)
        self.module: Any = build_module(RoleSpec("reward", options, frozenset({"scores_N"})))
        self.encoder = Encoder(tokenizer, reward.encoding.max_tokens, reward.encoding)
        self.encoder.positions = most_positions(reward.model, options)

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        output, _ = self.score_rollouts(rollouts)
        return output

    def score_rollouts(
        self, rollouts: Rollouts, further: frozenset[str] = frozenset()
    ) -> tuple[RewardOutput, dict[str, Tensor]]:
        """Return the rewards of completions, and the `further` outputs of the model in the same forward pass, by name."""
        prompts = [_prompt(meta) for meta in rollouts.meta]
        outputs, cut = self.infer(prompts, rollouts.texts, further | {"scores_N"})
        unscaled_N = outputs["scores_N"]
        metrics = {"score": unscaled_N, "cut": torch.full_like(unscaled_N, cut)}
        rewards_N = (unscaled_N - self.reward.mean) / self.reward.std
        return RewardOutput(rewards_N=rewards_N, metrics=metrics, precision=self._precision()), outputs

    def _precision(self) -> float:
        """Return the rounding of a normalized score, relative to 1: that of the model's dtype, before the scaling."""
        rounding = max(PRECISION, torch.finfo(getattr(torch, self.reward.dtype)).eps)
        return rounding * max(1.0, abs(self.reward.mean)) / self.reward.std

    def score(self, prompts: Sequence[Text], completions: Sequence[str | None]) -> tuple[Tensor, float]:
        """Normalized scores, and the share of the rows that had to be cut.

        A prompt is text or messages; one with None as completion is a text to be scored as it is, without a template.
        """
        outputs, cut = self.infer(prompts, completions, frozenset({"scores_N"}))
        return (outputs["scores_N"] - self.reward.mean) / self.reward.std, cut

    def infer(
        self, prompts: Sequence[Text], completions: Sequence[str | None], names: frozenset[str]
    ) -> tuple[dict[str, Tensor], float]:
        """Return outputs by name, a row per completion, float32; and the share of the rows that had to be cut."""
        from rlhf_core.models.inputs.arrange import arrange_inputs
        from rlhf_core.training.microbatch import bearable_padding, micro_rows

        examples = [_example(prompt, completion) for prompt, completion in zip(prompts, completions)]
        before = self.encoder.truncated
        batch = self.encoder.batch(examples, range(len(examples)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module.to(device)
        found: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        with torch.inference_mode():
            for rows in micro_rows(batch, self.reward.micro_tokens, padding=bearable_padding(self.module)):
                inputs = arrange_inputs(batch.rows(rows)).to(device)
                for name, values in self.module(inputs, names).items():
                    found[name].update(zip(torch.as_tensor(rows).tolist(), values.float().cpu(), strict=True))
        if self.reward.offload:
            self.module.to("cpu")
        cut = (self.encoder.truncated - before) / len(batch)
        return {name: torch.stack([rows[row] for row in range(len(batch))]) for name, rows in found.items()}, cut

    def close(self) -> None:
        """Free the model."""
        self.module = None


def _example(prompt: Text, completion: str | None) -> Example:
    if completion is not None:
        return Example(prompt, (completion,), origin="reward model")
    assert isinstance(prompt, str)
    return Example("", (prompt,))


def _prompt(meta: Any) -> Any:
    """The prompt as the data had it."""
    if "prompt" not in meta:
        raise ContractError(
            "reward model needs meta['prompt'] of each row, but the rollout engine did not pass it on; use another "
            "rollout"
        )
    return meta["prompt"]
