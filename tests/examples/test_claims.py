"""The configurations of the claims stay valid for the trainers."""

from pathlib import Path

from vfmtok_hf.training.arguments import GeneratorArguments, TokenizerArguments, parse_arguments


CLAIMS = Path(__file__).parents[2] / "examples" / "claims"


def test_configurations_of_the_claims_are_the_trainers():
    tokenizer = ["--config", str(CLAIMS / "tokenizer.yaml"), "--output", "run"]
    assert parse_arguments(TokenizerArguments, tokenizer).perceptual_weight == 0
    generator = ["--config", str(CLAIMS / "generator.yaml"), "--output", "run", "--tokenizer", "model"]
    assert parse_arguments(GeneratorArguments, generator).generator == "ar"
