#!/usr/bin/env python3
"""mvllm_lite: one OpenAI-compatible address in front of a fleet of vLLM servers.

    python mvllm_lite.py servers.toml        serve what the file describes
    python mvllm_lite.py demo                the whole thing against simulated servers
    python mvllm_lite.py check-config        read the file, ask every server, report
    python mvllm_lite.py --help              the rest

One file, standard library only, Python 3.11 and newer.  It reads forwards: a room uses names
of itself and of earlier rooms only.

     #  room          what it owns
    ──  ────────────  ─────────────────────────────────────────────────────────────────────
     0  front matter  this map, the imports, the limits that are not settings
     1  faults        every way to fail, as one table: status, blame, may it be retried
     2  messages      HTTP/1.1 heads, framing and content, as an intermediary must treat them
     3  exposition    the Prometheus text format, read and written
     4  settings      TOML to frozen dataclasses; complaints with file, line and key
     5  dialect       what vLLM and its clients say: paths, calls, events, metric names, errors
     6  fleet         the servers: health, load, requests in flight
     7  policies      which server is best for a call, and why
     8  plans         how a call is answered, step by step, retries included
     9  reports       what people and machines are shown
        ── waterline: above, pure functions and owned state; below, thin I/O ──
    10  wire          connections: buffers, deadlines, back-pressure, keep-alive pools
    11  exchange      one request, from its head to its last byte
    12  watch         health probes, metric scrapes, the settings file
    13  local         what the balancer answers itself
    14  balancer      assembly: listening, reloading, draining
    15  demo          simulated vLLM servers, so that everything runs on a laptop
    16  command line  arguments, environment, logging, exit codes

A request walks through the rooms like this.  `Balancer.serve` (14) reads a head from the
client's `Wire` (10) and parses it (2).  A local path goes to room 13, everything else becomes
an `Exchange` (11): the content is gathered and read as a `Call` (5), and `relay_plan` (8) says
step by step what to do.  Each `Relay` step names the server that the policy (7) ranked best in
the view of the fleet (6); the exchange sends the request there, holds the answer back until it
is certain that it is one, and then commits: from there on a `Pump` moves the bytes.  What went
wrong on the way is a `Fault` (1), and the plan decides whether another server is asked.

Words, one for each thing: a *server* is a vLLM process behind us, *fleet* is all of them, a
*client* talks to us.  A *wire* is one connection.  A *call* is what a request wants, a *view* a
frozen look at a server, a *ranking* the policy's judgement.  A *plan* yields *steps* and is
told the *outcome* of each.  A *lease* counts a request in flight.  *Commit* is the moment the
client is shown the first byte; no retry after that.
"""

# ════════════════════════════════════════════════════════════════════════════════════════════
#  0  front matter
# ════════════════════════════════════════════════════════════════════════════════════════════

from __future__ import annotations

import argparse
import asyncio
import bisect
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import signal
import socket
import ssl
import sys
import time
import tomllib
import urllib.parse
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from enum import Enum
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple, Protocol

__version__ = "0.1.0"
__all__ = ["main", "Balancer", "Settings", "parse_settings", "SimulatedServer"]

# Limits that nobody has needed to set.  Each names its precedent or its reason.
HEAD_LIMIT_BYTES = 64 * 1024  # a request's or response's head; what httptools and h11 take
CHUNK_LINE_LIMIT_BYTES = 4096  # a chunk-size line with its extensions, or the trailer section
INFORMATIONAL_LIMIT = 16  # 1xx responses before the real one; more is a loop
READ_BUFFER_BYTES = 256 * 1024  # what a wire holds for a reader before it stops reading
WRITE_SLICE_BYTES = 256 * 1024  # large content is written in slices of this, with back-pressure
HELD_LIMIT_BYTES = 64 * 1024  # how much of an answer is held back while it may yet be replaced
POOL_IDLE_S = 4.0  # vLLM closes idle connections after 5.000 s (uvicorn's default)
POOL_IDLE_LIMIT = 1024  # idle connections kept per server; more are closed
CLIENT_IDLE_S = 75.0  # a client's connection between two requests; nginx's keepalive_timeout
CLIENT_HEAD_S = 30.0  # from a head's first byte to its last
CLIENT_SILENCE_S = 60.0  # in the middle of a request's content; nginx's client_body_timeout
LINGER_S = 2.0  # for a client that is still sending what was refused; nginx's lingering_close
FETCH_LIMIT_BYTES = 8 * 1024 * 1024  # /metrics and /v1/models of a server; real ones are < 100 kB
LISTEN_BACKLOG = 4096  # connections the kernel queues for us; its own limit is net.core.somaxconn
SETTLE_S = 0.05  # between the two looks at a changed settings file that must agree
LOG_LINES_LIMIT = 10_000  # lines waiting for a stuck terminal or pipe; more are dropped
LABEL_SETS_LIMIT = 2000  # children of one metric family; what comes later is counted as "other"
REQUEST_ID_LIMIT = 200  # characters of a client's request id; a longer one is replaced

INFINITY = math.inf
log = logging.getLogger("mvllm_lite")


# ════════════════════════════════════════════════════════════════════════════════════════════
#  1  faults
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# Failure is data.  Whatever can go wrong with a request is a row of `Fault`; no other room
# decides about statuses, blame or retries with an `if` of its own.  Two exceptions carry a fault
# between rooms: `BadMessage` (what was said is wrong) and `PeerGone` (nobody is there to say it).


class Blame(Enum):
    """Whose failure it is: only SERVER counts against a server's health.  Also names the two
    sides of the balancer."""

    CLIENT = "client"
    SERVER = "server"
    NOBODY = "nobody"


class Retry(Enum):
    """What a plan may do about a fault, as long as nothing was shown to the client."""

    NEVER = "never"  # the answer stands
    AT_ONCE = "at once"  # no work was begun or it is lost: the next server, without a pause
    LATER = "later"  # the next server, after a growing pause
    ELSEWHERE = "elsewhere"  # only a server that was not asked yet
    IF_ALLOWED = "if allowed"  # the work may still be running there: only where settings say so


class Fault(Enum):
    """One way to fail: (status to answer, blame, retry, error type in vLLM's spelling).

    To add a fault: add a row; its lower-case name is its label in metrics, logs and the
    `X-MVLLM-Error` field.
    """

    # The client's request, refused by us.
    BAD_REQUEST = 400, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    NOT_SERVED = 404, Blame.CLIENT, Retry.NEVER, "NotFoundError"
    UNKNOWN_MODEL = 404, Blame.CLIENT, Retry.NEVER, "NotFoundError"
    BAD_METHOD = 405, Blame.CLIENT, Retry.NEVER, "MethodNotAllowedError"
    CLIENT_SLOW = 408, Blame.CLIENT, Retry.NEVER, "RequestTimeoutError"
    CONTENT_TOO_LARGE = 413, Blame.CLIENT, Retry.NEVER, "ContentTooLargeError"
    BAD_EXPECTATION = 417, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    HEAD_TOO_LARGE = 431, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    CLIENT_GONE = 499, Blame.CLIENT, Retry.NEVER, "ClientClosedRequest"  # nginx's number; logs only
    UNKNOWN_CODING = 501, Blame.CLIENT, Retry.NEVER, "NotImplementedError"
    BAD_VERSION = 505, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    # No server to ask.
    NO_SERVER = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    STOPPING = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    # A server was asked and did not answer.
    STALE = 502, Blame.NOBODY, Retry.AT_ONCE, "BadGatewayError"  # an idle connection it had closed
    CONNECT_FAILED = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    CONNECT_TIMEOUT = 504, Blame.SERVER, Retry.AT_ONCE, "GatewayTimeoutError"
    SERVER_GONE = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    BAD_ANSWER = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    SERVER_SILENT = 504, Blame.SERVER, Retry.IF_ALLOWED, "GatewayTimeoutError"
    # A server answered, with a failure of its own; it is shown as it came if nobody does better.
    SERVER_ERROR = 502, Blame.SERVER, Retry.LATER, "BadGatewayError"
    SERVER_BUSY = 429, Blame.NOBODY, Retry.ELSEWHERE, "RateLimitError"
    STREAM_FAILED = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    # Our own mistake.
    INTERNAL = 500, Blame.NOBODY, Retry.NEVER, "InternalServerError"

    def __init__(self, status: int, blame: Blame, retry: Retry, type_name: str) -> None:
        self.status, self.blame, self.retry, self.type_name = status, blame, retry, type_name
        self.label = self._name_.lower()

    def __new__(cls, *row: Any) -> Fault:
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)  # rows that are alike are still different faults
        return member


class BadMessage(Exception):
    """A message, or a part of one, that breaks a rule; `str()` says which, and what was found."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class PeerGone(Exception):
    """The other end of a wire closed it, lost it or stayed silent too long.

    `clean` is true for an orderly close (FIN), which ends a close-delimited message properly.
    """

    def __init__(self, fault: Fault, text: str, clean: bool = False) -> None:
        super().__init__(text)
        self.fault, self.clean = fault, clean


# ════════════════════════════════════════════════════════════════════════════════════════════
#  2  messages
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# RFC 9110 and RFC 9112 for a gateway.  A head is bytes in, a frozen value out, and bytes again;
# nothing here knows a socket.  Heads are decoded as latin-1, which keeps every byte.  Where the
# RFCs leave a choice, a request is refused rather than repaired: two readers of one message must
# never disagree.  Content is always framed anew, so no ambiguity of the sender's survives.

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 §5.6.2
TEXT = r"[\t\x20-\x7e\x80-\xff]*+"  # field-value and reason-phrase bytes, §5.5
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) HTTP/(\d)\.(\d)")
STATUS_LINE = re.compile(rf"HTTP/(\d)\.(\d) (\d\d\d)(?: ({TEXT}))?")
FIELD_LINE = re.compile(rf"{TOKEN}:{TEXT}")
FIELD_LINES = re.compile(rf"(?:{TOKEN}:{TEXT}\r\n)*+")
LENGTH = re.compile(r"\d{1,18}")
HOST = re.compile(r"[A-Za-z0-9.\-_~%!$&'()*+;=]*(?:\[[0-9A-Fa-f:.%]+\])?(?::\d*)?")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
LAST_CHUNK = b"0\r\n\r\n"

# Fields that speak of one connection, not of the message (RFC 9110 §7.6.1), and `Trailer`, since
# trailers are not passed on.  `Proxy-Authorization` is meant for us or nobody.
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-connection te trailer transfer-encoding upgrade"
    " proxy-authenticate proxy-authorization".split()
)


class Fields:
    """The field section of a head: every line in order, and a look-up by lower-case name.

    `values` joins the lines of a repeated field with a comma (RFC 9110 §5.3), so that a second
    `Content-Length` or `Host` reads as a list, which is not a valid value of either.
    """

    __slots__ = ("lines", "values")

    def __init__(self, lines: list[tuple[str, str, str]], values: dict[str, str]) -> None:
        self.lines = lines  # (lower-case name, name as sent, value)
        self.values = values

    def get(self, key: str, default: str = "") -> str:
        return self.values.get(key, default)

    def tokens(self, key: str) -> frozenset[str]:
        """The members of a list-valued field, in lower case."""
        value = self.values.get(key)
        if value is None:
            return frozenset()
        return frozenset(t.strip().lower() for t in value.split(",") if t.strip())


class RequestHead(NamedTuple):
    """A request's first line and fields; `minor` is the x of HTTP/1.x."""

    method: str
    target: str
    minor: int
    fields: Fields

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def persists(self) -> bool:
        """Whether the client wants to keep the connection, RFC 9112 §9.3."""
        return connection_persists(self.minor, self.fields)


class ResponseHead(NamedTuple):
    """A response's status line and fields."""

    status: int
    reason: str
    minor: int
    fields: Fields

    @property
    def persists(self) -> bool:
        return connection_persists(self.minor, self.fields)

    @property
    def is_event_stream(self) -> bool:
        kind = self.fields.get("content-type").partition(";")[0]
        return kind.strip().lower() == "text/event-stream"


class Framing(NamedTuple):
    """How the end of a message's content is found: by `length`, by `chunked` coding, or by the
    `close` of the connection (responses only)."""

    kind: str
    length: int = 0


NO_CONTENT = Framing("length", 0)
CHUNKED = Framing("chunked")
UNTIL_CLOSE = Framing("close")


def shown(text: str, limit: int = 60) -> str:
    """`text` as it may stand in an error message: quoted, escaped, short."""
    return ascii(text if len(text) <= limit else text[:limit] + "…").replace("\\u2026", "…")


def connection_persists(minor: int, fields: Fields) -> bool:
    if "connection" not in fields.values:
        return minor >= 1
    options = fields.tokens("connection")
    return "close" not in options and (minor >= 1 or "keep-alive" in options)


def parse_fields(block: str, what: str) -> Fields:
    """The field lines after a first line; each must end in CRLF.  Raises BadMessage."""
    if not FIELD_LINES.fullmatch(block):  # one pass over good heads; find the bad line otherwise
        bad = next(line for line in block.split("\r\n") if not FIELD_LINE.fullmatch(line))
        raise BadMessage(
            Fault.BAD_REQUEST,
            f"a field line of the {what} is {shown(bad)}, expected 'Name: value'"
            " without control characters, folding or a space before the colon",
        )
    lines, values = [], {}
    for line in block.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        key, value = name.lower(), value.strip(" \t")
        lines.append((key, name, value))
        values[key] = f"{values[key]}, {value}" if key in values else value
    return Fields(lines, values)


