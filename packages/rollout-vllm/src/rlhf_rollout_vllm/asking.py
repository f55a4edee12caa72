"""Requests to an engine in separate processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from rlhf_core.errors import ContractError

__all__ = ["ask", "destroy_context", "gather"]

PULSE_SECONDS = 5.0
"""Time without an answer after which the engine is asked whether it is alive."""


async def ask(llm: Any, prompt: Sequence[int], parameters: Any, number: str, salt: str, adapter: Any = None) -> Any:
    """Return vLLM's completion of a prompt.

    Args:
        llm: the engine that is asked.
        prompt: token ids.
        parameters: of sampling.
        number: identifies the request.
        salt: prompts share cached keys and values with those of equal salt only, so that no cache outlives an update.
        adapter: vLLM's request of an adapter, which samples with the engine's weights; None samples with those alone.

    Raises:
        ContractError: another request was answered.
    """
    from vllm.sampling_params import RequestOutputKind

    parameters.output_kind = RequestOutputKind.FINAL_ONLY
    asked = {"prompt_token_ids": list(prompt), "cache_salt": salt}
    answers = [answer async for answer in llm.generate(asked, parameters, number, lora_request=adapter)]
    if [(each.request_id, each.finished) for each in answers] != [(number, True)]:
        raise ContractError(f"vLLM answered request {number} with {answers}")
    return answers[0].outputs[0]


async def gather(
    asks: Mapping[int, Coroutine[Any, Any, Any]], answers: dict[int, Any], is_alive: Callable[[], Awaitable[bool]]
) -> bool:
    """Put answers into `answers` until all are there; return False if the engine died.

    Args:
        asks: by number.
        answers: by number.
        is_alive: returns True if the engine answers; asked when nothing else comes.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    tasks = {asyncio.ensure_future(ask): i for i, ask in asks.items()}
    pending: set[Any] = set(tasks)
    alive = True
    try:
        while pending and alive:
            done, pending = await asyncio.wait(pending, timeout=PULSE_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                try:
                    answers[tasks[task]] = task.result()
                except EngineDeadError:
                    alive = False
            if pending and not done:
                alive = await is_alive()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return alive


async def destroy_context(context: Any) -> None:
    """Free the sockets' context, which vLLM leaves to the end of the interpreter; it closes the sockets in the loop before."""
    await asyncio.sleep(0)
    context.destroy(linger=0)
