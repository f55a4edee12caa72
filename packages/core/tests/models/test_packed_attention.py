"""Attention over packed rows: torch's variable-length kernel, what it is given, and when it is taken."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from test_packing import ALL, CONFIGS, SIZES, checkpoint, results, rows, spec
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig

from rlhf_core.contract.options import ModelOptions
from rlhf_core.errors import MissingPackage, OptionError, UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs import packed_attention as file
from rlhf_core.models.inputs import packing
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.load import load_model

LENGTHS = [3, 1, 5, 5, 2]
CUDA = torch.device("cuda", 0)


def reference_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Return what flash attention's documentation says of rows, windows and groups, written out in loops of matrices."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    left, right = window_size
    for begin, end in zip(cu_seq_q.tolist(), cu_seq_k.tolist()[1:]):
        at = torch.arange(end - begin)
        back = at[:, None] - at
        seen = (back <= left if left >= 0 else back == back) & (-back <= right if right >= 0 else back == back)
        for head in range(query.shape[1]):
            q, k, v = query[begin:end, head], key[begin:end, head // groups], value[begin:end, head // groups]
            scores = (q @ k.T * scale).masked_fill(~seen, -math.inf)
            output[begin:end, head] = torch.softmax(scores, -1) @ v
    return output


def older_kernel(query: Tensor, *rest: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    """The kernel as torch 2.11 has it: it takes grouped queries and is not told of them."""
    return reference_kernel(
        query, *rest, scale=scale, window_size=window_size, enable_gqa=query.shape[1] != rest[0].shape[1]
    )


def states(heads: int, kv_heads: int, dim: int, value_dim: int) -> tuple[Tensor, ...]:
    """Query, key and value (1, heads, S, D) in float64, which require a gradient."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return tuple(
        torch.randn(1, many, sum(LENGTHS), width, dtype=torch.float64, generator=draw).requires_grad_()
        for many, width in shapes
    )


@pytest.mark.parametrize("kernel", [reference_kernel, older_kernel])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 12, 12), (2, 2, 16, 6)]
)
def test_the_kernel_gives_what_a_call_per_row_gives(
    kernel: Any,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, outputs and gradients: grouped queries, windows, heads of odd width, values narrower than keys."""
    monkeypatch.setattr(file, "_kernel", lambda: kernel)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int()
    module: Any = nn.Module()
    module.is_causal, module.num_key_value_groups = True, heads // kv_heads
    found = []
    for compute in (
        file.varlen_attention,
        lambda m, q, k, v, b, **rest: file.rows_attention(m, q, k, v, None, b, **rest),
    ):
        given = states(heads, kv_heads, dim, value_dim)
        output, _ = compute(module, *given, bounds, max_length_q=7, scaling=0.37, sliding_window=window)
        weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found.append((output, *torch.autograd.grad((output * weights).sum(), given)))
    assert found[0][0].shape == (1, sum(LENGTHS), heads, value_dim)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3"])
def test_models_give_the_outputs_of_padded_rows_through_the_kernel(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's arguments reach it by the names that it takes: bounds, scale, windows."""
    calls = []

    @functools.wraps(reference_kernel)
    def counting(*given: Any, **named: Any) -> Tensor:
        calls.append(named["window_size"])
        return reference_kernel(*given, **named)

    folder = checkpoint(CONFIGS[name], tmp_path)
    packed, padded = (build_module(spec(folder, *ALL, packing=each)) for each in (True, False))
    monkeypatch.setattr(file, "_kernel", lambda: counting)
    monkeypatch.setattr(file, "_takes_kernel", lambda query, value: True)
    found = results(packed, rows())
    assert len(calls) == packed.model.config.num_hidden_layers
    windows = {"llama": {-1}, "mistral": {3}}.get(name, {-1, 3})
    assert {left for left, _ in calls} == windows
    for key, value in results(padded, rows()).items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[key] / scale, value / scale, rtol=0, atol=1e-5)


def test_a_default_scale_is_that_of_the_heads_before_they_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    monkeypatch.setattr(file, "_kernel", lambda: lambda q, *_, scale, **__: scales.append(scale) or q)
    file.varlen_attention(nn.Module(), *states(2, 2, 4, 4), torch.tensor([0, 16]), max_length_q=16)
    assert scales == [0.5]


def test_autocast_decides_what_the_kernel_computes_in() -> None:
    """Layers hand float32 queries over, for positions are; the kernel has no float32."""
    assert file._half(torch.zeros(1)) is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert file._half(torch.zeros(1)) is torch.bfloat16


