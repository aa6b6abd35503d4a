"""How processes of one job notice that another has ended, whatever each is doing at the moment.

Every process holds a connection to the first, on which nothing is said until the end.  Its own
system closes it when a process dies, so a kill is noticed at once and a slow process, however
slow, is never taken for a dead one; a host that is gone is noticed by the system's probes in half a
minute.  The first passes on what it hears.  The main thread is then interrupted as by Ctrl-C, so
that locks and temporary files are given up in order; one that waits in a library is ended after
some seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

_GRACE = 10.0
"""Seconds that the main thread has to end after it was told to."""
_SAME = 1.0
"""Seconds in which a process may find the same bad input by itself, to say it as its own."""
_NEWS = 5.0
"""Seconds in which the cause of a broken connection must be known: it comes in milliseconds."""
_LIMIT = 65536
"""Bytes of a message."""
_SIOCGIFADDR = 0x8915  # of Linux: an interface's address


class LostRankError(ConnectionError):
    """Another process of the job has ended before its work was done."""


class Watch:
    """The connections of this process: to the first, or of the first to all others.

    Attributes:
        index: which process this is.
        count: how many there are.
        hosts: the host's name of each process.
    """

    def __init__(self, index: int, count: int, store: Any, seconds: float) -> None:
        """Connect, by way of a torch.distributed store; LostRankError after so many seconds."""
        self.index, self.count = index, count
        self.hosts = [""] * count
        self._news: BaseException | None = None
        self._heard = threading.Event()
        self._first_is_lost = False
        self._ending = False
        self._leaving = False
        self._left = threading.Event()
        self._peers: dict[socket.socket, int] = {}
        self._main = threading.main_thread()
        until = time.monotonic() + seconds
        if index == 0:
            self._listen(store, until)
        else:
            self._connect(store, until)
        for peer in self._peers:
            _probe(peer)
        self._before = signal.signal(signal.SIGTERM, self._terminated)
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends by an error, unless it came from them."""
        self._leaving = True
        if error is not self._news and self._news is None:
            self._ending = True
            self._send({"by": self.index, **_described(error)})
            if self.index:  # the first may be about to say the same by itself
                self._heard.wait(2 * _SAME)
        self._left.set()

    def close(self) -> None:
        """End the watch: all work is done everywhere."""
        self._ending = True
        self._send({"by": self.index, "kind": "done"})
        signal.signal(signal.SIGTERM, self._before)

    def explain(self, error: Exception) -> BaseException:
        """Say who is gone, where waiting for others has failed."""
        if self._heard.wait(_NEWS):
            assert self._news is not None
            return self._news
        return LostRankError(
            f"the processes must reach each other, but {_one_line(error)}. "
            "Check the network between the hosts; the same command goes on."
        )

    def speaks(self) -> bool:
        """Whether this process is the one to say on its host how the job has ended."""
        local = os.environ.get("LOCAL_RANK", "0")
        return local == "0" or (self._first_is_lost and self.index == 1)

    def _listen(self, store: Any, until: float) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        word = secrets.token_hex(16)
        address = [_own_address(), os.environ["MASTER_ADDR"]]
        store.set("watch", json.dumps([word, server.getsockname()[1], *address]))
        self.hosts[0] = socket.gethostname()
        while len(self._peers) < self.count - 1:
            server.settimeout(max(0.0, until - time.monotonic()))
            try:
                peer, _ = server.accept()
                peer.settimeout(10)
                hello = json.loads(_line(peer))
            except TimeoutError as error:
                missing = sorted({*range(1, self.count)} - {*self._peers.values()})
                raise LostRankError(
                    f"all {self.count} processes must come together, but process {missing[0]} "
                    "has not come. Start the same command on every host."
                ) from error
            except (OSError, ValueError):
                continue  # no process of ours
            if isinstance(hello, list) and len(hello) == 3 and hello[0] == word:
                self._peers[peer] = int(hello[1])
                self.hosts[int(hello[1])] = str(hello[2])
        server.close()
        self._send({"hosts": self.hosts})

    def _connect(self, store: Any, until: float) -> None:
        word, port, *addresses = json.loads(store.get("watch"))
        for address in addresses:
            try:
                peer = socket.create_connection((address, port), timeout=10)
            except OSError as error:
                failed = error
                continue
            hello = [word, self.index, socket.gethostname()]
            peer.sendall(json.dumps(hello).encode() + b"\n")
            peer.settimeout(max(1.0, until - time.monotonic()))
            try:
                self.hosts = json.loads(_line(peer))["hosts"]
            except (OSError, ValueError) as error:
                raise LostRankError(
                    f"process {self.index} of {self.count} must hear from the first, but has not "
                    f"({error}). Start the same command on every host."
                ) from error
            self._peers[peer] = 0
            return
        raise LostRankError(
            f"process {self.index} of {self.count} must reach the first at "
            f"{' or '.join(addresses)}, port {port}, but cannot ({failed}). "
            "Let the hosts connect to each other."
        )

    def _run(self) -> None:
        """Wait for the end of others (a thread of its own)."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                peer.settimeout(None)
                selector.register(peer, selectors.EVENT_READ, peer)
            while self._peers:
                for key, _ in selector.select():
                    selector.unregister(key.data)
                    self._hear(self._peers.pop(key.data), key.data)

    def _hear(self, whose: int, peer: socket.socket) -> None:
        try:
            message = json.loads(_line(peer))
        except (OSError, ValueError):
            message = {"by": whose, "kind": "lost"}
        if message["kind"] == "done" or self._ending or self._news is not None:
            if self._ending:
                self._heard.set()
            return
        self._news = self._error(message)
        self._heard.set()
        self._send(message)
        if message["kind"] == "input":
            time.sleep(_SAME)
        signal.pthread_kill(self._main.ident or 0, signal.SIGTERM)
        self._force()

    def _error(self, message: dict[str, Any]) -> BaseException:
        by, text = int(message["by"]), message.get("text", "")
        who = f"process {by} of {self.count} on {self.hosts[by]}"
        go_on = "The same command goes on, with any number of processes."
        if message["kind"] == "input":
            return ValueError(f"{who}: {text}")
        if message["kind"] == "interrupted":
            return KeyboardInterrupt(f"{who} was interrupted. {go_on}")
        if message["kind"] == "failed":
            return LostRankError(f"{who} has failed: {text} {go_on}")
        self._first_is_lost = by == 0
        return LostRankError(
            f"{who} has ended without a word: killed, out of memory, or out of reach. {go_on}"
        )

    def _send(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers):
            with suppress(OSError):  # gone itself
                peer.sendall(json.dumps(message).encode() + b"\n")

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """Raise, in the main thread, what was heard; torchrun ends the others by SIGTERM too.

        Not where the main thread is on its way out: it may know by a broken connection already.
        """
        if self._ending or self._leaving:
            return
        if self._heard.wait(_SAME):
            assert self._news is not None
            raise self._news
        raise KeyboardInterrupt

    def _force(self) -> None:
        """End the process where the main thread does not."""
        if self._left.wait(_GRACE):
            return
        if self.speaks():
            print(f"error: {self._news}", file=sys.stderr, flush=True)
        os._exit(2)


def _described(error: BaseException) -> dict[str, str]:
    if isinstance(error, KeyboardInterrupt):
        return {"kind": "interrupted"}
    kind = "input" if isinstance(error, ValueError) else "failed"
    text = _one_line(error)
    if not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return {"kind": kind, "text": text[: _LIMIT // 16]}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _line(peer: socket.socket) -> bytes:
    """Read up to the end of a line; ValueError where none comes."""
    found = b""
    while not found.endswith(b"\n"):
        more = peer.recv(4096)
        if not more or len(found) > _LIMIT:
            raise ValueError("the connection was closed")
        found += more
    return found


def _probe(peer: socket.socket) -> None:
    """Let the system find out in half a minute that the host at the other end is gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _own_address() -> str:
    """Find the address by which this host reaches the job's master, hence others reach it."""
    target = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    found = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
    with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
        probe.connect(found[4])
        return str(probe.getsockname()[0])


def interface() -> str | None:
    """Find the interface of that address; gloo alone goes by the host's name, often 127.0.1.1."""
    address = _own_address()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has no address of version 4
                found = fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None
