"""Private parts of other packages that we rely on, and why: after an upgrade, what moved is named here."""

import inspect
import re
from importlib import import_module

import pytest
import torch
from commands import ROOT

NEEDED = [
    ("deepspeed.ops", "__compatible_ops__", "switches off the shared-memory op, which wants a compiler on CPUs"),
    ("deepspeed", "DeepSpeedEngine._consolidated_16bit_state_dict", "gathers the trained student"),
    ("deepspeed", "DeepSpeedEngine._copy_recovery_script", "would fail on one rank alone on a full disk"),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue",
        "gathers small weights, which must wait for all ranks",
    ),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup",
        "says which parts of the optimizer NVMe takes",
    ),
    (
        "deepspeed.runtime.swap_tensor.optimizer_utils",
        "OptimizerSwapper._update_param_state_info",
        "gives Adam its moments on NVMe back",
    ),
    (
        "deepspeed.runtime.swap_tensor.optimizer_utils",
        "OptimizerStateSwapInfo.release_memory",
        "gives Adam its moments on NVMe back",
    ),
    (
        "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine",
        "TorchCheckpointEngine.save",
        "keeps a failed write until all ranks know of it",
    ),
    (
        "deepspeed.runtime.zero.partition_parameters",
        "ZeroParamStatus.INFLIGHT",
        "is the state of what is being fetched",
    ),
    ("deepspeed.checkpoint.ds_to_universal", "main", "converts a checkpoint for another number of ranks"),
    ("deepspeed.utils.zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint", "reads a checkpoint for an export"),
    ("deepspeed.utils.zero_to_fp32", "tqdm", "draws the bars of that, which would fill a log file"),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward", "attends over the rounded keys and values"),
    ("transformers.masking_utils", "sdpa_mask", "is the mask that goes with it"),
    ("transformers.cache_utils", "DynamicLayer.lazy_initialization", "is a layer of the integer KV cache"),
    ("transformers.cache_utils", "DynamicLayer.update", "is a layer of the integer KV cache"),
    ("transformers", "GgufConfig", "reads the embedded model, and exports as GGUF"),
    ("torch", "_int_mm", "multiplies codes on GPUs"),
    ("torch._inductor", "list_options", "finds the option for exact division"),
    ("torch._dynamo.config", "recompile_limit", "lets all variants of a quantizer compile"),
    ("compressed_tensors.compressors.pack_quantized.helpers", "pack_to_int32", "packs codes as vLLM reads them"),
    ("lm_eval.models.huggingface", "HFLM._loglikelihood_tokens", "is shared out over the ranks"),
    ("lm_eval.models.huggingface", "HFLM._model_call", "is the quantized model's forward pass"),
    *((f"lm_eval.{where}", "tqdm", "draws bars") for where in ("api.model", "api.task", "models.huggingface")),
]


@pytest.mark.parametrize(("module", "name", "why"), NEEDED, ids=lambda value: value if "." in value else "")
def test_what_is_relied_on_is_there(module, name, why):
    found = import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} has moved, which {why}: see what took its place."
        found = getattr(found, part)


def test_attributes_of_deepspeeds_engines_that_are_made_when_they_run():
    """Of these, no name can be looked up: what reads them must still stand in DeepSpeed's source."""
    used = {
        "deepspeed.runtime.engine": ["load_universal_checkpoint", "checkpoint_engine"],
        "deepspeed.runtime.zero.stage3": ["fp32_partitioned_groups_flat", "optimizer_swapper"],
        "deepspeed.runtime.swap_tensor.optimizer_utils": ["swap_params_info", "min_aio_bytes"],
        "deepspeed.runtime.zero.partition_parameters": ["ds_tensor", "ds_id"],
    }
    for module, names in used.items():
        source = inspect.getsource(import_module(module))
        assert not [name for name in names if not re.search(rf"\b{name}\b", source)], module


def test_what_deepspeed_does_with_a_parameter():
    """qat.train.codes takes the place of these calls; a new version may make others."""
    made = inspect.getsource(import_module("deepspeed.runtime.zero.partition_parameters").Init)
    for name in ("all_gather", "all_gather_coalesced", "partition"):
        assert f"param.{name} = {name}" in made
    for name in ("ds_persist", "ds_tensor", "ds_shape", "ds_id", "nvme_swapper", "ds_zero_param_process_group"):
        assert f"param.{name} = " in made
    coordinator = import_module("deepspeed.runtime.zero.partitioned_param_coordinator").PartitionedParameterCoordinator
    calls = re.findall(r"\w+(?:\[0\])?\.(?:all_gather\w*|partition)\(.*\)", inspect.getsource(coordinator))
    assert calls == [
        "param_group[0].all_gather_coalesced(param_group, quantize=quantize)",
        "param.partition(free_data=free_data)",
    ]


def test_torchs_options_for_exact_division():
    """Without one, compiled quantizers on GPUs would round otherwise than eager ones; they run eagerly then."""
    assert any("division_rounding" in name or "divison_rounding" in name for name in torch._inductor.list_options())


def test_torchs_option_for_exact_casts():
    """Without it compiled quantizers lose the rounding of their scales to fp16 or bf16."""
    assert "emulate_precision_casts" in torch._inductor.list_options()


def test_deepspeeds_internals_are_touched_in_one_file():
    """Private attributes of engines and optimizers, by the names above."""
    private = re.compile(
        r"_consolidated_16bit|_copy_recovery_script|load_universal_checkpoint|__compatible_ops__|optimizer_swapper|"
        r"checkpoint_event_epilogue|fp32_partitioned_groups_flat|HfDeepSpeedConfig|"
        r"all_gather_coalesced|ds_persist|ds_status|nvme_swapper"
    )
    files = [file for file in (ROOT / "qat").rglob("*.py") if private.search(file.read_text())]
    assert [file.name for file in files] == ["deepspeed_internals.py"]
