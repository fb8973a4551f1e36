"""DeepSpeed's converter to universal checkpoints, in a process of its own, which reads checkpoints as data.

python -m qat.train.universal --input_folder DIR --output_folder DIR
"""

import sys
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from qat.runtime.errors import UserError
from qat.store.pickles import as_data

REFUSED = 2
"""Exit code: the last line on standard error explains why the checkpoint cannot be read."""


def main() -> int:
    given = ds_to_universal.parse_arguments()
    try:
        with as_data(Path(given.input_folder)):
            ds_to_universal.main(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
