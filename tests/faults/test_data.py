"Bad corpora and cut work at `llmbench data`: a message and exit code 2, the same bytes after a kill, nothing lost on a full disk"
import errno
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llmbench.bench import data as bench_data, journal as journal_module
from llmbench.bench.data import CheckJob, CleanJob, DedupJob, Work, check_files, clean_files, dedup_files, exam_rows
from llmbench.cli import main
from llmbench.core import UserError, read_json
from llmbench.text.corpus import dedup, iter_documents, json_lines, read_documents, read_text, text_lines

PAGE = "Mira Bek lives in Northgate and bakes bread. The people of the town say that she keeps a parrot that has learned to sing. Number {}."
RUNNER = [sys.executable, "-c", "import sys; from llmbench.cli import main; sys.exit(main(sys.argv[1:]))"]


def put(path, texts):
    path.write_text("".join(json.dumps(dict(text=t), ensure_ascii=False) + "\n" for t in texts))
    return str(path)


def wrong(capsys, *arguments):
    try: code = main([str(a) for a in arguments])
    except SystemExit as e: code = e.code
    told = capsys.readouterr()
    assert code == 2 and "Traceback" not in told.err + told.out, told
    return told.err + told.out


def corpus(count):
    draw = random.Random(0)
    w = "the of and bread town parrot market morning window singing people baker north winter letter paper story house river garden".split()
    pages = [" ".join(draw.choice(w) for _ in range(60)) for _ in range(count)]
    return [p if i % 5 else f"<p>{pages[i//2]} &amp; {i % 3}</p>" for i, p in enumerate(pages)]


# A user's mistakes --------------------------------------------------------------------------------------------------

def case(name, words, *arguments): return pytest.param(arguments, words, id=name)


