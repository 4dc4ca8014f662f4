#!/usr/bin/env python3
# coding: utf-8
"""mvllm_lite: one OpenAI-compatible address in front of a fleet of vLLM servers.

    python mvllm_lite.py servers.toml        serve what the file describes
    python mvllm_lite.py demo                the whole thing against simulated servers
    python mvllm_lite.py check-config        read the file, examine every server, advise
    python mvllm_lite.py replay              try policies on recorded traffic
    python mvllm_lite.py top                 look at a balancer that runs elsewhere
    python mvllm_lite.py --help              the rest

One file, standard library only, Python 3.11 and newer.  It reads forwards: a room uses names
of itself and of earlier rooms only.  A room is dry (·): pure functions and owned state, time comes
in as `now`, chance as a Random; or wet (~): thin I/O that asks the dry ones.

A ruler parts the file.  Parts I to X, above it, are all that runs for a servers.toml of five
lines: to know what serves, read them and stop.  What stands below runs when a setting, a
subcommand, a terminal or a browser at /status asks for it.  It hooks itself in by rows of
ENDPOINTS, COMMANDS, SCREENS and SERVICES, and nothing above uses its names; only the last two
lines, which call `main` of the command line, stand behind it.  `mvllm_lite.py help parts` counts
the lines.

     #  room            what it owns
    ──  ─────────────  ───────────────────────────────────────────────────────────────────────
     0  front matter   ~ this map, the imports, the limits that several rooms share

     I  HTTP             1,110 lines, for each message
     1  faults         · every way to fail, as one table: status, blame, may it be retried
     2  heads          · HTTP/1.1 heads, as the RFCs have them: bytes in, a value out
     3  proxy header   · who passes on connections says whose they are: the PROXY protocol
     4  framing        · where a message's content ends: by length, in chunks, at the close
     5  forwarding     · what an intermediary does to messages; responses of our own; CORS
     6  exposition     · the Prometheus text format, read and written

    II  settings         950 lines, at the start, and at a reload
     7  checks         · what a value in the settings may be; formulas, compiled
     8  settings       · all that can be set, each with its default, check and meaning
     9  settings file  · from TOML to settings; complaints with file, line and key

   III  vLLM             2,210 lines, for each request, check and scrape
    10  content        · compression undone; JSON: where the members that matter stand
    11  forms          · forms: the model that a part names; another model in its place
    12  prompts        · how long a prompt is, and what of it each server has probably cached
    13  calls          · which paths are passed on, and what a request wants: its model, a stream
    14  dialect        · what vLLM says in answers: events, ends, failures; ours in its words
    15  judge          · an answer judged as it comes; its tokens and its id
    16  transcripts    · what a stream has shown
    17  resumption     · whether and how another server goes on with a stream; the join
    18  engine load    · what a server says of itself: its load, its models

    IV  fleet            2,120 lines, for each request, check and scrape
    19  health         · whether a server can be asked, by checks and by what became of requests
    20  pace           · what a server has of ours; how fast it reads and answers, as learned
    21  servers        · what is known of each: settings, health, report, what was learned, counts
    22  learning       · what reports teach of a server: its capacity, and what its cache has
    23  leases         · a request that is with a server: what it counts for, what it teaches
    24  fleet          · the servers, and requests of ours with them
    25  roster         · which servers there are: named by the file, by hand, merged by one rule
    26  estimates      · what a call would take at each server, and take from others, in seconds
    27  policies       · what a server is worth for a call, by a dozen rules
    28  ranking        · who may be asked, who is asked, and why

     V  answering        1,000 lines, for each request
    29  queue          · requests that wait for room; what retries the fleet can afford
    30  poison         · content with which servers die, and whose failure it was
    31  plans          · how a call is answered, step by step
    32  client keys    · clients' keys and what each uses; whose stored responses are
    33  access         · who may come in, and to which path; proxies that are trusted

    VI  what is counted  950 lines, for each request, and when asked for
    34  documents      · what programs are shown in JSON
    35  metrics        · what is counted and measured, as families for Prometheus
    36  records        · what is written of requests and transitions: log lines, records, traces
    37  recent past    · the last minute of servers and models, the fleet's last quarter hour
    38  status         · what screen, page and /status.json show

   VII  connections      1,800 lines, for each connection, and each piece of an answer
    39  sockets        ~ what is the same of all: errors, deadlines; those that listen
    40  wire           ~ one connection: its buffer, its deadline, its end
    41  secrets        ~ keys and certificates, and how a server is reached with them
    42  client         ~ what we ask servers ourselves, over asyncio's streams
    43  pool           ~ the connections to one server over which requests go, kept and reused
    44  pump           ~ bytes on their way through, with back-pressure
    45  response       ~ the client's side of an exchange
    46  logging        ~ lines for readers that may be slow: the log, the shape of the traffic

  VIII  a request        1,540 lines, for each request
    47  shared state   ~ clients, pools, news, requests under way
    48  core           ~ what the rooms of a request share: settings, fleet, metrics, pools
    49  intake         ~ a request's content: gathered, decoded, held as long as it is needed
    50  attempt        ~ a request said to one server; its answer judged and passed on
    51  case           ~ whose failure it was: suspects, deaths, content that is held off
    52  accounts       ~ what is counted, kept and told of a request that has ended
    53  resuming       ~ a stream whose server was lost: what is kept of it, and asked of another
    54  exchange       ~ one request, from its head to its last byte

    IX  operating        1,750 lines, all the time
    55  watch          ~ health checks, load reports
    56  services       ~ what runs in the background because settings name it, as rows
    57  operations     ~ what people have done to servers: drained, weighed, probed, added, removed
    58  endpoints      ~ the paths that the balancer answers itself, in one table
    59  front          ~ where clients come in: connections accepted, requests let in
    60  following      ~ the settings file, and the files that it names
    61  commands       ~ subcommands as rows; settings from file, environment and flags
    62  handover       ~ one process takes over from another, without a gap
    63  balancer       ~ assembly: settings and roster adopted, running, draining, stopping

     X  program          470 lines, at the start and at the end
    64  process        ~ signals, systemd, limits of the system
    65  router flags   ~ the command line of vllm-project/router, as keys of the settings
    66  command line   ~ what is common to all subcommands; the one that serves; `help`

        ── the ruler: above, all that runs for a servers.toml of five lines ──

    XI  discovery        1,890 lines, when servers come and go by themselves
    67  names          ~ servers by DNS: each address of a name is one; names that move
    68  pods           · Kubernetes: pods and EndpointSlices, and the servers that they are
    69  listing        · what is asked of the Kubernetes API, and what follows from its answers
    70  cluster        ~ the Kubernetes API as it is reached; lists and watches
    71  zmtp           · what ZeroMQ's sockets say, and msgpack
    72  registration   · servers and agents that say themselves that they are there
    73  registering    ~ where they say it over HTTP
    74  zmq listener   ~ and where vLLM's connectors do over ZMQ

   XII  seen             2,610 lines, on a terminal, for `top`, `help`, a browser at /status
    75  cells          · text on a terminal: what it means, how wide it is; numbers in few cells
    76  table          · the servers in lines, as many columns as there is room for
    77  views          · graphs of the fleet; models, requests and keys as tables
    78  screen         · what is seen there: the table and the lines around it
    79  keys           · what keys do to it, and ask of the balancer
    80  terminal       ~ the screen onto a terminal: an ordinary program, by curses
    81  top            ~ the screen beside a balancer: of this process, or of one elsewhere
    82  page           ~ the status for a browser: one HTML string
    83  reference      ~ what `help` prints of settings, policies, paths, errors, metrics
    84  deployment     ~ what it prints for systemd, containers, Kubernetes, Prometheus, Grafana

  XIII  laboratory       2,000 lines, for `replay`, `demo` and `check-config`
    85  traces         · requests of the past: from files, or made up
    86  engine         · a model of a vLLM server, in simulated time
    87  replay         · those requests sent to such servers by any policy
    88  comparison     ~ policies compared on a trace: the program of `replay`
    89  canned words   · what a vLLM server would say, without a model; what it refuses
    90  canned forms   · the same in the forms of its APIs, plain and streamed
    91  simulation     ~ a vLLM server without a GPU, on a port of this machine
    92  demo           ~ the whole thing on a laptop: simulated servers, and traffic for them
    93  doctor         ~ what is amiss with servers and settings, and what to do about it

A request walks through the rooms like this.  The `Front` (59) reads a head from the client's
`Wire` (40), parses it (2), makes an `Exchange` (54) of it, and asks who may come in (33).  A local
path is answered in room 58.  For any other the `Exchange` runs: the content is gathered (49) and
read as a `Call` (13) with its `Prompt` (12), the `Keys` (32) admit it, and `relay_plan` (31) says
step by step what to do.  Each `Relay` step names the server that was ranked best (28) in the view
of the fleet (24) by a policy (27).  An `Attempt` (50) at that server holds the answer back until
it is judged to be one (15), and then has the `Exchange` commit: the `Response` (45) begins, and a
`Pump` (44) moves the rest.  What went wrong on the way is a `Fault` (1); the plan decides who is
asked next.  At the end `account` (52) counts the request and writes its line.

Words, one for each thing: a *server* is a vLLM process behind us, *fleet* is all of them, the
*roster* says which there are, a *client* talks to us.  A *wire* is one connection.  A *call*
is what a request wants, a *view* a frozen look at a server, the *eligible* what a policy
judges, a *ranking* the judgement.  A *plan* yields *steps* and is told the *outcome* of each.
An *attempt* is a request said to one server.  A *lease* counts a request in flight at its
server.  *Commit* is the moment the client is shown the first byte of an answer; no retry after
that.
"""

# ============================================================================================
#  0  front matter
# ============================================================================================

from __future__ import annotations

import sys

# The syntax of this file is that of Python 3.8: any later one comes this far and is told what is
# needed; one before it fails at the `:=`, and shows that line with its comment.
UNFIT = ""
if (PYTHON := sys.version_info[:3]) < (3, 11):  # mvllm_lite needs Python 3.11 or newer
    UNFIT = "mvllm_lite needs Python 3.11 or newer, this is Python %d.%d.%d" % PYTHON
elif sys.platform == "win32":
    UNFIT = "mvllm_lite runs on Linux, macOS and other Unix systems; on Windows, use it in WSL"
if UNFIT:
    raise SystemExit(UNFIT) if __name__ == "__main__" else ImportError(UNFIT)

import argparse
import ast
import asyncio
import base64
import bisect
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import glob
import gzip
import hashlib
import heapq
import hmac
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import operator
import os
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import tempfile
import termios
import textwrap
import threading
import time
import tomllib
import unicodedata
import urllib.parse
import zlib
from collections import OrderedDict, deque
from collections.abc import (
    AsyncIterator, Awaitable, Callable, Collection, Coroutine, Generator, Iterable, Iterator,
    Mapping, Sequence,
)
from enum import Enum
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple, Protocol, TypedDict, TypeVar

try:
    from compression import zstd  # since Python 3.14
except ImportError:
    zstd = None  # type: ignore[assignment]

__version__ = "0.1.0"
__all__ = ["main", "Balancer", "Settings", "parse_settings", "SimulatedServer"]

# Limits that several rooms share and nobody has needed to set, each with its precedent or reason.
# A limit of one room stands in that room.
HEAD_LIMIT_BYTES = 64 * 1024  # of a response's head; what httptools and h11 take
INFORMATIONAL_LIMIT = 16  # 1xx responses before the real one; more is a loop
RECEIVED_BYTES = 256 * 1024  # that are taken from a connection at once
AHEAD_BYTES = 16 * 1024  # held of a client that speaks before it is its turn
WRITE_SLICE_BYTES = 256 * 1024  # large content is written in slices of this, with back-pressure
HEADS_KEPT = 512  # parsed heads that are kept, because the same ones come again and again
HELD_FAILURE_LIMIT_BYTES = 1024 * 1024  # of a failure that is held back while others are asked
MEMBER_LIMIT_BYTES = 4096  # of a value that find_members found; real names of models are short
ACCEPT_BATCH = 64  # connections taken in one turn of the loop, so that a storm delays no stream
IDLE_GRACE_S = 1.0  # when stopping, for a request that is on its way on an idle connection
ACCEPT_PAUSE_S = 1.0  # when no more can be taken, for want of descriptors
SPARE_DESCRIPTORS = 64  # for everything but connections: files, checks, the log
STALL_S = 0.5  # a timer that fires later than this tells of a stall of the whole process
LISTEN_BACKLOG = 4096  # connections the kernel queues for us; its own limit is net.core.somaxconn
LOG_PAUSE_S = 0.02  # between two writes of log lines, which gathers them
SAMPLES_LIMIT = 10_000  # lines of a page of metrics that are looked at
MODEL_NAME_LIMIT = 512  # characters; the longest path that is a model's name is shorter
HOPS_LIMIT = 20  # proxies of our own between a client and us
NAMES_LIMIT = 20  # models listed in an error; there may be thousands
RECENT_LIMIT = 200  # requests whose rankings are kept for /explain

INFINITY = math.inf
log = logging.getLogger("mvllm_lite")


# ━━━ part I: HTTP ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  1  faults
# ============================================================================================
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
    LARGER = "larger"  # only a server that takes longer prompts, without a pause
    IF_ALLOWED = "if allowed"  # the work may still be running there: only where settings say so


class Fault(Enum):
    """One way to fail: (status to answer, blame, retry, error type in vLLM's spelling).

    To add a fault: add a row; its lower-case name is its label in metrics, logs and the
    `X-MVLLM-Error` field.
    """

    # The client's request, refused by us; LIMITS names the setting where its limit was met.
    BAD_REQUEST = 400, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    UNAUTHORIZED = 401, Blame.CLIENT, Retry.NEVER, "AuthenticationError"
    FORBIDDEN = 403, Blame.CLIENT, Retry.NEVER, "PermissionDeniedError"
    NOT_SERVED = 404, Blame.CLIENT, Retry.NEVER, "NotFoundError"
    UNKNOWN_MODEL = 404, Blame.CLIENT, Retry.NEVER, "NotFoundError"
    UNKNOWN_RESPONSE = 404, Blame.CLIENT, Retry.NEVER, "invalid_request_error"  # vLLM's, for this
    BAD_METHOD = 405, Blame.CLIENT, Retry.NEVER, "MethodNotAllowedError"
    CLIENT_SLOW = 408, Blame.CLIENT, Retry.NEVER, "RequestTimeoutError"
    CONTENT_TOO_LARGE = 413, Blame.CLIENT, Retry.NEVER, "ContentTooLargeError"
    TARGET_TOO_LONG = 414, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    NOT_JSON = 415, Blame.CLIENT, Retry.NEVER, "UnsupportedMediaTypeError"
    UNSUPPORTED_CODING = 415, Blame.CLIENT, Retry.NEVER, "UnsupportedMediaTypeError"
    BAD_EXPECTATION = 417, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    RATE_LIMITED = 429, Blame.CLIENT, Retry.NEVER, "RateLimitError"
    HEAD_TOO_LARGE = 431, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    CLIENT_GONE = 499, Blame.CLIENT, Retry.NEVER, "ClientClosedRequest"  # nginx's number; logs only
    NOT_IMPLEMENTED = 501, Blame.CLIENT, Retry.NEVER, "NotImplementedError"
    BAD_VERSION = 505, Blame.CLIENT, Retry.NEVER, "BadRequestError"
    # No server to ask.
    NO_SERVER = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    NO_RESOURCES = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"  # our own have run out
    TOO_MANY_REQUESTS = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    TOO_MUCH_CONTENT = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    QUEUE_FULL = 429, Blame.NOBODY, Retry.NEVER, "RateLimitError"
    QUEUE_TIMEOUT = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    STOPPING = 503, Blame.NOBODY, Retry.NEVER, "ServiceUnavailableError"
    # A server was asked and did not answer.
    CONNECT_FAILED = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    CONNECT_TIMEOUT = 504, Blame.SERVER, Retry.AT_ONCE, "GatewayTimeoutError"
    SERVER_GONE = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    BAD_ANSWER = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"
    SERVER_SILENT = 504, Blame.SERVER, Retry.IF_ALLOWED, "GatewayTimeoutError"
    SERVER_SLOW = 504, Blame.NOBODY, Retry.IF_ALLOWED, "GatewayTimeoutError"  # it works, on others
    # A server answered, with a failure of its own; it is shown as it came if nobody does better.
    SERVER_ERROR = 502, Blame.SERVER, Retry.LATER, "BadGatewayError"
    SERVER_BUSY = 429, Blame.NOBODY, Retry.ELSEWHERE, "RateLimitError"
    DECLINED = 502, Blame.NOBODY, Retry.LATER, "BadGatewayError"  # 408 or 429, in retry_statuses
    NOT_THERE = 404, Blame.NOBODY, Retry.ELSEWHERE, "NotFoundError"  # what others may have
    KEY_REJECTED = 502, Blame.NOBODY, Retry.ELSEWHERE, "BadGatewayError"  # ours, or so it seems
    CONTEXT_LENGTH_EXCEEDED = 400, Blame.CLIENT, Retry.LARGER, "BadRequestError"  # of one server
    # 500, or an error event in place of a stream: the request's failure or the server's, which the
    # next server tells.
    SERVER_FAILED = 502, Blame.SERVER, Retry.ELSEWHERE, "BadGatewayError"
    STREAM_FAILED = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"  # by an error event
    ABORTED = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"  # cut short, ended well-formed
    ENGINE_FAILED = 502, Blame.SERVER, Retry.AT_ONCE, "BadGatewayError"  # 500: vLLM without engine
    SERVER_DIED_TWICE = 502, Blame.NOBODY, Retry.NEVER, "BadGatewayError"  # of the same content
    SERVER_FROZEN = 504, Blame.NOBODY, Retry.AT_ONCE, "GatewayTimeoutError"  # its watcher blamed it
    MOVED = 502, Blame.NOBODY, Retry.AT_ONCE, "BadGatewayError"  # its server is drained
    # A stream that broke went on at another server, which says something else, or nothing.
    RESUME_DIFFERS = 502, Blame.NOBODY, Retry.NEVER, "BadGatewayError"
    RESUME_FAILED = 502, Blame.NOBODY, Retry.AT_ONCE, "BadGatewayError"
    # The way leads back to where it came from: we say so, or a server does that is a balancer, too.
    LOOP_DETECTED = 508, Blame.NOBODY, Retry.ELSEWHERE, "LoopDetectedError"
    # Our own mistake.
    INTERNAL = 500, Blame.NOBODY, Retry.NEVER, "InternalServerError"

    def __init__(self, status: int, blame: Blame, retry: Retry, type_name: str) -> None:
        self.status, self.blame, self.retry, self.type_name = status, blame, retry, type_name
        self.label = self._name_.lower()

    def __new__(cls, *row: Any) -> Fault:
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)  # rows that are alike are still different faults
        return member

    __hash__ = object.__hash__  # Enum's own is slow, and members are compared by identity


# What no request can do to a server: whoever asked, it is the server's failure.
SERVERS_OWN = frozenset((Fault.CONNECT_FAILED, Fault.CONNECT_TIMEOUT, Fault.ENGINE_FAILED))
# Statuses by which a server says that a request is beyond it, which is no sign of being unwell.
REQUEST_FAILURES = frozenset((501, 505))
# The setting behind a fault, where it is a limit; each time one is met is counted.
LIMITS = {
    Fault.HEAD_TOO_LARGE: "max_head_bytes",
    Fault.TARGET_TOO_LONG: "max_head_bytes",
    Fault.CONTENT_TOO_LARGE: "max_body_bytes",
    Fault.TOO_MANY_REQUESTS: "max_requests",
    Fault.TOO_MUCH_CONTENT: "max_buffered_bytes",
    Fault.RATE_LIMITED: "keys",
    Fault.QUEUE_FULL: "queue_size",
    Fault.QUEUE_TIMEOUT: "queue_timeout",
    Fault.NO_RESOURCES: "descriptors",
    Fault.SERVER_DIED_TWICE: "poison_hold",
}
# Those whose label is the error's code, since the status does not tell what a program must know.
SAID_BY_NAME = frozenset((Fault.SERVER_DIED_TWICE,))


class BadMessage(Exception):
    """A message, or a part of one, that breaks a rule; `str()` says which, and what was found."""

    def __init__(self, text: str, fault: Fault = Fault.BAD_REQUEST, limit: str = "") -> None:
        super().__init__(text)
        self.fault = fault
        self.limit = limit or LIMITS.get(fault, "")  # the setting that was met, if it was one


class PeerGone(Exception):
    """The other end of a wire could not be reached, or has left."""

    def __init__(self, text: str, fault: Fault) -> None:
        super().__init__(text)
        self.fault = fault


class Stale(PeerGone):
    """A reused connection that ended before it said a word, and at once: its server had closed it
    while it was idle.  Nobody's failure; the request is sent again on a fresh one."""


# ============================================================================================
#  2  heads
# ============================================================================================
#
# RFC 9110 and RFC 9112 for a gateway.  A head is bytes in, a frozen value out, and bytes again;
# nothing here knows a socket.  Heads are decoded as latin-1, which keeps every byte.  Where the
# RFCs leave a choice, a message is refused rather than repaired: two readers of one message must
# never disagree.  Content is always framed anew, so no ambiguity of the sender's survives.
#
# Programs say the same head over and over, but for its Content-Length.  So that is kept apart, and
# what was made of the rest of a head is remembered: a quarter of the time of a small request.

HEAD_KEPT_BYTES = 2048  # the longest head that is kept parsed
TEXT_KEPT_BYTES = 200  # the longest text that is kept, with what is made of it
PATH_LIMIT = 8192  # bytes of a target's path, which is read in several ways
FIELDS_LIMIT = 512  # lines of a head; HAProxy allows 101
LINE_BYTES = 300  # what holding one takes beside its characters
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 §5.6.2
TEXT = r"[\t\x20-\x7e\x80-\xff]*+"  # bytes of a field value or reason phrase, §5.5
AUTHORITY = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.\-_~%!$&'()*+;=]*)(?::[0-9]*)?"
# A target has no fragment (RFC 9112 §3.2): some servers would cut it at the '#', and find another.
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!\x22$-\x7e]+) HTTP/(\d)\.(\d)", re.ASCII)
STATUS_LINE = re.compile(rf"HTTP/(\d)\.(\d) (\d\d\d)(?: ({TEXT}))?", re.ASCII)
FIELD_LINE = re.compile(rf"{TOKEN}:{TEXT}")
FIELD_LINES = re.compile(rf"(?:{TOKEN}:{TEXT}\r\n)*+")
HOST = re.compile(AUTHORITY)
ABSOLUTE_FORM = re.compile(rf"https?://(?![:/?]|$){AUTHORITY}(?=[/?]|$)", re.IGNORECASE)
LENGTH_LINE = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,18})(?=\r\n)", re.IGNORECASE)
MAX_FORWARDS = re.compile(r"[0-9]{1,9}")
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
# A request line, as far as it has come; from wherever the last look ended.
REQUEST_PIECE = re.compile(rb"(?:\A[!#$%&'*+\-.^_`|~0-9A-Za-z]|(?!\A))[\x20-\x7e]*+\r?")
BROKEN_LINE = re.compile(rb"(?:\A|[^\r])\n|\r[^\n]")  # it does not end with CRLF


FieldLine = tuple[str, str, str]  # lower-case name, name as sent, value


class Fields:
    """The field section of a head: every line in order, and a look-up by lower-case name.

    `values` joins the lines of a repeated field with a comma (RFC 9110 §5.3), so that a second
    `Content-Length` or `Host` reads as a list, which is not a valid value of either.  They are
    never changed, so that what is made of them can be `remembered`, by their identity.
    """

    __slots__ = ("lines", "values", "short")

    def __init__(self, lines: list[FieldLine], values: dict[str, str], short: bool = False) -> None:
        self.lines, self.values = lines, values
        self.short = short  # of a head that may come again

    def get(self, key: str, default: str = "") -> str:
        return self.values.get(key, default)

    def members(self, key: str) -> list[str]:
        """The members of a list-valued field, in lower case."""
        members = []
        for member in self.values.get(key, "").lower().split(","):
            if stripped := member.strip(" \t"):
                members.append(stripped)
        return members

    def replaced(self, name: str, value: str) -> Fields:
        """The same with this one line in place of any of that name."""
        key = name.lower()
        lines = [line for line in self.lines if line[0] != key]
        return Fields([*lines, (key, name, value)], {**self.values, key: value}, self.short)

    def with_member(self, key: str, member: str) -> str:
        """A list-valued field's value with one more member at its end."""
        return f"{self.values[key]}, {member}" if self.values.get(key) else member


Made = TypeVar("Made")


def remembered(make: Callable[..., Made]) -> Callable[..., Made]:
    """Remembers what `make` returns for its first argument, Fields of a head that was short."""
    kept = functools.lru_cache(HEADS_KEPT)(make)

    @functools.wraps(make)
    def made(fields: Fields, *others: Any) -> Made:
        return kept(fields, *others) if fields.short else make(fields, *others)

    return made


def remembered_text(make: Callable[[str], Made]) -> Callable[[str], Made]:
    """Remembers what `make` returns for a text that is short."""
    kept = functools.lru_cache(HEADS_KEPT)(make)

    @functools.wraps(make)
    def made(text: str) -> Made:
        return kept(text) if len(text) <= TEXT_KEPT_BYTES else make(text)

    return made


# What a message's Content-Length says; a list if it has several, None if it has none.
Length = str | None


class Head:
    """What requests and responses have in common; `minor` is the x of HTTP/1.x."""

    minor: int
    fields: Fields

    @functools.cached_property
    def persists(self) -> bool:
        """Whether whoever sent it wants to keep the connection, RFC 9112 §9.3."""
        if "connection" not in self.fields.values:
            return self.minor >= 1
        options = self.fields.members("connection")
        return "close" not in options and (self.minor >= 1 or "keep-alive" in options)


@dataclasses.dataclass(frozen=True, eq=False)
class RequestHead(Head):
    """A request's first line and fields, without Content-Length.  All requests that say the same
    have the same one, and what follows from it is seen once."""

    method: str
    path: str
    query: str | None  # what follows the '?', None without one
    minor: int
    fields: Fields

    @functools.cached_property
    def held_bytes(self) -> int:
        """What holding it costs; 0 for a short one, since few different ones are held."""
        size = len(self.path) + len(self.query or "")
        for _, name, value in self.fields.lines:
            size += LINE_BYTES + len(name) + len(value)
        return size if size > HEAD_KEPT_BYTES else 0

    @functools.cached_property
    def wants_upgrade(self) -> bool:
        """Whether it asks to change to websocket, the only protocol that vLLM changes to."""
        asks = self.minor >= 1 and self.fields.get("upgrade").lower() == "websocket"
        return asks and "upgrade" in self.fields.members("connection")

    @functools.cached_property
    def hops_left(self) -> int | None:
        """How often an OPTIONS request may be passed on, RFC 9110 §7.6.2; None is no limit.
        Raises BadMessage."""
        said = self.fields.values.get("max-forwards")
        if said is None or self.method != "OPTIONS":
            return None
        if not MAX_FORWARDS.fullmatch(said):
            raise BadMessage(f"Max-Forwards is {shown(said)}, expected one number")
        return int(said)

    @functools.cached_property
    def is_preflight(self) -> bool:
        return self.method == "OPTIONS" and "access-control-request-method" in self.fields.values


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseHead(Head):
    """A response's status line and fields, without Content-Length; shared as a RequestHead is."""

    status: int
    reason: str
    minor: int
    fields: Fields

    @functools.cached_property
    def is_event_stream(self) -> bool:
        return self.fields.get("content-type")[:17].lower() == "text/event-stream"

    @functools.cached_property
    def is_json(self) -> bool:
        return self.fields.get("content-type")[:16].lower() == "application/json"

    @functools.cached_property
    def is_encoded(self) -> bool:
        """Whether its content has a content coding (RFC 9110 §8.4): it cannot be looked into."""
        return any(coding != "identity" for coding in self.fields.members("content-encoding"))


# Stands in for a request that could not be read, where one is answered.
NO_REQUEST = RequestHead("", "", None, 1, Fields([], {}))


def shown(text: str, limit: int = 60) -> str:
    """`text` as it may stand in an error message: quoted, escaped, short."""
    return ascii(text) if len(text) <= limit else f"{ascii(text[:limit])}…"


def bad_first_line(found: str, side: Blame) -> BadMessage:
    if side is Blame.SERVER:
        text = f"the status line is {shown(found)}, expected 'HTTP/1.1 status reason'"
        return BadMessage(text, Fault.BAD_ANSWER)
    text = f"the request line is {shown(found)}, expected 'METHOD target HTTP/1.1'"
    if found.startswith(("PROXY ", "\0\r\nQUIT\n")):
        text += "; only trusted_proxies may speak the PROXY protocol"
    return BadMessage(text)


class HeadSearch:
    """Finds the end of a head that one side sends in pieces, and looks at each byte once.  What can
    be no head is refused at once: after a TLS hello, an SSH banner or a line that ends with a bare
    LF, the rest would be waited for until a timeout."""

    __slots__ = ("side", "_at", "_in_first")

    def __init__(self, side: Blame) -> None:
        self.side, self._at, self._in_first = side, 0, True

    def end(self, data: bytes | bytearray) -> int:
        """Where the head ends in all that has come; -1: not yet.  Raises BadMessage."""
        at, self._at = self._at, len(data)
        if self._in_first:
            self._first_line(data, at)
        if (end := data.find(b"\r\n\r\n", max(0, at - 3))) >= 0:
            return end + 4
        if BROKEN_LINE.search(data, max(0, at - 1)):
            fault = Fault.BAD_ANSWER if self.side is Blame.SERVER else Fault.BAD_REQUEST
            raise BadMessage("a line of the head ends with a bare CR or LF, expected CRLF", fault)
        return -1

    def _first_line(self, data: bytes | bytearray, at: int) -> None:
        server, end = self.side is Blame.SERVER, data.find(b"\r\n", max(0, at - 1))
        if end >= 0:
            self._in_first = False
            pattern = STATUS_LINE if server else REQUEST_LINE
            good = pattern.fullmatch(data[:end].decode("latin-1")) is not None
        elif server:
            good = data.startswith(b"HTTP/1."[: len(data)])
        else:
            good = not data or REQUEST_PIECE.fullmatch(data, at) is not None
        if not good:
            raise bad_first_line(data[:200].decode("latin-1"), self.side)


def parse_fields(block: str, fault: Fault) -> Fields:
    """The field lines after a first line, each ended by CRLF.  Raises BadMessage."""
    if not FIELD_LINES.fullmatch(block):  # one pass over good heads; only then find the bad line
        bad = next(line for line in block.split("\r\n") if not FIELD_LINE.fullmatch(line))
        raise BadMessage(f"a field line is {shown(bad)}, expected 'Name: value' without control"
                         " characters, folding or a space before the colon", fault)
    if block.count("\n") > FIELDS_LIMIT:
        text = f"the head has more than {FIELDS_LIMIT} field lines"
        raise BadMessage(text, fault if fault is Fault.BAD_ANSWER else Fault.HEAD_TOO_LARGE)
    lines, values = [], dict[str, str]()
    for line in block.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        key, value = name.lower(), value.strip(" \t")
        lines.append((key, name, value))
        values[key] = f"{values[key]}, {value}" if key in values else value
    return Fields(lines, values, len(block) <= HEAD_KEPT_BYTES)


AnyHead = TypeVar("AnyHead", bound=Head)


def without_length(make: Callable[[bytes], AnyHead]) -> Callable[[bytes], tuple[AnyHead, Length]]:
    """Parses heads without their Content-Length, which is returned beside, so that short ones are
    parsed once.  A second Content-Length, or one not written as usual, stays with the fields."""
    kept = functools.lru_cache(HEADS_KEPT)(make)

    @functools.wraps(make)
    def made(raw: bytes) -> tuple[AnyHead, Length]:
        length: Length = None
        if (line := LENGTH_LINE.search(raw)) is not None:
            raw, length = raw[: line.start()] + raw[line.end() :], line[1].decode()
        head = (kept if len(raw) <= HEAD_KEPT_BYTES else make)(raw)
        others = head.fields.values.get("content-length")
        if length is None or others is None:
            return head, length or others
        return head, f"{length}, {others}"

    return made


@without_length
def parse_request_head(raw: bytes) -> RequestHead:
    """A request's head, up to and with its empty line (RFC 9112 §3).  Raises BadMessage."""
    first, _, block = raw[:-2].decode("latin-1").partition("\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if line is None:
        raise bad_first_line(first, Blame.CLIENT)
    method, target, major, minor = line.groups()
    if major != "1":
        raise BadMessage(f"HTTP/{major}.{minor} is not spoken here, HTTP/1.1 is", Fault.BAD_VERSION)
    fields = parse_fields(block, Fault.BAD_REQUEST)
    host = fields.values.get("host")
    if host is None and minor != "0":
        raise BadMessage("the request has no Host field")
    if host and not HOST.fullmatch(host):
        raise BadMessage(f"Host is {shown(host)}, expected one host[:port]")
    authority, target = origin_form(method, target)
    if authority:
        fields = fields.replaced("Host", authority)
    path, mark, query = target.partition("?")
    if len(path) > PATH_LIMIT:
        raise BadMessage(f"the path is longer than {PATH_LIMIT} bytes", Fault.TARGET_TOO_LONG)
    return RequestHead(method, path, query if mark else None, int(minor != "0"), fields)


def origin_form(method: str, target: str) -> tuple[str, str]:
    """The target as authority, which only an absolute-form one has and which stands for Host
    (§3.2.2), and as path and query.  CONNECT and TRACE are for proxies and debuggers; a gateway
    that passed them on would let clients past it, or read what it adds.  Raises BadMessage."""
    if method in ("CONNECT", "TRACE"):
        raise BadMessage(f"the method {method} is not served here", Fault.NOT_IMPLEMENTED)
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return "", target
    if (origin := ABSOLUTE_FORM.match(target)) is None:
        raise BadMessage(f"the request target is {shown(target)}, expected one that begins with /")
    path = target[origin.end() :]
    return origin[0].partition("//")[2], path if path.startswith("/") else f"/{path}"


@without_length
def parse_response_head(raw: bytes) -> ResponseHead:
    """A response's head, up to and with its empty line (RFC 9112 §4).  Raises BadMessage."""
    first, _, block = raw[:-2].decode("latin-1").partition("\r\n")
    line = STATUS_LINE.fullmatch(first)
    if line is None or line[1] != "1" or line[3] < "100":
        raise bad_first_line(first, Blame.SERVER)
    fields = parse_fields(block, Fault.BAD_ANSWER)
    return ResponseHead(int(line[3]), line[4] or "", int(line[2] != "0"), fields)


# ============================================================================================
#  3  proxy header
# ============================================================================================
#
# The PROXY protocol, as HAProxy has it: who passes on connections and not messages says first of
# each whose it is.

PROXY_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # of version 2; version 1 is a line
PROXY_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|TCP([46]) (\S+) (\S+) (\d{1,5}) (\d{1,5}))")
PROXY_LINE_LIMIT_BYTES = 107
PROXY_ADDRESSES = {0x11: (4, struct.Struct("!4x4xHH")), 0x21: (16, struct.Struct("!16x16xHH"))}
Address = tuple[str, int]
UNKNOWN: Address = ("unknown", 0)  # which is nobody's, and so not local


def proxy_header(data: bytes) -> tuple[int, Address | None] | None:
    """The size of the PROXY header that a connection's first bytes begin with, 0 without one, and
    whose connection it says it is (None: the proxy's own, UNKNOWN: it does not know); or None: more
    bytes are needed.  Raises BadMessage."""
    if data.startswith(PROXY_SIGNATURE):
        return proxy_header_2(data)
    if not data.startswith(b"PROXY "):
        begun = b"PROXY ".startswith(data) or PROXY_SIGNATURE.startswith(data)
        return None if begun else (0, None)
    end = data.find(b"\r\n", 0, PROXY_LINE_LIMIT_BYTES)
    if end < 0 and len(data) < PROXY_LINE_LIMIT_BYTES:
        return None
    line = PROXY_LINE.fullmatch(data[: max(0, end)])
    if line is not None and line[1] is None:
        return end + 2, UNKNOWN
    host = ip_of(line[2], line[1]) if line is not None else ""
    if not (line and host and ip_of(line[3], line[1]) and int(line[4]) < 65536 > int(line[5])):
        found = line[0] if line else data[:200]
        raise BadMessage(f"the PROXY line is {shown(found.decode('latin-1'))}")
    return end + 2, (host, int(line[4]))


def ip_of(said: bytes, version: bytes) -> str:
    """An address of that IP version as it is usually written; '' for what is none."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(said.decode("latin-1"))
        if address.version == int(version) and b"%" not in said:  # a zone could be any text
            return str(address)
    return ""


def proxy_header_2(data: bytes) -> tuple[int, Address | None] | None:
    """The same of version 2: binary, and with extensions (TLV), which are not looked at."""
    if len(data) < 16:
        return None
    command, family, length = data[12], data[13], int.from_bytes(data[14:16], "big")
    if command not in (0x20, 0x21) or family >> 4 > 3 or family & 15 > 2:
        found = f"{command:#04x} {family:#04x}"
        raise BadMessage(f"the PROXY header has the command and family {found}, which are unknown")
    size, layout = PROXY_ADDRESSES.get(family, (0, struct.Struct("")))
    if command == 0x21 and length < layout.size:
        raise BadMessage(f"the PROXY header has {length} bytes, expected {layout.size} or more")
    if len(data) < 16 + length:
        return None
    if command == 0x20 or not size:
        return 16 + length, None if command == 0x20 else UNKNOWN
    port, _ = layout.unpack_from(data, 16)
    return 16 + length, (str(ipaddress.ip_address(data[16 : 16 + size])), port)


# ============================================================================================
#  4  framing
# ============================================================================================
#
# Where a message's content ends, RFC 9112 §6 and §7: by its length, in chunks, or with the
# connection.

CHUNK_LINE_LIMIT_BYTES = 4096  # a chunk-size line with its extensions, or the trailer section
LENGTH = re.compile(r"[0-9]{1,18}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]{0,9};[\t\x20-\x7e\x80-\xff]{0,4000})?\r\n")
LAST_CHUNK = b"0\r\n\r\n"


class Framing(NamedTuple):
    """How the end of a message's content is found: after `length` bytes, by the `chunked` coding,
    or, with neither, by the close of the connection (responses only)."""

    length: int | None = None
    chunked: bool = False


NO_CONTENT = Framing(0)
CHUNKED = Framing(chunked=True)
UNTIL_CLOSE = Framing()


def request_framing(head: RequestHead, length: Length) -> Framing:
    """How a request's content is framed, RFC 9112 §6.  Anything that two readers might take
    differently is refused: both fields, lists of lengths, `chunked` anywhere but at the end."""
    if "transfer-encoding" not in head.fields.values:
        return NO_CONTENT if length is None else parse_length(length, Fault.BAD_REQUEST)
    if length is not None or head.minor == 0:
        why = "in HTTP/1.0" if length is None else "with Content-Length"
        raise BadMessage(f"Transfer-Encoding {why} is ambiguous")
    codings = head.fields.members("transfer-encoding")
    if codings[-1:] != ["chunked"] or codings.count("chunked") > 1:
        text = shown(head.fields.get("transfer-encoding"))
        raise BadMessage(f"Transfer-Encoding is {text}, expected 'chunked' once, at its end")
    if len(codings) > 1:
        text = f"the transfer coding {shown(codings[0])} is not understood, only chunked is"
        raise BadMessage(text, Fault.NOT_IMPLEMENTED)
    return CHUNKED


def response_framing(head: ResponseHead, length: Length, method: str) -> Framing:
    """How a response's content is framed, RFC 9112 §6.3, rules in the RFC's order."""
    if method == "HEAD" or head.status < 200 or head.status in (204, 304):
        return NO_CONTENT
    coding = head.fields.values.get("transfer-encoding")
    if coding is None:
        return UNTIL_CLOSE if length is None else parse_length(length, Fault.BAD_ANSWER)
    if length is not None or head.minor == 0 or coding.lower() != "chunked":
        where = " with Content-Length" if length is not None else f" in HTTP/1.{head.minor}"
        raise BadMessage(f"Transfer-Encoding is {shown(coding)}{where}", Fault.BAD_ANSWER)
    return CHUNKED


@functools.lru_cache(HEADS_KEPT)
def parse_length(value: str, fault: Fault) -> Framing:
    if not LENGTH.fullmatch(value):
        raise BadMessage(f"Content-Length is {shown(value)}, expected one number of bytes", fault)
    return Framing(int(value))


class Decoder:
    """Finds the content in the bytes of a message: of a length, or up to the connection's close.

    `feed` is called once per piece received and gives the content in it, maybe empty, as a part of
    that piece; it raises BadMessage when the framing is broken.
    """

    __slots__ = ("done", "rest", "until_close", "verbatim", "_left")
    at_once_bytes: int | None = None  # the most to feed it in one piece; None is all there is

    def __init__(self, length: int | None) -> None:
        self.done = length == 0  # the last byte of the content was seen
        self.rest = b""  # what came after it
        self.until_close = length is None  # who sees the connection close sets `done`
        self.verbatim = False  # the last piece was one whole, plain chunk: it may go on as it is
        self._left = length or 0  # bytes to come

    def feed(self, data: bytes) -> bytes:
        if self.until_close:
            return data
        if len(data) < self._left:
            self._left -= len(data)
            return data
        if len(data) > self._left:
            data, self.rest = data[: self._left], bytes(data[self._left :])
        self._left, self.done = 0, True
        return data


class ChunkedDecoder(Decoder):
    """The chunked transfer coding, RFC 9112 §7.1.  Extensions are ignored, trailers dropped."""

    __slots__ = ("_pending", "_trailer_left")
    at_once_bytes = 32 * 1024  # taking chunks of a few bytes apart is slow

    def __init__(self) -> None:
        super().__init__(-1)
        self._left = 0  # bytes of the current chunk to come, with its CRLF
        self._pending = b""  # an incomplete size line, chunk end or trailer line
        self._trailer_left = 0  # once the last chunk was seen: bytes its trailers may still take

    def feed(self, data: bytes) -> bytes:
        if not (self._pending or self._left or self._trailer_left):
            # vLLM sends one event as one chunk in one segment: by far the most frequent piece.
            # Passing it on as it came saves taking it apart and building it again.
            line = CHUNK_SIZE.match(data)
            if line is not None and (size := int(line[1], 16)):
                start = line.end()
                if start + size + 2 == len(data) and data.endswith(b"\r\n"):
                    self.verbatim = line.end(1) + 2 == start  # it has no extension
                    return data[start:-2]
        self.verbatim = False
        return self._take_apart(self._pending + data)

    def _take_apart(self, data: bytes) -> bytes:
        """Every chunk in `data`; what is incomplete stays in `_pending`."""
        content, at, self._pending = [], 0, b""
        while at < len(data) and not self.done and not self._pending:
            while not (self._left or self._trailer_left):  # whole ones; they may be tiny
                line = CHUNK_SIZE.match(data, at)
                size = int(line[1], 16) if line else 0
                end = line.end() + size if line else 0
                if not size or data[end : end + 2] != b"\r\n":
                    break
                content.append(data[end - size : end])
                at = end + 2
            if at == len(data):
                break
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                content.append(piece)
                at, self._left = at + len(piece), self._left - len(piece)
            elif self._left:
                at = self._chunk_end(data, at)
            elif self._trailer_left:
                at = self._trailer(data, at)
            else:
                at = self._size_line(data, at)
        if self.done:
            self.rest = data[at:]
        return b"".join(content)

    def _size_line(self, data: bytes, at: int) -> int:
        line = CHUNK_SIZE.match(data, at)
        if line is None:
            if data.find(b"\n", at) >= 0 or len(data) - at > CHUNK_LINE_LIMIT_BYTES:
                found = shown(data[at : at + 20].decode("latin-1"))
                raise BadMessage(f"a chunk begins with {found}, not its size")
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
            raise BadMessage(f"a chunk ends with {ascii(end)}, not CRLF")
        if len(end) < 2:
            self._pending = end
            return at
        self._left = 0
        return at + 2

    def _trailer(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if (len(data) if end < 0 else end) - at >= self._trailer_left:
            raise BadMessage("the trailer section is too long")
        if end < 0:
            if data.find(b"\n", at) >= 0:
                raise BadMessage("a trailer ends with a bare LF, expected CRLF")
            self._pending = data[at:]
            return at
        line = data[at:end].decode("latin-1")
        if line and not FIELD_LINE.fullmatch(line):
            raise BadMessage(f"a trailer is {shown(line)}, expected 'Name: value'")
        self.done = not line
        self._trailer_left = max(1, self._trailer_left - (end + 2 - at))
        return end + 2


def decoder_for(framing: Framing) -> Decoder:
    return ChunkedDecoder() if framing.chunked else Decoder(framing.length)


def encode_chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


# ============================================================================================
#  5  forwarding
# ============================================================================================
#
# What an intermediary does to the messages it passes on, RFC 9110 §7.6: which fields go along,
# which are replaced, how the next hop finds the content's end.  And responses of our own.

# Fields that only proxies of our own may say; from anybody else they are dropped.
PROXY_FIELDS = frozenset("forwarded x-forwarded-for x-forwarded-proto x-forwarded-host x-real-ip"
                         " x-data-parallel-rank".split())
KEY_FIELD_NAMES = frozenset(("authorization", "x-api-key"))
CLIENT_FIELDS_DROPPED = PROXY_FIELDS | KEY_FIELD_NAMES
# Fields about one connection, not about the message (RFC 9110 §7.6.1); `Trailer`, since trailers
# are not passed on; and credentials for a proxy, which are meant for us or nobody.
HOP_BY_HOP = frozenset("connection keep-alive proxy-connection te trailer transfer-encoding upgrade"
                       " proxy-authenticate proxy-authorization".split())
CORS_FIELDS = tuple(f"access-control-{name}" for name in (
    "allow-origin", "allow-credentials", "allow-methods", "allow-headers", "expose-headers",
    "max-age"))
MAX_FORWARDS_LINE = re.compile(r"(?im)^max-forwards:.*\r\n")
Pairs = Sequence[tuple[str, str]]  # (field name, value)


def kept_lines(fields: Fields, added: Pairs, dropped: Iterable[str] = ()) -> str:
    """Field lines to pass on: end-to-end ones in their order and number, without those `dropped`
    or named by Connection, and `added` ones in place of any of the same name."""
    drop, lines = {*HOP_BY_HOP, *dropped}, list[str]()
    for name, _ in added:
        drop.add(name.lower())
    if "connection" in fields.values:
        drop.update(fields.members("connection"))
    for key, name, value in fields.lines:
        if key not in drop:
            lines.append(f"{name}: {value}\r\n")
    for name, value in added:
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines)


def forward_fields(fields: Fields, added: Pairs, dropped: Iterable[str] = ()) -> str:
    """A request's field lines as sent to any server, without Host and framing, which
    `forward_request` adds for each attempt."""
    ours = (key for key, _, _ in fields.lines if key.startswith("x-mvllm-"))
    return kept_lines(fields, added, ("host", "content-length", "expect", *ours, *dropped))


OUR_NAME = "mvllm-lite-"  # how the name of each process in Via begins, RFC 9110 §7.6.3


class Hop(NamedTuple):
    """The last stretch of a request's way to us.  What the `peer` says of those before it counts
    if it is `trusted`; `name` is this process's in Via."""

    peer: str
    tls: bool
    trusted: bool
    name: str


def came_by(fields: Fields, name: str) -> bool:
    """Whether Via says that a message was with the process of that name already."""
    via = fields.values.get("via")
    return via is not None and name in via


@remembered
def forwarded_fields(fields: Fields, hop: Hop, shows_key: bool, stream: bool) -> tuple[str, str]:
    """A client's field lines for servers, without X-Request-Id; and the lines of its key, '' if
    servers may not see it.  A `stream` is to come uncompressed, since its events are read."""
    get, (peer, tls, trusted, name) = fields.get, hop
    host = (trusted and get("x-forwarded-host")) or get("host")
    proto = (trusted and get("x-forwarded-proto")) or ("https" if tls else "http")
    added = [
        ("X-Forwarded-For", fields.with_member("x-forwarded-for", peer) if trusted else peer),
        ("X-Forwarded-Proto", proto), ("Via", fields.with_member("via", f"1.1 {name}")),
    ]
    if host:
        added.append(("X-Forwarded-Host", host))
    if stream or "text/event-stream" in get("accept").lower():
        added.append(("Accept-Encoding", "identity"))
    dropped = KEY_FIELD_NAMES if trusted else CLIENT_FIELDS_DROPPED
    key_lines = "".join(f"{name}: {value}\r\n" for key, name, value in fields.lines
                        if shows_key and key in KEY_FIELD_NAMES)
    dropped = dropped.union(("x-request-id", "content-encoding"))  # which was undone
    return forward_fields(fields, added, dropped), key_lines


def forward_request(
    head: RequestHead, path: str, authority: str, fields: str, length: int | None
) -> bytes:
    """A request's head for one server.  `length` is of its content, None where there is none."""
    target = path if head.query is None else f"{path}?{head.query}"
    if length is None and head.method in ("POST", "PUT", "PATCH"):
        length = 0  # RFC 9110 §8.6: these say so
    framed = "" if length is None else f"Content-Length: {length}\r\n"
    if head.hops_left:
        fields = MAX_FORWARDS_LINE.sub(f"Max-Forwards: {head.hops_left - 1}\r\n", fields)
    if head.wants_upgrade:
        framed += "Connection: upgrade\r\nUpgrade: websocket\r\n"
    text = f"{head.method} {target} HTTP/1.1\r\nHost: {authority}\r\n{fields}{framed}\r\n"
    return text.encode("latin-1")


def returned_framing(
    head: ResponseHead, length: Length, request: RequestHead, theirs: Framing
) -> Framing | None:
    """How an answer's content is framed for the client: by its length where the server told one,
    else in chunks, or until the close for HTTP/1.0.  None where nothing is said of it, because
    there is none; to HEAD and in a 304, the server's word about what it leaves out is passed on."""
    if head.status < 200 or head.status == 204:
        return None
    if request.method == "HEAD" or head.status == 304:
        return None if length is None else parse_length(length, Fault.BAD_ANSWER)
    if theirs.length is not None:
        return theirs
    return CHUNKED if request.minor else UNTIL_CLOSE


def return_response(
    head: ResponseHead, request: RequestHead, framing: Framing | None, persists: bool,
    added: Pairs = (), id: str = "",
) -> bytes:
    """A response's head as sent to the client, with the request's `id`."""
    lines = returned_lines(head.fields, head.status, head.reason, tuple(added), id != "")
    if id:
        lines += f"X-Request-Id: {id}\r\n"
    return f"{lines}{framing_line(framing)}{connection_line(request, persists)}\r\n".encode(
        "latin-1")


@remembered
def returned_lines(fields: Fields, status: int, reason: str, added: Pairs, with_id: bool) -> str:
    """The first line and field lines of a response to pass on, but for its framing.  Which web
    origins may read it is for us to say: vLLM lets in all of them, unless it is told not to."""
    dropped = ("content-length", *CORS_FIELDS, *["x-request-id"] * with_id)
    lines = f"HTTP/1.1 {status} {reason}\r\n{kept_lines(fields, added, dropped)}"
    return f"{lines}Connection: upgrade\r\nUpgrade: websocket\r\n" if status == 101 else lines


def own_response(
    status: int, request: RequestHead, content: bytes, persists: bool, fields: Pairs = ()
) -> bytes:
    """A whole response of the balancer's own; to HEAD only its head."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    lines += framing_line(None if status == 204 else Framing(len(content)))
    lines += connection_line(request, persists)
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}\r\n".encode("latin-1")
    return head if request.method == "HEAD" else head + content


def framing_line(framing: Framing | None) -> str:
    if framing is None or framing == UNTIL_CLOSE:
        return ""
    if framing.chunked:
        return "Transfer-Encoding: chunked\r\n"
    return f"Content-Length: {framing.length}\r\n"


def connection_line(request: RequestHead, persists: bool) -> str:
    if not persists:
        return "Connection: close\r\n"
    return "" if request.minor else "Connection: keep-alive\r\n"


def local_location(location: str, authority: str, prefix: str) -> str:
    """A redirect's target as the client can follow it: a server that redirects to itself, with or
    without its authority (RFC 9110 §10.2.2), means a path on our address.  One that would begin
    with // names another host, and stays."""
    try:
        parts = urllib.parse.urlsplit(location)
    except ValueError:
        return location
    path = parts.path.removeprefix(prefix) or "/"
    ours = parts.netloc.lower() == authority or (not parts.netloc and location.startswith("/"))
    if not (ours and f"{parts.path}/".startswith(f"{prefix}/")) or path.startswith("//"):
        return location
    return urllib.parse.urlunsplit(("", "", path, parts.query, parts.fragment))


# What a page may read beside the usual, where `*` is none: of answers with credentials.
EXPOSED_FIELDS = "X-Request-Id, X-MVLLM-Server, X-MVLLM-Error, X-MVLLM-Why, Retry-After"


def cors_fields(
    head: RequestHead, origins: Iterable[str], credentials: bool = False
) -> list[tuple[str, str]]:
    """What lets a web page of an allowed origin read the answer (Fetch standard); [] for others.
    A preflight's wishes are repeated, because `*` would not cover Authorization."""
    origin, get = head.fields.get("origin"), head.fields.get
    if not origin or not ("*" in origins or origin in origins):
        return []
    fields = [("Access-Control-Allow-Origin", "*" if "*" in origins else origin)]
    if "*" not in origins:
        fields.append(("Vary", "Origin"))
        if credentials:
            fields.append(("Access-Control-Allow-Credentials", "true"))
    if not head.is_preflight:
        exposed = EXPOSED_FIELDS if credentials else "*"
        return [*fields, ("Access-Control-Expose-Headers", exposed)]
    for ours, theirs in (("Methods", "method"), ("Headers", "headers")):
        if wanted := get(f"access-control-request-{theirs}"):
            fields.append((f"Access-Control-Allow-{ours}", wanted))
    return [*fields, ("Access-Control-Max-Age", "3600")]


# ============================================================================================
#  6  exposition
# ============================================================================================
#
# The Prometheus text format 0.0.4, both directions.  Reading happens twice a second for each
# server, on pages of 50 to 80 kB, so it looks only at the metrics it was asked for.

SAMPLE_LIMIT = 4096  # characters of one line of a page of metrics
LABEL_SETS_LIMIT = 500  # children of one metric family; what comes later is counted as "other"
SAMPLE_LINE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*+)"  # name
    r'(?:\{((?:[^"{}]|"(?:[^"\\]|\\.)*+")*+)\})?'  # {label="value",…}
    r"[ \t]++([^\s_]++)(?:[ \t]++-?[0-9]++)?[ \t]*+(?:#.*)?\r?"  # value, timestamp, exemplar
)
LABEL = re.compile(
    r'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"((?:[^"\\]|\\.)*+)"[ \t]*+(?:,|$)')
ESCAPE = re.compile(r"\\(.)")


class Sample(NamedTuple):
    name: str
    labels: Mapping[str, str]
    value: float


def parse_samples(
    page: str, names: Iterable[str] | None = None, limit: int = SAMPLES_LIMIT
) -> Iterator[Sample]:
    """The samples of the named metrics, or of all.  Comments and malformed lines are skipped: one
    bad line must not hide the load of a server."""
    lines = page.split("\n") if names is None else named_lines(page, names)
    for line in itertools.islice(lines, limit):
        if len(line) > SAMPLE_LIMIT or (match := SAMPLE_LINE.fullmatch(line)) is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        yield Sample(match[1], parse_labels(match[2] or ""), value)


@functools.lru_cache(LABEL_SETS_LIMIT)  # pages differ in their values
def parse_labels(text: str) -> Mapping[str, str]:
    labels, at = dict[str, str](), 0
    while (label := LABEL.match(text, at)) is not None:
        labels[label[1]], at = unescape(label[2]), label.end()
    return labels


def named_lines(page: str, names: Iterable[str]) -> Iterator[str]:
    """The lines of `page` that begin with one of the names; a search, so that the other 900 lines
    of a vLLM page cost next to nothing."""
    return (line[1] for line in search_for(tuple(names)).finditer(f"\n{page}"))


@functools.cache
def search_for(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\n((?:{'|'.join(map(re.escape, names))})[{{ \t][^\n]*+)")


def unescape(value: str) -> str:
    return ESCAPE.sub(lambda m: "\n" if m[1] == "n" else m[1], value) if "\\" in value else value


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Family:
    """A metric family.  Its children are kept by their label values, LABEL_SETS_LIMIT at most; the
    rest count together as "other", so that no client can fill our memory."""

    kind = ""

    def __init__(self, name: str, meaning: str, *labels: str) -> None:
        self.name, self.meaning, self.labels = name, meaning, labels
        self.children: dict[tuple[str, ...], Any] = {}

    def key(self, values: tuple[str, ...]) -> tuple[str, ...]:
        if values in self.children or len(self.children) < LABEL_SETS_LIMIT:
            return values
        return ("other",) * len(self.labels)

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """(suffix, label values, value) of each line to write."""
        for values, value in self.children.items():
            yield "", values, value


class Counter(Family):
    kind = "counter"

    def add(self, *values: str, amount: float = 1) -> None:
        try:
            self.children[values] += amount
        except KeyError:
            room = len(self.children) < LABEL_SETS_LIMIT
            key = values if room else self.key(values)
            self.children[key] = self.children.get(key, 0) + amount

    def fold(self, label: str, value: str, into: str) -> None:
        """Count the children with that value of a label under another one: sums stay."""
        at = self.labels.index(label)
        for values in [one for one in self.children if one[at] == value]:
            amount = self.children.pop(values)
            self.add(*values[:at], into, *values[at + 1:], amount=amount)


class Gauge(Family):
    kind = "gauge"

    def set(self, value: float, *values: str) -> None:
        self.children[self.key(values)] = value


class Histogram(Family):
    """A child is a list: the count of each bucket, the count above the last, and the sum."""

    kind = "histogram"

    def __init__(self, name: str, meaning: str, bounds: tuple[float, ...], *labels: str) -> None:
        super().__init__(name, meaning, *labels)
        self.bounds = bounds

    def child(self, *values: str) -> list[float]:
        """The child of these label values; who holds it can `observe` cheaply."""
        zeros, room = [0.0] * (len(self.bounds) + 2), len(self.children) < LABEL_SETS_LIMIT
        key = values if room else self.key(values)
        return self.children.get(values) or self.children.setdefault(key, zeros)

    def observe(self, child: list[float], value: float) -> None:
        child[bisect.bisect_left(self.bounds, value)] += 1
        child[-1] += value

    def note(self, value: float, *values: str) -> None:
        """A value of the child with these label values."""
        note_each(values, (self, value))

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        for values, child in self.children.items():
            count = 0.0
            for bound, in_bucket in zip((*self.bounds, INFINITY), child):
                count += in_bucket
                yield "_bucket", (*values, written(bound)), count
            yield "_sum", values, child[-1]
            yield "_count", values, count


def note_each(values: tuple[str, ...], *noted: tuple[Histogram, float]) -> None:
    """A value of each histogram's child with these label values; in one call, as each request has
    so many of them."""
    for family, value in noted:
        child = family.children.get(values) or family.child(*values)
        child[bisect.bisect_left(family.bounds, value)] += 1
        child[-1] += value


def written(value: float) -> str:
    """A number as Prometheus reads it; whole ones without a fraction."""
    if value == INFINITY:
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


def expose(families: Iterable[Family]) -> str:
    """The text page of these families."""
    out = []
    for family in families:
        out.append(f"# HELP {family.name} {family.meaning}\n# TYPE {family.name} {family.kind}\n")
        for suffix, values, value in family.samples():
            names = (*family.labels, "le") if suffix == "_bucket" else family.labels
            labels = ",".join(f'{n}="{escape(v)}"' for n, v in zip(names, values))
            braces = f"{{{labels}}}" if labels else ""
            out.append(f"{family.name}{suffix}{braces} {written(value)}\n")
    return "".join(out)


# ━━━ part II: settings ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  7  checks
# ============================================================================================
#
# What a value in the settings may be: a check gives the clean value, or raises ValueError with what
# was expected.  Among them a formula, which is compiled from a small part of Python's expressions.

REQUIRED: Any = object()
ROLES = ("prefill", "decode", "both")
POLICY_NAMES = (  # the rows of POLICIES (a test compares the two)
    "unified", "least", "round_robin", "random", "power_of_two", "consistent_hash", "prefix",
    "cache_aware", "lmetric", "mvllm", "vllm_router", "expression",
)
Clean = Callable[[Any], Any]  # gives the clean value, or raises ValueError with what was expected


def setting(default: Any, check: Clean, meaning: str, env: str = "", restart: bool = False) -> Any:
    """A dataclass field that is a setting.  `env` is an environment variable that may give it;
    `restart` says that a change takes effect at the next start only."""
    metadata = {"check": check, "meaning": meaning, "env": env, "restart": restart}
    given = {} if default is REQUIRED else {"default": default}
    return dataclasses.field(metadata=metadata, **given)


def number(low: float, high: float = INFINITY, whole: bool = False) -> Clean:
    """A number in a range; as mvllm does, '5' is taken for 5 and 5.0 for a whole number."""
    kind = "a whole number" if whole else "a number"
    expected = f"{kind}, {low} or more" if high == INFINITY else f"{kind}, {low} to {high}"

    def check(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, (bool, list, dict)) else float(value)
        except (ValueError, TypeError, OverflowError):
            found = math.nan
        if not low <= found <= high or found == INFINITY or (whole and found != int(found)):
            raise ValueError(expected)
        return int(found) if whole else found

    return check


def whole(low: int, high: float = INFINITY) -> Clean:
    return number(low, high, whole=True)


TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def truth(value: Any) -> bool:
    found = value if isinstance(value, bool) else TRUTHS.get(str(value).lower())
    if found is None:
        raise ValueError("true or false")
    return found


def words(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text in quotes")
    return value


def field_name(value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch(TOKEN, value)):
        raise ValueError("a field's name in quotes")
    return value


def file_path(value: Any) -> str:
    """The path of a file to read, which only the settings file may name."""
    return words(value)


def file_name(value: Any) -> str:
    if "/" in (name := words(value)) or name in (".", ".."):
        raise ValueError("a name without a directory")
    return name


LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,251}[A-Za-z0-9])?", re.ASCII)
LABEL_REQUIREMENT = re.compile(
    r"!?[\w./-]+|[\w./-]+ ?(?:==?|!=) ?[\w.-]*|[\w./-]+ (?:not)?in ?\([\w., -]*\)", re.ASCII)


def label_value(value: Any) -> str:
    if words(value) and not LABEL_VALUE.fullmatch(value):
        raise ValueError("a name of Kubernetes")
    return str(value)


def label_selector(value: Any) -> str:
    """A selector of labels as kubectl's -l takes it."""
    found = " ".join(words(value).split())
    parts = re.split(r",(?![^()]*\))", found) if found else []
    if not all(LABEL_REQUIREMENT.fullmatch(part.strip()) for part in parts):
        raise ValueError("labels like app=vllm,tier!=test,zone in (a,b)")
    return found


def port_list(value: Any) -> tuple[int | str, ...]:
    """One port or several, each by its number or its name."""
    found = [one.strip() if isinstance(one, str) else one
             for one in (value if isinstance(value, list) else [value])]
    for i, one in enumerate(found):
        if isinstance(one, str) and LABEL_VALUE.fullmatch(one) and not one.isdigit():
            continue
        try:
            found[i] = whole(1, 65535)(one)
        except ValueError:
            raise ValueError("a port, its name, or a list of these") from None
    if len(found) > 64:
        raise ValueError("64 ports at most")
    return tuple(found)


def one_of(*choices: str) -> Clean:
    def check(value: Any) -> str:
        for choice in choices:
            if isinstance(value, str) and value.lower() == choice.lower():
                return choice
        raise ValueError(f"one of {', '.join(choices)}")

    return check


def ip_family(value: Any) -> int:
    if value in (4, 6) and not isinstance(value, float):
        return int(value)
    raise ValueError("4 or 6")


def list_of(check_one: Clean) -> Clean:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError("a list in [ ]")
        return tuple(map(check_one, value))

    return check


URL_TEXT = re.compile(r"[!#-;=?-Z\[\]_a-z~]+")


def retry_status(value: Any) -> int:
    with contextlib.suppress(ValueError):
        if (found := whole(400, 599)(value)) >= 500 or found in (408, 429):
            return int(found)
    raise ValueError("408, 429 or 500 to 599")


def base_url(value: Any) -> str:
    """A server's URL without trailing slash.  A trailing /v1 is taken off: people copy it from
    their client's base_url, and our paths begin with it anyway."""
    expected = ValueError("a URL like http://10.0.0.1:8000")
    try:
        parts = urllib.parse.urlsplit(value if URL_TEXT.fullmatch(value) else "")
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # what the name's resolution would stumble over
    except (ValueError, TypeError):
        raise expected from None
    if not good or parts.query or parts.fragment or "@" in value:  # it sets off a rank, later
        raise expected
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def network(value: Any) -> str:
    """An address or a network of addresses."""
    try:
        return str(ipaddress.ip_network(words(value), strict=False))
    except ValueError:
        raise ValueError("an address like 10.0.0.1 or a network like 10.0.0.0/8") from None


LOOPBACK = ("127.0.0.0/8", "::1/128")


def listening_address(value: Any) -> str:
    """An address and a port; `*` is all addresses."""
    found = re.fullmatch(r"(?:tcp://)?(\*|\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", words(value))
    if value and (found is None or not 0 < int(found[2]) < 65536):
        raise ValueError("an address and a port, like 0.0.0.0:30001")
    return f"{found[1]}:{found[2]}" if found else ""


def printable_name(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 100:
        raise ValueError("a name")
    return value


def optional_secret(value: Any) -> str:
    return "" if value == "" else secret(value)


def secret(value: Any) -> str:
    """What stands behind `Bearer` in a field."""
    if not isinstance(value, str) or not SECRET.fullmatch(value):
        raise ValueError("a key of printable characters without spaces")
    return value


SECRET = re.compile(r"[\x21-\x7e]{1,4096}")


def share_weight(value: Any) -> float:
    """A weight; one too small to matter is 0."""
    found = number(0, 1000)(value)
    return found if found >= 0.001 else 0.0


AUTO = 0  # of a capacity: not given, to be learned


def capacity(value: Any) -> int:
    if isinstance(value, str) and value.lower() == "auto":
        return AUTO
    try:
        return int(whole(1, 1_000_000)(value))
    except ValueError as expected:
        raise ValueError(f'{expected}, or "auto"') from None


# What a score may be made of: numbers, arithmetic, comparisons, and these.  Not Python: a settings
# file is no program.
SCORE_NAMES = ("running", "waiting", "in_flight", "foreign", "capacity", "kv_usage", "pending",
               "prompt", "cached", "speed", "weight", "slow_start")
SCORE_FUNCTIONS = {"min": min, "max": max, "abs": abs, "sqrt": math.sqrt, "log": math.log}
SCORE_ARGUMENTS = {"min": (2, 20), "max": (2, 20), "abs": (1, 1), "sqrt": (1, 1), "log": (1, 2)}
SCORE_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Load, ast.Add,
    ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UAdd, ast.USub, ast.Not,
    ast.And, ast.Or, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq,
)
SCORE_LIMIT = 500  # characters


class CompiledFormula(NamedTuple):
    """Which of SCORE_NAMES a formula has, and a function of these names' columns, by server, that
    returns the formula's value for each; infinity where it has none."""

    names: tuple[str, ...]
    costs: Callable[[Sequence[Sequence[float]]], list[float]]


@functools.cache
def compiled(score: str) -> CompiledFormula:
    """Raises ValueError for what is no formula."""
    try:
        tree = ast.parse(score.strip()[: SCORE_LIMIT + 1], mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("a formula like (running + 0.5 * waiting) / capacity") from None
    functions = set[int]()
    for node in ast.walk(tree):  # those without before those within
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            if node.value > sys.float_info.max and isinstance(node.value, int):
                raise ValueError("a formula of smaller numbers")
            node.value = float(node.value)  # whole numbers may grow for ever: 9 ** 9 ** 9
        elif isinstance(node, ast.Name):
            known = SCORE_FUNCTIONS if id(node) in functions else SCORE_NAMES
            if node.id not in known:
                raise ValueError(f"a formula of {', '.join((*SCORE_NAMES, *SCORE_FUNCTIONS))}")
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            least, most = SCORE_ARGUMENTS.get(name, (1, 0))
            if node.keywords or not least <= len(node.args) <= most:
                raise ValueError(f"a formula whose functions are {', '.join(SCORE_FUNCTIONS)}")
            functions.add(id(node.func))
        elif not isinstance(node, SCORE_NODES):
            raise ValueError("a formula of names, numbers and arithmetic alone")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = tuple(name for name in SCORE_NAMES if name in used) or SCORE_NAMES[:1]
    rows = ast.parse(f"lambda rows: [0 for {', '.join(names)}, in rows]", mode="eval")
    rows.body.body.elt = tree.body  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(rows), "score", "eval")
    values_of = eval(code, {"__builtins__": {}, **SCORE_FUNCTIONS})

    def costs(columns: Sequence[Sequence[float]]) -> list[float]:
        try:
            found = list(map(float, values_of(zip(*(map(float, column) for column in columns)))))
        except (ArithmeticError, ValueError, TypeError):  # the last: roots of less than nothing
            if len(columns[0]) == 1:
                return [INFINITY]
            return [cost for row in zip(*columns) for cost in costs([[value] for value in row])]
        if all(map(math.isfinite, found)):
            return found
        return [cost if math.isfinite(cost) else INFINITY for cost in found]

    return CompiledFormula(names, costs)


def formula(value: Any) -> str:
    if words(value):
        if len(value) > SCORE_LIMIT:
            raise ValueError(f"a formula of {SCORE_LIMIT} characters at most")
        compiled(value)
    return str(value)


# ============================================================================================
#  8  settings
# ============================================================================================
#
# One declaration per setting: its key, default, check and meaning stand in one place, and the
# file, the environment, the command line and servers.example.toml follow from it.
#
# To add a setting: a field with `setting(…)` in ServerSettings or Settings, and its line in
# servers.example.toml (a test compares the two).


@dataclasses.dataclass(frozen=True, slots=True)
class ServerSettings:
    """One entry of the list of servers."""

    url: str = setting(REQUIRED, base_url, "where the server listens")
    max_concurrent_requests: int = setting(
        AUTO, capacity, 'requests it runs well at the same time; "auto": learned')
    weight: float = setting(
        1.0, share_weight, "what its capacity is multiplied by, or its share; 0: it gets none")
    tier: int = setting(1, whole(1), "asked only when lower tiers are full")
    pool: str = setting("", words, "one of [pools], which say what share of requests it gets")
    data_parallel_size: int = setting(
        1, whole(1, 256), "its engines (vLLM's --data-parallel-size), each chosen by itself")
    role: str = setting(
        "both", one_of(*ROLES), "prefill servers read prompts for others, decode ones answer")
    bootstrap_port: int = setting(
        0, whole(0, 65535), "of Mooncake, on a prefill server; 0 is its own default, 8998")
    zmq_address: str = setting("", words, "of P2pNccl: host:port, its address and kv_port")
    api_key: str = setting("", secret, "its key, for requests and checks, in place of the client's")
    api_key_file: str = setting("", file_path, "a file that holds it")
    ca_file: str = setting("", file_path, "https: certificates to trust, in place of the system's")
    client_cert: str = setting("", file_path, "https: a file with our certificate and its key")
    verify: bool = setting(True, truth, "https: whether its certificate is checked at all")
    refresh: float = setting(5.0, number(0.05), "time between two lookups of the name in its URL")
    # What is no key of an entry, but said by who names the server.
    id: str = ""  # all state is kept by it; where nothing is said, it is the URL
    name: str = ""  # what people and programs are shown; the id, where nothing is said
    address: str = ""  # an IP address to connect to; TLS name and Host stay the URL's
    like: str = ""  # the id of an entry of the settings whose keys and certificates are used

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or self.url)
        object.__setattr__(self, "name", self.name or self.id)


@dataclasses.dataclass(frozen=True, slots=True)
class DnsSettings:
    """An entry of the list of servers with `dns` in place of `url`, which stands for several."""

    dns: str = setting(
        REQUIRED, base_url, "a URL; each address of the name in it is a server, with these keys")
    family: int = setting(0, ip_family, "4 or 6: its addresses of that kind; 0: 4 or, if none, 6")
    server: ServerSettings = ServerSettings("")  # what each of them is like

    @property
    def pool(self) -> str:
        return self.server.pool


def dns_entry(dns: str, family: int = 0, **keys: Any) -> DnsSettings:
    return DnsSettings(dns, family, ServerSettings(dns, **keys))


def host_of(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or ""


def may_move(url: str) -> bool:
    """Whether a name stands in it that may have other addresses one day."""
    try:
        ipaddress.ip_address(host_of(url))
    except ValueError:
        return host_of(url) != "localhost"
    return False


class NamesWanted(NamedTuple):
    """What is to be looked up: names that stand for several servers, and those of single ones."""

    entries: tuple[DnsSettings, ...]
    servers: tuple[ServerSettings, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class KeySettings:
    """One entry of [[keys]]: who may come in."""

    name: str = setting(REQUIRED, printable_name, "what it is called in the log")
    key: str = setting("", secret, "what clients send; or")
    key_file: str = setting("", file_path, "a file that holds it")
    models: tuple[str, ...] = setting((), list_of(words), "models it allows; [] is all")
    requests_per_second: float = setting(0.0, number(0), "0 is no limit")
    max_requests: int = setting(0, whole(0), "requests in progress; 0 is no limit")
    admin: bool = setting(False, truth, "whether it opens status and admin paths")


@dataclasses.dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """One entry of [[kubernetes]]: pods that are servers.  Its other keys are of those servers."""

    selector: str = setting("", label_selector, "labels of pods, like app=vllm; or")
    prefill_selector: str = setting("", label_selector, "of those for prefill,")
    decode_selector: str = setting("", label_selector, "of those for decode; or")
    service: str = setting("", label_value, "a Service, for who may read its EndpointSlices alone")
    namespace: str = setting("", label_value, 'where they are; "" is all namespaces')
    port: tuple[int | str, ...] = setting(
        (), port_list, "port of each pod, by number or name; of several each is a server")
    scheme: str = setting("http", one_of("http", "https"), "what the pods speak")
    server_ca_file: str = setting("", file_path, "https: certificates to trust, of the pods")
    kubeconfig: str = setting("", file_path, "how the API is reached, as JSON; else as a pod")
    api_server: str = setting("", base_url, "or its URL, with")
    token_file: str = setting("", file_path, "a file with a token, and")
    ca_file: str = setting("", file_path, "one with certificates to trust")
    server: ServerSettings = ServerSettings("")  # what its servers have in common


class ClustersWanted(NamedTuple):
    """What is to be watched, and the pools that pods may name."""

    tables: tuple[KubernetesSettings, ...]
    pools: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set.  The first fields are tables of their own in the file; every
    other is a key of [config].  Times are in seconds."""

    servers: tuple[ServerSettings, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    policies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by model
    pools: Mapping[str, float] = dataclasses.field(default_factory=dict)  # percent of requests
    keys: tuple[KeySettings, ...] = ()
    dns: tuple[DnsSettings, ...] = ()
    kubernetes: tuple[KubernetesSettings, ...] = ()
    resumes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by model

    host: str = setting("0.0.0.0", words, "address to listen on", "HOST", restart=True)
    port: int = setting(8888, whole(0, 65535), "port to listen on", "PORT", restart=True)
    operator_host: str = setting(
        "", words, "address of a listener of its own for metrics, status and admin", restart=True)
    operator_port: int = setting(0, whole(0, 65535), "its port", restart=True)
    api_key: str = setting(
        "", optional_secret, "the key of servers named here that have none of their own")
    tls_cert: str = setting("", file_path, "a file with a certificate: clients speak https")
    tls_key: str = setting("", file_path, "a file with its key")
    trusted_proxies: tuple[str, ...] = setting(
        (), list_of(network), "addresses whose X-Forwarded fields are believed")
    pass_client_key: bool = setting(
        False, truth, "with [[keys]]: servers are shown the client's key, too")
    added_get_client_key: bool = setting(
        False, truth, "servers that were added over HTTP are shown the client's key, too")
    status_access: str = setting(
        "open", one_of("open", "key", "admin", "loopback"), "who may see status paths")
    admin_paths: tuple[str, ...] = setting(
        (), list_of(words), "paths beyond inference that admin keys may ask one server for")
    registration_key: str = setting(
        "", optional_secret, "what servers show that register themselves; or")
    registration_key_file: str = setting("", file_path, "a file that holds it")
    registration_networks: tuple[str, ...] = setting(
        LOOPBACK, list_of(network), "addresses that may register at all")
    registration_any_address: bool = setting(
        False, truth, "they may register other addresses than their own")
    registration_address: str = setting(
        "", listening_address, "where vLLM's connectors register over ZMQ, like 0.0.0.0:30001")
    registered_api_key: str = setting(
        "", optional_secret, "the key of servers that have registered; or")
    registered_api_key_file: str = setting("", file_path, "a file that holds it")
    registered_get_client_key: bool = setting(
        False, truth, "servers that have registered are shown the client's key")
    policy: str = setting("unified", one_of(*POLICY_NAMES), "how a server is chosen")
    score: str = setting("", formula, "of policy expression: the server with the lowest is asked")
    session_headers: tuple[str, ...] = setting(
        ("x-session-id", "x-user-id", "x-tenant-id", "x-correlation-id"), list_of(field_name),
        "fields that name a session, the first that a request has")
    request_id_headers: tuple[str, ...] = setting(
        ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"), list_of(field_name),
        "fields that name a request, the first that it has")
    cache_threshold: float = setting(
        0.3, number(0, 1), "of cache_aware: share of a prompt that must be known to a server")
    balance_abs_threshold: int = setting(
        64, whole(0), "of cache_aware: more requests than the least loaded server has, and")
    balance_rel_threshold: float = setting(
        1.5, number(1), "this many times as many, make it look at load alone")
    slow_start: float = setting(
        5.0, number(0), "for a server that has come back: until it gets its full share")
    why_header: bool = setting(False, truth, "say in X-MVLLM-Why why a server was chosen")
    trace_file: str = setting("", words, "where to write what replay reads; never any text")
    default_model: str = setting("", words, "model of requests that name none")
    max_head_bytes: int = setting(2**16, whole(256, 2**17), "longest head of a request")
    max_body_bytes: int = setting(2**27, whole(1), "longest content of a request")
    max_buffered_bytes: int = setting(
        2**30, whole(1), "what is held of all requests that wait: content, heads, what came early")
    head_timeout: float = setting(30.0, number(0.001), "from a head's first byte to its last")
    body_timeout: float = setting(
        60.0, number(0.001), "silence of a client that sends content or reads an answer")
    keep_alive_timeout: float = setting(
        75.0, number(0.001), "silence of a client between two requests")
    max_requests_per_connection: int = setting(10000, whole(1), "then a connection is closed")
    max_connections: int = setting(10000, whole(1), "from clients; more wait to be accepted")
    max_connections_per_client: int = setting(
        0, whole(0), "from one address that is no trusted proxy; 0 is no limit")
    max_requests: int = setting(0, whole(0), "requests in progress; 0 is no limit")
    queue_size: int = setting(
        0, whole(0), "requests that wait here for servers that are full; 0: servers never are")
    queue_timeout: float = setting(30.0, number(0.001), "longest time in that queue")
    queue_heartbeat: float = setting(
        0.0, number(0), "between comments to clients of streams that wait; 0 is none")

    comment_after: float = setting(
        15.0, number(0), "wait of a stream's client, after which a server's comments are shown")

    request_timeout: float = setting(
        600.0, number(0.001), "silence of a server that ends a request", "REQUEST_TIMEOUT")
    connect_timeout: float = setting(5.0, number(0.001), "time for a connection to a server")
    max_retries: int = setting(3, whole(0, 100), "more attempts after the first")
    retry_delay: float = setting(0.1, number(0), "first pause between attempts; it doubles")
    retry_delay_max: float = setting(2.0, number(0), "longest pause between attempts")
    retry_statuses: tuple[int, ...] = setting(
        (502, 503, 504), list_of(retry_status), "answers to ask another server after")
    retry_timed_out: bool = setting(
        False, truth, "run a request again that met request_timeout; it may run twice")
    retry_budget: float = setting(
        0.2, number(0), "share that retries may add to the requests of ten seconds")

    resume: str = setting(
        "repeat", one_of("off", "repeat", "continue"), "how a stream that breaks goes on elsewhere")
    resume_within: float = setting(
        30.0, number(0), "from a stream's break to where it goes on, at most")
    resume_bytes: int = setting(
        2**26, whole(0), "what is kept for that of all streams' events, as packed")
    resume_seed: bool = setting(
        False, truth, "streams without a seed get one, so that all can be repeated")
    drain_resume: bool = setting(
        False, truth, "streams leave a server that is drained at once, and go on elsewhere")

    poison_hold: float = setting(
        30.0, number(0), "how long content with which two servers have died is held off; 0 is off")

    metrics_interval: float = setting(0.5, number(0.05), "time between two looks at /metrics")
    models_interval: float = setting(30.0, number(0.1), "age at which a model list is renewed")
    enable_active_health_check: bool = setting(True, truth, "ask servers for their health")
    health_check_interval: float = setting(
        10.0, number(0.05), "time between two checks of a server", "HEALTH_CHECK_INTERVAL")
    health_check_timeout: float = setting(5.0, number(0.001), "time for one check")
    health_check_window_size: int = setting(10, whole(1), "checks that are judged together")
    health_check_min_success_rate: float = setting(
        0.8, number(0, 1), "share of the window's checks that must pass")
    health_check_max_response_time: float = setting(
        10.0, number(0.001), "what the window's checks may take on average")
    health_check_consecutive_failures: int = setting(
        3, whole(1), "failed checks in a row that take a server out")
    health_check_consecutive_successes: int = setting(
        1, whole(1), "passed checks in a row that bring it back")
    failure_threshold: int = setting(2, whole(1), "failed requests in a row that open its circuit")
    breaker_window: float = setting(60.0, number(0), "age at which a failed request is forgotten")
    breaker_open_time: float = setting(30.0, number(0), "from a circuit's opening to a trial")
    breaker_success_threshold: int = setting(2, whole(1), "good trials in a row that close it")
    frozen_timeout: float = setting(
        60.0, number(0), "standstill of a server with requests that takes it out; 0 is never")
    auto_recovery_threshold: float = setting(
        60.0, number(0), "without active checks: time until it is tried again")

    config_reload_interval: float = setting(
        3.0, number(0.05), "time between two looks at this file", "CONFIG_RELOAD_INTERVAL")
    drain_delay: float = setting(
        0.0, number(0), "when stopping: from readiness turning 503 to accepting no more")
    drain_timeout: float = setting(30.0, number(0), "time for running answers when stopping")
    server_header: bool = setting(True, truth, "name the server in X-MVLLM-Server")
    cors_allowed_origins: tuple[str, ...] = setting(
        (), list_of(words), "web origins whose pages may call; with [[keys]] the default is all")
    cors_allow_credentials: bool = setting(
        False, truth, "whether they may send cookies with that; not together with *")
    log_level: str = setting(
        "INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"), "what is logged", "LOG_LEVEL")
    log_to_console: bool = setting(
        False, truth, "on a terminal, too: log lines, with each request, not the screen",
        "LOG_TO_CONSOLE")
    show_models: bool = setting(
        False, truth, "name the models when a server's state changes", "SHOW_MODELS")
    log_dir: str = setting(
        "logs", words, "directory of the log files; '' is none", "LOG_DIR", restart=True)
    log_file: str = setting("mvllm-lite.log", file_name, "all log lines", restart=True)
    error_log_file: str = setting("mvllm-lite-error.log", file_name, "errors", restart=True)
    structured_log_file: str = setting(
        "mvllm-lite-structured.log", file_name, "requests and transitions as JSON", restart=True)
    log_file_bytes: int = setting(
        10_000_000, whole(10_000), "size at which log and error files are rotated", restart=True)
    structured_log_file_bytes: int = setting(
        50_000_000, whole(10_000), "the same, of the structured log", restart=True)
    log_days: float = setting(
        7.0, number(0.001), "age at which a rotated file is removed", restart=True)
    error_log_days: float = setting(
        30.0, number(0.001), "the same, of errors", restart=True)

    @property
    def patterns(self) -> tuple[ServerSettings, ...]:
        """What servers are like that are found, and not named here."""
        return tuple(entry.server for entry in (*self.dns, *self.kubernetes))

    @property
    def clusters(self) -> ClustersWanted | None:
        return ClustersWanted(self.kubernetes, frozenset(self.pools)) if self.kubernetes else None

    @property
    def registration(self) -> str | None:
        """The address to listen on for ZMQ; '' where only HTTP is prepared for, None where nothing
        is: then the first who registers sets it going."""
        keyed = self.registration_key or self.registration_key_file
        return self.registration_address if keyed or self.registration_address else None

    @property
    def names(self) -> NamesWanted | None:
        servers = tuple(one for one in self.servers if may_move(one.url))
        return NamesWanted(self.dns, servers) if self.dns or servers else None


CONFIG_FIELDS = {f.name: f for f in dataclasses.fields(Settings) if f.metadata}
SERVER_FIELDS = {f.name: f for f in dataclasses.fields(ServerSettings) if f.metadata}
DNS_FIELDS = {f.name: f for f in dataclasses.fields(DnsSettings) if f.metadata} | {
    name: field for name, field in SERVER_FIELDS.items() if name != "url"}
KEY_FIELDS = {f.name: f for f in dataclasses.fields(KeySettings)}
KUBERNETES_FIELDS = {f.name: f for f in dataclasses.fields(KubernetesSettings) if f.metadata}
POD_FIELDS = KUBERNETES_FIELDS | {  # with those of servers, but for what a pod says itself
    key: field for key, field in SERVER_FIELDS.items()
    if key not in ("url", "refresh", "zmq_address", *KUBERNETES_FIELDS)}
SERVER_FILES = [n for n, f in SERVER_FIELDS.items() if f.metadata["check"] is file_path]
KEYS_THEMSELVES = ("key", "api_key", "registration_key", "registered_api_key")
SECRET_FIELDS = (*KEYS_THEMSELVES, "keys")  # their values stand in no complaint
RESTART_KEYS = {name for name, f in CONFIG_FIELDS.items() if f.metadata["restart"]}

# Keys of older files: those that never had an effect, or have none here; those that have another
# name now, and are warned about; and all words that stand for another.
OLD_KEYS = {"advanced": "no version of mvllm ever read this table"}
RENAMED_KEYS = {"shape_file": "trace_file"}
SYNONYMS = {"capacity": "max_concurrent_requests", **RENAMED_KEYS}


# ============================================================================================
#  9  settings file
# ============================================================================================
#
# From a TOML document to settings.  A bad value is never half used: everything that is wrong is
# gathered, placed and reported at once.


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
    """The settings cannot be used; `complaints` has everything that is wrong with them."""

    def __init__(self, complaints: list[Complaint]) -> None:
        super().__init__("\n".join(map(str, complaints)))
        self.complaints = complaints


Overrides = Mapping[str, tuple[Any, str]]  # key: (value, where it came from)
TABLES = ("servers", "config", "aliases", "policies", "pools", "keys", "kubernetes", "resumes")


def kubernetes_settings(**values: Any) -> KubernetesSettings:
    """Of an entry of [[kubernetes]], with the keys of its servers."""
    own = {key: value for key, value in values.items() if key in KUBERNETES_FIELDS}
    server = {key: value for key, value in values.items() if key not in KUBERNETES_FIELDS}
    ca_file = own.get("server_ca_file", "")
    return KubernetesSettings(**own, server=ServerSettings("", ca_file=ca_file, **server))


# Of lists: what is expected; and by the key that identifies an entry, what it is, and its fields.
# One without any of these keys is taken for one of the first kind; '' is a kind that needs none.
LISTS: dict[str, tuple[str, dict[str, tuple[Callable[..., Any], Mapping[str, Any]]]]] = {
    "servers": ('a list like [{ url = "http://10.0.0.1:8000" }]',
                {"url": (ServerSettings, SERVER_FIELDS), "dns": (dns_entry, DNS_FIELDS)}),
    "keys": ("a list of tables [[keys]]", {"name": (KeySettings, KEY_FIELDS)}),
    "kubernetes": ("a list of tables [[kubernetes]]", {"": (kubernetes_settings, POD_FIELDS)}),
}
Path = tuple[Any, ...]  # where a key stands, like ("servers", 2, "url")
TOML_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|(end of document))\)")
PASSWORD = re.compile(r"//.*@")
OPAQUE = re.compile(
    r"""#[^\n]*|(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')([ \t]*=)?""", re.DOTALL)
COMPLAINTS_LIMIT = 100  # about one file of which the line is told


def parse_settings(
    toml: str, source: str = "servers.toml", overrides: Overrides | None = None
) -> tuple[Settings, list[Complaint]]:
    """The settings in a TOML text, and warnings about keys that mean nothing.

    `overrides` of [config] keys win over the text; so do "servers", a list of tables, and "pools".
    Raises SettingsError.
    """
    try:
        document = tomllib.loads(toml)
    except (ValueError, RecursionError) as error:
        where = TOML_PLACE.fullmatch(str(error))
        text, line, end = where.groups() if where else (str(error), None, None)
        text = f"not valid TOML: {text}" + " at the end of the file" * bool(end)
        raise SettingsError([Complaint(source, int(line or 0), "", text)]) from None
    return SettingsReader(document, toml, source).read(overrides or {})


class SettingsReader:
    """Walks a TOML document and gathers values, complaints and warnings."""

    def __init__(self, document: dict[str, Any], toml: str, source: str) -> None:
        self.document, self.toml, self.source = document, toml, source
        self.sources = set(document)  # where servers may come from, besides the list of them
        self.bare: str | None = None  # the text without comments and values, for finding lines
        self.errors: list[Complaint] = []
        self.warnings: list[Complaint] = []

    def read(self, overrides: Overrides) -> tuple[Settings, list[Complaint]]:
        self.warn_unknown(self.document, TABLES, ())
        config = {key: value for key, value in self.table("config").items()
                  if SYNONYMS.get(key, key) not in overrides}
        values = self.values(config, CONFIG_FIELDS, ("config",))
        for key, (value, origin) in overrides.items():
            if key in CONFIG_FIELDS:
                values[key] = self.checked(CONFIG_FIELDS[key], value, (key,), origin)
        self.sources |= set(overrides)
        servers = self.servers(*overrides.get("servers", (None, "")))
        aliases, keys = self.aliases(), self.keys()
        if keys:
            values.setdefault("cors_allowed_origins", ("*",))
        policies, resumes = (
            {aliases.get(model, model): self.checked(CONFIG_FIELDS[key], value, (table, model))
             for model, value in self.table(table).items()}
            for table, key in (("policies", "policy"), ("resumes", "resume")))
        pools = self.pools(servers, overrides.get("pools", (self.table("pools"), ""))[0])
        kubernetes = self.kubernetes(pools, *overrides.get("kubernetes", (None, "")))
        self.check_together(values, keys.values(), policies)
        if self.errors:  # an unknown key may be what was meant
            raise SettingsError(self.errors + self.warnings)
        urls = tuple(one for one in servers.values() if isinstance(one, ServerSettings))
        dns = tuple(one for one in servers.values() if isinstance(one, DnsSettings))
        tables = (urls, aliases, policies, pools, tuple(keys.values()), dns, kubernetes, resumes)
        return Settings(*tables, **values), self.warnings

    def check_together(
        self, values: dict[str, Any], keys: Collection[KeySettings], policies: dict[str, str]
    ) -> None:
        """Complains of settings that make sense only with others.  A value is None where a
        complaint about it was made already."""
        given, origins = values.get, values.get("cors_allowed_origins") or ()
        by_score = "expression" in (given("policy"), *policies.values())
        for key, wrong, expected in (
            ("tls_key", bool(given("tls_cert")) is not bool(given("tls_key")),
             "both tls_cert and tls_key"),
            ("status_access", given("status_access") in ("key", "admin") and not keys,
             "open or loopback without [[keys]]"),
            ("admin_paths", given("admin_paths") and not any(key.admin for key in keys),
             "one of [[keys]] with admin = true"),
            ("cors_allow_credentials", given("cors_allow_credentials") and "*" in origins,
             "cors_allowed_origins without *, which would let in any page"),
            ("score", by_score and given("score", "") == "", "a formula, for policy expression"),
        ):
            if wrong:
                self.complain(("config", key), given(key), expected)

    def pools(
        self, servers: Mapping[int, ServerSettings | DnsSettings], given: Mapping[str, Any]
    ) -> dict[str, float]:
        """What share of requests each pool gets, in percent; servers of no pool get the rest."""
        pools, check = dict[str, float](), number(0, 100)
        for name, value in given.items():
            try:
                pools[name] = check(value)
            except ValueError as expected:
                self.complain(("pools", name), value, f"{expected}, in percent")
        if (total := round(sum(pools.values()), 6)) > 100:
            self.complain(("pools",), f"{total:g} in all", "100 at most")
        for i, server in servers.items():
            if server.pool and server.pool not in pools:
                self.complain(("servers", i, "pool"), server.pool, "one of [pools]")
        return pools

    def servers(self, entries: Any, origin: str) -> dict[int, ServerSettings | DnsSettings]:
        """`[servers] servers = [{…}]` as in mvllm, or `[[servers]]`."""
        if entries is None:
            entries = self.document.get("servers")
        if isinstance(entries, dict):
            self.warn_unknown(entries, ("servers",), ("servers",))
            entries = entries.get("servers")
        if entries is None and "kubernetes" in self.sources:
            entries = []
        # None is refused: an empty file is a half-written one, not a wish for no servers.
        return self.entries("servers", entries, origin)

    def keys(self) -> dict[int, KeySettings]:
        keys = self.entries("keys", self.document.get("keys", []))
        for i, key in keys.items():
            if bool(key.key) is bool(key.key_file):
                self.complain(("keys", i, "name"), key.name, "either key or key_file with it")
        return keys

    def kubernetes(
        self, pools: Mapping[str, float], entries: Any, origin: str
    ) -> tuple[KubernetesSettings, ...]:
        if entries is None:
            entries = self.document.get("kubernetes", [])
        tables = self.entries("kubernetes", entries, origin)
        for i, one in tables.items():
            id = f"[[kubernetes]] {i + 1}"
            tables[i] = dataclasses.replace(one, server=dataclasses.replace(one.server, id=id))
            selectors = one.selector or one.prefill_selector or one.decode_selector
            for key, wrong, expected in (
                ("selector", not (selectors or one.service), "selector, or service"),
                ("service", selectors and one.service, "no selector with it"),
                ("kubeconfig", one.kubeconfig and one.api_server, "no api_server with it"),
                ("token_file", one.token_file and not one.api_server, "api_server with it"),
                ("ca_file", one.ca_file and not one.api_server,
                 "api_server with it (of pods: server_ca_file)"),
                ("pool", one.server.pool and one.server.pool not in pools, "one of [pools]"),
            ):
                if wrong:
                    found = getattr(one, key, one.server.pool) or None
                    self.complain(("kubernetes", i, key), found, expected, origin)
        return tuple(tables.values())

    def entries(self, table: str, entries: Any, origin: str = "") -> dict[int, Any]:
        """The good entries of a list of tables, by their place in it."""
        (expected, kinds), found, known = LISTS[table], dict[int, Any](), set[str]()
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            self.complain((table,), entries, expected)
            return found
        for i, entry in enumerate(entries):
            path, before = (table, i), len(self.errors)
            identity = next((key for key in reversed(kinds) if key in entry), next(iter(kinds)))
            kind, fields = kinds[identity]
            for other in kinds.keys() & entry.keys() - {identity}:
                self.complain((*path, other), entry[other], f"no {other} beside {identity}", origin)
            values = self.values(entry, fields, path, origin)
            if identity and identity not in entry:
                self.complain((*path, identity), None, fields[identity].metadata["meaning"], origin)
            elif identity and values[identity] in known:
                self.complain((*path, identity), entry[identity], "each of them once", origin)
            if len(self.errors) == before:
                found[i] = kind(**values)
                known.add(values.get(identity, ""))
        return found

    def aliases(self) -> dict[str, str]:
        table, found = self.table("aliases"), dict[str, str]()
        for alias, model in table.items():
            if isinstance(model, str) and model and model not in table:
                found[alias] = model
            else:
                self.complain(("aliases", alias), model, "the name of a model, not of an alias")
        return found

    def table(self, name: str) -> dict[str, Any]:
        value = self.document.get(name, {})
        if not isinstance(value, dict):
            self.complain((name,), value, "a table")
        return value if isinstance(value, dict) else {}

    def values(
        self, table: Mapping[str, Any], fields: Mapping[str, Any], path: Path, origin: str = ""
    ) -> dict[str, Any]:
        """The values of these fields in a table, by their names of today."""
        values = dict[str, Any]()
        self.warn_unknown(table, fields, path)
        for key, value in table.items():
            if (name := SYNONYMS.get(key, key)) in values:
                self.complain((*path, key), value, f"{name} or another word for it, once")
            elif name in fields:
                values[name] = self.checked(fields[name], value, (*path, key), origin)
        return values

    def checked(self, field: Any, value: Any, path: Path, origin: str = "") -> Any:
        try:
            return field.metadata["check"](value)
        except ValueError as expected:
            self.complain(path, value, str(expected), origin)
            return None

    def complain(self, path: Path, found: Any, expected: str, origin: str = "") -> None:
        if path[-1] in SECRET_FIELDS:
            found = "something else"
        elif isinstance(found, str):
            found = shown(PASSWORD.sub("//…@", found))
        elif path[-1] not in CONFIG_FIELDS and isinstance(found, (list, dict)):
            found = "a table" if isinstance(found, dict) else "another list"  # with keys in it
        what = "nothing" if found is None else str(found)[:80]
        self.errors.append(self.complaint_at(path, f"found {what}, expected {expected}", origin))

    def warn_unknown(self, table: Iterable[str], known: Collection[str], path: Path) -> None:
        for key in sorted(set(table) - set(known)):
            text = f"unknown key, ignored{did_you_mean(key, known)}"
            if (name := SYNONYMS.get(key)) in known:
                if key not in RENAMED_KEYS:
                    continue
                text = f"its name is {name} now; this one is read until 1.0"
            elif key in OLD_KEYS:
                text = f"ignored: {OLD_KEYS[key]}"
            elif key in CONFIG_FIELDS:
                text = "ignored here: it belongs into [config]"
            self.warnings.append(self.complaint_at((*path, key), text))

    def complaint_at(self, path: Path, text: str, origin: str = "") -> Complaint:
        """A complaint that says where its key stands, like `servers.toml:12: servers[2].url`."""
        key = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path)
        if self.bare is None:
            self.bare = OPAQUE.sub(blanked, self.toml)
        known = len(self.errors) + len(self.warnings) < COMPLAINTS_LIMIT  # each look takes a while
        line = 0 if origin or not known else line_of(self.bare, path)
        return Complaint(origin or self.source, line, key.removeprefix("."), text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    import difflib  # only for people who mistyped; loading it takes 5 ms of everybody's start

    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def blanked(opaque: re.Match[str]) -> str:
    """A comment or a text as blanks, line by line; a quoted key stays."""
    return opaque[0] if opaque[1] else re.sub(r"[^\n]", " ", opaque[0])


def line_of(toml: str, path: Path) -> int:
    """The line on which a key stands, 1-based, or 0.  tomllib does not tell, so this looks as a
    person would, in a text without comments and values: for the table's header or the n-th entry,
    and for the key after it."""
    start, end = 0, len(toml)
    if len(path) > 1 and isinstance(path[1], int):
        name = path[0]
        entry = re.compile(rf"^[ \t]*\[\[{name}(?:\.{name})?\]\]|\{{", re.MULTILINE)
        first = re.search(rf"\[\[{name}|\b{name}\s*=\s*\[", toml)
        entries = [m.start() for m in entry.finditer(toml, first.start() if first else 0)]
        if path[1] < len(entries):
            start, end = [*entries, end][path[1] : path[1] + 2]
    elif len(path) > 1:
        header = re.search(rf"^\s*\[{re.escape(str(path[0]))}\]", toml, re.MULTILINE)
        start = header.end() if header else 0
    key = re.compile(rf"""(?<![\w-])["']?{re.escape(str(path[-1]))}["']?\s*[=\]]""")
    found = key.search(toml, start, end)
    at = found.start() if found else start
    return toml.count("\n", 0, at) + 1 if at else int(found is not None)


def changes_line(old: Settings, new: Settings) -> str:
    """Which keys have changed, and which of them wait for the next start."""
    changed = [key for key in (*CONFIG_FIELDS, *TABLES[2:])
               if getattr(old, key) != getattr(new, key)]
    late = [key for key in changed if key in RESTART_KEYS]
    now = [key for key in changed if key not in late]
    words = [f"changed: {', '.join(now)}"] * bool(now)
    return "; ".join(words + [f"at the next start: {', '.join(late)}"] * bool(late))


# ━━━ part III: vLLM ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  10  content
# ============================================================================================
#
# JSON as far as a balancer must read it: where the members that matter stand.  Nothing of content
# is rewritten but the one value of `model`; compression is undone.

SCAN_STEPS = 2000  # of find_members before others get their turn: about a millisecond
SCAN_MEMBERS_LIMIT = 10_000  # that find_members looks at one by one; of real content a few dozen
NESTING_LIMIT = 900  # levels of JSON; Python's reader, which servers have, too, takes about 1,000
CODED_SLICE_BYTES = 64 * 1024  # of compressed content that are read before others get their turn,
DECODED_SLICE_BYTES = 256 * 1024  # and what may come of them: about a millisecond
CODINGS_LIMIT = 2  # one upon the other; nobody needs more than one
CODED_MEMBERS_LIMIT = 4096  # of a gzip file; those that are written in parallel have many
ZSTD_WINDOW_LOG = 23  # 8 MB, RFC 9659; a stream could ask for 128
SMALL_CONTENT_BYTES = 64 * 1024  # json.loads of this takes well under 1 ms; beyond, find_members
# Members in which servers tell each other of their caches.  A client that says them ends the engine
# of a server that believes it.
RESERVED_MEMBERS = ("kv_transfer_params", "ec_transfer_params")
# The same in an id of a request, where vLLM's P2P connectors look for it.
ENGINE_HANDLES = re.compile("___(?:prefill|decode)_addr_")
CALL_MEMBERS = ("model", "stream", "request_id", *RESERVED_MEMBERS)
SESSION_MEMBERS = ("session_id", "user", "user_id")  # the first that is there names a session;
LAST_SESSION_FIELDS = ("x-trace-id", "x-request-id")  # then these, as in vllm-project/router
# What a server generates from, and what it puts before that.
PROMPT_MEMBERS = ("messages", "prompt", "input")
LEADING_MEMBERS = ("tools", "system", "instructions")
SESSION_PARAMS = "session_params"  # before them the session_id in this
RESPONSE_MEMBERS = ("previous_response_id", "request_id")  # of /v1/responses, where both are ids
# Whether another server would say the same again, and what its text can be continued without, each
# with the values that mean nothing.
REPEAT_MEMBERS = ("temperature", "seed", "top_k")
STORED_MEMBERS = ("previous_response_id", "background", "store", "conversation")
PLAIN_MEMBERS: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stop": ("", []), "min_tokens": (0,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "logprobs": (False,),
    "top_logprobs": (0,), "prompt_logprobs": (), "echo": (False,), "suffix": ("",),
    "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "tool_choice": ("auto", "none"),
    "return_token_ids": (False,), "continue_final_message": (False,), "prompt_embeds": (),
    "add_generation_prompt": (True,), "use_beam_search": (False,), "truncate_prompt_tokens": (),
}
ASKED_MEMBERS = frozenset((*REPEAT_MEMBERS, *STORED_MEMBERS, *PLAIN_MEMBERS))
READ_MEMBERS = tuple(dict.fromkeys((
    *CALL_MEMBERS, *SESSION_MEMBERS, SESSION_PARAMS, *RESPONSE_MEMBERS, *ASKED_MEMBERS)))
FOUND_MEMBERS = (*READ_MEMBERS, *LEADING_MEMBERS, *PROMPT_MEMBERS)
Content = bytes | bytearray
Spans = dict[str, tuple[int, int]]  # of the values of members, in the content


# Content codings, RFC 9110 §8.4.1, that are undone, because no vLLM undoes any: by name, what gives
# a decoder for content that begins so, with zlib's decompress(data, max_length), eof, unused_data.
# To add one: add a row.
CODINGS: dict[str, Callable[[bytes], Any]] = {
    "gzip": lambda _: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "x-gzip": lambda _: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "deflate": lambda begin: zlib.decompressobj(zlib.MAX_WBITS * (1 if is_zlib(begin) else -1)),
}
UNDECODABLE: tuple[type[Exception], ...] = (zlib.error,)
if zstd is not None:
    CODINGS["zstd"] = lambda _: zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})
    UNDECODABLE += (zstd.ZstdError,)
ACCEPTED_CODINGS = ", ".join(name for name in CODINGS if not name.startswith("x-"))


def is_zlib(begin: bytes) -> bool:
    """Whether it is the zlib format, as it should, RFC 1950 §2.2; some send deflate's bare one."""
    return begin[:1] != b"" and begin[0] & 15 == 8 and int.from_bytes(begin[:2], "big") % 31 == 0


def content_codings(fields: Fields) -> list[str]:
    """The codings of a request's content, in the order in which they are undone.  Raises
    BadMessage for any that is not understood."""
    if "content-encoding" not in fields.values:
        return []
    codings = [coding for coding in fields.members("content-encoding") if coding != "identity"]
    if len(codings) > CODINGS_LIMIT or not CODINGS.keys() >= set(codings):
        found = shown(fields.get("content-encoding"))
        text = f"Content-Encoding is {found}, expected one of {ACCEPTED_CODINGS}"
        raise BadMessage(text, Fault.UNSUPPORTED_CODING)
    return codings[::-1]


def decode_content(content: Content, coding: str, limit: int, found: bytearray) -> Iterator[None]:
    """Undoes a coding and puts what comes of it into `found`, a slice at a time; then it is
    others' turn.  Raises BadMessage for what is not so coded, is cut, or grows beyond the limit."""
    begin, data, at, members = CODINGS[coding], b"", 0, 1
    decoder = begin(bytes(content[:2]))
    while data or at < len(content) or not decoder.eof:
        if decoder.eof:  # files one behind the other are one, RFC 1952 §2.2
            decoder, members = begin(data[:2] or bytes(content[at : at + 2])), members + 1
        if not data and getattr(decoder, "needs_input", True):
            data = bytes(memoryview(content)[at : at + CODED_SLICE_BYTES])
            at += len(data)
        try:
            piece = decoder.decompress(data, DECODED_SLICE_BYTES)
        except UNDECODABLE as error:
            text = f"the content is not the {coding} that Content-Encoding says: {error}"
            raise BadMessage(text) from None
        data = decoder.unused_data if decoder.eof else getattr(decoder, "unconsumed_tail", b"")
        found += piece
        if len(found) > limit:
            text = f"the content has more than {limit} bytes when decoded, as max_body_bytes allows"
            raise BadMessage(text, Fault.CONTENT_TOO_LARGE)
        if members > CODED_MEMBERS_LIMIT:
            raise BadMessage(f"the content is more than {CODED_MEMBERS_LIMIT} files of {coding}")
        if not (piece or data or decoder.eof or at < len(content)):
            raise BadMessage(f"the content ends within its {coding}")
        yield


# Patterns for skipping JSON by the regular expression engine, some 20 times faster than by steps
# of Python.  STRING is a short one (a search for its closing quote skips a long one faster still);
# NESTED is anything up to a bracket that opens more than eight levels, or a long string.
# Possessive throughout: they never backtrack.
STRING = rb'"[^"\\]{0,200}+(?:\\.[^"\\]{0,200}+){0,20}+"'
NESTED = rb'[^"\[\]{}]++|' + STRING
LEVELS = 8
for _ in range(LEVELS):
    NESTED = rb'[^"\[\]{}]++|' + STRING + rb"|[\[{](?:" + NESTED + rb")*+[\]}]"
VALUE = rb'(?:[^"\[\]{},:]++|' + STRING + rb"|[\[{](?:" + NESTED + rb")*+[\]}])*+"
INSIDE = re.compile(b"(?:" + NESTED + b")*+", re.DOTALL)  # inside a value, all but deep nesting
MARK = re.compile(rb'["{}\[\]:,]')  # what matters between the members
REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # of a string, up to its closing quote
BACKSLASH = 0x5C
BRACKETS = tuple(bytes((sign,)) for sign in b"[{]}")
DEEPER = [(sign in b"[{") - (sign in b"]}") for sign in range(256)]


Scan = Generator[bool, Content, None]


def find_members(spans: Spans, wanted: Iterable[str]) -> Scan:
    """Finds the values of top-level members of a JSON object without parsing what lies between,
    and puts them into `spans`; of a repeated member the last, as in Python's json.

    It is sent the content whenever that has grown, and looks only at what is new.  It says True
    when it has seen all there is, and False when it is others' turn, after about a millisecond:
    send the content again.  It stops looking where the content can be no JSON object, of which it
    says nothing.  Raises BadMessage for more than NESTING_LIMIT levels, and SCAN_MEMBERS_LIMIT.
    """
    names = {name.encode(): name for name in wanted}
    longest = 6 * max(map(len, names)) + 2  # written with escapes
    others, at, depth, steps, members = other_members(tuple(names)), 0, 0, 0, 0
    # The member we are in or about to be in, where its value began, whether nothing is in it yet.
    key, value, empty = None, -1, True
    content = yield True
    while True:
        steps += 1
        if steps >= SCAN_STEPS:
            content, steps = (yield False), 0
        if depth > 1:
            begun, (at, depth) = at, past_nested(content, at, depth)
            if at > begun:
                steps += (at - begun) // 32
                continue
        elif depth == 1 and key is None:
            at = others.match(content, at).end()
        if depth < 0 or (mark := MARK.search(content, at)) is None:
            at = len(content)
            content = yield True
            continue
        sign, at = mark[0], mark.end()
        if not (depth > 1 or may_follow(sign, depth, key is not None, value >= 0, empty)):
            depth = -1
            spans.clear()
        elif sign == b'"':
            begun = at
            while not (string := string_end(content, at))[1]:
                at = string[0]
                content = yield True
            at = string[0] + 1
            if depth == 1 and value < 0:
                members += 1
                key = member_name(bytes(content[begun : min(at - 1, begun + longest)]))
            empty = empty and depth != 1 or value < 0
        elif sign in b"{[":
            empty = depth == 0
            depth += 1 if depth or sign == b"{" else 2  # a list has no members
        elif depth == 1 and sign in b",}":
            if key in names:
                spans[names[key]] = (value, at - 1)
            key, value, empty = None, -1, True
            depth -= 2 * (sign == b"}")  # the object has ended
        elif sign in b"]}":
            depth -= 1
        elif depth == 1:  # a colon
            value = at
        if depth > NESTING_LIMIT or members > SCAN_MEMBERS_LIMIT:
            what = "nested too deeply" if depth > NESTING_LIMIT else "of too many members"
            raise BadMessage(f"the content is {what} to be read")


def may_follow(sign: bytes, depth: int, named: bool, valued: bool, empty: bool) -> bool:
    """Whether such a mark can stand there in a JSON object: before it, or among its members,
    behind a name or not, where a value is wanted or not, of which there is nothing yet or some."""
    if depth == 0:
        return sign in b"{["
    if sign == b'"':
        return empty if valued else not named
    if sign in b"{[":
        return valued and empty
    if sign == b":":
        return named and not valued
    return sign != b"]" and (valued or (sign == b"}" and not named))


def past_nested(content: Content, at: int, depth: int) -> tuple[int, int]:
    """A place further on inside a value and how deep it is there.  Brackets that INSIDE does not
    pass are passed up to where they are least deep, before a string, depth 1 and too deep."""
    if depth < NESTING_LIMIT - LEVELS:  # which it does not count
        at = INSIDE.match(content, at).end()  # type: ignore[union-attr]
    if content[at : at + 1] not in BRACKETS:
        return at, depth
    quote = content.find(b'"', at, at + 256)
    piece = content[at : at + 256 if quote < 0 else quote]
    depths = list(itertools.accumulate(map(DEEPER.__getitem__, piece), initial=depth))
    if 1 in depths or NESTING_LIMIT in depths:
        end = next(n for n, deep in enumerate(depths) if not 1 < deep < NESTING_LIMIT)
        depths = depths[:end] or [depth]
    last = len(depths) - 1
    far = last - depths[::-1].index(min(depths)) or last
    return at + far, depths[far]


def string_end(content: Content, at: int) -> tuple[int, bool]:
    """Where the string's closing quote is, True; or how far it was looked for, False.  `at` is
    between two characters.  The quote has no backslash before it; a few that have are passed."""
    for _ in range(50):
        quote = content.find(b'"', at)
        if quote < 0 and not content.endswith(b"\\"):
            return len(content), False
        if quote == at or (quote > 0 and content[quote - 1] != BACKSLASH):
            return quote, True
        if quote < 0 or (quote > at + 1 and content[quote - 2] == BACKSLASH):
            break  # who escapes whom?
        at = quote + 1
    at = REST.match(content, at).end()  # type: ignore[union-attr]
    return at, content[at : at + 1] == b'"'  # else the content ends in it, or in an escape


def member_name(written: bytes) -> bytes:
    """What a name means: "mod\\u0065l" is model, too."""
    if b"\\" in written:
        with contextlib.suppress(ValueError):
            return str(json.loads(b'"%b"' % written)).encode("utf-8", "replace")
    return written


def member_spans(content: Content, wanted: Iterable[str]) -> Spans:
    """The same for content that is all there and not large."""
    spans = Spans()
    scan = find_members(spans, wanted)
    next(scan)
    while not scan.send(content):
        pass
    return spans


@functools.cache
def other_members(wanted: tuple[bytes, ...]) -> Any:
    """Matches whole members of other names, with the comma after each."""
    names = b"|".join(map(re.escape, wanted))
    return re.compile(
        rb'(?:\s*+"(?!(?:' + names + rb')")[^"\\]*+"\s*+:' + VALUE + b",)*+", re.DOTALL
    )


JSON = json.JSONDecoder()


def read_members(content: Content, spans: Spans | None) -> dict[str, Any]:
    """The members of a JSON object, {} if the content is none.  `spans` tells where those that
    matter stand, for large ones; a value too long for what it should be is left out."""
    try:
        if spans is None:
            if content.count(b"[") + content.count(b"{") > NESTING_LIMIT:
                member_spans(content, CALL_MEMBERS)  # which refuses what is too deep
            # UTF-8 is usual; json.loads would look for other encodings, at length.
            usual = content[:1] == b"{"
            document = json.loads(str(content, "utf-8", "surrogatepass") if usual else content)
            return document if isinstance(document, dict) else {}
        return {name: json.loads(content[a:b]) for name, (a, b) in spans.items()
                if name in READ_MEMBERS and b - a <= MEMBER_LIMIT_BYTES}
    except RecursionError:
        raise BadMessage("the content is nested too deeply to be read") from None
    except ValueError:
        return {}  # a server will say what is wrong with it


EMPTY_OBJECT = re.compile(rb"[ \t\r\n]*+\{[ \t\r\n]*+\}[ \t\r\n]*+")


def is_object(content: Content, spans: Spans | None, members: Mapping[str, Any]) -> bool:
    """Whether content whose members were read is a JSON object.  What we cannot read, a number of
    5,000 digits say, another may, and find a model there."""
    if spans is not None:
        return content[:100].lstrip()[:1] == b"{"
    return bool(members) or EMPTY_OBJECT.fullmatch(content) is not None


# ============================================================================================
#  11  forms
# ============================================================================================
#
# multipart/form-data as far as a balancer must read it: the model that one of its parts names;
# where readers differ, the form is not read.  And content with another model in place of its own.

FORM_PARTS_LIMIT = 100  # parts of a form among which its model is looked for
FORM_SLICE_BYTES = 2**20  # of a form before others get their turn: about a millisecond
FORM_HEAD_LIMIT_BYTES = 4096  # of one part's fields
# Of a part, what only some readers know: names of RFC 2231, encodings (of those that change nothing
# old clients speak), a line that goes on in the next.
EXTENDED_NAME = re.compile(rb"(?i);[ \t]*+name\*")
DISPOSITION = re.compile(
    rb'(?i)content-disposition:[ \t]*+form-data(?:[ \t]*+;[ \t]*+[^\s=;"]++[ \t]*+=[ \t]*+'
    rb'(?:"(?:[^"\\]|\\.)*+"|[^\s;"]++))*+[ \t]*+;?[ \t]*+')
OTHER_ENCODING = re.compile(
    rb"(?i)content-transfer-encoding:(?![ \t]*+(?:binary|[78]bit)[ \t]*+\Z)")
PART_FIELD = re.compile(rb"[!#-'*+.0-9A-Z^-z|~-]++:[^\r\n\0]*+")
OTHER_CHARSET = re.compile(
    r'(?i)charset[ \t]*+=(?![ \t]*+"?(?:utf-?8|us-ascii|iso-8859-1)"?[ \t]*+(?:[;\r]|$))')
BEHIND_BOUNDARY = re.compile(rb"(--)?[ \t]{0,999}+(?:\r\n|\Z)(?(1)\s{0,999}+\Z)")
PART_NAME = re.compile(rb'(?i);[ \t]*+name[ \t]*+=[ \t]*+(?:"([^"]*)"|([^\s;"]+))')
BOUNDARY = re.compile(
    r'(?i)multipart/form-data[ \t]*+(?:;(?![ \t]*+boundary=)[^;"]*+)*+;[ \t]*+boundary='
    r'(?:"([^"\\]++(?<! ))"|([^\s;"]++))'
    r'(?:[ \t]*+;[^"]*+)?')


def form_boundary(content_type: str) -> bytes:
    """What separates the parts of multipart/form-data content, b"" for other content.  Raises
    BadMessage where two readers might find two."""
    if content_type[:19].lower() != "multipart/form-data":
        return b""
    found = BOUNDARY.fullmatch(content_type)
    if found is None or content_type.lower().count("boundary") > 1:
        raise BadMessage(f"Content-Type is {shown(content_type)}, expected one boundary")
    if OTHER_CHARSET.search(content_type):
        raise BadMessage(f"Content-Type is {shown(content_type)}, expected UTF-8")
    return b"--" + (found[1] or found[2]).encode("latin-1")


def form_spans(content: Content, boundary: bytes) -> Spans:
    """Where the values of CALL_MEMBERS stand in a form.  Raises BadMessage."""
    spans = Spans()
    for _ in find_parts(spans, content, boundary):
        pass
    return spans


def find_parts(spans: Spans, content: Content, boundary: bytes) -> Iterator[None]:
    """The same of a form that may be large, RFC 7578 (audio uploads name their model so); each time
    it says something, it is others' turn.  Raises BadMessage for forms that others may read
    differently: with too many parts, too long fields, a name said twice, a doubtful delimiter."""
    if not content:
        return
    if not content.startswith(boundary):
        raise BadMessage("the form does not begin with its boundary")
    at, last = part_start(content, len(boundary))
    for _ in range(FORM_PARTS_LIMIT):
        if last:
            return
        following = yield from next_boundary(content, boundary, at - 2)  # after no fields, say
        head = content.find(b"\r\n\r\n", at - 2, min(following, at + FORM_HEAD_LIMIT_BYTES))
        if head < 0:
            raise BadMessage(f"a part of the form has no end of its fields within"
                             f" {FORM_HEAD_LIMIT_BYTES} bytes")
        name = part_name(bytes(content[at:head]))
        if name in spans:
            raise BadMessage(f"the form says {name} twice")
        if name in CALL_MEMBERS:
            spans[name] = (head + 4, following)
        at, last = part_start(content, following + 2 + len(boundary))
    raise BadMessage(f"the form has more than {FORM_PARTS_LIMIT} parts")


def next_boundary(content: Content, boundary: bytes, at: int) -> Generator[None, None, int]:
    """Where the line end before the next boundary stands."""
    while at < len(content):
        end = at + FORM_SLICE_BYTES + 1 + len(boundary)
        half, whole = (content.find(sign + boundary, at, end) for sign in (b"\r", b"\n"))
        if half >= 0 or (whole >= 0 and content[whole - 1 : whole] != b"\r"):
            raise BadMessage("a boundary of the form stands behind half a line end")
        if whole >= 0:
            return whole - 1
        at += FORM_SLICE_BYTES
        yield
    raise BadMessage("the form has no end")


def part_start(content: Content, at: int) -> tuple[int, bool]:
    """Where the part behind a boundary and its padding begins, and whether that was the last."""
    behind = BEHIND_BOUNDARY.match(content, at)
    if behind is None:
        raise BadMessage("something stands behind a boundary of the form")
    return behind.end(), behind[1] is not None


def part_name(fields: bytes) -> str:
    """Its name.  Raises BadMessage for a part that two readers may name, or decode, differently."""
    lines = [line for line in fields.split(b"\r\n") if line]
    said = [line for line in lines if line[:20].lower() == b"content-disposition:"]
    found = [named[1] or named[2] for line in said for named in PART_NAME.finditer(line)]
    name = found[0].decode("latin-1") if found and found[0] else ""
    ours, part = name in CALL_MEMBERS, "a part of the form"
    for bad, text in (
        (not all(map(PART_FIELD.fullmatch, lines)), f"{part} has a bad field line"),
        (any(map(OTHER_ENCODING.match, lines)), f"{part} is encoded"),
        (len(said) > 1 or len(found) > 1 or any(map(EXTENDED_NAME.search, said)),
         f"{part} has more than one name"),
        (not name or not DISPOSITION.fullmatch(said[0]), f"{part} has no clear name"),
        ("\\" in name or (not ours and urllib.parse.unquote(name) in CALL_MEMBERS),
         f"{part} has an encoded name"),
        (ours and b"filename" in said[0].lower(), f"the form's {name} is a file"),
        (ours and OTHER_CHARSET.search(fields.decode("latin-1")),
         f"the form's {name} is not in UTF-8"),
    ):
        if bad:
            raise BadMessage(text)
    return name


def with_model(content: Content, boundary: bytes, spans: Spans | None, model: str) -> Content:
    """The content with another `model`: that one value is replaced, or put in front where there
    is none; every other byte stays."""
    if spans is None:
        spans = member_spans(content, ("model",))
    value = model.encode() if boundary else json.dumps(model).encode()
    if "model" in spans:
        return splice(content, spans["model"], value)
    if boundary:
        field = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % value
        return boundary + field + content
    brace = content.find(b"{")
    if brace < 0 or content[:brace].strip():
        return content  # not an object
    comma = b"" if content[brace + 1 : brace + 100].lstrip()[:1] == b"}" else b","
    return splice(content, (brace + 1, brace + 1), b'"model":' + value + comma)


def splice(content: Content, span: tuple[int, int], value: bytes) -> Content:
    """With another value in that place; a bytearray is changed in place, since it may be large."""
    changed = content if isinstance(content, bytearray) else bytearray(content)
    changed[span[0] : span[1]] = value
    return changed


# ============================================================================================
#  12  prompts
# ============================================================================================
#
# What is known of a prompt without understanding it: about how long it is, and hashes of ever
# longer starts of it.  Servers keep what they have read (vLLM's prefix cache); a PrefixCache models
# that from what each was sent, and tells how much of a prompt need not be read again.  No text is
# kept.

# A chain has a link up to each of these, in bytes from the prompt's start: fine where prompts part,
# in documents of a page as vLLM's blocks of 16 tokens, coarse where they have long been the same;
# the end is where a prompt costs 0.2 ms to hash.
LINK_ENDS = (
    *range(256, 2**10 + 1, 64), *range(2**10 + 256, 2**14 + 1, 256),
    *range(2**14 + 1024, 2**16 + 1, 1024), *range(2**16 + 4096, 2**18 + 1, 4096),
)
OPENING_BYTES = 256  # of a prompt, by which policy `prefix` knows it
BYTES_PER_TOKEN = 4  # of English and of JSON; a ratio that is wrong everywhere misleads nobody
ESTIMATE_ROOM = 1.5  # a prompt may have so many times as many: code, or another script
MEDIA_MARK = b";base64,"
MEDIA_TOKENS = 1000  # of an image, about, whatever its bytes
MEDIA_LIMIT = 100  # pieces that are looked for
MEDIA_FROM_BYTES = 4096  # of content that may hold one
CACHE_TOKENS = 200_000  # that a server remembers, if it does not say: some 25 GB of an 8B model's
CACHE_LINKS = 16384  # remembered of a server, whatever it says: about 3 MB of ours
MEMBER_MARKS = {name: f'"{name}"'.encode() for name in PROMPT_MEMBERS}


class Prompt(NamedTuple):
    """What a request wants read before the answer.  `prefix_hashes` has hashes of ever longer
    starts of it: of the leading members (if there are `leading_tokens` of them), then up to each
    of `hash_ends`, as far as they reach; equal hashes, equal starts.  They are this process's own
    (PYTHONHASHSEED); `first_hash` is one of the beginning that anybody can make."""

    tokens: int = 0  # about; 0 is unknown
    prefix_hashes: tuple[int, ...] = ()
    hash_ends: Sequence[int] = LINK_ENDS
    per_token: float = BYTES_PER_TOKEN  # how many units of `hash_ends` one token has
    leading_tokens: int = 0
    first_hash: bytes = b""

    def tokens_in(self, links: int) -> int:
        """How many tokens of the prompt so many links cover."""
        if not links:
            return 0
        at, per_unit = links - (self.leading_tokens > 0), self.tokens_per_unit()
        reach = self.leading_tokens + (int(self.hash_ends[at - 1] * per_unit) if at else 0)
        return min(self.tokens, reach)

    def tokens_per_unit(self) -> float:
        """Tokens in one unit of `hash_ends`: as usual, or more, where the prompt has more of them
        than would fit into its length (pictures)."""
        links, usual = len(self.prefix_hashes) - (self.leading_tokens > 0), 1 / self.per_token
        if links >= len(self.hash_ends):  # how long it is cannot be seen
            return usual
        return max(usual, (self.tokens - self.leading_tokens) / self.hash_ends[links])

    def totals(self) -> list[int]:
        """The same for 1 link, 2 links, and so on to all."""
        tokens, lead, per_unit = self.tokens, self.leading_tokens, self.tokens_per_unit()
        leading = [min(tokens, lead)] if lead else []
        ends = self.hash_ends[: len(self.prefix_hashes) - len(leading)]
        return leading + [min(tokens, lead + int(end * per_unit)) for end in ends]


NO_PROMPT = Prompt()


def read_prompt(
    content: Content, spans: Spans | None, members: Mapping[str, Any], model: str | None
) -> Prompt:
    """The prompt in JSON content.  What leads are the members that servers put first, wherever
    they stand in the content; then come the messages, to the content's end.  Prompts for other
    models (or LoRA adapters, which are called so) have nothing in common."""
    start = prompt_start(content, spans, members)
    if not start:
        return NO_PROMPT
    leading, behind = list[str](), 0
    for name in LEADING_MEMBERS:
        if name in (members if spans is None else spans):
            said, at = leading_member(content, spans, members, name)
            leading.append(said)
            behind += len(said) if at > start else 0
    size, lead = max(0, len(content) - start - behind), sum(map(len, leading)) // BYTES_PER_TOKEN
    raw = bytes(memoryview(content)[start : start + LINK_ENDS[-1]])
    chain, link, begin = list[int](), hash((model, *leading)), 0
    if lead:
        chain.append(link)
    for end in LINK_ENDS:
        if end > size:
            break
        link = hash((link, raw[begin:end]))
        chain.append(link)
        begin = end
    opening = hashlib.blake2b(raw[:OPENING_BYTES], digest_size=16).digest()
    tokens = lead + prompt_tokens(raw, size)
    return Prompt(tokens, tuple(chain), LINK_ENDS, BYTES_PER_TOKEN, lead, opening)


def prompt_start(content: Content, spans: Spans | None, members: Mapping[str, Any]) -> int:
    """Where the messages begin, or 0."""
    for name, mark in MEMBER_MARKS.items():
        if spans is not None and name in spans:
            return spans[name][0]
        if spans is None and name in members:
            at = content.find(mark)  # within a text, its quotes are escaped
            if content.find(mark, at + 1) < 0:
                return content.find(b":", at) + 1
            return member_spans(content, (name,)).get(name, (0, 0))[0]
    return 0


def leading_member(
    content: Content, spans: Spans | None, members: Mapping[str, Any], name: str
) -> tuple[str, int]:
    """What a member says, the same however it is written, and where in the content."""
    try:
        if spans is None:
            return json.dumps(members[name]), content.rfind(b'"%b"' % name.encode())
        begin, end = spans[name]
        if end - begin <= LINK_ENDS[-1]:
            return json.dumps(json.loads(content[begin:end])), begin
    except (ValueError, RecursionError):
        begin, end = (0, 0) if spans is None else spans[name]
    return bytes(memoryview(content)[begin:end]).decode("latin-1"), begin  # as it is


def prompt_tokens(raw: bytes, size: int) -> int:
    """About how many tokens a prompt of `size` bytes has that begins with `raw`.  An image that
    begins in there counts as MEDIA_TOKENS; one further on is not looked for."""
    media, skipped = 0, 0
    at = raw.find(MEDIA_MARK) if len(raw) > MEDIA_FROM_BYTES else -1
    while at >= 0 and media < MEDIA_LIMIT:
        end = raw.find(b'"', at)
        skipped += (end if end >= 0 else size) - at
        media += 1
        at = raw.find(MEDIA_MARK, end) if end >= 0 else -1
    return max(0, size - skipped) // BYTES_PER_TOKEN + media * MEDIA_TOKENS


class PrefixCache:
    """What a server has probably in its prefix cache: the links of what it was sent, as many as
    fit into its KV cache, the oldest forgotten first.

    A link's predecessors are always younger than it is, so what is cached of a chain is a start
    of it, and its length is found by bisection.
    """

    __slots__ = ("_links", "_tokens", "_unsure", "limit_tokens")

    def __init__(self) -> None:
        self._links: OrderedDict[int, int] = OrderedDict()  # tokens of each
        self._tokens = 0
        # Links that one unanswered request alone has brought, each with what that one brought.
        self._unsure = dict[int, tuple[int, ...]]()
        self.limit_tokens = CACHE_TOKENS

    def cached_links(self, chain: Sequence[int]) -> int:
        """How many of a chain's links are cached."""
        links = self._links
        if not chain or chain[0] not in links:
            return 0
        low, high = 1, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in links:
                low = middle
            else:
                high = middle - 1
        return low

    def sent(self, prompt: Prompt) -> tuple[int, ...]:
        """The server is sent this prompt.  Returns the links that are new to it, which are to be
        confirmed when the prompt is read, or withdrawn."""
        links, chain = self._links, prompt.prefix_hashes
        known = self.cached_links(chain)
        for link in chain if self._unsure else ():
            self._unsure.pop(link, None)
        if fresh := chain[known:]:
            totals = [0, *prompt.totals()]
            for n in range(len(chain) - 1, known - 1, -1):  # the first is the youngest
                links[chain[n]] = totals[n + 1] - totals[n]
                links.move_to_end(chain[n])
            self._tokens += totals[-1] - totals[known]
            self._unsure.update(dict.fromkeys(fresh, fresh))
        for link in reversed(chain[:known]):
            links.move_to_end(link)
        while links and (self._tokens > self.limit_tokens or len(links) > CACHE_LINKS):
            link, tokens = links.popitem(last=False)
            self._tokens -= tokens
            self._unsure.pop(link, None)
        return fresh

    def confirm(self, fresh: tuple[int, ...]) -> list[int]:
        """These links, as `sent` returned them, were read.  Returns those that no other request
        had brought meanwhile."""
        own = [link for link in fresh if self._unsure.get(link) is fresh]
        for link in own:
            del self._unsure[link]
        return own

    def withdraw(self, fresh: tuple[int, ...]) -> None:
        """These links were perhaps not read: forgets those that no other request has brought."""
        for link in self.confirm(fresh):
            self._tokens -= self._links.pop(link, 0)

    def forget(self) -> None:
        self._links.clear()
        self._unsure.clear()
        self._tokens = 0


# ============================================================================================
#  13  calls
# ============================================================================================
#
# What clients want, as far as a balancer must understand it: which paths are inference, which model
# a request wants, for which session.

# Paths that are passed on to servers: everything under these prefixes, and these.
INFERENCE_PREFIXES = ("/v1/", "/v2/", "/inference/", "/cohere/")
INFERENCE_PATHS = frozenset("/tokenize /detokenize /score /rerank /pooling /classify /invocations"
                            " /generative_scoring".split())
TWICE = re.compile("(?:/v1(?=/v1/))*+")
# But for these, which change a server and not its answers.
CONTROL_PATHS = frozenset(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"))
# What one reader of a path takes literally, and another for a path of another name: empty and dot
# segments, slashes in disguise, parameters, controls, the same escaped twice or in more bytes than
# UTF-8 takes, and no escapes.
AMBIGUITY = re.compile(
    r"//|[\\;]|%(?:25)*(?:2f|5c|3b|[01][0-9a-f]|7f|c[01]|e0%[89])|%(?![0-9a-f]{2})"
    r"|/(?:\.|%(?:25)*2e){1,2}(?=/|$)", re.IGNORECASE)


@remembered_text
def inference_path(path: str) -> str:
    """The path to ask a server for, or '' if it is not one that is passed on.  Clients whose
    base_url ends in /v1 and whose calls begin with it say /v1/v1/…: taken as /v1/…."""
    path = path[TWICE.match(path).end() :]  # type: ignore[union-attr]
    if not path.startswith(INFERENCE_PREFIXES) and path not in INFERENCE_PATHS:
        return ""
    meant = urllib.parse.unquote(path).rstrip("/")
    return "" if meant in CONTROL_PATHS or AMBIGUITY.search(path) else path


class Call(NamedTuple):
    """What a request wants of a server, as far as choosing one goes."""

    model: str | None  # None where the request names none
    stream: bool = False
    prompt: Prompt = NO_PROMPT
    session: str = ""  # "" where it belongs to none
    stored: str = ""  # the id of the stored response that it asks for, or goes on from
    makes_response: bool = False  # that may be stored,
    names_response: bool = False  # under an id of the client's own
    asks: Mapping[str, Any] | None = None  # of a stream: those of ASKED_MEMBERS that it has


NO_CALL = Call(None)
TRUE_WORDS = frozenset(("true", "1", "on", "t", "y", "yes"))  # pydantic's


def read_call(
    head: RequestHead, content: Content, spans: Spans | None, s: Settings
) -> tuple[Call, Content]:
    """What the request wants, and its content as it is to be sent.  Looks for `model` in JSON or
    form content, then in the query.  Only an alias, or the default model where none is named,
    changes the content."""
    members, boundary = dict[str, Any](), b""
    if (content_type := head.fields.values.get("content-type", ""))[:1] in ("m", "M"):
        boundary = form_boundary(content_type)
    if boundary:
        spans = form_spans(content, boundary) if spans is None else spans
        members = {name: bytes(content[a:b]).decode("utf-8", "replace")
                   for name, (a, b) in spans.items() if b - a <= MEMBER_LIMIT_BYTES}
    elif content:
        refuse_reserved(content, spans, members := read_members(content, spans))
    named = asked = members.get("model") or None
    if not content and head.query:  # beside content, servers do not look there
        query = urllib.parse.parse_qs(head.query)
        found = query.get("model", [None])
        if len(found) > 1:
            raise BadMessage("the query says model twice")
        asked, members["stream"] = found[0], query.get("stream", [None])[-1]
    if asked is None and content and (boundary or is_object(content, spans, members)):
        asked = s.default_model or None
    if not isinstance(asked, str):  # a number, say: a server will refuse it
        asked = None
    model = s.aliases.get(asked, asked) if asked is not None else None
    prompt = NO_PROMPT if boundary else read_prompt(content, spans, members, model)
    if content and model is not None and model != named and asked in (named, s.default_model):
        content = with_model(content, boundary, spans, model)
    stream = is_true(members.get("stream"))
    session, meant = session_of(head.fields, members, s), meant_path(head.path)
    asks = None
    if stream and content and not boundary:
        asks = {name: members[name] for name in members.keys() & ASKED_MEMBERS}
    if not meant.startswith(RESPONSES_PATH):
        return Call(model, stream, prompt, session, asks=asks), content
    makes, names = head.method == "POST" and meant == RESPONSES_PATH, "request_id" in members
    return Call(model, stream, prompt, session, stored_response(head.method, meant, members, spans),
                makes, names or "request_id" in (spans or ()), asks), content


RESPONSES_PATH = "/v1/responses"
STORED_PATH = re.compile(RESPONSES_PATH + r"/+([^/]+)(/.*)?")


@remembered_text
def meant_path(path: str) -> str:
    """The path as servers read it, or '' if it is not one that is passed on."""
    return urllib.parse.unquote(inference_path(path)).rstrip("/")


def stored_response(method: str, path: str, members: Mapping[str, Any], spans: Spans | None) -> str:
    """The id of the stored response that a request asks for (…/ID) or goes on from, or ''."""
    found = STORED_PATH.fullmatch(path)
    if found is not None and (method != "POST" or found[2]):
        return found[1]
    said = members.get("previous_response_id", "")
    if not said and spans is not None and "previous_response_id" in spans:
        begin, end = spans["previous_response_id"]
        if end - begin > MEMBER_LIMIT_BYTES:
            raise BadMessage("previous_response_id is too long for an id")
    return said if isinstance(said, str) else ""


def is_true(said: Any) -> bool:
    """As servers read it, in JSON, forms and queries."""
    return said == 1 or (isinstance(said, str) and said.lower() in TRUE_WORDS)


def wants_explanation(head: RequestHead) -> bool:
    """Whether the request is not to be sent to a server: only where it would go is asked."""
    return head.method == "POST" and head.path == "/explain"


@remembered
def asks_why(fields: Fields) -> bool:
    """Whether the client asks why its server was chosen."""
    return fields.get("x-mvllm-why").lower() in ("1", "true", "yes")


@dataclasses.dataclass(slots=True)
class HeldContent:
    """A request's content as long as it may have to be said again."""

    content: Content


class OutboundRequest(NamedTuple):
    """A request as it is said to a server.  Several can be made of one client's, with other
    content (see `splice`), fields or path."""

    head: RequestHead  # the client's: its method, query and protocol
    path: str  # behind a server's prefix
    fields: str  # lines for any server
    key_lines: str  # the client's key, for servers that have none of their own
    body: HeldContent
    framed: bool  # the length of its content is said, also of none
    infers: bool  # it wants something of an engine
    searches: bool  # for the server that has what is asked for
    asked_at: float  # when it was understood, on the loop's clock
    model_label: str
    key: str = ""  # the name of the one by which it came in

    def encode_head(self, prefix: str, authority: str, key_line: str, rank: int | None) -> bytes:
        """The head for one server, or for its engine of that rank."""
        size = len(self.body.content) if self.body.content or self.framed else None
        fields = self.fields + key_line
        if rank is not None:
            fields = RANK_LINE.sub("", fields) + f"X-Data-Parallel-Rank: {rank}\r\n"
        return forward_request(self.head, prefix + self.path, authority, fields, size)


RANK_LINE = re.compile(r"(?im)^x-data-parallel-rank:.*\r\n")  # a proxy's word, where it is ours


def session_of(fields: Fields, members: Mapping[str, Any], s: Settings) -> str:
    """What names the session that a request belongs to, or ''."""
    first, last = session_fields(fields, s.session_headers)
    if first:
        return first
    params = members.get(SESSION_PARAMS)
    said = params.get("session_id") if isinstance(params, dict) else ""
    if said and isinstance(said, str):
        return f"{SESSION_PARAMS}.session_id: {said}"
    for name in SESSION_MEMBERS:
        if (said := members.get(name)) and isinstance(said, str):
            return f"{name}: {said}"
    return last


@remembered
def session_fields(fields: Fields, names: Sequence[str]) -> tuple[str, str]:
    """The fields that name a session: one of these, and one that would do if nothing else does."""
    found = ["", ""]
    for n, group in enumerate((names, LAST_SESSION_FIELDS)):
        for name in group:
            if said := fields.values.get(name.lower()):
                found[n] = f"{name}: {said}"
                break
    return found[0], found[1]


def refuse_reserved(content: Content, spans: Spans | None, members: Mapping[str, Any]) -> None:
    """Raises BadMessage for what a client must not say, and for JSON in an encoding in which it
    could be said unseen (RFC 8259 §8.1: it is UTF-8)."""
    for name in RESERVED_MEMBERS:
        if members.get(name) is not None or (spans is not None and name in spans):
            raise BadMessage(f"{name} is not for clients to say")
    said = members.get("request_id", "" if spans is None or "request_id" not in spans else None)
    if said is None or (isinstance(said, str) and ENGINE_HANDLES.search(said)):
        raise BadMessage("request_id is too long, or names engines, which is not for clients")
    if b"\0" in content[:4] or content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        if content.lstrip(b"\0\xff\xfe \t\r\n")[:1] == b"{":
            raise BadMessage("the content is JSON in another encoding than UTF-8")


# ============================================================================================
#  14  dialect
# ============================================================================================
#
# What vLLM says in answers, as far as a balancer must understand it: when a stream has begun,
# whether an end is a good one, what a failure admits to; and how errors of our own are said in its
# words.

CLOSING_DEPTH = 64  # of brackets, where the end of an answer is read backwards


class Begun(Enum):
    """What the beginning of an event stream says."""

    NOT_YET = "not yet"
    CONTENT = "content"
    FAILED = "failed"


# vLLM sends the head of a stream as soon as the request is queued, and these events before the
# engine has done anything; an answer has begun with the first event that is none of them.
PREAMBLE_EVENTS = frozenset((b"response.created", b"response.in_progress", b"response.queued"))
BLANK_LINE = re.compile(rb"\r?\n\r?\n")
COMMENT = re.compile(rb"(?::[^\n]*+\n)++\r?\n")  # one that stands alone, in place of an event


class StreamStart:
    """The beginning of an event stream, which comes in pieces; each byte is looked at once."""

    __slots__ = ("held", "comments", "_event", "_seen")

    def __init__(self) -> None:
        self.held = bytearray()
        self.comments: list[slice] = []  # in it, those that stand alone
        self._event = self._seen = 0  # where an event begins, and up to where it has no end

    def feed(self, piece: bytes) -> Begun:
        """Judges what is there so far."""
        held = self.held
        held += piece
        while end := BLANK_LINE.search(held, self._seen):
            event = slice(self._event, end.end())
            begun = begun_by(bytes(held[event]))
            if COMMENT.fullmatch(held, event.start, event.stop):
                self.comments.append(event)
            self._event = self._seen = end.end()
            if begun is not Begun.NOT_YET:
                return begun
        self._seen = max(self._event, len(held) - 3)  # \r\n\r, say
        return Begun.NOT_YET

    def take_comments(self) -> bytes:
        """The comments so far, which are held no more."""
        taken, rest, at = bytearray(), bytearray(), 0
        for one in self.comments:
            taken += self.held[one]
            rest += self.held[at : one.start]
            at = one.stop
        self.held = rest + self.held[at:]
        self._event, self._seen = self._event - len(taken), self._seen - len(taken)
        self.comments.clear()
        return bytes(taken)


class Notation(Enum):
    """How an answer is written that tells of its own request's end.  What is said of that is
    believed at its place only: servers repeat much of what a client says, above all /v1/responses
    its tools and metadata, which may look like anything."""

    OPAQUE = "opaque"  # nothing is read from it
    EVENTS = "events"
    CHOICES = "choices"  # a document with a list of these, or with none
    RESPONSE = "response"  # one of /v1/responses


def notation_of(method: str, path: str, head: ResponseHead) -> Notation:
    """That of an answer; what is stored of earlier ones (/v1/responses/ID) tells of their ends."""
    meant = meant_path(path)
    if method != "POST" or meant.startswith(f"{RESPONSES_PATH}/") or head.is_encoded:
        return Notation.OPAQUE
    if head.is_event_stream:
        return Notation.EVENTS
    document = Notation.RESPONSE if meant == RESPONSES_PATH else Notation.CHOICES
    return document if head.is_json else Notation.OPAQUE


def parse_event(event: bytes) -> tuple[bytes, bytes]:
    """An event's name and data."""
    name, data = b"", list[bytes]()
    for line in event.splitlines():
        field, _, value = line.partition(b":")
        if field == b"event":
            name = value.strip()
        elif field == b"data":
            data.append(value.strip())
    return name, b"\n".join(data)


def begun_by(event: bytes) -> Begun:
    """Judges an event of a stream's start.  A stream that begins with an error, or with the [DONE]
    that a stopping vLLM sends to queued requests, failed before it began; unless the error is the
    client's, which every server would repeat."""
    name, data = parse_event(event)
    if data == b"[DONE]":
        return Begun.FAILED
    if may_admit(event) and fault_admitted(name, document_at_end(data)) is Fault.STREAM_FAILED:
        return Begun.FAILED
    return Begun.CONTENT if data and name not in PREAMBLE_EVENTS else Begun.NOT_YET


# Of JSON that is read backwards from its end, where a string cannot have begun unseen: a string,
# whose own quotes stand before an odd number of backslashes; a bracket; or the quote of a string
# that goes on beyond what is there.
BACKWARDS = re.compile(rb'[^]["{}]*+("[^"]*+(?:"\\(?:\\\\)*+(?!\\)[^"]*+)*+"|[]["{}])')
OPENINGS = {b"}": b'{"":', b"]": b"["}


def closing_part(end: bytes) -> bytes:
    """JSON again, of a document of which only the end is there: its members that are whole, at
    their depth; one that is cut has the name "".  A document that is whole stays as it is."""
    depth, at, cut, inside, goes_on = list[bytes](), 0, 0, list[bytes](), True
    turned = end[::-1]
    while goes_on:
        mark = BACKWARDS.match(turned, at)
        comma = turned.rfind(b",", at, mark.start(1) if mark else len(turned))
        if comma >= 0:
            cut, inside = comma, depth[:]
        sign = mark[1] if mark else b'"'
        goes_on, at = sign != b'"' and len(depth) < CLOSING_DEPTH, mark.end() if mark else at
        if sign in b"]}":
            depth.append(sign)
        elif sign in b"[{" and len(depth) < 2:
            return end[len(end) - at :]
        elif sign in b"[{":
            depth.pop()
    opening = b"".join(map(OPENINGS.__getitem__, inside)).removesuffix(b'"":')
    return opening + end[len(end) - cut :]


def document_at_end(text: bytes) -> dict[str, Any]:
    """The JSON object that the text is, or the end of; {} if it is neither."""
    text = text.strip()
    # What follows a comma is an object's last members, if these and one bracket are all there is.
    whole = b"{" + text[1:] if text[:1] == b"," else text
    for ends in (False, True):
        try:
            part = closing_part(text) if ends else whole
            found = JSON.decode(str(part, "utf-8", "replace"))
            return found if isinstance(found, dict) else {}
        except (ValueError, RecursionError):
            pass
    return {}


# Words of a dying, stopping or draining vLLM, in answers that end as if all were well: without any
# of them there is nothing to be looked at more closely.
ADMISSIONS = (b'"abort"', b'"cancelled"', b"error", b"response.failed")
REQUEST_ERRORS = frozenset(
    "BadRequestError invalid_request_error NotFoundError not_found_error UnprocessableEntityError"
    " request_too_large invalid_prompt".split())


def may_admit(content: bytes) -> bool:
    for word in ADMISSIONS:
        if word in content:
            return True
    return False


def fault_admitted(name: bytes, said: Mapping[str, Any]) -> Fault | None:
    """The failure that a document admits to, or an event of that name; None also for an error that
    is the request's, which every server would repeat."""
    kind = name.decode("latin-1") or said.get("type")
    if isinstance(kind, str) and kind.startswith("response."):
        whole = member(said, "response", dict) or member(said, "", dict)
        if kind == "response.failed":
            return None if of_request(member(whole, "error", dict)) else Fault.STREAM_FAILED
        return response_fault(whole)
    error = said.get("error")
    if kind == "error" or isinstance(error, (dict, str)):
        said = error if isinstance(error, dict) else said
        return None if of_request(said) else Fault.STREAM_FAILED
    choices = [*member(said, "choices", list), *member(said, "", list)]
    reasons = [one.get("finish_reason") for one in choices if isinstance(one, dict)]
    reasons.append(said.get("stop_reason") or member(said, "delta", dict).get("stop_reason"))
    return Fault.ABORTED if "abort" in reasons else None


def response_fault(said: Mapping[str, Any]) -> Fault | None:
    """The same of a document of /v1/responses; those in the background their clients cancel."""
    cancelled = said.get("status") == "cancelled" and not said.get("background")
    return Fault.ABORTED if cancelled else None


def member(said: Mapping[str, Any], name: str, kind: type) -> Any:
    """A member's value if it is of that kind; else an empty one."""
    found = said.get(name)
    return found if isinstance(found, kind) else kind()


def of_request(error: Mapping[str, Any]) -> bool:
    """Whether an error names the request as its cause."""
    code = str(error.get("code"))
    return code.isdecimal() and 400 <= int(code[:9]) < 500 or not REQUEST_ERRORS.isdisjoint(
        value for value in (error.get("type"), code) if isinstance(value, str))


Said = tuple[bytes, dict[str, Any]]  # an event's name, and its data; a document has no name


def said_at_end(tail: bytes, notation: Notation, words: Sequence[bytes]) -> Iterator[Said]:
    """What an end says: a document, or from the last, events of a stream with any of the words."""
    if notation is not Notation.EVENTS:
        yield b"", document_at_end(tail)
        return
    for event in reversed(BLANK_LINE.split(tail)):
        if any(word in event for word in words):
            name, data = parse_event(event)
            yield name, document_at_end(data or event)


def bad_end(tail: bytes, notation: Notation) -> Fault | None:
    """The failure that the last events of a stream, or the end of a document, admit to."""
    if notation is Notation.OPAQUE or not may_admit(tail):
        return None
    for name, said in said_at_end(tail, notation, ADMISSIONS):
        of_response = notation is Notation.RESPONSE
        fault = response_fault(said) if of_response else fault_admitted(name, said)
        if fault is Fault.ABORTED or (fault is not None and notation is Notation.EVENTS):
            return fault
    return None


# What vLLM's errors begin with when there is no engine any more; further on, they may quote.
NO_ENGINE = re.compile(
    r"(?i)(?:\w*EngineDead(?:Error)?: ?)?(?:EngineCore (?:encountered an issue|has |died)"
    r"|cannot schedule new futures|Background loop (?:is|has) "
    r"|(?:the )?engine (?:loop |process )?(?:is|has|was) )")


def no_engine(said: Mapping[str, Any]) -> str:
    """The words of an error that say that the server's engine has gone, or ''."""
    error = said.get("error", said)
    text = error.get("message") if isinstance(error, dict) else error
    found = NO_ENGINE.match(text) if isinstance(text, str) else None
    return found[0] if found else ""


def says_failure(events: bytes) -> bool:
    """Whether a stream has an error event; one of a server that stops ends without any."""
    said = said_at_end(events, Notation.EVENTS, ADMISSIONS)
    return any(fault_admitted(*event) is Fault.STREAM_FAILED for event in said)


def engine_died(said: bytes, notation: Notation) -> bool:
    """Whether a failure, the last events of a stream or a document, says that the engine is dead;
    that one which drains takes no more is no death."""
    found = said_at_end(said[:HELD_FAILURE_LIMIT_BYTES], notation, ADMISSIONS)
    words = (no_engine(member(one, "response", dict) or one).lower() for _, one in found)
    return any(text and "new futures" not in text for text in words)


# How vLLM refuses prompts, or numbers of tokens to generate, that are too long for it.
TOO_LONG = re.compile(r"(?i)context[ _]length|max_model_len|maximum model length")


def bad_answer(status: int, content: bytes, notation: Notation) -> Fault | None:
    """The failure that a whole plain answer admits to, which another server may not have."""
    if status not in (400, 500):
        return bad_end(content, notation)
    said = document_at_end(content[:HELD_FAILURE_LIMIT_BYTES])
    if status == 500:
        return Fault.ENGINE_FAILED if no_engine(said) else None
    text = member(member(said, "error", dict) or said, "message", str)
    return Fault.CONTEXT_LENGTH_EXCEEDED if TOO_LONG.search(text) else None


# How vLLM says that it has enough to do (--max-num-queued-reqs, --max-num-queued-tokens).
OVERLOAD_TYPES = ("Service Unavailable", "ServiceUnavailableError")


def says_busy(head: ResponseHead, content: bytes) -> bool:
    """Whether a failure is back-pressure: 429, or a 503 that says when to come again or has
    vLLM's form for an overload.  Any other 503 is that of something broken."""
    if head.status != 503 or head.fields.get("retry-after"):
        return head.status in (429, 503)
    return is_overload(document_at_end(content))


def is_overload(said: Mapping[str, Any]) -> bool:
    """Whether a document, or an event, has vLLM's form for an overload."""
    error = member(said, "error", dict)
    return error.get("code") == 503 and error.get("type") in OVERLOAD_TYPES


def unknown_model(model: str, known: Collection[str]) -> str:
    """That no server has the model, in vLLM's words."""
    names = ", ".join(sorted(known)[:NAMES_LIMIT]) or "none"
    names += f" and {len(known) - NAMES_LIMIT} more" * (len(known) > NAMES_LIMIT)
    return f"The model `{model[:200]}` does not exist. Valid names: {names}."


def error_body(fault: Fault, text: str, path: str = "", param: str | None = None) -> bytes:
    """An error of our own, as vLLM and OpenAI say it; Anthropic's clients look for `type`, too."""
    code = fault.label if fault in SAID_BY_NAME else fault.status
    error = {"message": text, "type": fault.type_name, "param": param, "code": code}
    beside = {"type": "error"} if path.startswith("/v1/messages") else {}
    return json.dumps({**beside, "error": error}).encode()


def error_event(body: bytes, path: str) -> bytes:
    """An error as the last event of a stream; Anthropic's clients go by its name."""
    name = b"event: error\n" if path.startswith("/v1/messages") else b""
    return name + b"data: " + body + b"\n\n"


# ============================================================================================
#  15  judge
# ============================================================================================
#
# An answer judged as it comes, piece by piece: whether it is one, or a failure that another server
# may not have; and what its end tells of tokens and ids.

HELD_LIMIT_BYTES = 64 * 1024  # of a stream that is held back before its first event
PLAUSIBLE_TOKENS = 1e9  # of one answer; a number beyond is nonsense
HELD_ANSWER_LIMIT_BYTES = 100_000  # of a JSON answer whose length is known
RESPONSE_ID_LIMIT = 200  # characters of a response's id, of which vLLM's has 21
RESPONSE_START_BYTES = 512  # of a response's document, where its id stands
TAIL_BYTES = 8192  # of an answer's end, which tells whether it was whole


class Terms(NamedTuple):
    """On what, besides an answer, it depends whether another server may do better."""

    notation: Notation
    retry_statuses: Sequence[int]
    infers: bool = True  # the request wants something of an engine
    searches: bool = False  # it looks for the server that has what it asks for
    our_key: bool = False  # the server was shown a key of ours
    opened: bool = False  # the client was shown comments, so that only a stream can follow
    has_larger: bool = False  # another server takes longer prompts than this one
    wants_second_opinion: bool = False  # a 500 may be for want of an engine, or the request's doing


WITHOUT_IT = frozenset((404, 405, 501))  # a server has not what is asked for, or no such path


def fault_of_status(status: int, terms: Terms) -> Fault | None:
    """The failure that a status alone tells, where another server may do better."""
    if status < 400:
        return None
    if status == 508:  # it is a balancer, and led the request back to us
        return Fault.LOOP_DETECTED
    if terms.searches and status in WITHOUT_IT or terms.infers and status in (404, 501):
        return Fault.NOT_THERE  # a model, or the whole path
    if terms.our_key and status in (401, 403):
        return Fault.KEY_REJECTED
    if status in terms.retry_statuses:
        return Fault.SERVER_ERROR if status >= 500 else Fault.DECLINED
    return Fault.SERVER_BUSY if status == 429 else None


class AnswerJudge:
    """Judges an answer, fed with its content piece by piece until it is certain what it is.

    An event stream is judged by its first event, or by its first byte where it is compressed.  A
    failure is held back whole, since it may be shown later, and so is a short JSON document, since
    it comes at once.  Anything else is an answer as soon as its head is there.
    """

    __slots__ = ("head", "terms", "fault", "_held", "_start", "_enough_bytes", "_whole")

    def __init__(self, head: ResponseHead, framing: Framing, terms: Terms) -> None:
        self.head, self.terms = head, terms
        # None: as far as seen, it is an answer.
        self.fault = None if head.status < 400 else fault_of_status(head.status, terms)
        self._held = bytearray()
        self._start: StreamStart | None = None  # of an event stream that can be read
        self._enough_bytes = 0  # of content, at which the verdict stands
        self._whole = False  # it is held back to its end
        if self.fault is None and head.is_event_stream and framing != NO_CONTENT:
            self._enough_bytes = 1 if head.is_encoded else HELD_LIMIT_BYTES + 1
            self._start = None if head.is_encoded else StreamStart()
            return
        short = head.is_json and (framing.length or INFINITY) < HELD_ANSWER_LIMIT_BYTES
        self._whole = bool(
            self.fault or short or terms.opened or head.status in (500, 503)
            or (head.status == 400 and terms.has_larger))
        if self._whole:
            self._enough_bytes = HELD_FAILURE_LIMIT_BYTES + 1
        elif terms.notation is Notation.RESPONSE:
            self._enough_bytes = RESPONSE_START_BYTES

    @property
    def content(self) -> bytes:
        """What it was fed with, but for the comments that were taken."""
        return bytes(self._held if self._start is None else self._start.held)

    @property
    def has_comments(self) -> bool:
        """Whether the stream has said nothing yet but comments, which may be shown."""
        return self._start is not None and bool(self._start.comments) and self.head.status == 200

    def take_comments(self) -> bytes:
        return self._start.take_comments() if self._start else b""

    def feed(self, piece: bytes, done: bool) -> bool:
        """Take a piece of the content, maybe empty; the last if `done`.  Returns whether the
        verdict stands, which is `fault`, or None for an answer."""
        if self._start is not None:
            return self._feed_stream(self._start, piece, done)
        self._held += piece
        if not done and len(self._held) < self._enough_bytes:
            return False
        if self.head.is_event_stream and self._enough_bytes == 1 and not self._held:
            self.fault = Fault.STREAM_FAILED
        elif self._whole:
            self.fault = self._fault_of_document(bytes(self._held)) if done else None
        return True

    def _feed_stream(self, start: StreamStart, piece: bytes, done: bool) -> bool:
        begun = start.feed(piece)
        if begun is Begun.NOT_YET and not done:
            return len(start.held) >= self._enough_bytes
        if begun is not Begun.CONTENT:  # a vLLM that is paused says so when the stream has its head
            events = said_at_end(bytes(start.held), Notation.EVENTS, (b"error",))
            busy = any(is_overload(said) for _, said in events)
            self.fault = Fault.SERVER_BUSY if busy else Fault.STREAM_FAILED
        elif done:  # it came at once
            self.fault = bad_end(bytes(start.held[-TAIL_BYTES:]), self.terms.notation)
        return True

    def _fault_of_document(self, said: bytes) -> Fault | None:
        """Of an answer that is all there."""
        head, fault, terms = self.head, self.fault, self.terms
        if head.status >= 400 and fault is not Fault.DECLINED and says_busy(head, said):
            return Fault.SERVER_BUSY
        fault = fault or bad_answer(head.status, said, terms.notation)
        if fault is Fault.CONTEXT_LENGTH_EXCEEDED and not terms.has_larger:
            return None
        if fault is None and head.status == 500 and terms.wants_second_opinion:
            return Fault.SERVER_FAILED
        return fault


# Where `usage` says how many tokens there were: by its member, the kind, and the member of that.
USAGE_PLACES = {
    "prompt_tokens": ("prompt", ""), "input_tokens": ("prompt", ""),
    "completion_tokens": ("completion", ""), "output_tokens": ("completion", ""),
    "prompt_tokens_details": ("cached", "cached_tokens"),
    "input_tokens_details": ("cached", "cached_tokens"), "cache_read_input_tokens": ("cached", ""),
}


def usage_of(tail: bytes, notation: Notation) -> dict[str, int]:
    """What an answer's end says of its tokens: prompt, cached and completion; {} if nothing."""
    if notation is Notation.OPAQUE or b'"usage"' not in tail:
        return {}
    if notation is Notation.EVENTS:
        ends = said_at_end(tail, notation, (b'"usage"',))
    else:  # the last one that is said should be it, and what follows it is short
        near = tail[max(0, tail.rfind(b",", 0, tail.rfind(b'"usage"'))) :]
        ends = zip((b"", b""), map(document_at_end, (near, tail)))
    for name, said in ends:
        kind = name.decode("latin-1") or said.get("type")
        if isinstance(kind, str) and kind.startswith("response."):
            said = member(said, "response", dict) or member(said, "", dict)
        if usage := member(said, "usage", dict):
            return usage_tokens(usage)
    return {}


def usage_tokens(usage: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that could be those of tokens, by kind; of two for one kind the larger."""
    found = dict[str, int]()
    for name, tokens in usage.items():
        kind, within = USAGE_PLACES.get(name, ("", ""))
        if within:
            tokens = tokens.get(within) if isinstance(tokens, dict) else None
        if kind and type(tokens) is int and found.get(kind, 0) <= tokens < PLAUSIBLE_TOKENS:
            found[kind] = tokens
    return found


def completion_tokens(usage: Mapping[str, int], tail: bytes, size: int) -> int:
    """How many tokens an answer of so many bytes had: by its own word if it said so at its end;
    else about one for each event of a stream, or for each word of a plain answer."""
    if "completion" in usage:
        return usage["completion"]
    events = (b"\n" + tail).count(b"\ndata:")  # in text, line ends are escaped
    return size * events // len(tail) if events else size // BYTES_PER_TOKEN


RESPONSE_ID = rb'\s*+"id"\s*+:\s*+"([^"\\]{1,%d})"' % RESPONSE_ID_LIMIT
RESPONSE_START = other_members((b"id",)).pattern + RESPONSE_ID
DOCUMENT_ID = re.compile(rb"\s*+\{" + RESPONSE_START, re.DOTALL)
EVENT_ID = re.compile(  # of response.created, say
    rb"(?:(?!data:)[^\n]*+\n)*+data:\s*+\{" + other_members((b"response",)).pattern
    + rb'\s*+"response"\s*+:\s*+\{' + RESPONSE_START, re.DOTALL)


def response_id(start: bytes, streams: bool) -> str:
    """The id of the response that an answer of /v1/responses, of which this is the start, makes;
    '' where it is not seen.  Read at its place alone: the rest may be a client's words."""
    found = (EVENT_ID if streams else DOCUMENT_ID).match(start)
    return found[1].decode("utf-8", "replace") if found else ""


# ============================================================================================
#  16  transcripts
# ============================================================================================
#
# What a stream has shown, so that another server can go on with it when its own is lost.  While all
# goes well a Transcript keeps the bytes of whole events, and few of them: nearly all events of a
# stream differ in some characters only.  After a break they are read (`Shown`).

SHORT_PIECES = 64  # that are packed together
LESSONS_LIMIT = 12  # from which a transcript learns what its events have in common
LOOSE_BYTES = 32  # of what is kept of a piece, on average, beyond which it is compressed
READ_AT_ONCE = 200  # events that are read before others get their turn: about 2 ms
TORN_LIMIT_BYTES = 1024 * 1024  # of an event that has no end yet
BLOCK_BYTES = 120  # that stand around what is packed
NO_MATCH = b"\n"  # with which no event begins
# Of an event's usual end: what cannot be behind a failure, and so spares the search for one.
HARMLESS_END = re.compile(rb'"finish_reason":null|\.delta"|"\},"index":\d+\}')


class Memory:
    """What all transcripts take."""

    def __init__(self) -> None:
        self.bytes = 0


class Transcript:
    """The events that a stream has shown, in order and byte for byte.  It lets whole events pass
    only, so that there is no break within one, and none that admits a failure: `fault` says which.
    It counts in the `memory` of all, up to `limit` bytes; beyond, it is `lost`, and no matter."""

    __slots__ = ("fault", "lost", "_memory", "_limit", "_begin", "_end", "_short", "_blocks",
                 "_last", "_torn", "_lessons", "_counted")

    def __init__(self, memory: Memory, limit: int) -> None:
        self.fault: Fault | None = None  # that the last event admitted to; it was not shown
        self.lost = False
        self._memory, self._limit, self._counted = memory, limit, 0
        self._begin, self._end = NO_MATCH, b""  # what events have in common
        self._short: list[bytes] = []  # what was between, of the last pieces
        self._blocks: list[tuple[bytes, bytes, bytes, bool]] = []  # begin, end, packed, compressed
        self._last = self._torn = b""  # the last unusual piece; an event that has no end yet
        self._lessons = 0

    def take(self, piece: bytes) -> bytes:
        """What of a piece is to be shown.  Called for each piece of the stream."""
        begin, end = self._begin, self._end
        if piece.startswith(begin) and piece.endswith(end) and not self._torn:
            short = self._short
            short.append(piece[len(begin) : -len(end)])
            if len(short) >= SHORT_PIECES:
                self._pack()
            return piece
        return self._look(piece)

    def rest(self) -> bytes:
        """What was held back, at the stream's end."""
        rest, self._torn = self._torn, b""
        return rest

    @property
    def withheld(self) -> bytes:
        """A server's words for its failure, or the beginning of an event."""
        return self._torn

    def reopen(self) -> None:
        """Another server goes on."""
        self.fault, self._torn = None, b""

    @property
    def is_whole(self) -> bool:
        """Whether its last event is one behind which nothing comes."""
        last = BLANK_LINE.split(self._last.rstrip())[-1]
        name, data = parse_event(last)
        return not (self._short or self.lost) and (data == b"[DONE]" or name in LAST_EVENTS)

    def close(self) -> None:
        """It is not needed any more."""
        self._memory.bytes -= self._counted
        self._counted, self._begin = 0, NO_MATCH
        self._blocks.clear()
        self._short.clear()

    def pieces(self) -> Iterator[bytes]:
        """All that was shown."""
        self._pack()
        for begin, end, packed, compressed in self._blocks:
            text = zlib.decompress(packed) if compressed else packed
            for short in text.split(b"\0") if begin else (text,):
                yield begin + short + end

    def _look(self, piece: bytes) -> bytes:
        """The same for a piece that is unlike those before, or not whole."""
        piece, cut, self._torn = self._torn + piece, 0, b""
        if self.lost:
            return piece
        for found in BLANK_LINE.finditer(piece):
            if may_admit(event := piece[cut : found.end()]):
                name, data = parse_event(event)
                self.fault = fault_admitted(name, document_at_end(data))
            if self.fault is not None:
                break
            cut = found.end()
        self._torn = piece[cut:]  # or a server's words for its failure
        if len(self._torn) > TORN_LIMIT_BYTES:  # no event of a model's
            self._lose()
            return piece
        if cut:
            self._learn(piece[:cut])
        return piece[:cut]

    def _learn(self, piece: bytes) -> None:
        """Keep a piece, and look what it has in common with the last such one."""
        self._pack()
        usual = self._begin != NO_MATCH
        begin, end = (self._begin, self._end) if usual else (self._last, self._last)
        if begin and self._lessons < LESSONS_LIMIT:
            self._lessons += 1
            begin = piece[: piece.rfind(b'"', 0, common_start(begin, piece)) + 1]
            n = common_start(end[::-1], piece[len(begin) :][::-1])
            end = piece[len(piece) - n :]
            end = end[max(0, end.find(b'"')) :]
            if 2 * (len(begin) + len(end)) > len(piece) and HARMLESS_END.search(end):
                self._begin, self._end = begin, end
        self._last = piece
        self._keep(b"", b"", piece, 1)

    def _pack(self) -> None:
        """Keep what the last pieces have in common once."""
        if not self._short:
            return
        short, self._short = self._short, []
        packed = b"\0".join(short)
        if packed.count(b"\0") == len(short) - 1:
            self._keep(self._begin, self._end, packed, len(short))
        else:
            packed = (self._end + self._begin).join(short)
            self._keep(b"", b"", self._begin + packed + self._end, len(short))

    def _keep(self, begin: bytes, end: bytes, packed: bytes, pieces: int) -> None:
        compressed = len(packed) > max(512, LOOSE_BYTES * pieces)
        packed = zlib.compress(packed, 1) if compressed else packed
        self._blocks.append((begin, end, packed, compressed))
        grown = len(packed) + BLOCK_BYTES
        self._memory.bytes += grown
        self._counted += grown
        if self._memory.bytes > self._limit:
            self._lose()

    def _lose(self) -> None:
        self.close()
        self.lost = True


def common_start(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


# What an event says, as parts: (kind, key, what holds it, its name there).  The key begins with
# what it belongs to: a choice, an item of the output, a block; None is the whole answer.
GROWS, LISTED, ONCE = "grows", "listed", "once"  # text; entries; said once, and the same
COUNTED, OWN = "counted", "own"  # an event of its own; what each server has its own of
Part = tuple[str, tuple[Any, ...], dict[str, Any], str]
Shape = dict[str, Any]
LAST_EVENTS = (b"message_stop", b"response.completed", b"response.incomplete")
ANSWER_NAMES = ("id", "created", "created_at")  # an answer's own
ITEM_NAMES = ("id", "call_id")


def parts_of(said: Shape) -> Iterator[Part]:
    """All parts of an event that may have been shown before, or grow."""
    if isinstance(said.get("choices"), list):
        return choice_parts(said)
    return typed_parts(said) if isinstance(said.get("type"), str) else iter(())


def own_parts(holder: Shape, names: Iterable[str], *key: Any) -> Iterator[Part]:
    for name in names:
        if holder.get(name) is not None:
            yield OWN, (*key, name), holder, name


def choice_parts(said: Shape) -> Iterator[Part]:
    """Of chat and completions."""
    yield from own_parts(said, ANSWER_NAMES, None)
    if not said["choices"]:
        yield ONCE, (None, "usage"), {}, "usage"
    for choice in said["choices"]:
        n = choice.get("index", 0)
        for name, value in (*choice.items(), *member(choice, "delta", dict).items()):
            if value is None or name in ("index", "delta"):
                continue
            holder = choice if name in choice else choice["delta"]
            if name == "tool_calls":
                for call in value:
                    yield from tool_parts(call, n)
            elif name == "logprobs":
                for kind in [one for one in value if isinstance(value[one], list)]:
                    yield LISTED, (n, name, kind), value, kind
            else:
                yield part_kind(name, value), (n, name), holder, name


def part_kind(name: str, value: Any) -> str:
    if isinstance(value, str) and name not in ("role", "finish_reason", "stop_reason"):
        return GROWS
    return LISTED if isinstance(value, list) else ONCE


def tool_parts(call: Shape, n: int) -> Iterator[Part]:
    """Of one tool call's part in choice n."""
    function, key = member(call, "function", dict), (n, "tool", call.get("index", 0))
    yield from own_parts(call, ("id",), *key)
    for holder, name in ((call, "type"), (function, "name")):
        if holder.get(name) is not None:
            yield ONCE, (*key, name), holder, name
    if function.get("arguments") is not None:
        yield GROWS, (*key, "arguments"), function, "arguments"


def typed_parts(said: Shape) -> Iterator[Part]:
    """Of /v1/responses and /v1/messages."""
    kind, delta = said["type"], said.get("delta")
    at = said.get("output_index", said.get("index"))
    key = at, kind, said.get("content_index"), said.get("summary_index")
    for name in ("response", "message"):
        yield from own_parts(member(said, name, dict), ANSWER_NAMES, None)
    for name in ("item", "content_block"):
        yield from own_parts(member(said, name, dict), ITEM_NAMES, at)
    if isinstance(delta, str):
        yield GROWS, key, said, "delta"
        if said.get("logprobs"):
            yield LISTED, (*key, "logprobs"), said, "logprobs"
    elif kind == "content_block_delta" and isinstance(delta, dict):
        for name, value in delta.items():
            if name == "signature":
                yield COUNTED, (*key, name), delta, name
            elif name != "type":
                yield part_kind(name, value), (*key, name), delta, name
    else:
        yield COUNTED, key, said, ""


class Shown:
    """What was shown, read: the same as dictionaries by key."""

    def __init__(self) -> None:
        self.said: dict[tuple[Any, ...], Any] = {}  # texts, lists, values, counts
        self.grown: dict[tuple[Any, ...], list[str]] = {}  # texts, in pieces
        self.events = 0
        self.number = -1  # of the last event that has one, in /v1/responses

    def read(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Others' turn comes after some events each.  Raises ValueError for what is no event."""
        for piece in pieces:
            for event in BLANK_LINE.split(piece):
                _, data = parse_event(event)
                if data and data != b"[DONE]":
                    self.add(JSON.decode(str(data, "utf-8")))
                    if self.events % READ_AT_ONCE == 0:
                        yield
        for key, texts in self.grown.items():
            self.said[key] = units("".join(texts))

    def add(self, said: Shape) -> None:
        self.events += 1
        self.number = said.get("sequence_number", self.number)
        known = self.said
        for kind, key, holder, name in parts_of(said):
            if kind is GROWS:
                self.grown.setdefault(key, []).append(holder[name])
            elif kind is LISTED:
                known.setdefault(key, []).extend(holder[name])
            elif kind is COUNTED:
                known[key] = known.get(key, 0) + 1
            else:
                known.setdefault(key, holder.get(name))

    def text(self) -> str:
        """All of it, if it is nothing but one choice's text; '' if there is none of it yet.  Raises
        ValueError for anything else."""
        texts = {key: text for key, text in self.said.items() if key in self.grown and text}
        if texts.keys() - PLAIN_TEXTS or any("tool" in key for key in self.said):
            raise ValueError("more than text")
        return whole_characters("".join(texts.values()))


PLAIN_TEXTS = {(0, "content"), (0, "text")}
WIDE = re.compile("[\ud800-\udfff\U00010000-\U0010ffff]")


def units(text: str) -> str:
    """A text as UTF-16 has it: JSON may cut a character into halves, and events between them."""
    if text.isascii() or not WIDE.search(text):
        return text
    raw = text.encode("utf-16-le", "surrogatepass")
    return "".join(map(chr, struct.unpack(f"<{len(raw) // 2}H", raw)))


def whole_characters(text: str) -> str:
    """The same with whole characters, where both halves are there."""
    if text.isascii() or not WIDE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def compact(value: Any) -> bytes:
    """JSON as vLLM writes it; half a character as an escape."""
    try:
        return COMPACT.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


# ============================================================================================
#  17  resumption
# ============================================================================================
#
# How another server goes on with a stream: whether it can, by what was asked for and shown; and a
# Join, which compares what it says with what was shown, leaves that out, and keeps the stream's
# ids.  Never is a wrong, doubled or spliced answer shown as a good one: what differs ends it.


class Join:
    """Has what another server says go on where a stream was.  Used in place of its Transcript,
    which it goes on with.  Raises BadMessage where the two differ."""

    def __init__(
        self, shown: Shown, transcript: Transcript, told_tokens: int | None = None,
        on_news: Callable[[], object] = bool,
    ) -> None:
        self.shown, self.transcript, self.on_news = shown, transcript, on_news
        # Of a text that is continued: how many tokens of it are in the other server's prompt.
        self.told_tokens = told_tokens
        texts = {key: text for key, text in shown.said.items() if key in shown.grown}
        self.left = dict(texts) if told_tokens is None else {}  # what must still come, by key
        self.behind = {key for key, text in self.left.items() if text}
        self.counts: dict[tuple[Any, ...], int] = {}  # of what has come of the rest
        self.theirs: dict[tuple[Any, ...], Any] = {}  # ids, and so on
        self.names: dict[bytes, bytes] = {}  # the same as written, and the stream's own
        self.last_words = b""  # to be said at the end
        self.number = shown.number
        self.went_on = False  # something new was shown
        self._torn = b""

    @property
    def fault(self) -> Fault | None:
        return self.transcript.fault

    @property
    def is_whole(self) -> bool:
        return self.transcript.is_whole

    @property
    def withheld(self) -> bytes:
        return self.transcript.withheld

    def rest(self) -> bytes:
        """What is to be shown at the end."""
        self.check(None)
        return self._torn + self.last_words

    def take(self, piece: bytes) -> bytes:
        """What of a piece is new, as whole events."""
        piece, cut, out = self._torn + piece, 0, list[bytes]()
        for found in BLANK_LINE.finditer(piece):
            event = piece[cut : found.end()]
            cut = found.end()
            if new := self.new_of(event):
                out.append(self.transcript.take(new))
            if self.transcript.fault is not None:
                break
        self._torn = piece[cut:]
        return b"".join(out)

    def new_of(self, event: bytes) -> bytes:
        """An event without what was shown; b"" if nothing is left."""
        name, data = parse_event(event)
        if data == b"[DONE]":
            self.check(None)
        if not data or data == b"[DONE]" or may_admit(event) and fault_admitted(
                name, document_at_end(data)):
            return event
        try:
            return self.rest_of(event, name, JSON.decode(str(data, "utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            text = "an event of another server's is not to be understood"
            raise BadMessage(text, Fault.RESUME_DIFFERS) from None

    def rest_of(self, event: bytes, name: bytes, said: Shape) -> bytes:
        parts, trimmed = list(parts_of(said)), False
        new = set[Any]()  # what anything new belongs to
        for part in parts:
            fresh, cut = self.trim(part)
            trimmed = trimmed or cut
            if fresh:
                new.add(part[1][0] if "choices" in said else None)
        if not new:
            return b""
        for one in new:
            self.check(one)
        if not self.went_on:
            self.went_on = True
            self.on_news()
        if trimmed:
            drop_empty(said)
        return self.written(event, name, said, trimmed)

    def trim(self, part: Part) -> tuple[bool, bool]:
        """Take what was shown from a part.  Returns whether anything new is left of it, and whether
        anything was taken."""
        kind, key, holder, name = part
        known = self.shown.said.get(key)
        if kind is GROWS:
            return self.trim_text(key, holder, name)
        if kind is LISTED:
            at, entries = self.counts.get(key, 0), holder[name]
            old = 0 if self.told_tokens is not None else max(0, len(known or ()) - at)
            self.counts[key] = at + len(entries)
            holder[name] = entries[old:]
            return len(entries) > old, old > 0 and entries != []
        if kind is OWN:
            return self.trim_own(key, holder, name)
        if kind is COUNTED:
            self.counts[key] = self.counts.get(key, 0) + 1
            return self.counts[key] > (known or 0), False
        if key not in self.shown.said:
            return True, False
        if name in holder and holder[name] != known:
            raise differs(key)
        holder.pop(name, None)
        return False, True

    def trim_text(self, key: tuple[Any, ...], holder: Shape, name: str) -> tuple[bool, bool]:
        if self.told_tokens is not None and key[1] not in ("content", "text", "tool"):
            raise differs(key)
        left = self.left.get(key)
        if not left:
            return holder[name] != "", False
        text = units(holder[name])
        if not (left.startswith(text) or text.startswith(left)):
            raise differs(key)
        self.left[key] = left[len(text) :]
        if len(text) >= len(left):
            self.behind.discard(key)
        holder[name] = whole_characters(text[len(left) :])
        return len(text) > len(left), text != ""

    def check(self, of: Any) -> None:
        """Raises BadMessage if something new is said of what has not come to where it was."""
        for key in self.behind:
            if of is None or key[0] == of:
                raise differs(key)

    def trim_own(self, key: tuple[Any, ...], holder: Shape, name: str) -> tuple[bool, bool]:
        """Note what of theirs stands for what of the stream's.  A tool call's id is said once."""
        known, theirs, of_tool = self.shown.said.get(key), holder[name], "tool" in key
        if known is None:
            return of_tool, False
        if known != theirs != self.theirs.get(key):
            self.theirs[key] = theirs
            for space in ("", " "):
                place = "" if isinstance(known, str) else f'"{name}":{space}'
                found, put = (place.encode() + compact(one) for one in (theirs, known))
                self.names[found] = put
        if of_tool:
            del holder[name]
        return False, of_tool

    def written(self, event: bytes, name: bytes, said: Shape, trimmed: bool) -> bytes:
        """The event as it is shown."""
        if self.told_tokens and (usage := member(said, "usage", dict)):
            for what, tokens in (("prompt_tokens", -self.told_tokens),
                                 ("completion_tokens", self.told_tokens)):
                if isinstance(usage.get(what), int):
                    usage[what] += tokens
                    trimmed = True
        if trimmed:
            event = b"event: " + name + b"\n" if name else b""
            event += b"data: " + compact(said) + b"\n\n"
        for theirs, ours in self.names.items():
            event = event.replace(theirs, ours)
        if "sequence_number" in said:
            self.number += 1
            event = SEQUENCE_NUMBER.sub(b'"sequence_number":%d' % self.number, event)
        return event


SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?\d+')


def differs(key: tuple[Any, ...]) -> BadMessage:
    what = ".".join(str(one) for one in key if one is not None)
    return BadMessage(f"another server's answer differs in {what}", Fault.RESUME_DIFFERS)


def drop_empty(said: Shape) -> None:
    """Leave out the choices, and the parts of tool calls, of which nothing is left."""
    kept = list[Shape]()
    for choice in said.get("choices", ()):
        delta = member(choice, "delta", dict)
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [call for call in calls if says_anything(call)]
            if not delta["tool_calls"]:
                del delta["tool_calls"]
        if says_anything(choice):
            kept.append(choice)
    if "choices" in said:
        said["choices"] = kept


def says_anything(said: Any) -> bool:
    """Whether there is anything in it but places and what is empty."""
    if isinstance(said, dict):
        return any(name != "index" and says_anything(value) for name, value in said.items())
    return said is not None and said not in ("", [])


class Way(Enum):
    """How a stream goes on at another server."""

    REPEAT = "repeat"  # all is said again; what was shown is left out
    CONTINUE = "continue"  # the text so far is part of the prompt


class Prospect(NamedTuple):
    """Whether a stream could go on elsewhere, and how; else why not: a label, and in words."""

    way: Way | None
    reason: str = ""
    text: str = ""


RESUMED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
SEEDED_PATHS = RESUMED_PATHS[:3]  # /v1/messages knows no seed
BUDGETS = ("max_tokens", "max_completion_tokens")
COMPLETION_TOKENS = 16  # that vLLM generates for /v1/completions unless it is told otherwise
MEDIA_MEMBERS = ("url", "image_url", "video_url", "audio_url", "file_url", "file_id")


NO_STREAM = Prospect(None)


def first_prospect(call: Call, head: RequestHead, path: str, s: Settings) -> Prospect:
    """Whether a stream is kept from its beginning on, so that it could go on."""
    allowed = s.resumes.get(call.model or "", s.resume)
    if allowed == "off" or not s.max_retries:
        return Prospect(None, "off", "the settings say so")
    if head.fields.get("x-mvllm-resume").lower() in ("off", "no", "false", "0"):
        return Prospect(None, "client", "its client said so")
    if "x-data-parallel-rank" in head.fields.values:
        return Prospect(None, "rank", "its client chose the engine")
    asked = call.asks if head.method == "POST" else None
    return prospect_of(dict(asked), path, allowed) if asked is not None else Prospect(
        None, "path", f"{head.method} of this path is not gone on with")


def prospect_of(asked: Shape, path: str, allowed: str) -> Prospect:
    """By what a request asks for; what was shown may change that."""
    if path not in RESUMED_PATHS:
        return Prospect(None, "path", f"{path} is not gone on with")
    for name in STORED_MEMBERS:
        if asked.get(name):
            return Prospect(None, "stored", f"{name} is of one server")
    if is_repeatable(asked, path):
        return Prospect(Way.REPEAT)
    if allowed != Way.CONTINUE.value:
        return Prospect(None, "sampled", "it is sampled without a seed")
    if path not in RESUMED_PATHS[:2]:
        return Prospect(None, "path", f"{path} is not continued")
    for name, neutral in PLAIN_MEMBERS.items():
        value = asked.get(name)  # of which 0 is not false: it asks for logprobs
        if value is not None and (type(value) is bool, value) not in [
                (type(one) is bool, one) for one in neutral]:
            return Prospect(None, "not_plain", f"{name} keeps its text from being continued")
    return Prospect(Way.CONTINUE)


def is_repeatable(asked: Mapping[str, Any], path: str) -> bool:
    """Whether any server of the model says the same: vLLM samples at a temperature of 1e-6, and
    takes a seed of -1 for none."""
    heat, seed, top_k = map(asked.get, REPEAT_MEMBERS)
    seeded = path in SEEDED_PATHS and type(seed) is int and seed != -1
    greedy = type(heat) in (int, float) and heat == 0
    return seeded or greedy or (type(top_k) is int and top_k == 1)


def prospect_with(prospect: Prospect, document: Shape, shown: Shown) -> Prospect:
    """The same, now that it must be known exactly."""
    said = [document.get(name) for name in (*PROMPT_MEMBERS, *LEADING_MEMBERS)]
    if names_media(said):
        return Prospect(None, "media", "what its media's URLs mean may have changed")
    if prospect.way is not Way.CONTINUE:
        return prospect
    try:
        text = shown.text()
    except ValueError:
        return Prospect(None, "not_plain", "more than text was shown")
    prompt, messages = document.get("prompt"), document.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    speaks = isinstance(last, dict) and last.get("role") != "assistant"
    if not text:
        return Prospect(Way.REPEAT)  # any answer will do
    return prospect if speaks or isinstance(prompt, str) else Prospect(
        None, "not_plain", "its prompt is none that a text can follow")


def names_media(said: Any) -> bool:
    """Whether there are URLs in it that are no data."""
    if isinstance(said, list):
        return any(map(names_media, said))
    if not isinstance(said, dict):
        return False
    links = [value for name, value in said.items()
             if name in MEDIA_MEMBERS and isinstance(value, str)]
    return any(not link.startswith("data:") for link in links) or any(
        map(names_media, said.values()))


def with_text(document: Shape, text: str) -> Shape:
    """A request whose answer begins behind that text."""
    if "messages" not in document:
        return {**document, "prompt": document["prompt"] + text}
    so_far = {"role": "assistant", "content": text}
    return {**document, "messages": [*document["messages"], so_far],
            "add_generation_prompt": False, "continue_final_message": True}


TOKENIZED_MEMBERS = (
    "model", "prompt", "messages", "tools", "add_special_tokens", "add_generation_prompt",
    "continue_final_message", "chat_template", "chat_template_kwargs", "mm_processor_kwargs",
    "media_io_kwargs")


def within_budget(document: Shape, tokens: int) -> Shape | None:
    """A request that may generate so many tokens less; None if nothing is left."""
    given = {name: document[name] for name in BUDGETS if type(document.get(name)) is int}
    if "messages" not in document and "max_tokens" not in document:
        given["max_tokens"] = COMPLETION_TOKENS
    left = {name: value - tokens for name, value in given.items()}
    return None if any(value < 1 for value in left.values()) else {**document, **left}


def with_seed(content: Content, seed: int) -> bytes:
    """A JSON object with that seed, in place of null if it says so."""
    content = bytes(content)
    spans = member_spans(content, ("seed",)) if b'"seed"' in content else {}
    begin, end = spans.get("seed", (0, 0))
    if end:
        return b"%b%d%b" % (content[:begin], seed, content[end:])
    at = content.index(b"{") + 1
    return b'%b"seed":%d,%b' % (content[:at], seed, content[at:])


# ============================================================================================
#  18  engine load
# ============================================================================================
#
# What a server says of itself: its load, by its page of metrics, and its models, by their list.

PAGE_SLICE = 64 * 1024  # characters of a page read before others get their turn: a few ms
ENGINES_LIMIT = 256  # of one server that are told apart; data_parallel_size allows no more
MODELS_LIMIT = 2000  # of one server's models that are known by name,
MODELS_MARKS_LIMIT = 200_000  # and commas and brackets in their list: some 20 ms to parse
MODEL_ENTRY_LIMIT = 4096  # characters of what is said of a model; vLLM's own has 600,
MODEL_ENTRY_DEPTH = 8  # and is nested twice
# Metric names of vLLM; the first that a page has is taken.  To add a name: add it to its row.
VLLM_METRICS: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",), "waiting": ("vllm:num_requests_waiting",),
    "by_reason": ("vllm:num_requests_waiting_by_reason",),
    "swapped": ("vllm:num_requests_swapped",),  # v0 engines: they wait, too
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),  # from 0 to 1, in truth
    "max_fds": ("process_max_fds",), "prompt_tokens": ("vllm:prompt_tokens_total",),
    "generation_tokens": ("vllm:generation_tokens_total",),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    # Of these the labels are what is said.
    "cache_config": ("vllm:cache_config_info",), "sleep": ("vllm:engine_sleep_state",),
    "lora": ("vllm:lora_requests_info",),
}
VLLM_NAMES = tuple(itertools.chain.from_iterable(VLLM_METRICS.values()))
PLAUSIBLE_LIMIT = 1e15  # a number beyond is nonsense, as are those below zero


class EngineLoad(NamedTuple):
    """What a server says of itself; None is unknown, which is not 0."""

    running: int | None = None
    waiting: int | None = None
    kv_usage_ratio: float | None = None
    max_fds: int | None = None
    tokens: int | None = None  # read and generated since its start: what moves while it works
    generation_tokens: int | None = None  # of these, generated
    prefix_hits: int | None = None  # prompt tokens found in its prefix cache since its start
    kv_tokens: int | None = None  # that fit into its KV cache
    caches: bool = True  # it has a prefix cache
    asleep: bool = False
    adapters: frozenset[str] = frozenset()  # LoRA adapters in use
    lacking: int | None = None  # of those that wait, for want of room and not of an adapter, say

    @property
    def queued(self) -> int:
        """How many wait because it is full."""
        return (self.waiting or 0) if self.lacking is None else self.lacking


def read_loads(page: str) -> Generator[None, None, dict[str, EngineLoad]]:
    """The load in a /metrics page of any vLLM since 0.8: of each engine by its label, and of all
    together under ''.  Of a large page a slice is read at a time; then it is others' turn."""
    pages: dict[str, list[Sample]] = {"": []}
    begin, left = 0, SAMPLES_LIMIT
    while begin < len(page) and left > 0:
        end = page.find("\n", begin + PAGE_SLICE) + 1 or len(page)
        for sample in parse_samples(page[begin:end], VLLM_NAMES, left):
            left -= 1
            if 0 <= sample.value < PLAUSIBLE_LIMIT:
                pages[""].append(sample)
                engine = sample.labels.get("engine")
                if engine and (engine in pages or len(pages) <= ENGINES_LIMIT):
                    pages.setdefault(engine, []).append(sample)
        begin = end
        yield
    return {engine: joined_load(samples) for engine, samples in pages.items()}


def engine_loads(page: str) -> dict[str, EngineLoad]:
    """The same, read at once."""
    reading = read_loads(page)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def joined_load(samples: Iterable[Sample]) -> EngineLoad:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample)
    values, said = dict[str, float](), dict[str, list[Sample]]()
    for key, names in VLLM_METRICS.items():
        if (name := next(filter(found.__contains__, names), None)) is not None:
            join = max if key == "kv_usage" else sum  # of several engines (data parallel)
            said[key], values[key] = found[name], join(sample.value for sample in found[name])
    if "waiting" in values:
        values["waiting"] += values.get("swapped", 0)
    if "prompt_tokens" in values or "generation_tokens" in values:
        values["tokens"] = values.get("prompt_tokens", 0) + values.get("generation_tokens", 0)
    # The value of this one is a time; the newest child is the true one.
    lora = max(said.get("lora", ()), key=lambda sample: sample.value, default=None)
    running = lora.labels.get("running_lora_adapters", "") if lora else ""
    configs = [sample.labels for sample in said.get("cache_config", ())]
    lacking = [n.value for n in said.get("by_reason", ()) if n.labels.get("reason") == "capacity"]
    return EngineLoad(
        kv_usage_ratio=values.get("kv_usage"), lacking=int(sum(lacking)) if lacking else None,
        kv_tokens=sum(map(kv_size, configs)) or None,
        caches=all(c.get("enable_prefix_caching") != "False" for c in configs),
        asleep=any(one.value == 0 for one in said.get("sleep", ())
                   if one.labels.get("sleep_state") == "awake"),
        adapters=frozenset(filter(None, running.split(","))),
        **{key: int(value) for key, value in values.items() if key in EngineLoad._fields})


def kv_size(config: Mapping[str, str]) -> int:
    """Tokens that fit into the KV cache that cache_config_info describes; 0 is unknown."""
    size, blocks, block = (
        int(said[:15]) if (said := config.get(name, "")).isdecimal() else 0
        for name in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
    return size or blocks * block


# A balancer tells others, and nobody else, through which ones it knows a model.  So two that ask
# each other do not keep alive what neither of them has, however many stand between them.
KNOWN_THROUGH = "mvllm_via"


def known_through(entry: Mapping[str, Any]) -> list[str]:
    """The names of those balancers, the nearest first; [] for a server's own model."""
    said = entry.get(KNOWN_THROUGH, [])
    names = said[:HOPS_LIMIT] if isinstance(said, list) else []
    return [one[:100] for one in names if isinstance(one, str) and one.startswith(OUR_NAME)]


def told_to(via: str, entry: Mapping[str, Any], own_name: str) -> Mapping[str, Any] | None:
    """What whoever asks is told of a model; None if `via` names a balancer that we know it from."""
    through = known_through(entry)
    if any(one in via for one in through):
        return None
    if OUR_NAME in via:
        return {**entry, KNOWN_THROUGH: [own_name, *through]}
    return {k: v for k, v in entry.items() if k != KNOWN_THROUGH} if through else entry


def model_list(content: bytes, own_name: str = "") -> dict[str, dict[str, Any]] | None:
    """The models in an answer to /v1/models, by id with everything said of them; None if it is
    no such answer.  Those that a balancer knows through the one of `own_name` do not count, nor
    do ids that cannot be a label and a word in log lines."""
    if sum(map(content.count, (b"[", b"{", b","))) > MODELS_MARKS_LIMIT:
        return None
    try:
        entries = json.loads(content)["data"][:MODELS_LIMIT]
        found = {entry["id"]: entry for entry in entries if own_name not in known_through(entry)}
        return {name: model_entry(entry) for name, entry in found.items()
                if name.isprintable() and len(name) <= MODEL_NAME_LIMIT}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


MODEL_MEMBERS = ("id", "object", "created", "owned_by", "root", "parent", "max_model_len")


def model_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """What a server says of a model, as it can be shown to everybody; of one that says too much,
    or numbers that are none in JSON, what is simple of vLLM's own members."""
    if is_plain(entry, MODEL_ENTRY_DEPTH) and len(json.dumps(entry)) <= MODEL_ENTRY_LIMIT:
        return entry
    kept = {name: entry[name] for name in MODEL_MEMBERS if name in entry
            and is_plain(entry[name], 0) and len(str(entry[name])) <= MODEL_NAME_LIMIT}
    return kept | ({KNOWN_THROUGH: through} if (through := known_through(entry)) else {})


def is_plain(value: Any, depth: int) -> bool:
    """Whether a value is nested no deeper, and its numbers are such as occur."""
    if isinstance(value, (dict, list)):
        within = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(is_plain(one, depth - 1) for one in within)
    return not isinstance(value, (int, float)) or abs(value) < PLAUSIBLE_LIMIT  # so no NaN


# ━━━ part IV: fleet ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  19  health
# ============================================================================================
#
# Whether a server can be asked, judged by checks and by what became of requests.  Each judgement
# is a new frozen Health.


CHECKED_SINCE = "; its checks say: "


class State(Enum):
    """mvllm's three words.  Only a healthy server is asked."""

    CHECKING = "checking"  # nothing is known yet
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Health(NamedTuple):
    """The health of one server, from checks (active) and from what requests met (passive).

    By checks it goes out when one limit is met: checks failed in a row, share of passed checks in
    the window, mean time of the window's checks.  It comes back after enough passed checks in a
    row, and the window starts anew: an hour of downtime takes no hour of good checks.  Where it
    was the window that took it out, the window has to be good again, or it would come and go.

    By requests it goes out when enough of them failed in a row: its circuit opens.  While others
    go well there, those of the same content count as one: they may be the content's.  Good checks
    do not close it; but after some time it is half-open, one request at a time is a trial, and
    enough good ones in a row bring it back.
    """

    state: State
    reason: str
    since: float
    window: tuple[tuple[bool, float], ...] = ()  # the last checks: passed, seconds
    failures: int = 0  # failed checks in a row
    successes: int = 0  # passed checks in a row
    request_failures: tuple[tuple[float, bytes], ...] = ()  # in a row: when, and of what content
    open_until: float | None = None  # the circuit is open, then half-open; None: it is closed
    trials: int = 0  # good trials in a row
    frozen: bool = False  # its engine stands still: clients' requests are no trials then
    problem: str = ""  # of the last check that failed
    shaky: bool = False  # the window took it out, and it was not away since then
    checked_at: float | None = None
    checks: int = 0
    reached: bool = False  # it is out, but the last check had an answer, or an open connection

    @property
    def may_be_last_resort(self) -> bool:
        """Whether it can be asked where there is no other: only its circuit keeps it out, or
        checks that hang, are slow or answer an error."""
        if self.state is State.UNHEALTHY and not self.frozen:
            return self.reached or (self.open_until is not None and not self.failures)
        return self.state is State.HEALTHY

    def circuit(self, now: float) -> str:
        if self.open_until is None:
            return "closed"
        return "open" if now < self.open_until else "half-open"

    @property
    def success_matters(self) -> bool:
        """Whether a request that goes well may change anything."""
        return bool(self.request_failures) or self.open_until is not None

    @property
    def success_rate(self) -> float:
        return sum(passed for passed, _ in self.window) / max(1, len(self.window))

    @property
    def mean_time_s(self) -> float:
        return sum(seconds for _, seconds in self.window) / max(1, len(self.window))

    def become(self, state: State, reason: str, now: float) -> Health:
        if state is self.state:
            return self._replace(reason=reason)
        return self._replace(
            state=state, reason=reason, since=now, successes=0, request_failures=(),
            open_until=None, trials=0, frozen=False, shaky=False)

    def checked(self, passed: bool, seconds: float, why: str, now: float, s: Settings,
                reached: bool = False) -> Health:
        """After one more check; `why` names a problem, also with a check that passed.  One that
        failed may still have `reached` a server that could answer requests."""
        health = self.counted(passed, seconds, why, now, s)
        trouble = health.state is not State.HEALTHY and (passed or reached)
        return health if health.reached is trouble else health._replace(reached=trouble)

    def counted(self, passed: bool, seconds: float, why: str, now: float, s: Settings) -> Health:
        """The same, without a word on whom the check has reached."""
        in_time = seconds <= s.health_check_max_response_time
        health = self._replace(
            window=(*self.window, (passed, seconds))[-s.health_check_window_size :],
            failures=0 if passed else self.failures + 1,
            successes=self.successes + 1 if passed and in_time else 0,
            checked_at=now, checks=self.checks + 1, problem=self.problem if passed else why)
        away = health.failures >= s.health_check_consecutive_failures
        good = f"check {'passed, but ' if passed else 'failed: '}{why}" if why else "check passed"
        if self.state is State.HEALTHY:
            if limit := health.limit_met(s):
                return health.become(State.UNHEALTHY, limit, now)._replace(shaky=not away)
            return health.become(State.HEALTHY, good, now)
        if self.open_until is not None and passed and (self.frozen or not self.failures):
            return health
        health = health._replace(shaky=self.shaky and not away)
        if health.shaky and (limit := health.window_limit_met(s)):
            return health.still_out(limit, now)
        if health.successes >= s.health_check_consecutive_successes:
            return health._replace(window=health.window[-1:]).become(State.HEALTHY, good, now)
        if health.successes:
            return health
        return health.still_out(f"a check took {seconds:.1f} s" if passed else why, now)

    def still_out(self, why: str, now: float) -> Health:
        """Out for another reason; that of an open circuit still stands."""
        if self.open_until is not None:
            why = f"{self.reason.partition(CHECKED_SINCE)[0]}{CHECKED_SINCE}{why}"
        return self.become(State.UNHEALTHY, why, now)

    def refused(self, why: str, now: float) -> Health:
        """After a check in which our key was rejected: nothing else can come of any request."""
        health = self.taken_out(f"its key is rejected: {why}", now)
        return health._replace(checked_at=now, checks=self.checks + 1)

    def excused(self, now: float) -> Health:
        """After a check that hung while answers flowed: it says nothing of a healthy server."""
        why = "its checks hang, its answers flow"
        return self._replace(reason=why, checked_at=now, checks=self.checks + 1)

    def limit_met(self, s: Settings) -> str:
        """Which limit the checks have met, in words, or ''."""
        if self.failures >= s.health_check_consecutive_failures:
            return f"{self.failures} checks failed in a row: {self.problem}"
        return self.window_limit_met(s)

    def window_limit_met(self, s: Settings) -> str:
        """The same of the window alone."""
        count, rate, mean_s = len(self.window), self.success_rate, self.mean_time_s
        judged = count >= min(5, s.health_check_window_size)  # one check is no rate
        if judged and rate < s.health_check_min_success_rate:
            return f"{rate:.0%} of the last {count} checks passed, the last problem: {self.problem}"
        if mean_s > s.health_check_max_response_time:
            return f"the last {count} checks took {mean_s:.1f} s on average"
        return ""

    def failed(self, why: str, reached: bool, now: float, s: Settings,
               content: bytes = b"") -> Health:
        """After a request failed in a way the server is to blame for.  Where none could be
        `reached`, the next good check tells that there is one again.  `content` is given where it
        may be its failure: others of the same are forgotten for this one."""
        recent = (one for one in self.request_failures
                  if one[0] > now - s.breaker_window and (not content or one[1] != content))
        failures = (*recent, (now, content))[-s.failure_threshold :]
        if self.circuit(now) == "half-open":
            return self.opened(f"circuit open: a trial failed: {why}", now, s)
        if len(failures) < s.failure_threshold or self.state is not State.HEALTHY:
            return self._replace(request_failures=failures)
        why = f"{len(failures)} requests failed in a row: " * (len(failures) > 1) + why
        return self.opened(f"circuit open: {why}", now, s) if reached else self.taken_out(why, now)

    def confirmed(self, content: bytes, why: str, now: float, s: Settings) -> Health:
        """After another server has done what failed here: it was the server's failure."""
        others = tuple(one for one in self.request_failures if not content or one[1] != content)
        return self._replace(request_failures=others).failed(why, True, now, s)

    def would_open(self, content: bytes, now: float, s: Settings) -> bool:
        """Whether one more failure would open its circuit."""
        return self.failed("", True, now, s, content).open_until != self.open_until

    def probed(self, well: bool, now: float, s: Settings) -> Health:
        """After a request of our own, shortly before its circuit is half-open: clients' requests
        are on trial only where that went well, which is a good trial, too."""
        if self.open_until is None or self.trials:
            return self
        if not well:
            return self.opened("circuit open: no answer to a probe", now, s)
        return self.half_opened(now).succeeded(now, s)

    def died(self, why: str, now: float) -> Health:
        """After it died with a request."""
        return self.taken_out(f"it died with a request: {why}", now)

    def taken_out(self, why: str, now: float) -> Health:
        """Out until the next good check."""
        health = self.become(State.UNHEALTHY, why, now)
        return health._replace(failures=self.failures + 1, reached=False)

    def opened(self, why: str, now: float, s: Settings) -> Health:
        """With its circuit open from now on."""
        health = self.become(State.UNHEALTHY, why, now)
        return health._replace(open_until=now + s.breaker_open_time, trials=0)

    def half_opened(self, now: float) -> Health:
        """With its circuit's time up: somebody wants to see whether it is well."""
        return self if self.open_until is None else self._replace(open_until=now)

    def stood_still(self, why: str, now: float, s: Settings) -> Health:
        """With its engine frozen, though its health path may say that all is well."""
        return self.opened(why, now, s)._replace(frozen=True)

    def succeeded(self, now: float, s: Settings) -> Health:
        """After a request went well."""
        if self.circuit(now) != "half-open":
            return self._replace(request_failures=()) if self.request_failures else self
        if self.trials + 1 < s.breaker_success_threshold:
            return self._replace(trials=self.trials + 1)
        return self.become(State.HEALTHY, f"{self.trials + 1} trials went well", now)

    def rested(self, now: float, s: Settings) -> Health:
        """Without active checks nobody would ever call a server healthy again, so time does."""
        if self.state is State.CHECKING:
            return self.become(State.HEALTHY, "active checks are off", now)
        if self.state is State.UNHEALTHY and now - self.since >= s.auto_recovery_threshold:
            return self.become(State.HEALTHY, f"tried again after {now - self.since:.0f} s", now)
        return self


# ============================================================================================
#  20  pace
# ============================================================================================
#
# What a server has of ours, counted in place, and how fast it is, in two figures that are learned
# in place: the seconds of a step in which its engine makes one token of each answer, if it had no
# other work, and what a prompt's token takes beside that.  Answers tell both, and reports.  All
# samples are clamped: one silent interval, or one lucky prompt, changes little.

STEP_S = 0.015  # until something was seen: an 8B model on an A100
LEAST_STEP_S = 1e-4
PROMPT_STEPS = 0.0055  # what reading a token takes, in steps, there
DOUBLED_BY = 100.0  # requests in the engine with which a step takes twice as long as with none
PACE_CLAMP = 4.0  # a sample is taken for so much faster or slower at most
PROMPT_CLAMP = 8.0  # the same, of what reading takes
ANSWER_WEIGHT = 0.05  # of one answer that has ended
ANSWER_TRUSTED_TOKENS = 50  # from here on it has its full weight
PACE_MEMORY_S = 2.5  # of reports
CHANGED = 1.6  # streams that run so many times as slow, or as fast, twice in a row, show a change,
STREAMS_WEIGHT = 0.5  # which is taken for true by so much, and twice a second
PROMPT_SAMPLE_TOKENS = 600  # a shorter wait says more of the network and of steps than of reading
PROMPT_TRUSTED_TOKENS = 2000
PROMPT_WEIGHT = 0.05
FIRST_STEPS = 1.5  # until a token that is due is made: the step under way, and its own
PROBE_S = 60.0  # an idle server of which nothing was seen for so long may have changed,
PROBE_SLOWED_S = 5.0  # and one that has slowed down all the more; later ever more rarely
PROBE_LIMIT_S = 300.0
PROBE_TOKENS = 512  # it is tried with a prompt that is no longer
READ_MEMORY_S = 5.0  # of the rate at which prompts come
ANSWER_TOKENS = 200.0  # of an answer, until some have ended
ANSWERS_WEIGHT = 0.01
ANSWERS_SOON = 8  # what was assumed counts as so many answers
PACE_SOON = 8  # samples of a server, until others are not judged by it any more


class Counts:
    """Requests of ours with a server, exact.  The fleet changes them in place."""

    __slots__ = ("in_flight", "on_trial", "pending", "request_s", "at", "read", "rate",
                 "held", "quiet", "looked")

    def __init__(self, in_flight: int = 0, on_trial: int = 0, pending: int = 0) -> None:
        self.in_flight = in_flight
        self.on_trial = on_trial  # of these, begun while the circuit was half-open
        self.pending = pending  # tokens of their prompts to be read before they are answered
        self.read = 0  # and those that were
        self.request_s, self.at = 0.0, -INFINITY  # seconds × requests in flight, until then,
        self.rate = 0.0  # and tokens to read that came per second
        self.looked = -INFINITY, 0.0, 0  # at its streams: when, request_s and read then
        self.quiet = False  # at its last report it had nothing to read
        self.held = 0  # tokens that have come into its KV cache, less those gone, since its report

    def until(self, now: float) -> None:
        """Count that all has been as it is until now."""
        if (elapsed_s := now - self.at) > 0:
            if self.in_flight:
                self.request_s += self.in_flight * elapsed_s
            self.rate *= max(0.0, 1 - elapsed_s / READ_MEMORY_S)
            self.at = now


class Pace:
    """How fast a server is, as far as it was seen; changed in place."""

    __slots__ = ("step_s", "prompt_steps", "samples", "probe_s", "probe_at",
                 "tokens_per_event", "change")

    def __init__(self, step_s: float = STEP_S) -> None:
        self.step_s = step_s  # of one token of an answer, with nothing else to do
        self.prompt_steps = PROMPT_STEPS  # what one token of a prompt takes of that
        self.samples = 0  # since it was new, or idle for long
        self.probe_s = PROBE_S  # without one, until it is worth a try,
        self.probe_at = INFINITY  # and when that will be
        self.tokens_per_event = 1.0  # of its streams
        self.change = 0  # 1 if they were slower than they should be when last looked at, -1 faster

    @property
    def prompt_token_s(self) -> float:
        """Seconds to read one token of a prompt."""
        return self.step_s * self.prompt_steps

    @property
    def prompt_tokens_per_s(self) -> float:
        """How fast it reads; 0 is unknown."""
        return 1 / self.prompt_token_s if self.samples else 0.0

    def expect(self, step_s: float, now: float) -> None:
        """Nothing was seen of it yet; it is probably so fast."""
        self.step_s, self.probe_at = step_s, now + self.probe_s

    def restarted(self) -> None:
        """It may be another now; until something is seen it is taken for the same."""
        self.samples, self.prompt_steps = 0, PROMPT_STEPS

    def tried(self, now: float) -> None:
        """It gets a request after a long time: what that shows counts as much as what was known."""
        self.samples, self.probe_s = min(self.samples, 1), min(PROBE_LIMIT_S, 2 * self.probe_s)
        self.probe_at = now + self.probe_s

    def worked(
        self, seconds: float, tokens: float, running: float, read: float, weight: float, now: float
    ) -> None:
        """In that time it made so many tokens of each answer while so many ran on average, and
        read so many tokens of prompts.  The sample counts by its `weight`, early ones more."""
        known, steps = self.step_s, tokens * (1 + running / DOUBLED_BY) + read * self.prompt_steps
        found = min(PACE_CLAMP * known, max(known / PACE_CLAMP, seconds / steps))
        if found > 1.5 * known:
            self.probe_s = PROBE_SLOWED_S
        elif found < 0.7 * known:
            self.probe_s = PROBE_S
        self.samples += 1
        if self.samples < 1 / weight:
            weight = max(weight, 1 / (1 + self.samples))
        self.step_s = max(LEAST_STEP_S, known + weight * (found - known))
        self.probe_at = now + self.probe_s

    def answered(
        self, seconds: float, tokens: int, running: float, read: float, now: float
    ) -> None:
        """An answer has ended: so many tokens after the first, since that one came."""
        if tokens >= 8:
            self.worked(seconds, tokens, running, read,
                        ANSWER_WEIGHT * min(1.0, tokens / ANSWER_TRUSTED_TOKENS), now)

    def counted(self, tokens_per_event: float) -> None:
        """So many tokens came with each event of a stream."""
        self.tokens_per_event += ANSWER_WEIGHT * (tokens_per_event - self.tokens_per_event)

    def prompt_read(self, seconds: float, tokens: int, running: float) -> None:
        """An answer began when so many tokens of prompts, its own last, were read."""
        if tokens <= PROMPT_SAMPLE_TOKENS:
            return
        steps = seconds / self.step_s - FIRST_STEPS * (1 + running / DOUBLED_BY)
        found = min(PROMPT_CLAMP, max(1 / PROMPT_CLAMP, steps / (tokens * PROMPT_STEPS)))
        weight = PROMPT_WEIGHT * min(1.0, tokens / PROMPT_TRUSTED_TOKENS)
        self.prompt_steps += weight * (found * PROMPT_STEPS - self.prompt_steps)

    def reported(self, before: EngineLoad, load: EngineLoad, elapsed_s: float, now: float) -> None:
        """Two reports tell what it did between them, for us and for others.  At neither was a
        prompt of ours under way, which the engine counts as running and as read before it is."""
        if None in (before.generation_tokens, load.generation_tokens, before.running, load.running):
            return
        made = load.generation_tokens - before.generation_tokens  # type: ignore[operator]
        running = (before.running + load.running) / 2  # type: ignore[operator]
        if made <= 0 or min(before.running, load.running) < 2:  # type: ignore[type-var]
            return  # it may have been idle in between
        read = (load.tokens or 0) - (before.tokens or 0) - made
        read -= (load.prefix_hits or 0) - (before.prefix_hits or 0)
        share = 1 - math.exp(-min(elapsed_s, PACE_MEMORY_S) / PACE_MEMORY_S)
        self.worked(elapsed_s, made / running, running, max(0, read),
                    share * min(1.0, running / 4), now)

    def streamed(
        self, seconds: float, events: float, streams: int, running: float, read: float, now: float
    ) -> None:
        """In that time each of so many streams brought so many events on average, while at most so
        many tokens of prompts were read.  Two in a row tell of a change; what is within these
        bounds, answers tell better when they have ended."""
        tokens = events * self.tokens_per_event
        if tokens * streams < 8 and events:
            return
        steps = max(tokens, 1.0) * (1 + running / DOUBLED_BY)
        slower = seconds > CHANGED * self.step_s * (steps + read * self.prompt_steps)
        faster = seconds < self.step_s / CHANGED * steps
        before, self.change = self.change, slower - faster
        if self.change and self.change == before:
            self.worked(seconds, max(tokens, 1.0), running, slower * read, STREAMS_WEIGHT, now)


class AnswerLengths:
    """How many tokens an answer has, by model, as far as some have ended."""

    def __init__(self) -> None:
        self.known: dict[str | None, tuple[float, int]] = {}  # mean, and of how many

    def get(self, model: str | None) -> float:
        return self.known[model][0] if model in self.known else ANSWER_TOKENS

    def means(self) -> dict[str, float]:
        """By model; '' is of requests that named none."""
        return {model or "": mean for model, (mean, _) in self.known.items()}

    def ended(self, model: str | None, tokens: int) -> None:
        if model not in self.known and len(self.known) >= MODELS_LIMIT:
            return
        mean, count = self.known.get(model, (ANSWER_TOKENS, ANSWERS_SOON))
        weight = max(ANSWERS_WEIGHT, 1 / (1 + count))
        self.known[model] = mean + weight * (tokens - mean), count + 1


# ============================================================================================
#  21  servers
# ============================================================================================
#
# What is known of a server: what was set, its health, its last report, what was learned.  All of
# it is one frozen view, which changes only on news; requests of ours are counted apart, in place.
# A server with several engines (data parallel) has a view for each; their health is one.  Whoever
# chooses among servers sees them as the Eligible, in columns.

PREFILL_BYTES_PER_S = 4000  # of a prompt, about 1,000 tokens: a slow server with a long queue
Models = Mapping[str, Mapping[str, Any]]  # by id, with everything the server says of each
START_CAPACITY = 64.0  # of a server that was given none: where learning begins
FULL_RATIO = 1.25  # of a learned capacity: with so much and a queue of its own, a server is full
BLIND_RATIO = 2.0  # the same for one that does not say whether it has a queue
KEPT_REPORTS = 3  # a single report may be missed
IN_FLIGHT_OF = operator.attrgetter("counts.in_flight")
PENDING_OF = operator.attrgetter("counts.pending")
PROMPT_SPEED_OF = operator.attrgetter("pace.prompt_tokens_per_s")
SEATS_GROWTH = 1.1  # by report, of what a server ran when it had a queue
SPEED_CLAMP = 4.0  # servers, and samples, are taken for so much faster or slower at most


def oldest_report(now: float, interval_s: float) -> float:
    """The time of a report that is still news."""
    return now - KEPT_REPORTS * interval_s - 1


class Report(NamedTuple):
    """What a server said of its load.  `report_of` makes one."""

    load: EngineLoad = EngineLoad()
    at: float = -INFINITY  # monotonic, -inf for never
    ours_at_scrape: int = 0  # of the requests in it, as many as may be ours
    foreign: int = 0  # the others
    kv_room: float = INFINITY  # tokens for which its KV cache has room
    seats: float = INFINITY  # requests that run at most; others wait
    trouble: str = ""  # why it says nothing any more


def report_of(
    load: EngineLoad, at: float, ours_at_scrape: int, before: Report = Report()
) -> Report:
    reported, used = (load.running or 0) + (load.waiting or 0), load.kv_usage_ratio
    room = INFINITY if used is None else max(0.0, 1 - used) * (load.kv_tokens or INFINITY)
    return Report(load, at, ours_at_scrape, max(0, reported - ours_at_scrape), room,
                  seats_after(before, load))


def seats_after(before: Report, load: EngineLoad) -> float:
    """How many requests it runs at most: as many as it ran when it had a queue twice in a row.
    After that it may take a few more from report to report."""
    running = load.running or 0
    if load.queued and before.load.queued and running:
        return max(running, before.load.running or 0)
    return SEATS_GROWTH * before.seats


class Learned(NamedTuple):
    """What was learned of a server; 0 is unknown."""

    tpot_s: float = 0.0  # time per output token
    capacity: float = START_CAPACITY  # what its tpot_s says of it
    hit_ratio: float = 1.0  # of prompt tokens that it should have cached, the share that it had


class ServerView(NamedTuple):
    """All that is known of a server, or of one of its engines; monotonic times, -inf for never."""

    id: str  # what all state is kept by: the server's id, for an engine with its rank
    name: str  # what is shown: the server's name, for an engine with its rank
    settings: ServerSettings
    health: Health
    counts: Counts
    pace: Pace
    rank: int | None = None  # the engine's number; None for a server that is one
    share: float = 100.0  # of requests, in percent, that its pool gets
    draining: bool = False  # it leaves, with its last request
    drained: bool = False  # by hand: it stays, and is not asked
    busy_until: float = -INFINITY  # it said 429, or a 503 that means the same
    progress_at: float = -INFINITY  # when its token counters last moved
    models: Models | None = None  # None: it has not said yet
    models_at: float = -INFINITY
    report: Report = Report()
    learned: Learned = Learned()

    @property
    def server(self) -> str:
        """The server's id, for an engine, too."""
        return self.settings.id

    @property
    def load(self) -> EngineLoad:
        return self.report.load

    @property
    def configured(self) -> int:
        """The requests it runs well, as they were set, or AUTO."""
        return self.settings.max_concurrent_requests

    @property
    def capacity(self) -> float:
        return self.settings.max_concurrent_requests or self.learned.capacity

    @property
    def size(self) -> float:
        """Its capacity as far as it is to be used: what policies ask for."""
        return self.capacity * self.settings.weight

    @property
    def limit(self) -> float:
        """How many requests it takes at once.  No weight raises a capacity that was configured."""
        return self.capacity * min(1.0, self.settings.weight)

    @property
    def reason(self) -> str:
        """Why it is in its state, in words; and what else is the matter with it."""
        if self.draining or self.drained:
            done = "drained by hand" if self.drained else "it leaves"
            left = f", {self.counts.in_flight} in flight" * bool(self.counts.in_flight)
            return f"{done}{left}" + f"; {self.health.reason}" * (not self.healthy)
        troubles = ["its weight is 0"] * (not self.settings.weight) + [self.report.trouble]
        return "; ".join([self.health.reason, *filter(None, troubles if self.healthy else ())])

    @property
    def open(self) -> bool:
        return self.settings.weight > 0 and not (self.draining or self.drained)

    @property
    def healthy(self) -> bool:
        return self.health.state is State.HEALTHY

    @property
    def available(self) -> bool:
        """Whether it can be asked, if need be."""
        return self.health.may_be_last_resort and self.open and not self.load.asleep

    @property
    def admission(self) -> tuple[Any, ...]:
        """All of it that may keep requests from the server."""
        return (self.health, self.settings, self.models, self.share, self.draining, self.drained,
                self.busy_until, self.report.load.asleep, self.report.load.adapters)

    @property
    def by_name(self) -> ServerView:
        """The view for a request to this server alone that is no work of its engine, which neither
        sleep nor a drain by hand, weight or share keeps out."""
        return self._replace(
            report=self.report._replace(load=self.load._replace(asleep=False)), drained=False,
            settings=dataclasses.replace(self.settings, weight=self.settings.weight or 1.0),
            share=self.share or 1.0)

    def full(self, now: float, interval_s: float) -> bool:
        """Whether a request more would only wait there.  A number that was configured is a limit;
        a learned one is an opinion, and has to be confirmed: by the server's own queue, by what
        was sent since it last spoke, or by twice as many.  One that is busy by its word is full."""
        if self.busy_until > now:
            return True
        limit, in_flight = self.limit, self.counts.in_flight
        if self.configured:
            return in_flight >= limit
        load = in_flight + self.foreign(now, interval_s)
        if load < FULL_RATIO * limit:
            return False
        if not self.reports(now, interval_s):
            return load >= BLIND_RATIO * limit
        sent_since = in_flight - self.report.ours_at_scrape
        return self.load.queued > 0 or sent_since >= (FULL_RATIO - 1) * limit

    def has_room(self, now: float) -> bool:
        """Whether it may take a request more, by our own counts and its last word."""
        if self.busy_until > now:
            return False
        return not self.configured or self.counts.in_flight < self.limit

    def slow_start_share(self, now: float, slow_start_s: float) -> float:
        """The share of its capacity that it gets since it has come back: from a tenth to all."""
        age_s = max(0.0, now - self.health.since)
        return 1.0 if age_s >= slow_start_s else 0.1 + 0.9 * age_s / slow_start_s

    def foreign(self, now: float, interval_s: float) -> float:
        """Requests it has that are not ours, fading where its report is older than the interval."""
        late, foreign = now - self.report.at - interval_s, self.report.foreign
        return foreign * math.exp(-late / (2 * interval_s)) if foreign and late > 0 else foreign

    def reports(self, now: float, interval_s: float) -> bool:
        """Whether what it says of its load is news; a single report may be missed."""
        return self.report.at >= oldest_report(now, interval_s)

    def has(self, model: str | None) -> bool:
        """Whether it may be asked for that model; one that has not told its models may."""
        return model is None or self.models is None or model in self.models

    def context(self, model: str | None) -> float:
        """Tokens that a prompt and its answer may have together (max_model_len); infinity where
        it does not say.  An adapter has its base's; the first model is a server's own."""
        models = self.models or {}
        name = next(iter(models), None) if model is None else model
        for _ in range(2):
            entry = models.get(name, {}) if isinstance(name, str) else {}
            length, name = entry.get("max_model_len"), entry.get("parent")
            if type(length) is int and length > 0:
                return length
        return INFINITY

    def shares_models(self, other: ServerView) -> bool:
        """Whether they may run the same; a server that has not said may."""
        mine, theirs = self.models, other.models
        return not (mine and theirs and mine.keys().isdisjoint(theirs))


class Moment(NamedTuple):
    """What a judgement depends on besides servers and call."""

    now: float
    interval_s: float  # between two reports of load
    enforced: bool = False  # a server takes no more requests at once than its capacity
    slow_start_s: float = 0.0


class Eligible(NamedTuple):
    """What a policy judges: servers in columns, with their counts of that moment."""

    views: Sequence[ServerView]
    in_flight: list[int]
    pending: list[int]
    cached: Sequence[int]  # tokens of the prompt
    slow_start: list[float]  # shares of their capacity; none of it where all have the whole
    call: Call
    moment: Moment
    draw: random.Random
    answer_tokens: float = ANSWER_TOKENS  # that an answer to such a call has, probably

    def foreign(self) -> list[float]:
        """Requests with each that are not ours, as far as they are known."""
        now, interval_s = self.moment.now, self.moment.interval_s
        return [view.foreign(now, interval_s) if view.report.foreign else 0 for view in self.views]

    def loads(self) -> list[float]:
        """Requests with each."""
        return [ours + foreign for ours, foreign in zip(self.in_flight, self.foreign())]

    def capacities(self) -> list[float]:
        """The capacity of each."""
        return [view.capacity for view in self.views]

    def sizes(self) -> list[float]:
        """The size of each."""
        return [(view.settings.max_concurrent_requests or view.learned.capacity)
                * view.settings.weight for view in self.views]

    def relative_speeds(self) -> list[float]:
        """How fast each reads, 1 being the mean; unknown ones as the others, by capacity."""
        speeds = list(map(PROMPT_SPEED_OF, self.views))
        known = sum(speeds)
        if not known:
            return [1.0] * len(speeds)
        if 0.0 in speeds:
            capacities = self.capacities()
            per_capacity = known / sum([c for c, speed in zip(capacities, speeds) if speed])
            speeds = [speed or c * per_capacity for c, speed in zip(capacities, speeds)]
            known = sum(speeds)
        mean, least, most = known / len(speeds), 1 / SPEED_CLAMP, SPEED_CLAMP
        relative = [speed / mean for speed in speeds]
        if least <= min(relative) and max(relative) <= most:  # the usual
            return relative
        return [min(most, max(least, speed)) for speed in relative]


def disagreement(view: ServerView) -> str:
    """That a server's speed says another capacity than its settings, or ''."""
    configured, learned = view.configured, view.learned
    if not (configured and learned.tpot_s) or 0.5 <= learned.capacity / configured <= 2.0:
        return ""
    return f"configured {configured}, behaves like {learned.capacity:.0f}"


class Transition(NamedTuple):
    """A change of a server's state: worth a line in the log."""

    server: str  # its name
    old: State
    new: State
    reason: str


class Work(NamedTuple):
    """What requests of ours are with a server, and have of it, apart from its own word."""

    waiting: int  # requests that want something of its engine now
    since: float  # when the first of them came
    moved_at: float  # when the last piece of any of its answers came
    unanswered_bytes: int  # content of requests that have not begun their answer


def moves(view: ServerView, streams_at: float, within_s: float, now: float, s: Settings) -> bool:
    """Whether its engine works: its counters or streams have moved within that time."""
    since = min(now - within_s, oldest_report(now, s.metrics_interval))
    return max(view.progress_at, streams_at) > since


def frozen_reason(view: ServerView, work: Work, now: float, s: Settings) -> str:
    """Why its engine seems frozen, or ''.  A server with requests must read prompts or generate
    tokens, and count them; reading a long prompt takes time without a sign of progress."""
    since = work.since
    if not (s.frozen_timeout and work.waiting):
        return ""
    if view.healthy:
        if view.load.tokens is None or not view.reports(now, s.metrics_interval):
            return ""  # it is for the health checks to judge
    elif view.health.failures >= s.health_check_consecutive_failures:
        since = max(since, view.health.since)  # a stopping vLLM may keep its connections, silent
    else:
        return ""
    still_s = now - max(since, view.progress_at, work.moved_at)
    reading_s = min(work.unanswered_bytes / PREFILL_BYTES_PER_S, 10 * s.frozen_timeout)
    if still_s <= s.frozen_timeout + reading_s:
        return ""
    return (f"frozen: {work.waiting} requests wait, and neither its token counters nor its"
            f" streams have moved for {still_s:.0f} s")


def depends_on_the_moment(view: ServerView, now: float) -> bool:
    """Whether it depends on the moment, or on chance, if it is passed over for others."""
    s = view.settings
    return bool(s.pool or s.tier > 1 or view.report.load.adapters or view.busy_until > now)


def shortest_context(views: Iterable[ServerView], model: str | None) -> float:
    """Prompts that are shorter fit every server that has the model."""
    shortest = INFINITY
    for view in views:
        if view.models and (model is None or model in view.models):  # else it is infinity
            shortest = min(shortest, view.context(model))
    return shortest


# ============================================================================================
#  22  learning
# ============================================================================================
#
# What a server's reports teach of it besides its pace: its time per output token as it is now, its
# capacity, and how much of what it was sent it really finds in its cache.

# How fast what was learned gives way to what is seen.  On a simulated fleet, half and twice the
# CAPACITY_GAIN did as well.
TPOT_MEMORY_S = 15.0
CAPACITY_GAIN = 0.1  # per second, of the deviation from the fleet's median time per token
CAPACITY_FALL = 0.9  # by one report at most: a long prompt makes a queue, too
CAPACITY_LIMITS = 1.0, 4096.0
HIT_PRIOR_TOKENS = 20_000.0  # so many are expected before a server's word about hits counts
HITS_FADE = 0.9  # by report
HITS_SLACK = 1.3  # our count of tokens is an estimate, and so is their fate


def restarted(before: EngineLoad, load: EngineLoad) -> bool:
    """Whether its counters began anew between two reports."""
    return load.tokens is not None and load.tokens < (before.tokens or 0)


class HitRate:
    """Cached tokens that requests should find at a server, against what it says they found."""

    __slots__ = ("since", "sum", "found")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.since = 0  # the last report
        self.sum = self.found = 0.0  # of late

    def after(self, before: EngineLoad, load: EngineLoad, ratio: float) -> float:
        """The share that is really found, after one more report; it was `ratio`."""
        if restarted(before, load) or not load.caches:
            self.forget()
            return float(load.caches)
        since, self.since = self.since, 0
        if before.prefix_hits is None or not since:
            return ratio
        self.sum = self.sum * HITS_FADE + since
        self.found = self.found * HITS_FADE + max(0, (load.prefix_hits or 0) - before.prefix_hits)
        share = (self.found + HIT_PRIOR_TOKENS) / (self.sum + HIT_PRIOR_TOKENS)
        return min(1.0, HITS_SLACK * share)


def usual_step_s(views: Iterable[ServerView]) -> float:
    """A step's seconds × capacity, by the servers of which something was seen; 0 is unknown.  Until
    one is seen itself, a server that is twice as large is taken for twice as fast."""
    products = [view.pace.step_s * view.capacity for view in views if view.pace.samples]
    return statistics.median(products) if products else 0.0


def tpot_after(view: ServerView, load: EngineLoad, elapsed_s: float) -> float:
    """Its time per output token, after one more report: so many requests ran for so long, and so
    many tokens were generated."""
    tpot_s, before = view.learned.tpot_s, view.load
    if load.generation_tokens is None or before.generation_tokens is None:
        return tpot_s
    made = load.generation_tokens - before.generation_tokens
    running = ((load.running or 0) + (before.running or 0)) / 2
    if made <= 0 or running < 1:
        return tpot_s
    found = elapsed_s * running / made
    tpot_s = tpot_s or found
    weight = 1 - math.exp(-elapsed_s / TPOT_MEMORY_S)
    return tpot_s + weight * (min(found, SPEED_CLAMP * tpot_s) - tpot_s)


def capacity_after(
    view: ServerView, load: EngineLoad, elapsed_s: float, views: Iterable[ServerView]
) -> float:
    """Its capacity, after one more report: if it has a queue, it runs as many as it can; if not,
    it may have more work while its answers come faster than those of others, and the reverse.
    That it runs many without a queue says little: vLLM takes far more than it runs well."""
    running, most, tpot_s = load.running or 0, view.learned.capacity, view.learned.tpot_s
    if load.queued and running:
        most = min(running, 2 * most) if running > most else max(running, CAPACITY_FALL * most)
    elif most < running:
        most = min(running, max(most, START_CAPACITY))
    elif tpot_s and running >= most / 2:
        times = [other.learned.tpot_s for other in views
                 if other.learned.tpot_s and other.healthy and other.shares_models(view)]
        if len(times) > 1:
            deviation = min(1.0, max(-1.0, statistics.median(times) / tpot_s - 1))
            most *= 1 + CAPACITY_GAIN * min(2.0, elapsed_s) * deviation
    return min(CAPACITY_LIMITS[1], max(CAPACITY_LIMITS[0], most))


def learned_after(
    view: ServerView, load: EngineLoad, now: float, hit_rate: HitRate, views: Iterable[ServerView]
) -> Learned:
    """What is known of a server after one more report; `views` are of all servers."""
    learned, counts, elapsed_s = view.learned, view.counts, now - view.report.at
    hit_ratio = hit_rate.after(view.load, load, learned.hit_ratio)
    if restarted(view.load, load):
        view.pace.restarted()
        return learned._replace(tpot_s=0.0, hit_ratio=hit_ratio)
    quiet, counts.quiet = counts.quiet, not counts.pending
    if quiet and counts.quiet:
        view.pace.reported(view.load, load, elapsed_s, now)
    return Learned(tpot_after(view, load, elapsed_s),
                   capacity_after(view, load, elapsed_s, views), hit_ratio)


# ============================================================================================
#  23  leases
# ============================================================================================
#
# What is counted of a request while it is with a server, and what is learned when it goes well.


class Member:
    """A server, or one of its engines, with a model of its prefix cache, and how right that is."""

    __slots__ = ("view", "cache", "hit_rate")

    def __init__(self, view: ServerView) -> None:
        self.view, self.cache, self.hit_rate = view, PrefixCache(), HitRate()


class Leases(Protocol):
    """Who gives leases."""

    def member(self, id: str) -> Member | None: ...
    def answer_ended(self, view: ServerView, model: str | None, tokens: int) -> None: ...
    def left(self, id: str) -> None: ...


class Lease:
    """Counts a request in flight until its `end`, and its prompt until its answer begins."""

    __slots__ = ("id", "pending", "_fleet", "_member", "_trial", "_cached", "_ahead", "_sent_at",
                 "_fresh", "_tokens", "_begun")

    def __init__(
        self, fleet: Leases, id: str, now: float, prompt: Prompt, reads: bool = True
    ) -> None:
        self.id, self._fleet, self._sent_at = id, fleet, now
        self._trial = self.pending = self._ahead = self._cached = 0
        self._fresh: tuple[int, ...] = ()  # links of its prompt that the server did not know
        # When its answer began, and what had run and been read there by then.
        self._begun: tuple[float, float, int] | None = None
        self._tokens = prompt.tokens
        self._member = member = fleet.member(id)
        if member is None:
            return
        view = member.view
        counts, pace = view.counts, view.pace
        if view.health.open_until is not None:
            self._trial = view.health.circuit(now) == "half-open"
        self._fresh = member.cache.sent(prompt)
        self._cached = prompt.tokens_in(len(prompt.prefix_hashes) - len(self._fresh))
        if reads:
            self.pending = prompt.tokens - int(self._cached * view.learned.hit_ratio)
        if not view.report.load.queued:  # else the time to the first byte says nothing of its speed
            self._ahead = counts.pending + self.pending
        if not counts.in_flight and now > pace.probe_at:
            pace.tried(now)
        counts.until(now)
        counts.in_flight += 1
        counts.on_trial += self._trial
        counts.pending += self.pending
        counts.held += prompt.tokens
        counts.rate += self.pending / READ_MEMORY_S

    def reading_s(self) -> float:
        """In how many seconds its prompt is probably read."""
        pace = self._member.view.pace if self._member else None
        return self.pending * pace.step_s * pace.prompt_steps if pace else 0.0

    def answered(self, now: float, learn: bool) -> None:
        """The answer begins.  `learn` from that, if it begins when the prompt is read."""
        if (member := self._member) is None or self._begun is not None:
            return
        counts = member.view.counts
        if learn:
            counts.until(now)
        counts.pending -= self.pending
        counts.read += self.pending
        member.hit_rate.since += self._cached
        if learn and self._ahead:
            member.view.pace.prompt_read(now - self._sent_at, self._ahead, counts.in_flight)
        if self._fresh:
            member.cache.confirm(self._fresh)
        self._begun = now, counts.request_s, counts.read
        self.pending, self._cached, self._fresh = 0, 0, ()

    def complete(self, now: float, tokens: int, model: str | None, events: int = 0) -> None:
        """The answer, a stream of so many events, has come to its end, with so many tokens; `end`
        follows."""
        if (member := self._member) is None or self._begun is None:
            return
        view, (begun_at, request_s, read) = member.view, self._begun
        counts, seconds, self._tokens = view.counts, now - begun_at, self._tokens + tokens
        counts.until(now)
        if seconds > 0:
            running = (counts.request_s - request_s) / seconds + view.report.foreign
            view.pace.answered(seconds, tokens - 1, running, counts.read - read, now)
            if events:
                view.pace.counted(tokens / events)
        self._fleet.answer_ended(view, model, tokens)

    def end(self, now: float = -INFINITY) -> None:
        member, self._member = self._member, None
        if member is not None:
            if self._fresh:  # who knows whether it was read
                member.cache.withdraw(self._fresh)
            counts = member.view.counts
            counts.until(now)
            counts.in_flight -= 1
            counts.on_trial -= self._trial
            counts.pending -= self.pending
            counts.held -= self._tokens
            self.pending = 0
            if member.view.draining and not counts.in_flight:
                self._fleet.left(self.id)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.end()


# ============================================================================================
#  24  fleet
# ============================================================================================
#
# The servers, and requests of ours with them.  The fleet holds the newest view of each server and
# replaces it when it is told something new.  Everything is kept by id, so it survives a reload of
# the settings.

STREAMS_LIMIT_S = 5.0  # between two looks at streams, that are told of
BUSY_S = 0.25  # for which a server that says it is busy is spared
VIEW_OF = operator.attrgetter("view")


class Fleet:
    """All servers.  What is told of a server that has left meanwhile is ignored."""

    def __init__(self, views: Iterable[ServerView] = ()) -> None:
        self._members = {view.id: Member(view) for view in views}
        self._has_engines = any(one.view.rank is not None for one in self._members.values())
        self._reading: list[tuple[float, int, Lease]] = []  # a heap, by when they are read
        self._numbers = itertools.count()
        # What choosing derives from the views for a model, as long as all of them keep or admit
        # the same requests: `_put` and what changes the members forget it.
        self.derived: dict[str | None, Any] = {}
        self.answers = AnswerLengths()

    def views(self, now: float | None = None) -> list[ServerView]:
        """All of them; with a moment, prompts that should be read by then are."""
        if now is not None and self._reading:
            self.catch_up(now)
        return list(map(VIEW_OF, self._members.values()))

    def member(self, id: str) -> Member | None:
        return self._members.get(id)

    def view(self, id: str) -> ServerView | None:
        member = self._members.get(id)
        return member and member.view

    def in_flight(self, id: str) -> int:
        view = self.view(id)
        return view.counts.in_flight if view else 0

    def has_room(self, now: float, interval_s: float) -> bool:
        """Whether any server could take a request more."""
        return any(v.available and not v.full(now, interval_s) for v in self.views())

    def knows(self, model: str) -> bool:
        """Whether any server has told of that model."""
        if model in self.derived:  # only what is known of has anything there
            return True
        for view in self.views():
            if view.models and model in view.models:
                return True
        return False

    def engines(self, server: str) -> list[ServerView]:
        """The views of one server."""
        if not self._has_engines:  # the usual, and this is asked for each request
            return [self._members[server].view] if server in self._members else []
        return [view for view in self.views() if view.server == server]

    def server_of(self, id: str) -> str:
        """The id of the server that an engine belongs to; a server's own."""
        view = self.view(id)
        return view.server if view else id

    def name_of(self, id: str) -> str:
        """What is shown of a server or an engine; its id, once it has left."""
        view = self.view(id)
        return view.name if view else id

    def cached(self, prompt: Prompt) -> list[int]:
        """How many of a prompt's tokens each server has probably cached, in the order of views."""
        if not (chain := prompt.prefix_hashes):
            return [0] * len(self._members)
        out, tokens = list[int](), dict[int, int]()
        for member in self._members.values():
            if not (links := member.cache.cached_links(chain)):
                out.append(0)
                continue
            if links not in tokens:  # mostly the same few
                tokens[links] = prompt.tokens_in(links)
            out.append(int(tokens[links] * member.view.learned.hit_ratio))
        return out

    def _put(self, view: ServerView) -> None:
        """Replace a server's view."""
        member = self._members[view.id]
        if view.admission != member.view.admission:
            self.derived.clear()
        member.view = view

    # What settings tell.

    def apply(
        self, wanted: Sequence[ServerSettings], now: float, pools: Mapping[str, float] = {},
        drained: Iterable[str] = (),
    ) -> tuple[list[str], list[str]]:
        """Make the fleet what the settings say: (ids added, ids now draining).  A server that is
        wanted again while it drains simply stays, with all that is known of it."""
        old, members, drained = self._members, dict[str, Member](), frozenset(drained)
        staying = {id for id, member in old.items() if not member.view.draining}
        kin = {member.view.server: member.view for member in old.values()}
        rest = round(100.0 - sum(pools.values()), 6)
        given = [one.max_concurrent_requests for one in wanted if one.max_concurrent_requests]
        start = sum(given) / len(given) if given else START_CAPACITY  # others are like these
        likely = usual_step_s(self.views()) or STEP_S * start
        for server in wanted:
            limit, share = server.max_concurrent_requests, pools.get(server.pool, rest)
            for id, rank in engine_ids(server):
                member = members[id] = old.get(id) or Member(
                    new_view(server, id, rank, kin.get(server.id), now))
                view, own = member.view, (server, False, server.id in drained, share)
                if id not in old or view.configured != limit:
                    view = view._replace(learned=view.learned._replace(capacity=limit or start))
                if not view.pace.samples:
                    view.pace.expect(likely / (limit or start), now)
                if own != (view.settings, view.draining, view.drained, view.share):
                    view = view._replace(name=engine_id(server.name, rank), settings=server,
                                         draining=False, drained=own[2], share=share)
                member.view = view
        leaving = {id: member for id, member in old.items() if id not in members}
        for id, member in leaving.items():
            if member.view.counts.in_flight:
                member.view = member.view._replace(draining=True)
                members[id] = member
        self._members = members
        self._has_engines = any(member.view.rank is not None for member in members.values())
        self.derived.clear()
        added = [id for id in members if id not in staying and id not in leaving]
        return added, [id for id in leaving if id in staying]

    def left(self, id: str) -> None:
        """A draining server's last request has ended."""
        self._members.pop(id, None)
        self.derived.clear()

    # What leases tell.

    def lease(
        self, id: str, now: float, prompt: Prompt = NO_PROMPT, reads: bool = True
    ) -> Lease:
        """With a server that `reads` the prompt, or gets it as another has read it."""
        return Lease(self, id, now, prompt, reads)

    def answers_by(self, lease: Lease, moment: float) -> None:
        """The lease's prompt counts as read at that moment, if no answer begins before."""
        heapq.heappush(self._reading, (moment, next(self._numbers), lease))

    def catch_up(self, now: float) -> None:
        while self._reading and self._reading[0][0] <= now:
            heapq.heappop(self._reading)[2].answered(now, False)

    def answer_ended(self, view: ServerView, model: str | None, tokens: int) -> None:
        """A server has given an answer of so many tokens."""
        self.answers.ended(model, tokens)
        if 0 < view.pace.samples <= PACE_SOON:  # then others are probably like it
            usual = usual_step_s(self.views())
            for other in self.views():
                if not other.pace.samples and other.shares_models(view):
                    other.pace.step_s = usual / other.capacity

    def streamed(self, id: str, streams: int, events: float, now: float) -> None:
        """Since this was last told, each of so many streams of a server has brought so many events,
        on average."""
        if (view := self.view(id)) is None:
            return
        counts = view.counts
        counts.until(now)
        (at, request_s, read), counts.looked = counts.looked, (now, counts.request_s, counts.read)
        if streams and 0 < now - at <= STREAMS_LIMIT_S:
            running = (counts.request_s - request_s) / (now - at) + view.report.foreign
            most = counts.read - read + counts.pending
            view.pace.streamed(now - at, events, streams, running, most, now)

    def said_busy(self, id: str, now: float) -> None:
        """The server said that it has enough to do."""
        if (view := self.view(id)) is not None:
            self._put(view._replace(busy_until=now + BUSY_S))

    # What watchers tell.

    def models_due(self, server: str, now: float, s: Settings) -> bool:
        """Whether the next check should ask for the models: unknown, old, or maybe others now."""
        views = self.engines(server)
        return not views or not views[0].healthy or now - views[0].models_at >= s.models_interval

    def models_listed(self, server: str, models: Models, now: float) -> None:
        for view in self.engines(server):
            self._put(view._replace(models=models, models_at=now))

    def scraped(self, id: str, load: EngineLoad, own_then: int, now: float) -> int:
        """A page of metrics came, in which at most `own_then` requests are ours.  Returns the
        prompt tokens that were found cached since the last one."""
        if (member := self._members.get(id)) is None:
            return 0
        view, before = member.view, member.view.load
        member.cache.limit_tokens = load.kv_tokens or CACHE_TOKENS
        if load.asleep or restarted(before, load):
            member.cache.forget()
        view.counts.held = 0
        moved = load.tokens != before.tokens and None not in (load.tokens, before.tokens)
        self._put(view._replace(
            report=report_of(load, now, own_then, view.report),
            learned=learned_after(view, load, now, member.hit_rate, self.views()),
            progress_at=now if moved else view.progress_at))
        hits = before.prefix_hits
        return 0 if hits is None else max(0, (load.prefix_hits or 0) - hits)

    def unscraped(self, server: str, why: str) -> bool:
        """A server's pages of metrics come no more.  Returns whether that is news."""
        views = [v for v in self.engines(server) if v.healthy and not v.report.trouble]
        for view in views:
            self._put(view._replace(report=view.report._replace(trouble=why)))
        return bool(views)

    def judge(self, id: str, after: Callable[..., Health], *news: Any) -> Transition | None:
        """Replace a server's health by `after` of it and the news.  Returns the transition, if its
        state has changed, or None."""
        server = self.server_of(id)
        if not (views := self.engines(server)):
            return None
        old = views[0].health
        new = after(old, *news)
        back = new.state is State.HEALTHY and old.state is State.UNHEALTHY
        for view in views if new is not old else ():
            report = view.report
            if back and report.at < old.since and report.load.asleep:  # from before it was away
                report = report._replace(load=report.load._replace(asleep=False))
            self._put(view._replace(health=new, report=report))
        if new.state is old.state:
            return None
        return Transition(views[0].settings.name, old.state, new.state, new.reason)


def new_view(
    server: ServerSettings, id: str, rank: int | None, kin: ServerView | None, now: float
) -> ServerView:
    """Of a server, or an engine, that is new; engines of the same server have one health."""
    name, counts = engine_id(server.name, rank), Counts()
    if kin is None:
        return ServerView(
            id, name, server, Health(State.CHECKING, "not checked yet", now), counts, Pace(), rank)
    return ServerView(id, name, server, kin.health, counts, Pace(), rank, models=kin.models,
                      models_at=kin.models_at)


def engine_id(server: str, rank: int | None) -> str:
    """A server's id, or its name, as that of one of its engines."""
    return server if rank is None else f"{server}@{rank}"


def engine_ids(server: ServerSettings) -> list[tuple[str, int | None]]:
    """The ids of a server's engines, with their ranks; of a server that is one, its own."""
    if server.data_parallel_size == 1:
        return [(server.id, None)]
    return [(engine_id(server.id, rank), rank) for rank in range(server.data_parallel_size)]


# ============================================================================================
#  25  roster
# ============================================================================================
#
# Which servers there are.  Each source names its own, and one pure rule makes one list of all; what
# is known of a server is kept elsewhere, by the id under which it stands here.
#
# To add a source: a row of Source, where its definitions are to count, and somebody who calls
# `Roster.define` with all that it names, whenever that changes.


class Source(Enum):
    """Who names servers.  Where several name the same, the first of these defines it."""

    FILE = "file"  # or the command line
    BY_HAND = "by_hand"
    POOL = "pool"
    REGISTERED = "registered"
    KUBERNETES = "kubernetes"
    DNS = "dns"

    __hash__ = object.__hash__  # as Fault's


class Entry(NamedTuple):
    """A server on the roster."""

    settings: ServerSettings  # with the weight that was given by hand, if any
    source: Source
    drained: bool = False  # by hand


class ByHand(NamedTuple):
    """What was done to servers by hand.  It holds for those of every source until it is undone, or
    nobody names the server any more."""

    removed: Collection[str] = ()
    drained: Collection[str] = ()
    weights: Mapping[str, float] = {}


Named = Mapping[Source, Mapping[str, ServerSettings]]  # what each source names, by id


def merge_sources(named: Named, by_hand: ByHand = ByHand()) -> dict[str, Entry]:
    """The roster by id: for each server the definition of the first source that names it."""
    entries = dict[str, Entry]()
    for source in Source:
        for id, server in named.get(source, {}).items():
            if id not in entries and id not in by_hand.removed:
                if (weight := by_hand.weights.get(id, server.weight)) != server.weight:
                    server = dataclasses.replace(server, weight=weight)
                entries[id] = Entry(server, source, id in by_hand.drained)
    return entries


def server_by_hand(
    entry: dict[str, Any], pools: Mapping[str, float] | None = None
) -> ServerSettings:
    """A server that comes over HTTP, maybe of one of these pools; None: of any.  It names no file,
    or who adds it could have any that we may read sent to an address of theirs.  Raises
    SettingsError."""
    text = "what comes over HTTP names no file, and one server; write it into the settings file"
    if refused := [name for name in (*SERVER_FILES, "dns") if name in entry]:
        raise SettingsError([Complaint("request", 0, name, text) for name in refused])
    known = {entry.get("pool", ""): 0.0} if pools is None else pools
    overrides = {"servers": ([entry], "request"), "pools": (known, "request")}
    settings, warnings = parse_settings("", "request", overrides)
    if warnings:
        raise SettingsError(warnings)
    return settings.servers[0]


HANDED_OVER = (Source.REGISTERED, Source.KUBERNETES, Source.DNS)  # to a successor
IDENTITY = ("id", "name", "address", "like")  # of ServerSettings


def stated_fields(server: ServerSettings) -> dict[str, Any]:
    """What a server has beyond defaults, without what it shares with an entry of the settings."""
    usual, shared = ServerSettings(server.url), ("api_key", *SERVER_FILES) if server.like else ()
    found = {key: value for key in (*SERVER_FIELDS, *IDENTITY) if key not in shared
             and (value := getattr(server, key)) != getattr(usual, key)}
    return {"url": server.url, **found}


def server_stated(fields: Mapping[str, Any]) -> ServerSettings:
    """The reverse.  Raises ValueError, TypeError, KeyError."""
    return ServerSettings(**{
        key: str(value) if key in IDENTITY else SERVER_FIELDS[key].metadata["check"](value)
        for key, value in fields.items()})


class Keeper(Protocol):
    """Who knows more of a source's servers than is on the roster."""

    def dump(self) -> Any:
        """For a successor, in JSON's types."""


class Roster:
    """Owns what each source names and what was done by hand; what is by hand ends with the process
    and its successors.  After each change `on_change` is called, with new `entries` in place."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.on_change: Callable[[], object] = lambda: None
        self.keepers: dict[Source, Keeper] = {}
        self.kept: dict[str, Any] = {}  # what those of a predecessor had to tell
        self._named = {source: dict[str, ServerSettings]() for source in Source}
        self._removed, self._drained = set[str](), set[str]()
        self._weights: dict[str, float] = {}

    def define(self, source: Source, servers: Mapping[str, ServerSettings]) -> None:
        """The source names these servers, by id, and no others from now on."""
        self._named[source] = dict(servers)
        self._merge()

    def named_by(self, source: Source) -> Mapping[str, ServerSettings]:
        """The servers that it names, by id."""
        return self._named[source]

    def _merge(self) -> None:
        added = self._named[Source.BY_HAND]
        for id in added.keys() & self._named[Source.FILE].keys():  # the file has what was wanted
            del added[id]
        known = set[str]().union(*self._named.values())
        self._removed &= known
        self._drained &= known
        self._weights = {id: weight for id, weight in self._weights.items() if id in known}
        by_hand = ByHand(self._removed, self._drained, self._weights)
        self.entries = merge_sources(self._named, by_hand)
        self.on_change()

    def add(self, server: ServerSettings) -> None:
        self._removed.discard(server.id)
        self._named[Source.BY_HAND][server.id] = server
        self._merge()

    def remove(self, id: str) -> None:
        """Take the server off the roster, whoever names it."""
        self._named[Source.BY_HAND].pop(id, None)
        self._removed.add(id)
        self._merge()

    def drain(self, id: str, drained: bool = True) -> None:
        change = self._drained.add if drained else self._drained.discard
        change(id)
        self._merge()

    def weigh(self, id: str, weight: float) -> None:
        """Give the server this weight; the one of its definition undoes what was given before."""
        self._weights[id] = weight
        if weight == next(of[id].weight for of in self._named.values() if id in of):
            del self._weights[id]
        self._merge()

    def report(self) -> dict[str, Any]:
        """What was done by hand."""
        return {"added": list(self._named[Source.BY_HAND]), "removed": sorted(self._removed),
                "drained": sorted(self._drained), "weights": dict(self._weights)}

    def dump(self) -> str:
        """The same for a successor, with all that is known of the servers that were added, and of
        those that other sources than its settings have named."""
        added = list(map(stated_fields, self._named[Source.BY_HAND].values()))
        named = {source.value: list(map(stated_fields, servers.values()))
                 for source, servers in self._named.items() if source in HANDED_OVER}
        weights = {id: (weight, weight) for id, weight in self._weights.items()}  # as 0.1.0 reads
        kept = {source.value: keeper.dump() for source, keeper in self.keepers.items()}
        return json.dumps(self.report() | {
            "added": added, "weights": weights, "named": named, "kept": kept})

    def load(self, text: str) -> None:
        """Take what a predecessor, maybe of another version, has dumped, before the first `define`.
        Raises ValueError, TypeError, KeyError or SettingsError; then nothing is taken."""
        said = json.loads(text)
        added = {one.id: one for one in map(server_by_hand, said["added"])}
        named = {source: {one.id: one for one in map(server_stated, said["named"][source.value])}
                 for source in HANDED_OVER if source.value in said.get("named", {})}
        weights = {str(id): share_weight(weight) for id, (weight, _) in said["weights"].items()}
        removed, drained = set(map(str, said["removed"])), set(map(str, said["drained"]))
        self._named |= {**named, Source.BY_HAND: added}
        self._weights = weights
        self._removed, self._drained = removed, drained
        self.kept = dict(said.get("kept", {}))


# ============================================================================================
#  26  estimates
# ============================================================================================
#
# What a call would cost at a server, in seconds: until its first token, for its answer, and what
# reading its prompt takes from the answers that are running already.  With a step's seconds s and
# a prompt token's r (`Pace`), n requests in the engine, and W the share of the last seconds that it
# spent reading:
#
#     crowd   = (1 + (n + 1) / 100) / (1 − W)
#     first   = (prompts ahead + what is not cached of this one) × r + 1.5 × s × crowd + waits
#     answer  = tokens × s × crowd × √crowd, and from a crowd of 3 on much more
#     others  = what is not cached × r × (0.3 × the fleet's mean n + n × 25 / tokens)
#     cost    = 4 × first + answer + others
#
# √crowd is what a request more does to the answers beside it, a half of it.  All of these numbers
# have been varied on a simulated fleet, on workloads of all kinds: half and twice change little.

FIRST_WEIGHT = 4.0  # people wait for a first token more than for others
READING_SHARE = 0.8  # of its time, at most
LEAST_NEW_TOKENS = 16  # the last ones are always read
CROWDED = 3.0  # steps that take so many times as long are too slow for most,
CROWDED_POWER = 8  # and an even larger crowd costs so much more
OTHERS_MEAN = 0.3  # of the fleet's mean: requests that are there by the time it is read
OTHERS_TOKENS = 25.0  # of their answers that are late by it
KV_GROWTH = 128  # tokens of KV cache that each request will still want, about


class Estimate(NamedTuple):
    """What a call would cost at one server, in seconds, and behind that: tokens, factors."""

    first_s: float  # with the waits
    answer_s: float
    others_s: float
    wait_s: float  # for room in the KV cache, or for a seat
    crowd: float  # how many times as long a step takes as alone, and what that means for others
    new: int  # tokens of its prompt that are to be read


def lowest_of(costs: Sequence[float], tie: float, draw: random.Random) -> int:
    """Which cost is the lowest; drawn from those that are up to `tie` times as high."""
    lowest = min(costs)
    limit = lowest * tie if lowest > 0 else lowest / tie
    good = [n for n, cost in enumerate(costs) if cost <= limit]
    return good[0] if len(good) == 1 else draw.choice(good)


def waits_s(view: ServerView, running: float, tokens: int, answer_s: float, oldest: float) -> float:
    """How long it waits until some of the running requests have ended and left room for it."""
    report, seconds = view.report, 0.0
    lacking = tokens + KV_GROWTH * (running + 1) + view.counts.held - report.kv_room
    if lacking > 0 and report.at >= oldest:
        used = (report.load.kv_tokens or 0) - report.kv_room + view.counts.held
        seconds = lacking * answer_s / max(used, tokens, 1)
    if running >= report.seats and report.at >= oldest:
        seconds += (running + 1 - report.seats) * answer_s / report.seats
    return seconds


def estimates(eligible: Eligible) -> list[tuple[float, float, float, float, float, int]]:
    """What an Estimate has, for each server; once for each attempt, and therefore quick."""
    (now, interval_s, *_), length = eligible.moment, eligible.answer_tokens
    tokens, oldest = eligible.call.prompt.tokens, oldest_report(now, interval_s)
    mean = OTHERS_MEAN * sum(eligible.in_flight) / max(1, len(eligible.views))
    late = min(1.0, OTHERS_TOKENS / max(1.0, length))
    if length <= 1:  # those who are there are before it, and have no answers running
        mean = late = 0.0
    sqrt, doubled_by, memory_s, out = math.sqrt, DOUBLED_BY, READ_MEMORY_S, []
    for view, ours, pending, cached, share in zip(
            eligible.views, eligible.in_flight, eligible.pending, eligible.cached,
            eligible.slow_start or itertools.repeat(1.0)):
        counts, report, pace = view.counts, view.report, view.pace
        step_s, running = pace.step_s, ours
        token_s = step_s * pace.prompt_steps
        if report.foreign:
            running += view.foreign(now, interval_s)  # type: ignore[assignment]
        crowd = 1 + (running + 1) / (doubled_by * view.settings.weight * share)
        strain = 1.0 if crowd <= CROWDED else (crowd / CROWDED) ** CROWDED_POWER
        if counts.rate and (fades := 1 - (now - counts.at) / memory_s) > 0:
            reading = token_s * counts.rate * fades
            crowd /= 1 - (reading if reading < READING_SHARE else READING_SHARE)
        new, wait_s = tokens - cached, 0.0
        if new < LEAST_NEW_TOKENS:
            new = LEAST_NEW_TOKENS
        if (running >= report.seats
                or tokens + KV_GROWTH * (running + 1) + counts.held > report.kv_room):
            wait_s = waits_s(view, running, tokens, length * step_s * crowd, oldest)
        first_s = (pending + new) * token_s + FIRST_STEPS * step_s * crowd + wait_s
        crowd *= sqrt(crowd) * strain
        out.append((first_s, length * step_s * crowd, (mean + late * running) * new * token_s,
                    wait_s, crowd, new))
    return out


# ============================================================================================
#  27  policies
# ============================================================================================
#
# What a server is worth for a call.  A policy sees the Eligible: the servers that may be asked, in
# the fleet's own true counts, and what each probably has cached.  It gives each a cost, the lowest
# is asked, and one is drawn among equals; nobody is asked anything for it.
#
# To add a policy: a class with @policy("name"), its name in POLICY_NAMES, a line in the README.
# One that is a formula of what SCORE_NAMES lists has nothing but that.


class Policy:
    """One way to choose.  One object serves all calls for one model."""

    name: ClassVar[str] = ""
    uses: ClassVar[tuple[str, ...]] = ()  # settings; what it remembers ends when one changes
    weighs: ClassVar[bool] = True  # servers' weights matter; those without any are never seen
    tie: ClassVar[float] = 1.02  # costs up to so many times the lowest are as good
    in_seconds: ClassVar[bool] = False  # the costs

    def __init__(self, s: Settings) -> None:
        self.settings = s

    def costs(self, eligible: Eligible) -> list[float]:
        """A cost for each of the servers; once for each attempt."""
        raise NotImplementedError

    def terms(self, eligible: Eligible) -> list[str]:
        """The numbers behind the costs, in words; for people."""
        raise NotImplementedError

    def tie_for(self, call: Call) -> float:
        """How far apart the costs of equals may be, as a factor."""
        return self.tie

    def chosen(self, view: ServerView) -> None:
        """That server is asked."""


POLICIES: dict[str, type[Policy]] = {}
P = TypeVar("P", bound=type[Policy])


def policy(name: str) -> Callable[[P], P]:
    def register(kind: P) -> P:
        kind.name = name
        POLICIES[name] = kind
        return kind

    return register


def unweighed(s: Settings) -> list[str]:
    """The policies in force to which only weights of 0 matter."""
    return [name for name in sorted({s.policy, *s.policies.values()}) if not POLICIES[name].weighs]


class Policies:
    """The policies of one set of settings, with what they remember: by name and model."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.known: dict[tuple[str, str], Policy] = {}

    def following(self, s: Settings) -> Policies:
        """Those of new settings; one that uses nothing that has changed goes on as it is."""
        new = Policies(s)
        new.known = {key: policy for key, policy in self.known.items()
                     if all(getattr(s, name) == getattr(self.settings, name)
                            for name in policy.uses)}
        return new

    def get(self, model: str | None, label: str) -> Policy:
        """The one for calls for that model; all whom nobody serves (`label`) share one."""
        s = self.settings
        key = s.policies.get(model or "", s.policy), label
        if key not in self.known:
            self.known[key] = POLICIES[key[0]](s)
        return self.known[key]


@policy("unified")
class Unified(Policy):
    """The default: where it costs the fewest seconds, its own and others'.  An idle server of which
    nothing was seen for long is tried with a short prompt: it may be faster by now."""

    tie, in_seconds = 1.005, True

    def costs(self, eligible: Eligible) -> list[float]:
        costs = [FIRST_WEIGHT * first_s + answer_s + others_s
                 for first_s, answer_s, others_s, _, _, _ in estimates(eligible)]
        if eligible.call.prompt.tokens <= PROBE_TOKENS and not all(eligible.in_flight):
            now = eligible.moment.now
            for n, (view, ours) in enumerate(zip(eligible.views, eligible.in_flight)):
                if not ours and now > view.pace.probe_at:
                    costs[n] = 0.0
        return costs

    def terms(self, eligible: Eligible) -> list[str]:
        """The same in words."""
        length, lines = eligible.answer_tokens, []
        for view, pending, one in zip(eligible.views, eligible.pending,
                                      itertools.starmap(Estimate, estimates(eligible))):
            speed = 1 / view.pace.prompt_token_s
            waits = f", waits {one.wait_s:.2f} s" if one.wait_s else ""
            lines.append(
                f"{FIRST_WEIGHT:g} × first token {one.first_s:.3g}"
                f" (pending {pending} + uncached {one.new} at {speed:,.0f}/s{waits})"
                f" + answer {one.answer_s:.3g} ({length:.0f} tokens at"
                f" {1e3 * view.pace.step_s:.3g} ms × {one.crowd:.2f}) + others {one.others_s:.2g}")
        return lines


class Formula(Policy):
    """By a formula of SCORE_NAMES.  One that does not speak of the weight has it in the capacity
    or, where it does not ask for that either, as a share."""

    score: ClassVar[str]

    def __init__(self, s: Settings, score: str = "") -> None:
        super().__init__(s)
        self.text = score or self.score
        self.names, self.values_of = compiled(self.text)
        columns = SCORES if self.weighs and "weight" not in self.names else SCORES | UNWEIGHED
        self.columns = [columns[name] for name in self.names]
        self.shares = self.weighs and not {"weight", "capacity"} & {*self.names}

    def costs(self, eligible: Eligible) -> list[float]:
        costs: list[float] = self.values_of([column(eligible) for column in self.columns])
        if not self.shares:
            return costs
        return [cost / view.settings.weight if cost > 0 else cost * view.settings.weight
                for cost, view in zip(costs, eligible.views)]

    def terms(self, eligible: Eligible) -> list[str]:
        """The formula with a number behind each name."""
        named, lines = not self.weighs or "weight" in self.names, []
        for view, *row in zip(eligible.views, *(column(eligible) for column in self.columns)):
            told = {name: f"{name} {value:.4g}" for name, value in zip(self.names, row)}
            line = re.sub(r"\w+", lambda name, told=told: told.get(name[0], name[0]), self.text)
            weight = view.settings.weight
            lines.append(line if named or weight == 1 else f"{line}, weight {weight:g}")
        return lines


SCORES: dict[str, Callable[[Eligible], Sequence[float]]] = {  # what each of SCORE_NAMES is
    "running": lambda e: [view.report.load.running or 0 for view in e.views],
    "waiting": lambda e: [view.report.load.waiting or 0 for view in e.views],
    "in_flight": lambda e: e.in_flight,
    "foreign": Eligible.foreign,
    "capacity": Eligible.sizes,
    "kv_usage": lambda e: [view.report.load.kv_usage_ratio or 0 for view in e.views],
    "pending": lambda e: e.pending,
    "prompt": lambda e: [e.call.prompt.tokens] * len(e.views),
    "cached": lambda e: e.cached,
    "speed": Eligible.relative_speeds,
    "weight": lambda e: [view.settings.weight for view in e.views],
    "slow_start": lambda e: e.slow_start or [1.0] * len(e.views),
}
UNWEIGHED = {"capacity": Eligible.capacities}  # where the weight counts apart, or not at all


@policy("least")
class Least(Formula):
    """How full it will be with this request."""

    score = "(in_flight + foreign + 1) / capacity / slow_start"


@policy("round_robin")
class RoundRobin(Policy):
    """In turn, by weight: each server's next turn comes after 1 / weight more."""

    tie = 1.0

    def __init__(self, s: Settings) -> None:
        super().__init__(s)
        self.turns: dict[str, float] = {}
        self.now = 0.0  # the turn that was taken last; who comes new, or again, begins here

    def costs(self, eligible: Eligible) -> list[float]:
        # In their order within a round: a millionth part of a turn apart.
        return [self.turn(view) + n * 1e-6 for n, view in enumerate(eligible.views)]

    def turn(self, view: ServerView) -> float:
        return max(self.turns.setdefault(view.id, self.now + 1 / view.settings.weight), self.now)

    def terms(self, eligible: Eligible) -> list[str]:
        return [f"its turn, weight {view.settings.weight:g}" for view in eligible.views]

    def chosen(self, view: ServerView) -> None:
        self.now = self.turn(view)
        self.turns[view.id] = self.now + 1 / view.settings.weight


@policy("random")
class Drawn(Policy):
    """By chance, by weight: the first to arrive of processes with these rates."""

    tie = 1.0

    def costs(self, eligible: Eligible) -> list[float]:
        return [eligible.draw.expovariate(view.settings.weight) for view in eligible.views]

    def terms(self, eligible: Eligible) -> list[str]:
        return [f"drawn, weight {view.settings.weight:g}" for view in eligible.views]


@policy("power_of_two")
class PowerOfTwo(Least):
    """Of two drawn by chance the less crowded."""

    def costs(self, eligible: Eligible) -> list[float]:
        count = len(eligible.views)
        drawn = eligible.draw.sample(range(count), min(2, count))
        return [cost if n in drawn else INFINITY for n, cost in enumerate(super().costs(eligible))]


LOAD_FACTOR = 1.25  # of the mean, the most that a server gets by hashing; as kubeai's and Envoy's


def hashed(key: bytes, views: Sequence[ServerView]) -> list[float]:
    """A cost for each server, by rendezvous hashing: a server more or less moves only its own keys.
    Larger ones get more, by their configured size: what is learned changes all the time."""
    out = []
    for view in views:
        weight = view.settings.weight * (view.configured or START_CAPACITY)
        digest = hashlib.blake2b(view.id.encode(), key=key, digest_size=8).digest()
        chance = (int.from_bytes(digest, "big") + 1) / 2**64
        out.append(-math.log(chance) / weight)
    return out


def bounded(costs: list[float], eligible: Eligible) -> list[float]:
    """The same costs, but servers that have more than their share of all requests, by capacity,
    come after all others: no key melts a server.  Under an eighth of its capacity none does."""
    loads, sizes = eligible.loads(), eligible.sizes()
    share = LOAD_FACTOR * (sum(loads) + 1) / sum(sizes)
    most = max(costs)
    return [cost if load < max(math.ceil(share * size), size / 8) else cost + most
            for cost, load, size in zip(costs, loads, sizes)]


class Hashed(Least):
    """The same server for the same key; without one, the least crowded."""

    def key(self, call: Call) -> bytes:
        raise NotImplementedError

    def tie_for(self, call: Call) -> float:
        return 1.0 if self.key(call) else self.tie

    def costs(self, eligible: Eligible) -> list[float]:
        if not (key := self.key(eligible.call)):
            return super().costs(eligible)
        digest = hashlib.blake2b(key, digest_size=32).digest()
        return bounded(hashed(digest, eligible.views), eligible)

    def terms(self, eligible: Eligible) -> list[str]:
        words = super().terms(eligible)
        return [f"hashed; {line}" for line in words] if self.key(eligible.call) else words


@policy("consistent_hash")
class ConsistentHash(Hashed):
    """By session."""

    def key(self, call: Call) -> bytes:
        return call.session.encode("utf-8", "surrogatepass")  # JSON may hold half a character


@policy("prefix")
class Prefix(Hashed):
    """By the prompt's first bytes."""

    def key(self, call: Call) -> bytes:
        model = (call.model or "").encode("utf-8", "surrogatepass")
        return model + call.prompt.first_hash if call.prompt.first_hash else b""


@policy("cache_aware")
class CacheAware(Policy):
    """As vllm-project/router's policy of that name: the server that knows most of the prompt if
    it knows enough, the least loaded one if not, or if loads are too unequal.  Without its traps:
    the absolute threshold is at most a server's capacity, equals are drawn, chats are seen."""

    uses = ("balance_abs_threshold", "balance_rel_threshold", "cache_threshold")

    def costs(self, eligible: Eligible) -> list[float]:
        s, cached = self.settings, eligible.cached
        loads = [load / view.settings.weight
                 for load, view in zip(eligible.loads(), eligible.views)]
        low, high, known = min(loads), max(loads), max(cached)
        most = min(s.balance_abs_threshold, eligible.views[loads.index(high)].capacity)
        unequal = high - low > most and high > low * s.balance_rel_threshold
        if unequal or known <= s.cache_threshold * eligible.call.prompt.tokens:
            return loads
        return [load if tokens == known else INFINITY for load, tokens in zip(loads, cached)]

    def terms(self, eligible: Eligible) -> list[str]:
        tokens = eligible.call.prompt.tokens
        weights = [view.settings.weight for view in eligible.views]
        return [f"{load:.1f} requests / weight {weight:g}, {cached} of {tokens} tokens cached"
                for load, weight, cached in zip(eligible.loads(), weights, eligible.cached)]


@policy("lmetric")
class LMetric(Formula):
    """Prompt tokens to read × requests in the batch (arXiv 2603.15202); it needs no capacities."""

    score = "(pending + prompt - cached + 1) * (in_flight + foreign + 1) / weight"


@policy("mvllm")
class Mvllm(Formula):
    """As mvllm, bit for bit: any server under 0.5, else the lowest; by the last report alone."""

    weighs, tie = False, 1.0
    score = ("(running + 0.5 * waiting) / capacity"
             " if (running + 0.5 * waiting) / capacity >= 0.5 else 0")


@policy("vllm_router")
class VllmRouter(Formula):
    """As mvllm's predecessor: the lowest, a running request counting three times."""

    weighs, tie = False, 1.0
    score = "(3 * running + waiting) / capacity"


@policy("expression")
class Expression(Formula):
    """By a formula of the user's own, the setting `score`."""

    uses = ("score",)

    def __init__(self, s: Settings) -> None:
        super().__init__(s, s.score)


# ============================================================================================
#  28  ranking
# ============================================================================================
#
# Who may be asked, who is asked, and why.  Some servers are excluded for a reason of their own; of
# the rest a pool is drawn, those that have the adapter loaded come first, then the lowest tier;
# the policy chooses among what is left.


class Wanted(NamedTuple):
    """What a server is to be found for."""

    call: Call
    tried: frozenset[str] = frozenset()  # servers that are not asked again
    pinned_to: str = ""  # the only server, or engine, that may be asked
    by_name: bool = False  # and it is no work of its engine
    role: str = ""  # only servers of that one; else those that decode, as long as one can be asked


class Candidate(NamedTuple):
    """A server in a ranking: with its cost, or excluded for a reason."""

    name: str
    cost: float
    reason: str


class Ranking(NamedTuple):
    """The judgement on one call at one moment.  `best` is the server to ask, or None."""

    best: str | None
    views: list[ServerView]
    cached: list[int]
    reasons: Sequence[str]  # by view, why it is excluded, or ''
    eligible: Eligible  # the others
    costs: list[float]  # of those, in their order
    policy: Policy
    tried: frozenset[str]
    role: str = ""  # in which it is asked
    asked: ServerView | None = None  # the best one's view,
    expected: int = 0  # and what it has probably cached
    behind: bool = False  # others have been waiting for the same

    @property
    def call(self) -> Call:
        return self.eligible.call

    @property
    def moment(self) -> Moment:
        return self.eligible.moment

    def server_of(self, id: str) -> str:
        """The id of the server that an engine belongs to; a server's own."""
        return next((view.server for view in self.views if view.id == id), id)

    @property
    def server(self) -> str:
        """The id of the server to ask, also where `best` is an engine."""
        return self.asked.server if self.asked else ""

    @property
    def basis(self) -> str:
        """What decided, in a word."""
        if len(self.costs) == 1:
            return "alone"
        return "cache" if self.expected and self.expected == max(self.cached) else "load"

    @property
    def waits(self) -> bool:
        """Whether a server that is full now would take the call."""
        if not self.moment.enforced:
            return False
        anyhow = self.moment._replace(enforced=False)
        return self.behind or not all(
            exclusions(self.views, self.call.model, self.tried, anyhow, self.role))

    @property
    def has_room(self) -> bool:
        """Whether a server that is well, and has not failed just now, has room for the call; in
        the queue it waits for that."""
        if self.best is None:
            return self.waits
        return any(view.healthy and not view.health.request_failures
                   and view.has_room(self.moment.now) for view in self.eligible.views)

    def as_short(self, id: str) -> frozenset[str]:
        """The servers that take no longer prompts than this one."""
        model, views = self.call.model, self.views
        context = {view.server: view.context(model) for view in views if view.has(model)}
        most = context.get(self.server_of(id), INFINITY)
        return frozenset(v.server for v in views if context.get(v.server, 0.0) <= most)

    @property
    def undecided(self) -> bool:
        """Whether a server that was not checked yet may still turn out to be the one."""
        return any(v.health.state is State.CHECKING and v.open for v in self.views)

    @property
    def unheard_of(self) -> bool:
        """Whether a model is wanted that no server has told of."""
        model = self.call.model
        return model is not None and not any(model in (v.models or ()) for v in self.views)

    def worded(self, cost: float) -> str:
        return f"{cost:.3g} s" if self.policy.in_seconds else f"cost {cost:.4g}"

    def candidates(self) -> list[Candidate]:
        """Every server with its reason, best first.  Made only when somebody asks."""
        judged = {view.id: (cost, f"{self.worded(cost)} = {terms}") for view, cost, terms
                  in zip(self.eligible.views, self.costs, self.policy.terms(self.eligible))}
        rows = [(view.id, Candidate(view.name, *judged.get(view.id, (INFINITY, reason))))
                for view, reason in zip(self.views, self.reasons)]
        rows.sort(key=lambda row: (row[0] != self.best, row[1].cost))
        return [candidate for _, candidate in rows]

    def why(self) -> str:
        """The choice in one line, for who asks; in a field's characters."""
        if self.best is None:
            return "no server"
        first, *others = self.candidates()
        words = f"{first.name} {first.reason}"
        if others and others[0].cost < INFINITY and first.cost > 0:
            times = others[0].cost / first.cost
            more = self.worded(others[0].cost) if self.policy.in_seconds else f"×{times:.1f}"
            words += f"; next {others[0].name} {more}"
        words = " ".join(words.replace("×", "x").split())
        return words.encode("ascii", "backslashreplace").decode()

    def missed_tokens(self) -> int:
        """How many more tokens of the prompt another server that might have been asked has."""
        return max(self.eligible.cached, default=self.expected) - self.expected

    def refusal(self, name_servers: bool) -> tuple[Fault, str]:
        """Why no server can take the call: the model is nobody's, or each server's reason."""
        views, model = [view for view in self.views if not view.draining], self.call.model
        if not views:
            return Fault.NO_SERVER, "There is no server."
        known = {name for view in views for name in view.models or ()}
        told = [view.models is not None for view in views]
        # Who has never told any is not waited for for ever.
        awaited = any(v.models is None and v.health.state is not State.UNHEALTHY for v in views)
        if model is not None and self.unheard_of and any(told) and not awaited:
            more = f" {told.count(False)} of the servers never told its models." * (not all(told))
            return Fault.UNKNOWN_MODEL, unknown_model(model, known) + more
        reasons = "; ".join(f"{row.name if name_servers else f'server {n}'} {row.reason}"
                            for n, row in enumerate(self.candidates(), 1))
        what = "this request" if model is None else f"the model `{model[:200]}`"
        return Fault.NO_SERVER, f"No server can serve {what} now: {reasons}."


def exclusions(
    views: list[ServerView], model: str | None, tried: frozenset[str], moment: Moment,
    role: str = "",
) -> list[str]:
    """For each server the reason why it is not eligible, or ''.  One that has not told its models
    is asked only when no other is known to have this one; and when nothing but open circuits or
    troubled checks keep the last ones out, they are asked after all.  Prefill servers get a whole
    request only where none that decodes is well, those of a `role` nothing of another."""
    if {view.settings.role for view in views} == {"both"}:
        return exclusions_of_any(views, model, tried, moment)
    other = {"prefill": "decode"}.get(role, "prefill")
    fit = [view for view in views if view.settings.role != other]
    if not (role or any(view.available and view.has(model) for view in fit)):
        return exclusions_of_any(views, model, tried, moment)
    found = iter(exclusions_of_any(fit, model, tried, moment))
    return [f"is for {other} only" if view.settings.role == other else next(found)
            for view in views]


def exclusions_of_any(
    views: list[ServerView], model: str | None, tried: frozenset[str], moment: Moment
) -> list[str]:
    """The same, whatever role servers have."""
    trials = {view.settings.id for view in views if view.counts.on_trial}
    reasons = [exclusion_reason(view, model, tried, moment, trials) for view in views]
    if all(reasons) and any(view.health.may_be_last_resort and not view.healthy for view in views):
        ever = moment._replace(enforced=False)
        if all(exclusion_reason(view, model, frozenset(), ever, trials) for view in views):
            # Of a model that nobody has told of nothing is guessed.
            told = [view.models for view in views if view.models]
            guess = model is None or not told or any(model in models for models in told)
            needed = [guess or view.models is not None for view in views]
            return [exclusion_reason(view, model, tried, moment, trials, last) and reason
                    for view, reason, last in zip(views, reasons, needed)]
    if model is not None and any(v.models and not reason for v, reason in zip(views, reasons)):
        return [reason or ("has not told its models" if view.models is None else "")
                for view, reason in zip(views, reasons)]
    return reasons


def exclusion_reason(
    view: ServerView, model: str | None, tried: frozenset[str], moment: Moment,
    trials: Iterable[str] = (), needed: bool = False,
) -> str:
    """The reason why one server is not eligible by itself, or ''.  An unhealthy one that might
    answer is where it is `needed`, or half-open with no request on trial (`trials` have one)."""
    health = view.health
    if not view.open:
        return ("is draining" if view.draining else "was drained by hand" if view.drained
                else "has weight 0")
    if health.state is not State.HEALTHY:
        trial = health.circuit(moment.now) == "half-open" and view.server not in trials
        if not (health.may_be_last_resort and (needed or trial and not health.failures)):
            return f"is {health.state.value} ({health.reason})"
    if not view.has(model):
        return f"does not serve {shown(model)}"
    if view.report.load.asleep:
        return "is asleep"
    if not view.share:
        return f"gets none: its pool has 0 % ({view.settings.pool or 'of no pool'})"
    if moment.enforced and view.full(moment.now, moment.interval_s):
        return f"is full ({view.counts.in_flight} of {view.limit:.4g})"
    return "was tried already" if tried and view.settings.id in tried else ""


Preference = tuple[str, Callable[[ServerView], bool]]  # why others are passed over, who is not


def apply_preferences(
    views: Sequence[ServerView], reasons: list[str], call: Call, moment: Moment, draw: random.Random
) -> None:
    """Gives a reason to servers that are eligible, but passed over now for better ones."""
    for why, wanted in preferences(views, reasons, call, moment, draw):
        rest = [n for n, reason in enumerate(reasons) if not reason]
        others = [n for n in rest if not wanted(views[n])]
        for n in others if len(others) < len(rest) else ():
            reasons[n] = why


def preferences(
    views: Sequence[ServerView], reasons: list[str], call: Call, moment: Moment, draw: random.Random
) -> Iterator[Preference]:
    """What is preferred; each is to be applied before the next is asked for."""
    model, now, interval_s = call.model, moment.now, moment.interval_s
    tokens = call.prompt.tokens * ESTIMATE_ROOM
    too_long = tokens > shortest_context(views, model)
    if not too_long and not any(depends_on_the_moment(view, now) for view in views):
        return

    def left() -> list[ServerView]:
        return [view for view, reason in zip(views, reasons) if not reason]

    def roomy(view: ServerView) -> bool:
        return view.counts.in_flight + view.foreign(now, interval_s) < view.limit

    if too_long:
        least = min(tokens, max((view.context(model) for view in left()), default=0.0))
        yield (f"has a context that may be too short for about {call.prompt.tokens} tokens",
               lambda view: view.context(model) >= least)
    yield "said that it is busy just now", lambda view: view.busy_until <= now
    shares = {view.settings.pool: view.share for view in left()}
    if len(shares) > 1:
        pool = drawn_pool(shares, call, draw)
        yield f"pool {pool or 'none'} was drawn", lambda view: view.settings.pool == pool
    yield "has the adapter not loaded", lambda view: (
        model in view.load.adapters and view.reports(now, interval_s) and roomy(view))
    if tiers := [view.settings.tier for view in left() if roomy(view)]:
        tier = min(tiers)
        yield f"tier {tier} has room", lambda view: view.settings.tier == tier


def drawn_pool(shares: Mapping[str, float], call: Call, draw: random.Random) -> str:
    """The pool that is drawn by these shares; a session stays with its own."""
    at = draw.random()
    if call.session:
        digest = hashlib.blake2b(call.session.encode("utf-8", "surrogatepass"), digest_size=8)
        at = int.from_bytes(digest.digest(), "big") / 2**64
    pools = sorted(shares)
    ends = list(itertools.accumulate(shares[pool] for pool in pools))
    return pools[min(bisect.bisect(ends, at * ends[-1]), len(pools) - 1)]


class Lasting(NamedTuple):
    """What holds for all calls for a model until a server changes in more than its counts."""

    reasons: list[str] | None  # to exclude servers; None: they depend on the moment, or on chance
    context: float  # shorter prompts fit every server that has the model
    steady_since: float  # since when the first of its servers is there
    changed_at: float  # when the last one became what it is


def lasting_of(fleet: Fleet, model: str | None, moment: Moment) -> Lasting:
    """Made anew, and kept with the fleet."""
    views, reasons = fleet.views(), None
    lasts, steady_since, changed_at = True, INFINITY, -INFINITY
    for view in views:
        health = view.health
        if lasts and (health.open_until is not None or depends_on_the_moment(view, moment.now)):
            lasts = False
        changed_at = max(changed_at, health.since)
        if health.state is State.HEALTHY and view.open and view.has(model):
            steady_since = min(steady_since, health.since)
    if lasts:
        reasons = exclusions(views, model, frozenset(), moment._replace(enforced=False))
    found = Lasting(reasons, shortest_context(views, model), steady_since, changed_at)
    if model is None or fleet.knows(model):  # of which there are not too many
        fleet.derived[model] = found
    return found


def slow_starts(views: Sequence[ServerView], moment: Moment, steady_since: float) -> list[float]:
    """The share of its capacity that each gets since it came back.  Those that come together with
    the first have all: nobody is there to spare them work."""
    now, slow_start_s = moment.now, moment.slow_start_s
    return [1.0 if view.health.since - steady_since < slow_start_s
            else view.slow_start_share(now, slow_start_s) for view in views]


def rank(fleet: Fleet, wanted: Wanted, by: Policy, moment: Moment, draw: random.Random) -> Ranking:
    """The best server for a call; once for each attempt."""
    call, pinned_to, tried, role = wanted.call, wanted.pinned_to, wanted.tried, wanted.role
    views, cached = fleet.views(moment.now), fleet.cached(call.prompt)
    lasting = fleet.derived.get(call.model) or lasting_of(fleet, call.model, moment)
    reasons = lasting.reasons
    if pinned_to:
        kept = [n for n, view in enumerate(views) if pinned_to in (view.id, view.server)]
        views, cached, reasons = [views[n] for n in kept], [cached[n] for n in kept], None
        if wanted.by_name:  # nor does it take a place there
            views, moment = [v.by_name for v in views], moment._replace(enforced=False)
    if (reasons is None or tried or role or moment.enforced
            or call.prompt.tokens * ESTIMATE_ROOM > lasting.context):
        reasons = exclusions(views, call.model, tried, moment, role)
        apply_preferences(views, reasons, call, moment, draw)
    left, having = views, cached
    if any(reasons):
        left = [view for view, reason in zip(views, reasons) if not reason]
        having = [tokens for tokens, reason in zip(cached, reasons) if not reason]
    shares = (slow_starts(left, moment, lasting.steady_since)
              if moment.now - lasting.changed_at < moment.slow_start_s else [])
    # Who decodes gets the prompt as others have read it; who reads one says a single token.
    known = [call.prompt.tokens] * len(left) if role == "decode" else having
    length = 1.0 if role == "prefill" else fleet.answers.get(call.model)
    eligible = Eligible(left, list(map(IN_FLIGHT_OF, left)), list(map(PENDING_OF, left)),
                        known, shares, call, moment, draw, length)
    if not left:
        return Ranking(None, views, cached, reasons, eligible, [], by, tried, role)
    costs = by.costs(eligible)
    at = lowest_of(costs, by.tie_for(call), draw)
    best = left[at]
    return Ranking(best.id, views, cached, reasons, eligible, costs, by, tried, role, best,
                   having[at])


# ━━━ part V: answering ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  29  queue
# ============================================================================================
#
# Requests that wait for a server with room, and how many retries the fleet can afford.

BUDGET_SPAN_S = 10
BUDGET_FLOOR = 10
DRAIN_MEMORY_S = 20.0  # over which the rate of free places is measured


class RetryBudget:
    """Retries that are not free may add only a share to requests: no failing fleet is hammered."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()  # [second, requests, retries] of each

    def _second(self, now: float) -> list[int]:
        while self._seconds and self._seconds[0][0] <= now - BUDGET_SPAN_S:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0])
        return self._seconds[-1]

    def came(self, now: float) -> None:
        """A request has come."""
        self._second(now)[1] += 1

    def spend(self, now: float, share: float) -> bool:
        """Count one more retry, if it may be made.  Returns whether it may."""
        second = self._second(now)
        _, requests, retries = map(sum, zip(*self._seconds))
        if retries >= max(BUDGET_FLOOR, share * requests):
            return False
        second[2] += 1
        return True


# A model, maybe of one server, not of those tried, maybe of a role.
Wants = tuple[str | None, str, frozenset[str], str]


class Waiter(NamedTuple):
    """A request in the queue.  `choose` says which server has a place for it now, if one has;
    `take` is told the ranking by which it has it, or that there is nothing left to wait for."""

    since: float
    wants: Wants
    choose: Callable[[], Ranking]
    take: Callable[[Ranking], object]
    fail: Callable[[Exception], object]


class WaitQueue:
    """Requests that wait for a place, in a line for each thing wanted.  A place that becomes free
    is taken at once, by the one that waits longest of all who can use it."""

    def __init__(self) -> None:
        self._lines: dict[Wants, deque[Waiter]] = {}
        self._served, self._served_at = 0.0, 0.0  # places that became free, fading
        self._since = INFINITY  # when they began to be counted

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def waiting(self, wants: Wants) -> bool:
        return wants in self._lines

    def longest_wait_s(self, now: float) -> float:
        return max((now - line[0].since for line in self._lines.values()), default=0.0)

    def join(self, waiter: Waiter) -> None:
        self._since = min(self._since, waiter.since)
        self._lines.setdefault(waiter.wants, deque()).append(waiter)

    def leave(self, waiter: Waiter) -> None:
        """It has its place, or no need of one any more."""
        if line := self._lines.get(waiter.wants):
            with contextlib.suppress(ValueError):
                line.remove(waiter)
            if not line:
                del self._lines[waiter.wants]

    def hand_over(self, more: Callable[[], bool] = lambda: True) -> None:
        """Give free places to those who wait, as long as there may be `more`."""
        heads = [(line[0].since, n, wants) for n, (wants, line) in enumerate(self._lines.items())]
        heapq.heapify(heads)
        while heads and more():
            _, n, wants = heapq.heappop(heads)
            waiter = self._lines[wants][0]
            try:
                ranking = waiter.choose()
                if ranking.best is None and ranking.waits:
                    continue  # nor has anybody else of that line a place
                self.leave(waiter)
                waiter.take(ranking)
            except Exception as error:  # its own request's mistake, and nobody else's
                self.leave(waiter)
                waiter.fail(error)
            if line := self._lines.get(wants):
                heapq.heappush(heads, (line[0].since, n, wants))

    def served(self, now: float) -> None:
        """A place has become free."""
        self._since = min(self._since, now)
        self._served = 1 + self._served * math.exp((self._served_at - now) / DRAIN_MEMORY_S)
        self._served_at = now

    def clears_in_s(self, now: float) -> int:
        """How soon a request that came now might have its turn, by the rate of late: 1 to 60 s.
        Without a rate, about as long again as the first has waited so far."""
        served = self._served * math.exp((self._served_at - now) / DRAIN_MEMORY_S)
        counted_s = DRAIN_MEMORY_S * -math.expm1((self._since - now) / DRAIN_MEMORY_S)
        known = served >= 1 and counted_s > 0
        seconds = (len(self) + 1) * counted_s / served if known else self.longest_wait_s(now)
        return math.ceil(min(60.0, max(1.0, seconds)))


# ============================================================================================
#  30  poison
# ============================================================================================
#
# Content with which servers have died, and servers that failed with a request which may be to
# blame itself.

DEADLY = 2  # deaths of servers, after which content is not sent to another
DIED_TWICE = ("Two servers have died with this request or one of the same content; it is not sent"
              " to another for now.")
POISON_LIMIT = 1000  # contents with which servers have died that are remembered,
POISON_MEMORY_S = 600.0  # and how long: after a hold, one more death is enough for the next
TEST_LIMIT_S = 10.0  # for which content with one death waits for another of the same
KEPT_CONTENT_BYTES = 2048  # of content kept while its answer streams, in case it needs a digest
WHOLE_DIGEST_BYTES = 64 * 1024  # longer content is known by its ends and its length
BOUNDARY_LIMIT = 74  # with the dashes before it and the line's end, RFC 2046 §5.1.1


def digest_of(path: str, content: Content) -> bytes:
    """What content for a path is known by; made once a request has failed, in 0.1 ms at most."""
    half = WHOLE_DIGEST_BYTES // 2 if len(content) > WHOLE_DIGEST_BYTES else 0
    ends = [content[:half], content[-half:]]
    if content[:2] == b"--":  # a form, whose boundary is drawn anew for each retry
        boundary = bytes(content[:BOUNDARY_LIMIT]).partition(b"\r\n")[0]
        ends = [end.replace(boundary, b"--") for end in ends]
    start = f"{path} {len(content)}\0".encode()
    return hashlib.blake2b(b"".join((start, *ends)), digest_size=16).digest()


class Poison:
    """Contents with which servers have died one after another, by their digests.  A death counts
    where the content was sent after the last one.  A first success ends what is said of it."""

    def __init__(self) -> None:
        self.deaths: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # how many, the last

    def died(self, content: bytes, sent_at: float, now: float) -> int:
        """A server has died with that content.  Returns how many have."""
        count, last_at = self.deaths.get(content, (0, -INFINITY))
        if sent_at >= last_at:
            self.deaths[content] = count, last_at = count + 1, now
            self.deaths.move_to_end(content)
            if len(self.deaths) > POISON_LIMIT:
                self.deaths.popitem(last=False)
        return count

    def holds(self, content: bytes, now: float, hold_s: float) -> bool:
        """Whether that content is held off; forgets those of long ago."""
        oldest = now - max(POISON_MEMORY_S, hold_s)
        while self.deaths and next(iter(self.deaths.values()))[1] < oldest:
            self.deaths.popitem(last=False)
        count, last_at = self.deaths.get(content, (0, -INFINITY))
        return count >= DEADLY and now - last_at < hold_s

    def knows(self, content: bytes) -> bool:
        """Whether a server has died with that content, which is sent to one at a time then."""
        return content in self.deaths

    def succeeded(self, content: bytes) -> None:
        self.deaths.pop(content, None)


class Suspect(NamedTuple):
    """A server that failed with a request, which may be the request's failure."""

    server: str  # its id, or its engine's
    text: str
    told: bool  # its health knows, and takes it for one of that content


def to_blame(suspects: Sequence[Suspect], went_well: bool) -> list[Suspect]:
    """Of the servers that failed with a request those whose failure it was: all, when another did
    well with it; else one that stands alone, unless its health knows already."""
    if went_well:
        return list(suspects)
    return [one for one in suspects if not one.told and len(suspects) == 1]


# ============================================================================================
#  31  plans
# ============================================================================================
#
# How a call is answered.  A plan is a generator: it yields one step, is told its outcome, and
# yields the next.  It holds no socket, so retry and failover are tested as tables of outcomes and
# steps.  The exchange is the only driver.

SEARCH_LIMIT = 8  # servers that are asked for a response when nobody remembers who made it


class Held(NamedTuple):
    """A server's answer that was not shown yet, because another server may do better."""

    server: str  # its id, or its engine's
    head: ResponseHead
    length: Length
    content: bytes


class Outcome(NamedTuple):
    """What became of a step; without a fault it went well."""

    fault: Fault | None = None
    text: str = ""
    committed: bool = False  # the client has seen a part of the answer
    held: Held | None = None
    lease: Lease | None = None  # of Queue: with the server that has room now,
    ranking: Ranking | None = None  # and why it is that one
    deaths: int = 0  # of Relay: how many servers have died with that content, this one, too
    went_on: bool = False  # of Resume: something new was shown
    prospect: Prospect | None = None  # of Recall: whether the answer can go on, and how


class Relay(NamedTuple):
    """Ask the server that the ranking names best and, if its answer is one, pass it on."""

    server: str  # its id, or its engine's
    request: OutboundRequest
    ranking: Ranking
    lease: Lease | None
    attempt: int  # from 1

    @property
    def has_larger(self) -> bool:
        """Whether another server takes longer prompts than this one."""
        servers = {view.server for view in self.ranking.views}
        return len(self.ranking.as_short(self.server)) < len(servers)


class Recall(NamedTuple):
    """Look how an answer that was begun, and broke like this, could go on at another server."""

    outcome: Outcome


class Resume(NamedTuple):
    """Have another server go on with an answer that broke."""

    relay: Relay
    way: Way


class Pause(NamedTuple):
    """Wait before the next attempt."""

    seconds: float


class Queue(NamedTuple):
    """Wait in the queue until a server, of that role, has room."""

    tried: frozenset[str]
    role: str = ""


class AwaitHealth(NamedTuple):
    """Wait until more is known about the fleet; a fault once the request is this old."""

    seconds: float


class Refresh(NamedTuple):
    """Have the servers asked for their models once more, since nobody has told of this one."""

    model: str


class GiveUp(NamedTuple):
    """End with this failure: the server's own words if they were held, else ours."""

    outcome: Outcome


class BreakOff(NamedTuple):
    """End an answer that was begun and cannot be finished so that nobody takes it for whole; `why`
    says in a word why no other server goes on."""

    outcome: Outcome
    why: str = ""


Step = Relay | Recall | Resume | Pause | Queue | AwaitHealth | Refresh | GiveUp | BreakOff
Plan = Generator[Step, Outcome, None]
Choose = Callable[[frozenset[str]], Ranking]  # ranks the fleet, passing over those tried
WELL = Outcome()
# The server cannot do what is asked for, though others may; it is not asked again.
LACKING = (Fault.NOT_THERE, Fault.KEY_REJECTED)
# The request was no work for the server.
UNHEARD = (Fault.CONNECT_FAILED, Fault.CONNECT_TIMEOUT, Fault.CONTEXT_LENGTH_EXCEEDED, *LACKING)
# The client was shown the server's own words for what went wrong.
SAID_BY_SERVER = (Fault.SERVER_ERROR, Fault.STREAM_FAILED)


class Planner(Protocol):
    """Makes plans for a running balancer; what it remembers lasts as long as settings want it."""

    def plan(self, exchange: Any, request: OutboundRequest, otherwise: Plan) -> Plan:
        """The plan for a request: one of its own, that may go on as it goes `otherwise`, or that.
        `exchange` has the request's call, settings and ranking."""


class Planning(NamedTuple):
    """Other plans than those of this room."""

    wanted: Callable[[Settings], bool]  # asked when settings come into force
    planner: Callable[[Any], Planner]  # of the Core; made when it is wanted first


# Rooms further on that have plans of their own add a row, by name.  A plan of a later row goes on
# as one of an earlier row, which goes on as `relay_plan` does.
PLANS: dict[str, Planning] = {}


class Retries:
    """Which servers a request has tried, and whether it may try another one."""

    def __init__(
        self, choose: Choose, s: Settings, draw: random.Random, afford: Callable[[], bool]
    ) -> None:
        self.choose, self.settings, self._draw, self._afford = choose, s, draw, afford
        self.attempts = 0
        self.tried = frozenset[str]()
        self.lacking = frozenset[str]()  # of these, those that lack what is wanted

    def ranked(self, failure: Outcome) -> Generator[Step, Outcome, Ranking | None]:
        """The ranking for the next attempt, after that failure; None if there is to be none."""
        self.attempts += 1
        fault = failure.fault
        if fault is None:
            return (yield from first_ranking(self.choose, self.settings))
        ranking = self.choose(self.tried)
        again = ranking.best is None and not ranking.waits  # only those are left that failed
        if again and fault.retry in (Retry.ELSEWHERE, Retry.LARGER):
            return None
        if not is_free(fault, self.attempts - 1, ranking) and not self._afford():
            return None
        if again or not (fault.retry is Retry.AT_ONCE or fault in UNHEARD):
            yield Pause(backoff_s(self.attempts - 2, self.settings, self._draw))
            ranking = self.choose(self.lacking if again else self.tried)
        return ranking

    def record_attempt(self, outcome: Outcome, ranking: Ranking) -> bool:
        """Counts the server ranked best, with all its engines, among those tried.  Returns whether
        another attempt may follow one of that outcome."""
        fault, server = outcome.fault, ranking.server
        self.tried |= {server}
        if fault in LACKING and len(self.lacking) < SEARCH_LIMIT:
            self.lacking |= {server}
            return True
        if fault is Fault.CONTEXT_LENGTH_EXCEEDED:
            self.tried |= ranking.as_short(ranking.best or "")
        return fault is not None and may_retry(fault, self.settings) and self.left > 0

    @property
    def left(self) -> int:
        """How many more attempts there may be."""
        return self.settings.max_retries + 1 - (self.attempts - len(self.lacking))


def relay_plan(request: OutboundRequest, retries: Retries) -> Plan:
    """One good answer from one server; others are asked as long as nothing was shown.  One that
    failed is not asked again while there is another, and one that lacks what is wanted not at all:
    that is no failure, and shown only if nobody has it."""
    failure, s = WELL, retries.settings
    while (ranking := (yield from retries.ranked(failure))) is not None:
        ranking, found = yield from given_room(ranking, retries.choose, retries.lacking, s)
        if found.fault is not None:
            failure = failure if failure.held else found
            break
        outcome = yield Relay(ranking.best or "", request, ranking, found.lease, retries.attempts)
        if outcome.committed and outcome.fault is not None:
            yield from resume_plan(request, retries, outcome, ranking)
        if outcome.committed or outcome.fault is None:
            return
        goes_on = retries.record_attempt(outcome, ranking)
        if outcome.fault in LACKING and goes_on:
            failure = outcome if failure.fault in (None, *LACKING) else failure
            continue
        follows = failure.fault is outcome.fault is Fault.SERVER_FAILED  # the request, anywhere
        failure = outcome
        if failure.deaths >= DEADLY:
            failure = Outcome(Fault.SERVER_DIED_TWICE, DIED_TWICE)
            break
        if follows or not goes_on:
            break
    yield GiveUp(failure)


def resume_plan(
    request: OutboundRequest, retries: Retries, broken: Outcome, ranking: Ranking
) -> Plan:
    """An answer that broke after its beginning goes on at another server, or breaks off.  One that
    does not begin is followed by the next; one that breaks before anything new was shown, or says
    something else, is the last."""
    failure = last = broken
    why = "died_twice" if broken.deaths >= DEADLY else ""
    while not why:
        retries.tried |= {ranking.server}
        found = (yield Recall(failure)).prospect or NO_STREAM
        ranking, room = yield from resume_ranking(retries, found, last, ranking)
        if room.fault is not None or found.way is None:
            why = room.text
            break
        relay = Relay(ranking.best or "", request, ranking, room.lease, retries.attempts)
        last = yield Resume(relay, found.way)
        if last.fault is None:
            return
        if last.deaths >= DEADLY:
            failure, why = Outcome(Fault.SERVER_DIED_TWICE, DIED_TWICE, True), "died_twice"
        elif last.fault.retry is Retry.NEVER:
            failure, why = last, last.fault.label
        elif last.committed:
            failure, why = last, "" if last.went_on else "twice"
    yield BreakOff(failure, why)


def resume_ranking(
    retries: Retries, found: Prospect, failure: Outcome, ranking: Ranking
) -> Generator[Step, Outcome, tuple[Ranking, Outcome]]:
    """The ranking whose best server goes on, and the outcome of a wait for it; where there is none
    a fault, and why in a word."""
    if found.way is None or retries.left <= 0:
        return ranking, Outcome(failure.fault, "max_retries" if found.way else found.reason)
    another = yield from retries.ranked(failure)
    if another is None:
        return ranking, Outcome(failure.fault, "retry_budget")
    another, room = yield from given_room(
        another, retries.choose, retries.lacking, retries.settings)
    return another, room._replace(text=room.fault.label) if room.fault else room


def first_ranking(choose: Choose, s: Settings) -> Generator[Step, Outcome, Ranking]:
    """A ranking of servers of which enough is known."""
    ranking = choose(frozenset())
    while ranking.best is None and ranking.undecided:
        waited = yield AwaitHealth(s.health_check_timeout)
        ranking = choose(frozenset())
        if waited.fault is not None:
            break
    if ranking.best is None and ranking.unheard_of:
        yield Refresh(ranking.call.model or "")
        ranking = choose(frozenset())
    return ranking


def given_room(
    ranking: Ranking, choose: Choose, lacking: frozenset[str], s: Settings
) -> Generator[Step, Outcome, tuple[Ranking, Outcome]]:
    """The ranking whose best server has room, maybe after a wait in the queue; and the outcome."""
    waited = WELL
    if ranking.best is None and ranking.waits:
        waited = yield Queue(ranking.tried, ranking.role)
        if waited.fault is not None:
            return ranking, waited
        # Without a ranking the fleet has changed: all may be asked again.
        ranking = waited.ranking or choose(lacking)
    if ranking.best is None:
        return ranking, Outcome(*ranking.refusal(s.server_header))
    return ranking, waited


def search_plan(request: OutboundRequest, retries: Retries) -> Plan:
    """The server that has a stored response of which nobody remembers who made it: servers are
    asked in turn, until one has it.  One that died has lost it, one that is busy may have it; but
    a request that two servers have died of is not shown to a third."""
    choose, s = retries.choose, retries.settings
    tried, missing, failure, lost = frozenset[str](), WELL, WELL, 0
    for attempt in range(1, SEARCH_LIMIT + 1):
        ranking = choose(tried) if tried else (yield from first_ranking(choose, s))
        ranking, found = yield from given_room(ranking, choose, tried, s)
        if found.fault is not None:
            waited = found.fault in (Fault.QUEUE_FULL, Fault.QUEUE_TIMEOUT)
            failure, missing = (found, WELL) if waited or not tried else (failure, missing)
            break
        outcome = yield Relay(ranking.best or "", request, ranking, found.lease, attempt)
        if outcome.committed and outcome.fault is not None:
            yield BreakOff(outcome)
        if outcome.fault is None or outcome.committed:
            return
        if outcome.fault is Fault.NOT_THERE:
            missing = missing if missing.fault else outcome
        elif not failure.held:
            failure = outcome
        lost += outcome.held is None and outcome.fault not in UNHEARD
        if max(lost, outcome.deaths) > 1 or not may_retry(outcome.fault, s):
            break
        tried |= {ranking.server}
    yield GiveUp(failure if failure.held or not missing.fault else missing)


def is_free(fault: Fault, retry: int, ranking: Ranking) -> bool:
    """Whether the n-th retry, from 1, can be no part of a storm: nobody heard the request, or it
    goes to a second server that is well and has room, or in place of an answer that was lost."""
    elsewhere = ranking.best is not None or ranking.waits
    lost = fault.retry is Retry.AT_ONCE
    return fault in UNHEARD or (retry == 1 and elsewhere and (lost or ranking.has_room))


def may_retry(fault: Fault, s: Settings) -> bool:
    return s.retry_timed_out if fault.retry is Retry.IF_ALLOWED else fault.retry is not Retry.NEVER


def backoff_s(retry: int, s: Settings, draw: random.Random) -> float:
    """The pause before the n-th retry, from 0: doubling, bounded, and drawn from its upper half."""
    longest: float = min(s.retry_delay * 2.0 ** min(retry, 60), s.retry_delay_max)
    return longest * draw.uniform(0.5, 1.0)


# ============================================================================================
#  32  client keys
# ============================================================================================
#
# Clients' keys, what each is using, and whose stored responses are.  Without keys the balancer is
# open, as mvllm is.  A key is compared by its digest, with all keys, in constant time.

RESPONSES_LIMIT = 20_000  # stored responses whose servers are remembered: some 8 MB at most


class Refusal(NamedTuple):
    """Why a request is turned away, as its client is told."""

    fault: Fault
    text: str
    retry_after_s: int = 0
    warning: str = ""  # for the operator
    fields: Pairs = ()  # of the response


class Keys:
    """The clients' keys, and what each is using: by name, so that it survives a reload."""

    def __init__(self) -> None:
        self.required = False  # or everybody may come in
        self._registration: bytes | None = None  # the digest of the key that registers servers
        self._keys: list[tuple[bytes, KeySettings]] = []
        self._running: dict[str, int] = {}
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, when

    def adopt(self, keys: Iterable[tuple[KeySettings, str]], registration: str = "") -> None:
        """Make these the keys, each with its secret; and the one that registers servers."""
        self._registration = digest(registration) if registration else None
        self._keys = [(digest(secret), key) for key, secret in keys]
        self.required = bool(self._keys)
        names = {key.name for _, key in self._keys}
        self._buckets = {name: left for name, left in self._buckets.items() if name in names}

    def authenticate(self, fields: Fields) -> KeySettings | None:
        """The key that a request shows, or None if it is not one of ours."""
        said = digest(key_in(fields))
        found = [key for known, key in self._keys if hmac.compare_digest(known, said)]
        return found[-1] if found else None

    def registers(self, fields: Fields) -> bool | None:
        """Whether a request shows the key that registers servers; None: there is none."""
        if (known := self._registration) is None:
            return None
        return hmac.compare_digest(known, digest(key_in(fields)))

    def admit(self, key: KeySettings, model: str | None, now: float) -> Refusal | None:
        """Let a request in, until its `release`, and return None; or return why not."""
        if key.models and model not in key.models:
            what = "a request without a model" if model is None else f"the model `{model[:200]}`"
            return Refusal(Fault.FORBIDDEN, f"The key {shown(key.name)} does not allow {what}.")
        running = self._running.get(key.name, 0)
        if 0 < key.max_requests <= running:
            text = f"has {key.max_requests} requests in progress, as many as it may"
            return Refusal(Fault.RATE_LIMITED, f"The key {shown(key.name)} {text}.", 1)
        if (rate := key.requests_per_second) > 0:
            most = max(1.0, rate)
            left, then = self._buckets.get(key.name, (most, now))
            left = min(most, left + rate * (now - then))
            if left < 1:
                text = f"The key {shown(key.name)} allows {rate:g} requests per second."
                return Refusal(Fault.RATE_LIMITED, text, math.ceil(min(3600.0, (1 - left) / rate)))
            self._buckets[key.name] = left - 1, now
        self._running[key.name] = running + 1
        return None

    def release(self, key: KeySettings) -> None:
        self._running[key.name] -= 1
        if not self._running[key.name]:
            del self._running[key.name]


class Stored(NamedTuple):
    """A response that a server may keep."""

    server: str
    key: str  # the name of the key that had it made; '' where that is not known, or there are none
    model: str


class StoredResponses:
    """Which server made which response, and for whom; of those that were used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Stored] = OrderedDict()  # by id

    def __len__(self) -> int:
        return len(self._known)

    def made(self, id: str, stored: Stored) -> None:
        """A server has made this response, or has it.  Who says another's id gets nothing."""
        known = self._known.setdefault(id, stored)
        if known.key == stored.key:
            self._known[id] = stored
            self._known.move_to_end(id)
        if len(self._known) > RESPONSES_LIMIT:
            self._known.popitem(last=False)

    def find(self, id: str) -> Stored | None:
        if id in self._known:
            self._known.move_to_end(id)
        return self._known.get(id)

    def forget(self, id: str) -> None:
        self._known.pop(id, None)

    def refusal(self, id: str, key: KeySettings | None) -> Refusal | None:
        """Why a key does not get it, in vLLM's words, or None: it is its maker's alone, and where
        that is not known, of no key that is for some models only."""
        maker = self._known[id].key if id in self._known else ""
        if key is None or maker == key.name or not (maker or key.models):
            return None
        return Refusal(Fault.UNKNOWN_RESPONSE, f"Response with id '{id[:200]}' not found.")


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def key_in(fields: Fields) -> str:
    """The key in a request: as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, secret = fields.get("authorization").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else fields.get("x-api-key")


# ============================================================================================
#  33  access
# ============================================================================================
#
# Who may come in, and to which path.  A browser on a machine that may come in carries the words of
# any page that is open in it, and its `Origin` and `Sec-Fetch-Site` tell whose (Fetch standard).  A
# page may give a name of its own our address (DNS rebinding), so what is for local people is asked
# for by a local name.
#
# To add a kind of path: a row of Kind, with the guards that may refuse it.

# Beside the one form whose model is read (multipart/form-data), servers may read these.
FORM_TYPES = re.compile(r"multipart/|x-www-form-urlencoded")
# Fields that vLLM's /invocations takes the model from, whatever the content says.
ADAPTER_FIELDS = "x-amzn-sagemaker-adapter-"


def is_trusted(host: str, networks: Iterable[str]) -> bool:
    """Whether an address is that of one of our own proxies."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network_of(network) for network in networks)


@functools.lru_cache
def network_of(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


class Audience(Enum):
    """Whom a listener serves, and whom a path is for."""

    EVERYBODY = "everybody"  # the only listener; what each has
    CLIENTS = "clients"
    OPERATORS = "operators"


def operator_address(s: Settings) -> tuple[str, int] | None:
    """Where operators are listened to; None for the same place as everybody else."""
    if not (s.operator_host or s.operator_port):
        return None
    return s.operator_host or "127.0.0.1", s.operator_port


Origin = tuple[str, str, str]  # scheme, host and port, RFC 6454 §4
WEB_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[^\[\]/:@?#,\s]+)(?::([0-9]*))?")


def web_origin(text: str) -> Origin | None:
    """The origin that a text names; None for `null`, pages from files, and whatever else no browser
    finds us by."""
    if (found := WEB_ORIGIN.fullmatch(text.lower())) is None:
        return None
    scheme, host, port = found.groups()
    return scheme, host, port or {"http": "80", "https": "443"}[scheme]


class Visit(NamedTuple):
    """A request at the door, as far as it decides whether that opens."""

    kind: Kind
    head: RequestHead
    has_content: bool
    peer: str  # its address
    tls: bool
    key: KeySettings | None  # that it shows, if it is one of ours
    keyed: bool  # whether there are [[keys]]
    settings: Settings
    audience: Audience = Audience.EVERYBODY  # of the listener
    registers: bool | None = None  # whether it shows the registration key; None: there is none
    hop: str = ""  # the address of a proxy that has said by the PROXY protocol who the peer is

    @property
    def is_trusted(self) -> bool:
        """Whether it comes from a proxy of ours."""
        return is_trusted(self.peer, self.settings.trusted_proxies)

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks on behalf of a page, which it does without a key."""
        return self.head.is_preflight and self.kind in FOR_PAGES

    def told(self, name: str, own: str) -> list[str]:
        """What a proxy of ours says in that field, and what the request itself says."""
        return [*(self.head.fields.members(name) if self.is_trusted else ()), own]

    def names(self) -> list[str]:
        """All that it calls us: with a page's own fields it might come as if by a proxy."""
        return self.told("x-forwarded-host", self.head.fields.get("host"))

    def origin(self) -> Origin | None:
        """The origin by which the client knows us, or None."""
        schemes = self.told("x-forwarded-proto", "https" if self.tls else "http")
        return web_origin(f"{schemes[0]}://{self.names()[0]}")

    def is_own(self, origin: str) -> bool:
        """Whether a page of that origin is ours."""
        ours = self.origin()
        return ours is not None and web_origin(origin) == ours


def ambiguous_path(v: Visit) -> Refusal | None:
    text = (f"The path is {shown(v.head.path)}, expected one without //, dot segments, ';',"
            " backslashes, controls and their escapes, or an escaped slash.")
    return Refusal(Fault.BAD_REQUEST, text)


def unknown_path(v: Visit) -> Refusal | None:
    why = "not served on this port"
    if v.kind is Kind.NOTHING:
        why = "neither an inference path of vLLM nor one of ours"
    return Refusal(Fault.NOT_SERVED, f"{shown(v.head.path)} is {why}.")


def foreign_page(v: Visit) -> Refusal | None:
    """Why what a browser sends is not from a page of ours, or from a person at it."""
    fields = v.head.fields.values
    site, origin = fields.get("sec-fetch-site", "none"), fields.get("origin")
    if site not in ("same-origin", "none"):
        text = f"Sec-Fetch-Site is {shown(site)}, expected same-origin or none."
    elif origin is None or v.is_own(origin):
        return None
    else:
        ours = v.origin()
        here = "{}://{}:{}".format(*ours) if ours else "unknown"
        text = f"Origin is {shown(origin)}, and this is {shown(here)}."
    return Refusal(Fault.FORBIDDEN, f"{v.head.path} is not for pages of other sites: {text}")


def foreign_websocket(v: Visit) -> Refusal | None:
    """Why a page may not open a websocket, which browsers let it do and read without asking us."""
    origin, allowed = v.head.fields.values.get("origin"), v.settings.cors_allowed_origins
    if origin is None or not v.head.wants_upgrade or v.is_own(origin):
        return None
    if "*" in allowed or origin in allowed:
        return None
    text = f"Origin is {shown(origin)}, which cors_allowed_origins does not name."
    return Refusal(Fault.FORBIDDEN, text)


# Fields by which proxies, tunnels and clouds tell of others.
PROXY_SIGN = re.compile(
    r"via|(?:x-)?forwarded(?:-.+)?|x-(?:original|envoy|azure|appengine|arr|cluster|proxy)[a-z]*-.+"
    r"|(?:x-)?(?:real|client|true-client|remote|originating)-(?:ip|addr)|(?:cf|fastly|ngrok)-.+"
    r"|tailscale-.+|x-amzn-trace-id|cdn-loop")
STRANGERS = ("a proxy on this machine passes on requests of others (it says %s): what is for this"
             " machine only is closed to them. If it says in X-Forwarded-For who asks, name it in"
             " trusted_proxies")


def remote_peer(v: Visit) -> Refusal | None:
    """Why a request may not be one from this machine, by a local name."""
    fields, why, warning = v.head.fields, "", ""
    signs = [key for key in fields.values if PROXY_SIGN.fullmatch(key)]
    if not all(is_trusted(host, LOOPBACK) for host in (v.peer, v.hop or v.peer)):
        why = ", as long as there are no [[keys]]" if v.kind is Kind.ADMIN else ""
    elif signs and not v.is_trusted:
        why = f"; {signs[0]} tells of a proxy that is not in trusted_proxies"
        warning = STRANGERS % signs[0]
    elif signs and not all_local(fields):
        why = ", and not for others whom a proxy speaks for"
    elif strangers := [name for name in v.names() if not is_local_name(name)]:
        why = f": Host is {shown(strangers[0])}, expected localhost or a loopback address"
    else:
        return None
    return Refusal(Fault.FORBIDDEN, f"{v.head.path} is for this machine only{why}.", 0, warning)


def is_local_name(authority: str) -> bool:
    found = web_origin(f"http://{authority}")
    return found is not None and (
        found[1].removesuffix(".") == "localhost" or is_trusted(found[1].strip("[]"), LOOPBACK))


def all_local(fields: Fields) -> bool:
    """Whether a proxy of ours says that it speaks for this machine, and nothing else."""
    hops = fields.members("x-forwarded-for")
    hosts = hops[:HOPS_LIMIT] + fields.members("x-real-ip")
    told = 0 < len(hops) <= HOPS_LIMIT and "forwarded" not in fields.values
    return told and all(is_trusted(host, LOOPBACK) for host in hosts)


def no_key(v: Visit) -> Refusal | None:
    if v.key is None:
        return Refusal(Fault.UNAUTHORIZED, "The request shows no API key that is known here.")
    return None


def not_admin(v: Visit) -> Refusal | None:
    if v.key is not None and not v.key.admin:
        return Refusal(Fault.FORBIDDEN, f"The key {shown(v.key.name)} is not an admin's.")
    return no_key(v)


def lacks_key(v: Visit) -> Refusal | None:
    return no_key(v) if v.keyed and not v.is_preflight else None


STATUS_GUARDS = {"key": no_key, "admin": not_admin, "loopback": remote_peer}  # by status_access


def may_not_see(v: Visit) -> Refusal | None:
    guard = STATUS_GUARDS.get(v.settings.status_access)
    return guard(v) if guard is not None else None


def may_not_open(v: Visit) -> Refusal | None:
    """Why the page is not shown, for which a browser asks without a key."""
    return remote_peer(v) if v.settings.status_access == "loopback" else None


def may_not_change(v: Visit) -> Refusal | None:
    return not_admin(v) if v.keyed else remote_peer(v)


def registrant_of(v: Visit) -> str:
    """The address of who registers; '' where it is hidden behind a proxy that is not ours."""
    hidden = not v.is_trusted and any(map(PROXY_SIGN.fullmatch, v.head.fields.values))
    return "" if hidden else client_address(v.peer, v.head.fields, v.settings.trusted_proxies)


def may_not_register(v: Visit) -> Refusal | None:
    host = registrant_of(v)
    if not is_trusted(host, v.settings.registration_networks):
        who = f"which {host} is not in" if host else "and a strange proxy hides who asks"
        text = f"{v.head.path} is for registration_networks, {who}."
        return Refusal(Fault.FORBIDDEN, text)
    if v.registers is None:
        return may_not_change(v)
    return None if v.registers else not_admin(v)


def escapes_key(v: Visit) -> Refusal | None:
    """Why a request cannot be held to what is its key's, or None: where a server may read another
    model than we do, or be told another one, or of another key's response, later."""
    if v.key is None:
        return None
    fields, upgrades = v.head.fields, v.head.wants_upgrade
    if upgrades and meant_path(v.head.path).startswith(RESPONSES_PATH):
        text = "A connection that is upgraded may go on from any key's stored response."
        return Refusal(Fault.FORBIDDEN, text)
    if not v.key.models:
        return None
    content_type = fields.get("content-type").lower()
    kinds = FORM_TYPES.findall(content_type)
    if kinds and not (content_type.startswith("multipart/form-data") and len(kinds) == 1):
        why = f"no model is read from content of the type {shown(fields.get('content-type'))}"
    elif said := next((name for name in fields.values if name.startswith(ADAPTER_FIELDS)), ""):
        why = f"{said} would name another"
    elif upgrades:
        why = "a connection that is upgraded may change its model at any time (session.update)"
    else:
        return None
    text = f"The key {shown(v.key.name)} is for some models only, and {why}."
    return Refusal(Fault.FORBIDDEN, text)


def not_json(v: Visit) -> Refusal | None:
    """Why content is refused that a browser would send for any page without asking first."""
    said = v.head.fields.get("content-type")
    if not v.has_content or said.partition(";")[0].strip(" \t").lower() == "application/json":
        return None
    return Refusal(Fault.NOT_JSON, f"Content-Type is {shown(said)}, expected application/json.")


Guard = Callable[[Visit], Refusal | None]


class Kind(Enum):
    """What a path is to those who ask for it: where there are two listeners, on which it is; what
    may refuse it, in this order; and whether an Exchange answers."""

    INFERENCE = "passed on", Audience.CLIENTS, (foreign_websocket, lacks_key, escapes_key), True
    MODELS = "the list of models", Audience.CLIENTS, (lacks_key,)
    PROBE = "liveness and readiness", Audience.EVERYBODY, (foreign_page,)
    PAGE = "the status page, which holds no fact", Audience.OPERATORS, (foreign_page, may_not_open)
    STATUS = "facts", Audience.OPERATORS, (foreign_page, may_not_see)
    EXPLAIN = ("what would be done with a request", Audience.OPERATORS,
               (foreign_page, lacks_key, may_not_see, escapes_key), True)
    ADMIN = "changes by hand", Audience.OPERATORS, (foreign_page, may_not_change, not_json)
    REGISTRATION = ("servers that say that they are there", Audience.EVERYBODY,
                    (foreign_page, may_not_register, not_json))
    CONTROL = ("one of admin_paths, passed on to one server", Audience.OPERATORS,
               (foreign_page, not_admin, escapes_key, not_json), True)
    AMBIGUOUS = "taken differently by two readers", Audience.EVERYBODY, (ambiguous_path,)
    NOTHING = "not served", Audience.EVERYBODY, (unknown_path,)

    def __init__(
        self, meaning: str, audience: Audience, guards: tuple[Guard, ...], is_exchange: bool = False
    ) -> None:
        self.meaning, self.audience = meaning, audience
        self.guards, self.is_exchange = guards, is_exchange

    __hash__ = object.__hash__  # as Fault's


FOR_PAGES = frozenset((Kind.INFERENCE, Kind.MODELS))  # of any web origin, as CORS allows


def refusal_of(v: Visit) -> Refusal | None:
    """Why a request does not come in, or None; which model it may use, the Keys say later."""
    audiences = v.audience, v.kind.audience
    if Audience.EVERYBODY not in audiences and v.audience is not v.kind.audience:
        return unknown_path(v)
    for guard in v.kind.guards:
        if (refusal := guard(v)) is not None:
            return refusal
    return None


def surely_comes_in(kind: Kind, fields: Fields, keyed: bool, audience: Audience) -> bool:
    """Whether nothing can be said against a request, as with most where there are no keys: it is
    for an engine, and no browser's.  That saves the look of each guard."""
    return (kind is Kind.INFERENCE and not keyed and "origin" not in fields.values
            and audience is not Audience.OPERATORS)


def open_line(s: Settings) -> str:
    """What it means that there are no keys."""
    pages = "; web pages of other origins may not (cors_allowed_origins)"
    if s.cors_allowed_origins:
        pages = f", and so may web pages of {', '.join(s.cors_allowed_origins)}"
    return f"there are no [[keys]]: whoever reaches this address may use the servers{pages}"


def client_address(peer: str, fields: Fields, networks: Sequence[str]) -> str:
    """Who asks: the peer or, behind proxies of ours, the last address before them."""
    if not networks or not is_trusted(peer, networks):
        return peer
    for host in reversed(fields.members("x-forwarded-for")[-HOPS_LIMIT:]):
        if not is_trusted(host, networks):
            return host[:100]
    return peer


# ━━━ part VI: what is counted ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  34  documents
# ============================================================================================
#
# What programs are shown: views in, JSON documents out.  They are supersets of mvllm's: its names,
# its types.


class Clock(NamedTuple):
    """A moment on both clocks, to show monotonic times as dates."""

    monotonic: float
    wall: float

    def iso(self, then: float | None) -> str | None:
        """A monotonic time as mvllm writes dates, local and ISO 8601; None for never."""
        if then is None or then == -INFINITY:
            return None
        at = self.wall - self.monotonic + then
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(at))}.{int(at % 1 * 1e6):06d}"


def explain_report(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """/explain: how a server was chosen, attempt by attempt, with every term."""
    return {"attempts": [ranking_report(ranking) for ranking in rankings]}


def ranking_report(ranking: Ranking) -> dict[str, Any]:
    cached = {view.name: count for view, count in zip(ranking.views, ranking.cached)}
    rows = [{"url": name, "cost": cost if cost < INFINITY else None, "reason": reason,
             "cached_tokens": cached[name]} for name, cost, reason in ranking.candidates()]
    return {
        "policy": ranking.policy.name, "model": ranking.call.model,
        "chosen": ranking.asked and ranking.asked.name,
        "why": ranking.why(), "prompt_tokens": ranking.call.prompt.tokens,
        "session": bool(ranking.call.session), "queued": ranking.best is None and ranking.waits,
        "servers": rows,
    }


def service_report() -> dict[str, Any]:
    """GET / — as mvllm's, under our name."""
    return {"service": "mvllm_lite", "version": __version__, "status": "running"}


def health_report(views: list[ServerView], s: Settings, clock: Clock) -> dict[str, Any]:
    """GET /health."""
    asked, every_s = [view for view in views if view.open], float(s.health_check_interval)
    healthy = sum(view.healthy for view in asked)
    score = healthy / len(asked) if asked else 0.0
    word = "healthy" if score >= 0.8 else "degraded" if score >= 0.5 else "unhealthy"
    return {
        "status": word if views else "no_servers", "health_score": score,
        "total_servers": len(views), "healthy_servers": healthy,
        "unhealthy_servers": len(asked) - healthy, "drained_servers": len(views) - len(asked),
        "servers": [server_health(view, clock) for view in views],
        "config": {
            "health_check_enabled": s.enable_active_health_check,
            "health_check_interval": int(every_s) if every_s.is_integer() else every_s,
            "min_success_rate": s.health_check_min_success_rate,
            "max_response_time": s.health_check_max_response_time,
        },
    }


def server_health(view: ServerView, clock: Clock) -> dict[str, Any]:
    health = view.health
    return {
        "url": view.name, "healthy": view.healthy, "health_status": health.state.value,
        "reason": view.reason, "since": clock.iso(health.since),
        "draining": view.draining or view.drained,
        "circuit": health.circuit(clock.monotonic),
        "last_check": clock.iso(health.checked_at), "consecutive_failures": health.failures,
        "success_rate": health.success_rate, "avg_response_time": health.mean_time_s,
        "last_response_time": health.window[-1][1] if health.window else None,
        "total_checks": health.checks, "supported_models": list(view.models or ()),
        "models_last_updated": clock.iso(view.models_at),
    }


def load_report(
    views: list[ServerView], s: Settings, clock: Clock, roster: Mapping[str, Entry] = {},
    answers: Mapping[str, float] = {},
) -> dict[str, Any]:
    """GET /load-stats.  A server's load is our requests, exactly, and those of others as far as
    they are known; servers that have left are in no sum."""
    now, interval_s = clock.monotonic, s.metrics_interval
    loads = [v.counts.in_flight + round(v.foreign(now, interval_s)) for v in views]
    capacity = sum(round(view.capacity) for view in views)
    return {
        "servers": [
            server_load(view, load, not view.reports(now, interval_s), clock)
            | {"source": roster[view.server].source.value if view.server in roster else ""}
            for view, load in zip(views, loads)
        ],
        "summary": {
            "total_servers": len(views), "healthy_servers": sum(view.healthy for view in views),
            "total_active_load": sum(loads), "total_capacity": capacity,
            "overall_utilization_percent": 100 * sum(loads) / capacity if capacity else 0.0,
        },
        "answer_tokens": {model: round(tokens, 1) for model, tokens in answers.items()},
    }


def server_load(view: ServerView, load: int, stale: bool, clock: Clock) -> dict[str, Any]:
    said = view.load
    return {
        "url": view.name, "current_load": load, "max_capacity": round(view.capacity),
        "capacity_learned": not view.configured, "capacity_note": disagreement(view),
        "available_capacity": max(0, round(view.capacity) - load),
        "utilization_percent": min(100.0, 100 * load / view.capacity),
        "status": view.healthy, "health_status": view.health.state.value,
        "in_flight": view.counts.in_flight, "pending_prompt_tokens": view.counts.pending,
        "prompt_tokens_per_second": round(view.pace.prompt_tokens_per_s),
        "step_ms": round(1e3 * view.pace.step_s, 3), "step_samples": view.pace.samples,
        "last_updated": clock.iso(view.report.at), "stale": stale,
        "detailed_metrics": {
            "num_requests_running": said.running or 0, "num_requests_waiting": said.waiting or 0,
            "gpu_cache_usage_perc": said.kv_usage_ratio or 0.0,  # a share, under mvllm's name
            "kv_cache_usage_perc": said.kv_usage_ratio, "process_max_fds": said.max_fds or 0,
        },
    }


def server_models_report(views: list[ServerView], clock: Clock) -> dict[str, Any]:
    """GET /server-models."""
    servers = {view.name: {"supported_models": list(view.models or ()), "healthy": view.healthy,
                           "models_last_updated": clock.iso(view.models_at)}
               for view in views}
    healthy = sum(view.healthy for view in views)
    return {"servers": servers, "total_servers": len(views), "healthy_servers": healthy}


def model_entries(
    views: list[ServerView], aliases: Mapping[str, str], via: str = "", own_name: str = ""
) -> list[Mapping[str, Any]]:
    """For GET /v1/models: what the healthy servers serve, each model once, with all that its first
    server says of it; aliases stand beside the models they name, and hide one of the same name.
    `via` is the field of who asks."""
    models: dict[str, Mapping[str, Any]] = {}
    for view in views:
        if view.health.may_be_last_resort and view.open:
            for name, entry in (view.models or {}).items():
                if name not in models and (told := told_to(via, entry, own_name)) is not None:
                    models[name] = told
    named = [(alias, models[name]) for alias, name in aliases.items() if name in models]
    models.update((alias, {**entry, "id": alias}) for alias, entry in named)
    return list(models.values())


def readiness_report(views: list[ServerView], stopping: bool) -> tuple[int, dict[str, Any]]:
    """GET /readiness: 503 where there is no server to ask; degraded with only a last resort."""
    healthy = sum(view.healthy and view.available for view in views)
    counts = {"healthy_workers": healthy, "total_workers": len(views)}
    if any(view.available for view in views) and not stopping:
        return 200, {"status": "ready" if healthy else "degraded", **counts}
    reason = "stopping" if stopping else "no healthy server" if views else "no server configured"
    return 503, {"status": "not_ready", "reason": reason, **counts}


# ============================================================================================
#  35  metrics
# ============================================================================================
#
# What is counted and measured: the metric families that /metrics shows.

# Bounds of buckets.  To the first byte: from a cached prompt to a person's patience; between
# pieces: from a burst to a stall; bytes: from a greeting to an image or a batch of embeddings.
FIRST_BYTE_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
GAP_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1, 2.5, 10, 40)
DURATION_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
SIZE_BOUNDS_BYTES = tuple(float(4**n) for n in range(4, 14))  # 256 bytes to 64 MiB


LIMIT_NAMES = (
    *dict.fromkeys(LIMITS.values()), "head_timeout", "body_timeout", "keep_alive_timeout",
    "max_requests_per_connection", "max_connections", "max_connections_per_client", "retry_budget",
)


SOURCE_NAMES = tuple(source.value for source in Source)
# Streams that broke off.
RESUMES = ("mvllm_resumes_total", "Attempts of other servers to go on with a stream.", "way",
           "result")
NOT_RESUMED = ("mvllm_resumes_refused_total", "Streams that broke off, by why no other went on.",
               "reason")


class Metrics:
    """Everything that is counted, bumped where it happens."""

    def __init__(self) -> None:
        self.requests = Counter(
            "mvllm_requests_total", "Requests that have ended, by the status shown to the client.",
            "server", "model", "status")
        self.attempts = Counter(
            "mvllm_attempts_total", "Attempts to have a server answer, by how they ended.",
            "server", "result")
        self.deaths = Counter("mvllm_attempts_died_total", "Attempts whose server died.", "server")
        self.retries = Counter(
            "mvllm_retries_total", "Attempts after the first, by what had failed.", "reason")
        self.transitions = Counter(
            "mvllm_server_transitions_total", "Changes of a server's state.", "server", "state")
        self.reloads = Counter(
            "mvllm_settings_reloads_total", "Changes of the settings file.", "result")
        self.scrapes = Counter(
            "mvllm_scrapes_total", "Looks at a server's metrics.", "server", "result")
        self.upgrades = Counter("mvllm_upgrades_total", "Successors to take over.", "result")
        self.errors = Counter("mvllm_internal_errors_total", "Mistakes of the balancer's own.")
        self.stalls = Counter("mvllm_stalls_total", "Times the whole process stood still.")
        self.waits = Histogram(
            "mvllm_request_queue_time_seconds", "Time in the queue.", DURATION_BOUNDS_S, "model")
        self.decisions = Counter(
            "mvllm_decisions_total", "Servers chosen, by what decided.", "policy", "reason")
        self.prompt_tokens = Counter(
            "mvllm_prompt_tokens_total", "Tokens of prompts, estimated by their bytes.")
        self.cached_tokens = Counter(
            "mvllm_prefix_cache_expected_tokens_total", "Of these, expected in the server's cache.")
        self.missed_tokens = Counter(
            "mvllm_prefix_cache_missed_tokens_total",
            "Tokens more that another server was expected to have (regret).")
        self.prefix_hits = Counter(
            "mvllm_prefix_cache_hit_tokens_total",
            "Tokens found in a server's prefix cache, by its own word.", "server")
        self.usage = Counter(
            "mvllm_usage_tokens_total", "Tokens, as far as servers said them.",
            "key", "model", "kind")
        self.key_requests = Counter(
            "mvllm_key_requests_total", "Requests that servers answered.", "key", "model")
        self.limits = Counter("mvllm_limits_met_total", "Times a limit was met.", "limit")
        self.first_byte = Histogram(
            "mvllm_time_to_first_byte_seconds", "From a request's last byte to its answer's first.",
            FIRST_BYTE_BOUNDS_S, "model")
        self.first_token = Histogram(
            "mvllm_time_to_first_token_seconds", "The same, of streams: to their first event.",
            FIRST_BYTE_BOUNDS_S, "model")
        self.gaps = Histogram(
            "mvllm_inter_token_latency_seconds", "Between two pieces of a streamed answer.",
            GAP_BOUNDS_S, "model")
        self.durations = Histogram(
            "mvllm_request_duration_seconds", "From a request's first byte to its answer's last.",
            DURATION_BOUNDS_S, "model")
        self.request_sizes = Histogram(
            "mvllm_request_size_bytes", "Content of requests.", SIZE_BOUNDS_BYTES, "model")
        self.response_sizes = Histogram(
            "mvllm_response_size_bytes", "Content of answers.", SIZE_BOUNDS_BYTES, "model")
        self.begin_servers()
        self.begin()

    def begin_servers(self) -> None:
        """What is counted of their coming and going."""
        self.servers_added = Counter(
            "mvllm_servers_added_total", "Servers that have come, by who named them.", "source")
        self.servers_removed = Counter(
            "mvllm_servers_removed_total", "Servers that have gone from the roster.", "source")
        self.lookups = Counter("mvllm_name_lookups_total", "Lookups of servers' names.", "result")

    def begin(self) -> None:
        """Those of streams that broke, and counts of 0, so that a rate exists from the start."""
        self.resumes, self.not_resumed = Counter(*RESUMES), Counter(*NOT_RESUMED)
        self.errors.add(amount=0)
        self.stalls.add(amount=0)
        for counter, values in ((self.reloads, ("applied", "refused")),
                                (self.upgrades, ("failed",)), (self.limits, LIMIT_NAMES),
                                (self.servers_added, SOURCE_NAMES),
                                (self.servers_removed, SOURCE_NAMES)):
            for value in values:
                counter.add(value, amount=0)

    def families(self) -> list[Family]:
        return list(vars(self).values())

    def retire(self, server: str) -> None:
        """Drop the series of a server that has gone; its counts stay in the sums."""
        for family in self.families():
            if isinstance(family, Counter) and "server" in family.labels:
                family.fold("server", server, "gone")


# Gauges of each server; None, for what it has not said, leaves a sample out.
SERVER_GAUGES: dict[str, tuple[str, Callable[[ServerView], float | None]]] = {
    "requests_in_flight": ("Requests now with a server.", lambda v: v.counts.in_flight),
    "server_healthy": ("Whether a server is asked.", lambda v: v.healthy),
    "server_asleep": ("Whether it says that it sleeps.", lambda v: v.load.asleep),
    "server_circuit_open": (
        "Whether failed requests keep it out.", lambda v: v.health.open_until is not None),
    "server_capacity": ("Its max_concurrent_requests, or what was learned.", lambda v: v.capacity),
    "server_learned_capacity": (
        "What its time per output token says of its capacity.", lambda v: v.learned.capacity),
    "server_prompt_tokens_pending": (
        "Prompt tokens that it has to read.", lambda v: v.counts.pending),
    "server_prompt_tokens_per_second": (
        "How fast it reads prompts, as learned.", lambda v: v.pace.prompt_tokens_per_s or None),
    "server_step_seconds": (
        "A token of an answer, if the server had no other work, as learned.",
        lambda v: v.pace.step_s if v.pace.samples else None),
    "server_num_requests_running": ("Running requests by its own word.", lambda v: v.load.running),
    "server_num_requests_waiting": ("Waiting requests by its own word.", lambda v: v.load.waiting),
    "server_kv_cache_usage_ratio": ("KV cache in use, 0 to 1.", lambda v: v.load.kv_usage_ratio),
}
# Gauges of the process; the values come from where they are known.
PROCESS_GAUGES = {
    "start_time_seconds": "When the process began, in Unix time.",
    "client_connections": "Open connections from clients.",
    "client_connections_limit": "How many there may be.",
    "queue_length": "Requests that wait for a server's place.",
    "buffered_bytes": "What is held of requests that wait: content, heads, what came early.",
    "settings_valid": "Whether the settings file could be used as it is now.",
}


# Families that have another name now.  Until 1.0 they are exposed under both.
OLD_NAMES = {
    "mvllm_inter_token_latency_seconds": "mvllm_stream_gap_seconds",
    "mvllm_request_queue_time_seconds": "mvllm_queue_wait_seconds",
    "mvllm_prefix_cache_expected_tokens_total": "mvllm_prefix_tokens_expected_total",
    "mvllm_prefix_cache_missed_tokens_total": "mvllm_prefix_tokens_missed_total",
    "mvllm_prefix_cache_hit_tokens_total": "mvllm_prefix_tokens_hit_total",
    "mvllm_server_num_requests_running": "mvllm_server_running",
    "mvllm_server_num_requests_waiting": "mvllm_server_waiting",
    "mvllm_server_kv_cache_usage_ratio": "mvllm_server_kv_usage_ratio",
}


def with_old_names(families: Iterable[Family]) -> Iterator[Family]:
    """These families; each that was renamed is followed by itself under its old name."""
    for family in families:
        yield family
        if old := OLD_NAMES.get(family.name):
            same = copy.copy(family)  # with the same children
            same.name, same.meaning = old, f"deprecated: {family.name} is its name now."
            yield same


def gauges(
    views: list[ServerView], now: float, s: Settings, process: Mapping[str, float],
    answers: Mapping[str, float] = {},
) -> list[Family]:
    """Gauges of this moment; of a load that was said a while ago there are none."""
    length = Gauge("mvllm_answer_tokens", "Tokens of a streamed answer, as learned.", "model")
    for model, tokens in answers.items():
        length.set(tokens, model)
    build = Gauge("mvllm_build_info", "Always 1.", "version", "python")
    build.set(1, __version__, sys.version.split()[0])
    families: list[Family] = [build, length]
    for name, meaning in PROCESS_GAUGES.items():
        families.append(gauge := Gauge(f"mvllm_{name}", meaning))
        gauge.set(process[name])
    views = [view if view.reports(now, s.metrics_interval) else view._replace(report=Report())
             for view in views]
    for name, (meaning, value) in SERVER_GAUGES.items():
        families.append(gauge := Gauge(f"mvllm_{name}", meaning, "server"))
        for view in views:
            if (found := value(view)) is not None:
                gauge.set(found, view.name)
    return families


# ============================================================================================
#  36  records
# ============================================================================================
#
# What is written of each request, and of each change of a server's state: for people, for programs,
# and for `replay`.


class TracedAnswer(NamedTuple):
    """What is kept of an answer: when it was asked for, in Unix time, and how it went."""

    at: float
    first_s: float | None
    duration_s: float
    output_tokens: int
    server: str
    status: int
    end: str


def trace_line(call: Call, answer: TracedAnswer) -> str:
    """One request for `replay`: no text of it, and hashes that are seeded in each process
    (unless PYTHONHASHSEED says otherwise).  Of the prompt's links some are enough."""
    chain, prompt = call.prompt.prefix_hashes, call.prompt
    kept, covered, leads = list[int](), 0, prompt.leading_tokens > 0
    for n in range(len(chain)):
        upto = prompt.hash_ends[n - leads] if n >= leads else 0
        if upto % trace_step(upto) == 0 and prompt.tokens_in(n + 1) > covered:
            kept, covered = [*kept, n], prompt.tokens_in(n + 1)
    session = f"{hash(call.session) & 0xFFFFFFFF:08x}" if call.session else ""
    return json.dumps({
        "at": round(answer.at, 3), "model": call.model, "session": session,
        "prompt_tokens": prompt.tokens, "output_tokens": answer.output_tokens,
        "chain": [chain[n] & 0xFFFFFFFFFFFF for n in kept],
        "ends": [prompt.tokens_in(n + 1) for n in kept],
        "ttft": None if answer.first_s is None else round(answer.first_s, 4),
        "duration": round(answer.duration_s, 4), "server": answer.server,
        "status": answer.status, "end": answer.end,
    })


def trace_step(end: int) -> int:
    """Between two links that are kept, in bytes: an eighth of the way so far, or less."""
    return int(max(256, 2 ** (end.bit_length() - 4)))


class RequestFacts(NamedTuple):
    """What is said of a request that has ended.  Never content or keys."""

    id: str
    client: str
    key: str | None = None  # its name
    method: str | None = None
    path: str | None = None
    model: str | None = None
    stream: bool = False
    server: str | None = None
    attempts: Sequence[tuple[str, str, str]] = ()  # server, reason to ask it, result
    status: int = 0
    queue_s: float = 0.0
    first_byte_s: float | None = None
    duration_s: float = 0.0
    request_bytes: int = 0
    response_bytes: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    end: str = "complete"


# By hand, since these lines are written for each request: half the time of what would do it for any
# facts.
def access_line(f: RequestFacts) -> str:
    """A request as key=value pairs; a value with spaces is quoted."""
    failed = ",".join([result for _, _, result in f.attempts if result != "ok"])
    return (
        f"id={f.id if f.id.isalnum() else as_word(f.id)} client={as_word(f.client)}"
        f" key={as_word(f.key)} method={as_word(f.method)} path={as_word(f.path)}"
        f" model={as_word(f.model)} stream={f.stream} server={as_word(f.server)}"
        f" attempts={len(f.attempts)} failed={failed or '-'}"
        f" status={f.status} queue_s={f.queue_s:.4f}"
        f" first_byte_s={'-' if f.first_byte_s is None else f'{f.first_byte_s:.4f}'}"
        f" duration_s={f.duration_s:.4f} request_bytes={f.request_bytes}"
        f" response_bytes={f.response_bytes}"
        f" prompt_tokens={'-' if f.prompt_tokens is None else f.prompt_tokens}"
        f" cached_tokens={'-' if f.cached_tokens is None else f.cached_tokens}"
        f" completion_tokens={'-' if f.completion_tokens is None else f.completion_tokens}"
        f" end={f.end}"
    )


def request_record(at: float, f: RequestFacts) -> str:
    """The same as JSON."""
    attempts = ", ".join([
        f'{{"server": {json_word(server)}, "reason": "{reason}", "result": "{result}"}}'
        for server, reason, result in f.attempts])
    return (
        f'{{"time": "{utc(at)}", "event": "request", "id": {json_word(f.id)},'
        f' "client": {json_word(f.client)}, "key": {json_word(f.key)},'
        f' "method": {json_word(f.method)}, "path": {json_word(f.path)},'
        f' "model": {json_word(f.model)},'
        f' "stream": {"true" if f.stream else "false"}, "server": {json_word(f.server)},'
        f' "attempts": [{attempts}], "status": {f.status}, "queue_s": {f.queue_s:.4f},'
        f' "first_byte_s": {"null" if f.first_byte_s is None else f"{f.first_byte_s:.4f}"},'
        f' "duration_s": {f.duration_s:.4f}, "request_bytes": {f.request_bytes},'
        f' "response_bytes": {f.response_bytes},'
        f' "prompt_tokens": {"null" if f.prompt_tokens is None else f.prompt_tokens},'
        f' "cached_tokens": {"null" if f.cached_tokens is None else f.cached_tokens},'
        f' "completion_tokens": {"null" if f.completion_tokens is None else f.completion_tokens},'
        f' "end": "{f.end}"}}'
    )


NOT_PLAIN = re.compile(r'[\s"=]')


@functools.lru_cache(HEADS_KEPT)
def as_word(value: str | None) -> str:
    if value is None:
        return "-"
    unquoted = value.isprintable() and not NOT_PLAIN.search(value)
    return value if value and unquoted else json.dumps(value)


@functools.lru_cache(HEADS_KEPT)
def json_word(value: str | None) -> str:
    return json.dumps(value)


def transition_record(at: float, change: Transition) -> str:
    """A change of a server's state as JSON."""
    return json.dumps({"time": utc(at), "event": "transition", "server": change.server,
                       "from": change.old.value, "to": change.new.value, "reason": change.reason})


def utc(at: float) -> str:
    return f"{utc_second(int(at))}.{int(at % 1 * 1000):03d}Z"


@functools.lru_cache(1)  # many lines are of the same second
def utc_second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def transition_line(change: Transition, models: Models | None) -> str:
    names = "" if models is None else f"; models: {', '.join(models) or 'none'}"
    return f"{change.server} is {change.new.value} (was {change.old.value}): {change.reason}{names}"


# ============================================================================================
#  37  recent past
# ============================================================================================
#
# What is kept of the recent past, for people: the last minute of each server and model, the last
# quarter of an hour of the fleet, requests that have ended, and events.


MINUTE_S = 60.0
RATE_S = 10.0  # over which tokens and requests per second are counted
SAMPLES_KEPT = 61  # one a second
TTFB_KEPT = 300  # of one server's times to the first byte, of which quantiles are told
DECISIONS_SHOWN = 3  # of each server, among the last
RANKINGS_LOOKED_AT = 30
EVENTS_KEPT = 100
ENDED_KEPT = 50  # requests
RUNNING_SHOWN = 100  # requests, the oldest ones
GRAPH_S = 10.0  # between two points of the fleet's graphs,
GRAPH_POINTS = 90  # which are a quarter of an hour
MODELS_SHOWN = 200


class HistorySample(NamedTuple):
    """One server at one second; counts are since the start."""

    at: float
    tokens: int | None = None  # generated, by its own word
    load_ratio: float = 0.0
    requests: int = 0
    lost: int = 0
    failed: int = 0
    retries: int = 0


class History:
    """The recent past of one server: requests that it was the last to be asked for, those of them
    whose clients saw a failure, attempts that failed there, and those that another followed."""

    __slots__ = ("ttfb", "samples", "errors", "requests", "lost", "failed", "retries")

    def __init__(self) -> None:
        self.ttfb: deque[tuple[float, float]] = deque(maxlen=TTFB_KEPT)  # when, seconds
        self.samples: deque[HistorySample] = deque(maxlen=SAMPLES_KEPT)
        self.errors: deque[str] = deque(maxlen=5)
        self.requests = self.lost = self.failed = self.retries = 0

    def ended(self, now: float, first_s: float | None, well: bool) -> None:
        """A request has ended; `first_s` is of a stream."""
        self.requests += 1
        self.lost += not well
        if first_s is not None:
            self.ttfb.append((now, first_s))

    def attempt_failed(self, what: str) -> None:
        self.failed += 1
        self.errors.append(what)

    def sample(self, view: ServerView, now: float, interval_s: float) -> None:
        """Once a second."""
        load = (view.counts.in_flight + view.foreign(now, interval_s)) / view.capacity
        self.samples.append(HistorySample(
            now, view.load.generation_tokens, load, self.requests, self.lost, self.failed,
            self.retries))

    def since(self, moment: float) -> HistorySample:
        """The last sample before that moment; where there is none, one of nothing."""
        for sample in reversed(self.samples):
            if sample.at <= moment:
                return sample
        return HistorySample(moment)

    def ttfb_since(self, moment: float) -> list[float]:
        return [seconds for at, seconds in self.ttfb if at > moment]

    def tokens_per_s(self, now: float) -> float | None:
        known = [one for one in self.samples if one.tokens is not None and one.at > now - RATE_S]
        if len(known) < 2:
            return None
        made = (known[-1].tokens or 0) - (known[0].tokens or 0)
        return max(0, made) / (known[-1].at - known[0].at)


class ModelCounts(NamedTuple):
    """What was counted of one model since the start."""

    requests: float = 0.0
    failed: float = 0.0
    first: Sequence[float] = ()  # times to the first token, by bucket


def counts_by_model(metrics: Metrics) -> dict[str, ModelCounts]:
    found = dict[str, ModelCounts]()
    for (_, model, status), count in metrics.requests.children.items():
        known = found.get(model, ModelCounts())
        found[model] = ModelCounts(known.requests + count, known.failed + count * (status >= "500"))
    for (model,), child in metrics.first_token.children.items():
        found[model] = found.get(model, ModelCounts())._replace(first=child[:-1])
    return found


def bucket_quantile(counts: Sequence[float], bounds: Sequence[float], share: float) -> float | None:
    """A quantile of what was counted in buckets, by interpolation; None of nothing."""
    wanted, below = share * sum(counts), 0.0
    for n, count in enumerate(counts):
        if count and below + count >= wanted:
            low = bounds[n - 1] if n else 0.0
            high = bounds[n] if n < len(bounds) else bounds[-1]
            return low + (high - low) * (wanted - below) / count
        below += count
    return None


class EndedRequest(NamedTuple):
    """A request that has ended, for people; times are the loop's."""

    at: float
    id: str
    model: str
    server: str
    key: str | None
    status: int
    end: str
    began_at: float
    first_s: float | None
    tokens: int | None


class Recent:
    """The recent past, for people: each server's history, events, requests that have ended,
    rankings by request, and the fleet's graphs."""

    def __init__(self) -> None:
        self.histories: dict[str, History] = {}
        self.ended: deque[tuple[Any, ...]] = deque(maxlen=ENDED_KEPT)  # each an EndedRequest
        self.models: deque[tuple[float, dict[str, ModelCounts]]] = deque(maxlen=SAMPLES_KEPT)
        self.graph: deque[Totals] = deque(maxlen=GRAPH_POINTS)
        self.graphed_at = -INFINITY
        self.model_states: dict[str, str] = {}  # of models that somebody starts and stops
        self.events: deque[dict[str, str]] = deque(maxlen=EVENTS_KEPT)
        self.rankings: OrderedDict[str, list[Ranking]] = OrderedDict()

    def history(self, url: str) -> History:
        if (history := self.histories.get(url)) is None:
            history = self.histories[url] = History()
        return history

    def decisions(self) -> dict[str, list[str]]:
        """Why each server was chosen, of late."""
        found = dict[str, list[str]]()
        for rankings in itertools.islice(reversed(self.rankings.values()), RANKINGS_LOOKED_AT):
            for ranking in reversed(rankings):
                of_server = found.setdefault(ranking.best or "", [])
                if len(of_server) < DECISIONS_SHOWN:
                    of_server.append(ranking.why())
        return found

    def keep(self, urls: Collection[str]) -> None:
        """Forget the history of all others."""
        for url in self.histories.keys() - urls:
            del self.histories[url]

    def ranked(self, id: str, ranking: Ranking, attempt: int) -> None:
        earlier = self.rankings.pop(id, [])
        self.rankings[id] = [*earlier, ranking] if attempt > 1 else [ranking]
        if len(self.rankings) > RECENT_LIMIT:
            self.rankings.popitem(last=False)


def quantile(values: Sequence[float], share: float) -> float | None:
    """A quantile; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


# ============================================================================================
#  38  status
# ============================================================================================
#
# What people see of the fleet: the document that the screen, the page and /status.json share.


def state_word(view: ServerView, now: float) -> str:
    """What people are told of a server."""
    if view.draining or view.drained:
        return "draining" if view.counts.in_flight else "drained"
    if not view.healthy and view.health.open_until is not None:
        return f"circuit {view.health.circuit(now)}"
    return "asleep" if view.healthy and view.load.asleep else view.health.state.value


class ServerStatus(TypedDict):
    """One server in the status document."""

    url: str
    name: str  # the same for people
    source: str  # of its definition: a Source; "" of one that has left and still answers
    state: str  # one of a State's words, "circuit open", "asleep", "drained", "draining" …
    reason: str  # for it
    since_s: float  # for so long
    models: list[str]
    running: float | None  # requests, by the server's own word,
    waiting: float | None
    in_flight: int  # and those that it has from us
    capacity: int  # requests that it runs well at once
    capacity_learned: bool
    capacity_seen: bool  # else a learned one is what was assumed before there was traffic
    capacity_note: str
    kv_usage_ratio: float | None
    weight: float
    tier: int
    tokens_per_s: float | None  # generated, over the last ten seconds
    ttft_p50_s: float | None  # of streams of the last minute
    ttft_p95_s: float | None
    errors: int  # attempts that failed in the last minute
    retries: int  # and those that another followed
    pending_prompt_tokens: int
    prompt_tokens_per_second: int
    step_ms: float | None  # of a token of an answer, if it had no other work
    stale: bool  # its metrics are old
    history: list[float]  # its load's share of the capacity, a second each
    last_errors: list[str]
    decisions: list[str]  # why it was chosen of late


class Totals(TypedDict):
    """All servers in the status document."""

    healthy: int  # servers that are asked,
    servers: int  # of so many,
    drained: int  # of which so many are not to be asked: drained, leaving, or of weight 0
    queue: int
    in_flight: int
    connections: int  # of clients
    requests_per_s: float  # over the last ten seconds
    tokens_per_s: float
    ttft_p50_s: float | None  # of streams of the last minute
    ttft_p95_s: float | None
    error_ratio: float  # of the last minute's requests


class ModelStatus(TypedDict):
    """One model in the status document; rates are of ten seconds, the rest of the last minute."""

    model: str
    state: str  # "served", "no server", or the word of who starts and stops it
    servers: int  # that list it,
    healthy: int  # and of these, those that are asked
    in_flight: int
    requests_per_s: float
    tokens_per_s: float | None  # of servers of which it is the first model
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    errors: int  # requests whose clients saw a 5xx


class RunningStatus(TypedDict):
    """A request that is with a server."""

    id: str
    age_s: float
    server: str
    model: str
    key: str  # its name
    path: str
    tokens: int | None  # pieces of a stream so far; None before its answer has begun


class EndedStatus(TypedDict):
    """A request that has ended."""

    id: str
    ago_s: float
    server: str
    model: str
    key: str
    status: int
    end: str  # "complete", or the label of what ended it
    duration_s: float
    first_s: float | None
    tokens: int | None  # by the server's word


class RequestsStatus(TypedDict):
    running: list[RunningStatus]  # the oldest first, RUNNING_SHOWN at most
    ended: list[EndedStatus]  # the last first


class KeyUsage(TypedDict):
    """What a key has used since the start."""

    name: str
    requests: int
    prompt: int  # tokens, as far as servers said them
    cached: int
    completion: int


class StatusDocument(TypedDict):
    """GET /status.json, and what the page and the screen show."""

    version: str
    time: str  # HH:MM:SS, local
    uptime_s: float
    address: str
    stopping: bool
    settings: str  # since when they are in force, for people
    hint: str  # what to try; of a demo
    may_operate: bool  # whether who asks may drain, probe …
    settings_error: str  # why the file could not be used when it was last read
    connections: int  # of clients
    queue: int
    totals: Totals
    servers: list[ServerStatus]
    models: list[ModelStatus]
    requests: RequestsStatus
    keys: list[KeyUsage]
    fleet: dict[str, Any]  # the last quarter of an hour: step_s, and lists, the newest last
    events: list[dict[str, str]]  # the last lines of the log: time, level, text
    services: dict[str, Any]  # what runs in the background for the settings, by name
    live: dict[str, Any]  # what was changed by hand: added, removed, drained, weights


def status_of(
    view: ServerView, entry: Entry | None, recent: Recent, clock: Clock, s: Settings,
    decisions: list[str],
) -> ServerStatus:
    now, load, history = clock.monotonic, view.load, recent.histories.get(view.id) or History()
    before, ttfb = history.since(now - MINUTE_S), history.ttfb_since(now - MINUTE_S)
    return {
        "url": view.name, "name": view.name.partition("://")[2] or view.name,
        "source": entry.source.value if entry else "", "state": state_word(view, now),
        "reason": view.reason, "since_s": round(now - view.health.since, 1),
        "models": list(view.models or ()), "running": load.running, "waiting": load.waiting,
        "in_flight": view.counts.in_flight, "capacity": round(view.capacity),
        "capacity_learned": not view.configured, "capacity_note": disagreement(view),
        "capacity_seen": view.learned.capacity is not None, "kv_usage_ratio": load.kv_usage_ratio,
        "weight": view.settings.weight, "tier": view.settings.tier,
        "tokens_per_s": rounded(history.tokens_per_s(now), 1),
        "ttft_p50_s": rounded(quantile(ttfb, 0.5)), "ttft_p95_s": rounded(quantile(ttfb, 0.95)),
        "errors": history.failed - before.failed, "retries": history.retries - before.retries,
        "pending_prompt_tokens": view.counts.pending,
        "prompt_tokens_per_second": round(view.pace.prompt_tokens_per_s),
        "step_ms": round(1e3 * view.pace.step_s, 2) if view.pace.samples else None,
        "stale": not view.reports(now, s.metrics_interval),
        "history": [round(one.load_ratio, 3) for one in history.samples],
        "last_errors": list(history.errors), "decisions": decisions,
    }


def totals_of(
    views: Sequence[ServerView], recent: Recent, now: float, process: Mapping[str, Any]
) -> Totals:
    histories = [recent.histories.get(view.id) or History() for view in views]
    minute_ago = [history.since(now - MINUTE_S) for history in histories]
    requests = sum(h.requests - then.requests for h, then in zip(histories, minute_ago))
    lost = sum(h.lost - then.lost for h, then in zip(histories, minute_ago))
    late = sum(h.requests - h.since(now - RATE_S).requests for h in histories)
    rates = [rate for h in histories if (rate := h.tokens_per_s(now)) is not None]
    ttfb = [first for h in histories for first in h.ttfb_since(now - MINUTE_S)]
    return {
        "healthy": sum(view.healthy and view.open for view in views), "servers": len(views),
        "drained": sum(not view.open for view in views),
        "queue": process["queue"], "in_flight": sum(view.counts.in_flight for view in views),
        "connections": process["connections"], "requests_per_s": round(late / RATE_S, 2),
        "tokens_per_s": round(sum(rates), 1), "ttft_p50_s": rounded(quantile(ttfb, 0.5)),
        "ttft_p95_s": rounded(quantile(ttfb, 0.95)),
        "error_ratio": round(lost / requests, 4) if requests else 0.0,
    }


def models_of(
    views: Sequence[ServerView], recent: Recent, running: Sequence[RunningStatus], now: float
) -> list[ModelStatus]:
    """Each model that a server lists or that was asked for, in their order."""

    def since(moment: float) -> dict[str, ModelCounts]:
        return next((counts for at, counts in reversed(recent.models) if at <= moment), {})

    minute, late = since(now - MINUTE_S), since(now - RATE_S)
    counted = recent.models[-1][1] if recent.models else {}
    names = dict.fromkeys([name for view in views for name in view.models or ()])
    names |= dict.fromkeys([*recent.model_states, *counted])
    found: list[ModelStatus] = []
    for name in itertools.islice((one for one in names if one), MODELS_SHOWN):
        listing = [view for view in views if name in (view.models or ())]
        healthy = sum(view.healthy and view.open for view in listing)
        rates = [recent.histories[view.id].tokens_per_s(now) for view in listing
                 if view.id in recent.histories and next(iter(view.models or ()), "") == name]
        this, then = counted.get(name, ModelCounts()), minute.get(name, ModelCounts())
        before = late.get(name, ModelCounts())
        first = [a - b for a, b in itertools.zip_longest(this.first, then.first, fillvalue=0.0)]
        p50, p95 = (rounded(bucket_quantile(first, FIRST_BYTE_BOUNDS_S, share))
                    for share in (0.5, 0.95))
        state = recent.model_states.get(name) or ("served" if healthy else "no server")
        found.append({
            "model": name, "state": state, "servers": len(listing), "healthy": healthy,
            "in_flight": sum(one["model"] == name for one in running),
            "requests_per_s": round((this.requests - before.requests) / RATE_S, 2),
            "tokens_per_s": rounded(sum(rate or 0.0 for rate in rates), 1) if rates else None,
            "ttft_p50_s": p50, "ttft_p95_s": p95, "errors": round(this.failed - then.failed)})
    return found


def ended_report(recent: Recent, now: float) -> list[EndedStatus]:
    return [{"id": one.id, "ago_s": round(now - one.at, 1), "server": one.server,
             "model": one.model, "key": one.key or "", "status": one.status, "end": one.end,
             "duration_s": round(one.at - one.began_at, 4), "first_s": rounded(one.first_s),
             "tokens": one.tokens} for one in map(EndedRequest._make, reversed(recent.ended))]


def keys_report(metrics: Metrics) -> list[KeyUsage]:
    found = dict[str, KeyUsage]()
    counted = [(name, "requests", count)
               for (name, _), count in metrics.key_requests.children.items()]
    counted += [(name, kind, count) for (name, _, kind), count in metrics.usage.children.items()]
    for name, kind, count in counted:
        used = found.setdefault(name, {"name": name, "requests": 0, "prompt": 0, "cached": 0,
                                       "completion": 0})
        used[kind] += round(count)  # type: ignore[literal-required]
    return [used for _, used in sorted(found.items())]


GRAPHS = ("requests_per_s", "tokens_per_s", "ttft_p50_s", "ttft_p95_s", "queue", "error_ratio")


def graphs_of(recent: Recent) -> dict[str, Any]:
    return {"step_s": GRAPH_S, **{name: [point[name] for point in recent.graph]  # type: ignore
                                  for name in GRAPHS}}


def status_report(
    views: Sequence[ServerView], roster: Roster, recent: Recent, clock: Clock, s: Settings,
    process: Mapping[str, Any],
) -> StatusDocument:
    """`process` has the members that are of the process, and of its requests."""
    entries, decisions = roster.entries, recent.decisions()
    servers = [status_of(view, entries.get(view.server), recent, clock, s,
                         decisions.get(view.id, [])) for view in views]
    return {
        "version": __version__, "time": (clock.iso(clock.monotonic) or "")[11:19], **process,
        "totals": totals_of(views, recent, clock.monotonic, process), "servers": servers,
        "models": models_of(views, recent, process["requests"]["running"], clock.monotonic),
        "fleet": graphs_of(recent), "events": list(recent.events), "live": roster.report(),
    }  # type: ignore[typeddict-item]


# ━━━ part VII: connections ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  39  sockets
# ============================================================================================
#
# What is the same of all sockets: errors in words, deadlines, peers that are dead; and sockets that
# listen, with what a connection says before there is a Wire for it.

# Seconds of silence, seconds between probes, probes without an echo: a dead peer in two minutes.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
KERNEL_BACKLOG_BYTES = 128 * 1024  # unsent in the kernel, which would take megabytes


def error_text(error: OSError) -> str:
    """What the system says, or TLS, without numbers and addresses."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):  # whose numbers are none of the system's
        said = (getattr(error, "reason", "") or "").replace("_", " ").lower()
        return "TLS: " + (said or re.sub(r"^\[.*?\] | \(_ssl.*$", "", str(error.strerror)))
    unsaid = 0 if str(error) else errno.ECONNRESET  # a handshake that nobody finished, in asyncio
    number = error.errno or unsaid
    return (os.strerror(number) if number > 0 else str(error)).lower()


def address_of(name: Any) -> Address:
    """The address in a socket's name for its peer."""
    return name[:2] if isinstance(name, tuple) else UNKNOWN


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """As asyncio.timeout, but when its time is up only because the whole process stood still,
    what has happened meanwhile is heard first."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds

    def expire() -> None:
        now = loop.time()
        limit.reschedule(now + STALL_S if now > deadline + STALL_S else now)

    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(deadline, expire)
        try:
            yield
        finally:
            timer.cancel()


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel see whether the peer is still there, and remind those on the way (NAT,
    firewalls) of a connection on which nothing is said for long.  Systems name the times
    differently; those that one does not have are its own."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if (number := getattr(socket, option, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, number, value)


async def peeked(sock: socket.socket, size: int) -> bytes:
    """What has come on a socket that has no transport yet, as soon as there is something; it stays
    there to be read.  b"" is an orderly end.  Raises OSError."""
    loop = asyncio.get_running_loop()
    while True:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            return sock.recv(size, socket.MSG_PEEK)
        came = loop.create_future()
        loop.add_reader(sock, lambda: came.done() or came.set_result(None))
        try:
            await came
        finally:
            loop.remove_reader(sock)


async def read_proxy_header(sock: socket.socket) -> tuple[Address | None, bytes]:
    """Whose connection it is, if a PROXY header says so, and what was read that is none.  No byte
    behind the header is read: it may be of a TLS handshake.  Raises BadMessage, OSError."""
    said = bytearray()
    while True:
        piece = await peeked(sock, RECEIVED_BYTES)
        if (found := proxy_header(bytes(said + piece))) is not None:
            size, address = found
            if size:
                sock.recv(size - len(said))
            return address, b"" if size else bytes(said)
        if not piece:
            return None, bytes(said)
        said += sock.recv(len(piece))


class Listener:
    """A listening socket.  Connections are accepted only while there is room for them; others
    wait in the kernel's queue.  Accepting rests, instead of spinning, when descriptors run out."""

    def __init__(
        self, sock: socket.socket, room: Callable[[], bool], full: Callable[[], object],
        take: Callable[[socket.socket, Any], object], failed: Callable[[OSError], object],
    ) -> None:
        self.sock, self.loop, self.reading = sock, asyncio.get_running_loop(), False
        self.resting = False  # another process accepts
        self._room, self._full, self._take, self._failed = room, full, take, failed
        sock.setblocking(False)
        keep_alive(sock)  # what it accepts is like it
        self.resume()

    def resume(self) -> None:
        """There may be room again."""
        if not (self.reading or self.resting) and self.sock.fileno() >= 0:
            self.reading = True
            self.loop.add_reader(self.sock, self.accept, ACCEPT_BATCH)

    def pause(self) -> None:
        if self.reading:
            self.reading = False
            self.loop.remove_reader(self.sock)

    def close(self) -> None:
        self.pause()
        self.sock.close()

    def accept(self, most: int = LISTEN_BACKLOG) -> None:
        """Take those who have come."""
        for n in range(most):
            if not self._room():
                if n == 0:  # we were called, so somebody waits
                    self.pause()
                    self._full()
                return
            try:
                self._take(*self.sock.accept())
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self.pause()
                self.loop.call_later(ACCEPT_PAUSE_S, self.resume)
                self._failed(error)
                return


TCP_NOTSENT_LOWAT = 25  # Linux; Python names it since 3.12


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of the host; '' is all addresses.  Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = list[socket.socket]()
    with contextlib.ExitStack() as opened:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(sock := opened.enter_context(socket.socket(family, kind, protocol)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            with contextlib.suppress(OSError):  # a slow client's progress is seen in small steps
                sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, KERNEL_BACKLOG_BYTES)
            sock.bind(address)
            sock.listen(LISTEN_BACKLOG)
        opened.pop_all()  # all are well, and stay open
    return sockets


# ============================================================================================
#  40  wire
# ============================================================================================
#
# Connections.  The only room that knows transports.  A Wire is one connection, to a client or to
# a server: bytes come into its buffer, and whoever reads waits for `news`.  While a Sink is set,
# they go there at once without waking a task, which is how streamed pieces pass.  Deadlines are
# moments on the loop's clock; moving one costs an attribute, because a wire's one timer looks
# again when it fires instead of being set anew.

READ_BUFFER_BYTES = 256 * 1024  # what a wire holds for a reader before it stops reading
SPARE_PART = 4  # the part of max_buffered_bytes that may be content kept in case a stream breaks
LEAVING_S = 0.25  # between two looks whether clients leave that are not read from
# Where all wires receive: a new buffer for each piece, as asyncio.Protocol has it, costs a streamed
# token 5 to 12 % more.  What is in it is there until the next wire is asked.
RECEIVED = memoryview(bytearray(RECEIVED_BYTES))


class Sink:
    """Takes what happens on a wire, in place of its buffer; this one, what nobody reads any more.
    A piece is lent for the call."""

    def feed(self, wire: Wire, piece: Piece) -> None: ...
    def lost(self, wire: Wire) -> None: ...
    def expired(self, wire: Wire) -> None: ...


Piece = memoryview | bytes


def is_unheard(sock: socket.socket | None) -> bool:
    """Whether what was written last has not come in at the peer's system, as it does not where the
    connection was closed there before; where ours does not tell, it may not have."""
    with contextlib.suppress(OSError):
        if sock is not None and sock.fileno() >= 0:  # below TLS it has gone already
            return fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)) != bytes(4)
    return True


class Backlog:
    """What is held of clients' requests, in all: content, and what nobody has read yet.  And which
    of them leave while reading from them is stopped, for of that the event loop tells nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # max_buffered_bytes
        self.content_bytes = 0  # of requests, with long heads, that may have to be said again
        self.unread_bytes = 0
        self._poll, self._stopped = select.poll(), dict[int, Wire]()  # by descriptor
        self._timer: asyncio.TimerHandle | None = None
        # Content kept in case its stream breaks, the oldest first: what gives it up, and its bytes.
        self._spare: dict[int, tuple[Callable[[], object], int]] = {}
        self._spare_bytes = 0

    @property
    def bytes(self) -> int:
        return self.content_bytes + self.unread_bytes

    def full(self, own: int) -> bool:
        """Whether too much is held; that of one client alone never is."""
        while self._spare and self.limit < self.content_bytes + self.unread_bytes:
            self._give_up_oldest()
        return self.limit < self.content_bytes + self.unread_bytes != own

    def spare(self, key: int, size: int, give_up: Callable[[], object]) -> None:
        """This content is no longer needed unless its stream breaks: it is among a quarter of what
        may be held, and `give_up` is called when there is no room for it."""
        self._spare[key], self._spare_bytes = (give_up, size), self._spare_bytes + size
        while self._spare_bytes > self.limit // SPARE_PART:
            self._give_up_oldest()

    def unspare(self, key: int) -> None:
        """It is released."""
        if key in self._spare:
            self._spare_bytes -= self._spare.pop(key)[1]

    def _give_up_oldest(self) -> None:
        give_up, _ = self._spare[next(iter(self._spare))]
        give_up()

    def watch(self, wire: Wire) -> None:
        """This wire is not read from any more,"""
        if (descriptor := wire.transport.get_extra_info("socket").fileno()) >= 0:
            self._stopped[descriptor] = wire
            self._poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
            self._timer = self._timer or wire.loop.call_later(LEAVING_S, self._look, wire.loop)
            wire.descriptor = descriptor

    def forget(self, wire: Wire) -> None:
        """and now it is, or it is lost."""
        if self._stopped.get(wire.descriptor) is wire:
            self._poll.unregister(wire.descriptor)
            del self._stopped[wire.descriptor]

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        for descriptor, _ in self._poll.poll(0):
            self._stopped[descriptor].leave()
        self._timer = loop.call_later(LEAVING_S, self._look, loop) if self._stopped else None


class Wire(asyncio.BufferedProtocol):
    """One connection.  `side` says who is at the other end; what a client has said before somebody
    reads it counts in a `backlog`."""

    __slots__ = (
        "side", "loop", "transport", "buffer", "sink", "feeder", "gone", "clean", "on_gone",
        "lost", "trouble", "blocked", "held", "reused", "reusable", "deadline", "peer", "is_tls",
        "sock", "taken_at", "unheard", "backlog", "counted", "descriptor", "most", "wanted",
        "_waiter", "_reads", "_timer", "_timer_at", "at_once",
    )

    def __init__(self, side: Blame, backlog: Backlog | None = None) -> None:
        self.side, self.backlog = side, backlog
        self.counted = 0  # bytes of its buffer, in the backlog
        self.descriptor = -1  # of its socket, once reading was stopped
        self.most = READ_BUFFER_BYTES if side is Blame.SERVER else AHEAD_BYTES  # to be held
        self.wanted = 0  # bytes that its sink takes beside, of a client
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # until it stands
        self.buffer = bytearray()
        self.sink: Sink | None = None
        self.feeder: Wire | None = None  # whose bytes we write: it is held while our peer is slow
        self.gone = False  # the peer says no more,
        self.clean = False  # by an orderly close (FIN), which may end a message
        self.on_gone: Callable[[], object] | None = None
        self.lost = True  # there is no connection yet, or any more
        self.trouble = ""  # that ended it, where TLS has said so
        self.blocked = False  # the peer takes no more bytes at present
        self.held = False  # we take no more of the peer's
        self.reused = False  # it carried an exchange before,
        self.taken_at = -INFINITY  # and was taken for another then,
        self.unheard = False  # which met its close: nothing of it came in at the peer's system
        self.reusable = False  # and may carry another
        self.deadline = INFINITY
        self.peer: Address = UNKNOWN  # who is at the other end, maybe beyond a proxy
        self.is_tls = False
        self.sock: socket.socket | None = None  # where one may be written to beside the transport
        self._waiter: asyncio.Future[None] | None = None
        self._reads = False  # who waits, and will take what comes
        self.at_once = RECEIVED  # where what is read at once is put
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = INFINITY

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.lost = transport, False  # type: ignore[assignment]
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        if self.side is Blame.SERVER:
            keep_alive(transport.get_extra_info("socket"))
            self.peer = address_of(transport.get_extra_info("peername"))

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.side is Blame.SERVER:
            return self.at_once
        return RECEIVED[: max(1, self.wanted + self.most - len(self.buffer))]

    def buffer_updated(self, size: int) -> None:
        if self.sink is not None:
            self.sink.feed(self, RECEIVED[:size])
            return
        self.keep(RECEIVED[:size])
        self.wake()

    def keep(self, piece: Piece) -> None:
        """Hold it for who reads next."""
        self.buffer += piece
        if self.backlog is not None:  # the same
            self.backlog.unread_bytes += len(self.buffer) - self.counted
            self.counted = len(self.buffer)
        if len(self.buffer) >= self.most and not self._reads:
            self.hold()

    def count(self) -> None:
        """The buffer has changed, of a wire that counts."""
        self.backlog.unread_bytes += len(self.buffer) - self.counted  # type: ignore[union-attr]
        self.counted = len(self.buffer)

    def eof_received(self) -> bool:
        """The peer will say no more.  A client may still be listening, so its wire stays open for
        what is answered locally; a server's is closed."""
        self._ended(clean=True)
        return self.side is Blame.CLIENT and self.transport.can_write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.backlog is not None:
            self.backlog.forget(self)
        if isinstance(error, ssl.SSLError):
            self.trouble = f": {error_text(error)}"
        if self._timer is not None:
            self._timer.cancel()
        self._ended(clean=False)  # the peer's orderly end was heard before, if there was one
        self.wake()

    def pause_writing(self) -> None:
        self.blocked = True
        if self.feeder is not None:
            self.feeder.hold()

    def resume_writing(self) -> None:
        self.blocked = False
        if self.feeder is not None:
            self.feeder.release()
        self.wake()

    def _ended(self, clean: bool) -> None:
        if self.gone:
            return
        self.gone, self.clean = True, clean
        if self.reused:
            self.unheard = is_unheard(self.transport.get_extra_info("socket"))
        if self.sink is not None:
            self.sink.lost(self)
        if self.on_gone is not None:
            self.on_gone()
        self.wake()

    def leave(self) -> None:
        """The peer has left, behind bytes that we have not read.  For whom a request of it is
        answered, that is an end; who reads will come to it."""
        if self.on_gone is not None:
            self._ended(clean=True)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def departure(self) -> PeerGone:
        """The exception for a peer that has gone; a new one each time, since an exception keeps
        alive all that was on the stack when it was raised."""
        fault = Fault.CLIENT_GONE if self.side is Blame.CLIENT else Fault.SERVER_GONE
        how = "closed" if self.clean else "lost"
        return PeerGone(f"the {self.side.value}'s connection was {how}{self.trouble}", fault)

    # Deadlines.

    def expect_by(self, deadline: float) -> None:
        """Unless something happens by then, `news` raises TimeoutError, or the sink is told."""
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
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_exception(TimeoutError())
        elif self.sink is not None:
            self.sink.expired(self)

    # What the rooms below call.

    async def news(self, deadline: float, reads: bool = False) -> None:
        """Until something happens here: bytes, room for writing, an end.  Raises TimeoutError."""
        self.expect_by(deadline)
        self._waiter, self._reads = self.loop.create_future(), reads
        try:
            await self._waiter
        finally:
            self._waiter, self._reads = None, False

    def more(self, deadline: float) -> Awaitable[None]:
        """The same, for who reads."""
        return self.news(deadline, reads=True)

    async def news_or_progress(self, silence_s: float) -> None:
        """The same, or that a slow peer took some of what is written to it.  Raises TimeoutError
        when it takes nothing for so long."""
        backlog = self.transport.get_write_buffer_size()
        try:
            await self.news(self.loop.time() + silence_s)
        except TimeoutError:
            if self.transport.get_write_buffer_size() >= backlog:
                raise

    async def unblocked(self, silence_s: float) -> None:
        """Until the peer takes bytes again.  Raises TimeoutError."""
        while self.blocked and not self.lost:
            await self.news_or_progress(silence_s)

    async def read_head(self, deadline: float, limit: int = HEAD_LIMIT_BYTES) -> bytes | None:
        """Up to and with the next empty line; None if the peer left without beginning one.
        Raises PeerGone in the middle of one, BadMessage when it is too long, TimeoutError."""
        while not (self.buffer or self.gone):
            await self.news(deadline)
        end = self.buffer.find(b"\r\n\r\n") + 4  # nearly always it comes in one piece
        search = HeadSearch(self.side) if end < 4 else None
        while search is not None and (end := search.end(self.buffer)) < 0:
            if len(self.buffer) > limit:
                break
            if self.gone:
                if self.buffer:
                    raise self.departure()
                return None
            if self.backlog is not None and self.backlog.full(self.counted):
                raise BadMessage("heads and content of requests take as many bytes as"
                                 " max_buffered_bytes allows", Fault.TOO_MUCH_CONTENT)
            if len(self.buffer) >= self.most:  # a long one
                self.most = limit + 1
                if self.held:
                    self.release()
            await self.more(deadline)
        if self.side is Blame.CLIENT:
            self.most = AHEAD_BYTES
        if not 0 <= end <= limit + 4:
            target = b"\r\n" not in self.buffer[:limit]
            fault = Fault.TARGET_TOO_LONG if target else Fault.HEAD_TOO_LARGE
            raise BadMessage(f"the head is longer than {limit} bytes", fault)
        return self.take(end)

    def take(self, size: int | None = None) -> bytes:
        """The first bytes of the buffer, or all."""
        taken = bytes(self.buffer if size is None else self.buffer[:size])
        del self.buffer[:size]
        if self.backlog is not None:  # `count`, without the call: each piece comes by here
            self.backlog.unread_bytes += len(self.buffer) - self.counted
            self.counted = len(self.buffer)
        if self.held and len(self.buffer) < self.most:
            self.release()
        return taken

    def fill(self, size: int) -> None:
        """Have so much in the buffer, if it has come already: that saves a turn of the loop."""
        missing = size - len(self.buffer)
        if missing > 0 and self.sock is not None and not self.held:
            with contextlib.suppress(OSError):
                self.buffer += self.sock.recv(missing)
                self.count()

    async def read_content(self, decoder: Decoder, deadline: float) -> bytes:
        """A piece of content; b"" after the last.  Raises PeerGone, BadMessage, TimeoutError."""
        while not decoder.done:
            if self.buffer:
                if (content := decoder.feed(self.take(decoder.at_once_bytes))) or decoder.done:
                    return content
            elif not self.gone:
                await self.more(deadline)
            elif decoder.until_close and self.clean:
                decoder.done = True
            else:
                raise self.departure()
        return b""

    async def send(self, content: Content, at: int, silence_s: float) -> int:
        """Write content from `at` on.  Returns how far that went: to its end, or to where the peer
        began to speak or left.  Raises TimeoutError when the peer takes nothing for `silence_s`."""
        view = memoryview(content)
        while at < len(content):
            while self.blocked and not (self.buffer or self.gone):
                await self.news_or_progress(silence_s)
            if self.buffer or self.gone:
                break
            self.transport.write(view[at : at + WRITE_SLICE_BYTES])
            at = min(at + WRITE_SLICE_BYTES, len(content))
        return at

    def write_lent(self, piece: Piece) -> None:
        """Write what is not ours to keep.  The kernel takes most of it as it is: a copy more, and
        one by the transport, took a sixth of the time of a large answer."""
        transport, sent = self.transport, 0
        waits = transport.is_closing() or transport.get_write_buffer_size()
        if self.sock is not None and not waits:
            with contextlib.suppress(OSError):  # the transport will meet it, too
                sent = self.sock.send(piece)
        if sent < len(piece):
            transport.write(bytes(piece[sent:]))

    def hold(self) -> None:
        """Stop reading: the kernel's buffers fill, and the peer has to wait."""
        self.held = True
        self.transport.pause_reading()
        if self.backlog is not None:
            self.backlog.watch(self)

    def release(self) -> None:
        self.held = False
        self.transport.resume_reading()
        if self.backlog is not None:
            self.backlog.forget(self)

    def abort(self) -> None:
        """End it now, whatever was still to be written."""
        if not self.lost:
            self.transport.abort()

    def reset(self) -> None:
        """End it so that the peer sees a loss and not an end: RST in place of FIN."""
        if self.lost:
            return
        with contextlib.suppress(OSError):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def close(self, silence_s: float, linger_s: float) -> None:
        """End it in stages, RFC 9112 §9.6: what was written goes out, as long as the peer takes
        some of it within `silence_s`; then it hears that we say no more, and has `linger_s` to end
        what it is saying.  Closing over unread bytes would reset the connection, and could take
        our last answer with it.  Raises TimeoutError."""
        self.sink = Sink()
        self.take()
        self.transport.set_write_buffer_limits(1, 0)  # `blocked` means now: not all is out
        await self.unblocked(silence_s)
        if self.transport.can_write_eof() and not (self.gone or self.lost):
            self.transport.write_eof()
            deadline = self.loop.time() + linger_s
            while not self.gone:
                await self.news(deadline)
        self.transport.close()
        while not self.lost:  # with TLS, only then is all out
            await self.news(self.loop.time() + silence_s)


# ============================================================================================
#  41  secrets
# ============================================================================================
#
# Keys and certificates, from the settings and from the files that these name, and how a server is
# reached with them.


@functools.cache
def usual_context() -> ssl.SSLContext:
    """Made when the first https:// server is dialled: loading the trust store takes 20 ms."""
    return ssl.create_default_context()


class Secrets:
    """Keys and certificates, from the settings and from the files they name.  Made anew to see
    whether a file has changed; what has not is taken from the secrets `before`.  Raises
    SettingsError."""

    def __init__(self, settings: Settings = Settings(), before: Secrets | None = None) -> None:
        self.files: dict[str, bytes] = {}  # all that was read
        self.strangers = set[str]()  # servers that are shown no client's key
        self.keys = [(key, key.key or self._read_key(key.key_file)) for key in settings.keys]
        s = settings
        self.registration = s.registration_key or self._read_key(s.registration_key_file)
        self._registered_key = s.registered_api_key or self._read_key(s.registered_api_key_file)
        self._settings = s
        self.server_keys = {
            server.id: server.api_key or self._read_key(server.api_key_file) or settings.api_key
            for server in (*settings.servers, *settings.patterns)
        }
        self.contexts: dict[str, ssl.SSLContext] = {}
        self._made_from: dict[str, tuple[Any, ...]] = {}
        for server in (*settings.servers, *settings.patterns):
            self._make_context(server, before)
        self.listener: ssl.SSLContext | None = None
        if settings.tls_cert:
            for path in (settings.tls_cert, settings.tls_key):
                self._read(path)
            self.listener = self._load(listener_context, settings)

    def adopt(self, server: ServerSettings, source: Source) -> None:
        """Take over a server that the settings do not name: it gets its own key alone, as it is
        only as honest as who has named it, and what they say of those of its source; or all that an
        entry of the settings has that it is `like`.  No file is read."""
        if server.like:
            self.server_keys[server.id] = self.server_keys.get(server.like, "")
            if context := self.contexts.get(server.like):
                self.contexts[server.id] = context
            return
        s, registered = self._settings, source is Source.REGISTERED
        self.server_keys[server.id] = server.api_key or self._registered_key * registered
        sees = s.registered_get_client_key if registered else s.added_get_client_key
        (self.strangers.discard if sees else self.strangers.add)(server.id)
        self._make_context(server, self)

    def _make_context(self, server: ServerSettings, before: Secrets | None) -> None:
        """Make what an https server is verified with, where that is not the usual."""
        files = [path for path in (server.ca_file, server.client_cert) if path]
        id, made_from = server.id, (server, *map(self._read, files))
        if server.verify and not files:
            self.contexts.pop(id, None)
            return
        if before is not None and before._made_from.get(id) == made_from:
            self.contexts[id] = before.contexts[id]
        else:
            self.contexts[id] = self._load(server_context, server)
        self._made_from[id] = made_from

    def _read(self, path: str) -> bytes:
        self.files[path] = read_regular_file(path)
        return self.files[path]

    def _read_key(self, path: str) -> str:
        """The key in a file; '' where none is named."""
        try:
            return path and secret(self._read(path).decode("ascii").strip())
        except ValueError as error:
            text = f"holds {'no ASCII text' if isinstance(error, UnicodeError) else 'no key'}"
            raise SettingsError([Complaint(path, 0, "", text)]) from None

    def _load(self, make: Callable[[Any], ssl.SSLContext], given: Any) -> ssl.SSLContext:
        try:
            return make(given)
        except OSError as error:  # ssl.SSLError is one
            text = f"no usable certificate or key: {error_text(error).removeprefix('TLS: ')}"
            raise SettingsError([Complaint(", ".join(self.files), 0, "", text)]) from None


NO_PASSWORD = "no password can be given"  # or OpenSSL would ask on the terminal, and wait


def server_context(server: ServerSettings) -> ssl.SSLContext:
    """For an https server with wishes of its own."""
    context = ssl.create_default_context(cafile=server.ca_file or None)
    if server.client_cert:
        context.load_cert_chain(server.client_cert, password=NO_PASSWORD)
    if not server.verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def listener_context(s: Settings) -> ssl.SSLContext:
    """For clients that speak https; TLS 1.2 and newer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(s.tls_cert, s.tls_key, NO_PASSWORD)
    return context


def read_regular_file(path: str) -> bytes:
    """A regular file's bytes.  Raises SettingsError."""
    try:
        # Without waiting for the other end of a pipe, should it be one.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
        text = "not a regular file"
    except OSError as error:
        text = error_text(error)
    except ValueError:
        text = "no name of a file"
    raise SettingsError([Complaint(path, 0, "", f"cannot be read: {text}")])


class Upstream:
    """A server as connections to it are made: its address, its key, its TLS context."""

    def __init__(
        self, server: ServerSettings, secrets: Secrets = Secrets(), name: str = ""
    ) -> None:
        parts = urllib.parse.urlsplit(server.url)
        self.server, self.authority, self.prefix = server, parts.netloc, parts.path
        self.is_tls, self.host = parts.scheme == "https", server.address or parts.hostname or ""
        self.tls_name = parts.hostname if self.is_tls else None
        self.port = parts.port or (443 if self.is_tls else 80)
        self.name = name  # ours, for servers that are balancers, too
        self.key_line = ""  # for the server, in place of a client's
        self.addresses: Collection[str] = ()  # of the name in its URL, once they have changed
        self._context: ssl.SSLContext | None = None  # in place of the usual one
        self.equip(secrets)

    def equip(self, secrets: Secrets) -> None:
        """Take the server's key and context from these secrets; if they are others than before,
        idle connections end."""
        key = secrets.server_keys.get(self.server.id, "")
        now = key and f"Authorization: Bearer {key}\r\n", secrets.contexts.get(self.server.id)
        if now != (self.key_line, self._context):
            self.key_line, self._context = now
            self.close()

    def moved(self, addresses: Collection[str]) -> None:
        """Use no connection any more but to these addresses."""
        self.addresses = addresses
        self.close()

    def leads_elsewhere(self, transport: asyncio.BaseTransport) -> bool:
        """Whether a connection is to an address that the server's name has no more."""
        peer = transport.get_extra_info("peername")
        return bool(self.addresses) and peer is not None and peer[0] not in self.addresses

    def tls(self) -> ssl.SSLContext | None:
        """What a new connection is secured with; None for plain http."""
        return (self._context or usual_context()) if self.is_tls else None

    def close(self) -> None:
        """End idle connections."""


# What connecting fails with when it is our own machine that has run out of something.
OUT_OF_RESOURCES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


def connect_failure(error: OSError, timeout_s: float) -> PeerGone:
    """The outcome of connecting to a server when that raised this error."""
    if isinstance(error, TimeoutError):
        return PeerGone(f"no connection within {timeout_s:g} s", Fault.CONNECT_TIMEOUT)
    ours = error.errno in OUT_OF_RESOURCES
    fault = Fault.NO_RESOURCES if ours else Fault.CONNECT_FAILED
    return PeerGone(f"cannot connect: {error_text(error)}", fault)


# ============================================================================================
#  42  client
# ============================================================================================
#
# What we ask servers ourselves: checks, reports of load, what the doctor and `top` want to know.
# It stands on asyncio's streams, which read plainly and are quick enough for the 25 small questions
# a second that ten servers cause.  The wires of requests stay on protocols, because a stream wakes
# a task for each piece: of two minimal relays, the one on streams took 1.3 to 1.6 times the CPU for
# a streamed token, and 1.4 to 1.7 times for a small request.  Heads, framing and their limits are
# those of rooms 2 and 4; there is no second parser.

PIECE_BYTES = 16 * 1024  # read at once: taking chunks of a few bytes apart is slow
FETCH_LIMIT_BYTES = 8 * 1024 * 1024  # /metrics and /v1/models of a server; real ones are < 100 kB
POOL_IDLE_S = 4.0  # vLLM closes idle connections after 5.000 s (uvicorn's default)


class MessageReader:
    """Reads the HTTP messages that one side sends over a stream, one after the other."""

    def __init__(self, reader: asyncio.StreamReader, side: Blame) -> None:
        self.reader, self.side = reader, side
        self.buffer = bytearray()  # read, but of no message yet

    def departure(self, how: str) -> PeerGone:
        """The exception for a peer that has gone."""
        fault = Fault.CLIENT_GONE if self.side is Blame.CLIENT else Fault.SERVER_GONE
        return PeerGone(f"the {self.side.value}'s connection was {how}", fault)

    async def more(self) -> bool:
        """Read on into the buffer; False at an orderly end.  Raises PeerGone."""
        try:
            piece = await self.reader.read(PIECE_BYTES)
        except OSError as error:
            raise self.departure(f"lost: {error_text(error)}") from None
        self.buffer += piece
        return piece != b""

    async def await_departure(self) -> None:
        """Raises PeerGone once the peer leaves, or has sent more ahead than a head may take."""
        while len(self.buffer) <= HEAD_LIMIT_BYTES and await self.more():
            pass
        raise self.departure("closed")

    async def read_head(self) -> bytes | None:
        """The next head, up to and with its empty line; None at an orderly end before it.
        Raises PeerGone, BadMessage."""
        search = HeadSearch(self.side)
        while (end := search.end(self.buffer)) < 0 and len(self.buffer) <= HEAD_LIMIT_BYTES:
            if not await self.more():
                if self.buffer:
                    raise self.departure("closed")
                return None
        if not 0 <= end <= HEAD_LIMIT_BYTES + 4:
            asked = self.side is Blame.CLIENT
            fault = Fault.HEAD_TOO_LARGE if asked else Fault.BAD_ANSWER
            raise BadMessage(f"the head is longer than {HEAD_LIMIT_BYTES} bytes", fault)
        head = bytes(self.buffer[:end])
        del self.buffer[:end]
        return head

    async def read_content(self, decoder: Decoder) -> bytes:
        """The next piece of a message's content; b"" once `decoder` is done.  Raises PeerGone,
        BadMessage."""
        while not decoder.done:
            if self.buffer or await self.more():
                size, content = len(self.buffer), decoder.feed(bytes(self.buffer))
                self.buffer[:] = decoder.rest
                if 2 * len(content) < size:  # tiny chunks take long: others have their turn
                    await asyncio.sleep(0)
                if content:
                    return content
            elif decoder.until_close:
                decoder.done = True
            else:
                raise self.departure("closed")
        return b""


Stream = tuple[MessageReader, asyncio.StreamWriter]  # one of our own connections to a server


class HttpClient(Upstream):
    """Asks one server for things of our own.  One idle connection is kept, so that a report each
    half second needs no new one, for POOL_IDLE_S: vLLM ends it a second later."""

    limit_bytes: float = FETCH_LIMIT_BYTES  # of an answer
    _idle: Stream | None = None
    _expiry: asyncio.TimerHandle | None = None

    async def fetch(
        self, path: str, timeout_s: float, content: bytes | None = None
    ) -> tuple[int, bytes]:
        """The status and the whole content.  Raises what `ask` raises."""
        pieces = list[bytes]()
        status = await self.ask(path, timeout_s, content, pieces.append)
        return status, b"".join(pieces)

    async def ask(
        self, path: str, timeout_s: float, content: bytes | None, take: Callable[[bytes], object]
    ) -> int:
        """GET, or POST some JSON, and return the status.  Each piece of the answer's content is
        taken as it comes, up to `limit_bytes`.  When an idle connection turns out to be closed,
        a new one is used.  Raises PeerGone, BadMessage, TimeoutError."""
        request = f"{'GET' if content is None else 'POST'} {self.prefix}{path} HTTP/1.1\r\n"
        request += f"Host: {self.authority}\r\nAccept: */*\r\n{self.key_line}"
        if self.name:
            request += f"Via: 1.1 {self.name}\r\n"
        if content is not None:
            request += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        message = f"{request}\r\n".encode("latin-1") + (content or b"")
        deadline = asyncio.get_running_loop().time() + timeout_s
        if (stream := self._take_idle()) is not None:
            with contextlib.suppress(Stale):
                async with within(timeout_s):
                    return await self._exchange(stream, message, take)
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            async with within(left_s):
                reader, writer = await asyncio.open_connection(
                    self.host, self.port, ssl=self.tls(), server_hostname=self.tls_name)
        except OSError as error:
            raise connect_failure(error, timeout_s) from None
        async with within(deadline - asyncio.get_running_loop().time()):
            return await self._exchange(
                (MessageReader(reader, Blame.SERVER), writer), message, take)

    async def _exchange(
        self, stream: Stream, message: bytes, take: Callable[[bytes], object]
    ) -> int:
        """Raises Stale where the connection ends before an answer has begun."""
        (server, writer), left_bytes, reusable = stream, self.limit_bytes, False
        try:
            writer.write(message)
            try:
                head, length = await read_final_head(server)
            except PeerGone as gone:
                raise Stale(str(gone), gone.fault) from None
            self.begins(head)
            decoder = decoder_for(response_framing(head, length, "GET"))
            while piece := await server.read_content(decoder):
                if (left_bytes := left_bytes - len(piece)) < 0:
                    text = f"the answer is longer than {self.limit_bytes} bytes"
                    raise BadMessage(text, Fault.BAD_ANSWER)
                take(piece)
            reusable = head.persists and not (
                server.buffer or decoder.until_close or self._idle
                or self.leads_elsewhere(writer.transport))
            return head.status
        finally:
            if reusable:
                loop, self._idle = asyncio.get_running_loop(), stream
                self._expiry = loop.call_later(POOL_IDLE_S, self.close)
            else:  # which also stops a vLLM that still generates
                writer.transport.abort()

    def begins(self, head: ResponseHead) -> None:
        """An answer with this head begins."""

    def _take_idle(self) -> Stream | None:
        stream, self._idle = self._idle, None
        if self._expiry is not None:
            self._expiry.cancel()
        return stream

    def close(self) -> None:
        if (stream := self._take_idle()) is not None:
            stream[1].transport.abort()


async def read_final_head(server: MessageReader) -> tuple[ResponseHead, Length]:
    """The next head that is no 1xx.  Raises PeerGone, BadMessage."""
    for _ in range(INFORMATIONAL_LIMIT):
        if (raw := await server.read_head()) is None:
            raise server.departure("closed without an answer")
        head, length = parse_response_head(raw)
        if head.status >= 200:
            return head, length
    text = f"more than {INFORMATIONAL_LIMIT} informational responses"
    raise BadMessage(text, Fault.BAD_ANSWER)


AUTOPSY_S = 0.5  # for which a server that lost an answer is asked whether it is there
AUTOPSY_PAUSE_S = 0.05  # one that is dying may still let in whom it does not hear


async def is_dead(client: HttpClient) -> bool:
    """Whether a server that has lost an answer is dead: it refuses connections, or its health path
    says that it has no engine."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + AUTOPSY_S
    while (left_s := deadline - loop.time()) > 0:
        try:
            status, _ = await client.fetch("/health", left_s)
            return status == 503
        except PeerGone as gone:
            if gone.fault is not Fault.SERVER_GONE:
                return gone.fault is Fault.CONNECT_FAILED
            await asyncio.sleep(AUTOPSY_PAUSE_S)
        except (BadMessage, TimeoutError):
            break
    return False


# ============================================================================================
#  43  pool
# ============================================================================================
#
# The connections to one server over which requests are passed on.

STALE_S = 0.25  # from a request to the close of a connection that was idle, as far as one goes
POOL_IDLE_LIMIT = 1024  # idle connections kept per server; more are closed


class Pool(Upstream):
    """The connections to one server: for requests, and a client for our own questions.  Idle ones
    are kept for POOL_IDLE_S, a second less than vLLM keeps them, and the newest is used first.  It
    is the sink of its idle wires: whatever a server says without being asked ends the connection.
    """

    def __init__(
        self, server: ServerSettings, secrets: Secrets = Secrets(), name: str = ""
    ) -> None:
        self.idle: dict[Wire, None] = {}
        self.client = HttpClient(server, secrets, name)
        super().__init__(server, secrets, name)

    def equip(self, secrets: Secrets) -> None:
        self.sees_client_keys = self.server.id not in secrets.strangers
        self.client.equip(secrets)
        super().equip(secrets)

    async def acquire(self, connect_timeout_s: float, stale: Stale | None = None) -> Wire:
        """An idle connection or a new one, which goes back to `keep`.  Who met a `stale` one gets
        a new one; where there is none to be had, the server may have died of what was said.
        Raises PeerGone."""
        while self.idle and stale is None:
            wire, _ = self.idle.popitem()
            wire.sink = None
            if not (wire.gone or wire.transport.is_closing()):
                wire.reused, wire.reusable = True, False
                wire.taken_at = wire.loop.time()
                return wire
        try:
            return await self.dial(connect_timeout_s)
        except PeerGone as gone:
            if stale is None:
                raise
            fault = Fault.SERVER_GONE if gone.fault is Fault.CONNECT_FAILED else gone.fault
            raise PeerGone(f"{stale}; then: {gone}", fault) from None

    async def dial(self, timeout_s: float) -> Wire:
        """A new connection.  Raises PeerGone."""
        loop, tls = asyncio.get_running_loop(), self.tls()
        try:
            here = self.host in OWN_ADDRESSES and tls is None
            if here and (sock := connect_locally(self.host, self.port)) is not None:
                return (await loop.create_connection(lambda: Wire(Blame.SERVER), sock=sock))[1]
            async with within(timeout_s):
                return (await loop.create_connection(
                    lambda: Wire(Blame.SERVER), self.host, self.port, ssl=tls,
                    server_hostname=self.tls_name))[1]
        except OSError as error:
            raise connect_failure(error, timeout_s) from None

    def keep(self, wire: Wire) -> None:
        """For another exchange, if it may have one; otherwise it is ended at once, which tells
        a vLLM that is still generating to stop."""
        wire.feeder = wire.sink = None
        good = wire.reusable and not (wire.gone or wire.buffer)
        if good and self.addresses:
            good = not self.leads_elsewhere(wire.transport)
        if not good or len(self.idle) >= POOL_IDLE_LIMIT:
            wire.abort()
            return
        if wire.held:
            wire.release()
        wire.sink = self
        wire.expect_by(wire.loop.time() + POOL_IDLE_S)
        self.idle[wire] = None

    def moved(self, addresses: Collection[str]) -> None:
        self.client.moved(addresses)
        super().moved(addresses)

    def close(self) -> None:
        self.client.close()
        for wire in list(self.idle):
            self.expired(wire)

    def feed(self, wire: Wire, piece: Piece) -> None:
        self.expired(wire)

    def lost(self, wire: Wire) -> None:
        self.idle.pop(wire, None)

    def expired(self, wire: Wire) -> None:
        self.idle.pop(wire, None)
        wire.sink = None
        wire.abort()


# Of this machine, in every network.
OWN_ADDRESSES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


def connect_locally(host: str, port: int) -> socket.socket | None:
    """A connection within this machine, which stands without waiting: half the time of one that is
    waited for.  None if it does not.  Raises OSError."""
    sock = socket.socket(OWN_ADDRESSES[host], socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # it is only said to be on its way
            sock.connect((host, port))
        if sock.connect_ex((host, port)) in (0, errno.EISCONN):
            return sock
    except OSError:
        sock.close()
        raise
    sock.close()
    return None


async def read_response_head(wire: Wire, deadline: float) -> tuple[ResponseHead, Length]:
    """The next head that a server says, maybe a 1xx.  Raises Stale, PeerGone, BadMessage,
    TimeoutError."""
    refused = wire.transport.is_closing()  # what was written found a reset
    try:
        raw = await wire.read_head(deadline)
    except BadMessage as bad:
        raise BadMessage(str(bad), Fault.BAD_ANSWER) from None
    if raw is None:
        text = f"the server's connection was closed without an answer{wire.trouble}"
        unheard = (refused or wire.unheard) and wire.loop.time() - wire.taken_at <= STALE_S
        raise (Stale if wire.reused and unheard else PeerGone)(text, Fault.SERVER_GONE)
    wire.reused = False  # it is alive; from here on an end is a loss
    return parse_response_head(raw)


# ============================================================================================
#  44  pump
# ============================================================================================
#
# Bytes on their way through us, below the awaits: what comes in on one wire goes out on another
# in the same turn of the event loop.  Back-pressure is the wires': while the one written to is
# blocked, its feeder is held.

INTAKE_BYTES = 256 * 1024  # of large content, at which it is looked through
TAIL_PIECES = 4  # finish_reason, usage, [DONE]: what tells whether an answer was whole


NOT_WHOLE = "the server ended the answer before it was whole"
StreamKeeper = Transcript | Join  # of the events of a stream that may go on at another server
TINY_CHUNKS_BYTES = 16 * 1024  # of a piece's framing; taking it apart takes some ms


class Pump:
    """Moves an answer's content from a server to the client: the sink of the server's wire.

    `done` is set when the content has ended, or to the exception that ended it: PeerGone,
    BadMessage, or TimeoutError after `silence_s` without a piece.  A client that takes nothing of
    it for `patience_s` is cut off.
    """

    __slots__ = (
        "client", "server", "decoder", "chunked", "done", "sent_bytes", "first_at", "pieces",
        "tail", "moved_at", "looked_bytes", "keeper", "_notation", "_lent", "_silence_s",
        "_patience_s", "_look_s", "_seen", "_gaps", "_gaps_child",
    )

    def __init__(
        self, client: Wire, server: Wire, decoder: Decoder, chunked: bool, notation: Notation,
        silence_s: float, patience_s: float, gaps: Histogram, gaps_child: list[float] | None,
        shown: bytes = b"", keeper: StreamKeeper | None = None,
    ) -> None:
        self.client, self.server, self.decoder, self.chunked = client, server, decoder, chunked
        self.keeper = keeper
        self._notation = notation
        self.done: asyncio.Future[None] = client.loop.create_future()
        # Pieces go on as they are.
        self._lent = not (chunked or isinstance(decoder, ChunkedDecoder) or keeper)
        self.sent_bytes = self.pieces = 0
        self.first_at: float | None = None  # when the first piece came
        # The last pieces, of what was shown before, too.
        self.tail: deque[bytes] = deque((shown,), maxlen=TAIL_PIECES)
        self.moved_at = client.loop.time()  # when the last piece came
        self.looked_bytes = -1  # sent when the pace was last looked at; -1: it was not
        self._silence_s, self._gaps, self._gaps_child = silence_s, gaps, gaps_child
        self._patience_s, self._look_s = patience_s, min(silence_s, patience_s)
        # Of a slow client, at the last look: the last piece, what it had not taken, since when.
        self._seen: tuple[float, float, float] = (0.0, 0.0, 0.0)
        server.sink, client.feeder = self, server
        server.expect_by(self.moved_at + self._look_s)
        if client.blocked:
            server.hold()
        elif server.held:
            server.release()
        if server.buffer:  # came with what was held back
            self.feed(server, server.take())
        if server.gone and server.sink is self:
            self.lost(server)

    def feed(self, wire: Wire, piece: Piece) -> None:
        """A piece came.  This is the hottest code there is: once per piece of every stream."""
        now, decoder = wire.loop.time(), self.decoder
        data: Any = piece if self._lent else bytes(piece)
        try:
            content = out = decoder.feed(data)
            if self.keeper is not None and content:
                content = self.keeper.take(content)
        except BadMessage as bad:
            self._end(bad)
            return
        if content:
            if self.first_at is None:
                self.first_at = now
            if self._gaps_child is not None:
                self._gaps.observe(self._gaps_child, now - self.moved_at)
            self.moved_at = now
            last = content if len(content) <= TAIL_BYTES else content[-TAIL_BYTES:]
            self.tail.append(bytes(last))
            self.sent_bytes += len(content)
            self.pieces += 1
            if self.chunked:
                out = data if decoder.verbatim and content is out else encode_chunk(content)
            else:
                out = content
        elif out:  # held back, or shown before
            self.moved_at, out = now, b""
        if len(data) - len(content) > TINY_CHUNKS_BYTES:  # others have their turn between them
            wire.at_once = RECEIVED[:TINY_CHUNKS_BYTES]
        wire.deadline = now + self._look_s
        if self.keeper is not None and self.keeper.fault is not None:
            self.client.transport.write(out)
            self._end(BadMessage(NOT_WHOLE, self.keeper.fault))
        elif decoder.done:
            self._finish(bytes(out))
        elif self._lent:
            self.client.write_lent(out)
        elif out:
            self.client.transport.write(out)

    def lost(self, wire: Wire) -> None:
        if not (self.decoder.until_close and wire.clean):
            self._end(wire.departure())
            return
        self.decoder.done = True
        self._finish(b"")

    def _finish(self, out: bytes) -> None:
        """The last bytes.  An end that is well-formed may still be that of an answer cut short;
        it stays away then, unless the server's own last event tells the client."""
        fault = bad_end(b"".join(self.tail)[-TAIL_BYTES:], self._notation)
        try:
            if self.keeper is not None and (rest := self.keeper.rest()):
                out += encode_chunk(rest) if self.chunked else rest
        except BadMessage as bad:
            self._end(bad)
            return
        if fault is not Fault.ABORTED:
            self.client.transport.write(out + LAST_CHUNK if self.chunked else out)
        self._end(fault and BadMessage(NOT_WHOLE, fault))

    def expired(self, wire: Wire) -> None:
        """Silence is the server's, unless it is held because the client takes nothing; a client
        that takes some of what is written to it is slow, but has time."""
        now, backlog = wire.loop.time(), self.client.transport.get_write_buffer_size()
        if self.client.blocked:
            moved_at, before, since = self._seen
            if moved_at != self.moved_at or backlog < before:
                self._seen = self.moved_at, backlog, now
            elif now - since >= self._patience_s:
                self.client.abort()
                return
        elif now >= self.moved_at + self._silence_s:
            self._end(TimeoutError())
            return
        wire.expect_by(now + self._look_s)

    def _end(self, error: Exception | None) -> None:
        self.server.sink = self.client.feeder = None
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class Intake:
    """Gathers a request's content.  Where its length is known, it is the sink of the client's wire:
    who reads is not woken for each piece, and no piece is copied twice."""

    __slots__ = ("client", "content", "_decoder", "_length", "_silence_s", "_enough")

    def __init__(self, client: Wire, framing: Framing, silence_s: float) -> None:
        self.client, self.content = client, bytearray()
        self._decoder = decoder_for(framing) if framing.chunked else None
        self._length = framing.length or 0
        self._silence_s = silence_s
        self._enough = 0  # bytes that are worth waking somebody

    @property
    def soon(self) -> int:
        """The bytes that may be there after the next `more`."""
        have = len(self.content)
        return have if self._decoder is not None else min(self._length, have + INTAKE_BYTES)

    async def more(self) -> bool:
        """Wait for more of it; False once it is all there.  Raises PeerGone, BadMessage,
        TimeoutError."""
        client, content, decoder = self.client, self.content, self._decoder
        if decoder is not None:
            if content and client.buffer:  # taking chunks apart is slow: others first
                await asyncio.sleep(0)
            content += await client.read_content(decoder, client.loop.time() + self._silence_s)
            client.buffer[:0] = decoder.rest
            client.count()
            return not decoder.done
        self._enough = self.soon
        content += client.take(self._length - len(content))
        client.sink, client.wanted = self, self._length - len(content)
        try:
            while len(content) < self._enough:
                if client.gone:
                    raise client.departure()
                await client.news(client.loop.time() + self._silence_s)
        finally:
            client.sink, client.wanted = None, 0
        return len(content) < self._length

    def feed(self, wire: Wire, piece: Piece) -> None:
        left = self._length - len(self.content)
        if len(piece) > left:  # the client's next request
            wire.keep(piece[left:])
            piece = piece[:left]
        self.content += piece
        wire.wanted = left - len(piece)
        wire.deadline = wire.loop.time() + self._silence_s
        if len(self.content) >= self._enough:
            wire.wake()

    def lost(self, wire: Wire) -> None: ...  # who reads is woken, and sees it
    def expired(self, wire: Wire) -> None: ...


class Tunnel:
    """Moves bytes one way after a change of protocol; `ended` is set when its wire ends."""

    def __init__(self, wire: Wire, to: Wire, ended: asyncio.Event) -> None:
        self.to, self.ended = to, ended
        wire.sink, to.feeder, wire.wanted = self, wire, RECEIVED_BYTES
        wire.expect_by(INFINITY)  # a quiet websocket is a good one
        if wire.buffer:
            to.transport.write(wire.take())
        if wire.gone:
            ended.set()

    def feed(self, wire: Wire, piece: Piece) -> None:
        self.to.transport.write(bytes(piece))

    def lost(self, wire: Wire) -> None:
        self.ended.set()

    def expired(self, wire: Wire) -> None: ...


# ============================================================================================
#  45  response
# ============================================================================================
#
# The client's side of an exchange: whatever a response is made of, a server's answer or our own
# words, it is written here, and only here is known what the client has seen of it.

REQUEST_ID_LIMIT = 200  # characters of a client's request id; a longer one is replaced
# Of what a fault is, in vLLM's words.
PARAMETERS = {Fault.UNKNOWN_MODEL: "model", Fault.UNKNOWN_RESPONSE: "response_id"}


class Reply(NamedTuple):
    """A response of the balancer's own."""

    status: int
    content: bytes = b""
    content_type: str = "application/json"
    fields: Pairs = ()


def request_id(
    fields: Fields, names: Sequence[str], taken: Collection[str], draw: random.Random
) -> str:
    """The client's own id for its request, or a new one.  What is in other fields may be said of
    several requests: those that are not the first of them in progress get a suffix."""
    id, of_one = own_id(fields, names)
    if not id:
        return f"{draw.getrandbits(128):032x}"
    return id if of_one or id not in taken else f"{id}-{draw.getrandbits(32):08x}"


@remembered
def own_id(fields: Fields, names: Sequence[str]) -> tuple[str, bool]:
    """A client's id for its request, or "", and whether it is in the field that is for that."""
    for name in map(str.lower, names):
        value = fields.get(name)
        usable = 0 < len(value) <= REQUEST_ID_LIMIT and value.isascii() and value.isprintable()
        if usable and not ENGINE_HANDLES.search(value):
            return value, name == "x-request-id"
    return "", False


def date_field() -> tuple[str, str]:
    return date_at(int(time.time()))


@functools.lru_cache(1)  # once a second, and not for each answer
def date_at(second: int) -> tuple[str, str]:
    return "Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))


# What a refusal says beside, RFC 9110 §15.5.2, §15.5.6, §15.5.16.
REFUSAL_FIELDS = {
    Fault.UNAUTHORIZED: ("WWW-Authenticate", "Bearer"),
    Fault.SERVER_DIED_TWICE: ("X-Should-Retry", "false"),  # which the official SDKs obey
    Fault.UNSUPPORTED_CODING: ("Accept-Encoding", ACCEPTED_CODINGS),
}


class Unread(Protocol):
    """A request's content, as far as a response depends on it."""

    unread: bool  # some was not taken off the wire yet


class Response:
    """The response to one request on one client's wire."""

    def __init__(
        self, client: Wire, request: RequestHead, id: str, settings: Settings,
        body: Unread | None = None,
    ) -> None:
        self.client, self.request, self.id, self.settings = client, request, id, settings
        self._body = body  # of the request, which may not have been read to its end
        self.persists = body is not None and request.persists  # so may the wire, for another one
        crosses = "origin" in request.fields.values and inference_path(request.path)
        self.cors = cors_fields(
            request, settings.cors_allowed_origins, settings.cors_allow_credentials
        ) if crosses else []
        self.status = 0  # shown to the client; 0 until then
        self.streams = False  # it is an event stream, and its events can be read
        self.notation = Notation.OPAQUE  # of what a server says in it
        self.heartbeat_sent = False  # of which the client has seen comments, and no answer yet
        self.framing: Framing | None = None
        self.sent_bytes = 0
        self.tail = b""  # the last pieces of content that were sent
        self.first_byte_at: float | None = None
        self.end = "complete"  # or the label of a fault
        self.keeper: StreamKeeper | None = None  # of what it shows, if it can go on elsewhere
        self._usage: tuple[bytes, dict[str, int]] = b"", {}  # of which tail

    @property
    def usage(self) -> dict[str, int]:
        """What its end says of tokens; see `usage_of`."""
        if self._usage[0] is not self.tail:
            self._usage = self.tail, usage_of(self.tail, self.notation)
        return self._usage[1]

    @property
    def begun(self) -> bool:
        return self.status > 0

    def begin(
        self, head: ResponseHead, framing: Framing | None, content: bytes, done: bool, added: Pairs
    ) -> bool:
        """Write a server's head and the first of its content, or all if it is `done`.  Returns
        whether the rest is wanted, too."""
        if self.heartbeat_sent:
            return self.continue_stream(head, content, done)
        self.status, self.framing = head.status, framing
        self.streams = head.is_event_stream and not head.is_encoded
        self.persists = self.persists and framing != UNTIL_CLOSE
        fields = [*added, *self.cors]
        if "date" not in head.fields.values:
            fields.append(date_field())  # RFC 9110 §6.6.1
        if head.is_event_stream:
            fields.append(("X-Accel-Buffering", "no"))  # an nginx before us would collect events
        out = return_response(head, self.request, framing, self.persists, fields, self.id)
        if content:
            out += encode_chunk(content) if framing == CHUNKED else content
            self.sent(len(content), content[-TAIL_BYTES:], self.client.loop.time())
        self.client.transport.write(out + LAST_CHUNK if done and framing == CHUNKED else out)
        return not done

    def heartbeat(self, comment: bytes = b": waiting\n\n") -> None:
        """A comment, which readers of events skip, for one that waits.  With the first, the head
        is ours, and any server's answer may still follow."""
        if self.client.blocked:
            return  # it has not taken the last ones
        if not (self.heartbeat_sent or self.begun):
            self.heartbeat_sent = self.streams = True
            self.framing = CHUNKED if self.request.minor else UNTIL_CLOSE
            self.persists = self.persists and self.framing == CHUNKED
            fields = [date_field(), ("Content-Type", "text/event-stream; charset=utf-8"),
                      ("X-Accel-Buffering", "no"), *self.cors]
            head = ResponseHead(200, "OK", 1, Fields([], {}))
            self.client.transport.write(
                return_response(head, self.request, self.framing, self.persists, fields, self.id))
        self.write(comment)

    def continue_stream(self, head: ResponseHead, content: bytes, done: bool) -> bool:
        """A server's answer, after comments.  What is no event stream, or one in a coding that
        our head did not announce, becomes an error event."""
        self.status = 200
        if not head.is_event_stream or head.status != 200 or head.is_encoded:
            self.persists, self.end = False, "server_error"
            plain = done and content and b"\n" not in content and not head.is_encoded
            text = f"the server answered {head.status}{' in a coding' * head.is_encoded}"
            line = content if plain else json.dumps(
                {"error": {"message": text, "code": head.status}}).encode()
            self.write(error_event(line, self.request.path))
            return False
        if content:
            self.write(content)
            self.sent(len(content), content, self.client.loop.time())
        if done and self.framing == CHUNKED:
            self.client.transport.write(LAST_CHUNK)
        return not done

    def inform(self, head: ResponseHead) -> None:
        """Pass a server's 1xx on to a client that may know it."""
        if self.request.minor >= 1 and not self.heartbeat_sent:
            self.client.transport.write(return_response(head, self.request, None, True))

    def switch_protocols(self, head: ResponseHead) -> None:
        """The server agreed to another protocol; what follows is not ours to read."""
        self.status, self.persists = 101, False
        self.client.on_gone = None  # an end like any other
        self.client.transport.write(return_response(head, self.request, None, True))

    def close_after(self) -> None:
        """No other request is taken from this connection."""
        self.persists = False

    def abandoned(self, fault: Fault) -> None:
        """The client has left."""
        self.status, self.end = self.status or fault.status, fault.label

    def failed(self, fault: Fault) -> None:
        """What is shown are a server's own words for a failure."""
        self.end = fault.label

    def write(self, content: bytes) -> None:
        chunked = self.framing == CHUNKED
        self.client.transport.write(encode_chunk(content) if chunked else content)

    def go_on(self, content: bytes, done: bool) -> None:
        """Write what another server has to say, after a break; all of the rest if it is `done`."""
        if content:
            self.write(content)
            self.sent(len(content), content[-TAIL_BYTES:], None)
        if done and self.framing == CHUNKED:
            self.client.transport.write(LAST_CHUNK)

    def sent(self, size: int, tail: bytes, first_at: float | None) -> None:
        """Book content that was written."""
        self.sent_bytes += size
        self.tail = tail or self.tail
        self.first_byte_at = self.first_byte_at or first_at

    def send(self, reply: Reply) -> None:
        """Write a response of our own."""
        if self._body is not None and self._body.unread:
            self.persists = False
        self.status, self.sent_bytes = reply.status, len(reply.content)
        fields = [date_field()]
        if reply.content:
            fields.append(("Content-Type", reply.content_type))
        fields += [*reply.fields, ("X-Request-Id", self.id), *self.cors]
        self.client.transport.write(
            own_response(reply.status, self.request, reply.content, self.persists, fields)
        )

    def refuse(
        self, fault: Fault, text: str, retry_after_s: int = 0, more: Pairs = ()
    ) -> None:
        """Write an error of our own, in place of the answer or where it breaks off."""
        if self.begun or self.heartbeat_sent:
            self.status = self.status or 200
            self.break_off(fault, text)
            return
        self.end = fault.label
        fields = [("X-MVLLM-Error", fault.label), *more]
        if fault.status == 503 and not retry_after_s:
            retry_after_s = min(30, max(1, math.ceil(self.settings.health_check_interval)))
        if retry_after_s:
            fields.append(("Retry-After", str(retry_after_s)))
        if fault in REFUSAL_FIELDS:
            fields.append(REFUSAL_FIELDS[fault])
        content = error_body(fault, text, self.request.path, PARAMETERS.get(fault))
        self.send(Reply(fault.status, content, fields=fields))

    def break_off(self, fault: Fault, text: str) -> None:
        """It was begun and cannot be finished.  A stream's reader gets an error event; whoever
        reads, the message ends broken, so that nobody takes it for whole."""
        self.persists, self.end = False, fault.label
        if not self.streams or self.framing not in (CHUNKED, UNTIL_CLOSE):
            self.client.reset()
            return
        path, text = self.request.path, f"The answer broke off: {text.rstrip('.')}."
        event = error_event(error_body(fault, text, path), path)
        if self.tail and not self.tail.endswith((b"\n\n", b"\r\n\r\n")):
            event = b"\n\n" + event  # what was cut must not swallow it
        self.write(event)  # and the last chunk stays away


class abandoned_if_gone:  # it reads as a sentence
    """`with abandoned_if_gone(client):` the block is left by PeerGone the moment the client
    leaves, wherever it waits."""

    __slots__ = ("_client", "_task")

    def __init__(self, client: Wire, task: asyncio.Task[Any] | None = None) -> None:
        self._client, self._task = client, task or asyncio.current_task()

    def __enter__(self) -> None:
        if self._client.gone:
            raise self._client.departure()
        self._client.on_gone = self._task.cancel  # type: ignore[union-attr]

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._client.on_gone = None
        if kind is asyncio.CancelledError and self._client.gone:
            self._task.uncancel()  # type: ignore[union-attr]
            raise self._client.departure() from None


# ============================================================================================
#  46  logging
# ============================================================================================
#
# Lines for people and programs that may read slowly or not at all, which is no reason for a client
# to wait.

REPEATS_S = 60.0  # for which a warning that comes again and again is only counted
LOG_LINES_LIMIT = 10_000  # lines waiting for a stuck terminal or pipe; more are dropped
Subscriber = Callable[[Any], object]
# Returns who is told of each event of this kind (RequestFacts or Transition); None: nobody.
Subscribe = Callable[[type], Subscriber | None]
DROPPED = "mvllm_lite: %d log lines were dropped"
LINE_FORM = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"


class Writer(logging.handlers.QueueListener):
    """Has lines written by a thread of its own.  When that is stuck in a terminal, pipe or disk
    that takes nothing, lines are dropped and counted: it must not stop answers, nor our end."""

    def __init__(self, target: logging.Handler) -> None:
        """`target` is used by this thread alone, and what it raises is counted."""
        super().__init__(queue.SimpleQueue(), target)
        self.dropped = 0
        self.closing, self.closed = threading.Event(), threading.Event()
        self.start()

    def say(self, line: str) -> None:
        if self.queue.qsize() < LOG_LINES_LIMIT:
            self.queue.put(line)
        else:
            self.dropped += 1

    def dequeue(self, block: bool) -> logging.LogRecord | None:
        """All that comes within LOG_PAUSE_S, as one record: to wake this thread for each line took
        a third of the time of a small request."""
        batch = [self.queue.get(block)]
        self.closing.wait(LOG_PAUSE_S)
        batch += [self.queue.get() for _ in range(self.queue.qsize())]
        lines = [line for line in batch if line is not None]
        if self.dropped:
            lines.append(DROPPED % self.dropped)
            self.dropped = 0
        if not lines:
            self.closed.set()
            return None
        if None in batch:
            self.enqueue_sentinel()
        return logging.makeLogRecord({"msg": "\n".join(lines)})

    def handle(self, record: logging.LogRecord) -> None:
        """Without the handler's lock, since Python waits for that when it ends."""
        try:
            self.handlers[0].emit(record)
        except OSError:  # nobody reads any more, or the disk is full
            if not self.closing.is_set():
                self.dropped += record.msg.count("\n") + 1

    def stop(self) -> None:
        """Everything that waits is written, if that takes no longer than a second."""
        self.closing.set()
        self.enqueue_sentinel()
        self.closed.wait(1.0)


class Descriptor(logging.Handler):
    """Writes to a descriptor that may take nothing.  A stream's own lock would be held then, for
    which Python waits when it ends.  Raises OSError."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{record.msg}\n".encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self.descriptor, data) :]


class LineWriter(logging.handlers.QueueHandler):
    """Log lines, from `level` on, for a Writer.  A warning that comes again and again is a line,
    and then a count."""

    def __init__(self, writer: Writer, level: int = logging.DEBUG) -> None:
        super().__init__(writer.queue)
        self.writer = writer
        self.setLevel(level)
        self.setFormatter(logging.Formatter(*LINE_FORM))
        self._last, self._since, self._repeats = "", 0.0, 0
        self._kinds: dict[str, tuple[float, int]] = {}  # said when, and how often since then

    def emit(self, record: logging.LogRecord) -> None:
        if kind := getattr(record, "kind", ""):  # whatever stands between
            since, count = self._kinds.get(kind, (-INFINITY, 0))
            if record.created < since + REPEATS_S:
                self._kinds[kind] = since, count + 1
                return
            self._kinds[kind] = record.created, 0
            self.say_count(count, kind)
        counts = record.levelno >= logging.WARNING and not record.exc_info
        said = record.getMessage() if counts else ""
        if said and said == self._last and record.created < self._since + REPEATS_S:
            self._repeats += 1
            return
        self.say_repeats()
        self._last, self._since = said, record.created
        super().emit(record)

    def prepare(self, record: logging.LogRecord) -> str:
        return self.format(record)

    def enqueue(self, line: str) -> None:  # type: ignore[override]
        self.writer.say(line)

    def say_repeats(self) -> None:
        self.say_count(self._repeats, self._last)
        self._last, self._repeats = "", 0

    def say_count(self, count: int, text: str) -> None:
        if count:
            self.writer.say(f"{timed(time.time())} WARNING {count} times more: {text}")


def timed(at: float) -> str:
    """As LINE_FORM has it."""
    return f"{local_second(int(at))}.{int(at % 1 * 1000):03d}"


@functools.lru_cache(1)
def local_second(at: int) -> str:
    return time.strftime(LINE_FORM[1], time.localtime(at))


class LogFile(logging.handlers.RotatingFileHandler):
    """Writes to the end of a file, which is opened for each batch of lines, since logrotate or
    another process of ours may have moved it away.  Beyond a size it goes on in a new one; old
    ones are compressed, and removed when they are `days` old.  Their names are times: numbers are
    moved on from file to file, which destroys them on a full disk, and between two processes."""

    def __init__(self, path: str, size: int = 0, days: float = INFINITY) -> None:
        super().__init__(path, maxBytes=size, backupCount=1, encoding="utf-8",
                         errors="backslashreplace", delay=True)
        self.days = days
        self.rotate_from = 0.0  # after a failure, in Unix time
        self.expire()

    def emit(self, record: logging.LogRecord) -> None:
        """Raises OSError."""
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        super().emit(record)
        self.close()

    def handleError(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self.close()
        raise  # noqa: PLE0704  # what `emit` has caught

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        if time.time() < self.rotate_from or not os.path.exists(self.baseFilename):
            return False
        return os.path.getsize(self.baseFilename) > 0 and bool(super().shouldRollover(record))

    def rotation_filename(self, default_name: str) -> str:
        return f"{self.baseFilename}.{datetime.datetime.now():%Y-%m-%dT%H-%M-%S.%f}.gz"

    def rotate(self, source: str, dest: str) -> None:
        """Move it away at once, so that other processes see that; then compress it at leisure.
        Whatever fails, lines go on, and nothing that is there is lost."""
        old, part = dest.removesuffix(".gz"), f"{dest}.part"
        try:
            os.rename(source, old)
            with open(old, "rb") as plain, gzip.open(part, "wb") as compressed:
                shutil.copyfileobj(plain, compressed)
            os.replace(part, dest)
            os.remove(old)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(part)
            self.rotate_from = time.time() + REPEATS_S
            log.warning("%s is not rotated: %s", shown(source), error_text(error))
        self.expire()

    def expire(self) -> None:
        for name in glob.glob(f"{glob.escape(self.baseFilename)}.[12]*"):
            with contextlib.suppress(OSError):  # another process does the same
                if os.path.getmtime(name) < time.time() - self.days * 86400:
                    os.remove(name)


class EventKeeper(logging.Handler):
    """Keeps what is worth a line in the log for the status page.  What is of one `kind`, and comes
    again, is one event with a count."""

    def __init__(self, events: deque[dict[str, str]]) -> None:
        super().__init__(logging.INFO)
        self.events = events
        # By kind: the event, how often it came, since when and until when.
        self._kinds: dict[str, tuple[dict[str, str], int, str, float]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        event = {"time": when, "level": record.levelname.lower(), "text": record.getMessage()[:500]}
        if kind := getattr(record, "kind", ""):
            before, count, since, until = self._kinds.get(kind, ({}, 0, when, -INFINITY))
            if record.created > until + REPEATS_S:
                before, count, since = {}, 0, when
            if count:
                event["text"] += f", {count + 1} times since {since}"
                with contextlib.suppress(ValueError):
                    self.events.remove(before)
            self._kinds[kind] = event, count + 1, since, record.created
        self.events.append(event)


def not_writable(path: str) -> str:
    """Why no lines can be written to the end of that file, or ''."""
    descriptor = -1
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK  # a pipe might never open
        descriptor = os.open(path, flags, 0o640)
        return "" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "it is not a regular file"
    except OSError as error:
        return error_text(error)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


class Console(LineWriter):
    """Lines on stdout, which a screen takes the place of."""


def saying_requests(on_console: Callable[[], bool], kind: type) -> Subscriber | None:
    """A request's line wherever there are lines, at a fraction of what the logging module takes."""
    if kind is not RequestFacts or not log.isEnabledFor(logging.INFO):
        return None
    return functools.partial(say_request, on_console)


def say_request(on_console: Callable[[], bool], facts: RequestFacts) -> None:
    line = f"{timed(time.time())} INFO {access_line(facts)}"
    for one in log.handlers:
        if isinstance(one, LineWriter) and one.level <= logging.INFO and (
                not isinstance(one, Console) or on_console()):
            one.writer.say(line)


@contextlib.contextmanager
def logging_to_stdout(level: str) -> Iterator[None]:
    """Log lines go to stdout."""
    writer = Writer(Descriptor(sys.stdout.fileno()))
    console = Console(writer)
    log.setLevel(level)
    log.propagate = False
    log.addHandler(console)
    try:
        yield
    finally:
        log.removeHandler(console)
        console.say_repeats()
        writer.stop()


@contextlib.contextmanager
def logging_to_files(s: Settings, listeners: list[Subscribe]) -> Iterator[None]:
    """Log lines go to files, too, and what `listeners` are told; to those that can be written."""
    before, kept = list(listeners), list[LineWriter]()
    lines = log_file_writer(s, s.log_file, s.log_file_bytes, s.log_days)
    errors = log_file_writer(s, s.error_log_file, s.log_file_bytes, s.error_log_days)
    facts = log_file_writer(s, s.structured_log_file, s.structured_log_file_bytes, s.log_days)
    if lines is not None:
        kept.append(LineWriter(lines))
    if errors is not None:
        kept.append(LineWriter(errors, logging.ERROR))
    if facts is not None:
        listeners.append({kind: functools.partial(say_record, facts, record)
                          for kind, record in RECORDS.items()}.get)
    for handler in kept:
        log.addHandler(handler)
    try:
        yield
    finally:
        listeners[:] = before
        for handler in kept:
            log.removeHandler(handler)
            handler.say_repeats()
        for writer in (lines, errors, facts):
            if writer is not None:
                writer.stop()


def log_file_writer(s: Settings, name: str, size: int, days: float) -> Writer | None:
    """For a file in `log_dir`; None if it is not wanted or, as the log says, cannot be written."""
    if not (s.log_dir and name):
        return None
    path = os.path.join(s.log_dir, name)
    with contextlib.suppress(OSError):
        os.makedirs(s.log_dir, exist_ok=True)
    if why := not_writable(path):
        log.warning("no log file %s: %s", shown(path), why)
        return None
    return Writer(LogFile(path, size, days))


RECORDS: dict[type, Callable[[float, Any], str]] = {
    RequestFacts: request_record, Transition: transition_record,
}


def say_record(writer: Writer, record: Callable[[float, Any], str], event: Any) -> None:
    writer.say(record(time.time(), event))


def trace_writer(path: str) -> Writer | None:
    """Writes to the end of a file; None, and the log says why, if that cannot be."""
    if why := not_writable(path):
        log.error("no trace is written to %s: %s", shown(path), why)
        return None
    return Writer(LogFile(path))


# ━━━ part VIII: a request ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  47  shared state
# ============================================================================================
#
# What all exchanges, watchers and local pages share, each of it with an owner: clients, pools,
# news, looks at servers, requests under way.

GONE_KEPT_S = 900.0  # for which a server's series outlive it: every scrape has seen its last counts
LOOK_PAUSE_S = 1.0  # between two looks at a server's models that requests ask for


class Running(Protocol):
    """A request that is with a server, for the server's watcher to see and to end: an Attempt."""

    begun_at: float
    content_bytes: int
    pump: Pump | None
    server: str
    request: OutboundRequest
    response: Response

    @property
    def waits(self) -> bool: ...
    def movable(self) -> bool: ...
    def move(self) -> None: ...
    def give_up(self, even_begun: bool) -> None: ...


class Clients:
    """Connections of clients, and what each has going on."""

    def __init__(self, s: Settings) -> None:
        self.tasks: dict[Wire, asyncio.Task[None]] = {}
        self.limit = s.max_connections
        self.idle: dict[Wire, None] = {}  # between two requests, the longest idle first
        self.exchanges: dict[Wire, Response | None] = {}  # None while a request's head still comes
        self.ids = set[str]()  # of these requests
        self.forwarding = 0  # requests that were let in, and are not answered yet
        self.backlog = Backlog(s.max_buffered_bytes)

    def end_idle(self, count: int) -> None:
        """End so many idle connections, the longest idle first, as if their time were up: a request
        that arrives this very moment is still heard."""
        for wire in list(itertools.islice(self.idle, count)):
            wire.expect_by(wire.loop.time())


class Pools:
    """The connections to each server, with the keys and certificates that they need."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.secrets = Secrets()
        self.by_server: dict[str, Pool] = {}

    def get(self, server: ServerSettings) -> Pool:
        if (pool := self.by_server.get(server.id)) is None:
            pool = self.by_server[server.id] = Pool(server, self.secrets, self.name)
        return pool

    def adopt(self, secrets: Secrets) -> None:
        self.secrets = secrets
        for pool in self.by_server.values():
            pool.equip(secrets)

    def equip(self, server: ServerSettings) -> None:
        """A server's secrets may be others now, and where it is reached."""
        if (pool := self.by_server.get(server.id)) is None:
            return
        if (pool.server.url, pool.server.address) != (server.url, server.address):
            self.by_server.pop(server.id).close()
        else:
            pool.equip(self.secrets)

    def keep(self, servers: Collection[str]) -> None:
        """Close the connections to all other servers, which are named by their ids."""
        for id in self.by_server.keys() - servers:
            self.by_server.pop(id).close()


class News:
    """Wakes whoever waits for news of the fleet, and tells subscribers of each request that has
    ended and of each transition."""

    def __init__(self, queue: WaitQueue) -> None:
        self.subscribers: list[Subscribe] = []
        self._queue, self._changed = queue, asyncio.Event()

    def publish(self, kind: type, event: Callable[[], Any]) -> None:
        """Tell those who want to hear of this kind of event."""
        said = None
        for hears in self.subscribers:
            if (tell := hears(kind)) is not None:
                said = event() if said is None else said
                tell(said)

    def notify(self) -> None:
        """Wake all who wait for news of the fleet."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._queue.hand_over()

    async def changed(self) -> None:
        await self._changed.wait()


class Looks:
    """Servers that are asked for their models at once, since requests want to know."""

    def __init__(self) -> None:
        self.wanted = set[str]()
        self.ended: dict[str, float] = {}  # when each was last asked so
        self.refreshing: asyncio.Task[None] | None = None  # all servers' models
        self._wakers: dict[str, asyncio.Event] = {}  # of their watchers

    def want(self, server: str) -> bool:
        """Have a server asked by its watcher.  Returns whether it will be: not if it just was, for
        the same reason."""
        now = asyncio.get_running_loop().time()
        if server not in self.wanted and now - self.ended.get(server, -INFINITY) > LOOK_PAUSE_S:
            self.wanted.add(server)
            if server in self._wakers:
                self._wakers[server].set()
        return server in self.wanted

    async def rest(self, server: str, seconds: float) -> None:
        """For a server's watcher: rest for so long, or until it is to look."""
        self._wakers[server] = waker = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.0 if server in self.wanted else seconds):
                await waker.wait()

    def done(self, server: str) -> bool:
        """A server was asked.  Returns whether that was wanted."""
        if wanted := server in self.wanted:
            self.wanted.discard(server)
            self.ended[server] = asyncio.get_running_loop().time()
        return wanted

    def keep(self, servers: Collection[str]) -> None:
        """Forget all others."""
        self.wanted.intersection_update(servers)
        for known in (self.ended, self._wakers):
            for server in known.keys() - servers:
                del known[server]


def clock_now() -> Clock:
    return Clock(asyncio.get_running_loop().time(), time.time())


class Process:
    """What is known of this process."""

    def __init__(self, name: str) -> None:
        self.name = name  # in Via
        self.address = ""
        self.started_at = time.time()
        self.reloaded_at: float | None = None  # on the loop's clock
        self.hint = ""  # what to try, for people
        self.settings_error = ""  # why the settings file could not be used when it was last read
        self.stopping = False
        self.stalled_at = -INFINITY  # when it last turned out to have stood still
        self.pulse_due_at = INFINITY  # when that is looked at next

    def stood_still_since(self, then: float, now: float) -> bool:
        """Whether this process has stood still since then, even if its pulse has yet to say so."""
        return self.stalled_at >= then or now > self.pulse_due_at + STALL_S


class Requests:
    """What all requests that are under way have in common."""

    def __init__(self) -> None:
        self.budget = RetryBudget()
        self.queue = WaitQueue()
        self.poison = Poison()
        self.memory = Memory()  # of streams that may go on elsewhere
        self.tests: dict[bytes, asyncio.Event] = {}  # of contents in `poison` that are being tried
        self.stored = StoredResponses()
        self.running: dict[str, set[Running]] = {}  # by server

    def report(self, now: float) -> list[RunningStatus]:
        """Those that are with servers, the oldest first."""
        attempts = sorted((one for found in self.running.values() for one in found),
                          key=lambda one: one.request.asked_at)
        return [{"id": one.response.id, "age_s": round(now - one.request.asked_at, 1),
                 "server": one.server, "model": one.request.model_label, "key": one.request.key,
                 "path": one.request.path[:200], "tokens": one.pump and one.pump.pieces}
                for one in attempts[:RUNNING_SHOWN]]


# ============================================================================================
#  48  core
# ============================================================================================
#
# The state of the running balancer, in one place: what exchanges, watchers and local pages get.


class Core:
    """The balancer owns it, and replaces its settings on reload; a request keeps those that it
    came under to its end."""

    def __init__(self, settings: Settings, draw: random.Random) -> None:
        self.settings = settings
        self.draw = draw
        self.fleet = Fleet()
        self.metrics = Metrics()
        self.requests = Requests()
        self.policies = Policies(settings)  # of the settings in force, which replace it
        self.roster = Roster()
        self.departed: dict[str, float] = {}  # names of servers, and when each has gone
        self.trace: Writer | None = None  # where the traffic's is written
        self.keys = Keys()
        self.clients = Clients(settings)
        self.recent = Recent()
        self.news = News(self.requests.queue)
        self.looks = Looks()
        self.services: dict[str, Any] = {}  # with `report` and `families` of a moment, and words
        self.planners: dict[str, Planner] = {}  # those of PLANS that settings want
        self.process = Process(f"{OUR_NAME}{draw.getrandbits(48):012x}")
        self.pools = Pools(self.process.name)

    def adopt_plans(self) -> None:
        """Those that are still wanted keep what they remember."""
        known = self.planners
        self.planners = {name: known.get(name) or row.planner(self)
                         for name, row in PLANS.items() if row.wanted(self.settings)}

    def status(self, may_operate: bool = True) -> StatusDocument:
        """What the status page and the screen show."""
        now, this = clock_now(), self.process
        settings = "unchanged since the start" if this.reloaded_at is None else (
            f"reloaded {now.monotonic - this.reloaded_at:.0f} s ago")
        if any(self.roster.report().values()):
            settings += ", and changed by hand"
        settings += "".join(f"; {one}" for one in self.services.values())
        process = {
            "uptime_s": round(now.wall - this.started_at, 1), "address": this.address,
            "stopping": this.stopping, "settings": settings, "settings_error": this.settings_error,
            "hint": this.hint, "may_operate": may_operate,
            "connections": len(self.clients.tasks), "queue": len(self.requests.queue),
            "requests": {"running": self.requests.report(now.monotonic),
                         "ended": ended_report(self.recent, now.monotonic)},
            "keys": keys_report(self.metrics),
            "services": {name: one.report(now.monotonic) for name, one in self.services.items()},
        }
        views = self.fleet.views(now.monotonic)
        return status_report(views, self.roster, self.recent, now, self.settings, process)

    def sample(self, now: float) -> None:
        """For the recent past, once a second."""
        views, recent = self.fleet.views(), self.recent
        for view in views:
            recent.history(view.id).sample(view, now, self.settings.metrics_interval)
        recent.models.append((now, counts_by_model(self.metrics)))
        if now >= recent.graphed_at + GRAPH_S:
            recent.graphed_at = now
            recent.graph.append(totals_of(views, recent, now, {
                "queue": len(self.requests.queue), "connections": len(self.clients.tasks)}))

    def goes_well(self, id: str, s: Settings) -> bool:
        """Whether requests have gone well at a server of late."""
        now, minute = asyncio.get_running_loop().time(), self.recent.history(id)
        before = minute.since(now - s.breaker_window)
        return minute.requests - minute.lost > before.requests - before.lost

    def moves(self, server: str, within_s: float) -> bool:
        """Whether the engine of a server, or any of its engines, works: see `moves`."""
        now, s = asyncio.get_running_loop().time(), self.settings
        return any(moves(view, self.streams_at(view.id), within_s, now, s)
                   for view in self.fleet.engines(server))

    def streams_at(self, id: str) -> float:
        """When a piece of a streamed answer came last, of those that it is giving."""
        pumps = (attempt.pump for attempt in self.requests.running.get(id, ()))
        return max((pump.moved_at for pump in pumps if pump is not None), default=-INFINITY)

    def note_departures(self, old: Mapping[str, Entry], new: Mapping[str, Entry]) -> None:
        """The roster has changed: count who has come, and who has gone."""
        for id in new.keys() - old.keys():
            self.metrics.servers_added.add(new[id].source.value)
        for id in old.keys() - new.keys():
            self.metrics.servers_removed.add(old[id].source.value)
            for _, rank in engine_ids(old[id].settings):
                name = engine_id(old[id].settings.name, rank)
                self.departed[name] = asyncio.get_running_loop().time()

    def retire_departed(self, now: float) -> None:
        """Drop the series of servers that have been gone for GONE_KEPT_S."""
        late = [name for name, gone_at in self.departed.items() if now - gone_at >= GONE_KEPT_S]
        here = {view.name for view in self.fleet.views()} if late else ()
        for name in late:
            del self.departed[name]
            if name not in here:
                self.metrics.retire(name)

    def client(self, server: str) -> HttpClient:
        """For our own questions to a server that is on the roster."""
        return self.pools.get(self.roster.entries[server].settings).client

    def has_room(self) -> bool:
        """Whether any server could take a request more."""
        now = asyncio.get_running_loop().time()
        return self.fleet.has_room(now, self.settings.metrics_interval)

    def count_decision(self, id: str, ranking: Ranking, attempt: int) -> str:
        """A server is asked, because of this ranking.  Returns what decided, in a word."""
        assert ranking.asked is not None
        ranking.policy.chosen(ranking.asked)
        reason, metrics = "retry" if attempt > 1 else ranking.basis, self.metrics
        metrics.decisions.add(ranking.policy.name, reason)
        if (tokens := ranking.eligible.call.prompt.tokens) and ranking.role != "decode":
            metrics.prompt_tokens.add(amount=tokens)
            if any(ranking.cached):
                metrics.cached_tokens.add(amount=ranking.expected)
                metrics.missed_tokens.add(amount=ranking.missed_tokens())
        self.recent.ranked(id, ranking, attempt)
        return reason

    def judge(self, id: str, after: Callable[..., Health], *news: Any) -> None:
        """Tell the fleet something about a server's health; a transition is everybody's news."""
        change = self.fleet.judge(id, after, *news)
        if change is not None:
            self.metrics.transitions.add(change.server, change.new.value)
            server = self.fleet.server_of(id)
            views = self.fleet.engines(server) if self.settings.show_models else []
            level = logging.INFO if change.new is State.HEALTHY else logging.WARNING
            log.log(level, "%s", transition_line(change, views[0].models if views else None))
            self.news.publish(Transition, lambda: change)
        if change is not None or after is Health.checked:
            self.news.notify()

    def internal_error(self, doing: str) -> None:
        """Of our own: to be called while its exception is handled."""
        log.exception("internal error while %s", doing)
        self.metrics.errors.add()

    def count_limit(self, limit: str) -> None:
        """Count that a limit was met; '' is none."""
        if limit:
            self.metrics.limits.add(limit)


# ============================================================================================
#  49  intake
# ============================================================================================
#
# A request's content: gathered from the client, decoded, looked through as it comes, and held as
# long as it may have to be said to a server.  All that is held counts in `max_buffered_bytes`.


class RequestContent(HeldContent):
    """The content of one request of a client.  Raises BadMessage when it has no clear end."""

    __slots__ = ("client", "head", "unread", "size", "framed", "_framing", "_settings",
                 "_backlog", "_held_bytes")

    def __init__(
        self, client: Wire, head: RequestHead, length: Length, s: Settings, backlog: Backlog
    ) -> None:
        super().__init__(b"")
        self.client, self.head, self._settings, self._backlog = client, head, s, backlog
        self._framing = request_framing(head, length)
        self.framed = length is not None or self._framing.chunked  # also where there is none
        self.unread = self._framing != NO_CONTENT  # some was not taken off the wire yet
        self.size = 0  # bytes, in all, once it is there
        self._held_bytes = 0  # as they are counted

    async def gather(self) -> tuple[Content, Spans | None]:
        """The whole content, decoded, and where the members of large content stand.  Raises
        BadMessage, PeerGone."""
        coded = self.unread and "content-encoding" in self.head.fields.values
        content, spans = await (self._decoded() if coded else self._received(True))
        boundary = form_boundary(self.head.fields.get("content-type")) if spans is not None else b""
        if spans is not None and boundary:
            for _ in find_parts(spans, content, boundary):
                await asyncio.sleep(0)
        return content, spans

    def keep(self, content: Content) -> None:
        """Hold what is to be said to servers."""
        self.content, self.size = content, len(content)

    def release(self, keeps: bool = False) -> None:
        """It is not needed any more: the answer begins, or there will be none.  What it `keeps` is
        too little to be counted."""
        if not keeps:
            self.content = b""
        self._backlog.unspare(id(self))
        self._backlog.content_bytes -= self._held_bytes
        self._held_bytes = 0

    def spare(self, give_up: Callable[[], object]) -> None:
        """It is needed only if its stream breaks; `give_up` must release it."""
        self._backlog.spare(id(self), self._held_bytes, give_up)

    async def _received(self, looks: bool) -> tuple[Content, Spans | None]:
        """The content as it comes.  Large JSON is looked through meanwhile, if `looks`, so that it
        does not hold up other streams."""
        client, framing, limit = self.client, self._framing, self._settings.max_body_bytes
        if "expect" in self.head.fields.values:
            self._expect_continue()
        length = framing.length or 0
        small = not framing.chunked and length <= min(limit, SMALL_CONTENT_BYTES)
        if small and length > len(client.buffer):
            client.fill(length)
        if small and length <= len(client.buffer):
            self._count(length)  # the usual: it came with the head
            self.unread = False
            return client.take(length), None
        spans, more = Spans(), True
        scan = self._scan(spans) if looks else None
        intake = Intake(client, framing, self._settings.body_timeout)
        content = intake.content
        while True:
            if max(length, len(content)) > limit:
                found = length or f"more than {limit}"
                text = f"the content has {found} bytes, max_body_bytes allows {limit}"
                raise BadMessage(text, Fault.CONTENT_TOO_LARGE)
            await look_through(content, scan)
            if not more:
                break
            try:
                self._count(intake.soon)  # what comes while we wait is held, too
                more = await intake.more()
                self._count(len(content))
            except TimeoutError:
                silence_s = self._settings.body_timeout
                text = f"no more of the request's content came for {silence_s:g} s (body_timeout)"
                raise BadMessage(text, Fault.CLIENT_SLOW, "body_timeout") from None
        self.unread = False
        return content, spans if len(content) > SMALL_CONTENT_BYTES else None

    async def _decoded(self) -> tuple[Content, Spans | None]:
        """The same, of content that may be compressed."""
        codings = content_codings(self.head.fields)
        content, _ = await self._received(False)
        spans, limit = Spans(), self._settings.max_body_bytes
        scan = self._scan(spans)
        for n, coding in enumerate(codings if content else (), 1):
            found = bytearray()
            for _ in decode_content(content, coding, limit, found):
                self._count(len(content) + len(found))
                await asyncio.sleep(0)
                if n == len(codings):
                    await look_through(found, scan)
            content = found
        self._count(len(content))
        await look_through(content, scan)
        return content, spans if len(content) > SMALL_CONTENT_BYTES else None

    def _scan(self, spans: Spans) -> Scan | None:
        """What looks through large content as it grows; forms are read when they are there."""
        if form_boundary(self.head.fields.get("content-type")):
            return None
        scan = find_members(spans, FOUND_MEMBERS)
        next(scan)
        return scan

    def _count(self, size: int) -> None:
        """So much of the content is held now.  Raises BadMessage when all requests together hold
        too much; one alone never does."""
        backlog, size = self._backlog, size + self.head.held_bytes
        backlog.content_bytes += size - self._held_bytes
        self._held_bytes = size
        if backlog.full(size + self.client.counted):
            text = f"requests hold {backlog.limit} bytes, as many as max_buffered_bytes allows"
            raise BadMessage(text, Fault.TOO_MUCH_CONTENT)

    def _expect_continue(self) -> None:
        """RFC 9110 §10.1.1.  We want the content ourselves, so the answer is ours."""
        expected = self.head.fields.get("expect").lower()
        if expected not in ("", "100-continue"):
            text = f"Expect is {shown(expected)}, only 100-continue is understood"
            raise BadMessage(text, Fault.BAD_EXPECTATION)
        if expected and self.unread and self.head.minor >= 1 and not self.client.buffer:
            self.client.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def look_through(content: Content, scan: Scan | None) -> None:
    """Look at what is new in large content; others have their turn meanwhile."""
    if scan is not None and len(content) > SMALL_CONTENT_BYTES:
        while not scan.send(content):
            await asyncio.sleep(0)


# ============================================================================================
#  50  attempt
# ============================================================================================
#
# One attempt at an answer: a request is said to one server, over one connection, and what it says
# is judged, held back and passed on.  Whatever a server does ends as an Outcome; only the client's
# leaving and our own stopping come through as exceptions.


# Where the status alone would not tell what was wrong.
WHAT_IT_DID: dict[Fault | None, str] = {
    Fault.STREAM_FAILED: "its stream failed before it began",
    Fault.SERVER_FAILED: "the server answered 500",
    Fault.ABORTED: "it aborted the answer",
    Fault.ENGINE_FAILED: "it answered 500, without its engine",
    Fault.KEY_REJECTED: "it rejected the key that is set for it",
}


Commit = Callable[["Answer"], bool]  # shows an answer; whether the rest is wanted, too


class Answer(NamedTuple):
    """A server's answer as far as it was held back; it is to be shown."""

    server: str  # its name
    head: ResponseHead
    length: Length
    framing: Framing
    first: bytes  # of its content
    done: bool  # that is all of it


def named_server(name: str, s: Settings) -> list[tuple[str, str]]:
    return [("X-MVLLM-Server", name)] if s.server_header else []


class Attempt:
    """A request said to one server, for which the server's watcher may see it wait, and end it."""

    def __init__(
        self, core: Core, step: Relay, response: Response,
        wants_second_opinion: Callable[[str], bool], movable: Callable[[], bool],
    ) -> None:
        self.core, self.step, self.response = core, step, response
        self.request, self.settings = step.request, response.settings
        view = step.ranking.asked
        assert view is not None
        self.server, self.name, self.rank = view.id, view.name, view.rank
        self.pool = core.pools.get(view.settings)
        self.begun_at = response.client.loop.time()
        self.content_bytes = len(step.request.body.content)
        self.wire: Wire | None = None  # while nothing of an answer was shown
        self.pump: Pump | None = None
        self.lost_by = Fault.SERVER_FROZEN  # if we give it up
        self.given_up = False
        self._wants_second_opinion, self.movable = wants_second_opinion, movable
        self._commit: Commit = lambda answer: False

    @property
    def waits(self) -> bool:
        """Whether it is the engine's turn, and not a slow client's or a websocket's."""
        if not self.request.infers:  # it wakes the server up, say
            return False
        return self.wire is not None or (self.pump is not None and not self.pump.client.blocked)

    def give_up(self, even_begun: bool) -> None:
        """Another server may do it: this one stands still; or, where its answer has begun and will
        never end, let that be seen."""
        wire = self.wire or (self.pump.server if self.pump and even_begun and self.waits else None)
        if wire is not None:
            self.given_up, wire.reused = True, False
            wire.abort()

    def move(self) -> None:
        """Another server goes on with the stream, if one can."""
        if self.pump is not None and self.movable():
            self.lost_by, self.given_up = Fault.MOVED, True
            self.pump.server.abort()

    async def outcome(self, commit: Commit) -> Outcome:
        """What became of asking the server, whatever it did.  `commit` is called once it has an
        answer to show; the rest follows if it wants that."""
        s, response, self._commit = self.settings, self.response, commit
        attempts = self.core.requests.running.setdefault(self.server, set())
        attempts.add(self)
        stale: Stale | None = None
        try:
            while True:
                wire = await self.pool.acquire(s.connect_timeout, stale)
                try:
                    return await self.converse(wire)
                except Stale as met:  # once, for a new connection is not
                    stale = met
                finally:
                    self.pool.keep(wire)
        except PeerGone as gone:
            fault = self.lost_by if self.given_up else gone.fault
            return Outcome(fault, str(gone), response.begun)
        except BadMessage as bad:
            theirs = bad.fault.blame is not Blame.CLIENT
            return Outcome(bad.fault if theirs else Fault.BAD_ANSWER, str(bad), response.begun)
        except TimeoutError:
            attempts.discard(self)  # others are asked what they have seen
            works = self.core.moves(self.server, s.request_timeout / 2)
            text = f"the server said nothing for {s.request_timeout:g} s"
            fault = Fault.SERVER_SLOW if works else Fault.SERVER_SILENT
            return Outcome(fault, text, response.begun)
        finally:
            attempts.discard(self)
            if not attempts:
                self.core.requests.running.pop(self.server, None)

    async def converse(self, wire: Wire) -> Outcome:
        """One request and its answer on one connection: send, listen, hold back what may still
        be replaced, commit, pump.  Raises PeerGone, BadMessage, TimeoutError."""
        request, self.wire = self.request, wire
        try:
            head, length, sent_whole = await self.send_and_listen(wire)
            if head.status == 101:
                return await self.tunnel(wire, head)
            framing = response_framing(head, length, request.head.method)
            decoder, judge = decoder_for(framing), self.judge_of(head, framing)
            await self.hold_back(wire, judge, decoder)
        finally:
            self.wire = None  # which may be followed by another
        fault, first = judge.fault, judge.content
        if fault is None:
            answer = Answer(self.name, head, length, framing, first, decoder.done)
            if self._commit(answer):
                await self.pass_on(wire, decoder)
        wire.reusable = sent_whole and decoder.done and head.persists and not decoder.rest
        failed = head.status >= 500 and head.status not in REQUEST_FAILURES
        if fault is None and not failed:
            return WELL
        text = WHAT_IT_DID.get(fault, f"the server answered {head.status}")
        if fault is None:
            return Outcome(Fault.SERVER_ERROR, text, True)
        return Outcome(fault, text, held=Held(self.server, head, length, first))

    async def send_and_listen(self, wire: Wire) -> tuple[ResponseHead, Length, bool]:
        """Send the request until the server answers, and give the head of its answer and whether
        it heard the whole request.  A server may say 1xx at any time before."""
        request, pool, response = self.request, self.pool, self.response
        silence_s, content = self.settings.request_timeout, request.body.content
        key_line = pool.key_line
        if not key_line and pool.sees_client_keys:
            key_line = request.key_lines
        head_bytes = request.encode_head(pool.prefix, pool.authority, key_line, self.rank)
        at = len(content)
        if at <= WRITE_SLICE_BYTES:
            wire.transport.write(head_bytes + content)
        else:
            wire.transport.write(head_bytes)
            at = await wire.send(content, 0, silence_s)
        for _ in range(INFORMATIONAL_LIMIT):
            head, length = await read_response_head(wire, wire.loop.time() + silence_s)
            if head.status >= 200:
                return head, length, at == len(content)
            if head.status == 101:
                if response.heartbeat_sent or not request.head.wants_upgrade:
                    raise BadMessage("101 Switching Protocols without being asked to")
                return head, length, True
            if head.status != 100:
                response.inform(head)
            at = await wire.send(content, at, silence_s)
        raise BadMessage(f"more than {INFORMATIONAL_LIMIT} informational responses")

    def judge_of(self, head: ResponseHead, framing: Framing) -> AnswerJudge:
        request, response = self.request, self.response
        response.notation = notation_of(request.head.method, request.path, head)
        terms = Terms(
            response.notation, self.settings.retry_statuses, request.infers, request.searches,
            self.pool.key_line != "", response.heartbeat_sent,
            head.status == 400 and self.step.has_larger,
            head.status == 500 and self._wants_second_opinion(self.server))
        return AnswerJudge(head, framing, terms)

    async def hold_back(self, wire: Wire, judge: AnswerJudge, decoder: Decoder) -> None:
        """Read as much of an answer as its judge wants to see.  Comments before a stream's first
        event are shown to a client that has waited for `comment_after`, so that it and those on
        the way see that somebody is there; they are no answer, and do not commit."""
        deadline = wire.loop.time() + self.settings.request_timeout  # comments do not move it
        piece = decoder.feed(wire.take()) if wire.buffer and not decoder.done else b""
        while not judge.feed(piece, decoder.done):
            until = self.show_comments(judge, deadline) if judge.has_comments else deadline
            try:
                piece = await wire.read_content(decoder, until)
            except TimeoutError:
                if until == deadline:
                    raise
                piece = b""

    def show_comments(self, judge: AnswerJudge, deadline: float) -> float:
        """Show a stream's comments, if it is time.  Returns the moment of the next look."""
        response = self.response
        show_at = self.request.asked_at + self.settings.comment_after
        if response.heartbeat_sent or response.client.loop.time() >= show_at:
            response.heartbeat(judge.take_comments())
            return deadline
        return min(deadline, show_at)

    async def pass_on(self, wire: Wire, decoder: Decoder) -> None:
        """Show the client the rest of the answer as it comes."""
        response, s, gaps = self.response, self.settings, self.core.metrics.gaps
        if (keeper := response.keeper) is not None and keeper.fault is not None:
            raise BadMessage(NOT_WHOLE, keeper.fault)
        child = gaps.child(self.request.model_label) if response.streams else None
        self.pump = pump = Pump(
            response.client, wire, decoder, response.framing == CHUNKED, response.notation,
            s.request_timeout, s.body_timeout, gaps, child, response.tail, keeper)
        try:
            await pump.done
        except (PeerGone, BadMessage, TimeoutError):
            if keeper is None or not keeper.is_whole:
                raise
            response.go_on(b"", True)  # nothing was lost but the end of its framing
        finally:
            wire.sink = response.client.feeder = None
            tail = b"".join((*pump.tail, keeper.withheld if keeper and keeper.fault else b""))
            response.sent(pump.sent_bytes, tail[-TAIL_BYTES:], pump.first_at)

    async def tunnel(self, wire: Wire, head: ResponseHead) -> Outcome:
        """The server agreed to another protocol: from here on bytes go both ways, untouched."""
        self.wire = None
        client, ended = self.response.client, asyncio.Event()
        self.response.switch_protocols(head)
        Tunnel(wire, client, ended)
        Tunnel(client, wire, ended)
        try:
            await ended.wait()
        finally:
            client.sink = client.feeder = None
        return WELL


# ============================================================================================
#  51  case
# ============================================================================================
#
# Whose failure it was.  Servers that failed with a request are suspects until it is known whether
# another does well with it; a server that died is counted against the content it died with, which
# is sent to nobody for a while after its second death.


class Case:
    """What one request is to servers, and they to it."""

    def __init__(self, core: Core, settings: Settings, id: str) -> None:
        self.core, self.settings, self.id = core, settings, id
        self.request: OutboundRequest | None = None  # once it is read
        self.known_by = b""  # the digest of its content, once that is needed
        self.suspects: list[Suspect] = []
        self._deaths = 0  # of servers with this request
        self.test: asyncio.Event | None = None  # while others of its content wait for it

    def digest(self) -> bytes:
        """What its content is known by; b"" if it has none."""
        if not self.known_by and self.request is not None and (body := self.request.body).content:
            self.known_by = digest_of(self.request.path, body.content)
        return self.known_by

    async def begin_test(self) -> bool:
        """Wait for the turn of content with which a server has died: it is with one at a time,
        until an answer begins or takes long.  Returns False if it is held off altogether."""
        core, content = self.core, self.digest()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TEST_LIMIT_S):
                while (test := core.requests.tests.get(content)) is not None:
                    await test.wait()
        now = asyncio.get_running_loop().time()
        if core.requests.poison.holds(content, now, self.settings.poison_hold):
            return False
        if core.requests.poison.knows(content) and content not in core.requests.tests:
            self.test = core.requests.tests[content] = asyncio.Event()
        return True

    def end_test(self) -> None:
        """The next may have its turn."""
        if self.test is not None:
            del self.core.requests.tests[self.known_by]
            self.test.set()
            self.test = None

    def answered(self, server: str, response: Response) -> None:
        """A server's answer was whole."""
        core, now = self.core, response.client.loop.time()
        if (view := core.fleet.view(server)) is not None and view.health.success_matters:
            core.judge(server, Health.succeeded, now, self.settings)
        if core.requests.poison.deaths and self.known_by:
            core.requests.poison.succeeded(self.known_by)
        if self.suspects and response.status < 400:
            self.close(True)

    async def accuse(
        self, server: str, failure: Outcome, sent_at: float, response: Response
    ) -> Outcome:
        """Hold a failure against its server, or wait for what another makes of the request.
        Returns what the failure turns out to be."""
        core, s, fault, held = self.core, self.settings, failure.fault, failure.held
        now = response.client.loop.time
        if await self.died_there(server, failure, response):
            return self.died(server, failure, sent_at)
        if fault is Fault.STREAM_FAILED and held and says_failure(held.content):
            failure = failure._replace(fault=(fault := Fault.SERVER_FAILED))
        own = fault in SERVERS_OWN or not core.goes_well(server, s)
        content, told = b"" if own else self.digest(), fault is not Fault.SERVER_FAILED
        if told:
            news = failure.text, fault not in UNHEARD, now(), s, content
            core.judge(server, Health.failed, *news)
        if content or not told:
            self.suspects.append(Suspect(server, failure.text, told))
        # A newer vLLM's words are the same for a dead engine and for any failure of its own.  What
        # it did is held against it before it is looked at: others may be asking it meanwhile.
        shown = fault is Fault.SERVER_ERROR and response.status == 500
        shown = shown or (fault is Fault.STREAM_FAILED and says_failure(response.tail))
        if (shown or fault is Fault.SERVER_FAILED) and await self.is_dead(server):
            self.suspects = [one for one in self.suspects if one.server != server]
            return self.died(server, failure, sent_at)
        return failure

    def close(self, went_well: bool) -> None:
        """Hold against servers what is still to be held against them."""
        core, s = self.core, self.settings
        for server, text, _ in to_blame(self.suspects, went_well):
            now = asyncio.get_running_loop().time()
            if went_well:
                core.judge(server, Health.confirmed, self.known_by, text, now, s)
            else:
                content = self.known_by if core.goes_well(server, s) else b""
                core.judge(server, Health.failed, text, True, now, s, content)
        self.suspects.clear()

    def wants_second_opinion(self, server: str) -> bool:
        """Whether another has failed with the request, or this failure would take a server out."""
        core, s = self.core, self.settings
        if (view := core.fleet.view(server)) is None or self.suspects:
            return bool(self.suspects)
        content, now = self.digest(), asyncio.get_running_loop().time()
        return view.health.would_open(content if core.goes_well(server, s) else b"", now, s)

    async def died_there(self, server: str, failure: Outcome, response: Response) -> bool:
        """Whether a server that should be there has died with this request, as its words say, or
        by the loss of its answer."""
        if failure.fault is Fault.SERVER_GONE:
            return await self.is_dead(server)
        said = failure.held.content if failure.held else response.tail
        says_so = failure.fault in (Fault.ENGINE_FAILED, Fault.STREAM_FAILED)
        view = self.core.fleet.view(server)
        return bool(view and view.open and says_so and engine_died(said, response.notation))

    async def is_dead(self, server: str) -> bool:
        """Whether a server that should be there is found dead."""
        view = self.core.fleet.view(server)
        return bool(view and view.open) and await is_dead(
            self.core.pools.get(view.settings).client)

    def died(self, server: str, failure: Outcome, sent_at: float) -> Outcome:
        """Book a server's death: the failure, with how many have died with this request or its
        content."""
        core, s, now = self.core, self.settings, asyncio.get_running_loop().time()
        core.judge(server, Health.died, failure.text, now)
        core.metrics.deaths.add(core.fleet.name_of(server))
        self._deaths += 1
        if not (s.poison_hold and self.digest()):
            return failure._replace(deaths=self._deaths)
        deaths = max(self._deaths, core.requests.poison.died(self.digest(), sent_at, now))
        if deaths >= DEADLY:
            log.warning("id=%s: its content is held off for %g s: it is the %d. time that a server"
                        " died with it, now %s", self.id, s.poison_hold, deaths,
                        core.fleet.name_of(server))
        return failure._replace(deaths=deaths)


# ============================================================================================
#  52  accounts
# ============================================================================================
#
# What is counted, kept and told of a request that has ended.


def account(x: Exchange) -> None:
    """Count the request, and write its line."""
    core, trail, response, first_s = x.core, x.trail, x.response, None
    now, metrics, usage = x.loop.time(), core.metrics, dict[str, int]()
    model, server = trail.model, trail.server
    metrics.requests.add(trail.name, model, str(response.status))
    noted = [(metrics.durations, now - trail.began_at), (metrics.request_sizes, x.body.size),
             (metrics.response_sizes, response.sent_bytes)]
    if response.first_byte_at is not None:
        first_s = response.first_byte_at - trail.asked_at
        noted.append((metrics.first_byte, first_s))
        if response.streams:
            noted.append((metrics.first_token, first_s))
    note_each((model,), *noted)
    if server:
        well = response.status < 500 and response.end in ("complete", "client_gone")
        core.recent.history(server).ended(now, first_s if response.streams else None, well)
        key = x.key.name if x.key else ""
        metrics.key_requests.add(key, model)
        usage = response.usage
        for kind, tokens in usage.items():
            metrics.usage.add(key, model, kind, amount=tokens)
    core.recent.ended.append((  # an EndedRequest; this is for each request
        now, response.id, model, server, x.key and x.key.name, response.status, response.end,
        trail.began_at, first_s if response.streams else None, usage.get("completion")))
    if core.trace is not None and server and response.status < 500:
        age_s, call = now - trail.asked_at, x.call._replace(model=model or None)
        tokens = completion_tokens(usage, response.tail, response.sent_bytes)
        core.trace.say(trace_line(call, TracedAnswer(
            time.time() - age_s, first_s, age_s, tokens, trail.name, response.status,
            response.end)))
    core.news.publish(RequestFacts, lambda: facts_of(x, now, first_s, usage))


def facts_of(
    x: Exchange, now: float, first_s: float | None, usage: Mapping[str, int]
) -> RequestFacts:
    """What the log lines of a request say."""
    response, trail, call, (peer, port) = x.response, x.trail, x.call, x.client.peer
    host = client_address(peer, x.head.fields, x.settings.trusted_proxies)
    return RequestFacts(
        response.id, f"{peer}:{port}" if host == peer else host,
        x.key.name if x.key else None, x.head.method, x.head.path[:200],
        call.model and call.model[:100], call.stream, trail.name or None, trail.attempts,
        response.status, trail.queued_s, first_s, now - trail.began_at, x.body.size,
        response.sent_bytes, usage.get("prompt"), usage.get("cached"), usage.get("completion"),
        response.end)


# ============================================================================================
#  53  resuming
# ============================================================================================
#
# A stream that may go on at another server: what it has shown, from its first event on, and after
# a break what is asked of the other one.


class Resuming:
    """One such stream."""

    def __init__(
        self, core: Core, s: Settings, request: OutboundRequest, prospect: Prospect, id: str
    ) -> None:
        self.core, self.settings, self.request, self.id = core, s, request, id
        self.first, self.transcript = prospect, Transcript(core.requests.memory, s.resume_bytes)
        self.broken_at, self.broken = 0.0, ""  # the last break, and where and how
        self.document: dict[str, Any] = {}  # what was asked
        self.shown = Shown()
        self._waits = False  # since that break nothing new was shown

    async def recall(self, outcome: Outcome, server: str, content: Content) -> Prospect:
        """Read what was shown.  Returns how the stream can go on after that outcome."""
        now, s = asyncio.get_running_loop().time(), self.settings
        if not self._waits:
            label = outcome.fault.label if outcome.fault else ""
            self._waits, self.broken_at, self.broken = True, now, f"{label} at {server}"
        if now > self.broken_at + s.resume_within:
            return Prospect(None, "resume_within", f"{s.resume_within:g} s were not enough")
        if self.transcript.lost or not content:
            limit = "resume_bytes" if self.transcript.lost else "max_buffered_bytes"
            return Prospect(None, limit, "there was no room to keep it")
        self.transcript.reopen()
        self.shown = Shown()
        try:
            for _ in self.shown.read(self.transcript.pieces()):
                await asyncio.sleep(0)
            self.document = JSON.decode(str(content, "utf-8"))
            return prospect_with(self.first, self.document, self.shown)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return Prospect(None, "unreadable", "what was shown is not to be understood")

    async def join(
        self, way: Way, step: Relay, on_news: Callable[[], object]
    ) -> tuple[OutboundRequest, Join]:
        """What is asked of another server, and what joins its answer.  Raises PeerGone, BadMessage,
        TimeoutError."""
        request, tokens = step.request, None
        if way is Way.CONTINUE:
            view = step.ranking.asked
            assert view is not None
            document, tokens = await self.continued(self.core.pools.get(view.settings).client)
            request = request._replace(body=HeldContent(compact(document)))
        join = Join(self.shown, self.transcript, tokens, on_news)
        name = step.ranking.asked.name if step.ranking.asked else ""
        where = f" at {name}, after {self.broken}" if self.settings.server_header else ""
        join.last_words = f": resumed by {way.value}{where}\n\n".encode()
        return request, join

    async def continued(self, client: HttpClient) -> tuple[dict[str, Any], int]:
        """The request with the text so far, and how many tokens that is at this server."""
        text, name = self.shown.text(), {k: v for k, v in self.document.items() if k == "model"}
        document = with_text(self.document, text)
        asked = {k: v for k, v in document.items() if k in TOKENIZED_MEMBERS}
        tokens = await self.ask(client, "/tokenize", asked, "tokens")
        prompt = await self.ask(client, "/detokenize", {**name, "tokens": tokens}, "prompt")
        if not prompt.endswith(text):
            words = "another server's prompt does not end with what was shown"
            raise BadMessage(words, Fault.RESUME_DIFFERS)
        alone = {**name, "prompt": text, "add_special_tokens": False}
        count = len(await self.ask(client, "/tokenize", alone, "tokens"))
        if (left := within_budget(document, count)) is None:
            raise BadMessage("no tokens are left to be generated", Fault.RESUME_DIFFERS)
        return left, count

    async def ask(self, client: HttpClient, path: str, asked: Any, wanted: str) -> Any:
        status, content = await client.fetch(path, self.settings.resume_within, compact(asked))
        said = document_at_end(content) if status == 200 else {}
        if not isinstance(said.get(wanted), (list, str)):
            raise BadMessage(f"{path} was answered with {status}", Fault.RESUME_FAILED)
        return said[wanted]

    def went_on(self, limit: asyncio.Timeout, way: Way, server: str) -> None:
        """Something new is shown."""
        limit.reschedule(None)
        self._waits = False
        log.info("id=%s: its stream broke: %s; %s goes on with it, by %s",
                 self.id, self.broken, server, way.value)

    def ended(self, way: Way, outcome: Outcome) -> None:
        self.core.metrics.resumes.add(way.value, outcome.fault.label if outcome.fault else "ok")


# ============================================================================================
#  54  exchange
# ============================================================================================
#
# One request, from its head to its last byte.  An Exchange has the content read as a Call, and
# carries out the steps of a plan; it decides nothing itself.  A server's failure becomes an
# Outcome for the plan.  A client's leaving cancels the task wherever it stands, which closes the
# server's connection on the way out, so that vLLM stops generating.

LOOK_LIMIT_S = 2.0  # for which a request waits for a look at servers' models


class Trail:
    """What is noted of a request on its way, for metrics and logs.  Times are the loop's."""

    __slots__ = ("began_at", "asked_at", "queued_s", "server", "name", "attempts", "failures",
                 "model")

    def __init__(self, now: float) -> None:
        self.began_at = self.asked_at = now  # its head was there; it was understood
        self.queued_s = 0.0
        self.server = ""  # the id of the one asked last, or its engine's,
        self.name = ""  # and what is shown of it
        self.attempts: list[tuple[str, str, str]] = []  # server, reason to ask it, result
        self.failures: list[str] = []  # of the attempts before the last
        self.model = ""  # as a label: only names that servers told us


class Destination(NamedTuple):
    """What of the fleet a request is for."""

    path: str  # at servers
    only: str = ""  # the one server that may be asked
    infers: bool = True  # it wants something of an engine
    searches: bool = False  # for the server that has a stored response


class Exchange:
    """One request and its answer, on one client's wire.  Raises BadMessage when the request's
    content has no clear end."""

    visit: Visit | None = None  # as which it came in, if that was a question

    def __init__(self, core: Core, client: Wire, head: RequestHead, length: Length) -> None:
        self.core, self.client, self.head, self.loop = core, client, head, client.loop
        # Those in force when the request came.
        self.settings, self.policies = core.settings, core.policies
        s = self.settings
        self.body = RequestContent(client, head, length, s, core.clients.backlog)
        id = request_id(head.fields, s.request_id_headers, core.clients.ids, core.draw)
        self.response = Response(client, head, id, s, self.body)
        if core.process.stopping:
            self.response.close_after()
        self.destination = Destination(inference_path(head.path))
        self.call = NO_CALL  # until the content is there
        self.key: KeySettings | None = None  # by which it came in
        self.admitted = False  # by that key
        self.released = False  # its content, for good
        self.case = Case(core, s, id)
        self.stream: Resuming | None = None  # that could go on elsewhere
        self.prospect = NO_STREAM  # of one that could not
        self.trail = Trail(self.loop.time())

    # The life of a request.

    async def run(self, explains: bool) -> None:
        """Have a server answer; or, to a request that `explains`, say which one would be asked.
        However it ends, the client has been told."""
        response = self.response
        try:
            call, content = read_call(self.head, *await self.body.gather(), self.settings)
            if refusal := self.admit(call):
                self.refuse(refusal)
            elif explains:
                report = explain_report([self.choose(frozenset())])
                response.send(Reply(200, json.dumps(report).encode()))
            else:
                request = self.prepare(content)
                with abandoned_if_gone(self.client, self.core.clients.tasks.get(self.client)):
                    await self.carry_out(self.plan(request))
        except BadMessage as bad:
            self.reject(bad)
        except PeerGone as gone:  # the client; a server's leaving has become an outcome
            response.abandoned(gone.fault)
        except asyncio.CancelledError:
            response.close_after()
            response.refuse(Fault.STOPPING, "The balancer is stopping.")
            raise
        except Exception:
            response.refuse(Fault.INTERNAL, "An internal error; the log has the details.")
            raise
        finally:
            if not self.released:
                self.release(True)
            if self.admitted and self.key is not None:
                self.core.keys.release(self.key)

    def refuse(self, refusal: Refusal) -> None:
        self.core.count_limit(LIMITS.get(refusal.fault, ""))
        fault, text, after_s, _, fields = refusal
        self.response.refuse(fault, text, after_s, fields)

    def reject(self, bad: BadMessage) -> None:
        """Answer that its content breaks a rule; no other request is read behind it."""
        self.core.count_limit(bad.limit)
        self.response.close_after()
        self.response.refuse(bad.fault, f"Bad request: {bad}.")

    def admit(self, call: Call) -> Refusal | None:
        """Note what is wanted.  Returns why the request's key does not allow it, or None."""
        self.call, self.trail.asked_at = call, self.loop.time()
        self.trail.model = self.label()
        if call.stored and not self.destination.only:
            self.aim_at_maker(call)
        if (key := self.key) is None:
            return None
        core, model = self.core, call.model
        if call.stored:
            if refusal := core.requests.stored.refusal(call.stored, key):
                return refusal
            if model is None and (stored := core.requests.stored.find(call.stored)) is not None:
                model = stored.model or None
        refusal = core.keys.admit(key, model, self.trail.asked_at)
        self.admitted = refusal is None
        return refusal

    def aim_at_maker(self, call: Call) -> None:
        """Send a request about a stored response to the server that made it, which alone knows it;
        where that is not known or has left, to one after the other."""
        stored = self.core.requests.stored.find(call.stored)
        only = stored.server if stored and self.core.fleet.engines(stored.server) else ""
        self.destination = Destination(
            self.destination.path, only, infers=call.makes_response, searches=not only)

    def prepare(self, content: Content) -> OutboundRequest:
        """The request as it is said to servers; its content is held from now on."""
        self.body.keep(content)
        self.core.requests.budget.came(self.trail.asked_at)
        client, s, call, to = self.client, self.settings, self.call, self.destination
        if (s.resume_seed and call.asks is not None and to.path in SEEDED_PATHS
                and not is_repeatable(call.asks, to.path)):
            seed = self.core.draw.getrandbits(31)
            self.call = call = call._replace(asks={**call.asks, "seed": seed})
            self.body.keep(content := with_seed(content, seed))
        peer, tls = client.peer[0], client.is_tls
        trusted = bool(s.trusted_proxies) and is_trusted(peer, s.trusted_proxies)
        fields, key_lines = forwarded_fields(
            self.head.fields, Hop(peer, tls, trusted, self.core.process.name),
            s.pass_client_key or not s.keys, call.stream or call.makes_response)
        self.case.request = request = OutboundRequest(
            self.head, to.path, f"{fields}X-Request-Id: {self.response.id}\r\n", key_lines,
            self.body, self.body.framed, to.infers, to.searches, self.trail.asked_at,
            self.trail.model, self.key.name if self.key else "")
        return request

    def plan(self, request: OutboundRequest) -> Plan:
        retries = Retries(self.choose, self.settings, self.core.draw, self.spend_retry)
        plan = (search_plan if request.searches else relay_plan)(request, retries)
        for planner in self.core.planners.values():
            plan = planner.plan(self, request, plan)
        return plan

    async def carry_out(self, plan: Plan) -> None:
        try:
            step = next(plan)
            while True:
                step = plan.send(await self.CARRY_OUT[type(step)](self, step))
        except StopIteration:
            pass
        finally:
            if self.case.suspects:
                self.case.close(False)

    def spend_retry(self) -> bool:
        """Take a retry from the budget.  Returns False where none is left."""
        if self.core.requests.budget.spend(self.loop.time(), self.settings.retry_budget):
            return True
        self.core.count_limit("retry_budget")
        self.case.suspects.clear()  # nobody is asked whose failure it was
        return False

    def choose(
        self, tried: frozenset[str], waiting: bool = False, role: str = "", by: Policy | None = None
    ) -> Ranking:
        """The fleet's ranking for the call, passing over servers tried.  Who is not `waiting` comes
        after those who are."""
        core, call, s = self.core, self.call, self.settings
        only, infers = self.destination.only, self.destination.infers
        # A queue that was given up since the request came holds nobody up any more, and one that
        # is new is for those who come to it.
        enforced = s.queue_size > 0 and core.settings.queue_size > 0
        moment = Moment(self.loop.time(), s.metrics_interval, enforced, s.slow_start)
        wanted = Wanted(call, tried, only, not infers, role)
        by = by or self.policies.get(call.model, self.trail.model)
        ranking = rank(core.fleet, wanted, by, moment, core.draw)
        queue, moment = core.requests.queue, ranking.eligible.moment
        if moment.enforced and not waiting and queue.waiting((call.model, only, tried, role)):
            ranking = ranking._replace(best=None, behind=True)
        if log.isEnabledFor(logging.DEBUG):
            reasons = "; ".join(f"{row.name} {row.reason}" for row in ranking.candidates())
            log.debug("id=%s: %s, of: %s", self.response.id, ranking.best or "nobody", reasons)
        return ranking

    # Steps.

    async def relay(self, step: Relay, way: Way | None = None) -> Outcome:
        """Ask a server, and pass its answer on if it is one; or have it go on, that way."""
        core, case, lease = self.core, self.case, step.lease
        try:
            if core.requests.poison.deaths and not await case.begin_test():
                return Outcome(Fault.SERVER_DIED_TWICE, DIED_TWICE)
            lease = lease or self.lease(step.server, step.ranking.role)
            return await self.attempt(step, lease, way)
        finally:
            if case.test is not None:
                case.end_test()
            if lease is not None:
                self.end_lease(lease)

    async def attempt(self, step: Relay, lease: Lease, way: Way | None) -> Outcome:
        """The same, in its place; and note how it went."""
        core, case, trail, server = self.core, self.case, self.trail, step.server
        if trail.failures:
            core.metrics.retries.add(trail.failures[-1])
            core.recent.history(trail.server).retries += 1
        trail.server, label, sent_at = server, "abandoned", self.loop.time()
        assert step.ranking.asked is not None
        trail.name = step.ranking.asked.name
        reason = core.count_decision(self.response.id, step.ranking, step.attempt)
        reason = f"resume_{way.value}" if way else reason
        try:
            if way is None:
                commit = functools.partial(self.commit, step, lease)
                outcome = await self.attempt_at(step).outcome(commit)
            else:
                outcome = await self.go_on(step, lease, way)
            label = outcome.fault.label if outcome.fault else "ok"
            if outcome.fault is None:
                case.answered(server, self.response)
                if self.response.streams:
                    self.learn(lease)
            elif outcome.fault.blame is Blame.SERVER:
                outcome = await case.accuse(server, outcome, sent_at, self.response)
            elif outcome.fault in (Fault.SERVER_BUSY, Fault.DECLINED):
                core.fleet.said_busy(server, self.loop.time())
            elif outcome.fault in LACKING and not step.request.searches:
                core.looks.want(step.ranking.server)  # has it still what it said it has?
        finally:
            core.metrics.attempts.add(trail.name, label)
            trail.attempts.append((trail.name, reason, label))
        if outcome.fault is not None and outcome.fault is not Fault.NOT_THERE:
            what = f"{time.strftime('%H:%M:%S')} {label}: {outcome.text[:200]}"
            core.recent.history(server).attempt_failed(what)
            if not outcome.committed:
                trail.failures.append(label)
        return outcome

    def learn(self, lease: Lease) -> None:
        """A stream has come to its end, and shows how fast its server is."""
        said, tail, size = self.response.usage, self.response.tail, self.response.sent_bytes
        events = completion_tokens({}, tail, size)
        tokens = said.get("completion", events)
        lease.complete(self.loop.time(), tokens, self.call.model, events if tail else 0)

    def attempt_at(self, step: Relay) -> Attempt:
        server = step.ranking.server

        def movable() -> bool:
            return self.stream is not None and self.choose(frozenset((server,))).best is not None

        return Attempt(self.core, step, self.response, self.case.wants_second_opinion, movable)

    async def go_on(self, step: Relay, lease: Lease, way: Way) -> Outcome:
        """Another server goes on with a stream, within the time for that."""
        stream, join, outcome = self.stream, None, WELL
        assert stream is not None
        try:
            async with asyncio.timeout_at(stream.broken_at + self.settings.resume_within) as limit:
                on_news = functools.partial(stream.went_on, limit, way, self.trail.name)
                request, join = await stream.join(way, step, on_news)
                commit = functools.partial(self.commit_again, step, lease, join)
                outcome = await self.attempt_at(step._replace(request=request)).outcome(commit)
        except TimeoutError:
            text = f"no other went on within {self.settings.resume_within:g} s (resume_within)"
            outcome = Outcome(Fault.RESUME_FAILED, text)
        except (PeerGone, BadMessage) as error:
            outcome = Outcome(error.fault, str(error))
        stream.ended(way, outcome)
        began = join is not None and self.response.keeper is join
        return outcome._replace(committed=began, went_on=began and join.went_on)

    async def resume(self, step: Resume) -> Outcome:
        return await self.relay(step.relay, step.way)

    async def recall(self, step: Recall) -> Outcome:
        if self.stream is None:
            return Outcome(prospect=self.prospect)
        self.prospect = await self.stream.recall(step.outcome, self.trail.name, self.body.content)
        return Outcome(prospect=self.prospect)

    def lease(self, server: str, role: str = "") -> Lease:
        """A lease with that server.  A plain answer begins when all is generated: its prompt is
        taken to be read after as long as that should take."""
        fleet, now = self.core.fleet, self.loop.time()
        lease = fleet.lease(server, now, self.call.prompt, role != "decode")
        if lease.pending and not self.call.stream:
            fleet.answers_by(lease, now + lease.reading_s())
        return lease

    def end_lease(self, lease: Lease) -> None:
        """A server has room again, for whoever is waiting for it."""
        now, core = self.loop.time(), self.core
        lease.end(now)
        if core.settings.queue_size or core.requests.queue:
            core.requests.queue.served(now)
            core.requests.queue.hand_over(core.has_room)

    def commit(self, step: Relay, lease: Lease, answer: Answer) -> bool:
        """The client is shown a server's answer: there is no other attempt from here on.  Returns
        whether the rest of the answer is wanted, too."""
        head, s = answer.head, self.settings
        added = named_server(answer.server, s)
        if location := head.fields.values.get("location"):
            assert step.ranking.asked is not None
            pool = self.core.pools.get(step.ranking.asked.settings)
            added.append(("Location", local_location(location, pool.authority, pool.prefix)))
        asked = "x-mvllm-why" in self.head.fields.values and asks_why(self.head.fields)
        if s.server_header and (s.why_header or asked):
            added.append(("X-MVLLM-Why", step.ranking.why()))
        if self.call.makes_response or self.call.stored:
            self.note_stored(head, answer.first)
        framing = returned_framing(head, answer.length, self.head, answer.framing)
        first = answer.first
        if self.call.stream and head.is_event_stream and not answer.done:
            first = self.keep_stream(step.request, head, first)
        wanted = self.response.begin(head, framing, first, answer.done, added)
        self.release(answer.done and head.status < 500)
        lease.answered(self.loop.time(), self.response.streams)
        return wanted

    def release(self, done: bool) -> None:
        """The content is not needed any more; but what is known of it may be, unless the request
        is `done`: it may fail yet, or kill."""
        body, self.released = self.body, done
        if self.stream is not None and not done:
            if self.case.test is not None:
                self.case.end_test()
            body.spare(self.give_up_content)
            return
        if self.stream is not None:
            self.stream.transcript.close()
        keeps = not done and len(body.content) <= KEPT_CONTENT_BYTES
        if self.core.requests.poison.deaths or not (done or keeps):
            self.case.digest()
        if self.case.test is not None:
            self.case.end_test()
        body.release(keeps)

    def give_up_content(self) -> None:
        """There is no room for it any more: its stream does not go on elsewhere."""
        self.case.digest()
        self.body.release()

    def keep_stream(self, request: OutboundRequest, head: ResponseHead, first: bytes) -> bytes:
        """A stream begins: keep what it shows if it can go on elsewhere.  Returns what of its first
        piece is to be shown."""
        self.prospect = first_prospect(self.call, self.head, request.path, self.settings)
        if self.prospect.way is None or head.is_encoded or head.status != 200:
            return first
        self.stream = Resuming(self.core, self.settings, request, self.prospect, self.response.id)
        self.response.keeper = self.stream.transcript
        return self.stream.transcript.take(first)

    def commit_again(self, step: Relay, lease: Lease, join: Join, answer: Answer) -> bool:
        """Another server goes on.  Returns whether the rest of what it says is wanted."""
        head, response = answer.head, self.response
        if head.status != 200 or not head.is_event_stream or head.is_encoded:
            text = f"the server answered {head.status} in place of a stream"
            raise BadMessage(text, Fault.RESUME_FAILED)
        if self.case.test is not None:
            self.case.end_test()
        if self.call.makes_response:
            self.note_stored(head, answer.first)
        lease.answered(self.loop.time(), True)
        response.keeper = join
        shown = join.take(answer.first)
        done = answer.done and join.fault is None
        response.go_on(shown + join.rest() if done else shown, done)
        return not done

    def note_stored(self, head: ResponseHead, start: bytes) -> None:
        """A server's answer is shown: remember which response it has made, or has."""
        call, stored = self.call, self.core.requests.stored
        server = self.core.fleet.server_of(self.trail.server)
        if call.makes_response and head.status < 300:
            if id := response_id(start, head.is_event_stream):
                # Whoever can say an id can say another's.
                own, _ = own_id(self.head.fields, self.settings.request_id_headers)
                chosen = call.names_response or (own and own in (id, id[5:]))  # after resp_
                name = self.key.name if self.key and not chosen else ""
                stored.made(id, Stored(server, name, (call.model or "")[:MODEL_NAME_LIMIT]))
        if call.stored and head.status < 300:
            if self.head.method == "DELETE":
                stored.forget(call.stored)
            elif self.destination.searches:
                stored.made(call.stored, Stored(server, "", ""))

    async def pause(self, step: Pause) -> Outcome:
        await asyncio.sleep(step.seconds)
        return WELL

    async def queue(self, step: Queue) -> Outcome:
        """Stand in the queue; a stream's client may see from comments that it does."""
        core, s, queue, began = self.core, self.settings, self.core.requests.queue, self.loop.time()
        beats = s.queue_heartbeat and self.call.stream and self.head.method == "POST"
        beat_s = s.queue_heartbeat if beats else INFINITY
        if len(queue) >= s.queue_size:
            text = f"{len(queue)} requests wait already, as many as queue_size allows."
            return Outcome(Fault.QUEUE_FULL, text)
        turn = self.loop.create_future()

        def take(ranking: Ranking) -> None:
            lease = self.lease(ranking.best, step.role) if ranking.best else None
            turn.set_result(Outcome(lease=lease, ranking=ranking) if lease else WELL)

        wants = self.call.model, self.destination.only, step.tried, step.role
        choose = functools.partial(self.choose, step.tried, waiting=True, role=step.role)
        waiter, granted = Waiter(began, wants, choose, take, turn.set_exception), False
        queue.join(waiter)
        queue.hand_over(core.has_room)  # time may have made one eligible
        try:
            while not turn.done() and (left_s := began + s.queue_timeout - self.loop.time()) > 0:
                await asyncio.wait((turn,), timeout=min(left_s, beat_s))
                if beat_s < left_s and not turn.done():
                    self.response.heartbeat()
            granted = turn.done()
        finally:
            queue.leave(waiter)
            if turn.done() and not granted and (lease := turn.result().lease):
                self.end_lease(lease)  # it left the moment it had one
        queued_s = self.loop.time() - began
        core.metrics.waits.note(queued_s, self.trail.model)
        self.trail.queued_s += queued_s
        if granted:
            return turn.result()
        text = f"No server had a place within {s.queue_timeout:g} s (queue_timeout)."
        return Outcome(Fault.QUEUE_TIMEOUT, text)

    async def await_health(self, step: AwaitHealth) -> Outcome:
        left_s = self.trail.asked_at + step.seconds - self.loop.time()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await self.core.news.changed()
        except TimeoutError:
            return Outcome(Fault.NO_SERVER)
        return WELL

    async def refresh(self, step: Refresh) -> Outcome:
        """Wait for the models of all servers that answer; one look is for all who want one now."""
        fleet, look = self.core.fleet, self.core.looks.want
        servers = {view.server for view in fleet.views()
                   if view.health.may_be_last_resort and view.open}
        await self.await_looks([server for server in servers if look(server)], step.model)
        self.trail.model = self.label()
        return WELL

    async def await_looks(self, servers: Sequence[str], model: str = "") -> None:
        """Wait until these have been asked for their models, or the wanted one is found, or for
        long enough."""
        core = self.core
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_LIMIT_S):
                while not core.looks.wanted.isdisjoint(servers) and not core.fleet.knows(model):
                    await core.news.changed()

    async def give_up(self, step: GiveUp) -> Outcome:
        """The end of a plan that found nobody to answer: a server's words, or ours."""
        fault, text, held = step.outcome.fault, step.outcome.text, step.outcome.held
        fault = fault or Fault.INTERNAL
        if fault is Fault.KEY_REJECTED and held is not None:  # our key, or is it the request?
            await self.await_looks([self.core.fleet.server_of(held.server)])
            view = self.core.fleet.view(held.server)
            held = held if view is not None and view.healthy else None
            text = "The server rejected the key that is set for it."
        if held is None:
            queued = fault in (Fault.QUEUE_FULL, Fault.QUEUE_TIMEOUT)
            after_s = self.core.requests.queue.clears_in_s(self.loop.time()) if queued else 0
            self.refuse(Refusal(fault, text, after_s))
            return WELL
        self.trail.server, self.trail.name = held.server, self.core.fleet.name_of(held.server)
        if fault is not Fault.NOT_THERE:  # that is an answer like any other
            self.response.failed(fault)
        whole = Framing(len(held.content))
        framing = returned_framing(held.head, held.length, self.head, whole)
        added = named_server(self.trail.name, self.settings)
        self.response.begin(held.head, framing, held.content, True, added)
        return WELL

    async def break_off(self, step: BreakOff) -> Outcome:
        fault, text = step.outcome.fault or Fault.INTERNAL, step.outcome.text
        if step.why:
            self.core.metrics.not_resumed.add(step.why)
            words = f"{step.why}{': ' * bool(self.prospect.text)}{self.prospect.text}"
            log.info("id=%s: no other server goes on with its stream: %s", self.response.id, words)
            text = f"{text.rstrip('.')} (no other server goes on: {words})"
        if fault in SAID_BY_SERVER:
            if self.response.keeper is not None:  # it was held back
                self.response.write(self.response.keeper.withheld)
            self.response.failed(fault)
        else:
            self.response.break_off(fault, text)
        return WELL

    # Rooms that add steps of their own add a row.
    CARRY_OUT: ClassVar[dict[type, Callable[..., Awaitable[Outcome]]]] = {
        Relay: relay, Recall: recall, Resume: resume, Pause: pause, Queue: queue,
        AwaitHealth: await_health, Refresh: refresh, GiveUp: give_up, BreakOff: break_off,
    }

    def label(self) -> str:
        """The model as a label: only names that servers told us, so that nobody can invent any."""
        if (model := self.call.model) is None:
            return ""
        return model if self.core.fleet.knows(model) else "unknown"


# ━━━ part IX: operating ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  55  watch
# ============================================================================================
#
# What goes on without a request.  Each server has two loops of its own, one that checks its health
# and one that reads its load, so that a hanging server makes nobody else's numbers old.

PACE_LOOK_S = 0.5  # between two looks at the streams of a server,
PACE_STREAMS = 32  # of which so many tell enough
DISAGREEMENT_S = 600.0  # for which a capacity must behave like another before that is said


class Check(NamedTuple):
    """What one check of a server found; `why` names a problem, also with a check that passed."""

    passed: bool
    seconds: float
    why: str = ""
    models: Models | None = None
    reached: bool = False  # it answered an error, or kept the connection without a word
    hung: bool = False
    rejected: bool = False  # our key


async def check_server(
    client: HttpClient, timeout_s: float, want_health: bool, want_models: bool
) -> Check | None:
    """Ask /health, and /v1/models where there is no /health or models are wanted: a server becomes
    known with its models or not at all.  None when it could not be asked for a reason of ours."""
    loop = asyncio.get_running_loop()
    begun, has_health = loop.time(), False
    try:
        if want_health:
            status, _ = await client.fetch("/health", timeout_s)
            has_health = status not in (404, 405)
            if has_health and not 200 <= status < 300:
                return bad_check(client, "/health", status, loop.time() - begun)
            if has_health and not want_models:
                return Check(True, loop.time() - begun)
        seconds = loop.time() - begun
        status, content = await client.fetch("/v1/models", timeout_s)
    except (PeerGone, BadMessage) as error:
        ours, seconds = error.fault is Fault.NO_RESOURCES, loop.time() - begun
        hung = error.fault is Fault.CONNECT_TIMEOUT
        return None if ours else Check(False, seconds, str(error), hung=hung)
    except TimeoutError:
        why, seconds = f"no answer to a check within {timeout_s:g} s", loop.time() - begun
        return Check(False, seconds, why, reached=True, hung=True)
    models = model_list(content, client.name) if status == 200 else None
    if models is not None:
        return Check(True, seconds, "", models)
    return bad_check(client, "/v1/models", status, seconds)._replace(passed=has_health)


def bad_check(client: HttpClient, path: str, status: int, seconds: float) -> Check:
    """A check that was answered with something else than what is wanted."""
    why = f"{path} answered {status}" + " without a list of models" * (status == 200)
    rejected = status in (401, 403) and client.key_line != ""
    return Check(False, seconds, why, reached=status >= 500, rejected=rejected)


# One token, or one embedding: vLLM needs no model's name where it serves only one.
ENGINE_PROBES = (("/v1/completions", b'{"prompt":"1","max_tokens":1}'),
                 ("/v1/embeddings", b'{"input":"1"}'))


async def watch_health(core: Core, server: str) -> None:
    """Check one server for ever; with active checks off, only learn its models."""
    loop = asyncio.get_running_loop()
    while True:
        s = core.settings
        active = s.enable_active_health_check
        want_models = core.fleet.models_due(server, loop.time(), s) or server in core.looks.wanted
        if active or want_models:
            begun = loop.time()
            found = await check_server(
                core.client(server), s.health_check_timeout, active, want_models)
            if core.process.stood_still_since(begun, loop.time()):
                continue  # its time, and maybe its failure, was ours
            if found is not None and found.models is not None:
                core.fleet.models_listed(server, found.models, loop.time())
            if found is not None and (active or found.rejected):
                note_check(core, server, found, begun)
            if want_models and core.looks.done(server):
                core.news.notify()
        if not active:
            core.judge(server, Health.rested, loop.time(), s)
        await core.looks.rest(server, min(s.health_check_interval, INFINITY if active else 1.0))


def note_check(core: Core, server: str, found: Check, begun: float) -> None:
    """Judge a server by a check.  One that hung while answers flowed takes no server out, one in
    which our key was rejected does at once."""
    now, views = asyncio.get_running_loop().time(), core.fleet.engines(server)
    if found.rejected:
        core.judge(server, Health.refused, found.why, now)
        return
    if found.hung and views and views[0].healthy and core.moves(server, now - begun):
        core.judge(server, Health.excused, now)
        return
    core.judge(server, Health.checked, *found[:3], now, core.settings, found.reached)


Result = TypeVar("Result")


async def in_turns(work: Generator[None, None, Result]) -> Result:
    """What a long piece of work gives, with others' turns between its steps."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        await asyncio.sleep(0)


async def watch_load(core: Core, server: str) -> None:
    """Read one server's load for ever.  A failure leaves the old numbers, which fade."""
    loop = asyncio.get_running_loop()
    agreed_at = dict[str, float]()
    lost = 0  # pages in a row
    while True:
        interval_s = core.settings.metrics_interval
        trouble, begun = "", loop.time()
        own = {v.id: v.counts.in_flight for v in core.fleet.engines(server)}
        try:
            status, page = await core.client(server).fetch(
                "/metrics", max(1.0, 2 * interval_s))
            result, trouble = "refused", f"/metrics answered {status}"
            if status == 200:
                result, trouble = "ok", ""
                loads = await in_turns(read_loads(page.decode("utf-8", "replace")))
                take_loads(core, server, loads, own, agreed_at)
        except (PeerGone, BadMessage, TimeoutError) as error:
            result, trouble = "failed", f"/metrics does not answer: {error or 'it takes too long'}"
        name = core.fleet.name_of(server)
        core.metrics.scrapes.add(name, result)
        if not trouble and lost >= KEPT_REPORTS:
            log.info("%s: /metrics answers again", name)
        lost = lost + 1 if trouble else 0
        if lost >= KEPT_REPORTS and core.fleet.unscraped(server, trouble):
            log.warning("%s: %s: only our own requests there are known", name, trouble)
        if not core.process.stood_still_since(begun - interval_s, loop.time()):
            await check_progress(core, server)
        await asyncio.sleep(max(interval_s / 2, begun + interval_s - loop.time()))


def take_loads(
    core: Core, server: str, loads: Mapping[str, EngineLoad], own: Mapping[str, int],
    agreed_at: dict[str, float],
) -> None:
    """What a server's page told of its engines, which had so many requests of our `own` before."""
    now = asyncio.get_running_loop().time()
    for view in core.fleet.engines(server):
        own_then = max(own.get(view.id, 0), view.counts.in_flight)
        load = loads.get("" if view.rank is None else str(view.rank), EngineLoad())
        hits = core.fleet.scraped(view.id, load, own_then, now)
        core.metrics.prefix_hits.add(view.name, amount=hits)
        if load.asleep != view.load.asleep:
            log.info("%s %s", view.name, "sleeps" if load.asleep else "is awake again")
            core.news.notify()
        say_disagreement(view, now, agreed_at)


def say_disagreement(view: ServerView, now: float, agreed_at: dict[str, float]) -> None:
    """Tell that a server behaves as if its max_concurrent_requests were wrong, once that lasts."""
    text, since = disagreement(view), agreed_at.setdefault(view.id, now)
    if not text:
        agreed_at[view.id] = now
    elif now - since > DISAGREEMENT_S:
        log.warning("%s: %s", view.name, text)
        agreed_at[view.id] = INFINITY  # once


async def check_progress(core: Core, server: str) -> None:
    """Take a server out of which an engine stands still; look whether one that did moves again."""
    views, now, s = core.fleet.engines(server), asyncio.get_running_loop().time(), core.settings
    if views and views[0].health.frozen:
        if views[0].health.circuit(now) == "half-open":
            if await engine_responds(core.client(server), s.health_check_timeout):
                core.judge(server, Health.become, State.HEALTHY, "its engine moves again", now)
            else:
                core.judge(server, Health.stood_still, "frozen: no answer to a probe", now, s)
        return
    opens_at = views[0].health.open_until if views and views[0].open else None
    if opens_at is not None and now >= opens_at - s.metrics_interval and not views[0].health.trials:
        well = await engine_responds(core.client(server), s.health_check_timeout)
        core.judge(server, Health.probed, well, asyncio.get_running_loop().time(), s)
    for view in views:
        attempts = core.requests.running.get(view.id, set())
        waiting = [attempt for attempt in attempts if attempt.waits]
        if view.load.asleep:  # nobody's failure; what has begun may go on when it wakes up
            for attempt in waiting:
                attempt.give_up(even_begun=attempt.movable())
            continue
        work = Work(
            len(waiting), min((a.begun_at for a in waiting), default=now),
            core.streams_at(view.id),
            sum(a.content_bytes for a in waiting if a.pump is None),
        )
        if why := frozen_reason(view, work, now, s):
            if view.healthy:
                core.judge(server, Health.stood_still, why, now, s)
            for attempt in waiting:
                attempt.give_up(even_begun=not view.healthy)


async def engine_responds(client: HttpClient, timeout_s: float) -> bool:
    """Whether a server's engine does the least that can be asked of it."""
    try:
        for path, content in ENGINE_PROBES:
            status, _ = await client.fetch(path, timeout_s, content)
            if status < 400 or status >= 500:
                return status < 400
    except (PeerGone, BadMessage, TimeoutError):
        return False
    return True  # it has neither: nothing more can be asked


PAUSE_MAX_S = 60.0  # between two tries of background work that fails again and again


async def guarded(core: Core, what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do background work again and again, whatever happens in it; after each failure in a row it
    rests for twice as long."""
    pause_s, loop = 0.0, asyncio.get_running_loop()
    while True:
        begun = loop.time()
        try:
            await work()
            pause_s = 0.0
        except Exception:  # the broad except for background tasks
            core.internal_error(what)
            if loop.time() - begun > PAUSE_MAX_S:
                pause_s = 0.0
            usual_s = core.settings.health_check_interval
            pause_s = max(usual_s, min(2 * pause_s, PAUSE_MAX_S))
            await asyncio.sleep(pause_s)


async def watch_pace(core: Core, server: str) -> None:
    """See for ever how fast a server's streams run."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(PACE_LOOK_S)
        for view in core.fleet.engines(server):
            if attempts := core.requests.running.get(view.id):
                pumps = [attempt.pump for attempt in itertools.islice(attempts, PACE_STREAMS)
                         if attempt.pump is not None and attempt.response.streams]
                known = [n for n in map(streamed_events, pumps) if n is not None]
                core.fleet.streamed(view.id, len(known), sum(known) / max(1, len(known)),
                                    loop.time())


def streamed_events(pump: Pump) -> int | None:
    """About how many events of a stream have come since the last look; None if there was none, or
    if it has to wait for its client."""
    before, pump.looked_bytes = pump.looked_bytes, -1 if pump.client.blocked else pump.sent_bytes
    if before < 0 or pump.looked_bytes < 0:
        return None
    return completion_tokens({}, b"".join(pump.tail), pump.sent_bytes - before)


class Watchers:
    """Each server's three tasks."""

    def __init__(self, core: Core, group: asyncio.TaskGroup) -> None:
        self._core, self._group = core, group
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._intervals: tuple[Any, ...] = ()

    def adopt(self, servers: Iterable[str], s: Settings) -> None:
        """Watch these servers and no others.  Sleeping times that change begin anew."""
        known, self._intervals = self._intervals, (
            s.health_check_interval, s.metrics_interval, s.enable_active_health_check)
        wanted = set(servers)
        self.stop(self._tasks.keys() - (wanted if known == self._intervals else ()))
        for server in wanted - self._tasks.keys():
            self._tasks[server] = [
                self._group.create_task(guarded(self._core, f"watching {server}",
                                                functools.partial(watch, self._core, server)))
                for watch in (watch_health, watch_load, watch_pace)
            ]

    def stop(self, servers: Iterable[str] | None = None) -> None:
        """Those of these servers, or all."""
        for server in list(self._tasks if servers is None else servers):
            for task in self._tasks.pop(server):
                task.cancel()


# ============================================================================================
#  56  services
# ============================================================================================
#
# What runs in the background only because the settings name it, like a source of servers.  The
# rooms of services stand below the ruler.
#
# To add one: decorate what it does with @service.


class Service(NamedTuple):
    """`wanted` says, by the settings, what it is to do, if anything: an attrgetter, since nothing
    below the ruler runs to find that out.  `run` does it until it is cancelled.  When nothing is
    wanted of a service any more, its `source` names no servers.
    `preview` is for check-config: the servers that would be named now, and lines to be printed."""

    wanted: Callable[[Settings], Any]
    run: Callable[[Core, Any], Awaitable[None]]
    source: Source | None = None
    preview: Callable[[Any], Awaitable[tuple[list[ServerSettings], list[str]]]] | None = None


SERVICES: dict[str, Service] = {}
NOT_WANTED = (None, ())  # of a service
Run = TypeVar("Run", bound=Callable[..., Awaitable[None]])


def service(
    name: str, wanted: Callable[[Settings], Any], source: Source | None = None,
    preview: Callable[[Any], Awaitable[tuple[list[ServerSettings], list[str]]]] | None = None,
) -> Callable[[Run], Run]:
    """Registers the decorated coroutine as a service."""

    def register(run: Run) -> Run:
        SERVICES[name] = Service(wanted, run, source, preview)
        return run

    return register


class Services:
    """Those that run.  One that fails is logged, and begun anew after a growing pause."""

    def __init__(
        self, core: Core, group: asyncio.TaskGroup, rows: Mapping[str, Service] = SERVICES
    ) -> None:
        self._core, self._group, self._rows = core, group, rows
        self._tasks: dict[str, tuple[Any, asyncio.Task[None]]] = {}  # with what each is to do

    def adopt(self, s: Settings) -> None:
        """Run what these settings want; what is to do the same as before goes on."""
        for name, row in self._rows.items():
            wanted, (before, task) = row.wanted(s), self._tasks.get(name, (None, None))
            if wanted not in NOT_WANTED and wanted == before:
                continue
            if task is not None:
                task.cancel()
                del self._tasks[name]
            if wanted not in NOT_WANTED:
                self._tasks[name] = wanted, self._group.create_task(self._run(name, wanted, task))
            elif row.source is not None and self._core.roster.named_by(row.source):
                self._core.roster.define(row.source, {})

    async def _run(self, name: str, wanted: Any, before: asyncio.Task[None] | None) -> None:
        """Once the task `before` has ended, which may hold what this one needs."""
        if before is not None:
            await asyncio.wait((before,))

        async def work() -> None:
            await self._rows[name].run(self._core, wanted)
            await asyncio.Event().wait()  # it has nothing more to do

        await guarded(self._core, f"running {name}", work)

    def stop(self) -> None:
        for _, task in self._tasks.values():
            task.cancel()
        self._tasks.clear()


# ============================================================================================
#  57  operations
# ============================================================================================
#
# What people have done to servers while it runs: over HTTP, with the screen's keys, with the page's
# buttons.  An operation returns a document that says what was done.  What is wrong with it is said
# in words, as SettingsError, LookupError or PeerGone, and nothing has changed then.

Operation = Callable[[Core, str], Awaitable[dict[str, Any]]]


def server_named(core: Core, name: str) -> str:
    """The id of the server that is meant: by its id or name, the URL that it alone has, these as
    host:port, or those of one of its engines.  Raises LookupError."""
    name, entries = name.rstrip("/"), core.roster.entries
    engine = next((view.server for view in core.fleet.views() if name in (view.id, view.name)), "")
    for id, one in entries.items():
        words = id, one.settings.name
        if engine == id or name in words or name in [word.partition("://")[2] for word in words]:
            return id
    having = [id for id, one in entries.items()
              if name in (one.settings.url, one.settings.url.partition("://")[2])]
    if len(having) == 1:
        return having[0]
    known = ", ".join(sorted(one.settings.name for one in entries.values())) or "none"
    raise LookupError(f"No server {shown(name)} here; ?url= is one of {known}.")


def shown_name(core: Core, server: str) -> str:
    return core.roster.entries[server].settings.name


def report_done(core: Core, what: str) -> dict[str, Any]:
    log.info("by hand: %s", what)
    return {"done": what, "live": core.roster.report()}


async def add_server(core: Core, entry: dict[str, Any]) -> dict[str, Any]:
    """`entry` is one of `servers`, as the settings file has them.  Raises SettingsError."""
    if not entry:
        raise SettingsError([Complaint("request", 0, "", 'expected JSON like {"url": "http://…"}')])
    server = server_by_hand(entry, core.settings.pools)
    if server.id in core.roster.entries:
        raise SettingsError([Complaint("request", 0, "url", f"{server.url} is there already")])
    core.roster.add(server)
    return report_done(core, f"{server.url} added")


async def remove_server(core: Core, server: str) -> dict[str, Any]:
    """Have no new requests sent to it; it leaves with its last one."""
    name = shown_name(core, server)
    core.roster.remove(server)
    return report_done(core, f"{name} removed")


async def weigh_server(core: Core, server: str, given: str | None) -> dict[str, Any]:
    """Raises SettingsError."""
    try:
        weight = SERVER_FIELDS["weight"].metadata["check"](given)
    except ValueError as expected:
        text = f"found {shown(given or 'nothing')}, expected {expected}"
        raise SettingsError([Complaint("request", 0, "weight", text)]) from None
    core.roster.weigh(server, weight)
    name = shown_name(core, server)
    unmoved = ", ".join(unweighed(core.settings)) if weight else ""
    note = f" (to policy {unmoved} only 0 would matter)" if unmoved else ""
    return report_done(core, f"{name} has weight {weight:g}{note}")


async def drain_server(core: Core, server: str) -> dict[str, Any]:
    core.roster.drain(server)
    if core.settings.drain_resume:
        for view in core.fleet.engines(server):
            for attempt in list(core.requests.running.get(view.id, ())):
                attempt.move()
    return report_done(core, f"{shown_name(core, server)} drained")


async def undrain_server(core: Core, server: str) -> dict[str, Any]:
    core.roster.drain(server, False)
    return report_done(core, f"{shown_name(core, server)} in use")


async def probe_server(core: Core, server: str) -> dict[str, Any]:
    """Check it now; a circuit that is open gets its trial.  Raises PeerGone."""
    s = core.settings
    found = await check_server(core.client(server), s.health_check_timeout, True, True)
    now = asyncio.get_running_loop().time()
    if found is None:
        raise PeerGone("It could not be asked now.", Fault.NO_RESOURCES)
    if found.models is not None:
        core.fleet.models_listed(server, found.models, now)
    note_check(core, server, found, now - found.seconds)
    core.judge(server, Health.half_opened, now)
    core.news.notify()
    state = [state_word(view, now) for view in core.fleet.engines(server)]
    return {"passed": found.passed, "seconds": round(found.seconds, 4), "why": found.why,
            "state": state[0] if state else "gone"}


# Those that need no more than a server, and so have a key on the screen and a button on the page.
OPERATIONS: dict[str, Operation] = {
    "drain": drain_server, "undrain": undrain_server, "probe": probe_server,
}


# ============================================================================================
#  58  endpoints
# ============================================================================================
#
# What the balancer answers itself, from what it knows: no request to any server, so these paths
# answer at once even when every server hangs.
#
# To add a path: a function with @endpoint, and a line in the README.  Rooms after this one may add
# theirs, too: the table is complete when the module is loaded.


class Asked(NamedTuple):
    """A request for an endpoint."""

    head: RequestHead
    content: bytes = b""  # where it is read
    visit: Visit | None = None  # as which it came in

    @property
    def query(self) -> dict[str, str]:
        """The last of each name counts."""
        return dict(urllib.parse.parse_qsl(self.head.query or "", keep_blank_values=True))


# Pieces are streamed, as server-sent events, until there are no more or the client has left.
Handler = Callable[[Core, Asked], Awaitable[Reply | AsyncIterator[bytes]]]


class Endpoint(NamedTuple):
    kind: Kind  # which says who may
    handle: Handler | None  # None: it is for an Exchange to answer
    reads_content: bool = False  # SMALL_CONTENT_BYTES of it at most
    meaning: str = ""  # what `help paths` says


ENDPOINTS: dict[str, dict[str, Endpoint]] = {  # by path and method
    "/explain": {"POST": Endpoint(
        Kind.EXPLAIN, None, meaning="where the request would go now; it is not sent")},
}


def endpoint(
    *paths: str, method: str = "GET", kind: Kind = Kind.STATUS, reads_content: bool = False,
    meaning: str = "",
) -> Callable[[Handler], Handler]:
    """Register a function, with a `meaning` for `help paths` where its docstring does not say it.
    GET answers HEAD, too; a last part like {id} is variable, and may have slashes."""

    def register(handle: Handler) -> Handler:
        for path in paths:
            said = meaning or " ".join((handle.__doc__ or "").split())
            row = Endpoint(kind, handle, reads_content, said)
            ENDPOINTS.setdefault(path, {})[method] = row
        return handle

    return register


@remembered_text
def endpoints_at(path: str) -> Mapping[str, Endpoint]:
    """Those of a path by method; none where it is not ours."""
    path = (inference_path(path) or path).rstrip("/") or "/"
    if path in ENDPOINTS:
        return ENDPOINTS[path]
    variable = (rows for row, rows in ENDPOINTS.items()
                if row.endswith("}") and path.startswith(row.partition("{")[0]))
    return next(variable, {})


def endpoint_for(head: RequestHead) -> Endpoint | None:
    """None where it has another method."""
    return endpoints_at(head.path).get("GET" if head.method == "HEAD" else head.method)


def wrong_method(head: RequestHead) -> Refusal:
    methods = list(endpoints_at(head.path))
    allowed = [one for method in methods for one in (method, "HEAD")[: 1 + (method == "GET")]]
    text = f"{head.path} is asked for with {' or '.join(methods)}."
    return Refusal(Fault.BAD_METHOD, text, fields=[("Allow", ", ".join(allowed))])


def kind_of(head: RequestHead, s: Settings) -> Kind:
    """What is asked for."""
    kind = path_kind(head.path)
    if head.path in s.admin_paths and kind in (Kind.INFERENCE, Kind.NOTHING):
        return Kind.CONTROL
    return Kind.EXPLAIN if kind is Kind.STATUS and wants_explanation(head) else kind


# Below these paths a URL may stand escaped; they are ours alone, so no server reads it differently.
URLS_BELOW = ("/workers/",)
ESCAPED_SLASH = re.compile("%2f", re.IGNORECASE)


@remembered_text
def path_kind(path: str) -> Kind:
    escaped = path.startswith(URLS_BELOW) and ESCAPED_SLASH.sub("", path)
    if AMBIGUITY.search(escaped or path):
        return Kind.AMBIGUOUS
    if rows := endpoints_at(path):
        return rows.get("GET", next(iter(rows.values()))).kind
    return Kind.INFERENCE if inference_path(path) else Kind.NOTHING


def as_json(document: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode())


async def as_document(make: Callable[[Core], Any], core: Core, asked: Asked) -> Reply:
    return as_json(make(core))


DOCUMENTS: dict[str, tuple[str, Callable[[Core], Any]]] = {
    "/version": ("version and process", lambda core: {"version": __version__, "pid": os.getpid()}),
    "/health": ("the fleet's state with each server's reason; always 200", lambda core:
                health_report(core.fleet.views(), core.settings, clock_now())),
    "/load-stats": ("load, capacity and reports of each server", lambda core: load_report(
        core.fleet.views(clock_now().monotonic), core.settings, clock_now(), core.roster.entries,
        core.fleet.answers.means())
        | {"queue": {"length": len(core.requests.queue), "size": core.settings.queue_size,
                     "longest_wait_s": core.requests.queue.longest_wait_s(clock_now().monotonic)}}),
}
ENDPOINTS |= {
    path: {"GET": Endpoint(Kind.STATUS, functools.partial(as_document, make), meaning=meaning)}
    for path, (meaning, make) in DOCUMENTS.items()
}


@endpoint("/liveness", "/ping", kind=Kind.PROBE, meaning="200, as long as it runs")
async def get_liveness(core: Core, asked: Asked) -> Reply:
    return Reply(200, b"OK", "text/plain; charset=utf-8")


@endpoint("/readiness", kind=Kind.PROBE, meaning="""\
503 when no server can take a request, or it is stopping; `degraded` when only servers are left that
are asked as a last resort""".replace("\n", " "))
async def get_readiness(core: Core, asked: Asked) -> Reply:
    status, document = readiness_report(core.fleet.views(), core.process.stopping)
    return as_json(document, status)


@endpoint("/explain")
async def get_explanation(core: Core, asked: Asked) -> Reply:
    """How a server was chosen for a request of late, by its X-Request-Id.  (POST is for a request
    that is not to be sent: `Exchange.run` explains it.)"""
    id, rankings = asked.query.get("id", ""), core.recent.rankings
    if id in rankings:
        return as_json({"id": id, **explain_report(rankings[id])})
    text = (f"No ranking is kept of a request {shown(id)}. Ask with ?id= for one of the last"
            f" {RECENT_LIMIT}, or POST a request that is not to be sent.")
    return Reply(404, error_body(Fault.NOT_SERVED, text))


def status_for(core: Core, asked: Asked) -> bytes:
    may = asked.visit is not None and may_not_change(asked.visit) is None
    return json.dumps(core.status(may)).encode()


@endpoint("/status.json", meaning="what screen and page show")
async def get_status(core: Core, asked: Asked) -> Reply:
    return Reply(200, status_for(core, asked))


@endpoint("/", meaning="name and version; to a browser: the way to the status page")
async def get_root(core: Core, asked: Asked) -> Reply:
    if "text/html" in asked.head.fields.get("accept"):
        return Reply(303, b"See /status.\n", "text/plain", [("Location", "status")])
    return as_json(service_report())


STATUS_S = 1.0  # between two events of /status/events


@endpoint("/status/events")
async def get_status_events(core: Core, asked: Asked) -> Reply | AsyncIterator[bytes]:
    """The same as /status.json, again and again."""

    def event() -> bytes:
        return b"data: " + status_for(core, asked) + b"\n\n"

    async def events() -> AsyncIterator[bytes]:
        while not core.process.stopping:
            yield event()
            await asyncio.sleep(STATUS_S)

    return Reply(200, event(), "text/event-stream") if asked.head.method == "HEAD" else events()


@endpoint("/server-models")
async def get_server_models(core: Core, asked: Asked) -> Reply:
    """With ?refresh=1 every server is asked first, all at the same time; once for all who want
    that now."""
    if asked.query.get("refresh") in ("1", "true"):
        if core.looks.refreshing is None or core.looks.refreshing.done():
            core.looks.refreshing = asyncio.ensure_future(refresh_models(core))
        await asyncio.shield(core.looks.refreshing)
    return as_json(server_models_report(core.fleet.views(), clock_now()))


async def refresh_models(core: Core) -> None:
    servers = {view.server: core.pools.get(view.settings).client for view in core.fleet.views()}
    checks = (check_server(client, core.settings.health_check_timeout, False, True)
              for client in servers.values())
    for server, found in zip(servers, await asyncio.gather(*checks)):
        if found is not None and found.models is not None:
            core.fleet.models_listed(server, found.models, asyncio.get_running_loop().time())


@endpoint("/v1/models", kind=Kind.MODELS, meaning="models of all healthy servers, and aliases")
async def get_models(core: Core, asked: Asked) -> Reply:
    return as_json({"object": "list", "data": models_for(core, asked.head)})


def models_for(core: Core, head: RequestHead) -> list[Mapping[str, Any]]:
    """The models that the request's key allows, or all."""
    aliases, key = core.settings.aliases, core.keys.authenticate(head.fields)
    entries = model_entries(
        core.fleet.views(), aliases, head.fields.get("via"), core.process.name)
    if key is None or not key.models:
        return entries
    return [entry for entry in entries if aliases.get(entry["id"], entry["id"]) in key.models]


@endpoint("/v1/models/{id}", kind=Kind.MODELS, meaning="one of them")
async def get_model(core: Core, asked: Asked) -> Reply:
    head = asked.head
    name = urllib.parse.unquote(head.path.partition("/v1/models/")[2].rstrip("/"))
    known = models_for(core, head)
    for entry in known:
        if entry["id"] == name:
            return as_json(entry)
    fault = Fault.UNKNOWN_MODEL
    text = unknown_model(name, [entry["id"] for entry in known])
    content = error_body(fault, text, head.path, "model")
    return Reply(fault.status, content, fields=[("X-MVLLM-Error", fault.label)])


@endpoint("/metrics", meaning="metrics of the balancer, for Prometheus")
async def get_metrics(core: Core, asked: Asked) -> Reply:
    process = {
        "start_time_seconds": core.process.started_at,
        "client_connections": len(core.clients.tasks),
        "client_connections_limit": core.clients.limit,
        "settings_valid": not core.process.settings_error,
        "queue_length": len(core.requests.queue), "buffered_bytes": core.clients.backlog.bytes,
    }
    monotonic = clock_now().monotonic
    now = gauges(core.fleet.views(monotonic), monotonic, core.settings, process,
                 core.fleet.answers.means())
    now += [family for one in core.services.values() for family in one.families(monotonic)]
    page = expose(with_old_names([*core.metrics.families(), *now]))
    return Reply(200, page.encode(), "text/plain; version=0.0.4; charset=utf-8")


Operate = Callable[[Core, Asked], Awaitable[dict[str, Any]]]


async def run_operation(operate: Operate, core: Core, asked: Asked) -> Reply:
    """Have an operation carried out, or say what is wrong with it."""
    try:
        return as_json(await operate(core, asked))
    except SettingsError as error:
        fault, text = Fault.BAD_REQUEST, str(error)
    except LookupError as error:
        fault, text = Fault.NOT_SERVED, str(error.args[0])
    except (PeerGone, BadMessage) as error:
        fault, text = error.fault, str(error)
    return Reply(fault.status, error_body(fault, text))


def on_server(operation: Operation) -> Operate:
    """?url= names the server."""
    return lambda core, asked: operation(core, server_named(core, asked.query.get("url", "")))


ADMIN: dict[str, dict[str, Operate]] = {
    "/admin/servers": {
        "POST": lambda core, asked: add_server(core, read_members(asked.content, None)),
        "DELETE": on_server(remove_server),
    },
    "/admin/servers/weight": {"POST": lambda core, asked: weigh_server(
        core, server_named(core, asked.query.get("url", "")), asked.query.get("weight"))},
    **{f"/admin/servers/{verb}": {"POST": on_server(one)} for verb, one in OPERATIONS.items()},
}
ADMIN_MEANINGS = {
    ("/admin/servers", "POST"): "add the server in the content, an entry of `servers` as JSON",
    ("/admin/servers", "DELETE"): "remove the server with ?url= after its last answer",
    ("/admin/servers/drain", "POST"): "no more requests for the server with ?url=",
    ("/admin/servers/undrain", "POST"): "undo that",
    ("/admin/servers/weight", "POST"): "give the server with ?url= that &weight=",
    ("/admin/servers/probe", "POST"): "check the server with ?url= now",
}
ENDPOINTS |= {
    path: {method: Endpoint(Kind.ADMIN, functools.partial(run_operation, operate), True,
                            ADMIN_MEANINGS.get((path, method), "the server with ?url= by hand"))
           for method, operate in rows.items()} for path, rows in ADMIN.items()
}


# ============================================================================================
#  59  front
# ============================================================================================
#
# Where clients come in: connections are accepted while there is room, each is served in a task of
# its own, and each request, an Exchange from its head on, is refused, answered here or run.

CLIENT_BACKLOG_BYTES = 16 * 1024  # unsent to a client, from which on its server has to wait
LINGER_S = 2.0  # for a client that is still sending what was refused; nginx's lingering_close
IDLE_LINGER_S = 0.1  # the same, for one that was not saying anything


def descriptors_allow() -> int:
    """How many clients, each with a connection to a server."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (allowed - SPARE_DESCRIPTORS) // 2)


OPERATORS_SPARE = 16  # connections for operators, when clients have taken all


class Front:
    """Serves clients on some sockets; and operators on others, if there are any.  `tasks` outlives
    it."""

    def __init__(
        self, core: Core, sockets: Iterable[socket.socket], tasks: asyncio.TaskGroup,
        operator_sockets: Sequence[socket.socket] = (),
    ) -> None:
        self.core, self._tasks = core, tasks
        self._audience = Audience.CLIENTS if operator_sockets else Audience.EVERYBODY
        self._operators = set[Wire]()  # who came by their sockets
        self._hosts: dict[str, int] = {}  # connections by client address
        self._warned = False  # of a proxy of strangers
        self.listeners = [Listener(one, self.has_room, self.shed_idle, self.accept_client,
                                   self.cannot_accept) for one in sockets]
        room = functools.partial(self.has_room, OPERATORS_SPARE)
        take = functools.partial(self.accept_client, operator=True)
        self.listeners += [Listener(one, room, self.shed_idle, take, self.cannot_accept)
                           for one in operator_sockets]

    def close(self, to_the_last: bool) -> None:
        """Accept no more, after those who have come already; unless others serve them."""
        if to_the_last:
            self.core.clients.limit = descriptors_allow()
        for listener in self.listeners:
            if to_the_last:
                listener.accept()
            listener.close()

    def rest(self, resting: bool) -> None:
        """Leave those who come to another process, or accept them again."""
        for listener in self.listeners:
            listener.resting = resting
            (listener.pause if resting else listener.resume)()

    def has_room(self, spare: int = 0) -> bool:
        """Whether one more connection may be accepted."""
        return len(self.core.clients.tasks) < self.core.clients.limit + spare

    def clients_are_waiting(self) -> bool:
        """Whether others wait to be accepted."""
        for listener in self.listeners:
            if not (listener.reading or listener.resting):
                return True
        return False

    def shed_idle(self) -> None:
        """Idle connections give way: who was served and has no request on the way loses nothing
        but a handshake."""
        self.core.count_limit("max_connections")
        self.core.clients.end_idle(ACCEPT_BATCH)

    def cannot_accept(self, error: OSError) -> None:
        self.core.count_limit("descriptors")
        log.error("cannot accept a connection: %s; trying again in %g s",
                  error_text(error), ACCEPT_PAUSE_S)

    def accept_client(self, sock: socket.socket, address: Any, operator: bool = False) -> None:
        """A client has come."""
        core, wire = self.core, Wire(Blame.CLIENT, self.core.clients.backlog)
        if not self.count_connection(wire, address_of(address)):
            sock.close()
            return

        def forget(task: asyncio.Task[None]) -> None:  # also a task that never began
            del core.clients.tasks[wire]
            self._operators.discard(wire)
            self.uncount_connection(wire.peer[0])
            wire.take()
            wire.abort()
            sock.close()
            for listener in self.listeners:
                listener.resume()

        if operator:
            self._operators.add(wire)
        core.clients.tasks[wire] = self._tasks.create_task(self.serve(wire, sock))
        core.clients.tasks[wire].add_done_callback(forget)

    def count_connection(self, wire: Wire, peer: Address) -> bool:
        """Count a connection as that peer's.  Returns False, and does not, if it has as many as it
        may; a proxy of ours, which brings many clients, may have any number."""
        (host, _), s = peer, self.core.settings
        full = 0 < s.max_connections_per_client <= self._hosts.get(host, 0)
        if full and not is_trusted(host, s.trusted_proxies):
            self.core.count_limit("max_connections_per_client")
            return False
        self._hosts[host] = self._hosts.get(host, 0) + 1
        wire.peer = peer
        return True

    def uncount_connection(self, host: str) -> None:
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]

    async def read_proxied_peer(self, wire: Wire, sock: socket.socket) -> None:
        """Learn from a proxy of ours whose connection it passes on, if it says so.  Raises
        PeerGone, TimeoutError, OSError."""
        proxy = wire.peer[0]
        try:
            async with within(self.core.settings.keep_alive_timeout):
                address, rest = await read_proxy_header(sock)
        except BadMessage as bad:
            log.warning("%s: %s", proxy, bad)
            raise wire.departure() from None
        wire.buffer += rest
        wire.count()
        if address is not None:
            if not self.count_connection(wire, address):
                raise wire.departure()
            self.uncount_connection(proxy)

    async def serve(self, wire: Wire, sock: socket.socket) -> None:
        """One client's connection: its requests, one after the other."""
        try:
            sock.setblocking(False)
            s, tls = self.core.settings, self.core.pools.secrets.listener
            if s.trusted_proxies and is_trusted(wire.peer[0], s.trusted_proxies):
                await self.read_proxied_peer(wire, sock)
            wire.sock = sock if tls is None else None
            await wire.loop.connect_accepted_socket(
                lambda: wire, sock, ssl=tls, ssl_handshake_timeout=s.head_timeout if tls else None,
                ssl_shutdown_timeout=s.body_timeout if tls else None)
            wire.transport.set_write_buffer_limits(CLIENT_BACKLOG_BYTES)
            if tls is not None:
                wire.transport.set_read_buffer_limits(AHEAD_BYTES)  # of what is not decrypted
            left = s.max_requests_per_connection
            while more := await self.serve_one(wire, left <= 1):
                left -= 1
            linger_s = IDLE_LINGER_S if more is None else LINGER_S
            await wire.close(self.core.settings.body_timeout, linger_s)
        except (PeerGone, TimeoutError, OSError, asyncio.CancelledError):
            pass  # it left in the middle of a head, it was idle for too long, we are stopping
        except Exception:  # the broad except for clients: a mistake ends one connection
            self.core.internal_error("serving a client")

    async def serve_one(self, wire: Wire, last: bool) -> bool | None:
        """One request.  Returns whether another may follow; None if not even this one came."""
        core, running = self.core, self.core.clients.exchanges
        if wire.blocked:  # by the answer before
            await wire.unblocked(core.settings.body_timeout)
        if wire.buffer:  # sent without waiting for it: others first
            await asyncio.sleep(0)
        if not await self.await_request(wire):
            return None
        running[wire] = None
        try:
            if (head := await self.read_head(wire)) is None:
                return False
            exchange = Exchange(core, wire, *head)
            running[wire] = exchange.response
            core.clients.ids.add(exchange.response.id)
            if last:
                exchange.response.close_after()
                core.count_limit("max_requests_per_connection")
            await self.dispatch(exchange)
            return exchange.response.persists and not (exchange.body.unread or wire.gone)
        except BadMessage as bad:
            self.reject(wire, bad)
            return False
        except (PeerGone, TimeoutError):
            raise
        except Exception:  # the same, so that the client hears of it
            core.internal_error("serving a client")
            if (response := running[wire]) is not None and not response.status:
                response.close_after()
                response.refuse(Fault.INTERNAL, "An internal error; the log has the details.")
            return False
        finally:
            wire.reused = True
            if (response := running.pop(wire)) is not None:
                core.clients.ids.discard(response.id)

    async def await_request(self, wire: Wire) -> bool:
        """Whether a client has begun its next request; it may take a while, but not when others
        are waiting for its place."""
        core, now = self.core, wire.loop.time()
        idle_until = expires_at = now + core.settings.keep_alive_timeout
        if core.process.stopping:  # it was not told, since its answer had begun before
            idle_until = now + IDLE_GRACE_S
        elif wire.reused and self.clients_are_waiting():
            idle_until = now
        while bytes(wire.buffer[:2]) in (b"", b"\r", b"\r\n") and not wire.gone:
            if lines := EMPTY_LINES.match(wire.buffer).end():  # type: ignore[union-attr]
                wire.take(lines)
                continue
            if wire.reused:
                core.clients.idle[wire] = None
            try:
                await wire.news(idle_until, reads=True)
            except TimeoutError:
                if wire.loop.time() >= expires_at:  # and not: somebody wanted its place
                    core.count_limit("keep_alive_timeout")
                return False
            finally:
                core.clients.idle.pop(wire, None)
        return True

    async def read_head(self, wire: Wire) -> tuple[RequestHead, Length] | None:
        """The request that has begun; None if the client left.  Raises BadMessage."""
        s = self.core.settings
        try:
            raw = await wire.read_head(wire.loop.time() + s.head_timeout, s.max_head_bytes)
        except TimeoutError:
            text = f"the request's head was not complete after {s.head_timeout:g} s (head_timeout)"
            raise BadMessage(text, Fault.CLIENT_SLOW, "head_timeout") from None
        return None if raw is None else parse_request_head(raw)

    def reject(self, wire: Wire, bad: BadMessage) -> None:
        """Answer what is not even a request."""
        core, (host, port) = self.core, wire.peer
        id = request_id(NO_REQUEST.fields, (), (), core.draw)
        response = Response(wire, NO_REQUEST, id, core.settings)
        response.refuse(bad.fault, f"Bad request: {bad}.")
        core.metrics.requests.add("", "", str(bad.fault.status))
        core.count_limit(bad.limit)
        # And not what was said: it may hold a key.
        facts = RequestFacts(id, f"{host}:{port}", status=bad.fault.status, end=bad.fault.label)
        core.news.publish(RequestFacts, lambda: facts)

    async def dispatch(self, exchange: Exchange) -> None:
        """Answer here what is ours to answer, and have a server answer the rest."""
        head, clients = exchange.head, self.core.clients
        kind = kind_of(head, exchange.settings)
        if refusal := self.refusal(exchange, kind):
            self.refuse(exchange, refusal)
        elif head.hops_left == 0 or (head.is_preflight and kind in FOR_PAGES):
            exchange.response.send(Reply(204))  # it is for us, RFC 9110 §7.6.2; or CORS
        elif kind.is_exchange:
            clients.forwarding += 1
            try:
                await exchange.run(kind is Kind.EXPLAIN)
            finally:
                clients.forwarding -= 1
                if kind is not Kind.EXPLAIN:
                    account(exchange)
        elif (row := endpoint_for(head)) is None:
            self.refuse(exchange, wrong_method(head))
        else:
            await self.answer(exchange, row)

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        exchange.refuse(refusal)
        account(exchange)

    async def answer(self, exchange: Exchange, row: Endpoint) -> None:
        """Raises PeerGone."""
        assert row.handle is not None
        try:
            content = await self.read_small(exchange) if row.reads_content else b""
        except BadMessage as bad:
            exchange.reject(bad)
            account(exchange)
            return
        answer = await row.handle(self.core, Asked(exchange.head, content, exchange.visit))
        if isinstance(answer, Reply):
            exchange.response.send(answer)
        else:
            await self.stream(exchange, answer)

    async def read_small(self, exchange: Exchange) -> bytes:
        """A request's content, which is read in one go.  Raises BadMessage, PeerGone."""
        try:
            content = bytes((await exchange.body.gather())[0])
        finally:
            exchange.release(True)
        if len(content) > SMALL_CONTENT_BYTES:
            text = f"the content has {len(content)} bytes, at most {SMALL_CONTENT_BYTES} are read"
            raise BadMessage(text, Fault.CONTENT_TOO_LARGE)
        return content

    async def stream(self, exchange: Exchange, events: AsyncIterator[bytes]) -> None:
        """Until they end or the client leaves.  Raises PeerGone."""
        core, client, response = self.core, exchange.client, exchange.response
        response.close_after()
        response.heartbeat()
        with abandoned_if_gone(client, core.clients.tasks.get(client)):
            async for event in events:
                response.write(event)
                await client.unblocked(core.settings.body_timeout)
        if response.framing == CHUNKED:
            client.transport.write(LAST_CHUNK)

    def refusal(self, exchange: Exchange, kind: Kind) -> Refusal | None:
        """Why a request does not come in, or None: may it, and is there room?"""
        core, s, head, keys = self.core, exchange.settings, exchange.head, self.core.keys
        asks = head.is_preflight and kind in FOR_PAGES  # and nothing else
        works = kind.is_exchange and not asks
        if works and "via" in head.fields.values and came_by(head.fields, core.process.name):
            text = f"The way of the request leads back to where it was: {head.fields.get('via')}."
            return Refusal(Fault.LOOP_DETECTED, text[:1000])
        exchange.key = keys.authenticate(head.fields) if keys.required else None
        client, audience = exchange.client, self._audience
        if client in self._operators:
            audience = Audience.OPERATORS
        if not surely_comes_in(kind, head.fields, keys.required, audience):
            hop = ""
            if kind not in FOR_PAGES:
                hop = address_of(client.transport.get_extra_info("peername"))[0]
            exchange.visit = Visit(
                kind, head, exchange.body.unread, client.peer[0], client.is_tls, exchange.key,
                keys.required, s, audience, keys.registers(head.fields), hop)
            if (refusal := refusal_of(exchange.visit)) is not None:
                if refusal.warning and not self._warned:
                    self._warned = True
                    log.warning("%s", refusal.warning)
                return refusal
        if works and 0 < s.max_requests <= core.clients.forwarding:
            text = f"{s.max_requests} requests are in progress, as many as max_requests allows."
            return Refusal(Fault.TOO_MANY_REQUESTS, text)
        if kind is Kind.CONTROL:
            only = head.fields.get("x-mvllm-server")
            exchange.destination = Destination(head.path, only, infers=False)
            if not core.fleet.engines(only):
                known = ", ".join(view.name for view in core.fleet.views())
                text = f"X-MVLLM-Server is {shown(only)}, expected one of {known}."
                return Refusal(Fault.BAD_REQUEST, text)
        return None


# ============================================================================================
#  60  following
# ============================================================================================
#
# The settings file is read again and again: it is a few kB, which is cheaper than being clever
# about times and inodes, and sees a restored older file, a rename, a ConfigMap's swapped symlink.

SETTLE_S = 0.05  # between the two looks at a changed settings file that must agree


class SettingsFile:
    """A settings file, and what it held when it was last looked at: bytes, or what was wrong."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.held: bytes | str = ""

    def text(self) -> str:
        """What the file holds now.  Raises SettingsError."""
        return self._decoded(read_regular_file(self.path))

    async def read_if_changed(self) -> str | None:
        """What the file holds, if that is new; two looks must agree, because the first may fall
        between an editor's truncating and its writing.  Raises SettingsError, once for each
        trouble."""
        try:
            found = read_regular_file(self.path)
            while found != self.held:
                await asyncio.sleep(SETTLE_S)
                if found == (again := read_regular_file(self.path)):
                    break
                found = again
        except SettingsError as error:
            if self.held == str(error):
                return None
            self.held = str(error)
            raise
        if found == self.held:
            return None
        self.held = found
        return self._decoded(found)

    def _decoded(self, found: bytes) -> str:
        try:
            return found.decode("utf-8-sig")  # some editors begin a file with a mark
        except UnicodeDecodeError as error:
            text = f"is not UTF-8: byte {found[error.start]:#04x} at position {error.start}"
            raise SettingsError([Complaint(self.path, 0, "", text)]) from None


class Follower:
    """Takes over what the settings file holds anew, and the keys and certificates that it names.
    What cannot be used is said once, and changes nothing."""

    def __init__(
        self, core: Core, path: str, overrides: Overrides,
        adopt: Callable[[Settings, Secrets], None], adopt_secrets: Callable[[Secrets], None],
    ) -> None:
        self.core, self.overrides = core, overrides
        self.file = SettingsFile(path) if path else None
        self._adopt, self._adopt_secrets = adopt, adopt_secrets
        self._look_now = asyncio.Event()
        self._secrets_error = ""

    def look_now(self) -> None:
        self._look_now.set()

    async def follow(self) -> None:
        """Look at the files after a while, or at once when told to `look_now`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.core.settings.config_reload_interval):
                await self._look_now.wait()
        asked = self._look_now.is_set()
        self._look_now.clear()
        self.look_at_secrets()
        if self.file is not None:
            await self.look(self.file, asked)
        elif asked:
            log.info("there is no settings file to look at")

    def look_at_secrets(self) -> None:
        known = self.core.pools.secrets
        try:
            secrets = Secrets(self.core.settings, known)
        except SettingsError as error:
            if str(error) != self._secrets_error:
                log.error("keys and certificates stay as they were:\n%s", error)
            self._secrets_error = str(error)
            return
        self._secrets_error = ""
        if secrets.files != known.files:
            log.info("keys or certificates have changed")
            self._adopt_secrets(secrets)

    async def look(self, file: SettingsFile, asked: bool) -> None:
        """Who `asked` for a look is answered in any case."""
        core, this, old = self.core, self.core.process, self.core.settings
        refused = this.settings_error
        try:
            if (text := await file.read_if_changed()) is None:
                if asked:
                    unchanged = f"{len(core.roster.entries)} servers, nothing changed"
                    log.log(logging.ERROR if refused else logging.INFO, "the settings stay as they"
                            " were: %s", f"\n{refused}" if refused else unchanged)
                return
            settings, warnings = parse_settings(text, file.path, self.overrides)
            secrets = Secrets(settings, core.pools.secrets)
        except SettingsError as error:
            this.settings_error = str(error)
            core.metrics.reloads.add("refused")
            log.error("the settings stay as they were:\n%s", error)
            return
        for warning in warnings:
            log.warning("%s", warning)
        if refused:
            log.info("the settings file can be used again")
        this.settings_error = ""
        if settings != old:
            core.metrics.reloads.add("applied")
            this.reloaded_at = asyncio.get_running_loop().time()
            known = core.roster.entries.keys()
            self._adopt(settings, secrets)
            now = core.roster.entries.keys()
            counts = f"{len(now)} servers, {len(now - known)} added, {len(known - now)} draining"
            words = [counts, changes_line(old, settings)]
            log.info("new settings: %s", "; ".join(filter(None, words)))
        elif asked:
            log.info("new settings: %d servers, nothing changed", len(core.roster.entries))


# ============================================================================================
#  61  commands
# ============================================================================================
#
# Subcommands are rows, each registered by the room that it is of; the command line knows none of
# them by name.  What several of them need: the settings that file, environment and flags make.


class Command(NamedTuple):
    """A subcommand: its line in the help, what adds its arguments, what it does (which returns the
    exit code, or raises SettingsError), and arguments of an example."""

    line: str
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]
    example: str
    parser: Mapping[str, Any]  # keywords of its ArgumentParser


# To add a subcommand: decorate what it does.
COMMANDS: dict[str, Command] = {}
DEFAULT_CONFIG = "servers.toml"
CONFIG_PLACES = (DEFAULT_CONFIG, "/config/servers.toml", "/app/servers.toml")  # an image's mounts
C = TypeVar("C", bound=Callable[[argparse.Namespace], int])


class Topic(NamedTuple):
    """Something that `help` explains: its line, and what makes its text."""

    line: str
    text: Callable[[], str]


# To add a topic: decorate what returns its text.
TOPICS: dict[str, Topic] = {}
T = TypeVar("T", bound=Callable[[], str])


def topic(name: str, line: str) -> Callable[[T], T]:
    """Registers the decorated function as a topic of `help`."""

    def register(text: T) -> T:
        TOPICS[name] = Topic(line, text)
        return text

    return register


def no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def command(
    name: str, line: str, add_arguments: Callable[[argparse.ArgumentParser], object] = no_arguments,
    example: str = "", **parser: Any,
) -> Callable[[C], C]:
    """Registers the decorated function as a subcommand."""

    def register(run: C) -> C:
        COMMANDS[name] = Command(line, add_arguments, run, example, parser)
        return run

    return register


def add_config(parser: argparse.ArgumentParser) -> None:
    """The argument that names the settings file."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument("file", nargs="?", help=f"settings file (default {DEFAULT_CONFIG})")
    given.add_argument("--config", metavar="FILE", help="the same")


def config_path(args: argparse.Namespace, servers: object = None) -> str:
    """What arguments or environment name, or the first of CONFIG_PLACES where there is a file; ''
    where there are `servers` in its place."""
    if named := args.file or args.config or os.environ.get("CONFIG_PATH"):
        return named
    return "" if servers else next(filter(os.path.exists, CONFIG_PLACES), DEFAULT_CONFIG)


def fail(message: str) -> int:
    print(f"mvllm_lite: {message}", file=sys.stderr)
    return 1


def strange_host(environ: Mapping[str, str]) -> str:
    """A HOST that is no address to listen on: conda and some shells set one, too."""
    host = environ.get("HOST", "")
    try:
        ipaddress.ip_address(host or "::")
    except ValueError:
        return "" if host.lower() == "localhost" else host
    return ""


def warn_of(environ: Mapping[str, str], args: argparse.Namespace) -> list[Complaint]:
    """What is wrong with the environment, and ignored."""
    if not (host := strange_host(environ)) or getattr(args, "host", None) is not None:
        return []
    text = f"found {shown(host)}, expected an IP address or localhost; ignored"
    return [Complaint("environment HOST", 0, "host", text)]


def overrides_from(args: argparse.Namespace, environ: Mapping[str, str]) -> Overrides:
    """What flags and environment say: they win over the file."""
    found: dict[str, tuple[Any, str]] = {}
    if strange_host(environ):
        environ = {**environ, "HOST": ""}
    for key, field in CONFIG_FIELDS.items():
        if name := field.metadata["env"] and environ.get(field.metadata["env"]):
            found[key] = name, f"environment {field.metadata['env']}"
    for key in ("host", "port", "log_level"):
        if getattr(args, key, None) is not None:
            found[key] = getattr(args, key), f"--{key.replace('_', '-')}"
    for key, flag in (("log_to_console", "console"), ("show_models", "model")):
        if getattr(args, flag, False):
            found[key] = True, f"--{flag}"
    if getattr(args, "server", None):
        entries = [{"url": url} for url in args.server]
        for entry, load in zip(entries, args.max_load or ()):
            entry["max_concurrent_requests"] = load
        found["servers"] = entries, "--server"
    return found


def load_settings(path: str, overrides: Overrides) -> tuple[Settings, list[Complaint]]:
    """From a file, or from overrides alone where `path` is ''.  Raises SettingsError."""
    if not path:
        return parse_settings("", "command line", overrides)
    try:
        toml = SettingsFile(path).text()
    except SettingsError as error:
        hint = "; name a file, give servers with --server, or try: mvllm_lite.py demo"
        raise SettingsError([c._replace(text=c.text + hint) for c in error.complaints]) from None
    return parse_settings(toml, path, overrides)


def printable(text: str) -> str:
    """What servers say must not steer the terminal, or end the report."""
    encoding = sys.stdout.encoding or "ascii"
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ============================================================================================
#  62  handover
# ============================================================================================
#
# One process takes over from another without a gap.  The one that goes starts the other and passes
# on the listening sockets, what was done by hand, and a socket on which the other says that it
# serves: as descriptors, whose numbers the environment has.

SOCKETS_ENV, OPERATOR_SOCKETS_ENV = "MVLLM_LITE_SOCKETS", "MVLLM_LITE_OPERATOR_SOCKETS"
READY_ENV, BY_HAND_ENV = "MVLLM_LITE_READY", "MVLLM_LITE_LIVE"
UPGRADE_TIMEOUT_S = 30.0  # for a new process to serve in place of this one,
UPGRADE_TRIAL_S = 10.0  # and for which it has to before this one leaves,
UPGRADE_LOOK_S = 0.05  # and between two looks whether it does
Sockets = Mapping[str, Sequence[socket.socket]]  # by the first two variables


class Handover:
    """The half of the process that goes."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.before: Callable[[], Awaitable[object]] | None = None  # the screen has to end
        self.taken_back: Callable[[], object] = lambda: None
        self.trial_s = UPGRADE_TRIAL_S
        self.under_way = False
        self.succeeded = False  # by a process that serves

    async def run(self, command: Sequence[str], sockets: Sockets, front: Front) -> bool:
        """Have a successor serve on the same sockets.  Returns whether it has for a while; if not,
        nothing has changed."""
        self.under_way = True
        child = await self.successor(command, sockets)
        lasts = child is not None and await self.survives_trial(child, front)
        self.under_way = False
        if not (lasts or self.core.process.stopping):
            self.core.metrics.upgrades.add("failed")
        return lasts

    async def successor(
        self, command: Sequence[str], sockets: Sockets
    ) -> subprocess.Popen[bytes] | None:
        """A new process that serves; None if none came that far."""
        passed = {name: [sock.fileno() for sock in some] for name, some in sockets.items()}
        child, word = None, b""
        try:
            if self.before is not None:
                await self.before()
            ours, theirs = socket.socketpair()
            with ours, tempfile.TemporaryFile() as by_hand:  # it may hold servers' keys
                by_hand.write(self.core.roster.dump().encode())
                by_hand.seek(0)
                with theirs:
                    passed |= {READY_ENV: [theirs.fileno()], BY_HAND_ENV: [by_hand.fileno()]}
                    environ = {name: ",".join(map(str, some)) for name, some in passed.items()}
                    child = subprocess.Popen(
                        command, pass_fds=sum(passed.values(), []), stdin=subprocess.DEVNULL,
                        env=os.environ | environ)
                ours.setblocking(False)
                async with within(UPGRADE_TIMEOUT_S):
                    word = await asyncio.get_running_loop().sock_recv(ours, 1)
        except OSError as error:  # TimeoutError is one
            log.error("waiting for a successor: %s", error_text(error) or "it took too long")
        except Exception:
            self.core.internal_error("starting a successor")
        finally:
            if child is not None and not word:
                child.kill()
                child.wait()
        if word:
            return child
        code = child.returncode if child else "none"
        log.error("no successor came to serve (exit code %s); this process goes on", code)
        return None

    async def survives_trial(self, child: subprocess.Popen[bytes], front: Front) -> bool:
        """Whether a successor serves for `trial_s`.  So long this process takes no new clients, but
        could; if the other ends, it does."""
        loop, begun = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        self.succeeded = True
        front.rest(True)
        try:
            while child.poll() is None and loop.time() < begun + self.trial_s:
                await asyncio.sleep(min(UPGRADE_LOOK_S, self.trial_s))
            code = child.returncode
        finally:
            child.returncode = child.returncode or 0  # nobody waits for it, or warns that it runs
        if code is None:
            log.info("process %d serves now; this one finishes its answers", child.pid)
        elif not self.core.process.stopping:
            self.succeeded = False
            front.rest(False)
            self.taken_back()
            log.error("process %d ended %.1f s after it began to serve (exit code %d); this process"
                      " serves again", child.pid, loop.time() - begun, code)
        return code is None


def inherited_sockets() -> Sockets:
    """Those of the process that this one succeeds; none at an ordinary start."""
    return {name: [socket.socket(fileno=int(number))
                   for number in os.environ.pop(name, "").split(",") if number]
            for name in (SOCKETS_ENV, OPERATOR_SOCKETS_ENV)}


def inherit_changes(roster: Roster) -> None:
    """Take over what was done by hand in the process that this one succeeds."""
    if descriptor := os.environ.pop(BY_HAND_ENV, ""):
        with open(int(descriptor), "rb") as handed_over:
            text = handed_over.read().decode()
        try:
            roster.load(text)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError,
                SettingsError) as error:
            log.warning("changes by hand were not taken over: %s", error)


def tell_predecessor() -> None:
    """That this process serves."""
    if descriptor := os.environ.pop(READY_ENV, ""):
        with socket.socket(fileno=int(descriptor)) as sock:
            sock.send(b"1")


def own_url(s: Settings, host: str, port: int) -> str:
    """Where what a balancer with these settings listens on is reached from this machine."""
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    return f"{'https' if s.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


async def process_at(url: str) -> int:
    """The process of the balancer that listens there; 0 if none says so."""
    server = ServerSettings(url, verify=url.startswith("http:"))
    with contextlib.closing(HttpClient(server, Secrets(Settings((server,))))) as client:
        with contextlib.suppress(PeerGone, BadMessage, TimeoutError):
            status, found = await client.fetch("/version", 2.0)
            pid = read_members(found, None).get("pid") if status == 200 else None
            return pid if isinstance(pid, int) else 0
    return 0


def upgrade_running(s: Settings, pid: int) -> tuple[bool, str]:
    """Have the balancer that runs with these settings hand over, and wait until its successor
    serves.  `pid` is its process, or 0 to ask for it.  Returns whether that went well, and text."""
    addresses = [operator_address(s), (s.host, s.port)]
    urls = [own_url(s, *one) for one in addresses if one is not None]

    def running() -> int:
        return next(filter(None, (asyncio.run(process_at(url)) for url in urls)), 0)

    if not (old := pid or running()):
        text = f"no balancer says on port {s.port} which process it is; give its --pid"
        return False, text
    try:
        os.kill(old, signal.SIGUSR2)
    except OSError as error:
        return False, f"process {old}: {error_text(error)}"
    until = time.monotonic() + UPGRADE_TIMEOUT_S
    while (new := running()) in (0, old):
        if time.monotonic() > until or (pid and not new):
            text = "its log tells why, if it does not" if pid else "see its log"
            return pid != 0, f"process {old} was told; {text}"
        time.sleep(0.1)
    return True, f"process {new} serves in place of {old}, which finishes its answers"


def add_upgrade(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("-p", "--port", help="the port it listens on")
    parser.add_argument("--pid", type=int, help="its process, where /version is not for everybody")


@command("upgrade", "have a running balancer continue as a new process, without a gap", add_upgrade)
def run_upgrade(args: argparse.Namespace) -> int:
    """Find the running balancer by its port, check what its successor will read, and tell it."""
    settings, _ = load_settings(config_path(args), overrides_from(args, os.environ))
    Secrets(settings)
    well, text = upgrade_running(settings, args.pid or 0)
    if not well:
        return fail(text)
    print(text)
    return 0


# ============================================================================================
#  63  balancer
# ============================================================================================
#
# Assembly: opens the front, keeps every server's watchers running, has settings and roster taken
# over by their owners, and stops without cutting answers short.

LOOKUPS_LIMIT = 64  # threads that look up servers' names, made as they are needed


class Balancer:
    """The whole program, but for the command line.  `path` is a settings file to follow,
    `overrides` what wins over it, `inherited` are sockets to listen on in place of new ones."""

    def __init__(
        self, settings: Settings, path: str = "", overrides: Overrides | None = None,
        inherited: Sockets | None = None,
    ) -> None:
        self.core = Core(settings, random.Random())
        self.inherited = inherited or {}
        self.follower = Follower(
            self.core, path, overrides or {}, self.adopt, self.adopt_secrets)
        self.port = self.operator_port = 0  # those it listens on
        self._sockets: Sockets = {}
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self.handover = Handover(self.core)
        self._handing_over: asyncio.Task[None] | None = None
        self._roster: Mapping[str, Entry] = {}  # that was adopted
        self._front: Front = None  # type: ignore[assignment]  # while it runs
        self._watchers: Watchers = None  # type: ignore[assignment]  # while it runs
        self._services: Services = None  # type: ignore[assignment]  # while it runs
        self._tasks: asyncio.TaskGroup = None  # type: ignore[assignment]  # while it runs

    async def run(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop` is called; `ready` is called once it listens.  Raises SettingsError
        when the address cannot be listened on."""
        core, secrets = self.core, Secrets(self.core.settings)
        self._sockets = self.listen()
        # Names are looked up in threads; a few that hang must not hold up all others.
        lookups = concurrent.futures.ThreadPoolExecutor(LOOKUPS_LIMIT, "lookup")
        asyncio.get_running_loop().set_default_executor(lookups)
        keeper = EventKeeper(core.recent.events)
        log.addHandler(keeper)
        try:
            await self.serve(ready, secrets)
        finally:
            log.removeHandler(keeper)

    async def serve(self, ready: Callable[[], object], secrets: Secrets) -> None:
        core, sockets = self.core, self._sockets
        async with asyncio.TaskGroup() as self._tasks:
            self._watchers = Watchers(core, self._tasks)
            self._services = Services(core, self._tasks)
            core.roster.on_change = self.adopt_roster
            self.adopt(core.settings, secrets)
            if not core.keys.required:
                log.info("%s", open_line(core.settings))
            follower = self._tasks.create_task(
                guarded(core, "following the file", self.follower.follow))
            pulse = self._tasks.create_task(guarded(core, "the pulse", self.pulse))
            self._front = Front(
                core, sockets[SOCKETS_ENV], self._tasks, sockets[OPERATOR_SOCKETS_ENV])
            ready()
            await self._stop.wait()
            core.process.stopping = True
            if not self.handover.succeeded:
                await self.wait_for_second_stop(core.settings.drain_delay)
            self._front.close(to_the_last=not self.handover.succeeded)
            await self.drain()
            self._services.stop()
            self._watchers.stop()
            for task in (*core.clients.tasks.values(), follower, pulse, self._handing_over):
                if task is not None:
                    task.cancel()
        core.pools.keep(())
        if core.trace is not None:
            core.trace.stop()

    def listen(self) -> Sockets:
        """Raises SettingsError."""
        s, inherited = self.core.settings, self.inherited.get(OPERATOR_SOCKETS_ENV, ())
        operators, address = list[socket.socket](), operator_address(s)
        if address is not None:
            operators = list(inherited) or self.sockets_at(*address, "operator_")
            self.operator_port = operators[0].getsockname()[1]
        sockets = list(self.inherited.get(SOCKETS_ENV, ()))
        try:
            sockets = sockets or self.sockets_at(s.host, s.port)
        except SettingsError:
            for sock in operators:
                sock.close()
            raise
        for sock in set(inherited).difference(operators):  # the settings name none any more
            sock.close()
        self.port = sockets[0].getsockname()[1]
        self.core.process.address = f"{s.host or '*'}:{self.port}"
        return {SOCKETS_ENV: sockets, OPERATOR_SOCKETS_ENV: operators}

    def sockets_at(self, host: str, port: int, prefix: str = "") -> list[socket.socket]:
        """Raises SettingsError, which says whose word the address was."""
        try:
            return listening_sockets(host, port)
        except (OSError, UnicodeError) as error:
            reason = error_text(error) if isinstance(error, OSError) else str(error)
            keys = (f"{prefix}host", f"{prefix}port")
            file, overrides = self.follower.file, self.follower.overrides
            given = [overrides[key][1] for key in keys if key in overrides]
            origin = ", ".join(given) or (file.path if file else "defaults")
            text = f"cannot listen on {host}:{port}: {reason}"
            raise SettingsError([Complaint(origin, 0, "", text)]) from None

    def stop(self) -> None:
        """Stop accepting and let running answers finish; called again, stop at once."""
        if self._stop.is_set():
            self._stop_now.set()
            for task in self.core.clients.tasks.values():
                task.cancel()
        self._stop.set()

    async def wait_for_second_stop(self, seconds: float) -> None:
        """Wait, unless we are told a second time to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop_now.wait()

    async def drain(self) -> None:
        """Let running answers finish, for drain_timeout at most.  On an idle connection a request
        may be on its way: it is answered, too, if it comes soon; or, where a successor serves
        already and nothing is urgent, whenever it comes."""
        core, running = self.core, self.core.clients.exchanges
        timeout_s = core.settings.drain_timeout
        grace_s = timeout_s if self.handover.succeeded else min(timeout_s, IDLE_GRACE_S)
        for response in running.values():
            if response is not None and not response.begun:
                response.close_after()
        if running:
            log.info("stopping: %d answers are still running", len(running))
        for seconds in (grace_s, timeout_s - grace_s):
            if core.clients.tasks:
                await asyncio.wait(core.clients.tasks.values(), timeout=seconds)
            core.clients.end_idle(len(core.clients.idle))
            for wire, task in core.clients.tasks.items():
                if not (wire.reused or wire.buffer or wire in running):
                    task.cancel()  # it never said anything
        if running:
            log.warning("stopping: %d answers are cut short", len(running))

    def upgrade(self, command: Sequence[str]) -> None:
        """Have another process, maybe of a newer file, take over."""
        if not (self.handover.under_way or self._stop.is_set()):
            self._handing_over = self._tasks.create_task(self.hand_over(command))

    async def hand_over(self, command: Sequence[str]) -> None:
        if await self.handover.run(command, self._sockets, self._front):
            self._stop.set()

    async def pulse(self) -> None:
        """Notice when the whole process stood still (a suspended machine, a debugger, a core that
        others took), so that nobody else is blamed for it."""
        loop, sampled_at = asyncio.get_running_loop(), -INFINITY
        while True:
            due = self.core.process.pulse_due_at = loop.time() + STALL_S
            await asyncio.sleep(STALL_S)
            self.core.requests.queue.hand_over(self.core.has_room)
            if loop.time() >= sampled_at + 1:
                sampled_at = loop.time()
                self.core.retire_departed(sampled_at)
                self.core.sample(sampled_at)
            if (late_s := loop.time() - due) > STALL_S:
                self.core.process.stalled_at = loop.time()
                self.core.metrics.stalls.add()
                log.warning("this process stood still for %.1f s", late_s, extra={"kind": "stall"})

    def adopt(self, settings: Settings, secrets: Secrets | None = None) -> None:
        """Make these the settings in force: each owner takes over what is its own.  Requests that
        are under way keep those that they came under."""
        core, old = self.core, self.core.settings
        core.settings, core.policies = settings, core.policies.following(settings)
        core.adopt_plans()
        core.clients.limit = min(settings.max_connections, descriptors_allow())
        core.clients.backlog.limit = settings.max_buffered_bytes
        log.setLevel(settings.log_level)
        if settings.trace_file != old.trace_file or (settings.trace_file and core.trace is None):
            if core.trace is not None:  # which may take a second
                asyncio.get_running_loop().run_in_executor(None, core.trace.stop)
            core.trace = trace_writer(settings.trace_file) if settings.trace_file else None
        core.roster.define(Source.FILE, {server.id: server for server in settings.servers})
        self.adopt_secrets(secrets or Secrets(settings, core.pools.secrets))
        self._services.adopt(settings)
        if old.keys and not settings.keys:
            log.warning("the last of [[keys]] is gone, the balancer is OPEN: %s",
                        open_line(settings))

    def adopt_secrets(self, secrets: Secrets) -> None:
        core, aliases = self.core, self.core.settings.aliases
        for entry in core.roster.entries.values():
            if entry.source is not Source.FILE:
                secrets.adopt(entry.settings, entry.source)
        core.pools.adopt(secrets)
        core.keys.adopt([
            (dataclasses.replace(key, models=tuple(aliases.get(m, m) for m in key.models)), word)
            for key, word in secrets.keys], secrets.registration)

    def adopt_roster(self) -> None:
        """Servers that are new, or defined anew, are taken over, and those that are gone drain;
        the others keep all that they have."""
        core, s, old, new = self.core, self.core.settings, self._roster, self.core.roster.entries
        self._roster = new
        core.note_departures(old, new)
        for id, entry in new.items():
            if entry != (known := old.get(id)):
                if entry.source is not Source.FILE:
                    core.pools.secrets.adopt(entry.settings, entry.source)
                core.pools.equip(entry.settings)
                if not entry.settings.verify and (known is None or known.settings.verify):
                    log.warning("%s: its certificate is NOT verified (verify = false)",
                                entry.settings.name)
        core.fleet.apply([entry.settings for entry in new.values()],
                         asyncio.get_running_loop().time(), s.pools,
                         [id for id, entry in new.items() if entry.drained])
        self._watchers.adopt(new, s)
        servers = {view.server for view in core.fleet.views()}
        core.recent.keep({view.id for view in core.fleet.views()})
        core.pools.keep(servers)
        core.looks.keep(servers)
        core.news.notify()


# ━━━ part X: program ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  64  process
# ============================================================================================
#
# A balancer as a process among others: its signals, its terminal, what it owes to systemd, and to
# the process that it succeeds.

Runner = Callable[[Balancer], Awaitable[None]]
# What a terminal shows in place of log lines while a balancer runs.
SCREENS: list[Callable[[Balancer], contextlib.AbstractAsyncContextManager[None]]] = []


def notify_ready() -> None:
    """To the process that this one succeeds, and to systemd."""
    tell_predecessor()
    tell_systemd(f"READY=1\nMAINPID={os.getpid()}")


def tell_systemd(state: str) -> None:
    """As sd_notify(3) does, if systemd has started us."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # nobody may be reading
            sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sock.send(state.encode())


async def feed_watchdog() -> None:
    """Tell systemd that the event loop turns, twice in each WatchdogSec, if that is set.  A
    successor does, too, although WATCHDOG_PID names its predecessor."""
    with contextlib.suppress(ValueError):
        period_s = int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
        while period_s > 0 and os.environ.get("NOTIFY_SOCKET"):
            tell_systemd("WATCHDOG=1")
            await asyncio.sleep(period_s / 2)


def follow_signals(balancer: Balancer, upgradable: bool) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        tell_systemd("STOPPING=1")
        balancer.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, balancer.follower.look_now)
    balancer.handover.taken_back = notify_ready
    if upgradable:
        command = [sys.executable, *sys.orig_argv[1:]]
        loop.add_signal_handler(signal.SIGUSR2, balancer.upgrade, command)


def announce(balancer: Balancer, hint: str) -> None:
    """It listens."""
    s, limit = balancer.core.settings, balancer.core.clients.limit
    url, second = own_url(s, s.host, balancer.port), operator_address(s)
    if hint:
        balancer.core.process.hint = hint.format(url=url, server=s.servers[0].url).strip()
        print(f"\n{balancer.core.process.hint}\n", flush=True)
    notify_ready()
    log.info("mvllm_lite %s listens on %s for %d servers, policy %s, up to %d connections",
             __version__, url, len(balancer.core.roster.entries), s.policy, limit)
    if second is not None:
        log.info("metrics, status and admin are on %s alone",
                 own_url(s, second[0], balancer.operator_port))
    if limit < 0.9 * s.max_connections:
        log.warning("max_connections is %d, but the file descriptors (RLIMIT_NOFILE %d) allow %d",
                    s.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0], limit)


def serve_until_stopped(
    start: Callable[[Runner], Awaitable[None]], hint: str = "", screen: bool = False
) -> int:
    """Run a balancer until a signal stops it; the exit code.  On a `screen`, if there can be one,
    or with log lines."""

    async def run(balancer: Balancer) -> None:
        core, terminal = balancer.core, sys.stdout.isatty()
        follow_signals(balancer, upgradable=not hint)  # a demo has its servers in this process
        core.news.subscribers.append(functools.partial(
            saying_requests, lambda: core.settings.log_to_console or not terminal))
        raise_descriptor_limit()
        watchdog = asyncio.ensure_future(feed_watchdog())
        with contextlib.ExitStack() as logs:
            if not hint:
                logs.enter_context(logging_to_files(core.settings, core.news.subscribers))
            async with contextlib.AsyncExitStack() as shown:
                for one in SCREENS if screen else ():
                    await shown.enter_async_context(one(balancer))
                await balancer.run(functools.partial(announce, balancer, hint))
            log.info("stopped")
        watchdog.cancel()

    async def started() -> None:
        await start(run)

    freeze_gc()
    asyncio.run(started())
    return 0


def freeze_gc() -> None:
    """After loading, before serving: what is there now stays, so the collector of garbage need not
    look at it again and again, nor as often; some 5 to 10 % of a small request."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def raise_descriptor_limit() -> None:
    """As far as we may: a soft limit of 1,024, as many systems set it, is about 480 clients."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ============================================================================================
#  65  router flags
# ============================================================================================
#
# The command line of vllm-project/router: its flags are read, too, so that its command lines work
# as they are.  To add a flag: a row of ROUTER_FLAGS.

def thousandth(given: str) -> Any:
    """Milliseconds in seconds; what is no number is for the setting's check to complain of."""
    try:
        return float(given) / 1000
    except ValueError:
        return given


class RouterFlag(NamedTuple):
    """A flag of vllm-project/router: the key of [config] that it gives, and what makes its value;
    or what is done `instead`, which is said once; or why it is `refused`.  A row with none of them
    is read by `router_servers`."""

    key: str = ""
    value: Callable[[Any], Any] = str
    nargs: str | int | None = None  # as argparse has it; 0 for none
    instead: str = ""
    refused: str = ""


# Its policies, where they have another name here, or none.
ROUTER_POLICIES = {"rendezvous_hash": "consistent_hash", "sticky_least_loaded": "consistent_hash",
                   "kv_aware": "unified"}
LOG_LEVELS = {"warn": "WARNING", "trace": "DEBUG"}
NO_CIRCUIT = 10**9  # failed requests in a row, which nobody will see
IN_A_MAP = "what each server has cached is bounded by its own KV cache"
KV_EVENTS = "what servers have cached is learned from answers and /metrics (policy unified)"
NO_TRACES = "requests carry traceparent on, and the log has each one's times"
NO_PROGRAMS = "sessions stay together by session_headers"
ROUTER_FLAGS = {
    "--worker-urls": RouterFlag(nargs="*"),
    "--intra-node-data-parallel-size": RouterFlag(),
    "--policy": RouterFlag("policy", lambda name: ROUTER_POLICIES.get(name, name)),
    "--cache-threshold": RouterFlag("cache_threshold"),
    "--balance-abs-threshold": RouterFlag("balance_abs_threshold"),
    "--balance-rel-threshold": RouterFlag("balance_rel_threshold"),
    "--api-key": RouterFlag("api_key"),
    "--max-payload-size": RouterFlag("max_body_bytes"),
    "--request-timeout-secs": RouterFlag("request_timeout"),
    "--max-concurrent-requests": RouterFlag("max_requests"),
    "--queue-size": RouterFlag("queue_size"),
    "--queue-timeout-secs": RouterFlag("queue_timeout"),
    "--cors-allowed-origins": RouterFlag("cors_allowed_origins", list, "*"),
    "--request-id-headers": RouterFlag("request_id_headers", list, "*"),
    "--retry-max-retries": RouterFlag("max_retries"),
    "--retry-initial-backoff-ms": RouterFlag("retry_delay", thousandth),
    "--retry-max-backoff-ms": RouterFlag("retry_delay_max", thousandth),
    "--disable-retries": RouterFlag("max_retries", lambda _: 0, 0),
    "--cb-failure-threshold": RouterFlag("failure_threshold"),
    "--cb-success-threshold": RouterFlag("breaker_success_threshold"),
    "--cb-timeout-duration-secs": RouterFlag("breaker_open_time"),
    "--cb-window-duration-secs": RouterFlag("breaker_window"),
    "--disable-circuit-breaker": RouterFlag("failure_threshold", lambda _: NO_CIRCUIT, 0),
    "--health-check-interval-secs": RouterFlag("health_check_interval"),
    "--health-check-timeout-secs": RouterFlag("health_check_timeout"),
    "--health-failure-threshold": RouterFlag("health_check_consecutive_failures"),
    "--health-success-threshold": RouterFlag("health_check_consecutive_successes"),
    "--log-dir": RouterFlag("log_dir"),
    "--prometheus-host": RouterFlag("operator_host"),
    "--prometheus-port": RouterFlag("operator_port"),
    "--vllm-discovery-address": RouterFlag("registration_address"),
    # What has no counterpart.
    "--retry-backoff-multiplier": RouterFlag(instead="each pause is twice the one before"),
    "--retry-jitter-factor": RouterFlag(instead="a pause is drawn from its upper half"),
    "--eviction-interval-secs": RouterFlag(instead=IN_A_MAP),
    "--eviction-interval": RouterFlag(instead=IN_A_MAP),
    "--max-tree-size": RouterFlag(instead=IN_A_MAP),
    "--rate-limit-tokens-per-second": RouterFlag(
        instead="requests_per_second limits each of [[keys]]"),
    "--health-check-endpoint": RouterFlag(instead="/health is asked, /v1/models where it is none"),
    "--worker-startup-timeout-secs": RouterFlag(instead="it serves at once, servers may follow"),
    "--worker-startup-check-interval": RouterFlag(instead="health_check_interval is for all"),
    "--enable-igw": RouterFlag(nargs=0, instead="requests go to servers that have their model"),
    "--backend": RouterFlag(instead="servers are what speaks vLLM's API"),
    "--runtime": RouterFlag(instead="servers are what speaks vLLM's API"),
    "--history-backend": RouterFlag(instead="responses are kept by the servers that made them"),
    "--mini-lb": RouterFlag(nargs=0, instead="it is one process anyway"),
    "--profile": RouterFlag(nargs=0, instead="admin_paths may have /start_profile"),
    **{f"--{name}": RouterFlag(instead=KV_EVENTS) for name in (
        "router-temperature", "kv-penalty-host", "kv-penalty-external", "kv-penalty-disk",
        "kv-aware-session-affinity-ttl-secs", "kv-event-block-size", "kv-event-model")},
    **{f"--{name}": RouterFlag(nargs="+", instead=KV_EVENTS) for name in (
        "kv-event-source", "kv-event-replay-source", "pd-kv-events")},
    "--enable-program-scheduling": RouterFlag(nargs=0, instead=NO_PROGRAMS),
    "--program-scheduling-config-json": RouterFlag(instead=NO_PROGRAMS),
    "--enable-trace": RouterFlag(nargs=0, instead=NO_TRACES),
    "--otlp-traces-endpoint": RouterFlag(instead=NO_TRACES),
    "--otel-sampling-ratio": RouterFlag(instead=NO_TRACES),
    "--otel-excluded-paths": RouterFlag(nargs="*", instead=NO_TRACES),
    # Where another behaviour would be a hole, or would not be what was meant at all.
    "--api-key-validation-urls": RouterFlag(nargs="+", refused="name clients' keys in [[keys]]"),
    **{f"--wasm-middleware{end}": RouterFlag(nargs="+", refused="no code is run for requests")
       for end in ("", "-sha256", "-route")},
    "--epd-config": RouterFlag(refused="servers for encoders alone are not known here"),
    # Of prefill and decode servers, until they are asked for one request.
    "--vllm-pd-disaggregation": RouterFlag(nargs=0, refused=(
        NO_PD := "prefill and decode servers are not asked for the same request yet")),
    "--prefill": RouterFlag(nargs="+", refused=NO_PD),
    "--decode": RouterFlag(nargs="+", refused=NO_PD),
    "--prefill-policy": RouterFlag(refused=NO_PD),
    "--decode-policy": RouterFlag(refused=NO_PD),
    "--kv-connector": RouterFlag(refused=NO_PD),
    # Of Kubernetes: `router_servers` makes a [[kubernetes]] of them.
    "--service-discovery": RouterFlag(nargs=0),
    "--selector": RouterFlag(nargs="*"),
    "--prefill-selector": RouterFlag(nargs="*"),
    "--decode-selector": RouterFlag(nargs="*"),
    "--service-discovery-namespace": RouterFlag(),
    "--service-discovery-port": RouterFlag(),
}


def add_router_flags(parser: argparse.ArgumentParser) -> None:
    """For its command lines; `help router` says what they mean, the parser's help is ours."""
    for name, flag in ROUTER_FLAGS.items():
        how: dict[str, Any] = {"action": "store_true"} if flag.nargs == 0 else {
            "nargs": flag.nargs, "action": "append" if flag.nargs == "+" else "store"}
        parser.add_argument(name, help=argparse.SUPPRESS, default=None, **how)


@topic("router", "the flags of vllm-project/router, which `run` takes, and their keys here")
def router_topic() -> str:
    rows = [(f"  {name}", f"[config] {flag.key}" if flag.key else
             f"refused: {flag.refused}" if flag.refused else
             f"has no effect: {flag.instead}" if flag.instead else "[servers]")
            for name, flag in ROUTER_FLAGS.items()]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(["--host, --port and --log-level are the same here; ms become seconds.",
                      *(name.ljust(width) + meaning for name, meaning in rows)])


POD_FLAGS = {"--selector": "selector", "--prefill-selector": "prefill_selector",
             "--decode-selector": "decode_selector", "--service-discovery-namespace": "namespace",
             "--service-discovery-port": "port"}


def router_servers(given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """The servers that its flags name, or have looked for.  Raises SettingsError."""
    found, size = dict[str, tuple[Any, str]](), given.get("--intra-node-data-parallel-size")
    more = {} if size is None else {"data_parallel_size": size}
    if (urls := given.get("--worker-urls")) is not None:
        found["servers"] = [{"url": url, **more} for url in urls], "--worker-urls"
    pods = {key: ",".join(given[name]) if isinstance(given[name], list) else given[name]
            for name, key in POD_FLAGS.items() if name in given}
    if "--service-discovery" in given:
        found["kubernetes"] = [{**pods, **more}], "--service-discovery"
    elif pods:
        name = next(name for name in POD_FLAGS if name in given)
        raise SettingsError([Complaint("command line", 0, name, "expected --service-discovery")])
    return found


def router_overrides(
    args: argparse.Namespace
) -> tuple[dict[str, tuple[Any, str]], list[Complaint]]:
    """What flags of vllm-project/router say, as `overrides_from` has it, and one warning of those
    that have no counterpart.  Raises SettingsError."""
    values = {name: getattr(args, name[2:].replace("-", "_"), None) for name in ROUTER_FLAGS}
    given = {name: value for name, value in values.items() if value is not None}
    if refused := [name for name in given if ROUTER_FLAGS[name].refused]:
        raise SettingsError([Complaint("command line", 0, name, ROUTER_FLAGS[name].refused)
                             for name in refused])
    found = router_servers(given)
    for name, value in given.items():
        if key := ROUTER_FLAGS[name].key:
            found[key] = ROUTER_FLAGS[name].value(value), name
    if "--prometheus-host" in given:  # its port is usual
        found.setdefault("operator_port", (29000, "--prometheus-host"))
    if (level := LOG_LEVELS.get((args.log_level or "").lower())) is not None:
        found["log_level"] = level, "--log-level"
    words = [f"{name}: {ROUTER_FLAGS[name].instead}" for name in given if ROUTER_FLAGS[name].instead
             and (name, str(given[name]).strip("/")) != ("--health-check-endpoint", "health")]
    policy = str(given.get("--policy"))
    if policy in ROUTER_POLICIES:
        words.append(f"--policy {policy}: {ROUTER_POLICIES[policy]} is next to it")
    text = "flags of vllm-project/router without a counterpart: " + "; ".join(words)
    return found, [Complaint("command line", 0, "", text)] * bool(words)


# ============================================================================================
#  66  command line
# ============================================================================================
#
# Arguments, environment, exit codes: 0 well, 1 the settings or the address cannot be
# used, 2 wrong arguments or, from check-config, no server can be used.

EPILOG = """\
examples:
  mvllm_lite.py servers.toml                        serve what the file describes
  mvllm_lite.py run --config servers.toml --port 9000 --console
  mvllm_lite.py --server http://10.0.0.1:8000 http://10.0.0.2:8000 --max-load 16 8{examples}

A flag wins over the environment, that over the file, and that over the default.  The environment
is CONFIG_PATH, {env}.
SIGHUP reads the file at once; SIGTERM and Ctrl-C let running answers finish, a second one does not;
SIGUSR2 has a new process take over.
"""


def argument_parser(only: str = "") -> argparse.ArgumentParser:
    """With the arguments of that command, or of all."""
    env = ", ".join(f.metadata["env"] for f in CONFIG_FIELDS.values() if f.metadata["env"])
    rows = sorted(COMMANDS.items())
    examples = "".join(f"\n  mvllm_lite.py {row.example:35} {row.line}"
                       for _, row in rows if row.example)
    parser = argparse.ArgumentParser(
        prog="mvllm_lite.py", epilog=EPILOG.format(examples=examples, env=env),
        description="One OpenAI-compatible address in front of a fleet of vLLM servers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mvllm_lite {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, row in rows:
        added = commands.add_parser(name, help=row.line, **row.parser)
        if only in (name, ""):
            row.add_arguments(added)
        added.set_defaults(run=row.run, print_help=added.print_help)
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    # As in mvllm, `run -h ADDRESS` is the host; `-h` alone is help, as everywhere else.
    add_config(parser)
    parser.add_argument("--help", action="help", help="show this help message and exit")
    parser.add_argument("--server", nargs="+", action="extend", metavar="URL",
                        help="servers, in place of the file's")
    parser.add_argument("--max-load", nargs="+", action="extend", metavar="N",
                        help="their max_concurrent_requests")
    parser.add_argument("-h", "--host", nargs="?", const="", help="address to listen on")
    parser.add_argument("-p", "--port", help="port to listen on")
    parser.add_argument("-c", "--console", action="store_true", help="log lines, not the screen")
    parser.add_argument("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR")
    parser.add_argument("-m", "--model", action="store_true", help="name models in state changes")
    parser.add_argument("--reload", action="store_true", help="for mvllm's sake: it always follows")
    add_router_flags(parser)


def settings_to_run(
    args: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[str, Overrides, Settings, list[Complaint]]:
    """The settings that these arguments make, with the file and what wins over it, and warnings.
    Raises SettingsError."""
    found, unmatched = router_overrides(args)
    named = {"servers", "kubernetes", "registration_address"} & found.keys()
    path = config_path(args, args.server or named)
    overrides = {**overrides_from(args, environ), **found}
    if not path:
        overrides.setdefault("servers", ([], "command line"))  # they will come
    settings, warnings = load_settings(path, overrides)
    return path, overrides, settings, [*warn_of(environ, args), *unmatched, *warnings]


@command("run", "serve; also without the word", add_run, add_help=False)
def run_balancer(args: argparse.Namespace) -> int:
    if args.host == "":
        args.print_help()
        return 0
    if args.max_load and len(args.max_load) != len(args.server or ()):
        return fail(f"--max-load: found {len(args.max_load)} numbers for {len(args.server or ())}"
                    " servers, expected one for each")
    path, overrides, settings, warnings = settings_to_run(args, os.environ)
    with logging_to_stdout(settings.log_level):
        for warning in warnings:
            log.warning("%s", warning)
        inherited = inherited_sockets()
        lines_wanted = settings.log_to_console  # --console, too

        def start(run: Runner) -> Awaitable[None]:
            balancer = Balancer(settings, path, overrides, inherited)
            inherit_changes(balancer.core.roster)
            return run(balancer)

        return serve_until_stopped(
            start,
            screen=sys.stdout.isatty() and not (lines_wanted or inherited[SOCKETS_ENV]))


PART_ROW = re.compile(r"^ +([IVX]+)  (.+?) +[\d,]+ lines, (.+)$", re.MULTILINE)  # of the map
PART_BANNER = re.compile(r"^# (?:━━━ part ([IVX]+): |─+ the ruler )", re.MULTILINE)
RULER = "       -- the ruler: above, all that runs for a file of five lines --"


def parts_table(source: str) -> str:
    """For each part of this file how many lines it has, and when it runs."""
    runs = {number: (name, when) for number, name, when in PART_ROW.findall(source)}
    starts = [(m[1], source.count("\n", 0, m.start())) for m in PART_BANNER.finditer(source)]
    ends = [line for _, line in starts[1:]] + [source.count("\n")]
    row = "{:>5}  {:15}{:7,}  {}".format
    lines = [" part                   lines  runs", row("", "map, imports", starts[0][1], "always")]
    for (number, start), end in zip(starts, ends):
        name, when = runs.get(number, ("", ""))
        lines.append(row(number, name, end - start, when) if number else RULER)
    return "\n".join([*lines, row("", "together", ends[-1], "").rstrip()])


@topic("parts", "what parts this file has, how long each is, and when it runs")
def parts_topic() -> str:
    source = os.path.splitext(__file__)[0] + ".py"  # it may run compiled
    return parts_table(SettingsFile(source).text())


def add_help(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", nargs="?", help="a command, or one of the topics")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "topics:\n" + "\n".join(
        f"  {name:12}  {row.line}" for name, row in sorted(TOPICS.items()))


def print_text(text: str) -> int:
    """Printed, whatever the terminal's encoding, and though its reader (`head`) may have left."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode() + b"\n")
        sys.stdout.buffer.flush()
    return 0


@command("help", "say how a command is used, or explain a topic", add_help)
def print_help(args: argparse.Namespace) -> int:
    if row := TOPICS.get(args.topic):
        return print_text(row.text())
    if args.topic is None or args.topic in COMMANDS:
        argument_parser().parse_args([*filter(None, [args.topic]), "--help"])
    print(f"mvllm_lite: help: found {shown(args.topic)}, expected a command or one of "
          + ", ".join(sorted(TOPICS)) + did_you_mean(args.topic, {**COMMANDS, **TOPICS}),
          file=sys.stderr)
    return 2


@command("example", "print a settings file with every key, its default and its meaning")
def print_example(args: argparse.Namespace) -> int:
    return print_text(TOPICS["example"].text())


@command("version", "print the version")
def print_version(args: argparse.Namespace) -> int:
    print(f"mvllm_lite {__version__}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):  # None, where they were closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        argv = ["run", *argv]
    args = argument_parser(argv[0]).parse_args(argv)
    try:
        return int(args.run(args))
    except SettingsError as error:
        text = str(error)
        if getattr(args, "file", None) and not os.path.exists(args.file):
            text += did_you_mean(args.file, COMMANDS)
        return fail(text)


# ────────────────────────────────────────── the ruler ─────────────────────────────────────────
# Above: all that runs for a servers.toml of five lines.  Below: what a setting, a subcommand, a
# terminal or a browser asks for.  It hooks itself into COMMANDS, ENDPOINTS, SCREENS and SERVICES.


# ━━━ part XI: discovery ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  67  names
# ============================================================================================
#
# Servers by DNS: each address of a name is a server, and a URL whose name moves is followed.
# Lookups are made in threads of their own, one for each name at most, so that one which hangs
# delays nothing; whatever goes wrong with it, what was known stays.

LOOKUP_LIMIT_S = 10.0  # after which a lookup counts as failed, though its end is waited for
LOOKUPS_AT_ONCE = 32
NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
Resolve = Callable[[str, socket.AddressFamily], Sequence[str]]  # in a thread; raises OSError
FAMILIES = {0: (socket.AF_INET, socket.AF_INET6), 4: (socket.AF_INET,), 6: (socket.AF_INET6,)}


def addresses_of(host: str, family: socket.AddressFamily) -> Sequence[str]:
    """The addresses that this machine has a name stand for.  Raises OSError."""
    found = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def first_family(
    resolve: Resolve, host: str, families: Sequence[socket.AddressFamily]
) -> tuple[str, ...]:
    """A name's addresses of the first of these families that it has any of.  That one could not be
    looked up says nothing of the next.  Raises OSError."""
    for family in families:
        try:
            if found := resolve(host, family):
                return tuple(sorted(found))
        except socket.gaierror as error:
            if error.errno not in NO_SUCH_NAME:
                raise
    raise OSError("it has no address")


def at_addresses(entry: DnsSettings, addresses: Iterable[str]) -> dict[str, ServerSettings]:
    """The servers that an entry stands for, by id."""
    ids = {f"{entry.dns}@{address}": address for address in addresses}
    return {id: dataclasses.replace(entry.server, id=id, name=id, address=address, like=entry.dns)
            for id, address in ids.items()}


async def in_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """What will come of work in a thread that nobody waits for at the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: Exception | None) -> None:
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            news = work(), None
        except (OSError, UnicodeError) as error:
            news = None, error  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *news)

    threading.Thread(target=run, name="name", daemon=True).start()
    return done


class NameFollower:
    """Looks up what is wanted again and again."""

    def __init__(self, core: Core, wanted: NamesWanted, resolve: Resolve = addresses_of) -> None:
        self._core, self._wanted, self._resolve = core, wanted, resolve
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        known = core.roster.named_by(Source.DNS).values()
        self._found = {entry.dns: tuple(one.address for one in known if one.like == entry.dns)
                       for entry in wanted.entries}

    async def run(self) -> None:
        hosts = dict[str, list[ServerSettings]]()
        for server in self._wanted.servers:
            hosts.setdefault(host_of(server.url), []).append(server)
        self.define()  # what is wanted no more is gone, what was known is as it is to be now
        async with asyncio.TaskGroup() as group:
            for entry in self._wanted.entries:
                group.create_task(self.follow(
                    host_of(entry.dns), FAMILIES[entry.family], entry.server.refresh,
                    functools.partial(self.found, entry)))
            for host, servers in hosts.items():
                group.create_task(self.follow(
                    host, (socket.AF_UNSPEC,), min(one.refresh for one in servers),
                    functools.partial(self.moved, servers)))

    async def follow(
        self, host: str, families: Sequence[socket.AddressFamily], refresh_s: float,
        take: Callable[[tuple[str, ...], tuple[str, ...]], object],
    ) -> None:
        """Have `take` told of each change: the addresses before, and those now."""
        loop, known, failing = asyncio.get_running_loop(), tuple[str, ...](), False
        while True:
            begun = loop.time()
            async with self._lookups:
                lookup = await in_thread(
                    functools.partial(first_family, self._resolve, host, families))
                await asyncio.wait((lookup,), timeout=LOOKUP_LIMIT_S)
                failing = self.note(host, lookup, failing)
                await asyncio.wait((lookup,))
            if lookup.exception() is None and lookup.result() != known:
                take(known, lookup.result())
                known = lookup.result()
            await asyncio.sleep(max(0.0, begun + refresh_s - loop.time()))

    def note(self, host: str, lookup: asyncio.Future[Any], failing: bool) -> bool:
        """Count a lookup.  Returns whether it has failed, which is said once."""
        why = f"no answer within {LOOKUP_LIMIT_S:g} s"
        if lookup.done():
            error = lookup.exception()
            why = "" if error is None else error_text(error) if isinstance(error, OSError) else (
                str(error))
        self._core.metrics.lookups.add("failed" if why else "ok")
        if why and not failing:
            log.warning("the name %s was not looked up: %s; what was known of it stays", host, why)
        elif failing and not why:
            log.info("the name %s is looked up again", host)
        return bool(why)

    def found(self, entry: DnsSettings, _: object, now: tuple[str, ...]) -> None:
        """A name stands for these servers from now on."""
        before, self._found[entry.dns] = self._found[entry.dns], now
        if before != now:
            log.info("%s has %d addresses: %s", entry.dns, len(now), ", ".join(
                [f"+{one}" for one in now if one not in before]
                + [f"-{one}" for one in before if one not in now]))
        self.define()

    def define(self) -> None:
        servers = dict[str, ServerSettings]()
        for entry in self._wanted.entries:
            servers |= at_addresses(entry, self._found[entry.dns])
        self._core.roster.define(Source.DNS, servers)

    def moved(
        self, servers: Sequence[ServerSettings], before: tuple[str, ...], now: tuple[str, ...]
    ) -> None:
        """The name of these servers' URLs has other addresses now."""
        if before:
            log.info("%s: its name has moved to %s", servers[0].name, ", ".join(now))
            for server in servers:
                self._core.pools.get(server).moved(now)


async def preview_names(wanted: NamesWanted) -> tuple[list[ServerSettings], list[str]]:
    """Look the names up once."""
    servers, lines = list[ServerSettings](), list[str]()
    for entry in wanted.entries:
        try:
            found = await (await in_thread(functools.partial(
                first_family, addresses_of, host_of(entry.dns), FAMILIES[entry.family])))
            servers += at_addresses(entry, found).values()
        except (OSError, UnicodeError) as error:
            why = error_text(error) if isinstance(error, OSError) else str(error)
            lines.append(f"{entry.dns}  NOT USABLE: the name was not looked up: {why}")
    return servers, lines


@service("names", operator.attrgetter("names"), Source.DNS, preview_names)
async def follow_names(core: Core, wanted: NamesWanted) -> None:
    await NameFollower(core, wanted).run()


# ============================================================================================
#  68  pods
# ============================================================================================
#
# Pods and EndpointSlices, and the servers that they are.  What is kept of an object is what servers
# follow from, by its uid: the same name or address under another uid is another pod.

ANNOTATION_PREFIX = "mvllm-lite/"
ANNOTATED = (  # what a pod may set of its servers
    "max_concurrent_requests", "weight", "tier", "pool", "role", "port", "data_parallel_size",
    "bootstrap_port",
)
BOOTSTRAP_ANNOTATION = "vllm.ai/bootstrap-port"  # as vllm-project/router reads it
WORKER_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"  # only 0 answers requests
POD_PORT = 8000  # vLLM's own


class Pod(NamedTuple):
    """A pod, or an endpoint of a slice: what servers may be made of."""

    uid: str
    name: str  # with its namespace
    address: str = ""
    why_not: str = ""  # it is not to be asked
    leaving: bool = False
    ports: tuple[tuple[str, int], ...] = ()  # that it declares
    port: int = 0  # where the settings say none
    annotations: tuple[tuple[str, str], ...] = ()  # those that are for us


def member_at(document: Any, *path: str) -> Any:
    """What stands there in a JSON document; None for nothing."""
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def string_at(document: Any, *path: str) -> str:
    found = member_at(document, *path)
    return found if isinstance(found, str) else ""


def objects_at(document: Any, *path: str) -> list[dict[str, Any]]:
    found = member_at(document, *path)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def ports_at(document: Any, number: str) -> list[tuple[str, int]]:
    """Ports of TCP, by name."""
    found = [(string_at(one, "name"), one.get(number)) for one in objects_at(document, "ports")
             if one.get("protocol") in ("TCP", None)]
    return [(name, port) for name, port in found if type(port) is int and 0 < port < 65536]


def address_trouble(address: str) -> str:
    """Why nobody is asked at that address, or ''."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return f"its address {shown(address)} is none" if address else "it has no address yet"
    foreign = found.is_link_local or found.is_multicast or found.is_unspecified
    return f"no server is at {found}" if foreign else ""


def name_of(document: Any) -> str:
    names = string_at(document, "metadata", "namespace"), string_at(document, "metadata", "name")
    return "/".join(filter(None, names))


def uid_of(document: Any) -> str:
    return string_at(document, "metadata", "uid") or name_of(document)


def first_reason(leaving: bool, address: str, *others: tuple[Any, str]) -> str:
    """The first that holds of these reasons not to ask a pod, or ''."""
    bad = address_trouble(address)
    rows = (leaving, "it is being deleted"), *others[:1], (bad, bad), *others[1:]
    return next((why for amiss, why in rows if amiss), "")


def read_pod(pod: Any) -> tuple[Pod, ...]:
    """A pod as the API shows it."""
    phase = string_at(pod, "status", "phase") or "unknown"
    addresses = [string_at(pod, "status", "podIP")]  # the first of its addresses, if it has two
    addresses += [string_at(one, "ip") for one in objects_at(pod, "status", "podIPs")]
    address = next(filter(None, addresses), "")
    ready = next((one for one in objects_at(pod, "status", "conditions")
                  if one.get("type") == "Ready"), {})
    said = string_at(ready, "message") or string_at(ready, "reason")
    leaving = member_at(pod, "metadata", "deletionTimestamp") is not None
    worker = string_at(pod, "metadata", "labels", WORKER_LABEL) or "0"
    why_not = first_reason(
        leaving, address, (phase != "Running", f"its phase is {shown(phase)}"),
        (worker != "0", f"it is worker {shown(worker)} of a group: only 0 answers"),
        (ready.get("status") != "True", "it is not ready" + (said and f": {shown(said, 200)}")))
    sidecars = [one for one in objects_at(pod, "spec", "initContainers")
                if one.get("restartPolicy") == "Always"]
    ports = [port for one in objects_at(pod, "spec", "containers") + sidecars
             for port in ports_at(one, "containerPort")]
    notes = member_at(pod, "metadata", "annotations")
    ours = [(key, value) for key, value in (notes if isinstance(notes, dict) else {}).items()
            if (key.startswith(ANNOTATION_PREFIX) or key == BOOTSTRAP_ANNOTATION)
            and isinstance(value, str)]
    return (Pod(uid_of(pod), name_of(pod), address, why_not, leaving, tuple(ports), POD_PORT,
                tuple(ours)),)


def read_slice(one: Any) -> tuple[Pod, ...]:
    """The endpoints of an EndpointSlice; its ports are resolved already."""
    namespace, kind = string_at(one, "metadata", "namespace"), string_at(one, "addressType")
    ports, found = ports_at(one, "port"), list[Pod]()
    for endpoint in objects_at(one, "endpoints"):
        addresses = member_at(endpoint, "addresses")
        address = addresses[0] if isinstance(addresses, list) and addresses else ""
        address = address if isinstance(address, str) else ""
        leaving = member_at(endpoint, "conditions", "terminating") is True
        why_not = first_reason(
            leaving, address, (kind == "FQDN", "its address is a name: give it to dns"),
            (member_at(endpoint, "conditions", "ready") is False, "it is not ready"))
        name = f"{namespace}/{string_at(endpoint, 'targetRef', 'name') or address}"
        found.append(Pod(string_at(endpoint, "targetRef", "uid") or name, name, address, why_not,
                         leaving, tuple(ports), ports[0][1] if ports else 0))
    return tuple(found)


class ObjectKind(NamedTuple):
    """A kind of object of the API, and what pods one is."""

    group: str
    path: str
    plural: str
    read: Callable[[Any], tuple[Pod, ...]]


PODS = ObjectKind("", "/api/v1", "pods", read_pod)
SLICES = ObjectKind("discovery.k8s.io", "/apis/discovery.k8s.io/v1", "endpointslices", read_slice)


class Watched(NamedTuple):
    """What one watch is of, and what its servers are."""

    table: KubernetesSettings
    kind: ObjectKind
    selector: str
    role: str

    @property
    def where(self) -> str:
        return f"in {self.table.namespace or 'all namespaces'}"

    @property
    def name(self) -> str:
        return f"{self.kind.plural} {self.selector} {self.where}"

    def path(self, **query: object) -> str:
        """Where the API has them."""
        namespace = self.table.namespace and f"/namespaces/{self.table.namespace}"
        asked = urllib.parse.urlencode({"labelSelector": self.selector, **query})
        return f"{self.kind.path}{namespace}/{self.kind.plural}?{asked}"


def watches_of(table: KubernetesSettings) -> list[Watched]:
    """Those of a table.  A pod that two select is of the first."""
    by_service = table.service and f"kubernetes.io/service-name={table.service}"
    return [Watched(table, kind, selector, role) for kind, selector, role in (
        (PODS, table.prefill_selector, "prefill"), (PODS, table.decode_selector, "decode"),
        (PODS, table.selector, table.server.role), (SLICES, by_service, table.server.role),
    ) if selector]


class Offer(NamedTuple):
    """The servers of a pod, by id, or why it has none; and what is wrong with what it says of
    itself."""

    servers: Mapping[str, ServerSettings]
    why_not: str = ""
    warnings: tuple[str, ...] = ()


def offer_of(one: Pod, what: Watched, pools: Collection[str]) -> Offer:
    """The servers are at the pod's ports; `pools` are those of the settings."""
    values, warnings = read_annotations(one, what, pools)
    wanted, names = values.pop("port", what.table.port) or (one.port,), dict(reversed(one.ports))
    numbers = [names.get(port, 0) if isinstance(port, str) else port for port in wanted]
    missing = [str(port or "at all") for port, number in zip(wanted, numbers) if not number]
    if why_not := one.why_not or missing and f"it has no port {', '.join(missing)}":
        return Offer({}, why_not, warnings)
    host = f"[{one.address}]" if ":" in one.address else one.address
    default, servers = what.table.server, dict[str, ServerSettings]()
    default = dataclasses.replace(default, like=default.id, **{"role": what.role, **values})
    for number in dict.fromkeys(numbers):
        id, url = f"{one.uid}:{number}", f"{what.table.scheme}://{host}:{number}"
        name = f"{one.name}:{number}" if len(numbers) > 1 else one.name
        servers[id] = dataclasses.replace(default, id=id, name=name, url=url)
    return Offer(servers, "", warnings)


def read_annotations(
    one: Pod, what: Watched, pools: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a pod says of its server, and what is wrong with that, which is ignored."""
    values, wrong = dict[str, Any](), list[str]()
    for name, value in sorted(one.annotations, reverse=True):  # ours come last, and win
        key = "bootstrap_port" if name == BOOTSTRAP_ANNOTATION else name.removeprefix(
            ANNOTATION_PREFIX)
        try:
            if key not in ANNOTATED:
                raise ValueError(f"one of {', '.join(ANNOTATED)}")
            if key == "pool" and value not in pools:
                raise ValueError("one of [pools]")
            values[key] = port_list(value.split(",")) if key == "port" else (
                SERVER_FIELDS[key].metadata["check"](value))
        except ValueError as expected:
            found = f"{name}: {shown(value)}" if key in ANNOTATED else name
            wrong.append(f"pod {one.name}: annotation {found} is ignored, expected {expected}")
    return values, tuple(wrong)


def offers_of(
    pods: Iterable[Pod], what: Watched, pools: Collection[str],
    before: Mapping[Pod, Offer],
) -> dict[Pod, Offer]:
    """What all pods of a watch offer; those that are as `before` offer the same.  One that is
    in several slices leaves as soon as one of them says so; it has one address."""
    best = dict[str, Pod]()
    for one in pods:
        known = best.get(one.uid)
        if known is None or pod_rank(one) > pod_rank(known):
            best[one.uid] = one
    return {one: before.get(one) or offer_of(one, what, pools) for one in best.values()}


def pod_rank(one: Pod) -> tuple[bool, bool, bool]:
    """Of two that are the same pod, the one with the higher rank is believed."""
    return one.leaving, not one.why_not, ":" not in one.address


def servers_of(offers: Iterable[Mapping[Pod, Offer]]) -> dict[str, ServerSettings]:
    """All servers by id, of the first watch that has them.  At an address of two pods only the
    later one can be: the other one's end was missed."""
    servers, at = dict[str, ServerSettings](), dict[str, str]()
    for offer in itertools.chain.from_iterable(one.values() for one in offers):
        for id, server in offer.servers.items():
            if id not in servers:
                servers.pop(at.get(server.url, ""), None)
                servers[id], at[server.url] = server, id
    return servers


# ============================================================================================
#  69  listing
# ============================================================================================
#
# What is asked of the Kubernetes API, told by value.  A list is taken page by page and then kept up
# to date by a watch: each event alone suffices, a list anew repairs whatever was missed, and while
# the API says nothing everything stays as it was last known.

PAGE_OBJECTS = 100  # a pod is 5 to 60 kB, and a page of them is parsed in one turn of the loop
WATCH_S = (240, 290)  # proxies cut idle streams after 300
PAUSE_LIMIT_S = 30.0
RETRY_AFTER_LIMIT_S = 300.0
GONE = 410  # what was to be watched from is forgotten
LINE_LIMIT_BYTES = 4 * 1024 * 1024  # etcd takes objects of 1.5 MB


class ApiFailure(NamedTuple):
    """The API did not do what it was asked; status 0 is none at all."""

    status: int
    text: str
    retry_after_s: float = 0.0


class Listing:
    """The objects of one watch: a list, and all that has changed since."""

    def __init__(self, what: Watched) -> None:
        self.what = what
        self.objects: dict[str, tuple[Pod, ...]] = {}  # by uid
        self.version = ""  # what has come so far, in the API's words
        self.complete = False  # it can be watched; otherwise it has to be listed
        self.lists = 0  # that were complete
        self._pages: dict[str, tuple[Pod, ...]] = {}  # of a list under way
        self._continue = ""

    @property
    def verb(self) -> str:
        return "watch" if self.complete else "list"

    def pods(self) -> Iterable[Pod]:
        return itertools.chain.from_iterable(self.objects.values())

    def path(self, watch_s: int) -> str:
        """What is to be asked for next: a page of the list, or what changes within a time."""
        if not self.complete:
            more = {"continue": self._continue} if self._continue else {}
            return self.what.path(limit=PAGE_OBJECTS, **more)
        since = {"resourceVersion": self.version} if self.version else {}
        return self.what.path(watch=1, **since, allowWatchBookmarks="true", timeoutSeconds=watch_s)

    def take_page(self, page: Any) -> ApiFailure | None:
        """A page of the list; the last one makes it complete, and what is not in it is gone."""
        if not isinstance(member_at(page, "items"), (list, type(None))) or not isinstance(
                member_at(page, "metadata"), dict):
            return ApiFailure(0, "what it answered is no list of Kubernetes objects")
        read = self.what.kind.read
        self._pages |= {uid_of(one): read(one) for one in objects_at(page, "items")}
        self._continue = string_at(page, "metadata", "continue")
        if not self._continue:
            self.objects, self._pages = self._pages, {}
            self.version = string_at(page, "metadata", "resourceVersion")
            self.complete, self.lists = True, self.lists + 1
        return None

    def take_event(self, event: Any) -> ApiFailure | None:
        """A line of a watch: one object as it is now, or was at last."""
        kind, one = string_at(event, "type"), member_at(event, "object")
        if not kind:
            return ApiFailure(0, "what it sent is no event of a watch")
        if kind == "ERROR":
            code = member_at(one, "code")
            said = shown(string_at(one, "message") or string_at(one, "reason"), 200)
            return ApiFailure(code if type(code) is int else 0, f"the watch ended: {said}")
        if kind in ("ADDED", "MODIFIED"):
            self.objects[uid_of(one)] = self.what.kind.read(one)
        elif kind == "DELETED":
            self.objects.pop(uid_of(one), None)
        self.version = string_at(one, "metadata", "resourceVersion") or self.version
        return None

    def refused(self, failure: ApiFailure, failures: int) -> None:
        """Where nothing can be watched or listed from where it was, list anew.  What is known stays
        until that is done."""
        stuck = self.complete and failure.status and failures % 3 == 0
        if stuck or failure.status in (400, GONE):
            self.complete, self._pages, self._continue = False, {}, ""


class Standing:
    """How a watch and its API get on with each other."""

    def __init__(self) -> None:
        self.contact_at = -INFINITY  # when the API last said anything good
        self.trouble = ""  # why it does not now
        self.failures = 0  # in a row
        self.errors: dict[str, int] = {}  # by status
        self._verb = ""  # what it did not do

    def answered(self, verb: str, now: float, proven: bool = True) -> None:
        """It does what it was asked to; it is `proven` once that has brought something.  That it
        lists says nothing about a watch that it refused."""
        self.contact_at = now
        if verb == "watch" or self._verb != "watch":
            self.trouble = ""
            if proven:
                self.failures = 0

    def failed(self, verb: str, failure: ApiFailure, draw: random.Random) -> float:
        """Return for how many seconds nothing is to be asked."""
        self.failures, self._verb = self.failures + 1, verb
        label = str(failure.status or "no answer")
        self.errors[label] = self.errors.get(label, 0) + 1
        if not (failure.status == GONE and self.failures == 1):  # which is of no consequence
            self.trouble = failure.text
        return pause_s(failure, self.failures, draw)


def pause_s(failure: ApiFailure, failures: int, draw: random.Random) -> float:
    """How long to wait after the n-th failure in a row: 1, 2, 4 … 30 s, half of it by chance, so
    that balancers of one API do not come together."""
    share = draw.uniform(0.5, 1.0)
    if failure.status == GONE and failures == 1:
        return 0.0
    if failure.retry_after_s:
        return min(failure.retry_after_s, RETRY_AFTER_LIMIT_S) + share
    if failure.status in (403, 404):  # until a person has done something
        return PAUSE_LIMIT_S * share
    return min(PAUSE_LIMIT_S, 2.0 ** min(failures - 1, 9)) * share


def api_failure(what: Watched, verb: str, status: int, said: Any, retry_after: str) -> ApiFailure:
    """An answer of the API that is not 200; `said` is its content."""
    kind, role = what.kind, "Role" if what.table.namespace else "ClusterRole"
    rule = f"{{apiGroups: [{json.dumps(kind.group)}], resources: [{json.dumps(kind.plural)}]," + (
        ' verbs: ["get", "list", "watch"]}')
    why = {
        401: "its token or certificate is not accepted",
        403: f"this account may not {verb} {kind.plural} {what.where}; its {role} needs the rule"
             f" {rule}",
        404: f"there are no {kind.plural} {what.where}",
    }.get(status, f"it cannot {verb} {kind.plural} {what.where} now")
    reason = string_at(said, "message")
    seconds = float(retry_after) if re.fullmatch(r"\d{1,9}", retry_after) else 0.0
    return ApiFailure(
        status, f"answered {status}: {why}" + (reason and f" ({shown(reason, 200)})"), seconds)


def watch_report(
    listing: Listing, standing: Standing, offers: Mapping[Pod, Offer], now: float
) -> dict[str, Any]:
    """What is shown of a watch."""
    unused = [(pod.name, offer.why_not) for pod, offer in offers.items() if offer.why_not]
    contact_s = None if standing.contact_at == -INFINITY else round(now - standing.contact_at, 1)
    return {
        "watch": listing.what.name, "state": f"{listing.verb}ing",
        "trouble": standing.trouble, "since_contact_s": contact_s, "lists": listing.lists,
        "errors": sum(standing.errors.values()), "pods": len(offers),
        "servers": sum(len(offer.servers) for offer in offers.values()),
        "not_used": dict(sorted(unused)[:NAMES_LIMIT]),
    }


class Lines:
    """Lines of a stream, however it is cut; one may be as long as the API's largest object."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        """Those that are complete.  Raises BadMessage."""
        end = piece.rfind(b"\n")
        if end < 0:
            self._rest += piece
            if len(self._rest) > LINE_LIMIT_BYTES:
                text = f"a line is longer than {LINE_LIMIT_BYTES} bytes"
                raise BadMessage(text, Fault.BAD_ANSWER)
            return []
        lines = bytes(self._rest + piece[:end]).split(b"\n")
        self._rest[:] = piece[end + 1 :]
        return list(filter(bytes.strip, lines))


class Cluster(NamedTuple):
    """How an API server is reached: by texts in the PEM format, or by files that hold them."""

    url: str
    token: str = ""
    token_file: str = ""
    ca: str = ""
    ca_file: str = ""
    certificate: str = ""
    certificate_file: str = ""
    key: str = ""
    key_file: str = ""
    verify: bool = True


# What a kubeconfig may say of a cluster or a user that is not done here: programs, passwords …
KUBECONFIG_REFUSED = (
    "exec", "auth-provider", "username", "as", "proxy-url", "tls-server-name")


def parse_kubeconfig(text: str) -> Cluster:
    """The cluster and the user of its current context.  Raises ValueError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON; write it with: kubectl config view --raw --minify --flatten"
                         " -o json") from None
    context = kubeconfig_entry(document, "context", string_at(document, "current-context"))
    cluster = kubeconfig_entry(document, "cluster", string_at(context, "cluster"))
    user = kubeconfig_entry(document, "user", string_at(context, "user"))
    for key in KUBECONFIG_REFUSED:
        if found := user.get(key) or cluster.get(key):
            said = string_at(found, "command") or string_at(found, "name") or str(found)
            raise ValueError(f"{key} {shown(said)} is not supported: give the user a token or a"
                             " certificate, and the cluster an address that can be reached")
    try:
        url = base_url(cluster.get("server"))
    except ValueError as expected:
        raise ValueError(f"its cluster has no server, expected {expected}") from None
    ca, own = "certificate-authority", "client-certificate"
    return Cluster(
        url, string_at(user, "token"), string_at(user, "tokenFile"), pem_at(cluster, f"{ca}-data"),
        string_at(cluster, ca), pem_at(user, f"{own}-data"), string_at(user, own),
        pem_at(user, "client-key-data"), string_at(user, "client-key"),
        cluster.get("insecure-skip-tls-verify") is not True)


def kubeconfig_entry(document: Any, kind: str, name: str) -> dict[str, Any]:
    """What stands under a name in one of the lists of a kubeconfig.  Raises ValueError."""
    for one in objects_at(document, f"{kind}s"):
        if one.get("name") == name and isinstance(one.get(kind), dict):
            found: dict[str, Any] = one[kind]
            return found
    raise ValueError(f"has no {kind} " + (shown(name) if name else "in its current-context"))


def pem_at(document: Any, key: str) -> str:
    """Raises ValueError."""
    try:
        return base64.b64decode(string_at(document, key), validate=True).decode("ascii")
    except ValueError:
        raise ValueError(f"{key} is no text in base64") from None


# ============================================================================================
#  70  cluster
# ============================================================================================
#
# The Kubernetes API as it is reached: where, with which token and certificates, all of it read anew
# before each question, because tokens and authorities are renewed in place.

ACCOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
LIST_TIMEOUT_S = 30.0
PAGE_LIMIT_BYTES = 64 * 1024 * 1024
SILENCE_S = 30  # after the time at which the API should have ended a watch
LOOK_S = 1.0  # between two looks at credentials, while there is trouble
BRIEF_S = 1.0  # a watch that ends sooner, and has said nothing, is not begun anew at once


def cluster_of(
    table: KubernetesSettings, environ: Mapping[str, str], account: str = ACCOUNT_PATH
) -> Cluster:
    """How a table's API server is reached now.  Raises SettingsError."""
    if table.kubeconfig:
        try:
            text = read_regular_file(table.kubeconfig).decode("utf-8", "replace")
            cluster = parse_kubeconfig(text)
        except ValueError as error:
            raise SettingsError([Complaint(table.kubeconfig, 0, "", str(error))]) from None
        home = os.path.dirname(table.kubeconfig)
        files = {key: os.path.join(home, getattr(cluster, key)) for key in Cluster._fields
                 if key.endswith("_file") and getattr(cluster, key)}
        return with_files(Cluster(**{**cluster._asdict(), **files}))
    if table.api_server:
        return with_files(Cluster(
            table.api_server, token_file=table.token_file, ca_file=table.ca_file))
    host = environ.get("KUBERNETES_SERVICE_HOST", "")
    port = environ.get("KUBERNETES_SERVICE_PORT_HTTPS") or environ.get("KUBERNETES_SERVICE_PORT")
    if not host:
        text = "this is no pod (no KUBERNETES_SERVICE_HOST): name a kubeconfig or an api_server"
        raise SettingsError([Complaint("[[kubernetes]]", 0, "", text)])
    return with_files(Cluster(
        f"https://{f'[{host}]' if ':' in host else host}:{port or 443}",
        token_file=f"{account}/token", ca_file=f"{account}/ca.crt"))


def with_files(cluster: Cluster) -> Cluster:
    """The cluster with what its files hold.  Raises SettingsError."""
    held = {name.removesuffix("_file"): read_regular_file(path).decode("latin-1").strip()
            for name, path in cluster._asdict().items() if name.endswith("_file") and path}
    if (token := held.get("token", cluster.token)) and not SECRET.fullmatch(token):
        text = "holds no token"
        raise SettingsError([Complaint(cluster.token_file or "kubeconfig", 0, "", text)])
    return Cluster(**{**cluster._asdict(), **held})


def cluster_context(cluster: Cluster) -> ssl.SSLContext:
    """Raises SettingsError."""
    try:
        context = ssl.create_default_context(cadata=cluster.ca or None)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the authorities of many clusters are old
        if not cluster.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if cluster.certificate:
            with tempfile.NamedTemporaryFile("w", prefix="mvllm_lite-") as file:  # mode 0600
                file.write(f"{cluster.certificate}\n{cluster.key}\n")
                file.flush()
                context.load_cert_chain(file.name, password=NO_PASSWORD)
        return context
    except OSError as error:
        text = f"no usable certificate or key: {error_text(error).removeprefix('TLS: ')}"
        raise SettingsError([Complaint(cluster.url, 0, "", text)]) from None


class ApiServer(HttpClient):
    """Asks an API server.  Its answers may be long, and those to a watch last for minutes."""

    def __init__(self, cluster: Cluster, begun: Callable[[], object]) -> None:
        super().__init__(ServerSettings(cluster.url))
        self.cluster, self._begun = cluster, begun  # a good answer
        self.head: ResponseHead | None = None  # of the last answer
        self._context = cluster_context(cluster) if self.is_tls else None
        self.key_line = f"User-Agent: mvllm_lite/{__version__}\r\n"
        if cluster.token:
            self.key_line += f"Authorization: Bearer {cluster.token}\r\n"

    async def _exchange(
        self, stream: Stream, message: bytes, take: Callable[[bytes], object]
    ) -> int:
        keep_alive(stream[1].get_extra_info("socket"))  # nothing may be said on it for minutes
        return await super()._exchange(stream, message, take)

    def begins(self, head: ResponseHead) -> None:
        self.head = head
        if head.status == 200:
            self._begun()


class Watch:
    """One watch as it runs.  After whatever it hears that changes its servers, `changed` is called
    with warnings that are new; `pools` are those of the settings."""

    def __init__(
        self, what: Watched, pools: Collection[str], changed: Callable[[list[str]], object],
        environ: Mapping[str, str] = os.environ, before: Watch | None = None,
    ) -> None:
        self.listing: Listing = before.listing if before else Listing(what)
        self.standing: Standing = before.standing if before else Standing()
        self._pools, self._changed, self._environ = pools, changed, environ
        self.offers = offers_of(self.listing.pods(), what, pools, {})
        self._draw = random.Random()
        self._api: ApiServer | None = None

    async def follow(self) -> None:
        """List and watch, and rest after what went wrong; for ever."""
        try:
            while True:
                verb = self.listing.verb
                if (failure := await self.step()) is not None:
                    await self.rest(verb, failure)
        finally:
            self.close()

    async def step(self) -> ApiFailure | None:
        """Ask for a page of the list, or watch for some minutes.  Why that failed is returned."""
        timeout_s, watch_s = LIST_TIMEOUT_S, self._draw.randint(*WATCH_S)
        try:
            api, path = self._reached(), self.listing.path(watch_s)
            if self.listing.complete:
                timeout_s = watch_s + SILENCE_S
                return await self._watch(api, path, timeout_s)
            api.limit_bytes = PAGE_LIMIT_BYTES
            status, content = await api.fetch(path, timeout_s)
            failure = self._failure_of(api, content) or self.listing.take_page(parsed(content))
            if failure is None:
                self._note("list")
            return failure
        except SettingsError as error:
            return ApiFailure(0, str(error))
        except TimeoutError:
            return ApiFailure(0, f"the API has said nothing for {timeout_s:g} s")
        except (PeerGone, BadMessage) as error:
            return ApiFailure(0, f"the API: {error}")

    def _reached(self) -> ApiServer:
        """The API server, with the credentials of now.  Raises SettingsError."""
        cluster = cluster_of(self.listing.what.table, self._environ)
        if self._api is None or self._api.cluster != cluster:
            self.close()
            self._api = ApiServer(cluster, self._answered)
        return self._api

    def _answered(self) -> None:
        """A good answer begins: to a watch nothing more may come for long."""
        standing, was = self.standing, self.standing.trouble
        standing.answered(self.listing.verb, asyncio.get_running_loop().time(), proven=False)
        if was and not standing.trouble:
            log.info("kubernetes: %s: the API answers again", self.listing.what.name)

    def _failure_of(self, api: ApiServer, content: bytes) -> ApiFailure | None:
        head, listing = api.head, self.listing
        if head is None or head.status == 200:
            return None
        return api_failure(listing.what, listing.verb, head.status, parsed(content),
                          head.fields.get("retry-after"))

    async def _watch(self, api: ApiServer, path: str, timeout_s: float) -> ApiFailure | None:
        """Hear of changes until the stream ends, which is no failure.  Raises what `ask` raises
        before that."""
        listing, lines, content, failures = self.listing, Lines(), bytearray(), list[ApiFailure]()
        loop, version = asyncio.get_running_loop(), listing.version
        begun, api.head, api.limit_bytes = loop.time(), None, INFINITY

        def take(piece: bytes) -> None:
            if api.head is not None and api.head.status != 200:
                content.extend(piece)
                return
            said = [listing.take_event(parsed(line)) for line in lines.feed(piece)]
            failures.extend(filter(None, said))
            self._note("watch", proven=not failures and bool(said))
            if failures:  # whatever follows is of no use
                raise BadMessage(failures[0].text, Fault.BAD_ANSWER)

        try:
            await api.ask(path, timeout_s, None, take)
        except (PeerGone, BadMessage):
            if not failures and (api.head is None or api.head.status != 200):
                raise
        if failures or (failure := self._failure_of(api, bytes(content))) is not None:
            return failures[0] if failures else failure
        if loop.time() - begun < BRIEF_S and listing.version == version:
            return ApiFailure(0, "the API ends each watch at once")
        self._note("watch")
        return None

    def _note(self, verb: str, proven: bool = True) -> None:
        """Something good has come."""
        what, listing = self.listing.what, self.listing
        self.standing.answered(verb, asyncio.get_running_loop().time(), proven)
        if not listing.lists:  # what is not whole does not say what is gone
            return
        known = self.offers
        self.offers = offers_of(listing.pods(), what, self._pools, known)
        if self.offers != known or listing.lists == 1:
            said = {warning for offer in known.values() for warning in offer.warnings}
            now = [warning for offer in self.offers.values() for warning in offer.warnings]
            self._changed([warning for warning in now if warning not in said])

    async def rest(self, verb: str, failure: ApiFailure) -> None:
        """Wait, after something went wrong, until it is worth while to ask again: for a pause, or
        until there are other credentials."""
        standing, loop = self.standing, asyncio.get_running_loop()
        was, used = standing.trouble, self._api and self._api.cluster
        deadline = loop.time() + standing.failed(verb, failure, self._draw)
        self.listing.refused(failure, standing.failures)
        if standing.trouble not in ("", was):
            log.warning("kubernetes: %s: %s; its servers stay as they are",
                        self.listing.what.name, failure.text)
        while (left_s := deadline - loop.time()) > 0:
            await asyncio.sleep(min(left_s, LOOK_S))
            with contextlib.suppress(SettingsError):
                if cluster_of(self.listing.what.table, self._environ) != used:
                    return

    def close(self) -> None:
        if self._api is not None:
            self._api.close()


def parsed(content: bytes) -> Any:
    """A JSON document; None for what is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(content)
    return None


class Watches:
    """All that the settings have watched, and the servers that are found together.  What was
    watched `before` and is to be still goes on from where it was."""

    def __init__(
        self, core: Core, wanted: ClustersWanted, before: Watches | None = None
    ) -> None:
        self._core = core
        known = {one.listing.what: one for one in before.all} if before else {}
        self.all: list[Watch] = [
            Watch(what, wanted.pools, self._changed, before=known.get(what))
            for table in wanted.tables for what in watches_of(table)]

    def __str__(self) -> str:
        """How it goes, for people."""
        servers = sum(len(offer.servers) for one in self.all for offer in one.offers.values())
        troubles = [f"{one.listing.what.name}: {one.standing.trouble}" for one in self.all
                    if one.standing.trouble]
        return "; ".join([f"kubernetes: {servers} servers", *troubles])

    async def follow(self) -> None:
        """Name what is known already, and hear of changes; for ever."""
        self.define()
        async with asyncio.TaskGroup() as group:
            for one in self.all:
                group.create_task(guarded(self._core, one.listing.what.name, one.follow))

    def _changed(self, warnings: list[str]) -> None:
        for warning in warnings:
            log.warning("kubernetes: %s", warning)
        self.define()

    def define(self) -> None:
        """Name what was found.  What a table has named stays until it was listed again."""
        unheard = {one.listing.what.table.server.id for one in self.all if not one.listing.lists}
        before = self._core.roster.named_by(Source.KUBERNETES)
        found = {id: server for id, server in before.items() if server.like in unheard}
        found |= servers_of(one.offers for one in self.all)
        if found != before:
            self._core.roster.define(Source.KUBERNETES, found)

    def report(self, now: float) -> list[dict[str, Any]]:
        """For /status.json: each watch."""
        return [watch_report(one.listing, one.standing, one.offers, now) for one in self.all]

    def families(self, now: float) -> list[Family]:
        """For /metrics."""
        return watch_families(self.all, now)


def watch_families(watches: Iterable[Watch], now: float) -> list[Family]:
    """What is counted and measured of these."""
    errors = Counter("mvllm_kubernetes_errors_total",
                     "Requests that the Kubernetes API did not do, by its status.",
                     "watch", "status")
    lists = Counter("mvllm_kubernetes_lists_total", "Lists from the start.", "watch")
    contact = Gauge("mvllm_kubernetes_last_contact_seconds",
                    "Time since the Kubernetes API said anything good.", "watch")
    for one in watches:
        name, standing = one.listing.what.name, one.standing
        lists.add(name, amount=one.listing.lists)
        errors.add(name, str(GONE), amount=0)
        for status, count in standing.errors.items():
            errors.add(name, status, amount=count)
        if standing.contact_at > -INFINITY:
            contact.set(now - standing.contact_at, name)
    return [errors, lists, contact]


async def preview_pods(wanted: ClustersWanted) -> tuple[list[ServerSettings], list[str]]:
    """List once what is to be watched; which pods would be used, and why others not."""
    watches = [Watch(what, wanted.pools, lambda warnings: None)
               for table in wanted.tables for what in watches_of(table)]
    lines = itertools.chain.from_iterable(await asyncio.gather(*map(previewed, watches)))
    return list(servers_of(one.offers for one in watches).values()), list(lines)


async def previewed(watch: Watch) -> list[str]:
    failure = None
    while failure is None and not watch.listing.complete:
        failure = await watch.step()
    watch.close()
    offers, name = watch.offers.items(), watch.listing.what.name
    if failure is not None:
        return [f"{name}  NOT USABLE: {failure.text}"]
    used = sum(bool(offer.servers) for _, offer in offers)
    lines = [f"{name}  the API answers, {len(offers)} match, {used} are used"]
    for pod, offer in offers:
        lines += [f"  ! {pod.name} is not used: {offer.why_not}"] * bool(offer.why_not)
        lines += [f"  ! {warning}" for warning in offer.warnings]
    return lines


@service("kubernetes", operator.attrgetter("clusters"), Source.KUBERNETES, preview_pods)
async def follow_pods(core: Core, wanted: ClustersWanted) -> None:
    watches = core.services["kubernetes"] = Watches(core, wanted, core.services.get("kubernetes"))
    try:
        await watches.follow()
    finally:
        if core.settings.clusters is None:
            del core.services["kubernetes"]


# ============================================================================================
#  71  zmtp
# ============================================================================================
#
# ZMTP 3, the protocol of ZeroMQ (specifications 23 and 37 of rfc.zeromq.org), as far as a ROUTER
# needs it to which DEALER, REQ and ROUTER sockets connect, with the mechanism NULL; and msgpack, in
# which vLLM's connectors write.  Anybody may be at the other end: lengths are judged before
# anything is kept, and what breaks a rule raises BadMessage, which ends that connection alone.

ZMTP_MORE, ZMTP_LONG, ZMTP_COMMAND = 1, 2, 4  # flags of a frame; the others are 0
ZMTP_PEERS = (b"DEALER", b"REQ", b"ROUTER")  # sockets that a ROUTER talks with
ZMTP_MESSAGE_BYTES = 4096  # of all frames of a message; a registration has 150
ZMTP_FRAMES = 8  # of a message, where two are usual
# Signature, version 3.1, mechanism, no server; what a peer has in bytes 1 to 8 may be anything.
ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
ZMTP_READY = b"\x04)\x05READY\x0bSocket-Type\0\0\0\x06ROUTER\x08Identity\0\0\0\0"


def split_prefixed(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """What stands behind its length, which has `width` bytes, and where it ends.  Raises
    BadMessage."""
    start = at + width
    end = start + int.from_bytes(data[at:start], "big")
    if start > len(data) or end > len(data):
        raise BadMessage(f"a length at byte {at} reaches beyond the {len(data)} bytes that came")
    return data[start:end], end


def zmtp_properties(data: bytes) -> dict[bytes, bytes]:
    """By name in lower case.  Raises BadMessage."""
    found, at = dict[bytes, bytes](), 0
    while at < len(data):
        name, at = split_prefixed(data, at, 1)
        value, at = split_prefixed(data, at, 4)
        found[name.lower()] = value
    return found


class ZmtpPeer:
    """One connection, as a ROUTER hears it: bytes in, messages out, and `answer` what to send
    back.  Raises BadMessage where the peer breaks the protocol, or is of another kind."""

    def __init__(self) -> None:
        self.buffer = bytearray()  # of a frame that is not whole yet
        self.answer = bytearray(ZMTP_GREETING)  # to be sent, and emptied by who sends it
        self.identity: bytes | None = None  # None before the handshake has ended
        self._greeted = False
        self._frames: list[bytes] = []  # of a message that is not whole yet

    def feed(self, data: bytes) -> Iterator[list[bytes]]:
        """The messages that are whole now, without the empty frame that a REQ begins with."""
        self.buffer += data
        if not (self._greeted or self._greets()):
            return
        while (frame := self._take_frame()) is not None:
            flags, body = frame
            if flags & ZMTP_COMMAND:
                self._obey(*split_prefixed(body, 0, 1), body)
                continue
            self._frames.append(body)
            size = sum(map(len, self._frames))
            if self.identity is None:
                raise BadMessage("a message came before READY")
            if size > ZMTP_MESSAGE_BYTES or len(self._frames) > ZMTP_FRAMES:
                text = f"a message of {len(self._frames)} frames and {size} bytes"
                raise BadMessage(f"{text}, at most {ZMTP_FRAMES} and {ZMTP_MESSAGE_BYTES} are read")
            if not flags & ZMTP_MORE:
                message, self._frames = self._frames, []
                yield message[1:] if message[0] == b"" else message

    def _greets(self) -> bool:
        """Whether the peer's greeting is whole, which it is taken for as early as it is wrong."""
        said, size = self.buffer, len(ZMTP_GREETING)
        mechanism = bytes(said[12:32])
        if said[:1] not in (b"", b"\xff") or said[9:10] not in (b"", b"\x7f"):
            raise BadMessage("what came first is no greeting of ZMTP")
        if said[10:11] and said[10] < 3:
            raise BadMessage(f"its ZMTP has version {said[10]}, expected 3")
        if not b"NULL".ljust(20, b"\0").startswith(mechanism):
            name = shown(mechanism.rstrip(b"\0").decode("latin-1"))
            raise BadMessage(f"its mechanism is {name}, expected NULL")
        if len(said) < size:
            return False
        del said[:size]
        self._greeted = True
        self.answer += ZMTP_READY
        return True

    def _take_frame(self) -> tuple[int, bytes] | None:
        """Flags and body of a whole frame, taken off the buffer."""
        if not (said := self.buffer):
            return None
        flags = said[0]
        if flags > 7 or flags & (ZMTP_COMMAND | ZMTP_MORE) == ZMTP_COMMAND | ZMTP_MORE:
            raise BadMessage(f"a frame has the flags {flags:#04x}")
        start = 9 if flags & ZMTP_LONG else 2
        if len(said) < start:
            return None
        end = start + (size := int.from_bytes(said[1:start], "big"))
        if size > ZMTP_MESSAGE_BYTES:
            raise BadMessage(f"a frame of {size} bytes, at most {ZMTP_MESSAGE_BYTES} are read")
        if len(said) < end:
            return None
        body = bytes(said[start:end])
        del said[:end]
        return flags, body

    def _obey(self, name: bytes, end: int, body: bytes) -> None:
        """A command came.  Those that are unknown mean nothing to a ROUTER."""
        if name == b"ERROR":
            reason, _ = split_prefixed(body, end, 1)
            raise BadMessage(f"it says ERROR: {shown(reason.decode('latin-1'))}")
        if self.identity is not None:
            if name == b"PING":  # behind the time it waits stands what it wants to see again
                context = body[end + 2 : end + 18]
                self.answer += bytes((ZMTP_COMMAND, 5 + len(context))) + b"\x04PONG" + context
            return
        if name != b"READY":
            raise BadMessage(f"{shown(name.decode('latin-1'))} came, expected READY")
        properties = zmtp_properties(body[end:])
        kind = properties.get(b"socket-type", b"")
        if kind not in ZMTP_PEERS:
            expected = b", ".join(ZMTP_PEERS).decode()
            text = f"its socket is a {shown(kind.decode('latin-1'))}, expected one of {expected}"
            raise BadMessage(text)
        self.identity = properties.get(b"identity", b"")


MSGPACK_DEPTH = 8
MSGPACK_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
MSGPACK_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq"))  # struct's letters
MSGPACK_SHORT = {8: "map", 9: "array", 10: "text", 11: "text"}  # by the upper half of a byte
MSGPACK_SIZED = {  # what follows, and in how many bytes its length stands
    0xC4: ("text", 1), 0xC5: ("text", 2), 0xC6: ("text", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2),
    0xC9: ("ext", 4), 0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}


def parse_msgpack(data: bytes) -> Any:
    """The one value in these bytes.  Texts may have been written as binary by old writers: both are
    `str`; of extensions nothing is known, they are None.  Raises BadMessage."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise BadMessage(f"msgpack ends after {len(data)} bytes, in the middle of a value")
        at += size
        return data[at - size : at]

    def value(depth: int) -> Any:
        kind = take(1)[0]
        if kind < 0x80 or kind >= 0xE0:
            return kind - 256 * (kind >= 0xE0)
        if kind in MSGPACK_CONSTANTS:
            return MSGPACK_CONSTANTS[kind]
        if letter := MSGPACK_NUMBERS.get(kind):
            return struct.unpack(f">{letter}", take(struct.calcsize(f">{letter}")))[0]
        if kind < 0xC0:
            what, size = MSGPACK_SHORT[kind >> 4], kind & (0x1F if kind >= 0xA0 else 0x0F)
        elif 0xD4 <= kind <= 0xD8:
            what, size = "ext", 1 << kind - 0xD4
        elif kind in MSGPACK_SIZED:
            what, width = MSGPACK_SIZED[kind]
            size = int.from_bytes(take(width), "big")
        else:
            raise BadMessage(f"msgpack has no value that begins with {kind:#04x}")
        if what == "text":
            return take(size).decode("utf-8", "replace")
        if what == "ext":
            return take(1 + size) and None
        if depth == MSGPACK_DEPTH or size > len(data) - at:  # each has a byte at least
            text = f"{size} members in {len(data) - at} bytes, {depth} deep"
            raise BadMessage(f"msgpack has {text}, at most {MSGPACK_DEPTH} are read")
        if what == "array":
            return [value(depth + 1) for _ in range(size)]
        return {str(value(depth + 1)): value(depth + 1) for _ in range(size)}

    found = value(0)
    if at < len(data):
        raise BadMessage(f"msgpack goes on after its value, at byte {at}")
    return found


# ============================================================================================
#  72  registration
# ============================================================================================
#
# Servers, and agents that run servers, which have said themselves that they are there.  Each leaves
# when it is silent for as long as it said, or says that it goes.  What it says comes from outside:
# it names no file, and no address but where its sender may have requests sent to.

REGISTRATIONS_LIMIT = 1000
INSTANCES_LIMIT = 64  # of an agent
TTL_S = 60.0  # where a registration does not say; serverless_vllm's workers come each 30 s
ZMQ_TTL_S = 5.0  # as vLLM's proxies have it; its connectors speak each 3 s
REGISTRANT = re.compile(r"[A-Za-z0-9][\w.:\[\]-]{0,99}", re.ASCII)
INSTANCE = re.compile(r"[A-Za-z0-9][\w.-]{0,99}(?:/[A-Za-z0-9][\w.-]{0,99})?", re.ASCII)
ZMQ_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}", re.ASCII)
# Keys of `servers` that a registration may have; words of vllm-project/router for some keys.
REGISTERED_KEYS = ("role", "max_concurrent_requests", "data_parallel_size", "bootstrap_port",
                   "zmq_address")
REGISTERED_WORDS = {"model_id": "models", "worker_type": "role",
                    "capacity": "max_concurrent_requests"}
URL_KEYS = ("url", "public_worker_url", "worker_url")
REGISTRATION_KEYS = {*REGISTERED_KEYS, *REGISTERED_WORDS.values(), *URL_KEYS, "worker_id",
                     "gpu_info", "instances", "ttl_s"}


class Registrar(Enum):
    """By what right something was registered: who has the same may change it, and an admin."""

    ZMQ = "zmq"  # none: ZMTP has no keys
    KEY = "key"  # the registration key
    ADMIN = "admin"  # an admin's key; without keys, a peer on this machine

    __hash__ = object.__hash__  # as Fault's


# From a URL's host to the one that is meant, and the address to connect to ('': what that says).
# Raises ValueError with what was expected.
Placing = Callable[[str], tuple[str, str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """What somebody has registered.  Times are monotonic."""

    id: str  # what it calls itself, or its address
    registrar: Registrar
    said: Mapping[str, Any]  # as it came, with our words for its keys
    servers: Mapping[str, ServerSettings]  # that it is, or runs now, by id
    url: str  # where it is, or its servers are
    worker_url: str  # where it is talked to
    placed: Mapping[str, tuple[str, str]]  # what its Placing said of their hosts
    registered_at: float = 0.0
    seen_at: float = 0.0

    @property
    def is_agent(self) -> bool:
        """Whether it is no server, but runs some."""
        return "gpu_info" in self.said or "instances" in self.said

    @property
    def ttl_s(self) -> float:
        return float(self.said.get("ttl_s", TTL_S))

    @property
    def expires_at(self) -> float:
        return self.seen_at + self.ttl_s


class RegistrationBook:
    """Owns the registrations.  After each change all of `on_change` are called; that somebody is
    still there, as before, is none."""

    def __init__(self) -> None:
        self.by_id: dict[str, Registration] = {}
        self.on_change: list[Callable[[], object]] = []

    def servers(self) -> dict[str, ServerSettings]:
        """All that are registered, by id; of two that are the same, the one that came first."""
        found = dict[str, ServerSettings]()
        for one in self.by_id.values():
            found |= {id: server for id, server in one.servers.items() if id not in found}
        return found

    def of_server(self, id: str) -> Registration | None:
        """Whose that server is."""
        return next((one for one in self.by_id.values() if id in one.servers), None)

    def find(self, name: str) -> Registration:
        """By its id, or a URL of it.  Raises LookupError."""
        for one in self.by_id.values():
            if name in (one.id, one.url, one.worker_url, *one.servers):
                return one
        raise LookupError(f"{shown(name)} is not registered here: register it (again).")

    def put(self, new: Registration, now: float) -> bool:
        """Take a registration, which may be there as it was.  Returns whether anything changed.
        Raises BadMessage when there are too many."""
        old = self.by_id.get(new.id)
        if old is None and len(self.by_id) >= REGISTRATIONS_LIMIT:
            text = f"{REGISTRATIONS_LIMIT} are registered, and not more"
            raise BadMessage(text, Fault.NO_RESOURCES)
        began = old.registered_at if old else now
        new = self.by_id[new.id] = dataclasses.replace(new, registered_at=began, seen_at=now)
        changed = old is None or dataclasses.replace(old, seen_at=now) != new
        if changed:
            self._tell()
        return changed

    def heard(self, registrar: Registrar, now: float) -> None:
        """All who are registered so are still there."""
        self.by_id |= {one.id: dataclasses.replace(one, seen_at=now)
                       for one in self.by_id.values() if one.registrar is registrar}

    def remove(self, *gone: str) -> None:
        for id in gone:
            del self.by_id[id]
        if gone:
            self._tell()

    def expire(self, now: float) -> list[Registration]:
        """Those that have been silent for too long, which are gone now."""
        silent = [one for one in self.by_id.values() if one.expires_at <= now]
        self.remove(*(one.id for one in silent))
        return silent

    def next_expiry(self) -> float:
        return min((one.expires_at for one in self.by_id.values()), default=INFINITY)

    def _tell(self) -> None:
        for tell in self.on_change:
            tell()

    def dump(self, now: float) -> list[dict[str, Any]]:
        """For a successor, in JSON's types."""
        return [{"registrar": one.registrar.value, "said": dict(one.said),
                 "placed": dict(one.placed), "age_s": now - one.registered_at,
                 "silent_s": now - one.seen_at} for one in self.by_id.values()]

    def load(self, document: Iterable[Mapping[str, Any]], now: float) -> None:
        """Take what a predecessor has dumped.  Raises SettingsError, or whatever a document causes
        that is none; then nothing is taken."""
        found = dict[str, Registration]()
        for one in document:
            placed = {host: (str(to), str(pin)) for host, (to, pin) in one["placed"].items()}
            new = parse_registration(one["said"], Registrar(one["registrar"]), placed.__getitem__)
            found[new.id] = dataclasses.replace(
                new, registered_at=now - one["age_s"], seen_at=now - one["silent_s"])
        self.by_id |= found
        self._tell()


def parse_registration(
    said: Mapping[str, Any], registrar: Registrar, place: Placing
) -> Registration:
    """What such content registers; what is null or unknown there says nothing.  Raises
    SettingsError."""
    said = {REGISTERED_WORDS.get(key, key): value for key, value in said.items()
            if value is not None}
    placed, urls, key = dict[str, tuple[str, str]](), dict[str, str](), ""
    try:
        for key in said.keys() & {*REGISTRATION_CHECKS, *SERVER_FILES}:
            said[key] = REGISTRATION_CHECKS.get(key, no_file)(said[key])
        for key in said.keys() & set(URL_KEYS):
            urls[key] = placed_url(said[key], place, placed)
        if (key := "zmq_address") in said:
            place(said[key].rpartition(":")[0].strip("[]"))
    except ValueError as expected:
        raise wrong(key, said[key], expected) from None
    is_agent = "gpu_info" in said or "instances" in said
    order = (*URL_KEYS[is_agent:], *URL_KEYS[:is_agent])
    if (url := next((urls[key] for key in order if key in urls), "")) == "":
        raise wrong("url", None, "the URL that it is reached at")
    running = [(f"{url}/proxy/{alias}", one) for alias, one in said.get("instances", {}).items()
               if str(one.get("status")).lower() == "running"] if is_agent else [(url, said)]
    servers = {id: registered_server(id, one, placed) for id, one in running}
    id = said.get("worker_id") or url.partition("://")[2]
    return Registration(
        id, registrar, said, servers, url, urls.get("worker_url", url), placed)


def wrong(key: str, found: Any, expected: object) -> SettingsError:
    what = "nothing" if found is None else shown(str(found))
    return SettingsError([Complaint("registration", 0, key, f"found {what}, expected {expected}")])


def placed_url(said: Any, place: Placing, placed: dict[str, tuple[str, str]]) -> str:
    """The URL that is meant; `placed` is told of its host.  Raises ValueError."""
    parts = urllib.parse.urlsplit(base_url(said))
    host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
    to, _ = placed[host] = place(host)
    placed[to] = placed[host]
    return parts._replace(netloc=(f"[{to}]" if ":" in to else to) + port).geturl()


def registered_server(
    url: str, said: Mapping[str, Any], placed: Mapping[str, tuple[str, str]]
) -> ServerSettings:
    """Raises SettingsError."""
    _, address = placed[urllib.parse.urlsplit(url).hostname or ""]
    known = {key: said[key] for key in REGISTERED_KEYS if said.get(key) is not None}
    return dataclasses.replace(server_by_hand({"url": url, **known}), address=address)


def no_file(value: Any) -> Any:
    raise ValueError("none: what comes over a network names no file")


def registered_models(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("the name of a model, or a list of names")
    return found


def matching(pattern: re.Pattern[str], expected: str) -> Clean:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(expected)
        return value

    return check


def instances_of(said: Any) -> dict[str, dict[str, Any]]:
    """What an agent runs, by alias.  Raises ValueError."""
    if isinstance(said, list) and all(isinstance(one, dict) for one in said):
        said = {str(one.get("alias", one.get("instance_alias", ""))): one for one in said}
    if not isinstance(said, dict) or len(said) > INSTANCES_LIMIT or not all(
        isinstance(one, dict) and INSTANCE.fullmatch(alias) for alias, one in said.items()
    ):
        raise ValueError(f"{INSTANCES_LIMIT} instances at most, as objects by their aliases")
    return said


REGISTRATION_CHECKS: dict[str, Clean] = {
    "worker_id": matching(REGISTRANT, "a name of letters, digits and . _ : -"),
    "zmq_address": matching(ZMQ_ADDRESS, "an address and a port, like 10.0.0.1:21001"),
    "role": lambda value: "both" if value == "regular" else value,
    "ttl_s": number(0.1, 86400), "models": registered_models, "instances": instances_of,
}


class Peer(NamedTuple):
    """Who registers, as far as it decides which addresses it may name."""

    host: str  # its address
    any_address: bool = False  # settings let it name those of others,
    resolved: Mapping[str, Sequence[str]] = {}  # also by names, which stand for these

    def place(self, host: str) -> tuple[str, str]:
        """A Placing.  A name is pinned to an address that was judged, so that it cannot mean
        another one later; 0.0.0.0, where many programs listen, is taken for the peer's."""
        literal, peer = ip_address_or_none(host), ip_address_or_none(self.host)
        if literal is not None and literal.is_unspecified:
            host, literal = self.host, peer
        local = is_local_name(f"[{host}]" if ":" in host else host)
        found: Iterable[Any] = [literal or peer]
        if literal is None and self.any_address and not local:
            found = map(ip_address_or_none, self.resolved.get(host, ()))
        for address in found:
            if address is not None and self.may_name(address, peer, local):
                return host, "" if literal or local else str(address)
        raise ValueError(
            "an address that is neither link-local nor multicast, nor local" if self.any_address
            else f"{self.host}, where it comes from (or registration_any_address = true)")

    def may_name(self, address: Any, peer: Any, local: bool) -> bool:
        if address.is_link_local or address.is_multicast or address.is_unspecified:
            return False
        if local or address.is_loopback:  # which is this machine's
            return peer is not None and peer.is_loopback
        return self.any_address or address == peer


def ip_address_or_none(text: str) -> Any:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    return None


def zmq_registration(said: Any, place: Placing) -> Registration | str:
    """What a message of vLLM's connectors registers: P2pNccl's map; or why it registers nothing, ''
    where that is no news.  Raises SettingsError, BadMessage."""
    if not isinstance(said, dict):
        raise BadMessage(f"a message is {shown(str(said))}, expected a map in msgpack")
    kind, address, http = map(said.get, ("type", "zmq_address", "http_address"))
    if kind not in ("P", "D"):
        return ""
    if "transfer_mode" in said or "handshake:" in str(address):
        return "it is of MoRI-IO's connector, which is not supported yet"
    role = "prefill" if kind == "P" else "decode"
    said = {"worker_id": f"zmq:{http}", "url": f"http://{http or ''}", "role": role,
            "zmq_address": address or "", "ttl_s": ZMQ_TTL_S}
    return parse_registration(said, Registrar.ZMQ, place)


# ============================================================================================
#  73  registering
# ============================================================================================
#
# The paths at which servers and agents register.  The roster is kept true to the book of
# registrations.

RESOLVE_S = 5.0  # for a name in a registration


class Registrations:
    """The registrations of a running balancer."""

    def __init__(self, core: Core) -> None:
        self.core, self.book = core, RegistrationBook()
        self.loop = asyncio.get_running_loop()
        self.holds_zmq = False  # those who register over ZMQ cannot, so far
        self._timer: asyncio.TimerHandle | None = None
        self.book.on_change.append(self.define)
        core.roster.keepers[Source.REGISTERED] = self
        try:
            self.book.load(core.roster.kept.pop(Source.REGISTERED.value, ()), self.loop.time())
        except (ValueError, TypeError, KeyError, AttributeError, SettingsError) as error:
            log.warning("what was registered has to register again: %s", error)

    @staticmethod
    def of(core: Core) -> Registrations:
        found = core.roster.keepers.get(Source.REGISTERED) or Registrations(core)
        assert isinstance(found, Registrations)
        return found

    def dump(self) -> list[dict[str, Any]]:
        return self.book.dump(self.loop.time())

    def define(self) -> None:
        self.core.roster.define(Source.REGISTERED, self.book.servers())
        if self.book.by_id:
            self.expire_by(self.book.next_expiry())

    def take(self, new: Registration) -> None:
        """Somebody has registered, or is still there.  Raises BadMessage."""
        core, known = self.core, self.book.by_id.get(new.id)
        if self.book.put(new, self.loop.time()) and (known is None or known.url != new.url):
            what = "agent" if new.is_agent else "server"
            log.info("%s registered: %s %s (%s)%s", new.id, what, new.url, new.registrar.value,
                     f" in place of {known.url}" if known else "")
        for id in new.servers:
            for view in core.fleet.engines(id)[:1]:
                if view.models is None and (names := new.said.get("models")):
                    models = {name: {"id": name, "object": "model"} for name in names}
                    core.fleet.models_listed(id, models, -INFINITY)
                if not view.healthy:  # it is there: the next check need not wait
                    core.looks.want(id)

    def expire_by(self, due: float) -> None:
        if self._timer is None or self._timer.when() > due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(due, self.expire, due)

    def expire(self, due: float) -> None:
        """Who is silent leaves; but where this process is late, nobody was heard, so far."""
        self._timer, now = None, self.loop.time()
        if now > due + STALL_S:
            self.expire_by(now + 1.0)
            return
        if self.holds_zmq:
            self.book.heard(Registrar.ZMQ, now)
        for one in self.book.expire(now):
            log.warning("%s is gone: it was silent for %g s", one.id, one.ttl_s)
        if self.book.by_id:
            self.expire_by(self.book.next_expiry())


async def peer_of(asked: Asked, said: Mapping[str, Any]) -> Peer:
    """Who registers that, with what the names in it stand for, if that matters."""
    assert asked.visit is not None
    resolved, s = dict[str, list[str]](), asked.visit.settings
    for key in URL_KEYS if s.registration_any_address else ():
        with contextlib.suppress(ValueError):
            if host := urllib.parse.urlsplit(str(said.get(key, ""))).hostname:
                resolved[host] = await addresses_of(host)
    return Peer(registrant_of(asked.visit), s.registration_any_address, resolved)


async def addresses_of(host: str) -> list[str]:
    with contextlib.suppress(OSError, UnicodeError):
        async with within(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in found]
    return []


def registrar_of(asked: Asked, one: Registration | None = None) -> Registrar:
    """By what right somebody asks, for what may be registered already.  Raises BadMessage where
    that is another's."""
    assert asked.visit is not None
    if may_not_change(asked.visit) is None:
        return Registrar.ADMIN
    if one is not None and one.registrar is not Registrar.KEY:
        text = f"{one.id} was not registered with the registration key"
        raise BadMessage(text, Fault.FORBIDDEN)
    return Registrar.KEY


async def register(core: Core, asked: Asked) -> dict[str, Any]:
    """a server or an agent says that it is there, for the first time or again"""
    if not (said := read_members(asked.content, None)):
        raise wrong("", None, 'JSON like {"url": "http://10.0.0.1:8000"}')
    place, registrations = (await peer_of(asked, said)).place, Registrations.of(core)
    new = parse_registration(said, registrar_of(asked), place)
    registrar_of(asked, registrations.book.by_id.get(new.id))
    registrations.take(new)
    ignored = sorted(new.said.keys() - REGISTRATION_KEYS)
    return {"status": "success", "message": f"{new.id} is registered", "worker_id": new.id,
            "ttl_s": new.ttl_s, "ignored": ignored}


def name_in(asked: Asked, suffix: str = "") -> str:
    """Which worker a path names: by its id, or its URL, which may be escaped."""
    path = asked.head.path.rstrip("/").removesuffix(suffix)
    return urllib.parse.unquote(path.removeprefix("/workers/"))


async def heartbeat(core: Core, asked: Asked) -> dict[str, Any]:
    """with /heartbeat: it is still there; what it says takes the place of what it said before"""
    if asked.head.path.rstrip("/").endswith("/unregister"):
        return await unregister(core, asked)
    if not asked.head.path.rstrip("/").endswith("/heartbeat"):
        raise LookupError("POST is for /workers/register, and /heartbeat below a worker.")
    registrations = Registrations.of(core)
    one = registrations.book.find(name_in(asked, "/heartbeat"))
    registrar_of(asked, one)
    if more := read_members(asked.content, None):
        said = {**one.said, **more, "worker_id": one.id}
        one = parse_registration(said, one.registrar, (await peer_of(asked, said)).place)
    registrations.take(one)
    return {"status": "success", "message": f"{one.id} is there", "ttl_s": one.ttl_s}


async def unregister(core: Core, asked: Asked) -> dict[str, Any]:
    """it leaves; for an admin any server does, by hand"""
    name, book = name_in(asked, "/unregister"), Registrations.of(core).book
    try:
        one = book.find(name)
    except LookupError:
        if registrar_of(asked) is not Registrar.ADMIN:
            raise
        return {"status": "success", **await remove_server(core, server_named(core, name))}
    registrar_of(asked, one)
    book.remove(one.id)
    log.info("%s has left: it says so", one.id)
    return {"status": "success", "message": f"{one.id} is no longer registered"}


def worker_rows(core: Core) -> list[dict[str, Any]]:
    """Servers and agents, as vllm-project/router and serverless_vllm list them."""
    now, book = clock_now(), Registrations.of(core).book
    rows = list[dict[str, Any]]()
    for id, entry in core.roster.entries.items():
        views, url, role = core.fleet.engines(id), entry.settings.url, entry.settings.role
        models = [name for view in views[:1] for name in view.models or ()]
        loads = (view.counts.in_flight + round(
            view.foreign(now.monotonic, core.settings.metrics_interval)) for view in views)
        rows.append({
            "worker_id": url.partition("://")[2], "url": url, "worker_url": url,
            "worker_type": "regular" if role == "both" else role,
            "model_id": models[0] if models else "unknown", "models": models,
            "is_healthy": any(view.healthy for view in views), "load": sum(loads),
            "connection_mode": "http", "priority": 50, "cost": 1.0, "source": entry.source.value,
            **registration_row(book.of_server(id), now)})
    return rows + [{"url": one.url, "worker_type": "agent", "source": Source.REGISTERED.value,
                    "instances": one.said.get("instances", {}), **registration_row(one, now)}
                   for one in book.by_id.values() if one.is_agent]


def registration_row(one: Registration | None, now: Clock) -> dict[str, Any]:
    if one is None:
        return {}
    return {"worker_id": one.id, "worker_url": one.worker_url,
            "public_worker_url": one.said.get("public_worker_url"),
            "gpu_info": one.said.get("gpu_info"), "registered_by": one.registrar.value,
            "registered_at": now.iso(one.registered_at), "ttl_s": one.ttl_s}


async def list_workers(core: Core, asked: Asked) -> dict[str, Any]:
    """servers and agents, as vllm-project/router and serverless_vllm list them"""
    rows = worker_rows(core)
    kinds = [row["worker_type"] for row in rows]
    stats = {f"{kind}_count": kinds.count(kind) for kind in ("prefill", "decode", "regular")}
    return {"workers": rows, "total": len(rows), "stats": stats}


async def show_worker(core: Core, asked: Asked) -> dict[str, Any]:
    """one of them, by its id or its URL"""
    if registrar_of(asked) is not Registrar.ADMIN:
        raise BadMessage("who is registered is shown to admins", Fault.FORBIDDEN)
    name = name_in(asked)
    for row in worker_rows(core):
        if name in (row["worker_id"], row["url"], row["worker_url"]):
            return row
    raise LookupError(f"No worker {shown(name)} here.")


async def add_worker(core: Core, asked: Asked) -> dict[str, Any]:
    """add a server by hand, in the words of vllm-project/router"""
    said = read_members(asked.content, None) | asked.query
    given = {REGISTERED_WORDS.get(key, key): value for key, value in said.items()}
    if given.get("role") == "regular":
        del given["role"]
    known = set(core.roster.entries)
    done = await add_server(core, {key: given[key] for key in ("url", *REGISTERED_KEYS)
                                   if key in given})
    (added,) = core.roster.entries.keys() - known
    url = core.roster.entries[added].settings.url
    row = next(row for row in worker_rows(core) if row["url"] == url)
    return {"success": True, "message": done["done"], "worker": row}


async def list_urls(core: Core, asked: Asked) -> dict[str, Any]:
    """the servers' URLs"""
    return {"urls": [row["url"] for row in worker_rows(core) if "load" in row]}


async def list_loads(core: Core, asked: Asked) -> dict[str, Any]:
    """how many requests each server has"""
    return {"workers": [{"worker": row["url"], "load": row["load"]}
                        for row in worker_rows(core) if "load" in row]}


WORKERS: dict[str, tuple[Kind, dict[str, Operate]]] = {
    "/workers": (Kind.ADMIN, {"GET": list_workers, "POST": add_worker}),
    "/workers/register": (Kind.REGISTRATION, {"POST": register}),
    "/workers/{id}": (Kind.REGISTRATION, {
        "GET": show_worker, "DELETE": unregister, "POST": heartbeat}),
    "/add_worker": (Kind.ADMIN, {"POST": add_worker}),
    "/remove_worker": (Kind.ADMIN, {"POST": on_server(remove_server)}),
    "/list_workers": (Kind.ADMIN, {"GET": list_urls}),
    "/get_loads": (Kind.ADMIN, {"GET": list_loads}),
}
ENDPOINTS |= {
    path: {method: Endpoint(kind, functools.partial(run_operation, operate), True,
                            " ".join((operate.__doc__ or "the same as DELETE").split()))
           for method, operate in rows.items()} for path, (kind, rows) in WORKERS.items()
}


# ============================================================================================
#  74  zmq listener
# ============================================================================================
#
# Where the connectors of vLLM register over ZMQ.  Nobody has to show anything there, since ZMTP's
# NULL has no keys: registration_networks alone says who may.  So each peer is bounded: what it may
# send, how fast, for how long it may be silent, on how many connections.

ZMQ_HANDSHAKE_S = 5.0
ZMQ_SILENCE_S = 30.0  # of a peer that is heard; connectors speak each 3 s
ZMQ_PEERS, ZMQ_PEERS_EACH = 256, 16  # connections: of all, of one address
ZMQ_SERVERS_EACH = 64  # of one host
ZMQ_PIECE_BYTES, ZMQ_PAUSE_S = 8192, 0.2  # read at once, and between two reads: 40 kB/s of a peer
ZMQ_RETRY_S = 0.5  # between two tries to listen, where a predecessor still does
ZMQ_TOLD, ZMQ_TOLD_S = 256, 60.0  # warnings, of which each is given once; and for how long


class ZmqListener:
    """Hears vLLM's connectors register, each on a connection of its own."""

    def __init__(self, core: Core) -> None:
        self.core, self.registrations = core, Registrations.of(core)
        self.peers = dict[asyncio.Task[None], str]()  # by connection
        self.listeners = list[Listener]()
        self._told: dict[tuple[str, str], float] = {}  # warnings that were given, and when

    def tell(self, host: str, text: str) -> None:
        """Warn of something, once, and of ZMQ_TOLD things in ZMQ_TOLD_S: garbage fills no disk."""
        now, told = asyncio.get_running_loop().time(), self._told
        if len(told) >= ZMQ_TOLD and now > told[oldest := next(iter(told))] + ZMQ_TOLD_S:
            del told[oldest]
        if (host, text) not in told and len(told) < ZMQ_TOLD:
            told[host, text] = now
            log.warning("registration over ZMQ: %s: %s", host, text)

    async def run(self, address: str) -> None:
        """Listen for ever; as long as it cannot, whoever had registered before stays."""
        self.registrations.holds_zmq = True
        try:
            sockets = await self.sockets_at(address)
            self.registrations.holds_zmq = False
            log.warning("%s", zmq_open_line(self.core.settings))
            self.listeners += [
                Listener(sock, self.has_room, lambda: None, self.accept, self.cannot_accept)
                for sock in sockets]
            while not self.core.process.stopping:  # then a successor may listen
                await asyncio.sleep(ZMQ_RETRY_S)
        finally:
            self.registrations.holds_zmq = False
            for listener in self.listeners:
                listener.close()
            self.listeners.clear()
            for task in self.peers:
                task.cancel()

    async def sockets_at(self, address: str) -> list[socket.socket]:
        host, _, port = address.rpartition(":")
        while True:
            try:
                return listening_sockets(host.strip("[]*"), int(port))
            except OSError as error:
                self.tell(address, f"{error_text(error)}; trying again")
                await asyncio.sleep(ZMQ_RETRY_S)

    def has_room(self) -> bool:
        return len(self.peers) < ZMQ_PEERS

    def cannot_accept(self, error: OSError) -> None:
        self.tell("accepting", error_text(error))

    def accept(self, sock: socket.socket, address: Any) -> None:
        host = address_of(address)[0]
        if not is_trusted(host, self.core.settings.registration_networks):
            self.tell(host, "it is not in registration_networks")
        elif list(self.peers.values()).count(host) < ZMQ_PEERS_EACH:
            self.peers[task := asyncio.create_task(self.serve(sock, host))] = host
            task.add_done_callback(functools.partial(self.left, sock))
            return
        sock.close()

    def left(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        del self.peers[task]
        sock.close()
        for listener in self.listeners:
            listener.resume()
        if not task.cancelled() and (error := task.exception()) is not None:  # a mistake of ours
            log.error("internal error while hearing a peer of ZeroMQ", exc_info=error)
            self.core.metrics.errors.add()

    async def serve(self, sock: socket.socket, host: str) -> None:
        """One peer, until it leaves, says what cannot be, or nothing for long."""
        try:
            sock.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=sock)
            with contextlib.closing(writer.transport):
                await self.hear(reader, writer, host)
        except (BadMessage, SettingsError) as error:
            self.tell(host, str(error))
        except (OSError, TimeoutError):
            pass

    async def hear(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str
    ) -> None:
        """Raises BadMessage, SettingsError, OSError, TimeoutError."""
        zmtp = ZmtpPeer()
        while True:
            writer.write(bytes(zmtp.answer))
            zmtp.answer.clear()
            async with within(ZMQ_HANDSHAKE_S if zmtp.identity is None else ZMQ_SILENCE_S):
                await writer.drain()
                if not (piece := await reader.read(ZMQ_PIECE_BYTES)):
                    return
            for message in zmtp.feed(piece):
                self.take(b"".join(message[-1:]), host)
            await asyncio.sleep(ZMQ_PAUSE_S)

    def take(self, said: bytes, host: str) -> None:
        """Raises BadMessage, SettingsError."""
        peer = Peer(host, self.core.settings.registration_any_address)
        found = zmq_registration(parse_msgpack(said), peer.place)
        if not isinstance(found, Registration):
            if found:
                self.tell(host, found)
            return
        book, (place, *_) = self.registrations.book.by_id, found.id.rsplit(":", 1)
        if found.id not in book and sum(id.startswith(place) for id in book) >= ZMQ_SERVERS_EACH:
            raise BadMessage(f"{ZMQ_SERVERS_EACH} servers of {place} are registered, and not more")
        self.registrations.take(found)


@service("registration", operator.attrgetter("registration"))
async def take_registrations(core: Core, address: str) -> None:
    Registrations.of(core)  # which has inherited ones expire
    if address:
        await ZmqListener(core).run(address)


def zmq_open_line(s: Settings) -> str:
    """What it means that registration_address is set."""
    return (f"registration_address {s.registration_address} takes servers from whoever reaches it"
            f" from {', '.join(s.registration_networks)}: ZMTP's NULL has no keys")


# ━━━ part XII: seen ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  75  cells
# ============================================================================================
#
# Text in the cells of a terminal: what it means, how wide it is, how it is made to fit.


class Style(Enum):
    """What a piece of text means; how that looks is the terminal's affair."""

    PLAIN = "plain"
    DIM = "dim"
    TITLE = "title"
    HEAD = "head"  # of a column
    SORTED = "sorted"  # head of the column that rows are sorted by
    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    SELECTED = "selected"
    BAR = "bar"
    KEY = "key"
    ASK = "ask"  # a question that waits for its answer


Span = tuple[str, Style]
Line = list[Span]
Document = Mapping[str, Any]


class Size(NamedTuple):
    columns: int
    rows: int


class Look(NamedTuple):
    """What the terminal can show."""

    unicode: bool = True
    colours: bool = True

    @property
    def bar(self) -> tuple[str, str]:
        return ("█", "░") if self.unicode else ("#", ".")

    @property
    def levels(self) -> str:
        return "▁▂▃▄▅▆▇█" if self.unicode else "_.:-=+*#"

    @property
    def dots(self) -> str:
        return "…" if self.unicode else "~"

    @property
    def rule(self) -> str:
        return "─" if self.unicode else "-"


class Mode(Enum):
    LIST = "list"
    VIEW = "view"  # another one than that of servers
    DETAIL = "detail"
    HELP = "help"


class Action(NamedTuple):
    """What a key asks of the balancer."""

    verb: str  # drain, undrain, probe or quit
    url: str = ""  # of the server


class Ui(NamedTuple):
    """What the reader of the screen has chosen.  `settle` makes it fit what there is."""

    mode: Mode = Mode.LIST
    selected: str = ""  # the URL of a server, since rows move when they are sorted
    scroll: int = 0  # rows of the list that are above the screen
    lines_up: int = 0  # the same of the detail, or the help
    page: int = 10  # rows that are seen at once
    sort: str = "trouble"
    view: str = ""  # one of VIEWS, in Mode.VIEW
    filter: str = ""
    typed: str | None = None  # a filter that is being typed
    asked: Action | None = None  # waits for y or n
    question: str = ""
    paused: bool = False
    note: str = ""  # what the last key did, until the next
    remote: bool = False  # the balancer is another process: to quit does not stop it


# Of text.  Terminals count cells: two for wide characters, none for combining ones.

PLAINER = str.maketrans({"×": "x", "–": "-", "—": "-", "…": "~", "·": ".", "’": "'", "≥": ">="})
SELECTORS = re.compile("[\ufe00-\ufe0f\u034f\u115f\u1160\u3164\uffa0]")  # or nothing to be seen


@functools.lru_cache(4096)
def cell(char: str) -> int:
    """How many cells a character takes."""
    if char.isascii():
        return 1
    if unicodedata.category(char) in ("Mn", "Me") or "\u1160" <= char <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cells(text: str) -> int:
    return len(text) if text.isascii() else sum(map(cell, text))


def clean(text: str, look: Look) -> str:
    """Text from anywhere, fit to be shown: no control characters, nothing that changes the
    direction or the width of its neighbours."""
    if text.isascii() and text.isprintable():
        return text
    text = SELECTORS.sub("", unicodedata.normalize("NFC", text.expandtabs(4)))
    if not look.unicode:
        text = unicodedata.normalize("NFKD", text.translate(PLAINER))
        text = "".join(c for c in text if not unicodedata.combining(c))
        text = "".join(c if c.isascii() else "?" * cell(c) for c in text)
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    return f" {text}" if text and not cell(text[0]) else text  # nothing to combine with


# Numbers, what actions are about, and lines.
UNCLEANED = ("history", "url", "settings_error", "fleet", "hint")


def cleaned(value: Any, look: Look) -> Any:
    """A status document whose texts are fit to be shown, in one line each."""
    if isinstance(value, str):
        return clean(value, look)
    if isinstance(value, list):
        return [cleaned(item, look) for item in value]
    if isinstance(value, dict):
        return {key: item if key in UNCLEANED else cleaned(item, look)
                for key, item in value.items()}
    return value


def cut(text: str, width: int) -> str:
    """As much of its start as fits."""
    if cells(text) <= width:
        return text
    taken = 0
    for n, char in enumerate(text):
        taken += cell(char)
        if taken > width:
            return text[:n]
    return text


def fit(text: str, width: int, look: Look) -> str:
    """Cut where it does not fit, and that is shown."""
    if cells(text) <= width:
        return text
    return cut(text, width - 1) + look.dots if width > 1 else cut(text, width)


def fit_name(name: str, width: int, look: Look) -> str:
    """A host:port that is wider than the whole screen loses some of its middle, never its port."""
    if cells(name) <= width:
        return name
    host, colon, port = name.rpartition(":")
    return fit(host, max(0, width - cells(port) - 1), look) + colon + port


def pad(text: str, width: int, right: bool = False) -> str:
    space = " " * (width - cells(text))
    return space + text if right else text + space


def wrapped(text: str, width: int) -> list[str]:
    """Text in lines of that width, broken at spaces if there are any."""
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        before = len(lines)
        while cells(line) > width and line:
            head = cut(line, width) or line[:1]
            at = len(head) if line[len(head) :].startswith(" ") else head.rfind(" ")
            head = head[:at] if at > width // 3 else head
            lines.append(head)
            line = line[len(head) :].lstrip()
        if line or len(lines) == before:
            lines.append(line)
    return lines


def clipped(line: Line, width: int) -> Line:
    """The line as far as it fits; whatever made it, it never wraps."""
    out: Line = []
    for text, style in line:
        text = cut(text, width)
        if text:
            out.append((text, style))
        width -= cells(text)
    return out


# Numbers in few characters.  None is unknown; so is what is no number.


UNITS: tuple[tuple[float, float, str], ...] = (
    (9999.5, 1, ""), (999.5e3, 1e3, "k"), (999.5e6, 1e6, "M"),
)


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def short_number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) < 9.95:
        return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    for limit, scale, letter in UNITS:
        if abs(value) < limit:
            return f"{value / scale:.0f}{letter}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def percent(ratio: float | None) -> str:
    return f"{100 * ratio:.0f}%" if ratio is not None and abs(ratio) < 100 else "-"


def short_time(seconds: float | None) -> str:
    """60ms, 1.4s, 14s, 20m."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 599.5:
        return f"{short_number(seconds)}s"
    return f"{short_number(seconds / 60)}m"


def time_pair(low: float | None, high: float | None) -> str:
    """60/300ms: two times that mostly have one unit."""
    first, second = short_time(low), short_time(high)
    unit = second.lstrip("0123456789.-")
    if unit and first.lstrip("0123456789.-") == unit:
        first = first.removesuffix(unit)
    return "-" if first == second == "-" else f"{first}/{second}"


def long_time(seconds: float | None) -> str:
    """45 s, 12 min, 1 h 05 min, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return "an unknown time"
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole // 60 % 60:02} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def bar_of(ratio: float | None, width: int, look: Look) -> str:
    full, empty = look.bar
    share = min(1.0, max(0.0, ratio)) if ratio is not None and math.isfinite(ratio) else 0.0
    count = math.ceil(share * width - 1e-9)  # whatever is there is seen
    return full * count + empty * (width - count)


def sparkline(history: Sequence[float | None], width: int, look: Look) -> str:
    """The newest at the right; what is unknown is a gap."""
    marks, out = look.levels, ""
    for ratio in history[-width:] if width > 0 else ():
        if ratio is None or not math.isfinite(ratio):
            out += " "
        else:
            out += marks[min(len(marks) - 1, max(0, int(ratio * len(marks))))]
    return out


# ============================================================================================
#  76  table
# ============================================================================================
#
# The servers as a table: a server of a status document in, a line of styled text out.  What a
# colour says, a word says too.
#
# To add a column: a row in COLUMNS, where the order is that on the screen and `rank` says which
# goes first when there is no room.


def load_ratio(server: Document) -> float | None:
    """How full a server is: its requests, ours and those of others, by its capacity."""
    said = (server["running"] or 0) + (server["waiting"] or 0)
    capacity = server["capacity"]
    if not known(capacity) or capacity <= 0:
        return None
    return float(max(said, server["in_flight"] or 0) / capacity)


SHORT_STATES = {
    "healthy": "ok", "unhealthy": "down", "checking": "new", "draining": "drn", "drained": "off",
    "circuit open": "trip", "circuit half-open": "try", "asleep": "zzz",
}
STATE_STYLES = {
    "healthy": Style.GOOD, "checking": Style.WARN, "draining": Style.WARN, "drained": Style.WARN,
    "circuit half-open": Style.WARN, "asleep": Style.WARN,
}


def state_text(server: Document, width: int = 1000) -> str:
    """Its state in a word, a short one if need be."""
    state: str = server["state"]
    word = "half-open" if state == "circuit half-open" else state
    return word if cells(word) <= width else cut(SHORT_STATES.get(state, word), width)


def state_style(server: Document) -> Style:
    return STATE_STYLES.get(server["state"], Style.BAD)


def load_style(server: Document) -> Style:
    """mvllm's limits."""
    ratio = load_ratio(server) or 0.0
    return Style.BAD if ratio >= 0.9 else Style.WARN if ratio >= 0.7 else Style.BAR


def is_out(server: Document) -> bool:
    """Whether the reason says more than its numbers."""
    return bool(server["reason"]) and STATE_STYLES.get(server["state"]) is None


def model_names(server: Document) -> str:
    """As mvllm: up to three names, or two and how many more."""
    names = server["models"] or []
    if len(names) > 3:
        return f"{', '.join(names[:2])} (+{len(names) - 2})"
    return ", ".join(names) or "no models"


def said(server: Document, key: str, form: Callable[[float | None], str] = short_number) -> str:
    """A number that the server has reported; it is marked if that was some time ago."""
    value = server[key]
    return form(value) + "?" * bool(server["stale"] and known(value))


def unknown_last(value: float | None) -> float:
    return -math.inf if value is None or not math.isfinite(value) else value


# How the list can be sorted: by name in words, and what is first has the lowest value.
SORTS: dict[str, Callable[[Document], Any]] = {
    "trouble": lambda server: (state_style(server) is not Style.BAD, not server["errors"]),
    "given": lambda server: 0,
    "name": lambda server: server["name"],
    "state": lambda server: (server["state"] == "healthy", server["state"]),
    "load": lambda server: -unknown_last(load_ratio(server)),
    "running": lambda server: -unknown_last(server["running"]),
    "waiting": lambda server: -unknown_last(server["waiting"]),
    "kv": lambda server: -unknown_last(server["kv_usage_ratio"]),
    "ttft": lambda server: -unknown_last(server["ttft_p95_s"]),
    "tokens": lambda server: -unknown_last(server["tokens_per_s"]),
    "errors": lambda server: -unknown_last(server["errors"]),
}


def listed(ui: Ui, status: Document) -> list[Document]:
    """The servers that the filter leaves, sorted.  Each of its words is in a server's name, state
    or models."""
    words = (ui.filter if ui.typed is None else ui.typed).lower().split()

    def wanted(server: Document) -> bool:
        if not words:
            return True
        text = f"{server['name']} {server['state']} {' '.join(server['models'] or ())}".lower()
        return all(word in text for word in words)

    servers = [server for server in status["servers"] if wanted(server)]
    return sorted(servers, key=SORTS[ui.sort])


def selected(ui: Ui, status: Document) -> Document | None:
    """The selected server, or the first one of the list; a detail is of no other than it."""
    if ui.mode is Mode.DETAIL:
        return next((s for s in status["servers"] if s["url"] == ui.selected), None)
    servers = listed(ui, status)
    return next((s for s in servers if s["url"] == ui.selected), servers[0] if servers else None)


# Of the table.


def plain(server: Document) -> Style:
    return Style.PLAIN


class Column(NamedTuple):
    head: str
    rank: int  # the highest is left out first
    least: int  # cells
    right: bool
    text: Callable[[Document, Look], str]
    style: Callable[[Document], Style] = plain
    sort: str = ""  # the sort that it shows
    most: int = 0  # cells, if there is room; 0: what its texts take


def capacity_text(server: Document, look: Look) -> str:
    """A bar of how full it is, and how many requests that would be."""
    learned = "~" if server["capacity_learned"] else ""
    number = learned + short_number(server["capacity"])
    return f"{bar_of(load_ratio(server), 6, look)} {number:>4}"


def failure_style(server: Document) -> Style:
    return Style.BAD if server["errors"] else Style.PLAIN


COLUMNS = (
    Column("STATE", 0, 4, False, lambda s, look: state_text(s), state_style, "state"),
    Column("MODELS", 4, 8, False, lambda s, look: model_names(s),
           lambda s: Style.PLAIN if s["models"] else Style.DIM, most=60),
    Column("RUN", 1, 3, True, lambda s, look: said(s, "running"), plain, "running"),
    Column("WAIT", 2, 4, True, lambda s, look: said(s, "waiting"),
           lambda s: Style.WARN if s["waiting"] else Style.PLAIN, "waiting"),
    Column("OURS", 5, 4, True, lambda s, look: short_number(s["in_flight"])),
    Column("CAPACITY", 3, 11, True, capacity_text, load_style, "load"),
    Column("KV", 6, 4, True, lambda s, look: said(s, "kv_usage_ratio", percent),
           lambda s: Style.WARN if (s["kv_usage_ratio"] or 0) >= 0.9 else Style.PLAIN, "kv"),
    Column("TOK/S", 9, 5, True, lambda s, look: short_number(s["tokens_per_s"]), plain, "tokens"),
    Column("TTFT 50/95", 8, 10, True,
           lambda s, look: time_pair(s["ttft_p50_s"], s["ttft_p95_s"]), plain, "ttft"),
    Column("ERR", 7, 3, True, lambda s, look: short_number(s["errors"]), failure_style, "errors"),
    Column("RETRY", 11, 5, True, lambda s, look: short_number(s["retries"])),
    Column("LOAD", 10, 8, True, lambda s, look: sparkline(s["history"] or (), 60, look),
           lambda s: Style.BAR, most=60),
)
MARK_CELLS = 2  # cells before a name: whether it is selected, whether it is well


class Place(NamedTuple):
    """A column on the screen."""

    column: Column
    width: int


def places(servers: Sequence[Document], left: int, look: Look) -> list[Place]:
    """The columns for which there is room; what is left over goes to those that can use it."""
    if not servers or left < 5:
        return []
    wants = {column: max(cells(column.text(server, look)) for server in servers)
             for column in COLUMNS}
    widths: dict[Column, int] = {}
    for column in sorted(COLUMNS, key=lambda column: column.rank):
        width = column.least if column.most else max(column.least, wants[column])
        if column is COLUMNS[0] and width >= left:
            width = column.least  # its short words
        if width + 1 <= left:
            widths[column], left = width, left - width - 1
    for column in widths:
        if column.most:
            more = max(0, min(left, min(column.most, wants[column]) - widths[column]))
            widths[column], left = widths[column] + more, left - more
    return [Place(column, widths[column]) for column in COLUMNS if column in widths]


def table_head(name_width: int, shown: Sequence[Place], sort: str) -> Line:
    def head(text: str, key: str) -> Span:
        return text, Style.SORTED if sort == key else Style.HEAD

    name = head(pad("SERVER"[:name_width], name_width), "name")
    line: Line = [(" " * MARK_CELLS, Style.HEAD), name]
    for column, width in shown:
        line += [(" ", Style.HEAD), head(pad(column.head[:width], width, column.right),
                                         column.sort or "-")]
    return line


def server_line(server: Document, name_width: int, shown: Sequence[Place], look: Look,
                reason_below: bool, width: int) -> Line:
    """A server's row of the table; the reason why it is out has no need of its numbers."""
    style = state_style(server)
    mark = "" if style is Style.GOOD else "?" if style is Style.WARN else "!"
    name = fit_name(server["name"], name_width, look)
    line: Line = [(f"{mark:>{MARK_CELLS}}", style), (pad(name, name_width), style)]
    for column, cells_wide in shown:
        if column is not COLUMNS[0] and is_out(server) and not reason_below:
            reason = f"{server['reason']}, for {long_time(server['since_s'])}"
            left = width - sum(cells(text) for text, _ in line) - 1
            return [*line, (" ", Style.PLAIN), (fit(reason, left, look), style)]
        word = (state_text(server, cells_wide) if column is COLUMNS[0] else
                column.text(server, look)[-cells_wide:] if column.head == "LOAD" else
                fit(column.text(server, look), cells_wide, look))
        dim = server["stale"] and column.head in ("RUN", "WAIT", "KV")
        line.append((" ", Style.PLAIN))
        line.append((pad(word, cells_wide, column.right),
                     Style.DIM if dim else column.style(server)))
    return line


def reason_line(server: Document, look: Look, width: int) -> Line:
    corner = "└" if look.unicode else "`"
    text = f"{corner} {server['reason']}, for {long_time(server['since_s'])}"
    return [("   ", Style.PLAIN), (fit(text, width - 3, look), state_style(server))]


def marked(line: Line) -> Line:
    """A row as the selected one: by a mark and its name, so that its colours stay."""
    (start, _), (name, _), *rest = line
    return [(">" + start[1:], Style.SELECTED), (name, Style.SELECTED), *rest]


# ============================================================================================
#  77  views
# ============================================================================================
#
# What is seen besides the table of servers: graphs of the fleet, and the views that Tab shows.

# Graphs of the fleet, by what the document calls them: what is read beside each.
GRAPHED: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "requests_per_s": ("requests/s", short_number), "tokens_per_s": ("tokens/s", short_number),
    "ttft_p50_s": ("TTFT p50", short_time), "ttft_p95_s": ("TTFT p95", short_time),
    "queue": ("queue", short_number), "error_ratio": ("errors", percent),
}


def graph_of(values: Sequence[float | None], rows: int, look: Look) -> list[str]:
    """Values, the newest at the right, as columns of that many rows; the highest fills them."""
    top = max((value for value in values if known(value)), default=0.0) or 1.0  # type: ignore
    steps, lines = len(look.levels), list[str]()
    heights = [None if not known(value) else math.ceil(value / top * steps * rows - 1e-9)
               for value in values]  # type: ignore[operator]
    for row in reversed(range(rows)):
        marks = ((" " if height is None or (row and height <= row * steps) else
                  look.levels[max(0, min(steps, height - row * steps) - 1)]) for height in heights)
        lines.append("".join(marks))
    return lines


def graph_lines(fleet: Document, rows: int, look: Look, width: int) -> list[Line]:
    """The last quarter of an hour, in that many rows."""
    if rows < 1:
        return []
    lines: list[Line] = [[(f"{look.rule * 2} the last 15 minutes ", Style.DIM),
                          (look.rule * (width - 23), Style.DIM)]]
    tall, wide = (rows - 1) // len(GRAPHED), max(1, (width - 20) // GRAPH_POINTS)
    for name, (label, form) in GRAPHED.items():
        values = fleet[name][-max(1, (width - 20) // wide):]
        now, top = (form(value) for value in (
            values[-1] if values else None, max(filter(known, values), default=None)))
        drawn = graph_of([value for value in values for _ in range(wide)], tall, look)
        for n, line in enumerate(drawn):
            words = f"{label:11}{now:>6}" if n == tall - 1 else f"{top:>17}" if n == 0 else ""
            lines.append([(f"{words:18}", Style.PLAIN if n == tall - 1 else Style.DIM),
                          (line, Style.BAR)])
    return lines


# The other views, by Tab.


class ViewColumn(NamedTuple):
    """A column of a view; `width` is the most that it takes when there is not room for all."""

    head: str
    text: Callable[[Document], str]
    right: bool = True
    style: Callable[[Document], Style] = plain
    width: int = 100


class View(NamedTuple):
    """Another table than that of the servers."""

    rows: Callable[[Document], Sequence[Document]]
    columns: Sequence[ViewColumn]  # the last ones are left out first
    empty: str  # what is said when there are no rows


def text_at(key: str, form: Callable[[Any], str] = str) -> Callable[[Document], str]:
    return lambda row: form(row[key]) if row[key] not in (None, "") else "-"


def request_rows(status: Document) -> list[Document]:
    """Those that run, and below them the last that have ended."""
    running = [{**one, "time_s": one["age_s"], "first_s": None, "bad": False,
                "end": "runs" if one["tokens"] else "waits for its first token"}
               for one in status["requests"]["running"]]
    ended = [{**one, "time_s": one["duration_s"], "bad": one["status"] >= 400,
              "end": f"{one['status']} {one['end']}, {long_time(one['ago_s'])} ago"}
             for one in status["requests"]["ended"]]
    return [*running, *ended]


def short_server(url: str) -> str:
    return url.partition("://")[2] or url


# To add a view: its row; Tab comes to it.
VIEWS: dict[str, View] = {
    "models": View(lambda status: status["models"], (
        ViewColumn("MODEL", text_at("model"), False, width=30),
        ViewColumn("STATE", text_at("state"), False, lambda row: (
            Style.GOOD if row["state"] == "served" else Style.WARN), 24),
        ViewColumn("SERVERS", lambda row: f"{row['healthy']}/{row['servers']}", True, lambda row: (
            Style.PLAIN if row["healthy"] == row["servers"] else Style.WARN)),
        ViewColumn("OURS", text_at("in_flight", short_number)),
        ViewColumn("REQ/S", text_at("requests_per_s", short_number)),
        ViewColumn("TOK/S", text_at("tokens_per_s", short_number)),
        ViewColumn("TTFT 50/95", lambda row: time_pair(row["ttft_p50_s"], row["ttft_p95_s"])),
        ViewColumn("ERR", text_at("errors", short_number), True, failure_style),
    ), "no server has listed a model, and none was asked for"),
    "requests": View(request_rows, (
        ViewColumn("TIME", text_at("time_s", short_time)),
        ViewColumn("SERVER", text_at("server", short_server), False, width=22),
        ViewColumn("TOKENS", text_at("tokens", short_number)),
        ViewColumn("HOW", text_at("end"), False, lambda row: (
            Style.BAD if row["bad"] else Style.PLAIN), 34),
        ViewColumn("MODEL", text_at("model"), False, width=24),
        ViewColumn("KEY", text_at("key"), False, width=12),
        ViewColumn("TTFT", text_at("first_s", short_time)),
        ViewColumn("ID", text_at("id"), False),
    ), "no requests yet"),
    "keys": View(lambda status: status["keys"], (
        ViewColumn("KEY", lambda row: row["name"] or "(no key)", False, width=30),
        ViewColumn("REQUESTS", text_at("requests", short_number)),
        ViewColumn("PROMPT", text_at("prompt", short_number)),
        ViewColumn("CACHED", text_at("cached", short_number)),
        ViewColumn("COMPLETION", text_at("completion", short_number)),
    ), "nobody has used anything yet"),
}


def view_lines(view: View, status: Document, look: Look, width: int) -> list[Line]:
    """A view as a table: its head, and a line for each row."""
    rows = list(view.rows(status))
    if not rows:
        return [[(view.empty, Style.DIM)]]
    shown, left = list[tuple[ViewColumn, int]](), width
    for column in view.columns:
        wants = max(cells(column.head), *(cells(column.text(row)) for row in rows))
        size = min(wants, column.width if left < 110 else 2 * column.width, left)
        if size < min(wants, 4):
            break
        shown.append((column, size))
        left -= size + 2

    def line(text: Callable[[ViewColumn], str], style: Callable[[ViewColumn], Style]) -> Line:
        return [(pad(fit(text(column), size, look), size, column.right) + "  ", style(column))
                for column, size in shown]

    return [line(lambda column: column.head, lambda column: Style.HEAD),
            *(line(lambda column: column.text(row), lambda column: column.style(row))
              for row in rows)]


# ============================================================================================
#  78  screen
# ============================================================================================
#
# What is seen on a terminal: a status document in, all lines out.  Nothing here knows a terminal.


def packed(items: Sequence[Span], width: int) -> Line:
    """The items that fit beside each other, the first ones first."""
    line: Line = []
    for text, style in items:
        gap = "  " if line else ""
        if text and cells(text) + len(gap) <= width:
            line += [(gap, Style.PLAIN), (text, style)]
            width -= cells(text) + len(gap)
    return line


def total_items(status: Document) -> list[Span]:
    """The fleet in one line, what matters most first."""
    t = status["totals"]
    healthy, servers, errors = t["healthy"] or 0, t["servers"] or 0, t["error_ratio"]
    drained = t["drained"] or 0
    style = Style.BAD if not healthy else Style.WARN if healthy < servers - drained else Style.GOOD
    words = f"{healthy} of {servers - drained} healthy" if servers else "no servers"
    ttft = time_pair(t["ttft_p50_s"], t["ttft_p95_s"])
    wrong: list[Span] = [("SETTINGS WRONG", Style.BAD)] * bool(status["settings_error"])
    return [
        (words, style), (f"{drained} drained" * bool(drained), Style.WARN), *wrong,
        (f"queue {short_number(t['queue'])}", Style.WARN if t["queue"] else Style.PLAIN),
        (f"in flight {short_number(t['in_flight'])}", Style.PLAIN),
        (f"{short_number(t['requests_per_s'])} req/s", Style.PLAIN),
        (f"errors {short_number(None if errors is None else 100 * errors)}%",
         Style.BAD if errors else Style.PLAIN),
        (f"TTFT {ttft}", Style.PLAIN), (f"{short_number(t['tokens_per_s'])} tok/s", Style.PLAIN),
        (f"clients {short_number(t['connections'])}", Style.PLAIN),
    ]


def title_line(status: Document, ui: Ui, width: int) -> Line:
    """Who this is; the time stands at the right."""
    flags: list[Span] = [("PAUSED", Style.ASK)] * ui.paused + (
        [("STOPPING", Style.ASK)] * bool(status["stopping"]))
    clock = status["time"]
    line = packed([*flags, (f"mvllm_lite {status['version']}", Style.TITLE),
                   (status["address"], Style.PLAIN),
                   (f"up {long_time(status['uptime_s'])}", Style.PLAIN)],
                  width - cells(clock) - 2)
    gap = width - cells(clock) - sum(cells(text) for text, _ in line)
    return [*line, (" " * gap, Style.PLAIN), (clock, Style.DIM)] if gap > 0 else line


def settings_lines(status: Document, rows: int, look: Look, width: int) -> list[Line]:
    """Where the settings are from, or the complaint about them as far as there is room."""
    if status["settings_error"] and rows > 0:
        lines = [clean(line, look) for line in status["settings_error"].splitlines()]
        complaint = wrapped("settings not used: " + "\n".join(lines), width)
        return [[(line, Style.BAD)] for line in complaint[:rows]]
    return [[(f"settings {status['settings']}", Style.DIM)]][:rows]


def top_lines(status: Document, ui: Ui, look: Look, size: Size) -> list[Line]:
    """Totals, and what else fits above the table."""
    width, rows = size
    lines = [packed(total_items(status), width)]
    if rows >= 8:
        lines.insert(0, title_line(status, ui, width))
    elif ui.paused:
        lines = [packed([("PAUSED", Style.ASK), *total_items(status)], width)]
    spare = 0 if rows < 10 else 1 if rows < 14 else min(5, rows // 6)
    return lines + settings_lines(status, spare, look, width)


KEYS = (
    ("q", "quit, or back", "quit"), ("?", "help, this page", "help"),
    ("Tab", "servers, models, requests, keys: the next view", "view"),
    ("Enter", "all about the selected server", "detail"),
    ("d", "drain it, or undo that; asks before", "drain"),
    ("/", "filter by name, state or model", "filter"), ("s", "sort by the next column", "sort"),
    ("r", "probe it now", "probe"), ("p", "pause the screen, not the balancer", "pause"),
    ("Esc", "back, or end the filter", ""), ("j k", "down, up; the arrows, too", ""),
    ("PgUp PgDn", "a page up, down", ""), ("g G", "to the start, the end", ""),
    ("Ctrl-L", "draw anew", ""), ("Ctrl-C", "stop the balancer; in top: leave", ""),
)


MODE_KEYS = {  # besides q
    Mode.DETAIL: (("d", "drain"), ("r", "probe"), ("j k", "down, up"), ("p", "pause"),
                  ("?", "help")),
    Mode.VIEW: (("Tab", "next view"), ("j k", "down, up"), ("p", "pause"), ("?", "help")),
}


def key_line(ui: Ui, place: str, width: int) -> Line:
    """The last line: a question, what is typed, what a key did, or which keys there are."""
    if ui.asked:
        return [(cut(f"y/n: {ui.question}", width), Style.ASK)]
    if ui.typed is not None:
        return [("/", Style.KEY), (ui.typed[-max(1, width // 2 - 3) :] + "_", Style.PLAIN),
                ("  Enter keep, Esc clear", Style.DIM)]
    if ui.note:
        return [(ui.note, Style.TITLE)]
    if ui.mode is not Mode.LIST:
        line, left = list[Span](), width - cells(place)
        for key, word in (("q", "back"), *MODE_KEYS.get(ui.mode, ())):
            if len(key) + len(word) + 3 <= left:
                line += [(key, Style.KEY), (f" {word}  ", Style.DIM)]
                left -= len(key) + len(word) + 3
        return [*line, (place, Style.DIM)]
    line = []
    left = width - cells(place) - 2 * bool(place)
    if ui.filter:
        line = [(cut(f"/{ui.filter}  ", max(0, left)), Style.KEY)]
        left -= cells(line[0][0])
    for key, _, word in KEYS:
        word = f"sort {ui.sort}" if word == "sort" else word
        if word and len(key) + len(word) + 1 <= left:
            line += [(key, Style.KEY), (f" {word}  ", Style.DIM)]
            left -= len(key) + len(word) + 3
    return [*line, (" " * max(0, left + 2), Style.PLAIN), (place, Style.DIM)] if place else line


def event_lines(status: Document, rows: int, look: Look, width: int) -> list[Line]:
    """The newest events, as many as fit below their title."""
    if rows < 2:
        return []
    lines: list[Line] = [[(f"{look.rule * 2} events ", Style.DIM),
                          (look.rule * (width - 10), Style.DIM)]]
    for event in status["events"][1 - rows :]:
        level = event["level"]
        style = {"warning": Style.WARN, "error": Style.BAD}.get(level, Style.PLAIN)
        words = event["text"] if level == "info" else f"{level}: {event['text']}"
        line: Line = [(f"{event['time']} ", Style.DIM), (words, style)]
        taken = cells(event["time"]) + 1
        lines.append([line[0], (fit(words, max(0, width - taken), look), style)])
    return lines


# The screens.


class Frame(NamedTuple):
    """How the rows of the list screen are shared out."""

    top: list[Line]
    table: int  # rows for servers
    reasons: bool  # whether reasons have lines of their own
    graphs: int  # rows for graphs
    events: int  # rows for events


def frame(status: Document, ui: Ui, look: Look, size: Size) -> Frame:
    top = top_lines(status, ui, look, size)
    free = max(0, size.rows - len(top) - 2)  # without the head of the table and the keys
    servers = listed(ui, status)
    with_reasons = len(servers) + sum(map(is_out, servers))
    least = min(6, len(status["events"]) + 1) if free >= 12 else 0
    reasons = with_reasons <= free - least
    table = min(with_reasons if reasons else len(servers), free - least)
    events = free - table
    tall = min(4, (events - max(least, 7) - 1) // len(GRAPHED))  # rows of each graph
    graphs = 1 + tall * len(GRAPHED) if tall > 0 and len(status["fleet"]["queue"]) > 1 else 0
    events -= graphs
    return Frame(top, table + (events if events < 2 else 0), reasons, graphs,
                 events if events > 1 else 0)


def list_lines(status: Document, ui: Ui, look: Look, size: Size) -> list[Line]:
    parts, servers, width = frame(status, ui, look, size), listed(ui, status), size.columns
    name_width = max([6, *(cells(server["name"]) for server in servers)])
    name_width = max(0, min(name_width, width - MARK_CELLS))
    shown = places(servers, width - MARK_CELLS - name_width, look)
    rows: list[Line] = []
    window = servers[ui.scroll : ui.scroll + max(0, parts.table)]
    for server in window:
        line = server_line(server, name_width, shown, look, parts.reasons, width)
        rows.append(marked(line) if server["url"] == ui.selected else line)
        if parts.reasons and is_out(server):
            rows.append(reason_line(server, look, width))
    if not servers:
        rows = [[("no server matches the filter" if status["servers"] else
                  "no servers in the settings", Style.WARN)]]
    rows = (rows + [[]] * parts.table)[: parts.table]
    rows += graph_lines(status["fleet"], parts.graphs, look, width)
    events = event_lines(status, parts.events, look, width)
    rows += events + [[]] * (parts.events - len(events))
    end = ui.scroll + len(window)
    place = f"{ui.scroll + 1}-{end} of {len(servers)}" if len(window) < len(servers) else ""
    head = table_head(name_width, shown, ui.sort)
    return [*parts.top, head, *rows, key_line(ui, place, width)]


def facts(server: Document, look: Look) -> Iterator[tuple[str, str, Style]]:
    """All that is known of a server: what, in words, and what that means."""
    state = f"{server['state']} for {long_time(server['since_s'])}"
    yield "state", state, state_style(server)
    if server["reason"]:
        yield "reason", server["reason"], Style.PLAIN
    yield "url", clean(server["url"], look), Style.PLAIN
    yield "models", ", ".join(server["models"] or ()) or "none", Style.PLAIN
    old = " (reported some time ago)" if server["stale"] else ""
    running, waiting, ours = (
        short_number(server[key]) for key in ("running", "waiting", "in_flight"))
    words = f"{running} running, {waiting} waiting{old}" if known(server["running"]) else (
        "never reported")
    words += f"; {ours} of ours in flight"
    yield "requests", words, Style.PLAIN
    ratio, note = load_ratio(server), server["capacity_note"]
    learned = ("as set" if not server["capacity_learned"] else
               "learned" if server["capacity_seen"] else "assumed, until there is traffic")
    words = f"{bar_of(ratio, 10, look)} {percent(ratio)} of {short_number(server['capacity'])}"
    yield "capacity", f"{words}, {learned}{'; ' * bool(note)}{note}", load_style(server)
    usage = server["kv_usage_ratio"]
    yield "KV cache", percent(usage) + old if known(usage) else "never reported", Style.PLAIN
    yield "tokens/s", f"{short_number(server['tokens_per_s'])} generated", Style.PLAIN
    pending, speed = (
        short_number(server[key]) for key in ("pending_prompt_tokens", "prompt_tokens_per_second"))
    read = f"read at {speed} tokens/s" if speed != "0" else "its speed was not seen yet"
    yield "prompts", f"{pending} tokens not answered yet, {read}", Style.PLAIN
    step = f"{step_ms:.3g} ms" if (step_ms := server["step_ms"]) else "not learned yet"
    yield "pace", f"{step} for a token of an answer, with no other work", Style.PLAIN
    p50, p95 = short_time(server["ttft_p50_s"]), short_time(server["ttft_p95_s"])
    yield "TTFT", f"{p50} median, {p95} p95, of the last minute", Style.PLAIN
    errors, retries = short_number(server["errors"]), short_number(server["retries"])
    words = f"{errors} errors, {retries} retries in the last minute"
    yield "failures", words, failure_style(server)
    yield "load", sparkline(server["history"] or (), 60, look) or "-", Style.BAR


def detail_lines(server: Document, look: Look, width: int) -> list[Line]:
    """The text of a server's own screen; as many lines as it takes."""
    lines: list[Line] = []
    indent = 10 if width >= 40 else 2
    for what, words, style in facts(server, look):
        if indent == 2:
            lines.append([(what, Style.HEAD)])
        for n, text in enumerate(wrapped(words, max(1, width - indent))):
            label = what if n == 0 and indent > 2 else ""
            lines.append([(pad(label, indent), Style.HEAD), (text, style)])
    for what, items in (("last errors", server["last_errors"]),
                        ("last decisions", server["decisions"])):
        lines += [[], [(what, Style.HEAD)]]
        for item in items[::-1] or ["none"]:  # newest first
            lines += [[("  " + text, Style.PLAIN)] for text in wrapped(item, max(1, width - 2))]
    return lines


def help_lines(width: int, hint: str = "") -> list[Line]:
    lines: list[Line] = [[(text, Style.PLAIN)] for text in wrapped(hint, max(1, width))]
    lines = [*lines * bool(hint), [], [("Keys", Style.TITLE)]][0 if hint else 1 :]
    lines += [[(f"{key:10}", Style.KEY), (words, Style.PLAIN)] for key, words, _ in KEYS]
    meanings = (
        "RUN and WAIT are the server's own counts, of whoever asks; OURS are requests in flight"
        " from here.  A ? marks a number that was reported some time ago, a ~ a capacity that was"
        " learned.  TTFT (time to first token, of streams), ERR (attempts that failed there) and"
        " RETRY (of these, those that another followed) are of the last minute.  LOAD is"
        " the past, newest at the right.  Before a name, ! is out and ? is on its way in or out.")
    lines += [[], [("Numbers", Style.TITLE)]]
    lines += [[(text, Style.PLAIN)] for text in wrapped(meanings, max(1, width))]
    lines += [[], [("Short words for states", Style.TITLE)]]
    return lines + [[(f"{short:10}", Style.KEY), (word, Style.PLAIN)]
                    for word, short in SHORT_STATES.items()]


def page_lines(status: Document, ui: Ui, look: Look, size: Size) -> tuple[Line, list[Line]]:
    """The title and the text of a screen that is not the list."""
    if ui.mode is Mode.VIEW:
        title = packed([(ui.view.upper(), Style.TITLE), *total_items(status)], size.columns)
        return title, view_lines(VIEWS[ui.view], status, look, size.columns)
    server = selected(ui, status)
    if ui.mode is Mode.HELP or server is None:
        return [("mvllm_lite, help", Style.TITLE)], help_lines(size.columns, status["hint"])
    name = fit_name(server["name"], size.columns, look)
    return [(name, Style.TITLE)], detail_lines(server, look, size.columns)


def settle(ui: Ui, status: Document, look: Look, size: Size) -> Ui:
    """The Ui as it fits what there is: a server is selected, and it is to be seen."""
    if ui.mode is not Mode.LIST:
        if ui.mode is Mode.DETAIL and selected(ui, status) is None:
            return settle(ui._replace(mode=Mode.LIST), status, look, size)
        page = max(1, size.rows - 2)
        most = max(0, len(page_lines(status, ui, look, size)[1]) - page)
        return ui._replace(page=page, lines_up=max(0, min(ui.lines_up, most)))
    urls = [server["url"] for server in listed(ui, status)]
    page = max(1, frame(status, ui, look, size).table)
    at = urls.index(ui.selected) if ui.selected in urls else 0
    scroll = max(at - page + 1, min(ui.scroll, at, max(0, len(urls) - page)))
    url = urls[at] if urls else ""
    return ui._replace(selected=url, page=page, scroll=max(0, scroll), lines_up=0)


def screen(status: Document, ui: Ui, look: Look, size: Size) -> list[Line]:
    """As many lines as there are rows, none wider than there are columns."""
    status = cleaned(status, look)
    return drawn(status, settle(ui, status, look, size), look, size)


def drawn(status: Document, ui: Ui, look: Look, size: Size) -> list[Line]:
    """The same, of a status that is clean and a Ui that is settled."""
    ui = ui._replace(note=clean(ui.note, look), question=clean(ui.question, look),
                     filter=clean(ui.filter, look))
    if ui.typed is not None:
        ui = ui._replace(typed=clean(ui.typed, look))
    if ui.mode is Mode.LIST:
        lines = list_lines(status, ui, look, size)
    else:
        title, text = page_lines(status, ui, look, size)
        seen = text[ui.lines_up : ui.lines_up + ui.page]
        rest = len(text) - ui.lines_up - len(seen)
        place = f"{rest} more lines below" if rest else "the end" if ui.lines_up else ""
        seen += [[]] * (ui.page - len(seen))
        lines = [title, *seen, key_line(ui, place, size.columns)]
    if len(lines) > size.rows:
        lines = lines[: max(0, size.rows - 1)] + lines[-1:]
    lines = [clipped(line, size.columns) for line in lines[: size.rows]]
    return lines + [[]] * (size.rows - len(lines))


# ============================================================================================
#  79  keys
# ============================================================================================
#
# What keys do to the screen, and ask of the balancer: a key in, the next Ui out.
#
# To add a key: a row in KEYS, and its branch in `press`.


def press(key: str, ui: Ui, status: Document) -> tuple[Ui, Action | None]:
    """What a key makes of the screen, and what it asks of the balancer."""
    ui = ui._replace(note="")
    if ui.asked:
        return answer(key, ui)
    if ui.typed is not None:
        return type_filter(key, ui, status), None
    if key in MOVES:
        return moved(MOVES[key], ui, status), None
    if key in ("q", "esc"):
        return leave(key, ui, status)
    if key == "?":
        return ui._replace(mode=Mode.HELP, view="", lines_up=0), None
    if key == "p":
        return ui._replace(paused=not ui.paused), None
    if key == "tab":
        views = ["", *VIEWS]
        view = views[(views.index(ui.view) + 1) % len(views)]
        return ui._replace(mode=Mode.VIEW if view else Mode.LIST, view=view, lines_up=0), None
    if ui.mode is Mode.LIST and key == "s":
        names = list(SORTS)
        return ui._replace(sort=names[(names.index(ui.sort) + 1) % len(names)]), None
    if ui.mode is Mode.LIST and key == "/":
        return ui._replace(typed=ui.filter), None
    return about_server(key, ui, selected(ui, status))


def answer(key: str, ui: Ui) -> tuple[Ui, Action | None]:
    """A question has been asked; only y is yes, and only a clear no ends it."""
    if key in ("y", "Y"):
        note = f"{ui.question.partition('?')[0]}: yes"
        return ui._replace(asked=None, question="", note=note), ui.asked
    if key in ("n", "N", "q", "esc", "enter"):
        return ui._replace(asked=None, question=""), None
    return ui, None


def type_filter(key: str, ui: Ui, status: Document) -> Ui:
    typed = ui.typed or ""
    if key == "enter":
        return ui._replace(typed=None, filter=typed)
    if key == "esc":
        return ui._replace(typed=None, filter="")
    if key == "backspace":
        return ui._replace(typed=typed[:-1])
    if key in ("up", "down"):
        return moved(MOVES[key], ui, status)
    return ui._replace(typed=typed + key) if len(key) == 1 and key.isprintable() else ui


# Rows and pages down; the ends are further than any list.
MOVES = {"up": (-1, 0), "k": (-1, 0), "down": (1, 0), "j": (1, 0), "pgup": (0, -1),
         "pgdn": (0, 1), " ": (0, 1), "home": (-10**6, 0), "g": (-10**6, 0), "end": (10**6, 0),
         "G": (10**6, 0)}


def moved(move: tuple[int, int], ui: Ui, status: Document) -> Ui:
    by = move[0] + move[1] * max(1, ui.page)
    if ui.mode is not Mode.LIST:
        return ui._replace(lines_up=max(0, ui.lines_up + by))  # settle knows where the end is
    urls = [server["url"] for server in listed(ui, status)]
    if not urls:
        return ui
    at = urls.index(ui.selected) if ui.selected in urls else 0
    return ui._replace(selected=urls[max(0, min(len(urls) - 1, at + by))])


def leave(key: str, ui: Ui, status: Document) -> tuple[Ui, Action | None]:
    """Back to where one came from; from the list, q leaves the program."""
    if ui.mode is not Mode.LIST:
        return ui._replace(mode=Mode.LIST, view="", lines_up=0), None
    if key == "esc":
        return ui._replace(filter=""), None
    running = status["totals"]["in_flight"]
    if ui.remote or not running:
        return ui, Action("quit")
    words = "1 request is" if running == 1 else f"{short_number(running)} requests are"
    return ui._replace(asked=Action("quit"), question=f"quit? {words} in flight"), None


def about_server(key: str, ui: Ui, server: Document | None) -> tuple[Ui, Action | None]:
    """Keys about the selected server."""
    if server is None or ui.mode in (Mode.HELP, Mode.VIEW):
        return ui, None
    url, name = server["url"], server["name"]
    if key == "enter":
        return ui._replace(mode=Mode.DETAIL, selected=url, lines_up=0), None
    if key == "r":
        return ui._replace(note=f"{name} is being probed"), Action("probe", url)
    if key != "d":
        return ui, None
    if server["state"] in ("draining", "drained"):
        question = f"undrain {name}? it will get requests again"
        return ui._replace(asked=Action("undrain", url), question=question), None
    count = short_number(server["in_flight"])
    question = f"drain {name}? it gets no new requests, {count} in flight go on"
    return ui._replace(asked=Action("drain", url), question=question), None


# By curses' names, and as characters.
FUNCTION_KEYS = {
    "KEY_UP": "up", "KEY_DOWN": "down", "KEY_PPAGE": "pgup", "KEY_NPAGE": "pgdn",
    "KEY_HOME": "home", "KEY_FIND": "home", "KEY_END": "end", "KEY_SELECT": "end",
    "KEY_ENTER": "enter", "KEY_BACKSPACE": "backspace", "KEY_RESIZE": "redraw",
}
CONTROLS = {"\t": "tab", "\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace",
            "\x0c": "redraw", "\x1b": "esc"}


def key_of(char: str) -> str:
    """The key by which a terminal sends a character; '' for none that means anything."""
    return char if char.isprintable() else CONTROLS.get(char, "")


# ============================================================================================
#  80  terminal
# ============================================================================================
#
# The screen's lines onto a terminal, and its keys, by curses.  That is an ordinary program in a
# process of its own, since curses waits, with Python locked, on a terminal that takes nothing (a
# dead ssh, a stopped one), and has signal handlers of its own.  It is told over a socket what there
# is to show, tells what keys ask for (a line of JSON each), and leaves when the socket is closed.

TICK_S = 0.1  # between looks at the size and at who is in the foreground
ESCAPE_MS = 50  # after which an Esc is the key and not the start of another
NOT_TERMINALS = ("", "unknown", "network", "emacs")
LIKELY = ("xterm-256color", "xterm", "vt100")  # what a terminal that terminfo does not know is like
TERMINFO_DIRS = ":/etc/terminfo:/lib/terminfo:/usr/share/terminfo"  # some Pythons look nowhere
LEAVE = ("sgr0", "rmkx", "cnorm", "rmcup", "clear")  # by terminfo's names; the last for the other

# A colour of the terminal's own palette, on its own background, so that light and dark do; and what
# tells it without colours.
LOOKS = {
    Style.DIM: (-1, "A_DIM"), Style.TITLE: (-1, "A_BOLD"), Style.HEAD: (6, "A_BOLD"),
    Style.SORTED: (-1, "A_REVERSE"), Style.GOOD: (2, "A_NORMAL"), Style.WARN: (3, "A_BOLD"),
    Style.BAD: (1, "A_BOLD"), Style.SELECTED: (-1, "A_REVERSE"), Style.BAR: (5, "A_NORMAL"),
    Style.KEY: (6, "A_BOLD"), Style.ASK: (-1, "A_REVERSE"),
}


def in_foreground(descriptor: int) -> bool:
    """Whether the terminal is ours to use, not that of the shell that we were put behind."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # it is not our controlling terminal: nobody else's shell is there either
        return True


@contextlib.contextmanager
def opened_anew(terminal: int, flags: int = 0) -> Iterator[int]:
    """That terminal by a description of its own, for the shell's is shared.  Raises OSError."""
    flags |= os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(os.ttyname(terminal), flags)
    except OSError:  # after su it is another user's, in a container it may have no name
        descriptor = os.open("/dev/tty", flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def json_line(document: Any) -> bytes:
    return json.dumps(document).encode() + b"\n"


def known_terminal(curses: Any, name: str) -> str:
    """The name by which terminfo knows it, or one like it; '': initscr would end the process."""
    os.environ.setdefault("TERMINFO_DIRS", TERMINFO_DIRS)
    for candidate in (name, *LIKELY) if name not in NOT_TERMINALS else ():
        with contextlib.suppress(curses.error):
            curses.setupterm(candidate, 1)
            return candidate if curses.tigetstr("cup") else ""
    return ""


def run_screen(sock: socket.socket, remote: bool) -> str:
    """The screen on our terminal, until one leaves or the socket is closed; why it ended, or ''."""
    try:
        import curses
    except ImportError:
        return "this Python has no curses"
    given = os.environ.get("TERM", "")
    os.environ["TERM"] = known_terminal(curses, given)
    if not os.environ["TERM"]:
        return f"TERM is {given!r}, no terminal that can show one"
    for name in ("LINES", "COLUMNS"):  # the size changes
        os.environ.pop(name, None)
    try:
        return CursesScreen(curses, sock, remote).run()
    except OSError as error:
        return f"the terminal has gone: {error_text(error)}"
    except Exception as error:  # a status of another version, maybe
        return f"it failed: {type(error).__name__}: {error}"


class CursesScreen:
    """A program that shows the newest status it was told."""

    def __init__(self, curses: Any, sock: socket.socket, remote: bool) -> None:
        """`curses` knows the terminal already, by `setupterm`."""
        self.curses, self.sock = curses, sock
        sock.setblocking(False)
        self.ui = Ui(remote=remote)
        self.received = b""
        self.latest: Document | None = None
        self.status: Document | None = None  # what is looked at; an older one while paused
        self.over = self.changed = False
        self.in_front = True

    def run(self) -> str:
        """Why it could not begin, or ''.  Raises OSError when the terminal has gone."""
        known = [self.curses.tigetstr(name) or b"" for name in LEAVE]
        leave = b"".join(known[:-1] if known[-2] else known)
        self.say({"leave": re.sub(rb"\$<[^>]*>", b"", leave).decode("latin-1")})
        while self.latest is None:
            select.select([self.sock], [], [])
            self.receive()
            if self.over or self.ui.note:
                return self.ui.note
        time.sleep(2 * LOG_PAUSE_S)  # for log lines that are on their way to this terminal
        self.window = self.curses.initscr()
        try:
            self.enter()
            while not self.over:
                self.turn()
        finally:
            self.curses.flushinp()
            self.curses.endwin()
        return ""

    def enter(self) -> None:
        curses, window = self.curses, self.window
        curses.noecho()
        curses.cbreak()
        curses.nonl()
        curses.set_escdelay(ESCAPE_MS)
        window.keypad(True)
        window.nodelay(True)
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        mode = termios.tcgetattr(0)
        mode[0] &= ~termios.IXON  # Ctrl-S would stop the screen for nothing
        if not self.ui.remote:
            for key in (termios.VSUSP, termios.VQUIT):  # Ctrl-Z would stop all streams
                mode[6][key] = b"\x00"
        termios.tcsetattr(0, termios.TCSANOW, mode)
        curses.def_prog_mode()
        for number in (signal.SIGTTOU, signal.SIGTTIN):  # put behind a shell, we wait
            signal.signal(number, signal.SIG_IGN)
        wide = window.encoding.lower().replace("-", "") == "utf8" and hasattr(window, "get_wch")
        colours = curses.has_colors() and not os.environ.get("NO_COLOR")
        # The font of Linux's console has few characters.
        self.look = Look(wide and os.environ["TERM"] != "linux", colours)
        self.attributes = self.attributes_of(colours)

    def attributes_of(self, colours: bool) -> dict[Style, int]:
        curses, found, background = self.curses, dict[Style, int](), 0
        if colours:
            curses.start_color()
            with contextlib.suppress(curses.error):  # it has no default colours
                curses.use_default_colors()
                background = -1
        for n, (style, (colour, mark)) in enumerate(LOOKS.items(), 1):
            found[style] = getattr(curses, mark)
            if colours and colour >= 0:
                curses.init_pair(n, colour, background)
                found[style] |= curses.color_pair(n)
        return found

    def turn(self) -> None:
        """Wait for something to do, for a tick at the most, and do it."""
        in_front = in_foreground(0)
        if in_front and not self.in_front:
            self.curses.reset_prog_mode()
            self.window.clearok(True)
            self.changed = True
        self.in_front = in_front
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if in_front:
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll(TICK_S * 1000))
        if ready.get(0, 0) & (select.POLLHUP | select.POLLERR):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        told = self.receive()
        if in_front:
            self.press_keys()
            self.paint()
        if told:
            self.say({})

    def receive(self) -> bool:
        """Take in what the other side has told.  Returns whether that was anything."""
        try:
            while data := self.sock.recv(1 << 18):
                self.received += data
            self.over = True
        except BlockingIOError:
            pass
        except OSError:
            self.over = True
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.latest = message.get("status", self.latest)
            if "note" in message:
                self.ui, self.changed = self.ui._replace(note=message["note"]), True
        return bool(lines)

    def say(self, message: Mapping[str, str]) -> None:
        with contextlib.suppress(OSError):  # reading will tell
            self.sock.send(json_line(message))

    def press_keys(self) -> None:
        while key := self.next_key():
            self.changed = True
            if key == "redraw":
                self.window.clearok(True)
            elif self.status is not None:
                self.ui, action = press(key, self.ui, self.status)
                if action is not None and action.verb == "quit" and self.ui.remote:
                    self.over = True
                elif action is not None:
                    self.say(action._asdict())

    def next_key(self) -> str:
        """The next key that means something; '' if none was pressed."""
        read = getattr(self.window, "get_wch", self.window.getch)
        with contextlib.suppress(self.curses.error):  # none
            while (code := read()) != -1:
                if isinstance(code, int) and code > 255:
                    key = FUNCTION_KEYS.get(self.curses.keyname(code).decode(), "")
                else:
                    key = key_of(code if isinstance(code, str) else chr(code))
                if key:
                    return key
        return ""

    def paint(self) -> None:
        if self.latest is not None and not (self.ui.paused and self.status):
            self.status, self.latest = cleaned(self.latest, self.look), None
        elif not self.changed:
            return
        if self.status is None:
            return
        self.changed = False
        rows, columns = self.window.getmaxyx()
        size = Size(columns, rows)
        self.ui = settle(self.ui, self.status, self.look, size)
        self.window.erase()
        for row, line in enumerate(drawn(self.status, self.ui, self.look, size)):
            column = 0
            for text, style in line:
                with contextlib.suppress(self.curses.error):  # beyond the last cell is no place
                    self.window.addstr(row, column, text, self.attributes.get(style, 0))
                column += cells(text)
        self.window.refresh()


# ============================================================================================
#  81  top
# ============================================================================================
#
# The screen beside a balancer: beside the one of this process, in place of log lines, or beside one
# that runs elsewhere (`top`).

SCREEN_S = 0.5  # between two statuses
UNANSWERED_LIMIT = 20  # of them in a row: then the program hangs, as its terminal may
FAREWELL_S = 1.0  # for it to end by itself
CANCEL = b"\x18"  # of a sequence that was begun


class ScreenProcess:
    """The screen on our terminal, in its own process, which is killed when it answers no more."""

    def __init__(self, status: Callable[[], Document], act: Callable[[Action], object],
                 hold: Callable[[bool], object], terminal: int = 1) -> None:
        """Start it, in a task.  `act` is told what keys ask for, and `hold` whether the terminal is
        that process's alone."""
        self.status, self.act, self.hold, self.terminal = status, act, hold, terminal
        self.why = ""  # it has ended
        self.leave = b""  # for a terminal that it could not leave
        self.unanswered = 0
        self.closing = False
        self.writer: asyncio.StreamWriter | None = None
        self.task = asyncio.ensure_future(self.run())

    async def close(self) -> None:
        """The terminal is as it was when this returns, after a second or so at the most."""
        self.closing = True
        if self.writer is not None:
            self.writer.transport.abort()
        await self.task

    async def run(self) -> None:
        try:
            with opened_anew(self.terminal, os.O_NONBLOCK) as terminal:
                saved = termios.tcgetattr(terminal)
                if code := await self.converse():
                    if self.leave:
                        restore(terminal, saved, self.leave)
                    self.why = self.why or f"its process ended with {code}"
        except (OSError, termios.error) as error:
            self.why = str(error)
        self.hold(False)
        if not self.closing:
            log.warning("no screen: %s", self.why)

    async def converse(self) -> int:
        """With the process, until it has ended; its exit code.  Raises OSError."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-S", __file__, "top", "--socket", str(theirs.fileno())]
        with theirs, opened_anew(self.terminal) as terminal:
            child = await asyncio.create_subprocess_exec(
                *command, stdin=terminal, stdout=terminal, stderr=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()])
        reader, self.writer = await asyncio.open_connection(sock=ours)
        telling = asyncio.ensure_future(self.tell(child, self.writer))
        with contextlib.suppress(OSError):
            while line := not self.closing and await reader.readline():
                self.hear(json.loads(line))
        telling.cancel()
        self.writer.transport.abort()
        if self.leave:  # it has begun
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    return await child.wait()
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        return await child.wait()

    async def tell(self, child: asyncio.subprocess.Process, writer: asyncio.StreamWriter) -> None:
        """Counted, not timed: when we were stopped, it was not at fault."""
        while self.unanswered < UNANSWERED_LIMIT:
            self.unanswered += 1
            if self.leave and not writer.transport.get_write_buffer_size():
                writer.write(json_line({"status": self.status()}))
            await asyncio.sleep(SCREEN_S)
        self.why = "it answers no more"
        with contextlib.suppress(ProcessLookupError):
            child.kill()

    def hear(self, message: Mapping[str, str]) -> None:
        self.unanswered = 0
        if "leave" in message:
            self.leave = CANCEL + message["leave"].encode("latin-1")
            self.hold(True)
        elif "verb" in message:
            self.act(Action(message["verb"], message["url"]))
        self.why = message.get("why", self.why)


def restore(terminal: int, saved: list[Any], leave: bytes) -> None:
    """A terminal as it was, after a process that could not do that itself."""
    with contextlib.suppress(OSError, termios.error):
        if in_foreground(terminal):
            termios.tcflush(terminal, termios.TCIOFLUSH)
            termios.tcsetattr(terminal, termios.TCSANOW, saved)
            os.write(terminal, leave)


TOP_TIMEOUT_S = 10.0  # for a balancer elsewhere, which may have to probe a server


async def feed_screen(client: HttpClient, sock: socket.socket) -> None:
    """Tell a screen of a balancer elsewhere, which does what the keys ask, until it has closed."""
    reader, writer = await asyncio.open_connection(sock=sock)

    async def tell() -> None:
        while True:
            found, why = await answer_of(client, "/status.json")
            if not why and "totals" not in found:
                why = "it is no balancer's status"
            writer.write(json_line({"note": f"{client.server.url}/status.json: {why}"} if why else
                                   {"status": found | {"address": client.server.url}}))
            await asyncio.sleep(STATUS_S)

    telling = asyncio.ensure_future(tell())
    while line := await reader.readline():
        if verb := (said := json.loads(line)).get("verb"):
            query = urllib.parse.urlencode({"url": said["url"]})
            found, why = await answer_of(client, f"/admin/servers/{verb}?{query}", b"")
            note = why or found.get("done") or found.get("why") or "passed"
            writer.write(json_line({"note": f"{verb}: {note}"}))
    telling.cancel()
    writer.close()


async def answer_of(
    client: HttpClient, path: str, content: bytes | None = None
) -> tuple[dict[str, Any], str]:
    """What a balancer elsewhere answers; and why that is not what was asked for, or ''."""
    try:
        status, answer = await client.fetch(path, TOP_TIMEOUT_S, content)
        found = read_members(answer, None)
    except (PeerGone, BadMessage, TimeoutError) as error:
        return {}, str(error) or "no answer in time"
    error = found.get("error")
    message = error.get("message") if isinstance(error, dict) else "no reason is told"
    return found, "" if status == 200 else f"{status}: {message}"


@SCREENS.append
@contextlib.asynccontextmanager
async def screen_shown(balancer: Balancer) -> AsyncIterator[None]:
    """The screen, in place of log lines, for as long as the terminal takes part."""
    if not in_foreground(1):
        yield
        return
    core, lines = balancer.core, [one for one in log.handlers if isinstance(one, Console)]
    doing = set[asyncio.Future[Any]]()

    def act(action: Action) -> None:
        if action.verb == "quit":
            balancer.stop()
        elif action.verb in OPERATIONS:
            doing.add(task := asyncio.ensure_future(act_on_server(core, action)))
            task.add_done_callback(doing.discard)

    def hold(held: bool) -> None:
        for one in lines:
            (log.removeHandler if held else log.addHandler)(one)

    screen = ScreenProcess(core.status, act, hold)
    balancer.handover.before = screen.close
    try:
        yield
    finally:
        await screen.close()


async def act_on_server(core: Core, action: Action) -> None:
    """What was confirmed on the screen; the log, whose last lines it shows, tells how it went."""
    try:
        server = server_named(core, action.url)
        found = await OPERATIONS[action.verb](core, server)
        if action.verb == "probe":
            log.info("by hand: %s probed: %s", action.url, json.dumps(found))
    except (LookupError, PeerGone) as error:
        log.warning("%s", error.args[0])


def add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default=f"http://127.0.0.1:{Settings().port}",
                        metavar="URL", help="where it listens (default %(default)s)")
    parser.add_argument("--key-file", default="", metavar="FILE",
                        help="holds a key for status and admin")
    parser.add_argument("--ca-file", default="", metavar="FILE",
                        help="https: certificates to trust")
    parser.add_argument("--insecure", action="store_true", help="https: trust any certificate")
    parser.add_argument("--socket", type=int, help=argparse.SUPPRESS)  # of who has started it


@command("top", "the screen, of a balancer that runs elsewhere", add_top,
         example="top http://10.0.0.9:8888")
def run_top(args: argparse.Namespace) -> int:
    """The screen: of the balancer that has started this process, or of one elsewhere."""
    if args.socket is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the balancer, and that us
        with socket.socket(fileno=args.socket) as sock, contextlib.suppress(OSError):
            sock.send(json_line({"why": run_screen(sock, remote=False)}))
        return 0
    entry = {"url": args.url, "api_key_file": args.key_file, "ca_file": args.ca_file,
             "verify": not args.insecure}
    settings, _ = parse_settings("", "top", {"servers": ([entry], "top")})
    client = HttpClient(settings.servers[0], Secrets(settings))
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return fail("top: expected a terminal")
    ours, theirs = socket.socketpair()
    feed = threading.Thread(target=lambda: asyncio.run(feed_screen(client, theirs)), daemon=True)
    feed.start()
    with ours, contextlib.suppress(KeyboardInterrupt):
        if why := run_screen(ours, remote=True):
            return fail(printable(f"top: {why}"))
    return 0


# ============================================================================================
#  82  page
# ============================================================================================
#
# GET /status: what a browser shows of the document at /status.json.  The page itself holds no
# fact of the fleet.  All that comes from outside is written as text, never as markup; a server's
# row is found by its URL and changed in place, so that what is open, marked or in focus stays so.


@functools.cache
def page_policy() -> str:
    """The Content-Security-Policy: the page's own blocks, by their hashes, and this origin."""
    allowed: dict[str, list[str]] = {"style": [], "script": []}
    for name, block in re.findall(r"<(style|script)>(.*?)</\1>", STATUS_PAGE, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        allowed[name].append(f"'sha256-{digest}'")
    return "; ".join((
        "default-src 'none'", f"style-src {' '.join(allowed['style'])}",
        f"script-src {' '.join(allowed['script'])}", "connect-src 'self'", "img-src data:",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    ))


STATUS_PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mvllm_lite</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
:root { --bg: #fff; --card: #f3f5f8; --text: #1b1f24; --muted: #545d68; --line: #c9d0d8;
  --good: #116329; --warn: #7a4b00; --bad: #a40e26; --accent: #0b57b0 }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #0d1117; --card: #171d26;
    --text: #e6edf3; --muted: #a0a9b4; --line: #39424e; --good: #5ad06c; --warn: #e5b84c;
    --bad: #ff8a80; --accent: #79b8ff } }
* { box-sizing: border-box; margin: 0; padding: 0 } [hidden] { display: none !important }
body { margin: 0 auto; padding: 1rem; max-width: 100rem; background: var(--bg); color: var(--text);
  font: 15px/1.4 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
h1, h2, caption { font-size: 1.15rem; font-weight: 650; text-align: left }
h2, caption { padding: 1.2rem 0 .4rem }
small, dt, h3, thead th { color: var(--muted); font-size: .82rem; font-weight: 400 }
.row { display: flex; flex-wrap: wrap; gap: .4rem .9rem; align-items: center }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
a { color: var(--accent) } #headline { font-size: 1.3rem; font-weight: 650; margin-top: .6rem }
.banner { border: 2px solid; border-radius: .4rem; padding: .5rem .8rem; margin-top: .5rem;
  white-space: pre-wrap } .old #data { filter: grayscale(1) }
#totals { display: grid; grid-template-columns: repeat(9, 1fr); gap: .5rem; margin: .7rem 0;
  white-space: nowrap }
#totals div, #events { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .7rem }
#totals div, .rest { background: var(--card) } #totals dd { font-size: 1.3rem; font-weight: 650 }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .45rem; text-align: left; vertical-align: top }
thead th { vertical-align: bottom } tbody { border: solid var(--line); border-width: 1px 0 }
tbody th { font-weight: 650; min-width: 11rem } td small { display: block; white-space: nowrap }
td:nth-child(2) { min-width: 7.5em }
.n { text-align: right; white-space: nowrap } .more > td { padding-top: 0 }
.bar { width: 5.5rem; height: .65rem; border: 1px solid var(--muted); border-radius: .2rem;
  overflow: hidden } .bar div { height: 100%; background: currentColor;
  transform-origin: 0 }
svg { width: 6rem; height: 1.6rem; display: block; fill: none; stroke: var(--accent);
  stroke-width: 1.5; overflow: visible } svg path { stroke: var(--line) }
summary { cursor: pointer; color: var(--muted); font-size: .88rem }
summary b:not(:empty) { margin-right: .6rem }
.rest { border-radius: .4rem; padding: .6rem .8rem; margin: .3rem 0; display: flex;
  flex-wrap: wrap; gap: .6rem 1.5rem } .rest > * { flex: 1 1 15rem }
.rest > .wide { flex-basis: 32rem } ul, ol { list-style: none; font-size: .88rem }
#events { max-height: 22rem; overflow: auto } .only .good-server { display: none }
button, input, select { font: inherit; color: inherit; background: var(--bg); padding: .3rem .7rem;
  border: 1px solid var(--muted); border-radius: .35rem; max-width: 100% }
button { cursor: pointer } :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
#graphs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem;
  margin: .7rem 0 } #graphs figure { border: 1px solid var(--line); border-radius: .4rem;
  padding: .3rem .6rem } #graphs svg { width: 100%; height: 2.6rem }
figcaption { color: var(--muted); font-size: .82rem } figcaption b { color: var(--text) }
th button { font: inherit; border: 0; padding: 0; background: none; text-align: left }
[aria-pressed=true] { border-color: var(--accent); color: var(--accent) }
.many th, .many td { padding-top: .12rem; padding-bottom: .12rem } .many td small { display: inline;
  margin-left: .5em } .many .bar, .many tbody:not(.open) > .more { display: none }
.many svg { height: 1.1rem } .plain { font-size: .9rem } .scroll { overflow-x: auto }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
@media (prefers-reduced-motion: no-preference) { .bar div { transition: transform .4s } }
@media screen and (max-width: 80rem) { table { font-size: .9rem } th, td { padding: .3rem }
  svg, .bar { width: 4.5rem } }
@media screen and (max-width: 66rem) { #totals { grid-template-columns: repeat(5, 1fr) }
  table { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
    gap: 0 .6rem; align-items: start } caption { grid-column: 1 / -1 }
  caption, tbody, .more, .more > td, .main > * { display: block }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  tbody { border-width: 1px; border-radius: .5rem; padding: .4rem; margin-bottom: .6rem }
  .main { display: grid; grid-template-columns: repeat(4, 1fr) }
  .main > .half { grid-column: span 2; min-width: 0 } .main > .whole { grid-column: 1 / -1 }
  .n { text-align: left } svg, .bar { width: 100% } .plain { display: table }
  .plain thead { position: static; clip-path: none; display: table-header-group }
  .plain tbody { display: table-row-group; border: 0 } .many tbody:not(.open) .main > .n,
  .many tbody:not(.open) svg { display: none } .many tbody { padding: .2rem; margin: 0 }
  .many .main { grid-template-columns: 1fr auto auto } .many .main > * { grid-column: auto }
  [data-label]::before { content: attr(data-label); display: block; color: var(--muted);
    font-size: .78rem } summary, button, input { padding-top: .45rem; padding-bottom: .45rem } }
@media screen and (max-width: 30rem) { body { padding: .7rem }
  #totals { grid-template-columns: repeat(3, 1fr) } #totals dd { font-size: 1.1rem } }
@media print { :root, body { font-size: 7.5pt } body { padding: 0; max-width: none }
  .tools { display: none } th, td { padding: 1pt 2pt } tbody, #totals div { break-inside: avoid }
  .bar div { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .bar, svg { width: 4.5rem } #events { max-height: none; border: 0 } }
</style></head><body>
<header class="row"><h1>mvllm_lite <span id="version"></span></h1><span id="address"></span>
<small id="facts"></small></header>
<main><div aria-live="polite"><p id="headline">Loading …</p><p id="out"></p>
<p id="stopping" class="banner warn" hidden>The balancer is stopping: it finishes what it has.</p>
<p id="lost" class="banner bad" hidden></p><p id="complaint" class="banner bad" hidden></p></div>
<noscript>This page needs JavaScript; its facts are at <a href="/status.json">/status.json</a>.
</noscript><div id="data" hidden><dl id="totals"></dl><div id="graphs"></div>
<div class="row tools" id="views" role="group" aria-label="View"></div>
<div class="scroll" id="view" hidden></div><div id="servers"><div class="row tools">
<label>Find <input id="find" size="12"></label>
<label>Sort <select id="sort"><option value="trouble">trouble first</option>
<option value="given">as in the settings</option><option value="name">name</option>
<option value="in_flight">most requests</option><option value="ttft_p95_s">slowest</option>
<option value="errors">most errors</option></select></label>
<label><input id="only" type="checkbox"> only servers that are not healthy</label>
<label><input id="pause" type="checkbox"> pause</label></div>
<table role="table"><caption>Servers <small>TTFT (time to first token, of streams), errors and
retries: of the last minute; ~ is learned, – not known</small></caption><thead role="rowgroup">
<tr role="row" id="heads"></tr></thead></table></div>
<h2 id="eh">Events, newest first</h2><ol id="events" tabindex="0" aria-labelledby="eh"></ol></div>
<div class="tools"><h2>Operate</h2><form id="unlock" class="row">
<label>Key <input id="key" type="password" autocomplete="off"></label><button>Use</button>
<button id="forget" type="button" hidden>Forget</button><small id="says" role="status">With an
admin key, servers can be drained and probed: in their details. (Without keys, from this machine.)
It is kept until this page is left, and nowhere else.</small></form>
<small><a id="raw" href="status.json">As JSON</a></small></div>
</main><template><tbody role="rowgroup"><tr role="row" class="main">
<th scope="row" role="rowheader" class="whole"><button type="button" data-part="name"
aria-expanded="false"></button></th>
<td role="cell" class="half"><b data-part="state"></b><small data-part="since"></small></td>
<td role="cell" class="half" data-label="Load"><span data-part="load"></span>
<div class="bar" aria-hidden="true"><div data-part="bar"></div></div></td>
<td role="cell" class="half" data-label="Load so far" data-part="last"><svg role="img"
viewBox="0 0 60 20" preserveAspectRatio="none" data-part="spark"><path d="M0 20H60M0 0H60"
vector-effect="non-scaling-stroke"/><polyline data-part="line" vector-effect="non-scaling-stroke"/>
</svg></td></tr><tr role="row" class="more"><td role="cell" colspan="13"><details><summary>
<span class="sr" data-part="label"></span><b data-part="why"></b><span data-part="models"></span>
</summary><div class="rest"><dl><dt>Address</dt><dd data-part="url"></dd>
<dt>State</dt><dd data-part="reason"></dd></dl><dl><dt>Capacity</dt><dd data-part="capacity"></dd>
<dt>Prompt tokens it has to read</dt><dd data-part="pending_prompt_tokens"></dd>
<dt>Prompt tokens it reads per second</dt><dd data-part="prompt_tokens_per_second"></dd>
<dt>A token of an answer, with no other work</dt><dd data-part="step_ms"></dd></dl>
<div><h3>Models</h3><ul data-part="every_model"></ul></div>
<div><h3>Last errors</h3><ul data-part="last_errors"></ul></div>
<div class="wide"><h3>Last decisions</h3><ul data-part="decisions"></ul></div>
<div class="wide" hidden data-part="acts"><p class="row"><button data-act="drain">Drain</button>
<button data-act="undrain">Undrain</button><button data-act="probe">Probe now</button></p>
<p role="status" data-part="answer"></p></div></div></details></td></tr></tbody></template>
<script>
"use strict";
(() => {
const POLL_MS = 2000, GET_MS = 5000, POST_MS = 30000, SILENT_MS = 10000, STREAM_AGAIN_MS = 30000;
const $ = id => document.getElementById(id), one = tag => document.querySelector(tag);
const table = one("table"), base = location.pathname.replace(/\/status\/?$/, ""), rows = new Map();
let key = "", locked = false, last = null, source = null, timer = 0, run = 0, streamAfter = 0;

const known = v => typeof v === "number" && isFinite(v), list = v => Array.isArray(v) ? v : [];
const text = v => v === null || v === undefined ? ""  // without what turns the writing around
  : String(v).replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
const forms = [0, 1].map(d => new Intl.NumberFormat("en-US", { maximumFractionDigits: d }));
const num = (v, fine) => known(v) ? forms[fine ? 1 : 0].format(v) : "–";
const whole = v => num(v), rate = v => num(v, v < 10);
const share = v => known(v) ? num(100 * v, v < 0.1) + " %" : "–";
const wait = v => !known(v) ? "–" : v < 0.9995 ? num(1000 * v) + " ms" : num(v, v < 10) + " s";
const long = v => !known(v) ? "" : v < 60 ? `${Math.floor(v)} s` : v < 3600
  ? `${Math.floor(v / 60)} min` : v < 172800 ? `${Math.floor(v / 3600)} h `
  + `${Math.floor(v % 3600 / 60)} min` : `${Math.floor(v / 86400)} days`;
const few = (items, n) => items.slice(0, n).join(", ")
  + (items.length > n ? ` and ${items.length - n} more` : "");
const MARKS = { good: "✓", warn: "!", bad: "✕" };
const kindOf = s => /^healthy/.test(s) ? "good" : /unhealthy|open/.test(s) ? "bad" : "warn";
const TOTALS = [["Healthy", "healthy", whole], ["Queue", "queue", whole],
  ["In flight", "in_flight", whole], ["Requests/s", "requests_per_s", rate],
  ["Tokens/s", "tokens_per_s", rate], ["TTFT p50", "ttft_p50_s", wait],
  ["TTFT p95", "ttft_p95_s", wait], ["Errors", "error_ratio", share],
  ["Connections", "connections", whole]];
const FIGURES = [["Running", "running", whole], ["Waiting", "waiting", whole],
  ["Ours", "in_flight", whole], ["KV cache", "kv_usage_ratio", share],
  ["Tokens/s", "tokens_per_s", rate, "n half"], ["Errors", "errors", whole],
  ["Retries", "retries", whole], ["TTFT p50", "ttft_p50_s", wait],
  ["TTFT p95", "ttft_p95_s", wait]];

const ratio = v => share(v), GRAPHS = [["Requests/s", "requests_per_s", rate],
  ["Tokens/s", "tokens_per_s", rate], ["TTFT p50", "ttft_p50_s", wait],
  ["TTFT p95", "ttft_p95_s", wait], ["Queue", "queue", whole], ["Errors", "error_ratio", ratio]];
const says = v => text(v) || "–", host = url => says(url).replace(/^\w+:\/\//, "");
const VIEWS = { servers: null,  // its head, what a row says, and whether that is a number
  models: [d => list(d.models), [["Model", m => says(m.model)], ["State", m => says(m.state)],
    ["Servers", m => `${num(m.healthy)} of ${num(m.servers)}`, 1],
    ["Ours", m => whole(m.in_flight), 1], ["Requests/s", m => rate(m.requests_per_s), 1],
    ["Tokens/s", m => rate(m.tokens_per_s), 1], ["TTFT p50", m => wait(m.ttft_p50_s), 1],
    ["TTFT p95", m => wait(m.ttft_p95_s), 1], ["Errors", m => whole(m.errors), 1]]],
  requests: [d => list((d.requests || {}).running).concat(list((d.requests || {}).ended)),
    [["Time", r => wait(known(r.age_s) ? r.age_s : r.duration_s), 1],
    ["Server", r => host(r.server)],
    ["Model", r => says(r.model)], ["Key", r => says(r.key)], ["Tokens", r => whole(r.tokens), 1],
    ["How", r => !r.end ? r.tokens ? "runs" : "waits for its first token"
      : `${says(r.status)} ${says(r.end)}, ${long(r.ago_s) || "now"} ago`],
    ["TTFT", r => wait(r.first_s), 1], ["Id", r => says(r.id)]]],
  keys: [d => list(d.keys), [["Key", k => text(k.name) || "(no key)"],
    ["Requests", k => whole(k.requests), 1], ["Prompt tokens", k => whole(k.prompt), 1],
    ["Cached", k => whole(k.cached), 1], ["Completion", k => whole(k.completion), 1]]] };
let view = "servers", mayOperate = false;

const node = (tag, textContent, fields) =>
  Object.assign(document.createElement(tag), { textContent }, fields);
function put(where, value, kind) {  // touches only what has changed
  if (where.textContent !== value) where.textContent = value;
  if (kind !== undefined && where.className !== kind) where.className = kind;
}
function fill(where, items) {
  const entries = items.length ? items : ["none"], now = JSON.stringify(entries);
  if (where.dataset.now === now) return;
  where.dataset.now = now;
  where.replaceChildren(...entries.map(i => node("li", i.line || i, { className: i.kind || "" })));
}

function showView() {
  for (const button of $("views").children)
    button.setAttribute("aria-pressed", String(button.textContent.toLowerCase() === view));
  $("servers").hidden = view !== "servers";
  $("view").hidden = view === "servers";
  if (view === "servers" || !last) return;
  const [rowsOf, columns] = VIEWS[view], grid = node("table", "", { className: "plain" });
  const head = node("tr"), body = node("tbody"), found = rowsOf(last);
  for (const [label, , number] of columns)
    head.append(node("th", label, { scope: "col", className: number ? "n" : "" }));
  for (const item of found) {
    const line = node("tr");
    for (const [, form, number] of columns)
      line.append(node("td", form(item || {}), { className: number ? "n" : "" }));
    body.append(line);
  }
  const top = node("thead");
  top.append(head);
  grid.append(node("caption", found.length ? view[0].toUpperCase() + view.slice(1)
    : "Nothing yet"), top, body);
  $("view").replaceChildren(grid);
}

function showGraphs(fleet) {
  for (const [, name, form] of GRAPHS) {
    const values = list(fleet[name]), heights = values.map(v => known(v) ? v : 0);
    const top = Math.max(...heights, 0) || 1, at = 90 - values.length;
    $("graph-" + name).setAttribute("points",
      heights.map((v, i) => `${at + i},${(20 - 20 * v / top).toFixed(1)}`).join(" "));
    put($("now-" + name), form(values[values.length - 1]));
    put($("top-" + name), ` of ${form(values.length ? top : null)}`);
  }
}

function ordered(servers) {  // trouble first, or as one likes
  const by = $("sort").value, words = $("find").value.toLowerCase().split(/\s+/);
  const rank = s => kindOf(text(s.state)) === "bad" ? 0 : s.errors > 0 ? 1 : 2;
  const size = s => known(s[by]) ? -s[by] : 0;
  const order = by === "trouble" ? (a, b) => rank(a) - rank(b) : by === "given" ? () => 0
    : by === "name" ? (a, b) => text(a.name).localeCompare(text(b.name))
    : (a, b) => size(a) - size(b);
  return servers.filter(s => { const all = [s.name, s.state, ...list(s.models)].map(text).join(" ")
    .toLowerCase(); return words.every(w => all.includes(w)) }).sort(order);
}

function make(url) {
  const body = one("template").content.firstElementChild.cloneNode(true), part = {};
  for (const found of body.querySelectorAll("[data-part]")) part[found.dataset.part] = found;
  for (const [label, name, , className] of FIGURES) {
    part.last.before(part[name] = node("td", "", { className: className || "n" }));
    part[name].dataset.label = label;
    part[name].setAttribute("role", "cell");
  }
  part.name.addEventListener("click", () => {
    const details = body.querySelector("details");
    details.open = !details.open;
    body.classList.toggle("open", details.open);
    part.name.setAttribute("aria-expanded", String(details.open));
  });
  for (const button of body.querySelectorAll("[data-act]"))
    button.addEventListener("click", () => operate(url, button.dataset.act));
  return rows.set(url, { body, part }).get(url);
}

function showServer(url, server) {
  const row = rows.get(url) || make(url), part = row.part, since = long(server.since_s);
  const state = text(server.state) || "unknown", kind = kindOf(state), reason = text(server.reason);
  const name = text(server.name) || url, models = list(server.models).map(text);
  const ours = server.in_flight, all = known(server.running) && !server.stale
    ? server.running + (known(server.waiting) ? server.waiting : 0) : null;
  const load = all === null ? ours : Math.max(known(ours) ? ours : 0, all);
  const full = known(load) && server.capacity > 0 ? load / server.capacity : 0;
  const history = list(server.history).filter(known).slice(-60), top = Math.max(1, ...history);
  const capacity = num(server.capacity);
  const learned = known(server.capacity) && server.capacity_learned;
  Object.assign(row, { name, state, kind });
  row.body.className = kind + "-server" + (row.body.classList.contains("open") ? " open" : "");
  put(part.name, name);
  put(part.state, MARKS[kind] + " " + state, kind);
  put(part.since, since && "for " + since);
  put(part.load, `${num(load)} of ${learned ? "~" : ""}${capacity}`);
  put(part.bar, "", full >= 0.9 ? "bad" : full >= 0.7 ? "warn" : "good");
  part.bar.style.transform = `scaleX(${Math.min(1, full).toFixed(3)})`;
  for (const [, figure, form] of FIGURES) put(part[figure], form(server[figure]));
  part.errors.classList.toggle("bad", server.errors > 0);
  part.line.setAttribute("points", history.map((v, i) =>
    `${61 - history.length + i},${(20 - 20 * Math.max(0, v) / top).toFixed(1)}`).join(" "));
  part.spark.setAttribute("aria-label", history.length ? `now ${share(history[history.length - 1])}`
    + ` of capacity, at most ${share(Math.max(...history))}` : "not known");
  put(part.label, `Details of ${name}: `);
  put(part.why, [kind !== "good" && reason, server.stale && "its own figures are old"]
    .filter(Boolean).join("; "), kind === "good" ? "warn" : kind);
  put(part.models, few(models, 3) || "no models known");
  put(part.url, url);
  put(part.reason, state + (since && " for " + since) + (reason && ": " + reason));
  put(part.capacity, capacity + (learned ? ", learned" : "")
    + (learned && server.capacity_seen === false ? ": assumed, until there is traffic" : "")
    + (server.capacity_note ? "; " + text(server.capacity_note) : ""));
  put(part.pending_prompt_tokens, num(server.pending_prompt_tokens));
  put(part.prompt_tokens_per_second, num(server.prompt_tokens_per_second || null));
  put(part.step_ms, known(server.step_ms) ? server.step_ms + " ms" : "–");
  fill(part.every_model, models);
  fill(part.last_errors, list(server.last_errors).map(text));
  fill(part.decisions, list(server.decisions).map(text));
  part.acts.hidden = !mayOperate;
  const drained = /^drain/.test(state);
  part.acts.querySelector("[data-act=drain]").hidden = drained;
  part.acts.querySelector("[data-act=undrain]").hidden = !drained;
  return row.body;
}

function show(doc) {
  const servers = new Map(ordered(list(doc.servers).map(s => s || {})).map(s => [text(s.url), s]));
  const totals = doc.totals || {}, focus = document.activeElement;
  last = doc;
  mayOperate = doc.may_operate === true;
  table.classList.toggle("many", list(doc.servers).length > 9);
  showGraphs(doc.fleet || {});
  if (!$("view").matches(":hover")) showView();
  for (const [url, row] of rows) if (!servers.has(url)) row.body.remove(), rows.delete(url);
  let next = table.tBodies[0] || null;
  for (const [url, server] of servers) {
    const body = showServer(url, server);
    if (body === next) next = next.nextElementSibling; else table.insertBefore(body, next);
  }
  if (focus !== document.activeElement && focus.isConnected) focus.focus({ preventScroll: true });
  const drained = known(totals.drained) ? totals.drained : 0;
  const all = totals.servers - drained, well = totals.healthy, busy = totals.queue > 0;
  const failing = totals.error_ratio >= 0.05, healthy = `${num(well)} of ${num(all)}`;
  const line = totals.servers ? healthy + " servers healthy"
    + (drained ? `, ${num(drained)} drained` : "") : "No server is configured";
  const kind = !well ? "bad" : well < all || busy || failing ? "warn" : "good";
  put($("headline"), `${MARKS[kind]} ${line}` + (busy ? ", requests are waiting" : "")
    + (failing ? ", many requests fail" : ""), kind);
  put($("out"), few([...rows.values()].filter(r => r.kind !== "good")
    .map(r => `${r.name} (${r.state})`), 5));
  document.title = `${num(well)}/${num(all)} healthy · mvllm_lite`;
  for (const [, name, form] of TOTALS) put($("total-" + name), form(totals[name]));
  put($("total-healthy"), healthy);
  put($("version"), text(doc.version));
  put($("address"), text(doc.address));
  put($("facts"), [text(doc.time), known(doc.uptime_s) && "up " + long(doc.uptime_s),
    doc.settings && "settings " + text(doc.settings)].filter(Boolean).join(" · "));
  $("stopping").hidden = !doc.stopping;
  $("complaint").hidden = !doc.settings_error;
  put($("complaint"), doc.settings_error ? "The settings file cannot be used as it is; what was set"
    + " before stays in force.\n" + text(doc.settings_error) : "");
  fill($("events"), list(doc.events).slice(-200).reverse().map(e => e || {}).map(e => ({
    line: [e.time, e.level, e.text].map(text).join(" "),
    kind: e.level === "error" ? "bad" : e.level === "warning" ? "warn" : "" })));
  $("data").hidden = false;
}

function lost(why) {  // "" when all is well
  put($("lost"), why && why + (last ? `, data of ${text(last.time)}` : ""));
  $("lost").hidden = !why;
  document.body.classList.toggle("old", why !== "");
}
function got(raw) {
  show(JSON.parse(raw));
  lost("");
}

async function ask(method, path, limit_ms) {
  const abort = new AbortController(), late = setTimeout(() => abort.abort(), limit_ms);
  const headers = key ? { Authorization: "Bearer " + key } : {};
  try {
    const found = await fetch(base + path,
      { method, headers, cache: "no-store", signal: abort.signal });
    return { status: found.status, ok: found.ok, raw: await found.text() };
  } finally { clearTimeout(late) }
}

function start() {  // anew, or not: nobody looks at a hidden tab
  run += 1;
  clearTimeout(timer);
  if (source) source.close();
  if ($("pause").checked) lost("Paused"); else if (!document.hidden) poll(run);
}

async function poll(mine) {
  let answer = null;
  try {
    answer = await ask("GET", "/status.json", GET_MS);
    if (mine !== run) return;
    if (answer.status === 401 || answer.status === 403) return lock(answer);
    if (!answer.ok) throw new Error(answer.status);
    got(answer.raw);
    if (!locked && !key && Date.now() >= streamAfter) return stream(mine);
  } catch (error) {
    if (mine !== run) return;
    lost(answer && answer.ok ? `This page failed (${error.message})` : "Connection lost");
  }
  timer = setTimeout(poll, POLL_MS, mine);
}

function stream(mine) {  // until it fails or falls silent: then polling, and later this again
  const own = source = new EventSource(base + "/status/events"), fail = () => {
    own.close();
    if (mine !== run) return;
    clearTimeout(timer);
    streamAfter = Date.now() + STREAM_AGAIN_MS;
    poll(mine);
  };
  const awake = () => { clearTimeout(timer); timer = setTimeout(fail, SILENT_MS) };
  own.onerror = fail;
  own.onmessage = event => {
    if (mine !== run) return;
    try { got(event.data); awake() } catch (error) { fail() }
  };
  awake();
}

function lock(answer) {  // the document itself wants a key, which a stream cannot send
  locked = true;
  if (last) lost("No longer let in");
  else put($("headline"), key ? "✕ This key is not let in" : "A key is needed", "warn");
  put($("says"), key ? complaint(answer) : "The status is shown to who has a key.");
  $("key").focus();
}

function complaint(answer) {
  let found = answer.raw;
  try {
    const said = JSON.parse(found);
    found = said.error && said.error.message || said.error || said.message || found;
  } catch (error) { /* no JSON: as it is */ }
  return `${answer.status}: ${text(found).slice(0, 500)}`;
}

async function operate(url, what) {
  const { name, part } = rows.get(url);
  const path = `/admin/servers/${what}?url=${encodeURIComponent(url)}`;
  const question = `Drain ${name}?\nIt finishes what it has and gets no more.`;
  if (what === "drain" && !confirm(question)) return;
  put(part.answer, `${what}: asked …`, "");
  try {
    const answer = await ask("POST", path, POST_MS);
    if (answer.ok) put(part.answer, `${what}: done`, "good");
    else put(part.answer, `${what} failed, ${complaint(answer)}`, "bad");
  } catch (error) { put(part.answer, `${what}: no answer`, "bad") }
}

function use(typed, line) {
  key = typed;
  $("key").value = "";
  $("forget").hidden = !key;
  put($("says"), line);
  start();
}

for (const label of ["Server", "State", "Load", ...FIGURES.map(f => f[0]), "Load so far"])
  $("heads").append(node("th", label, { scope: "col", role: "columnheader",
    className: FIGURES.some(f => f[0] === label) ? "n" : "" }));
for (const name of Object.keys(VIEWS)) {
  const button = $("views").appendChild(node("button", name[0].toUpperCase() + name.slice(1)));
  button.type = "button";
  button.addEventListener("click", () => { view = name; showView() });
}
for (const [label, name] of GRAPHS) {
  const figure = $("graphs").appendChild(node("figure")), words = node("figcaption", label + " ");
  const drawn = one("template").content.querySelector("svg").cloneNode(true);
  words.append(node("b", "–", { id: "now-" + name }), node("span", "", { id: "top-" + name }));
  drawn.setAttribute("viewBox", "0 0 90 20");
  drawn.setAttribute("aria-label", label + ", the last 15 minutes");
  drawn.querySelector("path").setAttribute("d", "M0 20H90");
  drawn.querySelector("polyline").id = "graph-" + name;
  figure.append(words, drawn);
}
showView();
for (const name of ["find", "sort"])
  $(name).addEventListener("input", () => { if (last) show(last) });
for (const [label, name] of TOTALS) $("totals").appendChild(node("div"))
  .append(node("dt", label), node("dd", "–", { id: "total-" + name }));
$("raw").href = base + "/status.json";
$("unlock").addEventListener("submit", event => {
  event.preventDefault();
  const typed = $("key").value.trim();
  if (/^[\x21-\x7e]+$/.test(typed)) use(typed, "The key is used until this page is left.");
  else put($("says"), "That cannot be a key.");
});
$("forget").addEventListener("click", () => { use("", "The key is forgotten."); $("key").focus() });
$("only").addEventListener("change", () => table.classList.toggle("only", $("only").checked));
$("pause").addEventListener("change", start);
document.addEventListener("visibilitychange", start);
start();
})();
</script></body></html>
"""


@endpoint("/status", kind=Kind.PAGE)
async def get_status_page(core: Core, asked: Asked) -> Reply:
    """The page itself holds no fact of the fleet, and a browser shows no key when it opens it."""
    fields = [("Content-Security-Policy", page_policy()), ("X-Content-Type-Options", "nosniff"),
              ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store")]
    return Reply(200, STATUS_PAGE.encode(), "text/html; charset=utf-8", fields)


# ============================================================================================
#  83  reference
# ============================================================================================
#
# What `help TOPIC` prints of settings, policies, paths, errors and metrics, and `example`: from the
# declarations that serve, so that none of it can be out of date.
#
# To add a topic: a function with @topic in any room.


def table_lines(rows: Iterable[Sequence[str]], width: int = 100) -> list[str]:
    """In columns; the last is wrapped, so that no line is longer than `width`."""
    rows = list(rows)
    widths = [max(map(len, column)) + 2 for column in list(zip(*rows))[:-1]]
    indent = min(sum(widths), width * 2 // 3)
    lines = list[str]()
    for row in rows:
        start = "".join(word.ljust(size) for word, size in zip(row, widths))
        said = textwrap.wrap(row[-1], width - indent) or [""]
        if len(start) > indent:
            lines, start = [*lines, start.rstrip()], ""
        lines.append((start.ljust(indent) + said[0]).rstrip())
        lines += [" " * indent + line for line in said[1:]]
    return lines


def toml_word(value: Any) -> str:
    """A default as TOML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_word, value))}]"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_word(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return '"auto"' if field.default == AUTO and field.name in SERVER_FIELDS else (
        toml_word(field.default))


def setting_meaning(field: dataclasses.Field[Any]) -> str:
    """Its meaning; the environment variable that may give it, and when a change takes effect."""
    said = field.metadata
    return "; ".join(filter(None, (
        said["meaning"], f"environment {said['env']}" * bool(said["env"]),
        "a change takes a restart" * said["restart"])))


TABLE_MEANINGS = {
    "servers": 'the servers: a list of { url = "…", … }, or tables [[servers]]',
    "keys": "tables [[keys]]: who may come in; without any, everybody",
    "kubernetes": "tables [[kubernetes]]: pods that are servers, and keys that these have",
    "aliases": "other names for models: a name that clients use, and the model that it means",
    "policies": "another policy for one model, by its name",
    "pools": "what share of requests, in percent, the servers with that `pool` get",
    "resumes": "another `resume` for one model, by its name",
    "config": "everything else; times are in seconds",
}


@topic("settings", "every key of the settings file: its default and its meaning")
def settings_topic() -> str:
    lines = list[str]()
    for name, fields in (("servers", {**SERVER_FIELDS, **DNS_FIELDS}), ("keys", KEY_FIELDS),
                         ("kubernetes", KUBERNETES_FIELDS), ("config", CONFIG_FIELDS)):
        rows = [("  " + key, default_word(field), setting_meaning(field))
                for key, field in fields.items()]
        lines += [f"[{name}]  {TABLE_MEANINGS[name]}", *table_lines(rows), ""]
    others = [(f"[{name}]", meaning) for name, meaning in TABLE_MEANINGS.items()
              if name not in ("servers", "keys", "kubernetes", "config")]
    return "\n".join([*lines, *table_lines(others), "",
                      "A flag wins over the environment, that over the file, that over the default."
                      "  Paths in a file are", "relative to that file."])


def policy_meanings() -> list[tuple[str, str]]:
    return [(name, " ".join((kind.__doc__ or "").split())) for name, kind in POLICIES.items()]


@topic("policies", "the rules by which a server is chosen, and what a score may name")
def policies_topic() -> str:
    rows = [("  " + name, meaning) for name, meaning in policy_meanings()]
    return "\n".join([
        "[config] policy = …, or for one model a line of [policies]; the lowest is asked:",
        *table_lines(rows), "",
        *textwrap.wrap(
            f"A score is a formula of {', '.join(SCORE_NAMES)}, with arithmetic, comparisons, `a if"
            " b else c`, min, max, abs, sqrt and log.", 98)])


@topic("paths", "what is answered, by whom, and who may ask")
def paths_topic() -> str:
    rows = [("  " + method, path, f"{row.meaning} ({row.kind.meaning})")
            for path, methods in sorted(ENDPOINTS.items()) for method, row in methods.items()]
    return "\n".join([
        "Answered by the balancer itself:", *table_lines(rows), "",
        "Passed on to a server that has the model: everything under",
        *textwrap.wrap(", ".join(INFERENCE_PREFIXES) + ", and " + ", ".join(INFERENCE_PATHS), 98,
                       initial_indent="  ", subsequent_indent="  "),
        "Anything else is 404; [config] admin_paths names more, for keys with admin = true."])


@topic("resume", "how a stream whose server was lost goes on at another one, and when it does not")
def resume_topic() -> str:
    return f"""\
A stream whose server dies, freezes, sleeps, stops, ends it early, or is drained (with
drain_resume = true) goes on at another server of its model, after a pause:

  resume = "repeat" (the default): what has temperature 0, top_k 1 or a seed is asked again, and
    takes as long again; what was shown is compared and left out.  Any tools, grammars, reasoning,
    logprobs, n.  Paths: {", ".join(RESUMED_PATHS[:3])},
    and {RESUMED_PATHS[3]}, which knows no seed.
  resume = "continue" also goes on with plain text that was sampled, behind the text so far
    (continue_final_message): a fair continuation of the text, not of the tokens.  For one choice,
    without stop, min_tokens, penalties, logprobs, echo, suffix, a grammar, reasoning or a tool's
    call so far.
  resume = "off": never.  [resumes] says one of these for one model.

resume_seed = true gives a seed to each stream that could not be repeated; on GPUs, vLLM says,
generators for each request cost speed.  The stream keeps its id, and tells the usage of the whole.

It ends with an error event, which says why, where another server says something else; for what
one server keeps ({", ".join(STORED_MEMBERS)}); for media by
URL; for an engine that the client chose; after resume_within; where the last two servers broke
before anything new was shown; and where max_retries, retry_budget, resume_bytes (what is kept of
all streams) or a quarter of max_buffered_bytes (their requests) are spent.

A client refuses with X-MVLLM-Resume: off.  How it was done is said by the answer's last comment,
the log, mvllm_resumes_total and mvllm_resumes_refused_total."""


@topic("errors", "every error of the balancer's own: X-MVLLM-Error, status, blame, retries")
def errors_topic() -> str:
    rows = [("label", "status", "blamed", "another server", "type, and the setting behind it")]
    rows += [(fault.label, str(fault.status), fault.blame.value, fault.retry.value,
              ", ".join(filter(None, (fault.type_name, LIMITS.get(fault, ""))))) for fault in Fault]
    return "\n".join(table_lines(rows))


def all_families() -> list[Family]:
    """Every family of /metrics, without samples of servers."""
    now = gauges([], 0.0, Settings(), dict.fromkeys(PROCESS_GAUGES, 0.0))
    return [*Metrics().families(), *now, *watch_families((), 0.0)]


@topic("metrics", "every metric of /metrics, with its labels")
def metrics_topic() -> str:
    rows = [("  " + one.name, f"{one.meaning}  {one.kind.capitalize()}"
             + f" by {', '.join(one.labels)}" * bool(one.labels)) for one in all_families()]
    old = [f"  {old} is {new} now" for new, old in OLD_NAMES.items()]
    return "\n".join([*table_lines(rows), "", "Until 1.0 these names are there, too:", *old])


# Headings of the example, by the key that they stand before.
EXAMPLE_HEADINGS = {
    "host": "Where it listens",
    "api_key": "Keys, certificates, and who may do what",
    "policy": "How a server is chosen",
    "default_model": "What clients may do",
    "request_timeout": "Asking servers",
    "metrics_interval": "Looking at servers",
    "config_reload_interval": "Reloading, stopping, answers",
    "log_level": "Logs",
}
EXAMPLE_START = """\
# Settings of mvllm_lite.  Name your servers; everything else has the default shown.  Changes take
# effect while it runs, without losing a request.  `mvllm_lite.py example` writes this file.
#
#     python mvllm_lite.py check-config servers.toml     says what is wrong, and asks every server
#     python mvllm_lite.py servers.toml                  runs

[servers]
servers = [
"""
EXAMPLE_TABLES = """\
    { url = "http://10.0.0.1:8000", max_concurrent_requests = 16 },
    { url = "http://10.0.0.2:8000", max_concurrent_requests = 8 },
]

[aliases]
# A name that clients may use, and the model that it means.  An alias hides a model of its name.
# gpt-4o = "Qwen/Qwen3-32B"

[policies]
# Another policy for one model.
# "Qwen/Qwen3-Embedding-4B" = "least"

[resumes]
# Another `resume` for one model.
# "Qwen/Qwen3-32B" = "continue"

[pools]
# What share of requests, in percent, goes to the servers with this `pool`, as long as one of them
# can be asked; the others share the rest.  With 0 they get none at all.  Sessions stay together.
# canary = 20

[config]
# Times are in seconds.
"""


@topic("example", "a settings file with every key, its default and its meaning, to start from")
def example_topic() -> str:
    rows = [("    # " + name, setting_meaning(field) + f".  Default {default_word(field)}")
            for name, field in {**SERVER_FIELDS, **DNS_FIELDS}.items()
            if name not in ("url", "dns")]
    lines = [EXAMPLE_START.rstrip("\n"),
             "    # url: where it listens; a path prefix and a trailing /v1 are fine",
             "    # dns: in its place; each address of the name in this URL is a server"]
    lines += [line.replace(" " * 8, "    #   ", 1) if line.startswith(" " * 8) else line
              for line in table_lines(rows)]
    lines.append(EXAMPLE_TABLES.rstrip("\n"))
    for key, field in CONFIG_FIELDS.items():
        if heading := EXAMPLE_HEADINGS.get(key):
            lines += ["", f"# ── {heading} " + "─" * (94 - len(heading))]
        lines += textwrap.wrap(setting_meaning(field), 98, initial_indent="# ",
                               subsequent_indent="#   ")
        if key == "policy":
            lines += ["#   " + line for line in table_lines(
                policy_meanings(), 96)]
        lines.append(f"# {key} = {toml_word(field.default)}")
    lines += ["", "# ── " + TABLE_MEANINGS["keys"], "# [[keys]]"]
    for key, field in KEY_FIELDS.items():
        value = '"team-a"' if key == "name" else toml_word(field.default)
        lines.append(f"# {key} = {value}".ljust(30) + f" # {field.metadata['meaning']}")
    lines += ["", "# ── " + TABLE_MEANINGS["kubernetes"], "# [[kubernetes]]"]
    for key, field in KUBERNETES_FIELDS.items():
        value = '"app=vllm"' if key == "selector" else toml_word(field.default)
        lines.append(f"# {key} = {value}".ljust(30) + f" # {field.metadata['meaning']}")
    return "\n".join(lines)


# ============================================================================================
#  84  deployment
# ============================================================================================
#
# What other programs are told so that they run it and look at it: `help systemd`, `container`,
# `kubernetes`, `prometheus`, `grafana`.

COMPILE = "import py_compile; py_compile.compile('{0}.py', '{0}.pyc', doraise=True)"


@topic("systemd", "a unit, to be put at /etc/systemd/system/mvllm_lite.service")
def systemd_topic() -> str:
    return f"""\
# Logs: journalctl -u mvllm_lite, and files in /var/log/mvllm_lite.  systemctl reload has the
# settings read at once.  A new version takes over without a gap: systemctl kill -s USR2 mvllm_lite.
# For half the memory let ExecStart name a compiled file, made anew for each version of it and of
# Python:
#     python3 -c "{COMPILE.format("mvllm_lite")}"
""" + """\
[Unit]
Description=mvllm_lite, one address for a fleet of vLLM servers
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/usr/bin/python3 -I -S /opt/mvllm_lite/mvllm_lite.py /etc/mvllm_lite/servers.toml
ExecReload=/bin/kill -HUP $MAINPID
Type=notify
NotifyAccess=all
Restart=on-failure
TimeoutStopSec=40
WatchdogSec=30
Environment=LOG_DIR=/var/log/mvllm_lite
LogsDirectory=mvllm_lite
DynamicUser=yes
ProtectSystem=strict
ProtectHome=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
PrivateTmp=yes
PrivateDevices=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
SystemCallArchitectures=native
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target"""


@topic("container", "a Dockerfile, and a Compose file with two vLLM servers")
def container_topic() -> str:
    return f"""\
# Dockerfile.  The file system may be read-only (logs are on stdout); the settings are looked for at
# /config/servers.toml and, where mvllm's users mount theirs, at /app/servers.toml.  Mount the
# directory: a single mounted file does not see a new one that is put in its place by rename.
FROM python:3.13-slim
COPY mvllm_lite.py /app/mvllm_lite.py
RUN ["python", "-c", "{COMPILE.format("/app/mvllm_lite")}"]
""" + """\
USER 65534:65534
EXPOSE 8888
HEALTHCHECK --interval=10s --timeout=3s CMD ["python", "-c", "import urllib.request as u; \
u.urlopen('http://127.0.0.1:8888/readiness', timeout=2)"]
ENTRYPOINT ["python", "-I", "-S", "/app/mvllm_lite.pyc"]

# compose.yaml
services:
  mvllm_lite:
    build: .
    ports: ["8888:8888"]
    volumes: ["./config:/config:ro"] # the directory, so that a file put in place by rename is seen
    environment: { LOG_DIR: /tmp/logs }
    read_only: true
    tmpfs: ["/tmp"]
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
    stop_grace_period: 40s
    restart: unless-stopped
  vllm-a:
    image: vllm/vllm-openai:latest
    command: ["--model", "Qwen/Qwen3-0.6B"]
  vllm-b:
    image: vllm/vllm-openai:latest
    command: ["--model", "Qwen/Qwen3-0.6B"]"""


KUBERNETES = """\
# The ConfigMap may be edited in place: the change is seen within config_reload_interval after the
# kubelet has swapped the link.  With one replica the disruption budget holds up a node's drain
# until somebody allows it; with two, each balancer counts its own requests and learns of the
# other's from the servers' reports.
apiVersion: v1
kind: ConfigMap
metadata: { name: mvllm-lite }
data:
  servers.toml: |
    [[kubernetes]]
    selector = "app=vllm"     # labels of the pods that run vLLM
    namespace = "default"     # where they are; without it everywhere, which takes a ClusterRole
    port = 8000
    max_concurrent_requests = 16

    [config]
    log_dir = ""
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: mvllm-lite }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role # in the namespace of the pods
metadata: { name: mvllm-lite, namespace: default }
rules:
  - { apiGroups: [""], resources: ["pods"], verbs: ["get", "list", "watch"] }
  - apiGroups: ["discovery.k8s.io"] # for `service` in place of `selector`
    resources: ["endpointslices"]
    verbs: ["get", "list", "watch"]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: mvllm-lite, namespace: default }
subjects: [{ kind: ServiceAccount, name: mvllm-lite, namespace: default }]
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: mvllm-lite }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: mvllm-lite }
spec:
  replicas: 1
  selector: { matchLabels: { app: mvllm-lite } }
  template:
    metadata: { labels: { app: mvllm-lite } }
    spec:
      serviceAccountName: mvllm-lite
      terminationGracePeriodSeconds: 40
      containers:
        - name: mvllm-lite
          image: mvllm-lite
          lifecycle:
            preStop: # until the endpoint is gone everywhere, requests still come
              exec: { command: ["sleep", "5"] }
          ports: [{ containerPort: 8888 }]
          readinessProbe: { httpGet: { path: /readiness, port: 8888 } }
          livenessProbe: { httpGet: { path: /liveness, port: 8888 } }
          securityContext: { readOnlyRootFilesystem: true, runAsNonRoot: true, runAsUser: 65534 }
          volumeMounts: [{ name: config, mountPath: /config }]
      volumes:
        - name: config
          configMap: { name: mvllm-lite }
---
apiVersion: v1
kind: Service
metadata: { name: mvllm-lite }
spec:
  selector: { app: mvllm-lite }
  ports: [{ port: 80, targetPort: 8888 }]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: { name: mvllm-lite }
spec:
  minAvailable: 1
  selector: { matchLabels: { app: mvllm-lite } }
---
# KEDA scales vLLM by the requests that wait in the balancer (with a queue_size; without one the
# servers queue for themselves: sum(mvllm_server_num_requests_waiting)).
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: { name: vllm }
spec:
  scaleTargetRef: { name: vllm }
  minReplicaCount: 1
  maxReplicaCount: 8
  cooldownPeriod: 300
  triggers:
    - type: prometheus
      metadata:
        serverAddress: http://prometheus:9090
        query: sum(mvllm_queue_length)
        threshold: "4" # waiting requests for each replica"""


@topic("kubernetes", "ConfigMap, account and role, Deployment, Service, disruption budget, KEDA")
def kubernetes_topic() -> str:
    return KUBERNETES


SCRAPE = """\
scrape_configs:
  - job_name: mvllm_lite
    scrape_interval: 15s
    static_configs:
      - targets: ["mvllm-lite:8888"]

# rules.yaml
groups:
  - name: mvllm_lite
    rules:"""
ALERTS = (  # name, expression, for how long, severity, what it says
    ("Down", 'up{job="mvllm_lite"} == 0', "1m", "critical",
     "The balancer {{ $labels.instance }} does not answer"),
    ("NoServer", "sum by (instance) (mvllm_server_healthy) == 0", "1m", "critical",
     "No vLLM server can be asked"),
    ("ServerOut", "mvllm_server_healthy == 0", "5m", "warning",
     "{{ $labels.server }} has been out for five minutes"),
    ("Errors", 'sum by (instance) (rate(mvllm_requests_total{status=~"5.."}[5m])) > 0.05 *'
     " sum by (instance) (rate(mvllm_requests_total[5m]))", "5m", "warning",
     "More than 5 % of the requests fail"),
    ("Slow", "histogram_quantile(0.95, sum by (le, model)"
     " (rate(mvllm_time_to_first_token_seconds_bucket[5m]))) > 10", "10m", "warning",
     "{{ $labels.model }}: one stream in twenty begins after 10 s"),
    ("Refuses", 'rate(mvllm_limits_met_total{limit=~"max_requests|max_buffered_bytes|queue_size|'
     'queue_timeout|descriptors"}[5m]) > 0', "5m", "warning",
     "Requests are refused: {{ $labels.limit }} is met"),
    ("Settings", "mvllm_settings_valid == 0", "5m", "warning",
     "The settings file cannot be used; the old settings are in force"),
    ("Mistake", "increase(mvllm_internal_errors_total[15m]) > 0", "0m", "warning",
     "A mistake of the balancer's own; its error log has the details"),
)


@topic("prometheus", "the job that scrapes it, and alerts")
def prometheus_topic() -> str:
    return "\n".join(["# prometheus.yaml", SCRAPE, *(f"""\
      - alert: MvllmLite{name}
        expr: |
          {expression}
        for: {wait}
        labels: {{ severity: {severity} }}
        annotations: {{ summary: "{summary}" }}"""
        for name, expression, wait, severity, summary in ALERTS)])


QUANTILE = "histogram_quantile({}, sum by (le) (rate({}_bucket[5m])))".format
PANELS = (  # title, unit, (expression, legend) of each line
    ("Requests by status", "reqps", ("sum by (status) (rate(mvllm_requests_total[1m]))",
                                     "{{status}}")),
    ("Requests by server", "reqps", ("sum by (server) (rate(mvllm_requests_total[1m]))",
                                     "{{server}}")),
    ("Failed attempts", "reqps",
     ('sum by (server, result) (rate(mvllm_attempts_total{result!~"ok|abandoned"}[5m]))',
      "{{server}} {{result}}"), ("sum by (reason) (rate(mvllm_retries_total[5m]))",
                                 "retried {{reason}}")),
    ("Time to first token", "s",
     *((QUANTILE(share, "mvllm_time_to_first_token_seconds"), f"p{share * 100:g}")
       for share in (0.5, 0.95, 0.99))),
    ("Between tokens", "s", *((QUANTILE(share, "mvllm_inter_token_latency_seconds"),
                               f"p{share * 100:g}") for share in (0.5, 0.95))),
    ("Requests in flight", "short", ("mvllm_requests_in_flight", "{{server}}"),
     ("mvllm_server_num_requests_waiting", "waiting at {{server}}")),
    ("KV cache", "percentunit", ("mvllm_server_kv_cache_usage_ratio", "{{server}}")),
    ("Servers that can be asked", "short", ("sum(mvllm_server_healthy)", "healthy"),
     ("sum(mvllm_server_circuit_open)", "circuit open"), ("sum(mvllm_server_asleep)", "asleep")),
    ("Queue", "short", ("mvllm_queue_length", "waiting here"),
     (QUANTILE(0.95, "mvllm_request_queue_time_seconds"), "p95 of the wait, s")),
    ("Tokens", "short", ("sum by (model, kind) (rate(mvllm_usage_tokens_total[1m]))",
                         "{{model}} {{kind}}")),
    ("Prefix cache hits", "percentunit",
     ("sum(rate(mvllm_prefix_cache_hit_tokens_total[5m]))"
      " / sum(rate(mvllm_prompt_tokens_total[5m]))", "by the servers' word"),
     ("sum(rate(mvllm_prefix_cache_expected_tokens_total[5m]))"
      " / sum(rate(mvllm_prompt_tokens_total[5m]))", "expected")),
    ("Limits met", "short", ("sum by (limit) (increase(mvllm_limits_met_total[5m])) > 0",
                             "{{limit}}")),
)


@topic("grafana", "a dashboard as JSON, to be imported")
def grafana_topic() -> str:
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [{
        "id": n + 1, "type": "timeseries", "title": title, "datasource": source,
        "gridPos": {"x": n % 3 * 8, "y": n // 3 * 8, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": chr(65 + i), "expr": expression, "legendFormat": legend,
                     "datasource": source} for i, (expression, legend) in enumerate(lines)],
    } for n, (title, unit, *lines) in enumerate(PANELS)]
    return json.dumps({
        "title": "mvllm_lite", "uid": "mvllm-lite", "schemaVersion": 39, "refresh": "15s",
        "tags": ["vllm"], "time": {"from": "now-1h", "to": "now"}, "panels": panels,
        "templating": {"list": [{"name": "datasource", "type": "datasource",
                                 "query": "prometheus", "label": "Data source"}]},
    }, indent=1)


# ━━━ part XIII: laboratory ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━


# ============================================================================================
#  85  traces
# ============================================================================================
#
# Requests of the past, from a file: our own, or what others have published; and made-up ones for
# who has none.

AZURE_COLUMNS = "TIMESTAMP,ContextTokens,GeneratedTokens"
MOONCAKE_BLOCK = 512  # prompt tokens of a hash id


class Arrival(NamedTuple):
    """A request of a trace: when it came, and how much work it was."""

    at_s: float  # since the first
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()  # hashes of ever longer starts of the prompt
    hash_ends: Sequence[int] = ()  # the tokens up to each link's end; may be longer than the chain
    model: str | None = None
    session: str = ""


class Torn(ValueError):
    """A line that is not JSON, perhaps because it is still being written."""


def read_arrivals(lines: Iterable[str], source: str) -> list[Arrival]:
    """A trace, by time: one of our own, of Mooncake's or of Azure's.  A ValueError names the line
    that is wrong.  The last one of our own may be half written, and is then left out."""
    arrivals, read, torn = list[Arrival](), None, ""
    for number, line in enumerate(lines, 1):
        if torn:
            raise ValueError(torn)
        if not line.strip():
            continue
        try:
            read = read or reader_for(line)
            arrivals += read(line)
        except ValueError as wrong:
            torn = f"{source}:{number}: {wrong}"
            if read is not trace_arrivals or not isinstance(wrong, Torn):
                raise ValueError(torn) from None
    if not arrivals:
        raise ValueError(torn or f"{source}: found no requests, expected some to replay")
    if read is mooncake_arrivals:
        arrivals = spread(arrivals)
    arrivals.sort(key=lambda arrival: arrival.at_s)
    return [arrival._replace(at_s=arrival.at_s - arrivals[0].at_s) for arrival in arrivals]


def reader_for(line: str) -> Callable[[str], list[Arrival]]:
    """What reads a trace that begins with this line."""
    if line.startswith(AZURE_COLUMNS):
        return azure_arrivals
    said = json_object(line) if line.startswith("{") else {}
    if "hash_ids" in said:
        return mooncake_arrivals
    if "prompt_tokens" in said:
        return trace_arrivals
    raise ValueError(f"found {line.strip()[:60]!r}, expected a line of trace.jsonl, of a Mooncake "
                     f"trace, or {AZURE_COLUMNS}")


def trace_arrivals(line: str) -> list[Arrival]:
    """What we write ourselves.  Requests that were refused made no work, and are left out."""
    said = json_object(line)
    model, output = said.get("model"), whole_number(said, "output_tokens")
    if not isinstance(at := said.get("at"), int | float) or not math.isfinite(at):
        raise ValueError(f"at is {at!r:.60}, expected seconds")
    chain, ends = whole_numbers(said, "chain"), whole_numbers(said, "ends")
    if len(ends) < len(chain) or any(b <= a for a, b in itertools.pairwise((0, *ends))):
        raise ValueError(f"ends is {list(ends)!r:.60}, expected more tokens for each link")
    if whole_number(said, "status") != 200 and not output:
        return []
    model = None if model is None else str(model)
    return [Arrival(at, whole_number(said, "prompt_tokens"), output, chain, ends, model,
                    str(said.get("session", "")))]


def mooncake_arrivals(line: str) -> list[Arrival]:
    said = json_object(line)
    prompt, chain = whole_number(said, "input_length"), whole_numbers(said, "hash_ids")
    ends = [*range(MOONCAKE_BLOCK, prompt, MOONCAKE_BLOCK), prompt]
    if len(chain) != len(ends):
        raise ValueError(f"hash_ids are {len(chain)}, expected {len(ends)} for {prompt} tokens")
    at_s = whole_number(said, "timestamp") / 1000
    return [Arrival(at_s, prompt, whole_number(said, "output_length"), chain, ends)]


def azure_arrivals(line: str) -> list[Arrival]:
    if line.startswith(AZURE_COLUMNS):
        return []
    try:
        when, prompt, output = line.split(",")
        at = datetime.datetime.fromisoformat(when).replace(tzinfo=datetime.UTC)
        if min(tokens := (int(prompt), int(output))) >= 0:
            return [Arrival(at.timestamp(), *tokens)]
    except ValueError:
        pass
    raise ValueError(f"found {line.strip()[:60]!r}, expected {AZURE_COLUMNS}")


def json_object(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        raise Torn(f"found {line.strip()[:60]!r}, expected JSON") from None
    if isinstance(said, dict):
        return said
    raise ValueError(f"found {line.strip()[:60]!r}, expected a JSON object")


def whole_number(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r:.60}, expected a whole number")
    return value


def whole_numbers(said: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = said.get(name)
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"{name} is {values!r:.60}, expected a list of whole numbers")
    return tuple(values)


def spread(arrivals: list[Arrival]) -> list[Arrival]:
    """Those of one stamp evenly over the time to the next, so that they do not come as a burst
    that never was.  Mooncake stamps every 3 s, give or take a millisecond."""
    arrivals = sorted(arrivals, key=lambda arrival: arrival.at_s)
    groups = [list(group) for _, group in itertools.groupby(arrivals, lambda a: a.at_s)]
    gaps = sorted(b[0].at_s - a[0].at_s for a, b in itertools.pairwise(groups))
    step_s = gaps[len(gaps) // 2] if gaps else 0.0
    return [arrival._replace(at_s=arrival.at_s + step_s * n / len(group))
            for group in groups for n, arrival in enumerate(group)]


def adapted(arrivals: Sequence[Arrival], speedup: float, limit: int | None) -> list[Arrival]:
    """The first ones, as many, coming so much faster."""
    return [arrival._replace(at_s=arrival.at_s / speedup) for arrival in arrivals[:limit]]


class MadeUp(NamedTuple):
    """Traffic for who has recorded none."""

    rate: float  # requests per second
    asked: tuple[float, float, float]  # tokens of a question: median, sigma of its logarithm, most
    answered: tuple[float, float, float]
    shared: tuple[int, ...] = ()  # tokens of beginnings that many prompts have, the commonest first
    turns: float = 1.0  # of a conversation, on average
    think_s: float = 12.0  # between two of them


MADE_UP = {
    "chat": MadeUp(100, (160, 0.9, 2000), (170, 0.8, 1024)),
    "sessions": MadeUp(33, (70, 0.8, 1500), (170, 0.7, 900), (1500, 800, 400, 2400), 6),
    "documents": MadeUp(34, (60, 0.7, 600), (120, 0.7, 600), tuple(range(1200, 4800, 24))),
    "agents": MadeUp(8, (900, 0.9, 8000), (90, 0.8, 1000), (6000, 9000, 4000), 15, 3.0),
}


def made_up(kind: MadeUp, seconds: float, draw: random.Random) -> list[Arrival]:
    """Arrivals by chance: conversations whose prompts repeat all that was said before."""

    def length(of: tuple[float, float, float]) -> int:
        return int(min(of[2], max(4.0, of[0] * math.exp(draw.gauss(0, of[1])))))

    out, number, at_s = list[Arrival](), 0, -kind.turns * kind.think_s
    shares = [1 / n for n in range(1, len(kind.shared) + 1)]
    while at_s < seconds:
        at_s, number, now_s = at_s + draw.expovariate(kind.rate / kind.turns), number + 1, at_s
        begin = draw.choices(range(len(kind.shared)), shares)[0] if shares else 0
        said = kind.shared[begin] if shares else 0
        common = said
        while said < 30_000:
            prompt, answer = said + length(kind.asked), length(kind.answered)
            ends = range(64, prompt + 1, 64)
            chain = tuple(hash((begin, n)) if end <= common else hash((number, "own", n))
                          for n, end in enumerate(ends)) if said or kind.turns > 1 else ()
            if 0 <= now_s < seconds:
                out.append(Arrival(now_s, prompt, answer, chain, ends, None, str(number)))
            said, now_s = prompt + answer, now_s + 1 + 0.03 * answer + draw.expovariate(
                1 / kind.think_s)
            if draw.random() < 1 / kind.turns:
                break
    return sorted(out)


# ============================================================================================
#  86  engine
# ============================================================================================
#
# A model of a vLLM server, in simulated time: continuous batching, prompts in chunks, a prefix
# cache, a queue.  Nothing here is drawn by lot.

EVEN_CONTEXT = 30_000  # tokens; attending to so many costs as much as the layers themselves do


class EngineKind(NamedTuple):
    """A GPU with its vLLM: what a step of the engine takes, and what fits into it."""

    capacity: float  # what an operator would set as max_concurrent_requests
    step_s: float  # of every step, for scheduling and sampling
    weights_s: float  # to read the weights; hidden as far as the step computes for longer
    token_s: float  # to compute a token, of a prompt or of an answer
    sequence_s: float  # for each sequence in the step
    context_s: float  # to read one token from the KV cache, for the sequences that decode
    kv_tokens: int
    max_num_seqs: int
    batched_tokens: int  # vLLM's max_num_batched_tokens: computed in one step

    def duration_s(self, sequences: int, tokens: int, context: int, attended: float) -> float:
        """Of a step: a smooth roofline of reading and computing, and what comes on top."""
        roofline = math.hypot(self.weights_s, self.token_s * tokens)
        attention = self.token_s * attended / EVEN_CONTEXT
        return (self.step_s + roofline + attention + self.sequence_s * sequences
                + self.context_s * context)


# Llama-3.1-8B on one GPU, in BF16 if not said otherwise.  The weights' and tokens' times are the
# kernels that microsoft/vidur measured on A100, H100 and A40; those of steps and sequences were
# set so that one stream and a full server run as fast as published runs of vLLM do.  Reading the
# KV cache goes at 80 % of the memory's speed; its size is 90 % of the memory less weights and
# 3 GB, on the 4090 as vLLM says it.  The l4 and h200-fp8 are scaled by data sheets only.
ENGINE_KINDS = {
    "h100": EngineKind(192, 1.5e-3, 5.0e-3, 25e-6, 20e-6, 49e-9, 424_000, 1024, 8192),
    "a100": EngineKind(96, 2.5e-3, 9.7e-3, 70e-6, 30e-6, 80e-9, 424_000, 256, 2048),
    "a100-40": EngineKind(80, 2.5e-3, 12.0e-3, 70e-6, 30e-6, 105e-9, 136_000, 256, 2048),
    "a40": EngineKind(48, 2.5e-3, 25.0e-3, 150e-6, 40e-6, 235e-9, 192_000, 256, 2048),
    "4090": EngineKind(40, 2.5e-3, 16.0e-3, 140e-6, 50e-6, 163e-9, 31_200, 256, 2048),
    "l4": EngineKind(20, 2.5e-3, 56.0e-3, 200e-6, 50e-6, 546e-9, 31_200, 256, 2048),
    "h200-fp8": EngineKind(320, 1.5e-3, 2.2e-3, 14e-6, 20e-6, 34e-9, 864_000, 1024, 8192),
}


def kind_for(capacity: float) -> EngineKind:
    """For a server of which only this is known: an a100, so much faster or slower."""
    kind = ENGINE_KINDS["a100"]
    slow = kind.capacity / capacity
    return kind._replace(
        capacity=capacity, step_s=kind.step_s * slow, weights_s=kind.weights_s * slow,
        token_s=kind.token_s * slow, sequence_s=kind.sequence_s * slow,
        context_s=kind.context_s * slow)


class EngineReport(NamedTuple):
    """What a server would say in /metrics."""

    running: int
    waiting: int
    kv_usage_ratio: float
    generation_tokens: int
    prompt_tokens: int
    prefix_queries: int  # prompt tokens looked for in the prefix cache
    prefix_hits: int  # and found
    kv_tokens: int  # that there is room for


Link = int | tuple[int]  # of a chain; or (number,), what else a request has computed


class KvCache:
    """The tokens in a server's memory: of running requests, and, while there is room, of links
    that may be asked for again."""

    def __init__(self, room: int):
        self.room, self.used, self.spare = room, 0, 0
        self.sizes: dict[Link, int] = {}  # tokens of each link
        self._users: dict[Link, int] = {}  # requests that need it
        self._idle: OrderedDict[Link, None] = OrderedDict()  # nobody does; the oldest first

    def take(self, tokens: int) -> None:
        """For a running request; what was not needed for the longest is forgotten for it."""
        self.used += tokens
        while (lack := self.used + self.spare - self.room) > 0:
            oldest = next(iter(self._idle))
            if isinstance(oldest, tuple) and self.sizes[oldest] > lack:
                self.sizes[oldest] -= lack  # nobody looks for a part of a link, but of a rest
                self.spare -= lack
            else:
                self.forget(oldest)

    def forget(self, link: Link) -> None:
        del self._idle[link]
        self.spare -= self.sizes.pop(link)

    def name(self, link: Link, size: int) -> None:
        """Tokens that a request has taken can be found from now on."""
        self.sizes[link], self._users[link] = size, 1

    def keep(self, link: Link, size: int) -> None:
        """They are not needed any more, but may be."""
        self.sizes[link], self._idle[link] = size, None
        self.used, self.spare = self.used - size, self.spare + size

    def idle_tokens(self, links: Iterable[Link]) -> int:
        """What of these is not used yet."""
        return sum(self.sizes[link] for link in links if link in self._idle)

    def hold(self, links: Iterable[Link]) -> None:
        """A request needs these."""
        for link in links:
            if link in self._idle:
                del self._idle[link]
                self.used, self.spare = self.used + self.sizes[link], self.spare - self.sizes[link]
            self._users[link] = self._users.get(link, 0) + 1

    def free(self, links: Sequence[Link]) -> None:
        """Those at the end will be forgotten first: without a start they are of no use."""
        for link in reversed(links):
            self._users[link] -= 1
            if not self._users[link]:
                del self._users[link]
                self.keep(link, self.sizes[link])


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """A request inside an engine."""

    number: int  # of its arrival
    arrival: Arrival
    need: int = 0  # tokens to compute before the next one of the answer comes out
    done: int = 0  # of these; then, what is in the KV cache
    said: int = 0  # tokens of the answer
    links: list[Link] = dataclasses.field(default_factory=list)  # that it holds
    own: int = 0  # tokens that it holds besides
    passed: int = 0  # links of its chain that are computed, by whomever
    reach: int = 0  # tokens up to the last of them
    since: int = 0  # the engine's clock when it began to decode
    last: int = 0  # and when it will be finished
    cached: int | None = None  # tokens found when it was first admitted
    first_s: float = INFINITY
    last_s: float = INFINITY


class Engine:
    """A vLLM server: requests are admitted in their order, prompts computed in chunks, and the
    youngest starts over when there is no more room.

    It goes in stretches: of one step, or of many through which nothing changes but that answers
    grow.  `longest` limits them, to check that they make no difference.
    """

    def __init__(self, kind: EngineKind, longest: float = INFINITY):
        self.kind, self.longest, self.cache = kind, longest, KvCache(kind.kv_tokens)
        self.waiting = deque[Job]()
        self.running: dict[int, Job] = {}  # by number, the oldest first
        self.reading: dict[int, Job] = {}  # of these, whose prompt is not computed yet
        self.ends_s = INFINITY  # of the stretch; idle
        self.preemptions = 0
        self._clock = 0  # steps that have ended
        self._decoding = self._context = 0  # requests that decode, and their tokens
        self._finishes: list[tuple[int, int]] = []  # heap of (clock, number); some were put off
        self._chunks: list[tuple[Job, int]] = []  # computed in this stretch, in its only step
        self._steps = 0  # of the stretch
        self._begun_s = self._step_s = self._growth_s = 0.0  # each step takes that much longer
        self._generated = self._prompted = self._queries = self._hits = 0

    def add(self, job: Job, now: float) -> bool:
        """Take a request, which is looked at when the step under way has ended.  What can never
        be served is refused, as vLLM does."""
        job.need = max(1, job.arrival.prompt_tokens)
        if job.need + max(1, job.arrival.output_tokens) > self.cache.room:
            return False
        self.waiting.append(job)
        if self.ends_s == INFINITY:
            self._begin(now)
        elif len(self.waiting) == 1:  # others wait for the end of the stretch in any case
            self._plan(min(self._steps, self._steps_by(now) + 1))
        return True

    def end(self) -> tuple[list[Job], list[Job]]:
        """End the stretch and begin the next: whose answer has begun, and whose is complete."""
        now, begun, complete = self.ends_s, list[Job](), list[Job]()
        self.cache.take(self._decoding * (self._steps - 1))
        self._context += self._decoding * self._steps
        self._generated += self._decoding * self._steps
        self._clock += self._steps
        while self._finishes and self._finishes[0][0] <= self._clock:
            job = self.running.get(heapq.heappop(self._finishes)[1])
            if job is not None and job.last == self._clock:
                complete.append(job)
        for job, tokens in self._chunks:
            job.done += tokens
            self._name_links(job)
            if job.done == job.need:
                self._decode(job)
                if job.first_s == INFINITY:
                    job.first_s = now
                    self._prompted += job.arrival.prompt_tokens
                    begun.append(job)
                if job.last == self._clock:
                    complete.append(job)
        for job in complete:
            job.last_s = now
            self._release(job)
        self._begin(now)
        return begun, complete

    def report(self, now: float) -> EngineReport:
        """Its load, in the middle of a stretch."""
        grown = self._decoding * self._steps_by(now) if self._steps > 1 else 0
        return EngineReport(
            len(self.running), len(self.waiting), (self.cache.used + grown) / self.cache.room,
            self._generated + grown, self._prompted, self._queries, self._hits,
            self.cache.room)

    def _begin(self, now: float) -> None:
        """Schedule a step in vLLM's order, and with it as many as are like it."""
        preemptions = self.preemptions
        while self._lacks(0):
            self._preempt()
        self._chunks, left = [], self.kind.batched_tokens - self._decoding
        for job in list(self.reading.values()):
            tokens = min(job.need - job.done, left)
            while self._lacks(tokens) and job.number in self.reading:
                self._preempt()
            if tokens > 0 and job.number in self.reading:
                left -= self._read(job, tokens)
        places = 0 if self.preemptions > preemptions else self.kind.max_num_seqs
        while self.waiting and left > 0 and len(self.running) < places:
            if not (tokens := self._admit(self.waiting[0], left)):
                break
            left -= tokens
        self.cache.take(self._decoding)
        self._begun_s, self._growth_s = now, self.kind.context_s * self._decoding
        self._step_s = self.kind.duration_s(
            self._decoding + len(self._chunks), self.kind.batched_tokens - left, self._context,
            sum(tokens * (job.done + tokens / 2) for job, tokens in self._chunks))
        if not self.running:
            self.ends_s, self._steps = INFINITY, 0
        elif self._chunks or self.preemptions > preemptions:
            self._plan(1)
        else:
            steps = 1 + (self.cache.room - self.cache.used) // self._decoding
            self._plan(min(steps, self._finishes[0][0] - self._clock, self.longest))

    def _plan(self, steps: float) -> None:
        self._steps = int(steps)
        self.ends_s = self._begun_s + steps * (self._step_s + self._growth_s * (steps - 1) / 2)

    def _steps_by(self, now: float) -> int:
        """How many steps of the stretch have ended: the sum in `_plan`, solved for the steps."""
        gone_s, half_s = now - self._begun_s, self._step_s - self._growth_s / 2
        return int(2 * gone_s / (half_s + math.sqrt(half_s**2 + 2 * self._growth_s * gone_s)))

    def _lacks(self, tokens: int) -> bool:
        """Whether there is no room for these and one more of each request that decodes."""
        return self.cache.used + self._decoding + tokens > self.cache.room

    def _admit(self, job: Job, left: int) -> int:
        """Let the first one waiting run if there is room for all its prompt, as vLLM does by
        default (scheduler_reserve_full_isl); how much of it is computed in this step."""
        links, found, sizes = list[Link](), 0, self.cache.sizes
        for link in job.arrival.prefix_hashes:
            if found + sizes.get(link, job.need) >= job.need:  # one token has to be computed
                break
            links.append(link)
            found += sizes[link]
        rest, kept = (job.number,), 0  # from before it was preempted
        if rest in sizes and found == job.reach:
            kept = min(sizes[rest], job.need - 1 - found)
        if self._lacks(self.cache.idle_tokens(links) + job.need - found):
            return 0
        if rest in sizes:
            self.cache.forget(rest)
        self.cache.hold(links)
        self.cache.take(kept)
        job.links, job.passed, job.reach = links, len(links), found
        job.own, job.done = kept, found + kept
        if job.cached is None:
            job.cached = found
            self._queries += job.arrival.prompt_tokens
            self._hits += found
        self.running[job.number] = self.reading[job.number] = self.waiting.popleft()
        return self._read(job, min(job.need - job.done, left))

    def _read(self, job: Job, tokens: int) -> int:
        """Compute a chunk of a prompt in this step."""
        self.cache.take(tokens)
        job.own += tokens
        self._chunks.append((job, tokens))
        return tokens

    def _name_links(self, job: Job) -> None:
        """What was computed of a prompt can be found from now on."""
        chain, ends = job.arrival.prefix_hashes, job.arrival.hash_ends
        while job.passed < len(chain) and ends[job.passed] <= job.done:
            link, size = chain[job.passed], ends[job.passed] - job.reach
            if link not in self.cache.sizes and size > 0:
                self.cache.name(link, size)
                job.links.append(link)
                job.own -= size
            job.passed, job.reach = job.passed + 1, job.reach + max(0, size)

    def _decode(self, job: Job) -> None:
        """Its prompt is computed, and with that a token of its answer."""
        del self.reading[job.number]
        job.said, job.since = job.said + 1, self._clock
        job.last = self._clock + max(1, job.arrival.output_tokens) - job.said
        if job.last > self._clock:
            heapq.heappush(self._finishes, (job.last, job.number))
        self._generated += 1
        self._decoding += 1
        self._context += job.done

    def _release(self, job: Job) -> None:
        """It does not run any more; what it computed is kept as long as there is room."""
        del self.running[job.number]
        if self.reading.pop(job.number, None) is None:
            steps = self._clock - job.since
            job.said, job.done, job.own = job.said + steps, job.done + steps, job.own + steps
            self._decoding -= 1
            self._context -= job.done
        if job.own:
            self.cache.keep((job.number,), job.own)
        self.cache.free(job.links)

    def _preempt(self) -> None:
        """The youngest leaves its room to the others, and waits to be computed again."""
        job = next(reversed(self.running.values()))
        self._release(job)
        job.need, job.last = job.arrival.prompt_tokens + job.said, 0
        self.waiting.appendleft(job)
        self.preemptions += 1


# ============================================================================================
#  87  replay
# ============================================================================================
#
# Requests of the past, sent once more to a fleet that is only modelled: what would another policy
# have done, or one more server?  Its times are those of a model: compare the rows of one table,
# and nothing else.

NETWORK_S = 0.002  # one way, with what the balancer takes
PATIENCE_S = 60.0  # with a router that holds requests while nothing is in flight


class Router(Protocol):
    """Who sends each request to a server; arrivals and servers are known by their numbers."""

    def choose(self, number: int, arrival: Arrival, now: float) -> int | None:
        """The server that it is sent to now; None holds it in the queue."""

    def first_token(self, number: int, now: float) -> None: ...

    def finished(self, number: int, now: float) -> None: ...

    def scraped(self, server: int, report: EngineReport, now: float) -> None: ...


class PolicyRouter:
    """The balancer's own choice in a replay: the same fleet, the same ranking, the same queue."""

    def __init__(self, s: Settings, draw: random.Random) -> None:
        self.settings, self.draw, self.fleet = s, draw, Fleet()
        self.fleet.apply(s.servers, 0.0, s.pools)
        for server in s.servers:
            self.fleet.judge(server.id, Health.become, State.HEALTHY, "", 0.0)
        self.urls = [view.id for view in self.fleet.views()]
        self.policies, self.leases = Policies(s), dict[int, Lease]()
        self.arrivals = dict[int, Arrival]()  # of those leases

    def choose(self, number: int, arrival: Arrival, now: float) -> int | None:
        s = self.settings
        opening = repr(arrival.prefix_hashes[:1]).encode() if arrival.prefix_hashes else b""
        prompt = Prompt(
            arrival.prompt_tokens, arrival.prefix_hashes, arrival.hash_ends, per_token=1,
            first_hash=opening)
        call = Call(arrival.model, True, prompt, arrival.session)
        by = self.policies.get(arrival.model, arrival.model or "")
        moment = Moment(now, s.metrics_interval, s.queue_size > 0, s.slow_start)
        ranking = rank(self.fleet, Wanted(call), by, moment, self.draw)
        if ranking.asked is None:
            return None
        by.chosen(ranking.asked)
        self.leases[number], self.arrivals[number] = (
            self.fleet.lease(ranking.asked.id, now, prompt), arrival)
        return self.urls.index(ranking.asked.id)

    def first_token(self, number: int, now: float) -> None:
        self.leases[number].answered(now, True)

    def finished(self, number: int, now: float) -> None:
        lease, arrival = self.leases.pop(number), self.arrivals.pop(number)
        lease.complete(now, arrival.output_tokens, arrival.model)
        lease.end(now)

    def scraped(self, server: int, report: EngineReport, now: float) -> None:
        url = self.urls[server]
        load = EngineLoad(
            report.running, report.waiting, report.kv_usage_ratio,
            tokens=report.prompt_tokens + report.generation_tokens,
            generation_tokens=report.generation_tokens, prefix_hits=report.prefix_hits,
            kv_tokens=report.kv_tokens)
        self.fleet.scraped(url, load, self.fleet.in_flight(url), now)


class Record(NamedTuple):
    """What became of an arrival.  Without an answer its times are infinite."""

    arrival: Arrival
    server: int = -1  # -1: it was never sent to one
    cached_tokens: int = 0
    ttft_s: float = INFINITY
    total_s: float = INFINITY

    @property
    def token_s(self) -> float:
        """Between two tokens of the answer."""
        return (self.total_s - self.ttft_s) / max(1, self.arrival.output_tokens - 1)


class Replay:
    """Arrivals, engines and a router in simulated time; `run` it once."""

    def __init__(
        self, arrivals: Sequence[Arrival], engines: Sequence[Engine], router: Router,
        interval_s: float, progress: Callable[[float], None] = lambda share: None,
    ):
        self.arrivals, self.engines, self.router = arrivals, engines, router
        self.interval_s, self.progress = interval_s, progress
        self.records = [Record(arrival) for arrival in arrivals]
        self._models = len({arrival.model for arrival in arrivals})
        self._held = deque[int]()  # in the queue
        self._coming = self._left = len(arrivals)
        self._flying = 0
        self._moved_s = 0.0  # when a request last came, was sent or finished
        self._serial = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def run(self) -> list[Record]:
        for number, arrival in enumerate(self.arrivals):
            self._at(arrival.at_s, self._come, number)
        for server in range(len(self.engines)):  # each at its own phase
            self._at(self.interval_s * (server + 0.5) / len(self.engines), self._scrape, server)
        while self._events:
            now, _, act, about = heapq.heappop(self._events)
            act(*about, now)
        return self.records

    def _at(self, when: float, act: Callable[..., None], *about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._serial), act, about))

    def _come(self, number: int, now: float) -> None:
        self._coming, self._moved_s = self._coming - 1, now
        self._held.append(number)
        self._offer(now)

    def _offer(self, now: float) -> None:
        """Send who can be sent, in order; nobody overtakes another who wants the same model."""
        kept, blocked = list[int](), set[str | None]()
        while self._held and len(blocked) < self._models:
            number = self._held.popleft()
            arrival, server = self.arrivals[number], None
            if arrival.model not in blocked:
                server = self.router.choose(number, arrival, now)
            if server is None:
                kept.append(number)
                blocked.add(arrival.model)
            else:
                self._flying, self._moved_s = self._flying + 1, now
                self._at(now + NETWORK_S, self._deliver, server, Job(number, arrival))
        self._held.extendleft(reversed(kept))

    def _deliver(self, server: int, job: Job, now: float) -> None:
        engine = self.engines[server]
        if engine.add(job, now):
            self._at(engine.ends_s, self._end, server)
        else:
            self._at(now + NETWORK_S, self._finish, server, job)

    def _end(self, server: int, now: float) -> None:
        engine = self.engines[server]
        if now != engine.ends_s:
            return  # a request came, and the stretch became shorter
        begun, complete = engine.end()
        for job in begun:
            self._at(now + NETWORK_S, self.router.first_token, job.number)
        for job in complete:
            self._at(now + NETWORK_S, self._finish, server, job)
        if engine.ends_s < INFINITY:
            self._at(engine.ends_s, self._end, server)

    def _finish(self, server: int, job: Job, now: float) -> None:
        came_s = job.arrival.at_s - NETWORK_S  # the answer is as long on its way
        times = job.first_s - came_s, job.last_s - came_s
        self.records[job.number] = Record(job.arrival, server, job.cached or 0, *times)
        self._flying, self._moved_s, self._left = self._flying - 1, now, self._left - 1
        total = len(self.arrivals)
        done = total - self._left
        if done * 100 // total > (done - 1) * 100 // total:
            self.progress(done / total)
        self.router.finished(job.number, now)
        self._offer(now)

    def _scrape(self, server: int, now: float) -> None:
        self.router.scraped(server, self.engines[server].report(now), now)
        self._offer(now)
        if self._coming or self._flying or (self._held and now < self._moved_s + PATIENCE_S):
            self._at(now + self.interval_s, self._scrape, server)


class Summary(NamedTuple):
    """A replay in numbers; of times, those of answered requests."""

    requests: int
    failed: int
    good_ratio: float  # the share that was as fast as is wanted
    ttft_s: tuple[float, ...]  # p50, p90, p99
    token_s: tuple[float, ...]  # p50, p99, of each answer's mean
    total_s: float  # mean
    hit_ratio: float  # of prompt tokens


def summary(
    records: Sequence[Record], slo_ttft_s: float, slo_tpot_s: float, warm_up: float = 0.25
) -> Summary:
    """Without the requests that came in the first part of the time."""
    begins_s = warm_up * max((record.arrival.at_s for record in records), default=0.0)
    counted = [record for record in records if record.arrival.at_s >= begins_s]
    answered = [record for record in counted if record.total_s < INFINITY]
    good = sum(r.ttft_s <= slo_ttft_s and r.token_s <= slo_tpot_s for r in answered)
    ttfts = [record.ttft_s for record in answered]
    tokens = [record.token_s for record in answered if record.arrival.output_tokens > 1]
    prompts = sum(record.arrival.prompt_tokens for record in answered)
    return Summary(
        len(counted), len(counted) - len(answered), good / max(1, len(counted)),
        quantiles(ttfts, 0.5, 0.9, 0.99), quantiles(tokens, 0.5, 0.99),
        sum(record.total_s for record in answered) / max(1, len(answered)),
        sum(record.cached_tokens for record in answered) / max(1, prompts))


def quantiles(values: Iterable[float], *shares: float) -> tuple[float, ...]:
    ordered = sorted(values) or [math.nan]
    return tuple(ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in shares)


def table(rows: Mapping[str, Summary]) -> str:
    """Summaries for a terminal, one a line."""
    lines: list[tuple[str, ...]] = [("", "failed", "good %", "TTFT p50", "p90", "p99 ms",
                                     "token p50", "p99 ms", "mean s", "hits %")]
    for name, row in rows.items():
        lines.append((
            name[:18], f"{row.failed}/{row.requests}", f"{100 * row.good_ratio:.1f}",
            *(f"{1e3 * value:.0f}" for value in row.ttft_s),
            *(f"{1e3 * value:.1f}" for value in row.token_s),
            f"{row.total_s:.2f}", f"{100 * row.hit_ratio:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines)


# ============================================================================================
#  88  comparison
# ============================================================================================
#
# Policies compared on a trace: the program of `replay`.


def positive(word: str, kind: Callable[[str], Any] = float) -> Any:
    """For argparse: a number of a reasonable size."""
    with contextlib.suppress(ValueError, OverflowError):
        if 1e-3 <= (found := kind(word)) <= 1e7:
            return found
    raise argparse.ArgumentTypeError(f"found {word}, expected a number from 0.001 to 10000000")


def engine_kind(word: str) -> tuple[str, EngineKind]:
    """For argparse: a kind of engine, or one of a capacity, behind the word for it."""
    if word in ENGINE_KINDS:
        return word, ENGINE_KINDS[word]
    if word.isdecimal() and 0 < int(word) < 10000:
        return word, kind_for(int(word))
    raise argparse.ArgumentTypeError(f"found {word}, expected one of {', '.join(ENGINE_KINDS)}, or"
                                     " a number of requests that it runs well at once")


def add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", help="a trace_file; a trace in Mooncake's or Azure's form; or"
                                      f" made-up traffic: {', '.join(MADE_UP)}")
    parser.add_argument("--policy", action="append", metavar="NAME",
                        help="all, or one (repeatable; default: the settings')")
    parser.add_argument("--servers", dest="config", metavar="FILE", help="settings with servers")
    parser.add_argument("--fleet", nargs="+", metavar="KIND", type=engine_kind,
                        help=f"servers in their place: {', '.join(ENGINE_KINDS)}, or a capacity")
    parser.add_argument("--add-server", action="append", metavar="KIND", type=engine_kind,
                        help="one more")
    parser.add_argument("--auto", action="store_true", help="capacities are to be learned")
    parser.add_argument(
        "--speed", type=positive, default=1.0, metavar="X", help="times the traffic")
    parser.add_argument(
        "--limit", type=functools.partial(positive, kind=int), metavar="N",
        help="the first N requests")
    parser.add_argument("--seconds", type=positive, default=180.0, help="of made-up traffic")
    parser.add_argument("--slo-ttft", type=positive, default=1.0, metavar="S", help="seconds")
    parser.add_argument("--slo-token", type=positive, default=0.05, metavar="S", help="seconds")


@command(
    "replay", "try policies on recorded traffic, in a model", add_replay,
    example="replay sessions --policy all",
    description="Which policy for my traffic? Would a server more help? Requests that the settings'"
                " queue holds wait there as long as it takes.")
def run_replay(args: argparse.Namespace) -> int:
    """Replay a trace under each of the policies that are asked for, and print the table."""
    if args.config:
        settings, _ = load_settings(args.config, {})
    else:
        settings = Settings(tuple(ServerSettings(f"http://server-{n}") for n in range(3)))
    servers, kinds = replayed_fleet(args, settings)
    if not servers:
        return fail(f"{args.config}: found no servers, expected some to replay with")
    try:
        arrivals = adapted(read_trace(args.trace, args.seconds), args.speed, args.limit)
        if not arrivals:
            return fail(f"{args.trace}: found no requests, expected some to replay")
        policies = wanted_policies(args.policy or [settings.policy], settings)
    except ValueError as error:
        unreadable = isinstance(error, UnicodeError)
        return fail(f"{args.trace}: is not text in UTF-8" if unreadable else str(error))
    settings = dataclasses.replace(settings, servers=tuple(servers))
    span_s = max(1e-9, arrivals[-1].at_s)
    print(f"{args.trace}: {len(arrivals)} requests in {span_s:.0f} s, {len(arrivals) / span_s:.1f}"
          f" a second, before {len(kinds)} engines; good is a first token within {args.slo_ttft:g}"
          f" s and {args.slo_token * 1000:g} ms a token")
    rows = dict[str, Summary]()
    for name in policies:
        router = PolicyRouter(dataclasses.replace(settings, policy=name), random.Random(1))
        engines = [Engine(kind) for kind in kinds]
        records = Replay(
            arrivals, engines, router, settings.metrics_interval, progress_bar(name)).run()
        rows[name] = summary(records, args.slo_ttft, args.slo_token)
    print(table(rows))
    return 0


def replayed_fleet(
    args: argparse.Namespace, s: Settings
) -> tuple[list[ServerSettings], list[EngineKind]]:
    """The servers that a trace is replayed with, and their engines."""
    servers, kinds = [] if args.fleet else list(s.servers), list[EngineKind]()
    for server in servers:
        limit = server.max_concurrent_requests
        kinds += [kind_for(limit or ENGINE_KINDS["a100"].capacity)] * server.data_parallel_size
    for prefix, given in (("", args.fleet), ("added-", args.add_server)):
        for n, (word, kind) in enumerate(given or (), 1):
            servers.append(ServerSettings(f"http://{prefix}{word}-{n}", round(kind.capacity)))
            kinds.append(kind)
    if args.auto:
        servers = [dataclasses.replace(one, max_concurrent_requests=AUTO) for one in servers]
    return servers, kinds


def wanted_policies(words: Sequence[str], s: Settings) -> list[str]:
    """Raises ValueError."""
    if "all" in words:
        return [name for name in POLICY_NAMES if name != "expression" or s.score]
    for word in words:
        if word not in POLICY_NAMES or (word == "expression" and not s.score):
            expected = ", ".join(("all", *POLICY_NAMES))
            raise ValueError(f"--policy: found {word}, expected one of {expected}; expression"
                             " needs a --servers file with a score")
    return list(words)


def read_trace(name: str, seconds: float) -> list[Arrival]:
    """A file's requests, or made-up ones of that name.  Raises ValueError."""
    if name in MADE_UP and not os.path.exists(name):
        return made_up(MADE_UP[name], seconds, random.Random(1))
    try:
        with open(name, encoding="utf-8") as lines:
            return read_arrivals(lines, name)
    except OSError as error:
        known = ", ".join(MADE_UP)
        raise ValueError(f"{name}: {error_text(error)}; made-up traffic is {known}") from None


def progress_bar(name: str) -> Callable[[float], None]:
    """Draws on a terminal, and nowhere else."""

    def draw(share: float) -> None:
        bar = "#" * round(40 * share)
        end = "\r" + " " * 70 + "\r" if share >= 1 else ""
        print(f"\r{name[:18]:18} [{bar:40}] {share:4.0%}{end}", end="", file=sys.stderr, flush=True)

    return draw if sys.stderr.isatty() else lambda share: None


# ============================================================================================
#  89  canned words
# ============================================================================================
#
# What a vLLM server would say, without a model: what it refuses, in its words (as captured of
# 0.32); and else some words, a tool's call, or JSON that fits a schema.

SIMULATED_LENGTH = 8192  # max_model_len
WORDS = (
    "the a of to in and is that it for on with as by this from at or an be are not we you they "
    "model token cache server request stream answer queue batch prompt layer attention memory "
    "first next long short fast slow warm cold idle busy free full small large same other every "
    "waits runs fills drains grows learns keeps shares moves reads writes opens closes returns"
).split()
Event = tuple[str, Any]  # its name, '' for none, and its document
TOKEN_TEXT = re.compile(r"\s*\S{1,6}|\s+$")  # what counts as a token: its number is its bytes'


def vllm_error(kind: str, code: int, text: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def missing(names: Sequence[str], document: Mapping[str, Any]) -> tuple[str, str | None]:
    said = "".join(
        f"\n  {{'type': 'missing', 'loc': 'body.{name}', 'msg': 'Field required', 'input':"
        f" '<dict of {len(document)} items>'}}" for name in names)
    return f"{len(names)} validation error{'s' * (len(names) > 1)}:{said}", f"body.{names[0]}"


def unreadable(head: RequestHead, content: Content, needed: Sequence[str]
               ) -> tuple[str, str | None] | None:
    """What is wrong with a request's content, in vLLM's words, and the part of it that is."""
    start = "1 validation error:\n  "
    media_type, _, _ = head.fields.get("content-type").partition(";")
    if media_type.strip().lower() != "application/json":
        return f"{start}Unsupported Media Type: Only 'application/json' is allowed", None
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        part = f"body.{error.pos}"
        return (f"{start}{{'type': 'json_invalid', 'loc': '{part}', 'msg': 'JSON decode error',"
                f" 'input': '<dict of 0 items>', 'ctx': {{'error': '{error.msg}'}}}}"), part
    except ValueError:  # no UTF-8
        return f"{start}There was an error parsing the body", None
    if not isinstance(document, dict):
        found = f"<list of {len(document)} items>" if isinstance(document, list) else document
        return (f"{start}{{'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be"
                " a valid dictionary or object to extract fields from', 'input':"
                f" '{found}'}}"), "body"
    if absent := [name for name in needed if name not in document]:
        return missing(absent, document)
    if not isinstance(document.get("messages", []), list):
        return (f"{start}{{'type': 'list_type', 'loc': 'body.messages', 'msg': 'Input should be a"
                f" valid list', 'input': {document['messages']!r}}}"), "body.messages"
    for name in ("temperature", "top_p"):
        if isinstance(value := document.get(name), str):
            return (f"{start}{{'type': 'float_parsing', 'loc': 'body.{name}', 'msg': 'Input should"
                    f" be a valid number, unable to parse string as a number', 'input': {value!r}}}"
                    ), f"body.{name}"
    return None


LIMIT_WORDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def out_of_range(wanted: Mapping[str, Any], prompt: Prompt) -> tuple[str, str | None] | None:
    """Which value cannot be, in vLLM's words, and its parameter."""

    def at(text: str, name: str, value: Any) -> tuple[str, str]:
        return f"{text} (parameter={name}, value={value})", name

    for name, low, high, range_said in (("temperature", 0, 2, "[0, 2]"), ("top_p", 0, 1, "(0, 1]")):
        if isinstance(value := wanted.get(name), (int, float)):
            value = float(value)
            if name == "temperature" and value < 0:
                return at(f"temperature must be non-negative, got {value}.", name, value)
            if not low <= value <= high or (name == "top_p" and value == 0):
                return at(f"{name} must be in {range_said}, got {value}.", name, value)
    if isinstance(n := wanted.get("n"), int) and n < 1:
        return f"n must be at least 1, got {n}.", None
    for name in LIMIT_WORDS:
        if not isinstance(tokens := wanted.get(name), int):
            continue  # null is none
        if tokens < 1:
            return at(f"max_tokens must be at least 1, got {tokens}.", "max_tokens", tokens)
        if tokens > SIMULATED_LENGTH:
            return at(f"{name}={tokens} cannot be greater than max_model_len={SIMULATED_LENGTH}."
                      " Please request fewer output tokens.", name, tokens)
    if wanted.get("messages") == []:
        return ("Cannot apply chat template to an empty conversation. Provide at least one"
                " message."), None
    if wanted.get("prompt") == "":
        text = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
        return text, "prompt"
    if prompt.tokens < SIMULATED_LENGTH:
        return None
    return at(f"This model's maximum context length is {SIMULATED_LENGTH} tokens. However, your"
              f" prompt contains at least {prompt.tokens} input tokens, which exceeds this limit"
              " even without any output tokens. Please reduce the length of the input prompt.",
              "input_tokens", prompt.tokens)


def fitting(schema: Any, known: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
    """A value that fits a JSON schema, as far as the usual ones go."""
    if not isinstance(schema, dict) or depth > 20:
        return None
    known = known or {**schema.get("definitions", {}), **schema.get("$defs", {})}
    within = functools.partial(fitting, known=known, depth=depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if isinstance(name := schema.get("$ref"), str):
        return within(known.get(name.rpartition("/")[2]))
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return within(schema[key][0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    if kind == "object":
        return {name: within(part) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [within(schema.get("items"))] * max(1, schema.get("minItems", 1))
    if kind == "string":
        size = max(4, schema.get("minLength", 0))
        return "text".ljust(size, "x")[: min(size, schema.get("maxLength", size))]
    return {"integer": math.ceil(low), "number": float(low), "boolean": True}.get(kind)


class Script(NamedTuple):
    """What is said: for each choice its tokens' texts; of the arguments of a call where `tool`
    names one."""

    choices: list[list[str]]
    tool: str = ""
    cut: bool = False  # by the limit of tokens


def wanted_tool(wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tool that is called: one that the request insists on, or the first, unless the request
    tells what one has returned already.  In any of the APIs' forms."""
    tools = [one.get("function", one) for one in wanted.get("tools") or () if isinstance(one, dict)]
    turns = wanted.get("messages") or wanted.get("input") or []
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    parts = last.get("content") if isinstance(last.get("content"), list) else []
    returned = (last.get("role") == "tool" or last.get("type") == "function_call_output"
                or any(isinstance(p, dict) and p.get("type") == "tool_result" for p in parts))
    choice = wanted.get("tool_choice")
    if not tools or returned or choice == "none":
        return None
    named = choice.get("function", choice).get("name") if isinstance(choice, dict) else None
    return next((one for one in tools if one.get("name") == named), tools[0])


def wanted_schema(wanted: Mapping[str, Any]) -> Any:
    """The JSON schema that the answer is to fit, or None."""
    form = wanted.get("response_format") or (wanted.get("text") or {}).get("format") or {}
    if form.get("type") == "json_object":
        return {"type": "object", "properties": {"answer": {}}}
    if form.get("type") == "json_schema":
        return (form.get("json_schema") or form).get("schema")
    return wanted.get("guided_json") or (wanted.get("structured_outputs") or {}).get("json")


def script_for(wanted: Mapping[str, Any], draw: random.Random) -> Script:
    """As with vLLM, any server says the same with a seed, or at a temperature of 0."""
    asked = {name: wanted[name] for name in REPEAT_MEMBERS if name in wanted}
    if is_repeatable(asked, SEEDED_PATHS[0]):
        prompt = [wanted.get(name) for name in PROMPT_MEMBERS]
        draw = random.Random(json.dumps([asked, prompt]))
    limit = next((wanted[name] for name in LIMIT_WORDS if isinstance(wanted.get(name), int)), 0)
    count = wanted.get("n") if isinstance(wanted.get("n"), int) else 1
    if isinstance(prompts := wanted.get("prompt"), list) and isinstance(prompts[:1], list):
        count *= len(prompts) if prompts and not isinstance(prompts[0], int) else 1
    tool, schema = wanted_tool(wanted), wanted_schema(wanted)
    if tool is not None or schema is not None:
        parameters = (tool or {}).get("parameters") or (tool or {}).get("input_schema") or {}
        value = fitting(schema) if tool is None else fitting(parameters) or {}
        pieces = TOKEN_TEXT.findall(json.dumps(value))
        return Script([pieces] * count, str((tool or {}).get("name") or ""))
    choices = []
    for _ in range(count):
        words = [f" {draw.choice(WORDS)}" for _ in range(limit or draw.randint(40, 120))]
        goes_on = wanted.get("continue_final_message") or isinstance(wanted.get("prompt"), str)
        choices.append(words if goes_on else [words[0].strip().capitalize(), *words[1:]])
    return Script(choices, cut=bool(limit))


def words_of(document: Any) -> list[str]:
    """The texts in an `input`, `documents` or `messages`, one for each entry."""
    if not isinstance(document, list) or (document and isinstance(document[0], int)):
        document = [document]
    return [one if isinstance(one, str) else json.dumps(one) for one in document]


def detokenized(wanted: Mapping[str, Any], id: str, model: str) -> dict[str, Any]:
    found = (n.to_bytes((n.bit_length() + 7) // 8, "big") for n in wanted.get("tokens", ()))
    return {"prompt": b"".join(found).decode("utf-8", "replace")}


# ============================================================================================
#  90  canned forms
# ============================================================================================
#
# The same in the forms of vLLM's APIs, plain and streamed.
#
# To add a form: a class that says what begins an answer, each piece and the end, and its row in
# FORMS.  What generates nothing is a row of REPLIES.


class Form:
    """One answer in the words of one API."""

    needed: ClassVar[tuple[str, ...]] = ("messages",)
    prefix, tail = "chatcmpl", b""
    tool_finish, cut_finish, finish = "tool_calls", "length", "stop"

    def __init__(self, wanted: Mapping[str, Any], script: Script, model: str, id: str,
                 created: int, prompt_tokens: int) -> None:
        self.wanted, self.script, self.model = wanted, script, model
        self.id, self.created, self.prompt_tokens = f"{self.prefix}-{id}", created, prompt_tokens
        self.call_id = f"call_{id}"

    @property
    def tokens(self) -> int:
        return sum(map(len, self.script.choices))

    @property
    def texts(self) -> list[str]:
        return ["".join(pieces) for pieces in self.script.choices]

    @property
    def ending(self) -> str:
        """Why it ends."""
        if self.script.tool:
            return self.tool_finish
        return self.cut_finish if self.script.cut else self.finish

    def begin(self) -> list[Event]:
        return []

    def piece(self, i: int, n: int) -> list[Event]:
        """Piece `n` of choice `i`."""
        raise NotImplementedError

    def end(self) -> list[Event]:
        return []

    def whole(self) -> Any:
        """The answer that is not streamed."""
        raise NotImplementedError


class TextForm(Form):
    """/v1/completions."""

    needed, prefix, kind, tail = ("prompt",), "cmpl", "text_completion", b"data: [DONE]\n\n"

    def said(self, i: int, pieces: Sequence[str], streams: bool, first: bool) -> dict[str, Any]:
        wanted, echoed = self.wanted, ""
        if first and wanted.get("echo") and isinstance(wanted.get("prompt"), str):
            echoed = wanted["prompt"]
        return {"text": echoed + "".join(pieces)}

    def chances(self, pieces: Sequence[str]) -> Any:
        """Logprobs, of chances that are always the same."""
        if not isinstance(self.wanted.get("logprobs"), int):
            return None
        offsets = itertools.accumulate(map(len, pieces[:-1]), initial=0)
        return {"text_offset": [*offsets], "token_logprobs": [-0.5] * len(pieces),
                "tokens": [*pieces], "top_logprobs": [{piece: -0.5} for piece in pieces]}

    def choice(self, i: int, n: int | None = None) -> dict[str, Any]:
        """All of a choice, or its piece `n`."""
        pieces = self.script.choices[i]
        shown = pieces if n is None else pieces[n : n + 1]
        last = n is None or n == len(pieces) - 1
        return {"index": i, **self.said(i, shown, n is not None, not n),
                "logprobs": self.chances(shown), "finish_reason": self.ending if last else None,
                **({"stop_reason": None} if last else {}), "token_ids": None}

    def document(self, choices: list[Any], kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices}

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens,
                "total_tokens": self.prompt_tokens + self.tokens, "completion_tokens": self.tokens}

    def piece(self, i: int, n: int) -> list[Event]:
        return [("", self.document([self.choice(i, n)], self.kind))]

    def end(self) -> list[Event]:
        options = self.wanted.get("stream_options")
        if not (isinstance(options, dict) and options.get("include_usage") is True):
            return []
        return [("", self.document([], self.kind) | {"usage": self.usage()})]

    def whole(self) -> Any:
        choices = [self.choice(i) for i in range(len(self.script.choices))]
        kind = self.kind.removesuffix(".chunk")
        return self.document(choices, kind) | {
            "service_tier": None, "system_fingerprint": "vllm-simulated",
            "usage": self.usage() | {"prompt_tokens_details": None}}


class ChatForm(TextForm):
    """/v1/chat/completions."""

    needed, prefix, kind = ("messages",), "chatcmpl", "chat.completion.chunk"

    def chances(self, pieces: Sequence[str]) -> Any:
        if self.wanted.get("logprobs") is not True:
            return None
        said = [{"token": piece, "logprob": -0.5, "bytes": [*piece.encode()]} for piece in pieces]
        tops = self.wanted.get("top_logprobs") or 0
        return {"content": [one | {"top_logprobs": [one] * min(1, tops)} for one in said]}

    def said(self, i: int, pieces: Sequence[str], streams: bool, first: bool) -> dict[str, Any]:
        text = "".join(pieces)
        if not self.script.tool:
            role = {} if streams else {"role": "assistant"}
            more = {} if streams else {"refusal": None, "reasoning": None, "tool_calls": []}
            return {"delta" if streams else "message": {**role, "content": text, **more}}
        function: dict[str, Any] = {"arguments": text}
        call: dict[str, Any] = {"function": function}
        if first:
            function["name"] = self.script.tool
            call |= {"id": self.call_id, "type": "function"}
        if streams:
            return {"delta": {"tool_calls": [{"index": 0, **call}]}}
        return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}

    def begin(self) -> list[Event]:
        return [("", self.document([{
            "index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
            "finish_reason": None}], self.kind)) for i in range(len(self.script.choices))]


class MessagesForm(Form):
    """/v1/messages, Anthropic's."""

    needed = ("messages", "max_tokens")
    tool_finish, cut_finish, finish = "tool_use", "max_tokens", "end_turn"

    def message(self, content: list[Any], ending: str | None, tokens: int) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "content": content,
                "model": self.model, "stop_reason": ending, "stop_sequence": None,
                "usage": {"input_tokens": self.prompt_tokens, "output_tokens": tokens}}

    def block(self, text: str, value: Any) -> dict[str, Any]:
        if not self.script.tool:
            return {"type": "text", "text": text}
        return {"type": "tool_use", "id": self.call_id, "name": self.script.tool, "input": value}

    def begin(self) -> list[Event]:
        return [
            ("message_start", {"type": "message_start", "message": self.message([], None, 0)}),
            ("content_block_start", {"type": "content_block_start",
                                     "content_block": self.block("", {}), "index": 0})]

    def piece(self, i: int, n: int) -> list[Event]:
        text = self.script.choices[i][n]
        delta = ({"type": "input_json_delta", "partial_json": text} if self.script.tool
                 else {"type": "text_delta", "text": text})
        return [("content_block_delta",
                 {"type": "content_block_delta", "delta": delta, "index": 0})]

    def end(self) -> list[Event]:
        said = self.message([], self.ending, self.tokens)
        delta = {"stop_reason": self.ending, "stop_sequence": None}
        return [("content_block_stop", {"type": "content_block_stop", "index": 0}),
                ("message_delta", {"type": "message_delta", "delta": delta,
                                   "usage": said["usage"]}),
                ("message_stop", {"type": "message_stop"})]

    def whole(self) -> Any:
        text = self.texts[0]
        value = json.loads(text) if self.script.tool else None
        return self.message([self.block(text, value)], self.ending, self.tokens)


class ResponsesForm(Form):
    """/v1/responses."""

    needed, prefix = ("input",), "resp"

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.id = self.id.replace("-", "_", 1)
        self.item_id = self.id.replace("resp", "fc" if self.script.tool else "msg", 1)

    def response(self, status: str) -> dict[str, Any]:
        begun, wanted = status == "in_progress", self.wanted
        if self.script.cut and not begun:
            status = "incomplete"
        usage = None if begun else {
            "input_tokens": self.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.tokens}
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        given = {name: wanted.get(name) for name in (
            "instructions", "metadata", "max_output_tokens", "previous_response_id", "reasoning",
            "text", "user")}
        return {"id": self.id, "created_at": self.created, "incomplete_details": reason, **given,
                "model": self.model, "object": "response",
                "output": [] if begun else [self.item("completed", self.texts[0])],
                "parallel_tool_calls": True, "temperature": wanted.get("temperature", 1.0),
                "tool_choice": wanted.get("tool_choice", "auto"), "tools": wanted.get("tools", []),
                "top_p": wanted.get("top_p", 1.0), "background": False, "service_tier": "auto",
                "status": status, "truncation": "disabled", "usage": usage}

    def part(self, text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": []}

    def item(self, status: str, text: str) -> dict[str, Any]:
        if self.script.tool:
            return {"id": self.item_id, "call_id": self.call_id, "type": "function_call",
                    "name": self.script.tool, "arguments": text, "status": status}
        return {"id": self.item_id, "content": [self.part(text)] if text else [],
                "role": "assistant", "status": status, "type": "message"}

    def event(self, number: int, kind: str, **more: Any) -> Event:
        return f"response.{kind}", {**more, "sequence_number": number, "type": f"response.{kind}"}

    def begin(self) -> list[Event]:
        response, at = self.response("in_progress"), {"output_index": 0}
        events = [self.event(0, "created", response=response),
                  self.event(1, "in_progress", response=response),
                  self.event(2, "output_item.added", item=self.item("in_progress", ""), **at)]
        if not self.script.tool:
            events.append(self.event(3, "content_part.added", content_index=0,
                                     item_id=self.item_id, part=self.part(""), **at))
        return events

    def piece(self, i: int, n: int) -> list[Event]:
        at = {"item_id": self.item_id, "output_index": 0, "delta": self.script.choices[i][n]}
        if self.script.tool:
            return [self.event(3 + n, "function_call_arguments.delta", **at)]
        return [self.event(4 + n, "output_text.delta", content_index=0, logprobs=[], **at)]

    def end(self) -> list[Event]:
        text, number = self.texts[0], 4 + self.tokens
        at: dict[str, Any] = {"item_id": self.item_id, "output_index": 0}
        if self.script.tool:
            done = [self.event(number - 1, "function_call_arguments.done", arguments=text,
                               name=self.script.tool, **at)]
        else:
            done = [self.event(number, "output_text.done", content_index=0, logprobs=[], text=text,
                               **at),
                    self.event(number + 1, "content_part.done", content_index=0,
                               part=self.part(text), **at)]
        number += 2
        return [*done, self.event(number, "output_item.done", output_index=0,
                                  item=self.item("completed", text)),
                self.event(number + 1, "completed", response=self.response("completed"))]

    def whole(self) -> Any:
        return self.response("completed")


FORMS: dict[str, type[Form]] = {
    "/v1/chat/completions": ChatForm, "/v1/completions": TextForm,
    "/v1/messages": MessagesForm, "/v1/responses": ResponsesForm,
}


def simulated_refusal(head: RequestHead, content: Content, wanted: Mapping[str, Any],
                      prompt: Prompt, models: Sequence[str]) -> tuple[int, Any] | None:
    """(status, JSON) with which vLLM refuses such a request, or None."""
    form = FORMS.get(head.path)
    if (wrong := unreadable(head, content, form.needed if form else ())) is not None:
        return 400, vllm_error("Bad Request", 400, *wrong)
    status, kind = 404, "NotFoundError"
    refused: tuple[str, str | None] | None = None
    if (model := wanted.get("model") or models[0]) not in models:
        text = f"The model `{model}` does not exist. Valid aliases: {', '.join(models)}."
        refused = text, "model"
    elif (refused := out_of_range(wanted, prompt)) is not None:
        status, kind = 400, "BadRequestError"
    if refused is None:
        return None
    if form is MessagesForm:
        return status, {"type": "error", "error": {"type": kind, "message": refused[0]}}
    return status, vllm_error(kind, status, *refused)


def embedded(text: str, dimensions: int) -> list[float]:
    """A vector of length 1, the same for the same text."""
    draw = random.Random(text)
    vector = [draw.gauss(0, 1) for _ in range(dimensions)]
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def likeness(query: str, text: str) -> float:
    """How many of the words two texts share."""
    a, b = (set(re.findall(r"\w+", one.lower())) for one in (query, text))
    return round(len(a & b) / (len(a | b) or 1), 6)


def embeddings(wanted: Mapping[str, Any], id: str, model: str) -> dict[str, Any]:
    dimensions = wanted.get("dimensions") or 64
    data, tokens = [], 0
    for i, text in enumerate(words_of(wanted.get("input") or wanted.get("messages") or "")):
        vector: Any = embedded(text, dimensions)
        if wanted.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
        data.append({"index": i, "object": "embedding", "embedding": vector})
        tokens += len(TOKEN_TEXT.findall(text))
    return {"id": f"embd-{id}", "object": "list", "model": model, "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def reranked(wanted: Mapping[str, Any], id: str, model: str) -> dict[str, Any]:
    query, texts = str(wanted.get("query") or ""), words_of(wanted.get("documents") or [])
    results = [{"index": i, "document": {"text": text, "multi_modal": None},
                "relevance_score": likeness(query, text)} for i, text in enumerate(texts)]
    results.sort(key=lambda one: -one["relevance_score"])
    tokens = sum(len(TOKEN_TEXT.findall(text)) for text in (query, *texts))
    return {"id": f"score-{id}", "model": model, "results": results[: wanted.get("top_n") or None],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def tokenized(wanted: Mapping[str, Any], id: str, model: str) -> dict[str, Any]:
    texts = words_of(wanted.get("prompt") or [one["content"] for one in wanted["messages"]])
    pieces = TOKEN_TEXT.findall("".join(texts))
    return {"count": len(pieces), "max_model_len": SIMULATED_LENGTH,
            "tokens": [int.from_bytes(piece.encode(), "big") for piece in pieces],
            "token_strs": pieces if wanted.get("return_token_strs") else None}


def counted(wanted: Mapping[str, Any], id: str, model: str) -> dict[str, Any]:
    tokens = tokenized(wanted, id, model)["count"]
    return {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}


# What generates nothing and is asked with POST: from (content, id, model) to the answer.
REPLIES: dict[str, Callable[[Mapping[str, Any], str, str], Any]] = {
    "/v1/embeddings": embeddings, "/v1/rerank": reranked, "/rerank": reranked,
    "/v2/rerank": reranked, "/tokenize": tokenized, "/v1/messages/count_tokens": counted,
    "/detokenize": detokenized,
}


# ============================================================================================
#  91  simulation
# ============================================================================================
#
# A vLLM server without a GPU, on a loopback port that the system chose.  It streams words at a
# believable pace, runs as many requests at once as it has capacity and lets the rest wait, slows
# down as it fills up, and says so in /metrics.  POST /simulate {"mode": …} makes it fail, hang,
# slow down or cut its answers off, for tests and for showing off.

MODES = ("ok", "fail", "hang", "slow", "cut")
STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nserver: simulated\r\ntransfer-encoding: chunked\r\n"
               b"content-type: text/event-stream; charset=utf-8\r\n\r\n")


class Simulated(NamedTuple):
    """What kind of server to simulate."""

    capacity: int  # requests in the batch at once
    token_s: float  # between two tokens with an empty batch; doubles when the batch is full
    prefill_tokens_per_s: float


Page = Callable[["SimulatedServer", RequestHead, dict[str, Any]], tuple[int, Any]]
# Everything else by path and method; a page returns a status, and text or JSON.
PAGES: dict[str, dict[str, Page]] = {}


def simulated_page(path: str, method: str = "GET") -> Callable[[Page], Page]:
    """Registers the decorated function; a last part like {id} is variable."""

    def register(page: Page) -> Page:
        PAGES.setdefault(path, {})[method] = page
        return page

    return register


class SimulatedServer:
    """One simulated vLLM server; `async with` starts and stops it, `url` says where it is."""

    def __init__(self, kind: Simulated, models: tuple[str, ...] = ("demo-model",), seed: int = 0):
        self.kind, self.models, self.draw = kind, models, random.Random(seed)
        self.mode, self.url = "ok", ""
        self.running = self.waiting = self.prompt_tokens = self.generated_tokens = self.aborted = 0
        self.cache, self.cached_tokens = PrefixCache(), 0
        self.slots = asyncio.Semaphore(kind.capacity)
        self.stored: OrderedDict[str, Any] = OrderedDict()  # the last responses, by id
        self._tasks: set[asyncio.Task[Any] | None] = set()

    async def __aenter__(self) -> SimulatedServer:
        self._listener = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, backlog=LISTEN_BACKLOG)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """As kill -9 would: nothing is finished."""
        self._listener.close()
        for task in filter(None, self._tasks):
            task.cancel()
        await asyncio.gather(*filter(None, self._tasks), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        self._tasks.add(task := asyncio.current_task())
        client = MessageReader(reader, Blame.CLIENT)
        with contextlib.suppress(PeerGone, BadMessage, OSError, asyncio.CancelledError):
            while (raw := await client.read_head()) is not None:
                (head, length), content = parse_request_head(raw), bytearray()
                decoder = decoder_for(request_framing(head, length))
                while piece := await client.read_content(decoder):
                    content += piece
                await self._answer(client, writer, head, content)
        self._tasks.discard(task)
        writer.transport.abort()

    async def _answer(self, client: MessageReader, writer: asyncio.StreamWriter, head: RequestHead,
                      content: Content) -> None:
        if self.mode == "hang" and head.path != "/simulate":
            await unless_gone(client, asyncio.Event().wait())
        wanted = read_members(content, None)
        prompt = read_prompt(content, None, wanted, None)
        if (reply := self._reply(head, content, wanted, prompt)) is not None:
            writer.write(simulated_response(head, *reply))
            return
        try:
            await unless_gone(client, Generation(self, writer, head, content, prompt).run())
        except (PeerGone, OSError):
            self.aborted += 1
            raise

    def _reply(self, head: RequestHead, content: Content, wanted: dict[str, Any], prompt: Prompt
               ) -> tuple[int, Any] | None:
        """(status, text or JSON), or None where an answer is generated."""
        if head.method != "POST" or not (head.path in FORMS or head.path in REPLIES):
            return self._page(head, wanted)
        if refusal := simulated_refusal(head, content, wanted, prompt, self.models):
            return refusal
        if self.mode == "fail":
            return 500, vllm_error("InternalServerError", 500, "EngineCore encountered an issue.")
        if reply := REPLIES.get(head.path):
            return 200, reply(json.loads(content), self.new_id(), self.models[0])
        return None

    def _page(self, head: RequestHead, wanted: dict[str, Any]) -> tuple[int, Any]:
        methods = simulated_methods(head.path)
        if not methods:
            return 404, {"detail": "Not Found"}
        if (page := methods.get(head.method)) is None:
            return 405, {"detail": "Method Not Allowed"}
        status, said = page(self, head, wanted)
        return 500 if self.mode == "fail" and head.path != "/simulate" else status, said

    def new_id(self) -> str:
        return f"{self.draw.getrandbits(64):016x}"

    def keep(self, response: Mapping[str, Any]) -> None:
        self.stored[response["id"]] = response
        if len(self.stored) > 100:
            self.stored.popitem(last=False)


def simulated_methods(path: str) -> Mapping[str, Any]:
    """What is served at a path, by method."""
    if path in FORMS or path in REPLIES:
        return {"POST": None}
    return PAGES.get(path) or PAGES.get(path.rpartition("/")[0] + "/{id}") or {}


@simulated_page("/health")
@simulated_page("/ping")
def simulated_health(server: SimulatedServer, head: RequestHead, wanted: dict[str, Any]
                     ) -> tuple[int, Any]:
    return 200, ""


@simulated_page("/version")
def simulated_version(server: SimulatedServer, head: RequestHead, wanted: dict[str, Any]
                      ) -> tuple[int, Any]:
    return 200, {"version": "0.0.0+simulated"}


@simulated_page("/simulate", "POST")
def simulated_mode(server: SimulatedServer, head: RequestHead, wanted: dict[str, Any]
                   ) -> tuple[int, Any]:
    if wanted.get("mode") not in MODES:
        text = f"mode is {wanted.get('mode')!r}, expected one of {', '.join(MODES)}"
        return 400, vllm_error("BadRequestError", 400, text)
    server.mode = wanted["mode"]
    return 200, {"mode": server.mode}


@simulated_page("/v1/models")
def simulated_models(server: SimulatedServer, head: RequestHead, wanted: dict[str, Any]
                     ) -> tuple[int, Any]:
    said = {"object": "model", "created": 0, "owned_by": "vllm", "max_model_len": SIMULATED_LENGTH}
    data = [{"id": name, **said, "root": name, "parent": None} for name in server.models]
    return 200, {"object": "list", "data": data}


@simulated_page("/v1/responses/{id}")
def simulated_stored(server: SimulatedServer, head: RequestHead, wanted: dict[str, Any]
                     ) -> tuple[int, Any]:
    id = head.path.rpartition("/")[2]
    if id in server.stored:
        return 200, server.stored[id]
    text = f"Response with id '{id}' not found."
    return 404, vllm_error("invalid_request_error", 404, text, "response_id")


@simulated_page("/metrics")
def simulated_metrics(server: SimulatedServer, head: RequestHead, wanted: dict[str, Any]
                      ) -> tuple[int, Any]:
    labels = f'{{engine="0",model_name="{escape(server.models[0])}"}}'
    return 200, "".join(f"# TYPE vllm:{name} {kind}\nvllm:{name}{labels} {value}\n" for (
        kind, name, value) in (
        ("gauge", "num_requests_running", server.running),
        ("gauge", "num_requests_waiting", server.waiting),
        ("gauge", "kv_cache_usage_perc", min(1.0, 0.9 * server.running / server.kind.capacity)),
        ("counter", "prompt_tokens_total", server.prompt_tokens),
        ("counter", "generation_tokens_total", server.generated_tokens),
        ("counter", "prefix_cache_hits_total", server.cached_tokens)))


async def unless_gone(client: MessageReader, work: Coroutine[Any, Any, object]) -> None:
    """Do this, or as much of it as is done when the client leaves.  Raises PeerGone."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client.await_departure())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        (working if working.done() else leaving).result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))


def simulated_response(head: RequestHead, status: int, document: Any) -> bytes:
    plain = isinstance(document, str)
    content = document.encode() if plain else json.dumps(document).encode()
    kind = "text/plain; charset=utf-8" if plain else "application/json"
    fields = [("server", "simulated"), ("content-type", kind)]
    if status == 405:
        fields.append(("allow", ", ".join(simulated_methods(head.path))))
    return own_response(status, head, content, True, fields)


class Generation:
    """One answer of a simulated server."""

    def __init__(self, server: SimulatedServer, writer: asyncio.StreamWriter, head: RequestHead,
                 content: Content, prompt: Prompt) -> None:
        self.server, self.writer, self.head, self.prompt = server, writer, head, prompt
        wanted = json.loads(content)
        self.streams = wanted.get("stream") is True
        self.form = FORMS[head.path](
            wanted, script_for(wanted, server.draw), server.models[0], server.new_id(),
            int(time.time()), prompt.tokens)

    async def run(self) -> None:
        server = self.server
        if self.streams:  # as vLLM does, before there is anything to say
            self.writer.write(STREAM_HEAD)
        server.waiting += 1
        try:
            await server.slots.acquire()
        finally:
            server.waiting -= 1
        server.running += 1
        try:
            await self.generate()
        finally:
            server.running -= 1
            server.slots.release()

    async def generate(self) -> None:
        kind, server, form = self.server.kind, self.server, self.form
        cached = self.prompt.tokens_in(server.cache.cached_links(self.prompt.prefix_hashes))
        server.cache.sent(self.prompt)
        server.prompt_tokens += self.prompt.tokens
        server.cached_tokens += cached
        await asyncio.sleep((self.prompt.tokens - cached) / kind.prefill_tokens_per_s)
        choices = form.script.choices
        for n in range(max(map(len, choices))):
            pace = (1 + server.running / kind.capacity) * (5 if server.mode == "slow" else 1)
            await asyncio.sleep(kind.token_s * pace * server.draw.uniform(0.8, 1.2))
            if server.mode == "cut":
                raise PeerGone("its answers are cut off", Fault.SERVER_GONE)
            told = [i for i, pieces in enumerate(choices) if n < len(pieces)]
            server.generated_tokens += len(told)
            if self.streams:
                begun = form.begin() if n == 0 else []
                await self.say([*begun, *(event for i in told for event in form.piece(i, n))])
        if isinstance(form, ResponsesForm):
            server.keep(form.whole())
        if not self.streams:
            self.writer.write(simulated_response(self.head, 200, form.whole()))
            return
        await self.say(form.end())
        self.writer.write((encode_chunk(form.tail) if form.tail else b"") + LAST_CHUNK)

    async def say(self, events: Iterable[Event]) -> None:
        for name, document in events:
            said = f"event: {name}\n" * bool(name) + f"data: {json.dumps(document)}\n\n"
            self.writer.write(encode_chunk(said.encode()))
        await self.writer.drain()


# ============================================================================================
#  92  demo
# ============================================================================================
#
# The whole thing on a laptop: a balancer in front of simulated servers of unequal kinds.

DEMO_FLEET = (Simulated(16, 0.015, 20000), Simulated(8, 0.025, 8000), Simulated(4, 0.040, 3000))


REGISTRATION_S = 1.0  # between two registrations of a simulated server


async def come_and_go(server: SimulatedServer, balancer: Balancer, seed: int) -> None:
    """Have a simulated server register itself, leave after a while, and come again."""
    draw, s = random.Random(seed), balancer.core.settings
    said = {"url": server.url, "max_concurrent_requests": server.kind.capacity, "ttl_s": 3}
    while not balancer.port:
        await asyncio.sleep(REGISTRATION_S / 10)
    balancer_itself = ServerSettings(own_url(s, s.host, balancer.port))
    with contextlib.closing(HttpClient(balancer_itself)) as client:
        async def post(path: str, content: bytes) -> None:
            with contextlib.suppress(PeerGone, BadMessage, TimeoutError):
                await client.fetch(f"/workers/{path}", 2.0, content)

        while True:
            for _ in range(draw.randint(10, 30)):
                await post("register", json.dumps(said).encode())
                await asyncio.sleep(REGISTRATION_S)
            await post(f"{server.url.partition('://')[2]}/unregister", b"{}")
            await asyncio.sleep(draw.randint(3, 10) * REGISTRATION_S)


MISHAPS = {"fail": "answers 500", "slow": "is five times as slow"}  # by the mode of a server
MISHAP_S = 12.0  # for so long,
BETWEEN_MISHAPS_S = 30.0
SESSIONS_KEPT = 6


def demo_request(sessions: list[list[dict[str, str]]], draw: random.Random) -> dict[str, Any]:
    """A short question, a long text, or the next turn of one of the sessions, which it changes."""

    def said(role: str, words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=words))}

    chance = draw.random()
    if chance < 0.5 and sessions:
        messages = draw.choice(sessions)
        messages += [said("assistant", 60), said("user", 15)]
    else:
        messages = [said("user", draw.randint(800, 3000) if chance > 0.85 else 20)]
        sessions[:] = [messages, *sessions][:SESSIONS_KEPT]
    return {"model": "demo-model", "messages": messages, "stream": draw.random() < 0.8,
            "max_tokens": draw.randint(20, 150)}


async def demo_traffic(balancer: Balancer, rate: float, draw: random.Random) -> None:
    """So many requests per second, by chance, for ever."""
    sessions, running = list[list[dict[str, str]]](), set[asyncio.Task[None]]()

    async def ask(content: bytes) -> None:
        url = own_url(balancer.core.settings, balancer.core.settings.host, balancer.port)
        with contextlib.closing(HttpClient(ServerSettings(url))) as client:
            with contextlib.suppress(PeerGone, BadMessage, TimeoutError):
                await client.fetch("/v1/chat/completions", 120.0, content)

    try:
        while True:
            await asyncio.sleep(draw.expovariate(rate))
            if balancer.port and len(running) < 200:
                content = json.dumps(demo_request(sessions, draw)).encode()
                running.add(task := asyncio.ensure_future(ask(content)))
                task.add_done_callback(running.discard)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def demo_mishaps(servers: Sequence[SimulatedServer], draw: random.Random) -> None:
    """Now and then one of several servers fails or is slow, and comes back."""
    while len(servers) > 1:
        await asyncio.sleep(BETWEEN_MISHAPS_S)
        one, mode = draw.choice(servers), draw.choice(list(MISHAPS))
        if one.mode == "ok":  # or somebody plays with it
            log.info("demo: %s %s from now on, for %.0f s", one.url, MISHAPS[mode], MISHAP_S)
            one.mode = mode
            await asyncio.sleep(MISHAP_S)
            one.mode = "ok" if one.mode == mode else one.mode


async def demo(count: int, settings: Settings, run: Callable[[Balancer], Awaitable[None]],
               discovery: bool = False, rate: float = 0.0) -> None:
    """A balancer in front of simulated servers of unequal kinds; `run` runs it.  With `discovery`
    all but the first register themselves, and come and go; with a `rate`, requests per second,
    there is traffic, and servers have their troubles."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for i in range(count):
            one = SimulatedServer(DEMO_FLEET[i % len(DEMO_FLEET)], seed=i)
            servers.append(await stack.enter_async_context(one))
            pace = f"{one.kind.capacity} at once, {1 / one.kind.token_s:.0f} tokens/s"
            print(f"simulated vLLM server {one.url}: {pace}", flush=True)
        listed = tuple(ServerSettings(one.url, one.kind.capacity) for one in servers)
        named = listed[:1] if discovery else listed
        balancer = Balancer(dataclasses.replace(settings, servers=named))
        works = [come_and_go(one, balancer, i) for i, one in enumerate(servers) if i >= len(named)]
        if rate:
            works += [demo_traffic(balancer, rate, random.Random(1)),
                      demo_mishaps(servers, random.Random(2))]
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            await run(balancer)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


DEMO_HINT = """
Ask it something:

    curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{{"model": "demo-model", "stream": true, "messages": [{{"role": "user",
             "content": "Hello"}}]}}'

Look at it:          {url}/status in a browser; curl {url}/status.json
Why that server?     the same curl line with /explain in place of /v1/chat/completions
On the screen:       ? for keys and these lines, Tab for models and requests, q to quit
Break a server:      curl {server}/simulate -d '{{"mode": "fail"}}' (or hang, slow, cut, ok)
"""


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servers", type=int, default=3, metavar="N", help="how many (default 3)")
    parser.add_argument("-p", "--port", default="8888", help="port to listen on (default 8888)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("-c", "--console", action="store_true", help="log lines, not the screen")
    parser.add_argument("--load", type=float, metavar="RATE", help="requests per second of its own"
                        " (default 2 with the screen, else none; 0: none)")
    parser.add_argument("--discovery", action="store_true",
                        help="all but the first register themselves, and come and go")


@command("demo", "try it in front of simulated servers", add_demo, example="demo")
def run_demo(args: argparse.Namespace) -> int:
    toml = "servers = []\n[config]\nbreaker_open_time = 8"  # so that one sees it come back
    settings, _ = parse_settings(toml, "demo", overrides_from(args, {}))
    if args.servers < 1:
        return fail(f"--servers: found {args.servers}, expected a whole number, 1 or more")
    screen = sys.stdout.isatty() and not args.console
    rate = args.load if args.load is not None else 2.0 * screen
    if not 0 <= rate <= 1000:
        return fail(f"--load: found {rate:g}, expected requests per second, 0 to 1000")
    with logging_to_stdout(settings.log_level):
        return serve_until_stopped(lambda run: demo(
            args.servers, settings, run, args.discovery, rate), DEMO_HINT, screen)


# ============================================================================================
#  93  doctor
# ============================================================================================
#
# What is usually found out too late: each server is asked for all that the balancer will rely on,
# and for each thing that is amiss there is something to do.


class Finding(NamedTuple):
    """Something that is amiss, and what to do about it."""

    text: str
    advice: str


class Examined(NamedTuple):
    """What was found at a server; `models` is None where it did not say."""

    usable: bool
    summary: str
    findings: list[Finding]
    models: Models | None = None


class Streamed(NamedTuple):
    """How a streamed answer arrived.  Times in seconds since the request."""

    status: int
    pieces: int = 0
    events: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


async def examine(server: ServerSettings, settings: Settings, secrets: Secrets) -> Examined:
    """Ask one server for everything."""
    timeout_s, streamed = settings.health_check_timeout, None
    with contextlib.closing(HttpClient(server, secrets)) as client:
        check = await check_server(client, timeout_s, True, True)
        if check is None or not check.passed:
            why = check.why if check else "no file descriptors left"
            return Examined(False, f"NOT USABLE: {why}", [unusable_finding(server, why)])
        _, content = await fetch_if_there(client, "/version", timeout_s)
        version = None
        with contextlib.suppress(BadMessage):
            version = read_members(content, None).get("version")
        status, content = await fetch_if_there(client, "/metrics", timeout_s)
        loads = engine_loads(content.decode("utf-8", "replace"))
        findings = [] if check.models is not None else [unusable_finding(server, check.why)]
        findings += load_findings(server, status, loads)
        if check.models:
            model = next(iter(check.models))
            streamed = await time_stream(client, model, timeout_s)
            findings += stream_findings(streamed, timeout_s)
            if is_idle(loads) and came_at_once(streamed):  # once may be chance
                streamed = await time_stream(client, model, timeout_s)
                _, content = await fetch_if_there(client, "/metrics", timeout_s)
                if is_idle(engine_loads(content.decode("utf-8", "replace"))):
                    findings += buffered_findings(streamed)
    models = check.why if check.models is None else f"models: {', '.join(check.models) or 'none'}"
    parts = [f"usable, answered in {check.seconds * 1000:.0f} ms", f"vLLM {version or 'unknown'}"]
    if streamed is not None and streamed.events:
        parts.append(f"first token after {streamed.first_s * 1000:.0f} ms")
    return Examined(True, "  ".join([*parts, models]), findings, check.models)


async def fetch_if_there(client: HttpClient, path: str, timeout_s: float) -> tuple[int, bytes]:
    """The status, 0 for no answer, and the content of a good answer."""
    try:
        status, content = await client.fetch(path, timeout_s)
    except (PeerGone, BadMessage, TimeoutError):
        return 0, b""
    return status, content if status == 200 else b""


STREAM_TOKENS = 16


async def time_stream(client: HttpClient, model: str, timeout_s: float) -> Streamed | None:
    """Have some tokens streamed; None when there was no answer in time."""
    wanted = {"model": model, "prompt": "1 2 3", "max_tokens": STREAM_TOKENS, "stream": True,
              "ignore_eos": True}
    begun, came = clock_now().monotonic, list[tuple[float, int]]()  # when, how many events

    def take(piece: bytes) -> None:
        if events := piece.count(b"data: {"):
            came.append((clock_now().monotonic - begun, events))

    try:
        content = json.dumps(wanted).encode()
        status = await client.ask("/v1/completions", timeout_s, content, take)
    except (PeerGone, BadMessage, TimeoutError):
        return None
    if not came:
        return Streamed(status)
    events = sum(count for _, count in came)
    return Streamed(status, len(came), events, came[0][0], came[-1][0])


# What to do about words that TLS says; the first that fits.
TLS_ADVICE = {
    "alert certificate required": "it asks for ours: name a file with it in client_cert",
    "certificate is not valid for": "give it the URL of a name that is in its certificate",
    "certificate has expired": "have its certificate renewed",
    "certificate": "name the authority that signed it in ca_file",
    "TLS: wrong version number": "it does not speak TLS: try http:// in its URL",
    "TLS: record layer failure": "it does not speak TLS: try http:// in its URL",
}


def unusable_finding(server: ServerSettings, why: str) -> Finding:
    """About a server that did not answer as it should."""
    if re.search(r"answered 40[13]", why):
        has = "another" if server.api_key or server.api_key_file else "an"
        return Finding(f"its key: {why}", f"give the server {has} api_key or api_key_file")
    for word, advice in TLS_ADVICE.items():
        if word in why:
            return Finding(f"its certificate: {why}" if "cert" in word else why, advice)
    return Finding(why, f"see whether it runs, and try: curl -v {server.url}/v1/models")


def load_findings(
    server: ServerSettings, status: int, loads: Mapping[str, EngineLoad]
) -> list[Finding]:
    """About its page of metrics."""
    if status != 200:
        how = f"answered {status}" if status else "did not answer"
        return [Finding(f"/metrics {how}: its load is not known, only our own requests are counted",
                        "let the balancer reach /metrics, past whatever stands before the server")]
    load, engines = loads.get("", EngineLoad()), max(1, len(loads) - 1)
    missing = ", ".join(VLLM_METRICS[key][0] for key, value in (
        ("running", load.running), ("waiting", load.waiting), ("kv_usage", load.kv_usage_ratio),
        ("generation_tokens", load.generation_tokens)) if value is None)
    uneven = not missing and engines != server.data_parallel_size
    return [Finding(text, advice) for amiss, text, advice in (
        (missing, f"/metrics does not say {missing}", "start vLLM without --disable-log-stats"),
        (not load.caches, "it keeps no prefixes: each turn of a conversation is read anew",
         "start vLLM with --enable-prefix-caching"),
        (load.asleep, "it is asleep", f"wake it: curl -X POST {server.url}/wake_up"),
        (uneven, f"it runs {engines} engine(s), its data_parallel_size here is"
         f" {server.data_parallel_size}", f"set data_parallel_size = {engines}"),
    ) if amiss]


def stream_findings(streamed: Streamed | None, timeout_s: float) -> list[Finding]:
    """About a streamed answer.  That a server does not generate text (404, 400) is no fault."""
    if streamed is None:
        return [Finding(f"a stream of {STREAM_TOKENS} tokens did not end within {timeout_s:g} s"
                        " (health_check_timeout)", "look at its load, or at its log")]
    answered = f"a stream was answered {streamed.status}"
    if streamed.status in (401, 403):
        return [Finding(f"its key: {answered}", "give the server its api_key or api_key_file")]
    return [Finding(answered, "look at its log")] if streamed.status >= 500 else []


def is_idle(loads: Mapping[str, EngineLoad]) -> bool:
    """Whether it says that it has nothing to do; a busy vLLM joins tokens itself."""
    load = loads.get("", EngineLoad())
    return load.running == 0 == (load.waiting or 0)


def came_at_once(streamed: Streamed | None) -> bool:
    """Whether tokens came all together, though that took a while: as if they were collected."""
    return (streamed is not None and streamed.events > 3 and streamed.pieces == 1
            and streamed.last_s > 0.05)


def buffered_findings(streamed: Streamed | None) -> list[Finding]:
    """About a second stream of an idle server, of which the first came at once."""
    if streamed is None or not came_at_once(streamed):
        return []
    return [Finding(f"{streamed.events} tokens came at once: streams are buffered on the way",
                    "turn response buffering off in what stands before the server (nginx:"
                    " proxy_buffering off)")]


def secret_files(path: str, s: Settings) -> list[str]:
    """Those that hold keys: of the settings file at `path` and the files that it names."""
    servers = (*s.servers, *s.patterns)
    entries = (s, *servers, *s.keys)
    own = [path] if any(getattr(one, key, "") for one in entries for key in KEYS_THEMSELVES) else []
    files = [key.key_file for key in s.keys] + [s.tls_key]
    files += [s.registration_key_file, s.registered_api_key_file]
    files += [name for one in servers for name in (one.api_key_file, one.client_cert)]
    files += [name for one in s.kubernetes for name in (one.kubeconfig, one.token_file)]
    return own + list(dict.fromkeys(filter(None, files)))


def mode_findings(modes: Mapping[str, int]) -> list[Finding]:
    """About files that hold keys, by their modes."""
    return [Finding(f"{path} holds a key and is open to others (mode {stat.S_IMODE(mode):04o})",
                    f"chmod o-rwx {path}")
            for path, mode in modes.items() if mode & stat.S_IRWXO]


def own_findings(s: Settings, examined: Sequence[Examined], clients: int) -> list[Finding]:
    """About this machine, where descriptors allow so many clients, and names no server knows."""
    findings, needed = list[Finding](), 2 * s.max_connections + SPARE_DESCRIPTORS
    if clients < 0.9 * s.max_connections:
        findings.append(Finding(
            f"file descriptors are enough for {clients} clients, max_connections is"
            f" {s.max_connections}", f"raise their limit to {needed} (ulimit -Hn, LimitNOFILE)"))
    if {server.weight for server in (*s.servers, *s.patterns)} - {0.0, 1.0}:
        findings += [Finding(
            f"weights other than 0 have no effect under policy {name}, which keeps to the rule it"
            " is named after", "choose unified, or give other max_concurrent_requests")
            for name in unweighed(s)]
    findings += [Finding(text, advice) for amiss, text, advice in (
        (s.registration_address, zmq_open_line(s), "keep registration_networks narrow"),
        (not (s.registration_key or s.registration_key_file or s.keys)
         and {*s.registration_networks} - {*LOOPBACK},
         "registration_networks has others, who cannot register over HTTP without a key",
         "set registration_key or registration_key_file"),
    ) if amiss]
    known = {name for one in examined for name in one.models or ()}
    if all(one.models is not None for one in examined):
        named = [(f"the alias {shown(alias)} means", model) for alias, model in s.aliases.items()]
        named += [("default_model is", s.default_model)] if s.default_model else []
        advice = f"name one of {', '.join(sorted(known)[:NAMES_LIMIT]) or 'their models'}"
        findings += [Finding(f"{what} {shown(model)}, which no server has", advice)
                     for what, model in named if model not in known | s.aliases.keys()]
    return findings


def total_capacity(servers: Sequence[ServerSettings]) -> str:
    """Of all engines together; what is to be learned of them is only said to be."""
    known = sum(one.max_concurrent_requests * one.data_parallel_size for one in servers)
    learned = any(one.max_concurrent_requests == AUTO for one in servers)
    return " + ".join([str(known)] * bool(known) + ["auto"] * learned) or "0"


async def preview_servers(s: Settings) -> tuple[list[ServerSettings], list[str]]:
    """The servers that services would find now, and lines about how."""
    servers, lines = list[ServerSettings](), list[str]()
    for row in SERVICES.values():
        if row.preview is not None and (wanted := row.wanted(s)) not in NOT_WANTED:
            found, said = await row.preview(wanted)
            servers, lines = servers + found, lines + said
    return servers, lines


@command("check-config", "read the settings and ask every server", add_config,
         example="check-config servers.toml")
def check_config(args: argparse.Namespace) -> int:
    """Read the settings, examine every server at the same time, and print what was found."""
    path = config_path(args)
    settings, warnings = load_settings(path, overrides_from(args, os.environ))
    for warning in (*warn_of(os.environ, args), *warnings):
        print(f"warning: {warning}")
    secrets = Secrets(settings)
    raise_descriptor_limit()

    async def examine_all() -> tuple[list[ServerSettings], list[str], list[Examined]]:
        servers, lines = await preview_servers(settings)
        for server in servers:
            secrets.adopt(server, Source.DNS)  # or any: it is `like` an entry
        servers = [*settings.servers, *servers]
        return servers, lines, await asyncio.gather(
            *(examine(one, settings, secrets) for one in servers))

    servers, lines, found = asyncio.run(examine_all())
    for server, one in zip(servers, found):
        capacity = server.max_concurrent_requests or "auto"
        print(printable(f"{server.name}  capacity {capacity}  {one.summary}"))
        print_findings(one.findings)
    print(*map(printable, lines), sep="\n", end="\n" * bool(lines))
    print_findings(own_findings(settings, found, descriptors_allow()))
    files = filter(os.path.exists, secret_files(path, settings))  # a kubeconfig may come later
    modes = {name: os.stat(name).st_mode for name in files}
    print_findings(mode_findings(modes))
    usable = sum(one.usable for one in found)
    capacity = total_capacity(servers)
    print(f"{path}: {len(found)} servers, total capacity {capacity}, {usable} usable")
    return 0 if usable else 2


def print_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        print(f"  ! {printable(finding.text)}\n    {printable(finding.advice)}")


if __name__ == "__main__":
    sys.exit(main())
