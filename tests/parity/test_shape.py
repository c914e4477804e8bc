"Parameters by formula equal the models that transformers builds on the meta device, and the numbers on the models' cards"
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmbench.model.transformer import Config, Transformer
from llmbench.train.shape import KINDS, KNOWN, adapter_count, count, from_config, from_json, read_shape

ODD = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80, vocab_size=97, max_position_embeddings=64, pad_token_id=None)
MORE = {"gpt2": dict(n_embd=48, n_layer=3, n_head=6, vocab_size=97, n_positions=64), "mixtral": ODD | dict(num_local_experts=5), "qwen3": ODD | dict(head_dim=14),
        "qwen3_moe": ODD | dict(num_experts=7, moe_intermediate_size=30, head_dim=14), "gemma2": ODD | dict(head_dim=10), "gemma": ODD | dict(head_dim=10), "gemma3_text": ODD | dict(head_dim=10)}
CARDS = {"smollm2-135m": 134_515_008, "qwen2.5-0.5b": 494_032_768, "llama-3.2-1b": 1_235_814_400, "gpt2-xl": 1_557_611_200, "llama-2-7b": 6_738_415_616, "mistral-7b": 7_241_732_096,
         "llama-3-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360, "gemma-2-9b": 9_241_705_984, "llama-2-13b": 13_015_864_320, "mixtral-8x7b": 46_702_792_704,
         "llama-1-65b": 65_285_660_672, "llama-3-70b": 70_553_706_496}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind, tied, ledger):
    config = CONFIG_MAPPING[kind](**MORE.get(kind, ODD), tie_word_embeddings=tied)
    with torch.device("meta"): theirs = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    ours = sum(count(from_json(config.to_dict())).values())
    ledger(f"parameters of {kind}, {'tied' if tied else 'untied'}", "transformers on meta", abs(ours - theirs), 0)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_optional_biases(bias):
    config = CONFIG_MAPPING["llama"](**ODD, **{bias: True})
    with torch.device("meta"): theirs = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert sum(count(from_json(config.to_dict())).values()) == theirs


@pytest.mark.parametrize("name", CARDS)
def test_model_cards(name): assert sum(count(read_shape(name)).values()) == CARDS[name]


def test_known_models_are_all_readable():
    for name in (*KNOWN, "town"): assert sum(count(read_shape(name)).values()) > 0
    assert abs(sum(count(read_shape("gpt3-175b")).values())/1e9 - 175) < .7


@pytest.mark.parametrize("changes", [{}, dict(tied=False), dict(n_kv_heads=1), dict(n_experts=3)])
def test_ours(changes, tmp_path):
    config = Config(vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=changes.get("n_kv_heads", 2), d_hidden=80, **{k: v for k, v in changes.items() if k != "n_kv_heads"})
    model = Transformer(config)
    right = sum(p.numel() for p in model.parameters())
    assert sum(count(from_config(config)).values()) == right
    model.save_pretrained(tmp_path)
    assert sum(count(read_shape(tmp_path)).values()) == right == sum(count(read_shape(tmp_path/"config.json")).values())


def test_active_experts_by_hand():
    "Mixtral: 8 experts owned, 2 visited; attention, router, embeddings are the same"
    owned, visited = (count(read_shape("mixtral-8x7b"), active) for active in (False, True))
    assert owned["mlp"] - visited["mlp"] == 32*6*3*4096*14336
    assert {k for k in owned if owned[k] != visited[k]} == {"mlp"}


def test_adapters_equal_peft(ledger):
    import peft
    from transformers import LlamaForCausalLM
    model = LlamaForCausalLM(CONFIG_MAPPING["llama"](**ODD))
    shape = from_json(model.config.to_dict())
    for targets, theirs in ((("q", "v"), ["q_proj", "v_proj"]), (("q", "k", "v", "out", "gate", "up", "down"), "all-linear")):
        wrapped = peft.get_peft_model(LlamaForCausalLM(model.config), peft.LoraConfig(r=5, target_modules=theirs))
        ledger(f"adapter parameters on {len(targets)} matrices", "PEFT", abs(adapter_count(shape, 5, targets) - wrapped.get_nb_trainable_parameters()[0]), 0)
