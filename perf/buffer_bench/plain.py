"""`python -m buffer_bench.plain RUN PORT_FILE`: uvicorn, TLS and Starlette as the buffer has them;
the handler reads the body and says ok."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dapo_hpc.buffer import auth
from dapo_hpc.run_dir import RunDir


async def _swallow(request: Request) -> Response:
    await request.body()
    return Response(b"ok")


def main(run: RunDir, port_file: Path) -> None:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    config = uvicorn.Config(
        Starlette(routes=[Route("/v1/submit", _swallow, methods=["POST"])]),
        ssl_certfile=str(run.auth / auth.CERTIFICATE),
        ssl_keyfile=str(run.auth / auth.KEY),
        http="h11",
        log_config=None,
        access_log=False,
    )
    port_file.write_text(str(listener.getsockname()[1]))
    uvloop.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])), Path(sys.argv[2]))
