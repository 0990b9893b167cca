"""`gpuxent report` and `gpuxent plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuxent.cli._console import bad_input_exits, check_writable, written_to
from gpuxent.cli._options import reading, writing


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that perplexity or compare kept (-o).")],
    output: Annotated[Path, writing("-o", "--output", help="The HTML file to write.")] = Path("report.html"),
    vocabulary: Annotated[
        Path | None,
        reading(readable=False, help="What tokens look like: a tokenizer.json, or a text file with a word per line."),
    ] = None,
    document_names: Annotated[
        Path | None, reading(readable=False, help="A text file with a document's name per line, by id.")
    ] = None,
    tokens: Annotated[int, writing(help="About as many tokens of the text are shown.", min=1)] = 20_000,
    title: Annotated[str, writing(help="Heading of the report.")] = "Evaluation",
    overwrite: Annotated[bool, writing("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """One HTML file of runs, for people: numbers with intervals, figures, documents, and the text coloured by loss."""
    from gpuxent.evaluation.reports.page import render
    from gpuxent.evaluation.reports.reported import open_reported
    from gpuxent.evaluation.reports.vocabulary import open_vocabulary, read_lines

    with bad_input_exits():
        check_writable(output, vocabulary, document_names)
        if output.exists() and not overwrite:
            raise ValueError(f"--output {output} is there already; --overwrite replaces it")
        words, names = open_vocabulary(vocabulary), read_lines(document_names) if document_names else None
        reported = open_reported(runs)
        page = render(reported, title=title, vocabulary=words, document_names=names, tokens=tokens)
        with written_to(output) as file:
            file.write(page)
        with written_to(None) as file:
            file.write(f"{output}: {len(page.encode()) / 1e6:.1f} MB\n")


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that perplexity or compare kept (-o).")],
    output: Annotated[Path, writing("-o", "--output", help="The folder to write to; it is made.")],
    format: Annotated[str, writing(help="Pictures (png, svg), and what is in them (csv).")] = "png,svg,csv",
    figure: Annotated[
        list[str] | None, writing("--figure", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, writing("--overwrite", help="Replace files of these names.")] = False,
) -> None:
    """Figures of runs: cross-entropies, reliability, losses by token, position and document, the running estimate, and
    the divergence from a base; from what the runs kept, without logits."""
    from gpuxent.evaluation.reports.figures.chosen import NAMES, figures
    from gpuxent.evaluation.reports.reported import open_reported

    with bad_input_exits():
        forms = chosen(format.split(","), "--format", FORMS)
        names = chosen(figure or NAMES, "--figure", NAMES)
        reported = open_reported(runs)
        found = {made.name: made for made in figures(reported.runs, reported.comparisons)}
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
