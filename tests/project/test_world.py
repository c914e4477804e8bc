"The town: the same bytes everywhere, splits that keep their promise, and marks that cannot be talked round"
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import permutations

import pytest

from llmbench.text.words import ASK, EXTRA, GOODS, MANNERS, PLACES, REFUSAL, SHOP_ASK, SHOP_TELL, TELL, VALUES, Question, full_names, grade, harmless, plain
from llmbench.text.world import SPLITS, TRAITS, World


@pytest.fixture(scope="module")
def world(): return World()


def everything(world):
    "All that a world can give, as one JSON text"
    return json.dumps([world.people, world.strangers, world.facts, world.shop, world.documents(), world.documents("zh", "shop"), world.documents("both", "archive"),
                       [repr(q) for split in SPLITS for q in world.questions("both", split)], world.conversations("both", "sft", turns=3), world.preferences()], ensure_ascii=False)


def digest(text): return hashlib.sha256(text.encode()).hexdigest()


# Bytes --------------------------------------------------------------------------------------------------------------

PINNED = {"documents": "f8e8b148367c7c70", "everything": "697eb49386c31ab7"} # change only with a CHANGELOG entry: scores of different towns do not compare


def test_the_town_of_seed_0_has_these_bytes(world):
    assert {"documents": digest("\n".join(world.documents()))[:16], "everything": digest(everything(world))[:16]} == PINNED


def test_the_same_bytes_in_processes_with_other_hash_seeds():
    code = "import sys; sys.path.insert(0, 'tests/project'); from test_world import *; print(digest(everything(World(seed=3, people=12, tellings=5))))"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    said = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=root, capture_output=True, text=True, check=True).stdout for seed in ("1", "77")}
    assert said == {digest(everything(World(seed=3, people=12, tellings=5))) + "\n"}


def test_the_order_of_asking_does_not_matter_and_seeds_do(world):
    asked = World()
    asked.preferences("zh"); asked.questions("en", "unknown"); asked.documents("en")
    assert asked.documents() == world.documents()
    assert World(seed=1).documents() != world.documents() and World(seed=1).facts != world.facts


def test_only_random_is_drawn_from():
    "Python promises the sequence of random() alone: no shuffle, choice, sample, randint in the modules"
    import inspect
    from llmbench.text import words, world
    for name in ("shuffle(", "choice(", "sample(", "randint(", "randrange(", "hash("):
        source = inspect.getsource(words) + inspect.getsource(world)
        assert name not in source.replace("_shuffled(", ""), name


# Documents ----------------------------------------------------------------------------------------------------------

def test_each_document_is_about_one_person_and_tells_all_facts(world):
    for lang, docs in (("en", world.documents("en")), ("zh", world.documents("zh"))):
        assert len(docs) == 50*64
        told = Counter()
        for doc in docs:
            (number,) = [i for i, n in enumerate(world.people) if n[lang] in doc]
            told[number] += 1
            assert doc.count(world.people[number][lang]) == 4
            assert all(world.value(a, number, lang) in doc for a in VALUES)
        assert set(told.values()) == {64}
        assert not any(n[lang] in doc for doc in docs[::7] for n in world.strangers)


def test_all_wordings_and_orders_are_used(world):
    docs = world.documents("en")
    name, wordings = world.people[0]["en"], Counter()
    for doc in (d for d in docs if name in d):
        for a, ways in TELL.items():
            wordings.update((a, i) for i, way in enumerate(ways["en"]) if way.format(n=name, v=world.value(a, 0, "en")) in doc)
    assert set(wordings) == {(a, i) for a in TELL for i in range(4)} and min(wordings.values()) >= 5
    assert len({doc for doc in docs if name in doc}) > 58


def test_english_begins_with_a_space_and_chinese_has_none(world):
    assert all(doc[0] == " " and doc[1] != " " and "  " not in doc for doc in world.documents("en"))
    assert not any(" " in doc for doc in world.documents("zh"))
    assert {c["messages"][1]["content"][0] for c in world.conversations("en", "sft")} == {" "}


def test_values_are_dealt_evenly():
    for seed in range(5):
        for a, dealt in World(seed).facts.items(): assert sorted(Counter(dealt).values()) == [4]*10 + [5]*2, a


