"""Copies of arrays: every bit kept, by the judgement of each format's own library; and nothing half written."""

import io
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy
import zarr
from rich.console import Console
from typer.testing import CliRunner

from gpuxent.cli import app
from gpuxent.evaluation.files import convert as convert_module
from gpuxent.evaluation.files import writers
from gpuxent.evaluation.files.convert import convert
from gpuxent.evaluation.sources import open_source

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [
    *map(np.dtype, (np.float16, BFLOAT16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, bool)),
    *map(np.dtype, (np.uint8, np.uint16, np.uint32, np.uint64)),
]
SHORT = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.int64)]
FORMATS = (".npy", ".zarr", ".safetensors", ".h5", ".parquet")


def bits(array):
    """As unsigned integers: NaN payloads, signs of zero and all."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


def any_bits(shape, dtype, seed=0):
    """Values of every bit pattern: NaNs that signal, subnormal numbers, both zeros."""
    random = np.random.default_rng(seed)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    array = np.frombuffer(random.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()
    flat = array.reshape(-1)
    if dtype.kind in "fV" and flat.size > 8:
        flat[:4] = 0.0, -0.0, np.inf, -np.inf
        width = 8 * dtype.itemsize
        patterns = [(1 << width) - 1, (1 << (width - 1)) - 1]  # NaNs of all ones, with either sign
        flat.view(f"u{dtype.itemsize}")[4:6] = patterns
    return array


def as_stored(array):
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


# Written by each format's own library, in chunks that fit nothing.


def save(path, array, name="x", chunk=5):
    stored, mark = as_stored(array), {"dtype": "bfloat16"} if array.dtype == BFLOAT16 else {}
    if path.suffix == ".npy":
        np.save(path, array)
        return str(path)
    if path.suffix == ".zarr":
        chunks = (min(chunk, max(array.shape[0], 1)), *array.shape[1:])
        made = zarr.create_array(str(path), shape=array.shape, dtype=stored.dtype, chunks=chunks)
        made[...] = stored
        made.attrs.update(mark)
        return str(path)
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file({"other": np.zeros(3, np.int8), name: array}, path)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            chunks = (min(chunk, array.shape[0]), *array.shape[1:]) if array.size else None
            file.create_dataset(name, data=stored, chunks=chunks).attrs.update(mark)
            file["other"] = 1
    else:
        flat = pa.array(stored.ravel())
        column = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        field = pa.field(name, column.type, metadata=mark or None)
        other = pa.field("other", pa.int32())
        table = pa.Table.from_arrays(
            [column, pa.array(range(len(array)), pa.int32())], schema=pa.schema([field, other])
        )
        pq.write_table(table, path, row_group_size=chunk, use_dictionary=False)
    return f"{path}::{name}"


# Read by each format's own library.


def load(path, name):
    if path.suffix == ".npy":
        array = np.load(path)
        return array.view(BFLOAT16) if array.dtype == np.dtype("V2") else array
    if path.suffix == ".zarr":
        found = zarr.open(str(path), mode="r")
        found = found[name] if isinstance(found, zarr.Group) else found
        array = found[...]
        return array.view(BFLOAT16) if found.attrs.get("dtype") == "bfloat16" else array
    if path.suffix == ".safetensors":
        tensors = safetensors.numpy.load_file(path)
        assert list(tensors) == [name]
        return tensors[name]
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            array = file[name][...]
            return array.view(BFLOAT16) if file[name].attrs.get("dtype") == "bfloat16" else array
    table = pq.read_table(path)
    assert table.column_names == [name]
    column = table[name].combine_chunks()
    assert not table.schema.field(name).nullable
    if pa.types.is_fixed_size_list(column.type):
        array = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    else:
        array = column.to_numpy(zero_copy_only=False)
    marked = (table.schema.field(name).metadata or {}).get(b"dtype") == b"bfloat16"
    return array.view(BFLOAT16) if marked else array


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=100)


def gpuxent(*arguments):
    """The command, in a process of its own."""
    command = [sys.executable, "-c", "from gpuxent.cli import main; main()", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"COLUMNS": "100"}, timeout=120)


def invoked(*arguments):
    """The command, in this process."""
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, list(map(str, arguments)))


def has_chunks(suffix):
    return suffix in (".zarr", ".h5", ".parquet")


@pytest.mark.parametrize("out", FORMATS)
@pytest.mark.parametrize("into", FORMATS)
def test_every_bit_is_kept(into, out, tmp_path, quiet):
    for i, dtype in enumerate(SHORT):
        array = any_bits((23, 7), dtype, seed=i)
        source = save(tmp_path / f"{i}{into}", array)
        target = tmp_path / f"{i}-copy{out}"
        convert(open_source(source), str(target), quiet, rows=4 if has_chunks(out) else None)
        name = "x" if "::" in source else "labels" if dtype.kind == "i" else "logits"
        assert same(load(target, name), array), (into, out, dtype)
        copied = open_source(target)
        assert (copied.shape, copied.dtype) == (array.shape, array.dtype)
        assert same(copied.read(slice(3, 20), slice(0, 7)), array[3:20])


@pytest.mark.parametrize("out", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_number_of_axes(dtype, out, tmp_path, quiet):
    for shape in [(40,), (9, 5), (3, 4, 5), (0, 5), (0,)]:
        if out == ".parquet" and len(shape) > 2:
            continue
        array = any_bits(shape, dtype)
        source, target = save(tmp_path / f"in{shape}.npy", array), tmp_path / f"out{shape}{out}"
        convert(open_source(source), f"{target}::a" if out != ".npy" else str(target), quiet)
        assert same(load(target, "a"), array), shape


# ---- how it is cut ----


@pytest.mark.parametrize("lead", [(10,), (3, 7), (4, 6), (2, 3, 5), (5, 1, 4), (1, 9), (6, 1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 12, 30, 1000])
def test_boxes_are_chunks_and_hold_all_rows_in_order(lead, rows, monkeypatch):
    monkeypatch.setattr(writers, "SHARD_BYTES", 4 * 3 * rows * 4)
    layout = writers.Layout((*lead, 3), np.dtype(np.float32), "x", True, rows)
    assert np.prod(layout.chunk) <= max(rows, 1)
    assert all(shard % chunk == 0 for shard, chunk in zip(layout.shard, layout.chunk, strict=True))
    numbers = np.arange(np.prod(lead)).reshape(lead)
    for box in (layout.chunk, layout.shard):
        seen = 0
        for first, stop in layout.boxes(box):
            assert first == seen < stop
            place = layout.place(first, stop, box)
            assert numbers[place[:-1]].ravel().tolist() == list(range(first, stop))
            assert place[-1] == slice(0, 3)
            for cut, side, size in zip(place, box, lead, strict=False):
                assert (cut.start % side, cut.stop) == (0, min(cut.start + side, size))  # one whole box of the grid
            seen = stop
        assert seen == numbers.size


@pytest.mark.parametrize(
    ("lead", "rows", "shard"),
    [((40,), 3, (12,)), ((4, 40), 3, (1, 12)), ((4, 3), 3, (4, 3)), ((9, 3), 3, (4, 3)), ((2, 7), 3, (1, 9))],
)
def test_shards_are_many_chunks(lead, rows, shard, monkeypatch):
    """Of the axis that is cut, or of the one before it where a chunk takes all of one."""
    monkeypatch.setattr(writers, "SHARD_BYTES", 4 * 3 * 20)
    assert writers.Layout((*lead, 5), np.dtype(np.float32), "x", True, rows).shard == shard


def test_stored_chunks_are_whole_rows(tmp_path, quiet):
    array = any_bits((50, 8), np.dtype(np.float32))
    source = open_source(save(tmp_path / "x.npy", array))
    for out in ("x.zarr", "x.h5::logits", "x.parquet"):
        convert(source, str(tmp_path / out), quiet, rows=6)
    made = zarr.open_array(str(tmp_path / "x.zarr"), mode="r")
    assert (made.chunks, made.shards) == ((6, 8), (54, 8))
    assert made.nchunks_initialized == made.nchunks
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["logits"].chunks == (6, 8)
    groups = pq.ParquetFile(tmp_path / "x.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [6] * 8 + [2]


def test_chunks_of_zeros_are_stored_as_well(tmp_path, quiet):
    array = np.zeros((40, 8), np.float32)
    convert(open_source(save(tmp_path / "x.npy", array)), str(tmp_path / "x.zarr"), quiet, rows=4)
    copied = open_source(tmp_path / "x.zarr")
    assert copied.warnings() == []  # no chunk is missing
    assert same(load(tmp_path / "x.zarr", ""), array)


@pytest.mark.parametrize("out", FORMATS)
def test_the_space_that_is_asked_for_is_enough(out, tmp_path, quiet, monkeypatch):
    """Though Parquet has no integers of one or two bytes."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module, "SLACK_BYTES", 2**12)
    for dtype in (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.int64)):
        source = open_source(save(tmp_path / "x.npy", any_bits((500, 4000), dtype)))  # nothing to compress
        done = convert(source, str(tmp_path / f"copy{out}"), quiet, overwrite=True)
        paths = [tmp_path / f"copy{out}", *(tmp_path / f"copy{out}").rglob("*")]
        assert done.bytes == sum(path.stat().st_size for path in paths if path.is_file())
        assert done.bytes <= 500 * 4000 * dtype.itemsize * (3 if dtype == np.int8 else 1.02)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=done.bytes - 1: usage._replace(free=free))
            with pytest.raises(ValueError, match="are free in"):
                convert(source, str(tmp_path / f"copy{out}"), quiet, overwrite=True)


