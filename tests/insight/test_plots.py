"""The pictures show the numbers: cells, labels and branches are compared with the routing and with scipy."""

from __future__ import annotations

import builtins
import sys

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.cluster import hierarchy
from test_analysis import gates_of, random_gates, random_routing, routing_of

from peft_poly.insight import analysis, plots
from peft_poly.insight.analysis import Routing

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def cells(ax):
    return torch.tensor(ax.images[0].get_array().data)


def labels(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def renamed(routing, names):
    return Routing(tuple(names), routing.weights, routing.probabilities, routing.config)


def texts(figure):
    """The boxes, in pixels, of every text that is seen in a picture."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    shown = {id(label) for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in seen(axis)}
    ticks = {id(label) for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels()}
    return [(text.get_text(), text.get_window_extent()) for text in found if id(text) in shown or id(text) not in ticks]


def seen(axis):
    """The labels of an axis that lie within what it shows."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def assert_readable(figure):
    """No text touches another, and none leaves the picture."""
    boxes, picture = texts(figure), figure.bbox
    assert len(boxes) > 5
    for n, (text, box) in enumerate(boxes):
        assert picture.x0 - 1 <= box.x0 <= box.x1 <= picture.x1 + 1, text
        assert picture.y0 - 1 <= box.y0 <= box.y1 <= picture.y1 + 1, text
        touching = [other for other, around in boxes[n + 1 :] if box.overlaps(around)]
        assert not touching, (text, touching)


LONG = "a task whose name somebody has made as long as a line, number {}"


class TestReadability:
    @pytest.fixture(params=[(3, 2, "t{}"), (3, 8, LONG), (10, 24, "t{}"), (50, 4, LONG)], ids="{0[0]}, {0[1]}".format)
    def routing(self, request):
        n_tasks, n_skills, name = request.param
        return renamed(random_routing(n_tasks, n_skills=n_skills), [name.format(n) for n in range(n_tasks)])

    def test_no_label_of_a_saved_picture_touches_another(self, tmp_path, monkeypatch, routing):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
        plots.save_plots(routing, tmp_path / "a.png")
        assert_readable(figures[0])

    def test_no_label_of_a_heat_map_touches_another(self, routing):
        assert_readable(plots.plot_heat_map(routing, split=1).figure)

    def test_no_label_of_two_heat_maps_touches_another(self, routing):
        (first, *_) = plots.plot_heat_maps({"teacher": routing, "student": routing})
        assert_readable(first.figure)

    def test_no_label_of_a_tree_touches_another(self, routing):
        assert_readable(plots.plot_dendrogram(routing).figure)

    def test_a_map_in_little_room_leaves_its_numbers_out(self):
        figure = Figure(figsize=(4, 3), layout="constrained")
        ax = plots.plot_heat_map(random_routing(n_tasks=9, n_skills=12), ax=figure.subplots())
        assert not ax.texts
        assert_readable(figure)


class TestHeatMap:
    @pytest.mark.parametrize(("layer", "split"), [(None, None), ("layer1", None), (None, 1), ("layer2", 0)])
    def test_the_cells_are_the_mixing_weights(self, layer, split):
        routing = random_routing()
        ax = plots.plot_heat_map(routing, layer=layer, split=split)
        torch.testing.assert_close(cells(ax), analysis.task_skill_matrix(routing, layer, split))
        assert labels(ax.yaxis) == list(routing.task_names)
        assert (layer or "mean of the layers") in ax.get_title()

    def test_a_tasks_rows_are_the_layers(self):
        routing = random_routing()
        ax = plots.plot_heat_map(routing, task=2)
        expected = torch.stack([weights[2].double().mean(dim=0) for weights in routing.weights.values()])
        torch.testing.assert_close(cells(ax), expected)
        assert labels(ax.yaxis) == routing.layers

    def test_the_rows_can_be_put_in_order(self):
        routing = random_routing()
        ax = plots.plot_heat_map(routing, order=[3, 1, 0, 2, 4])
        assert labels(ax.yaxis) == ["3", "1", "0", "2", "4"]
        torch.testing.assert_close(cells(ax), analysis.task_skill_matrix(routing)[[3, 1, 0, 2, 4]])

    def test_each_cell_of_a_small_map_says_its_number(self):
        ax = plots.plot_heat_map(routing_of([[[0.25, 0.75]], [[0.5, 0.5]]]))
        assert [text.get_text() for text in ax.texts] == ["0.25", "0.75", "0.50", "0.50"]

    def test_a_large_map_has_colours_only(self):
        assert not plots.plot_heat_map(random_routing(n_tasks=80)).texts

    @pytest.mark.parametrize(("p", "top"), [([0.5, 0.5, 0.5, 0.5], 0.5), ([0.9, 0.1, 0.0, 0.0], 0.9), ([0.5], 1.0)])
    def test_the_colours_begin_at_zero_and_an_even_share_is_half_way_at_most(self, p, top):
        low, high = plots.plot_heat_map(routing_of([[p]])).images[0].get_clim()
        assert (low, high) == (0, pytest.approx(top))

    def test_gates_are_drawn_around_one(self):
        routing = random_gates()
        ax = plots.plot_heat_map(routing)
        low, high = ax.images[0].get_clim()
        assert (low + high) / 2 == pytest.approx(1)
        assert low <= cells(ax).min() <= cells(ax).max() <= high
        assert (ax.get_xlabel(), ax.get_title()) == ("rank", "Gates, mean of the layers")
        white = ax.images[0].cmap(ax.images[0].norm(1.0))
        assert min(white) > 0.95

    def test_gates_of_one_are_pale(self):
        ax = plots.plot_heat_map(gates_of([[1.0, 1.0]]))
        assert ax.images[0].get_clim() == (pytest.approx(0.9), pytest.approx(1.1))

    def test_it_draws_on_the_axes_it_is_given(self):
        ax = Figure().subplots()
        assert plots.plot_heat_map(random_routing(), ax=ax) is ax
        assert not plt.get_fignums()

    def test_a_dollar_in_a_name_is_no_formula(self):
        ax = plots.plot_heat_map(routing_of([[[0.5, 0.5]], [[0.5, 0.5]]], names=["$\\frac", "US$ to EU$"]))
        ax.figure.canvas.draw()

    @pytest.mark.parametrize("wrong", [{"layer": "layer0"}, {"order": [0]}])
    def test_a_task_has_no_layer_and_no_order(self, wrong):
        with pytest.raises(ValueError, match="With `task` the rows are the layers"):
            plots.plot_heat_map(random_routing(), task=0, **wrong)

    def test_an_unknown_task_is_refused(self):
        with pytest.raises(ValueError, match="Did you mean 'rte'"):
            plots.plot_heat_map(routing_of([[[0.5]]], names=["rte"]), task="rtee")


class TestHeatMaps:
    def test_they_share_their_scale_and_their_order(self):
        one = routing_of([[[0.9, 0.1, 0, 0]], [[0.2, 0.8, 0, 0]]], names=["a", "b"])
        other = renamed(random_routing(n_tasks=2), ["b", "a"])
        left, right = plots.plot_heat_maps({"one": one, "other": other})
        assert left.images[0].get_clim() == right.images[0].get_clim() == (0, pytest.approx(0.9))
        assert left.get_ylim() == right.get_ylim()
        assert labels(left.yaxis) == ["a", "b"]
        torch.testing.assert_close(cells(left), analysis.task_skill_matrix(one))
        torch.testing.assert_close(cells(right), analysis.task_skill_matrix(other)[[1, 0]])
        assert (left.get_title(), right.get_title()) == ("one", "other")

    def test_the_order_is_that_of_the_first(self):
        routing = random_routing()
        order = analysis.task_order(routing)
        axes = plots.plot_heat_maps({"a": routing, "b": routing, "c": routing}, order=order, layer="layer1", split=0)
        for ax in axes:
            torch.testing.assert_close(cells(ax), analysis.task_skill_matrix(routing, "layer1", 0)[order])

    def test_gates_are_drawn_around_one(self):
        axes = plots.plot_heat_maps({"a": gates_of([[0.5, 1.0]]), "b": gates_of([[1.0, 1.2]])})
        assert [ax.images[0].get_clim() for ax in axes] == [(pytest.approx(0.5), pytest.approx(1.5))] * 2

    @pytest.mark.parametrize(
        ("other", "lacks"), [(random_gates(n_tasks=2), "has gates"), (random_routing(n_tasks=1), "has no task 1")]
    )
    def test_what_cannot_be_compared_is_refused(self, other, lacks):
        with pytest.raises(ValueError, match=f"'other' {lacks}"):
            plots.plot_heat_maps({"one": random_routing(n_tasks=2), "other": other})

    def test_tasks_that_only_one_has_may_be_left_out(self):
        left, right = plots.plot_heat_maps(
            {"one": random_routing(n_tasks=2), "other": random_routing(n_tasks=1)}, order=[0]
        )
        assert cells(left).shape == cells(right).shape == (1, 4)

    def test_nothing_is_refused(self):
        with pytest.raises(ValueError, match="no routing to draw"):
            plots.plot_heat_maps({})


class TestDendrogram:
    @pytest.mark.parametrize(("routing", "most"), [(random_routing(), 1), (random_gates(), 2)], ids=["poly", "gates"])
    def test_its_axis_spans_every_distance_that_there_can_be(self, routing, most):
        assert plots.plot_dendrogram(routing).get_xlim() == (0, most)

    def test_like_tasks_look_near_however_like_the_others_are(self):
        ax = plots.plot_dendrogram(routing_of([[[0.5, 0.5]], [[0.5, 0.55]]]))
        (drawn,) = [path.vertices[:, 0].max() for group in ax.collections for path in group.get_paths()]
        assert drawn / ax.get_xlim()[1] < 0.01

    def test_the_branches_are_scipys(self):
        routing = random_routing(n_tasks=7)
        ax = plots.plot_dendrogram(routing)
        expected = hierarchy.dendrogram(analysis.task_linkage(routing), no_plot=True)
        assert labels(ax.yaxis) == expected["ivl"]
        drawn = [path.vertices[:, 0].max() for group in ax.collections for path in group.get_paths()]
        assert sorted(drawn) == pytest.approx(sorted(max(branch) for branch in expected["dcoord"]))

    def test_the_leaves_stand_in_the_order_of_a_heat_map_from_top_to_bottom(self):
        routing = random_routing(n_tasks=6)
        ax = plots.plot_dendrogram(routing)
        assert [int(label) for label in labels(ax.yaxis)] == analysis.task_order(routing)
        assert ax.yaxis_inverted()

    def test_it_draws_on_the_axes_it_is_given(self):
        ax = Figure().subplots()
        assert plots.plot_dendrogram(random_routing(), ax=ax) is ax
        assert not plt.get_fignums()

    def test_tasks_with_equal_routing_can_be_drawn(self):
        ax = plots.plot_dendrogram(routing_of([[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, 0.5]]]))
        assert len(labels(ax.yaxis)) == 3

    def test_its_axis_says_gates(self):
        assert plots.plot_dendrogram(random_gates()).get_xlabel() == "distance, 1 - cosine of the gates"

    def test_one_task_is_refused(self):
        with pytest.raises(ValueError, match="at least two"):
            plots.plot_dendrogram(random_routing(n_tasks=1))


