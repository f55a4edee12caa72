"""`--environment calculator`: values of arithmetic between the turns of a policy, and a reward for the right answer."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rlhf_core import Action, DataError, Environment, Example, Feedback, Session

__all__ = ["Calculator", "evaluate"]

OPERATIONS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
LONGEST = 100  # characters of an expression; its value has no more digits than that
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
EXPRESSION = re.compile(r"[\d.+\-*/() ]*\Z")


@dataclass(frozen=True)
class Calculator(Environment):
    """Writes the value of the arithmetic before a `=`; any other turn is the final answer."""

    call_reward: float = 0.0
    """reward of a turn that asks for a value and gets one, so that a policy learns to ask"""

    metrics = ("calls", "errors")
    stop = ("=",)

    def __call__(self, example: Example, seed: int) -> Session:
        if not NUMBER.fullmatch(str(example.label)):
            raise DataError(f"{example.origin}: the label is {example.label!r}, not a number; pass --data.label-key")
        return Exercise(Fraction(str(example.label)), self.call_reward)


@dataclass
class Exercise(Session):
    """One exercise. It remembers nothing: a turn is a question or the answer."""

    label: Fraction
    call_reward: float

    def respond(self, action: Action) -> Feedback:
        if action.text.endswith("="):
            value = evaluate(action.text[:-1])
            if value is None:
                return Feedback("?", metrics={"errors": 1.0})
            return Feedback(format_number(value), reward=self.call_reward, metrics={"calls": 1.0})
        numbers = NUMBER.findall(action.text)
        right = bool(numbers) and Fraction(numbers[-1]) == self.label
        return Feedback(reward=float(right), score=float(right), done=True)


def evaluate(text: str) -> Fraction | None:
    """Return the exact value of the arithmetic that `text` ends with; None where there is none."""
    found = EXPRESSION.search(text)
    expression = found.group().strip() if found else ""
    if len(expression) > LONGEST:
        return None
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    """Return the value of a parsed expression. Raises `ValueError` for anything but the four operations."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def format_number(value: Fraction) -> str:
    """Return a whole number as it is, and others as decimals with six digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
