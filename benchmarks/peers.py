"""Comparison of this project with TRL 1.16: time and memory of a step, and the distance of both from the bound.

Four jobs on a random Llama (4 layers, width 256, a vocabulary of 32,000; one thread, float32): GRPO with 16 prompts × 4 samples
× 32 new tokens, DPO and a reward model on 16 pairs, SFT on 16 rows; lengths are log-normal. Both sides read the same files,
with the same tokenizer, AdamW settings and clipping, no gradient checkpointing and no logging. Each measurement is a child
process of its own; the sides take turns. A step's time is that from the end of one step to the end of the next, reading and
preparing data included. "Beyond imports" is peak memory less what the process held once everything was imported.

The bound is the time that the step's matrix products take at the rate this machine multiplies matrices of 1024 × 1024:
3 × forward for what is trained, 1 × for the reference and for sampling, no padding, the language-model head on completion
tokens only.

TRL lives in an environment of its own:

    python -m venv trl && trl/bin/pip install torch==2.13.0 "trl==1.16.*" transformers==5.19.0
    python benchmarks/peers.py --peer-python trl/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

JOBS = ("grpo", "dpo", "sft", "reward")
SIDES = ("ours", "trl")
LAYERS, WIDTH, INNER, HEADS, VOCAB = 4, 256, 688, 4, 32_000
PROMPTS, SAMPLES, NEW_TOKENS = 16, 4, 32
WARM_UP = 1
LR, BETA2, CLIP = 1e-6, 0.95, 1.0


def main() -> None:
    """Measure each job on both sides in turn; print a line a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="the Python of an environment with TRL (see above)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, taking turns")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.jobs[0], Path(options.folder), options.steps)))
        return
    if not options.peer_python:
        parser.error("--peer-python is needed: the Python of an environment with TRL; --help says how to make one")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.steps)
        rate = sgemm_rate()
        print(f"sgemm on one thread: {rate / 1e9:.0f} GFLOP/s; load {os.getloadavg()[0]:.1f}", flush=True)
        for job in options.jobs:
            print(compared(job, folder, options, rate), flush=True)


def compared(job: str, folder: str, options: argparse.Namespace, rate: float) -> str:
    """A job's line: medians of both sides, ratios, and the bound."""
    pythons = {"ours": sys.executable, "trl": options.peer_python}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for k in range(options.rounds):
        for side in SIDES if k % 2 else SIDES[::-1]:
            words = [pythons[side], __file__, "--child", side, "--jobs", job]
            words += ["--folder", folder, "--steps", str(options.steps)]
            found[side].append(run_child(words))
    numbers = {
        side: {
            "wall": median(each["wall"] for each in runs),
            "cpu": median(each["cpu"] for each in runs),
            "peak": median(each["peak"] for each in runs),
            "beyond": median(each["peak"] - each["imports"] for each in runs),
        }
        for side, runs in found.items()
    }
    columns = []
    for name, unit in (("wall", "s"), ("cpu", "s"), ("peak", "MiB"), ("beyond", "MiB beyond imports")):
        a, b = (numbers[side][name] for side in SIDES)
        columns.append(f"{name if unit == 's' else 'peak'} {a:.4g} and {b:.4g} {unit}, ratio {a / b:.2f}")
    bound = median(each["flops"] for each in found["ours"]) / rate
    times = ", ".join(f"{side} {numbers[side]['cpu'] / bound:.2f}" for side in SIDES)
    return f"{job:6}  {'; '.join(columns)}; matrix products alone {bound:.3f} s, CPU time as multiples of it: {times}"


def run_child(words: list[str]) -> dict[str, Any]:
    """One process's figures, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def sgemm_rate() -> float:
    """Floating-point operations per CPU second of products of 1024 × 1024 float32 matrices on one thread: the best of 20."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(2, 1024, 1024)
    best = float("inf")
    for _ in range(20):
        started = time.thread_time()
        torch.mm(a, b)
        best = min(best, time.thread_time() - started)
    return 2 * 1024**3 / best


# ----------------------------------------------------------------------------------------------------------------------
# what both sides read
# ----------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, steps: int) -> None:
    """A random model, a tokenizer of one token a word, and rows for every step."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=1024
    )
    fast.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows: list[dict[str, str]] = []
    for _ in range(PROMPTS * (steps + WARM_UP + 1)):
        row = {"prompt": text(draw, 48, 0.5)}
        row |= {name: " " + text(draw, 96, 0.7) for name in ("chosen", "rejected")}
        rows.append(row)
    kept = {
        "grpo": {"prompt": "prompt"},
        "sft": {"prompt": "prompt", "completion": "chosen"},
        **{job: {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"} for job in ("dpo", "reward")},
    }
    for job, columns in kept.items():
        lines = [json.dumps({name: row[column] for name, column in columns.items()}) for row in rows]
        (folder / f"{job}.jsonl").write_text("\n".join(lines))


def text(draw: random.Random, middle: int, spread: float) -> str:
    """Random words, their number log-normal."""
    length = min(max(round(draw.lognormvariate(0, spread) * middle), 8), 400)
    return " ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(length))


# ----------------------------------------------------------------------------------------------------------------------
# one process
# ----------------------------------------------------------------------------------------------------------------------


def measure(side: str, job: str, folder: Path, steps: int) -> dict[str, Any]:
    """Medians of the timed steps, and memory in MiB."""
    import torch

    torch.set_num_threads(1)
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    extra = (ours if side == "ours" else trl)(job, folder, steps + WARM_UP, mark)
    timed = marks[WARM_UP - 1 :]
    wall, cpu = ([b[k] - a[k] for a, b in pairwise(timed)] for k in (0, 1))
    return {"wall": median(wall), "cpu": median(cpu), "peak": memory("VmHWM"), **extra}


def memory(name: str) -> float:
    """A figure of this process's memory, MiB: VmHWM is its peak so far, VmRSS what it holds now."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name))


