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
from rlhf_core.util.repeats import number_repeats
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
"""Metadata of a field that holds a provider of this kind: `use`, next to its options, names it."""

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
    """maximum number of tokens per completion (the finish reason is then `length`); with an environment, tokens of the
    whole episode, feedback included"""
    temperature: float = 1.0
    """divisor of the logits; 0 is greedy. Training log-probabilities use the same temperature"""
    top_p: float = 1.0
    """probability of the smallest set of tokens that is kept, above 0 and at most 1; 1 keeps all"""
    top_k: int = 0
    """number of most likely tokens that are kept; 0 keeps all"""
    min_p: float = 0.0
    """least probability of a kept token, as a share of the most likely token's, 0 to 1; 0 keeps all"""
    replay: Literal["on", "off"] = "on"
    """log-probabilities under top-p, top-k or min-p: `on` takes them over the tokens that the sampler kept, so that
    importance ratios are exact (DeepSeek-V3.2); `off` takes them over the whole vocabulary, and ratios are biased"""
    stop: tuple[str, ...] = ()
    """strings that end a completion; the completion keeps them"""
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
        with its own number `turn_uid(uid, k, turn)` and one completion.
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
    """weight (beta) of the KL penalty; 0 disables it, and then no reference model is loaded"""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL divergence, with d = log pi - log ref: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d (Schulman
    2020)"""
    where: Literal["reward", "loss"] = "reward"
    """place of the penalty: subtracted from each token's reward, or added to the loss with a gradient"""
    unbiased: bool = False
    """give the KL loss the gradient of KL(pi || ref), off-policy too (DeepSeek-V3.2); the estimate is still reported"""
    target: float | None = None
    """mean KL per completion, in nats, that `coef` is adapted to (Ziegler et al. 2019); the default keeps `coef`
    fixed"""
    horizon: int = 10000
    """number of completions over which the adaptive coefficient moves"""

    def __post_init__(self) -> None:
        at_least(0, self, "coef")
        finite(self, "coef")
        at_least(1, self, "horizon")
        if self.unbiased and self.where == "reward":
            raise OptionError(
                "unbiased", f"applies only to a KL penalty in the loss: set {option('where', 'loss')}, or leave it out"
            )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2022): the model's weights stay as they are, and only adapters and heads are trained."""

    rank: int = 0
    """rank of each adapter's update; 0 disables adapters and trains all weights"""
    alpha: int = 16
    """scale of the update, which is multiplied by alpha / rank"""
    dropout: float = 0.0
    """share of an adapter's inputs that is dropped in training, 0 to below 1; never dropped while sampling or
    comparing"""
    targets: tuple[str, ...] = ("all-linear",)
    """names of the linear layers to adapt, such as q_proj v_proj; all-linear takes all except the heads"""

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
    """hub name, folder, GGUF file, or `tiny`; empty takes the run's --model"""
    dtype: Literal["run", "float32", "bfloat16", "float16"] = "run"
    """dtype of this role's forward pass; `run` takes the run's --dtype"""
    attention: str = "sdpa"
    """attention implementation: sdpa, eager, varlen (torch's kernel for packed rows, which sdpa takes where it can),
    flash_attention_2, flash_attention_3, flash_attention_4, or a kernel of the hub such as kernels-community/flash-attn3"""
    packing: bool = field(default=True, metadata=FREE)
    """lay a micro-batch's rows end to end without padding, where attention can keep them apart (flash attention; sdpa
    on the CPU, and in half precision on a GPU); changes memory and speed, never results"""
    quantize: Literal["none", "nf4"] = "none"
    """hold frozen weights in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023); a trained role then needs adapters"""
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
                "packing", f"is required by attention varlen; leave it on, or choose {option('attention', 'sdpa')}"
            )


