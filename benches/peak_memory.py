"""The peak of a process's resident memory since a moment, as Linux keeps it. Both sides are read this way."""

import re
from pathlib import Path


def reset_peak_resident(pid="self"):
    """Lets the peak begin anew, from what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_resident_bytes(pid="self"):
    """Since the last reset."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024
