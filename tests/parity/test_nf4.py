"Four bits: codes, bytes, scales and their scales equal bitsandbytes' to the bit; errors by measurement; files both ways"
import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from llmbench.tune.nf4 import (
    CODES,
    DYNAMIC_CODE,
    FP4_CODE,
    NF4_CODE,
    NF4Linear,
    NF4Product,
    bits_per_parameter,
    byte_table,
    dequantize,
    dequantize_scales,
    from_tensors,
    nearest,
    normal_code,
    pack,
    quantize,
    quantize_scales,
    to_tensors,
    unpack,
)


@pytest.fixture(scope="module")
def bnb():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes.functional")


def drawn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "random": drawn(100, 64),
    "many": drawn(600, 512, seed=1),
    "odd": drawn(7, 33, seed=2),
    "odd and flat": drawn(1001, seed=3),
    "constant": torch.full((3, 64), .37),
    "negative constant": torch.full((3, 50), -.37),
    "zeros": torch.zeros(5, 64),
    "zero blocks": torch.cat([drawn(64, seed=4), torch.zeros(64), drawn(50, seed=5)]),
    "zeros at the end": torch.cat([drawn(64, seed=6), torch.zeros(7)]),
    "outlier": drawn(64, 128, seed=7).index_put((torch.tensor([3]), torch.tensor([7])), torch.tensor(1000.)),
    "one": drawn(1, seed=8),
    "subnormal": drawn(300, seed=9)*1e-39,
    "huge": drawn(300, seed=10)*1e36,
    "small": drawn(172, 344, seed=11)*.02,
    "midpoints": ((NF4_CODE[1:] + NF4_CODE[:-1])/2).repeat(13),
    "narrow": drawn(6, 48, seed=12),
    "midpoints in a short block": torch.cat([torch.ones(1), (NF4_CODE[1:] + NF4_CODE[:-1])/2])*(torch.rand(1, generator=torch.Generator().manual_seed(2)) + .5),  # a division and a product with the reciprocal differ
}


# the tables

def test_tables(bnb, ledger):
    ledger("NF4 code book from normal quantiles", "bitsandbytes", (NF4_CODE - bnb.get_4bit_type("nf4", device="cpu")).abs().max(), 0)
    ledger("FP4 code book", "bitsandbytes", (FP4_CODE - bnb.get_4bit_type("fp4", device="cpu")).abs().max(), 0)
    ledger("dynamic 8-bit code book", "bitsandbytes create_dynamic_map", (DYNAMIC_CODE - bnb.create_dynamic_map()).abs().max(), 0)
    assert CODES["int4"].unique().mul(7).tolist() == list(range(-7, 8))


def test_table_of_the_paper():
    "QLoRA, appendix E, as printed there"
    printed = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
               0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    assert NF4_CODE.tolist() == printed


def test_another_offset_by_scipy():
    from scipy.stats import norm
    offset = .93
    below, above = ([norm.ppf(offset - i*(offset - .5)/n) for i in range(n)] for n in (7, 8))
    by_hand = torch.tensor([*(-x for x in below), 0., *reversed(above)])/max(above)
    assert (normal_code(offset) - by_hand).abs().max() < 1e-6
    assert len(normal_code(offset).unique()) == 16


def test_nearest_equals_comparing_with_all():
    x = torch.cat([drawn(5000).clamp(-1, 1), NF4_CODE, torch.tensor([-1., 1., 0.])])
    for code in (*CODES.values(), DYNAMIC_CODE):
        assert torch.equal(code[nearest(x, code).long()], code[(x[:, None] - code).abs().argmin(1)])


def test_packing_by_hand():
    names = torch.tensor([1, 15, 7, 2, 9], dtype=torch.uint8)
    assert pack(names).tolist() == [0x1F, 0x72, 0x90]
    assert unpack(pack(names), 5).tolist() == names.tolist()
    assert unpack(pack(names[:4]), 4).tolist() == [1, 15, 7, 2]


