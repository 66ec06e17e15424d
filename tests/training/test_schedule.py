from pathlib import Path

import pytest

from vfmtok_hf import VFMTokARConfig, VFMTokRARConfig
from vfmtok_hf.training.arguments import GeneratorArguments, TrainingArguments, parse_arguments
from vfmtok_hf.training.schedule import learning_rate_at, random_ratio_at


CONFIGS = Path(__file__).parents[2] / "configs"


def test_learning_rate():
    def rate(step, schedule):
        settings = {"learning_rate": 1.0, "warmup_steps": 10, "max_steps": 110, "final_learning_rate": 0.1}
        return learning_rate_at(step, TrainingArguments(train_data="", output="", schedule=schedule, **settings))

    rates = [rate(step, "cosine") for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[60] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[110] == pytest.approx(0.1)
    assert rate(500, "constant") == 1.0
    assert [rate(step, "linear") for step in (10, 35, 110)] == pytest.approx([1, 0.775, 0.1])


IMAGENET_IMAGES = 1_281_167


@pytest.mark.parametrize(
    ("name", "config_class", "num_processes", "epochs", "rates", "random_ratios"),
    [
        ("ar", VFMTokARConfig, 8, 300, [(0, 1e-4), (700_000, 1e-4)], []),
        (
            *("rar", VFMTokRARConfig, 32, 400, [(62_499, 4e-4), (156_250, 2.05e-4), (250_000, 1e-5)]),
            [(0, 1), (125_000, 1), (156_250, 0.5), (187_500, 0)],
        ),
    ],
)
def test_the_imagenet_recipes_of_generators_are_the_originals(
    name, config_class, num_processes, epochs, rates, random_ratios
):
    """Model, images seen, and the schedules at the steps that the original's code names."""
    file = CONFIGS / "imagenet" / f"generator_{name}.yaml"
    arguments = parse_arguments(GeneratorArguments, ["--config", str(file)])
    assert config_class(**arguments.model).to_diff_dict() == config_class.from_variant("L").to_diff_dict()
    images_per_step = num_processes * arguments.batch_size * arguments.gradient_accumulation_steps
    assert arguments.max_steps * images_per_step / IMAGENET_IMAGES == pytest.approx(epochs, rel=1e-3)
    for step, rate in rates:
        assert learning_rate_at(step, arguments) == pytest.approx(rate)
    for step, ratio in random_ratios:
        assert random_ratio_at(step, arguments) == ratio
