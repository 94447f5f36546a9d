"""A folder that is written in one go, without a journal, and appears under its name whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..containers.presence import is_folder, is_link
from ..errors import OutputExistsError
from .names import Identity, check_name_fits, check_no_mount_point, closing, is_same_file, remove_known_folder
from .outputs import (
    JOURNAL_SUFFIX,
    SUFFIXES,
    appeared,
    check_none_replaced,
    held_in,
    lock_open,
    os_errors,
    partial_path,
    replaced_path,
    sync_folder,
    take_final_name,
)


class NewFolder:
    """A folder to write, and what stands under its final and its temporary name before: only that is ever removed.

    Such a folder has a file called ``must_hold``, written first and removed last, and others of which ``may_hold`` says
    whether a name can be theirs. An older folder, or one that a killed run left, stays with anything else in it.

    Raises:
        UsageError: the folder has no name.
        OutputExistsError: something is there that is not to be replaced.
    """

    def __init__(self, final: Path, must_hold: str, may_hold: Callable[[str], bool], *, overwrite: bool) -> None:
        self._final, self._partial = final, partial_path(final)
        self._must_hold, self._may_hold = must_hold, may_hold
        check_name_fits(final, SUFFIXES)
        check_none_replaced(final)
        self._older = self._look(final)
        if self._older is not None and self._older[1] and not overwrite:
            raise OutputExistsError("already exists", where=final, hint="pass --overwrite to replace the folder")
        self._leftover = self._look(self._partial)
        if self._leftover is not None and os.path.lexists(final.with_name(final.name + JOURNAL_SUFFIX)):
            raise OutputExistsError(
                "unfinished work of a conversion", where=self._partial, hint="finish it, or choose another folder"
            )

    def _look(self, path: Path) -> tuple[Identity, dict[str, Identity]] | None:
        """Return the identity of a folder and of the files in it, None where there is none."""
        with os_errors(path, "looked at"):
            identity = Identity.of(path)
            if identity is None:
                return None
            if is_link(path) or not is_folder(path):
                raise OutputExistsError("already exists and is no folder", where=path, hint="choose another name")
            check_no_mount_point(path)
            held = held_in(path)
            unexpected = sorted(
                name for name in held if is_folder(path / name) or "/" in name or not self._may_hold(name)
            )
            if unexpected or (held and self._must_hold not in held):
                why = f"contains {unexpected[0]}" if unexpected else f"has no {self._must_hold}"
                raise OutputExistsError(
                    f"not replaced: {why}", where=path, hint="choose another folder, or remove this one first"
                )
        return identity, held

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """Yield the folder under its temporary name; it gets its final name after the block, or is removed.

        Raises:
            LockedError: another run is writing the folder.
            OutputExistsError: something else took one of the names meanwhile; it stays.
            SpaceError, InputOutputError: the system refused, in the block too.
        """
        final, partial = self._final, self._partial
        with os_errors(partial, "written"):
            final.parent.mkdir(parents=True, exist_ok=True)
            if self._leftover is not None:
                with closing(_locked(partial)):
                    self._remove(partial, self._leftover)
            try:
                partial.mkdir()
            except FileExistsError:
                raise appeared(partial) from None
            with closing(_locked(partial)) as descriptor:
                try:
                    yield partial
                    if self._look_again() != self._older:
                        raise appeared(final)
                    older = None if self._older is None else self._older[0]
                    take_final_name(partial, final, descriptor, older, replaced_path(final))
                except BaseException:
                    self._discard(descriptor)
                    raise
            sync_folder(final.parent)
            for path in (partial, replaced_path(final)):
                self._remove(path, self._older)

    def _look_again(self) -> tuple[Identity, dict[str, Identity]] | None:
        identity = Identity.of(self._final)
        return None if identity is None else (identity, held_in(self._final))

    def _remove(self, path: Path, known: tuple[Identity, dict[str, Identity]] | None) -> None:
        if known is not None:
            identity, held = known
            last_of_all = sorted(held, key=lambda name: name == self._must_hold)
            remove_known_folder(path, identity, {name: held[name] for name in last_of_all})

    def _discard(self, descriptor: int) -> None:
        """Remove the unfinished folder, unless anything else is in it."""
        with contextlib.suppress(OSError, OutputExistsError):
            if is_same_file(self._partial, descriptor):
                self._remove(self._partial, self._look(self._partial))


def _locked(folder: Path) -> int:
    """Open a folder and lock it until it is closed, so that no other run takes it for that of a killed one.

    Raises:
        LockedError: another run has it.
        OSError: the system refused.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock_open(descriptor, folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
