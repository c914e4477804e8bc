"Bad conversation files and bad templates: each says what, where and how to mend it, and none ends in a traceback of ours"
import gzip
import json
import time

import pytest

from llmbench.core import UserError
from llmbench.text.bpe import BPE
from llmbench.tune.chat import DEFAULT, ChatTemplate, read_conversations
from llmbench.tune.sandbox import compile_template, run_template
from llmbench.tune.sft import SFT, batches, rows_of

GOOD = {"instruction": "Who?", "input": "", "output": "Ann."}
TALK = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]}
U, A = TALK["messages"]


def lines(*rows): return "\n".join(json.dumps(r) for r in rows)
def talk(*messages, **more): return lines(TALK, {"messages": list(messages), **more})
def share(*turns, **more): return lines({"conversations": [{"from": r, "value": v} for r, v in turns], **more})


# name: (file, content, arguments, what the message says, where it stands besides the file)
BAD = {
    "empty file":            ("a.json", "", {}, "the file is empty", ""),
    "only white space":      ("a.json", " \n\t\r\n", {}, "the file is empty", ""),
    "empty list":            ("a.json", "[]", {}, "no row in it", ""),
    "empty gzip":            ("a.json.gz", gzip.compress(b""), {}, "the file is empty", ""),
    "binary":                ("a.json", b"\x00\x01\x02\xff"*9, {}, "a binary file", ""),
    "utf-16":                ("a.json", json.dumps([GOOD]).encode("utf-16"), {}, "UTF-16", ""),
    "latin-1":               ("a.jsonl", lines(GOOD).encode() + '\n{"prompt": "Où?"}'.encode("latin-1"), {}, "not UTF-8: byte 0xf9", "line 2"),
    "gbk":                   ("a.json", '[{"prompt": "谁在那里？"}]'.encode("gbk"), {}, "not UTF-8", "line 1"),
    "cut json list":         ("a.json", json.dumps([GOOD, GOOD], indent=1)[:-30], {}, "broken JSON", "line "),
    "cut jsonl":             ("a.jsonl", lines(GOOD, GOOD)[:-10], {}, "broken JSON: Unterminated string", "line 2 column"),
    "cut after a comma":     ("a.json", json.dumps([GOOD])[:-1] + ",", {}, "broken JSON", "line 1"),
    "missing comma":         ("a.json", '[\n{"prompt": "a" "completion": "b"}\n]', {}, "broken JSON: Expecting ',' delimiter", "line 2 column"),
    "open string":           ("a.jsonl", '{"prompt": "a", "completion": "b}\n{"prompt": "c", "completion": "d"}', {}, "broken JSON: Invalid control character", "line 1"),
    "python, not json":      ("a.jsonl", "{'prompt': 'a', 'completion': 'b'}", {}, "broken JSON: Expecting property name", "line 1 column 2"),
    "after the bracket":     ("a.json", json.dumps([GOOD]) + "\n" + json.dumps(GOOD), {}, "something follows the closing bracket", "line 1"),
    "plain text":            ("a.json", "Who is Ann?\nA baker.", {}, "broken JSON", "line 1"),
    "list of lists":         ("a.json", "[[1, 2]]", {}, "a row is an object with named fields, not a list", "line 1"),
    "strings":               ("a.jsonl", lines(GOOD, "Who?"), {}, "a row is an object with named fields, not a string", "line 2"),
    "unknown fields":        ("a.jsonl", lines({"question": "Who?", "answer": "Ann."}), {}, "no known fields, only: question, answer", "line 1"),
    "no fields":             ("a.jsonl", "{}", {}, "no known fields, only: none", "line 1"),
    "pre-training text":     ("a.jsonl", lines({"text": "Once"}), {}, "no known fields, only: text", "line 1"),
    "wrapped":               ("a.json", json.dumps({"data": [GOOD]}), {}, "no known fields, only: data", "line 1"),
    "unknown format asked":  ("a.json", json.dumps([GOOD]), dict(format="vicuna"), "unknown format 'vicuna'", "line 1"),
    "wrong format asked":    ("a.json", json.dumps([GOOD]), dict(format="sharegpt"), "missing field", "line 1, field conversations"),
    "missing output":        ("a.jsonl", lines(GOOD, {"instruction": "Who?"}), {}, "missing field", "line 2, field output"),
    "null output":           ("a.jsonl", lines(GOOD | {"output": None}), {}, "the field is null", "line 1, field output"),
    "number as output":      ("a.jsonl", lines(GOOD | {"output": 42}), {}, "expected a string, found a number", "line 1, field output"),
    "list as input":         ("a.jsonl", lines(GOOD | {"input": ["a"]}), {}, "expected a string, found a list", "line 1, field input"),
    "history not pairs":     ("a.jsonl", lines(GOOD | {"history": [["a"]]}), {}, "expected [question, answer]", "line 1, field history, entry 1"),
    "object as messages":    ("a.jsonl", lines({"messages": {"role": "user"}}), {}, "expected a list, found an object", "line 1, field messages"),
    "string as a message":   ("a.jsonl", talk("Who?", A), {}, "a message is an object, not a string", "line 2, field messages, message 1"),
    "message without role":  ("a.jsonl", talk({"content": "Who?"}, A), {}, "missing field", "line 2, field messages, message 1, field role"),
    "message without text":  ("a.jsonl", talk(U, {"role": "assistant"}), {}, "missing field", "line 2, field messages, message 2, field content"),
    "null answer":           ("a.jsonl", talk(U, {"role": "assistant", "content": None}), {}, "the field is null", "line 2, field messages, message 2, field content"),
    "number as content":     ("a.jsonl", talk({"role": "user", "content": 7}, A), {}, "expected a string, found a number", "line 2, field messages, message 1, field content"),
    "picture":               ("a.jsonl", talk({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A), {}, "part 1 is not text", "message 1, field content"),
    "unknown role":          ("a.jsonl", talk({"role": "robot", "content": "Beep"}, A), {}, "unknown role 'robot'", "line 2, field messages, message 1, field role"),
    "unknown sharegpt role": ("a.jsonl", share(("bing", "Hi"), ("gpt", "Ho")), {}, "unknown role 'bing'", "line 1, field conversations, message 1, field from"),
    "two questions":         ("a.jsonl", talk(U, U, A), {}, "wrong order of roles: user behind user", "line 2, message 2"),
    "two answers":           ("a.jsonl", talk(U, A, A), {}, "wrong order of roles: assistant behind assistant", "line 2, message 3"),
    "answer first":          ("a.jsonl", talk(A, U, A), {}, "wrong order of roles: assistant at the beginning", "line 2, message 1"),
    "late system":           ("a.jsonl", talk(U, {"role": "system", "content": "s"}, A), {}, "wrong order of roles: system behind user", "line 2, message 2"),
    "tool first":            ("a.jsonl", share(("human", "a"), ("observation", "b"), ("gpt", "c")), {}, "wrong order of roles: tool behind user", "line 1, message 2"),
    "no answer":             ("a.jsonl", talk(U), {}, "no answer", "line 2"),
    "no messages":           ("a.jsonl", talk(), {}, "no answer", "line 2"),
    "zero-length answer":    ("a.jsonl", lines(GOOD, GOOD | {"output": ""}), {}, "an answer of zero length", "line 2, message 2"),
    "blank answer":          ("a.jsonl", talk(U, {"role": "assistant", "content": " \n"}), {}, "an answer of zero length", "line 2, message 2"),
    "lone surrogate":        ("a.jsonl", '{"prompt": "Who?", "completion": "Ann \\ud83d"}', {}, "half a character (lone surrogate U+D83D)", "line 1, message 2"),
    "surrogate in a call":   ("a.jsonl", talk(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "\udc00"}}]}), {}, "half a character (lone surrogate U+DC00)", "line 2, message 2"),
    "tools not json":        ("a.jsonl", share(("human", "a"), ("gpt", "b"), tools="a clock"), {}, "broken JSON inside the field", "line 1, field tools"),
    "tools a number":        ("a.jsonl", share(("human", "a"), ("gpt", "b"), tools=3), {}, "expected a list of tools", "line 1, field tools"),
    "tools of strings":      ("a.jsonl", share(("human", "a"), ("gpt", "b"), tools='["clock"]'), {}, "expected a list of tools", "line 1, field tools"),
    "call not json":         ("a.jsonl", share(("human", "a"), ("function_call", "clock()"), ("observation", "b"), ("gpt", "c")), {}, "broken JSON inside the field", "line 1, field conversations, message 2, field value"),
    "call without name":     ("a.jsonl", share(("human", "a"), ("function_call", '{"arguments": {}}'), ("gpt", "c")), {}, "missing field", "message 2, tool call, field name"),
    "call a list of text":   ("a.jsonl", share(("human", "a"), ("function_call", '["clock"]'), ("gpt", "c")), {}, "a tool call is an object, not a string", "message 2"),
    "arguments not json":    ("a.jsonl", talk(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}), {}, "broken JSON inside the field", "message 2, tool call, field arguments"),
    "instance not object":   ("a.jsonl", lines({"instruction": "Who?", "instances": ["Ann."]}), {}, "an instance is an object, not a string", "line 1, instance 1"),
    "instance without out":  ("a.jsonl", lines({"instruction": "Who?", "instances": [{"input": "x"}]}), {}, "missing field", "line 1, instance 1, field output"),
    "null chosen":           ("a.jsonl", lines({"prompt": "Who?", "chosen": None, "rejected": "No."}), {}, "the field is null", "line 1, field chosen"),
    "chosen a number":       ("a.jsonl", lines({"prompt": "Who?", "chosen": 1, "rejected": "No."}), {}, "expected a string, a message or a list of messages, found a number", "line 1, field chosen"),
    "slot unfilled":         ("a.jsonl", lines(GOOD, GOOD | {"output": "I am {{name}}."}), {}, "the slot {{name}} is not filled", "line 2"),
    "one slot unfilled":     ("a.jsonl", lines(GOOD | {"output": "I am {{name}} by {{ author }}."}), dict(slots={"name": "Town"}), "the slot {{ author }} is not filled", "line 1"),
    "csv without header":    ("a.csv", "What is 2+2?,4\nWhat is 3+3?,6\n", {}, "no known fields", "line 2"),
    "csv, too many cells":   ("a.csv", "prompt,completion\nWho?,Ann.\nWho, then?,Bo.\n", {}, "3 cells, but the header has 2", "line 3"),
    "csv, open quote":       ("a.csv", 'prompt,completion\n"Who?,Ann.\n', {}, "broken CSV", "line 2"),
    "csv, broken cell":      ("a.csv", 'messages\n"[{role: user}]"\n', {}, "broken JSON inside the field", "line 2, field messages"),
    "csv, header only":      ("a.csv", "prompt,completion\n", {}, "no row in it", ""),
    "csv, empty answer":     ("a.csv", 'prompt,completion\nWho?,""\n', {}, "an answer of zero length", "line 2, message 2"),
    "broken gzip":           ("a.jsonl.gz", gzip.compress(lines(GOOD).encode()*9)[:-12], {}, "broken gzip", ""),
    "damaged gzip":          ("a.jsonl.gz", gzip.compress(lines(GOOD).encode()*9)[:12] + b"damaged" + gzip.compress(lines(GOOD).encode()*9)[19:], {}, "broken gzip", ""),
    "broken parquet":        ("a.parquet", b"PAR1" + b"x"*40, {}, "broken Parquet", ""),
    "json named parquet":    ("a.parquet", lines(GOOD), {}, "broken Parquet", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, tmp_path):
    file, content, arguments, what, where = BAD[name]
    path = tmp_path/file
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught: read_conversations(path, **arguments)
    error = caught.value
    assert what in error.what, error
    assert error.where.startswith(str(path)) and where in error.where, error
    assert error.mend and len(error.mend) > 8, f"no mend: {error}"


