"Two processes, two machines, a killed process: the losses of one process, sharded weights, and something to go on from"
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from llmbench.box.launch import Launch, free_port, start
from llmbench.box.sft import Optim, Save, check, last_checkpoint, train
from llmbench.core import UserError, read_json, write_json

pytestmark = pytest.mark.xdist_group("box processes")
HERE, COMMAND = Path(__file__).parent, str(Path(sys.executable).parent/"llmbench")
TWO = dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent.parent)]))


def steps(folder): return [json.loads(line) for line in (folder/"sft"/"steps.jsonl").read_text().splitlines()]


def apart(one, two):
    "The largest difference of loss, held-out loss and gradient length"
    assert len(one) == len(two) and [s["tokens"] for s in one] == [s["tokens"] for s in two]
    assert [s["valid_loss"] is None for s in one] == [s["valid_loss"] is None for s in two]
    return max(abs((a[k] or 0) - (b[k] or 0)) for a, b in zip(one, two) for k in ("loss", "valid_loss", "grad_norm"))


@pytest.fixture(scope="module")
def alone(tiny, chat, tmp_path_factory):
    "One process, three methods"
    from llmbench.box.sft import BoxSFT, Rows
    folder = tmp_path_factory.mktemp("alone")
    base = BoxSFT(str(tiny), (str(chat),), folder=str(folder), data=Rows(length=128, valid=.1), optim=Optim(steps=6, batch=8, micro=2, lr=1e-2, warmup=2), save=Save(every=3, valid_every=3), launch=Launch(1, cpu=True))
    for method in ("full", "lora", "qlora"):
        config = replace(base, method=method, name=method)
        train(config, check(config), progress=False)
    config = replace(base, method="full", name="at once", optim=replace(base.optim, batch=4, micro=4))
    train(config, check(config), progress=False)
    return base, folder


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_equal_one(sharding, alone, tmp_path, ledger):
    base, folder = alone
    how = replace(base.launch, processes=2, sharding=sharding)
    methods = dict(full="full", lora="lora", qlora="qlora", accumulated="full", means="full") | (dict(uint8="qlora") if sharding == "fsdp2" else {})
    bit_by_bit = replace(base.optim, batch=4, micro=1)
    files = [str(write_json(tmp_path/f"{name}.json", asdict(replace(base, method=method, name=name, folder=str(tmp_path), launch=how, optim=bit_by_bit if name in ("accumulated", "means") else base.optim)))) for name, method in methods.items()]
    said = []
    assert start(how, "jobs", files, tmp_path, out=said.append, env=TWO) == 0
    for method in ("full", "lora", "qlora"):
        one, two = steps(folder/method), steps(tmp_path/method)
        assert one[0]["loss"] - one[-1]["loss"] > .1
        ledger(f"{method}, two processes, {sharding}", "one process", apart(one, two), 1e-4)
        assert last_checkpoint(tmp_path/method/"sft").name == "checkpoint-6"
    at_once = steps(folder/"at once")
    ledger(f"2 processes x 2 accumulated x 1 row, {sharding}", "1 process x 4 rows at once, tokens counted over all", apart(at_once, steps(tmp_path/"accumulated")), 1e-4)
    wrong = max(abs(a["loss"] - b["loss"]) for a, b in zip(at_once, steps(tmp_path/"means")))
    assert wrong > 1e-3, f"rows of unlike lengths: a mean of means must be another loss, or this test shows nothing ({wrong})"
    if sharding == "fsdp2":
        seen = read_json(tmp_path/"seen.json")
        assert seen["qlora"][:2] == [14, 14], "7 linear layers in each of 2 blocks, every one of them sharded"
        assert all(seen[m][2] == seen[m][3] > 0 for m in ("full", "lora", "qlora"))
        assert "14 4-bit weights are not sharded" in seen["uint8"], "uint8 storage stays whole, and must be found out"


@pytest.mark.parametrize("sharding, method", [("ddp", "lora"), ("fsdp2", "qlora")])
def test_accelerate_launch(sharding, method, alone, tmp_path, ledger):
    "The other launcher, with the file that we write: two ranks, and torchrun's losses"
    base, folder = alone
    how = replace(base.launch, processes=2, sharding=sharding, accelerate=True, port=free_port())
    file = write_json(tmp_path/"job.json", asdict(replace(base, method=method, name=method, folder=str(tmp_path), launch=how)))
    assert start(how, "jobs", [str(file)], tmp_path, out=lambda words: None, env=TWO) == 0
    logs = next((tmp_path/"logs").iterdir())
    assert len(list(logs.glob("*/attempt_0/*/stderr.log"))) == 2 and (tmp_path/"command.txt").read_text().startswith("accelerate launch --config_file")
    ledger(f"accelerate launch, 2 processes, {sharding}", "one process", apart(steps(folder/method), steps(tmp_path/method)), 1e-4)
    if sharding == "fsdp2": assert read_json(tmp_path/"seen.json")["qlora"][:2] == [14, 14]


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_goes_on_where_it_was(method, alone, tmp_path):
    "Stopped after three steps and continued: the same six steps"
    base, folder = alone
    config = replace(base, method=method, name=method, folder=str(tmp_path))
    train(config, check(config), progress=False)
    import shutil
    stage = tmp_path/method/"sft"
    shutil.rmtree(stage/"checkpoints"/"checkpoint-6")
    (stage/"done.json").unlink()
    train(config, check(config), progress=False)
    assert apart(steps(folder/method), steps(tmp_path/method)) < 1e-6
    from safetensors.torch import load_file
    kept, again = (load_file(next((f/method/"sft"/"model").glob("*model.safetensors"))) for f in (folder, tmp_path))
    assert kept.keys() == again.keys() and max(float((kept[k] - again[k]).abs().max()) for k in kept) < 1e-6


