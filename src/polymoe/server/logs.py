"""The log of a server on stderr: for people, or one JSON object a line for machines."""

import json
import logging
import sys
import time

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("human", "json")
_NAME = "polymoe"  # of our handler


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, whatever `fields` the record has, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO request path=/v1/models status=200`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        parts = [_time(record), record.levelname, record.getMessage()]
        parts += [f"{name}={_shown(value)}" for name, value in fields.items()]
        line = " ".join(parts)
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


def configure_logging(form: str, level: str) -> None:
    """For the whole process; what was configured before is replaced."""
    handler = logging.StreamHandler(sys.stderr)
    handler.name = _NAME
    handler.setFormatter(JsonFormatter() if form == "json" else HumanFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.name == _NAME]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # of libraries
    logging.getLogger("polymoe").setLevel(level.upper())


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


def _shown(value: object) -> str:
    """A client may put anything into a path: it must not look like another line, or another field."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and text and " " not in text else json.dumps(text)
