"""Detects which other processes of a launch have ended, and exchanges exit messages."""

from __future__ import annotations

import json
import os
import select
import socket
from contextlib import suppress

import torch.distributed as dist

from distill.errors import InputError, Interrupted, RunFailed
from distill.launching.exit_messages import MAX_CHARACTERS, describe

KINDS: dict[str, type[BaseException]] = {"interrupted": Interrupted, "input": InputError, "failed": RunFailed}


class Ranks:
    """The other processes of the launch; construction is collective.

    Ended processes are detected on the same machine only. Exit messages go through the launch's key-value store, which
    ends with process 0 unless torchrun hosts it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group`: a CPU (gloo) group."""
        self._rank = dist.get_rank()
        # A separate connection: the watching thread must not wait for the main thread's requests.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.delete_key(_key(self._rank))  # of an earlier run in this process
        own = (socket.gethostname(), _pid_namespace(), os.getpid())
        self._all = [own] * dist.get_world_size()
        dist.all_gather_object(self._all, own, group=group)
        self._handles: dict[int, int] = {}
        """Rank -> file descriptor that becomes readable when the process ends."""
        for rank, (*machine, pid) in enumerate(self._all):
            if rank != self._rank and machine == [*own[:2]] and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # an old kernel, or the process has just ended
                    self._handles[rank] = os.pidfd_open(pid)

    def ended(self) -> list[int]:
        """Ranks on this machine that have ended."""
        return [rank for rank, handle in self._handles.items() if select.select([handle], [], [], 0)[0]]

    def exit_cause(self) -> BaseException | None:
        """Why the others ended: a process that died without a message, else a failure, else an interruption; None: not
        known.
        """
        ended, messages = self.ended(), self._messages()  # in this order: a process writes its message, then ends
        for rank in ended:
            if rank not in messages:
                host, _, pid = self._all[rank]
                died = f"process {rank} died (pid {pid} on {host})"
                return RunFailed(f"{died}: killed, out of memory, or crashed. The others stopped.")
        # Without messages that repeat this process's own.
        others = [(kind, text) for kind, text in messages.values() if not text.startswith(f"process {self._rank}:")]
        others.sort(key=lambda message: message[0] == "interrupted")
        return KINDS[others[0][0]](others[0][1]) if others else None

    def write_exit_message(self, error: BaseException) -> None:
        """Store the exit message of this process for the others."""
        kind = next((kind for kind, class_ in KINDS.items() if isinstance(error, class_)), "failed")
        expected = kind != "failed" or isinstance(error, RunFailed)
        text = str(error) if expected else f"{describe(error)[:MAX_CHARACTERS]} (details in train.log)"
        if kind != "interrupted" and not text.startswith("process "):
            text = f"process {self._rank}: {text}"
        with suppress(RuntimeError):
            self._store.set(_key(self._rank), json.dumps([kind, text]))

    def close(self) -> None:
        """Stop watching the other processes."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _messages(self) -> dict[int, tuple[str, str]]:
        """Rank -> kind (a key of `KINDS`) and text."""
        others = [rank for rank in range(len(self._all)) if rank != self._rank]
        try:
            found = [rank for rank in others if self._store.check([_key(rank)])]
            return {rank: tuple(json.loads(self._store.get(_key(rank)))) for rank in found}
        except RuntimeError:  # the store ended with process 0
            return {}


def _key(rank: int) -> str:
    return f"distill/exit/{rank}"


def _pid_namespace() -> str:
    """Process ids are unique within a namespace; containers may share a host name but not the namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
