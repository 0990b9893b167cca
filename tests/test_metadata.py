"""Tables about documents: the forms, and what is said of bad ones before a run starts."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gpuxent.evaluation.statistics.metadata import open_metadata

ROWS = [(3, 30, "de", 7), (-1, 0, "", 8), (2**62, 12, "en, or so", 9)]
NAMES = ("document", "n", "of", "w")


def write_csv(path, names=NAMES, rows=ROWS):
    quoted = [",".join(f'"{value}"' if isinstance(value, str) else str(value) for value in row) for row in rows]
    path.write_text("\n".join([",".join(names), *quoted]) + "\n\n", encoding="utf-8-sig")
    return path


def write_jsonl(path, names=NAMES, rows=ROWS):
    path.write_text("\n\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    return path


def write_parquet(path, names=NAMES, rows=ROWS):
    columns = [list(column) for column in zip(*rows, strict=True)]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path)
    return path


def as_dict(names=NAMES, rows=ROWS):
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def columns(made):
    texts = [made.groups[place] for place in made.group.tolist()]
    return made.documents.tolist(), made.bytes.tolist(), made.words, texts


def test_all_forms_say_the_same(tmp_path):
    for source in (
        write_csv(tmp_path / "a.csv"),
        str(write_csv(tmp_path / "b.CSV")),
        write_jsonl(tmp_path / "a.jsonl"),
        write_jsonl(tmp_path / "a.ndjson"),
        write_parquet(tmp_path / "a.parquet"),
        as_dict(),
        {name: np.array(values) for name, values in as_dict().items()},
    ):
        made = open_metadata(source, bytes="n", words="1000", group_by="of")
        assert columns(made) == ([-1, 3, 2**62], [0, 30, 12], 1000, ["", "de", "en, or so"])
        assert made.groups == ("", "de", "en, or so")
        assert made.needs_documents
        assert columns(pickle.loads(pickle.dumps(made))) == columns(made)
        some = made.of(np.array([3, 2**62]))
        assert columns(some) == ([3, 2**62], [30, 12], 1000, ["de", "en, or so"])


def test_missing_groups_are_blank(tmp_path):
    rows = [(1, None), (2, True), (3, 7)]
    for source in (write_jsonl(tmp_path / "a.jsonl", ("document", "of"), rows), as_dict(("document", "of"), rows)):
        assert open_metadata(source, group_by="of").groups == ("", "7", "True")
    path = write_parquet(tmp_path / "a.parquet", ("document", "of"), [(1, None), (2, 5)])
    assert open_metadata(path, group_by="of").groups == ("", "5")


def test_totals_need_no_table():
    made = open_metadata(bytes=10, words="20")
    assert (made.bytes, made.words, made.needs_documents) == (10, 20, False)
    assert made.of(np.array([1, 2])) is made
    assert open_metadata() is None


def bad_tables(folder):
    """(what is said, source, options)."""
    n = {"bytes": "n"}
    yield "a.csv has no column 'size', but 'document', 'n', 'of', 'w'", write_csv(folder / "a.csv"), {"bytes": "size"}
    yield "a.jsonl has no column 'm'", write_jsonl(folder / "a.jsonl"), {"group_by": "m"}
    yield "a.parquet has no column 'm'", write_parquet(folder / "a.parquet"), {"words": "m"}
    yield "has no column 'document', but 'id'", {"id": [1], "n": [2]}, n
    yield "empty.csv has no column 'document', but none", write_text(folder / "empty.csv", ""), n
    yield "2 columns 'n', expected one", write_text(folder / "two.csv", "document,n,n\n1,2,3\n"), n
    yield "each document once, got 7 in records 1 and 3", {"document": [7, 8, 7], "n": [1, 2, 3]}, n
    yield "column 'n' of metadata must not be negative, got -2 in record 2", {"document": [1, 2], "n": [1, -2]}, n
    yield "must have integers, got '1.5' in record 1", write_text(folder / "f.csv", "document,n\n1,1.5\n"), n
    yield "must have integers, got '1_0' in record 1", write_text(folder / "u.csv", "document,n\n1,1_0\n"), n
    yield "must have integers, got 3.0 in record 2", write_jsonl(folder / "f.jsonl", NAMES[:2], [(1, 2), (2, 3.0)]), n
    yield "must have integers, got True in record 1", {"document": [1], "n": [True]}, n
    yield "must have integers, got None in record 1", write_parquet(folder / "p.parquet", NAMES[:2], [(1, None)]), n
    yield "must have integers, got 1.0 in record 1", write_parquet(folder / "q.parquet", NAMES[:2], [(1, 1.0)]), n
    yield "must have integers, got 9223372036854775808", {"document": [2**63], "n": [1]}, n
    yield "must be below 2**63", {"document": np.array([2**63], np.uint64), "n": [1]}, n
    yield "a vector of integers, got float64[2]", {"document": [1, 2], "n": np.array([1.0, 2.0])}, n
    yield "one length, got {'document': 2, 'n': 1}", {"document": [1, 2], "n": [1]}, n
    yield "must have strings or numbers, got a list in record 1", {"document": [1], "of": [["x"]]}, {"group_by": "of"}
    yield "must have 2 fields in line 3, as its header, got 1", write_text(folder / "s.csv", "document,n\n1,2\n3\n"), n
    yield "is no CSV in line 2", write_text(folder / "c.csv", 'document,n\n1,"2"3\n'), n
    yield "object of JSON in line 2", write_text(folder / "o.jsonl", '{"document": 1, "n": 2}\n[1]\n'), n
    yield "object of JSON in line 1", write_text(folder / "p.jsonl", '{"document": 1,\n'), n
    yield "is no Parquet file that can be read", write_text(folder / "t.parquet", "text"), n
    yield "UTF-8", write_bytes(folder / "l.csv", b"document,n\n1,\xff\n"), n
    yield "must be a .csv, .jsonl, .ndjson or .parquet file", write_text(folder / "a.xlsx", ""), n
    yield "gone.csv does not exist", folder / "gone.csv", n
    yield "bytes names a column, 'n', but no table", None, n
    yield "metadata is given, but neither", as_dict(), {}
    yield "neither", as_dict(), {"bytes": 5}
    for value in (0, -1, True, 1.5, "", "-5"):
        said = (
            "names a column"
            if value == "-5"
            else f"bytes must be a positive integer or the name of a column, got {value!r}"
        )
        yield said, None, {"bytes": value}


def write_text(path, text):
    path.write_text(text)
    return path


def write_bytes(path, data):
    path.write_bytes(data)
    return path


def test_bad_tables_are_refused(tmp_path):
    for message, source, options in bad_tables(tmp_path):
        with pytest.raises((ValueError, TypeError, OSError)) as raised:
            open_metadata(source, **options)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow: pip install 'gpuxent\[parquet\]'"):
        open_metadata(path, bytes="n")
