"""Zarr arrays whose chunks hold the numbers as they are, which are read without Zarr: the same numbers, all damage
noticed."""

import itertools
import json
import math

import ml_dtypes
import numpy as np
import pytest
import zarr
from test_sources import Broken, random_array, save_zarr, write
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from gpuxent.evaluation.sources import _mapped, open_source

# shape, chunks, shards
CUTS = [
    ((20, 6), (4, 6), None),
    ((20, 6), (7, 6), None),
    ((20, 6), (1, 6), None),
    ((21, 6), (2, 6), (8, 6)),
    ((21, 6), (30, 6), None),
    ((5, 4, 6), (2, 4, 6), None),
    ((5, 4, 6), (1, 3, 6), None),
    ((5, 4, 6), (1, 1, 6), None),
    ((5, 4, 6), (1, 2, 6), (1, 4, 6)),
    ((5, 4, 6), (1, 4, 6), (3, 4, 6)),
    ((30,), (7,), None),
    ((30,), (7,), (14,)),
]
CHECKSUMS = pytest.mark.parametrize("compressors", [None, [Crc32cCodec()]], ids=["plain", "checksums"])


@CHECKSUMS
@pytest.mark.parametrize(("shape", "chunks", "shards"), CUTS)
def test_plain_chunks_hold_the_same_numbers(shape, chunks, shards, compressors, tmp_path, monkeypatch):
    array = random_array(np.float32, shape)
    source = open_source(save_zarr(tmp_path / "x.zarr", array, chunks, shards=shards, compressors=compressors))
    if len(shape) > 1 or compressors is None:
        monkeypatch.setattr(zarr.Array, "__getitem__", Broken(AssertionError("read by Zarr")))
    total, width = math.prod(shape[:-1]), shape[-1]
    for first, stop in itertools.combinations(range(0, total + 1), 2) if len(shape) > 1 else []:
        block = source.read(slice(first, stop), slice(0, width))
        assert np.array_equal(block, array.reshape(total, width)[first:stop])
    assert np.array_equal(source.read(slice(0, total), slice(1, 2)), array.reshape(total, width)[:, 1:2])
    for first, stop in [(0, 1), (3, 17), (5, 30), (0, array.size)]:
        assert np.array_equal(source.read(slice(first, stop)), array.ravel()[first:stop])


@CHECKSUMS
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, np.int8, np.int64, bool])
def test_plain_chunks_of_every_dtype(dtype, compressors, tmp_path, monkeypatch):
    array = random_array(dtype, (12, 5))
    source = open_source(save_zarr(tmp_path / "x.zarr", array, (2, 5), shards=(6, 5), compressors=compressors))
    assert source.dtype == array.dtype
    monkeypatch.setattr(zarr.Array, "__getitem__", Broken(AssertionError("read by Zarr")))
    for first, stop in ((3, 11), (2, 4)):  # the second chunk of a shard follows a checksum of 4 bytes
        block = source.read(slice(first, stop), slice(0, 5))
        assert block.tobytes() == array[first:stop].tobytes()
        assert block.flags.aligned


def test_a_chunk_of_labels_is_checked_once(tmp_path, monkeypatch):
    path = save_zarr(tmp_path / "y.zarr", np.arange(1000), (400,), compressors=[Crc32cCodec()])
    source, read, getitem = open_source(path), [], zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, place: read.append(place) or getitem(self, place))
    got = [source.read(slice(first, first + 50)).tolist() for first in range(0, 1000, 50)]
    assert got == [list(range(first, first + 50)) for first in range(0, 1000, 50)]
    assert read == [(slice(0, 400),), (slice(400, 800),), (slice(800, 1000),)]


@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        ((4, 5), {}),  # zstd
        ((4, 3), {"compressors": None}),  # columns are cut
        ((4, 5), {"compressors": None, "serializer": BytesCodec(endian="big")}),
        ((4, 5), {"compressors": None, "filters": [zarr.codecs.TransposeCodec(order=(1, 0))]}),
        ((4, 5), {"compressors": None, "zarr_format": 2}),
        ((2, 5), {"compressors": None, "shards": (4, 10)}),
    ],
)
def test_other_chunks_are_left_to_zarr(chunks, options, tmp_path):
    array = random_array(np.float32, (12, 5))
    source = open_source(save_zarr(tmp_path / "x.zarr", array, chunks, **options))
    assert source.plain is None
    assert np.array_equal(source.read(slice(3, 11), slice(0, 5)), array[3:11])


def test_an_index_at_the_start_of_the_shard(tmp_path, monkeypatch):
    array = random_array(np.float32, (12, 5))
    codec = ShardingCodec(chunk_shape=(2, 5), codecs=[BytesCodec()], index_location="start")
    made = zarr.create(store=str(tmp_path / "x.zarr"), shape=(12, 5), chunks=(6, 5), dtype="f4", codecs=[codec])
    made[...] = array
    source = open_source(tmp_path / "x.zarr")
    monkeypatch.setattr(zarr.Array, "__getitem__", Broken(AssertionError("read by Zarr")))
    assert np.array_equal(source.read(slice(3, 11), slice(0, 5)), array[3:11])


def test_one_chunk_is_mapped_and_adjacent_ones_are_mapped_together(tmp_path, monkeypatch):
    array = random_array(np.float32, (64, 1024))
    source = open_source(save_zarr(tmp_path / "x.zarr", array, (4, 1024), shards=(32, 1024), compressors=None))
    mapped, whole = [], _mapped.map_bytes
    monkeypatch.setattr("gpuxent.evaluation.sources._zarr_plain.map_bytes", lambda *a: mapped.append(a[2]) or whole(*a))
    block = source.read(slice(6, 30), slice(0, 1024))
    assert mapped == [24 * 4096]
    assert not block.flags.owndata
    assert not block.flags.writeable  # the file's pages
    source.read(slice(30, 40), slice(0, 1024))
    assert mapped[1:] == [2 * 4096, 8 * 4096]


