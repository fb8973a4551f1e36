"""Writing a quantized model one decoder layer at a time, so that a killed run goes on where it was.

Every finished layer is a weight file of the folder ``OUTPUT.partial``; a run that finds it there only lets the
calibration text pass it. The folder gets its name when it is whole.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qat.ptq.stream import Stream, Weights
from qat.quant.config import QuantConfig
from qat.quant.quantizers.base import Grid
from qat.runtime import progress
from qat.runtime.errors import UserError, differences
from qat.runtime.files import load_tensors, read_json, save_tensors, write_atomically, writing
from qat.store.model_folder import BASE_MODEL, PTQ_RECORD, ModelFolder, write_companions
from qat.store.sidecars import GRIDS_FILE, HAS_GRIDS, load_grids, save_grids
from qat.store.weight_files import INDEX

QuantizeLayer = Callable[[Stream, Weights], tuple[Weights, dict[str, Grid], str]]
"""From the stream in front of a layer, and the layer's weights: its final weights, their grids by the layers' names
in it where they need some, and a word for the progress bar."""


def is_complete(output: Path, settings: dict[str, Any]) -> bool:
    """Whether ``output`` was made with ``settings`` already; raises UserError if it is something else."""
    if not output.exists():
        return False
    if not (output / PTQ_RECORD).is_file():
        raise UserError(f"{output} is there already, and no post-training method made it: give another folder.")
    if listed := differences(_settings_of(output), settings):
        raise UserError(f"{output} is there already, made with other settings ({listed}): give another folder.")
    return True


def partial_of(output: Path) -> Path:
    """The folder that becomes ``output``."""
    return output.with_name(output.name + ".partial")


@contextmanager
def appearing(
    source: ModelFolder, output: Path, quant: QuantConfig, settings: dict[str, Any], base_model: str = ""
) -> Iterator[Path]:
    """A folder beside ``output`` for its weights; at the end it gets the rest of the files, and the name.

    ``base_model`` is what the model is called that it is made from. Raises UserError if it holds a run of other
    settings.
    """
    partial = partial_of(output)
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
    if (partial / PTQ_RECORD).is_file():
        if listed := differences(_settings_of(partial), settings):
            raise UserError(
                f"{partial} holds an unfinished run of other settings ({listed}): give another --output, or delete it."
            )
    else:
        _write_record(partial, settings | {BASE_MODEL: base_model})
    yield partial
    write_companions(source.companions(), partial)
    quant.save(partial)
    has_grids = (partial / GRIDS_FILE).exists()
    _write_record(partial, settings | {BASE_MODEL: base_model, HAS_GRIDS: has_grids})
    with writing(output):
        (partial / "lock").unlink(missing_ok=True)
        partial.rename(output)


def _settings_of(folder: Path) -> dict[str, Any]:
    """What the weights in ``folder`` depend on: not on the model's name."""
    record = read_json(folder / PTQ_RECORD)
    return {name: value for name, value in record.items() if name not in (BASE_MODEL, HAS_GRIDS)}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with writing(folder):
        write_atomically(folder / PTQ_RECORD, json.dumps(record, indent=2) + "\n")


def write(stream: Stream, folder: Path, method: str, quantize_layer: QuantizeLayer) -> None:
    """Write the weight files of the model that the stream flows through, and their index, into ``folder``."""
    count = len(stream.layers)
    bar = progress.bar(range(count), desc=method, unit="layer")
    for number in bar:
        path, prefix = _weight_file(folder, number, count), stream.prefix(number)
        if not path.exists():
            weights, grids, word = quantize_layer(stream, stream.files.layer(number))
            bar.set_postfix_str(word, refresh=False)
            _save_layer(folder / _grids_file(number), path, prefix, weights, grids)
        stored = {name.removeprefix(prefix): weight for name, weight in load_tensors(path).items()}
        grids = {name.removeprefix(prefix): grid for name, grid in load_grids(folder, _grids_file(number)).items()}
        stream.advance(stored, grids)
    _save(stream.files.rest(), _weight_file(folder, count, count))
    _write_index(folder)
    _merge_grids(folder, count)


def _save_layer(grids_path: Path, path: Path, prefix: str, weights: Weights, grids: dict[str, Grid]) -> None:
    """The grids first: a layer whose weight file is there is finished."""
    if grids:
        save_grids({prefix + name: grid for name, grid in grids.items()}, grids_path)
    _save({prefix + name: weight for name, weight in weights.items()}, path)


def _save(weights: Weights, path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_tensors(weights, partial)
    partial.replace(path)


def _write_index(folder: Path) -> None:
    places: dict[str, str] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
    with writing(folder):
        write_atomically(folder / INDEX, json.dumps({"metadata": {}, "weight_map": places}, indent=2) + "\n")


def _merge_grids(folder: Path, count: int) -> None:
    """One file for all layers; the single ones go only when it is there."""
    files = [_grids_file(number) for number in range(count)]
    grids = {name: grid for file in files for name, grid in load_grids(folder, file).items()}
    if grids and not (folder / GRIDS_FILE).exists():
        partial = folder / f"{GRIDS_FILE}.partial"
        save_grids(grids, partial)
        partial.replace(folder / GRIDS_FILE)
    for file in files:
        (folder / file).unlink(missing_ok=True)


def _weight_file(folder: Path, number: int, count: int) -> Path:
    """Of layer ``number``; ``count`` is what comes outside the layers."""
    return folder / f"model-{number + 1:05d}-of-{count + 1:05d}.safetensors"


def _grids_file(number: int) -> str:
    return f"grids-{number + 1:05d}.safetensors"
