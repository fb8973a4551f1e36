"""Compiles our kernels for an H100, which needn't be there, with the compiler that comes with Triton.

Prints JSON: for each kernel and size, the bytes of its stack, where spilled registers go, and its code in PTX. To be
run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from datagen import attention_triton
from qat.quant.kernels import device, host

LENGTHS = (64, 128, 4096, 11008, 32768)
KINDS = (
    ("bf16", "i8", True, False),
    ("bf16", "bf16", True, True),
    ("fp32", "fp32", False, False),
    ("fp16", "fp16", False, True),
)
"""What is rounded, to what, whether without zero points, and whether on a grid that is given."""

INT32S = ("rows", "count", "blocks", "stride", "x_stride", "weight_stride", "max_length")

WIDTHS = ((64, 96), (4096, 11008), (8192, 28672))
"""Those of a model, and of its MLP."""


def main() -> None:
    found = {}
    for columns in LENGTHS:
        rows, block, warps = host.tile(columns)
        sizes = {"COLUMNS": columns, "ROWS": rows, "BLOCK": block}
        for source, result, symmetric, given in KINDS:
            pointers = {"x": source, "result": result, "scales": "fp32"} | ({} if symmetric else {"zeros": "fp32"})
            grid = {"GIVEN": given, "SYMMETRIC": symmetric, "SCALE": tl.float32, "QMAX": 7, "LOW": -8, "HIGH": 7}
            found[f"round {columns} {source} to {result}"] = compiled(device.round, pointers, grid | sizes, warps)
        for result, more in (("bf16", {}), ("fp16", {"zeros": "fp32"})):
            pointers = {"codes": "i8", "result": result, "scales": "fp32"} | more
            grid = {"SYMMETRIC": not more}
            found[f"values {columns} to {result}"] = compiled(device.values, pointers, grid | sizes, warps)
    zeros = dict.fromkeys(("x_zeros", "weight_zeros", "x_sums", "weight_sums"), "i32")
    for rows, more, result in ((64, zeros, "bf16"), (1024, zeros, "bf16"), (1024, {}, "bf16"), (1024, zeros, "fp32")):
        pointers = {"x": "i8", "weight": "i8", "result": result, "x_scales": "fp32", "weight_scales": "fp32"} | more
        tile = host.product_tile(rows)
        sizes = {"COLUMNS": 4096, "OUT": 11008, "ROWS": tile.rows, "OUTS": tile.outs, "INNER": tile.inner}
        name = f"multiply {rows}{' with zeros' if more else ''} to {result}"
        found[name] = compiled(device.multiply, pointers, {"ZEROS": bool(more)} | sizes, tile.warps, tile.stages)
    found["unpair"] = compiled(device.unpair, {"pairs": "u8", "result": "i8"}, {"BLOCK": 4096}, 4)
    for pairs, more, group in ((True, {}, 4096), (True, {"zeros": "i8"}, 64), (False, {}, 4096)):
        pointers = {"codes": "u8", "scales": "u8", "result": "bf16"} | more
        constants = {"PAIRS": pairs, "SYMMETRIC": not more, "COLUMNS": 4096, "GROUP": group, "BLOCK": 4096}
        name = f"stored_values {'pairs' if pairs else 'bytes'} in groups of {group} to bf16"
        found[name] = compiled(device.stored_values, pointers, constants, host.warps(4096))
    for width, of_mlp in WIDTHS:
        for kind, symmetric in (("bf16", True), ("fp32", False)):
            rows, block, warps = host.tile(width)
            sizes = {"COLUMNS": width, "ROWS": rows, "BLOCK": block}
            grid = {"SYMMETRIC": symmetric, "QMAX": 127, "LOW": -128, "HIGH": 127}
            of_codes = {"codes": "i8", "scales": "fp32"} | ({} if symmetric else {"zeros": "fp32"})
            pointers = dict.fromkeys(("x", "weight", "result"), kind) | {"roots": "fp32"}
            constants = {"EPS": 1e-5} | grid | sizes
            found[f"norm {width} to {kind}"] = compiled(
                device.norm, pointers | of_codes, constants, warps, unfused=True
            )
            pointers |= {"grad": kind, "of_weight": "fp32"}
            found[f"norm_gradients {width} to {kind}"] = compiled(
                device.norm_gradients, pointers, sizes, warps, unfused=True
            )
            block = host.piece(of_mlp)
            pointers = dict.fromkeys(("gate", "up", "result"), kind)
            found[f"gated {of_mlp} to {kind}"] = compiled(
                device.gated,
                pointers | of_codes,
                {"COLUMNS": of_mlp, "BLOCK": block} | grid,
                host.warps(block),
                unfused=True,
            )
            pointers = dict.fromkeys(("grad", "gate", "up", "of_gate", "of_up"), kind)
            found[f"gated_gradients to {kind}"] = compiled(
                device.gated_gradients, pointers, {"BLOCK": block}, host.warps(block), unfused=True
            )
    attend, together = attention_triton._attend, attention_triton._together
    for size, groups in ((64, 3), (128, 1), (128, 8), (256, 1)):
        values = dict.fromkeys(("qkv", "cos", "sin", "keys", "values"), "bf16")
        pointers = values | {"position": "i64"} | dict.fromkeys(("sums", "largest", "totals"), "fp32")
        sizes = {"KV_HEADS": 8, "GROUPS": groups, "ROWS": 16, "HALF": size // 2, "CHUNK": 256, "BLOCK": 64}
        for window in (0, 4096):
            constants = sizes | {"WINDOW": window}
            found[f"attend {size} {groups} {window} to bf16"] = compiled(attend, pointers, constants, 4, unfused=True)
    pointers = {"position": "i64", "out": "bf16"} | dict.fromkeys(("sums", "largest", "totals"), "fp32")
    constants = {"HEADS": 32, "SIZE": 128, "CHUNK": 256}
    found["together to bf16"] = compiled(together, pointers, constants, 1, unfused=True)
    print(json.dumps(found))


def compiled(
    kernel: triton.JITFunction, pointers: dict, constants: dict, warps: int, stages: int = 3, unfused: bool = False
) -> dict:
    """As host.py would have it, for tensors that begin at multiples of 16 bytes."""
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(INT32S, "i32") | {"scale": "fp32"}
    kinds = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kinds) if name in pointers or "stride" in name}
    missing = {name: None for name, kind in kinds.items() if kind == "constexpr"}
    source = ASTSource(kernel, kinds, missing | constants, aligned)
    options = {"num_warps": warps, "num_stages": stages} | (host.UNFUSED if unfused else {})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    return {"stack": stack(code["cubin"]), "ptx": code["ptx"]}


def stack(cubin: bytes) -> int:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", said)
    return int(found)


if __name__ == "__main__":
    main()
