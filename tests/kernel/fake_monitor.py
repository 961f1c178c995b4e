"""QMP server that pretends to be QEMU: it reports the threads and the memory given in its options.

Usage: `fake_monitor.py SOCKET OPTIONS`, where OPTIONS is a JSON object:
- `uid`: user of the server
- `threads`: thread ids to report as vCPUs (default: the main thread of the server)
- `mem_path`, `size`: path and length in bytes of the only memory backend
- `map`: access (`r`, `rw`) of the server's mapping of the memory backend (default: no mapping)
- `server`: process that serves: `self`, `child` (forked after listen(2); its parent waits for it) or `orphan` (forked
  after listen(2); its parent exits)
- `replies`: replies by command, which replace the default replies
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import threading
from typing import Any


def answer(options: dict[str, Any], command: str, arguments: dict[str, Any]) -> Any:
    """Return the reply to a command: the reply in `replies`, otherwise a reply like QEMU's."""
    if command in options.get("replies", {}):
        return options["replies"][command]
    match command:
        case "qom-get":
            known = {"type": "pc-i440fx-7.2-machine", "mem-path": options["mem_path"], "feature-words": []}
            return known.get(arguments["property"], 0)
        case "qom-list":
            return [{"name": "mem-path", "type": "string"}] if arguments["path"].startswith("/objects/") else []
        case "query-cpus-fast":
            return [{"thread-id": thread, "qom-path": "/cpu"} for thread in options.get("threads", [os.getpid()])]
        case "query-memdev":
            return [{"id": "ram", "size": options["size"], "share": True}]
        case "query-memory-size-summary":
            return {"base-memory": options["size"], "plugged-memory": 0}
        case "query-status":
            return {"running": True, "status": "running"}
        case "query-named-block-nodes":
            return []
        case "human-monitor-command":
            return ""
    return {}


def serve(connection: socket.socket, options: dict[str, Any]) -> None:
    """Serve one client until it closes the connection."""
    with connection, connection.makefile("rwb", buffering=0) as stream:
        version = {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}
        stream.write(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n")
        decoder, text = json.JSONDecoder(), ""
        while data := connection.recv(65536):
            text += data.decode()
            while text.strip():
                try:
                    query, end = decoder.raw_decode(text.lstrip())
                except ValueError:
                    break
                text = text.lstrip()[end:]
                reply = {"return": answer(options, query["execute"], query.get("arguments", {}))}
                stream.write(json.dumps(reply | ({"id": query["id"]} if "id" in query else {})).encode() + b"\r\n")


def main(path: str, options: dict[str, Any]) -> None:
    """Print the pid of the serving process, and serve until killed."""
    uid = options.get("uid", os.getuid())
    os.setgid(uid)
    os.setuid(uid)
    memory = None
    if "map" in options:
        writable = options["map"] == "rw"
        with open(options["mem_path"], "r+b" if writable else "rb") as file:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            memory = mmap.mmap(file.fileno(), options["size"], mmap.MAP_SHARED, access)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(8)
    if options.get("server", "self") != "self" and (child := os.fork()):
        if options["server"] == "child":
            os.waitpid(child, 0)
        return
    print(os.getpid(), flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, options), daemon=True).start()
    assert memory is not None


signal.alarm(120)
main(sys.argv[1], json.loads(sys.argv[2]))
