"""Generation by several ranks: groups, tensor parallelism, launchers, claims."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, finish, generate_flags, run_ranks, start_training, tiny_model
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from datagen.parallel import Group, ranks_from_slurm
from datagen.shards import ShardFolder
from qat.errors import UserError


def rows(folder):
    return ShardFolder(folder).table(["input_ids", "finish"]).to_pylist()


@pytest.mark.parametrize("changes", [{}, {"config_class": Qwen2Config}], ids=["llama", "qwen2 with biases"])
def test_a_model_split_over_two_ranks_writes_the_same(changes, tiny_directory, tiny_data, tokenizer, tmp_path):
    model, whole = tiny_directory, tiny_data
    if changes:
        from conftest import run_python

        model, whole = tmp_path / "model", tmp_path / "whole"
        tiny_model(**changes, tie_word_embeddings=True).save_pretrained(model)
        tokenizer.save_pretrained(model)
        run_python("generate", *generate_flags(model, whole))
    split = tmp_path / "split"
    run_ranks("generate", *generate_flags(model, split), "--tensor_parallel=2")
    assert rows(split) == rows(whole)
