"""Writes a quantized model one decoder layer at a time, so that a killed run resumes where it was.

Every finished layer is a weight file in the folder ``OUTPUT.partial``; a run that finds it there only passes the
calibration text through the layer. The folder gets its final name when it is complete.
"""

import json
import shutil
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
from qat.runtime.files import appearing_folder, load_tensors, read_json, save_tensors, write_atomically, writing
from qat.store.model_folder import BASE_MODEL, PTQ_RECORD, ModelFolder, write_companions
from qat.store.sidecars import GRIDS_FILE, load_grids, save_grids
from qat.store.weight_files import INDEX, file_name

QuantizeLayer = Callable[[Stream, Weights], tuple[Weights, dict[str, Grid], str]]
"""Maps the stream at a layer, and the layer's weights, to its final weights, their grids by the layers' names in it
where they need some, and a note for the progress bar."""


def is_complete(output: Path, settings: dict[str, Any]) -> bool:
    """Return whether ``output`` was already made with ``settings``; raise UserError if it holds something else."""
    if not output.exists():
        return False
    if not (output / PTQ_RECORD).is_file():
        raise UserError(f"{output} already exists, and no post-training method made it: give another folder.")
    if listed := differences(_settings_of(output), settings):
        raise UserError(f"{output} already exists, made with other settings ({listed}): give another folder.")
    return True


@contextmanager
def appearing(
    source: ModelFolder, output: Path, quant: QuantConfig, settings: dict[str, Any], base_model: str = ""
) -> Iterator[Path]:
    """Yield a folder beside ``output`` for the weights; at the end, add the remaining files and rename it to
    ``output``.

    ``base_model`` is the name of the original model. Raises UserError if the folder holds a run with other settings, or
    another process is working in it. If the caller raises one before a weight file is finished, nothing is left.
    """
    with appearing_folder(output, PTQ_RECORD) as partial:
        if (partial / PTQ_RECORD).is_file():
            if listed := differences(_settings_of(partial), settings):
                raise UserError(
                    f"{partial} holds an unfinished run with other settings ({listed}): give another --output, or "
                    "delete that folder."
                )
        else:
            with writing(partial):
                content = json.dumps(settings | {BASE_MODEL: base_model}, indent=2) + "\n"
                write_atomically(partial / PTQ_RECORD, content)
        try:
            yield partial
        except UserError:
            if not any(partial.glob("model*.safetensors")):  # other settings, as the error may ask for, find it free
                shutil.rmtree(partial)
            raise
        write_companions(source.companions(), partial)
        quant.save(partial)


def _settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings that the weights in ``folder`` depend on: the model's name is not among them."""
    record = read_json(folder / PTQ_RECORD)
    return {name: value for name, value in record.items() if name != BASE_MODEL}


def write(stream: Stream, folder: Path, quantize_layer: QuantizeLayer) -> None:
    """Write the weight files of the stream's model, and their index, into ``folder``."""
    count = len(stream.layers)
    bar = progress.bar(range(count), desc="quantize", unit="layer")
    for number in bar:
        path, prefix = _weight_file(folder, number, count), stream.prefix(number)
        if not path.exists():
            weights, grids, word = quantize_layer(stream, stream.files.layer(number))
            bar.set_postfix_str(word, refresh=False)
            _save_layer(folder / _grids_file(number), path, prefix, weights, grids)
        stored = {name.removeprefix(prefix): weight for name, weight in load_tensors(path).items()}
        grids = {name.removeprefix(prefix): grid for name, grid in load_grids(folder, _grids_file(number)).items()}
        stream.advance(stored, grids)
    save_tensors(stream.files.rest(), _weight_file(folder, count, count))
    _write_index(folder, count)
    _merge_grids(folder, count)


def _save_layer(grids_path: Path, path: Path, prefix: str, weights: Weights, grids: dict[str, Grid]) -> None:
    """Save a layer, grids first: a layer whose weight file exists is finished."""
    if grids:
        save_grids({prefix + name: grid for name, grid in grids.items()}, grids_path)
    save_tensors({prefix + name: weight for name, weight in weights.items()}, path)


def _write_index(folder: Path, count: int) -> None:
    places: dict[str, str] = {}
    for file in (_weight_file(folder, number, count) for number in range(count + 1)):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
    with writing(folder):
        write_atomically(folder / INDEX, json.dumps({"metadata": {}, "weight_map": places}, indent=2) + "\n")


def _merge_grids(folder: Path, count: int) -> None:
    """Merge the layers' grids into one file; the single files are deleted only after it is written."""
    files = [_grids_file(number) for number in range(count)]
    grids = {name: grid for file in files for name, grid in load_grids(folder, file).items()}
    if grids and not (folder / GRIDS_FILE).exists():
        save_grids(grids, folder / GRIDS_FILE)
    for file in files:
        (folder / file).unlink(missing_ok=True)


def _weight_file(folder: Path, number: int, count: int) -> Path:
    """Return the path of layer ``number``'s weight file; number ``count`` is that of the weights outside the layers."""
    return folder / file_name(number + 1, count + 1)


def _grids_file(number: int) -> str:
    return f"grids-{number + 1:05d}.safetensors"
