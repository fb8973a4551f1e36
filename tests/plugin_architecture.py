"""An architecture as somebody else would add it, OLMo 2: ``--plugin plugin_architecture``."""

from qat.quant.architecture import ARCHITECTURES, Architecture, Smoothed

ARCHITECTURES.add(
    "olmo2",
    Architecture(
        shared_inputs=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
        smoothed=(Smoothed("self_attn.v_proj", ("self_attn.o_proj",)), Smoothed("mlp.up_proj", ("mlp.down_proj",))),
        key_values=("self_attn.k_proj", "self_attn.v_proj"),
    ),
)
