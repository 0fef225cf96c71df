import pytest

from bench.search.space import cuts_of, first_cuts, is_student, layer_map_of, smallest, student_after
from distill.models.architectures import ARCHITECTURES, BK_SMALL_DEPTH, KOALA_700M_DEPTH, SD_DEPTH, SDXL_DEPTH
from distill.models.depth import Depth
from distill.models.module_map import make_module_map


@pytest.mark.parametrize("name", ["ssd-1b", "vega", "koala-1b", "koala-700m", "small-sd", "bk-sdm-small"])
def test_the_published_students_are_in_the_space(name: str) -> None:
    """What a published student drops of its teacher, as cuts, gives that student's map back."""
    architecture = ARCHITECTURES[name]
    teacher = SD_DEPTH if "sd-1" in architecture.family.name else SDXL_DEPTH
    modules = make_module_map("first", teacher, architecture.depth)
    again = student_after(teacher, modules.dropped)
    assert (again.student, dict(again.paths)) == (modules.student, dict(modules.paths))


@pytest.mark.parametrize("teacher", [SDXL_DEPTH, SD_DEPTH, KOALA_700M_DEPTH], ids=str)
def test_every_cut_on_the_way_to_the_smallest_leaves_a_student(teacher: Depth) -> None:
    removed: frozenset[str] = frozenset()
    while cuts := cuts_of(teacher, removed, {}):
        assert all(not cut & removed for cut in cuts)
        for cut in cuts[:3]:
            student_after(teacher, removed | cut)
        removed |= cuts[len(cuts) // 2]
    assert student_after(teacher, removed).student == smallest(teacher).student


def test_the_smallest_of_each_family() -> None:
    assert str(smallest(SDXL_DEPTH).student) == "-/1/1:-:1,1/1,1/-"
    assert smallest(SD_DEPTH).student == BK_SMALL_DEPTH


def test_the_middle_and_the_last_down_level_are_shortened_together() -> None:
    pairs = [
        cut for cut in cuts_of(SDXL_DEPTH, (), {}) if len(cut) == 2 and all("transformer_blocks" in p for p in cut)
    ]
    one = frozenset({"mid_block.attentions.0.transformer_blocks.0", "down_blocks.2.attentions.0.transformer_blocks.0"})
    assert pairs == [one] and one not in first_cuts(SDXL_DEPTH)
    assert not is_student(SDXL_DEPTH, {"mid_block.attentions.0.transformer_blocks.0"})
    modules = student_after(SDXL_DEPTH, one)
    assert str(modules.student) == "-/2,2/9,10:9:10,10,10/2,2,2/-"
    assert layer_map_of(modules)["mid_block.attentions.0"] == tuple(range(1, 10))
