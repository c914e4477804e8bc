"Each cleaning rule before and after on real text, against the standard library, ftfy and the standards' own check digits; the books balance"
import html
import json
import re
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbench.core import UserError
from llmbench.text.clean import (PERSONAL, REPAIRS, Account, Clean, blocklist, clean, clean_documents, decide, drop_controls, drop_repeated_lines, is_card, is_id,
                                 mask_personal, mend_mojibake, narrow, repaired, strip_html, tidy)
from llmbench.text.corpus import read_documents
from llmbench.text.quality import RULES, broken_rules, copied_share, language, letter_share, page, symbol_share, top_share, word_length, words


@pytest.fixture(scope="module")
def english(data): return read_documents(data/"c4_en.jsonl")


@pytest.fixture(scope="module")
def chinese(data): return [turn["value"] for line in (data/"sharegpt_medical_zh.jsonl").read_text().splitlines() for turn in json.loads(line)["conversations"]]


# Real text: what stood there, what stands there now, and that nothing else moved ------------------------------------

REAL = [ # file, rule, before, after: found in the real files
    ("english", "html", "if you&apos;re comfortable", "if you're comfortable"),
    ("english", "html", "Grace&apos;s body", "Grace's body"),
    ("chinese", "html", "E/A比值&lt;1提示", "E/A比值<1提示"),
    ("english", "mojibake", "When I firstÂ saw", "When I first saw"),
    ("english", "controls", "against pro-\xadgovernment", "against pro-government"),
    ("english", "controls", "Church \u200bin Burford", "Church in Burford"),
    ("english", "widths", "＊This is made to order", "*This is made to order"),
    ("chinese", "widths", "Ｆｅｒｒｅｉｒａ等[3]报告", "Ferreira等[3]报告"),
    ("chinese", "widths", "\u3000\u3000病情分析：", "病情分析："),
    ("english", "email", "contact us via email at mjgroundworkservices@gmail.com.", "contact us via email at <email>."),
    ("english", "phone", "give McKinley Heating Service Experts a call at 780-800-7092 to", "give McKinley Heating Service Experts a call at <phone> to"),
]


@pytest.mark.parametrize("file, rule, before, after", REAL)
def test_rule_on_real_text(file, rule, before, after, request):
    docs = request.getfixturevalue(file)
    doc = next(d for d in docs if before in d)
    alone = Clean(repairs=(rule,) if rule in REPAIRS else (), personal=(rule,) if rule in PERSONAL else ())
    text, changed = repaired(doc, alone)
    assert list(changed) == [rule] and after in text and before not in text


@pytest.mark.parametrize("rule, worst", [("repeated words", "Access All Records Of 213-484-0480 Now!"), ("copied parts", "The rock cycle"), ("damage", "lak�sd�sz�t�s"), ("symbols", None), ("function words", None), ("length", None)])
def test_quality_rule_on_real_english(rule, worst, english):
    dropped = [d for d in english if broken_rules(d, (rule,))]
    assert 0 < len(dropped) < .05*len(english), "few pages of a corpus that C4 has filtered"
    if worst: assert any(worst in d for d in dropped)


@pytest.mark.parametrize("rule, worst", [("copied parts", "两只脚明显大小不一样"), ("repeated words", "小三阳能治好吗"), ("ellipses", "有什么方法...")])
def test_quality_rule_on_real_chinese(rule, worst, chinese):
    dropped = [d for d in chinese if broken_rules(d, (rule,))]
    assert 0 < len(dropped) < .15*len(chinese) and any(worst in d for d in dropped)


def test_nothing_else_is_altered_in_real_text(english, chinese, data, ledger):
    "What no rule names is untouched: undo what a rule may remove, and both sides are the same letters"
    def letters(text): return re.sub(r"\s|[\u200b\u00ad\ufeff]", "", unicodedata.normalize("NFKC", html.unescape(text))).replace("Â", "")
    wrong = 0
    for doc in english + chinese + read_documents(data/"zh_tang_poems.json") + read_documents(data/"xquad_zh.json"):
        text, changed = repaired(doc, Clean(repairs=tuple(r for r in REPAIRS if r != "repeated lines"), personal=()))
        if changed: wrong += letters(text) != letters(doc)
        else: wrong += text != doc
    ledger("text.clean: documents of four real files altered beyond their rules", "NFKC + html.unescape", wrong, 0)


