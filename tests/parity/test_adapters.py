"Bottlenecks and partial freezing: by hand, against torch's own layers, and against what one real step takes"
import copy

import pytest
import torch
from torch import nn

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.tune.adapters import Bottleneck, TrainingBytes, add_bottleneck, last_blocks, train_only, training_bytes
from llmbench.tune.lora import add_lora

SHAPE = dict(vocab_size=60, d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=16)


def model(**other):
    torch.manual_seed(0)
    return Transformer(Config(**SHAPE | other))


def ids(seed=0): return torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(seed))


def test_bottleneck_by_hand():
    "y = (1, -2) + b, inside gelu(y1 + 2 y2 + 0.5), out (3, -1) times it, plus (0.25, 0)"
    base = nn.Linear(1, 2)
    layer = Bottleneck(base, 1)
    values = dict(base=([[1.], [-2.]], [.5, .25]), down=([[1., 2.]], [.5]), up=([[3.], [-1.]], [.25, 0.]))
    with torch.no_grad():
        for name, (w, b) in values.items():
            getattr(layer, name).weight.copy_(torch.tensor(w)), getattr(layer, name).bias.copy_(torch.tensor(b))
    inside = 1.5 - 3.5 + .5                                     # -1.5; gelu(-1.5) = -1.5*Phi(-1.5) = -1.5*0.0668072
    gelu = inside*.0668072
    assert torch.allclose(layer(torch.tensor([[1.]])), torch.tensor([[1.5 + 3*gelu + .25, -1.75 - gelu]]), atol=1e-5)


def test_bottleneck_equals_torch_layers(ledger):
    draw = torch.Generator().manual_seed(1)
    layer = Bottleneck(nn.Linear(7, 5), 3)
    theirs = nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 5))
    with torch.no_grad():
        for p in layer.parameters(): p.normal_(generator=draw)
        for a, b in ((theirs[0], layer.down), (theirs[2], layer.up)): a.weight.copy_(b.weight), a.bias.copy_(b.bias)
    x, g = torch.randn(4, 7, generator=draw), torch.randn(4, 5, generator=draw)
    y = layer.base(x)
    right = y + theirs(y)
    ledger("bottleneck adapter, output", "torch.nn layers", (layer(x) - right).abs().max(), 1e-6)
    (layer(x)*g).sum().backward()
    (right*g).sum().backward()
    worst = max((a.grad - b.grad).abs().max().item() for a, b in ((layer.down.weight, theirs[0].weight), (layer.down.bias, theirs[0].bias), (layer.up.weight, theirs[2].weight), (layer.up.bias, theirs[2].bias)))
    ledger("bottleneck adapter, gradients", "torch.nn layers", worst, 1e-5)
    assert layer.base.weight.grad is None


def test_bottlenecks_begin_at_nothing_and_freeze_the_rest():
    m = model()
    before = m(ids())
    assert add_bottleneck(m, 2) == [f"model.layers.{i}.{x}" for i in range(3) for x in ("self_attn.o_proj", "mlp.down_proj")]
    assert torch.equal(m(ids()), before)
    m(ids()).sum().backward()
    trained = {n for n, p in m.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in m.named_parameters() if p.grad is not None} and len(trained) == 6*4
    assert all(n.rsplit(".", 2)[-2] in ("down", "up") for n in trained)


def test_train_only_by_whole_names():
    m = nn.ModuleDict(dict(blocks=nn.ModuleList(nn.Linear(2, 2) for _ in range(12)), norm=nn.LayerNorm(2), normal=nn.Linear(2, 2)))
    assert train_only(m, ["blocks.1", "norm"]) == ["blocks.1.weight", "blocks.1.bias", "norm.weight", "norm.bias"]
    assert train_only(m, "normal.bias") == ["normal.bias"]
    assert train_only(m, []) == [] and not any(p.requires_grad for p in m.parameters())
    assert last_blocks(model(), 2) == ["blocks.1", "blocks.2", "norm"]


@pytest.mark.parametrize("names,part", [(["blocks.3"], "blocks.0, blocks.1, blocks.2"), (["block"], "blocks, embed, norm"), (["blocks.0.mlp.up"], "blocks.0.mlp.down"), ([""], "nothing is called ''")])
def test_unknown_names(names, part):
    m = model()
    with pytest.raises(UserError) as e: train_only(m, names)
    assert part in str(e.value) and all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("call,part", [(lambda: Bottleneck(nn.Linear(2, 2), 0), "from 1 up"), (lambda: Bottleneck(nn.Linear(2, 2), 2.), "2.0"), (lambda: Bottleneck(nn.Linear(2, 2), True), "True"),
                                       (lambda: last_blocks(model(), 0), "0 of 3"), (lambda: last_blocks(model(), 4), "4 of 3"), (lambda: add_bottleneck(model(), 2, ["q_proj"]), "stand alone"),
                                       (lambda: add_bottleneck(model(), 2, ["nothing"]), "'nothing'")])
def test_misuse(call, part):
    with pytest.raises(UserError) as e: call()
    assert part in str(e.value)


WAYS = {"full": lambda m: None, "last": lambda m: train_only(m, last_blocks(m, 1)), "bottleneck": lambda m: add_bottleneck(m, 3), "LoRA": lambda m: add_lora(m, 2, 4.), "bf16": lambda m: m.bfloat16()}


@pytest.mark.parametrize("way", WAYS)
def test_foreseen_bytes_are_what_a_step_takes(way, ledger):
    m = copy.deepcopy(model())
    WAYS[way](m)
    foreseen = training_bytes(m)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    m(ids()).float().logsumexp(-1).sum().backward()
    optimizer.step()
    def size(tensors): return sum(x.numel()*x.element_size() for x in tensors)
    real = TrainingBytes(size(m.parameters()), size(p.grad for p in m.parameters() if p.grad is not None), size(x for s in optimizer.state.values() for n, x in s.items() if n != "step"))
    ledger(f"bytes of training, {way}", "tensors after a step of torch.optim.AdamW", abs(foreseen.weights - real.weights) + abs(foreseen.gradients - real.gradients) + abs(foreseen.optimizer - real.optimizer), 0)
    assert real.optimizer == 2*real.gradients > 0


def test_backward_stops_at_the_lowest_trained_block():
    def reached(names):
        m, seen = model(), set()
        train_only(m, names)
        for i, block in enumerate(m.blocks): block.mlp.down.register_full_backward_hook(lambda module, given, out, i=i: seen.add(i))
        m(ids()).sum().backward()
        return seen
    assert reached(["blocks.2"]) == {2} and reached(["blocks.0"]) == {0, 1, 2} and reached(["norm"]) == set()