# bit for bit

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", TENSORS)
def test_bits_equal_bitsandbytes(name, dtype, bnb, ledger):
    "Bytes, scales, nested scales, offset and what comes back, four block sizes, plain and double, NF4 and FP4"
    w, wrong = TENSORS[name].to(dtype), []
    if not w.isfinite().all(): pytest.skip(f"{name} is beyond {dtype}")
    for block in (32, 64, 256, 4096):
        for double in (False, True):
            for code in ("nf4", "fp4"):
                packed, theirs = bnb.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type=code)
                ours = quantize(w, block, double, code)
                pairs = dict(packed=(ours.packed, packed.flatten()), absmax=(ours.absmax, theirs.absmax))
                if double: pairs |= dict(nested=(ours.nested, theirs.state2.absmax), offset=(ours.offset, theirs.offset))
                if w.shape[-1] % 16 or w.shape[-1] % block == 0: pairs["back"] = (dequantize(ours), bnb.dequantize_4bit(packed, theirs).view(w.shape))  # see test_rows_that_are_no_multiple_of_the_block
                wrong += [(block, double, code, what) for what, (a, b) in pairs.items() if a.dtype != b.dtype or not torch.equal(a, b)]
    assert wrong == []
    ledger(f"4-bit bytes, scales and values, {name}, {str(dtype)[6:]}", "bitsandbytes quantize_4bit", len(wrong), 0)


def test_rows_that_are_no_multiple_of_the_block(bnb):
    "There bitsandbytes' AVX-512 code unpacks with a neighbour's scale; its own portable code and ours agree"
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    w = TENSORS["narrow"]
    packed, state = bnb.quantize_4bit(w, quant_type="nf4")
    portable = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)(packed.flatten(), state.absmax, state.code, 64, w.shape, w.dtype)
    assert torch.equal(dequantize(quantize(w)), portable)
    assert (dequantize(quantize(w)) - w).pow(2).mean().sqrt() < .12


def test_scales_of_scales(bnb):
    "Alone, where there are many, against the library's 8-bit code"
    absmax = drawn(70_001, seed=13).abs() + 2
    names, nested, offset = quantize_scales(absmax)
    theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(names, theirs) and torch.equal(nested, state.absmax)
    assert torch.equal(dequantize_scales(names, nested, offset), bnb.dequantize_blockwise(theirs, state) + offset)
    constant = quantize_scales(torch.full((300,), .5))
    assert torch.equal(dequantize_scales(*constant), torch.full((300,), .5))


def test_quantising_again_changes_nothing():
    for w in (TENSORS["many"], TENSORS["odd"], TENSORS["outlier"]):
        once = quantize(w)
        again = quantize(dequantize(once))
        assert torch.equal(once.packed, again.packed) and torch.equal(once.absmax, again.absmax)


# error and size

def test_error_on_a_normal(ledger):
    w = drawn(4096, 1024, seed=14)
    def rms(**how): return (dequantize(quantize(w, **how)) - w).pow(2).mean().sqrt().item()
    for code, published in (("nf4", .092), ("int4", .108), ("fp4", .122)):
        ledger(f"RMS error of {code} on a normal, block 64: {published}", "measured", abs(rms(code=code) - published), 1e-3)
    assert abs(rms(double=True) - rms()) < 1e-4
    assert rms(block=32) < rms(block=64) < rms(block=256) < rms(block=4096)


def test_an_outlier_stays_in_its_block():
    w = drawn(64, 64, seed=15)
    spoilt = w.clone()
    spoilt[5, 9] = 60.
    clean, dirty = ((dequantize(quantize(x)) - x).pow(2).mean(1) for x in (w, spoilt))
    assert torch.equal(clean[torch.arange(64) != 5], dirty[torch.arange(64) != 5]) and dirty[5] > 20*clean[5]
    assert (dequantize(quantize(spoilt, 4096)) - spoilt).pow(2).mean() > 10*dirty.mean()


@pytest.mark.parametrize("block,double,bits", [(64, False, 4.5), (64, True, 4.126953125), (32, False, 5.), (4096, True, 4.001983642578125)])
def test_bits_by_hand(block, double, bits):
    assert bits_per_parameter(block, double) == pytest.approx(bits, abs=1e-12)
    w = drawn(1024, 1024)
    assert 8*quantize(w, block, double).nbytes/w.numel() == pytest.approx(bits, abs=1e-4)


def test_bytes_equal_the_library(bnb):
    w = drawn(300, 200)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    theirs = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert quantize(w, double=True).nbytes == theirs


# files

@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_the_library_s(double, dtype, bnb, tmp_path):
    w = drawn(40, 128, seed=16).to(dtype)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
    theirs = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = to_tensors(quantize(w, double=double))
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and tensor.shape == theirs[key].shape and torch.equal(tensor, theirs[key]), key
    save_file(theirs, tmp_path/"w.safetensors")
    assert torch.equal(dequantize(from_tensors(load_file(tmp_path/"w.safetensors"))), dequantize(quantize(w, double=double)))


