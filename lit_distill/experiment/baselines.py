"""Which baseline a row is set against, and the difference to it.

A difference is taken seed by seed, because runs with one seed share data order and initialisation, and the spread
between seeds is often larger than the gain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lit_distill.core.errors import UsageError
from lit_distill.experiment.groups import Group, data_settings, other_data
from lit_distill.experiment.runs import Plan
from lit_distill.experiment.stats import paired_difference
from lit_distill.experiment.words import nearest

DEFAULT_BASELINE = "baseline"

DataKind = tuple[str, tuple[str, ...]]  # domain, and the data's name


def find_baselines(
    kinds: Mapping[DataKind, Sequence[Group]], wanted: Sequence[str], plans: Mapping[Path, Plan]
) -> dict[DataKind, list[Group]]:
    """The rows to compare with, for each domain and data set that has any: those asked for, else the default ones."""
    groups = [group for members in kinds.values() for group in members]
    answers = {
        group.label: {
            group.label,
            group.stage,
            f"{group.runs[0].experiment}/{group.stage}",
            f"{group.domain}/{group.stage}",
        }
        for group in groups
    }
    for name in wanted:
        if groups and not any(name in words for words in answers.values()):
            known = sorted({group.stage for group in groups} | answers.keys())
            raise UsageError(f"baseline {name!r} is no stage here; there are {', '.join(nearest(name, known))}")
    found = {}
    named_data = {
        kind[1] for kind, members in kinds.items() for group in members if not answers[group.label].isdisjoint(wanted)
    }
    for kind, members in kinds.items():
        if kind[1] in named_data:
            own = [group for group in members if not answers[group.label].isdisjoint(wanted)]
        else:
            own = [
                group
                for group in members
                if group.stage in (plans[group.runs[0].path.parent].baselines or (DEFAULT_BASELINE,))
            ]
        if own:
            found[kind] = own
    return found


def with_differences(
    kind: DataKind,
    members: Sequence[Group],
    bases: Mapping[DataKind, Sequence[Group]],
    telling: Mapping[DataKind, str],
    metric: str,
    notes: list[str],
) -> list[Group]:
    """The rows of one domain and data set with their differences; what should be known of them is added to `notes`.

    A domain that has no baseline of its own borrows one of another with the same data, if both are told by one metric:
    the accuracy of a classifier is not that of generated images.
    """
    near = bases.get(kind) or [
        base
        for other, of_kind in bases.items()
        if other[1] == kind[1] and telling[other] == telling[kind]
        for base in of_kind
    ]
    elsewhere = [base for of_kind in bases.values() for base in of_kind]
    if not elsewhere:
        return list(members)
    own = {base.label for base in near}
    rows = []
    for group in members:
        if group.label in own:
            rows.append(group)
            continue
        if not near:
            why = other_data(group, elsewhere[0], {g.label: data_settings(g.config) for g in (group, elsewhere[0])})
            why = why or f"{elsewhere[0].label} is of another domain, and told by another metric"
            rows.append(replace(group, why_none=why))
            continue
        group = _against(group, near, metric)
        if group.why_none:
            notes.append(f"{group.label} has no difference: {group.why_none}")
        elif group.difference is not None and not group.difference.fair:
            notes.append(
                f"{group.label} trains another student than {group.difference.baseline}: "
                "its difference mixes size with method"
            )
        rows.append(group)
    return rows


def _against(group: Group, bases: Sequence[Group], metric: str) -> Group:
    """The group with its difference to the fitting baseline, or with the reason why there is none."""
    settings = {row.label: data_settings(row.config) for row in (group, *bases)}
    reasons = {base.label: other_data(group, base, settings) for base in bases}
    fitting = [base for base in bases if not reasons[base.label]]
    if not fitting:
        return replace(group, why_none=next(iter(reasons.values())))
    # The nearest baseline: same experiment first, then same domain, then same student.
    nearness = [
        (
            base.runs[0].path.parent == group.runs[0].path.parent,
            base.domain == group.domain,
            base.student == group.student,
        )
        for base in fitting
    ]
    closest = [base for base, near in zip(fitting, nearness, strict=True) if near == max(nearness)]
    if len(closest) > 1:
        names = ", ".join(base.label for base in closest)
        return replace(group, why_none=f"{len(closest)} rows could be its baseline ({names}); name one with --baseline")
    base = closest[0]
    values, others = group.values(metric), base.values(metric)
    difference = paired_difference(values, others, base.label, fair=base.student == group.student)
    if difference is None:
        n = len(values.keys() & others.keys())
        return replace(
            group, why_none=f"{n or 'no'} seed{'s' if n != 1 else ''} with {metric} in common with {base.label}"
        )
    return replace(group, difference=difference)
