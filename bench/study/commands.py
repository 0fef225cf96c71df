"""`python -m bench study make|serve|tally`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from bench.study.options import MakeOptions


def make(options: Annotated[MakeOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> int:
    """Draw the pictures and write the folder that raters get; the same command goes on where it was stopped."""
    from bench.study.drawing import make_study

    make_study(options)
    return 0


def serve(study: Path, votes: Path | None = None, address: str = "127.0.0.1", port: int = 8765) -> int:
    """Show a study over HTTP and append each vote to a file; Ctrl-C ends it.

    Args:
        study: The folder made by `study make`.
        votes: The file that votes are appended to, .jsonl. None: STUDY.votes.jsonl, beside the folder.
        address: Where to listen; other machines reach it only where this is not a loopback address.
        port: Where to listen, from 1 to 65535.
    """
    from bench.study.server import serve_study

    return serve_study(study, votes, address, port)


def tally(key: Path, votes: list[Path], out: Path) -> int:
    """Tell from the votes which model is preferred, as one page and its JSON.

    Args:
        key: The STUDY.key.json that `study make` left beside the folder.
        votes: Files that raters saved, .json, or the server wrote, .jsonl.
        out: Folder to write index.html and tally.json into; it is made where it is absent.
    """
    from bench.study.tally import write_tally

    write_tally(key, votes, out)
    return 0


Command = (
    Annotated[int, tyro.conf.subcommand("make", constructor=make)]
    | Annotated[int, tyro.conf.subcommand("serve", constructor=serve)]
    | Annotated[int, tyro.conf.subcommand("tally", constructor=tally)]
)


def study(
    command: Annotated[Command, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.arg(name="")],
) -> int:
    """The blind preference study: people choose between pictures without knowing whose they are."""
    return command
