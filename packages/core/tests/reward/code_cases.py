"""Programs and their tests from `code_cases/*.txt`, and the judge as the tests of `--reward code` call it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from rlhf_core.reward.code import Code
from rlhf_core.reward.code_labels import parse_label
from rlhf_core.reward.sandbox.confinement import LAYERS
from rlhf_core.reward.sandbox.server import SandboxServer


def read_cases(name: str) -> dict[str, tuple[str, str]]:
    """Return `{name: (program, label)}`: a case is `==== name`, the program, `----` and the label."""
    text = (Path(__file__).parent / "code_cases" / f"{name}.txt").read_text("utf-8")
    cases = [part.partition("\n") for part in text.split("\n==== ")[1:]]
    return {title: (case.split("\n----\n")[0], case.split("\n----\n")[1]) for title, _, case in cases}


@cache
def skip_unless_confined() -> None:
    """Skip a test on a machine whose kernel does not confine programs in all ways."""
    job = {"kind": "tests", "program": "", "seconds": 60, "memory": 1 << 29, "layers": LAYERS}
    with SandboxServer() as server:
        missing = server.ask(job, {"tests": ["pass"], "under_test": []})["open"]
    if missing:
        pytest.skip(f"this machine does not keep programs from {', '.join(missing)}")


def judge(
    cases: Mapping[str, tuple[str, str]], layers: tuple[str, ...] = LAYERS, seconds: float = 120
) -> dict[str, list[bool]]:
    """Return which tests pass in each case."""
    reward = Code(timeout=seconds, memory=512, confine=False)
    with SandboxServer() as server, ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda case: reward.judge(server, case[0], parse_label(case[1]), layers), cases.values())
        return dict(zip(cases, results))


def winners(cases: Mapping[str, tuple[str, str]], layers: tuple[str, ...] = LAYERS, seconds: float = 120) -> list[str]:
    """Return the cases in which a test passes."""
    return [name for name, results in judge(cases, layers, seconds).items() if any(results)]
