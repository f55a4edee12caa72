"""Writes the table "What fits" of docs/planning.md: the forecast peak of usual jobs on one GPU and on eight.

python tools/hardware_table.py          writes the table; about ten processor minutes
python tools/hardware_table.py --print  prints it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rlhf_core import make_config
from rlhf_core.forecast.forecast import forecast
from rlhf_core.forecast.options import PlanOptions

PAGE = Path(__file__).resolve().parent.parent / "docs/planning.md"
BEGIN, END = "<!-- written by tools/hardware_table.py -->", "<!-- end of the table -->"

SIZES = {
    "0.5B": "layers=24,hidden=896,heads=14,kv_heads=2,intermediate=4864",
    "1.5B": "layers=28,hidden=1536,heads=12,kv_heads=2,intermediate=8960",
    "7B": "layers=28,hidden=3584,heads=28,kv_heads=4,intermediate=18944",
    "14B": "layers=48,hidden=5120,heads=40,kv_heads=8,intermediate=13824",
    "32B": "layers=64,hidden=5120,heads=40,kv_heads=8,intermediate=27648",
    "70B": "layers=80,hidden=8192,heads=64,kv_heads=8,intermediate=28672",
}
"""Shapes of Qwen2.5 and Llama 3, with tied embeddings."""

BFLOAT16 = {"dtype": "bfloat16"}
TRAINED = {**BFLOAT16, "gradient_checkpointing": True}
LORA = {**TRAINED, "lora": {"rank": 16}}
SFT = {"data": [{"prompt": "a" * 1000, "completion": "b" * 1000}] * 8}
ONLINE = {"data": [{"prompt": "a" * 1000}] * 8, "reward": "length", "sampling": {"n": 4, "max_new_tokens": 1024}}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft, LoRA": ("sft", {**SFT, "actor": LORA}),
    "sft": ("sft", {**SFT, "actor": TRAINED}),
    "grpo, LoRA": ("grpo", {**ONLINE, "actor": LORA, "reference": BFLOAT16}),
    "grpo": ("grpo", {**ONLINE, "actor": TRAINED, "reference": BFLOAT16}),
    "ppo": ("ppo", {**ONLINE, "actor": TRAINED, "reference": BFLOAT16, "critic": TRAINED}),
}
STRATEGIES = {1: "torch", 8: {"use": "deepspeed", "stage": 3}}
MEMORY = (24, 80)


def main() -> None:
    """Work the table out."""
    rows = ["| model | job | 1 GPU | 8 GPUs, ZeRO-3 | fits |", "|---|---|---|---|---|"]
    for size, shape in SIZES.items():
        model = f"tiny:{shape},vocab=152064,context=32768"
        for job, (algorithm, options) in JOBS.items():
            peaks = {}
            for count, strategy in STRATEGIES.items():
                fixed = {"batch_size": 8, "steps": 2, "output": "unused"}
                config = make_config(algorithm, model=model, strategy=strategy, **fixed, **options)
                peaks[count] = forecast(config, PlanOptions(gpus=count, gpu_gib=80)).peak / 2**30
            fits = [f"{count} x {gib}" for count, peak in peaks.items() for gib in MEMORY if peak <= 0.92 * gib]
            listed = ", ".join(fits) or "neither"
            rows.append(f"| {size} | {job} | {peaks[1]:.0f} GiB | {peaks[8]:.0f} GiB | {listed} |")
            print(rows[-1], flush=True)
    if "--print" not in sys.argv:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
