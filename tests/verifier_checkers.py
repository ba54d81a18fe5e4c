"""Checkers that a verifier worker imports in tests, to be slow, greedy or mortal on demand."""

import os
import signal
import time

from megatron_oreal.verifier.rules import judge_response
from megatron_oreal.verifier.untimed import untimed
from megatron_oreal.verifier.verdict import Judgement, Verdict


def on_demand(text, stopped, gold, finish_words, stop_words):
    if text == "allocate":
        return bytearray(8 * 2**30)
    if text == "hold the interpreter lock":
        return pow(3, 10**9)
    if text == "segfault":
        import ctypes

        ctypes.string_at(0)
    if text == "exit":
        os._exit(3)
    if text == "ignore the alarm":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(3600)
    if text == "import":
        raise ImportError("cannot import name 'x' from partially initialized module 'y'")
    if text == "clocks":
        before, _ = signal.getitimer(signal.ITIMER_REAL)
        with untimed():
            inside, _ = signal.getitimer(signal.ITIMER_REAL)
        after, _ = signal.getitimer(signal.ITIMER_REAL)
        return Judgement(Verdict.UNKNOWN, f"{before} {inside} {after}")
    if text.startswith("load until "):
        with untimed():
            while not os.path.exists(text.removeprefix("load until ")):
                time.sleep(0.02)
    elif text.startswith("load "):
        with untimed():
            time.sleep(float(text.split()[1]))
        time.sleep(float(text.split()[2]))
    if text == "raise":
        raise KeyError("broken checker")
    if text.startswith("sleep "):
        time.sleep(float(text.split()[1]))
    return judge_response(f"\\boxed{{{os.getpid()}}}", stopped, gold)


def no_verdict(text, stopped, gold, finish_words, stop_words):
    raise KeyError("broken checker")


def modules(text, stopped, gold, finish_words, stop_words):
    import sys

    return Judgement(Verdict.WRONG, " ".join(sorted(sys.modules)))


def with_question(text, stopped, gold, finish_words, stop_words, *, question):
    if text == question:
        return True
    return {"true": True, "false": False, "none": None, "number": 1}[text]
