"""Export formats, by their name for ``--format``. A new one is a file here and a line in ``EXPORT_FORMATS``; a
plug-in adds its own with ``EXPORT_FORMATS.add(name, format)``."""

from qat.export.formats.base import FAKE, GGUF, ExportFormat
from qat.export.formats.compressed_tensors import FloatQuantized, IntQuantized, MXFP4Packed, NVFP4Packed, PackQuantized
from qat.export.formats.fake import Fake
from qat.export.formats.gguf import Gguf
from qat.runtime.table import Table
from qat.store.compressed_tensors import FLOAT_QUANTIZED, INT_QUANTIZED, MXFP4, NVFP4, PACK_QUANTIZED

EXPORT_FORMATS: Table[ExportFormat] = Table(
    "export format",
    **{
        PACK_QUANTIZED: PackQuantized(),
        INT_QUANTIZED: IntQuantized(),
        FAKE: Fake(),
        GGUF: Gguf(),
        FLOAT_QUANTIZED: FloatQuantized(),
        NVFP4: NVFP4Packed(),
        MXFP4: MXFP4Packed(),
    },
)

DEFAULT_EXPORT_FORMAT = PACK_QUANTIZED
"""The name of the default format."""
