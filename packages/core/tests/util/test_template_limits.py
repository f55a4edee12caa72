"""A chat template that never ends or builds gigabytes is one line; usual ones are rendered as they are."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from rlhf_core.contract.batch import Example
from rlhf_core.data.render import Encoding, Renderer
from rlhf_core.errors import DataError, UsageError
from rlhf_core.models.loading.byte_tokenizer import byte_tokenizer
from rlhf_core.models.loading.tokenizer import render_chat
from rlhf_core.util import limits

BAD = {  # what is said
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "it takes more than 0.2 s",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}": "it takes more than 0.2 s",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "it recurses without end",
    "{{ 'a' * 10**15 }}": "it needs more memory than is available",
}
DOUBLING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.rendering_limits.__wrapped__, "__defaults__", (0.2, 64))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("template", "said"), [*BAD.items(), (DOUBLING, "it takes more than ")])
def test_a_template_without_end_is_one_line(template: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer, Encoding(template_file=str(tmp_path / "t.jinja")))
    with pytest.raises(DataError) as caught:
        renderer.prompt(Example(({"role": "user", "content": "Hi"},), (), origin="rows.jsonl:3"))
    assert str(caught.value).startswith(f"rows.jsonl:3: the chat cannot be rendered: {said}")
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=f"cannot be used: {said}"):
        render_chat(tokenizer, [{"role": "user", "content": "Hi"}])


@pytest.mark.usefixtures("quick")
def test_a_template_is_limited_in_any_thread_and_a_debugger_is_put_back() -> None:
    errors: list[BaseException] = []
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = next(iter(BAD))

    def render() -> None:
        try:
            render_chat(tokenizer, [{"role": "user", "content": "Hi"}])
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert len(errors) == 1
    before = sys.gettrace()
    with limits.rendering_limits():
        pass
    assert sys.gettrace() is before


def test_code_of_libraries_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNWATCHED", 0.0)
    with limits.rendering_limits(seconds=0.0, megabytes=0):
        assert sum(i for i in range(1000)) == 499500
