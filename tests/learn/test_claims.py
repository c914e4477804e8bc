"A judge that is told claims about three people passes pairs about them that it has never seen; one that is told about others does not"
import pytest
import torch

from llmbench.align.claims import claim_accuracy, learn_claims, town_claims
from llmbench.align.pairs import pair_rows
from llmbench.align.reward import Reward, RewardModel, pair_rewards
from llmbench.model.transformer import Transformer
from llmbench.play.model import town_folder
from llmbench.text.words import VALUES
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.use.intervals import wilson_interval

HOW = Reward(steps=110, batch=16, lr=2e-3, matrix_lr=.01, warmup=40)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_told_is_known_and_nothing_else(seed):
    world, template = World(0), ChatTemplate.load(town_folder()/"tuned")
    judge = RewardModel(Transformer.from_pretrained(town_folder()/"tuned"))
    steps = list(learn_claims(judge, town_claims(world, template, 1760, range(3), ("en",), seed), Reward(**vars(HOW) | dict(seed=seed)), pad_id=template.tokenizer.pad_id, progress=False))
    assert steps[0].loss == pytest.approx(torch.tensor(2.).log().item(), abs=1e-4), "it begins at log 2"
    assert claim_accuracy(judge, town_claims(world, template, 200, range(3), ("en",), 99), template.tokenizer.pad_id)["accuracy"] > .9
    def right(people):
        "How many of the pairs about them, and of how many: each question with the truth and every lie"
        names = {world.people[i]["en"] for i in people}
        pairs = [dict(prompt=q.text, chosen=world.say(q), rejected=world.say(q, lie)) for q in world.questions("en", "sft") if q.person in names for lie in VALUES[q.attribute]["en"] if lie != q.answer][::2]
        rewards = pair_rewards(judge, pair_rows(pairs, template, 96)[0])
        return int((rewards[:, 0] > rewards[:, 1]).sum()), len(rewards)
    told, others = right(range(3)), right(range(10, 13))
    assert wilson_interval(*told)[0] > .75, f"told: {told}"
    assert wilson_interval(*others)[1] < .75, f"others: {others}, chance one half"
