"""`genattn doctor`: what this machine can run, and why not the rest."""

import platform
import re
from typing import Any

import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import IMPLS, choose_impl
from genattn.kernels.cpu.native_build import cache_folder, native_library
from genattn.kernels.peers.dense import dense_backends, missing_peers
from genattn.kernels.peers.optional import why_not_natten
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.triton.config import (
    arch_of,
    chip_of,
    measured_settings,
    measured_table,
    settings_of,
    table_row,
    tile_sizes,
)
from genattn.patterns.natten_windows import natten_windows
from genattn.patterns.neighborhood import NeighborhoodPattern

# time / (density x dense time) of the forward at head dim 128 in 16 bits, from instruction counts: docs/kernels.md says how
PREDICTED = {
    "sm_80": "1.0 to 1.2, not measured",
    "sm_86": "1.0 to 1.3, not measured",
    "sm_90": "1.0 to 1.2, not measured",
    "sm_100": "2 to 2.5, not measured",
    "sm_120": "1.0 to 1.3, not measured",
    "hip": "about 1.6, not measured",
}


def doctor(head_dim: int = 128) -> dict[str, Any]:
    """Facts as a plain dict: machine, device, backends {name: None or the reason why not}, dense backends, peers.

    Building the native kernel, when it is not built yet, is part of the examination.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    probe = torch.zeros(1, 256, 1, head_dim, dtype=dtype, device=device)
    plan = dense_plan(256, 256, *tile_sizes(device, head_dim))
    served, refused = dense_backends(probe)
    library = native_library()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "arch": arch_of(device),
        **_settings(device, head_dim),
        "threads": torch.get_num_threads(),
        "native_kernel": library if isinstance(library, str) else f"{library.genattn_vector_lanes()} lanes",
        "cache": str(cache_folder()),
        "auto": choose_impl(probe, probe, probe, plan)[0],
        "backends": {name: _why_not(name, probe, plan) for name in IMPLS if name != "auto"} | _of_windows(probe),
        "dense": {**dict.fromkeys(served), **refused},
        "peers": missing_peers(),
    }


def _of_windows(probe: torch.Tensor) -> dict[str, str | None]:
    """The backends that take windows of a grid in the place of a plan."""
    windows = natten_windows(NeighborhoodPattern(3), TokenLayout.from_grid((16, 16)))
    return {"halo": None, "natten": why_not_natten(probe, windows)}


def _settings(device: torch.device, head_dim: int) -> dict[str, Any]:
    """The launch settings that a GPU's kernels take, whether they were measured on it, and what they are predicted to reach."""
    arch = arch_of(device)
    if arch == "cpu":
        return {}
    row, measured = table_row(head_dim), measured_table(arch)
    tuned = measured_settings(arch).get(row, {})
    told = {kernel: settings_of(arch)[row][kernel] for kernel in ("tile", "forward", "dq", "dkv")}
    shipped = "shipped settings, not measured on this chip; `genattn bench autotune` does"
    return {
        "chip": chip_of(device),
        "settings": ", ".join(f"{kernel} {told[kernel]}" for kernel in told),
        "measured": f"{', '.join(tuned)} by autotune, {measured}" if tuned else shipped,
        "predicted": PREDICTED.get(arch, "nothing"),
    }


def describe_doctor(facts: dict[str, Any]) -> str:
    """The examination as text: one line a fact, "no: reason" where something cannot run."""
    lines = [f"{name:14} {facts[name]}" for name in facts if name not in ("backends", "dense", "peers")]
    for group in ("backends", "dense"):
        lines += [f"{group:14} {name:16} {'yes' if why is None else f'no: {why}'}" for name, why in facts[group].items()]
    return "\n".join([*lines, *(f"{'peer':14} {name:16} {why}" for name, why in facts["peers"].items())])


# what a maintainer asks first; those that are not installed are said to be so
_ASKED = ("genattn", "diffusers", "transformers", "accelerate", "peft", "torchao", "bitsandbytes", "gguf", "xformers", "gradio")


def bug_report(facts: dict[str, Any]) -> str:
    """The examination for a bug report: Markdown, with the versions of other packages, without this machine's folders."""
    known = {name: _version(name) for name in _ASKED}
    lines = [f"{name:14} {version}" for name, version in known.items()]
    return "\n".join(["```", f"system         {platform.platform()}", *lines, without_folders(describe_doctor(facts)), "```"])


def without_folders(text: str) -> str:
    """`text` with absolute folders cut to their last part: a bug report is public, a home folder bears a name."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^\s,;:'\"/\\]+)+(?=[/\\])", "...", text)


def _why_not(name: str, probe: torch.Tensor, plan: Any) -> str | None:
    try:
        choose_impl(probe, probe, probe, plan, impl=name)
    except ValueError as error:
        return str(error).split("cannot serve this call: ", 1)[-1].removesuffix("; use impl='auto'")
    return None


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
