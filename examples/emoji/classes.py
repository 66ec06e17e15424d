"""The classes of the emoji dataset: which emoji belong to which class, and what else a user may call it.

Emoji are named by the `short_name` and `subcategory` of the emoji-datasource catalogue. A class takes whole subcategories and single
emoji (`include`), less those that do not look like the others at 64 pixels (`exclude`).
"""

from __future__ import annotations

from typing import NamedTuple


class ClassRule(NamedTuple):
    synonyms: tuple[str, ...]
    subcategories: frozenset[str] = frozenset()
    include: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Not used by any class, and not to be drawn by a model: `middle_finger`.
CLASSES: dict[str, ClassRule] = {
    "animal": ClassRule(
        synonyms=("animal face", "dog", "bear"),
        include=words(
            "mouse cow tiger rabbit monkey_face dog pig hamster wolf polar_bear bear panda_face lion_face fox_face koala frog"
            " raccoon horse unicorn_face giraffe_face zebra_face moose gorilla orangutan chipmunk boar"
        ),
    ),
    "ball": ClassRule(
        synonyms=("sports ball",),
        include=words("basketball football rugby_football volleyball softball soccer baseball tennis 8ball bowling"),
    ),
    "building": ClassRule(
        synonyms=("house", "home"),
        include=words(
            "house house_with_garden office post_office european_post_office hospital bank hotel love_hotel convenience_store school"
            " department_store classical_building derelict_house_building church wedding"
        ),
    ),
    "car": ClassRule(
        synonyms=("vehicle", "bus", "truck"),
        include=words(
            "car taxi police_car ambulance fire_engine bus trolleybus minibus blue_car truck articulated_lorry pickup_truck"
            " oncoming_automobile oncoming_taxi oncoming_police_car oncoming_bus tractor racing_car"
        ),
    ),
    "cat": ClassRule(synonyms=("cat face", "kitten"), subcategories=words("cat-face"), include=words("cat")),
    "clock": ClassRule(
        synonyms=("clock face", "time"),
        subcategories=words("time"),
        exclude=words("watch hourglass hourglass_flowing_sand timer_clock mantelpiece_clock stopwatch"),
    ),
    "flag": ClassRule(synonyms=("country flag",), subcategories=words("country-flag subdivision-flag")),
    "flower": ClassRule(synonyms=("blossom",), subcategories=words("plant-flower"), exclude=words("rosette bouquet")),
    "fruit": ClassRule(
        synonyms=("apple",), subcategories=words("food-fruit"), exclude=words("coconut blueberries olive")
    ),
    "hand": ClassRule(
        synonyms=("open hand", "palm"),
        include=words("wave raised_hand_with_fingers_splayed spock-hand raised_back_of_hand hand v the_horns +1 -1 ok_hand"),
    ),
    "heart": ClassRule(
        synonyms=("love",),
        subcategories=words("heart"),
        exclude=words("love_letter heavy_heart_exclamation_mark_ornament"),
    ),
    "moon": ClassRule(
        synonyms=("moon phase",),
        include=words(
            "new_moon waxing_crescent_moon first_quarter_moon moon full_moon waning_gibbous_moon last_quarter_moon"
            " waning_crescent_moon crescent_moon new_moon_with_face first_quarter_moon_with_face last_quarter_moon_with_face"
            " full_moon_with_face"
        ),
    ),
    "person": ClassRule(synonyms=("human", "portrait"), subcategories=words("person")),
    "smiley": ClassRule(
        synonyms=("face", "emoticon"),
        subcategories=words(
            "face-smiling face-tongue face-sleepy face-affection face-glasses face-neutral-skeptical face-concerned face-unwell"
            " face-hand face-hat"
        ),
        include=words("angry rage triumph face_with_symbols_on_mouth"),
    ),
    "worker": ClassRule(synonyms=("profession", "job"), subcategories=words("person-role")),
    "zodiac": ClassRule(synonyms=("zodiac sign",), subcategories=words("zodiac")),
}
