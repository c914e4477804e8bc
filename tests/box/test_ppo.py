"PPO through the command: two processes equal one, stopped and continued, the log, the early stop, tests as reward, vLLM's part by a stand-in"
import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from llmbench.align.rollout import Sample, Sampling
from llmbench.box.launch import Launch, start
from llmbench.box.marks import code_of, unit_tests
from llmbench.box.policy import VLLM, chance, rectangle, shared_base
from llmbench.box.ppo import check, do_ppo, plan, train
from llmbench.cli import main
from llmbench.core import UserError, read_json, write_json
from llmbench.train.checkpoint import latest

pytestmark = pytest.mark.xdist_group("box processes")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def records(folder, name="box"): return [json.loads(x) for x in (folder/name/"ppo"/"steps.jsonl").read_text().splitlines()]
def same(records): return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def environment(*places): return dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, (*places, ROOT))))


def test_two_processes_equal_one(ppo_job, ppo_place, tmp_path, ledger):
    """Updates of five of eight answers do not halve evenly, answers differ in length, the penalty adapts, weights of 32 and of 4 bits.
    The third job fails in the part of one process only (house 3): both say so at once, and neither waits for the other"""
    change = dict(minibatch=5, kl_target=.5, horizon=50, entropy_coef=.01)
    jobs = [ppo_job(name=method, method=method, ppo=change) for method in ("lora", "qlora")] + [ppo_job(name="fails", reward="town_marks:second")]
    two = [replace(job, folder=str(tmp_path/"two"), launch=Launch(processes=2, cpu=True, timeout=60)) for job in jobs]
    files = [str(write_json(tmp_path/f"{job.name}.json", asdict(job))) for job in two]
    for job in jobs[:2]: train(job, check(job), progress=False)
    assert start(two[0].launch, "ppo_jobs", files, tmp_path/"start", out=lambda text: None, env=environment(HERE, ppo_place)) == 0
    for method in ("lora", "qlora"):
        one, both = records(tmp_path, method), records(tmp_path/"two", method)
        assert [r["note"] for r in one] == [r["note"] for r in both] and len(one) == 4, "the same answers"
        assert all(r["updates"] == 4 for r in one) and 0 < sum(r["ended"] for r in one) < 4 and abs(one[-1]["kl"]) > 1e-2
        worst = max(abs(a[k] - b[k]) for a, b in zip(one, both) for k in ("loss", "value_loss", "grad_norm", "kl", "reward", "entropy", "drift", "explained", "kl_coef"))
        ledger(f"box.ppo ({method}), two processes", "one process", worst, 1e-4)
        assert (tmp_path/"two"/method/"ppo"/"answers.jsonl").read_text().count("\n") == 4*8, "one process writes"
    said = [Path(f"{files[2]}.{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "house 3 is haunted" in said[0]


def test_ctrl_c_in_two_processes_and_on_in_one(ppo_job, ppo_place, tmp_path):
    "Asked to stop, two processes finish their step together and save it; one process goes on to the same end"
    change = dict(steps=60, save_every=100)
    config = ppo_job(ppo=change, launch=Launch(processes=2, cpu=True))
    job, log = write_json(tmp_path/"job.json", asdict(config)), tmp_path/"box"/"ppo"/"steps.jsonl"
    program = f"import sys; from llmbench.box.ppo import BoxPPO, do_ppo; from llmbench.box.sft import restored; from llmbench.core import read_json; sys.exit(do_ppo(restored(BoxPPO, read_json({str(job)!r}))))"
    parent = subprocess.Popen([sys.executable, "-c", program], env=os.environ | environment(ppo_place), cwd=ppo_place, stderr=subprocess.PIPE, text=True)
    began = time.time()
    while not (log.exists() and log.read_text().count("\n") > 1) and time.time() - began < 120: time.sleep(.05)
    parent.send_signal(signal.SIGINT)
    said = parent.communicate(timeout=60)[1]
    done = len(records(tmp_path))
    assert "stopping after this step" in said and "KeyboardInterrupt" in said and 2 <= done < 60 and latest(tmp_path/"box"/"ppo").name == f"step-{done:07}"
    more = ppo_job(ppo=dict(steps=done + 2, save_every=100))
    assert do_ppo(more) == 0
    whole = replace(more, name="whole")
    train(whole, check(whole), progress=False)
    ours, right = records(tmp_path), records(tmp_path, "whole")
    assert len(ours) == done + 2 and [r["note"] for r in ours] == [r["note"] for r in right]
    assert max(abs(a[k] - b[k]) for a, b in zip(ours, right) for k in ("loss", "value_loss", "kl", "reward")) < 1e-4


def test_interrupted_and_continued_is_exact(ppo_job, tmp_path, monkeypatch):
    "Ctrl-C in the middle of the second step: it is finished and saved, and the third begins as if nothing had been"
    import llmbench.box.ppo as box
    whole = ppo_job(name="whole", ppo=dict(kl_target=.5, horizon=50))
    train(whole, check(whole), progress=False)
    right = box.note_answers
    def pressed(folder, step, roll):
        if step == 1: signal.raise_signal(signal.SIGINT)
        right(folder, step, roll)
    monkeypatch.setattr(box, "note_answers", pressed)
    config = ppo_job(ppo=dict(kl_target=.5, horizon=50, save_every=100))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1"): train(config, check(config), progress=False)
    assert latest(tmp_path/"box"/"ppo").name == "step-0000002" and len(records(tmp_path)) == 2
    assert sum(p.stat().st_size for p in latest(tmp_path/"box"/"ppo").iterdir()) < 200_000, "adapter, head and their moments, not the base"
    monkeypatch.setattr(box, "note_answers", right)
    assert do_ppo(config) == 0
    assert same(records(tmp_path)) == same(records(tmp_path, "whole"))


def test_early_stop_and_log(ppo_job, tmp_path):
    "Steps that are too long end at stop_kl; a note says it when not even one update was left"
    config = ppo_job(ppo=dict(stop_kl=1e-3, epochs=4, lr=3e-2, warmup=0))
    train(config, check(config), progress=False)
    told = records(tmp_path)
    assert all(1 <= r["updates"] < 8 and r["drift"] > 1e-3 for r in told)
    answers = [json.loads(x) for x in (tmp_path/"box"/"ppo"/"answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4*8
    for r in told:
        mine = [a for a in answers if a["step"] == r["step"]]
        assert abs(sum(a["mark"] for a in mine)/8 - r["reward"]) < 1e-6 and abs(sum(a["kl"] for a in mine)/8 - r["kl"]) < 1e-5


def test_it_learns(ppo_job, tmp_path):
    "Thirty steps for brevity: the marks rise by more than three standard errors"
    config = ppo_job(micro=8, reward="town_marks:brief", ppo=dict(sampling=Sampling(prompts=16, new_tokens=8), steps=30, lr=1e-2, minibatch=8, save_every=50))
    train(config, check(config), progress=False)
    marks = [[json.loads(x)["mark"] for x in (tmp_path/"box"/"ppo"/"answers.jsonl").read_text().splitlines()][i:j] for i, j in ((0, 80), (-80, None))]
    first, last = map(torch.tensor, marks)
    error = (first.var()/len(first) + last.var()/len(last))**.5
    assert last.mean() - first.mean() > 3*error, (first.mean(), last.mean(), error)


def test_unit_tests_as_reward():
    from llmbench.align.rollout import Prompt
    prompt = Prompt([1], dict(prompt="Double it", tests="assert f(3) == 6"))
    fenced = "Sure:\n```python\ndef f(x):\n    return 2*x\n```\nThat is it."
    assert code_of(fenced) == "def f(x):\n    return 2*x\n" and code_of("def f(x): return 2*x") == "def f(x): return 2*x" and code_of("```\nx = 1") == "x = 1"
    assert unit_tests([Sample(prompt, [1], text, True) for text in (fenced, "def f(x): return x*x", "Sorry.")]) == [1., 0., 0.]


def test_dry_plan_and_help(ppo_job, ppo_place, tmp_path, capsys):
    config = ppo_job(dry=True, method="qlora", launch=Launch(processes=2, cpu=True))
    assert do_ppo(config) == 0 and not (tmp_path/"box").exists()
    told = capsys.readouterr().out
    for word in ("16 prompts of", "4 steps of 8 answers", "2 processes, CPU", "and 4 bits", "memory a process", "torchrun", "nats per answer between policy and reference", "squared error of the value head"): assert word in told, told
    with pytest.raises(SystemExit) as left: main(["ppo", "--box", "--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0
    for word in ("--ppo.kl-target", "nats per answer to aim at", "--reward", "--ppo.sampling.new-tokens", "--launch.processes", "value head"): assert word in told, word
    assert plan(ppo_job(), check(ppo_job())).count("\n") > 15


def test_command_runs_and_can_be_lengthened(ppo_job, ppo_place, tmp_path, capsys):
    "The whole command; asked for more steps, it goes on"
    base = ["ppo", "--box", "--model", str(ppo_place/"tiny"), "--prompts", str(ppo_place/"prompts.jsonl"), "--reward", "town_marks:vowels", "--folder", str(tmp_path), "--launch.cpu", "--ppo.sampling.prompts", "8", "--ppo.sampling.new-tokens", "8", "--ppo.steps"]
    ppo_job()  # for the path
    assert main([*base, "1"]) == 0 and "talk to it: llmbench chat" in capsys.readouterr().out
    assert main([*base, "2"]) == 0 and "Going on from there" in capsys.readouterr().out
    assert [r["step"] for r in records(tmp_path)] == [0, 1] and read_json(tmp_path/"box"/"ppo"/"done.json")["steps"] == 2


def test_vllm_is_told_what_it_needs(monkeypatch, ppo_place, tmp_path):
    "vLLM itself is not here: a stand-in with its names takes down what it is given, so this proves our side only"
    seen = {}
    class LLM:
        def __init__(self, **how): seen.update(made=how)
        def generate(self, prompts, how, lora_request, use_tqdm):
            seen.update(prompts=prompts, how=how, adapter=lora_request, files=sorted(os.listdir(lora_request[2])))
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=x)]) for x in ([5, 6, 2], [7, 8, 9, 4])]
    module, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, lambda **how: how, lambda *a: a
    for name, m in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)): monkeypatch.setitem(sys.modules, name, m)
    from llmbench.box.hub import locate
    from llmbench.box.sft import Lora
    place = locate(str(ppo_place/"tiny"))
    policy = shared_base(place, Lora(r=4), torch.float32)
    draw = VLLM(place, 4, torch.float32, four=True, world=2)
    draw.update(policy)
    ids, mask, ended = draw(policy, [[11, 12], [13]], Sampling(new_tokens=4, temperature=.8), 2, 0, chance(0, 5, 1))
    assert seen["made"]["enable_lora"] and seen["made"]["quantization"] == "bitsandbytes" and seen["made"]["distributed_executor_backend"] == "external_launcher" and seen["made"]["dtype"] == "float32"
    assert seen["how"]["temperature"] == .8 and seen["how"]["max_tokens"] == 4 and seen["how"]["stop_token_ids"] == [2]
    assert seen["adapter"][:2] == ("policy", 1) and "adapter_model.safetensors" in seen["files"]
    assert ids.tolist() == [[11, 12, 5, 6, 2], [13, 7, 8, 9, 4]] and mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]] and ended.tolist() == [True, False]
    draw.update(policy)
    assert draw.version == 2
    late = rectangle([[1], [1, 3]], [[4, 2, 9, 9], [5, 6]], 2, 0)
    assert late[0].tolist() == [[1, 4, 2, 0], [1, 3, 5, 6]] and late[1].tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]] and late[2].tolist() == [True, False]


def test_an_engine_without_vllm():
    from llmbench.box.policy import need_vllm
    with pytest.raises(UserError, match="vLLM is not installed"): need_vllm()
