"""What is special to each format of files: layouts, marks, and what is wrong with them."""

import json
import math
import struct

import h5py
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from test_sources import random_array, save_hdf5, save_parquet, save_safetensors, write

from gpuxent.evaluation.sources import members, open_source
from gpuxent.evaluation.sources import parquet as parquet_source
from gpuxent.evaluation.sources._mapped import MappedSource

# ---- .kld ----


def log_softmax(logits):
    top = max(logits)
    total = math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - top - total for x in logits]


def kld_record(logits, token):
    """What llama.cpp writes for a row, in plain Python: bytes, and the log-probabilities that it stands for; -inf of
    what was cut off, but for the token."""
    exact = log_softmax(logits)
    lowest = max(min(exact), max(exact) - 16)
    step, lowest = struct.unpack("<2f", struct.pack("<2f", (max(exact) - lowest) / 65535, lowest))
    codes = [round((x - lowest) / step) if x > lowest and step else 0 for x in exact]
    padding = [0xABCD] * (len(codes) % 2)
    record = struct.pack(f"<2f{len(codes + padding)}H", step, lowest, *codes, *padding)
    cut = max(exact) - min(exact) > 16
    return record, [-math.inf if cut and c == 0 and i != token else lowest + step * c for i, c in enumerate(codes)]


