"""A slice of the differential soak; `make differential` does it at length."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
from differential import soak
from differential.judge import Bench
from differential.lines import Generator, Line
from twin import qemu_img, qemu_io

# What the soak has found once.
FOUND = (
    "convert -t foo --bitmaps wide.qcow2 nowhere/new.img",
    "convert -t foo -O qcow2 -o cluster_size=7 wide.qcow2 new.qcow2",
    "convert --target-is-zero -o refcount_bits=7,help",
    "convert -n -o help plain.qcow2 new.raw",
    "convert --bitmaps bitmaps.qcow2 nowhere/new.img",
    "create -f qcow2 -b empty.qcow2 -F qcow2 new.qcow2 ; convert -n --target-is-zero -O qcow2 disk.raw new.qcow2",
    "convert -n --target-is-zero -B x -O qcow2 disk.raw missing",
    "convert --salvage top.qcow2 nowhere/new.img",
    "convert --salvage top.qcow2 new.raw",
    "convert -O qcow2 -B disk.raw -F foo plain.qcow2 new.qcow2",
    "create -f qcow2 -o refcount_bits=7,compat=foo nowhere/new.img 1M",
    "create -f qcow2 -o data_file=new.data,preallocation=full,cluster_size=7 new.qcow2 1M",
    "create -f vdi -o preallocation=metadata nowhere/new.img 1M",
    "create -f raw -o preallocation=foo nowhere/new.img 1M",
    "rebase -b plain.qcow2 -F qcow2 outraw.qcow2",
    "rebase -u -b missing -F raw outraw.qcow2",
    "rebase -u junk.raw",
    "rebase -f vdi -b plain.qcow2 -F '' mid.qcow2",
    "rebase -b '' -F '' junk.raw",
    "check -r leaks odd.raw",
    "check -r all junk.raw",
    "dd skip=100000 if=plain.qcow2 of=nowhere/new.img",
    "dd skip=100000 -O qcow2 if=plain.qcow2 of=new.qcow2",
    "amend -o refcount_bits=16,foo=bar -p top.qcow2",
    "amend -o compat=foo -p top.qcow2",
    "amend -o compression_type=zstd,lazy_refcounts=x zstd.qcow2",
    "measure -O qcow2 -o compat=v3 --size 512",
    "amend -o preallocation=full,encrypt.state=inactive zstd.qcow2",
    "amend --image-opts -o size=2M driver=file,filename=old.qcow2",
    "check -f luks plain.qcow2",
    "commit -p -f vdi plain.qcow2",
    "commit -p -b nope mid.qcow2",
    "commit -b plain.qcow2 named.qcow2",
    "commit -b plain.qcow2 disk.raw",
    "convert ./lost-data.qcow2 new.raw",
    "dd if=plain.qcow2 of=new.raw bs=99999999999999999999",
    "dd -O foo if=missing.qcow2 of=new.raw",
    "rebase --image-opts -b plain.qcow2 driver=qcow2,backing.driver=raw,file.filename=mid.qcow2",
    "rebase --image-opts -u driver=qcow2,backing.driver=raw,file.filename=mid.qcow2",
    "resize zstd.qcow2 1e",
    "resize --shrink outside.qcow2 512k",
    "resize --shrink outraw.qcow2 300k",
    "amend -o size=0 plain.qcow2",
    "amend --image-opts -o compat=1.1 driver=qcow2,file.filename=dirty.qcow2,lazy-refcounts=x",
    "dd -U if=mid.qcow2 of=mid.qcow2",
    "dd if=disk.raw of=disk.raw",
    "snapshot -a first snaps-astray.qcow2",
    "amend -o ?,refcount_bits=8 dirty.qcow2",
    "rebase -b dirty.qcow2 named.qcow2 ; check named.qcow2",
    "map --start-offset 1m --max-length 9223372036854775807 sized.qcow2",
    "measure -O qcow2 -o preallocation=foo,compat=2 odd.raw",
    "measure -O qcow2 -o preallocation=foo,refcount_bits=7 odd.raw",
    "measure -O qcow2 -o extended_l2=on,cluster_size=4k,compat=2 odd.raw",
    "amend -o encrypt.state=inactive -p corrupt-bit.qcow2",
    "amend -p -o compat=v2 --image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on",
    "amend -p -o compat=v2 disk.raw",
    "resize --shrink snaps-astray.qcow2 -700k",
    "bench -c 10 -w -f qcow2 dirty.qcow2",
    "commit -f qcow2 mid.qcow2 ; map -f raw mid.qcow2",
    "info --output json --image-opts --object secret,id=sec0,data=abc "
    "driver=qcow2,file.filename=luks-top.qcow2,encrypt.key-secret=sec0",
    "bench -c 1 -n -i threads named.qcow2",
    "resize -f luks driver=qcow2,file.filename=plain.qcow2,read-only=on --image-opts 2M",
    "resize --image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on 2M",
    "resize --image-opts driver=vdi,file.filename=plain.qcow2,read-only=on 2M",
    "rebase -u -b x -F raw --image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on",
    "create -f qcow2 -o data_file=new.data,data_file_raw=on new.qcow2 0.5k",
    "create -f qcow2 -o data_file=new.data,preallocation=metadata new.qcow2 100k",
    "create -f qcow2 -o data_file=new.data,preallocation=full new.qcow2 100k",
    "amend -o data_file=x,size=2M outside.qcow2",
    "amend -o data_file=x,size=512k outraw.qcow2",
    """amend -o size=2M 'json:{"driver":"file","filename":"plain.qcow2"}'""",
    "amend --image-opts -o compat=0.10 driver=qcow2,backing.driver=raw,file.filename=mid.qcow2",
    "snapshot --image-opts -c x driver=qcow2,backing.driver=raw,file.filename=mid.qcow2",
    "check -r all --image-opts driver=qcow2,backing.driver=raw,file.filename=mid.qcow2",
    "check -U -r all missing.qcow2",
    "snapshot -U -c x foo:plain.qcow2",
    "bench -n foo:plain.qcow2",
    "bench -n -w junk.raw",
    "bench -i native missing.qcow2",
    f"bitmap --merge b1 {'y' * 300} b0",
    f"create -f qcow2 {'y' * 250} 1M ; snapshot -c x {'y' * 250}",
    """check 'json:{"driver":"qcow2","file.filename":"mid.qcow2","backing":""}'""",
    """rebase -b small.qcow2 -F qcow2 'json:{"driver":"qcow2","file.filename":"mid.qcow2","backing":null}'""",
    "rebase --image-opts -b plain.qcow2 driver=qcow2,file.filename=long.qcow2,backing.file.filename=small.qcow2",
    "map --object secret,id=s --start-offset 1e6",
    "resize -f raw --preallocation falloc disk.raw 1e",
    "convert -c -C -n -o data_file=plain.qcow2 plain.qcow2 new.qcow2",
    "dd --image-opts if=driver=raw,file.filename=disk.raw of=new.qcow2 bs=700k skip=1k",
    "info --image-opts driver=qcow2,file.filename=disk.vdi,lazy-refcounts=x",
    "map null-co:// ; convert -O qcow2 null-co:// new.qcow2 ; map new.qcow2",
    "amend -o refcount_bits=32,data_file=x,size=2M corrupt-bit.qcow2",
    "rebase -b '' on-narrow.qcow2 ; map on-narrow.qcow2",
    "rebase -b small.qcow2 -F qcow2 mid.qcow2 ; map mid.qcow2",
    "commit --image-opts file.filename=junk.raw,foo=1",
    "resize . 1M",
    "measure --image-opts -l 1 driver=file,filename=disk.vdi",
    "measure --output xml -o ,x --size 1",
    "create -f raw new.raw 0x1p3",
    "convert --image-opts driver=raw,file.filename=disk.raw driver=raw,file.filename=missing,nobar new.raw",
    "measure --foo plain.qcow2",
    "bench zero.qcow2",
    "measure -f",
    "rebase -b plain.qcow2 -F qcow2 top.qcow2 ; measure -O qcow2 top.qcow2 ; map --output json top.qcow2",
    "resize --shrink twice.qcow2 512",
    "measure --output json --size 9223372036854775807",
    "check --image-opts driver=qcow2,file.filename=luks-top.qcow2,encrypt.key-secret=sec0",
    "snapshot --image-opts -U -c x driver=qcow2,file.filename=sized.qcow2,read-only=on",
    "rebase -f raw -b static.vdi mid.qcow2",
    "amend --object secret,id=sec0,data=abc --image-opts -o help "
    "driver=qcow2,file.filename=aes.qcow2,encrypt.key-secret=sec0",
    "amend -f file -o help",
    "amend -o compression_type=zlib corrupt-bit.qcow2",
    "amend -o foo dirty.qcow2",
    "amend -o foo=bar --image-opts driver=qcow2,file.filename=odd-size.qcow2,read-only=on",
    "snapshot -U -a x --image-opts driver=qcow2,file=x",
    """bench -w -n 'json:{"driver":"qcow2","file":{"driver":"file","filename":"zstd.qcow2"},"read-only":true}'""",
    """info 'json:{"driver":"qcow2","file.filename":"missing","discard":"x"}'""",
    """info 'json:{"driver":"qcow2","file.filename":"plain.qcow2","node-name":"1","discard":"x"}'""",
    "convert -c -n -O qcow2 plain.qcow2 meta.qcow2",
    "amend -o compat=0.10 snaps-astray.qcow2 ; check snaps-astray.qcow2",
    "convert -Oqcow2 -ocluster_size=4096,, -ocluster_size=0 top.qcow2 small.qcow2",
    "convert -O qcow2 -o cluster_size=0x1k top.qcow2 small.qcow2",
    "amend -o '?' -p all.qcow2",
    "rebase -u -b on-raw.qcow2 -F qcow2 on-raw.qcow2 ; commit on-raw.qcow2",
    """check -r leaks 'json:{"driver":"qcow2","file.filename":"version.qcow2","force-share":true}'""",
    "check -r leaks version.qcow2",
    "bench -s 0 zero.qcow2",
    "rebase -U -b mid.qcow2 mid.qcow2",
    "rebase -U -b mid.qcow2 -F qcow2 mid.qcow2",
    "convert -O qcow2 -B snaps-astray.qcow2 -F qcow2 on-short.qcow2 new.qcow2",
    "resize -f vmdk2 foo:on-vdi.qcow2 0.5k",
    "info -f vmdk2 'json:{'",
    "commit --image-opts -t foo driver=qcow2,file.filename=long.qcow2,backing=",
    "check --image-opts -T foo driver=qcow2,file.filename=long.qcow2,backing=",
    "rebase -u --image-opts -t foo -b '' driver=qcow2,file.filename=long.qcow2,backing=",
    "commit --image-opts -f qcow2 -t foo driver=qcow2,file.filename=long.qcow2",
    "snapshot -d first snaps-astray.qcow2",
    "bench -n host_device:long.qcow2",
    "bench -n host_device:missing",
    "bench -n -t none host_device:long.qcow2",
    "resize broken-bitmaps.qcow2 1e",
    "resize bitmaps.qcow2 1e",
    "convert -O qcow2 -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=sec0,data_file=plain.qcow2 "
    "--object secret,id=sec0,data=abc top.qcow2 new.raw",
    "amend -o compat=0.10,size=2M,compat=1.1,size=2M old-state.qcow2",
    "snapshot -a2 -dx -f",
    "snapshot -l -l plain.qcow2",
    "convert -l first snaps-astray.qcow2 new.raw",
    "amend -ocompat=0.10,size=2M broken-bitmaps.qcow2",
    "amend -ocompat=0.10,size=2M bitmaps.qcow2",
    "amend -ocompat=0.10,size=900k snaps.qcow2",
    "create -f qcow2 -o cluster_size=2M,extended_l2=on,data_file=new.data,data_file_raw=on new.qcow2 700000",
    """convert -O qcow2 -F luks -B 'json:{"driver":"qcow2","file.filename":"outside.qcow2"}' top.qcow2 new.raw""",
    "convert -O qcow2 -F luks -B disk.luks top.qcow2 new.raw",
    "resize outraw.qcow2 +1k",
    "snapshot --image-opts -U driver=qcow2",
    """compare -f foo 'json:{"driver":"raw","file":"tiny.raw"}' mid.qcow2""",
    "rebase -b empty.qcow2 top.qcow2 ; check --output json top.qcow2",
    """create -f qcow2 -F qcow2 -b 'json:{"driver":"qcow2","file.filename":"top.qcow2","backing":""}' new.qcow2""",
    "bitmap --merge nope -b bitmaps.qcow2 -F luks bitmaps.qcow2 ''",
    "convert -O qcow2 -B ./lost-data.qcow2 -F qcow2 disk.raw cut.qcow2",
    "rebase -b static.vdi on-raw.qcow2 ; map on-raw.qcow2",
    "bitmap --image-opts --add driver=file,filename=bitmaps.qcow2 b0",
    "amend --object secret,id=sec0,data=abc --image-opts -o data_file=x,encrypt.state=inactive,encrypt.keyslot=0 "
    "driver=qcow2,file.filename=luks.qcow2,encrypt.key-secret=sec0",
    "amend --object secret,id=sec0,data=abc --image-opts -o refcount_bits=7,encrypt.state=inactive,encrypt.keyslot=0 "
    "driver=qcow2,file.filename=luks.qcow2,encrypt.key-secret=sec0",
    """bitmap --merge b1 'json:{"driver":"qcow2","file.filename":"bitmaps.qcow2"} x' b1""",
    "bitmap --enable foo:all.qcow2 new",
    "dd -O luks if=odd.raw of=odd.raw",
    "convert -O luks odd.raw odd.raw",
    "convert named.qcow2 named.qcow2 -n -O luks",
    "resize --image-opts driver=qcow2,file.filename=dirty.qcow2,foo=bar 512",
    "amend -o size=1M --image-opts driver=qcow2,file.filename=dirty.qcow2,foo=bar",
    "bitmap --add --image-opts driver=qcow2,file.filename=dirty.qcow2,foo=bar b",
    "check --image-opts -r leaks driver=qcow2,file.filename=corrupt-bit.qcow2,foo=bar",
    "check --image-opts -r all driver=qcow2,file.filename=dirty.qcow2,foo=bar",
)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_generated_lines_have_the_same_outcome(bench: Bench, seed: int) -> None:
    assert not soak.run(bench, lines=25, seed=seed, chosen=soak.known(), shrink=False)


@pytest.mark.parametrize("case", FOUND)
def test_what_differed_once(bench: Bench, case: str) -> None:
    assert not bench.difference([Line.parse(line) for line in case.split(" ; ")])


def test_the_same_seed_makes_the_same_lines() -> None:
    one, two = (list(soak.cases(7, 40, soak.known())) for _ in range(2))
    assert one == two
    assert one != list(soak.cases(8, 40, soak.known()))


def test_a_line_can_be_written_down_and_read_again() -> None:
    generator = Generator(Random(1))
    for _ in range(50):
        line = generator.line()
        assert Line.parse(str(line)).words == line.words


def test_the_judge_bites(tmp_path: Path) -> None:
    """What qemu-img has made in both folders is the same; then one thing is changed in the second."""
    bench = Bench(tmp_path)
    line = Line.parse("create -q -f qcow2 new.qcow2 1M")

    def made() -> Path:
        for side in bench.sides:
            shutil.rmtree(side, ignore_errors=True)
            side.mkdir()
            assert qemu_img(line.words, side).code == 0
        return bench.sides[1]

    made()
    assert bench.files() == ""
    (made() / "more").touch()
    assert bench.files().startswith("files: ")
    (made() / "new.qcow2").chmod(0o600)
    assert "mode" in bench.files()
    qemu_io(made(), "-c", "write -P 1 0 64k", "new.qcow2")
    assert "Content mismatch" in bench.files()
    qemu_img(["resize", "new.qcow2", "2M"], made())
    assert "virtual-size" in bench.files()
    with (made() / "new.qcow2").open("r+b") as file:
        file.seek(2 * 65536 + 2 * 3)
        file.write(b"\0\0")  # a cluster in use without a reference
    assert '"corruptions": 1' in bench.files() or "'corruptions': 1" in bench.files()


def test_an_outcome_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    monkeypatch.setattr("differential.judge.safeimg", lambda *_, **__: qemu_img(["--version"], tmp_path))
    case = [Line.parse("info -f raw disk.raw"), Line.parse("info --output json --backing-chain mid.qcow2")]
    assert "stdout: qemu-img" in bench.difference(case)
    assert [str(line) for line in bench.shrunk(case)] == ["info"]