@pytest.mark.parametrize("arguments, words", [
    case("no file", ["no file is named", "llmbench data clean crawl.jsonl"], "clean"),
    case("no file to dedup", ["no file is named", "data dedup"], "dedup"),
    case("absent", ["no such file", "gone.jsonl"], "clean", "DIR/gone.jsonl"),
    case("unknown job", ["wash"], "wash", "x"),
    case("unknown rule", ["nothing is called 'lenght'", "length"], "clean", "DIR/good.jsonl", "--rules", "lenght", "--out", "DIR/o.jsonl"),
    case("unknown language", ["nothing is called 'de'"], "clean", "DIR/good.jsonl", "--languages", "de", "--out", "DIR/o.jsonl"),
    case("threshold", ["threshold of 1.5", "above 0"], "dedup", "DIR/good.jsonl", "--threshold", "1.5", "--out", "DIR/o.jsonl"),
    case("few permutations", ["2 permutations cannot find"], "dedup", "DIR/good.jsonl", "--permutations", "2", "--threshold", "0.3", "--out", "DIR/o.jsonl"),
    case("zero shingles", ["permutations and n are counts"], "dedup", "DIR/good.jsonl", "--n", "0", "--out", "DIR/o.jsonl"),
    case("output is the input", ["stands among the input"], "clean", "DIR/good.jsonl", "--out", "DIR/good.jsonl"),
    case("output inside the input", ["stands among the input"], "clean", "DIR", "--out", "DIR/o.jsonl"),
    case("output is a folder", ["output is a folder"], "clean", "DIR/good.jsonl", "--out", "DIR/folder"),
    case("wrong field", ["no text in field body", "Fields present: text"], "clean", "DIR/good.jsonl", "--field", "body", "--out", "DIR/o.jsonl"),
    case("wrong schema", ["Fields present: instruction, output", "line 1"], "dedup", "DIR/chat.jsonl", "--out", "DIR/o.jsonl"),
    case("mixed encodings", ["mixed.jsonl line 3", "not UTF-8", "iconv"], "clean", "DIR/mixed.jsonl", "--out", "DIR/o.jsonl"),
    case("binary", ["binary"], "clean", "DIR/photo.txt", "--out", "DIR/o.jsonl"),
    case("cut archive", ["broken gzip"], "dedup", "DIR/cut.jsonl.gz", "--out", "DIR/o.jsonl"),
    case("empty after cleaning", ["nothing is left of 3 documents", "'length': 3"], "clean", "DIR/short.jsonl", "--out", "DIR/o.jsonl"),
    case("only empty texts", ["no document in it"], "dedup", "DIR/blank.jsonl", "--out", "DIR/o.jsonl"),
    case("no blocklist", ["No such file"], "clean", "DIR/good.jsonl", "--blocklist", "DIR/no.txt", "--out", "DIR/o.jsonl"),
    case("no evaluation items", ["no evaluation item", "--test exam.jsonl"], "check", "DIR/good.jsonl", "--out", "DIR/o.jsonl"),
    case("evaluation field", ["Fields present: instruction, output"], "check", "DIR/good.jsonl", "--test", "DIR/chat.jsonl", "--out", "DIR/o.jsonl"),
    case("small groups", ["groups of 3 words"], "check", "DIR/good.jsonl", "--test", "DIR/good.jsonl", "--n", "3", "--out", "DIR/o.jsonl"),
    case("an output that cannot be", ["cannot write"], "clean", "DIR/good.jsonl", "--out", "DIR/short.jsonl/o.jsonl"),
])
def test_mistakes(arguments, words, tmp_path, capsys, monkeypatch):
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    put(tmp_path/"good.jsonl", [PAGE.format(i) for i in range(3)])
    put(tmp_path/"short.jsonl", ["Mira.", "Oban.", "林月。"])
    put(tmp_path/"blank.jsonl", ["", " "])
    (tmp_path/"folder").mkdir()
    (tmp_path/"chat.jsonl").write_text('{"instruction": "Bake!", "output": "No."}\n')
    (tmp_path/"mixed.jsonl").write_bytes(b'{"text": "one"}\n' + '{"text": "两"}\n'.encode() + '{"text": "三"}\n'.encode("gbk"))
    (tmp_path/"photo.txt").write_bytes(b"\x89PNG\0\0")
    (tmp_path/"cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'*5000)[:60])
    told = wrong(capsys, "data", *(a.replace("DIR", str(tmp_path)) for a in arguments)).replace("\n", " ")
    for word in words: assert word in told, f"{word!r} is missing in: {told}"
    assert not (tmp_path/"o.jsonl").exists(), "a half output was left under its own name"
    assert not list((tmp_path/"here").iterdir()), "something was written to the current folder"


def test_unreadable_file(tmp_path, capsys):
    file = tmp_path/"secret.jsonl"
    put(file, ["x"])
    file.chmod(0)
    if os.access(file, os.R_OK): pytest.skip("root reads everything")
    assert "Permission denied" in wrong(capsys, "data", "clean", file, "--out", tmp_path/"o.jsonl")


def test_one_long_line(tmp_path):
    "Refused before it is in memory: the line, the text file, the archive that unpacks to more"
    (tmp_path/"a.jsonl").write_bytes(b'"short"\n"' + b"x"*3_000_000 + b'"\n')
    with pytest.raises(UserError, match=r"a.jsonl line 2: a line of more than 1,000,000 bytes"): list(json_lines(tmp_path/"a.jsonl", longest=1_000_000))
    assert next(json_lines(tmp_path/"a.jsonl", longest=1_000_000))[1] == "short", "what stands before it has been read"
    (tmp_path/"a.txt").write_bytes(b"x"*3_000_000)
    with pytest.raises(UserError, match="one document of more than 1,000,000 bytes.*--lines"): read_text(tmp_path/"a.txt", 1_000_000)
    with pytest.raises(UserError, match="line 1: a line of more"): list(text_lines(tmp_path/"a.txt", 1_000_000))
    (tmp_path/"bomb.jsonl.gz").write_bytes(gzip.compress(b" "*50_000_000))
    with pytest.raises(UserError, match="bomb.jsonl.gz line 1"): list(json_lines(tmp_path/"bomb.jsonl.gz", 1_000_000))
    assert len(list(iter_documents(tmp_path/"a.txt"))[0]) == 3_000_000, "below the limit it is a document"


def test_a_gigabyte_without_a_line_end_is_refused_in_little_memory(tmp_path):
    "A sparse file of 1 GiB: refused at 256 MiB"
    with open(tmp_path/"long.jsonl", "wb") as f: f.truncate(2**30)
    program = ("import sys; from llmbench.core import peak_memory_gb; from llmbench.cli import main; code = main(sys.argv[1:]); "
               "print('peak', peak_memory_gb()); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", program, "data", "clean", str(tmp_path/"long.jsonl"), "--out", str(tmp_path/"o.jsonl")], capture_output=True, text=True)
    assert done.returncode == 2 and "line 1: a line of more than 268,435,456 bytes" in done.stderr and "Traceback" not in done.stderr
    assert float(done.stdout.split("peak")[1]) < 1, done.stdout


