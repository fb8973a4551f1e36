"""Settings per layer: which layers get them, and that they hold all the way to an export."""

import pytest
import torch
from students import write_student
from tiny import ids, tiny_model

import qat
from launch import cli
from qat.evaluate.perplexity import perplexity
from qat.export import export
from qat.export.formats import EXPORT_FORMATS
from qat.infer import simulated
from qat.ptq import gptq
from qat.ptq.stream import Stream
from qat.quant.config import QuantConfig
from qat.quant.linear import quant_linears
from qat.quant.number_format import Format
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store.compressed_tensors import FLOAT_QUANTIZED, INT_QUANTIZED, MXFP4, NVFP4, PACK_QUANTIZED
from qat.store.model_folder import ModelFolder

OWN = QuantConfig(
    kv_granularity="token_head",
    overrides={
        "*.down_proj": {"a_bits": 6},
        "model.layers.0.*": {"kv_bits": 8, "w_bits": 8},
        "*.-1.*.o_proj": {"w_bits": 3, "w_group_size": 32},
    },
)
SETTINGS = {
    INT_QUANTIZED: QuantConfig(overrides={"model.layers.0.*": {"w_bits": 8}}),
    FLOAT_QUANTIZED: QuantConfig(
        8, 8, 4, w_quantizer="fp8", a_quantizer="fp8", overrides={"model.layers.0.*": {"kv_bits": 8, "w_bits": 16}}
    ),
    NVFP4: QuantConfig(w_quantizer="nvfp4", a_bits=16, overrides={"*.down_proj": {"w_bits": 16}}),
    MXFP4: QuantConfig(w_quantizer="mxfp4", overrides={"model.layers.-1.*": {"a_bits": 16}}),
}


def test_each_layer_gets_its_own_settings():
    model = prepare(tiny_model(), OWN)
    linears = quant_linears(model)
    assert linears["model.layers.0.self_attn.q_proj"].weight_format == Format(8)
    assert linears["model.layers.1.self_attn.q_proj"].weight_format == Format(4)
    assert linears["model.layers.0.self_attn.o_proj"].weight_format == Format(8)
    assert linears["model.layers.1.self_attn.o_proj"].weight_format == Format(3, group_size=32)
    assert {name.split(".")[-1] for name, own in linears.items() if own.input_format == Format(6)} == {"down_proj"}
    assert [layer.self_attn.kv_quantizer.keys.form.bits for layer in model.model.layers] == [8, 4]


def test_a_part_in_full_precision_is_left_alone():
    model = prepare(
        tiny_model(), QuantConfig(overrides={"model.layers.0.*": {"w_bits": 16, "a_bits": 16, "kv_bits": 16}})
    )
    assert len(quant_linears(model.model.layers[0])) == 0
    assert len(quant_linears(model.model.layers[1])) == 7
    assert not hasattr(model.model.layers[0].self_attn, "kv_quantizer")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"*.q_proj": {"a_bits": 6}}, "read one tensor"),
        ({"*": {"lr": 1}}, "is invalid: set w_bits"),
        ({"*": {"a_bits": 9}}, "a_bits=9 is invalid"),
        ({"*": {"a_bits": "8"}}, "a_bits='8' is invalid"),
        ({"*": {"w_quantizer": "lsq"}}, "w_quantizer='lsq' is invalid"),
        ({"*.q_proj": {"a_quantizer": "lsq"}}, "mixes learned"),
        ({"*": 4}, "is invalid: set w_bits"),
    ],
)
def test_refusals(overrides, named):
    with pytest.raises(UserError, match=named):
        prepare(tiny_model(), QuantConfig(overrides=overrides))


@pytest.mark.parametrize(
    ("pattern", "setting", "kind"),
    [
        ("*.lm_head", "w_bits", "linear layer"),
        ("*.self_attn", "w_bits", "linear layer"),
        ("*.down_proj", "kv_bits", "attention"),
    ],
)
def test_a_setting_that_no_module_gets_is_warned_of_once(pattern, setting, kind, caplog):
    quant = QuantConfig(overrides={pattern: {setting: 8}, "*": {"kv_bits": 8}, "*.up_proj": {"w_bits": 8}})
    for _ in range(2):
        prepare(tiny_model(), quant)
    assert caplog.messages == [
        f"warning: overrides: {pattern!r} matches no {kind} of the model, whose {setting} it sets"
    ]