def options(base, name, folder, **more):
    o = dict(model=base.model, chat=base.chat[0], name=name, folder=folder, method="lora") | {"data.length": 128, "data.valid": .1, "optim.batch": 8, "optim.micro": 2, "optim.lr": .01, "optim.warmup": 2} | more
    return [COMMAND, "sft", "--box", "--launch.cpu", *(str(x) for k, v in o.items() for x in (f"--{k.replace('_', '-')}", v))]


def test_two_machines(alone, tmp_path):
    "Two launchers that find each other at an address, on this machine"
    base, folder = alone
    port = free_port()
    both = [subprocess.Popen(options(base, "lora", tmp_path, **{"optim.steps": 6, "save.every": 3, "save.valid-every": 3, "launch.processes": 1, "launch.nodes": 2, "launch.node": i, "launch.port": port}),
                             env=os.environ | TWO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in (0, 1)]
    told = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], told
    assert f"--nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port {port}" in told[1]
    assert apart(steps(folder/"lora"), steps(tmp_path/"lora")) < 1e-4


def test_killed_process(alone, tmp_path):
    "kill -9 of one rank: a clear message, a checkpoint, no orphans; one process finishes what two began"
    base, _ = alone
    long = {"optim.steps": 150, "save.every": 5, "save.valid-every": 0}
    job = subprocess.Popen(options(base, "killed", tmp_path, **long, **{"launch.processes": 2}), env=os.environ | TWO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stage, until = tmp_path/"killed"/"sft", time.time() + 120
    while last_checkpoint(stage) is None and job.poll() is None and time.time() < until: time.sleep(.05)
    family = psutil.Process(job.pid).children(recursive=True)
    victims = [p for p in family if p.is_running() and p.environ().get("RANK") == "1"]
    assert victims, job.communicate()[0]
    os.kill(victims[0].pid, signal.SIGKILL)
    told = job.communicate(timeout=90)[0]
    assert job.returncode == 2 and "Traceback" not in told.split("process 1 was killed")[0], told
    point = last_checkpoint(stage)
    assert "process 1 was killed (SIGKILL" in told and str(point) in told and "same command goes on" in told, told
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "orphans"
    reached = read_json(point/"trainer_state.json")["global_step"]
    assert 5 <= reached < 150
    done = subprocess.run(options(base, "killed", tmp_path, **long, **{"launch.processes": 1}), env=os.environ | TWO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"step {reached}" in done.stdout, done.stdout + done.stderr
    whole = replace(base, name="whole", folder=str(tmp_path), optim=Optim(steps=150, batch=8, micro=2, lr=1e-2, warmup=2), save=Save(every=500, valid_every=0))
    train(whole, check(whole), progress=False)
    one, two = steps(tmp_path/"whole"), steps(tmp_path/"killed")
    assert [s["step"] for s in two] == list(range(150))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one[:reached + 10], two[:reached + 10])) < 1e-3


def alive(folder): return [int(f.read_text()) for f in folder.iterdir() if psutil.pid_exists(int(f.read_text())) and psutil.Process(int(f.read_text())).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("end, words, accelerate", [("1=kill", "process 1 was killed (SIGKILL", False), ("0=raise", "process 0 failed (exit code 1)", False), ("1=2", None, False), ("1=kill", "process 1 was killed (SIGKILL", True)],
                         ids=["killed", "raised", "bad input", "killed under accelerate"])
def test_how_a_job_ends(end, words, accelerate, tmp_path):
    pids, said = tmp_path/"pids", []
    pids.mkdir()
    def go(): return start(Launch(2, cpu=True, accelerate=accelerate, port=free_port()), "lives", [str(pids), end], tmp_path/"job", lambda: "The last is checkpoint-7. ", said.append, TWO)
    if words is None: assert go() == 2
    else:
        with pytest.raises(UserError) as caught: go()
        assert words in str(caught.value) and "checkpoint-7" in str(caught.value) and ("the dog ate it" in str(caught.value)) == (end == "0=raise")
    assert len(list(pids.iterdir())) == 2 and not alive(pids)
    assert "here is 0 of 2" in "".join(said) and "here is 1" not in "".join(said), "only rank 0 is heard"
    assert (tmp_path/"job"/"command.txt").read_text().startswith("accelerate launch" if accelerate else "torchrun --nproc-per-node 2 --standalone -m lives")


def test_killed_launcher_leaves_no_orphans(tmp_path):
    pids = tmp_path/"pids"
    pids.mkdir()
    program = f"from llmbench.box.launch import *; from pathlib import Path; start(Launch(2, cpu=True), 'lives', [{str(pids)!r}], Path({str(tmp_path/'job')!r}))"
    launcher = subprocess.Popen([sys.executable, "-c", program], env=os.environ | TWO)
    until = time.time() + 60
    while len(list(pids.iterdir())) < 2 and time.time() < until: time.sleep(.05)
    assert len(alive(pids)) == 2
    launcher.kill()
    launcher.wait()
    until = time.time() + 40
    while alive(pids) and time.time() < until: time.sleep(.1)
    assert not alive(pids)
