"Pictures: what is drawn, in which colour, and whether eyes other than ours could read it"
import html
import io
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from llmbench import show, theme
from llmbench.show import (COLOURS, COUNTS, INK, MASKED, Html, Picture, cjk_font, drawable, fonts, heat_map, loss_curves, new_figure, neutral, png,
                           probability_bars, readable, running_mean, svg, tint, token_ribbon)

# Dichromacy in linear RGB, from Viénot, Brettel and Mollon (1999): another model than the notebook's (Machado 2009)
PROTAN = np.array([[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]])
DEUTAN = np.array([[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]])


def light(colour):
    x = np.array([int(colour[i:i+2], 16)/255 for i in (1, 3, 5)])
    return np.where(x <= .04045, x/12.92, ((x + .055)/1.055)**2.4)


def contrast(a, b):
    low, high = sorted(float(light(c) @ [.2126, .7152, .0722]) + .05 for c in (a, b))
    return high/low


def lab(rgb):
    x, y, z = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]) @ np.clip(rgb, 0, 1)/[.95047, 1, 1.08883]
    x, y, z = (v**(1/3) if v > .008856 else 7.787*v + 16/116 for v in (x, y, z))
    return np.array([116*y - 16, 500*(x - y), 200*(y - z)])


@pytest.mark.parametrize("name", [*COLOURS, "ink"])
def test_contrast_on_both_pages(name):
    colour = (COLOURS | dict(ink=INK))[name]
    assert min(contrast(colour, "#ffffff"), contrast(colour, "#111111")) >= 3.4


@pytest.mark.parametrize("eye", [np.eye(3), PROTAN, DEUTAN], ids=["typical", "protan", "deutan"])
def test_meanings_stay_apart(eye):
    names = ["trained", "masked", "chosen", "rejected", "validation"]
    for i, a in enumerate(names):
        for b in names[:i]: assert np.linalg.norm(lab(eye @ light(COLOURS[a])) - lab(eye @ light(COLOURS[b]))) > 15, f"{a} and {b} look alike"


def pixels(data): return np.array(Image.open(io.BytesIO(data)).convert("RGBA"))


def curve():
    figure, ax = new_figure(size=(4., 2.))
    ax.plot([0, 1, 3], [5, 2, 4], color="k")
    ax.set(xlabel="step", ylabel="loss", title="run")
    ax.bar([1, 2], [1, 2], yerr=[.5, .3], capsize=4, color="none")
    ax.legend(["a"])
    return figure


def test_png_is_transparent_and_ink():
    shot = pixels(png(curve(), dpi=100))
    assert shot.shape == (200, 400, 4)
    opaque = shot[shot[..., 3] == 255][:, :3]
    assert len(opaque) > 100 and (shot[..., 3] == 0).mean() > .8
    assert np.abs(opaque.astype(int) - [0x7c, 0x7f, 0x85]).max() <= 2, "everything here is ink: the black line, the letters, the axes"


def test_png_leaves_the_figure_as_it_was():
    figure = curve()
    canvas, dpi = figure.canvas, figure.dpi
    first = png(figure, dpi=50)
    assert figure.canvas is canvas and figure.dpi == dpi and pixels(first).shape[:2] == (100, 200)
    assert pixels(png(figure, dpi=144)).shape[:2] == (288, 576)


def test_fewer_colours_smaller_file_same_picture():
    figure = loss_curves(dict(trained=(range(200), np.random.default_rng(0).random(200))), smooth=9)
    full, small = png(figure, dpi=192), png(figure, dpi=192, colours=256)
    assert len(small) < len(full)/2
    a, b = pixels(full).astype(float), pixels(small).astype(float)
    on = [(x[..., :3]*x[..., 3:]/255 + 17*(1 - x[..., 3:]/255)) for x in (a, b)]  # as seen on the dark page
    drawn = a[..., 3] > 0
    assert np.abs(on[0] - on[1])[drawn].mean() < 2.5, "eight colours would be 4"


def test_colours_that_were_chosen_stay():
    figure, ax = new_figure()
    ax.plot([0, 1], color="#123456")
    text = ax.set_title("x", color="#654321")
    neutral(figure)
    assert ax.lines[0].get_color() == "#123456" and text.get_color() == "#654321"
    assert ax.xaxis.label.get_color() == INK and ax.yaxis.get_tick_params()["labelcolor"] == INK, "ticks to come are ink too"


def test_pyplot_knows_nothing_and_its_figures_can_be_shown():
    program = ("import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt; from llmbench.show import *;"
               "new_figure(); heat_map([[1, 2]]); print(plt.get_fignums()); f, ax = plt.subplots(); ax.plot([1, 2]); f.tight_layout(); png(f); f.savefig('/dev/null', format='png');"
               "print('currentColor' in svg(f))")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "True"], done.stderr


