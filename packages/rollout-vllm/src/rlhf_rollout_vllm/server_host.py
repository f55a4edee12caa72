"""Running vLLM servers as one engine: token ids go out over HTTP, and come back with log-probabilities and versions.

The servers are replicas of one model. Each request goes to the one with the fewest; a request that fails is sent again, to
another one if there is one. Completions follow from their seeds, so that nothing depends on the server that answers.

Weights go to all servers by vLLM's weight transfer, in calls over its routes for reinforcement learning (VLLM_SERVER_DEV_MODE).
Tokens carry the name of the run and the version: a server that was started again, or that another run updates, is noticed.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.config.value_types import reveal
from rlhf_core.errors import OptionError, RunStopped, UsageError, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.http import FAILURES, Refusal
from rlhf_core.util.messages import log
from rlhf_core.util.threads import map_in_threads
from rlhf_rollout_vllm.server_answers import Completion, StaleWeights, label, read_completion
from rlhf_rollout_vllm.server_client import ServerClient
from rlhf_rollout_vllm.servers import Server, Servers, address_towards, servers_of_rank

if TYPE_CHECKING:
    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.adapters import Adapter, BaseWeights
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["ServerHost"]

LONGEST_WAIT = 30.0
"""Seconds between two tries of a request at most."""

CERTAIN = -1e-6  # log-probability of the only token that is left after top-k 1, to rounding


@dataclass(frozen=True)
class ServedModel:
    """The model that the servers have."""

    width: int
    """tokens of its head"""
    max_model_len: int
    """tokens that a prompt and its completion have together, at most"""

    def get_vocab_size(self) -> int:
        """Return the tokens of its head, as vLLM's own description does."""
        return self.width


