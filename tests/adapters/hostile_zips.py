"""Zip archives that lead out, link, lie, hide, explode or break off."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.adapters.factories import tar
from tests.adapters.hostile import CONFIG, LIMITS, TRAVERSALS, WEIGHTS, Cases, Sent, archive, family, good

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
DAMAGED = ("bad_archive", "unsafe_archive")


@dataclass
class Entry:
    """One member as its two headers tell of it; each may lie."""

    name: bytes
    packed: bytes
    method: int = DEFLATED
    crc: int = 0
    size: int = 0
    flags: int = 0
    attributes: int = 0
    extra: bytes = b""
    packed_size: int | None = None
    local: bytes | None = None
    """Instead of the local header."""
    place: int | None = None
    """Where the directory says that it lies."""

    @classmethod
    def of(cls, name: str, content: bytes, **changes: object) -> Entry:
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(content) + packer.flush()
        entry = cls(name.encode(), packed, crc=zlib.crc32(content), size=len(content))
        for field, value in changes.items():
            setattr(entry, field, value)
        return entry

    def fields(self) -> tuple[int, ...]:
        size = len(self.packed) if self.packed_size is None else self.packed_size
        return (self.crc, size, self.size, len(self.name), len(self.extra))

    def local_header(self) -> bytes:
        head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, self.flags, self.method, 0, 33, *self.fields())
        return head + self.name + self.extra

    def central_header(self, place: int) -> bytes:
        head = struct.pack("<4s6H3L2H", b"PK\1\2", 0x0314, 20, self.flags, self.method, 0, 33, *self.fields())
        where = place if self.place is None else self.place
        return head + struct.pack("<3H2L", 0, 0, 0, self.attributes, where) + self.name + self.extra


def pack(entries: list[Entry], *, comment: bytes = b"", **end: Any) -> bytes:
    """`end` overwrites fields of the end record: disk, start_disk, here, count, size, place, comment_bytes."""
    out, places = b"", []
    for entry in entries:
        places.append(len(out))
        out += (entry.local_header() if entry.local is None else entry.local) + entry.packed
    directory = b"".join(entry.central_header(place) for entry, place in zip(entries, places, strict=True))
    fields = {"disk": 0, "start_disk": 0, "here": len(entries), "count": len(entries)}
    fields |= {"size": len(directory), "place": len(out), "comment_bytes": len(comment)}
    return out + directory + struct.pack("<4s4H2LH", b"PK\5\6", *(fields | end).values()) + comment


def entries(files: Mapping[str, bytes] | None = None) -> list[Entry]:
    return [Entry.of(name, content) for name, content in (good() if files is None else files).items()]


def one_more(name: str, content: bytes = b"evil", **changes: object) -> Sent:
    return archive("a.zip", pack([*entries(), Entry.of(name, content, **changes)]))


def changed(name: str, **changes: object) -> Sent:
    """The good adapter, with other fields in both headers of one member."""
    chosen = entries()
    for entry in chosen:
        if entry.name == name.encode():
            for field, value in changes.items():
                setattr(entry, field, value)
    return archive("a.zip", pack(chosen))


def zeros_packed(size: int) -> tuple[bytes, int]:
    packer, crc = zlib.compressobj(9, wbits=-15), 0
    parts = []
    for _ in range(size >> 20):
        parts.append(packer.compress(bytes(1 << 20)))
        crc = zlib.crc32(bytes(1 << 20), crc)
    return b"".join([*parts, packer.flush()]), crc


@family(*DAMAGED)
def names_in_zips() -> Cases:
    for name in TRAVERSALS:
        yield repr(name)[:60], one_more(name, flags=0x800)
    for raw in (b"README.md\0.txt", b"\0README.md", b"README.md\0"):
        yield repr(raw), one_more(raw.decode())
    yield "directory that leads out", one_more("../x/")


@family(*DAMAGED, "bad_upload")
def zip_members_that_are_no_files() -> Cases:
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        for name in (CONFIG, "README.md", "unrelated"):
            files = {key: value for key, value in good().items() if key != name}
            link = Entry.of(name, b"/etc/passwd", attributes=(kind | 0o777) << 16)
            yield f"{stat.filemode(kind)[0]} {name}", archive("a.zip", pack([*entries(files), link]))
    yield "encrypted", changed(WEIGHTS, flags=0x1)
    yield "strongly encrypted", changed(WEIGHTS, flags=0x41)
    for method in (1, 6, 9, 12, 14, 93, 95, 97, 98, 99, 65535):
        yield f"method {method}", changed(WEIGHTS, method=method)
    yield "patch data", changed(WEIGHTS, flags=0x20)


@family("unsafe_archive")
def names_that_collide_in_zips() -> Cases:
    for name in (CONFIG, WEIGHTS, f"./{CONFIG}", "ADAPTER_CONFIG.json", f"{CONFIG}/"):
        yield name, one_more(name, b"{}")


@family(*DAMAGED)
def zip_headers_that_lie() -> Cases:
    whole = len(good()[WEIGHTS])
    lies: dict[str, dict[str, object]] = {"checksum": {"crc": 1}, "size less": {"size": whole - 1}}
    lies |= {"size more": {"size": whole + 1}, "size 4 GB": {"size": 0xFFFFFFFE}, "size 0": {"size": 0}}
    lies |= {"packed more": {"packed_size": 99999}, "packed 0": {"packed_size": 0}, "stored": {"method": STORED}}
    lies |= {"elsewhere": {"place": 7}, "far away": {"place": 0xFFFFFFFE}, "at the first": {"place": 0}}
    lies |= {"zip64 without": {"size": 0xFFFFFFFF}, "zip64 place without": {"place": 0xFFFFFFFF}}
    lies |= {"zip64 of nothing": {"size": 0xFFFFFFFF, "extra": struct.pack("<HH", 1, 0)}}
    lies |= {"zip64 of 8 EB": {"size": 0xFFFFFFFF, "extra": struct.pack("<HHQ", 1, 8, 2**63 - 1)}}
    lies |= {"zip64 cut off": {"size": 0xFFFFFFFF, "extra": struct.pack("<HHL", 1, 8, 1)}}
    lies |= {"extra beyond": {"extra": struct.pack("<HH", 1, 60000)}}
    for label, changes in lies.items():
        yield label, changed(WEIGHTS, **changes)


@family(*DAMAGED)
def zips_that_say_two_things() -> Cases:
    """The directory tells the truth; the header before the content, which others read, does not."""
    truth = entries()
    lies = {"name": Entry.of("README.md", b""), "longer name": Entry.of("x" * 99, b"")}
    lies |= {"method": Entry.of(CONFIG, good()[CONFIG], method=STORED)}
    lies |= {"checksum": Entry.of(CONFIG, good()[CONFIG], crc=5), "size": Entry.of(CONFIG, good()[CONFIG], size=5)}
    lies |= {"packed size": Entry.of(CONFIG, good()[CONFIG], packed_size=5)}
    lies |= {"encrypted": Entry.of(CONFIG, b"", flags=1)}
    for label, lie in lies.items():
        first = Entry.of(CONFIG, good()[CONFIG], local=lie.local_header())
        yield label, archive("a.zip", pack([first, truth[1]]))
    yield "no header", archive("a.zip", pack([Entry.of(CONFIG, good()[CONFIG], local=b""), truth[1]]))
    hidden = Entry.of("README.md", b"hidden")
    yield "a gap", archive("a.zip", _hiding(bytes(64)))
    yield "a hidden member", archive("a.zip", _hiding(hidden.local_header() + hidden.packed))


def _hiding(content: bytes) -> bytes:
    """Something between two members that no directory names."""
    first, second = entries()
    first_bytes = first.local_header() + first.packed
    second.local = content + second.local_header()
    second.place = len(first_bytes) + len(content)
    return pack([first, second])


@family(*DAMAGED)
def zip_ends_that_lie() -> Cases:
    whole = len(pack(entries()))
    lies: dict[str, dict[str, Any]] = {
        "fewer": {"count": 1, "here": 1},
        "more": {"count": 9, "here": 9},
        "other disk": {"disk": 1, "start_disk": 1},
    }
    lies |= {
        "members elsewhere": {"here": 1},
        "smaller": {"size": 46},
        "larger": {"size": whole},
        "4 GB": {"size": 2**32 - 1},
    }
    lies |= {
        "earlier": {"place": 0},
        "later": {"place": whole},
        "far": {"place": 0xFFFFFFFE},
        "zip64": {"place": 2**32 - 1},
    }
    lies |= {"longer comment": {"comment_bytes": 5}, "much longer comment": {"comment_bytes": 0xFFFF}}
    for label, changes in lies.items():
        yield label, archive("a.zip", pack(entries(), **changes))
    another = pack(entries({CONFIG: b"{}"}))
    yield "an end in the comment", archive("a.zip", pack(entries(), comment=another[-22:]))
    yield "a zip in the comment", archive("a.zip", pack(entries(), comment=another))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, whole, 1)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, 2**62, 2**62)
    plain = pack(entries())
    yield "zip64 end that lies", archive("a.zip", plain[:-22] + record + locator + plain[-22:])
    yield "zip64 locator alone", archive("a.zip", plain[:-22] + locator + plain[-22:])
    yield "zip64 of many disks", archive("a.zip", plain[:-22] + record + locator[:-4] + b"\x09\0\0\0" + plain[-22:])


@family(*DAMAGED)
def cut_off_zips() -> Cases:
    whole = pack(entries())
    first, second = entries()
    boundaries = {"nothing": 0, "signature": 4, "header": 30, "name": len(first.local_header())}
    boundaries["content"] = boundaries["name"] + len(first.packed)
    boundaries["second header"] = boundaries["content"] + 30
    boundaries["all content"] = boundaries["content"] + len(second.local_header()) + len(second.packed)
    boundaries |= {"directory": len(whole) - 22, "in the end": len(whole) - 12, "last byte": len(whole) - 1}
    boundaries["in the directory"] = boundaries["all content"] + 46
    for label, at in boundaries.items():
        yield f"after {label}", archive("a.zip", whole[:at])
        if at:
            yield f"before {label}", archive("a.zip", whole[at:])
            yield f"without a byte at {label}", archive("a.zip", whole[: at - 1] + whole[at:])


@family("upload_too_large", "unsafe_archive", "bad_archive")
def zip_bombs() -> Cases:
    size = LIMITS.max_bytes * 3
    packed, crc = zeros_packed(size)
    bomb = Entry(b"README.md", packed, crc=crc, size=size)
    yield "1000:1", archive("a.zip", pack([*entries(), bomb]))
    yield "as weights", archive("a.zip", pack([Entry(WEIGHTS.encode(), packed, crc=crc, size=size), entries()[0]]))
    yield "says 9 bytes", archive("a.zip", pack([*entries(), Entry(b"README.md", packed, crc=crc, size=9)]))
    shared = [Entry(name, b"", crc=crc, size=size, packed_size=len(packed)) for name in (b"merges.txt", b"vocab.json")]
    for entry in shared:
        entry.local, entry.place = b"", len(b"".join(each.local_header() + each.packed for each in entries()))
    yield "overlapping", archive("a.zip", pack([*entries(), bomb, *shared]))
    yield "quoted (Fifield)", archive("a.zip", _fifield(60))
    names = ("README.md", "merges.txt", "tokenizer.model", "vocab.json", "tokenizer.json", "added_tokens.json")
    yield "in pieces", archive("a.zip", pack([Entry.of(name, bytes(2 << 20)) for name in names] + entries()))
    yield "10,000 members", archive("a.zip", pack([Entry.of(f"{number}", b"") for number in range(10_000)]))
    yield "300 members", archive("a.zip", pack([*entries(), *(Entry.of(f"{number}", b"") for number in range(300))]))
    yield "a directory of megabytes", archive("a.zip", pack([*entries(), Entry.of("x", b"", extra=bytes(65535))] * 20))


def _fifield(count: int) -> bytes:
    """Each member's content begins with the header of the next one, quoted as a stored block: one kernel for all."""
    kernel = Entry.of(f"{count}.txt", bytes(1 << 20))
    out = [kernel]
    tail = kernel.local_header() + kernel.packed
    for number in reversed(range(count)):
        head = tail[: 30 + len(out[0].name)]
        quote = b"\0" + struct.pack("<HH", len(head), len(head) ^ 0xFFFF) + head
        entry = Entry(b"%d.txt" % number, quote + tail[len(head) :], size=(1 << 20) + 40 * (count - number))
        tail = entry.local_header() + entry.packed
        out.insert(0, entry)
    places, place = [], 0
    for entry in out:
        places.append(place)
        place += len(entry.local_header()) + 5
    for entry, at in zip(out, places, strict=True):
        entry.place = at
    directory = b"".join(entry.central_header(0) for entry in out)
    return tail + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(out), len(out), len(directory), len(tail), 0)


