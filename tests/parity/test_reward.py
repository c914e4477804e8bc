"Rankings, reward loss, reward model, calibration and length bias: by hand, and against TRL's RewardTrainer and transformers' sequence classifier"
import itertools
import json
import math

import pytest
import torch

from llmbench.align.pairs import pair_rows, stack_pairs
from llmbench.align.reward import (Reward, RewardModel, answer_lengths, calibration_error, last_real, length_bias, pair_loss, pair_rewards, ranking, ranking_pairs,
                                   reliability, reward, reward_loss, score_answers, split_pairs, tokenizer_key)
from llmbench.core import UserError
from llmbench.model.checkpoint import layout
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pad
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate

PAIRS = [dict(prompt="Who lives in Oldtown?", chosen="Ann does.", rejected="Nobody. Go away!"),
         dict(prompt="Does she bake?", chosen="She bakes bread, and sells it on Mondays.", rejected="No."),
         dict(prompt="Where?", chosen="In Oldtown.", rejected="谁知道")]


def test_six_pairs():
    assert ranking_pairs(list("DBAC")) == [("D", "B"), ("D", "A"), ("D", "C"), ("B", "A"), ("B", "C"), ("A", "C")]


@pytest.mark.parametrize("n", range(2, 8))
def test_rankings_by_brute_force(n):
    "Every pattern of ties of n answers, against comparing all marks with all"
    for marks in itertools.product(range(3), repeat=min(n, 5)):
        answers = [f"a{i}" for i in range(len(marks))]
        right = sorted((a, b) for (a, x), (b, y) in itertools.product(zip(answers, marks), repeat=2) if x > y)
        if right: assert sorted(ranking_pairs(ranking(answers, list(marks)))) == right
        else:
            with pytest.raises(UserError, match="decides nothing"): ranking_pairs(ranking(answers, list(marks)))


def test_split_leaks_nothing_and_loses_nothing():
    pairs = [dict(prompt=[dict(role="user", content=f"q{i}")] if i % 2 else f"q{i}", chosen=a, rejected=b) for i in range(40) for a, b in ranking_pairs("ABC")]
    train, valid = split_pairs(pairs, .25, 3)
    key = json.dumps
    assert not {key(p["prompt"]) for p in train} & {key(p["prompt"]) for p in valid}
    assert sorted(map(key, train + valid)) == sorted(map(key, pairs)) and 15 < len(valid) < 50 and len(valid) % 3 == 0
    with pytest.raises(UserError, match="cannot be split"): split_pairs(pairs[:3])


def test_loss_by_hand():
    chosen, rejected = torch.tensor([1.5, -.25]), torch.tensor([.5, .75])
    def soft(x): return math.log1p(math.exp(-x))
    assert torch.allclose(reward_loss(chosen, rejected), torch.tensor([soft(1.), soft(-1.)]))
    assert torch.allclose(reward_loss(chosen, rejected, torch.tensor([.3, 2.]), .1), torch.tensor([soft(.7) + .1*4, soft(-3.) + .1*.25]))


def test_gradient_by_hand():
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (1.5, .5))
    reward_loss(chosen, rejected, .3, .1).backward()
    push = -1/(1 + math.exp(.7))
    assert abs(chosen.grad - (push + .2*2)) < 1e-6 and abs(rejected.grad - (-push + .2*2)) < 1e-6


