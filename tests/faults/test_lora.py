"Adapters that do not fit, are not whole, or do more than we can: what the message says, and that nothing has changed"
import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.tune.lora import (AdaptersOnly, LoRALinear, add_lora, load_lora, lora_layers, merge_lora, save_lora, unmerge_lora, use_lora, without_lora)
from llmbench.tune.lora_layer import Settings
from llmbench.tune.peft_folder import read_adapter, write_adapter

SHAPE = dict(vocab_size=60, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=16)


def model(seed=0, **other):
    torch.manual_seed(seed)
    return Transformer(Config(**SHAPE | other))


@pytest.fixture
def adapted():
    m = model()
    add_lora(m, 2, 4., ["q_proj", "down_proj"])
    with torch.no_grad():
        for layer in lora_layers(m).values():
            for lora in layer.adapters["default"].values(): lora.B.normal_()
    return m


@pytest.fixture
def folder(adapted, tmp_path): return save_lora(adapted, tmp_path/"adapter")


def refused(call, *parts):
    with pytest.raises(UserError) as caught: call()
    for part in parts: assert part in str(caught.value), str(caught.value)
    assert caught.value.where and caught.value.mend, "a message says where, and what to do"
    return caught.value


@pytest.mark.parametrize("change,parts", [
    (dict(targets=["q_prj"]), ("'q_prj'", "q_proj", "down_proj", "all-linear")),
    (dict(targets="proj"), ("'proj'", "k_proj")),
    (dict(targets=["q_proj", "w1", "w2"]), ("'w1', 'w2'",)),
    (dict(targets=[]), ("empty list",)),
    (dict(r=0), ("from 1 up", "r:")), (dict(r=-3), ("from 1 up",)), (dict(r=2.5), ("2.5",)), (dict(r=True), ("True",)), (dict(r="8"), ("'8'",)),
    (dict(r=9), ("rank 9", "k_proj", "8 x 16", "at most 8")),
    (dict(r=17, targets=["q_proj"]), ("rank 17", "q_proj", "16 x 16")),
    (dict(alpha=0), ("alpha",)), (dict(alpha=float("nan")), ("alpha",)), (dict(alpha=-1.), ("alpha",)),
    (dict(name="a.b"), ("'a.b'",)), (dict(name=""), ("name",)), (dict(name="keys"), ("'keys'",)),
], ids=str)
def test_bad_settings_change_nothing(change, parts):
    m = model()
    refused(lambda: add_lora(m, **dict(r=2) | change), *parts)
    assert not any(isinstance(x, LoRALinear) for x in m.modules()) and all(p.requires_grad for p in m.parameters())


def test_dropout_out_of_range():
    for wrong in (1., -.1, "0.1"):
        with pytest.raises(UserError, match="dropout"): add_lora(model(), 2, dropout=wrong)


def test_models_without_maps():
    refused(lambda: add_lora(nn.Sequential(nn.ReLU()), 2), "no linear map")
    refused(lambda: add_lora(nn.Linear(4, 4), 2), "itself a linear map")
    refused(lambda: LoRALinear(nn.Conv1d(2, 2, 1)), "Conv1d has no in_features")
    with pytest.raises(UserError, match="do not make up 6"): LoRALinear(nn.Linear(4, 6), (4, 3))


def test_names(adapted):
    refused(lambda: add_lora(adapted, 2), "'default' already")
    refused(lambda: use_lora(adapted, "other"), "'other'", "default")
    refused(lambda: save_lora(adapted, "nowhere", "other"), "'other'", "default")
    for call in (lambda: use_lora(model(), "x"), lambda: merge_lora(model()), lambda: save_lora(model(), "nowhere"), lambda: without_lora(model()).__enter__(), lambda: AdaptersOnly(model())):
        refused(call, "no adapter", "add_lora")


def test_merging_twice(adapted):
    refused(lambda: unmerge_lora(adapted), "no adapter is merged")
    merge_lora(adapted, unload=False)
    weights = copy.deepcopy(adapted.state_dict())
    refused(lambda: merge_lora(adapted, unload=False), "merged already", "twice")
    refused(lambda: merge_lora(adapted), "merged already")
    refused(lambda: add_lora(adapted, 2, name="more"), "merged", "unmerge_lora")
    refused(lambda: use_lora(adapted), "merged", "unmerge_lora")
    assert all(torch.equal(x, weights[n]) for n, x in adapted.state_dict().items())
    unmerge_lora(adapted)
    merge_lora(adapted)
    refused(lambda: merge_lora(adapted), "no adapter")


