"What curation refuses, and what a server may do to it"
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llmbench.bench.grow import Endpoint, GrowCommand, do_grow, own_model
from llmbench.cli import main
from llmbench.core import UserError
from llmbench.play.curate import best_of_explorer, mixture_explorer
from llmbench.text.batch import pad
from llmbench.tune import curate
from llmbench.tune.curate import Grow, Journal, Task, grow, read_tasks
from llmbench.tune.mixture import curriculum, mixture, stratified, temperature_shares, weighted
from llmbench.tune.select import best_of, expected_best, k_centre, tfidf

SEEDS = [Task("Name three birds of the north.", "", "Owl, crow, wren.", False)]
ROWS = [([1, 2], [0, 1]), ([3, 4], [0, 1])]


def good(text): return dict(choices=[dict(message=dict(role="assistant", content=text))])


@pytest.fixture
def server():
    "A server that plays a script: (status, body, headers), or a function of the request"
    class Handler(BaseHTTPRequestHandler):
        script, seen = [], []
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append(dict(asked, key=self.headers.get("Authorization")))
            turn = self.script.pop(0) if self.script else (200, good("1"), {})
            if turn == "cut":  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "5000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                return
            status, body, headers = turn(asked) if callable(turn) else turn
            self.send_response(status)
            for name, value in headers.items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())
        def log_message(self, *args): pass
    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(.02,), daemon=True)
    thread.start()
    made.script, made.seen, made.url = Handler.script, Handler.seen, f"http://127.0.0.1:{made.server_port}/v1"
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("trouble", [(500, b"oops", {}), (503, b"", {}), (429, b"slow", {"Retry-After": "0"}), (429, b"slow", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), (408, b"late", {}), (200, b"<html>", {}), (200, b"", {}),
                                     (200, {"error": "busy"}, {}), (200, {"choices": []}, {}), (200, {"choices": [{"message": {"content": None}}]}, {}), (200, b"\xff\xfe", {}), (200, ["list"], {}), "cut"])
def test_busy_servers_are_asked_again(server, trouble):
    server.script += [trouble, (200, good("fine"), {})]
    endpoint = Endpoint(server.url, "m", retries=1, pause=.01)
    assert endpoint("hello") == "fine" and endpoint.calls == 2
    server.script += [trouble, trouble]
    with pytest.raises(UserError, match="no usable reply in 2 tries.*Is the server running"): Endpoint(server.url, "m", retries=1, pause=.01)("hello")


@pytest.mark.parametrize("status, words", [(400, "does not take"), (401, "--key"), (403, "may not use"), (404, "--model"), (422, "does not take"), (302, "It moved"), (307, "It moved")])
def test_wrong_requests_are_not_repeated(server, status, words):
    server.script.append((status, b"no: sk-123", {"Location": f"{server.url}/elsewhere"} if status < 400 else {}))
    endpoint = Endpoint(server.url, "m", key="sk-123", retries=5, pause=.01)
    with pytest.raises(UserError, match=words) as told: endpoint("hello")
    assert endpoint.calls == 1 and "sk-123" not in str(told.value) and "sk-123" not in repr(endpoint)
    assert server.seen[-1]["key"] == "Bearer sk-123" and len(server.seen) == 1


def test_nobody_there_and_nobody_in_time(server):
    with pytest.raises(UserError, match="refused"): Endpoint("http://127.0.0.1:9/v1", "m", retries=1, pause=.01)("x")
    gate = threading.Event()
    def hang(asked):
        gate.wait(5)
        return 200, good("late"), {}
    server.script += [hang]
    with pytest.raises(UserError, match="timed out"): Endpoint(server.url, "m", retries=0, timeout=.2)("x")
    gate.set()
    with pytest.raises(UserError, match="no address"): Endpoint("localhost/v1", "m")


def test_a_server_dies_and_comes_back(server, tmp_path):
    "The command ends with a sentence and code 2; called again it goes on, and nothing is asked twice that is on disk"
    seeds, out = tmp_path/"seeds.jsonl", tmp_path/"out.jsonl"
    seeds.write_text("".join(json.dumps(dict(instruction=f"Name three {x} of the north.", output="Owl.")) + "\n" for x in ("birds", "trees")))
    command = ["grow", str(seeds), "--out", str(out), "--url", server.url, "--model", "m", "--want", "2", "--retries", "0"]
    server.script += [(200, good(" Tell a joke about a mill.\n4. Describe a cold winter morning."), {}), (200, good(" none\nOutput: It turned."), {}), (500, b"dead", {})]
    assert main(command) == 2
    assert [r["instruction"] for r in Journal(out).rows["kept"]] == ["Tell a joke about a mill."]
    server.script += [(200, good(" Tell a joke about a mill.\n4. Describe a cold winter morning."), {}), (200, good(" none\nOutput: Frost."), {})]
    before = len(server.seen)
    assert main(command) == 0
    assert [r["output"] for r in Journal(out).rows["kept"]] == ["It turned.", "Frost."] and len(server.seen) == before + 2


