"""What orbax prints beside what it raises is kept from the terminal."""

from __future__ import annotations

import logging
import sys
import warnings

from absl import logging as absl_logging


def install() -> None:
    """Once in a process. Errors that are raised are not touched."""
    # What a failed save leaves behind in asyncio is logged there as well when it is collected.
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())  # a path of code or files
    # Orbax logs each save at length, and what it logs as an error it raises as well.
    absl_logging.get_absl_logger().addFilter(
        lambda record: record.levelno >= logging.CRITICAL or "/orbax/" not in record.pathname
    )
    before = sys.unraisablehook

    def unraisable(event):
        """Of a failed read or write, orbax raises the first error and closes its loop; what ends later fails there."""
        if not (event.exc_type is RuntimeError and str(event.exc_value) == "Event loop is closed"):
            before(event)

    sys.unraisablehook = unraisable
    # The same, of what had not begun.
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
