"Bad input to the estimator and its command: one message that names the field and the mend, exit code 2, no traceback"
import json

import pytest

from llmbench.cli import main
from llmbench.core import UserError
from llmbench.model.transformer import Config
from llmbench.train.activations import Plan
from llmbench.train.budget import fits, hours, memory
from llmbench.train.shape import adapter_count, from_json, read_shape

GOOD = dict(model_type="llama", hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80, vocab_size=97, max_position_embeddings=64)


@pytest.mark.parametrize("more, words", [
    (dict(method="qlra"), ["method", "qlra", "qlora"]), (dict(batch=-1), ["batch", "-1"]), (dict(batch=True), ["batch"]), (dict(batch=2.5), ["batch", "2.5"]), (dict(length=0), ["length", "0"]),
    (dict(gpus=0), ["gpus", "0"]), (dict(gpus=4, tensor=3), ["tensor", "multiple"]), (dict(rank=0), ["rank"]), (dict(precision="fp8"), ["precision", "fp8", "bf16"]),
    (dict(optimizer="adam"), ["optimizer", "adamw"]), (dict(sharding="zero4"), ["sharding", "zero3"]), (dict(attention="flsh"), ["attention", "flash"]), (dict(bacth=2), ["bacth", "batch"]),
    (dict(gpus=3, tensor=3), ["2 key heads", "divisor"]), (dict(gpus=4, tensor=4), ["6 query heads"]), (dict(method="lora", targets=("query",)), ["query", "q, k, v"]), (dict(method="lora", targets=()), ["nothing"]), (dict(length=4096), ["4,096", "64"]),
])
def test_plans(more, words):
    with pytest.raises(UserError) as e: memory(GOOD, **({"length": 64} | more))
    for word in words: assert word in str(e.value), f"{word!r} is not in: {e.value}"


@pytest.mark.parametrize("change, words", [
    (dict(hidden_size=None), ["hidden_size", "null"]), (dict(hidden_size="48"), ["hidden_size", '"48"']), (dict(num_hidden_layers=-3), ["num_hidden_layers", "-3"]), (dict(vocab_size=0), ["vocab_size"]),
    (dict(model_type="chatglm"), ["chatglm", "unknown architecture", "qwen3", "never run"]), (dict(model_type=["llama"]), ["unknown architecture"]), (dict(model_type=None), ["unknown architecture"]),
    (dict(num_key_value_heads=0), ["num_key_value_heads"]), (dict(head_dim="x"), ["head_dim"]), (dict(tie_word_embeddings="yes"), ["tie_word_embeddings", "yes"]), (dict(hidden_size=True), ["hidden_size", "true"]),
])
def test_configs(change, words):
    with pytest.raises(UserError) as e: from_json(GOOD | change, "there/config.json")
    for word in words: assert word in str(e.value), f"{word!r} is not in: {e.value}"
    assert "there/config.json" in str(e.value)


def test_missing_field_is_named():
    for field in ("hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings"):
        with pytest.raises(UserError, match=field): from_json({k: v for k, v in GOOD.items() if k != field})
    with pytest.raises(UserError, match="num_experts_per_tok"): from_json(GOOD | dict(model_type="mixtral", num_local_experts=4))


def test_files(tmp_path):
    with pytest.raises(UserError, match="no model"): read_shape(tmp_path/"absent")
    with pytest.raises(UserError, match="no model"): read_shape(tmp_path)
    (tmp_path/"config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(UserError, match="broken JSON.*line 1|line 1.*broken JSON"): read_shape(tmp_path)
    (tmp_path/"config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="expected an object"): read_shape(tmp_path)
    (tmp_path/"config.json").write_text(json.dumps(GOOD | dict(auto_map={"AutoConfig": "evil.Config"})))
    (tmp_path/"evil.py").write_text("raise SystemExit('code of a stranger ran')")
    assert read_shape(tmp_path).d_model == 48


def test_cards_hours_adapters():
    with pytest.raises(UserError, match="8 GB"): fits(memory(Config(), length=64), "9 GB")
    for share in (0, 1.2, -1):
        with pytest.raises(UserError, match="share"): hours(1e9, 1e9, 1e12, share=share)
    with pytest.raises(UserError, match="gate"): adapter_count(read_shape("llama-2-7b"), 4, ("gates",))
    assert Plan(targets=("q",)).targets == ("q",)


@pytest.mark.parametrize("arguments, words", [
    (["--method", "qlra"], ["qlra", "qlora"]), (["--gpus", "0"], ["gpus", "0"]), (["--batch", "-2"], ["batch", "-2"]), (["--model", "nowhere"], ["nowhere", "llama-3-8b"]),
    (["--gpus", "6", "--tensor", "3"], ["heads"]), (["--length", "many"], ["many"]), (["--modell", "x"], ["modell"]), (["--tokens", "1e6", "--share", "0"], ["share"]), (["--precision", "int3"], ["int3"]),
])
def test_command(capsys, arguments, words):
    try: code = main(["memory", *arguments])
    except SystemExit as e: code = e.code
    told = capsys.readouterr()
    assert code == 2 and "Traceback" not in told.err + told.out
    for word in words: assert word in told.err + told.out


def test_command_json_and_table(capsys):
    assert main(["memory", "--model", "mixtral-8x7b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == round(memory("mixtral-8x7b", "qlora", 1, 2048, checkpointing=True).total) and abs(sum(found["parts"].values()) - found["total"]) < 20
    assert main(["memory", "--model", "mixtral-8x7b", "--method", "infer"]) == 0
    shown = capsys.readouterr().out
    assert "12.9 B visited" in shown and "keys and values" in shown
    assert main([]) == 2 and "memory" in capsys.readouterr().out
