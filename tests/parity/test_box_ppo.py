"PPO on a shared base: its steps equal `align.ppo` on our own model, its log-probabilities those of models loaded one by one, and four bits survive an evaluation"
import copy
import os

import pytest
import torch

from llmbench.align.loop import prompts_at
from llmbench.align.ppo import PolicyAndValue, credit, learn, ppo
from llmbench.align.rollout import Sampling
from llmbench.box.hub import FourBit, load_base, locate
from llmbench.box.marks import imported, read_prompts, reward_of
from llmbench.box.policy import Reference, as_reference, chance, joined, learn_together, roll_parts, share_of_update, shared_base
from llmbench.box.ppo import check, train
from llmbench.box.sft import Lora
from llmbench.core import read_json
from llmbench.model.transformer import Transformer
from llmbench.tune.lora import add_lora, load_lora, save_lora

SAYS = ("reward", "kl", "entropy", "length", "loss", "grad_norm", "clipped", "drift", "value_loss", "explained", "kl_coef")


def records(folder):
    import json
    return [json.loads(line) for line in (folder/"steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapted(ppo_place, tmp_path_factory):
    "An adapter that already says something: neither matrix is 0"
    model = Transformer.from_pretrained(ppo_place/"tiny")
    add_lora(model, r=4, alpha=8., generator=torch.Generator().manual_seed(1))
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad): torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(i))
    return save_lora(model, tmp_path_factory.mktemp("adapter"), base=str(ppo_place/"tiny"))


def test_steps_equal_our_own(adapted, ppo_place, ppo_job, tmp_path, ledger):
    "The same weights, chance and prompts: PEFT's model in micro-batches against our Transformer in one piece, for four steps of two updates, with an adaptive penalty, an entropy bonus and cut-off answers"
    config = ppo_job(model=str(adapted), micro=8, ppo=dict(minibatch=0, missing_eos=.3, entropy_coef=.01, kl_target=.5, horizon=50, vf_coef=.5))
    found = check(config)
    train(config, found, progress=False)
    theirs = records(tmp_path/"box"/"ppo")
    model = Transformer.from_pretrained(ppo_place/"tiny")
    load_lora(model, adapted, trainable=True)
    ref = copy.deepcopy(model).requires_grad_(False)
    ours = [vars(r) for r in ppo(model, found["prompts"], imported("town_marks:vowels"), found["template"].tokenizer, config.ppo, ref, progress=False)]
    assert [r["note"] for r in ours] == [r["note"] for r in theirs], "the same answers"
    assert all(r["updates"] == 2 and r["drift"] > 0 for r in theirs) and len({r["kl_coef"] for r in theirs}) == 4 and any(r["ended"] < 1 for r in theirs)
    assert ours[-1]["kl"] > .01, "by then policy and reference must differ"
    ledger("box.ppo: losses, gradient length and every other number of four steps", "align.ppo on our model", max(abs(a[k] - b[k]) for a, b in zip(ours, theirs) for k in SAYS), 1e-5)


def rolled(model, found, config, parts=4):
    return joined([r for _, r in roll_parts(model, prompts_at(found["prompts"], 8, 0), imported("town_marks:vowels"), found["template"].tokenizer, config.ppo, 0, parts)], found["template"].tokenizer.pad_id)


def test_updates_equal_our_own(ppo_job, ledger):
    "Updates of five and three answers, two passes, three rows at once: what `align.ppo.learn` says, and the weights that it leaves"
    from accelerate import Accelerator
    config, told, weights = ppo_job(ppo=dict(minibatch=5, entropy_coef=.02, missing_eos=.4)), [], []
    found = check(config)
    for box in (True, False):
        model = PolicyAndValue(shared_base(found["place"], config.lora, torch.float32, seed=3))
        roll, optimizer = rolled(model, found, config), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        assert len(set(roll.counts.sum(1).tolist())) > 2 and 0 < roll.ended.sum() < 8
        told.append(learn_together(model, optimizer, roll, config.ppo, .05, 0, 3, Accelerator(cpu=True)) if box else learn(model, optimizer, roll, config.ppo, .05, chance(config.ppo.seed, 0, -1)))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert told[0]["updates"] == 4
    ledger("box.ppo: four uneven updates in micro-batches", "align.ppo.learn", max(abs(told[0][k] - told[1][k]) for k in told[1]), 1e-5)
    assert (weights[0] - weights[1]).abs().max() < 1e-4, "Adam divides by small numbers"


