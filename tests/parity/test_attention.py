"Attention, masks, RoPE and the cache against torch's kernel, transformers' Llama and double loops in fp64"
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

from llmbench.model.attention import KVCache, attention, attention_weights, causal_mask, plain_attention, rope, rope_frequencies, rope_table, rotate

SHAPES = [(1, 1, 1, 1, 1, 2), (2, 4, 2, 5, 5, 8), (3, 6, 1, 2, 7, 4), (2, 4, 4, 1, 9, 16), (2, 6, 3, 1, 4, 6), (1, 8, 2, 33, 64, 32)]
ids = ["x".join(map(str, s)) for s in SHAPES]


def inputs(shape, dtype=torch.float64, seed=0):
    B, H, Hkv, Tq, Tk, D = shape
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D))]


def masks(shape):
    "Every kind of mask for these queries and keys; in the last, some queries may look nowhere"
    B, _, _, Tq, Tk, _ = shape
    some = torch.rand(B, 1, Tq, Tk, generator=torch.Generator().manual_seed(1)) < .5
    some[0, 0, Tq//2] = False
    real = torch.arange(Tk) >= torch.arange(B)[:, None]
    return dict(none=None, causal=causal_mask(Tq, Tk), window=causal_mask(Tq, Tk, 2), left=causal_mask(Tq, Tk) & real[:, None, None], some=some)


def by_loops(q, k, v, mask):
    "Entry by entry, in fp64"
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    may = torch.ones(B, 1, Tq, Tk, dtype=torch.bool) if mask is None else mask.expand(B, 1, Tq, Tk)
    out = torch.zeros(B, H, Tq, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(Tq):
                seen = [j for j in range(Tk) if may[b, 0, i, j]]
                scores = [math.exp(sum(q[b, h, i, d].item()*k[b, h*Hkv//H, j, d].item() for d in range(D))/math.sqrt(D)) for j in seen]
                for j, s in zip(seen, scores): out[b, h, i] += s/sum(scores)*v[b, h*Hkv//H, j].double()
    return out


@pytest.mark.parametrize("kind", ["none", "causal", "window", "left", "some"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=ids[:5])
def test_both_versions_are_the_definition(shape, kind):
    q, k, v = inputs(shape)
    mask = masks(shape)[kind]
    want = by_loops(q, k, v, mask)
    torch.testing.assert_close(plain_attention(q, k, v, mask), want)
    torch.testing.assert_close(attention(q, k, v, mask), want)
    if kind == "causal": torch.testing.assert_close(attention(q, k, v, causal=True), want)


def test_against_the_kernel_with_gradients(ledger):
    worst = worst_gradient = 0.
    for shape in SHAPES:
        for mask in masks(shape).values():
            def run(function, shape=shape, mask=mask):
                x = [y.requires_grad_() for y in inputs(shape, torch.float32)]
                out = function(*x, mask)
                return out, torch.autograd.grad((out*torch.linspace(-1, 2, out.numel()).view_as(out)).sum(), x)
            def kernel(q, k, v, mask): return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            def repeated(q, k, v, mask):
                with sdpa_kernel(SDPBackend.MATH): return F.scaled_dot_product_attention(q, *(repeat_kv(x, q.shape[1]//k.shape[1]) for x in (k, v)), attn_mask=mask)
            want, gradients = run(repeated)
            for function in (kernel, plain_attention, attention):
                got, found = run(function)
                worst = max(worst, (got - want).abs().max().item())
                worst_gradient = max([worst_gradient, *((a - b).abs().max().item() for a, b in zip(found, gradients))])
    ledger("attention: GQA, masks, padding, 6 shapes", "torch SDPA, math backend, repeated keys", worst, 2e-6)
    ledger("attention, gradients of q, k, v", "torch SDPA, math backend, repeated keys", worst_gradient, 1e-5)


@pytest.mark.parametrize("queries, keys, window", [(1, 1, None), (4, 4, None), (2, 7, None), (5, 5, 1), (3, 9, 4), (6, 6, 100)])
def test_masks_against_transformers(queries, keys, window):
    allowed = sliding_window_causal_mask_function(window or keys)
    want = [[bool(allowed(0, 0, torch.tensor(keys - queries + i), torch.tensor(j))) for j in range(keys)] for i in range(queries)]
    assert causal_mask(queries, keys, window).tolist() == want


def test_an_additive_mask_is_the_bool_one():
    for shape in SHAPES[1:]:
        q, k, v = inputs(shape, torch.float32)
        may = masks(shape)["left"]
        rows = may.any(-1, keepdim=True).expand(*q.shape[:1], q.shape[1], *q.shape[2:])
        added = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)
        torch.testing.assert_close(attention(q, k, v, added)[rows], attention(q, k, v, may)[rows])
        assert attention(q, k, v, added).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=ids[1:])
def test_a_query_that_may_look_nowhere_gives_zero(shape, dtype):
    q, k, v = (x.requires_grad_() for x in inputs(shape, dtype))
    mask = masks(shape)["some"]
    for function in (plain_attention, attention):
        out = function(q, k, v, mask)
        assert (out[0, :, shape[3]//2] == 0).all()
        for x in (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))): assert x.isfinite().all()
    assert (attention_weights(q, k, mask).sum(-1)[0, :, shape[3]//2] == 0).all()


def test_the_future_does_not_reach_the_past():
    q, k, v = inputs((2, 4, 2, 9, 9, 8), torch.float32)
    before = attention(q, k, v, causal=True)
    for at in range(9):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, at] += 3
        v2[:, :, at] -= 5
        after = attention(q, k2, v2, causal=True)
        assert torch.equal(after[:, :, :at], before[:, :, :at])
        assert (after[:, :, at] != before[:, :, at]).any()


# RoPE

LLAMA31 = dict(rope_type="llama3", factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=8192)
WAYS = [dict(rope_type="default"), dict(rope_type="linear", factor=2.5), dict(rope_type="dynamic", factor=3., original_max_position_embeddings=40),
        LLAMA31, dict(LLAMA31, factor=32., original_max_position_embeddings=64, low_freq_factor=.5, high_freq_factor=3.)]


def llama(D, base, way, longest):
    way = {k: v for k, v in way.items() if way["rope_type"] == "llama3" or k != "original_max_position_embeddings"}
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=4*D, num_attention_heads=4, max_position_embeddings=longest, rope_parameters=dict(way, rope_theta=base)))


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w['rope_type']}{w.get('factor', '')}")
@pytest.mark.parametrize("D, base", [(8, 10000.), (64, 500000.), (128, 100.)])
def test_rope_is_that_of_llama(ledger, way, D, base):
    g = torch.Generator().manual_seed(0)
    worst = 0.
    for positions in (torch.arange(30), torch.arange(7, 90), torch.tensor([[3, 0, 55, 9], [70, 71, 2, 5]])):
        q, k, weigh = (torch.randn(2, 4, positions.shape[-1], D, generator=g) for _ in range(3))
        q.requires_grad_(), k.requires_grad_()
        table = llama(D, base, way, 40)(q, positions.expand(2, -1))
        want_q, want_k = apply_rotary_pos_emb(q, k, *table)
        got_q, got_k = (rope(x, positions, base, way) for x in (q, k))
        want = torch.autograd.grad((want_q*weigh).sum() + (want_k*weigh.roll(1, 0)).sum(), (q, k))
        got = torch.autograd.grad((got_q*weigh).sum() + (got_k*weigh.roll(1, 0)).sum(), (q, k))
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip((got_q, got_k, *got), (want_q, want_k, *want))))
    ledger(f"RoPE {way['rope_type']}{' x%g' % way['factor'] if 'factor' in way else ''}, D {D}, base {base:g}, with gradients", "transformers Llama", worst, 5e-5)


def test_ntk_is_a_larger_base():
    for D, base, factor in ((8, 10000., 2.), (64, 500000., 7.5)):
        want = llama(D, base*factor**(D/(D - 2)), dict(rope_type="default"), 40).inv_freq
        torch.testing.assert_close(rope_frequencies(D, base, dict(rope_type="ntk", factor=factor)), want, rtol=1e-5, atol=0)


def test_speeds_worked_by_hand():
    torch.testing.assert_close(rope_frequencies(8), torch.tensor([1., .1, .01, .001]))
    torch.testing.assert_close(rope_frequencies(4, 81.), torch.tensor([1., 1/9]))
    torch.testing.assert_close(rope_frequencies(4, 81., dict(type="linear", factor=3.)), torch.tensor([1/3, 1/27]))
    # within 20 pi tokens: 10 turns (fast, stays) and 10/9 turns: a keep of (10/9 - 1)/(4 - 1) = 1/27 between full speed and half of it
    way = dict(rope_type="llama3", factor=2., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=20*math.pi)
    torch.testing.assert_close(rope_frequencies(4, 81., way), torch.tensor([1., (1/27 + 26/27/2)/9]))


def test_bf16_rounds_the_table_and_not_the_positions():
    x = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.tensor([1000, 1001, 1002, 1003])
    want, _ = apply_rotary_pos_emb(x, x, *llama(64, 10000., WAYS[0], 40)(x, positions[None]))
    got = rope(x, positions)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= .04 # one rounding of numbers up to 4


@settings(max_examples=60, deadline=None)
@given(i=st.integers(0, 500), j=st.integers(0, 500), shift=st.integers(0, 1500), D=st.sampled_from([2, 8, 32]), seed=st.integers(0, 99))
def test_the_score_depends_on_the_distance_alone(i, j, shift, D, seed):
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(seed))
    def score(i, j): return (rope(q, torch.tensor([i]))*rope(k, torch.tensor([j]))).sum()
    torch.testing.assert_close(score(i + shift, j + shift), score(i, j), rtol=0, atol=4e-4*D**.5)


def test_the_table_serves_all_heads_at_once():
    x = torch.randn(2, 7, 6, 16, generator=torch.Generator().manual_seed(0)) # (B,T,H,D), as a fused product leaves it
    cos, sin = rope_table(torch.arange(7), 16)
    torch.testing.assert_close(rotate(x, cos[:, None], sin[:, None]).transpose(1, 2), rope(x.transpose(1, 2), torch.arange(7)))


# cache

@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), max_size=6), layers=st.integers(1, 3), kv=st.sampled_from([1, 2, 4]))
def test_cached_in_any_pieces_is_uncached(cuts, layers, kv):
    x = [inputs((2, 4, kv, 12, 12, 8), torch.float32, seed) for seed in range(layers)]
    want = [attention(*y, causal=True) for y in x]
    cache, got = KVCache(layers, 2, kv, 12, 8), [[] for _ in x]
    edges = sorted({0, 12, *cuts})
    for start, end in zip(edges, edges[1:]):
        assert cache.length == start
        for layer, (q, k, v) in enumerate(x):
            keys, values = cache.update(layer, k[:, :, start:end], v[:, :, start:end])
            assert keys.shape[2] == values.shape[2] == end
            got[layer].append(attention(q[:, :, start:end], keys, values, causal=True))
    for a, b in zip(got, want): torch.testing.assert_close(torch.cat(a, 2), b, rtol=0, atol=2e-6)


def test_the_cache_is_taken_once_and_keeps_its_type():
    cache = KVCache(2, 3, 1, 5, 4, torch.bfloat16)
    place = cache.keys.data_ptr()
    for _ in range(5):
        for layer in (0, 1): keys, values = cache.update(layer, torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 4)*2)
    assert cache.keys.data_ptr() == keys.data_ptr() - cache.keys[0].nbytes == place
    assert keys.dtype == torch.bfloat16 and (keys == 1).all() and (values == 2).all() and cache.length == 5
