"""Finds ranks that have died or hang: the ranks' daemon threads, and their criteria.

Every rank's thread sends the first rank's, once a second over a connection of its own, the latest announcement of its
main thread (qat.runtime.ranks), and receives the first rank's in return. The first rank judges the others, they judge
it:

* a connection that closes without a goodbye is a rank that died. The kernel closes it, even after SIGKILL; it detects
  the loss of a host within 75 s.
* a rank that has not reported for longer than its work may take is stopped, or stuck outside of Python.
* a rank that reports, but has made no progress for that long, hangs, unless it waits for another one that is to blame.

Then all ranks end with a nonzero code, even in the middle of a collective, and the last line names the rank to blame.

Time is the judging thread's own: no two hosts' clocks are compared, and it stands still while the process does, so that
a run survives Ctrl-Z. Nothing here calls torch.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

_GRACE = 3.0
"""Seconds from a rank's error to the end of all ranks. By then the other ranks with the same error have reported it,
and a death that caused it has been seen."""
_GOODBYE = 1.0
_SAME_CAUSE = 1.0
"""Seconds from a rank's death to the others' end. The signal that ended it may be on its way to them: the launchers
send it to one rank after the other."""
_DEAD_HOST = {"KEEPIDLE": 15, "KEEPINTVL": 15, "KEEPCNT": 4, "USER_TIMEOUT": 75_000}


@dataclass(frozen=True)
class Sign:
    """A rank's state as it reports it.

    Args:
        rank: the rank's number among all that the launcher started
        host: name of its host
        what: its work, in words
        place: number of announcements that it has made; all ranks make the same ones
        beat: a number that changes whenever it makes progress
        patience: seconds without a new beat, or without a report, that are allowed
        waits: whether it waits for other ranks: then any time without a new beat is allowed
        at: the line of our code that its main thread is in
        in_collective: whether its main thread waits in a collective
    """

    rank: int
    host: str
    what: str
    patience: float
    place: int = 0
    beat: int = 0
    waits: bool = False
    at: str = ""
    in_collective: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


@dataclass
class Seen:
    """A rank's last sign, when it came, and when its beat changed; in seconds of the judge's clock."""

    sign: Sign
    heard: float = 0.0
    changed: float = 0.0

    def hear(self, sign: Sign, now: float) -> None:
        """Note a sign that came ``now``."""
        if sign.beat != self.sign.beat:
            self.changed = now
        self.sign, self.heard = sign, now

    def is_late(self, now: float) -> bool:
        """Return whether its beat has not changed for longer than it may."""
        return now - self.changed > self.sign.patience


def dead(sign: Sign) -> str:
    """Return a sentence that names a rank that died."""
    return f"error: {sign}: it died; last seen at {sign.what}"


def silent(ranks: list[Seen], now: float) -> str | None:
    """Return a sentence that names a rank that has not reported for longer than it may; None if there is none."""
    for seen in ranks:
        if now - seen.heard > seen.sign.patience:
            return f"error: {seen.sign}: no sign of life for {now - seen.heard:.0f} s; last seen at {seen.sign.what}"
    return None


def hanging(ranks: list[Seen], now: float) -> str | None:
    """Return a sentence that names the ranks that keep the others waiting, once that takes too long; None if there are
    none.

    Only the ranks that are furthest behind can be to blame. Of these, one outside of a collective keeps those inside
    waiting; if that does not distinguish them, all are named.
    """
    least = min(seen.sign.place for seen in ranks)
    last = [seen for seen in ranks if seen.sign.place == least and not seen.sign.waits]
    if not last or not all(seen.is_late(now) for seen in last):
        return None
    named = [seen for seen in last if not seen.sign.in_collective] or last
    who, sign = ", ".join(str(seen.sign) for seen in named), named[0].sign
    seconds = min(now - seen.changed for seen in named)
    more = "if the work only takes longer, set QAT_PATIENCE to more seconds"
    return f"error: {who}: no progress for {seconds:.0f} s at {sign.what} ({sign.at}); {more}"


class Watch(threading.Thread):
    """A rank's thread.

    Args:
        own_sign: returns the rank's present state; called often, from the thread
        tick: seconds between two signs
    """

    def __init__(self, own_sign: Callable[[], Sign], tick: float):
        super().__init__(name="watch of the ranks", daemon=True)
        self.over = False
        self._own_sign, self._tick = own_sign, tick
        self._now, self._last_reading, self._last_look = 0.0, time.monotonic(), -tick
        self._selector = selectors.DefaultSelector()
        self._failing, self._all_end, self._parted = False, threading.Event(), threading.Event()
        self._line, self._code = "", 1

    def run(self) -> None:
        try:
            self._watch()
        except BaseException:
            self.leave()  # a fault of this thread must not end its rank
            raise

    def _watch(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select(self._tick):
                self._read(key.data)
            reading = time.monotonic()
            self._now += min(reading - self._last_reading, 3 * self._tick)
            self._last_reading = reading
            if not self.over and self._now - self._last_look >= self._tick:
                self._last_look = self._now
                self._look()

    def fail(self, message: str, code: int) -> tuple[str, int]:
        """Tell all ranks that this one must end, and why; for the main thread. Returns when all know.

        Returns the text that this rank has to print, as one rank reports for all, and its exit code.
        """
        # Launchers send it to all ranks when one has ended: it must not cut off the rank that prints.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._line, self._code, self._failing = message, code, True
        self._report(message, code)
        self._all_end.wait(_GRACE + 10)  # if the first rank hangs, this one reports for itself
        self.over = True
        return self._line, self._code

    def leave(self) -> None:
        """Say goodbye, and wait until that is received: then the end of this process does not count as a death."""
        if self.over:
            return
        self.over = True
        self._say_goodbye()
        self._parted.wait(_GOODBYE)

    def _end(self, line: str, code: int) -> None:
        """End this process, after printing ``line`` if there is one. The main thread does so itself if it can."""
        if self.over:
            return
        self.over = True
        if self._failing:
            self._line, self._code = line, code
            self._all_end.set()
            return
        if line:
            os.write(2, f"\n{line}\n".encode())
        os._exit(code)

    @abstractmethod
    def _read(self, peer: Any) -> None:
        """Process the messages that another rank has sent."""

    @abstractmethod
    def _look(self) -> None:
        """Judge the other ranks, once a tick."""

    @abstractmethod
    def _report(self, message: str, code: int) -> None:
        """Report this rank's error to the first rank."""

    @abstractmethod
    def _say_goodbye(self) -> None: ...