def parse_request_head(raw: bytes) -> RequestHead:
    """A request's head, up to and with its empty line (RFC 9112 §3).  Raises BadMessage."""
    first, _, block = raw[:-2].decode("latin-1").partition("\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if line is None:
        text = f"the request line is {shown(first)}, expected 'METHOD target HTTP/1.1'"
        raise BadMessage(Fault.BAD_REQUEST, text)
    method, target, major, minor = line.groups()
    if major != "1":
        text = f"the request is HTTP/{major}.{minor}, only HTTP/1.0 and HTTP/1.1 are spoken here"
        raise BadMessage(Fault.BAD_VERSION, text)
    fields = parse_fields(block, "request")
    host = fields.values.get("host")
    if host is None and minor != "0":
        raise BadMessage(Fault.BAD_REQUEST, "the request has no Host field")
    if host and not HOST.fullmatch(host):
        raise BadMessage(Fault.BAD_REQUEST, f"Host is {shown(host)}, expected one host[:port]")
    return RequestHead(method, origin_form(method, target), int(minor != "0"), fields)


def origin_form(method: str, target: str) -> str:
    """The target as path and query; an absolute-form target loses scheme and authority, §3.2."""
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return target
    scheme, found, rest = target.partition("://")
    if found and scheme.lower() in ("http", "https"):
        _, slash, path = rest.partition("/")
        return slash + path or "/"
    text = f"the request target is {shown(target)}, expected a path that begins with '/'"
    raise BadMessage(Fault.BAD_REQUEST, text)


def parse_response_head(raw: bytes) -> ResponseHead:
    """A response's head, up to and with its empty line (RFC 9112 §4).  Raises BadMessage."""
    first, _, block = raw[:-2].decode("latin-1").partition("\r\n")
    line = STATUS_LINE.fullmatch(first)
    if line is None or line[1] != "1":
        text = f"its status line is {shown(first)}, expected 'HTTP/1.1 status reason'"
        raise BadMessage(Fault.BAD_ANSWER, text)
    try:
        fields = parse_fields(block, "response")
    except BadMessage as bad:
        raise BadMessage(Fault.BAD_ANSWER, str(bad)) from None
    return ResponseHead(int(line[3]), line[4] or "", int(line[2] != "0"), fields)


def request_framing(head: RequestHead) -> Framing:
    """How a request's content is framed, RFC 9112 §6.  Anything that two readers might take
    differently is refused: both fields, lists of lengths, codings other than `chunked`."""
    coding = head.fields.values.get("transfer-encoding")
    length = head.fields.values.get("content-length")
    if coding is not None:
        if length is not None or head.minor == 0:
            why = "with Content-Length" if length is not None else "in HTTP/1.0"
            raise BadMessage(Fault.BAD_REQUEST, f"Transfer-Encoding {why} is ambiguous")
        if coding.lower() != "chunked":
            text = f"Transfer-Encoding is {shown(coding)}, only 'chunked' is understood"
            raise BadMessage(Fault.UNKNOWN_CODING, text)
        return CHUNKED
    if length is None:
        return NO_CONTENT
    return Framing("length", parse_length(length, Fault.BAD_REQUEST))


def response_framing(head: ResponseHead, method: str) -> Framing:
    """How a response's content is framed, RFC 9112 §6.3, rules in the RFC's order."""
    if method == "HEAD" or head.status < 200 or head.status in (204, 304):
        return NO_CONTENT
    coding = head.fields.values.get("transfer-encoding")
    length = head.fields.values.get("content-length")
    if coding is not None:
        if length is not None or coding.lower() != "chunked":
            text = f"its Transfer-Encoding is {shown(coding)}" + " with Content-Length" * bool(length)
            raise BadMessage(Fault.BAD_ANSWER, text)
        return CHUNKED
    if length is not None:
        return Framing("length", parse_length(length, Fault.BAD_ANSWER))
    return UNTIL_CLOSE


def parse_length(value: str, fault: Fault) -> int:
    if not (LENGTH.fullmatch(value) and value.isascii()):
        raise BadMessage(fault, f"Content-Length is {shown(value)}, expected one number of bytes")
    return int(value)


class Decoder(Protocol):
    """Finds the content in the bytes of a message.  `feed` is called once per piece received and
    gives the content in it, maybe empty; it raises BadMessage when the framing is broken."""

    done: bool  # the last byte of the content was seen
    rest: bytes  # what came after it
    verbatim: bool  # the last piece was one whole, plain chunk: it may be sent on as it is
    until_close: bool  # the content ends where the connection does; who sees that sets `done`

    def feed(self, data: bytes) -> bytes: ...


class LengthDecoder:
    """Content of a known length."""

    __slots__ = ("left", "done", "rest")
    verbatim = until_close = False

    def __init__(self, length: int) -> None:
        self.left, self.done, self.rest = length, length == 0, b""

    def feed(self, data: bytes) -> bytes:
        size = len(data)
        if size < self.left:
            self.left -= size
            return data
        if size > self.left:
            data, self.rest = data[: self.left], data[self.left :]
        self.left, self.done = 0, True
        return data


class CloseDecoder:
    """Content that ends where the connection does."""

    __slots__ = ("done",)
    rest = b""
    verbatim, until_close = False, True

    def __init__(self) -> None:
        self.done = False

    def feed(self, data: bytes) -> bytes:
        return data


class ChunkedDecoder:
    """The chunked transfer coding, RFC 9112 §7.1.  Extensions are ignored, trailers dropped."""

    __slots__ = ("done", "rest", "verbatim", "_pending", "_left", "_trailer_left")
    until_close = False

    def __init__(self) -> None:
        self.done, self.rest, self.verbatim = False, b"", False
        self._pending = b""  # an incomplete size line, chunk end or trailer line
        self._left = 0  # data bytes of the current chunk to come, and 2 for its CRLF
        self._trailer_left = 0  # once the last chunk was seen: bytes its trailers may still take

    def feed(self, data: bytes) -> bytes:
        if not (self._pending or self._left or self._trailer_left):
            # vLLM sends one event as one chunk in one segment: by far the most frequent piece.
            # Passing it on as it came saves taking it apart and building it again.
            line = CHUNK_SIZE.match(data)
            if line is not None and (size := int(line[1], 16)):
                start = line.end()
                if start + size + 2 == len(data) and data.endswith(b"\r\n"):
                    self.verbatim = line.end(1) + 2 == start  # no extension
                    return data[start:-2]
        self.verbatim = False
        return self._take_apart(self._pending + data)

    def _take_apart(self, data: bytes) -> bytes:
        """Every chunk in `data`; what is incomplete stays in `_pending`."""
        content, at, self._pending = [], 0, b""
        while at < len(data) and not self.done:
            if self._left > 2:
                taken = data[at : at + self._left - 2]
                content.append(taken)
                at, self._left = at + len(taken), self._left - len(taken)
            elif self._left:
                at = self._chunk_end(data, at)
            elif self._trailer_left:
                at = self._trailer(data, at)
            else:
                at = self._size_line(data, at)
            if self._pending:
                break
        if self.done:
            self.rest = data[at:]
        return b"".join(content)

    def _size_line(self, data: bytes, at: int) -> int:
        line = CHUNK_SIZE.match(data, at)
        if line is None:
            if data.find(b"\n", at) >= 0 or len(data) - at > CHUNK_LINE_LIMIT_BYTES:
                bad = shown(data[at : at + 20].decode("latin-1"))
                raise BadMessage(Fault.BAD_REQUEST, f"a chunk begins with {bad}, expected its size")
            self._pending = data[at:]
            return at
        size = int(line[1], 16)
        if size:
            self._left = size + 2
        else:
            self._trailer_left = CHUNK_LINE_LIMIT_BYTES
        return line.end()

    def _chunk_end(self, data: bytes, at: int) -> int:
        end = data[at : at + 2]
        if not b"\r\n".startswith(end):
            raise BadMessage(Fault.BAD_REQUEST, f"a chunk ends with {end!r}, expected CRLF")
        if len(end) < 2:
            self._pending = end
            return at
        self._left = 0
        return at + 2

    def _trailer(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if (len(data) if end < 0 else end) - at >= self._trailer_left:
            raise BadMessage(Fault.BAD_REQUEST, "the trailer section is too long")
        if end < 0:
            self._pending = data[at:]
            return at
        self.done = end == at
        self._trailer_left -= end - at
        return end + 2


def decoder_for(framing: Framing) -> Decoder:
    match framing.kind:
        case "chunked":
            return ChunkedDecoder()
        case "close":
            return CloseDecoder()
    return LengthDecoder(framing.length)


def encode_chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def nominated(fields: Fields) -> frozenset[str]:
    """Fields that must not be passed on: hop-by-hop ones, and those Connection names."""
    if "connection" not in fields.values:
        return HOP_BY_HOP
    return HOP_BY_HOP | fields.tokens("connection")


def local_location(location: str, authority: str, prefix: str) -> str:
    """A redirect's target as the client can follow it: a server that redirects to itself means a
    path on our address (RFC 9110 §10.2.2 allows a reference without authority)."""
    parts = urllib.parse.urlsplit(location)
    if parts.netloc.lower() != authority:
        return location
    path = parts.path.removeprefix(prefix) or "/"
    return urllib.parse.urlunsplit(("", "", path, parts.query, parts.fragment))


def upgrade_wanted(head: RequestHead) -> str:
    """The protocol a client asks to change to (`websocket`), or ''."""
    if head.minor == 0 or "upgrade" not in head.fields.tokens("connection"):
        return ""
    return head.fields.get("upgrade")


def forward_fields(head: RequestHead, added: Iterable[tuple[str, str]]) -> str:
    """The field lines of a request as sent to servers, without Host and framing: end-to-end
    fields in their order and number, then `added`, which replace any of the same name.  Made
    once per request; `forward_request` is called for each attempt."""
    added = list(added)
    dropped = nominated(head.fields).union(
        ("host", "content-length", "expect"), (name.lower() for name, _ in added)
    )
    lines = [f"{name}: {value}\r\n" for key, name, value in head.fields.lines if key not in dropped]
    lines += [f"{name}: {value}\r\n" for name, value in added]
    return "".join(lines)


def forward_request(
    head: RequestHead, target: str, authority: str, fields: str, length: int | None
) -> bytes:
    """A request's head for one server.  `length` is of the content, None where there is none."""
    if length is None and head.method in ("POST", "PUT", "PATCH"):
        length = 0  # RFC 9110 §8.6: these say so
    framed = f"Content-Length: {length}\r\n" if length is not None else ""
    if protocol := upgrade_wanted(head):
        framed += f"Connection: upgrade\r\nUpgrade: {protocol}\r\n"
    text = f"{head.method} {target} HTTP/1.1\r\nHost: {authority}\r\n{fields}{framed}\r\n"
    return text.encode("latin-1")


def return_response(
    head: ResponseHead,
    request: RequestHead,
    framing: Framing,
    persists: bool,
    added: Iterable[tuple[str, str]] = (),
    replaced: frozenset[str] = frozenset(),
) -> bytes:
    """A response's head as sent to the client, with `added` fields in place of any of the same
    name and of those `replaced`.  `framing` is how we send the content: `close` for an HTTP/1.0
    client that could not find its end otherwise."""
    added = list(added)
    dropped = nominated(head.fields).union(replaced, (name.lower() for name, _ in added))
    if framing.kind != "length":
        dropped |= {"content-length"}
    lines = [f"HTTP/1.1 {head.status} {head.reason}\r\n"]
    lines += [f"{name}: {value}\r\n" for key, name, value in head.fields.lines if key not in dropped]
    lines += [f"{name}: {value}\r\n" for name, value in added]
    if head.status == 101:
        lines.append(f"Connection: upgrade\r\nUpgrade: {head.fields.get('upgrade')}\r\n")
    elif framing.kind == "chunked":
        lines.append("Transfer-Encoding: chunked\r\n")
    if not persists:
        lines.append("Connection: close\r\n")
    elif request.minor == 0:
        lines.append("Connection: keep-alive\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("latin-1")


# CORS (the Fetch standard): fields that speak of it; ours replace those of a server.
CORS_FIELDS = frozenset(
    "access-control-" + name
    for name in "allow-origin allow-credentials allow-methods allow-headers expose-headers max-age".split()
)


def cors_fields(head: RequestHead, origins: Iterable[str]) -> list[tuple[str, str]]:
    """What lets a web page of an allowed origin read the answer; [] for others."""
    origin = head.fields.get("origin")
    if not origin or not ("*" in origins or origin in origins):
        return []
    allowed = [("Access-Control-Allow-Origin", "*" if "*" in origins else origin)]
    if "*" not in origins:
        allowed.append(("Vary", "Origin"))
    allowed.append(("Access-Control-Expose-Headers", "X-Request-Id, X-MVLLM-Server, Retry-After"))
    return allowed


def is_preflight(head: RequestHead) -> bool:
    values = head.fields.values
    return head.method == "OPTIONS" and "access-control-request-method" in values


def preflight_fields(head: RequestHead) -> list[tuple[str, str]]:
    """The answer to a preflight: what was asked for is allowed.  The names are repeated because
    `*` would not cover Authorization."""
    wanted = head.fields.get("access-control-request-headers")
    return [
        ("Access-Control-Allow-Methods", head.fields.get("access-control-request-method")),
        *([("Access-Control-Allow-Headers", wanted)] if wanted else []),
        ("Access-Control-Max-Age", "3600"),
    ]


def own_response(
    status: int,
    request: RequestHead | None,
    content: bytes,
    persists: bool,
    fields: Iterable[tuple[str, str]] = (),
) -> bytes:
    """A whole response of the balancer's own; to HEAD only its head."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in fields]
    if status != 204:
        lines.append(f"Content-Length: {len(content)}\r\n")
    if not persists:
        lines.append("Connection: close\r\n")
    elif request is not None and request.minor == 0:
        lines.append("Connection: keep-alive\r\n")
    head = ("".join(lines) + "\r\n").encode("latin-1")
    return head if request is not None and request.method == "HEAD" else head + content



# ════════════════════════════════════════════════════════════════════════════════════════════
#  3  exposition
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# The Prometheus text format 0.0.4, both directions.  Reading is called twice a second for each
# server on pages of 50 to 80 kB, so it looks only at the families it was asked for.

SAMPLE_LINE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)"  # name
    r'(?:\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\})?'  # {label="value",…}
    r"[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*(?:#.*)?\r?"  # value, timestamp, exemplar
)
LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
ESCAPE = re.compile(r"\\(.)")


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


def parse_samples(page: str, names: Iterable[str] | None = None) -> Iterator[Sample]:
    """The samples of the named metrics, or of all.  Comments and malformed lines are skipped: one
    bad line must not hide the load of a server."""
    lines = page.split("\n") if names is None else named_lines(page, names)
    for line in lines:
        match = SAMPLE_LINE.fullmatch(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        labels = {k: unescape(v) for k, v in LABEL.findall(match[2] or "")}
        yield Sample(match[1], labels, value)


def named_lines(page: str, names: Iterable[str]) -> Iterator[str]:
    """The lines of `page` that begin with one of the names; a search, so that the other 900 lines
    of a vLLM page cost nothing."""
    page = "\n" + page
    for name in names:
        start = "\n" + name
        at = page.find(start)
        while at >= 0:
            end = page.find("\n", at + 1)
            line = page[at + 1 : end if end >= 0 else None]
            if line[len(name) : len(name) + 1] in ("{", " ", "\t"):
                yield line
            at = page.find(start, at + 1)


def unescape(value: str) -> str:
    if "\\" not in value:
        return value
    return ESCAPE.sub(lambda m: "\n" if m[1] == "n" else m[1], value)


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Family:
    """A metric family: its children are kept by their label values, at most LABEL_SETS_LIMIT of
    them; the rest are counted together as "other", so that no client can fill our memory."""

    kind = ""

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> None:
        self.name, self.help_text, self.labels = name, help_text, labels
        self.children: dict[tuple[str, ...], Any] = {}

    def key(self, values: tuple[str, ...]) -> tuple[str, ...]:
        if values in self.children or len(self.children) < LABEL_SETS_LIMIT:
            return values
        return ("other",) * len(self.labels)

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """(suffix, label values, value) of each line to write."""
        for values, child in self.children.items():
            yield "", values, child


class Counter(Family):
    kind = "counter"

    def add(self, *values: str, amount: float = 1) -> None:
        key = self.key(values)
        self.children[key] = self.children.get(key, 0) + amount


class Gauge(Family):
    kind = "gauge"

    def set(self, value: float, *values: str) -> None:
        self.children[self.key(values)] = value


class Histogram(Family):
    """Children are [count per bucket …, count above the last, sum]."""

    kind = "histogram"

    def __init__(
        self, name: str, help_text: str, labels: tuple[str, ...], buckets: tuple[float, ...]
    ) -> None:
        super().__init__(name, help_text, labels)
        self.buckets = buckets

    def child(self, *values: str) -> list[float]:
        """The child for these label values; hold it to observe many values cheaply."""
        key = self.key(values)
        if key not in self.children:
            self.children[key] = [0] * (len(self.buckets) + 1) + [0.0]
        return self.children[key]

    def observe(self, child: list[float], value: float) -> None:
        child[bisect.bisect_left(self.buckets, value)] += 1
        child[-1] += value

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        for values, child in self.children.items():
            count = 0.0
            for bound, in_bucket in zip((*self.buckets, INFINITY), child):
                count += in_bucket
                yield "_bucket", (*values, written(bound)), count
            yield "_sum", values, child[-1]
            yield "_count", values, count


def written(value: float) -> str:
    """As Prometheus reads it; whole numbers without a fraction."""
    if value == INFINITY:
        return "+Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def expose(families: Iterable[Family]) -> str:
    """The text page of these families."""
    out = []
    for family in families:
        out.append(f"# HELP {family.name} {family.help_text}\n# TYPE {family.name} {family.kind}\n")
        for suffix, values, value in family.samples():
            names = (*family.labels, "le") if suffix == "_bucket" else family.labels
            labels = ",".join(f'{n}="{escape(v)}"' for n, v in zip(names, values))
            out.append(f"{family.name}{suffix}{f'{{{labels}}}' if labels else ''} {written(value)}\n")
    return "".join(out)


# ════════════════════════════════════════════════════════════════════════════════════════════
#  4  settings
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# One declaration per setting: its key, default, check, unit and meaning stand in one place, and
# the file, the environment, the command line and servers.example.toml all follow from it.  A bad
# value is never half used: everything wrong is gathered and reported at once.
#
# To add a setting: add a field with `setting(…)` to ServerSettings or Settings, and its line to
# servers.example.toml (a test compares the two).

NO_DEFAULT: Any = object()
POLICY_NAMES = ("least", "mvllm", "vllm_router")  # the rows of POLICIES (a test compares the two)


def setting(
    default: Any, check: Callable[[Any], Any], meaning: str, *, env: str = "", restart: bool = False
) -> Any:
    """A dataclass field that is a setting.  `check` gives the clean value or raises ValueError
    with what was expected; `env` is an environment variable that may give it; `restart` says that
    a change takes a restart."""
    metadata = {"check": check, "meaning": meaning, "env": env, "restart": restart}
    if default is NO_DEFAULT:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def whole(low: int, high: int | None = None) -> Callable[[Any], int]:
    """A whole number; as mvllm does, '5' and 5.0 are taken for 5."""

    def check(value: Any) -> int:
        number = as_number(value)
        if number is None or number != int(number) or not low <= number <= (high or number):
            top = f" to {high}" if high else " or more"
            raise ValueError(f"a whole number, {low}{top}")
        return int(number)

    return check


def decimal(low: float, high: float = INFINITY) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = as_number(value)
        if number is None or not low <= number <= high:
            top = f" to {high}" if high < INFINITY else " or more"
            raise ValueError(f"a number, {low}{top}")
        return number

    return check


def as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("true or false")


def string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text in quotes")
    return value


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of these words; the case of letters does not matter."""

    def check(value: Any) -> str:
        for choice in choices:
            if isinstance(value, str) and value.lower() == choice.lower():
                return choice
        raise ValueError("one of " + ", ".join(choices))

    return check


def list_of(check_one: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    def check(value: Any) -> tuple:
        try:
            if not isinstance(value, list):
                raise ValueError("…")
            return tuple(check_one(item) for item in value)
        except ValueError as expected:
            raise ValueError(f"a list like [{expected}]") from None

    return check


def base_url(value: Any) -> str:
    """A server's URL without trailing slash.  A trailing /v1 is taken off: people copy it from
    their client's base_url, and our paths begin with it anyway."""
    expected = ValueError("a URL like http://10.0.0.1:8000")
    try:
        parts = urllib.parse.urlsplit(value if isinstance(value, str) else "")
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise expected from None
    if not good or parts.query or parts.fragment or "@" in parts.netloc or not value.isascii():
        raise expected
    if re.search(r"[\x00-\x20\x7f\\]", value):
        raise expected
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


@dataclasses.dataclass(frozen=True, slots=True)
class ServerSettings:
    """One entry of the list of servers."""

    url: str = setting(NO_DEFAULT, base_url, "where the server listens")
    max_concurrent_requests: int = setting(
        3, whole(1), "requests it runs at once at a good pace; its share of the load follows from it"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set.  `servers` and `aliases` are tables of their own in the file;
    every other field is a key of [config].  Durations are in seconds."""

    servers: tuple[ServerSettings, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    host: str = setting("0.0.0.0", string, "address to listen on", env="HOST", restart=True)
    port: int = setting(8888, whole(0, 65535), "port to listen on", env="PORT", restart=True)
    policy: str = setting("least", one_of(*POLICY_NAMES), "how a server is chosen")
    default_model: str = setting("", string, "model of requests that name none")

    request_timeout: float = setting(
        600.0, decimal(0.001), "silence of a server that ends a request", env="REQUEST_TIMEOUT"
    )
    connect_timeout: float = setting(5.0, decimal(0.001), "time for a connection to a server")
    max_retries: int = setting(3, whole(0), "more attempts after the first")
    retry_delay: float = setting(0.1, decimal(0), "first pause between attempts; it doubles")
    retry_delay_max: float = setting(2.0, decimal(0), "longest pause between attempts")
    retry_statuses: tuple[int, ...] = setting(
        (502, 503, 504), list_of(whole(500, 599)), "answers that are asked for again elsewhere"
    )
    retry_timed_out: bool = setting(
        False, truth, "run a request again that met request_timeout; it may run twice"
    )
    max_body_bytes: int = setting(128 * 1024 * 1024, whole(1), "longest request content")

    metrics_interval: float = setting(0.5, decimal(0.05), "pause between two looks at /metrics")
    models_interval: float = setting(30.0, decimal(0.1), "age at which a model list is renewed")
    enable_active_health_check: bool = setting(True, truth, "ask servers for their health")
    health_check_interval: float = setting(
        10.0, decimal(0.05), "pause between two checks of a server", env="HEALTH_CHECK_INTERVAL"
    )
    health_check_timeout: float = setting(5.0, decimal(0.001), "time for one check")
    health_check_window_size: int = setting(10, whole(1), "checks that are looked at together")
    health_check_min_success_rate: float = setting(
        0.8, decimal(0, 1), "share of good checks in the window"
    )
    health_check_max_response_time: float = setting(
        10.0, decimal(0.001), "mean time of the checks in the window"
    )
    health_check_consecutive_failures: int = setting(
        3, whole(1), "failed checks in a row that take a server out"
    )
    health_check_consecutive_successes: int = setting(
        1, whole(1), "good checks in a row that bring it back"
    )
    failure_threshold: int = setting(2, whole(1), "failed requests in a row that take it out")
    auto_recovery_threshold: float = setting(
        60.0, decimal(0), "without active checks: time until it is tried again"
    )

    config_reload_interval: float = setting(
        3.0, decimal(0.05), "pause between two looks at this file", env="CONFIG_RELOAD_INTERVAL"
    )
    drain_timeout: float = setting(30.0, decimal(0), "time for running answers when stopping")
    server_header: bool = setting(True, truth, "name the server in X-MVLLM-Server")
    cors_allowed_origins: tuple[str, ...] = setting(
        ("*",), list_of(string), "web origins that may call; [] leaves CORS to the servers"
    )
    log_level: str = setting(
        "INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"), "what is logged", env="LOG_LEVEL"
    )
    log_to_console: bool = setting(
        False, truth, "a line for each request, also on a terminal", env="LOG_TO_CONSOLE"
    )
    show_models: bool = setting(
        False, truth, "name its models when a server's state changes", env="SHOW_MODELS"
    )


CONFIG_FIELDS = {f.name: f for f in dataclasses.fields(Settings) if "check" in f.metadata}
SERVER_FIELDS = {f.name: f for f in dataclasses.fields(ServerSettings)}

# Keys that older files may hold.  They never had an effect, or have none here; say so once.
OLD_KEYS = {
    "weight": "weights were a setting of mvllm's first version; max_concurrent_requests decides",
    "advanced": "no version of mvllm ever read this table",
}


class Complaint(NamedTuple):
    """Something wrong in the settings; `line` is 0 where it cannot be told."""

    source: str
    line: int
    key: str
    text: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        return f"{place}: {self.key}: {self.text}" if self.key else f"{place}: {self.text}"


class SettingsError(Exception):
    """The settings cannot be used; `complaints` has everything that is wrong."""

    def __init__(self, complaints: list[Complaint]) -> None:
        super().__init__("\n".join(map(str, complaints)))
        self.complaints = complaints


def parse_settings(
    toml: str, source: str = "servers.toml", overrides: Mapping[str, tuple[Any, str]] | None = None
) -> tuple[Settings, list[Complaint]]:
    """The settings in a TOML text, and warnings about keys that mean nothing.

    `overrides` maps a key of [config] to (value, where it came from); they win over the text, and
    so does "servers", given as a list of tables.  Raises SettingsError with all complaints.
    """
    try:
        document = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([toml_complaint(source, str(error))]) from None
    return SettingsReader(document, toml, source).read(overrides or {})


def toml_complaint(source: str, text: str) -> Complaint:
    """tomllib tells the place in words: 'Expected … (at line 3, column 4)'."""
    found = re.search(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", text)
    if found is None:
        return Complaint(source, 0, "", f"not valid TOML: {text}")
    where = "" if found[2] else " at the end of the file"
    return Complaint(source, int(found[2] or 0), "", f"not valid TOML: {found[1].lower()}{where}")


class SettingsReader:
    """Walks a TOML document and gathers values, complaints and warnings."""

    def __init__(self, document: dict[str, Any], toml: str, source: str) -> None:
        self.document, self.toml, self.source = document, toml, source
        self.errors: list[Complaint] = []
        self.warnings: list[Complaint] = []

    def read(self, overrides: Mapping[str, tuple[Any, str]]) -> tuple[Settings, list[Complaint]]:
        document = self.document
        self.unknown_keys(document, ("servers", "config", "aliases"), ())
        config = self.table(document.get("config", {}), "config")
        self.unknown_keys(config, CONFIG_FIELDS, ("config",))
        values = {
            key: self.checked(CONFIG_FIELDS[key], value, "config", key)
            for key, value in config.items()
            if key in CONFIG_FIELDS
        }
        for key, (value, origin) in overrides.items():
            if key != "servers":
                values[key] = self.checked(CONFIG_FIELDS[key], value, key, origin=origin)
        values["servers"] = self.servers(overrides.get("servers"))
        values["aliases"] = self.aliases()
        if self.errors:
            raise SettingsError(self.errors)
        return Settings(**values), self.warnings

    def servers(self, override: tuple[Any, str] | None) -> tuple[ServerSettings, ...]:
        """`[servers] servers = [{…}]` as in mvllm, or `[[servers]]`."""
        entries = self.document.get("servers")
        if isinstance(entries, dict):
            self.unknown_keys(entries, ("servers",), ("servers",))
            entries = entries.get("servers")
        if override is not None:
            entries = override[0]
        if entries is None:  # an empty file is a half-written one, not a wish for no servers
            self.complain(("servers",), None, "a list of servers; servers = [] for none")
            return ()
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            self.complain(("servers",), entries, "a list of tables like { url = \"http://…\" }")
            return ()
        servers: dict[str, ServerSettings] = {}
        for i, entry in enumerate(entries):
            server = self.server(i, entry, override[1] if override else "")
            if server is not None and server.url in servers:
                self.complain(("servers", i, "url"), entry["url"], "each server once")
            elif server is not None:
                servers[server.url] = server
        return tuple(servers.values())

    def server(self, i: int, entry: dict[str, Any], origin: str) -> ServerSettings | None:
        self.unknown_keys(entry, SERVER_FIELDS, ("servers", i))
        if "url" not in entry:
            self.complain(("servers", i, "url"), None, "the server's URL")
            return None
        before = len(self.errors)
        values = {
            key: self.checked(SERVER_FIELDS[key], value, "servers", i, key, origin=origin)
            for key, value in entry.items()
            if key in SERVER_FIELDS
        }
        return ServerSettings(**values) if len(self.errors) == before else None

    def aliases(self) -> dict[str, str]:
        table = self.table(self.document.get("aliases", {}), "aliases")
        for alias, model in table.items():
            if not isinstance(model, str) or not model:
                self.complain(("aliases", alias), model, "the name of a model, in quotes")
            elif model in table:
                self.complain(("aliases", alias), model, "a model's own name, not another alias")
        return table

    def table(self, value: Any, *path: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.complain(path, value, "a table")
        return {}

    def checked(self, field: Any, value: Any, *path: Any, origin: str = "") -> Any:
        try:
            return field.metadata["check"](value)
        except ValueError as expected:
            self.complain(path, value, str(expected), origin)
            return None

    def complain(self, path: tuple, found: Any, expected: str, origin: str = "") -> None:
        what = "nothing" if found is None else shown(found) if isinstance(found, str) else found
        self.errors.append(self.place(path, f"found {what}, expected {expected}", origin))

    def unknown_keys(self, table: dict[str, Any], known: Iterable[str], path: tuple) -> None:
        for key in table:
            if key in known:
                continue
            if key in OLD_KEYS:
                text = f"ignored: {OLD_KEYS[key]}"
            else:
                text = f"unknown key, ignored{did_you_mean(key, known)}"
            self.warnings.append(self.place((*path, key), text))

    def place(self, path: tuple, text: str, origin: str = "") -> Complaint:
        """A complaint that names where its key stands, like `servers.toml:12: servers[2].url`."""
        key = str(path[0]) if path else ""
        for part in path[1:]:
            key += f"[{part + 1}]" if isinstance(part, int) else f".{part}"
        if origin:
            return Complaint(origin, 0, key, text)
        return Complaint(self.source, line_of(self.toml, path), key, text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    import difflib  # only needed for people who mistyped, and slow to load

    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def line_of(toml: str, path: tuple) -> int:
    """The line on which a key stands, 1-based, or 0.  tomllib does not tell, so this looks as a
    person would: for the table's header or the n-th entry, and the key after it."""
    toml = re.sub(r"#[^\n]*", lambda m: " " * len(m[0]), toml)
    at, end = 0, len(toml)
    if path and path[0] == "servers":
        entries = [m.start() for m in re.finditer(r"^\s*\[\[servers(?:\.servers)?\]\]", toml, re.M)]
        inline = re.search(r"\bservers\s*=\s*\[", toml)
        if not entries and inline:
            entries = [m.start() for m in re.finditer(r"\{", toml) if m.start() > inline.start()]
        if len(path) > 1 and isinstance(path[1], int) and path[1] < len(entries):
            at = entries[path[1]]
            end = entries[path[1] + 1] if path[1] + 1 < len(entries) else end
    elif len(path) > 1:
        header = re.search(rf"^\s*\[{re.escape(str(path[0]))}\]", toml, re.M)
        at = header.end() if header else 0
    key = re.compile(rf"(?:\b|\"){re.escape(str(path[-1]))}\"?\s*(?:=|\])" if path else "$")
    found = key.search(toml, at, end)
    where = found.start() if found else at
    return toml.count("\n", 0, where) + 1 if found or at else 0


def restart_needed(old: Settings, new: Settings) -> list[str]:
    """Keys that changed but take effect only at the next start."""
    return [
        key
        for key, field in CONFIG_FIELDS.items()
        if field.metadata["restart"] and getattr(old, key) != getattr(new, key)
    ]


# ════════════════════════════════════════════════════════════════════════════════════════════
#  5  dialect
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# What vLLM servers and OpenAI clients say to each other, as far as a balancer must understand
# it: which paths are inference, which model a request wants, when a stream has begun, what load
# a page of metrics tells.  Content is read, never rewritten, but for the one value of `model`.

# Paths that are passed on to servers: everything under these prefixes, and these.
INFERENCE_PREFIXES = ("/v1/", "/v2/", "/inference/", "/cohere/")
INFERENCE_PATHS = frozenset(
    "/tokenize /detokenize /score /rerank /pooling /classify /invocations"
    " /generative_scoring".split()
)

SMALL_CONTENT_BYTES = 64 * 1024  # json.loads of this takes well under 1 ms; beyond, MemberScan
CALL_MEMBERS = ("model", "stream")


class Call(NamedTuple):
    """What a request wants of a server, as far as choosing one goes.

    `model` is the name to look for, None where the request names none; `content` is what to send,
    with an alias replaced by the model's own name.
    """

    path: str
    model: str | None
    stream: bool
    content: bytes | bytearray


def inference_path(path: str) -> str:
    """The path to ask a server for, or '' if it is not one that is passed on.  Clients whose
    base_url ends in /v1 and whose calls begin with it say /v1/v1/…: taken as /v1/…."""
    while path.startswith("/v1/v1/"):
        path = path[3:]
    if path.startswith(INFERENCE_PREFIXES) or path in INFERENCE_PATHS:
        return path
    return ""


class MemberScan:
    """Finds the values of top-level members of a JSON object without parsing what lies between.

    `advance` is called whenever content has grown and looks only at what is new, so that 10 MB
    cost no more than a millisecond at a time; a base64 image is skipped by searching for its
    closing quote.  `spans` then has (start, end) of each wanted value; of a repeated member the
    last, as in Python's json.  Says nothing about content that is not valid JSON.
    """

    __slots__ = ("spans", "_wanted", "_at", "_depth", "_string", "_key", "_value")

    OUTER = re.compile(rb'["{}\[\]:,]')  # what matters between the members
    INNER = re.compile(rb'["{}\[\]]')  # and inside their values
    STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)

    def __init__(self, wanted: Iterable[str]) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        self._wanted = {name.encode(): name for name in wanted}
        self._at = 0  # everything before was looked at
        self._depth = 0
        self._string = -1  # where the string we are in began, or -1
        self._key: bytes | None = None  # the member whose value we are in, or are about to be in
        self._value = -1  # where that value began, or -1

    def advance(self, content: bytes | bytearray) -> None:
        end = len(content)
        while self._at < end:
            if self._string >= 0:
                if not self._end_string(content, end):
                    return
                continue
            mark = (self.OUTER if self._depth == 1 else self.INNER).search(content, self._at)
            if mark is None:
                self._at = end
                return
            self._at = mark.end()
            self._take(content, mark[0], mark.start())

    def _take(self, content: bytes | bytearray, mark: bytes, at: int) -> None:
        if mark == b'"':
            self._string = at
        elif mark in b"{[":
            self._depth += 1
        elif mark == b":":
            if self._value < 0:
                self._value = at + 1
        else:
            if self._depth == 1:
                self._end_member(at)
            if mark != b",":
                self._depth -= 1

    def _end_string(self, content: bytes | bytearray, end: int) -> bool:
        """Move behind the string's closing quote; False if that is still to come."""
        start = self._at
        quote = content.find(b'"', start)
        stop = quote if quote >= 0 else end
        if content.find(b"\\", start, stop) >= 0:
            stop = self.STRING_REST.match(content, start).end()  # type: ignore[union-attr]
        self._at = stop
        if stop == end or content[stop] != 0x22:
            return False  # the content so far ends inside the string, maybe inside an escape
        if self._depth == 1 and self._value < 0:
            self._key = bytes(content[self._string + 1 : stop])
        self._at, self._string = stop + 1, -1
        return True

    def _end_member(self, at: int) -> None:
        key = self._key
        if key is not None and b"\\" in key:  # "mod\u0065l" is model, too
            with contextlib.suppress(ValueError):
                key = json.loads(b'"%b"' % key).encode()
        if key in self._wanted and self._value >= 0:
            self.spans[self._wanted[key]] = (self._value, at)
        self._key, self._value = None, -1


def read_members(content: bytes | bytearray, scan: MemberScan | None) -> dict[str, Any]:
    """The wanted top-level members of a JSON object, {} if the content is none.  `scan` is one
    that has seen the content, for large ones."""
    try:
        if scan is None:
            document = json.loads(content)
            return document if isinstance(document, dict) else {}
        return {name: json.loads(content[a:b]) for name, (a, b) in scan.spans.items()}
    except (ValueError, RecursionError):
        return {}  # a server will say what is wrong with it


class FormPart(NamedTuple):
    name: str
    start: int
    end: int


PART_NAME = re.compile(rb'(?i)content-disposition:[^\r\n]*?;\s*name="([^"\r\n]*)"')
BOUNDARY = re.compile(r'(?i)multipart/form-data\s*;.*?\bboundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))')


def form_parts(content: bytes | bytearray, content_type: str) -> Iterator[FormPart]:
    """The parts of multipart/form-data content, RFC 7578: audio uploads name their model so."""
    boundary = BOUNDARY.match(content_type)
    if boundary is None:
        return
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1")
    at = 0 if content.startswith(delimiter[2:]) else content.find(delimiter)
    while at >= 0:
        head = content.find(b"\r\n\r\n", at)
        following = content.find(delimiter, at + len(delimiter) - 2)
        if head < 0 or following < head:
            return
        if name := PART_NAME.search(content, at, head):
            yield FormPart(name[1].decode("latin-1"), head + 4, following)
        at = following


def read_call(
    head: RequestHead,
    path: str,
    content: bytes | bytearray,
    scan: MemberScan | None,
    aliases: Mapping[str, str],
    default_model: str,
) -> Call:
    """What the request wants.  Looks for `model` in JSON or form content, then in the query.
    Only an alias, or the default model where none is named, changes the content."""
    content_type = head.fields.get("content-type")
    is_form = content_type[:19].lower() == "multipart/form-data"
    if is_form:
        members = {
            part.name: bytes(content[part.start : part.end]).decode("utf-8", "replace")
            for part in form_parts(content, content_type)
            if part.name in CALL_MEMBERS
        }
    else:
        members = read_members(content, scan) if content else {}
    named = members.get("model")
    named = named if isinstance(named, str) and named else None
    asked = named
    if asked is None and head.query:
        asked = urllib.parse.parse_qs(head.query).get("model", [None])[0]
    if asked is None and content:
        asked = default_model or None
    model = aliases.get(asked, asked) if asked is not None else None
    if content and model != named and asked in (named, default_model):
        content = with_model(content, content_type if is_form else "", model or "")
    stream = members.get("stream") in (True, "true", "True", "1")
    return Call(path, model, stream, content)


def with_model(content: bytes | bytearray, form_type: str, model: str) -> bytes:
    """The content with another `model`: that one value is replaced, or put in front where there
    is none; every other byte stays."""
    if form_type:
        for part in form_parts(content, form_type):
            if part.name == "model":
                return bytes(content[: part.start]) + model.encode() + bytes(content[part.end :])
        boundary = BOUNDARY.match(form_type)
        if boundary is None:
            return bytes(content)
        opening = b"--" + (boundary[1] or boundary[2]).encode("latin-1")
        field = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model.encode()
        return opening + field + b"\r\n" + bytes(content)
    scan = MemberScan(("model",))
    scan.advance(content)
    value = json.dumps(model).encode()
    if "model" in scan.spans:
        start, end = scan.spans["model"]
        return bytes(content[:start]) + value + bytes(content[end:])
    opening, brace, rest = bytes(content).partition(b"{")
    if not brace or opening.strip():
        return bytes(content)
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return opening + b'{"model":' + value + comma + rest


class Begun(Enum):
    """What the beginning of an event stream says."""

    NOT_YET = "not yet"
    CONTENT = "content"
    FAILED = "failed"


# vLLM sends the head of a stream as soon as the request is queued, and these events before the
# engine has done anything; an answer has begun with the first event that is none of them.
PREAMBLE_EVENTS = frozenset((b"response.created", b"response.in_progress", b"response.queued"))
FAILED_EVENTS = frozenset((b"error", b"response.failed"))
ERROR_DATA = re.compile(rb'\{\s*"(?:error"\s*:\s*[{"]|type"\s*:\s*"error")')
BLANK_LINE = re.compile(rb"\r?\n\r?\n")


def stream_begun(content: bytes) -> Begun:
    """Judges an event stream's content so far.  A stream that begins with an error event, or with
    the [DONE] that a stopping vLLM sends to queued requests, failed before it began."""
    *events, _ = BLANK_LINE.split(content)
    for event in events:
        name = data = b""
        for line in event.splitlines():
            field, _, value = line.partition(b":")
            if field == b"event":
                name = value.strip()
            elif field == b"data":
                data = data or value.strip()
        if name in FAILED_EVENTS or ERROR_DATA.match(data) or data == b"[DONE]":
            return Begun.FAILED
        if data and name not in PREAMBLE_EVENTS:
            return Begun.CONTENT
    return Begun.NOT_YET


def error_body(fault: Fault, text: str, path: str = "", param: str | None = None) -> bytes:
    """An error of our own, in the form that vLLM and OpenAI use; Anthropic's clients, who call
    /v1/messages, look for `type` beside it."""
    error = {"message": text, "type": fault.type_name, "param": param, "code": fault.status}
    document = {"error": error}
    if path.startswith("/v1/messages"):
        document = {"type": "error", "error": error}
    return json.dumps(document).encode()


def error_event(fault: Fault, text: str) -> bytes:
    """The same as the last event of a stream that breaks."""
    return b"data: " + error_body(fault, text) + b"\n\n"


# Metric names of vLLM, the first that a page has is taken.  `per_engine` says how several engines
# of one server (data parallel) are joined.  To add a name: add it to its row.
class VllmMetric(NamedTuple):
    names: tuple[str, ...]
    per_engine: Callable[[list[float]], float]


VLLM_METRICS = {
    "running": VllmMetric(("vllm:num_requests_running",), sum),
    "waiting": VllmMetric(("vllm:num_requests_waiting",), sum),
    "swapped": VllmMetric(("vllm:num_requests_swapped",), sum),  # v0 engines: they wait, too
    "kv_usage": VllmMetric(
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), max  # 0 to 1, despite the name
    ),
    "max_fds": VllmMetric(("process_max_fds",), sum),
}
VLLM_NAMES = tuple(name for metric in VLLM_METRICS.values() for name in metric.names)


class EngineLoad(NamedTuple):
    """What a server says of itself; None is unknown, which is not 0."""

    running: int | None = None
    waiting: int | None = None
    kv_usage_ratio: float | None = None
    max_fds: int | None = None


def engine_load(page: str) -> EngineLoad:
    """The load in a /metrics page of any vLLM since 0.8."""
    found: dict[str, list[float]] = {}
    for sample in parse_samples(page, VLLM_NAMES):
        if math.isfinite(sample.value):
            found.setdefault(sample.name, []).append(sample.value)
    values: dict[str, float] = {}
    for key, metric in VLLM_METRICS.items():
        for name in metric.names:
            if name in found:
                values[key] = metric.per_engine(found[name])
                break
    if "waiting" in values:
        values["waiting"] += values.get("swapped", 0)
    count = {k: int(values[k]) for k in ("running", "waiting", "max_fds") if k in values}
    return EngineLoad(kv_usage_ratio=values.get("kv_usage"), **count)


def model_list(content: bytes) -> dict[str, dict[str, Any]] | None:
    """The models in an answer to /v1/models, by id with everything said of them; None if it is
    not such an answer."""
    try:
        data = json.loads(content)["data"]
        return {str(entry["id"]): entry for entry in data}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


# ════════════════════════════════════════════════════════════════════════════════════════════
#  6  fleet
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# The servers and everything known of them.  The fleet is the one owner of that state: the wet
# rooms tell it what they saw (`probed`, `scraped`, `failed`, `succeeded`, `lease`), everybody
# else gets a ServerView.  State is kept by URL, so it survives a reload of the settings.


class State(Enum):
    """mvllm's three words.  Only a healthy server is asked."""

    CHECKING = "checking"  # nothing is known yet
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Transition(NamedTuple):
    """A change worth a line in the log."""

    url: str
    old: State
    new: State
    reason: str


class Health:
    """The state of one server, from checks (active) and from what requests met (passive).

    It goes out when one limit is met: checks failed in a row, share of good checks in the window,
    mean time of the checks in the window, requests failed in a row.  It comes back after enough
    good checks in a row, whatever happened before: the window then starts anew, so that an hour
    of downtime does not have to be outweighed by an hour of good checks.
    """

    __slots__ = (
        "state", "reason", "since", "window", "failures", "successes", "request_failures",
        "checked_at", "checks",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.state = State.CHECKING
        self.reason = "not checked yet"
        self.since = now
        self.window: collections.deque[tuple[bool, float]] = collections.deque()
        self.failures = 0  # failed checks in a row
        self.successes = 0  # good ones
        self.request_failures = 0  # failed requests in a row
        self.checked_at: float | None = None
        self.checks = 0

    @property
    def success_rate(self) -> float:
        return sum(good for good, _ in self.window) / len(self.window) if self.window else 0.0

    @property
    def mean_time_s(self) -> float:
        return sum(s for _, s in self.window) / len(self.window) if self.window else 0.0

    def probed(self, good: bool, seconds: float, why: str, now: float, s: Settings) -> None:
        """One check came back; `why` says what failed."""
        slow = seconds > s.health_check_max_response_time
        if good and slow:
            why = f"check took {seconds:.1f} s"
        self.checked_at, self.checks = now, self.checks + 1
        self.failures = 0 if good else self.failures + 1
        self.successes = self.successes + 1 if good and not slow else 0
        if self.state is not State.HEALTHY:
            if self.successes >= s.health_check_consecutive_successes:
                self.window.clear()
                self._become(State.HEALTHY, "check passed", now)
            elif not self.successes:
                self._become(State.UNHEALTHY, why, now)
        self.window.append((good, seconds))
        while len(self.window) > s.health_check_window_size:
            self.window.popleft()
        if self.state is State.HEALTHY and (limit := self._limit_met(why, s)):
            self._become(State.UNHEALTHY, limit, now)

    def _limit_met(self, why: str, s: Settings) -> str:
        if self.failures >= s.health_check_consecutive_failures:
            return f"{self.failures} checks failed in a row: {why}"
        judged = len(self.window) >= min(5, s.health_check_window_size)  # one failure is no rate
        if judged and self.success_rate < s.health_check_min_success_rate:
            return f"{self.success_rate:.0%} of the last {len(self.window)} checks passed: {why}"
        if self.mean_time_s > s.health_check_max_response_time:
            return f"the last {len(self.window)} checks took {self.mean_time_s:.1f} s on average"
        return ""

    def failed(self, why: str, now: float, s: Settings) -> None:
        """A request failed in a way the server is to blame for."""
        self.request_failures += 1
        if self.request_failures >= s.failure_threshold and self.state is State.HEALTHY:
            times = f"{self.request_failures} requests failed in a row: "
            self._become(State.UNHEALTHY, times * (self.request_failures > 1) + why, now)

    def succeeded(self) -> None:
        self.request_failures = 0

    def recovered_by_time(self, now: float, s: Settings) -> bool:
        """Without active checks nobody would ever call a server healthy again: it is given
        another chance after a while."""
        if self.state is State.CHECKING:
            self._become(State.HEALTHY, "active checks are off", now)
            return True
        if self.state is State.UNHEALTHY and now - self.since >= s.auto_recovery_threshold:
            self._become(State.HEALTHY, f"tried again after {now - self.since:.0f} s", now)
            return True
        return False

    def _become(self, state: State, reason: str, now: float) -> None:
        if state is not self.state:
            self.since = now
            self.successes = self.request_failures = 0
        self.state, self.reason = state, reason


class ServerView(NamedTuple):
    """A frozen look at a server, for policies and reports.  Made anew only when the server has
    changed, so that looking at a fleet costs nothing."""

    url: str
    capacity: int
    state: State
    reason: str
    draining: bool
    in_flight: int  # requests of ours, exact
    load: EngineLoad  # what it said of itself
    load_at: float  # when, -inf for never
    own_then: int  # how many of the requests it reported were ours
    models: Mapping[str, Mapping[str, Any]] | None  # None: it has not said yet

    def foreign(self, now: float, interval_s: float) -> float:
        """Requests it has that are not ours, fading once the report is older than the interval
        between reports: exact counts stay, hearsay does not."""
        reported = (self.load.running or 0) + (self.load.waiting or 0) - self.own_then
        if reported <= 0:
            return 0.0
        late = now - self.load_at - interval_s
        return reported * math.exp(-late / (2 * interval_s)) if late > 0 else float(reported)

    def serves(self, model: str) -> bool:
        """Whether it may have this model; a server that has not said is given the chance."""
        return self.models is None or model in self.models


class Server:
    """One server's state; only the fleet touches it."""

    __slots__ = (
        "settings", "health", "in_flight", "load", "load_at", "own_then", "models", "models_at",
        "draining", "_view",
    )  # fmt: skip

    def __init__(self, settings: ServerSettings, now: float) -> None:
        self.settings = settings
        self.health = Health(now)
        self.in_flight = 0
        self.load = EngineLoad()
        self.load_at = -INFINITY
        self.own_then = 0
        self.models: dict[str, dict[str, Any]] | None = None
        self.models_at = -INFINITY
        self.draining = False
        self._view: ServerView | None = None

    @property
    def view(self) -> ServerView:
        if self._view is None:
            self._view = ServerView(
                self.settings.url,
                self.settings.max_concurrent_requests,
                self.health.state,
                self.health.reason,
                self.draining,
                self.in_flight,
                self.load,
                self.load_at,
                self.own_then,
                self.models,
            )
        return self._view

    def changed(self) -> None:
        self._view = None


class HealthRecord(NamedTuple):
    """What reports say of a server's health beyond its view; times are monotonic."""

    since: float
    checked_at: float | None
    checks: int
    failures: int
    success_rate: float
    mean_time_s: float
    last_time_s: float | None
    models_at: float | None

    @classmethod
    def of(cls, server: Server) -> HealthRecord:
        h, known = server.health, server.models is not None
        last = h.window[-1][1] if h.window else None
        return cls(
            h.since, h.checked_at, h.checks, h.failures, h.success_rate, h.mean_time_s, last,
            server.models_at if known else None,
        )  # fmt: skip


class Lease:
    """Counts one request in flight while the `with` block runs, whatever ends it."""

    __slots__ = ("_fleet", "_server")

    def __init__(self, fleet: Fleet, server: Server) -> None:
        self._fleet, self._server = fleet, server

    def __enter__(self) -> None:
        self._server.in_flight += 1
        self._server.changed()

    def __exit__(self, *_: object) -> None:
        self._server.in_flight -= 1
        self._server.changed()
        self._fleet.forget_drained(self._server)


class Fleet:
    """All servers.  Its methods return the transition they caused, if any."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}

    def apply(self, wanted: Iterable[ServerSettings], now: float) -> tuple[list[str], list[str]]:
        """Make the fleet what the settings say: (URLs added, URLs now draining).  A server that
        is asked for again while it drains simply stays, with all that is known of it."""
        wanted_by_url = {s.url: s for s in wanted}
        added, draining = [], []
        for url, settings in wanted_by_url.items():
            server = self._servers.get(url)
            if server is None or server.draining:
                added.append(url)
            if server is None:
                server = self._servers[url] = Server(settings, now)
            server.settings, server.draining = settings, False
            server.changed()
        for url, server in list(self._servers.items()):
            if url not in wanted_by_url and not server.draining:
                draining.append(url)
                server.draining = True
                server.changed()
                self.forget_drained(server)
        order = list(wanted_by_url)
        rank = {url: i for i, url in enumerate(order)}
        self._servers = dict(
            sorted(self._servers.items(), key=lambda item: rank.get(item[0], len(order)))
        )
        return added, draining

    def forget_drained(self, server: Server) -> None:
        url = server.settings.url
        if server.draining and not server.in_flight and self._servers.get(url) is server:
            del self._servers[url]

    def views(self) -> list[ServerView]:
        return [server.view for server in self._servers.values()]

    def records(self) -> list[HealthRecord]:
        """The health of each server in the order of `views`, for reports."""
        return [HealthRecord.of(server) for server in self._servers.values()]

    def lease(self, url: str) -> Lease:
        return Lease(self, self._servers[url])

    def models_due(self, url: str, now: float, s: Settings) -> bool:
        """Whether the next check should ask for the models, too: they are unknown, old, or the
        server is coming back and may have been restarted with others."""
        server = self._servers[url]
        back = server.health.state is not State.HEALTHY
        return back or server.models is None or now - server.models_at >= s.models_interval

    def learned(self, url: str, models: dict[str, dict[str, Any]], now: float) -> None:
        if server := self._servers.get(url):
            server.models, server.models_at = models, now
            server.changed()

    def scraped(self, url: str, load: EngineLoad, own_then: int, now: float) -> None:
        """A page of metrics came.  `own_then` is how many requests of ours it may have counted:
        the larger of those in flight when it was asked and when it answered, so that none of
        them is taken for a foreign one."""
        if server := self._servers.get(url):
            server.load, server.load_at, server.own_then = load, now, own_then
            server.changed()

    def in_flight(self, url: str) -> int:
        server = self._servers.get(url)
        return server.in_flight if server else 0

    def probed(
        self, url: str, good: bool, seconds: float, why: str, now: float, s: Settings
    ) -> Transition | None:
        return self._judge(url, lambda h: h.probed(good, seconds, why, now, s))

    def failed(self, url: str, why: str, now: float, s: Settings) -> Transition | None:
        return self._judge(url, lambda h: h.failed(why, now, s))

    def succeeded(self, url: str) -> None:
        if server := self._servers.get(url):
            server.health.succeeded()

    def recovered_by_time(self, url: str, now: float, s: Settings) -> Transition | None:
        return self._judge(url, lambda h: h.recovered_by_time(now, s))

    def _judge(self, url: str, tell: Callable[[Health], Any]) -> Transition | None:
        server = self._servers.get(url)
        if server is None:
            return None
        before = server.health.state
        tell(server.health)
        server.changed()
        after = server.health.state
        return Transition(url, before, after, server.health.reason) if after is not before else None


# ════════════════════════════════════════════════════════════════════════════════════════════
#  7  policies
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# Views and a call in, a ranking out.  A policy gives every eligible server a cost and says which
# costs count as equally good; one of those is drawn at random.
#
# To add a policy: a function with @policy("name", "what it does"), and a line in the README.


class Moment(NamedTuple):
    """What a cost may depend on besides the server."""

    now: float
    interval_s: float  # between two reports of load


class Policy(NamedTuple):
    """A row of POLICIES.  `ties` gives the largest cost that is as good as the best."""

    name: str
    meaning: str
    cost: Callable[[ServerView, Moment], float]
    terms: Callable[[ServerView, Moment], str]
    ties: Callable[[list[float]], float]


POLICIES: dict[str, Policy] = {}


def policy(
    name: str,
    meaning: str,
    terms: Callable[[ServerView, Moment], str],
    ties: Callable[[list[float]], float] = min,
) -> Callable[[Callable[[ServerView, Moment], float]], Callable[[ServerView, Moment], float]]:
    """Registers a cost function.  `terms` puts the numbers behind a cost into words."""

    def register(cost: Callable[[ServerView, Moment], float]) -> Any:
        POLICIES[name] = Policy(name, meaning, cost, terms, ties)
        return cost

    return register


def least_terms(v: ServerView, m: Moment) -> str:
    return f"({v.in_flight} in flight + {v.foreign(*m):.1f} foreign + 1) / {v.capacity}"


def scraped_terms(v: ServerView, m: Moment) -> str:
    return f"{v.load.running or 0} running, {v.load.waiting or 0} waiting, capacity {v.capacity}"


@policy("least", "lowest (in flight + foreign load + 1) / capacity", least_terms)
def least(v: ServerView, m: Moment) -> float:
    return (v.in_flight + v.foreign(*m) + 1) / v.capacity


@policy(
    "mvllm",
    "as mvllm: any server whose (running + 0.5 waiting) / capacity is under 0.5, else the lowest",
    scraped_terms,
    ties=lambda costs: math.nextafter(0.5, 0) if min(costs) < 0.5 else min(costs),
)
def mvllm(v: ServerView, m: Moment) -> float:
    return ((v.load.running or 0) + 0.5 * (v.load.waiting or 0)) / v.capacity


@policy("vllm_router", "as mvllm's predecessor: lowest (3 running + waiting) / capacity", scraped_terms)
def vllm_router(v: ServerView, m: Moment) -> float:
    return (3 * (v.load.running or 0) + (v.load.waiting or 0)) / v.capacity


class Candidate(NamedTuple):
    """A server in a ranking: with its cost, or passed over for a reason."""

    url: str
    cost: float
    reason: str


class Ranking(NamedTuple):
    """The judgement on a call.  `best` is the server to ask, or None; `fault` then says why not.

    `undecided`: a server that was not checked yet may still turn out to be the one.
    """

    best: str | None
    views: list[ServerView]
    eligible: list[ServerView]
    costs: list[float]
    policy: Policy
    moment: Moment
    model: str | None
    tried: frozenset[str]

    @property
    def undecided(self) -> bool:
        return any(v.state is State.CHECKING and not v.draining for v in self.views)

    def candidates(self) -> list[Candidate]:
        """Every server with its reason, best first; made only when somebody asks."""
        ranked = sorted(zip(self.costs, range(len(self.costs))))
        chosen = [v.url for v in self.eligible]
        rows = []
        for cost, i in ranked:
            view = self.eligible[i]
            words = f"cost {cost:.3f} = {self.policy.terms(view, self.moment)}"
            rows.append(Candidate(view.url, cost, words))
        for view in self.views:
            if view.url not in chosen:
                why = passed_over(view, self.model, self.tried)
                rows.append(Candidate(view.url, INFINITY, why))
        return rows

    def refusal(self) -> tuple[Fault, str]:
        """Why no server can take the call, in the words of each."""
        views = [v for v in self.views if not v.draining]
        if not views:
            return Fault.NO_SERVER, "No server is configured."
        known = sorted({m for v in views for m in v.models or ()})
        if self.model and self.model not in known and all(v.models is not None for v in views):
            names = ", ".join(known) or "none"
            text = f"The model `{self.model}` does not exist. Valid names: {names}."
            return Fault.UNKNOWN_MODEL, text
        reasons = "; ".join(f"{c.url} {c.reason}" for c in self.candidates())
        what = f"the model `{self.model}`" if self.model else "this request"
        return Fault.NO_SERVER, f"No server can serve {what} now: {reasons}."


def passed_over(view: ServerView, model: str | None, tried: frozenset[str]) -> str:
    """The reason why a server is not eligible, or ''."""
    if view.draining:
        return "is draining"
    if view.state is not State.HEALTHY:
        return f"is {view.state.value} ({view.reason})"
    if model is not None and not view.serves(model):
        return f"does not serve {shown(model)}"
    if view.url in tried:
        return "was tried already"
    return ""


def rank(
    views: list[ServerView],
    model: str | None,
    tried: frozenset[str],
    by: Policy,
    moment: Moment,
    draw: random.Random,
) -> Ranking:
    """The best server for a call; once for each attempt."""
    eligible = [v for v in views if not passed_over(v, model, tried)]
    costs = [by.cost(v, moment) for v in eligible]
    best = None
    if costs:
        limit = by.ties(costs)
        good = [v for v, cost in zip(eligible, costs) if cost <= limit]
        best = (good[0] if len(good) == 1 else draw.choice(good)).url
    return Ranking(best, views, eligible, costs, by, moment, model, tried)


# ════════════════════════════════════════════════════════════════════════════════════════════
#  8  plans
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# How a call is answered.  A plan is a generator: it yields one step, is told its outcome, and
# yields the next.  It does no I/O and holds no socket, so retry and failover are tested as
# tables of outcomes and steps.  The exchange is the only driver.


class Held(NamedTuple):
    """A server's answer that was not shown yet, because another server may do better."""

    url: str
    head: ResponseHead
    content: bytes


class Outcome(NamedTuple):
    """What became of a step; without a fault it went well."""

    fault: Fault | None = None
    text: str = ""
    committed: bool = False  # the client has seen a part of the answer
    held: Held | None = None


class Relay(NamedTuple):
    """Ask this server and, if its answer is one, pass it to the client."""

    url: str
    attempt: int


class Pause(NamedTuple):
    """Wait before the next attempt."""

    seconds: float


class Settle(NamedTuple):
    """Wait until more is known about the fleet; a fault when that took longer than this since
    the request came."""

    seconds: float


class Answer(NamedTuple):
    """End with this failure: the server's own words if they were held, else ours."""

    outcome: Outcome


Step = Relay | Pause | Settle | Answer
Plan = Generator[Step, Outcome, None]
WELL = Outcome()


def relay_plan(choose: Callable[[frozenset[str]], Ranking], s: Settings, draw: random.Random) -> Plan:
    """One good answer from one server; other servers are asked as long as nothing was shown.

    A server that failed is not asked again while there is another.  `choose` ranks the fleet as
    it is at that moment, without the servers it is told were tried.
    """
    tried: frozenset[str] = frozenset()
    failure: Outcome | None = None
    for attempt in range(1, s.max_retries + 2):
        ranking = choose(tried)
        while failure is None and ranking.best is None and ranking.undecided:
            waited = yield Settle(s.health_check_timeout)
            ranking = choose(tried)
            if waited.fault is not None:
                break
        if failure is not None:
            again = ranking.best is None
            if again and failure.fault.retry is Retry.ELSEWHERE:
                break  # all are busy; asking again would make them busier
            if again or failure.fault.retry is not Retry.AT_ONCE:
                yield Pause(backoff_s(attempt - 2, s, draw))
                ranking = choose(frozenset() if again else tried)
        if ranking.best is None:
            if failure is None or failure.held is None:
                failure = Outcome(*ranking.refusal())
            break
        outcome = yield Relay(ranking.best, attempt)
        if outcome.fault is None or outcome.committed:
            return
        failure = outcome
        if not retriable(outcome.fault, s):
            break
        tried |= {ranking.best}
    assert failure is not None
    yield Answer(failure)


def retriable(fault: Fault, s: Settings) -> bool:
    if fault.retry is Retry.IF_ALLOWED:
        return s.retry_timed_out
    return fault.retry is not Retry.NEVER


def backoff_s(retry: int, s: Settings, draw: random.Random) -> float:
    """The pause before the n-th retry (from 0): doubling, bounded, and somewhere between half
    and all of it, so that requests that failed together do not come back together."""
    return min(s.retry_delay * 2**retry, s.retry_delay_max) * draw.uniform(0.5, 1.0)


# ════════════════════════════════════════════════════════════════════════════════════════════
#  9  reports
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# What people and machines are shown: views in, JSON documents, metric families and lines of text
# out.  The JSON documents are supersets of mvllm's: same names, same types.

STATUS_OF_SHARE = ((0.8, "healthy"), (0.5, "degraded"), (0.0, "unhealthy"))  # mvllm's words


class Clock(NamedTuple):
    """A moment on both clocks, to show monotonic times as dates."""

    monotonic: float
    wall: float

    def iso(self, then: float | None) -> str | None:
        """A monotonic time as mvllm writes dates: local, ISO 8601."""
        if then is None:
            return None
        seconds = self.wall - self.monotonic + then
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))
        return f"{stamp}.{int(seconds % 1 * 1e6):06d}"


def service_report() -> dict[str, Any]:
    """GET / — as mvllm's, under our name."""
    return {"service": "mvllm_lite", "version": __version__, "status": "running"}


def health_report(
    views: list[ServerView], records: list[HealthRecord], s: Settings, clock: Clock
) -> dict[str, Any]:
    """GET /health."""
    healthy = sum(v.state is State.HEALTHY for v in views)
    score = healthy / len(views) if views else 0.0
    word = next(word for share, word in STATUS_OF_SHARE if score >= share)
    return {
        "status": word if views else "no_servers",
        "health_score": score,
        "total_servers": len(views),
        "healthy_servers": healthy,
        "unhealthy_servers": len(views) - healthy,
        "servers": [
            {
                "url": v.url,
                "healthy": v.state is State.HEALTHY,
                "health_status": v.state.value,
                "reason": v.reason,
                "since": clock.iso(r.since),
                "draining": v.draining,
                "last_check": clock.iso(r.checked_at),
                "consecutive_failures": r.failures,
                "success_rate": r.success_rate,
                "avg_response_time": r.mean_time_s,
                "last_response_time": r.last_time_s,
                "total_checks": r.checks,
                "supported_models": list(v.models or ()),
                "models_last_updated": clock.iso(r.models_at),
            }
            for v, r in zip(views, records)
        ],
        "config": {
            "health_check_enabled": s.enable_active_health_check,
            "health_check_interval": s.health_check_interval,
            "min_success_rate": s.health_check_min_success_rate,
            "max_response_time": s.health_check_max_response_time,
        },
    }


def load_now(v: ServerView, now: float, s: Settings) -> int:
    """Requests on a server: ours exactly, and those of others as far as they are known."""
    return v.in_flight + round(v.foreign(now, s.metrics_interval))


def load_report(views: list[ServerView], s: Settings, clock: Clock) -> dict[str, Any]:
    """GET /load-stats."""
    now = clock.monotonic
    loads = [load_now(v, now, s) for v in views]
    capacity = sum(v.capacity for v in views)
    return {
        "servers": [
            {
                "url": v.url,
                "current_load": load,
                "max_capacity": v.capacity,
                "available_capacity": max(0, v.capacity - load),
                "utilization_percent": min(100.0, 100 * load / v.capacity),
                "status": v.state is State.HEALTHY,
                "health_status": v.state.value,
                "in_flight": v.in_flight,
                "last_updated": clock.iso(v.load_at if v.load_at > -INFINITY else None),
                "detailed_metrics": {
                    "num_requests_running": v.load.running or 0,
                    "num_requests_waiting": v.load.waiting or 0,
                    "gpu_cache_usage_perc": v.load.kv_usage_ratio or 0.0,
                    "kv_cache_usage_perc": v.load.kv_usage_ratio,
                    "process_max_fds": v.load.max_fds or 0,
                },
            }
            for v, load in zip(views, loads)
        ],
        "summary": {
            "total_servers": len(views),
            "healthy_servers": sum(v.state is State.HEALTHY for v in views),
            "total_active_load": sum(loads),
            "total_capacity": capacity,
            "overall_utilization_percent": 100 * sum(loads) / capacity if capacity else 0.0,
        },
    }


def server_models_report(
    views: list[ServerView], records: list[HealthRecord], clock: Clock
) -> dict[str, Any]:
    """GET /server-models."""
    return {
        "servers": {
            v.url: {
                "supported_models": list(v.models or ()),
                "models_last_updated": clock.iso(r.models_at),
                "healthy": v.state is State.HEALTHY,
            }
            for v, r in zip(views, records)
        },
        "total_servers": len(views),
        "healthy_servers": sum(v.state is State.HEALTHY for v in views),
    }


def models_report(views: list[ServerView], aliases: Mapping[str, str]) -> dict[str, Any]:
    """GET /v1/models: what the healthy servers serve, each model once, with all that its first
    server says of it; aliases stand beside the models they name."""
    models: dict[str, Mapping[str, Any]] = {}
    for view in views:
        if view.state is State.HEALTHY and not view.draining:
            for name, entry in (view.models or {}).items():
                models.setdefault(name, entry)
    for alias, name in aliases.items():
        if name in models and alias not in models:
            models[alias] = {**models[name], "id": alias}
    return {"object": "list", "data": list(models.values())}


def readiness_report(views: list[ServerView], stopping: bool) -> tuple[int, dict[str, Any]]:
    """GET /readiness: 503 when a request would find no server, or the balancer is stopping."""
    healthy = sum(v.state is State.HEALTHY and not v.draining for v in views)
    counts = {"healthy_workers": healthy, "total_workers": len(views)}
    if healthy and not stopping:
        return 200, {"status": "ready", **counts}
    reason = "stopping" if stopping else "no healthy server" if views else "no server configured"
    return 503, {"status": "not_ready", "reason": reason, **counts}


# Bucket bounds.  Seconds: from a cached prompt to the patience of a person; between pieces: from
# a burst to a stall; bytes: from a greeting to an image or a batch of embeddings.
FIRST_BYTE_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160,
)  # fmt: skip
PIECE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1, 2.5, 10, 40)
DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
SIZE_BUCKETS_BYTES = (256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)


