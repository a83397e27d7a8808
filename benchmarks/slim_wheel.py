"""Reduce a CUDA wheel to one GPU architecture, so that it can be carried to a machine.

    python benchmarks/slim_wheel.py WHEEL FOLDER [--arch 90] [--without vbe.so ...]

The wheel of fbgemm-gpu has each kernel for several architectures. The device code of the others is
overwritten by zeros, which compress to almost nothing. Everything else keeps its place, so that
offsets in the host code stay valid. On another GPU the kernels do not load. The wheel is compressed
by LZMA, which pip can read.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# How nvcc stores device code in a library: a header, then an image for each architecture.
FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all images
FATBIN_START = struct.pack("<IHH", 0xBA55ED50, 1, FATBIN.size)
IMAGE = struct.Struct(
    "<HHIQ12xI"
)  # kind, version, bytes of this header, bytes of code, architecture


class Image(NamedTuple):
    """Device code for one architecture: where it lies in a library."""

    architecture: int
    start: int
    end: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the smaller wheel goes, by the same name")
    parser.add_argument(
        "--arch", type=int, default=90, help="what to keep: 90 is Hopper, 80 Ampere"
    )
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="ENDING",
        help="endings of libraries that lose all of their device code: their operators then fail",
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    slim = options.folder / options.wheel.name
    if slim.exists() and slim.samefile(options.wheel):
        parser.error(f"FOLDER should be another than that of the wheel; received {options.folder}")
    reduce_wheel(options.wheel, slim, options.arch, tuple(options.without))
    print(f"{slim}: {slim.stat().st_size >> 20} MiB of {options.wheel.stat().st_size >> 20} MiB")


def reduce_wheel(wheel: Path, slim: Path, architecture: int, without: tuple[str, ...] = ()) -> None:
    """Write a copy of a wheel whose libraries have device code for one architecture, or none.

    Raises:
        ValueError: if a library has none for it, as the kernels would be missing at run time.
    """
    records: dict[str, str] = {}
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(slim, "w") as target,
    ):
        # RECORD, which has every file's hash, is the last one of a wheel
        for entry in source.infolist():
            content = bytearray(source.read(entry))
            if entry.filename.endswith(".so"):
                remaining = None if entry.filename.endswith(without) else architecture
                blank(content, remaining, entry.filename)
                records[entry.filename] = record(entry.filename, content)
            elif entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines()
                lines = [records.get(line.split(",")[0], line) for line in lines]
                content = bytearray(("\n".join(lines) + "\n").encode())
            target.writestr(entry, content, compress_type=zipfile.ZIP_LZMA)


def blank(library: bytearray, architecture: int | None, name: str) -> None:
    """Overwrite the device code for other architectures by zeros, in place; None: all of it."""
    all_images = list(images(library))
    present = sorted({image.architecture for image in all_images})
    if all_images and architecture not in (None, *present):
        raise ValueError(
            f"--arch should be of {present}, which {name} has; received {architecture}"
        )
    for image in all_images:
        if image.architecture != architecture:
            library[image.start : image.end] = bytes(image.end - image.start)


def images(library: bytearray) -> Iterator[Image]:
    """Find the device code in a library."""
    at = library.find(FATBIN_START)
    while at >= 0:
        *_, size = FATBIN.unpack_from(library, at)
        at += FATBIN.size
        end = at + size
        while at < end:
            _, _, header, size, architecture = IMAGE.unpack_from(library, at)
            yield Image(architecture, at + header, at + header + size)
            at += header + size
        at = library.find(FATBIN_START, end)


def record(name: str, content: bytearray) -> str:
    """Return a file's line in RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


if __name__ == "__main__":
    main()