def test_flags_and_recipes_set_them(monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text('overrides:\n  "*.down_proj": {a_bits: 8}\n')
    for flag in (f"--config={tmp_path / 'recipe.yaml'}", '--overrides={"*.down_proj": {"a_bits": 8}}'):
        monkeypatch.setattr("sys.argv", ["train.py", flag])
        (quant,) = cli.parse("", QuantConfig)
        assert quant == QuantConfig(overrides={"*.down_proj": {"a_bits": 8}})


def test_files_keep_them_and_files_without_them_are_as_before(tmp_path):
    OWN.save(tmp_path)
    assert QuantConfig.load(tmp_path) == OWN
    QuantConfig().save(tmp_path)
    assert "overrides" not in (tmp_path / "quant_config.json").read_text()


def test_files_of_a_later_version_are_refused(tmp_path):
    QuantConfig().save(tmp_path)
    file = tmp_path / "quant_config.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="format version 2, and this program reads 1"):
        QuantConfig.load(tmp_path)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_an_export_equals_the_student(form, tmp_path):
    quant = SETTINGS.get(form, OWN)
    student = write_student(tmp_path / "student", quant)
    export.check(student, form)
    export.export(student, tmp_path / "export", form)
    windows = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    export.verify(student, tmp_path / "export", form, windows)
    if EXPORT_FORMATS[form].runs_as_trained:
        model, simulation = qat.load(str(tmp_path / "export")), simulated.load(str(tmp_path / "student"), torch.float32)
        assert torch.equal(model(windows).logits, simulation(windows).logits)
        how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = simulation.generate(windows[:, :6], use_cache=False, **how)
        assert torch.equal(model.generate(windows[:, :6], **how), expected)
    said = EXPORT_FORMATS[form].all_deviations(student)
    assert form != PACK_QUANTIZED or any("trained with 6 bits" in sentence for sentence in said)


@pytest.mark.parametrize(("all_layers", "first"), [(4, 16), (16, 4)])
def test_the_integer_cache_of_some_layers(all_layers, first, tmp_path):
    quant = QuantConfig(kv_bits=all_layers, overrides={"model.layers.0.*": {"kv_bits": first}})
    write_student(tmp_path, quant)
    model, simulation = qat.load(str(tmp_path)), simulated.load(str(tmp_path), torch.float32)
    tokens, how = ids(model)[:, :8], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = simulation.generate(tokens, use_cache=False, **how)
    assert torch.equal(model.generate(tokens, **how), expected)
    cache = model.new_cache()
    model.generate(tokens, past_key_values=cache, **how)
    assert [layer.keys.dtype == torch.uint8 for layer in cache.layers] == [first == 4, all_layers == 4]


def test_gptq_rounds_each_layer_by_its_own_format(tiny_directory):
    quant = QuantConfig(overrides={"model.layers.0.mlp.*": {"w_bits": 16}, "*.o_proj": {"w_bits": 2}})
    stream = Stream(tiny_directory, quant, [torch.arange(2, 26)[None]])
    weights = stream.files.layer(0)
    rounded, grids, _ = gptq.quantize_layer(stream, weights, gptq.GPTQConfig())
    assert {name.split(".")[0] for name in grids} == {"self_attn"}
    assert torch.equal(rounded["mlp.up_proj.weight"], weights["mlp.up_proj.weight"])
    assert all(len(row.unique()) <= 3 for row in rounded["self_attn.o_proj.weight"])
    assert ModelFolder.read(tiny_directory).config.num_hidden_layers == 2


def test_more_bits_are_nearer(tmp_path):
    windows, two = ids(tiny_model(), batch=4), QuantConfig(w_bits=2)
    mixed = QuantConfig(w_bits=2, overrides={"*": {"w_bits": 8}})
    losses = []
    for name, quant in (("two", two), ("mixed", mixed)):
        student = simulated.load(str(write_student(tmp_path / name, quant).path), torch.float32)
        losses.append(perplexity(student, windows).nll - perplexity(tiny_model(), windows).nll)
    assert abs(losses[1]) < abs(losses[0])
