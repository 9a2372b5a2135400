"""The upload of a big file: bounded memory, and close to what the store takes at all. `relora s3-check` measures both:
the memory beyond what the process held before, and the speed beside that of the same parts from memory.
"""

import re
import subprocess

from local_server import RELORA

from ..rows import Row, judged

UPLOAD_BYTES = 4 << 30
MOST_MEMORY_MB = 100
LEAST_SPEED_PERCENT = 70


def run(site, runs, random, upload_bytes=UPLOAD_BYTES):
    if subprocess.run([RELORA, "s3-check", "--help"], capture_output=True).returncode != 0:
        return Row("big_checkpoint", 0, None, "NOT TRIED: this relora has no s3-check")
    problems, memory_mb, speed_percent = [], [], []
    for _ in range(runs):
        # Past the proxy: what is measured is the service. The file is as big as what is uploaded.
        env = site.env | site.access(direct=True) | {"TMPDIR": str(site.folder)}
        command = [RELORA, "s3-check", "--upload-bytes", str(upload_bytes)]
        checked = subprocess.run(command, env=env, text=True, capture_output=True)
        ratio = re.search(r"(?m)^ratio +(\d+) %", checked.stdout)
        memory = re.search(r"(?m)^memory of an upload +(\d+) MB", checked.stdout)
        if checked.returncode != 0 or not ratio or not memory:
            said = (checked.stderr or checked.stdout).strip()[-500:]
            problems.append(f"s3-check ended with {checked.returncode}: {said}")
            continue
        speed_percent.append(int(ratio[1]))
        memory_mb.append(int(memory[1]))
    problems += [f"{mb} MB of memory" for mb in memory_mb if mb > MOST_MEMORY_MB]
    if upload_bytes == UPLOAD_BYTES:  # a smaller one is over before its speed says anything
        problems += [f"{speed} % of a plain upload" for speed in speed_percent if speed < LEAST_SPEED_PERCENT]
    detail = f"{upload_bytes / 1e9:.1f} GB: {memory_mb} MB of memory, {speed_percent} % of a plain parallel upload"
    return judged("big_checkpoint", runs, problems, detail, memory_mb=memory_mb, speed_percent=speed_percent)
