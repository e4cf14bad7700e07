"""Secrets are found whole, and ordinary prose is left alone."""

from __future__ import annotations

import base64
import random
import string
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data.chitchat import documents as chitchat
from niels_gpt.data.notes.secrets import find, mask
from niels_gpt.paths import PROJECT_ROOT
from niels_gpt.settings import validate_overrides

_RNG = random.Random(5)


def drawn(n: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(_RNG.choice(letters) for _ in range(n))


PRIVATE = (
    "-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join(drawn(64) for _ in range(5)) + "\n-----END RSA PRIVATE KEY-----"
)
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"HS256"}', b'{"sub":"1"}', b"x" * 32)
)
SECRETS = {
    "key": [
        "AKIA" + drawn(16, string.ascii_uppercase + string.digits),
        "AKIA" + drawn(20, string.ascii_uppercase + string.digits),  # longer than those known
        "ghp_" + drawn(36),
        "github_pat_" + drawn(22) + "_" + drawn(59),
        "glpat-" + drawn(20),
        "sk-" + drawn(20) + "T3BlbkFJ" + drawn(20),
        "sk-proj-" + drawn(48),
        "sk-ant-api03-" + drawn(80),
        "hf_" + drawn(34),
        "AIza" + drawn(35),
        "xoxb-123456789012-123456789012-" + drawn(24),
        "SG." + drawn(22) + "." + drawn(43),
        "sk_live_" + drawn(24, string.digits + string.ascii_letters),
        "npm_" + drawn(36),
        "123456789:" + drawn(35),
        JWT,
        PRIVATE,
        PRIVATE.replace("\n", "\\n"),
        PRIVATE.partition("\n-----END")[0],
        drawn(40),
    ],
    "e-mail": ["anna.k@example.org", "A_B+tag@mail.example.co.uk"],
    "phone": ["+49 30 901820", "+1 650 253 0000", "(212) 555-0123", "212-555-0187", "650.253.0000"],
    "card": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005", "3782 822463 10005"],
}


@pytest.mark.parametrize(("kind", "secret"), [(kind, one) for kind, found in SECRETS.items() for one in found])
def test_secrets_are_masked_whole(kind: str, secret: str) -> None:
    for around in ("{}", "It is {} here.", "- ({})", '"{}"', "first line\n{}\nlast line"):
        masked, counts = mask(around.format(secret), "US")
        assert masked == around.format(f"[{kind}]") and counts == {kind: 1}


PASSWORDS = {
    "password: hunter22": "password: [password]",
    "Password = 'correct horse9'": "Password = 'correct horse9'",  # several words are a sentence
    "Passwort? password: swordfish": "Passwort? password: [password]",
    "password: swordfish is what he said": "password: swordfish is what he said",
    'db_password = "swordfish"': 'db_password = "[password]"',
    "export API_KEY=abc123def": "export API_KEY=[password]",
    "https://x.y/?token=a1b2c3d4&z=1": "https://x.y/?token=[password]",
    "**PIN:** 4711": "**PIN:** [password]",
    "postgres://anna:s3cr3t@db.host/x": "postgres://anna:[key]@db.host/x",
    "call me on my mobile 6502530000": "call me on my mobile [phone]",
    "aws_secret_access_key = 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzKEY'": "[key]",
}


@pytest.mark.parametrize("written", PASSWORDS)
def test_passwords_by_their_context(written: str) -> None:
    assert mask(written, "US")[0] == PASSWORDS[written]


