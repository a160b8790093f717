"""Keys and passwords have no place in a configuration: it is written to the run folder, and shared.

What needs a key reads it from an environment variable (OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY), and the configuration
says at most the variable's name. A key that stands in a configuration all the same is refused before anything is
written: blanked, the configuration would no longer run as it is. What is shown of runs, which may be made elsewhere, is
blanked.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lit_distill.core.errors import UsageError

HIDDEN = "[hidden]"

# Keys by their shape, and user and password of an address: refused in what is written, blanked in what is shown.
_KEY = re.compile(
    r"\b(?:sk-|hf_|ghp_|gho_|github_pat_|glpat-|xox[abp]-)[\w-]{12,}|\bAKIA[0-9A-Z]{16}\b|\bBearer\s+[\w.~+/=-]{8,}"
)
_PASSWORD = re.compile(r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)")
# Refusing one name too many stops a run, so fewer count: whole names or their ends, and not any `..._token`.
_REFUSED_NAME = re.compile(
    r"(?:^|[_-])(?:api_?key|access_?key|private_?key|secret_?key|secret|password|passwd|passphrase|credentials?)$"
    r"|^authorization$|^(?:(?:hf|hub|api|auth|use_auth|access|bearer|wandb|github|secret)[_-])?token$",
    re.IGNORECASE,
)
# Blanking one name too many only hides it. Tokens of a vocabulary and counts of them (`max_tokens`) are shown.
_BLANKED_LINE = re.compile(
    r"""^(?P<indent>\s*)(?P<dash>(?:-\s)*)(?P<key>['"]?(?!(?:pad|eos|bos|unk|mask|sep|cls)_token\b)
    [\w.-]*?(?:(?:api|access|private|secret)_?keys?|secrets?|passwords?|passwd|passphrases?|credentials?|authorization|bearer
    |(?<![a-z])token|(?:auth|access|api|refresh)_tokens)['"]?)\s*:(?:\s+(?P<value>\S.*))?$""",
    re.I | re.X,
)
_VARIABLE = re.compile(r"^[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+$")
_SECRET_VARIABLE = re.compile(r"(?:API_?KEY|ACCESS_?KEY|SECRET|TOKEN|PASSWORD)$")
_SHORTEST = 8  # characters; a shorter value of a variable may be any word
_HARMLESS = {None, "null", "''", '""', "false", "true"}
# A thousand configurations are looked through in a moment if expressions are tried only where one of these stands.
_KEY_WORDS = (
    "api_key", "apikey", "access_key", "accesskey", "private_key", "privatekey", "secret", "passw", "passphrase",
    "credential", "authorization", "bearer", "token",
)  # fmt: skip
_VALUE_WORDS = ("sk-", "hf_", "ghp_", "gho_", "github_pat_", "glpat-", "xox", "AKIA", "Bearer", "://")


def refuse_secrets(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that holds a key, a token or a password, and names where, without the value.

    It is known by the setting's name, by the value's shape, as a password inside an address, or because an environment
    variable that holds a secret has the same value. An environment variable's name in place of its value is fine.

    Raises:
        UsageError: One is there.
    """
    known = {
        name: value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST and not _VARIABLE.match(value)
    }
    for key, value in _texts(config):
        name = key.rpartition(".")[2]
        if not value or _VARIABLE.match(value):
            continue
        variable = next((variable for variable, secret in known.items() if secret in value), None)
        if variable is not None:
            raise UsageError(f"{key} holds the value of {variable}, which {_WRITTEN}; leave it to the variable")
        if _PASSWORD.search(value):
            raise UsageError(f"{key} holds an address with a password, which {_WRITTEN}; give the address without it")
        if _REFUSED_NAME.search(name) or _KEY.search(value):
            raise UsageError(
                f"{key} holds a secret, which {_WRITTEN}; put it into an environment variable "
                "(OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY), from which it is read, and leave the key out"
            )


_WRITTEN = "would be written to config.yaml"


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a configuration with its dotted key; what stands in a list goes by the list's key."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _texts(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, str):
        yield key, value


def without_secrets(text: str) -> str:
    """Lines of YAML with the values of secret settings blanked, those on several lines too."""
    lowered = text.lower()
    if not any(word in lowered for word in _KEY_WORDS):
        return without_secret_values(text)
    kept: list[str] = []
    inside = -1  # the indentation of a secret whose value stands on the following lines
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if inside >= 0 and (
            not line.strip() or indent > inside or (indent == inside and line.lstrip().startswith("-"))
        ):
            continue
        inside = -1
        lowered = line.lower()
        found = _BLANKED_LINE.match(line) if any(word in lowered for word in _KEY_WORDS) else None
        if found is None:
            kept.append(line)
            continue
        value = found["value"]
        if value is not None and value.strip() in _HARMLESS:
            kept.append(line)
            continue
        if value is None or value[0] in "|>'\"":  # on the next lines, or perhaps going on there
            inside = indent + len(found["dash"])
        kept.append(f"{found['indent']}{found['dash']}{found['key']}: {HIDDEN}")
    return without_secret_values("\n".join(kept))


def without_secret_values(text: str) -> str:
    """Any text with the values blanked whose shape is that of a known kind of key."""
    if not any(word in text for word in _VALUE_WORDS):
        return text
    return _PASSWORD.sub(HIDDEN, _KEY.sub(HIDDEN, text))
