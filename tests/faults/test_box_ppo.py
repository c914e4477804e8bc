"Bad input to PPO on real models: what, where and mend, exit code 2, and nothing lost"
import json
import math

import pytest
import torch

from llmbench.align.rollout import Sampling
from llmbench.box import hub
from llmbench.box.launch import Launch
from llmbench.box.marks import check_lengths
from llmbench.box.ppo import check, do_ppo, train
from llmbench.box.sft import Lora
from llmbench.cli import main
from llmbench.core import UserError
from llmbench.train.checkpoint import latest


def lines(path, *rows):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in rows))
    return dict(prompts=(str(path),))


@pytest.mark.parametrize("change, words", [
    (dict(model=""), ["--model"]),
    (dict(model="./no/such"), ["./no/such", "no such folder"]),
    (dict(method="full"), ["full", "lora, qlora", "lose it"]),
    (dict(engine="sglang"), ["sglang", "torch, vllm"]),
    (dict(engine="vllm"), ["vLLM is not installed", "--engine vllm", "pip install vllm"]),
    (dict(micro=3), ["8 prompts a step", "in parts of 3", "multiple of 3"]),
    (dict(micro=0), ["in parts of 0"]),
    (dict(launch=Launch(processes=4, cpu=True)), ["4 processes", "multiple of 16"]),
    (dict(launch=Launch(processes=2, sharding="fsdp2", cpu=True)), ["fsdp2", "--method qlora"]),
    (dict(launch=Launch(slurm=True, cpu=True)), ["--launch.slurm", "torchrun"]),
    (dict(ppo=dict(sampling=Sampling(prompts=8, top_k=5))), ["top-k"]),
    (dict(ppo=dict(sampling=Sampling(prompts=8, group=2))), ["--ppo.sampling.group"]),
    (dict(lora=Lora(dropout=.1)), ["drop-out", "--lora.dropout"]),
    (dict(lora=Lora(adapter="x")), ["--lora.adapter", "--model x"]),
    (dict(lora=Lora(r=99)), ["rank 99", "--lora.r"]),
    (dict(lora=Lora(targets=("q_prj",))), ["Did you mean q_proj"]),
    (dict(prompts=()), ["--prompts"]),
    (dict(prompts=("no/such.jsonl",)), ["no/such.jsonl", "cannot be read"]),
    (dict(longest=3), ["all 16 have more than 3 tokens", "--longest"]),
    (dict(ppo=dict(sampling=Sampling(prompts=8, new_tokens=100))), ["do not fit", "128 positions", "--longest 28"]),
    (dict(ppo=dict(sampling=Sampling(prompts=8, new_tokens=500))), ["do not fit", "Lower --ppo.sampling.new-tokens"]),
    (dict(reward=""), ["--reward", "module:function"]),
    (dict(reward="nowhere_at_all:f"), ["No module named 'nowhere_at_all'", "cannot be imported", "--reward"]),
    (dict(reward="town_marks:vowel"), ["no function 'vowel'", "vowels"]),
    (dict(reward="town_marks:number"), ["no function 'number'"]),
    (dict(reward="tests"), ["16 of 16 prompts have no tests", "--reward tests"]),
    (dict(reward="judge"), ["unknown reward", "judge"]),
    (dict(reward="exact"), ["16 of 16 prompts have no answer that exact could compare with", "--reward exact"]),
    (dict(reward="short"), ["--reward short", "short:N"]),
], ids=lambda x: str(next(iter(x.items())))[:40] if isinstance(x, dict) else "")
def test_said_before_weights_are_loaded(change, words, ppo_job, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UserError) as caught: do_ppo(ppo_job(**change))
    for word in words: assert word in str(caught.value), str(caught.value)
    assert not (tmp_path/"box").exists(), "nothing was begun"


