"""How much of the machine others took while we measured: the reason to trust a figure or not."""

import os
import resource
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
# /proc/stat's first line: user, nice, system, idle, iowait, irq, softirq, steal.
BUSY = (0, 1, 2, 5, 6, 7)


def machine_cpu_s() -> float:
    """Processor time used by all, and time stolen by the host, since boot."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(int(fields[i]) for i in BUSY) / TICKS


def process_cpu_s(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def ended_children_cpu_s() -> float:
    """What children that have ended used, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
