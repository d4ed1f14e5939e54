"""The page in a real browser: what it shows, what it asks for, and how it is used."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import browser as pages
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import act_harness
from act_harness import head_set
from act_harness.exploration.page import artifact_page, inline_frame

HOSTILE = (
    "<script>window.harmed = 1</script>",
    '"><img src=x onerror="window.harmed = 2">',
    "</script><script>window.harmed = 3</script>",
    "\u202egnirts a\u202c",
    "مرحبا",
    "👩‍👩‍👧‍👦",
    "zero\u200bwidth\ufeff",
    "x" * 10_000,
    "&lt;b&gt;",
    "line\u2028line\n",
    "half \ud83d",
    "@@data@@",
)
TEXT = "the other thing is <b>a thing</b> in the other"


@pytest.fixture(scope="module")
def parts(tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    return model, AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def heads(parts):
    strengths = {1: {2: {"beta": 0.1}}}
    chosen = {0: [1], 1: [2], 2: [0]}
    return head_set(parts[0], chosen, calibration={"alpha": 1.5}, strengths=strengths)


@pytest.fixture(scope="module")
def found(parts, heads):
    return act_harness.explore(*parts, TEXT, artifact=heads)


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    return found.save(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    with pages.chromium(downloads) as one:
        yield one


def text_of(browser, name):
    return browser.find_element("id", name).text


def press(browser, name, *keys):
    """Press keys where the keyboard is, after moving it to an element."""
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.getElementById(arguments[0]).focus()", name)
    place = browser.switch_to.active_element
    for key in keys:
        place.send_keys(getattr(Keys, key))


def click_head(browser, layer, head):
    """Click the middle of a cell of the map of heads, with the mouse."""
    from selenium.webdriver import ActionChains

    cells = browser.find_elements("css selector", "#heads-drawing [aria-label=cell] rect")
    shown = browser.execute_script("return [...arguments[0]].map((c) => c.__data__)", cells)
    cell = cells[shown.index(layer * 4 + head)]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).click().perform()


def weights(browser):
    """Return row, column, before, after and difference that the page tells of one weight."""
    line = text_of(browser, "weight-line").replace("\u2212", "-")
    numbers = re.match(
        r"row (\d+) .*, column (\d+) .*: before ([\d.]+), after ([\d.]+), difference ([-+][\d.]+)$",
        line,
    )
    assert numbers, line
    return int(numbers[1]), int(numbers[2]), *map(float, numbers.groups()[2:])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_quiet_and_fits(browser, page, width, scheme):
    pages.show(browser, page, width=width, scheme=scheme)
    assert pages.transgressions(browser) == []
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert len(browser.find_elements("css selector", "#heads-drawing [aria-label=cell] rect")) == 12
    assert len(browser.find_elements("css selector", "#heads-drawing .groups path")) == 3
    dots = browser.find_elements("css selector", "#heads-drawing [aria-label=dot] circle")
    assert len(dots) == 3  # the heads of the set


def test_without_data_the_page_is_small(found):
    empty = re.sub(r'(<script type="application/json" id="data">).*?(</script>)', r"\1\2",
                   found.html(), flags=re.DOTALL)  # fmt: skip
    assert len(empty.encode()) < 1_000_000


def test_a_click_shows_the_numbers_of_the_head(browser, page, parts, heads, found):
    pages.show(browser, page)
    layer, head = 1, 2
    click_head(browser, layer, head)
    before, after, sinks = act_harness.maps(*parts, TEXT, layer, head, artifact=heads)
    assert "head 1.2" in text_of(browser, "map-title")
    line = text_of(browser, "head-line").replace("\u2212", "-")
    assert f"effect {found.effects[layer, head]:+.4f} nats" in line
    assert f"{int(sinks.sum())} sink" in line
    assert "strength 0.1" in line
    rows = browser.find_elements("css selector", "#sinks tbody tr")
    shown = [[cell.text for cell in row.find_elements("tag name", "td")] for row in rows]
    assert [int(row[0]) for row in shown] == sinks.nonzero().flatten().tolist()
    total = len(found.tokens)
    for row in shown:
        column = int(row[0])
        mean = float(before[column:, column].mean())
        assert float(row[2]) == pytest.approx(mean, abs=5e-5)
        assert float(row[3].split()[0]) == pytest.approx(mean / (1.5 / total), abs=0.01)
        assert int(row[4]) == total - column
    places = []
    for keys in ((), ("HOME", *["ARROW_RIGHT"] * shown_first(shown)), ("ARROW_UP",) * 3, ("END",)):
        press(browser, "map-drawing", *keys)
        row, column, was, becomes, change = weights(browser)
        places.append((row, column))
        assert was == pytest.approx(float(before[row, column]), abs=0.005)
        assert becomes == pytest.approx(float(after[row, column]), abs=0.005)
        assert change == pytest.approx(becomes - was, abs=2e-4)
    assert places[1] == (total - 1, int(shown[0][0]))
    assert places[2] == (total - 4, int(shown[0][0]))
    assert places[3] == (total - 4, total - 1)


def test_the_page_says_which_effects_are_exact(browser, parts, heads, found, tmp_path):
    some = act_harness.explore(*parts, TEXT, artifact=heads, exact=3)
    pages.show(browser, some.save(tmp_path / "some.html"))
    assert pages.transgressions(browser) == []
    exact, first = found.effects[1, 2], found.first_order[1, 2]
    click_head(browser, 1, 2)
    line = text_of(browser, "head-line").replace("\u2212", "-")
    assert f"effect {exact:+.4f} nats (first order {first:+.4f})" in line
    assert "1.2 alone" in text_of(browser, "answers-line")
    click_head(browser, 2, 3)
    line = text_of(browser, "head-line").replace("\u2212", "-")
    assert f"effect about {found.first_order[2, 3]:+.4f} nats (first order)" in line
    answers = text_of(browser, "answers-line").replace("\u2212", "-")
    assert "2.3 alone was not computed" in answers
    assert f"about {found.first_order[2, 3]:+.4f}" in answers


def shown_first(rows):
    """Return the position of the first sink in the table."""
    return int(rows[0][0])


def test_the_picture_of_a_map_is_that_of_its_numbers(browser, page, parts, heads):
    """The canvas's darkest pixel of each row, where the map has its largest weight."""
    pages.show(browser, page)
    click_head(browser, 0, 1)
    maps = act_harness.maps(*parts, TEXT, 0, 1, artifact=heads)
    for view, values in (("before", maps.before), ("after", maps.after)):
        browser.find_element("css selector", f"input[value={view}]").click()
        pixels = browser.execute_script(
            """
            const canvas = document.querySelector("#map-drawing canvas");
            const {width, height} = canvas;
            return [width, height,
                    [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
            """
        )
        wide, high, flat = pixels
        assert (high, wide) == tuple(values.shape)
        image = np.array(flat).reshape(high, wide, 4)
        shown = image[..., 3] > 0
        np.testing.assert_array_equal(shown, np.tri(high, dtype=bool))
        light = np.where(shown, image[..., :3].sum(axis=2), 10_000)
        assert view in text_of(browser, "map-title")
        clear = values.topk(2, dim=1).values
        for row in range(2, high):
            if clear[row, 0] > clear[row, 1] + 0.05:
                assert light[row].argmin() == int(values[row].argmax())


