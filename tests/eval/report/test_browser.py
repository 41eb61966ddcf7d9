"""The page in Chromium, on a phone and a screen, light and dark."""

from __future__ import annotations

from math import ceil

import pytest

SHADES = (
    "[...document.querySelectorAll('#tokens > .t')].filter(t => !t.hidden).map(t => +(/k(\\d)/.exec(t.className) ?? [0, 0])[1])"
)
VIEWS = [(375, False), (375, True), (1280, False), (1280, True)]


def choose(browser, **values):
    for name, value in values.items():
        kind = "input" if name == "round" else "change"
        browser.run(
            f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('{kind}')) }})(document.getElementById('{name}'))"
        )


@pytest.fixture
def opened(browser, report):
    browser.open(report / "index.html", 375)
    return browser


@pytest.mark.parametrize("width, dark", VIEWS)
def test_it_fits_and_nobody_complains(browser, report, width, dark):
    browser.open(report / "index.html", width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == width
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [(report / "index.html").as_uri()]
    # every curve's text is in the page's ink
    inks = browser.run("[...new Set([...document.querySelectorAll('#curves svg text')].map(t => getComputedStyle(t).fill))]")
    ink, muted = ("rgb(236, 236, 241)", "rgb(169, 169, 182)") if dark else ("rgb(26, 26, 30)", "rgb(92, 92, 102)")
    assert set(inks) == {ink, muted}


def test_shades_are_the_lists_of_the_chosen_round_layer_and_head(opened, trace):
    for number, layer, head in [(1, "all", "all"), (2, "all", "all"), (2, 1, "all"), (2, "all", 0), (4, 0, 1)]:
        choose(opened, round=number, layer=layer, head=head)
        one = trace["rounds"][number - 1]
        lists = [
            set(kept)
            for at, own in enumerate(one["kept"])
            for h, kept in enumerate(own)
            if layer in ("all", at) and head in ("all", h)
        ]
        wanted = [ceil(8 * sum(place in kept for kept in lists) / len(lists)) for place in range(one["cached"])]
        shades = opened.run(SHADES)
        assert shades[:-1] == wanted and shades[-1] == 0  # the pending token is not cached
        share = 100 * sum(map(len, lists)) / len(lists) / one["cached"]
        assert f"{share:.1f}% of the tokens" in opened.run("document.getElementById('said').textContent")


def test_the_text_is_what_the_round_had_before_it(opened, trace):
    choose(opened, round=2)
    one = trace["rounds"][1]
    shown = opened.run("[...document.querySelectorAll('#tokens > .t')].filter(t => !t.hidden).map(t => t.textContent).join('')")
    assert shown == "".join(trace["pieces"][: one["cached"] + 1])
    marks = "[...document.querySelectorAll('#now .d')].map(t => [t.textContent, t.className.slice(2)])"
    assert opened.run(marks) == [["u", "accepted"], ["v", "accepted"], ["w", "accepted"], ["N", "bonus"]]
    choose(opened, round=3)
    assert opened.run(marks) == [["<", "rejected"], ["b", "rejected"], [">", "rejected"], ["N", "recovered"]]
    assert "A dense round: it has no lists" in opened.run("document.getElementById('said').textContent")
    origins = "[...document.querySelectorAll('#tokens > .t')].map(t => t.origin).filter(Boolean)"
    names = {"a": "accepted", "r": "recovered", "b": "bonus"}
    assert opened.run(origins) == [names[x] for x in "aar" + "aaab" + "r" + "ar"]


def test_it_is_driven_by_the_keyboard(opened, trace):
    choose(opened, round=1)
    opened.run("document.getElementById('tokens').focus()")
    place = "document.querySelector('.at').place"

    def press(key):
        opened.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        opened.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    press("ArrowRight")
    first = opened.run(place)
    press("ArrowRight")
    assert opened.run(place) == first + 1
    kept = [set(own) for layer in trace["rounds"][0]["kept"] for own in layer]
    counts = [sum(p in own for own in kept) for p in range(399)]
    assert opened.run("document.getElementById('tip').textContent").startswith(
        f"token {first + 1}: kept by {counts[first + 1]} of 4"
    )
    press("n")
    wanted = next(p for p in range(first + 2, 399) if counts[p] >= 2 and counts[p - 1] < 2)
    assert opened.run(place) == wanted
    press("p")
    assert opened.run(place) < wanted
    opened.run("document.getElementById('strip').focus()")
    press("Home")
    assert opened.run("document.getElementById('tokens').scrollTop") == 0
    press("End")
    assert opened.run("document.getElementById('tokens').scrollTop") > 100


def test_a_finger_on_the_strip_goes_there(opened):
    opened.run("document.getElementById('strip').scrollIntoView({behavior: 'instant', block: 'start'})")
    x, y, width = opened.run("(r => [r.left, r.top, r.width])(document.getElementById('strip').getBoundingClientRect())")
    for part, low, high in ((0.05, 0, 0.2), (0.95, 0.8, 1)):
        for kind in ("mousePressed", "mouseReleased"):
            opened.call(
                "Input.dispatchMouseEvent", type=kind, x=x + part * width, y=y + 9, button="left", clickCount=1, buttons=1
            )
        [at, most] = opened.run("(t => [t.scrollTop, t.scrollHeight - t.clientHeight])(document.getElementById('tokens'))")
        assert low <= at / most <= high
    assert opened.complaints() == []
