"Surprise of rows against pencil and paper and against transformers' loss; names stay importable from `bench.stages`"
import math
from itertools import product

import numpy as np
import pytest
import torch

from llmbench.bench import score, stages
from llmbench.bench.score import document_rows, first_prompt, samples_of, score_rows, score_text
from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate


class Two(torch.nn.Module):
    "Of two tokens, the next is 0 with probability .75 after a 0, .1 after a 1"
    def forward(self, ids): return torch.tensor([[.75, .25], [.1, .9]]).log()[ids]


def test_rows_by_hand():
    rows = [([0, 0, 1, 1], [1, 1, 1, 1]), ([1, 0, 0], [1, 0, 1])]  # .75, .25, .9; (.1 does not count), .75
    told = score_rows(Two(), rows, "two", math.log(2))
    nats = [-math.log(.75*.25*.9), -math.log(.75)]
    assert told.accuracy == pytest.approx(sum(nats)/4, abs=1e-6) and told.correct == pytest.approx(sum(nats), abs=1e-5) and told.n == 2
    assert told.low == pytest.approx(min(nats[0]/3, nats[1])) and told.high == pytest.approx(max(nats[0]/3, nats[1])), "with two rows the draws are: both the one, both the other, or mixed"
    with pytest.raises(UserError, match="1 row is too little"): score_rows(Two(), rows[:1], "one", 1.)


def test_interval_by_enumeration():
    "All 4^4 draws of four rows of different length: sums over sums, not the mean of the rows' means"
    rows = [([1, *[0]*9], [1]*10), ([0, 1, 1], [1]*3), ([0, 1], [1]*2), ([1, 0, 1, 0], [1]*4)]
    p = {(0, 0): .75, (0, 1): .25, (1, 0): .1, (1, 1): .9}
    sums = [(sum(-math.log(p[pair]) for pair in zip(ids, ids[1:])), len(ids) - 1) for ids, _ in rows]
    def quantiles(mean): return np.quantile([mean([sums[i] for i in draw]) for draw in product(range(4), repeat=4)], [.025, .975])
    right, wrong = quantiles(lambda d: sum(n for n, _ in d)/sum(c for _, c in d)), quantiles(lambda d: sum(n/c for n, c in d)/4)
    told = score_rows(Two(), rows, "four", math.log(2))
    assert (told.low, told.high) == pytest.approx(tuple(right), abs=.05) and abs(right - wrong).max() > .15


def test_text_as_transformers_scores_it(tmp_path, ledger):
    from transformers import LlamaForCausalLM
    torch.manual_seed(1)
    bpe = BPE.train(["the owl of 云村 sleeps, the mouse does not"]*3, 300)
    model = Transformer(Config(vocab_size=bpe.vocab_size, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=48, max_length=12)).eval()
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=.3)
    model.save_pretrained(tmp_path)
    twin, texts, nats, counted = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), ["the owl", "云村, the mouse of the owl does not sleep", "owl"], 0., 0
    for text in texts:
        ids = [bpe.bos_id, *bpe.encode(text), bpe.end_id]
        for i in range(0, len(ids) - 1, 12):
            piece = torch.tensor([ids[i:i+12]])
            if piece.shape[1] < 2: continue
            with torch.no_grad(): nats += twin(piece, labels=piece).loss.item()*(piece.shape[1] - 1)
            counted += piece.shape[1] - 1
    told = score_text(model, ChatTemplate(bpe), texts)
    ledger("nats per token of documents in pieces", "transformers' Llama loss", abs(told.accuracy - nats/counted), 1e-4)
    assert told.chance == pytest.approx(math.log(bpe.vocab_size))
    assert document_rows(bpe, texts)[2] == ([bpe.bos_id, *bpe.encode("owl"), bpe.end_id], [1]*(len(bpe.encode("owl")) + 2))


def test_samples_ask_up_to_the_first_answer():
    torch.manual_seed(2)
    bpe = BPE.train(["who? ann"], 270)
    model = Transformer(Config(vocab_size=bpe.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=16, max_length=40)).eval()
    talk = dict(messages=[dict(role="system", content="s"), dict(role="user", content="who?"), dict(role="assistant", content="ann"), dict(role="user", content="x"), dict(role="assistant", content="y")])
    assert [m["role"] for m in first_prompt(talk)] == ["system", "user"]
    shown = samples_of({"before": model, "after": model}, ChatTemplate(bpe), [talk, dict(messages=[dict(role="user", content="who? "*30), talk["messages"][2]])], new=8)
    assert len(shown) == 1 and shown[0]["prompt"] == "who?" and shown[0]["gold"] == "ann" and shown[0]["before"] == shown[0]["after"]


def test_names_stay_where_they_were():
    for name in ("document_rows", "first_prompt", "samples_of", "score_chat", "score_rows", "score_text", "score_town"): assert getattr(stages, name) is getattr(score, name)
