"""What `gpuxent inspect` shows: what a file holds, what its values look like, and what scoring it would take."""

from __future__ import annotations

import math
import shlex
import time
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpuxent import _arguments as arguments
from gpuxent.backends._threads import thread_count
from gpuxent.evaluation.driver import BLOCK_BYTES, READERS, ThreadWorkers, rows_per_block, run_blocks
from gpuxent.evaluation.files import sampling
from gpuxent.evaluation.files.convert import size_text
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.progress import duration
from gpuxent.evaluation.sources import ArraySource, Source, members, open_source

TIMED_BYTES = 128 * 2**20  # of logits, scored for an estimate
IGNORED = arguments.DEFAULT_IGNORE_INDEX
Facts = dict[str, Any]


def facts(path: str, labels: str | None = None, ignore_index: int = IGNORED) -> Facts:
    """Of the array "PATH" or "PATH::name", or of each in a file that has several; for JSON.

    With labels (an array beside these logits), `problem` is what `gpuxent perplexity` would stop at, or None.
    """
    if names := members(path):
        if labels is not None:
            raise ValueError(f"{path} has {len(names)} arrays; name that of the logits, as in {path}::{names[0]}")
        return {"name": path, "members": [_member(f"{path}::{name}") for name in names]}
    source = open_source(path)
    found = _storage(source)
    if source.dtype in arguments.FLOAT_DTYPES:
        found |= _floats(source)
    elif source.dtype.kind in "iu":
        found |= _integers(source, ignore_index)
    elif source.dtype.kind == "b":
        found |= {"looks_like": "a mask", "notes": []}
    else:
        found |= {"looks_like": None, "notes": [f"{source.dtype} is not scored"]}
    if labels is not None:
        found["labels"] = _labels(source, open_source(labels), ignore_index)
    return found


def _member(name: str) -> Facts:
    try:
        return _storage(open_source(name))
    except ValueError as error:  # text, or whatever else is kept there
        return {"name": name, "problem": str(error)}


def _storage(source: Source) -> Facts:
    files, shape = source.files(), tuple(source.shape)
    has_columns = source.dtype in arguments.FLOAT_DTYPES and len(shape) > 1
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if has_columns else (math.prod(shape), 1)
    return {
        "name": source.name,
        "format": getattr(source, "format", None) or type(source).__name__.removesuffix("Source"),
        "shape": list(shape),
        "dtype": str(source.dtype),
        "rows": rows,
        "vocab": columns if has_columns else None,
        "bytes_per_row": columns * source.dtype.itemsize,
        "bytes": rows * columns * source.dtype.itemsize,
        "rows_per_chunk": source.row_chunk if has_columns or len(shape) == 1 else None,
        "files": len(files),
        "stored_bytes": sum(stamp.size for stamp in files),
        "warnings": source.warnings(),
    }


def _floats(source: Source) -> Facts:
    sample = sampling.sample_floats(source)
    seen: Facts = {name: getattr(sample, name) for name in ("rows", "values", "bytes", "nan", "minus_inf", "plus_inf")}
    seen |= sample.finite.to_dict()
    if len(source.shape) < 2 or not sample.values:
        kind = "a vector of floats" if sample.values else "nothing"
        return {"sample": seen, "looks_like": kind, "notes": []}
    seen |= {"constant_rows": sample.constant_rows}
    seen |= {"row_sum": sample.row_sum.to_dict(), "row_logsumexp": sample.row_lse.to_dict()}
    kind, notes = sampling.kind_of_floats(sample, source.shape[-1], float(ml_dtypes.finfo(source.dtype).eps))
    reading = sample.bytes / max(sample.seconds, 1e-9)
    return {
        "sample": seen,
        "looks_like": kind,
        "notes": notes,
        "estimate": {"read_bytes_per_second": reading} | estimate(source),
    }


