"Generation against transformers' generate and its logits processors, against enumeration, and against itself one by one"
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LogitsProcessorList, RepetitionPenaltyLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, logging)

from llmbench.model.attention import KVCache
from llmbench.model.generate import bare, filter_logits, generate, left_padding, new_tokens, penalise, stream
from llmbench.model.transformer import Config, Transformer

logging.disable_progress_bar()
V, NEW = 60, 24
LENGTHS = torch.tensor([9, 1, 6, 4, 9])
IDS = torch.randint(3, V, (5, 9), generator=torch.Generator().manual_seed(7))
LEFT = (torch.arange(9) >= 9 - LENGTHS[:, None]).long()
BASE = dict(vocab_size=V, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_hidden=48, max_length=64)
KINDS = dict(grouped={}, untied=dict(tied=False), all_heads=dict(n_kv_heads=4), one_head=dict(n_kv_heads=1, tied=False),
             linear=dict(rope_scaling=dict(rope_type="linear", factor=3.)), window=dict(window=5, tied=False), experts=dict(n_experts=4, tied=False),
             llama3=dict(rope_scaling=dict(rope_type="llama3", factor=4., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)))


def sharp(seed=0, **changes):
    "A random model whose scores differ clearly, so that two ways of adding up agree on the best"
    torch.manual_seed(seed)
    model = Transformer(Config(**(BASE | changes))).eval()
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=.3)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    ours = sharp(**KINDS[request.param])
    folder = ours.save_pretrained(tmp_path_factory.mktemp(request.param))
    return request.param, ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def library(model, ids, mask=None, n=NEW, **how):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, **(dict(eos_token_id=None, pad_token_id=0) | how))


def differing(a, b): return (a != b).sum().item() if a.shape == b.shape else max(a.numel(), b.numel())


def test_greedy_tokens_are_those_of_transformers(pair, ledger):
    name, ours, theirs = pair
    plain, padded = library(theirs, IDS), library(theirs, IDS*LEFT, LEFT)
    assert differing(plain[:, 9:], padded[:, 9:]) > 0 # padding makes another prompt of it
    ledger(f"greedy tokens, {name}", "transformers generate", differing(generate(ours, IDS, NEW, temperature=0), plain), 0)
    ledger(f"greedy tokens, {name}, left padding", "transformers generate", differing(generate(ours, IDS*LEFT, NEW, temperature=0, mask=LEFT), padded), 0)
    assert torch.equal(generate(theirs, IDS, NEW, temperature=0), plain)                         # their model, our loop, their cache
    assert torch.equal(generate(theirs, IDS*LEFT, NEW, temperature=0, mask=LEFT), padded)


def test_penalty_and_ends_are_those_of_transformers(pair, ledger):
    name, ours, theirs = pair
    plain = library(theirs, IDS)
    penalised = library(theirs, IDS, repetition_penalty=1.7)
    assert differing(plain, penalised) > 0
    ledger(f"greedy tokens, {name}, repetition penalty 1.7", "transformers generate", differing(generate(ours, IDS, NEW, temperature=0, repetition_penalty=1.7), penalised), 0)
    ends = [int(plain[0, 12]), int(plain[1, 15])]
    for eos in (ends[0], ends):
        want = library(theirs, IDS, eos_token_id=eos, pad_token_id=1)
        assert (want[0, 13:] == 1).all()
        ledger(f"greedy tokens, {name}, {1 if eos == ends[0] else 2} end tokens", "transformers generate", differing(generate(ours, IDS, NEW, temperature=0, eos_id=eos, pad_id=1), want), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1., 1.5])
def test_together_is_one_by_one(kind, penalty):
    model = sharp(**KINDS[kind])
    for pad in (0, 5): # whatever stands under the padding
        whole = generate(model, torch.where(LEFT > 0, IDS, pad), NEW, temperature=0, mask=LEFT, repetition_penalty=penalty)
        for row, n, got in zip(IDS, LENGTHS, whole):
            assert torch.equal(generate(model, row[None, 9-n:], NEW, temperature=0, repetition_penalty=penalty)[0], got[9-n:])


def test_a_row_behind_much_padding_is_no_other_row():
    model, row = sharp(max_length=200), IDS[:1]
    far = F.pad(row, (150, 0), value=2)
    got = generate(model, far, NEW, temperature=0, mask=(torch.arange(159) >= 150)[None])
    assert torch.equal(got[:, 150:], generate(model, row, NEW, temperature=0))


@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=1.3, top_k=12, top_p=.9), dict(temperature=0, repetition_penalty=1.4)])
def test_cached_is_uncached(how):
    model = sharp(1)
    def seeded(model): return generate(model, IDS, NEW, generator=torch.Generator().manual_seed(3), **how)
    assert torch.equal(seeded(model), seeded(lambda ids: model(ids)))