def test_last_real_on_both_sides():
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    assert last_real(real).tolist() == [1, 3, 3, 3]
    with pytest.raises(UserError, match="nothing but padding"): last_real(torch.tensor([[True], [False]]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The same weights twice, and TRL's trainer with its batch"
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer
    template = ChatTemplate(BPE.train(["Who lives in Oldtown? Ann does. She bakes bread. "]*3, 320))
    torch.manual_seed(2)
    model = RewardModel(Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48, tied=False)), tokenizer_key(template.tokenizer))
    for p in model.parameters(): p.data.add_(torch.randn_like(p)*.2)
    folder = model.save_pretrained(tmp_path_factory.mktemp("reward"), template)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    messages = [dict(prompt=[dict(role="user", content=p["prompt"])], chosen=[dict(role="assistant", content=p["chosen"])], rejected=[dict(role="assistant", content=p["rejected"])]) for p in PAIRS]
    trainer = RewardTrainer(theirs, RewardConfig(output_dir=str(folder/"out"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_length=256, per_device_train_batch_size=3),
                            train_dataset=Dataset.from_list(messages), processing_class=PreTrainedTokenizerFast.from_pretrained(folder))
    rows, _ = pair_rows(PAIRS, template, 256)
    return template, model, theirs, trainer, rows, folder


def test_scores_equal_transformers(world, ledger):
    template, model, theirs, _, rows, _ = world
    batch = pad([row for pair in rows for row in pair], pad_id=template.tokenizer.pad_id)
    with torch.no_grad(): ours, other = model(batch.ids, batch.segments > 0), theirs(batch.ids, attention_mask=(batch.segments > 0).long()).logits[:, 0]
    ledger("reward of padded rows (relative to the largest)", "transformers LlamaForSequenceClassification", (ours - other).abs().max()/other.abs().max(), 1e-6)


def test_padding_never_counts(world, ledger):
    "One row at a time, padded left, padded right, with any id as padding: the same rewards"
    template, model, _, _, rows, _ = world
    flat = [row for pair in rows for row in pair]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([ids])) for ids, _ in flat])
        worst = 0.
        for side, fill in itertools.product(("left", "right"), (0, 7, template.tokenizer.end_id)):
            batch = pad(flat, 60, fill, side)
            worst = max(worst, float((model(batch.ids, batch.segments > 0) - alone).abs().max()))
        ledger("reward with padding left and right", "one row at a time", worst, 2e-6)
        batch = pad(flat, 60, template.tokenizer.pad_id)
        assert (model(batch.ids) - alone).abs().max() > .01, "reading at the last column looks right and is not"


@pytest.mark.parametrize("margin,center", [(None, 0.), (None, .05), ([.5, 1., 2.], .01)])
def test_equals_trl(margin, center, world, ledger):
    template, model, theirs, trainer, rows, _ = world
    batch = trainer.data_collator(list(trainer.train_dataset))
    pairs = stack_pairs(rows, template.tokenizer.pad_id, margin=margin)
    assert batch["input_ids"].tolist() == pairs.ids.tolist()
    trainer.args.center_rewards_coefficient = center or None
    if margin: batch["margin"] = torch.tensor(margin)
    theirs.zero_grad()
    loss = trainer.compute_loss(theirs, dict(batch))
    loss.backward()
    model.zero_grad()
    ours, _ = pair_loss(model, pairs, center)
    ours.mean().backward()
    ledger(f"reward loss, margin {margin}, centering {center}", "trl RewardTrainer", abs((ours.mean() - loss).detach()), 1e-6)
    grads, mine = dict(theirs.named_parameters()), dict(model.named_parameters())
    names = [(t, "backbone." + o, part) for t, _, o, part in layout(model.config)] + [("score.weight", "score", None)]
    size = max(float(grads[t].grad.abs().max()) for t, _, _ in names)
    error = max(float((grads[t].grad - (mine[o].grad[part] if part is not None else mine[o].grad[None])).abs().max()) for t, o, part in names)
    ledger(f"reward gradient, margin {margin}, centering {center} (relative to the largest)", "trl RewardTrainer", error/size, 2e-6)


def test_save_and_load(world):
    template, model, _, _, rows, folder = world
    again = RewardModel.from_pretrained(folder)
    assert again.tokenizer == model.tokenizer and torch.equal(pair_rewards(again, rows), pair_rewards(model, rows))
    assert ChatTemplate.load(folder).render([dict(role="user", content="Who?")]) == template.render([dict(role="user", content="Who?")])


