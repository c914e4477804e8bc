"The KL estimators and their gradients against enumeration of a small vocabulary; upside down must be seen"
import itertools
import math

import pytest
import torch

from llmbench.align.kl import kl_full, kl_k1, kl_k2, kl_k3

POLICY = torch.tensor([.62, .21, .09, .05, .03], dtype=torch.float64)
REF = torch.tensor([.25, .31, .17, .16, .11], dtype=torch.float64)
BY_HAND = sum(p*math.log(p/q) for p, q in zip(POLICY.tolist(), REF.tolist()))
BACKWARDS = sum(q*math.log(q/p) for p, q in zip(POLICY.tolist(), REF.tolist()))


def expect(per_token): return float((POLICY*per_token).sum())


@pytest.mark.parametrize("f,truth", [(kl_k1, BY_HAND), (kl_k3, BY_HAND), (kl_k2, sum(p*math.log(p/q)**2/2 for p, q in zip(POLICY.tolist(), REF.tolist())))])
def test_expectations(f, truth, ledger):
    ledger(f"{f.__name__}: expectation over a vocabulary of 5", "enumeration", abs(expect(f(POLICY.log(), REF.log())) - truth), 1e-12)


@pytest.mark.parametrize("f", [kl_k1, kl_k2, kl_k3])
def test_values_by_hand(f):
    "log 2 above the reference, log 4 below it"
    up, down = f(torch.tensor(math.log(.5)), torch.tensor(math.log(.25))), f(torch.tensor(math.log(.2)), torch.tensor(math.log(.8)))
    two, four = math.log(2), math.log(4)
    hand = {"kl_k1": (two, -four), "kl_k2": (two**2/2, four**2/2), "kl_k3": (.5 - 1 + two, 4 - 1 - four)}[f.__name__]
    assert abs(up - hand[0]) < 1e-6 and abs(down - hand[1]) < 1e-6


def test_upside_down_is_caught():
    "Swapped arguments estimate something else, by more than any noise"
    for f in (kl_k1, kl_k3): assert abs(expect(f(REF.log(), POLICY.log())) - BY_HAND) > .05
    ratio = (POLICY/REF).log()
    assert abs(expect(torch.expm1(ratio) - ratio) - BY_HAND) > .05


def slope(value, logits): return torch.autograd.grad(value, logits)[0]


def true_gradients():
    "grad KL(policy, ref) = p (log-ratio - KL) and grad KL(ref, policy) = p - q, by hand"
    return POLICY*((POLICY/REF).log() - BY_HAND), POLICY - REF


def test_full_and_its_gradient(ledger):
    logits = (POLICY.log() + 1.5).requires_grad_()
    value = kl_full(logits, REF.log() - .5)
    forward, _ = true_gradients()
    ledger("kl_full and its gradient", "enumeration", max(abs(float(value) - BY_HAND), float((slope(value, logits) - forward).abs().max())), 1e-12)
    logits = POLICY.log().requires_grad_()
    _, backward = true_gradients()
    assert torch.allclose(slope(kl_full(REF.log(), logits), logits), backward, atol=1e-12)


def in_loss(f):
    logits = POLICY.log().requires_grad_()
    return slope((POLICY*f(logits.log_softmax(-1), REF.log())).sum(), logits)


def in_reward(f):
    logits = POLICY.log().requires_grad_()
    return slope((POLICY*f(POLICY.log(), REF.log())*logits.log_softmax(-1)).sum(), logits)


@pytest.mark.parametrize("f", [kl_k1, kl_k2, kl_k3])
def test_gradients_in_the_loss(f, ledger):
    forward, backward = true_gradients()
    truth = {"kl_k1": torch.zeros(5).double(), "kl_k2": forward, "kl_k3": backward}[f.__name__]
    ledger(f"{f.__name__}: gradient as a loss term", "enumeration", (in_loss(f) - truth).abs().max(), 1e-12)
    assert f is kl_k2 or (in_loss(f) - forward).abs().max() > .02


@pytest.mark.parametrize("f", [kl_k1, kl_k2, kl_k3])
def test_gradients_in_the_reward(f, ledger):
    forward, backward = true_gradients()
    half_square = (POLICY/REF).log()**2/2
    truth = {"kl_k1": forward, "kl_k2": POLICY*(half_square - (POLICY*half_square).sum()), "kl_k3": forward - backward}[f.__name__]
    ledger(f"{f.__name__}: policy gradient as a reward", "enumeration", (in_reward(f) - truth).abs().max(), 1e-12)
    assert f is kl_k1 or (in_reward(f) - forward).abs().max() > .02


def test_k3_with_the_ratio_has_the_true_gradient():
    forward, _ = true_gradients()
    assert torch.allclose(in_loss(lambda logps, ref: torch.exp(logps - POLICY.log())*kl_k3(logps, ref)), forward, atol=1e-12)


def test_k3_equals_trl_and_keeps_small_numbers(ledger):
    a, b = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ledger("kl_k3", "TRL's GRPO expression in fp64", (kl_k3(a, b) - (torch.exp(b - a) - (b - a) - 1)).abs().max(), 1e-12)
    tiny = kl_k3(torch.tensor(1e-4), torch.tensor(0.))
    assert abs(tiny - 5e-9) < 2e-11 and kl_k3(torch.tensor(3e-4), torch.tensor(0.)) > 0


def test_a_sequence_is_the_sum_of_its_tokens():
    "Chain rule, over all 8 sequences of three coins whose chances depend on what fell before"
    g = torch.Generator().manual_seed(2)
    p, q = (torch.rand(7, generator=g, dtype=torch.float64)*.8 + .1 for _ in "pq")  # chance of 1 at each of the 7 nodes
    total = by_token = 0.
    for path in itertools.product((0, 1), repeat=3):
        nodes = [0, 1 + path[0], 3 + 2*path[0] + path[1]]
        lp, lq = (torch.stack([x[n] if bit else 1 - x[n] for n, bit in zip(nodes, path)]).log() for x in (p, q))
        total += lp.sum().exp()*(lp.sum() - lq.sum())
        by_token += lp.sum().exp()*kl_k3(lp, lq).sum()
    assert abs(total - by_token) < 1e-12


def test_what_is_never_said():
    never = torch.tensor([0., -torch.inf])
    assert abs(kl_full(never, torch.zeros(2)) - math.log(2)) < 1e-6
    assert kl_full(torch.zeros(2), never) == torch.inf
    logits = torch.tensor([.3, -torch.inf, .1], requires_grad=True)
    slope_ = slope(kl_full(logits, torch.tensor([0., .2, .4])), logits)
    assert slope_.isfinite().all()
