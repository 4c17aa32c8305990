"""Run in a process of its own by test_compile.py: compiles the kernels for chips that are not there.

For each kernel and architecture prints registers, spills, shared memory and matrix instructions as one JSON line. Options:
`--arch sm_90 --arch hip ...` and `--dim 128 ...`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


import torch
import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import dense_plan, run_tiles
from genattn.kernels.plan.random_plan import plan_from_rule, random_grid_rule
from genattn.kernels.triton import (
    backward_kernel as block_sparse_backward_kernel,
    forward_kernel as block_sparse_kernel,
    full_tiles_kernel,
    halo_kernel,
)
from genattn.kernels.triton.block_sparse import dkv_arguments, dq_arguments, forward_arguments
from genattn.kernels.triton.config import settings_of, table_row
from genattn.kernels.triton.full_tiles import full_tiles_arguments
from genattn.kernels.triton.halo import halo_arguments
from genattn.kernels.triton.int8_scores import int8_arguments
from genattn.patterns.halo import halo_plan
from genattn.patterns.neighborhood import NeighborhoodPattern

TOOLS = Path(nvidia.__file__).parent / "bin"
TARGETS = {"sm_80": 80, "sm_86": 86, "sm_90": 90, "sm_100": 100}
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA", "USETMAXREG", "UTMALDG")
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


def source(kernel, arguments):
    """What the JIT would compile for these arguments: types, constants, and divisibility by 16."""
    options = {n: arguments.pop(n) for n in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes), options


def facts(compiled, arch):
    """Registers, spills, shared memory and matrix instructions of a compiled kernel."""
    found = {"shared": compiled.metadata.shared}
    if arch == "hip":
        text = compiled.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return found | {"mfma": text.count("v_mfma")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found["registers"] = int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])
    found["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return found | {name.lower(): len(re.findall(rf"\b{name}\b", code)) for name in MATRIX}


def plan_for(block_q, block_k, partial):
    tokens = 2048
    if not partial:
        return dense_plan(tokens, tokens, block_q, block_k)
    rule = random_grid_rule(torch.Generator().manual_seed(1), (8, 16, 16), 0, 0)
    rule = rule.__class__(rule.coords, rule.frame_class, rule.low, rule.width, rule.extent)
    return plan_from_rule(rule, run_tiles(tokens, block_q), run_tiles(tokens, block_k), tokens)


def launches(arch, dim, dtype, partial):
    """(name, kernel, arguments) of the shipped settings."""
    plan = plan_for(*settings_of(arch)[table_row(dim)]["tile"], partial)
    q, k, v, out, grad = (torch.empty(1, 2048, 16, dim, dtype=dtype) for _ in range(5))
    lse, delta = torch.empty(2, 1, 2048, 16)
    forward = forward_arguments(q, k, v, out, lse, plan, None, None, arch=arch)
    yield "forward", block_sparse_kernel.forward_kernel, dict(forward)
    yield "persistent", block_sparse_kernel.forward_kernel, forward | {"PERSISTENT": True}
    backward = block_sparse_backward_kernel
    yield "dq", backward.dq_kernel, dq_arguments(q, k, v, grad, lse, delta, out, plan, None, None, arch=arch)
    yield "dkv", backward.dkv_kernel, dkv_arguments(q, k, v, grad, lse, delta, k, v, plan, None, None, arch=arch)
    whole = torch.empty(1, 2048, 16, dim, dtype=torch.int8), torch.empty(1, 16, 32)
    yield "int8", block_sparse_kernel.forward_kernel, int8_arguments(whole, whole, v, out, lse, plan, None, None, arch=arch)
    if not partial and arch in ("sm_90", "sm_100"):
        yield "full", full_tiles_kernel.full_tiles_kernel, full_tiles_arguments(q, k, v, out, lse, plan, None)
    pattern = NeighborhoodPattern((4, 8, 8), stride=1 if partial else (4, 8, 8))
    boxes = halo_plan(pattern, TokenLayout.from_grid((8, 16, 16)))
    yield "halo", halo_kernel.halo_kernel, halo_arguments(q, k, v, out, lse, boxes, None, None, arch=arch)[0]


def with_setting(arguments, setting):
    if setting is None:
        return dict(arguments)
    names = ("num_warps", "num_stages", "SPLIT", "FINE")
    if "SPLIT" not in arguments:
        names = ("num_warps", "num_stages", "BLOCK_K")
    return arguments | dict(zip(names, map(int, setting.split(","))))


def report(kernel, arguments, target, arch, row):
    made, options = source(kernel, arguments)
    compiled = triton.compile(made, target=target, options=options)
    taken = {name.lower(): arguments[name] for name in ("SPLIT", "FINE", "BLOCK_K", "SPECIALISED") if name in arguments}
    row = {"arch": arch, "triton": triton.__version__, **row, **options, **taken}
    print(json.dumps(row | facts(compiled, arch)), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", action="append", choices=[*TARGETS, "hip"])
    parser.add_argument("--dim", action="append", type=int)
    parser.add_argument("--kernel", action="append")
    parser.add_argument("--set", action="append", help="warps,stages,split,fine instead of the shipped settings")
    parser.add_argument("--full-only", action="store_true")
    chosen = parser.parse_args()
    for arch in chosen.arch or ["sm_90"]:
        target = GPUTarget("hip", "gfx942", 64) if arch == "hip" else GPUTarget("cuda", TARGETS[arch], 32)
        for dim in chosen.dim or [128]:
            for partial in (False,) if chosen.full_only else (False, True):
                for name, kernel, arguments in launches(arch, dim, torch.bfloat16, partial):
                    if chosen.kernel and name not in chosen.kernel:
                        continue
                    for setting in chosen.set or [None]:
                        report(
                            kernel,
                            with_setting(arguments, setting),
                            target,
                            arch,
                            {"dim": dim, "kernel": name, "partial": partial},
                        )


if __name__ == "__main__":
    main()
