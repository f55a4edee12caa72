"""The calls of a weight update to running vLLM servers, over their routes for reinforcement learning.

All servers are called at the same time. One that fails is left out of the rest of the update, and is stale from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_core.errors import ContractError, OptionError, RunStopped, option, run_option
from rlhf_core.util.http import FAILURES, Refusal
from rlhf_core.util.messages import log
from rlhf_core.util.threads import map_in_threads
from rlhf_rollout_vllm.servers import Server
from rlhf_rollout_vllm.sync_client import LEFT_OUT, left_out

__all__ = ["ServerClient"]


class ServerClient:
    """Calls that a sender makes, as vLLM's `VLLMWeightSyncClient` has them.

    Args:
        backend: name of the receiver that the servers have.
        label: returns the name of the weights that are sent.
    """

    def __init__(self, backend: str, label: Callable[[], str]) -> None:
        self.backend, self.label = backend, label
        self.targets: list[Server] = []
        """servers that are called"""
        self.calls = 0
        """calls to each server so far"""

    def count_workers(self) -> list[int]:
        """Return how many processes load weights, for each server."""
        return [int(each["world_size"]) for each in self._all("/get_world_size", [None] * len(self.targets))]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Begin with a sender. Processes of later servers have later ranks, where the way of the weights has any."""
        infos = [init_info] * len(self.targets)
        if "rank_offset" in init_info:
            workers = self.count_workers()
            infos = [
                init_info | {"rank_offset": init_info["rank_offset"] + sum(workers[:i])} for i in range(len(workers))
            ]
        self._all("/init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._all("/start_weight_update", [{}] * len(self.targets))

    def update_weights(self, update_info: Any) -> None:
        """Take weights."""
        self._all("/update_weights", [{"update_info": update_info}] * len(self.targets))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update; tokens carry the name of these weights from now on."""
        self._all("/finish_weight_update", [{"weight_version": weight_version or self.label()}] * len(self.targets))
        for server in self.targets:
            server.note_update()

    def shutdown_weight_transfer_engine(self) -> None:
        """Let go of the sender's memory."""
        self._all("/shutdown_weight_transfer_engine", [{}] * len(self.targets))

    def pause(self) -> None:
        """Stop sampling, and keep requests with their cache."""
        self._all("/pause?mode=keep&clear_cache=false", [{}] * len(self.targets))

    def resume(self, servers: list[Server]) -> None:
        """Continue sampling, also where an update failed: requests fail there and do not wait."""
        self.calls += 1
        map_in_threads(lambda server: _outcome(server, "/resume", {}), servers, len(servers))

    def _all(self, path: str, questions: list[Any]) -> list[Any]:
        """Return the answers of all targets; those that fail are no targets any more.

        Raises:
            ContractError: weights were left out.
            OptionError: a server takes no weights, or not from here.
            RunStopped: none is left.
        """
        if not self.targets:
            return []
        self.calls += 1
        answers = map_in_threads(
            lambda pair: _outcome(pair[0], path, pair[1]),
            list(zip(self.targets, questions, strict=True)),
            len(questions),
        )
        failed = [(server, each) for server, each in zip(self.targets, answers, strict=True) if _is_error(each)]
        for server, error in failed:
            self._judge(server, path, error)
        self.targets = [server for server, each in zip(self.targets, answers, strict=True) if not _is_error(each)]
        if failed and not self.targets:
            server, error = failed[0]
            raise RunStopped(
                f"no server of rollout 'vllm' accepts weights any more ({server.url} failed at {path}: {error}); start it "
                f"again and continue with {run_option('resume', True)}"
            )
        return [each for each in answers if not _is_error(each)]

    def _judge(self, server: Server, path: str, error: Exception) -> None:
        """Raise what no other server would do better; otherwise leave the server alone.

        Raises:
            ContractError: weights were left out.
            OptionError: the server takes no weights, or not from here.
        """
        server.is_stale = True
        server.note_failure()
        if LEFT_OUT in str(error):
            raise ContractError(left_out(str(error))) from error
        first = path in ("/get_world_size", "/init_weight_transfer_engine")
        if isinstance(error, Refusal) and (error.is_final or first):
            raise OptionError(
                "server",
                f": {server.url} takes no weights ({error}): start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config "
                f"""'{{"backend": "{self.backend}"}}', or pass {option("transfer", "none")} for a role that is not trained""",
            )
        log.warning(f"a server of rollout 'vllm', {server.url}, failed at {path} ({error}); it is left out")


def _outcome(server: Server, path: str, question: Any) -> Any:
    """Return the answer of a server, or the error."""
    try:
        return server.ask(path, question)
    except FAILURES as error:
        return error


def _is_error(outcome: Any) -> bool:
    return isinstance(outcome, Exception)