class FirstRank(Watch):
    """The first rank's thread, to which all the others connect at ``port``, with ``token``.

    Args:
        others: the other ranks, in their state before their first report; the first rank's number is one less
    """

    def __init__(self, own_sign: Callable[[], Sign], tick: float, others: list[Sign]):
        super().__init__(own_sign, tick)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=len(others))
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.port, self.token = self._listener.getsockname()[1], secrets.token_hex(16)
        self._own = Seen(own_sign())
        self._others = {sign.rank: Seen(sign) for sign in others}
        self._unheard = set(self._others)
        self._peers: dict[int, _Peer] = {}
        self._failures: dict[int, tuple[str, int]] = {}
        self._failed_at = 0.0

    def _read(self, peer: "_Peer | None") -> None:
        if peer is None:
            connection, _ = self._listener.accept()
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))
            return
        for message in peer.receive():
            if message.get("token") == self.token:  # a port scanner has no token
                self._hear(peer, message)
        if not peer.closed:
            return
        self._selector.unregister(peer.connection)
        peer.close()
        if peer.rank in self._peers:
            del self._peers[peer.rank]
            if peer.rank in self._others:
                time.sleep(_SAME_CAUSE)
                self._end_all(dead(self._others[peer.rank].sign))
        if not self._peers and not self._unheard:
            self._parted.set()

    def _hear(self, peer: "_Peer", message: dict[str, Any]) -> None:
        sign = Sign(**message["sign"])
        peer.rank = sign.rank
        self._peers[sign.rank] = peer
        self._unheard.discard(sign.rank)
        self._others[sign.rank].hear(sign, self._now)
        if self.over:
            peer.send(goodbye=True)
        elif "goodbye" in message:
            del self._others[sign.rank]
            peer.closed = True
        elif "failure" in message:
            self._note(sign.rank, *message["failure"])
        else:
            peer.send(sign=asdict(self._own_sign()))

    def _look(self) -> None:
        self._own.hear(self._own_sign(), self._now)
        others = [*self._others.values()]
        if self._failures:
            if len(self._failures) > len(others) or self._now - self._failed_at > _GRACE:
                self._end_all(*self._failure())
        elif found := silent(others, self._now) or hanging([self._own, *others], self._now):
            self._end_all(found)

    def _failure(self) -> tuple[str, int]:
        """Return the error of the lowest rank that failed, which stands for all; the rank's name is left out if all
        have failed."""
        rank = min(self._failures)
        message, code = self._failures[rank]
        if len(self._failures) > len(self._others):
            return message, code
        sign = self._others[rank].sign if rank in self._others else self._own.sign
        return f"{message} ({sign}, at {sign.what})", code

    def _note(self, rank: int, message: str, code: int) -> None:
        self._failed_at = self._failed_at if self._failures else self._now
        self._failures[rank] = message, code

    def _end_all(self, line: str, code: int = 1) -> None:
        if self.over:
            return
        for peer in self._peers.values():
            peer.send(end=code)
        time.sleep(min(0.5, self._tick))  # the others end in silence, and first, so that the line is the last one
        self._end(line, code)

    def _report(self, message: str, code: int) -> None:
        self._note(self._own.sign.rank, message, code)

    def _say_goodbye(self) -> None:
        peers = [*self._peers.values()]
        for peer in peers:
            peer.send(goodbye=True)
        if not peers and not self._unheard:
            self._parted.set()