@CHECKSUMS
def test_chunks_that_are_missing_are_left_to_zarr(compressors, tmp_path):
    for shards in (None, (8, 5)):
        path = tmp_path / f"{shards}.zarr"
        made = zarr.create_array(
            str(path), shape=(20, 5), dtype="f4", chunks=(4, 5), shards=shards, compressors=compressors, fill_value=9
        )
        made[4:8] = 1
        source = open_source(path)
        assert source.missing_chunks == (4 if shards is None else 2)
        assert source.read(slice(3, 10), slice(0, 5))[:, 0].tolist() == [9, 1, 1, 1, 1, 9, 9]
        assert source.read(slice(4, 8), slice(0, 5))[:, 0].tolist() == [1, 1, 1, 1]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("shards", [None, (8, 50)])
def test_damage_is_noticed(shards, tmp_path):
    array = random_array(np.float32, (40, 50))
    path = save_zarr(tmp_path / "x.zarr", array, (4, 50), shards=shards, compressors=[Crc32cCodec()])
    chunk = path / "c" / "2" / "0"
    data = chunk.read_bytes()
    rows = slice(10, 12) if shards is None else slice(18, 20)  # of the first chunk in that file
    cases = [(flipped(data, 3), "c/2/0 has a wrong checksum"), (flipped(data, 799), "c/2/0 has a wrong checksum")]
    if shards is None:
        cases += [(data[:-9], "c/2/0 has a chunk of 795 bytes, expected 804"), (b"", "has a chunk of 0 bytes")]
        cases += [(data + b"\0", "c/2/0 has a chunk of 805 bytes, expected 804")]
    else:
        cases += [(flipped(data, len(data) - 1), "the index of .*c/2/0 has a wrong checksum")]
        cases += [(flipped(data, len(data) - 9), "the index of .*c/2/0 has a wrong checksum")]
        cases += [(data[:-9], "the index of .*c/2/0 has a wrong checksum"), (b"", "c/2/0 has 0 bytes, too few for its")]
    for damaged, text in cases:
        write(chunk, damaged)
        source = open_source(path)
        assert np.array_equal(source.read(slice(0, 4), slice(0, 50)), array[:4])
        with pytest.raises(ValueError, match=rf"x\.zarr cannot be read at rows {rows.start}:{rows.stop}: .*{text}"):
            source.read(rows, slice(0, 50))


def test_a_shard_whose_index_points_outside(tmp_path):
    import google_crc32c

    array = random_array(np.float32, (8, 50))
    path = save_zarr(tmp_path / "x.zarr", array, (4, 50), shards=(8, 50), compressors=None)
    chunk = path / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    for place, size, found in ((800, 799, 799), (900, 800, 736), (5000, 800, 0)):
        index = b"".join(number.to_bytes(8, "little") for number in (0, 800, place, size))
        data[1600:] = index + google_crc32c.value(index).to_bytes(4, "little")
        write(chunk, bytes(data))
        source = open_source(path)
        assert np.array_equal(source.read(slice(0, 4), slice(0, 50)), array[:4])
        with pytest.raises(ValueError, match=rf"c/0/0 has a chunk of {found} bytes, expected 800$"):
            source.read(slice(4, 8), slice(0, 50))


def test_chunks_of_a_shard_in_any_order(tmp_path):
    import google_crc32c

    array = random_array(np.float32, (12, 50))
    path = save_zarr(tmp_path / "x.zarr", array, (4, 50), shards=(12, 50), compressors=None)
    chunk = path / "c" / "0" / "0"
    data = chunk.read_bytes()
    index = b"".join(number.to_bytes(8, "little") for number in (1600, 800, 0, 800, 800, 800))
    moved = data[800:2400] + data[:800] + index
    write(chunk, moved + google_crc32c.value(index).to_bytes(4, "little"))
    assert np.array_equal(zarr.open_array(str(path))[...], array)
    assert np.array_equal(open_source(path).read(slice(1, 12), slice(0, 50)), array[1:])


def test_plain_chunks_that_change(tmp_path):
    """Before the read, and after it, when the block is memory of the file."""
    array = random_array(np.float32, (40, 50))
    path = save_zarr(tmp_path / "x.zarr", array, (4, 50), compressors=None)
    source = open_source(path)
    rows, columns = slice(8, 12), slice(0, 50)
    source.read(rows, columns)
    source.check(rows, columns)
    chunk = path / "c" / "2" / "0"
    write(chunk, chunk.read_bytes())
    for ask in (source.check, source.read):
        with pytest.raises(ValueError, match=r"changed while it was read: .*c/2/0 was written since it was opened$"):
            ask(rows, columns)
    source.check(slice(0, 8), columns)
    chunk.unlink()
    with pytest.raises(ValueError, match=r"changed while it was read: .*c/2/0 is gone$"):
        source.read(rows, columns)


def test_metadata_is_read_with_care(tmp_path):
    array = random_array(np.float32, (4, 5))
    path = save_zarr(tmp_path / "x.zarr", array, (4, 5), compressors=None)
    metadata = json.loads((path / "zarr.json").read_text())
    assert open_source(path).plain is not None
    metadata["shape"] = [4]
    write(path / "zarr.json", json.dumps(metadata).encode())
    with pytest.raises(ValueError, match=r"x\.zarr is not a whole Zarr array: "):
        open_source(path)
