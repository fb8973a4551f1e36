"""What an export will do differently from the student that was trained, in plain words."""

from qat.quant.config import QuantConfig
from qat.quant.number_format import FULL_PRECISION
from qat.store import compressed_tensors
from qat.store.compressed_tensors import PACKED


def differences(quant: QuantConfig, form: str) -> list[str]:
    """One sentence for everything that an engine which loads the format ``form`` does not do as trained.

    qat.load, our own loader, reads integer checkpoints exactly as trained; these sentences are about other engines.
    """
    integers = form in compressed_tensors.FORMATS
    return [*_activations(quant, form, integers), *_weights(quant, form, integers), *_cache(quant, form, integers)]


def _weights(quant: QuantConfig, form: str, integers: bool) -> list[str]:
    if form == "gguf":
        return ["Weights: codes are as trained; each scale is rounded to fp16, by at most 1 part in 2048."]
    if not integers:
        return []
    said = []
    bits = compressed_tensors.stored_bits(quant, form)
    if bits != quant.w_bits:
        said.append(
            f"Weights: the {quant.w_bits}-bit codes are declared as {bits}-bit ones, for which engines have kernels; "
            "values are the same."
        )
    if form == PACKED:
        said.append(
            "Weights: vLLM keeps these scales in the dtype that it computes in: exact with --dtype float32, rounded "
            "by up to 1 part in 256 with bfloat16, 1 in 2048 with float16."
        )
    return said


def _activations(quant: QuantConfig, form: str, integers: bool) -> list[str]:
    if quant.a_bits == FULL_PRECISION:
        return ["Activations: llama.cpp rounds them to 8 bits in blocks of 32."] if form == "gguf" else []
    trained = f"Activations: trained with {quant.a_bits} bits per token"
    if form == "gguf":
        return [f"{trained}; llama.cpp rounds them to 8 bits in blocks of 32, which is finer than a token."]
    if not integers:
        return [f"{trained}; here they stay in full precision."]
    said = []
    served = compressed_tensors.served_a_bits(quant, form)
    if served != quant.a_bits:
        said.append(f"{trained}; no engine has kernels for that, and they are rounded to {served}.")
    if quant.a_quantizer != "minmax":
        said.append(f"Activations: trained with {quant.a_quantizer}; engines round them to max/qmax per token.")
    said.append("Activations: transformers' own loader rounds them to max/127.5; trained was max/127.")
    return said


def _cache(quant: QuantConfig, form: str, integers: bool) -> list[str]:
    if quant.kv_bits == FULL_PRECISION:
        return []
    trained = (
        f"KV cache: trained with {quant.kv_bits} bits ({quant.kv_quantizer}, {quant.kv_site}, {quant.kv_granularity}, "
        f"rotation {quant.kv_rotation})"
    )
    if form == "gguf":
        return [f"{trained}; llama.cpp keeps fp16 unless told otherwise (its q4_0 and q8_0 have blocks of 32)."]
    if not integers:
        return [f"{trained}; here it stays in full precision."]
    near = {4: "int4_per_token_head (rotated, asymmetric)", 8: "int8_per_token_head"}.get(quant.kv_bits)
    hint = f", or, on GPUs, --kv-cache-dtype {near}, which is near but not equal to what was trained" if near else ""
    return [f"{trained}; the format has no words for it. vLLM keeps the dtype that it computes in{hint}."]
