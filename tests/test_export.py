"""Exports: what was trained is what is written, read back, and read by others."""

import ctypes
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import xllamacpp
from commands import ROOT, error_of, finish, run_python, start_training
from faults import flip
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from students import SETTINGS, WINDOWS, write_student
from tiny import FAMILIES, LONGROPE, ids, rope, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from qat.export import export, model_card
from qat.export.formats import EXPORT_FORMATS, FAKE, GGUF
from qat.infer import simulated
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.linear import can_multiply_codes, quant_linears
from qat.quant.number_format import Format, Quantized, dequantize, grid_of, quantize
from qat.quant.prepare import prepare
from qat.quant.quantizers import QUANTIZERS, quantizers_of
from qat.quant.quantizers.base import Grid
from qat.runtime import machine
from qat.runtime.errors import UserError
from qat.runtime.files import MANIFEST
from qat.store import compressed_tensors, gguf_files, models, student_folder
from qat.store.compressed_tensors import INT_QUANTIZED, LAYOUTS, PACK_QUANTIZED
from qat.store.sidecars import GRIDS_FILE, load_steps, save_grids

ASYMMETRIC = [(bits, "minmax_asymmetric") for bits in (2, 4, 8)]
SYMMETRIC = [
    name for name, by in quantizers_of("weights").items() if by.symmetric and by.grid_gives_codes and not by.is_float
]


@pytest.fixture
def exported(tmp_path) -> Path:
    export.export(
        write_student(tmp_path / "final", QuantConfig()), tmp_path / "export", PACK_QUANTIZED, file_bytes=100_000
    )
    return tmp_path / "export"


@pytest.mark.parametrize("form", [PACK_QUANTIZED, INT_QUANTIZED])
@pytest.mark.parametrize("quant", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reloaded_equals_what_was_trained(form, quant, dtype, tmp_path):
    student = write_student(tmp_path / "final", quant, dtype)
    if form == INT_QUANTIZED and (quant.weights.group_size or quant.a_bits == 16):
        with pytest.raises(UserError, match=r"[Gg]ive --format pack-quantized"):
            export.check(student, form)
        return
    export.export(student, tmp_path / "export", form)
    trained = prepare(models.load(str(tmp_path / "final"), dtype), quant)  # not frozen: as it is trained
    load_steps(trained, tmp_path / "final")
    reloaded = simulated.load(str(tmp_path / "export"), dtype)
    assert torch.equal(reloaded(ids(reloaded)).logits, trained(ids(trained)).logits)


def test_weights_are_rounded_in_the_dtype_that_was_trained(tmp_path):
    """Their values lie on the grid of bf16 numbers rounded to bf16, also where fp32 computes."""
    form = QuantConfig(4, 8, 4).weights
    export.export(
        write_student(tmp_path / "final", QuantConfig(4, 8, 4), torch.bfloat16), tmp_path / "export", PACK_QUANTIZED
    )
    weight = tiny_model().model.layers[0].mlp.up_proj.weight.bfloat16()
    expected = dequantize(quantize(weight, form), torch.bfloat16).float()
    assert not torch.equal(expected, dequantize(quantize(weight, form), torch.float32))
    for place in ("final", "export"):
        loaded = simulated.load(str(tmp_path / place), torch.float32)
        assert torch.equal(loaded.get_parameter("model.layers.0.mlp.up_proj.weight"), expected)


@pytest.mark.parametrize("quant", [q for q in SETTINGS if can_multiply_codes(q.weights, q.activations)], ids=str)
def test_integers_are_evaluated_as_they_were_trained(quant, tmp_path):
    export.export(write_student(tmp_path / "final", quant), tmp_path / "export", INT_QUANTIZED)
    trained = prepare(models.load(str(tmp_path / "final"), torch.float32), quant)
    for place in ("final", "export"):
        evaluated = simulated.load(str(tmp_path / place), torch.float32)
        assert torch.equal(evaluated(ids(evaluated)).logits, trained(ids(trained)).logits)


@pytest.mark.parametrize("form", [PACK_QUANTIZED, INT_QUANTIZED, FAKE])
def test_weights_stay_on_a_grid_that_is_stored_beside_them(form, tmp_path):
    """GPTQ's: the largest weight of a channel need not have the largest code."""
    quant = QuantConfig(4, 16, 16) if form == PACK_QUANTIZED else QuantConfig(4, 8, 16)
    student = write_student(tmp_path / "final", quant)
    grids, values = {}, tiny_model().state_dict()
    for name in quant_linears(prepare(tiny_model(), quant)):
        grids[name] = Grid(grid_of(values[f"{name}.weight"], quant.weights).scale * 1.2)
    save_grids(grids, tmp_path / "final" / GRIDS_FILE)
    export.export(student, tmp_path / "export", form)
    export.verify(student, tmp_path / "export", form, WINDOWS)
    read = simulated.load(str(tmp_path / "export"), torch.float32)
    for name, grid in grids.items():
        expected = quantize(values[f"{name}.weight"], quant.weights, grid)
        linear = read.get_submodule(name)
        assert torch.equal(linear.weight, dequantize(expected, torch.float32))
        assert form != INT_QUANTIZED or torch.equal(linear.codes, expected.codes)


@pytest.mark.parametrize("form", [PACK_QUANTIZED, INT_QUANTIZED])
@pytest.mark.parametrize(
    ("w_bits", "w_quantizer"),
    [
        *((bits, "minmax") for bits in (2, 3, 4, 5, 8)),
        (4, "minmax_full"),
        (8, "minmax_signed"),
        (2, "seq"),
        *ASYMMETRIC,
    ],
)
def test_transformers_own_loader_reads_the_same_weights(form, w_bits, w_quantizer, tmp_path):
    group = 16 if (w_bits, w_quantizer) == (4, "minmax_asymmetric") else 0
    quant = QuantConfig(w_bits, 8, 16, w_quantizer=w_quantizer, w_group_size=group)
    student = write_student(tmp_path / "final", quant)
    if form == INT_QUANTIZED and w_quantizer == "minmax_asymmetric":
        with pytest.raises(UserError, match=r"[Gg]ive --format pack-quantized"):
            export.check(student, form)
        return
    export.export(student, tmp_path / "export", form)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    ours = simulated.load(str(tmp_path / "export"), torch.float32)
    tokens = ids(ours)
    logits = theirs(tokens).logits  # it decompresses at the first call
    for name, weight in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name), weight), name
    # Activations it rounds to max/127.5, not max/127, so the logits are only close.
    assert (logits - ours(tokens).logits).abs().mean() < 0.1 * logits.abs().mean()


