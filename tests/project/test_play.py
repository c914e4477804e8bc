"The widgets, called as a notebook's cell would: other values in, and what comes back is right"
import json
import math
import re
from pathlib import Path

import pytest
import torch

from llmbench.core import UserError
from llmbench.model.transformer import Attention, Config, Transformer
from llmbench.play.model import attention_explorer, attention_maps, decode_explorer, rope_explorer, sampling_explorer, tokens_per_second
from llmbench.play.text import batch_explorer, file_explorer, file_view, merge_explorer, merge_view, places, sample_tokenizer, tokenizer_explorer, uneven_documents
from llmbench.text.batch import pack, pad
from llmbench.text.bpe import BPE

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(bpe):
    torch.manual_seed(3)
    made = Transformer(Config(vocab_size=bpe.vocab_size, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=64, max_length=64)).eval()
    for p in made.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=.2)
    return made


@pytest.fixture(scope="module")
def bpe(): return BPE.train(["the owl of 云村, the owl at night, 12 mice"]*5, 320)


@torch.inference_mode()
@pytest.mark.parametrize("window", [0, 1, 4])
def test_maps_are_the_models_own(model, window):
    "Values mixed by the maps, through the output matrix, are what each layer really returned"
    ids, layers = [1, 40, 7, 7, 270, 12, 99], []
    hooks = [m.register_forward_hook(lambda layer, given, out: layers.append((layer, given[0], out))) for m in model.modules() if isinstance(m, Attention)]
    try: maps = attention_maps(model, ids, window)
    finally:
        for hook in hooks: hook.remove()
    assert len(maps) == len(layers) == 2
    for weights, (layer, x, out) in zip(maps, layers):
        v = layer.qkv(x)[..., -layer.kv*layer.D:].view(1, len(ids), layer.kv, layer.D).transpose(1, 2).repeat_interleave(2, 1)  # (1,H,T,D)
        mixed = (weights @ v[0]).transpose(0, 1).reshape(1, len(ids), -1)
        torch.testing.assert_close(layer.out(mixed), out, atol=1e-5, rtol=1e-4)
        assert (weights > 0).sum(-1).max() <= (window or len(ids))


@torch.inference_mode()
def test_attention_explorer_shows_the_layer_head_and_window_that_were_chosen(model, bpe):
    panel = attention_explorer("the owl at night", model, bpe)
    ids = [bpe.bos_id, *bpe.encode("the owl at night")]
    torch.testing.assert_close(panel.redraw(layer=2, head=3), attention_maps(model, ids)[1][2])
    near = panel.redraw(window=2)
    torch.testing.assert_close(near, attention_maps(model, ids, 2)[1][2])
    guess = model(torch.tensor([ids]), attend=(torch.ones(len(ids), len(ids)).tril() - torch.ones(len(ids), len(ids)).tril(-2) > 0)[None, None])[0, -1].softmax(-1)
    assert f"({guess.max():.0%})" in panel.figure.axes[0].get_title()


def test_rope_and_sampling_explorers(model, bpe):
    turns = rope_explorer(8)
    assert turns.redraw(log_base=4., factor=1.).tolist() == pytest.approx([2*math.pi*10**k for k in range(4)], rel=1e-4)
    assert turns.redraw(factor=2.)[3] == pytest.approx(4000*math.pi, rel=1e-4)
    sampler = sampling_explorer("the owl", model, bpe)
    assert int((sampler.redraw(top_k=3) > 0).sum()) == 3 and f"3 of {bpe.vocab_size} tokens" in sampler.figure.axes[0].get_title()
    assert sampler.redraw(top_k=0, temperature=.05).max() > sampler.redraw(temperature=3.).max()


def test_decode_explorer_times_both_ways(model, monkeypatch):
    panel = decode_explorer(model)
    speed = panel.redraw(rows=3)
    assert set(speed) == {"modules", "flat"} and min(speed.values()) > 0
    assert [float(t.get_text().replace(",", "")) for t in panel.figure.axes[0].texts] == [round(v) for v in speed.values()]
    clock = iter([10., 10.5])
    monkeypatch.setattr("llmbench.play.model.time.process_time", lambda: next(clock))
    assert tokens_per_second(model, 3, True, tokens=24) == pytest.approx(3*24/.5)


