"""Planning: what its formulas must give, and what the commands say of it. benchmarks/scaling.py holds the formulas of
training against measured runs."""

import multiprocessing
import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import ROOT, error_of, finish, start_command
from forked import processes
from tiny import CONFIG, tiny_model
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, LlamaConfig

import datagen.plan
import launch.plan
from datagen import sampling
from datagen.decoder import Decoder
from datagen.generate import GenerateConfig
from datagen.sampling import Truncation
from launch import generate, train
from launch.plan import config_of
from qat.quant.config import QuantConfig
from qat.runtime import memory
from qat.store import models, smollm2
from qat.store.model_folder import without_weights
from qat.train import deepspeed_json, plan
from qat.train.config import TrainConfig
from qat.train.plan import Machine

JSONS = sorted((ROOT / "ds_configs").glob("zero3*.json"))


def planned(name: str, machine: Machine, model: str = "llama-7b"):
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / name)
    return plan.training(config_of(model), ds_config, ds_config, machine, tokens=1024)


def test_a_rank_holds_its_part_of_llama_7b():
    parameters = 6_738_415_616  # arXiv 2302.13971's "6.7B"
    device = planned("zero3.json", Machine(gpus=8)).device
    assert device["parameters"] == device["teacher"] == 2 * parameters / 8
    assert device["teacher's output layer"] == 2 * 32000 * 4096
    assert device["gradients"] == 4 * parameters / 8
    assert device["optimizer states"] == 12 * parameters / 8


def test_a_quantized_output_layer_takes_a_byte_for_each_weight_more():
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3.json")
    given = (config_of("llama-7b"), ds_config, ds_config, Machine(gpus=8), 1024)
    logits = {
        name: plan.training(*given, quant=QuantConfig(overrides={name: {"w_bits": 4}})).passing["logits"]
        for name in ("*", "model.embed_tokens", "lm_head")
    }
    assert logits["*"] == logits["model.embed_tokens"] == plan.training(*given).passing["logits"]
    assert logits["lm_head"] - logits["*"] == 32000 * 4096 + 8192 * 4096 * 2


@pytest.mark.parametrize("json_file", JSONS, ids=lambda path: path.name)
def test_more_ranks_need_no_more_of_anything_and_offload_takes_from_the_gpu(json_file):
    few, many = (planned(json_file.name, Machine(gpus=gpus)) for gpus in (4, 8))
    assert many.peak <= few.peak
    assert many.host == pytest.approx(few.host)
    assert many.nvme == pytest.approx(few.nvme)
    if many.host:
        assert many.peak < planned("zero3.json", Machine(gpus=8)).peak


def test_it_says_what_fits_and_what_is_lacking(monkeypatch, capsys):
    assert "zero3_offload_optimizer.json fits" in said(monkeypatch, capsys, "--model=llama-30b")
    lacking = said(monkeypatch, capsys, "--model=llama-30b", "--gpu_memory=24", "--host_memory=256")
    assert "None fits" in lacking
    assert "of host memory" in lacking


def test_it_plans_for_the_given_quantization(monkeypatch, capsys):
    quantized = said(monkeypatch, capsys, "--model=llama-7b", '--overrides={"lm_head": {"w_bits": 4}}')
    assert quantized != said(monkeypatch, capsys, "--model=llama-7b")


