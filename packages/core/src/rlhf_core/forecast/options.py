"""Options of `rlhf-run plan`: devices and lengths of rows (`--plan.gpus 8 --plan.gpu h100`)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.contract.ranges import at_least, at_most, finite
from rlhf_core.errors import OptionError, option
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["GPUS", "Gpu", "PlanOptions"]


@dataclass(frozen=True)
class Gpu:
    """A type of device."""

    gib: float
    """memory that CUDA reports, which is less than the type's name promises"""
    tflops: float
    """dense bfloat16 or float16 matrix products, 10^12 operations per second"""
    wide_tflops: float
    """float32 matrix products without TF32, which torch leaves off, 10^12 operations per second"""
    gb_s: float
    """memory bandwidth, 10^9 bytes per second"""


GPUS = {
    "a10": Gpu(22.0, 125, 31.2, 600),
    "a100-40": Gpu(39.4, 312, 19.5, 1555),
    "a100-80": Gpu(79.1, 312, 19.5, 2039),
    "b200": Gpu(178.0, 2250, 75, 8000),
    "h100": Gpu(79.1, 989, 67, 3350),
    "h200": Gpu(139.8, 989, 67, 4800),
    "l4": Gpu(22.0, 121, 30.3, 300),
    "l40s": Gpu(44.4, 362, 91.6, 864),
    "rtx3090": Gpu(23.6, 71, 35.6, 936),
    "rtx4090": Gpu(23.5, 165, 82.6, 1008),
}
"""Types of `--plan.gpu`; rates are those of NVIDIA's data sheets, without sparsity."""


@dataclass(frozen=True)
class PlanOptions:
    """Devices, and lengths of rows."""

    gpus: int = 1
    """number of devices of the run; the launcher `local` puts a rank of every role on each"""
    gpu: str = ""
    """type of device, for its memory and rates: a10, a100-40, a100-80, b200, h100, h200, l4, l40s, rtx3090 or rtx4090"""
    gpu_gib: float = 0.0
    """memory of a device in GiB; 0 takes that of the type, or of a GPU in this machine"""
    reserve: float = 0.08
    """share of a device's memory that no tensor can use, 0 to 1: the CUDA context, libraries, and fragmentation"""
    prompt_tokens: int = 0
    """number of tokens of a prompt; 0 takes `max_prompt_tokens`, the maximum"""
    completion_tokens: int = 0
    """number of tokens of a completion; 0 takes `sampling.max_new_tokens`, or the prompt's number if nothing is
    sampled"""
    tflops: float = 0.0
    """achieved rate of matrix products, in 10^12 operations per second and device; 0 takes `efficiency` times that of
    the type"""
    gb_s: float = 0.0
    """achieved memory bandwidth, in 10^9 bytes per second; 0 takes twice `efficiency`, at most 0.8, of the type's"""
    efficiency: float = 0.4
    """share of the type's matrix rate that training reaches, above 0 and at most 1"""
    measure: bool = False
    """measure both rates on this machine's device, which takes about a second"""
    json: bool = False
    """print one JSON object in place of the table"""

    def __post_init__(self) -> None:
        at_least(1, self, "gpus")
        at_least(0, self, "gpu_gib", "reserve", "prompt_tokens", "completion_tokens", "tflops", "gb_s", "efficiency")
        at_most(0.9, self, "reserve")
        at_most(1, self, "efficiency")
        finite(self, "gpu_gib", "tflops", "gb_s")
        if not self.efficiency:
            raise OptionError("efficiency", "must be above 0, not 0")
        for given, other in (("tflops", "gb_s"), ("gb_s", "tflops")):
            if getattr(self, given) and self.measure:
                raise OptionError(given, f"is what {option('measure')} measures; leave one of them out")
            if getattr(self, given) and not getattr(self, other) and not self.gpu:
                missing = f"{option(other)} or {option('gpu')}"
                raise OptionError(given, f"gives no seconds without the other rate; pass {missing} too")
        if self.gpu and self.gpu not in GPUS:
            raise OptionError(
                "gpu", f"{self.gpu}: unknown GPU type{did_you_mean(self.gpu, GPUS)}; choose one of {', '.join(GPUS)}"
            )
