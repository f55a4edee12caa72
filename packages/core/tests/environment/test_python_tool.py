"""The Python tool: programs run in the sandbox, what they print is read, and the answer is compared with the label."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from code_cases import skip_unless_confined

from rlhf_core.contract.batch import Example
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.episode import Action, Feedback
from rlhf_core.environment.python_tool import PythonTool
from rlhf_core.errors import UsageError
from rlhf_core.testing import check_environment


def respond(environment: Any, text: str, label: object = 25) -> Feedback:
    found = environment(Example("How many?", label=label), 0).respond(Action(text, (1,), "stop", 0))

    async def wait() -> Feedback:
        return await found  # type: ignore[no-any-return]  # whatever the session answers

    return found if isinstance(found, Feedback) else asyncio.run(wait())


PRIMES = "Let me count.\n```python\nprint(sum(all(n % d for d in range(2, n)) for n in range(2, 100)))\n```\n"


def test_the_policy_reads_what_its_program_prints() -> None:
    skip_unless_confined()
    found = respond(PythonTool(call_reward=0.1), PRIMES)
    assert found == Feedback("Output: 25\n", reward=0.1, metrics={"calls": 1.0, "errors": 0.0})


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("1/0", "an error"),
        ("while True: pass", "no end in time"),
        ("open('/etc/passwd')", "an error"),
        ("x = 1", "nothing"),
    ],
)
def test_a_program_that_fails_is_told(program: str, output: str) -> None:
    skip_unless_confined()
    found = respond(PythonTool(seconds=2.0), f"```python\n{program}\n```\n")
    assert (found.text, found.done, found.reward) == (f"Output: {output}\n", False, 0.0)
    assert found.metrics["errors"] == float(output != "nothing")


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("It is 25.", 25, True),
        ("25 or 26", 25, False),
        ("1,000", "1000", True),
        (" blue ", "blue", True),
        ("", 25, False),
    ],
)
def test_a_turn_without_a_program_is_the_answer(text: str, label: object, right: bool) -> None:
    found = respond(PythonTool(), text, label)
    assert (found.done, found.reward, found.score) == (True, float(right), float(right))


def test_it_keeps_the_contract_and_its_engine_ends_all_processes() -> None:
    skip_unless_confined()
    check_environment(PythonTool(), turns=(PRIMES, "25"))
    with open_provider(PythonTool()) as engine:
        assert respond(engine, PRIMES).text == "Output: 25\n"
        process = engine._server._process
        assert process.poll() is None
    assert process.poll() is not None


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(UsageError, match="seconds"):
        PythonTool(seconds=0)


def test_demonstrations_of_the_examples_are_what_the_environment_answers() -> None:
    """The output that a demonstration has after its program is the one that the policy reads in training."""
    skip_unless_confined()
    example = run_path(str(Path(__file__).parents[4] / "examples" / "agents" / "programs.py"))
    draw = random.Random(0)
    for exercise, label in example["EXERCISES"].items():
        shown = [example["demonstrate"](exercise, label, draw) for _ in range(8)]
        program, rest = next(text for text in shown if "```" in text).split("```\n")
        answered = respond(PythonTool(), f"{program}```\n")
        assert rest == answered.text + label
        assert respond(PythonTool(), label, label=label).reward == 1.0
        assert {text for text in shown if "```" not in text} <= set("0123456789")