@family("missing_file", "bad_archive", "unsafe_archive", "nesting")
def archives_in_zips() -> Cases:
    inner = pack(entries())
    yield "zip in zip", archive("a.zip", pack([Entry.of("adapter.zip", inner)]))
    yield "tar in tar in zip", archive("a.zip", pack([Entry.of("a.tar", tar({"b.tar": tar(good(), "w")}, "w"))]))
    nested = inner
    for _ in range(6):
        nested = pack([Entry.of("lib.zip", nested)])
    yield "six deep", archive("a.zip", nested)
    yield "two directories deep", archive("a.zip", pack(entries({f"a/b/{name}": x for name, x in good().items()})))
    yield "empty", archive("a.zip", pack([]))
    yield "no bytes", archive("a.zip", b"")
    yield "directories only", archive("a.zip", pack([Entry.of("a/", b""), Entry.of("b/", b"")]))
    yield "tar called zip", archive("a.zip", tar(good(), "w"))
    yield "zip called tar", archive("a.tar", inner)
    yield "zip called gzip", archive("a.tar.gz", inner)
    yield "behind a tar", archive("a.zip", tar(good(), "w") + inner)
    yield "behind a gzip", archive("a.zip", tar(good()) + inner)
    yield "behind a program", archive("a.zip", b"#!/bin/sh\ntouch /tmp/loraplex-canary\nexit\n" + inner)
    yield "before a gzip", archive("a.zip", inner + tar(good()))
    yield "two of them", archive("a.zip", inner + inner)
