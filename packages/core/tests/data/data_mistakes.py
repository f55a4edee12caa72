"""Mistakes in data: (name, rows of the file, options of the reader, the line that answers them).

FILE stands for the file of the rows, one a line, and DIR for its folder.
"""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
"""A red one, in base64."""
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}


def seen(image: dict[str, str]) -> dict[str, Any]:
    """A message that shows an image."""
    return {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "What?"}]}


CHAT = (
    "{% for m in messages %}{{ raise_exception('roles must alternate') if m.role == 'system' }}"
    "{{ m.content }}{% endfor %}"
)

MISTAKES: list[tuple[str, list[Any], dict[str, Any], str]] = [
    (
        "not JSON",
        [{"prompt": "a"}, "{oops"],
        {},
        (
            "FILE:2: expected one JSON object per line, or a list of objects "
            "(Expecting property name enclosed in double quotes at column 2)"
        ),
    ),
    ("not an object", [{"prompt": "a"}, "3"], {}, "FILE:2: a row should be an object with named columns, not int"),
    ("the first row not an object", ["3"], {}, "FILE:1: a row should be an object with named columns, not int"),
    ("no rows", [""], {}, "FILE: the file has no rows"),
    ("no such file", [], {"path": "DIR/nowhere.jsonl"}, "cannot read DIR/nowhere.jsonl: No such file or directory"),
    ("not UTF-8", [b'{"prompt": "caf\xe9"}'], {}, "FILE: expected UTF-8 text (invalid continuation byte at byte 15)"),
    (
        "half a character",
        ['{"prompt": "a\\ud800", "answer": "b"}'],
        {},
        "FILE:1: 'prompt': '\\ud800' is half of a surrogate pair; write both halves",
    ),
    ("no prompt", [{"a": 1, "b": 2}], {}, "FILE:1: no prompt among the columns a, b; pass --data.prompt-key"),
    ("a column goes missing", [{"prompt": "a"}, {"x": 1}], {}, "FILE:2: expected a column 'prompt'; found only x"),
    ("a wrong name", [{"a": "b"}], {"prompt_key": "c"}, "FILE:1: expected a column 'c'; found only a"),
    (
        "a wrong place in a list",
        [{"a": {"b": ["x"]}}],
        {"prompt_key": "a/b/3"},
        "FILE:1: expected a column '3' in 'a/b'",
    ),
    (
        "a wrong name in a table",
        [{"a": {"b": "x"}}],
        {"prompt_key": "a/c"},
        "FILE:1: expected a column 'c' in 'a'; found only b",
    ),
    ("a path into a text", [{"a": "x"}], {"prompt_key": "a/b"}, "FILE:1: expected a column 'b' in 'a'"),
    ("true as prompt", [{"prompt": True}], {}, "FILE:1: 'prompt' should be text or a chat, not bool"),
    ("null as prompt", [{"prompt": None}], {}, "FILE:1: 'prompt' should be text or a chat, not null"),
    ("an object as prompt", [{"prompt": {}}], {}, "FILE:1: 'prompt' should be text or a chat, not dict"),
    (
        "an object as completion",
        [{"prompt": "a", "answer": {}}],
        {},
        "FILE:1: 'answer' should be text or a chat, not dict",
    ),
    (
        "null as completion",
        [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": None}],
        {},
        "FILE:2: 'answer' should be text or a chat, not null",
    ),
    ("an empty chat", [{"messages": []}], {}, "FILE:1: 'messages': a chat must have at least one message"),
    (
        "not a message",
        [{"messages": [USER, "x"]}],
        {},
        "FILE:1: 'messages': message 1 should be {\"role\": …, \"content\": …}, not 'x'",
    ),
    (
        "a message without role",
        [{"messages": [{"content": "x"}]}],
        {},
        "FILE:1: 'messages': message 0 should be {\"role\": …, \"content\": …}, not {'content': 'x'}",
    ),
    ("no content", [{"messages": [{"role": "user"}]}], {}, "FILE:1: 'messages': message 0 (user) has no content"),
    (
        "not a part",
        [{"messages": [{"role": "user", "content": ["x"]}]}],
        {},
        'FILE:1: \'messages\': message 0: a part should be {"type": "text", "text": …}, not \'x\'',
    ),
    (
        "an image",
        [{"messages": [seen({"base64": PIXEL}), ASSISTANT]}],
        {},
        "FILE:1: a message has a part of type 'image', but the model reads only text",
    ),
    (
        "a column of images",
        [{"prompt": "a", "response": "b"}, {"prompt": "What?", "response": "b", "images": [PIXEL]}],
        {"images_key": "images"},
        "FILE:1: expected a column 'images'; found only prompt, response",
    ),
    (
        "images for a model of texts",
        [{"prompt": "What?", "response": "b", "image": PIXEL}],
        {},
        "FILE:1: a message has a part of type 'image', but the model reads only text",
    ),
    (
        "an image file that is not there",
        [{"messages": [seen({"path": "x.png"}), ASSISTANT]}],
        {},
        "FILE:1: there is no image file DIR/x.png",
    ),
    (
        "no file for a column of images",
        [
            {"prompt": "a", "response": "b", "images": []},
            {"prompt": "a", "response": "b", "images": ["t.jinja", "x.png"]},
        ],
        {},
        "FILE:2: there is no image file DIR/x.png",
    ),
    (
        "an image on the web",
        [{"messages": [seen({"url": "https://x.org/y.png"}), ASSISTANT]}],
        {},
        (
            "FILE:1: 'messages': message 0: the image https://x.org/y.png is not on this machine; download it, and give its "
            "path"
        ),
    ),
    (
        "an image that is nowhere",
        [{"messages": [seen({}), ASSISTANT]}],
        {},
        "FILE:1: a message has an image without path, url or base64, and there is no column of images for it",
    ),
    (
        "an image that is a number",
        [{"prompt": "a", "response": "b", "images": [7]}],
        {},
        "FILE:1: 'images': an image should be a path or base64, not int; --data.images-key none ignores the column",
    ),
    (
        "an image in two places",
        [{"messages": [seen({"path": "x.png", "base64": PIXEL}), ASSISTANT]}],
        {},
        "FILE:1: 'messages': message 0: an image has path and base64; give only one of them",
    ),
    (
        "more images than their places",
        [{"prompt": "<image> or <image>?", "response": "b", "images": [PIXEL]}],
        {},
        (
            "FILE:1: 'images': the prompt has places for 2 images, but the row has 1; --data.images-key none ignores the column"
        ),
    ),
    (
        "too many images",
        [{"prompt": "a", "response": "b", "images": [PIXEL, PIXEL]}],
        {"max_images": 1},
        "FILE:1: the prompt has 2 images, more than --data.max-images 1",
    ),
    (
        "an image in an answer",
        [{"prompt": "Draw.", "response": [{**seen({"base64": PIXEL}), "role": "assistant"}]}],
        {},
        "FILE:1: an image comes after the first trained answer; images must be in the prompt (--data.turns last)",
    ),
    (
        "images of a text to continue",
        [{"text": "a", "images": [PIXEL]}],
        {},
        "FILE:1: 'images': images need a prompt that contains them (--data.prompt-key)",
    ),
    (
        "a number of images below zero",
        [{"prompt": "a"}],
        {"max_images": -1},
        "--data.max-images must be at least 0, not -1",
    ),
    (
        "no question",
        [{"messages": [ASSISTANT]}],
        {},
        "FILE:1: 'messages': the chat begins with the assistant: there is no prompt to answer",
    ),
    (
        "answers without prompt",
        [{"chosen": "a", "rejected": "b"}],
        {},
        "FILE:1: 'chosen' is an answer, so a prompt is expected too (--data.prompt-key); the columns are chosen, rejected",
    ),
    (
        "half a pair",
        [{"prompt": "a", "good": "b"}],
        {"chosen_key": "good"},
        "FILE:1: a preference needs --data.chosen-key and --data.rejected-key",
    ),
    (
        "two kinds of sides",
        [{"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": "b"}],
        {},
        "FILE:1: 'chosen' and 'rejected' should both be dialogues or both be answers",
    ),
    (
        "no shared prompt",
        [{"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}],
        {},
        "FILE:1: 'chosen' and 'rejected': both should begin with the same prompt and each end with an assistant turn",
    ),
    (
        "a margin in words",
        [{"prompt": "a", "margin": "big"}],
        {"number_keys": ("margin",)},
        "FILE:1: 'margin' should be a finite number, not 'big'",
    ),
    (
        "an infinite margin",
        [{"prompt": "a", "margin": float("inf")}],
        {"number_keys": ("margin",)},
        "FILE:1: 'margin' should be a finite number, not inf",
    ),
    (
        "a margin of some",
        [{"prompt": "a", "answer": "b", "margin": 1}, {"prompt": "a", "answer": "b"}],
        {"number_keys": ("margin",)},
        "FILE:2: expected a column 'margin'; found only prompt, answer",
    ),
    (
        "tools in words",
        [{"prompt": "a", "tools": "clock"}],
        {},
        "FILE:1: 'tools' should be a list of functions, or JSON text of one",
    ),
    ("a text that is true", [{"text": True}], {}, "FILE:1: 'text' should be text, not bool"),
    (
        "a label that is missing",
        [{"prompt": "a"}],
        {"label_key": "y"},
        "FILE:1: expected a column 'y'; found only prompt",
    ),
    (
        "metadata that are missing",
        [{"prompt": "a"}],
        {"meta_keys": ("id",)},
        "FILE:1: expected a column 'id'; found only prompt",
    ),
    (
        "nothing to train on",
        [{"prompt": "a"}],
        {},
        (
            "FILE:1: no completion to train on; pass --data.completion-key if there is one (preferences need both chosen and "
            "rejected)"
        ),
    ),
    (
        "all too long",
        [{"prompt": "a", "answer": "b"}],
        {"encoding": {"max_tokens": 8}},
        (
            "all 1 rows of a batch are longer than 1024 prompt tokens or 8 tokens in total: raise --max-prompt-tokens or "
            "--data.encoding.max-tokens, or pass --data.encoding.too-long truncate"
        ),
    ),
    (
        "a chat the template refuses",
        [{"messages": [SYSTEM, USER, ASSISTANT]}],
        {"encoding": {"template_file": "DIR/t.jinja"}},
        "FILE:1: the chat cannot be rendered: roles must alternate",
    ),
    (
        "no such template",
        [{"prompt": "a", "answer": "b"}],
        {"encoding": {"template_file": "DIR/x.jinja"}},
        "--data.encoding.template-file DIR/x.jinja: No such file or directory",
    ),
    (
        "an input template without a place",
        [{"prompt": "a", "answer": "b"}],
        {"encoding": {"input_template": "Q:"}},
        "--data.encoding.input-template needs {} where the prompt goes",
    ),
    (
        "two templates",
        [{"prompt": "a", "answer": "b"}],
        {"encoding": {"input_template": "Q: {}", "template": "chat"}},
        "--data.encoding.input-template works only with raw prompts; leave out --data.encoding.template chat",
    ),
    (
        "tools without a template",
        [{"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}],
        {"encoding": {"template": "raw"}},
        "FILE:1: the chat cannot be rendered: a chat with tool calls or images needs a tokenizer with a chat template",
    ),
    ("a count below zero", [{"prompt": "a"}], {"limit": -1}, "--data.limit must be at least 0, not -1"),
    ("processes below zero", [{"prompt": "a"}], {"workers": -2}, "--data.workers must be at least 0, not -2"),
    (
        "nothing held out",
        [{"prompt": "a"}],
        {"split_asked": "heldout"},
        "no rows are held out: pass --data.heldout 0.1 or --data.heldout-path FILE",
    ),
    (
        "everything held out",
        [{"prompt": "a"}, {"prompt": "b"}],
        {"heldout": 2},
        "--data.heldout 2 gives 0 rows to train on and 2 held-out rows of 2; change it so that both have rows",
    ),
    (
        "hf: no such file",
        [],
        {"hf": True, "path": "DIR/nowhere.csv"},
        "--data.path DIR/nowhere.csv: there is no such file",
    ),
    (
        "hf: no such split",
        [{"prompt": "a"}],
        {"hf": True, "split": "dev"},
        "--data.path FILE, split 'dev': Unknown split \"dev\". Should be one of ['train'].",
    ),
    (
        "hf: null as prompt",
        [{"prompt": "a"}, {"prompt": None}],
        {"hf": True},
        "FILE:2: 'prompt' should be text or a chat, not null",
    ),
    (
        "hf: a wrong name",
        [{"prompt": "a"}],
        {"hf": True, "prompt_key": "x"},
        "FILE:1: expected a column 'x'; found only prompt",
    ),
    (
        "hf: shares for other sets",
        [{"prompt": "a"}],
        {"hf": True, "path": "FILE,FILE", "shares": (1.0,)},
        "--data.shares has 1 numbers, but --data.path has 2 datasets",
    ),
    (
        "hf: a share of nothing",
        [{"prompt": "a"}],
        {"hf": True, "path": "FILE,FILE", "shares": (1.0, 0.0)},
        "--data.shares 1 0: each should be above 0",
    ),
    (
        "hf: nothing held out",
        [{"prompt": "a"}],
        {"hf": True, "split_asked": "heldout"},
        "no rows are held out: pass --data.heldout-split NAME, --data.heldout-path or --data.heldout 0.1",
    ),
    (
        "hf: a share of a stream held out",
        [{"prompt": "a"}],
        {"hf": True, "streaming": True, "heldout": 0.5},
        "--data.heldout needs the number of rows, which a stream does not have: use --data.heldout-split to stream",
    ),
    (
        "hf: a stream without its duplicates",
        [{"prompt": "a"}],
        {"hf": True, "streaming": True, "unique": True},
        "--data.unique needs all rows in advance: leave out --data.streaming",
    ),
    (
        "hf: the same set twice",
        [{"prompt": "a"}],
        {"hf": True, "path": "FILE,FILE", "unique": True},
        "--data.unique leaves no row of FILE, since earlier datasets contain all of them; leave it out of --data.path",
    ),
]
