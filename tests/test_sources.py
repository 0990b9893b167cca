"""Sources: opened by path, read by flat row numbers in pieces, never whole."""

import errno
import io
import itertools
import math
import sys
import tracemalloc
from pathlib import Path

import dask.array as da
import h5py
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gpuxent.evaluation.sources import (
    ArraySource,
    DaskSource,
    _base,
    _handles,
    _mapped,
    open_source,
)

DTYPES = pytest.mark.parametrize(
    "dtype",
    [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32, np.uint8],
    ids=lambda d: np.dtype(d).name,
)


# ---- files of every format, by other programs than ours ----


def save_npy(path, array):
    np.save(path, array)
    return path


def save_zarr(path, array, chunks=None, **options):
    stored = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    chunks = chunks or tuple(max(size, 1) for size in array.shape)
    made = zarr.create_array(str(path), shape=array.shape, dtype=stored.dtype, chunks=chunks, **options)
    made[...] = stored
    if array.dtype == ml_dtypes.bfloat16:
        made.attrs["dtype"] = "bfloat16"
    return path


def save_safetensors(path, array, name="x"):
    save_file({name: np.asarray(array, order="C")}, path)
    return path


def save_hdf5(path, array, name="x", **options):
    with h5py.File(path, "w") as file:
        stored = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
        made = file.create_dataset(name, data=stored, **options)
        if array.dtype == ml_dtypes.bfloat16:
            made.attrs["dtype"] = "bfloat16"
    return path


def save_parquet(path, array, name="x", rows=3):
    stored = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    column = pa.array(stored) if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(stored.ravel(), array.shape[1])
    mark = {"dtype": "bfloat16"} if array.dtype == ml_dtypes.bfloat16 else None
    pq.write_table(
        pa.table([column], pa.schema([pa.field(name, column.type, metadata=mark)])), path, row_group_size=rows
    )
    return path


def save_shards(path, array):
    path.mkdir()
    for at, start in enumerate(range(0, len(array), 2)):
        np.save(path / f"{at}.npy", array[start : start + 2])
    return path


SAVERS = {
    "npy": save_npy,
    "npy_fortran": lambda path, array: save_npy(path, np.asfortranarray(array)),
    "zarr": lambda path, array: save_zarr(path, array, (2, *(3,) * (array.ndim - 1))),
    "zarr_shards": lambda path, array: save_zarr(
        path, array, (1, *(3,) * (array.ndim - 1)), shards=(2, *(6,) * (array.ndim - 1))
    ),
    "safetensors": save_safetensors,
    "hdf5": save_hdf5,
    "hdf5_chunks": lambda path, array: save_hdf5(path, array, chunks=(2, *(3,) * (array.ndim - 1)), compression="gzip"),
    "shards": save_shards,
}
SUFFIX = {"zarr_shards": "zarr", "npy_fortran": "npy", "hdf5": "h5", "hdf5_chunks": "h5"}
KINDS = pytest.mark.parametrize("kind", [*SAVERS, "parquet"])


def make(kind, path, array):
    """A source of the array in a file of this kind; of two axes for Parquet."""
    if kind == "parquet":
        array = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array
    save = save_parquet if kind == "parquet" else SAVERS[kind]
    return open_source(save(path / f"x.{SUFFIX.get(kind, kind)}", array))


def write(path, data):
    path.write_bytes(data)
    return path


