"The reader against datasets, json and csv"
import csv
import json

from llmbench.text.corpus import read_documents


def test_json_lines_as_datasets_reads_them(data, tmp_path, ledger):
    from datasets import Dataset, disable_progress_bars
    disable_progress_bars()
    theirs = list(Dataset.from_json(str(data/"c4_en.jsonl"), cache_dir=str(tmp_path))["text"])
    ours = read_documents(data/"c4_en.jsonl")
    ledger("C4 documents", "datasets", abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs)), 0)


def test_squad_contexts_as_the_json_has_them(data, ledger):
    for lang in ("en", "zh"):
        theirs = [p["context"] for article in json.loads((data/f"xquad_{lang}.json").read_text())["data"] for p in article["paragraphs"]]
        ledger(f"XQuAD contexts, {lang}", "json", sum(a != b for a, b in zip(read_documents(data/f"xquad_{lang}.json"), theirs, strict=True)), 0)


def test_csv_rows_as_the_standard_library_has_them(data, ledger):
    with open(data/"mmlu_high_school_biology_test.csv", newline="") as f: theirs = ["\n".join(row) for row in csv.reader(f)]
    ledger("MMLU rows", "csv", sum(a != b for a, b in zip(read_documents(data/"mmlu_high_school_biology_test.csv"), theirs, strict=True)), 0)