def test_picture_shows_itself_at_its_size():
    data, meta = new_figure(size=(5., 2.))[0]._repr_mimebundle_()
    assert meta == {"image/png": dict(width=480, height=192)}
    assert Image.open(io.BytesIO(data["image/png"])).size == (960, 384)


def test_svg_takes_the_pages_colour():
    text = svg(curve(), title='a "quoted" <run>')
    root = ET.fromstring(text)
    assert root.get("aria-label") == 'a "quoted" <run>' and root.get("role") == "img" and root.get("viewBox")
    assert "currentColor" in text and not re.search(r"#000000|#ffffff|#7c7f85", text)
    assert "<text" not in text and "<!DOCTYPE" not in text and "<script" not in text and "<!--" not in text
    assert "2026" not in text and "Matplotlib" not in text, "no date and no version: the same bytes everywhere"
    assert svg(curve(), title="x") == svg(curve(), title="x")


def test_two_svgs_do_not_share_names():
    other, ax = new_figure()
    ax.plot([9, 8, 1])
    ids = [{e.get("id") for e in ET.fromstring(svg(f)).iter()} - {None} for f in (curve(), other)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    for figure, own in zip((curve(), other), ids):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg(figure))) <= own


def test_tick_names_of_ones_own_are_drawable_too():
    figure, ax = new_figure(size=(3, 1.5))
    ax.set_xticks([0, 1], ["🫠", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(figure)
        named = ax.xaxis.get_major_formatter()
        assert png(figure) == png(figure) and ax.xaxis.get_major_formatter() is named
    assert [t.get_text() for t in ax.get_xticklabels()] == ["U+1FAE0", "b"]
    bars, ax = new_figure(size=(3, 1.5))
    ax.bar(["🫠", "c"], [1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(bars)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["U+1FAE0", "c"]


@pytest.mark.skipif(cjk_font() is None, reason="no Chinese font installed: Debian's fonts-noto-cjk")
def test_chinese_is_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, ax = new_figure(size=(3, 1.5))
        ax.bar(["云", "村"], [1, 2])
        ax.set(title="损失 loss", xlabel="🫠 token")
        png(figure)
        svg(heat_map([[1, 2]], ["云"], ["a", "村"], "权重"))
        png(probability_bars([" 云", b"\xe4"], [.7, .3]))
    assert ax.xaxis.label.get_text() == "U+1FAE0 token" and ax.get_title() == "损失 loss"
    empty, drawn = (pixels(png(Figure(figsize=(2, 1)))), Figure(figsize=(2, 1)))
    drawn.text(.1, .4, "云")
    box = Figure(figsize=(2, 1))
    box.text(.1, .4, "村")
    assert (pixels(png(drawn)) != empty).any() and (pixels(png(drawn)) != pixels(png(box))).any(), "two characters are not the same box"


def test_without_a_chinese_font(monkeypatch):
    for module in (theme, show): monkeypatch.setattr(module, "cjk_font", lambda: None)
    theme._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure = heat_map([[1, 2]], ["云 a"], ["b", "村"], "权")
        png(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["U+4E91·a"]
    assert [str(w.message) for w in said] == ["no Chinese font: labels show code points. Debian, Ubuntu: apt install fonts-noto-cjk"]
    assert fonts()[0] == ["DejaVu Sans"] and drawable("é→", cjk=None) == "é→"


@pytest.mark.parametrize("token, shown", [
    (" the", "·the"), ("\n\n", "↵↵"), ("\r\n", "␍↵"), ("\t", "⇥"), ("\u3000", "□"), ("\u00a0", "⍽"), ("", "∅"), (b"", "∅"), ("云", "云"), (b"\xe4\xba\x91", "云"),
    (b"\xe4\xba", "⟨e4 ba⟩"), (b"a\xff", "⟨61 ff⟩"), ("\ufffd", "\ufffd"), ("\ud800", "⟨U+D800⟩"), ("\udce4", "⟨e4⟩"), ("\udc80", "⟨80⟩"), ("\udcff", "⟨ff⟩"), ("\udc7f", "⟨U+DC7F⟩"),
    ("\udd00", "⟨U+DD00⟩"), ("\u200d", "⟨U+200D⟩"), ("\u200b", "⟨U+200B⟩"), ("a\u202eb", "a⟨U+202E⟩b"), ("👩\u200d🚀", "👩\u200d🚀"), ("❤\ufe0f", "❤\ufe0f"), ("\x07", "⟨U+0007⟩"), ("\ue000", "⟨U+E000⟩"), ("é", "é"), ("<b>", "<b>")])
def test_readable(token, shown): assert readable(token) == shown


TOKENS, MASK = ["<|user|>", " a&b", "<i>", "\n", b"\xe4\xba", "x"], [0, 0, 1, 1, 0, 1]


def spans(ribbon): return list(ET.fromstring(ribbon.replace("<br>", "<br/>")).findall("span"))


def test_ribbon_tokens_and_mask():
    ribbon = token_ribbon(TOKENS, MASK)
    assert isinstance(ribbon, Html) and ribbon._repr_html_() == ribbon
    assert [s.text for s in spans(ribbon)] == ["<|user|>", "·a&b", "<i>", "↵", "⟨e4 ba⟩", "x"]
    assert [s.get("style") for s in spans(ribbon)] == [COUNTS if m else MASKED for m in MASK]
    assert "3 of 6 tokens count" in ribbon and ribbon.count("<br>") == 1 and ribbon.index("<br>") > ribbon.index("↵")
    assert [s.get("title") for s in spans(ribbon)][3:5] == ["token 3, counts", "token 4, masked"]
    assert "<i>" not in ribbon and repr(ribbon).split()[:3] == ["<|user|>", "·a&b", "<i>"]


def test_ribbon_says_it_without_colour():
    assert "solid" in COUNTS and "dotted" in MASKED and COLOURS["trained"] in COUNTS and COLOURS["masked"] in MASKED
    assert "color:#" not in COUNTS.replace("border-bottom", ""), "letters take the page's colour"
    assert tint("#102030", .5) == "rgba(16,32,48,0.5)"


def test_ribbon_numbers():
    ribbon = token_ribbon(TOKENS, MASK, values=[None, -1.234, "<end>", 0., -7, np.float32(2)], ids=np.arange(10, 16))
    notes = [[n.text for n in s.findall("span")] for s in spans(ribbon)]
    assert notes == [["10"], ["11", "-1.23"], ["12", "<end>"], ["13", "0.00"], ["14", "-7.00"], ["15", "2.00"]]
    assert spans(ribbon)[5].get("title") == "token 5, id 15, counts"


def test_ribbon_takes_tensors_and_limits_length():
    import torch
    ribbon = token_ribbon(["a"]*1500, torch.tensor([1., 0, 0]*500), values=torch.zeros(1500), most=7)
    assert len(spans(ribbon)) == 7 and "500 of 1,500 tokens count, 1,493 more are not shown" in ribbon
    assert "6 of 6" in token_ribbon(TOKENS)


@pytest.mark.parametrize("name", ["mask", "values", "ids"])
def test_ribbon_lengths(name):
    with pytest.raises(ValueError, match=f"6 tokens but 5 in {name}"): token_ribbon(TOKENS, **{name: [1]*5})


def test_running_mean():
    rng = np.random.default_rng(3)
    for n, width in ((1, 1), (7, 3), (10, 5), (4, 99), (9, 1)):
        ys = rng.normal(size=n)
        ys[n//2] = np.nan if n > 4 else ys[n//2]
        k = min(width, n)
        # numpy's "same" centres a window of k on i: from i - (k-1)//2 .. i + k//2 mirrored for even k
        ours = running_mean(ys, width)
        for i in range(n):
            if k % 2:
                seen = ys[max(0, i - k//2):i + k//2 + 1]
                assert ours[i] == pytest.approx(np.nanmean(seen)) if np.isfinite(seen).any() else np.isnan(ours[i])
    assert np.isnan(running_mean([np.nan, np.nan, np.nan, 4.], 1)[:3]).all()


def test_loss_curves():
    xs, ys = np.arange(200)*10, np.linspace(5, 1, 200)
    figure = loss_curves({"validation": ([0, 900, 1990], [5, 4, 2]), "trained": (xs, ys), "lr 3e-3": (xs, ys + 1), "lr 1e-2": (xs, ys + 2)}, smooth=11, xlabel="tokens")
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(lines) == ["validation", "trained", "lr 3e-3", "lr 1e-2"]
    assert [lines[n].get_color() for n in ("validation", "trained")] == [COLOURS["validation"], COLOURS["trained"]]
    assert len({line.get_linestyle() for line in lines.values()}) == 4 and len({line.get_color() for line in lines.values()}) >= 3
    assert lines["validation"].get_marker() == "o" and lines["validation"].get_ydata().tolist() == [5, 4, 2], "few points are not smoothed"
    assert np.allclose(lines["trained"].get_ydata()[5:-5], ys[5:-5]) and len(figure.axes[0].lines) == 4 + 3
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("tokens", "loss (nats/token)")


def test_a_lost_loss_is_marked():
    nan = float("nan")
    figure = loss_curves(dict(trained=([1, 2, 3, 4, 5, 6], [nan, 3, nan, nan, float("inf"), 2])))
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines if to_hex(line.get_color()) == COLOURS["error"]]
    assert marks == [1, 3]


@pytest.mark.parametrize("ys, labels", [([4., 2., .9], ["0.9", "1", "2", "3", "4"]), ([6., 2., .3], ["0.2", "0.5", "1", "2", "5"]), ([50., 1e-3, 2.], ["0.001", "0.01", "0.1", "1", "10"])])
def test_log_axis_has_plain_numbers(ys, labels):
    figure = loss_curves(dict(trained=([1, 2, 3], ys)), log=True)
    png(figure)
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    both = [(*ax.get_yticklabels(), *ax.get_yticklabels(minor=True)), (*ax.get_yticks(), *ax.get_yticks(minor=True))]
    shown = {t.get_text() for t, y in zip(*both) if low <= y <= high and t.get_text()}
    assert ax.get_yscale() == "log" and shown <= set(labels) and len(shown) >= 3, shown


def test_no_points_yet():
    for curves in ({}, dict(trained=([], []))):
        ax = loss_curves(curves, log=True).axes[0]
        assert [t.get_text() for t in ax.texts] == ["nothing yet"] and not len(ax.get_xticks())
    assert not loss_curves(dict(trained=([], []), validation=([1], [2.]))).axes[0].texts


def test_heat_map_cells():
    nan = float("nan")
    matrix = [[.11, .92, nan], [.5, float("-inf"), .25]]
    figure = heat_map(matrix, ["r0", " r1"], ["a", "b", "\n"], "weight", xlabel="to", ylabel="from")
    ax = figure.axes[0]
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {((0, 0), "0.11"), ((1, 0), "0.92"), ((0, 1), "0.5"), ((2, 1), "0.25")}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["r0", "·r1"] and [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "↵"]
    assert ax.images[0].get_clim() == (.11, .92) and figure.axes[1].get_ylabel() == "weight" and ax.patch.get_hatch()
    dark = {t.get_text(): t.get_color() for t in ax.texts}
    assert dark["0.92"] == "#0a0a0a" and dark["0.11"] == "#f8f8f8", "dark letters on yellow, light ones on blue"
    assert heat_map(np.zeros((20, 20))).axes[0].texts[:] == [] and heat_map([[nan]]).axes


def test_heat_map_letters_can_be_read():
    for matrix in (np.linspace(0, 1, 50).reshape(5, 10), np.linspace(-3, 2, 50).reshape(5, 10)):
        ax = heat_map(matrix).axes[0]
        for t in ax.texts:
            c, r = t.get_position()
            cell = to_hex(ax.images[0].cmap(ax.images[0].norm(matrix[r, c])))
            assert contrast(t.get_color(), cell) > 4, (matrix[r, c], cell)


def test_signs_are_centred():
    image = heat_map([[-1., 4.]]).axes[0].images[0]
    assert image.get_clim() == (-4, 4)
    r, _, b, _ = image.cmap(image.norm(-3.))
    assert r > b, "orange is less than zero"
    assert heat_map([[-1., 4.]], limits=(-2, 8)).axes[0].images[0].get_clim() == (-8, 8)
    assert heat_map([[1., 4.]], limits=(0, 8)).axes[0].images[0].get_clim() == (0, 8)


def test_a_figure_is_reused_and_a_subfigure_too():
    figure = Picture(figsize=(6, 2), layout="constrained")
    assert loss_curves(dict(trained=([1], [1])), figure=figure) is figure
    heat_map([[1, 2]], figure=figure)
    assert len(figure.axes) == 2, "cleared before it is drawn again"
    figure.clear()
    left, right = figure.subfigures(1, 2)
    heat_map([[1, 2]], figure=left)
    probability_bars(["a"], [1.], figure=right)
    assert pixels(png(figure)).shape == (192, 576, 4) and len(figure.axes) == 3


def test_probability_bars():
    figure = probability_bars([" a", "b", b"\xff"], [.6, .4, 0.], kept=[1, 1, 0], before=[.5, .2, .3], xlabel="p")
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["·a", "b", "⟨ff⟩"] and [t.get_text() for t in ax.texts] == [" 0.600", " 0.400", " 0"]
    assert [round(float(t.get_position()[0]), 3) for t in ax.texts] == [.6, .4, .3], "a number stands behind the longer bar"
    widths = [[round(float(p.get_width()), 3) for p in c.patches] for c in ax.containers]
    assert widths == [[.5, .2, .3], [.6, .4], [0.]]
    assert to_hex(ax.containers[1].patches[0].get_facecolor()) == COLOURS["trained"] and ax.containers[2].patches[0].get_linestyle() in (":", "dotted")
    assert ax.get_ylim() == (2.5, -.5) and ax.get_xlabel() == "p", "the first bar is on top"
    assert probability_bars(["a"], [0.]).axes[0].get_legend() is None


def test_html_repr_is_text(): assert repr(Html("<b>a &lt; b</b>")) == html.unescape("a &lt; b")
