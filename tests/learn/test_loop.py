"What training is for: the loss falls, stopping early helps, bf16 and Muon earn their keep"
import random

import pytest
import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pad
from llmbench.train.loop import Fit, bf16_pays, evaluate, fit


def model(seed=0, V=12, C=32):
    torch.manual_seed(seed)
    return Transformer(Config(vocab_size=V, d_model=C, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=2*C, max_length=16))


def sums(n, seed):
    "a + b = c with one digit a token (10 is +, 11 is =): only the answer counts"
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(n)]
    return pad([([a, 10, b, 11, (a + b)//10, (a + b) % 10], [0, 0, 0, 0, 1, 1]) for a, b in pairs])


def test_one_batch_overfits():
    m, batch = model(), sums(8, 0)
    steps = [*fit(m, lambda step, micro: batch, Fit(steps=100, lr=1e-2, autocast="off"), progress=False)]
    assert steps[0].loss > 2 and steps[-1].loss < .05
    assert (m(batch.ids)[:, 3:5].argmax(-1) == batch.ids[:, 4:]).all(), "the answers come out"
    assert all(x.seconds < y.seconds and x.tokens + 16 == y.tokens for x, y in zip(steps, steps[1:]))


def test_stops_early_and_goes_back_to_the_best():
    "30 of the 100 sums, over and over: the others get worse after a while"
    few, others = sums(30, 1), sums(200, 2)
    config = Fit(steps=400, valid_every=10, patience=3, autocast="off")
    m = model()
    steps = [*fit(m, lambda step, micro: few, config, [others], progress=False)]
    measured = {s.step: s.valid_loss for s in steps if s.valid_loss is not None}
    best = min(measured, key=measured.get)
    assert len(steps) < 400 and steps[-1].step == best + 30, "three validations after the best it stops"
    assert evaluate(m, [others]) == pytest.approx(measured[best], abs=1e-6) and measured[steps[-1].step] > measured[best] + .05
    on = model()
    through = [*fit(on, lambda step, micro: few, Fit(steps=best + 31, valid_every=10, autocast="off"), [others], progress=False)]
    assert through[-1].valid_loss > measured[best] and evaluate(on, [others]) == pytest.approx(through[-1].valid_loss, abs=1e-6), "without patience the last weights stay"


def test_best_at_the_end_with_patience():
    "Patience that never runs out still ends with the best weights"
    few, others = sums(30, 1), sums(200, 2)
    m = model()
    steps = [*fit(m, lambda step, micro: few, Fit(steps=120, valid_every=20, patience=100, autocast="off"), [others], progress=False)]
    measured = [s.valid_loss for s in steps if s.valid_loss is not None]
    assert len(steps) == 120 and evaluate(m, [others]) == pytest.approx(min(measured), abs=1e-6) and measured[-1] > min(measured)


def test_muon_learns_more_in_the_same_steps():
    "Three seeds, unseen sums, the same embeddings' rate: Muon for the matrices, or AdamW at the better of two rates"
    def loss(seed, **named):
        m = model(seed)
        for _ in fit(m, lambda step, micro: sums(32, 100 + step), Fit(steps=120, autocast="off", **named), progress=False): pass
        return evaluate(m, [sums(300, 7)])
    muon = [loss(seed, lr=3e-2) for seed in range(3)]
    adamw = [min(loss(seed, lr=lr, matrix_lr=0) for lr in (1e-2, 3e-2)) for seed in range(3)]
    assert all(m < .7*a for m, a in zip(muon, adamw)), (muon, adamw)


def test_bf16_learns_as_well():
    losses = {}
    for autocast in ("on", "off"):
        m = model()
        losses[autocast] = [s.loss for s in fit(m, lambda step, micro: sums(16, step), Fit(steps=60, autocast=autocast), progress=False)]
        assert all(p.dtype == torch.float32 for p in m.parameters()), "weights and optimizer stay in fp32"
    assert losses["on"] != losses["off"]
    assert sum(losses["on"][-10:]) == pytest.approx(sum(losses["off"][-10:]), abs=1.)


def test_bf16_is_chosen_by_measuring(monkeypatch):
    "Whatever this machine is: a slow bf16 is refused, a fast one taken"
    import time
    clock, cost = [0.], {}
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    def timed(a, b):
        clock[0] += cost[a.dtype]
        return matmul(a, b)
    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    for slow, expected in ((1., False), (1.2, False), (4., True), (.2, False)):
        cost.update({torch.float32: slow, torch.bfloat16: 1.})
        bf16_pays.cache_clear()
        assert bf16_pays("cpu") is expected
    bf16_pays.cache_clear()
    assert bf16_pays("mps") is False


def test_clipping_bounds_the_step():
    "With plain gradients as updates, the first step is as long as the clip"
    from llmbench.train.loop import train_step
    m, batch = model(), sums(8, 0)
    before = [p.detach().clone() for p in m.parameters()]
    value, norm = train_step(m, [batch], [torch.optim.SGD(m.parameters(), lr=1.)], clip=.01)
    moved = sum(((a - b)**2).sum() for a, b in zip(m.parameters(), before))**.5
    assert norm > .1 and moved.item() == pytest.approx(.01, rel=1e-3)
    assert all(p.grad is None for p in m.parameters())