def test_names_may_be_paths(tmp_path, quiet):
    array = any_bits((9, 5), BFLOAT16)
    source = open_source(save(tmp_path / "x.npy", array))
    for out in (".zarr", ".h5"):
        convert(source, f"{tmp_path}/y{out}::run/7/logits", quiet)
        assert same(load(tmp_path / f"y{out}", "run/7/logits"), array)
    found = dict(zarr.open_group(str(tmp_path / "y.zarr"), mode="r").members(max_depth=None))
    assert list(found) == ["run", "run/7", "run/7/logits"]  # whoever lists the group comes upon it


def test_values_in_safetensors_are_aligned(tmp_path, quiet):
    source = open_source(save(tmp_path / "x.npy", any_bits((9, 5), np.dtype(np.float64))))
    for name in ("a", "ab", "abc", "a longer name \u00e9"):
        convert(source, f"{tmp_path}/y.safetensors::{name}", quiet, overwrite=True)
        assert int.from_bytes((tmp_path / "y.safetensors").read_bytes()[:8], "little") % 8 == 0
        assert same(load(tmp_path / "y.safetensors", name), source.read(slice(0, 9), slice(0, 5)))


class Watched:
    """A source that says what is read of it."""

    def __init__(self, shape, row_chunk, dtype=np.float32):
        self.array = any_bits(shape, np.dtype(dtype))
        self.shape, self.dtype, self.row_chunk, self.name = shape, np.dtype(dtype), row_chunk, "watched"
        self.reads = []

    def read(self, rows, columns=None):
        self.reads.append((rows.start, rows.stop))
        return self.array.reshape(-1, *(self.shape[-1:] if columns else ()))[rows]

    def files(self):
        return []

    def warnings(self):
        return []