def test_padding_takes_no_place():
    keys, positions = left_padding(torch.tensor([[0, 0, 1], [1, 1, 1]]), 5)
    assert keys.tolist() == [[False, False, True, True, True], [True]*5]
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert left_padding(None, 5) == left_padding(torch.ones(2, 3), 5) == (None, None)


def test_a_model_with_learned_positions_is_told_them():
    "RoPE forgives a row that is shifted as a whole, GPT-2 does not"
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)).eval()
    for p in gpt2.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=.3)
    whole = generate(gpt2, IDS*LEFT, NEW, temperature=0, mask=LEFT)
    for row, n, got in zip(IDS, LENGTHS, whole): assert torch.equal(generate(gpt2, row[None, 9-n:], NEW, temperature=0)[0], got[9-n:])
    with pytest.raises(ValueError, match="64 positions"): generate(gpt2, IDS, 56)


@pytest.mark.parametrize("kind", KINDS)
def test_bare_is_the_model(kind):
    model = sharp(**KINDS[kind])
    with torch.no_grad():
        want = model(IDS)
        torch.testing.assert_close(bare(model)(IDS), want, rtol=0, atol=0)
        model.blocks[1].attention.out.weight *= 2 # shared: a later change is seen, in a folded copy it is not
        plain = bare(model)
        model.norm.weight *= 3
        torch.testing.assert_close(plain(IDS), model(IDS), rtol=0, atol=0)


def test_what_is_watched_or_unknown_stays_a_module():
    model, seen = sharp(), []
    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
        def forward(self, x): return self.inner(x) + 1
    model.blocks[0].mlp.down = Adapter(model.blocks[0].mlp.down)
    hook = model.blocks[2].mlp.register_forward_hook(lambda *args: seen.append(1))
    plain = bare(model)
    assert plain.blocks[0].mlp.down is model.blocks[0].mlp.down and plain.blocks[2].mlp is model.blocks[2].mlp
    assert not isinstance(plain.blocks[0].mlp.gate_up, torch.nn.Module)
    assert torch.equal(generate(model, IDS, NEW, temperature=0), generate(lambda ids: model(ids), IDS, NEW, temperature=0))
    assert len(seen) == 2*NEW + 1 # each token, with the cache and without; and the prompt
    hook.remove()
    assert not isinstance(bare(model).blocks[2].mlp, torch.nn.Module)


# distributions

def warped(ids, logits, temperature, top_k, top_p, penalty):
    chain = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    if top_k: chain.append(TopKLogitsWarper(top_k))
    if top_p < 1: chain.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList(chain)(ids, logits).softmax(-1)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([.1, .7, 1., 2.5]), top_k=st.sampled_from([0, 1, 2, 5, 11, 12, 40]),
       top_p=st.sampled_from([1e-6, .1, .5, .75, .99, 1.]), penalty=st.sampled_from([.8, 1., 1.3]), ties=st.booleans())
@example(seed=0, temperature=1., top_k=3, top_p=.5, penalty=1., ties=True)
def test_filters_are_those_of_transformers(seed, temperature, top_k, top_p, penalty, ties):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 12, generator=g)*4
    if ties: logits = logits.round()
    ids = torch.randint(0, 12, (3, 4), generator=g)
    seen = F.one_hot(ids, 12).any(1)
    got = filter_logits(penalise(logits, seen, penalty), temperature, top_k, top_p)
    torch.testing.assert_close(got, warped(ids, logits, temperature, top_k, top_p, penalty), rtol=1e-5, atol=1e-7)


def test_filters_are_recorded(ledger):
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(64, 500, generator=g)*3, torch.randint(0, 500, (64, 20), generator=g)
    ours = filter_logits(penalise(logits, torch.zeros(64, 500).scatter(1, ids, 1) > 0, 1.2), .8, 50, .9)
    ledger("penalty, temperature, top-k, top-p in a row: probabilities", "transformers LogitsProcessorList", (ours - warped(ids, logits, .8, 50, .9, 1.2)).abs().max(), 1e-6)


