"""The Triton kernels in Triton's interpreter, in a process of their own: the switch is read when a kernel is decorated."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("name", "cases"), [("interpreted_attention.py", 18), ("interpreted_halo.py", 20)])
def test_kernels_match_the_definition_in_the_interpreter(name, cases):
    script = Path(__file__).with_name(name)
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert run.stdout.count("ok   ") >= cases
