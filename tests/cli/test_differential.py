"""The same command line, given to safeimg and to qemu-img: same exit code, same stdout, same stderr."""

from __future__ import annotations

from pathlib import Path

import pytest
from twin import qemu_img, safeimg, words

IMAGES = [
    "small.qcow2",
    "packed.qcow2",
    "zstd.qcow2",
    "small.raw",
    "same.qcow2",
    "empty.qcow2",
    "zero.qcow2",
    "tera.qcow2",
    "tiny-clusters.qcow2",
    "lazy.qcow2",
    "metadata.qcow2",
    "falloc.qcow2",
    "full.qcow2",
    "mixed.qcow2",
    "two-data.qcow2",
    "swapped.qcow2",
    "two-packed.qcow2",
    "late.qcow2",
    "ten.raw",
    "odd.raw",
    "junk.bin",
    "x700.raw",
    "x701.raw",
    "nothing.raw",
    "overlay.qcow2",
    "snapshots.qcow2",
    "top.qcow2",
    "on-odd.qcow2",
    "on-missing.qcow2",
    "on-on-missing.qcow2",
    "on-junk.qcow2",
    "on-unknown.qcow2",
    "folder/relative.qcow2",
    "folder/dotted.qcow2",
    "leaking.qcow2",
    "corrupt.qcow2",
    "both.qcow2",
    "corrupt-bit.qcow2",
    "dirty.qcow2",
    "unknown-feature.qcow2",
    "short.qcow2",
    "version.qcow2",
    "huge.qcow2",
    "cluster-bits.qcow2",
    "missing.qcow2",
    "folder",
    "small.vdi",
    "static.vdi",
    "on-vdi.qcow2",
    "count.vdi",
    "twice.vdi",
    "too-far.vdi",
    "version.vdi",
]

COMMANDS = [
    "info", "info --backing-chain --output json", "map", "map --output=json --start-offset=9k", "check",
    "check --output=json -q", "compare small.raw", "compare -s two-data.qcow2", "compare overlay.qcow2",
]  # fmt: skip

