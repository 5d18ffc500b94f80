"""The accuracy matrix: every number by hand on 3 x 3 matrices, what was not measured, files, and methods compared."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelora.analysis.drift import Drift
from moelora.errors import DataError
from moelora.evaluation.continual import METRICS, AccuracyMatrix, write_continual
from moelora.evaluation.continual_comparison import STUDENT, Estimate, compare_methods, write_comparison

NAN = float("nan")
TASKS = ("sums", "words", "maps")
# Row 0 is zero shot. "words" is best one task before the end, "sums" is lost and comes back a little.
R = [
    [0.1, 0.2, 0.3],
    [0.9, 0.25, 0.4],
    [0.5, 0.8, 0.2],
    [0.6, 0.7, 0.75],
]
BY_HAND = {
    "average_performance": (0.6 + 0.7 + 0.75) / 3,
    "average_incremental": (0.9 + (0.5 + 0.8) / 2 + (0.6 + 0.7 + 0.75) / 3) / 3,
    "learning_accuracy": (0.9 + 0.8 + 0.75) / 3,
    "backward_transfer": ((0.6 - 0.9) + (0.7 - 0.8)) / 2,
    "trace_backward_transfer": (0.3 + 0.1 + 0.0) / 3,
    "forgetting": ((0.9 - 0.6) + (0.8 - 0.7)) / 2,
    "forward_transfer": ((0.25 - 0.2) + (0.2 - 0.3)) / 2,
    "gain_over_alone": ((0.9 - 0.95) + (0.8 - 0.7) + (0.75 - 0.75)) / 3,
    "transfer": (0.25 + (0.4 + 0.2) / 2) / 2,
    "average": (0.9 + 0.25 + 0.4 + 0.5 + 0.8 + 0.2 + 0.6 + 0.7 + 0.75) / 9,
    "last": (0.6 + 0.7 + 0.75) / 3,
}


def matrix(scores: Any = R, alone: Any = (0.95, 0.7, 0.75), tasks: tuple[str, ...] = TASKS) -> AccuracyMatrix:
    return AccuracyMatrix(tasks, scores, alone)


def changed(*cells: tuple[int, int, float]) -> AccuracyMatrix:
    """The matrix with other values in some cells (row, column, value)."""
    scores = np.array(R)
    for row, column, value in cells:
        scores[row, column] = value
    return matrix(scores)


@pytest.mark.parametrize("name", METRICS)
def test_each_number_by_hand(name: str) -> None:
    assert getattr(matrix(), name) == pytest.approx(BY_HAND[name], abs=1e-12)
    assert matrix().metrics()[name] == pytest.approx(BY_HAND[name], abs=1e-12)


def test_a_second_matrix_by_hand_where_later_tasks_help() -> None:
    found = changed((3, 0, 1.0), (3, 1, 0.9), (1, 1, 0.95))
    assert found.backward_transfer == pytest.approx(((1 - 0.9) + (0.9 - 0.8)) / 2), "above 0: nothing was forgotten"
    assert found.trace_backward_transfer == 0, "gains do not count"
    # "words" was best after "sums" alone, before it was learnt: 0.95.
    assert found.forgetting == pytest.approx(((0.9 - 1.0) + (0.95 - 0.9)) / 2)
    assert found.transfer == pytest.approx((0.95 + 0.3) / 2)


def test_one_gain_does_not_make_up_for_a_loss_in_the_number_of_trace() -> None:
    found = changed((3, 0, 0.7), (3, 1, 1.0))
    assert found.backward_transfer == pytest.approx(0), "one task lost 0.2, one gained 0.2"
    assert found.trace_backward_transfer == pytest.approx(0.2 / 3)
    assert found.forgetting == pytest.approx((0.2 - 0.2) / 2)


def test_transfer_counts_tasks_alike_and_not_scores() -> None:
    """XTAIL/main.py takes the mean of each column of the upper triangle, and then the mean of those."""
    learnt = np.array(R)[1:]
    columns = [learnt[:1, 1].mean(), learnt[:2, 2].mean()]
    assert matrix().transfer == pytest.approx(np.mean(columns))
    assert matrix().transfer != pytest.approx(learnt[np.triu_indices(3, 1)].mean())


def test_forward_transfer_from_a_baseline_of_ones_own() -> None:
    assert matrix().forward_transfer_from([0.9, 0.1, 0.05]) == pytest.approx(((0.25 - 0.1) + (0.2 - 0.05)) / 2)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("column", range(3))
def test_a_number_is_nan_exactly_where_a_score_it_needs_is(name: str, row: int, column: int) -> None:
    needs = {
        "average_performance": lambda i, j: i == 3,
        "last": lambda i, j: i == 3,
        "average_incremental": lambda i, j: i > j,
        "learning_accuracy": lambda i, j: i == j + 1,
        "gain_over_alone": lambda i, j: i == j + 1,
        "backward_transfer": lambda i, j: j < 2 and i in (j + 1, 3),
        "trace_backward_transfer": lambda i, j: i in (j + 1, 3),
        "forgetting": lambda i, j: j < 2 and i > j,
        "forward_transfer": lambda i, j: j > 0 and i in (0, j),
        "transfer": lambda i, j: 0 < i <= j,
        "average": lambda i, j: i > 0,
    }
    found = changed((row, column, NAN)).metrics()[name]
    assert math.isnan(found) == needs[name](row, column)
    if not math.isnan(found):
        assert found == pytest.approx(BY_HAND[name], abs=1e-12)


def test_a_run_that_looks_at_learnt_tasks_only_has_what_needs_no_more() -> None:
    scores = np.array(R)
    scores[0] = NAN
    scores[1:][np.triu_indices(3, 1)] = NAN
    found = matrix(scores).metrics()
    unknown = {"forward_transfer", "transfer", "average"}
    assert {name for name, value in found.items() if math.isnan(value)} == unknown
    assert all(found[name] == pytest.approx(BY_HAND[name]) for name in set(METRICS) - unknown)


def test_joint_training_has_its_last_row_alone() -> None:
    scores = np.full((4, 3), NAN)
    scores[3] = R[3]
    found = matrix(scores, None).metrics()
    assert {name for name, value in found.items() if not math.isnan(value)} == {"average_performance", "last"}


def test_of_a_single_task_nothing_transfers() -> None:
    found = AccuracyMatrix(("sums",), np.array([[0.1], [0.8]]), np.array([0.7])).metrics()
    meaningless = {"backward_transfer", "forgetting", "forward_transfer", "transfer"}
    assert {name for name, value in found.items() if math.isnan(value)} == meaningless
    assert found["average_performance"] == found["average"] == found["learning_accuracy"] == 0.8
    assert found["gain_over_alone"] == pytest.approx(0.1) and found["trace_backward_transfer"] == 0


def test_the_curves_by_hand() -> None:
    assert matrix().average_so_far() == pytest.approx([0.9, 0.65, BY_HAND["last"]])
    assert matrix().average_to_come() == pytest.approx([0.2, (0.25 + 0.4) / 2, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ()}, "needs tasks of different names, got: none"),
        ({"tasks": ("a", "b", "a")}, "of different names, got: a, b, a"),
        ({"scores": R[1:]}, r"have the shape \(4, 3\), got \(3, 3\)"),
        ({"alone": [0.1]}, r"alone .* have the shape \(3,\), got \(1,\)"),
        ({"scores": np.array(R) * 100}, "lie between 0 and 1, got 10: divide percentages by 100"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        matrix(**arguments)


def test_a_matrix_does_not_change_with_what_it_was_made_of() -> None:
    scores = np.array(R)
    found = matrix(scores)
    scores[3] = 0
    assert found.average_performance == pytest.approx(BY_HAND["average_performance"])
    with pytest.raises(ValueError, match="read-only"):
        found.scores[0, 0] = 1


DRIFT = Drift(
    TASKS,
    np.array([[0, 0.5, 0.25], [0.5, 0, 0.125], [0.25, 0.125, 0]]),
    np.array([[0, NAN, NAN], [0.2, 0, NAN], [0.3, 0.1, 0]]),
    {"layers.0.q_proj": 0.3},
)
GROWTH = {"parameters": [100.0, 200.0, 300.0], "seconds a step": [2.0, 2.5, 3.0]}


def test_what_is_written_is_read_back_and_the_same_twice(tmp_path: Path) -> None:
    found = changed((0, 2, NAN))
    pages = [write_continual(found, tmp_path / name, DRIFT, GROWTH) for name in ("one", "two")]
    assert pages[0] == tmp_path / "one" / "continual.html"
    files = sorted(path.name for path in pages[0].parent.iterdir())
    assert files == ["R.csv", "R.json", "continual.html", "metrics.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    again = AccuracyMatrix.from_json(tmp_path / "one" / "R.json")
    assert again.tasks == TASKS and again.alone is not None
    assert np.array_equal(again.scores, found.scores, equal_nan=True) and again.alone.tolist() == [0.95, 0.7, 0.75]
    told = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert told["metrics"]["forward_transfer"] is None
    assert told["metrics"]["forgetting"] == pytest.approx(BY_HAND["forgetting"])
    assert told["drift"]["since_learnt"] == pytest.approx(0.2) and told["growth"] == GROWTH
    rows = list(csv.reader((tmp_path / "one" / "R.csv").read_text().splitlines()))
    assert rows[0] == ["after", *TASKS] and rows[1] == ["zero shot", "0.1", "0.2", ""]
    assert [row[0] for row in rows[2:]] == [*TASKS, "alone"]


def test_the_page_has_every_figure_and_no_address(tmp_path: Path) -> None:
    from plotly.offline import get_plotlyjs

    page = write_continual(matrix(), tmp_path, DRIFT, GROWTH).read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    for name in ("matrix", "averages", "between", "growth"):
        assert f'id="{name}"' in page
    assert "Backward transfer (TRACE)" in page and f"{BY_HAND['backward_transfer']:.4f}" in page
    assert "default-src 'none'" in page and "src=" not in page and "href=" not in page
    without = write_continual(matrix(alone=None), tmp_path).read_text(encoding="utf-8")
    assert 'id="matrix"' in without and 'id="between"' not in without and 'id="growth"' not in without


def test_names_are_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    tasks = (name, "words", "maps")
    drift = Drift(tasks, DRIFT.between, DRIFT.since, DRIFT.sites)
    page = write_continual(matrix(tasks=tasks), tmp_path / "run", drift, {name: [1.0]}).read_text(encoding="utf-8")
    both = {name: {("a", 0): matrix(tasks=tasks)}, "other": {("a", 0): matrix(tasks=tasks)}}
    page += write_comparison(both, tmp_path / "both").read_text(encoding="utf-8")
    assert "alert(1)" in page and name not in page


def test_figures_show_the_matrix_itself() -> None:
    from moelora.evaluation import continual_figures as figures

    figure = figures.matrix(changed((0, 2, NAN)), DRIFT)
    scores, moved = figure.data
    assert [list(row) for row in scores.z] == [[0.1, 0.2, None], *R[1:]]
    assert list(scores.y) == ["zero shot", "1 sums", "2 words", "3 maps"] == list(moved.y)
    assert list(moved.z[0]) == [None] * 3 and list(moved.z[3]) == [0.3, 0.1, 0]
    frames = [(shape.x0, shape.x1, shape.y0, shape.y1) for shape in figure.layout.shapes]
    assert frames == [(-0.5, 0.5, 0.5, 1.5), (0.5, 1.5, 1.5, 2.5), (1.5, 2.5, 2.5, 3.5)]
    lines = {trace.name: list(trace.y) for trace in figures.averages(matrix()).data}
    assert lines["learnt so far"] == pytest.approx([0.9, 0.65, BY_HAND["last"]], abs=1e-5)
    assert [list(trace.y) for trace in figures.growth(GROWTH).data] == [[1, 2, 3], [1, 1.25, 1.5]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"drift": Drift(("a",), np.zeros((1, 1)), np.zeros((1, 1)), {})}, "the drift is that of tasks a, the matrix"),
        ({"growth": {"a": [1.0], "b": [1.0, 2.0]}}, "have a value after each stage, all of them"),
        ({"growth": {"a": []}}, "have a value after each stage, all of them"),
    ],
)
def test_what_does_not_belong_to_the_matrix_is_refused_before_anything_is_written(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_continual(matrix(), tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"tasks": ["a"]}', '{"tasks": ["a"], "scores": [[2], [0]], "alone": null}']
)
def test_a_file_that_is_no_matrix_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "R.json").write_text(text)
    with pytest.raises(DataError, match=r"R\.json: "):
        AccuracyMatrix.from_json(tmp_path / "R.json")
    with pytest.raises(DataError, match=r"none\.json: expected an accuracy matrix"):
        AccuracyMatrix.from_json(tmp_path / "none.json")


def test_the_points_of_students_t_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert len(STUDENT) == 30
    assert pytest.approx([stats.t.ppf(0.975, df) for df in range(1, 31)], abs=6e-4) == list(STUDENT)


def test_an_estimate_by_hand() -> None:
    found = Estimate.of([0.2, 0.4, 0.9])
    reach = 4.303 * math.sqrt(((0.2 - 0.5) ** 2 + 0.1**2 + 0.4**2) / 2) / math.sqrt(3)
    assert (found.mean, found.runs) == (pytest.approx(0.5), 3)
    assert (found.low, found.high) == (pytest.approx(0.5 - reach), pytest.approx(0.5 + reach))
    one = Estimate.of([0.3])
    assert one.mean == 0.3 and math.isnan(one.low) and one.to_dict()["high"] is None


def runs() -> dict[str, dict[tuple[str, int], AccuracyMatrix]]:
    """Two methods in two orders, of which the second is better by 0.1 in "sums" of one run and 0.2 in the other."""
    swapped = ("words", "sums", "maps")
    joint = np.full((4, 3), NAN)
    joint[3] = 0.9
    return {
        "plain": {("a", 0): matrix(), ("b", 0): matrix(tasks=swapped)},
        "better": {("a", 0): changed((3, 0, 0.7)), ("b", 0): matrix(changed((3, 0, 0.8)).scores, None, swapped)},
        "joint": {("a", 0): matrix(joint, None)},
    }


def same(found: Estimate | None, values: list[float]) -> bool:
    """Whether an estimate is that of these values; the ends of a single one are NaN."""
    assert found is not None
    wanted = Estimate.of(values)
    ends = pytest.approx([wanted.mean, wanted.low, wanted.high], nan_ok=True, abs=1e-12)
    return [found.mean, found.low, found.high] == ends and found.runs == wanted.runs


def test_methods_are_compared_run_by_run() -> None:
    found = compare_methods(runs())
    assert same(found["plain"].metrics["last"], [BY_HAND["last"]] * 2)
    assert all(each is None for each in found["plain"].differences.values())
    assert same(found["better"].differences["last"], [0.1 / 3, 0.2 / 3])
    assert same(found["better"].differences["gain_over_alone"], [0.0]), "run b has no model of one task alone"
    assert found["joint"].metrics["forgetting"] is None and found["joint"].differences["forgetting"] is None
    assert same(found["joint"].differences["last"], [0.9 - BY_HAND["last"]])
    assert same(found["plain"].tasks["sums"], [0.6, 0.7]), "by name, whatever its place in the order"


def test_a_comparison_is_written_the_same_twice(tmp_path: Path) -> None:
    pages = [write_comparison(runs(), tmp_path / name) for name in ("one", "two")]
    files = sorted(path.name for path in pages[0].parent.iterdir())
    assert files == ["comparison.csv", "comparison.html", "comparison.json", "comparison.md", "runs.csv"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    told = json.loads((tmp_path / "one" / "comparison.json").read_text())
    assert list(told) == ["plain", "better", "joint"] and told["joint"]["metrics"]["forgetting"] is None
    rows = list(csv.DictReader((tmp_path / "one" / "comparison.csv").read_text().splitlines()))
    assert {row["method"] for row in rows if row["metric"] == "forgetting"} == {"plain", "better"}
    each = list(csv.DictReader((tmp_path / "one" / "runs.csv").read_text().splitlines()))
    assert [(row["method"], row["order"], row["seed"]) for row in each][-1] == ("joint", "a", "0")
    assert each[-1]["forgetting"] == "" and float(each[-1]["last"]) == pytest.approx(0.9)
    head, rule, *lines = (tmp_path / "one" / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert head.startswith("| method | Average performance (OP, ACC) | ") and rule.count("---") == head.count("|") - 1
    titles, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *lines))
    assert [row[0] for row in cells] == ["plain", "better", "joint"]
    assert cells[2][titles.index("Last (MTIL, X-TAIL)")] == "90.0" and cells[2][titles.index("Forgetting")] == "–"
    page = pages[0].read_text(encoding="utf-8")
    for name in ("average_performance", "forgetting", "learning_accuracy", "curves"):
        assert f'id="{name}"' in page
    assert "2 orders of the tasks, 1 seeds" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "there are none of any"),
        ({"plain": {}}, "there are none of plain"),
        (
            {"plain": {("a", 0): matrix(), ("b", 0): matrix(tasks=("x", "y", "z"))}},
            "order 'b', seed 0: it has the tasks x, y, z, others have maps, sums, words",
        ),
        (
            {"plain": {("a", 0): matrix()}, "other": {("a", 1): matrix(tasks=("words", "sums", "maps"))}},
            "method 'other', order 'a', seed 1: .* in the order words, sums, maps, another run of this order",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare_methods(given)
