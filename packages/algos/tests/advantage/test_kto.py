"""KTO's reference point: completions under other prompts, pairs, and what ranks change (nothing)."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algos.advantage.kto import KTOAdvantage, add_mismatched_rows
from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch


class Ranks(World):
    """Threads that tell each other everything."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.meeting = rank, len(board), board, barrier

    def gather(self, thing: Any) -> list[Any]:
        self.board[self.rank] = thing
        self.meeting.wait(120)
        everything = list(self.board)
        self.meeting.wait(120)
        return everything

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(tensor)).sum(0)


def rows(pairs: bool = False) -> Batch:
    """Four rows of different lengths, each judged; or two pairs."""
    batch = make_batch([3, 1, 2, 4], [2, 4, 1, 3], [0, 0, 1, 1] if pairs else [0, 1, 2, 3])
    batch.labels = [None] * 4 if pairs else [True, False, True, False]
    batch.step = StepInfo(progress=0.5)
    return batch


def tokens(batch: Batch) -> list[list[int]]:
    """Prompt and completion of each row."""
    prompts = [row[:n] for row, n in zip(batch.prompt_NL.tolist(), batch.prompt_lengths_N.tolist())]
    said = [row[:n] for row, n in zip(batch.tokens_NT.tolist(), batch.lengths_N.tolist())]
    return [[*prompt, *completion] for prompt, completion in zip(prompts, said)]


@pytest.mark.parametrize(("pairs", "order"), [(False, [1, 2, 3, 0]), (True, [2, 3, 0, 1])])
def test_every_prompt_meets_the_completion_of_the_next_one(pairs: bool, order: list[int]) -> None:
    batch = rows(pairs)
    batch.prompt_lengths_N = torch.tensor([1, 1, 1, 1])  # so that nothing is too long
    strange = add_mismatched_rows(batch)
    for i, k in enumerate(order):
        n = int(batch.lengths_N[k])
        assert strange.tokens_NT[i, :n].tolist() == batch.tokens_NT[k, :n].tolist()
        assert strange.prompt_NL[i].tolist() == batch.prompt_NL[i].tolist()
        assert strange.mask_NT[i].sum() == n == strange.lengths_N[i]


def test_no_row_is_longer_than_the_longest_of_the_batch() -> None:
    """Rows of 5, 7, 3 and 9 tokens: prompts of 2, 6, 1 and 3 with the next completions of 1, 2, 6 and 3 all fit 9."""
    batch = make_batch([3, 1, 2, 6], [2, 6, 1, 3])
    assert add_mismatched_rows(batch).lengths_N.tolist() == [1, 2, 6, 3]
    batch = make_batch([1, 6], [6, 1])
    assert add_mismatched_rows(batch).lengths_N.tolist() == [1, 1], "6 + 6 are more than 7"


def test_one_prompt_alone_has_no_other() -> None:
    with pytest.raises(UsageError, match="raise batch_size"):
        add_mismatched_rows(make_batch([2, 2], groups=[0, 0]))


def credited(batch: Batch, z: str = "mismatched") -> tuple[Batch, Any]:
    """The credit of a batch whose log-ratio at each token is a thousandth of the token's number plus the prompt's length."""
    advantage = KTOAdvantage(z=z)  # type: ignore[arg-type]
    both = advantage.prepare(batch)
    ratios_NT = (both.tokens_NT / 1000 + both.prompt_lengths_N[:, None]) * both.mask_NT
    extras = both.extras | {"actor.logprobs_NT": ratios_NT, "ref_logprobs_NT": torch.zeros_like(ratios_NT)}
    return both, advantage(RewardOutput(torch.zeros(len(both))), both, extras)


def test_the_reference_point_is_the_mean_over_mismatched_rows_and_those_are_left_out() -> None:
    batch = rows()
    both, credit = credited(batch)
    assert len(both) == 8 and credit.rows.tolist() == [0, 1, 2, 3]
    strange = add_mismatched_rows(batch)
    expected = sum(
        sum(
            int(token) / 1000 + int(strange.prompt_lengths_N[i])
            for token in strange.tokens_NT[i, : strange.lengths_N[i]]
        )
        for i in range(4)
    )
    assert credit.returns_NT[0, 0] == pytest.approx(expected / 4)
    assert credit.advantages_NT[:4, 0].tolist() == [1, -1, 1, -1]
    assert not credit.advantages_NT[4:].any()


def test_a_reference_point_below_zero_is_zero() -> None:
    """The KL that z estimates is none below 0 (Ethayarajh et al. 2024, section 4.1): here every log-ratio is -0.5."""
    batch = rows()
    below_NT = -0.5 * batch.mask_NT
    extras = {"actor.logprobs_NT": below_NT, "ref_logprobs_NT": torch.zeros_like(below_NT)}
    for z in ("batch", "other"):
        credit = KTOAdvantage(z=z)(RewardOutput(torch.zeros(4)), batch, extras)  # type: ignore[arg-type]
        assert credit.metrics["kto/z"] == 0.0
        assert credit.returns_NT is not None and not credit.returns_NT.any()
        above = {**extras, "actor.logprobs_NT": -below_NT}
        assert KTOAdvantage(z=z)(RewardOutput(torch.zeros(4)), batch, above).metrics["kto/z"] == pytest.approx(1.25)  # type: ignore[arg-type]


def test_of_pairs_the_chosen_one_is_desirable() -> None:
    _, credit = credited(rows(pairs=True))
    assert credit.advantages_NT[:4, 0].tolist() == [1, -1, 1, -1]
    _, credit = credited(rows(pairs=True), z="other")
    assert credit.rows is None and credit.advantages_NT[:, 0].tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("pairs", [False, True])
def test_the_number_of_ranks_changes_no_reference_point(pairs: bool) -> None:
    _, alone = credited(rows(pairs))
    barrier, board, found = threading.Barrier(2), [None, None], {}

    def rank(number: int) -> None:
        mine = replace(rows(pairs).rows([2 * number, 2 * number + 1]), world=Ranks(number, board, barrier))
        found[number] = credited(mine)[1]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert float(found[number].returns_NT[0, 0]) == pytest.approx(float(alone.returns_NT[0, 0]), rel=1e-6)


def test_a_run_estimates_it_with_another_forward_pass_and_trains_on_the_data_alone(tmp_path: Path) -> None:
    """At first the policy is the reference: z is 0, and every loss is w (1 - sigmoid(0)) = 1/2."""
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"q{i}", "response": "abc"[: 1 + i % 3], "label": i % 2 == 0} for i in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(
        "kto", model="tiny:hidden=16,layers=1", data={"use": "json", "path": str(data)}, batch_size=4, steps=3,
        actor={"optim": {"lr": 0.1, "schedule": "constant", "warmup": 0}}, output=str(tmp_path / "run"),
    )  # fmt: skip
    run = Run(config)
    last = run.train().metrics
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss/actor"] == pytest.approx(0.5) and first["kto/z"] == 0.0
    assert last["loss/actor"] != pytest.approx(0.5, abs=1e-4)
    (batch,) = run.samples.values()
    assert len(batch) == 4