LINES = """
(none)
--foo
foo
''
-x
-- info
-T
-U info
info
info --foo
info -Z small.qcow2
info small.qcow2 x
info small.qcow2 -Zq x
info -Zq
info -UZ
info -UZU missing
info small.qcow2 b -Z c
info --backing-chain=x
info small.qcow2 --foo b
info small.qcow2 -U -f
info small.qcow2 -Uf
info small.qcow2 -UZ b
info -
info -- -x
info --output=json small.qcow2
info --backing-chain top.qcow2
info -f raw small.qcow2
info -f qcow2 small.raw
map -s 1M top.qcow2
compare -q empty.qcow2 small.qcow2
compare -s tiny-clusters.qcow2 empty.qcow2
info --output
info --output=xml small.qcow2
info --outp=json --b small.qcow2
info --o small.qcow2
info --out json --b -- small.qcow2
info small.qcow2 -fraw
info -f '' small.qcow2
info -f foo small.qcow2
info foo:bar
info file:small.qcow2
info ./small.qcow2
info 'weird "name" é.qcow2'
info --output=json 'weird "name" é.qcow2'
info --backing-chain loop.qcow2
info loop.qcow2
info -U small.qcow2
info -t none small.qcow2
info --image-opts -f raw small.raw
info --image-opts driver=raw,file.filename=small.raw
info --image-opts driver=qcow2,file.driver=file,file.filename=small.qcow2
info --object foo,id=x small.qcow2
info --object secret,id=x,data=y small.qcow2
check
check --foo
check a b
check -r foo small.qcow2
check -T foo small.qcow2
check -T none small.qcow2
check -U small.qcow2
check -f foo small.qcow2
check -q small.raw
check --output=xml small.qcow2
check small.qcow2 -r
map
map a b
map --m
map --o
map --s
map --start-offset=foo small.qcow2
map --start-offset=-1 small.qcow2
map --start-offset=-0 small.qcow2
map --max-length=1.5k small.qcow2
map --max-length=9E small.qcow2
map --max-length=1.5 small.qcow2
map --max-length=0 small.qcow2
map --max-length=0 --output=json small.qcow2
map --start-offset=1.1k --output=json small.qcow2
map --start-offset=0x1b small.qcow2
map --start-offset=+0x10 small.qcow2
map --start-offset=1.5e3 small.qcow2
map --start-offset=5.b small.qcow2
map --start-offset=' 1' small.qcow2
map --start-offset='1 ' small.qcow2
map --start-offset=0x1k small.qcow2
map --start-offset=2M --output=json small.qcow2
map --start-offset=foo --bar small.qcow2
map --output=xml small.qcow2
map -U small.qcow2
compare
compare a
compare a b c
compare -f foo small.qcow2 same.qcow2
compare -F foo small.qcow2 same.qcow2
compare -T foo small.qcow2 same.qcow2
compare -T none small.qcow2 same.qcow2
compare -f raw small.qcow2 -F raw small.raw
compare --output small.qcow2 same.qcow2
compare -U small.qcow2 same.qcow2
compare -p small.qcow2 same.qcow2
compare -p small.qcow2 ten.raw
compare -p overlay.qcow2 small.qcow2
compare -p overlay.qcow2 snapshots.qcow2
compare -p mixed.qcow2 packed.qcow2
compare -p small.qcow2 on-odd.qcow2
compare -p small.qcow2 short.qcow2
compare -p empty.qcow2 late.qcow2
compare -p -s empty.qcow2 late.qcow2
compare -p -q empty.qcow2 late.qcow2
compare -p missing late.qcow2
compare -p zero.qcow2 nothing.raw
compare -q missing late.qcow2
compare -s small.qcow2 small.qcow2
compare -s metadata.qcow2 mixed.qcow2
compare -s falloc.qcow2 full.qcow2
compare -s two-data.qcow2 two-data.raw
compare -s on-odd.qcow2 odd.raw
compare -f raw -F raw x700.raw x701.raw
compare -f raw -F raw x700.raw x701z.raw
compare -s -f raw -F raw x700.raw x701z.raw
compare -s -f raw -F raw x700.raw x701.raw
compare two-data.qcow2 inflate.qcow2
compare inflate.qcow2 two-data.qcow2
compare --image-opts -f raw a b
compare --image-opts driver=raw,file.filename=small.raw driver=qcow2,file.filename=small.qcow2
commit
commit a b
commit --foo
commit -t foo small.qcow2
commit -r foo small.qcow2
commit -r -1 small.qcow2
commit -f foo small.qcow2
commit -f raw small.qcow2
commit small.qcow2
commit missing
commit -b missing overlay.qcow2
commit -b overlay.qcow2 overlay.qcow2
commit on-missing.qcow2
commit on-junk.qcow2
commit --image-opts -f raw small.raw
convert
convert small.qcow2
convert small.qcow2 -m 0 b
convert small.qcow2 -m 17 b
convert small.qcow2 -m x b
convert -m
convert -S 1 small.qcow2 b
convert -S x small.qcow2 b
convert -S 513 small.qcow2 b
convert -S 4G small.qcow2 b
convert -S -1 small.qcow2 b
convert -r x small.qcow2 b
convert -T foo small.qcow2 b
convert -O foo small.qcow2 b
convert -f foo small.qcow2 b
convert missing b
convert -l snapshot.foo=1 small.qcow2 b
convert -C -S 4k small.qcow2 b
convert -C -c small.qcow2 b
convert -c -O raw small.qcow2 b
convert -B x small.qcow2 b
convert -F raw small.qcow2 b
convert -B ten.raw -O qcow2 small.qcow2 b
convert -n -o size=1 small.qcow2 b
convert -n small.qcow2 missing
convert --bitmaps small.qcow2 b
convert --skip-broken-bitmaps small.qcow2 b
convert --target-is-zero a b
convert --target-image-opts a b
convert --image-opts -f raw a b
convert --salvage -C small.qcow2 b
convert -o foo -O qcow2 small.qcow2 b
convert -o , -O qcow2 small.qcow2 b
convert -O foo -o help
convert -O qcow2 -o help
convert -O qcow2 -o help a b
convert --t
convert --b
convert small.qcow2 small.qcow2
convert -O qcow2 missing1 missing2 b
compare small.vdi on-vdi.qcow2
compare -s small.vdi twice.vdi
compare -f vdi small.raw small.vdi
commit small.vdi
commit on-vdi.qcow2
convert -c -O vdi small.qcow2 b
convert -B small.vdi -F vdi -O vdi small.qcow2 b
convert -O vdi -o backing_file=b small.qcow2 b
convert -O vdi -o preallocation=metadata small.qcow2 b
convert -O qcow2 -o preallocation=foo small.qcow2 b
convert -O vdi -o help a b
convert -n -c -O vdi small.qcow2 static.vdi
convert -n -O vdi ten.raw static.vdi
create -f vdi -o help
create -f vdi -o help b
create -f vdi b
create -f vdi b 1P
create -f vdi b 9223372036854775807
create -f vdi -o size=9E b
create -f vdi -o size=18446744073709551615 b
create -f vdi -o static=x b 1M
create -f vdi -o nocow=on,static=on,extent_size_hint=1M,preallocation=metadata b 1M
create -f vdi -o preallocation=foo b 1M
create -f vdi -b small.vdi -F vdi b
create -f qcow2 -o size=9E b
create -f qcow2 b 9223372036854775807
create -f qcow2 b 9223372036854775296
create -f raw -o size=9E b
create
create b
create --foo
create -f qcow2 b 1M 2M
create -f qcow2 b 1Z 2M
create -f qcow2 -o help
create -f raw -o help
create -f raw -o '?'
create -f raw -o help b
create -f qcow2 -o help b
create -f qcow2 -o help foo:bar
create -f qcow2 -o cluster_size=4k,help b 1M
create -f qcow2 -o preallocation=falloc,,,help b 1M
create -f foo -o help b
create -f foo b 1Z
create --image-opts b 1M
""".strip().splitlines()


def _same(line: list[str], folder: Path) -> None:
    ours, theirs = safeimg(line, folder), qemu_img(line, folder)
    assert ours.stdout == theirs.stdout
    assert ours.stderr.replace(b"safeimg", b"qemu-img") == theirs.stderr
    assert ours.code == theirs.code


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_images(command: str, image: str, images: Path) -> None:
    _same([*words(command), image], images)


@pytest.mark.parametrize("line", LINES)
def test_lines(line: str, images: Path) -> None:
    _same([] if line == "(none)" else words(line), images)
