"""A policy that a server samples is trained as one that is sampled here, and a server's faults end in one line."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from threading import Thread
from typing import Any

import http_servers as servers
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core import OptionError, RlhfError, Run, RunStopped, Sampling, make_config, open_provider
from rlhf_core.testing import check_light, check_rollout
from rlhf_rollout_http.rollout import HttpRollout
from rlhf_rollout_http.server import EngineServer, end_when_idle


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return servers.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def padded(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with a head of 400 rows, of which its tokenizer has the first ones."""
    folder = tmp_path_factory.mktemp("padded")
    plain = AutoModelForCausalLM.from_pretrained(model)
    plain.resize_token_embeddings(400, mean_resizing=False)
    torch.nn.init.normal_(plain.get_input_embeddings().weight, 0.0, 0.1, torch.Generator().manual_seed(0))
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert max(tokenizer.get_vocab().values()) < 300
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server(model: str) -> Iterator[EngineServer]:
    with servers.up(EngineServer(model, token="secret")) as running:
        yield running


def at(server: EngineServer, **options: Any) -> HttpRollout:
    return HttpRollout(server.url, token=server.token, **{"timeout": 60.0, **options})


@pytest.fixture(scope="session")
def hf_curve(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Three steps of grpo with the engine `hf`."""
    return servers.train(model, tmp_path_factory.mktemp("hf"), "hf")


# ----------------------------------------------------------------------------------------------------------------------
# the same training
# ----------------------------------------------------------------------------------------------------------------------


def test_it_keeps_the_contract_of_a_rollout_engine(server: EngineServer, tiny_role: Any) -> None:
    check_rollout(at(server), role=tiny_role)
    assert not server.engines, "the engine is deleted when it is closed"


@pytest.mark.parametrize("part", [1, 512])
def test_three_updates_have_the_metrics_of_the_engine_hf(
    part: int, server: EngineServer, model: str, hf_curve: list[dict[str, float]], tmp_path: Path
) -> None:
    found = servers.train(model, tmp_path, at(server, part=part))
    for step, expected in zip(found, hf_curve, strict=True):
        assert step.keys() >= {"reward/mean", "loss/actor", "grad_norm/actor"}
        shared = expected.keys() & step.keys()
        assert {k: step[k] for k in shared} == pytest.approx({k: expected[k] for k in shared}, rel=1e-5, abs=1e-5)
        assert step["actor/mismatch"] < 1e-4, "server and trainer agree after each update"
        assert step["rollout/staleness"] == 0
    assert all(row["grad_norm/actor"] > 1e-3 for row in found), "each update moves the weights"
    assert not server.engines


def test_weights_in_files_do_as_well_as_uploaded_ones(
    model: str, hf_curve: list[dict[str, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    with servers.up(EngineServer(model, weights=str(folder))) as server:
        found = servers.train(model, tmp_path / "run", at(server, folder=str(folder), part=1))
    assert [row["loss/actor"] for row in found] == pytest.approx([row["loss/actor"] for row in hf_curve], abs=1e-5)
    assert not list(folder.iterdir()), "files are removed once the server has read them"


def test_a_server_reads_weights_below_its_folder_only(model: str, tmp_path: Path) -> None:
    with (
        servers.up(EngineServer(model, weights=str(tmp_path / "elsewhere"))) as server,
        pytest.raises(OptionError, match=r"refused POST /engines/\w+/weights: 403"),
    ):
        servers.train(model, tmp_path / "run", at(server, folder=str(tmp_path)), steps=1)


@pytest.mark.parametrize(
    "rule", [{"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.9}]
)
def test_temperature_and_truncation_are_those_of_the_engine_hf(
    rule: dict[str, Any], server: EngineServer, tiny_role: Any, tiny_prompts: Any
) -> None:
    sampling = replace(Sampling(n=2, max_new_tokens=5, seed=3), **rule)
    engine_hf = make_config("grpo", reward="length").providers["rollout"]
    with open_provider(at(server)) as here, open_provider(engine_hf) as there:
        found, expected = here(tiny_role, tiny_prompts, sampling), there(tiny_role, tiny_prompts, sampling)
    assert found.texts == expected.texts and found.tokens_NT.tolist() == expected.tokens_NT.tolist()
    assert found.extras.keys() == expected.extras.keys()
    for name in ("sampler_logprobs_NT", "sampler_log_mass_NT"):
        if name in expected:
            assert found[name].tolist() == [pytest.approx(row, abs=1e-4) for row in expected[name].tolist()]


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 300, "temperature": 1.5}])
def test_ids_that_the_tokenizer_lacks_are_never_sampled(rule: dict[str, Any], padded: str, tmp_path: Path) -> None:
    """A quarter of the head is padding, and as likely as the rest: tokens are those of the engine hf, whose trainer agrees."""
    sampling = {"n": 16, "max_new_tokens": 5, **rule}
    with servers.up(EngineServer(padded)) as server:
        found, expected = (
            servers.train(padded, tmp_path / name, rollout, steps=1, sampling=sampling, reward="length")
            for name, rollout in (("http", at(server)), ("hf", "hf"))
        )
    assert found[0]["reward/mean"] == pytest.approx(expected[0]["reward/mean"], abs=1e-6)
    assert found[0]["completion/length"] == expected[0]["completion/length"]
    if rule.get("temperature") != 0:
        assert found[0]["actor/mismatch"] < 1e-4
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("http", "hf")]
    assert [json.loads(line)["completion"] for line in samples[0].splitlines()] == [
        json.loads(line)["completion"] for line in samples[1].splitlines()
    ]


def test_a_token_that_the_tokenizer_lacks_ends_the_run(padded: str, tmp_path: Path) -> None:
    """By a server that does not know which those are."""

    class Careless(EngineServer):
        def answer(self, method: str, path: str, query: Any, body: bytes) -> dict[str, Any]:
            asked = json.dumps({**json.loads(body), "lacking": []}).encode() if path.endswith("/sample") else body
            return super().answer(method, path, query, asked)

    with servers.up(Careless(padded)) as server:
        line = message(padded, tmp_path, server)
    assert re.search(r"sent token 3\d\d in completion \d+, which the tokenizer does not have", line)


def test_a_resumed_run_equals_a_straight_one(server: EngineServer, model: str, tmp_path: Path) -> None:
    straight = servers.train(model, tmp_path / "straight", at(server), steps=4)
    servers.train(model, tmp_path / "run", at(server), steps=2)
    assert servers.train(model, tmp_path / "run", at(server), steps=4, resume=True) == straight


def test_two_ranks_equal_one(model: str, tmp_path: Path) -> None:
    with servers.up(EngineServer(model, token="secret")) as server:
        one = servers.train(model, tmp_path / "one", at(server))
        plugin = [] if entry_points(group="rlhf", name="http") else ["-p", "rlhf_rollout_http.plugin"]
        words = f"grpo --model {model} --reward http_servers:Small --batch-size 2 --steps 3"
        words += " --sampling.n 4 --sampling.max-new-tokens 6"
        words += f" --actor.optim.lr 1e-2 --rollout http --rollout.url {server.url} --rollout.token env:TOKEN"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_core", *plugin]
        done = subprocess.run(
            [sys.executable, *torchrun, *words.split(), "--output", str(tmp_path / "two")],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKEN": "secret"},
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "secret" not in done.stdout + done.stderr + (tmp_path / "two" / "config.toml").read_text()
        assert not server.engines, "both ranks sampled one engine, and it is deleted"
    for step, expected in zip(servers.curve(tmp_path / "two"), one, strict=True):
        for name in ("loss/actor", "reward/mean", "grad_norm/actor"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
        assert step["actor/mismatch"] < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# servers that are wrong
# ----------------------------------------------------------------------------------------------------------------------


def test_a_server_that_keeps_old_weights_is_seen_in_the_first_late_step(model: str, tmp_path: Path) -> None:
    with servers.up(servers.Forgetful(model)) as server:
        steps = servers.train(model, tmp_path, at(server), steps=2)
    assert steps[0]["actor/mismatch"] < 1e-4
    assert steps[1]["actor/mismatch"] > 1e-3, "above the bound that warns"


def test_a_server_that_keeps_old_weights_stops_the_run_if_that_is_asked(model: str, tmp_path: Path) -> None:
    with (
        servers.up(servers.Forgetful(model)) as server,
        pytest.raises(RunStopped, match="the engine has other weights"),
    ):
        servers.train(model, tmp_path, at(server), on_mismatch="stop")
    assert len(servers.curve(tmp_path)) == 1


def test_a_server_that_reports_old_weights_is_stale_and_not_compared(model: str, tmp_path: Path) -> None:
    with servers.up(servers.Late(model)) as server:
        steps = servers.train(model, tmp_path, at(server))
    assert [row["rollout/staleness"] for row in steps] == [0, 1, 2]
    assert "actor/mismatch" in steps[0] and "actor/mismatch" not in steps[1]


def message(model: str, output: Path, server: EngineServer, **options: Any) -> str:
    """The one line that a run ends in."""
    with pytest.raises(RlhfError) as caught:
        servers.train(model, output, at(server, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(name: str, value: Any) -> Callable[[Any], Any]:
    """A change of the first completion."""
    return lambda answer: {
        **answer,
        "completions": [{**answer["completions"][0], name: value}, *answer["completions"][1:]],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda answer: {}, "reports weights of version None"),
        (lambda answer: {**answer, "version": 9}, "reports weights of version 9, and the role has had 0 updates"),
        (lambda answer: {**answer, "version": True}, "reports weights of version True"),
        (lambda answer: {**answer, "completions": answer["completions"][1:]}, "was asked for 8 completions and sent 7"),
        (lambda answer: {**answer, "completions": "x" * 9}, "sent str"),
        (lambda answer: {**answer, "completions": list(range(8))}, "sent a int as completion 0"),
        (put("tokens", []), "no list of 1 to 6 tokens"),
        (put("tokens", [1] * 7), "no list of 1 to 6 tokens"),
        (put("tokens", [10**9]), "no numbers from 0 to"),
        (put("tokens", ["a"]), "no numbers from 0 to"),
        (put("finish", "tired"), "finished by 'tired'"),
        (put("logprobs", [-1.0]), "sent no logprobs for each"),
        (put("logprobs", [float("nan")] * 6), "no logarithms of probabilities"),
        (put("logprobs", [0.5] * 6), "no logarithms of probabilities"),
        (lambda answer: [answer], "answered with no JSON object"),
        (lambda answer: "x" * (2 << 20), "answered with more than 1 MiB"),
    ],
)
def test_a_wrong_answer_ends_in_one_line(change: Any, words: str, model: str, tmp_path: Path) -> None:
    def altered(answer: Any) -> Any:  # six tokens each, whatever was sampled
        for row in answer["completions"]:
            row.update(tokens=[1] * 6, logprobs=[-1.0] * 6, finish="length")
        return change(answer)

    with servers.up(servers.Altered(model, altered)) as server:
        line = message(model, tmp_path, server, max_answer=1)
    assert words in line and f"the rollout engine http at {server.url}" in line


def test_a_server_of_its_own_process_samples_until_it_dies(
    model: str, tmp_path: Path, tiny_role: Any, tiny_prompts: Any
) -> None:
    file = tmp_path / "address"
    command = [sys.executable, "-m", "rlhf_rollout_http.server", model, "--address-file", str(file), "--idle", "120"]
    process = subprocess.Popen(command, env={**os.environ, "RLHF_ENGINE_TOKEN": "secret"}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        rollout = HttpRollout(file.read_text().strip(), token="secret", timeout=60)
        rollout.check()
        with open_provider(rollout) as engine:
            assert len(engine(tiny_role, tiny_prompts, Sampling(n=1, max_new_tokens=2))) == 3
            process.kill()
            process.wait(10)
            with pytest.raises(RunStopped, match=r"rollout engine http at \S+ cannot be reached: .*resume") as caught:
                engine(tiny_role, tiny_prompts, Sampling(n=1, max_new_tokens=2))
        assert "\n" not in str(caught.value)
    finally:
        process.kill()
        process.wait(10)


def test_a_server_ends_by_itself_when_nobody_asks(model: str) -> None:
    server = EngineServer(model)
    watch = Thread(target=end_when_idle, args=(server, 0.2), daemon=True)
    with servers.up(server):
        watch.start()
        watch.join(10)
        assert not watch.is_alive()


def test_a_slow_server_ends_the_run_at_the_deadline(model: str, tmp_path: Path) -> None:
    with servers.up(servers.Altered(model, servers.slow)) as server:
        started = time.monotonic()
        line = message(model, tmp_path, server, timeout=1.0)
    assert "gave no answer in 1 s" in line or "timed out" in line  # the clock may run out while the connection opens
    assert time.monotonic() - started < 30


def test_a_server_that_sends_a_byte_now_and_then_has_the_same_deadline(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        wire, _ = listener.accept()
        with wire:
            wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                try:
                    wire.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.1)

    Thread(target=drip, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(RunStopped, match=r"gave no answer in 1 s"):
        HttpRollout(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=1.0).check()
    assert time.monotonic() - started < 5
    listener.close()


def test_a_wrong_token_and_no_server_are_refused_before_a_model_is_loaded(server: EngineServer, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"token: the rollout engine http at \S+ refused it"):
        replace(at(server), token="other").check()
    server.shutdown()
    server.server_close()
    with pytest.raises(RunStopped, match="cannot be reached"):
        at(server).check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "127.0.0.1:80"}, "expected an address"),
        ({"url": "http://example.org:80"}, "is another machine"),
        ({"url": "http://127.0.0.1:9", "folder": "/nowhere/at/all"}, "no such folder"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        HttpRollout(**options).check()


@pytest.mark.parametrize("name", ["timeout", "max_answer", "part"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be above 0, not 0"):
        HttpRollout("http://127.0.0.1:9", **{name: 0})


def test_it_does_not_slow_down_help() -> None:
    check_light("rlhf_rollout_http.plugin", "rlhf_rollout_http.rollout")


def test_the_metrics_that_it_logs_are_documented(server: EngineServer, model: str, tmp_path: Path) -> None:
    from rlhf_rollout_http.plugin import rlhf_metrics

    Run(make_config("grpo", model=model, **servers.GRPO, rollout=at(server), steps=1, output=str(tmp_path))).train()
    logged = set(re.findall(r'"(sync/\w+)"', (tmp_path / "metrics.jsonl").read_text()))
    assert logged == set(rlhf_metrics())
