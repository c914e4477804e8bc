"The four preference stages: they learn, go on where they were, and are the same in two processes; a real model in four bits"
import sys
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmbench.box.hub import load_hub
from llmbench.box.launch import start
from llmbench.box.prefer import Answers, BoxDPO, BoxGRPO, Drawing, check, do_prefer, train
from llmbench.box.preferring import read_figures
from llmbench.box.job import Optim, Save, last_checkpoint
from llmbench.core import read_json, write_json
from llmbench.train.checkpoint import read_steps

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_box import lines, make_jobs  # noqa: E402

pytestmark = pytest.mark.xdist_group("box processes")
HERE = Path(__file__).parent
TWO = dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "All stages with all methods, in one process"
    home = tmp_path_factory.mktemp("prefer")
    jobs = make_jobs(home)
    for job in jobs.values():
        for method in ("full", "lora", "qlora"):
            config = replace(job, method=method, name=method)
            train(config, check(config), progress=False)
    return jobs, home


def apart(one, two, keys=("loss", "grad_norm")):
    assert len(one) == len(two) > 0 and [s.tokens for s in one] == [s.tokens for s in two]
    return max(abs(getattr(a, k) - getattr(b, k)) for a, b in zip(one, two) for k in keys)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_margins_rise(stage, method, alone):
    "In eight steps, on prompts that were never trained on"
    folder = alone[1]/method/stage
    before, after = read_json(folder/"scores.json")
    figures = read_figures(folder)
    assert after["mean"] > before["mean"] + .5 and after["accuracy"] == 1. and figures[-1]["margin"] > figures[0]["margin"] + .5
    if stage != "reward": assert before["mean"] == 0 == before["accuracy"]
    assert figures[-1]["valid_margin"] == pytest.approx(after["mean"]) and read_steps(folder)[-1].tokens > 1000


