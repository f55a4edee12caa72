"""A checkpoint that was damaged in any way is named and not used; a run goes on only as what it began as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_core.checkpoint import valid_checkpoints
from rlhf_core.errors import UsageError
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [truncated, flipped, Path.unlink]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint of each."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    tiny_run(output, model=MODEL, save_every=1).train()
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_of_a_checkpoint_damaged_in_any_way_is_named_and_the_one_before_is_used(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, aside = output / "checkpoints" / "step-2", output / "checkpoints" / "damaged-step-2"
    run = tiny_run(output, model=MODEL, resume=True)
    names = [str(path.relative_to(newest)) for path in files_of(newest)]
    assert {"manifest.json", "state.json", "random.safetensors", "roles/actor/optimizer.safetensors"} < set(names)
    with run.open():
        capsys.readouterr()
        for name in names:
            for damage in DAMAGES:
                shutil.copytree(newest, output / "whole")
                damage(newest / name)
                run.state.step = 0
                run.lives.restore()
                assert run.step == 1
                line = capsys.readouterr().err
                what = line.partition("(")[2].partition(")")[0]
                assert line == f"rlhf-run: {newest} is damaged ({what}) and renamed to damaged-step-2; using step-1\n"
                assert what.startswith(name), (name, damage)
                assert aside.exists() and not newest.exists()
                shutil.rmtree(aside)
                (output / "whole").rename(newest)


def test_a_manifest_with_any_byte_flipped_is_noticed(output: Path) -> None:
    manifest = output / "checkpoints" / "step-2" / "manifest.json"
    content = manifest.read_bytes()
    for position in range(0, len(content), 7):
        for bit in (1, 0x20, 0x80):
            changed = bytearray(content)
            changed[position] ^= bit
            manifest.write_bytes(changed)
            if json.loads(content) != _json(changed):  # a space that became another says the same
                assert [folder.name for folder in valid_checkpoints(output)] == ["step-1"], (position, bit)


def _json(content: bytes | bytearray) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_damaged_step_is_written_again_and_the_run_ends_as_it_would_have(output: Path, finished: Path) -> None:
    truncated(output / "checkpoints" / "step-2" / "state.json")
    tiny_run(output, model=MODEL, resume=True).train()
    assert [folder.name for folder in valid_checkpoints(output)] == ["step-1", "step-2"]
    weights = Path("model") / "model.safetensors"
    assert (output / weights).read_bytes() == (finished / weights).read_bytes()


def test_when_every_checkpoint_is_damaged_nothing_is_started_over_and_all_are_named(output: Path) -> None:
    for name in ("step-1", "step-2"):
        (output / "checkpoints" / name / "random.safetensors").unlink()
    with pytest.raises(UsageError) as caught:
        tiny_run(output, model=MODEL, resume=True).train()
    gone = "random.safetensors is missing"
    assert str(caught.value) == (
        f"every checkpoint in {output / 'checkpoints'} is damaged (step-2: {gone}; step-1: {gone}); "
        "start over with another output=…"
    )
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2, "what was measured is still there"


def test_what_a_killed_save_left_behind_is_removed(output: Path) -> None:
    leftover = output / "checkpoints" / ".step-9.tmp"
    leftover.mkdir()
    (leftover / "random.safetensors").write_text("half")
    tiny_run(output, model=MODEL, resume=True).train()
    assert not leftover.exists()


# ----------------------------------------------------------------------------------------------------------------------
# only as what it began as
# ----------------------------------------------------------------------------------------------------------------------


def refusal(output: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        tiny_run(output, resume=True, **options).train()
    return str(caught.value)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    said = refusal(tmp_path / "none", model=MODEL)
    advice = 'leave out resume=True to start one, or pass resume="auto" to start or continue'
    assert said == f"there is no run in {tmp_path / 'none'} to resume; {advice}"
    assert not (tmp_path / "none").exists()


def test_options_that_change_results_are_listed_and_refused(output: Path) -> None:
    before = (output / "config.toml").read_bytes()
    said = refusal(output, model=MODEL, seed=7, actor={"optim": {"lr": 0.5}}, reward={"use": "length", "target": 9})
    for change in ("seed=… 0 -> 7", "actor.optim.lr 0.001 -> 0.5", "reward.target 32 -> 9"):
        assert change in said
    assert said.endswith("; restore them, or add resume_changed=True to continue with the new ones")
    assert (output / "config.toml").read_bytes() == before


def test_another_provider_is_one_difference_whatever_its_options(output: Path) -> None:
    said = refusal(output, model=MODEL, reward={"use": "regex", "pattern": "a"})
    assert said.startswith(f"the run in {output} began with other options: reward=… length -> regex; ")


def test_options_that_change_no_result_may_change_and_more_steps_be_added(output: Path) -> None:
    tiny_run(output, model=MODEL, resume=True, steps=3, keep=9, micro_tokens=64, chunk=2, save_every=3).train()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3
    text = (output / "config.toml").read_text()
    assert "steps = 3\n" in text
    assert "resume = false\n" in text, "the file repeats the run, it does not resume one"


def test_steps_are_no_free_choice_where_a_schedule_is_laid_over_them(tmp_path: Path) -> None:
    options = {"model": MODEL, "actor": {"optim": {"schedule": "linear"}}}
    tiny_run(tmp_path / "run", **options).train()
    assert "steps=… 2 -> 3" in refusal(tmp_path / "run", steps=3, **options)


def test_changed_options_can_be_insisted_on(output: Path) -> None:
    tiny_run(output, model=MODEL, resume=True, resume_changed=True, steps=3, seed=7).train()
    assert "seed = 7\n" in (output / "config.toml").read_text()
