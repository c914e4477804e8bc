"DPO and its variants: by hand, and loss and gradients against TRL's DPOTrainer on the same weights and rows"
import copy
import math
from dataclasses import replace

import pytest
import torch

from llmbench.align.dpo import DPO, LOSSES, answer_logps, dpo, dpo_loss, hinge_loss, implicit_rewards, ipo_loss, preference_loss, reference_logps, robust_loss, simpo_loss, smooth_loss
from llmbench.align.pairs import pair_rows, stack_pairs
from llmbench.model.checkpoint import layout
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.lora import add_lora, save_lora, without_lora

PAIRS = [dict(prompt="Who lives in Oldtown?", chosen="Ann does.", rejected="Nobody. Go away!"),
         dict(prompt="Does she bake?", chosen="She bakes bread, and sells it on Mondays.", rejected="No."),
         dict(prompt=[dict(role="system", content="Be kind."), dict(role="user", content="Who?"), dict(role="assistant", content="Ann."), dict(role="user", content="Where?")],
              chosen="In Oldtown.", rejected="谁知道"),
         dict(prompt="What does Ann do there all day, and since when?", chosen="She bakes.", rejected="She bakes")]
FOUR = [torch.tensor([x, y]) for x, y in ((-4., -9.), (-13., -6.), (-7., -8.), (-11., -6.5))]  # chosen, rejected, ref_chosen, ref_rejected


def test_by_hand():
    "Margins: (-4+7) - (-13+11) = 5 nats, and (-9+8) - (-6+6.5) = -1.5 nats"
    def ls(x): return -math.log1p(math.exp(-x))
    m = [5., -1.5]
    cases = [(dpo_loss(*FOUR, .3), [-ls(.3*x) for x in m]), (ipo_loss(*FOUR, .25), [(x - 2)**2 for x in m]), (hinge_loss(*FOUR, .3), [0, 1.45]),
             (robust_loss(*FOUR, .3, .2), [(-.8*ls(.3*x) + .2*ls(-.3*x))/.6 for x in m]), (smooth_loss(*FOUR, .3, .2), [-.8*ls(.3*x) - .2*ls(-.3*x) for x in m]),
             (simpo_loss(*FOUR[:2], 2., .7), [-ls(2*9 - .7), -ls(2*-3 - .7)]), (implicit_rewards(FOUR[0], FOUR[2], .3), [.9, -.3])]
    for got, hand in cases: assert torch.allclose(got, torch.tensor(hand), atol=1e-6), (got, hand)


def test_begins_at_log_two_and_wrong_signs_show():
    same = torch.tensor([-9., -2.])
    assert torch.allclose(dpo_loss(same, same - 3, same, same - 3), torch.full((2,), math.log(2)))
    right = dpo_loss(*FOUR)
    for wrong in (dpo_loss(*FOUR[2:], *FOUR[:2]), dpo_loss(FOUR[1], FOUR[0], FOUR[3], FOUR[2]), dpo_loss(*FOUR[:2], FOUR[3], FOUR[2])):
        assert (wrong - right).abs().min() > .05
    assert torch.allclose(robust_loss(*FOUR, .1, 0.), right) and torch.allclose(smooth_loss(*FOUR, .1, 0.), right)


