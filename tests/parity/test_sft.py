"Rows, their account, batches and the loss of supervised tuning: by hand, and against TRL's SFTTrainer"
import copy
from dataclasses import replace

import pytest
import torch

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pad
from llmbench.text.bpe import SPECIALS, BPE
from llmbench.train.loop import batch_loss, evaluate
from llmbench.tune.chat import ChatTemplate, read_conversations
from llmbench.tune.sft import SFT, Account, batches, exchanges, rows_of, sft, shorten

U, A, S, T = (lambda text, role=role: dict(role=role, content=text) for role in ("user", "assistant", "system", "tool"))
CALL = dict(role="assistant", content="", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
TALK = [S("sys"), U("q1"), A("a1"), U("q2 longer"), A("a2 longer still"), U("q3"), A("a3")]


@pytest.fixture(scope="module")
def template():
    "Bytes only: each character is a token, so lengths can be counted on the fingers"
    return ChatTemplate(BPE.train(["x"], 256 + len(SPECIALS)))


def learned(template, row): return template.tokenizer.decode([i for i, m in zip(*row) if m])
def text(template, row): return template.tokenizer.decode(row[0])


FRAME = "<|bos|><|system|>sys<|end|>"
Q1, Q2, Q3 = (f"<|user|>{q}<|end|><|assistant|>{a}<|end|>" for q, a in (("q1", "a1"), ("q2 longer", "a2 longer still"), ("q3", "a3")))
LONG = len("q1a1") + 4, len("q2 longera2 longer still") + 4, len("q3a3") + 4  # 8, 28 and 8 tokens; the frame has 1 + 5
BY_HAND = [
    # length, keep, text of the row, learned, exchanges dropped
    (6 + 44, "last",  FRAME + Q1 + Q2 + Q3, "a1<|end|>a2 longer still<|end|>a3<|end|>", 0),
    (6 + 43, "last",  FRAME + Q2 + Q3, "a2 longer still<|end|>a3<|end|>", 1),
    (6 + 36, "last",  FRAME + Q2 + Q3, "a2 longer still<|end|>a3<|end|>", 1),
    (6 + 35, "last",  FRAME + Q3, "a3<|end|>", 2),
    (6 + 8,  "last",  FRAME + Q3, "a3<|end|>", 2),
    (6 + 7,  "last",  None, None, 0),
    (6 + 43, "first", FRAME + Q1 + Q2, "a1<|end|>a2 longer still<|end|>", 1),
    (6 + 35, "first", FRAME + Q1, "a1<|end|>", 2),
    (6 + 7,  "first", None, None, 0),
    (6 + 43, "skip",  None, None, 0),
    (6 + 44, "skip",  FRAME + Q1 + Q2 + Q3, "a1<|end|>a2 longer still<|end|>a3<|end|>", 0),
    (6 + 43, "cut",   FRAME + Q1 + Q2 + Q3[:-len("<|end|>")], "a1<|end|>a2 longer still<|end|>a3", 0),
    (6 + 16, "cut",   FRAME + Q1 + "<|user|>q2 long", "a1<|end|>", 0),
]


@pytest.mark.parametrize("length,keep,row_text,counts,dropped", BY_HAND)
def test_truncation_by_hand(length, keep, row_text, counts, dropped, template):
    rows, account = rows_of([{"messages": TALK}], template, length, keep)
    if row_text is None:
        assert rows == [] and account.kept == 0 and sum(account.skipped.values()) == 1
        assert list(account.skipped) == [f"longer than {length} tokens" + ("" if keep == "skip" else ", even a single exchange")]
        return
    (row,) = rows
    assert text(template, row) == row_text and learned(template, row) == counts and len(row[0]) <= length
    assert (account.read, account.kept, account.short, account.dropped) == (1, 1, int(dropped > 0), dropped)
    assert account.cut == (keep == "cut") and account.tokens == len(row[0]) and account.counted == sum(row[1])


def test_lengths_of_the_example(template):
    assert LONG == (8, 28, 8) and len(template.render(TALK)[0]) == 50


def test_exchanges_keep_tools_together(template):
    talk = [U("q1"), A("a1"), U("q2"), CALL, T("14"), CALL, T("15"), A("a2")]
    assert exchanges(talk) == ([], [talk[:2], talk[2:]])
    assert exchanges([S("s"), *talk]) == ([S("s")], [talk[:2], talk[2:]])
    assert exchanges([A("hi"), U("q")]) == ([], [[A("hi")], [U("q")]])
    assert exchanges([S("s")]) == ([S("s")], [])
    whole = len(template.render(talk)[0])
    (row,), account = rows_of([{"messages": talk}], template, whole - 1)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call><|end|>'
    assert learned(template, row) == call + call + "a2<|end|>" and account.dropped == 1
    assert rows_of([{"messages": talk}], template, whole - 9)[0] == [], "the call may not be parted from its answer"


def test_tools_count_and_stay(template):
    tools = [{"name": "f"}]
    with_tools, without = template.render(TALK[1:], tools)[0], template.render(TALK[1:])[0]
    (row,), _ = rows_of([{"messages": TALK[1:], "tools": tools}], template, len(with_tools) - 1)
    assert '{"name": "f"}' in text(template, row) and learned(template, row) == "a2 longer still<|end|>a3<|end|>"
    assert rows_of([{"messages": TALK[1:3], "tools": tools}], template, len(template.render(TALK[1:3])[0]))[0] == []
    assert len(without) < len(with_tools)


@pytest.mark.parametrize("keep", ["last", "first"])
def test_drops_as_few_as_possible(keep, template):
    "Against trying one after the other, for every length"
    talk = [m for i in range(9) for m in (U("q"*(i*7 % 5 + 1)), A("a"*(i*5 % 11 + 1)))]
    for length in range(5, len(template.render(talk)[0]) + 2):
        right = next(((template.render(talk[2*n:] if keep == "last" else talk[:18 - 2*n]), n) for n in range(9)
                      if len(template.render(talk[2*n:] if keep == "last" else talk[:18 - 2*n])[0]) <= length), (None, 0))
        rows, account = rows_of([{"messages": talk}], template, length, keep)
        assert (rows, account.dropped) == ([right[0]] if right[0] else [], right[1]), length
        assert shorten(talk, template, length, keep) == right


def test_account_of_everything(template):
    talks = [{"messages": TALK}, {"messages": TALK[:3]}, {"messages": TALK[:2]}, {"messages": [U("x"*90), A("y")]}, {"messages": TALK[:3], "label": False}, {"messages": TALK[:3], "label": True}]
    rows, account = rows_of(talks, template, 40)
    assert (account.read, account.kept, account.short, account.dropped, account.cut) == (6, 3, 1, 2, 0)
    assert account.skipped == {"nothing in it counts": 1, "longer than 40 tokens, even a single exchange": 1, "marked as a bad answer": 1}
    assert account.read == account.kept + sum(account.skipped.values())
    assert (account.tokens, account.counted) == (14*3, 3*3) == (sum(len(i) for i, _ in rows), sum(sum(m) for _, m in rows))
    assert str(account).split("\n")[:2] == ["6 conversations read, 3 kept", "  1 of them shortened by 2 whole exchanges"]
    assert sorted(str(account).split("\n")[2:5]) == ["  1 skipped: longer than 40 tokens, even a single exchange", "  1 skipped: marked as a bad answer", "  1 skipped: nothing in it counts"]
    assert str(account).split("\n")[5:] == ["42 tokens, 9 of them (21%) in the loss"]
    assert str(Account()) == "0 conversations read, 0 kept\n0 tokens, 0 of them (0%) in the loss"


def test_cut_rows_without_an_answer_are_skipped(template):
    rows, account = rows_of([{"messages": [U("x"*90), A("y")]}, {"messages": [U("q"), A("")]}], template, 20, "cut")
    assert [learned(template, r) for r in rows] == ["<|end|>"] and account.skipped == {"nothing in it counts": 1} and account.cut == 0


def test_real_accounts(data):
    talks = read_conversations(data/"sharegpt_toolcall_zh.json")
    template = ChatTemplate(BPE.train([m["content"] for c in talks for m in c["messages"]], 1000))
    for keep in ("last", "first", "skip", "cut"):
        rows, account = rows_of(talks, template, 256, keep)
        assert account.read == 300 == account.kept + sum(account.skipped.values()) and len(rows) == account.kept
        assert all(len(ids) == len(mask) <= 256 and any(mask) and not mask[0] for ids, mask in rows)
        ends = sum(ids[-1] != template.tokenizer.end_id for ids, _ in rows)
        assert (ends > 0) == (keep == "cut") and (account.cut > 0) == (keep == "cut")
        for _, place in account.first.items(): assert "sharegpt_toolcall_zh.json line" in place


# batches

def rows_for(template, n=23): return rows_of([{"messages": [U("q"*(i % 7 + 1)), A("a"*(i*3 % 8 + 1))]} for i in range(n)], template, 32)[0]


def test_batches_are_pure_and_mixed(template):
    rows, old = rows_for(template), [([1, *range(7, 25 + i), 2], [1]*(20 + i)) for i in range(9)]
    config = SFT(batch=8, length=32, replay=1/4, micro=2, seed=3)
    one, two = batches(rows, config, old), batches(rows, config, old)
    seen = [two(step, micro).ids for step in range(3) for micro in range(2)][::-1]
    for k, (step, micro) in enumerate((s, m) for s in range(3) for m in range(2)): assert (one(step, micro).ids == seen[5 - k]).all()
    assert not (one(0, 0).ids == one(0, 1).ids).all(), "two micro-batches of one step are the same rows"
    assert not (one(0, 1).ids == one(1, 0).ids).all(), "the second micro-batch of a step is the first of the next"
    batch = one(5, 1)
    assert tuple(batch.ids.shape) == (8, 32)
    replayed = (batch.ids[:, 0] == 1) & (batch.ids[:, 1] == 7)
    assert replayed.tolist() == [False]*6 + [True]*2
    assert not batches(rows, replace(config, seed=4), old)(0).ids.equal(one(0).ids)
    assert len(batches(rows, replace(config, replay=0.), old)(0)) == 8 == len(batches(rows, config)(0))


def test_an_epoch_sees_each_row_once(template):
    rows = rows_for(template, 24)
    at = batches(rows, SFT(batch=8, length=32, packed=False))
    seen = sorted(tuple(r[:len(ids)].tolist()) for s in range(3) for r, ids in zip(at(s).ids, [None]*8) for ids in [[i for i in r.tolist() if i]])
    assert seen == sorted(tuple(ids) for ids, _ in rows)


def test_masks_reach_the_loss(template):
    rows = rows_for(template, 8)
    packed, padded = batches(rows, SFT(batch=1, length=200))(0), batches(rows, SFT(batch=8, length=32, packed=False))(0)
    assert packed.mask.sum() == padded.mask.sum() == sum(sum(m) for _, m in rows)
    every = batches(rows, SFT(batch=8, length=32, packed=False, masked=False))(0)
    assert every.mask.sum() == sum(len(ids) - 1 for ids, _ in rows)
    model = Transformer(Config(vocab_size=300, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48))
    assert abs(batch_loss(model, packed) - batch_loss(model, padded)) < 1e-5


def test_misuse(template):
    rows = rows_for(template)
    for call, what in ((lambda: batches([], SFT()), "no row to learn from"), (lambda: batches(rows, SFT(length=8)), "but SFT.length is 8"), (lambda: batches(rows, SFT(replay=1.), rows), "leaves no room"),
                       (lambda: rows_of([], template, 8, "middle"), "unknown way to shorten"), (lambda: list(sft(None, [], progress=False)), "no row")):
        with pytest.raises(UserError, match=what) as caught: call()
        assert caught.value.mend


def test_stopped_run_goes_on(template, tmp_path):
    rows = rows_for(template)
    torch.manual_seed(5)
    base = Transformer(Config(vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))
    config = SFT(steps=6, batch=4, length=32, warmup=2, micro=2)
    straight, broken = copy.deepcopy(base), copy.deepcopy(base)
    whole = [s.loss for s in sft(straight, rows, config, rows, rows, progress=False)]
    again = [s.loss for s in sft(broken, rows, config, rows, rows, tmp_path, progress=False)]
    assert whole == again and all(torch.equal(a, b) for a, b in zip(straight.parameters(), broken.parameters()))
    assert list(sft(copy.deepcopy(base), rows, config, rows, rows, tmp_path, progress=False)) == []


def test_micro_batches_reach_the_loop(template):
    rows = rows_for(template, 8)
    model = Transformer(Config(vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))
    (once,), (twice,) = (list(sft(copy.deepcopy(model), rows, SFT(steps=1, batch=4, length=32, packed=False, micro=n), progress=False)) for n in (1, 2))
    assert twice.tokens == sum(sum(m) for _, m in rows) > once.tokens > 0, "two micro-batches of four are all eight rows"


def test_decay_reaches_the_optimizer(template):
    "One step of AdamW shrinks a matrix by rate x decay; norms are left alone, and the default is the loop's"
    rows, model = rows_for(template, 8), Transformer(Config(vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48))
    tuned = {}
    for decay in (0., .1, .5):
        tuned[decay] = copy.deepcopy(model)
        step, = sft(tuned[decay], rows, SFT(steps=1, batch=4, length=32, packed=False, lr=.01, matrix_lr=0., decay=decay, autocast="off"), progress=False)
    for start, free, held in zip(model.parameters(), tuned[0.].parameters(), tuned[.5].parameters()):
        torch.testing.assert_close(free - held, (step.lr*.5*start if start.ndim > 1 else torch.zeros_like(start)), atol=1e-7, rtol=1e-4)
    plain = copy.deepcopy(model)
    list(sft(plain, rows, SFT(steps=1, batch=4, length=32, packed=False, lr=.01, matrix_lr=0., autocast="off"), progress=False))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tuned[.1].parameters()))


