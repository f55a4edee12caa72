"""Batches that flow between the stages. `rlhf_core.contract.providers` re-exports these names.

Shape letters, used in names everywhere: P prompts, G completions per prompt, N = P*G completions (offline: rows), L prompt
tokens, T completion tokens. Per-token tensors are aligned to the completion and left-aligned in time: column t belongs to
completion token t, padding is on the right. `mask_NT` is true where the policy sampled (offline: where the loss applies),
the EOS that ends a completion included; environment tokens of a multi-turn completion are in `tokens_NT` but not in the
mask. Log-probabilities are float32 and zero outside the completion. Token ids are never decoded and encoded again between
sampling and training.

torch is imported only for typing: this module is on the path of `rlhf-run --help`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.requirements import per_token, trim
from rlhf_core.errors import DataError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.kept_sets import Truncation

__all__ = ["Batch", "Example", "Finish", "Message", "Prompts", "Rollouts", "StepInfo"]

Message = Mapping[str, Any]
"""One turn of a chat: `{"role": "user", "content": "…"}`, and whatever else the template knows."""


Finish = Literal["stop", "length", "turns", "seconds", "error"]
"""Reason for the end of a completion; see `Rollouts.finish`."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data, before tokenizing.

    A row without completions is a prompt, one with one is a demonstration, and one with two is a preference, chosen first.
    """

    prompt: str | tuple[Message, ...]
    """plain text, or a chat that the tokenizer's template renders"""
    completions: tuple[str | tuple[Message, ...], ...] = ()
    """completions, the texts after the prompt"""
    label: Any = None
    """data that is passed to rewards (for example a reference answer)"""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """data that is passed to rewards and samples.jsonl; `meta["datasource"]` splits metrics"""
    fields: Mapping[str, float] = field(default_factory=dict)
    """numbers that losses read as `batch["<name>_N"]`: a margin, a rating"""
    origin: str = ""
    """`file:row`, for error messages"""
    row: int = -1
    """number among the training rows, from 0; -1 for any other row"""

    def __post_init__(self) -> None:
        if "row" in self.fields or "uids" in self.fields:
            raise DataError(
                f"{self.origin}: a numeric column cannot be called 'row' or 'uids', since core uses these names; "
                "rename it"
            )


@dataclass
class Prompts:
    """P prompts, tokenized for the role that will answer them."""

    texts: list[str]
    """P rendered prompts"""
    token_ids: list[list[int]]
    """P token sequences, what the model really reads"""
    examples: list[Example]
    """P rows they came from"""
    uids: list[int]
    """P numbers that stay with a prompt for the whole run; seeds are derived from them"""
    images: list[Mapping[str, Tensor]] = field(default_factory=list)
    """P tensors by name that the model reads for images (`models.inputs.images`); an empty list where it reads text alone"""
    limits: list[int] = field(default_factory=list)
    """P numbers of tokens after which a completion is cut, none above `Sampling.max_new_tokens`; empty where that holds for
    all. An engine may pass them over: core cuts what is longer"""

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, index: Sequence[int]) -> Prompts:
        """The prompts at `index`, in that order."""
        every: tuple[list[Any], ...] = (self.texts, self.token_ids, self.examples, self.uids, self.images, self.limits)
        return Prompts(*([column[i] for i in index] if column else [] for column in every))


@dataclass(frozen=True)
class StepInfo:
    """The step of a run that a batch belongs to."""

    number: int = 0
    """the step, from 1; 0 outside of steps, such as in an evaluation"""
    progress: float = 0.0
    """share of the run's steps that are finished, 0..1"""
    kl_coef: float = 0.0
    """the KL coefficient in force"""
    skip: bool = False
    """True if the batch must not be trained on, because a reward is not finite on some rank"""
    uids: tuple[int, ...] = ()
    """numbers of the prompts (`uids_N`) that any rank has rows of, in order; empty if ranks have not exchanged them"""


