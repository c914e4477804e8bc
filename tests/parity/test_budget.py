"Predicted memory against weighed tensors (ours, transformers, PEFT, bitsandbytes), FLOPs against torch's counter, formulas against papers"
import copy
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
