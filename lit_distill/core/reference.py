"""Which paper a method implements. Imports nothing heavy: `lit-distill methods` reads these without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """The paper behind a method.

    Write it in a method's class body with literal arguments only: the listing reads them from the source text.

    Args:
        title: Title as published.
        authors: Authors as one string, "et al." where the list is long.
        year: Year of the first public version.
        arxiv: arXiv identifier such as "1503.02531", or None where there is none.
        reconstruction: True where parts of the method could not be confirmed from paper or official code.
    """

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    reconstruction: bool = False
