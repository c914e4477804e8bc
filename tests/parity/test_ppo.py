"PPO's arithmetic: by hand, against the O(T^2) definition, and against TRL 1.12's trainer on the same rollout"
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmbench.align.ppo import PPO, adapted, clipped_share, gae, policy_loss, token_rewards, value_loss, whiten
from llmbench.core import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def trl_112(tmp_path_factory):
    "TRL 1.12.0, the last with a PPO trainer, beside the installed one; skipped where no registry can be reached"
    place = ROOT/".cache"/"trl-1.12"
    if not (place/"trl"/"experimental"/"ppo").exists():
        part = tmp_path_factory.mktemp("pip")/"trl"
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(part), "trl==1.12.0"], capture_output=True, text=True)
        if done.returncode: pytest.skip(f"trl==1.12.0 cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        place.parent.mkdir(exist_ok=True)
        if not place.exists(): shutil.copytree(part, place.with_suffix(f".{os.getpid()}"))
        if not place.exists(): os.replace(place.with_suffix(f".{os.getpid()}"), place)
    return place


@pytest.fixture(scope="session")
def theirs(trl_112, tmp_path_factory):
    "What TRL's train() computed on given tensors: see trl_ppo.py"
    from safetensors.torch import load_file
    out = tmp_path_factory.mktemp("trl")/"out.safetensors"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(TRL_EXPERIMENTAL_SILENCE="1")
    done = subprocess.run([sys.executable, str(Path(__file__).parent/"trl_ppo.py"), str(trl_112), str(out)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def test_equals_trl(theirs, ledger):
    """TRL gives the value head one position more than the answer has tokens, and puts the mark there; on its masks every number is ours"""
    t = theirs
    answer, more = t["answer_mask"], t["vf_mask"]
    assert answer.sum(1).tolist() == t["lengths"].tolist() and more.sum(1).tolist() == [5, 6, 2, 6]
    old, ref, new = (t[f"{n}_logps"]*answer for n in ("old", "ref", "new"))
    scores = t["scores"] - torch.tensor([0., .7, 0., 0.])  # the second has no end token
    rewards = token_rewards(scores, old, ref, more, .05)
    advantages, returns = gae(rewards, t["values"], more, .98, .9)
    ledger("PPO rewards and GAE", "trl 1.12 PPOTrainer", (advantages - t["advantages"]).abs().max(), 1e-6)
    ledger("PPO whitening", "trl 1.12 PPOTrainer", (whiten(t["advantages"], answer) - t["white"]*answer).abs().max(), 1e-6)
    ledger("PPO policy loss", "trl 1.12 PPOTrainer", abs(policy_loss(new, old, t["white"], answer, .2) - t["pg"]), 1e-6)
    ledger("PPO value loss", "trl 1.12 PPOTrainer", abs(value_loss(t["new_values"], t["values"]*more, returns, more, .2)*2 - t["vf"]), 2e-6)
    assert abs(clipped_share(new, old, t["white"], answer, .2) - t["pg_clipped"]) < 1e-6


def naive(rewards, values, mask, gamma, lam):
    "The definition: a weighted sum of the temporal differences to come, each row by itself"
    out = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        at = mask[i].nonzero()[:, 0].tolist()
        for k, t in enumerate(at):
            for j in range(k, len(at)):
                later = values[i, at[j + 1]] if j + 1 < len(at) else 0.
                out[i, t] += (gamma*lam)**(j - k)*(rewards[i, at[j]] + gamma*later - values[i, at[j]])
    return out


@pytest.mark.parametrize("gamma,lam", [(1., .95), (.9, 1.), (.7, 0.), (.97, .5)])
def test_gae_against_the_definition(gamma, lam, ledger):
    g = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 5, 9, generator=g).double()
    mask = torch.tensor([[1]*9, [0]*3 + [1]*4 + [0]*2, [0]*8 + [1], [1]*2 + [0]*7, [0, 0] + [1]*7])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    right = naive(rewards, values, mask, gamma, lam)
    ledger(f"GAE, gamma {gamma}, lambda {lam}", "the O(T^2) definition", (advantages - right).abs().max(), 1e-9)
    assert torch.equal(advantages == 0, mask == 0), "padding has an advantage"
    assert torch.allclose(returns, right + values*mask)


def test_gae_ignores_what_stands_on_padding():
    rewards, values, mask = torch.tensor([[1., 2., 5.]]), torch.tensor([[.5, .25, 7.]]), torch.tensor([[1, 1, 0]])
    right = torch.tensor([[1 + .25 - .5 + .5*(2 - .25), 2 - .25, 0.]])
    for junk in (7., float("nan")):
        assert torch.allclose(gae(rewards, values.clone().index_fill_(1, torch.tensor([2]), junk), mask, 1., .5)[0], right)


def test_token_rewards_by_hand():
    logps, ref = torch.tensor([[0., -1., -2., 0.], [-.5, -.5, -3., -1.]]), torch.tensor([[0., -1.5, -1., 0.], [-.25, -1., -3., -2.]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    got = token_rewards(torch.tensor([10., -2.]), logps, ref, mask, .1)
    assert torch.allclose(got, torch.tensor([[0., -.05, 10.1, 0.], [.025, -.05, 0., -2.1]]))
    assert torch.allclose(got.sum(1), torch.tensor([10., -2.]) - .1*((logps - ref)*mask).sum(1)), "the sum is mark minus KL"


def test_whiten():
    x, mask = torch.tensor([[1., 5., 100.], [3., -100., 7.]]), torch.tensor([[1, 1, 0], [1, 0, 1]])
    kept = torch.tensor([1., 5., 3., 7.])
    right = (kept - 4)/kept.std()
    assert torch.allclose(whiten(x, mask)[mask > 0], right, atol=1e-6) and (whiten(x, mask)[mask == 0] == 0).all()
    assert torch.allclose(whiten(x, mask, shift=False)[mask > 0], right + 4, atol=1e-6)
    assert whiten(torch.tensor([[3., 9.]]), torch.tensor([[1, 0]])).tolist() == [[0., 0.]], "a single token"


@pytest.mark.parametrize("a,ratio,loss,slope", [(1., 1.5, -1.2, 0.), (1., .5, -.5, -.5), (-1., 1.5, 1.5, 1.5), (-1., .5, .8, 0.), (2., 1.1, -2.2, -2.2), (-3., .9, 2.7, 2.7)])
def test_policy_loss_in_each_quadrant(a, ratio, loss, slope):
    logps = torch.tensor([[ratio, 9.]]).log().requires_grad_()
    got = policy_loss(logps, torch.zeros(1, 2), torch.tensor([[a, 5.]]), torch.tensor([[1, 0]]), .2)
    got.backward()
    assert abs(got.item() - loss) < 1e-6 and torch.allclose(logps.grad, torch.tensor([[slope, 0.]]), atol=1e-6)


def test_value_loss_by_hand():
    "Old 1, return 3: moving to 1.1 counts fully; to 2 is held at 1.2 (the larger error); to -1 counts unheld"
    old, returns, mask = torch.tensor([[1., 1., 1., 0.]]), torch.tensor([[3., 3., 3., 0.]]), torch.tensor([[1, 1, 1, 0]])
    values = torch.tensor([[1.1, 2., -1., 50.]])
    assert abs(value_loss(values, old, returns, mask, .2) - (1.9**2 + 1.8**2 + 4**2)/6) < 1e-6


def test_adaptive_penalty():
    assert adapted(.2, 6., 6., 100, 1000) == pytest.approx(.2)
    assert adapted(.2, 60., 6., 100, 1000) == pytest.approx(.2*1.02)
    assert adapted(.2, 0., 6., 100, 1000) == pytest.approx(.2*.98)
    assert adapted(.2, 6.3, 6., 100, 1000) == pytest.approx(.2*1.005)


@pytest.mark.parametrize("change,what", [(dict(lam=1.5), "above 1"), (dict(clip=0.), "PPO.clip"), (dict(kl_coef=-1.), "PPO.kl_coef"), (dict(lr=float("nan")), "PPO.lr")])
def test_configuration(change, what):
    with pytest.raises(UserError, match=what): PPO(**change)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_model_of_transformers_learns_the_same(name, tmp_path, ledger):
    "Three steps of the whole algorithm on our Transformer and on transformers' Llama with the same weights"
    from transformers import AutoModelForCausalLM
    from llmbench.align.grpo import GRPO, grpo
    from llmbench.align.ppo import ppo
    from llmbench.align.rollout import Prompt, Sampling
    from llmbench.model.transformer import Config, Transformer

    class Tokens:
        end_id, pad_id = 2, 0
        def decode(self, ids): return " ".join(map(str, ids))
    torch.manual_seed(1)
    ours = Transformer(Config(vocab_size=31, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48, max_length=20))
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    run, config = (ppo, PPO(steps=3, sampling=Sampling(prompts=8, new_tokens=8), minibatch=4, warmup=0)) if name == "ppo" else (grpo, GRPO(steps=3, sampling=Sampling(prompts=2, group=4, new_tokens=8), beta=.1, epochs=2, warmup=0))
    prompts = [Prompt([1, 5 + i, *range(9, 9 + i)]) for i in range(4)]
    def marks(samples): return [sum(i % 7 for i in s.ids)/20 for s in samples]
    a, b = (list(run(m, prompts, marks, Tokens(), config, progress=False)) for m in (ours, theirs))
    assert [r.reward for r in a] == pytest.approx([r.reward for r in b], abs=1e-6) and a[-1].kl != 0
    ledger(f"three steps of {name}: entropy, KL, gradient", "the same on transformers' Llama", max(abs(getattr(x, n) - getattr(y, n)) for x, y in zip(a, b) for n in ("entropy", "kl", "grad_norm")), 1e-3)
    assert torch.allclose(ours.embed.weight, theirs.get_input_embeddings().weight, atol=1e-4)
