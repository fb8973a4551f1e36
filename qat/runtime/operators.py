"""torch's matmuls that its documentation does not name: oneDNN's on CPUs, and that of int8 matrices."""

import functools

import torch
from torch import Tensor


@functools.cache
def has_onednn() -> bool:
    """Return whether this torch has oneDNN's product of fp32 matrices, and the operator that lays a weight out for
    it."""
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [rows, in] @ weight.T + bias, fp32 on CPUs, for a weight [out, in], laid out or not."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def laid_out(weight: Tensor, rows: int) -> Tensor:
    """Return a weight [out, in], fp32 on CPUs, in oneDNN's layout for inputs of ``rows`` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def onednn_int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return (x - 128) @ weight.T, fp32 [rows, out], on CPUs, for x uint8 [rows, in] and a weight int8 [out, in].

    Raises AttributeError or RuntimeError where the operator is missing.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)  # it ignores other strides
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a [rows, inner] @ b [inner, columns], both int8, as int32. On GPUs it takes more than 16 rows, and
    multiples of 8 columns."""
    return torch._int_mm(a, b)
