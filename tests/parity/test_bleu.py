"BLEU against sacrebleu, macro precision, recall and F1 against pencil, their intervals against enumeration"
import json
from itertools import product

import numpy as np
import pytest

from llmbench.use.evals import bleu, bleu_counts, bleu_tokens, classification, corpus_interval, label_counts, macro

sacrebleu = pytest.importorskip("sacrebleu", reason="pip install '.[dev]'")

MADE = [("The cat is on the mat.", "The cat sat on the mat, didn't it?"), ("One lamp costs 1,000.5 coins.", "One lamp costs 1,000.5 coins."), ("a", "a b c d e f"),
        ("a a a a a a a", "a a b"), ("x-ray (3-4) costs $5 & more; ok", "x-ray (3-5) costs $5 & less: ok"), ("", "something was expected here"), ("totally different words there now", "nothing alike in this line")]
ZH = [("台灯放在阁楼。", "很乐意！台灯放在橱窗。"), ("一件水壶卖12个铜钱。", "水壶的价格是12个铜钱。"), ("我不知道，a b。", "3件卖27个铜钱，a b。")]


@pytest.mark.parametrize("name, pairs, cut", [("made up", MADE, "13a"), ("Chinese", ZH, "zh"), ("both", MADE + ZH, "zh")])
def test_bleu(name, pairs, cut, ledger):
    answers, golds = map(list, zip(*pairs))
    for said, gold in ([answers, golds], [golds, answers]) if "" not in answers else [[answers, golds]]:
        theirs = sacrebleu.corpus_bleu(said, [gold], tokenize=cut).score
        ledger(f"corpus BLEU, {name}", f"sacrebleu, {cut}", abs(bleu(bleu_counts(said, gold).sum(0)) - theirs), 1e-9)
        for a, g in zip(said, gold): assert bleu(bleu_counts([a], [g])[0]) == pytest.approx(sacrebleu.sentence_bleu(a, [g], tokenize=cut, use_effective_order=False).score, abs=1e-9), a


@pytest.mark.parametrize("file, cut", [("alpaca_en.json", "13a"), ("sharegpt_medical_zh.jsonl", "zh")])
def test_bleu_on_real_answers(data, file, cut, ledger):
    text = (data/file).read_text()
    golds = [r["output"] for r in json.loads(text)][:300] if cut == "13a" else [json.loads(line)["conversations"][1]["value"] for line in text.splitlines()[:300]]
    golds = [" ".join(g.split()) for g in golds]
    answers = [g[:len(g)//2] + other[:20] for g, other in zip(golds, golds[1:] + golds[:1])]
    ours = [" ".join(map(" ".join, [bleu_tokens(x)])) for x in answers + golds]
    theirs = sacrebleu.corpus_bleu(ours[:len(answers)], [ours[len(answers):]], tokenize="none").score
    ledger(f"corpus BLEU of {len(answers)} answers, {file}, our words", "sacrebleu on the same words", abs(bleu(bleu_counts(answers, golds).sum(0)) - theirs), 1e-9)
    tokenizer = sacrebleu.metrics.BLEU(tokenize=cut).tokenizer
    ledger(f"share of texts cut otherwise, {file}", f"sacrebleu's {cut}", np.mean([tokenizer(x) != y for x, y in zip(answers + golds, ours)]), .02)
    ledger(f"corpus BLEU, {file}, points", f"sacrebleu, {cut}", abs(bleu(bleu_counts(answers, golds).sum(0)) - sacrebleu.corpus_bleu(answers, [golds], tokenize=cut).score), .01)


def test_bleu_by_hand():
    counts = bleu_counts(["the cat sat on the mat"], ["the cat is on the mat"])
    assert counts.tolist() == [[6, 6, 5, 3, 1, 0, 6, 5, 4, 3]]
    assert bleu(counts[0]) == pytest.approx(100*(5/6*3/5*1/4*.5/3)**.25)
    short = bleu_counts(["a b c d e"], ["a b c d e f g h"])[0]
    assert bleu(short) == pytest.approx(100*np.exp(1 - 8/5))
    zeros = bleu_counts(["a q b w"], ["a b x y"])[0]  # 2/4, then no pair of 3, no triple of 2, no run of 1: 1/2, 1/4, 1/8 of a match
    assert bleu(zeros) == pytest.approx(100*(2/4*(1/2)/3*(1/4)/2*(1/8)/1)**.25)
    assert bleu(bleu_counts(["a"], ["a"])[0]) == 0 and bleu(bleu_counts(["q"], ["a"])[0]) == 0
    with pytest.raises(ValueError, match="2 answers for 1"): bleu_counts(["a", "b"], ["a"])


def test_macro_by_hand():
    predicted, gold = "cat cat dog cat dog owl".split(), "cat cat cat dog dog bird".split()
    sums = label_counts(predicted, gold, ["cat", "dog", "bird", "fish"]).sum(0)
    assert sums.tolist() == [[2, 1, 0, 0], [3, 2, 0, 0], [3, 2, 1, 0]]
    assert macro(sums) == pytest.approx(dict(precision=(2/3 + 1/2 + 0)/3, recall=(2/3 + 1/2 + 0)/3, f1=(2/3 + 1/2 + 0)/3)), "the fish does not occur and does not count"
    for label in ("cat", "dog", "bird"):
        alone = macro(label_counts(predicted, gold, [label]).sum(0))
        assert alone == pytest.approx({k: v for k, v in classification(predicted, gold, label).items() if k != "accuracy"})
    with pytest.raises(ValueError, match="1 predictions"): label_counts(["a"], ["a", "b"], ["a"])


def test_macro_against_scikit_learn(ledger):
    metrics = pytest.importorskip("sklearn.metrics", reason="not among the project's packages")
    generator = np.random.default_rng(0)
    gold, predicted = (["abcd"[i] for i in generator.integers(4, size=60)] for _ in range(2))
    theirs = metrics.precision_recall_fscore_support(gold, predicted, labels=sorted(set(gold)), average="macro", zero_division=0)[:3]
    ledger("macro precision, recall, F1", "scikit-learn", max(abs(a - b) for a, b in zip(macro(label_counts(predicted, gold, list("abcd")).sum(0)).values(), theirs)), 1e-12)


def test_interval_of_a_ratio_against_enumeration(ledger):
    "All 27 resamples of three rows; and whole groups are drawn"
    rows = np.array([[1., 4.], [3., 5.], [9., 10.]])
    def ratio(s): return s[0]/s[1]
    every = np.sort([ratio(rows[list(i)].sum(0)) for i in product(range(3), repeat=3)])
    low, high = corpus_interval(rows, ratio, level=.8, draws=20000)
    ledger("bootstrap interval of a ratio of sums", "all resamples", max(abs(low - np.quantile(every, .1, method="inverted_cdf")), abs(high - np.quantile(every, .9, method="inverted_cdf"))), 1e-9)
    twice = np.repeat(rows, 2, 0)
    assert corpus_interval(twice, ratio, level=.8, draws=4000, groups=[0, 0, 1, 1, 2, 2], seed=1) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="no spread"): corpus_interval(rows, ratio, groups=["a"]*3)
