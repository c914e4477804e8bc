"A user's mistake at the command line: file, line and mend in one message, exit code 2, no traceback, nothing half-written"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmbench.cli import main

COMMAND = str(Path(sys.executable).parent/"llmbench")
TINY = ("--people 4 --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.n-kv-heads 1 --model.d-hidden 16 --model.vocab-size 300 "
        "--pretrain.batch 2 --pretrain.fit.steps 2 --sft.steps 2 --sft.batch 2 --preferences.manners.steps 2 --preferences.book.steps 3 --preferences.reward.steps 2 "
        "--preferences.dpo.steps 1 --preferences.ppo.steps 1 --preferences.sums.steps 2 --preferences.careless.steps 2 --preferences.grpo.steps 1 --forget.steps 2 --forget.every 40").split()


def wrong(capsys, *arguments):
    "What `llmbench` says to a mistake"
    try: code = main([str(a) for a in arguments])
    except SystemExit as e: code = e.code
    told = capsys.readouterr()
    assert code == 2, f"exit code {code}: {told}"
    assert "Traceback" not in told.err + told.out
    return told.err + told.out


def case(name, arguments, words): return pytest.param(arguments, words, id=name)


@pytest.mark.parametrize("arguments, words", [
    case("no command", [], ["llmbench run"]),
    case("unknown command", ["rum"], ["rum", "run"]),
    case("unknown option", ["run", "--stepz", "3"], ["stepz"]),
    case("steps are not a number", ["run", "--pretrain.fit.steps", "many"], ["many"]),
    case("text is not there", ["run", "--text", "no/such.txt"], ["no/such.txt", "spelling"]),
    case("chat is not there", ["run", "--chat", "no/such.json"], ["no/such.json"]),
    case("heads do not divide the width", ["run", "--model.d-model", "30", "--model.n-heads", "4"], ["30", "n_heads"]),
    case("negative layers", ["run", "--model.n-layers", "-1"], ["n_layers"]),
    case("vocabulary smaller than the bytes", ["run", *TINY, "--model.vocab-size", "100"], ["100", "256"]),
    case("no such run to talk to", ["chat", "atlantis"], ["atlantis", "llmbench run"]),
    case("no such model on the hub", ["chat", "nobody/nothing"], ["nobody/nothing", "hub cannot be reached"]),
    case("no such run to judge", ["eval", "atlantis"], ["atlantis"]),
])
def test_command_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = wrong(capsys, *arguments)
    for word in words: assert word in told, told
    assert not list(tmp_path.rglob("*.safetensors"))


def file_case(name, content, *words, option="--chat", suffix=".json"): return pytest.param(option, suffix, content, words, id=name)


@pytest.mark.parametrize("option, suffix, content, words", [
    file_case("truncated JSON", b'[{"instruction": "a", "output": "b"},\n {"instr', "line 2"),
    file_case("broken JSON Lines", b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": [', "line 2", suffix=".jsonl"),
    file_case("empty chat file", b"", "empty"),
    file_case("field missing", b'[{"instruction": "a"}]', "output"),
    file_case("wrong role order", json.dumps([dict(messages=[dict(role="assistant", content="x"), dict(role="assistant", content="y")])]).encode(), "role"),
    file_case("binary chat file", bytes(range(256)), "file.json"),
    file_case("empty text", b"  \n ", "empty", option="--text", suffix=".txt"),
    file_case("not UTF-8", "镇上".encode("gbk"), "UTF-8", option="--text", suffix=".txt"),
    file_case("binary text", b"\x7fELF\0\0\1", "binary", option="--text", suffix=".txt"),
    file_case("truncated gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\3abc", "gzip", option="--text", suffix=".txt.gz"),
    file_case("text field missing", b'{"title": "a"}\n', "title", option="--text", suffix=".jsonl"),
])
def test_files(option, suffix, content, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/f"file{suffix}").write_bytes(content)
    told = wrong(capsys, "run", option, f"file{suffix}", *TINY)
    for word in (f"file{suffix}", *words): assert word in told, told


def test_every_answer_too_long(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"long.json").write_text(json.dumps([dict(instruction=f"Tell {i}", output="and then "*400) for i in range(6)]))
    assert "--sft.length" in wrong(capsys, "run", "--chat", "long.json", *TINY, "--sft.length", "32")


def test_folder_of_somebody_else_is_left_alone(capsys, tmp_path):
    (tmp_path/"town"/"data").mkdir(parents=True)
    (tmp_path/"town"/"data"/"thesis.txt").write_text("four years of work")
    assert "not made by a run" in wrong(capsys, "run", "--folder", tmp_path, *TINY)
    assert (tmp_path/"town"/"data"/"thesis.txt").read_text() == "four years of work"


def test_pickled_checkpoint_is_refused(capsys, tmp_path):
    import torch
    assert main(["run", "--folder", str(tmp_path), *TINY]) == 0
    capsys.readouterr()
    model = tmp_path/"town"/"sft"/"model"
    (model/"model.safetensors").unlink()
    torch.save({}, model/"pytorch_model.bin")
    assert "pickle" in wrong(capsys, "chat", "--folder", tmp_path, "--prompt", "hi").lower()


def test_truncated_checkpoint(capsys, tmp_path):
    assert main(["run", "--folder", str(tmp_path), *TINY]) == 0
    capsys.readouterr()
    path = tmp_path/"town"/"sft"/"model"/"model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "model.safetensors" in wrong(capsys, "chat", "--folder", tmp_path, "--prompt", "hi")


def test_question_longer_than_the_context(capsys, tmp_path):
    assert main(["run", "--folder", str(tmp_path), *TINY]) == 0
    capsys.readouterr()
    assert "tokens" in wrong(capsys, "chat", "--folder", tmp_path, "--prompt", "Why? "*500)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk(tmp_path):
    disk = tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("may not mount here")
    try:
        done = subprocess.run([COMMAND, "run", "--folder", str(disk), *TINY], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "space" in done.stderr, done.stderr[-2000:]
        assert not list(disk.rglob("done.json")) or all(p.read_text().strip().endswith("}") for p in disk.rglob("done.json"))
    finally: subprocess.run(["umount", disk], check=True)


def test_read_only_folder(tmp_path):
    "Root may write anywhere: as root the folder is a mount that is read-only"
    target = tmp_path/"locked"
    target.mkdir()
    if os.geteuid() == 0:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", target], capture_output=True).returncode: pytest.skip("may not mount here")
    else: target.chmod(0o500)
    try:
        done = subprocess.run([COMMAND, "run", "--folder", str(target), *TINY], capture_output=True, text=True)
        assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    finally:
        if os.geteuid() == 0: subprocess.run(["umount", target], check=True)
        else: target.chmod(0o700)


@pytest.mark.parametrize("command", ["run", "pretrain", "sft", "eval", "chat", "lab", "doctor", "merge", "assets", "sft --box", "reward --box", "dpo --box", "kto --box", "grpo --box", "ppo --box"])
def test_help_names_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as ended: main([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "default" in told
    for line in told.split("│ --")[1:]: assert "default" in line.split("│ --")[0] or "help" in line, line
