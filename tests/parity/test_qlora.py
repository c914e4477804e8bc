"Adapters beside four bits: one training step equals bitsandbytes and PEFT's; merging equals PEFT's; an evaluation in between corrupts theirs without the cure, and never ours"
import copy
import logging
import warnings

import pytest
import torch
from torch import nn

from llmbench.model.transformer import Config, Transformer
from llmbench.tune.lora import LoRALinear, add_lora, load_lora, lora_layers, merge_lora, recompute
from llmbench.tune.nf4 import NF4Linear, dequantize, quantize
from llmbench.tune.qlora import footprint, merge_nf4, merged_weight, quantize_model, survival

RANK, ALPHA = 4, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A small Llama whose rows are multiples of 64, and an adapter of PEFT's that does something"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("qlora")
    model = Transformer(Config(vocab_size=97, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=192, max_length=64, tied=False))
    for p in model.parameters():
        if p.dim() > 1: p.data.mul_(4)
    model.save_pretrained(root/"base")
    peft = get_peft_model(theirs(root/"base", four_bits=False), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    peft.save_pretrained(root/"adapter")
    return root/"base", root/"adapter"


def theirs(folder, four_bits=True):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32) if four_bits else None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how, device_map="cpu")


def with_peft(folders):
    from peft import PeftModel
    return PeftModel.from_pretrained(theirs(folders[0]), folders[1], is_trainable=True).train()


def cure(model):
    "What must be done before training where bitsandbytes repacks weights for evaluation"
    import bitsandbytes
    for m in model.modules():
        if isinstance(m, bitsandbytes.nn.Linear4bit): m.support_avx512bf16_for_cpu = False
    return model


def ours_beside(folders):
    model = theirs(folders[0], four_bits=False)
    quantize_model(model)
    load_lora(model, folders[1], trainable=True)
    return model.train()


def a_batch(): return torch.randint(0, 97, (3, 17), generator=torch.Generator().manual_seed(1))


def gradients(model):
    "{name as in PEFT's file: gradient}, and the loss"
    model.zero_grad()
    ids = a_batch()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        if p.grad is None: continue
        name = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B").replace(".adapters.default.0", "")
        found[name] = p.grad.clone()
    return loss.item(), found


def worst(ours, theirs):
    assert set(ours) == set(theirs) and len(ours) == 2*2*7
    return max(float((ours[k] - theirs[k]).norm()/theirs[k].norm()) for k in ours)


def test_same_layers_and_bytes(folders, ledger):
    import bitsandbytes
    small, other = theirs(folders[0], four_bits=False), theirs(folders[0])
    names = quantize_model(small)
    assert names == [n for n, m in other.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)] and len(names) == 14
    a, b = small.state_dict(), other.state_dict()
    ledger("state of a whole model in 4 bits", "transformers with bitsandbytes", sum(k not in b or not torch.equal(v, b[k]) for k, v in a.items()) + (set(a) != set(b)), 0)


def test_step_equals_bitsandbytes_and_peft(folders, ledger):
    "Loss, gradients of all adapters, and the adapters after a step of AdamW"
    ours, peft = ours_beside(folders), with_peft(folders)
    (a, mine), (b, other) = gradients(ours), gradients(peft)
    ledger("QLoRA step: loss", "bitsandbytes Linear4bit + PEFT", abs(a - b), 1e-4)
    ledger("QLoRA step: adapter gradients, relative", "bitsandbytes Linear4bit + PEFT", worst(mine, other), 1e-3)
    moved = []
    for model in (ours, peft):
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.AdamW(trained, lr=1e-3, eps=1e-6).step()
        moved.append(torch.cat([p.detach().flatten() for p in trained]))
    ledger("QLoRA step: adapters after AdamW", "bitsandbytes Linear4bit + PEFT", (moved[0] - moved[1]).abs().max(), 1e-5)
    assert all(not p.requires_grad for n, p in ours.named_parameters() if ".adapters." not in n)


