"""Training speed on documents of many lengths: padded to each batch's longest, packed with a block mask, packed without
Run: python benchmarks/packing.py      prints ratios of useful tokens a second, measured in turns in one process, in processor time"""
import argparse
import statistics
import time

import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack, pad
from llmbench.text.bpe import BPE
from llmbench.text.corpus import python_documents
from llmbench.train.loop import bf16_pays
from llmbench.train.loss import next_token_loss

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)

T, B = 256, 16
paragraphs = [p for topic in python_documents() for p in topic.split("\n\n") if p.strip()]
bpe = BPE.train(paragraphs, 1024)
rows = [([bpe.bos_id, *bpe.encode(p), bpe.end_id][:T], None) for p in paragraphs]
rows = [(ids, [1]*len(ids)) for ids, _ in rows]
model = Transformer(Config(vocab_size=bpe.vocab_size, max_length=T))
autocast = bf16_pays("cpu")
packed = pack(rows, T)


def step(batch, attend):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = next_token_loss(model(batch.ids, batch.positions, attend(batch)), batch.ids, batch.mask)
    loss.backward()
    model.zero_grad(set_to_none=True)


def padded_batch(n):
    "As many rows as hold about B*T places when padded to the batch's longest"
    return pad([rows[i] for i in draw(len(rows), B*2, n, 0).tolist()])


WAYS = {"padded": (padded_batch, lambda b: None), "packed, block mask": (lambda n: packed.rows(draw(len(packed), B, n, 0)), lambda b: b.attend()),
        "packed, no mask (leaks)": (lambda n: packed.rows(draw(len(packed), B, n, 0)), lambda b: None)}
speeds = {name: [] for name in WAYS}
for turn in range(args.rounds + 1):
    for name, (make, attend) in WAYS.items():
        batches = [make(3*turn + k) for k in range(3)]
        start = time.process_time()
        for batch in batches: step(batch, attend)
        if turn: speeds[name].append(sum(int((b.segments > 0).sum()) for b in batches)/(time.process_time() - start))
middle = {name: statistics.median(found) for name, found in speeds.items()}
fills = {"padded": statistics.mean(padded_batch(n).filled() for n in range(20)), "packed, block mask": packed.filled(), "packed, no mask (leaks)": packed.filled()}
lengths = sorted(len(ids) for ids, _ in rows)
print(f"{len(rows)} paragraphs of Python's help, median {lengths[len(lengths)//2]} tokens, cut at {T}; 0.9 M parameters, {args.threads} threads, bf16 {autocast}")
for name in WAYS: print(f"{name:>24}  filled {fills[name]:5.1%}  {middle[name]:8,.0f} useful tokens a processor second  {middle[name]/middle['padded']:.2f} x padded")
