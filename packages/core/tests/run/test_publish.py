"""Model cards of runs, and uploads only on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from safetensors import safe_open

from rlhf_core.errors import UsageError
from rlhf_core.models.export.card import Card
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1,heads=1"


class Hub:
    """Stands for HfApi and remembers what it was asked."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        files = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append(("upload", {**options, "files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return Hub


def test_the_card_has_the_last_evaluation_and_the_data(tmp_path: Path, hub: type[Hub]) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(8)))
    data = {"use": "json", "path": str(path), "heldout": 0.5, "encoding": {"template": "raw"}}
    run = tiny_run(tmp_path / "run", model=MODEL, data=data, evaluator="heldout")
    run.train()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    reward = run.evaluations[-1][1]["eval/heldout/reward"]
    assert f"| heldout/reward | {reward:.4g} |" in card
    assert "Read by `json`: questions.jsonl, 2 rows per step." in card
    assert "in 2 steps by rlhf-core" in card
    assert str(tmp_path) not in card, "where files lie here is nobody's business"
    assert hub.calls == [], "nothing is uploaded unless asked"


def test_a_model_goes_to_the_hub_when_asked_and_privately(tmp_path: Path, hub: type[Hub]) -> None:
    tiny_run(tmp_path / "run", model=MODEL, push_to_hub="me/first").train()
    (_, created), (_, uploaded) = hub.calls
    assert created == {"name": "me/first", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/first"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= uploaded["files"]
    assert "hf_secret" not in (tmp_path / "run" / "config.toml").read_text()


def test_an_upload_that_fails_leaves_the_model_and_says_what_to_do(
    tmp_path: Path, hub: type[Hub], monkeypatch: Any
) -> None:
    monkeypatch.setattr(Hub, "error", OSError("no route to host"))
    with pytest.raises(
        UsageError, match=r"is saved, but the upload to the hub failed: no route to host; try again with hf upload me/x"
    ):
        tiny_run(tmp_path / "run", model=MODEL, push_to_hub="me/x").train()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_without_a_login_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="needs a login: set HF_TOKEN, or run hf auth login"):
        tiny_run(tmp_path / "run", model=MODEL, push_to_hub="me/x").train()
    assert not (tmp_path / "run").exists()


def test_weights_are_cut_into_files_of_the_size_asked_for(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", model=MODEL, export_shard="10KB").train()
    files = sorted((tmp_path / "run" / "model").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "run" / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes = [4 * opened.get_tensor(key).numel() for key in opened.keys()]  # noqa: SIM118  no dictionary
        assert sum(sizes) <= 10_000 or len(sizes) == 1, "a tensor is in one file"


def test_an_adapters_card_says_what_it_belongs_to_and_how_it_is_loaded() -> None:
    text = Card("org/base", "dpo").text("LoRA", adapter=True, classifier=True)
    assert "base_model: org/base" in text
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=1)' in text
    assert "PeftModel.from_pretrained(base" in text