@given(
    st.sampled_from([(PACK_QUANTIZED, "minmax"), (INT_QUANTIZED, "minmax"), (PACK_QUANTIZED, "minmax_asymmetric")]),
    st.integers(2, 8),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_the_formats_keep_codes_and_grids(format_and_quantizer, bits, rows, columns):
    form, quantizer = format_and_quantizer
    quant = QuantConfig(w_bits=bits, w_quantizer=quantizer)
    stored = quantize(torch.randn(rows, columns), quant.weights)
    parts = LAYOUTS[form].encode("layer", stored, quant.weights)
    ((name, read),) = compressed_tensors.decode(
        parts.items(), LAYOUTS[form].quantization_config({"layer": quant}, [], {})
    )
    assert name == "layer.weight"
    assert isinstance(read, Quantized)
    assert torch.equal(read.codes, stored.codes)
    for part, expected in zip(read.grid, stored.grid, strict=True):
        assert part is expected is None or torch.equal(part, expected)
    config = LAYOUTS[form].quantization_config({"layer": quant}, [], {})
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert shapes == {
        name: shape for name, (shape, _) in compressed_tensors.layout("layer", (rows, columns), config).items()
    }


def test_sizes_are_what_the_formats_promise(tmp_path):
    student = write_student(tmp_path / "final", QuantConfig())
    weights = {name for name, weight in student.weights() if isinstance(weight, Quantized)}
    for form, bits in ((PACK_QUANTIZED, 4), (INT_QUANTIZED, 8)):
        export.export(student, tmp_path / form, form)
        stored = load_file(tmp_path / form / "model.safetensors")
        codes = "weight_packed" if form == PACK_QUANTIZED else "weight"
        for name in weights:
            layer = name.removesuffix(".weight")
            parameter = tiny_model().get_parameter(name)
            assert stored[f"{layer}.{codes}"].nbytes * 8 == parameter.numel() * bits
            assert stored[f"{layer}.weight_scale"].dtype == torch.float32  # as training simulated it


@pytest.mark.parametrize("config_class", FAMILIES)
def test_fake_exports_are_plain_models(config_class, tmp_path):
    quant = QuantConfig(4, 16, 16)
    student = write_student(tmp_path / "final", quant, config_class=config_class)
    export.export(student, tmp_path / "export", FAKE)
    assert not (tmp_path / "export" / CONFIG_FILE).exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    trained = prepare(tiny_model(config_class), quant)
    torch.testing.assert_close(plain(ids(plain)).logits, trained(ids(trained)).logits)


@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 3), st.sampled_from([*SYMMETRIC, "minmax_asymmetric"]))
def test_gguf_blocks_hold_every_code(bits, rows, blocks, quantizer):
    """Read by gguf's own dequantizer: codes times the scale that fp16 holds."""
    form = Format(bits if bits in QUANTIZERS[quantizer].allowed_bits else 2, quantizer)
    if not form.symmetric:
        form = Format(min(bits, 4), quantizer)
    weight = torch.randn(rows, 32 * blocks)
    quantized = quantize(weight, form)
    kind = gguf_files.type_of(form)
    packed = gguf_files.blocks(quantized._replace(grid=quantized.grid.map(lambda part: part.expand(-1, blocks))), kind)
    held = gguf_files.held(quantized, form)
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(packed, kind)), held)
    largest = (weight.abs().amax(-1, keepdim=True) + quantized.grid.scale.abs()) * 2**-10
    assert ((held - dequantize(quantized, torch.float32)).abs() <= largest).all()