class Broken:
    """In place of a library's function."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


def random_array(dtype, shape=(7, 5, 30)):
    return np.random.default_rng(0).normal(0, 100, shape).astype(dtype)


# ---- rows and columns ----


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_rectangles_hold_the_elements_of_a_range_in_order(shape, data):
    total = math.prod(shape)
    first = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(0, total))
    array = np.arange(total).reshape(shape)
    cuts = _base.rectangles(tuple(shape), first, stop)
    assert [int(i) for cut in cuts for i in array[cut].ravel()] == list(range(first, stop))
    assert len(cuts) <= 2 * len(shape) - 1
    assert all(0 <= axis.start <= axis.stop <= size for cut in cuts for axis, size in zip(cut, shape, strict=True))


@DTYPES
@KINDS
def test_read_gives_flat_rows_and_columns(dtype, kind, tmp_path):
    array = random_array(dtype)
    source = make(kind, tmp_path, array)
    assert source.shape == ((35, 30) if kind == "parquet" else array.shape)
    assert source.dtype == array.dtype
    rows, everything = array.reshape(35, 30), array.ravel()
    for first, stop, left, right in [(0, 35, 0, 30), (4, 23, 4, 9), (5, 10, 0, 30), (7, 8, 29, 30), (12, 12, 0, 4)]:
        block = source.read(slice(first, stop), slice(left, right))
        assert (block.dtype, block.shape) == (array.dtype, (stop - first, right - left))
        assert block.tobytes() == np.ascontiguousarray(rows[first:stop, left:right]).tobytes()
    for first, stop in [(149, 311), (1050, 1050)]:
        block = source.read(slice(first, stop))
        assert (block.dtype, block.shape) == (array.dtype, (stop - first,))
        assert block.tobytes() == everything[first:stop].tobytes()


@KINDS
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, bool])
def test_a_vector_has_no_columns(kind, dtype, tmp_path):
    array = (np.arange(-3, 17) ** 5).astype(dtype)
    source = make(kind, tmp_path, array)
    assert (source.shape, source.dtype) == ((20,), np.dtype(dtype))
    for first, stop in [(0, 20), (3, 6), (1, 19), (19, 20), (20, 20)]:
        assert source.read(slice(first, stop)).tolist() == array[first:stop].tolist()


@pytest.mark.parametrize("kind", ["npy", "npy_fortran", "zarr", "hdf5", "hdf5_chunks", "shards"])
@pytest.mark.parametrize("code", [">i8", ">u2", ">f4", ">f2", ">f8"])
def test_foreign_byte_order_comes_out_right(kind, code, tmp_path):
    array = np.arange(60).reshape(4, 5, 3).astype(code)
    source = make(kind, tmp_path, array)
    assert source.dtype == np.dtype(code[1:])
    block = source.read(slice(3, 17), slice(0, 3))
    assert block.dtype.isnative
    assert block.tolist() == array.reshape(20, 3)[3:17].tolist()


@pytest.mark.parametrize("save", [save_zarr, save_hdf5])
def test_bfloat16_of_foreign_byte_order(save, tmp_path):
    array = random_array(ml_dtypes.bfloat16, (6, 8))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, chunks in (("whole", None), ("chunks", (2, 8))):
            file.create_dataset(name, data=array.view(np.uint16).astype(">u2"), chunks=chunks).attrs["dtype"] = (
                "bfloat16"
            )
    for name in ("whole", "chunks"):
        source = open_source(f"{tmp_path}/x.h5::{name}")
        assert source.read(slice(1, 5), slice(0, 8)).tobytes() == array[1:5].tobytes()


@pytest.mark.parametrize("kind", ["npy", "zarr", "hdf5", "safetensors"])
def test_a_single_number_and_a_single_row(kind, tmp_path):
    saved = {"npy": save_npy, "zarr": save_zarr, "hdf5": save_hdf5, "safetensors": save_safetensors}[kind]
    number = open_source(saved(tmp_path / f"n.{SUFFIX.get(kind, kind)}", np.array(7)))
    assert number.shape == ()
    assert [number.read(slice(0, 1)).tolist(), number.read(slice(0, 0)).tolist()] == [[7], []]
    row = open_source(saved(tmp_path / f"r.{SUFFIX.get(kind, kind)}", np.arange(5.0)))
    assert row.read(slice(0, 1), slice(1, 4)).tolist() == [[1, 2, 3]]
    assert row.read(slice(0, 0), slice(1, 4)).shape == (0, 3)


@pytest.mark.parametrize("kind", ["npy", "npy_fortran", "zarr", "hdf5", "hdf5_chunks", "safetensors"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 5)])
def test_no_rows(kind, shape, tmp_path):
    if kind == "hdf5_chunks":
        path = tmp_path / "x.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("x", shape=shape, maxshape=[None] * len(shape), dtype="f4", chunks=(2,) * len(shape))
        source = open_source(path)
    else:
        source = make(kind, tmp_path, np.zeros(shape, np.float32))
    assert source.shape == shape
    assert source.read(slice(0, 10)).shape == (0,)
    assert source.warnings() == []
    if len(shape) > 1:
        assert source.read(slice(0, 10), slice(1, 3)).shape == (0, 2)


def test_a_file_in_fortran_order_is_read_in_slabs(tmp_path, monkeypatch):
    array = random_array(np.float32, (40, 6, 50))
    source = open_source(save_npy(tmp_path / "x.npy", np.asfortranarray(array)))
    mapped = []
    whole = _mapped.map_bytes
    monkeypatch.setattr(_mapped, "map_bytes", lambda *a, **k: mapped.append(a[2]) or whole(*a, **k))
    monkeypatch.setattr(_mapped, "SLAB_BYTES", 7 * 40 * 6 * 4 + 5)
    assert np.array_equal(source.read(slice(100, 200), slice(1, 49)), array.reshape(240, 50)[100:200, 1:49])
    assert max(mapped) == 7 * 40 * 6 * 4
    assert len(mapped) == 3 * 7  # rectangles times slabs


# ---- arrays in memory ----


def test_reads_of_an_array_are_views_where_they_can_be():
    array = random_array(np.float32)
    source = ArraySource(array)
    assert np.shares_memory(source.read(slice(3, 20), slice(2, 8)), array)
    assert np.shares_memory(source.read(slice(33, 200)), array)
    assert source.files() == source.warnings() == []
    source.check(slice(0, 5))
    strided = np.zeros((7, 10, 30), np.float32)[:, ::2]
    strided[...] = array
    for other in (strided, np.asfortranarray(array), np.broadcast_to(array[:1], array.shape), array[:, :, ::-1]):
        rows = np.array(other).reshape(35, 30)
        for first, stop in itertools.combinations((0, 3, 5, 10, 12, 34, 35), 2):
            assert np.array_equal(ArraySource(other).read(slice(first, stop), slice(3, 9)), rows[first:stop, 3:9])
    assert np.shares_memory(ArraySource(strided).read(slice(5, 10), slice(0, 30)), strided)


def test_reading_an_array_never_copies_more_than_the_rows():
    array = np.zeros((64, 4, 2**14), np.float32).transpose(1, 0, 2)  # 16 MB, not viewable as (rows, vocab)
    tracemalloc.start()
    try:
        ArraySource(array).read(slice(60, 70), slice(0, 2**14))
        assert tracemalloc.get_traced_memory()[1] < 3 * 10 * 2**16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("chunks", [((2, 4, 1), (5,), (30,)), ((1,) * 7, (2, 3), (10, 20)), ((7,), (1, 4), (30,))])
def test_reads_of_a_dask_array_are_lazy(chunks):
    array = random_array(np.float32)

    def forbidden(block):
        raise AssertionError("computed")

    lazy = DaskSource(da.from_array(array, chunks=chunks).map_blocks(forbidden, dtype=array.dtype, meta=array[:0]))
    block = lazy.read(slice(4, 23), slice(3, 9))
    assert (block.shape, block.dtype, lazy.dtype, lazy.shape) == ((19, 6), np.float32, np.float32, (7, 5, 30))
    source = DaskSource(da.from_array(array, chunks=chunks))
    assert np.array_equal(source.read(slice(4, 23), slice(3, 9)).compute(), array.reshape(35, 30)[4:23, 3:9])
    assert np.array_equal(source.read(slice(40, 333)).compute(), array.ravel()[40:333])
    assert source.read(slice(3, 3), slice(0, 30)).compute().shape == (0, 30)


def test_edges_of_a_dask_array_lie_between_chunks():
    for chunks in [
        ((2, 4, 1), (5,), (30,)),
        ((1,) * 7, (2, 3), (10, 20)),
        ((7,), (1, 4), (30,)),
        ((3, 4), (2, 3), (30,)),
        ((1,) * 7, (1,) * 5, (30,)),
    ]:
        source = DaskSource(da.zeros((7, 5, 30), chunks=chunks))
        owner = np.arange(math.prod(map(len, chunks))).reshape([len(sizes) for sizes in chunks])
        for axis, sizes in enumerate(chunks):
            owner = np.repeat(owner, sizes, axis)
        owners = owner.reshape(35, 30)
        assert source.row_edges[0] == 0
        assert source.row_edges[-1] == 35
        for edge in source.row_edges[1:-1]:
            assert not set(owners[:edge].flat) & set(owners[edge:].flat)
        clean = [e for e in range(36) if not set(owners[:e].flat) & set(owners[e:].flat)]
        assert source.row_edges == clean
    assert DaskSource(da.zeros((9, 4), chunks=(2, 4))).row_chunk == 2
    assert DaskSource(da.zeros((9,), chunks=(2,))).row_edges == [0, 2, 4, 6, 8, 9]


# ---- chunks ----


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=2, max_size=4))
def test_no_chunk_lies_on_both_sides_of_a_multiple_of_row_chunk(axes):
    shape, chunks = [size for size, _ in axes], [chunk for _, chunk in axes]
    grid = [math.ceil(size / chunk) for size, chunk in axes]
    place = np.indices(shape) // np.reshape(chunks, (-1,) + (1,) * len(shape))
    owner = np.ravel_multi_index(tuple(place), grid).reshape(-1, shape[-1])
    step = _base.row_chunk(shape, chunks)
    for edge in range(step, len(owner), step):
        assert not set(owner[:edge].flat) & set(owner[edge:].flat)
    assert step <= math.prod(shape[:-1]) or step == chunks[0] * math.prod(shape[1:-1])


def test_chunks_of_files(tmp_path):
    array = np.zeros((64, 10), np.float32)
    assert open_source(save_zarr(tmp_path / "x.zarr", array, (12, 10))).row_chunk == 12
    assert open_source(save_zarr(tmp_path / "s.zarr", array, (4, 10), shards=(16, 10))).row_chunk == 16
    assert open_source(save_zarr(tmp_path / "d.zarr", np.zeros((8, 6, 9)), (2, 3, 9))).row_chunk == 12
    assert open_source(save_hdf5(tmp_path / "x.h5", array, chunks=(7, 3))).row_chunk == 7
    assert open_source(save_parquet(tmp_path / "x.parquet", array, rows=20)).row_chunk == 20
    assert open_source(save_npy(tmp_path / "x.npy", array)).row_chunk == 1


@pytest.mark.parametrize("kind", ["zarr", "hdf5_chunks", "parquet"])
def test_a_chunk_of_labels_is_decoded_once(kind, tmp_path, monkeypatch):
    labels = np.arange(1000)
    if kind == "parquet":
        source = open_source(save_parquet(tmp_path / "y.parquet", labels, rows=400))
    elif kind == "zarr":
        source = open_source(save_zarr(tmp_path / "y.zarr", labels, (400,)))
    else:
        source = open_source(save_hdf5(tmp_path / "y.h5", labels, chunks=(400,)))
    monkeypatch.setattr(_handles.handles, "_open", type(_handles.handles._open)())
    decoded, cut = [], type(source)._cut
    monkeypatch.setattr(type(source), "_cut", lambda self, place: decoded.append(place) or cut(self, place))
    got = [source.read(slice(first, first + 50)).tolist() for first in range(0, 1000, 50)]
    assert got == [list(range(first, first + 50)) for first in range(0, 1000, 50)]
    assert [(place[0].start, place[0].stop) for place in decoded] == [(0, 400), (400, 800), (800, 1000)]
    assert source.read(slice(390, 410)).tolist() == list(range(390, 410))  # back, and over an edge
    assert source.read(slice(5, 15)).tolist() == list(range(5, 15))
    monkeypatch.setattr(_handles, "KEPT_BYTES", 100)  # a chunk that is too large is not kept
    source.read(slice(0, 10))
    assert (decoded[-1][0].start, decoded[-1][0].stop) == (0, 10)


# ---- memory ----


def test_opening_a_huge_file_reads_next_to_nothing(tmp_path):
    path = tmp_path / "huge.npy"
    with path.open("wb") as file:  # 8 GB of holes
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**21, 1000)})
        file.truncate(file.tell() + 2**21 * 1000 * 4)
    tracemalloc.start()
    try:
        source = open_source(path)
        assert source.shape == (2**21, 1000)
        assert source.read(slice(2**21 - 3, 2**21), slice(0, 1000)).sum() == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_opening_a_huge_zarr_array_reads_next_to_nothing(tmp_path):
    path = tmp_path / "huge.zarr"
    zarr.create_array(str(path), shape=(2**21, 1000), dtype="f4", chunks=(128, 1000), fill_value=7)
    open_source(path).read(slice(0, 1), slice(0, 1000))  # what Zarr itself sets up
    tracemalloc.start()
    try:
        source = open_source(path)
        assert source.shape == (2**21, 1000)
        assert (source.read(slice(2**21 - 3, 2**21), slice(0, 1000)) == 7).all()
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapping_goes_with_the_block_and_holds_the_block_only(tmp_path):
    array = np.ones((64, 2**18), np.float32)  # 64 MB
    source = open_source(save_npy(tmp_path / "x.npy", array))

    def mapped():
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "x.npy" in line]
        return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in lines))

    block = source.read(slice(10, 12), slice(0, 2**18))
    assert 2 * 2**20 <= mapped() <= 2 * 2**20 + 8192
    resident = [
        int(line.split()[1])
        for part in Path("/proc/self/smaps").read_text().split("x.npy")[1:]
        for line in part.splitlines()[1:3]
        if line.startswith("Rss")
    ]
    del block
    assert mapped() == 0
    narrow = source.read(slice(10, 12), slice(0, 5))  # a copy, not the rows' mapping
    assert mapped() == 0
    assert narrow.tolist() == [[1] * 5] * 2
    assert all(size >= 2048 for size in resident)  # kB: the pages were there when read returned


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT, errno.EIO])
def test_systems_that_cannot_populate_a_mapping(number, tmp_path, monkeypatch):
    array = random_array(np.float32, (50, 300))
    source = open_source(save_npy(tmp_path / "x.npy", array))
    monkeypatch.setattr(_mapped, "_populate", lambda pages: number)
    assert np.array_equal(source.read(slice(7, 33), slice(0, 300)), array[7:33])
    monkeypatch.undo()
    monkeypatch.setattr(_mapped, "_madvise", lambda: None)
    assert np.array_equal(source.read(slice(7, 33), slice(0, 300)), array[7:33])


def test_the_system_may_read_less_than_asked(tmp_path, monkeypatch):
    data = bytes(range(100))
    path = write(tmp_path / "x", data)

    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(buffer[:7])

    monkeypatch.setattr(_mapped, "open", lambda path, *args, **kwargs: Slow(path), raising=False)
    assert _mapped._read_bytes(str(path), 10, 60).tobytes() == data[10:70]
    with pytest.raises(ValueError, match=r"the file ends 20 bytes too soon$"):
        _mapped._read_bytes(str(path), 60, 60)


def test_files_that_cannot_be_mapped(tmp_path, monkeypatch):
    """On some file systems."""
    array = random_array(np.float32, (50, 300))
    source = open_source(save_npy(tmp_path / "x.npy", array))

    def not_here(*args, **kwargs):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(_mapped.mmap, "mmap", not_here)
    assert np.array_equal(source.read(slice(7, 33), slice(0, 300)), array[7:33])
