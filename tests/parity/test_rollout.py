"Sampled answers: what counts, what was drawn and how likely it was, for our model and transformers'"
import copy
from dataclasses import replace

import pytest
import torch

from llmbench.align.rollout import Prompt, Rollout, Sampling, answer_states, counted, drawn_logps, kept_tokens, model_reward, passes_tests, read_answers, rewards_of, rollout, sample_answers
from llmbench.core import UserError, seq_logps
from llmbench.model.transformer import Config, Transformer

V, END = 23, 2


class Tokens:
    "Ids as text"
    end_id, pad_id = END, 0
    def decode(self, ids): return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Transformer(Config(vocab_size=V, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48, max_length=40))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(2.5)
        model.embed.weight[END] += .2
    return model


PROMPTS = [Prompt([1, 5, 9, 4], "a"), Prompt([1, 7], "b"), Prompt([1, 3, 3, 8, 6, 11], "c")]


def marks(samples): return [float(len(s.ids)) for s in samples]


def rolled(model, seed=0, **how): return rollout(model, PROMPTS, marks, Tokens(), Sampling(group=5, new_tokens=9, **how), ref=model, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", [dict(), dict(temperature=1.7), dict(temperature=.6), dict(top_k=3), dict(top_p=.6), dict(temperature=1.4, top_k=6, top_p=.8)], ids=str)
def test_frequencies_match_the_scored_probabilities(how, model, ledger):
    "Chi-square of 6,000 first tokens; tokens outside the filter never come"
    from scipy.stats import chisquare
    sampling = Sampling(group=6000, new_tokens=1, **how)
    ids, mask, _ = sample_answers(model, [PROMPTS[0].ids], sampling, END, 0, torch.Generator().manual_seed(3))
    with torch.no_grad(): logits, _ = answer_states(model, ids[:1], mask[:1])
    p = drawn_logps(logits, sampling.temperature, kept_tokens(logits, sampling))[0].exp().double()
    seen = torch.bincount(ids[:, -1], minlength=V).double()
    assert (seen[p == 0] == 0).all() and abs(p.sum() - 1) < 1e-6
    likely = p*6000 >= 5
    parts = [torch.cat([x[likely], x[~likely].sum()[None]]) for x in (seen, p/p.sum()*6000)]
    if parts[1][-1] < 1e-9: parts = [x[:-1] for x in parts]
    value = chisquare(*[x.numpy() for x in parts]).pvalue
    ledger(f"sampled tokens, {how or 'plain'}: 1 - p of chi-square", "scored probabilities", 1 - value, 1 - 1e-3)
    wrong = drawn_logps(logits, sampling.temperature*1.5, kept_tokens(logits, sampling))[0].exp().double()
    parts[1] = torch.cat([(wrong/wrong.sum()*6000)[likely], (wrong[~likely].sum()*6000)[None]])[:len(parts[0])]
    parts[1] *= parts[0].sum()/parts[1].sum()
    assert chisquare(*[x.numpy() for x in parts]).pvalue < 1e-3, "the test cannot tell another temperature"


@pytest.mark.parametrize("how", [dict(), dict(temperature=1.7), dict(top_k=3), dict(temperature=.7, top_p=.8)], ids=str)
def test_old_log_probabilities_equal_recomputed_ones(how, model, ledger):
    "Row by row, without padding, by another path: the whole logits, filtered, normalised"
    roll = rolled(model, **how)
    worst = 0.
    for i in range(len(roll)):
        n = int((roll.mask[i].nonzero()[-1] + 1))
        ids = roll.ids[i:i + 1, :n]
        with torch.no_grad(): p = torch.stack([Filtered.probs(row, how) for row in model(ids)[0, :-1]])
        alone = p.gather(-1, ids[0, 1:, None])[:, 0].log()*roll.mask[i, 1:n]
        worst = max(worst, float((alone - roll.old_logps[i, :n - 1]).abs().max()))
    ledger(f"old log-probabilities, {how or 'plain'}", "recomputed row by row", worst, 1e-5)
    assert roll.old_logps.isfinite().all() and (roll.old_logps[roll.counts == 0] == 0).all()


class Filtered:
    "Temperature, top-k, top-p of one row of logits, token by token"
    @staticmethod
    def probs(logits, how):
        p = (logits.double()/how.get("temperature", 1.)).softmax(-1)
        order, keep, mass = p.argsort(descending=True).tolist(), [], 0.
        if how.get("top_k"): order = order[:how["top_k"]]
        whole = sum(float(p[i]) for i in order)
        for i in order:
            if mass >= how.get("top_p", 1.): break
            keep.append(i)
            mass += float(p[i])/whole
        out = torch.zeros_like(p)
        out[keep] = p[keep]/p[keep].sum()
        return out


def test_nothing_after_the_end_counts(model):
    roll = rolled(model)
    assert roll.ended.any() and not roll.ended.all()
    for i, s in enumerate(roll.samples):
        prompt = PROMPTS[i//5]
        n, a = len(prompt.ids), len(s.ids)
        assert s.prompt is prompt and roll.ids[i, :n].tolist() == prompt.ids
        assert roll.mask[i].tolist() == [0]*n + [1]*a + [0]*(roll.ids.shape[1] - n - a)
        assert roll.ids[i, n + a:].tolist() == [0]*(roll.ids.shape[1] - n - a), "padding on the right"
        assert (s.ids[-1] == END) == s.ended == bool(roll.ended[i]) and END not in s.ids[:-1]
        assert s.ended or a == 9
        assert s.text == Tokens().decode(s.ids[:-1] if s.ended else s.ids)
        assert roll.rewards[i] == a
    assert torch.allclose(roll.old_logps.sum(1), seq_logps(model(roll.ids), roll.ids, roll.mask), atol=1e-5)
    changed = roll.ids.masked_fill((roll.mask == 0) & (torch.arange(roll.ids.shape[1]) > 5), 9)
    with torch.no_grad(): again = read_answers(model, changed, roll.mask, Sampling()).logps
    assert torch.allclose(again, roll.old_logps, atol=1e-5), "what stands on padding matters"


def test_the_end_token_may_be_the_padding_token(model):
    class Same(Tokens): pad_id = END
    roll = rollout(model, PROMPTS, marks, Same(), Sampling(group=5, new_tokens=9), generator=torch.Generator().manual_seed(0))
    other = rolled(model)
    assert torch.equal(roll.mask, other.mask) and torch.allclose(roll.old_logps, other.old_logps, atol=1e-5)


def test_counted_by_hand():
    counts, ended = counted(torch.tensor([[2, 2, 5], [5, 5, 5], [5, 2, 5]]), 2)
    assert counts.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]] and ended.tolist() == [True, False, True]


