"The small language: every probability adds up, the tilted policy is the best, Best-of-N is what drawing gives"
import math
from itertools import product

import pytest
import torch

from llmbench.align.frontier import END, LONGEST, WORDS, Game, Tokens, answer_table, best_of_exact, every_answer, exact_logps, frontier, frontier_at, game_pairs, new_game, proxy_reward, tilted, true_reward, worth
from llmbench.align.grpo import best_of_kl
from llmbench.align.rollout import Prompt, Sampling, rollout


@pytest.fixture(scope="module")
def game(): return new_game()


def test_every_answer_once():
    answers = every_answer()
    assert len(answers) == len(set(map(tuple, answers))) == 341 and all(len(a) <= LONGEST for a in answers)
    assert all((a[-1] == END) != (len(a) == LONGEST and END not in a) for a in answers)


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_probabilities_add_up(seed, ledger):
    ledger(f"exact probabilities of 341 answers, seed {seed}", "sum to 1", abs(float(new_game(seed).ref_logps.exp().sum()) - 1), 1e-6)


def test_probabilities_are_those_of_sampling(game, ledger):
    "Chi-square of 8,000 sampled answers against the enumeration"
    from scipy.stats import chisquare
    roll = rollout(game.model, [Prompt([END])]*8, lambda ss: [0.]*len(ss), Tokens(), Sampling(prompts=8, group=1000, new_tokens=LONGEST), generator=torch.Generator().manual_seed(0))
    place = {tuple(a): i for i, a in enumerate(every_answer())}
    seen = torch.bincount(torch.tensor([place[tuple(s.ids)] for s in roll.samples]), minlength=341).double()
    p, likely = game.ref_logps.exp(), game.ref_logps.exp()*8000 >= 5
    counts, expected = (torch.cat([x[likely], x[~likely].sum()[None]]) for x in (seen, p/p.sum()*8000))
    value = chisquare(counts.numpy(), expected.numpy()).pvalue
    ledger("rollouts of the small language: 1 - p of chi-square", "enumeration", 1 - value, 1 - 1e-3)


def test_rewards_by_hand():
    for said, truth, proxy in (("sun please", 2, 1.4), ("please sun", 2, 1.4), ("sun", 1, 1), ("rain", 0, 0), ("please", 1, .4), ("sun rain please", 1, 1.4), ("sun please please", 1, 1.8), ("please please please please", -2, 1.6), ("", 0, 0)):
        assert (true_reward(said), proxy_reward(said)) == pytest.approx((truth, proxy)), said
    assert Tokens().decode([1, 4]) == "sun please" and len(WORDS) == 4


@pytest.mark.parametrize("beta", [2., .5, .1])
def test_the_tilted_policy_is_the_best(beta, game, ledger):
    "By gradient ascent from the reference on the exact objective, and beta log Z"
    logits = game.ref_logps.clone().requires_grad_()
    for _ in range(4000):
        logps = logits.log_softmax(0)
        value = (logps.exp()*(game.truth - beta*(logps - game.ref_logps))).sum()
        value.backward()
        with torch.no_grad(): logits += 1.5/max(beta, .3)*logits.grad/logps.exp().clamp(min=1e-4)
        logits.grad = None
    best = tilted(game.ref_logps, game.truth, beta)
    at = worth(best, game)
    assert at["truth"] - beta*at["kl"] >= float(value) - 1e-9
    ledger(f"best objective at beta {beta}", "gradient ascent", abs(at["truth"] - beta*at["kl"] - float(value)), 2e-3)
    log_z = (game.ref_logps - game.ref_logps.logsumexp(0) + game.truth/beta).logsumexp(0)
    assert abs(at["truth"] - beta*at["kl"] - beta*float(log_z)) < 1e-5


def test_nobody_crosses_the_frontier(game):
    g = torch.Generator().manual_seed(1)
    for scale in (.1, .5, 2.):
        for _ in range(20):
            at = worth((game.ref_logps + scale*torch.randn(341, generator=g, dtype=torch.double)).log_softmax(0), game)
            assert at["truth"] <= frontier_at(game, at["kl"])["truth"] + 1e-6


def test_frontier_at_finds_its_kl(game):
    for kl in (.3, 1., 2.5): assert abs(frontier_at(game, kl)["kl"] - kl) < 1e-6
    curve = frontier(game, "proxy", [5., 1., .1])
    assert [c["beta"] for c in curve] == [5., 1., .1] and curve[0]["proxy"] < curve[2]["proxy"]


@pytest.mark.parametrize("n", [1, 2, 6])
def test_best_of_n_against_enumeration(n, ledger):
    "A small table with ties: all tuples of n draws, the first of the best wins"
    p, r = (torch.tensor(x, dtype=torch.double) for x in ([.4, .3, .2, .1], [1., 2., 1., 2.]))
    right = torch.zeros(4).double()
    for draws in product(range(4), repeat=min(n, 7)):
        best = max(range(n), key=lambda k: float(r[draws[k]]))
        right[draws[best]] += math.prod(float(p[d]) for d in draws)
    ledger(f"best of {n} as a policy", "all tuples", (best_of_exact(p.log(), r, n).exp() - right).abs().max(), 1e-9)


def test_best_of_n_pays_at_most_its_bound(game):
    for n in (2, 8, 64):
        at = worth(best_of_exact(game.ref_logps, game.truth, n), game)
        assert 0 < at["kl"] <= best_of_kl(n)


def test_pairs_follow_bradley_terry(game):
    rows = game_pairs(game, 20000, seed=3)
    place = {tuple(a): i for i, a in enumerate(every_answer())}
    won = torch.tensor([[float(game.truth[place[tuple(ids[1:])]]) for ids, _ in row] for row in rows])
    for gap in (1., 2.):
        wins, losses = ((won[:, 0] - won[:, 1]) == gap).sum(), ((won[:, 0] - won[:, 1]) == -gap).sum()
        assert abs(float(wins/(wins + losses)) - 1/(1 + math.exp(-gap))) < .02
    (ids, mask), _ = rows[0]
    assert ids[0] == END and mask == [0] + [1]*(len(ids) - 1)


def test_table_and_model_agree(game):
    ids, mask = answer_table()
    logps = game.model(ids).log_softmax(-1)
    for i in (0, 3, 40, 340):
        alone = sum(float(logps[i, t, ids[i, t + 1]]) for t in range(LONGEST) if mask[i, t + 1])
        assert abs(alone - float(game.ref_logps[i])) < 1e-4
    assert torch.equal(exact_logps(game.model), game.ref_logps) and isinstance(game, Game)
