"Expansion against training in one go, tokenizers, transformers and pencil"
import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pack
from llmbench.text.bpe import BPE
from llmbench.text.merges import GPT2_PATTERN
from llmbench.text.world import World
from llmbench.train.loop import Fit, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.vocab import WORDS, check_rows, expand_bpe, expand_model, grown, new_rows, pieces_of, save_expanded, tokens_per_character, train_rows, whole_or_part

TOWN = World(0, 20)
SHOP = TOWN.documents("both", "shop")[:400]
OLD = BPE.train(TOWN.documents("both")[:400], 500)
NEW = expand_bpe(OLD, SHOP, 150, WORDS)
MIXED = ["A kettle 水壶 for 3 铜钱?", "龘😀é", "", "\n\n  的价格是", "ｆｕｌｌ 宽", *SHOP[:40], *TOWN.documents("both")[:40]]


def tiny(tied=True, vocabulary=500, seed=0):
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=vocabulary, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=64, tied=tied)).eval()
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=.3)
    return model


@pytest.mark.parametrize("pattern, lang", [(None, "en"), (None, "zh"), (GPT2_PATTERN, "en")])
def test_going_on_equals_training_in_one_go(pattern, lang, ledger):
    texts = World(1, 30).documents(lang)[:600]
    args = dict(pattern=pattern) if pattern else {}
    once, twice = BPE.train(texts, 640, **args), expand_bpe(BPE.train(texts, 520, **args), texts, 120, least=1)
    ledger(f"merges of an expanded vocabulary, {lang}, {'GPT-2' if pattern else 'own'} pattern", "training in one go", sum(a != b for a, b in zip(once.merges, twice.merges)) + abs(len(once.merges) - len(twice.merges)), 0)
    assert once.vocab == twice.vocab and once.patterns == twice.patterns


def test_going_on_equals_the_librarys_training(ledger):
    "A vocabulary begun by tokenizers' own trainer, ended by ours, against tokenizers' alone"
    tokenizers = pytest.importorskip("tokenizers")
    texts = World(2, 30).documents("en")[:600]
    def theirs(size):
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(tokenizers.Regex(GPT2_PATTERN), "isolated"), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        t.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        model = json.loads(t.to_str())["model"]
        return BPE(model["vocab"], [tuple(m) for m in model["merges"]], {}, (GPT2_PATTERN,))
    small, large = theirs(400), theirs(520)
    assert small.merges == large.merges[:len(small.merges)]
    ours = expand_bpe(small, texts, large.vocab_size - small.vocab_size, least=1)
    ledger("merges on top of tokenizers' vocabulary", "tokenizers.BpeTrainer", sum(a != b for a, b in zip(ours.merges, large.merges)) + abs(len(ours.merges) - len(large.merges)), 0)
    assert ours.vocab == large.vocab


def test_old_tokens_stay():
    assert all(NEW.vocab[token] == i for token, i in OLD.vocab.items()) and NEW.merges[:len(OLD.merges)] == OLD.merges
    assert sorted(NEW.token_bytes) == list(range(650)) and NEW.special_ids == OLD.special_ids
    assert all(NEW.decode(NEW.encode(t)) == t for t in MIXED)
    wider = BPE(OLD.vocab, OLD.merges, OLD.special_ids, (WORDS,))
    for t in MIXED: # a text that uses no new token is cut as before
        if max(NEW.encode(t), default=0) < 500: assert NEW.encode(t) == wider.encode(t) == OLD.encode(t)
    assert len([t for t in MIXED if max(NEW.encode(t), default=0) < 500]) >= 2
    assert tokens_per_character(NEW, SHOP) < .7*tokens_per_character(OLD, SHOP)


def test_gaps_and_specials_behind_are_respected():
    "Ids of a loaded tokenizer may have holes, and specials may come last"
    vocab = {t: i + (i > 300)*7 for t, i in OLD.vocab.items() if t not in OLD.special_ids}
    vocab |= {"<|end|>": 900}
    holes = BPE(vocab, OLD.merges, {"<|end|>": 900})
    more = expand_bpe(holes, SHOP, 30, WORDS)
    assert sorted(set(more.vocab.values()) - set(vocab.values())) == list(range(901, 931)) and more.end_id == 900
    assert [more.token_bytes[i] for i in range(901, 931)] == [NEW.token_bytes[i] for i in range(500, 530)]


