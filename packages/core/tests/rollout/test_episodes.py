"""Episodes against transcripts written by hand, a model's own distribution, and what engines do with a single turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.options import EpisodeLimits, ModelOptions, Sampling, turn_uid
from rlhf_core.contract.providers import Environment
from rlhf_core.data.encoder import Encoder
from rlhf_core.errors import ContractError
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.reward.environment import EnvironmentReward
from rlhf_core.rollout.assemble import assemble
from rlhf_core.rollout.episodes import play
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.testing.tiny_environment import TinyEnvironment
from rlhf_core.training.local_role import LocalRole

TOKENIZER = load_tokenizer("tiny", ModelOptions())
ENCODER = Encoder(TOKENIZER)
EOS = int(TOKENIZER.eos_token_id)
LIMITS = EpisodeLimits()
AFTER_12 = TOKENIZER.decode([*b"abc", EOS, *b"12"])
"""The prompt ab, the turn c, and the feedback 12."""


def ask(*texts: str) -> Prompts:
    examples = [Example(text, meta={"row": i}, origin=f"rows.jsonl:{i + 1}") for i, text in enumerate(texts)]
    return Prompts(list(texts), [list(text.encode()) for text in texts], examples, [10 + i for i in range(len(texts))])


@dataclass
class Script:
    """A sampler that answers what was written down, with the log-probability -token / 100, and remembers what it was asked."""

    turns: Mapping[str, Sequence[int]]
    """the next turn by the text of everything before it"""
    asked: list[tuple[Prompts, Sampling]] = field(default_factory=list)

    def __call__(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        self.asked.append((prompts, sampling))
        rows = [list(self.turns[TOKENIZER.decode(ids)]) for ids in prompts.token_ids for _ in range(sampling.n)]
        return assemble(
            prompts,
            rows,
            ["stop" if row[-1] == EOS else "length" for row in rows],
            TOKENIZER,
            version=3,
            per_token={"sampler_logprobs_NT": [[-token / 100 for token in row] for row in rows]},
        )


@dataclass(frozen=True)
class Recorded(Environment):
    """Answers by a table: the text of a turn to its feedback, or to an exception."""

    answers: Mapping[str, Any] = field(default_factory=dict)
    heard: list[tuple[str, Action]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    messages: bool = False

    metrics = ("calls",)

    def __call__(self, example: Example, seed: int) -> Session:
        return Recording(self, example)


@dataclass
class Recording(Session):
    environment: Recorded
    example: Example

    def respond(self, action: Action) -> Feedback:
        self.environment.heard.append((str(self.example.prompt), action))
        answer = self.environment.answers[action.text]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]  # a table of anything, to be wrong on purpose

    def close(self) -> None:
        self.environment.closed.append(str(self.example.prompt))


def played(
    script: Script, environment: Environment, *texts: str, limits: EpisodeLimits = LIMITS, tokens: int = 40
) -> Rollouts:
    return play(script, environment, ask(*texts), Sampling(n=1, max_new_tokens=tokens, seed=5), limits, ENCODER)


def test_an_episode_is_the_transcript_written_by_hand() -> None:
    """Two prompts: one takes two turns, the other one. Ids, mask, log-probabilities, rewards and turns, cell by cell."""
    script = Script({"ab": [*b"c", EOS], "x": [*b"yz", EOS], AFTER_12: [*b"d", EOS]})
    environment = Recorded(
        {
            "c": Feedback("12", reward=0.25, metrics={"calls": 1.0}),
            "d": Feedback("bye", reward=1.0, score=0.5, done=True, metrics={"calls": 1.0}),
            "yz": Feedback(reward=-1.0, done=True),
        }
    )
    rollouts = played(script, environment, "ab", "x")
    first, second = rollouts.rows([0]), rollouts.rows([1])
    assert first.tokens_NT.tolist() == [[*b"c", EOS, *b"12", *b"d", EOS]]
    assert first.mask_NT.tolist() == [[True, True, False, False, True, True]]
    assert first["turns_NT"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert first["environment_rewards_NT"].tolist() == [[0, 0.25, 0, 0, 0, 1.0]]
    expected = torch.tensor([[-0.99, -EOS / 100, 0, 0, -1.0, -EOS / 100]])
    torch.testing.assert_close(first["sampler_logprobs_NT"], expected)
    assert second.tokens_NT.tolist() == [[*b"yz", EOS]]
    assert second.mask_NT.tolist() == [[True, True, True]]
    assert second["environment_rewards_NT"].tolist() == [[0, 0, -1.0]]
    assert rollouts.prompt_NL.tolist()[0][:2] == [*b"ab"]
    assert rollouts["turns_N"].tolist() == [2, 1]
    assert rollouts["environment/calls_N"].tolist() == [2.0, 0.0]
    assert rollouts["environment_scores_N"].tolist() == [0.5, -1.0]  # the reward where no score was given
    assert rollouts.finish == ["stop", "stop"]
    assert rollouts.texts == ["cd", "yz"]
    assert rollouts.version == 3
    assert rollouts.meta[0]["transcript"] == [
        {"from": "policy", "turn": 0, "text": "c"},
        {"from": "environment", "turn": 0, "text": "12"},
        {"from": "policy", "turn": 1, "text": "d"},
        {"from": "environment", "turn": 1, "text": "bye"},
    ]
    assert rollouts.meta[0]["row"] == 0
    assert sorted(environment.closed) == ["ab", "x"]


def test_the_second_turn_is_asked_with_the_ids_of_the_first_and_its_own_seed() -> None:
    script = Script({"ab": [*b"c", EOS], AFTER_12: [*b"d", EOS]})
    environment = Recorded({"c": Feedback("12"), "d": Feedback(done=True)})
    played(script, environment, "ab")
    (first, how), (second, later) = script.asked
    assert (first.token_ids, first.uids, first.limits, how.n) == ([[*b"ab"]], [10], [], 1)
    assert second.token_ids == [[*b"abc", EOS, *b"12"]]
    assert second.uids == [turn_uid(10, 0, 1)]
    assert later.seed_for(second.uids[0], 0) == how.seed_for(10, 0, turn=1) != how.seed_for(10, 0)
    assert second.limits == [40 - 4]
    assert [(action.turn, action.token_ids) for _, action in environment.heard] == [(0, (99, EOS)), (1, (100, EOS))]


@pytest.mark.parametrize(
    ("tokens", "limits", "finish", "length"),
    [
        (40, EpisodeLimits(turns=1), "turns", 2),
        (40, EpisodeLimits(turns=2), "turns", 6),
        (4, EpisodeLimits(), "length", 2),  # the feedback would leave no token for another turn
        (5, EpisodeLimits(), "length", 5),
        (40, EpisodeLimits(turn_tokens=1, turns=1), "turns", 1),
    ],
)
def test_limits_end_an_episode_after_a_token_of_the_policy(
    tokens: int, limits: EpisodeLimits, finish: str, length: int
) -> None:
    script = Script({"ab": [*b"c", EOS], AFTER_12: [*b"d", EOS]})
    rollouts = played(script, Recorded({"c": Feedback("12"), "d": Feedback("12")}), "ab", limits=limits, tokens=tokens)
    assert (rollouts.finish, int(rollouts.lengths_N)) == ([finish], length)
    assert bool(rollouts.mask_NT[0, -1])


def test_a_turn_that_an_engine_samples_too_long_is_cut_by_core() -> None:
    script = Script({"ab": [*b"cd", EOS]})
    environment = Recorded({"c": Feedback(done=True, reward=2.0)})
    rollouts = played(script, environment, "ab", limits=EpisodeLimits(turn_tokens=1))
    assert rollouts.tokens_NT.tolist() == [[*b"c"]]
    assert environment.heard[0][1] == Action("c", (99,), "length", 0)
    assert rollouts["environment_rewards_NT"].tolist() == [[2.0]]


def test_no_episode_gets_another_turn_after_the_seconds() -> None:
    @dataclass(frozen=True)
    class Slow(Environment):
        def __call__(self, example: Example, seed: int) -> Session:
            return Sleeping(str(example.prompt))

    @dataclass
    class Sleeping(Session):
        prompt: str

        async def respond(self, action: Action) -> Feedback:
            await asyncio.sleep(0 if self.prompt == "ab" else 60)
            return Feedback("12", reward=1.0)

    script = Script({"ab": [*b"c", EOS], "x": [*b"y", EOS]})
    rollouts = played(script, Slow(), "ab", "x", limits=EpisodeLimits(seconds=0.2))
    assert rollouts.finish == ["seconds", "seconds"]
    assert rollouts["environment_rewards_NT"].sum(1).tolist() == [1.0, 0.0]  # the second never answered


def test_coroutines_of_all_episodes_run_together_in_one_loop() -> None:
    """Each waits until both are there: one after the other they would wait forever."""

    @dataclass(frozen=True)
    class Meeting(Environment):
        here: list[asyncio.AbstractEventLoop] = field(default_factory=list)

        async def __call__(self, example: Example, seed: int) -> Session:
            return Waiting(self.here)

    @dataclass
    class Waiting(Session):
        here: list[asyncio.AbstractEventLoop]

        async def respond(self, action: Action) -> Feedback:
            self.here.append(asyncio.get_running_loop())
            async with asyncio.timeout(20):
                while len(self.here) < 2:
                    await asyncio.sleep(0)
            return Feedback(done=True, reward=1.0)

        async def close(self) -> None:
            self.here.append(asyncio.get_running_loop())

    meeting = Meeting()
    rollouts = played(Script({"ab": [*b"c", EOS], "x": [*b"y", EOS]}), meeting, "ab", "x")
    assert rollouts["environment_rewards_NT"].sum(1).tolist() == [1.0, 1.0]
    assert len(meeting.here) == 4
    played(Script({"ab": [*b"c", EOS], "x": [*b"y", EOS]}), meeting, "ab", "x")
    assert len(set(meeting.here)) == 1, "in the next batch too, so that sessions may keep a connection"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_of_the_environment_names_it_and_the_example(asynchronous: bool) -> None:
    @dataclass(frozen=True)
    class Breaking(Environment):
        closed: list[str] = field(default_factory=list)

        def __call__(self, example: Example, seed: int) -> Session:
            return Broken(self.closed)

    @dataclass
    class Broken(Session):
        closed: list[str]

        def respond(self, action: Action) -> Feedback | Awaitable[Feedback]:
            return self.later() if asynchronous else self.now()

        def now(self) -> Feedback:
            raise KeyError("apple")

        async def later(self) -> Feedback:
            return self.now()

        def close(self) -> None:
            self.closed.append("closed")

    breaking = Breaking()
    with pytest.raises(KeyError, match="apple") as caught:
        played(Script({"ab": [*b"c", EOS]}), breaking, "ab")
    (note,) = caught.value.__notes__
    assert "Breaking" in note
    assert "on the prompt 'ab' of rows.jsonl:1, turn 0" in note
    assert breaking.closed == ["closed"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("12", "returned '12', which is not a Feedback"),
        (Feedback("12", token_ids=(1,)), "more than one of text, messages and token_ids"),
        (Feedback(messages=({"role": "user", "content": "x"},)), "set `messages = True` in the class"),
        (Feedback(metrics={"other": 1.0}), r"a metric 'other' that is not in its `metrics`: \('calls',\)"),
    ],
)
def test_feedback_that_breaks_the_contract_is_refused(answer: Any, reason: str) -> None:
    with pytest.raises(ContractError, match=f"environment Recorded.*rows.jsonl:1.*{reason}"):
        played(Script({"ab": [*b"c", EOS]}), Recorded({"c": answer}), "ab")


def test_the_reward_of_an_episode_or_of_each_turn() -> None:
    script = Script({"ab": [*b"c", EOS], AFTER_12: [*b"d", EOS]})
    environment = Recorded(
        {
            "c": Feedback("12", reward=0.25, metrics={"calls": 1.0}),
            "d": Feedback(reward=1.0, done=True),
        }
    )
    rollouts = played(script, environment, "ab")
    whole, turns = EnvironmentReward()(rollouts), EnvironmentReward(per="turn")(rollouts)
    assert (whole.rewards_N.tolist(), whole.rewards_NT) == ([1.25], None)
    assert turns.rewards_N.tolist() == [1.0]
    assert turns.rewards_NT is not None
    assert turns.rewards_NT.tolist() == [[0, 0.25, 0, 0, 0, 0]]
    assert {name: values.tolist() for name, values in whole.metrics.items()} == {"calls": [1.0]}
    assert whole.scores_N is not None
    assert whole.scores_N.tolist() == [1.25]


# ----------------------------------------------------------------------------------------------------------------------
# real sampling
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def role() -> Any:
    return LocalRole(tiny_run("unused").plan, "actor")


def test_the_trainer_computes_the_same_log_probabilities_over_the_whole_episode(role: Any) -> None:
    """Each turn was sampled from a context read anew; the trainer reads the episode once."""
    sampling = Sampling(n=6, max_new_tokens=30, seed=3)
    with HuggingFaceRollout().session(role) as sample:
        rollouts = play(
            sample, TinyEnvironment(), ask("One?", "A longer prompt"), sampling, EpisodeLimits(turn_tokens=3), ENCODER
        )
    assert int(rollouts["turns_N"].max()) > 2
    logprobs_NT = role.infer(rollouts, frozenset({"logprobs_NT"}))["logprobs_NT"]
    mask_NT = rollouts.mask_NT
    torch.testing.assert_close(rollouts["sampler_logprobs_NT"][mask_NT], logprobs_NT[mask_NT], atol=1e-5, rtol=0)
    assert not rollouts["sampler_logprobs_NT"][~mask_NT].any()
    feedback = {
        bytes(row[~mask][: int(n) - int(mask.sum())].tolist())
        for row, mask, n in zip(rollouts.tokens_NT, mask_NT, rollouts.lengths_N)
    }
    assert feedback <= {b" more" * times for times in range(8)}


def test_the_first_turn_is_the_completion_that_has_no_environment(role: Any) -> None:
    prompts, sampling = ask("One?", "Two?"), Sampling(n=3, max_new_tokens=4, seed=3)
    alone = HuggingFaceRollout()(role, prompts, sampling)
    with HuggingFaceRollout().session(role) as sample:
        episodes = play(
            sample,
            TinyEnvironment(),
            prompts,
            replace(sampling, max_new_tokens=30),
            EpisodeLimits(turn_tokens=4),
            ENCODER,
        )
    for i in range(len(alone)):
        length = int(alone.lengths_N[i])
        assert episodes.tokens_NT[i, :length].tolist() == alone.tokens_NT[i, :length].tolist()


def test_an_episode_does_not_depend_on_the_others_of_its_batch(role: Any) -> None:
    sampling = Sampling(n=2, max_new_tokens=30, seed=3)
    with HuggingFaceRollout().session(role) as sample:
        args = (sampling, EpisodeLimits(turn_tokens=3), ENCODER)
        together = play(sample, TinyEnvironment(), ask("One?", "Two?", "Three"), *args)
        alone = play(sample, TinyEnvironment(), ask("One?", "Two?", "Three").rows([1]), *args)
    for k in range(2):
        length = int(alone.lengths_N[k])
        assert together.tokens_NT[2 + k, :length].tolist() == alone.tokens_NT[k, :length].tolist()
        assert int(together.lengths_N[2 + k]) == length


def test_the_mean_reward_is_the_one_that_enumeration_gives(role: Any) -> None:
    """Two turns of one token: all 259 first tokens, and all second ones after each that goes on."""
    prompt = [*b"Go"]

    def even(contexts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next-token probabilities (B, V) and the probability of an even token (B,)."""
        with torch.inference_mode():
            probabilities = role.causal_lm(torch.tensor(contexts)).logits[:, -1].double().softmax(-1)
        return probabilities, probabilities[:, ::2].sum(-1)

    (first_V,), _ = even([prompt])
    goes_on = list(range(0, len(first_V), 2))
    _, second = even([[*prompt, token, *b" more"] for token in goes_on])
    expected = float((first_V[goes_on] * (1 + second)).sum())
    square = float((first_V[goes_on] * (1 + 3 * second)).sum())  # 1 or 2, squared
    samples = 3000
    with HuggingFaceRollout().session(role) as sample:
        rollouts = play(
            sample, TinyEnvironment(), ask("Go"), Sampling(n=samples, max_new_tokens=30, seed=1),
            EpisodeLimits(turns=2, turn_tokens=1), ENCODER,
        )  # fmt: skip
    mean = float(EnvironmentReward()(rollouts).rewards_N.mean())
    assert abs(mean - expected) < 4 * ((square - expected**2) / samples) ** 0.5


def test_limits_per_prompt_cut_the_engines_completions_there(role: Any) -> None:
    """The tokens are those of a longer completion, cut."""
    sampling = Sampling(n=2, max_new_tokens=6, seed=3)
    whole = HuggingFaceRollout()(role, ask("One?", "Two?"), sampling)
    cut = HuggingFaceRollout()(role, replace(ask("One?", "Two?"), limits=[2, 6]), sampling)
    assert cut.lengths_N.tolist()[2:] == whole.lengths_N.tolist()[2:]
    assert cut.tokens_NT[:2, :2].tolist() == whole.tokens_NT[:2, :2].tolist()
    assert cut.lengths_N.tolist()[:2] == [2, 2]
    assert cut.finish[:2] == ["length", "length"]
