"""Images of rows: every way to write one down becomes the same tokens and pixels."""

from __future__ import annotations

import base64
import io
import json
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vision_models import asked, llava, picture

from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.data.hf import HuggingFaceData
from rlhf_core.data.json import Json
from rlhf_core.data.prepare import Preparer
from rlhf_core.data.preview import render_row
from rlhf_core.data.rows import TokenizedRow
from rlhf_core.errors import DataError
from rlhf_core.models.loading.image_reader import load_reader
from rlhf_core.models.loading.tokenizer import load_tokenizer

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llava(tmp_path_factory.mktemp("model"))


def encoder(model: str, encoding: Encoding | None = None) -> Encoder:
    options = ModelOptions(model=model)
    tokenizer = load_tokenizer(model, options)
    return Encoder(tokenizer, encoding=encoding or Encoding(), reader=load_reader(model, options, tokenizer))


def read(folder: Path, rows: Rows, **options: Any) -> list[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(Json(str(folder / "rows.jsonl"), **options)("train"))


def same(first: TokenizedRow, second: TokenizedRow) -> bool:
    return first.ids == second.ids and torch.equal(first.images["pixel_values"], second.images["pixel_values"])


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_every_way_to_write_an_image_is_the_same_image(tmp_path: Path, model: str) -> None:
    picture(tmp_path / "a.png", "red")
    stored = encoded(tmp_path / "a.png")
    text = {"type": "text", "text": "What?"}

    def chat(**image: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "image", **image}, text]}]}

    ways: Rows = [
        chat(path="a.png"),
        chat(path=str(tmp_path / "a.png")),
        chat(url=(tmp_path / "a.png").as_uri()),
        chat(base64=stored),
        chat(image=f"data:image/png;base64,{stored}"),
        chat(type="image_url", image_url={"url": f"data:image/png;base64,{stored}"}),
        {"prompt": "What?", "images": ["a.png"]},
        {"prompt": "What?", "image": "a.png"},
        {"prompt": "What?", "image": stored},
        {"prompt": "<image>What?", "image": {"bytes": None, "path": "a.png"}},
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}], "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "<image>What?"}], "image": "a.png"},
    ]
    reads = encoder(model)
    rows = [reads.prompt_row(example) for row in ways for example in read(tmp_path, [row])]
    assert rows[0].sizes == ((20, 12),)
    assert all(same(row, rows[0]) for row in rows)


def test_images_stand_where_the_text_says(tmp_path: Path, model: str) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        picture(tmp_path / name, colour)
    (example,) = read(tmp_path, [{"prompt": "Is <image> or <image> blue?", "images": ["a.png", "b.png"]}])
    row = encoder(model).prompt_row(example)
    assert row.text == "<|im_start|>user\nIs <image> or <image> blue?<|im_end|>\n<|im_start|>assistant\n"
    red, blue = row.images["pixel_values"]
    assert red[0].mean() > red[2].mean(), "red comes first"
    assert blue[2].mean() > blue[0].mean()


