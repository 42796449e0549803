"""Making external data files (spec: docs/interop/qcow2, "External data file bit")."""

from __future__ import annotations

import os
from collections.abc import Mapping

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.options import bool_option
from safeimg.drivers.formats.qcow2.extensions import EXT_DATA_FILE, Extension


def data_file_extension(path: str, options: Mapping[str, str], version: int) -> tuple[Extension, ...]:
    """The header extension that names the data file which create's options ask for; none without one. `UsageError`."""
    name = options.get("data_file")
    if name is None:
        if bool_option(path, options, "data_file_raw"):
            raise UsageError(f"{path}: data-file-raw requires data-file")
        return ()
    if version < 3:
        raise UsageError(
            f"{path}: External data files are only supported with compatibility level 1.1 and above (use version=v3 "
            "or greater)"
        )
    return (Extension(EXT_DATA_FILE, os.fsencode(name)),)
