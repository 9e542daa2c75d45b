"""Which files the paths of an input mean, and in which format each is."""

import dataclasses
import posixpath
import re
from collections.abc import Sequence

import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.utils import glob_translate

from pipelines.corpus.delimited import Delimited
from pipelines.corpus.formats import Format, stem
from pipelines.corpus.json_lines import JsonLines
from pipelines.corpus.parquet import Parquet
from pipelines.corpus.problems import named
from pipelines.errors import Refused
from pipelines.storage import Location, common_directory, has_wildcard, locate

PARQUET = Parquet()
_JSON, _CSV, _TSV = JsonLines(), Delimited("CSV", ","), Delimited("TSV", "\t")
_ENDINGS: dict[str, Format] = {
    ".parquet": PARQUET,
    ".parq": PARQUET,
    ".pq": PARQUET,
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".json": _JSON,
    ".csv": _CSV,
    ".tsv": _TSV,
}
READ = "Parquet, JSON Lines or CSV"


def format_of(path: str) -> Format | None:
    """The format that a name tells."""
    ending = posixpath.splitext(path)[1].lower()
    if _ENDINGS.get(ending) is PARQUET:
        return PARQUET
    found = _ENDINGS.get(posixpath.splitext(stem(path))[1])
    return None if found is PARQUET else found


def find_files(
    paths: Sequence[str], output: Location | None = None
) -> tuple[Location, list[pafs.FileInfo]]:
    """The common root of the paths, and the files they mean, sorted by path.

    `output` is where the run writes: it may not lie where a later start would read it.
    Raises: Refused with all problems of all paths.
    """
    problems: list[str] = []
    roots: list[str] = []
    found: dict[str, pafs.FileInfo] = {}
    locations: dict[str, Location] = {}
    for given in paths:
        try:
            locations[given] = locate(given)
        except Refused as error:
            problems += error.problems
    if len({(loc.scheme, loc.filesystem.type_name) for loc in locations.values()}) > 1:
        problems.append("all --input paths must lie on one file system")
    for given, location in locations.items():
        if output is not None and _touches(location, output):
            problems.append(
                f"--output {output} and --input {given} hold one another: the run's own files "
                "would be read as input; choose an output outside of the input"
            )
            continue
        try:
            root, infos = _expand(location)
        except Refused as error:
            problems += [f"{given}: {problem}" for problem in error.problems]
            continue
        except OSError as error:
            problems.append(f"{given}: cannot be listed: {error}")
            continue
        if not infos:
            problems.append(f"{given}: matches no {READ} file")
        roots.append(root)
        found.update({i.path: i for i in infos})
    if problems:
        raise Refused(problems)
    first = next(iter(locations.values()))
    root_path = common_directory(roots)
    return Location(first.filesystem, root_path, first.scheme), [found[p] for p in sorted(found)]


def _touches(given: Location, output: Location) -> bool:
    """Would the files of a run in `output` be read, or does it lie around the input?"""
    if given.scheme != output.scheme:
        return False
    if given.path == output.path or given.path.startswith(f"{output.path}/"):
        return True
    fixed, inside = given.path, output.path
    if has_wildcard(given.path) and not given.exists():
        parts = given.path.split("/")
        fixed = "/".join(parts[: next(i for i, p in enumerate(parts) if has_wildcard(p))])
        names = f"{output.path}/output/0.parquet".split("/")
        above = ["/".join(names[:i]) for i in range(1, len(names) + 1)]
        if not any(re.fullmatch(glob_translate(given.path), path) for path in above):
            return False
    hidden = any(map(_hidden, inside[len(fixed) :].split("/")))
    return inside.startswith(f"{fixed}/") and not hidden


def _expand(location: Location) -> tuple[str, list[pafs.FileInfo]]:
    """The directory a path counts from, and its files."""
    info = location.info()
    if info.type == pafs.FileType.Directory:
        return location.path, _below(location)
    if info.is_file:  # also one with a wildcard character in its very name
        return posixpath.dirname(location.path), [info]
    if not has_wildcard(location.path):
        raise FileNotFoundError("there is no such file or directory")
    parts = location.path.split("/")
    num_fixed = next(i for i, part in enumerate(parts) if has_wildcard(part))
    # A pattern that spells out a hidden name means it.
    means_hidden = any(map(_hidden, parts[num_fixed:]))
    matches = ArrowFSWrapper(location.filesystem).glob(location.path)
    infos: list[pafs.FileInfo] = []
    for match in matches:
        inner = dataclasses.replace(location, path=str(match))
        if any(map(_hidden, inner.path.split("/")[num_fixed:])) and not means_hidden:
            continue
        info = inner.info()
        if info.type == pafs.FileType.Directory:
            infos += _below(inner)
        elif info.is_file:
            infos.append(info)
    return "/".join(parts[:num_fixed]), infos


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _below(directory: Location) -> list[pafs.FileInfo]:
    """The files of a directory, at any depth: all of one format.

    Raises: Refused for tables whose files are not their rows, and for several formats. `.json`
    beside files of another format is taken for a description of them.
    """
    infos = directory.files(recursive=True)
    inside = {i.path: i.path[len(directory.path) :].strip("/").split("/") for i in infos}
    if table := next(filter(None, map(_table_format, inside.values())), None):
        raise Refused(
            f"{directory} holds a table of {table}, whose files also hold rows that were deleted "
            "or replaced: write its rows out as Parquet, or take the files as they are with a "
            "glob (DIR/**/*.parquet)"
        )
    formats: dict[str, list[pafs.FileInfo]] = {}
    for info in infos:
        if (found := format_of(info.path)) and not any(map(_hidden, inside[info.path])):
            formats.setdefault(found.name, []).append(info)
    if len(formats) > 1 and _JSON.name in formats:
        lines = [i for i in formats.pop(_JSON.name) if not stem(i.path).endswith(".json")]
        formats |= {_JSON.name: lines} if lines else {}
    if len(formats) > 1:
        example = f"{directory}/**/*{posixpath.splitext(next(iter(formats.values()))[0].path)[1]}"
        raise Refused(
            f"{directory} holds files of several formats, {named(sorted(formats))}: choose with a "
            f"glob, for example {example}"
        )
    return next(iter(formats.values()), [])


def _table_format(names: list[str]) -> str | None:
    """The table format that a file with this path belongs to."""
    if "_delta_log" in names[:-1]:
        return "Delta Lake"
    if ".hoodie" in names[:-1]:
        return "Apache Hudi"
    if "metadata" in names[:-1] and names[-1].endswith(".metadata.json"):
        return "Apache Iceberg"
    return None
