"""What users of GPUs run, here on two CPU ranks: bf16 under ZeRO-3 computes what plain bf16 computes.

Nothing stays gathered, so that every weight is sharded, fetched and released again, as those of large models are.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, finish, start_training
from compiler import needs_compiler, really_compiles
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from forked import run_ranks
from tiny import tiny_model
from torch import Tensor, nn
from training import NOTHING_KEPT
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from qat.data.sequences import Row, Sample
from qat.evaluate import heldout
from qat.evaluate.perplexity import perplexity, text_windows
from qat.infer import simulated
from qat.quant import fused
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store import models, rotate
from qat.store.model_folder import ModelFolder
from qat.train import deepspeed_json, engines
from qat.train.config import TrainConfig
from qat.train.distill import ChunkLoss, Distiller, Targets

POSITIONS = 1000
SHAPE = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "max_position_embeddings": 2048}
MODELS = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "llama3": (
        LlamaConfig,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
    ),
    "yarn": (LlamaConfig, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
    "linear": (LlamaConfig, {"rope_type": "linear", "factor": 4.0}),
}  # fmt: skip
VOCABULARY = QuantConfig(
    4, 8, 4, overrides={"model.embed_tokens": {"w_bits": 8}, "lm_head": {"w_bits": 8, "a_bits": 8}}
)
BLOCKS = QuantConfig(
    4, 8, 16, w_quantizer="ggml_q4_0", a_quantizer="ggml_q8_0", overrides={"lm_head": {"w_bits": 4, "a_bits": 8}}
)
QUANTS = (QuantConfig(4, 8, 4), QuantConfig(4, 8, 4, kv_rotation="hadamard", w_group_size=32), VOCABULARY, BLOCKS)
OF_MODEL = {"llama": QUANTS, "qwen2": (QUANTS[0], VOCABULARY)}
"""The first alone for other models."""


class Logits(Targets):
    """In place of a loss: keeps the student's logits."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.lengths = (POSITIONS,)

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        yield from [self._keep] * -(-POSITIONS // tokens)

    def _keep(self, tokens: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        self.found.append(logits.clone())
        return logits.new_zeros(()).float(), logits.new_zeros(()).float()


def test_bf16_under_zero3_equals_plain_bf16(tmp_path):
    """Student and teacher, at 1000 positions, for every family and every scaling of RoPE: bit for bit, compiled."""
    needs_compiler()
    for name, (config, changes) in MODELS.items():
        rope = {"rope_parameters": {"rope_theta": 10000.0, **changes}} if "rope_type" in changes else changes
        model = tiny_model(config, **SHAPE, **rope, tie_word_embeddings=name == "qwen2")
        model.bfloat16().save_pretrained(tmp_path / name)
    folder = ModelFolder.read(tmp_path / "qwen2")
    rotation = rotate.rotation_for(folder.config, "hadamard", untie=False)
    rotate.write(folder, tmp_path / "rotated", rotation, rotate.draw(folder.config, "hadamard", 0), {})
    run_ranks(_rank, 2, tmp_path)


def _rank(rank: int, folder: Path) -> None:
    os.environ["QAT_PATIENCE"] = "1800"  # both ranks compile
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    ds_config["zero_optimization"] |= NOTHING_KEPT
    path = folder / f"zero3-{rank}.json"
    path.write_text(json.dumps(ds_config))
    fused.compiles = really_compiles  # run_ranks has switched it off
    engines.init_distributed()
    ids = torch.randint(2, 300, (1, POSITIONS + 1), generator=torch.Generator().manual_seed(rank))
    resolved = deepspeed_json.resolve(path, TrainConfig(batch_size=2).ds_settings(2))
    for name in (*MODELS, "rotated"):
        _check_model(str(folder / name), resolved, ids, OF_MODEL.get(name, QUANTS[:1]))


@torch.no_grad()
def _check_model(model: str, ds_config: dict, ids: Tensor, quants: tuple[QuantConfig, ...]) -> None:
    plain = models.load(model, torch.bfloat16)
    teacher = engines.Teacher(model, deepspeed_json.for_teacher(ds_config))
    found = teacher(Row.of(Sample(0, ids)))
    assert torch.equal(found.hidden, predicting(plain, ids)), model
    assert torch.equal(teacher.head, plain.lm_head.weight)
    _check_released(teacher.language_model)
    for quant in quants:
        expected, found = Logits(), Logits()
        student = Distiller(prepare(models.load(model, torch.bfloat16), quant))
        student(ids, expected)
        engine = engines.student_engine(model, quant, ds_config, lambda step: 1.0, False)
        engine.eval()
        engine(ids, found)
        assert torch.equal(torch.cat(found.found), torch.cat(expected.found)), (model, quant)
        assert len(torch.cat(found.found)) == POSITIONS
        _check_released(engine.module)


def _check_released(module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE and p.numel() == 0 for p in parameters.values())


def test_an_engine_that_rounds_the_frequencies_is_refused(tmp_path):
    """As DeepSpeed does unless it is told: what is trained would not be what is served."""
    model = tiny_model(**SHAPE)
    engines._check_rope(model)
    model.model.rotary_emb.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"inv_freq is torch\.bfloat16"):
        engines._check_rope(model)
    model.model.rotary_emb.float()  # the dtype is right again, the numbers are not
    with pytest.raises(UserError, match="has rounded the model's RoPE frequencies"):
        engines._check_rope(model)


def test_learned_steps_train_under_zero3_in_bf16(tiny_directory, tiny_data, tmp_path):
    """And the student that is saved computes with the steps that the engine had."""
    run = tmp_path / "run"
    places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={run}"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
    held_out = [f"--eval_text={ROOT / 'LICENSE'}", "--eval_window=64", "--eval_sequences=2"]
    finish(start_training(2, *places, json_file, *held_out, "--steps=3", "--batch_size=2", "--a_quantizer=lsq"))
    windows = text_windows(heldout.paragraphs(str(ROOT / "LICENSE")), models.load_tokenizer(str(tiny_directory)), 64, 2)
    found = perplexity(simulated.load(str(run / "final"), torch.bfloat16), windows).perplexity
    assert found == pytest.approx(json.loads((run / "log.jsonl").read_text().splitlines()[-1])["ppl_text"], rel=1e-3)
