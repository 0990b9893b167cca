"""Sources: opened by path, read in pieces, never whole."""

import pickle
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import zarr

from gpuxent.evaluation.sources import ArraySource, NpySource, ZarrSource, open_source

DTYPES = pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32], ids=lambda d: np.dtype(d).name
)


def save_npy(path, array):
    np.save(path, array)
    return path


def save_zarr(path, array, chunks=None):
    stored = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    made = zarr.create_array(str(path), shape=array.shape, dtype=stored.dtype, chunks=chunks or array.shape)
    made[...] = stored
    if array.dtype == ml_dtypes.bfloat16:
        made.attrs["dtype"] = "bfloat16"
    return path


@DTYPES
@pytest.mark.parametrize("kind", ["array", "npy", "zarr"])
def test_read_gives_the_rows_and_columns(dtype, kind, tmp_path):
    array = np.random.default_rng(0).normal(0, 100, (7, 5, 30)).astype(dtype)
    if kind == "array":
        source = ArraySource(array)
    elif kind == "npy":
        source = open_source(save_npy(tmp_path / "x.npy", array))
    else:
        source = open_source(save_zarr(tmp_path / "x.zarr", array, (2, 5, 7)))
    assert (source.shape, source.dtype) == (array.shape, array.dtype)
    rows = (slice(1, 4), slice(2, 5))
    assert np.array_equal(source.read(rows).astype(np.float64), array[1:4, 2:5].astype(np.float64))
    assert np.array_equal(source.read(rows, slice(4, 9)).astype(np.float64), array[1:4, 2:5, 4:9].astype(np.float64))


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_vector_has_no_columns(kind, tmp_path):
    array = np.arange(20)
    save = save_npy if kind == "npy" else save_zarr
    assert open_source(save(tmp_path / f"y.{kind}", array)).read((slice(3, 6),)).tolist() == [3, 4, 5]


def test_chunks_of_a_zarr_array_are_read_once(tmp_path):
    array = np.zeros((64, 10), np.float32)
    assert open_source(save_zarr(tmp_path / "x.zarr", array, (12, 10))).row_chunk == 12
    zarr.create_array(str(tmp_path / "s.zarr"), shape=(64, 10), dtype="f4", chunks=(4, 10), shards=(16, 10))
    assert open_source(tmp_path / "s.zarr").row_chunk == 16


def test_opening_a_huge_file_reads_next_to_nothing(tmp_path):
    path = tmp_path / "huge.npy"
    with path.open("wb") as file:  # 8 GB of holes
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**21, 1000)})
        file.truncate(file.tell() + 2**21 * 1000 * 4)
    tracemalloc.start()
    try:
        source = open_source(path)
        assert source.shape == (2**21, 1000)
        assert source.read((slice(2**21 - 3, 2**21),)).sum() == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_opening_a_huge_zarr_array_reads_next_to_nothing(tmp_path):
    path = tmp_path / "huge.zarr"
    zarr.create_array(str(path), shape=(2**21, 1000), dtype="f4", chunks=(128, 1000), fill_value=7)
    open_source(path).read((slice(0, 1),))  # what Zarr itself sets up
    tracemalloc.start()
    try:
        source = open_source(path)
        assert source.shape == (2**21, 1000)
        assert (source.read((slice(2**21 - 3, 2**21),)) == 7).all()
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_source_travels_as_its_path(kind, tmp_path):
    array = np.random.default_rng(0).normal(0, 1, (50, 2000))
    save = save_npy if kind == "npy" else save_zarr
    source = {"npy": NpySource, "zarr": ZarrSource}[kind](save(tmp_path / f"x.{kind}", array))
    assert len(pickle.dumps(source)) < 1000
    assert source.shape == (50, 2000)  # opened: still no data in it
    packed = pickle.dumps(source)
    assert len(packed) < 4000
    read = "import pickle, sys; source = pickle.load(sys.stdin.buffer); rows = source.read((slice(10, 20),))"
    write = "sys.stdout.buffer.write(rows.tobytes())"
    done = subprocess.run([sys.executable, "-c", f"{read}; {write}"], input=packed, capture_output=True, check=True)
    assert done.stdout == array[10:20].tobytes()


def write(path, data):
    path.write_bytes(data)
    return path


def test_files_that_are_no_arrays(tmp_path):
    whole = save_npy(tmp_path / "whole.npy", np.zeros((100, 10))).read_bytes()
    for name, data in (
        ("empty.npy", b""),
        ("text.npy", b"hello"),
        ("short.npy", whole[:-8]),
        ("header.npy", whole[:40]),
    ):
        with pytest.raises(ValueError, match=rf"{name} is not a whole \.npy file: ") as caught:
            open_source(write(tmp_path / name, data))
        assert "pickle" not in str(caught.value)  # NumPy's advice to load unsafely is no advice
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy is not a whole \.npy file: .*objects"):
        open_source(tmp_path / "objects.npy")
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"several\.npz is an archive of arrays; give one \.npy file"):
        open_source(tmp_path / "several.npz")
    with pytest.raises(FileNotFoundError, match=r"nothing\.npy does not exist"):
        open_source(tmp_path / "nothing.npy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is not a Zarr array"):
        open_source(tmp_path / "folder")
    zarr.create_group(str(tmp_path / "group.zarr"))
    with pytest.raises(ValueError, match=r"group\.zarr is not a Zarr array"):
        open_source(tmp_path / "group.zarr")


def test_a_broken_chunk_is_an_error_that_says_where(tmp_path):
    """Not one of the many kinds that codecs raise."""
    array = np.random.default_rng(0).normal(0, 1, (40, 100)).astype(np.float32)
    for compressors in ("auto", None):
        path = tmp_path / f"{compressors}.zarr"
        made = zarr.create_array(str(path), shape=(40, 100), dtype="f4", chunks=(10, 100), compressors=compressors)
        made[...] = array
        chunk = path / "c" / "2" / "0"
        write(chunk, chunk.read_bytes()[:-100])
        source = open_source(path)
        assert np.array_equal(source.read((slice(0, 20),)), array[:20])
        with pytest.raises(ValueError, match=r"\.zarr cannot be read at \[15:25\]: "):
            source.read((slice(15, 25),))
