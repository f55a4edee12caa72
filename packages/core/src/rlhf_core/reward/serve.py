"""`rlhf-run serve-reward MODEL`: a reward model behind HTTP, for `--reward remote` and for OpenRLHF's clients.

Requests that arrive within a few milliseconds are scored together. On the loopback interface and with a token unless
told otherwise; bodies over a limit are refused before they are read.

    POST /get_reward   {"query": […], "prompts": […], "labels": […]}  ->  {"rewards": […], "scores": […], …}
    GET  /health       no token needed
    GET  /metrics      Prometheus text
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rlhf_core.config.value_types import Secret, reveal
from rlhf_core.contract.commands import Command
from rlhf_core.contract.engines import open_provider
from rlhf_core.data.chats import to_chat
from rlhf_core.data.encoder import Encoding
from rlhf_core.errors import MissingPackage, UsageError

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.reward.model import RewardModelEngine

__all__ = ["Sample", "ServeReward", "make_app", "serve"]

Score = Callable[[Sequence["Sample"]], list[float]]


@dataclass(frozen=True)
class Sample:
    """What is scored."""

    query: str
    """prompt and completion as the policy saw them"""
    prompt: Any = None
    """the prompt as the data had it, text or messages; absent from OpenRLHF's clients"""
    completion: str = ""


@dataclass(frozen=True)
class ServeReward(Command):
    """Serve a reward model over HTTP, for --reward remote and OpenRLHF's clients."""

    model: str
    """hub name or folder of a sequence classifier with one score"""
    host: str = "127.0.0.1"
    """interface to listen on; 0.0.0.0 is all of them"""
    port: int = 5000
    """0 takes a free one"""
    token: Annotated[str, Secret()] = ""
    """what clients must send as bearer token; made up and shown where empty; `none` lets everybody ask"""
    wait: float = 0.005
    """seconds to wait for more requests to score together"""
    batch: int = 64
    """samples scored together at most, unless one request has more"""
    max_body: int = 8
    """MiB a request may have"""
    mean: float = 0.0
    """taken from each score"""
    std: float = 1.0
    """each score is divided by it, after `mean` was taken"""
    encoding: Encoding = Encoding(too_long="truncate")
    """how prompt and completion become the model's tokens"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.reward.model import RewardModel

        model = RewardModel(self.model, mean=self.mean, std=self.std, encoding=self.encoding)
        with open_provider(model, "reward") as engine:  # before anybody connects
            self._serve(engine)
        return 0

    def _serve(self, engine: RewardModelEngine) -> None:
        """Answer requests by the loaded model."""

        def score(samples: Sequence[Sample]) -> list[float]:
            """Samples without their raw prompt are scored as the text they are."""
            prompts = [sample.query if sample.prompt is None else sample.prompt for sample in samples]
            completions = [None if sample.prompt is None else sample.completion for sample in samples]
            numbers: list[float] = engine.score(prompts, completions)[0].tolist()
            return numbers

        token = "" if self.token == "none" else reveal(self.token) or secrets.token_urlsafe(24)
        app = make_app(score, token, self.wait, self.batch, self.max_body << 20)
        serve(app, self.host, self.port, f"token {token}" if token and not self.token else "")


def serve(app: Any, host: str, port: int, note: str = "") -> None:
    """Listen until a signal ends it."""
    import uvicorn

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)  # before the address is shown: who connects at once waits and is not refused
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    print(f"rewards at http://{host}:{listener.getsockname()[1]}/get_reward {note}".rstrip(), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


class _RequestBatcher:
    """Collects samples of several requests and scores them in one call, in a thread of its own."""

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
            samples = [sample for part, _ in asked for sample in part]
            started = time.perf_counter()
            try:
                scores = await asyncio.to_thread(self._score, samples)
                assert len(scores) == len(samples)
            except Exception as error:  # whoever asked is told; the server lives on
                self.counts["failures"] += 1
                for _, future in asked:
                    if not future.done():
                        future.set_exception(RuntimeError(" ".join(f"{type(error).__name__}: {error}".split())))
                continue
            self.counts["batches"] += 1
            self.counts["samples"] += len(samples)
            self.counts["seconds"] += time.perf_counter() - started
            rest = iter(scores)
            for part, future in asked:
                own = [next(rest) for _ in part]
                if not future.done():  # a client that hung up
                    future.set_result(own)

    async def _collect(self, asked: list[tuple[Sequence[Sample], asyncio.Future[list[float]]]]) -> None:
        """Add requests until the batch is full or nothing came for a while."""
        deadline = time.monotonic() + self._wait
        while sum(len(part) for part, _ in asked) < self._batch:
            try:
                left = max(0.0, deadline - time.monotonic())
                asked.append(await asyncio.wait_for(self._queue.get(), left))
            except TimeoutError:
                return


def make_app(score: Score, token: str = "", wait: float = 0.005, batch: int = 64, max_body: int = 8 << 20) -> Any:
    """The ASGI application around a function that scores samples."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, PlainTextResponse
    except ImportError:
        raise MissingPackage("serve-reward needs packages: pip install 'rlhf-core[serve]'") from None
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
        if int(request.headers.get("content-length") or max_body + 1) > max_body:
            return JSONResponse({"error": f"a request has at most {max_body} bytes, and says how many"}, 413)
        try:
            body = await request.json()
            samples = samples_of(body)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 422)
        try:
            rewards = await together.ask(samples)
        except RuntimeError as error:
            return JSONResponse({"error": str(error)}, 500)
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


def samples_of(body: Any) -> list[Sample]:
    """The samples of a request.

    Raises:
        ValueError: says what a request looks like.
    """
    if not isinstance(body, dict) or "query" not in body:
        raise ValueError('expected {"query": [texts], "prompts": [texts], "labels": [anything]}')
    queries = [body["query"]] if isinstance(body["query"], str) else body["query"]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries) or not queries:
        raise ValueError("'query' should be a list of texts")
    prompts = body.get("raw_prompts") or [None] * len(queries)
    completions = body.get("completions") or [""] * len(queries)
    if not len(queries) == len(prompts) == len(completions):
        raise ValueError("'query', 'raw_prompts' and 'completions' should have the same length")
    chats = [to_chat(prompt) if isinstance(prompt, list) else prompt for prompt in prompts]
    return [Sample(*row) for row in zip(queries, chats, completions)]
