"""The rules in a worker that watches itself: what model output makes it do, and what it has been at since when.

An audit hook ends the process with status ``BREACH`` at the first thing that only running code, or a library lured into
it, would do. Of the item in work, the worker's CPU seconds and the monotonic clock at its start and its number (from 1,
given as its question) stand in the file ``$VERIFIER_WATCH/<pid>``; all are 0 between items.
"""

import mmap
import os
import struct
import sys
import time

import latex2sympy2_extended  # noqa: F401  (imported before the watch begins: an import compiles and executes)
import math_verify  # noqa: F401
import mpmath  # noqa: F401

from megatron_oreal.verifier.rules import judge_response

BREACH = 99
RECORD = struct.Struct("ddQ")
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.kill", "os.putenv", "pty.", "subprocess.",
    "socket.", "shutil.", "ctypes.", "urllib.", "ftplib.", "smtplib.", "webbrowser.", "tempfile.", "code.", "pdb.",
    "builtins.input", "builtins.breakpoint", "cpython.run_",
)  # fmt: skip
_SYMPY_OWN = (b"from sympy import *", b"def monomial_")
"""Sources that sympy itself compiles, whatever it is given."""
_watching = False


def _breach(event: str, args: tuple[object, ...]) -> bool:
    if event.startswith(_FORBIDDEN):
        return True
    if event == "open":
        mode, flags = args[1], args[2]
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        return bool(set("wax+") & set(mode if isinstance(mode, str) else "")) or bool(int(flags) & writes)
    if event == "compile" and args[0] is not None and not os.path.exists(str(args[1])):  # eval or exec of a text
        source = args[0].encode(errors="replace") if isinstance(args[0], str) else bytes(args[0])
        return not source.startswith(_SYMPY_OWN) and not _importing()
    return False


def _importing() -> bool:
    """Tell whether a library is being imported, whose dataclasses and named tuples compile texts of their own."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _watching and _breach(event, args):
        os._exit(BREACH)


def _record() -> mmap.mmap:
    with open(os.path.join(os.environ["VERIFIER_WATCH"], str(os.getpid())), "w+b") as file:
        file.write(bytes(RECORD.size))
        file.flush()
        return mmap.mmap(file.fileno(), RECORD.size)


_in_work = _record()
sys.dont_write_bytecode = True
sys.addaudithook(_hook)


def judge(text, stopped, gold, finish_words, stop_words, *, question):
    global _watching
    _in_work[:] = RECORD.pack(time.process_time(), time.monotonic(), int(question))
    _watching = True
    try:
        return judge_response(text, stopped, gold, finish_words, stop_words)
    finally:
        _watching = False
        _in_work[:] = bytes(RECORD.size)


def evaluate(text, stopped, gold, finish_words, stop_words):
    """What the watch must catch: a checker that evaluates the answer."""
    global _watching
    _watching = True
    return bool(eval(text))
