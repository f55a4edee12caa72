"""`--rollout http`: completions from a server, which takes the weights of the role after every update.

The provider holds options. `HttpEngine` is what a run opens: it opens an engine at the server for each sampled role, sends
weights, asks for completions and deletes the engines when the run ends. The first rank sends weights for all ranks.

    POST   /engines              {"role"} -> {"engine"}
    PUT    /engines/E/weights    safetensors, ?version=V&last=0|1 -> {"version"}
    POST   /engines/E/weights    {"version", "path"} -> {"version"}: a folder of safetensors files that the server reads
    POST   /engines/E/sample     {"prompts", "seeds", "limits", "ends", "lacking", "sampling"} -> {"version", "completions"}
    DELETE /engines/E            -> {}
    GET    /health               -> {}

Left out on purpose: several servers, prompts with images, sampling while weights are on their way.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

from rlhf_core import (
    OpenContext,
    OptionError,
    Prompts,
    RlhfError,
    Role,
    Rollout,
    Rollouts,
    Sampling,
    Secret,
    UsageError,
    assemble,
    end_ids,
    lacking_ids,
    option,
    reveal,
    run_option,
)
from rlhf_rollout_http.answers import Completion, read_completions, read_version
from rlhf_rollout_http.client import LOOPBACK, Client

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HttpEngine", "HttpRollout"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class HttpRollout(Rollout):
    """Samples at a server over HTTP, token ids in and out; weights follow every update."""

    url: str
    """address of the server, such as http://127.0.0.1:8000"""
    token: Annotated[str, Secret()] = ""
    """bearer token; env:NAME reads it from the environment"""
    folder: str = ""
    """folder that the server can read: weights are handed over in files there. Empty uploads them"""
    timeout: float = 300.0
    """seconds for one answer, from the start of the request to its last byte"""
    max_answer: int = 256
    """MiB that an answer may have"""
    part: int = 512
    """MiB of weights that are held, uploaded or written at a time"""
    allow_remote: bool = False
    """let token ids, weights and token go to another machine; choose https there"""

    def __post_init__(self) -> None:
        for name in ("timeout", "max_answer", "part"):
            if not getattr(self, name) > 0:  # written so that nan fails
                raise OptionError(name, f"must be above 0, not {getattr(self, name)}")

    def check(self) -> None:
        """Check the address, the token and the folder, and that the server answers."""
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise OptionError("url", f"{self.url}: expected an address like http://127.0.0.1:8000")
        if address.hostname not in LOOPBACK and not self.allow_remote:
            raise OptionError("url", f"{self.url} is another machine; allow it with {option('allow_remote', True)}")
        if self.folder and not Path(self.folder).is_dir():
            raise OptionError("folder", f"{self.folder}: no such folder")
        self.client().ask("GET", "/health")

    def client(self) -> Client:
        """Return what asks the server."""
        return Client(self.url, reveal(self.token), self.timeout, self.max_answer << 20)

    def open(self, context: OpenContext) -> HttpEngine:
        """Return the engine of a run; the server is asked when the first role is sampled."""
        return HttpEngine(self, context)


@dataclass
class _RemoteEngine:
    """A role's engine at the server."""

    name: str
    version: int = -1
    """version of the weights that were sent last"""
    lacking: tuple[int, ...] = ()
    """ids of the head that the tokenizer has no token for; they are never drawn"""
    vocabulary: int = 0
    """ids of the head"""