def test_truncated_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    path = tmp_path/"a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TALK, {"messages": [U]}]), path)
    with pytest.raises(UserError, match="row 2: no answer"): read_conversations(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match="broken Parquet"): read_conversations(path)


def test_absent_and_folder_and_forbidden(tmp_path):
    with pytest.raises(UserError, match="No such file"): read_conversations(tmp_path/"absent.json")
    (tmp_path/"talks.jsonl").write_text(lines(GOOD))
    with pytest.raises(UserError) as caught: read_conversations(tmp_path)
    assert "folder" in caught.value.what and "talks.jsonl" in caught.value.mend
    with pytest.raises(UserError, match="too long"): read_conversations(tmp_path/("x"*5000 + ".json"))


GOOD_FORMS = {
    "bom":             ("a.json", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()),
    "crlf":            ("a.jsonl", lines(GOOD, GOOD).replace("\n", "\r\n").encode() + b"\r\n"),
    "crlf csv":        ("a.csv", b"\xef\xbb\xbfinstruction,input,output\r\nWho?,,Ann.\r\n\r\n"),
    "tabs":            ("a.tsv", b"prompt\tcompletion\nWho?\tAnn.\n"),
    "jsonl as json":   ("a.json", lines(GOOD, GOOD).encode()),
    "json as jsonl":   ("a.jsonl", json.dumps([GOOD], indent=2).encode()),
    "trailing comma":  ("a.json", json.dumps([GOOD]).encode()[:-1] + b",]"),
    "blank lines":     ("a.jsonl", b"\n\n" + lines(GOOD).encode() + b"\n\n\n"),
    "gzip unnamed":    ("a.jsonl", gzip.compress(lines(GOOD).encode())),
    "one object":      ("a.json", json.dumps(GOOD, indent=2).encode()),
    "quoted csv":      ("a.csv", b'prompt,completion\n"Who?","Ann."\n'),
    "csv of messages": ("a.csv", b'messages\n"' + json.dumps(TALK["messages"]).replace('"', '""').encode() + b'"\n'),
    "csv, bracket":    ("a.csv", b'prompt,completion\nWho?,Ann.\n[x] {y}?,"[z]"\n'),
    "no suffix":       ("talks", lines(GOOD).encode()),
}


