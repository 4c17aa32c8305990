"""What the Triton kernels refuse, and what a launch is given, without a GPU: stand-ins say which chip it would be."""

import ast
import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.triton import halo as halo_module, launch as launch_module, tables
from genattn.kernels.triton.block_sparse import dkv_arguments, dq_arguments, forward_arguments, why_not_triton
from genattn.kernels.triton.config import arch_of, chip_of, launch_of, measured_table, most_lanes, settings_of, tile_sizes
from genattn.kernels.triton.full_tiles import full_tiles_forward
from genattn.kernels.triton.halo import halo_arguments, triton_halo_attention, why_not_triton_halo
from genattn.kernels.triton.launch import alignment, is_wide, launch
from genattn.patterns.combine import PerHead
from genattn.patterns.halo import halo_plan
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CHIPS = {"sm_80": (8, 0), "sm_86": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0)}


def _on_gpu(monkeypatch, capability, memory=24 << 30):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=memory))


def _query(dtype=torch.bfloat16, dim=128, seqlen=256):
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, seqlen, 2, dim))


@pytest.mark.parametrize(("arch", "capability"), CHIPS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
def test_the_tiles_that_suit_a_chip_are_served(arch, capability, dtype, dim, monkeypatch):
    _on_gpu(monkeypatch, capability)
    query = _query(dtype, dim)
    assert arch_of(query.device) == arch
    assert why_not_triton(query, dense_plan(256, 256, *tile_sizes(query.device, dim, dtype))) is None


@pytest.mark.parametrize("capability", CHIPS.values())
def test_float32_tiles_that_a_chip_cannot_hold_are_refused(capability, monkeypatch):
    _on_gpu(monkeypatch, capability)
    reason = why_not_triton(_query(torch.float32), dense_plan(256, 256, 128, 128))
    assert "build the plan with tile_sizes" in reason
    assert "128 x 128" in reason
    assert why_not_triton(_query(torch.bfloat16), dense_plan(256, 256, 128, 128)) is None, "16-bit rows fit"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_chips_before_ampere_are_refused(capability, monkeypatch):
    _on_gpu(monkeypatch, capability)
    pattern = NeighborhoodPattern(3)
    halo = halo_plan(pattern, TokenLayout.from_grid((6, 8)), 16)
    for reason in (why_not_triton(_query(), dense_plan(256, 256)), why_not_triton_halo(_query(seqlen=48), halo)):
        assert reason is not None
        assert "compute capability 8.0" in reason
        assert reason.endswith(f"got {capability[0]}.{capability[1]}")


def test_masks_beyond_an_eighth_of_the_memory_are_refused(monkeypatch):
    layout = TokenLayout.from_grid((4, 24, 24))
    pattern = PerHead((RadialPattern(), NeighborhoodPattern((2, 5, 5))), (0, 0, 1, 1))
    plan = pattern.plan(layout, 64, 64)
    assert tables._kind(plan)[0] == 2, "of no use otherwise"
    _on_gpu(monkeypatch, (9, 0))
    assert why_not_triton(_query(seqlen=layout.seqlen), plan) is None
    _on_gpu(monkeypatch, (9, 0), memory=8 * tables.mask_bytes(plan) - 8)
    assert "packed masks of its partial tiles must stay under" in why_not_triton(_query(seqlen=layout.seqlen), plan)


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    entered, launched = [], []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        yield
        entered.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((grid, arguments, list(entered)))

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    launch(Kernel(), (3, 1), {"a": 1}, SimpleNamespace(device=second))
    assert launched == [((3, 1), {"a": 1}, [second])]
    assert entered == [second, "left"]
    launch(Kernel(), (1, 1), {}, torch.empty(0))
    assert len(entered) == 2, "no device to enter on a CPU"


def test_nothing_is_launched_but_through_launch():
    for path in Path(launch_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert path.name == "launch.py", f"{path.name}:{node.lineno} launches past launch()"


def test_rows_beyond_two_to_the_31_are_seen_in_every_tensor():
    near = torch.empty(1, 460_800, 40, 128, device="meta")
    first = torch.empty(1, 40, 460_800, 128, device="meta").transpose(1, 2)
    assert is_wide(near)
    assert not is_wide(first), "a view with the heads first is near within a head"
    assert is_wide(first, near), "the output is far although the inputs are not"
    assert not is_wide(near[:, :1000])


@pytest.mark.parametrize(("heads", "dim", "most"), [(16, 128, 16), (3, 40, 8), (5, 72, 8), (2, 36, 4), (1, 9, 1)])
def test_alignment_of_rows(heads, dim, most):
    tensor = torch.empty(1, 10, heads, dim)
    assert alignment(tensor) == most
    assert alignment(tensor, torch.empty(1, 10, heads, 3)) <= most


def test_a_forward_builds_nothing_for_the_backward():
    plan = random_plan(3, heads=2)
    shape = (1, plan.seqlen_q, 2, 16)
    tensors = [torch.empty(shape) for _ in range(6)]
    rows = torch.empty(shape[:3])
    forward_arguments(*tensors[:4], rows, plan, None, None)
    assert "transposed" not in vars(plan)
    assert "triton inverse" not in plan.cache
    dq_arguments(*tensors[:4], rows, rows, tensors[4], plan, None, None)
    assert "triton inverse" not in plan.cache
    dkv_arguments(*tensors[:4], rows, rows, *tensors[4:], plan, None, None)
    assert "triton inverse" in plan.cache


def test_numbers_that_change_from_plan_to_plan_compile_nothing_anew():
    from genattn.kernels.triton import backward_kernel, forward_kernel, full_tiles_kernel, halo_kernel

    kernels = [
        forward_kernel.forward_kernel, backward_kernel.dq_kernel, backward_kernel.dkv_kernel, backward_kernel.delta_kernel,
        backward_kernel.tail_dkv_kernel, halo_kernel.halo_kernel, full_tiles_kernel.full_tiles_kernel,
    ]  # fmt: skip
    for kernel in kernels:
        for parameter in kernel.params:
            # tensors and constants are in capitals, fractions have no special values; strides decide how a descriptor is made
            fraction = parameter.name in ("scale", "fade_factor", "fade_off")
            described = kernel is full_tiles_kernel.full_tiles_kernel and parameter.name in forward_kernel.STRIDES
            if not parameter.is_constexpr and parameter.name.islower() and not fraction and not described:
                assert parameter.do_not_specialize, f"{parameter.name} of {kernel.fn.__name__}"


def test_measured_settings_are_kept_by_chip(monkeypatch, tmp_path):
    monkeypatch.setenv("GENATTN_CACHE", str(tmp_path))
    names = set()
    for capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        _on_gpu(monkeypatch, capability)
        names.add(measured_table(arch_of(torch.device("cuda"))).name)
        assert chip_of(torch.device("cuda")) == f"sm_{capability[0]}{capability[1]}"
    assert names == {"tune-sm_86.json", "tune-sm_89.json", "tune-sm_120.json", "tune-sm_121.json"}


def test_steps_and_warps_follow_the_tiles_of_the_plan():
    tile = settings_of("sm_90")["128"]["tile"]
    tuned = launch_of("forward", "sm_90", 128, *tile)
    smaller = launch_of("forward", "sm_90", 128, 64, 64)
    assert 64 // smaller.split <= tile[1] // tuned.split, "no longer step than tuned for"
    assert smaller.warps == 4
    masked = launch_of("forward", "sm_90", 128, *tile, masked=True)
    assert (masked.split, masked.fine) == (2 * tuned.split, 2 * tuned.fine)
    wide = launch_of("forward", "sm_80", 128, 128, 128)
    assert wide.split == 2 * launch_of("forward", "sm_80", 128, *settings_of("sm_80")["128"]["tile"]).split
    assert most_lanes("cpu", 128, torch.float32) == (1024, 1024)
    assert most_lanes("sm_80", 128, torch.float32)[0] < 128


def test_calls_that_a_kernel_does_not_serve_are_refused_before_a_launch(monkeypatch):
    query, key, value = (torch.randn(1, 60, 2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="impl='triton-full' serves no key mask: a hidden key makes its tile partial"):
        full_tiles_forward(query, key, value, dense_plan(60, 60, 64, 64), key_mask=torch.ones(1, 60, dtype=torch.bool))
    plan = halo_plan(NeighborhoodPattern(3), TokenLayout.from_grid((3, 4, 5)))
    with pytest.raises(ValueError, match="the halo kernel cannot serve this call: .*; use halo_attention"):
        triton_halo_attention(query, key, value, plan)
    monkeypatch.setattr(halo_module, "halo_tables", lambda plan: "its boxes overlap")
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:3])
    with pytest.raises(ValueError, match="its boxes overlap"):
        halo_arguments(query, key, value, out, lse, plan, None, None, arch="sm_90")


def test_masks_and_the_tails_backward_have_settings_of_their_own_where_the_usual_ones_spill():
    row = settings_of("sm_100")["128"]
    masked = launch_of("forward", "sm_100", 128, *row["tile"], masked=True)
    assert [masked.warps, masked.stages, masked.split, masked.fine] == row["forward masked"]
    plain = launch_of("forward", "sm_100", 128, *row["tile"])
    assert [plain.warps, plain.stages, plain.split, plain.fine] == row["forward"] != row["forward masked"]
    assert "forward masked" not in settings_of("sm_80")["128"]
    row = settings_of("hip")["128"]
    assert launch_of("tail dkv", "hip", 128, *row["tile"]).split == row["tail dkv"][2] != row["dkv"][2]
    tile = settings_of("sm_80")["128"]["tile"]
    assert launch_of("tail dkv", "sm_80", 128, *tile) == launch_of("dkv", "sm_80", 128, *tile)
