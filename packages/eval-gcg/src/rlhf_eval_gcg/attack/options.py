"""The options of an attack: a frozen dataclass whose defaults are those of this package's own schedule.

The defaults of the original (Zou et al.; nanoGCG) are `Attack.original()`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.errors import OptionError

__all__ = ["SCHEDULES", "Attack"]

SCHEDULES = {
    "gcg": "rlhf_eval_gcg.attack.schedules.gcg:Gcg",
    "acg": "rlhf_eval_gcg.attack.schedules.acg:Acg",
    "momentum": "rlhf_eval_gcg.attack.schedules.momentum:Momentum",
    "probe": "rlhf_eval_gcg.attack.schedules.probe:Probe",
}
"""Import paths of the suffix optimizers, by name."""


@dataclass(frozen=True)
class Attack:
    """Options of an attack's search for a suffix."""

    steps: int = 250
    """steps per goal: each computes the gradient of a suffix once and the losses of the candidates drawn from it"""
    max_flops: float = 0.0
    """stop a goal after this many floating-point operations; 0 means no limit"""
    flop_rule: Literal["counted", "2nt"] = "counted"
    """count of operations: `counted` counts matrix multiplications as they are executed (torch's own counter); `2nt` is
    the convention of papers, 2NT forward and 4NT backward for N parameters and T tokens"""
    schedule: str = "acg"
    """gcg, acg (few candidates early, improvements are merged), momentum, probe (a draft model chooses), or the import path of
    a suffix optimizer, `module:Class`"""
    search_width: int = 512
    """number of candidates per step; the maximum in acg, which starts with a 32nd"""
    topk: int = 256
    """number of tokens with the most negative gradient that replacements are drawn from; acg draws the first most"""
    n_replace: int = 1
    """number of tokens that a candidate replaces; acg merges candidates that improve, and so replaces more"""
    buffer: int = 0
    """number of best suffixes to keep, continuing from the best; 0 always moves to the best candidate of the step. Not for acg,
    which keeps the best suffix in any case, nor for objective `reward`, whose losses of two steps cannot be compared"""
    momentum: float = 0.4
    """share of the earlier steps' gradients in schedule `momentum`, 0 to below 1"""
    quote: bool = True
    """let acg draw replacements from the target's own tokens too, which models tend to repeat; False draws those of the
    gradient only"""
    objective: Literal["target", "bad_set", "reward"] = "target"
    """target: the target's loss; bad_set: minus the log-probability that the target or a text of the bad set is given; reward:
    the mean reward of sampled answers (REINFORCE)"""
    loss: Literal["cross_entropy", "mellowmax", "cw"] = "cross_entropy"
    """loss of objective `target`: mean cross-entropy, mellowmax over its logits, or Carlini-Wagner's margin to the runner-up"""
    mellowmax_alpha: float = 1.0
    """sharpness of mellowmax: near 0 it is the mean over the target's tokens, large the worst of them"""
    cw_margin: float = 1e-3
    """margin in logits beyond which loss `cw` is satisfied with a token"""
    early_stop: bool = False
    """stop a goal when greedy decoding gives its whole target"""
    ascii: bool = True
    """replace tokens by printable ASCII only"""
    filter_ids: bool = True
    """drop candidates whose text does not become the same tokens again in its place in the chat"""
    prefix_cache: bool = True
    """compute the common beginning of candidates once"""
    batch_tokens: int = 16384
    """maximum number of tokens in a forward pass over candidates; halved when memory runs out"""
    suffix: str = "x x x x x x x x x x"
    """the initial suffix"""
    separator: str = " "
    """text between the question and the initial suffix; the attack may replace it"""
    suffix_place: Literal["end", "before", "marker"] = "end"
    """place of the suffix: `end` after the question; `before` before it; `marker` in place of `marker` in the
    question"""
    marker: str = "{suffix}"
    """text that the suffix replaces if suffix_place is marker"""
    system: str = ""
    """system prompt; empty uses none"""
    chat: bool = True
    """use the tokenizer's chat template; False attacks plain text: system prompt, a blank line, question with suffix, a
    line break, target"""
    add_space: bool = False
    """put a blank before the target"""
    restarts: int = 1
    """number of independent suffixes per goal, attacked in one batch; the best one counts"""
    goals_at_once: int = 0
    """number of goals (and restarts) that are attacked together; 0 fills a batch (8 in the evaluator), and takes one at
    a time on a CPU"""
    transfer: bool = False
    """search one suffix for all goals (and all models) together; the loss is the mean over them"""
    reward_samples: int = 8
    """number of answers sampled per step by objective `reward`"""
    sample_tokens: int = 32
    """maximum number of tokens of an answer sampled by objective `reward`"""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "search_width", "topk", "n_replace", "batch_tokens", "restarts", "sample_tokens")
        at_least(0, self, "max_flops", "buffer", "momentum", "cw_margin", "goals_at_once")
        finite(self, "mellowmax_alpha", "cw_margin", "momentum")
        if not self.mellowmax_alpha > 0:
            raise OptionError("mellowmax_alpha", f"must be above 0, not {self.mellowmax_alpha}")
        if self.reward_samples < 2:
            raise OptionError(
                "reward_samples",
                f"must be at least 2, since the baseline is the mean of the other samples, not {self.reward_samples}",
            )
        if self.momentum >= 1:
            raise OptionError("momentum", f"must be below 1, not {self.momentum}")
        if self.schedule not in SCHEDULES and ":" not in self.schedule:
            raise OptionError("schedule", f"must be {', '.join(SCHEDULES)} or module:Class, not {self.schedule!r}")
        self._check_together()
        if self.suffix_place == "marker" and not self.marker:
            raise OptionError("marker", "must not be empty with suffix_place marker")
        if not self.suffix.strip():
            raise OptionError("suffix", "must contain at least one token that is not a blank")

    def _check_together(self) -> None:
        """Raise `OptionError` for an option that another one leaves without effect."""
        if self.buffer and self.schedule == "acg":
            raise OptionError(
                "buffer",
                f"must be 0 with schedule acg, which keeps the best suffix in any case, not {self.buffer}; choose "
                "schedule gcg, momentum or probe, or leave it out",
            )
        if self.objective == "target":
            return
        if self.buffer and self.objective == "reward":
            raise OptionError(
                "buffer",
                f"must be 0 with objective reward, not {self.buffer}: its answers are new in each step, so losses of two "
                "steps cannot be compared",
            )
        if self.loss != "cross_entropy":
            raise OptionError(
                "loss", f"{self.loss} works only with objective target; objective {self.objective} has its own loss"
            )
        if self.early_stop:
            raise OptionError(
                "early_stop", f"works only with objective target; objective {self.objective} has no single answer"
            )

    @classmethod
    def original(cls, **changes: Any) -> Attack:
        """Return the options of the original attack as RePULSe runs it, with `changes`."""
        return cls(**{"schedule": "gcg", "separator": "", **changes})

    def search_options(self) -> Attack:
        """Return the attack options of an object that inherits from this class, without what it adds."""
        return Attack(**{field.name: getattr(self, field.name) for field in fields(Attack)})
