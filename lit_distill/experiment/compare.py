"""The command `lit-distill compare`."""

from collections.abc import Sequence
from dataclasses import replace

from lit_distill.core.errors import UsageError
from lit_distill.core.files import write_json, write_text
from lit_distill.experiment import formats, tables
from lit_distill.experiment.comparison import compare_runs
from lit_distill.experiment.dashboard import write_dashboard
from lit_distill.experiment.runs import find_runs
from lit_distill.experiment.sweep.figures import sweep_figures, sweep_metric


def compare(
    dirs: list[str],
    metric: str | None = None,
    baseline: str | Sequence[str] | None = None,
    html: str | None = None,
    json: str | None = None,
    markdown: str | None = None,
    csv: str | None = None,
    latex: str | None = None,
    wandb: str | None = None,
) -> int:
    """Compares the runs below the given folders: a table in the terminal, and files where asked for.

    Args:
        dirs: Folders that hold runs, at any depth.
        metric: The figure in which differences are taken; by default that of a sweep, or what the runs themselves name.
        baseline: Stages or rows to compare with; by default their recipe's, or the stage named `baseline`.
        html: Where to write the dashboard, one self-contained page.
        json: Where to write the numbers.
        markdown: Where to write the table as Markdown.
        csv: Where to write the numbers as CSV.
        latex: Where to write the table as LaTeX.
        wandb: ENTITY/PROJECT at W&B, whose runs are compared too, and which gets a report.

    Returns:
        Exit status 0.

    Raises:
        UsageError: No run is there, or metric or baseline are unknown.
    """
    left_out: list[str] = []
    if wandb is not None:
        from lit_distill.experiment.wandb_runs import mirror

        place, left_out = mirror(wandb)
        dirs = [*dirs, str(place)]
    elif not dirs:
        raise UsageError(
            "compare: no DIR is named; give folders that hold runs, or --wandb ENTITY/PROJECT; "
            "`lit-distill compare --help` explains"
        )
    runs = find_runs(dirs)
    if not runs:
        raise UsageError(
            f"no runs under {', '.join(map(str, dirs))}; a run is a folder with config.yaml or summary.json"
        )
    comparison = compare_runs(runs, metric or sweep_metric(runs), baseline)
    sweep, notes = sweep_figures(comparison)
    comparison = replace(comparison, notes=(*comparison.notes, *notes, *left_out))
    tables.print_comparison(comparison)
    if json is not None:
        write_json(json, formats.as_dict(comparison))
    for path, form in ((markdown, formats.markdown), (csv, formats.csv_text), (latex, formats.latex)):
        if path is not None:
            write_text(path, formats.encodable(form(comparison)))
    if html is not None:
        write_dashboard(comparison, html, sweep)
        print(f"dashboard: {html}")
    if wandb is not None:
        from lit_distill.experiment.wandb_report import write_report

        print(f"report: {write_report(comparison, wandb, formats.markdown(comparison))}")
    return 0
