"""Progress: plain lines where there is no terminal, a bar where there is one."""

import io
import re

import pytest
from rich.console import Console

from gpuxent.evaluation import progress
from gpuxent.evaluation.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the progress believes in; setting the first entry moves them."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(console):
    return console.file.getvalue().splitlines()


def test_plain_lines_every_two_seconds_and_one_at_the_end(clock):
    console = Console(file=io.StringIO(), width=20)  # a log has no width
    with Progress(98_304, "rows", console) as bar:
        for _ in range(24):
            clock[0] += 0.5
            bar.advance(4096, "cross-entropy 3.2101 [nats]")
    assert lines(console)[0] == "gpuxent: 16,384/98,304 rows (16%), cross-entropy 3.2101 [nats], 10 s left"
    assert lines(console)[-1] == "gpuxent: 98,304/98,304 rows (100%), cross-entropy 3.2101 [nats], 12 s taken"
    assert len(lines(console)) == 6


def test_a_job_that_fails_says_how_far_it_came(clock):
    console = Console(file=io.StringIO())

    def job():
        with Progress(10, "rows", console) as bar:
            bar.advance(4)
            clock[0] += 1
            raise KeyError

    with pytest.raises(KeyError):
        job()
    assert lines(console) == ["gpuxent: 4/10 rows (40%), 1.0 s taken"]


def test_several_passes_over_the_same_rows(clock):
    console = Console(file=io.StringIO())
    with Progress(10, "rows", console) as bar:
        for number in (1, 2):
            bar.again(f"pass {number}: slopes")
            for _ in range(2):
                clock[0] += 3
                bar.advance(5)
    assert lines(console) == [
        "gpuxent: 5/10 rows (50%), pass 1: slopes, 3.0 s left",
        "gpuxent: 10/10 rows (100%), pass 1: slopes, 6.0 s taken",
        "gpuxent: 5/10 rows (50%), pass 2: slopes, 3.0 s left",
        "gpuxent: 10/10 rows (100%), pass 2: slopes, 6.0 s taken",
    ]


def test_the_bar_begins_again():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, _environ={})
    with Progress(20, "rows", console) as bar:
        bar.advance(20)
        bar.again("pass 2: slopes")
        bar.advance(5)
    shown = re.findall(r"(\d+)/20 rows, .*? left +(\S.*?slopes)|(20)/20", console.file.getvalue())
    assert shown[-1][:2] == ("5", "pass 2: slopes")


def test_nothing_to_do():
    console = Console(file=io.StringIO())
    with Progress(0, "rows", console):
        pass
    assert lines(console) == ["gpuxent: 0/0 rows, 0.0 s taken"]


def test_a_bar_on_a_terminal_fits_the_width():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, _environ={})
    with Progress(2000, "steps", console) as bar:
        bar.advance(2000, "epoch 1, cross-entropy [3.210]")
    shown = [line for line in re.split(r"[\r\n]|\x1b\[\S*?[A-Za-z]", console.file.getvalue()) if "gpuxent" in line]
    assert re.fullmatch(
        r"gpuxent ━+ 2,000/2,000 steps, 0.0 s taken epoch 1, cross-entropy \[3.210\]", shown[-1].strip()
    )
    assert max(map(len, shown)) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
