"Rewards that fail, runs that are stopped, gradients that are not numbers: what the message says, and what is left"
import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch

from llmbench.align.grpo import GRPO, grpo
from llmbench.align.loop import METRICS, RLStep, run_steps, take_step
from llmbench.align.ppo import PPO, PolicyAndValue, ppo
from llmbench.align.rollout import Prompt, Sample, Sampling, rewards_of, rollout
from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.train.checkpoint import latest

warnings.filterwarnings("ignore", message=".*got the same mark.*")


class Tokens:
    "Ids as text"
    end_id, pad_id = 2, 0
    def decode(self, ids): return " ".join(map(str, ids))


PROMPTS = [Prompt([1, 5 + i], i) for i in range(6)]


def model():
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=17, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=12))


def marks(samples): return [float(sum(s.ids) % 5) + .1*len(s.ids) for s in samples]


HOW = dict(steps=6, lr=1e-3, save_every=2, warmup=2)
CONFIGS = dict(ppo=PPO(sampling=Sampling(prompts=8, new_tokens=6), minibatch=4, kl_target=1., **HOW), grpo=GRPO(sampling=Sampling(prompts=2, group=4, new_tokens=6), epochs=2, minibatch=4, beta=.1, **HOW),
               once=GRPO(sampling=Sampling(prompts=2, group=4, new_tokens=6), **HOW), rloo=GRPO(sampling=Sampling(prompts=2, group=4, new_tokens=6), loss="rloo", beta=.1, **HOW))


def run(name, m, reward=marks, folder=None, **other):
    return (ppo if name == "ppo" else grpo)(m, PROMPTS, reward, Tokens(), replace(CONFIGS[name], **other), folder=folder, progress=False)


def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


SAMPLES = [Sample(Prompt([1]), [3], text, True) for text in ("one", "two", "three")]


@pytest.mark.parametrize("reward,what", [
    (lambda ss: [1., 2.], "2 marks for 3 samples"), (lambda ss: [1., 2., 3., 4.], "4 marks for 3"), (lambda ss: [1., float("nan"), 0.], r"sample 1 \('two'\): mark nan"), (lambda ss: [1., 0., float("inf")], r"sample 2 \('three'\)"),
    (lambda ss: [1., None, 0.], r"sample 1 \('two'\): mark None is not a number"), (lambda ss: [1., "2", 0.], "mark '2' is not a number"), (lambda ss: 3., "it returned float"), (lambda ss: None, "it returned NoneType"),
    (lambda ss: [int(s.text) for s in ss], r"sample 0 \('one'\): it raised ValueError"), (lambda ss: [dict(one=1, three=3)[s.text] for s in ss], r"sample 1 \('two'\): it raised KeyError"),
    (lambda ss: [1/(3 - len(ss))]*3, "all 3 samples together: it raised ZeroDivisionError")])
def test_a_reward_that_fails_says_where(reward, what):
    with pytest.raises(UserError, match=what) as caught: rewards_of(reward, SAMPLES)
    assert caught.value.mend


def test_rewards_of_many_kinds():
    for value in ([1, 2, 3], (1., 2., 3.), torch.tensor([1., 2., 3.]), torch.tensor([1., 2., 3.]).numpy(), [True, 2, torch.tensor(3.)]):
        assert rewards_of(lambda ss, value=value: value, SAMPLES).tolist() == [1., 2., 3.]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_failing_reward_loses_nothing(name, tmp_path):
    "It fails at step 3; with the function mended the same call ends where an undisturbed run ends, to the last bit"
    straight, broken, mended = model(), model(), model()
    whole = list(run(name, straight, save_every=100))
    calls = []
    def fails(samples):
        calls.append(1)
        if len(calls) == 4: raise RuntimeError("the rater has gone home")
        return marks(samples)
    with pytest.raises(UserError, match="gone home"): list(run(name, broken, fails, tmp_path, save_every=100))
    assert latest(tmp_path).name == "step-0000003"
    rest = list(run(name, mended, marks, tmp_path, save_every=100))
    assert [r.step for r in rest] == [3, 4, 5] and torch.equal(weights(straight), weights(mended))
    for a, b in zip(whole[3:], rest): assert replace(a, seconds=0) == replace(b, seconds=0)
    log = [RLStep(**json.loads(line)) for line in (tmp_path/"steps.jsonl").read_text().splitlines()]
    assert [r.step for r in log] == list(range(6))


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_stopped_anywhere_goes_on(name, tmp_path):
    straight, stopped = model(), model()
    whole = list(run(name, straight))
    for record in run(name, stopped, folder=tmp_path):
        if record.step == 2: break
    fresh = model()
    rest = list(run(name, fresh, folder=tmp_path))
    assert [r.step for r in rest] == [3, 4, 5] and torch.equal(weights(fresh), weights(straight))
    assert rest[-1].kl == whole[-1].kl and rest[-1].kl_coef == whole[-1].kl_coef
    assert list(run(name, model(), folder=tmp_path)) == []
    with pytest.raises(UserError, match="this folder holds another run: config.lr was 0.001, is 0.002"): list(run(name, model(), folder=tmp_path, lr=2e-3))


