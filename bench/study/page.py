"""Pages made from a template: the one that raters vote on, and the one that tells the tally. Each is whole in itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench.report
from bench.report.elements.formatting import percent
from bench.study.files import Study
from distill.common.files import replacing

TEMPLATES = (Path(__file__).parent / "templates", Path(bench.report.__file__).parent / "templates")


def write_page(folder: Path, study: Study) -> None:
    """index.html, which asks a rater to choose; it needs no server."""
    write_html(folder / "index.html", "vote.html.j2", {"study": study.model_dump()})


def write_html(path: Path, template: str, context: dict[str, Any]) -> None:
    """The template with `context` in it, every text escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    with replacing(path) as temporary:
        temporary.write_text(environment.get_template(template).render(**context), encoding="utf-8")
