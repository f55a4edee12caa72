"""A request to an engine in separate processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rlhf_core.errors import ContractError

__all__ = ["ask", "destroy_context"]


async def ask(llm: Any, prompt: Sequence[int], parameters: Any, number: str, salt: str) -> Any:
    """Return vLLM's completion of a prompt.

    Args:
        llm: the engine that is asked.
        prompt: token ids.
        parameters: of sampling.
        number: identifies the request.
        salt: prompts share cached keys and values with those of equal salt only, so that no cache outlives an update.

    Raises:
        ContractError: another request was answered.
    """
    from vllm.sampling_params import RequestOutputKind

    parameters.output_kind = RequestOutputKind.FINAL_ONLY
    asked = {"prompt_token_ids": list(prompt), "cache_salt": salt}
    answers = [answer async for answer in llm.generate(asked, parameters, number)]
    if [(each.request_id, each.finished) for each in answers] != [(number, True)]:
        raise ContractError(f"vLLM answered request {number} with {answers}")
    return answers[0].outputs[0]


async def destroy_context(context: Any) -> None:
    """Free the sockets' context, which vLLM leaves to the end of the interpreter; it closes the sockets in the loop before."""
    await asyncio.sleep(0)
    context.destroy(linger=0)
