"The vocabulary explorer, called as a notebook's cell would"
import re

from llmbench.play.vocab import expanded, expansion_view, town_tokenizer, vocabulary_explorer


def test_figures_are_those_of_the_tokenizers():
    text = "买水壶要付12个铜钱。A kettle costs 12 coins."
    old, new = town_tokenizer(), expanded("", 100, True)
    shown = expansion_view(text, "", 100, True)
    counts = [int(n) for n in re.findall(r"<b>(\d+) tokens</b>", shown)]
    assert counts == [len(old.encode(text)), len(new.encode(text))] and counts[1] < counts[0]
    assert f"{1 - counts[1]/counts[0]:.0%} fewer tokens" in shown and "100 new tokens" in shown


def test_own_text_and_single_characters():
    own = expanded("龘靐龘靐\n龘靐", 20, True)
    assert "龘靐" in own.pieces(range(600, own.vocab_size)) and "龘靐" not in expanded("龘靐龘靐\n龘靐", 20, False).pieces(range(600, expanded("龘靐龘靐\n龘靐", 20, False).vocab_size))
    panel = vocabulary_explorer("铜钱")
    assert "0 new tokens" in panel.redraw(extra=0) and "no text" in panel.redraw(text="")
    assert "&gt;&lt;" in panel.redraw(text="x", learn="<b><b><b>\n<b><b>", extra=50), "own text is shown, not run"
