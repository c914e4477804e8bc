"Attention and RoPE refuse what makes no sense, and say why"
import pytest
import torch

from llmbench.core import UserError
from llmbench.model.attention import KVCache, causal_mask, rope, rope_frequencies

LLAMA3 = dict(rope_type="llama3", factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64)


@pytest.mark.parametrize("scaling, where, what", [
    (dict(rope_type="yarn", factor=2.), "rope_scaling", "'yarn' is not known"),
    (dict(rope_type=3), "rope_scaling", "3 is not known"),
    (dict(rope_type="linear"), "rope_scaling.factor", "found None"),
    (dict(rope_type="linear", factor=0), "rope_scaling.factor", "found 0"),
    (dict(rope_type="ntk", factor=-2.), "rope_scaling.factor", "found -2.0"),
    (dict(rope_type="linear", factor="4"), "rope_scaling.factor", "found '4'"),
    (dict(rope_type="linear", factor=True), "rope_scaling.factor", "found True"),
    (dict(rope_type="linear", factor=float("nan")), "rope_scaling.factor", "found nan"),
    (dict(rope_type="dynamic", factor=2.), "rope_scaling.original_max_position_embeddings", "found None"),
    *((dict(LLAMA3, **{name: None}), f"rope_scaling.{name}", "found None") for name in LLAMA3 if name != "rope_type"),
    (dict(LLAMA3, low_freq_factor=4.), "rope_scaling.high_freq_factor", "above low_freq_factor"),
])
def test_scaling_names_the_field(scaling, where, what):
    with pytest.raises(UserError, match=what) as error: rope_frequencies(8, scaling=scaling)
    assert error.value.where == where
    with pytest.raises(UserError): rope(torch.ones(1, 1, 2, 8), torch.arange(2), scaling=scaling)


def test_an_odd_head_cannot_turn():
    with pytest.raises(ValueError, match="7 is odd"): rope_frequencies(7)


@pytest.mark.parametrize("how, what", [(dict(queries=3, keys=2), "only 2 keys"), (dict(queries=3, window=0), "window=0"), (dict(queries=0, keys=-1), "only -1 keys")])
def test_masks(how, what):
    with pytest.raises(ValueError, match=what): causal_mask(**how)


def test_a_full_cache_says_so_and_is_not_harmed():
    cache = KVCache(1, 1, 1, 3, 2)
    cache.update(0, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="holds 3 positions, and 4 are asked for"): cache.update(0, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert cache.length == 2
    assert cache.update(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))[0].shape[2] == 3
