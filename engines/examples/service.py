"""A text-to-image service around a bundle: python engines/examples/service.py BUNDLE [PORT]

    curl -d '{"prompt": "a red circle", "width": 128, "height": 128}' http://127.0.0.1:8080 > picture.png

One process, one copy of the weights, every resolution of the bundle. A pipeline serves one request at a time, so
requests take turns, for which one waits a minute at most; the first of each size pays for its CUDA graph.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

import engines
from distill.common.errors import UserError


def make_handler(bundle: str) -> type[BaseHTTPRequestHandler]:
    pipeline, turn = engines.load(bundle), threading.Lock()
    pipeline.set_progress_bar_config(disable=True)
    sizes = pipeline.unet.component.resolutions

    def draw(prompt: str, width: int, height: int, steps: int = 25, guidance: float = 5.0, seed: int = 0) -> bytes:
        kinds = [type(value) for value in (prompt, width, height, steps, seed)] == [str, int, int, int, int]
        numbers = kinds and type(guidance) in (int, float) and 1 <= steps <= 100 and 0 <= guidance <= 50
        if not numbers or not 0 <= seed < 2**63 or f"{width}x{height}" not in sizes:
            raise UserError(f"allowed: a prompt, 1-100 steps, guidance 0-50, a seed from 0, sizes {', '.join(sizes)}")
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same picture on every device
        options = {"width": width, "height": height, "num_inference_steps": steps, "guidance_scale": guidance}
        if not turn.acquire(timeout=60):
            raise TimeoutError("a minute has passed with the requests before yours; ask again later")
        try:
            image = pipeline(prompt, generator=generator, **options).images[0]
        finally:
            turn.release()
        image.save(png := io.BytesIO(), "PNG")
        return png.getvalue()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds that a client may be silent

        def do_POST(self) -> None:
            try:
                if not 0 < (length := int(self.headers["Content-Length"] or 0)) <= 4096:
                    raise UserError(f"the request has {length} bytes, allowed are 1 to 4096")
                status, kind, body = 200, "image/png", draw(**json.loads(self.rfile.read(length)))
            except Exception as error:
                asked = isinstance(error, UserError | ValueError | TypeError)
                status = 400 if asked else 503 if isinstance(error, TimeoutError) else 500
                kind, body = "text/plain", str(error).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


if __name__ == "__main__":
    address = ("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8080)
    ThreadingHTTPServer.request_queue_size = 64  # connections that the system keeps until they are taken
    ThreadingHTTPServer(address, make_handler(sys.argv[1])).serve_forever()
