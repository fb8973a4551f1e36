"""Hadamard matrices over sqrt(size), and the fast product with them.

A size is m * 2^k with the smallest m for which Paley's constructions (1933) give a matrix; Sylvester's doubling does
the rest. Where they give none (m would be above ``_LARGEST``), the matrix is block diagonal, with blocks of the
largest power of two that divides the size.

    Paley I    order q + 1,       q = 3 mod 4       q a power of an odd prime; the matrix is made of the quadratic
    Paley II   order 2 (q + 1),   q = 1 mod 4       characters of the differences of all elements of GF(q)
"""

from functools import cache, reduce
from itertools import product

import torch
from torch import Tensor

_LARGEST = 1024
"""The largest m: it is multiplied as a dense matrix."""

_FACTOR = 128
"""The largest power of two that is multiplied as a dense matrix; larger ones are Kronecker products."""


@cache
@torch.inference_mode(False)  # it is cached: a matrix built in evaluation must serve training too
def hadamard_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an orthogonal matrix [size, size] whose entries have one absolute value in each block; for a power of two
    Sylvester's, which is symmetric."""
    block = block_size(size)
    ones = reduce(torch.kron, (_factor(order) for order in _orders(block)), torch.ones(1, 1, dtype=torch.float64))
    matrix = torch.block_diag(*[ones / block**0.5] * (size // block))
    return matrix.to(device, dtype)


def transform(x: Tensor, block: int = 0) -> Tensor:
    """Return x [..., size] times ``hadamard_matrix``, by its Kronecker factors; differentiable.

    It is computed in fp32 at least, and rounded once, to x's dtype.

    Args:
        block: rotate consecutive blocks of this size, which divides x's; 0 for ``block_size``
    """
    block = block or block_size(x.shape[-1])
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, block)
    for order in _orders(block):
        # The factor acts on the first axis, which becomes the last: after all factors they are in order again.
        y = (y.view(len(y), order, -1).transpose(1, 2) @ hadamard_matrix(order, y.device, y.dtype)).flatten(1)
    return y.view(x.shape).to(x.dtype)


def block_size(size: int) -> int:
    """Return the size of the blocks that ``hadamard_matrix`` rotates: all of ``size`` where a matrix is known."""
    return size if _paley_order(size) else largest_power_of_two(size)


def largest_power_of_two(size: int) -> int:
    """Return the largest power of two that divides ``size``."""
    return size & -size


@cache
def _orders(block: int) -> tuple[int, ...]:
    """Return the orders of the Kronecker factors of a block's matrix."""
    order = _paley_order(block)
    orders, rest = ([] if order == 1 else [order]), block // order
    while rest > _FACTOR:
        orders.append(_FACTOR)
        rest //= _FACTOR
    return (*orders, rest) if rest > 1 or not orders else tuple(orders)


@cache
def _paley_order(size: int) -> int:
    """Return the m of a size m * 2^k; 1 for powers of two, 0 if there is none."""
    power = largest_power_of_two(size)
    if size == power:
        return 1
    candidates = (size // power * 2**k for k in range(2, power.bit_length()))
    return next((m for m in candidates if m <= _LARGEST and (_paley_field(m) is not None)), 0)


def _paley_field(order: int) -> tuple[int, int] | None:
    """Return p and n of the GF(p^n) from which Paley makes a matrix of ``order``; None if he makes none."""
    return _prime_power(order - 1, 3) or _prime_power(order // 2 - 1, 1)


def _prime_power(q: int, rest: int) -> tuple[int, int] | None:
    """Return p and n, at most 3, if q = p^n for a prime p and q = ``rest`` mod 4."""
    if q < 3 or q % 4 != rest:
        return None
    p = next(d for d in range(2, q + 1) if q % d == 0)
    return next(((p, n) for n in (1, 2, 3) if p**n == q), None)


def _factor(order: int) -> Tensor:
    """Return the matrix of +1 and -1, fp64 [order, order]: Sylvester's for a power of two, else Paley's."""
    if order == largest_power_of_two(order):
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while len(matrix) < order:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix
    field = _paley_field(order)
    assert field is not None
    characters = _characters(*field)
    size = len(characters) + 1
    core = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    core[1:, 1:] = characters
    core[0, 1:] = 1
    if size == order:
        core[1:, 0] = -1
        return core + torch.eye(size, dtype=torch.float64, device="cpu")
    core[1:, 0] = 1
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    ones = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    return torch.kron(core, pair) + torch.kron(torch.eye(size, dtype=torch.float64, device="cpu"), ones)


def _characters(p: int, n: int) -> Tensor:
    """Return the quadratic characters of the differences of GF(p^n)'s elements, fp64 [p^n, p^n]: 1 for a square, -1 for
    none, 0 for 0.

    Elements are polynomials of degree below n, at most 3, modulo an irreducible one x^n - r(x).
    """
    elements = list(product(range(p), repeat=n))  # coefficients, of x^0 first

    def has_root(r: tuple[int, ...]) -> bool:
        return any((x**n - sum(c * x**k for k, c in enumerate(r))) % p == 0 for x in range(p))

    r = next(r for r in elements if n == 1 or not has_root(r))

    def square(a: tuple[int, ...]) -> tuple[int, ...]:
        result = [0] * (2 * n - 1)
        for i, j in product(range(n), repeat=2):
            result[i + j] += a[i] * a[j]
        for k in range(2 * n - 2, n - 1, -1):
            for i in range(n):
                result[k - n + i] += result[k] * r[i]
        return tuple(c % p for c in result[:n])

    squares = {square(a) for a in elements}
    by_element = torch.tensor([1.0 if a in squares else -1.0 for a in elements], dtype=torch.float64, device="cpu")
    by_element[0] = 0
    digits = torch.tensor(elements, device="cpu")
    places = torch.tensor([p ** (n - 1 - i) for i in range(n)], device="cpu")
    return by_element[((digits[:, None] - digits[None]) % p * places).sum(-1)]
