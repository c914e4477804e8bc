"Predicted memory against weighed tensors (ours, transformers, PEFT, bitsandbytes), FLOPs against torch's counter, formulas against papers"
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llmbench.model.transformer import Config, Transformer
from llmbench.train.activations import Plan, activations, attention_bytes, kv_cache, logits, mlp_bytes
from llmbench.train.budget import estimate, flops, four_bits, hours, memory, spread, states
from llmbench.train.footprint import footprint, saved_activations, tensor_bytes
from llmbench.train.loss import next_token_loss
from llmbench.train.optim import make_optimizers
from llmbench.train.shape import count, read_shape

SMALL = Config(vocab_size=510, d_model=96, n_layers=4, n_heads=6, n_kv_heads=2, d_hidden=250, max_length=512)
ROWS, LENGTH = 3, 160


def ids(rows=ROWS, length=LENGTH): return torch.randint(510, (rows, length), generator=torch.Generator().manual_seed(3))


def llama(attention="sdpa", config=SMALL):
    return LlamaForCausalLM(LlamaConfig(vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
                                        num_key_value_heads=config.n_kv_heads, intermediate_size=config.d_hidden, max_position_embeddings=512, tie_word_embeddings=config.tied,
                                        use_cache=False, attn_implementation=attention)).train()


def run(model, x):
    out = model(x)
    return next_token_loss(getattr(out, "logits", out), x, torch.ones_like(x))


def checkpointed(model):
    "Ours, with a checkpoint around each block"
    def forward(x):
        h = model.embed(x)
        where = (*model.angles(0, x.shape[1], None, h), None, None, 0)
        for block in model.blocks: h = checkpoint(block, h, *where, use_reentrant=False)
        return F.linear(model.norm(h), model.embed.weight)
    return forward


def one_block(model, hf, dtype=torch.float32):
    "What a single block keeps, with an input that needs a gradient"
    x = torch.randn(ROWS, LENGTH, 96, dtype=dtype, requires_grad=True)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with saved_activations(model) as saved:
        if hf: base.gradient_checkpointing_disable()
        if hf: base.model.layers[1](x, position_embeddings=base.model.rotary_emb(x, torch.arange(LENGTH)[None]))
        else: model.blocks[1](x, *model.angles(0, LENGTH, None, x), None, None, 0)
    return saved.bytes


def lora(model, **how):
    import peft
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **how))


def make(name):
    "(model, forward or None, dtype of the weights, whether autocast, plan)"
    fused = dict(modules="fused", attention="blocked")
    common = dict(batch=ROWS, length=LENGTH, precision="fp32")
    if name == "ours": return Transformer(SMALL), None, Plan(**common, **fused)
    if name == "ours, untied": return Transformer(replace(SMALL, tied=False)), None, Plan(**common, **fused)
    if name == "ours, multi-head": return Transformer(replace(SMALL, n_kv_heads=6)), None, Plan(**common, **fused)
    if name == "ours, experts": return Transformer(replace(SMALL, n_experts=4)), None, Plan(**common, **fused)
    if name == "ours, Muon": return Transformer(SMALL), None, Plan(**common, **fused, optimizer="muon")
    if name == "ours, autocast": return Transformer(SMALL), None, Plan(**(common | dict(precision="amp")), **fused)
    if name == "ours, bf16": return Transformer(SMALL).bfloat16(), None, Plan(**(common | dict(precision="bf16")), **fused)
    if name == "ours, checkpoints":
        model = Transformer(SMALL)
        return model, checkpointed(model), Plan(**common, **fused, checkpointing=True)
    if name == "Llama": return llama(), None, Plan(**common)
    if name == "Llama, eager": return llama("eager"), None, Plan(**common, attention="eager")
    if name == "Llama, untied": return llama(config=replace(SMALL, tied=False)), None, Plan(**common)
    if name == "Llama, autocast": return llama(), None, Plan(**(common | dict(precision="amp")))
    if name == "Llama, bf16": return llama().bfloat16(), None, Plan(**(common | dict(precision="bf16")))
    if name == "Llama, checkpoints":
        model = llama()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        return model, None, Plan(**common, checkpointing=True)
    if name == "Llama, LoRA": return lora(llama()), None, Plan("lora", rank=4, **common)
    if name == "Llama, LoRA on bf16": return lora(llama().bfloat16()), None, Plan("lora", rank=4, **(common | dict(precision="bf16")))
    if name == "Llama, LoRA, checkpoints":
        model = lora(llama())
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
        return model, None, Plan("lora", rank=4, **common, checkpointing=True)


NAMES = ["ours", "ours, untied", "ours, multi-head", "ours, experts", "ours, Muon", "ours, autocast", "ours, bf16", "ours, checkpoints", "Llama", "Llama, eager", "Llama, untied",
         "Llama, autocast", "Llama, bf16", "Llama, checkpoints", "Llama, LoRA", "Llama, LoRA on bf16", "Llama, LoRA, checkpoints"]


