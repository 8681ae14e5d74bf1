"""Detects which other processes of a launch have ended or vanished, and exchanges exit messages."""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from ipaddress import ip_address
from typing import NamedTuple

import psutil
import torch.distributed as dist

from distill.errors import InputError, Interrupted, RunFailed
from distill.launching.exit_messages import MAX_CHARACTERS, describe
from distill.launching.heartbeat import Heartbeat

KINDS: dict[str, type[BaseException]] = {"interrupted": Interrupted, "input": InputError, "failed": RunFailed}
SILENCE_LIMIT = 30.0
"""Seconds without a beat until a process counts as vanished. After a shorter interruption of the network, TCP delivers
what was lost within 25 s."""
LONGEST_GAP = 1.0
"""Seconds that count between two looks at the beats: a process that was suspended has missed nobody's."""
STORE_TIMEOUT = 2.0
"""Seconds to wait for the store when the launch ends."""


class Member(NamedTuple):
    """A process of the launch."""

    host: str
    namespaces: tuple[str, ...]
    pid: int
    addresses: list[str]
    """Of its network interfaces, other than loopback."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {', '.join([self.host, *self.addresses[:1]])}"


class Connection(NamedTuple):
    """A TCP connection of this process; the descriptor may belong to another one later."""

    descriptor: int
    local: tuple[str, int]
    remote: tuple[str, int]


class Ranks:
    """The other processes of the launch; construction is collective.

    Ended processes are detected on the same machine only, at once; vanished machines by their heartbeats. Exit messages
    go through the launch's key-value store, which ends with process 0 unless torchrun hosts it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group`: a CPU (gloo) group."""
        self._rank, size = dist.get_rank(), dist.get_world_size()
        self._heartbeat = Heartbeat(dist.distributed_c10d._get_default_store().clone(), self._rank, size)
        own = Member(socket.gethostname(), _namespaces(), os.getpid(), _addresses())
        self._all = [own] * size
        dist.all_gather_object(self._all, own, group=group)
        self._handles: dict[int, int] = {}
        """Rank -> file descriptor that becomes readable when the process ends."""
        for rank, member in enumerate(self._all):
            if rank != self._rank and member[:2] == own[:2] and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # an old kernel, or the process has just ended
                    self._handles[rank] = os.pidfd_open(member.pid)
        # Later ones may be of other libraries.
        self._connections = _connections()
        self._beats = [beat for beat, _ in self._heartbeat.values]
        self._heard = [0.0] * size
        self._awake, self._looked = 0.0, time.monotonic()
        self._silent: list[int] = []
        self._heartbeat.start()

    def ended(self) -> list[int]:
        """Ranks on this machine that have ended."""
        return [rank for rank, handle in self._handles.items() if select.select([handle], [], [], 0)[0]]

    def silent(self) -> list[int]:
        """Ranks that have not been heard from for `SILENCE_LIMIT` seconds, this one among them if the store does not
        answer. Call it at least every `LONGEST_GAP` seconds.
        """
        now = time.monotonic()
        self._awake += min(now - self._looked, LONGEST_GAP)
        self._looked = now
        for rank, (beat, _) in enumerate(self._heartbeat.values):
            if beat != self._beats[rank]:
                self._beats[rank], self._heard[rank] = beat, self._awake
        if not self._heartbeat.ended:
            self._silent = [rank for rank, heard in enumerate(self._heard) if self._awake - heard > SILENCE_LIMIT]
        return self._silent

    @property
    def isolated(self) -> bool:
        """Whether the store, and with it the machine of process 0, has vanished."""
        return self._rank in self._silent

    def disconnect(self) -> None:
        """Shut down the connections to silent ranks that existed from the start, gloo's and the store's: whatever waits
        for an answer raises now, not after hours.
        """
        vanished = {address for rank in self._silent for address in self._all[rank].addresses}
        vanished -= set(self._all[self._rank].addresses)
        for connection in set(self._connections) & set(_connections()):
            if connection.remote[0] in vanished:
                with suppress(OSError), socket.socket(fileno=os.dup(connection.descriptor)) as duplicate:
                    duplicate.shutdown(socket.SHUT_RDWR)

    def exit_cause(self) -> BaseException | None:
        """Why the others ended: a process that died without a message, else one that vanished, else a failure, else an
        interruption; None: not known.
        """
        ended, messages = self.ended(), self._messages()  # in this order: a process writes its message, then ends
        for rank in ended:
            if rank not in messages:
                died = f"process {rank} died ({self._all[rank]})"
                return RunFailed(f"{died}: killed, out of memory, or crashed. The others stopped.")
        if vanished := [rank for rank in self._silent if rank not in messages]:
            return RunFailed(self._describe(vanished))
        # Without messages that repeat this process's own.
        others = [(kind, text) for kind, text in messages.values() if not text.startswith(f"process {self._rank}:")]
        others.sort(key=lambda message: message[0] == "interrupted")
        return KINDS[others[0][0]](others[0][1]) if others else None

    def _describe(self, vanished: list[int]) -> str:
        if self.isolated:
            return (
                f"process 0 ({self._all[0]}) vanished: the launch's key-value store on its machine has not answered "
                f"for {SILENCE_LIMIT:.0f} s. That machine, its launcher or the network to it is down."
            )
        first, *more = (f"{rank} ({self._all[rank]})" for rank in vanished)
        others = f", and so did {', '.join(more)}" if more else ""
        return (
            f"process {first} vanished{others}: not heard from for {SILENCE_LIMIT:.0f} s. Its machine or the network "
            "to it is down. The others stopped."
        )

    def write_exit_message(self, error: BaseException) -> None:
        """Store the exit message of this process for the others; the last beat."""
        kind = next((kind for kind, class_ in KINDS.items() if isinstance(error, class_)), "failed")
        expected = kind != "failed" or isinstance(error, RunFailed)
        text = str(error) if expected else f"{describe(error)[:MAX_CHARACTERS]} (details in train.log)"
        if kind != "interrupted" and not text.startswith("process "):
            text = f"process {self._rank}: {text}"
        if not self.isolated:
            self._heartbeat.write_message([kind, text], STORE_TIMEOUT)
        self._heartbeat.close()  # whoever hosts the store may end before this process

    def stop_beating(self) -> None:
        """No process counts as vanished from now on."""
        self._heartbeat.close()

    def close(self) -> None:
        """Stop watching the other processes."""
        self._heartbeat.close()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _messages(self) -> dict[int, tuple[str, str]]:
        """Rank -> kind (a key of `KINDS`) and text."""
        if not self.isolated:
            self._heartbeat.refresh(STORE_TIMEOUT)
        messages = enumerate(message for _, message in self._heartbeat.values)
        return {rank: (message[0], message[1]) for rank, message in messages if message and rank != self._rank}


def _addresses() -> list[str]:
    """Of the network interfaces, other than loopback and link-local ones; IPv4 first."""
    found = {
        ip_address(address.address.partition("%")[0])
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    usable = [address for address in found if not address.is_loopback and not address.is_link_local]
    return [str(address) for address in sorted(usable, key=lambda address: (address.version, int(address)))]


def _connections() -> list[Connection]:
    """The TCP connections of this process, IPv4 addresses as such; none where they cannot be listed."""
    try:
        listed = psutil.Process().net_connections("tcp")
    except (psutil.Error, OSError):
        return []
    return [Connection(found.fd, _plain(*found.laddr), _plain(*found.raddr)) for found in listed if found.raddr]


def _plain(address: str, port: int) -> tuple[str, int]:
    return address.removeprefix("::ffff:"), port


def _namespaces() -> tuple[str, ...]:
    """Process ids are unique within a namespace; containers may share a host name but not the namespace. Those of
    another network count as another machine.
    """
    try:
        return os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/net")
    except OSError:
        return ()
