"Loss on held-out answers with and without the prompt mask, at equal steps, five seeds: `python experiments/sft_mask/run.py` (about three minutes)"
import copy

import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack, pad
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft

torch.set_num_threads(1)
torch.manual_seed(0)
town = World(seed=0, people=12)
documents, talks = town.documents("en"), town.conversations("en", "sft")
bpe = BPE.train(documents + [q.text for q in town.questions("en", "sft")], 450)
template = ChatTemplate(bpe)
old = [([bpe.bos_id, *ids, bpe.end_id], [1]*(len(ids) + 2)) for ids in map(bpe.encode, documents)]
rows, _ = rows_of([t for i, t in enumerate(talks) if i % 4 != i//4 % 4], template, 32)
held, _ = rows_of([t for i, t in enumerate(talks) if i % 4 == i//4 % 4], template, 32)
base, pool = Transformer(Config(vocab_size=bpe.vocab_size, d_model=64, n_layers=2, d_hidden=172)), pack(old, 64)
for _ in fit(base, lambda step, micro: pool.rows(draw(len(pool), 8, step)), Fit(steps=150, autocast="off"), progress=False): pass


def held_loss(**changes):
    model = copy.deepcopy(base)
    for _ in sft(model, rows, SFT(batch=8, replay=1/4, warmup=5, autocast="off", **changes), old, progress=False): pass
    return evaluate(model, [pad(held)])


for lr, matrix_lr in ((2e-3, .01), (4e-3, .02)):
    for steps in (40, 80, 160):
        gain = torch.tensor([held_loss(steps=steps, lr=lr, matrix_lr=matrix_lr, seed=s, masked=False) - held_loss(steps=steps, lr=lr, matrix_lr=matrix_lr, seed=s) for s in range(5)])
        print(f"lr {lr}, {steps} steps: without the mask answers cost {gain.mean():.3f} +- {2.776*gain.std()/5**.5:.3f} nats a token more (95 %, 5 seeds: {[round(g, 3) for g in gain.tolist()]})", flush=True)
