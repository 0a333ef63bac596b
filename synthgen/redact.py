"""Secrets never reach logs, run records or error texts: whatever looks like one is written as ``***``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "redact", "redacted"]

HIDDEN = "***"
_NAME = (  # bounded, as all patterns here are: hostile text must not take quadratic time
    r"(?:[\w.-]{0,40}"
    r"(?:token(?!iz)|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|credential|signature)"
    r"[\w.-]{0,40}|sig)"
)
_PATTERNS = (
    # user:password@ or token@ in a URL, whatever its scheme; as a path it may have lost a slash
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
    # what the keys of known services look like: Hugging Face, AWS, GitHub, OpenAI, Slack
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|A[KS]IA[A-Z0-9]{16}|gh[pousr]_\w{20,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,})"
        ),
        HIDDEN,
    ),
)
_SECRET_KEY = re.compile(rf"{_NAME}|key|pass|auth", re.I)  # names under which a mapping keeps a secret
_OF_ENVIRONMENT = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.I)
_SHORTEST = 8  # characters; shorter values of the environment are no secrets but switches


def redact(text: str) -> str:
    """``text`` without passwords and tokens: credentials in URLs, ``token=...``, keys of known services.

    The values of environment variables that are called as secrets are (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``) are
    taken out wherever they stand.
    """
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redacted(value: Any) -> Any:
    """Plain data with every text redacted, and what a mapping keeps under a secret's name hidden."""
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
    # a path to a secret is none (GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN_PATH)
    return sorted((value for value in found if not value.startswith(("/", "~"))), key=len, reverse=True)