@pytest.mark.parametrize("quantizer", ["minmax_full", "minmax_signed"])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_llama_cpps_kernels_multiply_the_lowest_code_and_negative_scales(bits, quantizer):
    """Its dot products of our blocks with activations in Q8_0, as its CPU kernels compute them."""
    engine = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    engine.ggml_cpu_init()
    generator = torch.Generator().manual_seed(bits)
    form, rows = Format(bits, quantizer), torch.randn(16, 256, generator=generator)
    x = torch.randn(256, generator=generator)
    codes, grid = quantize(rows, form)
    assert (codes == form.code_range[0]).any()
    kind = gguf_files.type_of(form)
    weights = gguf_files.blocks(Quantized(codes, grid.map(lambda part: part.expand(-1, 8))), kind)
    inputs = gguf.quants.quantize(x.numpy()[None], gguf.GGMLQuantizationType.Q8_0)
    dot = getattr(engine, f"ggml_vec_dot_{kind.name.lower()}_q8_0")
    pointer, step = ctypes.c_void_p, ctypes.c_size_t(0)
    values = torch.from_numpy(gguf.quants.dequantize(inputs, gguf.GGMLQuantizationType.Q8_0))[0]
    for row, expected in zip(
        weights, gguf_files.held(Quantized(codes, grid), form).double() @ values.double(), strict=True
    ):
        found = ctypes.c_float()
        row, theirs = np.ascontiguousarray(row), np.ascontiguousarray(inputs)
        dot(256, ctypes.byref(found), step, pointer(row.ctypes.data), step, pointer(theirs.ctypes.data), step, 1)
        assert found.value == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_BY_HAND = rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.0)