def test_untouched_where_nothing_is_wrong(data):
    for name in ("xquad_en.json", "zh_tang_poems.json", "tinyshakespeare.txt"):
        docs = read_documents(data/name)
        touched = [d for d in docs if clean(d, Clean(personal=(), repairs=("html", "mojibake", "controls", "widths"))) != d]
        assert len(touched) <= .05*len(docs), (name, len(touched))


@pytest.mark.parametrize("file", ["english", "chinese"])
def test_counts_add_up_on_real_text(file, request):
    docs, account = request.getfixturevalue(file), Account()
    kept = list(clean_documents(docs, account=account, hooks=dict(harmful=blocklist(["bitcoin", "性生活"]))))
    assert account.balanced() and account.read == len(docs) and account.kept == len(kept) and account.dropped["harmful"] > 0
    assert account.untouched == len(set(kept) & set(docs)) or account.untouched == sum((Counter(kept) & Counter(docs)).values())
    assert account.written == sum(map(len, kept))
    assert account.dropped == Counter(reason for d in docs if (reason := decide(d, hooks=dict(harmful=blocklist(["bitcoin", "性生活"])))[2]))
    for rule, (before, after) in account.examples.items():
        if rule in account.changed: assert before != after
        else: assert after == ""
    assert "kept" in str(account) and json.dumps(account.plain())


def test_an_unbalanced_account_says_so():
    assert not Account(read=3, kept=1, dropped=Counter(length=1)).balanced()
    assert not Account(read=2, kept=2, untouched=1).balanced()


# Rule by rule -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before, after", [
    ("<p>a</p><p>b</p>", "a\nb"), ("a<br/>b<hr>c", "a\nb\nc"), ("<td>1</td><td>2</td>", "1 2"), ("<script>x<y</script>z", "z"), ("<style>p{}</style>z", "z"),
    ("<!-- no -->yes<b>!</b>", "yes!"), ("x < y, y > z", "x < y, y > z"), ("Map<String, List<Int>> m", "Map<String, List<Int>> m"), ("<think>so</think>", "<think>so</think>"),
    ("a &amp;lt; b", "a &lt; b"), ("AT&T &copy; &unknown; R&D;", "AT&T © &unknown; R&D;"), ("&#8217;&#x6797;", "’林"), ("<p>never closed", "never closed"), ("<svg><text>no</text></svg>yes", "yes"),
    ('<a href="x>y">link</a>', "link"), ("<P CLASS=x>up</P>", "up"), ("3 <b>4", "3 4"), ("<script src='x'/>after", "after"), ("if a<b and c>d", "if a<b and c>d"), ("<p>if a<b && c>d</p>", "if a<b && c>d"), ("<input type=checkbox checked>x", "x"),
    ('<div class="a b" data-id=7 hidden>x</div>', "x"), ("<p\n  class='x'\n>y", "y"), ("a<i>b</i>", "ab"), ("x <p y> z", "x <p y> z"),
])
def test_html(before, after): assert strip_html(before) == after


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>&"), max_size=40))
def test_html_gives_back_what_was_escaped(text):
    assert strip_html(f"<p>{html.escape(text)}</p>").split() == text.split()
    assert strip_html(text) == text


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_mojibake_is_mended_on_real_text(encoding, english, chinese, data, ledger):
    "Broken on purpose, mended, compared; characters that the wrong decoder cannot hold stay out"
    docs, wrong, tried = english[:150] + chinese[:300] + read_documents(data/"xquad_zh.json")[:60], 0, 0
    for doc in docs:
        doc = re.sub("[\x80-\x9fÂ\xa0\xad\ufffd]", "", doc)
        try: broken = doc.encode().decode(encoding)
        except UnicodeDecodeError: continue
        tried, wrong = tried + 1, wrong + (mend_mojibake(broken) != doc)
    assert tried > 100
    ledger(f"clean.mend_mojibake: real documents not given back (UTF-8 read as {encoding})", "the original", wrong/tried, .01)


def test_mojibake_leaves_real_text_alone(english, chinese, data, ledger):
    docs = chinese + read_documents(data/"xquad_zh.json") + read_documents(data/"xquad_en.json") + [d for d in english if "Â" not in d]
    ledger("clean.mend_mojibake: honest real documents altered", "the original", sum(mend_mojibake(d) != d for d in docs), 0)


