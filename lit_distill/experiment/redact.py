"""Keys, tokens and passwords in what is shown: blanked by the setting's name, or by the known shape of the value."""

import re

HIDDEN = "[hidden]"

# Tokens of a vocabulary (`eos_token`) and counts of them (`max_tokens`) are no secrets.
_SECRET_KEY = re.compile(
    r"""^(?P<indent>\s*)(?P<dash>(?:-\s)*)(?P<key>['"]?(?!(?:pad|eos|bos|unk|mask|sep|cls)_token\b)
    [\w.-]*?(?:(?:api|access|private)_?keys?|secrets?|passwords?|passwd|credentials?|authorization|bearer
    |(?<![a-z])token|(?:auth|access|api|refresh)_tokens)['"]?)\s*:(?:\s+(?P<value>\S.*))?$""",
    re.I | re.X,
)
_SECRET_VALUE = re.compile(
    r"\b(?:sk-|hf_|ghp_|gho_|github_pat_|glpat-|xox[abp]-)[\w-]{12,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s:@'\"]+:[^/\s@'\"]+(?=@)"
)
_HARMLESS = {None, "null", "''", '""', "false", "true"}
# A thousand configurations are looked through in a moment if expressions are tried only where one of these stands.
_KEY_WORDS = (
    "api_key", "apikey", "access_key", "accesskey", "private_key", "privatekey", "secret", "passw", "credential",
    "authorization", "bearer", "token",
)  # fmt: skip
_VALUE_WORDS = ("sk-", "hf_", "ghp_", "gho_", "github_pat_", "glpat-", "xox", "AKIA", "://")


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
        found = _SECRET_KEY.match(line) if any(word in lowered for word in _KEY_WORDS) else None
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
    return _SECRET_VALUE.sub(HIDDEN, text) if any(word in text for word in _VALUE_WORDS) else text
