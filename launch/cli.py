"""Shared by the entry points: dataclasses from flags and YAML, and errors without tracebacks."""

import argparse
import atexit
import importlib
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from jsonargparse import ArgumentError, ArgumentParser

from qat.runtime import launcher, malloc, progress
from qat.runtime.errors import UserError
from qat.runtime.files import utf8
from qat.runtime.ranks import are_watched, fail
from qat.runtime.table import choices_of

_FOLLOWING = 2.0
"""Seconds that a rank waits before it reports an error. An error that only follows from another rank's end, as in a
collective with it, is never reported, because this rank is ended meanwhile."""

PLACES = ("model", "base_model", "full", "teacher", "corpus", "text", "eval_text")
"""Settings that may be a path or a name. Those that are always paths have the type Path."""


def run(main: Callable[[], int | None]) -> None:
    """Call an entry point's ``main``. A UserError becomes one sentence on stderr and exit code 2. If a rank fails, all
    the ranks that work with it end."""
    # The launchers put this folder first on sys.path, where its evaluate.py would hide other packages'.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # from DeepSpeed's calls
    if not sys.stderr.isatty():
        disable_progress_bars()  # the hub's, and with it transformers' when it is imported: they redraw themselves
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    hub_logging.set_verbosity_error()  # it logs a line for each of many retries; the outcome is reported once
    if is_first_rank():
        logging.basicConfig(format="%(message)s", handlers=[progress.LogHandler()])
        logging.getLogger("qat").setLevel(logging.INFO)
    if not torch.cuda.is_available():
        malloc.keep_freed_memory()
    launcher.stop_with_launcher()
    try:
        code = main()
    except UserError as error:
        _end(f"error: {error}", code=2)
    except KeyboardInterrupt:
        _end("interrupted: the same command resumes", code=130)
    except Exception as error:
        if not are_watched():
            raise
        time.sleep(_FOLLOWING)
        traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0]
        _end(f"error: {type(error).__name__}: {first_line}", code=1)
    _leave(code or 0)


def _end(message: str, code: int) -> NoReturn:
    if are_watched():
        message, code = fail(message, code)
    elif not is_first_rank():
        time.sleep(3)  # the launchers kill all ranks when one fails: if the first one fails too, it reports for all
        message += f" (rank {rank()})"
    if message:
        print(message, file=sys.stderr, flush=True)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process. With other ranks, skip the interpreter's own shutdown: gloo's threads may still be releasing
    the last collective's tensors, and a thread that asks for the interpreter then aborts the process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()  # exit handlers of libraries: W&B's last upload
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    """Return this process's number among those that the launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    return rank() == 0


PLUGIN = "modules to import first, comma-separated: they may add quantizers, losses, methods and formats"


def import_plugins(names: str | None) -> None:
    """Import modules, separated by commas, which may be in the working directory; raise UserError if one cannot be
    imported."""
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names.split(",") if names else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--plugin={name} cannot be imported: {error}.") from error


def say(sentence: str) -> None:
    """Print a sentence, once for all ranks."""
    if is_first_rank():
        print(sentence, flush=True)


def parse(description: str, *configs: type) -> list[Any]:
    """Return one instance of each dataclass, its fields set by flags, a YAML recipe (``--config``), or their defaults.

    Flags override the recipe if they come after it. A field's help is its entry under ``Args`` in the docstring,
    followed by its choices. Raises UserError for unknown flags and for invalid values.
    """
    load_plugins()  # before the parser lists the choices
    parser = ArgumentParser(
        description=description.strip(), prog=Path(sys.argv[0]).name, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML recipe with any of the flags below")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("--plugin", help=PLUGIN)
    for config in configs:
        parser.add_class_arguments(config)
        _list_choices(parser, config)
    try:
        values = parser.parse_args()
    except ArgumentError as error:
        message = " ".join(str(error).split())
        names = ["config", "plugin", *(field.name for config in configs for field in fields(config))]
        raise UserError(f"{message}{_meant(message, names)}\n{parser.format_usage().strip()}") from error
    return [
        config(**{field.name: _at_home(field, values[field.name]) for field in fields(config)}) for config in configs
    ]


def load_plugins() -> None:
    """Import the modules of ``--plugin``, on the command line and in recipes. ``parse`` does so itself, but a command
    whose dataclasses come from a table has to do it before."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin")
    parser.add_argument("--config", action="append", default=[])
    given, _ = parser.parse_known_args()
    for names in (given.plugin, *map(_plugins_of, given.config)):
        import_plugins(names)


def _plugins_of(recipe: str) -> str | None:
    """Return a recipe's value of ``plugin``; None also for a recipe that cannot be read, which the parser rejects.

    Raises UserError if it is not UTF-8.
    """
    try:
        with utf8(Path(recipe).expanduser()) as stream:
            settings = yaml.safe_load(stream.read())
    except (OSError, RuntimeError, yaml.YAMLError):  # RuntimeError: ~ of nobody
        return None
    return settings.get("plugin") if isinstance(settings, dict) else None


def _list_choices(parser: ArgumentParser, config: type) -> None:
    """Add the choices of a dataclass's flags to their help."""
    for action in parser._actions:
        for name, thing in choices_of(config).get(action.dest, {}).items():
            action.help = f"{action.help}; {name}: {getattr(thing, 'meaning', thing)}"


def _meant(message: str, names: list[str]) -> str:
    """Return a question that suggests the flag of ``names`` closest to the one that ``message`` reports as unknown;
    empty if none is close."""
    unknown = re.search(r"^(?:unrecognized arguments: --|Option ')([\w-]+)", message)
    near = get_close_matches(unknown[1], names, n=1) if unknown else []
    return f": did you mean --{near[0]}?" if near else ""


def _at_home(field: Field, value: Any) -> Any:
    """Return the value of a setting, with "~" expanded if it is a path: shells expand it in ``--output ~/x``, but not
    in ``--output=~/x``, nor in a recipe."""
    if isinstance(value, list):
        return [_at_home(field, one) for one in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, str) and field.name in PLACES:
        return ",".join(os.path.expanduser(part) for part in value.split(","))
    return value
