"Logits and gradients equal transformers' Llama, Mistral and Mixtral in fp32, both ways: our folder read by transformers, theirs by us"
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer, parameter_count
from llmbench.text.batch import pack

SHAPE = dict(vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_hidden=80, max_length=64)
LLAMA3 = dict(rope_type="llama3", factor=4., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)
CASES = {
    "GQA, tied": {}, "untied": dict(tied=False), "multi-head": dict(n_kv_heads=6), "multi-query": dict(n_kv_heads=1), "another base": dict(rope_base=500000.),
    "linear RoPE": dict(rope_scaling=dict(rope_type="linear", factor=3.)), "llama3 RoPE": dict(rope_scaling=LLAMA3), "window": dict(window=7), "experts": dict(n_experts=4, tied=False),
}


def draw(seed=0, rows=2, length=40): return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def ours(**changes):
    torch.manual_seed(1)
    model = Transformer(Config(**(SHAPE | changes)))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.05)  # norm weights away from 1, nothing symmetric
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_our_folder_read_by_transformers(name, tmp_path, ledger):
    model, ids = ours(**CASES[name]), draw()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    if CASES[name].get("window"): assert theirs.config.sliding_window == 7
    with torch.no_grad(): mine, other = model(ids), theirs(ids).logits
    assert mine.std() > .1
    ledger(f"Transformer logits, {name}", "transformers", (mine - other).abs().max(), 1e-5)


@pytest.mark.parametrize("name", ["GQA, tied", "untied", "llama3 RoPE", "experts"])
def test_gradients(name, tmp_path, ledger):
    model, ids = ours(**CASES[name]), draw(3)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for m in (model, theirs):
        logits = m(ids)
        logits = getattr(logits, "logits", logits)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    other = dict(theirs.named_parameters())["model.embed_tokens.weight"].grad
    mine = next(p.grad for p in model.parameters() if p.shape == other.shape)
    assert other.abs().max() > 1e-3
    ledger(f"Transformer embedding gradient, {name}", "transformers", (mine - other).abs().max(), 1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Llama untied", "Mistral", "Mixtral"])
def test_their_folder_read_by_us(kind, tmp_path, ledger):
    torch.manual_seed(2)
    shape = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=72, max_position_embeddings=64, tie_word_embeddings=kind == "Llama", initializer_range=.2)
    if kind.startswith("Llama"): theirs = LlamaForCausalLM(LlamaConfig(**shape))
    elif kind == "Mistral": theirs = MistralForCausalLM(MistralConfig(**shape, sliding_window=9))
    else: theirs = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=3, num_experts_per_tok=2, sliding_window=None))
    theirs.eval().save_pretrained(tmp_path)
    model, ids = Transformer.from_pretrained(tmp_path), draw(4)
    with torch.no_grad(): mine, other = model(ids), theirs(ids).logits
    assert other.std() > .1
    ledger(f"reading a {kind} folder, logits", "transformers", (mine - other).abs().max(), 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_parameters_by_formula(name):
    config = Config(**(SHAPE | CASES[name]))
    assert parameter_count(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_packed_equals_one_by_one(ledger):
    "Block mask and positions: a document's logits do not depend on its neighbours"
    model, generator = ours(), torch.Generator().manual_seed(5)
    rows = [(torch.randint(97, (n,), generator=generator).tolist(), [1]*n) for n in (5, 17, 9, 30, 12, 3)]
    batch = pack(rows, 40)
    with torch.no_grad(): packed = model(batch.ids, batch.positions, batch.attend())
    worst, found = 0., 0
    for ids, _ in rows:
        with torch.no_grad(): alone = model(torch.tensor([ids]))[0]
        for r in range(len(batch)):
            for s in batch.segments[r].unique().tolist():
                here = batch.segments[r] == s
                if s and batch.ids[r][here].tolist() == ids: worst, found = max(worst, float((packed[r][here] - alone).abs().max())), found + 1
    assert found == len(rows)
    ledger("packed logits", "our unpacked", worst, 1e-5)


def test_cached_equals_whole(ledger):
    from llmbench.model.attention import KVCache
    model, ids = ours(), draw(6, rows=3, length=20)
    cache = KVCache(3, 3, 2, 20, 8)
    with torch.no_grad(): steps = torch.cat([model(part, cache=cache) for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:13], *ids[:, 13:].split(1, 1))], 1)
    with torch.no_grad(): whole = model(ids)
    ledger("cached logits", "our uncached", (steps - whole).abs().max(), 1e-5)


def test_evaluating_before_training_keeps_the_tables_trainable():
    model = ours()
    with torch.inference_mode(): model(draw())
    model(draw()).sum().backward()


def test_a_change_in_the_future_changes_nothing_before():
    model, ids = ours(), draw(7)
    other = ids.clone()
    other[:, 25] = (other[:, 25] + 1) % 97
    with torch.no_grad(): a, b = model(ids), model(other)
    assert torch.equal(a[:, :25], b[:, :25]) and not torch.equal(a[:, 25:], b[:, 25:])


@pytest.mark.parametrize("damage, words", [
    ("pickle", ["pickle"]), ("truncated", ["model.safetensors"]), ("no weights", ["model.safetensors"]), ("shape", ["embed", "96"]), ("missing", ["q_proj"]), ("nan", ["NaN"]),
    ("config", ["config.json", "hidden_size"]), ("broken config", ["config.json", "line"]), ("other model", ["gpt2"])])
def test_hostile_and_broken_checkpoints(damage, words, tmp_path):
    import json

    from safetensors.torch import load_file, save_file
    ours().save_pretrained(tmp_path)
    weights, config = tmp_path/"model.safetensors", tmp_path/"config.json"
    fields, tensors = json.loads(config.read_text()), load_file(weights)
    if damage == "pickle":
        weights.unlink()
        torch.save(tensors, tmp_path/"pytorch_model.bin")
    elif damage == "truncated": weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights": weights.unlink()
    elif damage == "shape": save_file(tensors | {"model.embed_tokens.weight": torch.zeros(96, 48)}, weights)
    elif damage == "missing": save_file({k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj" not in k}, weights)
    elif damage == "nan": save_file(tensors | {"model.norm.weight": torch.full((48,), torch.nan)}, weights)
    elif damage == "config": config.write_text(json.dumps(fields | dict(hidden_size="wide")))
    elif damage == "broken config": config.write_text(config.read_text()[:40])
    elif damage == "other model": config.write_text(json.dumps(fields | dict(model_type="gpt2", architectures=["GPT2LMHeadModel"])))
    with pytest.raises(UserError) as told: Transformer.from_pretrained(tmp_path)
    for word in words: assert word in str(told.value), told.value
