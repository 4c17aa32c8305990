"""`python -m genattn.apps.bench.lease OUT`: one GPU run of a few minutes that cannot be lost to one bad case.

Starts `gpu.py` and watches its journal. A case that hangs, or takes the device or the process with it, costs its own time: a
new process goes on behind it. At the end OUT holds the rows, log.txt and verdict.md (`verdict.py`). `lease.sh` does all of it,
with whatever wheels were carried along.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from genattn.apps.bench.gpu import FATAL, JOURNAL
from genattn.apps.bench.verdict import write_verdict

_PATIENCE = 75.0  # seconds without a line in the journal; compiling a hard kernel takes up to a minute
_LEAST_LEFT = 8.0


def run(out: Path, seconds: float, options: Sequence[str] = (), patience: float = _PATIENCE) -> int:
    """Run the benchmark into `out` within `seconds`; how many processes it took."""
    out.mkdir(parents=True, exist_ok=True)
    end, processes = time.monotonic() + seconds, 0
    with (out / "log.txt").open("a") as log:
        while True:
            left = end - time.monotonic()
            if left < _LEAST_LEFT and processes:
                break
            processes += 1
            command = [sys.executable, "-m", "genattn.apps.bench.gpu", "--out", str(out), "--seconds", f"{left:.0f}", *options]
            code = _watched(command, log, out / JOURNAL, min(end, time.monotonic() + left), patience)
            if code in (0, 1):
                break
            # what was begun and did not end is passed over by the next process
            log.write(f"process {processes} ended with {'a lost device' if code == FATAL else code}; going on behind it\n")
    write_verdict(out)
    return processes


def _watched(command: list[str], log: object, journal: Path, end: float, patience: float) -> int | str:
    """Exit code of a command, "hung" where its journal stood still for too long, "late" where time was up."""
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # type: ignore[call-overload]
    last, size = time.monotonic(), -1
    while True:
        try:
            return int(child.wait(timeout=0.5))
        except subprocess.TimeoutExpired:
            pass
        grown = journal.stat().st_size if journal.is_file() else 0
        if grown != size:
            last, size = time.monotonic(), grown
        late, hung = time.monotonic() > end, time.monotonic() - last > patience
        if late or hung:
            # the workers of a compiling child are in its group
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return 1 if late else "hung"


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 when a verdict was written. What stands behind `--` is handed on to genattn.apps.bench.gpu."""
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m genattn.apps.bench.lease", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=290.0)
    chosen = parser.parse_args(words[:cut])
    run(chosen.out, chosen.seconds, words[cut + 1 :])
    print((chosen.out / "verdict.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
