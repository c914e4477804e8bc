"What copies in the corpus do to a small model, and that de-duplication takes it away"
import random

import torch

from llmbench.model.generate import generate
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack
from llmbench.text.bpe import BPE
from llmbench.text.corpus import dedup, python_documents
from llmbench.train.loop import Fit, fit


def test_injected_copies_are_recited_and_dedup_takes_that_away():
    paragraphs = [p for topic in python_documents() for p in topic.split("\n\n") if 200 < len(p) < 500][:80]
    words = sorted({w for p in paragraphs for w in p.lower().split() if w.isalpha() and 3 < len(w) < 8})
    draw_from, bpe = random.Random(0), BPE.train(paragraphs, 500)
    secrets = [" ".join(draw_from.choice(words) for _ in range(24)) for _ in range(8)]
    injected, never = secrets[:4], secrets[4:]
    dirty = paragraphs + [f"({k}) {text} {draw_from.choice(words)}" for text in injected for k in range(40)]
    draw_from.shuffle(dirty)
    unique = dedup(dirty, .5, n=3)
    assert sum(any(s in d for s in injected) for d in unique) == 4, "one copy of each is left"

    def recited(docs):
        torch.manual_seed(0)
        model = Transformer(Config(vocab_size=bpe.vocab_size, d_model=64, n_layers=2, d_hidden=128))
        rows = pack([([bpe.bos_id, *ids, bpe.end_id], [1]*(len(ids) + 2)) for ids in map(bpe.encode, docs)], 64)
        for _ in fit(model, lambda step, micro: rows.rows(draw(len(rows), 16, step)), Fit(steps=160, autocast="off"), progress=False): pass
        def share(texts):
            ids = [bpe.encode(" " + t)[:22] for t in texts]
            out = generate(model, torch.tensor([x[:10] for x in ids]), 12, temperature=0.)[:, 10:]
            return (out == torch.tensor([x[10:] for x in ids])).float().mean().item()
        return share(injected), share(never)
    (with_copies, chance), (without, _) = recited(dirty), recited(unique)
    assert with_copies > .3 and with_copies > without + .25 and chance < .15, (with_copies, without, chance)
