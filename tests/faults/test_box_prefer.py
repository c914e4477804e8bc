"Bad input to the preference stages: what, where and mend; the reward functions that people write by accident; nothing lost"
import sys
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmbench.box import prefer, preferring, rewards
from llmbench.box.prefer import Answers, Drawing, check, do_prefer, read_json, train
from llmbench.box.preferring import read_figures
from llmbench.box.sft import Lora, Optim, last_checkpoint
from llmbench.cli import main
from llmbench.core import UserError

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_box import ASKS, LABELS, PAIRS, lines, make_jobs, make_model, said  # noqa: E402


@pytest.fixture(scope="module")
def jobs(tmp_path_factory): return make_jobs(tmp_path_factory.mktemp("prefer"))


def refused(job, *words, call=check):
    with pytest.raises(UserError) as caught: call(job)
    for word in words: assert word in str(caught.value), str(caught.value)
    return caught.value


@pytest.mark.parametrize("rows, words", [
    ([PAIRS[0] | dict(rejected=PAIRS[0]["chosen"])]*3, ["no pair can be compared", "both answers are the same", "pairs.jsonl line 1"]),
    ([PAIRS[0], PAIRS[1] | dict(chosen="  ")], ["an answer of zero length", "line 2"]),
    ([PAIRS[0], PAIRS[1] | dict(rejected="")], ["zero length", "line 2, field rejected"]),
    ([dict(chosen=[said("user", "A?"), said("assistant", "a")], rejected=[said("user", "B?"), said("assistant", "b")])], ["answer different prompts", "line 1"]),
    ([dict(prompt="x", chosen="y")], ["missing field", "rejected"]),
    ([PAIRS[0]]*4, ["1 prompt cannot be split"]),
    ([dict(prompt="Why? "*80, chosen="a", rejected="b")], ["no pair can be compared", "longer than 128 tokens"]),
    ([], ["pairs.jsonl"]),
], ids=["chosen = rejected", "empty chosen", "empty rejected", "two prompts", "no rejected", "one prompt", "too long", "empty file"])
@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_pairs(stage, rows, words, jobs, tmp_path):
    valid = .3 if "1 prompt cannot be split" in words else 0.
    refused(replace(jobs[stage], pairs=lines(tmp_path/"pairs.jsonl", rows), data=Answers(128, valid)), *words)


def test_equal_answers_among_others_are_counted(jobs, tmp_path):
    found = check(replace(jobs["dpo"], pairs=lines(tmp_path/"pairs.jsonl", [*PAIRS, PAIRS[3] | dict(rejected=PAIRS[3]["chosen"])]), data=Answers(128, 0.)))
    assert len(found["rows"]) == 40 and "1 skipped: both answers are the same" in str(found["account"]) and "line 41" in str(found["account"])


@pytest.mark.parametrize("rows, words", [
    ([{k: v for k, v in LABELS[0].items() if k != "label"}, LABELS[1]], ["no label", "line 1, field label", "true"]),
    ([LABELS[1]]*5, ["not both good and bad", "It takes both"]),
    ([dict(messages=[said("user", "x"), said("assistant", " ")], label=True)], ["zero length"]),
], ids=["no label", "one kind", "empty"])
def test_labels(rows, words, jobs, tmp_path): refused(replace(jobs["kto"], chat=lines(tmp_path/"labels.jsonl", rows)), *words)


