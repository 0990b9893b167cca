"""Files of sources: used by many threads and processes, changed and damaged while they are read, and those that are no
arrays."""

import errno
import itertools
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from safetensors.numpy import save_file
from test_sources import (
    KINDS,
    SAVERS,
    SUFFIX,
    Broken,
    make,
    random_array,
    save_hdf5,
    save_npy,
    save_parquet,
    save_shards,
    save_zarr,
    write,
)

from gpuxent.evaluation.sources import (
    FileStamp,
    _handles,
    _mapped,
    members,
    open_source,
)

# What HDF5 makes of EIO.
HDF5_TEXT = (
    "Can't read data (file read failed: time = Mon, filename = 'x', errno = 5, error message = 'Input/output error')"
)

# ---- other threads, other processes ----


@KINDS
def test_a_source_travels_as_its_path(kind, tmp_path, monkeypatch):
    array = random_array(np.float64, (50, 20))
    monkeypatch.chdir(tmp_path)
    source = make(kind, Path("."), array)  # relative here, and absolute there
    source.read(slice(0, 9), slice(0, 20))
    packed = pickle.dumps(source)
    assert len(packed) < (10_000 if kind == "shards" else 1000)
    assert pickle.loads(packed) == source
    monkeypatch.chdir("/")
    assert pickle.loads(packed).read(slice(10, 20), slice(0, 20)).tobytes() == array[10:20].tobytes()


def test_a_source_in_another_process(tmp_path):
    """A fresh one, and one that was forked while handles and Zarr's threads were there."""
    array = random_array(np.float64, (50, 20))
    sources = [
        make(kind, tmp_path / kind, array) for kind in map(made_folder(tmp_path), ["npy", "zarr", "hdf5_chunks"])
    ]
    read = "import pickle, sys; sources = pickle.load(sys.stdin.buffer)"
    fork = (
        "import multiprocessing as mp\n"
        "def rows(): return b''.join(source.read(slice(10, 20), slice(0, 20)).tobytes() for source in sources)\n"
        "here = rows()\n"
        "with mp.get_context('fork').Pool(1) as pool: there = pool.apply_async(rows).get(30)\n"
        "assert here == there\n"
        "sys.stdout.buffer.write(there)"
    )
    packed = pickle.dumps(sources)
    done = subprocess.run([sys.executable, "-c", f"{read}\n{fork}"], input=packed, capture_output=True, timeout=60)
    assert done.stdout == 3 * array[10:20].tobytes(), done.stderr.decode()


def made_folder(parent):
    def made(name):
        (parent / name).mkdir()
        return name

    return made


def test_many_threads_read_at_once(tmp_path, monkeypatch):
    """While handles are dropped all the time."""
    array = random_array(np.float32, (60, 20))
    monkeypatch.setattr(_handles.handles, "most", 1)
    sources = [make(made_folder(tmp_path)(kind), tmp_path / kind, array) for kind in [*SAVERS, "parquet"]]

    def differs(at):
        generator = np.random.default_rng(at)
        first, stop = sorted(generator.integers(0, 61, 2))
        source = sources[generator.integers(len(sources))]
        return not np.array_equal(source.read(slice(first, stop), slice(0, 20)), array[first:stop])

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(differs, range(60))) == 0
    assert len(_handles.handles) == 1


def test_handles_are_bounded_and_closed_by_their_last_reader(tmp_path):
    array = np.arange(10.0)
    paths = [save_hdf5(tmp_path / f"{at}.h5", array, chunks=(5,)) for at in range(_handles.MOST + 8)]
    for path in paths:
        assert open_source(path).read(slice(0, 10)).sum() == 45
    assert len(_handles.handles) == _handles.MOST
    cache, closed = _handles.Handles(2), []

    class Handle:
        def __init__(self, name):
            self.name = name

        def __del__(self):
            closed.append(self.name)

    held = cache.get("a", lambda: Handle("a"))
    for name in "bca":
        cache.get(name, lambda name=name: Handle(name))
    assert closed == ["b"]  # a was opened again, beside the one that is held
    assert cache.get("a", lambda: None) is not held
    del held
    assert closed == ["b", "a"]
    cache.reset()
    assert sorted(closed) == ["a", "a", "b", "c"]


