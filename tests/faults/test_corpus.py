"Bad corpora: the message names file, line, field and mend; nothing is read half"
import gzip
import os

import pytest

from llmbench.core import UserError
from llmbench.text.corpus import iter_documents, python_documents, read_documents, read_text, split_documents

LINES = b'{"text": "a"}\n'

CASES = { # name: (file name, bytes, what the message must say)
    "broken JSON at line 3": ("a.jsonl", LINES*2 + b'{"text": "b"\n' + LINES, ["a.jsonl line 3 column", "broken JSON", "cut off?"]),
    "broken JSON Lines called .json": ("a.json", LINES*2 + b'{"text": "b"\n', ["a.json line 3 column", "broken JSON"]),
    "broken JSON array": ("a.json", b'[{"text": "a"},\n\n {"text": b}]', ["a.json line 3 column 11", "broken JSON"]),
    "array cut off": ("a.json", b'[{"text": "a"},', ["a.json line 1 column 16", "cut off?"]),
    "something behind the array": ("a.json", b'[\n{"text": "a"}\n]\n]', ["a.json line 4 column 1", "Extra data"]),
    "two values on one line": ("a.jsonl", LINES + b'{"text": "a"} {"text": "b"}\n', ["a.jsonl line 2 column 15", "Extra data"]),
    "missing field": ("a.jsonl", LINES + b'{"question": "q", "answer": "x"}\n', ["a.jsonl line 2", "text or content or context", "Fields present: question, answer"]),
    "missing field in an array": ("a.json", b'[{"text": "a"}, {"body": "b"}]', ["a.json row 2", "Fields present: body"]),
    "a field of the wrong kind": ("a.jsonl", b'{"text": 7}\n', ["a.jsonl line 1", "Fields present: text"]),
    "null": ("a.jsonl", LINES + b"null\n", ["a.jsonl line 2", "a string or an object, not null"]),
    "a number": ("a.json", b"[1]", ["a.json row 1", "not 1"]),
    "no fields": ("a.jsonl", b"{}\n", ["a.jsonl line 1", "Fields present: none"]),
    "a conversation file": ("a.json", b'[{"messages": []}]', ["row 1", "messages", "conversations"]),
    "nested too deeply": ("a.json", b"["*100_000, ["a.json", "nested too deeply"]),
    "a number of 5,000 digits": ("a.jsonl", LINES + b'{"text": "a", "n": ' + b"9"*5000 + b"}\n", ["a.jsonl line 2", "broken JSON"]),
    "lone surrogate": ("a.jsonl", LINES + b'{"text": "\\ud83d"}\n', ["a.jsonl line 2", "half a character", "U+D83D"]),
    "empty file": ("a.txt", b"", ["a.txt", "empty"]),
    "only a byte-order mark": ("a.txt", b"\xef\xbb\xbf", ["a.txt", "empty"]),
    "only spaces": ("a.md", b" \n\t\r\n", ["a.md", "empty"]),
    "only empty texts": ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', ["a.jsonl", "every text is empty"]),
    "empty JSON array": ("a.json", b"[]", ["a.json", "no document"]),
    "empty archive": ("a.txt.gz", gzip.compress(b""), ["a.txt.gz", "empty"]),
    "truncated archive": ("a.jsonl.gz", gzip.compress(LINES*5000)[:60], ["a.jsonl.gz", "broken gzip", "Fetch it again"]),
    "archive damaged in the middle": ("a.txt.gz", gzip.compress(bytes(range(1, 120))*50)[:80] + b"\xff"*80, ["a.txt.gz", "broken gzip"]),
    "not an archive": ("a.txt.gz", b"plain text", ["a.txt.gz", "broken gzip", "Not a gzipped file"]),
    "broken UTF-8": ("a.txt", "云\n村".encode() + b"\xff", ["a.txt line 2", "byte 7 is 0xff", "iconv"]),
    "GBK": ("a.txt", "第一行\n第二行".encode("gbk"), ["a.txt line 1", "byte 0 is 0xb5", "iconv -f GBK"]),
    "Latin-1 in line 3 of JSON Lines": ("a.jsonl", LINES*2 + '{"text": "é"}\n'.encode("latin-1"), ["a.jsonl line 3", "0xe9"]),
    "a character cut at the end": ("a.txt", "ab云".encode()[:-1], ["a.txt line 1", "byte 2 is 0xe4"]),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), ["a.txt", "UTF-16", "iconv -f UTF-16"]),
    "a picture": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0", ["a.txt", "binary"]),
    "a checkpoint": ("a.json", b"PK\x03\x04\0\0", ["a.json", "binary"]),
    "CSV without a text column": ("a.csv", b"id,body\n1,x\n", ["a.csv line 1", "Columns present: id, body"]),
    "a short CSV row": ("a.csv", b'id,text\n1,"two\nlines"\n2\n', ["a.csv line 4", "1 of 2 columns"]),
    "an empty CSV": ("a.csv", b"\n\n", ["a.csv", "empty"]),
    "NUL inside CSV": ("a.csv", b"text\nab" + b"x"*9000 + b"\n", None), # long cells are fine
}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_named(name, tmp_path):
    file, data, wanted = CASES[name]
    (tmp_path/file).write_bytes(data)
    if wanted is None: assert read_documents(tmp_path/file); return
    with pytest.raises(UserError) as caught: read_documents(tmp_path/file)
    for part in wanted: assert part in str(caught.value), f"{part!r} is missing in: {caught.value}"
    assert str(tmp_path/file) in caught.value.where


