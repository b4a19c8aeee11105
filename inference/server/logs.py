"""Logs of the server: one JSON object a line, on standard error. What people and models say is not in them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

FIELD = "fields"  # what `log.info(..., extra={FIELD: {...}})` adds to the object


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time (UTC), level, message, the fields it was given, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELD, {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_as_json() -> None:
    """Let the server's loggers, uvicorn's among them, write JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("quern", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