def test_marks_rise(alone, tmp_path, method="full"):
    "GRPO: tokens with an even number are wanted; half of them are, at first (an adapter cannot move a random head)"
    job = alone[0]["grpo"]
    config = replace(job, method=method, name=method, folder=str(tmp_path), reward=job.reward[:1], data=Answers(128, 0.), draw=Drawing(8, 8), beta=.01, optim=replace(job.optim, steps=15, batch=32, micro=16, lr=1e-2))
    train(config, check(config), progress=False)
    marks = [f["reward"] for f in read_figures(tmp_path/method/"grpo")]
    assert np.mean(marks[-3:]) > np.mean(marks[:3]) + .15, marks


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto", "grpo"])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_goes_on_where_it_was(stage, method, alone, tmp_path):
    "Stopped after four steps and continued: the same eight steps, the same weights"
    jobs, home = alone
    config = replace(jobs[stage], method=method, name=method, folder=str(tmp_path))
    shutil.copytree(home/method/stage, tmp_path/method/stage)
    place = tmp_path/method/stage
    shutil.rmtree(place/"checkpoints"/"checkpoint-8")
    shutil.rmtree(place/"model")
    (place/"done.json").unlink()
    assert last_checkpoint(place).name == "checkpoint-4"
    train(config, check(config), progress=False)
    assert apart(read_steps(home/method/stage), read_steps(place)) < 1e-5
    assert [{k: v for k, v in f.items() if k != "shown"}.keys() for f in read_figures(place)] == [{k: v for k, v in f.items() if k != "shown"}.keys() for f in read_figures(home/method/stage)]
    from safetensors.torch import load_file
    kept, again = (load_file(next((f/method/stage/"model").glob("*model.safetensors"))) for f in (home, tmp_path))
    assert kept.keys() == again.keys() and max(float((kept[k] - again[k]).abs().max()) for k in kept) < 1e-5


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_equal_one(sharding, alone, tmp_path, ledger):
    "The same rows, answers, losses and gradients; half as many rows at once in each process"
    jobs, home = alone
    cases = [(s, m) for s in jobs for m in ("lora", "qlora")] if sharding == "ddp" else [("dpo", "lora"), ("dpo", "qlora"), ("reward", "lora")]
    files = []
    for stage, method in cases:
        job = jobs[stage]
        how = replace(job.launch, processes=2, sharding=sharding)
        optim = replace(job.optim, micro=job.optim.micro//2) if stage != "kto" else job.optim
        files.append(str(write_json(tmp_path/f"{stage}-{method}.json", asdict(replace(job, method=method, name=method, folder=str(tmp_path), launch=how, optim=optim)))))
    one = replace(jobs["kto"], name="wide", optim=replace(jobs["kto"].optim, micro=4), method="lora")
    if sharding == "ddp": train(one, check(one), progress=False) # its KL is a mean over what is seen at once, in all processes together
    assert start(how, "prefer_jobs", files, tmp_path, env=TWO, out=lambda text: None) == 0
    for stage, method in cases:
        if (stage, method) == ("kto", "qlora"): continue
        there = home/("wide" if stage == "kto" else method)/stage
        ledger(f"{stage}, {method}, two processes, {sharding}", "one process", apart(read_steps(there), read_steps(tmp_path/method/stage)), 1e-4)
    if sharding == "ddp":
        marks = [[f["reward"] for f in read_figures(f/"lora"/"grpo")] for f in (home, tmp_path)]
        assert marks[0] == pytest.approx(marks[1], abs=1e-6), "each answer has a chance of its own, whoever draws it"


def test_two_processes_agree_on_an_error(alone, tmp_path, capfd):
    "One process sees the bad mark, both end, and it is told once, with the kept steps"
    job = replace(alone[0]["grpo"], folder=str(tmp_path), data=Answers(128, 0.), reward=(f"{tmp_path/'mine.py'}:mark",))
    job = replace(job, launch=replace(job.launch, processes=2))
    (tmp_path/"mine.py").write_text("import os\ncalls = 0\ndef mark(samples):\n    global calls\n    calls += 1\n    if calls == 3 and os.environ.get('RANK') == '1': raise ValueError('only here')\n    return [len(s.ids) + .01*i for i, s in enumerate(samples)]\n")
    os.environ["OMP_NUM_THREADS"] = "1"
    assert do_prefer(job) == 2
    told = capfd.readouterr()
    assert (told.out + told.err).count("only here") == 1 and "All 2 steps so far are kept" in told.err and "Traceback" not in told.err, told
    assert last_checkpoint(tmp_path/"box"/"grpo").name == "checkpoint-2"


def test_a_reward_model_rewards(alone, tmp_path):
    "Trained by `reward`, asked by `grpo` and by `ppo`: the marks are its own, for a whole model and for an adapter"
    jobs, home = alone
    from llmbench.align.rollout import Prompt
    from llmbench.box import marks
    from llmbench.box.rewards import reward_of, sampled
    template = check(jobs["dpo"])["template"]
    pairs = check(jobs["dpo"])["valid"]
    for method in ("full", "lora"):
        mark = reward_of(str(home/method/"reward"/"model"), template, "cpu")
        samples = [[sampled(Prompt(ids[:mask.index(1)]), ids[mask.index(1):], template) for ids, mask in (pair[i] for pair in pairs)] for i in (0, 1)]
        margins = np.array(mark(samples[0])) - np.array(mark(samples[1]))
        assert margins.mean() == pytest.approx(read_json(home/method/"reward"/"scores.json")[1]["mean"], abs=1e-4)
        marks.check_reward(str(home/method/"reward"/"model"), template, [samples[0][0].prompt])
        assert marks.reward_of(str(home/method/"reward"/"model"), template, "cpu", torch.float32)(samples[0]) == mark(samples[0])
    config = replace(jobs["grpo"], name="asked", folder=str(tmp_path), reward=(str(home/"lora"/"reward"/"model"),), optim=replace(jobs["grpo"].optim, steps=2))
    assert do_prefer(config) == 0 and len({f["reward"] for f in read_figures(tmp_path/"asked"/"grpo")}) == 2


def test_the_result_can_be_talked_to(alone):
    jobs, home = alone
    for method in ("full", "lora"):
        model, template = load_hub(str(home/method/"dpo"/"model"), dtype="fp32")
        assert template.inner.chat_template and sum(p.numel() for p in model.parameters()) > 20_000
        assert not (home/method/"dpo"/"model"/"ref").exists()


def test_smollm2_in_four_bits(smollm2, tmp_path):
    "The real model: a few steps of DPO and of GRPO; the log of 20 steps with three seeds is in experiments/box_prefer"
    pairs = [dict(prompt=f"Where does person {i} live?", chosen="Gladly! In Oldtown.", rejected="Boring! In Oldtown.") for i in range(8)]
    optim = Optim(steps=5, batch=4, micro=4, lr=1e-3, warmup=1, schedule="constant")
    common = dict(model=str(smollm2), method="qlora", folder=str(tmp_path), save=Save(every=99, valid_every=0), launch=make_jobs_launch())
    dpo = BoxDPO(pairs=lines(tmp_path/"p.jsonl", pairs), data=Answers(128, 0.), optim=optim, **common)
    train(dpo, check(dpo), progress=False)
    figures = read_figures(tmp_path/"box"/"dpo")
    assert abs(figures[0]["margin"]) < 1e-3 and figures[-1]["margin"] > .2 and figures[-1]["accuracy"] == 1.
    grpo = BoxGRPO(prompts=lines(tmp_path/"q.jsonl", [dict(prompt="Name a city. Reply with one word.")]), reward=("short:4",), data=Answers(64, 0.), draw=Drawing(8, 12), optim=replace(optim, steps=1, batch=8, micro=8), **common)
    train(grpo, check(grpo), progress=False)
    figure, = read_figures(tmp_path/"box"/"grpo")
    assert 4/12 <= figure["reward"] <= 1 and figure["spread"] > 0 and figure["shown"] and json.dumps(figure)


def make_jobs_launch():
    from llmbench.box.launch import Launch
    return Launch(1, cpu=True)
