"""Weights that travel as codes, under ZeRO-3: no number differs from those of weights that travel as values."""

import copy
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from commands import ROOT
from compiler import needs_compiler, really_compiles
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from forked import run_ranks
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor, nn
from training import NOTHING_KEPT
from transformers import LlamaConfig, Qwen2Config

from qat.data.sequences import Row, Sample
from qat.quant import fused
from qat.quant.config import QuantConfig
from qat.quant.number_format import Format, dequantize, quantize
from qat.quant.packing import STAND_IN, makes_rows, pack_rows, stand_in, stand_in_rows
from qat.quant.quantizers import QUANTIZERS
from qat.runtime.errors import UserError
from qat.store.model_folder import ModelFolder
from qat.train import checkpoint, code_gather, deepspeed_json, engines
from qat.train.config import TrainConfig
from qat.train.deepspeed_internals import gathered_weights, own_rows
from qat.train.loop import read, take_step

STEPS = 2
VOCABULARY = {"model.embed_tokens": {"w_bits": 4}, "lm_head": {"w_bits": 4, "a_bits": 8}}
LLAMA = (LlamaConfig, {"tie_word_embeddings": False})
TIED = (Qwen2Config, {})
ODD = (LlamaConfig, {"intermediate_size": 97})
CASES = {
    "paper": (LLAMA, QuantConfig(4, 8, 4), {}),
    "tied, all of it": (TIED, QuantConfig(4, 8, 4, overrides=VOCABULARY), {}),
    "zero points in groups": (
        LLAMA,
        QuantConfig(4, 8, 4, w_quantizer="minmax_asymmetric", w_group_size=32, overrides={"*.v_proj": {"w_bits": 8}}),
        {"gradient_checkpointing": False},
    ),
    "floats": (LLAMA, QuantConfig(4, 16, 16, w_quantizer="mxfp4"), {}),
    "two in a row": (ODD, QuantConfig(3, 8, 16, w_quantizer="minmax_asymmetric"), {"micro_batch_size": 2}),
    "scales": (LLAMA, QuantConfig(4, 8, 4, overrides={"lm_head": {"w_bits": 8}}), {"train": "scales"}),
}
"""Model, quantization, and what differs in TrainConfig."""

COMPILED = "paper"
WEIGHTS = {
    "paper": 14, "tied, all of it": 15, "zero points in groups": 14, "floats": 14, "two in a row": 8, "scales": 1,
}  # fmt: skip
"""The number of weights that travel as codes: in a block of the odd model neither those whose rows are cut in two nor
the one whose codes make no pairs; of weights whose scales learn the output layer alone."""


def forms() -> Iterator[Format]:
    """Every quantizer's formats that travel as codes."""
    for quantizer, bits, group in itertools.product(QUANTIZERS, range(2, 9), (0, 32)):
        with suppress(UserError):
            form = QuantConfig(bits, 16, 16, w_quantizer=quantizer, w_group_size=group).weights
            if makes_rows(form, (12, 64), 3):
                yield form


def test_codes_that_need_more_bits_than_they_get_do_not_travel():
    assert makes_rows(Format(2, "seq"), (12, 64), 1)
    assert not makes_rows(Format(4, "seq"), (12, 64), 1)
    assert not makes_rows(Format(8, "seq"), (12, 64), 1)


