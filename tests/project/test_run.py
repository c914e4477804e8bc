"The whole chain on a small town: skipped when unchanged, continued after kill -9 with the same weights, and a report"
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).parent/"llmbench")
SMALL = ("--people 6 --model.d-model 32 --model.n-layers 2 --model.n-heads 2 --model.n-kv-heads 1 --model.d-hidden 64 --model.vocab-size 400 "
         "--pretrain.batch 8 --pretrain.fit.steps 60 --pretrain.fit.save-every 10 --pretrain.fit.valid-every 20 --sft.steps 30 --sft.batch 8 "
         "--preferences.manners.steps 4 --preferences.book.steps 4 --preferences.reward.steps 4 --preferences.dpo.steps 2 --preferences.ppo.steps 1 --preferences.sums.steps 4 --preferences.careless.steps 2 --preferences.grpo.steps 2 --forget.steps 2 --forget.every 40").split()


def llmbench(*arguments, **how):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240, **how)


def weights(folder): return {stage: (folder/"town"/stage/"model"/"model.safetensors").read_bytes() for stage in ("pretrain", "sft")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    start = time.time()
    done = llmbench("run", "--folder", folder, *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, time.time() - start


def test_run_ends_with_the_path_of_a_report(finished):
    folder, out, _ = finished
    assert out.strip().splitlines()[-1] == f"report: {folder/'town'/'report.html'}"


def test_report_is_self_contained_and_tells_all(finished):
    page = (finished[0]/"town"/"report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page) and "<script" not in page
    for word in ("What was done", "Pre-training", "Fine-tuning", "Scores, before and after", "In its own words", "How to go on", "95 % interval", "chance",
                 "Reward model: what is true", "Reward model: what is better", "DPO: what is preferred", "PPO: manners by reward", "GRPO: sums by right and wrong", "Forgetting"): assert word in page, word
    assert page.count("<svg") >= 8


def test_second_run_does_nothing(finished):
    folder = finished[0]
    stamps = {p: p.stat().st_mtime_ns for p in (folder/"town").glob("*/done.json")}
    done = llmbench("run", "--folder", folder, *SMALL)
    assert done.returncode == 0 and done.stdout.count("unchanged, skipped") == 11, done.stdout + done.stderr
    assert stamps == {p: p.stat().st_mtime_ns for p in (folder/"town").glob("*/done.json")} and len(stamps) == 11


def test_changed_setting_redoes_what_follows_only(finished, tmp_path):
    subprocess.run(["cp", "-r", finished[0]/"town", tmp_path/"town"], check=True)
    done = llmbench("run", "--folder", tmp_path, *SMALL, "--sft.replay", "0.1")
    skipped = [line.split()[0] for line in done.stdout.splitlines() if "unchanged" in line]
    assert skipped == ["data", "bpe", "pretrain"], done.stdout + done.stderr
    assert weights(tmp_path)["sft"] != weights(finished[0])["sft"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_a_random_moment_the_next_run_ends_with_the_same_weights(finished, tmp_path, seed):
    folder, _, seconds = finished
    process = subprocess.Popen([COMMAND, "run", "--folder", str(tmp_path), *SMALL], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(.35, .95)*seconds)
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors"))
    done = llmbench("run", "--folder", tmp_path, *SMALL)
    assert done.returncode == 0, f"after a kill that left {left}: {done.stderr[-3000:]}"
    assert weights(tmp_path) == weights(folder), f"after a kill that left {left}"
    for stage, steps in (("pretrain", 60), ("sft", 30)):
        lines = [json.loads(line) for line in (tmp_path/"town"/stage/"checkpoints"/"steps.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(steps)), "the log has a gap or a repeated step"


def test_interrupt_says_how_to_go_on(tmp_path, finished):
    process = subprocess.Popen([COMMAND, "run", "--folder", str(tmp_path), *SMALL, "--pretrain.fit.steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob("town/pretrain/checkpoints/step-*")) and time.time() < deadline: time.sleep(.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "goes on" in err and "Traceback" not in err, err[-2000:]


def test_dry_plan_writes_nothing(tmp_path):
    done = llmbench("run", "--dry", "--folder", tmp_path, *SMALL)
    assert done.returncode == 0 and "to do" in done.stdout and "parameters" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_chat_and_eval_use_the_run(finished):
    folder = finished[0]
    done = llmbench("chat", "--folder", folder, "--prompt", "Where is 林月?", "--max-new-tokens", 8)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    done = llmbench("eval", "town", "--folder", folder, "--people", 6)
    assert done.returncode == 0 and "heldout en" in done.stdout and "chance" in done.stdout, done.stderr
    talk = llmbench("chat", "--folder", folder, "--max-new-tokens", 4, input="hello\n/new\nhello\n\n")
    assert talk.returncode == 0 and talk.stdout.count("you>") == 4, talk.stdout + talk.stderr


def test_own_files(tmp_path):
    (tmp_path/"text").mkdir()
    for i in range(12): (tmp_path/"text"/f"{i}.txt").write_text(f"Chapter {i}. " + "The boat came in at dawn, and nobody was on it. 船在黎明时靠岸。 "*(i + 3))
    rows = [dict(instruction=f"Say {w}", input="", output=f"{w}!") for w in "one two three four five six seven eight nine ten apple boat cat dog ear fig gate hat ink jar".split()]
    (tmp_path/"chat.json").write_text(json.dumps(rows))
    small = [a for a in SMALL if a not in ("--people", "6")]
    done = llmbench("run", "--text", tmp_path/"text", "--chat", tmp_path/"chat.json", "--folder", tmp_path/"runs", *small, "--valid", "0.3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out answers" in (tmp_path/"runs"/"own"/"report.html").read_text()
    assert "no pairs; add --pairs FILE" in done.stdout
    (tmp_path/"pairs.jsonl").write_text("".join(json.dumps(dict(prompt=r["instruction"], chosen=r["output"], rejected=r["output"].upper() + "?")) + "\n" for r in rows))
    done = llmbench("run", "--text", tmp_path/"text", "--chat", tmp_path/"chat.json", "--pairs", tmp_path/"pairs.jsonl", "--folder", tmp_path/"runs", *small, "--valid", "0.3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("unchanged, skipped") == 5 and "implied reward is right on" in (tmp_path/"runs"/"own"/"report.html").read_text()
    assert (tmp_path/"runs"/"own"/"reward"/"model"/"model.safetensors").exists() and (tmp_path/"runs"/"own"/"dpo"/"model"/"model.safetensors").exists()
    done = llmbench("run", "--pairs", tmp_path/"pairs.jsonl", "--folder", tmp_path/"other", *SMALL)
    assert done.returncode == 2 and "--chat FILE" in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("text, chat", [("tinyshakespeare.txt", "alpaca_en.json"), ("zh_tang_poems.json", "alpaca_zh.json"), ("c4_en.jsonl", "sharegpt_toolcall_zh.json"), ("c4_en.jsonl", "self_instruct_seeds.jsonl")])
def test_real_files(data, tmp_path, text, chat):
    done = llmbench("run", "--text", data/text, "--chat", data/chat, "--folder", tmp_path, "--model.vocab-size", 1000, "--pretrain.fit.steps", 3, "--sft.steps", 2,
                    "--model.d-model", 32, "--model.n-heads", 2, "--model.n-kv-heads", 2, "--model.d-hidden", 64, "--pretrain.batch", 2, "--sft.batch", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "In its own words" in (tmp_path/"own"/"report.html").read_text()
