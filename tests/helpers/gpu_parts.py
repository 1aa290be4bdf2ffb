"""Parts for the tests of `benchmarks.gpu.command`: one that works, and some that do not."""

import os
import time


def works(part):
    part.add("a row", correct=True)


def hangs(part):
    part.add("a row before it hangs", correct=True)
    time.sleep(600)


def dies(part):
    part.add("a row before it dies", correct=True)
    os._exit(7)


def raises(part):
    with part.attempt("a caught error"):
        raise ZeroDivisionError("caught")
    part.add("a row after it", correct=True)
    raise ValueError("not caught")


def gives_wrong_values(part):
    part.add("good", correct=True)
    part.add("bad", correct=False)


def is_slow(part):
    part.on_gpu = True
    part.check("ours / theirs", 1.5, 1.02)
