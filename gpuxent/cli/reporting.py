"""`gpuxent plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuxent.cli._console import bad_input_exits, written_to
from gpuxent.cli._options import writing


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that perplexity kept (-o).")],
    output: Annotated[Path, writing("-o", "--output", help="The folder to write to; it is made.")],
    format: Annotated[str, writing(help="Pictures (png, svg), and what is in them (csv).")] = "png,svg,csv",
    figure: Annotated[
        list[str] | None, writing("--figure", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, writing("--overwrite", help="Replace files of these names.")] = False,
) -> None:
    """Figures of runs: cross-entropies, reliability, losses by token, position and document, and the running estimate;
    from what the runs kept, without logits."""
    from gpuxent.evaluation.reports.figures.chosen import NAMES, figures
    from gpuxent.evaluation.reports.reported import open_reported

    with bad_input_exits():
        forms = chosen(format.split(","), "--format", FORMS)
        names = chosen(figure or NAMES, "--figure", NAMES)
        found = {made.name: made for made in figures(open_reported(runs))}
        missing = [name for name in names if name not in found]
        if figure and missing:
            raise ValueError(f"there is nothing to show in --figure {missing[0]}: these runs give {', '.join(found)}")
        files = {output / f"{name}.{form}": (name, form) for name in names if name in found for form in forms}
        check_free(output, list(files), overwrite)
        output.mkdir(parents=True, exist_ok=True)
        with written_to(None) as stdout:
            for path, (name, form) in files.items():
                path.write_bytes(as_bytes(found[name], form))
                stdout.write(f"{path}\n")


FORMS = ("png", "svg", "csv")


def chosen(given: Any, option: str, known: tuple[str, ...]) -> list[str]:
    """Each once, in the order given."""
    for name in given:
        if name not in known:
            raise ValueError(f"{option} must be of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(given))


def check_free(folder: Path, files: list[Path], overwrite: bool) -> None:
    """Nothing is overwritten that nobody asked to, and then nothing is written either."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder, got the file {folder}")
    taken = [path for path in files if path.exists()]
    if taken and not overwrite:
        raise ValueError(f"{taken[0]} exists; --overwrite replaces it")


def as_bytes(figure: Any, form: str) -> bytes:
    from gpuxent.evaluation.reports.figures.figure import to_csv, to_png, to_svg

    texts: dict[str, Callable[[Any], str]] = {"svg": to_svg, "csv": to_csv}
    return to_png(figure) if form == "png" else texts[form](figure).encode("utf-8")
