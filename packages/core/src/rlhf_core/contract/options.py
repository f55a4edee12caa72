"""A run's options: one frozen dataclass, the same from Python, TOML and the command line.

Core's own options are few; everything else belongs to the provider or the role it concerns. Field docstrings are what
`--help` prints. No torch here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_core.contract.episode_limits import EpisodeLimits
from rlhf_core.contract.optimizers import AdamW, OptimizerProvider
from rlhf_core.contract.ranges import at_least, at_most, finite
from rlhf_core.contract.registry_view import RegistryView
from rlhf_core.contract.staleness import PartialRollouts, Staleness
from rlhf_core.errors import OptionError, option
from rlhf_core.option_text import OptionNames
from rlhf_core.util.suggestions import did_you_mean

__all__ = [
    "KL",
    "EpisodeLimits",
    "Lora",
    "ModelOptions",
    "RunConfig",
    "Sampling",
    "Tracking",
    "TrackingOptions",
    "TrainedOptions",
    "check_attention",
    "turn_uid",
]

INTERNAL = {"internal": True}
"""Metadata of a field that is not an option: it is set by the system and neither shown nor written."""

OPTIMIZER = {"kind": "optimizer"}
"""Metadata of a field that holds a provider of this kind: `use` beside its options names which."""

ATTENTION = ("sdpa", "eager", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention implementations by name; kernels of the hub are `owner/kernel`."""

FREE = {"free": True}
"""Metadata of an option that changes no result: a resumed run may have another value of it."""


@dataclass(frozen=True)
class Sampling:
    """Options for sampling completions."""

    n: int = 4
    """completions per prompt"""
    max_new_tokens: int = 128
    """tokens after which a completion is cut (its finish reason is then `length`); with an environment those of the whole
    episode, feedback included"""
    temperature: float = 1.0
    """divides the logits; 0 is greedy. Training log-probabilities use the same temperature"""
    top_p: float = 1.0
    """keep the smallest set of tokens with at least this probability; 1 keeps all"""
    top_k: int = 0
    """keep the k most likely tokens; 0 keeps all"""
    min_p: float = 0.0
    """keep tokens with at least this share of the most likely one's probability; 0 keeps all"""
    replay: Literal["on", "off"] = "on"
    """under top-p, top-k or min-p: take the policy's log-probabilities over the tokens that the sampler kept, so that ratios
    are those of the policy that sampled (DeepSeek-V3.2); off takes them over the whole vocabulary, and ratios are biased"""
    stop: tuple[str, ...] = ()
    """strings that end a completion (kept in it)"""
    seed: int = field(default=0, metadata=INTERNAL)
    """base of the per-completion seeds; the loop sets it from the run's seed and the step"""

    def __post_init__(self) -> None:
        at_least(1, self, "n", "max_new_tokens")
        at_least(0, self, "temperature", "top_p", "top_k", "min_p")
        at_most(1, self, "top_p", "min_p")
        finite(self, "temperature")

    def seed_for(self, uid: int, k: int, turn: int = 0) -> int:
        """Return the 63-bit seed of a turn of completion `k` of the prompt `uid`.

        It is the same on any engine, rank or batch composition. Engines leave `turn` out: a later turn reaches them as a prompt
        of its own, with the number `turn_uid(uid, k, turn)` and one completion.
        """
        if turn:
            uid, k = turn_uid(uid, k, turn), 0
        return _number(f"{self.seed}/{uid}/{k}")


def turn_uid(uid: int, k: int, turn: int) -> int:
    """Return the number of the prompt that asks for a later turn (from 1) of completion `k` of the prompt `uid`."""
    return _number(f"{uid}/{k}/{turn}")