BIASES = {"attention_bias": True, "mlp_bias": True}
QWEN3 = {"head_dim": 128}  # which transformers' reader takes for granted
SAID = [
    (LlamaConfig, {}),
    (LlamaConfig, LLAMA3 | BIASES),
    (LlamaConfig, rope("dynamic", factor=4.0)),
    (MistralConfig, rope("linear", factor=1.7)),
    (MistralConfig, {"sliding_window": 24}),
    (Qwen2Config, YARN),
    (Qwen3Config, QWEN3 | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
]


def write_biased_student(directory: Path, quant: QuantConfig, **how) -> student_folder.Student:
    """``write_student``, whose biases are 0."""
    student = write_student(directory, quant, **how)
    for file in directory.glob("model*.safetensors"):
        tensors = load_file(file)
        biases = {name: torch.randn(tensor.shape) for name, tensor in tensors.items() if name.endswith("bias")}
        save_file(tensors | biases, file, metadata={"format": "pt"})
    return student


@pytest.mark.parametrize(("config_class", "said"), SAID)
def test_gguf_is_read_back_by_transformers(config_class, said, tmp_path):
    student = write_biased_student(tmp_path / "final", QuantConfig(), config_class=config_class, **said)
    assert EXPORT_FORMATS[GGUF].max_positions(student) == said.get("sliding_window", 256)
    export.check(student, GGUF)
    export.export(student, tmp_path / "export", GGUF)
    found = export.verify(student, tmp_path / "export", GGUF, WINDOWS)  # bit for bit, or UserError
    assert found.exported == found.expected != found.trained


@pytest.mark.parametrize(
    ("config_class", "said", "quant"),
    [
        (LlamaConfig, LLAMA3 | BIASES, QuantConfig()),
        (Qwen2Config, YARN, QuantConfig()),
        (LlamaConfig, {"intermediate_size": 128}, QuantConfig(w_quantizer="nvfp4")),
        (Qwen2Config, {}, QuantConfig(w_quantizer="mxfp4")),
    ],
)
def test_llama_cpp_predicts_what_the_file_says(config_class, said, quant, tmp_path):
    """llama.cpp's own kernels, which round activations to 8 bits in blocks of 32 and cache fp16, against fp32."""
    student = write_biased_student(tmp_path / "final", quant, config_class=config_class, **said)
    export.export(student, tmp_path / "export", GGUF)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "export" / gguf_files.FILE)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
    server = xllamacpp.Server(settings)
    model = gguf_files.load(tmp_path / "export")
    compared = 0
    for prompt in torch.randint(2, 300, (12, 24), generator=torch.Generator().manual_seed(1)):
        asked = {"prompt": prompt.tolist(), "max_tokens": 1, "temperature": 0.0, "logprobs": 4, "ignore_eos": True}
        (choice,) = server.handle_completions(asked)["choices"]
        if choice["logprobs"] is None:
            continue  # the token is a part of a character, and llama.cpp waits for the rest
        first, *others = choice["logprobs"]["content"][0]["top_logprobs"]
        logits = model(prompt[None]).logits[0, -1]
        for seen in others:  # differences: without the end token the others share its probability
            expected = (logits[seen["id"]] - logits[first["id"]]).item()
            assert seen["logprob"] - first["logprob"] == pytest.approx(expected, abs=0.1)
            compared += 1
    assert compared >= 9


SIGNED = {"*.q_proj": {"w_quantizer": "minmax_signed"}}


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(4, 8, 16, w_quantizer="minmax_asymmetric", w_group_size=32),
        QuantConfig(
            3, 8, 16, w_quantizer="minmax_asymmetric", overrides={"*.q_proj": {"w_quantizer": "minmax_signed"}}
        ),
        QuantConfig(2, 8, 16, w_quantizer="seq"),
    ],
    ids=["Q4_1, groups", "Q4_1 and Q4_0, channels", "odd codes"],
)
def test_gguf_holds_zero_points_negative_scales_and_odd_codes(quant, tmp_path):
    """As transformers reads them, bit for bit; and llama.cpp loads the file."""
    student = write_student(tmp_path / "final", quant)
    export.check(student, GGUF)
    export.export(student, tmp_path / "export", GGUF)
    assert "llama.cpp loads it" in export.verify(student, tmp_path / "export", GGUF, WINDOWS).engine


@pytest.mark.parametrize("form", [PACK_QUANTIZED, INT_QUANTIZED, GGUF, FAKE])
def test_an_export_is_verified_on_the_cpu_wherever_inference_runs(form, monkeypatch, tmp_path):
    """A GPU, which sums in another order, would not give the student's bits."""
    student = write_student(tmp_path / "final", QuantConfig(4, 8, 16))
    export.export(student, tmp_path / "export", form)
    monkeypatch.setattr(machine, "device", lambda: torch.device("meta"))
    export.verify(student, tmp_path / "export", form, WINDOWS)


