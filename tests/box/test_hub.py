"Templates, masks and loading against transformers and TRL"
import pytest
import torch

from llmbench.box.check import linear_layers
from llmbench.box.hub import FourBit, HubTemplate, Place, cure_four_bit, float_type, is_hub_folder, load_base, load_hub, load_template, locate, plain_template, read_config, skeleton
from llmbench.core import UserError
from llmbench.tune.chat import DEFAULT, ChatTemplate


def U(text): return dict(role="user", content=text)
def A(text): return dict(role="assistant", content=text)
def S(text): return dict(role="system", content=text)


TALKS = [[U("Who lives in Oldtown?"), A("Ann does.")], [S("Be brief."), U("Who?"), A("Ann."), U("谁住在这里？"), A("安。☃")],
         [U("q"), A("a"), U("What is <|im_end|> for?"), A("It ends a turn.")]]


def learned(template, ids, mask): return "".join(template.tokenizer.decode([i]) if m else "|" for i, m in zip(ids, mask)).strip("|")


@pytest.fixture(scope="module")
def smol(smollm2): return load_template(locate(str(smollm2)))


@pytest.mark.parametrize("talk", TALKS[:2], ids=["one turn", "two turns, Chinese"])
def test_ids_equal_transformers(talk, smol, ledger):
    ids, mask = smol.render(talk)
    theirs = smol.inner.apply_chat_template(talk, return_dict=True)["input_ids"]
    ledger(f"a hub model's own template, {len(talk)} messages", "transformers apply_chat_template", int(ids != theirs), 0)
    assert smol.native and smol.own and not smol.marked
    said = [m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant"]
    spoken = smol.tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert spoken == "".join(said)
    assert smol.render(talk[:-1], prompt=True)[0] == ids[:len(smol.render(talk[:-1], prompt=True)[0])]


def test_typed_special_strings_stay_text(smol):
    ids, mask = smol.render(TALKS[2])
    end = smol.tokenizer.special_ids["<|im_end|>"]
    theirs = smol.inner.apply_chat_template(TALKS[2], return_dict=True)["input_ids"]
    assert theirs.count(end) == ids.count(end) + 1, "transformers takes the user's text for an end of turn"
    assert smol.tokenizer.decode(ids) == smol.inner.decode(theirs)


def test_mask_equals_trl_training_template(smol, ledger):
    "TRL knows a marked twin of the ChatML template; ours needs no twin"
    chatml = "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    wrong = 0
    for talk in TALKS[:2]:
        talk = talk if talk[0]["role"] == "system" else [S("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), *talk]
        done = smol.inner.apply_chat_template(talk, chat_template=chatml, return_dict=True, return_assistant_tokens_mask=True)
        wrong += smol.render(talk) != (list(done["input_ids"]), list(done["assistant_masks"]))
    ledger("mask of a template without marks", "transformers assistant_masks, marked template", wrong, 0)


def test_marks_and_prefixes_agree(tiny):
    "The same template with its marks and without"
    marked = load_template(Place(str(tiny), None, str(tiny)))
    ours = ChatTemplate.load(tiny)
    blind = load_template(Place(str(tiny), None, str(tiny)))
    blind.inner.chat_template = DEFAULT.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    blind = HubTemplate(blind.inner)
    assert marked.marked and not blind.marked and marked.native and blind.native
    for talk in TALKS[:2]: assert marked.render(talk) == blind.render(talk) == ours.render(talk)


def test_tools_and_prompts(tiny):
    marked, tools = load_template(Place(str(tiny), None, str(tiny))), [dict(name="f")]
    assert marked.render(TALKS[0], tools) == ChatTemplate.load(tiny).render(TALKS[0], tools) != marked.render(TALKS[0])
    assert marked.render(TALKS[0][:1], prompt=True) == ChatTemplate.load(tiny).render(TALKS[0][:1], prompt=True)


def test_base_model_without_a_template(tiny):
    template = load_template(Place(str(tiny), None, str(tiny)))
    template.inner.chat_template, size = None, len(template.inner)
    template = HubTemplate(template.inner)
    assert not template.own and plain_template(template.inner) == template.template
    ids, mask = template.render(TALKS[1])
    assert template.tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "Ann.<|end|>安。☃<|end|>" and len(template.inner) == size


def test_template_that_rewrites_earlier_turns_is_refused(tiny):
    template = load_template(Place(str(tiny), None, str(tiny)))
    template.inner.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else '...' }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(UserError, match="writes earlier turns anew"): HubTemplate(template.inner).render(TALKS[1])


def test_loads_in_every_type(tiny):
    place = locate(str(tiny))
    ids = torch.tensor([[5, 9, 200, 31]])
    full, half, four = load_base(place, torch.float32), load_base(place, torch.bfloat16), load_base(place, torch.float32, FourBit())
    with torch.no_grad(): a, b, c = (m.eval()(input_ids=ids).logits.float() for m in (full, half, four))
    assert 0 < (a - b).abs().max() < .05 and (a - b).abs().max() < (a - c).abs().max() < 1
    from bitsandbytes.nn import Linear4bit
    layers = [m for m in four.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14 and all(m.weight.dtype == torch.float32 and m.support_avx512bf16_for_cpu is False for m in layers), "stored in words of the load type"
    assert four.get_memory_footprint() < half.get_memory_footprint() < full.get_memory_footprint()


def test_names_without_weights(tiny):
    model = skeleton(read_config(locate(str(tiny))))
    assert all(p.is_meta for p in model.parameters())
    assert list(linear_layers(model)) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert linear_layers(model)["k_proj"] == {(16, 32)} and linear_layers(model)["down_proj"] == {(32, 48)}


def test_contract_of_a_model(tiny):
    "ids (B,T) -> logits (B,T,V), ours and through transformers"
    from llmbench.model.transformer import Transformer
    model, template = load_hub(str(tiny), dtype="fp32")
    ids = torch.tensor([template.render(TALKS[0])[0]])
    with torch.no_grad(): assert (model(ids) - Transformer.from_pretrained(tiny)(ids)).abs().max() < 1e-5
    assert not is_hub_folder(tiny) and model.config.max_length == 256


@pytest.mark.skipif("avx512_bf16" not in (open("/proc/cpuinfo").read() if __import__("os").path.exists("/proc/cpuinfo") else ""), reason="the fault lives on CPUs with AVX512-BF16")
def test_evaluation_does_not_spoil_four_bit_gradients(tmp_path):
    "bitsandbytes repacks 4-bit weights at an evaluation; gradients after it are wrong unless that is switched off"
    from bitsandbytes.nn import Linear4bit
    def gradient(cured, evaluated):
        torch.manual_seed(0)
        layer = Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.load_state_dict(dict(weight=torch.randn(256, 256, generator=torch.Generator().manual_seed(1))*.05))
        layer = layer.to("cpu")
        if cured: assert cure_four_bit(torch.nn.Sequential(layer)) == 1
        x, scale = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(2)).bfloat16(), torch.ones(256, requires_grad=True)
        if evaluated:
            with torch.no_grad(): layer.eval()(x[:, :1])
        h = (x*scale).bfloat16()
        (layer.train()(h) + h).float().pow(2).sum().backward()
        return scale.grad
    right = gradient(True, False)
    assert (gradient(True, True) - right).abs().max() <= 1e-2*right.abs().max()
    spoiled = (gradient(False, True) - right).norm()/right.norm()
    if spoiled < .1: pytest.skip("this version of bitsandbytes no longer repacks here")
    assert spoiled > .2


def test_types():
    assert float_type("auto", cpu=True) == torch.float32 and float_type("bf16") == torch.bfloat16
    with pytest.raises(UserError, match="unknown type"): float_type("int3")
