"""Conversations to ids and mask: our template and tokenizer beside transformers' apply_chat_template, on the same rows
Run: python benchmarks/chat.py FILE [FILE ...]      (conversation files; prints ratios, measured in turns in one process)"""
import argparse
import statistics
import tempfile
import time

from transformers import PreTrainedTokenizerFast

from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate, read_conversations

parser = argparse.ArgumentParser()
parser.add_argument("files", nargs="+")
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()

talks = {f: read_conversations(f) for f in args.files}
template = ChatTemplate(BPE.train([m["content"] for rows in talks.values() for c in rows[::3] for m in c["messages"]], 2000))
with tempfile.TemporaryDirectory() as home: theirs = PreTrainedTokenizerFast.from_pretrained(template.save(home))


def ours(c): return template.render(c["messages"], c.get("tools"))
def library(c): return theirs.apply_chat_template(c["messages"], tools=c.get("tools"), return_dict=True, return_assistant_tokens_mask=True)


for file, rows in talks.items():
    spent = {ours: [], library: []}
    for _ in range(args.rounds):
        for way in spent:
            template.tokenizer.chunk_ids.cache_clear()
            start = time.process_time()
            for c in rows: way(c)
            spent[way].append(time.process_time() - start)
    mine, other = statistics.median(spent[ours]), statistics.median(spent[library])
    print(f"{file.split('/')[-1]:>28}: {len(rows):5,} rows, ours {len(rows)/mine:8,.0f} rows/s of CPU time, transformers {len(rows)/other:8,.0f}, ratio {other/mine:.2f}")