def test_state_dict_of_a_layer_is_the_library_s(bnb):
    "Both ways between NF4Linear and Linear4bit"
    import bitsandbytes
    linear = nn.Linear(128, 96)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    ours = NF4Linear.from_linear(linear)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert set(mine) == set(other) and all(torch.equal(mine[k], other[k]) for k in mine)
    empty = NF4Linear.from_linear(nn.Linear(128, 96))
    empty.load_state_dict(other)
    x = drawn(5, 128)
    assert torch.equal(empty(x), ours(x)) and (ours(x) - theirs(x)).abs().max() < 1e-6


def test_a_model_is_saved_and_loaded(tmp_path):
    torch.manual_seed(3)
    def model(): return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), NF4Linear.from_linear(nn.Linear(96, 33), block=32))
    one, two = model(), model()
    save_file(one.state_dict(), tmp_path/"m.safetensors")
    two.load_state_dict(load_file(tmp_path/"m.safetensors"))
    x = drawn(4, 64)
    assert torch.equal(one(x), two(x))
    facts = json.loads(bytes(one.state_dict()["2.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert facts["shape"] == [33, 96] and facts["blocksize"] == 32


# the layer

def test_gradient_is_that_of_the_unpacked_matrix():
    q = quantize(drawn(48, 80, seed=17), double=True)
    x = drawn(3, 5, 80, seed=18).requires_grad_()
    w = dequantize(q)
    up = drawn(3, 5, 48, seed=19)
    ours, = torch.autograd.grad(NF4Product.apply(x, q), x, up)
    right, = torch.autograd.grad(F.linear(x, w), x, up)
    assert torch.equal(ours, right)
    numeric = ((x + 1e-2*up @ w) @ w.T - (x - 1e-2*up @ w) @ w.T)/2e-2  # the same, by going a step up and down
    assert ((numeric*up).sum() - (ours*(up @ w)).sum()).abs() < 1e-2*(ours*(up @ w)).sum().abs()


def test_no_unpacked_copy_is_kept():
    layer, kept = NF4Linear.from_linear(nn.Linear(256, 512)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(drawn(2, 256).requires_grad_())
    assert sum(kept) < 256*512/8, "something as large as the matrix waits for the backward pass"
    y.sum().backward()
    assert list(layer.parameters()) == []


def test_autocast_and_checkpointing_keep_the_gradients():
    from torch.utils.checkpoint import checkpoint
    torch.manual_seed(4)
    layer, adapter = NF4Linear.from_linear(nn.Linear(64, 64)), nn.Linear(64, 64)
    x = drawn(7, 64)
    def gradient(run):
        adapter.zero_grad()
        run(lambda x: layer(torch.tanh(adapter(x)))).square().mean().backward()
        return adapter.weight.grad.clone()
    plain = gradient(lambda f: f(x))
    assert plain.abs().sum() > 0
    for reentrant in (False, True):
        assert torch.equal(gradient(lambda f, how=reentrant: checkpoint(f, x.requires_grad_(), use_reentrant=how)), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        half = gradient(lambda f: f(x).float())
    assert (half - plain).norm() < .02*plain.norm()


def test_made_and_evaluated_in_inference_mode_it_still_trains():
    byte_table.cache_clear()
    with torch.inference_mode():
        layer = NF4Linear.from_linear(nn.Linear(64, 32))
        layer(drawn(2, 64))
    x = drawn(2, 64).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, dequantize(layer.q).sum(0).expand(2, 64), atol=1e-6)


def test_casting_the_model_leaves_the_bits():
    layer = NF4Linear.from_linear(nn.Linear(64, 96))
    before = copy.deepcopy(layer.q)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(cast)
        for name in ("packed", "absmax", "nested", "offset"): assert torch.equal(getattr(layer.q, name), getattr(before, name))
    assert layer.bias.dtype == torch.float64
    assert copy.deepcopy(layer).q is not layer.q


def test_same_answer_as_linear4bit(bnb, ledger):
    import bitsandbytes
    linear = nn.Linear(192, 64)
    ours = NF4Linear.from_linear(linear)
    theirs = bitsandbytes.nn.Linear4bit(192, 64, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").train()
    x, up = drawn(11, 192), drawn(11, 64, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(a).backward(up)
    theirs(b).backward(up)
    ledger("NF4 layer, forward and gradient of its input", "bitsandbytes Linear4bit", max((ours(x) - theirs(x)).abs().max(), (a.grad - b.grad).abs().max()), 1e-5)
