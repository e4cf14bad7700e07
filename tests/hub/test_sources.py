"""The sources of the hub through the real libraries, against a hub on loopback: what they give, and what goes wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import samples
from tests.hub.server import Fault, LoopbackHub
from tests.hub.worker import Failed, Worker


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.shas = samples.publish_all(running)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def online(hub: LoopbackHub, home: Path) -> Iterator[Worker]:
    worker = Worker(hub.url, home, offline=False)
    yield worker
    worker.close()


@pytest.fixture
def faulty(hub: LoopbackHub) -> Iterator[list[Fault]]:
    yield hub.faults
    hub.faults.clear()


def one_line(worker: Worker, **question: Any) -> str:
    """The text of the HubError that the question must end in."""
    with pytest.raises(Failed, match=r"^HubError: ") as caught:
        worker.ask(**question)
    text = str(caught.value).removeprefix("HubError: ")
    assert "\n" not in text and len(text) < 500
    return text


# What they give


def test_wikitext_rows_and_splits(online: Worker, hub: LoopbackHub) -> None:
    train = [row["text"] for n, seed in ((300, 2), (150, 3)) for row in samples.wikitext_rows(n, seed)]
    val = [row["text"] for row in samples.wikitext_rows(60, 4)]
    assert online.ask(do="texts", source="wiki", split="train") == [text for text in train if text]
    assert online.ask(do="texts", source="wikitext", split="val") == [text for text in val if text]
    first = online.ask(do="texts", source="wikitext", split="train", data={"wikitext": {"max_examples": 3}})
    assert first == [text for text in train if text][:3]
    size = len("".join(first[:2]).encode())
    limited = {"wikitext": {"max_bytes": size}}
    assert online.ask(do="texts", source="wikitext", split="train", data=limited) == first[:2]
    about = online.ask(do="describe", source="wikitext")
    assert about["dataset_revision"] == hub.shas[samples.WIKITEXT]
    assert about["dataset_name"] == "wikitext" and about["dataset_config"] == "wikitext-103-raw-v1"


def test_streams_are_shuffled_by_their_seed(online: Worker, hub: LoopbackHub) -> None:
    pages = [row["text"] for seed in (0, 1) for row in samples.fineweb_rows(250, seed)]

    def read(**chosen: Any) -> list[str]:
        small = {"reproducibility": {"dataset_shuffle_buffer_size": 50}}
        return online.ask(do="texts", source="fineweb_edu", data={"fineweb_edu": chosen}, settings=small)

    assert read(shuffle=False) == pages
    shuffled = read()
    assert shuffled != pages and sorted(shuffled) == sorted(pages) and shuffled == read() != read(seed=1)
    assert read(max_examples=7) == shuffled[:7]
    about = [online.ask(do="describe", source="fineweb_edu", data={"fineweb_edu": {"seed": s}}) for s in (42, 42, 1)]
    assert about[0] == about[1] != about[2] and about[0]["stream_buffer"] == 10_000
    assert about[0]["dataset_revision"] == hub.shas[samples.FINEWEB]
    books = online.ask(do="texts", source="gutenberg")
    assert sorted(books) == sorted(row["text"] for row in samples.gutenberg_rows(12)) and books[0][:4] == "BOOK"


def test_dolly_chats(online: Worker) -> None:
    rows = samples.dolly_rows(60)
    chats = online.ask(do="chats", source="dolly")
    assert len(chats) == 60
    for row, chat in zip(rows, chats, strict=True):
        context = f"\n\ncontext:\n{row['context']}" if row["context"] else ""
        assert chat == [["user", row["instruction"] + context], ["assistant", row["response"]]]
    told = {"dolly": {"include_system": True, "max_examples": 5, "shuffle": True}}
    chosen = online.ask(do="chats", source="dolly15k", data=told)
    order = list(range(60))
    random.Random(42).shuffle(order)
    assert [chat[1:] for chat in chosen] == [chats[i] for i in order[:5]]
    assert all(chat[0] == ["system", "you are a helpful assistant."] for chat in chosen)


def test_oasst1_threads(online: Worker) -> None:
    chats = online.ask(do="chats", source="oasst1", data={"oasst1": {"shuffle_trees": False}})
    assert len(chats) == 32  # 16 English trees with two leaves each
    assert [role for role, _ in chats[0]] == ["user", "assistant"] * 2
    assert [text.split()[0] for _, text in chats[0] + chats[1]] == ["q", "a0", "q2", "b0", "q", "a1"]
    everyone = online.ask(do="chats", source="oasst1", data={"oasst1": {"english_only": False, "max_messages": 2}})
    assert len(everyone) == 40 and all(len(chat) == 2 for chat in everyone)
    taken = online.ask(do="chats", source="oasst1", data={"oasst1": {"take_trees": 4}})
    assert len(taken) == 4 and taken != chats[:4] and all(chat in chats for chat in taken)


def test_smoke_loaders_pass_and_fail(online: Worker, faulty: list[Fault]) -> None:
    assert online.ask(do="smoke") == 0, online.said
    assert online.said.count("PASS") == 5 and "FAIL" not in online.said
    faulty.append(Fault("status", "gutenberg", code=503))
    assert online.ask(do="smoke") == 1
    assert online.said.count("PASS") == 4 and "FAIL gutenberg" in online.said
    assert "and it is read as a stream, which is never kept; check the connection" in online.said


def test_uploads_come_back(online: Worker, hub: LoopbackHub) -> None:
    for size in (10, 300_000):
        content = random.Random(size).randbytes(size)
        told = {"do": "round_trip", "name": "me/model", "path": f"{size}.pt", "content": content.hex()}
        sent, received, back = online.ask(**told, token="hf_test")
        assert sent == received == hub.repositories["model", "me/model"].find("main") and back == content.hex()
    assert set(hub.repositories["model", "me/model"].commits[sent]) == {"10.pt", "300000.pt"}
    with pytest.raises(Failed, match="401"):
        online.ask(**told, token="")


# What goes wrong


def test_a_download_that_breaks_off_is_resumed(online: Worker, hub: LoopbackHub, faulty: list[Fault]) -> None:
    hub.publish("me/resumed", {"data/train.jsonl": samples.jsonl(samples.dolly_rows(200))})
    faulty.append(Fault("truncate", "/cdn/", times=2))
    chats = online.ask(do="chats", source="dolly", data={"dolly": {"dataset_id": "me/resumed"}})
    assert len(chats) == 200 and faulty[0].times == 0


def test_a_download_that_always_breaks_off(online: Worker, hub: LoopbackHub, faulty: list[Fault]) -> None:
    hub.publish("me/broken", {"data/train.jsonl": samples.jsonl(samples.dolly_rows(200))})
    faulty.append(Fault("hang", "/cdn/", seconds=3.0))
    asked = {"do": "chats", "source": "dolly", "data": {"dolly": {"dataset_id": "me/broken"}}}
    assert "me/broken: the hub is too slow" in one_line(online, **asked, timeout=0.3)
    faulty[:] = [Fault("short", "/cdn/")]
    assert "me/broken: the download broke off before its end; try again" in one_line(online, **asked)
    faulty.clear()
    assert len(online.ask(**asked)) == 200


def test_a_stream_that_breaks_off(online: Worker, faulty: list[Fault]) -> None:
    asked = {"do": "texts", "source": "gutenberg"}
    faulty.append(Fault("truncate", "/cdn/", times=2))
    assert len(online.ask(**asked)) == 12 and faulty[0].times == 0
    faulty[:] = [Fault("truncate", "/cdn/")]
    assert "splits: the download broke off before its end" in one_line(online, **asked)
    faulty[:] = [Fault("hang", "/cdn/", seconds=3.0)]
    assert "splits: the hub is too slow" in one_line(online, **asked, timeout=0.2)


def test_damaged_files_are_refused_and_removed(online: Worker, hub: LoopbackHub, faulty: list[Fault]) -> None:
    rows = samples.dolly_rows(200)
    hub.publish("me/flipped", {"data/train.jsonl": samples.jsonl(rows)})
    asked = {"do": "chats", "source": "dolly", "data": {"dolly": {"dataset_id": "me/flipped"}}}
    faulty.append(Fault("flip", "/cdn/", at=0.49))
    text = one_line(online, **asked)
    assert "me/flipped: data/train.jsonl was damaged on its way (its hash is not the hub's) and is removed" in text
    faulty[:] = [Fault("corrupt", "/cdn/")]  # no JSON any more
    assert "me/flipped: data/train.jsonl was damaged on its way" in one_line(online, **asked)
    faulty.clear()
    assert [chat[1][1] for chat in online.ask(**asked)] == [row["response"] for row in rows]

    hub.publish("me/damaged", {"data/train.parquet": samples.parquet(samples.gutenberg_rows(20))})
    faulty.append(Fault("corrupt", "/cdn/"))
    stream = {"do": "texts", "source": "gutenberg", "data": {"gutenberg": {"dataset_id": "me/damaged"}}}
    assert "me/damaged: a file of its train split cannot be read" in one_line(online, **stream)


def test_random_faults_give_the_right_rows_or_an_error(
    online: Worker, hub: LoopbackHub, faulty: list[Fault], request: pytest.FixtureRequest
) -> None:
    rng = random.Random(11)
    soak = request.config.getoption("--soak")
    kinds = ("truncate", "truncate", "truncate", "whole", "short", "flip", "corrupt", "status")
    outcomes: dict[str, int] = {"right": 0, "refused": 0}
    for n in range(100 if soak else 12):
        rows = samples.dolly_rows(80 + n)
        name = f"me/random-{n}"
        hub.publish(name, {"data/train.jsonl": samples.jsonl(rows)})
        for _ in range(rng.randint(1, 2)):
            code = rng.choice((404, 429, 429, 500, 503))
            faulty.append(Fault(rng.choice(kinds), "/cdn/", code=code, at=rng.random(), times=rng.randint(1, 4)))
        asked = {"do": "chats", "source": "dolly", "data": {"dolly": {"dataset_id": name}}}
        wanted = [row["response"] for row in rows]
        try:
            assert [chat[1][1] for chat in online.ask(**asked)] == wanted, (n, faulty)
            outcomes["right"] += 1
        except Failed as error:
            assert re.fullmatch(rf"HubError: {name}: [^\n]+", str(error)), (n, faulty)
            outcomes["refused"] += 1
        faulty.clear()
        assert [chat[1][1] for chat in online.ask(**asked)] == wanted  # nothing wrong was left behind
    assert all(outcomes.values()), outcomes


def test_what_is_not_there(online: Worker, hub: LoopbackHub, faulty: list[Fault]) -> None:
    def wrong(source: str = "dolly", **chosen: Any) -> str:
        return one_line(
            online, do="describe" if "revision" in chosen else "chats", source=source, data={source: chosen}
        )

    assert "the hub has no public dataset nobody/nothing; check its dataset_id" in wrong(dataset_id="nobody/nothing")
    assert "is named owner/name" in wrong(dataset_id="squad")
    assert "the hub has no revision 'v9' of it" in wrong(revision="v9")
    assert "no such split or configuration" in wrong(split="tren")
    told = {"do": "texts", "source": "wikitext", "split": "val", "data": {"wikitext": {"config": "wikitext-9"}}}
    assert "no such split or configuration" in one_line(online, **told)
    hub.publish("me/empty", {"README.md": b"# nothing else"})
    assert "me/empty: " in wrong(dataset_id="me/empty")
    hub.publish("me/other", {"README.md": b"#", "data/train.jsonl": b'{"question": "why?"}\n'})
    with pytest.raises(
        Failed, match="ValueError: dolly15k: a row has no text in instruction, response; its columns are"
    ):
        online.ask(do="chats", source="dolly", data={"dolly": {"dataset_id": "me/other"}})
    with pytest.raises(Failed, match="ValueError: me/other: no column of text among 'question'"):
        online.ask(do="texts", source="gutenberg", data={"gutenberg": {"dataset_id": "me/other"}})
    faulty.append(Fault("status", "dolly", code=429))
    assert "the hub asks for fewer requests (429)" in wrong()


def test_a_changed_data_set_changes_its_description(online: Worker, hub: LoopbackHub) -> None:
    before = online.ask(do="describe", source="wikitext")
    old = online.ask(do="texts", source="wikitext", split="val")
    hub.publish(samples.WIKITEXT, samples.wikitext_files(seed=100))
    assert online.ask(do="describe", source="wikitext", forget=False) == before  # one commit for one process
    assert online.ask(do="texts", source="wikitext", split="val", forget=False) == old
    after = online.ask(do="describe", source="wikitext")
    assert {key for key in before if before[key] != after[key]} == {"dataset_revision"}
    assert online.ask(do="texts", source="wikitext", split="val") != old
    pinned = {"wikitext": {"revision": before["dataset_revision"]}}
    assert online.ask(do="texts", source="wikitext", split="val", data=pinned) == old


def test_a_hub_that_is_down_leaves_what_was_downloaded(online: Worker, faulty: list[Fault]) -> None:
    told = {"do": "chats", "source": "dolly"}
    known = online.ask(**told)
    faulty.append(Fault("status", "/api/", code=502))
    assert online.ask(**told) == known
    assert "the Hugging Face hub cannot be reached; reading what was downloaded" in online.said
    assert "the hub answers with an error (502)" in one_line(online, **told, data={"dolly": {"dataset_id": "me/no"}})


def test_without_a_connection(online: Worker, hub: LoopbackHub, home: Path) -> None:
    told = {"do": "chats", "source": "dolly"}
    known = online.ask(**told)
    hub.publish("me/unread", {"README.md": b"# hi", "data/train.jsonl": samples.jsonl(samples.dolly_rows(5))})
    cold = {"dolly": {"dataset_id": "me/unread"}}
    hub.stop()
    try:
        assert online.ask(**told) == known
        assert "the Hugging Face hub cannot be reached; reading what was downloaded" in online.said
        text = one_line(online, **told, data=cold)
        assert f"me/unread: the Hugging Face hub cannot be reached at {hub.url}, and it is not in" in text
        assert "check the connection, or leave the source out" in text
        stream = one_line(online, do="texts", source="gutenberg")
        assert f"cannot be reached at {hub.url}, and it is read as a stream, which is never kept" in stream
    finally:
        hub.start()
    assert len(online.ask(**told, data=cold)) == 5

    offline = Worker(hub.url, home, offline=True)
    hub.requests.clear()
    try:
        assert offline.ask(**told) == known and "warning" not in offline.said
        for source in ("dolly", "wikitext", "fineweb_edu"):
            assert offline.ask(do="describe", source=source) == online.ask(do="describe", source=source)
        asked = list(hub.requests)
        text = one_line(offline, **told, data={"dolly": {"dataset_id": "me/never-read"}})
        assert f"me/never-read: it is not in the Hugging Face cache ({home}), and HF_HUB_OFFLINE forbids" in text
        assert "run once with a connection, or leave the source out (data.mix_pretrain" in text
        assert "allow_missing_sources=True or required_sources=()" in text
        assert "which is never kept, and HF_HUB_OFFLINE forbids" in one_line(offline, do="texts", source="gutenberg")
        assert hub.requests == asked
    finally:
        offline.close()
