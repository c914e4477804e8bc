"Backward passes written by hand, against autograd, torch's own operations, and differences"
import pytest
import torch
import torch.nn.functional as F

from llmbench.model import fused
from llmbench.model.attention import causal_mask, plain_attention, rope_table, rotate
from llmbench.model.transformer import Config, Transformer


def draw(seed, *shape, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(out, inputs, seed=9): return torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype))


def worst(mine, other): return max(float((a.detach().double() - b.detach().double()).abs().max()/b.detach().double().abs().max()) for a, b in zip(mine, other))


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-5), (torch.bfloat16, .015)])
@pytest.mark.parametrize("width, eps", [(128, 1e-5), (5, .5)])
def test_rms_norm(dtype, bar, width, eps, ledger):
    "Value and both gradients; the oracle works in double precision"
    x, weight = draw(0, 3, 700, width, dtype=dtype), draw(1, width)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    out, want = fused.rms_norm(x, weight, eps), F.rms_norm(x64, (width,), weight64, eps)
    assert out.dtype == dtype
    error = worst((out, *gradients(out, (x, weight))), (want, *gradients(want, (x64, weight64))))
    ledger(f"RMSNorm with gradients, width {width}, {str(dtype)[6:]}", "torch in double", error, bar)


def test_rms_norm_differences_and_broken_strides():
    x, weight = (t.double().detach().requires_grad_() for t in (draw(2, 2, 3, 5), draw(3, 5)))
    assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x.mT, w[:2], 1e-3), (torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True), weight))
    with torch.no_grad(): assert torch.allclose(fused.rms_norm(x, weight, 1e-3), F.rms_norm(x, (5,), weight, 1e-3))
    assert torch.equal(fused.rms_norm(torch.zeros(2, 4, requires_grad=True), torch.ones(4)), torch.zeros(2, 4))


@pytest.mark.parametrize("positions", [torch.arange(7), torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]])])
def test_turn(positions, ledger):
    x = draw(4, 2, 7, 3, 8)
    cos, sin = (t.unsqueeze(-2) for t in rope_table(positions, 8))
    out, want = fused.turn(x, cos, sin), rotate(x, cos, sin)
    assert torch.equal(out, want)
    ledger("rotation, gradient by the rotation back", "autograd", worst(gradients(out, [x]), gradients(want, [x])), 1e-6)


SHAPES = {"one short block": (2, 4, 2, 9, 8), "two blocks and a rest": (3, 4, 2, 300, 8), "every head its own keys": (1, 3, 3, 129, 4), "one key head": (2, 6, 1, 128, 4)}


@pytest.mark.parametrize("name", SHAPES)
def test_blocked_attention(name, ledger):
    B, H, Hkv, T, D = SHAPES[name]
    qkv = draw(5, B, H, T, D), draw(6, B, Hkv, T, D), draw(7, B, Hkv, T, D)
    out, want = fused.blocked_attention(*qkv), plain_attention(*qkv, causal_mask(T))
    ledger(f"blocked attention with gradients, {name}", "written out", worst((out, *gradients(out, qkv)), (want, *gradients(want, qkv))), 2e-5)


@pytest.mark.parametrize("cache", [1, 2**20])
def test_blocked_attention_in_chunks_and_differences(cache, monkeypatch):
    monkeypatch.setattr(fused, "CACHE", cache)  # 1: every row is a chunk of its own
    monkeypatch.setattr(fused, "BLOCK", 16)  # two queries in double precision
    qkv = [draw(h, 3, h, 5, 2).double().detach().requires_grad_() for h in (4, 2, 2)]
    assert torch.autograd.gradcheck(fused.blocked_attention, qkv)
    mask = torch.zeros(3, 1, 5, 5, dtype=torch.float64).masked_fill(~causal_mask(5) | (torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < .3) & ~torch.eye(5, dtype=torch.bool), torch.finfo(torch.float64).min)
    assert torch.autograd.gradcheck(lambda *a: fused.blocked_attention(*a, mask), qkv)
    want = plain_attention(*qkv, mask == 0)
    assert torch.allclose(fused.blocked_attention(*qkv, mask), want)


