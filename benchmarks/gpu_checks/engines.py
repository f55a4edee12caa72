"""Several processes on one GPU, and engines of other packages, where they are installed."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["installed_engines", "two_processes"]

COMMAND = [sys.executable, "-c", "import sys; from rlhf_core.cli import main; sys.exit(main())"]

SMALL = [
    *("grpo", "--model", "tiny", "--reward", "length", "--steps", "2", "--batch-size", "4", "--sampling.n", "2"),
    *("--sampling.max-new-tokens", "8"),
]

ENGINES = {
    "vllm": ["--rollout", "vllm"],
    "deepspeed": ["--strategy", "deepspeed"],
    "ray": ["--launcher", "ray"],
}
"""The flags that use a package."""

NCCL = """
import torch, torch.distributed as d
d.init_process_group("nccl"); x = torch.ones(4, device="cuda:0"); d.all_reduce(x); print(float(x.sum()))
"""

IPC = """
import torch, torch.multiprocessing as m
def read(queue, answer):
    rebuild, arguments = queue.get(); answer.put(float(rebuild(*arguments).sum()))
if __name__ == "__main__":
    from torch.multiprocessing.reductions import reduce_tensor
    c = m.get_context("spawn"); q, a = c.Queue(), c.Queue()
    child = c.Process(target=read, args=(q, a)); child.start()
    x = torch.ones(1000, device="cuda"); q.put(reduce_tensor(x)); print(a.get(timeout=40)); child.join()
"""


def two_processes(context: Context) -> None:
    """A second rank without a GPU of its own is refused in a line; whether NCCL and CUDA IPC work between two processes."""
    if context.rehearse:
        codes, said = finish(start_ranks([*COMMAND, "--version"]), 60)
        context.expect("two ranks start", codes == [0, 0], said[1][-300:])
        return
    ranks = start_ranks([*COMMAND, *SMALL, "--output", str(context.folder / "two")])
    _, said = finish(ranks[1:], 40)
    finish(ranks[:1], 0)
    one_line = [line for line in said[0].splitlines() if line.startswith("rlhf-run: ")]
    refused = len(one_line) == 1 and "has no GPU, since" in one_line[0]
    context.expect("a second process on one GPU is refused in one line", refused, (one_line or [said[0][-300:]])[0])
    codes, said = finish(start_ranks([sys.executable, "-c", NCCL]), 25)
    last = said[0].strip().splitlines()[-1] if said[0].strip() else "nothing said"
    context.note(
        f"NCCL between two processes on one GPU: {'works' if codes == [0, 0] else f'does not work ({last[:200]})'}"
    )
    script = context.folder / "ipc.py"
    script.write_text(IPC)
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    codes, said = finish([child], 50)
    last = said[0].strip().splitlines()[-1] if said[0].strip() else "nothing said"
    works = codes == [0] and last == "1000.0"
    context.note(f"CUDA IPC between two processes: {'works' if works else f'does not work ({last[:200]})'}")


def installed_engines(context: Context) -> None:
    """A small GRPO run through each engine that is installed."""
    for package, flags in ENGINES.items():
        if importlib.util.find_spec(package) is None or context.rehearse:
            context.note(f"{package} is not {'tried in a rehearsal' if context.rehearse else 'installed'}")
            continue
        output = str(context.folder / package)
        child = start([*COMMAND, *SMALL, *flags, "--output", output], os.environ | {"HF_HUB_OFFLINE": "1"})
        codes, said = finish([child], context.left() - 5)
        context.expect(f"a run with {' '.join(flags)}", codes == [0], said[0].strip()[-300:])


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process whose words are collected."""
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_ranks(command: list[str]) -> list[subprocess.Popen[str]]:
    """Start two ranks of a process group, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not torch.cuda.is_available():
        common["CUDA_VISIBLE_DEVICES"] = ""
    return [start(command, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def finish(children: list[subprocess.Popen[str]], seconds: float) -> tuple[list[int], list[str]]:
    """Wait for processes, and kill those that take longer; returns their codes and what they said."""
    until = time.monotonic() + seconds
    codes, said = [], []
    for child in children:
        try:
            text, _ = child.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
        codes.append(child.returncode)
        said.append(text)
    return codes, said