def write_sentencepiece(directory: Path, tokens: int, text: str) -> None:
    """A tokenizer.model of ``tokens`` pieces, and a <pad> beyond them, as forks of Llama-2 have it."""
    for file in directory.glob("tokenizer*"):
        file.unlink()
    (directory / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=directory / "text", model_prefix=directory / "tokenizer", vocab_size=tokens, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": tokens}))
    pad = {"content": "<pad>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"pad_token": "<pad>", "added_tokens_decoder": {str(tokens): pad | {"single_word": False}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_llama_cpp_loads_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    student = write_student(tmp_path / "final", QuantConfig(), vocab_size=340, bos_token_id=1, eos_token_id=2)
    write_sentencepiece(tmp_path / "final", 340, (ROOT / "LICENSE").read_text())
    export.export(student, tmp_path / "export", GGUF)
    verified = export.verify(student, tmp_path / "export", GGUF, WINDOWS)
    assert "bit for bit, and llama.cpp loads it." in verified.sentence("random tokens")


def test_tokens_of_a_sentencepiece_model_are_typed_as_its_tokenizer_says(tmp_path):
    """Those that chat templates write must be found whole, and special ones not in a user's text."""
    student = write_student(tmp_path / "final", QuantConfig(), vocab_size=344, bos_token_id=1, eos_token_id=2)
    write_sentencepiece(tmp_path / "final", 340, (ROOT / "LICENSE").read_text())
    file = tmp_path / "final" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"add_prefix_space": False}
    pad = config["added_tokens_decoder"]["340"]
    config["added_tokens_decoder"] |= {"341": pad | {"content": "<|im_start|>"}}
    config["added_tokens_decoder"] |= {"342": pad | {"content": "<tool>", "special": False}}
    file.write_text(json.dumps(config))
    (tmp_path / "final" / "added_tokens.json").unlink()
    export.export(student, tmp_path / "export", GGUF)
    fields = gguf.GGUFReader(tmp_path / "export" / gguf_files.FILE).fields
    kinds, texts = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("token_type", "tokens"))
    kind = gguf.TokenType
    assert texts[339:] == [texts[339], "<pad>", "<|im_start|>", "<tool>", "[PAD343]"]
    assert kinds[339:] == [kind.NORMAL, kind.CONTROL, kind.CONTROL, kind.USER_DEFINED, kind.UNUSED]
    assert kinds[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert not fields["tokenizer.ggml.add_space_prefix"].contents()
    assert "llama.cpp loads it" in export.verify(student, tmp_path / "export", GGUF, WINDOWS).engine


def test_a_gguf_file_needs_no_room_elsewhere_and_keeps_fp16(monkeypatch, tmp_path):
    """A model's size may be more than the system's folder for temporary files holds."""
    student = write_student(tmp_path / "final", QuantConfig(), torch.float16)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    export.export(student, tmp_path / "export", GGUF)
    assert [path.name for path in (tmp_path / "export").iterdir() if path.suffix != ".json"] == [gguf_files.FILE]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "export" / gguf_files.FILE).tensors}
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    monkeypatch.undo()
    export.verify(student, tmp_path / "export", GGUF, WINDOWS)


