import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from commands import ROOT, error_of, run_python
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, ids, tiny_model

import qat
from launch import quantize as command
from qat.export import export
from qat.infer import simulated
from qat.ptq import METHODS, gptq, smoothquant, writer
from qat.ptq.gptq import GPTQConfig
from qat.ptq.smoothquant import SmoothQuantConfig, fold, largest_by_channel
from qat.ptq.stream import Stream
from qat.quant.architecture import ARCHITECTURES
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.number_format import Format, Quantized, dequantize, grid_of, quantize, round_to_grid
from qat.quant.prepare import freeze, prepare
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError
from qat.store import models, smollm2
from qat.store.compressed_tensors import INT_QUANTIZED
from qat.store.model_folder import ModelFolder
from qat.store.models import load_tokenizer
from qat.store.sidecars import GRIDS_FILE, load_grids
from qat.store.student_folder import find
from qat.store.weight_files import stored_tensors
from qat.train.starting_point import directory_of

FORMATS = [
    Format(4),
    Format(8),
    Format(3, "minmax", 32),
    Format(4, "minmax_asymmetric"),
    Format(7, "minmax_asymmetric", 32),
    Format(4, "ggml_q4_0", 32),
    Format(8, "minmax", 32, "bfloat16"),
    Format(4, "minmax_full"),
    Format(3, "minmax_signed", 32),
]
QUANT = QuantConfig(4, 8, 4)
LLAMA_CPP = QuantConfig(4, 8, 16, w_quantizer="ggml_q4_0", a_quantizer="ggml_q8_0")
GROUPS = ARCHITECTURES["llama"].smoothed


@pytest.fixture(scope="module")
def layer():
    """A weight [48, 160] and the inputs [tokens, 160] of a layer, correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 160, generator=generator)
    mixing = torch.randn(160, 160, generator=generator) / 160**0.5
    sizes = torch.exp(torch.randn(160, generator=generator))
    inputs = torch.randn(600, 160, generator=generator) @ mixing * sizes
    return weight, inputs


def test_settings_that_a_layer_refuses_claim_no_folder(tiny_directory, tiny_data, tmp_path, monkeypatch):
    """The larger damping that the sentence asks for finds it free."""
    original = gptq.gptq

    def damped(weight, hessian, form, config):
        if config.damping < 0.1:
            raise torch.linalg.LinAlgError
        return original(weight, hessian, form, config)

    monkeypatch.setattr(gptq, "gptq", damped)
    flags = ["--method=gptq", f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'out'}"]
    assert "give a larger damping than 0.01" in error_of(monkeypatch, "quantize", *flags)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["quantize.py", *flags, "--damping=0.1"])
    command.main()
    assert (tmp_path / "out" / CONFIG_FILE).is_file()


@pytest.fixture
def quantize_command(monkeypatch):
    """launch/quantize.py in this process."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["quantize.py", *flags])
        command.main()

    return call