@dataclass
class Batch:
    """N completions with their prompts, and everything computed about them so far.

    `batch["name"]` reads an extra: `advantages_NT`, `ref_logprobs_NT`, `values_NT`, `rewards_N`, … An extra whose name
    ends in `_NT` has one value per completion token, one that ends in `_N` has one per completion. Further letters are further
    dimensions: `features_NH` has H numbers per completion.
    """

    prompts: list[str]
    """N rendered prompts"""
    texts: list[str]
    """N completions as text, special tokens left out"""
    prompt_NL: Tensor
    """int64, prompt tokens, left-aligned, padded on the right"""
    prompt_lengths_N: Tensor
    """int64, how many of them are real"""
    tokens_NT: Tensor
    """int64, completion tokens, left-aligned, padded on the right"""
    lengths_N: Tensor
    """int64, how many of them are real, environment tokens included"""
    mask_NT: Tensor
    """bool, where the policy sampled or the loss applies"""
    group_N: Tensor
    """int64, which prompt: completions of one prompt are adjacent and share the number"""
    labels: list[Any]
    """N labels of the data"""
    meta: list[Mapping[str, Any]]
    """N metadata mappings of the data"""
    images: list[Mapping[str, Tensor]] = field(default_factory=list)
    """N tensors by name that the model reads for a prompt's images; an empty list where it reads text alone"""
    raw_texts: list[str] = field(default_factory=list)
    """N completions as text with their special tokens, for example <think>, except the end token; empty for rows of data"""
    kept_sets: list[KeptSets | Truncation] = field(default_factory=list)
    """N completions' kept sets (`contract.kept_sets`), over which the role that sampled them takes its log-probabilities; an
    empty list where nothing was cut. Rows may come from engines that report sets and from engines that do not"""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """tensors by name, whose suffix states the shape (`contract.requirements`)"""
    scalars: dict[str, float] = field(default_factory=dict)
    """numbers of an engine about the whole batch, such as `kept_mass`"""
    step: StepInfo = StepInfo()
    """the step that the batch belongs to"""
    world: World | None = None
    """the ranks that share this batch: whitening and other batch statistics are summed over it"""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.extras[name]
        except KeyError:
            raise KeyError(f"the batch has no {name!r}; declare it in `needs`. It has: {sorted(self.extras)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.extras

    def with_extras(self, **extras: Tensor) -> Self:
        """A copy that shares every tensor and has `extras` added."""
        return replace(self, extras={**self.extras, **extras}, scalars=dict(self.scalars))

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """The rows at `index`, in that order, trimmed to their longest prompt and completion."""
        index = torch.as_tensor(index, dtype=torch.long)
        picked = index.tolist()
        prompt_lengths_N, lengths_N = self.prompt_lengths_N[index], self.lengths_N[index]
        L, T = (int(lengths.max()) if len(picked) else 0 for lengths in (prompt_lengths_N, lengths_N))

        def take(tensor: Tensor, name: str) -> Tensor:
            return trim(name, tensor[index], T)

        lists: dict[str, Any] = {name: [getattr(self, name)[i] for i in picked] for name in self._per_row()}
        return replace(
            self,
            **lists,
            prompt_NL=self.prompt_NL[index][:, :L],
            prompt_lengths_N=prompt_lengths_N,
            tokens_NT=take(self.tokens_NT, "_NT"),
            lengths_N=lengths_N,
            mask_NT=take(self.mask_NT, "_NT"),
            group_N=self.group_N[index],
            extras={name: take(tensor, name) for name, tensor in self.extras.items()},
            scalars=dict(self.scalars),
        )

    def _per_row(self) -> tuple[str, ...]:
        """Names of the fields that are lists of N."""
        optional = [name for name in ("images", "raw_texts", "kept_sets") if getattr(self, name)]
        return ("prompts", "texts", "labels", "meta", *optional)

    def _whole_sets(self) -> list[KeptSets | Truncation]:
        """Kept sets of completions that were not cut."""
        return [KeptSets.whole(length) for length in self.lengths_N.tolist()]

    def read_by(self, role: str, source: str) -> Self:
        """The batch as `role` reads it: kept sets are those of `source`, the role that sampled, and no others'."""
        return self if role == source or not self.kept_sets else replace(self, kept_sets=[])

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """One batch of all rows, padded to the longest. Group numbers are shifted so that groups stay apart."""
        first = batches[0]

        def stack(name: str, tensors: Sequence[Tensor]) -> Tensor:
            if name != "prompt_NL" and not per_token(name):
                return torch.cat(list(tensors))
            width = max(tensor.shape[1] for tensor in tensors)
            after = (0, 0) * (tensors[0].dim() - 2)  # `pad` begins with the last dimension
            return torch.cat([torch.nn.functional.pad(each, (*after, 0, width - each.shape[1])) for each in tensors])

        groups, offset = [], 0
        for batch in batches:
            groups.append(batch.group_N + offset)
            offset += int(batch.group_N.max()) + 1 if len(batch) else 0
        tensors = ("prompt_NL", "prompt_lengths_N", "tokens_NT", "lengths_N", "mask_NT")
        if not all(batch.raw_texts or not len(batch) for batch in batches):  # rows of data have none
            first = replace(first, raw_texts=[])
        cut = any(batch.kept_sets for batch in batches)
        columns: dict[str, Any] = {
            **{name: [row for batch in batches for row in getattr(batch, name)] for name in first._per_row()},
            "kept_sets": [each for batch in batches for each in (batch.kept_sets or batch._whole_sets())]
            if cut
            else [],
            **{name: stack(name, [getattr(batch, name) for batch in batches]) for name in tensors},
        }
        return replace(
            first,
            **columns,
            group_N=torch.cat(groups),
            extras={name: stack(name, [batch.extras[name] for batch in batches]) for name in first.extras},
            scalars=dict(first.scalars),
        )


@dataclass
class Rollouts(Batch):
    """Completions that a rollout engine sampled.

    `extras["sampler_logprobs_NT"]` has the engine's log-probabilities, and `extras["versions_NT"]` (int64) the version of the
    policy that sampled each token: the optimizer steps that the role had taken. Both are 0 outside the mask.
    """

    finish: list[Finish] = field(default_factory=list)
    """N reasons: `stop` (EOS or a stop string; of an episode: its environment ended it), `length` (cut at max_new_tokens), and
    of an episode `turns` or `seconds` (cut by these limits), or `error` (its environment or agent failed)"""

    @property
    def version(self) -> int:
        """The oldest policy version among the sampled tokens (`versions_NT`): optimizer steps of the role by then."""
        versions = self["versions_NT"][self.mask_NT]
        return int(versions.min()) if len(versions) else 0

    def _per_row(self) -> tuple[str, ...]:
        return (*super()._per_row(), "finish")
