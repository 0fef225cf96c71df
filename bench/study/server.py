"""`study serve`: the study's page over HTTP, and every vote on the disk before the browser is told that it arrived."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bench.study.files import read_study
from bench.study.votes import Pictures, Vote, read_lines, read_sheet
from distill.common.errors import UserError, require_between
from distill.common.progress import say

if TYPE_CHECKING:
    from aiohttp import web


class Box:
    """A file of votes that only grows. One process at a time holds it."""

    def __init__(self, path: Path, study: str, pictures: Pictures) -> None:
        """Raises UserError where the file holds anything but votes on this study, or another server writes it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path} is written by another server; stop that one or choose another --votes") from None
        kept = read_lines(path, study, pictures)
        self._seen = set(kept)
        self._size = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, self._size)  # a line that a crash cut off, which nobody was told had arrived

    def put(self, votes: list[Vote]) -> None:
        """On the disk when it returns; those that are there already are not written again. Raises OSError, and then none of
        them is."""
        new = [vote for vote in dict.fromkeys(votes) if vote not in self._seen]
        data = b"".join(vote.as_line() for vote in new)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size = os.fstat(self._file).st_size
        self._seen.update(new)


def make_app(folder: Path, votes: Path) -> web.Application:
    """The page at /, its pictures, and POST /votes. Raises UserError for a folder that is no whole study."""
    from aiohttp import web

    study = read_study(folder)
    pictures = {name: index for index, item in enumerate(study.items) for name in item.pictures}
    box = Box(votes, study.study, pictures)

    async def page(_request: web.Request) -> web.FileResponse:
        return web.FileResponse(folder / "index.html")

    async def take(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a page of another site cannot send that unasked
            raise web.HTTPUnsupportedMediaType(text="votes are sent as application/json")
        try:
            sent = read_sheet((await request.read()).decode(errors="replace"), "what was sent", study.study, pictures)
            box.put(sent)
        except UserError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        except OSError as error:
            say(f"votes could not be written to {votes}: {error.strerror}; their raters keep them and send them again")
            raise web.HTTPInsufficientStorage(text="the votes could not be written") from None
        return web.json_response({"saved": len(sent)})

    app = web.Application(client_max_size=8 << 20)
    app.add_routes([web.get("/", page), web.post("/votes", take), web.static("/pictures", folder / "pictures")])
    return app


def serve_study(folder: Path, votes: Path | None, address: str, port: int) -> int:
    """Until Ctrl-C. Raises UserError for a folder or a file that cannot be used, OSError where the port is taken."""
    from aiohttp import web

    require_between(1, 65535, port=port)
    if not address.strip():  # to the system it would mean every network that this machine is in
        raise UserError("--address is empty (is a variable of the shell not set?); 0.0.0.0 listens on all networks")
    votes = votes or folder.resolve().with_name(f"{folder.resolve().name}.votes.jsonl")
    if votes.suffix != ".jsonl":
        raise UserError(f"--votes {votes}: its name must end in .jsonl, by which `study tally` knows it")
    app = make_app(folder, votes)
    say(f"the study is at http://{address}:{port}; votes go to {votes}; Ctrl-C ends it")
    web.run_app(app, host=address, port=port, print=None)
    return 0
