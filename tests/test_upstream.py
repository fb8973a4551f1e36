"""Parts of other packages that no documentation promises, in the one file that uses each, and why: after an upgrade,
what moved is named here."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from commands import ROOT

PARTS = {
    "launch/cli.py": [("atexit", "_run_exitfuncs", "runs exit handlers where the interpreter's own end is skipped")],
    "qat/evaluate/harness.py": [
        ("lm_eval.models.huggingface", "HFLM._loglikelihood_tokens", "is shared out over the ranks"),
        ("lm_eval.models.huggingface", "HFLM._model_call", "is the quantized model's forward pass"),
        ("lm_eval.models.huggingface", "HFLM._model_generate", "writes answers, and reports the ranks' progress"),
        ("lm_eval.models.huggingface", "HFLM.max_gen_toks", "limits answers that do not end"),
        ("lm_eval.models.huggingface", "HFLM.all_gather", "must wait for all ranks"),
        ("lm_eval.models.huggingface", "HFLM.gather_object", "must wait for all ranks"),
        ("lm_eval.models.huggingface", "HFLM.barrier", "must wait for all ranks"),
        *((f"lm_eval.{where}", "tqdm", "draws bars") for where in ("api.model", "api.task", "models.huggingface")),
    ],
    "qat/infer/integer_cache.py": [
        ("transformers.cache_utils", "DynamicLayer.lazy_initialization", "is a layer of the integer KV cache"),
        ("transformers.cache_utils", "DynamicLayer.update", "is a layer of the integer KV cache"),
    ],
    "qat/quant/architecture.py": [
        ("transformers.modeling_rope_utils", "ROPE_INIT_FUNCTIONS", "computes the frequencies of scaled positions"),
    ],
    "qat/quant/fused.py": [
        ("torch._dynamo.config", "recompile_limit", "lets all variants of a quantizer compile"),
        ("torch._dynamo.exc", "TorchDynamoException", "says that a function cannot be compiled"),
        ("torch._inductor", "list_options", "finds the option for exact division"),
    ],
    "qat/quant/kv_cache.py": [
        ("transformers", "PreTrainedConfig._attn_implementation", "says by which function a model attends"),
        (
            "transformers.integrations.sdpa_attention",
            "sdpa_attention_forward",
            "attends over the rounded keys and values",
        ),
        ("transformers.masking_utils", "sdpa_mask", "is the mask that goes with it"),
    ],
    "qat/quant/linear.py": [("torch", "Tensor._version", "says whether a layer's input has changed")],
    "qat/quant/rotated.py": [
        ("transformers", "MODEL_FOR_CAUSAL_LM_MAPPING", "gives the class that a rotated model's derives from"),
    ],
    "qat/runtime/operators.py": [
        ("torch", "_int_mm", "multiplies codes on GPUs"),
        ("torch", "ops.mkldnn._linear_pointwise", "multiplies fp32 matrices on CPUs"),
        ("torch", "ops.mkldnn._reorder_linear_weight", "lays a weight out for that"),
        ("torch", "ops.onednn.qlinear_prepack", "lays codes out for the next"),
        ("torch", "ops.onednn.qlinear_pointwise", "multiplies codes on CPUs"),
    ],
    "qat/runtime/ranks.py": [("torch.distributed", "rendezvous", "finds the launcher's store")],
    "qat/store/compressed_tensors.py": [
        ("compressed_tensors.compressors.pack_quantized.helpers", "pack_to_int32", "packs codes as vLLM reads them"),
        ("compressed_tensors.compressors.pack_quantized.helpers", "unpack_from_int32", "reads them back"),
    ],
    "qat/store/gguf_files.py": [("transformers", "GgufConfig", "reads what was exported as GGUF")],
    "qat/store/model_folder.py": [
        ("transformers", "PreTrainedModel._keys_to_ignore_on_load_unexpected", "names tensors that no model needs"),
        ("transformers.activations", "ACT2FN", "is the list of activations"),
    ],
    "qat/store/pickles.py": [
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler", "is in DeepSpeed's checkpoints"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum", "is in DeepSpeed's checkpoints"),
    ],
    "qat/store/smollm2.py": [("transformers", "GgufConfig", "reads the embedded model")],
    "qat/store/student_folder.py": [
        (
            "deepspeed.utils.zero_to_fp32",
            "get_fp32_state_dict_from_zero_checkpoint",
            "reads a checkpoint",
        ),
        ("deepspeed.utils.zero_to_fp32", "tqdm", "draws the bars of that, which would fill a log file"),
    ],
    "qat/train/deepspeed_internals.py": [
        ("deepspeed.git_version_info", "installed_ops", "names the extensions that were installed with DeepSpeed"),
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
        ("transformers.integrations", "HfDeepSpeedConfig", "partitions a model while it is read"),
    ],
    "qat/train/universal.py": [
        ("deepspeed.checkpoint.ds_to_universal", "main", "converts a checkpoint for another number of ranks"),
        ("deepspeed.checkpoint.ds_to_universal", "parse_arguments", "takes the folders of that"),
    ],
}

MADE = {
    "launch/cli.py": {"argparse": ["_actions"]},
    "qat/evaluate/harness.py": {"lm_eval.models.huggingface": ["_rank", "_world_size"]},
    "qat/train/deepspeed_internals.py": {
        "deepspeed.runtime.engine": ["_config", "load_universal_checkpoint", "checkpoint_engine"],
        "deepspeed.runtime.zero.stage3": ["fp32_partitioned_groups_flat", "optimizer_swapper"],
        "deepspeed.runtime.swap_tensor.optimizer_utils": ["swap_params_info", "min_aio_bytes"],
        "deepspeed.runtime.zero.partition_parameters": [
            "all_gather_coalesced",
            "ds_id",
            "ds_numel",
            "ds_persist",
            "ds_shape",
            "ds_status",
            "ds_tensor",
            "ds_zero_param_process_group",
            "ds_zero_partition_world_size",
            "nvme_swapper",
        ],
    },
}
"""The same for attributes that objects get when they are made: by the module that makes them."""

DOCUMENTED = {"_asdict", "_current_frames", "_exit", "_replace"}
"""Public names of Python's own that begin with an underscore."""

