"""A model folder: the config as transformers computes with it, and the place of every weight in the files.

Every command reads full-precision models, students and integer exports through ``ModelFolder``. It reads only the
headers of the weight files, before anything heavy is loaded, and compares them with the model that ``config.json``
describes: transformers would put random numbers in the place of a missing weight.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.quant.architecture import (
    ARCHITECTURES,
    architecture_of,
    attentions,
    new_rotation,
    quantizable_linears,
    rope_types,
    rotation,
    windowed_layers,
)
from qat.quant.config import CONFIG_FILE, GRIDS_FILE, SCALES_FILE
from qat.quant.rotated import causal_lm_class
from qat.runtime.errors import UserError, first_line, in_one_line
from qat.runtime.files import read_json, using, writing
from qat.store import compressed_tensors
from qat.store.sidecars import STEPS_FILE
from qat.store.weight_files import BIN_INDEX, FLOATS, INDEX, Stored, read, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PTQ_RECORD = "ptq.json"
"""Name of the file that records the post-training method and the model that a folder was made from."""

BASE_MODEL = "base_model"
"""Key in that record: the name of the original model."""

STUDENT = "student"
"""Key in the config.json of a trained student: the file that says how it is quantized."""

_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
_OF_THE_WEIGHTS = (INDEX, BIN_INDEX, PTQ_RECORD, CONFIG_FILE)
_OF_STUDENTS = (PTQ_RECORD, GRIDS_FILE, STEPS_FILE, SCALES_FILE)


def read_config(name: str) -> PreTrainedConfig:
    """Read the config of a Hugging Face directory or hub name; raise UserError if its architecture is unsupported, or
    it asks for something that transformers cannot compute."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in ARCHITECTURES:
            raise UserError(
                f"{name} is of the architecture {config.model_type!r}, which is not supported: give one of "
                f"{', '.join(ARCHITECTURES)}, or load its plug-in with --plugin."
            )
        _check_computable(config, name)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"The model {name} cannot be read: {first_line(error)}") from error
    except Exception as error:  # a field of another kind than expected fails wherever transformers first uses it
        raise UserError(f"The config of {name} is not valid: {in_one_line(error)}") from error
    return config