class Ledger:
    """Everything that is counted.  Counters are bumped where things happen; gauges of the fleet
    are filled when the page is asked for."""

    def __init__(self) -> None:
        self.requests = Counter(
            "mvllm_requests_total",
            "Requests for inference that have ended, by the status shown to the client.",
            ("server", "model", "status"),
        )
        self.attempts = Counter(
            "mvllm_attempts_total",
            "Attempts to have a server answer a request, by how they ended.",
            ("server", "result"),
        )
        self.retries = Counter(
            "mvllm_retries_total", "Attempts after the first, by what had failed.", ("reason",)
        )
        self.transitions = Counter(
            "mvllm_server_transitions_total", "Changes of a server's state.", ("server", "state")
        )
        self.reloads = Counter(
            "mvllm_settings_reloads_total", "Changes of the settings file, by result.", ("result",)
        )
        self.scrapes = Counter(
            "mvllm_scrapes_total", "Looks at a server's metrics, by result.", ("server", "result")
        )
        self.errors = Counter("mvllm_internal_errors_total", "Mistakes of the balancer's own.")
        self.first_byte = Histogram(
            "mvllm_time_to_first_byte_seconds",
            "From a request's last byte to the answer's first content byte.",
            ("model",),
            FIRST_BYTE_BUCKETS_S,
        )
        self.pieces = Histogram(
            "mvllm_stream_gap_seconds",
            "Between two pieces of a streamed answer.",
            ("model",),
            PIECE_BUCKETS_S,
        )
        self.durations = Histogram(
            "mvllm_request_duration_seconds",
            "From a request's first byte to the answer's last.",
            ("model",),
            DURATION_BUCKETS_S,
        )
        self.request_sizes = Histogram(
            "mvllm_request_size_bytes", "Content of requests.", ("model",), SIZE_BUCKETS_BYTES
        )
        self.response_sizes = Histogram(
            "mvllm_response_size_bytes", "Content of answers.", ("model",), SIZE_BUCKETS_BYTES
        )
        for result in ("applied", "refused"):  # so that rates over them exist from the start
            self.reloads.add(result, amount=0)
        self.errors.add(amount=0)

    def families(self) -> list[Family]:
        return [family for family in vars(self).values() if isinstance(family, Family)]