def said(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    launch.plan.main()
    return capsys.readouterr().out


def test_the_seconds_are_those_of_the_slowest_part():
    machine = Machine(gpus=8)
    usual = planned("zero3.json", machine)
    assert planned("zero3.json", replace(machine, flops=machine.flops / 2)).seconds["compute"] == pytest.approx(
        2 * usual.seconds["compute"]
    )
    slowly_linked = planned("zero3.json", replace(machine, link=1e9))
    assert slowly_linked.step_seconds == slowly_linked.received_per_step / 1e9 + slowly_linked.seconds["optimizer"]


def test_the_optimizer_takes_the_time_to_move_70_bytes_for_each_parameter_of_a_gpu():
    machine = Machine(gpus=8, hbm=2e12)
    assert planned("zero3.json", machine).seconds["optimizer"] == pytest.approx(70 * 6_738_415_616 / 8 / 2e12)


def test_no_teacher_and_no_checkpointing_are_counted():
    ds_config = deepspeed_json.read(JSONS[0])
    usual, alone, all_kept = (
        plan.training(config_of("llama-7b"), ds_config, teacher, Machine(gpus=8), 1024, checkpointing=checkpointing)
        for teacher, checkpointing in ((ds_config, True), (None, True), (ds_config, False))
    )
    passes = usual.seconds["compute"] / 5  # the teacher's, the student's twice, and backward, which is two
    assert alone.seconds["compute"] == pytest.approx(4 * passes) == all_kept.seconds["compute"]
    gathered = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # but for the output layer and the norms, which are whole
    assert usual.received_per_step - alone.received_per_step == pytest.approx(2 * gathered * 7 / 8)
    assert "teacher" not in alone.device
    assert alone.peak < usual.peak < all_kept.peak


def test_a_teacher_alone_is_whole_where_it_fits():
    """As launch/cache_teacher.py runs it."""
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3.json")
    cases = ("llama-7b", 80e9, True), ("llama-7b", 16e9, False), ("llama-30b", 80e9, True), ("llama-30b", 70e9, False)
    for name, room, fits in cases:
        model = without_weights(config_of(name), Path(name))
        assert plan.holds_teacher(model, ds_config, 1024, "cuda", room) == fits


def test_the_teacher_is_whole_where_it_fits_and_then_nothing_of_it_is_received(monkeypatch, capsys):
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3.json")
    for model, fits in (("llama-7b", True), ("llama-13b", True), ("llama-30b", False)):
        given = (config_of(model), ds_config, ds_config, Machine(gpus=8), 1024)
        sharded, alone = plan.training(*given), plan.training(*given[:2], None, *given[3:])
        chosen = plan.with_whole_teacher(80e9, partial(plan.training, *given))
        assert chosen.whole_teacher == fits
        assert (chosen.received_per_step, chosen.fetches) == (
            (alone.received_per_step, alone.fetches) if fits else (sharded.received_per_step, sharded.fetches)
        )
    output = said(monkeypatch, capsys, "--model=llama-7b")
    assert re.search(r"teacher on each rank +│ whole +│ whole", output)
    given = ["--deepspeed=ds_configs/zero3.json", "--teacher_deepspeed=ds_configs/teacher_zero3.json"]
    assert re.search(r"teacher on each rank +│ a part", said(monkeypatch, capsys, "--model=llama-7b", *given))


def test_generation_holds_what_the_decoder_makes():
    settings = GenerateConfig(batch_size=6, max_length=48)
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cuda")):
        model = tiny_model().to(dtype)
        needs = datagen.plan.needs(model.config, settings, device)
        layers = Decoder(model, slots=6, max_length=48).layers
        tensors = [tensor for layer in layers for tensor in (layer.attention.keys, layer.attention.values)]
        assert needs["KV cache"] == sum(tensor.nbytes for tensor in tensors)
    assert needs["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    halves = datagen.plan.needs(model.config, replace(settings, tensor_parallel=2), "cuda")
    assert all(2 * halves[name] == needs[name] for name in ("KV cache", "weights"))
    untied = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
    of_all, halves = (datagen.plan.needs(untied.config, replace(settings, tensor_parallel=n), "cuda") for n in (1, 2))
    whole = untied.get_input_embeddings().weight.nbytes  # transformers divides an embedding only if it is tied
    assert 2 * (halves["weights"] - whole) == of_all["weights"] - whole


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(0.8, 50, 0.9)])
def test_generation_holds_what_sampling_takes(truncation):
    rows, vocabulary = 8, 32000
    settings = GenerateConfig(
        batch_size=rows, temperature=truncation.temperature, top_k=truncation.top_k, top_p=truncation.top_p
    )
    planned = datagen.plan.needs(LlamaConfig(**CONFIG | {"vocab_size": vocabulary}), settings, "cpu")
    logits, greedy = torch.randn(rows, vocabulary), torch.arange(rows) == 0
    draw = torch.rand(rows, dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        sampling.choose(logits, greedy, draw, truncation)
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0.9 * planned["logits and sampling"] < 2 * logits.nbytes + most <= planned["logits and sampling"]


def test_who_needs_more_memory_than_there_is_is_warned(tiny_directory, caplog):
    generate.warn_if_short(generate.planned(str(tiny_directory), GenerateConfig()), GenerateConfig())
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3_cpu.json")
    settings, tiny = TrainConfig(batch_size=1), models.read_config(str(tiny_directory))
    train.warn_if_short(train.plan_of(tiny, ds_config, ds_config, 24, settings, QuantConfig()))
    assert not caplog.messages
    vast = LlamaConfig(hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=10)
    many = GenerateConfig(sequences=2**40, sequences_per_shard=2**40, batch_size=2**40)
    generate.warn_if_short(generate.planned(str(tiny_directory), many), many)
    train.warn_if_short(train.plan_of(vast, ds_config, ds_config, 1024, settings, QuantConfig()))
    of_generation, of_training = caplog.messages
    assert re.search(r"generation may .* needs [\d.]+ GB on each rank \(KV cache [\d.]+, .*, which has", of_generation)
    assert f"give less than --batch_size {2**40} or --max_length 1024" in of_generation
    assert re.search(r"training may .*optimizer states [\d.]+.* launch/plan.py", of_training)


@pytest.mark.slow
def test_generation_on_a_cpu_holds_what_was_planned(tmp_path):
    sizes = ["--sequences=256", "--batch_size=256", "--max_length=16"]
    script = ROOT / "launch" / "generate.py"
    said = finish(start_command("python", script, f"--model={smollm2.EMBEDDED}", f"--output={tmp_path}", *sizes))
    held, was_planned = map(float, re.search(r"peak memory of a rank: ([\d.]+) GB, ([\d.]+) GB", said).groups())
    assert held == pytest.approx(was_planned, rel=0.1)


def _send_settings(to) -> None:
    memory.let_segments_grow()
    to.send(torch._C._accelerator_getAllocatorSettings())


def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise(monkeypatch):
    """torch reads the variable when it first allocates: not yet when what training needs has been imported."""
    importer, ours = multiprocessing.Pipe()
    process = processes().Process(target=_send_settings, args=(importer,))
    process.start()
    assert ours.recv() == "expandable_segments:True,pinned_max_round_threshold_mb:1"
    process.join()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    memory.let_segments_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_one_rank_receives_nothing():
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3_cpu.json")
    assert plan.training(LlamaConfig(**CONFIG), ds_config, ds_config, Machine(gpus=1), 24).received_per_step == 0


def test_a_model_of_which_nothing_can_be_said_is_refused(monkeypatch, tmp_path):
    assert "llama-13b" in error_of(monkeypatch, "plan", "--model=/nowhere")
    GPT2Config().save_pretrained(tmp_path)
    assert "'gpt2', which is not supported" in error_of(monkeypatch, "plan", f"--model={tmp_path}")


def test_a_teachers_json_alone_is_refused(monkeypatch):
    flags = ["--model=llama-7b", "--teacher_deepspeed=ds_configs/teacher_zero3.json"]
    assert "without deepspeed: give both" in error_of(monkeypatch, "plan", *flags)


def test_a_sharded_teacher_is_sharded_where_the_student_is_whole():
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3_cpu.json")
    teacher = deepspeed_json.for_teacher(ds_config)["zero_optimization"]
    assert teacher == ds_config["zero_optimization"] | {"stage3_param_persistence_threshold": 100_000}
    given = (config_of("llama-7b"), ds_config, ds_config, Machine(gpus=8), 1024, "cpu")
    sharded, alone = plan.training(*given), plan.training(*given[:2], None, *given[3:])
    gathered = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # but for the output layer and the norms, which are whole
    assert sharded.received_per_step - alone.received_per_step == pytest.approx(2 * 4 * gathered * 7 / 8)


def test_a_layers_gradients_are_there_at_once_where_it_is_fetched_whole():
    ds_config = deepspeed_json.read(ROOT / "ds_configs" / "zero3.json")
    modules = ds_config | {"zero_optimization": ds_config["zero_optimization"] | {"leaf_module": {"classes": []}}}
    whole, apart = (
        plan.training(config_of("llama-7b"), own, None, Machine(gpus=8), 1024).passing["gradients in flight"]
        for own in (ds_config, modules)
    )
    assert whole - apart == 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)


def test_the_teachers_parameters_have_an_nvme_folder_of_their_own():
    offload = {"device": "nvme", "nvme_path": "/nvme"}
    student = {"zero_optimization": {"stage": 3, "offload_param": offload, "offload_optimizer": offload}}
    teacher = deepspeed_json.for_teacher(student)["zero_optimization"]
    assert teacher == {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme/teacher"}}
