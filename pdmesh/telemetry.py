"""Logs: readable lines on a terminal, one JSON object a line elsewhere. Prompts and outputs are never logged."""

import json
import logging
import sys
import time

# Attributes that `extra=` may carry; anything else that a record has is Python's own.
FIELDS = ("request_id", "worker_id", "peer", "stage", "reason")


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: record.__dict__[name] for name in FIELDS if name in record.__dict__})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={record.__dict__[name]}" for name in FIELDS if name in record.__dict__)
        line = f"{clock} {record.levelname.lower():7} {self._service}  {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(level: str, service: str) -> None:
    """Sends every log record of this process to stderr as `service`'s; called once, at process start."""
    handler = logging.StreamHandler()
    handler.setFormatter(_TextFormatter(service) if sys.stderr.isatty() else _JsonFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