def test_absent_forbidden_and_folders(tmp_path):
    with pytest.raises(UserError, match="cannot read: No such file"): read_documents(tmp_path/"absent.txt")
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="no text in this folder.*Looked for .txt"): read_documents(tmp_path/"empty")
    (tmp_path/"empty"/"x.png").write_bytes(b"\x89PNG")
    (tmp_path/"empty"/"void.txt").write_bytes(b"")
    with pytest.raises(UserError, match="no text in this folder"): read_documents(tmp_path/"empty")
    with pytest.raises(UserError, match="cannot read: Is a directory"): read_text(tmp_path/"empty")
    (tmp_path/"secret.txt").write_text("x")
    (tmp_path/"secret.txt").chmod(0)
    if os.access(tmp_path/"secret.txt", os.R_OK): pytest.skip("root reads everything")
    with pytest.raises(UserError, match="Permission denied"): read_documents(tmp_path/"secret.txt")


def test_a_fault_in_a_folder_names_the_file(tmp_path):
    (tmp_path/"good.txt").write_text("fine")
    (tmp_path/"sub").mkdir()
    (tmp_path/"sub"/"bad.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(UserError, match=r"sub/bad.jsonl line 2"): read_documents(tmp_path)


def test_the_error_comes_before_the_second_document_is_lost(tmp_path):
    "JSON Lines are read one by one: what stands before the fault has been handed out, nothing behind it"
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnope\n{"text": "three"}\n')
    found = iter_documents(tmp_path/"a.jsonl")
    assert [next(found), next(found)] == ["one", "two"]
    with pytest.raises(UserError, match="line 3"): next(found)


GOOD = { # name: (file name, bytes, documents)
    "byte-order mark and CRLF": ("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n", ["one\ntwo\nthree\n"]),
    "CRLF inside JSON": ("a.jsonl", b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r\n\r\n"x"\r\n', ["one\ntwo", "x"]),
    "line separators that are no lines": ("a.jsonl", '{"text": "a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"]),
    "JSON Lines called .json": ("a.json", LINES*2, ["a", "a"]),
    "JSON Lines called .json, blank lines between": ("a.json", b"\n" + LINES + b"\n" + LINES, ["a", "a"]),
    "a single object": ("a.json", b'{\n "text": "a"\n}', ["a"]),
    "a single line": ("a.json", b'{"text": "a"}', ["a"]),
    "an array of strings": ("a.json", '["一", "二"]'.encode(), ["一", "二"]),
    "arrays in lines": ("a.jsonl", b'["a", {"text": "b"}]\n', ["a", "b"]),
    "gzip": ("a.JSONL.GZ", gzip.compress(LINES*3), ["a"]*3),
    "two gzip members": ("a.txt.gz", gzip.compress(b"one ") + gzip.compress(b"two"), ["one two"]),
    "upper-case suffix": ("A.TXT", b"x", ["x"]),
    "no suffix": ("corpus", b"x", ["x"]),
    "CSV with quotes, commas, new lines": ("a.csv", b'id,text\n1,"a, ""b""\r\nc"\n\n2,d\n', ['a, "b"\nc', "d"]),
    "CSV with a byte-order mark": ("a.csv", b"\xef\xbb\xbftext\na\n", ["a"]),
    "CSV without a head": ("a.csv", b"What is 1+1?,1,2,B\n", ["What is 1+1?\n1\n2\nB"]),
    "a cell of 200,000 characters": ("a.csv", b"text\n" + b"x"*200_000 + b"\n", ["x"*200_000]),
    "content and context": ("a.jsonl", b'{"content": "a", "id": 1}\n{"context": "b", "id": 2}\n', ["a", "b"]),
    "an emoji as a surrogate pair": ("a.jsonl", b'{"text": "\\ud83d\\ude42"}\n', ["🙂"]),
    "empty rows between": ("a.jsonl", LINES + b'{"text": ""}\n' + LINES, ["a", "a"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_good_files_are_read(name, tmp_path):
    file, data, wanted = GOOD[name]
    (tmp_path/file).write_bytes(data)
    assert read_documents(tmp_path/file) == wanted


def test_field_names_any_other_text(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"question": "q", "answer": "a", "text": "t"}\n')
    assert read_documents(tmp_path/"a.jsonl", field="answer") == ["a"]
    (tmp_path/"a.csv").write_text("text,body\nt,b\n")
    assert read_documents(tmp_path/"a.csv", field="body") == ["b"]
    with pytest.raises(UserError, match="no text in field title.*Fields present: question, answer, text"): read_documents(tmp_path/"a.jsonl", field="title")
    (tmp_path/"poem.json").write_text('{"title": "t", "paragraphs": ["a", "b"]}')
    assert read_documents(tmp_path/"poem.json") == ["t\na\nb"] and read_documents(tmp_path/"poem.json", field="title") == ["t"]
    with pytest.raises(UserError, match="no text in field body"): read_documents(tmp_path/"poem.json", field="body")
    with pytest.raises(UserError, match="no column title"): read_documents(tmp_path/"a.csv", field="title")


def test_csv_limit_is_put_back(tmp_path):
    import csv
    csv.field_size_limit(before := 131_072)
    (tmp_path/"a.csv").write_text("id,body\n1,2\n")
    with pytest.raises(UserError): read_documents(tmp_path/"a.csv")
    assert csv.field_size_limit() == before


# The real files: what the folder's README promises ------------------------------------------------------------------

COUNTS = {"tinyshakespeare.txt": 1, "bpe_corpus_en.txt": 1, "c4_en.jsonl": 300, "zh_tang_poems.json": 1000, "xquad_en.json": 240, "xquad_zh.json": 240,
          "mmlu_abstract_algebra_dev.csv": 5, "mmlu_computer_security_dev.csv": 5, "mmlu_high_school_biology_dev.csv": 5,
          "mmlu_abstract_algebra_test.csv": 100, "mmlu_computer_security_test.csv": 100, "mmlu_high_school_biology_test.csv": 310}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_have_all_their_documents(name, data):
    documents = read_documents(data/name)
    assert len(documents) == COUNTS[name] and all(d.strip() for d in documents) and not any("\r" in d for d in documents)


@pytest.mark.parametrize("name, field, rows", [("gsm8k_test.jsonl", "question", 1319), ("humaneval.jsonl.gz", "prompt", 164), ("ifeval_en.jsonl", "prompt", 541),
                                                ("alpaca_zh.json", "output", 1000), ("self_instruct_seeds.jsonl", "instruction", 175)])
def test_real_files_of_other_shapes_by_field(name, field, rows, data):
    with pytest.raises(UserError, match=field): read_documents(data/name)
    assert sum(1 for _ in iter_documents(data/name, field=field)) == rows


def test_real_poem_has_title_author_and_lines(data):
    import json
    rows, documents = json.loads((data/"zh_tang_poems.json").read_text()), read_documents(data/"zh_tang_poems.json")
    assert documents[0].split("\n")[:3] == [rows[0]["title"], rows[0]["author"], rows[0]["paragraphs"][0]]
    assert sum(map(len, documents)) == sum(len("\n".join([r["title"], r["author"], *r["paragraphs"]])) for r in rows)


# Splits ------------------------------------------------------------------------------------------------------------

def test_split_keeps_copies_together_and_old_documents_in_place():
    docs = [f"document {i}" for i in range(2000)]
    train, valid = split_documents(docs + docs[:300], .1)
    assert not set(train) & set(valid) and sorted(train + valid) == sorted(docs + docs[:300])
    assert 150 < len(set(valid)) < 250
    grown = split_documents([f"new {i}" for i in range(500)] + docs[::-1], .1)[1]
    assert set(grown) & set(docs) == set(valid)
    assert train == [d for d in docs + docs[:300] if d in set(train)]


def test_split_is_nested_seeded_and_the_same_everywhere():
    docs = [f"document {i}" for i in range(500)]
    assert set(split_documents(docs, .1)[1]) < set(split_documents(docs, .3)[1])
    assert set(split_documents(docs, .1, seed=1)[1]) != set(split_documents(docs, .1)[1])
    # printf "0 Oban" | sha256sum begins with 0xxx, those below 8 are held out
    assert split_documents(["云村", "Mira", "Oban", "Kasu", "Tobi", "Vena"], .5)[1] == ["Oban", "Vena"]


def test_neither_side_of_a_split_is_empty():
    assert [len(part) for part in split_documents(["a", "b", "c"], .001)] == [2, 1]
    assert [len(part) for part in split_documents(["a", "b", "c"], .999)] == [1, 2]


def test_folders_are_read_in_the_order_of_names_and_hidden_files_are_not(tmp_path):
    names = [f"{i:02d}" for i in range(40)]
    for name in names[::-1]: (tmp_path/f"{name}.txt").write_text(name)
    (tmp_path/".hidden.txt").write_text("no")
    (tmp_path/"picture.png").write_bytes(b"\x89PNG")
    assert read_documents(tmp_path) == names


def test_split_of_one_text_takes_the_end(data):
    text = read_documents(data/"tinyshakespeare.txt")
    (train,), (valid,) = split_documents(text, .1)
    assert train + valid == text[0] and len(train) == int(.9*len(text[0])) # nanoGPT's split


def test_split_refuses_nonsense():
    for bad in (1., 1.5, -.1):
        with pytest.raises(ValueError, match="share"): split_documents(["a", "b"], bad)
    with pytest.raises(ValueError, match="no documents"): split_documents([])
    assert split_documents(["a", "b"], 0) == (["a", "b"], [])
    assert [len(part) for part in split_documents(["a"]*5 + ["b"]*3, .5)] in ([5, 3], [3, 5])


def test_python_documents_are_many_and_long():
    documents = python_documents()
    assert len(documents) > 50 and sum(map(len, documents)) > 300_000 and any("yield" in d for d in documents)
