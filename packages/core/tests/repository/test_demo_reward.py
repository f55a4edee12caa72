"""The reward of the demo, recipes/short_answer.py, gives what a reader of the answers would."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("vaderSentiment", reason="the demo's second measure comes with rlhf-core[sentiment]")

FILE = Path(__file__).resolve().parents[4] / "recipes" / "short_answer.py"
DEMO = runpy.run_path(str(FILE))
END = "<END>"
"""Stands for the end of a turn in the table; an answer without it was cut."""
QUESTION = "Describe the sound of a busy street."


@pytest.mark.parametrize(
    ("answer", "whole", "about"),
    [
        ("The street hums with cars and voices." + END, 1, 1),
        ("It hums with cars. Streets are never silent!" + END, 1, 1),  # the plural of a word of the question
        ("It hums with cars and voices." + END, 1, 0),
        ("It hums. It roars. It sings." + END, 0, 0),  # sentences of two words
        ("The street hums all day. Cars pass by. People shout." + END, 0, 1),  # three sentences
        ("The street hums with cars and voices", 0, 1),  # cut at the limit
        ("The street hums with cars and voices" + END, 0, 1),  # no full stop
        ("The street hums with cars and voices.", 0, 1),  # a full stop, and then cut
        ('She said: "The street hums all day."' + END, 1, 1),
        ("Describe and tell me about it, you would." + END, 1, 0),  # words that ask, and not what is asked about
        ("Streetlights are all around me here." + END, 1, 0),  # a word that only begins like it
        ("" + END, 0, 0),
        ("..." + END, 0, 0),
        ("Busy street." + END, 0, 1),
    ],
)
def test_an_answer_earns_what_it_should(answer: str, whole: int, about: int) -> None:
    text, finish = answer.removesuffix(END), "stop" if answer.endswith(END) else "length"
    meta = [{"prompt": ({"role": "system", "content": "Answer!"}, {"role": "user", "content": QUESTION})}]
    scores = DEMO["reward_func"](completions=[text], finish=[finish], meta=meta)
    assert scores["rewards"] == [pytest.approx(0.6 * whole + 0.4 * about)]
    assert (scores["extra_logs"]["whole"], scores["extra_logs"]["about"]) == ([whole], [about])


def test_the_mood_is_measured_and_earns_nothing() -> None:
    meta = [{"prompt": ({"role": "user", "content": QUESTION},)}] * 2
    answers = ["The street is wonderful and happy.", "The street is horrible and sad."]
    scores = DEMO["reward_func"](completions=answers, finish=["stop"] * 2, meta=meta)
    bright, dark = scores["extra_logs"]["mood"]
    assert bright > 0.5 > -0.5 > dark and scores["rewards"] == [1, 1]
