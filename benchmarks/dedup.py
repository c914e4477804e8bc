"""De-duplication beside datasketch, in processor time of one process, and 100 MB of text in bounded memory
Run: python benchmarks/dedup.py            (about five minutes; --megabytes 10 for a glance)"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from llmbench.text.dedup import candidate_pairs, minhash, shingles, signature
from llmbench.text.quality import words

parser = argparse.ArgumentParser()
parser.add_argument("--megabytes", type=int, default=100)
parser.add_argument("--rounds", type=int, default=3)
args = parser.parse_args()


def corpus(megabytes, seed=0):
    "Documents of words with a natural frequency, one in ten a near copy of an earlier one, one in twenty Chinese"
    draw = np.random.default_rng(seed)
    names = np.array(["".join(draw.choice(list("abcdefghilmnoprstuvw"), 3 + i % 7)) for i in range(30_000)])
    size, recent = 0, []
    while size < megabytes*1_000_000:
        if recent and draw.random() < .1:
            w = recent[draw.integers(len(recent))].copy()
            w[draw.integers(0, len(w), max(1, len(w)//100))] = "changed"
        else: w = names[np.minimum(draw.zipf(1.3, 400) - 1, 29_999)].astype(object)
        if draw.random() < .05: w = np.array([chr(c) for c in 0x4e00 + np.minimum(draw.zipf(1.2, 900), 5000)], object)
        recent = [*recent[-500:], w]
        text = ("" if len(w) == 900 else " ").join(w)
        size += len(text.encode())
        yield text


def theirs(docs):
    "The usual way with datasketch: shingles as byte strings, a batch a document, then LSH"
    lsh, pairs = MinHashLSH(num_perm=128, params=(21, 6)), set()
    for i, doc in enumerate(docs):
        w, m = words(doc), MinHash(num_perm=128)
        m.update_batch([" ".join(w[k:k + 5]).encode() for k in range(max(1, len(w) - 4))])
        pairs.update((j, i) for j in lsh.query(m))
        lsh.insert(i, m)
    return pairs


def ours(docs): return candidate_pairs(np.stack([minhash(d) for d in docs]), 21, 6)


def their_signatures(sets):
    "Signatures alone, of the same sets of numbers"
    for s in sets:
        m = MinHash(num_perm=128, hashfunc=lambda x: x)
        m.update_batch(s)


def our_signatures(sets):
    for s in sets: signature(s)


def measured(*ways):
    "Processor seconds of each, in turns"
    seconds = [[] for _ in ways]
    for turn in range(args.rounds + 1):
        for k, (work, given) in enumerate(ways):
            start = time.process_time()
            work(given)
            if turn: seconds[k].append(time.process_time() - start)
    return [statistics.median(s) for s in seconds]


small = list(corpus(min(4, args.megabytes)))
sets = [shingles(d) for d in small]
narrow = [(s >> np.uint64(32)).astype(np.uint64) for s in sets]
mine, other = measured((ours, small), (theirs, small))
print(f"text to candidate pairs, {len(small):,} documents, {min(4, args.megabytes)} MB: ours {mine:.2f} s, datasketch {other:.2f} s of processor time: {other/mine:.1f} times as fast; pairs {len(ours(small))} and {len(theirs(small))}")
try:
    mine, other = measured((our_signatures, sets), (their_signatures, narrow))
    print(f"signatures alone, of the same numbers: ours {mine:.2f} s, datasketch {other:.2f} s: {other/mine:.1f} times as fast")
except Exception as e: print(f"signatures alone: datasketch takes no numbers ({e})")

with tempfile.TemporaryDirectory() as folder:
    file, count = Path(folder)/"corpus.jsonl", 0
    with open(file, "w") as f:
        for doc in corpus(args.megabytes, 1):
            f.write(json.dumps(dict(text=doc), ensure_ascii=False) + "\n")
            count += 1
    program = ("import sys; from llmbench.core import peak_memory_gb; from llmbench.cli import main; code = main(sys.argv[1:]); "
               "print('peak', peak_memory_gb()); sys.exit(code)")
    for job in ("dedup", "clean"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        extra = ["--rules", "none"] if job == "clean" else []
        done = subprocess.run([sys.executable, "-c", program, "data", job, str(file), "--out", str(Path(folder)/f"{job}.jsonl"), *extra], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if done.returncode: sys.exit(done.stderr)
        print(f"llmbench data {job}: {file.stat().st_size/1e6:.0f} MB, {count:,} documents, {spent:.0f} s of processor time, peak memory {float(done.stdout.split('peak')[1])*1000:.0f} MB")
        print("  " + "\n  ".join(done.stdout.split("\nwritten")[0].splitlines()))