# ---- files that change or are cut short ----


def test_a_handle_that_failed_is_opened_again(tmp_path, monkeypatch):
    """One that a network file system has let go fails for ever."""
    array = random_array(np.float32, (40, 10))
    source = make("hdf5_chunks", tmp_path, array)
    source.read(slice(0, 9), slice(0, 10))
    before = _handles.handles.find(source.stamp)
    with monkeypatch.context() as broken:
        broken.setattr(h5py.Dataset, "__getitem__", Broken(OSError(HDF5_TEXT)))
        with pytest.raises(OSError, match="Input/output error"):
            source.read(slice(0, 9), slice(0, 10))
    assert _handles.handles.find(source.stamp) is None
    assert np.array_equal(source.read(slice(0, 9), slice(0, 10)), array[:9])
    assert _handles.handles.find(source.stamp) is not before


def test_files_says_what_a_source_reads(tmp_path):
    array = random_array(np.float32, (50, 20))
    for kind in [*SAVERS, "parquet"]:
        source = make(made_folder(tmp_path)(kind), tmp_path / kind, array)
        expected = {
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in (tmp_path / kind).rglob("*")
            if path.is_file()
        }
        assert {(stamp.path, stamp.size, stamp.mtime_ns) for stamp in source.files()} == expected
        assert len(source.files()) == len(expected)


