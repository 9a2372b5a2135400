"""What a process has used since a moment, as Linux counts it. Both sides are read this way."""

import os
import re
import statistics
from pathlib import Path


class Usage:
    """Begins with the timed updates of a process. Of one that computes on a GPU resident memory says nothing."""

    def __init__(self, pid="self", counts_resident=True):
        self.pid = pid
        self.counts_resident = counts_resident
        self.cpu_s_before = cpu_s(pid)
        if counts_resident:
            reset_peak_resident(pid)

    def figures(self, speeds_tokens_per_s, tokens_per_step):
        """What a side gives at their end. The best speed is what the machine can when nothing disturbs it."""
        num_tokens = len(speeds_tokens_per_s) * tokens_per_step
        return {
            "tokens_per_s": statistics.median(speeds_tokens_per_s),
            "best_tokens_per_s": max(speeds_tokens_per_s),
            "tokens_per_cpu_s": num_tokens / (cpu_s(self.pid) - self.cpu_s_before),
            "peak_bytes": peak_resident_bytes(self.pid) if self.counts_resident else None,
        }


def cpu_s(pid):
    """Processor time of all threads so far."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user_ticks, system_ticks = after_name[11:13]
    return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")


def reset_peak_resident(pid):
    """Lets the peak begin anew, from what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_resident_bytes(pid):
    """Since the last reset."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024