@pytest.mark.parametrize("how, want", [
    (dict(), [.5, .2, .15, .1, .05]),
    (dict(temperature=0), [1, 0, 0, 0, 0]),
    (dict(temperature=.5), [x*x/.325 for x in (.5, .2, .15, .1, .05)]),
    (dict(top_k=2), [5/7, 2/7, 0, 0, 0]),
    (dict(top_k=1), [1, 0, 0, 0, 0]),
    (dict(top_k=9), [.5, .2, .15, .1, .05]),
    (dict(top_p=.6), [5/7, 2/7, 0, 0, 0]),
    (dict(top_p=.72), [.5/.85, .2/.85, .15/.85, 0, 0]),
    (dict(top_p=.01), [1, 0, 0, 0, 0]),
    (dict(top_p=1e-9), [1, 0, 0, 0, 0]),                              # 1 - 1e-9 is 1 in fp32: the best stays all the same
    (dict(temperature=.5, top_p=.8), [25/29, 4/29, 0, 0, 0]),         # squared: .769, .123, .069, ...: the first two hold .892
    (dict(top_k=3, top_p=.8), [5/7, 2/7, 0, 0, 0]),                   # top-p counts what top-k left: .588, .235, .176
])
def test_distributions_by_hand(how, want):
    order = torch.tensor([3, 0, 4, 1, 2]) # not sorted
    logits = torch.tensor([[.5, .2, .15, .1, .05]]).log()[:, order] + 1.7
    torch.testing.assert_close(filter_logits(logits, **how)[0], torch.tensor(want, dtype=torch.float)[order], rtol=1e-4, atol=1e-6)


def test_penalty_by_hand():
    logits, seen = torch.tensor([[3., -3., 3., -3., 0.]]), torch.tensor([[True, True, False, False, True]])
    assert penalise(logits, seen, 1.5).tolist() == [[2., -4.5, 3., -3., 0.]]


TABLE = torch.tensor([[-9, 0, .5, 1, -.3], [-9, 1, -1, 0, .2], [-9, .4, .1, -2, 1.], [-9, -.5, 2, .3, 0], [-9, .7, .7, -.2, .1]]) # row: token, column: next; 0 pads, 1 ends


@pytest.mark.parametrize("how", [dict(), dict(temperature=.6), dict(top_k=3), dict(temperature=1.8, top_p=.8), dict(repetition_penalty=2.)])
def test_texts_come_as_often_as_they_should(how):
    n, steps = 40_000, 3
    def chances(text):
        if how.get("repetition_penalty"):
            seen = torch.zeros(1, 5, dtype=torch.bool).scatter(1, torch.tensor([text]), True)
            return filter_logits(penalise(TABLE[text[-1]][None], seen, 2.))[0]
        return filter_logits(TABLE[text[-1]][None], **how)[0]
    want = {}
    for tail in itertools.product(range(5), repeat=steps): # every text of three tokens; after the end, padding
        p, text = 1., [2]
        for token in tail:
            p *= float(token == 0) if 1 in text else float(chances(text)[token])
            text.append(token)
        if p: want[tuple(tail)] = p
    assert math.isclose(sum(want.values()), 1, rel_tol=1e-4)
    out = generate(lambda ids: TABLE[ids], torch.full((n, 1), 2), steps, eos_id=1, pad_id=0, generator=torch.Generator().manual_seed(11), **how)
    rows, counts = out[:, 1:].unique(dim=0, return_counts=True)
    got = dict(zip(map(tuple, rows.tolist()), counts.tolist()))
    often = {text: p for text, p in want.items() if n*p >= 5}
    rare = max(1 - sum(often.values()), 0)
    seen_rare = n - sum(got.get(text, 0) for text in often)
    assert not set(got) - set(want) and abs(seen_rare - n*rare) < 5*math.sqrt(n*rare) + 5
    chi_square, free = sum((got.get(text, 0) - n*p)**2/(n*p) for text, p in often.items()), len(often) - 1
    assert chi_square < free + 4*math.sqrt(2*free), (chi_square, free)


# the loop

