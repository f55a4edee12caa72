"""Credit on a rank that has no row of a batch: nothing of its own, and the rows of other ranks earn what they earn alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from no_rows_ranks import credit_all, names

from rlhf_core.testing import run_ranks


@pytest.fixture(scope="module")
def credits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the credits of one process, of a rank with all rows and of a rank without rows."""
    folder = tmp_path_factory.mktemp("credits")
    credit_all(str(folder / "alone"))
    done = run_ranks(2, credit_all, str(folder / "rank"))
    assert [rank.code for rank in done] == [0, 0], "".join(rank.stderr[-2000:] for rank in done)
    files = {"alone": "alone-0", "with": "rank-0", "without": "rank-1"}
    return {name: torch.load(folder / f"{file}.pt", weights_only=False) for name, file in files.items()}


@pytest.mark.parametrize("name", names())
def test_a_rank_without_rows_changes_no_credit(name: str, credits: dict[str, dict[str, Any]]) -> None:
    expected_NT, expected, kept = credits["alone"][name]
    found_NT, metrics, rows = credits["with"][name]
    torch.testing.assert_close(found_NT, expected_NT, rtol=1e-6, atol=1e-6)
    assert rows == kept and metrics.keys() == expected.keys()
    assert all(metrics[key] == pytest.approx(value) for key, value in expected.items())
    nothing_NT, metrics, rows = credits["without"][name]
    assert nothing_NT.shape == (0, 0) and rows in (None, 0)
    for key, value in metrics.items():  # totals of nothing, or the number of all ranks
        assert value == (0.0, 0.0) if isinstance(value, tuple) else value == pytest.approx(expected[key])
