"Quantising and merging whole models: what can't be right is refused before anything changes"
import copy

import pytest
import torch
from torch import nn

from llmbench.core import UserError
from llmbench.tune.lora import add_lora
from llmbench.tune.nf4 import NF4Linear
from llmbench.tune.qlora import merge_nf4, quantize_model, survival


def model(width=96):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64))


def quantized(width=96, adapters=True):
    m = model(width)
    quantize_model(m)
    if adapters: add_lora(m, 2, 4)
    return m


def with_nan():
    m = model()
    m[1].weight.data[2, 3] = torch.nan
    return m


def only_a_head():
    m = nn.Module()
    m.lm_head = nn.Linear(64, 8)
    return m


CASES = {
    "twice": (lambda: quantize_model(quantized(adapters=False)), "2 layers are in 4 bits already, the first is 0"),
    "after adapters": (lambda: quantize_model(with_adapters()), "this model has adapters"),
    "no linear layer": (lambda: quantize_model(nn.Sequential(nn.Embedding(4, 4))), "no linear layer to put into 4 bits"),
    "only a head": (lambda: quantize_model(only_a_head()), "Skipped by name: head, lm_head"),
    "a NaN in the second layer": (lambda: quantize_model(with_nan()), "1.weight: 1 of 6144 weights are not finite, the first at [2, 3]"),
    "block": (lambda: quantize_model(model(), block=48), "48 is no block size"),
    "code": (lambda: quantize_model(model(), code="nf5"), "no code book 'nf5'"),
    "merge without adapters": (lambda: merge_nf4(quantized(adapters=False)), "this model has no adapter"),
    "merge over 32 bits": (lambda: merge_nf4(with_adapters()), "no adapter stands beside a 4-bit layer"),
    "onto another base": (lambda: merge_nf4(quantized(), model(128)), "weights of shape (128, 64), but the layer has (96, 64)"),
    "survival of nothing": (lambda: survival(torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2, 2)), "an update of zeros"),
}


def with_adapters():
    m = model()
    add_lora(m, 2, 4)
    return m


@pytest.mark.parametrize("name", CASES)
def test_refused(name):
    call, message = CASES[name]
    with pytest.raises(UserError) as caught: call()
    assert message in str(caught.value), str(caught.value)
    assert caught.value.where


def test_nothing_changes_when_a_layer_is_broken():
    m = with_nan()
    with pytest.raises(UserError): quantize_model(m)
    assert not any(isinstance(x, NF4Linear) for x in m.modules()) and all(p.requires_grad for p in m.parameters())


def test_nothing_changes_when_the_base_is_another():
    m = quantized()
    before = copy.deepcopy(m.state_dict())
    other = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 65))
    with pytest.raises(UserError): merge_nf4(m, other)
    assert set(m.state_dict()) == set(before), "the first layer was merged although the second cannot be"
