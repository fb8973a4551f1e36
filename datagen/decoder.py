"""One decoding step of a LLaMA-family model for all slots, with the model's own weights and no library overhead.

For a small model, the layers' forward passes through transformers cost more than the arithmetic. This is the same
computation (a test checks that the results are equal), over a static KV cache with a position per slot, in fewer and
larger products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm

from datagen import sampling
from datagen.attention import Attention
from datagen.cuda_graphs import CudaGraphs
from qat.quant.architecture import (
    architecture_of,
    decoder_layers,
    head_dim,
    input_embedding,
    linear_in,
    output_layer,
    rotation,
    windowed_layers,
)
from qat.quant.rotated import check_plain
from qat.runtime import operators
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Product = Callable[[Tensor], Tensor]


def check(config: PreTrainedConfig, max_length: int) -> None:
    """Raise UserError for a model without LLaMA-style layers, and if RoPE would change its frequencies within sequences
    of ``max_length``: cached keys keep the rotation of the shorter sequence."""
    if architecture_of(config).block is None:
        raise UserError(f"engine=torch supports only LLaMA-style layers, not {config.model_type}: give --engine vllm.")
    check_plain(config, "engine=torch")
    rope = config.rope_parameters
    unchanged = {
        "dynamic": config.max_position_embeddings,
        "longrope": rope.get("original_max_position_embeddings"),
    }
    longest = unchanged.get(rope["rope_type"], max_length)
    if max_length > longest:
        raise UserError(
            f"max_length={max_length}: the model's rope_type={rope['rope_type']!r} rotates all positions differently "
            f"in sequences of more than {longest} tokens, but cached keys keep their first rotation: give "
            f"--max_length {longest} or less, or --engine vllm."
        )


class Chosen(NamedTuple):
    """The result of a step.

    Attributes:
        tokens, surprisal: [slots], int64 and fp64, on the CPU: each slot's next token and its -log probability in nats
        logits: fp32 [slots, vocabulary], on the device; the next step may overwrite them
    """

    tokens: Tensor
    surprisal: Tensor
    logits: Tensor


class Decoder:
    """Runs the model on one token per slot; raises UserError for a model that ``check`` rejects.

    A model that transformers has distributed over the ranks of the default process group is run by all of them
    together: every rank gets the same logits and tokens.

    Args:
        truncation: the part of the distribution that tokens are drawn from
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        max_length: int,
        truncation: sampling.Truncation = sampling.Truncation(),  # noqa: B008  # frozen
    ):
        config = model.config
        self.truncation = truncation
        check(config, max_length)
        block, layers = architecture_of(config).block, decoder_layers(model)
        assert block is not None
        self.device, self.slots, self.max_length = model.device, slots, max_length
        self.eps = config.rms_norm_eps
        self.parallel = hasattr(linear_in(layers[0], block.out).weight, "to_local")  # a DTensor
        self.embedding = _weight(input_embedding(model))
        size = head_dim(config)
        groups = config.num_attention_heads // config.num_key_value_heads
        self.layers = []
        for layer, is_windowed in zip(layers, windowed_layers(config), strict=True):
            qkv = [linear_in(layer, name) for name in (block.queries, block.keys, block.values)]
            kv_heads = len(_weight(qkv[1])) // size
            window = config.sliding_window if is_windowed else None
            self.layers.append(
                _Layer(
                    attention_norm=_weight(layer.get_submodule(block.attention_norm)),
                    qkv=self._product(*qkv),
                    head_norms=[_weight(layer.get_submodule(name)) for name in block.head_norms],
                    attention=Attention(slots, kv_heads, groups, max_length, size, window, self.embedding[:0]),
                    out=self._summed_product(linear_in(layer, block.out)),
                    mlp_norm=_weight(layer.get_submodule(block.mlp_norm)),
                    gate_up=self._product(linear_in(layer, block.gate), linear_in(layer, block.up)),
                    activation=layer.get_submodule(block.activation),
                    down=self._summed_product(linear_in(layer, block.down)),
                )
            )
        self.norm = _weight(model.get_submodule(architecture_of(config).norm))
        self.head = self._product(output_layer(model))
        self.head_is_split = len(_weight(output_layer(model))) < config.vocab_size
        self.embedding_is_split = len(self.embedding) < config.vocab_size  # if the head shares its weight
        with torch.inference_mode():
            positions = torch.arange(max_length, device=self.device)[None]
            cos, sin = rotation(model)(self.embedding[:1, None], positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.graphs = self._new_graphs()

    @torch.inference_mode()
    def step(
        self, tokens: Tensor, position: Tensor, greedy: Tensor | None = None, draw: Tensor | None = None
    ) -> Chosen:
        """Choose the tokens that follow ``tokens`` [slots] at their positions [slots], both int64.

        All are on the CPU: four numbers per slot go to the device, and two come back.

        Args:
            greedy, draw: [slots]; see ``sampling.choose``. Without them, the most likely tokens are taken
        """
        greedy = torch.ones_like(tokens) if greedy is None else greedy
        draw = torch.zeros(len(tokens), dtype=torch.float64) if draw is None else draw
        inputs = torch.stack([tokens.double(), position.double(), greedy.double(), draw])
        columns = int(position.max()) + 1
        if self.graphs is None:
            chosen, logits = self._step(inputs.to(self.device), columns)
        else:
            finds_columns = all(layer.attention.triton for layer in self.layers)
            chosen, logits = self.graphs(self._step, inputs, self.max_length if finds_columns else columns)
        if self.parallel:
            dist.broadcast(chosen, src=0)
        chosen = chosen.cpu()
        return Chosen(chosen[0].long(), chosen[1], logits)

    def _step(self, inputs: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Compute ``step`` from its arguments, stacked to fp64 [4, slots] on the device: return tokens and surprisal
        [2, slots], and the logits."""
        tokens, position = inputs[:2].long()
        logits = self.logits(tokens, position, columns)
        chosen, surprisal = sampling.choose(logits, inputs[2] > 0, inputs[3], self.truncation)
        return torch.stack([chosen.double(), surprisal]), logits

    def logits(self, tokens: Tensor, position: Tensor, columns: int) -> Tensor:
        """Compute fp32 logits [slots, vocabulary] of tokens at their positions, both int64 [slots] on the device;
        torch's attention reads ``columns`` columns of the cache."""
        cos, sin = self.cos[position], self.sin[position]
        x = self._embedded(tokens)
        for layer in self.layers:
            qkv = layer.qkv(self._normed(x, layer.attention_norm))
            if layer.head_norms:
                qkv = self._with_normed_heads(qkv, layer)
            x = x + layer.out(layer.attention(qkv, cos, sin, position, columns))
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, -1)
            x = x + layer.down(layer.activation(gate) * up)
        logits = self.head(self._normed(x, self.norm))
        if self.head_is_split:
            parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, logits)
            logits = torch.cat(parts, -1)
        return logits.float()

    def keep(self, slots: Tensor) -> None:
        """Keep only the given slots [kept] and drop all others."""
        slots = slots.to(self.device)
        for layer in self.layers:
            layer.attention.keep(slots)
        self.slots = len(slots)
        self.graphs = self._new_graphs()

    def _new_graphs(self) -> CudaGraphs | None:
        """Return graphs for a GPU that holds the complete model, else None; they depend on the cache's address, and
        must be recreated if it moves."""
        if self.device.type != "cuda" or self.parallel:
            return None
        return CudaGraphs(self.slots, self.max_length, self.device)

    def _embedded(self, tokens: Tensor) -> Tensor:
        if not self.embedding_is_split:
            return embedding(tokens, self.embedding)
        here = tokens - dist.get_rank() * len(self.embedding)
        is_here = (here >= 0) & (here < len(self.embedding))
        x = embedding(torch.where(is_here, here, 0), self.embedding) * is_here[:, None]
        dist.all_reduce(x)
        return x

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.eps)

    def _with_normed_heads(self, qkv: Tensor, layer: _Layer) -> Tensor:
        """Normalize every head of Q and K, as Qwen3 does."""
        query_norm, key_norm = layer.head_norms
        kv_heads, head_dim = layer.attention.values.shape[1], len(key_norm)
        heads = qkv.view(len(qkv), -1, head_dim)
        query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        normed = self._normed(query, query_norm), self._normed(key, key_norm), value
        return torch.cat(normed, 1).view_as(qkv)

    def _product(self, *modules: nn.Linear) -> Product:
        """Return a function that maps x to the modules' outputs side by side, by one product."""
        weights = [_local(module.weight) for module in modules]
        biases = [_local(module.bias) for module in modules if module.bias is not None]
        bias = torch.cat(biases) if biases else None
        if len(weights) == 1:
            return self._multiply(weights[0], bias)
        weight = torch.cat(weights)
        if weight.device.type != "cpu":  # the modules' weights are views of the joint one: nothing is stored twice
            for module, part in zip(modules, weight.split([len(w) for w in weights]), strict=True):
                module.weight = nn.Parameter(part, requires_grad=False)
        return self._multiply(weight, bias)

    def _summed_product(self, module: nn.Linear) -> Product:
        """Return a function that maps x, of which each rank may hold some of the columns, to the module's output."""
        if not self.parallel:
            return self._product(module)
        bias = _local(module.bias) if module.bias is not None and dist.get_rank() == 0 else None
        product = self._multiply(_local(module.weight), bias)

        def summed(x: Tensor) -> Tensor:
            y = product(x)
            dist.all_reduce(y)
            return y

        return summed

    def _multiply(self, weight: Tensor, bias: Tensor | None) -> Product:
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and operators.has_onednn():
            # oneDNN, with the weight laid out for it in advance. The choice must not depend on a measurement: ranks
            # that chose differently would write different bytes.
            packed = operators.laid_out(weight, self.slots)
            return lambda x: operators.onednn_linear(x, packed, bias)
        return lambda x: linear(x, weight, bias)


@dataclass(frozen=True)
class _Layer:
    """A decoder block's products, norms and cache."""

    attention_norm: Tensor
    qkv: Product
    head_norms: list[Tensor]
    attention: Attention
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    activation: Callable[[Tensor], Tensor]
    down: Product


def _weight(module: nn.Module) -> Tensor:
    """Return this rank's part of a module's weight."""
    return _local(module.get_parameter("weight"))


def _local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter."""
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
