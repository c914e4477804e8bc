"Weights, temperature and filters have their effect, three seeds"
import math

import pytest
import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.mixture import class_weights, mixture, temperature_shares


def chains(shift, rows, seed):
    "Rows that count upwards by `shift`, modulo 17, behind a token that names the shift"
    start = torch.randint(17, (rows, 1), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([torch.full((rows, 1), 17 + shift), (start + shift*torch.arange(11)) % 17], 1)
    places = torch.arange(12).expand(rows, 12)
    return Batch(ids, (places > 1).float(), places, torch.ones_like(ids))


def learned(pools, shares, seed):
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=24, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_hidden=48, max_length=12))
    for _ in fit(model, mixture(pools, shares, 32, seed), Fit(steps=60, autocast="off", warmup=5), progress=False): pass
    return [evaluate(model, [chains(shift, 64, 99)]) for shift in (3, 5)]


@pytest.mark.parametrize("seed", range(3))
def test_a_weak_source_recovers(seed):
    torch.set_num_threads(1)
    large, small = chains(3, 400, seed), chains(5, 12, seed + 9)
    as_they_come, alike = (learned([large, small], temperature_shares([400, 12], T), seed) for T in (1., math.inf))
    assert alike[1] < .6*as_they_come[1]       # the weak source is learned
    assert alike[0] < as_they_come[0] + .5     # at a price
    w = class_weights(["large"]*400 + ["small"]*12)
    both = Batch(*(torch.cat([getattr(large, n), getattr(small, n)]) for n in ("ids", "mask", "positions", "segments")))
    both.mask.mul_(torch.tensor(w)[:, None])
    assert learned([both], [1.], seed)[1] < as_they_come[1] + .05  # weights help it too, or do no harm