def obq(weight, hessian, form, damping, act_order):
    """The same rounding by the textbook, in fp64 and unblocked: after each channel, the inverse Hessian loses it by
    Gaussian elimination (arXiv 2210.17323, equations 2 and 3)."""
    left = weight.double()
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    grid = grid_of(weight, form)
    rounded = torch.zeros_like(left)
    for i in hessian.diagonal().argsort(descending=True).tolist() if act_order else range(weight.shape[1]):
        group = i // (form.group_size or weight.shape[1])
        own = grid.map(lambda part: part[:, group : group + 1])  # noqa: B023
        column = round_to_grid(left[:, i : i + 1].float(), Format(form.bits, form.quantizer), own)[0].double()
        rounded[:, i : i + 1] = column
        left = left - (left[:, i : i + 1] - column) * inverse[i] / inverse[i, i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rounded.float()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("hessian", [torch.eye(160), torch.zeros(160, 160)], ids=["identity", "no inputs"])
def test_gptq_where_inputs_say_nothing_is_rtn(form, act_order, hessian, layer):
    weight, _ = layer
    codes, grid = gptq.gptq(weight, hessian, form, GPTQConfig(act_order))
    expected, expected_grid = quantize(weight, form, grid_of(weight, form))  # ggml's own codes need no grid
    assert torch.equal(codes, expected)
    assert torch.equal(grid.scale, expected_grid.scale)


def test_factor_is_of_the_damped_inverse(layer):
    hessian = gptq.hessian_of([layer[1]])
    factor = gptq.inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(160)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor.t() @ factor).double() @ damped, torch.eye(160).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_the_textbook(form, act_order, layer):
    weight, inputs = layer
    hessian = gptq.hessian_of([inputs[:300], inputs[300:]])
    ours = dequantize(gptq.gptq(weight, hessian, form, GPTQConfig(act_order)), torch.float32)
    expected = obq(weight, hessian, form, 0.01, act_order)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rtn_on_correlated_inputs(form, act_order, layer):
    weight, inputs = layer
    quantized = gptq.gptq(weight, gptq.hessian_of([inputs]), form, GPTQConfig(act_order))
    lowest, highest = form.code_range
    assert lowest <= quantized.codes.min()
    assert quantized.codes.max() <= highest
    rtn = round_to_grid(weight, form)[0]
    assert _error(weight, dequantize(quantized, torch.float32), inputs) < 0.6 * _error(weight, rtn, inputs)


