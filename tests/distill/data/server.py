"""A server of this machine whose connections break, for what is read over http."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from aiohttp import web


class Server:
    """Serves a folder at `url`, with a list of its files, ranges of bytes too. It answers the next `faults` of its requests
    for shards with a fault: a status, or 0 for a connection that breaks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[int] = []
        self.sent: list[tuple[str, str]] = []
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self.thread.start()
        assert started.wait(10)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name.startswith("shard") and request.method == "GET":
            self.sent.append((name, request.headers.get("Range", "")))
            if self.faults:
                status = self.faults.pop(0)
                if status:
                    return web.Response(status=status)
                assert request.transport is not None
                request.transport.abort()
        path = self.folder / name
        if not name:
            links = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in self.folder.iterdir())
            return web.Response(text=links, content_type="text/html")
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        application = web.Application()
        application.router.add_get("/cache/{name:.*}", self._answer)
        runner = web.AppRunner(application)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/cache"
        started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
