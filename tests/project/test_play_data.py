"The data widgets without a browser: what is shown is what was computed, and nothing the user types becomes markup"
import html
import re

import numpy as np
import pytest

from llmbench.play.data import DIRTY, REPRINT, STORY, agreement, cleaning_view, cleaning_viewer, difference, minhash_explorer
from llmbench.text.clean import PERSONAL, REPAIRS, clean
from llmbench.text.dedup import candidate_pairs, minhash


def sides(markup):
    "The text before and the text after, read back from the marks"
    marked = re.sub("^<div[^>]*>|</div>$", "", markup)
    def plain(t): return html.unescape(re.sub("<[^>]+>", "", t)).replace("↵", "").replace("·", " ").replace("□", "\u3000")
    return plain(re.sub("<ins.*?</ins>", "", marked, flags=re.S)), plain(re.sub("<del.*?</del>", "", marked, flags=re.S))


@pytest.mark.parametrize("name", DIRTY)
def test_both_texts_can_be_read_from_the_marks(name):
    before = DIRTY[name].replace("\u200b", "")
    assert sides(difference(before, clean(before))) == (before, clean(before))


def test_markup_of_the_user_stays_text():
    shown = cleaning_view("<script>alert(1)</script><img src=x onerror=alert(2)> & so on", ())
    assert "<script" not in shown and "<img" not in shown and "&lt;script" in shown and "Changed by: nothing" in shown
    assert "<script" not in cleaning_view("&lt;script>alert(1)&lt;/script> hello", tuple(REPAIRS))


def test_verdicts():
    assert "<b>stays</b>" in cleaning_view(DIRTY["English"], (*REPAIRS, *PERSONAL)) and "<b>dropped: length (1)" in cleaning_view("hi", ())
    assert "repeated words" in cleaning_view(DIRTY["Spam"], ()) and "empty" in cleaning_view("", ())
    panel = cleaning_viewer()
    panel.controls["sample"].value = "中文"
    assert panel.values["text"] == DIRTY["中文"] and panel.error is None


def test_the_explorer_says_what_lsh_would():
    panel = minhash_explorer()
    for bands, rows in ((1, 1), (21, 6), (5, 16), (64, 2)):
        for other in (REPRINT, STORY, "Oban mends clocks and the town is late", ""):
            rows_of = np.stack([minhash(t, bands*rows, 3) for t in (STORY, other)])
            assert panel.redraw(b=other, bands=bands, rows=rows) == bool(candidate_pairs(rows_of, bands, rows)), (bands, rows, other)
    assert agreement(STORY, REPRINT, 3, 2)[2].shape == (2, 3)
