"""vLLM's own Triton kernels, under Triton's interpreter, write the bytes of our KV formats: ``pytest -m vllm``.

Not of fp8: Triton's interpreter rounds to it wrongly. The kernels' files import GPU parts of vLLM that this needs none
of; stand-ins take their places, and they run in a process of their own (see test_served.py for its environment).
"""

from pathlib import Path

import pytest
import torch
from commands import run_in

from qat.quant.kv_formats import KV_FORMATS

pytestmark = pytest.mark.vllm

SCRIPT = """
import importlib.util, os, sys, types
from pathlib import Path
from unittest.mock import MagicMock

os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl

folder = Path(importlib.util.find_spec("vllm").origin).parent
cpu = MagicMock(fp8_dtype=lambda: torch.float8_e4m3fn, is_cuda=lambda: False, is_rocm=lambda: False)
cpu.is_xpu = cpu.is_rocm
for name, held in {
    "vllm": {}, "vllm.platforms": {"current_platform": cpu}, "vllm.triton_utils": {"tl": tl, "triton": triton},
    "vllm.utils.math_utils": {"largest_power_of_2_divisor": lambda n: n & -n},
    "vllm.v1.attention.ops.triton_attention_helpers": {}, "vllm.v1.attention.ops.triton_unified_attention": {},
    "vllm.model_executor.layers.quantization.utils.quant_utils": {"get_fp8_min_max": lambda: (-448.0, 448.0)},
    "vllm.utils.torch_utils": {}, "vllm.v1.kv_cache_interface": {},
}.items():
    sys.modules[name] = MagicMock(**held)

def loaded(name):
    spec = importlib.util.spec_from_file_location(name, folder / "v1/attention/ops" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

int4, int8 = loaded("int4_per_token_head"), loaded("triton_reshape_and_cache_flash")
found = []
for bits, key, value in torch.load(sys.argv[1]):
    tokens, heads, size = key.shape
    dtype, width = (torch.uint8, size // 2) if bits == 4 else (torch.int8, size)
    caches = [torch.zeros(1, tokens, heads, width, dtype=dtype) for _ in range(2)]
    scales = [torch.zeros(1, tokens, heads) for _ in range(2)]
    slots = torch.arange(tokens)
    if bits == 4:
        int4.reshape_and_cache_int4(key, value, *caches, slots, k_scale_cache=scales[0], v_scale_cache=scales[1])
    else:
        int8.triton_reshape_and_cache_flash_per_token_head_quant(key, value, *caches, *scales, slots, None)
    found.append([(cache[0].view(torch.uint8), scale[0]) for cache, scale in zip(caches, scales)])
torch.save(found, sys.argv[2])
"""


def given() -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Keys and values [tokens, heads, head_dim] of many sizes and signs, and zeros."""
    generator, cases = torch.Generator().manual_seed(0), []
    for bits in (4, 8):
        for size in (64, 96, 128):
            for dtype in (torch.float32, torch.bfloat16):
                key, value = torch.randn(2, 12, 3, size, generator=generator)
                key[:, 0] = key[:, 0] ** 3
                key[:4] *= 100
                value[:, 1] = value[:, 1].abs() + 1
                value[:, 2] = torch.round(4 * value[:, 2]) / 4
                value[0] = 0
                cases.append((bits, key.to(dtype), value.to(dtype)))
    return cases


def test_codes_and_scales_are_those_of_vllms_kernels(vllm: Path, tmp_path):
    cases = given()
    torch.save(cases, tmp_path / "given.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    run_in(vllm, vllm / "python", tmp_path / "script.py", tmp_path / "given.pt", tmp_path / "found.pt")
    for (bits, *tensors), theirs in zip(cases, torch.load(tmp_path / "found.pt"), strict=True):
        form = KV_FORMATS[f"vllm_int{bits}"]
        for x, rotate, (codes, scale) in zip(tensors, (form.keys, form.values), theirs, strict=True):
            ours = form.encode(rotate(x.transpose(0, 1)[None]))[0].transpose(0, 1)
            stored = torch.cat([codes, scale[..., None].contiguous().view(torch.uint8)], -1)
            assert torch.equal(ours, stored), f"{form.type}, {x.shape[-1]} channels, {x.dtype}"