def ours(job: str, folder: Path, steps: int, mark: Callable[[], None]) -> dict[str, float]:
    """This project; also counts the floating-point operations of a step's matrix products."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    from rlhf_algos import algorithm  # noqa: F401
    from rlhf_core import Registry, Run, make_config
    from rlhf_core.loop import collect, credit, update
    from rlhf_core.models import module  # noqa: F401
    from rlhf_core.rollout import hf, sampler  # noqa: F401

    imports = memory("VmRSS")
    kind: str | dict[str, Any] = {"use": "grpo", "kl": {"coef": 0.0}} if job == "grpo" else job
    options: dict[str, Any] = {"reward": "length", "sampling": {"n": SAMPLES, "max_new_tokens": NEW_TOKENS}}
    optim = {"lr": LR, "betas": [0.9, BETA2], "max_grad_norm": CLIP, "schedule": "constant", "warmup": 0.0}
    registry = Registry()
    config = make_config(
        kind, registry, model=str(folder / "model"), data={"use": "json", "path": str(folder / f"{job}.jsonl")},
        steps=steps, batch_size=PROMPTS, output=tempfile.mkdtemp(), **options if job == "grpo" else {},
        **{"reward" if job == "reward" else "actor": {"optim": optim}},
    )  # fmt: skip
    flops: list[float] = []
    run = Run(config, registry)
    with run.open():
        for iteration in run.iterations(collect):
            credited = credit(run, iteration)
            update(run, iteration, credited)
            run.finish(iteration, credited)
            mark()
            flops += [products(job, batch) for batch in credited.values()]
    return {"imports": imports, "flops": median(flops)}


def products(job: str, batch: Any) -> float:
    """Floating-point operations of the matrix products of one step, without padding."""
    lengths_N = (batch.prompt_lengths_N + batch.lengths_N).double()
    body = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    seen = float((2 * body * lengths_N + LAYERS * 2 * WIDTH * lengths_N * (lengths_N + 1)).sum())  # causal: half of 4
    head = 0.0 if job == "reward" else 2.0 * WIDTH * VOCAB * float(batch.lengths_N.sum())
    passes = {"sft": 3, "reward": 3, "dpo": 4, "grpo": 3}[job]  # forward and two backward products; DPO's reference
    again = 0.0
    if job == "grpo":  # sampling: prompts once, then every token with its head
        prompts = float(batch.prompt_lengths_N.double().sum()) * (1 - 1 / SAMPLES)
        again = seen - 2 * body * prompts + head
    return passes * (seen + head) + again


def trl(job: str, folder: Path, steps: int, mark: Callable[[], None]) -> dict[str, float]:
    """TRL's trainer of the same job; gradients are not checkpointed, nothing is logged or saved."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    imports = memory("VmRSS")
    rows = load_dataset("json", data_files=str(folder / f"{job}.jsonl"), split="train", cache_dir=tempfile.mkdtemp())
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "per_device_train_batch_size": PROMPTS, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "learning_rate": LR, "lr_scheduler_type": "constant",
        "adam_beta1": 0.9, "adam_beta2": BETA2, "weight_decay": 0.0, "max_grad_norm": CLIP, "logging_strategy": "no",
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    sampling = {"num_generations": SAMPLES, "max_completion_length": NEW_TOKENS, "beta": 0.0, "loss_type": "grpo"}
    both = {
        "grpo": (GRPOTrainer, GRPOConfig, sampling | {"per_device_train_batch_size": PROMPTS * SAMPLES}),
        "dpo": (DPOTrainer, DPOConfig, {}),
        "sft": (SFTTrainer, SFTConfig, {}),
        "reward": (RewardTrainer, RewardConfig, {}),
    }
    trainer_class, config_class, own = both[job]

    class Mark(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            mark()

    more = {"reward_funcs": lambda completions, **_: [-float(len(each)) for each in completions]}
    trainer = trainer_class(
        model=str(folder / "model"),
        args=config_class(**shared | own),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Mark()],
        **more if job == "grpo" else {},
    )
    trainer.train()
    return {"imports": imports}


if __name__ == "__main__":
    main()
