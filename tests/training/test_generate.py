"""Text from a checkpoint."""

import pytest

from tilewise.training import generate_text, load_checkpoint, load_model, train


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return load_checkpoint(train(tiny(steps=3, attention="sdpa"), tmp_path).paths["checkpoint"])


def test_streams_what_it_returns(checkpoint):
    pieces = []
    sample = generate_text(checkpoint, "def ", 40, seed=1, on_text=pieces.append)
    assert "".join(pieces) == sample.text
    assert len(pieces) == len(sample.text) == sample.tokens == 40
    assert sample.tokens_per_second == pytest.approx(40 / sample.seconds)
    assert generate_text(checkpoint, "def ", 40, seed=1).text == sample.text
    assert generate_text(checkpoint, "def ", 40, seed=2).text != sample.text


def test_is_the_models_own_generation(checkpoint):
    vocabulary, model = checkpoint.vocabulary, load_model(checkpoint)
    tokens = model.generate(vocabulary.encode("def f")[None], 30, temperature=0)
    expected = vocabulary.decode(tokens[0])
    assert "def f" + generate_text(checkpoint, "def f", 30, temperature=0).text == expected


def test_bad_input(checkpoint):
    with pytest.raises(ValueError, match="prompt must have at least one character"):
        generate_text(checkpoint, "", 3)
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        generate_text(checkpoint, "def", 0)
    with pytest.raises(ValueError, match=r"outside the vocabulary of \d+: 'Q', 'ß'"):
        generate_text(checkpoint, "deß Q", 3)
