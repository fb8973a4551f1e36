"""Planning: what its formulas must give. benchmarks/scaling.py holds them against measured runs."""

import json
import sys
from dataclasses import replace

import pytest
from conftest import CONFIG, ROOT
from test_launch import error_of
from transformers import GPT2Config, LlamaConfig

from launch import plan
from launch.plan import Machine
from qat import ds_json

JSONS = sorted((ROOT / "ds_configs").glob("zero3*.json"))


def planned(name: str, machine: Machine, model: str = "llama-7b"):
    ds_config = json.loads((ROOT / "ds_configs" / name).read_text())
    return plan.plan(plan.config_of(model), ds_config, ds_config, machine, tokens=1024)


def test_a_rank_holds_its_part_of_llama_7b():
    parameters = 6_738_415_616  # arXiv 2302.13971's "6.7B"
    device = planned("zero3.json", Machine(gpus=8)).device
    assert device["parameters"] == device["teacher"] == 2 * parameters / 8
    assert device["gradients"] == 4 * parameters / 8
    assert device["optimizer states"] == 12 * parameters / 8


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


def said(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    plan.main()
    return capsys.readouterr().out


def test_the_seconds_are_those_of_the_slowest_part():
    machine = Machine(gpus=8)
    usual = planned("zero3.json", machine)
    assert planned("zero3.json", replace(machine, flops=machine.flops / 2)).seconds["compute"] == pytest.approx(
        2 * usual.seconds["compute"]
    )
    assert planned("zero3.json", replace(machine, link=1e9)).step_seconds == usual.received_per_step / 1e9


def test_one_rank_receives_nothing():
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    assert plan.plan(LlamaConfig(**CONFIG), ds_config, ds_config, Machine(gpus=1), tokens=24).received_per_step == 0


def test_a_model_of_which_nothing_can_be_said_is_refused(monkeypatch, tmp_path):
    assert "llama-13b" in error_of(monkeypatch, "plan", "--model=/nowhere")
    GPT2Config().save_pretrained(tmp_path)
    assert "'gpt2', which is not supported" in error_of(monkeypatch, "plan", f"--model={tmp_path}")


def test_a_teachers_json_alone_is_refused(monkeypatch):
    flags = ["--model=llama-7b", "--teacher_deepspeed=ds_configs/teacher_zero3.json"]
    assert "without deepspeed: give both" in error_of(monkeypatch, "plan", *flags)


def test_the_teachers_parameters_have_an_nvme_folder_of_their_own():
    offload = {"device": "nvme", "nvme_path": "/nvme"}
    student = {"zero_optimization": {"stage": 3, "offload_param": offload, "offload_optimizer": offload}}
    teacher = ds_json.for_teacher(student)["zero_optimization"]
    assert teacher == {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme/teacher"}}