def fleet_families(
    views: list[ServerView], clients: int, started_at: float, settings_good: bool
) -> list[Family]:
    """Gauges of this moment."""
    build = Gauge("mvllm_build_info", "Always 1.", ("version", "python"))
    build.set(1, __version__, sys.version.split()[0])
    started = Gauge("mvllm_start_time_seconds", "When the process began, in Unix time.")
    started.set(started_at)
    connections = Gauge("mvllm_client_connections", "Open connections from clients.")
    connections.set(clients)
    settings = Gauge("mvllm_settings_valid", "Whether the settings file, as it is now, was read.")
    settings.set(settings_good)
    gauges = {
        "in_flight": Gauge("mvllm_requests_in_flight", "Requests now with a server.", ("server",)),
        "up": Gauge("mvllm_server_healthy", "Whether a server is asked.", ("server",)),
        "capacity": Gauge("mvllm_server_capacity", "max_concurrent_requests.", ("server",)),
        "running": Gauge("mvllm_server_running", "Running requests by its own word.", ("server",)),
        "waiting": Gauge("mvllm_server_waiting", "Waiting requests by its own word.", ("server",)),
        "kv": Gauge("mvllm_server_kv_usage_ratio", "KV cache in use, 0 to 1.", ("server",)),
    }
    for view in views:
        values = {
            "in_flight": view.in_flight,
            "up": view.state is State.HEALTHY,
            "capacity": view.capacity,
            "running": view.load.running,
            "waiting": view.load.waiting,
            "kv": view.load.kv_usage_ratio,
        }
        for name, value in values.items():
            if value is not None:  # what a server has not said is left out
                gauges[name].set(value, view.url)
    return [build, started, connections, settings, *gauges.values()]


