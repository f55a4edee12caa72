"""A harness of verifiers that asks for one answer in this process: no program is started, and no uv is needed.

Its module is of its own and imports verifiers at once, because verifiers finds a harness by the name of a module.
"""

from __future__ import annotations

from typing import Any

import httpx
import verifiers.v1 as vf

__all__ = ["DirectHarness"]

DEADLINE = 3600.0
"""Seconds of one request: more than an episode has."""


class DirectHarness(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]  # verifiers may be absent where types are checked
    """One request with the system prompt and the prompt of the task."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> Any:
        """Ask once. The server of verifiers at `endpoint` passes the request on to the policy and records it."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            answer = await client.post(
                f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": messages}, headers=headers
            )
        return vf.ProgramResult(exit_code=0 if answer.is_success else 1, stdout="", stderr=answer.text)
