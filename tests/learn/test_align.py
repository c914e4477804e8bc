"Effects of learning from pairs, seeded: the optimum of reinforcement learning is found, mistakes are not forgiven, a reward model learns manners and a planted length bias"
import copy

import pytest
import torch

from llmbench.align.dpo import DPO, dpo, dpo_loss, implicit_rewards, robust_loss
from llmbench.align.kl import kl_full
from llmbench.align.pairs import pair_rows
from llmbench.align.reward import Reward, RewardModel, answer_lengths, length_bias, pair_rewards, reward
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import SPECIALS, BPE
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft

REF, TASTE, BETA = torch.tensor([.5, .2, .15, .1, .05]), torch.tensor([0., 2., -1., -3., -2.]), .5
BEST = (REF.log() + TASTE/BETA).softmax(-1)
I, J = (torch.tensor(x) for x in zip(*[(a, b) for a in range(5) for b in range(5) if a != b]))
WINS = (TASTE[I] - TASTE[J]).sigmoid()
TOKENS = torch.tensor([3., 6., 2., 9., 1.])


def fitted(loss, wins=WINS):
    "The policy that minimises the loss over all ordered pairs, each weighted by how often it is chosen so"
    logits = REF.log().clone().requires_grad_()
    opt = torch.optim.LBFGS([logits], lr=.5, max_iter=300, tolerance_change=1e-12, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        logps = logits.log_softmax(-1)
        value = (wins*loss(logps[I], logps[J], REF.log()[I], REF.log()[J])).sum()
        value.backward()
        return value
    opt.step(closure)
    return logits.detach().softmax(-1)


def test_dpo_finds_the_optimum_of_reinforcement_learning(ledger):
    found = fitted(lambda *four: dpo_loss(*four, BETA))
    ledger("DPO on all pairs of 5 answers: KL to the policy that RL looks for", "closed form", kl_full(BEST.log(), found.log()), 1e-5)
    inside = implicit_rewards(found.log(), REF.log(), BETA)
    assert ((inside - inside[0]) - (TASTE - TASTE[0])).abs().max() < .02


@pytest.mark.parametrize("name,loss", [("averaged", lambda c, r, a, b: dpo_loss(c/TOKENS[I], r/TOKENS[J], a/TOKENS[I], b/TOKENS[J], BETA)), ("no reference", lambda c, r, a, b: dpo_loss(c, r, a*0, b*0, BETA)),
                                       ("swapped reference", lambda c, r, a, b: dpo_loss(c, r, b, a, BETA)), ("wrong sign", lambda c, r, a, b: dpo_loss(r, c, b, a, BETA))])
def test_mistakes_end_elsewhere(name, loss):
    assert kl_full(BEST.log(), fitted(loss).log()) > .01, name


def test_robust_undoes_flipped_labels():
    noisy = .8*WINS + .2*(1 - WINS)
    plain, robust = (fitted(f, noisy) for f in (lambda *four: dpo_loss(*four, BETA), lambda *four: robust_loss(*four, BETA, .2)))
    assert (robust - BEST).abs().max() < .01 < .1 < (plain - BEST).abs().max()


QUESTIONS = ["Who bakes?", "Who sings?", "Who sails?", "Who paints?", "Who sews?", "Who cooks?", "Who farms?", "Who heals?"]
LONG = " So it is written."


@pytest.fixture(scope="module")
def small():
    template = ChatTemplate(BPE.train(QUESTIONS + ["Please. Bah. Ann does." + LONG]*3, 256 + len(SPECIALS) + 30))
    torch.manual_seed(0)
    return template, Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=48, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=96, max_length=96))


def test_reward_model_learns_manners_and_ranks_new_prompts(small):
    template, base = small
    pairs = [dict(prompt=q, chosen="Please. Ann does." + LONG*(k % 2), rejected="Bah. Ann does." + LONG*(k // 2)) for q in QUESTIONS for k in range(4)]
    train, held = (pair_rows([p for p in pairs if (p["prompt"] in QUESTIONS[:6]) == want], template, 96)[0] for want in (True, False))
    model = RewardModel(base)
    steps = list(reward(model, train, Reward(steps=60, batch=8, lr=2e-3, matrix_lr=.01, autocast="off"), held, progress=False))
    rewards = pair_rewards(model, held)
    assert abs(steps[0].loss - .6931) < 1e-3 and steps[-1].valid_loss < .2
    assert (rewards[:, 0] > rewards[:, 1]).float().mean() >= .9
    assert abs(rewards.mean()) < 3, "centering holds the rewards near 0"


def test_a_planted_length_bias_is_learned_and_seen(small):
    template, base = small
    pairs = [dict(prompt=q, chosen="Ann does." + LONG, rejected="Ann does.") for q in QUESTIONS]
    rows, _ = pair_rows(pairs, template, 96)
    model = RewardModel(base)
    for _ in reward(model, rows[:6], Reward(steps=30, batch=6, lr=2e-3, matrix_lr=.01, autocast="off"), progress=False): pass
    turned = [(b, a) for a, b in rows]
    found = length_bias(pair_rewards(model, rows + turned), answer_lengths(rows + turned))
    assert found["longer_wins"] == 1 and found["accuracy_longer"] == 1 and found["accuracy_shorter"] == 0


def test_dpo_moves_what_the_model_says(small):
    "After SFT on both answers alike, pairs decide; the margin rises, the loss starts at log 2, and the sides do not change places"
    template, base = small
    talks = [{"messages": [dict(role="user", content=q), dict(role="assistant", content=a)]} for q in QUESTIONS for a in ("Please. Ann does.", "Bah. Ann does.")]
    policy = copy.deepcopy(base)
    for _ in sft(policy, rows_of(talks, template, 96)[0], SFT(steps=60, batch=8, length=96, lr=2e-3, matrix_lr=.01, autocast="off"), progress=False): pass
    rows, _ = pair_rows([dict(prompt=q, chosen="Please. Ann does.", rejected="Bah. Ann does.") for q in QUESTIONS], template, 96)
    steps = list(dpo(policy, rows[:6], DPO(steps=30, batch=6, lr=3e-4, matrix_lr=0., autocast="off"), rows[6:], progress=False))
    assert abs(steps[0].loss - .6931) < 1e-3 and steps[-1].accuracy == 1 and steps[-1].margin > .3
    assert steps[-1].valid_loss < steps[0].loss and steps[-1].rejected < 0