class ServerHost:
    """Running vLLM servers.

    Args:
        options: the provider.
        describe: writes configuration and tokenizer to a folder, and returns where transformers finds them.
        dtype: what the servers compute in.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self, options: VLLMOptions, describe: Callable[[str], str], dtype: str, trust_remote_code: bool
    ) -> None:
        self.options, self.run = options, uuid.uuid4().hex
        """the run's name at the servers"""
        token = reveal(options.token)
        urls = servers_of_rank(options.server, os.environ)
        self.servers = Servers([Server(url, token, options.answer_seconds) for url in urls], options.in_flight)
        described = [server.describe() for server in self.servers.all]
        self.model_config = ServedModel(_width(describe, trust_remote_code), min(most for _, most in described))
        self.version: int | None = None
        """version of the weights that were sent last"""
        self.restarted = 0
        """times that a server got the weights again"""
        self._life = threading.RLock()
        """held while weights are sent"""
        self._counting = threading.Lock()
        self._waiting = 0
        """requests that are not answered yet"""
        self._asked = 0
        self._joined: list[Server] = []
        """servers that have met the sender"""
        for server in self.servers.all:
            self._check_logprobs(server)
        self.client = ServerClient(f"rlhf_{options.transfer}", lambda: label(self.run, self.version or 0))
        self.courier: Any = None
        if options.transfer != "none":
            from rlhf_rollout_vllm.couriers import COURIERS

            self.courier = COURIERS[options.transfer](getattr(torch, dtype), address_towards(urls[0]))

    @property
    def has_weights(self) -> bool:
        """The servers keep their weights."""
        return True

    def _check_logprobs(self, server: Server) -> None:
        """Check that log-probabilities are those after truncation, by a completion; the first one of a server also warms it up.

        Raises:
            OptionError: they are not, or the server does not sample by ids.
        """
        parameters = {"temperature": 1.0, "top_k": 1, "max_tokens": 1, "logprobs": 0, "detokenize": False}
        request = self._request([0], parameters, "check")
        try:
            answer = server.ask("/inference/v1/generate", request)
            completion = read_completion(answer, request, self.model_config.width, self.run, None)
        except FAILURES as error:
            raise OptionError(
                "server", f": {server.url} does not sample token ids: {error}; start it with --enable-scale-out"
            ) from None
        if completion.logprobs.logprobs[0] < CERTAIN:
            raise OptionError(
                "server",
                f": {server.url} gives log-probabilities from before truncation; start it with --logprobs-mode "
                "processed_logprobs",
            )

    # ------------------------------------------------------------------------------------------------------------------
    # completions
    # ------------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        adapter: Adapter | None = None,
    ) -> list[Any]:
        """Return the completion of each prompt, in order; servers take no adapter apart from the weights.

        Raises:
            RunStopped: a request failed too often.
            UsageError: a server refused it.
        """
        assert adapter is None, "the options refuse it"
        rows = list(zip(prompts, parameters, names, strict=True))
        threads = min(len(rows), self.options.in_flight * len(self.servers.all))
        return map_in_threads(lambda row: self._ask(*row), rows, threads)

    def _request(self, prompt: Sequence[int], parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return a request; prompts share cached keys and values only with those of the same run and weights."""
        with self._counting:
            self._asked += 1
            number = self._asked
        return {
            "request_id": f"{self.run}-{name}-{number}",
            "token_ids": list(prompt),
            "sampling_params": dict(parameters),
            "cache_salt": label(self.run, self.version or 0),
        }

    def _ask(self, prompt: Sequence[int], parameters: Mapping[str, Any], name: str) -> Completion:
        """Return the completion of a prompt, by the first server that gives one.

        Raises:
            RunStopped: too many failed.
            UsageError: a server refused the request.
        """
        reason = ""
        for attempt in range(self.options.retries + 1):
            if attempt and not self.servers.any_healthy:
                time.sleep(min(2.0 ** (attempt - 1), LONGEST_WAIT))
            with self.servers.borrow() as server:
                updates = server.updates
                try:
                    return self._ask_server(server, prompt, parameters, name)
                except StaleWeights as error:
                    server.is_stale |= server.updates == updates  # it may have taken weights meanwhile
                    reason = f"{server.url}: {error}"
                except FAILURES as error:
                    if isinstance(error, UsageError):
                        raise
                    server.note_failure()
                    reason = f"{server.url}: {error}"
            if server.is_stale:
                self._send_again(server)
        raise RunStopped(
            f"a request to the servers of rollout 'vllm' failed {self.options.retries + 1} times, at last at {reason}; "
            f"continue from the last checkpoint with {run_option('resume', True)} once they answer"
        )

    def _ask_server(
        self, server: Server, prompt: Sequence[int], parameters: Mapping[str, Any], name: str
    ) -> Completion:
        """Return a server's completion.

        Raises:
            UsageError: it refused the request.
            OSError, HTTPException, ValueError: it failed.
        """
        with self._life:  # no request gets in between the calls of an update
            version = self.version if self.courier is not None else None
            request = self._request(prompt, parameters, name)
            with self._counting:
                self._waiting += 1
        try:
            answer = server.ask("/inference/v1/generate", request)
        except Refusal as error:
            if error.is_final:
                raise UsageError(f"the vLLM server at {server.url} refused a request: {error}") from None
            raise
        finally:
            with self._counting:
                self._waiting -= 1
        return read_completion(answer, request, self.model_config.width, self.run, version)

    # ------------------------------------------------------------------------------------------------------------------
    # weights
    # ------------------------------------------------------------------------------------------------------------------

    def checksums(self) -> list[dict[int, int]]:
        """Return none: a server has no route for them."""
        return []

    def take(self, role: Role | BaseWeights) -> Mapping[str, float]:
        """Send the role's weights to all servers that answer, completions in progress or not: a fixed number of calls.

        Returns:
            `sync/bytes`, `sync/seconds`, `sync/calls` (to each server), `sync/restarts`; nothing without a transfer.

        Raises:
            ContractError: the role left weights out.
            OptionError: the servers take none.
            RunStopped: no server is left.
        """
        if self.courier is None:
            return self._keep(role)
        started, calls = time.perf_counter(), self.client.calls
        with self._life:
            self.courier.begin(role)
            reached = [each for each in self.servers.all if self._looks_alive(each)]
            for server in self.servers.all:
                server.is_stale = True
            self.version = role.version
            self._deliver(reached or self.servers.all)
        return {
            "sync/bytes": float(self.courier.bytes),
            "sync/seconds": time.perf_counter() - started,
            "sync/calls": float(self.client.calls - calls),
            "sync/restarts": float(self.restarted),
        }

    def _keep(self, role: Role | BaseWeights) -> Mapping[str, float]:
        """Leave the servers their own weights.

        Raises:
            OptionError: the role's weights change.
        """
        if role.spec.trained or self.version not in (None, role.version):
            raise OptionError(
                "transfer",
                f"none is for roles whose weights never change, and those of {role.name!r} do; choose another way",
            )
        self.version = role.version
        return {}

    def _looks_alive(self, server: Server) -> bool:
        """Return True if a server answers; one without the run's last weights has to meet the sender again."""
        found = server.weight_version()
        if found != label(self.run, self.version or 0):
            self._joined = [each for each in self._joined if each is not server]
        return found is not None

    def _deliver(self, targets: list[Server]) -> None:
        """Send the weights of the courier; no completion goes on meanwhile."""
        self.client.targets = list(targets)
        paused = self._waiting > 0
        if paused:
            self.client.pause()
        try:
            new = any(each not in self._joined for each in targets)
            if new or (not self.courier.keeps and targets != self._joined):  # a group of ranks is made anew
                self.courier.join(self.client, sum(self.client.count_workers()))
            self.courier.send()
        finally:
            if paused:
                self.client.resume(targets)
            self._joined = [each for each in self.servers.all if not each.is_stale]

    def _send_again(self, server: Server) -> None:
        """Send a server the weights that it lacks, if the courier keeps them and no other thread has.

        Raises:
            RunStopped: it was necessary too often.
        """
        with self._life:
            if not server.is_stale or self.courier is None or not self.courier.keeps:
                return
            self.restarted += 1
            if self.restarted > self.options.restarts:
                raise RunStopped(
                    f"servers of rollout 'vllm' lost their weights {self.restarted} times, more than {option('restarts')} "
                    f"{self.options.restarts}: another run updates them, or they are started again; continue from the last "
                    f"checkpoint with {run_option('resume', True)}"
                )
            log.warning(f"the vLLM server {server.url} has other weights than this run's; it gets them again")
            self._joined = [each for each in self._joined if each is not server]
            try:
                self._deliver([server])
            except RunStopped:
                server.note_failure()

    # ------------------------------------------------------------------------------------------------------------------

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Do nothing: the memory is the servers'."""
        return 0

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Do nothing: the memory is the servers'."""
        return 0

    def close(self) -> None:
        """Let go of the servers; they keep the weights that they have."""
        if self.courier is not None:
            self.client.targets = list(self._joined)
            try:
                if self._joined:
                    self.client.shutdown_weight_transfer_engine()
            except (RunStopped, OptionError) as error:
                log.warning(f"servers of rollout 'vllm' could not be let go of: {error}")
            self.courier.close()
            self._joined = []


def _width(describe: Callable[[str], str], trust_remote_code: bool) -> int:
    """Return the tokens that the head of the role's model has."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
        config = AutoConfig.from_pretrained(describe(folder), trust_remote_code=trust_remote_code)
    return int(config.get_text_config(decoder=True).vocab_size)
