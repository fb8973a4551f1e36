"""Model directories: finding them, reading them, and telling one from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from torch import Tensor

from qat.quant.architecture import ARCHITECTURES, architecture_of, new_rotation, rotation
from qat.quant.config import CONFIG_FILE
from qat.quant.rotated import causal_lm_class
from qat.runtime import machine
from qat.runtime.errors import UserError, in_one_line
from qat.store import compressed_tensors
from qat.store.model_folder import ModelFolder, TensorSpec, check_complete, check_finite, quantization_of, read_config
from qat.store.smollm2 import EMBEDDED, extract_embedded
from qat.store.weight_files import NO_WEIGHTS, weight_files

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers import PreTrainedTokenizerBase as Tokenizer

_PATTERNS = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
"""The files that are downloaded of a model on the hub."""


def resolve(name: str) -> str:
    """Return the directory of the model ``name``: a Hugging Face directory, a hub name, or EMBEDDED.

    Raises UserError, before anything heavy is loaded, if it is not there, of an unsupported architecture, damaged, or
    if its weights are not those of its config.
    """
    if name == EMBEDDED:
        return str(extract_embedded(Path("runs/models") / EMBEDDED))
    directory = name if Path(name).exists() else _download(name)
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{name} is not a model directory: it has no config.json. Give a Hugging Face directory.")
    read_config(directory)
    load_generation_config(directory)
    if not _of_others(Path(directory)):
        ModelFolder.read(Path(directory))
    return directory


def resolve_full_precision(name: str) -> str:
    """Resolve a model that is going to be quantized; raise UserError if it already is."""
    directory = resolve(name)
    if quantization_of(Path(directory)) or (Path(directory) / CONFIG_FILE).is_file():
        raise UserError(f"{name} is quantized already: give the full-precision model that it was made from.")
    return directory


def check_length(config: PreTrainedConfig, tokens: int, setting: str) -> None:
    """Raise UserError if a model cannot attend over ``tokens`` positions; ``setting`` names the setting that asks for
    them."""
    longest = config.max_position_embeddings
    if tokens > longest:
        raise UserError(
            f"{setting}={tokens} is longer than the {longest} positions of the model: give {longest} or less."
        )


def check_ids(config: PreTrainedConfig, largest: int, whose: str) -> None:
    """Raise UserError if a model has no embedding of the token id ``largest``; ``whose`` names the text that it occurs
    in."""
    if largest >= config.vocab_size:
        raise UserError(
            f"{whose} contains token id {largest}, but the model's embedding has {config.vocab_size} rows: its "
            "tokenizer has added tokens. Give text without them, or a model with embeddings of them."
        )


def check_sequences(config: PreTrainedConfig, longest: int, largest: int, name: str) -> None:
    """Raise UserError if a model cannot read all sequences of a text: its longest sequence has ``longest`` tokens, its
    largest token id is ``largest``."""
    check_length(config, longest, f"The longest sequence of {name}")
    check_ids(config, largest, f"The text of {name}")


def max_positions(name: str) -> int:
    """Return the longest sequence that the model at ``name`` can attend over."""
    return read_config(name).max_position_embeddings


def _download(name: str) -> str:
    try:
        found = snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=["consolidated*"])
        if not any(Path(found).glob("*.safetensors")):  # older models have PyTorch's format alone, others both
            found = snapshot_download(name, allow_patterns=[*_PATTERNS, "pytorch_model*.bin"])
        return found
    except GatedRepoError as error:
        raise UserError(
            f"{name!r} is a model whose licence must be accepted: accept it on the model's page on the hub, log in (hf "
            "auth login), and run the same command again."
        ) from error
    except (OSError, ValueError) as error:  # invalid name, no such model, a full disk, or the hub cannot be reached
        raise UserError(
            f"There is no model at {name!r}, nor can it be fetched from the hub: give a Hugging Face directory, a "
            f"hub name (owner/model) or {EMBEDDED!r}, which needs no download. ({in_one_line(error)})"
        ) from error


def load(
    name: str, dtype: torch.dtype | str, own_part: Callable[[Tensor], Tensor] = Tensor.detach, **how: Any
) -> PreTrainedModel:
    """Load the full-precision causal LM in the folder ``name`` in eval mode, on the CPU; dtype "auto" is that of the
    file. One whose config.json says how it is quantized is what transformers makes of it.

    ``own_part`` returns what this rank has of a Parameter, where that is not its value; ``how`` goes to
    ``from_pretrained``. Raises UserError if the weights are not those of the config, or not finite.
    """
    if quantization_of(Path(name)):
        model = _load_quantized(name, dtype)
    else:
        config = ModelFolder.read(Path(name)).config
        model_class = causal_lm_class(config)
        model = model_class.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", config=config, **how)
    for weight, parameter in model.named_parameters():
        check_finite(weight, _local(own_part(parameter)), name)
    return model.eval()


def load_here(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """``load`` the model onto this process's device; at once onto a GPU, since the host may have no room for a copy of
    each rank."""
    if quantization_of(Path(name)) or read_config(name).model_type not in ARCHITECTURES:
        model = load(name, dtype)
        machine.place(model)
        return model
    model = load(name, dtype, device_map=machine.device())
    renew_rope(model)
    machine.place(rotation(model))
    return model


def _load_quantized(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a model by the ``quantization_config`` of its config.json; raise UserError if transformers cannot, or if its
    files do not hold all that it would load. What they hold besides, as some tools write it, is left alone."""
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **how)
    except Exception as error:
        raise UserError(f"{name} is quantized, and transformers cannot load it: {in_one_line(error)}") from error
    model, account = loaded
    missing = dict.fromkeys(account["missing_keys"], TensorSpec(torch.Size()))
    check_complete({}, missing, Path(name))  # transformers would put random numbers in the place of a scale
    return model