@dataclass(frozen=True)
class Tracking:
    """Weights that follow another role's: an opponent, a target network, a moving reference."""

    of: str = ""
    """trained role whose weights are copied at the start and then periodically; empty keeps the weights fixed"""
    every: int = 100
    """optimizer steps of the tracked role between two updates, which happen at the end of a step of the run"""
    decay: float = 0.0
    """decay of the moving average, decay * these weights + (1 - decay) * the tracked role's, 0 to below 1; 0 copies"""

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
    """A trained role's model and optimizer."""

    gradient_checkpointing: bool = False
    """recompute activations in the backward pass, which needs less memory and a third more time"""
    compile: bool = field(default=False, metadata=FREE)
    """compile the layers with torch.compile: faster on a GPU after a first step of up to a minute; rounding differs"""
    lora: Lora = Lora()
    """adapters"""
    freeze: tuple[str, ...] = ()
    """parts that are not trained: `embed`, `vision`, `body` (all except the heads), or parts of parameter names such as
    layers.0-3"""
    features: str = field(default="", metadata=FREE)
    """folder that caches the states of a frozen body, by weights and row, for later runs; empty caches in memory"""
    router_aux_coef: float = 0.0
    """weight of the auxiliary loss that balances the experts of a mixture of experts; usual values are 0.001 to 0.02"""
    ema: float = 0.0
    """per-step decay of the weights' exponential moving average, for example 0.99; 0 disables it"""
    ema_export: Literal["beside", "model"] = field(default="beside", metadata=FREE)
    """destination of the moving average: OUTPUT/model-ema in addition to the trained weights (`beside`), or
    OUTPUT/model in their place (`model`)"""
    optim: OptimizerProvider = field(default=AdamW(), metadata=OPTIMIZER)
    """optimizer of this role"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "router_aux_coef", "ema")
        if not self.ema < 1:
            raise OptionError("ema", f"must be below 1, not {self.ema}")
        if self.quantize != "none" and not self.lora.rank:
            raise OptionError(
                "quantize",
                f"{self.quantize} weights cannot be trained; add adapters, such as {option('lora.rank', 16)}",
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
    """registry that resolves names of outputs; the default uses everything installed"""
    model: str = ""
    """model to train: hub name, folder, GGUF file, or `tiny` (small, random, byte-level, no download); required"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the forward passes of all roles; --actor.dtype sets it for one role"""
    add_tokens: str = ""
    """file with new tokens, one per line, for the tokenizer and the models of all roles"""
    output: str = field(default="output", metadata=FREE)
    """output folder of the run"""
    steps: int = 100
    """training steps; each uses one batch"""
    epochs: float = 0.0
    """passes over the data, in place of --steps (0.5 is half a pass); 0 uses --steps"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same numbers"""
    deterministic: bool = False
    """use slower GPU kernels that add in a fixed order; an operation without such a kernel stops the run. The CPU is
    always deterministic"""
    resume: bool | Literal["auto"] = field(default=False, metadata=FREE)
    """continue the run in --output from its newest valid checkpoint; `auto` starts a new run if there is none"""
    resume_changed: bool = field(default=False, metadata=FREE)
    """resume even if options that affect results differ from the original run"""
    batch_size: int = 16
    """prompts (online) or rows (offline) per step, over all ranks"""
    update_epochs: int = 1
    """passes over the same batch before the next one (PPO epochs), not over the data"""
    minibatches: int = 1
    """optimizer steps per pass over a batch; 1 is strictly on-policy"""
    micro_tokens: int = field(default=8192, metadata=FREE)
    """token budget of one micro-batch, padding included; changes memory and speed, never results"""
    on_oom: Literal["stop", "halve"] = field(default="stop", metadata=FREE)
    """reaction to running out of memory in training or inference: stop, or halve the role's token budget and repeat the
    step (one process only)"""
    on_nonfinite: Literal["stop", "skip"] = field(default="stop", metadata=FREE)
    """reaction to a reward, loss or gradient that is nan or infinite: stop, or skip the role's optimizer step; the
    samples are saved in both cases"""
    max_mismatch: float = field(default=0.0, metadata=FREE)
    """largest mean difference between the log-probabilities of rollout engine and trainer on a step's tokens, in nats;
    0 takes 0.001 for roles in float32 and 0.05 for others"""
    on_mismatch: Literal["warn", "stop"] = field(default="warn", metadata=FREE)
    """reaction to a larger difference: log a warning in each such step, or stop before the weights are updated"""
    chunk: int = field(default=1024, metadata=FREE)
    """completion tokens whose logits are held at the same time; changes memory and speed, never results"""
    max_prompt_tokens: int = 1024
    """longest prompt in tokens; longer prompts are dropped and counted"""
    save_every: int = field(default=0, metadata=FREE)
    """steps between checkpoints; 0 saves only at the end"""
    save_async: bool = field(default=False, metadata=FREE)
    """write checkpoints in the background from a copy of weights and optimizer in CPU memory, if the strategy supports
    it"""
    stop_within: float = field(default=120.0, metadata=FREE)
    """seconds that a step may take after a signal to stop, and again for saving it; after that the step is abandoned"""
    keep: int = field(default=2, metadata=FREE)
    """number of newest checkpoints to keep"""
    keep_gb: float = field(default=0.0, metadata=FREE)
    """maximum total size of kept checkpoints in GB (the newest is always kept); 0 means no limit"""
    keep_best: str = field(default="", metadata=FREE)
    """metric (for example `eval/heldout/reward`) whose best checkpoint is also kept; `checkpoints/best.json` names it.
    Empty keeps none"""
    keep_best_mode: Literal["auto", "max", "min"] = field(default="auto", metadata=FREE)
    """direction of good values of --keep-best; auto takes low values for a loss, a negative log-likelihood and
    perplexity, high ones otherwise"""
    export_shard: str = field(default="5GB", metadata=FREE)
    """largest size of one weight file in OUTPUT/model, such as 5GB or 500MB"""
    export_dtype: Literal["base", "float32", "bfloat16", "float16"] = field(default="base", metadata=FREE)
    """dtype of the weights in OUTPUT/model; `base` takes the base model's. Adapters are float32"""
    push_to_hub: str = field(default="", metadata=FREE)
    """name on the Hugging Face hub, USER/NAME, to upload OUTPUT/model to at the end as a private model; empty uploads
    nothing"""
    report: bool = field(default=True, metadata=FREE)
    """write OUTPUT/report.html at the end: curves, evaluations, samples and times on one page"""
    record_every: int = field(default=0, metadata=FREE)
    """steps between two that are recorded in OUTPUT/record for `rlhf-run replay`; 0 records none"""
    eval_every: int = field(default=0, metadata=FREE)
    """steps between evaluations; 0 evaluates only at the start and the end, if an evaluator is chosen"""
    sampling: Sampling = field(default_factory=Sampling)
    """sampling options (online algorithms)"""
    episode: EpisodeLimits = field(default_factory=EpisodeLimits)
    """limits of an episode (with an environment)"""
    ahead: int = 0
    """maximum number of steps that are sampled while earlier ones are trained on; 0 alternates sampling and training,
    on-policy. The rollout engine needs its own weights, as every engine under --launcher ray has"""
    stale: Staleness = field(default_factory=Staleness)
    """treatment of tokens that older weights sampled (with --ahead)"""
    partial: PartialRollouts = field(default_factory=PartialRollouts)
    """completions that continue under new weights (with --ahead)"""
    replay: str = field(default="", metadata=FREE)
    """iterations.jsonl of a run with --ahead, to sample each step with the same version of the weights as that run;
    empty disables it"""
    callbacks: Mapping[str, tuple[Callable[..., Any], ...]] = field(
        default_factory=dict, metadata=INTERNAL, compare=False, repr=False
    )
    """functions of a Python user by observer hook"""
    option_names: OptionNames = field(default=OptionNames(), metadata=INTERNAL, compare=False, repr=False)
    """spelling of these options for the user, in messages"""

    def provider_paths(self, *kinds: str) -> Iterator[tuple[str, Any]]:
        """Every chosen provider (of `kinds`, if given) with the path of its options: `/reward`, `/evaluator.heldout`."""
        for kind in kinds or self.providers:
            chosen = self.providers.get(kind, ())
            several = chosen if isinstance(chosen, tuple) else (chosen,)
            names = number_repeats(self.names.get(kind, "").split(",")) if len(several) > 1 else [""] * len(several)
            for name, provider in zip(names, several, strict=True):
                yield f"/{kind}.{name}".rstrip("."), provider

    def names_of(self, kind: str) -> list[str]:
        """Return a name for each chosen provider of `kind`, in order; numbered where a name comes twice."""
        chosen = self.providers.get(kind, ())
        several = chosen if isinstance(chosen, tuple) else (chosen,)
        names = self.names.get(kind, "").split(",") if several else []
        if len(names) != len(several):
            names = [type(provider).__qualname__ for provider in several]
        return number_repeats(names)

    def __post_init__(self) -> None:
        at_least(0, self, "seed", "steps", "epochs", "chunk", "save_every", "eval_every", "keep_gb", "max_mismatch")
        at_least(0, self, "stop_within", "ahead", "record_every")
        at_least(1, self, "batch_size", "update_epochs", "minibatches", "micro_tokens", "max_prompt_tokens", "keep")