def test_command(tmp_path, capsys):
    assert main(["grow"]) == 2 and "no file of seed tasks" in capsys.readouterr().err
    assert main(["grow", "absent.jsonl", "--model", "m", "--url", "http://x/v1"]) == 2 and "cannot read" in capsys.readouterr().err
    with pytest.raises(UserError, match="no environment variable of that name"): do_grow(GrowCommand("s", url="http://x", model="m", key="sk-secret"))
    with pytest.raises(UserError, match="threshold 0"): do_grow(GrowCommand("s", model="m", threshold=0))
    with pytest.raises(UserError, match="no model here"): own_model(tmp_path)
    with pytest.raises(SystemExit): main(["grow", "--help"])
    assert "--threshold" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [('{"input": "x", "output": "y"}', "no instruction"), ('{"instruction": 7, "output": "y"}', "expected a string"), ('{"instruction": "x", "instances": [{"input": "a"}]}', "output"),
                                         ('{"instruction": "x", "instances": "no"}', "expected a list"), ('{"instruction": "x", "output"', "broken JSON"), ('["x"]', "object")])
def test_seeds(tmp_path, text, words):
    (tmp_path/"s.jsonl").write_text('{"instruction": "fine", "output": "fine"}\n' + text + "\n")
    with pytest.raises(UserError, match=words) as told: read_tasks(tmp_path/"s.jsonl")
    assert "s.jsonl line 2" in str(told.value) or words == "broken JSON" and "s.jsonl line 3" in str(told.value)


def test_loop(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no seed"): list(grow([], str, tmp_path/"a"))
    with pytest.raises(UserError, match="no new task in 3 rounds.*0 tasks are safe"): list(grow(SEEDS, lambda p: "<html>Sorry</html>", tmp_path/"b", Grow(patience=3)))
    assert Journal(tmp_path/"b").account().dropped == {"unfinished": 3}
    for text in ('{"question": 1}\n', "no json\n", '"text"\n', "\xff\n"):
        (tmp_path/"c").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="not a file that `grow` wrote"): list(grow(SEEDS, str, tmp_path/"c"))
        assert (tmp_path/"c").read_bytes() == text.encode("latin-1"), "somebody else's file is left as it was"
    (tmp_path/"folder").mkdir()
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(curate.os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*0 tasks are safe"): list(grow(SEEDS, lambda p: " Tell a joke about a mill." if p.startswith("Continue") else "a\nOutput: b", tmp_path/"d"))


def test_numbers():
    with pytest.raises(UserError, match="the best of 3 of 2"): expected_best([1., 0.], 3)
    with pytest.raises(UserError, match="1 answers to 2 prompts"): best_of(lambda p: ["x"], ["a", "b"], lambda i, t: 1)
    with pytest.raises(UserError, match="4 rows of 3"): k_centre(tfidf(["a", "b", "c"]), 4)
    for weights, words in (([1.], "1 weights for 2 rows"), ([1., -1.], "a weight of -1"), ([1., math.nan], "number 1"), ([math.inf, 1.], "number 0"), ([0, 0], "every weight is 0")):
        with pytest.raises(UserError, match=words): weighted(ROWS, weights)
    for sizes, t, words in (([], 1., "sizes"), ([3, 0], 1., "sizes"), ([3, 1], 0., "temperature 0"), ([3, 1], -2., "temperature"), ([math.nan], 1., "sizes")):
        with pytest.raises(UserError, match=words): temperature_shares(sizes, t)
    for shares, words in (([1.], "1 shares for 2"), ([.5, .6], "sum to 1.1"), ([-.5, 1.5], "not negative")):
        with pytest.raises(UserError, match=words): mixture([pad(ROWS)]*2, shares)
    with pytest.raises(UserError, match="5 rows of 2"): stratified("ab", 5)
    with pytest.raises(UserError, match="1 difficulties for 2 rows"): curriculum(pad(ROWS), [1.], 5)


def test_widgets_say_what_is_wrong():
    panel = mixture_explorer()
    for text in ("", "a", "a -3", "a 1, a 2", "a inf"):
        with pytest.raises(UserError): panel.redraw(text=text)
    assert panel.redraw(text="a 10，b 30", temperature=1.)["b"][0] == pytest.approx(.75)
    curves = best_of_explorer().redraw(n=4, spread=0.)
    assert [k for k, _ in curves["unbiased"]] == [1, 2, 4]
