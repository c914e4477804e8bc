"Exact coverage of three intervals, questions needed, clustered questions, the best of twenty: `python experiments/intervals/run.py`"
import math

import numpy as np

from llmbench.use.intervals import bootstrap_interval, sum_up, wilson_interval


def textbook(k, n):
    half = 1.959964*math.sqrt(k/n*(1 - k/n)/n)
    return k/n - half, k/n + half


def bootstrap(k, n): return bootstrap_interval([1]*k + [0]*(n - k))


def coverage(table, truth):
    "Probability that the interval contains `truth`, over all outcomes of n questions"
    n = len(table) - 1
    return sum(math.comb(n, k)*truth**k*(1 - truth)**(n - k) for k, (low, high) in enumerate(table) if low - 1e-12 <= truth <= high + 1e-12)


truths = np.linspace(.5, .99, 491)
for n in (20, 100):
    for f in (textbook, bootstrap, wilson_interval):
        table = [f(k, n) for k in range(n + 1)]
        every = [coverage(table, p) for p in truths]
        at = ", ".join(f"{p}: {coverage(table, p):.3f}" for p in (.8, .9, .98))
        print(f"{n} questions, {f.__name__}: coverage at {at}; mean {np.mean(every):.3f}, worst {min(every):.3f} over 0.50 to 0.99")

naive, grouped = [wilson_interval(4*k, 100) for k in range(26)], []
for k in range(26):
    told = sum_up(np.repeat([1, 0], [k, 25 - k]).repeat(4), groups=np.repeat(range(25), 4).tolist())
    grouped.append((told.low, told.high))
print(f"25 facts in 4 phrasings, truth 0.8: as 100 questions {coverage(naive, .8):.3f}, with groups {coverage(grouped, .8):.3f}")

for p, q in ((.90, .93), (.80, .85)):
    print(f"{p:.0%} or {q:.0%}, two exams, 80 % power: {math.ceil(2.8**2*(p*(1 - p) + q*(1 - q))/(p - q)**2)} questions each")
print(f"90 % or 93 %, one exam, they disagree on 9 %: {math.ceil(2.8**2*(.09 - .03**2)/.03**2)} questions")
best = np.random.default_rng(4).binomial(100, .9, size=(1000, 20)).max(1).mean()/100
print(f"best of twenty equal models at 90 % on 100 questions: {best:.3f}")
print(f"50 of 50: at least {wilson_interval(50, 50)[0]:.3f}; 20 of 20: at least {wilson_interval(20, 20)[0]:.3f}")
