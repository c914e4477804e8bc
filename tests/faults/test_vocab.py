"What expansion refuses, and in which words"
import pytest
import torch
from torch import nn

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.vocab import WORDS, check_rows, expand_bpe, expand_model, new_rows, pieces_of, save_expanded, tokens_per_character, train_rows

OLD = BPE.train(["the owl at night, the owl"]*3, 280)
NEW = expand_bpe(OLD, ["买水壶要付铜钱，买水壶"]*3, 12, WORDS)


def model(rows, tied=True): return Transformer(Config(vocab_size=rows, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_hidden=8, tied=tied))


@pytest.mark.parametrize("texts, extra, pattern, words", [([], 5, None, "no text to learn"), (["", ""], 5, WORDS, "no text to learn"), (["ab"], 0, None, "0 new tokens"),
                                                          (["ab"], 5, "(", "cannot be read"), (["ab"], 5, "[a&&b]", "&&")])
def test_texts_and_numbers(texts, extra, pattern, words):
    with pytest.raises(UserError, match=words): expand_bpe(OLD, texts, extra, pattern)


def test_a_pattern_that_would_let_text_become_a_special_token():
    plain = BPE.train("ab", 257, specials=["<s>"])
    with pytest.raises(UserError, match="could also be a piece of text"): expand_bpe(plain, ["<s>"]*9, 5, r"\S+|\s+")


def test_fewer_tokens_than_asked_for_when_the_pairs_run_out():
    assert expand_bpe(OLD, ["xyxy", "xyxy"], 50).vocab_size < OLD.vocab_size + 5
    assert expand_bpe(OLD, ["qwzx"], 50).vocab_size == OLD.vocab_size, "what occurs once becomes no token"


def test_rows():
    with pytest.raises(UserError, match="another id"): pieces_of(OLD, BPE.train(["an owl"], 270))
    with pytest.raises(UserError, match="another id"): expand_model(model(300), NEW, OLD)
    with pytest.raises(UserError, match="pieces, mean or random"): new_rows(torch.ones(3, 2), {3: [0]}, "zeros")
    with pytest.raises(UserError, match="the tokenizer has .* ids, the model 200 rows"): expand_model(model(200), OLD, NEW)
    with pytest.raises(UserError, match="new, rows, all"): train_rows(model(280), 280, "some")
    with pytest.raises(UserError, match="no text"): tokens_per_character(OLD, [])


def test_a_forgotten_table(tmp_path):
    with pytest.raises(UserError, match="the embedding has 280 rows.*\n?.*expand_model"): save_expanded(tmp_path/"x", model(280), NEW)
    assert not (tmp_path/"x").exists(), "nothing is written"
    untied = model(280, tied=False)
    untied.embed = nn.Embedding(NEW.vocab_size, 8)
    with pytest.raises(UserError, match="the head has 280 rows"): check_rows(untied, NEW)
    assert check_rows(model(300), NEW) == 300 - NEW.vocab_size
