"""FrozenLake of TextArena. The agent asks the policy over HTTP, with nothing but the standard library and `textarena`.

    rlhf-run grpo --environment harness --environment.agent examples/agents/lake.py:play …

The player crosses a lake of 4 × 4 fields with three holes, from one corner to the opposite one. Before each move the policy
reads the fields above, to the left, to the right and below, and it writes one of w, a, d and s. The rules and the whole board
are left out, because a small model learns from short texts.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import Any

import textarena

MOVES = 8
"""Limit on moves; the shortest way has six."""
RESET = threading.Lock()
"""Lock of Python's global random generator, which a game seeds and draws its board from."""


def ask(base_url: str, api_key: str, text: str) -> str:
    """Return the token that the policy writes after `text`."""
    body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/completions", body, headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def look(game: Any) -> str:
    """Return the four fields around the player: `.` is ice, `H` a hole, `G` the goal, `#` the edge of the lake."""
    grid, (row, column) = game.state.game_state["grid"], game.state.game_state["player_pos"]
    fields = {(r, c): field.replace(" ", ".") for r, line in enumerate(grid) for c, field in enumerate(line)}
    around = (row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column)
    return "".join(fields.get(place, "#") for place in around)


def play(base_url: str, api_key: str, seed: int) -> dict[str, object]:
    """Play one game; the completions of a prompt get the same lake. The reward is the game's."""
    game = textarena.make("FrozenLake-v0")
    with RESET:
        game.reset(num_players=1, seed=seed % 2**32)
    text, moves, done = "", 0, False
    while not done and moves < MOVES:
        text += f"\n{look(game)}"
        move = ask(base_url, api_key, text)
        text, moves = text + move, moves + 1
        done, _ = game.step(move)
    reward = (game.close()[0] or {0: 0.0})[0]
    return {"reward": reward, "score": reward, "metrics": {"won": float(reward == 1.0), "moves": float(moves)}}