def test_parts_do_not_know_their_process(ppo_job):
    config = ppo_job()
    found = check(config)
    model = PolicyAndValue(shared_base(found["place"], config.lora, torch.float32, seed=3))
    def parts(rank, world): return roll_parts(model, prompts_at(found["prompts"], 8, 0), imported("town_marks:vowels"), found["template"].tokenizer, config.ppo, 3, 2, rank, world)
    alone, dealt = dict(parts(0, 1)), dict(parts(0, 3) + parts(1, 3) + parts(2, 3))
    assert alone.keys() == dealt.keys() == {0, 1, 2, 3}
    assert all(torch.equal(alone[i].ids, dealt[i].ids) for i in alone)
    firsts = [s.ids[0] for i in alone for s in alone[i].samples]
    assert len(set(firsts[::2])) > 1, "parts draw with chances of their own"


def test_micro_batches_change_nothing(ppo_job, tmp_path):
    "Parts of two rows against parts of four would draw other answers, so one rollout is learned from twice"
    from accelerate import Accelerator
    config = ppo_job(ppo=dict(minibatch=5, epochs=2))
    found, results = check(config), []
    for micro in (8, 3, 1):
        model = PolicyAndValue(shared_base(found["place"], config.lora, torch.float32, seed=3))
        roll = rolled(model, found, config)
        assert len(set(roll.counts.sum(1).tolist())) > 2, "answers of several lengths, or a mean of means would pass"
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        results.append(learn_together(model, optimizer, roll, config.ppo, .05, 0, micro, Accelerator(cpu=True)) | dict(weight=float(sum(p.double().abs().sum() for p in model.parameters() if p.requires_grad))))
    for other in results[1:]:
        for name, x in results[0].items(): assert abs(x - other[name]) < 1e-5*max(1, abs(x)), name


@pytest.mark.parametrize("four", [None, FourBit()], ids=["32 bits", "4 bits"])
def test_three_models_on_one_base(four, adapted, ppo_place, ledger):
    "Policy, reference and base, each against a model that was loaded for itself"
    from peft import PeftModel
    place = locate(str(adapted))
    alone = PeftModel.from_pretrained(load_base(locate(place.base), torch.float32, four), str(adapted)).eval()
    shared = shared_base(place, Lora(), torch.float32, four)
    ids = torch.randint(5, 250, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): before = alone(input_ids=ids).logits
    with torch.no_grad():
        for name, p in shared.named_parameters():
            if "lora_B.policy" in name: p.add_(.1)
    with torch.no_grad(): now, ref = shared(input_ids=ids).logits, Reference(shared)(input_ids=ids).logits
    assert (now - before).abs().max() > .05, "the policy has moved"
    ledger(f"box.ppo: reference on the shared base, {'NF4' if four else 'fp32'}", "the adapter loaded alone", (ref - before).abs().max(), 1e-5)
    with torch.no_grad(): again = shared(input_ids=ids).logits
    assert torch.equal(now, again), "a look at the reference leaves the policy as it was"
    trained = {n for n, p in shared.named_parameters() if p.requires_grad}
    assert trained and all(".policy." in n for n in trained), "after a look at the reference the policy is still what is trained"
    plain = shared_base(locate(place.base), Lora(r=4, targets=("q_proj",)), torch.float32, four, seed=5)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name: p.add_(.3)
        with as_reference(plain): got = plain(input_ids=ids).logits
        right = load_base(locate(place.base), torch.float32, four).eval()(input_ids=ids).logits
    assert (got - right).abs().max() < 1e-5


