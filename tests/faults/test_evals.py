"What can't be scored is refused with a message that says why"
import numpy as np
import pytest
import torch

from llmbench.practice.use import Table
from llmbench.use.evals import ask, choice_accuracy, choice_logps, classification, score, text_logps, text_score
from llmbench.use.intervals import bootstrap_interval, chance_level, effective_n, group_sums, paired_difference, sum_up, wilson_interval

TABLE = Table(torch.tensor([[.1, .2, .7], [.3, .3, .4], [.5, .25, .25]]))


def spell(text): return ["abc".index(c) for c in text if c in "abc"]


CASES = {
    "more right than questions": (lambda: wilson_interval(21, 20), "21 right of 20"),
    "fewer than none right": (lambda: wilson_interval(-1, 20), "-1 right"),
    "no questions": (lambda: wilson_interval(0, 0), "of 0 questions"),
    "level in per cent": (lambda: wilson_interval(1, 2, 95), "level 95"),
    "bootstrap level": (lambda: bootstrap_interval([0, 1], 0), "level 0"),
    "one value": (lambda: bootstrap_interval([.7]), "no spread"),
    "one group": (lambda: bootstrap_interval([.7, .8], groups=["a", "a"]), "no spread"),
    "no value": (lambda: bootstrap_interval([]), "no spread"),
    "not a number": (lambda: bootstrap_interval([0., 1., float("nan")]), "value 2 is not a finite number"),
    "infinite": (lambda: bootstrap_interval([float("inf"), 1.]), "value 0 is not a finite number"),
    "groups missing": (lambda: group_sums([1, 2, 3], groups=[1, 2]), "3 values, 2 groups"),
    "weights missing": (lambda: group_sums([1, 2, 3], weights=[1, 2]), "2 weights"),
    "groups of a score": (lambda: effective_n([1, 0], [1]), "2 values, 1 groups"),
    "other exams": (lambda: paired_difference([1, 0], [1]), "same questions"),
    "no choices": (lambda: chance_level([]), "no questions"),
    "kinds missing": (lambda: chance_level(["a", "b"], ["x"]), "shorter"),
    "no marks": (lambda: sum_up([]), "no marks"),
    "marks in per cent": (lambda: sum_up([50, 100]), "not between 0 and 1"),
    "a mark that is NaN": (lambda: sum_up([1, float("nan")]), "not between 0 and 1"),
    "answers missing": (lambda: score(["4"], ["4", "5"]), "1 answers to 2 questions"),
    "nothing asked": (lambda: score([], [], task="quiz"), "no marks for 'quiz'"),
    "labels missing": (lambda: classification(["x"], ["x", "y"], "x"), "1 predictions for 2"),
    "no labels": (lambda: classification([], [], "x"), "0 predictions"),
    "stride of 0 windows": (lambda: text_logps(TABLE, [0, 1, 2], 2, 2), "stride 2 must be 1 to 1"),
    "negative stride": (lambda: text_logps(TABLE, [0, 1, 2], 3, -1), "stride -1"),
    "window of one": (lambda: text_logps(TABLE, [0, 1, 2], 1), "window of 1 tokens"),
    "no text": (lambda: text_score(TABLE, spell, ["", ""], 0, 8), "no text"),
    "empty choice": (lambda: choice_logps(TABLE, spell, "ab", ["c", ""]), "empty"),
    "no choice": (lambda: choice_logps(TABLE, spell, "ab", []), "empty"),
    "empty prompt": (lambda: choice_logps(TABLE, spell, "  ", ["c"]), "empty"),
    "wrong key": (lambda: choice_accuracy(TABLE, spell, [("ab", ["a", "c"], 2)]), "choice 2 of 2"),
    "no questions to choose": (lambda: choice_accuracy(TABLE, spell, []), "no questions"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")): call()


def test_empty_prompt_with_bos(): assert torch.allclose(choice_logps(TABLE, spell, "", ["b", "ca"], bos_id=0), torch.tensor([.2, .7*.5]).log())


def test_only_bos(): assert text_logps(TABLE, [0], 8).shape == (0,)


def test_lone_surrogate():
    "Bytes that were no UTF-8 (as `surrogateescape` reads them) still count as bytes"
    assert text_score(TABLE, lambda t: [1, 2], ["a\udcff", "b"], 0, 8).documents == 2


def test_training_goes_on_after_an_evaluation():
    "Evaluation leaves nothing behind that breaks the next backward pass"
    from llmbench.model.transformer import Config, Transformer
    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    tokenizer = BPE.train(["a b c"], 263)
    model = Transformer(Config(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=32))
    text_score(model, tokenizer.encode, ["abc", "b"], tokenizer.bos_id, 16)
    choice_logps(model, tokenizer.encode, "a", ["b"])
    ask(model, ChatTemplate(tokenizer), ["a", "bc"], 3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None and np.isfinite(p.grad).all() for p in model.parameters())


def test_too_long_a_question_says_so():
    from llmbench.model.transformer import Config, Transformer
    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    tokenizer = BPE.train(["a b c"], 263)
    model = Transformer(Config(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=32, max_length=32))
    with pytest.raises(ValueError, match="model's 32 positions"): ask(model, ChatTemplate(tokenizer), ["abc "*20], 8)