def access_line(facts: Mapping[str, Any]) -> str:
    """One request as key=value pairs; a value with spaces is quoted.  Never content or keys."""
    out = []
    for key, value in facts.items():
        word = f"{value:.3f}" if isinstance(value, float) else str(value)
        if not word or re.search(r'[\s"=\x00-\x1f\x7f-\x9f]', word):
            word = json.dumps(word)
        out.append(f"{key}={word}")
    return " ".join(out)


def transition_line(change: Transition, models: Mapping[str, Any] | None) -> str:
    names = f", serves {', '.join(models) or 'no model'}" if models is not None else ""
    return f"{change.url} is {change.new.value} (was {change.old.value}): {change.reason}{names}"


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ the waterline ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Above: no socket, clock, file, environment or event loop; time comes in as `now`, chance as a
# Random.  Below: thin and linear; read something, ask a function from above, write something.


# ════════════════════════════════════════════════════════════════════════════════════════════
#  10  wire
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# Connections.  The only room that knows transports.  A Wire is one connection, to a client or to
# a server: bytes come into its buffer, and whoever reads waits for `news`.  While a Sink is set,
# bytes go there at once, without waking a task: that is how streamed pieces pass (two turns of
# the event loop less for each).  Deadlines are moments on the loop's clock; moving one costs an
# attribute, because a wire's one timer looks again when it fires instead of being set anew.


class Sink(Protocol):
    """Takes what happens on a wire, in place of its buffer."""

    def feed(self, wire: Wire, data: bytes) -> None: ...
    def lost(self, wire: Wire, gone: PeerGone) -> None: ...
    def expired(self, wire: Wire) -> None: ...


class Discard:
    """A sink for what nobody reads any more."""

    def feed(self, wire: Wire, data: bytes) -> None: ...

    def lost(self, wire: Wire, gone: PeerGone) -> None: ...

    def expired(self, wire: Wire) -> None:
        wire.abort()


class Wire(asyncio.Protocol):
    """One connection.  `side` says who is at the other end."""

    __slots__ = (
        "side", "loop", "transport", "buffer", "sink", "feeder", "gone", "on_gone", "blocked",
        "held", "lost", "reused", "reusable", "deadline", "_opened", "_waiter", "_timer",
        "_timer_at",
    )  # fmt: skip

    def __init__(self, side: Blame, opened: Callable[[Wire], None] | None = None) -> None:
        self.side = side
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # until it is made
        self.buffer = bytearray()
        self.sink: Sink | None = None
        self.feeder: Wire | None = None  # whose bytes we write: it waits while our peer is slow
        self.gone: PeerGone | None = None  # the peer has left, and how
        self.on_gone: Callable[[], object] | None = None
        self.blocked = False  # the peer takes no more bytes at present
        self.held = False  # we take no more of the peer's
        self.lost = False  # there is no connection any more
        self.reused = False  # it carried an exchange before
        self.reusable = False  # and may carry another
        self.deadline = INFINITY
        self._opened = opened
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = INFINITY

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self._opened is not None:
            self._opened(self)

    def data_received(self, data: bytes) -> None:
        if self.sink is not None:
            self.sink.feed(self, data)
            return
        self.buffer += data
        if len(self.buffer) >= READ_BUFFER_BYTES:
            self.hold()
        self._wake()

    def eof_received(self) -> bool:
        """The peer will send no more.  A client may still be reading, so its wire stays open for
        what is being answered locally; a server's is closed."""
        self._ended(clean=True)
        return self.side is Blame.CLIENT and self.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.lost = True
        self._ended(clean=error is None)
        self._wake()

    def pause_writing(self) -> None:
        self.blocked = True
        if self.feeder is not None:
            self.feeder.hold()

    def resume_writing(self) -> None:
        self.blocked = False
        if self.feeder is not None:
            self.feeder.release()
        self._wake()

    # What the rooms below call.

    async def news(self, deadline: float) -> None:
        """Until something happens here: bytes, room for writing, the peer's leaving.  Raises
        TimeoutError at the deadline."""
        self.expect_by(deadline)
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def read_head(self, deadline: float) -> bytes | None:
        """Up to and with the next empty line; None if the peer left without beginning one.
        Raises PeerGone in the middle of one, BadMessage when it is too long, TimeoutError."""
        searched = 0
        while (end := self.buffer.find(b"\r\n\r\n", searched)) < 0:
            if len(self.buffer) > HEAD_LIMIT_BYTES:
                end = HEAD_LIMIT_BYTES
                break
            if self.gone is not None:
                if self.buffer:
                    raise self.gone
                return None
            searched = max(0, len(self.buffer) - 3)
            await self.news(deadline)
        if end >= HEAD_LIMIT_BYTES:
            text = f"the head is longer than {HEAD_LIMIT_BYTES} bytes"
            raise BadMessage(Fault.HEAD_TOO_LARGE, text)
        return self.take(end + 4)

    def take(self, size: int | None = None) -> bytes:
        """The first bytes of the buffer, or all."""
        if size is None or size == len(self.buffer):
            taken = bytes(self.buffer)
            self.buffer.clear()
        else:
            taken = bytes(self.buffer[:size])
            del self.buffer[:size]
        if self.held and len(self.buffer) < READ_BUFFER_BYTES:
            self.release()
        return taken

    async def send(self, head: bytes, content: bytes | bytearray, silence_s: float) -> bool:
        """Write a message; False if the peer answered or left before it had all of it."""
        if len(content) <= WRITE_SLICE_BYTES:
            self.transport.write(head + content)
            return True
        self.transport.write(head)
        view = memoryview(content)
        for at in range(0, len(content), WRITE_SLICE_BYTES):
            while self.blocked and not self.buffer and self.gone is None:
                await self.news(self.loop.time() + silence_s)
            if self.buffer or self.gone is not None:
                return False
            self.transport.write(view[at : at + WRITE_SLICE_BYTES])
        return True

    def hold(self) -> None:
        """Stop reading: the kernel's buffers fill, and the peer has to wait."""
        self.held = True
        self.transport.pause_reading()

    def release(self) -> None:
        self.held = False
        self.transport.resume_reading()

    def close(self) -> None:
        """Once everything written has gone out, for which the peer has CLIENT_SILENCE_S."""
        if not self.transport.is_closing():
            self.sink = Discard()
            self.expect_by(self.loop.time() + CLIENT_SILENCE_S)
            self.transport.close()

    async def closed(self) -> None:
        """Close, and wait until there is no connection any more."""
        self.close()
        while not self.lost:
            await self.news(self.deadline)

    def abort(self) -> None:
        """Now, whatever was still to be written."""
        self.transport.abort()

    def reset(self) -> None:
        """Now, and so that the peer sees a loss and not an end (RST in place of FIN)."""
        with contextlib.suppress(OSError, AttributeError):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.transport.abort()

    @property
    def peer(self) -> str:
        """The other end's address, as host:port."""
        address = self.transport.get_extra_info("peername")
        if not isinstance(address, tuple):
            return "unknown"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"{host}:{address[1]}"

    # Deadlines.

    def expect_by(self, deadline: float) -> None:
        """Something must happen until then; otherwise whoever waits gets a TimeoutError, or the
        sink is told."""
        self.deadline = deadline
        if deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self.loop.call_at(deadline, self._look)

    def _look(self) -> None:
        """The timer fired; the deadline may have moved since it was set."""
        self._timer, self._timer_at = None, INFINITY
        if self.deadline > self.loop.time():
            self.expect_by(self.deadline)
            return
        self.deadline = INFINITY
        if self.sink is not None:
            self.sink.expired(self)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError())

    def _ended(self, clean: bool) -> None:
        if self.gone is not None:
            return
        fault = Fault.CLIENT_GONE if self.side is Blame.CLIENT else Fault.SERVER_GONE
        how = "closed" if clean else "lost"
        self.gone = PeerGone(fault, f"the {self.side.value}'s connection was {how}", clean)
        if self.sink is not None:
            self.sink.lost(self, self.gone)
        if self.on_gone is not None:
            self.on_gone()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def linger(wire: Wire) -> None:
    """Close a client's wire although it is still sending: closing with unread bytes would reset
    the connection and could take our last answer with it."""
    wire.sink = Discard()
    wire.buffer.clear()
    if wire.held:
        wire.release()
    with contextlib.suppress(OSError, NotImplementedError):
        wire.transport.write_eof()
    deadline = wire.loop.time() + LINGER_S
    while wire.gone is None:
        await wire.news(deadline)
    wire.close()


@functools.cache
def client_tls() -> ssl.SSLContext:
    """Made when the first https:// server is dialled: loading the trust store takes 20 ms."""
    return ssl.create_default_context()


async def dial(host: str, port: int, tls: bool, timeout_s: float) -> Wire:
    """A new connection to a server.  Raises PeerGone."""
    try:
        async with asyncio.timeout(timeout_s):
            _, wire = await asyncio.get_running_loop().create_connection(
                lambda: Wire(Blame.SERVER), host, port, ssl=client_tls() if tls else None
            )
            return wire
    except TimeoutError:
        text = f"no connection within {timeout_s:g} s"
        raise PeerGone(Fault.CONNECT_TIMEOUT, text) from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise PeerGone(Fault.CONNECT_FAILED, f"cannot connect: {reason.lower()}") from None


