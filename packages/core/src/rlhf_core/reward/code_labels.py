"""Labels of `--reward code`: the forms that data sets have for tests of a program."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from rlhf_core.errors import DataError, advice, run_option

__all__ = ["Assertions", "Scripts", "parse_label", "same_output"]

NUMBER = re.compile(r"[+-]?[0-9]{1,400}(\.[0-9]{0,400})?([eE][+-]?[0-9]{1,3})?")

CALL = """
import json
try:
    _function = {name}
except NameError:
    _function = Solution().{name}
_result = json.loads(json.dumps(_function(*json.loads({arguments!r}))))
_expected = json.loads({expected!r})
assert _result == _expected or [_result] == _expected
"""
"""A test of a function by arguments and result as JSON, which has no tuples; APPS puts most results into a list."""


@dataclass(frozen=True)
class Assertions:
    """Tests as code, counted one by one."""

    tests: list[str]
    names: tuple[str, ...] = ()
    """names that the label attributes to the program"""
    kind: ClassVar = "tests"

    def part(self) -> dict[str, Any]:
        """Return the part of a job that the keeper reads after the program has started."""
        return {"tests": self.tests, "under_test": self.names}

    def read_results(self, results: list[Any]) -> list[bool]:
        """Return which tests passed."""
        return [result is True for result in results]


@dataclass(frozen=True)
class Scripts:
    """Runs of the program as a script: what it reads, and what it should write."""

    inputs: list[str]
    outputs: list[str]
    kind: ClassVar = "scripts"

    def part(self) -> dict[str, Any]:
        """Return the part of a job that the keeper reads; no process but this one has the expected outputs."""
        return {"inputs": self.inputs}

    def read_results(self, results: list[Any]) -> list[bool]:
        """Return for which inputs the program wrote what is expected, and ended with exit code 0."""
        return [
            result is not None and result[1] and same_output(result[0], expected)
            for result, expected in zip(results, self.outputs, strict=True)
        ]


def parse_label(label: Any) -> Assertions | Scripts:
    """Return the tests in a label.

    Args:
        label: code; a list of code (MBPP); `{"test": code that defines check, "entry_point": name}` (HumanEval);
            `{"inputs": [...], "outputs": [...]}`, with `fn_name` for calls in place of scripts (APPS, TACO); a list of
            `{"input": text, "output": text}` (LiveCodeBench); or any of these as JSON text.

    Raises:
        DataError: it is something else, or a test is no Python.
    """
    value = _from_json(label)
    match value:
        case {"inputs": [*inputs], "outputs": [*outputs]} if inputs and len(inputs) == len(outputs):
            if name := value.get("fn_name"):
                return Assertions([_call_test(str(name), *pair) for pair in zip(inputs, outputs)], (str(name),))
            return Scripts([_text(each) for each in inputs], [_text(each) for each in outputs])
        case [{"input": _, "output": _}, *_] if all(
            isinstance(each, dict) and each.keys() >= {"input", "output"} for each in value
        ):
            return Scripts([_text(each["input"]) for each in value], [_text(each["output"]) for each in value])
        case {"test": str(test), "entry_point": str(name)}:
            return Assertions([_check_syntax(f"{test}\n\ncheck({name})")], (str(name),))
        case str(test):
            return Assertions([_check_syntax(test)])
        case [str(), *_] if all(isinstance(test, str) for test in value):
            return Assertions([_check_syntax(test) for test in value])
    column = advice(f" ({run_option('data.label_key')})")
    raise DataError(
        f"reward code: a label should be test code, a list of test codes, or inputs and outputs{column}, not {label!r}"
    )


def same_output(output: str, expected: str) -> bool:
    """Return True if the lines are equal but for space at their ends, or equal word by word where words are numbers."""
    lines, wanted = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (output, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    words, wanted_words = line.split(), wanted.split()
    return line == wanted or (len(words) == len(wanted_words) and all(map(_same_word, words, wanted_words)))


def _same_word(word: str, wanted: str) -> bool:
    numbers = NUMBER.fullmatch(word) and NUMBER.fullmatch(wanted)
    return word == wanted or (numbers is not None and Decimal(word) == Decimal(wanted))


def _from_json(label: Any) -> Any:
    """Return the value of a text that starts like a JSON table or list; other labels unchanged."""
    if isinstance(label, str) and label.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(label)
        except ValueError:
            pass
    return label


def _text(value: Any) -> str:
    """Return an input or output as text; some sets have lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call_test(name: str, arguments: Any, expected: Any) -> str:
    if not name.isidentifier() or not isinstance(arguments, list):
        raise DataError(
            f"reward code: fn_name should name a function, and each of inputs should list its arguments, not {name!r}"
        )
    return CALL.format(name=name, arguments=json.dumps(arguments), expected=json.dumps(expected))


def _check_syntax(test: str) -> str:
    try:
        ast.parse(test)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"reward code: the test in a label is not Python ({error}): {test[:200]!r}") from None
    return test
