"""Folds rotations into the weights of a model folder, one tensor at a time; see qat.quant.rotated.

Activations are rows: x becomes x R1 in the residual stream, v R2 in each head, h H in front of ``down`` (R4). A norm's
weight g moves into the layers that read it, since diag(g) does not commute with R1. So, for weights [out, in]:

    embedding           E R1
    readers of a norm   W diag(g) R1              and the norm's weight becomes 1
    values              R2^T of each head's rows, beside that; their bias alike
    attention's output  R1^T W R2                 R2 on the columns of each query head
    down                R1^T W H
    output layer        W diag(g) R1              tied: the map R1^T diag(g) R1 in front of the rotated embedding

Query and key layers keep their outputs, and so do RoPE, head norms, and attention: the function is the same. It is
computed in fp64 and rounded once, to the dtype of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qat.quant.architecture import architecture_of, head_dim
from qat.quant.hadamard import hadamard_matrix, transform
from qat.quant.rotated import RECORD, Rotation, head_map_weight, llama_block, rotation_of
from qat.runtime import progress
from qat.runtime.errors import UserError
from qat.runtime.files import appearing_folder, read_json, write_atomically, writing
from qat.runtime.machine import device
from qat.store import weight_files
from qat.store.model_folder import BASE_MODEL, ModelFolder, head_weight, write_companions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ORIGIN = "rotation.json"
"""Name of the file that records what a rotated model was made from, and how. What is made from it keeps a copy."""

Fold = Callable[[Tensor], Tensor]
"""Maps a tensor of the model to that of the rotated model, in the same dtype."""

Norms = Mapping[str, Tensor]
"""Weights of the norms that are folded, by their names: those of ``norms_of``."""


@dataclass(frozen=True)
class Matrices:
    """Orthogonal matrices.

    Args:
        residual: R1, [hidden, hidden]
        values: R2 of each decoder layer, [layers, head_dim, head_dim]
    """

    residual: Tensor
    values: Tensor

    def to(self, where: torch.device | torch.dtype) -> Matrices:
        return Matrices(self.residual.to(where), self.values.to(where))


def _hadamard(size: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1
    return signs.double() * hadamard_matrix(size, torch.device("cpu"), torch.float64)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix uniformly from the orthogonal ones (Mezzadri 2007, arXiv math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


class MatrixKind(NamedTuple):
    """A kind of orthogonal matrices: half a sentence for ``--help``, and a function that draws one of a size."""

    meaning: str
    draw: Callable[[int, torch.Generator], Tensor]


KINDS: Mapping[str, MatrixKind] = {
    "hadamard": MatrixKind("a Hadamard matrix with random signs", _hadamard),
    "random": MatrixKind("a random orthogonal matrix", _orthogonal),
}


def draw(config: PreTrainedConfig, kind: str, seed: int) -> Matrices:
    """Return matrices for the model of ``config``, of one of KINDS, in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = KINDS[kind].draw
    values = [drawn(head_dim(config), generator) for _ in range(config.num_hidden_layers)]
    return Matrices(drawn(config.hidden_size, generator), torch.stack(values))


def norms_of(config: PreTrainedConfig) -> set[str]:
    """Return the names of the weights of the norms that are folded."""
    architecture, block = architecture_of(config), llama_block(config)
    prefixes = [architecture.prefix(number) for number in range(config.num_hidden_layers)]
    inner = {f"{prefix}{norm}.weight" for prefix in prefixes for norm in (block.attention_norm, block.mlp_norm)}
    return inner | {f"{architecture.norm}.weight"}