def test_groups_differ_and_seeds_repeat(model):
    one, two, three = rolled(model, 0), rolled(model, 0), rolled(model, 1)
    assert torch.equal(one.ids, two.ids) and one.ids.tolist() != three.ids.tolist()
    assert len({s.text for s in one.samples[:5]}) > 1


def test_rows_pick_everything(model):
    roll = rolled(model, top_k=3)
    part = roll.rows([7, 2, 14])
    assert [s.text for s in part.samples] == [roll.samples[i].text for i in (7, 2, 14)]
    with torch.no_grad(): again = read_answers(model, part.ids, part.mask, Sampling(top_k=3), part.kept).logps
    assert torch.allclose(again, part.old_logps, atol=1e-5) and torch.allclose(part.ref_logps, part.old_logps, atol=1e-5)
    assert part.kept.shape == (int(part.mask.sum()), V) and part.kept.sum(1).eq(3).all()


def test_the_filter_of_the_policy_that_drew_is_kept(model):
    roll, other = rolled(model, top_k=2), copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2))*.3)
        kept, anew = (read_answers(other, roll.ids, roll.mask, Sampling(top_k=2), k).logps for k in (roll.kept, None))
    assert kept.isfinite().all() and not anew.isfinite().all()


def test_entropy_and_values(model):
    class Sum(torch.nn.Module):
        def forward(self, hidden): return hidden.sum(-1, keepdim=True)
    roll = rollout(model, PROMPTS, marks, Tokens(), Sampling(group=2, new_tokens=4), head=Sum(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read = read_answers(model, roll.ids, roll.mask, Sampling())
        hidden = model.hidden(roll.ids).sum(-1)[:, :-1]*roll.counts
        p = model(roll.ids)[:, :-1].log_softmax(-1)
    assert torch.allclose(roll.old_values, hidden, atol=1e-4)
    assert torch.allclose(read.entropy, -(p.exp()*p).sum(-1)[roll.counts > 0].mean(), atol=1e-5)


@pytest.mark.parametrize("how", [dict(), dict(top_k=3)], ids=str)
def test_many_answers_are_scored_in_parts(how, model, monkeypatch):
    "With room for a few rows of logits only, the same numbers come out; with gradients all rows are read at once"
    from llmbench.align import rollout as module
    class Sum(torch.nn.Module):
        def forward(self, hidden): return hidden.sum(-1, keepdim=True)
    roll, seen = rolled(model, **how), []
    with torch.no_grad(): whole = read_answers(model, roll.ids, roll.mask, Sampling(**how), head=Sum())
    states = module.answer_states
    monkeypatch.setattr(module, "answer_states", lambda m, ids, mask: (seen.append(len(ids)), states(m, ids, mask))[1])
    monkeypatch.setattr(module, "MOST", 4*roll.ids.shape[1]*V)
    with torch.no_grad(): parts = read_answers(model, roll.ids, roll.mask, Sampling(**how), head=Sum())
    assert seen == [4, 4, 4, 3]
    for name in ("logps", "entropy", "values"): assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-5), name
    assert parts.kept is None if whole.kept is None else torch.equal(parts.kept, whole.kept)
    again = read_answers(model, roll.ids, roll.mask, Sampling(**how), whole.kept)
    assert seen[4:] == [15] and again.logps.requires_grad
    with torch.no_grad(): given = read_answers(model, roll.ids, roll.mask, Sampling(**how), whole.kept)
    assert torch.allclose(given.logps, whole.logps, atol=1e-5)


def test_transformers_model(model, tmp_path, ledger):
    "The same answers and log-probabilities from transformers' Llama with the same weights"
    from transformers import AutoModelForCausalLM
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = rolled(model, temperature=1.2)
    with torch.no_grad(): read = read_answers(theirs, ours.ids, ours.mask, Sampling(temperature=1.2))
    ledger("old log-probabilities", "transformers Llama", (read.logps - ours.old_logps).abs().max(), 1e-4)
    roll = rolled(theirs, temperature=1.2)
    assert torch.equal(roll.ids, ours.ids) and torch.allclose(roll.old_logps, ours.old_logps, atol=1e-4)


def test_model_reward():
    def score(ids, mask): return (ids*mask).sum(1).float()
    roll_marks = model_reward(score, batch=2)
    from llmbench.align.rollout import Sample
    samples = [Sample(Prompt([1]), [5, 6], "", True), Sample(Prompt([1, 1]), [9], "", False), Sample(Prompt([3]), [2], "", True)]
    assert roll_marks(samples) == [12., 11., 5.]


def test_a_reward_model_gives_the_marks(model):
    "`align.reward.RewardModel` through `model_reward`: each answer alone, without padding, gets the same mark"
    from llmbench.align.reward import RewardModel
    rater = RewardModel(model)
    with torch.no_grad(): rater.score.normal_(generator=torch.Generator().manual_seed(0))
    roll = rollout(model, PROMPTS, model_reward(rater, batch=4), Tokens(), Sampling(group=5, new_tokens=9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): alone = torch.cat([rater(torch.tensor([s.prompt.ids + s.ids])) for s in roll.samples])
    assert torch.allclose(roll.rewards, alone, atol=1e-4) and roll.rewards.std() > .1


@pytest.mark.parametrize("code,passes", [
    ("def f(x): return x + 1", True), ("def f(x): return x", False), ("def f(x) return", False), ("exit(0)", False), ("import os; os._exit(0)", False),
    ("raise SystemExit(0)", False), ("while True: pass", False), ("f = [0]*10**11", False), ("def f(x):\n print('x'*100)\n return x + 1", True), ("import time; time.sleep(60)", False)])
def test_unit_tests_in_a_process(code, passes):
    assert passes_tests(code, "assert f(1) == 2", seconds=1.) == passes


def test_sampling_refuses_nonsense():
    for change in (dict(temperature=0.), dict(group=0), dict(top_p=0.), dict(top_p=1.1), dict(new_tokens=0), dict(top_k=-1)):
        with pytest.raises(UserError, match=f"Sampling.{next(iter(change))}"): Sampling(**change)
    assert not replace(Sampling(), temperature=.5).filtered and Sampling(top_k=1).filtered and isinstance(rewards_of, object) and Rollout
