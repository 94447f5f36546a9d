"""The page around what a command reports: its head, its style and script, and where it comes from."""

from __future__ import annotations

import base64
import hashlib
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
    """Where a page comes from: the command line, when it ended, and versions by name."""

    command: Sequence[str]
    made_at: str
    versions: Mapping[str, str]


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
        element("p", shlex.join(origin.command), class_="command"),
        *content,
        facts("Made by", [*origin.versions.items(), ("finished", origin.made_at)]),
    )
    body = element("body", main, element("script", Markup(script)))
    return "<!DOCTYPE html>\n" + element("html", joined([head, body]), lang="en") + "\n"


def _data(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return how a policy names the one text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