def test_a_map_lies_in_its_frame_beside_a_scrollbar(page, downloads):
    """The bar came when all was drawn: the drawing shrank with the page, the map below did not."""
    with pages.chromium(downloads, scrollbars=True) as browser:
        pages.show(browser, page, width=1100)
        browser.refresh()  # drawn anew, in a window that nobody resizes
        inside, map_, frame = browser.execute_script(
            """
            const sides = (name) => {
              const box = document.querySelector(name).getBoundingClientRect();
              return [box.left, box.right, box.top, box.bottom];
            };
            return [innerWidth - document.documentElement.clientWidth,
                    sides("#map-drawing canvas"), sides("#map-drawing svg > rect")];
            """
        )
    assert inside > 5, "there is a scrollbar"
    assert map_ == pytest.approx(frame, abs=1.5)


def test_columns_are_two_marks_however_many_there_are(browser, page, found):
    """One stands for all sinks, one for all others; each column at the height of its mean."""
    pages.show(browser, page)
    click_head(browser, 1, 2)
    marks = browser.find_elements("css selector", "#columns-drawing .bars path")
    strokes = [
        re.findall(r"M([\d.]+),([\d.]+)V([\d.]+)", mark.get_attribute("d")) for mark in marks
    ]
    sinks = found.sinks[1, 2]
    assert [len(one) for one in strokes] == [int((~sinks).sum()), int(sinks.sum())]
    heights = {float(x): float(foot) - float(top) for one in strokes for x, foot, top in one}
    drawn = np.array([heights[x] for x in sorted(heights)])
    wanted = np.sqrt(found.means[1, 2])
    np.testing.assert_allclose(drawn / drawn.max(), wanted / wanted.max(), atol=0.01)


def test_the_keyboard_alone_is_enough(browser, page):
    from selenium.webdriver.common.keys import Keys

    pages.show(browser, page)
    press(browser, "heads-drawing", "HOME")
    head = int(re.search(r"head 0\.(\d)", text_of(browser, "map-title"))[1])
    press(browser, "heads-drawing", *["ARROW_LEFT"] * head, "ARROW_DOWN", "ARROW_RIGHT")
    assert "head 1.1" in text_of(browser, "map-title")
    press(browser, "heads-drawing", "END")
    assert "head 2.1" in text_of(browser, "map-title")
    press(browser, "tokens", "HOME", "ARROW_RIGHT", "ARROW_RIGHT")
    assert text_of(browser, "token-line").startswith("position 2,")
    chosen = browser.find_elements("css selector", "#tokens [aria-selected=true]")
    assert [one.get_attribute("id") for one in chosen] == ["token-2"]
    browser.find_element("css selector", "input[value=before]").send_keys(Keys.ARROW_RIGHT)
    assert "after" in text_of(browser, "map-title")
    before = browser.find_element("id", "heads-legend").text
    browser.find_element("id", "metric").send_keys("number")
    assert browser.find_element("id", "heads-legend").text != before
    reached = set()
    browser.execute_script("document.activeElement.blur()")
    for _ in range(30):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(browser.switch_to.active_element.get_attribute("id"))
    assert reached >= {"metric", "heads-drawing", "tokens", "map-drawing"}


