"Self-instruct, mixtures and selection against enumeration, brute force, copies and pencil"
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from random import Random

import pytest
import torch

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pad
from llmbench.text.quality import words
from llmbench.train.loop import batch_loss
from llmbench.tune.curate import Grow, Journal, Task, fault, grow, instance_prompt, kind_prompt, lcs_length, list_prompt, nearest, read_instance, read_list, read_tasks, rouge_l, says_yes
from llmbench.tune.formats import read_conversations
from llmbench.tune.mixture import class_weights, competence, curriculum, mixture, rows_at, stratified, temperature_shares, weighted
from llmbench.tune.select import answer_losses, best_of, chance_of_k, expected_best, instruction_difficulty, k_centre, spoil, tfidf, without_prompt


def tiny(seed=3, vocabulary=11):
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=vocabulary, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=12, max_length=16))
    for p in model.parameters(): torch.nn.init.normal_(p, std=.5)
    return model


# the longest common subsequence


def subsequences(xs): return {sub for n in range(len(xs) + 1) for sub in combinations(xs, n)}


def test_lcs_equals_enumeration(ledger):
    "Every pair of words over {a, b, c} up to length 4, and 300 longer ones over larger alphabets"
    short = ["".join(x) for n in range(5) for x in product("abc", repeat=n)]
    pairs = [(a, b) for a in short[::3] for b in short[::2]]
    random = Random(1)
    pairs += [tuple("".join(random.choice("abcde") for _ in range(random.randrange(10))) for _ in range(2)) for _ in range(300)]
    wrong = sum(lcs_length(a, b) != max(map(len, subsequences(a) & subsequences(b))) for a, b in pairs)
    ledger(f"longest common subsequence, {len(pairs)} pairs", "enumeration of subsequences", wrong, 0)


