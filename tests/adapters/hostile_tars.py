"""Tar and tar.gz archives that lead out, link, lie, hide, explode or break off."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterable, Mapping

from tests.adapters.factories import tar
from tests.adapters.hostile import CANARY, CONFIG, LIMITS, TRAVERSALS, WEIGHTS, Cases, archive, family, good

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
DAMAGED = ("bad_archive", "unsafe_archive")


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """A header and its content; `fields` overwrite what tarfile would write."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + padded(content)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def with_field(block: bytes, start: int, value: bytes) -> bytes:
    """The header with other bytes in one field, and a checksum that fits them."""
    changed = bytearray(block)
    changed[start : start + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:BLOCK])
    return bytes(changed)


def pax(records: Mapping[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode(errors="surrogateescape")
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        lines += str(length).encode() + body
    return member("pax", lines, kind)


def files() -> bytes:
    return b"".join(member(name, content) for name, content in good().items())


def zeros_gzipped(count: int, head: bytes = b"") -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(head)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    return b"".join([*parts, packer.flush()])


@family("unsafe_archive")
def names_in_tars() -> Cases:
    for number, name in enumerate(TRAVERSALS):
        content = tar({**good(), name: b"evil"}, ("w", "w:gz")[number % 2])
        yield repr(name)[:60], archive(("a.tar", "a.tar.gz")[number % 2], content)


@family("unsafe_archive")
def long_names_of_tars() -> Cases:
    """The name in the header is honest; the one in the record before it is not."""
    for name in (*TRAVERSALS[:8], "../" * 60 + "README.md"):
        yield f"pax {name[:40]!r}", archive("a.tar", files() + pax({"path": name}) + member("README.md", b"x") + END)
        long_name = member("././@LongLink", name.encode() + b"\0", tarfile.GNUTYPE_LONGNAME)
        yield f"gnu {name[:40]!r}", archive("a.tar", files() + long_name + member("README.md", b"x") + END)
    everywhere = pax({"path": "../README.md"}, tarfile.XGLTYPE)
    yield "global pax", archive("a.tar", everywhere + files() + END)
    yield "pax NUL", archive("a.tar", files() + pax({"path": "README.md\0.txt"}) + member("README.md") + END)


@family("unsafe_archive")
def links_and_devices() -> Cases:
    kinds = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "character device": tarfile.CHRTYPE}
    kinds |= {"block device": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE, "unknown": b"Z", "volume header": b"V"}
    for label, kind in kinds.items():
        for name in (CONFIG, "unrelated"):
            rest = b"".join(member(key, value) for key, value in good().items() if key != name)
            link = member(name, kind=kind, linkname="/etc/passwd")
            yield f"{label} {name}", archive("a.tar", rest + link + END)
    through = member("out", kind=tarfile.SYMTYPE, linkname="/tmp")
    yield "a file through a link", archive("a.tar", through + member(f"out/{CANARY.name}", b"x") + files() + END)
    onto = member(CONFIG, kind=tarfile.SYMTYPE, linkname=str(CANARY))
    yield "a file onto a link", archive("a.tar", onto + files() + END)
    linked = pax({"linkpath": "/etc/passwd"}) + member(CONFIG, kind=tarfile.LNKTYPE, linkname="x")
    yield "a pax link", archive("a.tar", linked + END)


@family(*DAMAGED)
def sparse_files() -> Cases:
    yield "old GNU", archive("a.tar", files() + member("README.md", b"x", tarfile.GNUTYPE_SPARSE) + END)
    maps = {"0.0": {"GNU.sparse.size": "99", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0"}}
    maps["0.1"] = {"GNU.sparse.map": "0,1,1099511627776,1", "GNU.sparse.size": "1099511627777"}
    maps["1.0"] = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}
    for version, records in maps.items():
        yield f"pax {version}", archive("a.tar", files() + pax(records) + member("README.md", b"1\n0\n1\n") + END)


@family("unsafe_archive")
def names_that_collide_in_tars() -> Cases:
    for name in (CONFIG, WEIGHTS, f"./{CONFIG}", "Adapter_Config.JSON", "ｗ.txt", "w.txt"):
        yield name, archive("a.tar", files() + member("W.TXT") + member(name, b"{}") + END)
    folder = member(CONFIG, kind=tarfile.DIRTYPE)
    yield "a directory of a file's name", archive("a.tar", folder + files() + END)


@family(*DAMAGED)
def cut_off_tars() -> Cases:
    """At every header, content and padding: before, in the middle, behind."""
    whole, place = files(), 0
    for name, content in good().items():
        for label, at in {"header": 0, "in header": 99, "content": BLOCK, "in content": BLOCK + 9}.items():
            yield f"{label} of {name}", archive("a.tar", whole[: place + at])
        place += BLOCK + len(padded(content))
    for label, end in {"no end": b"", "half an end": bytes(99)}.items():
        yield label, archive("a.tar", whole + end)
    packed = gzip.compress(whole + END, mtime=0)
    for at in (
        0,
        1,
        5,
        9,
        10,
        11,
        len(packed) // 2,
        len(packed) - 9,
        len(packed) - 8,
        len(packed) - 4,
        len(packed) - 1,
    ):
        yield f"gzip at {at}", archive("a.tar.gz", packed[:at])
        yield f"gzip of {at}", archive("a.tgz", gzip.compress((whole + END)[: at % len(whole)], mtime=0))


@family(*DAMAGED, "upload_too_large", "missing_file")
def tar_headers_that_lie() -> Cases:
    content = b"x" * 700
    head, body = member("README.md", content)[:BLOCK], padded(content)
    sizes = {"negative": b"\xff" * 12, "negative by 1024": b"\xff" * 10 + b"\xfc\x00", "no number": b"garbage\0"}
    sizes |= {"8 EB": b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, "8 GB": b"77777777777\0", "spaces": b" " * 12}
    sizes |= {"too small": b"00000000001\0", "too large": b"00000007777\0", "2^88": b"\x80" + b"\xff" * 11}
    for label, size in sizes.items():
        yield f"size {label}", archive("a.tar", files() + with_field(head, 124, size) + body + END)
        yield f"first size {label}", archive("a.tar", with_field(head, 124, size) + body + files() + END)
    for number, at in enumerate((0, 100, 148, 156, 257, 300)):
        broken = bytearray(files() + END)
        broken[at] ^= 0x55
        yield f"first header, byte {at}", archive("a.tar", bytes(broken))
        broken = bytearray(files() + member("tokenizer.json", b"{}") + END)
        broken[len(files()) + at] ^= 0x55
        yield f"last header, byte {at}", archive(("a.tar", "a.tgz")[number % 2], _packed(bytes(broken), number % 2))


def _packed(content: bytes, gzipped: int) -> bytes:
    return gzip.compress(content, mtime=0) if gzipped else content


@family(*DAMAGED, "upload_too_large", "missing_file")
def pax_headers_that_lie() -> Cases:
    claims = {"8 GB": 8 << 30, "16 KB": (16 << 10) + 1}
    for label, size in claims.items():
        for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            head = member("pax", kind=kind, size=size)
            yield f"{kind!r} claims {label}", archive("a.tgz", zeros_gzipped(24 << 20, head))
    records = {"length 0": b"0 path=x\n", "length beyond": b"99 path=x\n", "huge": b"9" * 400 + b" path=x\n"}
    for label, record in records.items():
        yield label, archive("a.tar", member("pax", record, tarfile.XHDTYPE) + files() + END)
    for words in ("-1", "-99999", "99999999999999999999", "x", "1e3"):
        lying = pax({"size": words}) + member("README.md", b"x" * 99)
        yield f"pax size {words}", archive("a.tar", lying + files() + END)
    chain = member("pax", b"13 comment=x\n", tarfile.XHDTYPE) * 3000
    yield "3,000 in a row", archive("a.tar", chain + files() + END)
    yield "nothing behind it", archive("a.tar", files() + pax({"path": "x"}) + END)


@family("bad_archive", "unsafe_archive", "upload_too_large")
def gzips_that_lie() -> Cases:
    whole = files() + END
    packed = gzip.compress(whole, mtime=0)
    yield "checksum", archive("a.tgz", packed[:-8] + bytes(4) + packed[-4:])
    yield "size", archive("a.tgz", packed[:-4] + bytes(4))
    yield "garbage behind", archive("a.tgz", packed + b"garbage")
    yield "one byte behind", archive("a.tgz", packed + b"\x1f")
    yield "another tar behind", archive("a.tgz", packed + packed)
    yield "reserved flags", archive("a.tgz", packed[:3] + b"\xe0" + packed[4:])
    yield "another method", archive("a.tgz", packed[:2] + b"\x07" + packed[3:])
    yield "endless name", archive("a.tgz", packed[:3] + b"\x08" + packed[4:10] + b"a" * (2 << 20))
    yield "endless extra field", archive("a.tgz", packed[:3] + b"\x04" + packed[4:10] + b"\xff\xff" + b"a" * 999)
    yield "70,000 empty members", archive("a.tgz", gzip.compress(b"") * 70_000)
    yield "not even gzip", archive("a.tgz", whole)
    yield "gzip called tar", archive("a.tar", packed)
    yield "gzip in gzip", archive("a.tgz", gzip.compress(packed))
    yield "raw deflate", archive("a.tgz", zlib.compress(whole))
    yield "half of it in another member", archive("a.tgz", packed[: len(packed) // 2] + gzip.compress(whole[700:]))


@family("upload_too_large")
def tar_bombs() -> Cases:
    size = LIMITS.max_bytes * 3
    for label, name in {"kept": "README.md", "weights": WEIGHTS, "ignored": "junk.dat"}.items():
        yield label, archive("a.tgz", zeros_gzipped(size, member(name, size=size)))
    yield "behind the end", archive("a.tgz", zeros_gzipped(size, files()))
    small = [member(name, bytes(1 << 20)) for name in ("README.md", "merges.txt", "tokenizer.model", WEIGHTS)]
    small += [member(f"{number}.dat", bytes(1 << 20)) for number in range(8)]
    yield "in pieces", archive("a.tgz", gzip.compress(b"".join(small), 1))
    yield "10,000 files", archive("a.tgz", _many(member(f"{number}.txt") for number in range(10_000)))
    folders = (member(f"d{number}", kind=tarfile.DIRTYPE) for number in range(10_000))
    yield "10,000 directories", archive("a.tgz", _many(folders))


def _many(members: Iterable[bytes]) -> bytes:
    return gzip.compress(b"".join(members) + files() + END, 1)


@family("missing_file", "bad_archive", "unsafe_archive", "nesting")
def archives_in_archives() -> Cases:
    inner = tar(good(), "w")
    yield "tar in tar", archive("a.tar", member("adapter.tar", inner) + END)
    yield "tar in tar in gzip", archive("a.tgz", gzip.compress(member("b.tar", member("c.tar", inner) + END) + END))
    yield "gzip in tar", archive("a.tar", member("adapter.tar.gz", gzip.compress(inner)) + END)
    yield "tar as weights", archive("a.tar", member(WEIGHTS, inner) + END)
    for place in ("a/b/", "a/b/c/", "./a/./b/"):
        yield f"in {place}", archive("a.tar", tar({place + name: content for name, content in good().items()}, "w"))
    two = {**{f"a/{name}": content for name, content in good().items()}, "b/README.md": b""}
    yield "two directories", archive("a.tar", tar(two, "w"))
    yield "root and directory", archive("a.tar", tar({**good(), "b/README.md": b""}, "w"))


@family("missing_file", "bad_archive")
def tars_of_nothing() -> Cases:
    for name in ("a.tar", "a.tgz"):
        gzipped = int(name == "a.tgz")
        for label, content in {
            "empty": b"",
            "only an end": END,
            "a folder": member("x", kind=tarfile.DIRTYPE) + END,
        }.items():
            yield f"{label} {name}", archive(name, _packed(content, gzipped))
        yield f"no bytes {name}", archive(name, b"")
        yield f"only strangers {name}", archive(name, _packed(member("notes.txt", b"x") + END, gzipped))
        yield f"end first {name}", archive(name, _packed(END * 20, gzipped))


@family("unsafe_archive", "bad_archive")
def things_beside_a_tar() -> Cases:
    whole = files() + END
    hidden = member(CONFIG, b"{}") + END
    yield "a second tar", archive("a.tar", whole + hidden)
    yield "a zip behind", archive("a.tar", whole + b"PK\x05\x06" + bytes(18))
    yield "a zip in front", archive("a.tar", b"PK\x05\x06" + bytes(18) + whole)
    yield "an ELF in front", archive("a.tar", b"\x7fELF" + bytes(508) + whole)
    yield "one byte behind much padding", archive("a.tar", whole + bytes(64 * BLOCK) + b"x")
    yield "one byte in the padding", archive("a.tar", files() + bytes(BLOCK) + b"x" * BLOCK + END)
    yield "gzipped, a second tar", archive("a.tgz", gzip.compress(whole + hidden))
