"""``hf-fake``: the rounded weights as floats, a plain Hugging Face directory for engines without quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.export.formats.base import ExportFormat, write_folder
from qat.quant.number_format import Quantized, dequantize
from qat.quant.products import speed_up
from qat.store import models
from qat.store.student_folder import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Fake(ExportFormat):
    meaning = "rounded weights as floats"

    def write(self, student: Student, output: Path, file_bytes: int) -> None:
        values = (
            (name, dequantize(weight, student.dtype) if isinstance(weight, Quantized) else weight)
            for name, weight in student.progress()
        )
        write_folder(student, output, values, file_bytes)

    def load(self, exported: Path) -> PreTrainedModel:
        model = models.load(str(exported), torch.float32)  # on the CPU, as the student that it is compared with
        speed_up(model)
        return model

    def serve(self, name: str) -> list[str]:
        return [f"vllm serve {name}"]