def folds(config: PreTrainedConfig, rotation: Rotation, matrices: Matrices, norms: Norms) -> dict[str, Fold]:
    """Return what happens to each tensor, by name; those without an entry stay. Matrices, norms and tensors are of one
    dtype, on one device."""
    architecture, block = architecture_of(config), llama_block(config)
    residual = matrices.residual
    size = head_dim(config)

    def read(g: Tensor, weight: Tensor) -> Tensor:
        return (weight * g) @ residual

    def embed(weight: Tensor) -> Tensor:
        return weight @ residual

    def write(weight: Tensor) -> Tensor:
        """Rotate the outputs of a weight [out, in] or a bias [out]."""
        return residual.t() @ weight

    def heads(values: Tensor, rows: Tensor) -> Tensor:
        """Rotate the outputs of each head, of a weight [heads * head_dim, in] or a bias."""
        return (values.t() @ rows.view(-1, size, rows[0].numel())).view(rows.shape)

    def make_values(g: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        return heads(values, read(g, weight))

    def out(values: Tensor, weight: Tensor) -> Tensor:
        """Undo the rotation of the values of each query head."""
        return write((weight.unflatten(1, (-1, size)) @ values).flatten(1))

    def down(weight: Tensor) -> Tensor:
        width = rotation.block(weight.shape[1])
        return write(transform(weight, width) if width else weight)

    found: dict[str, Fold] = {}
    for number, values in enumerate(matrices.values):
        prefix = architecture.prefix(number)
        first, second = (norms[f"{prefix}{norm}.weight"] for norm in (block.attention_norm, block.mlp_norm))
        found |= {f"{prefix}{name}.weight": partial(read, first) for name in (block.queries, block.keys)}
        found |= {f"{prefix}{name}.weight": partial(read, second) for name in (block.gate, block.up)}
        found |= {
            f"{prefix}{block.values}.weight": partial(make_values, first, values),
            f"{prefix}{block.values}.bias": partial(heads, values),
            f"{prefix}{block.out}.weight": partial(out, values),
            f"{prefix}{block.out}.bias": write,
            f"{prefix}{block.down}.weight": down,
            f"{prefix}{block.down}.bias": write,
        }
    found |= dict.fromkeys(norms, torch.ones_like)
    found[f"{architecture.embedding}.weight"] = embed
    found[head_weight(config)] = partial(read, norms[f"{architecture.norm}.weight"])
    return found


def head_map(config: PreTrainedConfig, matrices: Matrices, norms: Norms) -> Tensor:
    """Return the symmetric map [hidden, hidden] in front of the tied output layer: arguments as of ``folds``."""
    last = norms[f"{architecture_of(config).norm}.weight"]
    return matrices.residual.t() @ (last[:, None] * matrices.residual)


def check_rotatable(config: PreTrainedConfig) -> None:
    """Raise UserError for a model that is rotated already, or does not compute LLaMA's formula."""
    llama_block(config)
    if rotation_of(config):
        raise UserError("The model is rotated already: give the one that it was made from.")


def rotated(
    tensors: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    rotation: Rotation,
    matrices: Matrices,
    norms: Norms,
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each weight of the rotated model, given those of the model of ``config``.

    They are computed where the matrices are, in their dtype, and rounded to that of the given tensor. Differentiable in
    the matrices.
    """
    fold = folds(config, rotation, matrices, norms)
    embedding, head = f"{architecture_of(config).embedding}.weight", head_weight(config)
    for name, tensor in tensors:
        wide = tensor.to(matrices.residual)
        yield name, fold[name](wide).to(tensor.dtype) if name in fold else tensor
        if name == embedding and rotation.head_map:
            yield head_map_weight(config), head_map(config, matrices, norms).to(tensor.dtype)
        elif name == embedding and config.tie_word_embeddings:
            yield head, fold[head](wide).to(tensor.dtype)


def rotation_for(config: PreTrainedConfig, down: str, untie: bool) -> Rotation:
    """Return the rotation of a model: with one of qat.quant.rotated.DOWN, and with an output layer of its own, in place
    of a map in front of the tied one, if ``untie``. Raises UserError for a model that is rotated already, or does not
    compute LLaMA's formula."""
    check_rotatable(config)
    return Rotation(down, head_map=config.tie_word_embeddings and not untie)


def write(folder: ModelFolder, output: Path, rotation: Rotation, matrices: Matrices, origin: Mapping[str, Any]) -> None:
    """Write the rotated model as a folder like ``folder``, which appears complete or not at all.

    One weight file, and one tensor in fp64, are in memory at a time. ``origin`` says how it was made, with the
    original model's name under BASE_MODEL.
    """
    config, place = folder.config, device()
    matrices = matrices.to(place).to(torch.float64)
    norms = {name: norm.to(matrices.residual) for name, norm in folder.tensors(norms_of(config).__contains__)}
    tensors = progress.bar(folder.tensors(), desc="rotate", total=len(folder.places), unit="tensor")
    with appearing_folder(output) as partial_output:
        made = rotated(tensors, config, rotation, matrices, norms)
        weight_files.write(partial_output, ((name, tensor.cpu()) for name, tensor in made))
        changes = {RECORD: rotation.record(), "tie_word_embeddings": rotation.head_map}
        write_companions(folder.companions(), partial_output, **changes)
        with writing(partial_output):
            write_atomically(partial_output / ORIGIN, json.dumps(origin, indent=2) + "\n")


def base_model(directory: Path, name: str) -> str:
    """Return the original model's name for a rotated folder and what was made from it; for others ``name``."""
    return read_json(directory / ORIGIN)[BASE_MODEL] if (directory / ORIGIN).is_file() else name
