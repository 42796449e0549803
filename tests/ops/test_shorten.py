"""The last change of a rollback: which files are cut, and which are let alone because their times are on record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from safeimg.recovery.takeback import shorten


class Cut:
    """A file of which only the length counts."""

    path = "disk"

    def __init__(self, length: int) -> None:
        self.lengths = [length]

    def length(self) -> int:
        return self.lengths[-1]

    def truncate(self, length: int) -> None:
        self.lengths.append(length)

    def sync(self) -> None:
        pass


@pytest.mark.parametrize(
    ("length", "longest", "observed", "lengths"),
    [
        (900, 900, False, [900, 500]),
        (500, 900, False, [500, 501, 500]),  # the cut of an earlier rollback may not have reached the disk
        (500, 900, True, [500]),  # nobody wrote to it since it was looked at
        (500, 0, False, [500]),
        (400, 900, False, [400]),
    ],
)
def test_which_files_are_cut(length: int, longest: int, observed: bool, lengths: list[int]) -> None:
    file: Any = Cut(length)
    session: Any = SimpleNamespace(
        state=SimpleNamespace(
            started=SimpleNamespace(lengths=(500,)), declared=SimpleNamespace(images=[SimpleNamespace(writes=True)]),
            longest={0: longest}, observed={0} if observed else set(),
        )
    )  # fmt: skip
    assert not shorten(session, {0: file}, lambda image, length: None)
    assert file.lengths == lengths
