"""Ranks that share the layers of a model (`tensor`): runs beside plain torch in one process, checkpoints, and refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.terms import Term
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks
from rlhf_strategy_deepspeed import tensor

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import deepspeed_ranks as ranks
import tensor_ranks
from rank_results import (
    Result,
    assert_continues,
    assert_resumes,
    assert_same,
    assert_transformers_loads,
    outcome,
)

needs_engines = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("rlhf_algos") is None, reason="needs deepspeed and rlhf_algos"
)
WORDS = ["tracked:0t", "averaged:2t", "wide:1t", "ppo:2ot"]
"""Every stage that goes together with it occurs. In `tracked` the reference follows the actor, `wide` is grpo with checkpointed
layers, and `ppo` has a value head, and offload."""


def launch(folder: Path, size: int, words: list[str]) -> None:
    """Run the words of `tensor_ranks` on `size` ranks."""
    ranks.write_data(folder)
    done = run_ranks(size, tensor_ranks.main, folder, *words, seconds=900.0)
    assert not any(rank.code for rank in done), "\n".join(rank.stderr[-3000:] for rank in done if rank.code)


@cache
def reference(case: str, folder: Path) -> Result:
    """Return the numbers of a case under plain torch in this process; `folder` keeps what it exports."""
    return tensor_ranks.run(folder, case, TorchStrategy("cpu"), f"{case}-torch")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of two ranks left."""
    folder = tmp_path_factory.mktemp("tensor")
    launch(folder, 2, WORDS)
    return folder


@needs_engines
@pytest.mark.engines
@pytest.mark.parametrize("word", WORDS)
def test_ranks_that_share_layers_change_no_number(word: str, quick: Path) -> None:
    """Losses, gradient norms of every step, samples and final weights are those of one process."""
    found, expected = outcome(quick, word), reference(word.split(":")[0], quick)
    assert {"loss/actor", "grad_norm/actor"} <= found["metrics"][0].keys()
    assert_same(found, expected, tolerance=1e-4)


@needs_engines
@pytest.mark.engines
@pytest.mark.parametrize("word", WORDS)
def test_a_resumed_run_goes_on_to_the_very_same_weights(word: str, quick: Path) -> None:
    assert_resumes(outcome(quick, word))


@needs_engines
@pytest.mark.engines
def test_one_process_continues_what_ranks_that_share_layers_wrote(quick: Path) -> None:
    for word in ("averaged:2t", "ppo:2ot"):
        case, name = word.split(":")[0], word.replace(":", "-")
        found = tensor_ranks.resumed(quick, case, TorchStrategy("cpu"), name, f"{name}-torch")
        assert_continues(found, outcome(quick, word))


@needs_engines
@pytest.mark.engines
def test_ranks_continue_what_other_ranks_and_one_process_wrote(quick: Path) -> None:
    """Two ranks that share layers, from torch; and two with rows and shards of their own, from those that share layers."""
    expected = reference("averaged", quick)
    launch(quick, 2, ["averaged:averaged-torch:1t", "averaged:averaged-2t:3"])
    for word in ("averaged:averaged-torch:1t", "averaged:averaged-2t:3"):
        assert_continues(outcome(quick, word), expected)


@needs_engines
@pytest.mark.engines
def test_transformers_loads_what_was_trained(quick: Path) -> None:
    assert_transformers_loads(quick, "wide:1t")


@needs_engines
@pytest.mark.engines
def test_moving_averages_are_exported_whole(quick: Path) -> None:
    reference("averaged", quick)
    found, expected = (
        load_file(quick / name / "model-ema" / "model.safetensors") for name in ("averaged-2t", "averaged-torch")
    )
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        torch.testing.assert_close(found[name], whole, rtol=0.0, atol=1e-4)


@needs_engines
@pytest.mark.engines
@pytest.mark.slow
def test_pairs_of_ranks_with_rows_of_their_own_change_no_number(tmp_path: Path) -> None:
    """Four ranks: two share the layers, and each pair has half of the batch."""
    words = ["tracked:2t", "ppo:1t", "averaged:0t", "bf16:2t", "taught:1t"]
    launch(tmp_path, 4, words)
    for word in words:
        case = word.split(":")[0]
        assert_same(outcome(tmp_path, word), reference(case, tmp_path), tolerance=0.02 if case == "bf16" else 1e-4)
        assert_resumes(outcome(tmp_path, word))