def test_mojibake_against_ftfy(english, chinese, ledger):
    ftfy = pytest.importorskip("ftfy")
    docs = [re.sub("[\x80-\x9fÂ\xa0\xad\ufffd]", "", d)[:400] for d in english[:80] + chinese[:160]]
    broken = [d.encode().decode("latin-1") for d in docs]
    differ = sum(mend_mojibake(b) != ftfy.fix_encoding(b) for b in broken)
    ledger("clean.mend_mojibake: share of broken real documents mended otherwise", "ftfy.fix_encoding", differ/len(docs), .05)


@pytest.mark.parametrize("text", ["«CAFÉ» fermé", "NÃO, São Paulo", "10 °C ± 2", "Ångström Øre", "林月“说”——好", "£5 · €7", "Ñandú", "Â", "naïve façade"])
def test_honest_accents_stay(text): assert mend_mojibake(text) == text


def test_controls_and_widths_by_hand():
    assert drop_controls("a\u200b\ufeff\u00ad\x07b\u202ec\r\nd\re\u2028f\u00a0g\u2003h\ti") == "abc\nd\ne\nf g h\ti"
    assert drop_controls("👩\u200d👧 کتاب\u200cها") == "👩\u200d👧 کتاب\u200cها"
    assert narrow("ＡＺａｚ０９％＋＝＠｛｝") == "AZaz09%+=@{}" and narrow("，。！？：；（）《》～") == "，。！？：；（）《》～"
    assert narrow("ｶﾞﾊﾟｱ") == "ガパア" and narrow("ﬁﬂ") == "fifl" and narrow("e\u0301") == "é" and narrow("²½①㎡Ⅳ") == "²½①㎡Ⅳ"
    assert tidy("\n\na \n\n\n\n\tb  \n") == "a\n\n\tb"
    assert drop_repeated_lines("a line that is long enough\nx\nx\n a line that is long enough \n欢迎关注我们的公众号\n欢迎关注我们的公众号") == "a line that is long enough\nx\nx\n欢迎关注我们的公众号"
    assert drop_repeated_lines("nineteen letters 19\n"*2) == "nineteen letters 19\n"*2 and drop_repeated_lines("twenty letters or 20\n"*2) == "twenty letters or 20\n"


@settings(max_examples=60, deadline=None)
@given(st.text("０９ＡＺａｚ09az", max_size=20))
def test_widths_equal_nfkc_on_letters_and_digits(text): assert narrow(text) == unicodedata.normalize("NFKC", text)


def id_number(first):
    "GB 11643 by its table of weights, not by powers of two"
    return first + "10X98765432"[sum(int(d)*w for d, w in zip(first, (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2))) % 11]


@settings(max_examples=100, deadline=None)
@given(st.integers(110000, 659999), st.dates(min_value=__import__("datetime").date(1900, 1, 1)), st.integers(0, 999))
def test_identity_numbers(place, day, serial):
    number = id_number(f"{place}{day:%Y%m%d}{serial:03}") if day.year < 2100 else None
    if not number: return
    assert is_id(number) and mask_personal(f"号{number}。") == f"号{number}。".replace(number, "<id>")
    wrong = str((int(number[0]) + 1) % 10) + number[1:]
    assert not is_id(wrong)


