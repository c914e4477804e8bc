"LoRA against PEFT: forward, gradients, ten steps of AdamW, merging, dropout, folders both ways; and by hand"
import copy
import math

import pytest
import torch
from torch import nn

from llmbench.model.transformer import Config, Transformer
from llmbench.train.loss import next_token_loss
from llmbench.tune.lora import (LoRALinear, Settings, add_lora, linear_maps, load_lora, merge_lora, recompute, save_lora, trainable_parameters, unmerge_lora, use_lora,
                                without_lora)
from llmbench.tune.lora_layer import LoRA, effective_rank, low_rank, rank_for, singular_values
from llmbench.tune.peft_folder import by_pattern

SHAPE = dict(vocab_size=90, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=40, max_length=32)
CASES = {"all linear": dict(r=3, alpha=7., targets="all-linear"), "q and v, rsLoRA": dict(r=4, alpha=5., targets=["q_proj", "v_proj"], rslora=True),
         "mlp": dict(r=5, alpha=4., targets=["up_proj", "down_proj"])}


def ids(seed=0, rows=3, length=11): return torch.randint(0, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base():
    "Larger weights than at a usual start, so that errors show"
    torch.manual_seed(3)
    model = Transformer(Config(**SHAPE))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.mul_(3)
    return model


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory): return base.save_pretrained(tmp_path_factory.mktemp("base"))


def llama(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def peft_of(folder, r, alpha, targets, rslora=False, dropout=0.):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(llama(folder), LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, use_rslora=rslora, lora_dropout=dropout, task_type="CAUSAL_LM"))


def pairs(model, name="default"):
    "{map: its LoRA}, under PEFT's names"
    layers = dict(model.named_modules())
    return {n: layers[path].adapters[name][str(part)] for n, (path, part, _) in linear_maps(model).items()
            if isinstance(layers[path], LoRALinear) and name in layers[path].adapters and str(part) in layers[path].adapters[name]}


