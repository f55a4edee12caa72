"""Sweeps: which runs a file describes, what is run again and what is not. Runs are stood in for by a script."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.cli.app import main
from rlhf_core.cli.sweep import run_member
from rlhf_core.errors import UsageError

BASE = """
model = "tiny"
steps = 3
[algorithm]
use = "repulse"
alpha = 0.02
target.beta = -10
[reward]
use = "length"
target = 2
"""

RUN = """#!{python}
import json, sys, time
from pathlib import Path
import tomllib
words = sys.argv[1:]
config = tomllib.loads(Path(words[words.index("--config") + 1]).read_text())
folder = Path(config["output"])
from rlhf_core.checkpoint.own_files import new_files
new_files().with_names(["model/"]).write(folder)
(folder / "calls").open("a").write(" ".join(words[2:]) + "\\n")
(folder / "model").mkdir(exist_ok=True)
(folder / "notes").mkdir(exist_ok=True)
(folder / "metrics.jsonl").write_text(json.dumps({{"step": config["steps"]}}) + "\\n" + '{{"step": 4, "half')
if (folder / "sleep").exists():
    time.sleep(30)
sys.exit(3 if config["seed"] == 1 and not (folder / "mended").exists() else 0)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base configuration, where a run is the script above."""
    (tmp_path / "base.toml").write_text(BASE)
    script = tmp_path / "python"
    script.write_text(RUN.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(f'config = "base.toml"\noutput = "out"\n{text}')
    return path


def test_every_variant_meets_every_point_of_the_grid_and_every_seed(folder: Path) -> None:
    path = write(
        folder,
        "seeds = [0, 7]\n[grid]\n'algorithm.alpha' = [0.1, 1.0]\n'batch-size' = [2]\n[variants.a]\n[variants.b]\n",
    )
    sweep = read_sweep(path)
    assert [m.name for m in sweep.members][:3] == [
        "a-alpha=0.1-batch-size=2-seed0", "a-alpha=1.0-batch-size=2-seed0", "b-alpha=0.1-batch-size=2-seed0",
    ]  # fmt: skip
    assert len(sweep.members) == 8
    settings = sweep.members[-1].settings
    assert settings["algorithm"] == {"use": "repulse", "alpha": 1.0, "target": {"beta": -10}}
    assert (settings["batch_size"], settings["seed"]) == (2, 7)
    assert settings["output"] == "out/b-alpha=1.0-batch-size=2-seed7"


def test_a_variant_with_another_provider_replaces_the_table_and_its_own_grid_the_common_one(folder: Path) -> None:
    path = write(
        folder,
        "[grid]\n'algorithm.alpha' = [0.1]\n"
        "[variants.rloo]\nalgorithm = {use = 'rloo'}\ngrid = {}\n[variants.no]\nskip = true\n",
    )
    (member,) = read_sweep(path).members
    assert member.settings["algorithm"] == {"use": "rloo"}
    assert member.settings["reward"] == {"use": "length", "target": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 3\n", "unknown key 'seed'"),
        ("seeds = 3\n", "seeds must be a list of numbers"),
        ("[grid]\n'steps' = 3\n", "grid 'steps' must be a list"),
        ("[variants]\na = 1\n", "variants.a must be a table"),
        ("processes = 0\n", "processes must be a whole number of at least 1, not 0"),
        ("[grid]\n'actor.optim.lr' = [1e-3]\n'proposal.optim.lr' = [1, 1]\n", "two runs have the same name"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_sweep(write(folder, text))


def test_what_is_finished_never_runs_again_and_what_failed_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, "seeds = [0, 1]\ndiscard = ['model', 'notes']\n")
    assert main(["sweep", str(path), "--jobs", "2"]) == 1
    out = capsys.readouterr()
    assert "1 failed, 1 finished" in out.out
    assert "run-seed1: ended with code 3" in out.err
    assert not (folder / "out/run-seed0/model").exists()
    assert "out/run-seed0/notes is kept, since it is not a folder of the run" in out.err
    assert (folder / "out/run-seed0/notes").exists(), "what the run did not write"
    assert (folder / "out/run-seed1/model").exists(), "of a failed run nothing is thrown away"
    (folder / "out/run-seed1/mended").touch()
    assert main(["sweep", str(path)]) == 0
    assert "2 finished" in capsys.readouterr().out
    calls = [(folder / f"out/run-seed{k}/calls").read_text().splitlines() for k in (0, 1)]
    config = ["--config out/run-seed0/sweep-config.toml", "--config out/run-seed1/sweep-config.toml"]
    assert calls == [[config[0]], [config[1], f"{config[1]} --resume"]]
    assert main(["sweep", str(path), "--status"]) == 0
    assert "0  run-seed0  finished  3/3" in capsys.readouterr().out, "the half-written line counts for nothing"


def test_pieces_of_a_sweep(folder: Path) -> None:
    path = write(folder, "seeds = [0, 2, 3]\n")
    states = lambda: [member.state for member in read_sweep(path).members]
    assert main(["sweep", str(path), "--only", "1"]) == 0
    assert states() == ["waiting", "finished", "waiting"]
    assert main(["sweep", str(path), "--at-most", "1"]) == 0
    assert states() == ["finished", "finished", "waiting"]
    assert main(["sweep", str(path), "--only", "3"]) == 2


def test_a_run_that_somebody_is_at_is_left_alone_even_if_its_sweep_was_killed(folder: Path) -> None:
    sweep = read_sweep(write(folder, ""))
    (member,) = sweep.members
    member.folder.mkdir(parents=True)
    (member.folder / "sleep").touch()
    running: set[subprocess.Popen[bytes]] = set()
    first = threading.Thread(target=run_member, args=(member, sweep, running))
    first.start()
    while not (running and (member.folder / "calls").exists()):
        first.join(0.05)
    run_member(member, sweep, set())
    assert len((member.folder / "calls").read_text().splitlines()) == 1
    assert member.state == "begun"
    (process,) = running
    process.terminate()
    first.join()
    assert json.loads(member.status_file.read_text())["exit"] == -15
    assert member.state == "failed"


@pytest.mark.parametrize("name", ["sweep-config.toml", "log.txt", "sweep-status.json"])
def test_a_file_of_the_users_in_a_runs_folder_stays(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, "")
    (member,) = read_sweep(path).members
    member.folder.mkdir(parents=True)
    (member.folder / name).write_text("{}")
    assert main(["sweep", str(path)]) == 2
    assert f"{name} exists and is not a file of this sweep" in capsys.readouterr().err
    assert [each.name for each in member.folder.iterdir()] == [name] and (member.folder / name).read_text() == "{}"
    (member.folder / name).unlink()
    assert main(["sweep", str(path)]) == 0 == main(["sweep", str(path)])


def test_a_slurm_script_has_a_task_a_run(folder: Path) -> None:
    path = write(folder, "seeds = [0, 1, 2]\n[slurm]\ntime = '04:00:00'\nrequeue = ''\n")
    assert main(["sweep", str(path), "--slurm", "array.sh"]) == 0
    script = (folder / "array.sh").read_text().splitlines()
    assert script[2:6] == [
        "#SBATCH --job-name=sweep",
        "#SBATCH --array=0-2",
        "#SBATCH --time=04:00:00",
        "#SBATCH --requeue",
    ]
    assert script[-1].endswith(f'-m rlhf_core sweep {path} --only "$SLURM_ARRAY_TASK_ID"')
    subprocess.run(["bash", "-n", "array.sh"], check=True)


def test_a_ray_script_submits_a_job_for_each_unfinished_run(folder: Path) -> None:
    """With `ray` stood in for by a script that runs what it is given, as a cluster's shell does."""
    path = write(folder, "seeds = [0, 2]\n[ray]\nentrypoint-num-gpus = 1\n")
    assert main(["sweep", str(path), "--only", "0"]) == 0
    assert main(["sweep", str(path), "--ray", "jobs.sh"]) == 0
    (line,) = (folder / "jobs.sh").read_text().splitlines()[3:]
    assert line.startswith("ray job submit --no-wait --entrypoint-num-gpus=1 -- bash -c ")
    (folder / "ray").write_text('#!/bin/bash\necho "$@" > submitted\nshift 5\ncd / && "$@"\n')
    (folder / "ray").chmod(0o755)
    (folder / "python").write_text(f'#!/bin/bash\necho "$PWD $*" > {folder}/called\n')
    subprocess.run(["bash", "jobs.sh"], check=True, env={"PATH": f"{folder}:/usr/bin:/bin"})
    assert (folder / "called").read_text() == f"{folder} -m rlhf_core sweep {path} --only 1\n"


def test_several_processes_are_ranks_of_one_run(folder: Path) -> None:
    path = write(folder, "processes = 4\n")
    (folder / "python").write_text(f'#!/bin/bash\necho "$*" > {folder}/called\n')
    assert main(["sweep", str(path)]) == 0
    assert (folder / "called").read_text() == (
        "-m torch.distributed.run --standalone --nproc-per-node 4 -m rlhf_core --config out/run-seed0/sweep-config.toml\n"
    )


def test_plugins_of_the_sweep_are_those_of_its_runs_here_and_in_scripts(folder: Path) -> None:
    """A module that the environment does not have, and a plugin that is blocked."""
    (folder / "sweep_local.py").write_text("")
    path = write(folder, "[slurm]\n[ray]\n")
    (folder / "python").write_text(f'#!/bin/bash\necho "$*" > {folder}/called\n')
    words = ["-p", "no:files", "-p", "sweep_local", "sweep", str(path)]
    for flags in (["--ray", "jobs.sh"], ["--slurm", "array.sh"], []):
        assert main([*words, *flags]) == 0
    for name in ("called", "array.sh", "jobs.sh"):
        assert "-m rlhf_core -p sweep_local -p no:files " in (folder / name).read_text(), name