class TestFiles:
    @pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("new/a.pdf", b"%PDF")])
    @pytest.mark.parametrize("task", [None, 1])
    def test_the_ending_says_the_format(self, tmp_path, name, magic, task):
        path = plots.save_plots(random_routing(), tmp_path / name, task)
        assert path.read_bytes().startswith(magic)
        assert [file.name for file in path.parent.iterdir() if file.is_file()] == [path.name]
        assert not plt.get_fignums()

    def test_one_task_has_a_heat_map_only(self, tmp_path):
        assert plots.save_plots(random_routing(n_tasks=1), tmp_path / "a.png").stat().st_size

    @pytest.mark.parametrize("name", ["a.docx", "a"])
    def test_another_ending_is_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match=rf"{name} must end in one of .*\.png"):
            plots.save_plots(random_routing(), tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_failure_leaves_the_picture_that_was_there(self, tmp_path, monkeypatch):
        (tmp_path / "a.png").write_bytes(b"old")
        monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plots.save_plots(random_routing(), tmp_path / "a.png")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]


@pytest.mark.parametrize("missing", ["matplotlib", "scipy"])
def test_a_missing_extra_says_what_to_install(monkeypatch, missing):
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    draw = plots.plot_heat_map if missing == "matplotlib" else plots.plot_dendrogram
    with pytest.raises(ImportError, match=r"Run: pip install matplotlib scipy"):
        draw(random_routing())
