"""Architectures: where the decoder layers of a transformers model are, and the roles of their modules.

No other file knows a layer's name. A new architecture is one description and one line in ``ARCHITECTURES``; a plug-in
adds it with ``ARCHITECTURES.add(model_type, Architecture(...))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from qat.runtime.errors import UserError
from qat.runtime.table import Table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Smoothed(NamedTuple):
    """A tensor whose channels can be scaled: the module that computes them, linearly in its output channels, and the
    Linear layers that read them. SmoothQuant divides the former and multiplies the latter."""

    producer: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A decoder layer that computes LLaMA's formula, by the names of its modules in it.

        x = x + out(attention(queries(y), keys(y), values(y))),  y = attention_norm(x)
        x = x + down(activation(gate(y)) * up(y)),               y = mlp_norm(x)

    Norms are RMSNorms with ``config.rms_norm_eps``; scores are divided by sqrt(head_dim); whole heads are rotated;
    the first x is the embedding as it is.

    Args:
        head_norms: norms of each query head and each key head, before the rotation; none if empty
    """

    attention_norm: str = "input_layernorm"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    head_norms: tuple[str, ...] = ()
    out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    activation: str = "mlp.act_fn"
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class LlamaCpp:
    """The properties of one of llama.cpp's architectures.

    Args:
        interleaves: whether it rotates neighbouring channels of a head, not the two halves
        divides_frequencies: whether it reads divisors of RoPE's frequencies, which llama3's scaled positions need
        has_attention_bias: whether it reads biases of queries, keys and values
    """

    interleaves: bool = False
    divides_frequencies: bool = False
    has_attention_bias: bool = True


LLAMA_CPP = {
    "llama": LlamaCpp(interleaves=True, divides_frequencies=True),
    "qwen3": LlamaCpp(has_attention_bias=False),
}
"""By llama.cpp's names; those not listed have the defaults."""


@dataclass(frozen=True)
class Architecture:
    """A causal LM of transformers that attends through its attention interface, and whose logits are the product of
    ``norm``'s output with ``head``, neither scaled nor capped.

    Args:
        shared_inputs: the Linear layers that are quantized, by their names in a decoder layer, in the order of the
            forward pass; those that read the same tensor together
        smoothed: the tensors that SmoothQuant can scale, in the order of the forward pass
        key_values: the Linear layers that compute keys and values alone; kv_site=pre_rope rounds their outputs
        block: if the layers compute LLaMA's formula: its modules, for the decoder that computes it itself
        gguf: llama.cpp's name of the architecture, which computes ``block`` too; empty if it is not mapped
        sliding_window: which layers attend to the last ``config.sliding_window`` tokens alone: none, all of them if the
            config has one, or those that its ``layer_types`` name
        layers, attention: the list of decoder layers, and in each the module that attends
        embedding, rotation, norm, head: modules outside the layers; head is a Linear, rotation is made from a config
    """

    shared_inputs: tuple[tuple[str, ...], ...]
    smoothed: tuple[Smoothed, ...] = ()
    key_values: tuple[str, ...] = ()
    block: Block | None = None
    gguf: str = ""
    sliding_window: Literal["none", "all", "layer_types"] = "none"
    layers: str = "model.layers"
    attention: str = "self_attn"
    embedding: str = "model.embed_tokens"
    rotation: str = "model.rotary_emb"
    norm: str = "model.norm"
    head: str = "lm_head"

    def prefix(self, number: int) -> str:
        """Return the prefix of the names of decoder layer ``number``'s weights."""
        return f"{self.layers}.{number}."

    @property
    def interleaves(self) -> bool:
        """Return whether llama.cpp rotates neighbouring channels of a head, where transformers rotates its two halves,
        so that a GGUF file has the channels of queries and keys in another order."""
        return self.llama_cpp.interleaves and self.block is not None

    @property
    def llama_cpp(self) -> LlamaCpp:
        """Return the properties of llama.cpp's architecture."""
        return LLAMA_CPP.get(self.gguf, LlamaCpp())

    def names(self, number: int, layers: int, name: str) -> tuple[str, str]:
        """Return the full names of module ``name`` in decoder layer ``number`` of ``layers``: counted from 0, and from
        -1 backwards."""
        return self.prefix(number) + name, self.prefix(number - layers) + name

    def in_full(self, name: str) -> str:
        """Return the model's name for the weight that its base model, when saved alone, calls ``name``."""
        base, _, layers = self.layers.rpartition(".")
        inside = (layers, *(place.removeprefix(f"{base}.") for place in (self.embedding, self.norm)))
        return f"{base}.{name}" if name.startswith(tuple(f"{place}." for place in inside)) else name


