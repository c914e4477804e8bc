"Pairs: files, rows, batches and the loop on them, by hand and against the real files"
import copy
import json

import pytest
import torch

from llmbench.align.pairs import PairStep, answer_row, fit_pairs, pair_batches, pair_figures, pair_rows, preference_of, prompt_key, read_preferences, stack_pairs
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import SPECIALS, BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit
from llmbench.tune.chat import ChatTemplate

U, A, S = (lambda text, role=role: dict(role=role, content=text) for role in ("user", "assistant", "system"))


@pytest.fixture(scope="module")
def template():
    "Bytes only: each character is a token"
    return ChatTemplate(BPE.train(["x"], 256 + len(SPECIALS)))


def text(template, row): return template.tokenizer.decode(row[0])
def learned(template, row): return template.tokenizer.decode([i for i, m in zip(*row) if m])


@pytest.mark.parametrize("row", [
    dict(prompt="q", chosen="good", rejected="bad"), dict(prompt=[U("q")], chosen=[A("good")], rejected=[A("bad")]), dict(chosen=[U("q"), A("good")], rejected=[U("q"), A("bad")]),
    dict(instruction="q", input="", chosen="good", rejected="bad"), {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}])
def test_five_dialects(row):
    assert preference_of(row) == dict(prompt=[U("q")], chosen=[A("good")], rejected=[A("bad")])


def test_system_history_tools_and_margin():
    row = dict(prompt=[S("sys"), U("q1"), A("a1"), U("q2")], chosen="good", rejected="bad", tools=[{"name": "f"}], margin=2)
    assert preference_of(row) == dict(prompt=row["prompt"], chosen=[A("good")], rejected=[A("bad")], tools=[{"name": "f"}], margin=2.)


@pytest.mark.parametrize("name", ["preference_en.json", "preference_zh.json"])
def test_real_files(name, data, ledger):
    "Against json and a plain mapping"
    path = data/name
    raw, pairs = json.loads(path.read_text()), read_preferences(path)
    wrong = 0
    for r, p in zip(raw, pairs, strict=True):
        wrong += p["chosen"][0]["content"] != r["chosen"]["value"] or p["rejected"][0]["content"] != r["rejected"]["value"]
        wrong += [m["content"] for m in p["prompt"]] != [t["value"] for t in r["conversations"]]
    ledger(f"preference pairs read, {name}", "json and a plain mapping", wrong, 0)
    assert f"{name} line" in pairs[3].where


def test_real_accounts_add_up(data):
    pairs = read_preferences(data/"preference_zh.json")[:60]
    template = ChatTemplate(BPE.train([m["content"] for p in pairs for m in p["prompt"]], 600))
    for length in (64, 256, 1024):
        rows, account = pair_rows(pairs, template, length)
        assert account.read == 60 == account.kept + sum(account.skipped.values()) and len(rows) == account.kept
        for chosen, rejected in rows:
            start = chosen[1].index(1)
            assert max(len(chosen[0]), len(rejected[0])) <= length and chosen[0][:start] == rejected[0][:start] and rejected[1].index(1) == start


def test_only_the_last_answer_counts(template):
    prompt = [S("s"), U("q1"), A("a1"), U("q2")]
    row = answer_row(prompt, [A("best")], template)
    assert learned(template, row) == "best<|end|>"
    assert text(template, row) == "<|bos|><|system|>s<|end|><|user|>q1<|end|><|assistant|>a1<|end|><|user|>q2<|end|><|assistant|>best<|end|>"


def test_exchanges_go_on_both_sides(template):
    "Frame 1 + 3, first exchange 8, then 2 + 2 for the question, 1 + answer + 1: 28 with the longer answer"
    pair = dict(prompt=[S("s"), U("q1"), A("a1"), U("q2")], chosen="best", rejected="worst")
    whole = len(answer_row(pair["prompt"], [A("worst")], template)[0])
    (row,), account = pair_rows([pair], template, whole)
    assert account.dropped == 0 and "q1" in text(template, row[0])
    (row,), account = pair_rows([pair], template, whole - 1)
    assert account.dropped == 1 and all("q1" not in text(template, r) and "<|system|>s" in text(template, r) for r in row)
    assert [learned(template, r) for r in row] == ["best<|end|>", "worst<|end|>"]
    rows, account = pair_rows([pair], template, len(answer_row([S("s"), U("q2")], [A("worst")], template)[0]) - 1)
    assert rows == [] and list(account.skipped) == [f"longer than {whole - 8 - 1} tokens, even the last exchange"]


