"Panels without a browser: what a control, a test and a thread may expect"
import threading
import time
from types import SimpleNamespace

import ipywidgets as widgets
import pytest
from PIL import Image

from llmbench.panel import Panel, label_room
from llmbench.show import Html, loss_curves, new_figure, png


def slope(figure, rate, steps=3):
    "The line under test"
    if rate > 2: raise ValueError("a rate of <3> is too steep")
    figure.subplots().plot(range(steps), [rate*i for i in range(steps)])
    return rate*steps


def make(**more): return Panel(slope, size=(4., 2.), rate=widgets.FloatSlider(1., min=0, max=3), **more)


def shot(panel):
    import io
    return Image.open(io.BytesIO(bytes(panel.picture.value)))


def test_drawn_once_when_made_and_once_a_move():
    calls = []
    panel = Panel(lambda figure, a, b: calls.append((a, b)), a=widgets.IntSlider(2), b=widgets.IntSlider(5))
    assert calls == [(2, 5)]
    panel.controls["b"].value = 7
    assert calls == [(2, 5), (2, 7)]
    panel.redraw(a=4, b=9)
    assert calls[2:] == [(4, 9)], "setting two controls draws once"


def test_redraw_returns_and_draws_into_one_figure():
    panel = make()
    figure, first = panel.figure, bytes(panel.picture.value)
    assert panel.redraw(rate=2.) == 6. and panel.figure is figure and len(figure.axes) == 1
    assert bytes(panel.picture.value) != first and shot(panel).size == (576, 288)
    assert panel.picture.layout.width == "384px" and panel.picture.tooltip is None  # an image with a tooltip fails in the browser
    assert panel.values == dict(rate=2.)


def test_labels_and_layout():
    panel = Panel(lambda figure, top_k, text, top_p: None, top_k=widgets.IntSlider(), text=widgets.Text("a", description="Prompt"), top_p=widgets.Checkbox())
    assert [c.description for c in panel.controls.values()] == ["top k", "Prompt", "top p"]
    assert panel.controls["text"].layout.width and "llmbench-panel" in panel.widget._dom_classes
    assert all(c.style.description_width == "initial" for c in panel.controls.values())


def test_an_error_is_shown_for_a_person_and_raised_for_a_test():
    panel = make()
    good = bytes(panel.picture.value)
    panel.controls["rate"].value = 3.
    assert isinstance(panel.error, ValueError) and "&lt;3&gt; is too steep" in panel.box.value.split("<details>")[0] and "llmbench-error" in panel.box.value and "slope" in panel.box.value and "<3>" not in panel.box.value
    assert bytes(panel.picture.value) == good
    with pytest.raises(ValueError, match="too steep"): panel.redraw()
    panel.controls["rate"].value = 1.5
    assert panel.error is None and panel.box.value == ""


def test_an_error_in_the_first_picture_is_raised():
    with pytest.raises(ZeroDivisionError): Panel(lambda figure, x: 1/x, x=widgets.IntSlider(0))


def test_unknown_controls_are_named():
    panel = make()
    with pytest.raises(TypeError, match="no control named speed: this panel has rate"): panel.redraw(speed=2)
    assert panel.values == dict(rate=1.)


def test_markup():
    panel = Panel(lambda word: Html(f"<b>{word}</b>"), html=True, word=widgets.Text("a"))
    assert panel.picture.value == "<b>a</b>" and panel.figure is None and isinstance(panel.redraw(word="b"), Html)
    assert panel.picture.value == "<b>b</b>"
    data, _ = panel._repr_mimebundle_()
    assert data["text/html"] == "<b>b</b>" and "application/vnd.jupyter.widget-view+json" in data and data["text/plain"] == "Panel(word='b')"


def test_a_picture_for_places_where_nothing_runs():
    data, meta = make()._repr_mimebundle_()
    assert data["image/png"][1:4] == b"PNG" and meta["image/png"] == dict(width=384, height=192) and data["text/plain"] == "Panel(rate=1.0)"


