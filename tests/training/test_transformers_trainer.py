"""Generators under transformers' own Trainer, as docs/training.md shows it."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tests.modeling.generators import tiny_ar, tiny_rar


@pytest.mark.parametrize("tiny_generator", [tiny_ar, tiny_rar])
@pytest.mark.parametrize("columns", [["labels"], ["image_tokens", "labels"]])
def test_a_generator_trains_without_a_collator_of_its_own(columns, tiny_generator, tmp_path):
    model = tiny_generator()
    shape = (16, model.config.num_image_tokens)
    tokens = torch.randint(model.config.codebook_size, shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % model.config.num_classes
    dataset = Dataset.from_dict({"class_labels": labels.tolist(), **dict.fromkeys(columns, tokens.tolist())})
    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), report_to="none", logging_steps=1, save_strategy="no", **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        logits = model.eval()(class_labels=labels, image_tokens=tokens).logits
    assert before == pytest.approx(torch.nn.functional.cross_entropy(logits.mT, tokens).item(), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


@pytest.mark.parametrize("tiny_generator", [tiny_ar, tiny_rar])
def test_tokens_have_a_loss_by_default_in_training_mode_only(tiny_generator):
    model = tiny_generator(class_dropout=0.0)
    batch = {"class_labels": torch.tensor([0, 3]), "image_tokens": torch.arange(18).view(2, 9)}
    assert model(**batch).loss is None
    assert model.train()(**batch).loss is not None
    assert model(**batch, return_loss=False).loss is None
    with pytest.raises(ValueError, match="image_tokens are missing"):
        model(class_labels=batch["class_labels"])
