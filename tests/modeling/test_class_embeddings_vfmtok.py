import pytest
import torch

from tests.modeling.generators import tiny_ar, tiny_batch, tiny_rar


OLD_NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "heart, love", 3: "Moon", 4: "crane"}


@pytest.fixture(params=[tiny_ar, tiny_rar])
def model(request):
    return request.param(id2label=OLD_NAMES)


@torch.no_grad()
def logits(model, labels, tokens):
    return model(torch.tensor(labels), tokens).logits


@pytest.mark.parametrize("names", [["sun", "moon"], ["moon", *"abcdefg", "heart", "tench"]], ids=["fewer", "more"])
def test_known_classes_move_and_new_ones_start_as_the_null_class(model, names):
    _, tokens = tiny_batch(model, batch_size=1)
    before = {old: logits(model, [old], tokens) for old in (0, 2, 3, 5)}
    origins = model.resize_class_embeddings(names)
    assert model.config.num_classes == len(names)
    for label, origin in enumerate(origins):
        assert torch.equal(logits(model, [label], tokens), before[5 if origin is None else origin])
    assert torch.equal(logits(model, [len(names)], tokens), before[5])
    assert origins.count(None) == {2: 1, 10: 7}[len(names)]


def test_a_resized_model_saves_loads_trains_and_draws(model, tmp_path):
    model.resize_class_embeddings(["sun", "moon"])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "sun", 1: "moon"}
    labels, tokens = tiny_batch(loaded)
    assert torch.equal(loaded(labels, tokens).logits, model(labels, tokens).logits)
    loaded.train()(labels, tokens, return_loss=True).loss.backward()
    table, first = loaded.class_embedding_table()
    assert len(table.weight) == first + 3
    assert table.weight.grad[first:].abs().sum() > 0
    assert loaded.eval().generate(torch.tensor([0, 1]), guidance_scale=2.0).shape == (2, 9)
    with pytest.raises(ValueError, match="0 to 2"):
        loaded(torch.tensor([3, 0, 0]), tokens)


def test_class_names_must_differ(model):
    for names in ([], ["sun", "sun"]):
        with pytest.raises(ValueError, match="distinct class names"):
            model.resize_class_embeddings(names)


@pytest.mark.parametrize("names", ["sun", [1, 2], {0: "sun"}])
def test_class_names_are_strings(model, names):
    with pytest.raises(TypeError, match="class_names are strings"):
        model.resize_class_embeddings(names)
