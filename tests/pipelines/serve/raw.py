"""Raw bytes to a server: what no client library would send."""

import contextlib
import random
import socket
import time
from dataclasses import dataclass

_GOOD = b'{"inputs": "A document of a few words."}'


@dataclass(frozen=True)
class Attack:
    """Bytes to send, then `pause_s` of nothing, then `rest`; perhaps nobody reads the answer."""

    name: str
    data: bytes
    rest: bytes = b""
    pause_s: float = 0.0
    is_read: bool = True


def request(
    body: bytes = _GOOD,
    *headers: bytes,
    line: bytes = b"POST / HTTP/1.1",
    length: int | None = None,
) -> bytes:
    """Return a request as it goes over the wire."""
    head = [line, b"host: a", b"content-type: application/json", b"connection: close", *headers]
    if length is not None or body:
        head.append(b"content-length: %d" % (len(body) if length is None else length))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def attacks() -> list[Attack]:
    """Return what a server must survive."""
    steering = (b"x-request-id", b"x-session-id", b"serve_multiplexed_model_id",
                b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"traceparent",
                b"authorization", b"content-type", b"x-f\xe9")  # fmt: skip
    chunked = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    found = [
        *(Attack(f"{name!r}", request(_GOOD, name + b": \xff\xfe\xe9")) for name in steering),
        Attack("seconds", request(_GOOD, b"x-request-timeout-seconds: 0.0001")),
        Attack("a surrogate", request(b'{"inputs": "\\ud800"}')),
        Attack("no UTF-8", request(b'{"inputs": "\xff\xfe"}')),
        Attack("deep", request(b"[" * 100_000)),
        Attack("deep inside", request(b'{"inputs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001)),
        Attack("a long number", request(b'{"inputs": ' + b"9" * 10_000 + b"}")),
        Attack("not a number", request(b'{"inputs": "a", "timeout_s": NaN}')),
        Attack("infinity", request(b'{"inputs": "a", "timeout_s": Infinity}')),
        Attack("twice a name", request(b'{"inputs": "a", "inputs": 3}')),
        Attack("control characters", request(b'{"inputs": "\\u0000\\u0001\\u2028 a"}')),
        Attack("half a body", request(_GOOD, length=1000), is_read=False),
        Attack("300 MB declared", request(b"", length=300 * 2**20)),
        Attack("minus one", request(_GOOD, b"content-length: -1")),
        Attack("two lengths", request(_GOOD, b"content-length: 3")),
        Attack("a slow body", request(_GOOD[:9], length=len(_GOOD)), _GOOD[9:], 0.5),
        Attack("gzip", request(_GOOD, b"content-encoding: gzip")),
        Attack("a bomb of chunks", chunked + b"100000\r\n" + b"x" * 2**20 + b"\r\n0\r\n\r\n"),
        Attack("broken chunks", chunked + b"zz\r\nabc\r\n"),
        Attack("TRACE", request(b"", line=b"TRACE / HTTP/1.1")),
        Attack("no such method", request(b"", line=b"FETCH / HTTP/1.1")),
        Attack("a NUL in the path", request(b"", line=b"GET /a\x00b HTTP/1.1")),
        Attack("bytes in the path", request(b"", line=b"GET /\xff%ff%00/.. HTTP/1.1")),
        Attack("routes", request(b"", line=b"GET /-/routes HTTP/1.1")),
        Attack("HTTP/1.0", request(line=b"POST / HTTP/1.0")),
        Attack("HTTP/9", request(line=b"POST / HTTP/9.9")),
        Attack("no host", b"GET /health/live HTTP/1.1\r\n\r\n"),
        Attack("many headers", request(_GOOD, *(b"x-%d: a" % i for i in range(90)))),
        Attack("a long header", request(_GOOD, b"x-a: " + b"a" * 2**20)),
        Attack("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00"),
        Attack("nothing", b"", is_read=False),
        Attack("half a line", b"POST / HT", is_read=False),
        Attack("leaves at once", request(), is_read=False),
        Attack("a stream, left", request(b'{"inputs": "a b c", "stream": true}'), is_read=False),
    ]  # fmt: skip
    draw = random.Random(0)
    for number in range(40):
        broken = bytearray(request())
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(broken))
            broken[place : place + draw.randint(0, 2)] = draw.randbytes(draw.randint(0, 3))
        found.append(Attack(f"broken {number}", bytes(broken), is_read=number % 4 > 0))
    return found


def send(port: int, attack: Attack, timeout_s: float = 5.0) -> bytes:
    """Return what a server says to an attack, as far as it comes in time."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(attack.data)
            time.sleep(attack.pause_s)
            connection.sendall(attack.rest)
        if attack.is_read:
            connection.settimeout(1.0 if attack.name.startswith("broken") else timeout_s)
            with contextlib.suppress(OSError):
                while part := connection.recv(65536):
                    said += part
    return said


def complaint(attack: Attack, said: bytes) -> str | None:
    """Return what is wrong with an answer: a server error, or an error without our shape."""
    head, _, body = said.partition(b"\r\n\r\n")
    if not said or not head.startswith(b"HTTP/1."):
        return None
    status = int(head.split(b" ")[1])
    if status >= 500 and status not in (503, 504):
        return f"{attack.name}: {said[:300]!r}"
    # What is no HTTP at all never reaches the application.
    if status >= 400 and b"text/plain" not in head.lower() and body and b'"error"' not in body:
        return f"{attack.name}: {said[:300]!r}"
    return None
