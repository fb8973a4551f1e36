"""A model that runs as it is deployed: weights packed in memory, generation over the packed KV cache.

    model = qat.load("export/llama2-7b-484")
    tokenizer = AutoTokenizer.from_pretrained("export/llama2-7b-484")
    model.generate(**tokenizer("Hello", return_tensors="pt").to(model.device), max_new_tokens=20)

It computes what training simulated: the same codes, scales and roundings. Engines with kernels of their own are faster
(see docs/export.md); this one is exact, and needs nothing but torch and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.infer import simulated
from qat.quant import products
from qat.quant.architecture import attentions, output_layer
from qat.quant.config import CONFIG_FILE
from qat.quant.embedding import QuantEmbedding
from qat.quant.linear import QuantLinear
from qat.quant.number_format import Format, Quantized, dequantize
from qat.quant.packing import pack, unpack
from qat.quant.prepare import prepare, weight_holders
from qat.quant.products import block_dtype, matmul, matmul_blocks, matmul_codes
from qat.quant.tensor_scales import set_tensor_scales
from qat.runtime import machine
from qat.runtime.errors import UserError
from qat.store import models
from qat.store.model_folder import skeleton
from qat.store.sidecars import load_steps
from qat.store.student_folder import scales_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat.infer.integer_cache import IntegerCache


@dataclass(frozen=True)
class Memory:
    """The memory that a model takes, in bytes.

    Args:
        weights: all of them, packed ones with their scales
        cache_per_token: KV cache of one token, codes and scales
    """

    weights: int
    cache_per_token: int


def load(directory: str) -> PreTrainedModel:
    """Load the student or integer export at ``directory``, packed, on the GPU if there is one.

    ``generate`` caches integers, if the student's KV cache is quantized after RoPE. Weights are quantized and packed
    once, here, one at a time; the rest is in ``machine.inference_dtype()``. Raises UserError if the directory holds
    neither, or is damaged.
    """
    path = Path(directory)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}: give an integer export, or the final/ of a training run.")
    quant, trained_dtype, weights = simulated.read(path)
    dtype = machine.inference_dtype()
    model = prepare(skeleton(path), quant)
    set_tensor_scales(model, scales_of(path, path, quant))
    holders = weight_holders(model)
    rest: dict[str, Tensor] = {}
    for name, weight in weights:
        if isinstance(weight, Quantized):
            packed = _packed(weight, holders[name][0].weight_format)
            for layer in holders[name]:
                if isinstance(layer, QuantEmbedding):
                    PackedEmbedding.convert_packed(layer, packed, trained_dtype, dtype)
                else:
                    PackedLinear.convert_packed(layer, packed, trained_dtype)
        else:
            rest[name] = weight.to(dtype)
    model.load_state_dict(rest, strict=False, assign=True)
    if hasattr(output_layer(model), "weight"):  # a packed one is shared already
        model.tie_weights()
    models.renew_rope(model)
    load_steps(model, path)
    model.generation_config = models.load_generation_config(directory)
    # Fine-tuning leaves use_cache=False in the config, and some models set another cache: a deployed model has its own.
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.cache_implementation = None
    machine.place(model)
    for first, *others in holders.values():
        for other in others:
            other.packed = first.packed  # moving a model copies what two of its modules share
    products.speed_up(model)
    if any(hasattr(attention, "kv_quantizer") for attention in attentions(model).values()):
        model.__class__ = _caching_integers(type(model))
    return model.eval().requires_grad_(False)


def memory(model: PreTrainedModel) -> Memory:
    """Measure the memory of ``model``; its cache is the one that its ``generate`` uses."""
    from transformers.cache_utils import DynamicCache

    kept = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    cache = model.new_cache() if isinstance(model, _CachesIntegers) else DynamicCache()
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(tokens, past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[union-attr,misc]
    return Memory(sum(kept.values()), held // tokens.shape[1])


class PackedLinear(QuantLinear):
    """A QuantLinear that holds its weight as bytes: codes, two per byte up to 4 bits, and scales.

    Attributes:
        packed: uint8 [out, groups, bytes], see qat.quant.packing
        trained_dtype: the dtype in which the weight's values were rounded to their grid
    """

    packed: Tensor
    trained_dtype: torch.dtype

    @classmethod
    def convert_packed(cls, linear: QuantLinear, packed: Tensor, trained_dtype: torch.dtype) -> None:
        """Turn ``linear`` into a PackedLinear of ``packed`` [out, groups, bytes], in place; its own weight is
        dropped."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        del linear.weight
        linear.register_buffer("packed", packed, persistent=False)
        linear.trained_dtype = trained_dtype

    def integers(self) -> Quantized:
        """Return codes [out, in] and grid [out, groups]."""
        return _unpacked(self.packed, self.weight_format)

    def forward(self, x: Tensor) -> Tensor:
        x, shared = self.quantize_input(x)
        weight = self.integers()
        if shared is not None and self.multiplies_codes:
            y = matmul_codes(shared.quantized, weight, self.weight_format.code_range[1], x.dtype)
        elif shared is not None and self.multiplies_blocks:
            y = matmul_blocks(shared.values(block_dtype(x.dtype)), weight, x.dtype)
        else:
            values = dequantize(weight, self.trained_dtype).to(x.dtype)
            inputs = x if shared is None else shared.values(x.dtype)
            y = matmul(inputs.flatten(0, -2), values.t()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


class PackedEmbedding(QuantEmbedding):
    """A QuantEmbedding that holds its weight as bytes, those of the output layer where both are one weight.

    Attributes:
        packed: uint8 [vocabulary, groups, bytes], see qat.quant.packing
        trained_dtype: the dtype in which the weight's values were rounded to their grid
        values: an empty tensor of the dtype of the rows that are returned: casting the model casts it
    """

    packed: Tensor
    trained_dtype: torch.dtype
    values: Tensor

    @classmethod
    def convert_packed(
        cls, embedding: QuantEmbedding, packed: Tensor, trained_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        """Turn ``embedding`` into a PackedEmbedding of ``packed`` [vocabulary, groups, bytes] in place; its own weight
        is dropped."""
        embedding.__class__ = cls
        assert isinstance(embedding, cls)
        del embedding.weight
        embedding.register_buffer("packed", packed, persistent=False)
        embedding.register_buffer("values", torch.empty(0, dtype=dtype), persistent=False)
        embedding.trained_dtype = trained_dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = _unpacked(self.packed[ids], self.weight_format)
        return dequantize(rows, self.trained_dtype).to(self.values.dtype)


def _packed(weight: Quantized, form: Format) -> Tensor:
    """Pack a weight [out, in] into uint8 [out, groups, bytes]."""
    groups = weight.grid.scale.shape[-1]
    grouped = Quantized(weight.codes.unflatten(-1, (groups, -1)), weight.grid.map(lambda part: part.unsqueeze(-1)))
    return pack(grouped, form)


def _unpacked(packed: Tensor, form: Format) -> Quantized:
    """Return codes [..., in] and grid [..., groups] of weight rows uint8 [..., groups, bytes]."""
    codes, grid = unpack(packed, form)
    return Quantized(codes.flatten(-2), grid.map(lambda part: part.squeeze(-1)))


class _CachesIntegers:
    """Mixed into a model's class: ``generate`` uses an IntegerCache unless the caller chooses a cache."""

    def new_cache(self) -> IntegerCache:
        from qat.infer.integer_cache import IntegerCache

        return IntegerCache(self)  # type: ignore[arg-type]

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        settings = generation_config or self.generation_config  # type: ignore[attr-defined]
        uses_cache = kwargs.get("use_cache", settings.use_cache)
        if uses_cache is not False and (kwargs.get("cache_implementation") or settings.cache_implementation) is None:
            kwargs.setdefault("past_key_values", self.new_cache())
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]


def _caching_integers(model_class: type) -> type:
    return type(model_class.__name__, (_CachesIntegers, model_class), {})
