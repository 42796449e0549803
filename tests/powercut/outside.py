"""Operations on encrypted images and on images with external data files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powercut import guest, straight
from powercut.judge import STEP_BYTES, Scenario, environment
from powercut.scenarios import BASE_AND_TOP, KIB, NEW_QCOW2, _base_pieces, convert_to, data, overlay_pieces
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.amend import amend
from safeimg.ops.commit_job import commit
from safeimg.ops.launch import Environment
from safeimg.ops.resize import resize

AES = {"encrypt_format": "aes", "encrypt_key_secret": "s0"}
LUKS = {
    "encrypt_format": "luks", "encrypt_key_secret": "s0", "encrypt_cipher-alg": "aes-128",
    "encrypt_cipher-mode": "cbc", "encrypt_iter-time": "0",
}  # fmt: skip


def _chain(size: int = 256 * KIB, **options: str) -> Callable[[SimulatedFileSystem], None]:
    """A plain overlay of a base made with the options."""

    def build(fs: SimulatedFileSystem) -> None:
        guest.create(fs, "/base.qcow2", "qcow2", size, cluster_size="4096", **options)
        guest.write(fs, "/base.qcow2", [piece for piece in _base_pieces(4096) if piece[0] + 4096 <= size])
        guest.create(
            fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="4096", backing_file="base.qcow2", backing_fmt="qcow2"
        )
        guest.write(fs, "/top.qcow2", overlay_pieces(4096))

    return build


def _commit(key: dict[str, str]) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await commit(env, guest.named("/top.qcow2", key), step_bytes=STEP_BYTES)

    return run


def _existing(**options: str) -> Callable[[SimulatedFileSystem], None]:
    def build(fs: SimulatedFileSystem) -> None:
        _chain()(fs)
        guest.create(fs, "/target.qcow2", "qcow2", 256 * KIB, cluster_size="4096", **options)
        guest.write(
            fs, "/target.qcow2", [(0, data(41, 20 * KIB)), (52 * KIB, None), (100 * KIB, data(42, 9 * KIB))]
        )

    return build


def _keys(fs: SimulatedFileSystem) -> None:
    """The password of the scenarios is in two slots, so that one may go."""
    guest.create(fs, "/disk.qcow2", "qcow2", 64 * KIB, cluster_size="4096", **LUKS)
    guest.write(fs, "/disk.qcow2", [(0, data(51, 9 * KIB))])
    straight.run(_amend("encrypt.state=active,encrypt.new-secret=s0,encrypt.iter-time=0"), environment(fs))


def _amend(words: str) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await amend(env, guest.named("/disk.qcow2", {"encrypt.key-secret": "s0"}), [words])

    return run


async def _shrink(env: Environment) -> None:
    await resize(env, "/target.qcow2", lambda _: 106 * KIB, shrink=True, step_bytes=STEP_BYTES)


BACKING_KEY = {"backing.encrypt.key-secret": "s0"}
DATA = {"data_file": "/data.bin"}
RAW = {**DATA, "data_file_raw": "on"}
RAW_FILE = (("/data.bin", "raw"),)

OUTSIDE = [
    Scenario(
        "commit into AES", _chain(**AES), _commit(BACKING_KEY), "/base.qcow2", "/top.qcow2", BASE_AND_TOP
    ),
    Scenario(
        "commit into LUKS", _chain(**LUKS), _commit(BACKING_KEY), "/base.qcow2", "/top.qcow2", BASE_AND_TOP
    ),
    Scenario(
        "convert -n --undo into AES", _existing(**AES),
        convert_to("/top.qcow2", guest.named("/target.qcow2", {"encrypt.key-secret": "s0"}), "qcow2", create=False,
                 undo=True),
        "/target.qcow2", None, NEW_QCOW2,
    ),
    Scenario(
        "convert to AES", _chain(),
        convert_to("/top.qcow2", "/target.qcow2", "qcow2", create_options={
            "encrypt.format": "aes", "encrypt.key-secret": "s0", "cluster_size": "4096"}),
        "/target.qcow2", None, NEW_QCOW2, created=True,
    ),
    *(
        Scenario(f"amend {name}", _keys, _amend(words), "/disk.qcow2", "/disk.qcow2", (("/disk.qcow2", "qcow2"),))
        for name, words in (
            ("a password more", "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=0"),
            ("a password less", "encrypt.state=inactive,encrypt.keyslot=0"),
        )
    ),
    Scenario(
        "commit into a data file", _chain(200 * KIB, **DATA), _commit({}), "/base.qcow2", "/top.qcow2", BASE_AND_TOP
    ),
    Scenario(
        "commit into a raw data file", _chain(200 * KIB, **RAW), _commit({}), "/base.qcow2", "/top.qcow2",
        (*BASE_AND_TOP, *RAW_FILE),
    ),
    Scenario(
        "convert -n --undo into a data file", _existing(**DATA),
        convert_to("/top.qcow2", "/target.qcow2", "qcow2", create=False, undo=True), "/target.qcow2", None, NEW_QCOW2,
    ),
    Scenario(
        "convert to a data file", _chain(),
        convert_to("/top.qcow2", "/target.qcow2", "qcow2", create_options={**DATA, "cluster_size": "4096"}),
        "/target.qcow2", None, (*NEW_QCOW2, *RAW_FILE), created=True,
    ),
    *(
        Scenario(
            f"resize --shrink, {kind}data file", _existing(**options), _shrink, "/target.qcow2", None,
            (("/target.qcow2", "qcow2"), *files),
        )
        for kind, options, files in (("", DATA, ()), ("raw ", RAW, RAW_FILE))
    ),
]  # fmt: skip
