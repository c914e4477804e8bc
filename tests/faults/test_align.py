"Bad preferences, settings and folders: each says what, where and how to mend it"
import json

import pytest
import torch

from llmbench.align.dpo import DPO, dpo
from llmbench.align.pairs import pair_rows, ranking_pairs, read_preferences, split_pairs, stack_pairs
from llmbench.align.reward import Reward, RewardModel, length_bias, reward
from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.play.align import parse_ranking
from llmbench.text.bpe import SPECIALS, BPE
from llmbench.tune.chat import ChatTemplate

GOOD = dict(prompt="Who bakes?", chosen="Ann.", rejected="Nobody.")
TALK = {"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Ann."}, "rejected": {"from": "gpt", "value": "No."}}
U, A = (lambda text, role=role: dict(role=role, content=text) for role in ("user", "assistant"))

BAD = {  # name: (row in line 2, what the message says, which field)
    "no rejected": (dict(prompt="q", chosen="a"), "missing field", "rejected"),
    "no chosen": (dict(prompt="q", rejected="a"), "missing field", "chosen"),
    "a conversation": (dict(instruction="q", output="a"), "missing field", "chosen"),
    "no prompt": (dict(chosen="a", rejected="b"), "wrong order of roles", "message 1"),
    "empty rejected": (dict(GOOD, rejected=""), "zero length", "rejected"),
    "blank rejected": (dict(GOOD, rejected=" \n"), "zero length", "rejected"),
    "empty chosen": (dict(GOOD, chosen=""), "zero length", "message 2"),
    "null": (dict(GOOD, chosen=None), "null", "chosen"),
    "a number": (dict(GOOD, rejected=7), "expected a string", "rejected"),
    "other prompts": (dict(chosen=[U("q"), A("a")], rejected=[U("p"), A("b")]), "different prompts", "line 2"),
    "margin in words": (dict(GOOD, margin="much"), "expected a number", "margin"),
    "margin true": (dict(GOOD, margin=True), "expected a number", "margin"),
    "ranking without value": (dict(TALK, rejected={"from": "gpt"}), "missing field", "rejected"),
    "unknown role": (dict(TALK, chosen={"from": "robot", "value": "a"}), "unknown role", "chosen"),
    "half an emoji": (dict(GOOD, chosen="a\ud83d"), "half a character", "message 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name, tmp_path):
    row, what, field = BAD[name]
    path = tmp_path/"pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=what) as caught: read_preferences(path)
    assert "pairs.jsonl line 2" in str(caught.value) and field in str(caught.value) and caught.value.mend


@pytest.mark.parametrize("content,what", [("", "the file is empty"), ("[]", "no row in it"), ("{", "broken JSON"), ("[1]", "a row is an object")])
def test_bad_files(content, what, tmp_path):
    (tmp_path/"p.json").write_text(content)
    with pytest.raises(UserError, match=what) as caught: read_preferences(tmp_path/"p.json")
    assert "p.json" in str(caught.value)


def test_renamed_fields_and_csv(tmp_path):
    (tmp_path/"p.csv").write_text("question,better,worse\nWho?,Ann.,Nobody.\n")
    with pytest.raises(UserError, match="missing field"): read_preferences(tmp_path/"p.csv")
    (pair,) = read_preferences(tmp_path/"p.csv", rename=dict(question="prompt", better="chosen", worse="rejected"))
    assert pair == dict(prompt=[U("Who?")], chosen=[A("Ann.")], rejected=[A("Nobody.")])


@pytest.fixture(scope="module")
def small():
    template = ChatTemplate(BPE.train(["x"], 256 + len(SPECIALS)))
    rows, _ = pair_rows([GOOD, dict(GOOD, chosen="Bob.")], template, 60)
    return template, Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=48, max_length=64)), rows


@pytest.mark.parametrize("make,what", [(lambda: DPO(loss="dop"), "unknown loss"), (lambda: DPO(beta=0), "above 0"), (lambda: DPO(beta=float("nan")), "above 0"),
                                       (lambda: DPO(loss="robust", extra=.5), "share from 0 to below 0.5"), (lambda: ranking_pairs([["A", "B", "C"]]), "decides nothing"), (lambda: ranking_pairs(["A"]), "decides nothing"),
                                       (lambda: split_pairs([GOOD, GOOD]), "cannot be split"), (lambda: stack_pairs([]), "no pair to learn from"),
                                       (lambda: length_bias(torch.zeros(3, 2), torch.ones(3, 2)), "differ in length"),
                                       (lambda: parse_ranking("ABC", "ABCD"), "once each"), (lambda: parse_ranking("ABCE", "ABCD"), "not an answer"), (lambda: parse_ranking("A > A > B > C", "ABCD"), "once each")])
def test_misuse(make, what):
    with pytest.raises(UserError, match=what) as caught: make()
    assert caught.value.mend


def test_lengths_and_empty_sets(small):
    template, model, rows = small
    for call, what in ((lambda: list(dpo(model, rows, DPO(length=8), progress=False)), "DPO.length is 8"), (lambda: list(dpo(model, [], DPO(), progress=False)), "no pair to learn from"),
                       (lambda: list(reward(RewardModel(model), rows, Reward(length=8), progress=False)), "Reward.length is 8"), (lambda: list(reward(RewardModel(model), [], progress=False)), "no pair"),
                       (lambda: list(reward(RewardModel(model), rows, margin=[1.], progress=False)), "1 values for 2 pairs")):
        with pytest.raises(UserError, match=what) as caught: call()
        assert caught.value.mend


def test_a_folder_of_another_run(small, tmp_path):
    import copy
    template, model, rows = small
    how = DPO(steps=2, batch=2, length=60, autocast="off")
    list(dpo(copy.deepcopy(model), rows, how, folder=tmp_path, progress=False))
    with pytest.raises(UserError, match="other pairs"): list(dpo(copy.deepcopy(model), rows[:1], how, folder=tmp_path, progress=False))
    (tmp_path/"reference.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a whole safetensors file"): list(dpo(copy.deepcopy(model), rows, how, folder=tmp_path, progress=False))


def test_a_diverging_run_is_told(small):
    template, model, rows = small
    import copy
    broken = copy.deepcopy(model)
    broken.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="no weight was changed"): list(dpo(broken, rows, DPO(steps=2, batch=2, length=60, autocast="off"), progress=False, reference=model))


def test_a_reward_model_without_its_head(small, tmp_path):
    template, model, _ = small
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tensor is missing") as caught: RewardModel.from_pretrained(tmp_path)
    assert "score.weight" in str(caught.value)