def test_duplicate_only_corpus(tmp_path):
    file = put(tmp_path/"a.jsonl", [PAGE.format(1)]*2000 + [PAGE.format(1).upper()]*500 + [f"{PAGE.format(1)} Printed {i}" for i in range(1500)])
    account = dedup_files(DedupJob((file,), str(tmp_path/"o.jsonl")))
    assert account.kept == 1 and account.dropped == {"exact copy": 2498, "near copy": 1501} and account.balanced()
    assert read_documents(tmp_path/"o.jsonl") == [PAGE.format(1)]


# Cut work -----------------------------------------------------------------------------------------------------------

JOBS = {"clean": (CleanJob, clean_files), "dedup": (DedupJob, dedup_files)}


@pytest.fixture(scope="module")
def crawl(tmp_path_factory): return put(tmp_path_factory.mktemp("crawl")/"crawl.jsonl", corpus(700))


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued_gives_the_same_bytes(name, how, crawl, tmp_path):
    kind, work = JOBS[name]
    work(kind((crawl,), str(tmp_path/"whole.jsonl")))
    out = tmp_path/"cut.jsonl"
    slow = ("import sys, time, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nimport llmbench.bench.data as d\nold = d.Work.append\n"
            "def append(self, *a): time.sleep(.004); return old(self, *a)\nd.Work.append = append\nd.Work.__init__.__defaults__ = (('part',), .05)\n"
            "from llmbench.cli import main; sys.exit(main(sys.argv[1:]))")
    running = subprocess.Popen([sys.executable, "-c", slow, "data", name, crawl, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path/"cut.jsonl.progress.json", time.time() + 60
    while not (journal.exists() and read_json(journal)["documents"] > 100):
        assert running.poll() is None and time.time() < deadline, running.stderr.read()
        time.sleep(.01)
    running.send_signal(how)
    told = running.communicate()[1]
    if how == signal.SIGINT: assert running.returncode == 130 and "goes on where it was" in told and "Traceback" not in told
    assert not out.exists() and 100 < read_json(journal)["documents"] < 700
    with open(f"{out}.part", "ab") as f: f.write(b'{"text": "half a li')  # as if the kill had come in the middle of a line
    account = work(kind((crawl,), str(out)))
    assert out.read_bytes() == (tmp_path/"whole.jsonl").read_bytes()
    assert account.balanced() and account.read == 700
    assert read_json(f"{out}.account.json") == read_json(tmp_path/"whole.jsonl.account.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.jsonl", "cut.jsonl.account.json", "whole.jsonl", "whole.jsonl.account.json"], "nothing else is left"


@pytest.mark.parametrize("name", JOBS)
def test_disk_full_while_streaming(name, crawl, tmp_path, monkeypatch, capsys):
    "The disk takes 40,000 bytes and no more; afterwards the same command goes on"
    kind, work = JOBS[name]
    work(kind((crawl,), str(tmp_path/"whole.jsonl")))

    class Full(io.BufferedRandom):
        left = 40_000
        def write(self, data):
            Full.left -= len(data)
            if Full.left < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def limited(path, mode): return Full(io.FileIO(path, "r+" if mode.startswith("r") else "w+"))
    monkeypatch.setattr(Work.__init__, "__defaults__", (("part",), 0.))
    with monkeypatch.context() as small:
        small.setattr(journal_module, "open", lambda path, mode: limited(path, mode) if str(path).endswith((".part", ".sketches", ".kept")) and mode != "rb" else open(path, mode), raising=False)
        told = wrong(capsys, "data", name, crawl, "--out", tmp_path/"o.jsonl")
    assert "No space left on device" in told and "goes on behind document" in told and not (tmp_path/"o.jsonl").exists()
    assert read_json(tmp_path/"o.jsonl.progress.json")["documents"] > 5
    account = work(kind((crawl,), str(tmp_path/"o.jsonl")))
    assert (tmp_path/"o.jsonl").read_bytes() == (tmp_path/"whole.jsonl").read_bytes() and account.balanced()


def test_a_real_limit_on_file_size(crawl, tmp_path):
    "The system itself refuses to write on (RLIMIT_FSIZE)"
    program = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
               "from llmbench.cli import main; sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", program, "data", "clean", crawl, "--out", str(tmp_path/"o.jsonl")], capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr and not (tmp_path/"o.jsonl").exists()


def test_a_broken_line_is_mended_and_the_work_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Work.__init__, "__defaults__", (("part",), 0.))
    lines = [json.dumps(dict(text=PAGE.format(i))) for i in range(50)]
    file = tmp_path/"a.jsonl"
    file.write_text("\n".join(lines[:40] + [lines[40][:-5]] + lines[41:]) + "\n")
    assert "a.jsonl line 41" in wrong(capsys, "data", "clean", file, "--out", tmp_path/"o.jsonl")
    assert read_json(tmp_path/"o.jsonl.progress.json")["documents"] == 40
    file.write_text("\n".join(lines) + "\n")
    decided = []
    monkeypatch.setattr(bench_data, "decide", lambda doc, *rest, old=bench_data.decide: decided.append(doc) or old(doc, *rest))
    assert clean_files(CleanJob((str(file),), str(tmp_path/"o.jsonl"))).read == 50 and len(decided) == 10
    assert len(read_documents(tmp_path/"o.jsonl")) == 50


