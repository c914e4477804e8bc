"""Byte-level BPE beside `tokenizers` (Rust) and the obvious loop, as ratios measured in one run:

    python benchmarks/bpe.py [TEXT] [--vocab 4096] [--naive 512] [--repeat 5]

The obvious loop keeps every chunk as a list of ids, recounts all pairs before each merge and rebuilds all chunks after it; it takes about a
minute at a vocabulary of 512, so it runs once. Everything else: best of `--repeat`, taking turns. TEXT defaults to ../shared/data/tinyshakespeare.txt,
and to Python's own documentation where that is absent."""
import argparse
import os
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", nargs="?", default=HERE.parent/"shared"/"data"/"tinyshakespeare.txt", type=Path, help="a UTF-8 text")
parser.add_argument("--vocab", type=int, default=4096, help="tokens to train")
parser.add_argument("--naive", type=int, default=512, help="tokens to train with the obvious loop; 0 leaves it out")
parser.add_argument("--repeat", type=int, default=5, help="runs of which the best counts")
args = parser.parse_args()

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from llmbench.text.bpe import BPE  # noqa: E402
from llmbench.text.corpus import python_documents  # noqa: E402
from llmbench.text.merges import PATTERN, split_text, train_bpe  # noqa: E402

LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def clocked(f):
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def best(clock=time.perf_counter, **functions):
    "Best time of each, taking turns so that a busy neighbour disturbs all alike"
    times = {name: [] for name in functions}
    for _ in range(args.repeat):
        for name, f in functions.items():
            start = clock()
            f()
            times[name].append(clock() - start)
    return {name: min(ts) for name, ts in times.items()}


def train_rust(text, size, threads):
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), LEVEL])
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainers.BpeTrainer(vocab_size=size, initial_alphabet=LEVEL.alphabet(), show_progress=False))
    return tokenizer


def train_obvious(text, size):
    "Byte-pair encoding as one would write it first"
    words, merges = [list(chunk.encode()) for chunk in split_text(text)], []
    for new in range(256, size):
        counts = Counter()
        for ids in words: counts.update(zip(ids, ids[1:]))
        pair = max(counts, key=counts.get)
        merges.append(pair)
        for k, ids in enumerate(words):
            merged, i = [], 0
            while i < len(ids):
                if i < len(ids) - 1 and (ids[i], ids[i+1]) == pair:
                    merged.append(new)
                    i += 2
                else:
                    merged.append(ids[i])
                    i += 1
            words[k] = merged
    return merges


def main():
    text = args.text.read_text(encoding="utf-8") if args.text.exists() else "\n".join(python_documents())
    print(f"{args.text.name if args.text.exists() else 'documentation of Python'}: {len(text):,} characters, vocabulary {args.vocab}, best of {args.repeat}")
    ours, theirs = BPE.train(text, args.vocab, ()), train_rust(text, args.vocab, threads=True)
    assert ours.vocab == theirs.get_vocab(), "the vocabularies differ: nothing below would be a comparison"
    chunks = Counter(split_text(text))
    t = best(ours=lambda: BPE.train(text, args.vocab, ()), split=lambda: Counter(split_text(text)), merge=lambda: train_bpe(chunks, args.vocab),
             rust=lambda: train_rust(text, args.vocab, threads=True), one=lambda: train_rust(text, args.vocab, threads=False))
    print(f"train   ours {t['ours']:.2f} s (cut and count {t['split']:.2f}, merge {t['merge']:.2f}); tokenizers {t['rust']:.2f} s, on one thread {t['one']:.2f} s: "
          f"ours takes {t['ours']/t['rust']:.2f} and {t['ours']/t['one']:.2f} times as long")
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids and ours.decode(ids) == text

    def cold():
        ours.chunk_ids.cache_clear()
        return ours.encode(text)

    t = best(time.process_time, ours=lambda: BPE.train(text, args.vocab, ()), one=lambda: train_rust(text, args.vocab, threads=False))
    print(f"        processor time, which a busy machine disturbs less: ours {t['ours']:.2f} s, tokenizers {t['one']:.2f} s: ours takes {t['ours']/t['one']:.2f} times as much")
    t = best(cold=cold, warm=lambda: ours.encode(text), offsets=lambda: ours.encode_offsets(text), decode=lambda: ours.decode(ids),
             rust=lambda: theirs.encode(text), fast=lambda: theirs.encode_batch_fast([text]), rust_decode=lambda: theirs.decode(ids))
    rate = {name: len(text)/seconds/1e6 for name, seconds in t.items()}
    print(f"encode  ours {rate['cold']:.1f} million characters/s, with chunks remembered {rate['warm']:.1f}, with character spans {rate['offsets']:.1f}; "
          f"tokenizers encode (with spans) {rate['rust']:.1f}, encode_batch_fast (without) {rate['fast']:.1f}")
    print(f"decode  ours {rate['decode']:.1f} million characters/s; tokenizers {rate['rust_decode']:.1f};  {len(text)/len(ids):.2f} characters a token")
    if args.naive:
        slow, merges = clocked(lambda: train_obvious(text, args.naive))
        fast = best(ours=lambda: BPE.train(text, args.naive, ()))["ours"]
        print(f"obvious loop, vocabulary {args.naive}: {slow:.1f} s; ours {fast:.2f} s: {slow/fast:.0f} times faster")
        assert len(merges) == args.naive - 256


main()
