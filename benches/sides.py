"""What a measurement may end with, whichever side it is of; and PyTorch's, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Of one measurement, its compilation included.
TIMEOUT_S = 3600


class SideFailed(Exception):
    """Why a side has no figures."""


def measure_torch(side, case, data, folder):
    """Runs one side of benches.torch_side and returns what it found."""
    command = [sys.executable, "-m", "benches.torch_side", side, case.to_json(), data]
    env = os.environ | {
        "OMP_NUM_THREADS": str(case.num_threads),
        # Kept between repetitions, which then do not compile again.
        "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor"),
    }
    # Files and no pipes: the compiler's own processes hold them open for a while.
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        try:
            completed = subprocess.run(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise SideFailed(f"not done after {TIMEOUT_S} s") from None
    if completed.returncode != 0:
        raise SideFailed(explain_exit(completed.returncode))
    result = json.loads((folder / "stdout").read_text().splitlines()[-1])
    if "error" in result:
        raise SideFailed(result["error"])
    return result


def explain_exit(exit_code):
    if exit_code == -signal.SIGKILL:
        return f"killed: out of memory, or not done after {TIMEOUT_S} s"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
