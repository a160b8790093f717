"""The comparison as a shared report at Weights & Biases, made with W&B's own library for reports."""

from pathlib import Path
from typing import Any

from lit_distill.core.errors import UsageError
from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.wandb_run import STEP
from lit_distill.experiment.wandb_runs import NO_LIBRARY, mirror_folder, need_account, reaching, split_project

TITLE = "lit-distill: "
MOST_CURVES = 12
_LONGEST_TITLE = 128  # W&B takes no longer ones


def write_report(comparison: Comparison, project: str, table: str) -> str:
    """Writes the report, or brings the one of these experiments that is there up to date.

    Args:
        comparison: What to show.
        project: ENTITY/PROJECT, whose runs the curves and the run table are drawn from.
        table: The result as Markdown: W&B knows no paired differences.

    Returns:
        Its address.

    Raises:
        UsageError: The library is missing, or no account is set on this machine.
        RunError: W&B cannot be reached, or refuses.
    """
    need_account(project)
    with reaching(project):
        report = build_report(comparison, project, table)
        import wandb

        for found in wandb.Api(timeout=60).reports(project):
            if found.display_name == report.title:
                report.id = found.id
                break
        report.save()
        return str(report.url)


def build_report(comparison: Comparison, project: str, table: str) -> Any:
    """Builds the report without sending it; see `write_report`."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UsageError(NO_LIBRARY) from error
    entity, name = split_project(project)
    experiments = list(dict.fromkeys(run.experiment for run in comparison.runs))

    def runs(title: str) -> Any:
        return wr.Runset(entity=entity, project=name, name=title, groupby=["Group", "JobType"])

    curves = [
        wr.LinePlot(title=key, x=STEP, y=[key], groupby_aggfunc="mean", groupby_rangefunc="stddev")
        for key in _curves(comparison)
    ]
    metrics = list(dict.fromkeys(part.metric for part in comparison.parts))
    measured = [wr.BarPlot(title=metric, metrics=[metric]) for metric in metrics]
    return wr.Report(
        entity=entity,
        project=name,
        title=(TITLE + ", ".join(experiments))[:_LONGEST_TITLE],
        description=f"Comparison in {', '.join(metrics)}, written by `lit-distill compare --wandb {project}`.",
        width="fluid",
        blocks=[
            wr.H2("Result"),
            wr.MarkdownBlock(_without_places(table, mirror_folder(project))),
            wr.H2("Learning curves"),
            wr.P("Mean and standard deviation of the runs of each experiment and stage."),
            wr.PanelGrid(runsets=[runs("by experiment and stage")], panels=[*measured, *curves]),
            wr.H2("Configurations"),
            wr.P("What differs between the chosen runs."),
            wr.PanelGrid(
                runsets=[runs("by experiment and stage")],
                panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=24, h=12))],
            ),
        ],
    )


def _curves(comparison: Comparison) -> list[str]:
    """The metrics whose curves are shown: validation first, then the losses."""
    keys = {key for group in comparison.groups for key in group.runs[0].history()}
    like_metrics = {"val/" + part.metric.rpartition("/")[2] for part in comparison.parts}
    chosen = [key for key in keys if key.startswith("val/") or key == "train/loss"]
    return sorted(chosen, key=lambda key: (key not in like_metrics, key != "train/loss", key))[:MOST_CURVES]


def _without_places(text: str, folder: Path) -> str:
    """The text without the folder of this machine in which runs of W&B are kept: others shall not read of it."""
    return text.replace(f"{folder}/", "").replace(str(Path.home()), "~")