def test_images_of_a_datasets_column(tmp_path: Path, model: str, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture(tmp_path / "a.png", "red")
    with Image.open(tmp_path / "a.png") as image:
        columns = {"prompt": ["What?"], "image": [image]}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        several = datasets.Dataset.from_dict({"prompt": ["What?"], "images": [[image]]})
        several = several.cast_column("images", datasets.List(datasets.Image()))
    table.save_to_disk(tmp_path / "one")
    several.save_to_disk(tmp_path / "several")
    (expected,) = read(tmp_path, [{"prompt": "What?", "image": "a.png"}])
    reads = encoder(model)
    for name in ("one", "several"):
        (example,) = HuggingFaceData(str(tmp_path / name))("train")
        assert same(reads.prompt_row(example), reads.prompt_row(expected))


def test_a_turned_photograph_is_turned_back(tmp_path: Path, model: str) -> None:
    photograph = Image.new("RGB", (30, 10), "red")
    photograph.paste("blue", (15, 0, 30, 10))
    tags = Image.Exif()
    tags[0x0112] = 6  # lies on its side
    photograph.save(tmp_path / "a.png", exif=tags)
    (example,) = read(tmp_path, [{"prompt": "What?", "image": "a.png"}])
    assert encoder(model).prompt_row(example).sizes == ((10, 30),)


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_broken_image_names_file_and_row(tmp_path: Path, model: str, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    (example,) = read(tmp_path, [{"prompt": "What?", "image": "a.png"}])
    with pytest.raises(DataError) as caught:
        encoder(model).prompt_row(example)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:1: the image {tmp_path}/a.png cannot be read: ")
    assert "\n" not in str(caught.value)


def test_a_text_cannot_pretend_to_show_an_image(tmp_path: Path, model: str) -> None:
    picture(tmp_path / "a.png", "red")
    reads = encoder(model)
    said = [{"role": "user", "content": "an <image>?"}, {"role": "assistant", "content": "An <image>!"}]
    none = "the text contains the image token '<image>', but the row has no image; remove the token, or add the image"
    for row, message in (
        ({"prompt": "an <image>?"}, none),
        (asked("an <image>?", "a.png"), "the rendered prompt has places (<image>) for 2 images, but the row has 1"),
        ({"messages": said}, none),
        (
            asked("What?", "a.png", answer="An <image>!"),
            "the text contains the image token '<image>', but the row has no image; remove the token, or add the image",
        ),
    ):
        (example,) = read(tmp_path, [row])
        with pytest.raises(DataError) as caught:
            reads.row(example) if example.completions else reads.prompt_row(example)
        assert str(caught.value) == f"{tmp_path}/rows.jsonl:1: {message}"


def test_a_template_without_images_is_an_error(tmp_path: Path, model: str) -> None:
    picture(tmp_path / "a.png", "red")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    (example,) = read(tmp_path, [asked("What?", "a.png")])
    with pytest.raises(DataError, match="the rendered prompt has places .<image>. for 0 images, but the row has 1"):
        encoder(model, Encoding(template_file=str(tmp_path / "t.jinja"))).prompt_row(example)


def test_the_preview_shows_sizes_for_images(tmp_path: Path, model: str) -> None:
    picture(tmp_path / "a.png", "red", (64, 48))
    (example,) = read(tmp_path, [asked("What?", "a.png", answer="Red.")])
    reads = encoder(model)
    assert reads.reader is not None
    text = render_row(reads.row(example), reads.tokenizer, reads.reader.token)
    assert "user\n<image 64x48>What?" in text
    assert "«Red.<|im_end|>»" in text


def test_a_prompt_with_an_image_is_never_cut(tmp_path: Path, model: str) -> None:
    picture(tmp_path / "a.png", "red")
    example, text = read(tmp_path, [asked("What is it?", "a.png", answer="Red."), asked("What is it?", answer="Red.")])
    reads = encoder(model, Encoding(max_tokens=30, too_long="truncate"))
    assert reads.truncate(reads.row(example)) is None
    assert reads.truncate(reads.row(text)) is not None


def test_what_reads_images_goes_to_other_processes(tmp_path: Path, model: str) -> None:
    picture(tmp_path / "a.png", "red")
    (example,) = read(tmp_path, [asked("What?", "a.png")])
    reads = encoder(model)
    sent = pickle.loads(pickle.dumps((reads.tokenizer, reads.reader)))
    assert same(Encoder(sent[0], reader=sent[1]).prompt_row(example), reads.prompt_row(example))


def test_the_cache_keeps_texts_alone(tmp_path: Path, model: str) -> None:
    """Pixels are larger than the images they come from."""
    picture(tmp_path / "a.png", "red")
    examples = read(tmp_path, [asked("What?", "a.png", answer="Red."), asked("Hm?", answer="No.")])
    for _ in range(2):  # made, and then found
        preparer = Preparer(encoder(model), False, Json("rows.jsonl", cache=str(tmp_path / "cache")))
        image, text = preparer(examples)
        preparer.close()
        assert isinstance(image, TokenizedRow)
        assert isinstance(text, TokenizedRow)
        assert image.images
        assert not text.images
    (file,) = (tmp_path / "cache").iterdir()
    with sqlite3.connect(file) as cache:
        assert cache.execute("SELECT count(*) FROM rows").fetchone() == (1,)
    cache.close()


def test_bytes_and_pillow_images_are_read_too(tmp_path: Path) -> None:
    from rlhf_core.data.images import attach_images, open_image

    stream = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(stream, format="PNG")
    for value in (stream.getvalue(), Image.new("RGB", (3, 2), "red"), {"bytes": stream.getvalue(), "path": None}):
        chat: Any = attach_images("What?", value)
        assert open_image(chat[0]["content"][0], "here").getpixel((0, 0)) == (255, 0, 0)
