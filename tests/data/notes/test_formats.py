"""HTML pages and JSON lines become documents; broken ones become nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data.notes.formats import documents_of, html_text, json_documents, record_text


def test_html_reads_as_text() -> None:
    page = (
        "<!doctype html><html><head><title>Title</title><style>p {x}</style></head><body><h1>Big  head</h1>"
        "<script>var a</script><p>One\n two <b>bold</b> <a href='http://x.y'>link</a>.</p><!-- no -->"
        "<ul><li>first<li>second <i>item</i></ul><pre><code>def f():\n    return  1</code></pre>"
        "<table><tr><td>a</td><td>b</td></tr></table><p>end<br>of &amp; it</p></body></html>"
    )
    assert html_text(page) == (
        "Title\n\n# Big head\n\nOne two bold link.\n\n- first\n- second item\n\n```\ndef f():\n    return  1\n```\n\n"
        "a b\n\nend\nof & it"
    )
    assert html_text("") == html_text("<script>x</script>") == ""
    assert html_text("<div>" * 20_000 + "deep") == "deep"


RECORDS = [
    ({"text": " plain "}, "plain"),
    ("a string", "a string"),
    ({"title": "T", "content": "body"}, "# T\n\nbody"),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        "user: hi\nassistant: yes",
    ),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "human: hi\ngpt: yes"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "user: a"),
    ({"instruction": "do", "input": "this", "output": "done"}, "do\n\nthis\n\ndone"),
    ({"instruction": "do", "input": "", "output": "done"}, "do\n\ndone"),
    ({"prompt": "q", "completion": "a"}, "q\n\na"),
    (
        {
            "mapping": {
                "r": {"message": None, "parent": None},
                "x": {"message": {"author": {"role": "assistant"}, "content": {"parts": ["left"]}}, "parent": "u"},
                "u": {"message": {"author": {"role": "user"}, "content": {"parts": ["hi"]}}, "parent": "r"},
                "a": {"message": {"author": {"role": "assistant"}, "content": {"parts": ["yes"]}}, "parent": "u"},
            },
            "current_node": "a",
        },
        "user: hi\nassistant: yes",
    ),
    ({"text": "half \ud800 a pair"}, "half  a pair"),
    ({"number": 3}, ""),
    (3, ""),
    (None, ""),
    ({"messages": []}, ""),
    ({"messages": [3, {"role": "user"}, {"content": "x"}]}, ""),
]


@pytest.mark.parametrize(("record", "text"), RECORDS)
def test_records_of_every_common_form(record: object, text: str) -> None:
    assert record_text(record) == text


def test_json_lines_are_documents_named_by_their_lines() -> None:
    lines = [json.dumps({"text": "one"}), "", "{broken", json.dumps({"text": "two"})]
    assert list(json_documents("\n".join(lines))) == [("#1", "one"), ("#3", ""), ("#4", "two")]
    messages = [{"sender": "Anna", "text": "hi", "date": "2024"}, {"sender": "Ben", "text": "ho"}]
    assert list(json_documents("\n".join(map(json.dumps, messages)))) == [("#1", "Anna: hi\nBen: ho")]
    assert list(documents_of('{"text": "x"}', "jsonl", clean=True)) == [("#1", "x")]
    assert list(documents_of("  [[x]] ", "text", clean=True)) == [("", "[[x]]")]
    assert list(documents_of("[[x]]", "markdown", clean=True)) == [("", "x")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "text",
                    "messages",
                    "mapping",
                    "role",
                    "from",
                    "content",
                    "parts",
                    "parent",
                    "current_node",
                    "author",
                    "title",
                ]
            )
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_record_has_text_that_can_be_written(record: object) -> None:
    text = record_text(record)
    assert text.encode("utf-8").decode("utf-8") == text


@given(
    st.text()
    | st.lists(
        st.sampled_from(["<p>", "</p>", "<pre>", "<li>", "<![", "<!--", "&#x", "<a href=", "x", "\n", "<?", "]]>"])
    ).map("".join)
)
def test_any_text_is_read_as_html_and_json(text: str) -> None:
    assert html_text(text) == html_text(text).strip()
    list(json_documents(text))
    list(json_documents("[" * 50_000))
