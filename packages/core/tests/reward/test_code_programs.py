"""Honest programs pass the tests that data sets have for them, and wrong ones fail, though tests and program never meet."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import pytest
from code_cases import judge, read_cases, skip_unless_confined
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_core.errors import DataError
from rlhf_core.reward.code_labels import parse_label, same_output
from rlhf_core.reward.sandbox.names import class_names, trusted_names
from rlhf_core.reward.sandbox.wire import Message


def test_honest_programs_pass() -> None:
    skip_unless_confined()
    assert {name: results for name, results in judge(read_cases("honest")).items() if not all(results)} == {}


def test_honest_programs_pass_where_there_are_no_namespaces() -> None:
    cases = {name: case for name, case in read_cases("honest").items() if name != "files in its own folder"}
    some = dict(list(cases.items())[::4])
    assert {name: results for name, results in judge(some, ("landlock", "seccomp")).items() if not all(results)} == {}


def test_wrong_programs_fail() -> None:
    assert {name: results for name, results in judge(read_cases("wrong")).items() if all(results)} == {}


@pytest.mark.parametrize(
    ("label", "tests"),
    [
        ('["assert f() == 1"]', ["assert f() == 1"]),
        ("[f() for _ in ()]", ["[f() for _ in ()]"]),
        ({"test": "def check(c): pass", "entry_point": "f"}, ["def check(c): pass\n\ncheck(f)"]),
    ],
)
def test_labels_as_data_sets_have_them(label: Any, tests: list[str]) -> None:
    assert parse_label(label).tests == tests  # type: ignore[union-attr]


def test_a_function_without_arguments_listed_is_an_error() -> None:
    with pytest.raises(DataError, match="fn_name should name a function, and each of inputs should list its arguments"):
        parse_label({"fn_name": "f", "inputs": [1], "outputs": [1]})


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3 \n\n", "1 2\n3", True),
        ("1.0 a", "1 a", True),
        ("1e2", "100.00", True),
        ("1 a", "1 b", False),
        ("1\n2", "2\n1", False),
        ("", "1", False),
        ("nan", "NaN", False),
        ("0.1000000000000000001", "0.1", False),
        ("1_0", "10", False),
        (" 1", "1", True),
        ("1 1", "1", False),
        ("\u0661", "1", False),
        ("a\x0bb", "a\nb", False),
    ],
)
def test_outputs_are_compared_by_lines_and_numbers(output: str, expected: str, same: bool) -> None:
    assert same_output(output, expected) is same


def test_the_text_of_the_tests_says_which_names_are_the_programs() -> None:
    def own(*tests: str) -> set[str]:
        names = {"f", "abs", "sum", "Counter", "x"}
        return names - trusted_names(tests)

    assert own("assert abs(f(1) - sum([1])) < 1 and Counter(x)") == {"f", "x"}
    assert own("assert sum(1, 2) == 3", "assert sum(2, 2) == 4") == {"f", "x", "sum"}
    assert own("assert sum(1, 2) == abs(3)") == {"f", "x"}
    assert own("c = Counter()\nc.add(1)") == {"f", "x", "Counter"}
    assert {"math", "np", "string"} & trusted_names(["f(math.pi, np.inf, string(1))"]) == {"math", "np"}
    assert class_names(["s = Stack()\ns.push(1)\nassert Average([1]) == 1.5 and Split('a').lower()"]) == {"Stack"}
    assert class_names(["assert V(1) + V(2) == V(3) and 1.5 == Average(2) and isinstance(x, E) and Tree.of(1)"]) == {
        "V",
        "E",
        "Tree",
    }
    assert class_names(["class Stack: pass\nStack().push(1)\ns = make()\ns.push(1)"]) == set()


DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=5)
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes()
    | st.builds(range, st.integers(-9, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(DATA)
def test_values_arrive_as_they_were(value: Any) -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError

    one, other = (Message(refuse, refuse) for _ in range(2))
    arrived = other.decode(json.loads(json.dumps(one.encode([value, value]))))
    assert arrived == [value, value]
    assert type(arrived[0]) is type(value)
    if isinstance(value, (list, dict, set)):
        assert arrived[0] is arrived[1]
        assert len(one.containers) == len(other.containers)


KINDS = (
    "list set deque bytearray dict OrderedDict Counter defaultdict tuple frozenset bytes same int float complex range"
)
FORMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.text(max_size=3)
    | st.sampled_from(["eval", "type", "int", "os"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.builds(
            lambda kind, rest: [kind, *rest],
            st.sampled_from([*KINDS.split(), "type", "text", "named", "object", "exception"]),
            st.lists(inner, max_size=4),
        )
    ),
    max_leaves=12,
)
PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    list,
    tuple,
    dict,
    set,
    frozenset,
    bytearray,
    range,
    type(None),
    type(...),
    type,
)


@settings(max_examples=150, deadline=None)
@given(FORMS)
@example(["type", "eval"])
@example(["list", [["same", 0]]])
@example(["named", "A", ["count"], [["object", 0]]])
def test_a_forged_form_is_data_or_an_error(form: Any) -> None:
    class Handle:
        """Handle of an object of the program."""

    message = Message(lambda _: None, lambda _: Handle())
    try:
        value = message.decode(form)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return
    reached, todo = [], [value]
    while todo:
        item = todo.pop()
        assert isinstance(item, (*PLAIN, deque, Handle))
        if isinstance(item, (list, tuple, set, frozenset, deque, dict)) and not any(item is each for each in reached):
            reached.append(item)
            todo += [*item, *item.values()] if isinstance(item, dict) else item
