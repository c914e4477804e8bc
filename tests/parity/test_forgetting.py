"Fisher information, EWC, KL and replay against enumeration, torch and pencil"
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch
from llmbench.train.loop import batch_loss, counted
from llmbench.tune.forgetting import average, drawn, ewc_loss, ewc_penalty, fisher, forgetting, kl_to_old, pareto, replay_mix, restored, share_at, squared_score


def tiny(seed, vocabulary=3):
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=vocabulary, d_model=4, n_layers=1, n_heads=1, n_kv_heads=1, d_hidden=6, max_length=8))
    for p in model.parameters(): nn.init.normal_(p, std=.6)
    return model


def row(ids, mask=None, segments=None):
    ids = torch.tensor([ids])
    segments = torch.ones_like(ids) if segments is None else torch.tensor([segments])
    starts = torch.cat([torch.zeros_like(ids[:, :1]), (segments[:, 1:] != segments[:, :-1]).long()], 1)
    at = torch.arange(ids.shape[1])
    positions = at - torch.where(starts[0] > 0, at, 0).cummax(0).values
    mask = torch.tensor([mask or [0, *[1]*(ids.shape[1] - 1)]], dtype=torch.float)
    return Batch(ids, mask*(positions > 0), positions[None], segments)


ROWS = {"one document": row([2, 0, 1, 1]), "part of it counts": row([1, 2, 2, 0], [0, 0, 1, 1]), "two documents": row([0, 2, 1, 2, 0], segments=[1, 1, 2, 2, 2])}


def enumerated(model, r):
    "Sum over counted positions and tokens of p times the squared gradient, one gradient each"
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for t in range(r.ids.shape[1] - 1):
        if not r.mask[0, t + 1]: continue
        for y in range(model.config.vocab_size):
            model.zero_grad()
            logp = model(r.ids, r.positions, r.attend())[0, t].log_softmax(-1)[y]
            logp.backward()
            for name, p in model.named_parameters(): found[name] += logp.detach().exp()*p.grad**2
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ROWS)
def test_fisher_equals_enumeration(name, ledger):
    "All draws of all counted positions, weighted by their probability"
    model, r = tiny(4), ROWS[name]
    exact, total = enumerated(model, r), None
    p = model(r.ids, r.positions, r.attend())[0, :-1].softmax(-1).detach()
    for targets in product(range(3), repeat=len(p)):
        chance = math.prod(float(p[t, y]) for t, y in enumerate(targets))
        squares = squared_score(model, r, torch.tensor([targets]))
        total = {n: (total[n] if total else 0) + chance*s for n, s in squares.items()}
    ledger(f"Fisher information, {name}, all draws", "enumeration", max(float((total[n] - exact[n]).abs().max()/exact[n].abs().max()) for n in exact), 1e-5)


def test_fisher_is_unbiased(ledger):
    model, r = tiny(5), ROWS["part of it counts"]
    exact = enumerated(model, r)
    many = Batch(*(x.expand(1500, -1) for x in (r.ids, r.mask, r.positions, r.segments)))
    found = fisher(model, many, seed=1)
    total, true = (sum(float(x.sum()) for x in f.values()) for f in (found, exact))
    ledger("Fisher information, 1,500 draws, relative error of the sum", "enumeration", abs(total*2/true - 1), .08)  # per counted token: two count
    assert all(p.grad is None for p in model.parameters())


def test_empirical_fisher_takes_the_real_tokens(ledger):
    model, r = tiny(6), ROWS["two documents"]
    right = squared_score(model, r, r.ids[:, 1:])
    found = fisher(model, r, empirical=True)
    ledger("empirical Fisher", "squared gradient of the loss of one row", max(float((found[n]*counted([r]) - right[n]).abs().max()) for n in right), 1e-6)
    model.zero_grad()
    batch_loss(model, r).backward()
    for n, p in model.named_parameters(): assert torch.allclose(found[n]*counted([r]), (p.grad*counted([r]))**2, atol=1e-6)


