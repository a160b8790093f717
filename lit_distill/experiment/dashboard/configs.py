"""Configurations on the page: without secrets."""

import re

_SECRET_KEY = re.compile(
    r"^(\s*(?:- )?[\w.-]*?(?:api_?key|secret|password|passwd|(?:^|[_\s.-])token)['\"]?:\s*)\S.*$", re.I | re.M
)
_SECRET_VALUE = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|xox[abp]-|AKIA)[\w-]{12,}")


def without_secrets(config: str) -> str:
    """The configuration with keys, tokens and passwords blanked, by the setting's name or the value's known shape."""
    return _SECRET_VALUE.sub("[hidden]", _SECRET_KEY.sub(r"\1[hidden]", config))