def shape_of(model):
    if hasattr(model, "get_base_model"): model = model.get_base_model()
    return read_shape(model.config if isinstance(model, Transformer) else model.config.to_dict())


def weigh(name):
    "(predicted, weighed) by part"
    torch.manual_seed(1)
    model, forward, plan = make(name)
    shape, x = shape_of(model), ids()
    autocast = "autocast" in name or name == "Llama, LoRA on bf16"
    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): return run(forward or model, x)
    weighed = footprint(model, loss, make_optimizers(model, matrix_lr=.02 if plan.optimizer == "muon" else 0.))
    if plan.checkpointing: weighed["activations"] += one_block(model, "Llama" in name)
    parts = dict(estimate(shape, plan).parts)
    parts.pop("work space")
    parts["weights"] += parts.pop("adapters", 0)
    parts["activations"] += parts.pop("logits") + parts.pop("bf16 copies", 0)
    return parts, weighed


@pytest.mark.parametrize("name", NAMES)
def test_predicted_against_weighed(name, ledger):
    predicted, weighed = weigh(name)
    assert set(predicted) == set(weighed)
    for part in ("weights", "gradients", "optimizer"): assert abs(predicted[part]/weighed[part] - 1) < .01, f"{part}: {predicted[part]} predicted, {weighed[part]} weighed"
    assert abs(predicted["activations"]/weighed["activations"] - 1) < .1, f"activations: {predicted['activations']:.0f} predicted, {weighed['activations']} weighed"
    ledger(f"memory of a step, relative: {name}", "weighed tensors", abs(sum(predicted.values())/sum(weighed.values()) - 1), .1)


def test_four_bits_equal_bitsandbytes(ledger):
    "NF4 with and without double quantisation: packed weights and constants of a real Linear4bit, without its fixed code books"
    import bitsandbytes as bnb
    for double in (False, True):
        layer = bnb.nn.Linear4bit(384, 640, bias=False, compress_statistics=double, quant_type="nf4")
        layer = layer.to("cpu")
        layer.weight = bnb.nn.Params4bit(torch.randn(640, 384), requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer).to("cpu")
        state = layer.weight.quant_state
        kept = [layer.weight.data, state.absmax] + ([state.state2.absmax] if double else [])
        ledger(f"bytes of a 4-bit matrix, double={double}", "bitsandbytes", abs(four_bits(640*384, double) - tensor_bytes(kept)), 0)


