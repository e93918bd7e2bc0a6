"""`addp_jax.main` where images are read with trouble: `TROUBLE` is JSON with

  failing: [first, end], which reads of this process fail with EIO, counted from 0
  seconds: that each read takes
"""

import errno
import itertools
import json
import os
import time

from addp_jax import main
from addp_jax.data import sources

trouble, number, original = json.loads(os.environ["TROUBLE"]), itertools.count(), sources.files.read_bytes


def read(path):
    time.sleep(trouble.get("seconds", 0.0))
    first, end = trouble.get("failing", (0, 0))
    if first <= next(number) < end:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return original(path)


sources.files.read_bytes = read
main.entry()
