"""Safetensors folders: read one tensor at a time, written in files of bounded size, checked against a config."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qat.errors import UserError
from qat.prepare import GRIDS_FILE, STEPS_FILE
from qat.quantizers import Quantized

INDEX = "model.safetensors.index.json"

COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
"""What else a model directory holds: config, index and tokenizer."""

NO_WEIGHTS = (STEPS_FILE, GRIDS_FILE)
"""Safetensors files of a student beside its weights."""


def skeleton(directory: Path) -> PreTrainedModel:
    """The model that ``config.json`` describes, in full precision and without memory for its weights."""
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shape of each weight, by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def stored_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that the model's weight files hold; one tensor is in memory at a time.

    Raises UserError for files that are missing, cut short or no safetensors.
    """
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}): copy it again, or write it anew.") from error


def weight_files(directory: Path) -> list[Path]:
    """The files that the index names; without one, ``model.safetensors``, or, if that is not there either, all there
    are. Others are not the model's: Mistral's directories hold a second copy under other names.

    Raises UserError if any is missing.
    """
    index, whole = directory / INDEX, directory / _file_name(1, 1)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error}): copy it again, or write it anew.") from error
        files = [directory / name for name in names]
    elif whole.is_file():
        files = [whole]
    else:
        files = sorted(file for file in directory.glob("*.safetensors") if file.name not in NO_WEIGHTS)
    if not files:
        raise UserError(f"{directory} has no weights in the safetensors format: save the model so.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{directory} is incomplete: the weight file {missing[0]} is missing.")
    return files


def checked(
    weights: Iterable[tuple[str, Tensor | Quantized]], model: PreTrainedModel, where: Path
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Hand on ``weights``; raises UserError unless they are those of ``model``: same names, same shapes."""
    expected = shapes(model)
    for name, weight in weights:
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # another name of the embedding
        if name not in expected:
            raise UserError(f"{where} does not match its config.json, which has no place for {name}.")
        shape = expected.pop(name)
        found = weight.codes.shape if isinstance(weight, Quantized) else weight.shape
        if found != shape:
            raise UserError(
                f"{where} does not match its config.json: {name} is {list(found)}, and should be {list(shape)}."
            )
        yield name, weight
    if expected:
        raise UserError(f"{where} is incomplete: it lacks {min(expected)} and {len(expected) - 1} other weights.")


def write(directory: Path, tensors: Iterable[tuple[str, Tensor]], file_bytes: int) -> None:
    """Write weight files of at most ``file_bytes`` (one tensor at least), and their index.

    One file is in memory at a time, and the tensor that comes next.
    """
    pending: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    held = total = files = 0
    for name, tensor in tensors:
        if pending and held + tensor.nbytes > file_bytes:
            files += 1
            save_file(pending, directory / f"part-{files}", metadata={"format": "pt"})
            pending, held = {}, 0
        pending[name] = tensor.contiguous()
        places[name] = files + 1
        held += tensor.nbytes
        total += tensor.nbytes
    files += 1
    save_file(pending, directory / f"part-{files}", metadata={"format": "pt"})
    names = {number: _file_name(number, files) for number in range(1, files + 1)}
    for number, name in names.items():
        (directory / f"part-{number}").rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in places.items()}}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _file_name(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