def touched(path):
    """Written to again, the same size."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def a_file(path, kind):
    """The file whose change is to be noticed: of Zarr a chunk that holds row 10."""
    if kind == "zarr":
        return path / "x.zarr" / "c" / "5" / "0"
    if kind == "zarr_shards":
        return path / "x.zarr" / "c" / "5" / "1"
    if kind == "shards":
        return path / "x.shards" / "5.npy"
    return path / f"x.{SUFFIX.get(kind, kind)}"


@KINDS
def test_a_file_that_changed_since_it_was_opened(kind, tmp_path):
    array = random_array(np.float32, (50, 20))
    source, path = make(kind, tmp_path, array), a_file(tmp_path, kind)
    rows = slice(9, 13), slice(0, 20)
    source.read(*rows)
    source.check(*rows)
    if kind.startswith("zarr"):
        newest = max(file.stat().st_mtime_ns for file in (tmp_path / "x.zarr").rglob("*"))
        os.utime(path, ns=(newest, newest + 1))
    else:
        touched(path)
        with pytest.raises(ValueError, match=r"changed while it was read: it was written to again$"):
            source.check(*rows)
    with pytest.raises(ValueError, match=rf"{path.name} (was written since|changed while it was read: it was written)"):
        source.read(*rows)
    if kind == "shards":
        assert np.array_equal(source.read(slice(0, 8), slice(0, 20)), array[:8])
        source.check(slice(0, 8), slice(0, 20))


def test_the_error_says_both_sizes(tmp_path):
    path = write(tmp_path / "x.bin", bytes(4096))
    stamp = FileStamp.of(path)
    stamp.check()
    write(path, bytes(8192))
    with pytest.raises(ValueError, match=r"x\.bin changed while it was read: 4,096 bytes -> 8,192 bytes$"):
        stamp.check()


@pytest.mark.parametrize("kind", ["npy", "npy_fortran", "safetensors", "hdf5", "hdf5_chunks", "parquet", "shards"])
def test_a_file_cut_short_while_it_is_open(kind, tmp_path):
    """An error, where touching a page beyond the end would kill the process."""
    source, path = make(kind, tmp_path, random_array(np.float32, (50, 20))), a_file(tmp_path, kind)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"changed while it was read: [0-9,]+ bytes -> [0-9,]+ bytes$"):
        source.read(slice(0, 50), slice(0, 20))


@pytest.mark.skipif(sys.platform != "linux", reason="no MADV_POPULATE_READ")
def test_a_file_cut_short_between_the_check_and_the_pages(tmp_path, monkeypatch):
    source = open_source(save_npy(tmp_path / "x.npy", np.ones((64, 4096), np.float32)))
    populate = _mapped._populate

    def cut_short(pages):
        os.truncate(tmp_path / "x.npy", 4096)
        return populate(pages)

    monkeypatch.setattr(_mapped, "_populate", cut_short)
    with pytest.raises(ValueError, match=r"changed while it was read: 1,048,704 bytes -> 4,096 bytes$"):
        source.read(slice(0, 64), slice(0, 4096))


@KINDS
def test_a_file_that_changes_during_a_read(kind, tmp_path, monkeypatch):
    array = random_array(np.float32, (50, 20))
    source, path = make(kind, tmp_path, array), a_file(tmp_path, kind)
    if not kind.startswith("zarr"):
        module = sys.modules[type(getattr(source, "parts", [source])[0]).__module__]
        monkeypatch.setattr(module, "reading", changing(module.reading, path))
    else:
        getitem = zarr.Array.__getitem__

        def change_and_get(self, place):
            block = getitem(self, place)
            touched(path)
            return block

        monkeypatch.setattr(zarr.Array, "__getitem__", change_and_get)
    with pytest.raises(ValueError, match=r"changed while it was read: it was written to again$"):
        source.read(slice(9, 13), slice(0, 20))


def changing(reading, path):
    """The context manager, at whose end the file has been written to."""

    @contextmanager
    def noticing(*arguments):
        with reading(*arguments):
            yield
            touched(path)

    return noticing


def test_a_chunk_of_zarr_that_disappears(tmp_path):
    """Zarr reads it as zeros."""
    array = random_array(np.float32, (40, 10))
    source = open_source(save_zarr(tmp_path / "x.zarr", array, (10, 10)))
    assert source.warnings() == []
    (tmp_path / "x.zarr" / "c" / "2" / "0").unlink()
    assert np.array_equal(source.read(slice(0, 20), slice(0, 10)), array[:20])
    with pytest.raises(ValueError, match=r"x\.zarr changed while it was read: .*c/2/0 is gone"):
        source.read(slice(15, 25), slice(0, 10))
    (tmp_path / "x.zarr" / "c" / "2" / "0.deadbeef.partial").write_bytes(b"left by a killed writer")
    (tmp_path / "x.zarr" / "c" / "9").mkdir()
    (tmp_path / "x.zarr" / "c" / "9" / "0").write_bytes(b"outside")
    again = open_source(tmp_path / "x.zarr")
    assert again.missing_chunks == 1
    assert again.warnings() == [f"{tmp_path}/x.zarr: 1 chunks are not stored and read as the fill value"]
    assert (again.read(slice(20, 30), slice(0, 10)) == 0).all()


@pytest.mark.parametrize("compressors", ["auto", None])
def test_a_broken_chunk_is_an_error_that_says_where(compressors, tmp_path):
    """Not one of the many kinds that codecs raise."""
    array = random_array(np.float32, (40, 100))
    path = save_zarr(tmp_path / "x.zarr", array, (10, 100), compressors=compressors)
    chunk = path / "c" / "2" / "0"
    write(chunk, chunk.read_bytes()[:-100])
    source = open_source(path)
    assert np.array_equal(source.read(slice(0, 20), slice(0, 100)), array[:20])
    with pytest.raises(ValueError, match=r"x\.zarr cannot be read at rows 15:25: ") as caught:
        source.read(slice(15, 25), slice(0, 100))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_errors_of_the_system_pass_as_they_are(number, tmp_path, monkeypatch):
    """Reading again may help."""
    array, error = random_array(np.float32, (40, 10)), OSError(number, os.strerror(number))
    npy = make("npy", tmp_path, array)
    zarr_, hdf5 = make("zarr", tmp_path, array), make("hdf5_chunks", tmp_path, array)
    parquet = make("parquet", tmp_path, array)
    monkeypatch.setattr(_mapped, "map_bytes", Broken(error))
    monkeypatch.setattr(zarr.Array, "__getitem__", Broken(error))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", Broken(OSError(HDF5_TEXT.replace("5", str(number)))))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", Broken(error))
    for source in (npy, zarr_, hdf5, parquet):
        with pytest.raises(OSError, match=r"\[Errno [0-9]+\] ") as caught:
            source.read(slice(0, 9), slice(0, 10))
        assert caught.value.errno == number
    monkeypatch.setattr(zarr.Array, "__getitem__", Broken(OSError("corrupt block")))  # no number: a codec's
    monkeypatch.setattr(h5py.Dataset, "__getitem__", Broken(OSError("filter returned failure")))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", Broken(OSError("Corrupt snappy data\nat 5")))
    for source in (zarr_, hdf5, parquet):
        with pytest.raises(ValueError, match=r" cannot be read at rows 0:9: (corrupt|filter|Corrupt)[a-z ]+$"):
            source.read(slice(0, 9), slice(0, 10))
    monkeypatch.setattr(zarr.Array, "__getitem__", Broken(MemoryError()))
    with pytest.raises(MemoryError):
        zarr_.read(slice(0, 9), slice(0, 10))


# ---- what can be opened ----


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
    with pytest.raises(ValueError, match=r"two\.npy has 16,256 bytes, expected 8,128: it holds more than one array$"):
        open_source(write(tmp_path / "two.npy", 2 * whole))
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"several\.npz is an archive of arrays; give one \.npy file"):
        open_source(tmp_path / "several.npz")
    for dtype in ("c8", "M8[s]", "U3", "V3", "i4,f4"):
        with pytest.raises(ValueError, match=r"odd\.npy holds .*, expected floats or integers$"):
            open_source(save_npy(tmp_path / "odd.npy", np.zeros(3, dtype)))
    with pytest.raises(ValueError, match=r"whole\.npy holds one array, without a name; give it without ::logits$"):
        open_source(f"{tmp_path}/whole.npy::logits")
    with pytest.raises(FileNotFoundError, match=r"nothing\.npy does not exist"):
        open_source(tmp_path / "nothing.npy")
    with pytest.raises(
        ValueError, match=r"notes\.txt is of none of the formats Zarr, \.npy, safetensors, HDF5, Parquet"
    ):
        open_source(write(tmp_path / "notes.txt", b"hello"))
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match=r"pipe\.npy is of none of the formats"):
        open_source(tmp_path / "pipe.npy")


def test_folders_that_are_no_arrays(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is not a Zarr array, and holds no file of Zarr, \.npy, safetensors"):
        open_source(tmp_path / "folder")
    (tmp_path / "torn.zarr").mkdir()
    with pytest.raises(ValueError, match=r"torn\.zarr is not a Zarr array: there is no zarr\.json in it$"):
        open_source(tmp_path / "torn.zarr")
    save_zarr(tmp_path / "broken.zarr", np.zeros(3))
    write(tmp_path / "broken.zarr" / "zarr.json", b"{")
    with pytest.raises(ValueError, match=r"broken\.zarr is not a whole Zarr array: "):
        open_source(tmp_path / "broken.zarr")


def test_the_format_is_what_a_file_begins_with(tmp_path):
    array = random_array(np.float32, (5, 4))
    for kind, save in (("npy", save_npy), ("h5", save_hdf5), ("parquet", save_parquet)):
        path = save(tmp_path / f"x.{kind}", array).rename(tmp_path / f"{kind}.bin")
        assert np.array_equal(open_source(path).read(slice(0, 5), slice(0, 4)), array)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    array = random_array(np.float32, (5, 4))
    for package, module, kind in (
        ("zarr", "zarr", "zarr"),
        ("h5py", "h5py", "hdf5"),
        ("pyarrow", "pyarrow.parquet", "parquet"),
    ):
        make(kind, tmp_path, array)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=rf"reading .*x\..* needs {package}: pip install 'gpuxent\[{kind}\]'$"):
                open_source(tmp_path / f"x.{SUFFIX.get(kind, kind)}")


def test_members_of_zarr_groups(tmp_path):
    array = random_array(np.float32, (6, 4))
    group = zarr.create_group(str(tmp_path / "g.zarr"))
    group.create_array("logits", shape=(6, 4), dtype="f4", chunks=(2, 4))[...] = array
    path = tmp_path / "g.zarr"
    assert np.array_equal(open_source(path).read(slice(1, 5), slice(0, 4)), array[1:5])  # the only one
    group.create_array("more/labels", shape=(6,), dtype="i8", chunks=(6,))[...] = np.arange(6)
    source = open_source(f"{path}::logits")
    assert source.name == f"{path}::logits"
    assert np.array_equal(source.read(slice(1, 5), slice(0, 4)), array[1:5])
    assert open_source(f"{path}::more/labels").read(slice(2, 4)).tolist() == [2, 3]
    message = r"g\.zarr holds 2 Zarr arrays: logits, more/labels; name one, as in .*g\.zarr::logits$"
    with pytest.raises(ValueError, match=message):
        open_source(path)
    assert members(path) == ["logits", "more/labels"]
    assert members(f"{path}::logits") == []
    with pytest.raises(ValueError, match=r"g\.zarr::nothing is not a Zarr array: there is no zarr\.json in it$"):
        open_source(f"{path}::nothing")
    zarr.create_group(str(tmp_path / "empty.zarr"))
    with pytest.raises(ValueError, match=r"empty\.zarr is not a whole Zarr array: .*group"):
        open_source(tmp_path / "empty.zarr")
    zarr.create_array(str(tmp_path / "old.zarr"), shape=(6, 4), dtype="f4", chunks=(2, 4), zarr_format=2)[...] = array
    old = open_source(tmp_path / "old.zarr")
    assert old.missing_chunks == 0
    assert np.array_equal(old.read(slice(1, 5), slice(0, 4)), array[1:5])


# ---- shards ----


def test_shards_follow_each_other_in_natural_order(tmp_path):
    array = random_array(np.float32, (23, 3, 4))
    edges = [0, 1, 1, 5, 9, *range(10, 24)]
    for at, (start, stop) in enumerate(itertools.pairwise(edges)):
        np.save(tmp_path / f"logits-{at}.npy", array[start:stop])
        np.save(tmp_path / f"labels-{at}.npy", np.arange(start, stop))
    (tmp_path / "notes.txt").write_text("not a shard")
    source = open_source(f"{tmp_path}/logits-*.npy")
    assert (source.name, source.shape) == (f"{tmp_path}/logits-*.npy", (23, 3, 4))
    rows = array.reshape(69, 4)
    for first in range(0, 70, 3):
        for stop in range(first, 70, 5):
            assert np.array_equal(source.read(slice(first, stop), slice(1, 4)), rows[first:stop, 1:4])
    assert np.array_equal(source.read(slice(7, 200)), array.ravel()[7:200])
    assert open_source(f"{tmp_path}/labels-*.npy").read(slice(3, 21)).tolist() == list(range(3, 21))
    assert source.read(slice(27, 30), slice(0, 4)).base is not None  # of one shard: no copy
    assert [Path(stamp.path).name for stamp in source.files()] == [f"logits-{at}.npy" for at in range(len(edges) - 1)]
    with pytest.raises(ValueError, match=r"labels-0\.npy has shape \(1,\) and .*logits-0\.npy \(1, 3, 4\)"):
        open_source(tmp_path)


def test_only_the_shards_that_hold_the_rows_are_read(tmp_path):
    save_shards(tmp_path / "x", np.arange(40).reshape(20, 2))
    source = open_source(tmp_path / "x")
    for at in (0, 1, 4, 5, 6, 7, 8, 9):
        (tmp_path / "x" / f"{at}.npy").unlink()
    assert source.read(slice(4, 8), slice(0, 2)).tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    with pytest.raises(FileNotFoundError):
        source.read(slice(4, 9), slice(0, 2))


def test_shards_of_folders_and_of_members(tmp_path):
    array = random_array(np.float32, (6, 4))
    (tmp_path / "t").mkdir()
    for at in range(3):
        save_zarr(tmp_path / f"part-{at}.zarr", array[2 * at : 2 * at + 2], (1, 4))
        part = array[2 * at : 2 * at + 2]
        save_file({"logits": part, "others": -part}, tmp_path / "t" / f"model-{at:05}-of-00003.safetensors")
    (tmp_path / "t" / "model.index.json").write_text("{}")
    for path in (f"{tmp_path}/part-*.zarr", f"{tmp_path}/t::logits", f"{tmp_path}/t/*.safetensors::logits"):
        source = open_source(path)
        assert source.warnings() == []
        assert np.array_equal(source.read(slice(1, 5), slice(0, 4)), array[1:5])
    assert members(tmp_path / "t") == ["logits", "others"]
    (tmp_path / "t" / "model-00001-of-00003.safetensors").unlink()
    with_hole = open_source(f"{tmp_path}/t::logits")
    name = f"{tmp_path}/t/model-00000-of-00003.safetensors::logits"
    assert with_hole.warnings() == [f"{tmp_path}/t is 2 files, but {name} says 3"]


def test_shards_that_do_not_fit_together(tmp_path):
    np.save(tmp_path / "a-1.npy", np.zeros((2, 4), np.float32))
    np.save(tmp_path / "a-2.npy", np.zeros((2, 5), np.float32))
    message = r"a-1\.npy has shape \(2, 4\) and .*a-2\.npy \(2, 5\); shards may differ in the first axis only"
    with pytest.raises(ValueError, match=message):
        open_source(f"{tmp_path}/a-*.npy")
    np.save(tmp_path / "b-1.npy", np.zeros((2, 4), np.float32))
    np.save(tmp_path / "b-2.npy", np.zeros((2, 4), np.float16))
    with pytest.raises(ValueError, match=r"b-1\.npy holds float32 and .*b-2\.npy float16"):
        open_source(f"{tmp_path}/b-*.npy")
    np.save(tmp_path / "c-1.npy", np.zeros((2, 4), np.float32))
    save_hdf5(tmp_path / "c-2.h5", np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"c-1\.npy is \.npy, and .*c-2\.h5 HDF5"):
        open_source(f"{tmp_path}/c-*")
    np.save(tmp_path / "d-1.npy", np.zeros((2, 4), np.float32))
    (tmp_path / "d-2.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"d-1\.npy is \.npy, and .*d-2\.txt is not"):
        open_source(f"{tmp_path}/d-*")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*e-\*\.npy"):
        open_source(f"{tmp_path}/e-*.npy")
    save_npy(tmp_path / "f[1].npy", np.arange(3))  # the name of a file, not a pattern
    assert open_source(tmp_path / "f[1].npy").read(slice(0, 3)).tolist() == [0, 1, 2]


def test_many_warnings_of_shards_are_few(tmp_path):
    for at in range(9):
        zarr.create_array(str(tmp_path / f"{at}.zarr"), shape=(2, 4), dtype="f4", chunks=(1, 4))
    source = open_source(tmp_path)
    assert source.missing_chunks == 18
    assert [warning.rpartition("/")[2] for warning in source.warnings()[:3]] == [
        f"{at}.zarr: 2 chunks are not stored and read as the fill value" for at in range(3)
    ]
    assert source.warnings()[3:] == [f"{tmp_path}: 6 more warnings like these"]


def test_a_file_whose_name_has_colons(tmp_path):
    save_npy(tmp_path / "a::b.npy", np.arange(3))
    assert open_source(tmp_path / "a::b.npy").read(slice(0, 3)).tolist() == [0, 1, 2]
    save_hdf5(tmp_path / "a::b.h5", np.arange(3), name="x")
    assert open_source(f"{tmp_path}/a::b.h5::x").read(slice(0, 3)).tolist() == [0, 1, 2]