def test_rollout_equals_recomputed(adapted, ppo_job, ledger):
    "Sampled with a cache, in left-padded parts; scored again row by row without padding"
    config = ppo_job(model=str(adapted), ppo=dict(sampling=Sampling(prompts=8, new_tokens=8, temperature=.7)))
    found = check(config)
    model = PolicyAndValue(shared_base(found["place"], config.lora, torch.float32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.policy" in name: p.mul_(-2)
        torch.nn.init.normal_(model.head.out.weight)
    roll = rolled(model, found, config)
    worst = 0.
    for i, sample in enumerate(roll.samples):
        row, n = torch.tensor([sample.prompt.ids + sample.ids]), len(sample.ids)
        with torch.no_grad():
            out = model.policy(input_ids=row, output_hidden_states=True)
            theirs = (Reference(model.policy)(input_ids=row).logits/.7).log_softmax(-1)
        mine, at = (out.logits/.7).log_softmax(-1), roll.counts[i] > 0
        assert int(at.sum()) == n
        for got, right in ((roll.old_logps, mine), (roll.ref_logps, theirs)):
            worst = max(worst, float((got[i][at] - right[0, :-1].gather(-1, row[0, 1:, None])[-n:, 0]).abs().max()))
        worst = max(worst, float((roll.old_values[i][at] - model.head(out.hidden_states[-1][0, :-1])[-n:, 0]).abs().max()))
    assert (roll.old_logps - roll.ref_logps).abs().max() > .1
    ledger("box.ppo: policy and reference log-probabilities, values", "recomputed row by row", worst, 1e-5)


@pytest.mark.skipif("avx512_bf16" not in (open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""), reason="the fault lives on CPUs with AVX512-BF16")
def test_four_bits_survive_a_rollout(ppo_job, ledger):
    "A rollout is an evaluation; without the cure it would spoil the gradients of the update after it"
    import bitsandbytes as bnb
    config = ppo_job(method="qlora")
    found = check(config)
    def made():
        model = PolicyAndValue(shared_base(found["place"], config.lora, torch.bfloat16, FourBit(), seed=3))
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name: torch.nn.init.normal_(p, std=.1, generator=torch.Generator().manual_seed(i))
        return model
    def gradient(model, roll):
        share_of_update(model, roll, credit(roll, config.ppo, .05), list(range(8)), int(roll.counts.sum()), config.ppo, 8)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    roll = rolled(made(), found, config)
    right, model = gradient(made(), roll), made()
    rolled(model, found, config)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)
    ledger("box.ppo: NF4 gradients after a rollout", "without one", (gradient(model, roll) - right).norm()/right.norm(), 1e-6)


def test_reward_model_equals_transformers(ppo_place, tmp_path, ledger):
    "Marks of unequal answers in one batch, against transformers' own forward on each row alone, with the padding id that both have"
    from transformers import AutoConfig, AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(ppo_place/"tiny")
    config.num_labels = 1
    torch.manual_seed(4)
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    judge.save_pretrained(tmp_path/"judge")
    for name in ("tokenizer.json", "tokenizer_config.json"): (tmp_path/"judge"/name).write_bytes((ppo_place/"tiny"/name).read_bytes())
    from llmbench.align.rollout import Sample
    from llmbench.box.hub import load_template
    template = load_template(locate(str(ppo_place/"tiny")))
    end = template.tokenizer.end_id
    prompts, _ = read_prompts((str(ppo_place/"prompts.jsonl"),), template)
    samples = [Sample(p, template.tokenizer.encode("Ann does. "*n) + [end], "", True) for p, n in zip(prompts, (3, 1, 2, 5))]
    got = reward_of(str(tmp_path/"judge"), template, "cpu", torch.float32)(samples)
    def alone(padding):
        judge.config.pad_token_id = padding
        with torch.no_grad(): return [float(judge(input_ids=torch.tensor([s.prompt.ids + s.ids])).logits) for s in samples]
    right, early = alone(template.tokenizer.pad_id), alone(end)
    assert max(right) - min(right) > 1e-3 and min(abs(a - b) for a, b in zip(right, early)) > 1e-4, "the place matters"
    ledger("box.ppo: marks of a reward model", "transformers, row by row", max(abs(a - b) for a, b in zip(got, right)), 1e-5)


def test_saved_policy_is_the_trained_one(ppo_job, tmp_path):
    "What `llmbench chat` loads says what the policy said at the end"
    from safetensors.torch import load_file

    from llmbench.box.hub import load_hub
    config = ppo_job()
    train(config, found := check(config), progress=False)
    folder = tmp_path/"box"/"ppo"
    model, _ = load_hub(str(folder/"model"))
    last = load_file(folder/"step-0000004"/"model.safetensors")
    mine = shared_base(found["place"], config.lora, torch.float32, seed=9)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if p.requires_grad: p.copy_(last["policy/" + name.replace(".", "/")])
    ids = torch.tensor([found["prompts"][0].ids])
    with torch.no_grad(): assert (model(ids) - mine(input_ids=ids).logits).abs().max() < 1e-5
    assert torch.equal(load_file(folder/"model"/"value_head.safetensors")["out.weight"], last["head/out/weight"])
    assert read_json(folder/"model"/"adapter_config.json")["base_model_name_or_path"] == str(config.model)
