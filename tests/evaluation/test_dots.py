"""A figure of dots shows every score of every model, and one that is far out does not flatten the others."""

from xml.etree import ElementTree

from kinema.evaluation.dots import Dot, Panel, bounds, figure

SVG = "{http://www.w3.org/2000/svg}"
NEAR = [Dot(v, v - 0.1, v + 0.1) for v in (0.4, 0.5, 0.55, 0.6)]


def drawn(*panels: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(figure([f"row {i} <&>" for i in range(5)], panels, "below"))


def texts(tree: ElementTree.Element) -> list[str | None]:
    return [e.text for e in tree.iter(f"{SVG}text")]


def test_an_axis_holds_the_intervals_near_the_rest_and_the_target():
    assert bounds(NEAR) == bounds([*NEAR, Dot(17.0, 16.0, 18.0)]) == (0.4 - 0.1, 0.6 + 0.1)
    assert bounds(NEAR, target=0.9) == (0.4 - 0.1, 0.9)
    assert bounds(NEAR[:1]) == (0.4 - 0.1, 0.4 + 0.1)


def test_what_is_far_out_is_an_arrow_with_its_number_and_the_others_keep_their_room():
    tree = drawn(Panel("distance", [*NEAR, Dot(17.153, 16.8, 17.6)], target=0.35))
    dots = [float(e.get("cx", "nan")) for e in tree.iter(f"{SVG}circle")]
    assert len(dots) == 4 and dots == sorted(dots) and dots[-1] - dots[0] > 60
    assert len([*tree.iter(f"{SVG}polygon")]) == 1 and "17.15" in texts(tree)
    assert len([e for e in tree.iter(f"{SVG}line") if e.get("stroke-dasharray")]) == 1


def test_every_row_has_its_name_and_a_score_that_is_missing_has_no_dot():
    tree = drawn(Panel("shape", [None, *NEAR], rate=True), Panel("motion", [None] * 5))
    assert [name for name in texts(tree) if name and name.startswith("row")] == [f"row {i} <&>" for i in range(5)]
    assert len([*tree.iter(f"{SVG}circle")]) == 4 and "not measured" in texts(tree) and "40%" in texts(tree)


def test_equal_scores_without_an_interval_have_an_axis():
    assert len([*drawn(Panel("shape", [Dot(1.0, 1.0, 1.0)] * 5, 1.0, rate=True)).iter(f"{SVG}circle")]) == 5
