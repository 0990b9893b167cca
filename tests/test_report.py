"""The forms of a result, read back by readers of their own."""

import csv
import io
import json
import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from test_statistics import summary

from gpuxent.evaluation.reports import tables
from gpuxent.evaluation.statistics.metadata import open_metadata
from gpuxent.evaluation.statistics.result import Evaluation, GroupStatistics

RUN = {"source": "logits/bfloat16", "shift": 1, "labels": "labels.npy", "temperature": 1.0}
GROUPS = ("de", "en|us", "español", "two\nlines", "")


def evaluation(documents=True):
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(40), [20, 30] * 20)  # groups of five have as many of either
    loss = rng.exponential(2, 1000) * (1 + document / 20)
    table = {"document": range(40), "n": rng.integers(50, 90, 40), "of": [GROUPS[i % 5] for i in range(40)]}
    made = summary(loss, np.arange(1000) % 25, document if documents else None, ignored=24)
    return made.result(metadata=open_metadata(table, bytes="n", words=300, group_by="of") if documents else None)


RESULT = evaluation()
BAD = replace(
    summary([1.0, np.nan, np.inf, 2.0], None, [1, 1, 2, 3], ignored=1).result(rows=7, mixed=("numpy", "numba")),
    first_nan_row=123456,
)


def written(result=RESULT, form="table", run=RUN, width=None, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
    tables.write(result, form, run, file, width)
    file.seek(0)
    return file.read()


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def number(text):
    return float(text.removesuffix(" nat").removesuffix(" %").replace(",", "")) / (100 if text.endswith("%") else 1)


def table_rows(text):
    """name -> cells of the lines that have columns."""
    return {cells[0]: cells[1:] for line in text.splitlines() if len(cells := re.split(r" {2,}", line)) > 1}


# ---- for people ----


@pytest.mark.parametrize("width", [20, 80, 200, None])
def test_table(width):
    text = written(width=width)
    first, blank, *_ = text.splitlines()
    assert first == "scored 1,000  ignored 24  bad 0  docs 40  from logits/bfloat16  shift 1"
    assert blank == ""
    assert max(map(len, text.splitlines())) <= max(width or 80, 80)
    assert not any(line.endswith(" ") for line in text.splitlines())
    cells = table_rows(text)
    assert cells[""] == ["value", "± cluster(doc)", "± iid"]
    r = RESULT
    for name, value, cluster, iid in (
        ("cross-entropy", r.cross_entropy, r.stderr_cluster, r.stderr_iid),
        ("perplexity", r.perplexity, r.perplexity * r.stderr_cluster, r.perplexity * r.stderr_iid),
        ("mean over documents", r.document_cross_entropy, r.document_stderr, None),
        ("bits per token", r.bits_per_token, r.stderr_cluster / math.log(2), r.stderr_iid / math.log(2)),
        ("bits per byte", r.bits_per_byte, r.bits_per_byte_stderr, None),
        ("bits per word", r.bits_per_word, None, None),
        ("word perplexity", r.word_perplexity, None, None),
        ("accuracy", r.accuracy, None, None),
        ("top-5 accuracy", r.topk_accuracy[5], None, None),
        ("entropy of the model", r.entropy, None, None),
        ("calibration error (ECE, 15 bins)", r.ece, None, None),
    ):
        shown, *errors = cells[name]
        assert number(shown) == pytest.approx(value, rel=5e-6, abs=5e-5 if "%" in shown else 0), name
        for error, expected in zip(errors, (cluster, iid), strict=True):
            assert error == "-" if expected is None else number(error) == pytest.approx(expected, rel=0.05), name


def test_table_has_positions_groups_and_documents():
    text = written()
    cells = table_rows(text)
    assert "Loss of tokens, nats (within 0.39 %)" in text
    assert [number(cell) for cell in cells["loss"]] == pytest.approx(list(RESULT.quantiles.values()), rel=6e-3)
    assert cells["quantile"][0] == "1 %"
    assert cells["quantile"][-1] == "99.9 %"
    assert cells["16-31"][0] == "360"
    shown = [group.group for group in RESULT.groups]
    assert shown == sorted(GROUPS)
    for name in ("de", "en|us", "español", r"two\nlines", "(blank)"):
        assert cells[name][:2] == ["8", "200"]
    means = RESULT.by_document.cross_entropy
    best, worst = text.split("Best documents")[1].split("Worst documents")
    assert [int(n) for n in re.findall(r"^(\d+) ", best, re.MULTILINE)] == np.argsort(means)[:5].tolist()
    assert [int(n) for n in re.findall(r"^(\d+) ", worst, re.MULTILINE)] == np.argsort(-means)[:5].tolist()


def test_table_without_documents():
    text = written(evaluation(documents=False), run={})
    assert text.startswith("scored 1,000  ignored 24  bad 0\n")
    assert table_rows(text)[""] == ["value", "± iid"]
    for word in ("over documents", "cluster", "docs", "Best", "bits per byte"):
        assert word not in text


def test_few_documents_are_all_listed():
    text = written(summary([1.0, 3.0, 2.0], None, [4, 5, 6]).result())
    assert re.findall(r"^(\d) +1 ", text.split("Documents, best first")[1], re.MULTILINE) == ["4", "6", "5"]


def test_many_groups_are_cut():
    n = 50
    made = summary(np.ones(n * 2 - 1), None, [*range(n), *range(1, n)])
    about = open_metadata({"document": range(n), "of": [f"g{i:02}" for i in range(n)]}, group_by="of")
    text = written(made.result(metadata=about))
    assert "and 30 more groups with fewer tokens" in text
    assert sum(line.startswith("g") for line in text.split("By group")[1].splitlines()) == 20 + 1  # and the heads
    assert "g00" not in text  # it has one token, the others two


def test_digits_are_not_cut_off():
    """Long names give way, and where that is not enough, the line is longer than the terminal is wide."""
    large = GroupStatistics("x" * 70, 10**9, 10**15, 12.34567, 76543.21, 0.00012, 1.234567e-7, 23456.71)
    small = replace(large, group="y", documents=10, scored=100)
    for groups, widest in (((small,), 80), ((large, small), 106)):
        text = written(replace(RESULT, groups=groups)).split("By group\n")[1].split("\n\n")[0]
        assert table_rows(text)["y"] == ["10", "100", "12.3457", "0.00012", "76,543.2", "1.23e-07", "23,456.7"]
        assert max(map(len, text.splitlines())) <= widest
    assert "1,000,000,000  1,000,000,000,000,000  12.3457" in text
    assert text.count("x") == 70 + 1  # of perplexity


def test_ascii_terminals():
    text = written(encoding="ascii")
    cells = table_rows(text)
    assert cells[""] == ["value", "+- cluster(doc)", "+- iid"]
    assert r"espa\xf1ol" in cells
    lines = text.split("By group\n")[1].splitlines()[:6]
    assert len({line.index(word) + len(word) for line, word in zip(lines, ["scored", *["200"] * 5], strict=True)}) == 1
    assert written(encoding="latin-1").count("±") > 1


def test_the_first_line_says_what_is_missing_or_mixed():
    first, *lines = written(BAD, width=200).splitlines()
    assert first == (
        "partial: 71.4 % of the rows  scored 4  ignored 1  bad 2  docs 3  from logits/bfloat16  shift 1  "
        "mixed: 2 backends or CPU types"
    )
    assert lines[:4] == [
        "1 row has a loss of NaN, first row 123,456",
        "1 row has an infinite loss, first row 2",
        "mixed: rows computed by numpy",
        "mixed: rows computed by numba",
    ]
    cells = table_rows("\n".join(lines))
    assert cells["cross-entropy"] == ["NaN nat", "n/a", "n/a"]
    assert cells["calibration error (ECE, 15 bins)"][0] == "NaN"
    assert "100.0 %" not in written(replace(BAD, share=1 - 1e-9)).splitlines()[0]


def test_markdown():
    text = written(form="markdown")
    lines = text.splitlines()
    assert lines[0] == "scored 1,000  ignored 24  bad 0  docs 40  from logits/bfloat16  shift 1"
    found = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(found) == 6
    for table in found:
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table]
        assert len({len(row) for row in cells}) == 1
        assert all(set(cell.strip()) <= set("-:") for cell in cells[1])
    assert r"| en\|us | 8 | 200 |" in text
    assert r"| two\\nlines | 8 | 200 |" in text
    assert f"| cross-entropy | {RESULT.cross_entropy:.6g} nat |" in text


