"Effects of reinforcement learning on the small language, measured exactly, three seeds each"
import warnings

import pytest
import torch

from llmbench.align.frontier import dpo_on_game, frontier_at, learner, new_game, train_on_game, worth

warnings.filterwarnings("ignore", message=".*got the same mark.*")


@pytest.fixture(scope="module")
def game():
    torch.set_num_threads(1)
    return new_game()


@pytest.fixture(scope="module")
def start(game): return worth(game.ref_logps, game)


def share(game, start, at): return (at["truth"] - start["truth"])/(frontier_at(game, at["kl"])["truth"] - start["truth"])


@pytest.mark.parametrize("method,steps", [("ppo", 80), ("grpo", 80), ("rloo", 80)])
def test_reaches_the_frontier(method, steps, game, start):
    "At most a tenth of the frontier's reward is missing, and nobody is above it"
    for seed in range(3):
        at = list(train_on_game(game, learner(method, .25, steps, seed), every=1000))[-1]
        best = frontier_at(game, at["kl"])["truth"]
        assert .9*best <= at["truth"] <= best + 1e-6, (seed, at, best)
        assert at["truth"] > start["truth"] + 1


def test_a_dearer_nat_buys_less(game):
    far, near = (list(train_on_game(game, learner("grpo", beta, 80), every=1000))[-1] for beta in (.15, .8))
    assert far["kl"] > near["kl"] + 1 and far["truth"] > near["truth"]


def test_dpo_lands_on_the_frontier(game, start):
    at = dpo_on_game(game, .3, steps=200)
    assert share(game, start, at) > .75 and at["kl"] > .5


def test_without_a_penalty_the_proxy_rises_and_the_truth_falls(game, start):
    for seed in range(3):
        at = list(train_on_game(game, learner("ppo", 0., 60, seed), by="proxy", every=1000))[-1]
        assert at["proxy"] > start["proxy"] + 1 and at["truth"] < start["truth"] - .1


def test_a_penalty_keeps_the_truth(game, start):
    free, leashed = (list(train_on_game(game, learner("ppo", beta, 60), by="proxy", every=1000))[-1] for beta in (0., .7))
    assert leashed["truth"] > start["truth"] > free["truth"] and leashed["kl"] < free["kl"]


def test_the_upside_down_penalty_runs_away(game):
    "The sign of the KL matters: pushed away from the reference, the policy leaves it whatever the reward says"
    import copy
    from dataclasses import replace
    from llmbench.align import ppo as module
    right = module.token_rewards
    try:
        module.token_rewards = lambda scores, logps, ref, mask, coef: right(scores, ref, logps, mask, coef)
        wrong = list(train_on_game(game, replace(learner("ppo", 1.), steps=40), every=1000, model=copy.deepcopy(game.model)))[-1]
    finally: module.token_rewards = right
    fine = list(train_on_game(game, replace(learner("ppo", 1.), steps=40), every=1000))[-1]
    assert fine["kl"] < .6 < wrong["kl"]
