"Does a small model recite what stands in its corpus forty times, and does de-duplication take that away? `python experiments/dedup_recite/run.py` (about two minutes)"
import random
import statistics

import torch

from llmbench.model.generate import generate
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack, pad
from llmbench.text.bpe import BPE
from llmbench.text.corpus import dedup, python_documents
from llmbench.train.loop import Fit, evaluate, fit

torch.set_num_threads(1)
SEEDS, COPIES, SECRETS, STEPS, PROMPT, RECITED = 5, 40, 8, 300, 10, 12
paragraphs = [p for topic in python_documents() for p in topic.split("\n\n") if 200 < len(p) < 900]
WORDS = sorted({w for p in paragraphs for w in p.lower().split() if w.isalpha() and 3 < len(w) < 8})


def secrets(seed, count):
    "Sentences of words drawn at random: whoever completes one has read it"
    draw_from = random.Random(seed)
    return [" ".join(draw_from.choice(WORDS) for _ in range(24)) for _ in range(count)]


def copies(text, seed):
    "Near copies, as reprints are: a head of their own and one word changed behind the part that is asked for"
    draw_from = random.Random(seed)
    for k in range(COPIES):
        w = text.split()
        w[draw_from.randrange(20, 24)] = draw_from.choice(WORDS)
        yield f"({k}) " + " ".join(w)


def recited(model, bpe, texts):
    "Share of the tokens behind a prompt that come out as they stood"
    ids = [bpe.encode(" " + t)[:PROMPT + RECITED] for t in texts]
    out = generate(model, torch.tensor([x[:PROMPT] for x in ids]), RECITED, temperature=0.)[:, PROMPT:]
    return (out == torch.tensor([x[PROMPT:] for x in ids])).float().mean().item()


def train(docs, bpe, seed):
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=bpe.vocab_size, d_model=64, n_layers=2, d_hidden=172))
    rows = pack([([bpe.bos_id, *ids, bpe.end_id], [1]*(len(ids) + 2)) for ids in map(bpe.encode, docs)], 64)
    for _ in fit(model, lambda step, micro: rows.rows(draw(len(rows), 16, step, seed)), Fit(steps=STEPS), progress=False): pass
    return model


found = []
for seed in range(SEEDS):
    shuffled = random.Random(seed).sample(paragraphs, len(paragraphs))
    base, held = shuffled[:350], shuffled[350:420]
    injected, never = secrets(seed, SECRETS), secrets(1000 + seed, 40)
    dirty = base + [c for k, text in enumerate(injected) for c in copies(text, 100*seed + k)]
    random.Random(seed).shuffle(dirty)
    unique = dedup(dirty, .5, n=3)
    bpe = BPE.train(base, 700)
    row = []
    for docs in (dirty, unique):
        model = train(docs, bpe, seed)
        valid = evaluate(model, [pad([([bpe.bos_id, *bpe.encode(t)[:126], bpe.end_id], [1]*(len(bpe.encode(t)[:126]) + 2)) for t in held])])
        row.append((recited(model, bpe, injected), recited(model, bpe, never), valid))
    found.append(row)
    print(f"seed {seed}: {len(dirty)} documents, {len(unique)} after; recited {row[0][0]:.3f} to {row[1][0]:.3f}, never read {row[0][1]:.3f} / {row[1][1]:.3f}, "
          f"held-out {row[0][2]:.3f} to {row[1][2]:.3f} nats/token", flush=True)


def told(values):
    half = {3: 4.303, 5: 2.776}[len(values)]*statistics.stdev(values)/len(values)**.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


print(f"{sum(p.numel() for p in model.parameters()):,} parameters; mean and 95 % interval over {SEEDS} seeds")
for k, name in enumerate(("recited tokens of the injected sentences", "recited tokens of sentences never read (chance)", "held-out loss, nats a token")):
    print(f"{name}: with copies {told([r[0][k] for r in found])}, without {told([r[1][k] for r in found])}, difference {told([r[0][k] - r[1][k] for r in found])}")
