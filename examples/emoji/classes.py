"""The classes of the emoji dataset: the emoji of each class, and its synonyms.

Emoji are named by the `short_name` and `subcategory` of the emoji-datasource catalog. A class consists of
whole subcategories and single emoji (`include`), without those that look different (`exclude`). A synonym must describe every
emoji of its class, so `dog` is not a synonym of `animal`.
"""

from __future__ import annotations

from typing import NamedTuple


class ClassRule(NamedTuple):
    synonyms: tuple[str, ...]
    subcategories: frozenset[str] = frozenset()
    include: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    exclude_styles: frozenset[str] = frozenset()


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CLASSES: dict[str, ClassRule] = {
    "animal": ClassRule(  # heads seen from the front; cats have a class of their own
        synonyms=("animal face",),
        include=words(
            "bear cow dog fox_face frog hamster koala lion_face monkey_face mouse panda_face pig"
            " polar_bear rabbit raccoon tiger wolf"
        ),
    ),
    "car": ClassRule(
        synonyms=("vehicle", "automobile"),
        include=words(
            "ambulance blue_car bus car minibus oncoming_automobile oncoming_bus oncoming_police_car oncoming_taxi"
            " pickup_truck police_car taxi truck"
        ),
    ),
    "cat": ClassRule(synonyms=("cat face", "kitten"), subcategories=words("cat-face"), include=words("cat")),
    "clock": ClassRule(
        synonyms=("clock face", "time"),
        subcategories=words("time"),
        exclude=words("alarm_clock hourglass hourglass_flowing_sand mantelpiece_clock stopwatch timer_clock watch"),
    ),
    "flag": ClassRule(
        synonyms=("country flag",),
        subcategories=words("country-flag subdivision-flag"),
        # EmojiTwo draws discs. Microsoft draws no flags: the origin of those in the 3D package is not stated.
        exclude_styles=words("emojitwo fluent3d"),
    ),
    "flower": ClassRule(
        synonyms=("blossom",),
        subcategories=words("plant-flower"),
        exclude=words("rosette white_flower"),
    ),
    "fruit": ClassRule(
        synonyms=("fruits",), subcategories=words("food-fruit"), exclude=words("blueberries coconut olive")
    ),
    "hand": ClassRule(  # open hands
        synonyms=("open hand", "palm"),
        include=words("hand raised_back_of_hand raised_hand_with_fingers_splayed spock-hand wave"),
    ),
    "heart": ClassRule(
        synonyms=("love",),
        subcategories=words("heart"),
        exclude=words("heart_decoration heavy_heart_exclamation_mark_ornament love_letter revolving_hearts"),
    ),
    "moon": ClassRule(
        synonyms=("moon phase",),
        include=words(
            "crescent_moon first_quarter_moon first_quarter_moon_with_face full_moon full_moon_with_face"
            " last_quarter_moon last_quarter_moon_with_face moon new_moon new_moon_with_face waning_crescent_moon"
            " waning_gibbous_moon waxing_crescent_moon"
        ),
    ),
    "person": ClassRule(synonyms=("human", "portrait"), subcategories=words("person")),
    "smiley": ClassRule(
        synonyms=("face", "emoticon"),
        subcategories=words(
            "face-affection face-concerned face-glasses face-hand face-hat face-neutral-skeptical face-sleepy"
            " face-smiling face-tongue face-unwell"
        ),
        include=words("angry face_with_symbols_on_mouth rage triumph"),
        exclude=words("disguised_face dotted_line_face exploding_head face_in_clouds shaking_face"),
    ),
    "worker": ClassRule(  # portraits whose hat or helmet tells the job
        synonyms=("profession", "job"),
        include=words(
            "astronaut male-astronaut female-astronaut cook male-cook female-cook farmer male-farmer female-farmer"
            " firefighter male-firefighter female-firefighter pilot male-pilot female-pilot student male-student"
            " female-student cop male-police-officer female-police-officer guardsman male-guard female-guard"
            " construction_worker male-construction-worker female-construction-worker"
        ),
    ),
    "zodiac": ClassRule(synonyms=("zodiac sign",), subcategories=words("zodiac")),
}
