"""Reward of the demo: a short, complete answer that is about the question.

0.6 for one or two whole sentences that the model ends itself, and 0.4 for a content word of the question. Everything is
checked on the text; no second model is asked. `mood` (VADER's sentiment) is measured and not rewarded: a second measure that
training may not move.
"""

import re
from functools import cache

EMPTY = frozenset(
    "a about after an and any are as at be before but by can come could describe did do does explain feel first for from give "
    "go happened has have how i if in into is it its last like line lines me mind my of on one or our people say sentences "
    "should so some something start tell that the their them there they thing think this to two up was we were what when "
    "where which who why will with would write you your".split()
)
"""Words of a question that say nothing of what it is about."""


def reward_func(completions: list[str], finish: list[str], meta: list[dict]) -> dict:
    """Return rewards in 0..1, and what they are made of.

    Args:
        completions: answers.
        finish: "stop" where the model ended its answer, "length" where it was cut.
        meta: `prompt` is the chat that was answered.
    """
    questions = [row["prompt"][-1]["content"] for row in meta]
    whole = [float(is_whole(text, end)) for text, end in zip(completions, finish, strict=True)]
    about = [float(is_about(text, question)) for text, question in zip(completions, questions, strict=True)]
    return {
        "rewards": [0.6 * a + 0.4 * b for a, b in zip(whole, about, strict=True)],
        "extra_logs": {
            "whole": whole,
            "about": about,
            "mood": [lexicon().polarity_scores(t)["compound"] for t in completions],
        },
    }


def is_whole(text: str, finish: str) -> bool:
    """Return True for one or two sentences of three words or more that the model ended itself."""
    sentences = re.findall(r"[^.!?]+[.!?]+[\"')\]\u201d\u2019]*", text.strip())
    finished = finish == "stop" and bool(sentences) and "".join(sentences) == text.strip()
    return finished and len(sentences) <= 2 and all(len(each.split()) >= 3 for each in sentences)


def is_about(text: str, question: str) -> bool:
    """Return True if the answer has a content word of the question; the plural counts too."""
    asked = {stem(word) for word in words(question) if word not in EMPTY}
    return bool(asked & {stem(word) for word in words(text)})


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z\u00e0-\u00ff]+", text.lower())


def stem(word: str) -> str:
    """Return the word without a plural's s."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


@cache
def lexicon():
    """Return VADER's lexicon, read once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