def test_error_is_that_of_the_outputs(layer):
    weight, inputs = layer
    difference = weight - round_to_grid(weight, Format(4))[0]
    error = gptq.error_of(difference, gptq.hessian_of([inputs]))
    assert error == pytest.approx(_error(weight, weight - difference, inputs), rel=1e-4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stored_values_and_grid_give_the_codes_again(form, dtype, layer):
    """What weight_grids.safetensors promises."""
    weight, inputs = layer
    codes, grid = gptq.gptq(weight, gptq.hessian_of([inputs]), form, GPTQConfig())
    stored = dequantize(Quantized(codes, grid), dtype)
    assert torch.equal(quantize(stored, form, grid).codes, codes)
    assert torch.equal(round_to_grid(stored, form, grid)[0], stored)


@pytest.mark.gptqmodel
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_gptqmodel(act_order, layer):
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.quantization.quantizer import QQQQuantizer

    weight, inputs = layer
    linear = torch.nn.Linear(160, 48, bias=False)
    linear.weight.data = weight.clone()
    settings = QuantizeConfig(
        bits=4, group_size=-1, desc_act=act_order, act_group_aware=False, sym=True, damp_percent=0.01
    )
    theirs = GPTQ(linear, settings)
    theirs.quantizer = QQQQuantizer(settings)  # the one of theirs whose codes are in [-qmax, qmax], scale max / qmax
    theirs.quantizer.configure(perchannel=True)
    theirs.add_batch(inputs[None], None)
    expected = theirs.quantize()[0].float()
    ours = dequantize(gptq.gptq(weight, gptq.hessian_of([inputs]), Format(4), GPTQConfig(act_order)), torch.float32)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("config_class", FAMILIES)
def test_folding_changes_nothing_in_full_precision(config_class):
    model, folded = _model_with_outliers(config_class), _model_with_outliers(config_class)
    expected = model(ids(model)).logits
    head_dim = model.config.head_dim
    for number, block in enumerate(folded.model.layers):
        weights = block.state_dict()
        generator = torch.Generator().manual_seed(number)
        largest = {
            group: torch.exp(2 * torch.randn(weights[f"{group.readers[0]}.weight"].shape[1], generator=generator))
            for group in GROUPS
        }
        new = fold(weights, largest, dict.fromkeys(GROUPS, 0.6), head_dim)
        for group in GROUPS:
            for name in (f"{group.producer}.weight", f"{group.readers[0]}.weight"):
                assert (new[name] / weights[name]).std() > 0.1, name
        block.load_state_dict(new)
    torch.testing.assert_close(folded(ids(model)).logits, expected, atol=2e-4, rtol=1e-4)


def test_smoothing_moves_outliers_out_of_the_inputs(tmp_path, tiny_data):
    """With alpha = 1 all input channels become equally large, with alpha = 0 all weight columns."""
    source = tmp_path / "model"
    _model_with_outliers(FAMILIES[0]).save_pretrained(source)
    stream = Stream(source, QUANT, [ids(tiny_model())])
    weights = stream.files.layer(0)
    with torch.inference_mode():
        plain = smoothquant.SmoothQuant(source, SmoothQuantConfig())._layers[0]
        plain.load_state_dict(weights, assign=True)
        group = GROUPS[0]
        largest = {group: largest_by_channel(stream, plain, group)}
        for alpha, flat in ((1.0, True), (0.0, False)):
            new = fold(weights, largest, {group: alpha}, 16)
            plain.load_state_dict(new, assign=True)
            seen = largest_by_channel(stream, plain, group)
            columns = torch.cat([new[f"{name}.weight"] for name in group.readers]).abs().amax(0)
            assert (seen.max() / seen.min() < 1.001) == flat
            assert (columns.max() / columns.min() < 1.001) == (not flat)


def test_search_takes_the_least_error_or_nothing():
    best = {GROUPS[0]: 0.5, GROUPS[2]: 0.3}

    def error(alphas):
        return 1 + sum(abs(alpha - best.get(group, 2)) - 0.1 for group, alpha in alphas.items())

    assert smoothquant.search(GROUPS, error) == best


@pytest.mark.parametrize(
    "quant", [QUANT, QuantConfig(3, 16, 16, w_group_size=32), LLAMA_CPP], ids=["4-8-4", "3 bits, groups", "llama.cpp"]
)
@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_stream_sees_what_the_written_model_sees(method, quant, tiny_directory, tmp_path):
    """The hidden states that the last layer was calibrated on are those of the model that was written."""
    tokens = [ids(tiny_model()), ids(tiny_model(), tokens=31)]
    seen = []

    def spy(stream, weights):
        seen.append([hidden.clone() for hidden in stream.hidden])
        assert all(parameter.is_meta for parameter in stream.layers.parameters())  # one layer in memory at a time
        return quantize_layer(stream, weights)

    kind = METHODS[method]
    quantize_layer = kind(tiny_directory, kind.config()).quantize_layer
    with writer.appearing(ModelFolder.read(tiny_directory), tmp_path / "out", quant, {}) as folder, torch.no_grad():
        writer.write(Stream(tiny_directory, quant, tokens), folder, spy)
    model = simulated.load(str(tmp_path / "out"), torch.float32)
    assert (tmp_path / "out" / GRIDS_FILE).exists() == (method == "gptq")
    for sequence, expected in zip(tokens, seen[-1], strict=True):
        hidden = model(sequence, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config_class", FAMILIES)
def test_stream_is_every_familys_forward_pass(config_class, tmp_path):
    """Biases, query and key norms, and a mask that is not only causal (Mistral's sliding window) are among it."""
    model = _model_with_outliers(config_class, num_hidden_layers=3, sliding_window=8)
    model.save_pretrained(tmp_path)
    quant = QuantConfig(4, 8, 4, kv_rotation="hadamard")
    stream = Stream(tmp_path, quant, [ids(model)])
    for number in (0, 1):
        stream.advance(stream.files.layer(number), {})
    freeze(prepare(model, quant))
    expected = model(ids(model), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(stream.hidden[0], expected, atol=1e-4, rtol=1e-4)


def test_gptq_calibrates_on_rounded_inputs(tiny_directory):
    stream = Stream(tiny_directory, QuantConfig(4, 4, 16), [ids(tiny_model())])
    with torch.inference_mode():
        block = stream.load(stream.files.layer(0))
        name = "self_attn.q_proj"
        x = torch.cat(list(gptq.quantized_inputs(stream, block, {name: block.get_submodule(name)})))
    for token in x:
        assert len(token.unique()) <= 15  # 4 bits


def test_within_a_layer_too_gptq_sees_what_the_rounded_layers_make(tiny_directory, monkeypatch):
    """The inputs that the last of them is calibrated on are those of the layer that is written."""
    stream, seen, own = Stream(tiny_directory, QUANT, [ids(tiny_model())]), {}, gptq.quantized_inputs

    def spy(stream, layer, linears):
        seen[next(iter(linears))] = inputs = list(own(stream, layer, linears))
        return inputs

    monkeypatch.setattr(gptq, "quantized_inputs", spy)
    rounded, grids, _ = gptq.quantize_layer(stream, stream.files.layer(0), GPTQConfig())
    name = "mlp.down_proj"
    with torch.inference_mode():
        layer = stream.load_rounded(rounded, grids)
        written = torch.cat(list(own(stream, layer, {name: layer.get_submodule(name)})))
    torch.testing.assert_close(torch.cat(seen[name]), written, atol=1e-5, rtol=1e-5)


def test_a_killed_run_goes_on(tiny_directory, tmp_path):
    """The same files as those of an uninterrupted run, and no finished layer is rounded again."""
    tokens = [ids(tiny_model())]
    calls: list[int] = []

    def run(output, fail_at=None, quant=QUANT):
        def quantize_layer(stream, weights):
            calls.append(stream.position)
            if stream.position == fail_at:
                raise KeyboardInterrupt
            return gptq.quantize_layer(stream, weights, GPTQConfig())

        with writer.appearing(ModelFolder.read(tiny_directory), output, quant, asdict(quant)) as folder:
            writer.write(Stream(tiny_directory, quant, tokens), folder, quantize_layer)

    run(tmp_path / "whole")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", fail_at=1)
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(UserError, match="an unfinished run with other settings"):
        run(tmp_path / "stopped", quant=QuantConfig(3, 8, 4))
    run(tmp_path / "stopped")
    assert calls == [0, 1, 1]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == files
    for name in files:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_grid_is_kept_on_export(dtype, tmp_path):
    source = tmp_path / "model"
    tiny_model().to(dtype).save_pretrained(source)
    stream = Stream(source, QUANT, [ids(tiny_model())])
    with writer.appearing(ModelFolder.read(source), tmp_path / "out", QUANT, {}) as folder:
        writer.write(stream, folder, lambda *layer: gptq.quantize_layer(*layer, GPTQConfig()))
    export.export(find(tmp_path / "out"), tmp_path / "export", INT_QUANTIZED)
    in_memory, reloaded = (simulated.load(str(tmp_path / name), torch.float32) for name in ("out", "export"))
    assert torch.equal(in_memory(ids(in_memory)).logits, reloaded(ids(reloaded)).logits)
    stored = {}
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(file)
    grids, exported = load_grids(tmp_path / "out"), load_file(tmp_path / "export" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    codes, scale = exported[f"{name}.weight"], exported[f"{name}.weight_scale"]
    assert torch.equal(scale, grids[name].scale)
    assert torch.equal(dequantize(Quantized(codes, Grid(scale)), dtype), stored[f"{name}.weight"])
    assert not all(
        torch.equal(quantize(stored[f"{n}.weight"], Format(4)).grid.scale, g.scale) for n, g in grids.items()
    )


def test_gptq_refuses_values_that_lose_their_codes(tmp_path):
    """bf16 has 8 significant bits: not enough for 256 levels on one side of zero."""
    source = tmp_path / "model"
    model = tiny_model().bfloat16()
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data.abs_()
    model.save_pretrained(source)
    stream = Stream(source, QuantConfig(8, 16, 16, w_quantizer="minmax_asymmetric"), [ids(tiny_model())])
    with pytest.raises(UserError, match="bfloat16"):
        gptq.quantize_layer(stream, stream.files.layer(0), GPTQConfig())


def test_rtn_is_prepare_without_training(tiny_directory, tmp_path):
    run_python("quantize", f"--model={tiny_directory}", f"--output={tmp_path / 'rtn'}", "--kv_rotation=hadamard")
    loaded = simulated.load(str(tmp_path / "rtn"), torch.float32)
    expected = prepare(models.load(str(tiny_directory), torch.float32), QuantConfig(kv_rotation="hadamard"))
    assert torch.equal(loaded(ids(loaded)).logits, expected(ids(loaded)).logits)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_the_models_stay_out(method, tiny_directory, tiny_data, tmp_path, quantize_command):
    """Mistral's directories hold a second copy of the weights, under other names."""
    source, text = shutil.copytree(tiny_directory, tmp_path / "model"), [f"--data={tiny_data}"] * (method != "rtn")
    save_file({"layers.0.wq": torch.zeros(3)}, source / "consolidated.safetensors")
    quantize_command(f"--model={source}", f"--output={tmp_path / 'out'}", f"--method={method}", *text)
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    assert "layers.0.wq" not in dict(stored_tensors(tmp_path / "out"))


def test_a_file_that_a_kill_left_half_is_copied_again(tiny_directory, tiny_data, tmp_path, quantize_command):
    flags = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'out'}", "--method=gptq"]
    quantize_command(*flags)
    partial = (tmp_path / "out").rename(tmp_path / "out.partial")
    (partial / "tokenizer.json").write_text("{")
    quantize_command(*flags)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tiny_directory / "tokenizer.json").read_text()


def test_gptqs_weights_are_not_rounded_to_another_grid(
    tiny_directory, tiny_data, tmp_path, quantize_command, monkeypatch
):
    quantize_command(
        f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'out'}", "--method=gptq"
    )
    flags = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'run'}"]
    message = error_of(monkeypatch, "train", *flags, f"--student={tmp_path / 'out'}", "--w_group_size=32")
    assert "would round them again" in message


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_command(method, tiny_directory, tiny_data, tmp_path, quantize_command, capsys):
    flags = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'out'}", f"--method={method}"]
    quantize_command(*flags)
    record = json.loads((tmp_path / "out" / writer.PTQ_RECORD).read_text())
    assert record["method"] == method
    assert QuantConfig.load(tmp_path / "out") == QUANT
    model = simulated.load(str(tmp_path / "out"), torch.float32)
    assert model(ids(model)).logits.isfinite().all()
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == load_tokenizer(str(tiny_directory)).get_vocab()
    quantize_command(*flags)
    assert "already exists" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made with other settings \(quant.w_bits was \d, now 5\)"):
        quantize_command(*flags, "--w_bits=5")
    if method == "gptq":
        (tmp_path / "out" / writer.PTQ_RECORD).unlink()
        (tmp_path / "out" / GRIDS_FILE).unlink()
        with pytest.raises(UserError, match=f"incomplete: {GRIDS_FILE}, which defines .*, is missing"):
            simulated.load(str(tmp_path / "out"), torch.float32)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method=awq"], "method='awq' is invalid: choose rtn or gptq or smoothquant"),
        (["--method=gptq"], "needs calibration text"),
        (["--method=gptq", "--data=DATA", "--w_bits=16"], "w_bits is 16"),
        (["--method=gptq", "--data=DATA", "--damping=0"], "damping=0"),
        (
            ["--method=gptq", "--data=DATA", "--alpha=0.5"],
            "alpha=0.5 is a setting of method=smoothquant, and method is gptq",
        ),
        (["--method=smoothquant", "--data=DATA", "--alpha=1.5"], "alpha=1.5"),
        (["--a_quantizer=lsq"], "learned steps"),
        (["--w_group_size=48"], "does not divide"),
        (["--data=DATA"], "needs no calibration text: leave out --data, or give method=gptq or smoothquant"),
        (["--output=TAKEN"], "no post-training method made it"),
    ],
)
def test_refusals(flags, named, tiny_directory, tiny_data, tmp_path, quantize_command):
    (tmp_path / "taken").mkdir()
    flags = [flag.replace("DATA", str(tiny_data)).replace("TAKEN", str(tmp_path / "taken")) for flag in flags]
    with pytest.raises(UserError, match=named):
        quantize_command(f"--model={tiny_directory}", f"--output={tmp_path / 'out'}", *flags)
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def clipping(monkeypatch):
    """Flags of the method that plugin_clipping.py adds, until the test ends."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS))
    monkeypatch.delitem(sys.modules, "plugin_clipping", raising=False)
    return ["--method=clipping", "--least_ratio=0.7", "--w_bits=3"]


@pytest.mark.parametrize("given", ["flag", "recipe"])
def test_a_method_of_a_plug_in(given, clipping, tiny_directory, tmp_path, quantize_command, monkeypatch):
    """Its settings are flags, its grids are stored, and what is deployed computes what it made."""
    (tmp_path / "recipe.yaml").write_text("plugin: plugin_clipping\n")
    output, rtn = tmp_path / "out", tmp_path / "rtn"
    plugin = {"flag": "--plugin=plugin_clipping", "recipe": f"--config={tmp_path / 'recipe.yaml'}"}[given]
    quantize_command(plugin, f"--model={tiny_directory}", f"--output={output}", *clipping)
    assert json.loads((output / writer.PTQ_RECORD).read_text())["least_ratio"] == 0.7
    model, simulation = qat.load(str(output)), simulated.load(str(output), torch.float32)
    assert torch.equal(model(ids(model)).logits, simulation(ids(model)).logits)

    quantize_command(f"--model={tiny_directory}", f"--output={rtn}", "--w_bits=3")
    original = models.load(str(tiny_directory), torch.float32).state_dict()
    clipped, nearest = simulation.state_dict(), simulated.load(str(rtn), torch.float32).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    assert (clipped[name] - original[name]).norm() < 0.95 * (nearest[name] - original[name]).norm()

    with pytest.raises(UserError, match="already rounded by clipping, and other settings would round them again"):
        directory_of(output, str(tiny_directory), QuantConfig(4))
    (output / GRIDS_FILE).unlink()
    with pytest.raises(UserError, match=f"{GRIDS_FILE}, which defines"):
        simulated.load(str(output), torch.float32)


def test_a_setting_of_a_plug_ins_method_is_refused_beside_another(clipping, quantize_command):
    with pytest.raises(UserError, match=r"least_ratio=0.7 is a setting of method=clipping, and method is rtn"):
        quantize_command("--plugin=plugin_clipping", "--model=m", "--output=o", *clipping[1:])


def test_the_package_is_imported_without_its_methods():
    """Torch and transformers take seconds, and ``qat.ptq`` alone needs neither."""
    seen = "import sys, qat.ptq; assert not {'torch', 'transformers', 'qat.ptq.gptq'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", seen], check=True, cwd=ROOT)


@pytest.mark.slow
def test_gptq_beats_rtn_on_a_real_model(tmp_path):
    """SmolLM2-135M at 4-16-16, calibrated on what it wrote itself; loss on prose that it did not write."""
    data = tmp_path / "data"
    sizes = ["--sequences=32", "--max_length=128", "--batch_size=32", "--sequences_per_shard=32"]
    run_python("generate", f"--model={smollm2.EMBEDDED}", f"--output={data}", *sizes)
    bits = ["--w_bits=4", "--a_bits=16", "--kv_bits=16"]
    losses = {}
    for method, text in (("rtn", []), ("gptq", [f"--data={data}"])):
        output = tmp_path / method
        run_python("quantize", f"--model={smollm2.EMBEDDED}", f"--output={output}", f"--method={method}", *text, *bits)
        result = tmp_path / f"{method}.json"
        run_python("evaluate", f"--model={output}", "--window=512", "--windows=8", f"--output={result}")
        losses[method] = json.loads(result.read_text())["texts"]["encyclopedia"]["nll"]
    assert losses["gptq"] < losses["rtn"] - 0.1


def _error(weight, rounded, inputs):
    """The mean over tokens of the squared error of a layer's output."""
    return ((inputs @ (weight - rounded).t()) ** 2).sum(1).mean().item()


def _model_with_outliers(config_class, **changes):
    """Norms that make some channels large, and biases where the family has them, both not as they are initialised."""
    model = tiny_model(config_class, **changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.exp(torch.randn(parameter.shape, generator=generator))
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model