def test_axes_stand_still_until_labels_outgrow_them():
    panel = Panel(lambda figure, top: figure.subplots().plot([0, top]), top=widgets.IntSlider(1, max=90_000))
    def place(top):
        panel.redraw(top=top)
        return tuple(panel.figure.axes[0].get_position().bounds)
    small, other, large, again = [place(top) for top in (8, 9, 90_000, 8)]
    assert small == other and large[0] > small[0] and again == large


def test_still_axes_follow_the_number_of_panes_and_rotated_labels():
    def panes(figure, n):
        for ax in figure.subplots(1, n, squeeze=False)[0]: ax.set_xticks([0, 1], ["a"*6*n, "b"], rotation=90)
    panel = Panel(panes, n=widgets.IntSlider(1))
    panel.redraw(n=1)
    one = panel.figure.axes[0].get_position()
    panel.redraw(n=2)
    two = [ax.get_position() for ax in panel.figure.axes]
    assert len(two) == 2 and two[1].x0 > two[0].x1 and two[0].y0 > one.y0
    room = label_room(panel.figure)
    assert len(room) == 10 and room[0] == 12
    panel.redraw(n=1)
    assert panel.figure.axes[0].get_position().width > .8, "one pane again: not in the place of one of two"


def test_small_ticks_need_room_too():
    figure, ax = new_figure()
    ax.set_yscale("log")
    ax.plot([1, 2], [2., 9.])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:.5f}")
    png(figure)
    assert label_room(figure)[2] == len("2.00000")


def test_subfigures_are_laid_out_each_time():
    def parts(figure, top):
        left, right = figure.subfigures(1, 2)
        loss_curves(dict(trained=([0, 1], [0, top])), figure=left)
        loss_curves(dict(trained=([0, 1], [0, 1])), figure=right)
    panel = Panel(parts, top=widgets.IntSlider(1, max=90_000))
    before = panel.figure.axes[0].get_position().x0
    panel.redraw(top=90_000)
    assert panel.figure.axes[0].get_position().x0 > before
    def titled(figure, x):
        figure.suptitle("two\nparts", fontsize=20)
        for part in figure.subfigures(1, 2): part.subplots().plot([0, 1])
    panel = Panel(titled, x=widgets.IntSlider(1))
    first = bytes(panel.picture.value)
    panel.redraw()
    assert bytes(panel.picture.value) == first, "a title over the parts keeps its room"