def test_kl_against_torch(ledger):
    old, new = tiny(1), tiny(2)
    batches = list(ROWS.values())
    a, b = (torch.cat([m(r.ids, r.positions, r.attend())[:, :-1].log_softmax(-1)[r.mask[:, 1:] > 0] for r in batches]).detach() for m in (old, new))
    ledger("KL(old, new)", "F.kl_div(new, old), batchmean", abs(kl_to_old(old, new, batches) - F.kl_div(b, a, reduction="batchmean", log_target=True).item()), 1e-6)
    assert abs(kl_to_old(old, new, batches) - kl_to_old(new, old, batches)) > .01
    assert kl_to_old(old, old, batches) == 0


def test_penalty_by_hand():
    now, anchor, importance = dict(a=torch.tensor([2., 1.], requires_grad=True), b=torch.tensor(7.)), dict(a=torch.tensor([1., 3.]), b=torch.tensor(0.)), dict(a=torch.tensor([3., .5]))
    penalty = ewc_penalty(now, anchor, importance, 4.)
    penalty.backward()
    assert penalty.item() == 10 and now["a"].grad.tolist() == [12., -4.]  # 4/2*(3*1 + .5*4); b has no importance and is free
    assert ewc_penalty(anchor, anchor, importance, 4.).item() == 0


def test_penalty_is_added_once_over_micro_batches():
    model = tiny(3)
    anchor = {n: p.detach() + .1 for n, p in model.named_parameters()}
    importance = {n: torch.full_like(p, 2.) for n, p in model.named_parameters()}
    loss, parts = ewc_loss(anchor, importance, 3.), [ROWS["one document"], ROWS["part of it counts"]]
    whole = batch_loss(model, parts[0], counted(parts)) + batch_loss(model, parts[1], counted(parts)) + ewc_penalty(dict(model.named_parameters()), anchor, importance, 3.)
    assert torch.allclose(sum(loss(model, b, counted(parts)) for b in parts), whole, atol=1e-5)


def test_shares_come_out_right():
    for batch, share in ((32, .01), (16, .05), (7, 1/3), (5, .999), (4, 0.)):
        for n in (1, 9, 100, 333): assert abs(sum(share_at(s, batch, share) for s in range(n)) - n*batch*share) < 1
    new, old = (Batch(torch.full((9, 4), fill), torch.ones(9, 4), torch.arange(4).expand(9, 4), torch.ones(9, 4, dtype=torch.long)) for fill in (1, 2))
    mix = replay_mix([new], [old], .3, batch=10)
    assert [int((mix(s).ids[:, 0] == 2).sum()) for s in range(4)] == [3, 3, 3, 3] and all(len(mix(s)) == 10 for s in range(4))
    assert torch.equal(mix(3).ids, mix(3).ids)


def test_kinds_take_turns():
    pools = [Batch(*(torch.full((6, 3), fill) for _ in range(4))) for fill in range(3)]
    got = torch.stack([torch.bincount(torch.cat([p.ids[:, 0] for p in drawn(pools, 4, step)]), minlength=3) for step in range(6)])
    assert (got.sum(1) == 4).all() and got.sum(0).tolist() == [8, 8, 8]
    assert len(torch.unique(drawn([Batch(*(torch.arange(6)[:, None],)*4)], 6, 0)[0].ids)) == 6  # no row twice in a step while there are others


def test_small_numbers_by_hand():
    assert forgetting([dict(a=.8, b=.1), dict(a=.5, b=.6)], dict(a=.25, b=.75)) == pytest.approx(dict(a=.55, b=-.15))
    assert restored(.9, .1, .7) == pytest.approx(.75)
    assert pareto([(.9, .1), (.5, .5), (.4, .5), (.8, .6), (.1, .95)]) == [4, 3, 0]
    mixed = average(dict(w=torch.tensor([1., 5.]), n=torch.tensor(3)), dict(w=torch.tensor([2., 1.]), n=torch.tensor(4)), .25)
    assert mixed["w"].tolist() == [1.25, 4.] and mixed["n"] == 4
