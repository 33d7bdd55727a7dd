"""Pictures: what they show is what was counted, nothing is cut off, and equal numbers give equal bytes."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from neurons.errors import UsageError
from neurons.neuron_sets import pictures
from neurons.neuron_sets.comparison import compare
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.statistics.statistics import Statistics

NAMES = "en,de,fr,es,it,pt,nl,ru,uk,pl,zh,ja,ko,ar,fa,hi,bn,sw,tr,vi".split(",")  # noqa: SIM905
WIDTH = 12


def neurons(layers, languages, seed=0, names=NAMES):
    generator = random.Random(seed)
    members = {}
    for k in range(languages):
        every = [(layer, j) for layer in range(layers) for j in range(WIDTH)]
        # The last language has none, as happens.
        chosen = sorted(generator.sample(every, generator.randint(1, 10) if k < languages - 1 else 0))
        members[names[k]] = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    scores = {k: torch.rand(len(rows)) for k, rows in members.items()}
    return neuron_set(members, scores, layers, WIDTH, {"method": "lape"})


ABOUT = {"method": "gradient-contrast", "model": "meta-llama/Llama-3.2-1B", "fingerprint": "e0d05e15935ec39e"}


def statistics(layers=3, languages=4, experts=0, tokens=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    seen = torch.full((languages,), tokens)
    positive = torch.randint(0, tokens + 1, (layers, WIDTH, languages), generator=generator)
    positive[0, 0] = 0
    positive[0, 1] = torch.tensor([3] + [0] * (languages - 1))
    routed = None
    if experts:
        routed = torch.randint(1, tokens + 1, (layers, experts, languages), generator=generator)
        routed[1, 0] = 0
        positive = torch.minimum(positive, routed.repeat_interleave(WIDTH // experts, 1))
    names = tuple(NAMES[:languages])
    return Statistics(names, seen, seen, {"mlp_act:positive": positive}, "", routed=routed)


def about(chosen):
    """The same set with all that a title tells."""
    return replace(chosen, metadata=ABOUT)


def shown(axis):
    return axis.images[0].get_array().filled(math.nan).tolist()


def test_layers_are_counted():
    chosen = neurons(4, 3)
    axis = pictures.layers_figure(chosen).axes[0]
    for k, language in enumerate(chosen.languages):
        rows = chosen.of(language).tolist()
        for layer in range(4):
            assert shown(axis)[k][layer] == sum(row[0] == layer for row in rows)
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [f"{k}  ({len(chosen.of(k))})" for k in chosen.languages]


def test_the_diagonal_of_the_overlap_counts():
    members = {"en": [[0, 1], [0, 2], [1, 0]], "fr": [[0, 2], [1, 0], [1, 9]], "zh": []}
    rows = {k: torch.tensor(v, dtype=torch.int64).reshape(-1, 2) for k, v in members.items()}
    chosen = neuron_set(rows, {k: torch.zeros(len(v)) for k, v in rows.items()}, 2, WIDTH, {})
    axis = pictures.overlap_figure(chosen).axes[0]
    values = shown(axis)
    assert [values[0][1], values[1][0], values[0][2], values[2][1]] == [0.5, 0.5, 0.0, 0.0]
    assert all(math.isnan(values[i][i]) for i in range(3))
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert [texts[i, i] for i in range(3)] == ["3", "3", "0"]
    assert texts[1, 0] == "0.50"


@pytest.mark.parametrize("experts", [0, 3])
def test_entropies_of_all_neurons_that_fire(experts):
    found = statistics(experts=experts)
    positive = found.moments["mlp_act:positive"]
    expected = []
    for layer in range(3):
        for j in range(WIDTH):
            seen = [50] * 4
            if experts:
                seen = found.routed[layer, j // (WIDTH // experts)].tolist()
            counts = positive[layer, j].tolist()
            rates = [c / s if s else 0.0 for c, s in zip(counts, seen, strict=True)]
            if sum(counts):
                parts = [rate / sum(rates) for rate in rates]
                expected.append(-sum(part * math.log(part) for part in parts if part))
    entropies = pictures.entropies(found)
    assert len(entropies) < 3 * WIDTH, "neuron (0, 0) never fires"
    assert entropies.tolist() == pytest.approx(expected, abs=1e-12)
    assert min(expected) == 0, "neuron (0, 1) fires for one language only, and rarely"


def test_the_histogram_holds_every_neuron():
    found = statistics(languages=5)
    # The entropy of a neuron that is even over five languages rounds to just above ln 5.
    found.moments["mlp_act:positive"][1] = 7
    figure = pictures.entropy_figure(found)
    axis = figure.axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 3 * WIDTH - 1
    assert "35 neurons over 5 languages; 1 never fire" in axis.get_title()
    found.moments["mlp_act:positive"][2] = 0
    found.metadata["neuron_counts"] = [WIDTH, WIDTH, 0]
    assert "23 neurons over 5 languages; 1 never fire" in pictures.entropy_figure(found).axes[0].get_title()
    with pytest.raises(UsageError, match="at least two"):
        pictures.entropies(statistics(languages=1))
    other = Statistics(("en", "fr"), torch.ones(2), torch.ones(2), {}, "")
    with pytest.raises(UsageError, match="mlp_act:positive"):
        pictures.entropies(other)


def test_routing_is_a_share_of_tokens():
    found = statistics(experts=3)
    axes = pictures.routing_figure(found).axes
    for k, language in enumerate(found.languages):
        assert axes[k].get_title() == language
        expected = [[found.routed[layer, e, k].item() / 50 for e in range(3)] for layer in range(3)]
        assert shown(axes[k]) == expected
    scales = {axes[k].images[0].get_clim() for k in range(4)}
    assert scales == {(0.0, found.routed.max().item() / 50)}
    with pytest.raises(UsageError, match="no experts"):
        pictures.routing_figure(statistics())


def test_two_sets_beside_each_other():
    compared = compare([neurons(3, 3, 1), neurons(3, 3, 2)], ["one", "two"])
    left, right = pictures.comparison_figure(compared).axes[:2]
    across = compared.across.reshape(6, 6).fill_diagonal_(math.nan).tolist()
    for found, expected in ((shown(left), across), (shown(right), compared.pairs[0].by_layer.T.tolist())):
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, nan_ok=True)
    assert left.images[0].get_clim() == right.images[0].get_clim()


FIGURES = {
    "layers 1 x 1": lambda: pictures.layers_figure(neurons(1, 1)),
    "layers 2 x 2": lambda: pictures.layers_figure(neurons(2, 2)),
    "layers 40 x 20": lambda: pictures.layers_figure(neurons(40, 20)),
    "layers, long names": lambda: pictures.layers_figure(
        neurons(12, 5, names=[f"{k}_Latn-and-more" for k in NAMES])
    ),
    "layers, told": lambda: pictures.layers_figure(about(neurons(2, 8))),
    "overlap, told": lambda: pictures.overlap_figure(about(neurons(2, 2))),
    "two sets, told": lambda: pictures.comparison_figure(
        compare([about(neurons(2, 2, s)) for s in range(2)], ["one", "a-name-that-is-rather-long-for-a-set"])
    ),
    "overlap 2": lambda: pictures.overlap_figure(neurons(2, 2)),
    "overlap 20": lambda: pictures.overlap_figure(neurons(6, 20)),
    "overlap, long names": lambda: pictures.overlap_figure(
        neurons(6, 7, names=[f"{k}_Latn-and-more" for k in NAMES])
    ),
    "entropy 2": lambda: pictures.entropy_figure(statistics(languages=2)),
    "entropy 20": lambda: pictures.entropy_figure(statistics(languages=20)),
    "routing 2": lambda: pictures.routing_figure(statistics(2, 2, 3)),
    "routing 20": lambda: pictures.routing_figure(statistics(40, 20, 12)),
    "two sets of 2": lambda: pictures.comparison_figure(
        compare([neurons(2, 2, s) for s in range(2)], ["lape", "gradient-contrast"])
    ),
    "two sets of 20": lambda: pictures.comparison_figure(
        compare([neurons(40, 20, s) for s in range(2)], ["lape", "gradient-contrast"])
    ),
    "four sets": lambda: pictures.comparison_figure(
        compare(
            [neurons(4, 5, s) for s in range(4)], ["a", "b", "c", "/a/long/directory/neurons.safetensors"]
        )
    ),
}


def test_titles_tell_method_model_and_languages():
    title = pictures.layers_figure(about(neurons(12, 3))).axes[0].get_title()
    first, told = title.split("\n", 1)
    assert first == "neurons of each language by layer"
    assert (
        " ".join(told.replace("\n", "; ").split())
        == "gradient-contrast; meta-llama/Llama-3.2-1B (e0d05e15); en, de, fr"
    )
    assert "20 languages" in pictures.layers_figure(about(neurons(2, 20))).axes[0].get_title()
    compared = compare([about(neurons(2, 2, s)) for s in range(2)], ["one", "gradient-contrast"])
    told = "; ".join(pictures.comparison_figure(compared).get_suptitle().splitlines())
    assert told.endswith("meta-llama/Llama-3.2-1B (e0d05e15); one: gradient-contrast")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_and_no_label_covers_another(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    assert max(figure.get_size_inches()) <= 20
    if figure._suptitle is not None:
        above = figure._suptitle.get_window_extent()
        assert above.x0 >= 0 and above.x1 <= width and above.y1 <= height
    for axis in figure.axes:
        if not axis.get_visible():
            continue
        box = axis.get_tightbbox()
        title = axis.title.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= width and title.y1 <= height
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        for line in (axis.xaxis, axis.yaxis):
            view = sorted(line.get_view_interval())
            labels = [
                tick.label1
                for tick in line.get_major_ticks()
                if tick.label1.get_visible()
                and tick.label1.get_text()
                and view[0] <= tick.get_loc() <= view[1]
            ]
            assert all(label.get_fontsize() >= 6 for label in labels)
            # A slanted label's box is larger than the label.
            boxes = [label.get_window_extent() for label in labels if label.get_rotation() % 90 == 0]
            for one, other in pairwise(boxes):
                assert not one.overlaps(other), (name, [label.get_text() for label in labels])


@pytest.mark.parametrize("suffix", ["png", "svg", "PNG"])
def test_equal_figures_give_equal_bytes(tmp_path, suffix):
    for place in ("one", "two"):
        pictures.save_figure(pictures.layers_figure(neurons(3, 3)), tmp_path / f"{place}.{suffix}")
    one, two = ((tmp_path / f"{place}.{suffix}").read_bytes() for place in ("one", "two"))
    assert one == two
    assert one.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    assert b"dc:date" not in one and b"Creation Time" not in one
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one.{suffix}", f"two.{suffix}"]


@pytest.mark.parametrize("name", ["picture.pdf", "picture", "png", "picture.png.txt"])
def test_another_kind_of_picture_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        pictures.save_figure(pictures.layers_figure(neurons(1, 1)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_state_is_shared():
    import sys

    before = set(sys.modules)
    pictures.layers_figure(neurons(2, 2))
    assert "matplotlib.pyplot" not in set(sys.modules) - before