def _integers(source: Source, ignore_index: int, vocab: int | None = None) -> Facts:
    sample = sampling.sample_integers(source, ignore_index, vocab)
    seen: Facts = {"rows": sample.entries, "bytes": sample.bytes, "ignore_index": ignore_index}
    seen |= {"ignored": sample.ignored, "negative": sample.negative} | sample.counted.to_dict()
    kind, notes = sampling.kind_of_integers(sample, ignore_index) if sample.entries else ("nothing", [])
    found: Facts = {"sample": seen, "looks_like": kind, "notes": notes}
    if vocab is not None:
        seen["outside"] = sample.bad
        found["first_outside"] = sample.first_bad
    return found


def _labels(logits: Source, labels: Source, ignore_index: int) -> Facts:
    """Whether they fit these logits, as `gpuxent perplexity` without a shift takes them."""
    found, vocab = _storage(labels), logits.shape[-1]
    if labels.dtype.kind not in "iu":
        return found | {"problem": f"labels ({labels.name}) must be integers, got {labels.dtype}"}
    found |= _integers(labels, ignore_index, vocab)
    if len(logits.shape) < 2 or logits.dtype not in arguments.FLOAT_DTYPES:
        problem = f"{logits.name} holds no logits (..., vocab), but {logits.dtype} of shape {logits.shape}"
    elif labels.shape != logits.shape[:-1]:
        problem = (
            f"labels ({labels.name}) must have shape {logits.shape[:-1]} for logits of shape {logits.shape}, "
            f"got {labels.shape}"
        )
    elif (first := found["first_outside"]) is not None:
        problem = (
            f"label {first[1]} at row {first[0]:,} of {labels.name} is outside the vocabulary of {vocab:,} classes and "
            f"not {ignore_index}"
        )
    elif found["sample"]["ignored"] == found["rows"]:
        problem = f"all labels of {labels.name} are {ignore_index}: there is nothing to score"
    else:
        problem = None
    return found | {"problem": problem}


def estimate(logits: Source) -> Facts:
    """Of `gpuxent perplexity` on the threads of this process: some blocks, spread over the rows, are scored."""
    nothing = ArraySource(np.broadcast_to(np.int64(0), logits.shape[:-1]), "no labels")
    job = Job(logits, nothing)
    rows, slots = rows_per_block(job, BLOCK_BYTES), thread_count() + READERS
    blocks = _timed_blocks(job, rows)
    list(run_blocks(job, [range(1)], ThreadWorkers(1)))  # what is compiled and allocated once
    started = time.perf_counter()
    list(run_blocks(job, blocks, ThreadWorkers(len(blocks))))
    speed = sum(map(len, blocks)) * job.row_bytes / (time.perf_counter() - started)
    return {
        "bytes_per_second": speed,
        "seconds": job.all_rows * job.row_bytes / speed,
        "threads": thread_count(),
        "block_rows": min(rows, job.all_rows),
        "blocks_in_memory": slots,
        "memory_bytes": slots * min(rows, job.all_rows) * job.row_bytes,
    }


