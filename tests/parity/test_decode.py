"The folded decoder against the model itself and against transformers, for every shape that it takes; and what it must not take"
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, logging

from llmbench.model import generate as writing
from llmbench.model.attention import KVCache, causal_mask
from llmbench.model.decode import FlatDecoder, as_pairs, direction, flat_block, folds
from llmbench.model.generate import generate
from llmbench.model.transformer import Config, Transformer

logging.disable_progress_bar()
V, T, START = 70, 30, 11
BASE = Config(vocab_size=V, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_hidden=56, max_length=64, norm_eps=.01)
KINDS = dict(grouped={}, untied=dict(tied=False), all_heads=dict(n_kv_heads=6), one_head=dict(n_kv_heads=1, tied=False), window=dict(window=6),
             linear=dict(rope_scaling=dict(rope_type="linear", factor=3.)), base=dict(rope_base=300.),
             llama3=dict(rope_scaling=dict(rope_type="llama3", factor=4., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)))
IDS = torch.randint(V, (5, T), generator=torch.Generator().manual_seed(1))
KEYS = torch.arange(T) >= torch.tensor([[0], [4], [10], [1], [7]]) # left padding


def made(dtype=torch.float32, **changes):
    "Random, with norms that are far from ones"
    torch.manual_seed(3)
    model = Transformer(replace(BASE, **changes)).to(dtype).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=.3)
    return model


@torch.inference_mode()
def steps(model, keys=None):
    "Logits (B,T-START,V) of one token at a time behind a prompt of START"
    c, attend = model.config, None if keys is None else keys[:, None, None, :START] & causal_mask(START)
    cache = KVCache(c.n_layers, len(IDS), c.n_kv_heads, T, c.head_width, model.embed.weight.dtype)
    model.hidden(IDS[:, :START], attend=attend, cache=cache)
    decoder = FlatDecoder(model, cache, keys)
    return torch.stack([decoder(IDS[:, t]) for t in range(START, T)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_is_the_model(kind, ledger):
    model = made(**KINDS[kind])
    assert folds(model)
    with torch.inference_mode(): whole = model(IDS)[:, START:]
    ledger(f"logits of one token at a time, folded, {kind}", "the unfolded model, whole text", ((steps(model) - whole).abs().max()/whole.abs().max()).item(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible(kind):
    model = made(**KINDS[kind])
    got = steps(model, KEYS)
    for row, first, mine in zip(IDS, (~KEYS).sum(1), got):
        with torch.inference_mode(): alone = model(row[None, first:])[0, START - first:]
        torch.testing.assert_close(mine, alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["grouped", "untied", "llama3"])
def test_folded_is_transformers(kind, tmp_path, ledger):
    model = made(**KINDS[kind])
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode(): whole = theirs(IDS).logits[:, START:]
    ledger(f"logits of one token at a time, folded, {kind}", "transformers' Llama", ((steps(model) - whole).abs().max()/whole.abs().max()).item(), 1e-5)


def test_double_precision_agrees_to_its_last_digits():
    model = made(torch.float64)
    with torch.inference_mode(): whole = model(IDS)[:, START:]
    torch.testing.assert_close(steps(model), whole, atol=1e-5, rtol=1e-6) # RoPE's table is in 32 bits on both sides


def test_pencil_and_paper():
    assert as_pairs(torch.tensor([[10, 11, 12, 20, 21, 22]])).tolist() == [[10, 20, 11, 21, 12, 22]]
    assert direction(torch.tensor([[3., 4.]]), torch.tensor(12.)).tolist() == [[pytest.approx(3/13), pytest.approx(4/13)]] # hypot(5, 12) = 13
    model = made()
    a, D, C = model.blocks[1].attention, 8, 48
    qkv, out, gate_up, down = flat_block(model.blocks[1])
    g = model.blocks[1].norm_attention.weight
    assert qkv[5, 1].item() == pytest.approx((a.qkv.weight[4, 5]*g[5]*C**.5/D**.5).item(), rel=1e-5)             # a query's second place: coordinate D/2
    assert qkv[7, C + 2].item() == pytest.approx((a.qkv.weight[C + 1, 7]*g[7]*C**.5).item(), rel=1e-5)           # a key's third: coordinate 1, no scale
    assert qkv[2, C + 2*D + 3].item() == pytest.approx((a.qkv.weight[C + 2*D + 3, 2]*g[2]*C**.5).item(), rel=1e-5) # a value stays where it is
    assert torch.equal(out, a.out.weight.t()) and torch.equal(down, model.blocks[1].mlp.down.weight.t())
    assert gate_up[9, 4].item() == pytest.approx((model.blocks[1].mlp.gate_up.weight[4, 9]*model.blocks[1].norm_mlp.weight[9]*C**.5).item(), rel=1e-5)


def test_what_is_changed_or_watched_does_not_fold():
    assert not folds(made(n_experts=4)) and not folds(made().bfloat16()) and not folds(torch.nn.Linear(3, 3)) and not folds(lambda ids: ids)
    for change in ("hook", "pre-hook", "bias", "adapter", "subclass"):
        model = made()
        mlp = model.blocks[2].mlp
        if change == "hook": mlp.register_forward_hook(lambda *_: None)
        if change == "pre-hook": mlp.down.register_forward_pre_hook(lambda *_: None)
        if change == "bias": mlp.down = torch.nn.Linear(56, 48)
        if change == "adapter": mlp.down = torch.nn.Sequential(mlp.down)
        if change == "subclass": mlp.down.__class__ = type("Mine", (torch.nn.Linear,), {})
        assert not folds(model), change


def test_autocast_asks_the_model_itself():
    model = made()
    with torch.autocast("cpu", torch.bfloat16): assert not folds(model)
    assert folds(model)


def test_generate_folds_for_long_texts_only_and_says_the_same(monkeypatch):
    model, made_decoders = made(), []
    monkeypatch.setattr(writing, "FlatDecoder", lambda *args: made_decoders.append(1) or FlatDecoder(*args))
    short = generate(model, IDS[:, :9], 15, temperature=0)
    assert not made_decoders
    long = generate(model, IDS[:, :9], 16, temperature=0)
    assert made_decoders and torch.equal(long[:, :24], short)
    with torch.no_grad(): model.norm.weight[3] *= 4 # a later change is seen by the next text
    text = generate(model, IDS[:, :9], 16, temperature=0)
    assert torch.equal(text[:, -1], model(text[:, :-1])[:, -1].argmax(-1)) and not torch.equal(text, long)


def test_weights_and_table_stay_as_they_were():
    model = made()
    before, table = {k: v.clone() for k, v in model.state_dict().items()}, [t.clone() for t in model.angles(0, 20, None, model.embed.weight)]
    steps(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(table, model.angles(0, 20, None, model.embed.weight)))
