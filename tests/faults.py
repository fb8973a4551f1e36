"""What happens to files: a full disk, a flipped bit, the edits of others."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qat.store.weight_files import weight_files

WEIGHTS = "model.safetensors"


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The limit on the size of a file stands for the disk's: writing fails after ``room`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path) -> None:
    """One bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(file: Path, drop: tuple[str, ...] = (), **changes) -> None:
    """Change a JSON file's values."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if name not in drop}))


def change_weights(folder: Path, change, file: str = WEIGHTS) -> None:
    """``change`` takes the weights and returns them, or changes them in place."""
    weights = load_file(folder / file)
    save_file(change(weights) or weights, folder / file, metadata={"format": "pt"})


def rotary_buffers(weights: dict) -> None:
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)


def odd(folder: Path) -> None:
    """What real folders have: LLaMA-1's buffers and -1 for no padding, vicuna's sampling without do_sample, settings of
    generation in the config, fine-tuning's use_cache, and a head of its own where the config ties it."""
    change_weights(folder, rotary_buffers, weight_files(folder)[0].name)
    edit(folder / "config.json", tie_word_embeddings=True, use_cache=False, pad_token_id=-1, temperature=0.7)
    edit(folder / "generation_config.json", temperature=0.9, top_p=0.6)