def test_new_tokens_hold_whole_characters():
    "Every token that is neither text nor inside one character is an old one"
    text = ["水壶水壶铜钱的价格铜钱的价格"*3, "ああいい"*5, "😀😃"*9]
    crossing = BPE.train(text, 300, pattern=r"\p{L}+|\P{L}+")
    assert any(not whole_or_part(t) for t in crossing.vocab if t not in crossing.special_ids), "plain training does cross"
    made = expand_bpe(BPE.train("x", 263), text, 60, r"\p{L}+|\P{L}+")
    assert made.vocab_size > 290 and all(whole_or_part(t) for t in made.vocab if t not in made.special_ids)
    assert any(len(made.token_bytes[i].decode("utf-8", "ignore")) > 1 for i in range(263, made.vocab_size))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    assert NEW.decode(NEW.encode(text), errors="surrogateescape").encode("utf-8", "surrogateescape") == text.encode("utf-8", "surrogatepass") or "\ud800" <= max(text, default="") <= "\udfff"


def test_tokenizers_gives_the_same_ids(tmp_path, ledger):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(NEW.save(tmp_path)))
    ledger(f"ids of {len(MIXED)} texts by an expanded tokenizer", "tokenizers", sum(theirs.encode(t).ids != NEW.encode(t) for t in MIXED), 0)
    assert BPE.load(tmp_path).merges == NEW.merges


def test_real_chinese(data, tmp_path, ledger):
    tokenizers = pytest.importorskip("tokenizers")
    poems = ["".join(p["paragraphs"]) for p in json.loads((data/"zh_tang_poems.json").read_text())]
    old = BPE.train(poems[:700], 1200)
    new = expand_bpe(old, poems[:700], 800, WORDS)
    before, after = tokens_per_character(old, poems[800:]), tokens_per_character(new, poems[800:])
    assert after < before and max(len(p) for p in new.pieces(range(old.vocab_size, new.vocab_size))) >= 2
    theirs = tokenizers.Tokenizer.from_file(str(new.save(tmp_path)))
    ledger("ids of 200 Tang poems by an expanded tokenizer", "tokenizers", sum(theirs.encode(t).ids != new.encode(t) for t in poems[800:]), 0)


def test_pieces_and_rows_by_hand():
    pieces = pieces_of(OLD, NEW)
    assert list(pieces) == list(range(500, 650)) and all(b"".join(OLD.token_bytes[p] for p in ids) == NEW.token_bytes[i] for i, ids in pieces.items())
    weight = torch.tensor([[1., 2.], [4., 0.], [-2., 3.], [5., 6.], [70., 80.]])
    assert new_rows(weight[:4], {4: [3, 0], 6: [1, 1, 2]}).tolist() == [[3., 4.], [2., 1.]]
    assert new_rows(weight[:4], {4: [0], 5: [1]}, "mean").tolist() == [[2., 2.75]]*2
    assert torch.equal(new_rows(weight, {5: [0]}, "random", seed=3), new_rows(weight, {5: [1]}, "random", seed=3)) and not torch.equal(new_rows(weight, {5: [0]}, "random", seed=3), new_rows(weight, {5: [0]}, "random", seed=4))
    table = grown(weight, {4: [3, 0], 6: [1, 1, 2]}, 7, 4)  # row 4 was spare: filled; row 5 stays spare: the mean of the real ones
    assert table.tolist() == [[1., 2.], [4., 0.], [-2., 3.], [5., 6.], [3., 4.], [2., 2.75], [2., 1.]]
    spread = new_rows(torch.zeros(9, 400), {9 + i: [0] for i in range(50)}, "random").std().item()
    assert abs(spread - .02) < .001


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["pieces", "mean", "random"])
def test_old_logits_stay(tied, how, ledger):
    model = tiny(tied)
    larger, ids = expand_model(model, OLD, NEW, how), torch.tensor([[7, 400, 33, 33, 260]])
    before, after = model(ids), larger(ids)
    ledger(f"old logits after expansion, {how}, {'tied' if tied else 'untied'}", "the model before", (after[..., :500] - before).detach().abs().max(), 1e-6)
    assert after.shape[-1] == 650 and not larger.training and larger.config == replace(model.config, vocab_size=650)
    i, ids_of = next((i, p) for i, p in pieces_of(OLD, NEW).items() if len(p) > 2)
    if how == "pieces":  # the head is linear: the logit of a mean is the mean of the logits
        ledger(f"logit of a new token, {'tied' if tied else 'untied'}", "mean of its pieces' logits", (after[..., i] - before[..., ids_of].mean(-1)).detach().abs().max(), 1e-5)
        assert torch.allclose(larger.embed.weight[i], model.embed.weight[ids_of].mean(0))
    model.embed.weight.data.zero_()
    assert larger.embed.weight.abs().sum() > 0, "the copy shares nothing"


