"""Pairs of scored completions are those of the released codes of Online_RLHF and RLHFlow, in golden tables, and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_algos.ingredient.pairs import Pairs
from rlhf_core import Artifact, DataError, UsageError
from rlhf_core.testing import TinyIngredientContext, check_ingredient


def scored(
    path: Path, rewards: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]] | None = None
) -> Artifact:
    """Write completions `0`, `1`, … of each prompt with these rewards."""
    rows = [
        {"uid": uid, "k": k, "prompt": f"p{uid}", "completion": texts[uid][k] if texts else str(k), "reward": reward}
        for uid, row in enumerate(rewards)
        for k, reward in enumerate(row)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Artifact("dataset", path)


def choose(tmp_path: Path, ingredient: Pairs, seed: int = 0, **inputs: Artifact) -> list[dict[str, Any]]:
    """Return the pairs."""
    folder = tmp_path / "made"
    folder.mkdir(exist_ok=True)
    made = ingredient(TinyIngredientContext(folder, inputs, seed))
    return [json.loads(line) for line in made["pairs"].path.read_text().splitlines()]


def pair_of(tmp_path: Path, ingredient: Pairs, rewards: Sequence[float], **inputs: Artifact) -> tuple[Any, ...] | None:
    """Return the chosen and the rejected number and the margin; None if there is no pair. A prompt with one is beside it."""
    pairs = choose(
        tmp_path, ingredient, scored=scored(tmp_path / "rm.jsonl", [rewards, [1.0, 0.0, -1.0, -2.0]]), **inputs
    )
    found = [(int(pair["chosen"]), int(pair["rejected"]), pair["margin"]) for pair in pairs if pair["uid"] == 0]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("rewards", "best_worst", "best_second", "best_quartile"),
    [
        ([1, 5, 5, 0, 0], (1, 3), (1, 2), (1, 3)),
        ([2, 2, 2, 2], None, (0, 1), (0, 3)),
        ([3, 1, 2], (0, 1), (0, 2), None),
        ([0.1, 0.9], (1, 0), (1, 0), None),
        ([7, 7, 1, 7, 0], (0, 4), (0, 1), (0, 2)),
        ([5, 4, 3, 2, 1, 0], (0, 5), (0, 1), (0, 3)),
    ],
)
def test_pairs_of_online_rlhf(
    rewards: list[float],
    best_worst: tuple[int, int] | None,
    best_second: tuple[int, int] | None,
    best_quartile: tuple[int, int] | None,
    tmp_path: Path,
) -> None:
    expected = {"best_worst": best_worst, "best_second": best_second, "best_quartile": best_quartile}
    for selector, pair in expected.items():
        found = pair_of(tmp_path, Pairs(selector, ties="keep"), rewards)
        assert (found and found[:2]) == pair, selector


@pytest.mark.parametrize(
    ("rewards", "first_two", "max_random", "max_min", "max_max"),
    [
        ([1, 5, 5, 0], (1, 0, 4), (1, 0, 4), (1, 3, 5), None),
        ([2, 2, 2, 2], None, None, None, None),
        ([4, 1, 9, 9], (0, 1, 3), (2, 0, 5), (2, 1, 8), None),
        ([0, 0, 3, 1], None, (2, 0, 3), (2, 0, 3), (2, 3, 2)),
    ],
)
def test_pairs_of_rlhflow(
    rewards: list[float],
    first_two: tuple[int, int, float] | None,
    max_random: tuple[int, int, float] | None,
    max_min: tuple[int, int, float] | None,
    max_max: tuple[int, int, float] | None,
    tmp_path: Path,
) -> None:
    expected = {"first_two": first_two, "max_random": max_random, "max_min": max_min, "max_max": max_max}
    for selector, pair in expected.items():
        assert pair_of(tmp_path, Pairs(selector), rewards) == pair, selector


@pytest.mark.parametrize(
    ("penalty", "label_by", "pair"),
    [
        (0.0, "penalized", (2, 3, 2.0)),
        (0.001, "penalized", (1, 3, 1.9)),
        (0.001, "raw", (1, 3, 1.5)),
        (0.01, "raw", (2, 1, 0.5)),  # the released rule: the penalized best has the lower raw reward, and is rejected
        (0.01, "penalized", (1, 2, 8.5)),
    ],
)
def test_a_penalty_for_length(penalty: float, label_by: Any, pair: tuple[int, int, float], tmp_path: Path) -> None:
    """Rewards 1, 2, 2.5, 0.5 of completions with 10, 100, 1000, 500 characters."""
    texts = [[str(k) * length for k, length in enumerate((10, 100, 1000, 500))]]
    rows = scored(tmp_path / "rm.jsonl", [[1, 2, 2.5, 0.5]], texts)
    (found,) = choose(tmp_path, Pairs("max_min", length_penalty=penalty, label_by=label_by), scored=rows)
    assert (int(found["chosen"][0]), int(found["rejected"][0]), found["margin"]) == (*pair[:2], pytest.approx(pair[2]))


@pytest.mark.parametrize(
    ("selector", "pair", "scores"),
    [("best_worst", ("d", "b"), (1, -1)), ("best_second", ("c", "b"), (0, -1)), ("best_quartile", ("d", "b"), (1, -1))],
)
def test_the_reward_chooses_and_the_oracle_labels(
    selector: str, pair: tuple[str, str], scores: tuple[float, float], tmp_path: Path
) -> None:
    texts = [["a", "b", "c", "d"]]
    rows = scored(tmp_path / "rm.jsonl", [[0.1, 0.9, 0.5, -1]], texts)
    oracle = scored(tmp_path / "oracle.jsonl", [[2, -1, 0, 1]], texts)
    (found,) = choose(tmp_path, Pairs(selector), scored=rows, oracle=oracle)
    assert (found["chosen"], found["rejected"]) == pair
    assert (found["chosen_score"], found["rejected_score"]) == scores and found["prompt"] == "p0"


def test_equal_labels_of_the_oracle(tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[1, 2], [1, 2]])
    oracle = scored(tmp_path / "oracle.jsonl", [[5, 5], [5, 6]])
    assert [pair["uid"] for pair in choose(tmp_path, Pairs(), scored=rows, oracle=oracle)] == [1]
    kept = choose(tmp_path, Pairs(ties="keep"), scored=rows, oracle=oracle)
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in kept] == [("1", "0", 0), ("1", "0", 1)]


@pytest.mark.parametrize(
    ("duplicates", "pair"), [("collapse", ("b", "c", 2)), ("first", ("a", "c", 3)), ("keep", ("a", "c", 3))]
)
def test_equal_texts(duplicates: Any, pair: tuple[str, str, float], tmp_path: Path) -> None:
    """Texts a, a, b, c with rewards 3, 1, 2, 0; Online_RLHF gives both a's the last reward."""
    rows = scored(tmp_path / "rm.jsonl", [[3, 1, 2, 0]], [["a", "a", "b", "c"]])
    (found,) = choose(tmp_path, Pairs(duplicates=duplicates), scored=rows)
    assert (found["chosen"], found["rejected"], found["margin"]) == pair


