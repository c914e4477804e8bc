"""One update of TRL 1.12's PPOTrainer on tensors that we give it, and what it computed on the way: `python trl_ppo.py FOLDER_OF_TRL OUT.safetensors`

The trainer's own `train()` does the arithmetic. Only its sources are replaced: the sampled ids and their logits, the models' outputs, values and scores."""
import sys
from pathlib import Path

place, out = sys.argv[1:3]
sys.path.insert(0, place)
import torch
import trl
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast
from trl.experimental.ppo import ppo_trainer as module

assert trl.__version__ == "1.12.0", trl.__version__
N, P, A, V, PAD, END = 4, 3, 6, 20, 0, 2
LENGTHS = [4, 6, 1, 6]  # tokens of each answer, end token included; the second is cut off
g = torch.Generator().manual_seed(0)
torch.manual_seed(0)
responses = torch.randint(5, V, (N, A), generator=g)
for row, n, ended in zip(responses, LENGTHS, (True, False, True, True)):
    if ended: row[n - 1] = END
    row[n:] = PAD
query_responses = torch.cat([torch.randint(5, V, (N, P), generator=g), responses], 1)
old_logits, ref_logits, new_logits = (torch.randn(N, P + A, V, generator=g) for _ in range(3))
full_values, new_values = (torch.randn(N, P + A, 1, generator=g) for _ in range(2))
scores = torch.tensor([1.5, -.5, 2., .3])
record = dict(responses=responses, scores=scores, lengths=torch.tensor(LENGTHS), values=full_values[:, P - 1:-1, 0].contiguous(), new_values=new_values[:, P - 1:-1, 0].contiguous())
logps = {name: x.log_softmax(-1).gather(-1, responses[..., None])[..., 0] for name, x in (("old", old_logits[:, P - 1:-1]), ("ref", ref_logits[:, P - 1:-1]), ("new", new_logits[:, P - 1:-1]))}
record |= {f"{name}_logps": x for name, x in logps.items()}

from tokenizers import Tokenizer, models
vocabulary = {f"t{i}": i for i in range(V)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t1")), pad_token="t0", eos_token="t2", unk_token="t1")
config = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_labels=1, pad_token_id=PAD, eos_token_id=END)
policy, ref = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
value, reward = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))


class Output:
    def __init__(self, logits): self.logits = logits


forwards = []
def forward(model, ids, pad):
    "The reference first, then the trained pair"
    forwards.append(model)
    if len(forwards) == 1: return Output(ref_logits.clone())
    anchor = sum(p.sum() for p in model.parameters())*0  # so that backward has something to reach
    return Output(new_logits.clone() + anchor), new_values.clone() + anchor


def get_reward(model, ids, pad, context):
    first = get_reward.calls == 0
    get_reward.calls += 1
    return (full_values, None, None) if first else (None, scores.clone(), None)
get_reward.calls = 0

whitened, means = [], []
plain_whiten, plain_mean = module.masked_whiten, module.masked_mean
def whiten(values, mask, shift_mean=True):
    got = plain_whiten(values, mask, shift_mean)
    whitened.append((values.clone(), mask.clone(), got.clone()))
    return got
def mean(values, mask, axis=None):
    got = plain_mean(values, mask, axis)
    means.append((values.detach().clone(), mask.clone(), got.detach().clone()))
    return got


module.batch_generation = lambda *a, **k: (query_responses.clone(), old_logits[:, P - 1:-1].clone())
module.forward, module.get_reward, module.masked_whiten, module.masked_mean = forward, get_reward, whiten, mean
module.np.random.permutation = lambda n: __import__("numpy").arange(n)
args = module.PPOConfig(output_dir=str(Path(out).parent/"ppo"), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=N, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=1, total_episodes=N,
                        response_length=A, stop_token_id=END, missing_eos_penalty=.7, temperature=1., kl_coef=.05, gamma=.98, lam=.9, cliprange=.2, cliprange_value=.2, vf_coef=.1, whiten_rewards=False, num_sample_generations=0, local_rollout_forward_batch_size=N, save_strategy="no")
data = Dataset.from_list([dict(input_ids=query_responses[i, :P].tolist()) for i in range(N)])
trainer = module.PPOTrainer(args, tokenizer, policy, ref, reward, train_dataset=data, value_model=value, eval_dataset=data)
trainer.train()

(raw, padding, white) = whitened[0]  # plain advantages, the answer's mask, whitened advantages
# masked_mean inside masked_whiten uses plain_mean's own name: the calls that follow are the losses
losses = [m for m in means if m[0].shape == (N, A)]
names = ("vf", "vf_clipped", "pg", "pg_clipped")
record |= dict(advantages=raw, answer_mask=padding.long(), white=white)
for name, (_, mask, got) in zip(names, losses[-4:]): record |= {f"{name}_mask": mask.long(), name: got.view(1)}
save_file({name: x.contiguous() for name, x in record.items()}, out)
print("ok", len(means), len(losses))
