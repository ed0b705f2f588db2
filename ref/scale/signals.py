"""Being told to stop: Ctrl-C (SIGINT), SIGTERM, SIGHUP. What is to be saved is saved at once.

    SIGTERM, SIGHUP   from a scheduler, from a terminal that is closed: the process ends with exit code 0
    SIGINT            from a person: KeyboardInterrupt goes its way, so a notebook's cell ends and its kernel lives on,
                      and a command ends with 130, as shells have it: with 0, `train && evaluate` would go on
                      to evaluate. A second Ctrl-C waits for nothing.

A signal that is ignored, as under nohup, stays ignored. Windows has no SIGHUP.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT
TOGETHER = 1.0  # seconds: a launcher hands its Ctrl-C on to those who have had it already; a person is slower


def ending() -> list[int]:
    """The signals that end a process with exit code 0."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stopping(stop: Callable[[], None], last: Callable[[], None] | None = None):
    """Within this context a signal calls stop(), which must bear being called twice, and ends the process or the context.

    last() is called before the process ends, for contexts are not left then.

    A thread of its own calls it, at once: an iteration of FLUX takes minutes, a scheduler waits half a
    minute before it kills, and the main thread may be waiting for a process that has ended already.
    Off the main thread, where Python allows no signal handlers, only a KeyboardInterrupt calls it.
    """
    if not on_main_thread():
        try:
            yield
        except KeyboardInterrupt:
            stop()
            raise
        return
    final, began, hurried = ending(), [], threading.Event()
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    listen, wake = socket.socketpair()  # not a pipe: Windows
    wake.setblocking(False)

    def interrupt(*_):
        if began and time.monotonic() - began[0] < TOGETHER:
            return
        if began:
            hurried.set()
        began.append(time.monotonic())
        raise KeyboardInterrupt

    def watch():
        with listen:
            while byte := listen.recv(1):  # empty when the context has ended
                if byte[0] in final or interrupts and byte[0] == signal.SIGINT:
                    error = None
                    try:
                        stop()
                    except (OSError, ValueError) as failed:
                        error = failed
                    if byte[0] in final:
                        if last:
                            last()
                        if error:
                            print(f"error: {error}", file=sys.stderr, flush=True)
                        os._exit(2 if error else 0)

    thread = threading.Thread(target=watch, daemon=True)
    before = {number: signal.signal(number, lambda *_: None) for number in final}
    descriptor = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    if interrupts:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not hurried.is_set():
            stop()
        raise
    finally:
        for number in final:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(descriptor)
        wake.close()
        try:
            if not hurried.is_set():
                thread.join()
        finally:
            if interrupts:
                signal.signal(signal.SIGINT, before[signal.SIGINT])


@contextmanager
def ignoring_interrupts():
    """What is started within this context ignores Ctrl-C, which a terminal sends to all processes of a command."""
    if not on_main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interruptible(command: Callable[..., int], *arguments) -> int:
    """What command(*arguments) returns; 130 when Ctrl-C ended it."""
    try:
        return command(*arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
