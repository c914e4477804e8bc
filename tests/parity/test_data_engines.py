"The same functions under `datasets` give what the streams give: no engine of our own is needed"
import numpy as np
import pytest

from llmbench.text.clean import clean_documents, decide
from llmbench.text.contamination import ExamIndex, clean_training
from llmbench.text.corpus import iter_documents, read_documents
from llmbench.text.dedup import candidate_pairs, minhash

datasets = pytest.importorskip("datasets")


def test_clean_minhash_and_contamination_under_datasets(data, tmp_path, ledger):
    datasets.disable_progress_bars()
    docs = read_documents(data/"c4_en.jsonl")[:120] + read_documents(data/"xquad_zh.json")[:60] + ["Home | Shop", "<p>A &amp; B</p>"]
    exam = [docs[7][:150], docs[150][:40]]
    table = datasets.Dataset.from_dict(dict(text=docs))

    def judged(row):
        text, _, why = decide(row["text"])
        return dict(text=text, why=why)
    cleaned = table.map(judged, load_from_cache_file=False, keep_in_memory=True).filter(lambda row: not row["why"], load_from_cache_file=False, keep_in_memory=True)["text"][:]
    ours = list(clean_documents(docs))
    signed = table.map(lambda row: dict(signature=minhash(row["text"])), load_from_cache_file=False, keep_in_memory=True)
    pairs = candidate_pairs(np.array(signed["signature"][:], np.uint32), 32, 4) ^ candidate_pairs(np.stack([minhash(d) for d in docs]), 32, 4)
    index = ExamIndex(exam)
    left = table.filter(lambda row: not index.meet(row["text"]), load_from_cache_file=False, keep_in_memory=True)["text"][:]
    wrong = (list(cleaned) != ours) + len(pairs) + (list(left) != list(clean_training(docs, exam)))
    ledger("clean, minhash, contamination over 182 real documents", "the same functions in datasets.map and filter", wrong, 0)
    assert len(left) == len(docs) - 2


def test_iterable_datasets_stream_the_same(data):
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in iter_documents(data/"c4_en.jsonl")))
    kept = [row["text"] for row, _ in zip(stream.map(lambda row: dict(zip(("text", "why"), decide(row["text"])[::2]))).filter(lambda row: not row["why"]), range(40))]
    assert kept == [t for t, _ in zip(clean_documents(iter_documents(data/"c4_en.jsonl")), range(40))]
