"""The Triton kernels compiled ahead of time for chips that are not here, on the plans that users run.

What the compiler's own output must show: shared memory within the chip's limit in every type, no spills where settings are
tuned, matrix instructions, operands of two 16-bit numbers (an 8-bit load in their slice would make it four), rows of 16 bytes,
warps along the queries, and keys and values prefetched at least a turn ahead.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SHARED = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10,
    "hip": 64 << 10,
}  # fmt: skip
MATRIX = {"sm_90": "hgmma", "sm_100": "utchmma", "hip": "mfma"}
INTEGER = {"sm_90": "igmma", "sm_100": "utcimma", "hip": "mfma"}
CHIPS = list(SHARED)
OLDER = "3.6.0"
# spilled instructions that are known and put up with: {(kernel, chip or "any")}; never in the forward of what ships in 16 bits
SPILLS = {"persistent": 400, "full": 400, "int8": 100, "dkv": 110, "dq": 30, "halo": 60}


def _compile(*options, path=None):
    script = Path(__file__).with_name("compiled_attention.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.run([sys.executable, str(script), *options], env=env, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def _check(row):
    assert "error" not in row, row
    arch, kernel = row["arch"], row.get("kernel", "forward")
    assert row["shared"] <= SHARED[arch], row
    if row.get("dtype") == "fp32":
        return  # its products are in tf32, three to one; it must run, and does not ship as fast
    matrix = INTEGER.get(arch, "imma") if kernel == "int8" else MATRIX.get(arch, "hmma")
    assert row[matrix] > 0, row
    assert kernel != "full" or arch != "sm_90" or row["usetmaxreg"] > 0, "not specialised"
    assert row["spills"] <= (SPILLS.get(kernel, 0)), row
    if arch == "hip" or kernel not in ("forward", "dq", "persistent"):
        return
    assert row["two_byte_loads"] == 0 or row["rule"] == 2, "rows are loaded two bytes at a time"
    if arch == "sm_100":
        return  # its operands never pass through registers
    assert row["k_width"] == [2], "operands must be pairs of 16-bit numbers"
    assert all(across == 1 for _, across in row["warps_per_cta"]), "warps must stand along the queries"
    assert row["buffers"], "keys and values must be prefetched"
    assert min(row["buffers"]) >= 2, "two turns of keys and values must fit"
    assert row["waits"], row
    assert min(row["waits"]) >= 2, "a turn must not wait for what the next one needs"


@pytest.mark.parametrize(("arch", "case"), [("sm_90", "radial"), ("sm_89", "sliding")])
def test_the_forward_on_real_plans(arch, case):
    rows = _compile("--arch", arch, "--dim", "128", "--kernel", "forward", "--case", case)
    assert len(rows) == 1
    _check(rows[0])
    assert rows[0]["holes"] == (case == "radial"), "Radial's tiles have unused lanes"


def test_a_bad_build_is_seen():
    good = {
        "arch": "sm_90", "kernel": "forward", "dtype": "bf16", "spills": 0, "shared": 1 << 10, "hgmma": 8, "k_width": [2],
        "warps_per_cta": [[8, 1]], "buffers": [3, 3], "waits": [3], "two_byte_loads": 0, "rule": 0,
    }  # fmt: skip
    _check(good)
    for fault in (
        {"spills": 1},
        {"shared": 1 << 20},
        {"hgmma": 0},
        {"kernel": "int8", "igmma": 0},
        {"kernel": "full", "usetmaxreg": 0},
        {"k_width": [4]},
        {"warps_per_cta": [[1, 4]]},
        {"buffers": [1, 1]},
        {"buffers": []},
        {"waits": [0]},
        {"two_byte_loads": 4},
        {"error": "OutOfResources"},
        {"dtype": "fp32", "shared": 1 << 20},
    ):
        with pytest.raises(AssertionError):
            _check(good | fault)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dim", ["64", "128"])
def test_every_kernel_on_real_plans(arch, dim):
    rows = _compile("--arch", arch, "--dim", dim, *_cases("radial", "strided", "sliding", "union", "tail", "fade"))
    assert {"forward", "dq", "dkv", "int8", "halo", "persistent"} <= {row["kernel"] for row in rows}
    for row in rows:
        _check(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
def test_a_key_mask_costs_no_operand_its_layout(arch):
    for row in _compile("--arch", arch, "--masked", *_cases("radial", "sliding"), "--kernel", "forward", "--kernel", "dq"):
        _check(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_type_fits(arch, dtype):
    dims = ("--dim", "64", "--dim", "128", "--dim", "256")
    kernels = ("--kernel", "forward", "--kernel", "dq", "--kernel", "dkv")
    for row in _compile("--arch", arch, *dims, "--dtype", dtype, *_cases("sliding"), *kernels):
        assert "error" not in row, row
        assert row["shared"] <= SHARED[arch], row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dim", ["40", "72", "80", "88", "96"])
def test_rows_of_every_head_dim_are_loaded_sixteen_bytes_at_a_time(arch, dim):
    for row in _compile("--arch", arch, "--dim", dim, *_cases("sliding"), "--kernel", "forward", "--kernel", "dq"):
        assert row["two_byte_loads"] == 0, row


def _cases(*names):
    return [word for name in names for word in ("--case", name)]


@pytest.fixture(scope="module")
def older_triton(tmp_path_factory):
    """A folder that holds the older Triton alone, to stand before the installed one."""
    target = tmp_path_factory.mktemp("triton")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), f"triton=={OLDER}"]
    got = subprocess.run(install, capture_output=True, text=True, timeout=900, check=False)
    if got.returncode:
        pytest.skip(f"triton {OLDER} cannot be installed here: {got.stderr.strip().splitlines()[-1]}")
    return target


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "hip"])
def test_every_kernel_compiles_with_an_older_triton(arch, older_triton):
    rows = _compile("--arch", arch, "--dim", "64", "--dim", "128", *_cases("radial", "sliding"), path=older_triton)
    for row in rows:
        assert row["triton"] == OLDER
        assert "error" not in row, row
        assert row["shared"] <= SHARED[arch], row
        if row["kernel"] in ("forward", "dq") and arch in ("sm_80", "sm_90"):
            # a few registers more are spilled than with the newer one, for which the settings are chosen
            _check(row | {"spills": max(0, row["spills"] - 60)})