def kld_file(path, context, vocab, contexts, extra=b""):
    """(path, tokens of each context, log-probabilities of the scored rows)."""
    generator = np.random.default_rng(context)
    tokens = generator.integers(0, vocab, (contexts, context)).tolist()
    rows = contexts * (context - 1 - context // 2)
    logits = generator.normal(0, 6, (rows, vocab)).astype(np.float32)
    logits[0] = 3  # every class alike: a step of 0
    labels = [line[at + 1] for line in tokens for at in range(context // 2, context - 1)]
    records, values = zip(*map(kld_record, logits.tolist(), labels), strict=True)
    head = b"_logits_" + struct.pack("<3i", context, vocab, contexts)
    flat = [token for line in tokens for token in line]
    write(path, head + struct.pack(f"<{len(flat)}i", *flat) + b"".join(records) + extra)
    return path, tokens, np.array(values), logits


@pytest.mark.parametrize(("context", "vocab", "contexts"), [(8, 6, 3), (9, 7, 3), (3, 1, 5), (512, 33, 2)])
def test_a_kld_file(context, vocab, contexts, tmp_path):
    path, tokens, values, logits = kld_file(tmp_path / "x.kld", context, vocab, contexts)
    source = open_source(path)
    assert (source.shape, source.dtype) == (values.shape, np.float32)
    whole = source.read(slice(0, len(values)), slice(0, vocab))
    assert np.array_equal(whole == -np.inf, values == -np.inf)
    assert vocab < 6 or (values == -np.inf).any()
    finite = values > -np.inf
    assert np.abs(whole[finite] - values[finite]).max() <= 2 * np.finfo(np.float32).eps * 32
    near = np.array([log_softmax(row) for row in logits.tolist()])
    kept = near > near.max(1, keepdims=True) - 16
    assert finite[kept].all()
    assert np.abs(whole[kept] - near[kept]).max() <= 16 / 65535 / 2 + 2e-5
    part = source.read(slice(1, len(values) - 1), slice(vocab // 2, vocab))
    assert np.array_equal(part, whole[1:-1, vocab // 2 :])
    assert np.array_equal(source.read(slice(vocab + 1, 3 * vocab)), whole.ravel()[vocab + 1 : 3 * vocab])
    labels = open_source(f"{path}::labels")
    numbers = open_source(f"{path}::contexts")
    expected = [line[at + 1] for line in tokens for at in range(context // 2, context - 1)]
    scored = context - 1 - context // 2
    assert (labels.shape, labels.dtype) == ((len(values),), np.int32)
    for first in range(0, len(expected) + 1, max(1, scored // 2)):
        for stop in range(first, len(expected) + 1, max(1, scored // 3)):
            assert labels.read(slice(first, stop)).tolist() == expected[first:stop]
            assert numbers.read(slice(first, stop)).tolist() == [row // scored for row in range(first, stop)]
    assert open_source(f"{path}::logits").shape == source.shape
    windows = open_source(f"{path}::tokens")
    assert (windows.shape, windows.dtype) == ((contexts, context), np.int32)
    flat = [token for line in tokens for token in line]
    for first, stop in ((0, len(flat)), (1, len(flat) - 1), (2, 2)):
        assert windows.read(slice(first, stop)).tolist() == flat[first:stop]
    assert members(path) == []
    assert "16 nats" in source.warnings()[0]
    assert labels.warnings() == []


def test_a_kld_file_that_is_not_whole(tmp_path):
    path, *_ = kld_file(tmp_path / "x.kld", 9, 7, 3)
    data = path.read_bytes()
    size = 20 + 4 * 27 + 12 * 2 * (4 + 8)
    assert len(data) == size
    sizes = "for 3 contexts of 9 tokens and 7 classes"
    for cut in (data[:-1], data[: size // 2], data[:20], data + b"\0"):
        with pytest.raises(ValueError, match=rf"cut\.kld has {len(cut):,} bytes, expected {size:,} {sizes}$"):
            open_source(write(tmp_path / "cut.kld", cut))
    for other in (b"", data[:19], b"_logitz_" + data[8:]):
        with pytest.raises(ValueError, match=r"cut\.kld is not a \.kld file: it should begin with _logits_ and three"):
            open_source(write(tmp_path / "cut.kld", other))
    for head in ((2, 7, 3), (9, 0, 3), (9, 7, -3), (-9, 7, 3)):
        with pytest.raises(ValueError, match=r"cut\.kld is not a \.kld file: its header says "):
            open_source(write(tmp_path / "cut.kld", b"_logits_" + struct.pack("<3i", *head) + data[20:]))
    with pytest.raises(ValueError, match=r"x\.kld has no 'text'; it has logits, labels, contexts, tokens$"):
        open_source(f"{path}::text")
    with pytest.raises(ValueError, match=r"x\.kld::labels has no columns$"):
        open_source(f"{path}::labels").read(slice(0, 3), slice(0, 1))


def test_contexts_of_several_kld_files_are_not_one(tmp_path):
    for name in ("a.kld", "b.kld"):
        kld_file(tmp_path / name, 8, 6, 3)
    assert open_source(f"{tmp_path}::labels").shape == (2 * 3 * 3,)
    with pytest.raises(ValueError, match=r"::contexts would number the contexts of 2 files from 0 each$"):
        open_source(f"{tmp_path}::contexts")


def test_sizes_of_a_kld_file_do_not_wrap(tmp_path):
    """16k tokens of 131k classes are more than 32 bits: of a file of holes, the last row is where it should be."""
    context, vocab, contexts = 16384, 131072, 3
    scored, record = context - 1 - context // 2, 2 * (4 + vocab)
    size = 20 + 4 * contexts * context + contexts * scored * record
    path = tmp_path / "huge.kld"
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", context, vocab, contexts))
        file.seek(size - record)
        file.write(struct.pack("<2f", 0.5, -9))
        file.truncate(size)
    source = open_source(path)
    assert source.shape == (contexts * scored, vocab)
    block = source.read(slice(contexts * scored - 2, contexts * scored), slice(0, vocab))
    assert block.min(1).tolist() == block.max(1).tolist() == [0, -9]


# ---- safetensors ----


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_members_of_safetensors(tmp_path):
    tensors = {"a.weight": random_array(np.float32, (4, 5)), "b": np.arange(7, dtype=np.int64), "c": np.ones(3, bool)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    for name, array in tensors.items():
        source = open_source(f"{tmp_path}/x.safetensors::{name}")
        assert (source.name, source.shape) == (f"{tmp_path}/x.safetensors::{name}", array.shape)
        assert source.read(slice(0, array.size)).tolist() == array.ravel().tolist()
    assert sorted(members(tmp_path / "x.safetensors")) == ["a.weight", "b", "c"]
    with pytest.raises(ValueError, match=r"x\.safetensors holds 3 tensors: .*; name one, as in .*x\.safetensors::"):
        open_source(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors has no tensor 'd'; it has "):
        open_source(f"{tmp_path}/x.safetensors::d")


def test_safetensors_at_any_place(tmp_path):
    """The header may end anywhere, and nothing but its length says where numbers begin."""
    for spaces in range(8):
        header = json.dumps({"x": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode() + b" " * spaces
        path = write(tmp_path / "x.safetensors", safetensors_bytes(header, struct.pack("<2d", 1.5, -2)))
        block = open_source(path).read(slice(0, 2))
        assert block.tolist() == [1.5, -2]
        assert block.flags.aligned


def test_safetensors_that_are_not_whole(tmp_path):
    good = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    whole, path = safetensors_bytes(good, bytes(24)), tmp_path / "x.safetensors"
    assert open_source(write(path, whole)).shape == (2, 3)
    length = len(whole) - 32
    cases = {
        rf"it should have {len(whole)} bytes, found {len(whole) - 1}$": whole[:-1],
        rf"it should have {len(whole)} bytes, found {len(whole) + 1}$": whole + b"\0",
        rf"its header should have {length} bytes, found {length - 10}$": whole[: 8 + length - 10],
        r"its header should have [0-9,]+ bytes, found 0$": struct.pack("<Q", 2**63),
        r".": b"\x10\0\0",
        r"Expecting": safetensors_bytes(b"{'x'}", bytes(24)),
        r"does not fit its shape \[2, 4\]$": safetensors_bytes({"x": good["x"] | {"shape": [2, 4]}}, bytes(24)),
        r"the place of 'x', bytes 4 to 28": safetensors_bytes({"x": good["x"] | {"data_offsets": [4, 28]}}, bytes(28)),
        r"does not fit its shape \[-2, -3\]$": safetensors_bytes({"x": good["x"] | {"shape": [-2, -3]}}, bytes(24)),
        r"its header says of 'x' what is no tensor$": safetensors_bytes(
            {"x": {"shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24)
        ),
        r"its header is no table of tensors$": safetensors_bytes([1, 2], bytes(24)),
    }
    for text, data in cases.items():
        with pytest.raises(ValueError, match=rf"x\.safetensors is not a whole safetensors file: .*{text}"):
            open_source(write(path, data))
    other = safetensors_bytes({"x": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]}}, bytes(6))
    with pytest.raises(ValueError, match=r"x\.safetensors::x holds F8_E4M3, expected floats of 16 bits or more"):
        open_source(write(path, other))
    with pytest.raises(ValueError, match=r"x\.safetensors holds 0 tensors$"):
        open_source(write(path, safetensors_bytes({})))


# ---- HDF5 ----


def test_members_of_hdf5(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["run/labels"] = np.arange(6)
        file["run/logits"] = random_array(np.float32, (6, 4))
    assert open_source(f"{path}::run/labels").read(slice(1, 4)).tolist() == [1, 2, 3]
    assert open_source(f"{path}::/run/logits").shape == (6, 4)
    assert members(path) == ["run/labels", "run/logits"]
    with pytest.raises(ValueError, match=r"x\.h5 holds 2 datasets: run/labels, run/logits; name one, as in"):
        open_source(path)
    with pytest.raises(ValueError, match=r"x\.h5 has no dataset 'run'; it has run/labels, run/logits$"):
        open_source(f"{path}::run")


def test_a_dataset_in_one_piece_is_mapped(tmp_path):
    """As fast as a .npy file, and without HDF5's lock."""
    array = random_array(np.float32, (6, 4))
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=1024) as file:
        file["x"] = array
    source = open_source(tmp_path / "x.h5")
    assert isinstance(source, MappedSource)
    assert np.array_equal(source.read(slice(1, 5), slice(0, 4)), array[1:5])
    with h5py.File(tmp_path / "y.h5", "w") as file:  # a number that is not NumPy's: 16 of 32 bits count
        kind = h5py.h5t.NATIVE_INT32.copy()
        kind.set_precision(16)
        kind.set_offset(8)
        made = h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((3,)))
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([1, 2, 300], np.int32))
    source = open_source(tmp_path / "y.h5")
    assert not isinstance(source, MappedSource)
    assert source.read(slice(0, 3)).tolist() == [1, 2, 300]


def test_parts_of_hdf5_that_were_never_written(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        chunked = file.create_dataset("chunked", (10, 4), "f4", chunks=(2, 4))
        chunked[2:5] = 1
        file.create_dataset("whole", (10, 4), "f4", fillvalue=7)
        file.create_dataset("compact", data=np.zeros((10, 4), "f4"))
    warning = "chunks are not stored and read as the fill value"
    source = open_source(f"{tmp_path}/x.h5::chunked")
    assert source.warnings() == [f"{source.name}: 3 {warning}"]
    assert source.read(slice(0, 10), slice(0, 4)).sum() == 12
    source = open_source(f"{tmp_path}/x.h5::whole")
    assert source.warnings() == [f"{source.name}: 1 {warning}"]
    assert (source.read(slice(3, 5), slice(0, 4)) == 7).all()
    assert source.row_chunk == 1
    assert open_source(f"{tmp_path}/x.h5::compact").warnings() == []


def test_hdf5_that_is_not_read(tmp_path):
    whole = save_hdf5(tmp_path / "x.h5", random_array(np.float32, (40, 50)), chunks=(10, 50), fletcher32=True)
    data = whole.read_bytes()
    for cut in (data[: len(data) // 2], data[:20]):
        with pytest.raises(ValueError, match=r"cut\.h5 is not a whole HDF5 file: "):
            open_source(write(tmp_path / "cut.h5", cut))
    with pytest.raises(ValueError, match=r"empty\.h5 is not a whole HDF5 file: "):
        open_source(write(tmp_path / "empty.h5", b""))
    with h5py.File(whole) as file:
        place = file["x"].id.get_chunk_info(2).byte_offset
    source = open_source(write(tmp_path / "bad.h5", data[:place] + b"\xff" * 40 + data[place + 40 :]))
    source.read(slice(0, 20), slice(0, 50))
    with pytest.raises(ValueError, match=r"bad\.h5 cannot be read at rows 15:25: .*filter returned failure"):
        source.read(slice(15, 25), slice(0, 50))
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["text"] = "hello"
        file["nothing"] = h5py.Empty("f4")
        file.create_dataset("outside", (4,), "f4", external=[("raw.bin", 0, 16)])
        layout = h5py.VirtualLayout((40, 50), "f4")
        layout[:] = h5py.VirtualSource("x.h5", "x", (40, 50))
        file.create_virtual_dataset("view", layout)
    with pytest.raises(ValueError, match=r"odd\.h5::text holds object, expected floats or integers$"):
        open_source(f"{tmp_path}/odd.h5::text")
    with pytest.raises(ValueError, match=r"odd\.h5::nothing is an empty dataset, without a shape$"):
        open_source(f"{tmp_path}/odd.h5::nothing")
    for name in ("outside", "view"):
        with pytest.raises(ValueError, match=rf"odd\.h5::{name} is a view of other files, whose changes"):
            open_source(f"{tmp_path}/odd.h5::{name}")


# ---- Parquet ----


def parquet(path, columns, rows=3, **options):
    pq.write_table(pa.table(columns), path, row_group_size=rows, **options)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 4)])
def test_lists_of_one_length(kind, tmp_path):
    array = random_array(np.float32, (11, 4))
    path = parquet(tmp_path / "x.parquet", {"logits": pa.array(array.tolist(), kind), "labels": np.arange(11)})
    source = open_source(f"{path}::logits")
    assert (source.shape, source.dtype, source.row_chunk) == ((11, 4), np.float32, 3)
    for first in range(12):
        for stop in range(first, 12):
            assert np.array_equal(source.read(slice(first, stop), slice(1, 4)), array[first:stop, 1:4])
    assert np.array_equal(source.read(slice(3, 33)), array.ravel()[3:33])
    labels = open_source(f"{path}::labels")
    assert (labels.shape, labels.dtype) == ((11,), np.int64)
    assert labels.read(slice(2, 10)).tolist() == list(range(2, 10))
    assert members(path) == ["logits", "labels"]
    with pytest.raises(ValueError, match=r"x\.parquet holds 2 columns: logits, labels; name one, as in"):
        open_source(path)
    with pytest.raises(ValueError, match=r"x\.parquet has no column 'mask'; it has logits, labels$"):
        open_source(f"{path}::mask")


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[1.0, 2], [3, 4], [5, 6], [7, 8], [9]], "row 4 has 1 values, expected 2"),
        ([[1.0, 2], [3, 4], [5, 6], [7, 8, 9], [1, 2]], "row 3 has 3 values, expected 2"),
        ([[1.0, 2], [3, 4], [5, 6], [7, 8], None], "row 4 is null"),
        ([[1.0, 2], [3, 4], [5, 6], [7, 8], [1, None]], "a value of row 4 is null"),
        ([1, 2, 3, 4, None], "row 4 is null"),
    ],
)
def test_lists_of_many_lengths_and_nulls(rows, text, tmp_path):
    source = open_source(parquet(tmp_path / "x.parquet", {"x": pa.array(rows)}))
    columns = None if len(source.shape) == 1 else slice(0, 2)
    assert source.read(slice(0, 3), columns).size in (3, 6)
    with pytest.raises(ValueError, match=rf"x\.parquet cannot be read at rows 1:5: {text}$"):
        source.read(slice(1, 5), columns)


def test_a_row_group_larger_than_memory_is_decoded_in_pieces(tmp_path, monkeypatch):
    array, decoded = random_array(np.float64, (20, 3)), []
    source = open_source(save_parquet(tmp_path / "x.parquet", array, rows=12))
    numbers = parquet_source._numbers

    def counted(chunk, *place):
        decoded.append(len(chunk))
        return numbers(chunk, *place)

    monkeypatch.setattr(parquet_source, "_numbers", counted)
    monkeypatch.setattr(parquet_source, "BATCH_BYTES", 5 * 3 * 8)
    for first in range(20):
        for stop in range(first + 1, 21):
            assert np.array_equal(source.read(slice(first, stop), slice(1, 3)), array[first:stop, 1:])
    assert max(decoded) == 5


def test_parquet_that_is_not_read(tmp_path):
    data = save_parquet(tmp_path / "x.parquet", random_array(np.float64, (90, 10)), rows=30).read_bytes()
    for cut in (data[:-8], data[: len(data) // 2], b""):
        with pytest.raises(ValueError, match=r"cut\.parquet is not a whole Parquet file: "):
            open_source(write(tmp_path / "cut.parquet", cut))
    for name, column, found in (
        ("text", pa.array(["a", "b"]), "string"),
        ("time", pa.array([1, 2], pa.timestamp("ms")), r"timestamp\[ms\]"),
        ("nested", pa.array([[[1.0]], [[2.0]]]), "list<"),
        ("words", pa.array(["a", "b"]).dictionary_encode(), "dictionary<"),
        ("lists", pa.array([["a"], ["b"]]), "string"),
    ):
        parquet(tmp_path / "odd.parquet", {name: column})
        with pytest.raises(ValueError, match=rf"odd\.parquet::{name} holds {found}.*, expected floats or integers"):
            open_source(f"{tmp_path}/odd.parquet::{name}")
    for rows in ([], [None, [1.0]]):
        parquet(tmp_path / "none.parquet", {"x": pa.array(rows, pa.list_(pa.float32()))})
        with pytest.raises(ValueError, match=r"none\.parquet does not begin with a list, so that nobody"):
            open_source(tmp_path / "none.parquet")


def test_a_page_of_parquet_that_was_altered(tmp_path):
    array = random_array(np.float64, (90, 10))
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    path = parquet(tmp_path / "x.parquet", {"x": pa.FixedSizeListArray.from_arrays(array.ravel(), 10)}, 30, **options)
    data = path.read_bytes()
    place = data.index(array[40].tobytes())
    source = open_source(write(tmp_path / "bad.parquet", data[:place] + b"\x01" + data[place + 1 :]))
    assert np.array_equal(source.read(slice(0, 30), slice(0, 10)), array[:30])
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read at rows 35:36: .*CRC"):
        source.read(slice(35, 36), slice(0, 10))


# ---- bfloat16, which few formats have ----


def test_bfloat16_is_marked_in_every_format(tmp_path):
    """uint16 without the mark are numbers."""
    array = random_array(ml_dtypes.bfloat16, (6, 4)).view(np.uint16)
    for path in (
        save_hdf5(tmp_path / "x.h5", array),
        save_parquet(tmp_path / "x.parquet", array),
        save_safetensors(tmp_path / "x.safetensors", array),
    ):
        source = open_source(path)
        assert source.dtype == np.uint16
        assert source.read(slice(1, 3), slice(0, 4)).tolist() == array[1:3].tolist()