@pytest.mark.parametrize("rows, words", [
    (["{oops"], ["line 1", "no JSON"]),
    ([dict(prompt="Who?"), ["a", "list"]], ["line 2", "neither a prompt nor messages"]),
    ([dict(question="Who?")], ["line 1", "neither a prompt nor messages"]),
    ([dict(prompt="Who?"), "", dict(prompt="  ")], ["line 3", "empty prompt"]),
    ([dict(prompt="")], ["line 1", "empty prompt"]),
    ([dict(messages=[])], ["line 1", "empty prompt"]),
    ([dict(messages=[dict(role="assistant", content="Ann.")])], ["line 1", "empty prompt"]),
    ([dict(messages=[dict(role="user", content=3)])], ["line 1", "neither"]),
    ([""], ["no prompts there"]),
])
def test_prompts(rows, words, ppo_job, tmp_path):
    with pytest.raises(UserError) as caught: check(ppo_job(**lines(tmp_path/"p.jsonl", *rows)))
    for word in words: assert word in str(caught.value), str(caught.value)


def test_prompts_that_are_fine(ppo_job, tmp_path):
    "An answer behind the question is left out; what else the line holds reaches the reward; longer ones are counted"
    talk = [dict(role="user", content="Who?"), dict(role="assistant", content="Ann.")]
    found = check(ppo_job(**lines(tmp_path/"p.jsonl", dict(prompt="Who?", answer=42), dict(messages=talk), dict(prompt="Who lives in Oldtown? "*5)), longest=25))
    first, second = found["prompts"]
    assert first.ids == second.ids and first.task["answer"] == 42 and found["left"] == 1
    with pytest.raises(UserError, match="1 of 3 prompts"): check_lengths([first, second, type(first)(list(range(200)))], 8, 128)


@pytest.mark.parametrize("name, words", [
    ("breaks", ["ZeroDivisionError", "sample 0"]), ("nan", ["nan is not a finite number", "sample 2"]), ("short", ["1 marks for 4 samples"]), ("many", ["5 marks for 4 samples"]),
])
def test_reward_functions(name, words, ppo_job):
    config = ppo_job(reward=f"town_marks:{name}")
    with pytest.raises(UserError) as caught: train(config, check(config), progress=False)
    for word in words: assert word in str(caught.value), str(caught.value)


def test_reward_that_breaks_later_loses_nothing(ppo_job, tmp_path, monkeypatch):
    "Three steps are done, a checkpoint is due every hundred: the error saves, and the mended run goes on to the same end"
    monkeypatch.setenv("BREAKS_NOW", str(tmp_path/"now"))
    config = ppo_job(reward="town_marks:later", ppo=dict(save_every=100))
    whole = ppo_job(reward="town_marks:later", name="whole")
    train(whole, check(whole), progress=False)
    import llmbench.box.ppo as box
    after = box.note_answers
    def note(folder, step, roll):
        after(folder, step, roll)
        if step == 2: (tmp_path/"now").touch()
    monkeypatch.setattr(box, "note_answers", note)
    with pytest.raises(UserError, match="the judge has left"): train(config, check(config), progress=False)
    assert latest(tmp_path/"box"/"ppo").name == "step-0000003"
    (tmp_path/"now").unlink()
    monkeypatch.setattr(box, "note_answers", after)
    train(config, check(config), progress=False)
    def told(name): return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in (tmp_path/name/"ppo"/"steps.jsonl").read_text().splitlines()]
    assert told("box") == told("whole")
    assert (tmp_path/"box"/"ppo"/"answers.jsonl").read_text() == (tmp_path/"whole"/"ppo"/"answers.jsonl").read_text()


def test_equal_marks_change_nothing_and_say_so(ppo_job, tmp_path):
    from safetensors.torch import load_file
    config = ppo_job(reward="town_marks:same")
    train(config, check(config), progress=False)
    told = [json.loads(x) for x in (tmp_path/"box"/"ppo"/"steps.jsonl").read_text().splitlines()]
    assert all(r["updates"] == 0 and "every answer got the same mark (1.50)" in r["note"] and "zero advantage" in r["note"] for r in told)
    kept = load_file(latest(tmp_path/"box"/"ppo")/"model.safetensors")
    assert all(not x.any() for name, x in kept.items() if "lora_B" in name or "head" in name), "not one weight has moved"
    mixed = ppo_job(reward="town_marks:same", name="mixed", ppo=dict(missing_eos=1., steps=1))
    train(mixed, check(mixed), progress=False)
    told, = [json.loads(x) for x in (tmp_path/"mixed"/"ppo"/"steps.jsonl").read_text().splitlines()]
    assert 0 < told["ended"] < 1 and told["updates"] > 0, "a cut-off answer is marked lower, so there is something to learn"


