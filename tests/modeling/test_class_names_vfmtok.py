import pytest

from vfmtok_hf.modeling.class_names_vfmtok import ClassNames, match_class_names, short_class_name


OLD_NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "heart, love", 3: "Moon", 4: "crane", 5: "2"}


def test_classes_continue_those_of_their_name_or_a_synonym():
    names = ["moon", "love", "TENCH", "heart, red heart", "crane", "sun", "Tinca  tinca"]
    assert match_class_names(names, list(OLD_NAMES.values())) == [3, 2, 0, 2, None, None, 0]


def test_a_whole_name_goes_before_a_synonym():
    old = ["crane, machine", "crane", "machine"]
    assert ClassNames(dict(enumerate(old))).ids("crane") == [1]
    assert match_class_names(["machine, crane", "crane, machine"], old) == [2, 0]


@pytest.mark.parametrize(("name", "class_id"), [("love", 2), (" 4 ", 4), ("2", 5), ("17", 17)])
def test_names_go_before_numbers(name, class_id):
    assert ClassNames(OLD_NAMES).find(name) == class_id


@pytest.mark.parametrize(
    ("name", "message"),
    [("hart", "Did you mean 'heart'"), ("crane", r"several classes: 1 \(crane\), 4 \(crane\)"), ("", "classes are")],
)
def test_what_no_class_or_several_are_called_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        ClassNames(OLD_NAMES).find(name)


def test_short_names():
    assert [short_class_name(OLD_NAMES, class_id) for class_id in (0, 3, 99)] == ["tench", "Moon", "99"]