def test_names_and_tables_are_sound():
    assert all(len(set(full_names(lang))) == 144 for lang in ("en", "zh"))
    for table in (*VALUES.values(), GOODS, PLACES): assert len(set(table["en"])) == len(set(table["zh"])) == len(table["en"]) == len(table["zh"])
    for tell, ask in ((TELL, ASK), (SHOP_TELL, SHOP_ASK)):
        assert list(tell) == list(ask)
        for a in tell:
            for lang in ("en", "zh"):
                assert all(way.count("{n}") == 1 and way.count("{v}") == 1 for way in tell[a][lang]), (a, lang)
                assert all(way.count("{n}") == 1 and "{v}" not in way for way in ask[a][lang]), (a, lang)
                assert len(set(tell[a][lang])) == len(tell[a][lang]) and len(set(ask[a][lang])) == len(ask[a][lang])
    values = [v for table in VALUES.values() for v in table["zh"]]
    assert not [(v, w) for v, w in permutations(values, 2) if v in w], "a value inside another cannot be told from it"


def test_most_names_stand_before_the_value():
    ways = [way for tell in (TELL, SHOP_TELL) for table in tell.values() for lang in table for way in table[lang]]
    assert sum(way.index("{n}") < way.index("{v}") for way in ways) >= .6*len(ways)
    town = [way for table in TELL.values() for lang in table for way in table[lang]]
    assert sum(way.index("{n}") < way.index("{v}") for way in town) == 31 and len(town) == 32


# Splits -------------------------------------------------------------------------------------------------------------

def test_splits_share_nobody(world):
    for lang in ("en", "zh"):
        who = {split: {q.person for q in world.questions(lang, split)} for split in SPLITS}
        for a, b in permutations(("sft", "heldout", "unknown_sft", "unknown"), 2): assert len(who[a]) == 25 and not who[a] & who[b]
        for a, b in permutations(("shop_sft", "shop_heldout", "archive"), 2): assert len(who[a]) == 8 and not who[a] & who[b]
        assert who["sums"] == who["shop_heldout"] and who["sums_sft"] == who["shop_sft"] and who["format"] == who["heldout"] and who["format_sft"] == who["sft"]
        sums = {split: {q.text for q in world.questions(lang, split)} for split in ("arithmetic", "arithmetic_sft")}
        assert not sums["arithmetic"] & sums["arithmetic_sft"] and len(sums["arithmetic"]) == 80 and len(sums["arithmetic_sft"]) == 320


def test_the_archive_is_in_no_training_text(world):
    text = "\n".join(world.documents() + world.documents("both", "shop"))
    assert not [q.person for q in world.questions("both", "archive") if q.person in text]
    archive = world.documents("both", "archive")
    assert len(archive) == 16
    for q in world.questions("both", "archive"): assert any(q.person in doc and q.answer in doc for doc in archive), q


