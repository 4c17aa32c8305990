"""`python -m genattn.apps.bench.gpu`: everything that waits for a GPU, in an order in which any end of time leaves the most.

    compile    the kernels of the parts below, in parallel processes, into Triton's cache
    check      every kernel that ships against the definition: output, log-sum-exp, gradients
    forward    HunyuanVideo and Wan at 720p, Radial and neighborhoods, with and without key mask, against cuDNN and flash
    settings   launch settings of the forward kernel side by side
    backward   backward over forward
    step       one denoising step of Wan-14B- and Hunyuan-shaped transformers, dense against Radial, at 1x and 4x length
    options    what is not on by default beside what is: int8 scores, haloed boxes, specialised warps on full tiles
    flex       compiled flex_attention on the cases that it can serve
    tune       the launch settings of all kernels, kept for this machine (on request: it takes minutes)

Each case stands alone: its rows are in the file before the next one starts, and one that fails leaves its reason and no more.
A second run in the same folder goes on where the first ended. After an error that takes the device with it the exit code is 3,
and `lease.py` starts a new process for the rest. Needs torch and triton, not diffusers.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genattn.apps.bench.attention import TABLE, bench_case, matmul_flops
from genattn.apps.bench.autotune import autotune_here, gpu_timer
from genattn.apps.bench.cases import AttentionCase, lease_cases, toy_cases
from genattn.apps.bench.denoising_step import HUNYUAN, WAN_14B, StepShape, step_row
from genattn.apps.bench.gpu_check import check_jobs
from genattn.apps.bench.gpu_compile import compile_all, this_arch
from genattn.apps.bench.gpu_rows import Rows, backward_rows, full_tile_rows, option_rows, setting_rows
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import kind_and_line
from genattn.kernels.failures import is_fatal
from genattn.patterns.neighborhood import NeighborhoodPattern

PARTS = ("compile", "check", "forward", "settings", "backward", "step", "options", "flex", "tune")
FILES = {
    "compile": "gpu_compile.csv",
    "check": "gpu_check.csv",
    "forward": TABLE.name,
    "flex": TABLE.name,
    "settings": "attention_settings.csv",
    "backward": "attention_backward.csv",
    "step": "denoising_step.csv",
    "options": "attention_options.csv",
}
JOURNAL = "journal.txt"
FATAL = 3
Job = tuple[str, Callable[[], Rows]]


class DeviceLost(RuntimeError):
    """An error after which this process can use the device no more."""


def run_jobs(jobs: Iterable[Job], table: Path, facts: dict[str, str], until: float) -> list[str]:
    """Run each job alone and append its rows at once; names of the jobs that failed or no longer fitted.

    A job that the journal beside `table` knows from an earlier run, ended or not, is passed over. Raises DeviceLost.
    """
    missed, journal = [], table.parent / JOURNAL
    for name, job in jobs:
        begun = journal.read_text().splitlines() if journal.is_file() else []
        if f"end {name}" in begun:
            continue
        if f"begin {name}" in begun:
            reason = "it did not end in an earlier process"
            append_rows(table, [{"job": name, "case": name, "error": reason, **facts}])
            _note(journal, f"end {name}")
            missed.append(name)
            continue
        if time.monotonic() > until:
            print(f"skipped, out of time: {name}", flush=True)
            missed.append(name)
            continue
        _note(journal, f"begin {name}")
        try:
            for row in job():
                append_rows(table, [{"job": name, **row, **facts}])
                _note(journal, f"row {name}")  # whoever watches sees that it goes on
                print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        except Exception as error:  # a case that fails must not take the others with it
            print(f"FAILED {name}: {kind_and_line(error)}", flush=True)
            append_rows(table, [{"job": name, "case": name, "error": kind_and_line(error), **facts}])
            missed.append(name)
            if is_fatal(error):
                _note(journal, f"end {name}")
                raise DeviceLost(kind_and_line(error)) from error
        _note(journal, f"end {name}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return missed


def _note(journal: Path, line: str) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a") as file:
        file.write(line + "\n")


def forward_jobs(cases: Sequence[AttentionCase], rounds: int, device: str, impl: str) -> list[Job]:
    """One job per case; dense times are measured once per shape."""
    known: dict[Any, dict[str, list[float]]] = {}
    peaks: dict[torch.dtype, float] = {}

    def rows(case: AttentionCase) -> Rows:
        peak = peaks.setdefault(case.dtype, matmul_flops(case.dtype, device))
        return bench_case(case, device, rounds, [impl], peak, known)

    return [(f"{impl} {case.name}", partial(rows, case)) for case in cases]


def option_jobs(cases: Sequence[AttentionCase], rounds: int, device: str, toy: bool = False) -> list[Job]:
    """Specialised warps on full tiles; per case int8 scores, and haloed boxes where the pattern is a neighborhood."""
    # the interpreter multiplies float32 only, which int8 scores refuse
    named = {c: ["triton"] + ["triton-int8"] * (not toy) + ["halo"] * isinstance(c.pattern, NeighborhoodPattern) for c in cases}
    size = (128, 2) if toy else (32768, 24)
    dims = (16,) if toy else (64, 128)
    # Triton's interpreter multiplies no bfloat16
    kind: dict[str, Any] = {"dtype": torch.float32} if toy else {}
    full: list[Job] = [(f"full tiles D{d}", partial(full_tile_rows, *size, d, rounds, device, **kind)) for d in dims]
    return [(f"options {c.name}", partial(option_rows, c, impls, rounds, device)) for c, impls in named.items()] + full


def step_jobs(shapes: Iterable[StepShape], device: str, impl: str) -> list[Job]:
    """One job per model and length."""
    return [(f"step {shape.name}", partial(_step, shape, device, impl)) for shape in shapes]


def _step(shape: StepShape, device: str, impl: str) -> Rows:
    return [step_row(shape, device, impl=impl)]


def _compiled(parts: Sequence[str], device: str) -> Rows:
    return compile_all(parts, this_arch(device), tell=lambda line: print(line, flush=True))


def _setting_rows(case: AttentionCase, rounds: int, device: str) -> Iterator[dict[str, Any]]:
    return setting_rows(case, gpu_timer(case, rounds, device))


def jobs_of(part: str, parts: Sequence[str], rounds: int, device: str, only: str, toy: bool) -> list[Job]:
    """The jobs of a part, most telling first."""
    cases = [case for case in (toy_cases() if toy else lease_cases()) if only in case.name]
    if part == "compile":
        return [] if toy else [("compile", partial(_compiled, parts, device))]
    if part == "check":
        return [(name, job) for name, job in check_jobs(device, toy) if only in name]
    if part == "forward":
        return forward_jobs(cases, rounds, device, "triton")
    if part == "flex":
        return forward_jobs(cases, rounds, device, "flex")
    if part == "settings":
        # Radial, and the windows with the most partial tiles
        return [(f"settings {c.name}", partial(_setting_rows, c, rounds, device)) for c in cases[:1] + cases[2:3]]
    if part == "backward":
        return [(f"backward {c.name}", partial(backward_rows, c, rounds, device)) for c in cases if not c.hidden]
    if part == "step":
        shapes = [StepShape("toy", (2, 4, 4), 2, 16, 32, 2, text=5)] if toy else [WAN_14B, HUNYUAN]
        return step_jobs([shape.longer(times) for times in (1, 4) for shape in shapes], device, "triton")
    return option_jobs(cases[:3], rounds, device, toy)


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 without a GPU or when a case failed or no longer fitted, 3 when the device is lost to this process."""
    parser = argparse.ArgumentParser(prog="python -m genattn.apps.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all but tune")
    parser.add_argument("--out", type=Path, default=TABLE.parent)
    parser.add_argument("--seconds", type=float, default=240.0, help="start no case after this long")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, for trying this out in Triton's interpreter")
    chosen = parser.parse_args(argv)
    if not chosen.toy and not torch.cuda.is_available():
        print("a GPU must be there, torch.cuda.is_available() is False; run it on a machine with one", file=sys.stderr)
        return 1
    device, parts = "cpu" if chosen.toy else "cuda", chosen.part or PARTS[:-1]
    until = time.monotonic() + chosen.seconds
    facts, missed = provenance(device), []
    try:
        for part in PARTS[:-1]:
            if part in parts:
                jobs = jobs_of(part, parts, chosen.rounds, device, chosen.only, chosen.toy)
                missed += run_jobs(jobs, chosen.out / FILES[part], facts, until)
    except DeviceLost as error:
        print(f"the device is lost to this process: {error}", file=sys.stderr)
        return FATAL
    if "tune" in parts:
        print(autotune_here(rounds=chosen.rounds))
    print(f"done; not measured: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0


def rows_in(path: Path) -> list[dict[str, str]]:
    """The rows of a file of this benchmark, none where it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