class Pool:
    """The connections to one server.  Idle ones are kept for POOL_IDLE_S, a second less than vLLM
    keeps them, and the newest is used first.  It is the sink of its idle wires: whatever a server
    says without being asked ends the connection."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.tls = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        self.authority = parts.netloc
        self.prefix = parts.path
        self.idle: dict[Wire, None] = {}

    async def acquire(self, connect_timeout_s: float, fresh: bool = False) -> Wire:
        """A connection, idle or new.  Raises PeerGone."""
        while self.idle and not fresh:
            wire, _ = self.idle.popitem()
            wire.sink = None
            if wire.gone is None and not wire.transport.is_closing():
                wire.reused, wire.reusable = True, False
                return wire
        return await dial(self.host, self.port, self.tls, connect_timeout_s)

    def release(self, wire: Wire) -> None:
        """Keep it if it may be used again; otherwise close it at once, which tells a vLLM that is
        still generating to stop."""
        wire.feeder = wire.on_gone = None
        good = wire.reusable and wire.gone is None and not wire.buffer
        if not good or len(self.idle) >= POOL_IDLE_LIMIT:
            wire.sink = None
            wire.abort()
            return
        if wire.held:
            wire.release()
        wire.sink = self
        wire.expect_by(wire.loop.time() + POOL_IDLE_S)
        self.idle[wire] = None

    def close(self) -> None:
        while self.idle:
            self.idle.popitem()[0].abort()

    def feed(self, wire: Wire, data: bytes) -> None:
        self.expired(wire)

    def lost(self, wire: Wire, gone: PeerGone) -> None:
        self.idle.pop(wire, None)

    def expired(self, wire: Wire) -> None:
        self.idle.pop(wire, None)
        wire.sink = None
        wire.abort()


async def read_content(wire: Wire, decoder: Decoder, deadline: float) -> bytes:
    """The next piece of a message's content, waiting for it; b"" with `decoder.done` at its end.
    Raises PeerGone, BadMessage, TimeoutError."""
    while True:
        if decoder.done:
            return b""
        if wire.buffer:
            content = decoder.feed(wire.take())
            if content or decoder.done:
                return content
        elif wire.gone is not None:
            if decoder.until_close and wire.gone.clean:
                decoder.done = True
                return b""
            raise wire.gone
        else:
            await wire.news(deadline)


async def fetch(pool: Pool, path: str, timeout_s: float) -> tuple[int, bytes]:
    """GET something small from a server: (status, content).  For probes and scrapes; a request of
    a client takes the way of the exchange.  Raises PeerGone, BadMessage, TimeoutError."""
    head = f"GET {pool.prefix}{path} HTTP/1.1\r\nHost: {pool.authority}\r\nAccept: */*\r\n\r\n"
    async with asyncio.timeout(timeout_s):
        for fresh in (False, True):
            wire = await pool.acquire(timeout_s, fresh)
            try:
                return await converse_briefly(wire, head.encode("latin-1"))
            except PeerGone as gone:
                if gone.fault is not Fault.STALE:
                    raise
            finally:
                pool.release(wire)
        raise AssertionError("a fresh connection is not stale")


async def converse_briefly(wire: Wire, request: bytes) -> tuple[int, bytes]:
    wire.transport.write(request)
    head = await read_response_head(wire, INFINITY)
    decoder = decoder_for(response_framing(head, "GET"))
    content = bytearray()
    while not decoder.done:
        content += await read_content(wire, decoder, INFINITY)
        if len(content) > FETCH_LIMIT_BYTES:
            raise BadMessage(Fault.BAD_ANSWER, f"its answer is longer than {FETCH_LIMIT_BYTES} bytes")
    wire.reusable = head.persists and not decoder.rest
    return head.status, bytes(content)


async def read_response_head(
    wire: Wire, deadline: float, informational: Callable[[ResponseHead], object] | None = None
) -> ResponseHead:
    """The head of a server's answer; 1xx heads before it are handed to `informational`.  A reused
    connection that ends without a byte is STALE: the server had closed it while it was idle."""
    for _ in range(INFORMATIONAL_LIMIT):
        try:
            raw = await wire.read_head(deadline)
        except BadMessage as bad:
            raise BadMessage(Fault.BAD_ANSWER, str(bad)) from None
        if raw is None:
            text = "the server's connection was closed without an answer"
            raise PeerGone(Fault.STALE if wire.reused else Fault.SERVER_GONE, text)
        head = parse_response_head(raw)
        if head.status >= 200 or head.status == 101:
            return head
        wire.reused = False  # it is alive; from here on an end is a loss
        if informational is not None and head.status != 100:
            informational(head)
    raise BadMessage(Fault.BAD_ANSWER, f"more than {INFORMATIONAL_LIMIT} informational responses")


# ════════════════════════════════════════════════════════════════════════════════════════════
#  11  exchange
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# One request, from its head to its last byte.  An Exchange gathers the content, has it read as a
# Call, and carries out the steps of a plan; it decides nothing itself.  A server's failure
# becomes an Outcome for the plan; a client's leaving cancels the task wherever it stands, which
# closes the server's connection on the way out, so that vLLM stops generating.


class Core:
    """What all exchanges work with.  The balancer owns it and replaces its parts on reload."""

    def __init__(self, settings: Settings, draw: random.Random) -> None:
        self.settings = settings
        self.policy = POLICIES[settings.policy]
        self.draw = draw
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.pools: dict[str, Pool] = {}
        self.clients: set[Wire] = set()
        self.stopping = False
        self.settings_good = True
        self.on_terminal = False  # where request lines are written only if log_to_console says so
        self.started_at = time.time()
        self._changed = asyncio.Event()

    def pool(self, url: str) -> Pool:
        if url not in self.pools:
            self.pools[url] = Pool(url)
        return self.pools[url]

    def announce(self, change: Transition | None) -> None:
        """The fleet was told something; if that changed a server's state, everybody hears it."""
        if change is not None:
            self.ledger.transitions.add(change.url, change.new.value)
            known = {v.url: v.models for v in self.fleet.views()} if self.settings.show_models else {}
            level = logging.INFO if change.new is State.HEALTHY else logging.WARNING
            log.log(level, "%s", transition_line(change, known.get(change.url)))
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Until the fleet is told something."""
        await self._changed.wait()

    def clock(self) -> Clock:
        return Clock(asyncio.get_running_loop().time(), time.time())


class abandoned_if_gone:  # noqa: N801  # reads as a sentence where it is used
    """`with abandoned_if_gone(client):` — the block is left the moment the client leaves, by
    PeerGone, wherever it waits."""

    __slots__ = ("_client", "_task")

    def __init__(self, client: Wire) -> None:
        self._client = client
        self._task = asyncio.current_task()

    def __enter__(self) -> None:
        if self._client.gone is not None:
            raise self._client.gone
        self._client.on_gone = self._task.cancel  # type: ignore[union-attr]

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._client.on_gone = None
        if kind is asyncio.CancelledError and self._client.gone is not None:
            self._task.uncancel()  # type: ignore[union-attr]
            raise self._client.gone from None


class Pump:
    """Moves an answer's content from a server to the client, below the awaits: the sink of the
    server's wire.  `done` is set when the content has ended, or to the exception that ended it.

    Back-pressure: while the client's wire is blocked, the server's is held, and it is the client
    who must move; otherwise silence is the server's.
    """

    __slots__ = (
        "client", "server", "decoder", "chunked", "done", "sent_bytes", "first_at", "last",
        "_silence_s", "_moved_at", "_observe", "_gaps",
    )  # fmt: skip

    def __init__(
        self, client: Wire, server: Wire, decoder: Decoder, chunked: bool, silence_s: float,
        observe: Callable[[list[float], float], None] | None, gaps: list[float],
    ) -> None:  # fmt: skip
        self.client, self.server, self.decoder, self.chunked = client, server, decoder, chunked
        self.done = client.loop.create_future()
        self.sent_bytes = 0
        self.first_at: float | None = None  # when the first piece came
        self.last = b""  # the last piece
        self._silence_s = silence_s
        self._moved_at = client.loop.time()
        self._observe, self._gaps = observe, gaps
        server.sink = self
        server.expect_by(self._moved_at + silence_s)
        client.feeder = server
        if client.blocked:
            server.hold()

    def feed(self, wire: Wire, data: bytes) -> None:
        """A piece came from the server; once per piece, so this is the hottest code there is."""
        now = wire.loop.time()
        decoder = self.decoder
        try:
            content = decoder.feed(data)
        except BadMessage as bad:
            self._end(BadMessage(Fault.BAD_ANSWER, str(bad)))
            return
        if content:
            self.sent_bytes += len(content)
            if self.first_at is None:
                self.first_at = now
            if self._observe is not None:
                self._observe(self._gaps, now - self._moved_at)
            self._moved_at, self.last = now, content
            if self.chunked:
                content = data if decoder.verbatim else encode_chunk(content)
        wire.deadline = now + self._silence_s
        if decoder.done:
            self.client.transport.write(content + LAST_CHUNK if self.chunked else content)
            self._end(None)
        elif content:
            self.client.transport.write(content)

    def lost(self, wire: Wire, gone: PeerGone) -> None:
        if self.decoder.until_close and gone.clean:
            self.decoder.done = True
            if self.chunked:
                self.client.transport.write(LAST_CHUNK)
            self._end(None)
        else:
            self._end(gone)

    def expired(self, wire: Wire) -> None:
        if not self.client.blocked:
            self._end(TimeoutError())
        elif wire.loop.time() - self._moved_at < 2 * self._silence_s:
            wire.expect_by(wire.loop.time() + self._silence_s)  # the client's turn begins
        else:
            self.client.abort()  # it took nothing for that long: as good as gone

    def _end(self, error: Exception | None) -> None:
        self.server.sink = self.client.feeder = None
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class Tunnel:
    """Moves bytes one way between two wires after a protocol switch, until one of them ends."""

    def __init__(self, to: Wire, ended: asyncio.Event) -> None:
        self.to, self.ended = to, ended

    def feed(self, wire: Wire, data: bytes) -> None:
        self.to.transport.write(data)

    def lost(self, wire: Wire, gone: PeerGone) -> None:
        self.ended.set()

    def expired(self, wire: Wire) -> None:
        """No deadline: a quiet websocket is a good one."""


Pairs = Iterable[tuple[str, str]]


class Reply(NamedTuple):
    """An answer of the balancer's own."""

    status: int
    content: bytes = b""
    content_type: str = "application/json"
    fields: Pairs = ()


