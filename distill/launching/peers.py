"""The other processes of a launch: who died, and what those that left on their own said."""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import dataclass

import torch.distributed as dist

from distill.errors import InputError, RunFailed
from distill.launching.ending import LONGEST, describe
from distill.launching.launcher import Process, find_process
from distill.launching.signals import Interrupted

KINDS: dict[str, type[BaseException]] = {"interrupted": Interrupted, "input": InputError, "failed": RunFailed}
_log = logging.getLogger("distill")


@dataclass(frozen=True)
class _Peer:
    host: str
    machine: str
    """The host and the namespace of its process numbers: within one, a number is a process."""
    process: Process | None
    note: int | None
    """That process's descriptor of the memory that its last word goes to."""


class Peers:
    """Collective to build. Those on this machine are watched; the rest are known by what they say, or by a connection
    that breaks.

    What a process says when it leaves goes to the launch's store, for other machines, and into memory that all of its
    own machine have open: without a launcher that keeps it, the store is gone with process 0, and its word with it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        host = socket.gethostname()
        self._note = _new_note()
        own = _Peer(host, f"{host} {_pid_namespace()}", find_process(os.getpid()), self._note)
        self.rank = dist.get_rank()
        self._all: list[_Peer] = [own] * dist.get_world_size()
        dist.all_gather_object(self._all, own, group=group)
        self._here = {
            rank: peer.process
            for rank, peer in enumerate(self._all)
            if rank != self.rank and peer.machine == own.machine and peer.process is not None and peer.process.lives
        }
        self._notes = {rank: note for rank in self._here if (note := _open_note(self._all[rank])) is not None}
        self._store = dist.distributed_c10d._get_default_store()

    def anyone_gone(self) -> bool:
        """Whether a process of this machine has ended, one way or the other."""
        return any(not process.lives for process in self._here.values())

    def dead(self) -> list[int]:
        """The ranks of this machine that ended without a word."""
        return [rank for rank, process in self._here.items() if not process.lives and self._word_of(rank) is None]

    def first_here(self) -> bool:
        """Whether this is the lowest of the living ranks of this machine, and no lower one spoke of process 0's death
        before it ended.
        """
        lower = [rank for rank in self._here if rank < self.rank]
        return not any(self._here[rank].lives or self._spoke_of_a_death(rank) for rank in lower)

    def _spoke_of_a_death(self, rank: int) -> bool:
        word = self._word_of(rank)
        return word is not None and word[1].startswith("process 0 died")

    def end(self) -> BaseException | None:
        """What the others ended with: a death before what anyone said, a failure before an interruption."""
        if dead := self.dead():
            rank = dead[0]
            process = self._here[rank]
            where = f"pid {process.pid} on {self._all[rank].host}"
            return RunFailed(f"process {rank} died ({where}): killed, out of memory, or crashed. The others stopped.")
        words = [word for rank in range(len(self._all)) if rank != self.rank and (word := self._word_of(rank))]
        words.sort(key=lambda word: word[0] == "interrupted")
        return KINDS[words[0][0]](words[0][1]) if words else None

    def broken(self, error: BaseException) -> BaseException | None:
        """The same error in other words, if it is of a connection to a process on another machine."""
        elsewhere = [rank for rank, peer in enumerate(self._all) if peer.machine != self._all[self.rank].machine]
        lost = any(sign in str(error) for sign in ("peer", "onnection", "imed out", "remote process exited"))
        if not elsewhere or not lost or not isinstance(error, RuntimeError):
            return None
        hosts = ", ".join(sorted({self._all[rank].host for rank in elsewhere}))
        return RunFailed(
            f"a process on another machine died or cannot be reached: one of {elsewhere} on {hosts}. "
            "The log there says more."
        )

    def leave(self, error: BaseException) -> bool:
        """Tell the others why this process leaves; whether that was possible."""
        kind = next((kind for kind, class_ in KINDS.items() if isinstance(error, class_)), "failed")
        foreseen = kind != "failed" or isinstance(error, RunFailed)
        text = str(error) if foreseen else f"{describe(error)[:LONGEST]} (details in train.log)"
        own = text if kind == "interrupted" or text.startswith("process ") else f"process {self.rank}: {text}"
        word = json.dumps([kind, own])
        try:
            if self._note is not None:
                os.write(self._note, f"{word}\n".encode())
            if len(self._notes) < len(self._all) - 1:
                self._store.set(f"distill/{self.rank}", word)
        except (OSError, RuntimeError):
            return 0 in self._notes  # which then says that this process died without a word, or has written it
        return True

    def _word_of(self, rank: int) -> tuple[str, str] | None:
        if (note := self._notes.get(rank)) is not None:
            text = os.pread(note, os.fstat(note).st_size, 0).decode(errors="replace")
            return tuple(json.loads(text.splitlines()[-1])) if text.endswith("\n") else None
        key = f"distill/{rank}"
        try:
            found = self._store.check([key]) and self._store.get(key)
        except RuntimeError:  # the store went with its process
            return None
        return tuple(json.loads(found)) if found else None


def _new_note() -> int | None:
    """None where the system has no such memory."""
    try:
        return os.memfd_create("distill") if hasattr(os, "memfd_create") else None
    except OSError:
        return None


def _open_note(peer: _Peer) -> int | None:
    """None where it died already, or the system does not let us."""
    try:
        return None if peer.process is None else os.open(f"/proc/{peer.process.pid}/fd/{peer.note}", os.O_RDONLY)
    except OSError:
        return None


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