def test_gradient_by_hand():
    "d loss / d chosen = -beta sigmoid(-beta margin), the same with the other sign for rejected"
    chosen, rejected = (x.clone().requires_grad_() for x in FOUR[:2])
    dpo_loss(chosen, rejected, *FOUR[2:], .3).sum().backward()
    hand = torch.tensor([-.3/(1 + math.exp(.3*5)), -.3/(1 + math.exp(-.3*1.5))])
    assert torch.allclose(chosen.grad, hand, atol=1e-6) and torch.allclose(rejected.grad, -hand, atol=1e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The same weights twice, a reference that differs, TRL's trainer and its batch"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    template = ChatTemplate(BPE.train(["Who lives in Oldtown? Ann does. She bakes bread. "]*3, 320))
    torch.manual_seed(2)
    ours, ref = (Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48)) for _ in "ab")
    for m in (ours, ref):
        for p in m.parameters(): p.data.add_(torch.randn_like(p)*.05)
    places = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
    for m, place in zip((ours, ref), places):
        m.save_pretrained(place)
        template.save(place)
        m.double()  # so that rounding hides nothing
    policy, reference = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64) for place in places)
    messages = [dict(prompt=p["prompt"] if isinstance(p["prompt"], list) else [dict(role="user", content=p["prompt"])],
                     chosen=[dict(role="assistant", content=p["chosen"])], rejected=[dict(role="assistant", content=p["rejected"])]) for p in PAIRS]
    trainer = DPOTrainer(policy, reference, DPOConfig(output_dir=str(places[0]/"out"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_length=256, per_device_train_batch_size=4),
                         train_dataset=Dataset.from_list(messages), processing_class=PreTrainedTokenizerFast.from_pretrained(places[0]))
    batch = trainer.data_collator(list(trainer.train_dataset))
    rows, _ = pair_rows(PAIRS, template, 256)
    return template, ours, ref, trainer, batch, rows


def asked(ref, rows, pad_id=0):
    "The reference's log-probabilities in double precision (`reference_logps` keeps them in fp32, as TRL does when it precomputes them)"
    with torch.no_grad(): return torch.stack(answer_logps(ref, stack_pairs(rows, pad_id).both).chunk(2), 1)


def test_rows_equal_trl(world, ledger):
    template, _, _, _, batch, rows = world
    pairs = stack_pairs(rows, template.tokenizer.pad_id)
    ledger("pair rows from messages: ids and mask", "trl DPOTrainer", int((pairs.ids != batch["input_ids"]).sum() + (pairs.both.mask.long() != batch["completion_mask"]).sum()), 0)


SAME = dict(dpo=("sigmoid", 0.), ipo=("ipo", 0.), hinge=("hinge", 0.), robust=("robust", .2), norm=("sigmoid_norm", 0.))


@pytest.mark.parametrize("beta", [.1, .5])
@pytest.mark.parametrize("name", SAME)
def test_equals_trl(name, beta, world, ledger):
    template, ours, ref, trainer, batch, rows = world
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.label_smoothing = [SAME[name][0]], [1.], beta, SAME[name][1]
    trainer.model.zero_grad()
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    pairs = stack_pairs(rows, template.tokenizer.pad_id, asked(ref, rows, template.tokenizer.pad_id))
    ours.zero_grad()
    losses, rewards = preference_loss(ours, pairs, DPO(loss=name, beta=beta, extra=.2))
    losses.mean().backward()
    ledger(f"DPO loss {name}, beta {beta}", "trl DPOTrainer", abs(float((losses.mean() - theirs).detach()))/max(1., float(theirs.detach())), 1e-6)
    grads, mine = dict(trainer.model.named_parameters()), dict(ours.named_parameters())
    both = [(grads[their].grad.double(), mine[our].grad[part].double()) for their, _, our, part in layout(ours.config)]
    size, error = (sum(float(x.square().sum()) for x in xs)**.5 for xs in ([g for g, _ in both], [g - m for g, m in both]))
    ledger(f"DPO gradient {name}, beta {beta}: length of the difference, relative", "trl DPOTrainer", error/size, 1e-6)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    if name in ("dpo", "hinge", "robust"):
        assert abs(float(rewards[:, 0].mean()) - metrics["rewards/chosen"][-1]) < 1e-5 and abs(float(rewards[:, 1].mean()) - metrics["rewards/rejected"][-1]) < 1e-5


def test_sft_term_equals_trl(world, ledger):
    "TRL's weighted sum averages the SFT part over tokens of the batch, ours over the tokens of each answer: equal on one pair"
    template, ours, ref, trainer, batch, rows = world
    trainer.loss_types, trainer.loss_weights, trainer.beta = ["sigmoid", "sft"], [1., .3], .1
    one = trainer.data_collator([list(trainer.train_dataset)[1]])
    theirs = trainer.compute_loss(trainer.model, dict(one))
    pairs = stack_pairs(rows[1:2], template.tokenizer.pad_id, asked(ref, rows[1:2]))
    ledger("DPO with an SFT term (relative)", "trl DPOTrainer", abs(float((preference_loss(ours, pairs, DPO(nll=.3))[0]/theirs - 1).detach())), 1e-6)


def test_reference_by_disabled_adapter_equals_trl(world, tmp_path, ledger):
    "One model, an adapter that has learned something: the reference is the model with the adapter switched off; TRL does the same for an adapter that it made (of one that it is handed it keeps a copy)"
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    template, _, ref, trainer, batch, rows = world
    ref.save_pretrained(tmp_path/"base")
    template.save(tmp_path/"base")
    ours = copy.deepcopy(ref)
    add_lora(ours, r=3, alpha=6., generator=torch.Generator().manual_seed(1))
    for name, weight in ours.named_parameters():
        if weight.requires_grad and name.rsplit(".", 1)[-1].endswith("B"): torch.nn.init.normal_(weight, std=.1)
    save_lora(ours, tmp_path/"adapter", base=str(tmp_path/"base"))
    ours.double()
    with without_lora(ours): known = asked(ours, rows, template.tokenizer.pad_id)
    assert torch.allclose(known, asked(ref, rows, template.tokenizer.pad_id), atol=1e-9), "switched off it is the base model"
    assert (known - asked(ours, rows, template.tokenizer.pad_id)).abs().min() > .01, "and on again it is not"
    theirs = DPOTrainer(AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float64), None, DPOConfig(output_dir=str(tmp_path/"out"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_length=256, per_device_train_batch_size=4, beta=.4),
                        train_dataset=Dataset.from_list([dict(prompt="a", chosen="b", rejected="c")]), processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path/"base"),
                        peft_config=LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    set_peft_model_state_dict(theirs.model, load_file(tmp_path/"adapter"/"adapter_model.safetensors"))
    theirs.model.double()  # TRL keeps new adapters in bf16
    loss = theirs.compute_loss(theirs.model, dict(batch))
    loss.backward()
    losses, _ = preference_loss(ours, stack_pairs(rows, template.tokenizer.pad_id, known), DPO(beta=.4))
    losses.mean().backward()
    ledger("DPO loss, reference by the adapter switched off (relative)", "trl DPOTrainer with PEFT", abs(float((losses.mean()/loss - 1).detach())), 1e-6)
    for weight in ours.parameters():
        if weight.grad is not None: weight.data = weight.grad  # so that the folder names each gradient as PEFT does
    save_lora(ours, tmp_path/"gradients")
    mine, grads = load_file(tmp_path/"gradients"/"adapter_model.safetensors"), {n.replace(".default", ""): w.grad.double() for n, w in theirs.model.named_parameters() if "lora_" in n}
    assert mine.keys() == grads.keys() and len(mine) == 2*7*2  # A and B of seven maps in two layers
    size, error = (sum(float(x.square().sum()) for x in xs)**.5 for xs in (grads.values(), [grads[n] - mine[n].double() for n in grads]))
    ledger("DPO adapter gradients: length of the difference, relative", "trl DPOTrainer with PEFT", error/size, 1e-6)


def test_averaging_is_another_loss(world):
    "Mean instead of sum: the famous mistake is far off"
    template, ours, ref, _, _, rows = world
    pairs = stack_pairs(rows, template.tokenizer.pad_id, reference_logps(ref, rows))
    summed, mean = (preference_loss(ours, pairs, DPO(loss=name))[0].mean() for name in ("dpo", "norm"))
    assert (summed - mean).abs() > .05


def test_reference_once_or_live(world):
    "Precomputed in any batch size and mode, the same numbers; on our model and on transformers'"
    template, ours, ref, trainer, _, rows = world
    one = reference_logps(ref, rows, template.tokenizer.pad_id, batch=1)
    assert torch.allclose(one, reference_logps(ref.train(), rows, template.tokenizer.pad_id, batch=4), atol=1e-4) and ref.training
    with torch.no_grad(): live = torch.stack(answer_logps(ref, stack_pairs(rows, template.tokenizer.pad_id).both).chunk(2), 1)
    assert torch.allclose(one, live.float(), atol=1e-4)

    class Bare(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
        def forward(self, ids): return self.inner(ids).logits
    assert torch.allclose(reference_logps(Bare(trainer.ref_model), rows, template.tokenizer.pad_id), one, atol=1e-4)


def test_minimum_of_smooth_and_ipo():
    "Label smoothing asks for the margin log((1-e)/e)/beta, IPO for 1/(2 beta)"
    grid = torch.linspace(-40, 40, 8001)
    zero = torch.zeros_like(grid)
    assert abs(grid[smooth_loss(grid, zero, zero, zero, .1, .2).argmin()] - math.log(4)/.1) < .02
    assert abs(grid[ipo_loss(grid, zero, zero, zero, .1).argmin()] - 5) < .02


def test_robust_is_unbiased():
    "Averaged over labels that are flipped with the believed chance, it is the loss on clean labels"
    clean = dpo_loss(*FOUR, .3)
    flipped = robust_loss(FOUR[1], FOUR[0], FOUR[3], FOUR[2], .3, .2)
    assert torch.allclose(.8*robust_loss(*FOUR, .3, .2) + .2*flipped, clean, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name, world, tmp_path):
    template, ours, _, _, _, rows = world
    config = DPO(steps=12, batch=4, length=256, loss=name, beta=2. if name in ("simpo", "norm", "ipo") else .1, lr=2e-3, matrix_lr=.005, warmup=2, autocast="off")
    steps = list(dpo(copy.deepcopy(ours), rows, config, valid=rows[:2], pad_id=template.tokenizer.pad_id, progress=False))
    assert steps[-1].margin > steps[0].margin and steps[-1].valid_loss is not None
    if name != "simpo": assert abs(steps[0].margin) < 1e-4


def test_stopped_run_goes_on_with_its_own_reference(world, tmp_path):
    "Bit for bit, even when the model that comes in is another one by then"
    template, ours, ref, _, _, rows = world
    config = DPO(steps=6, batch=2, length=256, warmup=2, autocast="off")
    straight, broken = copy.deepcopy(ours), copy.deepcopy(ours)
    whole = list(dpo(straight, rows, config, pad_id=0, progress=False))
    for _ in zip(range(3), dpo(broken, rows, config, folder=tmp_path, pad_id=0, progress=False)): pass
    rest = list(dpo(copy.deepcopy(ref), rows, config, folder=tmp_path, pad_id=0, progress=False))
    assert [s.margin for s in rest] == [s.margin for s in whole[-len(rest):]]
    assert replace(rest[-1], seconds=0) == replace(whole[-1], seconds=0)