def test_spare_rows_are_filled_first(ledger):
    model = tiny(vocabulary=512)
    larger = expand_model(model, OLD, NEW, multiple=64)
    assert larger.config.vocab_size == 704 and check_rows(larger, NEW) == 54
    pieces = pieces_of(OLD, NEW)
    assert torch.allclose(larger.embed.weight[505], model.embed.weight[pieces[505]].mean(0)) and torch.allclose(larger.embed.weight[700], model.embed.weight[:500].mean(0))
    assert expand_model(tiny(vocabulary=800), OLD, NEW).config.vocab_size == 800


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", ["new", "rows", "all"])
def test_which_rows_move(tied, train):
    model = expand_model(tiny(tied), OLD, NEW)
    before = copy.deepcopy(model)
    train_rows(model, 500, train)
    rows = pack([([OLD.bos_id, *NEW.encode(t)], [1]*(1 + len(NEW.encode(t)))) for t in SHOP[:60]], 48)
    for _ in fit(model, lambda step, micro=0: rows, Fit(steps=3, decay=0., warmup=0, autocast="off"), progress=False): pass
    moved = {name: (p != q).reshape(len(p), -1).any(1) for (name, p), q in zip(model.named_parameters(), before.parameters())}
    tables = {"embed.weight"} | (set() if tied else {"head.weight"})
    for name, rows_moved in moved.items():
        if name in tables: assert rows_moved[500:].any() and rows_moved[:500].any().item() == (train != "new"), name
        else: assert rows_moved.any().item() == (train == "all"), name


def test_gradient_of_new_rows_is_the_unmasked_one(ledger):
    free, masked = (expand_model(tiny(), OLD, NEW) for _ in range(2))
    handles = train_rows(masked, 500)
    ids = torch.tensor([NEW.encode(SHOP[0])])
    for m in (free, masked): m(ids).log_softmax(-1).gather(-1, ids[..., None]).mean().backward()
    ledger("gradient of new rows under the mask", "autograd without it", (free.embed.weight.grad[500:] - masked.embed.weight.grad[500:]).abs().max(), 0)
    assert masked.embed.weight.grad[:500].abs().max() == 0 and free.embed.weight.grad[:500].abs().max() > 0
    for handle in handles: handle.remove()
    masked.zero_grad()
    masked(ids).log_softmax(-1).gather(-1, ids[..., None]).mean().backward()
    assert masked.embed.weight.grad[:500].abs().max() > 0


@pytest.mark.parametrize("tied, multiple", [(True, 1), (False, 64)])
def test_transformers_reloads_it_exactly(tied, multiple, tmp_path, ledger):
    transformers = pytest.importorskip("transformers")
    model = expand_model(tiny(tied), OLD, NEW, multiple=multiple)
    save_expanded(tmp_path, model, NEW, ChatTemplate(OLD))
    tokenizer, theirs = transformers.AutoTokenizer.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    texts = [t for t in MIXED if t]
    ledger(f"ids of {len(texts)} texts after reload", "AutoTokenizer", sum(tokenizer(t, add_special_tokens=False)["input_ids"] != NEW.encode(t) for t in texts), 0)
    gaps = []
    with torch.no_grad():
        for t in texts:
            ids = torch.tensor([NEW.encode(t)[:60]])
            gaps.append((theirs(ids).logits - model(ids)).abs().max().item())
    ledger(f"logits after reload, {'tied' if tied else 'untied'}", "AutoModelForCausalLM", max(gaps), 2e-5)
    assert theirs.config.vocab_size == model.config.vocab_size and theirs.config.eos_token_id == NEW.end_id
    talk = [dict(role="user", content="水壶?"), dict(role="assistant", content="3 铜钱。")]
    assert tokenizer.apply_chat_template(talk, return_dict=False) == ChatTemplate(NEW).render(talk)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_in_transformers_agrees(tied, tmp_path, ledger):
    "Their resize with the mean, ours with the mean: the same old logits, new ones within their noise"
    transformers = pytest.importorskip("transformers")
    model = tiny(tied)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.resize_token_embeddings(650, mean_resizing=True)
    ours, ids = expand_model(model, OLD, NEW, "mean"), torch.tensor([[7, 400, 33, 260]])
    with torch.no_grad(): a, b = theirs(ids).logits, ours(ids)
    ledger(f"old logits after resize_token_embeddings, {'tied' if tied else 'untied'}", "transformers", (a[..., :500] - b[..., :500]).abs().max(), 2e-5)
    ledger(f"mean of the new rows, {'tied' if tied else 'untied'}", "transformers' mean_resizing", (theirs.get_output_embeddings().weight[500:].mean(0) - (ours.head or ours.embed).weight[500:].mean(0)).abs().max(), .01)
