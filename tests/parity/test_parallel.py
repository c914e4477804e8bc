"DDP, FSDP2 and tensor parallelism in two processes equal one process to 1e-6; what each holds equals the formula"
import pytest
import torch

from llmbench.model.transformer import Transformer
from llmbench.train.budget import memory
from llmbench.train.parallel import SMALL, example, launch, regrouped, train


@pytest.fixture(scope="module")
def one(): return launch(train, 1, "one")[0]


def test_launched_equals_unlaunched(one):
    "The reference is an ordinary loop without any process group"
    from llmbench.train.loss import next_token_loss
    torch.manual_seed(0)
    model, losses = Transformer(SMALL), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        ids, mask = example(step)
        loss = next_token_loss(model(ids), ids, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert max(abs(a - b) for a, b in zip(losses, one["losses"])) < 1e-6
    assert len({round(x, 3) for x in losses}) > 1


@pytest.mark.parametrize("how, plan", [("ddp", dict(gpus=2)), ("fsdp", dict(gpus=2, sharding="zero3")), ("tp", dict(gpus=2, tensor=2))])
def test_two_processes_equal_one(how, plan, one, ledger):
    both = launch(train, 2, how)
    assert len({r["pid"] for r in both}) == 2
    ledger(f"four steps, two processes, {how}: loss", "one process", max(abs(a - b) for r in both for a, b in zip(r["losses"], one["losses"])), 1e-6)
    parts = memory(SMALL, "full", 1, 24, precision="fp32", **plan).parts
    for name in ("weights", "gradients", "optimizer"):
        ledger(f"bytes of {name} on a process, {how}, relative", "formula of train.budget", max(abs(r[name]/parts[name] - 1) for r in both), .01)
    shapes = {name.removeprefix("module."): shape for name, shape in both[1]["shapes"].items()}
    assert shapes["blocks.0.attention.qkv.weight"] == dict(ddp=[128, 64], fsdp=[64, 64], tp=[64, 64])[how]
    assert shapes["blocks.0.attention.out.weight"] == dict(ddp=[64, 64], fsdp=[32, 64], tp=[64, 32])[how]
    assert shapes["embed.weight"] == dict(ddp=[97, 64], fsdp=[48, 64], tp=[97, 64])[how]


def test_mean_of_means_is_another_training(one):
    "Each process divides by its own tokens (42 and 5): the true loss is the same at the start, and another after one step"
    wrong = launch(train, 2, "ddp", 4, False)[0]["losses"]
    assert abs(wrong[0] - one["losses"][0]) < 1e-6 and all(abs(a - b) > 1e-3 for a, b in zip(wrong[1:], one["losses"][1:]))


def test_rows_by_part_and_head():
    assert regrouped((4, 2, 2), 2).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert regrouped((6, 3), 3).tolist() == [0, 1, 6, 2, 3, 7, 4, 5, 8]
    rows = regrouped((64, 32, 32), 2)
    q = torch.arange(64)//16
    heads = [set(q[half[half < 64]].tolist()) for half in rows.chunk(2)]
    assert heads == [{0, 1}, {2, 3}], "a head stays whole, and its key head with it"
