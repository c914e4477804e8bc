"next_token_loss against pencil and paper, F.cross_entropy and transformers"
import math

import pytest
import torch
import torch.nn.functional as F

from llmbench.train.loss import bits_per_byte, next_token_loss, perplexity


def says(*chances, V=5):
    "Logits (1,T,V) that give token t+1 of 0, 1, 2, ... the chance chances[t], and share the rest among the others"
    rows = [[math.log(c if v == t + 1 else (1 - c)/(V - 1)) for v in range(V)] for t, c in enumerate(chances)]
    return torch.tensor([rows + [[0.3, -1., 2., 0.1, 0.]]])


def drawn(seed=0, B=3, T=7, V=11):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T), generator=g)
    mask = (torch.rand(B, T, generator=g) < .6).float()
    return torch.randn(B, T, V, generator=g)*3, ids, mask


def test_pencil():
    "Chances 1/2, 1/4, 1/8 are 1, 2 and 3 bits"
    logits, ids = says(1/2, 1/4, 1/8), torch.tensor([[0, 1, 2, 3]])
    assert next_token_loss(logits, ids, torch.ones(1, 4)).item() == pytest.approx(2*math.log(2), abs=1e-6)
    assert next_token_loss(logits, ids, torch.tensor([[0, 1, 0, 1]])).item() == pytest.approx(2*math.log(2), abs=1e-6)
    assert next_token_loss(logits, ids, torch.tensor([[0, 0, 1, 1]])).item() == pytest.approx(2.5*math.log(2), abs=1e-6)
    assert next_token_loss(logits, ids, torch.tensor([[1, 0, 0, 1]])).item() == pytest.approx(3*math.log(2), abs=1e-6), "the first column never counts"
    assert next_token_loss(logits, ids, torch.tensor([[0, 1, 0, 1]]), total=8).item() == pytest.approx(.5*math.log(2), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_cross_entropy(seed, ledger):
    "Value and gradient, with an uneven mask"
    logits, ids, mask = drawn(seed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a = next_token_loss(ours, ids, mask)
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    b = F.cross_entropy(theirs[:, :-1].reshape(-1, 11), labels.reshape(-1), ignore_index=-100)
    a.backward()
    b.backward()
    if seed == 0: ledger("next-token loss, value", "F.cross_entropy", (a - b).abs().item(), 1e-6)
    assert (a - b).abs() < 1e-6
    assert (ours.grad - theirs.grad).abs().max() < 1e-7
    assert ours.grad[mask.roll(-1, 1) == 0].abs().max() == 0, "a position whose target does not count must get no gradient"


def test_transformers(ledger):
    "The loss inside transformers' Llama, plain and with num_items_in_batch"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)).eval()
    _, ids, mask = drawn(5, 4, 9, 50)
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out, shared = llama(ids, labels=labels), llama(ids, labels=labels, num_items_in_batch=37).loss
    ledger("next-token loss, mask", "transformers Llama", (next_token_loss(out.logits, ids, mask) - out.loss).abs(), 1e-6)
    ledger("next-token loss, total", "transformers num_items_in_batch", (next_token_loss(out.logits, ids, mask, 37) - shared).abs(), 1e-6)


def test_shares_add_up():
    "Micro-batches divided by the common total make the whole; their own means don't"
    logits, ids, mask = drawn(2, 6)
    mask[:3, 1], mask[:3, 2:] = 1, 0
    whole, total = next_token_loss(logits, ids, mask), mask[:, 1:].sum()
    parts = [next_token_loss(logits[i], ids[i], mask[i], total) for i in (slice(0, 3), slice(3, 6))]
    means = [next_token_loss(logits[i], ids[i], mask[i]) for i in (slice(0, 3), slice(3, 6))]
    assert (sum(parts) - whole).abs() < 1e-6
    assert (sum(means)/2 - whole).abs() > .05


def test_all_masked():
    logits, ids, mask = drawn()
    mask[:] = 0
    mask[:, 0] = 1
    with pytest.raises(ValueError, match="no token counts"): next_token_loss(logits, ids, mask)
    assert next_token_loss(logits, ids, mask, total=12.) == 0, "within a step that counts elsewhere, it adds nothing"


def test_stable_and_precise():
    big = torch.tensor([[[1000., 0., -1000.], [0., 0., 0.]]])
    assert next_token_loss(big, torch.tensor([[1, 0]]), torch.ones(1, 2)) == 0
    assert next_token_loss(big, torch.tensor([[1, 2]]), torch.ones(1, 2)) == 2000
    logits, ids, mask = drawn(3)
    half = logits.bfloat16()
    assert next_token_loss(half, ids, mask).dtype == torch.float32
    assert next_token_loss(half, ids, mask) == next_token_loss(half.float(), ids, mask), "bf16 logits are summed in fp32"
    assert next_token_loss(logits.double(), ids, mask).dtype == torch.float64


def test_what_does_not_count_may_be_nan():
    logits, ids, mask = drawn(4)
    expected = next_token_loss(logits, ids, mask)
    logits[:, :-1][mask[:, 1:] == 0] = float("nan")
    logits[:, -1] = float("nan")
    assert next_token_loss(logits, ids, mask) == expected


def test_chance():
    "A model that knows nothing: log V, perplexity V, 8 bits a byte"
    V = 256
    loss = next_token_loss(torch.zeros(2, 9, V), torch.randint(V, (2, 9)), torch.ones(2, 9)).item()
    assert loss == pytest.approx(math.log(V), abs=1e-6)
    assert perplexity(loss) == pytest.approx(V, rel=1e-5)
    assert bits_per_byte(16*loss, 16) == pytest.approx(8, abs=1e-5)


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    "Fair choices: 1 of 4 letters a byte, or 1 of 16 pairs for two bytes; the same knowledge, twice the loss per token"
    letters, pairs = 100*math.log(4), 50*math.log(16)
    assert perplexity(pairs/50) == pytest.approx(perplexity(letters/100)**2)
    assert bits_per_byte(letters, 100) == bits_per_byte(pairs, 100) == 2
