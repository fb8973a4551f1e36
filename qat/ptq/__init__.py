"""Post-training quantization: one file for each method, and the table of methods."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.ptq.method import Method
    from qat.runtime.table import Table

    METHODS: "Table[type[Method]]"


def __getattr__(name: str) -> Any:
    """Return METHODS, made on first use: the methods import transformers, which takes seconds."""
    if name != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qat.ptq.gptq import GPTQ
    from qat.ptq.rtn import RTN
    from qat.ptq.smoothquant import SmoothQuant
    from qat.runtime.table import Table

    return globals().setdefault(name, Table("method", rtn=RTN, gptq=GPTQ, smoothquant=SmoothQuant))
