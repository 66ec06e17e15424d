"""
Train the image tokenizer on images.

    python -m vfmtok_hf.training.train_tokenizer --config configs/emoji/tokenizer.yaml
    accelerate launch -m vfmtok_hf.training.train_tokenizer --config configs/emoji/tokenizer.yaml --learning_rate 5e-4
    python -m vfmtok_hf.training.train_tokenizer --config configs/emoji/tokenizer.yaml --resume true

The data are a folder of images or a data set of the `datasets` library; only `balance_power` needs labels. The run's
folder contains `model/` (averaged weights, for `from_pretrained`), `checkpoints/`, `log.jsonl`, `arguments.yaml` and
reconstruction grids. docs/training.md explains the loss terms.
"""

from vfmtok_hf.training.arguments import TokenizerArguments, parse_arguments
from vfmtok_hf.training.scripts import check_run, run_script


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(TokenizerArguments, argv, "vfmtok train tokenizer")
    if (arguments.init_from is None) == (arguments.vision_model is None):
        raise ValueError("Pass exactly one of --init_from (a tokenizer) and --vision_model (for a new tokenizer).")
    models, files = [arguments.init_from, arguments.vision_model], []
    if arguments.adversarial_weight and arguments.discriminator == "dino":
        models.append(arguments.discriminator_model)
    if arguments.lpips_weight:
        files.append(arguments.vgg_weights)
    check_run(arguments, models, files)

    from vfmtok_hf.training.tokenizer_training import train

    train(arguments)


if __name__ == "__main__":
    run_script(main)
