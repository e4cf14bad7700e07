"""Markdown of note apps becomes plain text, plain text stays as it is, and nothing is refused."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data.notes.markdown import clean_markdown, find_blocks

UUID = "64c4b2c3-1111-2222-3333-444455556666"

CASES = {
    # links
    "See [[Page]] and [[Target page|the alias]].": "See Page and the alias.",
    "[[Page#Heading]], [[#Heading]], [[a [[nested]] link]]": "Page > Heading, Heading, a nested link",
    'Read [the text](https://x.y/a_(b)?q=1 "title") now': "Read the text now",
    "[alias]([[Page]]) and [other](((abc-DEF12)))": "alias and other",
    "[text][ref]\n\n[ref]: https://x.y": "text",
    "<https://x.y/z> and https://a.b": "https://x.y/z and https://a.b",
    # tags, and what only looks like one
    "I like #python and #area/work, #[[two words]]": "I like python and area/work, two words",
    "#only #tags\ntext": "text",
    "Tags: #one, #two\ntext": "text",
    "issue #12, C# and F#, a#b": "issue #12, C# and F#, a#b",
    "colours #ff8800, #FFF and #00aaff80": "colours #ff8800, #FFF and #00aaff80",
    "# Heading\n## Second": "# Heading\n## Second",
    # block references and ids
    "so ((abc-DEF12)) it is": "so it is",
    f"so (({UUID})) it is": "so it is",
    "so ((something)) it is ((sic))": "so ((something)) it is ((sic))",
    "A thought. ^a1b2c3": "A thought.",
    "2 ^3 and x^2": "2 ^3 and x^2",
    # embeds and images
    "![[picture.png]]\n![[scan.pdf#page=3]]\n![alt](a/b.jpg)\ntext": "text",
    "- ![[Other note]]": "- Other note",
    "a {{embed [[Other]]}} b {{[[embed]]: ((abc-DEF12))}} c": "a b c",
    "{{query (and [[a]] {b})}}\ntext": "text",
    "The answer is {{cloze forty}}.": "The answer is forty.",
    # properties and tasks
    f"title:: My page\ntags:: a, b\n\n- text\n  id:: {UUID}\n  collapsed:: true": "# My page\n\n- text",
    "- author:: [[Anna]]\n- text": "- text",
    "Summary:: we met and talked for long\nTags:: a, b, c, d, e, f": "Summary: we met and talked for long",
    "std::vector and f :: Int -> Int": "std::vector and f :: Int -> Int",
    "- TODO [#A] write\n- DONE read\n* [ ] call\n1. [x] go": "- write\n- read\n* call\n1. go",
    "- {{[[TODO]]}} buy milk\n- {{TODO}} and bread": "- buy milk\n- and bread",
    "TODO is a word here, [x] too": "TODO is a word here, [x] too",
    "- NOW walk\n  SCHEDULED: <2024-01-02 Tue>\n  :LOGBOOK:\n  CLOCK: [2024]\n  :END:\n- end": "- walk\n- end",
    # callouts, comments, markup
    "> [!note] A title\n> text\n\n> [!tip]- \n> more": "> A title\n> text\n\n> more",
    "seen %%hidden%% seen\n%%\nmany\nlines\n%%\nend": "seen seen\n\nend",
    "a <!-- hidden\nlines --> b": "a b",
    "100%% sure": "100%% sure",
    "==high== ^^light^^ **bold** _it_ a==b": "high light **bold** _it_ a==b",
    "a <b>bold</b><br/> <span style='x'>s</span>&nbsp;t <notatag> x<y": "a bold s t <notatag> x<y",
    "one\n---\ntwo\n***\n\n\n\nthree": "one\n\ntwo\n\nthree",
    "| a | b |\n| ------ | :-: |\n| 1 | 2 |": "| a | b |\n|---|---|\n| 1 | 2 |",
    "- a\n  #+BEGIN_QUOTE\n  words\n  #+END_QUOTE": "- a\n  words",
    # code and formulas, letter by letter
    "```py\nx = a[[1]]  # #tag\n\n\n\n%%t\nk:: v\n```\n[[b]]": "```py\nx = a[[1]]  # #tag\n\n\n\n%%t\nk:: v\n```\nb",
    "- ~~~\n  [[a]]\n  ~~~\n- [[b]]": "- ~~~\n  [[a]]\n  ~~~\n- b",
    "```\n[[never closed]]": "```\n[[never closed]]",
    "`[[a]]` ``b ` [[c]]`` [[d]] ` [[e]]": "`[[a]]` ``b ` [[c]]`` d ` e",
    "$x[[1]]$ and $$\na[[2]] #b\n$$ but $5 [[and]] $6": "$x[[1]]$ and $$\na[[2]] #b\n$$ but $5 and $6",
    # front matter
    "---\ntitle: The title\ntags: [a]\n---\ntext": "# The title\n\ntext",
    "---\ntitle: Same\n---\n# Same\n\ntext": "# Same\n\ntext",
    "---\ntitle: With: colon\ndate: 2024-99-99\n---\ntext": "# With: colon\n\ntext",
    "---\n---\ntext": "text",
    "---\nJust a line between rules.\n---\ntext": "Just a line between rules.\n\ntext",
    "text\n---\ntitle: no\n---": "text\n\ntitle: no",
    "\ufeffa\r\nb\rc": "a\nb\nc",
}


@pytest.mark.parametrize("written", CASES, ids=range(len(CASES)))
def test_markup_reads_as_text(written: str) -> None:
    assert clean_markdown(written) == CASES[written]


def test_blocks_are_found_and_quoted_to_a_depth() -> None:
    note = f"- DONE a [[fox]]\n  id:: {UUID}\n- two\n  lines\n  id:: second-block\nA line. ^third"
    blocks = find_blocks(note)
    assert blocks == {UUID: "a [[fox]]", "second-block": "two lines", "third": "A line."}
    assert clean_markdown(f"> (({UUID})), ((second-block))", blocks) == "> a fox, two lines"
    endless = {"round-and-round": "once ((round-and-round))"}
    assert clean_markdown("((round-and-round))", endless) == "once once once"


MARKUP = "\r\ufeff#[](){}<>`~$%^=*_-+|!:&\ue000\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters=MARKUP))


@given(st.lists(PLAIN.map(lambda line: " ".join(line.split())).filter(lambda s: not s[:1].isdigit()), max_size=8))
def test_plain_text_stays(lines: list[str]) -> None:
    paragraphs = "\n\n".join(line for line in lines if line)
    assert clean_markdown(paragraphs) == paragraphs
    assert clean_markdown(f"  \n\n{paragraphs}\n \n") == paragraphs


PIECES = [
    "[[",
    "]]",
    "((",
    "))",
    "{{",
    "}}",
    "![[",
    "](",
    "[",
    ")",
    "```",
    "`",
    "~~~",
    "%%",
    "<!--",
    "-->",
    "$",
    "$$",
    "---",
]
PIECES += [
    "\n",
    "\n\n",
    " ",
    "- ",
    "> ",
    "[!note]",
    "#",
    "#tag",
    "key:: v",
    "id:: abcdef123",
    "abcdef123",
    " ^abc",
    "==",
    "|",
]
PIECES += ["\ue000", "\ue0000\ue001", "title: x", "a", "b c", "TODO ", "[ ] ", "<b>", "{", "}", "&nbsp;", "\t", "*"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_any_text_is_cleaned(text: str) -> None:
    cleaned = clean_markdown(text, {"abcdef123": text})
    assert cleaned == cleaned.strip() and "\r" not in cleaned
    find_blocks(text)


@given(
    st.lists(
        st.sampled_from(["[[a]] ", "#t ", "`c` ", "x ", "\n- ", "\n\n", "((abc-DEF12))", "![[p.png]]", "**b** "]),
        max_size=30,
    )
)
def test_cleaned_text_stays(pieces: list[str]) -> None:
    cleaned = clean_markdown("".join(pieces))
    assert clean_markdown(cleaned) == cleaned


HOSTILE = [
    "[",
    "[[",
    "((",
    "{{",
    "`",
    "``` ",
    "%%",
    "<!--",
    "$",
    "$a",
    "![",
    "[a](",
    "- [",
    "#a/",
    "==a",
    "---\n",
    "> ",
]
HOSTILE += ["a:: ", " ^", "<b ", "\t", "[a][", "|--", "a ", "[^", ":", "- - "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_time_in_proportion(piece: str) -> None:
    """No pattern explodes: a test that hangs fails by its time limit, and none of these takes a tenth of it."""
    started = time.monotonic()
    clean_markdown(piece * (200_000 // len(piece)))
    assert time.monotonic() - started < 60
