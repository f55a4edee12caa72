"""Results of readers, engines and evaluators that break the contract: the message names the provider and the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.contract.providers import Data
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.stream import Stream
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.rollout.episodes import complete
from rlhf_core.rollout.fake import FakeEngine, FakeRollout
from rlhf_core.run.data import RunData
from rlhf_core.run.rollout_metrics import add_measured
from rlhf_core.testing import tiny_rollouts

HERE = r"of .*test_provider_results"
SAMPLED = tiny_rollouts(prompts=2, completions=4).with_extras(
    versions_NT=torch.zeros(tiny_rollouts(2, 4).tokens_NT.shape, dtype=torch.int64)
)
SAMPLING = Sampling(n=4, max_new_tokens=SAMPLED.tokens_NT.shape[1])


def without(name: str) -> Rollouts:
    return replace(SAMPLED, extras={key: value for key, value in SAMPLED.extras.items() if key != name})


class Engine:
    def __init__(self, result: object) -> None:
        self.result = result

    def __call__(self, role: object, prompts: Prompts, sampling: Sampling) -> Any:
        return self.result


def completed(result: object, sampling: Sampling = SAMPLING) -> Rollouts:
    prompts = Prompts(["a", "b"], [[1], [2]], [Example("a"), Example("b")], [0, 1], [{}, {}])
    nothing: Any = None
    engine: Any = Engine(result)
    return complete(engine, None, nothing, prompts, sampling, EpisodeLimits(), nothing)


def test_completions_that_were_asked_for_pass_as_they_are() -> None:
    assert completed(SAMPLED) is SAMPLED


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType; an engine returns Rollouts"),
        (SAMPLED.rows([0, 1, 4, 5]), "returned 4 completions for 2 prompts; with sampling.n 4 it must return 8"),
        (
            replace(SAMPLED, mask_NT=SAMPLED.mask_NT.float()),
            r"mask_NT must be torch.bool of the shape .*, not torch.float32",
        ),
        (replace(SAMPLED, mask_NT=SAMPLED.mask_NT[:, 1:]), r"mask_NT must be torch.bool of the shape"),
        (replace(SAMPLED, tokens_NT=SAMPLED.tokens_NT.int()), r"tokens_NT must be torch.int64 of .*, not torch.int32"),
        (without("sampler_logprobs_NT"), r"the extra 'sampler_logprobs_NT' must be given, of the shape \(8, "),
        (without("versions_NT"), r"the extra 'versions_NT' must be given"),
    ],
)
def test_an_engine_that_returns_something_else_is_named(result: object, message: str) -> None:
    with pytest.raises(ContractError, match=rf"^rollout Engine {HERE}:? {message}"):
        completed(result)


def test_an_engine_that_samples_on_beyond_the_limit_is_named() -> None:
    longest = int(SAMPLED.lengths_N.max())
    assert completed(SAMPLED, replace(SAMPLING, max_new_tokens=longest)) is SAMPLED
    with pytest.raises(
        ContractError, match=rf"a completion of {longest} tokens, above sampling.max_new_tokens {longest - 1}$"
    ):
        completed(SAMPLED, replace(SAMPLING, max_new_tokens=longest - 1))


ROWS = {
    "a dictionary": ({"prompt": "x"}, r"gave {'prompt': 'x'} as row 0; write Example"),
    "a text": ("x", r"gave 'x' as row 0"),
    "a prompt that is a number": (Example(3), r"prompt of row 0 is 3; write a text or"),  # type: ignore[arg-type]
    "a completion that is bare": (Example("x", "yes"), r"completions of row 0 is 'yes'; write a tuple"),  # type: ignore[arg-type]
}


class Once:
    """Rows without a length."""

    def __init__(self, *rows: object) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("source", [lambda row: [row], Once])
def test_a_reader_of_wrong_rows_is_named(case: str, source: Callable[[object], Any]) -> None:
    row, message = ROWS[case]
    stream = Stream(source(row), 1, reader="data Lines of lines")
    with pytest.raises(ContractError, match=rf"^data Lines of lines:? {message}"):
        next(stream)


@dataclass(frozen=True)
class Nothing(Data):
    """None in place of rows."""

    def __call__(self, split: str) -> Any:
        return None


def test_a_reader_that_returns_no_rows_at_all_is_named() -> None:
    plan: Any = SimpleNamespace(config=SimpleNamespace(providers={"data": Nothing()}))
    engines: Any = {"data": Nothing()}
    with pytest.raises(
        ContractError, match=rf"^data Nothing {HERE} returned NoneType for the split 'heldout'; return rows"
    ):
        RunData(plan, engines).read("heldout")


def test_the_stream_of_a_run_knows_the_name_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stream(*rows: object, **options: Any) -> Any:
        given.update(options)
        raise StopAsyncIteration

    monkeypatch.setattr("rlhf_core.data.prefetch.Stream", stream)
    config: Any = SimpleNamespace(providers={}, batch_size=1, seed=0)
    anything: Any = SimpleNamespace(rank=0, size=1)
    monkeypatch.setattr("rlhf_core.data.prefetch.Preparer", lambda *_: SimpleNamespace(block=1))
    with pytest.raises(StopAsyncIteration):
        Prefetcher.for_data([], anything, Nothing(), False, config, anything)
    assert given["reader"] == f"data Nothing of {__name__}"


def test_numbers_of_an_evaluator_become_plain() -> None:
    measured = {
        "a": 1,
        "b": 2.5,
        "c": torch.tensor(0.5),
        "d": np.float32(0.25),
        "e": torch.ones(1),
        "f": np.ones((1, 1)),
    }
    values: dict[str, float] = {}
    add_measured(values, measured, "mine")
    assert values == {
        f"eval/{name}": value for name, value in zip("abcdef", (1, 2.5, 0.5, 0.25, 1.0, 1.0), strict=True)
    }
    assert {type(value) for value in values.values()} == {int, float}


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (None, "returned None; return numbers by name, {} for none"),
        ([1.0], r"returned \[1.0\]; return numbers by name"),
        ({"a": "b"}, "the metric 'a' must be one number, not 'b'"),
        ({"a": torch.ones(3)}, r"the metric 'a' must be one number, not tensor"),
        ({"a": None}, "the metric 'a' must be one number, not None"),
    ],
)
def test_an_evaluator_that_returns_no_numbers_is_named(measured: object, message: str) -> None:
    with pytest.raises(ContractError, match=rf"^evaluator mine:? {message}"):
        add_measured({}, measured, "mine")


def test_the_engine_without_a_model_refuses_roles_with_one() -> None:
    role: Any = SimpleNamespace(version=0, weights=lambda: iter([("lm_head.weight", torch.zeros(2, 2))]))
    with pytest.raises(UsageError, match="'fake' samples roles without a model alone; pass .*strategy"):
        FakeEngine(FakeRollout()).sync(role)
