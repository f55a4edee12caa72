"""A small HTTP server that answers as vLLM's does, with the log-probabilities of uniform tokens, and fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from typing import Any

WIDTH = 259
"""Tokens of the tiny model."""

TOKEN = "a-token-of-tests"


class ServedModel:
    """The server. It gives the tokens `seed % 200, seed % 200 + 1, …`, so that an answer tells its request.

    Args:
        spoil: returns another answer to a request, or raises ConnectionError to close the connection.
        raw: give log-probabilities from before truncation.
    """

    def __init__(
        self, spoil: Callable[[Mapping[str, Any], dict[str, Any]], Any] | None = None, raw: bool = False
    ) -> None:
        self.spoil, self.raw = spoil, raw
        self.routes: dict[str, tuple[int, Any]] = {}
        """answers of other routes: status and JSON; 404 for those that it has not"""
        self.called: list[tuple[str, Any]] = []
        """calls of other routes, and what came with them"""
        self.asked: list[dict[str, Any]] = []
        """requests for completions, but for checks"""
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self._is_let_in():
                    models = {"data": [{"id": "tiny", "max_model_len": 64}]}
                    self._send(*((200, models) if self.path == "/v1/models" else served.route(self.path, None)))

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._is_let_in():
                    return
                if self.path != "/inference/v1/generate":
                    self._send(*served.route(self.path, question))
                    return
                with served.lock:
                    served.at_once += 1
                    served.most_at_once = max(served.most_at_once, served.at_once)
                try:
                    self._send(*served.answer(question))
                except ConnectionError:
                    self.close_connection = True
                finally:
                    with served.lock:
                        served.at_once -= 1

            def _is_let_in(self) -> bool:
                if self.headers["Authorization"] == f"Bearer {TOKEN}":
                    return True
                self._send(401, {"error": "Unauthorized"})
                return False

            def _send(self, status: int, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def route(self, path: str, question: Any) -> tuple[int, Any]:
        """Return status and answer of another route."""
        self.called.append((path, question))
        return self.routes.get(path, (404, {"detail": "Not Found"}))

    def answer(self, question: Mapping[str, Any]) -> tuple[int, Any]:
        """Return status and answer to a request for a completion."""
        how = question["sampling_params"]
        if how["top_k"] == 1:
            certain = {"token_id": 3, "logprob": -0.5 if self.raw else 0.0, "top_logprobs": []}
            return 200, _body(question, [3], "length", [certain])
        with self.lock:
            self.asked.append(dict(question))
        tokens = [(how["seed"] + i) % 200 for i in range(how["max_tokens"])]
        content = [{"token_id": token, "logprob": -log(WIDTH), "top_logprobs": []} for token in tokens]
        body = _body(question, tokens, "length", content)
        spoiled = self.spoil(question, body) if self.spoil is not None else body
        return spoiled if isinstance(spoiled, tuple) else (200, spoiled)

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()


def _body(question: Mapping[str, Any], tokens: list[int], finish: str, content: list[Any]) -> dict[str, Any]:
    choice = {
        "token_ids": tokens,
        "finish_reason": finish,
        "logprobs": {"content": content},
        "weight_versions": [{"version": "default", "start": 0, "end": len(tokens)}],
    }
    return {"request_id": f"generate-tokens-{question['request_id']}", "choices": [choice]}
