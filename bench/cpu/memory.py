"""How much memory a call takes beyond what is there before it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of this process grows at most while the call runs, its result included.

    Buffers that a library keeps from one call to the next do not count. None where the kernel has no such record that
    can be reset: Linux has.
    """
    try:
        give_back_freed()
        CLEAR_REFS.write_text("5")  # the peak starts again at what is resident now
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before)


def give_back_freed() -> None:
    """Return to the kernel what malloc holds for reuse: else a call that needs it would look as if it took nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return 1024 * int(found[1])
