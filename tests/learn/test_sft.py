"Effects of supervised tuning on a small town, seeded: answers that end, what the mask is worth, what replay saves"
import copy
from dataclasses import replace

import pytest
import torch

from llmbench.model.generate import generate
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack, pad
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft

HOW = SFT(steps=40, batch=8, replay=1/4, warmup=5, autocast="off")


class Town:
    "A model that has read about twelve people, and conversations about six of them"
    def __init__(self):
        torch.manual_seed(0)
        town = World(seed=0, people=12)
        documents, self.questions, talks = town.documents("en"), town.questions("en", "sft"), town.conversations("en", "sft")
        self.bpe = BPE.train(documents + [q.text for q in self.questions], 450)
        self.template, self.town = ChatTemplate(self.bpe), town
        self.old = [([self.bpe.bos_id, *ids, self.bpe.end_id], [1]*(len(ids) + 2)) for ids in map(self.bpe.encode, documents)]
        held = [i % 4 == i//4 % 4 for i in range(len(talks))]
        self.rows, _ = rows_of([t for t, h in zip(talks, held) if not h], self.template, 32)
        self.held, _ = rows_of([t for t, h in zip(talks, held) if h], self.template, 32)
        self.asked = [q for q, h in zip(self.questions, held) if h]
        self.base, pool = Transformer(Config(vocab_size=self.bpe.vocab_size, d_model=64, n_layers=2, d_hidden=172)), pack(self.old, 64)
        for _ in fit(self.base, lambda step, micro: pool.rows(draw(len(pool), 8, step)), Fit(steps=150, autocast="off"), progress=False): pass
    def tuned(self, how=HOW, rows=None):
        model = copy.deepcopy(self.base)
        for _ in sft(model, rows or self.rows, how, self.old, progress=False): pass
        return model
    def answers(self, model, most=16):
        prompts = [self.template.render([{"role": "user", "content": q.text}], prompt=True)[0] for q in self.asked]
        outs = [generate(model, torch.tensor([p]), most, temperature=0., eos_id=self.bpe.end_id)[0, len(p):].tolist() for p in prompts]
        return [self.bpe.decode(o) for o in outs]
    def loss(self, model, rows): return evaluate(model, [pad(rows)])


@pytest.fixture(scope="module")
def town(): return Town()


@pytest.fixture(scope="module")
def runs(town):
    "Three seeds with and without the mask, and without replay"
    settings = dict(masked=HOW, unmasked=replace(HOW, masked=False), forgetful=replace(HOW, replay=0.))
    return {name: [town.tuned(replace(how, seed=seed)) for seed in range(3)] for name, how in settings.items()}


def interval(values):
    "95 % of the mean of three, by Student's t"
    values = torch.tensor(values, dtype=torch.float)
    return values.mean() - 4.303*values.std()/3**.5, values.mean() + 4.303*values.std()/3**.5


def test_one_batch_overfits(town):
    model = town.tuned(SFT(steps=60, batch=1, length=64, lr=4e-3, matrix_lr=.02, replay=0., warmup=5, autocast="off"), town.rows[:3])
    assert town.loss(town.base, town.rows[:3]) > 1 and town.loss(model, town.rows[:3]) < .1


def test_from_going_on_to_answering(town, runs):
    before, after = town.answers(town.base), [town.answers(model) for model in runs["masked"]]
    assert not any(a.endswith("<|end|>") for a in before)
    for said in after: assert sum(a.endswith("<|end|>") for a in said) >= .9*len(said), said
    right = [sum(town.town.grade(q, a.removesuffix("<|end|>")) for q, a in zip(town.asked, said)) for said in after]
    assert interval(right)[0] > len(town.asked)/12, right  # chance: one value of twelve


def test_mask_pays_at_equal_steps(town, runs):
    gain = [town.loss(a, town.held) - town.loss(b, town.held) for a, b in zip(runs["unmasked"], runs["masked"])]
    assert interval(gain)[0] > .05, gain


def test_replay_lowers_forgetting(town, runs):
    forgotten = {name: [town.loss(m, town.old[::4]) - town.loss(town.base, town.old[::4]) for m in runs[name]] for name in ("masked", "forgetful")}
    saved = [b - a for a, b in zip(forgotten["masked"], forgotten["forgetful"])]
    assert interval(saved)[0] > .2, forgotten


def test_untrained_end_runs_on(town):
    "The base's documents end as well, so some answers do; but only a trained end comes right behind the answer's one sentence, each time"
    rows = [(ids, [int(m and i != town.bpe.end_id) for i, m in zip(ids, mask)]) for ids, mask in town.rows]
    said = [town.answers(town.tuned(replace(HOW, replay=0., steps=60), given), 24) for given in (town.rows, rows)]
    trained, untrained = (sum(a.endswith(".<|end|>") and a.count(".") == 1 for a in answers) for answers in said)
    assert trained >= .9*len(said[0]) and untrained <= .5*trained, said