def test_evaluation_then_training(folders, ledger):
    "The trap of FACTS.md: evaluate once, then train"
    import bitsandbytes.functional as bnb
    peft = with_peft(folders)
    loss, right = gradients(cure(with_peft(folders)))
    def evaluated(model):
        model.eval()
        with torch.no_grad(): model(input_ids=a_batch())
        return gradients(model.train())
    cured_loss, cured = evaluated(cure(with_peft(folders)))
    assert abs(cured_loss - loss) < 1e-6 and worst(cured, right) < 1e-6
    ours_loss, ours = evaluated(ours_beside(folders))
    assert abs(ours_loss - loss) < 1e-4
    ledger("QLoRA after an evaluation: adapter gradients, relative", "bitsandbytes + PEFT, cured", worst(ours, right), 1e-3)
    if not bnb.has_avx512bf16(): pytest.skip("bitsandbytes repacks weights only on processors with AVX512-BF16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, corrupt = evaluated(peft)
    errors = sorted(float((corrupt[k] - right[k]).norm()/right[k].norm()) for k in right)
    assert errors[len(errors)//2] > .3, f"bitsandbytes no longer corrupts gradients after an evaluation (median error {errors[len(errors)//2]:.3f}): the cure in box may go"


def test_merging_over_four_bits_equals_peft(folders, ledger):
    "PEFT's merge_and_unload on a 4-bit base unpacks, adds, and quantises again"
    ours, peft = ours_beside(folders).eval(), cure(with_peft(folders)).eval()
    merge_nf4(ours, four_bits=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.merge_and_unload()
    a, b = ours.state_dict(), merged.state_dict()
    keys = [k for k in a if k.endswith("proj.weight")]
    assert len(keys) == 14
    ledger("merge over 4 bits: share of other bytes", "peft merge_and_unload", max(float((a[k] != b[k]).float().mean()) for k in keys), 1e-3)


# our own, by hand

def small(bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.Tanh(), nn.Linear(96, 64, bias=bias), nn.Tanh(), nn.Linear(64, 10, bias=bias))


def with_update(model, scale, seed=1):
    add_lora(model, 4, 8)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for parts in layer.adapters.values():
            for lora in parts.values(): lora.B.data = torch.randn(lora.B.shape, generator=generator)*scale
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_four_ways_of_merging_by_hand(bias):
    original, model = small(bias), small(bias)
    quantize_model(model)
    with_update(model, .05)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    said = model(x)
    weights = {p: dequantize(layer.base.q) for p, layer in lora_layers(model).items()}
    deltas = {p: layer.delta("default") for p, layer in lora_layers(model).items()}
    ways = {}
    for onto in (None, original):
        for four in (False, True):
            merged = merge_nf4(copy.deepcopy(model), onto, four, torch.float32)
            assert not any(isinstance(m, LoRALinear) for m in merged.modules())
            for path in weights:
                summed = (weights[path] if onto is None else original.get_submodule(path).weight) + deltas[path]
                layer = merged.get_submodule(path)
                assert type(layer) is (NF4Linear if four else nn.Linear)
                got = dequantize(layer.q) if four else layer.weight
                want = dequantize(quantize(summed.detach(), 64, True)) if four else summed
                assert (got - want).abs().max() < 1e-6, (path, four)
            ways[onto is None, four] = float((merged(x) - said).detach().norm()/said.detach().norm())
    assert ways[True, False] < 1e-5 < min(ways[True, True], ways[False, False], ways[False, True])
    assert merge_nf4(copy.deepcopy(model)).get_submodule("0").weight.dtype == torch.float32
    assert merge_nf4(copy.deepcopy(model), dtype=torch.bfloat16).get_submodule("0").weight.dtype == torch.bfloat16
    half = small(bias).bfloat16()
    quantize_model(half)
    with_update(half, .05)
    assert merge_nf4(copy.deepcopy(half)).get_submodule("0").weight.dtype == merge_nf4(half, four_bits=True).get_submodule("0").q.dtype == torch.bfloat16


def test_a_small_update_is_rounded_away():
    "On the code's own values nothing smaller than half a step moves anything; onto the original it arrives on average"
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
    start = dequantize(quantize(w))
    a, b = (torch.randn(*s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(((512, 4), (4, 512))))
    delta = a @ b*.002
    over, onto = dequantize(quantize(start + delta)), dequantize(quantize(w + delta))
    assert survival(start, over, delta) < .05
    assert abs(survival(start, onto, delta) - 1) < .1
    assert survival(start, start + delta, delta) == pytest.approx(1, abs=1e-4) and survival(start, start, delta) == 0
    assert survival(start, start - delta, delta) == pytest.approx(-1, abs=1e-4)
    assert survival(start, start + 3*delta, delta) == pytest.approx(3, abs=1e-4)


def test_merged_weight_adds_active_adapters_only():
    model = small()
    quantize_model(model)
    with_update(model, .1)
    layer = lora_layers(model)["0"]
    base = dequantize(layer.base.q)
    assert torch.allclose(merged_weight(layer), base + layer.delta("default"), atol=1e-6)
    layer.active = ()
    assert torch.equal(merged_weight(layer), base)


def test_heads_and_shared_weights_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.out, self.lm_head = nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10), nn.Linear(64, 10)
            self.out.weight = self.embed.weight
    model = Tied()
    assert quantize_model(model) == ["up"]
    assert type(model.out) is nn.Linear and type(model.lm_head) is nn.Linear and isinstance(model.up, NF4Linear)
    assert not any(p.requires_grad for p in model.parameters())
    model = Tied()
    assert quantize_model(model, skip=()) == ["up", "lm_head"]


def test_footprint_by_hand():
    model = small(True)
    assert footprint(model) == 4*(64*96 + 96 + 96*64 + 64 + 64*10 + 10)
    quantize_model(model, double=False)
    names, scales = (64*96 + 96*64 + 64*10)//2, 96 + 96 + 10
    assert footprint(model) == names + 4*scales + 4*(96 + 64 + 10)
    tied = Transformer(Config(vocab_size=50, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))
    assert footprint(tied) == 4*sum(p.numel() for p in tied.parameters())


def test_checkpointing_keeps_the_adapters_gradients():
    torch.manual_seed(6)
    model = Transformer(Config(vocab_size=50, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=128))
    quantize_model(model)
    with_update(model, .1)
    ids = torch.randint(0, 50, (2, 9))
    def gradient():
        model.zero_grad()
        model(ids).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    plain = gradient()
    recompute(model.blocks)
    assert torch.equal(gradient(), plain) and plain.abs().sum() > 0


def test_plain_merge_refuses():
    from llmbench.core import UserError
    model = small()
    quantize_model(model)
    with_update(model, .1)
    with pytest.raises(UserError, match="cannot take an update"): merge_lora(model)
