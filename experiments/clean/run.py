"What does dirt in the corpus cost on clean text? Same documents, same steps, before and after cleaning: `python experiments/clean/run.py` (about two minutes)"
import html
import random
import statistics

import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack, pad
from llmbench.text.bpe import BPE
from llmbench.text.corpus import Account, Clean, clean_documents, python_documents
from llmbench.train.loop import Fit, evaluate, fit

torch.set_num_threads(1)
SEEDS, STEPS = 5, 300
paragraphs = [" ".join(p.split()) for topic in python_documents() for p in topic.split("\n\n") if 250 < len(p) < 900]


def dirty(text, draw_from):
    "One document as a crawler brings it: each kind of dirt with a probability of its own"
    if draw_from.random() < .3: text = "".join(chr(ord(c) + 0xfee0) if c.isascii() and c.isalpha() and draw_from.random() < .2 else c for c in text)
    if draw_from.random() < .3: text = "".join(c + ("\u200b" if c == " " and draw_from.random() < .3 else "") for c in text)
    if draw_from.random() < .4: text = text.replace("'", "’").encode().decode("latin-1")
    if draw_from.random() < .5: text = f'<div class="post"><p>{html.escape(text)}</p><script>track({draw_from.random()})</script></div>'
    return text


def rubbish(draw_from):
    "Menus and spam"
    if draw_from.random() < .5: return "Home | About | Shop | Cart (0) | Log in\n" + "\n".join(f"- {draw_from.choice(['Breads', 'Rolls', 'Cakes', 'Contact', 'Gifts'])} ({draw_from.randrange(99)})" for _ in range(30))
    return f"Buy cheap {draw_from.choice(['bread', 'clocks', 'parrots'])} now! Call 555-010-{draw_from.randrange(1000, 9999)}! "*12


def train(docs, bpe, seed):
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=bpe.vocab_size, d_model=64, n_layers=2, d_hidden=172))
    rows = pack([([bpe.bos_id, *ids, bpe.end_id], [1]*(len(ids) + 2)) for ids in map(bpe.encode, docs)], 64)
    for _ in fit(model, lambda step, micro: rows.rows(draw(len(rows), 16, step, seed)), Fit(steps=STEPS), progress=False): pass
    return model


found = []
for seed in range(SEEDS):
    draw_from = random.Random(seed)
    shuffled = draw_from.sample(paragraphs, len(paragraphs))
    held, source = shuffled[:70], shuffled[70:420]
    crawl = [dirty(p, draw_from) for p in source] + [rubbish(draw_from) for _ in range(150)]
    draw_from.shuffle(crawl)
    account = Account()
    cleaned = list(clean_documents(crawl, Clean(shortest=10), account))
    assert account.balanced()
    bpe = BPE.train(source, 700)
    rows = [(ids, [1]*len(ids)) for ids in ([bpe.bos_id, *bpe.encode(t)[:126], bpe.end_id] for t in held)]
    found.append([evaluate(train(docs, bpe, seed), [pad(rows)]) for docs in (crawl, cleaned, source)])
    print(f"seed {seed}: {account.read} read, {account.kept} kept, {dict(account.dropped)}; clean held-out text, nats/token: "
          f"dirty {found[-1][0]:.3f}, cleaned {found[-1][1]:.3f}, never dirty {found[-1][2]:.3f}", flush=True)


def told(values):
    half = {3: 4.303, 5: 2.776}[len(values)]*statistics.stdev(values)/len(values)**.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


print(f"mean and 95 % interval over {SEEDS} seeds, {STEPS} steps of 16 x 64 tokens")
for name, k in (("dirty", 0), ("cleaned", 1), ("never dirty", 2)): print(f"{name}: {told([r[k] for r in found])} nats a token on clean held-out text")
print(f"cleaning gains {told([r[0] - r[1] for r in found])}, and leaves {told([r[1] - r[2] for r in found])} to text that was never dirty")
