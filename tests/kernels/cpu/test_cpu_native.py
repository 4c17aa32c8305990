"""The C++ kernel: every instruction set, every kind of rule, and how it is built, cached and done without."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genattn.kernels.block_sparse import block_sparse_attention, choose_impl
from genattn.kernels.cpu import native as cpu_native, native_build
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.plan.element_rule import BlockRule, CombinedRule, PerHeadRule
from genattn.kernels.plan.random_plan import plan_from_rule, random_grid_rule, random_plan
from genattn.kernels.reference.attention import reference_attention

pytestmark = pytest.mark.skipif(
    isinstance(native_build.native_library(), str), reason=f"no native library: {native_build.native_library()}"
)


def _inputs(plan, heads=2, dim=24, dtype=torch.float32):
    return [torch.randn(1, n, heads, dim).to(dtype) for n in (plan.seqlen_q, plan.seqlen_k, plan.seqlen_k)]


def _check(plan, heads=2, dim=24):
    inputs = _inputs(plan, heads, dim)
    out, lse = block_sparse_attention(*inputs, plan, impl="cpu", return_lse=True)
    expected, expected_lse = reference_attention(*(x.double() for x in inputs), plan)
    assert (out.double() - expected).norm() <= 2e-6 * expected.norm().clamp_min(1e-9)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["x86-64-v4", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("dim", [20, 64])
def test_every_instruction_set(arch, dim, monkeypatch):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx" not in flags or (arch == "x86-64-v4" and "avx512vl" not in flags):
        pytest.skip(f"this processor does not run {arch}")
    monkeypatch.setenv("GENATTN_NATIVE_ARCH", arch)
    lanes = native_build.native_library().genattn_vector_lanes()
    assert lanes == {"x86-64-v4": 16, "x86-64-v3": 8, "x86-64": 4}[arch]
    for seed, scattered in ((1, False), (2, True)):
        _check(random_plan(seed, scattered=scattered, block_q=40, block_k=24), dim=dim)
        for tail in ("mean", "mean2"):
            tailed = random_plan(seed, scattered=scattered, block_q=40, block_k=24).with_tail(tail)
            assert tailed.tail is not None
            _check(tailed, dim=dim)
    _check(dense_plan(150, 133, 64, 72), dim=dim)


def _rules(heads):
    draw = torch.Generator().manual_seed(3)
    grids = tuple(random_grid_rule(draw, (3, 4, 6), 5, 2, 1) for _ in range(2))
    tokens = grids[0].coords.shape[0]
    table = torch.rand(heads, -(-tokens // 7), -(-tokens // 7), generator=draw) < 0.4
    blocks = BlockRule(table, 7)
    return {
        "blocks": blocks,
        "any": CombinedRule((grids[0], blocks), "any"),
        "all": CombinedRule((grids[0], blocks), "all"),
        "grid per head": PerHeadRule(grids, (0, 1)),
        "mixed per head": PerHeadRule((grids[1], BlockRule(table[:1], 7)), (1, 0)),
    }, tokens


@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("name", list(_rules(1)[0]))
def test_every_kind_of_rule(name, lists):
    rules, tokens = _rules(2)
    tiles = dense_plan(tokens, tokens, 24, 40)
    _check(plan_from_rule(rules[name], tiles.query_tiles, tiles.key_tiles, tokens, heads=lists))


@pytest.mark.parametrize("heads", [1, 2])
def test_masks_too_large_to_keep(heads, monkeypatch):
    monkeypatch.setattr(cpu_native, "_BITS_LIMIT", 0)
    plan = random_plan(8, heads=heads, scattered=True)
    _check(plan)
    assert plan.cache["masks"] is None
    rules, tokens = _rules(2)
    tiles = dense_plan(tokens, tokens, 24, 40)
    plan = plan_from_rule(rules["blocks"], tiles.query_tiles, tiles.key_tiles, tokens, heads=2)
    with pytest.raises(ValueError, match="must stay under 0 MiB"):
        block_sparse_attention(*_inputs(plan), plan, impl="cpu")


def test_small_workspace_packs_head_by_head(monkeypatch):
    plan = random_plan(4)
    inputs = _inputs(plan, heads=4)
    whole = block_sparse_attention(*inputs, plan, impl="cpu")
    monkeypatch.setattr(cpu_native, "_WORKSPACE", 1)
    assert torch.equal(whole, block_sparse_attention(*inputs, plan, impl="cpu"))


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_nan_and_inf_are_not_swallowed(place):
    plan = dense_plan(40, 40, 16, 16)
    inputs = dict(zip(("query", "key", "value"), _inputs(plan)))
    inputs[place][0, 5, 0, 3] = float("nan")
    out = block_sparse_attention(*inputs.values(), plan, impl="cpu")
    expected, _ = reference_attention(*inputs.values(), plan)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()


def test_large_scores_do_not_overflow():
    plan = dense_plan(64, 64, 32, 32)
    query, key, value = _inputs(plan)
    out = block_sparse_attention(query * 100, key * 100, value, plan, impl="cpu")
    expected, _ = reference_attention(query.double() * 100, key.double() * 100, value.double(), plan)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)


def test_opt_out_is_named(monkeypatch):
    monkeypatch.setenv("GENATTN_NO_NATIVE", "1")
    plan = random_plan(0)
    chosen, reasons = choose_impl(*_inputs(plan), plan)
    assert chosen == "grouped"
    assert "GENATTN_NO_NATIVE" in reasons["cpu"]
    with pytest.raises(ValueError, match="GENATTN_NO_NATIVE"):
        block_sparse_attention(*_inputs(plan), plan, impl="cpu")
    with pytest.raises(ValueError, match="GENATTN_NO_NATIVE"):
        cpu_native.native_attention(*_inputs(plan), plan)


def test_missing_and_broken_compilers_are_told_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("GENATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "genattn"):
        assert "no-such-compiler" in native_build.native_library()
        native_build.native_library()
        assert len(caplog.records) == 1
        broken = tmp_path / "broken-cxx"
        broken.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\n[ \"$1\" = --version ]\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        assert "this compiler is broken" in native_build.native_library()
    assert not list(tmp_path.glob("*.so"))
    plan = random_plan(0)
    assert choose_impl(*_inputs(plan), plan)[0] == "grouped"


def test_unwritable_cache_is_told(monkeypatch, tmp_path):
    target = tmp_path / "file"
    target.write_text("not a folder")
    monkeypatch.setenv("GENATTN_CACHE", str(target / "below"))
    assert "could not be built" in native_build.native_library()


def test_two_processes_may_race_for_the_build(tmp_path):
    code = "from genattn.kernels.cpu.native_build import native_library as n; print(n().genattn_vector_lanes())"
    root = str(Path(native_build.__file__).resolve().parents[2])
    env = dict(os.environ, GENATTN_CACHE=str(tmp_path), GENATTN_NATIVE_ARCH="x86-64", PYTHONPATH=root)
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [run.communicate(timeout=200)[0].strip() for run in runs] == [b"4", b"4"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_a_workspace_that_cannot_be_had_is_told(monkeypatch):
    plan = dense_plan(40, 50, 16, 16)
    library = SimpleNamespace(genattn_block_sparse_forward=lambda call: 1)
    monkeypatch.setattr(cpu_native, "native_library", lambda: library)
    with pytest.raises(MemoryError, match=r"could not allocate its workspace for \(1, 50, 2, 24\) keys"):
        cpu_native.native_attention(*_inputs(plan), plan)


def test_a_changed_header_is_built_anew(tmp_path, monkeypatch):
    """The library's name hashes all that is compiled, not the one file that the compiler is given."""
    for file in (*native_build._SOURCE.parent.glob("*.h"), native_build._SOURCE):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(native_build, "_SOURCE", tmp_path / native_build._SOURCE.name)
    names = [native_build._fingerprint(sys.executable, [])]
    for header in sorted(tmp_path.glob("*.h")):
        header.write_text(header.read_text() + "\n")
        names.append(native_build._fingerprint(sys.executable, []))
    assert len(set(names)) == len(names) > 1
