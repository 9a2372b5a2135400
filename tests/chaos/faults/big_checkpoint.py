"""The upload of a big file: bounded memory, and close to what the store takes at all. `relora s3-check` measures both."""

import json
import re
import subprocess

from local_server import RELORA

from ..rows import Row, judged

UPLOAD_BYTES = 4 << 30
MOST_MEMORY_BYTES = 100 << 20
LEAST_SPEED_FRAC = 0.7


def run(site, runs, random, upload_bytes=UPLOAD_BYTES):
    helped = subprocess.run([RELORA, "s3-check", "--help"], text=True, capture_output=True)
    if helped.returncode != 0:
        return Row("big_checkpoint", 0, None, "NOT TRIED: this relora has no s3-check")
    problems, measured = [], []
    for _ in range(runs):
        checked = subprocess.run(
            [RELORA, "s3-check", "--upload-bytes", str(upload_bytes)], env=site.env | site.access(direct=True),
            text=True, capture_output=True,
        )
        if checked.returncode != 0:
            problems.append(f"s3-check failed: {(checked.stderr or checked.stdout).strip()[-500:]}")
            continue
        measured.append(parse(checked.stdout))
    problems += [f"{m['memory_bytes'] >> 20} MiB of memory" for m in measured if m["memory_bytes"] > MOST_MEMORY_BYTES]
    problems += [f"{m['speed_frac']:.2f} of a plain upload" for m in measured if m["speed_frac"] < LEAST_SPEED_FRAC]
    detail = "; ".join(f"{m['memory_bytes'] >> 20} MiB of memory, {m['speed_frac']:.2f} of a plain parallel upload"
                       for m in measured)
    return judged("big_checkpoint", runs, problems, f"{upload_bytes >> 20} MiB: {detail}", measured=measured)