def test_a_pair_of_one_text_is_none(tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[3, 1], [1, 0]], [["a", "a"], ["a", "b"]])
    assert [pair["uid"] for pair in choose(tmp_path, Pairs(duplicates="keep"), scored=rows)] == [1]


@pytest.mark.parametrize(("margin", "left"), [(0.0, [0, 1]), (0.5, [1]), (0.49, [0, 1])])
def test_pairs_within_the_margin_are_left_out(margin: float, left: list[int], tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[0.5, 0], [1, 0]])
    assert [pair["uid"] for pair in choose(tmp_path, Pairs(margin=margin), scored=rows)] == left


def test_completions_without_a_reward_are_left_out(tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[None, 1, 0], [None, 1, None]])
    assert [(pair["uid"], pair["chosen"]) for pair in choose(tmp_path, Pairs(), scored=rows)] == [(0, "1")]


def test_chance_follows_from_the_seed(tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[float(k) for k in range(8)]] * 20)

    def pairs(seed: int) -> list[tuple[str, str]]:
        return [(p["chosen"], p["rejected"]) for p in choose(tmp_path, Pairs("random_pair"), seed, scored=rows)]

    assert pairs(0) == pairs(0) != pairs(1)
    assert len(set(pairs(0))) > 5 and all(int(chosen) > int(rejected) for chosen, rejected in pairs(0))


def test_the_statistics_are_means_over_pairs(tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[1.0, -1.0], [7.0, 3.0], [2.0, 2.0]])
    (tmp_path / "made").mkdir()
    made = Pairs()(TinyIngredientContext(tmp_path / "made", {"scored": rows}))
    found = json.loads(made["statistics"].path.read_text())
    assert found["score_sum"] == 5.0 and found["margin"] == 3.0  # (0 + 10) / 2, as Online_RLHF's collect_results
    assert found["pairs"] == 2 and found["share"] == pytest.approx(2 / 3)


def test_regret_is_what_the_shown_ones_lack_of_the_best(tmp_path: Path) -> None:
    """The reward shows 3 and 0, the oracle's scores of which are 1 and 0 where 7 is the best; then 2 and 1 of equal scores."""
    rows = scored(tmp_path / "rm.jsonl", [[0, 1, 2, 3], [1, 2], [5]])
    oracle = scored(tmp_path / "oracle.jsonl", [[0, 7, 0, 1], [4, 4], [9]])
    (tmp_path / "made").mkdir()
    made = Pairs()(TinyIngredientContext(tmp_path / "made", {"scored": rows, "oracle": oracle}))
    found = json.loads(made["statistics"].path.read_text())
    assert found["regret"] == pytest.approx((6.5 + 0 + 0) / 3)  # dropped ties and single answers count
    assert found["regret_se"] == pytest.approx((2 * 6.5**2 / 3 / 2 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"uid": 0, "prompt": "p", "completion": "c"}\n',
            "rm.jsonl:1: expected a completion with uid, prompt and reward",
        ),
        ("\n{\n", "rm.jsonl:2: expected"),
        ("", "no pair can be made from 0 prompts"),
    ],
)
def test_bad_rows_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rm.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        choose(tmp_path, Pairs(), scored=Artifact("dataset", tmp_path / "rm.jsonl"))


def test_an_oracle_of_other_completions_is_refused(tmp_path: Path) -> None:
    rows = scored(tmp_path / "rm.jsonl", [[1, 2]])
    oracle = scored(tmp_path / "oracle.jsonl", [[1, 2]], [["x", "y"]])
    with pytest.raises(DataError, match=r"oracle\.jsonl: some completions of prompt 0 have no reward"):
        choose(tmp_path, Pairs(), scored=rows, oracle=oracle)


@pytest.mark.parametrize(
    ("ingredient", "message"),
    [
        (Pairs("gae"), "does not choose pairs"),
        (Pairs("best_wurst"), "best_worst"),
        (Pairs("drts"), "needs the uncertainty"),
    ],
)
def test_a_wrong_selector_is_named(ingredient: Pairs, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ingredient.check()
        choose(tmp_path, ingredient, scored=scored(tmp_path / "rm.jsonl", [[1, 2]]))


def test_it_keeps_the_contract_of_ingredients(tmp_path: Path) -> None:
    check_ingredient(Pairs("random_pair"), {"scored": scored(tmp_path / "rm.jsonl", [[0.0, 1.0, 2.0]] * 3)})