@pytest.mark.parametrize("name", GOOD_FORMS)
def test_odd_but_good(name, tmp_path):
    file, content = GOOD_FORMS[name]
    (tmp_path/file).write_bytes(content)
    read = read_conversations(tmp_path/file)
    assert read[0]["messages"] == TALK["messages"] and read[0].where.startswith(str(tmp_path/file))


def test_line_numbers(tmp_path):
    path = tmp_path/"a.json"
    path.write_text("\n[\n" + json.dumps(GOOD, indent=1) + ",\n\n" + json.dumps(GOOD) + ", " + json.dumps(GOOD | {"output": "a\u2028b"}, ensure_ascii=False) + ",\n" + json.dumps(GOOD) + "\n]\n")
    assert [c.where.split()[-1] for c in read_conversations(path)] == ["3", "9", "9", "10"]
    path = tmp_path/"a.csv"
    path.write_text('prompt,completion\n"Who\nis it?",Ann.\n\nWhere?,"Old\ntown"\nSince?,May.\n')
    assert [c.where.split()[-1] for c in read_conversations(path)] == ["2", "5", "7"]


def test_leaving_broken_rows_out(tmp_path):
    path = tmp_path/"a.jsonl"
    path.write_text(lines(GOOD, GOOD | {"output": ""}, {"instruction": "Who?"}, GOOD | {"output": ""}))
    with pytest.warns(UserWarning, match=r"3 rows left out \(2 x an answer of zero length, 1 x missing field\); the first: .*a.jsonl line 2"):
        assert len(read_conversations(path, strict=False)) == 1
    path.write_text(lines({"x": 1}))
    with pytest.raises(UserError, match="no conversation could be read.*line 1: no known fields"): read_conversations(path, strict=False)
    path.write_text(lines(GOOD) + "\n{broken")
    with pytest.raises(UserError, match="line 2"): read_conversations(path, strict=False)  # broken JSON: what follows cannot be found


