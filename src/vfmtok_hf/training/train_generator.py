"""
Train a class-conditional generator of image tokens, from scratch or from a trained one.

    python -m vfmtok_hf.training.train_generator --config configs/emoji/generator_rar.yaml
    accelerate launch -m vfmtok_hf.training.train_generator --config configs/emoji/generator_rar.yaml
    python -m vfmtok_hf.training.train_generator --config configs/emoji/generator_rar.yaml --resume true

The data are images, which are encoded once (`num_crops` of each) or in every step, or a token set by
`extract_tokens.py`. The run's folder contains `model/` (averaged weights, for `from_pretrained`), `pipeline/`,
`tokens/`, `checkpoints/`, `log.jsonl`, `arguments.yaml` and sample grids, one row per class.
"""

from vfmtok_hf.training.arguments import GeneratorArguments, parse_arguments
from vfmtok_hf.training.scripts import check_run, run_script


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(GeneratorArguments, argv, "vfmtok train generator")
    if arguments.tokenizer is None and arguments.init_from is None:
        raise ValueError("Pass --tokenizer, or --init_from with a pipeline.")
    check_run(arguments, [arguments.tokenizer, arguments.init_from])

    from vfmtok_hf.training.generator_training import train

    train(arguments)


if __name__ == "__main__":
    run_script(main)
