"""Keep secrets out of logs, run records and error texts: whatever looks like one is replaced by ``***``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "redact", "redacted"]

HIDDEN = "***"
_NAME = (  # with bounded repeats, as all patterns here: no text may take quadratic time
    r"(?:[\w.-]{0,40}"
    r"(?:token(?!iz)|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|credential|signature)"
    r"[\w.-]{0,40}|sig)"
)
_PATTERNS = (
    # user:password@ or token@ in a URL of any scheme, which has one slash less after conversion to a path
    (
        re.compile(
            r"\b([A-Za-z][\w+.-]{0,20}:/{1,2})"
            r"(?:[^\s/?#@:'\"<>]{1,200}:[^\s?#@'\"<>]{1,200}|[^\s/?#@'\"<>]{1,200})@"
        ),
        rf"\1{HIDDEN}@",
    ),
    # token=... and ?X-Amz-Signature=...; "token": "..."
    (re.compile(rf"\b({_NAME}=[\"']?)(?!\*\*\*)[^\s&\"'\\;,<>{{}}()\[\]]{{6,}}", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"([\"']{_NAME}\\?[\"']\s?:\s?\\?[\"'])(?!\*\*\*)[^\"'\\]{{1,500}}", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Authorization\W{1,4}(?:Bearer|Basic)\s)[^\s\"']+", re.I), rf"\1{HIDDEN}"),
    # keys of known services: Hugging Face, AWS, GitHub, OpenAI, Slack
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|A[KS]IA[A-Z0-9]{16}|gh[pousr]_\w{20,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,})"
        ),
        HIDDEN,
    ),
)
_SECRET_KEY = re.compile(rf"{_NAME}|key|pass|auth", re.I)  # keys of secrets in a mapping
_OF_ENVIRONMENT = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.I)
_SHORTEST = 8  # characters; shorter environment values are switches, not secrets


def redact(text: str) -> str:
    """``text`` without passwords and tokens: credentials in URLs, ``token=...``, keys of known services.

    The values of environment variables named like secrets (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``) are replaced
    wherever they occur.
    """
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """Plain data with every text redacted and every value under a secret's name hidden."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            redact(key) if isinstance(key, str) else key: HIDDEN if _is_secret(key, item) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value) and bool(_SECRET_KEY.fullmatch(key))


def _of_environment() -> list[str]:
    found = {value for name, value in os.environ.items() if _OF_ENVIRONMENT.search(name) and len(value) >= _SHORTEST}
    # the path of a secret's file is not secret (GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN_PATH)
    return sorted((value for value in found if not value.startswith(("/", "~"))), key=len, reverse=True)