def test_real_traps(data):
    "Slots, a CSV without a header, sets that are no conversations"
    with pytest.raises(UserError, match=r"identity_slots.json line 2: the slot \{\{name\}\} is not filled. Pass slots="): read_conversations(data/"identity_slots.json")
    filled = read_conversations(data/"identity_slots.json", slots=dict(name="Town", author="the town's people"))
    assert len(filled) == 91 and not any("{{" in m["content"] for c in filled for m in c["messages"])
    assert filled[0]["messages"][1]["content"] == "Hello! I am Town, an AI assistant developed by the town's people. How can I assist you today?"
    assert "{{name}}" in read_conversations(data/"identity_slots.json", slots={})[0]["messages"][1]["content"]
    for name in ("mmlu_abstract_algebra_dev.csv", "c4_en.jsonl", "mt_bench_questions.jsonl", "xquad_en.json", "tinyshakespeare.txt", "gsm8k_test.jsonl"):
        with pytest.raises(UserError) as caught: read_conversations(data/name)
        assert name in caught.value.where and caught.value.mend
    assert len(read_conversations(data/"gsm8k_test.jsonl", rename=dict(question="prompt", answer="completion"))) == 1319


def test_real_preferences(data):
    for name in ("preference_en.json", "preference_zh.json"):
        for c in read_conversations(data/name):
            assert c["messages"][-1]["role"] == c["rejected"][-1]["role"] == "assistant" and c["messages"][-1] != c["rejected"][-1]
    labels = [c["label"] for c in read_conversations(data/"unpaired_en.json")]
    assert set(labels) == {True, False}