class Packed(nn.Module):
    "A map in two 4-bit numbers a byte, as far as its shape goes"
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.register_buffer("codes", torch.zeros(12, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(.5))
    def forward(self, x): return x @ self.scale.expand(6, 4)


def test_base_without_weights():
    "Any frozen map will do as a base; but it cannot be merged into, and has no fingerprint"
    m = nn.Sequential(nn.Linear(5, 6), Packed())
    add_lora(m, 2, 4., ["0", "1"])
    with torch.no_grad():
        for layer in lora_layers(m).values(): layer.adapters["default"]["0"].B.normal_()
    m(torch.randn(3, 5)).sum().backward()
    assert all(p.grad is not None for p in m.parameters() if p.requires_grad)
    before = m[0].weight.clone()
    refused(lambda: merge_lora(m), "Packed", "16-bit copy")
    assert torch.equal(m[0].weight, before), "the first map was merged before the second was refused"


# folders

def test_another_base(folder):
    same = model()
    assert load_lora(same, folder)
    other = model(seed=1)
    refused(lambda: load_lora(other, folder), "other weights of the same shape", "any_base")
    assert not any(isinstance(x, LoRALinear) for x in other.modules())
    assert load_lora(other, folder, any_base=True)
    refused(lambda: load_lora(model(d_model=32), folder), "16", "another base")
    refused(lambda: load_lora(model(n_layers=1), folder), "layers.1", "does not have")
    refused(lambda: load_lora(nn.Sequential(nn.Linear(3, 3)), folder), "does not have")
    half = model().to(torch.bfloat16)
    assert load_lora(half, folder), "the same base in 16 bits is the same base"


def test_missing_folder_and_files(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"): load_lora(model(), tmp_path/"absent")
    (folder/"adapter_config.json").rename(tmp_path/"config")
    refused(lambda: load_lora(model(), folder), "no adapter_config.json")
    (tmp_path/"config").rename(folder/"adapter_config.json")
    (folder/"adapter_model.safetensors").unlink()
    refused(lambda: load_lora(model(), folder), "no adapter_model.safetensors")


def test_pickle_is_refused(folder):
    (folder/"adapter_model.safetensors").unlink()
    (folder/"adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'echo broken into > /tmp/never'\ntR.")
    refused(lambda: load_lora(model(), folder), "pickle", "adapter_model.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_damaged_tensors(keep, folder):
    path = folder/"adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: load_lora(model(), folder), "not a whole safetensors file", "adapter_model.safetensors")


@pytest.mark.parametrize("text,part", [("", "broken JSON"), ("[1]", "expected an object"), ('{"peft_type": "LORA"', "line 1 column"), ('{"r": 2}', "peft_type"), ('{"peft_type": "IA3"}', "IA3")])
def test_damaged_config(text, part, folder):
    (folder/"adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json") as e: load_lora(model(), folder)
    assert part in str(e.value)


FEATURES = [("use_dora", True), ("use_qalora", True), ("lora_bias", True), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("layer_replication", [[0, 1]]),
            ("target_parameters", ["mlp.experts"]), ("trainable_token_indices", [1, 2]), ("arrow_config", {"top_k": 2}), ("corda_config", {"x": 1}), ("init_lora_weights", "pissa_niter_4"),
            ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"), ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [3]), ("use_bdlora", {"nblocks": 2}), ("a_feature_of_tomorrow", True)]


@pytest.mark.parametrize("field,value", FEATURES, ids=lambda x: str(x)[:24])
def test_features_are_refused_by_name(field, value, folder):
    path = folder/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(lambda: load_lora(model(), folder), f"field {field}")


def test_harmless_fields_pass(folder):
    path = folder/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(layers_to_transform=[0, 1], exclude_modules=["x"], megatron_core="megatron.core", qalora_group_size=16, revision="main", a_number_of_tomorrow=3)))
    assert load_lora(model(), folder)


def test_what_peft_really_writes_for_dora(tmp_path):
    from peft import LoraConfig, get_peft_model
    for extra, field in ((dict(use_dora=True), "use_dora"), (dict(modules_to_save=["1"]), "modules_to_save"), (dict(bias="all"), "bias")):
        get_peft_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), LoraConfig(r=2, target_modules=["0"], **extra)).save_pretrained(tmp_path/field)
        refused(lambda field=field: load_lora(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), tmp_path/field), f"field {field}")


@pytest.mark.parametrize("values,field", [(dict(r=0), "field r"), (dict(r=3), "lora_A.weight"), (dict(lora_alpha="16"), "field lora_alpha"), (dict(lora_dropout=2), "field lora_dropout"), (dict(rank_pattern=[1]), "rank_pattern")])
def test_config_and_tensors_disagree(values, field, folder):
    path = folder/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError) as e: load_lora(model(), folder)
    assert field in str(e.value)


def rewrite(folder, change):
    path = folder/"adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({n: x.contiguous() for n, x in tensors.items()}, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("change,parts", [
    (lambda t: t.pop(f"{Q}.lora_B.weight"), ("missing", f"{Q}.lora_B.weight")),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].T}), ("lora_A.weight", "swapped")),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_B.weight"].T.flip(0), f"{Q}.lora_B.weight": t[f"{Q}.lora_A.weight"]}), ("lora_B.weight", "swapped")),
    (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), ("NaN", "lora_A.weight")),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}), ("lora_magnitude_vector",)),
    (lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(2, 60)}), ("lora_embedding_A", "merge")),
    (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)}), ("int8",)),
    (lambda t: t.clear(), ("no tensor",)),
], ids=["no B", "A turned", "swapped", "NaN", "DoRA", "embedding", "integers", "empty"])
def test_odd_tensors(change, parts, folder):
    rewrite(folder, change)
    m = model()
    with pytest.raises(UserError) as e: load_lora(m, folder)
    for part in parts: assert part in str(e.value), str(e.value)
    assert not any(isinstance(x, LoRALinear) for x in m.modules())


def test_one_folder_cannot_say_two_dropouts(tmp_path):
    x = torch.ones(2, 2)
    with pytest.raises(UserError, match="one of each"): write_adapter(tmp_path, {"a": (Settings(2), x, x), "b": (Settings(2, dropout=.1), x, x)})


def test_unwritable(adapted, tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="cannot write"): save_lora(adapted, tmp_path/"file")
    assert read_adapter(save_lora(adapted, tmp_path/"new"/"place"))[0]
