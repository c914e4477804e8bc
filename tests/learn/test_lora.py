"Effects of training a part, on the shelf's base model, three seeds: LoRA and bottlenecks learn, the base stays, one direction of a full update buys most of its gain"
import copy
from pathlib import Path

import pytest
import torch

from llmbench.core import UserError
from llmbench.model.transformer import Transformer
from llmbench.text.batch import pad
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.adapters import add_bottleneck, last_blocks, train_only
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.lora import AdaptersOnly, add_lora, load_lora, merge_lora, save_lora, without_lora
from llmbench.tune.lora_layer import effective_rank, low_rank, rank_for
from llmbench.tune.sft import SFT, batches, rows_of, sft

SHELF = Path(__file__).parent.parent.parent/"data"/"town"/"base"
HOW = dict(steps=30, batch=8, length=64, matrix_lr=0., warmup=5, autocast="off")


class Town:
    def __init__(self):
        self.base, template, town = Transformer.from_pretrained(SHELF), ChatTemplate.load(SHELF), World(0, 50)
        self.rows, held = (rows_of(town.conversations("both", split), template, 64)[0] for split in ("sft", "heldout"))
        self.asked = [pad(held[::16])]
        self.before = self.loss(self.base)
    def loss(self, model): return evaluate(model, self.asked)
    def tuned(self, prepare, lr, seed):
        model = copy.deepcopy(self.base)
        torch.manual_seed(seed)
        prepare(model)
        for _ in sft(model, self.rows, SFT(**HOW, lr=lr, seed=seed), progress=False): pass
        return model


@pytest.fixture(scope="module")
def town(): return Town()


def interval(values):
    "95 % of the mean of three, by Student's t"
    values = torch.tensor(values, dtype=torch.float)
    return values.mean() - 4.303*values.std()/3**.5, values.mean() + 4.303*values.std()/3**.5


PARTS = {"LoRA": (lambda m: add_lora(m, 4, 8.), 1e-2), "bottleneck": (lambda m: add_bottleneck(m, 8), 1e-2), "last two blocks": (lambda m: train_only(m, last_blocks(m, 2)), 1e-3)}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_learns_and_the_rest_stays(part, town):
    prepare, lr = PARTS[part]
    models = [town.tuned(prepare, lr, seed) for seed in range(3)]
    gains = [town.before - town.loss(m) for m in models]
    assert interval(gains)[0] > .5*town.before, gains
    old = dict(town.base.named_parameters())
    for model in models:
        frozen = {n.replace(".base.", "."): p for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen and all(torch.equal(p, old[n]) for n, p in frozen.items())


def test_one_direction_buys_most_of_the_gain(town):
    shares, ranks = [], []
    for seed in range(3):
        model = town.tuned(lambda m: None, 5e-4, seed)
        whole = town.loss(model)
        with torch.no_grad():
            for (n, p), o in zip(model.named_parameters(), town.base.parameters()):
                if "blocks" not in n or p.ndim < 2: continue
                ranks.append((effective_rank(p - o)/min(p.shape), rank_for(p - o)))
                p.copy_(o + torch.matmul(*low_rank(p - o, 1)))
        shares.append((town.before - town.loss(model))/(town.before - whole))
    assert interval(shares)[0] > .6, shares
    assert min(share for share, _ in ranks) > .2 and min(rank for _, rank in ranks) > 4, "the update itself is not of low rank"


def test_merged_and_stored_answer_alike(town, tmp_path):
    model = town.tuned(*PARTS["LoRA"], 0)
    loss = town.loss(model)
    with without_lora(model): assert town.loss(model) == town.before
    save_lora(model, tmp_path)
    again = copy.deepcopy(town.base)
    load_lora(again, tmp_path)
    assert town.loss(again) == loss
    assert abs(town.loss(merge_lora(again)) - loss) < 1e-5


def test_stopped_run_of_adapters_goes_on(town, tmp_path):
    "Checkpoints hold the adapters alone, and the same call goes on bit for bit, on a fresh copy of the base"
    def run(folder, stop=None):
        model = copy.deepcopy(town.base)
        add_lora(model, 2, 4., generator=torch.Generator().manual_seed(0), dropout=.1)
        torch.manual_seed(7)
        at = batches(town.rows, SFT(batch=2, length=64))
        def batch_at(step, micro=0):
            if step == stop: raise KeyboardInterrupt
            return at(step, micro)
        coat = AdaptersOnly(model)
        for _ in fit(coat, batch_at, Fit(steps=6, lr=1e-2, matrix_lr=0., warmup=1, save_every=2, autocast="off"), folder=folder, progress=False): pass
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]
    whole = run(tmp_path/"whole")
    with pytest.raises(KeyboardInterrupt): run(tmp_path/"broken", stop=5)
    again = run(tmp_path/"broken")
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    other = copy.deepcopy(town.base)
    with torch.no_grad(): other.blocks[0].mlp.down.weight.mul_(1.1)
    add_lora(other, 2, 4.)
    with pytest.raises(UserError, match="another base"): list(fit(AdaptersOnly(other), batches(town.rows, SFT(batch=2, length=64)), Fit(steps=6, lr=1e-2, matrix_lr=0., warmup=1, save_every=2, autocast="off"), folder=tmp_path/"whole", progress=False))
    stored = sum(p.stat().st_size for p in (tmp_path/"whole").rglob("model.safetensors"))
    assert stored < .1*sum(p.numel()*4 for p in town.base.parameters())
