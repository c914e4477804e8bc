"What cannot be written is refused before the first token, and says why"
import pytest
import torch

from llmbench.model.generate import generate, stream
from llmbench.model.transformer import Config, Transformer

MODEL = Transformer(Config(vocab_size=20, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=16, max_length=12))
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def never(ids): raise AssertionError("the model was asked")


@pytest.mark.parametrize("how, what", [
    (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(temperature=-.1), "temperature=-0.1: 0 is greedy"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(top_k=-3), "top_k=-3"),
    (dict(top_p=0), "top_p=0"),
    (dict(top_p=1.2), "top_p=1.2"),
    (dict(repetition_penalty=0), "repetition_penalty=0"),
    (dict(ids=IDS[0]), r"not \(3,\)"),
    (dict(ids=IDS[:, :0]), r"at least one row and one token, not \(2, 0\)"),
    (dict(ids=IDS[:0]), r"not \(0, 3\)"),
    (dict(mask=torch.ones(2, 2)), r"mask \(2, 2\) and ids \(2, 3\) differ"),
    (dict(mask=torch.tensor([[1, 1, 1], [1, 1, 0]])), "row 1 ends in padding; .* pad on the left"),
    (dict(mask=torch.tensor([[0, 0, 0], [1, 1, 1]])), "row 0 ends in padding"),
    (dict(mask=torch.tensor([[1, 0, 1], [1, 1, 1]])), "between the tokens"),
    (dict(mask=torch.tensor([[0, 1, 1], [1, 1, 1]])), "a function of ids alone cannot skip padding"),
])
def test_refused(how, what):
    with pytest.raises(ValueError, match=what): generate(never, **(dict(ids=IDS, max_new_tokens=4) | how))


def test_more_than_the_model_has():
    with pytest.raises(ValueError, match="3 prompt tokens and 10 new ones exceed the model's 12 positions: ask for at most 9"): generate(MODEL, IDS, 10)
    with pytest.raises(ValueError, match="ask for at most 0"): generate(MODEL, torch.ones(1, 13, dtype=torch.long), 1)
    class Theirs(torch.nn.Module): # as in transformers
        class config: max_position_embeddings = 5
        def forward(self, ids): raise AssertionError
    with pytest.raises(ValueError, match="exceed the model's 5 positions"): generate(Theirs(), IDS, 3)
    with pytest.raises(ValueError, match="exceed"): list(stream(MODEL, None, [3]*10, 5))


@pytest.mark.parametrize("temperature", [0, 1.])
def test_scores_that_are_not_numbers(temperature):
    def broken(ids):
        logits = torch.zeros(*ids.shape, 9)
        if ids.shape[1] == 5: logits[1, -1, 4] = torch.nan
        return logits
    with pytest.raises(FloatingPointError, match="NaN at new token 3, row 1"): generate(broken, IDS, 8, temperature=temperature)


def test_a_forbidden_token_is_no_fault():
    logits = torch.tensor([0., 1, 2]).where(torch.tensor([True, True, False]), -torch.inf)
    out = generate(lambda ids: logits.expand(*ids.shape, 3), IDS % 3, 30, generator=torch.Generator().manual_seed(0), top_p=.9, repetition_penalty=1.2)
    assert (out[:, 3:] != 2).all()


def test_a_generator_of_another_kind():
    with pytest.raises((TypeError, AttributeError)): generate(MODEL, IDS, 2, generator=7)