def _check_computable(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError for settings that transformers reads without complaint, and then fails at or computes without the
    causal mask."""
    from transformers.activations import ACT2FN

    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    positions, dtype = config.max_position_embeddings, config.dtype
    by_layer = architecture_of(config).sliding_window == "layer_types"
    layers = set(config.layer_types) if by_layer else set()
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor", 1)
    kinds, types = rope_types(), {"full_attention", "sliding_attention"}
    faults = {
        f"is_causal={getattr(config, 'is_causal', None)}": (
            getattr(config, "is_causal", True),
            "a language model predicts from the tokens before",
        ),
        f"is_encoder_decoder={config.is_encoder_decoder}": (
            not config.is_encoder_decoder,
            "these architectures have no encoder",
        ),
        f"dtype={dtype!r}": (
            dtype is None or isinstance(dtype, str) or (isinstance(dtype, torch.dtype) and dtype.is_floating_point),
            "give bfloat16, float16 or float32",
        ),
        f"max_position_embeddings={positions}": (positions > 0, "give the longest sequence that the model is made for"),
        f"hidden_act={config.hidden_act!r}": (config.hidden_act in ACT2FN, f"supported: {', '.join(ACT2FN)}"),
        f"rope_type={kind!r}": (kind in kinds, f"supported: {', '.join(kinds)}"),
        f"partial_rotary_factor={part} with rope_type={kind!r}": (
            part == 1 or kind in ("default", "proportional"),
            "these architectures rotate whole heads",
        ),
        f"layer_types={sorted(layers)}": (layers <= types, f"supported: {' and '.join(sorted(types))}"),
        f"sliding_window={window}": (
            not any(windowed_layers(config)) or (window is not None and window > 0),
            "give 1 token or more",
        ),
    }
    for given, (is_possible, reason) in faults.items():
        if not is_possible:
            raise UserError(f"The config.json of {name} has {given}, which transformers cannot compute: {reason}.")


def quantization_of(directory: Path) -> dict[str, Any] | None:
    """Return ``config.json``'s description of how the weights are stored quantized; None if they are not."""
    found = read_json(directory / "config.json").get("quantization_config") or None
    with using(directory / "config.json"):
        if found is not None and not isinstance(found.get("format", ""), str):
            raise TypeError(f"quantization_config has format={found['format']!r}")
    return found


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Args:
        directory: its folder
        config: transformers' config from ``config.json`` and the files together: embedding and head are tied unless
            the files hold a head of its own. Without ``quantization_config``.
        places: place of each weight, by the model's own names; for an integer export, of each of its parts
    """

    directory: Path
    config: PreTrainedConfig
    places: Mapping[str, Stored]

    @classmethod
    def read(cls, directory: Path) -> ModelFolder:
        """Read a model's config and the headers of its files. Raises UserError if a weight is missing, present twice,
        of another shape or of an unsupported number format, if the config does not describe it, or a file is missing
        or damaged."""
        _check_student(directory)
        config = read_config(str(directory))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        stored = stored_tensors(directory)
        named = {architecture_of(config).in_full(name): place for name, place in stored.items()}
        head, embedding = head_weight(config), f"{architecture_of(config).embedding}.weight"
        if config.tie_word_embeddings and _is_untied(named, head, embedding):
            config.tie_word_embeddings = False
        model = without_weights(config, directory)
        check_runs(model, directory)
        expected = tensor_specs(model)
        if quantization := quantization_of(directory):
            with using(directory / "config.json"):
                expected = _encoded(expected, model, quantization)
        if config.tie_word_embeddings and (tied := named.pop(head, None)):
            named.setdefault(embedding, tied)  # two names of one weight
        rotation = re.escape(architecture_of(config).rotation.rpartition(".")[2])
        ignored = re.compile("|".join((rf"{rotation}\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ()))))
        named = {name: place for name, place in named.items() if name in expected or not ignored.search(name)}
        check_complete(
            {name: TensorSpec(torch.Size(p.shape), {p.dtype}) for name, p in named.items()}, expected, directory
        )
        return cls(directory, config, named)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which the model computes, by its config; fp32 if that states none."""
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32

    def skeleton(self) -> PreTrainedModel:
        """Build the model in full precision, in eval mode and without memory for its weights."""
        return without_weights(self.config, self.directory)

    def tensors(self, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of each weight, or of those that are ``wanted``, one at a time in the order of the
        files.

        Raises UserError for one that is not finite.
        """
        places = {name: place for name, place in self.places.items() if wanted(name)}
        for name, tensor in read(places):
            check_finite(name, tensor, self.directory)
            yield name, tensor

    def companions(self) -> dict[str, bytes]:
        """Return the files that a model made from this one takes over, by name: config, generation config and
        tokenizer."""
        files = {file for pattern in _COMPANIONS for file in self.directory.glob(pattern)}
        own = [file for file in sorted(files) if file.is_file() and file.name not in _OF_THE_WEIGHTS]
        contents = {file.name: file.read_bytes() for file in own}
        settings = json.loads(contents["config.json"])
        for of_the_weights in ("transformers_weights", STUDENT):
            settings.pop(of_the_weights, None)
        if (old_name := settings.pop("torch_dtype", None)) is not None:  # beside "dtype" it might contradict it
            settings.setdefault("dtype", old_name)
        settings["tie_word_embeddings"] = self.config.tie_word_embeddings
        return contents | {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def _check_student(directory: Path) -> None:
    """Raise UserError for a student without the file that says how it is quantized: it is no full-precision model."""
    if (directory / CONFIG_FILE).exists():
        return
    if STUDENT in read_json(directory / "config.json") or any((directory / name).exists() for name in _OF_STUDENTS):
        raise UserError(
            f"{directory} is incomplete: {CONFIG_FILE}, which says how it is quantized, is missing. Copy it again."
        )


def skeleton(directory: Path) -> PreTrainedModel:
    """Build ``ModelFolder.skeleton`` of the folder ``directory``."""
    return ModelFolder.read(directory).skeleton()


def write_companions(companions: Mapping[str, bytes], directory: Path, **changes: Any) -> None:
    """Write ``ModelFolder.companions`` into ``directory``, with ``changes`` to ``config.json``."""
    with writing(directory):
        for name, content in companions.items():
            (directory / name).write_bytes(content)
        if changes:
            config = json.loads(companions["config.json"]) | changes
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shape of each weight, by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape, and the safetensors names of its dtype, or of its allowed dtypes."""

    shape: torch.Size
    dtypes: frozenset[str] | set[str] = FLOATS


def tensor_specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """Return the expected shape and dtypes of each weight of a full-precision model, by name."""
    return {name: TensorSpec(shape) for name, shape in shapes(model).items()}


def check_complete(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], where: Path) -> None:
    """Raise UserError unless ``found`` are the weights that are expected."""
    missing, strange = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        also = f", and holds {_some(strange)}, which its config.json does not describe" if strange else ""
        raise UserError(
            f"{where} is incomplete: it lacks {_some(missing)}{also}. Copy it again, or save it with all weights under "
            "the names that transformers gives them."
        )
    if strange:
        raise UserError(f"{where} does not match its config.json, which does not describe {_some(strange)}.")
    for name, spec in expected.items():
        shape, dtypes = found[name].shape, found[name].dtypes
        if shape != spec.shape:
            raise UserError(
                f"{where} does not match its config.json: {name} is {list(shape)}, and should be {list(spec.shape)}."
            )
        if not dtypes <= spec.dtypes:
            raise UserError(
                f"{where} stores {name} as {', '.join(dtypes)}, and {' or '.join(sorted(spec.dtypes))} is expected: "
                "give the full-precision model."
            )


def check_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    """Raise UserError if a tensor holds NaN or an infinity."""
    if tensor.dtype == torch.float8_e4m3fn:  # whose largest number torch does not find
        tensor = tensor.float()
    if tensor.is_floating_point() and tensor.numel() and not all(part.isfinite() for part in tensor.aminmax()):
        raise UserError(
            f"{where} holds numbers that are not finite, in {name}: the file is damaged, or the model "
            "diverged in training. Give an intact copy."
        )


def _some(names: Iterable[str]) -> str:
    """Return the first name, and the number of the others."""
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def head_weight(config: PreTrainedConfig) -> str:
    """Return the name of the output layer's weight, which may be the embedding's."""
    return f"{architecture_of(config).head}.weight"


def _is_untied(stored: Mapping[str, Stored], head: str, embedding: str) -> bool:
    """Return whether the files hold a head other than the embedding: then transformers does not tie them, whatever the
    config states."""
    if head not in stored or embedding not in stored:
        return False
    if stored[head].shape != stored[embedding].shape or stored[head].dtype != stored[embedding].dtype:
        return True
    pair = dict(read({name: stored[name] for name in (head, embedding)}))
    return not torch.equal(pair[head], pair[embedding])


def without_weights(config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """Build the model that ``config``, of ``directory``, describes, without memory for its weights; raise UserError if
    it describes none."""
    model_class = causal_lm_class(config)
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))  # AutoModel.from_config would partition it where ZeRO-3 reads
        model.set_attn_implementation("sdpa")
    except Exception as error:  # as in read_config
        raise UserError(f"The config of {directory} describes no model: {in_one_line(error)}") from error
    return model.eval()


