"""LaTeX, CSV and Markdown: right numbers, and nothing that a name could break."""

import csv
import io
import re

import pytest
from samples import HOSTILE

from lit_distill.experiment.formats import csv_text, latex, markdown

ODD = r"50% of $x_1$ & #2 {a} ~b^c \end{table}"


def test_latex_escapes_and_marks_the_best(write_run, compared):
    for seed in (0, 1, 2):
        write_run("baseline", seed, {"test/acc": 0.9 + 0.01 * seed}, started="2026-01-01")
        write_run(ODD, seed, {"test/acc": 0.93 + 0.01 * seed + 0.001 * (seed % 2)}, name=f"odd-s{seed}")
    text = latex(compared())
    rows = [line.strip() for line in text.splitlines() if line.endswith(r"\\")]
    assert rows[1].startswith(r"baseline & KD & 3 & 91.0 $\pm$ 1.0 & -- &")
    assert rows[2].startswith(
        r"50\% of \$x\_1\$ \& \#2 \{a\} \textasciitilde{}b\textasciicircum{}c \textbackslash{}end\{table\} & KD & 3 & "
        r"\textbf{94.0 $\pm$ 1.0} & \textbf{+3.03 $\pm$ 0.03 [2.89, 3.18]} &"
    )
    # Every row has as many cells as the table has columns, and every group is closed.
    width = len(re.search(r"\\begin{tabular}{(\w+)}", text)[1])
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {width - 1}
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.count(r"\end{table}") == 1


def test_csv_has_natural_units_and_no_formulas(write_run, compared):
    for seed in (0, 1):
        write_run("baseline", seed, {"test/acc": 0.5}, started="2026-01-01")
        write_run("=HYPERLINK(1)", seed, {"test/acc": 0.75 + 0.25 * seed}, name=f"x-s{seed}")
    first, second = csv.DictReader(io.StringIO(csv_text(compared())))
    assert (first["stage"], first["mean"], first["difference"]) == ("baseline", "0.5", "")
    assert second["stage"] == "'=HYPERLINK(1)"
    assert (second["mean"], second["n"], second["difference"], second["difference_n"]) == ("0.875", "2", "0.375", "2")
    assert float(second["sd"]) == pytest.approx(0.25 / 2**0.5)
    assert float(second["test/acc:mean"]) == 0.875
    assert (second["student"], second["student_params"], second["domain"]) == ("a.Net", "1000", "image")


@pytest.mark.parametrize("text", [*HOSTILE, "a|b", "a\nb"])
def test_markdown_keeps_its_columns_and_shows_no_tags(write_run, compared, text):
    write_run(text, 0, name="x")
    lines = markdown(compared()).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert len(rows) == 3
    assert not any("<" in row for row in rows)
