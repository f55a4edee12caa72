"""The check of strategies passes core's own, in one process and on two ranks, and names the fault of broken ones."""

from __future__ import annotations

import pytest
from broken_strategies import Built

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import check_strategy


def test_cores_own_strategy_keeps_the_contract_on_two_ranks_and_in_one_process() -> None:
    check_strategy(TorchStrategy("cpu"))
    check_strategy(TorchStrategy("cpu"), ranks=2)


@pytest.mark.parametrize(
    ("which", "clause"),
    [
        ("AveragingTrainable", "gradients are summed, never averaged"),
        ("ForgetfulTrainable", "load after save"),
        ("LazyTrainable", "must change the weights"),
        ("SleepwalkingTrainable", "reload after offload"),
        ("StaleTrainable", r"weights\(\) after training: .* off that of torch"),
        ("EagerAverageTrainable", "the exported moving average equals the weights"),
        ("AverageLosingTrainable", "the moving average after load: .* off"),
        ("DeafTrainable", r"load_weights\(\), which gives every parameter to assign"),
        ("HalfTrainable", r"logits of the inner model inside gathered\(\)"),
    ],
)
def test_a_strategy_that_breaks_a_rule_is_told_which(which: str, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_strategy(Built(which=which))


@pytest.mark.parametrize(
    ("which", "clause"),
    [
        ("BuildTimeTrainable", "with LoRA: the exported adapter is untrained, all of lora_B is zero"),
        ("UnmergedTrainable", r"with LoRA: weights\(\) after training: names .* unknown: .*base_layer"),
        ("SharingTrainable", r"with LoRA: .* shared_base\(\)"),
    ],
)
def test_a_strategy_that_breaks_a_rule_of_adapters_is_told_which(which: str, clause: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(AssertionError, match=clause):
        check_strategy(Built(which=which))


def test_a_fault_that_only_ranks_show_is_found_on_two() -> None:
    with pytest.raises(AssertionError, match="on 2 ranks: Built: grad_norm is .* gradients are summed"):
        check_strategy(Built(which="LonelyTrainable"), ranks=2)


def test_a_strategy_may_refuse_an_average_before_training() -> None:
    check_strategy(Built(which="RefusingTrainable"))