def check_runs(model: PreTrainedModel, directory: Path) -> None:
    """Raise UserError if a model without weights, of ``directory``, cannot compute: its shapes do not fit, or
    transformers fails on its settings when it uses them."""
    rope: Any = rotation(model)
    config = model.config
    layers = config.num_hidden_layers
    try:
        # RoPE may depend on the values of the positions, which meta tensors do not have.
        cos, sin = new_rotation(model)(torch.ones(1), torch.arange(2)[None])
        if not torch.cat([cos, sin]).isfinite().all():
            raise ValueError("RoPE's angles are not finite: see rope_parameters")
        rope.forward = lambda x, position_ids: (cos.to("meta"), sin.to("meta"))
        config.num_hidden_layers = 1  # the others have the same shapes
        model(torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=True)
    except Exception as error:  # as in read_config
        raise UserError(f"transformers cannot compute {directory} by its config: {in_one_line(error)}") from error
    finally:
        config.num_hidden_layers = layers
        vars(rope).pop("forward", None)


def _encoded(
    expected: dict[str, TensorSpec], model: PreTrainedModel, quantization: dict[str, Any]
) -> dict[str, TensorSpec]:
    """Return the shape and dtypes of the tensors in which an integer export holds the ``expected`` weights of a
    full-precision model."""
    linears = quantizable_linears(model)
    encoded: dict[str, TensorSpec] = {}
    for name, spec in expected.items():
        layer = name.removesuffix(".weight")
        parts = (
            compressed_tensors.layout(layer, spec.shape, quantization)
            if layer in linears or compressed_tensors.names(layer, quantization)
            else {name: (spec.shape, FLOATS)}
        )
        encoded |= {part: TensorSpec(torch.Size(shape), dtypes) for part, (shape, dtypes) in parts.items()}
    scales = compressed_tensors.cache_layout(attentions(model), quantization)
    return encoded | {name: TensorSpec(torch.Size(shape), dtypes) for name, (shape, dtypes) in scales.items()}