def test_rows_that_are_sharded_in_groups_of_ranks_do_not_travel(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    part = {"ds_persist": False, "ds_zero_param_process_group": None, "nvme_swapper": None, "ds_shape": (12, 64)}
    rows = torch.randn(3, 64)
    for ranks, found in ((4, rows), (2, None)):
        weight = SimpleNamespace(ds_zero_partition_world_size=ranks, ds_tensor=rows.flatten(), **part)
        assert found is own_rows(weight) is None or torch.equal(own_rows(weight), found)


@pytest.mark.parametrize("form", sorted(set(forms()), key=str), ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_what_stands_in_for_a_weight_is_its_codes(form, parts):
    values = torch.randn(12, 64).bfloat16()
    weight = torch.nn.Parameter(torch.full((), torch.nan, dtype=torch.bfloat16).expand(12, 64))
    expected = quantize(values, form)
    assert stand_in(torch.nn.Parameter(values), form) is None
    for missing in (lambda: stand_in(weight, form), lambda: stand_in_rows(weight, form, torch.arange(12))):
        with pytest.raises(RuntimeError, match="released a weight before its use"):
            missing()
    setattr(weight, STAND_IN, torch.stack([pack_rows(quantize(part, form), form) for part in values.chunk(parts)]))
    found = stand_in(weight, form)
    assert torch.equal(found.codes.float(), expected.codes.float())
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found.grid, expected.grid, strict=True))
    rows = torch.tensor([[7, 0, 7], [11, 3, 4]])
    assert torch.equal(
        dequantize(stand_in_rows(weight, form, rows), values.dtype), dequantize(expected, values.dtype)[rows]
    )


@pytest.mark.parametrize(
    ("dtype", "number", "names"),
    [("bf16", 2, CASES.keys()), ("fp32", 2, ("paper", "tied, all of it")), ("bf16", 1, ("tied, all of it",))],
    ids=lambda value: value if isinstance(value, str | int) else "",
)
def test_training_on_codes_equals_training_on_values(dtype, number, names, tmp_path):
    """Bit for bit: losses, gradients, final weights, the saved student; and after a checkpoint."""
    needs_compiler()
    for (config, changes), name in ((CASES[name][0], name) for name in names):
        tiny_model(config, **changes).save_pretrained(tmp_path / name)
    run_ranks(_rank, number, number, tmp_path, dtype, tuple(names))
    for name in names:
        saved = [load_file(tmp_path / f"{name} {way}" / "final" / "model.safetensors") for way in ("codes", "values")]
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(weight, saved[1][key]) for key, weight in saved[0].items())


def _rank(rank: int, number: int, folder: Path, dtype: str, names: tuple[str, ...]) -> None:
    os.environ["QAT_PATIENCE"] = "1800"  # both ranks compile
    engines.init_distributed()
    for name in names:
        _, quant, changes = CASES[name]
        fused.compiles = really_compiles if name == COMPILED else lambda device: False
        config = TrainConfig(steps=STEPS, lr=1e-3, batch_size=4, **changes)
        ds_config = deepspeed_json.resolve(json_file(folder / f"{rank}.json", dtype), config.ds_settings(number))
        reusing = copy.deepcopy(ds_config)  # so that a pass without a backward pass leaves weights gathered
        for setting in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
            del reusing["zero_optimization"][setting]
        run = Run(str(folder / name), quant, config, deepspeed_json.for_teacher(ds_config))
        values = run.take(ds_config, folder / f"{name} values", as_codes=False)
        dropped = run.take(ds_config, folder / f"{name} codes", as_codes=True)
        # From the checkpoint of the one before.
        kept = run.take(reusing, folder / f"{name} codes", as_codes=True, room=1e9)
        assert dropped.figures == values.figures, name
        assert kept.figures == values.figures[1:], name
        assert values.gradients, name
        for other in (dropped, kept):
            assert other.gradients.keys() == values.gradients.keys(), name
            assert all(torch.equal(weight, values.saved[key]) for key, weight in other.saved.items()), name
            assert other.weights.keys() == values.weights.keys()
            assert all(torch.equal(weight, values.weights[key]) for key, weight in other.weights.items()), name
            assert all(torch.equal(grad, values.gradients[key]) for key, grad in other.gradients.items()), name
        assert not values.gathered
        assert len(kept.gathered) == 2 * WEIGHTS[name], name  # in the last step, and after it
        passes = 4 // number // config.micro_batch_size * 2  # at least, in each step
        assert len(dropped.gathered) >= STEPS * passes * WEIGHTS[name], name
        if name == "paper":  # beside bf16
            assert sum(kept.gathered) <= 0.3 * 2 * 2 * kept.elements