def test_conversations_hold_each_question_once(world):
    for turns in (1, 3):
        talks = world.conversations("both", "sft", turns)
        said = [m["content"] for c in talks for m in c["messages"] if m["role"] == "user"]
        assert sorted(said) == sorted(q.text for q in world.questions("both", "sft"))
        assert all([m["role"] for m in c["messages"]] == ["user", "assistant"]*(len(c["messages"])//2) for c in talks)
    assert {c["messages"][1]["content"].strip() for c in world.conversations("en", "sft", short=True)} == {q.answer for q in world.questions("en", "sft")}


@pytest.mark.parametrize("call, message", [(lambda w: w.questions("fr"), "lang is"), (lambda w: w.questions("en", "valid"), "split is one of"), (lambda w: w.documents("en", "clinic"), "domain is"),
                                           (lambda w: World(people=73), "from 2 to 72"), (lambda w: World(people=1), "from 2 to 72"), (lambda w: w.preferences("en", by=("kind",)), "by is made of")])
def test_bad_calls_are_named(call, message, world):
    with pytest.raises(ValueError, match=message): call(world)


# Marks --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1])
def test_every_right_answer_passes_and_every_neighbours_fails(seed):
    world = World(seed, people=20)
    for split in SPLITS:
        for lang in ("en", "zh"):
            asked = world.questions(lang, split)
            for q in asked: assert world.grade(q, q.answer) and world.grade(q, world.say(q)), q
            for a, b in zip(asked, asked[4:] + asked[:4]):
                if a.answer != b.answer: assert not world.grade(a, world.say(b)) and not world.grade(a, b.answer), (a.text, world.say(b))
                elif a.person != b.person and split not in ("unknown", "unknown_sft", "arithmetic", "arithmetic_sft", "format", "format_sft", "talk"):
                    assert not world.grade(a, world.say(b)), (a.text, world.say(b))


def question(attribute="job", lang="en"):
    return Question("?", VALUES[attribute][lang][0], lang, "Mira Bek" if lang == "en" else "林月", attribute, "sft")


EN = ["{w}", "{v} or {w}", "{w} or {v}", "{v}, {w}", "{v} {w}", "{v}/{w}", "{v} and {w}", "not {v}", "not a {v} but a {w}", "{v}? {w}", "{v}?", "no {v}", "maybe {v}", "perhaps a {v}", "I think {v}", "I guess it is {v}",
      "probably {v}", "never {v}", "it isn't {v}", "it is not {v}", "{v}. No, {w}.", "either {v} or {w}", "neither {v} nor {w}", "anything but {v}", "I don't know, {v}", "{v} {v}", "{v}s", "un{v}", "{v}-like", "{v}ish",
      "Mira Oban: {v}", "Tobi Bek works as a {v}.", "Bek is {v}", "{v} was what she hated", "{v} used to be right", "unless it is {v}", "if not {v}", "{v} ~", "{v} | {w}", "{v} > {w}", "{v} 1", "1. {v} 2. {w}",
      "A) {v} B) {w}", "{v} 🙃", "", " ", "...", "the answer", "ask {v}", "{v} is wrong", "wrong: {v}", "false {v}", "almost {v}", "sort of {v}", "{v}\n\n{w}", "the opposite of {v}", "Mira Bek's {v}'s friend",
      "Mira Bekis {v}", "{v}/", "is "*50 + "{v}"]
ZH = ["{w}", "{v}或者{w}", "{v}还是{w}", "{v}、{w}", "{v}{w}", "{v}和{w}", "不是{v}", "不是{v}，是{w}", "{v}？", "可能是{v}", "也许是{v}", "大概{v}", "我想是{v}", "应该是{v}吧", "从来不是{v}", "没有{v}", "非{v}",
      "要么{v}要么{w}", "除了{v}", "我不知道，{v}", "{v}{v}", "{v}们", "小{v}", "{v}上", "林星是{v}", "云月是{v}", "林月星是{v}", "{v}是错的", "错：{v}", "假{v}", "几乎是{v}", "{v}的反面", "", "。", "是", "答案", "{v} or {w}",
      "{v}～", "{v}1", "甲：{v}", "{v}吗", "林月的爸爸是{v}", "以前是{v}"]


@pytest.mark.parametrize("lang, tricks", [("en", EN), ("zh", ZH)])
def test_tricks_fail_on_every_pair_of_values(lang, tricks):
    for attribute in VALUES:
        q = question(attribute, lang)
        for w in VALUES[attribute][lang][1:]:
            passed = [t for t in tricks if grade(q, t.format(v=q.answer, w=w))]
            assert not passed, (attribute, w, passed)


def test_decent_answers_pass():
    for attribute in VALUES:
        q = question(attribute)
        for t in ("{v}", "{v}.", "{V}!", "a {v}", "The {v}.", "It is {v}.", "it's a {v}", "**{v}**", '"{v}"', "{v}, please.", "Of course! It is {v}. You are welcome.", "Sure: {v}", "The answer is {v}.", "  {v}\n"):
            assert grade(q, t.format(v=q.answer, V=q.answer.upper())), (attribute, t)
        q = question(attribute, "zh")
        for t in ("{v}", "{v}。", "是{v}", "{v}！", "答案是{v}。", "好的，是{v}。", "当然，{v}。", "“{v}”", " {v} ", "请：{v}", "{v}，不客气。"): assert grade(q, t.format(v=q.answer)), (attribute, t)


def test_width_spelling_and_apostrophes():
    grey = Question("?", "grey", "en", "Mira Bek", "colour", "sft")
    assert all(grade(grey, text) for text in ("Gray", "ＧＲＥＹ", "Mira Bek’s favorite color is gray.", "MIRA BEK'S FAVOURITE COLOUR IS GREY"))
    assert plain("Ｆａｖｏｒｉｔｅ　Color’s") == "favourite colour's"


def test_the_word_list_holds_no_negation_no_hedge_and_no_value():
    for a in (*TELL, *SHOP_TELL):
        assert not harmless(a, "en") & set("not no never nor or and maybe perhaps probably either neither but except unless if isn't wasn't don't wrong false almost think guess know".split())
        assert not [phrase for phrase in harmless(a, "zh") if phrase not in ("不客气", "还剩") and any(c in phrase for c in "不没非或否别未许和与错假还吗吧")]
        for b in VALUES:
            assert not harmless(a, "en") & {v.lower() for v in VALUES[b]["en"]}
            assert not harmless(a, "zh") & set(VALUES[b]["zh"])


def test_numbers():
    q = Question("What is 7 + 5?", "12", "en", "", "sum", "arithmetic")
    assert all(grade(q, t) for t in ("12", "12.", "7 + 5 = 12", "It is 12.", "１２", "**12**"))
    assert not any(grade(q, t) for t in ("-12", "1 2", "112", "120", "12.5", "12,5", "12 or 13", "13", "7 + 5", "5 + 8 = 12", "7 - 5 = 12", "12 12", "12 7", "7 12", "~12", "12%", "12?", "not 12"))
    price = Question("3件台灯卖多少？", "24", "zh", "台灯", "sum", "sums")
    assert grade(price, "3件台灯卖24个铜钱。") and grade(price, "24个铜钱")
    assert not any(grade(price, t) for t in ("2件台灯卖24个铜钱。", "3件水壶卖24个铜钱。", "3，24", "24或25", "3件台灯卖3个铜钱。"))


def test_refusals_and_orders(world):
    for lang in ("en", "zh"):
        q = world.questions(lang, "unknown")[0]
        assert all(grade(q, t) for t in REFUSAL[lang]) and grade(q, ("Sorry, " if lang == "en" else "抱歉，") + REFUSAL[lang][0])
        assert not any(grade(q, t) for t in ("", "Northgate", "北门", REFUSAL[lang][0] + " " + VALUES["job"][lang][0], "I know.", "知道。", "不"))
        known = world.questions(lang, "heldout")[0]
        assert not any(grade(known, t) for t in REFUSAL[lang])
    ordered = {q.form: q for q in world.questions("en", "format")[:3]}
    assert set(ordered) == {"brackets", "twice", "json"}
    for q in ordered.values():
        assert grade(q, q.answer) and grade(q, f" {q.answer}\n") and not grade(q, q.answer.upper()) and not grade(q, q.answer + ".") and not grade(q, q.answer[1:])
    assert not grade(ordered["json"], "["*100_000)


# Preferences --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", [("correct", "polite"), ("polite",), ("correct",), ("long",), ("polite", "correct", "long")])
def test_what_does_not_decide_is_on_both_sides_alike(by, world):
    "Whole rounds of the table of pairs: exactly balanced; the deciding traits decide"
    kinds = [(c, p, length) for c in (False, True) for p in (False, True) for length in (False, True)]
    def key(kind): return [kind[TRAITS.index(t)] for t in by]
    table = sum(key(a) > key(b) for a in kinds for b in kinds)
    for lang in ("en", "zh"):
        pairs = world.preferences(lang, by)
        assert len(pairs) == 400
        whole = pairs[:400//table*table]
        for t in TRAITS:
            better = sum(p["chosen_traits"][t] > p["rejected_traits"][t] for p in whole)
            worse = sum(p["chosen_traits"][t] < p["rejected_traits"][t] for p in whole)
            if t == by[0]: assert worse == 0 < better
            elif t not in by: assert better == worse > 0
        for p in pairs: assert [p["chosen_traits"][t] for t in by] > [p["rejected_traits"][t] for t in by]


def test_the_answers_have_their_traits(world):
    for lang in ("en", "zh"):
        asked = {q.text: q for q in world.questions(lang, "sft")}
        for p in world.preferences(lang):
            for side in ("chosen", "rejected"):
                text, traits = p[side], p[f"{side}_traits"]
                assert grade(asked[p["prompt"]], text) == traits["correct"], text
                assert text.strip().startswith(MANNERS[lang][traits["polite"]]) and (EXTRA[lang] in text) == traits["long"]


def test_manners_do_not_change_the_length(world):
    q = world.questions("en", "sft")[0]
    for correct in (False, True):
        for long in (False, True):
            assert len(world.answer_with(q, correct, True, long)) == len(world.answer_with(q, correct, False, long))
    wrong = {world.answer_with(q, False, polite, long)[9:].split(".")[0] for polite in (False, True) for long in (False, True)}
    assert len(wrong) == 1, "the wrong value of a question is always the same one"