class HttpEngine(Rollout):
    """The engines that a run has at a server, by role.

    Args:
        options: of the run.
        context: knows the ranks.
    """

    def __init__(self, options: HttpRollout, context: OpenContext) -> None:
        self.options, self.context = options, context
        self.client = options.client()
        self.engines: dict[str, _RemoteEngine] = {}

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Return `sampling.n` completions of each prompt.

        Raises:
            UsageError: the prompts have images, or the server refused the request.
            RunStopped: the server is gone, is slow, or its answer is wrong.
        """
        if any(prompts.images):
            raise UsageError(f"rollout http sends no images: use {run_option('rollout', 'hf')} for prompts with images")
        self.sync(role)
        engine = self.engines[role.name]
        limits = prompts.limits or [sampling.max_new_tokens] * len(prompts)
        question = {
            "prompts": prompts.token_ids,
            "seeds": [[sampling.seed_for(uid, k) for k in range(sampling.n)] for uid in prompts.uids],
            "limits": limits,
            "ends": end_ids(role.spec, role.tokenizer),
            "lacking": engine.lacking,
            "sampling": {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p", "stop")},
        }
        answer = self.client.ask("POST", f"/engines/{engine.name}/sample", json.dumps(question).encode())
        truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)
        each = [limit for limit in limits for _ in range(sampling.n)]
        try:
            version = read_version(answer, role.version)
            completions = read_completions(answer, each, engine.vocabulary, engine.lacking, truncated)
        except ValueError as error:
            raise self.client.stopped(str(error)) from None
        return _to_rollouts(role, prompts, completions, version, truncated)

    def sync(self, role: Role) -> Mapping[str, float]:
        """Send the role's weights, unless the server has them. Every rank calls it; the first one sends.

        Returns:
            `sync/sent_bytes`, `sync/sent_seconds`.

        Raises:
            UsageError: the server refused them.
            RunStopped: the server is gone, is slow, or its answer is wrong.
        """
        engine = self.engines.get(role.name)
        if engine is None:
            engine = self.engines[role.name] = _RemoteEngine(self._on_first_rank(lambda: self._open(role.name)))
        if engine.version == role.version:
            return {}
        started = time.perf_counter()
        sent = self._send(engine, role)
        engine.version = role.version
        return {"sync/sent_bytes": float(sent), "sync/sent_seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Delete the engines at the server. One that is gone has nothing to delete."""
        engines, self.engines = list(self.engines.values()), {}
        if self.context.world.rank == 0:
            for engine in engines:
                try:
                    self.client.ask("DELETE", f"/engines/{engine.name}")
                except RlhfError:
                    return  # the error that ended the run has named it already, or nothing depends on it

    # ------------------------------------------------------------------------------------------------------------------

    def _open(self, role: str) -> str:
        """Open an engine at the server and return its name."""
        name = self.client.ask("POST", "/engines", json.dumps({"role": role}).encode()).get("engine")
        if not isinstance(name, str) or not name.isalnum():
            raise self.client.stopped(f"opened an engine without a plain name: {name!r:.40}")
        return name

    def _send(self, engine: _RemoteEngine, role: Role) -> int:
        """Send all weights in parts, and return their bytes. All ranks gather them; the first one sends."""
        folder = Path(self.options.folder) / f"{engine.name}-{role.version}" if self.options.folder else None
        sent = 0
        error: RlhfError | None = None
        parts = _parts(role.weights(), self.options.part << 20)
        for number, (part, last) in enumerate(parts):
            if not number:  # the first matrix of a language model is its embedding
                rows = next((tensor.shape[0] for tensor in part.values() if tensor.dim() == 2), 0)
                engine.vocabulary = max(len(role.tokenizer), rows)
                engine.lacking = lacking_ids(role.tokenizer, engine.vocabulary)
            sent += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
            if self.context.world.rank == 0 and error is None:
                try:
                    self._send_part(engine, role.version, folder, part, number, last)
                except RlhfError as raised:
                    error = raised  # the other ranks are gathering the next part
        self._agree(error)
        return sent

    def _send_part(
        self, engine: _RemoteEngine, version: int, folder: Path | None, part: dict[str, Tensor], number: int, last: bool
    ) -> None:
        """Upload a part, or write it and let the server read the folder after the last one."""
        from safetensors.torch import save, save_file

        path = f"/engines/{engine.name}/weights"
        if folder is None:
            query = f"?version={version}&last={int(last)}"
            self.client.ask("PUT", path + query, save(part), "application/octet-stream")
            return
        try:
            folder.mkdir(exist_ok=True)
            save_file(part, folder / f"part-{number:05d}.safetensors")
            if last:
                question = {"version": version, "path": str(folder.resolve())}
                self.client.ask("POST", path, json.dumps(question).encode())
        except OSError as error:
            raise OptionError("folder", f"{folder}: {error.strerror}") from None
        finally:
            if last:
                shutil.rmtree(folder, ignore_errors=True)

    def _on_first_rank(self, ask: Callable[[], Result]) -> Result:
        """Return on every rank what `ask` gives on the first one; an error there is raised on every rank."""
        found: Any = None
        error: RlhfError | None = None
        if self.context.world.rank == 0:
            try:
                found = ask()
            except RlhfError as raised:
                error = raised
        self._agree(error)
        result: Result = self.context.world.gather(found)[0]
        return result

    def _agree(self, error: RlhfError | None) -> None:
        """Raise on every rank what the first one met."""
        error = self.context.world.gather(error)[0]
        if error is not None:
            raise error


def _parts(weights: Iterator[tuple[str, Tensor]], most: int) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Yield (tensors by name on the CPU, True for the last part), each of `most` bytes unless one tensor is larger."""
    part: dict[str, Tensor] = {}
    held = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if part and held + size > most:
            yield part, False
            part, held = {}, 0
        part[name] = tensor.detach().cpu().contiguous().clone()  # gathered tensors are valid until the next one
        held += size
    yield part, True


def _to_rollouts(
    role: Role, prompts: Prompts, completions: list[Completion], version: int, truncated: bool
) -> Rollouts:
    """Return the completions as a batch."""
    per_token = {"sampler_logprobs_NT": [each.logprobs for each in completions]}
    scalars = {}
    if truncated:
        per_token["sampler_log_mass_NT"] = [each.log_mass for each in completions]
        kept = [exp(value) for each in completions for value in each.log_mass]
        scalars["kept_mass"] = sum(kept) / len(kept)
    finish: Any = [each.finish for each in completions]
    tokens = [each.tokens for each in completions]
    return assemble(prompts, tokens, finish, role.tokenizer, version=version, per_token=per_token, scalars=scalars)
