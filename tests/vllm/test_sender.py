"""The trainer and the sending side of vLLM's weight transfer in one process."""

import os
import subprocess

from tests.support.tiny import ROOT

CODE = """
import sapo_megatron.training.loop
from sapo_megatron.rollout.vllm import transfer

info, start = transfer._vllm()
print(info.__name__, callable(start))
"""


def test_both_import():
    done = subprocess.run(
        [os.environ["SAPO_VLLM_PYTHON"], "-c", CODE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NCCLTrainerInitInfo", "True"]