def a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), flash: bool = True) -> None:
    """Let torch report a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: flash)


def test_what_keeps_rows_from_the_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config, half = LlamaConfig(hidden_size=64, num_attention_heads=2), torch.bfloat16
    a_gpu(monkeypatch)
    assert file.varlen_obstacle(config, CUDA, half) == ""
    assert file.varlen_obstacle(config, CUDA, torch.float16) == ""
    assert "but this role uses float32" in file.varlen_obstacle(config, CUDA, torch.float32)
    assert "this device is cpu" in file.varlen_obstacle(config, torch.device("cpu"), half)
    wide = LlamaConfig(hidden_size=1024, num_attention_heads=2)
    assert "at most 256 numbers, but the model's have 512" in file.varlen_obstacle(wide, CUDA, half)
    a_gpu(monkeypatch, capability=(7, 5))
    assert "compute capability 8.0, which Tesla T4 lacks" in file.varlen_obstacle(config, CUDA, half)
    a_gpu(monkeypatch, flash=False)
    assert "switched off" in file.varlen_obstacle(config, CUDA, half)
    a_gpu(monkeypatch)
    monkeypatch.setattr(file, "_kernel", lambda: None)
    assert "2.11 and later have it" in file.varlen_obstacle(config, CUDA, half)


@pytest.mark.parametrize(("dtype", "attention", "packs"), [("bfloat16", "sdpa", True), ("float32", "sdpa", False)])
def test_sdpa_packs_on_a_gpu_in_half_precision(
    dtype: str, attention: str, packs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 rows are padded there, as without a kernel, and one line says so."""
    a_gpu(monkeypatch)
    module = build_module(spec("tiny", "logprobs_NT", dtype=dtype, attention=attention, trained=False))
    monkeypatch.setattr(type(module.model), "device", CUDA)
    assert module.packs == packs
    assert ("rows are padded on this GPU" in caplog.text) is not packs


def test_second_derivatives_leave_the_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sdpa_kernel` switches flash attention off; torch's kernel for packed rows has no second derivative either."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.zeros(1, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "device", CUDA)
    assert file._takes_kernel(query, query)
    with sdpa_kernel(SDPBackend.MATH):
        assert not file._takes_kernel(query, query)


def test_varlen_is_sdpa_on_the_cpu() -> None:
    """A configuration for a GPU can be tried out here: rows are packed, a call for each run of equal ones."""
    found, expected = (build_module(spec("tiny", *ALL, attention=each)) for each in ("varlen", "sdpa"))
    assert found.packs
    ours = results(found, rows())
    for key, value in results(expected, rows()).items():
        assert torch.equal(ours[key], value), key


def test_varlen_that_cannot_be_had_is_refused_in_a_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="packing is required by attention varlen"):
        ModelOptions(attention="varlen", packing=False)
    capped = checkpoint(Gemma2Config(attn_logit_softcapping=9.0, head_dim=8, **SIZES), tmp_path)
    with pytest.raises(
        UsageError, match="caps attention logits, which attention varlen does not support; choose eager"
    ):
        load_model(capped, ModelOptions(attention="varlen"))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_isolates_rows", lambda model: False)
        with pytest.raises(UsageError, match="layers of tiny cannot keep packed rows apart"):
            build_module(spec("tiny", "logprobs_NT", attention="varlen"))
    a_gpu(monkeypatch)
    with pytest.raises(OptionError, match=r"varlen is not available: it needs bfloat16 or float16") as raised:
        build_module(spec("tiny", "logprobs_NT", attention="varlen"))
    assert str(raised.value).startswith("actor.attention varlen")


@pytest.mark.parametrize("name", ["flash", "sdpa ", "kernels-community/", "a/b/c", ""])
def test_an_attention_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="must be one of sdpa, eager, varlen"):
        ModelOptions(attention=name)


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flash_attention_4", "kernels-community/flash-attn3"]
)
def test_every_flash_attention_needs_its_package_and_packs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check packing for every variable-length function of transformers."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingPackage, match=f"attention {name} needs a package: pip install"):
            load_model("tiny", ModelOptions(attention=name))
    module = build_module(spec("tiny", "logprobs_NT"))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_forward)
    module.model.config._attn_implementation = name
    assert module.flash
    assert packing.can_pack(module.model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, lambda *_: None)
    assert not module.flash


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("trained", [True, False])
def test_packed_rows_give_the_outputs_and_gradients_of_padded_rows_on_a_gpu(
    name: str, trained: bool, tmp_path: Any
) -> None:
    """In bfloat16 through torch's kernel: windows, grouped queries, weights in float32 under autocast and in bfloat16."""
    folder = checkpoint(CONFIGS[name], tmp_path, 0.05)
    batch = arrange_inputs(rows([(40, 60), (70, 10), (10, 1), (5, 200), (5, 200)])).to("cuda")
    wants = ALL if trained else frozenset({"logprobs_NT", "entropy_NT"})  # a frozen model that has no scalar heads
    found: list[dict[str, Tensor]] = []
    for packed in (True, False):
        module = build_module(spec(folder, *wants, packing=packed, dtype="bfloat16", trained=trained)).cuda()
        assert module.packs == packed
        with torch.autocast("cuda", torch.bfloat16):
            outputs = module(batch, wants)
        found.append({key: value.detach().float() for key, value in outputs.items()})
        if trained:
            sum(value.float().sum() for value in outputs.values()).backward()  # type: ignore[union-attr]
            found[-1] |= {key: p.grad.float() for key, p in module.named_parameters() if p.grad is not None}
    for key, value in found[1].items():
        error = float((found[0][key] - value).norm() / value.norm().clamp(min=1e-3))
        assert error < 0.05, f"{key}: {error}"
