"""vLLM's ``int4_per_token_head``: rotated by a Hadamard matrix with seeded signs, on an asymmetric grid
(int4_per_token_head.py of vLLM 0.32).

Queries, keys and values are multiplied by the signs and by the matrix, unnormalised, and rounded to the model's dtype;
so is attention's output. The zero point takes the place of the scale's last four bits. This is the arithmetic of the
reference and of its kernels under Triton's interpreter; GPUs rotate in bf16, and divide less exactly (docs/method.md).
"""

from functools import cache

import torch
from torch import Tensor

from qat.quant.hadamard import largest_power_of_two
from qat.quant.kv_formats.butterflies import butterflies
from qat.quant.kv_formats.vllm import SMALLEST_SCALE, PerTokenHead, away
from qat.quant.quantizers.base import divided
from qat.runtime.errors import UserError

_SEED = 0x9E3779B9
_ZERO_POINT = 15
"""The bits of the stored scale that hold the zero point."""


class VllmInt4(PerTokenHead):
    type = "int4_per_token_head"
    bits = 4
    low, high = 0.0, 15.0
    clips = True
    served = "GPUs rotate in bf16, and divide less exactly"
    meaning = "vLLM's int4_per_token_head cache: rotated, 4 bits with a zero point, one scale per token and head"

    def check(self, head_dim: int) -> None:
        if head_dim % 2:
            raise UserError(
                f"kv_format=vllm_int4 packs two channels in a byte, and this model's heads have {head_dim}: give "
                "kv_format=int."
            )

    def queries(self, x: Tensor) -> Tensor:
        # Two rotations multiply by the piece; the engine divides the scores by it. Dividing here is exact.
        return self.keys(x) / largest_power_of_two(x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        signs = _signs(x.shape[-1], x.device)
        return butterflies(x.float() * signs, largest_power_of_two(x.shape[-1])).to(x.dtype)

    values = keys

    def outputs(self, x: Tensor) -> Tensor:
        piece = largest_power_of_two(x.shape[-1])
        return (butterflies(x.float(), piece) * _signs(x.shape[-1], x.device) / piece).to(x.dtype)

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scale = divided(most - least, 15).clamp(min=SMALLEST_SCALE)
        zero_point = away(-least / scale).clamp(0, 15)
        read = (scale.view(torch.int32) & ~_ZERO_POINT).view(torch.float32)
        return away(rows * (1 / scale) + zero_point), read, zero_point

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        scale, zero_point = grid
        return (codes - zero_point) * scale

    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        scale, zero_point = grid
        codes = codes.to(torch.uint8)
        stored = scale.contiguous().view(torch.int32) | zero_point.to(torch.int32)
        return torch.cat([codes[:, 0::2] | codes[:, 1::2] << 4, stored.view(torch.uint8)], -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        nibbles, stored = self.split(packed)
        codes = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2)
        return codes.float(), (stored & ~_ZERO_POINT).view(torch.float32), (stored & _ZERO_POINT).float()


@cache
@torch.inference_mode(False)  # it is cached: what evaluation builds must serve training too
def _signs(head_dim: int, device: torch.device) -> Tensor:
    """Return the signs of a head's channels, fp32 [head_dim]: those of a piece, again and again."""
    piece = largest_power_of_two(head_dim)
    drawn = torch.bernoulli(torch.full((piece,), 0.5), generator=torch.Generator().manual_seed(_SEED))
    return (2 * drawn - 1).repeat(head_dim // piece).to(device)
