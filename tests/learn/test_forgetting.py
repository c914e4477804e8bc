"Replay and a tether lower forgetting, three seeds"
import copy

import pytest
import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.forgetting import ewc_loss, fisher, kl_to_old, replay_mix


def chains(shift, rows, seed):
    "Rows that count upwards by `shift`, modulo 17"
    start = torch.randint(17, (rows, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + shift*torch.arange(12)) % 17
    ids[:, 0] = torch.where(start[:, 0] >= 0, ids[:, 0], 0)
    places = torch.arange(12).expand(rows, 12)
    return Batch(ids, (places > 1).float(), places, torch.ones_like(ids))


@pytest.mark.parametrize("seed", range(3))
def test_remedies(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    old, new = chains(3, 64, seed), chains(5, 64, seed + 9)
    before = Transformer(Config(vocab_size=17, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_hidden=48, max_length=12))
    for _ in fit(before, replay_mix([old], [], 0., 16), Fit(steps=120, autocast="off", warmup=5), progress=False): pass
    def learn(share=0., loss=None):
        model = copy.deepcopy(before)
        for _ in fit(model, replay_mix([new], [old], share, 16), Fit(steps=50, autocast="off", warmup=5), loss=loss, progress=False): pass
        return evaluate(model, [old]), evaluate(model, [new]), kl_to_old(before, model, [old])
    anchor = {n: p.detach().clone() for n, p in before.named_parameters()}
    alone, mixed = learn(), learn(.25)
    tethered = learn(loss=ewc_loss(anchor, fisher(before, old, seed), 3000.))
    assert alone[0] > evaluate(before, [old]) + 1                  # forgotten
    assert mixed[0] < .5*alone[0] and mixed[2] < .5*alone[2]        # replay keeps it
    assert mixed[1] < .7                                            # and learns the new
    assert tethered[0] < alone[0] and tethered[2] < alone[2]        # a tether keeps some
