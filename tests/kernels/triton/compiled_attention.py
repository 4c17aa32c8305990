"""Run in a process of its own by test_compile.py: compiles the kernels for chips that are not there, on the plans users run.

Every launch takes its arguments from the host code that a GPU would run, on plans of the benchmark's own cases: Radial (tiles
with unused lanes), strided and sliding windows (partial tiles), a union (packed masks), a key mask. Prints one JSON line per
kernel: registers, spills, shared memory, matrix instructions, widths of loads, prefetching. `--arch`, `--dim`, `--case`,
`--kernel` and `--dtype` choose; `--set` replaces the shipped settings.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from genattn.apps.bench.cases import gpu_cases
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.reference.tail import TailKeys
from genattn.kernels.triton import backward_kernel, forward_kernel, full_tiles_kernel, halo_kernel
from genattn.kernels.triton.block_sparse import dkv_arguments, dq_arguments, forward_arguments, precision_of
from genattn.kernels.triton.config import settings_of, table_row
from genattn.kernels.triton.full_tiles import full_tiles_arguments
from genattn.kernels.triton.halo import halo_arguments
from genattn.kernels.triton.int8_scores import int8_arguments
from genattn.kernels.triton.tail import pseudo_keys, tail_dkv_arguments
from genattn.patterns.combine import Union
from genattn.patterns.halo import halo_plan
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

TOOLS = Path(nvidia.__file__).parent / "bin"
TARGETS = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
ROWS = {"sm_89": "sm_86"}  # whose shipped settings a chip takes
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA", "USETMAXREG", "UTMALDG")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
HEADS = 4
_WARPS = r"_mma<.*?warpsPerCTA = \[([\d, ]+)\]"
_TOLD = ("SPLIT", "FINE", "BLOCK_Q", "BLOCK_K", "RULE", "HOLES")


def source(kernel, arguments):
    """What the JIT would compile for these arguments: types, constants, and divisibility by 16."""
    options = {n: arguments.pop(n) for n in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes), options


def facts(compiled, arch):
    """Registers, spills, shared memory, matrix instructions, and what the compiler made of the loads."""
    found = {"shared": compiled.metadata.shared, **layout_facts(compiled.asm["ttgir"])}
    if arch == "hip":
        text = compiled.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return found | {"mfma": text.count("v_mfma"), "two_byte_loads": len(re.findall(r"global_load_u?short", text))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found["registers"] = int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])
    found["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    # 16-bit loads of bit masks are meant; rows of two bytes at a time are not
    found["two_byte_loads"] = len(re.findall(r"\bLDG\.E\.U16\b|\bLDG\.E\.\w*\.U16\b", code))
    found["loop"] = longest_loop(code)
    return found | {name.lower(): len(re.findall(rf"\b{name}\b", code)) for name in MATRIX}


def layout_facts(ttgir):
    """From the compiler's own middle form: operands' widths, how warps stand, buffers of the copies, what waits leave open."""
    allocated = r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32)"
    buffers = [int(n) for n in re.findall(allocated, ttgir)]
    loops = re.findall(r"scf\.for.*?\n(?:.*\n)*?\s+\} ", ttgir)
    waits = [int(n) for loop in loops for n in re.findall(r"ttg\.async_wait .*?num = (\d+)", loop)]
    return {
        "k_width": sorted({int(n) for n in re.findall(r"kWidth = (\d+)", ttgir)}),
        "warps_per_cta": sorted({tuple(map(int, w.split(","))) for w in re.findall(_WARPS, ttgir)}),
        "buffers": sorted(buffers),
        "waits": sorted(waits),
    }


def longest_loop(code):
    """Instructions between the labels of the longest backward branch without another inside it."""
    labels, best, count = {}, 0, 0
    for line in code.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            jump = re.search(r"BRA\S*\s+.*?`\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels and labels[jump[1]] < count - 8:
                inner = any(labels[jump[1]] < at < count for name, at in labels.items() if name in jumped)
                best = best if inner else max(best, count - labels[jump[1]])
                jumped.add(jump[1])
    return best


jumped: set[str] = set()


def real_plans():
    """{name: (pattern, layout)}: the benchmark's own cases, and a union of two."""
    named = {c.name: (c.pattern, c.layout) for c in gpu_cases()}
    grid = TokenLayout.from_grid((8, 30, 52))
    return {
        "radial": named["radial hunyuan 720p 117f"],
        "strided": named["gna 18x24x24 strided 30x48x80"],
        "sliding": named["gna 18x24x24 sliding 30x48x80"],
        "union": (Union(RadialPattern(decay=0.25), NeighborhoodPattern((3, 9, 9))), grid),
        "tail": (RadialPattern(decay=0.25), grid),
        "fade": (LogitDecayed(RadialPattern(decay=0.25, tail="mean"), 4), grid),
        "runs": (None, TokenLayout.from_grid((8, 16, 16))),
    }


@cache
def plan_of(name, block_q, block_k):
    pattern, layout = real_plans()[name]
    if pattern is None:
        return dense_plan(layout.seqlen, layout.seqlen, block_q, block_k)
    plan = pattern.plan(layout, block_q, block_k)
    return plan.with_tail("mean") if name == "tail" else plan


def tensor(seqlen, dim, dtype, heads=HEADS):
    return torch.empty(1, seqlen, heads, dim, dtype=dtype)


