"""Students that are written without training."""

from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer

from qat.quant.config import QuantConfig
from qat.quant.linear import quant_linears
from qat.quant.prepare import calibrate, prepare
from qat.quant.tensor_scales import tensor_scales_in
from qat.store import student_folder
from qat.store.sidecars import STEP_SUFFIX, save_steps, save_tensor_scales

SETTINGS = [
    QuantConfig(4, 8, 4, kv_rotation="hadamard"),
    QuantConfig(8, 8, 16),
    QuantConfig(3, 6, 8),
    QuantConfig(5, 8, 4, w_quantizer="statsq", kv_granularity="token"),
    QuantConfig(2, 16, 4, kv_site="pre_rope", a_quantizer="minmax_asymmetric"),
    QuantConfig(4, 8, 16, w_group_size=32),
    QuantConfig(4, 8, 4, a_quantizer="lsq"),
    QuantConfig(4, 8, 16, w_quantizer="ggml_q4_0", a_quantizer="ggml_q8_0"),
    QuantConfig(4, 8, 16, w_quantizer="minmax_full", a_quantizer="minmax_full"),
    QuantConfig(4, 8, 16, w_quantizer="minmax_signed"),
    QuantConfig(2, 8, 16, w_quantizer="seq"),
    QuantConfig(4, 8, 16, w_quantizer="minmax_asymmetric", w_group_size=32),
]
WINDOWS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def write_student(directory: Path, quant: QuantConfig, dtype=torch.float32, **how) -> student_folder.Student:
    """Write a student as a training run does."""
    tiny_model(**how).to(dtype).save_pretrained(directory, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(directory)
    if quant.measures_scales:
        model = prepare(tiny_model(**how).to(dtype), quant)
        calibrate(model, tiny_model(**how), WINDOWS)
        save_tensor_scales(tensor_scales_in(model), directory)
    quant.save(directory)
    if quant.activations.learned:
        names = quant_linears(prepare(tiny_model(**how), quant))
        steps = {f"{name}{STEP_SUFFIX}": torch.tensor([0.01 + place / 1000]) for place, name in enumerate(names)}
        save_steps(steps, directory)
    return student_folder.find(directory)