def test_a_slow_picture_waits_for_the_hand(monkeypatch):
    clock = [0.]
    monkeypatch.setattr("llmbench.panel.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    def draw(figure, x, text): clock[0] += x
    panel = Panel(draw, x=widgets.FloatSlider(9., step=.01), text=widgets.Text())
    for x in (.1, .5, .39, .45, .1, .2): panel.controls["x"].value = x
    assert panel.controls["x"].continuous_update, "one slow picture may be chance"
    panel.controls["x"].value = .5
    panel.controls["x"].value = .41
    assert not panel.controls["x"].continuous_update and panel.controls["text"].continuous_update


class Worker:
    "A generator whose progress the test decides"
    def __init__(self): self.go, self.closed, self.threads, self.fail = threading.Semaphore(0), 0, [], None
    def __call__(self, start):
        self.threads.append(threading.current_thread())
        try:
            for i in range(1000):
                self.go.acquire(timeout=60)
                if self.fail == i: raise FloatingPointError("loss is not a number")
                yield start + i
        finally: self.closed += 1


def waiting(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it never happened"
        time.sleep(.005)


def live():
    worker, drawn = Worker(), []
    panel = Panel(lambda figure, records, start: drawn.append((list(records), start)) or len(records), run=worker, start=widgets.IntSlider(5))
    return worker, drawn, panel


def test_run_now_needs_no_thread():
    worker, drawn, panel = live()
    worker.go.release(3)
    assert panel.run_now(most=3, start=7) == 3 and panel.records == [7, 8, 9] and drawn[-1] == ([7, 8, 9], 7)
    assert worker.threads == [threading.current_thread()] and worker.closed == 1
    worker.go.release(2)
    assert panel.run_now(most=2) == 2 and panel.records == [7, 8], "from the beginning again"


def test_run_now_raises_and_lets_go():
    worker, _, panel = live()
    worker.fail = 1
    worker.go.release(2)
    with pytest.raises(FloatingPointError): panel.run_now()
    assert worker.closed == 1
    finite = Panel(lambda figure, records: sum(records), run=lambda: iter([1, 2, 4]))
    assert finite.run_now() == 7 and finite.run_now(most=0) == 0


class Records:
    "An iterator that is not a generator: nobody but the panel closes it"
    def __init__(self): self.closed, self.next = 0, 0
    def __iter__(self): return self
    def close(self): self.closed += 1
    def __next__(self):
        self.next += 1
        if self.next > 3: raise StopIteration
        return self.next


def test_records_are_closed_by_the_panel():
    for start in (lambda p: p.run_now(), lambda p: p.run_now(most=1), lambda p: (p.start(), waiting(lambda: not p._busy()))):
        records = Records()
        start(Panel(lambda figure, records: None, run=lambda records=records: records))
        assert records.closed == 1


def test_run_and_stop():
    worker, drawn, panel = live()
    panel.button.click()
    assert panel._busy() and panel.button.description == "Stop" and panel.controls["start"].disabled
    worker.go.release(4)
    waiting(lambda: len(panel.records) == 4)
    assert worker.threads[0] is not threading.current_thread()
    with pytest.raises(RuntimeError, match="under way"): panel.redraw()
    panel.controls["start"].value = 50
    panel.button.click()
    assert panel.button.description == "Stopping" and panel.button.disabled
    worker.go.release(1)
    waiting(lambda: not panel._busy())
    assert panel.records == [5, 6, 7, 8, 9] and drawn[-1] == ([5, 6, 7, 8, 9], 5), "what is shown belongs to the values Run was pressed with"
    assert {start for _, start in drawn} == {5}
    assert worker.closed == 1 and panel.status.value.startswith("stopped: 5 steps") and panel.button.description == "Run"
    assert not panel.controls["start"].disabled and not panel.button.disabled and panel.stop()


def test_a_failing_run_shows_its_error():
    worker, _, panel = live()
    worker.fail = 2
    worker.go.release(3)
    panel.start()
    waiting(lambda: not panel._busy())
    assert isinstance(panel.error, FloatingPointError) and "loss is not a number" in panel.box.value and panel.status.value.startswith("failed: 2 steps")
    assert worker.closed == 1 and panel.button.description == "Run"
    worker.fail = None
    panel.start()
    worker.go.release(1)
    waiting(lambda: len(panel.records) == 1)
    assert panel.stop(.01) is False and panel._thread.daemon
    worker.go.release(1)
    assert panel.stop() and panel.error is None


def test_a_failing_draw_ends_the_run():
    worker = Worker()
    def draw(figure, records, start): assert len(records) < 2, "draw broke"
    panel = Panel(draw, run=worker, start=widgets.IntSlider(0))
    worker.go.release(1000)
    panel.start()
    waiting(lambda: not panel._busy())
    assert "draw broke" in panel.box.value and worker.closed == 1


def test_one_run_at_a_time():
    (first, _, a), (second, _, b) = live(), live()
    a.start()
    first.go.release(10)
    waiting(lambda: len(a.records) == 10)
    threading.Timer(.5, first.go.release).start()
    b.start()
    assert not a._busy() and b._busy() and Panel.running is b and a.status.value.startswith("stopped")
    second.go.release(1)
    b._stopping = True
    second.go.release(1)
    assert b.stop()


def test_drawing_does_not_eat_the_run(monkeypatch):
    clock, drawn = [0.], []
    monkeypatch.setattr("llmbench.panel.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    def draw(figure, records, cost):
        clock[0] += cost
        drawn.append(len(records))
    def work(cost):
        for i in range(400):
            clock[0] += .01
            yield i
    panel = Panel(draw, run=work, cost=widgets.FloatSlider(0., step=.01))
    for cost, expected in ((0., range(14, 17)), (.1, range(5, 8))):  # four seconds: every 0.3 s; a tenth of the time
        panel.redraw(cost=cost)
        drawn.clear()
        panel.start()
        waiting(lambda: not panel._busy())
        assert len(panel.records) == 400 and len(drawn) in expected and drawn[0] == 1 and drawn[-1] == 400, (cost, drawn)
