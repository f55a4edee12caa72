"""Memory of a role on one device, as `rlhf-run plan` forecasts it, and the contributions of strategies and rollout engines.

All numbers are bytes unless a name states another unit. Core counts the parts of a whole copy of the role's model, on
shapes alone. A strategy then returns the share of one device (`Strategy.memory`), and a rollout engine the memory of
sampling (`Rollout.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelSize", "RoleMemory", "SamplingLoad"]


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a role's model."""

    parameters: int
    """number of parameters"""
    trained: int
    """number of trained parameters"""
    layer: int
    """number of parameters of the largest layer"""
    root: int
    """number of parameters outside of layers: embeddings, heads"""
    layers: int
    """number of layers"""
    vocabulary: int
    """size of the vocabulary of the language-model head; 0 without such a head"""
    compute_bytes: int
    """bytes of a number of the forward pass: 2 in bfloat16, 4 in float32"""
    cache_bytes: int
    """bytes of one token's keys and values in all layers"""
    shares_base: bool = False
    """True if it is another role's model without its adapters, and holds no weights itself"""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of a role, by part."""

    weights: int = 0
    """all weights, those of adapters and heads included"""
    gradients: int = 0
    """gradients of the trained parameters, from the first backward pass of a step to its update"""
    optimizer: int = 0
    """state of the optimizer, and a moving average of the weights"""
    activations: int = 0
    """most that a training pass holds in addition to the parts above: autograd's tensors, logits, temporary tensors"""
    overlap: int = 0
    """bytes that `gradients` and `activations` never hold at the same time, since gradients appear as activations are
    freed; 0 where a step has several micro-batches"""
    update: int = 0
    """temporary tensors of the update"""
    inference: int = 0
    """most that a forward pass without gradient holds in addition to the weights"""
    cache: int = 0
    """keys and values, and what else sampling holds, in the process of the role"""
    kept: int = 0
    """bytes of `cache` that a rollout engine holds between its calls, too, so also while roles train"""
    buffers: int = 0
    """bytes that a strategy holds permanently in addition: copies of weights, communication buffers"""
    gathered: int = 0
    """bytes of whole weights that a strategy gathers while the process of the role samples"""

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        return self.weights + self.optimizer + self.buffers

    @property
    def training(self) -> int:
        """Most that a training step adds to `resident`."""
        return max(self.gradients + self.activations - self.overlap, self.gradients + self.update)


@dataclass(frozen=True)
class SamplingLoad:
    """Samples of one step on one device."""

    prompts: int
    """distinct prompts"""
    completions: int
    """completions of each"""
    prompt_tokens: int
    """tokens of a prompt"""
    new_tokens: int
    """tokens of a completion"""
    prefill: int
    """bytes that a forward pass without gradient over all prompts holds in addition to the weights"""
    free_bytes: int = 0
    """memory of the device that weights and optimizers of all roles leave; 0 where it is not known"""
    device_bytes: int = 0
    """memory of the device; 0 where it is not known"""
    gathered: int = 0
    """bytes of whole weights that the strategy gathers for a sampler in the process of the role"""
    narrowed: int = 0
    """bytes of linear layers' weights in the dtype that the role computes in; 0 if it holds them in that dtype"""
