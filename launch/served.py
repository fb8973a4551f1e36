"""The file that llama.cpp serves for a model: the user's own, a student's export, a full-precision model as GGUF, or
that file quantized by llama.cpp."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.evaluate import llama_quantize
from qat.export import export
from qat.export.formats import GGUF
from qat.quant.config import CONFIG_FILE
from qat.runtime.errors import UserError
from qat.store import gguf_files, student_folder
from qat.store.model_folder import quantization_of


def check(model: str) -> None:
    """Raise UserError for the folder of an integer export, which is no GGUF file and cannot be made one."""
    if gguf_files.find(Path(model)) is None and quantization_of(Path(model)):
        raise UserError(f"{model} is an integer export: give the student that it was made from, or its gguf export.")


@contextmanager
def file_of(model: str, method: str) -> Iterator[Path]:
    """Give the GGUF file of ``model`` in this context: a GGUF file, or the folder of one, of a student or of a
    full-precision model, which ``check`` has accepted.

    Args:
        method: "as_is", or one of llama_quantize.KINDS for a full-precision model
    """
    folder = Path(model)
    if (file := gguf_files.find(folder)) is not None:
        yield file
        return
    with tempfile.TemporaryDirectory() as made:
        if (folder / CONFIG_FILE).is_file():
            student = student_folder.find(folder)
            export.check(student, GGUF)
            export.export(student, Path(made), GGUF)
        else:
            full = student_folder.full_precision(model)
            export.check_rotation(full, GGUF)
            gguf_files.check(full)
            gguf_files.write(full, Path(made))
        file = Path(made) / gguf_files.FILE
        if method in llama_quantize.KINDS:
            source = file.rename(file.with_name("full-precision.gguf"))
            llama_quantize.quantize_file(source, file, method)
        yield file