def test_eight_bit_adam_equals_bitsandbytes(ledger):
    import bitsandbytes as bnb
    p = torch.nn.Parameter(torch.randn(512, 96))
    optimizer = bnb.optim.AdamW8bit([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    kept = [x for name, x in optimizer.state[p].items() if torch.is_tensor(x) and "qmap" not in name]
    ledger("bytes of 8-bit AdamW, relative", "bitsandbytes", abs(2*(1 + 4/256)*p.numel()/tensor_bytes(kept) - 1), .01)


@pytest.mark.parametrize("rows", [2, 6])
def test_scales_agree_with_torchs_tracker(rows, ledger):
    torch.manual_seed(0)
    model, x = Transformer(SMALL), ids(rows)
    ours = footprint(model, lambda: run(model, x), make_optimizers(model, matrix_lr=0.))
    model = Transformer(SMALL)
    optimizers, tracker = make_optimizers(model, matrix_lr=0.), MemTracker()
    tracker.track_external(model, *optimizers)
    with tracker:
        for step in range(2):
            if step: tracker.reset_mod_stats()
            run(model, x).backward()
            for o in optimizers: o.step()
            for o in optimizers: o.zero_grad()
    theirs = {getattr(kind, "value", kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    assert (ours["weights"], ours["optimizer"]) == (theirs["Parameter"], theirs["Optstate"])
    ledger(f"saved activations, {rows} rows, relative", "torch's MemTracker", abs(ours["activations"]/theirs["Activation"] - 1), .01)
    predicted = estimate(read_shape(SMALL), Plan(batch=rows, length=LENGTH, precision="fp32", modules="fused", attention="blocked"))
    ledger(f"peak of a step with work space, {rows} rows, relative", "torch's MemTracker", abs((predicted.total - predicted.parts["gradients"])/theirs["Total"] - 1), .1)


@pytest.mark.parametrize("name", ["full", "eager full, checkpoints", "lora"])
def test_flops_equal_torchs_counter(name, ledger):
    model, x = llama("eager"), ids(2, 64)
    if name == "lora": model = lora(model)
    if "checkpoints" in name: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    with FlopCounterMode(display=False) as counter: run(model, x).backward()
    predicted = sum(flops(SMALL, "lora" if name == "lora" else "full", 64, checkpointing="checkpoints" in name, causal=False).values())
    counted = counter.get_total_flops()/x.numel()
    if name == "lora": counted -= 6*sum(p.numel() for p in model.parameters() if p.requires_grad)
    ledger(f"FLOPs a token, {name}, relative", "torch FlopCounterMode", abs(predicted/counted - 1), .02 if name != "lora" else .05)


def test_formulas_by_hand():
    "Numbers small enough for paper: C=8, H=2, D=4, K=1, F=12, V=10, L=3, T=5"
    shape = read_shape(Config(vocab_size=10, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, d_hidden=12, max_length=64))
    plan = Plan(batch=2, length=5, precision="bf16", modules="fused")
    assert attention_bytes(shape, plan) == 2*(8 + 4 + 4 + 8) + 4*2
    assert attention_bytes(shape, replace(plan, attention="eager")) == 2*(8 + 8 + 8 + 8) + 2*5*6
    assert mlp_bytes(shape, plan) == 2*4*12
    assert kv_cache(shape, 2, 5) == 2*3*1*4*2*5*2
    assert logits(shape, plan) == {"logits": 4*10*10, "work space": 6*10*10}
    assert logits(shape, replace(plan, precision="fp32"))["work space"] == 4*10*10
    block = 2*(2*8 + 4) + 2*2*8 + (2*24 + 8) + 96
    assert activations(shape, plan) == 10*(3*block + (2*8 + 4) + 2*8)
    assert activations(shape, replace(plan, checkpointing=True)) == 10*(3*2*8 + block + (2*8 + 4) + 2*8)
    assert four_bits(64*256, True) == 64*128 + 256 + 4 and four_bits(65, False) == 33 + 8
    n = sum(count(shape).values())
    assert states(shape, Plan(precision="fp32")) == 8*n and states(shape, Plan(optimizer="sgd")) == 0
    assert flops(shape, length=5)["forward"] == 2*(3*(8*8 + 2*8*4 + 8*8 + 3*8*12) + 80) + 2*3*5*8
    assert sum(flops(shape, "lora", 5).values()) == sum(flops(shape, length=5).values()) - flops(shape)["weight gradients"]
    assert hours(1e9, 3.6e6, 1e12, 2, .5) == 1.


def test_tensor_parallel_halves_what_it_should():
    "Norms' activations and the embedding stay, matrices and what is inside attention and network are halved"
    shape = read_shape("llama-2-7b")
    one, two = (estimate(shape, Plan(batch=2, length=512, precision="fp32", gpus=t, tensor=t, modules="fused")) for t in (1, 2))
    whole = 2*32000*4096 + 65*4096
    assert abs(two.parts["weights"] - 4*((6_738_415_616 - whole)/2 + whole)) < 1
    norms = 2*512*32*(2*(4*4096 + 4) + 2*4*4096) + 2*512*(2*4*4096 + 4)
    assert abs(two.parts["activations"] - ((one.parts["activations"] - norms)/2 + norms)) < 1


def test_zero_paper(ledger):
    "Figure 1 of arXiv:1910.02054: 7.5 B parameters on 64 cards"
    parts, said = dict(weights=2*7.5e9, masters=4*7.5e9, gradients=2*7.5e9, optimizer=8*7.5e9), dict(ddp=120, zero1=31.4, zero2=16.6, zero3=1.9)
    for stage, right in said.items():
        got = spread(parts, read_shape("llama-2-7b"), Plan(gpus=64, sharding=stage))
        ledger(f"GB on a card, {stage}, 64 cards", "ZeRO, figure 1", abs(sum(got[k] for k in parts)/1e9 - right), .06)


def test_ddp_buckets_and_gathered_blocks():
    assert memory("town", length=128, gpus=2).parts["buckets"] == memory("town", length=128, gpus=2).parts["gradients"]
    assert "buckets" not in memory("town", length=128, gpus=2, sharding="zero2").parts and "buckets" not in memory("town", length=128).parts
    assert "gathered" in memory("town", length=128, gpus=2, sharding="zero3").parts and "bf16 copies" not in memory("town", length=128, gpus=2, sharding="zero3").parts


def test_sixteen_bytes_a_parameter():
    "100 M parameters in fp32 are 0.4 GB; with AdamW 1.6, whatever the batch"
    shape = read_shape(Config(vocab_size=32000, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_hidden=2048, max_length=2048))
    n = sum(count(shape).values())
    for batch in (1, 8):
        parts = memory(shape, "full", batch, precision="fp32").parts
        assert parts["weights"] == 4*n and parts["weights"] + parts["gradients"] + parts["optimizer"] == 16*n
    assert memory(shape, "full", 8).parts["activations"] == 8*memory(shape, "full", 1).parts["activations"]


def tensors_in(x):
    "Every tensor in nested dataclasses, tuples, lists and dictionaries"
    if torch.is_tensor(x): return [x]
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else vars(x).values() if hasattr(x, "__dict__") else ()
    return [t for y in inside for t in tensors_in(y)]


@pytest.mark.parametrize("double", [False, True])
def test_four_bits_equal_ours(double):
    nf4 = pytest.importorskip("llmbench.tune.nf4", reason="tune.nf4 is not here yet")
    kept = tensor_bytes(tensors_in(nf4.quantize(torch.randn(640, 384), double=double)))
    assert abs(four_bits(640*384, double)/kept - 1) < .02, "packed weights and constants; code books are shared or small"
