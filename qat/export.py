"""Integer checkpoints: a Hugging Face directory in the compressed-tensors format.

``int-quantized``: each quantized Linear is stored as ``weight`` (int8 codes, [out, in]) and ``weight_scale``
(fp32, [out, 1]), codes and scales exactly as training simulated them; everything else as it was trained.
Activations are described as dynamic and per token, so an engine quantizes them as the student did.
``quant_config.json`` beside it keeps what the format has no words for: the KV cache.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qat import models
from qat.errors import UserError
from qat.prepare import CONFIG_FILE, GRIDS_FILE, QuantConfig, freeze, load_grids, load_steps, prepare, quant_linears
from qat.products import speed_up
from qat.quantizers import FULL_PRECISION, Grid, Quantized, dequantize, quantize

FORMAT = "int-quantized"

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_SCALE = "weight_scale"


def export(checkpoint: Path, output: Path, check: bool = True) -> None:
    """Write the trained student at ``checkpoint`` as an integer checkpoint; ``output`` appears whole.

    One weight file is in memory at a time; ``check`` loads the whole model, once each. Raises UserError if the
    checkpoint is not one of ours.

    Args:
        check: load both before ``output`` appears, and compare their logits
    """
    quant = _quant_config(checkpoint)
    if quant.w_bits == FULL_PRECISION:
        raise UserError(f"{checkpoint} has w_bits=16: there are no integer weights to export.")
    if quant.a_bits == FULL_PRECISION:
        raise UserError(f"{checkpoint} has a_bits=16: the format {FORMAT} is for quantized activations.")
    if not quant.weights.symmetric or quant.w_group_size or quant.a_quantizer != "minmax":
        raise UserError(
            f"{checkpoint} was trained with w_quantizer={quant.w_quantizer}, w_group_size={quant.w_group_size}, "
            f"a_quantizer={quant.a_quantizer}: the export knows symmetric weights with one scale per output channel, "
            "and minmax activations."
        )
    if output.exists():
        raise UserError(f"{output} is there already: give another folder.")
    quantized = {f"{name}.weight" for name in quant_linears(prepare(_skeleton(checkpoint), quant))}
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in (f for pattern in _COPIED for f in checkpoint.glob(pattern)):
        shutil.copy(file, partial)
    grids = load_grids(checkpoint)
    places: dict[str, str] = {}
    for file in _weight_files(checkpoint):
        tensors: dict[str, Tensor] = {}
        for name, tensor in _tensors(file):
            if name in quantized:
                codes, grid = quantize(tensor, quant.weights, grids.get(name.removesuffix(".weight")))
                tensors |= {name: codes, _scale_name(name): grid.scale}
            else:
                tensors[name] = tensor
        save_file(tensors, partial / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    if missing := quantized - places.keys():
        raise UserError(f"{checkpoint} is incomplete: it lacks {min(missing)} and {len(missing) - 1} other weights.")
    if len(set(places.values())) > 1:
        index = {"metadata": {}, "weight_map": places}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = json.loads((partial / "config.json").read_text())
    config["quantization_config"] = quantization_config(quant)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if check:
        verify(checkpoint, partial)
    partial.rename(output)


@torch.inference_mode()
def verify(checkpoint: Path, exported: Path) -> None:
    """Raise UserError unless both give the same logits, bit for bit, on a sequence of random tokens."""
    in_memory = load(str(checkpoint), torch.float32)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(in_memory.config.vocab_size, (1, 128), generator=generator)
    expected = in_memory(input_ids).logits
    del in_memory
    got = load(str(exported), torch.float32)(input_ids).logits
    if not torch.equal(got, expected):
        raise UserError(f"{exported} is wrong: its logits differ by up to {(got - expected).abs().max():.3g}.")


def quantization_config(quant: QuantConfig) -> dict[str, Any]:
    """What compressed-tensors, hence transformers and vLLM, read in ``config.json``."""
    weights = {
        "num_bits": quant.w_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    activations = {
        "num_bits": quant.a_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def load(directory: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model at ``directory``, ready for inference: full precision, a trained student, or an export.

    Weights are quantized once, here; activations and KV cache as ``quant_config.json`` says.
    """
    path = Path(directory)
    if not (path / CONFIG_FILE).is_file():
        model = models.load(directory, dtype)
        speed_up(model)
        return model
    quant = _quant_config(path)
    if "quantization_config" in json.loads((path / "config.json").read_text()):
        return prepare(_load_integers(path, dtype), replace(quant, w_bits=FULL_PRECISION)).eval()
    model = prepare(models.load(directory, "auto"), quant)
    load_steps(model, path)
    freeze(model, load_grids(path))  # in the dtype that was trained: another one would give other codes
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _load_integers(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    stored = {name: tensor for file in _weight_files(directory) for name, tensor in _tensors(file)}
    weights = {}
    for name in [name for name in stored if not name.endswith(_SCALE)]:
        tensor, scale = stored.pop(name), stored.pop(_scale_name(name), None)
        values = (
            None if scale is None else dequantize(Quantized(tensor, Grid(scale)), config.dtype)
        )  # as it was trained
        weights[name] = tensor if values is None else values
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = model_class.from_pretrained(  # type: ignore[attr-defined]
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise UserError(f"{directory} is incomplete: it lacks {min(missing)} and {len(missing) - 1} other weights.")
    return model


def _quant_config(directory: Path) -> QuantConfig:
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} holds no trained student: it has no {CONFIG_FILE}. Give the final/ of a run.")
    return QuantConfig.load(directory)


def _skeleton(directory: Path) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(file for file in directory.glob("*.safetensors") if file.name != GRIDS_FILE)
    if not files:
        raise UserError(f"{directory} has no weights (*.safetensors).")
    return files


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            yield name, opened.get_tensor(name)


def _scale_name(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + _SCALE
