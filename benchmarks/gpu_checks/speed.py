"""What quantization costs: one decoder layer, and the loss."""

import copy
from contextlib import nullcontext
from unittest.mock import patch

import released
import step
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_checks.bench import Bench, device_seconds, peak_bytes, profiled, seconds
from qat.quant.config import QuantConfig
from qat.quant.linear import QuantLinear
from qat.quant.number_format import Format, quantize
from qat.quant.prepare import prepare
from qat.train.distill import CHUNK_TOKENS, DistillationHead, TeacherTargets


def layer(bench: Bench) -> tuple[dict, dict]:
    """One decoder layer, forward and backward: full precision, by integers, by floats, and with a rotated cache;
    with and without checkpointing."""
    s = bench.shapes
    plain = bench.model(1).train()
    ways = {
        "full": step.unquantized(plain),
        "integers": prepare(step.shared_copy(plain), QuantConfig(4, 8, 4)),
        "rotated": prepare(step.shared_copy(plain), QuantConfig(4, 8, 4, kv_rotation="hadamard")),
        "groups of 64": prepare(
            step.shared_copy(plain), QuantConfig(4, 8, 4, w_group_size=64 if s.hidden > 128 else 16)
        ),
        "floats": prepare(step.shared_copy(plain), QuantConfig(4, 8, 4)),
    }
    figures: dict = {"ms": {}, "over_full": {}}
    for tokens in (s.tokens, 2 * s.tokens):
        for checkpointing in (False, True):
            case = f"{tokens}{', checkpointing' if checkpointing else ''}"
            ms = {}
            for name, model in ways.items():
                with patch.object(QuantLinear, "multiplies_codes", False) if name == "floats" else nullcontext():
                    ms[name] = 1e3 * device_seconds(_pass(model, tokens, checkpointing))
            figures["ms"][case] = ms
            figures["over_full"][case] = {name: value / ms["full"] for name, value in ms.items() if name != "full"}
    x = torch.randn(64, 64, device=bench.device, dtype=bench.dtype)
    calls = {"quantize": lambda: quantize(x, Format(4)), "eager op": lambda: x + 1}
    figures["host_us_of_a_call"] = {name: 1e6 * device_seconds(call, 200) for name, call in calls.items()}
    figures["wall_ms"] = {name: 1e3 * seconds(_pass(ways[name], s.tokens, False)) for name in ("full", "integers")}
    figures["profile"] = {name: profiled(_pass(ways[name], s.tokens, False), 16) for name in ("full", "integers")}
    return figures, {}


def loss(bench: Bench) -> tuple[dict, dict]:
    """The distillation loss with its gradients beside the naive one: time, memory, and both against fp64."""
    s = bench.shapes
    torch.manual_seed(0)

    def tensor(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, device=bench.device) * s.hidden**-0.5).to(bench.dtype)

    hidden, teacher_hidden = (tensor(s.tokens, s.hidden) * 2 for _ in range(2))
    weight, teacher_weight = (tensor(s.vocabulary, s.hidden) * 4 for _ in range(2))
    hidden, weight = hidden.requires_grad_(), nn.Parameter(weight)
    fused = DistillationHead.convert(nn.Linear(1, 1, bias=False))
    fused.weight = weight
    targets = TeacherTargets(teacher_hidden, teacher_weight)

    def naive() -> Tensor:
        return released.loss(hidden @ weight.t(), teacher_hidden @ teacher_weight.t())

    def ours() -> Tensor:
        return fused(hidden, targets)[0]

    found, took, peaks = {}, {}, {}
    ways = {"naive": (naive, CHUNK_TOKENS[bench.device.type]), **{f"{n}": (ours, n) for n in (1024, 512, 256, 128)}}
    for name, (compute, chunk) in ways.items():
        hidden.grad = weight.grad = None
        with patch.dict(CHUNK_TOKENS, {bench.device.type: chunk}):
            value = compute()
            value.backward()
            found[name] = (value.item(), hidden.grad.double(), weight.grad.double())
            hidden.grad = weight.grad = None
            run = lambda: compute().backward()  # noqa: B023, E731
            peaks[name] = peak_bytes(run)
            took[name] = seconds(run)
    exact = _exact(hidden, weight, teacher_hidden, teacher_weight)
    off = {
        f"{name}_{what}": ((a - b).norm() / b.norm()).item() if isinstance(a, Tensor) else abs(a - b) / b
        for name, parts in found.items()
        for what, a, b in zip(("loss", "hidden", "weight"), parts, exact, strict=True)
    }
    default = f"{CHUNK_TOKENS[bench.device.type]}"
    figures = {
        "time_vs_naive": took[default] / took["naive"],
        "peak_vs_naive": peaks[default] / max(peaks["naive"], 1),
        "ms_by_chunk": {name: 1e3 * value for name, value in took.items()},
        "peak_MB_by_chunk": {name: value / 1e6 for name, value in peaks.items()},
        "against_fp64": off,
    }
    return figures, {"right": max(value for name, value in off.items() if not name.startswith("naive")) < 1e-2}


def _exact(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> tuple:
    h, w = (part.detach().double().requires_grad_() for part in (hidden, weight))
    with torch.no_grad():
        teacher = (teacher_hidden.double() @ teacher_weight.double().t()).softmax(-1)
    value = -(teacher * (h @ w.t()).log_softmax(-1)).sum(-1).mean()
    value.backward()
    return value.item(), h.grad, w.grad


def _pass(model: PreTrainedModel, tokens: int, checkpointing: bool):
    """Forward and backward of the model's one layer."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    block = copy.copy(model.model.layers[0])
    block.gradient_checkpointing = False
    x = torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    rotary = model.model.rotary_emb(x, torch.arange(tokens, device=x.device)[None])
    grad = torch.randn_like(x)

    def forward(x: Tensor) -> Tensor:
        return block(x, position_embeddings=rotary)

    def run() -> None:
        y = torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False) if checkpointing else forward(x)
        y.backward(grad)
        x.grad = None
        for parameter in block.parameters():
            parameter.grad = None

    return run