def test_a_gradient_that_is_no_number_changes_nothing(tmp_path):
    "Marks of 1e38, unscaled, at step 2: the update is refused, and the checkpoint of step 2 is whole"
    m, straight, calls = model(), model(), []
    list(run("once", straight, scale=False, steps=2))
    def huge(samples):
        calls.append(1)
        return [3e38*x for x in marks(samples)] if len(calls) == 3 else marks(samples)
    huge_marks = lambda ss: [min(x, 3e38) for x in huge(ss)]  # noqa: E731
    with pytest.raises(UserError, match="step 2, update 1: the loss is .*changed no weight.*step-0000002"): list(run("once", m, huge_marks, tmp_path, scale=False))
    assert torch.equal(weights(m), weights(straight)) and latest(tmp_path).name == "step-0000002"


def test_a_policy_of_nan_is_refused(tmp_path):
    m = model()
    with torch.no_grad(): m.embed.weight[3] = float("nan")
    for name in ("ppo", "grpo"):
        with pytest.raises(UserError, match="logits are NaN"): list(run(name, copy.deepcopy(m)))


def test_take_step_refuses_infinity():
    layer = torch.nn.Linear(2, 1)
    sgd = torch.optim.SGD(layer.parameters(), .1)
    before = weights(layer).clone()
    for loss in (layer(torch.ones(2)).sum()*float("nan"), layer(torch.tensor([float("inf"), 1.])).sum()):
        with pytest.raises(UserError, match="step 3: the loss is .* changed no weight.*Lower lr"): take_step(loss, sgd, where="step 3")
        assert torch.equal(weights(layer), before)


@pytest.mark.parametrize("name", ["grpo", "once", "rloo"])
def test_constant_rewards_are_said(name):
    m = model()
    before = weights(m).clone()
    with pytest.warns(UserWarning, match="got the same mark"): records = list(run(name, m, lambda ss: [.5]*len(ss), steps=3, **({} if name == "once" else dict(beta=0.))))
    assert all(r.flat == 1 and "every advantage is 0" in r.note for r in records)
    assert torch.equal(weights(m), before), "nothing to learn, and yet something moved"


def test_prompts_that_do_not_fit():
    m = model()
    for prompts, what in (([Prompt([])], "an empty prompt"), ([Prompt([1]), Prompt([1]*9)], "prompt 1: 9 prompt tokens and 6 new ones exceed the model's 12 positions")):
        with pytest.raises(UserError, match=what): rollout(m, prompts, marks, Tokens(), Sampling(new_tokens=6))
    for algorithm, config in ((ppo, PPO()), (grpo, GRPO())):
        with pytest.raises(UserError, match="no prompts"): next(iter(algorithm(m, [], marks, Tokens(), config)))


def test_every_number_is_explained():
    records = [list(run(name, model(), steps=1))[0] for name in ("ppo", "grpo")]
    for record in records:
        assert set(vars(record)) == set(METRICS) and all(METRICS.values())
    assert records[0].value_loss is not None and records[1].flat is not None


def test_early_stop_on_drift():
    def learned(stop): return list(run("ppo", model(), lr=.05, epochs=6, stop_kl=stop, warmup=0, steps=1))[0]
    free, held = learned(0.), learned(.01)
    assert free.updates == 12 and held.updates < 12 and held.drift > .01


def test_the_penalty_adapts_and_is_saved(tmp_path):
    records = list(run("ppo", model(), folder=tmp_path))
    assert records[0].kl_coef == .05 and records[0].kl == pytest.approx(0., abs=1e-5)
    assert records[1].kl_coef == pytest.approx(.05*(1 - .2*8/1000))
    assert json.loads((latest(tmp_path)/"state.json").read_text())["notes"]["kl_coef"] != .05


def test_the_value_head_starts_at_zero_and_is_saved():
    trained = PolicyAndValue(model())
    assert trained.head(torch.randn(3, 16)).tolist() == [[0.]]*3
    assert {n.split(".")[0] for n, _ in trained.named_parameters()} == {"policy", "head"}


def test_a_frozen_reference_stays():
    m = model()
    ref = copy.deepcopy(m)
    kept = weights(ref).clone()
    for r in (ppo(m, PROMPTS, marks, Tokens(), CONFIGS["ppo"], ref=ref, progress=False), grpo(m, PROMPTS, marks, Tokens(), CONFIGS["grpo"], ref=ref, progress=False)): list(r)
    assert torch.equal(weights(ref), kept) and not torch.equal(weights(m), kept)


def test_warm_up():
    layer, rates = torch.nn.Linear(1, 1), []
    sgd = torch.optim.SGD(layer.parameters(), .4)
    def one(step):
        rates.append(sgd.param_groups[0]["lr"])
        return dict(reward=0.)
    list(run_steps(layer, sgd, one, 5, None, 10, {}, progress=False, warmup=3))
    assert rates == pytest.approx([.1, .2, .3, .4, .4])