def test_nan_guard(ppo_job, tmp_path, monkeypatch):
    "A gradient that is not finite changes no weight, and the message names the checkpoint to go back to"
    import llmbench.box.policy as policy
    config, calls = ppo_job(ppo=dict(save_every=1)), []
    right = policy.policy_loss
    def spoiled(*a):
        calls.append(1)
        return right(*a)*(math.nan if len(calls) == 10 else 1) # step 2: each step has 2 x 2 updates... in parts of 4 rows
    monkeypatch.setattr(policy, "policy_loss", spoiled)
    with pytest.raises(UserError) as caught: train(config, check(config), progress=False)
    assert "changed no weight" in str(caught.value) and "step-000000" in str(caught.value) and "Lower lr" in str(caught.value)
    from safetensors.torch import load_file
    assert all(torch.isfinite(x).all() for x in load_file(latest(tmp_path/"box"/"ppo")/"model.safetensors").values())


def test_other_settings_in_the_same_folder(ppo_job, capsys):
    assert do_ppo(ppo_job(ppo=dict(steps=1))) == 0
    with pytest.raises(UserError, match="another run: config.ppo.lr was 0.003, is 0.001"): do_ppo(ppo_job(ppo=dict(steps=1, lr=1e-3)))
    assert do_ppo(ppo_job(ppo=dict(steps=1))) == 0 and "unchanged, skipped" in capsys.readouterr().out


def test_reward_models(ppo_place, ppo_job, tmp_path):
    "Another tokenizer, two labels, a language model"
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    def judge(name, labels, template=None):
        config = AutoConfig.from_pretrained(ppo_place/"tiny")
        config.num_labels = labels
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path/name)
        if template: template.save(tmp_path/name)
        else: [(tmp_path/name/f).write_bytes((ppo_place/"tiny"/f).read_bytes()) for f in ("tokenizer.json", "tokenizer_config.json")]
        return str(tmp_path/name)
    other = ChatTemplate(BPE.train(["A quite different town, with other words in it. "]*3, 320))
    for reward, words in ((judge("other", 1, other), ["another tokenizer", "tokens differ", "such as"]), (judge("two", 2), ["2 labels", "one label is wanted"]), (str(ppo_place/"tiny"), ["no reward model", "LlamaForCausalLM"])):
        with pytest.raises(UserError) as caught: check(ppo_job(reward=reward))
        for word in words: assert word in str(caught.value), str(caught.value)
    check(ppo_job(reward=judge("right", 1)))


def test_too_little_memory(ppo_job, monkeypatch):
    import llmbench.box.ppo as box
    monkeypatch.setattr(box, "free_memory", lambda device: 1000)
    with pytest.raises(UserError) as caught: check(ppo_job())
    assert "too little memory" in str(caught.value) and "--micro" in str(caught.value) and "--optim" not in str(caught.value)


def test_command_line(ppo_place, tmp_path, capsys, ppo_job):
    def wrong(*arguments):
        try: code = main(["ppo", "--box", *map(str, arguments)])
        except SystemExit as e: code = e.code
        told = capsys.readouterr()
        assert code == 2 and "Traceback" not in told.err + told.out
        return told.err + told.out
    base = ["--model", ppo_place/"tiny", "--prompts", ppo_place/"prompts.jsonl", "--folder", tmp_path, "--launch.cpu"]
    assert "--reward" in wrong(*base)
    assert "2.0 is not a valid" in (told := wrong(*base, "--reward", "town_marks:vowels", "--ppo.lr", "-1")) or "PPO.lr" in told
    assert "ppo.stepz" in wrong(*base, "--ppo.stepz", "3")
