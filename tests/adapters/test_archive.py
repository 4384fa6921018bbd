"""Archives from strangers: the kept files come out, nothing else is written, and no trick works."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.archive import UploadedFile, UploadLimits, unpack
from adapters.errors import AdapterError, InvalidAdapter, UnsafeArchive, UploadError, UploadTooLarge
from adapters.upload import KEPT
from tests.adapters.factories import loose, tar, uploaded

LIMITS = UploadLimits(max_bytes=10_000, max_files=20)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(5000), "tokenizer.json": b"{}"}
NESTED = {f"my-adapter/{name}": content for name, content in FILES.items()}
NOISE = {"log.txt": b"x", "runs/Jan01/events.out": b"x", "training_args.bin": b"x", "optimizer.pt": b"x"}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


PACKERS: dict[str, Callable[[dict[str, bytes]], list[UploadedFile]]] = {
    "tar.gz": lambda files: uploaded("a.tar.gz", tar(files)),
    "tgz": lambda files: uploaded("A.TGZ", tar(files)),
    "tar": lambda files: uploaded("a.tar", tar(files, "w")),
    "zip": lambda files: uploaded("a.zip", zipped(files)),
    "stored zip": lambda files: uploaded("a.zip", zipped(files, zipfile.ZIP_STORED)),
    "loose": loose,
}
every_packer = pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)


def unpacked(into: Path, files: list[UploadedFile], limits: UploadLimits = LIMITS) -> dict[str, bytes]:
    into.mkdir(exist_ok=True)
    unpack(files, into, limits)
    return {path.name: path.read_bytes() for path in into.iterdir()}


def refusal(tmp_path: Path, files: list[UploadedFile], limits: UploadLimits = LIMITS) -> AdapterError:
    tmp_path.mkdir(exist_ok=True)
    with pytest.raises(AdapterError) as error:
        unpacked(tmp_path / "into", files, limits)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path / "into"]
    assert outside == []
    return error.value


@every_packer
@pytest.mark.parametrize("files", [FILES, NESTED, {**FILES, **NOISE}, {f"./{name}": FILES[name] for name in FILES}])
def test_kept_files_come_out_flat(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], list[UploadedFile]], files: dict[str, bytes]
) -> None:
    assert unpacked(tmp_path / "into", pack(files)) == FILES


@every_packer
@pytest.mark.parametrize("memory_bytes", [1, 1 << 20])
def test_spooled_files_of_a_web_framework_are_read(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], list[UploadedFile]], memory_bytes: int
) -> None:
    with ExitStack() as stack:
        spooled = []
        for file in pack(FILES):
            stream = stack.enter_context(SpooledTemporaryFile(max_size=memory_bytes))
            stream.write(file.stream.read())
            stream.seek(0)
            spooled.append(UploadedFile(file.filename, cast(BinaryIO, stream)))
        assert unpacked(tmp_path / "into", spooled) == FILES


@every_packer
@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("../adapter_config.json", "unsafe_archive"),
        ("a/../../README.md", "unsafe_archive"),
        ("/etc/README.md", "unsafe_archive"),
        ("C:/README.md", "unsafe_archive"),
        ("a\\README.md", "unsafe_archive"),
        ("./tokenizer.json", "unsafe_archive"),
        ("TOKENIZER.json", "unsafe_archive"),
        ("．．/README.md", "unsafe_archive"),
        (".. /README.md", "unsafe_archive"),
        ("a\nREADME.md", "unsafe_archive"),
        ("x" * 256, "unsafe_archive"),
        ("a/" * 64 + "x", "unsafe_archive"),
        ("X.PKL", "pickle"),
        ("other/README.md", "nesting"),
        ("a/b/README.md", "nesting"),
        ("adapter_model.bin", "pickle"),
        ("checkpoint-1/pytorch_model.pt", "pickle"),
        ("x.pkl", "pickle"),
        ("adapter_model-00001-of-00002.safetensors", "extra_weights"),
    ],
)
def test_names_that_are_refused(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], list[UploadedFile]], extra: str, code: str
) -> None:
    assert refusal(tmp_path, pack({**FILES, extra: b"evil"})).code == code


@pytest.mark.parametrize("name", ["", "\0", "a\0README.md"])
def test_nul_and_empty_names_are_refused(tmp_path: Path, name: str) -> None:
    assert isinstance(refusal(tmp_path, loose({name: b""})), UnsafeArchive)


@every_packer
def test_bytes_are_counted_as_they_come_out(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], list[UploadedFile]]
) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(10_000 - 2)}
    assert len(unpacked(tmp_path / "fits", pack(files))) == 2
    files["adapter_model.safetensors"] += b"\0"
    with pytest.raises(UploadTooLarge):
        unpacked(tmp_path / "large", pack(files))


@every_packer
def test_members_are_counted(tmp_path: Path, pack: Callable[[dict[str, bytes]], list[UploadedFile]]) -> None:
    assert isinstance(refusal(tmp_path, pack({f"{number}.txt": b"" for number in range(21)})), UploadTooLarge)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["adapter_config.json", "unrelated"])
def test_tar_links_and_devices_are_refused(tmp_path: Path, kind: bytes, name: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    assert isinstance(refusal(tmp_path, uploaded("a.tar", out.getvalue())), UnsafeArchive)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zip_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        entry = zipfile.ZipInfo("adapter_config.json")
        entry.external_attr = (kind | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    assert isinstance(refusal(tmp_path, uploaded("a.zip", out.getvalue())), UnsafeArchive)


def test_encrypted_and_exotic_zips_are_refused(tmp_path: Path) -> None:
    content = bytearray(zipped({"README.md": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert "encrypted" in refusal(tmp_path, uploaded("a.zip", bytes(content))).message
    assert "method" in refusal(tmp_path, uploaded("a.zip", zipped({"README.md": b"x"}, zipfile.ZIP_LZMA))).message


@pytest.mark.parametrize("method", ["gzip", "zip", "ignored member"])
def test_bombs_end_at_the_limit_without_filling_memory(tmp_path: Path, method: str) -> None:
    bomb = bytes(200 << 20)
    name = "junk.dat" if method == "ignored member" else "README.md"
    files = uploaded("a.zip", zipped({name: bomb})) if method == "zip" else uploaded("a.tgz", tar({name: bomb}))
    del bomb
    tracemalloc.start()
    error = refusal(tmp_path, files)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(error, UploadTooLarge)
    assert peak < 20 << 20
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= LIMITS.max_bytes


def test_header_that_claims_gigabytes_is_not_read_at_once(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    content = gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(64 << 20))
    assert "a header claims" in refusal(tmp_path, uploaded("a.tgz", content)).message


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("README.md")
    entry.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": "9",
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    assert isinstance(refusal(tmp_path, uploaded("a.tar", out.getvalue())), UnsafeArchive)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    name = "a.tar" if pack is bytes else "a.tar.gz"
    whole = tar({"adapter_config.json": b"{}", "README.md": b"", "tokenizer.json": b"x" * 512}, "w")
    end = 512 * 5
    for cut in range(0, end + 1, 256):
        assert isinstance(refusal(tmp_path / str(cut), uploaded(name, pack(whole[:cut]))), UploadError)
    assert len(unpacked(tmp_path / "whole", uploaded(name, pack(whole[: end + 512])))) == 3


def test_a_damaged_header_does_not_hide_what_follows(tmp_path: Path) -> None:
    whole = bytearray(tar({"adapter_config.json": b"{}", "tokenizer.json": b""}, "w"))
    whole[1024] ^= 1
    assert refusal(tmp_path, uploaded("a.tar", bytes(whole))).code == "bad_archive"


@pytest.mark.parametrize("junk", [b"x", tar(FILES, "w"), zipped(FILES)], ids=["byte", "tar", "zip"])
@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_nothing_lies_before_or_behind(tmp_path: Path, name: str, junk: bytes) -> None:
    good = PACKERS[name.removeprefix("a.")](FILES)[0].stream.read()
    behind = gzip.compress(gzip.decompress(good) + junk) if name == "a.tgz" else good + junk
    assert isinstance(refusal(tmp_path / "behind", uploaded(name, behind)), UploadError)
    assert isinstance(refusal(tmp_path / "before", uploaded(name, junk + good)), UploadError)


def test_members_of_a_zip_share_no_bytes(tmp_path: Path) -> None:
    content = bytearray(zipped({"README.md": b"x" * 99, "merges.txt": b"x" * 99}))
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = bytes(4)
    assert "begins at byte" in refusal(tmp_path, uploaded("a.zip", bytes(content))).message


@pytest.mark.parametrize(
    ("options", "streamed"),
    [(["-r"], False), (["-r", "-0"], False), (["-r", "-fz"], False), (["-r", "-fd"], False), (["-r"], True)],
)
def test_zips_of_the_common_packer_come_in(tmp_path: Path, options: list[str], streamed: bool) -> None:
    program = shutil.which("zip")
    if program is None:
        pytest.skip("zip is not installed")
    source = tmp_path / "source" / "my-adapter"
    source.mkdir(parents=True)
    for name, content in FILES.items():
        (source / name).write_bytes(content)
    packed = subprocess.run(
        [program, "-q", *options, "-" if streamed else "../a.zip", "my-adapter"],
        cwd=source.parent,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    content = packed if streamed else (tmp_path / "a.zip").read_bytes()
    assert unpacked(tmp_path / "into", uploaded("a.zip", content)) == FILES


def test_a_zip_written_to_a_pipe_comes_in(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError("a pipe")

    out = Pipe()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    assert unpacked(tmp_path / "into", uploaded("a.zip", out.getvalue())) == FILES


def test_archive_and_loose_files_do_not_mix(tmp_path: Path) -> None:
    assert "one archive" in refusal(tmp_path, loose({"a.zip": zipped(FILES), "README.md": b""})).message
    assert "got 0 files" in refusal(tmp_path, []).message


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize("content", [b"", b"not an archive", os.urandom(5000)])
def test_what_is_no_archive_is_the_sender_s_fault(tmp_path: Path, name: str, content: bytes) -> None:
    assert isinstance(refusal(tmp_path, uploaded(name, content)), UploadError)


@pytest.mark.parametrize("position", [-5, -1, -700])
def test_a_flipped_byte_of_compressed_data_is_noticed(tmp_path: Path, position: int) -> None:
    content = bytearray(tar(FILES))
    content[position] ^= 0xFF
    assert isinstance(refusal(tmp_path, uploaded("a.tgz", bytes(content))), UploadError)


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_no_damage_escapes_as_another_error(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    good = PACKERS[name.removeprefix("a.")](NESTED)[0].stream.read()
    for attempt in range(300):
        content = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            content[chance.choice([chance.randrange(len(content)), chance.randrange(600), -chance.randint(1, 600)])] = (
                chance.randrange(256)
            )
        try:
            found = unpacked(tmp_path / str(attempt), uploaded(name, bytes(content)))
        except (UploadError, InvalidAdapter):
            continue
        assert set(found) <= set(FILES)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), st.binary(max_size=20), max_size=6)
)
def test_any_names_end_in_kept_files_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    into = tmp_path_factory.mktemp("any")
    try:
        assert unpacked(into, loose(files)).keys() <= KEPT
    except (UploadError, InvalidAdapter):
        assert list(into.rglob("*/*")) == []