def test_lcs_of_long_texts_equals_the_table():
    random = Random(2)
    for m, n in ((1, 130), (64, 65), (200, 7), (128, 128)):
        a, b = ([random.randrange(6) for _ in range(size)] for size in (m, n))
        table = [[0]*(n + 1) for _ in range(m + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b): table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert lcs_length(a, b) == table[m][n]


def test_rouge_l_by_hand():
    "police killed the gunman: Lin's example, with beta = 1"
    reference, one, two = (t.split() for t in ("police killed the gunman", "police kill the gunman", "the gunman kill police"))
    assert rouge_l(reference, one) == pytest.approx(.75) and rouge_l(reference, two) == pytest.approx(.5)
    assert rouge_l("a b c d e".split(), "b d".split()) == pytest.approx(2*1*.4/1.4)  # precision 1, recall 2/5
    assert rouge_l([], ["a"]) == 0 == rouge_l([], [])
    assert rouge_l(words("把这句话改成礼貌的说法。"), words("把这句话改成正式的说法")) == pytest.approx(18/22)


def test_rouge_l_equals_rouge_score(data, ledger):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score").RougeScorer(["rougeL"], use_stemmer=False)
    texts = [t.instruction for t in read_tasks(data/"self_instruct_seeds.jsonl")][:60]
    texts = [t for t in texts if t.isascii()]
    error = max(abs(scorer.score(a, b)["rougeL"].fmeasure - rouge_l(words(a), words(b))) for a, b in combinations(texts, 2))
    ledger(f"ROUGE-L of {len(texts)} seed tasks, all pairs", "rouge_score", error, 1e-9)


def test_nearest_equals_brute_force(data, ledger):
    tasks = [words(t.instruction) for t in read_tasks(data/"self_instruct_seeds.jsonl")]
    pool, new = tasks[:140], tasks[140:]
    wrong = sum(nearest(t, pool)[0] != max(rouge_l(t, p) for p in pool) for t in new)
    which = [nearest(t, pool) for t in new]
    assert all(score == rouge_l(t, pool[i]) for t, (score, i) in zip(new, which))
    assert nearest(pool[7], pool) == (1., 7) and nearest([], pool) == (0., -1)
    ledger("closest of 140 seed tasks, 35 new ones", "every ROUGE-L", wrong, 0)


# tasks, lists, replies


def test_real_seeds_are_read(data):
    tasks = read_tasks(data/"self_instruct_seeds.jsonl")
    rows = [json.loads(line) for line in open(data/"self_instruct_seeds.jsonl", encoding="utf-8")]
    assert len(tasks) == len(rows) == 175
    assert Counter(t.classification for t in tasks) == Counter(r["is_classification"] for r in rows)
    assert all(t.instruction == r["instruction"].strip() and t.output == r["instances"][0]["output"].strip() for t, r in zip(tasks, rows))


def test_a_list_that_was_asked_for_is_read_back():
    tasks = [Task(f"Do thing {i} in {i + 1} steps.") for i in range(5)]
    prompt = list_prompt(tasks)
    assert prompt.endswith("\n6.") and read_list("\n".join(prompt.splitlines()[1:-1])) == [t.instruction for t in tasks]
    assert read_list(" First one.\n\n7、第二个任务。\n**8.** Third: say\n   it twice.\n- Fourth!\nThat was all I have.\n11. Breaks of") == ["First one.", "第二个任务。", "Third: say it twice.", "Fourth!", "Breaks of…"]


@pytest.mark.parametrize("said, why", [("Sort the words.", "too short"), ("Sort the three words.", ""), ("写首诗", "too short"), ("写一首诗", ""), ("word "*151, "too long"), ("+ add the numbers up now", "begins with a sign"), ("Write a Python program that sorts numbers.", "wants a program"),
                                       ("Describe the picture in one sentence.", "needs more than text"), ("画一只正在睡觉的猫。", "needs more than text"), ("Tell me a story about a mi…", "unfinished"), ("Write about the town's mapping of words.", "")])
def test_rules(said, why): assert fault(said, [])[0] == why


def test_the_threshold_is_the_first_repetition():
    pool = [words("one two three four five six seven")]
    new = "one two three four five nine ten"           # 2*5/14 = 0.714
    assert fault(new, pool, .7) == ("repeats another task", pytest.approx(5/7)) and fault(new, pool, .72) == ("", pytest.approx(5/7))
    assert fault(new, pool, 5/7)[0] == "repeats another task"


def test_replies():
    assert [says_yes(t) for t in ("YES.", " no way", "False", "不，它不是", "对的", "Notable", "maybe", "是")] == [True, False, False, False, True, None, None, True]
    assert read_instance(" 3\nOutput: 4\nOutput: 5", False) == ("3", "4")
    assert read_instance("positive\nInput: I loved it\nTask: next\nInput: no", True) == ("I loved it", "positive")
    assert read_instance("Output: a\nInput: N/A", False) == ("", "a")
    assert read_instance("Input: a\nOutput:", False) is None and read_instance("a\nb", True) is None
    assert "Answer: yes" in kind_prompt("x", [Task("y", classification=True)])
    for label_first, order in ((True, ("Output: out", "Input: in")), (False, ("Input: in", "Output: out"))):
        asked = instance_prompt("x", label_first, [Task("y", "in", "out")])
        assert asked.index(order[0]) < asked.index(order[1]) and asked.endswith(order[0].split()[0])


# the loop


SEEDS = [Task("Name three cold months of the year.", "", "May is none.", False), Task("Is the fruit ripe or not?", "a green plum", "not ripe", True), Task("把这句话改成礼貌的说法。", "走开", "请让一让", False)]


THINGS = "storm harbour mill owl bread lantern winter river clock garden thief letter bridge sailor apple choir door rope salt".split()


def author(prompt):
    "A script that depends on its prompt alone"
    n, said = Random(prompt).randrange(10**6), Random(prompt).sample(THINGS, 6)
    if prompt.startswith("Does the task"): return "yes" if n % 3 == 0 else "no"
    if prompt.startswith("Give one"): return f" x{n}\nOutput: y{n}" if prompt.endswith("Input:") else f" y{n}\nInput: x{n}" if n % 5 else "pardon?"
    return f" Tell of {said[0]}, {said[1]} and {said[2]}.\n9. Go\n10. Put {' '.join(said[3:])} in order.\n11. Name three cold months of the year.\n12. Say {said[4]} tim"


def test_account_and_training_file(tmp_path):
    verdicts = list(grow(SEEDS, author, tmp_path/"out.jsonl", Grow(want=12)))
    account = Journal(tmp_path/"out.jsonl").account()
    assert account.balanced() and account.read == len(verdicts) and account.kept == 12
    assert {"too short", "repeats another task", "unfinished"} <= set(account.dropped)
    kept = [v for v in verdicts if "reason" not in v]
    pool = [words(t.instruction) for t in SEEDS]
    for row in kept:  # in the order of their acceptance no task is near an earlier one
        assert nearest(words(row["instruction"]), pool)[0] == pytest.approx(row["alike"], abs=1e-4) and row["alike"] < .7
        pool.append(words(row["instruction"]))
    talks = read_conversations(tmp_path/"out.jsonl")
    assert [t["messages"][0]["content"] for t in talks] == [r["instruction"] + "\n" + r["input"] for r in kept]


def test_stopped_anywhere_it_ends_alike(tmp_path):
    "At every call of the model, and after every line on disk, with half a line behind it"
    how, calls = Grow(want=7, seed=3), 0
    def counted(prompt):
        nonlocal calls
        calls += 1
        return author(prompt)
    list(grow(SEEDS, counted, tmp_path/"whole.jsonl", how))
    whole = [p.read_bytes() for p in Journal(tmp_path/"whole.jsonl").paths.values()]
    for n in range(calls):
        left = iter(range(n))
        def ask(prompt, left=left):
            if next(left, None) is None: raise KeyboardInterrupt
            return author(prompt)
        path = tmp_path/f"{n}.jsonl"
        with pytest.raises(KeyboardInterrupt): list(grow(SEEDS, ask, path, how))
        if path.exists(): path.write_bytes(path.read_bytes() + b'{"instruction": "hal')
        list(grow(SEEDS, author, path, how))
        assert [p.read_bytes() for p in Journal(path).paths.values()] == whole, f"stopped at call {n}"
    everything = len(list(grow(SEEDS, author, tmp_path/"steps.jsonl", how)))
    for n in range(1, everything):
        path = tmp_path/f"line-{n}.jsonl"
        for _, _ in zip(range(n), grow(SEEDS, author, path, how)): pass
        list(grow(SEEDS, author, path, how))
        assert [p.read_bytes() for p in Journal(path).paths.values()] == whole, f"stopped behind line {n}"


def test_another_seed_shows_other_tasks(tmp_path):
    shown = {}
    for seed in (0, 1):
        shown[seed] = []
        def ask(prompt, seed=seed):
            shown[seed].append(prompt)
            return author(prompt)
        list(grow(SEEDS*4, ask, tmp_path/f"{seed}.jsonl", Grow(want=4, seed=seed)))
    assert shown[0][0] != shown[1][0] and shown[0][0].count("\n") == 9


# best of k


def test_expected_best_equals_all_groups(ledger):
    random, worst = Random(5), 0.
    for n in range(1, 9):
        scores = [random.choice((0., 1., -2.5, 3., random.random())) for _ in range(n)]
        for k in range(1, n + 1):
            groups = list(combinations(scores, k))
            worst = max(worst, abs(expected_best(scores, k) - sum(map(max, groups))/len(groups)))
    ledger("expected best of k of n answers", "mean over all groups", worst, 1e-12)


def test_pass_at_k_equals_the_published_product(ledger):
    def humaneval(n, c, k):
        if n - c < k: return 1.
        product_ = 1.
        for i in range(n - c + 1, n + 1): product_ *= 1 - k/i
        return 1 - product_
    error = max(abs(humaneval(n, c, k) - expected_best([0.]*(n - c) + [1.]*c, k)) for n in (7, 50, 200) for c in (0, 1, n//3, n) for k in (1, 3, n))
    ledger("pass@k from marks of 0 and 1", "the product of arXiv:2107.03374", error, 1e-12)


def test_expected_best_is_unbiased():
    "Average over all 2^n outcomes of n answers with chance p: exactly 1 - (1 - p)^k; plugging in the share is not"
    for p, n, k in ((.3, 6, 4), (.05, 5, 2), (.8, 7, 7)):
        outcomes = list(product((0., 1.), repeat=n))
        chance = [p**sum(o)*(1 - p)**(n - sum(o)) for o in outcomes]
        assert sum(w*expected_best(o, k) for w, o in zip(chance, outcomes)) == pytest.approx(1 - (1 - p)**k, abs=1e-12) == chance_of_k(p, k)
        assert sum(w*chance_of_k(sum(o)/n, k) for w, o in zip(chance, outcomes)) < 1 - (1 - p)**k - 1e-4
    assert chance_of_k(0., 9) == 0 and chance_of_k(1., 2) == 1 and chance_of_k(1e-15, 3) == pytest.approx(3e-15, rel=1e-9)


def test_best_of_keeps_the_best_and_counts():
    answers = iter(["b", "ddd", "cc", "", "", "", "a", "a", "a"])
    talks, account = best_of(lambda prompts: [next(answers) for _ in prompts], ["p", "q", "r"], lambda i, text: len(text)*(i + 1), k=3, least=3)
    assert [(t["messages"][0]["content"], t["messages"][1]["content"], t["score"]) for t in talks] == [("p", "ddd", 3.), ("r", "a", 3.)]
    assert account == dict(kept=2, left_out=1, drawn=9)


# quality and diversity


def test_losses_are_those_of_single_rows(ledger):
    model, random = tiny(), Random(0)
    rows = [([random.randrange(11) for _ in range(n)], [0]*2 + [1]*(n - 2)) for n in (5, 9, 4, 12, 7)]
    losses = answer_losses(model, rows, batch=2)
    alone = [batch_loss(model, pad([r])).item() for r in rows]
    bare = [([10, *ids[2:]], [0, *mask[2:]]) for ids, mask in rows]
    assert without_prompt(rows, 10) == bare
    ratio = instruction_difficulty(model, rows, 10)
    ledger("loss of each answer, sorted and padded", "one row at a time", float((losses - torch.tensor(alone)).abs().max()), 1e-5)
    ledger("instruction-following difficulty", "two losses a row", float((ratio - torch.tensor([batch_loss(model, pad([a])).item()/batch_loss(model, pad([b])).item() for a, b in zip(rows, bare)])).abs().max()), 1e-5)


def test_tfidf_equals_scikit_learn(ledger):
    texts = ["the cat sat on the mat", "a dog sat", "云村的猫", "", "mat mat cat"]
    ours = tfidf(texts)
    vocabulary = sorted({w for t in texts for w in words(t)})
    worst = 0.
    for row, text in zip(ours.tolist(), texts):  # the documented formula, written out
        tf = Counter(words(text))
        raw = [tf[w]*(math.log((1 + len(texts))/(1 + sum(w in words(t) for t in texts))) + 1) for w in vocabulary]
        length = math.sqrt(sum(x*x for x in raw)) or 1.
        worst = max(worst, max(abs(a - x/length) for a, x in zip(row, raw)))
    ledger("TF-IDF", "scikit-learn's documented formula, written out", worst, 1e-12)
    sklearn = pytest.importorskip("sklearn.feature_extraction.text", reason="pip install scikit-learn")
    theirs = sklearn.TfidfVectorizer(analyzer=words).fit_transform(texts).toarray()
    assert abs(ours.numpy() - theirs).max() < 1e-12


def test_k_centre_is_greedy_and_within_twice_the_best(ledger):
    worst = 0.
    for seed in range(6):
        points = torch.rand(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        d = torch.cdist(points, points)
        for k in (1, 2, 3, 4):
            chosen, radius = k_centre(points, k, first=seed)
            naive = [seed]
            while len(naive) < k: naive.append(max(range(9), key=lambda i: min(d[i, j].item() for j in naive)))
            assert chosen == naive and radius == pytest.approx(d[:, chosen].amin(1).max().item(), abs=1e-9)
            best = min(d[:, list(c)].amin(1).max().item() for c in combinations(range(9), k))
            worst = max(worst, radius/best)
    ledger("k-centre: radius over the best possible", "all choices of k of 9", worst, 2.)


def test_spoil_plants_what_it_says():
    talks = [dict(messages=[dict(role="user", content=f"q{i}"), dict(role="assistant", content=f" answer number {i}" if i % 2 else f"第{i}个回答在这里")]) for i in range(40)]
    bad, what = spoil(talks, .3, seed=2)
    assert Counter(what) == {"": 28, "swapped": 4, "cut": 4, "refused": 4}
    for i, (a, b, w) in enumerate(zip(talks, bad, what)):
        old, new = (x["messages"][1]["content"] for x in (a, b))
        assert a["messages"][0] == b["messages"][0]
        if w == "": assert old == new
        if w == "swapped": assert new != old and new in [t["messages"][1]["content"] for t in talks]
        if w == "cut": assert new == old[:len(old)//2]
        if w == "refused": assert new == (" I don't know." if i % 2 else "我不知道。")
    assert spoil(talks, .3, seed=2) == (bad, what) and spoil(talks, .3, seed=3)[1] != what
    assert talks[0]["messages"][1]["content"] == "第0个回答在这里", "the clean rows are not touched"


# weights and mixtures


def test_weights_equal_copies(ledger):
    "Loss and gradient of weighted rows, and of the rows copied out"
    model, rows = tiny(), [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([6, 7, 8], [0, 1, 1]), ([9, 1, 4, 4], [0, 0, 0, 1])]
    counts, found = [2, 3, 1], []
    for batch in (pad(weighted(rows, counts)), pad([r for r, n in zip(rows, counts) for _ in range(n)])):
        model.zero_grad()
        loss = batch_loss(model, batch)
        loss.backward()
        found.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    ledger("weighted rows, loss and gradient", "the same rows copied", float((found[0] - found[1]).abs().max()), 5e-6)
    off = batch_loss(model, pad(weighted(rows, [1, 0, 1])))
    assert off.item() == pytest.approx(batch_loss(model, pad([rows[0], rows[2]])).item(), abs=1e-6)
    assert batch_loss(model, pad(weighted(rows, [.2, .3, .1]))).item() == pytest.approx(found[0][0].item(), abs=1e-6), "only the ratios of weights count"


def test_class_weights_by_hand():
    assert class_weights(list("aaaabb")) == pytest.approx([.75]*4 + [1.5]*2)
    half = class_weights(list("aaaab"), .5)                                # 1/2 and 1, mean (4/2 + 1)/5
    assert half == pytest.approx([.5/.6]*4 + [1/.6])


def test_shares_by_hand():
    assert temperature_shares([81, 16, 1], 2.) == pytest.approx([9/14, 4/14, 1/14])
    assert temperature_shares([3, 1]) == pytest.approx([.75, .25]) and temperature_shares([3, 1], math.inf) == [.5, .5]
    assert temperature_shares([8, 1], .5) == pytest.approx([64/65, 1/65])
    assert temperature_shares([1e300, 1e-300], 100.)[1] == pytest.approx(1e-6, rel=1e-6)
    assert temperature_shares([500, 20, 10], most=30) == pytest.approx([.5, 1/3, 1/6])


def test_systematic_rows():
    "Rounded up or down in each batch, right over many, no source forgotten, and nothing else than the shares decides"
    for shares, batch in (([.9, .05, .05], 16), ([1/3]*3, 32), ([.999, .001], 8), ([.2, .3, .1, .4], 7), ([0., 1.], 5)):
        total = [0]*len(shares)
        for step in range(2000):
            counts = rows_at(step, batch, shares)
            assert sum(counts) == batch and all(math.floor(batch*p - 1e-9) <= n <= math.ceil(batch*p + 1e-9) for n, p in zip(counts, shares))
            total = [a + b for a, b in zip(total, counts)]
        assert max(abs(n - 2000*batch*p) for n, p in zip(total, shares)) < 6
    pools = [pad([([fill, fill], [0, 1])]*9) for fill in (3, 7)]
    batch_at = mixture(pools, [.25, .75], batch=8, seed=1)
    assert [Counter(batch_at(s).ids[:, 0].tolist()) for s in range(3)] == [{3: 2, 7: 6}]*3


def test_stratified_by_hand():
    labels = ["a"]*5 + ["b"]*3 + ["c"]*2
    for count, want in ((10, (5, 3, 2)), (5, (3, 1, 1)), (4, (2, 1, 1)), (0, (0, 0, 0))):  # of 5: 2.5, 1.5, 1; the first of equal remainders
        rows = stratified(labels, count, seed=4)
        assert len(set(rows)) == len(rows) == count and tuple(Counter(labels[i] for i in rows)[c] for c in "abc") == want
    seen = Counter(i for s in range(600) for i in stratified(labels, 4, s))
    assert all(abs(seen[i]/600 - 2/5) < .1 for i in range(5)) and all(abs(seen[i]/600 - 1/3) < .1 for i in range(5, 8))


def test_curriculum_by_hand():
    assert [competence(t, 8, .5) for t in (0, 2, 8, 99)] == pytest.approx([.5, math.sqrt(.25 + .75/4), 1., 1.])
    pool = pad([([1, i], [0, 1]) for i in range(20)])
    batch_at = curriculum(pool, [(i*7) % 20 for i in range(20)], steps=10, batch=400, start=.2)
    easiest = sorted(range(20), key=lambda i: (i*7) % 20)
    for step in (0, 3, 10): assert set(batch_at(step).ids[:, 1].tolist()) == set(easiest[:math.ceil(20*competence(step, 10, .2) - 1e-9)])
    assert torch.equal(batch_at(3).ids, batch_at(3).ids) and not torch.equal(batch_at(10).ids, batch_at(11).ids)


def test_a_frozen_setting_is_no_argument_of_the_prompt(tmp_path):
    "shown and own are kept"
    prompts = []
    def ask(prompt):
        prompts.append(prompt)
        return author(prompt)
    list(grow(SEEDS*5, ask, tmp_path/"o.jsonl", replace(Grow(want=6), shown=4, own=1)))
    lists = [p for p in prompts if p.startswith("Continue")]
    grown = {t.instruction for t in SEEDS}
    assert all(p.count("\n") == 5 for p in lists) and all(sum(line[3:] not in grown for line in p.splitlines()[1:-1]) <= 1 for p in lists)
    with pytest.raises(UserError): list(grow([], ask, tmp_path/"x.jsonl"))
