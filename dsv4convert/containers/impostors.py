"""Tells files that stand where others should by their first bytes: Git LFS pointers, and error pages saved as files."""

from __future__ import annotations

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PULL = "run git lfs pull in the folder"

# HTML, XML, gzip (a page as it was sent), and what APIs answer.
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<error", b"<!--", b"\x1f\x8b", b'{"error"', b'{"message"')
DOWNLOAD_AGAIN = "download the file again; does the repository want you to log in?"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_lfs_pointer(begin: bytes) -> bool:
    """Return whether a file begins as a pointer of Git LFS."""
    return begin.startswith(LFS_POINTER)


def is_error_page(begin: bytes) -> bool:
    """Return whether a file begins as a page of a web server, in a place where no such page belongs."""
    return begin.removeprefix(BYTE_ORDER_MARK).lstrip().lower().startswith(PAGES)


def impostor(begin: bytes) -> tuple[str, str] | None:
    """Return what a file is that should be another, and what to do; None where its first bytes tell nothing.

    >>> impostor(b"<!DOCTYPE html>")[0]
    'an error page, not the file'
    """
    if is_lfs_pointer(begin):
        return "a Git LFS pointer, not the file", PULL
    return ("an error page, not the file", DOWNLOAD_AGAIN) if is_error_page(begin) else None
