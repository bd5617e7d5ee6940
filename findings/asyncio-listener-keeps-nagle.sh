#!/usr/bin/env bash
# uvicorn 0.54.0 on CPython's asyncio: a server that is given a socket made by socket.create_server
# (Server.serve(sockets=[...])) leaves Nagle's algorithm on for its connections, while one that binds by
# itself turns it off. asyncio sets TCP_NODELAY only where socket.proto is IPPROTO_TCP, and
# create_server makes sockets whose proto is 0, which those that they accept have as well. An answer
# whose head and body are two writes can then wait some 40 ms for the client's delayed
# acknowledgement. A socket made as socket.socket(family, SOCK_STREAM, IPPROTO_TCP) is not concerned.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/delay.py" <<'PY'
import asyncio
import socket

import uvicorn


async def app(scope, receive, send):
    transport = next(iter(server.server_state.connections)).transport
    ours = transport.get_extra_info("socket")
    found.append(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
    server.should_exit = True


async def asked(listener):
    work = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    _, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    await work


def by_name():
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.bind(("127.0.0.1", 0))
    return made


found = []
for make in (lambda: socket.create_server(("127.0.0.1", 0)), by_name):
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", http="h11"))
    asyncio.run(asked(make()))
print("TCP_NODELAY of a connection: socket.create_server", found[0], "- IPPROTO_TCP by name", found[1])
assert found == [0, 1], found
PY
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q uvicorn==0.54.0 h11==0.16.0
"$place/venv/bin/python" "$place/delay.py"
