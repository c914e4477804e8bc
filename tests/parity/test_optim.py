"Schedule, Muon and parameter groups against transformers, torch.optim.Muon and the singular value decomposition"
import math

import numpy as np
import pytest
import torch
from torch import nn

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.train.optim import Muon, fused_parts, hidden_matrices, make_optimizers, orthogonalize, schedule, set_rates


@pytest.mark.parametrize("steps,warmup,final", [(100, 10, .1), (37, 0, 0.), (50, 49, .3), (20, 5, 1.)])
def test_schedule(steps, warmup, final, ledger):
    from transformers import get_cosine_with_min_lr_schedule_with_warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=final)
    theirs = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        theirs.append(scheduler.get_last_lr()[0])
    ours = [schedule(i, steps, warmup, final) for i in range(steps)]
    ledger(f"schedule {steps}/{warmup}/{final}", "transformers cosine_with_min_lr, one step on", np.abs(np.subtract(ours, theirs)).max(), 1e-12)
    assert min(ours) > 0 or final == 0, "their first step has a rate of 0, ours does not"


def test_schedule_by_hand():
    assert [schedule(i, 8, 4, .5) for i in range(4)] == [.25, .5, .75, 1.]
    assert schedule(5, 8, 4, .5) == pytest.approx(.75), "half of the way down"
    assert schedule(7, 8, 4, .5) == pytest.approx(.5), "the last step has the final rate"
    assert schedule(2, 3, 20) == pytest.approx(.15), "a run shorter than its warm-up"


def polynomial(s):
    for _ in range(5): s = 3.4445*s - 4.7750*s**3 + 2.0315*s**5
    return s


SHAPES = [(16, 16), (48, 16), (16, 40), (3, 7), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_by_svd(shape, ledger):
    "The iteration is a polynomial of each singular value, and leaves the singular vectors alone"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    u, s, v = np.linalg.svd(x.numpy(), full_matrices=False)
    expected = u*polynomial(s/np.sqrt((s**2).sum())) @ v
    ledger(f"orthogonalize {shape}", "SVD", np.abs(orthogonalize(x).numpy() - expected).max(), 1e-12)


def test_orthogonalize_flattens():
    x = torch.randn(3, 2, 24, 16, generator=torch.Generator().manual_seed(2))
    y = orthogonalize(x)
    assert y.shape == x.shape
    s = torch.linalg.svdvals(y)
    assert .6 < s.min() and s.max() < 1.25, "singular values near 1"
    assert torch.linalg.svdvals(x).max()/torch.linalg.svdvals(x).min() > 4, "they were not before"
    for i in range(3):
        for j in range(2): assert (orthogonalize(x[i, j]) - y[i, j]).abs().max() < 1e-5, "a stack is its matrices"
    assert torch.isfinite(orthogonalize(torch.zeros(4, 3))).all()


def train(optimizer, params, steps=6):
    g = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for p in params: p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


def weights(): return [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(4))) for s in (*SHAPES[:3], (16, 16))]


def test_muon_against_torch(ledger):
    "torch orthogonalises in bf16: the products may round differently, no more than that"
    ours, theirs = weights(), weights()
    train(Muon(ours, lr=.05, momentum=.9, decay=.3, bf16=True), ours)
    train(torch.optim.Muon(theirs, lr=.05, momentum=.9, weight_decay=.3), theirs)
    moved = max((a - b).abs().max() for a, b in zip(theirs, weights()))
    assert moved > .2
    ledger("Muon in bf16, 6 steps", "torch.optim.Muon", max((a - b).abs().max() for a, b in zip(ours, theirs)), .01*moved)


def test_muon_by_svd(ledger):
    "In fp64, the whole step written with an SVD"
    ours = [nn.Parameter(p.detach().double()) for p in weights()]
    theirs, memory, g = [p.detach().numpy().copy() for p in ours], [0.]*4, torch.Generator().manual_seed(3)
    train(Muon(ours, lr=.05, momentum=.9, decay=.3), ours)
    for _ in range(6):
        for i, w in enumerate(theirs):
            grad = torch.randn(w.shape, generator=g).numpy().astype(float)
            memory[i] = .9*memory[i] + .1*grad
            u, s, v = np.linalg.svd(.1*grad + .9*memory[i], full_matrices=False)
            w *= 1 - .05*.3
            w -= .05*math.sqrt(max(1, w.shape[0]/w.shape[1]))*(u*polynomial(s/np.sqrt((s**2).sum())) @ v)
    ledger("Muon in fp64, 6 steps", "numpy SVD", max(np.abs(a.detach().numpy() - b).max() for a, b in zip(ours, theirs)), 1e-10)