def launches(arch, dim, dtype, case, masked=False):
    """(name, kernel, arguments) of the shipped settings."""
    row = ROWS.get(arch, arch)
    plan = plan_of(case, *settings_of(row)[table_row(dim, dtype)]["tile"])
    q, k, v, out, grad = (tensor(plan.seqlen_q, dim, dtype) for _ in range(5))
    lse, delta = torch.empty(2, 1, plan.seqlen_q, HEADS)
    mask = torch.ones(1, plan.seqlen_k, dtype=torch.bool) if masked else None
    pseudo = pseudo_keys(k[:, :, :1], v[:, :, :1], plan, mask)
    if pseudo is not None:
        # the means of one head stand for all: nothing here is computed
        whole = pseudo.key.expand(-1, -1, HEADS, -1).contiguous()
        pseudo = TailKeys(whole, whole, pseudo.log_count, pseudo.tokens, pseudo.members)
        found = [whole.float(), whole.float()]
        back = tail_dkv_arguments(grad, q, lse, delta, pseudo, found, plan, 0.1, precision_of(q, row), arch=row)
        yield "tail dkv", backward_kernel.tail_dkv_kernel, back
    forward = forward_arguments(q, k, v, out, lse, plan, None, mask, arch=row, pseudo=pseudo)
    yield "forward", forward_kernel.forward_kernel, forward
    yield "persistent", forward_kernel.forward_kernel, forward | {"PERSISTENT": True}
    yield "dq", backward_kernel.dq_kernel, dq_arguments(*(q, k, v, grad, lse, delta, out), plan, None, mask, row, pseudo)
    yield "dkv", backward_kernel.dkv_kernel, dkv_arguments(q, k, v, grad, lse, delta, k, v, plan, None, mask, arch=row)
    if dtype != torch.float32 and plan.tail is None and plan.fade is None:
        whole = tensor(plan.seqlen_q, dim, torch.int8), torch.empty(1, HEADS, len(plan.query_tiles))
        yield "int8", forward_kernel.forward_kernel, int8_arguments(whole, whole, v, out, lse, plan, None, mask, arch=row)
    if case in ("runs", "radial") and not masked and arch in ("sm_90", "sm_100") and dtype != torch.float32:
        yield "full", full_tiles_kernel.full_tiles_kernel, full_tiles_arguments(q, k, v, out, lse, plan, None)
    if isinstance(real_plans()[case][0], NeighborhoodPattern):
        pattern, layout = real_plans()[case]
        boxes = halo_plan(pattern, layout)
        yield "halo", halo_kernel.halo_kernel, halo_arguments(q, k, v, out, lse, boxes, None, mask, arch=row)[0]


def with_setting(arguments, setting):
    if setting is None:
        return dict(arguments)
    names = ("num_warps", "num_stages", "SPLIT", "FINE")
    if "SPLIT" not in arguments:
        names = ("num_warps", "num_stages", "BLOCK_K")
    return arguments | dict(zip(names, map(int, setting.split(","))))


def report(kernel, arguments, target, arch, row, keep=None):
    made, options = source(kernel, arguments)
    row = {"arch": arch, "triton": triton.__version__, **row, **options}
    row |= {name.lower(): arguments[name] for name in _TOLD if name in arguments}
    try:
        compiled = triton.compile(made, target=target, options=options)
    except Exception as error:  # a setting that a chip cannot take is a finding, not the end
        while error.__cause__ is not None:
            error = error.__cause__
        print(json.dumps(row | {"error": f"{type(error).__name__}: {error}"[-300:]}), flush=True)
        return
    if keep:
        Path(keep).write_text(compiled.asm["ttgir"])
    print(json.dumps(row | facts(compiled, arch)), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", action="append", choices=[*TARGETS, "hip"])
    parser.add_argument("--dim", action="append", type=int)
    parser.add_argument("--kernel", action="append")
    parser.add_argument("--case", action="append")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--set", action="append", help="warps,stages,split,fine instead of the shipped settings")
    parser.add_argument("--tile", help="block_q,block_k instead of the shipped tile")
    parser.add_argument("--keep", help="a file for the compiler's middle form of the last kernel")
    chosen = parser.parse_args()
    for arch in chosen.arch or ["sm_90"]:
        target = GPUTarget("hip", "gfx942", 64) if arch == "hip" else GPUTarget("cuda", TARGETS[arch], 32)
        for dim, dtype, case in (
            (d, t, c)
            for d in chosen.dim or [128]
            for t in chosen.dtype or ["bf16"]
            for c in chosen.case or ["radial", "sliding"]
        ):
            if chosen.tile:
                row = settings_of(ROWS.get(arch, arch))[table_row(dim, DTYPES[dtype])]
                row["tile"] = [int(n) for n in chosen.tile.split(",")]
            for name, kernel, arguments in launches(arch, dim, DTYPES[dtype], case, chosen.masked):
                if chosen.kernel and name not in chosen.kernel:
                    continue
                for setting in chosen.set or [None]:
                    row = {"dim": dim, "dtype": dtype, "kernel": name, "case": case, "masked": chosen.masked}
                    report(kernel, with_setting(arguments, setting), target, arch, row, chosen.keep)


if __name__ == "__main__":
    main()
