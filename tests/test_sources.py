"""Sources: opened by path, read in pieces, never whole."""

import pickle
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


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_source_travels_as_its_path(kind, tmp_path):
    array = np.random.default_rng(0).normal(0, 1, (50, 2000))
    save = save_npy if kind == "npy" else save_zarr
    source = {"npy": NpySource, "zarr": ZarrSource}[kind](save(tmp_path / f"x.{kind}", array))
    packed = pickle.dumps(source)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).read((slice(10, 20),)), array[10:20])


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
        with pytest.raises(ValueError, match=rf"{name} is not a whole \.npy file: "):
            open_source(write(tmp_path / name, data))
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