class OtherRank(Watch):
    """The thread of a rank that is not the first.

    Args:
        address: host and port of the first rank
        first: the first rank, in its state before its first report
    """

    def __init__(self, own_sign: Callable[[], Sign], tick: float, address: tuple[str, int], token: str, first: Sign):
        super().__init__(own_sign, tick)
        self._peer, self._token = _Peer(socket.create_connection(address, timeout=60)), token
        self._selector.register(self._peer.connection, selectors.EVENT_READ, self._peer)
        self._first, self._answered = Seen(first), True

    def _read(self, peer: "_Peer") -> None:
        for message in peer.receive():
            if "end" in message:
                self._end("", message["end"])
            elif "goodbye" in message:
                self.over = peer.closed = True
            else:
                self._first.hear(Sign(**message["sign"]), self._now)
                self._answered = True
        if peer.closed:
            self._selector.unregister(peer.connection)
            peer.close()
            self._parted.set()
            if not self.over:
                time.sleep(_SAME_CAUSE)
                self._end(dead(self._first.sign), 1)

    def _look(self) -> None:
        if self._answered:  # one at a time: a hanging rank is not sent more than the kernel can hold
            self._answered = False
            self._send()
        if found := silent([self._first], self._now):
            self._end(found, 1)

    def _send(self, **message: Any) -> None:
        self._peer.send(token=self._token, sign=asdict(self._own_sign()), **message)

    def _report(self, message: str, code: int) -> None:
        self._send(failure=[message, code])

    def _say_goodbye(self) -> None:
        self._send(goodbye=True)


class _Peer:
    """A connection to another rank: JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _DEAD_HOST.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)
        self.connection, self.closed, self.rank = connection, False, -1
        self._unread = b""

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # receive notices a broken connection
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come; afterwards ``closed`` tells whether they were the last."""
        try:
            while piece := self.connection.recv(1 << 16):
                self._unread += piece
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._unread = self._unread.split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):  # not one of our ranks
            self.closed = True
            return []

    def close(self) -> None:
        with suppress(OSError):
            self.connection.close()