ORDINARY = [
    "Born 12.03.1984, moved 2024-01-15, 15/01/2024, Jan 5 2023 10:30:45, 1999-2003, 2021/03/04 05:06:07.",
    "ISBN 978-0-306-40615-2, ISBN 0-306-40615-2, 9780306406152, ISSN 2049-3630, DOI 10.1000/182.",
    "Colours #ff8800 #FFF 00aaff80, rgb(12, 34, 56), version 1.2.3, v10.0.1-rc.2, build 20240115.1",
    "In 1789 and 1848; 3.14159265358979; 1,234,567.89 dollars; 100 200 3000; 1700000000 seconds; order 6502530000",
    "10.0.0.1, 192.168.1.254:8080, 255.255.255.0, aa:bb:cc:dd:ee:ff, pages 345-678, room 12-34-56",
    "commit 3a4d0230231a9a44f531b38aaa74248062e5b1b3, sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d",
    "550e8400-e29b-41d4-a716-446655440000, zip 94043-1351, tracking 1Z999AA10123456784, IBAN later",
    "Write to @anna on mastodon, use git@github.com:someone/project.git, npm install left-pad@1.3.0, @app.route",
    "The secret: never give up. Password: none needed here. My token of love; the key = the door. A pin: small.",
    "token = os.environ['TOKEN'], api_key = config.api_key, password = getpass(), secret = <your secret>",
    "getUserByIdFromDatabaseWithRetry(), SomeVeryLongClassNameInJava8AndLater, snake_case_name_that_goes_on_2_long",
    "APARTMENTS APPENDIX APCALYPTICALLY AKCESSORIES ACCESSIBILITY sk-learn hf_transformers",
    "https://en.wikipedia.org/wiki/Attention_Is_All_You_Need?oldid=123456789#Section_2, /usr/lib/python3.11/x",
    "4111 1111 1111 1112 is no card, 1234 5678 9012 3456 neither, 0000-0000-0000-0000",
    "Score 3-2, 6-4 6-3 7-5, ratio 16:9, 07:45-08:30, +5 degrees, -12, +100%, 1e-9, 5'11\", 50 000 km, 1.000.000 EUR",
]


@pytest.mark.parametrize("prose", ORDINARY)
def test_ordinary_text_is_left_alone(prose: str) -> None:
    assert mask(prose, "US") == (prose, {})


def test_shipped_prose_is_left_alone() -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in sorted(PROJECT_ROOT.glob("*.md")) + sorted(PROJECT_ROOT.glob("docs/*.md"))
    ]
    texts += [document.text for document in chitchat(validate_overrides({}), "val")]
    assert sum(map(len, texts)) > 1_000_000
    found = [text[f.start : f.end] for text in texts for f in find(text, "US")]
    assert found == []


def test_without_a_region_only_international_numbers_are_phones() -> None:
    assert mask("212-555-0187 or +49 30 901820", None)[0] == "212-555-0187 or [phone]"
    assert mask("020 7946 0958", "US")[0] == "020 7946 0958" and mask("020 7946 0958", "GB")[0] == "[phone]"


@given(
    st.lists(
        st.one_of(st.text(max_size=8), st.sampled_from([s for found in SECRETS.values() for s in found])), max_size=8
    )
)
def test_masking_any_text_is_done_after_one_time(pieces: list[str]) -> None:
    text = " ".join(pieces)
    spans = find(text, "US")
    assert all(one.end <= other.start for one, other in pairwise(spans))
    masked, counts = mask(text, "US")
    assert sum(counts.values()) == len(spans)
    again, more = mask(masked, "US")
    assert again == masked and not more


HOSTILE = [
    "a@",
    "a.",
    "1 ",
    "1",
    "4111",
    "-",
    "://a:",
    "password: ",
    "pass_",
    "eyJ",
    "aws key ",
    "sk-",
    "x" * 40,
    "a1B2",
    "+1(",
]
HOSTILE += ["-----BEGIN PRIVATE KEY-----", "//a/:_authToken=", "ibm_key_", "softlayer key "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_time_in_proportion(piece: str) -> None:
    started = time.monotonic()
    mask(piece * (100_000 // len(piece)), "US")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("kind", ["key", "e-mail"])
def test_underscores_escaped_in_markdown_hide_nothing(kind: str) -> None:
    for secret in [*SECRETS[kind], "_".join(("sk-proj-" + drawn(30), drawn(20)))] if kind == "key" else SECRETS[kind]:
        written = secret.replace("_", r"\_")
        text = rf"so\_it is: {written} \_and more\_\_of it"
        assert mask(text, "US") == (rf"so\_it is: [{kind}] \_and more\_\_of it", {kind: 1})