def _timed_blocks(job: Job, rows: int) -> list[range]:
    """At least two per thread, shorter than real ones where there are many threads."""
    many = 2 * thread_count()
    rows = max(min(rows, TIMED_BYTES // many // job.row_bytes, job.all_rows // many), 1)
    count = min(many, job.all_rows // rows)
    return [range(first, first + rows) for first in (i * job.all_rows // count for i in range(count))]


# ---- for people ----


def to_table(found: Facts) -> RenderableType:
    if "members" in found:
        return _members_table(found)
    parts: list[RenderableType] = [_table(found["name"], [*_storage_rows(found), *_value_rows(found)])]
    if "labels" in found:
        labels = found["labels"]
        parts.append(_table(f"labels: {labels['name']}", [*_storage_rows(labels), *_value_rows(labels)]))
        parts.append(Text("The labels do not fit." if labels["problem"] else _fit(labels)))
    return Group(*parts)


def _fit(labels: Facts) -> str:
    seen = labels["sample"]
    which = "every label" if seen["rows"] == labels["rows"] else f"each of {seen['rows']:,} labels looked at"
    return f"The labels fit: the shapes agree, and {which} is in the vocabulary or {seen['ignore_index']}."


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _storage_rows(found: Facts) -> list[tuple[str, str]]:
    chunk = found["rows_per_chunk"]
    rows = [
        ("format", found["format"] + (f", {found['files']:,} files" if found["files"] != 1 else "")),
        ("shape", _shape(found)),
        ("dtype", found["dtype"]),
    ]
    size = f"{size_text(found['bytes'])} ({found['bytes']:,} bytes)"
    if found["vocab"] is not None:
        rows.append(("rows", f"{found['rows']:,} of {size_text(found['bytes_per_row'])}"))
    rows.append(("size", size))
    if found["stored_bytes"] < 0.98 * found["bytes"]:
        rows.append(("stored", f"{size_text(found['stored_bytes'])}"))
    if chunk is not None and chunk > 1:
        rows.append(("chunks", f"of {chunk:,} rows, {size_text(chunk * found['bytes_per_row'])}"))
    return rows + [("warning", warning) for warning in found["warnings"]]


def _shape(found: Facts) -> str:
    return "(" + ", ".join(map(str, found["shape"])) + ("," if len(found["shape"]) == 1 else "") + ")"


def _value_rows(found: Facts) -> list[tuple[str, str]]:
    rows, seen = [], found.get("sample")
    if seen is not None:
        whole = seen["rows"] == found["rows"]
        rows.append(("looked at", "every row" if whole else f"{seen['rows']:,} rows, {size_text(seen['bytes'])}"))
        if seen["least"] is not None:
            rows.append(
                ("finite values" if "nan" in seen else "values", f"{seen['least']:,.6g} to {seen['greatest']:,.6g}")
            )
        if "nan" in seen:
            rows += [(name, share(seen[key], seen["values"])) for name, key in SPECIAL]
        else:
            rows.append((f"{seen['ignore_index']}, ignored", share(seen["ignored"], seen["rows"])))
            rows.append(("other negative", share(seen["negative"], seen["rows"])))
    if found.get("looks_like"):
        rows.append(("looks like", found["looks_like"]))
    rows += [("", note) for note in found.get("notes", [])]
    return rows + (_estimate_rows(found["estimate"]) if "estimate" in found else [])


SPECIAL = (("NaN", "nan"), ("-inf", "minus_inf"), ("+inf", "plus_inf"))


def _estimate_rows(cost: Facts) -> list[tuple[str, str]]:
    seconds = f"about {duration(cost['seconds'])}" if cost["seconds"] >= 0.05 else "less than 0.1 s"
    threads = "1 thread" if cost["threads"] == 1 else f"{cost['threads']} threads"
    memory, reading = size_text(cost["memory_bytes"]), size_text(cost["read_bytes_per_second"])
    return [
        (
            "perplexity",
            f"{seconds} on {threads}, at {size_text(cost['bytes_per_second'])}/s; one thread reads {reading}/s",
        ),
        ("", f"{memory} of logits in memory: {cost['blocks_in_memory']} blocks of {cost['block_rows']:,} rows"),
    ]


def share(count: int, of: int) -> str:
    if count == 0:
        return "none"
    percent = 100 * count / of
    return f"{count:,} of {of:,} ({'all' if count == of else f'{percent:.3g} %'})"


def _members_table(found: Facts) -> RenderableType:
    table = Table(title=Text(found["name"]), title_justify="left")
    table.add_column("array", overflow="fold")
    for name in ("shape", "dtype", "size"):
        table.add_column(name, justify="right" if name == "size" else "left")
    readable = [member for member in found["members"] if "shape" in member]
    for member in found["members"]:
        inside = member["name"].removeprefix(f"{found['name']}::")
        about = (
            (_shape(member), member["dtype"], size_text(member["bytes"]))
            if member in readable
            else ("", "cannot be read", "")
        )
        table.add_row(*map(Text, (inside, *about)))
    if not readable:
        return table
    largest = max(readable, key=lambda member: member["bytes"])
    return Group(table, Text(f"Name one of them: gpuxent inspect {shlex.quote(largest['name'])}", overflow="fold"))
