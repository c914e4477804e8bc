"MinHash and LSH against pencil, enumeration, theory and `datasketch`, on sets of known similarity and on real text"
import hashlib
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbench.text.clean import Account
from llmbench.text.corpus import read_documents
from llmbench.text.dedup import (Sketches, buckets, candidate_pairs, candidate_probability, choose_bands, dedup, digest, estimate, group_numbers, hash_functions,
                                 jaccard, join_copies, minhash, shingles, signature)
from llmbench.text.quality import words

datasketch = pytest.importorskip("datasketch")


def pair(similarity, size, seed):
    "Two sets of random numbers with exactly this Jaccard similarity"
    drawn = np.random.default_rng([seed, 9]).integers(0, 2**64, size, np.uint64, endpoint=False)
    common = round(size*similarity)
    rest = size - common
    return np.sort(drawn[:common + rest//3]), np.sort(np.concatenate([drawn[:common], drawn[common + rest//3:]]))


def naive_shingles(text, n):
    w = words(text)
    n = max(1, min(n, len(w)))
    return {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}


def chinese(data): return [turn["value"] for line in (data/"sharegpt_medical_zh.jsonl").read_text().splitlines() for turn in json.loads(line)["conversations"]]


def edited(text, share, seed):
    "A copy in which some words are replaced"
    draw, w = random.Random(seed), words(text)
    return ("" if any("\u4e00" <= c <= "\u9fff" for c in w) else " ").join(x if draw.random() > share else draw.choice(w) for x in w)


# Shingles -----------------------------------------------------------------------------------------------------------

def test_words_and_shingles_by_hand():
    assert words("Mira's 2 loaves_of 林月面包, ＯＫ") == ["mira", "s", "2", "loaves", "of", "林", "月", "面", "包", "ｏｋ"]
    assert [len(shingles(t, 3)) for t in ("a b c a b c", "a b", "林月住在", "", "?!")] == [3, 1, 2, 0, 0]
    assert len(group_numbers("a b c a b c", 3)) == 4 and len(group_numbers("a b", 3)) == 0
    a, b = shingles("a b c d", 2), shingles("b c d e f", 2)  # ab bc cd, bc cd de ef: 2 of 5
    assert jaccard(a, b) == 2/5 and jaccard(b, a) == 2/5 and jaccard(a, a) == 1 and jaccard(a[:0], b[:0]) == 0
    assert jaccard(shingles("a b c", 2), shingles("c b a", 2)) == 0, "the order counts"


def test_numbers_are_the_same_on_every_machine():
    "blake2b, a polynomial and splitmix64's finalizer, with unlimited integers"
    number = [int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "little") for w in ("mira", "bakes", "面")]
    x = ((number[0]*0x9E3779B97F4A7C15 + number[1])*0x9E3779B97F4A7C15 + number[2]) % 2**64
    x = (x ^ x >> 30)*0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27)*0x94D049BB133111EB % 2**64
    assert group_numbers("Mira bakes 面", 3).tolist() == [x ^ x >> 31]
    assert [int(x[0, 0]) % 1000 for x in hash_functions(4, 1)] == [127, 689]


@settings(max_examples=60, deadline=None)
@given(st.text("ab 月c.", max_size=40), st.text("ab 月c.", max_size=40), st.integers(1, 4))
def test_jaccard_equals_sets_of_tuples(x, y, n):
    a, b = naive_shingles(x, n), naive_shingles(y, n)
    assert jaccard(shingles(x, n), shingles(y, n)) == pytest.approx(len(a & b)/max(1, len(a | b)))


def test_real_text_has_no_collisions(data, ledger):
    texts = read_documents(data/"c4_en.jsonl")[:150] + chinese(data)[:300]
    sets = [naive_shingles(t, 5) for t in texts]
    wrong = sum(len(s) != len(shingles(t, 5)) for s, t in zip(sets, texts))
    ledger("dedup: shingles as numbers, English and Chinese", "sets of tuples", wrong, 0)


# Signatures ---------------------------------------------------------------------------------------------------------

def test_signature_equals_python_integers(ledger):
    "((a x + b) mod 2^64) >> 32 with unlimited integers"
    members = np.random.default_rng(3).integers(0, 2**64, 1300, np.uint64, endpoint=False)
    a, b = hash_functions(24, 7)
    expected = [min((int(ai)*(int(x) >> 32) + int(bi)) % 2**64 >> 32 for x in members) for ai, bi in zip(a[:, 0], b[:, 0])]
    ledger("dedup.signature (multiply-shift)", "Python's integers", np.abs(signature(members, 24, 7).astype(np.int64) - np.array(expected)).max(), 0)