def test_how_a_text_is_split_is_found_in_files_that_do_not_say_all_of_it(tmp_path):
    """As tokenizers wrote them before ByteLevel had the setting ``use_regex``."""
    write_student(tmp_path, QuantConfig())
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    assert content["pre_tokenizer"].pop("use_regex")
    file.write_text(json.dumps(content))
    assert gguf_files._split(tmp_path) == "gpt-2"
    content["pre_tokenizer"] = {"pretokenizers": [{"type": "Digits"}, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="splits text in a way that is not mapped"):
        gguf_files._split(tmp_path)


@pytest.mark.parametrize("damaged", ["tokenizer.model", "added_tokens.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_no_gguf_file(damaged, tmp_path):
    student = write_student(tmp_path / "final", QuantConfig(), vocab_size=340, bos_token_id=1, eos_token_id=2)
    write_sentencepiece(tmp_path / "final", 340, (ROOT / "LICENSE").read_text())
    (tmp_path / "final" / damaged).write_bytes((tmp_path / "final" / damaged).read_bytes()[:10])
    with pytest.raises(UserError, match="is damaged"):
        gguf_files.check(student)


def test_llama_cpp_is_not_waited_for_without_end(monkeypatch, tmp_path):
    """Nor is the export called verified then; it is where llama.cpp is not installed, and that is said."""
    student = write_student(tmp_path / "final", QuantConfig())
    export.export(student, tmp_path / "export", GGUF)
    monkeypatch.setattr(gguf_files, "_LOAD", "import time; time.sleep(60)")
    monkeypatch.setattr(gguf_files, "_LOADING", 0.2)
    said = export.verify(student, tmp_path / "export", GGUF, WINDOWS).sentence("random tokens")
    assert said.startswith("Read back, not verified, the export gives the logits of the model in memory")
    assert "timed out" in said
    monkeypatch.setattr(gguf_files, "is_installed", lambda: False)
    said = export.verify(student, tmp_path / "export", GGUF, WINDOWS).sentence("random tokens")
    assert said.startswith("Verified: ")
    assert "xllamacpp is not installed" in said


def test_what_llama_cpp_does_not_load_is_not_verified(tmp_path):
    student = write_student(tmp_path / "final", QuantConfig())
    export.export(student, tmp_path / "export", GGUF)
    file = tmp_path / "export" / gguf_files.FILE
    content = file.read_bytes()
    assert content.count(b"gpt-2") == 1, "the way in which text is split; transformers does not read it"
    file.write_bytes(content.replace(b"gpt-2", b"gpt-0"))
    with pytest.raises(UserError, match=r"llama.cpp does not load it \(.*gpt-0"):
        export.verify(student, tmp_path / "export", GGUF, WINDOWS)


@pytest.mark.parametrize("form", [PACK_QUANTIZED, INT_QUANTIZED, FAKE, GGUF])
def test_verification_sees_one_wrong_code(form, tmp_path):
    student = write_student(tmp_path / "final", QuantConfig())
    export.export(student, tmp_path / "export", form)
    export.verify(student, tmp_path / "export", form, WINDOWS)
    file = tmp_path / "export" / (gguf_files.FILE if form == GGUF else "model.safetensors")
    data = bytearray(file.read_bytes())
    data[-2000 if form == GGUF else len(data) // 2] ^= 3
    file.write_bytes(data)
    with pytest.raises(UserError, match="is wrong"):
        export.verify(student, tmp_path / "export", form, WINDOWS)


@pytest.fixture(scope="module", params=[(2, "zero3_cpu.json"), (1, "zero3.json")], ids=["2 ranks fp32", "1 rank bf16"])
def run(request, tiny_directory, tiny_data, tmp_path_factory) -> Path:
    """A short real run, and its last ZeRO-3 checkpoint."""
    ranks, ds_config = request.param
    output = tmp_path_factory.mktemp("run") / "run"
    places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={output}"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / ds_config}"
    finish(start_training(ranks, *places, json_file, "--steps=2", "--lr=1e-3", "--save_every=2"))
    return output


def test_a_zero3_checkpoint_gives_the_export_of_the_final_model(run, tmp_path, capsys):
    export.export(student_folder.find(run / "final"), tmp_path / "final", PACK_QUANTIZED)
    capsys.readouterr()
    export.export(student_folder.find(run / "checkpoints"), tmp_path / "checkpoint", PACK_QUANTIZED)
    said = capsys.readouterr().err
    assert "Gathering sharded weights" in said
    assert "\r" not in said, "a bar that redraws itself, in a log file"
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "checkpoint"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    for place in ("final", "checkpoint"):
        found = simulated.load(str(tmp_path / place), torch.float32)
        assert found.config.eos_token_id == 1
        assert models.load_tokenizer(str(tmp_path / place)).bos_token == "<s>"


CHECKPOINT_DAMAGES = {
    "another checksum": flip,
    "is missing": Path.unlink,
    "half-written": lambda file: (file.parent / MANIFEST).unlink(),
}


@pytest.mark.parametrize("found", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_refused(found, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    CHECKPOINT_DAMAGES[found](max(checkpoint.glob("*_optim_states.pt")))
    with pytest.raises(UserError, match=f"damaged or incomplete: .*{found}"):
        student_folder.find(checkpoint)


def test_another_model_than_the_run_began_with_is_refused(run, tmp_path):
    tiny_model(hidden_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"^[^(]* is not the starting model of the run"):
        student_folder.find(run / "checkpoints", str(tmp_path / "other"))


def test_one_file_and_one_tensor_are_in_memory_at_a_time(tmp_path):
    """Anonymous memory while a 200 MB student is exported; what is mapped from files does not count."""
    big = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    student = write_student(tmp_path / "final", QuantConfig(), **big)
    list(student.weights())  # compiled and imported now
    before = peak = _anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    export.export(student, tmp_path / "export", FAKE, file_bytes=10_000_000)
    done.set()
    watcher.join()
    size = sum(file.stat().st_size for file in (tmp_path / "export").glob("*.safetensors"))
    assert size > 150e6
    assert peak - before < 80e6


def _anonymous_memory() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def _cut_short(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def _no_scale(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if not n.endswith("up_proj.weight_scale")}, file)


def _wider(directory: Path) -> None:
    _edit(directory / "config.json", hidden_size=128)


def _fewer_layers(directory: Path) -> None:
    _edit(directory / "config.json", num_hidden_layers=1)


def _more_layers(directory: Path) -> None:
    _edit(directory / "config.json", num_hidden_layers=3)


def _edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    _cut_short: "is damaged",
    _no_scale: "it lacks model.layers.0.mlp.up_proj.weight_scale",
    _wider: "does not match its config.json",
    _fewer_layers: "does not match its config.json",
    _more_layers: "is incomplete: it lacks",
    lambda directory: sorted(directory.glob("*.safetensors"))[0].unlink(): "is missing",
    lambda directory: (directory / CONFIG_FILE).write_text("{"): "quant_config.json is damaged",
    lambda directory: _edit(directory / CONFIG_FILE, w_bits="four"): "is damaged (w_bits is 'four')",
    lambda directory: (directory / "config.json").write_text("{"): "cannot be read",
    lambda directory: [file.unlink() for file in directory.glob("tokenizer*")]: "tokenizer",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=range(len(DAMAGES)))
def test_damaged_exports_are_refused_with_a_sentence(damage, message, exported, monkeypatch):
    damage(exported)
    assert message in error_of(monkeypatch, "chat", f"--model={exported}", "--prompt=hello", "--max_new_tokens=1")


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    def refusal(quant: QuantConfig, form: str, **how) -> str:
        shutil.rmtree(tmp_path / "final", ignore_errors=True)
        write_student(tmp_path / "final", quant, **how)
        flags = [f"--checkpoint={tmp_path / 'final'}", f"--output={tmp_path / 'export'}", f"--format={form}"]
        message = error_of(monkeypatch, "export", *flags)
        assert not (tmp_path / "export").exists()
        return message

    assert "w_bits=16" in refusal(QuantConfig(16, 8, 4), PACK_QUANTIZED)
    assert "give --format pack-quantized" in refusal(QuantConfig(w_quantizer="minmax_asymmetric"), INT_QUANTIZED)
    eight_bits = QuantConfig(8, w_quantizer="minmax_asymmetric")
    assert "w_bits=8 fits no GGUF type. Give --format hf-fake." in refusal(eight_bits, GGUF)
    assert "multiple of 32" in refusal(QuantConfig(w_group_size=16), GGUF)
    assert "hidden_act='gelu', where llama.cpp computes silu" in refusal(QuantConfig(), GGUF, hidden_act="gelu")
    for family, said in ((LlamaConfig, LONGROPE), (Qwen2Config, LLAMA3), (LlamaConfig, YARN_BY_HAND)):
        assert "rope_" in refusal(QuantConfig(), GGUF, config_class=family, **said)
    assert "attention_bias=True" in refusal(QuantConfig(), GGUF, config_class=Qwen3Config, attention_bias=True)
    assert "choose pack-quantized or int-quantized or hf-fake or gguf" in refusal(QuantConfig(), "onnx")
    (tmp_path / "final" / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match="is not a student"):
        student_folder.find(tmp_path / "final")


def test_an_export_is_not_exported_again(exported):
    with pytest.raises(UserError, match="is an export: give"):
        student_folder.find(exported)


def test_a_student_without_a_tokenizer_is_refused(tmp_path):
    student = write_student(tmp_path / "final", QuantConfig())
    for file in (tmp_path / "final").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        export.check(student, PACK_QUANTIZED)


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("w_group_size", [0, 32])
def test_scales_in_the_dtype_of_an_engine_change_nothing_there(scales, w_group_size, tmp_path):
    """vLLM keeps them in the model's dtype, and GGUF in fp16."""
    name = str(scales).removeprefix("torch.")
    quant = QuantConfig(4, 8, 16, w_group_size=w_group_size, w_scale_dtype=name)
    student = write_student(tmp_path / "final", quant, scales)
    export.export(student, tmp_path / "export", PACK_QUANTIZED)
    export.verify(student, tmp_path / "export", PACK_QUANTIZED, WINDOWS)
    stored, weights = load_file(tmp_path / "export" / "model.safetensors"), tiny_model().to(scales).state_dict()
    for layer in quant_linears(prepare(tiny_model(), quant)):
        scale = stored[f"{layer}.weight_scale"]
        assert torch.equal(scale.to(scales).float(), scale)
        assert torch.equal(scale, grid_of(weights[f"{layer}.weight"], quant.weights).scale)
    assert not any("vLLM keeps these scales" in said for said in EXPORT_FORMATS[PACK_QUANTIZED].all_deviations(student))
    other = replace(student, dtype=torch.float32)
    assert any(f"exact with --dtype {name}" in said for said in EXPORT_FORMATS[PACK_QUANTIZED].all_deviations(other))
    assert any("rounded to fp16" in said for said in EXPORT_FORMATS[GGUF].all_deviations(student)) == (
        name != "float16"
    )


def test_what_engines_will_do_differently_is_said():
    said = " ".join(EXPORT_FORMATS[PACK_QUANTIZED].deviations(QuantConfig(3, 6, 4)))
    assert "trained with 6 bits" in said
    assert "rounded to 8" in said
    assert "3-bit codes are declared as 4-bit" in said
    assert "trained with 4 bits" in said
    assert "KV cache" in said
    assert not EXPORT_FORMATS[FAKE].deviations(QuantConfig(4, 16, 16))
    for a_bits, quantizer, trained in (
        (8, "minmax", "max/127;"),
        (8, "minmax_full", "max/127.5;"),
        (8, "mse", "mse;"),
        (6, "minmax", "max/31;"),
    ):
        said = " ".join(EXPORT_FORMATS[PACK_QUANTIZED].deviations(QuantConfig(4, a_bits, 16, a_quantizer=quantizer)))
        engines = "vLLM quantizes them with scale max/127 per token, transformers' own loader with max/127.5."
        assert f"Activations: training used {trained} {engines}" in said


def test_the_snippets_of_card_and_docs_run_as_they_stand(tmp_path, monkeypatch, capsys):
    student, folder = write_student(tmp_path / "final", QuantConfig()), tmp_path / "export" / "NAME"
    folder.parent.mkdir()
    export.export(student, folder, PACK_QUANTIZED)
    model_card.write(student, PACK_QUANTIZED, model_card.Origin("nobody/tiny", ""), "", folder)
    for file, place in {folder / "README.md": folder.parent, ROOT / "docs" / "export.md": tmp_path}.items():
        (snippet,) = re.findall(r"```python\n(import qat\n.*?)```", file.read_text(), re.DOTALL)
        monkeypatch.chdir(place)
        exec(snippet, {})
        assert capsys.readouterr().out.startswith("<s>"), file


def test_the_card_says_what_the_student_learned_and_refuses_damaged_data(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    student = write_student(tmp_path / "final", QuantConfig())
    for loss, learned in (("logits", "full-precision model's next-token distributions"), ("label", "next tokens of")):
        run = {"settings": {"loss": loss, "data": "x"}}
        assert f"The student learned the {learned}" in model_card._training(replace(student, run=run))
    with pytest.raises(UserError, match=f"{MANIFEST} is damaged"):
        model_card._training(replace(student, run=run | {"data": str(tmp_path)}))


@pytest.mark.parametrize(
    ("model", "declared", "named"),
    [
        ("folder", "base_model: 'nobody/tiny'", "base_model: nobody/tiny"),
        ("folder", "", ""),
        ("nobody/tiny", "", "base_model: nobody/tiny"),
    ],
)
def test_the_card_of_a_quantized_model_names_its_base_model(model, declared, named, tmp_path, monkeypatch):
    """The hub's name, never a path of this machine."""
    tiny_model().save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "README.md").write_text(f"---\n{declared}\nlicense: cc0-1.0\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_download", lambda name: str(tmp_path / "folder"))
    monkeypatch.setattr(sys, "argv", ["quantize.py", f"--model={model}", "--output=rtn"])
    import_module("launch.quantize").main()
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint=rtn", "--output=export", "--verify=false"])
    import_module("launch.export").main()
    front, text = (tmp_path / "export" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert [line for line in front.splitlines() if line.startswith("base_model")] == [named] * bool(named)
    assert f"{named.removeprefix('base_model: ') or 'folder'} in low precision, by rtn." in text


def test_one_command_writes_a_model_its_card_and_what_was_verified(run, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text())
    result = tmp_path / "result.json"
    run_python(
        "evaluate", f"--model={run / 'final'}", f"--text={text}", "--window=64", "--windows=2", f"--output={result}"
    )
    flags = [f"--output={tmp_path / 'export'}", f"--text={text}", "--base_model=nobody/tiny", "--license=cc0-1.0"]
    said = run_python("export", f"--checkpoint={run / 'final'}", f"--results=[{result}]", *flags).stdout
    assert "bit for bit" in said
    assert "differs: KV cache: trained with 4 bits" in said
    card = (tmp_path / "export" / "README.md").read_text()
    (score,) = json.loads(result.read_text())["texts"].values()
    assert card.startswith("---\nbase_model: nobody/tiny\nlicense: cc0-1.0\n")
    assert f"perplexity {score['perplexity']:.3f}" in card
    for fact in ("W-A-KV 4-8-4", "lr 0.001", "steps 2", "vllm serve", "bit for bit", "KV cache: trained with 4 bits"):
        assert fact in card
