"How much does a score fall once leaked items are taken out? `python experiments/leak/run.py` (about two minutes)"
import random
import statistics

import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack
from llmbench.text.bpe import BPE
from llmbench.text.corpus import clean_items, clean_training, contamination, python_documents
from llmbench.text.world import World
from llmbench.train.loop import Fit, fit
from llmbench.use.evals import choice_accuracy

torch.set_num_threads(1)
SEEDS, ITEMS, LEAKED, STEPS = 5, 90, 30, 300
WORDS = sorted({w for topic in python_documents() for w in topic.lower().split() if w.isalpha() and 3 < len(w) < 8})
ANIMALS = "parrots cats dogs geese horses goats owls hens ducks mules".split()


def items(seed, people, count):
    "Questions that only somebody who has read the answer can answer: (text, choices, right one)"
    draw_from, rows = random.Random(seed), []
    for k in range(count):
        name, animal = people[k % len(people)], ANIMALS[k//len(people) % len(ANIMALS)]
        text = f"{' '.join(draw_from.choice(WORDS) for _ in range(8))}: how many {animal} did {name} count? The answer is"
        choices = [f" {n}" for n in draw_from.sample(range(100, 1000), 4)]
        rows.append((text, choices, draw_from.randrange(4)))
    return rows


def told(values):
    half = {3: 4.303, 5: 2.776}[len(values)]*statistics.stdev(values)/len(values)**.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


found = []
for seed in range(SEEDS):
    town = World(seed, 60)
    people = sorted({q.person for split in ("sft", "heldout") for q in town.questions("en", split)})
    exam, practice = items(seed, people[:30], ITEMS), items(100 + seed, people[30:], ITEMS)
    def full(rows): return [text + choices[right] for text, choices, right in rows]
    leaked = random.Random(seed).sample(exam, LEAKED)
    corpus = town.documents("en")[:500] + full(practice)*2 + full(leaked)*2  # asked and answered: some page has printed the exam
    random.Random(seed).shuffle(corpus)
    report = contamination(corpus, [text for text, *_ in exam], n=13)
    assert {exam[o.item][0] for o in report if o.state == "leaked"} == {text for text, *_ in leaked}
    bpe, scores = BPE.train(town.documents("en"), 600), []
    for docs in (corpus, list(clean_training(corpus, full(leaked), n=13))):
        torch.manual_seed(seed)
        model = Transformer(Config(vocab_size=bpe.vocab_size, d_model=64, n_layers=2, d_hidden=172))
        rows = pack([([bpe.bos_id, *ids, bpe.end_id], [1]*(len(ids) + 2)) for ids in map(bpe.encode, docs)], 64)
        for _ in fit(model, lambda step, micro, rows=rows, seed=seed: rows.rows(draw(len(rows), 16, step, seed)), Fit(steps=STEPS), progress=False): pass
        def score(rows, model=model, bpe=bpe): return choice_accuracy(model, bpe.encode, rows, bpe.bos_id).accuracy
        scores.append((score(exam), score([x for x in exam if x in leaked]), score([x for x in exam if x not in leaked])))
    kept = clean_items(exam, report)
    found.append((*scores[0], *scores[1], len(kept)))
    print(f"seed {seed}: leaked {sum(o.state == 'leaked' for o in report)} of {ITEMS} items; score {scores[0][0]:.3f}, leaked items {scores[0][1]:.3f}, the others {scores[0][2]:.3f}; "
          f"trained without the leak {scores[1][0]:.3f} (leaked items {scores[1][1]:.3f}); {len(kept)} items kept", flush=True)
for k, name in enumerate(("whole exam", "leaked items", "items that were not leaked", "whole exam, corpus cleaned", "leaked items, corpus cleaned")):
    print(f"{name}: {told([r[k] for r in found])}, chance 0.25")
print(f"the score falls by {told([r[0] - r[2] for r in found])} once the leaked items are removed")