def test_an_input_that_changed_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Work.__init__, "__defaults__", (("part",), 0.))
    file = tmp_path/"a.jsonl"
    file.write_text('{"text": "' + PAGE + '"}\n"cut')
    wrong(capsys, "data", "clean", file, "--out", tmp_path/"o.jsonl")
    put(file, [PAGE.format("other"), PAGE])
    assert "the input has changed before document 1" in wrong(capsys, "data", "clean", file, "--out", tmp_path/"o.jsonl")
    assert clean_files(CleanJob((str(file),), str(tmp_path/"o.jsonl"), shortest=3)).read == 2, "other options: another work, from the beginning"


def test_files_equal_lists_on_real_text(data, tmp_path):
    from llmbench.text.corpus import Account, clean_documents
    docs = read_documents(data/"c4_en.jsonl")
    account, expected = Account(), None
    expected = list(clean_documents(docs, account=account))
    found = clean_files(CleanJob((str(data/"c4_en.jsonl"),), str(tmp_path/"c.jsonl")))
    assert read_documents(tmp_path/"c.jsonl") == expected and found == account
    poems = read_documents(data/"zh_tang_poems.json")
    assert dedup_files(DedupJob((str(data/"zh_tang_poems.json"),), str(tmp_path/"d.jsonl"), threshold=.5)).kept < 1000
    assert read_documents(tmp_path/"d.jsonl") == dedup(poems, .5)


def test_check_keeps_whole_rows(tmp_path, data):
    exam = read_json(data/"alpaca_zh.json")[:30]
    (tmp_path/"exam.json").write_text(json.dumps(exam, ensure_ascii=False))
    put(tmp_path/"train.jsonl", [f"问：{exam[3]['output']}。完", PAGE])
    job = CheckJob((str(tmp_path/"train.jsonl"),), (str(tmp_path/"exam.json"),), str(tmp_path/"r.jsonl"), test_field="output", keep=str(tmp_path/"k.jsonl"))
    assert check_files(job)["leaked"] == 1
    assert [json.loads(line) for line in (tmp_path/"k.jsonl").read_text().splitlines()] == exam[:3] + exam[4:]
    report = [json.loads(line) for line in (tmp_path/"r.jsonl").read_text().splitlines()]
    assert report[3]["state"] == "leaked" and report[3]["share"] == 1 and report[3]["document"] == 0
    assert main(["data", "check", *job.text, "--test", *job.test, "--test-field", "output", "--out", str(tmp_path/"r2.jsonl")]) == 1
    assert exam_rows((str(data/"gsm8k_test.jsonl"),), "question")[1][0].keys() == {"question", "answer"}


def test_memory_does_not_grow_with_the_file(tmp_path):
    "2 and 6 MB: the peak grows by less than the text"
    program = ("import sys; from llmbench.core import peak_memory_gb; from llmbench.cli import main; code = main(sys.argv[1:]); "
               "print('peak', peak_memory_gb()); sys.exit(code)")
    draw, peaks = random.Random(1), []
    vocabulary = [f"word{i}" for i in range(3000)]
    for megabytes in (2, 6):
        file = tmp_path/f"{megabytes}.jsonl"
        with open(file, "w") as f:
            for _ in range(megabytes*55): f.write(json.dumps(dict(text=" ".join(draw.choices(vocabulary, k=2200)))) + "\n")
        done = subprocess.run([sys.executable, "-c", program, "data", "dedup", str(file), "--out", str(tmp_path/"o.jsonl")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split("peak")[1])*1000)
    assert peaks[1] - peaks[0] < 2.5, f"peaks of {peaks} MB for 2 and 6 MB of text"