def test_muon_parts_and_stacks():
    "A fused matrix with parts, a stack of matrices, and the matrices on their own take the same step"
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 8, 12, generator=g), torch.randn(2, 4, 12, generator=g)
    fused, stack = nn.Parameter(torch.cat((q[0], k[0]))), nn.Parameter(torch.cat((q, k), 1))
    alone = [nn.Parameter(x.clone()) for x in (*q, *k)]
    fused.grad, stack.grad = fused.detach()*2, stack.detach()*2
    for p in alone: p.grad = p.detach()*2
    Muon([fused], .1, parts={fused: (8, 4)}).step()
    Muon([stack], .1, parts={stack: (8, 4)}).step()
    Muon(alone, .1).step()
    assert (fused - torch.cat((alone[0], alone[2]))).abs().max() < 1e-6
    assert (stack[1] - torch.cat((alone[1], alone[3]))).abs().max() < 1e-6
    whole = nn.Parameter(torch.cat((q[0], k[0])))
    whole.grad = whole.detach()*2
    Muon([whole], .1).step()
    assert (whole - fused).abs().max() > 1e-3, "and the fused matrix as a whole another"


def names(model, params):
    wanted = {id(p) for p in params}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("tied", [True, False])
def test_who_trains_what(tied):
    model = Transformer(Config(vocab_size=60, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, tied=tied))
    adamw, muon = make_optimizers(model, 1e-3, .02, .1)
    matrices = names(model, muon.param_groups[0]["params"])
    assert len(matrices) == 2*4 and all(name.startswith("blocks.") for name in matrices)
    decayed, free = (names(model, g["params"]) for g in adamw.param_groups)
    assert decayed == ({"embed.weight"} if tied else {"embed.weight", "head.weight"})
    assert len(free) == 2*2 + 1 and all("norm" in name for name in free)
    assert [g["weight_decay"] for g in adamw.param_groups] == [.1, 0.]
    assert matrices | decayed | free == {name for name, _ in model.named_parameters()}, "each parameter once"
    alone, = make_optimizers(model, 1e-3, 0.)
    assert sum(len(g["params"]) for g in alone.param_groups) == len([*model.parameters()])


def test_llama_of_transformers():
    "A head that shares its width with the vocabulary is no hidden matrix, whoever built the model"
    from transformers import LlamaConfig, LlamaForCausalLM
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False))
    found = names(llama, hidden_matrices(llama))
    assert len(found) == 2*7 and not any("lm_head" in n or "embed" in n or "norm" in n for n in found)


def test_only_matrices_decay():
    "With no gradient to speak of, matrices shrink and norms stay"
    model = Transformer(Config(vocab_size=60, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=24))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, .1, .1, .5)
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    for o in optimizers: o.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name]*(1. if p.ndim < 2 else 1 - .1*.5), atol=1e-7), name


def test_frozen_and_rates():
    model = Transformer(Config(vocab_size=60, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=24))
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in names(model, [p for o in make_optimizers(model) for g in o.param_groups for p in g["params"]])
    made = make_optimizers(model, 1e-3, .02)
    set_rates(made, .5)
    set_rates(made, .25)
    assert [g["lr"] for o in made for g in o.param_groups] == [1e-3/4, .02/4], "a share of the peak, not of the last rate"
    for p in model.parameters(): p.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"): make_optimizers(model)


def test_transformer_says_its_parts():
    model = Transformer(Config(vocab_size=60, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24))
    parts = fused_parts(model)
    if not parts: pytest.skip("the model names no fused matrices")
    assert all(sum(rows) == p.shape[-2] for p, rows in parts.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_more_than_a_width(tied):
    "gate_up with as many rows as the vocabulary stays Muon's; the head never is"
    model = Transformer(Config(vocab_size=300, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=150, tied=tied))
    twin = Transformer(Config(vocab_size=299, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=150, tied=tied))
    found, expected = ([n for n, p in m.named_parameters() if any(p is q for q in hidden_matrices(m))] for m in (model, twin))
    assert found == expected and sum(p.shape[0] == 300 for n, p in model.named_parameters() if n in found) == 2
    from transformers import LlamaConfig, LlamaForCausalLM
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
    chosen = {n.split(".")[-2] for n, p in llama.named_parameters() if any(p is q for q in hidden_matrices(llama))}
    assert chosen == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    plain = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30))
    assert [p.shape for p in hidden_matrices(plain)] == [(8, 8)], "a head need not be called one"


def test_the_town_is_as_it_was():
    "The default model's matrices, by the old rule: width alone"
    model = Transformer(Config())
    widths = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    old = [n for n, p in model.named_parameters() if p.ndim >= 2 and p.shape[0] not in widths]
    assert [n for n, p in model.named_parameters() if any(p is q for q in hidden_matrices(model))] == old