def json_file(path: Path, dtype: str) -> Path:
    """One by which nothing stays gathered."""
    config = json.loads((ROOT / "ds_configs" / ("zero3.json" if dtype == "bf16" else "zero3_cpu.json")).read_text())
    config["zero_optimization"] |= NOTHING_KEPT
    path.write_text(json.dumps(config))
    return path


class Sequences:
    """In the place of TrainingData."""

    def sample(self, number: int) -> Sample:
        generator = torch.Generator().manual_seed(number)
        return Sample(number, torch.randint(2, 300, (1, 12 + 5 * number), generator=generator))


@dataclass
class Taken:
    """What a run came to: its steps' figures, then those of a forward pass alone; the gradients before the last step;
    the final weights, and what is saved of them on the first rank; the bytes of each gathered weight; and the number of
    elements of weights that can be gathered so."""

    figures: list[list[float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    saved: dict[str, Tensor]
    gathered: list[int]
    elements: int


class Run:
    def __init__(self, model: str, quant: QuantConfig, config: TrainConfig, of_teacher: dict):
        self.model, self.quant, self.config = model, quant, config
        self.teacher = engines.Teacher(model, of_teacher)

    def take(self, ds_config: dict, folder: Path, as_codes: bool, room: float = 0.0) -> Taken:
        """Train to the end, from the checkpoint in ``folder`` if there is one; a new run leaves one before its last
        step, and the student. ``room`` is that for codes."""
        gathered: list[int] = []
        found: list[code_gather.WeightCodes] = []
        gather, gather_codes = code_gather.gather, code_gather.gather_codes

        def noting(part: Tensor) -> tuple[Tensor, dist.Work | None]:
            result = gather(part)
            gathered.append(result[0].nbytes)
            return result

        code_gather.gather, code_gather.gather_codes = noting, lambda *given: found.append(gather_codes(*given))
        student = engines.student_engine(
            self.model, self.quant, ds_config, self.config.lr_factor, self.config.gradient_checkpointing,
            train=self.config.train, as_codes=as_codes, room_for_codes=room,
        )  # fmt: skip
        code_gather.gather_codes = gather_codes
        student.optimizer.optimizer._optimizer_step_post_hooks.clear()  # some optimizers of DeepSpeed's call none
        state = checkpoint.resume(student, folder)
        new = state.step == 0
        figures, gradients = [], {}
        step = student.step

        def noting_gradients() -> None:
            if student.is_gradient_accumulation_boundary() and state.step == STEPS - 1:
                gradients.update({name: safe_get_full_grad(part) for name, part in learning(student)})
            step()

        student.step = noting_gradients
        while state.step < STEPS:
            stop = SimpleNamespace(received=False)
            taken = take_step(student, self.teacher, Sequences(), self.config, state, stop)
            found_figures, _ = read(taken, self.config, state, folder)
            figures.append([found_figures[name] for name in ("loss", "kl", "grad_norm")])
            for part in student.module.parameters():
                assert part.ds_status == ZeroParamStatus.NOT_AVAILABLE
                assert part.numel() == 0
                assert not hasattr(part, STAND_IN)
            if new and state.step == STEPS - 1:
                checkpoint.save(student, folder, state, keep=1)
        row = Row.of(Sequences().sample(1))
        student.eval()
        with torch.no_grad():
            figures.append(torch.stack(student(row.input_ids, self.teacher(row))).tolist())
        saved = gathered_weights(student)
        weights = {name: safe_get_full_fp32_param(part) for name, part in learning(student)}
        if new:
            engines.save_student(student, folder / "final", self.quant, ModelFolder.read(Path(self.model)).companions())
        code_gather.gather = gather
        elements = sum(part.ds_numel for own in found for part in own.parameters)
        return Taken(figures, gradients, weights, saved or {}, gathered, elements)


def learning(student: DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    return [(name, part) for name, part in student.module.named_parameters() if part.requires_grad]