def peft_pairs(theirs):
    "{map: (A, B)} of a PEFT model"
    return {n.removeprefix("base_model.model."): (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in theirs.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


def same_numbers(model, theirs, zero=False):
    "Give both the same A, and the same B, which is not zero unless asked for"
    draw, other = torch.Generator().manual_seed(5), peft_pairs(theirs)
    assert other.keys() == pairs(model).keys()
    with torch.no_grad():
        for n, lora in pairs(model).items():
            lora.A.normal_(0, .2, generator=draw)
            lora.B.normal_(0, 0. if zero else .1, generator=draw)
            for x, y in zip(other[n], (lora.A, lora.B)): x.copy_(y)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_peft(case, base, folder, ledger):
    model, theirs = copy.deepcopy(base), peft_of(folder, **CASES[case])
    add_lora(model, **CASES[case])
    same_numbers(model, theirs)
    x, mask = ids(), (ids(9) > 20).long()
    ours = model(x)
    logits = theirs(input_ids=x).logits
    assert (ours - base(x)).abs().max() > .1*ours.abs().max(), "the adapters do nothing"
    ledger(f"LoRA forward, {case}", "peft", ((ours - logits).abs().max()/logits.abs().max()).item(), 1e-6)
    next_token_loss(ours, x, mask).backward()
    next_token_loss(logits, x, mask).backward()
    other = peft_pairs(theirs)
    scale = max(p.grad.abs().max() for pair in other.values() for p in pair)
    worst = max((a.grad - b.grad).abs().max() for n, lora in pairs(model).items() for a, b in zip((lora.A, lora.B), other[n]))
    ledger(f"LoRA gradients, {case}", "peft", (worst/scale).item(), 1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n), "the base has gradients"
    assert trainable_parameters(model) == theirs.get_nb_trainable_parameters()


def test_ten_steps_equal_peft(base, folder, ledger):
    "AdamW from the usual start: A random, B zero"
    case = CASES["all linear"]
    model, theirs, lr = copy.deepcopy(base), peft_of(folder, **case), 1e-3
    add_lora(model, **case)
    same_numbers(model, theirs, zero=True)
    for m in (model, theirs):
        trained = [p for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=.1, betas=(.9, .95), eps=1e-6)
        for step in range(10):
            x = ids(step + 20)
            out = m(x) if m is model else m(input_ids=x).logits
            next_token_loss(out, x, torch.ones_like(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    other = peft_pairs(theirs)
    assert max(lora.B.abs().max() for lora in pairs(model).values()) > 5*lr
    worst = max((a - b).abs().max().item() for n, lora in pairs(model).items() for a, b in zip((lora.A, lora.B), other[n]))
    ledger("LoRA weights after ten AdamW steps", "peft", worst, 1e-6)


def test_dropout_equals_peft(base, folder, ledger):
    "q, k, v draw one after the other, as three modules would"
    case = CASES["all linear"] | dict(dropout=.3)
    model, theirs = copy.deepcopy(base), peft_of(folder, **case)
    add_lora(model, **case)
    same_numbers(model, theirs)
    x = ids()
    outs = []
    for m in (model, theirs):
        m.train()
        torch.manual_seed(11)
        outs.append(m(x) if m is model else m(input_ids=x).logits)
        m.eval()
    assert not torch.allclose(outs[0], model(x), atol=1e-3), "nothing was dropped"
    ledger("LoRA forward with dropout 0.3, one seed", "peft", ((outs[0] - outs[1]).abs().max()/outs[1].abs().max()).item(), 1e-6)
    assert torch.equal(model(x), model(x)), "dropout in evaluation"


def test_start_is_identity_exactly(base):
    for case in CASES.values():
        model, x = copy.deepcopy(base), ids()
        before = model(x)
        add_lora(model, **case)
        assert torch.equal(model(x), before)
        for lora in pairs(model).values(): assert lora.A.std() > 0 and not lora.B.any()


def test_start_is_kaiming_like_peft(folder):
    "Uniform within 1/sqrt(in): the bound, the spread, and PEFT's own A"
    lora = LoRA(400, 30, Settings(64), torch.Generator().manual_seed(0))
    theirs = torch.cat([a.flatten() for n, (a, _) in peft_pairs(peft_of(folder, 8, 8, ["q_proj", "gate_proj"])).items()])
    for a, width in ((lora.A, 400), (theirs, 32)):
        bound = 1/math.sqrt(width)
        assert .97*bound < a.abs().max() <= bound and abs(a.std()/(bound/3**.5) - 1) < .05 and abs(a.mean()) < .05*bound


def test_merged_equals_unmerged_and_peft(base, folder, ledger):
    case = CASES["all linear"]
    model, theirs = copy.deepcopy(base), peft_of(folder, **case)
    add_lora(model, **case)
    same_numbers(model, theirs)
    x = ids()
    beside, weights = model(x), copy.deepcopy(base.state_dict())
    merge_lora(model, unload=False)
    merged = model(x)
    ledger("merged against unmerged, fp32", "itself", ((merged - beside).abs().max()/beside.abs().max()).item(), 1e-6)
    unmerge_lora(model)
    assert torch.equal(model(x), beside)
    plain = merge_lora(model)
    assert type(plain.blocks[0].attention.qkv) is nn.Linear and plain.state_dict().keys() == weights.keys()
    full = theirs.merge_and_unload().state_dict()
    from llmbench.model.checkpoint import layout
    worst = max((plain.state_dict()[ours][part] - full[name]).abs().max().item() for name, _, ours, part in layout(base.config))
    ledger("merged weights", "peft merge_and_unload", worst, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_our_folder_in_peft(case, base, folder, tmp_path, ledger):
    from peft import PeftModel
    model = copy.deepcopy(base)
    add_lora(model, **CASES[case])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in pairs(model).values(): lora.B.normal_(0, .1, generator=draw)
    save_lora(model, tmp_path, base=str(folder))
    theirs = PeftModel.from_pretrained(llama(folder), tmp_path)
    x = ids()
    ledger(f"our adapter folder in PEFT, {case}", "peft from_pretrained", ((model(x) - theirs(input_ids=x).logits).abs().max()/model(x).abs().max()).item(), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_peft_folder_in_ours(case, base, folder, tmp_path, ledger):
    theirs = peft_of(folder, **CASES[case])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in peft_pairs(theirs).values(): b.normal_(0, .1, generator=draw)
    theirs.save_pretrained(tmp_path)
    model, x = copy.deepcopy(base), ids()
    load_lora(model, tmp_path)
    logits = theirs(input_ids=x).logits
    ledger(f"PEFT's adapter folder in ours, {case}", "peft save_pretrained", ((model(x) - logits).abs().max()/logits.abs().max()).item(), 1e-6)
    assert {s.settings.rslora for s in pairs(model).values()} == {CASES[case].get("rslora", False)}
    hf = llama(folder)
    load_lora(hf, tmp_path)
    ledger(f"PEFT's adapter on transformers' Llama through ours, {case}", "peft save_pretrained", ((hf(input_ids=x).logits - logits).abs().max()/logits.abs().max()).item(), 1e-6)


def test_rank_and_alpha_patterns_both_ways(base, folder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    theirs = get_peft_model(llama(folder), LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"down_proj": 11}))
    with torch.no_grad():
        for _, b in peft_pairs(theirs).values(): b.normal_(0, .3)
    theirs.save_pretrained(tmp_path/"a")
    model, x = copy.deepcopy(base), ids()
    load_lora(model, tmp_path/"a")
    found = {n: (s.settings.r, s.settings.alpha) for n, s in pairs(model).items()}
    assert found == {"model.layers.0.self_attn.q_proj": (2, 3), "model.layers.1.self_attn.q_proj": (5, 3), "model.layers.0.mlp.down_proj": (2, 11), "model.layers.1.mlp.down_proj": (2, 11)}
    assert (model(x) - theirs(input_ids=x).logits).abs().max() < 1e-4
    save_lora(model, tmp_path/"b")
    assert (model(x) - PeftModel.from_pretrained(llama(folder), tmp_path/"b")(input_ids=x).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_adapter_gradients(kind, reentrant, base, folder):
    "The old way needs an input that requires a gradient; the new one does not"
    def gradients(recomputed, nudge=False):
        model = copy.deepcopy(base) if kind == "ours" else llama(folder)
        add_lora(model, r=3, alpha=7., dropout=.2, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            for lora in pairs(model).values(): lora.B.fill_(.1)
        model.train()
        if nudge: model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_()) if kind != "ours" else model.embed.register_forward_hook(lambda m, i, o: o.requires_grad_())
        if recomputed: recompute(model.blocks if kind == "ours" else model.model.layers, reentrant)
        torch.manual_seed(4)
        out = model(ids()) if kind == "ours" else model(input_ids=ids(), use_cache=False)
        next_token_loss(getattr(out, "logits", out), ids(), torch.ones_like(ids())).backward()
        return {n: None if lora.A.grad is None else (lora.A.grad, lora.B.grad) for n, lora in pairs(model).items()}
    plain = gradients(False)
    kept = gradients(True, nudge=reentrant)
    assert max(((a - b).abs().max()/a.abs().max()).item() for n in plain for a, b in zip(plain[n], kept[n])) < (1e-5 if reentrant else 1e-6)  # without gradients attention takes another kernel


# by hand

def test_one_map_by_hand():
    "W = [[1,2],[3,4],[5,6]], A = [[1,-1]], B = [[2],[0],[-3]], alpha 6, r 1"
    base = nn.Linear(2, 3, bias=True)
    with torch.no_grad(): base.weight.copy_(torch.tensor([[1., 2], [3, 4], [5, 6]])), base.bias.copy_(torch.tensor([.1, .2, .3]))
    layer = LoRALinear(base)
    lora = layer.add("x", 0, Settings(1, 6.))
    with torch.no_grad(): lora.A.copy_(torch.tensor([[1., -1]])), lora.B.copy_(torch.tensor([[2.], [0], [-3]]))
    x = torch.tensor([[2., 5.]])                                    # A x = -3
    assert torch.allclose(layer(x), torch.tensor([[12.1, 26.2, 40.3]]))  # not switched on yet
    layer.active = ("x",)
    assert torch.allclose(layer(x), torch.tensor([[12.1 - 36, 26.2, 40.3 + 54]]))
    assert torch.equal(layer.delta("x"), torch.tensor([[12., -12], [0, 0], [-18, 18]]))
    layer.merge()
    assert torch.equal(base.weight, torch.tensor([[13., -10], [3, 4], [-13, 24]])) and torch.allclose(layer(x), torch.tensor([[-23.9, 26.2, 94.3]]))
    layer.unmerge()
    assert torch.equal(base.weight, torch.tensor([[1., 2], [3, 4], [5, 6]]))


def test_scales(): assert (Settings(4, 8.).scale, Settings(4, 8., rslora=True).scale, Settings(16, 8.).scale) == (2., 4., .5)


def test_patterns_begin_at_a_dot():
    "As PEFT's get_pattern_key: the end of the name, from a dot on; the first that fits"
    from peft.utils.other import get_pattern_key
    patterns = {"q_proj": 4, "layers.1.down_proj": 2, "layers.[23].up_proj": 5, "up_proj": 6}
    for name, right in {"a.q_proj": 4, "q_proj": 4, "a.fq_proj": 1, "a.q_proj2": 1, "a.layers.1.down_proj": 2, "a.layers.0.down_proj": 1, "layers.3.up_proj": 5, "layers.1.up_proj": 6}.items():
        assert by_pattern(patterns, name, 1) == patterns.get(get_pattern_key(patterns, name), 1) == right, name


def test_spectrum_by_hand():
    "diag(3, 4) turned: singular values 4 and 3, shares of squares 16/25 and 9/25"
    turn = torch.tensor([[.6, -.8], [.8, .6]])
    update = torch.zeros(3, 2)
    update[:2] = turn @ torch.diag(torch.tensor([3., 4.]))
    assert torch.allclose(singular_values(update), torch.tensor([4., 3.], dtype=torch.double), atol=1e-6)
    assert (rank_for(update, .63), rank_for(update, .65), rank_for(update*0)) == (1, 2, 0)
    assert abs(effective_rank(update) - math.exp(-(4/7*math.log(4/7) + 3/7*math.log(3/7)))) < 1e-6 and effective_rank(update*0) == 0.
    B, A = low_rank(update, 1)
    assert (tuple(B.shape), tuple(A.shape)) == ((3, 1), (1, 2)) and abs((update - B @ A).norm() - 3) < 1e-6
    assert abs(effective_rank(torch.eye(7)) - 7) < 1e-9 and rank_for(torch.eye(10), .9) == 9
    draw = torch.Generator().manual_seed(0)
    update = torch.randn(9, 6, generator=draw)
    for r in range(1, 7):
        B, A = low_rank(update, r)
        rest = singular_values(update)[r:].square().sum().sqrt()
        assert abs((update - B @ A).norm() - rest) < 1e-4
        other = torch.randn(9, r, generator=draw)
        assert (update - other @ torch.linalg.lstsq(other, update).solution).norm() >= rest - 1e-4, "a better one than the best"


# several adapters

def test_several_adapters(base, tmp_path):
    model, x = copy.deepcopy(base), ids()
    plain = model(x)
    add_lora(model, 2, 3., ["q_proj", "o_proj"], name="a", generator=torch.Generator().manual_seed(1))
    add_lora(model, 4, 2., ["v_proj", "down_proj"], name="b", generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for name in "ab":
            for lora in pairs(model, name).values(): lora.B.normal_(0, .2)
    def trained(): return {n.split(".adapters.")[1][0] for n, p in model.named_parameters() if p.requires_grad}
    outs = {}
    for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
        use_lora(model, *names)
        outs[names] = model(x)
        assert trained() == set(names)
    assert torch.equal(outs[()], plain) and not torch.allclose(outs["a",], plain) and not torch.allclose(outs["b",], outs["a",])
    assert torch.allclose(outs["a", "b"], outs["b", "a"], atol=1e-4)
    with without_lora(model):
        assert torch.equal(model(x), plain)
        with without_lora(model): assert torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), outs["b", "a"])
    merge_lora(model, unload=False)
    with without_lora(model): assert torch.equal(model(x), plain)
    assert torch.allclose(model(x), outs["b", "a"], atol=1e-4) and all(m.merged for m in model.modules() if isinstance(m, LoRALinear) and m.adapters)
    unmerge_lora(model)
    for name in "ab": save_lora(model, tmp_path/name, name)
    fresh = copy.deepcopy(base)
    for name in "ab": load_lora(fresh, tmp_path/name, name)
    for names in (("a",), ("b",), ("a", "b")):
        use_lora(fresh, *names)
        assert torch.equal(fresh(x), outs[names])
    use_lora(fresh, "b")
    merged = merge_lora(fresh)
    assert torch.allclose(merged(x), outs["b",], atol=1e-4)


def test_bf16_base_keeps_adapters_in_fp32(base, folder, ledger):
    "As PEFT: the base in bf16, the adapter and its product in fp32, the sum back in bf16"
    from transformers import AutoModelForCausalLM
    from peft import LoraConfig, get_peft_model
    case = CASES["all linear"]
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = get_peft_model(copy.deepcopy(hf), LoraConfig(r=case["r"], lora_alpha=case["alpha"], target_modules="all-linear"))
    add_lora(hf, **case)
    same_numbers(hf, theirs)
    assert all(lora.A.dtype == torch.float32 for lora in pairs(hf).values())
    x = ids()
    ours, logits = hf(input_ids=x).logits, theirs(input_ids=x).logits
    assert ours.dtype == torch.bfloat16
    ledger("LoRA over a bf16 base", "peft", (ours - logits).abs().max().item(), 0.)