def _number(text: str) -> int:
    """Return 63 bits that follow from `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class KL:
    """The penalty that keeps the policy near the reference."""

    coef: float = 0.02
    """beta; 0 switches the penalty off, and then no reference model is loaded"""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """with d = log pi - log ref: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d (Schulman 2020)"""
    where: Literal["reward", "loss"] = "reward"
    """subtracted from each token's reward, or added to the loss with a live gradient"""
    unbiased: bool = False
    """in the loss: the estimate is reported, and the gradient is that of KL(pi || ref), off-policy too (DeepSeek-V3.2)"""
    target: float | None = None
    """adapt `coef` so that the mean KL per completion approaches this (Ziegler et al. 2019); fixed where absent"""
    horizon: int = 10000
    """completions over which the adaptive coefficient moves"""

    def __post_init__(self) -> None:
        at_least(0, self, "coef")
        finite(self, "coef")
        at_least(1, self, "horizon")
        if self.unbiased and self.where == "reward":
            raise OptionError(
                "unbiased", f"is about the gradient of a KL in the loss: set {option('where', 'loss')}, or leave it out"
            )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2022): the model's weights stay as they are, and only adapters and heads are trained."""

    rank: int = 0
    """rank of the update of each adapted matrix; 0 trains all weights and has no adapters"""
    alpha: int = 16
    """the update is multiplied by alpha / rank"""
    dropout: float = 0.0
    """share of an adapter's inputs that a training pass drops, 0 to 1; never while sampling or comparing"""
    targets: tuple[str, ...] = ("all-linear",)
    """names of the linear layers that are adapted, as q_proj v_proj; all-linear is all of them but the heads"""

    def __post_init__(self) -> None:
        at_least(0, self, "rank", "dropout")
        at_least(1, self, "alpha")
        if not self.dropout < 1:
            raise OptionError("dropout", f"must be below 1, not {self.dropout}")


def check_attention(name: str) -> None:
    """Check the name of an attention implementation.

    Raises:
        OptionError: it is none that there is, and no `owner/kernel` of the hub.
    """
    if name not in ATTENTION and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?", name):
        raise OptionError(
            "attention",
            f"must be one of {', '.join(ATTENTION)}, or a kernel of the hub such as kernels-community/flash-attn3, "
            f"not {name!r}{did_you_mean(name, ATTENTION)}",
        )


@dataclass(frozen=True)
class ModelOptions:
    """A frozen role's model."""

    model: str = ""
    """hub name, folder, GGUF file, or `tiny`; the run's --model where empty"""
    dtype: Literal["run", "float32", "bfloat16", "float16"] = "run"
    """what the forward pass computes in; `run` is the run's --dtype"""
    attention: str = "sdpa"
    """attention implementation: sdpa, eager, varlen (torch's kernel for packed rows, which sdpa takes where it can),
    flash_attention_2, flash_attention_3, flash_attention_4, or a kernel of the hub such as kernels-community/flash-attn3"""
    packing: bool = field(default=True, metadata=FREE)
    """lay a micro-batch's rows end to end and compute no padding, where attention can keep them apart: flash attention, and
    sdpa on the CPU and in half precision on a GPU; changes memory and speed, never results"""
    quantize: Literal["none", "nf4"] = "none"
    """hold frozen weights in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023); a trained role needs adapters then"""
    trust_remote_code: bool = False
    """run model code that comes with the weights; only for models you trust"""
    add_tokens: str = field(default="", metadata=INTERNAL)
    """the run's"""

    @property
    def compute_dtype(self) -> str:
        """The dtype in torch's words; float32 where no run names one."""
        return "float32" if self.dtype == "run" else self.dtype

    def __post_init__(self) -> None:
        check_attention(self.attention)
        if self.attention == "varlen" and not self.packing:
            raise OptionError(
                "packing", f"is what attention varlen is for; leave it on, or choose {option('attention', 'sdpa')}"
            )


@dataclass(frozen=True)
class Tracking:
    """Weights that follow another role's: an opponent, a target network, a moving reference."""

    of: str = ""
    """trained role whose weights are taken, at the start and then every so many steps; empty keeps the weights as they are"""
    every: int = 100
    """optimiser steps of that role from one update of these weights to the next, counted at the end of a step of the run"""
    decay: float = 0.0
    """0 copies; above, an exponential moving average, decay * these weights + (1 - decay) * that role's"""

    def __post_init__(self) -> None:
        at_least(1, self, "every")
        at_least(0, self, "decay")
        if not self.decay < 1:
            raise OptionError("decay", f"must be below 1, not {self.decay}")


@dataclass(frozen=True)
class TrackingOptions(ModelOptions):
    """The model of a role that no term trains and that may follow one."""

    track: Tracking = Tracking()
    """weights that follow another role's"""


