"""`--rollout fake`: a rollout engine without a model, for tests and costing of placement, queues, sync and recovery.

Its results can be calculated by hand, and every call takes the configured time. Its log-probabilities are those of
the strategy `fake`, with the trained number as it was when the weights were last taken: a stale engine shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from rlhf_core.contract.providers import Rollout
from rlhf_core.errors import ContractError, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.clock import current_time, sleep

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.memory import ModelSize, SamplingLoad
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.roles import Role

__all__ = ["FakeEngine", "FakeRollout", "Letters"]

PARTS = frozenset({"weights", "cache"})


@dataclass(frozen=True)
class FakeRollout(Rollout):
    """Simulated engine without a model: completions follow from their seeds, and calls take stated times.

    Completion `k` of a prompt has `1 + s mod max_new_tokens` tokens, where `s = sampling.seed_for(uid, k)`: letters of the
    alphabet in turn (tokens 1 to 26), from the `s mod 26`-th. It ends with EOS (token 0), which counts, unless it has
    `max_new_tokens`; then it was cut. The log-probability of a token is `-(1 + token mod 7) + w`.
    """

    token_seconds: float = 0.0
    """time of a decoding step in seconds; a call takes as many steps as its longest completion has tokens"""
    prompt_seconds: float = 0.0
    """time to read 1,000 prompt tokens, in seconds"""
    sync_seconds: float = 0.0
    """time to take new weights, in seconds"""
    wake_seconds: float = 0.0
    """time to wake up, and again to fall asleep, in seconds"""
    weights_gib: float = 0.0
    """memory that its weights are reported to take, in GiB"""
    cache_gib: float = 0.0
    """memory that its key-value cache is reported to take, in GiB"""

    has_own_weights: ClassVar[bool] = True
    """the engine has its own copy of the trained number"""
    takes_weights_midway: ClassVar[bool] = True
    """a call pauses while the number arrives"""

    def memory(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return the stated memory."""
        return int((self.weights_gib + self.cache_gib) * 2**30)

    def open(self, context: OpenContext) -> FakeEngine:
        """Return an engine that is awake and has no weights yet."""
        return FakeEngine(self)


class FakeEngine(Rollout):
    """State of the engine.

    Args:
        options: the stated times.
    """

    has_own_weights: ClassVar[bool] = True
    takes_weights_midway: ClassVar[bool] = True

    def __init__(self, options: FakeRollout) -> None:
        self.options = options
        self.w: float | None = None
        """the number that the strategy `fake` trains, as last taken"""
        self.version = 0
        self.asleep: frozenset[str] = frozenset()
        """parts whose memory is given back: `weights`, `cache`"""
        self._call: _Call | None = None
        """the call in progress"""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Letters, after the time it takes. A decoding step ends under the weights that it began with."""
        from rlhf_core.rollout.assemble import assemble

        if self.asleep:
            raise ContractError("the rollout engine 'fake' was called while asleep; call wake() first")
        if self.w is None:
            self.sync(role)
        assert self.w is not None
        limits = prompts.limits or [sampling.max_new_tokens] * len(prompts)
        tokens = [
            _letters(sampling.seed_for(uid, k), limit)
            for uid, limit in zip(prompts.uids, limits, strict=True)
            for k in range(sampling.n)
        ]
        finish = [("stop" if int(row[-1]) == Letters.eos_token_id else "length") for row in tokens]
        reading = self.options.prompt_seconds * sum(map(len, prompts.token_ids)) / 1000
        call = self._call = _Call(current_time(), [0.0], [self.w], [self.version])
        call.wait(reading + self.options.token_seconds * max(map(len, tokens)))
        self._call = None
        places = [call.places(reading + self.options.token_seconds * torch.arange(len(row))) for row in tokens]
        w, versions = torch.tensor(call.w, dtype=torch.float64), torch.tensor(call.versions)
        return assemble(
            prompts,
            tokens,
            cast("Any", finish),
            cast("PreTrainedTokenizerBase", Letters()),
            versions=[versions[place_T] for place_T in places],
            per_token={
                "sampler_logprobs_NT": [
                    w[place_T] - 1 - (row % 7).double() for row, place_T in zip(tokens, places, strict=True)
                ]
            },
        )

    def sync(self, role: Role) -> Mapping[str, float]:
        """Take the role's number and version; a call in progress pauses and continues under them."""
        if "weights" in self.asleep:
            raise ContractError("the rollout engine 'fake' has no memory for weights; call wake('weights') first")
        weights = dict(role.weights())
        if "w" not in weights:
            raise UsageError(
                f"the rollout engine 'fake' samples roles without a model alone; pass {run_option('strategy', 'fake')}"
            )
        w, version = float(weights["w"]), role.version
        if self._call is not None:
            self._call.take(w, version, self.options.sync_seconds)
        sleep(self.options.sync_seconds)
        self.w, self.version = w, version
        return {}

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Fall asleep, in the time it takes; with level 2, forget the number."""
        freed = self._bytes(PARTS - self.asleep)
        sleep(self.options.wake_seconds)
        self.asleep = PARTS
        if level == 2:
            self.w = None
        return freed

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Wake up, in the time it takes."""
        woken = self.asleep & (PARTS if part == "all" else {part})
        sleep(self.options.wake_seconds)
        self.asleep -= woken
        return self._bytes(woken)

    def _bytes(self, parts: frozenset[str]) -> int:
        """Return the stated memory of these parts."""
        gib = {"weights": self.options.weights_gib, "cache": self.options.cache_gib}
        return sum(int(gib[part] * 2**30) for part in parts)

    def close(self) -> None:
        """Forget the weights."""
        self.w = None


@dataclass
class _Call:
    """A call in progress, and the weights under which its tokens are sampled."""

    began: float
    """time of its beginning"""
    since: list[float]
    """seconds of sampling after which each of the weights are there"""
    w: list[float]
    versions: list[int]
    paused: float = 0.0
    """seconds in which it does not sample"""

    def take(self, w: float, version: int, seconds: float) -> None:
        """Pause for so many seconds, and continue under new weights."""
        self.since.append(current_time() - self.began - self.paused)
        self.w.append(w)
        self.versions.append(version)
        self.paused += seconds

    def wait(self, seconds: float) -> None:
        """Sample for so many seconds; pauses prolong it."""
        slept = 0.0
        while slept < seconds + self.paused:
            left = seconds + self.paused - slept
            sleep(left)
            slept += left

    def places(self, begins_T: Tensor) -> Tensor:
        """Return the place of the weights of steps that begin after so many seconds of sampling, (T,)."""
        since = torch.tensor(self.since, dtype=torch.float64)
        return torch.searchsorted(since, begins_T.double(), right=True) - 1


class Letters:
    """Tokenizer of the engine: 1 is `a`, 26 is `z`, 0 ends a completion."""

    eos_token_id = 0
    pad_token_id = 0
    all_special_ids = (0,)
    added_tokens_decoder: ClassVar[Mapping[int, Any]] = {0: "<end>"}

    def batch_decode(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Return texts without the token that ends them."""
        return [bytes(row).translate(LETTERS, b"\0").decode("ascii") for row in sequences]


LETTERS = bytes(max(0, token + ord("a") - 1) % 256 for token in range(256))
"""The letter of each token, as a table of bytes."""


def _letters(seed: int, most: int) -> Tensor:
    """Return the tokens of the completion that belongs to `seed`."""
    length = 1 + seed % most
    tokens_T = 1 + (seed % 26 + torch.arange(length)) % 26
    if length < most:
        tokens_T[-1] = Letters.eos_token_id
    return tokens_T