class Exchange:
    """One request and its answer, on one client's wire."""

    def __init__(self, core: Core, client: Wire, head: RequestHead) -> None:
        self.core, self.client, self.head = core, client, head
        self.settings = core.settings  # those in force when the request came
        self.loop = client.loop
        self.began_at = self.asked_at = self.loop.time()
        self.first_byte_at: float | None = None
        self.path = inference_path(head.path)
        self.call = Call(self.path, None, False, b"")
        self.model_label = ""
        self.framing = request_framing(head)
        self.unread = self.framing != NO_CONTENT  # content that was not taken off the wire yet
        self.request_id = request_id(head, core.draw)
        self.cors = cors_fields(head, self.settings.cors_allowed_origins)
        self.persists = head.persists and not core.stopping
        self.forwarded = ""  # the request's end-to-end fields, made once
        self.attempts = 0
        self.failures: list[str] = []  # of earlier attempts
        self.server = ""
        self.shown: ResponseHead | None = None  # the answer that was committed, and how it is sent
        self.shown_as = NO_CONTENT
        self.status = 0
        self.sent_bytes = 0
        self.last = b""  # the last piece of content that was sent
        self.end = "complete"

    @property
    def committed(self) -> bool:
        return self.status > 0

    # The life of a request.

    async def run(self) -> None:
        """Have a server answer.  Afterwards `persists` tells whether the connection may carry
        another request."""
        try:
            with abandoned_if_gone(self.client):
                content, scan = await self.gather()
                s = self.settings
                self.call = read_call(
                    self.head, self.path, content, scan, s.aliases, s.default_model
                )
                self.model_label = self.label()
                self.forwarded = self.forwarded_fields()
                self.asked_at = self.loop.time()
                await self.drive(relay_plan(self.choose, s, self.core.draw))
        except BadMessage as bad:
            self.refuse(bad.fault, str(bad))
        except PeerGone as gone:  # the client; a server's leaving has become an outcome
            self.status, self.end = self.status or gone.fault.status, gone.fault.label
            self.persists = False
        except asyncio.CancelledError:
            self.end = Fault.STOPPING.label
            raise

    async def drive(self, plan: Plan) -> None:
        """Carry out a plan's steps, one at a time."""
        with contextlib.suppress(StopIteration):
            step = next(plan)
            while True:
                step = plan.send(await self.PERFORM[type(step)](self, step))

    def choose(self, tried: frozenset[str]) -> Ranking:
        core = self.core
        moment = Moment(self.loop.time(), core.settings.metrics_interval)
        return rank(core.fleet.views(), self.call.model, tried, core.policy, moment, core.draw)

    async def pause(self, step: Pause) -> Outcome:
        await asyncio.sleep(step.seconds)
        return WELL

    async def wait_for_fleet(self, step: Settle) -> Outcome:
        left = self.asked_at + step.seconds - self.loop.time()
        try:
            async with asyncio.timeout(max(0.0, left)):
                await self.core.change()
        except TimeoutError:
            return Outcome(Fault.NO_SERVER)
        return WELL

    async def answer(self, step: Answer) -> Outcome:
        """The end of a plan that found nobody to answer: a server's words, or ours."""
        fault, text, _, held = step.outcome
        if held is not None:
            self.server = held.url
            self.end = fault.label if fault else self.end
            self.show_held(held)
        elif fault is not None:
            self.refuse(fault, text)
        return WELL

    # The request's content.

    async def gather(self) -> tuple[bytes | bytearray, MemberScan | None]:
        """The whole content: it must be there to be sent again.  Large JSON is scanned as it
        comes in, a piece at a time, so that it does not hold up other streams."""
        client, framing, limit = self.client, self.framing, self.settings.max_body_bytes
        if framing.length > limit:
            raise self.too_large(f"{framing.length}")
        if framing == NO_CONTENT:
            return b"", None
        self.expect_continue()
        content: bytes | bytearray
        scan = MemberScan(CALL_MEMBERS)
        if framing.kind == "length" and len(client.buffer) >= framing.length:
            content = client.take(framing.length)
        else:
            content, decoder = bytearray(), decoder_for(framing)
            while not decoder.done:
                deadline = self.loop.time() + CLIENT_SILENCE_S
                try:
                    content += await read_content(client, decoder, deadline)
                except TimeoutError:
                    text = f"no more of the request's content came for {CLIENT_SILENCE_S:g} s"
                    raise BadMessage(Fault.CLIENT_SLOW, text) from None
                if len(content) > limit:
                    raise self.too_large(f"more than {limit}")
                if len(content) > SMALL_CONTENT_BYTES:
                    scan.advance(content)
            client.buffer[:0] = decoder.rest
        self.unread = False
        if len(content) <= SMALL_CONTENT_BYTES:
            return content, None
        scan.advance(content)
        return content, scan

    def too_large(self, found: str) -> BadMessage:
        limit = self.settings.max_body_bytes
        text = f"the content has {found} bytes, the limit max_body_bytes is {limit}"
        return BadMessage(Fault.CONTENT_TOO_LARGE, text)

    def expect_continue(self) -> None:
        """RFC 9110 §10.1.1.  We want the content ourselves, so the answer is ours."""
        expected = self.head.fields.get("expect")
        if expected and expected.lower() != "100-continue":
            text = f"Expect is {shown(expected)}, only 100-continue is understood"
            raise BadMessage(Fault.BAD_EXPECTATION, text)
        if expected and self.head.minor >= 1 and not self.client.buffer:
            self.client.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def forwarded_fields(self) -> str:
        """The request's fields for whichever server; RFC 9110 §7.6.3 asks for Via."""
        fields = self.head.fields
        client_host = self.client.peer.rpartition(":")[0]

        def appended(key: str, value: str) -> str:
            return f"{fields.values[key]}, {value}" if key in fields.values else value

        return forward_fields(
            self.head,
            (
                ("X-Request-Id", self.request_id),
                ("X-Forwarded-For", appended("x-forwarded-for", client_host)),
                ("X-Forwarded-Proto", fields.get("x-forwarded-proto", "http")),
                ("X-Forwarded-Host", fields.get("x-forwarded-host") or fields.get("host", "-")),
                ("Via", appended("via", "1.1 mvllm_lite")),
            ),
        )

    # One attempt.

    async def relay(self, step: Relay) -> Outcome:
        """Ask a server, and book how that went."""
        core, label = self.core, "abandoned"
        if self.failures:
            core.ledger.retries.add(self.failures[-1])
        self.attempts, self.server = step.attempt, step.url
        try:
            with core.fleet.lease(step.url):
                outcome = await self.ask(step.url)
            label = outcome.fault.label if outcome.fault else "ok"
        finally:
            core.ledger.attempts.add(step.url, label)
        fault = outcome.fault
        if fault is None:
            core.fleet.succeeded(step.url)
            return outcome
        if fault.blame is Blame.SERVER:
            now = self.loop.time()
            core.announce(core.fleet.failed(step.url, outcome.text, now, self.settings))
        if not outcome.committed:
            self.failures.append(label)
        elif fault is not Fault.SERVER_ERROR:  # which was shown whole
            self.break_off(fault, outcome.text)
        return outcome

    async def ask(self, url: str) -> Outcome:
        """Send the request over an idle or a new connection.  An idle one that turns out to be
        closed is replaced by a new one, and nobody is blamed."""
        pool, fresh = self.core.pool(url), False
        while True:
            try:
                wire = await pool.acquire(self.settings.connect_timeout, fresh)
            except PeerGone as gone:
                return Outcome(gone.fault, str(gone))
            try:
                return await self.converse(wire, pool, url)
            except PeerGone as gone:
                if gone.fault is not Fault.STALE:
                    return Outcome(gone.fault, str(gone), self.committed)
                fresh = True
            except BadMessage as bad:
                return Outcome(Fault.BAD_ANSWER, str(bad), self.committed)
            except TimeoutError:
                text = f"the server said nothing for {self.settings.request_timeout:g} s"
                return Outcome(Fault.SERVER_SILENT, text, self.committed)
            finally:
                pool.release(wire)

    async def converse(self, wire: Wire, pool: Pool, url: str) -> Outcome:
        """One request and its answer on one connection: send, listen, hold back what may still
        be replaced, commit, pump.  Raises PeerGone, BadMessage, TimeoutError."""
        silence_s = self.settings.request_timeout
        content = self.call.content
        request = forward_request(
            self.head,
            pool.prefix + self.target(),
            pool.authority,
            self.forwarded,
            len(content) if content or "content-length" in self.head.fields.values else None,
        )
        sent_whole = await wire.send(request, content, silence_s)
        head = await read_response_head(wire, self.loop.time() + silence_s, self.pass_informational)
        if head.status == 101:
            return await self.tunnel(wire, head)
        decoder = decoder_for(response_framing(head, self.head.method))
        fault, first = await self.hold_back(wire, head, decoder)
        if fault is not None:
            wire.reusable = sent_whole and decoder.done and head.persists and not decoder.rest
            return Outcome(fault, f"the server answered {head.status}", held=Held(url, head, first))
        location, added = head.fields.get("location"), ()
        if location:
            added = (("Location", local_location(location, pool.authority, pool.prefix)),)
        await self.commit(wire, head, decoder, first, added)
        wire.reusable = sent_whole and head.persists and not decoder.rest
        if head.status >= 500:
            return Outcome(Fault.SERVER_ERROR, f"the server answered {head.status}", True)
        return WELL

    def target(self) -> str:
        query = self.head.query
        return f"{self.path}?{query}" if query or self.head.target.endswith("?") else self.path

    def pass_informational(self, head: ResponseHead) -> None:
        if self.head.minor >= 1:
            self.client.transport.write(return_response(head, self.head, NO_CONTENT, True))

    async def hold_back(
        self, wire: Wire, head: ResponseHead, decoder: Decoder
    ) -> tuple[Fault | None, bytes]:
        """Read as much of an answer as it takes to see whether it is one: of a failure all (it
        may be shown later), of an event stream its first event.  Returns the fault it is, or
        None, and the content so far."""
        fault, held = self.fault_of(head), b""
        if fault is None and (not head.is_event_stream or decoder.done):
            return None, decoder.feed(wire.take()) if wire.buffer and not decoder.done else b""
        while len(held) <= HELD_LIMIT_BYTES:
            if fault is None:
                begun = stream_begun(held)
                if begun is Begun.CONTENT:
                    break
                if begun is Begun.FAILED or decoder.done:
                    fault = Fault.STREAM_FAILED
            if decoder.done:
                return fault, held
            deadline = self.loop.time() + self.settings.request_timeout
            held += await read_content(wire, decoder, deadline)
        return None, held

    def fault_of(self, head: ResponseHead) -> Fault | None:
        """The failure that a status alone tells, where another server may do better."""
        if head.status in self.settings.retry_statuses:
            return Fault.SERVER_ERROR
        return Fault.SERVER_BUSY if head.status == 429 else None

    async def commit(
        self, wire: Wire, head: ResponseHead, decoder: Decoder, first: bytes, added: Pairs
    ) -> None:
        """Show the answer to the client: its head, what is there of its content, and the rest as
        it comes.  From here on there is no other server."""
        sized = "content-length" in head.fields.values
        bare = self.head.method == "HEAD" or head.status in (204, 304)
        framing = Framing("length") if sized or bare else CHUNKED if self.head.minor else UNTIL_CLOSE
        self.show(head, framing, first, decoder.done, added)
        if decoder.done:
            return
        pieces, streams = self.core.ledger.pieces, head.is_event_stream
        pump = Pump(
            self.client, wire, decoder, framing.kind == "chunked", self.settings.request_timeout,
            pieces.observe if streams else None,
            pieces.child(self.model_label) if streams else [],
        )  # fmt: skip
        try:
            if wire.gone is not None:
                pump.lost(wire, wire.gone)
            await pump.done
        finally:
            wire.sink = self.client.feeder = None
            self.sent_bytes += pump.sent_bytes
            self.first_byte_at = self.first_byte_at or pump.first_at
            self.last = pump.last or self.last

    def show(
        self, head: ResponseHead, framing: Framing, content: bytes, done: bool, added: Pairs = ()
    ) -> None:
        """Write a server's head and the first of its content, or all if it is `done`."""
        self.shown, self.shown_as, self.status = head, framing, head.status
        if framing.kind == "close":
            self.persists = False
        fields = [*added, ("X-Request-Id", self.request_id), *self.cors]
        if self.settings.server_header:
            fields.append(("X-MVLLM-Server", self.server))
        if head.is_event_stream:
            fields.append(("X-Accel-Buffering", "no"))  # an nginx before us would collect events
        replaced = CORS_FIELDS if self.cors else frozenset()
        out = return_response(head, self.head, framing, self.persists, fields, replaced)
        if content:
            self.first_byte_at = self.loop.time()
            self.sent_bytes, self.last = len(content), content
            out += encode_chunk(content) if framing.kind == "chunked" else content
        if done and framing.kind == "chunked":
            out += LAST_CHUNK
        self.client.transport.write(out)

    def show_held(self, held: Held) -> None:
        """Write an answer that was held back whole."""
        length = len(held.content)
        sized = self.head.method == "HEAD" or "content-length" in held.head.fields.values
        added = () if sized else (("Content-Length", str(length)),)
        self.show(held.head, Framing("length", length), held.content, True, added)

    async def tunnel(self, wire: Wire, head: ResponseHead) -> Outcome:
        """The server agreed to another protocol: from here on bytes go both ways, untouched."""
        client, ended = self.client, asyncio.Event()
        self.shown, self.status, self.persists = head, 101, False
        client.on_gone = None  # an end like any other
        client.transport.write(return_response(head, self.head, NO_CONTENT, True))
        client.sink, wire.sink = Tunnel(wire, ended), Tunnel(client, ended)
        client.feeder, wire.feeder = wire, client
        client.expect_by(INFINITY)
        wire.expect_by(INFINITY)
        for end, other in ((wire, client), (client, wire)):
            if end.buffer:
                other.transport.write(end.take())
        try:
            if wire.gone is None:
                await ended.wait()
        finally:
            client.sink = client.feeder = None
        return WELL

    # The end.

    def break_off(self, fault: Fault, text: str) -> None:
        """An answer that was begun cannot be finished.  A stream's reader gets an error event;
        whoever reads, the message ends broken, so that nobody takes it for whole."""
        self.persists, self.end = False, fault.label
        event = error_event(fault, f"The answer broke off: {text}.")
        if not self.last.endswith((b"\n\n", b"\r\n\r\n")):
            event = b"\n\n" + event  # what was cut must not swallow it
        if self.shown is None or not self.shown.is_event_stream or self.shown_as.kind == "length":
            self.client.reset()
        elif self.shown_as.kind == "chunked":
            self.client.transport.write(encode_chunk(event))  # and no last chunk
        else:
            self.client.transport.write(event)

    def refuse(self, fault: Fault, text: str) -> None:
        """Answer with an error of our own."""
        self.end = fault.label
        fields = [("X-MVLLM-Error", fault.label)]
        if fault.status == 503:
            retry_s = min(30, max(1, math.ceil(self.settings.health_check_interval)))
            fields.append(("Retry-After", str(retry_s)))
        param = "model" if fault is Fault.UNKNOWN_MODEL else None
        content = error_body(fault, text, self.path, param)
        self.respond(Reply(fault.status, content, fields=fields))

    def respond(self, reply: Reply) -> None:
        """Write a whole answer of our own.  If content of the request is still to come, the
        connection cannot go on: whoever closes it must linger."""
        self.persists = self.persists and not self.unread
        self.status = reply.status
        self.sent_bytes = len(reply.content)
        fields = [("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()))]
        if reply.content:
            fields.append(("Content-Type", reply.content_type))
        fields += [*reply.fields, ("X-Request-Id", self.request_id), *self.cors]
        self.client.transport.write(
            own_response(reply.status, self.head, reply.content, self.persists, fields)
        )

    def label(self) -> str:
        """The model as a label: only names that servers told us, so that nobody can invent any."""
        model = self.call.model
        if model is None:
            return ""
        return model if any(model in (v.models or ()) for v in self.core.fleet.views()) else "unknown"

    def settle(self) -> None:
        """Count the request, and write its line."""
        now, ledger, model = self.loop.time(), self.core.ledger, self.model_label
        ledger.requests.add(self.server, model, str(self.status))
        ledger.durations.observe(ledger.durations.child(model), now - self.began_at)
        request_bytes = len(self.call.content)
        ledger.request_sizes.observe(ledger.request_sizes.child(model), request_bytes)
        ledger.response_sizes.observe(ledger.response_sizes.child(model), self.sent_bytes)
        if self.first_byte_at is not None and self.server:
            waited = self.first_byte_at - self.asked_at
            ledger.first_byte.observe(ledger.first_byte.child(model), waited)
        if log.isEnabledFor(logging.INFO) and (
            self.settings.log_to_console or not self.core.on_terminal
        ):
            log.info("%s", access_line(self.facts(now)))

    def facts(self, now: float) -> dict[str, Any]:
        first = self.first_byte_at
        return {
            "id": self.request_id,
            "client": self.client.peer,
            "method": self.head.method,
            "path": self.head.path[:200],
            "model": self.call.model or "-",
            "server": self.server or "-",
            "attempts": self.attempts,
            "failed": ",".join(self.failures) or "-",
            "status": self.status,
            "first_byte": first - self.began_at if first is not None else "-",
            "duration": now - self.began_at,
            "bytes": f"{len(self.call.content)}/{self.sent_bytes}",
            "end": self.end,
        }

    PERFORM: ClassVar[dict[type, Callable[..., Awaitable[Outcome]]]] = {
        Relay: relay,
        Pause: pause,
        Settle: wait_for_fleet,
        Answer: answer,
    }


REQUEST_ID_FIELDS = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")


def request_id(head: RequestHead, draw: random.Random) -> str:
    """The client's id for the request, or a new one."""
    for key in REQUEST_ID_FIELDS:
        value = head.fields.get(key)
        if value and len(value) <= REQUEST_ID_LIMIT and value.isascii() and value.isprintable():
            return value
    return f"{draw.getrandbits(128):032x}"


# ════════════════════════════════════════════════════════════════════════════════════════════
#  12  watch
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# What goes on without a request: each server has two loops of its own, one that checks its health
# and one that reads its load, so that a hanging server makes nobody else's numbers old.  And the
# settings file is read again and again: it is a few kB, which is cheaper than being clever about
# times and inodes, and sees a restored older file, a rename, and a ConfigMap's swapped symlink.


class Probe(NamedTuple):
    """What one check of a server found."""

    good: bool
    seconds: float
    why: str = ""
    models: dict[str, dict[str, Any]] | None = None
    models_why: str = ""


async def probe(pool: Pool, timeout_s: float, want_models: bool) -> Probe:
    """Check a server: /health, or /v1/models where there is no /health.  Models are asked for
    along with it, so that a server is known with its models or not at all."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        status, _ = await fetch(pool, "/health", timeout_s)
        seconds = loop.time() - begun
        has_health = status not in (404, 405)
        if has_health and not 200 <= status < 300:
            return Probe(False, seconds, f"/health answered {status}")
        if has_health and not want_models:
            return Probe(True, seconds)
        status, content = await fetch(pool, "/v1/models", timeout_s)
    except (PeerGone, BadMessage) as error:
        return Probe(False, loop.time() - begun, str(error))
    except TimeoutError:
        return Probe(False, loop.time() - begun, f"no answer to a check within {timeout_s:g} s")
    models = model_list(content) if status == 200 else None
    why = "" if models is not None else f"/v1/models answered {status}" + " without a list" * (status == 200)
    return Probe(has_health or not why, seconds, why, models, why)


async def watch_health(core: Core, url: str) -> None:
    """Check one server for ever."""
    pool, loop = core.pool(url), asyncio.get_running_loop()
    while True:
        s = core.settings
        if s.enable_active_health_check:
            want_models = core.fleet.models_due(url, loop.time(), s)
            found = await probe(pool, s.health_check_timeout, want_models)
            now = loop.time()
            if found.models is not None:
                core.fleet.learned(url, found.models, now)
            elif found.good and found.models_why:
                log.debug("%s: %s", url, found.models_why)
            core.announce(core.fleet.probed(url, found.good, found.seconds, found.why, now, s))
            await asyncio.sleep(s.health_check_interval)
        else:
            if core.fleet.models_due(url, loop.time(), s):
                found = await probe(pool, s.health_check_timeout, True)
                if found.models is not None:
                    core.fleet.learned(url, found.models, loop.time())
            core.announce(core.fleet.recovered_by_time(url, loop.time(), s))
            await asyncio.sleep(min(1.0, s.models_interval))


async def watch_load(core: Core, url: str) -> None:
    """Read one server's load for ever.  A failure leaves the old numbers, which fade."""
    pool, loop = core.pool(url), asyncio.get_running_loop()
    while True:
        begun, own = loop.time(), core.fleet.in_flight(url)
        interval_s = core.settings.metrics_interval
        try:
            status, page = await fetch(pool, "/metrics", max(1.0, 2 * interval_s))
            if status == 200:
                load = engine_load(page.decode("utf-8", "replace"))
                own = max(own, core.fleet.in_flight(url))
                core.fleet.scraped(url, load, own, loop.time())
            result = "ok" if status == 200 else "refused"
        except (PeerGone, BadMessage, TimeoutError):
            result = "failed"
        core.ledger.scrapes.add(url, result)
        await asyncio.sleep(max(interval_s / 2, begun + interval_s - loop.time()))


class SettingsFile:
    """A settings file, and what it held when it was last looked at."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.held: bytes | None = None

    def read(self) -> bytes:
        """Raises OSError."""
        with open(self.path, "rb") as file:
            return file.read()

    async def changed(self) -> bytes | None:
        """What the file holds, if that is new; two looks must agree, because the first may fall
        between an editor's truncating and writing."""
        before = self.held
        try:
            found = self.read()
            while found != before:
                await asyncio.sleep(SETTLE_S)
                again = self.read()
                if again == found:
                    self.held = found
                    return found
                found = again
        except OSError as error:
            if before is not None:
                self.held = None
                raise SettingsError([unreadable(self.path, error)]) from None
        return None


def unreadable(path: str, error: OSError) -> Complaint:
    return Complaint(path, 0, "", f"cannot be read: {(error.strerror or str(error)).lower()}")


# ════════════════════════════════════════════════════════════════════════════════════════════
#  13  local
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# What the balancer answers itself, from what it knows: no request to any server, so these paths
# answer at once even when every server hangs.
#
# To add a path: a function (core, head) -> Reply with @local("/path"), and a line in the README.

Local = Callable[[Core, RequestHead], Awaitable[Reply]]
LOCAL: dict[str, Local] = {}


def local(*paths: str) -> Callable[[Local], Local]:
    def register(function: Local) -> Local:
        LOCAL.update(dict.fromkeys(paths, function))
        return function

    return register


def find_local(path: str) -> Local | None:
    """The function for a path; /v1/models/{id} is the only one with a variable part."""
    path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path[3:]
    return one_model if path.startswith(MODEL_PREFIX) else LOCAL.get(path)


def as_json(document: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode())


@local("/")
async def service(core: Core, head: RequestHead) -> Reply:
    return as_json(service_report())


@local("/version")
async def version(core: Core, head: RequestHead) -> Reply:
    return as_json({"version": __version__})


@local("/liveness", "/ping")
async def liveness(core: Core, head: RequestHead) -> Reply:
    return Reply(200, b"OK", "text/plain; charset=utf-8")


@local("/readiness")
async def readiness(core: Core, head: RequestHead) -> Reply:
    status, document = readiness_report(core.fleet.views(), core.stopping)
    return as_json(document, status)


@local("/health")
async def health(core: Core, head: RequestHead) -> Reply:
    fleet = core.fleet
    return as_json(health_report(fleet.views(), fleet.records(), core.settings, core.clock()))


@local("/load-stats")
async def load_stats(core: Core, head: RequestHead) -> Reply:
    return as_json(load_report(core.fleet.views(), core.settings, core.clock()))


@local("/server-models")
async def server_models(core: Core, head: RequestHead) -> Reply:
    """With ?refresh=1 every server is asked first, all at the same time."""
    if urllib.parse.parse_qs(head.query).get("refresh") in (["1"], ["true"]):
        views, timeout_s = core.fleet.views(), core.settings.health_check_timeout
        found = await asyncio.gather(*(probe(core.pool(v.url), timeout_s, True) for v in views))
        now = asyncio.get_running_loop().time()
        for view, one in zip(views, found):
            if one.models is not None:
                core.fleet.learned(view.url, one.models, now)
    views, records = core.fleet.views(), core.fleet.records()
    return as_json(server_models_report(views, records, core.clock()))


@local("/v1/models")
async def models(core: Core, head: RequestHead) -> Reply:
    return as_json(models_report(core.fleet.views(), core.settings.aliases))


MODEL_PREFIX = "/v1/models/"


async def one_model(core: Core, head: RequestHead) -> Reply:
    name = urllib.parse.unquote(head.path.partition(MODEL_PREFIX)[2].rstrip("/"))
    listed = models_report(core.fleet.views(), core.settings.aliases)["data"]
    for entry in listed:
        if entry["id"] == name:
            return as_json(entry)
    fault = Fault.UNKNOWN_MODEL
    names = ", ".join(entry["id"] for entry in listed) or "none"
    text = f"The model `{name}` does not exist. Valid names: {names}."
    content = error_body(fault, text, head.path, "model")
    return Reply(fault.status, content, fields=[("X-MVLLM-Error", fault.label)])


@local("/metrics")
async def metrics(core: Core, head: RequestHead) -> Reply:
    now = fleet_families(
        core.fleet.views(), len(core.clients), core.started_at, core.settings_good
    )
    page = expose([*core.ledger.families(), *now])
    return Reply(200, page.encode(), "text/plain; version=0.0.4; charset=utf-8")


# ════════════════════════════════════════════════════════════════════════════════════════════
#  14  balancer
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# Assembly: listens, serves each client's connection in a task of its own, keeps the watchers of
# every server running, follows the settings file, and stops without cutting answers short.


class Balancer:
    """The whole program, but for the command line.

    `path` is a settings file to follow, `overrides` what wins over it (see parse_settings).
    """

    def __init__(
        self,
        settings: Settings,
        path: str = "",
        overrides: Mapping[str, tuple[Any, str]] | None = None,
    ) -> None:
        self.core = Core(settings, random.Random())
        self.file = SettingsFile(path) if path else None
        self.overrides = overrides or {}
        self.port = 0  # the one that is listened on
        self._stop = asyncio.Event()
        self._look_now = asyncio.Event()
        self._watchers: dict[str, list[asyncio.Task[None]]] = {}
        self._serving: dict[Wire, asyncio.Task[None]] = {}
        self._exchanging: set[Wire] = set()  # clients that wait for an answer
        self._tasks: asyncio.TaskGroup = None  # type: ignore[assignment]  # while it runs

    async def run(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop` is called.  Calls `ready` once it listens.  Raises OSError when the
        address cannot be listened on."""
        settings, loop = self.core.settings, asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: Wire(Blame.CLIENT, self.accept), settings.host or None, settings.port,
            backlog=LISTEN_BACKLOG,
        )  # fmt: skip
        self.port = listener.sockets[0].getsockname()[1]
        async with asyncio.TaskGroup() as self._tasks:
            self.adopt(settings)
            following = self._tasks.create_task(self.follow())
            ready()
            await self._stop.wait()
            listener.close()
            await self.drain()
            following.cancel()
            for watchers in self._watchers.values():
                for task in watchers:
                    task.cancel()
            for task in self._serving.values():
                task.cancel()
        for pool in self.core.pools.values():
            pool.close()

    def stop(self) -> None:
        """Stop accepting and let running answers finish; called again, stop now."""
        if self._stop.is_set():
            for task in self._serving.values():
                task.cancel()
        self._stop.set()

    async def drain(self) -> None:
        """Close idle connections; let the others end, as long as that is allowed to take."""
        core = self.core
        core.stopping = True
        for wire in self._serving.keys() - self._exchanging:
            wire.close()
        if self._exchanging:
            log.info("stopping: %d answers are still running", len(self._exchanging))
        if self._serving:
            await asyncio.wait(self._serving.values(), timeout=core.settings.drain_timeout)
        if self._exchanging:
            log.warning("stopping: %d answers were cut short", len(self._exchanging))

    # Clients.

    def accept(self, wire: Wire) -> None:
        if self._stop.is_set():
            wire.abort()
            return
        self.core.clients.add(wire)
        self._serving[wire] = self._tasks.create_task(self.serve(wire))

    async def serve(self, wire: Wire) -> None:
        """One client's connection: its requests, one after the other."""
        try:
            while await self.serve_one(wire) and not self.core.stopping:
                pass
            await wire.closed()
        except (PeerGone, TimeoutError):
            pass  # left in the middle of a head, or idle for too long
        except asyncio.CancelledError:
            wire.abort()
        except Exception:  # the one broad except for clients: a mistake ends one connection
            log.exception("internal error on the connection of %s", wire.peer)
            self.core.ledger.errors.add()
        finally:
            self._exchanging.discard(wire)
            self._serving.pop(wire, None)
            self.core.clients.discard(wire)
            wire.close()

    async def serve_one(self, wire: Wire) -> bool:
        """One request; False if it was the connection's last."""
        head = await self.next_head(wire)
        if head is None:
            return False
        self._exchanging.add(wire)
        try:
            exchange = Exchange(self.core, wire, head)
        except BadMessage as bad:
            await self.reject(wire, bad)
            return False
        function = find_local(head.path)
        if is_preflight(head) and exchange.settings.cors_allowed_origins:
            exchange.respond(Reply(204, fields=preflight_fields(head)))
        elif function is not None:
            await self.serve_local(exchange, function)
        else:
            await self.serve_forwarded(exchange)
        self._exchanging.discard(wire)
        if exchange.unread and wire.gone is None:
            await linger(wire)
        return exchange.persists and wire.gone is None

    async def next_head(self, wire: Wire) -> RequestHead | None:
        """The next request's head; None at the end of the connection."""
        now = wire.loop.time
        while not wire.buffer and wire.gone is None:
            await wire.news(now() + CLIENT_IDLE_S)
        try:
            while wire.buffer.startswith(b"\r\n"):  # RFC 9112 §2.2: may be left from before
                wire.take(2)
            raw = await wire.read_head(now() + CLIENT_HEAD_S)
            return parse_request_head(raw) if raw is not None else None
        except BadMessage as bad:
            await self.reject(wire, bad)
        except TimeoutError:
            text = f"the request's head was not complete after {CLIENT_HEAD_S:g} s"
            await self.reject(wire, BadMessage(Fault.CLIENT_SLOW, text))
        return None

    async def reject(self, wire: Wire, bad: BadMessage) -> None:
        """Answer a request that cannot even be read."""
        fields = [("Content-Type", "application/json"), ("X-MVLLM-Error", bad.fault.label)]
        content = error_body(bad.fault, f"Bad request: {bad}.")
        wire.transport.write(own_response(bad.fault.status, None, content, False, fields))
        self.core.ledger.requests.add("", "", str(bad.fault.status))
        log.info("%s", access_line({"client": wire.peer, "status": bad.fault.status,
                                    "end": bad.fault.label, "reason": str(bad)}))  # fmt: skip
        await linger(wire)

    async def serve_local(self, exchange: Exchange, function: Local) -> None:
        head = exchange.head
        if head.method not in ("GET", "HEAD"):
            exchange.refuse(Fault.BAD_METHOD, f"{head.method} is not for {head.path}; use GET.")
            return
        exchange.respond(await function(self.core, head))

    async def serve_forwarded(self, exchange: Exchange) -> None:
        try:
            if exchange.path:
                await exchange.run()
            else:
                path = shown(exchange.head.path)
                text = f"{path} is neither an inference path of vLLM nor a path of the balancer."
                exchange.refuse(Fault.NOT_SERVED, text)
        except Exception:
            if not exchange.committed:
                exchange.refuse(Fault.INTERNAL, "An internal error; the log has the details.")
            raise
        finally:
            exchange.settle()

    # Settings.

    async def follow(self) -> None:
        """Look at the settings file for ever; SIGHUP makes it look at once."""
        while True:
            interval_s = self.core.settings.config_reload_interval
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._look_now.wait()
            self._look_now.clear()
            if self.file is not None:
                await self.look(self.file)

    def look_now(self) -> None:
        self._look_now.set()

    async def look(self, file: SettingsFile) -> None:
        """Take over what the file holds, if it changed and can be used."""
        try:
            content = await file.changed()
            if content is None:
                return
            text = content.decode("utf-8", "replace")
            settings, warnings = parse_settings(text, file.path, self.overrides)
        except SettingsError as error:
            self.core.settings_good = False
            self.core.ledger.reloads.add("refused")
            log.error("settings not taken over, the old ones stay:\n%s", error)
            return
        for warning in warnings:
            log.warning("%s", warning)
        for key in restart_needed(self.core.settings, settings):
            log.warning("%s: %s: a change takes effect at the next start", file.path, key)
        self.core.settings_good = True
        self.core.ledger.reloads.add("applied")
        self.adopt(settings)

    def adopt(self, settings: Settings) -> None:
        """Make these settings the ones in force.  Servers keep all that is known of them."""
        core, old = self.core, self.core.settings
        core.settings, core.policy = settings, POLICIES[settings.policy]
        log.setLevel(settings.log_level)
        added, draining = core.fleet.apply(settings.servers, asyncio.get_running_loop().time())
        wanted = {server.url for server in settings.servers}
        paced = [(s.health_check_interval, s.metrics_interval, s.enable_active_health_check)
                 for s in (old, settings)]  # fmt: skip
        for url in list(self._watchers):
            if url not in wanted or paced[0] != paced[1]:
                for task in self._watchers.pop(url):
                    task.cancel()
        for url in wanted - self._watchers.keys():
            self._watchers[url] = [
                self._tasks.create_task(self.watch(watch_health, url)),
                self._tasks.create_task(self.watch(watch_load, url)),
            ]
        known = {view.url for view in core.fleet.views()}
        for url in core.pools.keys() - known:
            core.pools.pop(url).close()
        if old is not settings:
            log.info("settings taken over: %d servers, %d added, %d draining",
                     len(settings.servers), len(added), len(draining))  # fmt: skip
        core.announce(None)

    async def watch(self, loop: Callable[[Core, str], Awaitable[None]], url: str) -> None:
        """Keep one of a server's loops running whatever happens in it."""
        while True:
            try:
                await loop(self.core, url)
            except Exception:  # the one broad except for background tasks
                log.exception("internal error while watching %s", url)
                self.core.ledger.errors.add()
                await asyncio.sleep(self.core.settings.health_check_interval)


# ════════════════════════════════════════════════════════════════════════════════════════════
#  15  demo
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# Simulated vLLM servers on loopback ports the system chose: no GPU, no set-up.  They stream
# words at a believable pace, run as many requests at once as they have capacity and let the rest
# wait, slow down as they fill up, and say so in /metrics.  POST /simulate {"mode": …} makes one
# fail, hang or slow down, for tests and for showing off.

MODES = ("ok", "fail", "hang", "slow")
WORDS = (
    "the a of to in and is that it for on with as by this from at or an be are not we you they "
    "model token cache server request stream answer queue batch prompt layer attention memory "
    "first next long short fast slow warm cold idle busy free full small large same other every "
    "waits runs fills drains grows learns keeps shares moves reads writes opens closes returns"
).split()


class Simulated(NamedTuple):
    """What kind of server to simulate."""

    name: str
    capacity: int  # requests in the batch at once
    token_s: float  # between two tokens with an empty batch; doubles when the batch is full
    prefill_tokens_per_s: float


DEMO_FLEET = (
    Simulated("big", 16, 0.015, 20000),
    Simulated("middle", 8, 0.025, 8000),
    Simulated("small", 4, 0.040, 3000),
)


class SimulatedServer:
    """One simulated vLLM server; `async with` starts and stops it, `url` says where it is."""

    def __init__(self, kind: Simulated, models: tuple[str, ...] = ("demo-model",), seed: int = 0):
        self.kind, self.models = kind, models
        self.mode = "ok"
        self.url = ""
        self.running = self.waiting = 0
        self.prompt_tokens = self.generated_tokens = self.aborted = 0
        self._draw = random.Random(seed)
        self._slots = asyncio.Semaphore(kind.capacity)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> SimulatedServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = "http://127.0.0.1:%d" % self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """As kill -9 would: nothing is finished."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, BadMessage, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = parse_request_head(await reader.readuntil(b"\r\n\r\n"))
        content = await reader.readexactly(request_framing(head).length)
        if head.path == "/simulate":
            status, reply = self._simulate(content)
        elif self.mode == "hang":
            await reader.read()  # until the other side gives up
            return False
        elif head.method == "POST":
            return await self._infer(head, content, reader, writer)
        else:
            status, reply = self._get(head.path)
        self._write(writer, head, status, reply)
        await writer.drain()
        return True

    def _write(
        self, writer: asyncio.StreamWriter, head: RequestHead, status: int, document: Any
    ) -> None:
        plain = isinstance(document, str)
        content = document.encode() if plain else json.dumps(document).encode()
        kind = "text/plain; charset=utf-8" if plain else "application/json"
        fields = [("server", "simulated"), ("content-type", kind)]
        writer.write(own_response(status, head, content, True, fields))

    def _simulate(self, content: bytes) -> tuple[int, Any]:
        mode = read_members(content, None).get("mode")
        if mode not in MODES:
            return 400, vllm_error(400, f"mode is {mode!r}, expected one of {', '.join(MODES)}")
        self.mode = mode
        return 200, {"mode": mode}

    def _get(self, path: str) -> tuple[int, Any]:
        created = {"object": "model", "created": 0, "owned_by": "vllm", "parent": None}
        pages = {
            "/health": "",
            "/version": {"version": "0.0.0+simulated"},
            "/v1/models": {
                "object": "list",
                "data": [{"id": m, **created, "root": m, "max_model_len": 8192} for m in self.models],
            },
            "/metrics": self._metrics(),
        }
        if path not in pages:
            return 404, {"detail": "Not Found"}
        return (500 if self.mode == "fail" else 200), pages[path]

    def _metrics(self) -> str:
        labels, values = ("engine", "model_name"), ("0", self.models[0])
        page: list[Family] = []
        for name, value in (
            ("num_requests_running", self.running),
            ("num_requests_waiting", self.waiting),
            ("kv_cache_usage_perc", min(1.0, 0.9 * self.running / self.kind.capacity)),
        ):
            gauge = Gauge(f"vllm:{name}", name, labels)
            gauge.set(value, *values)
            page.append(gauge)
        for name, value in (
            ("prompt_tokens_total", self.prompt_tokens),
            ("generation_tokens_total", self.generated_tokens),
        ):
            counter = Counter(f"vllm:{name}", name, labels)
            counter.add(*values, amount=value)
            page.append(counter)
        return expose(page)

    async def _infer(
        self,
        head: RequestHead,
        content: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """A completion of either kind, streamed or not; a client that leaves ends it."""
        wanted = read_members(content, None)
        chat = head.path == "/v1/chat/completions"
        if not chat and head.path != "/v1/completions":
            self._write(writer, head, 404, {"detail": "Not Found"})
            return True
        model = wanted.get("model") or self.models[0]
        if model not in self.models:
            text = f"The model `{model}` does not exist. Valid aliases: {', '.join(self.models)}."
            self._write(writer, head, 404, vllm_error(404, text))
            return True
        if self.mode == "fail":
            self._write(writer, head, 500, vllm_error(500, "EngineCore encountered an issue."))
            return True
        answer = Generation(self, writer, chat, model, wanted, len(content) // 4)
        work = asyncio.create_task(answer.run())
        left = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.aborted += 1
                return False
            work.result()
            return not left.done()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)


def vllm_error(code: int, text: str) -> dict[str, Any]:
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(code, "InternalServerError")
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


class Generation:
    """One answer of a simulated server."""

    def __init__(
        self, server: SimulatedServer, writer: asyncio.StreamWriter, chat: bool, model: str,
        wanted: dict[str, Any], prompt_tokens: int,
    ) -> None:  # fmt: skip
        self.server, self.writer, self.chat, self.model = server, writer, chat, model
        self.prompt_tokens = prompt_tokens
        self.stream = wanted.get("stream") is True
        limit = wanted.get("max_completion_tokens") or wanted.get("max_tokens")
        self.tokens = limit if isinstance(limit, int) and limit > 0 else server._draw.randint(40, 120)
        options = wanted.get("stream_options")
        self.usage_wanted = isinstance(options, dict) and options.get("include_usage") is True
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{server._draw.getrandbits(64):016x}"

    async def run(self) -> None:
        server = self.server
        if self.stream:  # as vLLM does, before there is anything to say
            self.writer.write(STREAM_HEAD)
        server.waiting += 1
        try:
            await server._slots.acquire()
        finally:
            server.waiting -= 1
        server.running += 1
        try:
            await self.generate()
        finally:
            server.running -= 1
            server._slots.release()

    async def generate(self) -> None:
        server, kind = self.server, self.server.kind
        server.prompt_tokens += self.prompt_tokens
        await asyncio.sleep(self.prompt_tokens / kind.prefill_tokens_per_s + kind.token_s)
        words = []
        for n in range(self.tokens):
            if n:
                crowding = 1 + server.running / kind.capacity
                slowness = 5 if server.mode == "slow" else 1
                await asyncio.sleep(
                    kind.token_s * crowding * slowness * server._draw.uniform(0.8, 1.2)
                )
            word = server._draw.choice(WORDS)
            word = word.capitalize() if n == 0 else " " + word
            words.append(word)
            server.generated_tokens += 1
            if self.stream:
                await self.event(self.choice(word, n))
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }
        if not self.stream:
            document = self.document([self.whole("".join(words))]) | {"usage": usage}
            answer = json.dumps(document).encode()
            kind_field = [("server", "simulated"), ("content-type", "application/json")]
            self.writer.write(own_response(200, None, answer, True, kind_field))
            return
        if self.usage_wanted:
            await self.event([], usage)
        self.writer.write(encode_chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
        await self.writer.drain()

    def choice(self, word: str, n: int) -> list[dict[str, Any]]:
        last = "length" if n == self.tokens - 1 else None
        if not self.chat:
            return [{"index": 0, "text": word, "logprobs": None, "finish_reason": last}]
        delta = {"role": "assistant", "content": word} if n == 0 else {"content": word}
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": last}]

    def whole(self, text: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": 0, **said, "logprobs": None, "finish_reason": "length"}

    def document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        chunk = ".chunk" if self.chat and self.stream else ""
        return {
            "id": self.id,
            "object": kind + chunk,
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
        }

    async def event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> None:
        document = self.document(choices) | ({"usage": usage} if usage else {})
        self.writer.write(encode_chunk(b"data: " + json.dumps(document).encode() + b"\n\n"))
        await self.writer.drain()


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: simulated\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


async def demo(servers: int, settings: Settings, run: Callable[[Balancer], Awaitable[None]]) -> None:
    """A balancer in front of simulated servers; `run` runs it."""
    async with contextlib.AsyncExitStack() as stack:
        fleet = []
        for i in range(servers):
            kind = DEMO_FLEET[i % len(DEMO_FLEET)]
            fleet.append(await stack.enter_async_context(SimulatedServer(kind, seed=i)))
        listed = tuple(ServerSettings(one.url, one.kind.capacity) for one in fleet)
        for one in fleet:
            size = f"{one.kind.capacity} at once, {1 / one.kind.token_s:.0f} tokens/s each"
            print(f"simulated vLLM server {one.url}: {size}", flush=True)
        await run(Balancer(dataclasses.replace(settings, servers=listed)))


# ════════════════════════════════════════════════════════════════════════════════════════════
#  16  command line
# ════════════════════════════════════════════════════════════════════════════════════════════
#
# Arguments, environment, logging, exit codes: 0 well, 1 the settings or the address cannot be
# used, 2 wrong arguments, or (check-config) no server can be reached.

DEFAULT_CONFIG = "servers.toml"
COMMANDS = ("run", "check-config", "demo", "version")

EXAMPLES = """\
examples:
  mvllm_lite.py servers.toml                        serve what the file describes
  mvllm_lite.py run --config servers.toml --port 9000 --console
  mvllm_lite.py --server http://10.0.0.1:8000 http://10.0.0.2:8000 --max-load 16 8
  mvllm_lite.py check-config servers.toml           read the file and ask every server
  mvllm_lite.py demo                                try it without any server

Settings come from flags, then the environment (CONFIG_PATH, {env}), then the file, then the
defaults.  SIGHUP reads the file again, SIGTERM and Ctrl-C let running answers finish, a second
one does not.
"""


def argument_parser() -> argparse.ArgumentParser:
    env = ", ".join(f.metadata["env"] for f in CONFIG_FIELDS.values() if f.metadata["env"])
    parser = argparse.ArgumentParser(
        prog="mvllm_lite.py",
        description="One OpenAI-compatible address in front of a fleet of vLLM servers.",
        epilog=EXAMPLES.format(env=env),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="command")

    # As in mvllm, `run -h ADDRESS` is the host; `-h` alone is help, as everywhere else.
    run = commands.add_parser("run", help="serve (the default)", add_help=False)
    run.add_argument("--help", action="help", help="show this help message and exit")
    run.add_argument("file", nargs="?", help=f"settings file (default: {DEFAULT_CONFIG})")
    run.add_argument("--config", metavar="FILE", help="the same")
    run.add_argument("--server", nargs="+", metavar="URL", help="servers, in place of a file's")
    run.add_argument("--max-load", nargs="+", metavar="N", help="their max_concurrent_requests")
    run.add_argument("-h", "--host", nargs="?", const="", help="address to listen on")
    run.add_argument("-p", "--port", help="port to listen on")
    run.add_argument("-c", "--console", action="store_true", help="a log line for each request")
    run.add_argument("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR")
    run.add_argument("-m", "--model", action="store_true", help="name models in state changes")
    run.set_defaults(parser=run)

    check = commands.add_parser("check-config", help="read the settings and ask every server")
    check.add_argument("file", nargs="?", help=f"settings file (default: {DEFAULT_CONFIG})")
    check.add_argument("--config", metavar="FILE", help="the same")

    show = commands.add_parser("demo", help="try it in front of simulated servers")
    show.add_argument("--servers", type=int, default=3, metavar="N", help="how many (default 3)")
    show.add_argument("-p", "--port", default="8888", help="port to listen on (default 8888)")
    show.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")

    commands.add_parser("version", help="print the version")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argument_parser()
    top_level = argv and argv[0] in (*COMMANDS, "--help", "-h", "--version")
    args = parser.parse_args(argv if top_level else ["run", *argv])
    match args.command:
        case "version":
            print(f"mvllm_lite {__version__}")
            return 0
        case "check-config":
            return check_config(args)
        case "demo":
            return run_demo(args)
    if args.host == "":
        args.parser.print_help()
        return 0
    return run_balancer(args)


def fail(message: str) -> int:
    print(f"mvllm_lite: {message}", file=sys.stderr)
    return 1


def overrides_from(args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """What flags and environment say, by setting: (value, where it came from)."""
    found: dict[str, tuple[Any, str]] = {}
    for key, field in CONFIG_FIELDS.items():
        name = field.metadata["env"]
        if name and environ.get(name, "") != "":
            found[key] = environ[name], f"environment {name}"
    flags = {"host": args.host, "port": args.port, "log_level": args.log_level}
    for key, value in flags.items():
        if value is not None:
            found[key] = value, f"--{key.replace('_', '-')}"
    if args.console:
        found["log_to_console"] = True, "--console"
    if args.model:
        found["show_models"] = True, "--model"
    if args.server:
        loads = args.max_load or []
        entries = [{"url": url} for url in args.server]
        for entry, load in zip(entries, loads):
            entry["max_concurrent_requests"] = load
        found["servers"] = entries, "--server"
    return found


def config_path(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The settings file's path, '' where servers were given without one."""
    path = args.file or args.config or environ.get("CONFIG_PATH", "")
    if not path and not getattr(args, "server", None):
        return DEFAULT_CONFIG
    return path


def load_settings(
    path: str, overrides: Mapping[str, tuple[Any, str]]
) -> tuple[Settings, list[Complaint]]:
    """Raises SettingsError, also for a file that cannot be read."""
    if not path:
        return parse_settings("", "command line", overrides)
    try:
        text = SettingsFile(path).read().decode("utf-8", "replace")
    except OSError as error:
        complaint = unreadable(path, error)
        if isinstance(error, FileNotFoundError):
            hint = "; name one, give servers with --server, or try: mvllm_lite.py demo"
            complaint = complaint._replace(text=complaint.text + hint)
        raise SettingsError([complaint]) from None
    return parse_settings(text, path, overrides)


def run_balancer(args: argparse.Namespace) -> int:
    if args.max_load and len(args.max_load) != len(args.server or ()):
        return fail(f"--max-load has {len(args.max_load)} numbers for {len(args.server or ())} servers")
    path, overrides = config_path(args, os.environ), overrides_from(args, os.environ)
    try:
        settings, warnings = load_settings(path, overrides)
    except SettingsError as error:
        return fail(str(error))
    with logging_to_stdout(settings.log_level):
        for warning in warnings:
            log.warning("%s", warning)
        return serve_until_stopped(lambda run: run(Balancer(settings, path, overrides)))


def run_demo(args: argparse.Namespace) -> int:
    given = {"port": (args.port, "--port"), "host": (args.host, "--host")}
    try:
        settings, _ = parse_settings("servers = []", "demo", given)
    except SettingsError as error:
        return fail(str(error))
    if args.servers < 1:
        return fail(f"--servers: found {args.servers}, expected a whole number, 1 or more")
    with logging_to_stdout(settings.log_level):
        return serve_until_stopped(lambda run: demo(args.servers, settings, run), DEMO_HINT)


DEMO_HINT = """
Ask it something:

    curl -N {url}/v1/chat/completions -d '{{"model": "demo-model", "stream": true, \
"messages": [{{"role": "user", "content": "Hello"}}]}}'

Look at it:          curl {url}/load-stats
Break a server:      curl {server}/simulate -d '{{"mode": "fail"}}'     (or hang, slow, ok)
"""

Runner = Callable[[Balancer], Awaitable[None]]


def serve_until_stopped(start: Callable[[Runner], Awaitable[None]], hint: str = "") -> int:
    """Run a balancer until a signal stops it; the exit code."""

    async def run(balancer: Balancer) -> None:
        loop, settings = asyncio.get_running_loop(), balancer.core.settings
        balancer.core.on_terminal = sys.stdout.isatty()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, balancer.stop)
        loop.add_signal_handler(signal.SIGHUP, balancer.look_now)

        def ready() -> None:
            host = "127.0.0.1" if settings.host in ("", "0.0.0.0", "::") else settings.host
            url = f"http://{f'[{host}]' if ':' in host else host}:{balancer.port}"
            count = len(settings.servers)
            log.info("mvllm_lite %s listens on %s:%d for %d servers, policy %s", __version__,
                     settings.host, balancer.port, count, settings.policy)  # fmt: skip
            if hint:
                print(hint.format(url=url, server=settings.servers[0].url), flush=True)

        await balancer.run(ready)
        log.info("stopped")

    try:
        asyncio.run(start(run))  # type: ignore[arg-type]
    except OSError as error:
        return fail(f"cannot listen: {(error.strerror or str(error)).lower()}")
    return 0


def check_config(args: argparse.Namespace) -> int:
    """Read the settings, ask every server at the same time, and print what was found."""
    path = config_path(args, os.environ)
    try:
        settings, warnings = load_settings(path, {})
    except SettingsError as error:
        return fail(str(error))
    for warning in warnings:
        print(f"warning: {warning}")
    findings = asyncio.run(ask_servers(settings))
    good = sum(good for good, _ in findings)
    for server, (_, words) in zip(settings.servers, findings):
        print(f"{server.url}  capacity {server.max_concurrent_requests}  {words}")
    capacity = sum(server.max_concurrent_requests for server in settings.servers)
    print(f"{path}: {len(findings)} servers, total capacity {capacity}, {good} reachable")
    return 0 if good else 2


async def ask_servers(settings: Settings) -> list[tuple[bool, str]]:
    """For each server: whether it can be used, and what it says in words."""

    async def ask(server: ServerSettings) -> tuple[bool, str]:
        pool, timeout_s = Pool(server.url), settings.health_check_timeout
        try:
            found = await probe(pool, timeout_s, True)
            if not found.good:
                return False, f"NOT REACHABLE: {found.why}"
            names = ", ".join(found.models or ()) or "none"
            version_words = ""
            with contextlib.suppress(PeerGone, BadMessage, TimeoutError):
                status, content = await fetch(pool, "/version", timeout_s)
                said = read_members(content, None).get("version") if status == 200 else None
                version_words = f"  vLLM {said}" if isinstance(said, str) else ""
            models_words = found.models_why or f"models: {names}"
            return True, f"reachable in {found.seconds * 1000:.0f} ms{version_words}  {models_words}"
        finally:
            pool.close()

    return await asyncio.gather(*map(ask, settings.servers))


class DroppingQueueHandler(logging.handlers.QueueHandler):
    """Hands lines to the writing thread; when that is stuck, they are dropped and counted, since
    a blocked terminal must not stop answers."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


@contextlib.contextmanager
def logging_to_stdout(level: str) -> Iterator[None]:
    """Log lines go to stdout, written by a thread of their own."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LINES_LIMIT)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    feeder = DroppingQueueHandler(lines)
    listener = logging.handlers.QueueListener(lines, handler)
    log.setLevel(level)
    log.propagate = False
    log.addHandler(feeder)
    listener.start()
    try:
        yield
    finally:
        log.removeHandler(feeder)
        listener.stop()
        if feeder.dropped:
            print(f"mvllm_lite: {feeder.dropped} log lines were dropped", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
