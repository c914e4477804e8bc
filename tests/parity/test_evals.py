"use.evals against the official definitions of SQuAD and MLQA, transformers on the same weights, and lm-eval where it is installed"
import collections
import csv
import json
import math
import re
import string
import sys
import unicodedata
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate
from llmbench.use.evals import (ask, choice_accuracy, choice_logps, classification, exact_match, normalise, score, squad_tokens, sum_up, text_logps,
                                text_score, token_f1)

ASCII_PUNCTUATION = set(string.punctuation)
ALL_PUNCTUATION = ASCII_PUNCTUATION | {chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")}


def official(text, punctuation=ASCII_PUNCTUATION):
    "`normalize_answer` of SQuAD's evaluate-v1.1.py, or of MLQA's script for English with its larger punctuation"
    text = "".join(ch for ch in text.lower() if ch not in punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()


def mlqa_chinese(text):
    "`normalize_answer(s, 'zh')` of MLQA's script: no articles; each character of U+4E00 to U+9FA5 is a token"
    text = "".join(ch for ch in text.lower() if ch not in ALL_PUNCTUATION)
    tokens, word = [], ""
    for ch in text:
        if re.search("[\u4e00-\u9fa5]", ch):
            tokens += [*word.split(), ch]
            word = ""
        else: word += ch
    return tokens + word.split()


def official_f1(said, right):
    shared = sum((collections.Counter(said) & collections.Counter(right)).values())
    if not shared: return 0.
    precision, recall = shared/len(said), shared/len(right)
    return 2*precision*recall/(precision + recall)


def xquad(data, lang):
    "(gold, a sentence around it, the gold of the question before): right, too long, wrong"
    rows, before = [], ""
    for article in json.loads((data/f"xquad_{lang}.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for q in paragraph["qas"]:
                gold, at = q["answers"][0]["text"], q["answers"][0]["answer_start"]
                rows.append((gold, paragraph["context"][max(0, at - 25):at + len(gold) + 12], before))
                before = gold
    return rows


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_f1_xquad(data, ledger, lang):
    plain = mlqa_chinese if lang == "zh" else lambda s: official(s, ALL_PUNCTUATION)
    error, matches, n = 0., 0, 0
    for gold, around, other in xquad(data, lang):
        for answer in (gold, around, other, gold.upper() + "!"):
            if not plain(answer) or not plain(gold): continue
            if (lang == "zh") != bool(re.search("[\u4e00-\u9fff]", gold if lang == "zh" else gold + answer)): continue
            error = max(error, abs(token_f1(answer, gold) - official_f1(plain(answer), plain(gold))))
            matches += exact_match(answer, gold, squad=True) != (plain(answer) == plain(gold))
            n += 1
    assert n > (2500 if lang == "zh" else 4500)
    ledger(f"token F1, {n} answers of xquad_{lang}", "MLQA's definition", error, 1e-12)
    ledger(f"SQuAD's exact match, {n} answers of xquad_{lang}", "MLQA's definition", matches, 0)


def test_f1_squad(data, ledger):
    "SQuAD's own script knows ASCII punctuation only: equal wherever no other stands"
    error, n = 0., 0
    for gold, around, other in xquad(data, "en"):
        for answer in (gold, around, other):
            if re.search("[\u4e00-\u9fff]", answer) or set(gold + answer) & (ALL_PUNCTUATION - ASCII_PUNCTUATION) or not official(gold) or not official(answer): continue
            error, n = max(error, abs(token_f1(answer, gold) - official_f1(official(answer), official(gold)))), n + 1
    assert n > 2500
    ledger(f"token F1, {n} answers of xquad_en", "SQuAD v1.1's definition", error, 1e-12)


def test_xquad_golds_match_themselves(data):
    "Every gold is its own exact match, and no two different ones of a paragraph's neighbours are confused"
    for lang in ("en", "zh"):
        rows = xquad(data, lang)
        assert all(exact_match(gold, gold) and exact_match(f" {gold}。", gold) and token_f1(gold, gold) == 1 for gold, _, _ in rows)
        different = [(a, b) for a, _, b in rows if exact_match(a, b) and "".join(a.lower().split()) != "".join(b.lower().split())]
        assert len(different) <= 3, different


def test_f1_by_hand():
    assert squad_tokens("The U.S., a (big) city-state") == ["us", "big", "citystate"]
    assert squad_tokens("A 区的 the 市场", "A 区") == ["a", "区", "的", "the", "市", "场"]
    assert token_f1("in the big city", "the city of big dogs") == pytest.approx(2*2/(3 + 4))
    assert token_f1("cat cat dog", "cat dog dog") == pytest.approx(2*2/(3 + 3))
    assert token_f1("红色的猫", ["鸟", "红猫"]) == pytest.approx(2*2/(4 + 2))
    assert token_f1("", "") == 1 and token_f1("", "cat") == 0 and token_f1("the", "cat") == 0


SAME = [("1,000", "1000"), ("１，０００", "1,000"), ("1,234,567.50", "1234567.50"), ("−5", "-5"), ("20–18", "20-18"), ("Paris.", "paris"), ("“Paris”", "Paris"),
        ("《红楼梦》", "红楼梦"), ("136 次", "136次"), ("我 是 Ann", "我是ann"), ("Ann’s", "Ann's"), ("U.S.A.", "usa"), ("**Oslo**", "Oslo"), ("- Oslo", "Oslo"), ("Straße", "STRASSE"),
        ("é", "e\u0301"), ("Yes!", "yes"), ("\ufeffcat", "cat"), ("(b)", "B"), ("red,  blue", "red blue"), ("卡万·肖特", "卡万肖特"), ("Ｃ＃", "c#"), ("well‐known", "well-known")]
DIFFERENT = [("3.5", "35"), ("3.5", "3,5"), ("-5", "5"), ("C#", "C"), ("C++", "C"), ("10²", "102"), ("½", "1/2"), ("1,2,3", "123"), ("100,20", "10020"), ("12,345,6", "123456"),
             ("10:30", "1030"), ("The cat", "cat"), ("50%", "50"), ("$5", "5"), ("a_b", "ab"), ("四", "4"), ("?", "!"), ("", "?"), ("1/2", "12"), ("(5)(6)", "56"), ("汉语", "漢語"), (".5", "5"),
             ("1.000", "1000"), ("x@y", "xy"), ("1,0000", "10000"), ("1234,567", "1234567"), ("10:30", "10 30"), ("1,2", "1 2"), ("3.141,592", "3.141592")]


@pytest.mark.parametrize("a,b", SAME)
def test_same(a, b): assert exact_match(a, b) and exact_match(b, a)


@pytest.mark.parametrize("a,b", DIFFERENT)
def test_different(a, b): assert not exact_match(a, b) and not exact_match(b, a)


def test_exact_match_of_several():
    assert exact_match("the cat", ["a dog", "The cat."]) and not exact_match("cat", ["a dog", "The cat"]) and exact_match("cat", ["a dog", "The cat"], squad=True)
    assert not exact_match("cat", [])


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aB1 0,.:-–'’()*的，。：１#_ß é+%\u3000/", max_size=14))
def test_normalise_twice_is_once(text): assert normalise(normalise(text)) == normalise(text)


def test_classification_enumerated():
    "Against counting by hand over random labels, and against the definition of F1"
    generator = np.random.default_rng(0)
    for _ in range(50):
        predicted, gold = (generator.choice(["x", "y", "z"], 9, p=[.2, .5, .3]).tolist() for _ in range(2))
        table = collections.Counter(zip(predicted, gold))
        tp, fp, fn = table["x", "x"], table["x", "y"] + table["x", "z"], table["y", "x"] + table["z", "x"]
        precision, recall = tp/(tp + fp) if tp + fp else 0, tp/(tp + fn) if tp + fn else 0
        f1 = 2*precision*recall/(precision + recall) if tp else 0
        right = dict(accuracy=sum(table[c, c] for c in "xyz")/9, precision=precision, recall=recall, f1=f1)
        assert classification(predicted, gold, "x") == pytest.approx(right)


TEXTS = ["To be, or not to be: that is the question.", "床前明月光，疑是地上霜。", "Ann keeps a red bird. The bird sings at night, and Ann sleeps by day.", "é"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Our decoder with random weights made louder, the same in transformers, and a tokenizer"
    from transformers import LlamaForCausalLM
    torch.manual_seed(3)
    tokenizer = BPE.train(TEXTS*2, 290)
    ours = Transformer(Config(tokenizer.vocab_size, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=96, max_length=2048, tied=False)).eval()
    with torch.no_grad():
        for p in ours.parameters():
            if p.dim() > 1: p.mul_(6)
        ours.head.weight[tokenizer.end_id] *= 2.2  # so that some answers end early
    folder = tmp_path_factory.mktemp("twin")
    ours.save_pretrained(folder)
    return ours, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def loop_logps(theirs, ids, length, stride):
    "One forward of transformers per token, with the context that the definition promises: each token once, in the window that ends with its stride"
    found = []
    for t in range(1, len(ids)):
        end = length if t < length else length + stride*math.ceil((t + 1 - length)/stride)
        start = max(0, min(end, len(ids)) - length)
        with torch.no_grad(): logits = theirs(torch.tensor([ids[start:t]])).logits[0, -1]
        found.append(logits.double().log_softmax(-1)[ids[t]].item())
    return torch.tensor(found)


def test_text_logps(pair, ledger):
    ours, theirs, tokenizer = pair
    ids, error = [tokenizer.bos_id, *tokenizer.encode(TEXTS[2])], 0.
    for length, stride in ((8, None), (8, 7), (8, 3), (8, 1), (5, 2), (2, 1), (1000, None), (1000, 1)):
        right = loop_logps(theirs, ids, length, stride or length - 1)
        for model in (ours, theirs):
            got = text_logps(model, ids, length, stride)
            assert got.shape == (len(ids) - 1,), f"windows of {length}, stride {stride}: a token is missing or scored twice"
            error = max(error, (got - right).abs().max().item())
    ledger("log-probabilities, eight pairs of window and stride", "loop over transformers' Llama", error, 1e-4)


def test_windows_lm_eval(pair, ledger):
    "lm-eval feeds one token fewer into each window than it holds: our windows of length L are its max_seq_len L - 1"
    utils = pytest.importorskip("lm_eval.utils")
    ours, theirs, tokenizer = pair
    ids, error = [tokenizer.bos_id, *tokenizer.encode(" ".join(TEXTS))], 0.
    for length, stride in ((16, 15), (16, 5), (9, 1)):
        found = []
        for context, new in utils.get_rolling_token_windows(ids[1:], ids[0], length - 1, length - stride):
            with torch.no_grad(): logits = theirs(torch.tensor([context])).logits[0, -len(new):]
            found.append(logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0])
        error = max(error, (torch.cat(found) - text_logps(ours, ids, length, stride)).abs().max().item())
    ledger("log-probabilities in windows", "lm_eval.utils.get_rolling_token_windows", error, 1e-4)


def test_text_score(pair, ledger):
    ours, theirs, tokenizer = pair
    nats, tokens = [], []
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        with torch.no_grad(): loss = theirs(ids, labels=ids).loss.item()
        nats.append(loss*(ids.shape[1] - 1))
        tokens.append(ids.shape[1] - 1)
    got = text_score(ours, tokenizer.encode, TEXTS + [""], tokenizer.bos_id, 256)
    n_bytes = [len(t.encode()) for t in TEXTS]
    assert (got.documents, got.tokens) == (4, sum(tokens)) and n_bytes[1] == 36 and n_bytes[3] == 2
    ledger("perplexity of documents, relative", "transformers' Llama loss", abs(got.perplexity/math.exp(sum(nats)/sum(tokens)) - 1), 1e-4)
    ledger("bits per byte of documents", "transformers' Llama loss", abs(got.bits_per_byte - sum(nats)/math.log(2)/sum(n_bytes)), 1e-4)
    every = np.sort([sum(nats[i] for i in d)/math.log(2)/sum(n_bytes[i] for i in d) for d in product(range(4), repeat=4)])
    width = every[-1] - every[0]
    assert np.abs(np.subtract((got.low, got.high), np.quantile(every, [.025, .975]))).max() < .03*width, (got, np.quantile(every, [.025, .975]))
    alone = text_score(theirs, tokenizer.encode, TEXTS[:1], tokenizer.bos_id, 256)
    assert alone.low is None and alone.high is None and "[" not in str(alone) and "[" in str(got)
    json.dumps(vars(got))


def mmlu(path):
    "Question, four choices, letter; no header"
    rows = list(csv.reader(path.open(encoding="utf-8")))
    assert all(len(row) == 6 and row[5] in "ABCD" for row in rows)
    prompts = ["\n".join([row[0].strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5])), "Answer:"]) for row in rows]
    return [(prompt, [" A", " B", " C", " D"], "ABCD".index(row[5])) for prompt, row in zip(prompts, rows)], rows


@pytest.mark.parametrize("name,n", [("abstract_algebra", 100), ("computer_security", 100), ("high_school_biology", 310)])
def test_mmlu(data, pair, ledger, name, n):
    "Choices of real questions against a loop over transformers, one token at a time; letters, and whole answers per character"
    ours, theirs, tokenizer = pair
    letters, rows = mmlu(data/f"mmlu_{name}_test.csv")
    assert len(letters) == n
    spelled = [(row[0].strip() + "\nAnswer:", [" " + choice for choice in row[1:5]], gold) for row, (_, _, gold) in zip(rows, letters)]
    some = [i for i in range(n) if len(letters[i][0]) < 400][:12]
    error, right, normed = 0., 0, 0
    for prompt, choices, gold in [letters[i] for i in some] + [spelled[i] for i in some]:
        stem, sums = tokenizer.encode(prompt), []
        for choice in choices:
            end = tokenizer.encode(choice)
            with torch.no_grad(): logps = theirs(torch.tensor([[tokenizer.bos_id] + stem + end])).logits[0].double().log_softmax(-1)
            sums.append(sum(logps[len(stem) + i, token].item() for i, token in enumerate(end)))
        got = choice_logps(ours, tokenizer.encode, prompt, choices, tokenizer.bos_id)
        error = max(error, (got - torch.tensor(sums)).abs().max().item())
        right += int(np.argmax(sums) == gold)
        normed += int(np.argmax([s/len(c.strip()) for s, c in zip(sums, choices)]) == gold)
    both = [letters[i] for i in some] + [spelled[i] for i in some]
    told, per_character = (choice_accuracy(ours, tokenizer.encode, both, tokenizer.bos_id, per_character=flag) for flag in (False, True))
    assert (told.correct, told.n, told.chance) == (right, len(both), .25) and per_character.correct == normed and "per character" in per_character.task
    ledger(f"choices of MMLU {name}", "loop over transformers' Llama", error, 1e-3)


def test_mmlu_dev(data):
    for name in ("abstract_algebra", "computer_security", "high_school_biology"): assert len(mmlu(data/f"mmlu_{name}_dev.csv")[0]) == 5


def test_choice_spaces_and_padding(pair):
    ours, theirs, tokenizer = pair
    together = choice_logps(ours, tokenizer.encode, "Ann keeps a", [" red bird", " b", " question of the night"])
    for model in (ours, theirs):
        alone = torch.cat([choice_logps(model, tokenizer.encode, "Ann keeps a", [c]) for c in (" red bird", " b", " question of the night")])
        assert (together - alone).abs().max() < 1e-3
    moved = choice_logps(ours, tokenizer.encode, "Ann keeps a ", ["red bird", "b", "question of the night"])
    assert (together - moved).abs().max() < 1e-4


def test_ask(pair, ledger):
    "Batched and padded = one by one = transformers' greedy answers"
    ours, theirs, tokenizer = pair
    template = ChatTemplate(tokenizer)
    questions = ["to be?", "床前明月光，疑是地上霜。", "Ann keeps a red bird. Why?", [dict(role="system", content="sing"), dict(role="user", content="é")], "?", "sing", "night"]
    expected, ended = [], 0
    for q in questions:
        ids, _ = template.render([dict(role="user", content=q)] if isinstance(q, str) else q, prompt=True)
        out = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.end_id, pad_token_id=0)[0, len(ids):].tolist()
        ended += 0 < (out + [tokenizer.end_id]).index(tokenizer.end_id) < 12
        expected.append(tokenizer.decode(out[:out.index(tokenizer.end_id)] if tokenizer.end_id in out else out).strip())
    assert len(set(expected)) > 2 and 0 < ended < len(questions), (expected, ended)
    different = sum(a != b for batch in (1, 2, 32) for a, b in zip(ask(ours, template, questions, 12, batch), expected))
    ledger("greedy answers in batches of 1, 2 and 32", "transformers' generate", different, 0)
    assert ask(ours, template, []) == []


def test_score_twice_is_one_number(pair):
    ours, _, tokenizer = pair
    template, questions = ChatTemplate(tokenizer), ["to be?", "Ann?", "床前"]
    first = ask(ours, template, questions, 8)
    golds = [first[0], "no", first[2]]
    assert score(first, golds, task="x", chance=.1) == score(ask(ours, template, questions[::-1], 8, 2)[::-1], golds, task="x", chance=.1)
    assert score(first, golds).correct == 2
    assert score(["red cat", "dog"], ["red dog", "dog"], grade=token_f1).accuracy == .75
    assert score(["x", "y"], [1, 2], grade=lambda answer, gold: (answer, gold) == ("y", 2)).correct == 1
    marks, facts = ["a", "a", "b", "b", "a", "a"], list("xxyyzz")
    assert score(marks, ["a"]*6, groups=facts, level=.8, task="q", chance=.5) == sum_up([1, 1, 0, 0, 1, 1], "q", .5, facts, .8) != sum_up([1, 1, 0, 0, 1, 1], "q", .5, None, .8)
