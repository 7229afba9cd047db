"""Specs, the notation, rules, and their text forms; every bad input by its message."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qgraph.config import QConfig, QuantSpec, Rule, SparsitySpec
from qgraph.errors import ConfigError, QGraphError
from qgraph.graph import sites
from qgraph.prepare import prepare

BITS = st.sampled_from([1, 1.58, 2, 3, 4, 5, 6, 7, 8])
RATIOS = st.floats(min_value=1e-6, max_value=1, exclude_max=True)
COUNTS = st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))
SPARSITY = st.one_of(
    COUNTS.map(lambda nm: SparsitySpec("n:m", n=nm[0], m=nm[1])),
    RATIOS.map(lambda ratio: SparsitySpec("unstructured", ratio=ratio)),
    st.builds(
        lambda ratio, rows, columns: SparsitySpec("block", ratio=ratio, block_shape=(rows, columns)),
        RATIOS,
        st.integers(1, 64),
        st.integers(1, 64),
    ),
)


@st.composite
def notations(draw) -> str:
    activation = draw(st.none() | BITS)
    weight = draw(st.none() | BITS)
    sparsity = draw(st.none() | SPARSITY)
    bits = (f"A{activation}" if activation else "") + (f"W{weight}" if weight else "")
    group = draw(st.sampled_from(["", "@channel", "@tensor", "@1", "@32", "@100", "@128"])) if bits else ""
    pruned = ("-" if bits else "") + str(sparsity) if sparsity else ""
    return bits + pruned + group or "float"


@st.composite
def specs(draw, granularities: tuple[str, ...], schemes: tuple[str, ...] = ("affine", "linear")) -> QuantSpec:
    bits = draw(BITS)
    granularity = draw(st.sampled_from(granularities))
    scheme = "linear" if bits == 1.58 else draw(st.sampled_from(schemes))
    method = draw(st.sampled_from(["ddt", "ste", "lsq"]))
    scale = draw(st.sampled_from(["minmax", "absmean", "windowed"])) if method != "lsq" else "minmax"
    group_size = draw(st.integers(1, 512)) if granularity == "block" else None
    lam = draw(st.floats(0, 1e6))
    return QuantSpec(bits, scheme, granularity, group_size, method, scale, lam)


@st.composite
def plain_configs(draw) -> QConfig:
    sparsity = draw(st.none() | SPARSITY)
    schemes = ("linear",) if sparsity else ("affine", "linear")
    weight = draw(st.none() | specs(("tensor", "channel", "block"), schemes))
    return QConfig(weight, draw(st.none() | specs(("tensor", "token", "block"))), sparsity)


RULES = st.builds(
    Rule,
    st.sampled_from(["encoder.*", "*", "a b", "2:4", re.compile(r"fc\d$"), re.compile("X", re.I), nn.Linear, nn.LSTM]),
    st.none() | plain_configs(),
)
CONFIGS = st.builds(lambda config, rules: config.with_rules(*rules), plain_configs(), st.lists(RULES, max_size=3))


def test_the_default_scale() -> None:
    """Affine DDT levels of one and two bits are centred and windowed; all else has the scale of the paper."""
    for text in ("A1W1", "A2W2@128"):
        config = QConfig.parse(text)
        assert config.weight.scale == config.activation.scale == "windowed"
    others = [QConfig.parse("W1.58").weight, QConfig.parse("W1-2:4").weight, QConfig.parse("A3sW3").activation]
    others += [QuantSpec(1, method=method) for method in ("ste", "lsq", "seq")] + [QConfig.parse("A1sW1").activation]
    assert {spec.scale for spec in (*others, QuantSpec(1, scale="minmax"), QuantSpec(3))} == {"minmax"}


@given(notations())
def test_notation_round_trip(text: str) -> None:
    config = QConfig.parse(text)
    assert QConfig.parse(str(config)) == config
    assert str(QConfig.parse(str(config))) == str(config)
    assert str(config) == text.replace("@channel", "")


@given(plain_configs())
def test_notation_is_the_config_or_none(config: QConfig) -> None:
    assert config.notation is None or QConfig.parse(config.notation) == config
    assert str(config)


@given(CONFIGS)
def test_text_round_trips(config: QConfig) -> None:
    assert QConfig.from_dict(config.to_dict()) == config
    assert QConfig.from_json(config.to_json()) == config
    assert QConfig.from_yaml(config.to_yaml()) == config


@given(CONFIGS)
def test_values_behave_as_values(config: QConfig) -> None:
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert hash(twin) == hash(config)
    assert str(config) and repr(config)
    assert QConfig.parse(config) is config


@given(SPARSITY)
def test_sparsity_round_trip(spec: SparsitySpec) -> None:
    assert SparsitySpec.parse(str(spec)) == spec
    assert 0 <= spec.density <= 1


@pytest.mark.parametrize(
    ("text", "weight", "activation"),
    [
        ("W4", QuantSpec(4), None),
        ("W1.58", QuantSpec(1.58, "linear"), None),
        ("A4W1", QuantSpec(1, "affine", "channel"), QuantSpec(4, "affine", "token")),
        ("A1.58W1", QuantSpec(1), QuantSpec(1.58, "linear", "token")),
        ("A4W1@tensor", QuantSpec(1, granularity="tensor"), QuantSpec(4, granularity="tensor")),
        ("A4W1@channel", QuantSpec(1), QuantSpec(4, granularity="token")),
        ("A8sW7", QuantSpec(7, "linear"), QuantSpec(8, granularity="tensor", method="ste", range="static")),
        ("A4sW1@32", QuantSpec(1, "affine", "block", 32), QuantSpec(4, granularity="tensor", range="static")),
        ("A8s", None, QuantSpec(8, granularity="tensor", method="ste", range="static")),
        ("A4W1-2:4", QuantSpec(1, "linear"), QuantSpec(4, granularity="token")),
        ("A8W4", QuantSpec(4), QuantSpec(8, "affine", "token")),
        ("A8W4@128", QuantSpec(4, "affine", "block", 128), QuantSpec(8, "linear", "block", 128, "ste")),
        ("A4W4@64", QuantSpec(4, "affine", "block", 64), QuantSpec(4, "affine", "block", 64)),
        ("A8", None, QuantSpec(8, granularity="token")),
        ("70%", None, None),
        (" A8 ".strip(), None, QuantSpec(8, granularity="token")),
    ],
)
def test_what_a_notation_means(text: str, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    config = QConfig.parse(text)
    assert config.weight == weight
    assert config.activation == activation


@pytest.mark.parametrize(
    ("spec", "levels", "storage"),
    [
        (QuantSpec(1), (0, 1), 1),
        (QuantSpec(4), (0, 15), 4),
        (QuantSpec(8), (0, 255), 8),
        (QuantSpec(1, "linear"), (-1, 1), 1),
        (QuantSpec(1.58), (-1, 1), 1.584962500721156),
        (QuantSpec(2, "linear"), (-1, 1), 2),
        (QuantSpec(4, "linear"), (-7, 7), 4),
        (QuantSpec(8, "linear"), (-127, 127), 8),
    ],
)
def test_levels(spec: QuantSpec, levels: tuple[int, int], storage: float) -> None:
    assert spec.levels == levels
    assert spec.storage_bits == pytest.approx(storage)


def test_whole_floats_are_whole() -> None:
    assert repr(QuantSpec(4.0).bits) == "4"
    assert QuantSpec(4.0) == QuantSpec(4)


@pytest.mark.parametrize(
    ("text", "found", "near"),
    [
        ("A0W4", "A0 asks for 0 bits, and bits are 1..8 or 1.58", "A1W4"),
        ("A4W9", "W9 asks for 9 bits", "A4W8"),
        ("W1.3", "W1.3 asks for 1.3 bits", "W1.58"),
        ("a4w1", "not the notation", "A4W1"),
        ("W1A4", "not the notation", "A4W1"),
        ("A8W4@chanel", "@chanel is neither", "A8W4@channel"),
        ("A4W1/2:4", "not the notation", "A4W1-2:4"),
        ("A8W4@@128", "not the notation", "A8W4@128"),
        ("A4W1-2;4", "not the notation", "A4W1-2:4"),
        ("W4@0", "a block holds at least one value", "W4"),
        ("A4W1-5:4", "sparsity 5:4: N of every M weights are kept, so 1 <= N <= M <= 32", "A4W1-4:5"),
        ("A4W1-0:4", "sparsity 0:4", "A4W1-1:4"),
        ("W4-2:64", "sparsity 2:64", "W4-2:32"),
        ("W4-0%", "sparsity 0%: the fraction that is pruned lies above 0 % and below 100 %", "W4-10%"),
        ("W4-100%", "sparsity 100%", "W4-90%"),
        ("@128", "neither A nor W is given", None),
        ("2:4@128", "neither A nor W is given", "2:4"),
        ("", "not the notation", None),
        ("quantize it", "not the notation", None),
    ],
)
def test_bad_notation(text: str, found: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        QConfig.parse(text)
    message = str(error.value)
    assert f"config {text!r}: " in message
    assert found in message
    assert "The grammar is A<bits>[s]W<bits>" in message
    if near is not None:
        assert f"Did you mean {near!r}?" in message
        QConfig.parse(near)


@given(st.text(alphabet="AWaw0123456789.:%-@[]x chanetsor", max_size=12))
def test_any_text_parses_or_explains(text: str) -> None:
    try:
        config = QConfig.parse(text)
    except ConfigError as error:
        message = str(error)
        assert "The grammar is" in message
        suggestion = re.search(r"Did you mean '([^']*)'", message)
        if suggestion:
            QConfig.parse(suggestion[1])
    else:
        assert QConfig.parse(str(config)) == config


@pytest.mark.parametrize("value", [4, None, 4.0, ["W4"], QuantSpec(4)])
def test_not_a_notation_at_all(value: object) -> None:
    with pytest.raises(ConfigError, match="expected a QConfig or a notation such as 'A8W4@128'"):
        QConfig.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(0), "bits are 1..8, or 1.58 for ternary, found 0"),
        (lambda: QuantSpec(9), "found 9"),
        (lambda: QuantSpec(1.3), "found 1.3"),
        (lambda: QuantSpec(True), "found True"),
        (lambda: QuantSpec("4"), "found '4'"),
        (lambda: QuantSpec(float("nan")), "found nan"),
        (lambda: QuantSpec(1.58, "affine"), "ternary levels are -1, 0, 1"),
        (lambda: QuantSpec(4, "symmetric"), "scheme is one of affine, linear, found 'symmetric'"),
        (lambda: QuantSpec(4, granularity="row"), "granularity is one of tensor, channel, block, token"),
        (lambda: QuantSpec(4, method="xnor"), "method is one of ddt, ste, lsq, seq, found 'xnor'"),
        (lambda: QuantSpec(4, scale="median"), "scale is one of minmax, absmean"),
        (lambda: QuantSpec(4, method="lsq", scale="absmean"), "whose step is learned"),
        (lambda: QuantSpec(4, granularity="block"), "needs a group_size of at least 1, found None"),
        (lambda: QuantSpec(4, granularity="block", group_size=0), "found 0"),
        (lambda: QuantSpec(4, group_size=128), "group_size=128 needs granularity='block'"),
        (lambda: QuantSpec(4, lam=-1.0), "lam is a finite number of at least 0, found -1.0"),
        (lambda: QuantSpec(4, lam=float("inf")), "found inf"),
        (lambda: SparsitySpec("n:m", n=5, m=4), "sparsity 5:4"),
        (lambda: SparsitySpec("n:m", n=2), "kind='n:m' needs m"),
        (lambda: SparsitySpec("unstructured", n=2, ratio=0.5), "does not take n"),
        (lambda: SparsitySpec("unstructured", ratio=1.0), "sparsity 100%"),
        (lambda: SparsitySpec("unstructured", ratio=0.0), "sparsity 0%"),
        (lambda: SparsitySpec("block", ratio=0.5), "needs block_shape"),
        (lambda: SparsitySpec("block", ratio=0.5, block_shape=(0, 4)), "two sizes of at least 1"),
        (lambda: SparsitySpec("rows", ratio=0.5), "kind is one of n:m, unstructured, block"),
        (lambda: SparsitySpec.parse("2-4"), "expected N:M such as 2:4"),
        (lambda: SparsitySpec.parse(124), 'YAML reads an unquoted 2:4 as a number; write "2:4"'),
        (lambda: QConfig(weight=QuantSpec(4, granularity="token")), "a weight has no tokens"),
        (lambda: QConfig(activation=QuantSpec(4)), "granularity is tensor, token or block, found 'channel'"),
        (lambda: QConfig(weight="W4"), "weight is a QuantSpec or None, found 'W4'"),
        (lambda: QConfig(QuantSpec(4), None, SparsitySpec.parse("2:4")), "affine levels do not hold"),
        (lambda: QConfig(rules=("fc",)), "rules are Rule"),
        (lambda: Rule(4, None), "match is a glob"),
        (lambda: Rule(dict, None), "dict is a class, but not of modules"),
        (lambda: Rule("fc", 4), "config is a QConfig, a notation or None, found int"),
        (lambda: Rule("fc", QConfig(rules=(Rule("x", None),))), "has no rules of its own"),
        (lambda: Rule("fc", "W9"), "Did you mean 'W8'"),
        (lambda: QConfig.from_dict({"wieght": None}), "unknown key 'wieght'; did you mean 'weight'"),
        (lambda: QConfig.from_dict([1]), "QConfig: expected a mapping, found list"),
        (
            lambda: QConfig.from_dict({"weight": {"bit": 4}}),
            "QuantSpec: unknown key 'bit'; did you mean 'bits'",
        ),
        (lambda: QConfig.from_dict({"weight": {}}), "QuantSpec: bits is missing"),
        (lambda: QConfig.from_dict({"notation": "W4", "weight": None}), "takes only 'rules' beside it"),
        (
            lambda: QConfig.from_dict({"rules": [{"match": "x"}]}),
            "Rule: config is missing; the keys are match, config",
        ),
        (
            lambda: QConfig.from_dict({"rules": [{"match": {"regex": "("}, "config": None}]}),
            "not a regular expr",
        ),
        (
            lambda: QConfig.from_dict({"rules": [{"match": {"type": "os:path"}, "config": None}]}),
            "no such class",
        ),
        (lambda: QConfig.from_dict({"rules": [{"match": 4, "config": None}]}), "expected a glob"),
        (lambda: QConfig.from_json("{"), "not JSON"),
        (lambda: QConfig.from_yaml("{"), "not YAML"),
    ],
)
def test_bad_values(make, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)
    assert isinstance(error.value, QGraphError)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 1)
        self.head = nn.Linear(4, 2)


def resolve(config: QConfig, path: str) -> QConfig | None:
    net = Net()
    modules = dict(net.named_modules())
    parts = path.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts))]
    return config.resolve(path, modules[path], [(name, modules[name]) for name in above])


def test_the_last_matching_rule_wins() -> None:
    base = QConfig.parse("W4")
    config = base.with_rules(Rule("*", "W2"), Rule("encoder.*", "W1"), Rule("encoder.2", None))
    assert resolve(config, "head") == QConfig.parse("W2")
    assert resolve(config, "encoder.0") == QConfig.parse("W1")
    assert resolve(config, "encoder.2") is None
    assert resolve(base, "head") == base
    assert config.add_rules(Rule("head", "float")).resolve("head", nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    "match",
    [
        "encoder",
        "encoder.*",
        re.compile("^enc"),
        re.compile("encoder$"),
        nn.Sequential,
        lambda path, module: path == "encoder",
    ],
)
def test_a_rule_covers_what_is_below_its_match(match) -> None:
    config = QConfig.parse("W4").with_rules(Rule(match, None))
    assert resolve(config, "encoder.2") is None
    assert resolve(config, "head") is not None


def test_all_modules_at_once() -> None:
    config = QConfig.parse("W4").with_rules(Rule(nn.Sequential, None), Rule("encoder.0", "W2"))
    found = config.resolve_all(Net())
    assert set(found) == {name for name, _ in Net().named_modules()}
    assert found["encoder.0"] == QConfig.parse("W2")
    assert found["encoder"] is found["encoder.2"] is None
    assert found["head"] is found[""] is config


def test_rules_by_type_match_subclasses() -> None:
    class Mine(nn.Linear):
        pass

    config = QConfig.parse("W4").with_rules(Rule(nn.Linear, "W2"))
    assert config.resolve("x", Mine(1, 1)) == QConfig.parse("W2")
    assert config.resolve("x", nn.Conv2d(1, 1, 1)) is config


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("encodr.*", "did you mean 'encoder"),
        ("*.atention", "did you mean 'attention'"),
        ("zzz", "there are encoder, encoder.0"),
        (re.compile("^haed$"), "did you mean 'head'"),
        (nn.Conv2d, "rule Conv2d: no module of the model is one"),
        (nn.LSTM, "there are Linear, MultiheadAttention"),
        (lambda path, module: False, "the predicate is false for all 8 modules"),
    ],
)
def test_a_rule_that_matches_nothing(match, message: str) -> None:
    config = QConfig.parse("W4").with_rules(Rule("head", None), Rule(match, None))
    with pytest.raises(ConfigError) as error:
        config.check_rules(Net().named_modules())
    assert message in str(error.value)
    config.with_rules(Rule("head", None), Rule(nn.Linear, None)).check_rules(Net().named_modules())


def test_classes_are_written_by_name() -> None:
    config = QConfig.parse("W4").with_rules(Rule(Net, None))
    data = config.to_dict()
    assert data["rules"][0]["match"] == {"type": f"{__name__}:Net"}
    assert QConfig.from_dict(data) == config


def test_what_has_no_text_form_says_so() -> None:
    class Local(nn.Module):
        pass

    with pytest.raises(ConfigError, match="a predicate is code and has no text form"):
        QConfig.parse("W4").with_rules(Rule(lambda path, module: True, None)).to_dict()
    with pytest.raises(ConfigError, match="move the class to module level"):
        QConfig.parse("W4").with_rules(Rule(Local, None)).to_dict()


def test_hand_written_yaml() -> None:
    text = """
    notation: A8W4@128
    rules:
      - {match: head, config: null}
      - {match: {regex: "^encoder"}, config: W2-70%}
    """
    expected = QConfig.parse("A8W4@128").with_rules(Rule("head", None), Rule(re.compile("^encoder"), "W2-70%"))
    assert QConfig.from_yaml(text) == expected
    assert QConfig.from_yaml("A4W1-2:4@128") == QConfig.parse("A4W1-2:4@128")


@pytest.mark.parametrize("match", [nn.Sequential, lambda path, module: isinstance(module, nn.Sequential), "encoder"])
def test_a_rule_for_a_block_reaches_its_layers_in_a_prepared_model(match) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.encoder(x))

    prepared = prepare(Small(), QConfig.parse("W4").with_rules(Rule(match, None)), (torch.randn(2, 4),))
    floats = {site.name for site in sites(prepared) if site.weight is None}
    assert floats == {"encoder.0.weight"}
