"""Files that a process has opened, so that a source need hold no more than their paths."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import Slices, Window

MOST = 32  # files open at once
KEPT_BYTES = 32 * 2**20  # of a chunk of labels


class Handles:
    """The most recently used handles. One that is dropped closes when the last read that uses it ends."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)  # no file offsets, locks or threads of the parent

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, open: Callable[[], Any]) -> Any:
        handle = self.find(key)
        if handle is None:  # outside the lock: two threads may both open it, and one handle is soon closed
            self.put(key, handle := open())
        return handle

    def find(self, key: Hashable) -> Any:
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
            return self._open.get(key)

    def put(self, key: Hashable, handle: Any) -> None:
        with self._lock:
            self._open[key] = handle
            self._open.move_to_end(key)
            while len(self._open) > self.most:
                self._open.popitem(last=False)

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._open.pop(key, None)

    def __len__(self) -> int:
        return len(self._open)


handles = Handles()


def cached_rows(source: Any, window: Window, cut: Callable[[Slices], np.ndarray]) -> np.ndarray:
    """`window.gather(cut)`, with the last chunks of a vector kept: labels often lie in chunks of a million, and logits
    are read by the thousand rows."""
    chunk, itemsize = source.chunks[0] if len(source.shape) == 1 else 0, source.dtype.itemsize
    if window.columns is not None or not 1 < chunk <= KEPT_BYTES // itemsize or len(window) > chunk:
        return window.gather(cut)
    held = handles.find(key := ("rows", source))
    if held is None or not held[0] <= window.first <= window.stop <= held[0] + held[1].size:
        first = window.first // chunk * chunk
        stop = min(math.ceil(window.stop / chunk) * chunk, source.shape[0])
        handles.put(key, held := (first, cut((slice(first, stop),))))
    return held[1][window.first - held[0] : window.stop - held[0]]
