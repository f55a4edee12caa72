"""A small server for `--rollout http`: `python -m rlhf_rollout_http.server FOLDER`, a Hugging Face model on this machine.

It samples with plain forward passes, without a cache, and imports nothing of rlhf-core: it shows what a server has to do.
Completion k of a prompt draws from a Philox stream that its seed begins, by inversion of the cumulative probability.
It listens on the loopback interface alone, answers the bearer token in the environment variable RLHF_ENGINE_TOKEN (everybody
if that is empty), and ends by itself when nobody asks for `--idle` seconds.
"""

from __future__ import annotations

import argparse
import copy
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["EngineServer", "end_when_idle", "main"]

MAX_BODY = 1 << 30
MAX_ENGINES = 8
SOCKET_SECONDS = 60.0


class Refusal(Exception):
    """A request that is not answered: status and reason."""


class Engine:
    """A client's copy of the model, with the weights that it sent."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = copy.deepcopy(model).eval(), tokenizer
        self.version = -1
        self.used = time.monotonic()
        self.lock = threading.Lock()

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy weights into the model."""
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        unknown = tensors.keys() - own.keys()
        if unknown:
            raise Refusal(400, f"the model has no weight {min(unknown)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    @torch.inference_mode()
    def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        limit: int,
        ends: Sequence[int],
        lacking: Sequence[int],
        how: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Return one completion per seed; each of `ends` ends one, and what is `lacking` is never drawn."""
        rows = [{"tokens": [], "logprobs": [], "log_mass": [], "finish": ""} for _ in seeds]
        raw = np.stack([np.random.Philox(key=seed).random_raw(limit) for seed in seeds])
        uniforms = ((raw >> np.uint64(14)) + 0.5) * 2.0**-50
        for t in range(limit):
            live = [i for i, row in enumerate(rows) if not row["finish"]]
            if not live:
                break
            ids = torch.tensor([[*prompt, *rows[i]["tokens"]] for i in live])
            logits = self.model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()
            for i, row_V in zip(live, logits, strict=True):
                logprobs_V, log_mass = distribution(row_V, lacking, how)
                self._extend(rows[i], logprobs_V, log_mass, float(uniforms[i, t]), limit, ends, how)
        return rows

    def _extend(
        self,
        row: dict[str, Any],
        logprobs_V: torch.Tensor,
        log_mass: float,
        uniform: float,
        limit: int,
        ends: Sequence[int],
        how: dict[str, Any],
    ) -> None:
        """Draw the next token of a completion."""
        if how["temperature"] == 0:
            token = int(logprobs_V.argmax())
        else:
            cumulative_V = logprobs_V.double().exp().cumsum(-1)
            token = int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))
        row["tokens"].append(token)
        row["logprobs"].append(float(logprobs_V[token]))
        row["log_mass"].append(log_mass)
        text = self.tokenizer.decode(row["tokens"], skip_special_tokens=True) if how["stop"] else ""
        if token in ends or any(each in text for each in how["stop"]):
            row["finish"] = "stop"
        elif len(row["tokens"]) == limit:
            row["finish"] = "length"


def distribution(logits_V: torch.Tensor, lacking: Sequence[int], how: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Return log-probabilities of the tokens that can be drawn, and the log of the probability that truncation kept.

    Without truncation they are over the whole head, as the trainer has them: what is lacking is left out, and not made up for.
    """
    logprobs_V = torch.log_softmax(logits_V / (how["temperature"] or 1.0), -1)
    logprobs_V[list(lacking)] = -torch.inf
    if how["temperature"] == 0 or (how["top_p"] >= 1 and not how["top_k"] and not how["min_p"]):
        return logprobs_V, 0.0
    return truncate(logprobs_V, how)


def truncate(logprobs_V: torch.Tensor, how: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Return log-probabilities over the tokens that top-k, top-p and min-p keep, and the log of their probability."""
    order = torch.argsort(logprobs_V, descending=True, stable=True)
    probs = logprobs_V[order].double().exp()
    if how["top_k"]:
        probs[how["top_k"] :] = 0
    before = probs.cumsum(0) - probs
    kept = (before < how["top_p"] * probs.sum()) & (probs > 0) & (probs >= how["min_p"] * probs[0])
    mass = float(probs[kept].sum())
    found = torch.full_like(logprobs_V, -torch.inf)
    found[order[kept]] = logprobs_V[order[kept]] - float(np.log(mass))
    return found, float(np.log(mass))


class EngineServer(ThreadingHTTPServer):
    """Engines over one model, behind HTTP.

    Args:
        folder: of the model.
        token: that clients must send; empty lets everybody ask.
        port: on the loopback interface; 0 takes a free one.
        weights: folder below which clients may name folders of weights.
    """

    daemon_threads = True

    def __init__(self, folder: str, token: str = "", port: int = 0, weights: str = "") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.token, self.weights = token, weights
        self.engines: dict[str, Engine] = {}
        self.asked = time.monotonic()

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> dict[str, Any]:
        """Return the answer to a request. Raises `Refusal`."""
        parts = path.strip("/").split("/")
        if (method, parts) == ("GET", ["health"]):
            return {"engines": len(self.engines)}
        if (method, parts) == ("POST", ["engines"]):
            return {"engine": self._open()}
        engine = self.engines.get(parts[1]) if len(parts) > 1 and parts[0] == "engines" else None
        if engine is None:
            raise Refusal(404, f"there is no {path}")
        engine.used = time.monotonic()
        with engine.lock:
            return self._answer_of(engine, method, parts, query, body)

    def _open(self) -> str:
        """Open an engine. Those whose clients are gone make room."""
        if len(self.engines) >= MAX_ENGINES:
            oldest = min(self.engines, key=lambda name: self.engines[name].used)
            if time.monotonic() - self.engines[oldest].used < SOCKET_SECONDS:
                raise Refusal(409, f"{MAX_ENGINES} engines are open")
            del self.engines[oldest]
        name = secrets.token_hex(8)
        self.engines[name] = Engine(self.model, self.tokenizer)
        return name

    def _answer_of(
        self, engine: Engine, method: str, parts: list[str], query: dict[str, list[str]], body: bytes
    ) -> dict[str, Any]:
        match method, parts[2:]:
            case "DELETE", []:
                del self.engines[parts[1]]
                return {}
            case "PUT", ["weights"]:
                self.take(engine, load(body), int(query["version"][0]), query["last"] == ["1"])
                return {"version": engine.version}
            case "POST", ["weights"]:
                asked = json.loads(body)
                files = self._files(asked["path"])
                for i, file in enumerate(files):
                    self.take(engine, load_file(file), asked["version"], i == len(files) - 1)
                return {"version": engine.version}
            case "POST", ["sample"]:
                asked = json.loads(body)
                rows = zip(asked["prompts"], asked["seeds"], asked["limits"], strict=True)
                found = [engine.sample(*row, asked["ends"], asked["lacking"], asked["sampling"]) for row in rows]
                return {"version": engine.version, "completions": [each for several in found for each in several]}
        raise Refusal(404, f"there is no {method} {'/'.join(parts)}")

    def take(self, engine: Engine, tensors: dict[str, torch.Tensor], version: int, last: bool) -> None:
        """Let an engine take a part of the weights; their version counts once the last part is there."""
        engine.take(tensors)
        if last:
            engine.version = version

    def _files(self, path: str) -> list[Path]:
        """Return the files of a folder of weights, which must lie below the one that was allowed."""
        folder = Path(path).resolve()
        if not self.weights or not folder.is_relative_to(Path(self.weights).resolve()):
            raise Refusal(403, "weights are read below the folder of --weights only")
        return sorted(folder.glob("part-*.safetensors"))


class Handler(BaseHTTPRequestHandler):
    """Reads a request within limits, and writes the answer of the server."""

    server: EngineServer
    timeout = SOCKET_SECONDS
    """seconds that a connection may be silent"""

    def handle_request(self) -> None:
        """Answer one request."""
        self.server.asked = time.monotonic()
        try:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if self.server.token and not hmac.compare_digest(given.encode(), self.server.token.encode()):
                raise Refusal(401, "wrong token")
            size = int(self.headers.get("Content-Length", 0))
            if not 0 <= size <= MAX_BODY:
                raise Refusal(413, f"a body has at most {MAX_BODY >> 20} MiB; lower --rollout.part")
            address = urlsplit(self.path)
            answer = self.server.answer(self.command, address.path, parse_qs(address.query), self.rfile.read(size))
        except Refusal as refusal:
            self.reply(*refusal.args)
        except (KeyError, TypeError, ValueError) as error:
            self.reply(400, f"{type(error).__name__}: {error}")
        else:
            self.reply(200, answer)
        self.server.asked = time.monotonic()

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def reply(self, status: int, answer: Any) -> None:
        """Send an answer, or the reason why there is none."""
        body = json.dumps(answer if status == 200 else {"error": answer}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Write no line per request."""


def main() -> None:
    """Serve until a signal comes, or nobody asks."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_rollout_http.server", description=__doc__)
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--weights", default="", help="folder below which clients may hand over weights in files")
    parser.add_argument("--address-file", default="", help="file that gets the address once the server listens")
    parser.add_argument("--idle", type=float, default=3600.0, help="seconds without a request after which it ends")
    options = parser.parse_args()
    server = EngineServer(options.model, os.environ.get("RLHF_ENGINE_TOKEN", ""), options.port, options.weights)
    watch = threading.Thread(target=end_when_idle, args=(server, options.idle), daemon=True)
    watch.start()
    if options.address_file:
        Path(options.address_file).write_text(server.url + "\n")
    print(f"rollout engine at {server.url}", flush=True)
    server.serve_forever()


def end_when_idle(server: EngineServer, seconds: float) -> None:
    """End the server once nobody has asked for so many seconds."""
    while time.monotonic() - server.asked < seconds:
        time.sleep(min(1.0, seconds))
    server.shutdown()


if __name__ == "__main__":
    main()
