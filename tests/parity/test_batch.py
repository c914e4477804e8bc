"Batches against independent oracles: one document at a time, transformers' Llama, TRL's packing, torch's padding"
import random

import pytest
import torch
import torch.nn.functional as F

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch, draw, pack, pad, windows
from llmbench.train.loss import next_token_loss

LENGTHS = [3, 11, 1, 7, 16, 2, 9, 5, 30, 4]  # 30 is longer than a row of 16 and gets cut
VOCABULARY = 50


def some_rows(lengths=LENGTHS, seed=0):
    "Rows of these lengths; no two tokens of a row are alike, and masks are mixed"
    r = random.Random(seed)
    return [(r.sample(range(1, VOCABULARY), n), [int(r.random() < .7) for _ in range(n)]) for n in lengths]


def documents_of(batch):
    "(row, columns) of each document in a batch"
    for row in range(len(batch)):
        for s in range(1, int(batch.segments[row].max()) + 1): yield row, (batch.segments[row] == s).nonzero().flatten()


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=VOCABULARY, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_hidden=48, max_length=64)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(5 if p.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        initializer_range=.2, max_position_embeddings=64, attn_implementation="sdpa")).eval()


BATCHES = dict(packed=lambda rows: pack(rows, 16), loose=lambda rows: pack(rows, 31), padded=lambda rows: pad(rows), left=lambda rows: pad(rows, side="left"), wide=lambda rows: pad(rows, 40))


@pytest.mark.parametrize("kind", BATCHES)
def test_batched_logits_equal_one_document_at_a_time(kind, ours, ledger):
    batch = BATCHES[kind](some_rows())
    with torch.no_grad():
        logits = ours(batch.ids, batch.positions, batch.attend())
        error = max((logits[row, at] - ours(batch.ids[row, at][None])[0]).abs().max().item() for row, at in documents_of(batch))
    ledger(f"logits of a {kind} batch", "one document at a time", error, 1e-5)


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_serves_transformers_too(kind, llama, ledger):
    batch = BATCHES[kind](some_rows())
    with torch.no_grad():
        look = torch.zeros(batch.attend().shape).masked_fill(~batch.attend(), torch.finfo(torch.float).min)
        logits = llama(input_ids=batch.ids, position_ids=batch.positions, attention_mask=look).logits
        error = max((logits[row, at] - llama(input_ids=batch.ids[row, at][None]).logits[0]).abs().max().item() for row, at in documents_of(batch))
    ledger(f"transformers' Llama on a {kind} batch", "transformers, one document at a time", error, 1e-5)


def test_gradients_of_a_packed_batch_are_the_sum_over_documents(ours, ledger):
    "Loss and gradient: summed over tokens, it cannot matter who shares a row"
    rows = [row for row in some_rows() if 2 <= len(row[0]) <= 16 and sum(row[1][1:])]
    total = sum(sum(mask[1:]) for _, mask in rows)
    def gradient(batches):
        ours.zero_grad()
        loss = sum(next_token_loss(ours(b.ids, b.positions, b.attend()), b.ids, b.mask, total) for b in batches)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in ours.parameters()])
    packed, apart = gradient([pack(rows, 16)]), gradient([pad([row]) for row in rows])
    assert packed[0] == pytest.approx(apart[0], rel=1e-5)
    ledger("gradient of a packed batch (relative)", "sum over documents", ((packed[1] - apart[1]).norm()/apart[1].norm()).item(), 1e-5)


def test_without_block_mask_or_seam_the_result_is_another(ours):
    "The effects that the mask prevents are thousands of times the tolerance"
    batch = pack(some_rows(), 16)
    with torch.no_grad():
        right = ours(batch.ids, batch.positions, batch.attend())
        leaky = ours(batch.ids, batch.positions, batch.attend() | torch.ones(16, 16, dtype=torch.bool).tril())
    assert (right - leaky).abs().max() > .1
    careless = Batch(batch.ids, (batch.segments > 0).float(), batch.positions, batch.segments)
    assert next_token_loss(right, careless.ids, careless.mask) - next_token_loss(right, batch.ids, batch.mask) != 0
    assert (careless.mask - batch.mask).sum() >= sum(1 for _ in documents_of(batch))


@pytest.mark.parametrize("length", [8, 16, 31, 64, 200])
def test_pack_uses_as_many_rows_as_trl(length, ledger):
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset
    disable_progress_bars()
    r = random.Random(length)
    sizes = [1 + int(r.random()**2*length*1.5) for _ in range(400)]
    theirs = len(pack_dataset(Dataset.from_dict({"input_ids": [[7]*n for n in sizes]}), length, "bfd_split"))
    ledger(f"rows of {length} for 400 documents", "TRL pack_dataset bfd_split", abs(len(pack([([7]*n, [1]*n) for n in sizes], length)) - theirs), 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_equals_torch(side, ledger):
    rows = some_rows()
    theirs = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=49, padding_side=side)
    ledger(f"padding on the {side}", "torch pad_sequence", (pad(rows, pad_id=49, side=side).ids != theirs).sum(), 0)


