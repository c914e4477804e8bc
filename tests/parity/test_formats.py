"Conversation files: every row of the real ones against a plain reading of the JSON, each dialect by hand, round trips, and other readers of the same tables"
import csv
import gzip
import json

import pytest

from llmbench.core import UserError
from llmbench.tune.formats import FORMATS, Conversation, conversations_of, convert, format_of, read_conversations, read_rows

U, A, S, T = (lambda text, role=role: dict(role=role, content=text) for role in ("user", "assistant", "system", "tool"))


def call(name, arguments): return {"type": "function", "function": {"name": name, "arguments": arguments}}
def rows_in(path): return json.loads(path.read_text(encoding="utf-8")) if path.read_text(encoding="utf-8")[0] == "[" else [json.loads(line) for line in path.open(encoding="utf-8")]


def plain_alpaca(row): return [U("\n".join(x for x in (row["instruction"], row["input"]) if x)), A(row["output"])]


def plain_turn(turn):
    if turn["from"] == "function_call":
        made = json.loads(turn["value"])
        return A("") | {"tool_calls": [call(made["name"], made["arguments"])]}
    return {"human": U, "gpt": A, "observation": T, "system": S}[turn["from"]](turn["value"])


PLAIN = {
    "alpaca_en.json": plain_alpaca, "alpaca_zh.json": plain_alpaca,
    "sharegpt_toolcall_zh.json": lambda row: [plain_turn(t) for t in row["conversations"]], "sharegpt_medical_zh.jsonl": lambda row: [plain_turn(t) for t in row["conversations"]],
    "self_instruct_seeds.jsonl": lambda row: plain_alpaca({"instruction": row["instruction"], **row["instances"][0]}),
    "preference_en.json": lambda row: [plain_turn(t) for t in [*row["conversations"], row["chosen"]]], "preference_zh.json": lambda row: [plain_turn(t) for t in [*row["conversations"], row["chosen"]]],
    "unpaired_en.json": lambda row: [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}


@pytest.mark.parametrize("name", PLAIN)
def test_real_rows(name, data, ledger):
    read, raw = read_conversations(data/name), rows_in(data/name)
    assert len(read) == len(raw)
    different = sum(c["messages"] != PLAIN[name](row) for c, row in zip(read, raw))
    if "tools" in raw[0]: different += sum(c.get("tools", []) != json.loads(row["tools"]) for c, row in zip(read, raw))
    if "rejected" in raw[0]: different += sum(c["rejected"] != [plain_turn(row["rejected"])] for c, row in zip(read, raw))
    if "label" in raw[0]: different += sum(c["label"] != row["label"] for c, row in zip(read, raw))
    ledger(f"conversations read, {name}", "json and a plain mapping", different, 0)
    text = (data/name).read_text(encoding="utf-8").split("\n")
    for c, row in list(zip(read, raw))[::97]:  # the named line is where the row begins
        first = text[int(c.where.split()[-1]) - 1].strip()
        assert first.startswith("{") and (first == "{" or json.dumps(row, ensure_ascii=False)[:20].replace(" ", "") in first.replace(" ", ""))


BY_HAND = {
    "alpaca":              ({"instruction": "Add.", "input": "", "output": "5"}, [U("Add."), A("5")], {}),
    "alpaca, input":       ({"instruction": "Add.", "input": "2 3", "output": "5"}, [U("Add.\n2 3"), A("5")], {}),
    "alpaca, no input":    ({"instruction": "Add.", "output": "5"}, [U("Add."), A("5")], {}),
    "alpaca, null input":  ({"instruction": "Add.", "input": None, "output": "5"}, [U("Add."), A("5")], {}),
    "alpaca, all":         ({"instruction": "And 6?", "input": "6", "output": "11", "system": "Add up.", "history": [["2 3", "5"], ["1 1", "2"]]}, [S("Add up."), U("2 3"), A("5"), U("1 1"), A("2"), U("And 6?\n6"), A("11")], {}),
    "alpaca, ranked":      ({"instruction": "Add.", "input": "2 3", "chosen": "5", "rejected": "6"}, [U("Add.\n2 3"), A("5")], {"rejected": [A("6")]}),
    "sharegpt":            ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Sing."}, [S("Sing."), U("Hi"), A("Ho")], {}),
    "sharegpt, system in": ({"conversations": [{"from": "system", "value": "Sing."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "tools": "[]"}, [S("Sing."), U("Hi"), A("Ho")], {}),
    "sharegpt, tools":     ({"conversations": [{"from": "human", "value": "Time?"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null}}'}, {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}], "tools": '{"name": "f"}'},
                            [U("Time?"), A("") | {"tool_calls": [call("f", {"x": None})]}, T("2"), A("Two.")], {"tools": [{"name": "f"}]}),
    "sharegpt, two calls": ({"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{\\"y\\": 1}"}]'}, {"from": "observation", "value": "2"}, {"from": "observation", "value": "3"}, {"from": "gpt", "value": "!"}]},
                            [U("?"), A("") | {"tool_calls": [call("f", {}), call("g", {"y": 1})]}, T("2"), T("3"), A("!")], {}),
    "messages":            ({"messages": [S("s"), U("Hi"), A("Ho")]}, [S("s"), U("Hi"), A("Ho")], {}),
    "messages, developer": ({"messages": [{"role": "developer", "content": "s"}, U("Hi"), {"role": "model", "content": "Ho"}]}, [S("s"), U("Hi"), A("Ho")], {}),
    "messages, parts":     ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, A("Ho")]}, [U("Hi"), A("Ho")], {}),
    "messages, calls":     ({"messages": [U("?"), {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}, {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "2"}, A("Two.")], "tools": [{"type": "function", "function": {"name": "f"}}]},
                            [U("?"), A("") | {"tool_calls": [call("f", {"x": 1})]}, T("2") | {"name": "f", "tool_call_id": "c1"}, A("Two.")], {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "messages, thought":   ({"messages": [U("?"), A("!") | {"reasoning_content": "hm"}]}, [U("?"), A("!") | {"reasoning_content": "hm"}], {}),
    "messages, label":     ({"messages": [U("?"), A("!")], "label": False}, [U("?"), A("!")], {"label": False}),
    "messages, ranked":    ({"messages": [U("?")], "chosen": A("!"), "rejected": A("?!")}, [U("?"), A("!")], {"rejected": [A("?!")]}),
    "prompt":              ({"prompt": "2+3=", "completion": "5"}, [U("2+3="), A("5")], {}),
    "prompt, messages":    ({"prompt": [S("s"), U("?")], "completion": [A("!")]}, [S("s"), U("?"), A("!")], {}),
    "prompt, label":       ({"prompt": "?", "completion": "!", "label": True}, [U("?"), A("!")], {"label": True}),
    "pair":                ({"prompt": "?", "chosen": "!", "rejected": "?!"}, [U("?"), A("!")], {"rejected": [A("?!")]}),
    "pair, whole talks":   ({"prompt": "?", "chosen": [U("?"), A("!")], "rejected": [U("?"), A("?!")]}, [U("?"), A("!")], {"rejected": [U("?"), A("?!")]}),
    "pair, no prompt":     ({"chosen": [U("?"), A("!")], "rejected": [U("?"), A("?!")]}, [U("?"), A("!")], {"rejected": [U("?"), A("?!")]}),
    "pair, from and value": ({"prompt": [{"from": "human", "value": "?"}], "chosen": {"from": "gpt", "value": "!"}, "rejected": {"from": "gpt", "value": "?!"}}, [U("?"), A("!")], {"rejected": [A("?!")]}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    row, messages, more = BY_HAND[name]
    before = json.dumps(row)
    (got,) = conversations_of(row, "here")
    assert got == {"messages": messages, **more} and got.where == "here"
    assert json.dumps(row) == before, "the row was changed"


def test_seeds_nest():
    row = {"instruction": "Add.", "instances": [{"input": "2 3", "output": "5"}, {"input": "", "output": "?"}], "is_classification": False}
    assert [c["messages"] for c in conversations_of(row)] == [[U("Add.\n2 3"), A("5")], [U("Add."), A("?")]]


def test_detection():
    assert [format_of(f) for f in (["messages", "prompt"], ["instruction", "instances"], ["instruction", "conversations"], ["prompt", "chosen"], ["chosen", "rejected"], ["chosen"], ["text"], [])] == \
           ["messages", "seeds", "sharegpt", "prompt", "prompt", None, None, None]
    assert set(FORMATS) == {"sharegpt", "messages", "seeds", "alpaca", "prompt"}
    both = {"prompt": "?", "completion": "!", "instruction": "Add.", "output": "5"}
    assert conversations_of(both, format="prompt")[0]["messages"] == [U("?"), A("!")] and conversations_of(both)[0]["messages"] == [U("Add."), A("5")]


def test_round_trips(data):
    for name in ("alpaca_zh.json", "sharegpt_toolcall_zh.json", "unpaired_en.json"):
        for c in read_conversations(data/name):
            bare = {k: v for k, v in c.items() if k in ("messages", "tools")}
            for format in ("messages", "sharegpt") + (("alpaca",) if name.startswith("alpaca") else ()):
                row = json.loads(json.dumps(convert(c, format)))
                assert format_of(row) == format and conversations_of(row) == [bare], (c.where, format)
    for c in ({"messages": [S("s"), U("a"), A("b"), U("c"), A("d")]},): assert conversations_of(convert(c, "alpaca")) == [c]
    for bad in ({"messages": [U("a"), A("b"), U("c")]}, {"messages": [U("a"), A("b")], "tools": [{}]}):
        with pytest.raises(UserError, match="Alpaca holds"): convert(bad, "alpaca")
    with pytest.raises(UserError, match="cannot write 'csv'"): convert({"messages": [U("a")]}, "csv")


def test_tables_of_every_kind(data, tmp_path):
    "The same rows as JSON Lines, list, CSV, TSV, Parquet and packed: equal, and equal to what datasets reads"
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset, load_dataset
    rows = [{k: v for k, v in row.items()} for row in rows_in(data/"alpaca_zh.json")[:60]]
    tools = rows_in(data/"sharegpt_toolcall_zh.json")[:40]
    for name, some in (("alpaca", rows), ("tools", tools)):
        (tmp_path/f"{name}.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in some), encoding="utf-8")
        (tmp_path/f"{name}.json").write_text(json.dumps(some, indent=2), encoding="utf-8")
        (tmp_path/f"{name}.jsonl.gz").write_bytes(gzip.compress((tmp_path/f"{name}.jsonl").read_bytes()))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path/f"{name}.parquet")
        for suffix, mark in (("csv", ","), ("tsv", "\t")):
            with (tmp_path/f"{name}.{suffix}").open("w", encoding="utf-8", newline="") as f:
                out = csv.writer(f, delimiter=mark)
                out.writerow(some[0])
                out.writerows([v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in r.values()] for r in some)
        wanted = read_conversations(tmp_path/f"{name}.jsonl")
        assert len(wanted) == len(some)
        for path in sorted(tmp_path.glob(f"{name}.*")): assert read_conversations(path) == wanted, path.name
        theirs = load_dataset("json", data_files=str(tmp_path/f"{name}.jsonl"), split="train", cache_dir=str(tmp_path/"cache"))
        assert isinstance(theirs, Dataset) and [r for _, r in read_rows(tmp_path/f"{name}.jsonl")] == theirs.to_list()


def test_conversation_is_a_dictionary():
    c = Conversation(messages=[U("a")])
    assert c == {"messages": [U("a")]} and json.loads(json.dumps(c)) == c and c.where is None
