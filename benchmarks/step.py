"""A whole distillation step (teacher, student forward and backward, AdamW), and the bytes that a layer keeps.

python benchmarks/step.py

"Full precision" is our step with nothing quantized: the same loss, the same matrix products. "Plain PyTorch" is full
precision with torch.mm and a loss over whole logits. The released design is described in released.py. On CPU the model
has the shapes of SmolLM2-135M and computes in fp32; on a GPU it is a stack of LLaMA-7B layers in bf16. Weights are
random.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import released
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from launch import cli
from qat.quant import products
from qat.quant.architecture import quantizable_linears
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.linear import QuantLinear
from qat.quant.number_format import FULL_PRECISION, Format
from qat.quant.prepare import prepare
from qat.train.distill import Distiller, TeacherTargets

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=8,
    num_attention_heads=32, num_key_value_heads=32,
)  # fmt: skip


@dataclass(frozen=True)
class StepBenchmark:
    """What is measured.

    Args:
        tokens: length of the sequence; 0 for 256 on a CPU and 1024 on a GPU, where fewer would measure launches
        repeats: runs of each, of which the median counts
        json: file for the figures
    """

    tokens: int = 0
    repeats: int = 5
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, StepBenchmark)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = config.tokens or (1024 if device.type == "cuda" else 256)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    teacher = make(LLAMA_7B if device.type == "cuda" else SMOLLM2, device, dtype).requires_grad_(False)
    ids = torch.randint(teacher.config.vocab_size, (1, tokens), device=device)
    quant = QuantConfig(4, 8, 4)
    print(f"{common.machine()}; {tokens} tokens, {dtype}")

    plain_teacher = shared_copy(teacher)
    master = copy.deepcopy(teacher).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    old = released.prepare(shared_copy(master))
    old.gradient_checkpointing_enable({"use_reentrant": False})
    students = {"full precision": unquantized(master), "QAT": prepare(shared_copy(master), quant)}
    products.speed_up(teacher)
    steps: dict[str, Callable[[], object]] = {
        name: lambda distiller=distiller: step(optimizer, lambda: distiller(ids, targets(teacher, ids))[0])
        for name, distiller in {name: Distiller(student) for name, student in students.items()}.items()
    }
    steps["plain PyTorch"] = lambda: step(optimizer, lambda: released_loss(master, plain_teacher, ids))
    steps["released design"] = lambda: step(optimizer, lambda: released_loss(old, plain_teacher, ids))
    seconds = common.median_seconds(steps, config.repeats)
    for name, value in seconds.items():
        print(f"{name:16} {value:8.3f} s/step  {tokens / value:8.1f} tokens/s")

    saved = saved_bytes(LLAMA_7B, 1024, device, dtype)
    for name, (linears, layer) in saved.items():
        print(
            f"{name:16} {linears / 2**20:8.1f} MiB saved by the linear layers, {layer / 2**20:8.1f} by the whole layer"
        )
    full, ours, theirs = saved.values()
    figures = {
        "qat_vs_full_precision": seconds["QAT"] / seconds["full precision"],
        "qat_vs_plain_pytorch": seconds["QAT"] / seconds["plain PyTorch"],
        "qat_vs_released_design": seconds["QAT"] / seconds["released design"],
        "linear_saved_bytes_vs_full_precision": ours[0] / full[0],
        "layer_saved_bytes_vs_full_precision": ours[1] / full[1],
        "layer_saved_bytes_vs_released_design": ours[1] / theirs[1],
    }
    common.write(config.json, figures)


def make(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own around the same Parameters: one optimizer serves them all."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def unquantized(master: PreTrainedModel) -> PreTrainedModel:
    """Full precision with everything that is ours but the quantization: what isolates its cost."""
    model, full = shared_copy(master), Format(FULL_PRECISION)
    for linear in quantizable_linears(model).values():
        QuantLinear.convert(linear, full, full, None)
    return model


def targets(teacher: PreTrainedModel, ids: Tensor) -> TeacherTargets:
    with torch.no_grad():
        return TeacherTargets(predicting(teacher, ids), teacher.lm_head.weight)


def released_loss(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        expected = teacher(ids, use_cache=False).logits
    return released.loss(student(ids, use_cache=False).logits, expected)


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def saved_bytes(
    config: LlamaConfig, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Bytes that the linear layers, and all of one decoder layer, keep for backward, Parameters apart."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    plain = make(config, device, dtype).train()
    x = torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    rotary = plain.model.rotary_emb(x, torch.arange(tokens, device=device)[None])
    models = {
        "full precision": shared_copy(plain),
        "QAT": prepare(shared_copy(plain), QuantConfig(4, 8, 4)),
        "released design": released.prepare(shared_copy(plain)),
    }
    return {
        name: _saved_by(model.model.layers[0], lambda layer: layer(x, position_embeddings=rotary))
        for name, model in models.items()
    }


def _saved_by(layer: nn.Module, forward: Callable[[nn.Module], object]) -> tuple[int, int]:
    """Each memory counts once, however many views of it are saved."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}
    of_linears: set[int] = set()
    depth = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            if depth:
                of_linears.add(storage.data_ptr())
            alive.append(tensor)  # or its memory might be another tensor's before the count is over
        return tensor

    def enter(*_) -> None:
        nonlocal depth
        depth += 1

    def leave(*_) -> None:
        nonlocal depth
        depth -= 1

    alive: list[Tensor] = []
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(layer)
    return sum(storages[pointer] for pointer in of_linears), sum(storages.values())


if __name__ == "__main__":
    cli.run(main)
