"""`genattn doctor`: what this machine can run, and why not the rest."""

import platform
from typing import Any

import torch

from genattn.kernels.block_sparse import IMPLS, choose_impl
from genattn.kernels.cpu.native_build import cache_folder, native_library
from genattn.kernels.peers.dense import dense_backends, missing_peers
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.triton.config import arch_of, tile_sizes


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
        "threads": torch.get_num_threads(),
        "native_kernel": library if isinstance(library, str) else f"{library.genattn_vector_lanes()} lanes",
        "cache": str(cache_folder()),
        "auto": choose_impl(probe, probe, probe, plan)[0],
        "backends": {name: _why_not(name, probe, plan) for name in IMPLS if name != "auto"},
        "dense": {**dict.fromkeys(served), **refused},
        "peers": missing_peers(),
    }


def describe_doctor(facts: dict[str, Any]) -> str:
    """The examination as text: one line a fact, "no: reason" where something cannot run."""
    lines = [f"{name:14} {facts[name]}" for name in facts if name not in ("backends", "dense", "peers")]
    for group in ("backends", "dense"):
        lines += [f"{group:14} {name:16} {'yes' if why is None else f'no: {why}'}" for name, why in facts[group].items()]
    return "\n".join([*lines, *(f"{'peer':14} {name:16} {why}" for name, why in facts["peers"].items())])


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
