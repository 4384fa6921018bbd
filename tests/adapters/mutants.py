"""Good uploads with a few bytes or fields changed at random, the same ones for the same seed.

Some mutants are good adapters still, by accident: a flip inside a weight, another date in a header. Who tries them
has to find out (`require_valid`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors import safe_open

from adapters.upload import KEPT
from tests.adapters.factories import MODULES, VOCABULARY, tar
from tests.adapters.hostile import CONFIG, WEIGHTS, Hostile, Sent, archive, good
from tests.adapters.hostile_tars import BLOCK, with_field
from tests.adapters.hostile_zips import STORED, Entry, pack

WHOLE = {**good(), "tokenizer.json": json.dumps({"model": {"vocab": VOCABULARY}}).encode(), "README.md": b"# hello"}
Mutate = Callable[[Random, bytearray], None]
STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    1e308,
    0.5,
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    [0, 4],
    [8, 4],
    "F16",
]
STRANGE += ["BF16", "F64", [2**62, 2**62], [-1, 8], "LORA", "lora", "ADALORA", "all", 4, 8, 16, 17, "../x", "\0"]


def flip(chance: Random, content: bytearray) -> None:
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def overwrite(chance: Random, content: bytearray) -> None:
    at, length = chance.randrange(len(content)), chance.choice([1, 2, 4, 8, 64])
    content[at : at + length] = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])


def delete(chance: Random, content: bytearray) -> None:
    at = chance.randrange(len(content))
    del content[at : at + chance.choice([1, 4, 30, 512, 1024])]


def repeat(chance: Random, content: bytearray) -> None:
    at, length = chance.randrange(len(content)), chance.choice([1, 4, 30, 512, 1024])
    content[at:at] = content[at : at + length]


def move(chance: Random, content: bytearray) -> None:
    length = chance.choice([8, 46, 512, 1024])
    piece = content[(start := chance.randrange(len(content))) : start + length]
    del content[start : start + length]
    at = chance.randrange(len(content) + 1)
    content[at:at] = piece


def cut(chance: Random, content: bytearray) -> None:
    del content[chance.randrange(len(content)) :]


def insert(chance: Random, content: bytearray) -> None:
    at = chance.randrange(len(content))
    content[at:at] = chance.choice(
        [b"PK\3\4", b"PK\1\2", b"\x1f\x8b\x08", bytes(512), b"../", b'{"a":', chance.randbytes(9)]
    )


OF_BYTES: tuple[Mutate, ...] = (flip, flip, overwrite, delete, repeat, move, cut, insert)
PACKED: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "a.tar": lambda files: tar(files, "w"),
    "a.tar.gz": lambda files: gzip.compress(tar(files, "w"), mtime=0),
    "a.zip": lambda files: pack([Entry.of(name, content) for name, content in files.items()]),
}
CHECKED = ("a.tar.gz", "a.zip")
"""Formats with checksums over every byte of content: a mutant of theirs that is accepted is the original."""


def of_bytes(seed: int, count: int) -> Iterator[Hostile]:
    """Of whole archives, and of single loose files."""
    chance = Random(seed)
    packed = {name: make(WHOLE) for name, make in PACKED.items()}
    for number in range(count):
        mutate = chance.choice(OF_BYTES)
        name = chance.choice([*packed, *packed, "loose"])
        label = f"{number} {mutate.__name__} {name}"
        if name == "loose":
            victim = chance.choice(sorted(WHOLE))
            content = bytearray(WHOLE[victim])
            mutate(chance, content)
            yield _mutant(f"{label} {victim}", list({**WHOLE, victim: bytes(content)}.items()))
        else:
            content = bytearray(packed[name])
            mutate(chance, content)
            yield _mutant(label, archive(name, bytes(content)))


def of_structure(seed: int, count: int) -> Iterator[Hostile]:
    """Of what the bytes mean: fields of headers, with checksums that fit, and values of JSON."""
    chance = Random(seed)
    for number in range(count):
        change = chance.choice((_tar_field, _zip_field, _header_value, _header_value, _config_value))
        yield _mutant(f"{number} {change.__name__}", change(chance))


def _mutant(label: str, sent: Sent) -> Hostile:
    return Hostile("mutant", label, sent, frozenset())


def _tar_field(chance: Random) -> Sent:
    whole = tar(WHOLE, "w")
    places = [match.start() - 257 for match in re.finditer(b"ustar", whole)]
    at = chance.choice(places)
    start, length = chance.choice(
        [(0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)]
    )
    value = chance.choice([bytes(length), b"\xff" * length, b"7" * length, b"\x80" + bytes(length - 1), b"../x\0"])
    changed = with_field(whole[at : at + BLOCK], start, (value + bytes(length))[:length])
    content = whole[:at] + changed + whole[at + BLOCK :]
    return archive("a.tgz", gzip.compress(content, mtime=0)) if chance.random() < 0.5 else archive("a.tar", content)


def _zip_field(chance: Random) -> Sent:
    entries = [Entry.of(name, content) for name, content in WHOLE.items()]
    entry = chance.choice(entries)
    field = chance.choice(
        ["crc", "size", "flags", "method", "attributes", "packed_size", "place", "extra", "name", "stored"]
    )
    number = chance.choice([0, 1, 8, 255, 0x800, 0xFFFF, chance.randrange(1 << 16)])
    if field == "stored":
        entry.method, entry.packed = STORED, WHOLE[entry.name.decode()][: number or None]
    elif field in ("extra", "name"):
        setattr(entry, field, chance.choice([b"", b"../x", b"\1\0\4\0abcd", entry.name + b"\0", b"\xff\xfe"]))
    else:
        setattr(entry, field, number)
    end: dict[str, Any] = {chance.choice(["disk", "here", "count", "size", "place", "comment_bytes"]): number}
    return archive("a.zip", pack(entries, **(end if chance.random() < 0.3 else {})))


def _header_value(chance: Random) -> Sent:
    whole = WHOLE[WEIGHTS]
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = sorted(header)
    name, other = chance.choice(names), chance.choice(names)
    field = chance.choice(["dtype", "shape", "data_offsets"])
    change = chance.randrange(6)
    if change == 0:
        header[name][field] = header[other][field]
    elif change == 1:
        header[name][field] = chance.choice(STRANGE)
    elif change == 2:
        header[chance.choice([name + "x", "", "../" + name, name.upper()])] = header.pop(name)
    elif change == 3:
        header[name], header[other] = header[other], header[name]
    elif change == 4:
        numbers = header[name][chance.choice(["shape", "data_offsets"])]
        numbers[chance.randrange(2)] += chance.choice([-8, -1, 1, 4, 2**32, -(2**63)])
    else:
        header.pop(name)
    raw = json.dumps(header).encode()
    said = len(raw) + (chance.choice([-1, 1, 8, 1 << 40]) if chance.random() < 0.2 else 0)
    return list({**WHOLE, WEIGHTS: struct.pack("<Q", said) + raw + data}.items())


def _config_value(chance: Random) -> Sent:
    config = json.loads(WHOLE[CONFIG])
    key = chance.choice(
        [*config, "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "lora_bias"]
    )
    change = chance.randrange(4)
    if change == 0:
        config.pop(key, None)
    elif change == 1:
        config[key] = {chance.choice(["q_proj", ".*", "(a|b)_proj", "", "["]): chance.choice(STRANGE)}
    else:
        config[key] = chance.choice(STRANGE)
    return list({**WHOLE, CONFIG: json.dumps(config).encode()}.items())


def require_valid(directory: Path, digest: str) -> None:
    """Told without the product's own code, but for the names of the files: what PEFT and the engine would compute with
    is whole, finite and fits the base."""
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
    listing = json.dumps(sorted(hashes.items()), separators=(",", ":"))
    assert digest == f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"
    assert {CONFIG, WEIGHTS} <= set(hashes) <= KEPT
    config = json.loads((directory / CONFIG).read_text())
    assert str(config.get("peft_type", "LORA")).upper() == "LORA"
    assert config.get("bias", "none") == "none"
    assert not any(config.get(key) for key in ("use_dora", "lora_bias", "modules_to_save"))
    assert math.isfinite(config["lora_alpha"])
    shapes = dict(_finite_tensors(directory / WEIGHTS))
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in shapes}
    assert modules
    for module in modules:
        rank = config["r"]
        for pattern, value in (config.get("rank_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT's get_pattern_key
                rank = value
                break
        out_features, in_features = MODULES[module]
        named = {name: shape for name, shape in shapes.items() if f"{module}.lora_" in name}
        assert sorted(named.values()) == sorted([(rank, in_features), (out_features, rank)]), named


def _finite_tensors(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    with safe_open(path, framework="numpy") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            dtype, (begin, end) = header[name]["dtype"], header[name]["data_offsets"]
            word, exponent = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}[dtype]
            assert not ((np.frombuffer(data[begin:end], word) & exponent) == exponent).any(), name
            yield name, tuple(opened.get_slice(name).get_shape())
