"""Text in Markdown reports: whatever it is, a reader of Markdown sees it and nothing else."""

from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from act_harness.evidence.tables import (
    Markup,
    markdown_cell,
    markdown_table,
    p_value_text,
    visible,
)

# GitHub's, as far as it goes: HTML is passed on, tables and struck out text are known.
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
ALLOWED = {"table", "thead", "tbody", "tr", "th", "td", "p"}


class Seen(HTMLParser):
    """What of a page is elements, and what is text."""

    def __init__(self):
        super().__init__()
        self.elements, self.cells = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_comment(self, data):
        self.elements.append("comment")

    def handle_data(self, data):
        if self.cells and data != "\n":
            self.cells[-1] += data


def seen(markdown):
    found = Seen()
    found.feed(READER.render(markdown))
    found.close()
    return found


@given(st.text(alphabet=st.sampled_from("\\`*_~[]()!<>|&#;$ ab1/:\"'-\n"), max_size=20) | st.text())
@example("<script>window.harmed = 1</script>")
@example("\\<script>window.harmed = 1</script>")
@example("\\\\<img src=x onerror=alert(1)>")
@example("a\\|b")
@example("![x](http://example.org/x.png)")
@example("![x][x] [x](javascript:alert(1))")
@example("`<b>` **bold** _slanted_ ~~gone~~ *x*")
@example("__0__ _0_ a__b__ ~x~")
@example("&lt;b&gt; &#60;")
@example("<http://example.org> <!-- gone -->")
@example("\u202egnirts a\u202c zero\u200bwidth line\u2028line\r\nhalf \ud83d")
@example("x" * 10_000)
@example("act_sst2 acc * C:\\models\\a_b")
def test_a_cell_shows_its_text_and_nothing_else(text):
    found = seen(markdown_table(["name", "p"], [[text, "end"]]))
    assert set(found.elements) <= ALLOWED
    assert [cell.strip() for cell in found.cells] == [visible(text).strip(), "end"]


@pytest.mark.parametrize(
    "text", ["act_sst2", "acc *", "+0.01 ... -0.02", "< 0.05", "a\\b", "50 %", "m__act"]
)
def test_what_markdown_leaves_alone_is_left_alone(text):
    assert markdown_cell(text) == text


def test_only_what_says_so_is_markup():
    table = markdown_table(["a", "b"], [[Markup("**bold** | x"), "**not**"]])
    assert table.splitlines()[-1] == "| **bold** \\| x | \\*\\*not\\*\\* |"


def test_what_is_not_seen_is_written_out():
    assert visible("a\u202eb\u200b\ud83d\tc\nd") == "a⟨U+202E⟩b⟨U+200B⟩⟨U+D83D⟩⟨U+0009⟩c d"
    assert visible("مرحبا ü 語") == "مرحبا ü 語"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.0499, 3, "0.050"), (1.0, 3, "1.000"), (0.001, 3, "0.001"), (0.00099, 3, "1e-03"),
     (3e-9, 3, "3e-09"), (1e-4, 4, "0.0001"), (2e-5, 4, "2e-05")],
)  # fmt: skip
def test_no_p_value_is_shown_as_zero(value, digits, text):
    assert p_value_text(value, digits=digits) == text
