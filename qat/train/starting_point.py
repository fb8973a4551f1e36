"""Where a student starts: from the teacher's weights, or from those that another command made of them."""

import logging
from pathlib import Path

from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import head_map_weight, rotation_of
from qat.runtime.errors import UserError
from qat.store import models, student_folder
from qat.store.model_folder import head_weight, read_config, shapes, skeleton
from qat.train.config import TrainConfig
from qat.train.losses import LOSSES

_log = logging.getLogger(__name__)


def directory_of(student: Path, model: str, quant: QuantConfig) -> str:
    """Return the directory of the student's initial weights; raise UserError if ``model`` cannot teach them."""
    found = None if _is_rotated_model(student) else student_folder.find(student)
    if found and found.is_checkpoint:
        raise UserError(
            f"{student} is a checkpoint: give the final/ of a run, or the output of launch/rotate.py or "
            "launch/quantize.py."
        )
    directory = found.directory if found else Path(models.resolve_full_precision(str(student)))
    theirs, ours = shapes(skeleton(Path(model))), shapes(skeleton(directory))
    config = read_config(str(directory))
    more = {head_weight(config), head_map_weight(config)} if rotation_of(config) else set()
    if not theirs.items() <= ours.items() or not ours.keys() <= theirs.keys() | more:
        raise UserError(
            f"{student} was not made from {model}, as its weights have other names or shapes: give a student of that "
            "model."
        )
    teachers, own = models.load_tokenizer(model), models.load_tokenizer(str(directory))
    models.check_same_tokens(teachers, own, f"{model} and the student {student}")
    if quant.activations.learned:
        raise UserError(
            f"a_quantizer={quant.a_quantizer} initializes its learned step sizes from the teacher's activations: leave "
            "out --student."
        )
    if found and found.has_grids and quant.weights.quantizes and found.quant.weights != quant.weights:
        raise UserError(
            f"The weights of {student} are already rounded by {found.ptq_method or 'training'}, and other settings "
            f"would round them again: give its w_bits={found.quant.w_bits}, w_quantizer={found.quant.w_quantizer}, "
            f"w_group_size={found.quant.weights.group_size}, w_scale_dtype={found.quant.w_scale_dtype}."
        )
    return str(directory)


def grids_of(student: Path, quant: QuantConfig, config: TrainConfig) -> dict[str, Grid]:
    """Return the grids, by layer, with which the student's scales begin: those stored beside its weights. None if there
    are none, or if scales do not learn: then grids follow from the weights' values."""
    if _is_rotated_model(student) or not (found := student_folder.find(student)).has_grids:
        return {}
    if not config.trained.scales:
        grids = "train=weights ignores the weight grids of %s and computes new ones from its rounded weights."
        _log.info(grids, student)
        return {}
    if found.quant.overrides != quant.overrides:
        raise UserError(
            f"The weight grids of {student} are for overrides={found.quant.overrides!r}: give the same overrides."
        )
    return found.grids()


def _is_rotated_model(student: Path) -> bool:
    """Return whether a folder is a full-precision model that launch/rotate.py wrote."""
    is_model = (student / "config.json").is_file() and not (student / CONFIG_FILE).is_file()
    return is_model and rotation_of(read_config(str(student))) is not None


def check_teacher(cache: Path | None, quant: QuantConfig, config: TrainConfig) -> None:
    """Raise UserError for settings that need a teacher, if there is none."""
    loss = LOSSES[config.loss]
    if cache and not loss.needs_teacher:
        raise UserError(f"loss={config.loss} needs no teacher, so --teacher_cache does not apply: leave it out.")
    if cache and loss.needs_records:
        raise UserError(
            f"loss={config.loss} needs more of the teacher than the predictions in a --teacher_cache: leave it out."
        )
    if quant.activations.learned and config.micro_batch_size > 1:
        raise UserError(
            f"a_quantizer={quant.a_quantizer} scales the gradients of its steps by the tokens of a forward pass, so "
            "packed sequences would train differently from single ones: give --micro_batch_size 1."
        )
    if quant.activations.learned and (cache or not loss.needs_teacher):
        raise UserError(
            f"a_quantizer={quant.a_quantizer} initializes its learned step sizes from the teacher's activations: give "
            "a loss that runs the teacher, and no --teacher_cache."
        )
    if quant.measures_scales and (cache or not loss.needs_teacher):
        raise UserError(
            f"{quant.measured_setting} takes its scales from the teacher's activations: give a loss that runs the "
            "teacher, and no --teacher_cache."
        )


def check_rotated(begin: str, quant: QuantConfig, config: TrainConfig) -> None:
    """Raise UserError for settings that compare the teacher with a student that is rotated, whose initial weights are
    in ``begin``."""
    if LOSSES[config.loss].needs_hidden_states:
        raise UserError(
            f"loss={config.loss} compares hidden states with the teacher's, and the student's are rotated: give "
            f"another loss, or --model {begin}."
        )
    if quant.measures_scales:
        raise UserError(
            f"{quant.measured_setting} takes its scales from the teacher's activations, and the student's are "
            f"rotated: give --model {begin}."
        )