def luhn(number):
    "From the table of doubled digits"
    return sum((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[int(d)] if i % 2 else int(d) for i, d in enumerate(reversed(number))) % 10 == 0


@settings(max_examples=200, deadline=None)
@given(st.text("0123456789", min_size=12, max_size=20))
def test_luhn(number): assert is_card(number) == (luhn(number) and 13 <= len(number) <= 19)


@pytest.mark.parametrize("text, masked", [
    ("Call (262) 555-3773 or +1 262-555-3773.", "Call <phone> or <phone>."), ("电话13800138000，座机010-12345678", "电话<phone>，座机<phone>"), ("+44 20 7946 0958", "<phone>"),
    ("a_b.c+d@mail.example.org!", "<email>!"), ("@handle and me@localhost", "@handle and me@localhost"), ("v1.2.3, 2024-11-25, 192.168.100.200", "v1.2.3, 2024-11-25, 192.168.100.200"),
    ("ISBN 978-3-16-148410-0", "ISBN 978-3-16-148410-0"), ("1234567890123456", "1234567890123456"), ("π = 3.14159265358979323846", "π = 3.14159265358979323846"),
    ("4111111111111111 and 5500 0000 0000 0004", "<card> and <card>"), ("12345678901234567890123", "12345678901234567890123"),
])
def test_personal_data(text, masked): assert mask_personal(text) == masked


def test_patterns_are_linear():
    "A million letters without an @, digits without an end: no pattern may go mad"
    import time
    start = time.process_time()
    for text in ("a"*1_000_000, "1"*1_000_000, "1-"*500_000, "<"*300_000, "&"*300_000, "a."*500_000, "Ã"*300_000, "x@"*300_000, "<p x"*150_000, "<p" + " "*300_000, "<p a="*100_000, "<p " + "hidden "*100_000, "+1 "*300_000): repaired(text)
    assert time.process_time() - start < 20


def test_order_names_and_hooks():
    assert clean("&Acirc;&nbsp;x") == " x", "entities before mojibake, mojibake before controls"
    assert clean("ä½\xa0å¥½") == "你好" and clean("x", Clean(repairs=())) == "x"
    with pytest.raises(UserError, match="nothing is called 'htlm'.*There are: html, mojibake"): Clean(repairs=("htlm",))
    with pytest.raises(UserError, match="nothing is called 'german'"): Clean(languages=("german",))
    assert decide("The bread of the town is good.", Clean(shortest=3), {"mine": lambda t: "bread" in t})[2] == "mine"
    assert decide("Das Brot ist gut und warm und teuer.", Clean(shortest=3, languages=("en", "zh")))[2] == "language latin"
    assert decide("\u200b \n")[2] == "empty"


# Measures -----------------------------------------------------------------------------------------------------------

def test_measures_by_hand():
    p = page("a b a b c\n- d e\n- d e")
    assert words(p.text) == list("ababcdede") and p.lines == ["a b a b c", "- d e", "- d e"]
    assert top_share(p) == 4/9 and top_share(page("a b c")) == 0
    assert copied_share(page("x y z x y z w"), 3) == 3/7 and copied_share(page("x y z w"), 3) == 0
    assert symbol_share(page("# a … b")) == 1 and letter_share(page("a 1 b2 -")) == .5 and word_length(page("aa bbbb")) == 3
    assert letter_share(page("林月住在北门12")) == 6/8


def test_languages_of_real_files(data, english, chinese, ledger):
    poems = read_documents(data/"zh_tang_poems.json")
    wrong = sum(language(d) != "en" for d in english)/len(english), sum(language(d) != "zh" for d in chinese)/len(chinese), sum(language(d) != "zh" for d in poems)/len(poems)
    ledger("quality.language: share of real documents taken for another language (en, zh, Tang poems)", "the files' languages", max(wrong), .02)


def test_good_text_stays(data, english, ledger):
    "Encyclopedia paragraphs in both languages, and C4, which has been filtered once: few may go"
    for name, docs in (("xquad_en", read_documents(data/"xquad_en.json")), ("xquad_zh", read_documents(data/"xquad_zh.json")), ("c4_en", english)):
        ledger(f"quality.broken_rules: share of {name} dropped", "all of it is prose", sum(bool(broken_rules(d)) for d in docs)/len(docs), .08)


def test_lists_of_terms_have_no_function_words(chinese):
    assert broken_rules(next(d for d in chinese if d.startswith("下鼻甲骨折移位术")), ("function words",)) == {"function words": 1}


def test_every_rule_can_fire():
    cases = {"length": "a b", "word length": "internationalization "*25, "few letters": "1 2 3 | "*20 + "the and of", "symbols": "the # of # and # " * 9, "function words": "bread butter "*15,
             "bullets": "\n".join(f"- the bread number {i} of the day" for i in range(12)), "ellipses": "the bread and...\n"*2 + "of the town", "repeated lines": "the bread of the day\n"*5,
             "repeated words": "buy bread "*30, "copied parts": " ".join(f"w{i}" for i in range(30))*2, "damage": "the �� of and " * 9, "filler": "Lorem ipsum dolor"}
    assert set(cases) == set(RULES)
    for rule, text in cases.items(): assert rule in broken_rules(text), rule
