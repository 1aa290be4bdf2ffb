"""Work in a thread of its own, for tests of who waits for whom."""

import threading


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
