"""The ingredient `pairs`: preference pairs of scored completions, by any pair selector.

Online_RLHF and RLHFlow build their data this way (arXiv 2502.07193, released code; arXiv 2405.07863, algorithm 2): a reward
model chooses the two completions of a prompt to compare, and a labeler chooses the preferred one. The labeler is the oracle
where one is read, else the reward itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlhf_algos.ranges import check_ranges
from rlhf_algos.selection.candidates import Candidates, collapse_duplicates, label_pair
from rlhf_algos.selection.selector import PairSelector
from rlhf_core import Artifact, ArtifactKind, DataError, Ingredient, IngredientContext, OptionError, make_from_spec
from rlhf_core.contract.results import UNCERTAINTY
from rlhf_core.lazy import torch

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs(Ingredient):
    """Choose two completions of each prompt and write them as a preference pair."""

    selector: str = "best_worst"
    """pair selector that chooses the two completions to compare, such as best_quartile; `margin` and `ties` leave pairs
    out"""
    margin: float = 0.0
    """largest difference of labels at which a pair is left out"""
    ties: Literal["drop", "keep"] = "drop"
    """treatment of pairs with equal labels: left out, or kept in the order in which the selector chose them"""
    duplicates: Literal["first", "collapse", "keep"] = "first"
    """treatment of equal texts of a prompt: only the first one counts; all count with the last one's reward (as
    Online_RLHF does); or all count"""
    length_penalty: float = 0.0
    """subtracted from the reward for every character (0.001 in RLHFlow's concise variant)"""
    label_by: Literal["penalized", "raw"] = "penalized"
    """labels of pairs without an oracle: the reward less the penalty for length, or the plain reward (as RLHFlow's code
    does)"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"scored": "dataset", "oracle": "dataset"}
    optional: ClassVar[frozenset[str]] = frozenset({"oracle"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"pairs": "dataset", "statistics": "metrics"}

    def __post_init__(self) -> None:
        check_ranges(self, margin="[0, inf)", length_penalty="[0, inf)")

    def check(self) -> None:
        """Check that there is such a selector.

        Raises:
            OptionError: the provider is no pair selector.
        """
        self._selector()

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Write the pairs and their statistics.

        Raises:
            DataError: a line is no scored completion, the oracle scored other completions, or no pair is left.
        """
        selector = self._selector()
        groups = _groups(context.inputs["scored"].path)
        oracle = _groups(context.inputs["oracle"].path) if "oracle" in context.inputs else {}
        pairs, regrets = [], []
        for uid, rows in groups.items():
            labels = _rewards(rows, oracle[uid], context.inputs["oracle"].path) if uid in oracle else None
            if "oracle" not in context.inputs or labels is not None:
                pair, regret = self._pair(selector, rows, labels, context.seed, uid)
                pairs += [] if pair is None else [pair]
                regrets.append(regret)
        if not pairs:
            raise DataError(
                f"{context.inputs['scored'].path}: no pair can be made from {len(groups)} prompts; their rewards "
                "are equal, or too few for the selector: sample more completions per prompt"
            )
        path, statistics = context.folder / "pairs.jsonl", context.folder / "statistics.json"
        path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
        statistics.write_text(json.dumps(_statistics(pairs, len(groups), regrets)) + "\n", encoding="utf-8")
        return {"pairs": Artifact("dataset", path), "statistics": Artifact("metrics", statistics)}

    def _selector(self) -> PairSelector:
        made = make_from_spec("advantage", self.selector, "selector")
        if not isinstance(made, PairSelector):
            raise OptionError(
                "selector", f"{self.selector!r} does not choose pairs; use a pair selector, such as best_worst"
            )
        return made

    def _pair(
        self,
        selector: PairSelector,
        rows: Sequence[Mapping[str, Any]],
        labels: Sequence[float] | None,
        seed: int,
        uid: int,
    ) -> tuple[dict[str, Any] | None, float]:
        """Return the pair of a prompt, None if it is left out; and the regret of what was shown.

        The regret is the best label minus the mean of the two that are compared (arXiv 2502.07193, section 2), or minus the
        label of the best reward where the selector has no pair.

        Args:
            selector: the selector.
            rows: scored completions of the prompt.
            labels: the oracle's scores of them, if there is one.
            seed: with `uid`, the seed of what is left to chance.
            uid: number of the prompt.
        """
        texts = [row["completion"] for row in rows]
        kept = [i for i, text in enumerate(texts) if self.duplicates != "first" or text not in texts[:i]]
        texts = [texts[i] for i in kept]
        raw_G = torch.tensor([rows[i]["reward"] for i in kept], dtype=torch.float64)
        if self.duplicates == "collapse":
            raw_G = collapse_duplicates(texts, raw_G)
        reward_G = raw_G - self.length_penalty * torch.tensor([len(text) for text in texts], dtype=torch.float64)
        own_G = raw_G if self.label_by == "raw" else reward_G
        label_G = own_G if labels is None else torch.tensor([labels[i] for i in kept], dtype=torch.float64)
        pair = selector.choose(_candidates(selector, rows, kept, reward_G, seed, uid)) if len(kept) > 1 else None
        shown = list(pair) if pair is not None else [int(reward_G.argmax())]
        regret = float(label_G.max() - label_G[shown].mean())
        if pair is None:
            return None, regret
        chosen, rejected = label_pair(pair, label_G)
        gap = float(label_G[chosen] - label_G[rejected])
        if texts[chosen] == texts[rejected] or not (gap > self.margin or (gap == 0 and self.ties == "keep")):
            return None, regret
        scores = {"chosen_score": float(label_G[chosen]), "rejected_score": float(label_G[rejected]), "margin": gap}
        texts_of = {"chosen": texts[chosen], "rejected": texts[rejected]}
        return {"prompt": rows[0]["prompt"], **texts_of, **scores, "uid": uid}, regret


def _candidates(
    selector: PairSelector,
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[int],
    reward_G: Any,
    seed: int,
    uid: int,
) -> Candidates:
    """Return the completions of a prompt as a selector sees them, with the uncertainty that their rows report."""
    std = [rows[i].get(UNCERTAINTY) for i in kept]
    known = all(each is not None for each in std)
    covariance_GG = torch.diag(torch.tensor(std, dtype=torch.float64).square()) if known else None
    return Candidates(reward_G, covariance_GG, selector.generator(seed, uid))


def _groups(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the scored completions of each prompt; those without a reward are left out.

    Raises:
        DataError: a line is none.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            uid, _, _, reward = int(row["uid"]), row["prompt"], str(row["completion"]), row["reward"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected a completion with uid, prompt and reward ({error!r})") from None
        if reward is not None:
            groups.setdefault(uid, []).append(row)
    return groups


def _rewards(rows: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]], path: Path) -> list[float]:
    """Return the rewards that `scored` gives the completions of `rows`.

    Raises:
        DataError: one of them has none.
    """
    found = {(row.get("k"), row["completion"]): float(row["reward"]) for row in scored}
    try:
        return [found[row.get("k"), row["completion"]] for row in rows]
    except KeyError:
        raise DataError(
            f"{path}: some completions of prompt {rows[0]['uid']} have no reward; score the file that was generated"
        ) from None


def _statistics(pairs: Sequence[Mapping[str, Any]], prompts: int, regrets: Sequence[float]) -> dict[str, float]:
    """Return means over the pairs, and the mean regret over prompts with its standard error.

    `score_sum` is what Online_RLHF's collect_results reports.
    """
    means = {
        name: sum(pair[name] for pair in pairs) / len(pairs) for name in ("chosen_score", "rejected_score", "margin")
    }
    lengths = {f"{name}_length": sum(len(pair[name]) for pair in pairs) / len(pairs) for name in ("chosen", "rejected")}
    counts = {"pairs": float(len(pairs)), "share": len(pairs) / prompts}
    mean = sum(regrets) / len(regrets)
    variance = sum((each - mean) ** 2 for each in regrets) / max(1, len(regrets) - 1)
    regret = {"regret": mean, "regret_se": sqrt(variance / len(regrets))}
    return {**counts, **means, "score_sum": means["chosen_score"] + means["rejected_score"], **lengths, **regret}
