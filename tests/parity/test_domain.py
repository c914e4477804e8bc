"The domain exam: built without leaks, marked as by hand, the same number twice"
import copy
from dataclasses import replace

import pytest
import torch

from llmbench.bench.domain import Domain, build_exam, clerk_pairs, clerk_talks, domain_marks, examine, ideal, place_of, shelf
from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.use.evals import bleu, bleu_counts, exact_match

WORLD = World(3, 12)


@pytest.mark.parametrize("lang", ["en", "zh", "both"])
def test_the_exam_is_split_by_ware_and_clean(lang):
    exam = build_exam(WORLD, lang)
    assert not {q.person for q in exam.practice} & {q.person for q in exam.test} and exam.leaked == 0 and exam.judged == len(exam.test) == len(exam.practice)
    assert {q.attribute for q in exam.test} == {"price", "stock", "place", "sum"}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_planted_copies_are_found_and_only_they(lang):
    exam = build_exam(WORLD, lang)
    copies = [replace(q, person=f"{q.person} ") for q in exam.practice[::7]]  # filed under another name
    planted = build_exam(WORLD, lang, exam.practice, exam.test + copies)
    assert planted.leaked + sum(q.person.endswith(" ") for q in planted.test) == len(copies) and planted.leaked >= .9*len(copies)
    assert [q for q in planted.test if not q.person.endswith(" ")] == exam.test


def test_a_random_split_is_refused():
    exam = build_exam(WORLD, "en")
    with pytest.raises(UserError, match="16 wares are practised and examined.*by ware"): build_exam(WORLD, "en", exam.practice[::2] + exam.test[::2], exam.practice[1::2] + exam.test[1::2])


def test_marks_by_hand():
    "A clerk who is right about the first ware, polite about the second, and silent otherwise"
    exam = build_exam(WORLD, "en")
    wares = list(dict.fromkeys(q.person for q in exam.test))
    said = [WORLD.say(q).strip() if q.person == wares[0] else ideal(WORLD, q) if q.person == wares[1] else "Hm." for q in exam.test]
    marks = domain_marks(WORLD, exam.test, said)
    assert len(wares) == 8 and marks["facts"]["value"] == marks["sums"]["value"] == pytest.approx(2/8)
    assert marks["exact match"]["value"] == marks["polite"]["value"] == pytest.approx(1/8)
    assert (marks["facts"]["n"], marks["sums"]["n"], marks["place f1"]["n"]) == (72, 24, 24)
    placed = [q for q in exam.test if q.attribute == "place"]
    labels = sorted({q.answer for q in placed})
    right = {label: (sum(q.answer == label and q.person in wares[:2] for q in placed), sum(q.answer == label for q in placed)) for label in labels}
    assert marks["place recall"]["value"] == pytest.approx(sum(h/n for h, n in right.values())/len(labels))
    assert marks["place precision"]["value"] == pytest.approx(sum(h > 0 for h, _ in right.values())/len(labels))
    assert marks["place f1"]["value"] == pytest.approx(sum(2*h/(h + n) for h, n in right.values())/len(labels))
    assert marks["BLEU"]["value"] == pytest.approx(bleu(bleu_counts(said, [ideal(WORLD, q) for q in exam.test]).sum(0)))
    for name, mark in marks.items(): assert mark["low"] <= mark["value"] <= mark["high"], name
    assert marks["facts"]["high"] - marks["facts"]["low"] > .4, "eight wares are eight, not 72"
    assert all(exact_match(ideal(WORLD, q), ideal(WORLD, q)) and WORLD.grade(q, ideal(WORLD, q)) for q in exam.test)


def test_the_place_in_an_answer():
    assert [place_of(a, "en") for a in ("in the attic.", "the yard or the attic", "nowhere")] == ["attic", "yard", "none"]
    assert [place_of(a, "zh") for a in ("放在阁楼。", "橱窗")] == ["attic", "window"]


def test_talks_and_pairs_are_true():
    exam = build_exam(WORLD, "both")
    talks, pairs = clerk_talks(WORLD, exam.practice, 5), clerk_pairs(WORLD, exam.practice)
    assert [t["messages"][0]["content"] for t in talks] == [q.text for q in exam.practice] and talks == clerk_talks(WORLD, exam.practice, 5) != clerk_talks(WORLD, exam.practice, 6)
    assert all(WORLD.grade(q, t["messages"][1]["content"]) for q, t in zip(exam.practice, talks)) and len(pairs) == 2*len(exam.practice)
    assert all(WORLD.grade(q, pair[side]) for q, pair in zip([q for q in exam.practice for _ in range(2)], pairs) for side in ("chosen", "rejected"))


def test_the_same_exam_twice_and_in_another_order():
    torch.manual_seed(0)
    bpe = BPE.train(WORLD.documents("en", "shop"), 400)
    model, template, exam = Transformer(Config(vocab_size=bpe.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=128)), ChatTemplate(bpe), build_exam(WORLD, "en")
    once = examine(model, template, WORLD, exam, "en", 9)
    assert examine(copy.deepcopy(model), template, WORLD, exam, "en", 9) == once
    turned = examine(model, template, WORLD, replace(exam, test=exam.test[::-1]), "en", 9)
    assert all(turned[k]["value"] == pytest.approx(once[k]["value"]) for k in once)
    rows = shelf(WORLD, template, exam, Domain(lang="en", length=64))
    said = template.tokenizer.decode(rows.talks.ids[rows.talks.mask > 0].tolist(), specials=False)
    assert not any(q.person in said for q in exam.test), "no examined ware is practised"
