"""Export formats, by their name for ``--format``. A new one is a file here and a line in ``EXPORT_FORMATS``; a
plug-in adds its own with ``EXPORT_FORMATS.add(name, format)``."""

from qat.export.formats.base import FAKE, GGUF, ExportFormat
from qat.export.formats.compressed_tensors import FloatQuantized, IntQuantized, MXFP4Packed, NVFP4Packed, PackQuantized
from qat.export.formats.fake import Fake
from qat.export.formats.gguf import Gguf
from qat.runtime.table import Table
from qat.store.compressed_tensors import FLOAT8, INTEGERS, MXFP4, NVFP4, PACKED

EXPORT_FORMATS: Table[ExportFormat] = Table(
    "export format",
    **{
        PACKED: PackQuantized(),
        INTEGERS: IntQuantized(),
        FAKE: Fake(),
        GGUF: Gguf(),
        FLOAT8: FloatQuantized(),
        NVFP4: NVFP4Packed(),
        MXFP4: MXFP4Packed(),
    },
)

DEFAULT_EXPORT_FORMAT = PACKED
"""The name of the default format."""
