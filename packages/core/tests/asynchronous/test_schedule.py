"""A recorded schedule: which call may be made with which weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.asynchronous.schedule import Schedule, read_schedule
from rlhf_core.errors import OptionError


def test_calls_wait_for_their_weights_and_weights_for_the_calls_before_them() -> None:
    schedule = Schedule([(1, 0), (2, 0), (2, 1), (3, 1)])
    assert schedule.may_call(0)
    assert not schedule.may_bring(1), "two calls with the first weights are to come"
    schedule.add_call(1)
    schedule.add_call(2)
    assert not schedule.may_call(0)
    assert schedule.may_bring(1)
    assert schedule.may_call(1)
    schedule.add_call(2)
    assert not schedule.may_begin(3, 0)
    assert schedule.may_begin(3, 1)
    schedule.add_call(3)
    assert schedule.may_call(0), "beyond the recorded calls everything is due"
    assert schedule.may_bring(9)


def test_recorded_calls_that_do_not_come_hold_nobody_back_later() -> None:
    schedule = Schedule([(1, 0), (1, 0), (2, 1)])
    schedule.add_call(1)
    schedule.add_call(2)
    assert schedule.next_call is None


def test_a_resumed_run_has_the_calls_of_its_steps_before_it() -> None:
    schedule = Schedule([(1, 0), (2, 0), (3, 2)])
    schedule.begin_after(2)
    assert schedule.next_call == (3, 2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("reward = 1", "is not an iterations.jsonl"),
        ('{"step": 1}', "is not an iterations.jsonl"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "iterations.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=told) as caught:
        read_schedule(str(path))
    assert "\n" not in str(caught.value)


def test_the_calls_of_a_file_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "iterations.jsonl"
    rows = [{"step": 1, "after": [0]}, {"step": 2, "after": [0, 1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    schedule = read_schedule(str(path))
    assert schedule.next_call == (1, 0)
    assert not schedule.may_bring(1)
