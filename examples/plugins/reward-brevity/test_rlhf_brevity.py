from rlhf_brevity import Brevity
from rlhf_core.testing import check_reward


def test_brevity_keeps_the_contract_of_a_reward() -> None:
    check_reward(Brevity())