# TRL

@pytest.fixture(scope="module")
def trl_world(tmp_path_factory):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    template = ChatTemplate(BPE.train(["Who lives in Oldtown? Ann does. She bakes bread. "]*3, 320))
    torch.manual_seed(2)
    model = Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48))
    folder = tmp_path_factory.mktemp("trl")
    model.save_pretrained(folder)
    template.save(folder)
    return template, model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PreTrainedTokenizerFast.from_pretrained(folder), folder


TALKS = [{"messages": TALK}, {"messages": [U("Who lives in Oldtown?"), A("Ann does.")]}, {"messages": [U("Who?"), A("")]},
         {"messages": [S("Be brief."), U("谁？"), A("安。"), U("Does she bake?"), A("She bakes bread ☃")]},
         {"messages": [U("Who lives in Oldtown, and since when, and what does she do there all day?"), A("Ann.")]}]


@pytest.mark.parametrize("length,keep", [(256, "last"), (40, "cut")])
def test_equals_trl(length, keep, trl_world, ledger):
    "From messages to the loss: SFTTrainer's rows, labels and loss"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    template, model, theirs, tokenizer, folder = trl_world
    trainer = SFTTrainer(theirs, SFTConfig(output_dir=str(folder/"out"), assistant_only_loss=True, max_length=length, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4),
                         train_dataset=Dataset.from_list([{"messages": c["messages"]} for c in TALKS]), processing_class=tokenizer)
    rows, account = rows_of(TALKS, template, length, keep)
    got = list(trainer.train_dataset)
    assert account.kept == len(got) and (account.cut, account.skipped) == ((2, {"nothing in it counts": 1}) if keep == "cut" else (0, {}))
    assert [(g["input_ids"], [int(label != -100) for label in g["labels"]]) for g in got] == rows
    assert all(label in (-100, i) for g in got for label, i in zip(g["labels"], g["input_ids"]))
    batch = trainer.data_collator(got)
    ours = pad(rows, pad_id=template.tokenizer.pad_id)
    assert batch["input_ids"].tolist() == ours.ids.tolist()
    assert batch["labels"].tolist() == ours.ids.masked_fill(ours.mask == 0, -100).tolist()
    with torch.no_grad(): loss = trainer.compute_loss(trainer.model, dict(batch))
    ledger(f"SFT loss from messages, {keep}", "trl SFTTrainer", abs(float(loss) - evaluate(model, [ours])), 1e-5)