@dataclass(frozen=True)
class TrainedOptions(ModelOptions):
    """A trained role's model and optimiser."""

    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    compile: bool = field(default=False, metadata=FREE)
    """compile the layers with torch.compile: less time on a GPU, after a first step of up to a minute; rounding differs"""
    lora: Lora = Lora()
    """adapters"""
    freeze: tuple[str, ...] = ()
    """parts that are not trained: `embed`, `vision`, `body` (all but the heads), or parts of parameter names as layers.0-3"""
    features: str = field(default="", metadata=FREE)
    """folder where states of a frozen body are kept by weights and row, for later runs; empty keeps them in memory"""
    router_aux_coef: float = 0.0
    """weight of the auxiliary loss that balances the experts of a mixture of experts; 0.001 to 0.02 are usual"""
    ema: float = 0.0
    """decay a step of an exponential moving average of the weights, as 0.99; 0 keeps none"""
    ema_export: Literal["beside", "model"] = field(default="beside", metadata=FREE)
    """write the average to OUTPUT/model-ema beside the trained weights, or as OUTPUT/model in their place"""
    optim: OptimizerProvider = field(default=AdamW(), metadata=OPTIMIZER)
    """optimizer of this role"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "router_aux_coef", "ema")
        if not self.ema < 1:
            raise OptionError("ema", f"must be below 1, not {self.ema}")
        if self.quantize != "none" and not self.lora.rank:
            raise OptionError(
                "quantize", f"{self.quantize} cannot be trained alone; add adapters, such as {option('lora.rank', 16)}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of. `Run(config)` runs it; `OUTPUT/config.toml` repeats it."""

    algorithm: Any
    """the algorithm provider"""
    providers: Mapping[str, Any]
    """the chosen provider of each kind the algorithm uses (and strategy, launcher); evaluators and observers are tuples"""
    names: Mapping[str, str]
    """the registered name (or `module:Class`) of each of them, `algorithm` included"""
    roles: Mapping[str, ModelOptions]
    """options per role"""
    uses: Mapping[str, str] = field(default_factory=dict)
    """the registered name (or `module:Class`) of each provider inside a role's options, by path: `actor.optim`"""
    registry: RegistryView | None = field(default=None, compare=False, repr=False)
    """where outputs are looked up by name; everything installed where absent"""
    model: str = ""
    """model to train: hub name, folder, GGUF file, or `tiny` to try (small, random, byte-level, no download); must be given"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what the forward passes of all roles compute in, but of those with a dtype of their own (--actor.dtype)"""
    add_tokens: str = ""
    """file with new tokens, one a line, for the tokenizer and the models of all roles"""
    output: str = field(default="output", metadata=FREE)
    """folder of the run"""
    steps: int = 100
    """training steps; each uses one batch"""
    epochs: float = 0.0
    """passes over the data, in place of --steps (0.5 is half a pass); 0 trains --steps"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same numbers"""
    deterministic: bool = False
    """on a GPU too: slower kernels that add in a fixed order; an operation that has none stops the run. A CPU needs no flag"""
    resume: bool | Literal["auto"] = field(default=False, metadata=FREE)
    """continue the run in --output from its newest valid checkpoint; `auto` begins it if there is none"""
    resume_changed: bool = field(default=False, metadata=FREE)
    """continue it although options that change results are not those it began with"""
    batch_size: int = 16
    """prompts (online) or rows (offline) per step, over all ranks"""
    update_epochs: int = 1
    """passes over the same batch before the next (PPO epochs), not over the data"""
    minibatches: int = 1
    """optimiser steps per pass over a batch; 1 is strictly on-policy"""
    micro_tokens: int = field(default=8192, metadata=FREE)
    """token budget of one micro-batch, padding included; changes memory and speed, never results"""
    on_oom: Literal["stop", "halve"] = field(default="stop", metadata=FREE)
    """out of memory in training or inference: stop, or halve the role's token budget and do the step again (one process)"""
    on_nonfinite: Literal["stop", "skip"] = field(default="stop", metadata=FREE)
    """a reward, loss or gradient is nan or infinite: stop, or leave the role's optimiser step out; samples are kept"""
    max_mismatch: float = field(default=0.0, metadata=FREE)
    """largest mean difference between the log-probabilities of rollout engine and trainer on a step's tokens; 0 is 0.001 for
    roles in float32 and 0.05 for others"""
    on_mismatch: Literal["warn", "stop"] = field(default="warn", metadata=FREE)
    """a larger difference: log a warning in each such step, or stop before the weights are updated"""
    chunk: int = field(default=1024, metadata=FREE)
    """completion tokens whose logits are held at a time; changes memory and speed, never results"""
    max_prompt_tokens: int = 1024
    """longer prompts are dropped and counted"""
    save_every: int = field(default=0, metadata=FREE)
    """steps between checkpoints; 0 saves at the end only"""
    save_async: bool = field(default=False, metadata=FREE)
    """write checkpoints in the background, from a copy in CPU memory of weights and optimizer, where the strategy can"""
    stop_within: float = field(default=120.0, metadata=FREE)
    """seconds that a step may last after a signal to stop, and saving it again as long; then the step is given up"""
    keep: int = field(default=2, metadata=FREE)
    """newest checkpoints kept"""
    keep_gb: float = field(default=0.0, metadata=FREE)
    """maximum total size of kept checkpoints in GB (the newest is always kept); 0 means no limit"""
    keep_best: str = field(default="", metadata=FREE)
    """a metric (`eval/heldout/reward`, say) whose best checkpoint stays too; `checkpoints/best.json` names it"""
    keep_best_mode: Literal["auto", "max", "min"] = field(default="auto", metadata=FREE)
    """high or low values of it are good; auto is low for a loss, a negative log-likelihood and perplexity, else high"""
    export_shard: str = field(default="5GB", metadata=FREE)
    """largest file of weights in OUTPUT/model, as 5GB or 500MB"""
    export_dtype: Literal["base", "float32", "bfloat16", "float16"] = field(default="base", metadata=FREE)
    """dtype of the weights in OUTPUT/model; `base` is the base model's own. Adapters are float32"""
    push_to_hub: str = field(default="", metadata=FREE)
    """name on the Hugging Face hub, USER/NAME, that OUTPUT/model is uploaded to at the end, private; empty uploads nothing"""
    report: bool = field(default=True, metadata=FREE)
    """write OUTPUT/report.html at the end: curves, evaluations, samples and times on one page"""
    record_every: int = field(default=0, metadata=FREE)
    """steps from one to the next that is kept in OUTPUT/record, for `rlhf-run replay`; 0 keeps none"""
    eval_every: int = field(default=0, metadata=FREE)
    """steps between evaluations; 0 evaluates at start and end only, if an evaluator is chosen"""
    sampling: Sampling = field(default_factory=Sampling)
    """how completions are drawn (online algorithms)"""
    episode: EpisodeLimits = field(default_factory=EpisodeLimits)
    """limits of an episode (with an environment)"""
    ahead: int = 0
    """steps that are sampled while earlier ones are trained on, at most; 0 samples and trains in turn, on-policy. The rollout
    engine needs weights of its own, such as every engine under --launcher ray"""
    stale: Staleness = field(default_factory=Staleness)
    """what happens to tokens that older weights sampled (with --ahead)"""
    partial: PartialRollouts = field(default_factory=PartialRollouts)
    """completions that go on under new weights (with --ahead)"""
    replay: str = field(default="", metadata=FREE)
    """iterations.jsonl of a run with --ahead: each step is sampled with the weights that sampled it there; empty: at once"""
    callbacks: Mapping[str, tuple[Callable[..., Any], ...]] = field(
        default_factory=dict, metadata=INTERNAL, compare=False, repr=False
    )
    """functions of a Python user by observer hook"""
    option_names: OptionNames = field(default=OptionNames(), metadata=INTERNAL, compare=False, repr=False)
    """how the user writes these options, for messages"""

    def provider_paths(self, *kinds: str) -> Iterator[tuple[str, Any]]:
        """Every chosen provider (of `kinds`, if given) with the path of its options: `/reward`, `/evaluator.heldout`."""
        for kind in kinds or self.providers:
            chosen = self.providers.get(kind, ())
            several = chosen if isinstance(chosen, tuple) else (chosen,)
            names = self.names.get(kind, "").split(",")
            for name, provider in (
                zip(names, several, strict=True) if len(several) > 1 else [("", each) for each in several]
            ):
                yield f"/{kind}.{name}".rstrip("."), provider

    def names_of(self, kind: str) -> list[str]:
        """Return a name for each chosen provider of `kind`, in order; numbered where a name comes twice."""
        chosen = self.providers.get(kind, ())
        several = chosen if isinstance(chosen, tuple) else (chosen,)
        names = self.names.get(kind, "").split(",") if several else []
        if len(names) != len(several):
            names = [type(provider).__qualname__ for provider in several]
        return [
            name if names.count(name) == 1 else f"{name}.{names[: i + 1].count(name)}" for i, name in enumerate(names)
        ]

    def __post_init__(self) -> None:
        at_least(0, self, "seed", "steps", "epochs", "chunk", "save_every", "eval_every", "keep_gb", "max_mismatch")
        at_least(0, self, "stop_within", "ahead", "record_every")
        at_least(1, self, "batch_size", "update_epochs", "minibatches", "micro_tokens", "max_prompt_tokens", "keep")
