"""Where rows of logits, labels and document ids come from: read block by block and never whole."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

from gpuxent.evaluation.sources._base import FileStamp, SeveralError, Source
from gpuxent.evaluation.sources.arrays import ArraySource, DaskSource
from gpuxent.evaluation.sources.hdf5 import open_hdf5
from gpuxent.evaluation.sources.kld import MAGIC, open_kld
from gpuxent.evaluation.sources.linear import LinearSource, stored
from gpuxent.evaluation.sources.npy import open_npy
from gpuxent.evaluation.sources.pair import PairSource
from gpuxent.evaluation.sources.parquet import open_parquet
from gpuxent.evaluation.sources.safetensors import open_safetensors
from gpuxent.evaluation.sources.shards import ShardedSource, natural
from gpuxent.evaluation.sources.zarr import ZarrSource

__all__ = [
    "ArraySource",
    "DaskSource",
    "FileStamp",
    "LinearSource",
    "PairSource",
    "ShardedSource",
    "Source",
    "members",
    "open_source",
    "stored",
]

OPENERS: dict[str, Callable[[Path, str | None], Source]] = {
    "Zarr": ZarrSource.open,
    ".npy": open_npy,
    "safetensors": open_safetensors,
    "HDF5": open_hdf5,
    "Parquet": open_parquet,
    ".kld": open_kld,
}
SUFFIXES = {
    ".npy": ".npy",
    ".npz": ".npy",
    ".safetensors": "safetensors",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".parquet": "Parquet",
    ".kld": ".kld",
    ".zarr": "Zarr",
}
BEGINNINGS = {b"\x93NUMPY": ".npy", b"\x89HDF\r\n\x1a\n": "HDF5", b"PAR1": "Parquet", MAGIC: ".kld"}


def open_source(path: str | Path) -> Source:
    """The source for PATH or PATH::member, where PATH is a file, a Zarr folder, a folder of shards or a pattern such as
    logits-*.npy; ValueError or OSError if it cannot be read."""
    path, member = _split(str(path))
    shards = _shards(path)
    if shards is None:
        return _opener(path)(path, member)
    if not shards:
        raise ValueError(f"{path} is not a Zarr array, and holds no file of {', '.join(OPENERS)}")
    first = _format(shards[0])
    for shard in shards:
        if (found := _format(shard)) != first:
            raise ValueError(f"{shards[0]} is {first or 'of no known format'}, and {shard} {found or 'is not'}")
    if (first, member) == (".kld", "contexts") and len(shards) > 1:
        raise ValueError(f"{path}::contexts would number the contexts of {len(shards):,} files from 0 each")
    return ShardedSource.of(str(path), [_opener(shard)(shard, member) for shard in shards])


def members(path: str | Path) -> list[str]:
    """Names to choose from, as in PATH::name, if there are several arrays in PATH and none is meant without a name."""
    try:
        open_source(path)
    except SeveralError as error:
        return error.names
    return []


def _split(path: str) -> tuple[Path, str | None]:
    if "::" not in path or Path(path).exists():
        return Path(path), None
    before, _, member = path.rpartition("::")
    return Path(before), member


def _shards(path: Path) -> list[Path] | None:
    """In natural order; None of a path that is a single array or file of them."""
    if not path.exists():
        if not glob.has_magic(str(path)):
            raise FileNotFoundError(f"{path} does not exist")
        if not (found := glob.glob(str(path), recursive=True)):
            raise FileNotFoundError(f"no file matches {path}")
        return sorted(map(Path, found), key=natural)
    if path.is_dir() and _format(path) is None:
        return sorted((entry for entry in path.iterdir() if _format(entry)), key=natural)
    return None


def _format(path: Path) -> str | None:
    """By what a file begins with, else by its name."""
    if path.is_dir():
        is_zarr = path.suffix == ".zarr" or any((path / file).exists() for file in ("zarr.json", ".zarray", ".zgroup"))
        return "Zarr" if is_zarr else None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(8)
    found = [kind for beginning, kind in BEGINNINGS.items() if start.startswith(beginning)]
    return found[0] if found else SUFFIXES.get(path.suffix)


def _opener(path: Path) -> Callable[[Path, str | None], Source]:
    kind = _format(path)
    if kind is None:
        raise ValueError(f"{path} is of none of the formats {', '.join(OPENERS)}")
    return OPENERS[kind]