def test_a_hover_tells_of_a_head_and_a_token(browser, page, found):
    from selenium.webdriver import ActionChains

    pages.show(browser, page)
    token = browser.find_element("id", "token-3")
    ActionChains(browser).move_to_element(token).perform()
    layer, head = np.unravel_index(np.abs(found.effects).argmax(), found.effects.shape)
    mean = found.means[layer, head, 3]
    line = text_of(browser, "token-line")
    assert line.startswith("position 3,")
    assert float(re.search(r"attention ([\d.]+)", line)[1]) == pytest.approx(mean, abs=2e-5)


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_is_text(browser, found, tmp_path, width):
    count = len(found.tokens)
    tokens = (HOSTILE * count)[:count]
    labels = (HOSTILE * 2)[: len(found.labels)]
    attacked = replace(found, tokens=tokens, labels=labels, title=HOSTILE[0], model=HOSTILE[2])
    pages.show(browser, attacked.save(tmp_path / "hostile.html"), width=width)
    assert pages.transgressions(browser) == []
    assert browser.execute_script("return window.harmed === undefined")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert text_of(browser, "title") == HOSTILE[0]
    shown = [
        browser.execute_script(f"return document.getElementById('token-{n}').textContent").replace(
            "\u2423", " "
        )
        for n in range(len(HOSTILE))
    ]
    assert shown[0] == HOSTILE[0]
    assert shown[2] == HOSTILE[2]
    assert shown[3] == "\u27e8U+202E\u27e9gnirts a\u27e8U+202C\u27e9"
    assert shown[4] == HOSTILE[4]
    assert shown[6] == "zero\u27e8U+200B\u27e9width\u27e8U+FEFF\u27e9"
    assert shown[7] == HOSTILE[7]
    assert shown[8] == HOSTILE[8]
    assert shown[10] == "half \u27e8U+D83D\u27e9"
    assert shown[11] == HOSTILE[11]


def test_hostile_text_in_a_table_of_a_report_is_text(browser, tmp_path):
    from markdown_it import MarkdownIt

    from act_harness.evidence.tables import markdown_table

    table = markdown_table(["name", "p"], [[HOSTILE[0], "< 0.05"], [HOSTILE[1], "a|b"]])
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(table)
    file = tmp_path / "report.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8>{html}", encoding="utf-8")
    pages.show(browser, file)
    assert browser.execute_script("return window.harmed === undefined")
    cells = [cell.text for cell in browser.find_elements("css selector", "td")]
    assert cells == [HOSTILE[0], "< 0.05", HOSTILE[1], "a|b"]


def test_pictures_are_saved(browser, page, downloads):
    pages.show(browser, page)
    for figure in ("heads", "columns", "map", "answers"):
        for kind in ("svg", "png"):
            label = f"Save {figure} as {kind.upper()}"
            browser.execute_script(
                "document.querySelector(`[aria-label='${arguments[0]}']`).click()", label
            )
            file = waited_for(browser, downloads, f"{figure}-*.{kind}")
            content = file.read_bytes()
            if kind == "png":
                assert content.startswith(b"\x89PNG")
                assert len(content) > 2000
            else:
                root = ElementTree.fromstring(content)  # noqa: S314 - our own page wrote it
                assert root.tag == "{http://www.w3.org/2000/svg}svg"
                assert (b"data:image/png" in content) == (figure == "map")
    assert pages.transgressions(browser) == []


def waited_for(browser, folder: Path, pattern: str) -> Path:
    """Return a file that the browser is writing, once it is there."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: next(iter(folder.glob(pattern)), None))


def test_a_notebook_shows_it(browser, found, tmp_path):
    cell = tmp_path / "notebook.html"
    cell.write_text(f"<!DOCTYPE html><body>{found._repr_html_()}</body>", encoding="utf-8")
    pages.show(browser, cell)
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    assert "head" in text_of(browser, "map-title")
    browser.switch_to.default_content()
    assert pages.transgressions(browser) == []
    assert inline_frame("<p>").count("<p>") == 0


def test_the_page_of_a_head_set(browser, heads, tmp_path):
    file = tmp_path / "heads.html"
    file.write_text(artifact_page(heads), encoding="utf-8")
    pages.show(browser, file)
    assert pages.transgressions(browser) == []
    click_head(browser, 1, 2)
    assert text_of(browser, "head-line") == "layer 1, head 2: strength 0.1"
    click_head(browser, 1, 3)
    assert text_of(browser, "head-line") == "layer 1, head 3: not in the head set"
    assert len(browser.find_elements("css selector", "#heads-drawing .groups path")) == 3
    assert "share a key head (2 groups)" in text_of(browser, "heads-legend")
    assert not browser.find_element("id", "document-section").is_displayed()
