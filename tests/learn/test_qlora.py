"Adapters learn beside four bits; merged over four bits the lesson is lost, onto the original weights it stays"
import copy

import pytest
import torch

from llmbench.model.transformer import Transformer
from llmbench.play.model import town_folder
from llmbench.text.batch import pad
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.lora import add_lora, lora_layers
from llmbench.tune.nf4 import dequantize
from llmbench.tune.qlora import merge_nf4, quantize_model, survival
from llmbench.tune.sft import SFT, batches, rows_of


@pytest.fixture(scope="module")
def lesson():
    "Base, the same in 4 bits with adapters after 60 steps, and a function that measures"
    torch.set_num_threads(1)
    base, bpe = Transformer.from_pretrained(town_folder()/"base"), BPE.load(town_folder()/"base")
    rows, _ = rows_of(World(0, 50).conversations("en", "sft"), ChatTemplate(bpe), 96)
    held = [pad(rows[1::16])]
    tuned = copy.deepcopy(base)
    quantize_model(tuned)
    before = [evaluate(m, held) for m in (base, tuned)]
    add_lora(tuned, 8, 16, generator=torch.Generator().manual_seed(0))
    bits = {path: layer.base.q.packed.clone() for path, layer in lora_layers(tuned).items()}
    how = Fit(steps=60, lr=3e-4, matrix_lr=0., warmup=5, autocast="off", valid_every=10**9)
    for _ in fit(tuned, batches(rows[::2], SFT(steps=60, batch=8, length=96), pad_id=bpe.pad_id), how, progress=False): pass
    assert all(torch.equal(layer.base.q.packed, bits[path]) for path, layer in lora_layers(tuned).items()), "the base has moved"
    return base, tuned, before, lambda model: evaluate(model, held)


def test_rounding_costs_little_and_adapters_learn(lesson):
    _, tuned, (full, rounded), measure = lesson
    assert abs(rounded - full) < .15 # the base model has never seen this format: a loose end of its loss
    assert measure(tuned) < rounded - .5


def test_only_one_way_into_four_bits_keeps_the_lesson(lesson):
    base, tuned, (_, rounded), measure = lesson
    kept = measure(tuned)
    gain = rounded - kept
    losses = {(onto is not None, four): measure(merge_nf4(copy.deepcopy(tuned), onto, four, torch.float32)) for onto in (None, base) for four in (False, True)}
    assert abs(losses[False, False] - kept) < 1e-3
    assert losses[False, True] > kept + .5*gain, "merged over 4 bits, more than half of what was learned should be gone"
    assert losses[True, False] < kept + .2*gain and losses[True, True] < kept + .2*gain
    for path, layer in lora_layers(tuned).items():
        delta = layer.delta("default").detach()
        for onto, (low, high) in ((None, (-.1, .5)), (base, (.7, 1.3))):
            start = dequantize(layer.base.q) if onto is None else base.get_submodule(path).weight.detach()
            after = dequantize(merge_nf4(copy.deepcopy(tuned), onto, True).get_submodule(path).q)
            assert low < survival(start, after, delta) < high, (path, onto is None)
