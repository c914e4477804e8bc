"Weights and states that can't be right are refused, with what, where and the mend"
from dataclasses import replace

import pytest
import torch
from torch import nn

from llmbench.core import UserError
from llmbench.tune.nf4 import NF4Linear, bits_per_parameter, dequantize, from_tensors, quantize, to_tensors

W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
Q, D = quantize(W), quantize(W, double=True)
T = to_tensors(D)


def put(value):
    w = W.clone()
    w[3, 5] = value
    return w


CASES = {
    "NaN": (lambda: quantize(put(torch.nan), where="mlp.up"), "mlp.up: 1 of 2048 weights are not finite, the first at [3, 5]"),
    "infinite": (lambda: quantize(put(-torch.inf)), "not finite"),
    "whole numbers": (lambda: quantize(torch.arange(64)), "cannot quantise torch.int64"),
    "quantised already": (lambda: quantize(Q.packed), "quantised already"),
    "64 bits": (lambda: quantize(W.double()), ".float() first"),
    "a list": (lambda: quantize([1., 2.]), "expected a tensor, found list"),
    "nothing": (lambda: quantize(torch.empty(0)), "nothing to quantise in a tensor of shape (0,)"),
    "no rows": (lambda: quantize(torch.empty(0, 64)), "(0, 64)"),
    "block 100": (lambda: quantize(W, 100), "power of two"),
    "block 8192": (lambda: quantize(W, 8192), "from 16 to 4096"),
    "block 0": (lambda: quantize(W, 0), "0 is no block size"),
    "block -64": (lambda: quantize(W, -64), "-64 is no block size"),
    "block 64.0": (lambda: quantize(W, 64.), "64.0 is no block size"),
    "block True": (lambda: bits_per_parameter(True), "True is no block size"),
    "unknown code": (lambda: quantize(W, code="nf3"), "no code book 'nf3'"),
    "bytes missing": (lambda: replace(Q, packed=Q.packed[:-1]), "1023 values where a shape of (32, 64) in blocks of 64 needs 1024"),
    "bytes too many": (lambda: replace(Q, packed=torch.cat([Q.packed, Q.packed[:1]])), "1025 values"),
    "scales missing": (lambda: replace(Q, absmax=Q.absmax[1:]), "Quantized.absmax: 31 values"),
    "scales cast": (lambda: replace(Q, absmax=Q.absmax.bfloat16()), "torch.bfloat16 where torch.float32 is needed"),
    "bytes cast": (lambda: replace(Q, packed=Q.packed.float()), "torch.float32 where torch.uint8 is needed"),
    "nested scales missing": (lambda: replace(D, nested=D.nested[:0]), "Quantized.nested: 0 values"),
    "scales of the wrong kind": (lambda: replace(D, nested=None, offset=None), "torch.uint8 where torch.float32 is needed"),
    "offset lost": (lambda: replace(D, offset=None), "go together"),
    "another shape": (lambda: replace(Q, shape=(32, 65)), "Quantized.packed"),
    "another block": (lambda: replace(Q, block=32), "Quantized.absmax"),
    "layer twice": (lambda: NF4Linear.from_linear(NF4Linear.from_linear(nn.Linear(64, 32)), where="blocks.0.up"), "blocks.0.up: this layer is in 4 bits already"),
    "no linear layer": (lambda: NF4Linear.from_linear(nn.Embedding(9, 64)), "a Embedding is no linear layer"),
    "layer of a vector": (lambda: NF4Linear(quantize(W.flatten())), "not a tensor of shape (2048,)"),
    "layer with a NaN": (lambda: NF4Linear.from_linear(with_nan(), where="up"), "up.weight: 1 of 2048"),
    "plain checkpoint": (lambda: NF4Linear(Q).load_state_dict(nn.Linear(64, 32, bias=False).state_dict()), "no 4-bit state of this weight"),
    "other checkpoint": (lambda: NF4Linear(quantize(W.T.contiguous())).load_state_dict(T), "shape (32, 64) where (64, 32) is needed"),
    "scales not in the file": (lambda: from_tensors({k: v for k, v in T.items() if k != "weight.absmax"}), "broken 4-bit state: KeyError 'weight.absmax'"),
    "facts cut": (lambda: from_tensors(T | {"weight.quant_state.bitsandbytes__nf4": T["weight.quant_state.bitsandbytes__nf4"][:-9]}), "broken 4-bit state: JSONDecodeError"),
    "file cut": (lambda: from_tensors(T | {"weight": T["weight"][:-3]}), "1021 values"),
    "another table": (lambda: from_tensors(T | {"weight.quant_map": torch.linspace(-1, 1, 16)}), "another table than ours"),
    "two states": (lambda: from_tensors(T | {"weight.quant_state.bitsandbytes__fp4": T["weight.quant_state.bitsandbytes__nf4"]}), "no 4-bit state"),
}


def with_nan():
    linear = nn.Linear(64, 32)
    linear.weight.data[1, 1] = torch.nan
    return linear


@pytest.mark.parametrize("name", CASES)
def test_refused(name):
    call, message = CASES[name]
    with pytest.raises(UserError) as caught: call()
    assert message in str(caught.value), str(caught.value)
    assert caught.value.where


def test_mends():
    for name in ("NaN", "block 100", "unknown code", "bytes missing", "layer twice", "plain checkpoint", "facts cut", "quantised already"):
        with pytest.raises(UserError) as caught: CASES[name][0]()
        assert caught.value.mend, name


def test_loading_does_not_depend_on_names_beside_it():
    assert torch.equal(dequantize(from_tensors(T | {"other": W})), dequantize(D))