def test_account(template):
    good = dict(prompt="q", chosen="a", rejected="b")
    rows, account = pair_rows([good, dict(good, rejected="a"), dict(good, chosen=""), dict(chosen=[U("q"), A("a")], rejected=[U("p"), A("b")]), dict(good, rejected="b"*99)], template, 30)
    assert account.kept == len(rows) == 1
    assert account.skipped == {"both answers are the same": 1, "an answer of zero length": 1, "chosen and rejected answer different prompts": 1, "longer than 30 tokens, even the last exchange": 1}
    assert account.first["both answers are the same"] == "pair 2"
    assert (account.tokens, account.counted) == (2*(1 + 3 + 1 + 2), 4)


def test_batches(template):
    rows, _ = pair_rows([dict(prompt="q"*(i % 5 + 1), chosen="a"*(i % 7 + 1), rejected="b"*(i % 3 + 1)) for i in range(21)], template, 40)
    ref = torch.arange(42.).view(21, 2)
    pairs = stack_pairs(rows, 0, ref, list(range(21)))
    at, again = pair_batches(pairs, 6, 2, 5), pair_batches(pairs, 6, 2, 5)
    seen = []
    for step in range(7):
        for micro in range(2):
            batch = at(step, micro)
            assert (again(step, micro).ids == batch.ids).all() and len(batch) == 6 and batch.mask.sum() == 12
            for k, m in enumerate(batch.margin.int().tolist()):
                chosen, rejected = rows[m]
                assert batch.ids[k, :len(chosen[0])].tolist() == chosen[0] and batch.ids[k + 6, :len(rejected[0])].tolist() == rejected[0]
                assert batch.both.mask[k].sum() == sum(chosen[1]) and batch.ref[k].tolist() == ref[m].tolist()
            assert (batch.both.segments.sum(1) > 0).all() and batch.ids.shape[1] == max(len(r[0]) for m in batch.margin.int().tolist() for r in rows[m])
            seen += batch.margin.int().tolist()
    assert sorted(seen[:21]) == list(range(21)), "an epoch sees each pair once"


def test_figures_by_hand():
    rewards = torch.tensor([[2., 1.], [0., 0.], [-1., 3.], [5., 4.5]])
    assert pair_figures(rewards) == dict(chosen=1.5, rejected=2.125, margin=-.625, accuracy=.5)


def test_loss_is_a_mean_over_pairs(template):
    "Not over tokens, not a mean of means: two micro-batches of unequal size, against one"
    rows, _ = pair_rows([dict(prompt="q", chosen="a"*(3*i + 1), rejected="b"*(2*i + 2)) for i in range(5)], template, 60)
    pairs = stack_pairs(rows)
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=270, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))
    def loss(model, pairs):
        lengths = pairs.both.mask.sum(1)
        spread = model(pairs.ids)[:, 0, 0].abs()*0 + lengths
        return spread.chunk(2)[0], torch.stack(spread.chunk(2), 1)
    for how, cut in ((Fit(steps=1, autocast="off"), None), (Fit(steps=1, micro=2, autocast="off"), 2)):
        def at(step, part, cut=cut): return pairs if cut is None else pairs.rows(list(range(cut)) if part == 0 else list(range(cut, 5)))
        (step,) = list(fit_pairs(copy.deepcopy(model), at, how, loss, progress=False))
        assert isinstance(step, PairStep) and abs(step.loss - sum(sum(r[0][1]) for r in rows)/5) < 1e-5 and step.tokens == 5


def test_keys_and_the_town():
    world = World(3, 8)
    pairs = world.preferences("zh")
    assert len({prompt_key(p) for p in pairs}) == len({p["prompt"] for p in pairs})
    assert prompt_key(dict(prompt=[dict(role="user", content="q")])) == prompt_key(dict(prompt=[dict(content="q", role="user")]))