TREES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text())
    for package in ("datagen", "launch", "qat")
    for file in (ROOT / package).rglob("*.py")
}


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [part for parts in PARTS.values() for part in parts],
    ids=lambda value: value if "." in value else "",
)
def test_what_is_relied_on_is_there(module, name, why):
    found = import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} has moved, which {why}: see what took its place."
        found = getattr(found, part)


def test_attributes_that_objects_get_when_they_are_made():
    """Of these, no name can be looked up: what makes them must still stand in the package's source."""
    for module, names in (made for modules in MADE.values() for made in modules.items()):
        source = inspect.getsource(import_module(module))
        assert not [name for name in names if not re.search(rf"\b{name}\b", source)], module


def listed(file: str) -> set[str]:
    """The names that ``file`` may use."""
    parts = {name for module, name, _ in PARTS.get(file, []) for name in f"{module}.{name}".split(".")}
    return parts.union(*MADE.get(file, {}).values())


def last_names(file: str) -> set[str]:
    parts = {name.rpartition(".")[2] for _, name, _ in PARTS.get(file, [])}
    return parts.union(*MADE.get(file, {}).values())


def defined(tree: ast.Module) -> set[str]:
    """The names that a file gives to functions, classes, and attributes of classes and of their objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            named = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.ClassDef)]
            assigned = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            assigned += [target for part in node.body if isinstance(part, ast.Assign) for target in part.targets]
            found |= {part.name for part in named} | {target.id for target in assigned if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_itself(node):
            found.add(node.attr)
    return found


def of_itself(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) in ("self", "cls", "super()")


OURS = set().union(*map(defined, TREES.values()))


def used(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Names of attributes and of what is imported, and whether they are an object's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, of_itself(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name, False) for alias in node.names for name in alias.name.split("."))
            yield from ((name, False) for name in (getattr(node, "module", None) or "").split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            yield from ((name.value, False) for name in node.args[1:2] if isinstance(name, ast.Constant))


def operators(tree: ast.Module) -> set[str]:
    """The names in all ``torch.ops.library.name``."""
    found = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {name for chain in found if chain.startswith("torch.ops.") for name in chain.split(".")[2:]}


SOMEWHERE = set().union(*map(last_names, PARTS.keys() | MADE.keys())) - OURS - {"tqdm"}
"""What is listed for any file. tqdm is also a package."""


def foreign(tree: ast.Module) -> set[str]:
    """The private names of others that a file uses: with an underscore and not defined in it, what DeepSpeed calls
    ``ds_``, torch's operators, and what is listed for any file."""
    found, here = operators(tree), defined(tree)
    for name, own in used(tree):
        private = re.match(r"_[a-z]|ds_", name)
        known = OURS if own or name.startswith("ds_") else here
        if name in SOMEWHERE or (private and name not in known | DOCUMENTED):
            found.add(name)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch._grouped_mm(a, b)",
        "import torch._dynamo",
        "from transformers.utils import _is_offline",
        "torch.ops.aten.mm(a, b)",
        "weight.ds_process_group",
        "getattr(weight, 'ds_tensor', weight)",
        "engine._config",
        "class Model(HFLM):\n    def run(self): return self._detect_batch_size()",
        "dist.rendezvous('env://')",
    ],
)
def test_private_parts_are_found(line):
    assert foreign(ast.parse(line))


@pytest.mark.parametrize("file", sorted(TREES))
def test_private_parts_are_used_in_the_one_file_that_is_listed(file):
    unlisted = foreign(TREES[file]) - listed(file)
    assert not unlisted, f"{file} uses {sorted(unlisted)}: list them here, or call the file that is listed with them."


@pytest.mark.parametrize("file", sorted(PARTS.keys() | MADE.keys()))
def test_what_is_listed_is_used(file):
    source = (ROOT / file).read_text()
    unused = {name for name in last_names(file) if not re.search(rf"\b{name}\b", source)}
    assert not unused, f"{file} no longer uses {sorted(unused)}: take them from the list."


def test_what_deepspeed_does_with_a_parameter():
    """qat.train.code_gather takes the place of these calls; a new version may make others."""
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
