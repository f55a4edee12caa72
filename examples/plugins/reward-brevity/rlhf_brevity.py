from dataclasses import dataclass

from rlhf_core import Reward, Rollouts, hookimpl


@dataclass(frozen=True)
class Brevity(Reward):
    """1 for an empty answer, 0 at `limit` characters."""

    limit: int = 400
    """characters at which the reward reaches zero"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [max(0.0, 1 - len(text) / self.limit) for text in rollouts.texts]


@hookimpl
def rlhf_reward() -> dict[str, type]:
    return {"brevity": Brevity}
