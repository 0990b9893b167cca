"""How far a long job has come: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

LINE_SECONDS = 2.0  # between two plain lines: a log is to be read later, not watched


class Progress:
    """Shows the progress of `total` units of work; a context manager.

    On a terminal a bar with counts, time left and the note, drawn over in place. Otherwise, as in a log or a
    pipe, plain lines at most every two seconds, and one at the end. Give it a console that writes to stderr:
    stdout is for results.
    """

    def __init__(self, total: int, unit: str, console: Console) -> None:
        self.total, self.unit, self.console = total, unit, console
        self._done, self._note = 0, ""
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._started = self._pass_started = self._last_line = time.monotonic()
        self._printed: int | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._bar = Bar(
                TextColumn("gpuxent"),
                BarColumn(bar_width=None),
                _Counts(self.unit, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=self.total, note="")
            self._bar.start()
        return self

    def advance(self, amount: int, note: str = "") -> None:
        """So many more units are done; the note, such as "cross-entropy 3.2101", replaces the last one."""
        self._done += amount
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=self._note)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def again(self, note: str) -> None:
        """The same units once more, as in another pass over them."""
        self._done, self._note, self._pass_started = 0, note, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, note=note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._done != self._printed and (self._done or kind is None):  # of nothing done there is nothing to say
            self._print_line(last=True)

    def _print_line(self, last: bool = False) -> None:
        self._last_line, self._printed = time.monotonic(), self._done
        line = f"gpuxent: {counts(self._done, self.total, self.unit)}"
        left = remaining(self._done, self.total, self._last_line - self._pass_started)
        when = f"{duration(self._last_line - self._started)} taken" if last else left
        parts = [line, *([self._note] if self._note else []), when]
        self.console.print(", ".join(parts), markup=False, highlight=False, soft_wrap=True)


class _Counts(ProgressColumn):
    """ "12,288/98,304 rows, 4 s left"."""

    def __init__(self, unit: str, table_column: Column) -> None:
        super().__init__(table_column)
        self.unit = unit

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        left = remaining(done, total, task.elapsed or 0.0)
        return Text(f"{counts(done, total, self.unit, percent=False)}, {left}")


def counts(done: int, total: int, unit: str, percent: bool = True) -> str:
    share = f" ({100 * done // total}%)" if percent and total else ""
    return f"{done:,}/{total:,} {unit}{share}"


def remaining(done: int, total: int, elapsed: float) -> str:
    """The time left at the mean speed so far; the time taken once all is done."""
    if done >= total:
        return f"{duration(elapsed)} taken"
    return f"{duration(elapsed * (total - done) / done)} left" if done else "time left unknown"


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s", "2 h 05 min": as much precision as one wants to read."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
