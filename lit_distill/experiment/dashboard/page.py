"""The page itself: sections with tables, figures and panels, then all runs, put into the template."""

import base64
import hashlib
import importlib.util
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lit_distill.core.errors import RunError
from lit_distill.core.files import write_text
from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.dashboard.configs import packed_configs
from lit_distill.experiment.dashboard.curves import run_curves
from lit_distill.experiment.dashboard.figure import Figure, clean
from lit_distill.experiment.dashboard.listing import facets, facts, run_rows, software
from lit_distill.experiment.dashboard.section import section_parts
from lit_distill.experiment.runs import History, Run
from lit_distill.experiment.secrets import without_secret_values
from lit_distill.experiment.tables import MOST_SENTENCES, sentences
from lit_distill.experiment.words import encodable

SCRIPTS = ("dashboard.js", "runs.js", "diff.js")


def write_dashboard(comparison: Comparison, path: str | Path, extra: Sequence[Figure] = ()) -> None:
    """Writes the page.

    Args:
        comparison: What to show.
        path: The HTML file; links to run folders are relative to it.
        extra: Figures to show before the comparison's own, such as those of a sweep.

    Raises:
        RunError: The file cannot be written.
    """
    write_text(path, render(comparison, Path(path).parent, extra))


def render(comparison: Comparison, folder: Path, extra: Sequence[Figure] = ()) -> str:
    """The page as text, for a file that will lie in `folder`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("lit_distill.experiment"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}

    histories: dict[Path, History] = {}

    def history(run: Run) -> History:  # read once, for the mean over seeds and for the single run
        if run.path not in histories:
            histories[run.path] = run.history()
        return histories[run.path]

    place = {run.path: index for index, run in enumerate(comparison.runs)}
    notes = list(comparison.notes)
    sections = []
    for number, part in enumerate(comparison.parts):
        if part.groups:
            prefix = f"s{number}-" if comparison.sections else ""
            section, more = section_parts(part, prefix, len(comparison.parts), place, history)
            sections.append(section)
            notes += more
    specs = {
        figure.id: figure.specs
        for figure in (*extra, *(figure for section in sections for figure in section["all_figures"]))
        if figure.specs
    }
    data = {
        "facets": facets(comparison),
        "curves": run_curves(comparison.runs, [part.metric for part in comparison.parts], history),
        "configs": packed_configs(comparison.runs),
        "names": _run_names(comparison.runs),
    }
    told = sentences(comparison)
    here = f"/*{secrets.token_hex(16)}*/"  # a mark that no text on the page contains
    source = {name: environment.loader.get_source(environment, name)[0] for name in (*SCRIPTS, "dashboard.css")}  # type: ignore[union-attr]
    scripts = [_plotly(), *(source[name] for name in SCRIPTS)]
    text = environment.get_template("dashboard.html.j2").render(
        title=_title(comparison),
        sentences=told[: max(MOST_SENTENCES, len(comparison.sections))],
        facts=facts(comparison),
        notes=notes,
        sections=sections,
        several=bool(comparison.sections),
        extra=extra,
        specs=clean(specs),
        data=data,
        runs=run_rows(comparison, folder),
        environment=software(comparison),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(source["dashboard.css"]),
        # Put in below, since they are large and must stay as they are.
        scripts=[Markup(here)] * len(scripts),
        # Only these scripts may run, and nothing may be fetched, whatever a name or a configuration contains.
        script_hashes=Markup(" ".join(f"'sha256-{_sha256(text)}'" for text in scripts)),
    )
    text = encodable(without_secret_values(text))
    *before, after = text.split(here)
    return "".join(part + script for part, script in zip(before, scripts, strict=True)) + after


def _title(comparison: Comparison) -> str:
    names = list(dict.fromkeys(run.experiment for run in comparison.runs))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown or "no runs"


def _run_names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run, with its experiment where there are several."""
    several = len({run.experiment for run in runs}) > 1
    return [f"{run.experiment}/{run.name}" if several else run.name for run in runs]


def _plotly() -> str:
    """The text of plotly.js. Its package is found without being imported, which takes a while."""
    found = importlib.util.find_spec("plotly")
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        file = Path(place) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise RunError(
        "plotly.js is not in the installed package plotly; reinstall it: pip install --force-reinstall plotly"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