@pytest.mark.parametrize("row_chunk", [1, 7, 10, 64, 1000])
def test_each_chunk_is_read_once_and_little_at_a_time(row_chunk, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(convert_module, "CHUNK_BYTES", 20 * 8 * 4)
    source = Watched((300, 8), row_chunk)
    convert(source, str(tmp_path / "x.zarr"), quiet, rows=13)
    assert same(load(tmp_path / "x.zarr", ""), source.array)
    assert [first for first, _ in source.reads] == [0, *(stop for _, stop in source.reads[:-1])]
    assert source.reads[-1][1] == 300
    assert all(first % row_chunk == 0 for first, _ in source.reads)
    assert all(stop - first <= max(20, row_chunk) for first, stop in source.reads)


def test_one_chunk_of_all_rows_is_not_read_at_once(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(convert_module, "PIECE_BYTES", 50 * 8 * 4)
    source = Watched((300, 8), 300)
    convert(source, str(tmp_path / "x.npy"), quiet)
    assert max(stop - first for first, stop in source.reads) == 50
    assert same(load(tmp_path / "x.npy", ""), source.array)


def test_rows_of_integers_are_as_long_as_they_like(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(convert_module, "PIECE_BYTES", 100 * 8)
    source = Watched((1, 5000), 1, np.int64)
    convert(source, str(tmp_path / "x.npy"), quiet)
    assert max(stop - first for first, stop in source.reads) == 100
    assert same(load(tmp_path / "x.npy", ""), source.array)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_an_altered_byte_does_not_pass(tmp_path, quiet):
    source = open_source(save(tmp_path / "x.npy", any_bits((64, 100), np.dtype(np.float32))))
    for out in ("x.zarr", "x.h5", "x.parquet"):
        convert(source, str(tmp_path / out), quiet, rows=64)
    flip(next((tmp_path / "x.zarr").glob("c/0/0")), 10_000)
    flip(tmp_path / "x.h5", 10_000)
    flip(tmp_path / "x.parquet", 10_000)
    with pytest.raises(Exception, match=r"(?i)crc|checksum"):
        load(tmp_path / "x.zarr", "")
    with pytest.raises(OSError, match="filter returned failure"):
        load(tmp_path / "x.h5", "logits")
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.ParquetFile(tmp_path / "x.parquet", page_checksum_verification=True).read()


# ---- what is read ----


def write_kld(path, codes, steps, lowest, tokens, context, vocab):
    """As llama.cpp does: see the layout at llama-perplexity's --save-all-logits."""
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<iii", context, vocab, len(tokens) // context))
        file.write(np.asarray(tokens, "<i4").tobytes())
        for row, step, low in zip(codes, steps, lowest, strict=True):
            file.write(struct.pack("<ff", step, low) + np.asarray(row, "<u2").tobytes())
            file.write(b"\0\0" * (vocab % 2))


def test_kld_files_are_read(tmp_path, quiet):
    random, context, vocab = np.random.default_rng(0), 8, 7
    rows = 2 * (context - 1 - context // 2)
    codes = random.integers(0, 65536, (rows, vocab)).astype(np.uint16)
    steps, lowest = random.random(rows).astype(np.float32) / 4096, -16 - random.random(rows).astype(np.float32)
    tokens = random.integers(0, vocab, 2 * context)
    write_kld(tmp_path / "x.kld", codes, steps, lowest, tokens, context, vocab)
    convert(open_source(tmp_path / "x.kld"), str(tmp_path / "x.safetensors"), quiet)
    expected = steps[:, None] * codes.astype(np.float32) + lowest[:, None]
    assert same(load(tmp_path / "x.safetensors", "logits"), expected)
    convert(open_source(f"{tmp_path}/x.kld::labels"), str(tmp_path / "y.npy"), quiet)
    assert load(tmp_path / "y.npy", "").tolist() == [t for i in range(2) for t in tokens[8 * i + 5 : 8 * i + 8]]


def test_shards_are_one_array(tmp_path, quiet):
    (tmp_path / "shards").mkdir()
    parts = [any_bits((n, 6), np.dtype(np.float16), seed=n) for n in (5, 9, 2)]
    for i, part in zip((1, 2, 10), parts, strict=True):
        np.save(tmp_path / "shards" / f"part-{i}.npy", part)
    for text in (tmp_path / "shards", tmp_path / "shards" / "*.npy"):
        convert(open_source(str(text)), str(tmp_path / "all.safetensors"), quiet, overwrite=True)
        assert same(load(tmp_path / "all.safetensors", "logits"), np.concatenate(parts))


@pytest.mark.parametrize("order", ["big-endian", "Fortran"])
def test_order_of_bytes_and_axes(order, tmp_path, quiet):
    array = any_bits((30, 9), np.dtype(np.float32))
    np.save(tmp_path / "x.npy", array.astype(">f4") if order == "big-endian" else np.asfortranarray(array))
    for out in FORMATS:
        convert(open_source(tmp_path / "x.npy"), str(tmp_path / f"copy{out}"), quiet)
        assert same(load(tmp_path / f"copy{out}", "logits"), array)


# ---- nothing half written, nothing lost ----


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def given(tmp_path):
    """A folder with one file, and its source."""
    return tmp_path, open_source(save(tmp_path / "x.npy", any_bits((50, 8), np.dtype(np.float32))))


def test_an_existing_file_is_kept_unless_overwritten(given, quiet):
    folder, source = given
    for out in FORMATS:
        target = folder / f"copy{out}"
        convert(source, str(target), quiet)
        before = load(target, "logits")
        other = open_source(save(folder / "other.npy", any_bits((20, 3), np.dtype(np.int16))))
        with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
            convert(other, str(target), quiet)
        assert same(load(target, "logits"), before)
        convert(other, str(target), quiet, overwrite=True)
        assert same(load(target, "labels"), other.read(slice(0, 60)).reshape(20, 3))
    assert names(folder) == sorted(["x.npy", "other.npy", *(f"copy{out}" for out in FORMATS)])


def test_only_files_and_zarr_folders_are_overwritten(given, quiet):
    folder, source = given
    for name in ("precious.npy", "precious.zarr"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("all of it")
        with pytest.raises(ValueError, match="a folder that is no Zarr array"):
            convert(source, str(folder / name), quiet, overwrite=True)
        assert (folder / name / "thesis.txt").read_text() == "all of it"
    (folder / "file.zarr").write_text("a file")
    convert(source, str(folder / "file.zarr"), quiet, overwrite=True)
    assert load(folder / "file.zarr", "").shape == (50, 8)


def test_a_link_leads_to_the_file_that_is_replaced(given, quiet):
    folder, source = given
    (folder / "target.npy").write_text("old")
    (folder / "link.npy").symlink_to(folder / "target.npy")
    convert(source, str(folder / "link.npy"), quiet, overwrite=True)
    assert (folder / "link.npy").is_symlink()
    assert load(folder / "target.npy", "").shape == (50, 8)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("x.npy", {"overwrite": True}, "OUT must be another file than what is read"),
        ("link.npy", {"overwrite": True}, "OUT must be another file than what is read"),
        ("x.kld", {}, "--tokens must be given: a .kld file holds the windows of tokens"),
        ("y.npy", {"to": "kld"}, "--tokens must be given"),
        ("y.npy", {"to": ".npy"}, r"--to must be one of npy, zarr, safetensors, h5, hdf5, parquet, kld, got '.npy'"),
        ("y.kld::logits", {}, "a .kld file holds one array, without a name"),
        (
            "x",
            {},
            r"OUT must end in .npy, .zarr, .safetensors, .h5, .hdf5, .parquet, .kld, or --to must say the format",
        ),
        ("x.npz", {}, "OUT must end in"),
        ("nowhere/x.zarr", {}, "nowhere, the folder of OUT, does not exist"),
        ("y.npy::logits", {}, "a .npy file holds one array, without a name"),
        ("y.zarr::../up", {}, "'../up' cannot be the name of an array"),
        ("y.h5::", {}, "'' cannot be the name of an array"),
        ("y.h5::/a", {}, "'/a' cannot be the name of an array"),
        ("y.safetensors::__metadata__", {}, "'__metadata__' cannot be the name of an array"),
        ("y.npy", {"rows": 5}, "--rows is for formats with chunks, and .npy has none"),
        ("y.safetensors", {"rows": 5}, "--rows is for formats with chunks"),
        ("y.zarr", {"rows": 0}, "--rows must be 1 or more, got 0"),
        ("y.h5", {"rows": 2**27}, "chunks below 4 GiB, got 134,217,728 of 32 bytes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(out, options, message, given, quiet):
    folder, source = given
    (folder / "link.npy").symlink_to(folder / "x.npy")
    before = names(folder), (folder / "x.npy").read_bytes()
    with pytest.raises(ValueError, match=message):
        convert(source, str(folder / out), quiet, **options)
    assert (names(folder), (folder / "x.npy").read_bytes()) == before


def test_nothing_is_written_into_what_is_read(tmp_path, quiet):
    array = any_bits((50, 8), np.dtype(np.float32))
    (tmp_path / "shards").mkdir()
    save(tmp_path / "shards" / "0.npy", array)
    save(tmp_path / "x.zarr", array)
    for source in ("shards", "x.zarr"):
        with pytest.raises(ValueError, match="OUT must not be in the folder that is read"):
            convert(open_source(tmp_path / source), f"{tmp_path}/{source}/all.npy", quiet)
    with pytest.raises(ValueError, match="or match its pattern"):
        convert(open_source(tmp_path / "shards" / "*.npy"), f"{tmp_path}/shards/all.npy", quiet)
    with pytest.raises(ValueError, match="OUT must be another file than what is read"):
        convert(open_source(tmp_path / "x.zarr"), f"{tmp_path}/x.zarr", quiet, overwrite=True)


def test_what_parquet_and_convert_do_not_hold(tmp_path, quiet):
    deep = open_source(save(tmp_path / "deep.npy", any_bits((4, 3, 2), np.dtype(np.float32))))
    with pytest.raises(
        ValueError, match=r"a Parquet column has the shape \(rows,\) or \(rows, vocab\), got \(4, 3, 2\)"
    ):
        convert(deep, f"{tmp_path}/x.parquet", quiet)
    for array in (np.float32(1), np.zeros((3, 0), np.float32)):
        np.save(tmp_path / "odd.npy", array)
        with pytest.raises(ValueError, match="has no rows to convert"):
            convert(open_source(tmp_path / "odd.npy"), f"{tmp_path}/x.h5", quiet)


def test_chunks_that_are_not_stored_are_not_made_into_data(tmp_path, quiet):
    zarr.create_array(str(tmp_path / "x.zarr"), shape=(20, 8), chunks=(5, 8), dtype="f4")[:5] = 1
    with pytest.raises(ValueError, match="3 of its chunks are not stored"):
        convert(open_source(tmp_path / "x.zarr"), f"{tmp_path}/x.npy", quiet)


def test_too_little_space_is_said_before(given, quiet, monkeypatch):
    folder, source = given
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    with pytest.raises(ValueError, match=r"y.npy needs 1.0 MiB, and 2.0 KiB are free in"):
        convert(source, str(folder / "y.npy"), quiet)
    assert names(folder) == ["x.npy"]


@pytest.mark.parametrize("package", ["zarr", "h5py", "pyarrow"])
def test_a_missing_package_is_named(package, given, quiet, monkeypatch):
    folder, source = given
    monkeypatch.setitem(sys.modules, package, None)
    suffix, extra = {"zarr": (".zarr", "zarr"), "h5py": (".h5", "hdf5"), "pyarrow": (".parquet", "parquet")}[package]
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'gpuxent\[{extra}\]'"):
        convert(source, str(folder / f"y{suffix}"), quiet)
    assert names(folder) == ["x.npy"]


LIMITED = """
import io, resource, sys, warnings
from rich.console import Console
from gpuxent.evaluation.files.convert import convert
from gpuxent.evaluation.sources import open_source
warnings.simplefilter("error")
folder = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))  # the system's answer to more: an OSError
for out in sys.argv[2:]:
    try:
        rows = 100 if "chunks" in out else None
        convert(open_source(folder + "/x.npy"), folder + "/" + out, Console(file=io.StringIO()), rows=rows)
    except OSError as error:
        print(error)
"""


def test_a_file_that_cannot_grow_is_named_and_removed(tmp_path):
    save(tmp_path / "x.npy", any_bits((1000, 100), np.dtype(np.float64)))
    outs = [*(f"y{out}" for out in FORMATS), "chunks.h5", "chunks.parquet"]
    command = [sys.executable, "-c", LIMITED, str(tmp_path), *outs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tmp_path}/{out} cannot be written: File too large" for out in outs]
    assert done.stderr == ""
    assert names(tmp_path) == ["x.npy"]


def test_an_unwritable_folder_is_named(given, quiet, monkeypatch):
    folder, source = given

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"y.npy cannot be written: Permission denied"):
        convert(source, str(folder / "y.npy"), quiet)


def test_an_error_while_reading_leaves_the_old_file_alone(given, quiet):
    folder, _ = given
    for out in FORMATS:
        (folder / f"y{out}").write_text("old")
        broken = Watched((300, 8), 10)
        broken.read = lambda rows, columns=None: (_ for _ in ()).throw(ValueError("rows cannot be read"))
        with pytest.raises(ValueError, match="rows cannot be read"):
            convert(broken, str(folder / f"y{out}"), quiet, overwrite=True)
        assert (folder / f"y{out}").read_text() == "old"
    assert names(folder) == sorted(["x.npy", *(f"y{out}" for out in FORMATS)])


def test_a_file_that_appears_meanwhile_is_kept(given, quiet):
    folder, _ = given
    watched = Watched((300, 8), 10)
    read = watched.read
    watched.read = lambda *place: (folder / "y.npy").write_text("of another program") and read(*place)
    with pytest.raises(OSError, match=r"y.npy cannot be written: another program has made it in the meantime"):
        convert(watched, str(folder / "y.npy"), quiet)
    assert (folder / "y.npy").read_text() == "of another program"
    assert names(folder) == ["x.npy", "y.npy"]


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background processes ignore it
from gpuxent.evaluation.files import convert
from gpuxent.evaluation.files import writers
from gpuxent.cli import main
convert.CHUNK_BYTES = writers.CHUNK_BYTES = 1000
def slowly(self, first, block, write=convert.WRITERS[sys.argv[1]].write):
    write(self, first, block)
    print("a block", flush=True)
    time.sleep(0.3)
convert.WRITERS[sys.argv[1]].write = slowly
sys.argv[1:] = ["convert", *sys.argv[2:]]
main()
"""


def started(folder, out):
    """A convert that has written a block and is about to write many more."""
    command = [sys.executable, "-c", SLOW, out, str(folder / "x.npy"), str(folder / f"y{out}")]
    command += ["--rows", "10"] if out == ".h5" else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "a block\n", process.communicate()
    return process


@pytest.mark.parametrize("out", [".npy", ".h5"])
def test_after_sigkill_nothing_looks_whole(out, given, quiet):
    folder, _ = given
    save(folder / "x.npy", any_bits((3000, 8), np.dtype(np.float32)))
    process = started(folder, out)
    process.kill()
    process.communicate()
    left = [name for name in names(folder) if name != "x.npy"]
    assert len(left) == 1
    assert left[0].startswith(f"y{out}.partial-")
    with pytest.raises(ValueError, match=r"partial"):
        open_source(folder / left[0])
    convert(open_source(folder / "x.npy"), str(folder / f"y{out}"), quiet)
    assert load(folder / f"y{out}", "logits").shape == (3000, 8)
    assert f"{left[0]} is of a convert that still runs, or was killed" in quiet.file.getvalue().replace("\n", "")


def test_ctrl_c_leaves_nothing(given):
    folder, _ = given
    save(folder / "x.npy", any_bits((3000, 8), np.dtype(np.float32)))
    process = started(folder, ".npy")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 4
    assert stderr.splitlines()[-1].startswith("gpuxent: ")
    assert names(folder) == ["x.npy"]


# ---- the command ----


def test_command(given):
    folder, _ = given
    done = gpuxent("convert", folder / "x.npy", f"{folder}/y.h5::run/logits", "--rows", 7)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert "50/50 rows (100%)" in done.stderr
    assert done.stdout.startswith(f"{folder}/y.h5::run/logits: float32 of shape (50, 8), ")
    back = invoked("convert", f"{folder}/y.h5::run/logits", folder / "z.npy")
    assert back.exit_code == 0, back.stderr
    assert (folder / "z.npy").read_bytes() == (folder / "x.npy").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x.npy"], 2, "Missing argument 'OUT'"),
        (["x.npy", "y.npy", "--rows", "many"], 2, "Invalid value for '--rows'"),
        (["none.npy", "y.npy"], 3, "none.npy does not exist"),
        (["x.npy", "y.kld"], 3, "--tokens must be given"),
        (["bad.npy", "y.npy"], 3, "is not a whole .npy file"),
    ],
)
def test_exit_codes(arguments, code, message, given):
    folder, _ = given
    (folder / "bad.npy").write_text("no array")
    done = invoked("convert", *(folder / a if "." in a else a for a in arguments))
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 3:
        assert done.stderr.count("\n") == 1
    assert names(folder) == ["bad.npy", "x.npy"]
