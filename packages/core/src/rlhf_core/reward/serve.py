"""`rlhf-run serve-reward MODEL`: a reward model behind HTTP, for `--reward remote` and for OpenRLHF's clients.

Requests that arrive within a few milliseconds are scored together; where that fails each is scored alone, so that a request
fails by its own fault only. On the loopback interface and with a token by default. Head, body and shutdown have
deadlines (`serve_http`), and bodies over a limit are refused before they are read (`serve_requests`).

    POST /get_reward   {"query": […], "prompts": […], "labels": […]}  ->  {"rewards": […], "scores": […], …}
    GET  /health       no token needed
    GET  /metrics      Prometheus text
"""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import math
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rlhf_core.config.value_types import Secret, reveal
from rlhf_core.contract.commands import Command
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.data.encoder import Encoding
from rlhf_core.errors import MissingPackage, RlhfError
from rlhf_core.reward.serve_http import Limits, bind_address, serve, warn_if_open
from rlhf_core.reward.serve_requests import BadRequest, Sample, read_json, samples_of

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.reward.model import RewardModelEngine

__all__ = ["ServeReward", "make_app"]

Score = Callable[[Sequence[Sample]], list[float]]


@dataclass(frozen=True)
class ServeReward(Command):
    """Serve a reward model over HTTP, for --reward remote and OpenRLHF's clients."""

    model: str
    """hub name or folder of a sequence classifier with one score"""
    host: str = "127.0.0.1"
    """interface to listen on; 0.0.0.0 listens on all of them"""
    port: int = 5000
    """port to listen on; 0 takes a free one"""
    token: Annotated[str, Secret()] = ""
    """bearer token that clients must send; empty generates and prints one; `none` accepts every client"""
    wait: float = 0.005
    """seconds to wait for more requests to score together"""
    batch: int = 64
    """maximum number of samples scored together, unless one request has more"""
    max_body: int = 8
    """maximum size of a request, in MiB"""
    limits: Limits = Limits()
    """limits of what clients may use"""
    mean: float = 0.0
    """value that is subtracted from each score"""
    std: float = 1.0
    """value that each score is divided by, after `mean` is subtracted"""
    encoding: Encoding = Encoding(too_long="truncate")
    """conversion of prompt and completion to the model's tokens"""

    def __post_init__(self) -> None:
        at_least(1, self, "batch", "max_body")
        at_least(0, self, "wait")
        finite(self, "wait")

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.reward.model import RewardModel

        _check_installed()
        token = "" if self.token == "none" else reveal(self.token) or secrets.token_urlsafe(24)
        model = RewardModel(self.model, mean=self.mean, std=self.std, encoding=self.encoding)
        with closing(bind_address(self.host, self.port)) as listener, open_provider(model, "reward") as engine:
            self._serve(engine, listener, token)
        return 0

    def _serve(self, engine: RewardModelEngine, listener: socket.socket, token: str) -> None:
        """Answer requests by the loaded model."""

        def score(samples: Sequence[Sample]) -> list[float]:
            """Samples without their raw prompt are scored as the text they are."""
            prompts = [sample.query if sample.prompt is None else sample.prompt for sample in samples]
            completions = [None if sample.prompt is None else sample.completion for sample in samples]
            numbers: list[float] = engine.score(prompts, completions)[0].tolist()
            return numbers

        warn_if_open(self.host, token)
        app = make_app(score, token, self.wait, self.batch, self.max_body << 20, self.limits.seconds)
        serve(app, listener, f"token {token}" if token and not self.token else "", self.limits)