# ---- for programs ----


@pytest.mark.parametrize("result", [RESULT, BAD, evaluation(documents=False)], ids=["all", "bad", "no documents"])
def test_json(result):
    text = written(result, "json")
    data = strict(text)
    assert data.pop("run") == RUN
    assert text.count('"by_document"') == (result.by_document is not None)
    for field in fields(Evaluation):
        value = getattr(result, field.name)
        if isinstance(value, float):
            assert data[field.name] == (value if math.isfinite(value) else None)
        elif value is None and field.name != "by_document":
            assert data[field.name] is None
    assert data["quantiles"] == {str(q): x if math.isfinite(x) else None for q, x in result.quantiles.items()}
    assert [tuple(p.values())[:3] for p in data["by_position"]] == [
        (p.first, p.last, p.scored) for p in result.by_position
    ]
    assert [group["group"] for group in data["groups"]] == [group.group for group in result.groups]
    assert data["top5_accuracy"] == result.topk_accuracy[5]
    assert ("by_document" in data) == (result.by_document is not None)
    if result.by_document is not None:
        assert data["documents"] == len(data["by_document"])
        assert data["by_document"] == result.to_dict()["by_document"]
        assert [d["document"] for d in data["by_document"]] == result.by_document.document.tolist()
    assert data == strict(json.dumps(result.to_dict(), allow_nan=False))