@pytest.mark.parametrize("stage, change, words", [
    ("dpo", dict(pairs=()), ["--pairs"]), ("kto", dict(chat=()), ["--chat"]), ("grpo", dict(prompts=()), ["--prompts"]), ("grpo", dict(reward=()), ["--reward", "match:REGEX"]),
    ("dpo", dict(loss="ppo"), ["ppo", "sigmoid, ipo, hinge, robust"]), ("grpo", dict(loss="sigmoid"), ["dapo, grpo"]), ("dpo", dict(method="dora"), ["dora"]),
    ("kto", dict(optim=Optim(batch=4, micro=1)), ["--optim.micro", "At least 2"]), ("dpo", dict(optim=Optim(batch=9, micro=2)), ["9 rows"]),
    ("reward", dict(lora=Lora(adapter="x")), ["llmbench merge"]), ("dpo", dict(lora=Lora(adapter="no/adapter")), ["no/adapter"]),
    ("grpo", dict(draw=Drawing(1, 12)), ["--draw.group"]), ("grpo", dict(draw=Drawing(3, 12)), ["whole groups of 3"]), ("grpo", dict(draw=Drawing(4, 128)), ["--draw.new-tokens"]),
    ("grpo", dict(draw=Drawing(4, 12, 0.)), ["greedy"]), ("grpo", dict(draw=Drawing(4, 120)), ["no prompt fits", "more than 8 tokens"]),
    ("grpo", dict(reward=("helpful",)), ["helpful", "exact, number, ended, match, short"]), ("grpo", dict(reward=("match:[a",)), ["match:[a"]), ("grpo", dict(reward=("match",)), ["match:REGEX"]), ("grpo", dict(reward=("short:few",)), ["short:few"]),
    ("grpo", dict(reward=("no_such_module:f",)), ["no_such_module", "module:function"]), ("grpo", dict(reward=("json:lod",)), ["'lod'", "load"]), ("grpo", dict(reward=("no/file.py:f",)), ["no/file.py"]),
], ids=lambda x: str(x)[:40] if isinstance(x, (dict, str)) else "")
def test_options(stage, change, words, jobs): refused(replace(jobs[stage], **change), *words)


def test_a_rule_that_compares_wants_answers(jobs, tmp_path):
    bare = lines(tmp_path/"bare.jsonl", [*ASKS[:2], dict(prompt="How many?")])
    refused(replace(jobs["grpo"], prompts=bare, reward=("number",)), "no answer that number could compare with", "line 3", "--reward")
    assert len(check(replace(jobs["grpo"], prompts=bare, reward=("ended",), data=Answers(128, 0.)))["rows"]) == 3


def test_a_module_that_cannot_be_imported(jobs, tmp_path):
    (tmp_path/"broken.py").write_text("x = 1/0\n")
    refused(replace(jobs["grpo"], reward=(f"{tmp_path/'broken.py'}:f",)), "ZeroDivisionError", "Mend the module")


REWARDS = '''
import math
calls = 0
def marks(samples, bad=None, at=3):
    global calls
    calls += 1
    good = [len(s.ids)/12 + 0.001*i for i, s in enumerate(samples)]
    return bad(good) if bad and calls == at else good
def raises(samples):
    def burn(good): raise KeyError("the dog ate it")
    return marks(samples, burn)
def nan(samples): return marks(samples, lambda good: good[:2] + [math.nan] + good[3:])
def short(samples): return marks(samples, lambda good: good[:-1])
def text(samples): return marks(samples, lambda good: ["very good"]*len(good))
def none(samples): return marks(samples, lambda good: None)
def fine(samples): return marks(samples)
def constant(samples): return [.5]*len(samples)
'''


@pytest.mark.parametrize("name, words", [("raises", ["KeyError", "the dog ate it"]), ("nan", ["not a finite number", "sample 2"]), ("short", ["15 marks for 16 samples"]), ("text", ["'very good' is not a number"]), ("none", ["NoneType"])])
def test_reward_functions_that_break_late(name, words, jobs, tmp_path):
    "In step 3: two steps are kept, and once the function is mended the run goes on as if nothing had happened"
    (tmp_path/"mine.py").write_text(REWARDS)
    job = replace(jobs["grpo"], reward=(f"{tmp_path/'mine.py'}:{name}",), data=Answers(128, 0.), optim=replace(jobs["grpo"].optim, steps=4), folder=str(tmp_path), name=name)
    error = refused(job, *words, "All 2 steps so far are kept", "same command", call=do_prefer)
    stage = tmp_path/name/"grpo"
    assert "reward function" in error.where and last_checkpoint(stage).name == "checkpoint-2" and not (stage/"model").exists()
    (tmp_path/"mine.py").write_text(REWARDS.replace("if bad and calls == at", "if False"))
    assert do_prefer(job) == 0
    if name != "raises": return
    whole = replace(job, name="whole", reward=(f"{tmp_path/'mine.py'}:fine",))
    train(whole, check(whole), progress=False)
    one, two = read_figures(tmp_path/"whole"/"grpo"), read_figures(stage)
    assert [f["step"] for f in two] == [0, 1, 2, 3] and max(abs(a["reward"] - b["reward"]) for a, b in zip(one, two)) < 1e-6