def llama_like(block: Block, **overrides: Any) -> Architecture:
    """Return an architecture whose layers are ``block``, with LLaMA's names elsewhere, but for the given fields."""
    inputs = block.queries, block.keys, block.values
    return Architecture(
        shared_inputs=(inputs, (block.out,), (block.gate, block.up), (block.down,)),
        smoothed=(
            Smoothed(block.attention_norm, inputs),
            Smoothed(block.values, (block.out,)),
            Smoothed(block.mlp_norm, (block.gate, block.up)),
            Smoothed(block.up, (block.down,)),
        ),
        key_values=(block.keys, block.values),
        block=block,
        **overrides,
    )


ARCHITECTURES: Table[Architecture] = Table(
    "architecture",
    llama=llama_like(Block(), gguf="llama"),
    mistral=llama_like(Block(), gguf="llama", sliding_window="all"),
    qwen2=llama_like(Block(), gguf="qwen2", sliding_window="layer_types"),
    qwen3=llama_like(
        Block(head_norms=("self_attn.q_norm", "self_attn.k_norm")), gguf="qwen3", sliding_window="layer_types"
    ),
)
"""Architectures by transformers' ``model_type``."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the description of a config's model; raise UserError if there is none."""
    return ARCHITECTURES[config.model_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model, in order."""
    layers = model.get_submodule(architecture_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def attentions(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the attention module of each decoder layer, by its name."""
    architecture = architecture_of(model.config)
    names = [architecture.prefix(number) + architecture.attention for number in range(len(decoder_layers(model)))]
    return {name: model.get_submodule(name) for name in names}


def input_embedding(model: PreTrainedModel) -> nn.Module:
    """Return the module that turns token ids into the first decoder layer's input."""
    return model.get_submodule(architecture_of(model.config).embedding)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that turns final hidden states into logits."""
    head = model.get_submodule(architecture_of(model.config).head)
    assert isinstance(head, nn.Linear)
    return head


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the embedding and the output layer of a model have one weight."""
    return input_embedding(model).weight is output_layer(model).weight


def rotation(model: PreTrainedModel) -> nn.Module:
    """Return the module that holds the RoPE frequencies, and computes each position's cosines and sines."""
    return model.get_submodule(architecture_of(model.config).rotation)


def new_rotation(model: PreTrainedModel) -> nn.Module:
    """Recreate ``rotation`` from the model's config, in fp32 on the CPU."""
    return type(rotation(model))(model.config)


def rope_types() -> tuple[str, ...]:
    """Return the kinds of RoPE that transformers computes, by their names in a config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return "default", *ROPE_INIT_FUNCTIONS


def scaled_frequencies(config: PretrainedConfig) -> Tensor:
    """Return RoPE's frequencies, fp32 [head_dim / 2], of a config whose rope_type is not "default"."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)[0]


def quantizable_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the layers in the decoder of a model that ``prepare`` quantizes, by name."""
    architecture = architecture_of(model.config)
    names = [
        architecture.prefix(number) + name
        for number in range(len(decoder_layers(model)))
        for names in architecture.shared_inputs
        for name in names
    ]
    return {name: linear_in(model, name) for name in names}


def kept_linears(model: PreTrainedModel) -> list[str]:
    """Return the names of the Linear layers outside the decoder: the output layer, which stays in full precision unless
    an override names it."""
    quantizable = quantizable_linears(model)
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in quantizable]


def linear_in(module: nn.Module, name: str) -> nn.Linear:
    """Return the Linear layer ``name`` of a module; raise UserError if there is none: the description is wrong."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise UserError(
            f"The architecture's description names {name!r} as a Linear layer, and the model has "
            f"{'no such module' if found is None else type(found).__name__}: correct the description."
        )
    return found


def head_dim(config: PretrainedConfig) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def windowed_layers(config: PretrainedConfig) -> list[bool]:
    """Return, for each decoder layer, whether it attends only to the last ``config.sliding_window`` tokens."""
    kind = architecture_of(config).sliding_window
    if kind == "layer_types":
        return [layer_type == "sliding_attention" for layer_type in config.layer_types]
    return [kind == "all" and config.sliding_window is not None] * config.num_hidden_layers


def check_supported(model: PreTrainedModel) -> None:
    """Raise UserError unless the model's architecture is described, and its weights are not quantized yet."""
    architecture_of(model.config)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError("The model is quantized already: give the full-precision checkpoint.")
