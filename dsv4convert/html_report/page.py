"""The page around what a command reports: its head, its style and script, and where it comes from."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from .markup import Markup, element, joined
from .tables import facts


class Verdict(NamedTuple):
    """What a report comes to, in one line; ``is_good`` None where it judges nothing."""

    text: str
    is_good: bool | None = None


class Origin(NamedTuple):
    """Where a page comes from: the command line, when it ended, versions by name, and the digest of its JSON."""

    command: Sequence[str]
    made_at: str
    versions: Mapping[str, str]
    json_sha256: str


# An address with a user before its host, or with a query after its path, which can hold a password or a signature.
USER_IN_ADDRESS, QUERY_OF_ADDRESS = re.compile(r"(://)[^/\s]*@"), re.compile(r"(://[^?#\s]*)[?#]\S*")
# Tokens of the hub, wherever they stand, and options that hold a secret.
HUB_TOKEN = re.compile(r"hf_\w{8,}")
SECRET_OPTIONS = ("--token", "--password", "--secret")


def without_secrets(command: Iterable[str]) -> list[str]:
    """Return a command line to show: passwords, signatures and tokens in it are cut.

    >>> without_secrets(["inspect", "https://me:pass@models.example/model?X-Amz-Signature=1", "--token=hf_abcdefgh"])
    ['inspect', 'https://…@models.example/model?…', '--token=…']
    """
    shown: list[str] = []
    is_secret = False
    for argument in command:
        option, equals, _ = argument.partition("=")
        if is_secret:
            argument = "…"
        elif equals and option in SECRET_OPTIONS:
            argument = f"{option}=…"
        is_secret = argument in SECRET_OPTIONS
        argument = QUERY_OF_ADDRESS.sub(r"\1?…", USER_IN_ADDRESS.sub(r"\1…@", argument))
        shown.append(HUB_TOKEN.sub("hf_…", argument))
    return shown


def page(title: str, verdict: Verdict, content: Iterable[Markup | None], origin: Origin) -> str:
    """Return the page as text: one file, which loads nothing and runs no script but its own.

    The policy in its head names the digests of style and script: a browser runs and applies nothing else, whatever
    names and texts the page shows.
    """
    style, script = _data("report.css"), _data("report.js")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    judged = {None: "verdict", True: "verdict good", False: "verdict bad"}[verdict.is_good]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(style)),
    )
    main = element(
        "main",
        element("h1", title),
        element("p", verdict.text, class_=judged),
        element("p", shlex.join(without_secrets(origin.command)), class_="command"),
        *content,
        facts(
            "Made by",
            [*origin.versions.items(), ("finished", origin.made_at), ("SHA-256 of its JSON", origin.json_sha256)],
        ),
    )
    body = element("body", main, element("script", Markup(script)))
    return "<!DOCTYPE html>\n" + element("html", joined([head, body]), lang="en") + "\n"


def _data(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return how a policy names the one text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
