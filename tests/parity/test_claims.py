"Claims: labels by hand, the loss against ELECTRA's discriminator and enumeration, verdicts at every token, the loop"
import math

import pytest
import torch

from llmbench.align.claims import Claims, answer_claims, claim_accuracy, claim_loss, claim_row, learn_claims, stack_claims, token_rewards, town_claims
from llmbench.align.reward import Reward, RewardModel
from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.text.words import TELL, VALUES
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate

ROWS = [([5, 6, 7, 8, 9], [0, 1, 0, 0, -1]), ([9, 8, 7], [0, 0, -1]), ([4, 3, 2, 6, 7, 11, 12], [0, 1, -1, 0, 1, 0, 0])]


@pytest.fixture(scope="module")
def template(): return ChatTemplate(BPE.train([*World(0, 6).documents("both"), "Who? Ann."], 500))


def judge(seed=0, vocabulary=16, **shape):
    torch.manual_seed(seed)
    model = RewardModel(Transformer(Config(vocab_size=vocabulary, **(dict(d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=96) | shape))))
    torch.nn.init.normal_(model.score)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_electras(seed, ledger):
    "Label 1 means `replaced` there, a lie here; every token in sight is judged"
    from transformers import ElectraConfig, ElectraForPreTraining
    torch.manual_seed(seed)
    theirs = ElectraForPreTraining(ElectraConfig(vocab_size=50, embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)).eval()
    ids, attend, replaced = torch.randint(1, 50, (4, 7)), (torch.arange(7) < torch.tensor([[7], [5], [1], [3]])).long(), torch.randint(0, 2, (4, 7))
    seen = []
    theirs.discriminator_predictions.register_forward_hook(lambda module, inputs, logits: seen.append(logits) or logits.retain_grad())
    out = theirs(ids, attention_mask=attend, labels=replaced)
    out.loss.backward()
    rewards = (-seen[0].detach()).requires_grad_()
    ours = claim_loss(rewards, (1 - 2*replaced)*attend.float())
    ours.backward()
    ledger("claim loss", "transformers ELECTRA", (ours - out.loss).abs().item(), 1e-6)
    ledger("claim loss, gradient", "transformers ELECTRA", (rewards.grad + seen[0].grad).abs().max().item(), 1e-6)


def test_loss_by_hand():
    rewards, labels = torch.tensor([[7., 2., .5], [1., -7., -3.]]), torch.tensor([[0., 1., -1.], [-1., 0., 1.]])
    costs = [math.log1p(math.exp(-x)) for x in (2, -.5, -1, -3)]
    assert claim_loss(rewards, labels).item() == pytest.approx(sum(costs)/4, abs=1e-6)
    assert claim_loss(rewards, labels, 10.).item() == pytest.approx(sum(costs)/10, abs=1e-6)
    assert claim_loss(torch.tensor([[0., -1000.]]), torch.tensor([[0., 1.]])).item() == 1000
    assert claim_loss(torch.zeros(2, 3), labels).item() == pytest.approx(math.log(2))


def test_rewards_at_every_token_are_those_at_the_last():
    model, claims = judge(), stack_claims(ROWS)
    everywhere = token_rewards(model, claims.ids)
    for row, (ids, _) in enumerate(ROWS):
        for t in range(len(ids)): assert everywhere[row, t].item() == pytest.approx(model(torch.tensor([ids[:t + 1]])).item(), abs=1e-5)


def test_stacked_rows():
    claims = stack_claims(ROWS, 13)
    assert claims.ids.tolist() == [[5, 6, 7, 8, 9, 13, 13], [9, 8, 7, 13, 13, 13, 13], [4, 3, 2, 6, 7, 11, 12]]
    assert claims.mask.sum(1).tolist() == [2, 1, 3] and claims.labels[2].tolist() == [0, 1, -1, 0, 1, 0, 0]
    some = claims.rows([1, 0])
    assert some.ids.tolist() == [[9, 8, 7, 13, 13], [5, 6, 7, 8, 9]] and some.labels.tolist() == [[0, 0, -1, 0, 0], [0, 1, 0, 0, -1]], "cut behind the last verdict"
    assert isinstance(some.to("cpu"), Claims)


@pytest.mark.parametrize("rows, words", [([], "no claim to learn from"), ([ROWS[0], ([1, 2], [0, 0])], "row 2"), ([([1, 2], [1, 0])], "first token"), ([([1, 2, 3], [0, 1])], "2 labels for 3 tokens")])
def test_rows_that_say_nothing(rows, words):
    with pytest.raises(UserError, match=words): stack_claims(rows)


def test_labels_by_hand(template):
    tokens = template.tokenizer
    parts = [(" Mira Oban works as a baker.", True), (" 林月养猫。🐈", False), ("", None), (" And so on", None)]
    ids, labels = claim_row(parts, tokens)
    assert ids == [i for text, _ in parts for i in tokens.encode(text)]
    ends = [len(tokens.encode(parts[0][0])) - 1, len(tokens.encode(parts[0][0])) + len(tokens.encode(parts[1][0])) - 1]
    assert [(t, v) for t, v in enumerate(labels) if v] == [(ends[0], 1), (ends[1], -1)]
    for bad, words in (([("", True)], "two tokens"), ([("x", True)], "two tokens"), ([("Ann bakes.", None), ("", False)], "without text")):
        with pytest.raises(UserError, match=words): claim_row(bad, tokens)