def test_no_member_is_overlooked():
    "More functions than members: each member is the smallest for some function, also at the edges of the blocks of 512"
    for size in (1, 511, 512, 513, 1025):
        members = np.random.default_rng(size).integers(0, 2**64, size, np.uint64, endpoint=False)
        a, b = hash_functions(6000, 2)
        expected = np.min([((a[:, 0]*(x >> np.uint64(32)) + b[:, 0]) >> np.uint64(32)) for x in members], axis=0)
        assert (signature(members, 6000, 2) == expected).all()


def test_estimates_are_unbiased_and_spread_as_theory_says(ledger):
    worst_bias, worst_spread = 0., 0.
    for J in (.1, .3, .5, .8, .95):
        found = np.array([estimate(*(signature(s, 128, seed=500 + k) for s in pair(J, 200, k))) for k in range(400)])
        error = math.sqrt(J*(1 - J)/128)
        worst_bias = max(worst_bias, abs(found.mean() - J)/(error/math.sqrt(400)))
        worst_spread = max(worst_spread, abs(found.std()/error - 1))
    ledger("dedup.estimate: bias in standard errors, 5 similarities x 400 pairs", "Jaccard similarity, exact", worst_bias, 3.5)
    ledger("dedup.estimate: spread against sqrt(J(1-J)/K), relative", "theory", worst_spread, .12)


def test_real_pairs_are_within_the_theoretical_error(data, ledger):
    texts, errors = read_documents(data/"c4_en.jsonl")[:60] + [t for t in chinese(data) if len(t) > 60][:60], []
    for k, text in enumerate(texts):
        copy = edited(text, .01*(k % 12), k)
        J = jaccard(shingles(text), shingles(copy))
        errors.append((estimate(minhash(text), minhash(copy)) - J)/max(math.sqrt(J*(1 - J)/128), 1/128))
    ledger("dedup.minhash on real pairs: mean error in standard errors of the mean", "Jaccard similarity, exact", abs(np.mean(errors))*math.sqrt(len(errors)), 3.5)
    assert np.std(errors) < 1.3 and np.abs(errors).max() < 4.5


# Bands --------------------------------------------------------------------------------------------------------------

def test_s_curve_by_hand_and_by_enumeration():
    assert candidate_probability(.5, 2, 3) == 1 - (7/8)**2 and candidate_probability(0., 4, 4) == 0 and candidate_probability(1., 4, 4) == 1
    b, r, s, total = 2, 2, .3, 0.
    for outcome in range(2**(b*r)):  # each row agrees or not
        rows = [outcome >> i & 1 for i in range(b*r)]
        if any(all(rows[k*r:(k + 1)*r]) for k in range(b)): total += math.prod(s if x else 1 - s for x in rows)
    assert candidate_probability(s, b, r) == pytest.approx(total)


def test_candidates_follow_the_s_curve(ledger):
    b, r, tries, worst = 10, 5, 400, 0.
    for J in (.3, .5, .6, .7, .8):
        hits = sum(bool(candidate_pairs(np.stack([signature(s, b*r, seed=9000 + k) for s in pair(J, 100, 7*k)]), b, r)) for k in range(tries))
        p = candidate_probability(J, b, r)
        worst = max(worst, abs(hits/tries - p)/math.sqrt(p*(1 - p)/tries))
    ledger("dedup: share of candidates in standard errors, 5 similarities x 400 pairs", "1-(1-s^r)^b", worst, 3.5)


