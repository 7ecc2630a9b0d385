"""Clients over HTTP and gRPC, at work until standard input ends.

    clients.py ADDRESS

Each request is a line of JSON on standard output: its protocol, the number of its
connection, when that was begun and when the answer was there (CLOCK_MONOTONIC, ns), and
the version of the model that answered, or what went wrong.
"""

import itertools
import json
import random
import signal
import sys
import threading
import time

from v2 import Grpc, Http

PROTOCOLS = {"http": Http, "grpc": Grpc}
# Of each protocol: how long they keep a connection, seconds.
KEPT = [3600] * 4 + [6, 7, 8, 9] + [0] * 4
PAUSE = 0.25

stop = threading.Event()
numbers = itertools.count()


def client(address, protocol, keep):
    connection = None
    while not stop.is_set():
        if connection is None:
            number, begun_ns = next(numbers), time.monotonic_ns()
        told = {"protocol": protocol, "connection": number, "begun_ns": begun_ns}
        try:
            connection = connection or PROTOCOLS[protocol](address)
            told["version"] = connection.ask()
        except Exception as error:
            told["error"] = f"{type(error).__name__}: {error}"
        told["done_ns"] = time.monotonic_ns()
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        if "error" in told or told["done_ns"] - begun_ns >= keep * 1e9:
            if connection is not None:
                connection.close()
            connection = None
        # Clients do not march in step.
        stop.wait(PAUSE * random.uniform(0.5, 1.5))


# Ctrl-C is the demo's: it ends us.
signal.signal(signal.SIGINT, signal.SIG_IGN)
threads = [
    threading.Thread(target=client, args=(sys.argv[1], protocol, keep))
    for protocol in PROTOCOLS
    for keep in KEPT
]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