def test_answers_by_hand(template):
    tokens, asked = template.tokenizer, "Mira Oban"
    sentences = [(" Mira Oban keeps a cat.", False), (" Mira Oban lives in Oldtown.", True)]
    whole, mask = template.render([dict(role="user", content=asked), dict(role="assistant", content="".join(t for t, _ in sentences))])
    end = max(t for t, m in enumerate(mask) if m)
    ids, labels = answer_claims(asked, sentences, template)
    assert ids == whole[:end + 1] and tokens.pieces([ids[-1]]) == ["<|end|>"]
    judged = [(t, v) for t, v in enumerate(labels) if v]
    assert [v for _, v in judged] == [-1, 1] and [tokens.decode(ids[:t + 1]).rpartition("|>")[2] for t, _ in judged] == [sentences[0][0], sentences[0][0] + sentences[1][0]]
    one, single = answer_claims(asked, [(sentences[0][0], None), sentences[1]], template)
    assert one == ids and [(t, v) for t, v in enumerate(single) if v] == [(end, 1)], "a single verdict stands at the end token"
    with pytest.raises(UserError, match="other tokens"): answer_claims(asked, [(" Mira Oban works a", None), ("s a baker.", True)], template)


def test_what_the_book_claims_is_what_the_world_says(template):
    "Each sentence of 400 rows, looked up"
    world, tokens, seen = World(2, people=6), template.tokenizer, set()
    told = {(" " if l == "en" else "") + way.format(n=person[l], v=v): (v == world.value(a, i, l), i, l) for l in ("en", "zh") for i, person in enumerate(world.people) for a in VALUES for way in TELL[a][l] for v in VALUES[a][l]}
    rows = town_claims(world, template, 400, people=(1, 4))
    for ids, labels in rows:
        text, judged = tokens.decode(ids).rpartition("<|assistant|>")[2], [v for v in labels if v]
        assert len(judged) in (1, 4) and (len(judged) == 4 or labels[-1] == judged[0])
        found = sorted((text.index(sentence), true, i, l) for sentence, (true, i, l) in told.items() if sentence in text)
        assert [true for _, true, _, _ in found] == [v > 0 for v in judged], text
        seen |= {(i, l) for *_, i, l in found}
    kinds = [sum(map(abs, labels)) for _, labels in rows]
    assert .35 < kinds.count(1)/400 < .65 and .35 < kinds.count(4)/400 < .65, "half of the rows are single sentences"
    assert seen == {(i, l) for i in (1, 4) for l in ("en", "zh")}
    assert rows == town_claims(world, template, 400, people=(1, 4)) != town_claims(world, template, 400, people=(1, 4), seed=1)


def test_a_step_over_two_micro_batches_is_one_over_both():
    rows = [([5 + i, 6, 7 + i % 3, 8], [0, 1, 0, -1] if i % 3 else [0, 0, 0, 1]) for i in range(4)]
    one, two = judge(3), judge(3)
    whole = next(learn_claims(one, rows, Reward(steps=1, batch=4, warmup=0, autocast="off"), progress=False))
    parts = next(learn_claims(two, rows, Reward(steps=1, batch=2, micro=2, warmup=0, autocast="off"), progress=False))
    assert whole.loss == pytest.approx(parts.loss, abs=1e-6) and whole.tokens == parts.tokens == sum(abs(v) for _, labels in rows for v in labels)
    for a, b in zip(one.parameters(), two.parameters()): assert torch.allclose(a, b, atol=1e-5)


def test_accuracy_by_hand():
    "A judge that says yes to everybody, one that says no, and one that says nothing"
    for bias, right in ((1., (3/6, 1., 0.)), (-1., (3/6, 0., 1.)), (0., (0., 0., 0.))):
        model = judge()
        model.backbone.hidden = lambda ids, bias=bias: torch.full((*ids.shape, 16), bias)
        model.score.data.fill_(1.)
        found = claim_accuracy(model, ROWS, batch=2)
        assert (found["accuracy"], found["true"], found["false"], found["claims"]) == (*right, 6)
    assert model.training, "it comes back as it was"


def test_held_out_loss_is_a_mean_over_claims():
    model = judge(5)
    last = list(learn_claims(model, ROWS, Reward(steps=2, batch=3, warmup=0, autocast="off"), valid=ROWS[:2], progress=False))[-1]
    with torch.no_grad(): right = claim_loss(token_rewards(model.eval(), stack_claims(ROWS[:2]).ids), stack_claims(ROWS[:2]).labels)
    assert last.valid_loss == pytest.approx(right.item(), abs=1e-6)


def test_too_long_is_said_before_anything_is_done():
    with pytest.raises(UserError, match="7 tokens, but Reward.length is 6"): next(learn_claims(judge(), ROWS, Reward(length=6), progress=False))