def test_choice_of_bands():
    for threshold, permutations in ((.8, 128), (.5, 128), (.9, 64), (1., 16)):
        bands, rows = choose_bands(threshold, permutations)
        assert bands*rows <= permutations and candidate_probability(threshold, bands, rows) >= .99
        assert rows == permutations or candidate_probability(threshold, permutations//(rows + 1), rows + 1) < .99
    assert choose_bands(.8, 128) == (21, 6) and choose_bands(1., 16) == (1, 16)


def corpus(data):
    "Real documents in both languages, edited copies among them"
    english, zh = read_documents(data/"c4_en.jsonl")[:120], [t for t in chinese(data) if len(t) > 80][:120]
    docs = english + zh
    for k in range(0, 240, 2): docs.append(edited(docs[k], .01*(k % 9), k))
    random.Random(4).shuffle(docs)
    return docs


def test_same_candidates_as_datasketch(data, ledger):
    docs, wrong = corpus(data), 0
    rows = np.stack([minhash(d) for d in docs])
    for params in ((21, 6), (9, 13), (32, 4), (64, 2)):
        lsh = datasketch.MinHashLSH(num_perm=128, params=params)
        theirs = [datasketch.MinHash(num_perm=128, hashvalues=row.astype(np.uint64), scheme="legacy") for row in rows]
        for i, m in enumerate(theirs): lsh.insert(i, m)
        found = {(min(i, j), max(i, j)) for i, m in enumerate(theirs) for j in lsh.query(m) if i != j}
        ours = candidate_pairs(rows, *params)
        assert len(ours) > 20
        wrong += len(found ^ ours)
    ledger("dedup.candidate_pairs, 360 real documents, 4 choices of bands", "datasketch.MinHashLSH on the same values", wrong, 0)


def test_same_near_duplicates_as_datasketch_with_its_own_functions(data, ledger):
    "Other hash functions, other candidates; compared truly, the same pairs"
    docs = corpus(data)
    sets = [shingles(d) for d in docs]
    rows = np.stack([signature(s) for s in sets])
    ours = {(i, j) for i, j in candidate_pairs(rows, 32, 4) if jaccard(sets[i], sets[j]) >= .7}
    lsh, hashes = datasketch.MinHashLSH(num_perm=128, params=(32, 4)), []
    for i, s in enumerate(sets):
        m = datasketch.MinHash(num_perm=128)
        m.update_batch([int(x).to_bytes(8, "little") for x in s])
        lsh.insert(i, m)
        hashes.append(m)
    theirs = {(min(i, j), max(i, j)) for i, m in enumerate(hashes) for j in lsh.query(m) if i != j and jaccard(sets[i], sets[j]) >= .7}
    every = {(i, j) for j in range(len(docs)) for i in range(j) if jaccard(sets[i], sets[j]) >= .7}
    assert len(every) > 40
    ledger("dedup: verified near-duplicate pairs (J >= 0.7), real text", "datasketch with its own functions", len(ours ^ theirs), 0)
    ledger("dedup: verified near-duplicate pairs (J >= 0.7), real text", "all pairs compared", len(ours ^ every), 0)


# Groups and the whole -----------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=14), st.lists(st.lists(st.integers(0, 13), min_size=2, max_size=7, unique=True), max_size=6), st.integers(0, 4))
def test_groups_are_connected_components(values, found, gap):
    found = [np.array(sorted(i for i in b if i < len(values))) for b in found]
    groups = join_copies(found, lambda i, j: abs(values[i] - values[j]) <= gap, len(values))
    first = list(range(len(values)))
    for _ in values:  # the slow way: hand the smallest number on along each edge, until nothing moves
        for b in found:
            for i in b:
                for j in b:
                    if abs(values[i] - values[j]) <= gap: first[i] = first[j] = min(first[i], first[j])
    assert [groups.first(i) for i in range(len(values))] == first


def test_dedup_equals_all_pairs_on_real_text(data, ledger):
    docs = corpus(data)
    docs += docs[:7]
    account = Account()
    kept = dedup(docs, .7, account=account)
    unique = list(dict.fromkeys(docs))
    sets = [shingles(d) for d in unique]
    slow = join_copies([np.arange(len(unique))], lambda i, j: jaccard(sets[i], sets[j]) >= .7, len(unique))
    expected = [d for i, d in enumerate(unique) if slow.first(i) == i]
    ledger("text.dedup at 0.7, 367 real documents with edited copies", "all pairs compared", len(set(kept) ^ set(expected)) + (kept != expected), 0)
    assert account.balanced() and account.read == len(docs) and account.dropped["exact copy"] == len(docs) - len(unique) and account.dropped["near copy"] == len(unique) - len(kept) > 20


def test_dedup_keeps_the_first_in_order():
    a, b = "one two three four five six seven eight nine ten", "eleven twelve thirteen fourteen fifteen sixteen"
    assert dedup([b, a, a, b.upper(), "?", a + "!", "?", "!"]) == [b, a, "?", "!"]
    assert dedup([a, a + " eleven"], .99) == [a, a + " eleven"] and dedup([a, a + " eleven"], .8) == [a]
    assert dedup([]) == []


def test_documents_without_a_word_are_no_candidates():
    rows = np.stack([minhash(t) for t in ("?!", "…", "a b c", "A, b; c", "")])
    assert candidate_pairs(rows, 21, 6) == {(2, 3)} and (rows[0] == 2**32 - 1).all()


def test_many_copies_cost_few_comparisons():
    docs = [f"{'a long story about the town and its people '*5} number {i % 3}" for i in range(600)]
    sketches = Sketches()
    assert sum(map(sketches.add, docs)) == 3 == sketches.size and len(sketches.digests) == 3
    asked = []
    join_copies(buckets(np.tile(minhash(docs[0]), (500, 1)), 21, 6), lambda i, j: asked.append(1) or True, 500)
    assert len(asked) == 499
    assert digest(docs[0]) != digest(docs[1])
