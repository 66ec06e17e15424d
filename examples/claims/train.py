"""
Train the tokenizers for the comparison with the paper's claims, and a generator on each.

    python examples/claims/train.py --data data/emoji64 --vision-model data/efficientnet_lite0 --output runs/claims

Each variant changes one thing in the first one; `vqgan` changes the encoder and the number of tokens. Interrupted runs are
resumed, and finished ones are kept. A variant with 36 tokens takes about ten minutes on one CPU thread. `--variants vqgan --seed 2`
selects runs, such as for processes side by side; docs/claims.md has the results.
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel
from vqgan import VQGANModel, load_tokenizer

from vfmtok_hf import VFMTokConfig, VFMTokModel
from vfmtok_hf.data.image_datasets import ImageDataset
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.training import generator_training, tokenizer_training
from vfmtok_hf.training.arguments import GeneratorArguments, TokenizerArguments, parse_arguments


HERE = Path(__file__).parent
VARIANTS = ("region_adaptive", "fixed_grid", "no_feature_reconstruction", "random_encoder", "vqgan")
CALIBRATION_BATCHES = 30


def randomized_vision_model(vision_model: Path, data: Path, image_size: int, folder: Path) -> Path:
    """Write the same architecture with random weights and adapted batch norms to a folder."""
    if not folder.is_dir():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(vision_model)
        model = AutoModel.from_config(config)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # a plain average over the batches
        images = ImageDataset(open_records(data / "train"), Augmentation(image_size))
        mean, std = (torch.tensor(config.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        model.train()
        order = torch.randperm(len(images))[: CALIBRATION_BATCHES * 32].split(32)
        with torch.no_grad():
            for part in order:
                pixel_values = torch.stack([images[index]["pixel_values"] for index in part.tolist()])
                model(((pixel_values + 1) / 2 - mean) / std)
        model.save_pretrained(folder)
    return folder


def build_fixed_grid(arguments: TokenizerArguments) -> VFMTokModel:
    """A tokenizer whose sampling offsets are fixed to zero: each anchor reads only the center of its own cell."""
    model = tokenizer_training.build_model(arguments)
    for layer in model.anchor_encoder.layers:
        for parameter in layer.cross_attn.sampling_offsets.parameters():
            nn.init.zeros_(parameter)
            parameter.register_hook(torch.zeros_like)
    return model


def build_vqgan(arguments: TokenizerArguments) -> VQGANModel:
    return VQGANModel(
        VFMTokConfig(vision_config=AutoConfig.from_pretrained(arguments.vision_model), **arguments.model)
    )


BUILDERS = {"fixed_grid": build_fixed_grid, "vqgan": build_vqgan}


def is_finished(run: Path) -> bool:
    """Whether a run's newest checkpoint is that of its last step."""
    arguments = run / "arguments.yaml"
    if not arguments.is_file():
        return False
    max_steps = yaml.safe_load(arguments.read_text())["max_steps"]
    return (run / "checkpoints" / f"step_{max_steps:08d}").is_dir()


def trainer_arguments(config: Path, data: Path, run: Path, seed: int, **values: object) -> list[str]:
    pairs = {
        "config": config,
        "train_data": data / "train",
        "validation_data": data / "validation",
        "output": run,
        "resume": "true",
        "seed": seed,
        **values,
    }
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]


def train_tokenizer_of(variant: str, data: Path, vision_model: Path, run: Path, seed: int) -> None:
    values: dict[str, object] = {"vision_model": vision_model}
    if variant == "no_feature_reconstruction":
        values["model.feature_loss_weight"] = 0.0
    if variant == "random_encoder":
        folder = run.parents[1] / "random_vision_model"
        values["vision_model"] = randomized_vision_model(vision_model, data, 64, folder)
    if variant == "vqgan":
        values |= {"model.num_anchors": 81, "model.feature_loss_weight": 0.0, "model.save_vision_model": False}
    argv = trainer_arguments(HERE / "tokenizer.yaml", data, run, seed, **values)
    build_model = BUILDERS.get(variant, tokenizer_training.build_model)
    tokenizer_training.train(parse_arguments(TokenizerArguments, argv), build_model)


def train_generator_of(tokenizer: Path, data: Path, run: Path, seed: int) -> None:
    argv = trainer_arguments(HERE / "generator.yaml", data, run, seed, tokenizer=tokenizer)
    generator_training.train(parse_arguments(GeneratorArguments, argv), load_tokenizer(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "vision-model", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output = arguments.output / f"seed_{arguments.seed}"
    for variant in arguments.variants:
        run = output / variant / "tokenizer"
        if not is_finished(run):
            train_tokenizer_of(variant, arguments.data, arguments.vision_model, run, arguments.seed)
        if not is_finished(run):
            return  # stopped by a signal
    for variant in arguments.variants:
        run = output / variant / "generator"
        if not is_finished(run):
            tokenizer = output / variant / "tokenizer" / "model"
            train_generator_of(tokenizer, arguments.data, run, arguments.seed)
        if not is_finished(run):
            return


if __name__ == "__main__":
    main()