def _of_others(directory: Path) -> bool:
    """Return whether the weights are stored as integers in a format that we do not write."""
    quantization = quantization_of(directory)
    return quantization is not None and quantization.get("format") not in compressed_tensors.LAYOUTS


def _local(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight: under tensor parallelism it is not all of it."""
    return weight.to_local() if hasattr(weight, "to_local") else weight  # a DTensor; importing its class takes long


def renew_rope(model: PreTrainedModel) -> None:
    """Give ``model`` the RoPE frequencies of its config, in fp32, computed on the CPU as everywhere: no file holds
    them, and a model made on the meta device or under ``zero.Init`` has lost or rounded them."""
    model.set_submodule(architecture_of(model.config).rotation, new_rotation(model))


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer in the folder ``name``; raise UserError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # damaged files fail wherever transformers first uses their content
        raise UserError(f"The tokenizer of {name} cannot be read: {in_one_line(error)}") from error


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of the tokens that are no text: BOS, the marks of a chat template, and other added ones."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def load_generation_config(directory: str) -> GenerationConfig:
    """Return the generation config of the model in ``directory``: its generation_config.json, or else one from its
    config.

    Raises UserError if that cannot be read, or names ends of text that are no token ids.
    """
    from transformers import GenerationConfig

    file = Path(directory) / "generation_config.json"
    if not file.exists():
        found, file = GenerationConfig.from_model_config(read_config(directory)), file.with_name("config.json")
    else:
        try:
            found = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # as in load_tokenizer
            raise UserError(f"{file} cannot be read: {in_one_line(error)}") from error
    ends = found.eos_token_id
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
        raise UserError(f"{file} has eos_token_id={ends!r}: give a token id, or a list of them.")
    found.eos_token_id = None if ends == [] else ends  # transformers generates without an end, not with an empty list
    return found


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash that is equal for tokenizers that map the same tokens to the same ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def check_same_tokens(ours: Tokenizer, theirs: Tokenizer, whose: str) -> None:
    """Raise UserError if a token of both tokenizers has two ids, or an id two tokens; either may have more tokens.

    ``whose`` names their owners.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    by_id = {number: token for token, number in b.items()}
    for token, number in a.items():
        if b.get(token, number) != number:
            found = f"{token!r} is {number} in one and {b[token]} in the other"
        elif by_id.get(number, token) != token:
            found = f"{number} is {token!r} in one and {by_id[number]!r} in the other"
        else:
            continue
        raise UserError(
            f"{whose} have different tokenizers ({found}), so their predictions cannot be compared: give models of one "
            "family."
        )


def weights_fingerprint(directory: str) -> str:
    """Return an identifier of the weights at ``directory`` without reading them all: config, and size and ends of each
    file.

    Learned steps and grids count as weights; files that the index does not name do not.
    """
    folder = Path(directory)
    more = [folder / name for name in NO_WEIGHTS if (folder / name).is_file()]
    files = sorted([*weight_files(folder), *more])
    return files_fingerprint(files, (folder / "config.json").read_bytes())


def files_fingerprint(files: Iterable[Path], content: bytes = b"") -> str:
    """Return an identifier of ``content`` and of files, without reading them all: by the name, size and ends of
    each."""
    digest = hashlib.sha256(content)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for offset in (0, size // 2, max(size - 4096, 0)):
                stream.seek(offset)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
