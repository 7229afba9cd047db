"""Checkpoints: what goes in comes out, and everything else is an error that says what to do."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qgraph.checkpoint import load, save
from qgraph.config import QConfig, QuantSpec, Rule
from qgraph.errors import CheckpointError, ConfigError
from qgraph.graph import config_of
from qgraph.prepare import prepare


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a layer of its own kind, and a buffer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.randn(width, width))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.linear(torch.relu(self.mix(self.embed(tokens))), self.scale)
        return self.head(self.norm(x))


TOKENS = torch.arange(8) % 11
EVERYTHING = ["A8W4@8", "A4W1-2:4", "W1.58", "A1W1", "W2-70%", "2:4"]


def prepared(config: str | QConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = prepare(Tied(), config, (TOKENS,))
    model(TOKENS).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return model.eval()


@pytest.mark.parametrize("config", EVERYTHING)
def test_a_float_model_becomes_the_saved_one(config: str, tmp_path: Path) -> None:
    model = prepared(config)
    save(model, tmp_path / "a.safetensors")
    other = Tied()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loaded = load(tmp_path / "a.safetensors", other, (TOKENS,)).eval()
    assert config_of(loaded) == QConfig.parse(config)
    assert config_of(other) is None
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_a_prepared_model_is_filled_in_place(tmp_path: Path) -> None:
    model, other = prepared("A8W4@8"), prepared("A8W4@8", seed=1)
    assert not torch.equal(model(TOKENS), other(TOKENS))
    save(model, str(tmp_path / "a"))
    assert load(str(tmp_path / "a"), other) is other
    assert torch.equal(model(TOKENS), other(TOKENS))


def test_learned_steps_travel(tmp_path: Path) -> None:
    config = QConfig(QuantSpec(4, "linear", method="lsq"), QuantSpec(4, "linear", "tensor", method="lsq"))
    model = prepared(config)
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", Tied(), (TOKENS,)).eval()
    assert any(name.endswith(".step") for name in loaded.state_dict())
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_a_tied_tensor_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = prepared("W4")
    save(model, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        names = set(file.keys())
        aliases = json.loads(file.metadata()["qgraph.aliases"])
    assert ("embed.weight" in names) != ("head.weight" in names)
    assert aliases
    loaded = load(tmp_path / "a", Tied())
    assert loaded.embed.weight is loaded.head.weight


def test_rules_are_in_the_file(tmp_path: Path) -> None:
    config = QConfig.parse("W4").with_rules(Rule(nn.Embedding, None), Rule("mix", "W2"))
    model = prepared(config)
    save(model, tmp_path / "a")
    assert config_of(load(tmp_path / "a", Tied(), (TOKENS,))) == config


def test_a_predicate_cannot_be_saved(tmp_path: Path) -> None:
    config = QConfig.parse("W4").with_rules(Rule(lambda path, module: path == "mix", None))
    with pytest.raises(ConfigError, match="a predicate is code and has no text form"):
        save(prepared(config), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_another_config(tmp_path: Path) -> None:
    save(prepared("A4W1"), tmp_path / "a")
    other = prepared("W4")
    before = other(TOKENS)
    with pytest.raises(CheckpointError, match="made with config A4W1, the model was prepared with W4"):
        load(tmp_path / "a", other)
    assert torch.equal(other(TOKENS), before)


def test_another_architecture(tmp_path: Path) -> None:
    save(prepared("W4"), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"does not fit Tied: shapes differ: .*16x16 in the checkpoint, 8x8"):
        load(tmp_path / "a", Tied(8))
    with pytest.raises(
        CheckpointError, match="does not fit Linear: the checkpoint lacks bias, weight; the model lacks"
    ):
        load(tmp_path / "a", nn.Linear(2, 2))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no tensors", b"\xff" * 100, None])
def test_no_checkpoint_at_all(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load(path, Tied())


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_file(keep: float, tmp_path: Path) -> None:
    save(prepared("W4"), tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load(tmp_path / "a", Tied())


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"mix.weight": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="without a qgraph config"):
        load(tmp_path / "a", Tied())


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a", {"qgraph.config": '{"weight": {"bits": 9}}'})
    with pytest.raises(CheckpointError, match="found 9"):
        load(tmp_path / "a", Tied())


def test_what_is_not_prepared(tmp_path: Path) -> None:
    for model in (Tied(), "model"):
        with pytest.raises(CheckpointError, match="not prepared, so there is no config to save"):
            save(model, tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"expected the nn\.Module to load into"):
        load(tmp_path / "a", "model")  # type: ignore[arg-type]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    model = prepared("W4")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(model, tmp_path / "missing" / "a")
    with pytest.raises(CheckpointError, match="this is a folder"):
        save(model, tmp_path)


def test_a_file_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("W4")
    save(model, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()

    def full(*args: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(model, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Strange(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(CheckpointError, match="_extra_state of the model's state is a dict"):
        save(prepare(Strange(4, 4), "W4"), tmp_path / "a")


def test_the_file_is_as_readable_as_any(tmp_path: Path) -> None:
    save(prepared("W4"), tmp_path / "a")
    (tmp_path / "b").touch()
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode
