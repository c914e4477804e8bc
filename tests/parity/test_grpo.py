"Group advantages and the losses of the GRPO family: by hand, and against TRL's GRPOTrainer and RLOOTrainer on the same batch, gradients too"
import copy
import math

import pytest
import torch

from llmbench.align.grpo import GRPO, NORMALISE, averaged, best_of, best_of_kl, flat_groups, group_advantages, grpo_credit, grpo_loss, rloo_advantages, rloo_loss
from llmbench.align.rollout import Prompt, Rollout, Sampling, read_answers, rollout
from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer

LENGTHS = [5, 1, 7, 3, 4, 6, 2, 7]  # answers; the prompts have 2 to 5 tokens


class Tokens:
    "Ids as text"
    end_id, pad_id = 2, 0
    def decode(self, ids): return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A small model in both libraries, and eight answers in both layouts"
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    torch.manual_seed(3)
    model = Transformer(Config(vocab_size=320, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48))
    folder = tmp_path_factory.mktemp("grpo")
    model.save_pretrained(folder)
    ChatTemplate(BPE.train(["Who lives in Oldtown? Ann does. She bakes bread. "]*3, 320)).save(folder)
    g = torch.Generator().manual_seed(5)
    prompts = [torch.randint(7, 320, (n,), generator=g).tolist() for n in (3, 3, 2, 2, 5, 5, 4, 4)]
    answers = [torch.randint(7, 320, (n,), generator=g).tolist() for n in LENGTHS]
    ids, mask = torch.zeros(8, 12, dtype=torch.long), torch.zeros(8, 12, dtype=torch.long)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        ids[i, :len(p) + len(a)] = torch.tensor(p + a)
        mask[i, len(p):len(p) + len(a)] = 1
    left = dict(prompt_ids=torch.zeros(8, 5, dtype=torch.long), prompt_mask=torch.zeros(8, 5, dtype=torch.long),
                completion_ids=torch.zeros(8, 7, dtype=torch.long), completion_mask=torch.zeros(8, 7, dtype=torch.long))
    for i, (p, a) in enumerate(zip(prompts, answers)):
        left["prompt_ids"][i, 5 - len(p):], left["prompt_mask"][i, 5 - len(p):] = torch.tensor(p), 1
        left["completion_ids"][i, :len(a)], left["completion_mask"][i, :len(a)] = torch.tensor(a), 1
    def hf(): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(): logps = read_answers(model, ids, mask, Sampling()).logps
    noise, noise2 = torch.randn(2, 8, 11, generator=g)*.3
    old, ref = ((logps + n)*mask[:, 1:] for n in (noise, noise2))
    return dict(model=model, hf=hf, folder=folder, ids=ids, mask=mask, left=left, old=old, ref=ref, logps=logps, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
                rewards=torch.tensor([1., .2, .5, .5, 0., 3., -1., 0.4]))


def window(x, world):
    "Our (N,T-1) as TRL's (N,A)"
    return torch.stack([torch.cat([row[m > 0], torch.zeros(7 - int(m.sum()))]) for row, m in zip(x, world["mask"][:, 1:])])


def trainer_of(world, kind, **how):
    from datasets import Dataset
    import trl
    config = getattr(trl, f"{kind}Config")(output_dir=str(world["folder"]/"out"), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8, num_generations=2, max_completion_length=9, **how)
    trainer = getattr(trl, f"{kind}Trainer")(world["hf"](), lambda completions, **kw: [0.]*len(completions), config, Dataset.from_list([dict(prompt="Who")]*8), processing_class=world["tokenizer"])
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradient(model): return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("beta,corrected", [(0., True), (.3, True), (.3, False)])
def test_equals_trl(normalise, beta, corrected, world, ledger):
    "GRPOTrainer._compute_loss on the same answers, old and reference log-probabilities; loss and gradient"
    advantages = group_advantages(world["rewards"], 2)
    how = dict(max_steps=1) | (dict(beta=beta, use_bias_correction_kl=corrected) if beta else {})
    if beta:  # a reference model is made from a saved folder
        trainer = trainer_of_folder(world, normalise, **how)
    else: trainer = trainer_of(world, "GRPO", loss_type=normalise, epsilon=.2, epsilon_high=.27, **how)
    trainer.model.train()
    inputs = world["left"] | dict(advantages=advantages, old_per_token_logps=window(world["old"], world), ref_per_token_logps=window(world["ref"], world), num_items_in_batch=world["mask"].sum()*1.)
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    ours_model = world["hf"]()
    read = read_answers(ours_model, world["ids"], world["mask"], Sampling())
    ours = grpo_loss(read.logps, world["old"], advantages, world["mask"][:, 1:], .2, .27, normalise, world["ref"], beta, corrected, longest=9)
    ours.backward()
    name = f"GRPO loss, {normalise}" + ("" if not beta else ", KL " + ("with ratio" if corrected else "plain"))
    ledger(name, "trl GRPOTrainer", abs(float(theirs - ours)), 1e-6)
    ledger(name + ", gradient", "trl GRPOTrainer", (gradient(trainer.model) - gradient(ours_model)).abs().max(), 1e-6)
    assert gradient(ours_model).abs().max() > 1e-3


def trainer_of_folder(world, normalise, **how):
    "With beta TRL wants a folder, for the reference"
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    config = GRPOConfig(output_dir=str(world["folder"]/"out"), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8, num_generations=2, max_completion_length=9, loss_type=normalise,
                        epsilon=.2, epsilon_high=.27, model_init_kwargs=dict(dtype=torch.float32), **how)
    trainer = GRPOTrainer(str(world["folder"]), lambda completions, **kw: [0.]*len(completions), config, Dataset.from_list([dict(prompt="Who")]*8), processing_class=world["tokenizer"])
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def test_our_model_and_theirs_agree(world):
    "The same loss and gradient norm from our Transformer"
    losses, norms = [], []
    for model in (copy.deepcopy(world["model"]), world["hf"]()):
        read = read_answers(model, world["ids"], world["mask"], Sampling())
        loss = grpo_loss(read.logps, world["old"], group_advantages(world["rewards"], 2), world["mask"][:, 1:], ref_logps=world["ref"], beta=.2)
        loss.backward()
        losses.append(float(loss))
        norms.append(float(gradient(model).norm()))
    assert abs(losses[0] - losses[1]) < 1e-5 and abs(norms[0] - norms[1]) < 1e-4


def test_rloo_equals_trl(world, ledger):
    advantages = rloo_advantages(world["rewards"], 4)
    trainer = trainer_of(world, "RLOO", beta=0., max_steps=1)
    trainer.model.train()
    inputs = world["left"] | dict(advantages=advantages, old_logps=world["old"].sum(1))
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    model = world["hf"]()
    ours = rloo_loss(read_answers(model, world["ids"], world["mask"], Sampling()).logps, world["old"], advantages, world["mask"][:, 1:], .2)
    ours.backward()
    ledger("RLOO loss", "trl RLOOTrainer", abs(float(theirs - ours)), 1e-6)
    ledger("RLOO loss, gradient", "trl RLOOTrainer", (gradient(trainer.model) - gradient(model)).abs().max(), 1e-6)


@pytest.mark.parametrize("rewards,group,right", [
    ([1., 0., 0.], 3, [2/3, -1/3, -1/3]),
    ([3., 1., -2., 4.], 2, [1., -1., -3., 3.]),
    ([.5]*4, 4, [0.]*4),
])
def test_advantages_by_hand(rewards, group, right):
    right, rewards = torch.tensor(right), torch.tensor(rewards)
    spread = rewards.view(-1, group).std(1).repeat_interleave(group)
    assert torch.allclose(group_advantages(rewards, group, scale=False), right, atol=1e-6)
    assert torch.allclose(group_advantages(rewards, group), right/(spread + 1e-4), atol=1e-5)
    siblings = torch.stack([r - (rewards.view(-1, group)[i//group].sum() - r)/(group - 1) for i, r in enumerate(rewards)])
    assert torch.allclose(rloo_advantages(rewards, group), siblings, atol=1e-6)


def test_groups_must_come_out_even():
    for rewards, group in ((torch.ones(5), 2), (torch.ones(4), 1)):
        with pytest.raises(ValueError, match="whole groups"): group_advantages(rewards, group)


def test_best_of_and_its_kl():
    "The bound is the KL of drawing the best of n among distinct rewards, by enumeration"
    assert best_of(torch.tensor([3., 9., 1., 7., 7., 0.]), 3).tolist() == [1, 3]
    for n in (2, 5):
        S = 4000
        ranks = (torch.arange(S + 1, dtype=torch.double)/S)**n
        p = ranks.diff()
        kl = (p*(p*S).log()).sum()
        assert abs(kl - best_of_kl(n)) < 1e-3, "a continuous reward: exact"
    assert best_of_kl(1) == 0


def test_flat_groups():
    assert flat_groups(torch.tensor([1., 1., 0., 1., 0., 0.]), 2) == pytest.approx(2/3)


def test_normalisations_by_hand():
    "Two rows, lengths 1 and 3; per-token losses 6, and 1, 2, 3"
    x, mask = torch.tensor([[6., 50., 50.], [1., 2., 3.]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    right = dict(grpo=(6 + 2)/2, bnpo=12/4, dr_grpo=12/(2*5), dapo=12/10)
    for name, value in right.items(): assert averaged(x, mask, name, longest=5, total=10) == pytest.approx(value), name
    assert averaged(x, mask, "dapo") == pytest.approx(3)
    with pytest.raises(ValueError, match="known: grpo, bnpo"): averaged(x, mask, "mean")
    with pytest.raises(ValueError, match="longest"): averaged(x, mask, "dr_grpo")


def test_padding_never_counts():
    logps, old = torch.tensor([[-1., -2., float("inf")]]), torch.tensor([[-1.5, -2., float("nan")]])
    mask, a = torch.tensor([[1, 1, 0]]), torch.tensor([2.])
    for loss in (grpo_loss(logps, old, a, mask, ref_logps=old, beta=.1), rloo_loss(logps, old, a, mask)): assert math.isfinite(loss)


def test_rloo_puts_the_kl_into_the_reward():
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    roll = Rollout(torch.zeros(2, 3, dtype=torch.long), mask, torch.tensor([True, False]), torch.tensor([1., 3.]), torch.tensor([[-1., -1.], [-2., 0.]]), torch.tensor([[-1.5, -2.], [-1., 0.]]), None, None, [])
    config = GRPO(sampling=Sampling(group=2), loss="rloo", beta=.1, missing_eos=.5)
    first, second = 1 - .1*1.5, 3 - .5 - .1*-1.
    assert torch.allclose(grpo_credit(roll, config), torch.tensor([first - second, second - first]), atol=1e-6)


def test_dapo_does_not_depend_on_the_cut(world):
    "The gradient of two mini-batches, each over its share of all tokens, adds up to that of the whole"
    advantages, counts = group_advantages(world["rewards"], 2), world["mask"][:, 1:]
    def grad(parts):
        model = copy.deepcopy(world["model"])
        for index in parts:
            logps = read_answers(model, world["ids"][index], world["mask"][index], Sampling()).logps
            grpo_loss(logps, world["old"][index], advantages[index], counts[index], total=float(counts.sum())).backward()
        return gradient(model)
    assert torch.allclose(grad([list(range(8))]), grad([[0, 1, 2], [3, 4, 5, 6, 7]]), atol=1e-6)


@pytest.mark.parametrize("change,what", [(dict(loss="ppo"), "unknown loss"), (dict(sampling=Sampling(group=1)), "group of one"), (dict(lr=-1.), "GRPO.lr")])
def test_configuration(change, what):
    with pytest.raises(UserError, match=what): GRPO(**change)


def test_old_log_probabilities_may_be_left_out():
    "One update a rollout: the gradient is the same with and without the old log-probabilities"
    from llmbench.align.grpo import grpo_learn
    torch.manual_seed(0)
    base = Transformer(Config(vocab_size=40, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))
    weights = []
    for old in (True, False):
        model = copy.deepcopy(base)
        how = Sampling(prompts=2, group=4, new_tokens=6)
        roll = rollout(model, [Prompt([1, 5]), Prompt([1, 6, 7])], lambda ss: [float(sum(s.ids)) for s in ss], Tokens(), how, generator=torch.Generator().manual_seed(1), old=old)
        assert (roll.old_logps is None) == (not old)
        grpo_learn(model, torch.optim.SGD(model.parameters(), 1e-2), roll, GRPO(sampling=how), torch.Generator())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6) and not torch.allclose(weights[0], torch.cat([p.flatten() for p in base.parameters()]))