class _RequestBatcher:
    """Collects samples of several requests and scores them in one call, in a separate thread."""

    def __init__(self, score: Score, wait: float, batch: int) -> None:
        self._score, self._wait, self._batch = score, wait, batch
        self._queue: asyncio.Queue[tuple[Sequence[Sample], asyncio.Future[list[float]]]] = asyncio.Queue()
        self.counts: defaultdict[str, float] = defaultdict(float)

    async def ask(self, samples: Sequence[Sample]) -> list[float]:
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        await self._queue.put((samples, future))
        return await future

    async def work(self) -> None:
        """Serve for ever."""
        while True:
            asked = [await self._queue.get()]
            await self._collect(asked)
            asked = [(part, future) for part, future in asked if not future.done()]  # not of clients that hung up
            error = await self._answer(asked)
            if error is not None and len(asked) > 1:  # one request is at fault: find out which
                for each in asked:
                    self._fail(each[1], await self._answer([each]))
            elif error is not None:
                self._fail(asked[0][1], error)

    async def _answer(self, asked: Sequence[tuple[Sequence[Sample], asyncio.Future[list[float]]]]) -> Exception | None:
        """Score requests together and answer them all; return the error if that fails."""
        samples = [sample for part, _ in asked for sample in part]
        if not samples:
            return None
        started = time.perf_counter()
        try:
            scores = await asyncio.to_thread(self._score, samples)
            assert len(scores) == len(samples)
            if not all(map(math.isfinite, scores)):
                raise ArithmeticError("the model's score is not finite")
        except Exception as error:  # the client gets the error; the server continues
            return error
        self.counts["batches"] += 1
        self.counts["samples"] += len(samples)
        self.counts["seconds"] += time.perf_counter() - started
        rest = iter(scores)
        for part, future in asked:
            own = [next(rest) for _ in part]
            if not future.done():  # a client that hung up
                future.set_result(own)
        return None

    def _fail(self, future: asyncio.Future[list[float]], error: Exception | None) -> None:
        if error is None:
            return
        self.counts["failures"] += 1
        if not future.done():
            future.set_exception(error)

    async def _collect(self, asked: list[tuple[Sequence[Sample], asyncio.Future[list[float]]]]) -> None:
        """Add requests until the batch is full or nothing came for a while."""
        deadline = time.monotonic() + self._wait
        while sum(len(part) for part, _ in asked) < self._batch:
            try:
                left = max(0.0, deadline - time.monotonic())
                asked.append(await asyncio.wait_for(self._queue.get(), left))
            except TimeoutError:
                return


def make_app(
    score: Score,
    token: str = "",
    wait: float = 0.005,
    batch: int = 64,
    max_body: int = 8 << 20,
    seconds: float = 30.0,
) -> Any:
    """Return the ASGI application around a function that scores samples; a body has `seconds` to arrive."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse

    together = _RequestBatcher(score, wait, batch)

    @asynccontextmanager
    async def working(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(together.work())
        yield
        task.cancel()

    app = FastAPI(lifespan=working, docs_url=None, redoc_url=None, openapi_url=None)

    def allowed(request: Any) -> bool:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        return not token or hmac.compare_digest(sent.encode(), token.encode())

    async def get_reward(request: Any) -> Any:
        together.counts["requests"] += 1
        if not allowed(request):
            return JSONResponse({"error": "send the server's token: Authorization: Bearer TOKEN"}, 401)
        try:
            body = await read_json(request, max_body, seconds)
            samples = samples_of(body)
            rewards = await together.ask(samples)
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, error.status, headers={"Connection": "close"})
        except asyncio.CancelledError:  # uvicorn ends what is under way after `stop_within`, and would log a traceback
            return JSONResponse({"error": "the server stops"}, 503, headers={"Connection": "close"})
        except Exception as error:
            return JSONResponse(*_describe(error))
        answer = {"rewards": rewards, "scores": rewards, "extra_logs": {}}
        return JSONResponse(answer | ({"ids": body["ids"]} if "ids" in body else {}))

    async def metrics(request: Any) -> Any:
        if not allowed(request):
            return PlainTextResponse("send the server's token", 401)
        names = ("requests", "samples", "batches", "failures", "seconds")
        return PlainTextResponse("".join(f"rlhf_reward_{name}_total {together.counts[name]:g}\n" for name in names))

    async def health() -> Any:
        return {"status": "ok"}

    get_reward.__annotations__["request"] = metrics.__annotations__["request"] = Request  # FastAPI reads these
    for path in ("/", "/get_reward"):
        app.post(path)(get_reward)
    app.get("/metrics")(metrics)
    app.get("/health")(health)
    return app


def _check_installed() -> None:
    """Check that the server's packages are there. Raises MissingPackage."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise MissingPackage("serve-reward needs packages: pip install 'rlhf-core[serve]'")


def _describe(error: Exception) -> tuple[dict[str, str], int]:
    """Return the answer to a request that cannot be scored, and its status: the request's fault (422), or ours (500)."""
    line = " ".join(f"{type(error).__name__}: {error}".split()).encode("ascii", "backslashreplace").decode()
    return {"error": line}, 422 if isinstance(error, (ValueError, TypeError, RlhfError)) else 500