@pytest.mark.parametrize("documents", [[150], [70, 80], [10, 60, 64, 16]])
def test_blocked_attention_with_a_mask(documents, ledger):
    "Packed documents (blocks skip what nobody sees), then one row with a view of everything (nothing to skip)"
    qkv = draw(5, 2, 4, 150, 8), draw(6, 2, 2, 150, 8), draw(7, 2, 2, 150, 8)
    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    causal = (number[:, None] == number) & causal_mask(150)
    for sees, ends in ((causal.expand(2, 1, 150, 150), (64, 128, 150)), (torch.stack([causal, torch.ones_like(causal)])[:, None], (150, 150, 150))):
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        assert fused._plan(torch.empty(2, 2, 2, 150, 8), mask[:, :, None])[0] == list(zip((0, 64, 128), (64, 128, 150), ends))
        out, want = fused.blocked_attention(*qkv, mask), plain_attention(*qkv, sees)
        ledger(f"blocked attention under a mask, {len(documents)} documents", "written out", worst((out, *gradients(out, qkv)), (want, *gradients(want, qkv))), 2e-5)


def test_a_row_that_sees_nothing_stays_finite():
    qkv = [draw(h, 1, h, 6, 4) for h in (4, 2, 2)]
    mask = torch.full((1, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[0, 0, 4] = torch.finfo(torch.float32).min
    out = fused.blocked_attention(*qkv, mask)
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients(out, qkv))
    assert torch.allclose(out[:, :, :4], plain_attention(*qkv, causal_mask(6))[:, :, :4], atol=1e-6)


def test_which_attention(monkeypatch):
    "Blocked only while training on a CPU, for whole texts whose shares may be kept"
    called = []
    monkeypatch.setattr(fused, "blocked_attention", lambda q, k, v, mask=None: called.append((q.dtype, mask is None)) or q)
    monkeypatch.setattr(fused, "KEEP", 2*64*2)
    half, whole = torch.bfloat16, torch.float32
    def qkv(T, S=None, dtype=half): return [torch.ones(1, 2, n, 4, dtype=dtype) for n in (T, S or T, S or T)]
    def mask(T, dtype=half): return torch.zeros(1, 1, T, 8, dtype=dtype)
    for args in (qkv(8), [*qkv(8), mask(8)], qkv(5, dtype=whole)): fused.training_attention(*args)
    assert called == [(half, True), (half, False), (whole, True)]
    for args in (qkv(9), qkv(8, dtype=whole), qkv(1), qkv(1, 5), qkv(3, 5), [*qkv(8), mask(1)], [*qkv(5, dtype=whole), torch.zeros(5, 5)], qkv(4, dtype=torch.float64)):
        fused.training_attention(*args)
    with torch.no_grad(): fused.training_attention(*qkv(8))
    assert len(called) == 3


def train(bf16, packed=False):
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=40, d_model=48, n_layers=3, n_heads=4, n_kv_heads=2, d_hidden=96, max_length=136))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(40, generator=generator)  # each token decides the next
    ids = torch.randint(40, (160, 1), generator=generator)
    while ids.shape[1] < 136: ids = torch.cat([ids, torch.where(torch.rand(160, 1, generator=generator) < .9, table[ids[:, -1:]], torch.randint(40, (160, 1), generator=generator))], 1)
    attend = None
    if packed:
        document = torch.arange(136)//40
        attend = ((document[:, None] == document) & causal_mask(136))[None, None]
    for rows in ids.split(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): logits = model(rows, attend=attend)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("packed", [False, True])
def test_training_in_bf16_learns_as_fp32_does(packed):
    "Stream, norms, rotation and attention in bf16: the same curve as in fp32, within a few hundredths of a nat"
    half, whole = train(True, packed), train(False, packed)
    assert whole[0] > 3.5 and whole[-5:].mean() < 1.8, whole[-5:]
    assert abs(half[-5:].mean() - whole[-5:].mean()) < .05, (half[-5:], whole[-5:])


def test_gradients_in_bf16_point_where_those_in_fp32_do():
    torch.manual_seed(0)
    model, ids = Transformer(Config(vocab_size=40, d_model=48, n_layers=3, n_heads=4, n_kv_heads=2, d_hidden=96)), torch.randint(40, (4, 200))
    found = []
    for bf16 in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): logits = model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        found.append({name: p.grad.flatten().clone() for name, p in model.named_parameters()})
    for name in found[0]: assert F.cosine_similarity(found[0][name], found[1][name], 0) > .99, name


def test_a_second_derivative_is_refused():
    x = draw(8, 2, 4)
    slope, = torch.autograd.grad(fused.rms_norm(x, torch.ones(4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"): slope.sum().backward()