def test_constant_rewards_are_said(jobs, tmp_path, capsys):
    (tmp_path/"mine.py").write_text(REWARDS)
    job = replace(jobs["grpo"], reward=(f"{tmp_path/'mine.py'}:constant",), optim=replace(jobs["grpo"].optim, steps=3), folder=str(tmp_path))
    assert do_prefer(job) == 0
    told = capsys.readouterr()
    assert "every advantage is zero and nothing is learned" in told.err and told.err.count("every advantage is zero") == 1
    assert "in 3 of 3 steps all answers to each prompt got the same mark" in told.out and read_json(tmp_path/"box"/"grpo"/"done.json")["facts"]["flat_steps"] == 3


def test_a_reward_model_of_another_tokenizer(jobs, tmp_path):
    make_model(tmp_path/"other", text="Another book has other words in it. ")
    job = replace(jobs["reward"], model=str(tmp_path/"other"), folder=str(tmp_path), optim=replace(jobs["reward"].optim, steps=1), data=Answers(128, 0.))
    assert do_prefer(job) == 0
    refused(replace(jobs["grpo"], reward=(str(tmp_path/"box"/"reward"/"model"),)), "another tokenizer", "llmbench reward --box")
    refused(replace(jobs["grpo"], reward=(jobs["grpo"].model,)), "no reward model")
    shutil.rmtree(tmp_path/"other")
    with pytest.raises(UserError): rewards.scorer_of(str(tmp_path/"box"/"reward"/"model"), check(jobs["dpo"])["template"])


def test_other_settings_and_skips(jobs, tmp_path, capsys):
    job = replace(jobs["dpo"], folder=str(tmp_path), optim=replace(jobs["dpo"].optim, steps=1), data=Answers(128, 0.))
    assert do_prefer(job) == 0 and do_prefer(job) == 0
    assert "unchanged, skipped" in capsys.readouterr().out
    refused(replace(job, beta=.2), "other settings (beta)", call=do_prefer)


def test_command_line(jobs, capsys, tmp_path):
    def wrong(*arguments):
        assert main([str(a) for a in arguments]) == 2
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out
        return told.err
    job = jobs["dpo"]
    assert "--pairs" in wrong("dpo", "--box", "--model", job.model, "--data.length", "128", "--launch.cpu") and "model" in wrong("grpo", "--box")
    assert "real models only" in wrong("kto") and "--box" in wrong("eval", "--box")
    assert main(["dpo", "--box", "--model", job.model, "--pairs", job.pairs[0], "--dry", "--launch.cpu", "--data.length", "128", "--folder", str(tmp_path), "--launch.processes", "2"]) == 0
    told = capsys.readouterr().out
    assert "dpo, lora tuning" in told and "llmbench.box.prefer" in told and "memory a process" in told and not list(tmp_path.iterdir())


def test_agreed_is_alone_without_processes():
    assert rewards.agreed(lambda: 7) == 7 and not torch.distributed.is_initialized()
    with pytest.raises(UserError, match="^here: wrong. Mend"): rewards.agreed(lambda: (_ for _ in ()).throw(UserError("wrong", "here", "Mend")))


def test_too_little_memory(jobs, monkeypatch):
    "The reference of full tuning is a second model, and is counted"
    from llmbench.box import check as checks
    need = checks.Need(10**9, 0, 0)
    monkeypatch.setattr(prefer, "check_model", lambda config: dict(template=None, need=need, free=int(1.5e9)))
    monkeypatch.setattr(prefer, "paired", lambda config, template: ([], [], None))
    refused(replace(jobs["dpo"], method="full"), "too little memory")
    assert check(jobs["dpo"])["need"].weights == 10**9 == check(replace(jobs["reward"], method="full"))["need"].weights


def test_log_without_a_tail(tmp_path):
    (tmp_path/"figures.jsonl").write_text(json.dumps(dict(step=0)) + "\n" + json.dumps(dict(step=1)) + "\n" + '{"step": 2, "mar')
    assert [r["step"] for r in read_figures(tmp_path)] == [0, 1] and [r["step"] for r in read_figures(tmp_path, 1)] == [0]
    assert preferring.Figures(tmp_path, 1, False).flat == 0 and (tmp_path/"figures.jsonl").read_text().count("\n") == 1
