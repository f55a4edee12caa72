"""vLLM's sampling parameters of one completion, from the run's sampling and the engine's options.

They are plain values under vLLM's names, as its servers take them; an engine that the run starts takes vLLM's own object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_rollout_vllm.kept_tokens import listed_tokens

if TYPE_CHECKING:
    from rlhf_core.contract.options import Sampling
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["Parameters", "check_temperature", "sampling_params"]

TEMPERATURE_LEAST = 0.01  # below it vLLM silently takes this one, but for 0

NEVER = -100.0  # the lowest bias on a logit that vLLM takes: e^-100 is never drawn

TOP_P_LEAST = 1e-6  # vLLM wants a number above 0; the most likely token is kept whatever it is

SEEDS = 1 << 63


def check_temperature(temperature: float) -> None:
    """Check that vLLM samples at this temperature.

    Raises:
        UsageError: it takes another one in silence.
    """
    if 0 < temperature < TEMPERATURE_LEAST:
        raise UsageError(
            f"vLLM cannot sample at temperature {temperature:g}; give {run_option('sampling.temperature', 0)} or at "
            f"least {TEMPERATURE_LEAST:g}, or use {run_option('rollout', 'hf')}"
        )


@dataclass(frozen=True)
class Parameters:
    """Makes the parameters of completions.

    Args:
        options: the provider.
        ends: ids that end a completion.
        width: tokens that the model's head has.
        lacking: ids of the head that the tokenizer has no token for; they are never drawn.
    """

    options: VLLMOptions
    ends: Sequence[int]
    width: int
    lacking: Sequence[int]

    def __post_init__(self) -> None:
        beyond = [token for token in self.options.logit_bias if int(token) >= self.width]
        if beyond:
            raise OptionError(
                "logit_bias", f"names the token {beyond[0]}, but the model has only {self.width} tokens; change it"
            )

    def __call__(self, sampling: Sampling, seed: int, max_tokens: int, whole_head: bool = False) -> dict[str, Any]:
        """Return one completion's parameters. It ends with the run's end tokens and with no other.

        Args:
            sampling: of the run.
            seed: of the completion.
            max_tokens: tokens after which it is cut.
            whole_head: sample from the role's own distribution: without biases, from all ids, in any shape.
        """
        bias = {} if whole_head else {int(token): value for token, value in self.options.logit_bias.items()}
        bias |= {} if whole_head else dict.fromkeys(self.lacking, NEVER)
        return {
            "temperature": sampling.temperature,
            "top_p": max(sampling.top_p, TOP_P_LEAST),
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": max_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": list(self.ends),
            "ignore_eos": True,  # vLLM's own idea of it
            "logit_bias": bias or None,
            "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop),  # only to find stop strings
            "seed": seed ^ self._own_seed,
            "logprobs": listed_tokens(sampling, self.width),  # and of the sampled token
            "structured_outputs": None if whole_head else self._guide(),
        }

    @property
    def is_guided(self) -> bool:
        """True if completions have a shape."""
        options = self.options
        return bool(options.guided_regex or options.guided_json or options.guided_choice)

    @property
    def _own_seed(self) -> int:
        """The engine's seed over all bits of a completion's; 0 for 0."""
        return int(self.options.seed * 0x9E3779B97F4A7C15) % SEEDS

    def _guide(self) -> dict[str, Any] | None:
        """Return the description of the shape; None where there is none."""
        if not self.is_guided:
            return None
        options = self.options
        schema = options.json_schema() if options.guided_json else None
        shape = {"regex": options.guided_regex, "json": schema, "choice": list(options.guided_choice)}
        return {name: value for name, value in shape.items() if value}


def sampling_params(parameters: Mapping[str, Any]) -> Any:
    """Return vLLM's `SamplingParams` of one completion, which is never shared.

    Args:
        parameters: what `Parameters` returned.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    guide = parameters["structured_outputs"]
    shape = {"structured_outputs": StructuredOutputsParams(**guide) if guide else None}
    return SamplingParams(**{**parameters, **shape}, flat_logprobs=True, skip_clone=True)
