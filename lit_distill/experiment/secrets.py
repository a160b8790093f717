"""Keys and passwords have no place in a configuration: it is written to the run folder, and shared.

What needs a key reads it from an environment variable (OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY), and the configuration
says at most the variable's name. A key that stands in a configuration all the same is refused before anything is
written: blanked, the configuration would no longer run as it is.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lit_distill.core.errors import UsageError

# Whole names, or their ends: `tokenizer`, `max_tokens` and `eos_token` are no secrets.
_NAME = re.compile(
    r"(?:^|[_-])(?:api_?key|access_?key|private_?key|secret_?key|secret|password|passwd|passphrase|credentials?)$"
    r"|^authorization$|^(?:(?:hf|hub|api|auth|use_auth|access|bearer|wandb|github|secret)[_-])?token$",
    re.IGNORECASE,
)
_SHAPE = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}|\bBearer\s+\S{8,}")
_ADDRESS = re.compile(r"^\w[\w+.-]*://[^/@\s]*:[^/@\s]+@")
_VARIABLE = re.compile(r"^[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+$")
_SECRET_VARIABLE = re.compile(r"(?:API_?KEY|ACCESS_?KEY|SECRET|TOKEN|PASSWORD)$")
_SHORTEST = 8  # characters; a shorter value of a variable may be any word


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
        if _ADDRESS.match(value):
            raise UsageError(f"{key} holds an address with a password, which {_WRITTEN}; give the address without it")
        if _NAME.search(name) or _SHAPE.search(value):
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