def test_json_without_a_scored_document():
    data = strict(written(replace(RESULT, by_document=type(RESULT.by_document)(*[np.zeros(0, int)] * 3)), "json"))
    assert data["by_document"] == []


def test_jsonl():
    records = [strict(line) for line in written(form="jsonl").splitlines()]
    kinds = [record["kind"] for record in records]
    assert sorted(set(kinds)) == ["bin", "document", "group", "position", "quantile", "result", "run"]
    assert kinds[:2] == ["run", "result"]
    assert records[0] == {"kind": "run"} | RUN
    assert not {"bins", "by_position", "groups", "quantiles", "by_document"} & set(records[1])
    whole = strict(written(form="json"))
    for name, value in records[1].items():
        assert name == "kind" or whole[name] == value
    for kind, name in (("document", "by_document"), ("group", "groups"), ("position", "by_position"), ("bin", "bins")):
        assert [{k: v for k, v in r.items() if k != "kind"} for r in records if r.get("kind") == kind] == whole[name]
    quantiles = {str(r["q"]): r["nll"] for r in records if r["kind"] == "quantile"}
    assert quantiles == whole["quantiles"]
    assert '"kind": "result", "cross_entropy": null' in written(BAD, "jsonl")


def test_csv():
    reader = csv.DictReader(io.StringIO(written(form="csv"), newline=""))
    assert reader.fieldnames == ["kind", "name", "statistic", "value", "stderr_cluster", "stderr_iid", "count"]
    lines = {(line["kind"], line["name"], line["statistic"]): line for line in reader}
    r = RESULT

    def line(kind, name, statistic):
        found = lines[kind, name, statistic]
        return [float(found[c]) if found[c] else None for c in ("value", "stderr_cluster", "stderr_iid", "count")]

    assert line("result", "", "cross_entropy") == [r.cross_entropy, r.stderr_cluster, r.stderr_iid, 1000]
    document = line("result", "", "document_cross_entropy")
    assert document == [r.document_cross_entropy, r.document_stderr, None, 1000]
    assert line("result", "", "bits_per_word") == [r.bits_per_word, None, None, 1000]
    assert line("result", "", "top5_accuracy") == [r.topk_accuracy[5], None, None, 1000]
    assert line("result", "", "share") == [1, None, None, 1024]
    assert line("quantile", "0.5", "nll")[0] == r.quantiles[0.5]
    position = r.by_position[3]
    assert line("position", "4-7", "cross_entropy") == [position.cross_entropy, None, position.stderr_iid, 160]
    group = r.groups[-1]
    assert line("group", "two\nlines", "cross_entropy") == [group.cross_entropy, group.stderr_cluster, None, 200]
    assert line("group", "two\nlines", "bits_per_byte")[0] == group.bits_per_byte
    for d in r.by_document:
        assert line("document", str(d.document), "cross_entropy") == [d.cross_entropy, None, None, d.scored]
    assert sum(kind == "bin" for kind, _, _ in lines) == 2 * len(r.bins)
    bad = list(csv.DictReader(io.StringIO(written(BAD, "csv"))))
    assert (bad[0]["value"], bad[0]["count"]) == ("nan", "4")
    assert [line["value"] for line in bad if line["statistic"] == "mixed"] == ["numpy", "numba"]


def test_unknown_form():
    with pytest.raises(ValueError, match="form must be one of table, json, jsonl, csv, markdown, got 'xml'"):
        tables.write(RESULT, "xml", {}, io.StringIO())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.00091234, "0.00091"),
        (0.1, "0.10"),
        (11.4, "11"),
        (123.4, "120"),
        (1234567.0, "1,200,000"),
        (6e-5, "6.0e-05"),
        (0.0, "0.0"),
        (math.nan, "n/a"),
        (math.inf, "inf"),
        (None, "-"),
    ],
)
def test_errors_have_two_digits(value, shown):
    assert tables.error(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.180341, "2.18034"),
        (1234567.8, "1,234,568"),
        (123456.7, "123,457"),
        (3e-7, "3.00e-07"),
        (1e300, "1.00000e+300"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
    ],
)
def test_values_have_six_digits(value, shown):
    assert tables.decimal(value) == shown
