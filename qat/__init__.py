"""LLM-QAT on DeepSpeed: quantization-aware training of language models, without training data.

    student = qat.prepare(AutoModelForCausalLM.from_pretrained(name), qat.QuantConfig(w_bits=4, a_bits=8, kv_bits=4))
    loss, kl = qat.Distiller(student)(input_ids, qat.TeacherTargets.of(teacher, input_ids))
    qat.save(student, "student", source=name)
    model = qat.load("student")

examples/own_loop.py is a complete training. Importing this package imports nothing else: a name's module is imported
when the name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.infer.integer_cache import IntegerCache
    from qat.infer.packed import load
    from qat.quant.config import QuantConfig
    from qat.quant.learned_scales import learn_scales, train_only_scales
    from qat.quant.prepare import calibrate, freeze, prepare
    from qat.runtime.errors import UserError
    from qat.store.student_folder import save
    from qat.train.distill import Distiller, LabelTargets, TeacherTargets, TopKTargets

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "IntegerCache",
    "LabelTargets",
    "QuantConfig",
    "TeacherTargets",
    "TopKTargets",
    "UserError",
    "calibrate",
    "freeze",
    "learn_scales",
    "load",
    "prepare",
    "save",
    "train_only_scales",
]

_HOMES = {
    "Distiller": "qat.train.distill",
    "IntegerCache": "qat.infer.integer_cache",
    "LabelTargets": "qat.train.distill",
    "QuantConfig": "qat.quant.config",
    "TeacherTargets": "qat.train.distill",
    "TopKTargets": "qat.train.distill",
    "UserError": "qat.runtime.errors",
    "calibrate": "qat.quant.prepare",
    "freeze": "qat.quant.prepare",
    "learn_scales": "qat.quant.learned_scales",
    "load": "qat.infer.packed",
    "prepare": "qat.quant.prepare",
    "save": "qat.store.student_folder",
    "train_only_scales": "qat.quant.learned_scales",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