def test_reliability_by_hand():
    "Gaps 0, log 3 (75 %), -log 3, log 9 (90 %): bins of the claimed probability"
    gaps = [0., math.log(3), -math.log(3), math.log(9)]
    rewards = torch.tensor([[g + .7, .7] for g in gaps], dtype=torch.float64)
    table = reliability(rewards, 5)
    assert [(round(b["claimed"], 6), b["found"], b["pairs"]) for b in table] == [(.5, .5, 1), (.75, .5, 2), (.9, 1., 1)]
    assert abs(calibration_error(rewards, 5) - (0 + .25*2 + .1)/4) < 1e-9


def test_calibrated_and_overconfident():
    g = torch.Generator().manual_seed(0)
    gap = torch.randn(20_000, generator=g)*2
    won = torch.rand(20_000, generator=g) < gap.sigmoid()
    true = torch.where(won, gap, -gap)
    rewards = torch.stack([true, torch.zeros_like(true)], 1)
    assert calibration_error(rewards) < .01 < .1 < calibration_error(rewards*4)


def test_length_bias_by_hand():
    rewards = torch.tensor([[2., 1.], [0., 1.], [3., 1.], [5., 0.], [1., 2.]])
    lengths = torch.tensor([[9, 4], [8, 3], [2, 6], [5, 5], [3, 9]])
    found = length_bias(rewards, lengths)
    assert found["pairs"] == 4 and found["longer_wins"] == .5 and found["accuracy_longer"] == .5 and found["accuracy_shorter"] == .5
    gap, more = torch.tensor([1., -1., 2., -1.]), torch.tensor([5., 5., -4., -6.])
    assert abs(found["correlation"] - float(torch.corrcoef(torch.stack([gap, more]))[0, 1])) < 1e-6
    with pytest.raises(UserError, match="differ in length"): length_bias(rewards[:2], lengths[3:4].repeat(2, 1))


def test_length_bias_is_seen_when_planted():
    lengths = torch.randint(3, 40, (500, 2), generator=torch.Generator().manual_seed(1))
    by_length = length_bias(lengths*.1, lengths)
    blind = length_bias(torch.randn(500, 2, generator=torch.Generator().manual_seed(2)), lengths)
    assert by_length["longer_wins"] == 1 and by_length["correlation"] > .99 and by_length["accuracy_shorter"] == 0
    assert abs(blind["longer_wins"] - .5) < .07 and abs(blind["correlation"]) < .1


def test_training_and_resuming(world, tmp_path):
    template, model, _, _, rows, _ = world
    config = Reward(steps=8, batch=3, length=256, warmup=2, autocast="off")
    import copy
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    whole = list(reward(one, rows, config, rows[:1], pad_id=template.tokenizer.pad_id, progress=False))
    for _ in zip(range(3), reward(two, rows, config, rows[:1], tmp_path, template.tokenizer.pad_id, progress=False)): pass
    two = copy.deepcopy(model)
    rest = list(reward(two, rows, config, rows[:1], tmp_path, template.tokenizer.pad_id, progress=False))
    assert whole[-1].margin > whole[0].margin and rest[-1].margin == whole[-1].margin
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    logged = [json.loads(line)["step"] for line in (tmp_path/"pairs.jsonl").read_text().splitlines()]
    assert logged == list(range(8))


def test_another_tokenizer_is_refused(world):
    template, model, _, _, _, _ = world
    talk = [[dict(role="user", content="Who?"), dict(role="assistant", content="Ann.")]]
    assert score_answers(model, template, talk).shape == (1,)
    other = ChatTemplate(BPE.train(["She sells sea shells by the sea shore. "]*3, 320))
    with pytest.raises(UserError, match="another tokenizer"): score_answers(model, other, talk)
    wide = ChatTemplate(BPE.train(["She sells sea shells by the sea shore. Who does? Nobody does that any more."]*3, 330))
    with pytest.raises(UserError, match="another tokenizer"): score_answers(RewardModel(Transformer(Config(vocab_size=270, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))), wide, talk)
    with pytest.raises(UserError, match="do not fit"): score_answers(model, template, [[dict(role="user", content="x"*300), dict(role="assistant", content="Ann.")]])


def test_lengths(world):
    _, _, _, _, rows, _ = world
    assert answer_lengths(rows).tolist() == [[sum(m) for _, m in pair] for pair in rows]