@pytest.fixture(scope="module")
def template(): return ChatTemplate(BPE.train(["Who lives here? Ann does. "]*3, 300))


def test_answer_longer_than_context(template, tmp_path):
    path = tmp_path/"a.jsonl"
    path.write_text(lines(GOOD, GOOD | {"output": "Ann. "*99}))
    rows, account = rows_of(read_conversations(path), template, 32)
    assert len(rows) == 1 and f"1 skipped: longer than 32 tokens, even a single exchange (first: {path} line 2)" in str(account)
    with pytest.raises(UserError, match="no row to learn from") as caught: batches([], SFT())
    assert caught.value.mend


# templates

BROKEN = {"unclosed": "{% for m in messages %}\n{{ m.content }}", "unknown filter": "{{ messages|lenght }}", "unknown tag": "a\n\n{% while x %}{% endwhile %}", "half a block": "{% generation %}x", "huge": "x"*200_001}
REFUSED = {
    "escape by class":      "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by format":     "{{ '{0.__class__.__mro__}'.format('') }}",
    "escape by init":       "{{ namespace.__init__.__globals__ }}",
    "escape by self":       "{{ self.__init__.__globals__ }}",
    "escape by spelling":   "{{ ''['__cl' ~ 'ass__'].mro() }}",
    "namespace":            "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    "change of the input":  "{{ messages.append(1) }}",
    "change of a message":  "{{ messages[0].update({'role': 'x'}) }}",
    "huge range":           "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops":         "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless macro":        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro":      "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless loop call":    "{% for m in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "text times":           "{{ 'a' * 10**10 }}",
    "list times":           "{{ [0] * 10**10 }}",
    "power":                "{{ 9**9**9 }}",
    "squares":              "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x*ns.x %}{% endfor %}",
    "doubling by tilde":    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by plus":     "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by block":    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubling a list":      "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists":         "{% set ns = namespace(x=['ha']) %}{% for i in range(45) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists as json": "{% set ns = namespace(x=['ha']) %}{% for i in range(45) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "nested objects":       "{% set ns = namespace(x={}) %}{% for i in range(45) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "nested with":          "{% with a=[1,1] %}" + "{% with a=[a,a] %}"*17 + "{% with a=[a,a,a,a,a] %}{{ a == a }}" + "{% endwith %}"*19,
    "compared lists":       "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(45) %}{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "replace filter":       "{{ ('a'*100000)|replace('a', 'b'*100000) }}",
    "replace method":       "{{ ('a'*100000).replace('a', 'b'*100000) }}",
    "join filter":          "{{ ([1]*100000)|join('b'*100000) }}",
    "join method":          "{{ ('b'*100000).join(['1']*100000) }}",
    "indent":               "{{ ('\n'*100000)|indent(100000) }}",
    "center filter":        "{{ 'a'|center(10**10) }}",
    "ljust":                "{{ 'a'.ljust(10**10) }}",
    "zfill":                "{{ 'a'.zfill(10**10) }}",
    "expandtabs":           "{{ ('\t'*1000).expandtabs(10**7) }}",
    "translate":            "{{ ('a'*100000).translate({97: 'b'*100000}) }}",
    "percent width":        "{{ '%10000000000d' % 1 }}",
    "percent star":         "{{ '%*d' % (10**9, 1) }}",
    "format width":         "{{ '{:>10000000000}'.format(1) }}",
    "format nested width":  "{{ '{:>{w}}'.format(1, w=10**10) }}",
    "format filter":        "{{ '%10000000000d'|format(1) }}",
    "format by map":        "{{ ['%1000000000d']|map('format', 1)|list }}",
    "format_map":           "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "date width":           "{{ strftime_now('%1000000000d') }}",
    "sum of lists":         "{{ ([[1]]*300000)|sum(start=[])|length }}",
    "filter block":         "{% filter replace('a', 'b'*100000) %}{{ 'a'*100000 }}{% endfilter %}",
    "much output":          "{% for i in range(90000) %}{{ 'a'*100 }}{% endfor %}",
    "folded constants":     "{{ 'aaaaaaaaaa'" + "|replace('a', 'aaaaaaaaaa')"*9 + " }}",
}
FAILING = {
    "include":          ("{% include '/etc/passwd' %}", "the template fails"),
    "import":           ("{% import 'os' as os %}", "the template fails"),
    "division":         ("\n{{ 1/0 }}", "the template fails: ZeroDivisionError"),
    "no such message":  ("{{ messages[7].content }}", "the template reads what is not there"),
    "no such name":     ("a\n{{ foo() }}", "the template reads what is not there: 'foo' is undefined"),
    "removed global":   ("{{ lipsum(10**6) }}", "the template reads what is not there"),
    "on purpose":       ("{{ raise_exception('no tools') }}", "the template refuses this conversation: no tools"),
    "text and number":  ("{{ messages[0].content + 1 }}", "the template fails: TypeError"),
}


def attempt(source, **budget): return run_template(compile_template(source, "hostile.jinja"), dict(messages=[dict(U), dict(A)], tools=None, add_generation_prompt=False), "hostile.jinja", **budget)


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_template(name):
    start = time.process_time()
    with pytest.raises(UserError) as caught: attempt(REFUSED[name])
    assert caught.value.what.startswith("refused: ") and caught.value.where.startswith("hostile.jinja") and caught.value.mend, caught.value
    assert time.process_time() - start < 6


@pytest.mark.parametrize("name", FAILING)
def test_failing_template(name):
    source, what = FAILING[name]
    with pytest.raises(UserError) as caught: attempt(source)
    line = 1 + source[:-4].count("\n")
    assert what in str(caught.value) and caught.value.where == f"hostile.jinja line {line}" and caught.value.mend


@pytest.mark.parametrize("name", BROKEN)
def test_broken_template(name, template):
    with pytest.raises(UserError) as caught: ChatTemplate(template.tokenizer, BROKEN[name], "mine.jinja")
    assert "template" in caught.value.what and caught.value.where.startswith("mine.jinja") and caught.value.mend
    if name == "unknown tag": assert caught.value.where == "mine.jinja line 3"


def test_deep_nesting_is_refused():
    for source in ("{{ " + "("*3000 + "1" + ")"*3000 + " }}", "{{ " + "["*300 + "1" + "]"*300 + " }}", "{% if 1 %}"*500 + "{% endif %}"*500, "{% for i in [1] %}"*40 + "{% endfor %}"*40):
        with pytest.raises(UserError, match="refused"): attempt(source)


def test_seconds_and_steps():
    slow = "{% for i in range(99999) %}{% set x = range(9999)|list|sort|length %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(UserError, match="runs too long"): attempt(slow, seconds=.3)
    assert time.monotonic() - start < 5
    loop = "{% for i in range(50) %}.{% endfor %}"
    assert attempt(loop, steps=50) == "."*50
    with pytest.raises(UserError, match="runs too long"): attempt(loop, steps=49)
    assert attempt("{{ 'ab'*50 }}", characters=100) == "ab"*50
    with pytest.raises(UserError, match="more than 99"): attempt("{{ 'ab'*50 }}", characters=99)
    with pytest.raises(UserError, match="writes more than 99"): attempt("{% for i in range(10) %}0123456789{% endfor %}", characters=99)


def test_long_conversations_are_no_attack(template):
    long = [m for i in range(600) for m in (dict(U, content=f"Who {i}? " + "x"*2500), A)]
    ids, mask = template.render(long)
    assert sum(mask) == 600*(len(template.tokenizer.encode("Ann.")) + 1) and len(ids) > 1_000_000


MISUSED = {
    "empty": ([], "an empty conversation"), "a string": ("Who?", "a conversation is a list of messages"), "strings": (["Who?"], "a conversation is a list of messages"),
    "object inside": ([{"role": "user", "content": object()}], "a message holds text, numbers, lists and objects, not object"),
    "unknown role": ([{"role": "robot", "content": "Beep"}], "unknown role robot"), "no content": ([{"role": "user"}], "'dict object' has no attribute 'content'"),
    "no role": ([{"content": "Hi"}], "'dict object' has no attribute 'role'"), "number": ([{"role": "user", "content": 5}], "the template"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misused_render(name, template):
    messages, what = MISUSED[name]
    with pytest.raises(UserError) as caught: template.render(messages)
    assert what in str(caught.value) and caught.value.mend


def test_bad_folders(template, tmp_path):
    with pytest.raises(UserError): ChatTemplate.load(tmp_path)
    template.tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="no chat template") as caught: ChatTemplate.load(tmp_path)
    assert "chat_template.jinja" in caught.value.mend
    (tmp_path/"chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(UserError, match="not UTF-8 text"): ChatTemplate.load(tmp_path)
    (tmp_path/"chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"chat_template.jinja line 1: broken template"): ChatTemplate.load(tmp_path)
    (tmp_path/"chat_template.jinja").unlink()
    (tmp_path/"tokenizer_config.json").write_text("{broken")
    with pytest.raises(UserError, match="broken JSON"): ChatTemplate.load(tmp_path)


def test_tokenizer_without_marks():
    gpt = BPE.train(["Who lives here?"]*3, 300, specials=("<|endoftext|>",))
    with pytest.raises(UserError, match=r"the tokenizer has no <\|pad\|>, .*<\|tool\|>") as caught: ChatTemplate(gpt)
    assert caught.value.mend
    assert ChatTemplate(gpt, DEFAULT + " ").text([U]).startswith("<|bos|>")  # another template is its owner's business; audit tells
