"The reader of rows against datasets, pandas and the standard library, and each row's place against a count of line ends"
import csv
import gzip
import io
import json

import pytest

from llmbench.core import UserError
from llmbench.text.files import csv_rows, file_bytes, file_text, json_rows, read_rows

ROWS = [{"a": "x,y\n\"q\"", "b": "云"}, {"a": "", "b": "2"}, {"a": "three", "b": "\u2028"}]


def test_rows_as_datasets_and_pandas_have_them(data, tmp_path, ledger):
    from datasets import Dataset, disable_progress_bars
    disable_progress_bars()
    theirs = Dataset.from_json(str(data/"c4_en.jsonl"), cache_dir=str(tmp_path)).to_list()
    ours = [{k: row[k] for k in theirs[0]} for _, row in read_rows(data/"c4_en.jsonl")]
    ledger("rows of C4", "datasets", abs(len(ours) - len(theirs)) + sum(a["text"] != b["text"] for a, b in zip(ours, theirs)), 0)
    with io.StringIO(newline="") as f:
        writer = csv.DictWriter(f, ["a", "b"])
        writer.writeheader()
        writer.writerows(ROWS)
        text = f.getvalue()
    (tmp_path/"t.csv").write_text(text, newline="")
    ledger("rows of a table", "csv", sum(a != b for a, b in zip([row for _, row in read_rows(tmp_path/"t.csv")], csv.DictReader(io.StringIO(text, newline="")), strict=True)), 0)


@pytest.mark.parametrize("indent, ends", [(None, "\n"), (None, "\r\n"), (2, "\n")])
def test_the_place_is_the_line_where_a_value_begins(indent, ends):
    values = [{"a": [1, 2]}, "two\nlines", 3, [], {"b": {"c": None}}]
    for text in (ends.join(json.dumps(v, indent=indent).replace("\n", ends) for v in values), "[" + ("," + ends*2).join(json.dumps(v, indent=indent).replace("\n", ends) for v in values) + ends + "]"):
        found = list(json_rows("a.json", text))
        assert [v for _, v in found] == values
        starts, at = [], 0
        for v in values:
            at = text.index(json.dumps(v, indent=indent).replace("\n", ends), at)
            starts.append(text.count("\n", 0, at) + 1)
            at += len(json.dumps(v, indent=indent).replace("\n", ends))
        assert [line for line, _ in found] == starts


def test_what_is_inside_counts(tmp_path):
    packed = gzip.compress(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}')
    for name in ("a.txt", "a.json", "a.jsonl.gz"):
        (tmp_path/name).write_bytes(packed)
        assert [row for _, row in read_rows(tmp_path/name)] == [{"a": 1}, {"a": 2}]
    assert [where for where, _ in read_rows(tmp_path/"a.json")] == [f"{tmp_path/'a.json'} line 1", f"{tmp_path/'a.json'} line 2"]


def test_cells_are_read_as_the_caller_says(tmp_path):
    (tmp_path/"a.tsv").write_text("n\tt\n7\tx\n")
    seen = []
    rows = list(read_rows(tmp_path/"a.tsv", lambda name, text, where: seen.append((name, where)) or (int(text) if name == "n" else text)))
    assert rows == [(f"{tmp_path/'a.tsv'} line 2", {"n": 7, "t": "x"})] and seen == [("n", f"{tmp_path/'a.tsv'} line 2"), ("t", f"{tmp_path/'a.tsv'} line 2")]


@pytest.mark.parametrize("name, content, told", [
    ("cut.jsonl", b'{"a": 1}\n{"a": "b', "line 2 column 7: broken JSON"), ("two.json", b"[1]\n[2]", "line 1: a row is an object"), ("behind.json", b'[{"a": 1}]\n[2]', "follows the closing bracket"),
    ("old.csv", "a,b\n铁,匠".encode("gbk"), "line 2: not UTF-8: byte 0xcc"), ("wide.csv", b"a,b\n1,2,3\n", "line 2: 3 cells, but the header has 2"), ("quote.csv", b'a,b\n"1,2\n', "broken CSV"),
    ("wide16.json", "[]".encode("utf-16"), "UTF-16"), ("zero.json", b"\0\1\2", "a binary file"), ("void.json", b" \n", "the file is empty"), ("none.json", b"[]", "no row in it"),
    ("cut.gz", gzip.compress(b'{"a": 1}'*99, mtime=0)[:-9], "broken gzip"), ("bare.json", b'["x"]', "not a string"), ("cut.parquet", b"PAR1xx", "broken Parquet")])
def test_broken_files_say_where(tmp_path, name, content, told):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught: list(read_rows(tmp_path/name))
    assert name in str(caught.value)


def test_a_folder_names_what_is_in_it(tmp_path):
    (tmp_path/"x.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match="Name one file in it: x.csv"): file_bytes(tmp_path)
    with pytest.raises(UserError, match="cannot read: No such file"): file_bytes(tmp_path/"none")
    assert file_text("x", b"ok") == "ok" and list(csv_rows(tmp_path/"x.csv", "a\n1\n")) == [(2, {"a": "1"})]