@pytest.mark.parametrize("length", [2, 5, 16, 31])
def test_packing_loses_nothing_and_tears_nothing(length):
    "Every piece comes back whole, once, with its mask, positions from 0, and neighbours in order"
    rows = some_rows()
    want = sorted((tuple(ids[at:at+length]), tuple([0, *mask[at:at+length][1:]])) for ids, mask in rows for at in range(0, len(ids), length))
    batch = pack(rows, length, pad_id=49)
    got = []
    for row, at in documents_of(batch):
        assert at.tolist() == list(range(at[0], at[-1] + 1))
        assert batch.positions[row, at].tolist() == list(range(len(at)))
        got.append((tuple(batch.ids[row, at].tolist()), tuple(batch.mask[row, at].int().tolist())))
    assert sorted(got) == want
    outside = batch.segments == 0
    assert (batch.ids[outside] == 49).all() and not batch.mask[outside].any() and not batch.positions[outside].any()
    assert batch.ids.shape == (len(batch), length) and batch.ids.dtype == torch.long and batch.mask.dtype == torch.float
    assert batch.filled() == pytest.approx(sum(len(ids) for ids, _ in rows)/(len(batch)*length))


def test_best_fit_by_hand():
    "7 6 4 3 into rows of 10: 7+3 and 6+4; first fit in the given order would need three rows"
    batch = pack([([1]*6, [1]*6), ([2]*7, [1]*7), ([3]*3, [1]*3), ([4]*4, [1]*4)], 10)
    assert batch.ids.tolist() == [[2]*7 + [3]*3, [1]*6 + [4]*4]
    assert batch.segments.tolist() == [[1]*7 + [2]*3, [1]*6 + [2]*4]


def test_attend_cell_by_cell():
    batch = pad([([5, 6, 7], [1, 1, 1]), ([8], [1])], side="left")
    assert batch.segments.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.attend()[:, 0].int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 1]]]


def test_a_row_may_fill_the_length_to_the_last_place():
    assert pad([([5, 6, 7], [1, 1, 1]), ([8], [1])], length=3).ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert pack([([5, 6, 7], [1, 1, 1])], 3).ids.tolist() == [[5, 6, 7]]


def test_rows_and_to():
    batch = pack(some_rows(), 16)
    some = batch.rows(torch.tensor([2, 0])).to("cpu")
    for name in ("ids", "mask", "positions", "segments"): assert torch.equal(getattr(some, name), getattr(batch, name)[[2, 0]])
    assert len(some) == 2


@pytest.mark.parametrize("n, size", [(10, 3), (7, 7), (3, 8), (1, 2)])
def test_each_epoch_holds_each_row_once(n, size):
    stream = torch.cat([draw(n, size, step, seed=5) for step in range(4*n)])
    epochs = stream[:len(stream)//n*n].view(-1, n)
    assert (epochs.sort(1).values == torch.arange(n)).all()
    if n > 6: assert len({tuple(e.tolist()) for e in epochs}) > 1


def test_draw_needs_no_state():
    "A step asked for alone, backwards, or in another process order gives the same rows; seeds and steps differ"
    forwards = [draw(1000, 16, step, seed=3).tolist() for step in range(200)]
    assert [draw(1000, 16, step, seed=3).tolist() for step in reversed(range(200))] == forwards[::-1]
    assert draw(1000, 16, 0, seed=3).tolist() != draw(1000, 16, 0, seed=4).tolist()
    assert len({tuple(f) for f in forwards}) == 200


def test_draw_is_fair():
    "Over many seeds each row comes first equally often: chi-square of 8 cells under 26 (p = 0.0005)"
    first = torch.bincount(torch.cat([draw(8, 1, 0, seed) for seed in range(2000)]), minlength=8).float()
    assert ((first - 250)**2/250).sum() < 26


def test_windows_reach_both_ends_and_are_contiguous():
    ids = torch.arange(1000, 1020)
    starts = set()
    for step in range(60):
        batch = windows(ids, 6, 8, step, seed=1)
        assert torch.equal(batch.ids - batch.ids[:, :1], torch.arange(6).expand(8, 6))
        assert batch.mask[:, 0].sum() == 0 and batch.mask[:, 1:].all() and batch.attend()[0, 0].equal(torch.ones(6, 6, dtype=torch.bool).tril())
        starts |= set(batch.ids[:, 0].tolist())
    assert starts == set(range(1000, 1015))
    assert torch.equal(windows(ids, 6, 8, 3, seed=1).ids, windows(ids, 6, 8, 3, seed=1).ids)
    assert not torch.equal(windows(ids, 6, 8, 3, seed=1).ids, windows(ids, 6, 8, 4, seed=1).ids)


@pytest.mark.parametrize("call, message", [
    (lambda: pack([], 8), "nothing to batch"), (lambda: pad([]), "nothing to batch"), (lambda: pack([([1, 2], [1])], 8), "row 0 has 2 ids but 1 mask"),
    (lambda: pad([([1], [1]), ([], [])]), "row 1 is empty"), (lambda: pad([([1, 2, 3], [1, 1, 1])], 2), "3 tokens but length is 2"),
    (lambda: pad([([1], [1])], side="up"), "'left' or 'right'"), (lambda: pack([([1], [1])], 1), "nothing to predict"), (lambda: windows(torch.arange(5), 6, 2, 0), "5 tokens, a window 6")])
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_plain_attention_agrees_with_sdpa_per_document():
    "Independent of any model of ours: torch's attention on a packed row equals it on each document"
    batch = pack(some_rows([5, 9, 2]), 16)
    x = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    whole = F.scaled_dot_product_attention(x, x, x, attn_mask=batch.attend())
    for row, at in documents_of(batch):
        part = x[:, :, at]
        torch.testing.assert_close(whole[row, :, at], F.scaled_dot_product_attention(part, part, part, is_causal=True)[0])