@needs_engines
@pytest.mark.engines
@pytest.mark.slow
def test_four_ranks_that_share_layers_and_pairs_continue_each_other(tmp_path: Path) -> None:
    words = ["whole:2f", "whole:1t", "whole:whole-2f:0t", "whole:whole-1t:1f"]
    launch(tmp_path, 4, words)
    expected = reference("whole", tmp_path)
    for word in words[:2]:
        assert_same(outcome(tmp_path, word), expected, tolerance=1e-4)
        assert_resumes(outcome(tmp_path, word))
    for word in words[2:]:
        assert_continues(outcome(tmp_path, word), expected)


# ----------------------------------------------------------------------------------------------------------------------
# without ranks


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rank", range(3))
def test_a_stretch_of_a_part_is_read_from_stretches_of_the_whole(dim: int, rank: int) -> None:
    """Every stretch, beside the same of the part that is cut out."""
    whole = torch.arange(36.0).view(6, 6)
    part = whole.split(2, dim)[rank]
    cut = tensor.Cut(dim, part.shape, rank, 3, None)
    flat, expected = whole.view(-1), part.reshape(-1)
    for start in range(12):
        for count in range(1, 13 - start):
            found = cut.read(lambda first, number: flat[first : first + number], start, count)
            assert torch.equal(found, expected[start : start + count])


def built(model: str = "tiny:heads=4,kv_heads=2", **options: Any) -> Any:
    """A trained role's module."""
    chosen = TrainedOptions(model=model, optim=AdamW(), **options)
    terms: Any = (("data", Term("actor", "data", None)),)  # type: ignore[arg-type]  # nothing is computed
    return build_module(RoleSpec("actor", chosen, frozenset({"logprobs_NT"}), terms=terms))


def compiled() -> Any:
    """A module whose first layer is compiled, without the compiler."""
    module = built()
    module.model.base_model.layers[0]._compiled_call_impl = module.model.base_model.layers[0]._call_impl
    return module


def planned(plan: dict[str, str] | None) -> Any:
    """A module whose model has another plan."""
    module = built()
    module.model.config.base_model_tp_plan = plan
    return module


def altered(change: Callable[[Any, Any], None]) -> Any:
    """A module that `change` altered; it gets the module and the attention of the first layer."""
    module = built()
    change(module, module.model.base_model.layers[0].self_attn)
    return module


def other_kind(_: Any, attention: Any) -> None:
    attention.q_proj = type("Linear4bit", (torch.nn.Linear,), {})(64, 64, bias=False)


def extra_weight(_: Any, attention: Any) -> None:
    attention.sinks = torch.nn.Parameter(torch.zeros(4))


def images(module: Any, _: Any) -> None:
    module.vision = object()


@pytest.mark.parametrize(
    ("make", "together", "message"),
    [
        (
            partial(built, "tiny"),
            2,
            "2 must divide the 2 attention heads and the 1 key-value heads; choose another number",
        ),
        (built, 3, "3 must divide the 4 attention heads and the 2 key-value heads; choose another number"),
        (
            partial(built, "tiny:heads=4,kv_heads=2,intermediate=191"),
            2,
            "2 does not divide the width 191 of layers.0.mlp.gate_proj; choose another number",
        ),
        (compiled, 2, "but the model is compiled; leave compile off"),
        (partial(altered, images), 2, "but the model reads images; choose one that reads text alone"),
        (
            partial(altered, other_kind),
            2,
            "but the model has layers of Linear4bit, not of plain weights; leave quantize out",
        ),
        (
            partial(altered, extra_weight),
            2,
            "but the model has layers.0.self_attn.sinks, which transformers' plan leaves out; choose another model",
        ),
        (partial(planned, None), 2, "but the model has no plan for it in transformers; choose another model"),
        (
            partial(planned, {"layers.*.self_attn.q_proj": "colwise_gather_output"}),
            2,
            "but the model needs 'colwise_gather_output' in transformers' plan, which is not supported",
        ),
    ],
)
def test_models_that_cannot_be_shared_are_refused_before_weights_are_read(
    make: Callable[[], Any], together: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    monkeypatch.setattr(tensor, "read_weight", lambda _: pytest.fail("a weight was read"))
    with pytest.raises(UsageError) as caught:
        tensor.cut_layers(module, together)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_adapters_are_refused() -> None:
    from rlhf_core.contract.options import Lora

    with pytest.raises(UsageError, match="cuts layers, but the model has adapters; train it without lora"):
        tensor.cut_layers(built(lora=Lora(rank=4)), 2)