def test_chance_comes_from_the_generator_alone():
    model = sharp()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (generate(model, IDS, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b) and not torch.equal(a, c)
    d = generate(model, IDS, 8)
    torch.manual_seed(5)
    assert torch.equal(generate(model, IDS, 8), d) and not torch.equal(torch.get_rng_state(), before)


def test_it_stops_when_all_rows_have_ended():
    asked = []
    def model(ids):
        asked.append(ids.shape[1])
        return F.one_hot((ids + 1).clamp(max=9), 10).float() # counts up
    out = generate(model, torch.tensor([[3], [5], [4]]), 50, temperature=0, eos_id=7, pad_id=0)
    assert out.tolist() == [[3, 4, 5, 6, 7], [5, 6, 7, 0, 0], [4, 5, 6, 7, 0]]
    assert asked == [1, 2, 3, 4]
    assert generate(model, torch.tensor([[7, 3]]), 2, temperature=0, eos_id=7).tolist() == [[7, 3, 4, 5]] # an end in the prompt is a prompt
    assert generate(model, torch.tensor([[3], [5]]), 4, temperature=0, eos_id=7, pad_id=7).tolist() == [[3, 4, 5, 6, 7], [5, 6, 7, 7, 7]]


def test_nothing_is_left_behind_in_the_model():
    model = sharp()
    model.blocks[0].train()
    model.blocks[1].mlp.train()
    modes = [m.training for m in model.modules()]
    out = generate(model, IDS, 4)
    assert [m.training for m in model.modules()] == modes
    next(new_tokens(model, IDS, 4)) # given up half-way
    assert [m.training for m in model.modules()] == modes
    assert not out.is_inference() and not out.requires_grad and all(p.grad is None for p in model.parameters())
    model(out).logsumexp(-1).sum().backward() # what was written can be trained on, with the tables that writing made
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_is_off_while_writing():
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(.9)
        def forward(self, ids): return self.drop(F.one_hot((ids + 1) % 10, 10).float())
    model = Dropping()
    assert generate(model, torch.tensor([[0]]), 9, temperature=0).tolist() == [list(range(10))]
    assert model.drop.training


def test_half_precision_writes_too():
    model = sharp().bfloat16()
    out = generate(model, IDS*LEFT, 8, temperature=.8, mask=LEFT, generator=torch.Generator().manual_seed(0))
    assert out.dtype == torch.long and out.shape == (5, 17) and (out[:, :9] == IDS*LEFT).all()


def test_a_wrapped_model_of_transformers_is_asked_for_one_row_of_scores(tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(sharp().save_pretrained(tmp_path), dtype=torch.float32)
    shapes = []
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = theirs
        def get_base_model(self): return self.inner
        def prepare_inputs_for_generation(self): raise NotImplementedError
        def forward(self, *args, **kwargs):
            out = self.inner(*args, **kwargs)
            shapes.append(tuple(out.logits.shape))
            return out
    assert torch.equal(generate(Wrapped(), IDS, 5, temperature=0), library(theirs, IDS, n=5))
    assert shapes == [(5, 1, V)]*6


def test_the_prompt_is_not_changed_and_nothing_may_be_asked():
    ids, model = IDS.clone(), sharp()
    generate(model, ids, 5)
    assert torch.equal(ids, IDS) and torch.equal(generate(model, ids, 0), IDS)
    assert generate(model, ids, BASE["max_length"] - 9, temperature=0).shape == (5, 64) # just fits
    assert list(new_tokens(model, ids, 0)) == []


def test_positions_of_a_padded_row_reach_to_the_last_place():
    model = sharp(max_length=16)
    whole = generate(model, IDS*LEFT, 7, temperature=0, mask=LEFT)
    assert torch.equal(whole[1, 8:], generate(model, IDS[1:2, 8:], 7, temperature=0)[0])


# stream

class Bytes:
    def decode(self, ids): return bytes(ids).decode("utf-8", "replace")


def reciter(said): return lambda ids: F.one_hot(torch.tensor([*said, 0]), 256)[:ids.shape[1]][None].float()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12))
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    said = list(text.encode())
    pieces = list(stream(reciter(said), Bytes(), [7], len(said) + 3, eos_id=0, temperature=0))
    assert "".join(pieces) == text
    assert all(piece for piece in pieces)
    assert len(pieces) == len(text) or "\ufffd" in text


def test_broken_bytes_and_a_text_cut_short_are_still_shown():
    cut = list("ab你".encode())[:-1]
    assert list(stream(reciter(cut), Bytes(), [7], 30, eos_id=0, temperature=0)) == ["a", "b", "\ufffd"]
    assert "".join(stream(reciter(list("写诗".encode())), Bytes(), [7], 4, eos_id=[0, 255], temperature=0)) == "写\ufffd"
    broken = [0xff, 0x41, 0xe4, 0x42]
    assert "".join(stream(reciter(broken), Bytes(), [7], 30, eos_id=0, temperature=0)) == bytes(broken).decode("utf-8", "replace")


def test_a_stream_is_what_generate_writes():
    model = sharp()
    class Numbers:
        def decode(self, ids): return " ".join(map(str, ids))
    text = "".join(stream(model, Numbers(), IDS[0].tolist(), 10, temperature=.9, top_k=9, generator=torch.Generator().manual_seed(2)))
    assert text == Numbers().decode(generate(model, IDS[:1], 10, temperature=.9, top_k=9, generator=torch.Generator().manual_seed(2))[0, 9:].tolist())


def test_the_cache_is_as_long_as_the_text_and_no_longer(monkeypatch):
    made = []
    class Seen(KVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
    monkeypatch.setattr("llmbench.model.generate.KVCache", Seen)
    generate(sharp(), IDS, 5)
    assert [c.keys.shape[3] for c in made] == [14] and made[0].length == 13
