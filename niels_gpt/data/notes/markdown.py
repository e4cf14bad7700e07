"""From the Markdown of Roam, Obsidian and Logseq to text that reads well: what only the note app understands goes.

Headings, lists, emphasis, tables and code stay, for they are how people write. Code (fenced or inline) and formulas are
kept letter by letter: they are lifted out first, stand as placeholders meanwhile, and are put back last. Every pattern
is bounded, so that no text takes long, and none is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

Blocks = Mapping[str, str]  # id of a block -> its text as written

_PROTECTED = re.compile(
    r"^(?P<fence>[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<marks>`{3,}|~{3,})[^\n`]*)$"
    r"|(?P<comment>%%)|(?P<html><!--)|(?P<ticks>`{1,50})|(?P<math>\$\$|\$(?=[^\s$]))|(?P<ours>\ue000)",
    re.MULTILINE,
)
_MARKS = re.compile("[`~%<$\ue000]")
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
_INLINE_LIMIT = 2000  # characters of inline code or a formula
_MATH_END = re.compile(r"(?<=[^\s$\\])\$(?![\d$])|\n")

_MACRO = re.compile(r"[ \t]{0,4}\{\{((?:[^{}\n]|\{[^{}\n]{0,300}\}){0,600})\}\}")
_CLOZE = re.compile(r"(?:\[\[)?(?:cloze|c\d)(?:\]\])?(?::{1,2}|\s)\s*", re.IGNORECASE)
_EMBED = re.compile(r"!\[\[([^\[\]\n]{1,500})\]\]")
_IMAGE = re.compile(r"!\[[^\[\]\n]{0,500}\]\((?:[^()\n]|\([^()\n]{0,500}\)){0,100000}\)(?:\{[^{}\n]{0,200}\})?")
_WIKI = re.compile(r"\[\[([^\[\]\n]{1,500})\]\]")
_TAG_OF_WORDS = re.compile(r"(?<![\w#])#\[\[")
_LINK = re.compile(r"\[([^\[\]\n]{1,1000})\]\((?:[^()\n]|\((?:[^()\n]|\([^()\n]{0,99}\)){0,99}\)){0,2000}\)")
_LINK_BY_NAME = re.compile(r"\[([^\[\]\n]{1,1000})\]\[[^\[\]\n^]{1,200}\]")
_LINK_TARGET = re.compile(r"[ ]{0,3}\[[^\[\]\n^]{1,200}\]:\s+\S+.{0,300}")
_AUTOLINK = re.compile(r"<((?:https?://|mailto:)[^<>\s]{1,2000})>")
_BLOCK_REFERENCE = re.compile(r"([ \t]{0,4})\(\(([\w-]{6,40})\)\)")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_BLOCK_ID = re.compile(r"(?:^|[ \t])\^[A-Za-z0-9-]{3,40}[ \t]*$", re.MULTILINE)
_TAG = re.compile(r"(?<![\w#&/.:])#(?=\d*[^\W\d])([\w/-]{1,200})")
_COLOUR = re.compile(r"[0-9a-fA-F]{3}(?:[0-9a-fA-F]{3}(?:[0-9a-fA-F]{2})?)?")
_TAGS_ONLY = re.compile(r"\s*(?:[-*+]\s+)?(?:tags?:\s*)?#(?=\d*[^\W\d])[\w/-]+(?:[\s,]+#[\w/-]+)*\s*", re.IGNORECASE)
_HIGHLIGHT = re.compile(r"(==|\^\^)(?=[^\s=^])([^\n=^]{1,1000})(?<=\S)\1")
_HTML_TAG = re.compile(
    r"</?(?:a|b|big|br|center|del|details|div|em|font|h[1-6]|hr|i|iframe|img|ins|kbd|mark|p|s|small|span|strike|strong|"
    r"sub|summary|sup|u|video|audio)(?:\s[^<>]{0,1000})?/?>",
    re.IGNORECASE,
)

_PROPERTY = re.compile(r"\s*(?:[-*+]\s+)?(?P<key>[^\W\d_][\w./-]{0,60}(?: [\w./-]{1,60}){0,4})::(?:\s+(?P<value>.*))?")
_PLANNED = re.compile(r"\s*(?:SCHEDULED|DEADLINE):\s*<.*>\s*")
_BLOCK_MARK = re.compile(r"\s*(?:[-*+]\s+)?#\+(?:BEGIN|END)_\w+.*", re.IGNORECASE)
_TASK = re.compile(
    r"(?P<bullet>\s*(?:[-*+]|\d{1,9}[.)])\s+|\s*#{1,6}\s+)?"
    r"(?:(?:TODO|DOING|DONE|LATER|NOW|WAITING|WAIT|CANCELED|CANCELLED|IN-PROGRESS)\s+)?(?:\[[ xX/>-]\]\s+)?"
    r"(?:\[#[ABC]\]\s+)?"
)
_CALLOUT = re.compile(r"(\s*(?:>\s?)+)\[!\w[\w|-]{0,40}\][+-]?[ \t]*")
_RULE = re.compile(r"\s*(?:(?:[-*_]\s*){3,}|={3,})\s*")
_TABLE_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")
_EMPTY = re.compile(r"\s*(?:[-*+]|>)(?:\s*>)*\s*")
_TITLE_LINE = re.compile(r"(?m)^title:[ \t]*(.{1,300})$")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.{0,65536}?)(?:^---|^\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_LIKE_YAML = re.compile(r"(?:[\w][\w .-]{0,80}:(?:\s.*)?|[ \t]+.*|-\s.*|#.*|)")
_IMAGE_SUFFIX = re.compile(
    r"\.(?:png|jpe?g|gif|svg|webp|bmp|avif|heic|tiff?|pdf|mp[34]|m4a|wav|ogg|webm|mov|excalidraw|canvas)\b", re.I
)
_ID_LINE = re.compile(r"^\s*id:: *([\w-]{6,40})\s*$")
_ID_AT_END = re.compile(r"^(.*?\S)[ \t]+\^([A-Za-z0-9-]{3,40})[ \t]*$")
_BLOCK_LIMIT = 2000  # characters of a block that other notes quote
_SENTENCE = 5  # words from which the value of a property is text, unless it is a list
_DEPTH = 3  # blocks that quote blocks


def clean_markdown(text: str, blocks: Blocks | None = None) -> str:
    """Plain readable text of a note. `blocks`: those that notes of the vault quote, see `find_blocks`.

    Text without markup comes back as it is, apart from blanks at line ends, rows of blank lines and blank edges.
    """
    title, body = _front_matter(text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))
    prose, kept = _lift(body)
    page_title, prose = _lines(_spans(prose, blocks or {}, _DEPTH))
    prose = re.sub(r"\n{3,}", "\n\n", prose).strip("\n")
    cleaned = _PLACEHOLDER.sub(lambda match: kept[int(match[1])], prose).strip()
    title = title or page_title
    if title and cleaned.partition("\n")[0].lstrip("# ").casefold() != title.casefold():
        cleaned = f"# {title}\n\n{cleaned}".strip()
    return cleaned


def find_blocks(text: str) -> dict[str, str]:
    """The blocks of a note that have an id: Logseq's `id:: ...` under a block, Obsidian's `^id` at its end."""
    found: dict[str, str] = {}
    block: list[str] = []
    for line in text.split("\n"):
        if match := _ID_LINE.match(line):
            found.setdefault(match[1], " ".join(block)[:_BLOCK_LIMIT])
        elif match := _ID_AT_END.match(line):
            found.setdefault(match[2], _bare(match[1])[:_BLOCK_LIMIT])
        if re.match(r"\s*[-*+]\s", line):
            block = [_bare(line)]
        elif not line.strip():
            block = []
        elif not _PROPERTY.fullmatch(line):
            block = [*block[-50:], line.strip()]
    return found


def _bare(line: str) -> str:
    task = _TASK.match(line)
    if task and task["bullet"]:
        return line[task.end() :].strip()
    return line.strip().removeprefix(">").strip()


# Front matter


def _front_matter(text: str) -> tuple[str, str]:
    """(title, the rest): the YAML between two `---` lines at the very start, if it is that."""
    match = _FRONT_MATTER.match(text)
    if not match:
        return "", text
    block = match[1]
    try:
        loaded = yaml.load(block, Loader=yaml.BaseLoader)  # of strings alone: nothing is constructed from them
    except (yaml.YAMLError, RecursionError, ValueError):
        if not all(_LIKE_YAML.fullmatch(line) for line in block.split("\n")):
            return "", text
        found = _TITLE_LINE.search(block)
        return (found[1].strip().strip("\"'") if found else ""), text[match.end() :]
    if not isinstance(loaded, dict) and block.strip():
        return "", text
    title = loaded.get("title", "") if isinstance(loaded, dict) else ""
    return (" ".join(title.split()) if isinstance(title, str) else ""), text[match.end() :]


# What is kept letter by letter


def _lift(text: str) -> tuple[str, list[str]]:
    """(text with placeholders for code and formulas and without comments, what they stand for)."""
    if not _MARKS.search(text):
        return text, []
    parts: list[str] = []
    kept: list[str] = []
    no_more: set[str] = set()
    done = position = 0  # text before `done` is in parts; the search goes on at `position`
    while match := _PROTECTED.search(text, position):
        start, position = match.span()
        end = start
        if match["fence"] is not None:
            start, end = match.start("marks"), _fence_end(text, match)
        elif match["ours"]:
            end = position
        elif closing := match["comment"] or match["html"]:
            closing = "%%" if closing == "%%" else "-->"
            found = -1 if closing in no_more else text.find(closing, position)
            if found < 0:
                no_more.add(closing)
            else:
                parts.append(text[done:start])
                done = position = found + len(closing)
                if text[start - 1 : start] in ("", " ", "\n") and text[position : position + 1] == " ":
                    done = position = position + 1
            continue
        else:
            end = _inline_end(text, match)
        if end > start:
            parts.append(f"{text[done:start]}\ue000{len(kept)}\ue001")
            kept.append(text[start:end])
            done = position = end
    return "".join([*parts, text[done:]]), kept


def _fence_end(text: str, opening: re.Match[str]) -> int:
    marks = opening["marks"]
    closing = re.compile(rf"^[ \t>]*{marks[0]}{{{len(marks)},}}[ \t]*$", re.MULTILINE).search(text, opening.end())
    return closing.end() if closing else len(text)


def _inline_end(text: str, opening: re.Match[str]) -> int:
    """Where the inline code or formula that opens here ends; 0 if it does not."""
    limit = min(len(text), opening.end() + _INLINE_LIMIT)
    if ticks := opening["ticks"]:
        closing = re.compile(rf"(?<!`)`{{{len(ticks)}}}(?!`)|\n\s*\n").search(text, opening.end(), limit)
        return closing.end() if closing and closing.group().startswith("`") else 0
    if opening["math"] == "$$":
        end = text.find("$$", opening.end(), limit)
        return end + 2 if end > 0 else 0
    ends = _MATH_END.search(text, opening.end(), limit)
    return ends.end() if ends and ends.group() == "$" else 0


# What stands within lines


def _spans(text: str, blocks: Blocks, depth: int) -> str:
    if "{{" in text:
        text = _MACRO.sub(_macro, text)
    if "[" in text:
        text = _EMBED.sub(lambda match: "" if _IMAGE_SUFFIX.search(match[1]) else _page(match[1]), text)
        text = _TAG_OF_WORDS.sub("[[", _IMAGE.sub("", text))
        for _ in range(4):  # links in links
            text, n = _WIKI.subn(lambda match: _wiki(match, blocks, depth), text)
            text, m = _LINK.subn(r"\1", text)
            if not n + m:
                break
        text = _LINK_BY_NAME.sub(r"\1", text)
    if "((" in text:
        text = _BLOCK_REFERENCE.sub(lambda match: _reference(match, blocks, depth), text)
    if "<" in text:
        text = _AUTOLINK.sub(lambda match: match[1].removeprefix("mailto:"), text)
        text = _HTML_TAG.sub("", text)
    if "==" in text or "^" in text:
        text = _BLOCK_ID.sub("", _HIGHLIGHT.sub(r"\2", text))
    return text.replace("&nbsp;", " ")


def _macro(match: re.Match[str]) -> str:
    """Buttons, queries, embeds and boxes of Roam and Logseq say nothing; a cloze is text."""
    cloze = _CLOZE.match(match[1])
    return match.group().partition("{{")[0] + match[1][cloze.end() :] if cloze else ""


def _page(target: str) -> str:
    """How a link to a page reads: its alias, else its name, without block ids."""
    name, bar, alias = target.partition("|")
    if bar and alias.strip():
        return alias.strip()
    page, _, heading = name.partition("#")
    heading = "" if heading.startswith("^") else heading.replace("#", " > ").strip()
    return " > ".join(part for part in (page.strip(), heading) if part)


def _wiki(match: re.Match[str], blocks: Blocks, depth: int) -> str:
    target = match[1]
    block = target.partition("#^")[2].strip()
    if "|" not in target and block in blocks and depth:
        return _quoted(blocks[block], blocks, depth)
    return _page(target)


def _reference(match: re.Match[str], blocks: Blocks, depth: int) -> str:
    blanks, name = match.groups()
    if name in blocks:
        return blanks + _quoted(blocks[name], blocks, depth) if depth else ""
    is_word = name.isalpha() and (name.islower() or name.istitle() or name.isupper())
    is_id = _UUID.fullmatch(name) or (len(name) == 9 and not is_word)
    return "" if is_id else match.group()  # ((something)) is a remark in brackets


def _quoted(block: str, blocks: Blocks, depth: int) -> str:
    prose, kept = _lift(block)
    prose = _lines(_spans(prose, blocks, depth - 1))[1]
    return _PLACEHOLDER.sub(lambda match: kept[int(match[1])], " ".join(prose.split()))


# What is a matter of whole lines


def _lines(text: str) -> tuple[str, str]:
    """(title of the page, the lines without properties, tasks' boxes, callouts, rules, tags and empty bullets)."""
    title, logbook = "", False
    lines: list[str] = []
    for line in text.split("\n"):
        if logbook or line.strip() == ":LOGBOOK:":
            logbook = line.strip() != ":END:"
            continue
        line = line.rstrip()
        if "::" in line and (match := _PROPERTY.fullmatch(line)):
            words = (match["value"] or "").split()
            if match["key"].lower() == "title" and not lines:
                title = " ".join(words)
            if len(words) < _SENTENCE or 2 * line.count(",") >= len(words):
                continue
            line = line.replace("::", ":", 1)
        if "#+" in line and _BLOCK_MARK.fullmatch(line):
            continue
        if ":" in line and (_PLANNED.fullmatch(line) or _LINK_TARGET.fullmatch(line)):
            continue
        if "#" in line and _TAGS_ONLY.fullmatch(line) and not any(_is_colour(tag) for tag in _TAG.findall(line)):
            continue
        cleaned = _CALLOUT.sub(r"\1", line, count=1) if "[!" in line else line
        if (task := _TASK.match(cleaned)) and task["bullet"]:  # words of a line without a bullet are left as they are
            cleaned = task["bullet"] + cleaned[task.end() :]
        if "#" in cleaned:
            cleaned = _TAG.sub(_tag, cleaned)
        cleaned = cleaned.rstrip()
        if cleaned and _RULE.fullmatch(cleaned):
            lines.append("")
        elif "|" in cleaned and _TABLE_RULE.fullmatch(cleaned):
            lines.append("|" + "---|" * len(re.findall("-+", cleaned)))
        elif not _EMPTY.fullmatch(cleaned):
            lines.append(cleaned)
    return title, "\n".join(lines)


def _tag(match: re.Match[str]) -> str:
    return match.group() if _is_colour(match[1]) else match[1]


def _is_colour(name: str) -> bool:
    return bool(_COLOUR.fullmatch(name)) and (any(map(str.isdigit, name)) or len(set(name.lower())) == 1)