def test_tokenizer_and_merge_explorers(bpe):
    panel = tokenizer_explorer("the owl", bpe)
    assert "<b>7 tokens</b>" in panel.redraw(merges=0) and f"<b>{len(bpe.encode('the owl'))} tokens</b>" in panel.redraw(merges=len(bpe.merges))
    steps = bpe.steps(" owl")
    view = merge_view(bpe, " owl", 99)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"merge ([\d,]+)<", view)]
    assert len(numbers) == len(steps) - 1
    for number, before, after in zip(numbers, steps, steps[1:]):
        left, right = bpe.merges[number - 1]
        made = bpe.vocab[left + right]
        assert after.count(made) == before.count(made) + 1 and len(after) == len(before) - 1
    assert merge_explorer("x", bpe).redraw(word="", step=5).startswith("<div>step 0 of 0")


def test_the_last_merge_of_a_word_is_found_at_its_end():
    bpe = sample_tokenizer(600)
    for word in (" lives", "aaaa", "林", " works"):
        view, steps = merge_view(bpe, word, 99), bpe.steps(word)
        assert view.count("merge ") == len(steps) - 1


def test_a_tokenizer_file_of_ones_own(tmp_path, bpe):
    bpe.save(tmp_path)
    panel = file_explorer(tmp_path, "the owl")
    shown = panel.redraw()
    assert f">{len(bpe.merges)}<" in shown and "&lt;|pad|&gt;" in shown and f"<b>{len(bpe.encode('the owl'))} tokens</b>" in shown
    smaller = BPE.train(["aaaa bbbb"], 266)
    smaller.save(tmp_path)  # the same path, another content: the old tokenizer must not be remembered
    assert f">{len(smaller.merges)}<" in file_view(tmp_path, "aaaa")
    d = json.loads((tmp_path/"tokenizer.json").read_text())
    (tmp_path/"tokenizer.json").write_text(json.dumps(d | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(UserError, match="normalises text"): panel.redraw(text="x")
    with pytest.raises(UserError, match="cannot read"): panel.redraw(path=str(tmp_path/"none"))


def test_batch_explorer_counts_places():
    rows = uneven_documents(9, 20, seed=4)
    lengths = [len(ids) for ids, _ in rows]
    assert min(lengths) >= 2 and max(lengths) <= 20 and len(set(lengths)) > 3
    panel = batch_explorer()
    padded, packed = panel.redraw(documents=9, longest=20, row=24, seed=4)
    assert padded == pytest.approx(sum(lengths)/(9*max(lengths))) and packed == pytest.approx(pack(rows, 24).filled()) and packed >= padded
    titles = [ax.get_title() for ax in panel.figure.axes]
    assert f"{9*max(lengths)} places" in titles[0] and f"{24*len(pack(rows, 24))} places" in titles[1]
    image = places(pad(rows))
    assert (image[..., 3] == 0).sum() == 9*max(lengths) - sum(lengths), "padding is empty"
    assert (image[:, 0, 3] == .55).all() and (image[..., 3] == 1).sum() == sum(lengths) - 9, "a document's first token does not count"


PLAYED = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in str(p) and "practice" not in p.stem and p.stem not in ("start", "99_cli", "10_corpus")]


@pytest.mark.parametrize("path", PLAYED, ids=lambda p: p.stem)
def test_play_sections_hold_a_live_widget(path):
    "A section that only talks of a widget is none (STYLE.md)"
    if "9_box" in str(path) or path.stem in ("33_parallel", "53_rollout", "53a_loop", "85_data"): pytest.skip("processes, loops and commands have no slider")
    cells = json.loads(path.read_text())["cells"]
    if path.parent.name == "7_play": mine = cells
    else:
        starts = [i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and re.search(r"^## Play", "".join(c["source"]), re.M)]
        assert starts, f"{path.name} has no Play section"
        rest = cells[starts[0] + 1:]
        mine = rest[:next((i for i, c in enumerate(rest) if c["cell_type"] == "markdown" and re.search(r"^## ", "".join(c["source"]), re.M)), len(rest))]
    assert any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for c in mine for o in c.get("outputs", [])), f"{path.name}: no widget in its Play section"
