"""
Encode images to image tokens once, for any number of generator trainings.

    python -m vfmtok_hf.training.extract_tokens --data data/train --tokenizer runs/tokenizer/model --output tokens/train
    torchrun --nproc_per_node 8 -m vfmtok_hf.training.extract_tokens --config extract.yaml

After an interruption, the same command continues with the missing shards.
"""

from pathlib import Path

from vfmtok_hf.data.files import check_file, check_model, check_source
from vfmtok_hf.data.output_files import check_output_folder
from vfmtok_hf.training.arguments import ExtractionArguments, parse_arguments
from vfmtok_hf.training.scripts import run_script


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(ExtractionArguments, argv, "python -m vfmtok_hf.training.extract_tokens")
    check_output_folder(Path(arguments.output))
    check_source(arguments.data)
    check_model(arguments.tokenizer)
    if arguments.class_names is not None:
        check_file(arguments.class_names)

    from vfmtok_hf.training.token_extraction import extract

    extract(arguments)


if __name__ == "__main__":
    run_script(main)
